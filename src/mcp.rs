//! What an MCP server may be called and where it may be: the rules that requests and the operator's settings share.
//! It must never take a place that egress would not take: that would end a run instead of a request.

use std::net::Ipv4Addr;

use gaoler_policy::settings::Mcp;
use http::Uri;
use http::uri::PathAndQuery;

use crate::operator;

/// Bytes of a name: it becomes a part of its tools' names.
const NAME_BYTES_MAX: usize = 64;
/// Bytes of a URL.
const URL_BYTES_MAX: usize = 2048;
/// The port of a server that is spoken to over the internet, and how its place ends.
const TLS_PORT: u16 = 443;
const TLS_SUFFIX: &str = ":443";
/// Domains that no public name is in: of this machine and of the network around it (RFC 6761, 6762 with its appendix G, 8375,
/// 9476, ICANN's `internal`, and what resolvers' search lists make of short names).
const LOCAL_DOMAINS: [&str; 16] = [
    "localhost",
    "localdomain",
    "local",
    "internal",
    "intranet",
    "private",
    "corp",
    "home",
    "lan",
    "home.arpa",
    "in-addr.arpa",
    "ip6.arpa",
    "invalid",
    "test",
    "onion",
    "alt",
];
/// What is wrong with a URL.
const FORM: &str = "must be https://HOST/PATH";
const NOT_PUBLIC: &str = "must name a host of the public internet: an address, or a name of a local network, is one that \
                          the operator names in mcp.internal";

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

    /// Reads a URL: `https://NAME/...` on port 443, and what the operator names in `mcp.internal` on any, by its address
    /// and in the clear too.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence without the URL, which may hold a secret.
    pub fn parse(url: &str, settings: &Mcp) -> Result<Place, String> {
        let (place, host) = Place::read(url)?;
        let internal = settings.internal.contains(&place.authority);
        let of_internet = place.secure && place.authority.ends_with(TLS_SUFFIX);
        if !internal && !of_internet {
            return Err(
                "must be https on port 443; the operator may name other places in mcp.internal".into()
            );
        }
        if !internal && !host.is_public_name() {
            return Err(NOT_PUBLIC.into());
        }
        Ok(place)
    }

    /// Reads a URL to which nothing is added on the way: `https://NAME/...` on any port, what the operator names in `hosts`
    /// by its address too, and `mcp.internal` as in [`Place::parse`]. The proxy judges it once more, with its level's list.
    ///
    /// # Errors
    /// As for [`Place::parse`].
    pub fn parse_plain(url: &str, settings: &Mcp, hosts: &[&[String]]) -> Result<Place, String> {
        let (place, host) = Place::read(url)?;
        if settings.internal.contains(&place.authority) {
            return Ok(place);
        }
        let names = |line: &String| match line.strip_prefix('*') {
            Some(domain) => place.authority.ends_with(domain),
            None => *line == place.authority,
        };
        match (place.secure, host.is_public_name() || hosts.iter().any(|list| list.iter().any(names))) {
            (true, true) => Ok(place),
            (true, false) => Err(NOT_PUBLIC.into()),
            (false, _) => Err(FORM.into()),
        }
    }

    /// A URL's parts, where each is in a spelling that all readers take for the same.
    fn read(url: &str) -> Result<(Place, Named), String> {
        let form = || FORM.to_owned();
        if url.len() > URL_BYTES_MAX || url.contains('#') {
            return Err(format!("{}, at most {URL_BYTES_MAX} bytes, without a fragment", form()));
        }
        let uri: Uri = url.parse().map_err(|_| form())?;
        let authority = uri.authority().ok_or_else(form)?.as_str().to_ascii_lowercase();
        if authority.contains('@') {
            return Err("must not hold a user or password; give a token in its own field".into());
        }
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(form()),
        };
        // The colon of a port comes after the bracket of an address. What is there is read by the rule of the operator's
        // own places, which takes a plain number alone: others mend what they do not understand.
        let place = match authority.rsplit_once(':').filter(|(_, port)| !port.ends_with(']')) {
            Some(_) => authority,
            None => format!("{authority}:{}", if secure { TLS_PORT } else { 80 }),
        };
        let wildcard = place.starts_with('*');
        operator::destination(&place).ok().filter(|()| !wildcard).ok_or(
            "must have a host that is a full name, such as mcp.example.com, or a plain address, and a plain port",
        )?;
        let host = Named(place.rsplit_once(':').map_or("", |(host, _)| host).to_owned());
        let path = uri.path_and_query().map_or("/", PathAndQuery::as_str).to_owned();
        Ok((Place { secure, authority: place, path }, host))
    }
}

/// A host that is spelt plainly.
struct Named(String);

impl Named {
    /// Whether it may be a name of the public internet. Addresses are none: whoever serves the world has a name, and what is
    /// asked for by its address is mostly of the network that gaoler runs in.
    fn is_public_name(&self) -> bool {
        let host = self.0.as_str();
        let address = host.starts_with('[') || host.parse::<Ipv4Addr>().is_ok();
        let below = |domain: &str| {
            host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        !address && !LOCAL_DOMAINS.iter().any(|domain| below(domain))
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
        check("https://mcp.example.com:443/a", Some((true, "mcp.example.com:443", "/a")));
        check("https://localhost.example.com/", Some((true, "localhost.example.com:443", "/")));
        check("https://mylocal.example/", Some((true, "mylocal.example:443", "/")));
        for bad in [
            "http://mcp.example.com/sse",
            // Addresses, in every spelling.
            "https://127.0.0.1/",
            "https://127.0.0.1:443/",
            "https://127.0.0.1:9001/",
            "https://169.254.169.254/latest/meta-data",
            "https://10.0.0.1/",
            "https://8.8.8.8/",
            "https://0.0.0.0/",
            "https://127.1/",
            "https://2130706433/",
            "https://0x7f000001/",
            "https://0x7f.0.0.1/",
            "https://017700000001/",
            "https://0177.0.0.1/",
            "https://127.0.0.1./",
            "https://[::1]/",
            "https://[::]/",
            "https://[::ffff:127.0.0.1]/",
            "https://[::ffff:a9fe:a9fe]/",
            "https://[fe80::1%25eth0]/",
            "https://[fd00:ec2::254]/",
            "https://[2606:4700::1111]/",
            "https://[2606:4700::1111]:443/",
            "https://[v1.x]/",
            "https://1.2.3.4.5/",
            "https://%31%32%37.0.0.1/",
            "https://\u{2460}27.0.0.1/",
            // Names of this machine and of the network around it.
            "https://localhost.:443/",
            "https://a.localhost/",
            "https://LOCALHOST/",
            "https://a.LocalHost/",
            "https://localhost.localdomain/",
            "https://printer.local/",
            "https://metadata.google.internal/",
            "https://kubernetes.default.svc.cluster.local/",
            "https://a.home.arpa/",
            "https://1.0.0.127.in-addr.arpa/",
            "https://s0.mcp.invalid/",
            "https://wiki.corp/",
            "https://metadata/",
            "https://mcp.example.com./",
            // Other spellings of a port.
            "https://mcp.example.com:/",
            "https://mcp.example.com:0443/",
            "https://mcp.example.com:+443/",
            "https://mcp.example.com:99999/",
            "https://mcp.example.com:443:443/",
            "https://mcp.example.com:https/",
            "https://*.example.com/",
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
    fn a_place_without_a_secret_is_public_too_or_one_that_the_operator_names() {
        let hosts = ["10.0.0.8:443", "*.git.corp:8443", "git.lan:443"].map(str::to_owned);
        let check = |url: &str, expected: bool| {
            let found = Place::parse_plain(url, &settings(), &[&[], &hosts]);
            assert_eq!(found.is_ok(), expected, "{url}: {found:?}");
        };
        check("https://github.com/a/b", true);
        check("https://git.example.com:8443/a", true);
        check("http://127.0.0.1:9000/a", true);
        check("https://10.0.0.8/a", true);
        check("https://a.git.corp:8443/a", true);
        check("https://git.lan/a", true);
        for bad in [
            "http://github.com/a/b",
            "http://git.lan:443/a",
            "https://10.0.0.9/a",
            "https://a.git.corp/a",
            "https://git.corp:8443/a",
            "https://xgit.lan/a",
            "https://127.0.0.1/",
            "https://127.0.0.1:8443/",
            "https://[::1]/",
            "https://0x7f.1/",
            "https://localhost/a",
            "https://git.internal/a",
            "https://user@github.com/a",
            "https://github.com:0443/a",
            "https://github.com./a",
            "ext::sh -c id",
            "file:///etc",
            "git@github.com:a/b",
            "-x",
        ] {
            check(bad, false);
        }
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
        entry(OfferedServer { url: "http://b.example/".into(), ..remote.clone() }, "https on port 443");
        entry(OfferedServer { url: "https://10.0.0.7/".into(), ..remote }, "in mcp.internal");
        assert!(check(&Mcp { internal: vec!["*.a.example:1".into()], ..Mcp::default() }).is_err());
        assert!(check(&Mcp { internal: vec!["a.example".into()], ..Mcp::default() }).is_err());
    }
}
