//! Locks on files: the kernel's memory for them is in no control group, and no limit counts them. A child reads the
//! host's list of them at each look, and says which run has too many. The supervisor itself must never read it: that
//! waits for a grace period of the kernel's, some 10 ms, and longer the more locks there are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use gaoler_protocol::{Reason, RunId};
use gaoler_sys::clone::{Child, Side, fork};
use gaoler_sys::process;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::Monitor;
use super::end::end;
use crate::family;
use crate::fault::{Doing, Fault};
use crate::log::event;
use crate::run::{Phase, Run};

/// Locks that a run may have. Databases and installers have a dozen; a thousand take 0.2 MB of the kernel's memory.
const LOCKS_MAX: usize = 1_024;
/// Locks of the host's own that are read beside those that runs may have: a run with too many is found among both.
const HOST_MAX: usize = 8_192;
/// A line of the list has fewer bytes, and is read twice where locks come while it is read.
const LINE_BYTES: usize = 2 * 96;

/// A look that takes longer is ended, and after so many in turn that said nothing every run is: locks that nobody counts
/// have no bound.
const LOOK_LATEST: Duration = Duration::from_secs(20);
const UNANSWERED_MAX: u8 = 5;

/// A look under way.
pub struct Look {
    /// Who looks.
    pub child: Child,
    answer: OwnedFd,
    since: Instant,
}

impl Monitor {
    /// Sends somebody to look, where nobody does.
    pub(super) fn look_at_locks(&mut self) {
        match &self.locks {
            Some(look) if look.since.elapsed() > LOOK_LATEST => look.child.kill(),
            Some(_) => {}
            None => match self.sent() {
                Ok(look) => self.locks = Some(look),
                Err(fault) => {
                    event("locks_failed", &[("fault", &fault)]);
                    self.unlooked();
                }
            },
        }
    }

    /// A look has said nothing.
    fn unlooked(&mut self) {
        self.locks_unseen += 1;
        if self.locks_unseen >= UNANSWERED_MAX {
            event("locks_unseen", &[("looks", &self.locks_unseen)]);
            self.locks_unseen = 0;
            let running: Vec<RunId> = self.runs.iter().map(Run::id).collect();
            running.into_iter().for_each(|id| self.too_many(id));
        }
    }

    fn too_many(&mut self, id: RunId) {
        self.with(id, |_, run| {
            if run.phase == Phase::Running {
                event("locks_limit", &[("run", &run.id())]);
                run.ends(Reason::Locks, 0, libc::SIGKILL as u8);
                end(run);
            }
        });
    }

    fn sent(&mut self) -> Result<Look, Fault> {
        let (answer, told) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).doing("make a pipe")?;
        match fork(0, None).doing("fork for a look at locks")? {
            Side::Parent(child) => Ok(Look { child, answer, since: Instant::now() }),
            Side::Child => {
                self.runs.iter_mut().for_each(Run::wipe);
                let told = File::from(told);
                let done = process::die_with_parent().and_then(|()| match self.most_locks(&told)? {
                    Some(RunId(id)) => (&told).write_all(&id),
                    None => Ok(()),
                });
                process::exit(u8::from(done.is_err()))
            }
        }
    }

    /// The run that has the most locks, where those are too many. Whose a process is is asked first: the pid of one that
    /// ends meanwhile would have to come round again before it could be taken for another's.
    fn most_locks(&self, told: &File) -> std::io::Result<Option<RunId>> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let list = match openat(self.host.proc_fd.as_fd(), "locks", flags, Mode::empty()) {
            // Some hosts have no such list.
            Err(Errno::ENOENT) => return Ok(None),
            list => list?,
        };
        let all = if self.plan.cgroup { Vec::new() } else { family::everybody(self.host.proc_fd.as_fd()) };
        let running = self.runs.iter().filter(|run| run.phase == Phase::Running);
        let mut runs = BTreeMap::new();
        for run in running {
            let leaf = run.set.as_ref().and_then(|set| set.leaf.as_ref());
            let below = || family::below(&all, run.init.as_ref().map_or(0, |it| it.pid));
            let members = leaf.map_or_else(|| below().iter().map(|it| it.pid).collect(), |it| it.processes());
            runs.insert(run.id(), members);
        }
        // It may take long where there are many, and nobody's end must wait for what this child still holds.
        let mut keep = [list.as_raw_fd(), told.as_raw_fd()];
        keep.sort_unstable();
        process::close_all_but(&keep)?;
        let bytes = (LOCKS_MAX * (runs.len() + 1) + HOST_MAX) * LINE_BYTES;
        let mut text = String::new();
        File::from(list).take(bytes as u64).read_to_string(&mut text)?;
        let held = held(&text);
        let sum = |members: &Vec<i32>| members.iter().filter_map(|pid| held.get(pid)).sum::<usize>();
        let most = runs.iter().map(|(id, members)| (sum(members), *id)).max();
        Ok(most.filter(|(sum, _)| *sum > LOCKS_MAX).map(|(_, id)| id))
    }

    /// Somebody has looked, and said so or not.
    pub(super) fn on_locks(&mut self, succeeded: bool) {
        let Some(look) = self.locks.take() else { return };
        if !succeeded {
            return self.unlooked();
        }
        self.locks_unseen = 0;
        let mut id = [0; 16];
        if File::from(look.answer).read_exact(&mut id).is_ok() {
            self.too_many(RunId(id));
        }
    }
}

/// Locks by the process that took them. A line that comes twice is one lock, before which others came meanwhile; but
/// those by flock say nothing of themselves in which two on one file differ.
fn held(list: &str) -> BTreeMap<i32, usize> {
    let (mut seen, mut held) = (BTreeSet::new(), BTreeMap::new());
    for line in list.lines().filter_map(|line| Some(line.split_once(':')?.1.trim_start())) {
        let mut words = line.trim_start_matches("-> ").split_whitespace();
        let again = words.next() != Some("FLOCK") && !seen.insert(line);
        if let Some(pid) = words.nth(2).and_then(|word| word.parse().ok())
            && !again
        {
            *held.entry(pid).or_default() += 1;
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t01_locks_are_counted_once_and_by_who_took_them() {
        let list = "1: POSIX  ADVISORY  WRITE 77 fe:00:12 2 2\n2: POSIX  ADVISORY  WRITE 77 fe:00:12 0 0\n\
                    3: POSIX  ADVISORY  WRITE 77 fe:00:12 2 2\n4: FLOCK  ADVISORY  READ  8 fe:00:13 0 EOF\n\
                    4: FLOCK  ADVISORY  READ  8 fe:00:13 0 EOF\n4: -> FLOCK  ADVISORY  WRITE 9 fe:00:13 0 EOF\n5: OFDLCK ADVISORY  WRITE -1 fe:00:14 0 EOF\n6: POS";
        assert_eq!(held(list), BTreeMap::from([(77, 2), (8, 2), (9, 1), (-1, 1)]));
    }
}
