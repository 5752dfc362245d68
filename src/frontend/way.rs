//! The way of a request that asks for a run: its credential, its body, the run, and the answer's way to its client.
//! It must never buffer without a bound, nor wait without a deadline.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::response::Response;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;
use zeroize::Zeroizing;

use gaoler_protocol::{
    Conversation, Kind, Level, Limits, OPTIONS_BYTES_MAX, RunId, Section, Spawn, TenantKey, Tier, section,
};
use gaoler_sys::memfd;

use super::admission::{Full, Ticket};
use super::answer::{Answer, Ending, Heading};
use super::bodies::{Hold, Whose};
use super::books::Note;
use super::cli::{client, input, transcript};
use super::dialect::{self, Dialect};
use super::error::ApiError;
use super::http::{App, RequestId};
use super::identity::{Caller, Shown};
use super::job::mcp::Settled;
use super::job::tools::settle;
use super::job::{Block, Job, Shape};
use super::run::{Bounds, Exchange, Resumed};
use super::runs::{About, Asked, Entered, Writer, reply};
use super::sent::Sent;
use super::sessions::servers;
use super::trace::Trace;
use super::waits::Terms;
use super::{Frontend, budget, crowd, files, id, identity, log, metrics, vouching};
use crate::limits;

/// Bytes of a body, at most: the API's own limit.
pub const BODY_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Bytes of a body that is read where it came: some milliseconds.
const READ_AT_ONCE_MAX: usize = 256 * 1024;
/// What a node of a parsed object takes, and how many fields stand in one at least: the half of what there is room for.
const NODE_BYTES: usize = 700;
const NODE_FIELDS: usize = 5;
/// How often a request that waits looks for a run that has waited for its client for long enough to make room.
const ROOM_LOOK: Duration = Duration::from_millis(100);

/// Fields of a request that had no effect.
pub const IGNORED: HeaderName = HeaderName::from_static("x-gaoler-ignored");
/// The run.
pub const RUN_ID: HeaderName = HeaderName::from_static("x-gaoler-run");
/// Of a request: the level and the limits that it wishes for. Of an answer: those that its run had.
pub const LEVEL: HeaderName = HeaderName::from_static("x-gaoler-level");
const LIMITS: HeaderName = HeaderName::from_static("x-gaoler-limits");
/// Of a request: the session, where the dialect has no field for it.
const SESSION: HeaderName = HeaderName::from_static(dialect::SESSION);
/// Of a request: `ids` puts an id before each event of a stream, to go on after.
const EVENTS: HeaderName = HeaderName::from_static("x-gaoler-events");
/// Milliseconds that the request waited for a run.
pub const QUEUED: HeaderName = HeaderName::from_static("x-gaoler-queue-ms");

/// Serves one such request to the first byte of its answer; the rest is a stream of its own.
///
/// # Errors
/// What came before the first byte, for its status line.
pub async fn answer(
    dialect: Dialect,
    frontend: &App,
    id: &RequestId,
    headers: &HeaderMap,
    body: Sent,
) -> Result<Response, ApiError> {
    let begun = Instant::now();
    refuse_encoding(headers)?;
    // A credential in a header is judged before the body is read, as the API itself does it.
    let shown = identity::may_run(identity::shown(frontend, headers).await?, headers)?;
    if let Shown::Credential(credential, None) = &shown
        && let Some(said) = frontend.vouching.said(&credential.tenant(&frontend.secret))
    {
        said?;
    }
    if *frontend.draining.borrow() {
        return Err(ApiError::draining());
    }

    let whose = body.whose(frontend, &shown)?;
    let (body, hold) = body.read(frontend, whose, BODY_BYTES_MAX).await?;
    let (settings, said) = (frontend.settings(), headers.clone());
    let read = move |body: &[u8]| {
        let meaning =
            [LEVEL, LIMITS, SESSION].map(|name| said.get(name).map_or(&b""[..], HeaderValue::as_bytes));
        let asked = Asked::new(&said, &[&[dialect.path().as_bytes()], &meaning[..]].concat(), body);
        Ok((asked, dialect.parse(body, &said, &settings.models.list)?))
    };
    // It may hold a token, and is overwritten when it has been read.
    let (asked, mut job) = parsed(frontend, whose, body, read).await?;
    if tier(frontend) == Tier::Directory && !job.wishes.tools.is_empty() {
        // The CLI has file tools alone there.
        job.wishes.tools.clear();
        job.ignored.push("tools".into());
    }
    let caller = identity::caller(frontend, shown, headers, job.credential.as_ref(), now_ms()).await?;
    let mut level = level(frontend, headers, job.level)?;
    let mut limits = limits(headers, &job.limits)?;

    let tenant = caller.tenant;
    if let Some(terms) = frontend.waits.terms(&tenant, answered(&job)) {
        // A run goes on as it began: what the request leaves open is the run's.
        if !headers.contains_key(LEVEL) && job.level.is_none() {
            level = terms.level;
        }
        if limits == Limits::NONE {
            limits = terms.limits;
        }
    }
    let names_servers = job.mcp.named;
    let given = servers::give(frontend, &caller, &mut job).await?;
    let mcp = job.mcp.settle(&frontend.settings().mcp, level, tier(frontend));
    let mcp = mcp.map_err(|error| if given { servers::explained(error) } else { error })?;
    if !job.wishes.tools.is_empty() && mcp.names.iter().any(|name| name == client::SERVER) {
        let message = "mcp_servers.client: your own tools have this name; call the server something else.";
        return Err(ApiError::invalid(message));
    }
    if job.mcp.refused && !mcp.names.is_empty() && !job.wishes.tools.is_empty() {
        return Err(ApiError::invalid(
            "skip_mcp_permissions: false would refuse your own tools too; leave one out.",
        ));
    }
    // Before there is a run that could outlive its connection, and before any place or turn.
    if caller.unlinked {
        vouching::pass(frontend, &tenant, &caller.credential).await?;
    }
    frontend.live().rates.tenant(&tenant, &caller.allowance)?;
    let order = Order::new(&job, tenant, level, limits);
    let asked = asked?(tenant);
    let about = About {
        run: order.spawn.run,
        owner: caller.name.clone(),
        owner_key: caller.key.clone(),
        dialect,
        shape: job.shape,
        session: job.session,
        model: job.model.as_str().to_string(),
        level,
        on_disconnect: job.wishes.on_disconnect,
        ids: headers.get(EVENTS).is_some_and(|value| value == "ids"),
        asked_ms: now_ms(),
    };
    let (reader, joined) = match frontend.runs.enter(&asked, about)? {
        Entered::Joined(reader) => (reader, true),
        Entered::Begun(writer, reader) => {
            let trace = id.1.clone();
            begin(frontend, writer, job, Request { order, caller, mcp, names_servers, hold, trace });
            (reader, false)
        }
    };
    crowd::is_known();
    let shape = reader.log().entry.about.shape;
    let answered = reply::answer(reader, id, joined).await;
    if shape == Shape::Events && answered.as_ref().is_ok_and(|response| response.status() == StatusCode::OK) {
        metrics::first_event(begun.elapsed());
    }
    answered
}

/// A request that is to become a run.
struct Request {
    order: Order,
    caller: Caller,
    mcp: Settled,
    /// It says which servers it wants, rather than to take its session's.
    names_servers: bool,
    /// What its body takes of what all bodies may.
    hold: Hold,
    trace: Trace,
}

impl Request {
    /// What its run goes on under.
    fn terms(&self) -> Terms {
        let Spawn { level, limits, mcp_refused, .. } = self.order.spawn;
        Terms { level, limits, servers: (Sha256::digest(&self.mcp.config).into(), mcp_refused) }
    }

    /// Whether a run of these terms is what it asks for.
    fn fits(&self, terms: &Terms) -> bool {
        let own = self.terms();
        let servers = own.servers == terms.servers || !self.names_servers;
        own.level == terms.level && own.limits == terms.limits && servers
    }
}

/// The calls whose results a request brings.
fn answered(job: &Job) -> impl Iterator<Item = &str> {
    job.prompt.iter().filter_map(|block| match block {
        Block::ToolResult { id, .. } => Some(id.as_str()),
        _ => None,
    })
}

/// What a client says of its calls, for the run that waits for it.
pub struct Continued {
    writer: Writer,
    job: Job,
    request: Request,
}

/// Sets a request on its way: to the run that waits for it, or to one of its own.
fn begin(frontend: &App, writer: Writer, job: Job, request: Request) {
    let tenant = request.order.spawn.tenant;
    let session = job.session;
    let terms = frontend.waits.terms(&tenant, answered(&job));
    let (waiting, mut leaving) = match terms.is_none_or(|terms| request.fits(&terms)) {
        true => (frontend.waits.take(&tenant, answered(&job)), None),
        // Another level, other limits or servers than the run has: it ends, and one that has them begins out of the history.
        false => (None, frontend.waits.leave(&tenant, answered(&job))),
    };
    let continued = Continued { writer, job, request };
    // One that has ended just now does not hear it, and a new one is begun out of the history.
    let not_heard = match waiting {
        Some(run) => run.send(continued).err(),
        None => Some(continued),
    };
    if let Some(Continued { writer, mut job, request }) = not_heard {
        settle(&mut job);
        // A session has one run: one that waits for calls that its client has dropped ends first.
        leaving = leaving.or_else(|| frontend.waits.give_up(&tenant, session?));
        tokio::spawn(conduct(Arc::clone(frontend), writer, job, request, leaving));
    }
}

/// A run from its place in the queue to its end. It depends on no connection: whoever reads its log keeps it alive.
async fn conduct(
    frontend: App,
    mut writer: Writer,
    mut job: Job,
    request: Request,
    leaving: Option<watch::Receiver<()>>,
) {
    let terms = request.terms();
    let Request { order, caller, mcp, hold, trace, .. } = request;
    trace.asks(&order.spawn, &caller.name, job.model.as_str());
    let (fds, sealed) = match order.fds(&job, &mcp, &caller.credential, &frontend.settings().cli.version) {
        Ok(made) => made,
        Err(error) => return writer.end(None, Ending::Failed(error), now_ms()),
    };
    // Asked here, of what is to be a run of its own: a repetition follows the one that is there.
    let reserved = tokio::select! {
        biased;
        why = writer.unwanted() => Err(why.error()),
        reserved = budget::reserve(&frontend, &caller.name, &caller.allowance, job.model.as_str()) => reserved,
    };
    let reserved = match reserved {
        Ok(reserved) => reserved,
        Err(error) => return writer.end(None, Ending::Failed(error), now_ms()),
    };
    let (whose, proof) = (caller.whose(), caller.proof.clone());
    let note = Note::of(&frontend, caller, &job, reserved);
    let servers = mcp.names;
    // All that is in the files now: a request that waits takes its memory once.
    (job.system, job.earlier) = (String::new(), Vec::new());
    let tools = std::mem::take(&mut job.wishes.tools);
    let offers = !tools.is_empty();
    let lines = [input::initialize(job.wishes.schema.as_ref(), offers), input::user(&job.prompt)].concat();
    job.prompt = Vec::new();
    let values = tools.iter().map(|tool| &tool.schema).chain(job.wishes.schema.as_ref());
    let values: usize = values.map(weight_of_object).sum();
    let held = sealed + lines.len() + values + tools.iter().map(|tool| tool.description.len()).sum::<usize>();
    let (level, tenant, most) = (order.spawn.level, order.spawn.tenant, whose.most);
    let resumed = job.session.map(|session| {
        let (frontend, whose) = (Arc::clone(&frontend), whose.clone());
        Resumed { frontend, whose, session }
    });
    if job.session.is_some() {
        files::sweep(&frontend, whose, &proof).await;
    }
    let mut step = trace.begin("queue");
    let entering = async {
        if let Some(mut leaving) = leaving {
            // It ends with its run, whose end has deadlines of its own.
            while leaving.changed().await.is_ok() {}
        }
        // From here on it counts among those that wait, and no more among those that are read.
        let told = |ticket| {
            drop(hold);
            writer.queued(ticket);
        };
        place(&frontend, tenant, most, held, told).await
    };
    let entered = tokio::select! {
        biased;
        why = writer.unwanted() => Err(why.error()),
        entered = entering => entered,
    };
    let place = match entered {
        Ok(place) => {
            metrics::waited(place.waited);
            place
        }
        Err(error) => {
            step.fail(&error);
            return writer.end(None, Ending::Failed(error), now_ms());
        }
    };
    // What ran meanwhile may have used up the rest.
    if let Some(budget) = note.watch()
        && let Err(error) = budget.left().await
    {
        step.fail(&error);
        drop(place);
        return writer.end(None, Ending::Failed(error), now_ms());
    }
    drop(step);
    let mut step = trace.begin("launch");
    let spawned = tokio::select! {
        biased;
        why = writer.unwanted() => Err(why.error()),
        spawned = frontend.supervisor.spawn(order.spawn, fds) => spawned.map_err(|refused| ApiError::refused(&refused)),
    };
    let run = match spawned {
        Ok(run) => run,
        Err(error) => {
            step.fail(&error);
            drop(place);
            let explained = match &resumed {
                Some(resumed) => resumed.explain(&error).await,
                None => None,
            };
            return writer.end(None, Ending::Failed(explained.unwrap_or(error)), now_ms());
        }
    };
    step.launched(&run.spawned);
    drop(step);
    let in_force = run.spawned.limits.rows().map(|(name, limit)| format!("{name}={limit}"));
    let in_force = in_force.collect::<Vec<_>>().join(",");
    let mut waited = place.waited.as_millis();
    let (guard, session) = (frontend.busy.subscribe(), job.session);
    let bounds = bounds(&frontend, level, session.is_none());
    let mut exchange = Exchange::begin(run, lines, tools, bounds, note, place, trace).resumes(resumed);
    loop {
        writer.running(now_ms(), head(&writer, &in_force, waited, &job.ignored));
        let (dialect, shape) = (writer.about().dialect, writer.about().shape);
        let answer = answer_of(&job, &writer, &servers).offering(offers);
        drop(job);
        let calls = exchange.answer(answer, dialect.render(shape), writer).await;
        let Some(calls) = calls else { break };
        // It waits from before its client is told, so that the client cannot come too early.
        let ids = calls.calls.clone();
        let mut waiting = frontend.waits.add(&tenant, session, calls.run(), ids.clone(), terms.clone());
        exchange = calls.tell();
        let said = waiting.answer(frontend.draining.subscribe(), exchange.ended()).await;
        let Some(continued) = said else {
            exchange.abandon().await;
            break;
        };
        drop(waiting);
        let Request { order: turn, caller, trace, .. } = continued.request;
        trace.asks(&turn.spawn, &caller.name, continued.job.model.as_str());
        exchange.go_on(&ids, &continued.job.prompt, trace);
        (job, writer, waited) = (continued.job, continued.writer, 0);
        let continues =
            [("run", order.spawn.run.to_string().into()), ("as", writer.about().run.to_string().into())];
        log::line("continued", &continues);
    }
    drop(guard);
}

/// A place for a run of this tenant, whose request holds so many bytes. While there is none, runs that wait for their clients make room: they do nothing, and
/// what their clients say later begins a run out of the history.
///
/// # Errors
/// As of waiting for a place.
pub async fn place(
    frontend: &Frontend,
    tenant: TenantKey,
    most: Option<u64>,
    bytes: usize,
    told: impl FnOnce(u64),
) -> Result<Ticket, ApiError> {
    let entering = frontend.admission.enter(tenant, most, bytes, frontend.draining.subscribe(), told);
    let room = async {
        loop {
            let leaving = match frontend.admission.full(&tenant) {
                Some(Full::Tenant) => frontend.waits.give_way(Some(&tenant)),
                Some(Full::Server) => frontend.waits.give_way(None),
                None => None,
            };
            let Some((run, mut gone)) = leaving else {
                tokio::time::sleep(ROOM_LOOK).await;
                continue;
            };
            log::line("gave_way", &[("run", run.to_string().into())]);
            // One at a time for each request that waits: it ends with its run, whose end has deadlines of its own.
            while gone.changed().await.is_ok() {}
        }
    };
    tokio::select! {
        biased;
        entered = entering => entered,
        () = room => Err(ApiError::internal("run_lost", "Nobody makes room any more.")),
    }
}

/// What the head of an answer says of its run.
fn head(writer: &Writer, in_force: &str, waited: u128, ignored: &[String]) -> HeaderMap {
    let told = [
        (RUN_ID, writer.about().run.to_string()),
        (LEVEL, writer.about().level.name().to_string()),
        (LIMITS, in_force.to_string()),
        (QUEUED, waited.to_string()),
        (IGNORED, ignored.join(",")),
    ];
    let told = told.into_iter().filter(|(_, value)| !value.is_empty());
    told.filter_map(|(name, value)| Some((name, HeaderValue::from_str(&value).ok()?))).collect()
}

fn answer_of(job: &Job, writer: &Writer, servers: &[String]) -> Answer {
    let about = writer.about();
    let heading = Heading {
        id: about.dialect.answer_id(),
        session: job.session,
        run: about.run,
        model: job.model.as_str().to_string(),
        asked_at: now_ms() / 1000,
        usage_last: job.usage_last,
        servers: servers.to_vec(),
    };
    Answer::new(heading, about.shape, job.thinking).structured(job.wishes.schema.is_some())
}

/// Bounds that the operator's settings give to every run.
pub fn bounds(frontend: &Frontend, level: Level, disposable: bool) -> Bounds {
    let silence = Duration::from_secs(u64::from(frontend.settings().runs.silence_seconds.max(1)));
    Bounds { silence, level, disposable }
}

/// The tier in force; the least before it is known.
pub fn tier(frontend: &Frontend) -> Tier {
    frontend.listen.get().map_or(Tier::Directory, |listen| listen.tier)
}

/// The level of a run: the operator's default, or what the request asks for where that is not looser than
/// the operator's maximum. Asked for twice, the stricter one holds.
pub fn level(frontend: &Frontend, headers: &HeaderMap, in_body: Option<Level>) -> Result<Level, ApiError> {
    let named = |name: &str| Level::from_name(name).unwrap_or(Level::Paranoid);
    let maximum = named(&frontend.settings().level.maximum);
    let in_header = headers.get(LEVEL).map(|value| {
        let name = value.to_str().unwrap_or_default().to_ascii_lowercase();
        let wrong = || ApiError::invalid("x-gaoler-level: must be paranoid, balanced or developer.");
        Level::from_name(&name).ok_or_else(wrong)
    });
    match in_header.transpose()?.into_iter().chain(in_body).min() {
        None => Ok(named(&frontend.settings().level.default).min(maximum)),
        Some(level) if level <= maximum => Ok(level),
        Some(_) => {
            let message = "security_level, x-gaoler-level: looser than this server allows.";
            Err(ApiError::new(403, "level_not_allowed", message))
        }
    }
}

/// The limits that a request wishes for. Asked for twice, the lower one holds.
pub fn limits(headers: &HeaderMap, in_body: &Limits) -> Result<Limits, ApiError> {
    let Some(value) = headers.get(LIMITS) else { return Ok(*in_body) };
    let wish = limits::wish(value.to_str().unwrap_or_default());
    let wish = wish.map_err(|what| ApiError::invalid(format!("x-gaoler-limits: {what}.")))?;
    Ok(limits::both(wish, in_body))
}

/// A run as it is asked of the supervisor.
pub struct Order {
    /// The message.
    pub spawn: Spawn,
    /// The session's UUID, or the one that a stateless run has for itself.
    pub session: Uuid,
}

impl Order {
    /// The order that a job makes.
    pub fn new(job: &Job, tenant: TenantKey, level: Level, limits: Limits) -> Order {
        let session =
            job.session.unwrap_or_else(|| uuid::Builder::from_random_bytes(rand::random()).into_uuid());
        let conversation = match job.session {
            Some(_) => Conversation::Session,
            None => Conversation::Stateless,
        };
        let run: RunId = id::run();
        let spawn = Spawn {
            run,
            tenant,
            kind: Kind::Cli,
            level,
            conversation,
            ephemeral: false,
            proof: false,
            session: session.into_bytes(),
            workspace: job.workspace,
            model: job.model,
            effort: job.effort,
            turns_max: job.turns_max,
            mcp_refused: job.mcp.refused && !job.mcp.is_empty(),
            budget_microusd: job.wishes.budget_microusd,
            limits,
        };
        Order { spawn, session }
    }

    /// Its descriptors: options, then the credential, and where there are remote MCP servers, those. Beside them, how many
    /// bytes they hold.
    ///
    /// # Errors
    /// 413 for a history that is too large; 500 where the kernel gives no memory file.
    pub fn fds(
        &self,
        job: &Job,
        mcp: &Settled,
        credential: &[u8],
        version: &str,
    ) -> Result<(Vec<OwnedFd>, usize), ApiError> {
        let mut options = Vec::new();
        if !job.system.is_empty() {
            options.extend(section(Section::System, job.system.as_bytes()));
        }
        let earlier = transcript::lines(&job.earlier, self.session, version, OffsetDateTime::now_utc());
        if !earlier.is_empty() {
            options.extend(section(Section::Transcript, &earlier));
        }
        if !mcp.config.is_empty() {
            options.extend(section(Section::Mcp, &mcp.config));
        }
        if options.len() > OPTIONS_BYTES_MAX {
            return Err(too_large());
        }
        let bytes = options.len() + credential.len() + mcp.remotes.len();
        descriptors(&options, credential, mcp).map(|fds| (fds, bytes))
    }
}

/// What a parsed object takes beside itself: its names, its values, and the nodes that they stand in.
fn weight_of_object(object: &Map<String, Value>) -> usize {
    let inside: usize = object.iter().map(|(name, value)| name.len() + weight(value)).sum();
    inside + object.len().div_ceil(NODE_FIELDS) * NODE_BYTES
}

fn weight(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(|value| size_of::<Value>() + weight(value)).sum(),
        Value::Object(object) => weight_of_object(object),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

/// What goes beside a Spawn.
///
/// # Errors
/// 500 where the kernel gives no memory file.
pub fn descriptors(options: &[u8], credential: &[u8], mcp: &Settled) -> Result<Vec<OwnedFd>, ApiError> {
    let sealed = |name: &str, bytes: &[u8]| {
        memfd::sealed(name, bytes)
            .map_err(|_| ApiError::internal("no_memory_file", "This server is out of descriptors or memory."))
    };
    let mut fds = vec![sealed("options", options)?, sealed("credential", credential)?];
    if !mcp.remotes.is_empty() {
        fds.push(sealed("remotes", &mcp.remotes)?);
    }
    Ok(fds)
}

fn too_large() -> ApiError {
    ApiError::new(413, "request_too_large", "The request is larger than 32 MB.")
}

/// Refuses a body that is compressed.
///
/// # Errors
/// 415.
pub fn refuse_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    let encoding = headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes);
    if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
        let message = "content-encoding: only identity is accepted; send the body uncompressed.";
        return Err(ApiError::new(415, "request_body_encoding_unsupported", message));
    }
    Ok(())
}

/// Reads a body with this: a large one on a thread of its own, one after the other, so that who asks for little meanwhile
/// does not wait. What it says of memory is bounded by what is read at the same time.
///
/// # Errors
/// Those of the reader.
pub async fn parsed<T: Send + 'static>(
    frontend: &App,
    whose: Whose,
    body: Zeroizing<Vec<u8>>,
    read: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if body.len() <= READ_AT_ONCE_MAX {
        return read(&body);
    }
    let lost = || ApiError::internal("run_lost", "The body could not be read.");
    let reader = &frontend.readers[usize::from(matches!(whose, Whose::Stranger(_)))];
    let turn = reader.acquire().await.map_err(|_| lost())?;
    let done = tokio::task::spawn_blocking(move || read(&body)).await.map_err(|_| lost());
    drop(turn);
    done?
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
