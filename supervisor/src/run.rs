//! One run, from Spawn to Exit: what it owns and which phase it is in. The transitions are the monitor's.
//! A run must never lose what it owns: everything here is removed by teardown or held in quarantine.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use gaoler_protocol::{
    Denial, Exit, Limits, Message, Placeholder, Reason, Refusal, Refused, RunId, Serve, Spawn, Totals,
};
use gaoler_sys::clone::{Child, Ended};
use nix::fcntl::Flock;

use crate::cgroup::{Leaf, Peaks};
use crate::errand::Errand;
use crate::family::{self, Member};
use crate::monitor::Disk;
use crate::pool::Set;
use crate::spawn::Attended;
use crate::tenants::{Folder, Tenant, TenantId};
use crate::uids::Slot;

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The upstream is asked for the tenant's credential.
    Vouching,
    /// The cage is being made.
    Launching,
    /// The gate is open.
    Running,
    /// The cage is killed; what it had is being removed.
    Ending(Instant),
}

/// How a run ended, as far as it is known.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Why.
    pub reason: Reason,
    /// The exit status.
    pub code: u8,
    /// The signal.
    pub signal: u8,
}

/// The egress of a run.
pub struct Broker {
    /// Its process and control socket.
    pub process: Attended,
    /// Its uid's lease.
    pub slot: Slot,
    /// Its uid.
    pub uid: u32,
    /// It has been looked at and found confined.
    pub ready: bool,
    /// What it is to be told once it is.
    pub waiting: Vec<(Message, Vec<OwnedFd>)>,
    /// It has been told to end.
    pub revoked: bool,
    /// The sequence number of its newest frame.
    pub heard: Option<u64>,
    /// The sequence number of our newest frame.
    pub said: u64,
}

/// One run.
pub struct Run {
    /// As it was asked for, without the tenant's key.
    pub spawn: Spawn,
    /// Whose it is; `None` for an ephemeral one.
    pub tenant: Option<TenantId>,
    /// When it was asked for.
    pub arrived: Instant,
    /// The limits in force.
    pub limits: Limits,
    /// The phase.
    pub phase: Phase,
    /// Sealed options, until the cage has them.
    pub options: Option<OwnedFd>,
    /// The sealed credential, until egress has it.
    pub credential: Option<OwnedFd>,
    /// The sealed list of its remote MCP servers, until egress has it.
    pub remotes: Option<OwnedFd>,
    /// What stands for the credential in the cage.
    pub placeholder: Placeholder,
    /// Uid, namespaces, leaf.
    pub set: Option<Set>,
    /// pid 1, until it is reaped.
    pub init: Option<Child>,
    /// pid 1's words.
    pub line: Option<OwnedFd>,
    /// The gate, until it is passed.
    pub gate: Option<OwnedFd>,
    /// The pid of the command's process, once it has been seen to be in its place.
    pub placed: Option<i32>,
    /// The gate's byte has been sent.
    pub opened: Option<Instant>,
    /// The command's stdin, stdout, stderr, until the peer has them.
    pub stdio: Option<[OwnedFd; 3]>,
    /// The broker.
    pub egress: Option<Broker>,
    /// The read end of what egress writes at its end, until the peer has it.
    pub ledger: Option<OwnedFd>,
    /// The uid of its processes, as the supervisor sees it.
    pub uid: u32,
    /// The uid that alone may come to its listeners, where others could and the kernel names who comes; else 0.
    pub peer: u32,
    /// The command has a descriptor 3.
    pub third: bool,
    /// It has no pid namespace: pid 1's stand-in ends the others, and is told to by the end of its line.
    pub family: bool,
    /// Its tenant's folder.
    pub folder_of_tenant: Option<Tenant>,
    /// Its own folder, where that cannot be a file system of its own.
    pub folder: Option<Folder>,
    /// Its own folder is empty.
    pub wiped: bool,
    /// Somebody who is at its folders.
    pub errand: Option<Errand>,
    /// What is known of its use of the disk.
    pub disk: Disk,
    /// The most that its tenant's folder was seen to take, bytes.
    pub disk_peak: u64,
    /// The session's lock, and the hold on its workspace.
    pub session: Option<Flock<File>>,
    pub workspace: Option<Flock<File>>,
    /// Our end of the lease.
    pub lease: Option<OwnedFd>,
    /// Our end of the report.
    pub report: Option<OwnedFd>,
    /// Frames sent on the report.
    pub reported: u64,
    /// What egress counted.
    pub totals: Totals,
    /// Why it was not started, where it was not.
    pub refusal: Option<Refused>,
    /// How it ended, first cause first.
    pub outcome: Option<Outcome>,
    /// What it used.
    pub used: Ended,
    /// What its group saw.
    pub peaks: Peaks,
    /// Its teardown is past its deadline: its client has been released, and it is no longer counted as running.
    pub quarantined: bool,
    /// Microseconds from the gate to the end.
    pub wall_us: u64,
}

impl Run {
    /// A run that has just been asked for.
    pub fn new(spawn: Spawn, tenant: Option<TenantId>, limits: Limits, placeholder: Placeholder) -> Run {
        Run {
            totals: Totals::none(spawn.run),
            spawn,
            tenant,
            arrived: Instant::now(),
            limits,
            phase: Phase::Launching,
            options: None,
            credential: None,
            remotes: None,
            placeholder,
            set: None,
            init: None,
            line: None,
            gate: None,
            placed: None,
            opened: None,
            stdio: None,
            egress: None,
            ledger: None,
            uid: 0,
            peer: 0,
            third: false,
            family: false,
            folder_of_tenant: None,
            folder: None,
            wiped: false,
            errand: None,
            disk: Disk::default(),
            disk_peak: 0,
            session: None,
            workspace: None,
            lease: None,
            report: None,
            reported: 0,
            refusal: None,
            outcome: None,
            used: Ended::default(),
            peaks: Peaks::default(),
            quarantined: false,
            wall_us: 0,
        }
    }

    /// Its id.
    pub fn id(&self) -> RunId {
        self.spawn.run
    }

    /// The pids of its pid 1, its egress and its errand.
    pub fn children(&self) -> [Option<i32>; 3] {
        [
            self.init.as_ref().map(|child| child.pid),
            self.egress.as_ref().map(|egress| egress.process.child.pid),
            self.errand.as_ref().map(|errand| errand.child.pid),
        ]
    }

    /// Its tasks. Without a group they are found among these.
    pub fn tasks(&self, all: &[Member]) -> Vec<i32> {
        let leaf = self.set.as_ref().and_then(|set| set.leaf.as_ref());
        let below = |init: &Child| family::below(all, init.pid).iter().map(|it| it.pid).collect();
        leaf.map_or_else(|| self.init.as_ref().map_or(Vec::new(), below), Leaf::members)
    }

    /// Notes a cause of the end; the first one stays.
    pub fn ends(&mut self, reason: Reason, code: u8, signal: u8) {
        self.outcome.get_or_insert(Outcome { reason, code, signal });
    }

    /// Notes why it is not started; the first reason stays.
    pub fn refuse(&mut self, reason: Refusal, step: u8, errno: u16) {
        self.refusal.get_or_insert(Refused { run: self.spawn.run, reason, step, errno });
    }

    /// Overwrites what no other process may inherit.
    pub fn wipe(&mut self) {
        self.placeholder = Placeholder([0; 32]);
    }

    /// For a child that is nobody's run: what this run has and what the others have is overwritten.
    pub fn wipe_all(own: &mut Placeholder, others: &mut [Run]) {
        *own = Placeholder([0; 32]);
        others.iter_mut().for_each(Run::wipe);
    }

    /// Sends a frame on the report. `false` where nobody reads it.
    pub fn tell(&mut self, message: &Message) -> bool {
        let Some(report) = &self.report else { return true };
        self.reported += 1;
        gaoler_sys::channel::send(report.as_fd(), &message.encode(self.reported), &[]).is_ok()
    }

    /// What egress must serve.
    pub fn serve(&self, vouch: bool) -> Message {
        Message::Serve(Serve {
            run: self.spawn.run,
            placeholder: self.placeholder,
            level: self.spawn.level,
            vouch,
            requests_max: 0,
            egress_mib: self.limits.egress_mib,
            peer_uid: self.peer,
            tenant: self.tenant.as_ref().map_or([0; 16], TenantId::bytes),
        })
    }

    /// The last word on it.
    pub fn exit(&self, quarantined: bool) -> Exit {
        let outcome = self.outcome.unwrap_or(Outcome { reason: Reason::InitDied, code: 0, signal: 0 });
        let killed_for_memory = self.peaks.oom_kills > 0 && outcome.signal == libc::SIGKILL as u8;
        let teardown = match self.phase {
            Phase::Ending(since) => since.elapsed().as_micros() as u64,
            _ => 0,
        };
        Exit {
            run: self.spawn.run,
            reason: if killed_for_memory { Reason::Oom } else { outcome.reason },
            code: outcome.code,
            signal: outcome.signal,
            quarantined,
            wall_us: self.wall_us,
            user_us: self.used.user_us,
            system_us: self.used.system_us,
            maxrss_kib: self.used.maxrss_kib,
            memory_peak: self.peaks.memory,
            tasks_peak: self.peaks.tasks,
            oom_kills: self.peaks.oom_kills,
            tasks_denied: self.peaks.tasks_denied,
            teardown_us: teardown,
            requests: self.totals.requests,
            denials: self.totals.denials,
            input_tokens: self.totals.input_tokens,
            output_tokens: self.totals.output_tokens,
            cache_write_tokens: self.totals.cache_write_tokens,
            cache_read_tokens: self.totals.cache_read_tokens,
            bytes_up: self.totals.bytes_up,
            bytes_down: self.totals.bytes_down,
        }
    }
}

impl Broker {
    /// Tells egress something, now or once it is confined. `false` where it does not listen.
    pub fn tell(&mut self, message: Message, fds: Vec<OwnedFd>) -> bool {
        if !self.ready {
            self.waiting.push((message, fds));
            return true;
        }
        self.said += 1;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        gaoler_sys::channel::send(self.process.control.as_fd(), &message.encode(self.said), &borrowed).is_ok()
    }

    /// Tells what waited until it was confined.
    pub fn flush(&mut self) -> bool {
        self.ready = true;
        std::mem::take(&mut self.waiting).into_iter().all(|(message, fds)| self.tell(message, fds))
    }
}

/// A denial's violation.
pub fn violation(run: RunId, what: Denial, count: u32) -> Message {
    Message::Violation(gaoler_protocol::Violation { run, what, count })
}
