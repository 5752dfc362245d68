//! The look from outside: what a process about to pass its gate really is, read from /proc. The ritual says
//! what it did; this asks the kernel. Anything that is not exactly as it must be keeps the gate shut.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::cgroup::read_at;
use crate::fault::{Doing, Fault};
use crate::plan::Plan;

/// What must be so.
pub struct Posture<'a> {
    /// Host uid and gid, all four of each.
    pub uid: u32,
    /// Namespaces and the identity that each must have.
    pub namespaces: &'a [(&'static str, u64)],
    /// Namespaces that must differ from the supervisor's.
    pub apart: Vec<&'static str>,
    /// Open descriptors, exactly: their number; 0 = not looked at.
    pub descriptors: usize,
    /// seccomp filters at least.
    pub filters: u32,
    /// Threads, exactly: each one is looked at.
    pub threads: u32,
    /// The bounding set must be empty.
    pub bounded: bool,
    /// Devices and what lies below the cage's own /proc are mounts of the host's.
    pub borrowed: bool,
    /// Where mounts may be, exactly, in any order; empty = not looked at.
    pub mounts: &'a [&'static str],
    /// Places of the host, where mounts may be too, and below them.
    pub visible: &'a BTreeSet<&'a str>,
}

impl Posture<'_> {
    /// Of one of our own processes beside the cages.
    pub fn own(plan: &Plan, uid: u32, network: bool, threads: u32) -> Posture<'static> {
        static NOWHERE: BTreeSet<&str> = BTreeSet::new();
        let mut apart = plan.apart(false);
        apart.extend((network && plan.network).then_some("net"));
        Posture {
            uid: plan.own_uid(uid),
            namespaces: &[],
            apart,
            descriptors: 0,
            filters: 1,
            mounts: &[],
            visible: &NOWHERE,
            borrowed: false,
            bounded: plan.bounds(),
            threads,
        }
    }
}

/// Looks at where a process is: its namespaces, its mounts and its cgroups, of which it returns the list. What a
/// process without capabilities cannot change any more may be looked at before the rest of it is done.
///
/// # Errors
/// The first thing that is not as it must be.
pub fn place(proc_fd: BorrowedFd<'_>, pid: i32, posture: &Posture<'_>) -> Result<String, Fault> {
    let process = open(proc_fd, &pid.to_string())?;
    for (name, wanted) in posture.namespaces {
        let found = namespace(&process, name)?;
        if found != *wanted {
            return wrong(&format!("namespace {name}"), "another one");
        }
    }
    let own = open(proc_fd, "self")?;
    for name in &posture.apart {
        // Some hosts have namespaces and do not show them.
        if let Ok(ours) = namespace(&own, name)
            && namespace(&process, name)? == ours
        {
            return wrong(&format!("namespace {name}"), "the supervisor's own");
        }
    }
    if !posture.mounts.is_empty() {
        let mountinfo = read_at(process.as_fd(), "mountinfo").doing("read a process's mounts")?;
        // What the host has mounted below a visible place came along read-only and is not counted.
        let shown = |point: &str| {
            let below = |place: &&str| point.strip_prefix(place).is_some_and(|rest| rest.starts_with('/'));
            posture.visible.contains(point) || posture.visible.iter().any(below)
        };
        let borrowed =
            |point: &str| posture.borrowed && (point.starts_with("/dev/") || point.starts_with("/proc/"));
        let strange = |point: &&str| !posture.mounts.contains(point) && !shown(point) && !borrowed(point);
        let mut points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
        if let Some(strange) = points.find(strange) {
            return wrong("mounts", strange);
        }
    }
    // Where a host has none there is nothing to be in.
    Ok(read_at(process.as_fd(), "cgroup").unwrap_or_default())
}

/// Looks at what a process may: each of its threads, and its descriptors.
///
/// # Errors
/// The first thing that is not as it must be.
pub fn rights(proc_fd: BorrowedFd<'_>, pid: i32, posture: &Posture<'_>) -> Result<(), Fault> {
    let process = open(proc_fd, &pid.to_string())?;
    let own = read_at(proc_fd, "self/status").doing("read the own status")?;
    let mut tasks =
        nix::dir::Dir::openat(&process, "task", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .doing("list a process's threads")?;
    let mut threads = 0;
    for task in tasks.iter().filter_map(Result::ok) {
        let Ok(name) = task.file_name().to_str() else { continue };
        if !name.starts_with('.') {
            threads += 1;
            let status =
                read_at(process.as_fd(), &format!("task/{name}/status")).doing("read a thread's status")?;
            thread(&status, &own, posture)?;
        }
    }
    if threads != posture.threads {
        return wrong("threads", &threads.to_string());
    }
    if posture.descriptors == 0 {
        return Ok(());
    }
    let mut list = nix::dir::Dir::openat(&process, "fd", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .doing("list a process's descriptors")?;
    let count =
        list.iter().filter(|entry| entry.as_ref().is_ok_and(|e| e.file_name().to_bytes()[0] != b'.')).count();
    if count != posture.descriptors {
        return wrong("descriptors", &count.to_string());
    }
    Ok(())
}

fn open(proc_fd: BorrowedFd<'_>, process: &str) -> Result<OwnedFd, Fault> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    openat(proc_fd, process, flags, Mode::empty()).doing("open a process")
}

fn wrong<T>(what: &str, found: &str) -> Result<T, Fault> {
    Err(Fault::new(format!("attest {what}"), format!("found {found}")))
}

/// What must be so of every thread. Some hosts do not show every field: what they do not show of us (`own`) they
/// cannot show of it, but for the few without which there is nothing to judge by.
fn thread(status: &str, own: &str, posture: &Posture<'_>) -> Result<(), Fault> {
    let shows = |name: &str| {
        let must = ["Uid", "Gid", "CapPrm", "CapEff"].contains(&name);
        must || own.lines().any(|line| line.starts_with(name) && line[name.len()..].starts_with(':'))
    };
    let field = |name: &str| -> &str {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap_or("?").trim()
    };
    let ids = format!("{0}\t{0}\t{0}\t{0}", posture.uid);
    for (name, wanted) in [
        ("Uid", ids.as_str()),
        ("Gid", ids.as_str()),
        ("Groups", ""),
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        if shows(name) && field(name) != wanted && (posture.bounded || name != "CapBnd") {
            return wrong(name, field(name));
        }
    }
    let filters = field("Seccomp_filters").parse::<u32>();
    match !shows("Seccomp_filters") || filters.is_ok_and(|found| found >= posture.filters) {
        true => Ok(()),
        false => wrong("Seccomp_filters", field("Seccomp_filters")),
    }
}

fn namespace(process: &OwnedFd, name: &str) -> Result<u64, Fault> {
    let path = format!("ns/{name}");
    let stat = nix::sys::stat::fstatat(process, path.as_str(), nix::fcntl::AtFlags::empty());
    Ok(stat.doing(format!("look at a process's {path}"))?.st_ino)
}
