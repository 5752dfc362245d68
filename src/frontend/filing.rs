//! Requests about files that are under way: what the operator may know of each, and the way to end it.
//! It must never know what is asked for: a file's name is its tenant's word.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use gaoler_protocol::{Kind, Level, RunId};

use super::runs::{Stage, Why};
use super::way::now_ms;

/// What such a request is.
#[derive(Debug, Clone)]
pub struct About {
    /// Its run.
    pub run: RunId,
    /// Whose it is.
    pub tenant: [u8; 32],
    /// The same, as the books have it.
    pub owner: String,
    /// The key that it was asked with.
    pub owner_key: Option<String>,
    /// Whose files, and whether it goes out.
    pub kind: Kind,
    /// Its level.
    pub level: Level,
    /// Milliseconds since 1970.
    pub asked_ms: u64,
}

/// One that is known for as long as it lives.
pub struct Filed {
    /// What it is.
    pub about: About,
    stage: Mutex<Stage>,
    ended: watch::Sender<Option<Why>>,
}

impl Filed {
    /// Where it is.
    pub fn stage(&self) -> Stage {
        *self.lock()
    }

    /// Ends it. The first word holds.
    pub fn end(&self, why: Why) {
        self.ended.send_if_modified(|ended| match ended {
            Some(_) => false,
            None => {
                *ended = Some(why);
                true
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All of them.
#[derive(Default)]
pub struct Filing {
    live: Mutex<HashMap<RunId, Arc<Filed>>>,
}

impl Filing {
    /// One more: its own end of it, and its asker's.
    pub fn add(self: &Arc<Self>, about: About) -> (Entry, Asking) {
        let (stage, ended) = (Mutex::new(Stage::Queued(None)), watch::Sender::new(None));
        let filed = Arc::new(Filed { about, stage, ended });
        self.lock().insert(filed.about.run, Arc::clone(&filed));
        let asking = Asking { filed: Arc::clone(&filed), answered: false };
        (Entry { filing: Arc::clone(self), filed }, asking)
    }

    /// Those for which this holds, the oldest first: for the operator alone.
    pub fn all(&self, is: impl Fn(&Filed) -> bool) -> Vec<Arc<Filed>> {
        let mut found: Vec<_> = self.lock().values().filter(|filed| is(filed)).cloned().collect();
        found.sort_by_key(|filed| (filed.about.asked_ms, filed.about.run));
        found
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RunId, Arc<Filed>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The run's own end of it. Dropped, nobody knows it any more.
pub struct Entry {
    filing: Arc<Filing>,
    filed: Arc<Filed>,
}

impl Entry {
    /// What it is.
    pub fn about(&self) -> &About {
        &self.filed.about
    }

    /// It waits, with this ticket.
    pub fn queued(&self, ticket: u64) {
        *self.filed.lock() = Stage::Queued(Some(ticket));
    }

    /// It runs.
    pub fn running(&self) {
        *self.filed.lock() = Stage::Running(now_ms());
    }

    /// Ends when it has to end. Safe to drop.
    pub fn unwanted(&self) -> impl Future<Output = Why> + Send + use<> {
        let mut ended = self.filed.ended.subscribe();
        async move {
            loop {
                if let Some(why) = *ended.borrow_and_update() {
                    return why;
                }
                if ended.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.filing.lock().remove(&self.filed.about.run);
    }
}

/// Whoever waits for the answer. Dropped before it came, they have gone away, and so does the run.
pub struct Asking {
    filed: Arc<Filed>,
    answered: bool,
}

impl Asking {
    /// The answer has come; what is left of it are bytes, and who takes those tells by itself.
    pub fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        if !self.answered {
            self.filed.end(Why::Gone);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(number: u8) -> About {
        let (owner, owner_key) = ("t".to_owned(), None);
        let (kind, level, asked_ms) = (Kind::Files, Level::Balanced, u64::from(10 - number));
        About { run: RunId([number; 16]), tenant: [1; 32], owner, owner_key, kind, level, asked_ms }
    }

    #[tokio::test]
    async fn a_request_is_known_while_it_lives_and_ends_by_the_first_word() {
        let filing = Arc::<Filing>::default();
        let (one, asking) = filing.add(about(1));
        let (two, gone) = filing.add(about(2));
        let runs = |filing: &Filing| -> Vec<u8> {
            filing.all(|_| true).iter().map(|filed| filed.about.run.0[0]).collect()
        };
        assert_eq!(runs(&filing), [2, 1], "the oldest first");
        two.queued(7);
        assert_eq!(filing.all(|filed| filed.stage() == Stage::Queued(Some(7))).len(), 1);
        filing.all(|filed| filed.about.run.0[0] == 1)[0].end(Why::Stopped);
        drop((asking, gone));
        assert_eq!((one.unwanted().await, two.unwanted().await), (Why::Stopped, Why::Gone));
        drop(one);
        assert_eq!(runs(&filing), [2]);
        // Who has an answer may go.
        let (three, asking) = filing.add(about(3));
        asking.answered();
        assert!(futures_util::FutureExt::now_or_never(three.unwanted()).is_none());
        drop((two, three));
        assert_eq!(runs(&filing), [0; 0]);
    }
}
