//! The exporter of traces: started where the command line has handed over settings for it, looked at, and started again.
//! Its end must never be a run's or the instance's: spans that nobody takes are dropped where they come from.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use gaoler_protocol::{FRAME_BYTES, Message, Ready, Role};
use gaoler_sys::channel;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{Shutdown, shutdown};

use crate::boot::Host;
use crate::cage::attest::{Posture, place, rights};
use crate::fault::{Doing, Fault};
use crate::log::event;
use crate::plan::Plan;
use crate::spawn::{self, Attended, Network};

/// Between two starts: one that fails at once must not keep this process busy.
const AGAIN: Duration = Duration::from_secs(5);
/// How long it may still send when everything ends.
const LAST_MS: u16 = 1_000;

/// The exporter, or what starts it.
pub struct Exporter {
    program: OwnedFd,
    settings: OwnedFd,
    /// Its end of the frontend's socket, kept here so that spans wait for the next one.
    spans: OwnedFd,
    process: Option<Attended>,
    next: Instant,
}

impl Exporter {
    /// One that is to be started, and the frontend's end of its socket.
    ///
    /// # Errors
    /// Those of socketpair(2).
    pub fn new(program: OwnedFd, settings: OwnedFd) -> Result<(Exporter, OwnedFd), Fault> {
        let (ours, spans) = channel::pair().doing("make the exporter's socket")?;
        Ok((Exporter { program, settings, spans, process: None, next: Instant::now() }, ours))
    }

    /// When it is to be started, where it is not there.
    pub fn due(&self) -> Option<Instant> {
        self.process.is_none().then_some(self.next)
    }

    /// Its process.
    pub fn process(&self) -> Option<&Attended> {
        self.process.as_ref()
    }

    /// Starts it. What goes wrong is said, and tried again.
    pub fn start(&mut self, host: &Host, plan: &Plan, wipe: impl FnOnce()) {
        self.next = Instant::now() + AGAIN;
        let started = || -> Result<Attended, Fault> {
            let resolver = host.resolver().doing("open resolv.conf")?;
            let more = [&self.settings, &self.spans, &resolver].map(AsFd::as_fd);
            let (argv, uid) = (["gaoler-exporter"], host.settings.uids.exporter);
            spawn::start(plan, self.program.as_fd(), &argv, uid, Network::Host, &more, wipe)
        };
        match started() {
            Ok(process) => self.process = Some(process),
            Err(fault) => event("exporter_not_started", &[("fault", &fault)]),
        }
    }

    /// Its one word, after which it is looked at; anything else ends it.
    pub fn hear(&mut self, host: &Host, plan: &Plan) {
        let Some(process) = &self.process else { return };
        let word = channel::receive::<{ FRAME_BYTES + 1 }>(process.control.as_fd());
        let word = word.ok().and_then(|received| Message::decode(&received.bytes).ok());
        let confined = match word {
            Some((_, Message::Ready(Ready { role: Role::Exporter, threads }))) => {
                let posture = Posture::own(plan, host.settings.uids.exporter, false, threads);
                let (proc_fd, pid) = (host.proc_fd.as_fd(), process.child.pid);
                place(proc_fd, pid, &posture).and_then(|_| rights(proc_fd, pid, &posture))
            }
            _ => Err(Fault::new("hear the exporter", "it ended, or said what it may not")),
        };
        if let Err(fault) = confined {
            event("exporter_killed", &[("fault", &fault)]);
            process.child.kill();
            self.gone();
        }
    }

    /// It has been reaped, or is about to be.
    pub fn gone(&mut self) {
        self.process = None;
        self.next = self.next.max(Instant::now() + AGAIN / 5);
    }

    /// Lets it send what it has, and ends it.
    pub fn end(self) {
        let Some(Attended { child, control }) = self.process else { return };
        let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(&control), Shutdown::Write);
        let _ = poll(&mut [PollFd::new(control.as_fd(), PollFlags::POLLIN)], LAST_MS);
        child.kill();
        let _ = child.reap_blocking();
    }
}
