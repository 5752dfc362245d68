//! The routes of runs: a tenant's list, one run's status, its events from any point, and its end.
//! It must never tell another tenant's run from one that does not exist.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Extension, Path, State};
use axum::response::Response;
use axum::routing::{get, post};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use gaoler_protocol::{RunId, TenantKey};

use super::log::Stage;
use super::{Log, Reader, Why, reply};
use crate::frontend::answer::Ending;
use crate::frontend::error::ApiError;
use crate::frontend::http::{App, RequestId, failed, json};
use crate::frontend::job::{OnDisconnect, Shape};
use crate::frontend::{identity, sse};

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/runs", get(list))
        .route("/v1/runs/{id}", get(one))
        .route("/v1/runs/{id}/events", get(events))
        .route("/v1/runs/{id}/cancel", post(cancel))
}

/// Whose runs are asked for. The upstream is not asked: whoever holds the token of a run may ask about it.
async fn caller(frontend: &App, headers: &HeaderMap) -> Result<TenantKey, ApiError> {
    identity::tenant(frontend, headers).await
}

async fn found(frontend: &App, headers: &HeaderMap, id: &str) -> Result<Arc<Log>, ApiError> {
    let tenant = caller(frontend, headers).await?;
    let run = run(id).and_then(|run| frontend.runs.find(&tenant, run));
    run.ok_or_else(|| {
        let message = "There is no such run, or no longer. A run is known for 15 minutes after its end.";
        ApiError::new(404, "run_not_found", message)
    })
}

/// A run's id, in the one form that it has.
pub fn run(text: &str) -> Option<RunId> {
    let bytes = text.as_bytes();
    let mut id = [0; 16];
    if bytes.len() != 32 || !bytes.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b)) {
        return None;
    }
    for (to, pair) in id.iter_mut().zip(bytes.chunks(2)) {
        *to = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(RunId(id))
}

fn answered(id: &RequestId, body: Result<Value, ApiError>) -> Response {
    match body {
        Ok(body) => json(StatusCode::OK, &body),
        Err(error) => failed(&error, &error.body(&id.0)),
    }
}

async fn list(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
) -> Response {
    let runs = caller(&frontend, &headers).await.map(|tenant| {
        let data: Vec<Value> = frontend.runs.of(&tenant).iter().map(|log| status(&frontend, log)).collect();
        let id = |row: Option<&Value>| row.map_or(Value::Null, |row| row["id"].clone());
        json!({"first_id": id(data.first()), "last_id": id(data.last()), "has_more": false, "data": data})
    });
    answered(&id, runs)
}

async fn one(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    Path(run): Path<String>,
) -> Response {
    answered(&id, found(&frontend, &headers, &run).await.map(|log| status(&frontend, &log)))
}

async fn cancel(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    Path(run): Path<String>,
) -> Response {
    let cancelled = found(&frontend, &headers, &run).await.map(|log| {
        end(&frontend, &log, Why::Cancelled);
        status(&frontend, &log)
    });
    answered(&id, cancelled)
}

/// Ends a run, or takes it out of the queue.
pub fn end(frontend: &App, log: &Log, why: Why) {
    log.cancel(why);
    // Its answer may have ended with calls that it now waits for.
    frontend.waits.cancel(&TenantKey(log.entry.tenant), log.entry.about.run);
}

async fn events(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    Path(run): Path<String>,
) -> Response {
    let reader = found(&frontend, &headers, &run).await.and_then(|log| {
        let after = after(&headers, &log)?;
        if after + 1 < log.keeps_from() {
            return Err(reply::missing());
        }
        Ok((Reader::new(log, after + 1), after))
    });
    match reader {
        Ok((reader, after)) => reply::follow(reader, id, after),
        Err(error) => failed(&error, &error.body(&id.0)),
    }
}

/// The number in `last-event-id`; 0 without one.
fn after(headers: &HeaderMap, log: &Log) -> Result<u64, ApiError> {
    let Some(value) = headers.get("last-event-id") else { return Ok(0) };
    let text = value.to_str().unwrap_or_default();
    let number = text.strip_prefix(&format!("{}-", log.entry.about.run)).and_then(|n| n.parse().ok());
    let known = number.filter(|number: &u64| *number <= u64::from(u32::MAX));
    known.ok_or_else(|| ApiError::invalid("last-event-id: must be an id of this run's events, RUN-NUMBER."))
}

/// What a run's tenant may know of it.
fn status(frontend: &App, log: &Log) -> Value {
    let about = &log.entry.about;
    let stage = log.stage();
    let finished = log.finished();
    let (stop_reason, code, usage) = match finished.as_ref().map(|finished| &finished.ending) {
        Some(Ending::Done(done)) => {
            (json!(done.stop_reason), Value::Null, json!(sse::full_usage(&done.usage)))
        }
        Some(Ending::Failed(error)) => (Value::Null, json!(error.code), Value::Null),
        None => (Value::Null, Value::Null, Value::Null),
    };
    json!({
        "type": "run",
        "id": about.run.to_string(),
        "status": match stage {
            Stage::Queued(_) => "queued",
            Stage::Running(_) => "running",
            Stage::Ended => "ended",
        },
        "queue_position": position(frontend, log),
        "endpoint": about.dialect.path(),
        "stream": about.shape == Shape::Events,
        "model": about.model,
        "level": about.level.name(),
        "session_id": about.session.map(|id| id.to_string()),
        "on_disconnect": match about.on_disconnect {
            OnDisconnect::Cancel => "cancel",
            OnDisconnect::Continue => "continue",
        },
        "created_at": date(Some(about.asked_ms)),
        "ended_at": date(finished.as_ref().map(|finished| finished.at_ms)),
        "stop_reason": stop_reason,
        "error_code": code,
        "usage": usage,
        "events": log.newest(),
    })
}

/// Its number among its tenant's requests that wait.
pub fn position(frontend: &App, log: &Log) -> Option<usize> {
    match log.stage() {
        Stage::Queued(Some(ticket)) => frontend.admission.position(&log.entry.tenant, ticket),
        _ => None,
    }
}

/// Milliseconds since 1970 as the API writes moments.
pub fn date(ms: Option<u64>) -> Value {
    let at = ms.and_then(|ms| OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok());
    json!(at.and_then(|at| at.format(&Rfc3339).ok()))
}
