//! What a process does to itself on its way into a cage: prctl, keyring, limits, descriptors, execve.
//! Everything here may run in a forked child and must never allocate without a bound.

use std::ffi::{CStr, CString};
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::check;

fn prctl(option: i32, value: u64) -> Result<i32> {
    // SAFETY: the options used here take integers only.
    check(unsafe { libc::prctl(option, value, 0, 0, 0) }.into()).map(|n| n as i32)
}

/// Asks for SIGKILL when the parent ends. Only after the last change of ids, which clears it.
///
/// # Errors
/// Those of prctl(2).
pub fn die_with_parent() -> Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64).map(|_| ())
}

/// Descendants whose parent ends become this process's children.
///
/// # Errors
/// Those of prctl(2).
pub fn adopt_orphans() -> Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1).map(|_| ())
}

/// Makes this process untraceable by its own uid, and its /proc files root's.
///
/// # Errors
/// Those of prctl(2).
pub fn not_dumpable() -> Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0).map(|_| ())
}

/// No execve can give privileges any more.
///
/// # Errors
/// Those of prctl(2).
pub fn no_new_privs() -> Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map(|_| ())
}

/// Empties the bounding set. It takes CAP_SETPCAP, so it comes before a change of ids that drops it.
///
/// # Errors
/// Those of prctl(2).
pub fn empty_bounding_set() -> Result<()> {
    // 64 is the width of the kernel's capability mask; PR_CAPBSET_READ says EINVAL past the last one.
    for capability in 0..64 {
        match prctl(libc::PR_CAPBSET_READ, capability) {
            Ok(1) => prctl(libc::PR_CAPBSET_DROP, capability).map(|_| ())?,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    Ok(())
}

/// Drops every capability from every set but the bounding set.
///
/// # Errors
/// Those of prctl(2) and capset(2).
pub fn drop_permitted() -> Result<()> {
    match prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64) {
        // There is no such set here (gVisor).
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        cleared => drop(cleared?),
    }
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    // _LINUX_CAPABILITY_VERSION_3, which has two words a set.
    let header = Header { version: 0x2008_0522, pid: 0 };
    let none = [[0u32; 3]; 2];
    // SAFETY: both structures have the layout of capset(2), version 3.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) }).map(|_| ())
}

/// A session keyring of its own, so that no key of the caller's is searched.
///
/// # Errors
/// Those of keyctl(2).
pub fn new_session_keyring() -> Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0usize, 0, 0, 0) })
        .map(|_| ())
}

/// Closes every descriptor but these (in ascending order).
///
/// # Errors
/// Those of close_range(2).
pub fn close_all_but(keep: &[RawFd]) -> Result<()> {
    let close = |first: u32, last: u32| {
        // SAFETY: the caller owns nothing in this range that it goes on using: it has said what it keeps.
        check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(|_| ())
    };
    let mut next = 0u32;
    for &fd in keep {
        let fd = fd as u32;
        if fd > next {
            close(next, fd - 1)?;
        }
        next = next.max(fd + 1);
    }
    // No descriptor has a higher number; gVisor refuses an end that is no number of one.
    close(next, i32::MAX as u32)
}

/// Puts these descriptors at 0, 1, 2, ... without close-on-exec. Sources must not lie in that range.
///
/// # Errors
/// Those of dup2(2).
pub fn place(fds: &[BorrowedFd<'_>], first: RawFd) -> Result<()> {
    for (target, fd) in (first..).zip(fds) {
        // SAFETY: dup2 touches descriptors only; the target range is the caller's to give.
        check(unsafe { libc::dup2(fd.as_raw_fd(), target) }.into())?;
    }
    Ok(())
}

/// A copy of a descriptor with a number of at least `least`, close-on-exec.
///
/// # Errors
/// Those of fcntl(2).
pub fn copy_above(fd: BorrowedFd<'_>, least: RawFd) -> Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC touches descriptors only; its result is a fresh one.
    unsafe {
        let copy = check(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least).into())?;
        Ok(OwnedFd::from_raw_fd(copy as RawFd))
    }
}

/// Gives a signal its default action again.
///
/// # Errors
/// Those of sigaction(2).
pub fn default_signal(signal: nix::sys::signal::Signal) -> nix::Result<()> {
    // SAFETY: no handler of ours is installed that could be interrupted half way.
    unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) }.map(|_| ())
}

/// Sets both bounds of an rlimit.
///
/// # Errors
/// Those of setrlimit(2).
pub fn limit(resource: libc::__rlimit_resource_t, bound: u64) -> Result<()> {
    let bound = libc::rlimit { rlim_cur: bound, rlim_max: bound };
    // SAFETY: the structure is a live local.
    check(unsafe { libc::setrlimit(resource, &raw const bound) }.into()).map(|_| ())
}

/// Takes as many open files as this process may have, and says how many those are.
///
/// # Errors
/// Those of setrlimit(2).
pub fn raise_open_files() -> Result<u64> {
    let mut bound = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is a live local.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut bound) }.into())?;
    limit(libc::RLIMIT_NOFILE, bound.rlim_max)?;
    Ok(bound.rlim_max)
}

/// Whether two tasks have one memory (1) or one table of descriptors (2), as kcmp(2) numbers these; not where the
/// kernel does not tell.
pub fn share(one: i32, other: i32, what: i32) -> bool {
    // SAFETY: these two comparisons take integers only.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, what, 0, 0) == 0 }
}

/// A copy of a descriptor of another process's, of which both then are owners.
///
/// # Errors
/// Those of pidfd_open(2) and pidfd_getfd(2).
pub fn copy_of(pid: i32, fd: i32) -> Result<OwnedFd> {
    // SAFETY: both calls take integers only, and what they return is new and nobody else's.
    unsafe {
        let process = OwnedFd::from_raw_fd(check(libc::syscall(libc::SYS_pidfd_open, pid, 0))? as i32);
        let copy = check(libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0))?;
        Ok(OwnedFd::from_raw_fd(copy as i32))
    }
}

/// Pointers to C strings with the null at the end that execve(2) wants.
pub struct Strings {
    pointers: Vec<*const libc::c_char>,
    _owned: Vec<CString>,
}

impl Strings {
    /// These strings, in order.
    pub fn new(strings: Vec<CString>) -> Strings {
        let pointers = strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect();
        Strings { pointers, _owned: strings }
    }
}

/// execve(2). Returns only with the error.
pub fn execute(path: &CStr, argv: &Strings, environment: &Strings) -> Error {
    // SAFETY: all three are null-terminated as execve wants, and live until it returns.
    unsafe { libc::execve(path.as_ptr(), argv.pointers.as_ptr(), environment.pointers.as_ptr()) };
    Error::last_os_error()
}

/// execveat(2) of an open file. Returns only with the error.
pub fn execute_file(file: BorrowedFd<'_>, argv: &Strings, environment: &Strings) -> Error {
    // SAFETY: as above; the path is an empty C string.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            argv.pointers.as_ptr(),
            environment.pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Error::last_os_error()
}

/// Ends this process without running anything that its parent registered.
pub fn exit(code: u8) -> ! {
    // SAFETY: _exit never returns and runs no handlers.
    unsafe { libc::_exit(code.into()) }
}

/// Switches the loopback interface of this network namespace on.
///
/// # Errors
/// Those of socket(2) and ioctl(2).
pub fn loopback_up() -> Result<()> {
    // SAFETY: ifreq is plain bytes; the socket is fresh and owned here; the ioctls get a live ifreq.
    unsafe {
        let socket = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0).into())?;
        let socket = OwnedFd::from_raw_fd(socket as i32);
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request).into()).map(|_| ())
    }
}

/// Fills with random bytes of the kernel.
///
/// # Errors
/// Those of getrandom(2).
pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the buffer is a live local; requests up to 256 bytes are never cut.
    let got = check(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) } as libc::c_long)?;
    if got as usize == N { Ok(bytes) } else { Err(Error::from_raw_os_error(libc::EINTR)) }
}

/// Has what is freed go back to the kernel: large pieces at once (glibc would keep up to 32 MiB of each kind that it has
/// seen), and the rest from two arenas at most, rather than eight for each CPU.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (what, value) in
        [(libc::M_MMAP_THRESHOLD, 1 << 17), (libc::M_TRIM_THRESHOLD, 1 << 20), (libc::M_ARENA_MAX, 2)]
    {
        // SAFETY: mallopt takes two numbers; it is called before any other thread is there.
        unsafe { libc::mallopt(what, value) };
    }
}

/// The errno of a raw system call that is expected to be refused, 0 where it was not. For self-tests: the
/// calls that are named here have no effect when they succeed but to show that a filter is missing.
pub fn refusal(attempt: Attempt) -> i32 {
    // SAFETY: null and zero arguments; each call either fails or changes this process alone, which the
    // caller then ends.
    let result = unsafe {
        match attempt {
            Attempt::Mount => {
                libc::syscall(libc::SYS_mount, 0usize, c"/".as_ptr(), 0usize, libc::MS_REMOUNT, 0usize)
            }
            Attempt::UnshareUser => libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER),
            Attempt::SocketAlg => libc::syscall(libc::SYS_socket, libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
            Attempt::IoUring => libc::syscall(libc::SYS_io_uring_setup, 1, 0usize),
            Attempt::Ptrace => libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0usize, 0usize),
        }
    };
    if result < 0 { Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 }
}

/// What a self-test attempts.
#[derive(Debug, Clone, Copy)]
pub enum Attempt {
    /// A remount of the root.
    Mount,
    /// A nested user namespace.
    UnshareUser,
    /// A kernel crypto socket.
    SocketAlg,
    /// An io_uring.
    IoUring,
    /// Being traced.
    Ptrace,
}
