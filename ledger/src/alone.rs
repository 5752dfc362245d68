//! The command line's ledger: the same database, the same uid and the same confinement, for one question.
//! It must never touch the database as root: files that the server could not open would be left.

use std::io::{Read, Write};
use std::path::PathBuf;

use gaoler_ledger_wire::{FRAME_BYTES_MAX, Question, Told, decode, encode};
use nix::errno::Errno;
use nix::unistd::{Gid, Uid, chdir, chroot, geteuid, setgroups, setresgid, setresuid};

use crate::book::Book;
use crate::{schema, serve};

/// Answers the question on stdin.
///
/// # Errors
/// What stands between it and the database; a question that is answered with a refusal is no error.
pub fn ask(folder: &str, uid: u32) -> Result<(), String> {
    let mut frame = Vec::new();
    let read = std::io::stdin().take(FRAME_BYTES_MAX as u64 + 1).read_to_end(&mut frame);
    read.map_err(|error| format!("read the question: {error}"))?;
    let question: Question = decode(&frame).map_err(|why| format!("a question that is none: {why}"))?;
    let mut book = open(folder, uid)?;
    print(&encode(&Told { id: 0, answer: book.answer_root(question) })?)
}

/// Writes the database to stdout, as it is at one moment, while others may go on writing to it.
///
/// # Errors
/// What stands between it and the database.
pub fn backup(folder: &str, uid: u32) -> Result<(), String> {
    print(&open(folder, uid)?.image()?)
}

fn print(bytes: &[u8]) -> Result<(), String> {
    let mut out = std::io::stdout();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| format!("write the answer: {error}"))
}

/// Goes where the supervisor's ledger lives, becomes what it is, and opens the database.
fn open(folder: &str, uid: u32) -> Result<Book, String> {
    let failed = |step: &str, errno: Errno| format!("{step} {folder}: {}", errno.desc());
    chdir(folder).map_err(|errno| failed("enter", errno))?;
    let mut inside = PathBuf::from(folder);
    if geteuid().is_root() {
        match chroot(".") {
            Ok(()) => inside = PathBuf::from("/"),
            Err(Errno::EPERM) => {}
            Err(errno) => return Err(failed("change the root to", errno)),
        }
    }
    if geteuid().as_raw() != uid {
        let (own_uid, own_gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
        setgroups(&[])
            .and_then(|()| setresgid(own_gid, own_gid, own_gid))
            .and_then(|()| setresuid(own_uid, own_uid, own_uid))
            .map_err(|errno| format!("become the ledger's uid {uid}: {}; run this as root", errno.desc()))?;
    }
    serve::confined(&inside)?;
    schema::open(&inside).map(Book::new)
}
