//! Who is connected, and who makes room where there is none: a connection without a request, of the address with the most
//! of those. It must never end one that carries a request, nor one of a quiet address before those of a loud one.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::rates;

/// How long a connection has been without a request, at least, before it makes room: its first one may be on its way, and
/// so may the last one's answer.
const IDLE_MIN: Duration = Duration::from_millis(100);
/// How long to wait for room between two looks at who could make it.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A connection's state where it carries a request.
const CARRIES: u64 = 0;
/// Where it is about to end: it takes no request any more.
const ENDS: u64 = u64::MAX;

/// All connections.
pub struct Crowd {
    all: Mutex<HashMap<u64, Arc<Connection>>>,
    entered: AtomicU64,
    room: Arc<Semaphore>,
    begun: Instant,
}

/// One of them.
pub struct Connection {
    /// Whose it is.
    pub address: IpAddr,
    /// `CARRIES`, `ENDS`, or since when it carries nothing, in milliseconds from when the crowd began.
    state: AtomicU64,
    has_asked: AtomicBool,
    begun: Instant,
    task: OnceLock<AbortHandle>,
}

/// A connection's place in the crowd, which it has until this is dropped.
pub struct Place {
    crowd: Arc<Crowd>,
    number: u64,
    connection: Arc<Connection>,
    _room: OwnedSemaphorePermit,
}

/// A request that a connection carries, until its answer has been handed over.
pub struct Carried(Arc<Connection>);

impl Crowd {
    /// Nobody yet, and so many at most.
    pub fn new(max: usize) -> Arc<Crowd> {
        let (room, begun) = (Arc::new(Semaphore::new(max)), Instant::now());
        Arc::new(Crowd { all: Mutex::default(), entered: AtomicU64::new(0), room, begun })
    }

    /// A place for a connection of this address, as soon as there is one.
    pub async fn enter(self: &Arc<Crowd>, address: IpAddr) -> Place {
        let room = self.room().await;
        let (state, begun, task) = (AtomicU64::new(since(self.begun)), self.begun, OnceLock::new());
        let has_asked = AtomicBool::new(false);
        let connection = Arc::new(Connection { address, state, has_asked, begun, task });
        let number = self.entered.fetch_add(1, Ordering::Relaxed);
        self.all.lock().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::clone(&connection));
        Place { crowd: Arc::clone(self), number, connection, _room: room }
    }

    async fn room(&self) -> OwnedSemaphorePermit {
        if let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() {
            return permit;
        }
        loop {
            if let Some((connection, idle_since)) = self.first_to_go() {
                connection.end(idle_since);
            }
            if let Ok(Ok(permit)) = timeout(LOOK_EVERY, Arc::clone(&self.room).acquire_owned()).await {
                return permit;
            }
        }
    }

    /// Of the address with the most connections without a request that which has been so for longest, and since when.
    fn first_to_go(&self) -> Option<(Arc<Connection>, u64)> {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let mut of_addresses = HashMap::<u128, (usize, u64, &Arc<Connection>)>::new();
        for connection in all.values() {
            let Some(at) = connection.idle_since() else { continue };
            let place = rates::place(connection.address);
            let (count, since, oldest) = of_addresses.entry(place).or_insert((0, at, connection));
            *count += 1;
            if at < *since {
                (*since, *oldest) = (at, connection);
            }
        }
        let loudest = of_addresses.into_values().max_by_key(|(count, at, _)| (*count, Reverse(*at)));
        // Where it is too early for the loudest address, it is for every other one too.
        let before = since(self.begun).checked_sub(IDLE_MIN.as_millis() as u64)?;
        loudest.filter(|(_, at, _)| *at <= before).map(|(_, at, connection)| (Arc::clone(connection), at))
    }
}

/// Milliseconds since then, of which none is `CARRIES`.
fn since(begun: Instant) -> u64 {
    begun.elapsed().as_millis() as u64 + 1
}

impl Connection {
    /// What is ended to end it.
    pub fn is_served_by(&self, task: AbortHandle) {
        let _ = self.task.set(task);
    }

    /// A request has come; `None` where the connection is about to end, and the request is to be left alone.
    pub fn carry(self: &Arc<Connection>) -> Option<Carried> {
        let taken = |state| (state != ENDS).then_some(CARRIES);
        let taken = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, taken);
        self.has_asked.store(true, Ordering::Relaxed);
        taken.is_ok().then(|| Carried(Arc::clone(self)))
    }

    /// Whether it has carried a request.
    pub fn has_asked(&self) -> bool {
        self.has_asked.load(Ordering::Relaxed)
    }

    fn idle_since(&self) -> Option<u64> {
        Some(self.state.load(Ordering::Acquire)).filter(|state| ![CARRIES, ENDS].contains(state))
    }

    /// Ends it, unless it has taken a request since then.
    fn end(&self, idle_since: u64) {
        let ends = self.state.compare_exchange(idle_since, ENDS, Ordering::AcqRel, Ordering::Acquire);
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
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.state.store(since(self.0.begun), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As if so much time had passed with it as it is.
    fn idle_for(place: &Place, seconds: u64) {
        let at = since(place.crowd.begun).saturating_sub(seconds * 1000).max(1);
        place.connection.state.store(at, Ordering::Release);
    }

    #[tokio::test]
    async fn the_oldest_idle_one_of_the_loudest_address_goes_first_and_never_one_with_a_request() {
        let mut crowd = Crowd::new(8);
        // As if it had begun a minute ago.
        let begun = Instant::now().checked_sub(Duration::from_secs(60)).expect("a minute");
        Arc::get_mut(&mut crowd).expect("nobody yet").begun = begun;
        let mut places = Vec::new();
        for (address, seconds) in [("10.0.0.1", 9), ("10.0.0.2", 20), ("10.0.0.1", 5), ("10.0.0.1", 7)] {
            let place = crowd.enter(address.parse().expect("an address")).await;
            idle_for(&place, seconds);
            places.push(place);
        }
        let first = || {
            let (connection, since) = crowd.first_to_go()?;
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
            places[loud].connection.state.store(ENDS - 1, Ordering::Release);
        }
        assert_eq!(first(), None, "those of the loud one are too young, and no one else goes for them");
        let carried = [0, 2].map(|loud| places[loud].connection.carry().expect("a request"));
        assert_eq!(first().map(|(at, _)| at), Some(1), "each has one: the older");
        let (_, since) = first().expect("that one");
        places[1].connection.end(since);
        assert!(places[1].connection.carry().is_none(), "one that ends takes no request");
        assert_eq!(first(), None, "nobody ends twice");
        drop((carried, places));
        assert!(crowd.all.lock().expect("the crowd").is_empty());
    }
}
