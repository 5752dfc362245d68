//! Requests about a tenant's sessions: each is a run in that tenant's cage, and this only says it in HTTP's words.
//! It must never tell another tenant's session from one that is not there.

pub mod servers;

use axum::Router;
use axum::extract::{Extension, RawQuery, State};
use axum::response::Response;
use axum::routing::{get, post, put};
use http::{HeaderMap, StatusCode, Uri};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};
use uuid::Uuid;

use gaoler_files::{PAGE_MAX, TITLE_CHARS_MAX, Unreadable, What};
use gaoler_protocol::Kind;

use super::error::ApiError;
use super::files::{self, Asker, Told, Whose};
use super::forms::{Blocks, Rows};
use super::http::{App, RequestId, failure, json};
use super::json::Room;
use super::sent::{Sent, WORDS_BYTES_MAX};
use super::way;
use servers::{Changing, Named, named};

/// Rows of a page where nobody says how many.
const PAGE: u32 = 20;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/sessions", get(list))
        .route("/v1/sessions/{id}", get(one).post(rename).delete(remove))
        .route("/v1/sessions/{id}/fork", post(fork))
        .route("/v1/sessions/{id}/mcp", put(servers::set).get(servers::show).delete(servers::remove))
        .route("/v1/sessions/{id}/transcript", get(transcript))
}

/// A session, in a list or alone.
#[derive(Debug, Serialize, Deserialize)]
struct Session {
    id: Uuid,
    title: Option<String>,
    workspace_id: String,
    created_at: String,
    last_used_at: String,
    turns: u64,
    bytes: u64,
    disk_bytes: u64,
    running: bool,
    unreadable: Option<Unreadable>,
}

/// A page of something.
#[derive(Debug, Serialize, Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
pub struct Page<T> {
    /// Its rows.
    pub data: Rows<T, { PAGE_MAX as usize }>,
    /// Whether another follows.
    pub has_more: bool,
}

/// What was said in a session.
#[derive(Debug, Serialize, Deserialize)]
struct Transcript {
    session_id: Uuid,
    data: Rows<Message, { PAGE_MAX as usize }>,
    has_more: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Message {
    role: Role,
    content: Blocks,
    created_at: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    User,
    Assistant,
}

/// What is gone.
#[derive(Debug, Serialize, Deserialize)]
pub struct Deleted {
    id: String,
    deleted: bool,
    /// More is to be removed than a client waits for, and goes on without it.
    #[serde(default, skip_serializing_if = "is_false")]
    remains: bool,
}

impl Deleted {
    /// It is gone, with all that it was.
    pub fn whole(id: String) -> Deleted {
        Deleted { id, deleted: true, remains: false }
    }
}

/// Whether a field is left out.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
pub fn is_false(it: &bool) -> bool {
    !it
}

/// An answer in its own form: a cage that says anything else has failed.
///
/// # Errors
/// 500 for another form.
pub fn read<T: DeserializeOwned>(told: Told) -> Result<T, ApiError> {
    let Told::Done(text) = told else { return Err(files::unreadable()) };
    serde_json::from_str(text.get()).map_err(|_| files::unreadable())
}

/// The same, for a client.
///
/// # Errors
/// As of reading it.
pub fn form<T: DeserializeOwned + Serialize>(told: Told) -> Result<Box<RawValue>, ApiError> {
    to_raw_value(&read::<T>(told)?).map_err(|_| files::unreadable())
}

/// The answer to a client.
pub fn answer(status: StatusCode, result: Result<impl Serialize, ApiError>, id: &RequestId) -> Response {
    match result {
        Ok(value) => json(status, &value),
        Err(error) => failure(&error, id),
    }
}

/// A part of an address, between its slashes, as it was sent: an id has no percent signs.
pub fn part(uri: &Uri, at: usize) -> &str {
    uri.path().split('/').nth(at).unwrap_or_default()
}

/// A session's id out of an address: what is none is a session that is not there.
fn session(id: &str) -> Result<Uuid, ApiError> {
    let missing = || ApiError::new(404, "session_not_found", "There is no such session.");
    Uuid::try_parse(id).ok().filter(|_| id.len() == 36).ok_or_else(missing)
}

/// A field of a query, as a number within bounds.
pub fn number(query: &str, name: &str, most: u64, otherwise: u64) -> Result<u64, ApiError> {
    let mut found = form_urlencoded::parse(query.as_bytes()).filter(|(field, _)| field == name);
    let Some((_, value)) = found.next() else { return Ok(otherwise) };
    let least = u64::from(name != "offset");
    let number = value.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| ApiError::invalid(format!("{name}: must be a whole number from {least} to {most}.")))
}

/// A field of a query, as it is.
pub fn word(query: &str, name: &str) -> Option<String> {
    let found = form_urlencoded::parse(query.as_bytes()).find(|(field, _)| field == name);
    found.map(|(_, value)| value.into_owned())
}

/// A small body, which is a JSON object or nothing.
pub async fn fields(frontend: &App, asker: &Asker, body: Sent) -> Result<Map<String, Value>, ApiError> {
    let whose = body.whose_of(frontend, &asker.holder);
    // It may hold a token, and is overwritten when it has been read.
    let (bytes, _held) = body.read(frontend, whose, WORDS_BYTES_MAX).await?;
    if bytes.is_empty() {
        return Ok(Map::new());
    }
    let read = |bytes: &[u8]| {
        let text = std::str::from_utf8(bytes).ok();
        match text.and_then(|text| Room::new().value(text).ok()) {
            Some(Value::Object(fields)) => Ok(fields),
            _ => Err(ApiError::invalid("The body must be a JSON object.")),
        }
    };
    way::parsed(frontend, whose, bytes, read).await
}

/// A title out of a body.
pub fn title(fields: &Map<String, Value>) -> Result<Option<String>, ApiError> {
    match fields.get("title") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(title))
            if title.chars().count() <= TITLE_CHARS_MAX && !title.chars().any(char::is_control) =>
        {
            Ok(Some(title.clone()))
        }
        Some(_) => {
            let message = format!("title: must be a line of at most {TITLE_CHARS_MAX} characters.");
            Err(ApiError::invalid(message))
        }
    }
}

/// One question, and its answer in one form.
macro_rules! asks {
    ($frontend:ident, $headers:ident, $request:ident, $status:expr, $kind:expr, $form:ty, $what:block) => {
        asks!($frontend, $headers, $request, $status, $kind, $form, _asker => $what)
    };
    // Where whoever asks has a part in what is asked.
    (
        $frontend:ident, $headers:ident, $request:ident, $status:expr, $kind:expr, $form:ty, $asker:ident => $what:block
    ) => {{
        let result = async {
            let $asker = files::asker(&$frontend, &$headers).await?;
            let what: What = $what;
            form::<$form>(files::ask(&$frontend, &$headers, $asker, $kind, what, None).await?)
        };
        answer($status, result.await, &$request)
    }};
}
pub(super) use asks;

async fn list(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Response {
    asks!(frontend, headers, request, StatusCode::OK, Kind::Sessions, Page<Session>, {
        let query = query.unwrap_or_default();
        let limit = number(&query, "limit", PAGE_MAX.into(), PAGE.into())? as u32;
        let after = word(&query, "after_id").map(|id| session(&id)).transpose()?;
        What::Sessions { limit, after: after.map(|id| id.to_string()) }
    })
}

async fn one(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    asks!(frontend, headers, request, StatusCode::OK, Kind::Sessions, Session, {
        What::Session { id: session(part(&uri, 3))?.to_string() }
    })
}

async fn rename(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    body: Sent,
) -> Response {
    asks!(frontend, headers, request, StatusCode::OK, Kind::Sessions, Session, asker => {
        let id = session(part(&uri, 3))?;
        let title = title(&fields(&frontend, &asker, body).await?)?;
        let title = title.ok_or_else(|| ApiError::invalid("title: field required."))?;
        What::NameSession { id: id.to_string(), title }
    })
}

async fn remove(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let result = async {
        let Named { asker, owner, session } = named(&frontend, &headers, &uri).await?;
        let _changing = Changing::begin(&owner, session)?;
        let whose = asker.holder.whose();
        let what = What::DropSession { id: session.to_string() };
        let gone = files::ask(&frontend, &headers, asker, Kind::Sessions, what, None).await;
        // What was kept for it goes with it, also where an earlier attempt came no further.
        if gone.as_ref().map_or_else(|error| error.code == "session_not_found", |_| true) {
            servers::forget(&frontend, &owner, session).await?;
        }
        gone_for::<Deleted>(&frontend, whose, Kind::Sessions, gone?)
    };
    answer(StatusCode::OK, result.await, &request)
}

/// What is gone, for a client; what remains of it is gone on with.
pub fn gone_for<T: Gone>(frontend: &App, whose: Whose, kind: Kind, told: Told) -> Result<T, ApiError> {
    let gone: T = read(told)?;
    if gone.remains() {
        files::clean(frontend, whose, kind);
    }
    Ok(gone)
}

/// The answer to a removal.
pub trait Gone: DeserializeOwned + Serialize {
    /// Whether more is to be removed.
    fn remains(&self) -> bool;
}

impl Gone for Deleted {
    fn remains(&self) -> bool {
        self.remains
    }
}

async fn fork(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    body: Sent,
) -> Response {
    let result = async {
        let Named { asker, owner, session } = named(&frontend, &headers, &uri).await?;
        let title = title(&fields(&frontend, &asker, body).await?)?;
        let new = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
        let again = asker.again();
        let what = What::ForkSession { id: session.to_string(), new: new.to_string(), title };
        let told = files::ask(&frontend, &headers, asker, Kind::Sessions, what, None).await?;
        // A copy without them would fail at its first turn, or do less than was meant: it is all or nothing.
        if let Err(error) = servers::copy(&frontend, &owner, session, new).await {
            let what = What::DropSession { id: new.to_string() };
            let _ = files::ask(&frontend, &headers, again, Kind::Sessions, what, None).await;
            return Err(error);
        }
        form::<Session>(told)
    };
    answer(StatusCode::CREATED, result.await, &request)
}

async fn transcript(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    RawQuery(query): RawQuery,
) -> Response {
    asks!(frontend, headers, request, StatusCode::OK, Kind::Sessions, Transcript, {
        let query = query.unwrap_or_default();
        let limit = number(&query, "limit", PAGE_MAX.into(), PAGE_MAX.into())? as u32;
        let offset = number(&query, "offset", u64::from(u32::MAX), 0)?;
        What::Transcript { id: session(part(&uri, 3))?.to_string(), limit, offset }
    })
}
