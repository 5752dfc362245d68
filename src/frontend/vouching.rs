//! Who is somebody: credentials that the upstream has accepted, those that it has just refused, and a lane of their own in
//! which it is asked about all others.
//! It must never let a stranger take a place or a turn of those who are known, nor ask about more of them at once than its
//! bounds allow.

use std::collections::{HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use gaoler_policy::settings::Runs;
use gaoler_protocol::{
    Conversation, Effort, Kind, Limits, Model, Refusal, Refused, RunId, Spawn, TenantKey, VOUCHING_MAX,
};
use gaoler_sys::memfd;

use super::admission::Admission;
use super::error::ApiError;
use super::http::App;
use super::run::Talk;
use super::{id, way};

/// Credentials that the upstream is asked about at the same time: half of the places that the supervisor has for this, of
/// which each costs an egress. The other half is for looks at who is known already.
const LANE_MAX: u32 = VOUCHING_MAX / 2;
const LOOKS_MAX: usize = (VOUCHING_MAX / 2) as usize;
/// Those of one address, so that no address has the whole lane, however slowly the upstream says no.
const ADDRESS_MAX: u32 = LANE_MAX / 2;
/// Requests that wait for the lane. Whichever address has most of them gives way first.
const QUEUE_MAX: u32 = 64;
/// How long one waits for it: as long as a request may wait for a run by default.
const QUEUE_SECONDS: u32 = 30;
/// Credentials that are remembered as accepted: as many as there can be tenants. One that is forgotten is looked at anew.
const ACCEPTED_MAX: usize = 65_536;
/// Credentials that are remembered as refused, and for how long: a program that asks again and again with a wrong one costs
/// nobody an egress, and one that has become right is soon tried.
const REFUSED_MAX: usize = 4096;
const REFUSED_FOR: Duration = Duration::from_secs(60);

tokio::task_local! {
    /// Where the request comes from that a task serves, as the rates count addresses.
    static FROM: u128;
}

/// Serves a request as one that comes from here.
pub fn from<F: Future>(place: u128, serve: F) -> impl Future<Output = F::Output> {
    FROM.scope(place, serve)
}

/// What is known of credentials, and the lane.
pub struct Vouching {
    known: Mutex<Known>,
    /// By address, where runs have tenants.
    lane: Arc<Admission>,
    looks: Arc<Semaphore>,
}

/// Both in the order in which they were learnt.
#[derive(Default)]
struct Known {
    accepted: HashSet<[u8; 32]>,
    accepted_order: VecDeque<[u8; 32]>,
    refused: HashSet<[u8; 32]>,
    refused_order: VecDeque<(Instant, [u8; 32])>,
}

impl Known {
    fn accept(&mut self, tenant: [u8; 32]) {
        if self.accepted.insert(tenant) {
            self.accepted_order.push_back(tenant);
        }
        while self.accepted_order.len() > ACCEPTED_MAX {
            let Some(oldest) = self.accepted_order.pop_front() else { return };
            self.accepted.remove(&oldest);
        }
    }

    fn refuse(&mut self, tenant: [u8; 32], now: Instant) {
        self.forget_old(now);
        if self.refused.insert(tenant) {
            self.refused_order.push_back((now, tenant));
        }
        while self.refused_order.len() > REFUSED_MAX {
            self.forget_oldest();
        }
    }

    fn forget_old(&mut self, now: Instant) {
        while self.refused_order.front().is_some_and(|(at, _)| now.duration_since(*at) >= REFUSED_FOR) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, oldest)) = self.refused_order.pop_front() {
            self.refused.remove(&oldest);
        }
    }

    /// The upstream's word, where it is remembered.
    fn said(&mut self, tenant: &[u8; 32], now: Instant) -> Option<Result<(), ApiError>> {
        if self.accepted.contains(tenant) {
            return Some(Ok(()));
        }
        self.forget_old(now);
        self.refused.contains(tenant).then(|| Err(refused()))
    }
}

impl Default for Vouching {
    fn default() -> Vouching {
        let runs = Runs {
            max: LANE_MAX,
            tenant_max: ADDRESS_MAX,
            queue_max: QUEUE_MAX,
            queue_seconds: QUEUE_SECONDS,
            ..Runs::default()
        };
        Vouching {
            known: Mutex::default(),
            lane: Admission::new(&runs),
            looks: Arc::new(Semaphore::new(LOOKS_MAX)),
        }
    }
}

impl Vouching {
    /// The upstream's word on whoever has this credential, where it is remembered. Nobody is asked.
    pub fn said(&self, tenant: &TenantKey) -> Option<Result<(), ApiError>> {
        self.known().said(&tenant.0, Instant::now())
    }

    /// Whether the upstream has accepted it.
    pub fn is_known(&self, tenant: &TenantKey) -> bool {
        self.said(tenant).is_some_and(|said| said.is_ok())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // What is done under the lock cannot stop half way.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what the supervisor said of a tenant. Only a status of the upstream's is its word.
    fn learn(&self, tenant: [u8; 32], said: Result<(), Refused>) {
        match said {
            Ok(()) => self.known().accept(tenant),
            Err(Refused { reason: Refusal::CredentialRefused, errno: 1.., .. }) => {
                self.known().refuse(tenant, Instant::now());
            }
            Err(_) => {}
        }
    }
}

/// Lets pass who is known, and asks about who is not. It waits with the connection of whoever asks and ends with it; what
/// was asked already is heard to its end and remembered.
///
/// # Errors
/// 401 for a credential that the upstream does not accept, or has just not accepted; 529 where too many others are asked
/// about; what the upstream says else, and 503 in a drain.
pub async fn pass(frontend: &App, tenant: &TenantKey, credential: &[u8]) -> Result<(), ApiError> {
    let vouching = &frontend.vouching;
    if let Some(said) = vouching.said(tenant) {
        return said;
    }
    // Whoever had a run here before has a folder, and waits for no stranger, not after a restart either.
    let look = Arc::clone(&vouching.looks).acquire_owned().await;
    match ask(frontend, tenant, None, look).await? {
        Ok(()) => return Ok(()),
        Err(Refused { reason: Refusal::CredentialRefused | Refusal::Busy, .. }) => {}
        Err(other) => return Err(ApiError::refused(&other)),
    }
    let mut from = [0; 32];
    from[..16].copy_from_slice(&FROM.try_with(|place| *place).unwrap_or_default().to_be_bytes());
    let draining = frontend.draining.subscribe();
    let place = vouching.lane.enter(TenantKey(from), None, 0, draining, drop).await.map_err(crowded)?;
    // Somebody may have asked about the same one meanwhile.
    if let Some(said) = vouching.said(tenant) {
        return said;
    }
    ask(frontend, tenant, Some(credential), place).await?.map_err(|refused| ApiError::refused(&refused))
}

fn refused() -> ApiError {
    let refused = Refused { run: RunId([0; 16]), reason: Refusal::CredentialRefused, step: 0, errno: 0 };
    ApiError::refused(&refused)
}

/// The lane's own word on why there is no place in it.
fn crowded(error: ApiError) -> ApiError {
    if error.status == 503 {
        return error;
    }
    let message = "This server has not seen this credential yet, and asks the upstream API about as many others as it may \
                   at a time.";
    ApiError { retry_after: error.retry_after, ..ApiError::new(529, "busy", message) }
}

/// Asks the supervisor for the least run of this tenant, and ends it before it does anything. Without a credential that is
/// begun for a tenant that has a folder; with one, the upstream is asked about one that has none. `place` is held until
/// nothing of the run is left.
async fn ask(
    frontend: &App,
    tenant: &TenantKey,
    credential: Option<&[u8]>,
    place: impl Send + 'static,
) -> Result<Result<(), Refused>, ApiError> {
    let spawn = Spawn {
        run: id::run(),
        tenant: *tenant,
        kind: Kind::Sessions,
        level: way::level(frontend, &HeaderMap::new(), None)?,
        conversation: Conversation::Stateless,
        ephemeral: false,
        proof: false,
        session: [0; 16],
        workspace: [0; 16],
        model: Model::DEFAULT,
        effort: Effort::Unset,
        turns_max: 0,
        mcp_refused: false,
        budget_microusd: 0,
        limits: Limits::NONE,
    };
    let sealed = |(name, bytes)| memfd::sealed(name, bytes);
    let files = [("options", &[][..])].into_iter().chain(credential.map(|bytes| ("credential", bytes)));
    let fds: Vec<OwnedFd> = files
        .map(sealed)
        .collect::<Result<_, _>>()
        .map_err(|_| ApiError::internal("no_memory_file", "This server is out of descriptors or memory."))?;
    let (app, guard) = (Arc::clone(frontend), frontend.busy.subscribe());
    let (told, said) = oneshot::channel();
    // A task of its own: whoever goes away does not make room for the next question while theirs is still under way.
    tokio::spawn(async move {
        let run = app.supervisor.spawn(spawn, fds).await;
        let said = run.as_ref().map(|_| ()).map_err(|refused| *refused);
        app.vouching.learn(spawn.tenant.0, said);
        let _ = told.send(said);
        if let Ok(run) = run {
            let mut talk = Talk::new(run, way::bounds(&app, spawn.level, true), None);
            talk.give_up();
            talk.end().await;
        }
        drop((place, guard));
    });
    said.await.map_err(|_| ApiError::internal("run_lost", "The run ended and no word of it came."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(reason: Refusal, errno: u16) -> Result<(), Refused> {
        Err(Refused { run: RunId([0; 16]), reason, step: 0, errno })
    }

    #[test]
    fn r05_a_no_is_remembered_for_a_while_and_only_the_upstreams_own() {
        let vouching = Vouching::default();
        let tenant = TenantKey([1; 32]);
        assert!(vouching.said(&tenant).is_none());
        // That it could not be asked, limits, or that nobody was asked about at all is no word on a credential.
        for (reason, errno) in [
            (Refusal::CredentialRefused, 0),
            (Refusal::UpstreamUnavailable, 429),
            (Refusal::UpstreamUnavailable, 503),
            (Refusal::Busy, 0),
        ] {
            vouching.learn(tenant.0, word(reason, errno));
            assert!(vouching.said(&tenant).is_none(), "{reason} {errno}");
        }
        vouching.learn(tenant.0, word(Refusal::CredentialRefused, 401));
        let error = vouching.said(&tenant).expect("a word").expect_err("a no");
        assert_eq!((error.status, error.code), (401, "credential_refused"));
        let mut known = vouching.known();
        let now = Instant::now();
        assert!(known.said(&tenant.0, now + REFUSED_FOR).is_none(), "it may have become right");
        assert!(known.refused.is_empty() && known.refused_order.is_empty());
        // Who invents credentials makes no more remembered than there is room for, and no yes forgotten.
        known.accept([2; 32]);
        for number in 0..2 * REFUSED_MAX as u64 {
            let mut invented = [0; 32];
            invented[..8].copy_from_slice(&number.to_be_bytes());
            known.refuse(invented, now);
        }
        assert_eq!((known.refused.len(), known.refused_order.len()), (REFUSED_MAX, REFUSED_MAX));
        assert!(known.said(&[2; 32], now).is_some_and(|said| said.is_ok()));
        for number in 0..ACCEPTED_MAX as u64 {
            let mut one = [9; 32];
            one[..8].copy_from_slice(&number.to_be_bytes());
            known.accept(one);
        }
        assert_eq!((known.accepted.len(), known.accepted_order.len()), (ACCEPTED_MAX, ACCEPTED_MAX));
    }
}
