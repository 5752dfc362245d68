//! What a server has on the machine: processes, cgroups, mounts, namespaces, locks. Read from /proc and the
//! cgroup hierarchies, never from the server's own word.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Uids;
use super::environment::environment;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its real uid.
    pub uid: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// What it was started as: the last part of the first word of its command line.
    pub program: String,
    /// What it is to the server.
    pub role: Role,
    /// Whether it has ended and waits to be reaped.
    pub zombie: bool,
}

impl Process {
    /// Whether it is in a cage.
    pub fn is_caged(&self) -> bool {
        matches!(self.role, Role::Init | Role::Cage)
    }
}

/// Counts of everything. Two servers in the same condition have equal ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces {
    /// Processes, by who they are: the supervisor, frontend, upstream, egresses, cages.
    pub processes: Vec<String>,
    /// Leaves of cgroups, in all hierarchies.
    pub cgroups: usize,
    /// Lines of the supervisor's mountinfo.
    pub mounts: usize,
    /// Network namespaces that a process is in or that the supervisor holds open.
    pub networks: usize,
    /// Mount namespaces that a process is in: each has a temporary home.
    pub homes: usize,
    /// Namespaces of any kind that a process is in or that the supervisor holds open.
    pub namespaces: usize,
    /// Runs' own folders in the state, where they have no file system of their own.
    pub folders: usize,
    /// Locked bytes of the state's uids.
    pub uid_locks: usize,
    /// The supervisor's open descriptors.
    pub descriptors: usize,
}

impl Traces {
    /// Those of the server with this supervisor, these uids and this state.
    pub fn of(supervisor: i32, uids: Uids, state: &Path) -> Traces {
        let processes = processes(supervisor, uids);
        let namespaces = |name: &str| -> BTreeSet<String> {
            let link = |process: &Process| fs::read_link(format!("/proc/{}/ns/{name}", process.pid)).ok();
            processes.iter().filter_map(link).map(|link| link.display().to_string()).collect()
        };
        let descriptors = links_below(&format!("/proc/{supervisor}/fd"));
        let held = descriptors.iter().filter(|link| link.starts_with("net:")).cloned();
        let is_namespace = |link: &&String| {
            link.contains(":[") && !["/", "socket:", "pipe:"].iter().any(|other| link.starts_with(other))
        };
        let all = processes.iter().flat_map(|it| links_below(&format!("/proc/{}/ns", it.pid)));
        let all: BTreeSet<String> = all.chain(descriptors.iter().filter(is_namespace).cloned()).collect();
        let mut names: Vec<String> = processes.iter().map(who).collect();
        names.sort();
        Traces {
            processes: names,
            cgroups: leaves(supervisor),
            mounts: fs::read_to_string(format!("/proc/{supervisor}/mountinfo"))
                .unwrap_or_default()
                .lines()
                .count(),
            networks: namespaces("net").into_iter().chain(held).collect::<BTreeSet<_>>().len(),
            homes: namespaces("mnt").len(),
            namespaces: all.len(),
            folders: fs::read_dir(state.join("runs")).into_iter().flatten().count(),
            uid_locks: uid_locks(state),
            descriptors: descriptors.len(),
        }
    }

    /// Whether there is nothing at all.
    pub fn is_nothing(&self) -> bool {
        self.processes.is_empty() && self.cgroups == 0 && self.uid_locks == 0
    }
}

/// What the links in a folder of /proc lead to.
fn links_below(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string())).collect()
}

/// Descriptors of a process; 0 where it cannot be looked at.
pub fn descriptors(pid: i32) -> usize {
    links_below(&format!("/proc/{pid}/fd")).len()
}

/// Memory that is a process's own, KiB; of the whole where the kernel does not tell them apart.
pub fn memory_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |name: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok())
    };
    kib("RssAnon:").or(kib("VmRSS:")).unwrap_or_default()
}

fn who(process: &Process) -> String {
    let role = match process.role {
        Role::Init => "init",
        Role::Cage => "cage",
        Role::Egress => "egress",
        Role::Frontend => "frontend",
        Role::Upstream | Role::Ledger | Role::Exporter => "other",
        Role::Supervisor => "root",
    };
    format!("{role}{}", if process.zombie { " (zombie)" } else { "" })
}

/// What a process is to its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The supervisor, or a child that is still as it was forked.
    Supervisor,
    /// The frontend.
    Frontend,
    /// An egress.
    Egress,
    /// The embedded upstream.
    Upstream,
    /// The ledger.
    Ledger,
    /// The exporter of traces.
    Exporter,
    /// The first of a cage: its pid 1, or what stands for it.
    Init,
    /// Anything else in a cage.
    Cage,
}

/// By its uid; where all have one, by its program.
fn role(process: &Process, uids: Uids, supervisor: i32) -> Role {
    if !environment().root_user {
        return match process.program.as_str() {
            _ if process.pid == supervisor => Role::Supervisor,
            "gaoler-egress" => Role::Egress,
            "gaoler-upstream" => Role::Upstream,
            "gaoler-ledger" => Role::Ledger,
            "gaoler-exporter" => Role::Exporter,
            "gaoler" => Role::Frontend,
            _ => Role::Cage,
        };
    }
    match process.uid {
        uid if uids.is_run(uid) || uids.is_tenant(uid) => Role::Cage,
        uid if uids.is_egress(uid) => Role::Egress,
        uid if uids.is_frontend(uid) => Role::Frontend,
        uid if uids.is_ledger(uid) => Role::Ledger,
        uid if uids.is_exporter(uid) => Role::Exporter,
        uid if uids.contains(uid) => Role::Upstream,
        _ => Role::Supervisor,
    }
}

/// The processes under a server's uids, and those that descend from its supervisor.
pub fn processes(supervisor: i32, uids: Uids) -> Vec<Process> {
    let all: Vec<Process> = fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter_map(|entry| process(entry.file_name().to_str()?.parse().ok()?))
        .collect();
    // Where all have one uid, an orphan is known by its parent alone: whoever is above us is none.
    let shared = !environment().root_user;
    let own = nix::unistd::getuid().as_raw();
    // One that has ended is its reaper's matter, and may be another server's.
    let orphan = |it: &Process| it.uid == own && it.parent == 1 && !it.zombie;
    let mut above = BTreeSet::from([std::process::id().cast_signed()]);
    while let Some(next) = all.iter().find(|it| above.contains(&it.pid) && !above.contains(&it.parent)) {
        above.insert(next.parent);
    }
    let mut family = BTreeSet::from([supervisor]);
    loop {
        let before = family.len();
        let ours = |process: &&Process| {
            family.contains(&process.parent)
                || uids.contains(process.uid)
                || shared && orphan(process) && !above.contains(&process.pid)
        };
        let more: Vec<i32> = all.iter().filter(ours).map(|process| process.pid).collect();
        family.extend(more);
        if family.len() == before {
            break;
        }
    }
    let mut found: Vec<Process> = all.into_iter().filter(|process| family.contains(&process.pid)).collect();
    for process in &mut found {
        process.role = role(process, uids, supervisor);
    }
    let cages: BTreeSet<i32> = found.iter().filter(|it| it.role == Role::Cage).map(|it| it.pid).collect();
    for process in found.iter_mut().filter(|it| it.role == Role::Cage && !cages.contains(&it.parent)) {
        process.role = Role::Init;
    }
    found
}

/// One process, unless it has just ended.
fn process(pid: i32) -> Option<Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    };
    Some(Process {
        pid,
        parent: field("PPid")?.parse().ok()?,
        uid: field("Uid")?.split_whitespace().next()?.parse().ok()?,
        name: field("Name")?.to_owned(),
        program: program(pid),
        role: Role::Supervisor,
        zombie: field("State")?.starts_with('Z'),
    })
}

fn program(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let first = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = first.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

/// Folders of the groups that the supervisor of this id makes.
pub fn groups(supervisor: i32) -> Vec<PathBuf> {
    let name = format!("gaoler-{supervisor}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        right.starts_with("cgroup").then(|| left.split(' ').nth(4).map(str::to_owned)).flatten()
    });
    let paths: BTreeSet<&str> =
        own.lines().filter_map(|line| line.rsplit_once(':').map(|(_, path)| path)).collect();
    let candidates = points.flat_map(|point| {
        paths
            .iter()
            .map(|path| Path::new(&point).join(path.trim_start_matches('/')).join(&name))
            .collect::<Vec<_>>()
    });
    let found: BTreeSet<PathBuf> = candidates.filter(|path| path.is_dir()).collect();
    found.into_iter().collect()
}

fn leaves(supervisor: i32) -> usize {
    let folders = |path: &PathBuf| {
        fs::read_dir(path).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()).count()
    };
    groups(supervisor).iter().map(folders).sum()
}

/// Neighbours are one row of /proc/locks: its last two words are the first byte and the last.
fn uid_locks(state: &Path) -> usize {
    let Ok(file) = fs::metadata(state.join("uids")) else { return 0 };
    let inode = format!(":{} ", file.ino());
    let bytes = |line: &str| -> Option<usize> {
        let mut words = line.split_whitespace().rev();
        let (last, first) = (words.next()?.parse::<usize>().ok()?, words.next()?.parse::<usize>().ok()?);
        Some(last - first + 1)
    };
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    locks.lines().filter(|line| line.contains(&inode)).filter_map(bytes).sum()
}
