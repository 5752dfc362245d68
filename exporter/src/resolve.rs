//! Finds the collector's addresses, once, before this process confines itself for good.
//! It must never ask for another name, nor open a file: the host's resolv.conf was handed over open.

use std::fs::File;
use std::io::{Error, Read, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::ResolveHosts;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::parse_resolv_conf;

use crate::collector::Target;
use crate::log;

/// Bytes of a resolv.conf that are read.
const RESOLV_CONF_BYTES_MAX: u64 = 64 * 1024;
/// How long one name server may take, and how often it is asked.
const ANSWER_TIME: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 2;
/// Addresses that are tried, at most.
const ADDRESSES_MAX: usize = 8;
/// Between two questions for a name that does not resolve yet: at first, and at most.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// The collector's addresses. Where its name does not resolve it is asked for again: spans wait meanwhile, within bounds.
///
/// # Errors
/// Where no name server is known and one is needed.
pub async fn addresses(target: &Target, resolv_conf: OwnedFd) -> Result<Vec<SocketAddr>> {
    let with_port = |address: IpAddr| SocketAddr::new(address, target.port);
    if let Ok(address) = target.host.parse::<IpAddr>() {
        return Ok(vec![with_port(address)]);
    }
    if target.host == "localhost" {
        return Ok(vec![with_port(Ipv4Addr::LOCALHOST.into()), with_port(Ipv6Addr::LOCALHOST.into())]);
    }
    let resolver = resolver(resolv_conf)?;
    // The dot at the end keeps the search list of the host out of it.
    let name = format!("{}.", target.host.trim_end_matches('.'));
    let mut pause = PAUSE_FIRST;
    loop {
        if let Ok(found) = resolver.lookup_ip(name.as_str()).await {
            let found: Vec<_> = found.iter().take(ADDRESSES_MAX).map(with_port).collect();
            if !found.is_empty() {
                return Ok(found);
            }
        }
        if pause == PAUSE_FIRST {
            log("collector_not_found", &[("host", target.host.as_str().into())]);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn resolver(resolv_conf: OwnedFd) -> Result<TokioResolver> {
    let mut text = Vec::new();
    File::from(resolv_conf).take(RESOLV_CONF_BYTES_MAX).read_to_end(&mut text)?;
    let none = "resolv.conf names no server; write the collector's address in telemetry.otlp_endpoint";
    let (config, mut options) = parse_resolv_conf(&text).map_err(|_| Error::other(none))?;
    options.use_hosts_file = ResolveHosts::Never;
    options.timeout = ANSWER_TIME;
    options.attempts = ATTEMPTS;
    let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    builder.with_options(options).build().map_err(|_| Error::other(none))
}
