//! Namespaces made ahead of the run that will enter them: a user namespace with a one-id map, a network
//! namespace with nothing but loopback. They must never be entered twice.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use gaoler_sys::channel;
use gaoler_sys::clone::{Side, fork};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};

use crate::fault::{Doing, Fault};

/// What a network of a cage's own is set to. No group counts a connection that nobody has accepted, nor a closed one that
/// waits for its time: the first may hold 256 KiB, which loopback is as fast with, and of the others there are 1 MiB.
const SETTINGS: [(&str, &str); 3] = [
    ("net/ipv4/tcp_rmem", "4096 131072 262144"),
    ("net/ipv4/tcp_wmem", "4096 65536 262144"),
    ("net/ipv4/tcp_max_tw_buckets", "4096"),
];
/// Where they are: it shows each who looks those of its own network, as the folders below it do not, once they are open.
const PLACE: &str = "/proc/sys";

/// The folder of all settings. Containers have it read-only: there it is one of a /proc that nobody else ever sees.
///
/// # Errors
/// Those of mount(2), where that is needed.
pub fn settings() -> Result<OwnedFd, Fault> {
    let open =
        || nix::fcntl::open(PLACE, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    let own = open().doing(format!("open {PLACE}"))?;
    let written = openat(&own, SETTINGS[0].0, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
    if written.err() != Some(Errno::EROFS) {
        return Ok(own);
    }
    let (ours, theirs) = channel::pair().doing("make a channel")?;
    let fresh = || -> std::io::Result<()> {
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("proc"), "/proc", Some("proc"), flags, none)?;
        channel::send(theirs.as_fd(), b"x", &[open()?.as_fd()])
    };
    match fork(libc::CLONE_NEWNS, None).doing("fork for a /proc")? {
        Side::Child => {
            gaoler_sys::process::exit(fresh().map_or_else(|e| e.raw_os_error().unwrap_or(1) as u8, |()| 0))
        }
        Side::Parent(child) => {
            let ended = child.reap_blocking().doing("reap the maker of a /proc")?;
            let sent = channel::receive::<1>(ours.as_fd()).ok().and_then(|mut it| it.fds.pop());
            let errno = ended.and_then(|it| it.code).map_or(libc::EIO, i32::from);
            sent.ok_or(Errno::from_raw(errno)).doing("mount a /proc whose settings can be written")
        }
    }
}

/// Sets the network that this process is in.
fn settle(settings: BorrowedFd<'_>) -> Result<(), Fault> {
    for (name, value) in SETTINGS {
        let file = openat(settings, name, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
        let file = file.doing(format!("open {name} of a cage's network"))?;
        nix::unistd::write(file, value.as_bytes()).doing(format!("set {name} of a cage's network"))?;
    }
    Ok(())
}

/// A user namespace that maps `inside` to the host's `outside`, for uids and gids alike, and nothing else.
///
/// # Errors
/// Those of clone(2) with CLONE_NEWUSER and of the writes to uid_map and gid_map.
pub fn user(proc_fd: BorrowedFd<'_>, inside: u32, outside: u32) -> Result<OwnedFd, Fault> {
    let (ends, held) = nix::unistd::pipe2(OFlag::O_CLOEXEC).doing("make a pipe")?;
    let child = match fork(libc::CLONE_NEWUSER, None).doing("make a user namespace")? {
        Side::Child => until_its_end(ends),
        Side::Parent(child) => child,
    };
    let map = format!("{inside} {outside} 1");
    let open = |name: &str, flags| {
        let path = format!("{}/{name}", child.pid);
        openat(proc_fd, path.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())
    };
    let write = |name: &str| -> std::io::Result<()> {
        File::from(open(name, OFlag::O_WRONLY)?).write_all(map.as_bytes())
    };
    let namespace = write("uid_map")
        .doing("write uid_map")
        .and_then(|()| write("gid_map").doing("write gid_map"))
        .and_then(|()| open("ns/user", OFlag::O_RDONLY).doing("open a user namespace"));
    child.kill();
    drop(held);
    child.reap_blocking().doing("reap the maker of a user namespace")?;
    namespace
}

/// In a child that only holds a namespace: waits for the supervisor's end, should that come before it is killed. It
/// gives up every other descriptor, or it would keep what the supervisor held: locks, and other runs' credentials.
fn until_its_end(ends: OwnedFd) -> ! {
    if gaoler_sys::process::close_all_but(&[ends.as_raw_fd()]).is_ok() {
        let _ = nix::unistd::read(&ends, &mut [0]);
    }
    gaoler_sys::process::exit(0)
}

/// What a network namespace shows of the whole machine's network: packets taken by each CPU, memory of all sockets.
const EVERYBODYS: [&str; 4] = ["softnet_stat", "sockstat", "sockstat6", "protocols"];

/// Shuts them in the own network namespace; a host that refuses has none of its own, and shows what its plan says.
fn shut(proc_fd: BorrowedFd<'_>) {
    for name in EVERYBODYS {
        let path = format!("thread-self/net/{name}");
        let _ = fchmodat(proc_fd, path.as_str(), Mode::empty(), FchmodatFlags::FollowSymlink);
    }
}

/// A network namespace with loopback up. Made by leaving our own for a moment: the supervisor has one thread.
/// An ordinary user could not come back, and has a child make it.
///
/// # Errors
/// Those of unshare(2), of bringing loopback up, and of coming back, after which nothing may go on.
pub fn network(proc_fd: BorrowedFd<'_>, settings: BorrowedFd<'_>, inside: bool) -> Result<OwnedFd, Fault> {
    let open = |of: &str| {
        let path = format!("{of}/ns/net");
        let opened = openat(proc_fd, path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        opened.doing("open a network namespace")
    };
    if inside {
        let (ready, told) = nix::unistd::pipe2(OFlag::O_CLOEXEC).doing("make a pipe")?;
        let (ends, held) = nix::unistd::pipe2(OFlag::O_CLOEXEC).doing("make a pipe")?;
        let child = match fork(libc::CLONE_NEWNET, None).doing("make a network namespace")? {
            Side::Child => {
                let up = settle(settings).is_ok() && gaoler_sys::process::loopback_up().is_ok();
                shut(proc_fd);
                let _ = nix::unistd::write(&told, &[u8::from(up)]);
                until_its_end(ends)
            }
            Side::Parent(child) => child,
        };
        drop(told);
        let mut up = [0];
        let heard = nix::unistd::read(&ready, &mut up);
        let made = open(&child.pid.to_string());
        child.kill();
        drop(held);
        child.reap_blocking().doing("reap the maker of a network namespace")?;
        return match (heard, up) {
            (Ok(1), [1]) => made,
            _ => Err(Fault::new(
                "set a cage's network and bring loopback up",
                "refused in the new network namespace",
            )),
        };
    }
    let home = open("self")?;
    unshare(CloneFlags::CLONE_NEWNET).doing("make a network namespace")?;
    let made = settle(settings)
        .and_then(|()| gaoler_sys::process::loopback_up().doing("bring loopback up"))
        .and_then(|()| open("self"));
    shut(proc_fd);
    // To stay in a cage's network would be worse than to stop.
    setns(home.as_fd(), CloneFlags::CLONE_NEWNET).doing("return to the own network namespace")?;
    made
}

/// The identity of an open namespace, as /proc shows it.
///
/// # Errors
/// Those of fstat(2).
pub fn identity(namespace: impl AsFd) -> std::io::Result<u64> {
    Ok(nix::sys::stat::fstat(namespace)?.st_ino)
}
