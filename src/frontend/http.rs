//! HTTP: connections, routes, limits, and an answer's way to its client.
//! It must never buffer without a bound, wait without a deadline, or answer in any form but the API's own.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, MatchedPath, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use zeroize::Zeroize;

use gaoler_protocol::{
    Conversation, Kind, Level, Limits, OPTIONS_BYTES_MAX, RunId, Section, Spawn, TenantKey, section,
};
use gaoler_sys::memfd;

use super::answer::{Answer, Ending, Heading};
use super::cli::{input, transcript};
use super::error::ApiError;
use super::job::{self, Job, Shape};
use super::run::{self, Bounds, Piece};
use super::tenant::{self, Credential};
use super::tls::HANDSHAKE_WAIT;
use super::{Frontend, docs, id, metrics, posture, sse};
use crate::limits;

/// Connections at the same time, at most. Each costs a descriptor and a few KiB; more wait in the backlog.
const CONNECTIONS_MAX: usize = 512;
/// How long a client may take for the head of a request, and how long an idle connection is kept.
const HEAD_WAIT: Duration = Duration::from_secs(30);
/// Bytes of a request's head, at most.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Fields of a request's head, at most.
const HEAD_FIELDS_MAX: usize = 100;
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
/// A pause after a failed accept(2), so that a lack of descriptors is no busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
const IGNORED: HeaderName = HeaderName::from_static("x-gaoler-ignored");
const RUN_ID: HeaderName = HeaderName::from_static("x-gaoler-run");
/// Of a request: the level and the limits that it wishes for. Of an answer: those that its run had.
const LEVEL: HeaderName = HeaderName::from_static("x-gaoler-level");
const LIMITS: HeaderName = HeaderName::from_static("x-gaoler-limits");
const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// What every route has.
pub type App = Arc<Frontend>;

/// The listening socket that the supervisor handed over.
///
/// # Errors
/// A descriptor that is no such socket.
pub fn listener(socket: OwnedFd) -> io::Result<TcpListener> {
    // By fcntl(2), not ioctl(2): the frontend's filter knows no ioctl.
    let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
    fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    TcpListener::from_std(socket.into())
}

/// Accepts connections to the end, in a drain too: whoever asks then is told, and goes elsewhere.
pub async fn serve(listener: TcpListener, frontend: App) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let router = router(Arc::clone(&frontend));
    loop {
        match accept(&listener, &connections).await {
            Ok((stream, permit)) => {
                tokio::spawn(arrival(stream, permit, router.clone(), Arc::clone(&frontend)));
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let permit = Arc::clone(connections).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

/// A connection from its first byte: under TLS where the listener has it, and never without it there.
async fn arrival(stream: TcpStream, permit: OwnedSemaphorePermit, router: Router, frontend: App) {
    // Small events must not wait for large segments; where this fails they only come later.
    let _ = stream.set_nodelay(true);
    let Some(tls) = frontend.tls.clone() else { return connection(stream, permit, router, frontend).await };
    // A client that fails here has been told why by its own library; a line a failure would be anybody's to write.
    if let Ok(Ok(stream)) = timeout(HANDSHAKE_WAIT, tls.accept(stream)).await {
        connection(stream, permit, router, frontend).await;
    }
}

async fn connection<S>(stream: S, permit: OwnedSemaphorePermit, router: Router, frontend: App)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut draining = frontend.draining.subscribe();
    // One that comes in a drain gets one answer, and the drain does not wait for it: anybody could hold it up.
    let late = *draining.borrow();
    let busy = (!late).then(|| frontend.busy.subscribe());
    let service = tower::util::MapRequest::new(router, without_prefix);
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(!late)
        .header_read_timeout(HEAD_WAIT)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEAD_FIELDS_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let mut serving = std::pin::pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => Some(ended),
        _ = draining.wait_for(|&draining| draining), if !late => None,
    };
    if ended.is_none() {
        serving.as_mut().graceful_shutdown();
        let _ = serving.await;
    }
    drop((permit, busy));
}

/// A base URL may have a prefix of its own, which a proxy in front of us may have left there.
fn without_prefix<B>(mut request: http::Request<B>) -> http::Request<B> {
    let path = request.uri().path();
    let stripped = path.find("/v1/messages").filter(|&at| at > 0).map(|at| path[at..].to_string());
    if let Some(uri) = stripped.and_then(|path| Uri::try_from(path).ok()) {
        *request.uri_mut() = uri;
    }
    request
}

/// Every route that there is.
fn router(frontend: App) -> Router {
    Router::new()
        .route("/v1/messages", post(messages))
        .route("/v1/security", get(security))
        .route("/health", get(health))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(figures))
        .merge(docs::routes())
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn(with_request_id))
        .with_state(frontend)
}

/// The request's name.
#[derive(Clone)]
pub struct RequestId(Arc<str>);

/// Names the request, so that an answer and a log line can be brought together.
async fn with_request_id(mut request: Request, next: Next) -> Response {
    let timed = metrics::Timed::begin(request.extensions().get::<MatchedPath>());
    let id = RequestId(id::request().into());
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    timed.answered(response)
}

/// 404, as where there is no route.
pub async fn not_found(Extension(id): Extension<RequestId>) -> Response {
    failure(&ApiError::new(404, "not_found", "There is nothing at this path. Try POST /v1/messages."), &id)
}

async fn wrong_method(Extension(id): Extension<RequestId>) -> Response {
    failure(&ApiError::new(405, "method_not_allowed", "This path does not know this method."), &id)
}

async fn health(State(frontend): State<App>) -> Response {
    let draining = *frontend.draining.borrow();
    json(StatusCode::OK, &posture::health(frontend.listen.get(), frontend.layers.get(), draining))
}

async fn live() -> Response {
    json(StatusCode::OK, &posture::live())
}

async fn ready(State(frontend): State<App>) -> Response {
    let draining = *frontend.draining.borrow();
    match posture::unready(frontend.listen.get(), draining) {
        None => json(StatusCode::OK, &posture::ready(None)),
        reason => json(StatusCode::SERVICE_UNAVAILABLE, &posture::ready(reason)),
    }
}

/// Figures tell strangers much of a server, so they are there only where the operator wants them.
async fn figures(State(frontend): State<App>, id: Extension<RequestId>) -> Response {
    if !frontend.settings.server.metrics {
        return not_found(id).await;
    }
    let draining = *frontend.draining.borrow();
    let text = metrics::text(frontend.listen.get(), frontend.layers.get(), draining);
    let mut response = Body::from(text).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(metrics::KIND));
    response
}

async fn security(State(frontend): State<App>) -> Response {
    json(
        StatusCode::OK,
        &posture::security(frontend.listen.get(), frontend.layers.get(), &frontend.settings.level),
    )
}

async fn messages(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match answer(&frontend, &id, &headers, body).await {
        Ok(response) => response,
        Err(error) => failure(&error, &id),
    }
}

async fn answer(
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
    let in_header = headers.contains_key(header::AUTHORIZATION) || headers.contains_key("x-api-key");
    let early = if in_header { Some(tenant::credential(headers, None, now_ms())?) } else { None };
    if *frontend.draining.borrow() {
        return Err(ApiError::draining());
    }

    let (mut body, budget) = read(body, frontend).await?;
    let job = job::parse(&body);
    // It may hold a token.
    body.as_mut().zeroize();
    drop((body, budget));
    let job = job?;
    let credential = match early {
        Some(credential) => credential,
        None => tenant::credential(headers, job.credential.as_ref(), now_ms())?,
    };
    let level = level(frontend, headers, job.level)?;
    let limits = limits(headers, &job.limits)?;

    let order = Order::new(&job, credential.tenant(&frontend.secret), level, limits);
    let fds = order.fds(&job, &credential, &frontend.settings.cli.version)?;
    drop(credential);
    let heading = Heading {
        id: id::message(),
        session: job.session,
        run: order.spawn.run,
        model: job.model.as_str().to_string(),
    };
    let prompt = input::user(&job.prompt);
    let disposable = job.session.is_none();
    let (shape, thinking, ignored) = (job.shape, job.thinking, job.ignored.join(","));
    drop(job);

    let busy = frontend.busy.subscribe();
    let run =
        frontend.supervisor.spawn(order.spawn, fds).await.map_err(|refused| ApiError::refused(&refused))?;
    let run_id = heading.run;
    let in_force = run.spawned.limits.rows().map(|(name, limit)| format!("{name}={limit}"));
    let in_force = in_force.collect::<Vec<_>>().join(",");
    let merged = Answer::new(heading, shape, thinking);
    let render: run::Render = match shape {
        Shape::Events => sse::events,
        Shape::Json => |_, _| Bytes::new(),
    };
    let pieces = run::converse(run, prompt, merged, render, bounds(frontend, level, disposable), busy);
    let mut response = match shape {
        Shape::Events => {
            let response = stream(pieces, id).await?;
            metrics::first_event(begun.elapsed());
            response
        }
        Shape::Json => whole(pieces, id).await?,
    };
    let headers = response.headers_mut();
    if let Some(value) = HeaderValue::from_str(&ignored).ok().filter(|_| !ignored.is_empty()) {
        headers.insert(IGNORED, value);
    }
    headers.insert(LEVEL, HeaderValue::from_static(level.name()));
    for (name, value) in [(RUN_ID, run_id.to_string()), (LIMITS, in_force)] {
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
    pub fn fds(&self, job: &Job, credential: &Credential, version: &str) -> Result<Vec<OwnedFd>, ApiError> {
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
        Ok(vec![sealed("options", &options)?, sealed("credential", &credential.bytes())?])
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
async fn stream(mut pieces: mpsc::Receiver<Piece>, id: &RequestId) -> Result<Response, ApiError> {
    let (first, ended) = match pieces.recv().await {
        Some(Piece::Begun(bytes)) => (bytes, false),
        Some(Piece::End(_, Ending::Failed(error))) => return Err(error),
        Some(Piece::End(_, Ending::Done(done))) => (sse::ending(&done), true),
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
                let (bytes, ended) = match timeout(PING_EVERY, pieces.recv()).await {
                    Err(_) => (sse::ping(), false),
                    Ok(Some(Piece::Begun(bytes))) => (bytes, false),
                    Ok(Some(Piece::End(_, Ending::Done(done)))) => (sse::ending(&done), true),
                    Ok(Some(Piece::End(_, Ending::Failed(error)))) => (sse::error(&error, &id.0), true),
                    Ok(None) => (sse::error(&lost(), &id.0), true),
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
async fn whole(mut pieces: mpsc::Receiver<Piece>, id: &RequestId) -> Result<Response, ApiError> {
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
                return Ok(json_bytes(StatusCode::OK, Body::from(sse::body(&answer, &done))));
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
                        Some((Ok(sse::body(&answer, &done)), None))
                    }
                    Ok(Some(Piece::End(answer, Ending::Failed(error)))) => {
                        Some((Ok(sse::failed_body(&answer, &error, &id.0)), None))
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

fn failure(error: &ApiError, id: &RequestId) -> Response {
    metrics::error(error.code);
    let mut response = json(error.status_code(), &error.body(&id.0));
    error.headers().for_each(|(name, value)| {
        response.headers_mut().insert(name, value);
    });
    if matches!(error.status, 408 | 413) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn json(status: StatusCode, value: &Value) -> Response {
    json_bytes(status, Body::from(serde_json::to_vec(value).unwrap_or_default()))
}

fn json_bytes(status: StatusCode, body: Body) -> Response {
    let mut response = (status, body).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn now_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
