//! What a kernel says of itself, and the plainest fork there is, for trying layers on old kernels.
//! It must never change the process that asks.

use std::io::{Error, Result};

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

/// Forks with these CLONE_NEW flags by clone(2), which every kernel has: the pid, or `None` in the child.
///
/// # Errors
/// Those of clone(2).
pub fn fork(flags: i32) -> Result<Option<i32>> {
    let flags = (flags | libc::SIGCHLD) as libc::c_long;
    // SAFETY: without CLONE_VM and with stack 0 this is a fork; callers have one thread, so no lock of the
    // allocator is held by a thread that is not copied.
    match crate::check(unsafe { libc::syscall(libc::SYS_clone, flags, 0usize, 0usize, 0usize, 0usize) })? {
        0 => Ok(None),
        pid => Ok(Some(pid as i32)),
    }
}
