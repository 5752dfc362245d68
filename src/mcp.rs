//! What an MCP server may be called and where it may be: the rules that requests and the operator's settings share.
//! It must never take a place that egress would not take: that would end a run instead of a request.

use gaoler_policy::settings::Mcp;
use http::Uri;
use http::uri::PathAndQuery;

use crate::operator;

/// Bytes of a name: it becomes a part of its tools' names.
const NAME_BYTES_MAX: usize = 64;
/// Bytes of a URL.
const URL_BYTES_MAX: usize = 2048;
/// The port of a server that is spoken to over the internet.
const TLS_PORT: u16 = 443;

/// Where a remote server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Over TLS.
    pub secure: bool,
    /// `HOST:PORT`.
    pub authority: String,
    /// What comes after that, from the first slash on.
    pub path: String,
}

/// Whether a server may have this name.
pub fn is_name(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(letter)
}

/// The transport of this name, as the CLI calls it.
pub fn transport(name: &str) -> Option<&'static str> {
    match name.to_ascii_lowercase().as_str() {
        "http" | "streamable-http" | "streamable_http" | "url" => Some("http"),
        "sse" => Some("sse"),
        _ => None,
    }
}

impl Place {
    /// What a secret for it is bound to.
    pub fn origin(&self) -> String {
        format!("{}://{}", if self.secure { "https" } else { "http" }, self.authority)
    }

    /// Reads a URL: `https://HOST/...` on port 443, and what the operator names in `mcp.internal` on any, in the
    /// clear too.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence without the URL, which may hold a secret.
    pub fn parse(url: &str, settings: &Mcp) -> Result<Place, String> {
        let form = || "must be https://HOST/PATH".to_owned();
        if url.len() > URL_BYTES_MAX || url.contains('#') {
            return Err(format!("{}, at most {URL_BYTES_MAX} bytes, without a fragment", form()));
        }
        let uri: Uri = url.parse().map_err(|_| form())?;
        let authority = uri.authority().ok_or_else(form)?;
        if authority.as_str().contains('@') {
            return Err("must not hold a user or password; give auth_token".into());
        }
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(form()),
        };
        let default = if secure { TLS_PORT } else { 80 };
        let port = match authority.port_u16() {
            Some(port) => port,
            None if authority.port().is_some() => return Err(form()),
            None => default,
        };
        let place = format!("{}:{port}", authority.host().to_ascii_lowercase());
        operator::destination(&place).map_err(|_| {
            "must have a host that is a full name, such as mcp.example.com, or a plain address".to_owned()
        })?;
        let of_internet = secure && port == TLS_PORT;
        if !of_internet && !settings.internal.contains(&place) {
            return Err(
                "must be https on port 443; the operator may name other places in mcp.internal".into()
            );
        }
        let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
        Ok(Place { secure, authority: place, path: path.to_owned() })
    }
}

/// Checks the operator's settings.
///
/// # Errors
/// The key, and what is wrong there.
pub fn check(settings: &Mcp) -> Result<(), (&'static str, String)> {
    for (at, host) in settings.internal.iter().enumerate() {
        let wrong = |what: String| Err(("mcp.internal", format!("entry {at}: {what}")));
        match operator::destination(host) {
            Err(_) => return wrong(format!("`{host}` is not HOST:PORT, such as 10.0.0.7:9000")),
            Ok(()) if host.starts_with('*') => return wrong(format!("`{host}`: name each host")),
            Ok(()) => {}
        }
    }
    let mut names = std::collections::HashSet::new();
    for (at, server) in settings.catalog.iter().enumerate() {
        let wrong = |what: String| Err(("mcp.catalog", format!("entry {at}: {what}")));
        if !is_name(&server.name) {
            return wrong(format!("name must be 1 to {NAME_BYTES_MAX} letters, digits, `_` and `-`"));
        }
        if !names.insert(&server.name) {
            return wrong(format!("`{}` is there twice", server.name));
        }
        if server.url.is_empty() && !server.token_file.is_empty() {
            return wrong("token_file is for a url; what a command is given, its runs can read".into());
        }
        match (server.command.is_empty(), server.url.is_empty()) {
            (true, true) => return wrong("needs a command or a url".into()),
            (false, false) => return wrong("has a command and a url; a server is one of them".into()),
            (false, true) => {}
            (true, false) if transport(&server.transport).is_none() => {
                return wrong("transport must be http or sse".into());
            }
            (true, false) => {
                if let Err(what) = Place::parse(&server.url, settings) {
                    return wrong(format!("url {what}"));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_policy::settings::OfferedServer;

    fn settings() -> Mcp {
        Mcp { internal: vec!["127.0.0.1:9000".into(), "mcp.corp.example:8443".into()], ..Mcp::default() }
    }

    #[test]
    fn a_place_is_of_the_internet_over_tls_or_the_operators_word() {
        let check = |url: &str, expected: Option<(bool, &str, &str)>| {
            let place = Place::parse(url, &settings()).ok();
            let place = place.as_ref().map(|it| (it.secure, it.authority.as_str(), it.path.as_str()));
            assert_eq!(place, expected, "{url}");
        };
        check("https://mcp.example.com/sse?a=b", Some((true, "mcp.example.com:443", "/sse?a=b")));
        check("https://MCP.example.com", Some((true, "mcp.example.com:443", "/")));
        check("http://127.0.0.1:9000/mcp", Some((false, "127.0.0.1:9000", "/mcp")));
        check("https://mcp.corp.example:8443/mcp", Some((true, "mcp.corp.example:8443", "/mcp")));
        for bad in [
            "http://mcp.example.com/sse",
            "https://mcp.example.com:8443/",
            "https://user:pw@mcp.example.com/",
            "https://localhost/",
            "http://127.0.0.1:9001/mcp",
            "https://0x7f.1/",
            "https://a.1b/",
            "https://mcp.example.com/#a",
            "ftp://mcp.example.com/",
            "mcp.example.com",
            "/mcp",
            "",
        ] {
            check(bad, None);
        }
        check(&format!("https://mcp.example.com/{}", "a".repeat(2048)), None);
    }

    #[test]
    fn a_catalogue_is_checked_to_its_last_entry() {
        let ok = OfferedServer { name: "a".into(), command: "node".into(), ..OfferedServer::default() };
        let remote =
            OfferedServer { name: "b".into(), url: "https://b.example/".into(), ..OfferedServer::default() };
        let entry = |second: OfferedServer, part: &str| {
            let found = check(&Mcp { catalog: vec![ok.clone(), second], ..settings() });
            match part {
                "" => assert_eq!(found, Ok(())),
                part => assert!(found.as_ref().is_err_and(|(_, what)| what.contains(part)), "{found:?}"),
            }
        };
        entry(remote.clone(), "");
        entry(OfferedServer { token_file: "/t".into(), ..remote.clone() }, "");
        let local = OfferedServer { name: "c".into(), command: "node".into(), ..OfferedServer::default() };
        entry(OfferedServer { token_file: "/t".into(), ..local }, "token_file is for a url");
        entry(OfferedServer { name: "a b".into(), ..remote.clone() }, "entry 1: name must be");
        entry(OfferedServer { name: "a".into(), ..remote.clone() }, "there twice");
        entry(OfferedServer { url: String::new(), ..remote.clone() }, "needs a command or a url");
        entry(OfferedServer { command: "x".into(), ..remote.clone() }, "is one of them");
        entry(OfferedServer { transport: "ws".into(), ..remote.clone() }, "transport must be");
        entry(OfferedServer { url: "http://b.example/".into(), ..remote }, "https on port 443");
        assert!(check(&Mcp { internal: vec!["*.a.example:1".into()], ..Mcp::default() }).is_err());
        assert!(check(&Mcp { internal: vec!["a.example".into()], ..Mcp::default() }).is_err());
    }
}
