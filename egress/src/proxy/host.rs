//! Destinations: how one is spelt, and whether the level and the operator allow it. Pure functions.
//! It must never take a spelling that two readers could understand differently: what is odd is refused, not mended.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use gaoler_protocol::INTERNAL_MARK;

use crate::policy::{ProxyMode, ProxyPolicy};

/// Bytes of a name, and of one label of it, as in RFC 1035.
const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;
/// Lines that the operator may add.
const LINES_MAX: usize = 1024;

/// A host in its one spelling: a name in lower case, with a dot in it and none at its end, or an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A name.
    Name(String),
    /// An address.
    Address(IpAddr),
}

impl Host {
    /// Reads one. `None` for whatever is not its one spelling: capitals, a dot at the end, the other spellings of
    /// addresses (`127.1`, `0x7f.1`, `017700000001`, `2130706433`, `[2001:DB8:0::1]`), percent escapes, user names,
    /// characters beyond ASCII, names without a dot, zones of IPv6.
    pub fn parse(text: &str) -> Option<Host> {
        let host = match text.strip_prefix('[') {
            Some(rest) => Host::Address(rest.strip_suffix(']')?.parse::<Ipv6Addr>().ok()?.into()),
            None => match text.parse::<Ipv4Addr>() {
                Ok(address) => Host::Address(address.into()),
                Err(_) => Host::Name(text.to_owned()),
            },
        };
        let is_one = match &host {
            Host::Name(name) => is_name(name),
            Host::Address(_) => host.to_string() == text,
        };
        is_one.then_some(host)
    }
}

fn is_name(name: &str) -> bool {
    // No domain of the world begins with a digit; readers of addresses take such names for numbers.
    let domain = name.rsplit_once('.').map(|(_, last)| last);
    let is_domain = domain.is_some_and(|last| !last.starts_with(|first: char| first.is_ascii_digit()));
    name.len() <= NAME_BYTES_MAX && name.split('.').all(is_label) && is_domain
}

fn is_label(label: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
    let edges = label.starts_with('-') || label.ends_with('-');
    !label.is_empty() && label.len() <= LABEL_BYTES_MAX && !edges && label.bytes().all(fits)
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Name(name) => f.write_str(name),
            Host::Address(IpAddr::V4(address)) => write!(f, "{address}"),
            Host::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// Where a cage wants to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// The host.
    pub host: Host,
    /// The port.
    pub port: u16,
}

impl Destination {
    /// Reads `HOST:PORT`, or `HOST` where a port goes without saying.
    pub fn parse(authority: &str, default: Option<u16>) -> Option<Destination> {
        let (host, port) = split(authority);
        let port = port.map_or(default, parse_port)?;
        Some(Destination { host: Host::parse(host)?, port })
    }
}

/// The host and what comes after its colon, if it has one; those of an IPv6 address lie within its brackets.
fn split(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

/// A plain number above zero: no sign, no leading zero.
fn parse_port(text: &str) -> Option<u16> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| is_plain)
}

/// The hosts that a row of a list names.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    /// This one.
    Is(Host),
    /// All names that end in this, which begins with a dot.
    Below(String),
}

impl Pattern {
    fn parse(text: &str) -> Option<Pattern> {
        let Some(domain) = text.strip_prefix("*.") else { return Host::parse(text).map(Pattern::Is) };
        match Host::parse(domain)? {
            Host::Name(domain) => Some(Pattern::Below(format!(".{domain}"))),
            Host::Address(_) => None,
        }
    }

    fn matches(&self, host: &Host) -> bool {
        match (self, host) {
            (Pattern::Is(own), host) => own == host,
            (Pattern::Below(end), Host::Name(name)) => name.ends_with(end),
            (Pattern::Below(_), Host::Address(_)) => false,
        }
    }
}

/// Where the proxy of a run may go.
pub struct List {
    rows: Vec<(Pattern, u16)>,
    public_ports: &'static [u16],
    /// MCP servers in the operator's own network.
    internal: Vec<Destination>,
}

impl List {
    /// The level's rows, and the operator's: one `HOST:PORT` or `*.DOMAIN:PORT` a line. `None` where a line is
    /// not that.
    pub fn new(policy: &ProxyPolicy, operator: &str) -> Option<List> {
        let level =
            policy.hosts.iter().flat_map(|(host, ports)| ports.iter().map(move |port| (*host, *port)));
        let level = level.map(|(host, port)| Some((Pattern::parse(host)?, port)));
        let line = |line: &str| {
            let (host, port) = split(line);
            Some((Pattern::parse(host)?, parse_port(port?)?))
        };
        if operator.lines().count() > LINES_MAX {
            return None;
        }
        let (internal, operator): (Vec<&str>, Vec<&str>) =
            operator.lines().partition(|line| line.starts_with(INTERNAL_MARK));
        let internal = internal.iter().map(|line| Destination::parse(&line[INTERNAL_MARK.len()..], None));
        let internal = internal.collect::<Option<Vec<_>>>()?;
        let rows = level.chain(operator.into_iter().map(line)).collect::<Option<Vec<_>>>()?;
        Some(match policy.mode {
            ProxyMode::None => List { rows: Vec::new(), public_ports: &[], internal: Vec::new() },
            ProxyMode::List => List { rows, public_ports: &[], internal },
            ProxyMode::Public => List { rows, public_ports: policy.ports, internal },
        })
    }

    /// Whether it is an MCP server of the operator's own network. That alone lets no tool reach it.
    pub fn is_internal(&self, destination: &Destination) -> bool {
        self.internal.contains(destination)
    }

    /// Whether it names this destination. An address is judged beside that, and later.
    pub fn names(&self, destination: &Destination) -> bool {
        let row = |(pattern, port): &(Pattern, u16)| {
            *port == destination.port && pattern.matches(&destination.host)
        };
        self.public_ports.contains(&destination.port) || self.rows.iter().any(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::BALANCED;

    fn name(text: &str) -> Option<Host> {
        Some(Host::Name(text.to_owned()))
    }

    #[test]
    fn a_host_has_one_spelling() {
        let check = |text: &str, expected: Option<Host>| assert_eq!(Host::parse(text), expected, "{text:?}");
        check("github.com", name("github.com"));
        check("xn--bcher-kva.example", name("xn--bcher-kva.example"));
        check("3com.com", name("3com.com"));
        check("a_b.example", name("a_b.example"));
        check("10.0.0.1.example.com", name("10.0.0.1.example.com"));
        check("192.0.2.1", Some(Host::Address([192, 0, 2, 1].into())));
        check("[2001:db8::1]", Some(Host::Address("2001:db8::1".parse().unwrap())));
        check("[::ffff:10.0.0.1]", Some(Host::Address("::ffff:10.0.0.1".parse().unwrap())));
        let long = format!("{}.example", "a".repeat(64));
        let longer = format!("{}example", "abcdefg.".repeat(32));
        for odd in [
            "",
            ".",
            "..",
            "localhost",
            "localhost.",
            "com",
            "metadata",
            "github.com..",
            ".github.com",
            "a..b",
            // Other spellings of a name.
            "GitHub.com",
            "github.COM",
            "github.com.",
            "XN--bcher-kva.example",
            // Other spellings of an address.
            "[2001:DB8::1]",
            "[2001:db8:0::1]",
            "[2001:db8::0001]",
            "[2001:db8:0:0:0:0:0:1]",
            "[::ffff:a00:1]",
            "[::FFFF:10.0.0.1]",
            "[2001:db8::1:0.0.0.2]",
            "127.1",
            "127.0.1",
            "2130706433",
            "0x7f.1",
            "0x7f000001",
            "0x7f.0.0.1",
            "017700000001",
            "0177.0.0.1",
            "127.0.0.01",
            "127.0.0.1.",
            "127.0.0.256",
            "1.2.3.4.5",
            "1.2.3",
            "1.2.3.0x4",
            "00.0.0.0",
            "1.2.3.4a",
            "127.0.0.1%00",
            "127.0.0.1 ",
            " 127.0.0.1",
            "127。0。0。1",
            "①②⑦.0.0.1",
            "::1",
            "2001:db8::1",
            "[::1",
            "::1]",
            "[::1]]",
            "[[::1]]",
            "[]",
            "[::1%25eth0]",
            "[fe80::1%lo]",
            "[127.0.0.1]",
            "[github.com]",
            "[::1].",
            "[0x1::]",
            "[v1.x]",
            // What is no name.
            "git%68ub.com",
            "github%2ecom",
            "github.com%00",
            "user@github.com",
            "@github.com",
            "github.com:443",
            "github.com/",
            "github.com?x",
            "github.com#x",
            "git hub.com",
            "github.com\t",
            "github.com\n",
            "git\0hub.com",
            "gith\u{fc}b.com",
            "github\u{ff0e}com",
            "\u{430}pple.com",
            "github\u{200b}.com",
            "*.github.com",
            "git*.com",
            "-a.com",
            "a-.com",
            "github,com",
            "github;com",
            "git\\hub.com",
            "github.com'",
            "$(id).com",
            "github.1com",
            &long,
            &longer,
        ] {
            check(odd, None);
        }
    }

    #[test]
    fn every_host_that_is_read_reads_the_same_again() {
        // Every text of up to four of these pieces: 22621 of them.
        let pieces = ["a", "B", "1", "0x7f", "127", ".", "-", ":", "[", "]", "%2e", "*"];
        let mut texts = vec![String::new()];
        let mut newest = texts.clone();
        for _ in 0..4 {
            newest = newest.iter().flat_map(|text| pieces.map(|piece| format!("{text}{piece}"))).collect();
            texts.extend_from_slice(&newest);
        }
        let mut read = 0;
        for text in &texts {
            let Some(host) = Host::parse(text) else { continue };
            read += 1;
            let again = host.to_string();
            assert_eq!(Host::parse(&again), Some(host.clone()), "{text:?}");
            let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
            match host {
                Host::Name(name) => assert!(name.bytes().all(plain) && name.contains('.'), "{text:?}"),
                Host::Address(address) => assert!(address.is_ipv6() && text.starts_with('['), "{text:?}"),
            }
        }
        assert!(read > 20 && read < texts.len() / 10, "{read} of {}", texts.len());
    }

    #[test]
    fn a_destination_names_its_port_plainly() {
        let check = |text: &str, default, expected: Option<u16>| {
            assert_eq!(Destination::parse(text, default).map(|found| found.port), expected, "{text:?}");
        };
        check("github.com:443", None, Some(443));
        check("github.com", Some(80), Some(80));
        check("[2001:db8::1]:22", None, Some(22));
        check("[2001:db8::1]", Some(80), Some(80));
        for odd in [
            "github.com",
            "github.com:",
            "github.com:0",
            "github.com:65536",
            "github.com:+443",
            "github.com:-1",
            "github.com:0443",
            "github.com: 443",
            "github.com:443:443",
            "github.com:https",
            "user@github.com:443",
            "user:github.com:443",
            "2001:db8::1:443",
            "GitHub.com:443",
            "github.com.:443",
            "[2001:DB8::1]:443",
            "[::1]443",
            "[::1]:",
            ":443",
            "github.com:\u{664}43",
            "github.com.:",
        ] {
            check(odd, None, None);
        }
        check("github.com:", Some(80), None);
    }

    fn allows(list: &List, text: &str) -> bool {
        list.names(&Destination::parse(text, None).unwrap_or_else(|| panic!("{text}")))
    }

    #[test]
    fn a_list_allows_what_it_names_and_nothing_else() {
        let operator = "*.corp.example:8443\nmirror.example:80\n192.0.2.7:443\n[2001:db8::7]:443\n";
        let list = List::new(&BALANCED.proxy, operator).unwrap();
        let check = |text: &str, expected: bool| assert_eq!(allows(&list, text), expected, "{text}");
        check("github.com:443", true);
        check("github.com:80", false);
        check("github.com:22", false);
        check("evil.github.com:443", false);
        check("github.com.evil.example:443", false);
        check("notgithub.com:443", false);
        check("deb.debian.org:80", true);
        check("a.corp.example:8443", true);
        check("a.b.corp.example:8443", true);
        check("corp.example:8443", false);
        check("acorp.example:8443", false);
        check("a.corp.example:443", false);
        check("mirror.example:80", true);
        check("mirror.example:443", false);
        check("192.0.2.7:443", true);
        check("192.0.2.8:443", false);
        check("[2001:db8::7]:443", true);
        check("[::ffff:192.0.2.7]:443", false);
    }

    #[test]
    fn a_line_of_the_operator_that_is_no_host_and_port_is_refused() {
        for odd in [
            "a.example",
            "a.example:0",
            "localhost:80",
            "*:443",
            "*.*.a.example:443",
            "*.10.0.0.1:443",
            "a.example:443 ",
            "\n",
            "https://a.example:443",
            "a*.example:443",
            "*.Corp.example:443",
            "127.1:80",
            "[2001:DB8::7]:443",
        ] {
            assert!(List::new(&BALANCED.proxy, odd).is_none(), "{odd:?}");
        }
        assert!(List::new(&BALANCED.proxy, &"a.example:443\n".repeat(LINES_MAX)).is_some());
        assert!(List::new(&BALANCED.proxy, &"a.example:443\n".repeat(LINES_MAX + 1)).is_none());
    }

    #[test]
    fn the_mode_decides_beside_the_list() {
        let of = |mode, ports| {
            List::new(&ProxyPolicy { mode, ports, ..BALANCED.proxy }, "a.example:8443").unwrap()
        };
        let public = of(ProxyMode::Public, &[80, 443, 22]);
        assert!(
            allows(&public, "any.example:22")
                && allows(&public, "192.0.2.1:443")
                && allows(&public, "a.example:8443")
        );
        assert!(!allows(&public, "any.example:25") && !allows(&public, "any.example:8443"));
        let none = of(ProxyMode::None, &[]);
        assert!(!allows(&none, "github.com:443") && !allows(&none, "a.example:8443"));
    }
}
