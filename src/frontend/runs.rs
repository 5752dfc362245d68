//! The runs that clients know by name: each has a bounded log of its answer that more than one reader can follow.
//! It must never show a run to another tenant, write anything to disk, or keep more than its bounds.

mod held;
pub mod http;
mod log;
pub mod reply;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::time::Instant;

use gaoler_protocol::{RunId, TenantKey};

use super::error::ApiError;

pub use self::http::routes;
use held::Held;
pub use log::{About, Entry, Finished, Log, Read, Reader, Share, Stage, Why, Writer};

/// Bytes of all logs and answers together, kept ones and those that are still being made. Where there are more, whoever
/// holds most has its kept answers forgotten, and its streams wait for their readers.
const HELD_BYTES_MAX: usize = 128 * 1024 * 1024;
/// The same where that did not help: an answer that is still being made cannot be made smaller. Whoever holds most has its
/// largest run ended.
const LIVE_BYTES_MAX: usize = HELD_BYTES_MAX + HELD_BYTES_MAX / 2;
/// Runs that have ended and are still known, of everybody and of one tenant. One takes some 2 KiB beside its answer.
const ENDED_MAX: usize = 4096;
const TENANT_ENDED_MAX: usize = 256;
/// The same of requests that were refused before anything ran. They have places of their own: a refusal costs its client
/// nothing, so a flood of them must not make anybody's runs forgotten.
const REFUSED_MAX: usize = 1024;
const TENANT_REFUSED_MAX: usize = 64;
/// How long an answer that somebody may come back for is kept, and a run is known after its end.
const KEPT: Duration = Duration::from_secs(15 * 60);
/// The same for an answer that was read to its end, where only an unnamed retry could ask for it again. A client
/// that has lost it asks again within 8 s: longer the official ones do not wait.
const KEPT_READ: Duration = Duration::from_secs(30);
/// Bytes of an idempotency key.
const KEY_BYTES_MAX: usize = 255;
/// How often what is too old is forgotten.
const SWEEP: Duration = Duration::from_secs(5);

/// How a request is found again.
#[derive(Debug, Clone)]
pub struct Asked {
    tenant: [u8; 32],
    /// What was asked for: path, headers that matter, body.
    body: [u8; 32],
    /// The client's own name for it, as a digest.
    key: Option<[u8; 32]>,
    /// The client says that it has asked before.
    again: bool,
    /// The client is one that asks again by itself.
    retries: bool,
}

impl Asked {
    /// What a request is known by. `parts` are its path and the headers that change its meaning.
    ///
    /// # Errors
    /// 400 for a key of a wrong form.
    pub fn new(
        headers: &::http::HeaderMap,
        parts: &[&[u8]],
        body: &[u8],
    ) -> Result<impl FnOnce(TenantKey) -> Asked + use<>, ApiError> {
        let key = headers.get("idempotency-key").map(|value| {
            let plain = value.as_bytes().iter().all(u8::is_ascii_graphic);
            match plain && (1..=KEY_BYTES_MAX).contains(&value.len()) {
                true => Ok(digest(&[value.as_bytes()])),
                false => Err(ApiError::invalid(format!(
                    "idempotency-key: must have 1 to {KEY_BYTES_MAX} visible ASCII characters."
                ))),
            }
        });
        let key = key.transpose()?;
        let count = headers.get("x-stainless-retry-count").and_then(|value| value.to_str().ok());
        let again = count.and_then(|count| count.parse::<u32>().ok()).is_some_and(|count| count > 0);
        let retries = headers.keys().any(|name| name.as_str().starts_with("x-stainless-"));
        let body = digest(&parts.iter().copied().chain([body]).collect::<Vec<_>>());
        Ok(move |tenant: TenantKey| Asked { tenant: tenant.0, body, key, again, retries })
    }
}

/// A digest of these texts, each with its length, so that none can run into the next.
fn digest(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Every run that a client can ask for.
#[derive(Default)]
pub struct Runs {
    state: Mutex<State>,
    held: Arc<Held>,
}

/// A tenant, and a digest of what it says.
type OfTenant = ([u8; 32], [u8; 32]);

#[derive(Default)]
struct State {
    runs: HashMap<RunId, Arc<Log>>,
    /// By a tenant's own name for a request: the run, and what was asked for.
    named: HashMap<OfTenant, (RunId, [u8; 32])>,
    /// By what was asked for: the run of the newest first attempt.
    first: HashMap<OfTenant, RunId>,
    /// Those that have ended, and those that were refused.
    ended: Known<ENDED_MAX, TENANT_ENDED_MAX>,
    refused: Known<REFUSED_MAX, TENANT_REFUSED_MAX>,
}

/// Runs that have ended, each tenant's in the order in which they did: so many of all and of each at most.
#[derive(Default)]
struct Known<const ALL_MAX: usize, const TENANT_MAX: usize> {
    all: usize,
    /// Those with a run, and no others.
    tenants: HashMap<[u8; 32], VecDeque<(Instant, RunId)>>,
}

impl<const ALL_MAX: usize, const TENANT_MAX: usize> Known<ALL_MAX, TENANT_MAX> {
    fn add(&mut self, tenant: [u8; 32], at: Instant, run: RunId) {
        self.tenants.entry(tenant).or_default().push_back((at, run));
        self.all += 1;
    }

    fn remove(&mut self, tenant: &[u8; 32], run: RunId) {
        let Some(own) = self.tenants.get_mut(tenant) else { return };
        let length = own.len();
        own.retain(|(_, one)| *one != run);
        self.all -= length - own.len();
        if own.is_empty() {
            self.tenants.remove(tenant);
        }
    }

    /// Whose runs are too many: this tenant's, or of all those who have most, and of them whose oldest is the oldest.
    fn crowded(&self, tenant: &[u8; 32]) -> Option<&VecDeque<(Instant, RunId)>> {
        let own = self.tenants.get(tenant).filter(|own| own.len() > TENANT_MAX);
        let oldest = |own: &VecDeque<(Instant, RunId)>| own.front().map(|(at, _)| *at);
        let most = || self.tenants.values().max_by_key(|own| (own.len(), std::cmp::Reverse(oldest(own))));
        own.or_else(|| if self.all > ALL_MAX { most() } else { None })
    }
}

/// What becomes of a request.
pub enum Entered {
    /// It repeats one whose run is there already.
    Joined(Reader),
    /// It is a run of its own.
    Begun(Writer, Reader),
}

impl Runs {
    /// Finds the run that a request was, or begins one: one step, so that of two who come together one joins.
    ///
    /// # Errors
    /// 409 where the name stands for another request.
    pub fn enter(self: &Arc<Self>, asked: &Asked, about: About) -> Result<Entered, ApiError> {
        let mut state = self.state();
        if let Some(found) = state.joined(asked)? {
            return Ok(Entered::Joined(Reader::new(found, 1)));
        }
        let run = about.run;
        let entry = Entry {
            about,
            tenant: asked.tenant,
            body: asked.body,
            key: asked.key,
            returns: asked.retries || asked.key.is_some(),
        };
        let log = Arc::new(Log::new(entry, Arc::clone(&self.held)));
        state.runs.insert(run, Arc::clone(&log));
        if let Some(key) = asked.key {
            state.named.insert((asked.tenant, key), (run, asked.body));
        }
        // A retry whose first attempt never came here is a first attempt.
        state.first.insert((asked.tenant, asked.body), run);
        let reader = Reader::new(Arc::clone(&log), 1);
        Ok(Entered::Begun(Writer::new(log, Arc::clone(self)), reader))
    }

    /// This tenant's run of this name.
    pub fn find(&self, tenant: &TenantKey, run: RunId) -> Option<Arc<Log>> {
        self.state().runs.get(&run).filter(|log| log.entry.tenant == tenant.0).cloned()
    }

    /// This tenant's runs, the newest first.
    pub fn of(&self, tenant: &TenantKey) -> Vec<Arc<Log>> {
        let state = self.state();
        let mut runs: Vec<_> =
            state.runs.values().filter(|log| log.entry.tenant == tenant.0).cloned().collect();
        runs.sort_by_key(|log| std::cmp::Reverse((log.entry.about.asked_ms, log.entry.about.run)));
        runs
    }

    /// Everybody's runs for which this holds, the oldest first: for the operator alone.
    pub fn all(&self, is: impl Fn(&Log) -> bool) -> Vec<Arc<Log>> {
        let mut runs: Vec<_> = self.state().runs.values().filter(|log| is(log)).cloned().collect();
        runs.sort_by_key(|log| (log.entry.about.asked_ms, log.entry.about.run));
        runs
    }

    /// Nothing may join this run any more; it is still known by its name.
    pub fn disown(&self, run: RunId) {
        self.state().disown(run);
    }

    /// Makes room where there are too many bytes: who holds most gives way. Whether this tenant has to wait for its readers.
    pub fn is_crowded(&self, tenant: &[u8; 32]) -> bool {
        if self.held.all() <= HELD_BYTES_MAX {
            return false;
        }
        let mut state = self.state();
        while let Some(heaviest) = self.held.heaviest() {
            let ended = state.ended_of(&heaviest);
            if ended.is_empty() {
                break;
            }
            for run in ended {
                state.forget(run);
                if self.held.all() <= HELD_BYTES_MAX {
                    return false;
                }
                if self.held.heaviest() != Some(heaviest) {
                    break;
                }
            }
        }
        let Some(heaviest) = self.held.heaviest() else { return false };
        state.end_largest(&heaviest, self.held.all().saturating_sub(LIVE_BYTES_MAX));
        heaviest == *tenant
    }

    /// Forgets what is too old or too much, from time to time, for ever.
    pub async fn sweep(&self) {
        loop {
            tokio::time::sleep(SWEEP).await;
            self.tidy(Instant::now());
        }
    }

    fn tidy(&self, now: Instant) {
        let mut state = self.state();
        let (mut released, mut old) = (Vec::new(), Vec::new());
        for (run, log) in &state.runs {
            let Some(at) = log.ended_at() else { continue };
            if now.duration_since(at) > log.keeps() {
                log.release();
                released.push(*run);
            }
            if now.duration_since(at) > KEPT {
                old.push(*run);
            }
        }
        released.into_iter().for_each(|run| state.disown(run));
        old.into_iter().for_each(|run| state.forget(run));
    }

    /// A run has ended, or was refused before anything ran: at once, and not when next there is time, what is too much is
    /// forgotten.
    fn ended(&self, log: &Log, refused: bool) {
        let Some(at) = log.ended_at() else { return };
        let (tenant, run) = (log.entry.tenant, log.entry.about.run);
        let mut state = self.state();
        match refused {
            true => state.refused.add(tenant, at, run),
            false => state.ended.add(tenant, at, run),
        }
        while let Some(victim) = state.superfluous(&tenant) {
            state.forget(victim);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is done under the lock cannot stop half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The run that this request is a repetition of.
    fn joined(&self, asked: &Asked) -> Result<Option<Arc<Log>>, ApiError> {
        let known = |run: &RunId| self.runs.get(run).filter(|log| !log.released()).cloned();
        if let Some(key) = asked.key {
            return match self.named.get(&(asked.tenant, key)) {
                Some((run, body)) if *body == asked.body => Ok(known(run)),
                Some((run, _)) if known(run).is_some() => Err(ApiError::new(
                    409,
                    "idempotency_conflict",
                    "idempotency-key: it stands for another request; use a new key for a new request.",
                )
                .final_word()),
                _ => Ok(None),
            };
        }
        let first = self.first.get(&(asked.tenant, asked.body)).filter(|_| asked.again);
        Ok(first.and_then(known))
    }

    fn forget(&mut self, run: RunId) {
        self.disown(run);
        if let Some(log) = self.runs.remove(&run) {
            // Who only waits for the word of its end hears it.
            if log.bytes() > 0 {
                log.cut()
            } else {
                log.release()
            }
            self.ended.remove(&log.entry.tenant, run);
            self.refused.remove(&log.entry.tenant, run);
        }
    }

    /// The run that is to be forgotten first where there are too many: one whose answer is not kept any more before one
    /// that somebody may still come back for.
    fn superfluous(&self, tenant: &[u8; 32]) -> Option<RunId> {
        let crowded = self.ended.crowded(tenant).or_else(|| self.refused.crowded(tenant))?;
        let is_released = |run: &RunId| self.runs.get(run).is_none_or(|log| log.released());
        let released = crowded.iter().find(|(_, run)| is_released(run));
        // One that somebody reads is found for as long as it takes memory.
        let is_spare = |run: &RunId| self.runs.get(run).is_none_or(|log| log.bytes() == 0 || !log.is_read());
        released.or_else(|| crowded.iter().find(|(_, run)| is_spare(run))).map(|(_, run)| *run)
    }

    fn disown(&mut self, run: RunId) {
        let Some(log) = self.runs.get(&run) else { return };
        let (tenant, body) = (log.entry.tenant, log.entry.body);
        if self.first.get(&(tenant, body)) == Some(&run) {
            self.first.remove(&(tenant, body));
        }
        if let Some(key) = log.entry.key
            && self.named.get(&(tenant, key)).is_some_and(|(named, _)| *named == run)
        {
            self.named.remove(&(tenant, key));
        }
    }

    /// This tenant's runs that have ended and hold something: those that nobody reads first, each from the oldest on.
    fn ended_of(&self, tenant: &[u8; 32]) -> Vec<RunId> {
        let own = self.runs.iter().filter(|(_, log)| log.entry.tenant == *tenant && log.bytes() > 0);
        let mut ended: Vec<_> =
            own.filter_map(|(run, log)| Some((log.is_read(), log.ended_at()?, *run))).collect();
        ended.sort();
        ended.into_iter().map(|(_, _, run)| run).collect()
    }

    /// Ends so many of this tenant's live runs, the largest first, that so many bytes are enough.
    fn end_largest(&self, tenant: &[u8; 32], mut more: usize) {
        let own = self.runs.values().filter(|log| log.entry.tenant == *tenant && log.ended_at().is_none());
        let mut live: Vec<_> = own.map(|log| (!log.is_cancelled(), log.bytes(), log)).collect();
        // Those that are about to end come first.
        live.sort_by_key(|(goes_on, bytes, log)| (*goes_on, std::cmp::Reverse(*bytes), log.entry.about.run));
        for (_, bytes, log) in live {
            if more == 0 {
                return;
            }
            log.cancel(Why::Crowded);
            more = more.saturating_sub(bytes);
        }
    }
}

#[cfg(test)]
mod tests;
