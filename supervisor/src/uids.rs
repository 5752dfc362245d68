//! Uids of runs: one per running cage, held by a locked byte of `<state>/uids`.
//! Two cages must never run under one uid, not even of two supervisors on one state.

use std::fs::{File, OpenOptions};
use std::io::Result;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// Becomes this uid, and the gid of the same number, in all three ids, with no other group.
///
/// # Errors
/// Those of setgroups(2), setresgid(2) and setresuid(2).
pub fn become_uid(uid: u32) -> nix::Result<()> {
    setgroups(&[])?;
    become_ids(uid)
}

/// The same where groups cannot be changed: in a user namespace that denies it.
///
/// # Errors
/// Those of setresgid(2) and setresuid(2).
pub fn become_ids(uid: u32) -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}

/// The range, and which of it this supervisor holds.
#[derive(Debug)]
pub struct Uids {
    file: File,
    first: u32,
    taken: Vec<bool>,
    next: usize,
}

/// A number in the range that nobody else holds: the uid is the range's first plus this.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot(pub u32);

impl Uids {
    /// The range `[first, count]`, locked through this file.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(file: &Path, [first, count]: [u32; 2]) -> Result<Uids> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(file)?;
        Ok(Uids { file, first, taken: vec![false; count as usize], next: 0 })
    }

    /// A free number, or `None` where all are held. Round robin, so that a number rests before it comes again.
    pub fn take(&mut self) -> Option<Slot> {
        let count = self.taken.len();
        let index =
            (0..count).map(|i| (self.next + i) % count).find(|&i| !self.taken[i] && self.lock(i, true))?;
        self.taken[index] = true;
        self.next = index + 1;
        Some(Slot(index as u32))
    }

    /// The uid of a slot.
    pub fn uid(&self, slot: &Slot) -> u32 {
        self.first + slot.0
    }

    /// Gives a number back.
    pub fn release(&mut self, slot: Slot) {
        self.lock(slot.0 as usize, false);
        self.taken[slot.0 as usize] = false;
    }

    /// Open file description locks: they are the supervisor's, not a process's, and go with it. The byte's
    /// offset is the uid itself, so that two configurations with overlapping ranges still meet.
    fn lock(&self, index: usize, hold: bool) -> bool {
        let lock = libc::flock {
            l_type: if hold { libc::F_WRLCK } else { libc::F_UNLCK } as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: i64::from(self.first) + index as i64,
            l_len: 1,
            l_pid: 0,
        };
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)) {
            // An older kind, the process's own: it does as long as this file is opened nowhere else.
            Err(Errno::EINVAL) => fcntl(&self.file, FcntlArg::F_SETLK(&lock)).is_ok(),
            result => result.is_ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_supervisors_on_one_state_never_hold_the_same_uid() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("uids");
        let mut one = Uids::open(&file, [7000, 3]).unwrap();
        let mut two = Uids::open(&file, [7000, 3]).unwrap();
        let (a, b) = (one.take().unwrap(), two.take().unwrap());
        assert_eq!((one.uid(&a), two.uid(&b)), (7000, 7001));
        let c = one.take().unwrap();
        assert_eq!(one.uid(&c), 7002);
        assert_eq!((one.take(), two.take()), (None, None));
        two.release(b);
        assert_eq!(one.take(), Some(Slot(1)));
        drop(one);
        assert_eq!(two.take(), Some(Slot(2)));
    }
}
