//! What no control group bounds: the disk everywhere, and memory and tasks where a run has no group. Looked at again
//! and again, so a run may be over its bound for as long as a look takes, which is why this counts as weaker.
//! It must never wait, and never look into a tenant's folder itself: that is an errand's.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use gaoler_protocol::{Reason, RunId};
use nix::sys::stat::fstat;
use nix::sys::statfs::fstatfs;

use super::Monitor;
use super::end::end;
use crate::cgroup::read_at;
use crate::errand::{self, Deed, Errand, Usage};
use crate::family;
use crate::log::event;
use crate::run::{Phase, Run};

/// Between two looks; while the disk fills, or is nearly full, no more than what a fast one takes in 50 MB.
pub const LOOK: Duration = Duration::from_millis(250);
const LOOK_SOON: Duration = Duration::from_millis(25);
/// A folder is measured anew when the file system has lost this much since, and from time to time in any case: not
/// every host tells what is free.
const BYTES_NEW: u64 = 16 << 20;
const FILES_NEW: u64 = 1_000;
const MEASURE_LATEST: Duration = Duration::from_secs(5);
/// A tenant who had not grown when measured is measured anew at twice the loss, so often at most: somebody else writes.
const CALM_MAX: u32 = 3;
/// A tenant's measurements take no more than one part in so many of a CPU's time.
const MEASURED_PART: u32 = 2;
/// What no run may take of the state's file system: gaoler's own records and transcripts need it. The lesser of this
/// and one part in so many.
const RESERVE: Usage = Usage::of(256 << 20, 10_000);
const RESERVE_PART: u64 = 8;
/// From so many times the reserve on it counts who has grown, and looks come sooner.
const TIGHT: u64 = 4;
/// Where nothing but the reserve is left, a run may grow by so much: its transcript does.
const BYTES_LEFT: u64 = 4 << 20;
/// What a file weighs beside bytes: ext4 has one inode for so many.
const FILE_BYTES: u64 = 16 << 10;
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
/// What a run seems to hide others may have written: they are measured first, for so long at most.
const DOUBT_LATEST: Duration = Duration::from_secs(10);

/// What is known of a run's use of the disk.
#[derive(Debug, Default)]
pub struct Disk {
    /// What was free when it began.
    pub begun: Usage,
    /// What tenants were known to have grown by then.
    pub begun_grown: i64,
    /// When it was measured last, and what was free then.
    seen: Option<(Instant, Usage)>,
    /// Not to be measured again before, nor wiped.
    pub rests: Option<Instant>,
    /// What it may take: the bound, or what it had before.
    allowed: Option<Usage>,
    /// Measurements without an answer since the last one.
    unanswered: u8,
    /// Measurements since it grew.
    calm: u32,
    /// What its tenant's files weighed while there was room, and how much more they have weighed since.
    base: Option<u64>,
    grown: u64,
    /// What nobody could look at when it was measured last.
    flying: u64,
    /// Since when it seems to hide too much, and what was free then.
    doubted: Option<(Instant, Usage)>,
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
        let (free, reserve) = self.free();
        let running = |run: &&Run| run.phase == Phase::Running;
        let ids: Vec<RunId> = self.runs.iter().filter(running).map(Run::id).collect();
        for id in ids {
            self.with(id, |monitor, run| {
                if !monitor.plan.cgroup {
                    monitor.count(run, &all);
                }
                monitor.count_sockets(run);
                monitor.measure(run, &all, free, free.within(reserve, 1));
            });
        }
        self.look_at_locks();
        let fills = |run: &Run| {
            run.disk.seen.is_some_and(|(_, then)| then.bytes.saturating_sub(free.bytes) > BYTES_NEW / 16)
        };
        let soon = free.within(reserve, TIGHT) || self.runs.iter().any(fills);
        let pause = if soon { LOOK_SOON } else { LOOK };
        self.next_look = Instant::now() + pause.max(now.elapsed() * 4);
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

    /// What is free where the state lies, and what of it is the reserve.
    pub(super) fn free(&self) -> (Usage, Usage) {
        let Ok(stat) = fstatfs(self.tenants.as_fd()) else { return Default::default() };
        // What root alone may use is no use to the ledger.
        let bytes = |blocks: u64| blocks.saturating_mul(stat.block_size().max(0) as u64);
        let part = |all: u64, most: u64| most.min(all / RESERVE_PART);
        let reserve = Usage::of(part(bytes(stat.blocks()), RESERVE.bytes), part(stat.files(), RESERVE.files));
        (Usage::of(bytes(stat.blocks_available()), stat.files_free()), reserve)
    }

    /// Has a tenant's folder measured, and what the tenant's runs hold, where there is reason to.
    fn measure(&mut self, run: &mut Run, all: &[family::Member], free: Usage, short: bool) {
        let Some(tenant) = &run.folder_of_tenant else { return };
        let now = Instant::now();
        if let Some(errand) = &run.errand {
            if run.disk.seen.is_some_and(|(at, _)| now.duration_since(at) > ERRAND_LATEST) {
                errand.child.kill();
            }
            return;
        }
        let step = if short { BYTES_LEFT } else { BYTES_NEW << run.disk.calm };
        let doubts = self.runs.iter().filter_map(|it| it.disk.doubted).map(|(since, _)| since).max();
        let due = run.disk.doubted.is_some()
            || run.disk.seen.is_none_or(|(at, then)| {
                now.duration_since(at) > MEASURE_LATEST
                    || doubts.is_some_and(|since| at <= since)
                    || then.bytes.saturating_sub(free.bytes) > step
                    || then.files.saturating_sub(free.files) > FILES_NEW
            });
        let runs = || self.runs.iter().filter(|it| it.tenant == run.tenant && it.phase == Phase::Running);
        // One for all of a tenant's runs: each is told.
        let another = runs().any(|it| it.errand.is_some());
        if !due || another || run.disk.rests.is_some_and(|until| now < until) {
            return;
        }
        let proc_fd = self.host.proc_fd.as_fd();
        let tasks: Vec<i32> = runs().chain([&*run]).flat_map(|it| it.tasks(all)).collect();
        // They can send descriptors to their egress. Where root may not look at it, what waits there goes uncounted.
        let egress = runs().chain([&*run]).filter_map(|it| Some(it.egress.as_ref()?.process.child.pid));
        let egress: Vec<i32> = egress.collect();
        let kfiles = runs().map(|it| it.limits.disk_kfiles).fold(run.limits.disk_kfiles, u32::max);
        let deed = Deed::Measure(u64::from(kfiles) * 1000 * FILES_TIMES_MAX);
        let (runs, placeholder) = (&mut self.runs, &mut run.placeholder);
        let folder = &tenant.folder;
        let sent = Errand::start(&self.plan, deed, folder, tenant.uid, || {
            Run::wipe_all(placeholder, runs);
            let device = fstat(folder)?.st_dev;
            let waits = errand::held(proc_fd, &egress, device).unwrap_or_default();
            Ok(errand::held(proc_fd, &tasks, device)?.and(waits))
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
            (Deed::Measure(_), Some(usage)) if run.phase == Phase::Running => self.measured(run, usage),
            (_, Some(_)) => {}
            // The next look tries again, but not for ever: an unmeasured run is an unbounded one.
            (_, None) => {
                event("errand_failed", &[("run", &run.id())]);
                if deed == Deed::Wipe || run.phase == Phase::Running {
                    run.disk.rests = Some(Instant::now() + LOOK);
                }
                run.disk.unanswered = run.disk.unanswered.saturating_add(1);
                if run.phase == Phase::Running && run.disk.unanswered >= UNANSWERED_MAX {
                    run.ends(Reason::Disk, 0, libc::SIGKILL as u8);
                    end(run);
                }
            }
        }
    }

    /// Tells each run of a tenant what was found.
    fn measured(&mut self, run: &mut Run, usage: Usage) {
        let Some(id) = run.tenant.clone() else { return };
        // What was there before this run is what was seen last, or all but what the disk has lost since: a first look at
        // it may come after its first flood.
        let lost = run.disk.begun.bytes.saturating_sub(self.free().0.bytes);
        let unseen = Usage { bytes: usage.bytes.saturating_sub(lost), ..usage };
        let before = self.measured.insert(id, usage).unwrap_or(unseen);
        self.grown += usage.bytes.cast_signed() - before.bytes.cast_signed();
        let seen = run.disk.seen;
        let rests = seen.map(|(at, _)| Instant::now() + at.elapsed() * (MEASURED_PART - 1));
        let others = self.runs.iter().filter(|it| it.tenant == run.tenant && it.phase == Phase::Running);
        let others: Vec<RunId> = others.map(Run::id).collect();
        (run.disk.seen, run.disk.rests) = (seen, rests);
        self.judge(run, usage, before);
        for id in others {
            self.with(id, |monitor, run| {
                (run.disk.seen, run.disk.rests) = (seen, rests);
                monitor.judge(run, usage, before);
            });
        }
    }

    /// Ends a run that takes more than it may.
    fn judge(&mut self, run: &mut Run, mut usage: Usage, before: Usage) {
        let Some(id) = &run.tenant else { return };
        let (free, reserve) = self.free();
        // What stays where nobody can look is taken for all that the disk has lost since this run began and that no tenant is
        // known to have taken.
        let named = usage;
        if usage.flying.min(std::mem::replace(&mut run.disk.flying, usage.flying)) > 0 {
            let then = run.disk.doubted.map_or(free, |(_, then)| then);
            let lost = run.disk.begun.bytes.cast_signed() - then.bytes.cast_signed();
            let hidden = u64::try_from(lost - (self.grown - run.disk.begun_grown)).unwrap_or(0);
            usage.bytes = usage.bytes.saturating_add(hidden);
        }
        run.disk.unanswered = 0;
        let limits = run.limits;
        let times = |n: u64| {
            Usage::of((u64::from(limits.disk_mib) << 20) * n, u64::from(limits.disk_kfiles) * 1000 * n)
        };
        let over = |usage: Usage, most: Usage| usage.bytes > most.bytes || usage.files > most.files;
        let (bound, most) = (times(1), times(OVER_MAX));
        let ended = self.far_over.get(id).copied().unwrap_or(0);
        let allowed = *run.disk.allowed.get_or_insert(
            match over(before, bound) && (!over(before, most) || ended < CHANCES) {
                true => Usage::of(
                    before.bytes.saturating_add(BYTES_NEW).max(bound.bytes),
                    before.files.saturating_add(FILES_NEW).max(bound.files),
                ),
                false => bound,
            },
        );
        let doubted = over(usage, allowed) && !over(named, allowed) && !free.within(reserve, 1);
        run.disk.doubted = doubted.then(|| run.disk.doubted.unwrap_or((Instant::now(), free)));
        let unmeasured =
            |it: &Run, since| it.errand.is_some() || it.disk.seen.is_none_or(|(at, _)| at <= since);
        let others = || self.runs.iter().filter(|it| it.tenant != run.tenant && it.phase == Phase::Running);
        if let Some((since, _)) = run.disk.doubted
            && since.elapsed() < DOUBT_LATEST
            && others().any(|it| unmeasured(it, since))
        {
            usage = named;
        }
        run.disk_peak = run.disk_peak.max(usage.bytes);
        // Where the disk is nearly full, it counts who has grown since it became so, and the one who has most goes first.
        let weight = |it: Usage| it.bytes.saturating_add(it.files.saturating_mul(FILE_BYTES));
        if !free.within(reserve, TIGHT) {
            run.disk.base = Some(weight(usage));
        }
        let grown = weight(usage).saturating_sub(*run.disk.base.get_or_insert(weight(before)));
        run.disk.calm = if weight(usage) > weight(before) { 0 } else { CALM_MAX.min(run.disk.calm + 1) };
        run.disk.grown = grown;
        let first = self.runs.iter().all(|it| it.phase != Phase::Running || it.disk.grown <= grown);
        let takes = free.within(reserve, 1) && grown > BYTES_LEFT && first;
        if over(usage, allowed) || takes {
            if over(usage, most) {
                self.far_over.insert(id.clone(), ended.saturating_add(1));
            }
            event(
                "disk_limit",
                &[("run", &run.id()), ("bytes", &usage.bytes), ("files", &usage.files), ("reserve", &takes)],
            );
            // It writes until it is dead. What is there then is what a run that cleans up begins with.
            self.measured.remove(id);
            run.ends(Reason::Disk, 0, libc::SIGKILL as u8);
            end(run);
        } else if !over(usage, most) {
            self.far_over.remove(id);
        }
    }
}
