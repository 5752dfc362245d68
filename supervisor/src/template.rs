//! The root that every cage starts from, built from nothing once at boot, and entered by the supervisor
//! itself: a cage's copy of the mount namespace then holds little more than the cage needs.
//! Where no root can be built, covers over the host's. Neither must ever show a file of the host but the programs
//! and libraries below /usr.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use gaoler_sys::mount::{Attributes, attach, clone_tree, restrict};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::fault::{Doing, Fault};
use crate::level::Levels;
use gaoler_policy::level::LevelPolicy;

/// Where the state lies in the supervisor's root, until it parts from it. Root's alone.
pub const STATE: &str = "/mnt";
/// Where the CLI lies in a cage.
pub const CLI: &str = "/opt/claude/claude";
/// A file that the file permissions let everybody read and that no Landlock rule covers: what a cage's
/// self-test must fail to open.
pub const PROBE: &str = "/.probe";
/// An empty file, to cover others with.
pub const EMPTY: &str = "/etc/empty";
/// The uid and gid of everything inside a cage.
pub const INSIDE: u32 = 1000;

/// Folders of the root that are there in any case. Those that a run mounts something on are empty here.
const FOLDERS: &str =
    "etc/claude-code etc/ssl/certs dev/shm proc tmp home/agent workspace run/gaoler opt/claude var mnt";

/// What every mount of the host's that a cage sees is restricted to.
const READ_ONLY: Attributes<'static> = Attributes { read_only: true, nosuid: true, nodev: true, idmap: None };

/// Leaves the host's file system for a fresh root: what the levels make visible of the host, read-only, a
/// synthetic /etc, the devices, the CLI where there is one, and the state folder, which only root may
/// enter. An ordinary user (`inside` a user namespace) can make no devices and borrows the host's; and must keep the
/// host's /proc below the cages' own, or the kernel would not let them have one.
///
/// # Errors
/// The first call that the kernel refuses. The process must then end: it may be half way.
pub fn enter(state: &Path, cli: Option<&Path>, levels: &Levels, inside: bool) -> Result<(), Fault> {
    unshare(CloneFlags::CLONE_NEWNS).doing("leave the host's mount namespace")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).doing("make mounts private")?;

    // All of the host that the new root takes along is copied before anything is covered.
    // Opened here and not before: a mount can only be copied by a descriptor of this namespace.
    let open = |path: &Path| File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
    let state = open(state).doing("open the state folder")?;
    let state = clone_tree(state.as_fd(), false).doing("copy the state folder's mount")?;
    restrict(state.as_fd(), Attributes { nosuid: true, nodev: true, ..Attributes::default() }, false)
        .doing("restrict the state folder's mount")?;
    let cli = cli
        .map(|path| clone_tree(File::open(path)?.as_fd(), false))
        .transpose()
        .doing("copy the CLI's mount")?;
    // What one level shows and another does not is in the root of both: Landlock keeps them apart.
    let visible = levels.visible();
    let places = visible.iter().filter_map(|path| Place::of(path).transpose());
    let places = places.collect::<Result<Vec<Place<'_>>, Fault>>()?;
    // Devices and settings are the same for all levels (policies: t07_a_stricter_level_is_in_nothing_looser).
    let level = levels.get(levels.default).policy;
    // An ordinary user can make no device and borrows the host's; and keeps the host's /proc below the cages' own,
    // or the kernel would not let them have one.
    let borrowed = level.devices.iter().map(|(path, _)| *path).chain(["/proc"]).filter(|_| inside);
    let borrowed = borrowed.map(|path| -> Result<_, Fault> {
        let tree = File::open(path).and_then(|file| clone_tree(file.as_fd(), true));
        Ok((path, tree.doing(format!("copy the mount of {path}"))?))
    });
    let borrowed = borrowed.collect::<Result<Vec<_>, Fault>>()?;

    // Any folder will do to hang the new root on: in this namespace nobody else sees it.
    let root = Path::new("/tmp");
    mount(Some("gaoler"), root, Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=755,size=32m"))
        .doing("mount the new root")?;
    for name in FOLDERS.split(' ') {
        fs::create_dir_all(root.join(name)).doing("make a folder of the new root")?;
    }
    mode(&root.join(&STATE[1..]), 0o700)?;
    for (path, minor) in level.devices {
        let path = root.join(&path[1..]);
        if inside {
            file(&path, b"")?;
            continue;
        }
        mknod(&path, SFlag::S_IFCHR, Mode::empty(), makedev(1, *minor)).doing("make a device")?;
        mode(&path, 0o666)?;
    }
    for (name, target) in [
        ("dev/fd", "/proc/self/fd"),
        ("dev/stdin", "fd/0"),
        ("dev/stdout", "fd/1"),
        ("dev/stderr", "fd/2"),
        ("var/tmp", "/tmp"),
    ] {
        symlink(target, root.join(name)).doing("make a link of the new root")?;
    }
    file(&root.join(&PROBE[1..]), b"no Landlock rule covers this file\n")?;
    etc(&root.join("etc"), level)?;

    for place in places {
        place.make(root)?;
    }
    for (path, tree) in borrowed {
        attach(tree.as_fd(), &c_path(&root.join(&path[1..]))?).doing(format!("attach {path}"))?;
    }
    if let Some(cli) = cli {
        let place = root.join(&CLI[1..]);
        file(&place, b"")?;
        restrict(cli.as_fd(), READ_ONLY, false).doing("restrict the CLI's mount")?;
        attach(cli.as_fd(), &c_path(&place)?).doing("attach the CLI")?;
    }
    attach(state.as_fd(), &c_path(&root.join(&STATE[1..]))?).doing("attach the state folder")?;

    let only_read = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
    mount(none, root, none, only_read, none).doing("make the new root read-only")?;
    nix::unistd::chdir(root).doing("enter the new root")?;
    nix::unistd::pivot_root(".", ".").doing("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).doing("leave the host's root")?;
    nix::unistd::chdir("/").doing("enter the new root")
}

/// The synthetic /etc, where the CLI also finds its managed settings.
fn etc(folder: &Path, level: &LevelPolicy) -> Result<(), Fault> {
    let users = b"agent:x:1000:1000:agent:/home/agent:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n";
    for (name, text) in [
        ("passwd", &users[..]),
        ("group", b"agent:x:1000:\nnogroup:x:65534:\n"),
        ("hosts", b"127.0.0.1 localhost cage\n::1 localhost\n"),
        ("hostname", b"cage\n"),
        ("nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files\n"),
        ("resolv.conf", b""),
        ("empty", b""),
        ("gitconfig", b"[safe]\n\tdirectory = /workspace\n"),
        ("claude-code/managed-settings.json", level.managed_settings.as_bytes()),
    ] {
        file(&folder.join(name), text)?;
    }
    Ok(())
}

/// What covers the host's folders: an empty file system on each, and on /etc a synthetic one.
pub struct Covers {
    shown: Vec<PathBuf>,
    kept: Vec<PathBuf>,
    files: Vec<(PathBuf, Vec<u8>)>,
    links: Vec<(PathBuf, PathBuf)>,
    level: &'static LevelPolicy,
}

impl Covers {
    /// Covers for everything but what the levels show and what leads to `kept`.
    ///
    /// # Errors
    /// A folder that cannot be listed, or a file that cannot be read.
    pub fn of(levels: &Levels, kept: &[&Path]) -> Result<Covers, Fault> {
        let level = levels.get(levels.default).policy;
        let visible = levels.visible();
        let shown = visible.iter().map(Path::new);
        let (below, shown): (Vec<&Path>, Vec<&Path>) = shown.partition(|path| path.starts_with("/etc"));
        let shown: Vec<&Path> = shown.into_iter().chain(["/proc", "/dev", "/tmp"].map(Path::new)).collect();
        let (mut files, mut links) = (Vec::new(), Vec::new());
        for path in below {
            let Ok(found) = fs::metadata(path) else { continue };
            if !found.is_dir() {
                files.push((path.into(), fs::read(path).doing(format!("read {}", path.display()))?));
                continue;
            }
            let entries = fs::read_dir(path).doing(format!("list {}", path.display()))?;
            let link = |path: PathBuf| Some((path.clone(), fs::read_link(&path).ok()?));
            links.extend(entries.filter_map(|entry| link(entry.ok()?.path())));
        }
        let owned = |paths: &[&Path]| paths.iter().map(PathBuf::from).collect();
        Ok(Covers { shown: owned(&shown), kept: owned(kept), files, links, level })
    }

    /// Covers them in the own mount namespace, and makes the folders that a run mounts something on.
    ///
    /// # Errors
    /// Those of mount(2) and of making files.
    pub fn put(&self) -> std::io::Result<()> {
        let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        // Listed anew for each run: what has come since must be covered too, and what has gone needs no cover.
        for path in &covered(&self.shown, &self.kept)? {
            let options = if path == Path::new("/etc") { "mode=755,size=8m" } else { "mode=755,size=64k" };
            match mount(Some("gaoler"), path, Some("tmpfs"), hardened, Some(options)) {
                Err(Errno::ENOENT) => {}
                mounted => mounted?,
            }
        }
        for folder in
            ["/home/agent", "/run/gaoler", "/etc/claude-code", "/etc/alternatives", "/etc/ssl/certs"]
        {
            fs::create_dir_all(folder)?;
        }
        etc(Path::new("/etc"), self.level).map_err(|fault| fault.error)?;
        self.files.iter().try_for_each(|(path, text)| file(path, text).map_err(|fault| fault.error))?;
        self.links.iter().try_for_each(|(path, target)| symlink(target, path))
    }
}

/// Which folders of the host must be covered so that only `shown` and what leads to `kept` is left. A folder on the
/// way to a kept one cannot be covered itself, so its other entries are.
fn covered(shown: &[PathBuf], kept: &[PathBuf]) -> std::io::Result<Vec<PathBuf>> {
    let mut covers = Vec::new();
    let mut open = vec![PathBuf::from("/")];
    while let Some(folder) = open.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let is_folder = fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir());
            if !is_folder || shown.contains(&path) || kept.contains(&path) {
                continue;
            }
            match kept.iter().any(|kept| kept.starts_with(&path)) {
                true => open.push(path),
                false => covers.push(path),
            }
        }
    }
    covers.sort();
    Ok(covers)
}

/// The supervisor's two mount namespaces, which differ in the state folder alone.
pub struct Views {
    /// The one that it lives in and that every cage copies: the state folder is not in it.
    cages: OwnedFd,
    /// The one in which a tenant's folder can be copied as a mount.
    state: OwnedFd,
}

impl Views {
    /// Leaves the state folder behind, once what is needed of it is open. To unmount it in each cage would wait
    /// for an RCU grace period every time, which is most of what a launch then took.
    ///
    /// # Errors
    /// Those of unshare(2) and umount2(2).
    pub fn part(proc_fd: BorrowedFd<'_>) -> Result<Views, Fault> {
        let open = || openat(proc_fd, "self/ns/mnt", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        let state = open().doing("open the own mount namespace")?;
        unshare(CloneFlags::CLONE_NEWNS).doing("copy the own mount namespace")?;
        umount2(STATE, MntFlags::MNT_DETACH).doing("unmount the state folder")?;
        Ok(Views { cages: open().doing("open the own mount namespace")?, state })
    }

    /// Copies the mount at a folder of the state.
    ///
    /// # Errors
    /// Those of setns(2) and open_tree(2). A way back that is shut ends the process: nothing may be forked from
    /// the wrong view.
    pub fn copy(&self, folder: BorrowedFd<'_>) -> Result<OwnedFd, Fault> {
        setns(&self.state, CloneFlags::CLONE_NEWNS).doing("enter the state's mount namespace")?;
        let tree = clone_tree(folder, false).doing("copy a tenant's mount");
        if setns(&self.cages, CloneFlags::CLONE_NEWNS).is_err() {
            std::process::abort();
        }
        tree
    }
}

/// A place of the host that a cage sees.
enum Place<'a> {
    /// A link to a folder, made again.
    Link(&'a str, PathBuf),
    /// A folder, mounted.
    Folder(&'a str, OwnedFd),
    /// A file, copied.
    File(&'a str, Vec<u8>),
}

impl<'a> Place<'a> {
    /// The place at this path; `None` where the host has none.
    fn of(host: &'a str) -> Result<Option<Place<'a>>, Fault> {
        let Ok(kind) = fs::metadata(host) else { return Ok(None) };
        let name = &host[1..];
        if !kind.is_dir() {
            return Ok(Some(Place::File(name, fs::read(host).doing(format!("read {host}"))?)));
        }
        if let Ok(target) = fs::read_link(host) {
            return Ok(Some(Place::Link(name, target)));
        }
        let folder = File::open(host).doing(format!("open {host}"))?;
        let tree = clone_tree(folder.as_fd(), true).doing(format!("copy the mount of {host}"))?;
        restrict(tree.as_fd(), READ_ONLY, true).doing(format!("restrict the mount of {host}"))?;
        Ok(Some(Place::Folder(name, tree)))
    }

    fn make(self, root: &Path) -> Result<(), Fault> {
        let (Place::Link(name, _) | Place::Folder(name, _) | Place::File(name, _)) = &self;
        let parent = root.join(name).parent().map(fs::create_dir_all);
        parent.transpose().doing("make a folder of the new root")?;
        match self {
            Place::Link(name, target) => {
                symlink(target, root.join(name)).doing("make a link of the new root")
            }
            Place::File(name, bytes) => file(&root.join(name), &bytes),
            Place::Folder(name, tree) => {
                fs::create_dir_all(root.join(name)).doing("make a folder of the new root")?;
                attach(tree.as_fd(), &c_path(&root.join(name))?).doing(format!("attach /{name}"))
            }
        }
    }
}

fn mode(path: &Path, mode: u32) -> Result<(), Fault> {
    fs::set_permissions(path, Permissions::from_mode(mode)).doing("set a mode in the new root")
}

fn file(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    fs::write(path, bytes).doing("write a file of the new root")?;
    mode(path, 0o444)
}

fn c_path(path: &Path) -> Result<CString, Fault> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Fault::new("name a path", "it holds a NUL"))
}
