//! What bodies take while they are read, byte by byte, and who gives way where that is too much: whoever has most. It must never let one who sends much, or slowly, cost another a place.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::error::ApiError;

/// Bytes of bodies of those who are known: a dozen of the largest.
const KNOWN_BYTES_MAX: usize = 384 * 1024 * 1024;
/// Bytes of bodies of strangers, of whom nobody knows yet whether anybody vouches for them: two of the largest, for one
/// who comes for the first time may bring such a one where nobody else does.
const STRANGERS_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Bytes of the operator's bodies, which nobody else can take: far more than its routes read.
const OPERATOR_BYTES_MAX: usize = 4 * 1024 * 1024;
/// How long whoever was told to give way may take for it. They are woken at once.
const GIVES_WAY_WAIT: Duration = Duration::from_secs(2);

/// Whose a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Whose {
    /// A tenant's, or of a credential that was vouched for.
    Known([u8; 32]),
    /// Of somebody at this address ([`super::rates::place`]).
    Stranger(u128),
    /// The operator's.
    Operator,
}

/// What is counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    Known,
    Strangers,
    Operator,
}

impl Lane {
    fn most(self) -> usize {
        match self {
            Lane::Known => KNOWN_BYTES_MAX,
            Lane::Strangers => STRANGERS_BYTES_MAX,
            Lane::Operator => OPERATOR_BYTES_MAX,
        }
    }
}

/// All that is held.
#[derive(Default)]
pub struct Bodies {
    held: Mutex<Held>,
    freed: Notify,
}

#[derive(Default)]
struct Held {
    begun: u64,
    all: BTreeMap<u64, Part>,
}

struct Part {
    lane: Lane,
    whose: Whose,
    bytes: usize,
    /// It may be told to give way.
    may_go: bool,
    goes: bool,
    word: Arc<Notify>,
}

/// What one request holds, until this is dropped.
pub struct Hold {
    bodies: Arc<Bodies>,
    number: u64,
    word: Arc<Notify>,
}

impl Bodies {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request of this one, which holds nothing yet.
    pub fn begin(self: &Arc<Bodies>, whose: Whose) -> Hold {
        let lane = match whose {
            Whose::Known(_) => Lane::Known,
            Whose::Stranger(_) => Lane::Strangers,
            Whose::Operator => Lane::Operator,
        };
        let word = Arc::new(Notify::new());
        let mut held = self.lock();
        held.begun += 1;
        let number = held.begun;
        let part = Part { lane, whose, bytes: 0, may_go: true, goes: false, word: Arc::clone(&word) };
        held.all.insert(number, part);
        drop(held);
        Hold { bodies: Arc::clone(self), number, word }
    }
}

impl Held {
    /// Counts so many more of this part's lane, where there is room for them.
    fn take(&mut self, number: u64, lane: Lane, more: usize) -> Taken {
        let taken: usize = self.all.values().filter(|part| part.lane == lane).map(|part| part.bytes).sum();
        let Some(part) = self.all.get_mut(&number) else { return Taken::Refused };
        if part.goes {
            return Taken::Refused;
        }
        if taken + more <= lane.most() {
            part.bytes += more;
            return Taken::Done;
        }
        let asks = part.whose;
        let mut of = HashMap::<Whose, usize>::new();
        for (&at, part) in self.all.iter().filter(|(_, part)| part.lane == lane) {
            *of.entry(part.whose).or_default() += part.bytes + if at == number { more } else { 0 };
        }
        if self.all.values().any(|part| part.lane == lane && part.goes) {
            return Taken::Later;
        }
        // Where two have the same, whoever asks gives way: nothing is gained by ending another's.
        let can_go = self.all.iter().filter(|(at, part)| part.lane == lane && part.may_go && **at != number);
        let first = can_go
            .filter(|(_, part)| part.bytes > 0 && of[&part.whose] > of[&asks])
            .max_by_key(|(at, part)| (of[&part.whose], part.bytes, **at))
            .map(|(at, _)| *at);
        match first.and_then(|at| self.all.get_mut(&at)) {
            Some(part) => {
                part.goes = true;
                part.word.notify_one();
                Taken::Later
            }
            None => Taken::Refused,
        }
    }
}

/// What came of asking for more.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    Done,
    /// Somebody else gives way.
    Later,
    Refused,
}

impl Hold {
    /// So many bytes more, as soon as whoever has more than this one has given way.
    ///
    /// # Errors
    /// 529 where nobody has more.
    pub async fn grow(&self, more: usize) -> Result<(), ApiError> {
        let deadline = Instant::now() + GIVES_WAY_WAIT;
        loop {
            let mut freed = std::pin::pin!(self.bodies.freed.notified());
            freed.as_mut().enable();
            let taken = {
                let mut held = self.bodies.lock();
                let own = held.all.get(&self.number).map_or(Lane::Strangers, |part| part.lane);
                held.take(self.number, own, more)
            };
            match taken {
                Taken::Done => return Ok(()),
                Taken::Refused => return Err(full()),
                Taken::Later => timeout_at(deadline, freed).await.map_err(|_| full())?,
            }
        }
    }

    /// All of it is there and is looked at now, which takes a moment: nothing is gained by ending that.
    pub fn is_whole(&self) {
        if let Some(part) = self.bodies.lock().all.get_mut(&self.number) {
            part.may_go = false;
        }
    }

    /// Comes back where it has to give way to another.
    pub async fn goes(&self) -> ApiError {
        loop {
            let goes = self.bodies.lock().all.get(&self.number).is_some_and(|part| part.goes);
            if goes {
                return full();
            }
            self.word.notified().await;
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.bodies.lock().all.remove(&self.number);
        self.bodies.freed.notify_waiters();
    }
}

fn full() -> ApiError {
    let message = "This server holds as much of requests as it may, and whoever sends most gives way first.";
    ApiError::new(529, "bodies_full", message).after(5)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    #[tokio::test]
    async fn b03_whoever_has_most_gives_way_first_and_strangers_never_to_each_others_cost() {
        let bodies = Arc::new(Bodies::default());
        let (loud, quiet) = (Whose::Stranger(1), Whose::Stranger(2));
        let mut many = Vec::new();
        for _ in 0..64 {
            let hold = bodies.begin(loud);
            hold.grow(MIB).await.expect("room");
            many.push(hold);
        }
        assert_eq!(bodies.begin(loud).grow(1).await.expect_err("full").code, "bodies_full");
        let one = bodies.begin(quiet);
        let (grown, gone) = tokio::join!(one.grow(2 * MIB), async {
            // The newest of the same size goes, and the next after it.
            for _ in 0..2 {
                let hold = many.pop().expect("a part");
                assert_eq!(hold.goes().await.status, 529);
            }
        });
        assert_eq!((grown, gone), (Ok(()), ()));
        let known = bodies.begin(Whose::Known([1; 32]));
        assert!(known.grow(32 * MIB).await.is_ok(), "others are counted apart");
        assert!(bodies.begin(Whose::Operator).grow(MIB).await.is_ok());
    }
}
