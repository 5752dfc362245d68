//! seccomp(2): installing a filter that somebody else has compiled.
//! It must never allocate: it is called in a forked child.

use std::io::{Error, Result};

/// For all threads of the process at once, and all of them or none.
pub const TSYNC: libc::c_ulong = libc::SECCOMP_FILTER_FLAG_TSYNC;

/// Installs this filter on the calling thread, or on all of them where `flags` is [`TSYNC`].
///
/// # Errors
/// EACCES without no_new_privs, EINVAL for a program that the kernel does not take, ESRCH where a thread
/// has a filter of its own that TSYNC cannot bring into line.
pub fn set_filter(program: &[libc::sock_filter], flags: libc::c_ulong) -> Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| Error::from_raw_os_error(libc::EINVAL))?;
    let header = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: `header` points at `length` valid instructions; the kernel copies them and writes nothing.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &header) };
    match result {
        0 => Ok(()),
        // With TSYNC a positive answer is the thread that could not be brought into line.
        1.. => Err(Error::from_raw_os_error(libc::ESRCH)),
        _ => Err(Error::last_os_error()),
    }
}
