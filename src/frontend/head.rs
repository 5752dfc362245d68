//! The bound on a request's head, told in the form of the API that was asked.
//! It must never look at more of a head than its size.

use axum::extract::{Extension, Request};
use axum::middleware::Next;
use axum::response::Response;
use http::header;

use super::dialect::Dialect;
use super::error::ApiError;
use super::http::{RequestId, failed};

/// Bytes of a request's head, at most: as its lines would be written.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Refuses a head that is larger.
pub async fn bounded(Extension(id): Extension<RequestId>, request: Request, next: Next) -> Response {
    let fields = request.headers().iter();
    let fields: usize = fields.map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len()).sum();
    let uri = request.uri().path_and_query().map_or(1, |uri| uri.as_str().len());
    let line = request.method().as_str().len() + uri + "  HTTP/1.1\r\n\r\n".len();
    if fields + line <= HEAD_BYTES_MAX {
        return next.run(request).await;
    }
    let message = "The head of the request is larger than 64 KiB; send less in its headers.";
    let error = ApiError::new(431, "head_too_large", message);
    let dialect = match request.uri().path() {
        path if path == Dialect::Completions.path() => Dialect::Completions,
        _ => Dialect::Messages,
    };
    let mut response = failed(&error, &dialect.failure(&error, &id.0));
    // What follows the head is not read.
    response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
    response
}
