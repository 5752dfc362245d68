//! What this host really enforces: each layer is tried in a throw-away child, and judged by what happened.
//! It must never believe a return code where the effect can be seen, and never leave anything behind.

use std::ffi::CString;
use std::fs::File;
use std::io::{Error, Result, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr as SocketName, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gaoler_policy::landlock::{self, ABI_IOCTL, ABI_MINIMUM, ABI_SCOPES, ABI_TCP};
use gaoler_policy::seccomp::{INIT, Threads};
use gaoler_protocol::{LayerName, LayerRow, LayerState, Layers, Limits, Rows};
use gaoler_sys::clone::{Side, fork, wait};
use gaoler_sys::mount::{Attributes, attach, clone_tree, restrict};
use gaoler_sys::{memfd, probe, process};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, mkdirat};
use nix::unistd::{Gid, Pid, Uid, UnlinkatFlags, fchownat, unlinkat};

use crate::cgroup::Cgroups;
use crate::fault::{Doing, Fault};
use crate::uids::become_uid;
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
    /// The kernel refused (errno), or accepted and did nothing (0).
    Refused(u16),
}

/// What the attempts need.
struct Bench {
    ground: Result<Ground>,
    /// A listener of this host's, which some children must not reach.
    door: Result<(TcpListener, SocketAddr)>,
    landlock: Result<u8>,
    /// Shared memory of this host's, which some children must not see.
    segment: Result<probe::Segment>,
    /// The supervisor's own cgroup namespace.
    outside: Option<PathBuf>,
}

/// What is tried in a child that may be ruined by it: whether the effect was there.
type Attempt = fn(&Bench) -> Result<bool>;

/// Every layer but the control groups', the namespaces that its child starts in, and the attempt.
const ATTEMPTS: &[(LayerName, i32, Attempt)] = &[
    (LayerName::Uid, 0, uid_holds),
    (LayerName::UserNamespace, 0, user_namespace_holds),
    (LayerName::PidNamespace, libc::CLONE_NEWPID, |_| Ok(std::process::id() == 1)),
    (LayerName::MountNamespace, libc::CLONE_NEWNS, mount_namespace_holds),
    (LayerName::NetworkNamespace, libc::CLONE_NEWNET, network_namespace_holds),
    (LayerName::IpcNamespace, libc::CLONE_NEWIPC, |bench| Ok(!made(&bench.segment)?.is_seen())),
    (LayerName::UtsNamespace, libc::CLONE_NEWUTS, |_| {
        nix::unistd::sethostname("cage")?;
        Ok(nix::unistd::gethostname()? == "cage")
    }),
    (LayerName::CgroupNamespace, libc::CLONE_NEWCGROUP, |bench| Ok(cgroup_namespace() != bench.outside)),
    (LayerName::Clone3, 0, |_| probe::clone3().map(|()| true)),
    (LayerName::PivotRoot, libc::CLONE_NEWNS, pivot_holds),
    (LayerName::MountApi, 0, mount_api_holds),
    (LayerName::IdMappedMounts, 0, idmap_holds),
    (LayerName::Proc, libc::CLONE_NEWPID | libc::CLONE_NEWNS, proc_holds),
    (LayerName::LandlockFiles, 0, landlock_files_hold),
    (LayerName::LandlockTcp, 0, landlock_tcp_holds),
    (LayerName::LandlockIoctl, 0, |bench| restrict_by(bench, ABI_IOCTL).map(|()| true)),
    (LayerName::LandlockScopes, 0, landlock_scopes_hold),
    (LayerName::Seccomp, 0, seccomp_holds),
    (LayerName::NoNewPrivs, 0, |_| {
        nix::sys::prctl::set_no_new_privs()?;
        Ok(nix::sys::prctl::get_no_new_privs()?)
    }),
    (LayerName::Capabilities, 0, capabilities_hold),
    (LayerName::Rlimits, 0, rlimits_hold),
    (LayerName::TmpfsSize, libc::CLONE_NEWNS, |bench| {
        let place = own_tmpfs(bench)?;
        Ok(is(std::fs::write(place.join("full"), [0; 131_072]), Errno::ENOSPC))
    }),
    (LayerName::ParentDeath, 0, parent_death_holds),
    (LayerName::Openat2, 0, openat2_holds),
    (LayerName::MemfdSeals, 0, |_| {
        let mut file = File::from(memfd::sealed("probe", b"text")?);
        Ok(is(file.write_all(b"else"), Errno::EPERM))
    }),
    (LayerName::Keyring, 0, |_| process::new_session_keyring().map(|()| true)),
    (LayerName::Chroot, 0, chroot_holds),
    (LayerName::BindMounts, libc::CLONE_NEWNS, bind_holds),
    (LayerName::Hidepid, libc::CLONE_NEWPID | libc::CLONE_NEWNS, hidepid_holds),
    (LayerName::Pidfd, 0, |_| probe::pidfd().map(|()| true)),
    (LayerName::CloseRange, 0, |_| {
        process::close_all_but(&[0, 1, 2])?;
        Ok(is(File::open("/proc/self/fd/3"), Errno::ENOENT))
    }),
    (LayerName::ProcessShield, 0, shield_holds),
    (LayerName::PeerCredentials, 0, peers_hold),
];

/// Tries every layer. `state` is a folder (at `path`) in which files may be made for a moment, `uid` and the one
/// after it are run uids that nobody uses. The process must have one thread.
#[must_use]
pub fn probe(state: BorrowedFd<'_>, path: &Path, uid: u32) -> Layers {
    let bench = Bench {
        ground: Ground::make(state, path, uid),
        door: door(),
        landlock: landlock::abi(),
        segment: probe::Segment::make(),
        outside: cgroup_namespace(),
    };
    let (cgroup, bounds, tasks) = match cgroups() {
        Ok((version, tasks)) => (version, Seen::Held, tasks),
        // A refusal without an errno is ours: no hierarchy has the controllers.
        Err(fault) if fault.errno() == 0 => (0, refused(Errno::ENOENT), refused(Errno::ENOENT)),
        Err(fault) => (0, Seen::Refused(fault.errno()), Seen::Refused(fault.errno())),
    };
    let groups =
        [(LayerName::CgroupMemory, bounds), (LayerName::CgroupTasks, tasks), (LayerName::CgroupCpu, bounds)];
    let tried = ATTEMPTS.iter().map(|&(name, flags, attempt)| (name, seen(flags, &bench, attempt)));
    let mut rows: Vec<LayerRow> = tried.chain(groups).map(|(name, seen)| row(name, seen)).collect();
    rows.sort_by_key(|row| row.name);
    // Who has pids and a /proc of his own cannot so much as name us.
    let unnamed = rows.iter().any(|row| row.name == LayerName::Proc && row.state == LayerState::Enforced);
    if let Some(shield) = rows.iter_mut().find(|row| unnamed && row.name == LayerName::ProcessShield) {
        (shield.state, shield.errno) = (LayerState::Enforced, 0);
    }
    let tier = tiers::tier(&rows);
    Layers { tier, landlock_abi: bench.landlock.unwrap_or(0), cgroup, rows: Rows::new(rows) }
}

fn row(name: LayerName, seen: Seen) -> LayerRow {
    let (state, errno) = match seen {
        Seen::Held => (LayerState::Enforced, 0),
        Seen::Refused(errno) => (LayerState::Absent, errno),
    };
    LayerRow { name, state, errno }
}

/// What one attempt showed. A mount or a name that shows outside of the child that made it is none of its own.
fn seen(flags: i32, bench: &Bench, attempt: Attempt) -> Seen {
    let place = bench.ground.as_ref().map(|ground| ground.place.as_path()).unwrap_or(Path::new("/"));
    let mounted = || std::fs::metadata(place).map(|found| found.dev()).ok();
    let named = || nix::unistd::gethostname().ok();
    let (mount, name) = (mounted(), named());
    let seen = watch(forked(flags, || attempt(bench)));
    if mount != mounted() {
        // One attempt mounts at most twice. What is below is taken away as long as it is not what was there.
        for _ in 0..4 {
            if mount != mounted() {
                let _ = umount2(place, MntFlags::MNT_DETACH);
            }
        }
        return Seen::Refused(0);
    }
    match name.filter(|name| named().as_ref() != Some(name)) {
        Some(name) => {
            let _ = nix::unistd::sethostname(name);
            Seen::Refused(0)
        }
        None => seen,
    }
}

/// Runs `body` in a child of its own; its exit code says what it saw.
fn forked(flags: i32, body: impl FnOnce() -> Result<bool>) -> Result<i32> {
    answered(fork(flags, None)?, body)
}

fn answered(side: Side, body: impl FnOnce() -> Result<bool>) -> Result<i32> {
    match side {
        Side::Parent(child) => Ok(child.pid),
        Side::Child => process::exit(match body() {
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
                    None => refused(Errno::EINTR),
                };
            }
            Ok(None) if Instant::now() < late => std::thread::sleep(Duration::from_micros(200)),
            _ => {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                let _ = wait(pid, 0);
                return refused(Errno::ETIMEDOUT);
            }
        }
    }
}

fn refused(errno: Errno) -> Seen {
    Seen::Refused(errno as u16)
}

fn number(error: &Error) -> u16 {
    error.raw_os_error().and_then(|errno| u16::try_from(errno).ok()).unwrap_or(libc::EIO as u16)
}

fn is<T>(result: Result<T>, errno: Errno) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(errno as i32))
}

/// What was made before the attempts, or why it could not be.
fn made<T>(result: &Result<T>) -> Result<&T> {
    result.as_ref().map_err(|error| Error::from_raw_os_error(number(error).into()))
}

/// Restricts this child by Landlock, where the kernel's is at least this one.
fn restrict_by(bench: &Bench, least: u8) -> Result<()> {
    match *made(&bench.landlock)? >= least {
        true => landlock::no_files().map(drop),
        false => Err(Errno::EOPNOTSUPP.into()),
    }
}

/// A folder with one file of root's and one of the run uid's, gone again when this is dropped.
struct Ground {
    state: OwnedFd,
    name: String,
    folder: OwnedFd,
    /// Where attempts mount, by its path.
    place: PathBuf,
    uid: u32,
}

impl Ground {
    fn make(state: BorrowedFd<'_>, path: &Path, uid: u32) -> Result<Ground> {
        let state = state.try_clone_to_owned()?;
        let name = format!("gaoler-probe-{}", std::process::id());
        mkdirat(&state, name.as_str(), Mode::S_IRWXU)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let folder = openat(&state, name.as_str(), flags, Mode::empty())?;
        let place = path.join(&name).join("place");
        let ground = Ground { state, name, folder, place, uid };
        mkdirat(&ground.folder, "place", Mode::S_IRWXU)?;
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

    /// Shows this folder at its place in a mount namespace of this child's own.
    fn show(&self, attributes: Attributes<'_>) -> Result<()> {
        // The copy is made before the namespace is left: a folder of another namespace gives EINVAL.
        let tree = clone_tree(self.folder.as_fd(), false)?;
        restrict(tree.as_fd(), attributes, false)?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        tmpfs_at(&self.place)?;
        let place = CString::new(self.place.as_os_str().as_bytes())?;
        attach(tree.as_fd(), &place)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for file in ["own", "other"] {
            let _ = unlinkat(&self.folder, file, UnlinkatFlags::NoRemoveDir);
        }
        let _ = unlinkat(&self.folder, "place", UnlinkatFlags::RemoveDir);
        let _ = unlinkat(&self.state, self.name.as_str(), UnlinkatFlags::RemoveDir);
    }
}

fn uid_holds(bench: &Bench) -> Result<bool> {
    let ground = made(&bench.ground)?;
    ground.give()?;
    // The rights that go with another uid are needed too: over its files, and over its processes.
    fchmodat(&ground.folder, "own", Mode::from_bits_truncate(0o600), FchmodatFlags::FollowSymlink)?;
    let sleeper = forked(0, || {
        become_uid(ground.uid)?;
        std::thread::sleep(2 * PATIENCE);
        Ok(true)
    })?;
    // Not before it is somebody else.
    std::thread::sleep(Duration::from_millis(20));
    kill(Pid::from_raw(sleeper), Signal::SIGKILL)?;
    wait(sleeper, 0)?;
    become_uid(ground.uid)?;
    ground.read("own")?;
    Ok(ground.read("other").err() == Some(Errno::EACCES))
}

/// As a cage does it: made by another process, entered by this one, who is then somebody else.
fn user_namespace_holds(_: &Bench) -> Result<bool> {
    let outside = nix::unistd::geteuid().as_raw();
    let mapped =
        namespaces::user(File::open("/proc")?.as_fd(), 1000, outside).map_err(|fault| fault.error)?;
    setns(mapped, CloneFlags::CLONE_NEWUSER)?;
    Ok(nix::unistd::geteuid().as_raw() == 1000)
}

fn door() -> Result<(TcpListener, SocketAddr)> {
    let door = TcpListener::bind("127.0.0.1:0")?;
    let address = door.local_addr()?;
    Ok((door, address))
}

fn network_namespace_holds(bench: &Bench) -> Result<bool> {
    let (_, outside) = made(&bench.door)?;
    // gVisor refuses the ioctl and has loopback up already: what counts is whether it carries.
    let _ = process::loopback_up();
    let (_own, inside) = door()?;
    TcpStream::connect(inside)?;
    // The port is free in here unless the network is the same one.
    Ok(inside == *outside || is(TcpStream::connect(outside), Errno::ECONNREFUSED))
}

/// The identity of the cgroup namespace that this process is in.
fn cgroup_namespace() -> Option<PathBuf> {
    std::fs::read_link("/proc/self/ns/cgroup").ok()
}

/// A small tmpfs in a mount namespace of our own, at a place of ours: some hosts make the namespace, and mounts show
/// outside all the same. [`seen`] looks.
fn own_tmpfs(bench: &Bench) -> Result<&Path> {
    let place = &made(&bench.ground)?.place;
    tmpfs_at(place).map(|()| place.as_path())
}

fn tmpfs_at(place: &Path) -> Result<()> {
    let none: Option<&str> = None;
    // Where mounts cannot be made private (EINVAL), they must not show outside either.
    match mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none) {
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    Ok(mount(Some("gaoler"), place, Some("tmpfs"), MsFlags::MS_NOSUID, Some("size=64k"))?)
}

fn mount_namespace_holds(bench: &Bench) -> Result<bool> {
    let place = own_tmpfs(bench)?;
    Ok(std::fs::write(place.join("own"), "").is_ok() && std::fs::read_dir(place)?.count() == 1)
}

fn chroot_holds(_: &Bench) -> Result<bool> {
    nix::unistd::chroot("/proc")?;
    nix::unistd::chdir("/")?;
    Ok(is(File::open("/proc"), Errno::ENOENT) && File::open("/self/status").is_ok())
}

fn bind_holds(bench: &Bench) -> Result<bool> {
    let folder = own_tmpfs(bench)?.join("a");
    let none: Option<&str> = None;
    std::fs::create_dir(&folder)?;
    mount(Some(&folder), &folder, none, MsFlags::MS_BIND, none)?;
    let only_read = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, &folder, none, only_read, none)?;
    Ok(is(std::fs::write(folder.join("b"), ""), Errno::EROFS))
}

/// Our own entry must be gone for somebody else, whom we become: a host may take the option and ignore it.
fn hidepid_holds(bench: &Bench) -> Result<bool> {
    let place = own_tmpfs(bench)?;
    mount(Some("proc"), place, Some("proc"), MsFlags::MS_NOSUID, Some("hidepid=invisible"))?;
    let proc = File::open(place)?;
    let child = forked(0, || {
        become_uid(made(&bench.ground)?.uid)?;
        let hidden = openat(&proc, "1/stat", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        Ok(hidden.err() == Some(Errno::ENOENT))
    });
    // Without another uid there is nobody to hide from.
    Ok(watch(child) == Seen::Held)
}

fn pivot_holds(bench: &Bench) -> Result<bool> {
    nix::unistd::chdir(own_tmpfs(bench)?)?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(is(File::open("/proc/self/status"), Errno::ENOENT))
}

/// Somebody else connects, and must not be taken for us.
fn peers_hold(bench: &Bench) -> Result<bool> {
    let uid = made(&bench.ground)?.uid;
    let name = SocketName::from_abstract_name(format!("gaoler-probe-{}", std::process::id()))?;
    let door = UnixListener::bind_addr(&name)?;
    let child = forked(0, || {
        become_uid(uid)?;
        UnixStream::connect_addr(&name)?;
        Ok(true)
    });
    match watch(child) {
        Seen::Held => {}
        Seen::Refused(errno) => return Err(Error::from_raw_os_error(errno.into())),
    }
    door.set_nonblocking(true)?;
    let (peer, _) = door.accept()?;
    Ok(getsockopt(&peer, PeerCredentials)?.uid() == uid)
}

/// Confined as far as this host can, a child must neither signal us nor open our memory.
fn shield_holds(bench: &Bench) -> Result<bool> {
    let parent = nix::unistd::getppid();
    let _ = become_uid(made(&bench.ground)?.uid);
    process::drop_permitted()?;
    process::no_new_privs()?;
    let memory = || File::options().read(true).write(true).open(format!("/proc/{parent}/mem"));
    let refused = memory().is_err();
    let _ = landlock::no_files();
    Ok(refused && kill(parent, None) == Err(Errno::EPERM))
}

fn mount_api_holds(bench: &Bench) -> Result<bool> {
    made(&bench.ground)?.show(Attributes { read_only: true, ..Attributes::default() })?;
    // To copy a mount of another namespace, that one is entered, which takes a right of its own.
    setns(File::open("/proc/self/ns/mnt")?, CloneFlags::CLONE_NEWNS)?;
    Ok(is(File::create(made(&bench.ground)?.place.join("own")), Errno::EROFS))
}

fn idmap_holds(bench: &Bench) -> Result<bool> {
    let ground = made(&bench.ground)?;
    ground.give()?;
    let map = namespaces::user(File::open("/proc")?.as_fd(), ground.uid, ground.uid + 1);
    let map = map.map_err(|fault| fault.error)?;
    ground.show(Attributes { idmap: Some(map.as_fd()), ..Attributes::default() })?;
    Ok(std::fs::metadata(ground.place.join("own"))?.uid() == ground.uid + 1)
}

fn proc_holds(bench: &Bench) -> Result<bool> {
    let place = own_tmpfs(bench)?;
    mount(Some("proc"), place, Some("proc"), MsFlags::MS_NOSUID, None::<&str>)?;
    let names = std::fs::read_dir(place)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let pids: Vec<String> = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).collect();
    Ok(pids == ["1"])
}

fn landlock_files_hold(bench: &Bench) -> Result<bool> {
    File::open("/")?;
    restrict_by(bench, ABI_MINIMUM)?;
    Ok(is(File::open("/"), Errno::EACCES) && is(File::open("/proc/self/status"), Errno::EACCES))
}

fn landlock_tcp_holds(bench: &Bench) -> Result<bool> {
    let (_, address) = made(&bench.door)?;
    restrict_by(bench, ABI_TCP)?;
    Ok(is(TcpStream::connect(address), Errno::EACCES))
}

fn landlock_scopes_hold(bench: &Bench) -> Result<bool> {
    let signal = || kill(nix::unistd::getppid(), None);
    signal()?;
    restrict_by(bench, ABI_SCOPES)?;
    Ok(signal() == Err(Errno::EPERM))
}

fn seccomp_holds(_: &Bench) -> Result<bool> {
    nix::sys::prctl::set_no_new_privs()?;
    File::open("/")?;
    INIT.install(Threads::All)?;
    Ok(is(File::open("/"), Errno::EACCES))
}

/// The bounding set can only be emptied by who holds CAP_SETPCAP; for others no_new_privs makes it moot.
fn capabilities_hold(_: &Bench) -> Result<bool> {
    let bounded = process::empty_bounding_set();
    process::drop_permitted()?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let is_empty = |name: &&str| {
        // Some hosts do not show every set; those that count most, every host does.
        let found = status.lines().find_map(|line| line.strip_prefix(name));
        let must = ["CapPrm:", "CapEff:"].contains(name);
        found.map_or(!must, |mask| mask.trim().bytes().all(|digit| digit == b'0'))
    };
    let sets = ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:", "CapBnd:"];
    Ok(sets[..if bounded.is_ok() { 5 } else { 4 }].iter().all(is_empty))
}

fn rlimits_hold(_: &Bench) -> Result<bool> {
    process::limit(libc::RLIMIT_NOFILE, 16)?;
    let files: Vec<Result<File>> = (0..20).map(|_| File::open("/")).collect();
    Ok(files.into_iter().any(|file| is(file, Errno::EMFILE)))
}

/// A child's child, whose parent ends at once, must end too: its end of a pipe closes.
fn parent_death_holds(_: &Bench) -> Result<bool> {
    let (ends, held) = nix::unistd::pipe()?;
    let grandchild = || {
        process::die_with_parent()?;
        nix::unistd::write(&held, b"x")?;
        // Ends by itself too, should nothing end it: nothing is left behind.
        std::thread::sleep(2 * PATIENCE);
        Ok(true)
    };
    let child = forked(0, || {
        forked(0, grandchild)?;
        nix::unistd::read(&ends, &mut [0])?;
        Ok(true)
    })?;
    wait(child, 0)?;
    drop(held);
    let mut end = [PollFd::new(ends.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut end, 1_000u16)? == 1)
}

fn openat2_holds(bench: &Bench) -> Result<bool> {
    let how = || OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH);
    let folder = &made(&bench.ground)?.folder;
    openat2(folder, "other", how())?;
    Ok(openat2(folder, "..", how()).err() == Some(Errno::EXDEV))
}

/// The version whose limits on memory and CPU can be read back, and what the task limit does to forks.
fn cgroups() -> std::result::Result<(u8, Seen), Fault> {
    let proc = File::open("/proc").doing("open /proc")?;
    let mut groups = Cgroups::open(proc.as_fd())?;
    let limits = Limits { memory_mib: 64, tasks: TASKS, cpu_percent: 50, ..Limits::NONE };
    let tried = groups.leaf(limits).map(|leaf| {
        let idle = || {
            std::thread::sleep(Duration::from_millis(100));
            Ok(true)
        };
        let crowd = || {
            leaf.tasks().iter().try_for_each(|tasks| nix::unistd::write(tasks, b"0").map(drop))?;
            Ok((0..FORKS).any(|_| is(forked(0, idle), Errno::EAGAIN)))
        };
        let seen = watch(fork(0, leaf.clone_into()).and_then(|side| answered(side, crowd)));
        leaf.kill();
        let late = Instant::now() + PATIENCE;
        while !groups.remove(&leaf) && Instant::now() < late {
            std::thread::sleep(Duration::from_millis(1));
        }
        seen
    });
    let version = groups.version();
    groups.close();
    Ok((version, tried?))
}
