//! What a run's egress serves: the listeners, the proxy with the operator's hosts, and the ledger, as they came beside
//! a Serve. It must never take a descriptor for what it is not.

use std::fs::File;
use std::io::Result;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;

use gaoler_protocol::Serve;
use gaoler_seal::Vault;
use gaoler_sys::memfd;
use rustls::ClientConfig;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::hostile;
use crate::placeholder::Expected;
use crate::policy::EgressPolicy;
use crate::proxy::{self, Proxy, Terms};
use crate::resolve::NameServers;
use crate::tally::Tally;

/// Bytes of the operator's hosts.
const HOSTS_BYTES_MAX: usize = 64 * 1024;

/// The ways out of one cage.
pub struct Door {
    /// For the API.
    pub listener: UnixListener,
    /// For the proxy, where the level has one.
    pub proxy_listener: Option<TcpListener>,
    /// The proxy.
    pub proxy: Arc<Proxy>,
    /// Where it tells, at the end, where the run went.
    pub ledger: File,
    /// Who may come; 0 for anyone.
    peer_uid: u32,
}

impl Door {
    /// Reads the descriptors after the first two: hosts, ledger, listener, and perhaps the proxy's listener and the
    /// run's remote servers, for which `remote` is how TLS is spoken and what opens the operator's tokens.
    ///
    /// # Errors
    /// Any that is missing or something else, and a proxy where the level has none.
    pub fn new(
        serve: &Serve,
        policy: &EgressPolicy,
        servers: NameServers,
        tally: Arc<Tally>,
        remote: (Arc<ClientConfig>, Option<&Vault>),
        hosts: OwnedFd,
        mut fds: impl Iterator<Item = OwnedFd>,
    ) -> Result<Door> {
        let (Some(ledger), Some(listener)) = (fds.next(), fds.next()) else {
            return Err(hostile("descriptors are missing"));
        };
        let hosts = text(hosts).ok_or_else(|| hostile("the operator's hosts are no sealed text"))?;
        let (proxy_listener, remotes) = (fds.next(), fds.next());
        let (tls, vault) = remote;
        let (egress_mib, is_shared) = (serve.egress_mib, serve.peer_uid != 0);
        let opener = (vault, &serve.tenant);
        let terms = Terms { hosts: &hosts, remotes, opener, tls, egress_mib, is_shared };
        let expected = Expected::new(&serve.placeholder);
        let proxy = Proxy::new(policy, terms, servers, expected, tally)
            .ok_or_else(|| hostile("the operator's hosts or the run's servers are not what they must be"))?;
        if proxy_listener.is_some() && !proxy.is_there() {
            return Err(hostile("a listener for a proxy that the level does not have"));
        }
        Ok(Door {
            listener: unix_listener(listener)?,
            proxy_listener: proxy_listener.map(proxy::listener).transpose()?,
            proxy: Arc::new(proxy),
            ledger: proxy::ledger_pipe(ledger)?,
            peer_uid: serve.peer_uid,
        })
    }

    /// Whether a connection to the API's listener comes from the cage.
    pub fn admits(&self, stream: &UnixStream) -> bool {
        self.peer_uid == 0 || stream.peer_cred().is_ok_and(|peer| peer.uid() == self.peer_uid)
    }
}

/// A sealed text. It is the same memory file for all runs, whose egresses share the offset of its one open file: it is
/// read from places, so that none of them, taken over, can move what another one reads.
fn text(fd: OwnedFd) -> Option<String> {
    if !memfd::is_sealed(&fd, HOSTS_BYTES_MAX) {
        return None;
    }
    let file = File::from(fd);
    let mut bytes = vec![0; usize::try_from(file.metadata().ok()?.len()).ok()?];
    file.read_exact_at(&mut bytes, 0).ok()?;
    String::from_utf8(bytes).ok()
}

/// The cage's listener, if that is what it is: a listening unix socket.
fn unix_listener(fd: OwnedFd) -> Result<UnixListener> {
    let listener = StdUnixListener::from(fd);
    // Fails for a socket of another family, and for what is no socket.
    listener.local_addr().map_err(|_| hostile("the listener is no unix socket"))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}
