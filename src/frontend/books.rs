//! What is remembered of a run: whose it was, how it ended, and what egress and the supervisor counted.
//! It must never take a figure from the cage: whatever comes out of there is the tenant's claim.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::timeout;

use gaoler_ledger_wire::{Counted, Question, RunRecord};
use gaoler_protocol::{Exit, Level, Spawned};

use super::answer::Ending;
use super::budget::{Budgets, Reserved};
use super::identity::Caller;
use super::job::Job;
use super::ledger::Ledger;
use super::{Frontend, log};

/// How long a run's guard waits for its record: a drain must not end before what it waited for is written.
const NOTED_WAIT: Duration = Duration::from_secs(10);

/// What is known of a run before it begins.
pub struct Note {
    ledger: Ledger,
    tenant: String,
    key: Option<String>,
    session: Option<String>,
    model: String,
    budgets: Arc<Budgets>,
    /// What it is taken to use, until it is written down what it did.
    reserved: Reserved,
}

impl Note {
    /// Of a job for this caller, whose credential goes no further.
    pub fn of(frontend: &Frontend, caller: Caller, job: &Job, reserved: Reserved) -> Note {
        Note {
            ledger: frontend.ledger.clone(),
            tenant: caller.name,
            key: caller.key,
            session: job.session.map(|session| session.to_string()),
            model: job.model.as_str().to_owned(),
            budgets: Arc::clone(&frontend.budgets),
            reserved,
        }
    }

    /// Tells the ledger how it ended. What comes back ends when that is on the disk; nobody's answer waits for it, and
    /// whatever is asked of the ledger after this is answered with it.
    pub fn write(
        self,
        spawned: &Spawned,
        level: Level,
        ending: &Ending,
        exit: Option<&Exit>,
        egress: &[Map<String, Value>],
    ) -> impl Future<Output = ()> + Send + use<> {
        let (status, outcome) = match ending {
            Ending::Done(done) => (200, done.stop_reason),
            Ending::Failed(error) => (error.status, error.code),
        };
        let mut counted = exit.map_or_else(Counted::default, |exit| Counted {
            wall_us: exit.wall_us,
            requests: exit.requests.into(),
            denials: exit.denials.into(),
            input_tokens: exit.input_tokens,
            output_tokens: exit.output_tokens,
            cache_write_tokens: exit.cache_write_tokens,
            cache_read_tokens: exit.cache_read_tokens,
            bytes_up: exit.bytes_up,
            bytes_down: exit.bytes_down,
            cost_microusd: 0,
        });
        counted.cost_microusd = self.budgets.terms().prices.cost(&counted, egress);
        let run = spawned.run.to_string();
        let record = RunRecord {
            run: run.clone(),
            tenant: self.tenant,
            key: self.key,
            session: self.session,
            model: self.model,
            level: level.name().into(),
            tier: spawned.tier.name().into(),
            outcome: outcome.into(),
            status,
            launch_us: spawned.launch_us,
            counted,
        };
        let noted = self.ledger.tell(Question::Record(Box::new(record)));
        // Whoever looks for usage from here on is answered with it.
        drop(self.reserved);
        async move {
            match timeout(NOTED_WAIT, noted).await {
                Ok(Ok(Ok(_)) | Err(_)) => {}
                _ => log::line("record_lost", &[("run", run.into())]),
            }
        }
    }
}
