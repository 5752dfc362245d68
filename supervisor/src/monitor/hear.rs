//! What a run's processes say: pid 1, the command before its gate, egress.
//! It must never open a gate behind which it has not looked, nor believe an egress about another run.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::time::Instant;

use gaoler_protocol::{FRAME_BYTES, Message, Reason, Refusal, Spawned};
use gaoler_sys::channel;
use gaoler_sys::clone::Ended;
use nix::fcntl::OFlag;

use super::end::{end, fail};
use super::{BURST, Monitor};
use crate::cage::attest::{Posture, place, rights};
use crate::cage::word::{Heard, Step, Word, hear};
use crate::family;
use crate::fault::{Doing, Fault};
use crate::log::event;
use crate::plan::Root;
use crate::run::{Phase, Run, violation};

/// Where a cage may have mounts beside the visible places of the host.
const MOUNTS: [&str; 10] = [
    "/",
    crate::template::CLI,
    "/tmp",
    "/dev/shm",
    "/home/agent",
    "/home/agent/.claude/projects/-workspace",
    "/run/gaoler",
    "/proc",
    "/proc/locks",
    "/workspace",
];

impl Monitor {
    pub(super) fn on_line(&mut self, run: &mut Run) {
        let Some(line) = &run.line else { return };
        match hear(line) {
            Heard::Nothing => {}
            Heard::Word(Word::Listener, fds, _) if (1..=2).contains(&fds.len()) && run.egress.is_some() => {
                if let Err(fault) = self.serve(run, Some(fds)) {
                    fail(run, Refusal::EgressFailed, &fault);
                }
            }
            Heard::Word(Word::Failed(step, errno), ..) => {
                run.ends(Reason::InitDied, 0, 0);
                cage_failed(run, step, errno);
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
            // pid 1's end itself is told by SIGCHLD.
            Heard::Closed => run.line = None,
        }
    }

    pub(super) fn on_gate(&mut self, run: &mut Run) {
        let Some(gate) = &run.gate else { return };
        match (hear(gate), run.opened) {
            (Heard::Nothing, _) => {}
            (Heard::Word(Word::Born, _, told), None) if run.placed.is_none() => {
                let placed = self.speaker(run, told).and_then(|pid| self.placed(run, pid).map(|()| pid));
                match placed {
                    Ok(pid) => run.placed = Some(pid),
                    // It may have failed since, and then has said why.
                    Err(fault) => match hear(gate) {
                        Heard::Word(Word::Failed(step, errno), ..) => cage_failed(run, step, errno),
                        _ => not_attested(run, &fault),
                    },
                }
            }
            (Heard::Word(Word::Ready, _, told), None)
                if run.placed.is_some() && run.placed == self.speaker(run, told).ok() =>
            {
                let pid = run.placed.unwrap_or_default();
                let visible = self.host.levels.visible();
                let looked =
                    self.posture(run, &visible).and_then(|it| rights(self.host.proc_fd.as_fd(), pid, &it));
                let let_go = || channel::send(gate.as_fd(), b"G", &[]).doing("open a gate");
                match looked.and_then(|()| let_go()) {
                    Ok(()) => run.opened = Some(Instant::now()),
                    Err(fault) => not_attested(run, &fault),
                }
            }
            (Heard::Word(Word::Failed(step, errno), ..), None) => cage_failed(run, step, errno),
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

    /// Who speaks at a gate: as the kernel names them, or where it names them as they see themselves (gVisor), the
    /// one child that pid 1 has before the gate is passed.
    fn speaker(&self, run: &Run, told: Option<i32>) -> Result<i32, Fault> {
        if self.plan.ahead
            && let Some(pid) = told
        {
            return Ok(pid);
        }
        let init = run.init.as_ref().map(|init| init.pid);
        let all = family::everybody(self.host.proc_fd.as_fd());
        let children: Vec<i32> = all.iter().filter(|it| Some(it.parent) == init).map(|it| it.pid).collect();
        match children[..] {
            [only] => Ok(only),
            _ => Err(Fault::new(
                "find the command's process",
                format!("pid 1 has {} children", children.len()),
            )),
        }
    }

    /// Whether the command's process is where it must be.
    fn placed(&self, run: &Run, pid: i32) -> Result<(), Fault> {
        let visible = self.host.levels.visible();
        let groups = place(self.host.proc_fd.as_fd(), pid, &self.posture(run, &visible)?)?;
        let leaf = run.set.as_ref().and_then(|set| set.leaf.as_ref());
        match (leaf, &self.cgroups) {
            (None, None) => Ok(()),
            (Some(leaf), Some(cgroups)) if leaf.holds(&groups, cgroups) => Ok(()),
            _ => Err(Fault::new("attest cgroup", "the process is not in its leaf")),
        }
    }

    /// What must be so of the command's process before its gate.
    fn posture<'a>(&self, run: &'a Run, visible: &'a BTreeSet<&'a str>) -> Result<Posture<'a>, Fault> {
        let plan = &self.plan;
        let set = run.set.as_ref().ok_or_else(|| Fault::new("attest", "the set is gone"))?;
        Ok(Posture {
            uid: run.uid,
            namespaces: &set.identities,
            apart: plan.apart(true),
            // Nobody without a capability may look at those of a process that cannot be traced.
            descriptors: if plan.bounds() { 4 + usize::from(run.third) } else { 0 },
            filters: plan.filters().count() as u32,
            mounts: if plan.root == Root::Own { &MOUNTS } else { &[] },
            visible,
            borrowed: plan.inside,
            bounded: plan.bounds(),
            threads: 1,
        })
    }

    pub(super) fn passed(&mut self, run: &mut Run) {
        run.gate = None;
        let made = channel::pair()
            .and_then(|lease| Ok((lease, channel::pair()?, nix::unistd::pipe2(OFlag::O_CLOEXEC)?)));
        let (Ok(((lease, their_lease), (report, their_report), (empty, _))), Some(stdio)) =
            (made, run.stdio.take())
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
            tier: self.plan.tier,
        };
        // A run without an egress has a ledger in which nothing stands.
        let ledger = run.ledger.take().unwrap_or(empty);
        let [stdin, stdout, stderr] = &stdio;
        let fds = [stdin, stdout, stderr, &their_lease, &their_report, &ledger].map(AsFd::as_fd);
        self.say(&Message::Spawned(spawned), &fds);
        event("spawned", &[("run", &run.id()), ("kind", &run.spawn.kind), ("launch_us", &spawned.launch_us)]);
    }

    pub(super) fn on_init(&mut self, run: &mut Run, ended: Ended) {
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

    pub(super) fn on_egress(&mut self, run: &mut Run) {
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

    pub(super) fn on_egress_message(&mut self, run: &mut Run, message: Message) {
        let id = run.id();
        let Some(egress) = &mut run.egress else { return };
        match message {
            Message::Ready(ready) if !egress.ready => {
                let posture = Posture::own(&self.plan, egress.uid, false, ready.threads);
                let (proc_fd, pid) = (self.host.proc_fd.as_fd(), egress.process.child.pid);
                let confined = place(proc_fd, pid, &posture).and_then(|_| rights(proc_fd, pid, &posture));
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
                        run.refuse(Refusal::UpstreamUnavailable, vouched.after, status);
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
    pub(super) fn without_egress(&mut self, run: &mut Run) {
        let Some(egress) = run.egress.take() else { return };
        self.egress_uids.release(egress.slot);
        if !egress.revoked {
            event("egress_died", &[("run", &run.id())]);
            run.refuse(Refusal::EgressFailed, 0, 0);
            run.ends(Reason::EgressDied, 0, 0);
            end(run);
        }
    }
}

/// A step of the ritual failed.
fn cage_failed(run: &mut Run, step: u8, errno: u16) {
    event("cage_failed", &[("run", &run.id()), ("step", &step), ("errno", &errno)]);
    run.refuse(Refusal::CageFailed, step, errno);
    end(run);
}

/// The gate stays shut.
fn not_attested(run: &mut Run, fault: &Fault) {
    event("attest_failed", &[("run", &run.id()), ("fault", fault)]);
    run.refuse(Refusal::CageFailed, Step::Attest as u8, fault.errno());
    end(run);
}
