//! What a level lets out of its cages: requests to the upstream, and the proxy's hosts. Data, each entry with a
//! reason.
//! It must never let through what no list names; lists of what is denied only take away.

use std::num::{NonZeroU16, NonZeroU32};

use serde::Deserialize;

use crate::Why;
use crate::level::{list, literal};

/// What egress lets through. Lists name what is allowed, but for those called denied.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressPolicy {
    /// Requests of one run, at most.
    pub requests_max: u64,
    /// Bytes of one request's body, at most.
    pub request_bytes_max: u64,
    /// Bytes of all answers of a run together, at most.
    pub response_bytes_max: u64,
    /// Bytes of one request's head, at most.
    pub header_bytes_max: u64,
    /// Connections out of the cage at a time, at most.
    pub connections_max: u64,
    path: Vec<RawPath>,
    model: Vec<RawName>,
    beta: Vec<RawName>,
    tool: Vec<RawName>,
    denied_field: Vec<RawName>,
    denied_source: Vec<RawName>,
    /// Where the proxy goes. Requests to the upstream do not go through it.
    #[serde(default)]
    host: Vec<RawHost>,
    proxy: RawProxy,
    #[serde(rename = "why")]
    _why: Why,
}

impl EgressPolicy {
    /// Every port that the proxy of this level may connect to, in order; none where there is no proxy.
    pub fn proxy_ports(&self) -> Vec<u16> {
        let named = self.hosts().iter().flat_map(|host| &host.ports).chain(&self.proxy.ports);
        let mut ports: Vec<u16> = named.map(|port| port.get()).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// The hosts that count: a level without a proxy has none, whatever its file took over from another.
    fn hosts(&self) -> &[RawHost] {
        match self.proxy.mode {
            Mode::None => &[],
            Mode::List | Mode::Public => &self.host,
        }
    }

    /// This policy as an expression of type `EgressPolicy`. `egress_mib` is the level's limit of that name.
    pub(crate) fn rust(&self, egress_mib: u32) -> String {
        let ports = |ports: &[NonZeroU16]| list(ports, ToString::to_string);
        let proxy = [
            ("mode", format!("ProxyMode::{:?}", self.proxy.mode)),
            ("hosts", list(self.hosts(), |host| format!("({:?}, {})", host.host.0, ports(&host.ports)))),
            ("ports", ports(&self.proxy.ports)),
            ("connections_max", self.proxy.connections_max.to_string()),
            ("dial_ms", self.proxy.dial_ms.to_string()),
            ("idle_ms", self.proxy.idle_ms.to_string()),
            ("egress_mib", egress_mib.to_string()),
        ];
        let names = |rules: &[RawName]| list(rules, |rule| format!("{:?}", rule.name));
        let rows = [
            ("requests_max", self.requests_max.to_string()),
            ("request_bytes_max", self.request_bytes_max.to_string()),
            ("response_bytes_max", self.response_bytes_max.to_string()),
            ("header_bytes_max", self.header_bytes_max.to_string()),
            ("connections_max", self.connections_max.to_string()),
            ("paths", list(&self.path, |rule| format!("({:?}, {:?})", rule.method, rule.path))),
            ("models", names(&self.model)),
            ("betas", names(&self.beta)),
            ("tools", names(&self.tool)),
            ("denied_fields", names(&self.denied_field)),
            ("denied_sources", names(&self.denied_source)),
            ("proxy", literal("ProxyPolicy", &proxy)),
        ];
        literal("EgressPolicy", &rows)
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPath {
    method: String,
    path: String,
    #[serde(rename = "why")]
    _why: Why,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawName {
    #[serde(alias = "prefix", alias = "field", alias = "kind")]
    name: String,
    #[serde(rename = "why")]
    _why: Why,
}

/// A host of the proxy, or all below a domain.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    host: Pattern,
    ports: Vec<NonZeroU16>,
    #[serde(rename = "why")]
    _why: Why,
}

/// `github.com`, or `*.npmjs.org` for all names below that one. Only in the form in which egress compares names.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "String")]
struct Pattern(String);

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Pattern, String> {
        let name = text.strip_prefix("*.").unwrap_or(&text);
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let is_label = |label: &str| !label.is_empty() && label.len() <= 63 && label.bytes().all(fits);
        // A last label that begins with a digit would be read as an address by somebody.
        let is_domain = |name: &str| {
            name.rsplit_once('.')
                .is_some_and(|(_, last)| !last.starts_with(|first: char| first.is_ascii_digit()))
        };
        match name.contains('.') && name.len() <= 253 && name.split('.').all(is_label) && is_domain(name) {
            true => Ok(Pattern(text)),
            false => Err(format!("{text:?} is neither a host's name in lower case nor *. and a domain")),
        }
    }
}

/// How the proxy of a level judges where a cage wants to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    /// There is no proxy.
    None,
    /// The listed hosts only.
    List,
    /// Any public address at the listed ports, and the listed hosts.
    Public,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProxyFields {
    mode: Mode,
    #[serde(default)]
    ports: Vec<NonZeroU16>,
    connections_max: NonZeroU32,
    dial_ms: NonZeroU32,
    idle_ms: NonZeroU32,
    #[serde(rename = "why")]
    _why: Why,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "RawProxyFields")]
struct RawProxy {
    mode: Mode,
    ports: Vec<NonZeroU16>,
    connections_max: u32,
    dial_ms: u32,
    idle_ms: u32,
}

impl TryFrom<RawProxyFields> for RawProxy {
    type Error = &'static str;

    fn try_from(fields: RawProxyFields) -> std::result::Result<RawProxy, &'static str> {
        match (fields.mode, fields.ports.is_empty()) {
            (Mode::Public, true) => return Err("a public proxy must name its ports"),
            (Mode::None | Mode::List, false) => return Err("ports of the proxy itself are for mode public"),
            (Mode::Public, false) | (Mode::None | Mode::List, true) => {}
        }
        // An idle connection that ended before its dialling could would never be used.
        if fields.idle_ms < fields.dial_ms {
            return Err("idle_ms of the proxy must not be below its dial_ms");
        }
        Ok(RawProxy {
            mode: fields.mode,
            ports: fields.ports,
            connections_max: fields.connections_max.get(),
            dial_ms: fields.dial_ms.get(),
            idle_ms: fields.idle_ms.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BALANCED: &str = include_str!("../balanced.toml");

    fn egress(text: &str) -> Result<EgressPolicy, String> {
        let mut level: toml::Table = text.parse().expect("TOML");
        let egress = level.remove("egress").expect("a part egress");
        egress.try_into().map_err(|error: toml::de::Error| error.to_string())
    }

    #[test]
    fn t06_a_proxy_that_says_less_or_more_than_it_seems_to_is_refused() {
        assert!(egress(BALANCED).is_ok());
        let check = |from: &str, to: &str, part: &str| {
            let text = BALANCED.replacen(from, to, 1);
            assert_ne!(text, BALANCED, "{from}");
            let error = egress(&text).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        for host in [
            "GitHub.com",
            "github.com.",
            "*.*.com",
            "*.com",
            "*",
            "com",
            "",
            "a..b",
            "1.2.3.4",
            "a.b:443",
            "a_b.c",
            "ex*.com",
        ] {
            check("host = \"github.com\"", &format!("host = {host:?}"), "is neither a host's name");
        }
        check("ports = [443]", "ports = [0]", "nonzero");
        check("mode = \"list\"", "mode = \"public\"", "must name its ports");
        check("mode = \"list\"", "mode = \"list\"\nports = [443]", "for mode public");
        check("mode = \"list\"", "mode = \"any\"", "unknown variant");
        check("dial_ms = 10_000", "dial_ms = 10_000_000", "must not be below");
        check("dial_ms = 10_000", "dial_ms = 0", "nonzero");
        check("mode = \"list\"", "mode = \"list\"\nbytes = 1", "unknown field");
    }

    #[test]
    fn t07_the_ports_of_a_proxy_are_those_of_its_hosts_and_its_mode() {
        let ports = |from: &str, to: &str| egress(&BALANCED.replacen(from, to, 1)).unwrap().proxy_ports();
        assert_eq!(ports("", ""), [80, 443]);
        assert_eq!(ports("mode = \"list\"", "mode = \"public\"\nports = [443, 22]"), [22, 80, 443]);
        let none = egress(&BALANCED.replacen("mode = \"list\"", "mode = \"none\"", 1)).unwrap();
        assert!(none.proxy_ports().is_empty());
        assert!(none.rust(1).contains("hosts: &[],"), "{}", none.rust(1));
        assert!(egress(BALANCED).unwrap().rust(1).contains("(\"github.com\", &[443])"));
    }
}
