//! Bytes between our own stdio and the pipes of a cage. It must never hand our descriptors to the cage: a
//! run gets pipes of its own, so that nothing in it can reach a caller's terminal or files.

use std::fs::File;
use std::io::{ErrorKind, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::meter::Meter;

/// Bytes in flight a direction: a pipe's usual capacity.
const BUFFER_BYTES: usize = 64 * 1024;

/// The cage's ends of its stdio, as they come with Spawned.
pub struct Pipes {
    /// Where the command reads.
    pub stdin: OwnedFd,
    /// Where it writes.
    pub stdout: OwnedFd,
    /// Where it complains.
    pub stderr: OwnedFd,
}

/// A relay under way.
pub struct Relay {
    /// Ends when stdout and stderr have been handed on to their last byte.
    pub drained: OwnedFd,
    /// Becomes readable when the run has written more than it may. Nothing of the excess is handed on.
    pub over: OwnedFd,
    /// Held, so that the end of a copy is no excess.
    _excess: PipeWriter,
}

/// Starts relaying, and counts what the run writes.
///
/// # Errors
/// Those of fcntl(2), dup(2) and pipe2(2).
pub fn relay(pipes: Pipes, meter: &Arc<Meter>) -> std::io::Result<Relay> {
    for fd in [&pipes.stdin, &pipes.stdout, &pipes.stderr] {
        // The supervisor's ends do not block, which a thread of its own needs no help with.
        let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
        fcntl(fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    }
    let (stdin, stdout, stderr) = (own(std::io::stdin())?, own(std::io::stdout())?, own(std::io::stderr())?);
    let (ended, ends) = std::io::pipe()?;
    let (over, excess) = std::io::pipe()?;
    let copies = [
        (pipes.stdout, stdout, ends.try_clone()?, excess.try_clone()?),
        (pipes.stderr, stderr, ends, excess.try_clone()?),
    ];
    // Nobody waits for this thread: it may be blocked in a read of a terminal when the run is over.
    std::thread::spawn(move || copy(&mut { stdin }, pipes.stdin.into(), None));
    for (from, to, ends, mut excess) in copies {
        let mut from = File::from(from);
        let meter = Arc::clone(meter);
        std::thread::spawn(move || {
            if copy(&mut from, to, Some(&meter)) == Ended::Over {
                let _ = excess.write_all(b"!");
                // Closed here, the pipe would end the run before its limit does, and as if by itself.
                let _ = std::io::copy(&mut from, &mut std::io::sink());
            }
            drop(ends);
        });
    }
    Ok(Relay { drained: ended.into(), over: over.into(), _excess: excess })
}

/// Why a copy ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// One side was closed.
    Closed,
    /// The run has written more than it may.
    Over,
}

/// Copies until one side is closed. Its caller closes the other then.
fn copy(from: &mut File, mut to: File, meter: Option<&Meter>) -> Ended {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => return Ended::Closed,
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return Ended::Closed,
        };
        if meter.is_some_and(|meter| !meter.count(length)) {
            return Ended::Over;
        }
        let mut write = || write_all(&mut to, &buffer[..length]);
        let written = match meter {
            Some(meter) => meter.while_busy(write),
            None => write(),
        };
        if written.is_err() {
            return Ended::Closed;
        }
    }
}

/// Writes all, also to a stdout that somebody else has set to not block.
fn write_all(to: &mut File, mut bytes: &[u8]) -> std::io::Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let _ = poll(&mut [PollFd::new(to.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A copy of one of our own descriptors: the relay may close it without closing ours.
fn own(fd: impl AsFd) -> std::io::Result<File> {
    Ok(fd.as_fd().try_clone_to_owned()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_reader_ends_the_writer() {
        let (mut source, sink) = std::io::pipe().expect("a pipe");
        let (from, mut to) = std::io::pipe().expect("a pipe");
        let thread = std::thread::spawn(move || {
            copy(&mut OwnedFd::from(from).into(), OwnedFd::from(sink).into(), None)
        });
        to.write_all(b"first").expect("written");
        let mut first = [0; 5];
        source.read_exact(&mut first).expect("relayed");
        assert_eq!(&first, b"first");
        drop(source);
        // The next byte finds no reader: the relay ends, and with it the pipe that feeds it.
        to.write_all(b"x").expect("written");
        thread.join().expect("ended");
        assert_eq!(to.write_all(b"y").expect_err("closed").kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn the_end_of_input_is_handed_on() {
        let (mut source, sink) = std::io::pipe().expect("a pipe");
        let (from, to) = std::io::pipe().expect("a pipe");
        let thread = std::thread::spawn(move || {
            copy(&mut OwnedFd::from(from).into(), OwnedFd::from(sink).into(), None)
        });
        drop(to);
        thread.join().expect("ended");
        assert_eq!(source.read(&mut [0; 1]).expect("the end"), 0);
    }

    #[test]
    fn what_a_run_may_not_write_is_not_handed_on() {
        let meter = Meter::new(&gaoler_protocol::Limits { output_mib: 1, ..gaoler_protocol::Limits::NONE });
        let (mut source, sink) = std::io::pipe().expect("a pipe");
        let (from, mut to) = std::io::pipe().expect("a pipe");
        let copying = std::thread::spawn(move || {
            copy(&mut OwnedFd::from(from).into(), OwnedFd::from(sink).into(), Some(&meter))
        });
        let writing = std::thread::spawn(move || while to.write_all(&[b'x'; 4096]).is_ok() {});
        let mut bytes = Vec::new();
        source.read_to_end(&mut bytes).expect("the end");
        assert_eq!(copying.join().expect("no panic"), Ended::Over);
        writing.join().expect("no panic");
        assert!(bytes.len() <= 1 << 20, "{} bytes came through", bytes.len());
        assert!(bytes.len() > (1 << 20) - BUFFER_BYTES, "{} bytes came through", bytes.len());
    }
}
