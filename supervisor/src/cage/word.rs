//! What a cage in the making says to the supervisor: eight bytes, and nothing that it could not say wrong
//! with harm. Words come from our own code before the gate, from pid 1 after it.

use std::io::Result;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use gaoler_sys::channel;

/// Bytes of a word.
pub const WORD_BYTES: usize = 8;

/// A step of the ritual, in its order. The numbers are in Refused and in reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Descriptors that belong to others are closed.
    Descriptors = 1,
    /// Into the cgroup leaf.
    Cgroup = 2,
    /// The cgroup namespace.
    CgroupNamespace = 3,
    /// The network namespace.
    Network = 4,
    /// The host name.
    HostName = 5,
    /// /tmp, /dev/shm, the home, /run/gaoler.
    Temporary = 6,
    /// /proc.
    Proc = 7,
    /// The workspace and the session's folder.
    Workspace = 8,
    /// The listener of the broker.
    Listener = 9,
    /// The user namespace.
    UserNamespace = 10,
    /// Uids, gids, groups.
    Ids = 11,
    /// PDEATHSIG, dumpable, capabilities, no_new_privs.
    Privileges = 12,
    /// Options copied into files.
    Options = 13,
    /// The command's own process.
    Fork = 14,
    /// Session, keyring, rlimits, stdio.
    Process = 15,
    /// Landlock.
    Landlock = 16,
    /// seccomp.
    Seccomp = 17,
    /// What must fail fails.
    SelfTest = 18,
    /// The supervisor's look from outside.
    Attest = 19,
}

/// A word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// A step failed with this errno.
    Failed(u8, u16),
    /// The listener is made; it comes beside the word.
    Listener,
    /// The command's process is there, and cannot leave its place any more.
    Born,
    /// Everything is done but execve.
    Ready,
    /// execve failed with this errno.
    ExecFailed(u16),
    /// The command exited with this status.
    Exited(u8),
    /// This signal ended the command.
    Signaled(u8),
}

impl Word {
    fn bytes(self) -> [u8; WORD_BYTES] {
        let (tag, small, number) = match self {
            Word::Failed(step, errno) => (1, step, errno),
            Word::Listener => (2, 0, 0),
            Word::Born => (7, 0, 0),
            Word::Ready => (3, 0, 0),
            Word::ExecFailed(errno) => (4, 0, errno),
            Word::Exited(code) => (5, code, 0),
            Word::Signaled(signal) => (6, signal, 0),
        };
        let [low, high] = number.to_le_bytes();
        [b'g', tag, small, low, high, 0, 0, 0]
    }

    fn parse(bytes: &[u8]) -> Option<Word> {
        let [b'g', tag, small, low, high, 0, 0, 0] = *bytes else { return None };
        let number = u16::from_le_bytes([low, high]);
        Some(match (tag, small, number) {
            (1, step, errno) => Word::Failed(step, errno),
            (2, 0, 0) => Word::Listener,
            (7, 0, 0) => Word::Born,
            (3, 0, 0) => Word::Ready,
            (4, 0, errno) => Word::ExecFailed(errno),
            (5, code, 0) => Word::Exited(code),
            (6, signal, 0) => Word::Signaled(signal),
            _ => return None,
        })
    }
}

/// What the supervisor heard.
#[derive(Debug)]
pub enum Heard {
    /// A word, the descriptors beside it, and its speaker's pid where that was asked for.
    Word(Word, Vec<OwnedFd>, Option<i32>),
    /// Nothing for now.
    Nothing,
    /// The other end is closed.
    Closed,
    /// Something that is no word.
    Nonsense,
}

/// Says a word.
///
/// # Errors
/// Those of sendmsg(2).
pub fn say(to: impl AsFd, word: Word, fds: &[BorrowedFd<'_>]) -> Result<()> {
    channel::send(to.as_fd(), &word.bytes(), fds)
}

/// Hears the next word, without waiting.
pub fn hear(from: impl AsFd) -> Heard {
    match channel::receive::<WORD_BYTES>(from.as_fd()) {
        Ok(received) if received.bytes.is_empty() && received.fds.is_empty() => Heard::Closed,
        Ok(received) if received.truncated => Heard::Nonsense,
        Ok(received) => match Word::parse(&received.bytes) {
            Some(word) => Heard::Word(word, received.fds, received.pid),
            None => Heard::Nonsense,
        },
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Heard::Nothing,
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Heard::Nothing,
        Err(_) => Heard::Closed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_reads_as_it_was_said_and_nothing_else_is_a_word() {
        for word in [
            Word::Failed(3, 22),
            Word::Listener,
            Word::Born,
            Word::Ready,
            Word::ExecFailed(2),
            Word::Exited(7),
            Word::Signaled(9),
        ] {
            assert_eq!(Word::parse(&word.bytes()), Some(word));
        }
        for wrong in [&b""[..], b"g", b"g\x08\0\0\0\0\0\0", b"x\x03\0\0\0\0\0\0", b"g\x03\0\0\0\0\0\x01"] {
            assert_eq!(Word::parse(wrong), None, "{wrong:?}");
        }
    }
}
