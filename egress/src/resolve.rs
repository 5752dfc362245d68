//! Finds addresses without opening a file: the host's resolv.conf was handed over open.
//! It must never ask for a name that nobody has judged: the API's side knows the upstream's only.

use std::fs::File;
use std::io::{Error, Read, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::ResolveHosts;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::parse_resolv_conf;
use hyper_util::client::legacy::connect::dns::Name;
use tower_service::Service;

/// Bytes of a resolv.conf that are read; glibc reads lines that are far shorter.
const RESOLV_CONF_BYTES_MAX: u64 = 64 * 1024;
/// How long one name server may take, and how often it is asked: together less than the connect bound.
const ANSWER_TIME: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 2;
/// Addresses that are tried, at most.
const ADDRESSES_MAX: usize = 8;

/// The host's name servers, as its open resolv.conf names them.
#[derive(Clone)]
pub struct NameServers(Option<TokioResolver>);

impl NameServers {
    /// Those of this file.
    ///
    /// # Errors
    /// Where the file cannot be read. One that names no server leaves only names that need none.
    pub fn new(resolv_conf: OwnedFd) -> Result<NameServers> {
        let mut text = Vec::new();
        File::from(resolv_conf).take(RESOLV_CONF_BYTES_MAX).read_to_end(&mut text)?;
        Ok(NameServers(parse_resolv_conf(&text).ok().and_then(|(config, mut options)| {
            options.use_hosts_file = ResolveHosts::Never;
            options.timeout = ANSWER_TIME;
            options.attempts = ATTEMPTS;
            let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
            builder.with_options(options).build().ok()
        })))
    }

    /// All addresses of a name, of both families; one question each.
    ///
    /// # Errors
    /// Where there is none.
    pub async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>> {
        let resolver = self.0.as_ref().ok_or_else(|| Error::other("resolv.conf names no server"))?;
        // The dot at the end keeps the search list of the host out of it.
        let found = resolver.lookup_ip(format!("{}.", name.trim_end_matches('.'))).await;
        Ok(found.map_err(|_| Error::other("the name does not resolve"))?.iter().collect())
    }
}

/// The resolver of the upstream's client.
#[derive(Clone)]
pub struct Resolve {
    host: Arc<str>,
    servers: NameServers,
}

impl Resolve {
    /// A resolver for this host only.
    pub fn new(host: &str, servers: NameServers) -> Resolve {
        Resolve { host: host.into(), servers }
    }

    async fn addresses(self, name: Name) -> Result<std::vec::IntoIter<SocketAddr>> {
        if name.as_str() != &*self.host {
            return Err(Error::other("a name that is not the upstream's"));
        }
        if name.as_str() == "localhost" {
            let own = vec![(Ipv4Addr::LOCALHOST, 0).into(), (Ipv6Addr::LOCALHOST, 0).into()];
            return Ok(own.into_iter());
        }
        let found = self.servers.addresses(name.as_str()).await?;
        let list: Vec<_> = found.into_iter().take(ADDRESSES_MAX).map(|address| (address, 0).into()).collect();
        Ok(list.into_iter())
    }
}

impl Service<Name> for Resolve {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Box::pin(self.clone().addresses(name))
    }
}
