//! What every request passes before its route, and its answer after it: a name, a bound on its head, what holds of any
//! address, and the figures. It must never look at a body, nor let a request in without a name.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use ::http::header::{self, HeaderName, HeaderValue};
use ::http::{HeaderMap, Request, Uri};
use axum::Router;
use axum::body::Body;
use axum::response::Response;
use hyper::body::Incoming;
use tower::Service;

use super::crowd::{self, Connection};
use super::error::ApiError;
use super::http::{self, App, RequestId, failed};
use super::metrics::{Timed, TimedBody};
use super::rates::UnderWay;
use super::wire::Heads;
use super::{Frontend, id, identity, vouching};

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
    (connection, heads): (&Arc<Connection>, &Heads),
    request: Request<Incoming>,
) -> Result<Response<TimedBody>, Infallible> {
    // One that is about to end hands nothing over any more.
    let Some(carried) = connection.carry() else { return std::future::pending().await };
    let mut request = without_prefix(request);
    let mut timed = Timed::begin(&request, &frontend.traces, carried);
    // An answer and a log line can be brought together by it.
    let id = RequestId(id::request(), timed.trace());
    let place = frontend.live().rates.place_of(connection.address, request.headers());
    let refused = heads.serve().map(|(path, error)| failed(error, &error.body_at(path, &id.0)));
    let known = match refused {
        Some(mut response) => {
            // What follows the head is not read.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            Some(response)
        }
        None => match counted(frontend, connection.address, &request) {
            Ok(under_way) => {
                timed.holds(under_way);
                http::at_once(frontend, &request)
            }
            Err(error) => Some(failed(&error, &error.body_at(request.uri().path().as_bytes(), &id.0))),
        },
    };
    let known = match known {
        None if !is_text(request.uri().path()) => Some(unreadable(frontend, &request, &id).await),
        known => known,
    };
    let mut response = match known {
        Some(response) => response,
        None => {
            request.extensions_mut().insert(id.clone());
            request.extensions_mut().insert(Arc::clone(connection));
            // A router is always ready.
            let served = crowd::SERVED.scope(Arc::clone(connection), router.clone().call(request));
            vouching::from(place, served).await?
        }
    };
    told_to_nobody_else(response.headers_mut());
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(REQUEST_ID, value.clone());
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    Ok(timed.answered(response))
}

/// A base URL may have a prefix of its own, which a proxy in front of us may have left there. The operator's routes have
/// one address each, so that a proxy's rule for them holds.
fn without_prefix<B>(mut request: Request<B>) -> Request<B> {
    let path = request.uri().path();
    let at = path.as_bytes().windows(4).position(|four| four == b"/v1/");
    let prefix = &path[..at.unwrap_or_default()];
    if prefix.is_empty() || prefix.split('/').skip(1).any(|part| part.is_empty() || part == "admin") {
        return request;
    }
    let whole = request.uri().path_and_query().map_or(path, |whole| whole.as_str());
    if let Ok(uri) = Uri::try_from(whole[prefix.len()..].to_owned()) {
        *request.uri_mut() = uri;
    }
    request
}

/// Whether a path is text, where it is percent-encoded too. The name of a file may be any bytes.
fn is_text(path: &str) -> bool {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let digits = digits.filter(|two| two.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let Some(byte) = digits.and_then(|two| u8::from_str_radix(two, 16).ok()) else { return false };
        bytes.push(byte);
        rest = &after[2..];
    }
    let names_a_file = path.starts_with("/v1/workspaces/") && path.contains("/files/");
    names_a_file || std::str::from_utf8(&bytes).is_ok()
}

/// 400 for who may know of the route, whichever it is.
async fn unreadable<B>(frontend: &Frontend, request: &Request<B>, id: &RequestId) -> Response<Body> {
    let error = match identity::recognized(frontend, request.headers()).await {
        Ok(()) => ApiError::invalid("The path must be percent-encoded UTF-8.").final_word(),
        Err(error) => error,
    };
    failed(&error, &error.body_at(request.uri().path().as_bytes(), &id.0))
}

/// An answer is its asker's, unless its route says another thing of it: a cache in front of us must not give it to
/// somebody else.
fn told_to_nobody_else(headers: &mut HeaderMap) {
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.append(header::VARY, HeaderValue::from_static("authorization, x-api-key, x-claude-credential"));
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
    fn b12_a_path_that_is_no_text_is_known_by_itself() {
        for path in ["/v1/runs/a", "/v1/files/%C3%A9%20%2f", "/%25ff"] {
            assert!(is_text(path), "{path}");
        }
        for path in ["/v1/runs/%ff", "/v1/models/%", "/v1/models/%f", "/v1/models/%zz", "/%C3", "/%+1"] {
            assert!(!is_text(path), "{path}");
        }
    }

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
            ("/x/admin/v1/keys", "/x/admin/v1/keys"),
            ("//admin/v1/keys", "//admin/v1/keys"),
            ("//v1/models", "//v1/models"),
            ("/v1/admin/v1/keys", "/v1/admin/v1/keys"),
            ("/xadmin/v1/keys", "/v1/keys"),
            ("/v1", "/v1"),
        ] {
            assert_eq!(path(asked), routed, "{asked}");
        }
    }
}
