//! The command line of an egress: where the upstream is, and the operator's bounds.
//! It must never accept an upstream to which a credential would travel in the clear.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;

/// What an egress is told before it confines itself.
#[derive(Debug, PartialEq)]
pub struct Arguments {
    /// Where the API is.
    pub upstream: Upstream,
    /// How long the upstream may stay silent.
    pub silence: Duration,
    /// Requests of a run at most; the run or its level may name fewer.
    pub requests_max: u32,
    /// Certificates in PEM form that take the place of the built-in roots.
    pub ca_file: Option<PathBuf>,
    /// Ports that the proxy may connect to; the level of a run is known only later, and may name fewer.
    pub connect: Vec<u16>,
}

/// The upstream's address: a scheme, a host and perhaps a port.
#[derive(Debug, Clone, PartialEq)]
pub struct Upstream {
    /// Whether it is spoken to over TLS.
    pub secure: bool,
    /// `HOST` or `HOST:PORT`, as in a URL.
    pub authority: String,
    /// The port to connect to.
    pub port: u16,
}

/// Shown for a command line that cannot be read.
pub const USAGE: &str =
    "usage: gaoler-egress --upstream URL [--silence-seconds N] [--requests-max N] [--ca-file FILE]
                     [--connect PORT,PORT...]
Started by the supervisor, with a control socket at descriptor 3.";

/// The longest silence that the operator may allow; the CLI itself gives up before.
const SILENCE_SECONDS_MAX: u64 = 3600;
/// Ports of a proxy at most: each is a rule of Landlock.
const CONNECT_MAX: usize = 256;

impl Arguments {
    /// Reads the words after the program's name.
    ///
    /// # Errors
    /// What is wrong, in words for the operator.
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Arguments, String> {
        let mut words = words;
        let (mut upstream, mut ca_file, mut connect) = (None, None, Vec::new());
        let (mut silence, mut requests_max) = (Duration::from_secs(120), u32::MAX);
        while let Some(flag) = words.next() {
            let value = words.next().ok_or_else(|| format!("{flag} needs a value"))?;
            let bad = || format!("{flag} is not a number within its bounds");
            match flag.as_str() {
                "--upstream" => upstream = Some(Upstream::parse(&value)?),
                "--ca-file" => ca_file = Some(PathBuf::from(value)),
                "--connect" => connect = ports(&value).ok_or_else(bad)?,
                "--requests-max" => {
                    requests_max = value.parse().ok().filter(|&n| n > 0).ok_or_else(bad)?;
                }
                "--silence-seconds" => {
                    let within = |&n: &u64| (1..=SILENCE_SECONDS_MAX).contains(&n);
                    silence = Duration::from_secs(value.parse().ok().filter(within).ok_or_else(bad)?);
                }
                _ => return Err(format!("{flag} is not an option")),
            }
        }
        let upstream = upstream.ok_or("--upstream is missing")?;
        Ok(Arguments { upstream, silence, requests_max, ca_file, connect })
    }
}

impl Upstream {
    /// Reads `https://HOST[:PORT]`, or `http://` of this machine.
    ///
    /// # Errors
    /// Any other URL.
    pub fn parse(url: &str) -> Result<Upstream, String> {
        let wrong = || format!("upstream {url:?} is not https://HOST[:PORT], nor http:// of loopback");
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        if authority.as_str().contains('@') || uri.query().is_some() || !matches!(uri.path(), "" | "/") {
            return Err(wrong());
        }
        let (secure, default) = match uri.scheme_str() {
            Some("https") => (true, 443),
            Some("http") if is_loopback(authority.host()) => (false, 80),
            _ => return Err(wrong()),
        };
        let port = authority.port_u16().unwrap_or(default);
        Ok(Upstream { secure, authority: authority.as_str().to_owned(), port })
    }

    /// The URL of a path of the upstream.
    pub fn url(&self, path_and_query: &str) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}{path_and_query}", self.authority)
    }
}

/// A list of ports, each a plain number above zero.
fn ports(text: &str) -> Option<Vec<u16>> {
    let port = |text: &str| text.parse::<NonZeroU16>().ok().map(NonZeroU16::get);
    text.split(',').map(port).collect::<Option<Vec<u16>>>().filter(|ports| ports.len() <= CONNECT_MAX)
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_is_https_or_on_this_machine() {
        let check = |url: &str, expected: Option<(bool, u16)>| {
            let upstream = Upstream::parse(url).ok();
            assert_eq!(upstream.map(|upstream| (upstream.secure, upstream.port)), expected, "{url}");
        };
        check("https://api.example.com", Some((true, 443)));
        check("https://api.example.com:8443/", Some((true, 8443)));
        check("http://127.0.0.1:9000", Some((false, 9000)));
        check("http://[::1]:9000", Some((false, 9000)));
        check("http://localhost", Some((false, 80)));
        check("http://api.example.com", None);
        check("http://127.0.0.1.example.com", None);
        check("http://169.254.169.254", None);
        check("https://user@api.example.com", None);
        check("https://api.example.com/path", None);
        check("https://api.example.com?query", None);
        check("ftp://127.0.0.1", None);
        check("/v1", None);
    }

    #[test]
    fn flags_have_bounds() {
        let parse = |line: &str| Arguments::parse(line.split(' ').map(str::to_owned));
        assert!(parse("--upstream https://a").is_ok());
        assert!(parse("--upstream https://a --silence-seconds 5 --requests-max 2").is_ok());
        assert_eq!(parse("--upstream https://a --connect 80,443").unwrap().connect, [80, 443]);
        for bad in [
            "--upstream",
            "--silence-seconds 5",
            "--upstream https://a --silence-seconds 0",
            "--upstream https://a --requests-max x",
            "--upstream https://a --other 1",
            "--upstream https://a --connect 0",
            "--upstream https://a --connect 80,",
            "--upstream https://a --connect 65536",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
