//! A run's log as an answer over HTTP: the same bytes for who began the run and for who joined it later.
//! It must never send a status before it is known, nor be silent for longer than proxies and clients bear.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::header::{self, HeaderName, HeaderValue};
use tokio::time::{Instant, timeout_at};

use gaoler_protocol::RunId;

use super::{Finished, Read, Reader};
use crate::frontend::answer::{Answer, Emit, Ending, Kind};
use crate::frontend::dialect::Dialect;
use crate::frontend::error::ApiError;
use crate::frontend::http::{RequestId, failed, json_bytes};
use crate::frontend::job::Shape;

/// How often a stream says something: proxies cut at 16 s of silence and more.
const PING_EVERY: Duration = Duration::from_secs(8);
/// How long a JSON answer waits for a real status before it begins with 200 and blanks.
const STATUS_WAIT: Duration = Duration::from_secs(50);
/// How often it then sends a blank.
const BLANK_EVERY: Duration = Duration::from_secs(25);

const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
/// Of an answer: another request began its run.
const REPLAY: HeaderName = HeaderName::from_static("x-gaoler-idempotent-replay");

/// The answer of a request, to its first byte; the rest is a stream of its own.
///
/// # Errors
/// What ended it before there was a run.
pub async fn answer(reader: Reader, id: &RequestId, joined: bool) -> Result<Response, ApiError> {
    let log = Arc::clone(reader.log());
    let about = &log.entry.about;
    let answered = match about.shape {
        Shape::Events => stream(reader, id, about.ids).await,
        Shape::Json => whole(reader, id).await,
    };
    let run = log.headers();
    let mut response = match answered {
        Ok(response) => response,
        Err(error) if run.is_empty() => return Err(error),
        // An error of a run says, like any answer, which run it was.
        Err(error) => failed(&error, &about.dialect.failure(&error, &id.0)),
    };
    response.headers_mut().extend(run);
    if joined {
        response.headers_mut().insert(REPLAY, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// What follows in a stream: bytes of events, silence that is over, or the end.
enum Next {
    Bytes(Bytes),
    Nothing,
    Last(Bytes),
    Ended,
}

/// A streamed answer. The status waits for the upstream's first word, so that a refusal keeps its own.
async fn stream(mut reader: Reader, id: &RequestId, ids: bool) -> Result<Response, ApiError> {
    let first = match reader.read().await {
        Read::End(finished) => match &finished.ending {
            Ending::Failed(error) => return Err(told(error)),
            Ending::Done(_) => Bytes::new(),
        },
        Read::Missing => return Err(missing()),
        Read::Begun => Bytes::new(),
        Read::Events(number, events) => written(reader.log().entry.about.run, number, &events, ids),
    };
    Ok(events(reader, first, id.clone(), ids))
}

/// Everything from this event on, numbered, for whoever names the run.
pub fn follow(reader: Reader, id: RequestId, after: u64) -> Response {
    match reader.log().entry.about.shape {
        Shape::Events => events(reader, Bytes::new(), id, true),
        Shape::Json => events_of_body(reader, id, after),
    }
}

fn events(reader: Reader, first: Bytes, id: RequestId, ids: bool) -> Response {
    let first = Some(first).filter(|first| !first.is_empty());
    sent(futures_util::stream::unfold((first, Some(reader)), move |(first, reader)| {
        let id = id.clone();
        async move {
            let mut reader = reader?;
            if let Some(first) = first {
                return Some((Ok::<_, Infallible>(first), (None, Some(reader))));
            }
            let dialect = reader.log().entry.about.dialect;
            let silent_until = Instant::now() + PING_EVERY;
            loop {
                return match timeout_at(silent_until, reader.read()).await {
                    Err(_) => Some((Ok(dialect.alive()), (None, Some(reader)))),
                    Ok(read) => match next(&reader, read, &id, ids) {
                        // A step that the dialect has no word for is silence all the same.
                        Next::Nothing => continue,
                        Next::Bytes(bytes) => Some((Ok(bytes), (None, Some(reader)))),
                        Next::Last(bytes) => Some((Ok(bytes), (None, None))),
                        Next::Ended => None,
                    },
                };
            }
        }
    }))
}

fn next(reader: &Reader, read: Read, id: &RequestId, ids: bool) -> Next {
    let about = &reader.log().entry.about;
    let error = match read {
        Read::Begun => return Next::Nothing,
        Read::Events(number, events) => return Next::Bytes(written(about.run, number, &events, ids)),
        Read::End(finished) => match &finished.ending {
            Ending::Done(_) => return Next::Ended,
            Ending::Failed(error) => told(error),
        },
        Read::Missing => missing(),
    };
    let event = about.dialect.error(&error, &id.0);
    Next::Last(written(about.run, reader.log().newest() + 1, &[event], ids))
}

/// These events as bytes, each with its id where that is wanted.
fn written(run: RunId, first: u64, events: &[Bytes], ids: bool) -> Bytes {
    if let ([event], false) = (events, ids) {
        return event.clone();
    }
    let mut out = BytesMut::new();
    for (number, event) in (first..).zip(events) {
        if ids {
            out.extend_from_slice(format!("id: {run}-{number}\n").as_bytes());
        }
        out.extend_from_slice(event);
    }
    out.freeze()
}

/// A JSON answer's run as events: there are none before its end, and then all.
fn events_of_body(reader: Reader, id: RequestId, after: u64) -> Response {
    sent(futures_util::stream::unfold(Some(reader), move |reader| {
        let id = id.clone();
        async move {
            let mut reader = reader?;
            let (run, dialect) = (reader.log().entry.about.run, reader.log().entry.about.dialect);
            let silent_until = Instant::now() + PING_EVERY;
            loop {
                return match timeout_at(silent_until, reader.read()).await {
                    Err(_) => Some((Ok::<_, Infallible>(dialect.alive()), Some(reader))),
                    Ok(Read::Begun | Read::Events(..)) => continue,
                    Ok(Read::End(finished)) => {
                        let events = told_late(dialect, &finished, &id);
                        let skip = usize::try_from(after).unwrap_or(usize::MAX).min(events.len());
                        Some((Ok(written(run, after + 1, &events[skip..], true)), None))
                    }
                    Ok(Read::Missing) => Some((Ok(dialect.error(&missing(), &id.0)), None)),
                };
            }
        }
    }))
}

/// The events that this answer would have been.
fn told_late(dialect: Dialect, finished: &Finished, id: &RequestId) -> Vec<Bytes> {
    let mut bytes = BytesMut::new();
    match (&finished.answer, &finished.ending) {
        (Some(answer), ending) => {
            if answer.begun() || matches!(ending, Ending::Done(_)) {
                bytes.extend_from_slice(&dialect.render(Shape::Events)(answer, &steps(answer)));
            }
            bytes.extend_from_slice(&match ending {
                Ending::Done(done) => dialect.ending(answer, done),
                Ending::Failed(error) => dialect.error(&told(error), &id.0),
            });
        }
        (None, Ending::Failed(error)) => bytes.extend_from_slice(&dialect.error(&told(error), &id.0)),
        (None, Ending::Done(_)) => bytes.extend_from_slice(&dialect.error(&missing(), &id.0)),
    }
    let bytes = bytes.freeze();
    let mut events = Vec::new();
    let mut at = 0;
    while let Some(length) = bytes[at..].windows(2).position(|two| two == b"\n\n") {
        events.push(bytes.slice(at..at + length + 2));
        at += length + 2;
    }
    events
}

fn steps(answer: &Answer) -> Vec<Emit> {
    let mut steps = vec![Emit::Start];
    for (at, block) in answer.blocks.iter().enumerate() {
        steps.push(Emit::BlockStart(at, block.kind.clone()));
        if !block.text.is_empty() {
            steps.push(match block.kind {
                Kind::Thinking => Emit::Thinking(at, block.text.clone()),
                Kind::ToolUse { .. } => Emit::Input(at, block.text.clone()),
                Kind::Text | Kind::Redacted(_) => Emit::Text(at, block.text.clone()),
            });
        }
        if !block.signature.is_empty() {
            steps.push(Emit::Signature(at, block.signature.clone()));
        }
        steps.push(Emit::BlockStop(at));
    }
    steps
}

fn sent(bytes: impl futures_util::Stream<Item = Result<Bytes, Infallible>> + Send + 'static) -> Response {
    let mut response = Body::from_stream(bytes).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(BUFFERING, HeaderValue::from_static("no"));
    response
}

/// A JSON answer: with a real status where the run ends in time; else 200 and blanks until it has ended.
async fn whole(mut reader: Reader, id: &RequestId) -> Result<Response, ApiError> {
    let status_until = Instant::now() + STATUS_WAIT;
    let mut begun = false;
    loop {
        let read = match begun {
            true => timeout_at(status_until, reader.read()).await,
            false => Ok(reader.read().await),
        };
        match read {
            Ok(Read::Begun | Read::Events(..)) => begun = true,
            Ok(Read::End(finished)) => {
                let body = body(&reader, &finished)?;
                return Ok(json_bytes(StatusCode::OK, Body::from(body)));
            }
            Ok(Read::Missing) => return Err(missing()),
            Err(_) => break,
        }
    }
    let id = id.clone();
    let rest = futures_util::stream::unfold(Some(reader), move |reader| {
        let id = id.clone();
        async move {
            let mut reader = reader?;
            let dialect = reader.log().entry.about.dialect;
            let blank_at = Instant::now() + BLANK_EVERY;
            loop {
                return match timeout_at(blank_at, reader.read()).await {
                    Err(_) => Some((Ok(Bytes::from_static(b"\n")), Some(reader))),
                    Ok(Read::Begun | Read::Events(..)) => continue,
                    Ok(Read::End(finished)) => match (body(&reader, &finished), &finished.answer) {
                        (Ok(body), _) => Some((Ok(body), None)),
                        (Err(error), Some(answer)) => {
                            Some((Ok(dialect.failed_body(answer, &error, &id.0)), None))
                        }
                        (Err(_), None) => Some((Err(io::Error::other("the run was lost")), None)),
                    },
                    Ok(Read::Missing) => Some((Err(io::Error::other("the answer was let go")), None)),
                };
            }
        }
    });
    let first = futures_util::stream::iter([Ok(Bytes::from_static(b"\n"))]);
    let body = Body::from_stream(futures_util::StreamExt::chain(first, rest));
    Ok(json_bytes(StatusCode::OK, body))
}

fn body(reader: &Reader, finished: &Finished) -> Result<Bytes, ApiError> {
    match (&finished.answer, &finished.ending) {
        (_, Ending::Failed(error)) => Err(told(error)),
        (Some(answer), Ending::Done(done)) => Ok(reader.log().entry.about.dialect.body(answer, done)),
        (None, Ending::Done(_)) => Err(missing()),
    }
}

/// What a client is told of a failure: whoever comes back for a run that was ended because nobody came is told so.
fn told(error: &ApiError) -> ApiError {
    match error.code {
        "client_gone" => {
            ApiError::internal("cancelled", "The run was ended: its client had gone away.").final_word()
        }
        _ => error.clone(),
    }
}

/// Events that a reader wants and that are not kept any more.
pub fn missing() -> ApiError {
    let message = "These events are not kept any more; the run's status is at GET /v1/runs/{id}.";
    ApiError::new(410, "events_gone", message).final_word()
}
