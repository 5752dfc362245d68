//! A session's own MCP servers: set once, and each of its turns has them that names none itself.
//! It must never show a secret, nor give one session's servers, or one tenant's, to another.

use std::sync::{Mutex, PoisonError};

use axum::extract::{Extension, State};
use axum::response::Response;
use http::{HeaderMap, HeaderValue, StatusCode, Uri};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use gaoler_files::What;
use gaoler_ledger_wire::{Answer, Hex, KeptServers, Proof, Question, Refusal, SERVED_MAX, SERVERS_BYTES_MAX};
use gaoler_protocol::Kind;

use super::{Deleted, Session, answer, part};
use crate::frontend::error::ApiError;
use crate::frontend::files::{self, Asker, Whose};
use crate::frontend::http::{App, RequestId};
use crate::frontend::identity::{Caller, Holder};
use crate::frontend::job::mcp::{self, Servers, not_sealed};
use crate::frontend::job::{Block, Job};
use crate::frontend::sent::{Sent, WORDS_BYTES_MAX};
use crate::frontend::{ledger, tenant, way};

const DAY: i64 = 24 * 60 * 60;

/// Whose sessions.
pub struct Owner {
    whose: Whose,
    proof: Proof,
}

impl Owner {
    /// Whoever asks for files.
    fn of(holder: &Holder) -> Owner {
        Owner { whose: holder.whose(), proof: holder.proof.clone() }
    }

    async fn ask(&self, frontend: &App, question: Question) -> Result<Answer, ApiError> {
        frontend.ledger.ask(Some(self.proof.clone()), question).await
    }

    /// What the text of this session is bound to.
    fn bound(&self, session: Uuid) -> Vec<u8> {
        [tenant::id(&self.whose.tenant).as_slice(), session.as_bytes()].concat()
    }
}

/// Who asks, and for which session.
pub struct Named {
    /// Whoever asks.
    pub asker: Asker,
    /// The same, as an owner of sessions.
    pub owner: Owner,
    /// The session that the address names.
    pub session: Uuid,
}

/// Reads both.
///
/// # Errors
/// As of an asker; 404 for what is no session's id.
pub async fn named(frontend: &App, headers: &HeaderMap, uri: &Uri) -> Result<Named, ApiError> {
    let asker = files::asker(frontend, headers).await?;
    let session = super::session(part(uri, 3))?;
    Ok(Named { owner: Owner::of(&asker.holder), asker, session })
}

/// A session whose servers, or whose being there, is changed now: a session that goes while its servers are set would
/// leave them behind.
pub struct Changing([u8; 32], Uuid);

/// Those of all tenants. Each is a request that is under way, and those have their bounds.
static CHANGING: Mutex<Vec<([u8; 32], Uuid)>> = Mutex::new(Vec::new());

impl Changing {
    /// Until it is dropped.
    ///
    /// # Errors
    /// 409 where somebody else does the same.
    pub fn begin(owner: &Owner, session: Uuid) -> Result<Changing, ApiError> {
        let mut all = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        if all.contains(&(owner.whose.tenant.0, session)) {
            return Err(ApiError::new(409, "session_busy", "Another request changes this session."));
        }
        all.push((owner.whose.tenant.0, session));
        Ok(Changing(owner.whose.tenant.0, session))
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        let mut all = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|it| *it != (self.0, self.1));
    }
}

/// Sets them, in the place of those before.
pub async fn set(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    body: Sent,
) -> Response {
    let mut left_out = Vec::new();
    let result = async {
        let Named { asker, owner, session } = named(&frontend, &headers, &uri).await?;
        let whose = body.whose_of(&frontend, &asker.holder);
        let (bytes, hold) = body.read(&frontend, whose, WORDS_BYTES_MAX).await?;
        let mcp::Question { servers, level, credential, ignored } =
            way::parsed(&frontend, whose, bytes, mcp::question).await?;
        drop(hold);
        left_out = ignored;
        if credential.is_some() {
            left_out.push("oauth_credentials".into());
        }
        let level = way::level(&frontend, &headers, level)?;
        servers.settle(&frontend.settings().mcp, level, way::tier(&frontend))?;
        let _changing = Changing::begin(&owner, session)?;
        let found = there(&frontend, &headers, asker, &owner, session).await?;
        keep(&frontend, &owner, session, &servers, used_at(&found)).await?;
        Ok(told(session, servers.shown()))
    };
    let result = result.await;
    let mut response = answer(StatusCode::OK, result, &request);
    if let Some(value) = HeaderValue::from_str(&left_out.join(",")).ok().filter(|value| !value.is_empty()) {
        response.headers_mut().insert(way::IGNORED, value);
    }
    response
}

/// Which are set, without their secrets.
pub async fn show(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let result = async {
        let Named { asker, owner, session } = named(&frontend, &headers, &uri).await?;
        there(&frontend, &headers, asker, &owner, session).await?;
        let kept = read(&frontend, &owner, session).await?;
        let shown = kept.map_or_else(|| Value::Object(Map::new()), |(servers, _)| servers.shown());
        Ok(told(session, shown))
    };
    answer(StatusCode::OK, result.await, &request)
}

/// Forgets them. Where there are none, there are none.
pub async fn remove(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let result = async {
        let Named { asker, owner, session } = named(&frontend, &headers, &uri).await?;
        let _changing = Changing::begin(&owner, session)?;
        there(&frontend, &headers, asker, &owner, session).await?;
        forget(&frontend, &owner, session).await?;
        Ok(Deleted::whole(session.to_string()))
    };
    answer(StatusCode::OK, result.await, &request)
}

/// Gives a turn its session's servers, where the request names none; whether it did.
///
/// # Errors
/// 409 for servers that cannot be opened any more; 503 where the ledger is silent.
pub async fn give(frontend: &App, caller: &Caller, job: &mut Job) -> Result<bool, ApiError> {
    let Some(session) = job.session.filter(|_| !job.mcp.named) else { return Ok(false) };
    let owner = Owner { whose: caller.whose(), proof: caller.proof.clone() };
    let Some((servers, kept)) = read(frontend, &owner, session).await? else { return Ok(false) };
    // A run that waits for its client's tools has the session's place, and so the session is there.
    let goes_on = job.prompt.iter().any(|block| matches!(block, Block::ToolResult { .. }));
    if !goes_on && !is_there(frontend, &owner, session, kept).await? {
        return Ok(false);
    }
    job.mcp = servers.permitted(!job.mcp.refused);
    Ok(true)
}

/// The same error, for a request that has not named what is wrong.
pub fn explained(error: ApiError) -> ApiError {
    let message = format!(
        "{} The session has it (GET /v1/sessions/{{id}}/mcp), and this turn cannot: an empty mcp_servers goes on without.",
        error.message
    );
    ApiError { message, ..error }
}

/// Gives a copy of a session what the session has.
///
/// # Errors
/// As of setting them.
pub async fn copy(frontend: &App, owner: &Owner, from: Uuid, to: Uuid) -> Result<(), ApiError> {
    match read(frontend, owner, from).await? {
        Some((servers, kept)) => keep(frontend, owner, to, &servers, kept.used_at).await,
        None => Ok(()),
    }
}

/// Forgets what is kept for a session.
///
/// # Errors
/// 503 where the ledger is silent.
pub async fn forget(frontend: &App, owner: &Owner, session: Uuid) -> Result<(), ApiError> {
    owner.ask(frontend, Question::DropServers { sessions: vec![session.to_string()] }).await.map(drop)
}

/// The session, as its tenant's cage tells of it. What is kept for one that is not there goes.
async fn there(
    frontend: &App,
    headers: &HeaderMap,
    asker: Asker,
    owner: &Owner,
    session: Uuid,
) -> Result<Session, ApiError> {
    let what = What::Session { id: session.to_string() };
    let found = files::ask(frontend, headers, asker, Kind::Sessions, what, None).await;
    if found.as_ref().is_err_and(is_missing) {
        forget(frontend, owner, session).await?;
    }
    super::read(found?)
}

/// Whether what was kept is still of a session that is there. One that was used since the operator's days began is.
async fn is_there(frontend: &App, owner: &Owner, session: Uuid, kept: KeptServers) -> Result<bool, ApiError> {
    let days = i64::from(frontend.settings().sessions.ttl_days);
    if days == 0 || kept.used_at >= OffsetDateTime::now_utc().unix_timestamp() - days * DAY {
        return Ok(true);
    }
    let id = session.to_string();
    match files::on_sessions(frontend, owner.whose.clone(), What::Session { id: id.clone() }).await {
        Ok(found) => {
            let used_at = used_at(&super::read(found)?);
            let again = Question::KeepServers { session: id, locked: kept.locked, used_at };
            owner.ask(frontend, again).await.map(|_| true)
        }
        Err(error) if is_missing(&error) => forget(frontend, owner, session).await.map(|()| false),
        Err(error) => Err(error),
    }
}

fn is_missing(error: &ApiError) -> bool {
    error.code == "session_not_found"
}

async fn keep(
    frontend: &App,
    owner: &Owner,
    session: Uuid,
    servers: &Servers,
    used_at: i64,
) -> Result<(), ApiError> {
    let text = servers.keep(&frontend.settings().mcp, &frontend.vault, &tenant::id(&owner.whose.tenant))?;
    let lock = tenant::lock(&frontend.secret, &owner.whose.tenant, session.as_bytes());
    let locked = lock.lock(&owner.bound(session), &text).ok_or_else(not_sealed)?;
    if locked.len() > SERVERS_BYTES_MAX {
        let message =
            format!("mcp_servers: more than {SERVERS_BYTES_MAX} bytes with what opens them, sealed.");
        return Err(ApiError::new(413, "request_too_large", message));
    }
    let locked = Hex(locked);
    // As many as there may be: those of sessions that are gone make room.
    for again in [true, false] {
        let (session, locked) = (session.to_string(), locked.clone());
        let question = Question::KeepServers { session, locked, used_at };
        match frontend.ledger.try_ask(Some(owner.proof.clone()), question).await? {
            Ok(_) => return Ok(()),
            Err(Refusal::Conflict) if again => {
                files::forget_gone(frontend, owner.whose.clone(), &owner.proof).await?;
            }
            Err(Refusal::Conflict) => {}
            Err(refusal) => return Err(ledger::refused(refusal)),
        }
    }
    let message = format!(
        "{SERVED_MAX} of your sessions have MCP servers of their own, and more may not: DELETE those of one, or the session."
    );
    Err(ApiError::new(413, "too_many", message))
}

async fn read(
    frontend: &App,
    owner: &Owner,
    session: Uuid,
) -> Result<Option<(Servers, KeptServers)>, ApiError> {
    let kept = match owner.ask(frontend, Question::Servers { session: session.to_string() }).await? {
        Answer::Servers(Some(kept)) => kept,
        Answer::Servers(None) => return Ok(None),
        _ => return Err(ledger::unavailable()),
    };
    let lock = tenant::lock(&frontend.secret, &owner.whose.tenant, session.as_bytes());
    let text = lock.open(&owner.bound(session), &kept.locked.0);
    let servers = text.and_then(|text| Servers::kept(&text, &frontend.vault));
    let unreadable = || {
        let message = "The session's MCP servers cannot be opened any more, for this server has another key: set them \
                       again with PUT /v1/sessions/{id}/mcp, or DELETE them.";
        ApiError::new(409, "mcp_unreadable", message).final_word()
    };
    servers.map(|servers| Some((servers, kept))).ok_or_else(unreadable)
}

fn told(session: Uuid, servers: Value) -> Value {
    json!({"session_id": session, "mcp_servers": servers})
}

/// When a session was used last, by its own cage's word; a word that is none counts as long ago.
fn used_at(session: &Session) -> i64 {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let read = OffsetDateTime::parse(&session.last_used_at, &Rfc3339);
    read.map_or(0, OffsetDateTime::unix_timestamp).clamp(0, now)
}
