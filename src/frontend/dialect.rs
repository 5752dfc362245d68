//! The two dialects that a request for a run may speak: the Messages API's, and that of chat completions.
//! It must never decide anything about a run: a dialect reads one body and writes one answer.

use bytes::Bytes;
use http::HeaderMap;
use serde_json::Value;

use gaoler_policy::settings::ListedModel;

use super::answer::{Answer, Done};
use super::error::ApiError;
use super::job::{self, Job, Shape};
use super::run::Render;
use super::{completions, id, sse};

/// The header that names a session where the body has no field for it.
pub const SESSION: &str = "x-session-id";

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `POST /v1/messages`
    Messages,
    /// `POST /v1/chat/completions`
    Completions,
}

impl Dialect {
    /// The job that a body asks for.
    ///
    /// # Errors
    /// Those of [`job::parse`].
    pub fn parse(self, body: &[u8], headers: &HeaderMap, names: &[ListedModel]) -> Result<Job, ApiError> {
        match self {
            Dialect::Messages => job::parse(body, names),
            Dialect::Completions => {
                let session = headers.get(SESSION).map(|value| value.to_str().unwrap_or_default());
                job::completions::parse(body, session, names)
            }
        }
    }

    /// Where it is spoken.
    pub fn path(self) -> &'static str {
        match self {
            Dialect::Messages => "/v1/messages",
            Dialect::Completions => "/v1/chat/completions",
        }
    }

    /// A name for an answer.
    pub fn answer_id(self) -> String {
        match self {
            Dialect::Messages => id::message(),
            Dialect::Completions => id::completion(),
        }
    }

    /// How the steps of an answer of this shape become bytes. A JSON body is written once, at the end.
    pub fn render(self, shape: Shape) -> Render {
        match (shape, self) {
            (Shape::Json, _) => |_, _| Bytes::new(),
            (Shape::Events, Dialect::Messages) => sse::events,
            (Shape::Events, Dialect::Completions) => completions::events,
        }
    }

    /// The end of a stream.
    pub fn ending(self, answer: &Answer, done: &Done) -> Bytes {
        match self {
            Dialect::Messages => sse::ending(done),
            Dialect::Completions => completions::ending(answer, done),
        }
    }

    /// The end of a stream that failed.
    pub fn error(self, error: &ApiError, request_id: &str) -> Bytes {
        match self {
            Dialect::Messages => sse::error(error, request_id),
            Dialect::Completions => completions::error(error),
        }
    }

    /// What a stream says when there is nothing to say.
    pub fn alive(self) -> Bytes {
        match self {
            Dialect::Messages => sse::ping(),
            Dialect::Completions => completions::alive(),
        }
    }

    /// A JSON body.
    pub fn body(self, answer: &Answer, done: &Done) -> Bytes {
        match self {
            Dialect::Messages => sse::body(answer, done),
            Dialect::Completions => completions::body(answer, done),
        }
    }

    /// A JSON body of a run that failed after its status line was sent.
    pub fn failed_body(self, answer: &Answer, error: &ApiError, request_id: &str) -> Bytes {
        match self {
            Dialect::Messages => sse::failed_body(answer, error, request_id),
            Dialect::Completions => completions::failed_body(answer, error),
        }
    }

    /// The body of an error that has a status of its own.
    pub fn failure(self, error: &ApiError, request_id: &str) -> Value {
        match self {
            Dialect::Messages => error.body(request_id),
            Dialect::Completions => error.completions_body(),
        }
    }
}
