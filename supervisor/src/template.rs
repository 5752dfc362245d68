//! The root that every cage starts from, built from nothing once at boot, and entered by the supervisor
//! itself: a cage's copy of the mount namespace then holds little more than the cage needs.
//! It must never show a file of the host but the programs and libraries below /usr.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use gaoler_sys::mount::{Attributes, attach, clone_tree, restrict};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::fault::{Doing, Fault};

/// Where the state lies in the supervisor's root. Root's alone, and unmounted first in every cage.
pub const STATE: &str = "/mnt";
/// Where the CLI lies in a cage.
pub const CLI: &str = "/opt/claude/claude";
/// A file that the file permissions let everybody read and that no Landlock rule covers: what a cage's
/// self-test must fail to open.
pub const PROBE: &str = "/.probe";
/// The uid and gid of everything inside a cage.
pub const INSIDE: u32 = 1000;

/// Character devices that programs cannot do without: name, minor (major is 1, memory devices).
const DEVICES: [(&str, u64); 5] = [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)];

/// Folders of the root, with their modes. Those that a run mounts something on are empty here.
const FOLDERS: [(&str, u32); 17] = [
    ("usr", 0o755),
    ("etc", 0o755),
    ("etc/ssl", 0o755),
    ("etc/ssl/certs", 0o755),
    ("etc/claude-code", 0o755),
    ("dev", 0o755),
    ("dev/shm", 0o755),
    ("proc", 0o755),
    ("tmp", 0o755),
    ("home", 0o755),
    ("home/agent", 0o755),
    ("workspace", 0o755),
    ("run", 0o755),
    ("run/gaoler", 0o755),
    ("opt", 0o755),
    ("opt/claude", 0o755),
    ("mnt", 0o700),
];

/// Leaves the host's file system for a fresh root: /usr read-only, a synthetic /etc, five devices, the CLI
/// where there is one, and the state folder, which only root may enter.
///
/// # Errors
/// The first call that the kernel refuses. The process must then end: it may be half way.
pub fn enter(state: &Path, cli: Option<&Path>, managed_settings: &str) -> Result<(), Fault> {
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
    let programs =
        [("/usr", "usr"), ("/bin", "bin"), ("/sbin", "sbin"), ("/lib", "lib"), ("/lib64", "lib64")]
            .into_iter()
            .filter_map(|(host, name)| Program::of(host, name).transpose())
            .collect::<Result<Vec<Program>, Fault>>()?;
    let alternatives = Program::of("/etc/alternatives", "etc/alternatives")?;
    let copies: Vec<(&str, Vec<u8>)> =
        ["etc/ld.so.cache", "etc/ssl/certs/ca-certificates.crt", "etc/localtime"]
            .into_iter()
            .filter_map(|name| Some((name, fs::read(Path::new("/").join(name)).ok()?)))
            .collect();

    // Any folder will do to hang the new root on: in this namespace nobody else sees it.
    let root = Path::new("/tmp");
    mount(Some("gaoler"), root, Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=755,size=32m"))
        .doing("mount the new root")?;
    for (name, mode) in FOLDERS {
        folder(&root.join(name), mode)?;
    }
    for (name, minor) in DEVICES {
        let path = root.join("dev").join(name);
        mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, minor))
            .doing("make a device")?;
        fs::set_permissions(&path, Permissions::from_mode(0o666)).doing("open a device to all")?;
    }
    for (name, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        symlink(target, root.join("dev").join(name)).doing("link a device")?;
    }
    folder(&root.join("var"), 0o755)?;
    symlink("/tmp", root.join("var/tmp")).doing("link /var/tmp")?;
    for (name, bytes) in copies {
        file(&root.join(name), &bytes)?;
    }
    let managed = managed_settings.as_bytes();
    for (name, text) in [
        (
            "etc/passwd",
            &b"agent:x:1000:1000:agent:/home/agent:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n"[..],
        ),
        ("etc/group", b"agent:x:1000:\nnogroup:x:65534:\n"),
        ("etc/hosts", b"127.0.0.1 localhost cage\n::1 localhost\n"),
        ("etc/hostname", b"cage\n"),
        ("etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files\n"),
        ("etc/resolv.conf", b""),
        ("etc/gitconfig", b"[safe]\n\tdirectory = /workspace\n"),
        ("etc/claude-code/managed-settings.json", managed),
        (&PROBE[1..], b"no Landlock rule covers this file\n"),
    ] {
        file(&root.join(name), text)?;
    }

    for program in programs.into_iter().chain(alternatives) {
        program.place(root)?;
    }
    if let Some(cli) = cli {
        let place = root.join(&CLI[1..]);
        file(&place, b"")?;
        restrict(cli.as_fd(), Attributes { read_only: true, nosuid: true, nodev: true, idmap: None }, false)
            .doing("restrict the CLI's mount")?;
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

/// A folder of the host's programs: a link that is made again, or a mount.
enum Program {
    Link(&'static str, std::path::PathBuf),
    Mount(&'static str, OwnedFd),
}

impl Program {
    fn of(host: &'static str, name: &'static str) -> Result<Option<Program>, Fault> {
        let Ok(kind) = fs::symlink_metadata(host) else { return Ok(None) };
        if kind.is_symlink() {
            return Ok(Some(Program::Link(name, fs::read_link(host).doing("read a link")?)));
        }
        let tree = clone_tree(File::open(host).doing(format!("open {host}"))?.as_fd(), true)
            .doing(format!("copy the mount of {host}"))?;
        restrict(tree.as_fd(), Attributes { read_only: true, nosuid: true, nodev: true, idmap: None }, true)
            .doing(format!("restrict the mount of {host}"))?;
        Ok(Some(Program::Mount(name, tree)))
    }

    fn place(self, root: &Path) -> Result<(), Fault> {
        match self {
            Program::Link(name, target) => {
                symlink(target, root.join(name)).doing("link a folder of programs")
            }
            Program::Mount(name, tree) => {
                folder(&root.join(name), 0o755)?;
                attach(tree.as_fd(), &c_path(&root.join(name))?).doing(format!("attach /{name}"))
            }
        }
    }
}

fn folder(path: &Path, mode: u32) -> Result<(), Fault> {
    fs::create_dir_all(path).doing("make a folder of the new root")?;
    fs::set_permissions(path, Permissions::from_mode(mode)).doing("set a folder's mode")
}

fn file(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    fs::write(path, bytes).doing("write a file of the new root")?;
    fs::set_permissions(path, Permissions::from_mode(0o444)).doing("set a file's mode")
}

fn c_path(path: &Path) -> Result<CString, Fault> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Fault::new("name a path", "it holds a NUL"))
}
