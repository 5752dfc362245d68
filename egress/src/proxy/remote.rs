//! The remote MCP servers of a run: named in its request, each with what opens it, which only this process has.
//! The cage knows them as `sN.mcp.invalid`; a server's own headers must never be shown to it, nor sent anywhere else.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use gaoler_protocol::REMOTES_BYTES_MAX;
use gaoler_sys::memfd;
use hyper::body::Incoming;
use hyper::header::{HOST, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Response, Uri};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use tokio_rustls::TlsConnector;
use zeroize::{Zeroize, Zeroizing};

use super::TLS_PORT;
use super::flow::Metered;
use super::forward::{self, HTTP_PORT};
use super::host::{Destination, Host, List};
use super::refused::Refused;
use crate::answer::Answer;

/// Servers of one run.
const SERVERS_MAX: usize = 32;
/// Headers of one server.
const HEADERS_MAX: usize = 32;
/// The domain of the names that a cage has for them (RFC 6761: it resolves nowhere).
const DOMAIN: &str = ".mcp.invalid";

/// A line of the list, as the frontend writes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    secure: bool,
    authority: String,
    headers: Vec<(String, String)>,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.headers.iter_mut().for_each(|(_, value)| value.zeroize());
    }
}

/// One server.
pub struct Remote {
    /// Where it is.
    pub to: Destination,
    /// It may have any address: the operator's word.
    pub internal: bool,
    secure: bool,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// Those of a run.
#[derive(Default)]
pub struct Remotes(Vec<Remote>);

impl Remotes {
    /// Reads them from a sealed memory file. `None` where that is not one, or names what no run may reach: anything in
    /// the clear or on another port than that of TLS, unless the operator named it.
    pub fn read(fd: OwnedFd, list: &List) -> Option<Remotes> {
        let bytes = Zeroizing::new(memfd::read(fd, REMOTES_BYTES_MAX).ok()?);
        let lines: Vec<Line> = serde_json::from_slice(&bytes).ok()?;
        let read = lines.iter().map(|line| Remote::of(line, list)).collect::<Option<Vec<_>>>()?;
        (read.len() <= SERVERS_MAX).then_some(Remotes(read))
    }

    /// The server that a cage means by this host.
    pub fn of(&self, host: &Host) -> Option<&Remote> {
        let Host::Name(name) = host else { return None };
        let number = name.strip_suffix(DOMAIN)?.strip_prefix('s')?;
        let plain = number == "0" || !number.starts_with('0');
        self.0.get(number.parse::<usize>().ok().filter(|_| plain)?)
    }
}

impl Remote {
    fn of(line: &Line, list: &List) -> Option<Remote> {
        let default = if line.secure { TLS_PORT } else { HTTP_PORT };
        let to = Destination::parse(&line.authority, Some(default))?;
        let internal = list.is_internal(&to);
        let header = |(name, value): &(String, String)| {
            let name: HeaderName = name.parse().ok()?;
            let mut value = HeaderValue::from_str(value).ok()?;
            value.set_sensitive(true);
            (name != HOST && !forward::is_hop(&name)).then_some((name, value))
        };
        let headers = line.headers.iter().map(header).collect::<Option<Vec<_>>>()?;
        let allowed = internal || (line.secure && to.port == TLS_PORT);
        (allowed && headers.len() <= HEADERS_MAX).then_some(Remote {
            to,
            internal,
            secure: line.secure,
            headers,
        })
    }

    /// Sends a request of the cage's over this connection, with what opens the server in place of whatever the cage
    /// said of that.
    ///
    /// # Errors
    /// Where the server does not do its part.
    pub async fn forward(
        &self,
        head: Parts,
        body: Incoming,
        server: Metered,
        tls: &Arc<ClientConfig>,
    ) -> Result<Response<Answer>, Refused> {
        let default = if self.secure { TLS_PORT } else { HTTP_PORT };
        let mut request = forward::outgoing(head, body, &self.to, default)?;
        for (name, value) in &self.headers {
            request.headers_mut().insert(name.clone(), value.clone());
        }
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = path.map_or(Uri::from_static("/"), Uri::from);
        if !self.secure {
            return forward::send(request, server).await;
        }
        let name = match &self.to.host {
            Host::Name(name) => ServerName::try_from(name.clone()).map_err(|_| Refused::Spelling)?,
            Host::Address(address) => ServerName::from(*address),
        };
        let connector = TlsConnector::from(tls.clone());
        let stream = connector.connect(name, server).await.map_err(|_| Refused::Server)?;
        forward::send(request, stream).await
    }
}
