//! From a destination that is allowed to a connection: one look at its name, all addresses judged, only those dialled.
//! It must never pick the good one of several answers: a name with one bad address is a bad name.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::address;
use super::host::{Destination, Host};
use super::refused::Refused;
use crate::resolve::NameServers;

/// Addresses that are tried, at most. All are judged.
const DIALLED_MAX: usize = 4;

/// A connection, and the address that it is to; any address where the operator called the host `internal`.
///
/// # Errors
/// Why there is none, within `time`.
pub async fn dial(
    servers: &NameServers,
    to: &Destination,
    internal: bool,
    time: Duration,
) -> Result<(TcpStream, IpAddr), Refused> {
    let end = Instant::now() + time;
    let addresses =
        timeout_at(end, addresses(servers, &to.host, internal)).await.map_err(|_| Refused::Silent)??;
    let mut why = Refused::Unreachable;
    for (tried, address) in addresses.iter().enumerate() {
        // What is left of the time is shared by those that are left, so that a dead one leaves some to the next.
        let others = u32::try_from(addresses.len() - tried).unwrap_or(1);
        let until = Instant::now() + end.saturating_duration_since(Instant::now()) / others;
        match timeout_at(until, TcpStream::connect(SocketAddr::new(*address, to.port))).await {
            Ok(Ok(stream)) => {
                // A proxy gathers nothing: what comes goes on at once.
                let _ = stream.set_nodelay(true);
                return Ok((stream, *address));
            }
            Ok(Err(error)) if error.kind() == ErrorKind::TimedOut => why = Refused::Silent,
            Ok(Err(_)) => why = Refused::Unreachable,
            Err(_) => why = Refused::Silent,
        }
    }
    Err(why)
}

/// The addresses that may be dialled, IPv4 first: not every host has a way out over IPv6.
async fn addresses(servers: &NameServers, host: &Host, internal: bool) -> Result<Vec<IpAddr>, Refused> {
    let mut found = match host {
        Host::Address(address) => vec![*address],
        Host::Name(name) => servers.addresses(name).await.map_err(|_| Refused::Name)?,
    };
    if found.is_empty() {
        return Err(Refused::Name);
    }
    if !internal && !found.iter().all(|address| address::is_allowed(*address)) {
        return Err(Refused::Address);
    }
    found.sort_by_key(IpAddr::is_ipv6);
    found.truncate(DIALLED_MAX);
    Ok(found)
}
