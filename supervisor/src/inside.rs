//! An ordinary user's way to namespaces: a user namespace in which that user is root, entered before anything else.
//! It must never go in with groups that it could not leave behind for its cages.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use gaoler_sys::clone::{Side, fork, wait};
use gaoler_sys::process::{self, Strings};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid, getgroups};

use crate::fault::{Doing, Fault};
use crate::notify;

/// The argument that says that it is done.
pub const WORD: &str = "inside";

/// Starts this program anew as the root of a user namespace, where this host lets an ordinary user have one;
/// returns where it does not. Anew, because only a program that began inside is the namespace's to look at.
///
/// # Errors
/// Supplementary groups, which nobody inside could drop; or a step that worked in the attempt and then did not.
pub fn enter() -> Result<(), Fault> {
    let attempt = match fork(0, None).doing("try a user namespace")? {
        Side::Child => process::exit(u8::from(become_root().and_then(|()| use_it()).is_err())),
        Side::Parent(child) => wait(child.pid, 0).doing("try a user namespace")?,
    };
    if attempt.is_none_or(|(_, ended)| ended.code != Some(0)) {
        return Ok(());
    }
    let own = getegid();
    if getgroups().doing("list groups")?.iter().any(|group| *group != own) {
        let why = "this user has supplementary groups, which a user namespace cannot drop and every cage would \
                   keep; start gaoler with the primary group alone (setpriv --clear-groups, or SupplementaryGroups= \
                   in the service file)";
        return Err(Fault::new("enter a user namespace", why));
    }
    become_root().doing("enter a user namespace")?;
    let program = File::open("/proc/self/exe").doing("open the own program")?;
    let words = std::env::args_os().take(2).chain([WORD.into()]);
    let argv = Strings::new(words.filter_map(|word| CString::new(word.as_bytes()).ok()).collect());
    // Of the environment only the service manager's ear.
    let ear = std::env::var_os(notify::VARIABLE)
        .map(|name| [notify::VARIABLE.as_bytes(), b"=", name.as_bytes()].concat());
    let environment = Strings::new(ear.and_then(|ear| CString::new(ear).ok()).into_iter().collect());
    Err(process::execute_file(program.as_fd(), &argv, &environment)).doing("start anew inside")
}

/// Whether this really is one: root of it is one user of the host, and that user is not the host's root.
///
/// # Errors
/// A user namespace of more than one id, or the host's own.
pub fn check() -> Result<(), Fault> {
    let what = "start inside a user namespace";
    let map = fs::read_to_string("/proc/self/uid_map").doing(what)?;
    let words: Vec<&str> = map.split_whitespace().collect();
    match words[..] {
        ["0", host, "1"] if host != "0" => Ok(()),
        _ => Err(Fault::new(what, "this is another one than gaoler makes; it is started by gaoler alone")),
    }
}

fn become_root() -> std::io::Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER)?;
    // Some hosts have no such file, and then need no such word.
    match write("/proc/self/setgroups", "deny") {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    write("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", &format!("0 {gid} 1"))?;
    // Mounts are made anew in it, and only what belongs to it can be copied. Where it refuses, nothing is mounted.
    let _ = unshare(CloneFlags::CLONE_NEWNS);
    Ok(())
}

/// As `fs::write`, without the wish to make the file, which not every /proc takes.
fn write(path: &str, text: &str) -> std::io::Result<()> {
    File::options().write(true).open(path)?.write_all(text.as_bytes())
}

/// A namespace without rights in it is none: some hosts let anybody make one, and then deny what it is for.
fn use_it() -> std::io::Result<()> {
    Ok(unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWNET)?)
}
