//! How the proxy says no: a status, an error's name as in RFC 9209, and one sentence of text.
//! It must never hold a byte of the request.

use bytes::Bytes;
use gaoler_protocol::Denial;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, PROXY_AUTHENTICATE};
use hyper::{Response, StatusCode};

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Why something does not go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The request has no placeholder, and the listener is not the cage's alone.
    Unnamed,
    /// It has a wrong one.
    Stranger,
    /// It is no request that a proxy answers.
    Shape,
    /// Its head can be read in more than one way.
    Framing,
    /// Its head is larger than the level allows.
    Head,
    /// Its destination is spelt oddly.
    Spelling,
    /// Neither the level nor the operator names its destination.
    Host,
    /// What opens the server is not there for this path, or this method.
    Place,
    /// The answer held what opens the server.
    Echo,
    /// The destination's address is not public.
    Address,
    /// The run has used up its bytes.
    Bytes,
    /// All connections of the run are in use.
    Connections,
    /// The name does not resolve.
    Name,
    /// Nobody answers there in time.
    Silent,
    /// The connection was refused, or is not possible.
    Unreachable,
    /// The server answers what no proxy can pass on.
    Server,
}

impl Refused {
    /// What is counted, where it is a denial and not a failure. Who shows nothing is only asked to: clients do that
    /// to learn how.
    pub fn denial(self) -> Option<Denial> {
        match self {
            Refused::Stranger => Some(Denial::Placeholder),
            Refused::Shape | Refused::Framing | Refused::Head => Some(Denial::Path),
            Refused::Place => Some(Denial::Path),
            Refused::Echo => Some(Denial::Body),
            Refused::Spelling | Refused::Host => Some(Denial::Host),
            Refused::Address => Some(Denial::Address),
            Refused::Bytes | Refused::Connections => Some(Denial::Quota),
            Refused::Unnamed | Refused::Name | Refused::Silent | Refused::Unreachable | Refused::Server => {
                None
            }
        }
    }

    /// The answer.
    pub fn response(self) -> Response<Bytes> {
        let (status, error, text) = self.words();
        let mut response = Response::new(Bytes::from_static(text.as_bytes()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, TEXT);
        headers.insert(PROXY_STATUS, HeaderValue::from_static(error));
        if status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            headers.insert(PROXY_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"gaoler\""));
        }
        response
    }

    fn words(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Refused::Unnamed | Refused::Stranger => (
                StatusCode::PROXY_AUTHENTICATION_REQUIRED,
                "gaoler; error=http_request_denied",
                "gaoler: the proxy's user and password are those of its URL in the run's environment\n",
            ),
            Refused::Shape => (
                StatusCode::BAD_REQUEST,
                "gaoler; error=http_request_error",
                "gaoler: this is a proxy: it takes CONNECT HOST:PORT, and http:// with a Host header that says the same\n",
            ),
            Refused::Framing => (
                StatusCode::BAD_REQUEST,
                "gaoler; error=http_request_error",
                "gaoler: the head can be read in more than one way: lines end with CRLF, and a host, a length, a coding and a password come once\n",
            ),
            Refused::Head => (
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "gaoler; error=http_request_error",
                "gaoler: the head is larger than the level allows\n",
            ),
            Refused::Spelling => (
                StatusCode::BAD_REQUEST,
                "gaoler; error=http_request_error",
                "gaoler: the destination must be a full name in lower case without a dot at its end, or a plain address, and a port\n",
            ),
            Refused::Host => (
                StatusCode::FORBIDDEN,
                "gaoler; error=http_request_denied",
                "gaoler: the level of this run does not name this host and port; the operator may add it to level.hosts\n",
            ),
            Refused::Place => (
                StatusCode::FORBIDDEN,
                "gaoler; error=http_request_denied",
                "gaoler: what opens this server is for its own URL alone, by GET, POST and DELETE, or for fetching its one repository\n",
            ),
            Refused::Echo => (
                StatusCode::BAD_GATEWAY,
                "gaoler; error=http_protocol_error",
                "gaoler: the server's answer held what opens it\n",
            ),
            Refused::Address => (
                StatusCode::FORBIDDEN,
                "gaoler; error=destination_ip_prohibited",
                "gaoler: this host's address is not one of the public internet\n",
            ),
            Refused::Bytes => (
                StatusCode::TOO_MANY_REQUESTS,
                "gaoler; error=http_request_denied",
                "gaoler: this run has moved all its bytes\n",
            ),
            Refused::Connections => (
                StatusCode::TOO_MANY_REQUESTS,
                "gaoler; error=connection_limit_reached",
                "gaoler: this run has all its connections open\n",
            ),
            Refused::Name => (
                StatusCode::BAD_GATEWAY,
                "gaoler; error=dns_error",
                "gaoler: the host's name does not resolve\n",
            ),
            Refused::Silent => (
                StatusCode::GATEWAY_TIMEOUT,
                "gaoler; error=connection_timeout",
                "gaoler: the host does not answer\n",
            ),
            Refused::Unreachable => (
                StatusCode::BAD_GATEWAY,
                "gaoler; error=connection_refused",
                "gaoler: the host cannot be reached\n",
            ),
            Refused::Server => (
                StatusCode::BAD_GATEWAY,
                "gaoler; error=http_protocol_error",
                "gaoler: the host's answer cannot be passed on\n",
            ),
        }
    }
}
