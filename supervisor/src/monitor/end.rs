//! A run's end: deadlines, and a teardown in steps that never waits and never stalls a launch.
//! It must never forget a run of which something is left: that is quarantined and said.

use std::time::{Duration, Instant};

use gaoler_protocol::{Empty, Message, Reason, Refusal};

use super::{LAUNCH, Monitor, Stage, TEARDOWN, VOUCH};
use crate::cage::word::Step;
use crate::errand::{Deed, Errand, Usage};
use crate::fault::Fault;
use crate::log::event;
use crate::run::{Phase, Run};

/// How long the frontend may take to tell clients that their runs were ended by a drain.
const LAST_WORD: Duration = Duration::from_secs(1);

impl Monitor {
    pub(super) fn deadlines(&mut self) {
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
            && now >= until
        {
            // Whoever still runs has had the grace. Its client is told so, which takes the frontend a moment more.
            match self.end_runs() {
                true => self.stage = Stage::Draining(now + TEARDOWN + LAST_WORD),
                false => self.stop(0, "drained"),
            }
        }
    }

    /// Ends every run. Whether one of them would have gone on.
    pub(super) fn end_runs(&mut self) -> bool {
        let mut lasting = false;
        for run in &mut self.runs {
            lasting |= !matches!(run.phase, Phase::Ending(_));
            run.ends(Reason::Drained, 0, 0);
            run.refuse(Refusal::Draining, 0, 0);
            end(run);
        }
        lasting
    }

    /// One step of every teardown under way.
    pub(super) fn tear_down(&mut self) {
        let left = |run: &Run| run.family && run.init.is_none() && matches!(run.phase, Phase::Ending(_));
        self.alone = !self.runs.iter().any(left) || self.end_strays();
        for mut run in std::mem::take(&mut self.runs) {
            let Phase::Ending(since) = run.phase else {
                self.runs.push(run);
                continue;
            };
            let gone = self.dismantle(&mut run);
            let late = since.elapsed() > TEARDOWN;
            if gone || late {
                self.release(&mut run, !gone);
            }
            // What is late is taken apart all the same, until the supervisor itself is to end.
            if !(gone || (late && self.status.is_some())) {
                self.runs.push(run);
            }
        }
    }

    /// Removes what can be removed now; whether all is gone.
    pub(super) fn dismantle(&mut self, run: &mut Run) -> bool {
        if run.init.is_some() {
            return false;
        }
        if run.errand.is_some() || (run.family && !self.alone) || !self.clear(run) {
            return false;
        }
        let leaf = run.set.as_ref().and_then(|set| set.leaf.as_ref());
        let gone = match (leaf, &self.cgroups) {
            (Some(leaf), Some(cgroups)) if leaf.empty() => {
                run.peaks = leaf.peaks();
                cgroups.remove(leaf)
            }
            (leaf, _) => leaf.is_none(),
        };
        if gone && let Some(set) = run.set.take() {
            self.uids.release(set.slot);
        }
        run.folder_of_tenant = None;
        run.session = None;
        run.workspace = None;
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

    /// Has a run's own folder emptied by its owner, and removes it; whether it is gone.
    fn clear(&mut self, run: &mut Run) -> bool {
        let (Some(folder), Some(folders)) = (&run.folder, &self.host.folders) else { return true };
        if run.wiped && folder.remove(folders) {
            run.folder = None;
            return true;
        }
        if run.disk.rests.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        run.wiped = false;
        let (runs, placeholder) = (&mut self.runs, &mut run.placeholder);
        let sent = Errand::start(&self.plan, Deed::Wipe, &*folder.lock, run.uid, || {
            Run::wipe_all(placeholder, runs);
            Ok(Usage::default())
        });
        match sent {
            Ok(errand) => run.errand = Some(errand),
            Err(fault) => event("wipe_failed", &[("run", &run.id()), ("fault", &fault)]),
        }
        false
    }

    /// The last word to the client, once. A late run keeps its uid and its leaf until nothing of it is left.
    fn release(&mut self, run: &mut Run, late: bool) {
        if run.quarantined {
            return;
        }
        if late {
            run.quarantined = true;
            event("quarantined", &[("run", &run.id())]);
            if let Some(egress) = &run.egress {
                egress.process.child.kill();
            }
            if let Some(init) = &run.init {
                init.kill();
            }
        }
        if run.report.is_some() {
            let exit = run.exit(late);
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
}

/// Kills the cage and begins the teardown.
pub(super) fn end(run: &mut Run) {
    if matches!(run.phase, Phase::Ending(_)) {
        return;
    }
    run.phase = Phase::Ending(Instant::now());
    run.disk.rests = None;
    run.lease = None;
    run.stdio = None;
    run.gate = None;
    if run.family {
        run.line = None;
    } else if let Some(init) = &run.init {
        init.kill();
    }
    if let Some(errand) = &run.errand {
        errand.child.kill();
    }
}

pub(super) fn fail(run: &mut Run, reason: Refusal, fault: &Fault) {
    event("run_failed", &[("run", &run.id()), ("fault", fault)]);
    run.refuse(reason, 0, fault.errno());
    run.ends(Reason::InitDied, 0, 0);
    end(run);
}

/// When something must have happened to a run.
pub(super) fn deadline(run: &Run) -> Instant {
    match run.phase {
        Phase::Vouching => run.arrived + VOUCH,
        Phase::Launching => run.arrived + VOUCH + LAUNCH,
        Phase::Running => {
            run.opened.unwrap_or(run.arrived) + Duration::from_millis(run.limits.wall_ms.into())
        }
        Phase::Ending(since) => since + TEARDOWN,
    }
}
