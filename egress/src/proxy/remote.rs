//! The servers that a run's request names, each with what opens it, which only this process has: MCP servers, which the
//! cage knows as `sN.mcp.invalid`, and the host of a repository to clone, as `sN.git.invalid`.
//! A server's own headers must never be shown to the cage, nor sent anywhere else, nor for anything else than they are there
//! for: the requests of one MCP server, or those that fetch one repository.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gaoler_protocol::REMOTES_BYTES_MAX;
use gaoler_seal::{OFFERED, Vault};
use gaoler_sys::memfd;
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, ACCEPT_LANGUAGE, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HOST, HeaderMap,
    HeaderName, HeaderValue, IF_RANGE, LOCATION, RANGE, USER_AGENT,
};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Response, Uri};
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
use super::search::{Announced, Needles, Search};
use crate::answer::Answer;
use crate::tally::Tally;

/// Servers of one run.
const SERVERS_MAX: usize = 32;
/// Headers of one server.
const HEADERS_MAX: usize = 32;
/// Headers of a request that hold no secret, whatever a client sets them to.
const PLAIN: [HeaderName; 4] = [ACCEPT, ACCEPT_LANGUAGE, CONTENT_TYPE, USER_AGENT];
/// What git asks for when it fetches, below a repository's path (gitprotocol-http(5)); what it asks for when it pushes is not
/// among it.
const GIT_NAMES: &str = "/info/refs?service=git-upload-pack";
const GIT_PACK: &str = "/git-upload-pack";
/// The domains of the names that a cage has for them (RFC 6761: they resolve nowhere).
const MCP_DOMAIN: &str = ".mcp.invalid";
const GIT_DOMAIN: &str = ".git.invalid";

/// A line of the list, as the frontend writes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    secure: bool,
    authority: String,
    /// The path and query of the MCP server, or the repository's path.
    #[serde(default)]
    path: String,
    /// It is an MCP server of the older kind, which names a second place for what it is asked.
    #[serde(default)]
    sse: bool,
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
    sse: bool,
    path: String,
    headers: Vec<(HeaderName, HeaderValue)>,
    /// What no answer may hold.
    needles: Needles,
    /// Places that the server itself has named.
    announced: Arc<Announced>,
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
        let token = opened.strip_prefix(self.place().as_bytes())?;
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

    /// What a token of the operator's begins with that is for this server: the host alone is not what it opens.
    fn place(&self) -> String {
        format!("{}{}\n", self.origin().trim_end(), self.path)
    }

    /// What a session's headers begin with that are for this host.
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
        let secrets = headers.iter().filter(|(name, _)| !PLAIN.contains(name));
        let needles = Needles::new(secrets.map(|(_, value)| value.as_bytes()));
        (allowed && many <= HEADERS_MAX).then_some(Remote {
            to,
            internal,
            secure: line.secure,
            git: line.git,
            sse: line.sse,
            path: line.path.clone(),
            headers,
            needles,
            announced: Arc::default(),
        })
    }

    /// Whether a request is what its headers are there for. Of an MCP server that nothing opens the cage may ask what it
    /// likes: clients look there for how they could be let in.
    pub fn permits(&self, head: &Parts) -> bool {
        let asked = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
        let below = |end: &str| asked.strip_suffix(end).is_some_and(|base| self.is_repository(base));
        match (self.git, &head.method) {
            (true, &Method::GET) => below(GIT_NAMES),
            (true, &Method::POST) => below(GIT_PACK),
            (true, _) => false,
            (false, _) if self.headers.is_empty() => true,
            (false, &Method::GET | &Method::POST | &Method::DELETE) if asked == self.path => true,
            (false, &Method::POST) => self.announced.contains(asked),
            (false, _) => false,
        }
    }

    /// Whether this is the repository's path, or one that its host has led to from there.
    fn is_repository(&self, base: &str) -> bool {
        base == self.path.trim_end_matches('/') || self.announced.contains(base)
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
        tally: &Arc<Tally>,
    ) -> Result<Response<Answer>, Refused> {
        let default = if self.secure { TLS_PORT } else { HTTP_PORT };
        let asked = head.uri.authority().map(ToString::to_string);
        let mut request = forward::outgoing(head, body, &self.to, default)?;
        if !self.needles.is_empty() {
            // An answer must be readable for the search, and whole.
            let headers = request.headers_mut();
            [RANGE, IF_RANGE].into_iter().for_each(|name| drop(headers.remove(name)));
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
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
        if let Some(path) = location.and_then(|to| self.within(to)) {
            if let Some(base) = path.strip_suffix(GIT_NAMES) {
                self.announced.add(base);
            }
            let within = asked.and_then(|asked| HeaderValue::from_str(&format!("http://{asked}{path}")).ok());
            within.map(|within| response.headers_mut().insert(LOCATION, within));
        }
        self.searched(response, tally)
    }

    /// The answer, if its head does not hold what opens the server; its body ends where that comes.
    fn searched(&self, response: Response<Answer>, tally: &Arc<Tally>) -> Result<Response<Answer>, Refused> {
        let headers: &HeaderMap = response.headers();
        if headers.values().any(|value| self.needles.are_in(value.as_bytes())) {
            return Err(Refused::Echo);
        }
        if !self.needles.is_empty() && headers.get(CONTENT_ENCODING).is_some_and(|it| it != "identity") {
            return Err(Refused::Server);
        }
        let is_stream =
            headers.get(CONTENT_TYPE).is_some_and(|it| it.as_bytes().starts_with(b"text/event-stream"));
        let announced = (self.sse && is_stream).then(|| (self.announced.clone(), self.path.clone()));
        if self.needles.is_empty() && announced.is_none() {
            return Ok(response);
        }
        Ok(response.map(|body| Search::of(body, &self.needles, announced, tally.clone())))
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

    /// Where a repository's host points to a place of its own, which is then said in the cage's words: past that name the
    /// cage has nothing that opens it. A place of another host stays what it is, and nothing is added on the way there.
    fn within(&self, location: &HeaderValue) -> Option<String> {
        let uri: Uri = location.to_str().ok()?.parse().ok()?;
        let (scheme, default) = if self.secure { ("https", TLS_PORT) } else { ("http", HTTP_PORT) };
        let path = uri.path_and_query().map_or("/", PathAndQuery::as_str).to_owned();
        let own = match uri.authority() {
            None => path.starts_with('/'),
            Some(authority) => {
                let to = Destination::parse(&authority.as_str().to_ascii_lowercase(), Some(default));
                uri.scheme_str() == Some(scheme) && to.as_ref() == Some(&self.to)
            }
        };
        (self.git && own).then_some(path)
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
            let sealed = gaoler_seal::seal(&public, tenant, b"https://a.example:443/mcp\nthe-token");
            STANDARD.encode(sealed.expect("sealed"))
        };
        let at = |path: &str, authority: &str, sealed: String, vault: Option<&Vault>| {
            let headers = vec![("authorization".into(), "Bearer of-the-request".into())];
            let (path, authority) = (path.into(), authority.into());
            let (headers, kept) = (Headers(headers), String::new());
            let line = Line { secure: true, authority, path, sse: false, headers, git: false, sealed, kept };
            Remote::of(&line, &list, (vault, &[1; 16])).map(|remote| remote.headers)
        };
        let of = |authority: &str, sealed, vault| at("/mcp", authority, sealed, vault);
        let headers = of("a.example:443", sealed(&OFFERED), Some(&vault)).expect("a server");
        assert_eq!(
            headers.last().map(|(name, value)| (name, value.as_bytes())),
            Some((&AUTHORIZATION, &b"Bearer the-token"[..]))
        );
        assert!(of("b.example:443", sealed(&OFFERED), Some(&vault)).is_none(), "another place");
        for path in ["", "/", "/mc", "/mcp/", "/mcp?a", "/mcp\n", "/other"] {
            assert!(
                at(path, "a.example:443", sealed(&OFFERED), Some(&vault)).is_none(),
                "another path: {path}"
            );
        }
        assert!(of("a.example:443", sealed(&[1; 16]), Some(&vault)).is_none(), "a tenant's");
        assert!(of("a.example:443", sealed(&OFFERED), Some(&other)).is_none(), "another key");
        assert!(of("a.example:443", sealed(&OFFERED), None).is_none(), "no key");
        assert!(of("a.example:443", "!".into(), Some(&vault)).is_none(), "no seal");
        assert_eq!(of("a.example:443", String::new(), None).map(|headers| headers.len()), Some(1));
    }

    #[test]
    fn r10_what_opens_a_server_is_for_its_own_requests_alone() {
        let list = List::new(&BALANCED.proxy, "").expect("a list");
        let remote = |path: &str, git: bool, headers: &[(&str, &str)]| {
            let headers = Headers(headers.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect());
            let (authority, path) = ("a.example:443".into(), path.into());
            let (sealed, kept) = (String::new(), String::new());
            let line = Line { secure: true, authority, path, sse: true, headers, git, sealed, kept };
            Remote::of(&line, &list, (None, &[1; 16])).expect("a server")
        };
        let check = |remote: &Remote, method: &str, path: &str, expected: bool| {
            let request =
                hyper::Request::builder().method(method).uri(format!("http://s0.mcp.invalid{path}"));
            let head = request.body(()).expect("a request").into_parts().0;
            assert_eq!(remote.permits(&head), expected, "{method} {path}");
        };
        let opened = remote("/mcp?team=1", false, &[("authorization", "Bearer x")]);
        for method in ["GET", "POST", "DELETE"] {
            check(&opened, method, "/mcp?team=1", true);
            for path in [
                "",
                "/",
                "/mcp",
                "/mcp?team=2",
                "/mcp?team=1&x",
                "/mcp/?team=1",
                "/mcp/x?team=1",
                "//mcp?team=1",
                "/./mcp?team=1",
                "/x/../mcp?team=1",
                "/%6dcp?team=1",
                "/MCP?team=1",
                "/admin",
                "/messages",
            ] {
                check(&opened, method, path, false);
            }
        }
        for method in ["PUT", "PATCH", "HEAD", "OPTIONS", "POSt", "X"] {
            check(&opened, method, "/mcp?team=1", false);
        }
        // A second place of the server's own naming is asked, and nothing else is done there.
        opened.announced.add("/messages?id=7");
        check(&opened, "POST", "/messages?id=7", true);
        check(&opened, "GET", "/messages?id=7", false);
        check(&opened, "POST", "/messages?id=8", false);
        check(&opened, "POST", "/messages", false);
        // Without a path, nothing; and without anything that opens it, everything.
        check(&remote("", false, &[("x-key", "k")]), "GET", "/", false);
        check(&remote("/mcp", false, &[]), "GET", "/.well-known/oauth-protected-resource", true);

        for headers in [&[][..], &[("authorization", "Basic eDp5")]] {
            let repository = remote("/a/b.git", true, headers);
            check(&repository, "GET", "/a/b.git/info/refs?service=git-upload-pack", true);
            check(&repository, "POST", "/a/b.git/git-upload-pack", true);
            for (method, path) in [
                ("GET", "/a/b.git/info/refs?service=git-receive-pack"),
                ("GET", "/a/b.git/info/refs"),
                ("POST", "/a/b.git/info/refs?service=git-upload-pack"),
                ("POST", "/a/b.git/git-receive-pack"),
                ("GET", "/a/b.git/git-upload-pack"),
                ("POST", "/a/b.git/git-upload-pack?x"),
                ("GET", "/a/other.git/info/refs?service=git-upload-pack"),
                ("POST", "/a/other.git/git-upload-pack"),
                ("GET", "/a/b.git/../c.git/info/refs?service=git-upload-pack"),
                ("GET", "/a/b.git"),
                ("GET", "/a/b.git/HEAD"),
                ("GET", "/a/b.git/config"),
                ("GET", "/api/v4/user"),
                ("DELETE", "/a/b.git/git-upload-pack"),
                ("HEAD", "/a/b.git/info/refs?service=git-upload-pack"),
            ] {
                check(&repository, method, path, false);
            }
            repository.announced.add("/moved/b.git");
            check(&repository, "GET", "/moved/b.git/info/refs?service=git-upload-pack", true);
            check(&repository, "POST", "/moved/b.git/git-upload-pack", true);
            check(&repository, "POST", "/moved/b.git/git-receive-pack", false);
        }
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
                path: "/mcp".into(),
                sse: false,
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
