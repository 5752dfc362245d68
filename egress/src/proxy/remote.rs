//! The servers that a run's request names, each with what opens it, which only this process has: MCP servers, which the
//! cage knows as `sN.mcp.invalid`, and the host of a repository to clone, as `sN.git.invalid`.
//! A server's own headers must never be shown to the cage, nor sent anywhere else.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gaoler_protocol::REMOTES_BYTES_MAX;
use gaoler_seal::{OFFERED, Vault};
use gaoler_sys::memfd;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HOST, HeaderName, HeaderValue, LOCATION};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{Response, Uri};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
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
/// The domains of the names that a cage has for them (RFC 6761: they resolve nowhere).
const MCP_DOMAIN: &str = ".mcp.invalid";
const GIT_DOMAIN: &str = ".git.invalid";

/// A line of the list, as the frontend writes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    secure: bool,
    authority: String,
    headers: Vec<(String, String)>,
    /// It is the host of a repository.
    #[serde(default)]
    git: bool,
    /// The operator's token for it.
    #[serde(default)]
    sealed: String,
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
    git: bool,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// Those of a run.
#[derive(Default)]
pub struct Remotes(Vec<Remote>);

impl Remotes {
    /// Reads them from a sealed memory file. `None` where that is not one, or names what no run may reach: anything in
    /// the clear or on another port than that of TLS, unless the operator named it.
    pub fn read(fd: OwnedFd, list: &List, vault: Option<&Vault>) -> Option<Remotes> {
        let bytes = Zeroizing::new(memfd::read(fd, REMOTES_BYTES_MAX).ok()?);
        let lines: Vec<Line> = serde_json::from_slice(&bytes).ok()?;
        let read = lines.iter().map(|line| Remote::of(line, list, vault)).collect::<Option<Vec<_>>>()?;
        (read.len() <= SERVERS_MAX).then_some(Remotes(read))
    }

    /// The server that a cage means by this host.
    pub fn of(&self, host: &Host) -> Option<&Remote> {
        let Host::Name(name) = host else { return None };
        let git = name.ends_with(GIT_DOMAIN);
        let number = name.strip_suffix(if git { GIT_DOMAIN } else { MCP_DOMAIN })?.strip_prefix('s')?;
        let plain = number == "0" || !number.starts_with('0');
        let found = self.0.get(number.parse::<usize>().ok().filter(|_| plain)?)?;
        (found.git == git).then_some(found)
    }
}

impl Line {
    /// The operator's token, where it was sealed for this very place.
    fn offered(&self, vault: &Vault) -> Option<HeaderValue> {
        let opened = vault.open(&OFFERED, &STANDARD.decode(&self.sealed).ok()?)?;
        let origin = format!("{}://{}\n", if self.secure { "https" } else { "http" }, self.authority);
        let token = opened.strip_prefix(origin.as_bytes())?;
        let mut value = HeaderValue::from_bytes(&Zeroizing::new([b"Bearer ", token].concat())).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl Remote {
    fn of(line: &Line, list: &List, vault: Option<&Vault>) -> Option<Remote> {
        let default = if line.secure { TLS_PORT } else { HTTP_PORT };
        let to = Destination::parse(&line.authority, Some(default))?;
        let internal = list.is_internal(&to);
        let header = |(name, value): &(String, String)| {
            let name: HeaderName = name.parse().ok()?;
            let mut value = HeaderValue::from_str(value).ok()?;
            value.set_sensitive(true);
            (name != HOST && !forward::is_hop(&name)).then_some((name, value))
        };
        let mut headers = line.headers.iter().map(header).collect::<Option<Vec<_>>>()?;
        if !line.sealed.is_empty() {
            headers.push((AUTHORIZATION, line.offered(vault?)?));
        }
        let allowed = internal || (line.secure && to.port == TLS_PORT);
        (allowed && line.headers.len() <= HEADERS_MAX).then_some(Remote {
            to,
            internal,
            secure: line.secure,
            git: line.git,
            headers,
        })
    }

    /// Whether a run may go there. An MCP server is the request's own choice; a repository's host is one for the level's
    /// list, as without a token.
    pub fn is_allowed(&self, list: &List) -> bool {
        !self.git || self.internal || list.names(&self.to)
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
        let asked = head.uri.authority().map(ToString::to_string);
        let mut request = forward::outgoing(head, body, &self.to, default)?;
        for (name, value) in &self.headers {
            request.headers_mut().insert(name.clone(), value.clone());
        }
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = path.map_or(Uri::from_static("/"), Uri::from);
        let mut response = match self.secure {
            false => forward::send(request, server).await?,
            true => forward::send(request, self.over_tls(server, tls).await?).await?,
        };
        let location = response.headers().get(LOCATION);
        if let Some(within) = location.zip(asked).and_then(|(to, asked)| self.within(to, &asked)) {
            response.headers_mut().insert(LOCATION, within);
        }
        Ok(response)
    }

    async fn over_tls(
        &self,
        server: Metered,
        tls: &Arc<ClientConfig>,
    ) -> Result<TlsStream<Metered>, Refused> {
        let name = match &self.to.host {
            Host::Name(name) => ServerName::try_from(name.clone()).map_err(|_| Refused::Spelling)?,
            Host::Address(address) => ServerName::from(*address),
        };
        let connector = TlsConnector::from(tls.clone());
        connector.connect(name, server).await.map_err(|_| Refused::Server)
    }

    /// Where a repository's host points to a place of its own, in the cage's words: past that name the cage has nothing
    /// that opens it. A place of another host stays what it is, and nothing is added on the way there.
    fn within(&self, location: &HeaderValue, asked: &str) -> Option<HeaderValue> {
        let uri: Uri = location.to_str().ok()?.parse().ok()?;
        let (scheme, default) = if self.secure { ("https", TLS_PORT) } else { ("http", HTTP_PORT) };
        let to = Destination::parse(uri.authority()?.as_str(), Some(default))?;
        let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
        let own = self.git && uri.scheme_str() == Some(scheme) && to == self.to;
        HeaderValue::from_str(&format!("http://{asked}{path}")).ok().filter(|_| own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::BALANCED;

    #[test]
    fn a_token_of_the_catalogue_opens_the_place_that_it_was_sealed_for_and_no_other() {
        let (vault, other) = (Vault::draw(), Vault::draw());
        let public = vault.public().expect("a key");
        let list = List::new(&BALANCED.proxy, "").expect("a list");
        let sealed = |tenant: &[u8; 16]| {
            let sealed = gaoler_seal::seal(&public, tenant, b"https://a.example:443\nthe-token");
            STANDARD.encode(sealed.expect("sealed"))
        };
        let of = |authority: &str, sealed: String, vault: Option<&Vault>| {
            let headers = vec![("authorization".into(), "Bearer of-the-request".into())];
            let line = Line { secure: true, authority: authority.into(), headers, git: false, sealed };
            Remote::of(&line, &list, vault).map(|remote| remote.headers)
        };
        let headers = of("a.example:443", sealed(&OFFERED), Some(&vault)).expect("a server");
        assert_eq!(
            headers.last().map(|(name, value)| (name, value.as_bytes())),
            Some((&AUTHORIZATION, &b"Bearer the-token"[..]))
        );
        assert!(of("b.example:443", sealed(&OFFERED), Some(&vault)).is_none(), "another place");
        assert!(of("a.example:443", sealed(&[1; 16]), Some(&vault)).is_none(), "a tenant's");
        assert!(of("a.example:443", sealed(&OFFERED), Some(&other)).is_none(), "another key");
        assert!(of("a.example:443", sealed(&OFFERED), None).is_none(), "no key");
        assert!(of("a.example:443", "!".into(), Some(&vault)).is_none(), "no seal");
        assert_eq!(of("a.example:443", String::new(), None).map(|headers| headers.len()), Some(1));
    }
}
