//! The monitor: one thread, one poll loop, and the closed table of what may be asked in which stage.
//! It must never interpret a byte of the network, of a tenant or of the CLI, and never wait for a peer.

mod begin;
mod end;
mod hear;
mod locks;
mod peer;
mod sockets;
mod watchdog;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use gaoler_protocol::{LEASE_DONE, LEASE_IDLE, LEASE_OUTPUT, Layers, Limits, Message, Reason, RunId};
use gaoler_sys::channel;
use gaoler_sys::clone::Ended;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;

use crate::boot::{Host, Mode};
use crate::cage::Common;
use crate::cgroup::Cgroups;
use crate::errand::Usage;
use crate::exporter::Exporter;
use crate::family;
use crate::log::event;
use crate::plan::{Ids, Plan};
use crate::pool::{Pool, Source};
use crate::reload::Reload;
use crate::run::{Phase, Run};
use crate::spawn::Attended;
use crate::tenants::{TenantId, Tenants};
use crate::uids::Uids;

use end::{deadline, end};
pub use watchdog::Disk;

/// How long a teardown may take before the client is released and the uid quarantined.
const TEARDOWN: Duration = Duration::from_secs(2);
/// How long a cage may take from the fork to its gate. The slowest measured was 32 ms; an emulated CPU is a
/// hundred times slower.
const LAUNCH: Duration = Duration::from_secs(10);
/// How long the upstream may take to vouch for a credential: egress gives up before.
const VOUCH: Duration = Duration::from_secs(30);
/// How often a leaf that is not empty yet is looked at again.
const TICK: Duration = Duration::from_millis(2);
/// The same for a run in quarantine, which may stay there for as long as the kernel holds one of its processes.
const LATE_TICK: Duration = Duration::from_millis(100);
/// How long nothing must have happened before a set is made for the pool: longer than a program takes to load, so
/// that the two do not compete, and shorter than any deadline.
const QUIET_MS: u8 = 2;
/// Frames taken from one peer before the others get their turn.
const BURST: usize = 64;

/// What the peer may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The frontend has been started and has said nothing.
    Confining,
    /// The frontend tests the CLI's invocation.
    Proving,
    /// Tenants may come; or the command line's own runs.
    Serving,
    /// No new run; the rest has until then.
    Draining(Instant),
}

/// The supervisor, once it has entered its root.
pub struct Monitor {
    /// What was opened before.
    pub host: Host,
    /// How cages are made here.
    pub plan: Plan,
    /// What all cages of a level share, strictest first.
    pub commons: Vec<Common>,
    /// The host, as tried.
    pub layers: Layers,
    /// Groups, where runs have them.
    pub cgroups: Option<Cgroups>,
    /// Uids of runs.
    pub uids: Uids,
    /// Uids of egresses.
    pub egress_uids: Uids,
    /// Tenants.
    pub tenants: Tenants,
    /// The process that asks: the frontend, or the command line. `None` once it is lost.
    pub peer: Option<OwnedFd>,
    /// The frontend's process.
    pub frontend: Option<Attended>,
    /// The embedded upstream's process.
    pub upstream: Option<Attended>,
    /// The ledger's process.
    pub ledger: Option<Attended>,
    /// The exporter of traces, where there is one.
    pub exporter: Option<Exporter>,
    /// What starts a reload, where there is a frontend.
    pub reload: Option<Reload>,
    /// SIGTERM, SIGINT, SIGHUP and SIGCHLD.
    pub signals: SignalFd,
    /// What the peer may do now.
    pub stage: Stage,
    /// Sequence numbers of the peer's newest frame and of ours.
    pub heard: Option<u64>,
    pub said: u64,
    /// Sets ready for runs.
    pub pool: Pool,
    /// Who looks at locks.
    pub locks: Option<locks::Look>,
    /// Looks at them in turn that said nothing.
    pub locks_unseen: u8,
    /// When the watchdog looks again.
    pub next_look: Instant,
    /// How often a run of these tenants was ended far over its bound of the disk, since they were last seen below.
    pub far_over: BTreeMap<TenantId, u8>,
    /// What each tenant's folder took when it was measured last.
    pub measured: BTreeMap<TenantId, Usage>,
    /// Bytes by which all tenants' folders have grown, one measurement after the other.
    pub grown: i64,
    /// Nobody has come to us whom the end of a cage left without a parent.
    pub alone: bool,
    /// Every run that has not been forgotten.
    pub runs: Vec<Run>,
    /// The status to end with, once it is decided.
    pub status: Option<u8>,
}

/// What may become ready.
#[derive(Debug, Clone, Copy)]
enum Happening {
    Signals,
    Peer,
    Exporter,
    Line(RunId),
    Gate(RunId),
    Lease(RunId),
    Egress(RunId),
}

impl Monitor {
    /// Runs until there is nothing left to do; the status to exit with.
    pub fn watch(mut self) -> u8 {
        if self.host.mode == Mode::Exec {
            self.say(&Message::Layers(self.layers), &[]);
        }
        while self.status.is_none() || !self.runs.is_empty() {
            for happening in self.wait() {
                self.handle(happening);
            }
            self.look();
            self.deadlines();
            self.export();
            self.tear_down();
        }
        for leaf in self.pool.drain().into_iter().filter_map(|set| set.leaf) {
            let _ = self.cgroups.as_ref().map(|cgroups| cgroups.remove(&leaf));
        }
        for attended in [self.frontend.take(), self.upstream.take(), self.ledger.take()].into_iter().flatten()
        {
            attended.child.kill();
            let _ = attended.child.reap_blocking();
        }
        self.exporter.take().into_iter().for_each(Exporter::end);
        self.cgroups.take().into_iter().for_each(Cgroups::close);
        self.status.unwrap_or(1)
    }

    /// Everything that is waited for.
    fn watched(&self) -> Vec<(Happening, BorrowedFd<'_>)> {
        let mut all = vec![(Happening::Signals, self.signals.as_fd())];
        all.extend(self.peer.iter().map(|it| (Happening::Peer, it.as_fd())));
        let exporter = self.exporter.as_ref().and_then(Exporter::process);
        all.extend(exporter.map(|it| (Happening::Exporter, it.control.as_fd())));
        for run in &self.runs {
            let id = run.id();
            let parts = [
                (Happening::Line(id), run.line.as_ref()),
                (Happening::Gate(id), run.gate.as_ref()),
                (Happening::Lease(id), run.lease.as_ref()),
                (Happening::Egress(id), run.egress.as_ref().map(|egress| &egress.process.control)),
            ];
            all.extend(parts.into_iter().filter_map(|(happening, fd)| Some((happening, fd?.as_fd()))));
        }
        all
    }

    /// What is ready, after waiting for it no longer than the next deadline. Idle time fills the pool.
    fn wait(&mut self) -> Vec<Happening> {
        // Never beside a launch: both need the cgroups' lock, and the gate would wait for the one who holds it.
        let quiet = self.runs.iter().all(|run| run.phase == Phase::Running);
        let refill = self.status.is_none() && self.stage == Stage::Serving && quiet && self.pool.wants_more();
        let timeout = if refill { PollTimeout::from(QUIET_MS) } else { self.timeout() };
        let watched = self.watched();
        let mut fds: Vec<PollFd<'_>> =
            watched.iter().map(|(_, fd)| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        let quiet = poll(&mut fds, timeout) == Ok(0);
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let found =
            watched.iter().zip(&fds).filter(|(_, fd)| ready(fd)).map(|((what, _), _)| *what).collect();
        if quiet && refill {
            let limits = self.host.levels.get(self.host.levels.default).limits;
            let (pool, source) = self.source(limits);
            if let Err(fault) = pool.refill(source) {
                event("pool_refill_failed", &[("fault", &fault)]);
            }
        }
        found
    }

    fn source(&mut self, limits: Limits) -> (&mut Pool, Source<'_>) {
        let source = Source {
            proc_fd: self.host.proc_fd.as_fd(),
            network: self.host.network.as_ref().map(AsFd::as_fd),
            uids: &mut self.uids,
            cgroups: self.cgroups.as_mut(),
            same: self.plan.ids == Ids::Same,
            inside: self.plan.inside,
            limits,
        };
        (&mut self.pool, source)
    }

    /// Until the next deadline; a tick while a teardown is under way.
    fn timeout(&self) -> PollTimeout {
        let now = Instant::now();
        let ending =
            |run: &Run| matches!(run.phase, Phase::Ending(_)) && run.init.is_none() && !run.quarantined;
        if self.runs.iter().any(ending) {
            return PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO);
        }
        let draining = match self.stage {
            Stage::Draining(until) => Some(until),
            _ => None,
        };
        let late = self.runs.iter().any(|run| run.quarantined).then(|| now + LATE_TICK);
        let on_time = self.runs.iter().filter(|run| !run.quarantined);
        let look = self.watches().then_some(self.next_look);
        let export = self.exporter.as_ref().filter(|_| self.status.is_none()).and_then(Exporter::due);
        let next = on_time.map(deadline).chain(draining).chain(late).chain(look).chain(export).min();
        match next {
            None => PollTimeout::NONE,
            // Rounded up, so that it is past when we wake.
            Some(at) => {
                let left = at.saturating_duration_since(now) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        }
    }

    fn handle(&mut self, happening: Happening) {
        match happening {
            Happening::Signals => self.on_signal(),
            Happening::Peer => self.on_peer(),
            Happening::Exporter => {
                if let Some(exporter) = &mut self.exporter {
                    exporter.hear(&self.host, &self.plan);
                }
            }
            Happening::Line(id) => self.with(id, Monitor::on_line),
            Happening::Gate(id) => self.with(id, Monitor::on_gate),
            Happening::Lease(id) => self.with(id, |_, run| {
                let word =
                    run.lease.as_ref().map(|lease| channel::receive::<{ LEASE_DONE.len() }>(lease.as_fd()));
                let word = word.and_then(Result::ok).map(|received| received.bytes).unwrap_or_default();
                let reason = match &word[..] {
                    LEASE_DONE => Reason::Finished,
                    LEASE_OUTPUT => Reason::Output,
                    LEASE_IDLE => Reason::Idle,
                    _ => Reason::Cancelled,
                };
                run.ends(reason, 0, 0);
                end(run);
            }),
            Happening::Egress(id) => self.with(id, Monitor::on_egress),
        }
    }

    /// Starts the exporter where it is gone and its time has come.
    fn export(&mut self) {
        if self.status.is_none()
            && let Some(exporter) = &mut self.exporter
            && exporter.due().is_some_and(|at| at <= Instant::now())
        {
            exporter.start(&self.host, &self.plan, || self.runs.iter_mut().for_each(Run::wipe));
        }
    }

    /// Whose end it was: each child is reaped here and nowhere else while the loop runs.
    fn on_ended(&mut self, pid: i32, ended: Ended) {
        let is = |attended: &Option<Attended>| attended.as_ref().is_some_and(|it| it.child.pid == pid);
        if is(&self.frontend) {
            self.frontend = None;
            return self.stop(1, "frontend_ended");
        }
        if is(&self.upstream) {
            self.upstream = None;
            return self.stop(1, "upstream_ended");
        }
        if is(&self.ledger) {
            self.ledger = None;
            return self.stop(1, "ledger_ended");
        }
        if let Some(exporter) = &mut self.exporter
            && exporter.process().is_some_and(|it| it.child.pid == pid)
        {
            event("exporter_ended", &[("signal", &ended.signal.unwrap_or_default())]);
            return exporter.gone();
        }
        if let Some(reload) = &mut self.reload
            && reload.child.as_ref().is_some_and(|child| child.pid == pid)
        {
            reload.child = None;
            if reload.again {
                self.reload(None);
            }
            return;
        }
        if self.locks.as_ref().is_some_and(|look| look.child.pid == pid) {
            return self.on_locks(ended.code == Some(0));
        }
        let Some(run) = self.runs.iter().find(|run| run.children().contains(&Some(pid))) else {
            // Somebody whom the end of a cage has left to us.
            return;
        };
        let (id, [init, egress, _]) = (run.id(), run.children());
        if init == Some(pid) {
            self.with(id, |monitor, run| monitor.on_init(run, ended));
        } else if egress == Some(pid) {
            self.with(id, |monitor, run| monitor.without_egress(run));
        } else {
            self.with(id, |monitor, run| monitor.on_errand(run, ended.code == Some(0)));
        }
    }

    /// Ends whoever came to us without a parent and is none of ours; whether there was nobody.
    pub(super) fn end_strays(&self) -> bool {
        let own = std::process::id().cast_signed();
        let attended =
            [&self.frontend, &self.upstream, &self.ledger].map(|it| it.as_ref().map(|it| it.child.pid));
        let exporter = self.exporter.as_ref().and_then(Exporter::process).map(|it| it.child.pid);
        let reload = self.reload.as_ref().and_then(|it| Some(it.child.as_ref()?.pid));
        let locks = self.locks.as_ref().map(|look| look.child.pid);
        let runs = self.runs.iter().flat_map(Run::children);
        let known: Vec<i32> =
            attended.into_iter().chain([exporter, reload, locks]).chain(runs).flatten().collect();
        let mut nobody = true;
        for member in family::everybody(self.host.proc_fd.as_fd()) {
            if member.parent == own && !known.contains(&member.pid) {
                let _ = kill(Pid::from_raw(member.pid), Signal::SIGKILL);
                nobody = false;
            }
        }
        nobody
    }

    /// Acts on one run while it is out of the table, so that the rest can be wiped in a fork.
    fn with(&mut self, id: RunId, act: impl FnOnce(&mut Monitor, &mut Run)) {
        let Some(index) = self.runs.iter().position(|run| run.id() == id) else { return };
        let mut run = self.runs.swap_remove(index);
        act(self, &mut run);
        self.runs.push(run);
    }
}
