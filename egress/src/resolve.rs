//! Finds the upstream's addresses without opening a file: the host's resolv.conf was handed over open.
//! It must never ask for any name but the upstream's.

use std::fs::File;
use std::io::{Error, Read, Result};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
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

/// The resolver of one run.
#[derive(Clone)]
pub struct Resolve {
    host: Arc<str>,
    resolver: Option<TokioResolver>,
}

impl Resolve {
    /// A resolver for this host that asks the servers of this open resolv.conf.
    ///
    /// # Errors
    /// Where the file cannot be read. One that names no server leaves `localhost` and literal addresses.
    pub fn new(host: &str, resolv_conf: OwnedFd) -> Result<Resolve> {
        let mut text = Vec::new();
        File::from(resolv_conf).take(RESOLV_CONF_BYTES_MAX).read_to_end(&mut text)?;
        let resolver = parse_resolv_conf(&text).ok().and_then(|(config, mut options)| {
            options.use_hosts_file = ResolveHosts::Never;
            options.timeout = ANSWER_TIME;
            options.attempts = ATTEMPTS;
            let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
            builder.with_options(options).build().ok()
        });
        Ok(Resolve { host: host.into(), resolver })
    }

    async fn addresses(self, name: Name) -> Result<std::vec::IntoIter<SocketAddr>> {
        if name.as_str() != &*self.host {
            return Err(Error::other("a name that is not the upstream's"));
        }
        if name.as_str() == "localhost" {
            let own = vec![(Ipv4Addr::LOCALHOST, 0).into(), (Ipv6Addr::LOCALHOST, 0).into()];
            return Ok(own.into_iter());
        }
        let resolver = self.resolver.ok_or_else(|| Error::other("resolv.conf names no server"))?;
        // The dot at the end keeps the search list of the host out of it.
        let found = resolver.lookup_ip(format!("{}.", name.as_str().trim_end_matches('.'))).await;
        let found = found.map_err(|_| Error::other("the upstream's name does not resolve"))?;
        let list: Vec<_> = found.iter().take(ADDRESSES_MAX).map(|address| (address, 0).into()).collect();
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
