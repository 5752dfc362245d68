//! What this host really enforces: each layer is tried in a throw-away child, and judged by what happened.
//! It must never believe a return code where the effect can be seen, and never leave anything behind.

use std::fs::File;
use std::io::{Error, Read, Result, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use gaoler_policy::confine::no_capabilities;
use gaoler_policy::process::Process;
use gaoler_policy::seccomp::{Threads, compile};
use gaoler_policy::{confine, landlock};
use gaoler_protocol::{LayerName, LayerRow, LayerState, Layers, Limits, Rows};
use gaoler_sys::clone::{Side, clone3, wait};
use gaoler_sys::mount::{Attributes, attach, clone_tree, restrict};
use gaoler_sys::probe::fork;
use gaoler_sys::{memfd, process};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, unlinkat};

use crate::cgroup::Cgroups;
use crate::{namespaces, tiers};

/// How long one attempt may take. The slowest that was measured needs 20 ms.
const PATIENCE: Duration = Duration::from_secs(2);
/// A child's exit code for "accepted, and without effect"; errnos are below it.
const WITHOUT_EFFECT: u8 = 254;
/// Tasks that the attempt's group may hold, and how many forks are tried against that.
const TASKS: u32 = 8;
const FORKS: u32 = 16;

/// What an attempt showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// It worked, and the effect was there.
    Held,
    /// It works only in a weaker way; the errno of the full one.
    Part(u16),
    /// The kernel refused (errno), or accepted and did nothing (0).
    Refused(u16),
}

/// Tries every layer. `state` is a folder in which two files may be made for a moment, `uid` and the one
/// after it are run uids that nobody uses. The process must have one thread.
#[must_use]
pub fn probe(state: BorrowedFd<'_>, uid: u32) -> Layers {
    let mut rows: Vec<LayerRow> = Vec::new();
    let mut put = |name, seen| rows.push(row(name, seen));
    let ground = Ground::make(state, uid);
    let landlock_abi = landlock::abi();
    for &name in LayerName::ALL {
        match name {
            LayerName::CgroupMemory | LayerName::CgroupTasks | LayerName::CgroupCpu => {}
            other => put(other, one(other, &ground, &landlock_abi)),
        }
    }
    let (cgroup, groups) = cgroups();
    groups.into_iter().for_each(|(name, seen)| put(name, seen));
    rows.sort_by_key(|row| row.name);
    let tier = tiers::tier(&rows);
    Layers { tier, landlock_abi: landlock_abi.unwrap_or(0), cgroup, rows: Rows::new(rows) }
}

fn row(name: LayerName, seen: Seen) -> LayerRow {
    let (state, errno) = match seen {
        Seen::Held => (LayerState::Enforced, 0),
        Seen::Part(errno) => (LayerState::Degraded, errno),
        Seen::Refused(errno) => (LayerState::Absent, errno),
    };
    LayerRow { name, state, errno }
}

fn one(name: LayerName, ground: &Result<Ground>, abi: &Result<u8>) -> Seen {
    match name {
        LayerName::Uid => on(ground, |ground| attempt(0, || uid_holds(ground))),
        LayerName::UserNamespace => user_namespace(),
        LayerName::PidNamespace => namespace(libc::CLONE_NEWPID, || Ok(std::process::id() == 1)),
        LayerName::MountNamespace => namespace(libc::CLONE_NEWNS, || own_tmpfs("size=64k").map(|()| true)),
        LayerName::NetworkNamespace => network_namespace(),
        LayerName::IpcNamespace => other_namespace(libc::CLONE_NEWIPC, "ipc"),
        LayerName::UtsNamespace => other_namespace(libc::CLONE_NEWUTS, "uts"),
        LayerName::CgroupNamespace => other_namespace(libc::CLONE_NEWCGROUP, "cgroup"),
        LayerName::Clone3 => watch(child(|| clone3(0, None), || Ok(true))),
        LayerName::PivotRoot => namespace(libc::CLONE_NEWNS, pivot_holds),
        LayerName::MountApi => on(ground, |ground| attempt(0, || mount_api_holds(ground))),
        LayerName::IdMappedMounts => on(ground, |ground| attempt(0, || idmap_holds(ground))),
        LayerName::Proc => namespace(libc::CLONE_NEWPID | libc::CLONE_NEWNS, proc_holds),
        LayerName::LandlockFiles => from(abi, landlock::ABI_MINIMUM, || {
            landlock::no_files()?;
            Ok(confine::failed_open())
        }),
        LayerName::LandlockTcp => match door() {
            Ok((_door, address)) => from(abi, landlock::ABI_TCP, || {
                landlock::no_files()?;
                Ok(is(TcpStream::connect(address), Errno::EACCES))
            }),
            Err(error) => Seen::Refused(number(&error)),
        },
        LayerName::LandlockIoctl => from(abi, landlock::ABI_IOCTL, || landlock::no_files().map(|_| true)),
        LayerName::LandlockScopes => from(abi, landlock::ABI_SCOPES, || {
            let signal = || nix::sys::signal::kill(nix::unistd::getppid(), None);
            signal()?;
            landlock::no_files()?;
            Ok(signal() == Err(Errno::EPERM))
        }),
        LayerName::Seccomp => attempt(0, || {
            nix::sys::prctl::set_no_new_privs()?;
            let policy = Process::Upstream.policy().map_err(Error::other)?;
            File::open("/")?;
            compile(&policy)?.install(Threads::All)?;
            Ok(is(File::open("/"), Errno::EACCES))
        }),
        LayerName::NoNewPrivs => attempt(0, || {
            nix::sys::prctl::set_no_new_privs()?;
            Ok(nix::sys::prctl::get_no_new_privs()?)
        }),
        LayerName::Capabilities => attempt(0, || no_capabilities().map(|()| true)),
        LayerName::Rlimits => attempt(0, || {
            process::limit(libc::RLIMIT_NOFILE, 16)?;
            let files: Vec<Result<File>> = (0..20).map(|_| File::open("/")).collect();
            Ok(files.into_iter().any(|file| is(file, Errno::EMFILE)))
        }),
        LayerName::TmpfsSize => namespace(libc::CLONE_NEWNS, || {
            own_tmpfs("size=64k")?;
            Ok(is(std::fs::write("/tmp/full", [0; 131_072]), Errno::ENOSPC))
        }),
        LayerName::ParentDeath => parent_death(),
        LayerName::Openat2 => on(ground, |ground| attempt(0, || openat2_holds(ground))),
        LayerName::MemfdSeals => attempt(0, || {
            let mut file = File::from(memfd::sealed("probe", b"text")?);
            Ok(is(file.write_all(b"else"), Errno::EPERM))
        }),
        LayerName::Keyring => attempt(0, || process::new_session_keyring().map(|()| true)),
        LayerName::CgroupMemory | LayerName::CgroupTasks | LayerName::CgroupCpu => Seen::Refused(0),
    }
}

/// Runs `body` in a child with these namespaces and says what it saw.
fn attempt(flags: i32, body: impl FnOnce() -> Result<bool>) -> Seen {
    watch(forked(|| fork(flags), body))
}

/// The same for namespaces that an ordinary user gets only inside a user namespace.
fn namespace(flags: i32, body: impl Fn() -> Result<bool>) -> Seen {
    match attempt(flags, &body) {
        Seen::Refused(errno) if attempt(flags | libc::CLONE_NEWUSER, &body) == Seen::Held => {
            Seen::Part(errno)
        }
        seen => seen,
    }
}

fn child(start: impl FnOnce() -> Result<Side>, body: impl FnOnce() -> Result<bool>) -> Result<i32> {
    let side = || {
        Ok(match start()? {
            Side::Child => None,
            Side::Parent(child) => Some(child.pid),
        })
    };
    forked(side, body)
}

fn forked(start: impl FnOnce() -> Result<Option<i32>>, body: impl FnOnce() -> Result<bool>) -> Result<i32> {
    match start()? {
        Some(pid) => Ok(pid),
        None => process::exit(match body() {
            Ok(true) => 0,
            Ok(false) => WITHOUT_EFFECT,
            Err(error) => {
                u8::try_from(number(&error)).unwrap_or(libc::EIO as u8).clamp(1, WITHOUT_EFFECT - 1)
            }
        }),
    }
}

/// Waits for a child of an attempt, and ends one that takes too long.
fn watch(child: Result<i32>) -> Seen {
    let pid = match child {
        Ok(pid) => pid,
        Err(error) => return Seen::Refused(number(&error)),
    };
    let late = Instant::now() + PATIENCE;
    loop {
        match wait(pid, libc::WNOHANG) {
            Ok(Some((_, ended))) => {
                return match ended.code {
                    Some(0) => Seen::Held,
                    Some(WITHOUT_EFFECT) => Seen::Refused(0),
                    Some(errno) => Seen::Refused(errno.into()),
                    None => Seen::Refused(libc::EINTR as u16),
                };
            }
            Ok(None) if Instant::now() < late => std::thread::sleep(Duration::from_micros(200)),
            _ => {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
                let _ = wait(pid, 0);
                return Seen::Refused(libc::ETIMEDOUT as u16);
            }
        }
    }
}

fn number(error: &Error) -> u16 {
    error.raw_os_error().and_then(|errno| u16::try_from(errno).ok()).unwrap_or(libc::EIO as u16)
}

fn is<T>(result: Result<T>, errno: Errno) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(errno as i32))
}

fn from(abi: &Result<u8>, least: u8, body: impl FnOnce() -> Result<bool>) -> Seen {
    match abi {
        Ok(abi) if *abi >= least => attempt(0, body),
        Ok(_) => Seen::Refused(libc::EOPNOTSUPP as u16),
        Err(error) => Seen::Refused(number(error)),
    }
}

fn on(ground: &Result<Ground>, body: impl FnOnce(&Ground) -> Seen) -> Seen {
    match ground {
        Ok(ground) => body(ground),
        Err(error) => Seen::Refused(number(error)),
    }
}

/// A folder with one file of root's and one of the run uid's, gone again when this is dropped.
struct Ground {
    state: OwnedFd,
    name: String,
    folder: OwnedFd,
    uid: u32,
}

impl Ground {
    fn make(state: BorrowedFd<'_>, uid: u32) -> Result<Ground> {
        let state = state.try_clone_to_owned()?;
        let name = format!("gaoler-probe-{}", std::process::id());
        mkdirat(&state, name.as_str(), Mode::S_IRWXU)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let folder = openat(&state, name.as_str(), flags, Mode::empty())?;
        let ground = Ground { state, name, folder, uid };
        // The run uid must get as far as the files, whatever the umask.
        fchmod(&ground.folder, Mode::from_bits_truncate(0o711))?;
        for file in ["own", "other"] {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
            openat(&ground.folder, file, flags, Mode::from_bits_truncate(0o600))?;
        }
        Ok(ground)
    }

    fn give(&self) -> nix::Result<()> {
        let (uid, gid) = (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.uid)));
        fchownat(&self.folder, "own", uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    fn read(&self, file: &str) -> nix::Result<OwnedFd> {
        openat(&self.folder, file, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for file in ["own", "other"] {
            let _ = unlinkat(&self.folder, file, UnlinkatFlags::NoRemoveDir);
        }
        let _ = unlinkat(&self.state, self.name.as_str(), UnlinkatFlags::RemoveDir);
    }
}

fn uid_holds(ground: &Ground) -> Result<bool> {
    ground.give()?;
    let (uid, gid) = (Uid::from_raw(ground.uid), Gid::from_raw(ground.uid));
    nix::unistd::setgroups(&[])?;
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)?;
    ground.read("own")?;
    Ok(ground.read("other").err() == Some(Errno::EACCES))
}

fn user_namespace() -> Seen {
    let proc = File::open("/proc");
    let mapped = proc.map_err(|error| number(&error)).and_then(|proc| {
        let outside = nix::unistd::geteuid().as_raw() + 1;
        namespaces::user(proc.as_fd(), 1000, outside).map_err(|fault| fault.errno())
    });
    match mapped {
        Ok(_) => Seen::Held,
        // A namespace without the right to map another uid into it still separates capabilities.
        Err(errno) => match attempt(libc::CLONE_NEWUSER, || Ok(true)) {
            Seen::Held => Seen::Part(errno),
            refused => refused,
        },
    }
}

/// A listener of this host's, for children that must not reach it.
fn door() -> Result<(TcpListener, SocketAddr)> {
    let door = TcpListener::bind("127.0.0.1:0")?;
    let address = door.local_addr()?;
    Ok((door, address))
}

fn network_namespace() -> Seen {
    let (_door, outside) = match door() {
        Ok(door) => door,
        Err(error) => return Seen::Refused(number(&error)),
    };
    namespace(libc::CLONE_NEWNET, || {
        // gVisor refuses the ioctl and has loopback up already: what counts is whether it carries.
        let _ = process::loopback_up();
        let (_own, inside) = door()?;
        TcpStream::connect(inside)?;
        // The port is free in here unless the network is the same one.
        Ok(inside == outside || is(TcpStream::connect(outside), Errno::ECONNREFUSED))
    })
}

fn other_namespace(flag: i32, name: &str) -> Seen {
    let path = format!("/proc/self/ns/{name}");
    let outside = std::fs::read_link(&path).ok();
    namespace(flag, || Ok(std::fs::read_link(&path).ok() != outside))
}

/// A tmpfs of this size on /tmp of a mount namespace of our own.
fn own_tmpfs(size: &str) -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
    Ok(mount(Some("gaoler"), "/tmp", Some("tmpfs"), MsFlags::MS_NOSUID, Some(size))?)
}

fn pivot_holds() -> Result<bool> {
    own_tmpfs("size=64k")?;
    nix::unistd::chdir("/tmp")?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(is(File::open("/proc/self/status"), Errno::ENOENT))
}

fn shown(ground: &Ground, attributes: Attributes<'_>) -> Result<()> {
    // The copy is made before the namespace is left: a folder of another namespace gives EINVAL.
    let tree = clone_tree(ground.folder.as_fd(), false)?;
    restrict(tree.as_fd(), attributes, false)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    own_tmpfs("size=64k")?;
    attach(tree.as_fd(), c"/tmp")
}

fn mount_api_holds(ground: &Ground) -> Result<bool> {
    shown(ground, Attributes { read_only: true, ..Attributes::default() })?;
    Ok(is(File::create("/tmp/own"), Errno::EROFS))
}

fn idmap_holds(ground: &Ground) -> Result<bool> {
    ground.give()?;
    let proc = File::open("/proc")?;
    let map = namespaces::user(proc.as_fd(), ground.uid, ground.uid + 1).map_err(|fault| fault.error)?;
    shown(ground, Attributes { idmap: Some(map.as_fd()), ..Attributes::default() })?;
    Ok(std::fs::metadata("/tmp/own")?.uid() == ground.uid + 1)
}

fn proc_holds() -> Result<bool> {
    own_tmpfs("size=64k")?;
    mount(Some("proc"), "/tmp", Some("proc"), MsFlags::MS_NOSUID, None::<&str>)?;
    let names = std::fs::read_dir("/tmp")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let pids: Vec<String> = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).collect();
    Ok(pids == ["1"])
}

fn parent_death() -> Seen {
    let (mut ends, held) = match nix::unistd::pipe() {
        Ok((ends, held)) => (File::from(ends), held),
        Err(errno) => return Seen::Refused(errno as u16),
    };
    let seen = attempt(0, || {
        let grandchild = forked(
            || fork(0),
            || {
                process::die_with_parent()?;
                File::from(held.try_clone()?).write_all(b"x")?;
                // Ends by itself too, should nothing end it: nothing is left behind.
                std::thread::sleep(2 * PATIENCE);
                Ok(true)
            },
        );
        grandchild?;
        ends.read_exact(&mut [0])?;
        Ok(true)
    });
    drop(held);
    let mut end = [nix::poll::PollFd::new(ends.as_fd(), nix::poll::PollFlags::POLLIN)];
    match (seen, nix::poll::poll(&mut end, 1_000u16)) {
        (Seen::Held, Ok(1)) => Seen::Held,
        (Seen::Held, _) => Seen::Refused(0),
        (refused, _) => refused,
    }
}

fn openat2_holds(ground: &Ground) -> Result<bool> {
    let how = || OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH);
    openat2(&ground.folder, "other", how())?;
    Ok(openat2(&ground.folder, "..", how()).err() == Some(Errno::EXDEV))
}

/// The version whose limits hold, and its rows. Memory and CPU are read back; the task limit is run into.
fn cgroups() -> (u8, [(LayerName, Seen); 3]) {
    let rows = |memory, tasks, cpu| {
        [(LayerName::CgroupMemory, memory), (LayerName::CgroupTasks, tasks), (LayerName::CgroupCpu, cpu)]
    };
    // A refusal without an errno is ours: no hierarchy has the controllers.
    let absent = |errno: u16| {
        let refused = Seen::Refused(if errno == 0 { libc::ENOENT as u16 } else { errno });
        (0, rows(refused, refused, refused))
    };
    let proc = match File::open("/proc") {
        Ok(proc) => proc,
        Err(error) => return absent(number(&error)),
    };
    let mut groups = match Cgroups::open(proc.as_fd()) {
        Ok(groups) => groups,
        Err(fault) => return absent(fault.errno()),
    };
    let limits = Limits {
        memory_mib: 64,
        tasks: TASKS,
        cpu_percent: 50,
        wall_ms: 0,
        tmp_mib: 0,
        file_mib: 0,
        open_files: 0,
    };
    let out = match groups.leaf(limits) {
        Err(fault) => absent(fault.errno()),
        Ok(leaf) => {
            let crowd = || {
                leaf.tasks().iter().try_for_each(|tasks| nix::unistd::write(tasks, b"0").map(drop))?;
                let idle = || {
                    std::thread::sleep(Duration::from_millis(100));
                    Ok(true)
                };
                Ok((0..FORKS).any(|_| is(forked(|| fork(0), idle), Errno::EAGAIN)))
            };
            let seen = watch(child(|| clone3(0, leaf.clone_into()), crowd));
            leaf.kill();
            let late = Instant::now() + PATIENCE;
            while !groups.remove(&leaf) && Instant::now() < late {
                std::thread::sleep(Duration::from_millis(1));
            }
            (groups.version(), rows(Seen::Held, seen, Seen::Held))
        }
    };
    groups.close();
    out
}
