//! The way of a request that asks for a run: its credential, its body, the run, and the answer's way to its client.
//! It must never buffer without a bound, nor wait without a deadline.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use time::OffsetDateTime;
use tokio::sync::{SemaphorePermit, mpsc};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use zeroize::Zeroize;

use gaoler_protocol::{
    Conversation, Kind, Level, Limits, OPTIONS_BYTES_MAX, RunId, Section, Spawn, TenantKey, section,
};
use gaoler_sys::memfd;

use super::answer::{Answer, Ending, Heading};
use super::books::Note;
use super::cli::{input, transcript};
use super::dialect::Dialect;
use super::error::ApiError;
use super::http::{App, RequestId, failed, json_bytes};
use super::job::{Job, Shape};
use super::metrics;
use super::run::{self, Bounds, Piece};
use super::{Frontend, id, identity, rates};
use crate::limits;

/// Bytes of a body, at most: the API's own limit.
const BODY_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Bytes of a body that is too large which are read and dropped, so that its sender reads our answer.
const BODY_BYTES_DROPPED_MAX: usize = 64 * 1024 * 1024;
/// How long one piece of a body may take, and how long all of it.
const BODY_PIECE_WAIT: Duration = Duration::from_secs(15);
const BODY_WAIT: Duration = Duration::from_secs(120);
/// KiB of bodies that are held at the same time, at most.
pub const BODIES_KIB_MAX: usize = 512 * 1024;
/// How often a stream says something: proxies cut at 16 s of silence and more.
const PING_EVERY: Duration = Duration::from_secs(8);
/// How long a JSON answer waits for a real status before it begins with 200 and blanks.
const STATUS_WAIT: Duration = Duration::from_secs(50);
/// How often it then sends a blank.
const BLANK_EVERY: Duration = Duration::from_secs(25);

const IGNORED: HeaderName = HeaderName::from_static("x-gaoler-ignored");
const RUN_ID: HeaderName = HeaderName::from_static("x-gaoler-run");
/// Of a request: the level and the limits that it wishes for. Of an answer: those that its run had.
const LEVEL: HeaderName = HeaderName::from_static("x-gaoler-level");
const LIMITS: HeaderName = HeaderName::from_static("x-gaoler-limits");
/// Milliseconds that the request waited for a run.
const QUEUED: HeaderName = HeaderName::from_static("x-gaoler-queue-ms");
const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Serves one such request to the first byte of its answer; the rest is a stream of its own.
///
/// # Errors
/// What came before the first byte, for its status line.
pub async fn answer(
    dialect: Dialect,
    frontend: &App,
    id: &RequestId,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let begun = Instant::now();
    let encoding = headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes);
    if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
        let message = "content-encoding: only identity is accepted; send the body uncompressed.";
        return Err(ApiError::new(415, "request_body_encoding_unsupported", message));
    }
    // A credential in a header is judged before the body is read, as the API itself does it.
    let shown = identity::shown(frontend, headers).await?;
    if *frontend.draining.borrow() {
        return Err(ApiError::draining());
    }

    let (mut body, budget) = read(body, frontend).await?;
    let job = dialect.parse(&body, headers);
    // It may hold a token.
    body.as_mut().zeroize();
    drop(body);
    let job = job?;
    let caller = identity::caller(frontend, shown, headers, job.credential.as_ref(), now_ms()).await?;
    let level = level(frontend, headers, job.level)?;
    let limits = limits(headers, &job.limits)?;

    let tenant = caller.tenant;
    frontend.rates.tenant(&tenant)?;
    rates::budget(frontend, &caller.name).await?;
    let order = Order::new(&job, tenant, level, limits);
    let fds = order.fds(&job, &caller.credential, &frontend.settings.cli.version)?;
    let note = Note::of(frontend, caller, &job);
    let heading = Heading {
        id: dialect.answer_id(),
        session: job.session,
        run: order.spawn.run,
        model: job.model.as_str().to_string(),
        asked_at: now_ms() / 1000,
        usage_last: job.usage_last,
    };
    let prompt = input::user(&job.prompt);
    let disposable = job.session.is_none();
    let (shape, thinking, ignored) = (job.shape, job.thinking, job.ignored.join(","));
    drop(job);

    // What waits still takes memory, so it keeps its part of the budget.
    let place = frontend.admission.enter(tenant, frontend.draining.subscribe()).await?;
    drop(budget);
    let waited = place.waited.as_millis().to_string();
    let busy = (frontend.busy.subscribe(), place);
    let run =
        frontend.supervisor.spawn(order.spawn, fds).await.map_err(|refused| ApiError::refused(&refused))?;
    let run_id = heading.run;
    let in_force = run.spawned.limits.rows().map(|(name, limit)| format!("{name}={limit}"));
    let in_force = in_force.collect::<Vec<_>>().join(",");
    let merged = Answer::new(heading, shape, thinking);
    let render = dialect.render(shape);
    let pieces = run::converse(run, prompt, merged, render, bounds(frontend, level, disposable), note, busy);
    let answered = match shape {
        Shape::Events => stream(dialect, pieces, id).await,
        Shape::Json => whole(dialect, pieces, id).await,
    };
    if shape == Shape::Events && answered.is_ok() {
        metrics::first_event(begun.elapsed());
    }
    // An error of a run says, like any answer, which run it was.
    let mut response = answered.unwrap_or_else(|error| failed(&error, &dialect.failure(&error, &id.0)));
    let headers = response.headers_mut();
    if let Some(value) = HeaderValue::from_str(&ignored).ok().filter(|_| !ignored.is_empty()) {
        headers.insert(IGNORED, value);
    }
    headers.insert(LEVEL, HeaderValue::from_static(level.name()));
    for (name, value) in [(RUN_ID, run_id.to_string()), (LIMITS, in_force), (QUEUED, waited)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
    Ok(response)
}

/// Bounds that the operator's settings give to every run.
pub fn bounds(frontend: &Frontend, level: Level, disposable: bool) -> Bounds {
    let silence = Duration::from_secs(u64::from(frontend.settings.runs.silence_seconds.max(1)));
    Bounds { silence, level, disposable }
}

/// The level of a run: the operator's default, or what the request asks for where that is not looser than
/// the operator's maximum. Asked for twice, the stricter one holds.
fn level(frontend: &Frontend, headers: &HeaderMap, in_body: Option<Level>) -> Result<Level, ApiError> {
    let named = |name: &str| Level::from_name(name).unwrap_or(Level::Paranoid);
    let maximum = named(&frontend.settings.level.maximum);
    let in_header = headers.get(LEVEL).map(|value| {
        let name = value.to_str().unwrap_or_default().to_ascii_lowercase();
        let wrong = || ApiError::invalid("x-gaoler-level: must be paranoid, balanced or developer.");
        Level::from_name(&name).ok_or_else(wrong)
    });
    match in_header.transpose()?.into_iter().chain(in_body).min() {
        None => Ok(named(&frontend.settings.level.default).min(maximum)),
        Some(level) if level <= maximum => Ok(level),
        Some(_) => {
            let message = "security_level, x-gaoler-level: looser than this server allows.";
            Err(ApiError::new(403, "level_not_allowed", message))
        }
    }
}

/// The limits that a request wishes for. Asked for twice, the lower one holds.
fn limits(headers: &HeaderMap, in_body: &Limits) -> Result<Limits, ApiError> {
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
            model: job.model,
            effort: job.effort,
            turns_max: job.turns_max,
            limits,
        };
        Order { spawn, session }
    }

    /// Its descriptors: options, then the credential.
    ///
    /// # Errors
    /// 413 for a history that is too large; 500 where the kernel gives no memory file.
    pub fn fds(&self, job: &Job, credential: &[u8], version: &str) -> Result<Vec<OwnedFd>, ApiError> {
        let mut options = Vec::new();
        if !job.system.is_empty() {
            options.extend(section(Section::System, job.system.as_bytes()));
        }
        let earlier = transcript::lines(&job.earlier, self.session, version, OffsetDateTime::now_utc());
        if !earlier.is_empty() {
            options.extend(section(Section::Transcript, &earlier));
        }
        if options.len() > OPTIONS_BYTES_MAX {
            return Err(too_large());
        }
        let sealed = |name: &str, bytes: &[u8]| {
            memfd::sealed(name, bytes).map_err(|_| {
                ApiError::internal("no_memory_file", "This server is out of descriptors or memory.")
            })
        };
        Ok(vec![sealed("options", &options)?, sealed("credential", credential)?])
    }
}

fn too_large() -> ApiError {
    ApiError::new(413, "request_too_large", "The request is larger than 32 MB.")
}

/// The body, within its bounds, and the part of the budget that it takes.
async fn read<'a>(
    mut body: Body,
    frontend: &'a Frontend,
) -> Result<(BytesMut, Option<SemaphorePermit<'a>>), ApiError> {
    let deadline = Instant::now() + BODY_WAIT;
    let mut budget: Option<SemaphorePermit<'a>> = None;
    let mut bytes = BytesMut::new();
    let mut total = 0;
    loop {
        let piece = timeout_at(deadline, timeout(BODY_PIECE_WAIT, body.frame())).await;
        let frame = match piece {
            Ok(Ok(Some(Ok(frame)))) => frame,
            Ok(Ok(Some(Err(_)))) => return Err(ApiError::invalid("The body broke off.")),
            Ok(Ok(None)) => break,
            Ok(Err(_)) | Err(_) => {
                return Err(ApiError::new(408, "body_timeout", "The body came too slowly.").final_word());
            }
        };
        let Ok(data) = frame.into_data() else { continue };
        total += data.len();
        if total > BODY_BYTES_DROPPED_MAX {
            return Err(too_large());
        }
        if total > BODY_BYTES_MAX {
            bytes = BytesMut::new();
            continue;
        }
        let kib = u32::try_from(data.len().div_ceil(1024)).unwrap_or(u32::MAX);
        let Ok(more) = frontend.bodies.try_acquire_many(kib) else {
            return Err(
                ApiError::new(529, "bodies_full", "This server is reading too many requests.").after(5)
            );
        };
        match &mut budget {
            Some(budget) => budget.merge(more),
            None => budget = Some(more),
        }
        bytes.extend_from_slice(&data);
    }
    if total > BODY_BYTES_MAX { Err(too_large()) } else { Ok((bytes, budget)) }
}

/// A streamed answer. The status waits for the upstream's first word, so that a refusal keeps its own.
async fn stream(
    dialect: Dialect,
    mut pieces: mpsc::Receiver<Piece>,
    id: &RequestId,
) -> Result<Response, ApiError> {
    let (first, ended) = match pieces.recv().await {
        Some(Piece::Begun(bytes)) => (bytes, false),
        Some(Piece::End(_, Ending::Failed(error))) => return Err(error),
        Some(Piece::End(answer, Ending::Done(done))) => (dialect.ending(&answer, &done), true),
        None => return Err(lost()),
    };
    let id = id.clone();
    let rest =
        futures_util::stream::unfold((Some(first), pieces, ended), move |(first, mut pieces, ended)| {
            let id = id.clone();
            async move {
                if let Some(first) = first {
                    return Some((Ok::<_, Infallible>(first), (None, pieces, ended)));
                }
                if ended {
                    return None;
                }
                let silent_until = Instant::now() + PING_EVERY;
                let (bytes, ended) = loop {
                    break match timeout_at(silent_until, pieces.recv()).await {
                        Err(_) => (dialect.alive(), false),
                        // A step that the dialect has no word for is silence all the same.
                        Ok(Some(Piece::Begun(bytes))) if bytes.is_empty() => continue,
                        Ok(Some(Piece::Begun(bytes))) => (bytes, false),
                        Ok(Some(Piece::End(answer, Ending::Done(done)))) => {
                            (dialect.ending(&answer, &done), true)
                        }
                        Ok(Some(Piece::End(_, Ending::Failed(error)))) => {
                            (dialect.error(&error, &id.0), true)
                        }
                        Ok(None) => (dialect.error(&lost(), &id.0), true),
                    };
                };
                Some((Ok(bytes), (None, pieces, ended)))
            }
        });
    let mut response = Body::from_stream(rest).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(BUFFERING, HeaderValue::from_static("no"));
    Ok(response)
}

/// A JSON answer: with a real status where the run ends in time; else 200 and blanks until it has ended.
async fn whole(
    dialect: Dialect,
    mut pieces: mpsc::Receiver<Piece>,
    id: &RequestId,
) -> Result<Response, ApiError> {
    let status_until = Instant::now() + STATUS_WAIT;
    let mut begun = false;
    loop {
        let piece = match begun {
            true => timeout_at(status_until, pieces.recv()).await,
            false => Ok(pieces.recv().await),
        };
        match piece {
            Ok(Some(Piece::Begun(_))) => begun = true,
            Ok(Some(Piece::End(answer, Ending::Done(done)))) => {
                return Ok(json_bytes(StatusCode::OK, Body::from(dialect.body(&answer, &done))));
            }
            Ok(Some(Piece::End(_, Ending::Failed(error)))) => return Err(error),
            Ok(None) => return Err(lost()),
            Err(_) => break,
        }
    }
    let id = id.clone();
    let rest = futures_util::stream::unfold(Some(pieces), move |pieces| {
        let id = id.clone();
        async move {
            let mut pieces = pieces?;
            let blank_at = Instant::now() + BLANK_EVERY;
            loop {
                return match timeout_at(blank_at, pieces.recv()).await {
                    Err(_) => Some((Ok(Bytes::from_static(b"\n")), Some(pieces))),
                    Ok(Some(Piece::Begun(_))) => continue,
                    Ok(Some(Piece::End(answer, Ending::Done(done)))) => {
                        Some((Ok(dialect.body(&answer, &done)), None))
                    }
                    Ok(Some(Piece::End(answer, Ending::Failed(error)))) => {
                        Some((Ok(dialect.failed_body(&answer, &error, &id.0)), None))
                    }
                    Ok(None) => Some((Err(io::Error::other("the run was lost")), None)),
                };
            }
        }
    });
    let first = futures_util::stream::iter([Ok(Bytes::from_static(b"\n"))]);
    let body = Body::from_stream(futures_util::StreamExt::chain(first, rest));
    Ok(json_bytes(StatusCode::OK, body))
}

fn lost() -> ApiError {
    ApiError::internal("run_lost", "The run ended and no word of it came.")
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
