//! Who descends from a process, as /proc shows it: what a watchdog counts, and whom nobody but us ends where the
//! kernel has no pid namespace. It must never name a process that is not a descendant at the time of the look.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::{entries, read_at};

/// Looks before a family that goes on forking is given up for this time. Each one stops all that it sees.
const LOOKS_MAX: u32 = 1_000;

/// One process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Its pid, in the namespace of the /proc that was read.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Resident pages.
    pub pages: u64,
    /// Its threads.
    pub threads: u32,
}

/// Every process that has not ended.
pub fn everybody(proc_fd: BorrowedFd<'_>) -> Vec<Member> {
    let names = entries(proc_fd, ".", "")
        .into_iter()
        .filter(|name| name.starts_with(|first: char| first.is_ascii_digit()));
    names.filter_map(|name| member(&read_at(proc_fd, &format!("{name}/stat")).ok()?)).collect()
}

/// Those of `all` who descend from `first`, itself not counted.
pub fn below(all: &[Member], first: i32) -> Vec<Member> {
    let mut children: BTreeMap<i32, Vec<Member>> = BTreeMap::new();
    for member in all {
        children.entry(member.parent).or_default().push(*member);
    }
    let mut found = Vec::new();
    let mut next = vec![first];
    while let Some(parent) = next.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            next.push(child.pid);
            found.push(child);
        }
    }
    found
}

/// Ends everybody below this process. All are stopped first, so that none forks while the others die; whether
/// nobody was left at the last look.
pub fn end(proc_fd: impl AsFd, first: i32) -> bool {
    let look = || below(&everybody(proc_fd.as_fd()), first);
    let mut stopped = Vec::new();
    for _ in 0..LOOKS_MAX {
        let fresh: Vec<i32> = look().iter().map(|it| it.pid).filter(|pid| !stopped.contains(pid)).collect();
        if fresh.is_empty() {
            break;
        }
        for pid in fresh {
            let _ = kill(Pid::from_raw(pid), Signal::SIGSTOP);
            stopped.push(pid);
        }
    }
    let all = look();
    for member in &all {
        let _ = kill(Pid::from_raw(member.pid), Signal::SIGKILL);
    }
    all.is_empty()
}

/// The line of /proc/PID/stat; `None` for one that has ended.
fn member(stat: &str) -> Option<Member> {
    let (pid, rest) = stat.split_once(' ')?;
    // The name stands in parentheses and may hold any byte, parentheses and blanks too.
    let (_, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<i64>().ok());
    if matches!(fields.first(), Some(&("Z" | "X" | "x")) | None) {
        return None;
    }
    Some(Member {
        pid: pid.parse().ok()?,
        parent: number(1)? as i32,
        pages: number(21).unwrap_or(0).max(0) as u64,
        threads: number(17).unwrap_or(1).max(1) as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t01_a_line_reads_whatever_the_program_is_called() {
        let line = |name: &str, state: &str| {
            format!(
                "42 ({name}) {state} 7 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 3 0 99 1000000 250 18446744073709551615"
            )
        };
        let wanted = Member { pid: 42, parent: 7, pages: 250, threads: 3 };
        for name in ["sh", "a b", ") R 1 (", "((", ""] {
            assert_eq!(member(&line(name, "S")), Some(wanted), "{name}");
        }
        assert_eq!(member(&line("sh", "Z")), None);
        assert_eq!(member("42"), None);
    }

    #[test]
    fn t02_descendants_are_found_however_deep_and_nobody_else() {
        let member = |pid, parent| Member { pid, parent, pages: 0, threads: 1 };
        let all = [member(2, 1), member(5, 4), member(3, 2), member(4, 3), member(9, 8), member(1, 0)];
        let mut found: Vec<i32> = below(&all, 2).iter().map(|it| it.pid).collect();
        found.sort_unstable();
        assert_eq!(found, [3, 4, 5]);
        assert!(below(&all, 9).is_empty());
    }
}
