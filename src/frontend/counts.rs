//! What a run's egress tells while the run lives, read by a task of its own, and the end of what its tenant may use.
//! It must never leave egress' words unread, nor take one of the cage's for them.

use std::time::Duration;

use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::ledger::{self, Ledger};

use super::budget::Watch;
use super::error::ApiError;

/// Bytes of one read.
const READ_BYTES: usize = 4096;
/// How long a run may take to end by itself once its tenant has spent what it may: its last answer is told to its client.
const GRACE: Duration = Duration::from_secs(5);
/// Answers of the upstream that it may have meanwhile: the one that was under way, perhaps.
const ANSWERS_MAX: usize = 1;

/// What is left to a run.
#[derive(Debug, Clone, PartialEq)]
enum Left {
    /// Something, or there is no budget.
    Something,
    /// Nothing but its last word: where it goes on, this is why it ends.
    LastWord(ApiError),
    /// Nothing.
    Nothing(ApiError),
}

/// The task, as the run sees it. Dropped, it ends.
pub struct Counts {
    left: watch::Receiver<Left>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Ledger>,
}

impl Counts {
    /// Reads this pipe from now on, for this budget.
    pub fn begin(pipe: pipe::Receiver, budget: Option<Watch>) -> Counts {
        let (told, left) = watch::channel(Left::Something);
        let (stop, stopped) = oneshot::channel();
        Counts { left, stop, task: tokio::spawn(read(pipe, budget, told, stopped)) }
    }

    /// Ends when the run has to end for its tenant's budget: at once where it goes on, and else after a while. Safe to drop.
    pub fn spent(&self, goes_on: bool) -> impl Future<Output = ApiError> + Send + use<> {
        let mut left = self.left.clone();
        async move {
            loop {
                match &*left.borrow_and_update() {
                    Left::Nothing(error) => return error.clone(),
                    Left::LastWord(error) if goes_on => return error.clone(),
                    _ => {}
                }
                if left.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
        }
    }

    /// Why the run ends, where its tenant's budget is spent.
    pub fn why(&self) -> Option<ApiError> {
        match &*self.left.borrow() {
            Left::Something => None,
            Left::LastWord(error) | Left::Nothing(error) => Some(error.clone()),
        }
    }

    /// All that egress has told, once it has ended.
    pub async fn end(self) -> Ledger {
        let _ = self.stop.send(());
        self.task.await.unwrap_or_default()
    }
}

/// The pipe, and what came out of it.
struct Pipe {
    pipe: pipe::Receiver,
    ledger: Ledger,
    open: bool,
}

impl Pipe {
    /// The next lines; how many were about models. Never ends once nobody can write any more.
    async fn hear(&mut self, budget: Option<&Watch>) -> usize {
        let mut bytes = [0; READ_BYTES];
        loop {
            if !self.open {
                return std::future::pending().await;
            }
            let models = match self.pipe.readable().await.and_then(|()| self.pipe.try_read(&mut bytes)) {
                Ok(length @ 1..) => self.ledger.take(&bytes[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
                _ => {
                    self.open = false;
                    0
                }
            };
            if models > 0 {
                if let Some(budget) = budget {
                    budget.count(&self.ledger.models);
                }
                return models;
            }
        }
    }

    /// So many lines about models, and one more.
    async fn hear_beyond(&mut self, budget: Option<&Watch>, most: usize) {
        let mut heard = 0;
        while heard <= most {
            heard += self.hear(budget).await;
            // Whoever writes without a pause keeps nobody from their turn.
            tokio::task::yield_now().await;
        }
    }
}

async fn read(
    pipe: pipe::Receiver,
    budget: Option<Watch>,
    told: watch::Sender<Left>,
    mut stopped: oneshot::Receiver<()>,
) -> Ledger {
    let mut pipe = Pipe { pipe, ledger: Ledger::default(), open: true };
    let budget = budget.as_ref();
    let spent = async {
        match budget {
            Some(budget) => budget.spent().await,
            None => std::future::pending().await,
        }
    };
    let error = tokio::select! {
        biased;
        _ = &mut stopped => None,
        error = spent => Some(error),
        () = pipe.hear_beyond(budget, usize::MAX - 1) => None,
    };
    if let Some(error) = error {
        told.send_replace(Left::LastWord(error.clone()));
        let is_stopped = tokio::select! {
            biased;
            _ = &mut stopped => true,
            () = tokio::time::sleep(GRACE) => false,
            () = pipe.hear_beyond(budget, ANSWERS_MAX) => false,
        };
        told.send_replace(Left::Nothing(error));
        if !is_stopped {
            // What it does until its end counts like the rest.
            tokio::select! {
                biased;
                _ = stopped => {}
                () = pipe.hear_beyond(budget, usize::MAX - 1) => {}
            }
        }
    }
    // Its writer is gone, or as good as gone: what is there is all. The kernel is asked, for the runtime may not know yet.
    ledger::rest(&mut pipe.ledger, |bytes| nix::unistd::read(&pipe.pipe, bytes).ok());
    if let Some(budget) = budget {
        budget.count(&pipe.ledger.models);
    }
    pipe.ledger
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use futures_util::FutureExt;

    use super::super::budget;
    use super::super::ledger::Ledger as Books;
    use super::*;

    /// Turns of everybody else.
    const TURNS: usize = 100;

    /// Waits until so much is counted, and everybody has thought of it.
    async fn counted(run: &budget::Reserved, tokens: u64) {
        while run.used() != tokens {
            tokio::task::yield_now().await;
        }
        for _ in 0..TURNS {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_run_whose_budget_is_spent_ends_where_it_goes_on_and_by_its_second_answer_since() {
        let (pipe, mut egress) = std::io::pipe().expect("a pipe");
        let run = budget::of_a_test(100);
        let pipe = pipe::Receiver::from_owned_fd(pipe.into()).expect("a pipe");
        let counts = Counts::begin(pipe, Some(run.watch(Books::nobody())));
        let mut tell = |tokens: u64| {
            writeln!(egress, "{{\"model\":\"a\",\"input_tokens\":{tokens}}}").expect("written");
        };
        let goes_on = tokio::spawn(counts.spent(true));
        let ends = tokio::spawn(counts.spent(false));
        tell(99);
        counted(&run, 99).await;
        assert!(!goes_on.is_finished() && counts.why().is_none(), "one token is left");
        tell(100);
        assert_eq!(goes_on.await.expect("no panic").code, "budget_exhausted");
        assert!(counts.spent(true).now_or_never().is_some() && counts.why().is_some());
        tell(110);
        counted(&run, 110).await;
        assert!(!ends.is_finished(), "its last answer may be on its way to its client");
        tell(120);
        assert_eq!(ends.await.expect("no panic").code, "budget_exhausted");
        // What comes until its end counts.
        tell(130);
        let ledger = counts.end().await;
        assert_eq!((ledger.models.len(), &ledger.models[0]["input_tokens"]), (1, &130.into()));
    }

    #[tokio::test]
    async fn a_run_without_a_budget_is_read_to_its_end_and_never_ended() {
        let (pipe, mut egress) = std::io::pipe().expect("a pipe");
        let pipe = pipe::Receiver::from_owned_fd(pipe.into()).expect("a pipe");
        let counts = Counts::begin(pipe, Some(budget::of_a_test(0).watch(Books::nobody())));
        // More than the pipe holds: it is read meanwhile.
        let writing = tokio::task::spawn_blocking(move || {
            for tokens in 0..5000 {
                writeln!(egress, "{{\"model\":\"a\",\"input_tokens\":{tokens}}}").expect("written");
            }
            egress.write_all(b"{\"host\":\"h\"}\n").expect("written");
        });
        writing.await.expect("no panic");
        assert!(counts.spent(true).now_or_never().is_none());
        let ledger = counts.end().await;
        assert_eq!((&ledger.models[0]["input_tokens"], ledger.destinations.len()), (&4999.into(), 1));
    }
}
