//! The supervised process: confined, then one loop over its two sockets.
//! It must never acknowledge what is not on the disk, nor outlive its supervisor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use gaoler_confine::{self as confine, Files, Process};
use gaoler_ledger_wire::{Asked, FRAME_BYTES_MAX, Refusal, Told, decode, encode};
use gaoler_protocol::{Message, Ready, Role};
use gaoler_sys::channel;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::book::{Book, Keep};
use crate::schema;

/// The descriptor of the questions' socket.
const QUESTIONS_FD: RawFd = 4;
/// Questions of one commit, at most.
const BATCH: usize = 64;
/// How long the frontend may leave its end full. It reads in a loop that waits for nothing else.
const SEND_MS: u16 = 5000;

/// Serves until the supervisor's or the frontend's end.
///
/// # Errors
/// What the confinement, the database or a socket refuses.
pub fn supervised(keep: Keep) -> Result<(), String> {
    static QUESTIONS: AtomicBool = AtomicBool::new(false);
    let control = channel::inherited_control().ok_or("descriptor 3 is no control socket")?;
    let questions = channel::take_inherited(QUESTIONS_FD, &QUESTIONS).ok_or("descriptor 4 is no socket")?;
    let folder = std::env::current_dir().map_err(|error| format!("find the own folder: {error}"))?;
    confined(&folder)?;
    let mut book = Book::new(schema::open(&folder)?);
    let ready = Message::Ready(Ready { role: Role::Ledger, threads: 1 });
    channel::send(control.as_fd(), &ready.encode(1), &[]).map_err(|error| format!("say ready: {error}"))?;
    loop {
        match wait(&control, &questions)? {
            Woken::End => return Ok(()),
            Woken::Questions => {
                let end = serve(&questions, &mut book)?;
                book.tidy(keep);
                if end {
                    // The supervisor ends this process in its own time, and takes our end for a fault before.
                    drop(questions);
                    return wait_for_end(&control);
                }
            }
        }
    }
}

/// Gives up everything but this folder, and shows it.
///
/// # Errors
/// The step that did not hold.
pub fn confined(folder: &Path) -> Result<(), String> {
    let abi = confine::before_threads(Files::ButBelow(folder)).map_err(|error| error.to_string())?;
    confine::after_threads(Process::Ledger).map_err(|error| error.to_string())?;
    // Where there is neither Landlock nor a root of its own, its uid alone keeps it from others' files.
    let rooted = folder == Path::new("/");
    match (abi > 0 || rooted) && std::fs::File::open("/proc/self/status").is_ok() {
        true => Err("a file could be opened after the confinement".into()),
        false => Ok(()),
    }
}

enum Woken {
    End,
    Questions,
}

fn wait(control: &OwnedFd, questions: &OwnedFd) -> Result<Woken, String> {
    let mut fds = [control, questions].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
    poll(&mut fds, PollTimeout::NONE).map_err(|error| format!("poll: {error}"))?;
    // The supervisor has nothing to say to this process: whatever comes from there is its end.
    match fds[0].any() {
        Some(true) => Ok(Woken::End),
        _ => Ok(Woken::Questions),
    }
}

fn wait_for_end(control: &OwnedFd) -> Result<(), String> {
    let mut fds = [PollFd::new(control.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::NONE).map(|_| ()).map_err(|error| format!("poll: {error}"))
}

/// Answers what has come; whether the frontend is gone.
fn serve(questions: &OwnedFd, book: &mut Book) -> Result<bool, String> {
    let (mut ids, mut batch, mut end) = (Vec::new(), Vec::new(), false);
    while batch.len() < BATCH {
        let received = match channel::receive::<{ FRAME_BYTES_MAX + 1 }>(questions.as_fd()) {
            Ok(received) => received,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                end = true;
                break;
            }
            Err(error) => return Err(format!("receive a question: {error}")),
        };
        if received.bytes.is_empty() && received.fds.is_empty() {
            end = true;
            break;
        }
        if received.truncated || !received.fds.is_empty() || received.bytes.len() > FRAME_BYTES_MAX {
            return Err("a question that is none".into());
        }
        let asked: Asked =
            decode(&received.bytes).map_err(|why| format!("a question that is none: {why}"))?;
        ids.push(asked.id);
        batch.push((asked.by, asked.question));
    }
    for (id, answer) in ids.into_iter().zip(book.answer_all(batch)) {
        let told = encode(&Told { id, answer });
        let frame = match told {
            Ok(frame) => frame,
            Err(_) => encode(&Told { id, answer: Err(Refusal::Failed) })?,
        };
        if !end {
            send(questions.as_fd(), &frame)?;
        }
    }
    Ok(end)
}

fn send(to: BorrowedFd<'_>, frame: &[u8]) -> Result<(), String> {
    loop {
        match channel::send(to, frame, &[]) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(to, PollFlags::POLLOUT)];
                if poll(&mut fds, SEND_MS).map_err(|error| format!("poll: {error}"))? == 0 {
                    return Err("the frontend does not read".into());
                }
            }
            // It is gone: what was written stays written.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(format!("send an answer: {error}")),
        }
    }
}
