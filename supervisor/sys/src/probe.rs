//! What a kernel says of itself, for trying layers.
//! It must never change the process that asks.

use std::io::{Error, Result};
use std::os::fd::{FromRawFd, OwnedFd};

/// The newest Landlock ABI of this kernel; the errno where there is none (ENOSYS not built, EOPNOTSUPP
/// switched off at boot).
///
/// # Errors
/// Those of landlock_create_ruleset(2).
pub fn landlock_abi() -> Result<u8> {
    const VERSION: libc::c_ulong = 1;
    let nothing = std::ptr::null::<u8>();
    // SAFETY: with this flag the call takes a null pointer of length 0 and only answers a number.
    let answer = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0usize, VERSION) };
    match u8::try_from(answer) {
        Ok(abi) => Ok(abi),
        Err(_) if answer < 0 => Err(Error::last_os_error()),
        Err(_) => Ok(u8::MAX),
    }
}

/// Whether clone3(2) is there: without arguments it refuses with EINVAL, and makes nothing.
///
/// # Errors
/// ENOSYS or EPERM where it is not.
pub fn clone3() -> Result<()> {
    // SAFETY: a null pointer and a size of zero are refused before anything is read.
    unsafe { libc::syscall(libc::SYS_clone3, 0usize, 0usize) };
    match Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        error => Err(error),
    }
}

/// Whether a pidfd of this process can be had.
///
/// # Errors
/// Those of pidfd_open(2).
pub fn pidfd() -> Result<()> {
    // SAFETY: two numbers; the result is a fresh descriptor, closed at once.
    let fd = crate::check(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) })?;
    // SAFETY: as above.
    drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    Ok(())
}

/// A piece of System V shared memory, which everybody in one ipc namespace sees. Gone when this is dropped.
#[derive(Debug)]
pub struct Segment {
    key: i32,
    id: i32,
}

impl Segment {
    /// A fresh one.
    ///
    /// # Errors
    /// Those of shmget(2).
    pub fn make() -> Result<Segment> {
        let key = std::process::id().cast_signed();
        // SAFETY: three numbers; nothing is attached.
        let id = crate::check(
            unsafe { libc::shmget(key, 4096, libc::IPC_CREAT | libc::IPC_EXCL | 0o600) }.into(),
        )?;
        Ok(Segment { key, id: id as i32 })
    }

    /// Whether this process sees it.
    pub fn is_seen(&self) -> bool {
        // SAFETY: three numbers; nothing is attached.
        unsafe { libc::shmget(self.key, 0, 0) >= 0 }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: removing takes no buffer.
        unsafe { libc::shmctl(self.id, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}
