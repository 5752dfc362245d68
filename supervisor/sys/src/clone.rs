//! clone3(2) like fork, with a pidfd and where wanted into a cgroup.
//! It must never be called by a process that has threads: the child goes on with a copy of one thread.

use std::io::Result;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::check;

/// A child, as its parent knows it. The pidfd can never name another process, as a pid can.
#[derive(Debug)]
pub struct Child {
    /// Its pid in the parent's namespace.
    pub pid: i32,
    /// Its pidfd, close-on-exec; readable once it has ended.
    pub pidfd: OwnedFd,
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
/// Those of clone3(2).
pub fn clone3(flags: i32, cgroup: Option<BorrowedFd<'_>>) -> Result<Side> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers; all zero is its documented default.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (flags | libc::CLONE_PIDFD) as u32 as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and with stack 0 this is a fork: the child gets a copy of everything, and
    // the caller has one thread, so no lock of the allocator can be held by a thread that is not copied.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        return Ok(Side::Child);
    }
    // SAFETY: the kernel has stored a fresh descriptor there, owned by nobody else.
    Ok(Side::Parent(Child { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }))
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
    /// Ends it now. An ended child is no error.
    pub fn kill(&self) {
        // SAFETY: no memory is passed; a stale pidfd gives ESRCH, which is what we want.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), libc::SIGKILL, 0, 0);
        }
    }

    /// Reaps it, if it has ended.
    ///
    /// # Errors
    /// Those of wait4(2).
    pub fn reap(&self) -> Result<Option<Ended>> {
        wait(self.pid, libc::WNOHANG).map(|found| found.map(|(_, ended)| ended))
    }

    /// Reaps it, waiting for its end. Only for a child that has been killed or is about to end.
    ///
    /// # Errors
    /// Those of wait4(2).
    pub fn reap_blocking(&self) -> Result<Option<Ended>> {
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
