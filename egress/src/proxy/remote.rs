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
    headers: Headers,
    /// It is the host of a repository.
    #[serde(default)]
    git: bool,
    /// The operator's token for it.
    #[serde(default)]
    sealed: String,
    /// The headers that were kept for a session of the tenant's.
    #[serde(default)]
    kept: String,
}

/// What opens sealed texts, and whose run this is.
pub type Opener<'a> = (Option<&'a Vault>, &'a [u8; 16]);

/// Headers, wiped when dropped.
#[derive(Default, Deserialize)]
#[serde(transparent)]
struct Headers(Vec<(String, String)>);

impl Drop for Headers {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(|(_, value)| value.zeroize());
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
    pub fn read(fd: OwnedFd, list: &List, opener: Opener<'_>) -> Option<Remotes> {
        let bytes = Zeroizing::new(memfd::read(fd, REMOTES_BYTES_MAX).ok()?);
        let lines: Vec<Line> = serde_json::from_slice(&bytes).ok()?;
        let read = lines.iter().map(|line| Remote::of(line, list, opener)).collect::<Option<Vec<_>>>()?;
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
        let token = opened.strip_prefix(self.origin().as_bytes())?;
        let mut value = HeaderValue::from_bytes(&Zeroizing::new([b"Bearer ", token].concat())).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// The session's headers, where they were sealed for this tenant and this very place.
    fn kept(&self, vault: &Vault, tenant: &[u8; 16]) -> Option<Headers> {
        let opened = vault.open_servers(tenant, &STANDARD.decode(&self.kept).ok()?)?;
        let text = opened.strip_prefix(self.origin().as_bytes())?;
        serde_json::from_slice(text).ok()
    }

    /// What a sealed text begins with that is for this place.
    fn origin(&self) -> String {
        format!("{}://{}\n", if self.secure { "https" } else { "http" }, self.authority)
    }
}

impl Remote {
    fn of(line: &Line, list: &List, (vault, tenant): Opener<'_>) -> Option<Remote> {
        let default = if line.secure { TLS_PORT } else { HTTP_PORT };
        let to = Destination::parse(&line.authority, Some(default))?;
        let internal = list.is_internal(&to);
        let header = |(name, value): &(String, String)| {
            let name: HeaderName = name.parse().ok()?;
            let mut value = HeaderValue::from_str(value).ok()?;
            value.set_sensitive(true);
            (name != HOST && !forward::is_hop(&name)).then_some((name, value))
        };
        let kept = if line.kept.is_empty() { Headers::default() } else { line.kept(vault?, tenant)? };
        let said = line.headers.0.iter().chain(&kept.0);
        let mut headers = said.map(header).collect::<Option<Vec<_>>>()?;
        let many = headers.len();
        if !line.sealed.is_empty() {
            headers.push((AUTHORIZATION, line.offered(vault?)?));
        }
        let allowed = internal || (line.secure && to.port == TLS_PORT);
        (allowed && many <= HEADERS_MAX).then_some(Remote {
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
            let authority = authority.into();
            let (headers, kept) = (Headers(headers), String::new());
            let line = Line { secure: true, authority, headers, git: false, sealed, kept };
            Remote::of(&line, &list, (vault, &[1; 16])).map(|remote| remote.headers)
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

    #[test]
    fn a_sessions_headers_open_the_place_and_the_tenant_that_they_were_sealed_for_and_no_other() {
        let (vault, other) = (Vault::draw(), Vault::draw());
        let public = vault.public().expect("a key");
        let list = List::new(&BALANCED.proxy, "").expect("a list");
        let sealed = |tenant: &[u8; 16], text: &str| {
            STANDARD.encode(gaoler_seal::seal_servers(&public, tenant, text.as_bytes()).expect("sealed"))
        };
        let of = |secure: bool, authority: &str, kept: &str, opener: Opener<'_>| {
            let line = Line {
                secure,
                authority: authority.into(),
                headers: Headers::default(),
                git: false,
                sealed: String::new(),
                kept: kept.into(),
            };
            let remote = Remote::of(&line, &list, opener)?;
            Some(remote.headers.iter().map(|(name, value)| format!("{name}: {value:?}")).collect::<Vec<_>>())
        };
        let good =
            sealed(&[1; 16], "https://a.example:443\n[[\"authorization\",\"Bearer x\"],[\"x-a\",\"b\"]]");
        let ours = (Some(&vault), &[1; 16]);
        let headers = of(true, "a.example:443", &good, ours).expect("a server");
        assert_eq!(headers, ["authorization: Sensitive", "x-a: Sensitive"], "both, and neither is shown");
        assert!(of(true, "b.example:443", &good, ours).is_none(), "another place");
        assert!(of(false, "a.example:443", &good, ours).is_none(), "in the clear");
        assert!(of(true, "a.example:443", &good, (Some(&vault), &[2; 16])).is_none(), "another tenant's run");
        assert!(of(true, "a.example:443", &good, (Some(&other), &[1; 16])).is_none(), "another key");
        assert!(of(true, "a.example:443", &good, (None, &[1; 16])).is_none(), "no key");
        assert!(of(true, "a.example:443", "!", ours).is_none(), "no seal");
        for text in ["https://a.example:443\n", "https://a.example:443\n[[\"host\",\"b\"]]", "[]"] {
            assert!(of(true, "a.example:443", &sealed(&[1; 16], text), ours).is_none(), "{text}");
        }
        let many: Vec<_> = (0..=HEADERS_MAX).map(|n| (format!("x-{n}"), "v")).collect();
        let many = format!("https://a.example:443\n{}", serde_json::to_string(&many).expect("JSON"));
        assert!(of(true, "a.example:443", &sealed(&[1; 16], &many), ours).is_none(), "too many");
    }
}
