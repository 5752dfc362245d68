//! Control groups, version 2 where its controllers are there and version 1 elsewhere: one leaf a run.
//! A limit must never be believed: each is written, read back and compared, or the leaf is refused.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use gaoler_protocol::Limits;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, OFlag, openat};
use nix::sys::signal::{self, Signal};
use nix::sys::stat::{Mode, fstat, mkdirat};
use nix::unistd::{Pid, UnlinkatFlags, unlinkat};

use crate::fault::{Doing, Fault};

/// Every group of ours begins with this, so that a sweep knows its own.
const PREFIX: &str = "gaoler-";
/// The period over which CPU is shared out, microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// Version 1: the buffers of TCP and UDP sockets have a bound of their own, beside the memory's. One in so many parts of
/// that: a loopback connection is full at some 6 MiB, and 32 MiB of 256 carry what servers under test exchange.
const SOCKETS_PART: u64 = 8;
/// Version 1: what counts those buffers. Only sockets that are made after it was written in their group are counted.
const SOCKETS: &str = "memory.kmem.tcp.limit_in_bytes";
/// Of the kernel's command line: with one of these, groups look as always and count a part of what they should.
const UNCOUNTED: [&str; 2] = ["nokmem", "nosocket"];

/// How often a group that another instance's sweep has taken is made again: a sweep holds one for as long as
/// its dead need to go, 1 s at most.
const SWEPT_MAX: u32 = 200;
/// Between two looks at a group that somebody else must leave first.
const RETRY: Duration = Duration::from_millis(10);

/// The controllers whose limits a run needs, in the order in which [`Leaf`] holds their folders.
const V1: [&str; 3] = ["memory", "pids", "cpu"];

/// Where leaves are made: this instance's own group, locked as long as the instance lives.
#[derive(Debug)]
pub struct Cgroups {
    version: Version,
    /// The instance's folder in each hierarchy (one for version 2), the first of them locked.
    folders: Vec<Flock<File>>,
    parents: Vec<OwnedFd>,
    name: String,
    next: u32,
    /// The host's /proc.
    proc_fd: OwnedFd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One = 1,
    Two = 2,
}

/// One run's group. Made with its limits in force; removed by [`Cgroups::remove`].
#[derive(Debug)]
pub struct Leaf {
    version: Version,
    name: String,
    folders: Vec<OwnedFd>,
    /// Version 1: the open `tasks` files, for the child to write itself into. A write to `cgroup.procs`
    /// would wait for an RCU grace period, 10 ms at low rate.
    tasks: Vec<OwnedFd>,
    limits: Limits,
    /// There was swap on this host when it was made.
    swap: bool,
}

/// What a run's group saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Peaks {
    /// Bytes.
    pub memory: u64,
    /// Tasks; 0 where the kernel keeps no such peak.
    pub tasks: u32,
    /// Processes killed for want of memory.
    pub oom_kills: u32,
    /// Forks refused.
    pub tasks_denied: u32,
}

impl Cgroups {
    /// Finds the hierarchies through this /proc, makes the instance's group and sweeps what dead instances
    /// left.
    ///
    /// # Errors
    /// No hierarchy with memory, pids and cpu, one that refuses a new group, or a kernel that was told to count less.
    pub fn open(proc_fd: BorrowedFd<'_>) -> Result<Cgroups, Fault> {
        let mounts = read_at(proc_fd, "self/mountinfo").doing("read /proc/self/mountinfo")?;
        let own = read_at(proc_fd, "self/cgroup").doing("read /proc/self/cgroup")?;
        let name = format!("{PREFIX}{}", std::process::id());
        let (version, paths) = hierarchies(&mounts, &own).ok_or_else(|| {
            Fault::new("find a cgroup hierarchy", "none has the memory, pids and cpu controllers")
        })?;
        if counts_less(&read_at(proc_fd, "cmdline").doing("read /proc/cmdline")?) {
            return Err(Errno::ENODATA).doing(
                "count sockets and kernel memory, which cgroup.memory= of the kernel's command line forbids",
            );
        }
        let parents = paths.iter().map(|path| folder(AT_FDCWD, path).doing(format!("open {path}")));
        let parents = parents.collect::<Result<Vec<_>, _>>()?;
        sweep(&parents);
        let mut folders = Vec::new();
        for parent in &parents {
            if version == Version::Two {
                delegate(parent, &name)?;
            }
            let own = take(parent, &name).doing(format!("make the cgroup {name}"))?;
            if version == Version::Two {
                hand_down(own.as_fd()).doing("enable controllers for leaves")?;
            }
            folders.push(own);
        }
        // The first group that counts sockets has the kernel patch its code, and the last one to go has it patched back:
        // this one stays, so that no launch waits for that. What matters is read back in each leaf.
        let _ = write_at(folders[0].as_fd(), SOCKETS, "-1");
        let proc_fd = proc_fd.try_clone_to_owned().doing("keep /proc")?;
        Ok(Cgroups { version, folders, parents, name, next: 0, proc_fd })
    }

    /// 1 or 2.
    pub fn version(&self) -> u8 {
        self.version as u8
    }

    /// A fresh leaf under these limits, each read back.
    ///
    /// # Errors
    /// A group that cannot be made, or a limit that does not hold.
    pub fn leaf(&mut self, limits: Limits) -> Result<Leaf, Fault> {
        let name = format!("r{}", self.next);
        self.next += 1;
        // A kernel without swap has no such list.
        let swaps = match read_at(self.proc_fd.as_fd(), "swaps") {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            read => read.doing("read /proc/swaps")?,
        };
        let swap = has_swap(&swaps);
        let mut leaf =
            Leaf { version: self.version, name, folders: Vec::new(), tasks: Vec::new(), limits, swap };
        let ready = self.fill(&mut leaf);
        if ready.is_err() {
            self.remove(&leaf);
        }
        ready.map(|()| leaf)
    }

    fn fill(&self, leaf: &mut Leaf) -> Result<(), Fault> {
        for parent in &self.folders {
            make(parent.as_fd(), &leaf.name).doing("make a leaf")?;
            leaf.folders.push(folder(parent.as_fd(), &leaf.name).doing("open a leaf")?);
        }
        if self.version == Version::One {
            for group in &leaf.folders {
                let tasks = openat(group, "tasks", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
                leaf.tasks.push(tasks.doing("open a leaf's tasks")?);
            }
        }
        leaf.bound(leaf.limits)
    }

    /// Removes a leaf. `false` while something still lives in it.
    pub fn remove(&self, leaf: &Leaf) -> bool {
        let remove =
            |parent: &Flock<File>| unlinkat(parent.as_fd(), leaf.name.as_str(), UnlinkatFlags::RemoveDir);
        let gone = |parent| matches!(remove(parent), Ok(()) | Err(Errno::ENOENT));
        self.folders.iter().map(gone).fold(true, |all, one| all & one)
    }

    /// Removes this instance's groups. Anything still alive in a leaf keeps them; the next start sweeps.
    pub fn close(self) {
        self.parents.iter().for_each(|parent| clear(parent.as_fd(), &self.name));
    }
}

/// Ends and removes what instances that no longer hold their lock have left. Each hierarchy is judged by its
/// own locks: instances of different services share some of their parents and not others.
fn sweep(parents: &[OwnedFd]) {
    for parent in parents {
        for name in entries(parent.as_fd(), ".", PREFIX) {
            // Held until it is removed, so that nobody takes it for theirs meanwhile.
            if let Ok(_dead) = locked(parent, &name) {
                crate::log::event("swept_cgroup", &[("group", &name)]);
                clear(parent.as_fd(), &name);
            }
        }
    }
}

/// Makes and locks this instance's group. Another instance's sweep may come between the two: then the
/// group is gone, or held for a moment, and is made again.
fn take(parent: &OwnedFd, name: &str) -> nix::Result<Flock<File>> {
    let inode = |folder: BorrowedFd<'_>| fstat(folder).map(|found| found.st_ino);
    let mut last = Errno::EAGAIN;
    for _ in 0..SWEPT_MAX {
        match make(parent.as_fd(), name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        match (locked(parent, name), folder(parent, name)) {
            (Ok(held), Ok(there)) if inode(held.as_fd()) == inode(there.as_fd()) => return Ok(held),
            (Err(errno), _) | (_, Err(errno)) => last = errno,
            _ => {}
        }
        std::thread::sleep(RETRY);
    }
    Err(last)
}

fn locked(parent: &OwnedFd, name: &str) -> nix::Result<Flock<File>> {
    let group = File::from(folder(parent, name)?);
    Flock::lock(group, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)
}

impl Leaf {
    /// The folder for CLONE_INTO_CGROUP; `None` for version 1, whose child attaches itself.
    pub fn clone_into(&self) -> Option<BorrowedFd<'_>> {
        match self.version {
            Version::Two => self.folders.first().map(AsFd::as_fd),
            Version::One => None,
        }
    }

    /// Version 1: what the child must write "0" into.
    pub fn tasks(&self) -> &[OwnedFd] {
        &self.tasks
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether /proc/PID/cgroup shows a process in this leaf in each hierarchy that bounds it.
    pub fn holds(&self, proc_cgroup: &str, instance: &Cgroups) -> bool {
        let suffix = format!("/{}/{}", instance.name, self.name);
        let controllers = if self.version == Version::Two { &[""][..] } else { &V1 };
        let inside = |name: &&str| path_of(name, proc_cgroup).is_some_and(|path| path.ends_with(&suffix));
        controllers.iter().all(inside)
    }

    /// Changes the limits, and reads them back.
    ///
    /// # Errors
    /// A limit that does not hold.
    pub fn bound(&mut self, limits: Limits) -> Result<(), Fault> {
        let memory = u64::from(limits.memory_mib) << 20;
        let cpu = u64::from(limits.cpu_percent) * CPU_PERIOD_US / 100;
        let tasks = limits.tasks.to_string();
        match self.version {
            Version::Two => {
                let group = self.folders[0].as_fd();
                hold(group, "memory.max", &memory.to_string())?;
                hold_where(self.swap, group, "memory.swap.max", "0")?;
                hold(group, "memory.oom.group", "1")?;
                hold(group, "pids.max", &tasks)?;
                hold(group, "cpu.max", &format!("{cpu} {CPU_PERIOD_US}"))?;
            }
            Version::One => {
                let [memory_group, pids_group, cpu_group] = &self.folders[..] else {
                    return Err(Fault::new("bound a leaf", "a hierarchy is missing"));
                };
                // A pooled leaf is already bounded by the level's limits, and the second limit may not be
                // below the first: lift it, lower the first, lower the second.
                let bytes = memory.to_string();
                let _ = write_at(memory_group.as_fd(), "memory.memsw.limit_in_bytes", "-1");
                hold(memory_group.as_fd(), "memory.limit_in_bytes", &bytes)?;
                hold_where(self.swap, memory_group.as_fd(), "memory.memsw.limit_in_bytes", &bytes)?;
                hold_where(true, memory_group.as_fd(), SOCKETS, &(memory / SOCKETS_PART).to_string())?;
                hold(pids_group.as_fd(), "pids.max", &tasks)?;
                hold(cpu_group.as_fd(), "cpu.cfs_period_us", &CPU_PERIOD_US.to_string())?;
                hold(cpu_group.as_fd(), "cpu.cfs_quota_us", &cpu.to_string())?;
            }
        }
        self.limits = limits;
        Ok(())
    }

    /// Its tasks, each thread by itself.
    pub fn members(&self) -> Vec<i32> {
        let file = if self.version == Version::Two { "cgroup.threads" } else { "tasks" };
        let text = self.folders.first().and_then(|group| read_at(group.as_fd(), file).ok());
        text.unwrap_or_default().lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Whether no process is left in it.
    pub fn empty(&self) -> bool {
        let file = if self.version == Version::Two { "cgroup.procs" } else { "tasks" };
        self.folders.iter().all(|group| read_at(group.as_fd(), file).is_ok_and(|text| text.is_empty()))
    }

    /// The processes in it.
    pub fn processes(&self) -> Vec<i32> {
        let list = self.folders.first().and_then(|group| read_at(group.as_fd(), "cgroup.procs").ok());
        list.unwrap_or_default().lines().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// Kills whatever is in it. pid 1's end does so too; this is for what a dead instance left.
    pub fn kill(&self) {
        self.folders.iter().for_each(|group| kill(group.as_fd()));
    }

    /// What it saw so far.
    pub fn peaks(&self) -> Peaks {
        let (peak, events, pids) = match self.version {
            Version::Two => ("memory.peak", "memory.events", 0),
            Version::One => ("memory.max_usage_in_bytes", "memory.oom_control", 1),
        };
        let text = |group: usize, file: &str| read_at(self.folders[group].as_fd(), file).unwrap_or_default();
        let number = |group: usize, file: &str| text(group, file).trim().parse::<u64>().unwrap_or(0);
        let field = |group: usize, file: &str, key: &str| -> u32 {
            let text = text(group, file);
            let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok());
            found.unwrap_or(0)
        };
        Peaks {
            memory: number(0, peak),
            tasks: number(pids, "pids.peak") as u32,
            oom_kills: field(0, events, "oom_kill"),
            tasks_denied: field(pids, "pids.events", "max"),
        }
    }
}

/// The path of the group in which /proc/PID/cgroup shows a process, for this controller ("" for version 2).
fn path_of<'a>(controller: &str, proc_cgroup: &'a str) -> Option<&'a str> {
    proc_cgroup.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (names, path) = rest.split_once(':')?;
        names.split(',').any(|name| name == controller).then_some(path)
    })
}

/// The folders of this process's own groups: version 2's if it has the controllers, else version 1's.
fn hierarchies(mounts: &str, own: &str) -> Option<(Version, Vec<String>)> {
    let group = |kind: &str, controller: &str| {
        let path = path_of(controller, own)?;
        mounts.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut right = right.split(' ');
            let (found, options) = (right.next()?, right.nth(1)?);
            let fits =
                found == kind && (controller.is_empty() || options.split(',').any(|o| o == controller));
            // Field 4 is the root of the mount inside its file system. A container often sees no more of a
            // hierarchy than its own group, under the path that the group has outside.
            let mut left = left.split(' ');
            let (root, point) = (left.nth(3)?, left.next()?);
            let below = path.strip_prefix(root.trim_end_matches('/'))?;
            (fits && (below.is_empty() || below.starts_with('/'))).then(|| format!("{point}{below}"))
        })
    };
    if let Some(folder) = group("cgroup2", "") {
        let controllers = std::fs::read_to_string(format!("{folder}/cgroup.controllers")).unwrap_or_default();
        if V1.iter().all(|name| controllers.split_whitespace().any(|found| found == *name)) {
            return Some((Version::Two, vec![folder]));
        }
    }
    Some((Version::One, V1.iter().map(|name| group("cgroup", name)).collect::<Option<_>>()?))
}

/// Version 2: no group with processes may have children with limits, so the supervisor moves into a leaf of
/// its own before the controllers are handed down.
fn delegate(parent: &OwnedFd, name: &str) -> Result<(), Fault> {
    if hand_down(parent.as_fd()).is_ok() {
        return Ok(());
    }
    let own = format!("{name}.supervisor");
    make(parent.as_fd(), &own).doing("make the supervisor's own cgroup")?;
    let folder = folder(parent, &own).doing("open the supervisor's own cgroup")?;
    let pid = std::process::id().to_string();
    write_at(folder.as_fd(), "cgroup.procs", &pid).doing("move into an own cgroup")?;
    hand_down(parent.as_fd()).doing("hand down controllers")
}

fn hand_down(group: BorrowedFd<'_>) -> std::io::Result<()> {
    write_at(group, "cgroup.subtree_control", "+memory +pids +cpu")
}

/// What lies directly in a folder of the kernel's and begins so.
pub fn entries(folder: BorrowedFd<'_>, path: &str, prefix: &str) -> Vec<String> {
    let names = listed(folder, path).unwrap_or_default();
    names.into_iter().filter(|name| name.starts_with(prefix)).collect()
}

/// What lies directly in a folder of the kernel's.
///
/// # Errors
/// Those of open(2) and getdents64(2). A list that cannot be read has its error again at each try: it ends there.
pub fn listed(folder: BorrowedFd<'_>, path: &str) -> nix::Result<Vec<String>> {
    let list = Dir::openat(folder, path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let names = list.into_iter().map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// Kills and removes a group of a dead instance and its leaves. What cannot be removed now is found again.
fn clear(parent: BorrowedFd<'_>, name: &str) {
    let Ok(group) = folder(parent, name) else { return };
    let leaves = entries(group.as_fd(), ".", "r");
    for leaf in leaves {
        if let Ok(folder) = folder(&group, &leaf) {
            kill(folder.as_fd());
            // The dead leave their group when the kernel has taken them apart; 100 retries is far more than
            // the slowest teardown measured (50 ms for 1,000 processes).
            for _ in 0..100 {
                if unlinkat(&group, leaf.as_str(), UnlinkatFlags::RemoveDir) != Err(Errno::EBUSY) {
                    break;
                }
                std::thread::sleep(RETRY);
            }
        }
    }
    let _ = unlinkat(parent, name, UnlinkatFlags::RemoveDir);
}

fn kill(group: BorrowedFd<'_>) {
    if write_at(group, "cgroup.kill", "1").is_ok() {
        return;
    }
    let pids = read_at(group, "cgroup.procs").unwrap_or_default();
    for pid in pids.lines().filter_map(|line| line.parse().ok()) {
        let _ = signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Writes a limit, reads it back, and compares.
fn hold(group: BorrowedFd<'_>, file: &str, value: &str) -> Result<(), Fault> {
    write_at(group, file, value).doing(format!("set {file} to {value}"))?;
    let found = read_at(group, file).doing(format!("read {file} back"))?;
    match found.trim() {
        same if same == value => Ok(()),
        other => Err(Fault::new(format!("set {file} to {value}"), format!("it reads {other} afterwards"))),
    }
}

/// The same for a file that not every kernel has, which is well where there is nothing for it to bound.
fn hold_where(needed: bool, group: BorrowedFd<'_>, file: &str, value: &str) -> Result<(), Fault> {
    match write_at(group, file, value).map_err(|error| error.raw_os_error()) {
        Err(Some(libc::ENOENT | libc::EACCES)) if !needed => Ok(()),
        Err(Some(libc::ENOENT)) => Err(Errno::ENODATA).doing(format!("bound by {file}, which is not there")),
        _ => hold(group, file, value),
    }
}

/// Whether this kernel's command line takes from groups what they are to count.
fn counts_less(command_line: &str) -> bool {
    let told = command_line.split_whitespace().filter_map(|word| word.strip_prefix("cgroup.memory="));
    told.flat_map(|words| words.split(',')).any(|word| UNCOUNTED.contains(&word))
}

/// Whether /proc/swaps names anything below its heading.
fn has_swap(swaps: &str) -> bool {
    swaps.lines().count() > 1
}

fn make(parent: BorrowedFd<'_>, name: &str) -> nix::Result<()> {
    mkdirat(parent, name, Mode::from_bits_truncate(0o755))
}

fn folder(parent: impl AsFd, name: &str) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    openat(parent, name, flags, Mode::empty())
}

/// The text of a small file of the kernel's, at most 64 KiB of it.
pub fn read_at(folder: BorrowedFd<'_>, name: &str) -> std::io::Result<String> {
    let file = openat(folder, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut text = String::new();
    File::from(file).take(65_536).read_to_string(&mut text)?;
    Ok(text)
}

fn write_at(folder: BorrowedFd<'_>, name: &str, value: &str) -> std::io::Result<()> {
    let file = openat(folder, name, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    File::from(file).write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t01_a_group_is_found_through_whatever_part_of_its_hierarchy_is_mounted() {
        let mounts = |root: &str| -> String {
            V1.iter().map(|name| format!("9 8 0:1 {root} /g/{name} ro - cgroup cgroup rw,{name}\n")).collect()
        };
        let own = |path: &str| -> String { V1.iter().map(|name| format!("3:{name}:{path}\n")).collect() };
        let found = |root: &str, path: &str| hierarchies(&mounts(root), &own(path)).map(|(_, paths)| paths);
        let at = |path: &str| Some(V1.map(|name| format!("/g/{name}{path}")).to_vec());
        assert_eq!(found("/", "/"), at("/"));
        assert_eq!(found("/", "/a/b"), at("/a/b"));
        assert_eq!(found("/a/b", "/a/b"), at(""));
        assert_eq!(found("/a", "/a/b"), at("/b"));
        // Another group's part is no way to ours, whatever its name begins with.
        assert_eq!(found("/a", "/ab"), None);
        assert_eq!(found("/a/b", "/a"), None);
        assert_eq!(hierarchies("", &own("/")), None);
    }

    #[test]
    fn p11_swap_and_sockets_are_never_believed_to_be_bounded() {
        let group = tempfile::tempdir().expect("a folder");
        let opened = folder(AT_FDCWD, group.path().to_str().expect("text")).expect("a folder");
        let hold = |needed| hold_where(needed, opened.as_fd(), "limit", "7").map_err(|fault| fault.errno());
        // Without the file there is no bound, and that is well only where there is nothing to bound.
        assert_eq!(hold(false), Ok(()));
        assert_eq!(hold(true), Err(Errno::ENODATA as u16));
        std::fs::write(group.path().join("limit"), "").expect("a file");
        assert_eq!(hold(true), Ok(()));
        assert_eq!(std::fs::read_to_string(group.path().join("limit")).expect("the file"), "7");

        let heading = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert!(!has_swap("") && !has_swap(heading));
        assert!(has_swap(&format!("{heading}/dev/zram0 partition 4194300 0 100\n")));

        assert!(!counts_less("") && !counts_less("quiet cgroup.memory=nobpf nosocket systemd.nokmem=1"));
        assert!(
            counts_less("quiet cgroup.memory=nosocket ro\n") && counts_less("cgroup.memory=nobpf,nokmem")
        );
    }
}
