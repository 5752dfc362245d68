//! Who is connected, and who makes room where there is none: a connection without a request, or with one of which nobody
//! knows yet whom it is from, of the address with the most of those. It must never end one that carries a request of
//! somebody known while there are others, nor keep one of a quiet address waiting for a loud one.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::rates;

/// How long a connection has been without a request, at least, before it makes room: its first one may be on its way, and
/// so may the last one's answer.
const IDLE_MIN: Duration = Duration::from_millis(100);
/// How long to wait for room between two looks at who could make it.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Places that only addresses with few connections can take: whoever looks whether the server is alive, the operator,
/// and a tenant who comes, however many knock at the same moment.
const RESERVED: usize = 64;
/// Connections of an address that has few.
const FEW: usize = 8;
/// Connections that wait for a place at a time. One more is closed: a queue of any length would cost descriptors, and
/// whoever comes after it would wait for all of them.
const WAITING_MAX: usize = 256;

/// A connection's state where it carries a request that is not to be ended.
const CARRIES: u64 = 0;
/// Where it is about to end: it takes no request any more.
const ENDS: u64 = u64::MAX;

/// What a connection does that may be ended for another; what comes first is ended first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It waits for a head, or for the rest of one.
    Waits = 0,
    /// It has a request of a stranger, whose body comes.
    Stranger = 1,
    /// It has one of somebody known, whose body comes.
    Known = 2,
}

/// All connections.
pub struct Crowd {
    all: Mutex<HashMap<u64, Arc<Connection>>>,
    entered: AtomicU64,
    waiting: AtomicUsize,
    max: usize,
    left: Notify,
    begun: Instant,
}

/// One of them.
pub struct Connection {
    /// Whose it is.
    pub address: IpAddr,
    /// `CARRIES`, `ENDS`, or its stage in the lower two bits and above them since when, in milliseconds from when the
    /// crowd began.
    state: AtomicU64,
    has_asked: AtomicBool,
    is_known: AtomicBool,
    begun: Instant,
    task: OnceLock<AbortHandle>,
}

/// A connection's place in the crowd, which it has until this is dropped.
pub struct Place {
    crowd: Arc<Crowd>,
    number: u64,
    connection: Arc<Connection>,
}

/// A request that a connection carries, until its answer has been handed over.
pub struct Carried(Arc<Connection>);

/// A request that may be ended for another's, until this is dropped.
pub struct Exposed(Arc<Connection>);

tokio::task_local! {
    /// The connection whose request a task serves.
    pub static SERVED: Arc<Connection>;
}

/// Whoever asks on the connection that this task serves has shown a key or credential that is known to be good.
pub fn is_known() {
    let _ = SERVED.try_with(|connection| connection.is_known.store(true, Ordering::Relaxed));
}

impl Crowd {
    /// Nobody yet, and so many at most, beside those of addresses that have few.
    pub fn new(max: usize) -> Arc<Crowd> {
        let (entered, waiting) = (AtomicU64::new(0), AtomicUsize::new(0));
        Arc::new(Crowd {
            all: Mutex::default(),
            entered,
            waiting,
            max,
            left: Notify::new(),
            begun: Instant::now(),
        })
    }

    /// A place for a connection of this address, where there is one at once, or somebody makes room who is not needed.
    pub fn try_enter(self: &Arc<Crowd>, address: IpAddr) -> Option<Place> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let of = rates::place(address);
        let own = |all: &HashMap<u64, Arc<Connection>>| {
            all.values().filter(|other| rates::place(other.address) == of).count()
        };
        if all.len() >= self.max {
            let has_few = own(&all) < FEW;
            if let Some((connection, state)) = self.first_to_go(&all) {
                connection.end(state);
            }
            if !has_few || all.len() >= self.max + RESERVED {
                return None;
            }
        }
        let state = AtomicU64::new(state_of(Stage::Waits, since(self.begun)));
        let (has_asked, is_known) = (AtomicBool::new(false), AtomicBool::new(false));
        let (begun, task) = (self.begun, OnceLock::new());
        let connection = Arc::new(Connection { address, state, has_asked, is_known, begun, task });
        let number = self.entered.fetch_add(1, Ordering::Relaxed);
        all.insert(number, Arc::clone(&connection));
        Some(Place { crowd: Arc::clone(self), number, connection })
    }

    /// The same as soon as there is one; `None` where too many wait for that already.
    pub async fn enter(self: &Arc<Crowd>, address: IpAddr) -> Option<Place> {
        let waits = Waits::begin(self)?;
        loop {
            let mut left = std::pin::pin!(self.left.notified());
            left.as_mut().enable();
            if let Some(place) = self.try_enter(address) {
                drop(waits);
                return Some(place);
            }
            let _ = timeout(LOOK_EVERY, left).await;
        }
    }

    /// Of the address with the most connections that may be ended the one that is needed least, and its state.
    fn first_to_go(&self, all: &HashMap<u64, Arc<Connection>>) -> Option<(Arc<Connection>, u64)> {
        // Where it is too early for the loudest address, it is for every other one too.
        let before = since(self.begun).checked_sub(IDLE_MIN.as_millis() as u64)?;
        let first = |stages: &[Stage]| {
            let mut of_addresses = HashMap::<u128, (usize, Option<Candidate<'_>>)>::new();
            for connection in all.values() {
                let Some((stage, at, state)) = connection.stage() else { continue };
                if !stages.contains(&stage) {
                    continue;
                }
                let (count, oldest) = of_addresses.entry(rates::place(connection.address)).or_default();
                *count += 1;
                let this = (stage, at, state, connection);
                if at <= before && oldest.is_none_or(|(stage, at, ..)| (this.0, this.1) < (stage, at)) {
                    *oldest = Some(this);
                }
            }
            let since = |first: &Option<Candidate<'_>>| first.map(|(stage, at, ..)| (stage, at));
            let loudest =
                of_addresses.into_values().max_by_key(|(count, first)| (*count, since(first).map(Reverse)));
            let (_, _, state, connection) = loudest?.1?;
            Some((Arc::clone(connection), state))
        };
        first(&[Stage::Waits, Stage::Stranger]).or_else(|| first(&[Stage::Known]))
    }
}

/// One that may be ended: what it does, since when, both as its state has it, and which it is.
type Candidate<'a> = (Stage, u64, u64, &'a Arc<Connection>);

/// One that waits for a place.
struct Waits<'a>(&'a Crowd);

impl Waits<'_> {
    fn begin(crowd: &Crowd) -> Option<Waits<'_>> {
        let waits = Waits(crowd);
        (crowd.waiting.fetch_add(1, Ordering::Relaxed) < WAITING_MAX).then_some(waits)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Milliseconds since then, of which none is `CARRIES`.
fn since(begun: Instant) -> u64 {
    begun.elapsed().as_millis() as u64 + 1
}

fn state_of(stage: Stage, since: u64) -> u64 {
    since << 2 | stage as u64
}

impl Connection {
    /// What is ended to end it.
    pub fn is_served_by(&self, task: AbortHandle) {
        let _ = self.task.set(task);
    }

    /// A request has come; `None` where the connection is about to end, and the request is to be left alone.
    pub fn carry(self: &Arc<Connection>) -> Option<Carried> {
        let taken = self.becomes(CARRIES);
        self.is_known.store(false, Ordering::Relaxed);
        self.has_asked.store(true, Ordering::Relaxed);
        taken.then(|| Carried(Arc::clone(self)))
    }

    /// The request's body is waited for, and may be ended meanwhile.
    pub fn expose(self: &Arc<Connection>, stage: Stage) -> Exposed {
        self.becomes(state_of(stage, since(self.begun)));
        Exposed(Arc::clone(self))
    }

    /// Takes another state, unless it is about to end.
    fn becomes(&self, state: u64) -> bool {
        let taken = |old| (old != ENDS).then_some(state);
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, taken).is_ok()
    }

    /// Whether it has carried a request.
    pub fn has_asked(&self) -> bool {
        self.has_asked.load(Ordering::Relaxed)
    }

    /// Whether who asks on it now is known, or waits for a run, which has bounds of its own.
    pub fn is_known(&self) -> bool {
        self.is_known.load(Ordering::Relaxed)
    }

    /// What it does that may be ended, since when, and both as its state has it.
    fn stage(&self) -> Option<(Stage, u64, u64)> {
        let state = self.state.load(Ordering::Acquire);
        if [CARRIES, ENDS].contains(&state) {
            return None;
        }
        let stage = match state & 3 {
            0 => Stage::Waits,
            1 => Stage::Stranger,
            _ => Stage::Known,
        };
        Some((stage, state >> 2, state))
    }

    /// Ends it, unless its state is another one since then.
    fn end(&self, state: u64) {
        let ends = self.state.compare_exchange(state, ENDS, Ordering::AcqRel, Ordering::Acquire);
        if let (Ok(_), Some(task)) = (ends, self.task.get()) {
            task.abort();
        }
    }
}

impl Place {
    /// The connection that has it.
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.crowd.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
        self.crowd.left.notify_one();
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.becomes(state_of(Stage::Waits, since(self.0.begun)));
    }
}

impl Drop for Exposed {
    fn drop(&mut self) {
        self.0.becomes(CARRIES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As if so much time had passed with it as it is.
    fn idle_for(place: &Place, seconds: u64) {
        idle_for_as(place, seconds, Stage::Waits);
    }

    fn idle_for_as(place: &Place, seconds: u64, stage: Stage) {
        let at = since(place.crowd.begun).saturating_sub(seconds * 1000).max(1);
        place.connection.state.store(state_of(stage, at), Ordering::Release);
    }

    #[tokio::test]
    async fn the_oldest_idle_one_of_the_loudest_address_goes_first_and_never_one_with_a_request() {
        let mut crowd = Crowd::new(8);
        // As if it had begun a minute ago.
        let begun = Instant::now().checked_sub(Duration::from_secs(60)).expect("a minute");
        Arc::get_mut(&mut crowd).expect("nobody yet").begun = begun;
        let mut places = Vec::new();
        for (address, seconds) in [("10.0.0.1", 9), ("10.0.0.2", 20), ("10.0.0.1", 5), ("10.0.0.1", 7)] {
            let place = crowd.enter(address.parse().expect("an address")).await.expect("a place");
            idle_for(&place, seconds);
            places.push(place);
        }
        let first = || {
            let (connection, since) = crowd.first_to_go(&crowd.all.lock().expect("the crowd"))?;
            let at = places.iter().position(|place| Arc::ptr_eq(&place.connection, &connection))?;
            Some((at, since))
        };
        assert_eq!(first().map(|(at, _)| at), Some(0), "the loud one's, though a quiet one's is older");
        let carried = places[0].connection.carry().expect("a request");
        assert_eq!(first().map(|(at, _)| at), Some(3), "the next of the loud one");
        let (_, since) = first().expect("that one");
        let late = places[3].connection.carry();
        places[3].connection.end(since);
        assert!(late.is_some() && places[3].connection.state.load(Ordering::Acquire) == CARRIES);
        drop((carried, late));
        for loud in [0, 2, 3] {
            // Young, however long this test takes.
            idle_for(&places[loud], 0);
        }
        assert_eq!(first(), None, "those of the loud one are too young, and no one else goes for them");
        let carried = [0, 2].map(|loud| places[loud].connection.carry().expect("a request"));
        assert_eq!(first().map(|(at, _)| at), Some(1), "each has one: the older");
        let (_, since) = first().expect("that one");
        places[1].connection.end(since);
        assert!(places[1].connection.carry().is_none(), "one that ends takes no request");
        assert_eq!(first(), None, "nobody ends twice");
        let exposed = places[0].connection.expose(Stage::Stranger);
        idle_for_as(&places[0], 3, Stage::Stranger);
        assert_eq!(first().map(|(at, _)| at), Some(0), "a stranger's, whose body comes");
        drop(exposed);
        let _exposed = places[0].connection.expose(Stage::Known);
        idle_for_as(&places[0], 3, Stage::Known);
        assert_eq!(first().map(|(at, _)| at), Some(0), "and one of somebody known, where there is no other");
        idle_for(&places[3], 1);
        assert_eq!(first().map(|(at, _)| at), Some(3), "but no sooner");
        drop((carried, places));
        assert!(crowd.all.lock().expect("the crowd").is_empty());
    }
}
