//! HTTP: every route that there is, and the form of what is answered at once.
//! It must never answer in any form but that of the API that was asked.

use std::sync::{Arc, PoisonError};

use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Method, Request, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};

use super::dialect::Dialect;
use super::error::ApiError;
use super::sent::Sent;
use super::trace::Trace;
use super::{
    Frontend, admin, docs, identity, mcp, metrics, models, own, posture, runs, sessions, tokens, way,
    workspaces,
};

/// What every handler is given.
pub type App = Arc<Frontend>;

/// Every route that there is.
pub fn router(frontend: App) -> Router {
    Router::new()
        .route("/v1/messages", post(messages))
        .route("/v1/chat/completions", post(completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/v1/mcp/catalog", get(catalog))
        .route("/v1/mcp/probe", post(probe))
        .route("/v1/security", get(security))
        .route("/health", get(health))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/api/hello", get(hello))
        .route("/metrics", get(figures))
        .merge(sessions::routes())
        .merge(workspaces::routes())
        .merge(tokens::routes())
        .merge(runs::routes())
        .merge(own::routes())
        .merge(admin::routes())
        .merge(docs::routes())
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .with_state(frontend)
}

/// A name for the request, in its answer and in the log; and the trace that it is a part of.
#[derive(Clone)]
pub struct RequestId(pub Arc<str>, pub Trace);

/// 404, as where there is no route.
pub async fn not_found(Extension(id): Extension<RequestId>) -> Response {
    failure(
        &ApiError::new(
            404,
            "not_found",
            "There is nothing at this path. Try POST /v1/messages or POST /v1/chat/completions.",
        ),
        &id,
    )
}

async fn wrong_method(Extension(id): Extension<RequestId>) -> Response {
    failure(&ApiError::new(405, "method_not_allowed", "This path does not know this method."), &id)
}

/// What is asked often, needs nobody's answer but ours, and so takes no further way. The routes say the same; they are
/// asked for other methods, and where this says nothing.
pub fn at_once<B>(frontend: &Frontend, request: &Request<B>) -> Option<Response> {
    if request.method() != Method::GET {
        return None;
    }
    match (request.uri().path(), request.uri().query()) {
        ("/health", _) => Some(healthy(frontend)),
        ("/livez", _) => Some(json(StatusCode::OK, &posture::live())),
        ("/readyz", _) => Some(readied(frontend)),
        ("/v1/models", None) if matches!(identity::at_once(frontend, request.headers()), Some(Ok(()))) => {
            let live = frontend.live();
            let page = live.models.get_or_init(|| {
                let page = models::page(&live.settings, "").ok();
                page.and_then(|page| serde_json::to_vec(&page).ok()).map(Bytes::from)
            });
            page.clone().map(|page| json_bytes(StatusCode::OK, Body::from(page)))
        }
        _ => None,
    }
}

async fn health(State(frontend): State<App>) -> Response {
    healthy(&frontend)
}

/// Written anew where something has changed.
fn healthy(frontend: &Frontend) -> Response {
    let (draining, load) = (*frontend.draining.borrow(), frontend.admission.load());
    let mut kept = frontend.health.lock().unwrap_or_else(PoisonError::into_inner);
    let text = match &*kept {
        Some((of, text)) if *of == (draining, load) => text.clone(),
        _ => {
            let (listen, layers) = (frontend.listen.get(), frontend.layers.get());
            let health = posture::health(listen, layers, draining, load);
            let text = Bytes::from(serde_json::to_vec(&health).unwrap_or_default());
            // Both are known for good once the listener is.
            *kept = listen.is_some().then(|| ((draining, load), text.clone()));
            text
        }
    };
    drop(kept);
    json_bytes(StatusCode::OK, Body::from(text))
}

/// Claude Code asks for this before anything else.
async fn hello() -> Response {
    json(StatusCode::OK, &json!({ "message": "hello" }))
}

async fn live() -> Response {
    json(StatusCode::OK, &posture::live())
}

async fn ready(State(frontend): State<App>) -> Response {
    readied(&frontend)
}

fn readied(frontend: &Frontend) -> Response {
    let draining = *frontend.draining.borrow();
    match posture::unready(frontend.listen.get(), draining) {
        None => json(StatusCode::OK, &posture::ready(None)),
        reason => json(StatusCode::SERVICE_UNAVAILABLE, &posture::ready(reason)),
    }
}

/// Figures tell strangers much of a server, so they are there only where the operator wants them.
async fn figures(State(frontend): State<App>, id: Extension<RequestId>) -> Response {
    if !frontend.settings().server.metrics {
        return not_found(id).await;
    }
    let draining = *frontend.draining.borrow();
    let (listen, layers) = (frontend.listen.get(), frontend.layers.get());
    let text = metrics::text(listen, layers, draining, &frontend.admission);
    let mut response = Body::from(text).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(metrics::KIND));
    response
}

async fn security(State(frontend): State<App>) -> Response {
    json(
        StatusCode::OK,
        &posture::security(frontend.listen.get(), frontend.layers.get(), &frontend.settings().level),
    )
}

async fn messages(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Sent,
) -> Response {
    asked(Dialect::Messages, &frontend, &id, &headers, body).await
}

async fn completions(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Sent,
) -> Response {
    asked(Dialect::Completions, &frontend, &id, &headers, body).await
}

async fn asked(
    dialect: Dialect,
    frontend: &App,
    id: &RequestId,
    headers: &HeaderMap,
    body: Sent,
) -> Response {
    match way::answer(dialect, frontend, id, headers, body).await {
        Ok(response) => response,
        Err(error) => failed(&error, &dialect.failure(&error, &id.0)),
    }
}

async fn models(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Response {
    let (query, settings) = (query.unwrap_or_default(), frontend.settings());
    listed(&frontend, &headers, &id, || models::page(&settings, &query)).await
}

async fn model(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    Path(model): Path<String>,
) -> Response {
    let settings = frontend.settings();
    listed(&frontend, &headers, &id, || models::one(&settings, &model)).await
}

async fn catalog(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
) -> Response {
    match identity::recognized(&frontend, &headers).await {
        Ok(()) => json(StatusCode::OK, &mcp::catalog(&frontend.settings().mcp)),
        Err(error) => failure(&error, &id),
    }
}

async fn probe(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Sent,
) -> Response {
    match mcp::probe(&frontend, &headers, body).await {
        Ok(response) => response,
        Err(error) => failure(&error, &id),
    }
}

/// What a client of either family is told once it has shown a key, or a credential of a right form. The upstream is not
/// asked about it: names of models are no secret.
async fn listed<T: Serialize>(
    frontend: &Frontend,
    headers: &HeaderMap,
    id: &RequestId,
    body: impl FnOnce() -> Result<T, ApiError>,
) -> Response {
    match identity::recognized(frontend, headers).await.and_then(|()| body()) {
        Ok(body) => json(StatusCode::OK, &body),
        Err(error) => failed(&error, &error.body_for_both(&id.0)),
    }
}

/// An error in the form of the API.
pub fn failure(error: &ApiError, id: &RequestId) -> Response {
    failed(error, &error.body(&id.0))
}

/// An error's answer, with this body.
pub fn failed(error: &ApiError, body: &Value) -> Response {
    metrics::error(error.code);
    let mut response = json(error.status_code(), body);
    error.headers().for_each(|(name, value)| {
        response.headers_mut().insert(name, value);
    });
    if matches!(error.status, 408 | 413) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// A JSON answer.
pub fn json(status: StatusCode, value: &impl Serialize) -> Response {
    json_bytes(status, Body::from(serde_json::to_vec(value).unwrap_or_default()))
}

/// A JSON body that is written already.
pub fn json_bytes(status: StatusCode, body: Body) -> Response {
    let mut response = (status, body).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
