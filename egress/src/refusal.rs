//! How a request is refused: a status and fixed words in the API's own form.
//! It must never hold a byte of the request, of the upstream's answer, or of a credential.

use bytes::Bytes;
use gaoler_protocol::Denial;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;

/// A refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The status.
    pub status: u16,
    /// What is counted, where it is a denial and not a failure.
    pub denial: Option<Denial>,
    /// Why, for whoever reads the answer.
    why: &'static str,
}

impl Refusal {
    /// The policy says no.
    pub fn denied(status: u16, denial: Denial, why: &'static str) -> Refusal {
        Refusal { status, denial: Some(denial), why }
    }

    /// The upstream does not do its part.
    pub fn failed(status: u16, why: &'static str) -> Refusal {
        Refusal { status, denial: None, why }
    }

    /// The answer.
    pub fn response(&self, id: &str) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from(self.body(id)));
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::BAD_GATEWAY);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // An unreachable upstream may come back; nothing else gets better by asking again.
        let retry = if self.status == 502 { "true" } else { "false" };
        headers.insert("x-should-retry", HeaderValue::from_static(retry));
        if let Ok(id) = HeaderValue::from_str(id) {
            headers.insert("request-id", id);
        }
        response
    }

    /// The same as the last event of a stream that has begun. The blank line ends what may have been left
    /// open.
    pub fn event(&self, id: &str) -> Bytes {
        Bytes::from(format!("\n\nevent: error\ndata: {}\n\n", self.body(id)))
    }

    fn body(&self, id: &str) -> String {
        let error = json!({"type": error_type(self.status), "message": format!("gaoler: {}", self.why)});
        json!({"type": "error", "error": error, "request_id": id}).to_string()
    }
}

fn error_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        504 => "timeout_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}
