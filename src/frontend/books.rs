//! What is remembered of a run: whose it was, how it ended, and what egress and the supervisor counted.
//! It must never take a figure from the cage: whatever comes out of there is the tenant's claim.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use gaoler_ledger_wire::{Counted, Question, RunRecord};
use gaoler_protocol::{Exit, Level, Spawned};

use super::answer::Ending;
use super::budget::{Budgets, Reserved, Watch};
use super::identity::Caller;
use super::job::Job;
use super::ledger::Ledger;
use super::{Frontend, log, prices};
use crate::ledger::Ledger as Egress;

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
    /// What it is taken to use, until it is written down what it did; none for what asks no model.
    reserved: Option<Reserved>,
}

impl Note {
    /// Of a job for this caller, whose credential goes no further.
    pub fn of(frontend: &Frontend, caller: Caller, job: &Job, reserved: Reserved) -> Note {
        Note {
            session: job.session.map(|session| session.to_string()),
            model: job.model.as_str().to_owned(),
            reserved: Some(reserved),
            ..Note::of_no_model(frontend, caller.name, caller.key)
        }
    }

    /// Of a run of this tenant's that asks no model, with the key that it was asked with.
    pub fn of_no_model(frontend: &Frontend, tenant: String, key: Option<String>) -> Note {
        let (ledger, budgets) = (frontend.ledger.clone(), Arc::clone(&frontend.budgets));
        Note { ledger, tenant, key, session: None, model: String::new(), budgets, reserved: None }
    }

    /// The same of one that could ask one, with what its tenant has left.
    pub fn of_a_probe(frontend: &Frontend, tenant: String, key: Option<String>, reserved: Reserved) -> Note {
        Note { reserved: Some(reserved), ..Note::of_no_model(frontend, tenant, key) }
    }

    /// What the run is counted against while it lives.
    pub fn watch(&self) -> Option<Watch> {
        self.reserved.as_ref().map(|reserved| reserved.watch(self.ledger.clone()))
    }

    /// Tells the ledger how it ended, with a status and a word. What comes back ends when that is on the disk; nobody's
    /// answer waits for it, and whatever is asked of the ledger after this is answered with it.
    pub fn write(
        self,
        spawned: &Spawned,
        level: Level,
        (status, outcome): (u16, &str),
        exit: Option<&Exit>,
        egress: &Egress,
    ) -> impl Future<Output = ()> + Send + use<> {
        // Without a word of the run's end there is what egress has told so far.
        let mut counted = exit.map_or_else(
            || prices::counted(&egress.models),
            |exit| Counted {
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
            },
        );
        counted.cost_microusd = self.budgets.terms().prices.cost(&counted, &egress.models);
        if self.reserved.is_none() {
            // It goes to other hosts than the upstream, and to those alone.
            let sum = |name: &str| {
                let figures = egress.destinations.iter().filter_map(|line| line.get(name)?.as_u64());
                figures.fold(0, u64::saturating_add)
            };
            counted.bytes_up = counted.bytes_up.saturating_add(sum("bytes_up"));
            counted.bytes_down = counted.bytes_down.saturating_add(sum("bytes_down"));
        }
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
                Ok(Some(Ok(_))) => {}
                _ => log::line("record_lost", &[("run", run.into())]),
            }
        }
    }
}

/// How a run for a message ended, in a record's words.
pub fn told(ending: &Ending) -> (u16, &'static str) {
    match ending {
        Ending::Done(done) => (200, done.stop_reason),
        Ending::Failed(error) => (error.status, error.code),
    }
}
