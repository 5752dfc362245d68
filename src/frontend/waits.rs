//! Runs that wait for their client to answer a call: found again by the call's id, within their tenant alone.
//! It must never let a run wait without a bound, nor be found by somebody else's id.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use gaoler_protocol::{Level, Limits, RunId, TenantKey};
use uuid::Uuid;

/// How long a run waits for its client. It keeps its place all the while, as long as nobody else needs it.
const WAIT: Duration = Duration::from_secs(300);
/// How long it has its place to itself: a program answers a call within that, and would lose its run for nothing.
const UNDISTURBED: Duration = Duration::from_secs(1);

/// What a run was begun with, and goes on under: nothing of it can be changed while it lives.
#[derive(Debug, Clone, PartialEq)]
pub struct Terms {
    /// Its level.
    pub level: Level,
    /// The limits that were wished for.
    pub limits: Limits,
    /// Its MCP servers, as a digest, and whether their tools are refused.
    pub servers: ([u8; 32], bool),
}

/// The runs that wait. `T` is what the client's answer is handed over as.
pub struct Waits<T> {
    state: Arc<Mutex<State<T>>>,
}

struct State<T> {
    by_call: HashMap<([u8; 32], String), u64>,
    waits: HashMap<u64, Wait<T>>,
    clock: u64,
}

struct Wait<T> {
    tenant: [u8; 32],
    session: Option<Uuid>,
    run: RunId,
    calls: Vec<String>,
    terms: Terms,
    since: Instant,
    to: oneshot::Sender<T>,
    gone: watch::Receiver<()>,
}

impl<T> Default for Waits<T> {
    fn default() -> Waits<T> {
        let state = State { by_call: HashMap::new(), waits: HashMap::new(), clock: 0 };
        Waits { state: Arc::new(Mutex::new(state)) }
    }
}

impl<T> Waits<T> {
    /// A run that waits from now on for the client of these calls, which were told as the answer of `run`.
    pub fn add(
        &self,
        tenant: &TenantKey,
        session: Option<Uuid>,
        run: RunId,
        calls: Vec<String>,
        terms: Terms,
    ) -> Waiting<T> {
        let (to, answer) = oneshot::channel();
        let (here, gone) = watch::channel(());
        let since = Instant::now();
        let number = self.state().add(Wait { tenant: tenant.0, session, run, calls, terms, since, to, gone });
        Waiting { state: Arc::clone(&self.state), number, answer, _here: here }
    }

    /// The way to this tenant's run that waits for one of these calls.
    pub fn take<'a>(
        &self,
        tenant: &TenantKey,
        calls: impl IntoIterator<Item = &'a str>,
    ) -> Option<oneshot::Sender<T>> {
        let mut state = self.state();
        let number = state.find(tenant, calls)?;
        state.remove(number).map(|wait| wait.to)
    }

    /// What this tenant's run goes on under that waits for one of these calls.
    pub fn terms<'a>(&self, tenant: &TenantKey, calls: impl IntoIterator<Item = &'a str>) -> Option<Terms> {
        let state = self.state();
        let number = state.find(tenant, calls)?;
        state.waits.get(&number).map(|wait| wait.terms.clone())
    }

    /// Gives up this tenant's run that waits for one of these calls. What comes back ends when the run has.
    pub fn leave<'a>(
        &self,
        tenant: &TenantKey,
        calls: impl IntoIterator<Item = &'a str>,
    ) -> Option<watch::Receiver<()>> {
        let mut state = self.state();
        let number = state.find(tenant, calls)?;
        state.remove(number).map(|wait| wait.gone)
    }

    /// Gives up this tenant's run that waits in this session: its client has said something else. What comes back ends when
    /// the run has.
    pub fn give_up(&self, tenant: &TenantKey, session: Uuid) -> Option<watch::Receiver<()>> {
        self.remove(tenant, |wait| wait.session == Some(session))
    }

    /// Has the run give up its place that has waited longest: of this tenant, or of whoever has most that wait. What comes
    /// back is the answer after which it waits, and ends when the run has. What its client says later is history.
    pub fn give_way(&self, tenant: Option<&TenantKey>) -> Option<(RunId, watch::Receiver<()>)> {
        self.give_way_at(tenant, Instant::now())
    }

    fn give_way_at(&self, tenant: Option<&TenantKey>, now: Instant) -> Option<(RunId, watch::Receiver<()>)> {
        let mut state = self.state();
        let mut of_tenants = HashMap::<[u8; 32], (usize, Instant, u64)>::new();
        let may = |wait: &&Wait<T>| tenant.is_none_or(|tenant| tenant.0 == wait.tenant);
        for (number, wait) in state.waits.iter().filter(|(_, wait)| may(wait)) {
            let own = of_tenants.entry(wait.tenant).or_insert((0, wait.since, *number));
            own.0 += 1;
            (own.1, own.2) = (own.1, own.2).min((wait.since, *number));
        }
        let disturbed = |(_, since, _): &(usize, Instant, u64)| now.duration_since(*since) >= UNDISTURBED;
        let most = of_tenants.into_values().filter(disturbed);
        let (.., number) = most.max_by_key(|(count, since, _)| (*count, Reverse(*since)))?;
        state.remove(number).map(|wait| (wait.run, wait.gone))
    }

    /// Ends this tenant's run that waits after this answer, if there is one.
    pub fn cancel(&self, tenant: &TenantKey, run: RunId) {
        drop(self.remove(tenant, |wait| wait.run == run));
    }

    /// The answers after which a run waits.
    pub fn runs(&self) -> HashSet<RunId> {
        self.state().waits.values().map(|wait| wait.run).collect()
    }

    fn remove(&self, tenant: &TenantKey, is: impl Fn(&Wait<T>) -> bool) -> Option<watch::Receiver<()>> {
        let mut state = self.state();
        let waits = |wait: &Wait<T>| wait.tenant == tenant.0 && is(wait);
        let found = state.waits.iter().find(|(_, wait)| waits(wait)).map(|(number, _)| *number);
        found.and_then(|number| state.remove(number)).map(|wait| wait.gone)
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    fn find<'a>(&self, tenant: &TenantKey, calls: impl IntoIterator<Item = &'a str>) -> Option<u64> {
        calls.into_iter().find_map(|call| self.by_call.get(&(tenant.0, call.to_owned())).copied())
    }

    fn add(&mut self, wait: Wait<T>) -> u64 {
        self.clock += 1;
        for call in &wait.calls {
            self.by_call.insert((wait.tenant, call.clone()), self.clock);
        }
        self.waits.insert(self.clock, wait);
        self.clock
    }

    fn remove(&mut self, number: u64) -> Option<Wait<T>> {
        let wait = self.waits.remove(&number)?;
        for call in &wait.calls {
            let key = (wait.tenant, call.clone());
            if self.by_call.get(&key) == Some(&number) {
                self.by_call.remove(&key);
            }
        }
        Some(wait)
    }
}

/// A run that waits, and after that is about to end. Dropping it says that it has.
pub struct Waiting<T> {
    state: Arc<Mutex<State<T>>>,
    number: u64,
    answer: oneshot::Receiver<T>,
    _here: watch::Sender<()>,
}

impl<T> Waiting<T> {
    /// What the client says. `None` where it does not come in time, gives the run up, or the server drains. `ended` is the
    /// run's own end.
    pub async fn answer(
        &mut self,
        mut draining: watch::Receiver<bool>,
        ended: impl Future<Output = ()>,
    ) -> Option<T> {
        tokio::select! {
            biased;
            answer = &mut self.answer => return answer.ok(),
            () = ended => {}
            _ = draining.wait_for(|&draining| draining) => {}
            () = tokio::time::sleep(WAIT) => {}
        }
        self.state.lock().unwrap_or_else(PoisonError::into_inner).remove(self.number);
        // Nobody finds it any more; somebody may have, just now. What is not here yet is not taken: whoever says it hears that,
        // and begins a run of its own.
        self.answer.close();
        self.answer.try_recv().ok()
    }
}

impl<T> Drop for Waiting<T> {
    fn drop(&mut self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calm() -> watch::Receiver<bool> {
        static CALM: std::sync::LazyLock<watch::Sender<bool>> =
            std::sync::LazyLock::new(|| watch::Sender::new(false));
        CALM.subscribe()
    }

    fn terms() -> Terms {
        Terms { level: Level::Balanced, limits: Limits::NONE, servers: ([0; 32], false) }
    }

    #[tokio::test]
    async fn a_run_that_waits_is_found_by_each_of_its_calls_by_its_tenant_and_once() {
        let (one, two) = (TenantKey([1; 32]), TenantKey([2; 32]));
        let waits = Arc::new(Waits::<u32>::default());
        let wait = |session, calls: &[&str]| {
            let (waits, calls) = (Arc::clone(&waits), calls.iter().map(|call| (*call).to_owned()).collect());
            let mut waiting = waits.add(&TenantKey([1; 32]), session, RunId([1; 16]), calls, terms());
            tokio::spawn(async move { waiting.answer(calm(), std::future::pending()).await })
        };
        let waiting = wait(None, &["a", "b"]);
        assert!(waits.take(&two, ["a"]).is_none(), "another tenant's");
        assert!(waits.take(&one, ["c"]).is_none());
        assert_eq!((waits.terms(&one, ["c", "b"]), waits.terms(&two, ["b"])), (Some(terms()), None));
        assert!(waits.leave(&two, ["b"]).is_none());
        waits.take(&one, ["c", "b"]).expect("it waits").send(7).expect("it hears");
        assert!(waits.take(&one, ["a"]).is_none(), "it was found already");
        assert_eq!(waiting.await.expect("no panic"), Some(7));
        // One that is given up is told, by its session's own tenant.
        let session = Uuid::from_u128(7);
        let waiting = wait(Some(session), &["a"]);
        assert!(waits.give_up(&two, session).is_none() && waits.give_up(&one, Uuid::from_u128(8)).is_none());
        let mut gone = waits.give_up(&one, session).expect("it waits");
        assert_eq!(waiting.await.expect("no panic"), None);
        assert!(gone.changed().await.is_err(), "its end is told");
        let waiting = wait(None, &["a"]);
        waits.cancel(&two, RunId([1; 16]));
        waits.cancel(&one, RunId([2; 16]));
        assert!(!waits.state().waits.is_empty());
        waits.cancel(&one, RunId([1; 16]));
        assert_eq!(waiting.await.expect("no panic"), None);
        // Its run's end, and a drain, end the wait; nothing is left.
        let calls = vec!["a".to_owned()];
        let mut waiting = waits.add(&one, None, RunId([1; 16]), calls.clone(), terms());
        assert_eq!(waiting.answer(calm(), std::future::ready(())).await, None);
        // Somebody has found it and has not spoken when it ends: what it says then is refused, and not lost.
        let mut waiting = waits.add(&one, None, RunId([1; 16]), calls.clone(), terms());
        let late = waits.take(&one, ["a"]).expect("it waits");
        assert_eq!(waiting.answer(calm(), std::future::ready(())).await, None);
        assert_eq!(late.send(7), Err(7), "r21: a result in the last moment");
        let mut waiting = waits.add(&one, None, RunId([1; 16]), calls.clone(), terms());
        let spoke = waits.take(&one, ["a"]).expect("it waits");
        let ended = async { assert_eq!(spoke.send(8), Ok(())) };
        assert_eq!(waiting.answer(calm(), ended).await, Some(8), "who spoke before is heard");
        drop(waiting);
        let (_drain, draining) = watch::channel(true);
        let mut waiting = waits.add(&one, None, RunId([1; 16]), calls, terms());
        assert_eq!(waiting.answer(draining, std::future::pending()).await, None);
        let state = waits.state();
        assert!(state.by_call.is_empty() && state.waits.is_empty());
    }

    #[tokio::test]
    async fn b14_who_has_most_runs_that_wait_gives_way_first_and_of_them_the_longest() {
        let waits = Arc::new(Waits::<u32>::default());
        let mut waiting = Vec::new();
        for (tenant, run) in [(1, 1), (2, 2), (2, 3), (1, 4), (2, 5)] {
            waiting.push(waits.add(
                &TenantKey([tenant; 32]),
                None,
                RunId([run; 16]),
                vec![run.to_string()],
                terms(),
            ));
        }
        let now = Instant::now();
        let next = |tenant: Option<u8>, now: Instant| {
            let tenant = tenant.map(|tenant| TenantKey([tenant; 32]));
            waits.give_way_at(tenant.as_ref(), now).map(|(run, _)| run.0[0])
        };
        assert_eq!(next(None, now - Duration::from_millis(1)), None, "its client may be about to answer");
        let late = now + UNDISTURBED;
        assert_eq!((next(Some(3), late), next(Some(1), late)), (None, Some(1)));
        assert_eq!([(); 4].map(|()| next(None, late)), [Some(2), Some(3), Some(4), Some(5)]);
        assert_eq!(next(None, late), None);
        for mut waiting in waiting {
            assert_eq!(waiting.answer(calm(), std::future::pending()).await, None, "it is told to end");
        }
    }
}
