//! One run's answer as a log: one writer, readers that come and go, each from where it likes.
//! It must never let a reader that takes nothing hold its run for ever, nor lose a step that a reader waits for.

use std::collections::{HashMap, VecDeque};
use std::io::BufRead;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use gaoler_protocol::{Level, RunId};

use super::held::Held;
use super::{LIVE_BYTES_MAX, Runs};
use crate::frontend::answer::{Answer, Ending};
use crate::frontend::dialect::Dialect;
use crate::frontend::error::ApiError;
use crate::frontend::job::{OnDisconnect, Shape};

/// Bytes of one run's log.
const LOG_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes that a reader may leave unread where all logs together are full, and its tenant holds most.
const CROWDED_BYTES_MAX: usize = 64 * 1024;
/// Bytes that a reader is handed at once, but for an event that is larger: what its connection holds is in no account.
const PIECE_BYTES_MAX: usize = 64 * 1024;
/// What an event costs beside its bytes: its place in a list that has grown, and what the allocator and its owners' count
/// take.
const EVENT_COST: usize = 128;
/// How long a reader may take nothing while the log is full before it counts as gone.
const READER_WAIT: Duration = Duration::from_secs(120);
/// The same where all logs together are full, and its tenant holds most.
const CROWDED_WAIT: Duration = Duration::from_secs(10);
/// How long a run goes on without a reader where its client asks again by itself. The official clients wait 8 s
/// between two attempts, at most.
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// What a run is, as its request says it.
#[derive(Debug, Clone)]
pub struct About {
    /// The run.
    pub run: RunId,
    /// Whose it is, as the books have it.
    pub owner: String,
    /// The key that it was asked with.
    pub owner_key: Option<String>,
    /// The dialect of its answer.
    pub dialect: Dialect,
    /// Its shape.
    pub shape: Shape,
    /// The session, where it has one.
    pub session: Option<Uuid>,
    /// The model that was asked for.
    pub model: String,
    /// Its level.
    pub level: Level,
    /// What a client's going away means.
    pub on_disconnect: OnDisconnect,
    /// The client wants to come back by event ids.
    pub ids: bool,
    /// Milliseconds since 1970.
    pub asked_ms: u64,
}

/// A run that is known.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What it is.
    pub about: About,
    /// Whose.
    pub tenant: [u8; 32],
    /// What was asked for, as a digest.
    pub body: [u8; 32],
    /// Its client's own name for it, as a digest.
    pub key: Option<[u8; 32]>,
    /// Its client may come back by itself.
    pub returns: bool,
}

/// How a run ended.
pub struct Finished {
    /// What there is of the answer; `None` where there was never a run.
    pub answer: Option<Answer>,
    /// How.
    pub ending: Ending,
    /// When, milliseconds since 1970.
    pub at_ms: u64,
}

/// Why a run has to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Nobody is left who waits for it.
    Gone,
    /// Its tenant said so.
    Cancelled,
    /// The operator said so.
    Stopped,
    /// All answers take too much memory, its tenant's most, and it most of those.
    Crowded,
}

impl Why {
    /// What whoever still listens is told.
    pub fn error(self) -> ApiError {
        match self {
            Why::Gone => ApiError::new(499, "client_gone", "The client went away."),
            Why::Cancelled => ApiError::internal("cancelled", "The run was cancelled.").final_word(),
            Why::Stopped => {
                let message = "The operator of this server ended the run.";
                ApiError::internal("cancelled_by_operator", message).final_word()
            }
            Why::Crowded => {
                let most = LIVE_BYTES_MAX / (1024 * 1024);
                let message = format!(
                    "All answers together take more than {most} MiB, yours most of it: your largest run was ended."
                );
                ApiError::internal("output_limit", message).final_word()
            }
        }
    }
}

/// What an answer that has ended becomes for its readers, where it was not written as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A body.
    Body,
    /// The events that it would have been, but for the last ones.
    Events,
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It waits for a place; its ticket, once it has one.
    Queued(Option<u64>),
    /// It runs, since then (milliseconds since 1970).
    Running(u64),
    /// It has ended.
    Ended,
}

/// Whether a run is to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Somebody reads it, or it needs nobody.
    Yes,
    /// Nobody reads it, and nobody may come back after this.
    Until(Instant),
    /// It is not.
    No(Why),
}

/// The log.
pub struct Log {
    /// Whose it is and what for.
    pub entry: Entry,
    held: Arc<Held>,
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
}

struct Inner {
    stage: Stage,
    headers: HeaderMap,
    begun: bool,
    /// The number of the first event that is kept; they count from 1.
    first: u64,
    events: VecDeque<Bytes>,
    bytes: usize,
    /// Readers, and the event that each wants next.
    readers: HashMap<u64, u64>,
    tickets: u64,
    /// Since when there has been no reader.
    left: Instant,
    /// Somebody has ended it.
    cancelled: Option<Why>,
    /// Somebody has read it to the end.
    read: bool,
    finished: Option<(Arc<Finished>, Instant)>,
    /// What the answer takes beside its events, from its beginning on.
    answer_bytes: usize,
    /// What it became for its readers: each form once, whoever many read it.
    rendered: [Option<Bytes>; 2],
    /// What its CLI's words take that are no answer yet.
    heard_bytes: usize,
    released: bool,
}

impl Log {
    pub(super) fn new(entry: Entry, held: Arc<Held>) -> Log {
        let inner = Inner {
            stage: Stage::Queued(None),
            headers: HeaderMap::new(),
            begun: false,
            first: 1,
            events: VecDeque::new(),
            bytes: 0,
            readers: HashMap::new(),
            tickets: 0,
            left: Instant::now(),
            cancelled: None,
            read: false,
            finished: None,
            answer_bytes: 0,
            rendered: [None, None],
            heard_bytes: 0,
            released: false,
        };
        Log { entry, held, inner: Mutex::new(inner), changed: watch::Sender::new(()) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is.
    pub fn stage(&self) -> Stage {
        self.inner().stage
    }

    /// How it ended, if it has.
    pub fn finished(&self) -> Option<Arc<Finished>> {
        self.inner().finished.as_ref().map(|(finished, _)| Arc::clone(finished))
    }

    /// The number of its newest event.
    pub fn newest(&self) -> u64 {
        let inner = self.inner();
        inner.first + inner.events.len() as u64 - 1
    }

    /// The number of the first event that a reader can still have.
    pub fn keeps_from(&self) -> u64 {
        let inner = self.inner();
        match (inner.released, self.entry.about.shape) {
            (true, _) => u64::MAX,
            // All of them are made when it ends.
            (false, Shape::Json) => 1,
            (false, Shape::Events) => inner.first,
        }
    }

    /// What the head of its answer says of the run.
    pub fn headers(&self) -> HeaderMap {
        self.inner().headers.clone()
    }

    /// Ends it, whoever reads. Nothing happens to one that has ended.
    pub fn cancel(&self, why: Why) {
        self.inner().cancelled.get_or_insert(why);
        self.changed.send_replace(());
    }

    /// Whether it is to go on.
    pub(super) fn wanted(&self) -> Wanted {
        let (inner, entry) = (self.inner(), &self.entry);
        match (inner.cancelled, inner.readers.is_empty(), entry.about.on_disconnect) {
            (Some(why), ..) => Wanted::No(why),
            (None, true, OnDisconnect::Cancel) if entry.returns => Wanted::Until(inner.left + GRACE),
            (None, true, OnDisconnect::Cancel) => Wanted::No(Why::Gone),
            _ => Wanted::Yes,
        }
    }

    /// Gives up the readers that the oldest event waits for.
    pub(super) fn give_up(&self) {
        let mut inner = self.inner();
        let first = inner.first;
        inner.readers.retain(|_, next| *next > first);
        if inner.readers.is_empty() {
            inner.left = Instant::now();
        }
        drop(inner);
        self.changed.send_replace(());
    }

    pub(super) fn ended_at(&self) -> Option<Instant> {
        self.inner().finished.as_ref().map(|(_, at)| *at)
    }

    /// How long after its end its answer is kept.
    pub(super) fn keeps(&self) -> Duration {
        let (entry, read) = (&self.entry, self.inner().read);
        let asked_to =
            entry.key.is_some() || entry.about.ids || entry.about.on_disconnect == OnDisconnect::Continue;
        match (asked_to, entry.returns, read) {
            (true, ..) | (false, true, false) => super::KEPT,
            (false, true, true) => super::KEPT_READ,
            (false, false, _) => Duration::ZERO,
        }
    }

    /// Bytes that it holds.
    pub(super) fn bytes(&self) -> usize {
        self.inner().held()
    }

    /// Whether somebody reads it.
    pub(super) fn is_read(&self) -> bool {
        !self.inner().readers.is_empty()
    }

    /// Whether somebody has ended it.
    pub(super) fn is_cancelled(&self) -> bool {
        self.inner().cancelled.is_some()
    }

    /// Lets go of the answer, whoever reads it: those are told that it is not kept.
    pub(super) fn cut(&self) {
        let mut inner = self.inner();
        if inner.finished.is_some() {
            inner.readers.clear();
        }
        drop(inner);
        self.release();
        self.changed.send_replace(());
    }

    /// Whether its answer is not kept any more.
    pub(super) fn released(&self) -> bool {
        self.inner().released
    }

    /// Lets go of the answer. Whoever reads it now reads what they hold.
    pub(super) fn release(&self) {
        let mut inner = self.inner();
        // A live one's writer still needs it.
        if inner.finished.is_none() || !inner.readers.is_empty() || inner.released {
            return;
        }
        inner.released = true;
        inner.first += inner.events.len() as u64;
        inner.events = VecDeque::new();
        if let Some((finished, _)) = &mut inner.finished {
            let ending = finished.ending.clone();
            *finished = Arc::new(Finished { answer: None, ending, at_ms: finished.at_ms });
        }
        let bytes = inner.held();
        (inner.bytes, inner.answer_bytes, inner.heard_bytes) = (0, 0, 0);
        inner.rendered = [None, None];
        self.held.change(&self.entry.tenant, 0, bytes);
    }

    /// Drops the oldest event that no reader waits for; whether there was one.
    fn drop_oldest(&self, inner: &mut Inner) -> bool {
        if inner.readers.values().any(|next| *next <= inner.first) {
            return false;
        }
        let Some(event) = inner.events.pop_front() else { return false };
        inner.first += 1;
        let bytes = event.len() + EVENT_COST;
        inner.bytes -= bytes;
        self.held.change(&self.entry.tenant, 0, bytes);
        true
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.held.change(&self.entry.tenant, 0, inner.held());
    }
}

impl Inner {
    /// Bytes of memory.
    fn held(&self) -> usize {
        let rendered: usize = self.rendered.iter().flatten().map(Bytes::len).sum();
        self.bytes + self.answer_bytes + self.heard_bytes + rendered
    }
}

/// The account of a run, for whoever hears its CLI.
pub struct Share {
    log: Arc<Log>,
    runs: Arc<Runs>,
}

impl Share {
    /// What the CLI has said takes so many bytes, and is no answer yet.
    pub fn hears(&self, bytes: usize) {
        let mut inner = self.log.inner();
        let before = std::mem::replace(&mut inner.heard_bytes, bytes);
        self.log.held.change(&self.log.entry.tenant, bytes, before);
        drop(inner);
        if bytes > before {
            self.runs.is_crowded(&self.log.entry.tenant);
        }
    }
}

/// The run's own end of its log. Dropped without an ending, it ends the log as lost.
pub struct Writer {
    log: Arc<Log>,
    runs: Arc<Runs>,
}

impl Writer {
    pub(super) fn new(log: Arc<Log>, runs: Arc<Runs>) -> Writer {
        Writer { log, runs }
    }

    /// What the run is.
    pub fn about(&self) -> &About {
        &self.log.entry.about
    }

    /// The account that what is heard of the CLI goes to.
    pub fn share(&self) -> Share {
        Share { log: Arc::clone(&self.log), runs: Arc::clone(&self.runs) }
    }

    /// The answer takes so many bytes by now.
    pub fn holds(&self, bytes: usize) {
        let mut inner = self.log.inner();
        let before = std::mem::replace(&mut inner.answer_bytes, bytes);
        self.log.held.change(&self.log.entry.tenant, bytes, before);
    }

    /// Whether it is to go on.
    #[cfg(test)]
    pub(super) fn wanted(&self) -> Wanted {
        self.log.wanted()
    }

    /// It waits, with this ticket.
    pub fn queued(&self, ticket: u64) {
        self.log.inner().stage = Stage::Queued(Some(ticket));
    }

    /// It runs, and its answer has these fields in its head.
    pub fn running(&self, now_ms: u64, headers: HeaderMap) {
        let mut inner = self.log.inner();
        (inner.stage, inner.headers) = (Stage::Running(now_ms), headers);
    }

    /// Ends when the run has to stop: cancelled, or nobody waits for it and nobody may come back. Safe to drop.
    pub async fn unwanted(&self) -> Why {
        let mut changed = self.log.changed.subscribe();
        loop {
            changed.borrow_and_update();
            match self.log.wanted() {
                Wanted::No(why) => return why,
                Wanted::Until(at) if at <= Instant::now() => return Why::Gone,
                Wanted::Until(at) => drop(timeout_at(at, changed.changed()).await),
                Wanted::Yes => drop(changed.changed().await),
            }
        }
    }

    /// Adds what an answer's steps became, each event by itself; empty = a sign that it has begun. Waits for
    /// readers while the log is full.
    ///
    /// # Errors
    /// Nobody is left to write for.
    pub async fn write(&self, events: Bytes) -> Result<(), Why> {
        self.append(&events);
        let mut changed = self.log.changed.subscribe();
        let since = Instant::now();
        loop {
            changed.borrow_and_update();
            // Asked before our own lock is taken: it looks into other runs' logs.
            let (keep, wait, patience) = match self.runs.is_crowded(&self.log.entry.tenant) {
                false => (LOG_BYTES_MAX, LOG_BYTES_MAX, READER_WAIT),
                true => (0, CROWDED_BYTES_MAX, CROWDED_WAIT),
            };
            {
                let mut inner = self.log.inner();
                while inner.bytes > keep && self.log.drop_oldest(&mut inner) {}
                if inner.bytes <= wait {
                    return Ok(());
                }
            }
            tokio::select! {
                biased;
                why = self.unwanted() => return Err(why),
                waited = timeout_at(since + patience, changed.changed()) => if waited.is_err() {
                    // Whoever has taken nothing for so long is gone.
                    self.log.give_up();
                },
            }
        }
    }

    fn append(&self, events: &Bytes) {
        let mut inner = self.log.inner();
        inner.begun = true;
        let mut at = 0;
        while let Some(length) = event_of(&events[at..]) {
            // JSON has no line break inside a string, so this is an event's end and nothing else. Each has memory of its own:
            // a part of the whole would keep the whole, and what it grew by.
            let event = Bytes::copy_from_slice(&events[at..at + length]);
            at += length;
            let bytes = event.len() + EVENT_COST;
            inner.bytes += bytes;
            self.log.held.change(&self.log.entry.tenant, bytes, 0);
            inner.events.push_back(event);
        }
        drop(inner);
        self.log.changed.send_replace(());
    }

    /// The end. `answer` is what there is of it.
    pub fn end(self, answer: Option<Answer>, ending: Ending, now_ms: u64) {
        if let (Some(answer), Ending::Done(done), Shape::Events) = (&answer, &ending, self.about().shape) {
            self.append(&self.about().dialect.ending(answer, done));
        }
        let again = match (&ending, &answer) {
            // Nothing has come of it: whoever asks again asks for the first time.
            (_, None) => true,
            (Ending::Failed(error), _) => error.should_retry != Some(false),
            (Ending::Done(_), _) => false,
        };
        let refused = answer.is_none();
        self.finish(answer, ending, now_ms, refused);
        match again {
            true => self.runs.disown(self.about().run),
            false => drop(self.runs.is_crowded(&self.log.entry.tenant)),
        }
    }

    fn finish(&self, answer: Option<Answer>, ending: Ending, at_ms: u64, refused: bool) {
        let mut inner = self.log.inner();
        inner.stage = Stage::Ended;
        let before = inner.held();
        (inner.answer_bytes, inner.heard_bytes) = (answer.as_ref().map_or(0, Answer::bytes), 0);
        self.log.held.change(&self.log.entry.tenant, inner.held(), before);
        inner.finished = Some((Arc::new(Finished { answer, ending, at_ms }), Instant::now()));
        drop(inner);
        self.log.changed.send_replace(());
        if self.log.keeps() == Duration::ZERO {
            self.log.release();
        }
        self.runs.ended(&self.log, refused);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.log.inner().finished.is_none() {
            let error = ApiError::internal("run_lost", "The run ended and no word of it came.");
            // Something may have run.
            self.finish(None, Ending::Failed(error), crate::frontend::way::now_ms(), false);
            self.runs.disown(self.about().run);
        }
    }
}

/// Bytes of the event that these begin with, its end included.
pub(super) fn event_of(bytes: &[u8]) -> Option<usize> {
    let mut rest = bytes;
    while rest.skip_until(b'\n').is_ok_and(|length| length > 0) {
        if rest.first() == Some(&b'\n') {
            return Some(bytes.len() - rest.len() + 1);
        }
    }
    None
}

/// What a reader gets.
pub enum Read {
    /// The answer has begun, and has no events to show for it.
    Begun,
    /// Events, with the number of the first.
    Events(u64, Vec<Bytes>),
    /// The end, after all events.
    End(Arc<Finished>),
    /// What comes next is not kept any more.
    Missing,
}

/// Somebody who follows a run. Where nobody does, it may be ended.
pub struct Reader {
    log: Arc<Log>,
    number: u64,
    next: u64,
    has_begun: bool,
    changed: watch::Receiver<()>,
}

impl Reader {
    /// Follows from this event on.
    pub fn new(log: Arc<Log>, next: u64) -> Reader {
        let changed = log.changed.subscribe();
        let mut inner = log.inner();
        inner.tickets += 1;
        let number = inner.tickets;
        // A JSON answer has no events that could be waited for.
        let waits_for = if log.entry.about.shape == Shape::Events { next } else { u64::MAX };
        inner.readers.insert(number, waits_for);
        drop(inner);
        log.changed.send_replace(());
        Reader { log, number, next, has_begun: false, changed }
    }

    /// What it follows.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// This form of an answer that has ended, made once for all who read it. It is the log's: what a reader holds of it while
    /// its connection takes nothing is in no account.
    pub(super) fn render(&self, form: Form, make: impl FnOnce() -> Bytes) -> Bytes {
        if let Some(made) = &self.log.inner().rendered[form as usize] {
            return made.clone();
        }
        let made = Bytes::copy_from_slice(&make());
        let mut inner = self.log.inner();
        if inner.readers.contains_key(&self.number) && !inner.released {
            let before = inner.held();
            inner.rendered[form as usize] = Some(made.clone());
            self.log.held.change(&self.log.entry.tenant, inner.held(), before);
        }
        made
    }

    /// A piece of it from here on, with memory of its own; empty at its end. `None` where the answer is not kept any more.
    pub(super) fn piece(&self, form: Form, at: usize) -> Option<Bytes> {
        let inner = self.log.inner();
        let rest = inner.rendered[form as usize].as_ref()?.get(at..)?;
        Some(Bytes::copy_from_slice(&rest[..rest.len().min(PIECE_BYTES_MAX)]))
    }

    /// What comes next. Safe to drop while it waits.
    pub async fn read(&mut self) -> Read {
        loop {
            self.changed.borrow_and_update();
            if let Some(read) = self.look() {
                return read;
            }
            // The log has its own sender, so this ends with a change.
            let _ = self.changed.changed().await;
        }
    }

    fn look(&mut self) -> Option<Read> {
        let mut inner = self.log.inner();
        let newest = inner.first + inner.events.len() as u64;
        let ended = inner.finished.as_ref().map(|(finished, _)| Arc::clone(finished));
        // A reader that was given up, or that wants what is gone.
        if !inner.readers.contains_key(&self.number) || (self.next < inner.first && !self.is_json()) {
            return Some(Read::Missing);
        }
        if self.next < newest && !self.is_json() {
            let skip = (self.next - inner.first) as usize;
            let mut events: Vec<Bytes> = Vec::new();
            let mut bytes = 0;
            for event in inner.events.range(skip..) {
                bytes += event.len();
                if bytes > PIECE_BYTES_MAX && !events.is_empty() {
                    break;
                }
                events.push(event.clone());
            }
            let next = self.next + events.len() as u64;
            let first = std::mem::replace(&mut self.next, next);
            inner.readers.insert(self.number, next);
            drop(inner);
            self.log.changed.send_replace(());
            self.has_begun = true;
            return Some(Read::Events(first, events));
        }
        if let Some(finished) = ended {
            inner.read = true;
            return Some(Read::End(finished));
        }
        if inner.begun && !self.has_begun {
            self.has_begun = true;
            return Some(Read::Begun);
        }
        None
    }

    fn is_json(&self) -> bool {
        self.log.entry.about.shape == Shape::Json
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut inner = self.log.inner();
        inner.readers.remove(&self.number);
        if inner.readers.is_empty() {
            inner.left = Instant::now();
        }
        let ended = inner.finished.is_some();
        drop(inner);
        self.log.changed.send_replace(());
        if ended && self.log.keeps() == Duration::ZERO {
            self.log.release();
        }
    }
}
