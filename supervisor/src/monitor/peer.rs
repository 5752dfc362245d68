//! What the peer may ask, in which stage; anything else ends it. The table of permitted questions.
//! It must never go on with a peer that has once said what no honest one says.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use gaoler_protocol::{Empty, FRAME_BYTES, Listen, Message, Prove, Reload};
use gaoler_sys::channel;
use gaoler_sys::clone::wait;
use nix::sys::signal::Signal;

use super::{BURST, Monitor, Stage};
use crate::boot::Mode;
use crate::cage::attest::{Posture, place, rights};
use crate::log::event;
use crate::run::Run;

/// A signal that comes sooner after the first one is the same wish.
const SECOND_SIGNAL: Duration = Duration::from_millis(100);

impl Monitor {
    pub(super) fn on_peer(&mut self) {
        for _ in 0..BURST {
            let Some(peer) = &self.peer else { return };
            let received = match channel::receive::<{ FRAME_BYTES + 1 }>(peer.as_fd()) {
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
                (Stage::Serving | Stage::Draining(_), Message::Reload(Reload { asks }))
                    if received.fds.is_empty() && self.reload.is_some() =>
                {
                    self.reload(Some(asks));
                }
                // Not every host tells us that the command line has closed its half.
                (Stage::Serving, Message::Drained(Empty {})) if self.host.mode == Mode::Exec => {
                    return self.lose_peer("the command line is done");
                }
                (_, other) => return self.hostile(&format!("{} out of turn", other.name())),
            }
            if self.status.is_some() {
                return;
            }
        }
    }

    pub(super) fn hostile(&mut self, why: &str) {
        event("peer_hostile", &[("why", &why)]);
        self.stop(1, "peer_ended");
    }

    pub(super) fn lose_peer(&mut self, why: &str) {
        // The command line's own supervisor simply ends with it.
        let status = u8::from(self.host.mode == Mode::Serve);
        if status != 0 {
            event("peer_lost", &[("why", &why)]);
        }
        self.stop(status, "peer_ended");
    }

    /// Ends everything. Every run's cage is killed; the loop goes on until all are gone.
    pub(super) fn stop(&mut self, status: u8, why: &str) {
        if self.status.is_none() {
            self.status = Some(status);
            if status != 0 {
                event("stopping", &[("why", &why)]);
            }
        }
        if let Some(frontend) = &self.frontend {
            frontend.child.kill();
        }
        self.end_runs();
        self.peer = None;
    }

    pub(super) fn say(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) {
        let Some(peer) = &self.peer else { return };
        self.said += 1;
        if let Err(error) = channel::send(peer.as_fd(), &message.encode(self.said), fds) {
            // A peer that does not read is ended: to wait for it would stall every tenant.
            event("peer_unread", &[("message", &message.name()), ("error", &error)]);
            self.stop(1, "peer_ended");
        }
    }

    pub(super) fn on_ready(&mut self, threads: u32) {
        let Some(frontend) = &self.frontend else { return self.hostile("Ready without a frontend") };
        let posture = Posture::own(&self.plan, self.host.settings.uids.frontend, true, threads);
        let (proc_fd, pid) = (self.host.proc_fd.as_fd(), frontend.child.pid);
        if let Err(fault) = place(proc_fd, pid, &posture).and_then(|_| rights(proc_fd, pid, &posture)) {
            event("frontend_not_confined", &[("fault", &fault)]);
            return self.stop(1, "frontend_not_confined");
        }
        self.stage = Stage::Proving;
        self.say(&Message::Layers(self.layers), &[]);
        self.say(&Message::Prove(Prove { rules: self.plan.rules }), &[]);
    }

    pub(super) fn on_proven(&mut self, failed: u32, version: [u16; 3]) {
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
            level: self.host.levels.default,
            runs_max: self.host.settings.runs.max,
            embedded,
        };
        self.say(&Message::Listen(listen), &[listener.as_fd()]);
        event("serving", &[("tier", &self.layers.tier), ("cli", &format!("{major}.{minor}.{patch}"))]);
        let (tier, level) = (self.layers.tier, self.host.levels.default);
        println!("ready tier={tier} level={level} address={}", self.host.address);
        self.host.notify.ready();
        if self.reload.as_ref().is_some_and(|reload| reload.again) {
            self.reload(None);
        }
    }

    /// Has the settings read once more, after the reload that is under way: what was written since then is to count.
    pub(super) fn reload(&mut self, asks: Option<u64>) {
        let Some(reload) = &mut self.reload else { return };
        reload.asks = asks.unwrap_or(reload.asks);
        if self.stage != Stage::Serving || reload.child.is_some() {
            reload.again = true;
            return;
        }
        let started = reload.start(&self.plan, || self.runs.iter_mut().for_each(Run::wipe));
        let message = Message::Reload(Reload { asks: reload.asks });
        match started {
            Ok(socket) => self.say(&message, &[socket.as_fd()]),
            Err(fault) => {
                event("reload_not_started", &[("fault", &fault)]);
                self.say(&message, &[]);
            }
        }
    }

    pub(super) fn on_signal(&mut self) {
        let (mut wishes, mut reload) = (0, false);
        while let Ok(Some(told)) = self.signals.read_signal() {
            match Signal::try_from(told.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => {}
                Ok(Signal::SIGHUP) if self.host.mode == Mode::Serve => reload = true,
                _ => wishes += 1,
            }
        }
        while let Ok(Some((pid, ended))) = wait(-1, libc::WNOHANG) {
            self.on_ended(pid, ended);
        }
        if reload {
            self.reload(None);
        }
        for _ in 0..wishes {
            let grace = Duration::from_secs(self.host.settings.runs.drain_seconds.into());
            match self.stage {
                Stage::Serving if self.host.mode == Mode::Serve => {
                    self.stage = Stage::Draining(Instant::now() + grace);
                    event("draining", &[("runs", &self.runs.len())]);
                    self.host.notify.stopping();
                    self.say(&Message::Drain(Empty {}), &[]);
                }
                // Some senders signal a process and then its group: that is one wish, told twice.
                Stage::Draining(until) if Instant::now() + grace < until + SECOND_SIGNAL => {}
                // A second wish, or one before anybody was served, waits for nothing.
                _ => self.stop(0, "signal"),
            }
        }
    }
}
