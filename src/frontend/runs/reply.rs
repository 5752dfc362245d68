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

use super::log::{Form, event_of};
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

/// Where a reader of an answer that has ended is.
enum Told {
    /// It has not ended.
    Waits(Reader),
    /// So much of it was told; what follows after it.
    Tells(Reader, usize, Bytes),
}

/// The next piece of an answer that has ended, and where its reader is then.
fn piece(reader: Reader, form: Form, at: usize, last: Bytes) -> Option<(io::Result<Bytes>, Option<Told>)> {
    match reader.piece(form, at) {
        Some(piece) if !piece.is_empty() => {
            let at = at + piece.len();
            Some((Ok(piece), Some(Told::Tells(reader, at, last))))
        }
        Some(_) => (!last.is_empty()).then_some((Ok(last), None)),
        None => Some((Err(io::Error::other("the answer was let go")), None)),
    }
}

/// A JSON answer's run as events: there are none before its end, and then all.
fn events_of_body(reader: Reader, id: RequestId, after: u64) -> Response {
    sent(futures_util::stream::unfold(Some(Told::Waits(reader)), move |told| {
        let id = id.clone();
        async move {
            let mut reader = match told? {
                Told::Waits(reader) => reader,
                Told::Tells(reader, at, last) => return piece(reader, Form::Events, at, last),
            };
            let (run, dialect) = (reader.log().entry.about.run, reader.log().entry.about.dialect);
            let silent_until = Instant::now() + PING_EVERY;
            loop {
                return match timeout_at(silent_until, reader.read()).await {
                    Err(_) => Some((Ok(dialect.alive()), Some(Told::Waits(reader)))),
                    Ok(Read::Begun | Read::Events(..)) => continue,
                    Ok(Read::End(finished)) => {
                        let events = reader.render(Form::Events, || told_late(run, dialect, &finished));
                        let (at, count) = behind(&events, after);
                        let last = last_events(dialect, &finished, &id);
                        let skip = after.saturating_sub(count);
                        let skip = usize::try_from(skip).unwrap_or(usize::MAX).min(last.len());
                        let last = written(run, count + 1 + skip as u64, &last[skip..], true);
                        drop((events, finished));
                        piece(reader, Form::Events, at, last)
                    }
                    Ok(Read::Missing) => Some((Ok(dialect.error(&missing(), &id.0)), None)),
                };
            }
        }
    }))
}

/// Where these events go on after so many of them, and how many there are.
fn behind(events: &[u8], after: u64) -> (usize, u64) {
    let (mut at, mut here, mut count) = (0, 0, 0);
    while let Some(length) = event_of(&events[at..]) {
        at += length;
        count += 1;
        if count <= after {
            here = at;
        }
    }
    (here, count)
}

/// The events that this answer would have been, with their ids, but for those of its end.
fn told_late(run: RunId, dialect: Dialect, finished: &Finished) -> Bytes {
    match (&finished.answer, &finished.ending) {
        (Some(answer), ending) if answer.begun() || matches!(ending, Ending::Done(_)) => {
            written(run, 1, &split(&dialect.render(Shape::Events)(answer, &steps(answer))), true)
        }
        _ => Bytes::new(),
    }
}

/// Those of its end.
fn last_events(dialect: Dialect, finished: &Finished, id: &RequestId) -> Vec<Bytes> {
    split(&match (&finished.answer, &finished.ending) {
        (Some(answer), Ending::Done(done)) => dialect.ending(answer, done),
        (_, Ending::Failed(error)) => dialect.error(&told(error), &id.0),
        (None, Ending::Done(_)) => dialect.error(&missing(), &id.0),
    })
}

/// Each event by itself.
fn split(bytes: &Bytes) -> Vec<Bytes> {
    let mut events = Vec::new();
    let mut at = 0;
    while let Some(length) = event_of(&bytes[at..]) {
        events.push(bytes.slice(at..at + length));
        at += length;
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

fn sent<E: Into<axum::BoxError> + 'static>(
    bytes: impl futures_util::Stream<Item = Result<Bytes, E>> + Send + 'static,
) -> Response {
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
                let length = body(&reader, &finished)?.len();
                drop(finished);
                let mut response = json_bytes(StatusCode::OK, Body::from_stream(rest(reader, id.clone())));
                response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
                return Ok(response);
            }
            Ok(Read::Missing) => return Err(missing()),
            Err(_) => break,
        }
    }
    let first = futures_util::stream::iter([Ok(Bytes::from_static(b"\n"))]);
    let body = Body::from_stream(futures_util::StreamExt::chain(first, rest(reader, id.clone())));
    Ok(json_bytes(StatusCode::OK, body))
}

/// A JSON answer from here on: blanks until it has ended, and then all of it.
fn rest(reader: Reader, id: RequestId) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send {
    futures_util::stream::unfold(Some(Told::Waits(reader)), move |told| {
        let id = id.clone();
        async move {
            let mut reader = match told? {
                Told::Waits(reader) => reader,
                Told::Tells(reader, at, last) => return piece(reader, Form::Body, at, last),
            };
            let dialect = reader.log().entry.about.dialect;
            let blank_at = Instant::now() + BLANK_EVERY;
            loop {
                return match timeout_at(blank_at, reader.read()).await {
                    Err(_) => Some((Ok(Bytes::from_static(b"\n")), Some(Told::Waits(reader)))),
                    Ok(Read::Begun | Read::Events(..)) => continue,
                    Ok(Read::End(finished)) => match (body(&reader, &finished), &finished.answer) {
                        (Ok(_), _) => piece(reader, Form::Body, 0, Bytes::new()),
                        (Err(error), Some(answer)) => {
                            Some((Ok(dialect.failed_body(answer, &error, &id.0)), None))
                        }
                        (Err(_), None) => Some((Err(io::Error::other("the run was lost")), None)),
                    },
                    Ok(Read::Missing) => Some((Err(io::Error::other("the answer was let go")), None)),
                };
            }
        }
    })
}

fn body(reader: &Reader, finished: &Finished) -> Result<Bytes, ApiError> {
    match (&finished.answer, &finished.ending) {
        (_, Ending::Failed(error)) => Err(told(error)),
        (Some(answer), Ending::Done(done)) => {
            let dialect = reader.log().entry.about.dialect;
            Ok(reader.render(Form::Body, || dialect.body(answer, done)))
        }
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
