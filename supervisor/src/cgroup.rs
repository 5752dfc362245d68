//! Control groups, version 2 where its controllers are there and version 1 elsewhere: one leaf a run.
//! A limit must never be believed: each is written, read back and compared, or the leaf is refused.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use gaoler_protocol::Limits;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::fault::{Doing, Fault};

/// Every group of ours begins with this, so that a sweep knows its own.
const PREFIX: &str = "gaoler-";
/// The period over which CPU is shared out, microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// The controllers whose limits a run needs, in the order in which [`Leaf`] holds their folders.
const V1: [&str; 3] = ["memory", "pids", "cpu"];

/// Where leaves are made: this instance's own group, locked as long as the instance lives.
#[derive(Debug)]
pub struct Cgroups {
    version: Version,
    /// The instance's folder in each hierarchy (one for version 2), each of them locked.
    folders: Vec<Flock<File>>,
    parents: Vec<OwnedFd>,
    name: String,
    next: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
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
    /// No hierarchy with memory, pids and cpu, or one that refuses a new group.
    pub fn open(proc_fd: BorrowedFd<'_>) -> Result<Cgroups, Fault> {
        let mounts = read_at(proc_fd, "self/mountinfo").doing("read /proc/self/mountinfo")?;
        let own = read_at(proc_fd, "self/cgroup").doing("read /proc/self/cgroup")?;
        let name = format!("{PREFIX}{}", std::process::id());
        let (version, paths) = hierarchies(&mounts, &own).ok_or_else(|| {
            Fault::new("find a cgroup hierarchy", "none has the memory, pids and cpu controllers")
        })?;
        let mut cgroups = Cgroups { version, folders: Vec::new(), parents: Vec::new(), name, next: 0 };
        for path in paths {
            let parent = folder(nix::fcntl::AT_FDCWD, &path).doing(format!("open {path}"))?;
            cgroups.parents.push(parent);
        }
        // One start at a time: a group that is made and not yet locked looks like a dead instance's.
        let mut starting = Vec::with_capacity(cgroups.parents.len());
        for parent in &cgroups.parents {
            let parent = File::from(parent.try_clone().doing("copy a cgroup's descriptor")?);
            let locked = Flock::lock(parent, FlockArg::LockExclusive).map_err(|(_, errno)| errno);
            starting.push(locked.doing("lock the parent of the own cgroup")?);
        }
        cgroups.sweep();
        for index in 0..cgroups.parents.len() {
            let parent = cgroups.parents[index].try_clone().doing("copy a cgroup's descriptor")?;
            if version == Version::Two {
                delegate(&parent, &cgroups.name)?;
            }
            make(parent.as_fd(), &cgroups.name).doing(format!("make the cgroup {}", cgroups.name))?;
            let own = folder(&parent, &cgroups.name).doing(format!("open the cgroup {}", cgroups.name))?;
            if version == Version::Two {
                write_at(own.as_fd(), "cgroup.subtree_control", "+memory +pids +cpu")
                    .doing("enable controllers for leaves")?;
            }
            let locked = Flock::lock(File::from(own), FlockArg::LockExclusiveNonblock)
                .map_err(|(_, errno)| errno)
                .doing(format!("lock the cgroup {}", cgroups.name))?;
            cgroups.folders.push(locked);
        }
        Ok(cgroups)
    }

    /// 1 or 2.
    pub fn version(&self) -> u8 {
        match self.version {
            Version::One => 1,
            Version::Two => 2,
        }
    }

    /// A fresh leaf under these limits, each read back.
    ///
    /// # Errors
    /// A group that cannot be made, or a limit that does not hold.
    pub fn leaf(&mut self, limits: Limits) -> Result<Leaf, Fault> {
        let name = format!("r{}", self.next);
        self.next += 1;
        let mut leaf = Leaf { version: self.version, name, folders: Vec::new(), tasks: Vec::new(), limits };
        for parent in &self.folders {
            let made = make(parent.as_fd(), &leaf.name).and_then(|()| folder(parent.as_fd(), &leaf.name));
            match made {
                Ok(folder) => leaf.folders.push(folder),
                Err(errno) => {
                    self.remove(&leaf);
                    return Err(errno).doing("make a leaf");
                }
            }
        }
        let ready = leaf.bound(limits).and_then(|()| leaf.open_tasks());
        if ready.is_err() {
            self.remove(&leaf);
        }
        ready.map(|()| leaf)
    }

    /// Removes a leaf. `false` while something still lives in it.
    pub fn remove(&self, leaf: &Leaf) -> bool {
        let gone = |parent: &Flock<File>| match unlinkat(
            parent.as_fd(),
            leaf.name.as_str(),
            UnlinkatFlags::RemoveDir,
        ) {
            Ok(()) | Err(Errno::ENOENT) => true,
            Err(_) => false,
        };
        self.folders.iter().map(gone).fold(true, |all, one| all & one)
    }

    /// Removes this instance's groups. Anything still alive in a leaf keeps them; the next start sweeps.
    pub fn close(self) {
        for (parent, _) in self.parents.iter().zip(&self.folders) {
            clear(parent.as_fd(), &self.name);
        }
    }

    /// Ends and removes what instances that no longer hold their lock have left. Each hierarchy is looked at by
    /// itself: an instance that shares one of them with us may lie elsewhere in the others.
    fn sweep(&self) {
        for parent in &self.parents {
            for name in names(parent.as_fd()) {
                let dead = folder(parent, &name)
                    .map(File::from)
                    .is_ok_and(|group| Flock::lock(group, FlockArg::LockExclusiveNonblock).is_ok());
                if dead {
                    crate::log::event("swept_cgroup", &[("group", &name)]);
                    clear(parent.as_fd(), &name);
                }
            }
        }
    }
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
        let inside = |controller: &str| {
            proc_cgroup.lines().any(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let names = parts.next().unwrap_or_default();
                let path = parts.next().unwrap_or_default();
                names.split(',').any(|name| name == controller) && path.ends_with(&suffix)
            })
        };
        match self.version {
            Version::Two => inside(""),
            Version::One => V1.iter().all(|controller| inside(controller)),
        }
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
                optional(group, "memory.swap.max", "0")?;
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
                optional(memory_group.as_fd(), "memory.memsw.limit_in_bytes", "-1").ok();
                hold(memory_group.as_fd(), "memory.limit_in_bytes", &bytes)?;
                optional(memory_group.as_fd(), "memory.memsw.limit_in_bytes", &bytes)?;
                hold(pids_group.as_fd(), "pids.max", &tasks)?;
                hold(cpu_group.as_fd(), "cpu.cfs_period_us", &CPU_PERIOD_US.to_string())?;
                hold(cpu_group.as_fd(), "cpu.cfs_quota_us", &cpu.to_string())?;
            }
        }
        self.limits = limits;
        Ok(())
    }

    fn open_tasks(&mut self) -> Result<(), Fault> {
        if self.version == Version::One {
            for group in &self.folders {
                let tasks = openat(group, "tasks", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
                self.tasks.push(tasks.doing("open a leaf's tasks")?);
            }
        }
        Ok(())
    }

    /// Whether no process is left in it.
    pub fn empty(&self) -> bool {
        let file = match self.version {
            Version::Two => "cgroup.procs",
            Version::One => "tasks",
        };
        self.folders.iter().all(|group| read_at(group.as_fd(), file).is_ok_and(|text| text.is_empty()))
    }

    /// Kills whatever is in it. pid 1's end does so too; this is for what a dead instance left.
    pub fn kill(&self) {
        self.folders.iter().for_each(|group| kill(group.as_fd()));
    }

    /// What it saw so far.
    pub fn peaks(&self) -> Peaks {
        let number = |group: usize, file: &str| -> u64 {
            let text =
                self.folders.get(group).and_then(|fd| read_at(fd.as_fd(), file).ok()).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        let field = |group: usize, file: &str, key: &str| -> u32 {
            let text =
                self.folders.get(group).and_then(|fd| read_at(fd.as_fd(), file).ok()).unwrap_or_default();
            let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok());
            found.unwrap_or(0)
        };
        match self.version {
            Version::Two => Peaks {
                memory: number(0, "memory.peak"),
                tasks: number(0, "pids.peak") as u32,
                oom_kills: field(0, "memory.events", "oom_kill"),
                tasks_denied: field(0, "pids.events", "max"),
            },
            Version::One => Peaks {
                memory: number(0, "memory.max_usage_in_bytes"),
                tasks: number(1, "pids.peak") as u32,
                oom_kills: field(0, "memory.oom_control", "oom_kill"),
                tasks_denied: field(1, "pids.events", "max"),
            },
        }
    }
}

/// The folders of this process's own groups: version 2's if it has the controllers, else version 1's.
fn hierarchies(mounts: &str, own: &str) -> Option<(Version, Vec<String>)> {
    let path_of = |controller: &str| -> Option<&str> {
        own.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let names = parts.next()?;
            names.split(',').any(|name| name == controller).then(|| parts.next()).flatten()
        })
    };
    let join =
        |mount: &str, path: &str| format!("{}/{}", mount.trim_end_matches('/'), path.trim_start_matches('/'));
    let mounted = |kind: &str, option: &str| -> Option<String> {
        mounts.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut right = right.split(' ');
            let (found, options) = (right.next()?, right.nth(1)?);
            let fits = found == kind && (option.is_empty() || options.split(',').any(|o| o == option));
            // Field 4 is the root of the mount inside its file system: only a whole hierarchy will do.
            let mut left = left.split(' ');
            let (root, point) = (left.nth(3)?, left.next()?);
            (fits && root == "/").then(|| point.to_owned())
        })
    };
    if let (Some(mount), Some(path)) = (mounted("cgroup2", ""), path_of("")) {
        let folder = join(&mount, path);
        let controllers = std::fs::read_to_string(format!("{folder}/cgroup.controllers")).unwrap_or_default();
        let has = |name: &&str| controllers.split_whitespace().any(|found| found == *name);
        if V1.iter().all(has) {
            return Some((Version::Two, vec![folder]));
        }
    }
    let folders: Option<Vec<String>> = V1
        .iter()
        .map(|controller| Some(join(&mounted("cgroup", controller)?, path_of(controller)?)))
        .collect();
    Some((Version::One, folders?))
}

/// Version 2: no group with processes may have children with limits, so the supervisor moves into a leaf of
/// its own before the controllers are handed down.
fn delegate(parent: &OwnedFd, name: &str) -> Result<(), Fault> {
    if write_at(parent.as_fd(), "cgroup.subtree_control", "+memory +pids +cpu").is_ok() {
        return Ok(());
    }
    let own = format!("{name}.supervisor");
    make(parent.as_fd(), &own).doing("make the supervisor's own cgroup")?;
    let folder = folder(parent, &own).doing("open the supervisor's own cgroup")?;
    write_at(folder.as_fd(), "cgroup.procs", &std::process::id().to_string())
        .doing("move into an own cgroup")?;
    write_at(parent.as_fd(), "cgroup.subtree_control", "+memory +pids +cpu").doing("hand down controllers")
}

/// Groups of ours directly in this folder.
fn names(parent: BorrowedFd<'_>) -> Vec<String> {
    let Ok(mut list) = nix::dir::Dir::openat(parent, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
    else {
        return Vec::new();
    };
    let entries = list.iter().filter_map(|entry| entry.ok()?.file_name().to_str().ok().map(str::to_owned));
    entries.filter(|name| name.starts_with(PREFIX)).collect()
}

/// Kills and removes a group of a dead instance and its leaves. What cannot be removed now is found again.
fn clear(parent: BorrowedFd<'_>, name: &str) {
    let Ok(group) = folder(parent, name) else { return };
    let leaves: Vec<String> =
        nix::dir::Dir::openat(&group, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .map(|mut list| {
                let entries =
                    list.iter().filter_map(|entry| entry.ok()?.file_name().to_str().ok().map(str::to_owned));
                entries.filter(|leaf| leaf.starts_with('r')).collect()
            })
            .unwrap_or_default();
    for leaf in leaves {
        if let Ok(folder) = folder(&group, &leaf) {
            kill(folder.as_fd());
            // The dead leave their group when the kernel has taken them apart; 100 x 10 ms is far more than
            // the slowest teardown measured (50 ms for 1,000 processes).
            for _ in 0..100 {
                if unlinkat(&group, leaf.as_str(), UnlinkatFlags::RemoveDir) != Err(Errno::EBUSY) {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
    let _ = unlinkat(parent, name, UnlinkatFlags::RemoveDir);
}

fn kill(group: BorrowedFd<'_>) {
    if write_at(group, "cgroup.kill", "1").is_ok() {
        return;
    }
    for pid in read_at(group, "cgroup.procs").unwrap_or_default().lines().filter_map(|line| line.parse().ok())
    {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

/// Writes a limit, reads it back, and compares.
fn hold(group: BorrowedFd<'_>, file: &str, value: &str) -> Result<(), Fault> {
    write_at(group, file, value).doing(format!("set {file} to {value}"))?;
    let found = read_at(group, file).doing(format!("read {file} back"))?;
    match found.trim() == value {
        true => Ok(()),
        false => {
            Err(Fault::new(format!("set {file} to {value}"), format!("it reads {} afterwards", found.trim())))
        }
    }
}

/// The same for a file that a kernel without swap accounting does not have.
fn optional(group: BorrowedFd<'_>, file: &str, value: &str) -> Result<(), Fault> {
    match write_at(group, file, value) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => Ok(()),
        _ if value == "-1" => Ok(()),
        _ => hold(group, file, value),
    }
}

fn make(parent: BorrowedFd<'_>, name: &str) -> nix::Result<()> {
    mkdirat(parent, name, Mode::from_bits_truncate(0o755))
}

fn folder(parent: impl AsFd, name: &str) -> nix::Result<OwnedFd> {
    openat(
        parent,
        name,
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW,
        Mode::empty(),
    )
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
