//! Bytes between our own stdio and the pipes of a cage. It must never hand our descriptors to the cage: a
//! run gets pipes of its own, so that nothing in it can reach a caller's terminal or files.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

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

/// Starts relaying. The returned pipe ends when stdout and stderr have been handed on to their last byte.
///
/// # Errors
/// Those of fcntl(2), dup(2) and pipe2(2).
pub fn relay(pipes: Pipes) -> std::io::Result<OwnedFd> {
    for fd in [&pipes.stdin, &pipes.stdout, &pipes.stderr] {
        // The supervisor's ends do not block, which a thread of its own needs no help with.
        let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
        fcntl(fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    }
    let (stdin, stdout, stderr) = (own(std::io::stdin())?, own(std::io::stdout())?, own(std::io::stderr())?);
    let (ended, ends) = std::io::pipe()?;
    let also_ends = ends.try_clone()?;
    // Nobody waits for this thread: it may be blocked in a read of a terminal when the run is over.
    std::thread::spawn(move || copy(stdin, pipes.stdin.into()));
    std::thread::spawn(move || {
        copy(pipes.stdout.into(), stdout);
        drop(ends);
    });
    std::thread::spawn(move || {
        copy(pipes.stderr.into(), stderr);
        drop(also_ends);
    });
    Ok(ended.into())
}

/// Copies until one side is closed; then both are, and the other end of each sees it.
fn copy(mut from: File, mut to: File) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if write_all(&mut to, &buffer[..length]).is_err() {
            return;
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
        let thread = std::thread::spawn(move || copy(OwnedFd::from(from).into(), OwnedFd::from(sink).into()));
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
        let thread = std::thread::spawn(move || copy(OwnedFd::from(from).into(), OwnedFd::from(sink).into()));
        drop(to);
        thread.join().expect("ended");
        assert_eq!(source.read(&mut [0; 1]).expect("the end"), 0);
    }
}
