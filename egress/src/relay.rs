//! One request from the cage to the upstream and its answer back, bounded at every wait.
//! It must never hand the cage an answer that holds the credential.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::policy::EgressPolicy;
use bytes::{Bytes, BytesMut};
use gaoler_protocol::{Denial, Serve};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, Sleep, timeout};
use zeroize::Zeroizing;

use crate::answer::{Answer, Broken, whole};
use crate::arguments::Upstream;
use crate::body::{self, Fault};
use crate::credential::Credential;
use crate::head::{self, Route};
use crate::meter::{Meter, Usage};
use crate::placeholder::Expected;
use crate::refusal::Refusal;
use crate::scan::{self, Scan};
use crate::tally::{ModelId, Tally};
use crate::upstream::{self, HttpClient};

/// How long the cage may take for a body; it comes over a socket of this machine.
const BODY_TIME: Duration = Duration::from_secs(60);
/// Bodies in memory together, as a multiple of the largest one.
const BODIES: usize = 2;
/// Bytes for one permit of that memory.
const PERMIT_BYTES: usize = 1024;
/// An answer that is no stream is held whole, up to this.
const WHOLE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// All that serving one run needs.
pub struct Job {
    /// What the level lets out.
    pub policy: EgressPolicy,
    /// What was counted.
    pub tally: Arc<Tally>,
    credential: Credential,
    needle: Option<Arc<Zeroizing<Vec<u8>>>>,
    expected: Expected,
    upstream: Upstream,
    client: HttpClient,
    silence: Duration,
    requests_max: u32,
    memory: Semaphore,
}

impl Job {
    /// Puts one together. `requests_max` is the operator's; the smallest of all that are named holds.
    pub fn new(
        serve: Serve,
        policy: EgressPolicy,
        credential: Credential,
        client: HttpClient,
        upstream: Upstream,
        silence: Duration,
        requests_max: u32,
    ) -> Job {
        let asked = if serve.requests_max == 0 { u32::MAX } else { serve.requests_max };
        let level = u32::try_from(policy.requests_max).unwrap_or(u32::MAX);
        let bytes = usize::try_from(policy.request_bytes_max).unwrap_or(WHOLE_BYTES_MAX);
        Job {
            tally: Arc::new(Tally::new(serve.run)),
            needle: credential.needle().map(Arc::new),
            expected: Expected::new(&serve.placeholder),
            memory: Semaphore::new(BODIES * bytes.div_ceil(PERMIT_BYTES)),
            requests_max: requests_max.min(asked).min(level),
            policy,
            credential,
            client,
            upstream,
            silence,
        }
    }

    /// The upstream's status for the credential, and for how many seconds it asks to be left alone.
    pub async fn vouch(&self) -> (u16, u8) {
        upstream::vouch(&self.client, &self.upstream, &self.credential).await
    }

    /// Answers one request, whose head was `plain` or not.
    pub async fn answer(&self, request: Request<Incoming>, plain: bool, id: &str) -> Response<Answer> {
        match self.relay(request, plain, id).await {
            Ok(response) => response,
            Err(refusal) => {
                if let Some(denial) = refusal.denial {
                    self.tally.deny(denial);
                }
                refusal.response(id).map(whole)
            }
        }
    }

    async fn relay(
        &self,
        request: Request<Incoming>,
        plain: bool,
        id: &str,
    ) -> Result<Response<Answer>, Refusal> {
        if !plain {
            return Err(Refusal::denied(400, Denial::Path, "the head can be read in more than one way"));
        }
        let (head, incoming) = request.into_parts();
        let path = match head::judge(&head, &self.expected, &self.policy)? {
            Route::Hello => return Ok(Response::new(whole(Bytes::new()))),
            Route::Forward(path) => path,
        };
        let (bytes, permit) = self.read(&head.headers, incoming).await?;
        let model = body::inspect(&bytes, &self.policy).map_err(|fault| match fault {
            Fault::Shape => Refusal::denied(400, Denial::Body, "the body is not one plain JSON object"),
            Fault::Policy => {
                Refusal::denied(403, Denial::Body, "the level of this run does not allow what it asks for")
            }
            Fault::Model => {
                Refusal::denied(404, Denial::Body, "the level of this run does not know this model")
            }
        })?;
        if self.tally.totals().requests >= self.requests_max {
            return Err(Refusal::denied(429, Denial::Quota, "this run has made all its requests"));
        }
        let model = self.tally.sent(bytes.len(), model.as_deref().unwrap_or_default());
        // From here on there is an answer to count, whatever becomes of it.
        let ended = Ended(self.tally.clone());
        let response = timeout(self.silence, self.client.request(self.outgoing(&head, path, bytes)?)).await;
        drop(permit);
        let response = match response {
            Err(_) => return Err(Refusal::failed(504, "the upstream does not answer")),
            Ok(Err(_)) => return Err(Refusal::failed(502, "the upstream cannot be reached")),
            Ok(Ok(response)) => response,
        };
        self.tally.answered(upstream::status(&response));
        self.back(response, id, model, ended).await
    }

    /// The body of a request, and the memory that was set aside for it.
    async fn read(
        &self,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Result<(Bytes, SemaphorePermit<'_>), Refusal> {
        let length = match headers.get(CONTENT_LENGTH).map(|value| value.to_str().ok()?.parse::<usize>().ok())
        {
            Some(Some(length)) => length,
            // Without one there is no body: it does not come in chunks.
            None => 0,
            // Memory is set aside by the length: what is none must not pass for nothing.
            Some(None) => return Err(Refusal::denied(400, Denial::Path, "the body's length is no number")),
        };
        if length as u64 > self.policy.request_bytes_max {
            return Err(Refusal::denied(413, Denial::Quota, "the body is larger than the level allows"));
        }
        let permits = u32::try_from(length.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        let broken = |_| Refusal::failed(400, "the body did not arrive");
        let collect = async {
            let permit = self.memory.acquire_many(permits).await.map_err(|_| Broken);
            Ok::<_, Broken>((body.collect().await.map_err(|_| Broken)?.to_bytes(), permit?))
        };
        timeout(BODY_TIME, collect).await.map_err(|_| Broken).and_then(|read| read).map_err(broken)
    }

    /// The request as the upstream gets it: nothing of the cage's but what is named.
    fn outgoing(&self, head: &Parts, path: &str, bytes: Bytes) -> Result<Request<Full<Bytes>>, Refusal> {
        let mut request = Request::new(Full::new(bytes));
        *request.method_mut() = Method::POST;
        let url = self.upstream.url(path).parse();
        *request.uri_mut() = url.map_err(|_| Refusal::failed(502, "the upstream's address is unusable"))?;
        *request.headers_mut() = head::forwarded(&head.headers, self.credential.scheme(), &self.policy);
        self.credential.insert(request.headers_mut());
        Ok(request)
    }

    /// The answer as the cage gets it.
    async fn back(
        &self,
        response: Response<Incoming>,
        id: &str,
        model: ModelId,
        ended: Ended,
    ) -> Result<Response<Answer>, Refusal> {
        let (mut head, body) = response.into_parts();
        let status = head.status;
        if status.is_redirection() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(Refusal::failed(502, "the upstream wants to send this elsewhere"));
        }
        if head.headers.get(CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
            return Err(Refusal::failed(502, "the upstream's answer is encoded"));
        }
        let headers = head::returned(&head.headers);
        let needle = self.needle.as_ref();
        if headers.values().any(|value| scan::contains(needle, value.as_bytes())) {
            return Err(Refusal::denied(502, Denial::Body, "the upstream's answer held the credential"));
        }
        let is_stream = headers.get(CONTENT_TYPE).is_some_and(is_event_stream);
        head.headers = headers;
        head.extensions.clear();
        let passing = Passing {
            body,
            wait: Box::pin(tokio::time::sleep(self.silence)),
            silence: self.silence,
            scan: Scan::new(self.needle.clone()),
            meter: is_stream.then(Meter::default),
            usage: Usage::default(),
            model,
            bytes_max: self.policy.response_bytes_max,
            tally: self.tally.clone(),
            id: id.to_owned(),
            over: false,
            _ended: ended,
        };
        match is_stream {
            true => Ok(Response::from_parts(head, passing.boxed_unsync())),
            false => Ok(Response::from_parts(head, whole(passing.collect_whole().await?))),
        }
    }
}

fn is_event_stream(kind: &HeaderValue) -> bool {
    kind.as_bytes().starts_with(b"text/event-stream")
}

/// Says at its end that there is something to tell the supervisor.
struct Ended(Arc<Tally>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.ended();
    }
}

/// An answer on its way: counted, searched, and ended when the upstream falls silent.
struct Passing {
    body: Incoming,
    wait: Pin<Box<Sleep>>,
    silence: Duration,
    scan: Scan,
    /// Reads the counts of a stream; an answer that is held whole is read at its end.
    meter: Option<Meter>,
    usage: Usage,
    /// Whose counts these are.
    model: ModelId,
    bytes_max: u64,
    tally: Arc<Tally>,
    id: String,
    over: bool,
    _ended: Ended,
}

/// Why an answer stops before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// The upstream is silent.
    Silent,
    /// The upstream broke off.
    Broken,
    /// The credential was in it.
    Echo,
    /// More than the level allows.
    Quota,
}

impl Passing {
    /// The next piece that may go on; `None` at the end.
    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Stop>> {
        loop {
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Pending => match self.wait.as_mut().poll(context) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(()) => return Poll::Ready(Err(Stop::Silent)),
                },
                Poll::Ready(None) => return Poll::Ready(Ok(None)),
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Err(Stop::Broken)),
                Poll::Ready(Some(Ok(frame))) => {
                    self.wait.as_mut().reset(Instant::now() + self.silence);
                    // Trailers go no further: no client of the API reads them.
                    let Ok(data) = frame.into_data() else { continue };
                    let out = self.take(data)?;
                    if !out.is_empty() {
                        return Poll::Ready(Ok(Some(out)));
                    }
                }
            }
        }
    }

    fn take(&mut self, data: Bytes) -> Result<Bytes, Stop> {
        let now = self.meter.as_mut().map_or(self.usage, |meter| meter.take(&data));
        let all = self.tally.received(self.model, data.len(), self.usage, now);
        self.usage = now;
        let stop = |tally: &Tally, denial, stop| {
            tally.deny(denial);
            stop
        };
        if all > self.bytes_max {
            return Err(stop(&self.tally, Denial::Quota, Stop::Quota));
        }
        self.scan.pass(data).map_err(|_| stop(&self.tally, Denial::Body, Stop::Echo))
    }

    /// Reads an answer that is no stream.
    async fn collect_whole(mut self) -> Result<Bytes, Refusal> {
        let mut out = BytesMut::new();
        loop {
            match std::future::poll_fn(|context| self.poll_piece(context)).await {
                Ok(Some(piece)) if out.len() + piece.len() <= WHOLE_BYTES_MAX => {
                    out.extend_from_slice(&piece)
                }
                Ok(Some(_)) => return Err(Refusal::failed(502, "the upstream's answer is too large")),
                Ok(None) => break,
                Err(Stop::Silent) => return Err(Refusal::failed(504, "the upstream fell silent")),
                Err(Stop::Broken) => return Err(Refusal::failed(502, "the upstream's answer broke off")),
                // Both were counted when they were seen.
                Err(Stop::Echo) => {
                    return Err(Refusal::failed(502, "the upstream's answer held the credential"));
                }
                Err(Stop::Quota) => {
                    return Err(Refusal::failed(429, "this run has received all that it may"));
                }
            }
        }
        out.extend_from_slice(&self.scan.finish());
        self.tally.received(self.model, 0, Usage::default(), Usage::of_message(&out));
        Ok(out.freeze())
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let piece = std::task::ready!(self.poll_piece(context));
        self.over = !matches!(piece, Ok(Some(_)));
        Poll::Ready(match piece {
            Ok(Some(piece)) => Some(Ok(Frame::data(piece))),
            Ok(None) => {
                Some(self.scan.finish()).filter(|rest| !rest.is_empty()).map(|rest| Ok(Frame::data(rest)))
            }
            // A client must not take a stream that merely ends for a whole one: a named error, or a break.
            Err(Stop::Silent) => {
                let refusal = Refusal::failed(504, "the upstream fell silent");
                Some(Ok(Frame::data(refusal.event(&self.id))))
            }
            Err(Stop::Broken | Stop::Echo | Stop::Quota) => Some(Err(Broken)),
        })
    }
}
