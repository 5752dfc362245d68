//! What every request passes before its route, and its answer after it: a name, a bound on its head, what holds of any
//! address, and the figures. It must never look at a body, nor let a request in without a name.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use ::http::header::{self, HeaderName, HeaderValue};
use ::http::{Request, Uri};
use axum::Router;
use axum::body::Body;
use axum::response::Response;
use hyper::body::Incoming;
use tower::Service;

use super::crowd::Connection;
use super::dialect::Dialect;
use super::error::ApiError;
use super::http::{self, App, RequestId, failed, failure};
use super::metrics::{Timed, TimedBody};
use super::rates::UnderWay;
use super::{Frontend, id, identity, vouching};

/// Bytes of a request's head, at most: as its lines would be written.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;

const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
/// The same, where the second dialect's clients look for it.
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Takes a request of this connection to its route, and the answer back.
///
/// # Errors
/// None.
pub async fn pass(
    router: &Router,
    frontend: &App,
    connection: &Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<TimedBody>, Infallible> {
    // One that is about to end hands nothing over any more.
    let Some(carried) = connection.carry() else { return std::future::pending().await };
    let mut request = without_prefix(request);
    let mut timed = Timed::begin(&request, &frontend.traces, carried);
    // An answer and a log line can be brought together by it.
    let id = RequestId(id::request(), timed.trace());
    let place = frontend.live().rates.place_of(connection.address, request.headers());
    let known = match admitted(frontend, connection.address, &request, &id) {
        Ok(under_way) => {
            timed.holds(under_way);
            http::at_once(frontend, &request)
        }
        Err(response) => Some(*response),
    };
    let mut response = match known {
        Some(response) => response,
        None => {
            request.extensions_mut().insert(id.clone());
            // A router is always ready.
            vouching::from(place, router.clone().call(request)).await?
        }
    };
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(REQUEST_ID, value.clone());
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    Ok(timed.answered(response))
}

/// A base URL may have a prefix of its own, which a proxy in front of us may have left there.
fn without_prefix<B>(mut request: Request<B>) -> Request<B> {
    let path = request.uri().path();
    let known = path.as_bytes().windows(4).position(|four| four == b"/v1/");
    let stripped = known.map(|at| at - if path[..at].ends_with("/admin") { "/admin".len() } else { 0 });
    let Some(stripped) = stripped.filter(|&at| at > 0) else { return request };
    let whole = request.uri().path_and_query().map_or(path, |whole| whole.as_str());
    if let Ok(uri) = Uri::try_from(whole[stripped..].to_owned()) {
        *request.uri_mut() = uri;
    }
    request
}

/// Whether a route is to see it, and if not, its answer.
fn admitted<B>(
    frontend: &Frontend,
    peer: IpAddr,
    request: &Request<B>,
    id: &RequestId,
) -> Result<Option<UnderWay>, Box<Response<Body>>> {
    if head_bytes(request) > HEAD_BYTES_MAX {
        return Err(Box::new(too_large(request.uri().path(), id)));
    }
    counted(frontend, peer, request).map_err(|error| Box::new(failure(&error, id)))
}

fn head_bytes<B>(request: &Request<B>) -> usize {
    let fields = request.headers().iter();
    let fields: usize = fields.map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len()).sum();
    let uri = request.uri().path_and_query().map_or(1, |uri| uri.as_str().len());
    fields + request.method().as_str().len() + uri + "  HTTP/1.1\r\n\r\n".len()
}

/// 431 in the form of the API that was asked.
fn too_large(path: &str, id: &RequestId) -> Response<Body> {
    let message = "The head of the request is larger than 64 KiB; send less in its headers.";
    let error = ApiError::new(431, "head_too_large", message);
    let dialect = match path {
        path if path == Dialect::Completions.path() => Dialect::Completions,
        _ => Dialect::Messages,
    };
    let mut response = failed(&error, &dialect.failure(&error, &id.0));
    // What follows the head is not read.
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// What holds of a request wherever it goes. Probes are asked by machines, often, and cost nothing.
fn counted<B>(frontend: &Frontend, peer: IpAddr, request: &Request<B>) -> Result<Option<UnderWay>, ApiError> {
    if request.uri().query().is_some_and(identity::in_query) {
        return Err(key_in_query());
    }
    match ["/health", "/livez", "/readyz", "/metrics"].contains(&request.uri().path()) {
        true => Ok(None),
        false => frontend.live().rates.address(peer, request.headers()),
    }
}

/// Addresses are written down wherever they pass: what was sent there is to be taken back.
fn key_in_query() -> ApiError {
    let message = "A key or credential was sent in the address, where logs keep it. Send it as a header, and revoke it.";
    ApiError::new(400, "key_in_query", message).final_word()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_of_a_base_url_is_not_looked_at() {
        let path = |text: &str| {
            let request = Request::builder().uri(text).body(()).expect("a request");
            without_prefix(request).uri().to_string()
        };
        for (asked, routed) in [
            ("/", "/"),
            ("/health", "/health"),
            ("/v1/models?limit=1", "/v1/models?limit=1"),
            ("/claude/v1/models?limit=1", "/v1/models?limit=1"),
            ("/v1/v1/models", "/v1/v1/models"),
            ("/a/b/v1/messages", "/v1/messages"),
            ("/admin/v1/keys", "/admin/v1/keys"),
            ("/x/admin/v1/keys", "/admin/v1/keys"),
            ("/v1/admin/v1/keys", "/v1/admin/v1/keys"),
            ("/xadmin/v1/keys", "/v1/keys"),
            ("/v1", "/v1"),
        ] {
            assert_eq!(path(asked), routed, "{asked}");
        }
    }
}
