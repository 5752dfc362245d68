//! clone(2) like fork, and clone3(2) where a child is to be born in a control group; and the ends of children.
//! It must never be called by a process that has threads: the child goes on with a copy of one thread.

use std::io::Result;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::check;

/// A child, as its parent knows it. Its pid is its own until it is reaped, which only its parent can do.
#[derive(Debug)]
pub struct Child {
    /// Its pid in the parent's namespace.
    pub pid: i32,
}

/// The constant of linux/sched.h; the one in libc is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of the fork this is.
#[derive(Debug)]
pub enum Side {
    /// The new process.
    Child,
    /// The caller.
    Parent(Child),
}

/// Forks with these CLONE_ flags, into this cgroup v2 folder where one is given. The child's end is
/// reported by SIGCHLD.
///
/// # Errors
/// Those of clone(2), or with a group of clone3(2), which some hosts do not have.
pub fn fork(flags: i32, cgroup: Option<BorrowedFd<'_>>) -> Result<Side> {
    let pid = match cgroup {
        Some(cgroup) => into(flags, cgroup)?,
        None => {
            let flags = (flags | libc::SIGCHLD) as libc::c_long;
            // SAFETY: without CLONE_VM and with stack 0 this is a fork: the child gets a copy of everything,
            // and the caller has one thread, so no lock of the allocator is held by one that is not copied.
            check(unsafe { libc::syscall(libc::SYS_clone, flags, 0usize, 0usize, 0usize, 0usize) })?
        }
    };
    Ok(if pid == 0 { Side::Child } else { Side::Parent(Child { pid: pid as i32 }) })
}

fn into(flags: i32, cgroup: BorrowedFd<'_>) -> Result<libc::c_long> {
    // SAFETY: clone_args is plain integers; all zero is its documented default.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags as u32 as u64 | CLONE_INTO_CGROUP;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: as in `fork`.
    check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) })
}

/// How a child ended, with what it and the descendants that it waited for used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ended {
    /// The exit status, where it exited.
    pub code: Option<u8>,
    /// The signal, where one ended it.
    pub signal: Option<u8>,
    /// Microseconds of user CPU.
    pub user_us: u64,
    /// Microseconds of system CPU.
    pub system_us: u64,
    /// The largest resident set of one process, KiB.
    pub maxrss_kib: u64,
}

impl Child {
    /// Ends it now. An ended child is no error; one that was reaped must not be asked, since its pid may be
    /// somebody else's.
    pub fn kill(&self) {
        // SAFETY: no memory is passed.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }

    /// Reaps it, waiting for its end. Only for a child that has been killed or is about to end.
    ///
    /// # Errors
    /// Those of wait4(2).
    pub fn reap_blocking(self) -> Result<Option<Ended>> {
        wait(self.pid, 0).map(|found| found.map(|(_, ended)| ended))
    }
}

/// wait4(2) of one pid or, with -1, of any child.
///
/// # Errors
/// Those of wait4(2).
pub fn wait(pid: i32, options: i32) -> Result<Option<(i32, Ended)>> {
    let mut status = 0;
    // SAFETY: rusage is plain integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals of the right types.
    let found =
        check(unsafe { libc::wait4(pid, &raw mut status, options | libc::__WALL, &raw mut usage) }.into())?;
    if found == 0 {
        return Ok(None);
    }
    let us = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    let ended = Ended {
        code: libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status) as u8),
        signal: libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status) as u8),
        user_us: us(usage.ru_utime),
        system_us: us(usage.ru_stime),
        maxrss_kib: usage.ru_maxrss as u64,
    };
    Ok(Some((found as i32, ended)))
}
