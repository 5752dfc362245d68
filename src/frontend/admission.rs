//! Who may start a run now, and who waits for a place: a bounded queue in which each tenant has a line of its own.
//! It must never let one tenant's requests wait for another's that are more, nor keep a place for who went away.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use gaoler_policy::settings::Runs;
use gaoler_protocol::TenantKey;

use super::error::ApiError;

/// Bytes that the requests hold together that wait. Whoever has most of them gives way first.
const HELD_BYTES_MAX: usize = 256 * 1024 * 1024;
/// What a run is taken to last before one has ended.
const LASTS_FIRST: Duration = Duration::from_secs(10);
/// Bounds of `retry-after`, in seconds: sooner is no use, and later nobody waits.
const AFTER_SECONDS: std::ops::RangeInclusive<u64> = 1..=60;

/// What keeps a tenant's next request from a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// It has as many runs as it may have.
    Tenant,
    /// The server has.
    Server,
}

/// The places of a server.
#[derive(Debug)]
pub struct Admission {
    max: usize,
    queue_max: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tenant_max: usize,
    wait: Duration,
    running: usize,
    waiting: usize,
    /// Bytes that the requests hold that wait.
    held: usize,
    /// Those with a run or a request that waits, and no others.
    tenants: HashMap<[u8; 32], Tenant>,
    /// Counts tickets and turns.
    clock: u64,
    /// How long a run lasts, smoothed.
    lasts: Duration,
}

#[derive(Debug, Default)]
struct Tenant {
    running: usize,
    /// How many it may have, as its newest request says.
    most: usize,
    line: VecDeque<Waiter>,
    /// Bytes that those hold.
    held: usize,
    /// When it was last given a place.
    served: u64,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    /// Bytes that its request holds.
    bytes: usize,
    came: Instant,
    called: oneshot::Sender<Call>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// A place is yours.
    Enter,
    /// The queue is full, and your tenant has most of it.
    GiveWay,
}

/// A request in the queue and, once it was called, the place of its run. Dropping it gives either up.
#[derive(Debug)]
pub struct Ticket {
    admission: Arc<Admission>,
    tenant: [u8; 32],
    number: u64,
    called: oneshot::Receiver<Call>,
    entered: Option<Instant>,
    /// How long it waited.
    pub waited: Duration,
}

impl Admission {
    /// As many places as the settings say.
    pub fn new(runs: &Runs) -> Arc<Admission> {
        let (tenant_max, wait) = bounds(runs);
        Arc::new(Admission {
            max: runs.max as usize,
            queue_max: runs.queue_max as usize,
            state: Mutex::new(State {
                tenant_max,
                wait,
                running: 0,
                waiting: 0,
                held: 0,
                tenants: HashMap::new(),
                clock: 0,
                lasts: LASTS_FIRST,
            }),
        })
    }

    /// From the next request on: how many runs a tenant may have, and how long one waits.
    pub fn bound(&self, runs: &Runs) {
        let mut state = self.state();
        (state.tenant_max, state.wait) = bounds(runs);
    }

    /// How many of its tenant's requests are before this one in the line, itself included; `None` once it is called.
    pub fn position(&self, tenant: &[u8; 32], ticket: u64) -> Option<usize> {
        let state = self.state();
        let line = &state.tenants.get(tenant)?.line;
        line.iter().position(|waiter| waiter.ticket == ticket).map(|before| before + 1)
    }

    /// Waits for this tenant's turn, with a request that holds so many bytes. Dropping the future leaves the queue. `told` is
    /// told the number in it; `most` is the tenant's own bound, where it has one.
    ///
    /// # Errors
    /// 429 where the tenant has all the runs that one may have, 529 where the server has; 503 in a drain.
    pub async fn enter(
        self: &Arc<Self>,
        tenant: TenantKey,
        most: Option<u64>,
        bytes: usize,
        mut draining: watch::Receiver<bool>,
        told: impl FnOnce(u64),
    ) -> Result<Ticket, ApiError> {
        let came = Instant::now();
        let (all, wait) = {
            let state = self.state();
            (state.tenant_max, state.wait)
        };
        let most = most.map_or(all, |most| usize::try_from(most).unwrap_or(self.max).min(self.max));
        let mut ticket = self.line_up(tenant.0, most, bytes);
        told(ticket.number);
        let called = tokio::select! {
            biased;
            called = timeout(wait, &mut ticket.called) => called,
            _ = draining.wait_for(|&draining| draining) => return Err(ApiError::draining()),
        };
        ticket.waited = came.elapsed();
        match called {
            Ok(Ok(Call::Enter)) => {
                ticket.entered = Some(Instant::now());
                Ok(ticket)
            }
            _ => Err(self.refusal(&tenant.0, most)),
        }
    }

    /// What keeps this tenant's requests waiting, if anything does.
    pub fn full(&self, tenant: &TenantKey) -> Option<Full> {
        let state = self.state();
        let own = state.tenants.get(&tenant.0).filter(|own| !own.line.is_empty())?;
        match own.running >= own.most {
            true => Some(Full::Tenant),
            false => (state.running >= self.max).then_some(Full::Server),
        }
    }

    /// Runs, and requests that wait.
    pub fn load(&self) -> (usize, usize) {
        let state = self.state();
        (state.running, state.waiting)
    }

    /// How long the request has waited that has waited longest.
    pub fn longest_wait(&self) -> Duration {
        let state = self.state();
        // Each line is in the order in which they came.
        let first = state.tenants.values().filter_map(|tenant| tenant.line.front());
        first.map(|waiter| waiter.came.elapsed()).max().unwrap_or_default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is done under the lock cannot stop half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line_up(self: &Arc<Self>, tenant: [u8; 32], most: usize, bytes: usize) -> Ticket {
        let (call, called) = oneshot::channel();
        let mut state = self.state();
        state.clock += 1;
        let number = state.clock;
        state.waiting += 1;
        state.held += bytes;
        let own = state.tenants.entry(tenant).or_default();
        own.most = most;
        own.held += bytes;
        own.line.push_back(Waiter { ticket: number, bytes, came: Instant::now(), called: call });
        state.call(self.max);
        if state.waiting > self.queue_max {
            state.turn_away(|tenant| tenant.line.len());
        }
        while state.held > HELD_BYTES_MAX && state.turn_away(|tenant| tenant.held) {}
        drop(state);
        let admission = Arc::clone(self);
        Ticket { admission, tenant, number, called, entered: None, waited: Duration::ZERO }
    }

    /// Why there was no place, and when there may be one: after as many runs as wait, or as the tenant has waiting.
    fn refusal(&self, tenant: &[u8; 32], most: usize) -> ApiError {
        let state = self.state();
        let own = state.tenants.get(tenant);
        let (running, waiting) = own.map_or((0, 0), |own| (own.running, own.line.len()));
        let after = |ahead: usize, places: usize| {
            let turns = ahead.div_ceil(places.max(1)).max(1);
            let seconds = state.lasts.as_secs_f64().ceil() as u64;
            seconds.saturating_mul(turns as u64).clamp(*AFTER_SECONDS.start(), *AFTER_SECONDS.end())
        };
        if running >= most && most < self.max {
            let message = format!("You have {running} runs, as many as you may have at a time.");
            return ApiError::new(429, "tenant_busy", message).after(after(waiting, most));
        }
        ApiError::new(529, "busy", "As many runs as this server allows are running.")
            .after(after(state.waiting, self.max))
    }
}

/// What a reload may change.
fn bounds(runs: &Runs) -> (usize, Duration) {
    (runs.tenant_max.min(runs.max) as usize, Duration::from_secs(u64::from(runs.queue_seconds)))
}

impl State {
    /// Gives free places to whoever has fewest, and of those to who has waited for a turn the longest.
    fn call(&mut self, max: usize) {
        while self.running < max {
            let next = self
                .tenants
                .values_mut()
                .filter(|tenant| !tenant.line.is_empty() && tenant.running < tenant.most)
                .min_by_key(|tenant| {
                    (tenant.running, tenant.served, tenant.line.front().map(|waiter| waiter.ticket))
                });
            let Some(tenant) = next else { return };
            let Some(waiter) = tenant.line.pop_front() else { return };
            tenant.held -= waiter.bytes;
            (self.waiting, self.held) = (self.waiting - 1, self.held - waiter.bytes);
            // Somebody who has just gone away: their ticket's end finds it in no line, and its call unread.
            if waiter.called.send(Call::Enter).is_ok() {
                self.clock += 1;
                (tenant.served, tenant.running) = (self.clock, tenant.running + 1);
                self.running += 1;
            }
        }
    }

    /// Whoever has most of a full queue gives up the place that was taken last; whether there was one.
    fn turn_away(&mut self, has: impl Fn(&Tenant) -> usize) -> bool {
        let newest = |tenant: &Tenant| tenant.line.back().map(|waiter| waiter.ticket);
        let most = self.tenants.values_mut().max_by_key(|tenant| (has(tenant), newest(tenant)));
        let Some(tenant) = most else { return false };
        let Some(waiter) = tenant.line.pop_back() else { return false };
        tenant.held -= waiter.bytes;
        (self.waiting, self.held) = (self.waiting - 1, self.held - waiter.bytes);
        let _ = waiter.called.send(Call::GiveWay);
        true
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        let Some(tenant) = state.tenants.get_mut(&self.tenant) else { return };
        let place = tenant.line.iter().position(|waiter| waiter.ticket == self.number);
        let left = place.and_then(|place| tenant.line.remove(place));
        let held = left.as_ref().map_or(0, |waiter| waiter.bytes);
        let waited = left.is_some();
        tenant.held -= held;
        // It may have been called just now, and nobody has heard it.
        let entered = self.entered.is_some() || self.called.try_recv() == Ok(Call::Enter);
        tenant.running -= usize::from(entered);
        if tenant.running == 0 && tenant.line.is_empty() {
            state.tenants.remove(&self.tenant);
        }
        state.waiting -= usize::from(waited);
        state.held -= held;
        state.running -= usize::from(entered);
        if let Some(at) = self.entered {
            state.lasts = (state.lasts * 7 + at.elapsed()) / 8;
        }
        state.call(self.admission.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(max: u32, tenant_max: u32, queue_max: u32) -> Arc<Admission> {
        Admission::new(&Runs { max, tenant_max, queue_max, queue_seconds: 5, ..Runs::default() })
    }

    fn calm() -> watch::Receiver<bool> {
        static CALM: std::sync::LazyLock<watch::Sender<bool>> =
            std::sync::LazyLock::new(|| watch::Sender::new(false));
        CALM.subscribe()
    }

    fn key(name: u8) -> TenantKey {
        TenantKey([name; 32])
    }

    /// Requests of these tenants in this order, each with the run that it gets for a moment; who was served when.
    async fn order(admission: &Arc<Admission>, names: &[u8]) -> Vec<u8> {
        let served = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for &name in names {
            let (admission, served) = (Arc::clone(admission), Arc::clone(&served));
            tasks.push(tokio::spawn(async move {
                let ticket = admission.enter(key(name), None, 0, calm(), drop).await;
                if ticket.is_ok() {
                    served.lock().expect("no panic").push(name);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }));
            // In this order.
            tokio::task::yield_now().await;
        }
        for task in tasks {
            task.await.expect("no panic");
        }
        Arc::try_unwrap(served).expect("the last").into_inner().expect("no panic")
    }

    #[tokio::test]
    async fn a_quiet_tenant_comes_before_a_loud_ones_second() {
        let admission = admission(1, 8, 64);
        assert_eq!(order(&admission, &[1, 1, 1, 1, 2, 3, 2]).await, [1, 2, 3, 1, 2, 1, 1]);
        assert_eq!(admission.load(), (0, 0));
        assert!(admission.state().tenants.is_empty());
    }

    #[tokio::test]
    async fn a_full_queue_is_given_up_by_who_has_most_of_it() {
        let admission = admission(1, 8, 3);
        // One runs and three wait when the fourth and the fifth of the loud one come; then there is room for another's.
        assert_eq!(order(&admission, &[1, 1, 1, 1, 1, 1, 2]).await, [1, 2, 1, 1]);
        assert_eq!(admission.load(), (0, 0));
    }

    #[tokio::test]
    async fn a_tenant_has_its_own_bound_and_is_told_so() {
        let admission = admission(4, 2, 0);
        let first = admission.enter(key(1), None, 0, calm(), drop).await.expect("a place");
        let second = admission.enter(key(1), None, 0, calm(), drop).await.expect("a place");
        let third = admission.enter(key(1), None, 0, calm(), drop).await.expect_err("its bound");
        assert_eq!((third.status, third.code), (429, "tenant_busy"));
        assert!(third.retry_after.is_some_and(|after| AFTER_SECONDS.contains(&after)));
        let others = [key(2), key(2)];
        let mut tickets = Vec::new();
        for other in others {
            tickets.push(admission.enter(other, None, 0, calm(), drop).await.expect("a place"));
        }
        let full = admission.enter(key(3), None, 0, calm(), drop).await.expect_err("the server's bound");
        assert_eq!((full.status, full.code), (529, "busy"));
        assert_eq!(admission.load(), (4, 0));
        drop(first);
        let again = admission.enter(key(1), None, 0, calm(), drop).await.expect("a place");
        drop((second, again, tickets));
        assert_eq!(admission.load(), (0, 0));
    }

    #[tokio::test]
    async fn a_tenants_own_bound_is_in_force_from_its_next_request_on() {
        let admission = admission(4, 2, 0);
        let enter = async |most| admission.enter(key(1), most, 0, calm(), drop).await;
        let first = enter(Some(1)).await.expect("a place");
        assert_eq!(enter(Some(1)).await.expect_err("its bound").code, "tenant_busy");
        let rest = [enter(Some(3)).await.expect("more"), enter(Some(3)).await.expect("more")];
        assert_eq!(enter(None).await.expect_err("everybody's bound").code, "tenant_busy");
        assert_eq!(enter(Some(3)).await.expect_err("its bound").code, "tenant_busy");
        // More than there are places is all of them.
        let last = enter(Some(1000)).await.expect("the last place");
        assert_eq!(enter(Some(1000)).await.expect_err("full").code, "busy");
        drop((first, rest, last));
        assert_eq!(admission.load(), (0, 0));
    }

    #[tokio::test]
    async fn who_goes_away_leaves_no_place_behind() {
        let admission = admission(1, 8, 8);
        let only = admission.enter(key(1), None, 0, calm(), drop).await.expect("a place");
        let waiting: Vec<_> = (0..3).map(|_| admission.line_up(key(2).0, 8, 0)).collect();
        assert_eq!(admission.load(), (1, 3));
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert!(admission.longest_wait() >= Duration::from_millis(2));
        let mut waiting = waiting.into_iter();
        // One leaves the line; one is called and goes without having heard it.
        drop(waiting.next());
        drop(only);
        assert_eq!(admission.load(), (1, 1));
        drop(waiting.next());
        assert_eq!(admission.load(), (1, 0));
        drop(waiting);
        assert_eq!((admission.load(), admission.longest_wait()), ((0, 0), Duration::ZERO));
        assert!(admission.state().tenants.is_empty());
    }

    #[tokio::test]
    async fn a_drain_calls_off_the_wait() {
        let admission = admission(1, 8, 8);
        let _only = admission.enter(key(1), None, 0, calm(), drop).await.expect("a place");
        let (drain, draining) = watch::channel(false);
        let waiting = tokio::spawn({
            let admission = Arc::clone(&admission);
            async move { admission.enter(key(2), None, 0, draining, drop).await.map(drop) }
        });
        tokio::task::yield_now().await;
        drain.send_replace(true);
        let refused = waiting.await.expect("no panic").expect_err("a drain");
        assert_eq!(refused.code, "draining");
        assert_eq!(admission.load(), (1, 0));
    }

    #[tokio::test]
    async fn what_waits_is_counted_whole_and_who_holds_most_gives_way() {
        const PIECE: usize = HELD_BYTES_MAX / 8;
        let admission = admission(1, 8, 64);
        let only = admission.enter(key(1), None, PIECE, calm(), drop).await.expect("a place");
        assert_eq!(admission.state().held, 0, "what runs does not wait");
        let line_up = |tenant, pieces: usize| admission.line_up(key(tenant).0, 8, pieces * PIECE);
        // Many small ones are less than a few large ones, however many they are.
        let quiet: Vec<_> = (0..10).map(|_| line_up(2, 0)).collect();
        let (medium, mut loud) = (line_up(3, 3), vec![line_up(4, 2), line_up(4, 2), line_up(4, 1)]);
        assert_eq!(admission.load(), (1, 14));
        // The newest of whoever holds most goes, as many as it takes: also where that is who comes.
        loud.push(line_up(4, 2));
        assert_eq!(loud[3].called.try_recv(), Ok(Call::GiveWay));
        let late = line_up(5, 2);
        assert_eq!(
            loud.iter_mut().map(|it| it.called.try_recv() == Ok(Call::GiveWay)).collect::<Vec<_>>(),
            [false, true, true, false]
        );
        assert_eq!((admission.load(), admission.state().held), ((1, 13), 7 * PIECE));
        drop((quiet, medium, loud, late));
        assert_eq!((admission.load(), admission.state().held), ((1, 0), 0));
        drop(only);
        assert_eq!((admission.load(), admission.state().held), ((0, 0), 0));
    }
}
