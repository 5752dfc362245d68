//! The proxy of one run: CONNECT and plain HTTP to the hosts that its level names.
//! It must never know the credential, nor forward a byte to whom it has not judged.
//!
//! The way of a connection: [`host`] reads where it wants to go and looks it up in the level's list, [`dial`] finds
//! its addresses and lets [`address`] judge them, [`hello`] sees that TLS asks for the same name, [`forward`] takes
//! plain HTTP; [`remote`] is the way to the run's MCP servers and [`search`] the one back, [`flow`] counts and bounds the bytes, [`ledger`] keeps where they went.

mod address;
mod dial;
mod flow;
mod forward;
mod hello;
mod host;
mod ledger;
mod refused;
mod remote;
mod search;

use std::convert::Infallible;
use std::fs::File;
use std::io::Result;
use std::net::TcpListener as StdTcpListener;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use gaoler_protocol::Denial;
use hyper::body::Incoming;
use hyper::header::PROXY_AUTHORIZATION;
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ClientConfig;
use tokio::io::{AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use self::flow::{Budget, Metered, Pulse};
use self::hello::Hello;
use self::host::{Destination, List};
use self::ledger::{Ledger, RowId};
use self::refused::Refused;
use self::remote::{Opener, Remote, Remotes};
use crate::answer::{Answer, whole};
use crate::placeholder::Expected;
use crate::policy::{EgressPolicy, ProxyMode, ProxyPolicy};
use crate::resolve::NameServers;
use crate::tally::Tally;
use crate::wire::{Head, Watched};
use crate::{HEAD_BYTES_MIN, hostile};

/// How long the cage may take for a request's head, and for the first words of a tunnel's TLS.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Connections whose request is not read yet, beside those that are open: who is not of the cage may hold them.
const HEADS_MAX: usize = 64;
/// How long a request waits for one of the run's connections.
const SLOT_TIME: Duration = Duration::from_secs(1);
/// How long nothing is accepted after accept(2) failed, for want of descriptors mostly.
const PAUSE: Duration = Duration::from_millis(50);
/// The port on which TLS is spoken, and looked at.
const TLS_PORT: u16 = 443;
/// Bytes of a tunnel that are on their way, in each direction.
const COPY_BYTES: usize = 32 * 1024;
/// Bytes in a MiB.
const MIB: u64 = 1 << 20;

/// What a run's proxy needs. Nothing of the credential is among it; of what opens the run's other servers, all.
pub struct Proxy {
    policy: ProxyPolicy,
    head_bytes_max: u64,
    list: List,
    remotes: Remotes,
    tls: Arc<ClientConfig>,
    servers: NameServers,
    expected: Expected,
    /// Others than the cage can come to the listener.
    is_shared: bool,
    tally: Arc<Tally>,
    ledger: Arc<Ledger>,
    budget: Arc<Budget>,
    slots: Arc<Semaphore>,
}

/// Where a request goes.
struct Way<'a> {
    to: Destination,
    row: RowId,
    /// The server that the cage has a name of its own for.
    remote: Option<&'a Remote>,
}

/// How the supervisor wants it.
pub struct Terms<'a> {
    /// The operator's hosts, one a line.
    pub hosts: &'a str,
    /// The run's remote servers, sealed.
    pub remotes: Option<OwnedFd>,
    /// What opens sealed texts, and whose run this is.
    pub opener: Opener<'a>,
    /// How TLS is spoken with those.
    pub tls: Arc<ClientConfig>,
    /// MiB at most; 0 for the level's.
    pub egress_mib: u32,
    /// Others than the cage can come to the listener.
    pub is_shared: bool,
}

impl Proxy {
    /// One of this level. `None` where the operator's hosts, or the run's servers, cannot be read.
    pub fn new(
        policy: &EgressPolicy,
        terms: Terms<'_>,
        servers: NameServers,
        expected: Expected,
        tally: Arc<Tally>,
    ) -> Option<Proxy> {
        let proxy = policy.proxy;
        let asked = if terms.egress_mib == 0 { u32::MAX } else { terms.egress_mib };
        let list = List::new(&proxy, terms.hosts)?;
        Some(Proxy {
            remotes: match terms.remotes {
                Some(fd) => Remotes::read(fd, &list, terms.opener)?,
                None => Remotes::default(),
            },
            tls: terms.tls,
            list,
            head_bytes_max: policy.header_bytes_max,
            servers,
            expected,
            is_shared: terms.is_shared,
            tally,
            ledger: Arc::new(Ledger::new()),
            budget: Arc::new(Budget::new(u64::from(proxy.egress_mib.min(asked)) * MIB)),
            slots: Arc::new(Semaphore::new(proxy.connections_max as usize)),
            policy: proxy,
        })
    }

    /// Whether its level has a proxy at all.
    pub fn is_there(&self) -> bool {
        self.policy.mode != ProxyMode::None
    }

    /// Serves the cage until it is dropped, and every connection with it.
    pub async fn serve(self: &Arc<Proxy>, listener: &TcpListener) -> Infallible {
        let connections_max = self.policy.connections_max as usize + HEADS_MAX;
        let mut connections = JoinSet::new();
        loop {
            let open = connections.len() < connections_max;
            tokio::select! {
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = listener.accept(), if open => match accepted {
                    Ok((stream, _)) => drop(connections.spawn(connection(self.clone(), stream))),
                    Err(_) => tokio::time::sleep(PAUSE).await,
                }
            }
        }
    }

    /// Tells where the run went.
    pub fn write_ledger(&self, pipe: File) {
        self.ledger.write(pipe);
    }

    /// Answers one request, whose head was `plain` or not. A tunnel is left in `held`, for its connection to run once the answer is sent.
    async fn answer(
        &self,
        mut request: Request<Incoming>,
        plain: bool,
        pulse: Arc<Pulse>,
        held: &Mutex<Option<Tunnel>>,
    ) -> Response<Answer> {
        let upgrade = hyper::upgrade::on(&mut request);
        let (head, body) = request.into_parts();
        let answered = match self.admit(&head, plain) {
            Ok(way) => match self.connect(&way, pulse).await {
                Ok(server) if head.method == Method::CONNECT => {
                    let tunnel = Tunnel { upgrade, to: way.to, server };
                    *held.lock().unwrap_or_else(PoisonError::into_inner) = Some(tunnel);
                    Ok(Response::new(whole(Bytes::new())))
                }
                Ok(server) => match way.remote {
                    Some(remote) => remote.forward(head, body, server, &self.tls, &self.tally).await,
                    None => forward::forward(head, body, &way.to, server).await,
                },
                Err(refused) => {
                    if refused.denial().is_some() {
                        self.ledger.refused(way.row);
                    }
                    Err(refused)
                }
            },
            Err(refused) => Err(refused),
        };
        answered.unwrap_or_else(|refused| {
            if let Some(denial) = refused.denial() {
                self.tally.refuse(denial);
            }
            refused.response().map(whole)
        })
    }

    /// Whether a request may go where it wants to, as far as its head tells; and the way.
    fn admit(&self, head: &Parts, plain: bool) -> std::result::Result<Way<'_>, Refused> {
        if !plain || head.headers.get_all(PROXY_AUTHORIZATION).iter().count() > 1 {
            return Err(Refused::Framing);
        }
        if self.is_shared {
            match self.expected.is_in_proxy(&head.headers) {
                Some(true) => {}
                Some(false) => return Err(Refused::Stranger),
                None => return Err(Refused::Unnamed),
            }
        }
        // hyper bounds what it reads of a head only roughly.
        let fields = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len());
        let bytes = fields.sum::<usize>() + head.uri.to_string().len();
        if bytes as u64 > self.head_bytes_max {
            return Err(Refused::Head);
        }
        let refuse = |to: Option<&Destination>, why: Refused| {
            self.ledger.refused(self.ledger.row(to));
            Err(why)
        };
        let wanted = match head.method {
            Method::TRACE => Err(Refused::Shape),
            Method::CONNECT => forward::tunnel(head),
            _ => forward::destination(head),
        };
        let to = match wanted {
            Ok(to) => to,
            Err(Refused::Spelling) => return refuse(None, Refused::Spelling),
            Err(other) => return Err(other),
        };
        let remote = self.remotes.of(&to.host);
        let to = match remote {
            // The cage's name for it is one for plain requests: what opens the server is added to each.
            Some(_) if head.method == Method::CONNECT || to.port != forward::HTTP_PORT => {
                return Err(Refused::Shape);
            }
            Some(remote) if !remote.is_allowed(&self.list) => return refuse(Some(&remote.to), Refused::Host),
            Some(remote) if !remote.permits(head) => return refuse(Some(&remote.to), Refused::Place),
            Some(remote) => remote.to.clone(),
            None if !self.list.names(&to) => return refuse(Some(&to), Refused::Host),
            None => to,
        };
        if self.budget.is_spent() {
            return refuse(Some(&to), Refused::Bytes);
        }
        let row = self.ledger.row(Some(&to));
        Ok(Way { to, row, remote })
    }

    /// A connection to a destination that is allowed.
    async fn connect(&self, way: &Way<'_>, pulse: Arc<Pulse>) -> std::result::Result<Metered, Refused> {
        let (row, internal) = (way.row, way.remote.is_some_and(|remote| remote.internal));
        let slot = match timeout(SLOT_TIME, self.slots.clone().acquire_owned()).await {
            Ok(Ok(slot)) => slot,
            // It is never closed; whichever it was, there is none.
            Ok(Err(_)) | Err(_) => return Err(Refused::Connections),
        };
        let time = Duration::from_millis(self.policy.dial_ms.into());
        let (stream, address) = dial::dial(&self.servers, &way.to, internal, time).await?;
        self.ledger.connected(row, address);
        let (budget, ledger) = (self.budget.clone(), self.ledger.clone());
        Ok(Metered { stream, budget, ledger, row, pulse, _slot: slot })
    }
}

/// One connection from the cage: one request, and the tunnel that it may become.
async fn connection(proxy: Arc<Proxy>, stream: TcpStream) {
    let pulse = Arc::new(Pulse::new());
    let idle = Duration::from_millis(proxy.policy.idle_ms.into());
    let spent = proxy.budget.spent();
    tokio::select! {
        () = attend(&proxy, stream, pulse.clone()) => {}
        () = pulse.stops(idle) => {}
        () = spent => {}
    }
    // Whoever used the last byte comes by here too.
    if proxy.budget.is_told_spent() {
        proxy.tally.refuse(Denial::Quota);
    }
}

async fn attend(proxy: &Arc<Proxy>, stream: TcpStream, pulse: Arc<Pulse>) {
    let _ = stream.set_nodelay(true);
    let held = Mutex::new(None);
    let head_bytes = usize::try_from(proxy.head_bytes_max).unwrap_or(HEAD_BYTES_MIN).max(HEAD_BYTES_MIN);
    let seen = Head::default();
    let stream = Watched::new(stream, seen.clone());
    let answer = service_fn(|request| {
        let (pulse, plain) = (pulse.clone(), seen.is_plain());
        let held = &held;
        async move { Ok::<_, Infallible>(proxy.answer(request, plain, pulse, held).await) }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(head_bytes)
        .half_close(true)
        .keep_alive(false);
    let served = builder.serve_connection(TokioIo::new(stream), answer).with_upgrades().await;
    if served.is_err_and(|error| error.is_parse()) {
        proxy.tally.refuse(Denial::Path);
    }
    let tunnel = held.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(tunnel) = tunnel {
        tunnel.run(proxy).await;
    }
}

/// A CONNECT that was answered with 200.
struct Tunnel {
    upgrade: OnUpgrade,
    to: Destination,
    server: Metered,
}

impl Tunnel {
    /// Moves bytes until one side has enough.
    async fn run(mut self, proxy: &Proxy) {
        let Ok(upgraded) = self.upgrade.await else { return };
        let mut cage = TokioIo::new(upgraded);
        if self.to.port == TLS_PORT {
            match timeout(HEAD_TIME, Hello::read(&mut cage)).await {
                Ok(Ok(Some(hello))) if hello.is_for(&self.to.host) => {
                    if self.server.write_all(&hello.bytes).await.is_err() {
                        return;
                    }
                }
                Ok(Ok(None)) => return,
                Ok(Ok(Some(_)) | Err(_)) | Err(_) => {
                    proxy.ledger.refused(self.server.row);
                    proxy.tally.refuse(Denial::Name);
                    let _ = cage.write_all(&hello::ALERT).await;
                    let _ = cage.shutdown().await;
                    return;
                }
            }
        }
        let _ = copy_bidirectional_with_sizes(&mut cage, &mut self.server, COPY_BYTES, COPY_BYTES).await;
    }
}

/// The proxy's listener, if that is what it is: a TCP socket on the cage's loopback.
///
/// # Errors
/// Anything else.
pub fn listener(fd: OwnedFd) -> Result<TcpListener> {
    let listener = StdTcpListener::from(fd);
    let is_loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
    if !is_loopback {
        return Err(hostile("the proxy's listener is no TCP socket on loopback"));
    }
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// The write end of the ledger.
///
/// # Errors
/// Anything else.
pub fn ledger_pipe(fd: OwnedFd) -> Result<File> {
    ledger::pipe(fd).map_err(|_| hostile("the ledger is no pipe"))
}
