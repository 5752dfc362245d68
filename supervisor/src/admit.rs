//! Whether a run may start: a pure verdict over what was asked and what is so.
//! It must never act, and never look at anything but its arguments.

use gaoler_protocol::{Kind, Level, Limits, Refusal, Spawn};

/// What the supervisor knows when it is asked.
#[derive(Debug, Clone, Copy)]
pub struct Situation {
    /// This peer may ask for commands alone; otherwise for everything but them.
    pub exec: bool,
    /// The loosest level that the operator allows.
    pub level_maximum: Level,
    /// Runs that have not ended.
    pub runs: usize,
    /// Runs that may be at the same time.
    pub runs_max: usize,
    /// Another tenant has a run, on a host that lets one tenant run at a time.
    pub another: bool,
    /// No new runs.
    pub draining: bool,
    /// The self-test is under way: its runs alone are permitted, and only now.
    pub proving: bool,
    /// A run of this id exists.
    pub known: bool,
    /// The descriptors are sealed memory files of the sizes allowed.
    pub sealed: bool,
}

/// Yes with these limits, no with this reason, or the end of whoever asked.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// The run may start, within these limits.
    Admit(Limits),
    /// It may not, and its asker is told why.
    Refuse(Refusal),
    /// No honest peer asks this.
    Hostile(&'static str),
}

/// The verdict on a request, under the level's clamp.
pub fn admit(spawn: &Spawn, now: Situation, clamp: impl FnOnce(&Limits) -> Limits) -> Verdict {
    if (spawn.kind == Kind::Exec) != now.exec {
        return Verdict::Hostile("a kind of run that this peer may not ask for");
    }
    if spawn.proof != now.proving || (spawn.proof && !(spawn.ephemeral && spawn.kind == Kind::Cli)) {
        return Verdict::Hostile("a run out of turn");
    }
    if spawn.ephemeral && !spawn.proof && !now.exec {
        return Verdict::Hostile("a run without a tenant");
    }
    if now.known {
        return Verdict::Hostile("a run id that is in use");
    }
    if !now.sealed {
        return Verdict::Hostile("descriptors that are no sealed memory files");
    }
    if now.draining {
        return Verdict::Refuse(Refusal::Draining);
    }
    if spawn.level > now.level_maximum {
        return Verdict::Refuse(Refusal::LevelUnavailable);
    }
    if now.runs >= now.runs_max || now.another {
        return Verdict::Refuse(Refusal::Busy);
    }
    Verdict::Admit(clamp(&spawn.limits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_protocol::{Conversation, Effort, Model, RunId, TenantKey};

    const LIMITS: Limits = Limits { memory_mib: 1, tasks: 2, ..Limits::NONE };

    fn spawn() -> Spawn {
        Spawn {
            run: RunId([1; 16]),
            tenant: TenantKey([2; 32]),
            kind: Kind::Cli,
            level: Level::Balanced,
            conversation: Conversation::Stateless,
            ephemeral: false,
            proof: false,
            session: [3; 16],
            workspace: [0; 16],
            model: Model::DEFAULT,
            effort: Effort::Unset,
            turns_max: 0,
            mcp_refused: false,
            budget_microusd: 0,
            limits: LIMITS,
        }
    }

    const NOW: Situation = Situation {
        exec: false,
        level_maximum: Level::Balanced,
        runs: 0,
        runs_max: 1,
        another: false,
        draining: false,
        proving: false,
        known: false,
        sealed: true,
    };

    fn check(name: &str, spawn: Spawn, now: Situation, expected: Verdict) {
        assert_eq!(admit(&spawn, now, |limits| *limits), expected, "{name}");
    }

    #[test]
    fn every_question_has_its_verdict() {
        let hostile = |why| Verdict::Hostile(why);
        check("plain", spawn(), NOW, Verdict::Admit(LIMITS));
        check("full", spawn(), Situation { runs: 1, ..NOW }, Verdict::Refuse(Refusal::Busy));
        check("another tenant", spawn(), Situation { another: true, ..NOW }, Verdict::Refuse(Refusal::Busy));
        check("draining", spawn(), Situation { draining: true, ..NOW }, Verdict::Refuse(Refusal::Draining));
        let looser = Spawn { level: Level::Developer, ..spawn() };
        check("looser level", looser, NOW, Verdict::Refuse(Refusal::LevelUnavailable));
        let stricter = Spawn { level: Level::Paranoid, ..spawn() };
        check("stricter level", stricter, NOW, Verdict::Admit(LIMITS));
        check(
            "loosest level",
            looser,
            Situation { level_maximum: Level::Developer, ..NOW },
            Verdict::Admit(LIMITS),
        );
        let exec = Spawn { kind: Kind::Exec, ..spawn() };
        check("exec", exec, NOW, hostile("a kind of run that this peer may not ask for"));
        for kind in [Kind::Files, Kind::Sessions, Kind::Fetch] {
            let files = Spawn { kind, ..spawn() };
            check("files", files, NOW, Verdict::Admit(LIMITS));
            let not_here = hostile("a kind of run that this peer may not ask for");
            check("files of a command line", files, Situation { exec: true, ..NOW }, not_here);
            let proof = Spawn { proof: true, ephemeral: true, ..files };
            let proving = Situation { proving: true, ..NOW };
            check("files for a proof", proof, proving, hostile("a run out of turn"));
            let homeless = Spawn { ephemeral: true, ..files };
            check("nobody's files", homeless, NOW, hostile("a run without a tenant"));
        }
        let proof = Spawn { proof: true, ephemeral: true, ..spawn() };
        check("late proof", proof, NOW, hostile("a run out of turn"));
        check("early run", spawn(), Situation { proving: true, ..NOW }, hostile("a run out of turn"));
        check("proof", proof, Situation { proving: true, ..NOW }, Verdict::Admit(LIMITS));
        let homeless = Spawn { ephemeral: true, ..spawn() };
        check("no tenant", homeless, NOW, hostile("a run without a tenant"));
        check("replayed", spawn(), Situation { known: true, ..NOW }, hostile("a run id that is in use"));
        let unsealed = "descriptors that are no sealed memory files";
        check("unsealed", spawn(), Situation { sealed: false, ..NOW }, hostile(unsealed));
    }
}
