//! Plain HTTP: one request to its destination and the answer back, each written anew.
//! It must never pass on what is meant for the proxy, nor follow where an answer points.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;

use super::TLS_PORT;
use super::flow::Metered;
use super::host::Destination;
use super::refused::Refused;
use crate::answer::{Answer, Broken};

/// The port that goes without saying.
pub const HTTP_PORT: u16 = 80;
/// Bytes of an answer's head.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Headers between two neighbours (RFC 9110, 7.6.1), beside those that `Connection` names and all of `Proxy-`.
const HOP: [HeaderName; 6] = [CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, EXPECT];
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// Where a request in absolute form goes.
///
/// # Errors
/// What is not one, or says two things.
pub fn destination(head: &Parts) -> Result<Destination, Refused> {
    let (Some("http"), Some(authority)) = (head.uri.scheme_str(), head.uri.authority()) else {
        return Err(Refused::Shape);
    };
    let to = Destination::parse(authority.as_str(), Some(HTTP_PORT)).ok_or(Refused::Spelling)?;
    // There the name that TLS asks for is looked at, and nothing else begins.
    if to.port == TLS_PORT {
        return Err(Refused::Shape);
    }
    match says_the_same(&head.headers, &to, HTTP_PORT) {
        true => Ok(to),
        false => Err(Refused::Shape),
    }
}

/// Where a tunnel is to go.
///
/// # Errors
/// What is more than a host and a port, says two things, or brings a body, which a tunnel has no place for.
pub fn tunnel(head: &Parts) -> Result<Destination, Refused> {
    let authority = head.uri.authority().ok_or(Refused::Spelling)?;
    // hyper takes a whole URL there too.
    if head.uri.scheme().is_some() || head.uri.path_and_query().is_some() {
        return Err(Refused::Spelling);
    }
    let to = Destination::parse(authority.as_str(), None).ok_or(Refused::Spelling)?;
    let has_body = head.headers.contains_key(TRANSFER_ENCODING)
        || head.headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0");
    // Some clients leave out a port that goes without saying to them.
    match says_the_same(&head.headers, &to, to.port) && !has_body {
        true => Ok(to),
        false => Err(Refused::Shape),
    }
}

/// Whether a Host header, if there is one, names the destination, in the same spelling.
fn says_the_same(headers: &HeaderMap, to: &Destination, default: u16) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let same = |host: &HeaderValue| {
        let host = host.to_str().ok().and_then(|text| Destination::parse(text, Some(default)));
        host.as_ref() == Some(to)
    };
    hosts.next().is_none_or(same) && hosts.next().is_none()
}

/// Sends a request over this connection.
///
/// # Errors
/// Where the server does not do its part.
pub async fn forward(
    head: Parts,
    body: Incoming,
    to: &Destination,
    server: Metered,
) -> Result<Response<Answer>, Refused> {
    send(outgoing(head, body, to, HTTP_PORT)?, server).await
}

/// Sends a request that is written anew, over whatever leads to its server.
///
/// # Errors
/// Where the server does not do its part.
pub async fn send(
    request: Request<Incoming>,
    server: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<Response<Answer>, Refused> {
    let mut builder = http1::Builder::new();
    builder.max_buf_size(HEAD_BYTES_MAX);
    let (mut sender, connection) =
        builder.handshake(TokioIo::new(server)).await.map_err(|_| Refused::Server)?;
    let driver = Driver(tokio::spawn(async move {
        // Its errors come out at the request and at the answer's body.
        let _ = connection.await;
    }));
    let response = sender.send_request(request).await.map_err(|_| Refused::Server)?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Refused::Server);
    }
    let (mut head, body) = response.into_parts();
    head.version = Version::HTTP_11;
    head.extensions.clear();
    strip(&mut head.headers);
    Ok(Response::from_parts(head, Returned { body, _driver: driver }.boxed_unsync()))
}

/// The request as the server gets it; its port goes without saying where it is `default`.
///
/// # Errors
/// A host that no header can hold.
pub fn outgoing(
    head: Parts,
    body: Incoming,
    to: &Destination,
    default: u16,
) -> Result<Request<Incoming>, Refused> {
    let path = head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    let mut headers = head.headers;
    strip(&mut headers);
    // The framing is hyper's to write, after the body that it has read.
    headers.remove(CONTENT_LENGTH);
    let host = match to.port {
        port if port == default => to.host.to_string(),
        port => format!("{}:{port}", to.host),
    };
    headers.insert(HOST, HeaderValue::from_str(&host).map_err(|_| Refused::Spelling)?);
    let mut request = Request::new(body);
    *request.method_mut() = head.method;
    *request.uri_mut() = Uri::from(path);
    *request.headers_mut() = headers;
    Ok(request)
}

/// Whether a header is between two neighbours, and so nobody's to choose.
pub fn is_hop(name: &HeaderName) -> bool {
    HOP.contains(name)
        || *name == CONTENT_LENGTH
        || *name == KEEP_ALIVE
        || name.as_str().starts_with("proxy-")
}

/// Takes away what is for the next neighbour only.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let proxys = headers.keys().filter(|name| name.as_str().starts_with("proxy-")).cloned();
    let proxys: Vec<HeaderName> = proxys.collect();
    let all = named.into_iter().chain(proxys).chain(HOP).chain([KEEP_ALIVE]);
    // The framing of an answer is not a neighbour's to take away.
    all.filter(|name| *name != CONTENT_LENGTH).for_each(|name| drop(headers.remove(name)));
}

/// The task that moves a connection's bytes; it ends with whoever waits for them.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An answer's body on its way back.
struct Returned {
    body: Incoming,
    _driver: Driver,
}

impl Body for Returned {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        Pin::new(&mut self.body).poll_frame(context).map_err(|_| Broken)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
