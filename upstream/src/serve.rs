//! The HTTP side of the embedded model: accepts, bounds, routes.
//! It must never keep a connection, a body or a wait without a bound, and never show a credential whole.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::conversation::Conversation;
use crate::model::{self, Answer, Pace, SILENCE_MAX};
use crate::script::{CutOff, Script};
use crate::wire::{self, Envelope};

/// A request's body, at most: twice what the real API takes.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Connections at the same time; more wait in the listener's queue.
const CONNECTIONS_MAX: usize = 1024;
/// How long a client may take for its request's head, or idle between requests.
const HEAD_TIME: Duration = Duration::from_secs(120);
/// How long a client may take for its request's body.
const BODY_TIME: Duration = Duration::from_secs(60);
/// Texts whose single failure is remembered; then all are forgotten.
const FAILED_MAX: usize = 4096;
/// Characters of a credential that an answer may show: the public prefix of a token.
const SHOWN_CHARS: usize = 12;
/// The models that are listed. Others are answered too, if their name has `claude` in it.
const MODELS: [&str; 4] =
    ["claude-opus-4-8", "claude-sonnet-5", "claude-haiku-4-5-20251001", "claude-fable-5"];

type Reply = Result<Response<Script>, CutOff>;

#[derive(Default)]
struct State {
    answers: AtomicU64,
    failed: Mutex<HashSet<u64>>,
}

/// Serves until the task is dropped.
///
/// # Errors
/// Those of accept(2) that do not pass by themselves.
pub async fn serve(listener: TcpListener) -> std::io::Result<()> {
    let state = Arc::new(State::default());
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return Ok(()) };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) if is_passing(&error) => continue,
            Err(error) => return Err(error),
        };
        let _ = stream.set_nodelay(true);
        let state = state.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request| {
                let state = state.clone();
                async move { route(&state, request).await }
            });
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME);
            // An error here is the client's: it went away, or did not speak HTTP.
            let _ = builder.serve_connection(TokioIo::new(stream), answer).await;
            drop(place);
        });
    }
}

/// A client that left between connect and accept is no reason to stop.
fn is_passing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// The address, for the line that says where to find this process.
///
/// # Errors
/// Those of getsockname(2).
pub fn address(listener: &TcpListener) -> std::io::Result<SocketAddr> {
    listener.local_addr()
}

async fn route(state: &State, request: Request<Incoming>) -> Reply {
    let number = state.answers.fetch_add(1, Ordering::Relaxed) + 1;
    let id = format!("req_embedded{number:016x}");
    let (head, body) = request.into_parts();
    // The query is not looked at: `?beta=true` and `?limit=` change nothing here.
    let path = head.uri.path().to_owned();
    let open = matches!((&head.method, path.as_str()), (_, "/") | (_, "/api/hello"));
    if open {
        return Ok(respond(200, &id, "text/plain", Script::whole(Bytes::new())));
    }
    if let Err(status) = credential(&head.headers) {
        return Ok(refuse(status, "this credential is not accepted", &id));
    }
    match (&head.method, path.as_str()) {
        (&Method::POST, "/v1/messages") => match read(body).await {
            Ok(body) => messages(state, number, &id, &head.headers, &body).await,
            Err((status, why)) => Ok(refuse(status, why, &id)),
        },
        (&Method::POST, "/v1/messages/count_tokens") => match read(body).await {
            Ok(body) => Ok(respond_json(200, &id, &json!({"input_tokens": input_tokens(&body)}))),
            Err((status, why)) => Ok(refuse(status, why, &id)),
        },
        (&Method::GET, "/v1/models") => Ok(respond_json(200, &id, &models())),
        (&Method::GET, path) if path.starts_with("/v1/models/") => {
            match MODELS.iter().find(|name| path.ends_with(**name)) {
                Some(name) => Ok(respond_json(200, &id, &model(name))),
                None => Ok(refuse(404, "no such model", &id)),
            }
        }
        (_, "/v1/messages" | "/v1/messages/count_tokens" | "/v1/models") => {
            Ok(refuse(405, "this method is not allowed here", &id))
        }
        _ => Ok(refuse(404, "not found", &id)),
    }
}

/// What the credential of a request is worth. Its text decides, so that tests can ask for each refusal.
fn credential(headers: &HeaderMap) -> Result<(), u16> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let bearer = text("authorization").strip_prefix("Bearer ").unwrap_or_default();
    let key = text("x-api-key");
    let has = |word: &str| bearer.contains(word) || key.contains(word);
    match (bearer, key) {
        ("", "") => Err(401),
        _ if has("refused") => Err(401),
        _ if has("forbidden") => Err(403),
        _ if has("ratelimited") => Err(429),
        _ => Ok(()),
    }
}

/// The body of a request, as JSON.
async fn read(body: Incoming) -> Result<Value, (u16, &'static str)> {
    let collected = tokio::time::timeout(BODY_TIME, Limited::new(body, BODY_BYTES_MAX).collect()).await;
    let bytes = match collected {
        Err(_) => return Err((400, "the body did not arrive in time")),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            return Err((413, "the body is too large"));
        }
        Ok(Err(_)) => return Err((400, "the body broke off")),
        Ok(Ok(collected)) => collected.to_bytes(),
    };
    let value: Value = serde_json::from_slice(&bytes).map_err(|_| (400, "the body is not valid JSON"))?;
    match value.is_object() {
        true => Ok(value),
        false => Err((400, "the body is not a JSON object")),
    }
}

async fn messages(state: &State, number: u64, id: &str, headers: &HeaderMap, body: &Value) -> Reply {
    let Some(model) = body["model"].as_str() else { return Ok(refuse(400, "model: Field required", id)) };
    let Some(list) = body["messages"].as_array().filter(|list| !list.is_empty()) else {
        return Ok(refuse(400, "messages: at least one message is required", id));
    };
    if !body["max_tokens"].is_u64() {
        return Ok(refuse(400, "max_tokens: Field required", id));
    }
    if !model.contains("claude") {
        return Ok(refuse(404, &format!("model: {}", model.chars().take(100).collect::<String>()), id));
    }
    let streamed = body["stream"] == true;
    let envelope = Envelope { number, model, input_tokens: input_tokens(body) };
    let conversation = Conversation::new(list);
    let request = model::Request { body, headers: &shapes(headers) };
    let (blocks, pace) = match model::answer(&request, &conversation) {
        Answer::Message(blocks, pace) => (blocks, pace),
        Answer::FailOnce(status, _) if fails_now(state, conversation.steering()) => {
            return Ok(refuse(status, "failed once, as the request wished", id));
        }
        Answer::FailOnce(_, blocks) => (blocks, Pace::AtOnce),
        Answer::Fail(status) => return Ok(refuse(status, "failed, as the request wished", id)),
        Answer::Broken(kind) if streamed => {
            return Ok(respond(200, id, SSE, wire::broken_events(&envelope, &kind, id)));
        }
        Answer::Broken(kind) => {
            let error = wire::error(&kind, "[embedded] failed, as the request wished", id);
            return Ok(respond_json(wire::error_status(&kind), id, &error));
        }
        Answer::Silent => {
            tokio::time::sleep(SILENCE_MAX).await;
            return Err(CutOff);
        }
    };
    if streamed {
        return Ok(respond(200, id, SSE, wire::events(&envelope, &blocks, pace)));
    }
    match pace {
        Pace::AtOnce => Ok(respond_json(200, id, &wire::message(&envelope, &blocks))),
        Pace::Slow(delay) => {
            tokio::time::sleep(delay).await;
            Ok(respond_json(200, id, &wire::message(&envelope, &blocks)))
        }
        Pace::Stall => {
            tokio::time::sleep(SILENCE_MAX).await;
            Err(CutOff)
        }
        Pace::Cut => Err(CutOff),
    }
}

/// Whether this is the first time that this text is seen.
fn fails_now(state: &State, text: &str) -> bool {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let mut failed = state.failed.lock().unwrap_or_else(PoisonError::into_inner);
    if failed.len() >= FAILED_MAX {
        failed.clear();
    }
    failed.insert(hasher.finish())
}

/// Tokens of a request: of what it says, not of how it is written around that.
fn input_tokens(body: &Value) -> u64 {
    let length = |key: &str| body.get(key).map_or(0, |value| value.to_string().len());
    wire::tokens(["system", "tools", "messages"].into_iter().map(length).sum())
}

/// The names of a request's headers, sorted, and only the public prefix of a credential.
fn shapes(headers: &HeaderMap) -> Vec<String> {
    let prefix = |value: &HeaderValue| -> String {
        let text = value.to_str().unwrap_or_default();
        let (scheme, token) = match text.strip_prefix("Bearer ") {
            Some(token) => ("Bearer ", token),
            None => ("", text),
        };
        format!("{scheme}{}…", token.chars().take(SHOWN_CHARS).collect::<String>())
    };
    let shape = |(name, value): (&hyper::header::HeaderName, &HeaderValue)| match name {
        name if name == AUTHORIZATION || name == "x-api-key" => format!("{name}: {}", prefix(value)),
        name if name == "anthropic-beta" => {
            format!("{name}: {}", value.to_str().unwrap_or_default())
        }
        name => name.to_string(),
    };
    let mut shapes: Vec<_> = headers.iter().map(shape).collect();
    shapes.sort();
    shapes
}

fn models() -> Value {
    let data: Vec<_> = MODELS.iter().map(|name| model(name)).collect();
    json!({"data": data, "has_more": false, "first_id": MODELS[0], "last_id": MODELS[MODELS.len() - 1]})
}

fn model(name: &str) -> Value {
    json!({"type": "model", "id": name, "display_name": format!("{name} [embedded]"), "created_at": "2026-01-01T00:00:00Z"})
}

const SSE: &str = "text/event-stream; charset=utf-8";

fn respond_json(status: u16, id: &str, body: &Value) -> Response<Script> {
    respond(status, id, "application/json", Script::whole(body.to_string()))
}

fn refuse(status: u16, why: &str, id: &str) -> Response<Script> {
    let body = wire::error(wire::error_type(status), &format!("{}{why}", model::MARK), id);
    let mut response = respond_json(status, id, &body);
    if status == 429 {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

fn respond(status: u16, id: &str, kind: &'static str, body: Script) -> Response<Script> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert("cache-control", HeaderValue::from_static("no-cache"));
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert("request-id", id);
    }
    headers.insert("anthropic-ratelimit-requests-limit", HeaderValue::from_static("1000"));
    headers.insert("anthropic-ratelimit-requests-remaining", HeaderValue::from_static("999"));
    response
}
