//! What no control group bounds: the disk everywhere, and memory and tasks where a run has no group. Looked at again
//! and again, so a run may be over its bound for as long as a look takes, which is why this counts as weaker.
//! It must never wait, and never look into a tenant's folder itself: that is an errand's.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use gaoler_protocol::Reason;
use nix::sys::statfs::fstatfs;

use super::Monitor;
use super::end::end;
use crate::cgroup::read_at;
use crate::errand::{Deed, Errand, Usage};
use crate::family;
use crate::log::event;
use crate::run::{Phase, Run};

/// Between two looks.
pub const LOOK: Duration = Duration::from_millis(250);
/// A folder is measured anew when the file system has lost this much since, and from time to time in any case: not
/// every host tells what is free.
const BYTES_NEW: u64 = 16 << 20;
const FILES_NEW: u64 = 1_000;
const MEASURE_LATEST: Duration = Duration::from_secs(5);
/// A tenant who is over the bound already may still run, to clean up, as long as this does not grow by more than a
/// look would miss; but at so many times the bound no more often than this.
const OVER_MAX: u64 = 2;
const CHANCES: u8 = 3;
/// A measurement stops at so many times the bound: somebody who moves folders ahead of it would keep it for ever.
const FILES_TIMES_MAX: u64 = 8;

/// A measurement that takes longer is ended, and so many without an answer end the run: somebody whose uid the errand
/// has may have stopped it, or shut it out.
const ERRAND_LATEST: Duration = Duration::from_secs(60);
const UNANSWERED_MAX: u8 = 3;

/// What is known of a run's use of the disk.
#[derive(Debug, Default)]
pub struct Disk {
    /// When it was measured last, and what was free then.
    seen: Option<(Instant, Usage)>,
    /// What it may take: the bound, or what it had before.
    allowed: Option<Usage>,
    /// Measurements without an answer since the last one.
    unanswered: u8,
}

impl Monitor {
    /// Whether somebody is to be looked after.
    pub(super) fn watches(&self) -> bool {
        self.runs.iter().any(|run| run.phase == Phase::Running)
    }

    /// One look at everybody, no sooner than the last look's end and a pause.
    pub(super) fn look(&mut self) {
        let now = Instant::now();
        if !self.watches() || now < self.next_look {
            return;
        }
        let all = if self.plan.cgroup { Vec::new() } else { family::everybody(self.host.proc_fd.as_fd()) };
        let free = self.free();
        for mut run in std::mem::take(&mut self.runs) {
            if run.phase == Phase::Running {
                if !self.plan.cgroup {
                    self.count(&mut run, &all);
                }
                self.count_sockets(&mut run);
                self.measure(&mut run, free);
            }
            self.runs.push(run);
        }
        self.look_at_locks();
        self.next_look = Instant::now() + LOOK.max(now.elapsed() * 4);
    }

    /// Memory and tasks of a run without a control group.
    fn count(&self, run: &mut Run, all: &[family::Member]) {
        let Some(init) = &run.init else { return };
        let members = family::below(all, init.pid);
        let tasks: u32 = members.iter().map(|member| member.threads).sum();
        let memory: u64 = members.iter().map(|member| self.memory(member)).sum();
        run.peaks.tasks = run.peaks.tasks.max(tasks);
        run.peaks.memory = run.peaks.memory.max(memory);
        if memory > u64::from(run.limits.memory_mib) << 20 {
            run.ends(Reason::Oom, 0, libc::SIGKILL as u8);
            end(run);
        } else if tasks > run.limits.tasks {
            run.ends(Reason::Tasks, 0, libc::SIGKILL as u8);
            end(run);
        }
    }

    /// What is a process's own: programs and libraries are everybody's. Some hosts tell only the whole, in which the
    /// CLI's own program is counted for each of its helpers: there half of it is taken.
    fn memory(&self, member: &family::Member) -> u64 {
        let status =
            read_at(self.host.proc_fd.as_fd(), &format!("{}/status", member.pid)).unwrap_or_default();
        let kib = |name: &str| -> Option<u64> {
            status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok())
        };
        match (kib("RssAnon:"), kib("RssShmem:")) {
            (Some(own), shared) => (own + shared.unwrap_or(0)) << 10,
            _ => member.pages * 4096 / 2,
        }
    }

    /// What is free where the state lies.
    fn free(&self) -> Usage {
        let stat = fstatfs(self.tenants.as_fd()).ok();
        let bytes = |it: &nix::sys::statfs::Statfs| it.blocks_free() * it.block_size().max(0) as u64;
        stat.map_or(Usage::default(), |it| Usage { bytes: bytes(&it), files: it.files_free() })
    }

    /// Has a tenant's folder measured, where there is reason to.
    fn measure(&mut self, run: &mut Run, free: Usage) {
        let Some(tenant) = &run.folder_of_tenant else { return };
        let due = run.disk.seen.is_none_or(|(at, before)| {
            at.elapsed() > MEASURE_LATEST
                || before.bytes.saturating_sub(free.bytes) > BYTES_NEW
                || before.files.saturating_sub(free.files) > FILES_NEW
        });
        if let Some(errand) = &run.errand {
            if run.disk.seen.is_some_and(|(at, _)| at.elapsed() > ERRAND_LATEST) {
                errand.child.kill();
            }
            return;
        }
        if !due {
            return;
        }
        let files_max = u64::from(run.limits.disk_kfiles) * 1000 * FILES_TIMES_MAX;
        let (runs, placeholder) = (&mut self.runs, &mut run.placeholder);
        let sent = Errand::start(&self.plan, Deed::Measure(files_max), &tenant.folder, tenant.uid, || {
            Run::wipe_all(placeholder, runs)
        });
        match sent {
            Ok(errand) => (run.errand, run.disk.seen) = (Some(errand), Some((Instant::now(), free))),
            Err(fault) => event("measure_failed", &[("run", &run.id()), ("fault", &fault)]),
        }
    }

    /// An errand has come back.
    pub(super) fn on_errand(&mut self, run: &mut Run, succeeded: bool) {
        let Some(errand) = run.errand.take() else { return };
        let deed = errand.deed;
        let usage = errand.answer().filter(|_| succeeded);
        match (deed, usage) {
            (Deed::Wipe, Some(_)) => run.wiped = true,
            (Deed::Measure(_), Some(usage)) if run.phase == Phase::Running => self.judge(run, usage),
            (_, Some(_)) => {}
            // The next look tries again, but not for ever: an unmeasured run is an unbounded one.
            (_, None) => {
                event("errand_failed", &[("run", &run.id())]);
                run.disk.unanswered = run.disk.unanswered.saturating_add(1);
                if run.phase == Phase::Running && run.disk.unanswered >= UNANSWERED_MAX {
                    run.ends(Reason::Disk, 0, libc::SIGKILL as u8);
                    end(run);
                }
            }
        }
    }

    /// Ends a run that takes more than it may.
    fn judge(&mut self, run: &mut Run, usage: Usage) {
        let Some(id) = &run.tenant else { return };
        run.disk.unanswered = 0;
        // What was there before this run is what was seen last: a first look at it may come after its first flood.
        let before = self.measured.insert(id.clone(), usage).unwrap_or(usage);
        let times = |n: u64| Usage {
            bytes: (u64::from(run.limits.disk_mib) << 20) * n,
            files: u64::from(run.limits.disk_kfiles) * 1000 * n,
        };
        let over = |most: Usage| usage.bytes > most.bytes || usage.files > most.files;
        let (bound, most) = (times(1), times(OVER_MAX));
        let over_before = |most: Usage| before.bytes > most.bytes || before.files > most.files;
        let ended = self.far_over.get(id).copied().unwrap_or(0);
        let allowed = *run.disk.allowed.get_or_insert(
            match over_before(bound) && (!over_before(most) || ended < CHANCES) {
                true => Usage {
                    bytes: before.bytes.saturating_add(BYTES_NEW).max(bound.bytes),
                    files: before.files.saturating_add(FILES_NEW).max(bound.files),
                },
                false => bound,
            },
        );
        run.disk_peak = run.disk_peak.max(usage.bytes);
        if over(allowed) {
            if over(most) {
                self.far_over.insert(id.clone(), ended.saturating_add(1));
            }
            event("disk_limit", &[("run", &run.id()), ("bytes", &usage.bytes), ("files", &usage.files)]);
            // It writes until it is dead. What is there then is what a run that cleans up begins with.
            self.measured.remove(id);
            run.ends(Reason::Disk, 0, libc::SIGKILL as u8);
            end(run);
        } else if !over(most) {
            self.far_over.remove(id);
        }
    }
}
