//! The monitor: one thread, one poll loop, and the closed table of what may be asked in which stage.
//! It must never interpret a byte of the network, of a tenant or of the CLI, and never wait for a peer.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use gaoler_protocol::{
    CREDENTIAL_BYTES_MAX, Empty, FRAME_BYTES, Kind, Layers, Level, Limits, Listen, Message,
    OPTIONS_BYTES_MAX, Placeholder, Reason, Refusal, RunId, Spawn, Spawned, TenantKey, Tier,
};
use gaoler_sys::{channel, memfd, mount, process};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use crate::admit::{self, Situation, Verdict};
use crate::boot::{Host, Mode};
use crate::cage::attest::{Posture, attest};
use crate::cage::word::{Heard, Step, Word, hear};
use crate::cage::{self, Blueprint, Command, Common};
use crate::cgroup::Cgroups;
use crate::fault::{Doing, Fault};
use crate::invocation;
use crate::log::event;
use crate::namespaces;
use crate::pool::{Pool, Source};
use crate::run::{Broker, Phase, Run, violation};
use crate::spawn::{self, Attended, Network};
use crate::tenants::{Closed, Tenant, TenantId, Tenants};
use crate::uids::Uids;

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
/// Frames taken from one peer before the others get their turn.
const BURST: usize = 64;

/// What the peer may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
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
    /// What all cages share.
    pub common: Common,
    /// The host, as tried.
    pub layers: Layers,
    /// Groups.
    pub cgroups: Cgroups,
    /// Uids of runs.
    pub uids: Uids,
    /// Uids of egresses.
    pub egress_uids: Uids,
    /// Tenants.
    pub tenants: Tenants,
    /// The process that asks: the frontend, or the command line.
    pub peer: OwnedFd,
    /// The frontend's process.
    pub frontend: Option<Attended>,
    /// The embedded upstream's process.
    pub upstream: Option<Attended>,
    /// SIGTERM and SIGINT.
    pub signals: SignalFd,
    stage: Stage,
    heard: Option<u64>,
    said: u64,
    pool: Pool,
    runs: Vec<Run>,
    /// The status to end with, once it is decided.
    status: Option<u8>,
}

/// Parts that boot has made.
pub struct Parts {
    pub host: Host,
    pub common: Common,
    pub layers: Layers,
    pub cgroups: Cgroups,
    pub uids: Uids,
    pub egress_uids: Uids,
    pub tenants: Tenants,
    pub peer: OwnedFd,
    pub frontend: Option<Attended>,
    pub upstream: Option<Attended>,
    pub signals: SignalFd,
}

/// What may become ready.
#[derive(Debug, Clone, Copy)]
enum Happening {
    Signals,
    Peer,
    Frontend,
    Upstream,
    Line(RunId),
    Gate(RunId),
    Lease(RunId),
    Init(RunId),
    Egress(RunId),
    EgressEnd(RunId),
}

impl Monitor {
    /// A monitor over these parts.
    pub fn new(parts: Parts) -> Monitor {
        let Parts {
            host,
            common,
            layers,
            cgroups,
            uids,
            egress_uids,
            tenants,
            peer,
            frontend,
            upstream,
            signals,
        } = parts;
        let stage = if host.mode == Mode::Serve { Stage::Confining } else { Stage::Serving };
        Monitor {
            host,
            common,
            layers,
            cgroups,
            uids,
            egress_uids,
            tenants,
            peer,
            frontend,
            upstream,
            signals,
            stage,
            heard: None,
            said: 0,
            pool: Pool::default(),
            runs: Vec::new(),
            status: None,
        }
    }

    /// Runs until there is nothing left to do; the status to exit with.
    pub fn watch(mut self) -> u8 {
        if self.host.mode == Mode::Exec {
            self.say(&Message::Layers(self.layers), &[]);
        }
        while self.status.is_none() || !self.runs.is_empty() {
            for happening in self.wait() {
                self.handle(happening);
            }
            self.deadlines();
            self.tear_down();
            self.settle();
        }
        for set in self.pool.drain() {
            self.cgroups.remove(&set.leaf);
        }
        for attended in [self.frontend.take(), self.upstream.take()].into_iter().flatten() {
            attended.child.kill();
            let _ = attended.child.reap_blocking();
        }
        self.cgroups.close();
        self.status.unwrap_or(1)
    }

    /// Everything that is waited for.
    fn watched(&self) -> Vec<(Happening, BorrowedFd<'_>)> {
        let mut all = vec![(Happening::Signals, self.signals.as_fd()), (Happening::Peer, self.peer.as_fd())];
        all.extend(self.frontend.iter().map(|it| (Happening::Frontend, it.child.pidfd.as_fd())));
        all.extend(self.upstream.iter().map(|it| (Happening::Upstream, it.child.pidfd.as_fd())));
        for run in &self.runs {
            let id = run.id();
            let parts = [
                (Happening::Line(id), run.line.as_ref()),
                (Happening::Gate(id), run.gate.as_ref()),
                (Happening::Lease(id), run.lease.as_ref()),
                (Happening::Init(id), run.init.as_ref().map(|child| &child.pidfd)),
                (Happening::Egress(id), run.egress.as_ref().map(|egress| &egress.process.control)),
                (Happening::EgressEnd(id), run.egress.as_ref().map(|egress| &egress.process.child.pidfd)),
            ];
            all.extend(parts.into_iter().filter_map(|(happening, fd)| Some((happening, fd?.as_fd()))));
        }
        all
    }

    /// What is ready, after waiting for it no longer than the next deadline. Idle time fills the pool.
    fn wait(&mut self) -> Vec<Happening> {
        let refill = self.status.is_none() && self.stage == Stage::Serving && self.pool.wants_more();
        let timeout = if refill { PollTimeout::ZERO } else { self.timeout() };
        let watched = self.watched();
        let mut fds: Vec<PollFd<'_>> =
            watched.iter().map(|(_, fd)| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        let quiet = poll(&mut fds, timeout) == Ok(0);
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let found =
            watched.iter().zip(&fds).filter(|(_, fd)| ready(fd)).map(|((what, _), _)| *what).collect();
        if quiet && refill {
            let limits = self.host.level.limits;
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
            uids: &mut self.uids,
            cgroups: &mut self.cgroups,
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
        let next = on_time.map(deadline).chain(draining).chain(late).min();
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
            Happening::Frontend => self.stop(1, "frontend_ended"),
            Happening::Upstream => {
                // The self-test's model ends when it is not the upstream of tenants; see `on_proven`.
                self.stop(1, "upstream_ended");
            }
            Happening::Line(id) => self.with(id, Monitor::on_line),
            Happening::Gate(id) => self.with(id, Monitor::on_gate),
            Happening::Lease(id) => self.with(id, |_, run| {
                run.lease = None;
                run.ends(Reason::Cancelled, 0, 0);
                end(run);
            }),
            Happening::Init(id) => self.with(id, Monitor::on_init),
            Happening::Egress(id) => self.with(id, Monitor::on_egress),
            Happening::EgressEnd(id) => self.with(id, |monitor, run| {
                let Some(egress) = &run.egress else { return };
                if let Ok(Some(_)) = egress.process.child.reap() {
                    monitor.without_egress(run);
                }
            }),
        }
    }

    /// Acts on one run while it is out of the table, so that the rest can be wiped in a fork.
    fn with(&mut self, id: RunId, act: impl FnOnce(&mut Monitor, &mut Run)) {
        let Some(index) = self.runs.iter().position(|run| run.id() == id) else { return };
        let mut run = self.runs.swap_remove(index);
        act(self, &mut run);
        self.runs.push(run);
    }

    // ---- the peer -------------------------------------------------------------------------------------

    fn on_peer(&mut self) {
        for _ in 0..BURST {
            let received = match channel::receive::<{ FRAME_BYTES + 1 }>(self.peer.as_fd()) {
                Ok(received) => received,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return self.lose_peer("the control socket broke"),
            };
            if received.bytes.is_empty() && received.fds.is_empty() {
                return self.lose_peer("the control socket closed");
            }
            if received.truncated {
                return self.hostile("a frame that was cut");
            }
            let (sequence, message) = match Message::decode(&received.bytes) {
                Ok(decoded) => decoded,
                Err(why) => return self.hostile(&why.to_string()),
            };
            if self.heard.is_some_and(|before| sequence <= before) {
                return self.hostile("a frame out of sequence");
            }
            self.heard = Some(sequence);
            if !message.fds().contains(&received.fds.len()) {
                return self.hostile("a frame with the wrong number of descriptors");
            }
            match (self.stage, message) {
                (Stage::Confining, Message::Ready(ready)) => self.on_ready(ready.threads),
                (Stage::Proving, Message::Proven(proven)) => self.on_proven(proven.failed, proven.version),
                (Stage::Proving | Stage::Serving | Stage::Draining(_), Message::Spawn(spawn)) => {
                    self.on_spawn(spawn, received.fds);
                }
                (Stage::Draining(_), Message::Drained(Empty {})) => {
                    self.stage = Stage::Draining(Instant::now())
                }
                (_, other) => return self.hostile(&format!("{} out of turn", other.name())),
            }
            if self.status.is_some() {
                return;
            }
        }
    }

    fn hostile(&mut self, why: &str) {
        event("peer_hostile", &[("why", &why)]);
        self.stop(1, "peer_ended");
    }

    fn lose_peer(&mut self, why: &str) {
        // The command line's own supervisor simply ends with it.
        let status = u8::from(self.host.mode == Mode::Serve);
        if status != 0 {
            event("peer_lost", &[("why", &why)]);
        }
        self.stop(status, "peer_ended");
    }

    /// Ends everything. Every run's cage is killed; the loop goes on until all are gone.
    fn stop(&mut self, status: u8, why: &str) {
        if self.status.is_none() {
            self.status = Some(status);
            if status != 0 {
                event("stopping", &[("why", &why)]);
            }
        }
        if let Some(frontend) = &self.frontend {
            frontend.child.kill();
        }
        for run in &mut self.runs {
            run.ends(Reason::Drained, 0, 0);
            run.refuse(Refusal::Draining, 0, 0);
            end(run);
        }
        // Nothing is to be heard from a dead peer: an inert descriptor takes its place in the poll.
        if let Ok((quiet, other)) = channel::pair() {
            self.peer = quiet;
            std::mem::forget(other);
        }
    }

    fn say(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) {
        self.said += 1;
        let frame = message.encode(self.said);
        if let Err(error) = channel::send(self.peer.as_fd(), &frame, fds)
            && self.status.is_none()
        {
            // A peer that does not read is ended: to wait for it would stall every tenant.
            event("peer_unread", &[("message", &message.name()), ("error", &error)]);
            self.stop(1, "peer_ended");
        }
    }

    fn on_ready(&mut self, threads: u32) {
        let Some(frontend) = &self.frontend else { return self.hostile("Ready without a frontend") };
        let posture = Posture {
            uid: self.host.settings.uids.frontend,
            namespaces: &[],
            apart: &["net", "mnt", "pid", "ipc", "uts"],
            descriptors: 0,
            filters: 1,
            mounts: &[],
            threads,
        };
        if let Err(fault) = attest(self.host.proc_fd.as_fd(), frontend.child.pid, &posture) {
            event("frontend_not_confined", &[("fault", &fault)]);
            return self.stop(1, "frontend_not_confined");
        }
        self.stage = Stage::Proving;
        self.say(&Message::Layers(self.layers), &[]);
        self.say(&Message::Prove(Empty {}), &[]);
    }

    fn on_proven(&mut self, failed: u32, version: [u16; 3]) {
        if failed != 0 {
            event("self_test_failed", &[("check", &failed)]);
            return self.stop(1, "self_test_failed");
        }
        let [major, minor, patch] = version;
        let embedded = self.host.embedded;
        if !embedded && let Some(upstream) = self.upstream.take() {
            upstream.child.kill();
            let _ = upstream.child.reap_blocking();
        }
        self.stage = Stage::Serving;
        let Some(listener) = self.host.listener.take() else { return self.stop(1, "no_listener") };
        let listen = Listen {
            tier: self.layers.tier,
            level: Level::Balanced,
            runs_max: self.host.settings.runs.max,
            embedded,
        };
        self.say(&Message::Listen(listen), &[listener.as_fd()]);
        event("serving", &[("tier", &self.layers.tier), ("cli", &format!("{major}.{minor}.{patch}"))]);
        println!("ready tier={} level={} address={}", self.layers.tier, Level::Balanced, self.host.address);
    }

    fn on_signal(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {
            match self.stage {
                Stage::Serving if self.host.mode == Mode::Serve => {
                    let grace = Duration::from_secs(self.host.settings.runs.drain_seconds.into());
                    self.stage = Stage::Draining(Instant::now() + grace);
                    event("draining", &[("runs", &self.runs.len())]);
                    self.say(&Message::Drain(Empty {}), &[]);
                }
                // A second signal, or one before anybody was served, waits for nothing.
                _ => self.stop(0, "signal"),
            }
        }
    }

    // ---- a run's beginning ----------------------------------------------------------------------------

    fn on_spawn(&mut self, mut spawn: Spawn, mut fds: Vec<OwnedFd>) {
        let permitted = if self.host.mode == Mode::Exec { Kind::Exec } else { Kind::Cli };
        let wanted = if spawn.kind == Kind::Cli { 2 } else { 1 };
        let sealed = |fd: &OwnedFd, max| memfd::is_sealed(fd, max);
        let now = Situation {
            permitted,
            level_maximum: Level::Balanced,
            runs: self.runs.iter().filter(|run| !run.quarantined).count(),
            runs_max: self.host.settings.runs.max as usize,
            draining: matches!(self.stage, Stage::Draining(_)),
            proving: self.stage == Stage::Proving,
            known: self.runs.iter().any(|run| run.id() == spawn.run),
            sealed: fds.len() == wanted
                && fds.first().is_some_and(|fd| sealed(fd, OPTIONS_BYTES_MAX))
                && fds.get(1).is_none_or(|fd| sealed(fd, CREDENTIAL_BYTES_MAX)),
        };
        let limits = match admit::admit(&spawn, now, |wish| self.host.level.clamp(wish)) {
            Verdict::Admit(limits) => limits,
            Verdict::Refuse(reason) => {
                let refused = gaoler_protocol::Refused { run: spawn.run, reason, step: 0, errno: 0 };
                return self.say(&Message::Refused(refused), &[]);
            }
            Verdict::Hostile(why) => return self.hostile(why),
        };
        let tenant = (!spawn.ephemeral).then(|| TenantId::of(&spawn.tenant));
        spawn.tenant = TenantKey([0; 32]);
        let Ok(secret) = process::random() else { return self.stop(1, "no_random_bytes") };
        let mut run = Run::new(spawn, tenant, limits, Placeholder(secret));
        run.credential = (wanted == 2).then(|| fds.pop()).flatten();
        run.options = fds.pop();
        self.begin(&mut run);
        self.runs.push(run);
    }

    /// Starts egress where the run has one, and the cage unless the tenant is new.
    fn begin(&mut self, run: &mut Run) {
        let known = match &run.tenant {
            None => Ok(true),
            Some(id) => self.tenants.find(id).map(|found| found.is_some()),
        };
        let known = match known {
            Ok(known) => known,
            Err(fault) => return fail(run, Refusal::CageFailed, &fault),
        };
        if run.credential.is_some()
            && let Err(fault) = self.start_egress(run)
        {
            return fail(run, Refusal::EgressFailed, &fault);
        }
        if known || run.egress.is_none() {
            return self.launch(run);
        }
        run.phase = Phase::Vouching;
        if let Err(fault) = self.serve(run, true, None) {
            fail(run, Refusal::EgressFailed, &fault);
        }
    }

    fn start_egress(&mut self, run: &mut Run) -> Result<(), Fault> {
        let slot = self
            .egress_uids
            .take()
            .ok_or_else(|| Fault::new("take an egress uid", "the range is used up"))?;
        let uid = self.egress_uids.uid(&slot);
        let url = if run.spawn.proof { &self.host.proving_url } else { &self.host.upstream_url };
        let silence = self.host.settings.runs.silence_seconds.to_string();
        let argv = ["gaoler-egress", "--upstream", url.as_str(), "--silence-seconds", silence.as_str()];
        let program =
            self.host.egress.as_ref().ok_or_else(|| Fault::new("start egress", "its program is missing"))?;
        let runs = &mut self.runs;
        let wipe = || {
            run.placeholder = Placeholder([0; 32]);
            runs.iter_mut().for_each(Run::wipe);
        };
        let process = spawn::start(program.as_fd(), &argv, uid, Network::Host, &[], wipe);
        match process {
            Ok(process) => {
                run.egress = Some(Broker {
                    process,
                    slot,
                    uid,
                    ready: false,
                    waiting: Vec::new(),
                    revoked: false,
                    heard: None,
                    said: 0,
                });
                Ok(())
            }
            Err(fault) => {
                self.egress_uids.release(slot);
                Err(fault)
            }
        }
    }

    /// Hands egress the credential, and the listener where the cage has made it.
    fn serve(&self, run: &mut Run, vouch: bool, listener: Option<OwnedFd>) -> Result<(), Fault> {
        let message = run.serve(vouch);
        let credential =
            run.credential.as_ref().ok_or_else(|| Fault::new("serve", "the credential is gone"))?;
        let mut fds = vec![
            credential.try_clone().doing("copy a credential's descriptor")?,
            self.host.resolver().doing("open resolv.conf")?,
        ];
        fds.extend(listener);
        if !vouch {
            run.credential = None;
        }
        let egress = run.egress.as_mut().ok_or_else(|| Fault::new("serve", "egress is gone"))?;
        match egress.tell(message, fds) {
            true => Ok(()),
            false => Err(Fault::new("serve", "egress does not listen")),
        }
    }

    fn launch(&mut self, run: &mut Run) {
        run.phase = Phase::Launching;
        match self.make_cage(run) {
            Ok(()) => {}
            Err(Closed::Full) => {
                run.refuse(Refusal::TenantsFull, 0, 0);
                end(run);
            }
            Err(Closed::Fault(fault)) if fault.errno() == libc::EWOULDBLOCK as u16 => {
                run.refuse(Refusal::SessionBusy, 0, 0);
                end(run);
            }
            Err(Closed::Fault(fault)) => fail(run, Refusal::CageFailed, &fault),
        }
    }

    fn make_cage(&mut self, run: &mut Run) -> Result<(), Closed> {
        let limits = run.limits;
        let level = self.host.level.limits;
        let (pool, source) = self.source(level);
        let set = pool.take(source, limits)?;
        let uid = set.uid;
        let user_namespace = set.user_namespace.try_clone().doing("copy a namespace's descriptor");
        let network_namespace = set.network_namespace.try_clone().doing("copy a namespace's descriptor");
        run.set = Some(set);
        let (mut workspace, mut session) = (None, None);
        if let Some(id) = &run.tenant {
            let tenant: Tenant = self.tenants.admit(id)?;
            let map = namespaces::user(self.host.proc_fd.as_fd(), tenant.uid, uid)?;
            workspace = Some(mapped(&tenant.workspace()?, map.as_fd())?);
            if run.spawn.kind == Kind::Cli && run.spawn.conversation == gaoler_protocol::Conversation::Session
            {
                let folder = tenant.session(&invocation::uuid(&run.spawn.session))?;
                session =
                    Some(mapped(&OwnedFd::from(folder.try_clone().doing("copy a session")?), map.as_fd())?);
                run.session = Some(folder);
            }
        }
        let command = match run.spawn.kind {
            Kind::Cli => Command::Cli(invocation::of(&run.spawn, &run.placeholder, &self.host.level.policy)),
            Kind::Exec => Command::Exec,
        };
        let blueprint = Blueprint {
            uid,
            user_namespace: user_namespace?,
            network_namespace: network_namespace?,
            workspace,
            session,
            options: run.options.take().ok_or_else(|| Fault::new("make a cage", "the options are gone"))?,
            command,
            limits,
        };
        let runs = &mut self.runs;
        let placeholder = &mut run.placeholder;
        let leaf = &run.set.as_ref().ok_or_else(|| Fault::new("make a cage", "its set is gone"))?.leaf;
        let begun = cage::begin(&self.common, &blueprint, leaf, || {
            *placeholder = Placeholder([0; 32]);
            runs.iter_mut().for_each(Run::wipe);
        })?;
        let cage::Begun { init, line, gate, stdin, stdout, stderr } = begun;
        run.init = Some(init);
        run.line = Some(line);
        run.gate = Some(gate);
        run.stdio = Some([stdin, stdout, stderr]);
        Ok(())
    }

    // ---- a run's words --------------------------------------------------------------------------------

    fn on_line(&mut self, run: &mut Run) {
        let Some(line) = &run.line else { return };
        match hear(line) {
            Heard::Nothing => {}
            Heard::Word(Word::Listener, mut fds, _) if fds.len() == 1 && run.egress.is_some() => {
                if let Err(fault) = self.serve(run, false, fds.pop()) {
                    fail(run, Refusal::EgressFailed, &fault);
                }
            }
            Heard::Word(Word::Failed(step, errno), ..) => {
                event("cage_failed", &[("run", &run.id()), ("step", &step), ("errno", &errno)]);
                run.refuse(Refusal::CageFailed, step, errno);
                run.ends(Reason::InitDied, 0, 0);
                end(run);
            }
            Heard::Word(Word::Exited(code), ..) => {
                run.ends(Reason::Exited, code, 0);
                run.line = None;
            }
            Heard::Word(Word::Signaled(signal), ..) => {
                run.ends(Reason::Signaled, 0, signal);
                run.line = None;
            }
            Heard::Word(..) | Heard::Nonsense => {
                event("line_nonsense", &[("run", &run.id())]);
                run.ends(Reason::InitDied, 0, 0);
                run.refuse(Refusal::CageFailed, 0, 0);
                end(run);
            }
            // pid 1's end itself is seen on its pidfd.
            Heard::Closed => run.line = None,
        }
    }

    fn on_gate(&mut self, run: &mut Run) {
        let Some(gate) = &run.gate else { return };
        match (hear(gate), run.opened) {
            (Heard::Nothing, _) => {}
            (Heard::Word(Word::Ready, _, Some(pid)), None) => match self.look(run, pid) {
                Ok(()) => {
                    run.opened = Some(Instant::now());
                    if channel::send(gate.as_fd(), b"G", &[]).is_err() {
                        run.refuse(Refusal::CageFailed, Step::Attest as u8, 0);
                        end(run);
                    }
                }
                Err(fault) => {
                    event("attest_failed", &[("run", &run.id()), ("fault", &fault)]);
                    run.refuse(Refusal::CageFailed, Step::Attest as u8, fault.errno());
                    end(run);
                }
            },
            (Heard::Word(Word::Failed(step, errno), ..), None) => {
                event("cage_failed", &[("run", &run.id()), ("step", &step), ("errno", &errno)]);
                run.refuse(Refusal::CageFailed, step, errno);
                end(run);
            }
            (Heard::Word(Word::ExecFailed(errno), ..), _) => {
                run.refuse(Refusal::ExecFailed, 0, errno);
                end(run);
            }
            // Closed by execve: behind the gate is the command.
            (Heard::Closed, Some(_)) => self.passed(run),
            _ => {
                run.refuse(Refusal::CageFailed, Step::Attest as u8, 0);
                end(run);
            }
        }
    }

    /// The look from outside, before the gate.
    fn look(&self, run: &Run, pid: i32) -> Result<(), Fault> {
        let set = run.set.as_ref().ok_or_else(|| Fault::new("attest", "the set is gone"))?;
        let posture = Posture {
            uid: set.uid,
            namespaces: &set.identities,
            apart: &["mnt", "pid", "ipc", "uts", "cgroup"],
            descriptors: 4,
            filters: 1,
            mounts: &MOUNTS,
            threads: 1,
        };
        let groups = attest(self.host.proc_fd.as_fd(), pid, &posture)?;
        match set.leaf.holds(&groups, &self.cgroups) {
            true => Ok(()),
            false => Err(Fault::new("attest cgroup", "the process is not in its leaf")),
        }
    }

    fn passed(&mut self, run: &mut Run) {
        run.gate = None;
        let pairs = channel::pair().and_then(|lease| Ok((lease, channel::pair()?)));
        let (Ok(((lease, their_lease), (report, their_report))), Some(stdio)) = (pairs, run.stdio.take())
        else {
            run.refuse(Refusal::CageFailed, Step::Attest as u8, 0);
            return end(run);
        };
        run.phase = Phase::Running;
        run.lease = Some(lease);
        run.report = Some(report);
        let spawned = Spawned {
            run: run.id(),
            limits: run.limits,
            launch_us: run.arrived.elapsed().as_micros() as u64,
            tier: Tier::Kernel,
        };
        let [stdin, stdout, stderr] = &stdio;
        let fds = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd(), their_lease.as_fd(), their_report.as_fd()];
        self.say(&Message::Spawned(spawned), &fds);
        event("spawned", &[("run", &run.id()), ("kind", &run.spawn.kind), ("launch_us", &spawned.launch_us)]);
    }

    fn on_init(&mut self, run: &mut Run) {
        // pid 1's last word may still lie in its line.
        while run.line.is_some() {
            let before = run.outcome.is_some();
            self.on_line(run);
            if run.outcome.is_some() == before {
                break;
            }
        }
        if run.gate.is_some() {
            self.on_gate(run);
        }
        let Some(init) = &run.init else { return };
        if let Ok(Some(ended)) = init.reap() {
            run.used = ended;
            run.init = None;
            run.line = None;
            run.gate = None;
            run.wall_us = run.opened.map_or(0, |at| at.elapsed().as_micros() as u64);
            if run.phase != Phase::Running {
                run.refuse(Refusal::CageFailed, 0, 0);
            }
            run.ends(Reason::InitDied, 0, ended.signal.unwrap_or_default());
            end(run);
        }
    }

    fn on_egress(&mut self, run: &mut Run) {
        let id = run.id();
        for _ in 0..BURST {
            let Some(egress) = &mut run.egress else { return };
            let received = match channel::receive::<{ FRAME_BYTES + 1 }>(egress.process.control.as_fd()) {
                Ok(received) => received,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return egress.process.child.kill(),
            };
            if received.bytes.is_empty() && received.fds.is_empty() {
                return egress.process.child.kill();
            }
            let decoded = Message::decode(&received.bytes);
            let fresh = |sequence: u64| egress.heard.is_none_or(|before| sequence > before);
            let message = match decoded {
                Ok((sequence, message))
                    if !received.truncated && received.fds.is_empty() && fresh(sequence) =>
                {
                    egress.heard = Some(sequence);
                    message
                }
                _ => {
                    event("egress_hostile", &[("run", &id)]);
                    return egress.process.child.kill();
                }
            };
            self.on_egress_message(run, message);
        }
    }

    fn on_egress_message(&mut self, run: &mut Run, message: Message) {
        let id = run.id();
        let Some(egress) = &mut run.egress else { return };
        match message {
            Message::Ready(ready) if !egress.ready => {
                let posture = Posture {
                    uid: egress.uid,
                    namespaces: &[],
                    apart: &["mnt", "pid", "ipc", "uts"],
                    descriptors: 0,
                    filters: 1,
                    mounts: &[],
                    threads: ready.threads,
                };
                let confined = attest(self.host.proc_fd.as_fd(), egress.process.child.pid, &posture);
                if let Err(fault) = confined {
                    event("egress_not_confined", &[("run", &id), ("fault", &fault)]);
                    egress.process.child.kill();
                } else if !egress.flush() {
                    egress.process.child.kill();
                }
            }
            Message::Vouched(vouched) if vouched.run == id && run.phase == Phase::Vouching => {
                match (vouched.accepted, vouched.status) {
                    (true, _) => self.launch(run),
                    (false, 401 | 403) => {
                        run.refuse(Refusal::CredentialRefused, 0, vouched.status);
                        end(run);
                    }
                    (false, status) => {
                        run.refuse(Refusal::UpstreamUnavailable, 0, status);
                        end(run);
                    }
                }
            }
            Message::Counted(totals) if totals.run == id => {
                run.totals = totals;
                if !run.tell(&Message::Progress(totals)) {
                    run.ends(Reason::Cancelled, 0, 0);
                    end(run);
                }
            }
            Message::Denied(denied) if denied.run == id => {
                run.totals.denials = run.totals.denials.saturating_add(1);
                let count = run.totals.denials;
                event("denied", &[("run", &id), ("what", &denied.what)]);
                if !run.tell(&violation(id, denied.what, count)) {
                    run.ends(Reason::Cancelled, 0, 0);
                    end(run);
                }
            }
            Message::Revoked(totals) if totals.run == id && egress.revoked => run.totals = totals,
            other => {
                event("egress_hostile", &[("run", &id), ("message", &other.name())]);
                egress.process.child.kill();
            }
        }
    }

    /// Egress has been reaped: its run ends with it, unless it was told to go.
    fn without_egress(&mut self, run: &mut Run) {
        let Some(egress) = run.egress.take() else { return };
        self.egress_uids.release(egress.slot);
        if !egress.revoked {
            event("egress_died", &[("run", &run.id())]);
            run.refuse(Refusal::EgressFailed, 0, 0);
            run.ends(Reason::EgressDied, 0, 0);
            end(run);
        }
    }

    // ---- a run's end ----------------------------------------------------------------------------------

    fn deadlines(&mut self) {
        let now = Instant::now();
        for run in &mut self.runs {
            if now < deadline(run) {
                continue;
            }
            match run.phase {
                Phase::Vouching => {
                    run.refuse(Refusal::UpstreamUnavailable, 0, 0);
                    end(run);
                }
                Phase::Launching => {
                    run.refuse(Refusal::CageFailed, Step::Attest as u8, libc::ETIMEDOUT as u16);
                    end(run);
                }
                Phase::Running => {
                    run.ends(Reason::Wall, 0, 0);
                    end(run);
                }
                Phase::Ending(_) => {}
            }
        }
        if let Stage::Draining(until) = self.stage
            && self.status.is_none()
            && (self.runs.is_empty() || now >= until)
        {
            // Whoever still runs has had the grace.
            if now >= until {
                self.stop(0, "drained");
            }
        }
    }

    /// One step of every teardown under way.
    fn tear_down(&mut self) {
        let mut index = 0;
        while index < self.runs.len() {
            let mut run = self.runs.swap_remove(index);
            let Phase::Ending(since) = run.phase else {
                self.runs.push(run);
                let last = self.runs.len() - 1;
                self.runs.swap(index, last);
                index += 1;
                continue;
            };
            let late = since.elapsed() > TEARDOWN;
            let gone = self.dismantle(&mut run);
            if gone || late {
                self.release(&mut run, !gone);
            }
            // What is late is taken apart all the same, until the supervisor itself is to end.
            if gone || (late && self.status.is_some()) {
                continue;
            }
            self.runs.push(run);
            let last = self.runs.len() - 1;
            self.runs.swap(index, last);
            index += 1;
        }
    }

    /// Removes what can be removed now; whether all is gone.
    fn dismantle(&mut self, run: &mut Run) -> bool {
        if run.init.is_some() {
            return false;
        }
        if let Some(set) = &run.set
            && set.leaf.empty()
        {
            run.peaks = set.leaf.peaks();
            if self.cgroups.remove(&set.leaf)
                && let Some(set) = run.set.take()
            {
                self.uids.release(set.slot);
            }
        }
        run.session = None;
        run.credential = None;
        if let Some(egress) = &mut run.egress
            && !egress.revoked
        {
            egress.revoked = true;
            // One that was never confined holds nothing yet and need not be asked.
            if !egress.ready || !egress.tell(Message::Revoke(Empty {}), Vec::new()) {
                egress.process.child.kill();
            }
        }
        run.set.is_none() && run.egress.is_none()
    }

    /// The last word to the client, once. A late run keeps its uid and its leaf until nothing of it is left.
    fn release(&mut self, run: &mut Run, quarantined: bool) {
        if run.quarantined {
            return;
        }
        if quarantined {
            run.quarantined = true;
            event("quarantined", &[("run", &run.id())]);
            if let Some(egress) = &run.egress {
                egress.process.child.kill();
            }
        }
        if run.report.is_some() {
            let exit = run.exit(quarantined);
            run.tell(&Message::Exit(exit));
            event(
                "exit",
                &[
                    ("run", &run.id()),
                    ("reason", &exit.reason),
                    ("code", &exit.code),
                    ("signal", &exit.signal),
                    ("teardown_us", &exit.teardown_us),
                ],
            );
        } else if let Some(refused) = run.refusal {
            event("refused", &[("run", &run.id()), ("reason", &refused.reason), ("errno", &refused.errno)]);
            self.say(&Message::Refused(refused), &[]);
        }
    }

    /// After the table has been looked through: what follows from its being empty.
    fn settle(&mut self) {
        // SIGCHLD is not used: children are seen on their pidfds, and nothing else is ever a child.
    }
}

/// Kills the cage and begins the teardown.
fn end(run: &mut Run) {
    if matches!(run.phase, Phase::Ending(_)) {
        return;
    }
    run.phase = Phase::Ending(Instant::now());
    run.lease = None;
    run.stdio = None;
    run.gate = None;
    if let Some(init) = &run.init {
        init.kill();
    }
}

fn fail(run: &mut Run, reason: Refusal, fault: &Fault) {
    event("run_failed", &[("run", &run.id()), ("fault", fault)]);
    run.refuse(reason, 0, fault.errno());
    run.ends(Reason::InitDied, 0, 0);
    end(run);
}

/// When something must have happened to a run.
fn deadline(run: &Run) -> Instant {
    match run.phase {
        Phase::Vouching => run.arrived + VOUCH,
        Phase::Launching => run.arrived + VOUCH + LAUNCH,
        Phase::Running => {
            run.opened.unwrap_or(run.arrived) + Duration::from_millis(run.limits.wall_ms.into())
        }
        Phase::Ending(since) => since + TEARDOWN,
    }
}

/// A folder as a detached mount whose owner is, inside, the run's uid.
fn mapped(folder: &OwnedFd, map: BorrowedFd<'_>) -> Result<OwnedFd, Fault> {
    let tree = mount::clone_tree(folder.as_fd(), false).doing("copy a tenant's mount")?;
    let attributes = mount::Attributes { nosuid: true, nodev: true, idmap: Some(map), read_only: false };
    mount::restrict(tree.as_fd(), attributes, false).doing("map the ids of a tenant's mount")?;
    Ok(tree)
}

/// Where a cage may have mounts.
const MOUNTS: [&str; 15] = [
    "/",
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/etc/alternatives",
    crate::template::CLI,
    "/tmp",
    "/dev/shm",
    "/home/agent",
    "/home/agent/.claude/projects/-workspace",
    "/run/gaoler",
    "/proc",
    "/workspace",
];
