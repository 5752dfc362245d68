//! The frontend: it speaks HTTP with clients, and asks the supervisor for everything else.
//! It must never open a file, connect to anything or execute anything; it starts by taking that from itself.

mod admin;
mod admission;
mod answer;
mod bodies;
mod books;
mod budget;
pub mod cli;
mod completions;
mod connections;
mod counts;
mod crowd;
mod dialect;
mod docs;
mod entrance;
mod error;
mod files;
mod filing;
mod forms;
mod http;
mod id;
pub mod identity;
pub mod job;
mod json;
mod ledger;
mod log;
mod mcp;
mod metrics;
mod models;
mod own;
mod posture;
mod prices;
mod prove;
mod rates;
mod reload;
mod repository;
mod run;
mod runs;
mod sent;
mod sessions;
mod sse;
mod tenant;
pub mod tls;
mod tokens;
mod trace;
mod vouching;
mod waits;
mod way;
mod wire;
mod workspaces;

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::{ArcSwap, Guard};
use bytes::Bytes;
use nix::sys::signal::{SigSet, Signal};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_rustls::TlsAcceptor;

use gaoler_confine::{self as confine, Files, Process};
use gaoler_policy::settings::Settings;
use gaoler_protocol::{Empty, Layers, Listen, Message, Proven, Ready, Refusal, Refused, Reload, Role, RunId};
use gaoler_seal::KEY_BYTES;
use gaoler_sys::{channel, memfd};

use admission::Admission;
use budget::Budgets;
use ledger::Ledger;
pub use prove::Check;
use reload::{Live, Reloads};
use run::{Ask, Run, Socket, Supervisor};
use runs::Runs;
use tenant::Secret;

/// Threads that serve, made before the filter. Two: the work is copying, and the cages need the cores more.
const WORKERS: usize = 2;
/// Those and the one that waits for them.
const THREADS: u32 = WORKERS as u32 + 1;
/// Threads beside them that read large bodies, where they are needed: one of those who are known and one of strangers.
const READERS: usize = 2;
/// Questions to the supervisor that wait for an answer, beyond the runs that may be running.
const PENDING_EXTRA: usize = 64;
/// The status of a frontend without a supervisor, and of one that could not start.
const GONE: u8 = 1;
/// Bytes of the settings' memory file, at most.
const SETTINGS_BYTES_MAX: usize = 1024 * 1024;

/// Whether the server drains and its load, and what /health says of that.
type Said = ((bool, (usize, usize)), Bytes);

/// Everything that a request needs.
pub struct Frontend {
    /// What a reload may change.
    live: ArcSwap<Live>,
    reloads: Reloads,
    secret: Secret,
    supervisor: Supervisor,
    ledger: Ledger,
    /// What stored credentials are sealed with.
    vault: [u8; KEY_BYTES],
    layers: OnceLock<Layers>,
    listen: OnceLock<Listen>,
    draining: watch::Sender<bool>,
    /// The supervisor has begun the drain, and there is no way back.
    ending: AtomicBool,
    /// One receiver a run that is alive, and a connection of before a drain: drained is who has none left.
    busy: watch::Sender<()>,
    /// What /health said last, and of which state.
    health: Mutex<Option<Said>>,
    /// Who may use how much.
    budgets: Arc<Budgets>,
    /// Who may start a run, and who waits.
    admission: Arc<Admission>,
    /// What bodies take.
    bodies: Arc<bodies::Bodies>,
    /// Who reads large bodies: of those who are known, and of strangers.
    readers: [Semaphore; READERS],
    /// The runs that clients know by name.
    runs: Arc<Runs>,
    /// Requests about files that are under way.
    filing: Arc<filing::Filing>,
    /// Where spans go.
    traces: trace::Traces,
    /// The runs that wait for their clients.
    waits: waits::Waits<way::Continued>,
    /// Who is known to the upstream.
    vouching: vouching::Vouching,
}

impl Frontend {
    /// What is in force: for a look, not to be kept.
    fn live(&self) -> Guard<Arc<Live>> {
        self.live.load()
    }

    /// The settings in force.
    fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.live().settings)
    }

    /// From the next request on.
    fn set_live(&self, live: Live) {
        self.live.store(Arc::new(live));
    }
}

/// What the frontend must keep to itself.
pub struct Secrets {
    /// The server's secret.
    pub server: [u8; 32],
    /// TLS of the listener, with its private key.
    pub tls: Option<TlsAcceptor>,
    /// The questions' socket. `None` only where the HTTP side is tested alone.
    pub ledger: Option<OwnedFd>,
    /// The public key that stored credentials are sealed with.
    pub vault: [u8; KEY_BYTES],
    /// The exporter's socket, where traces are wanted.
    pub spans: Option<OwnedFd>,
}

/// The hidden subcommand: takes descriptors 3 (control), 4 (settings), 5 (the server's secret) and 6 (the
/// listener's certificate and key, empty without TLS), 7 (the ledger), 8 (what credentials are sealed with) and, where
/// there is an exporter, 9 (its socket), and serves.
///
/// Returns only where it could not start, with the status to exit with.
pub fn from_descriptors() -> u8 {
    static SETTINGS: AtomicBool = AtomicBool::new(false);
    static SECRET: AtomicBool = AtomicBool::new(false);
    static TLS: AtomicBool = AtomicBool::new(false);
    static LEDGER: AtomicBool = AtomicBool::new(false);
    static VAULT: AtomicBool = AtomicBool::new(false);
    static SPANS: AtomicBool = AtomicBool::new(false);
    type Inherited = (OwnedFd, Settings, Secrets, Vec<u8>);
    let inherited = || -> Option<Inherited> {
        let control = channel::inherited_control()?;
        let settings = memfd::read(channel::take_inherited(4, &SETTINGS)?, SETTINGS_BYTES_MAX).ok()?;
        let settings: Settings = toml::from_str(std::str::from_utf8(&settings).ok()?).ok()?;
        let traced = !settings.telemetry.otlp_endpoint.is_empty();
        let secret = memfd::read(channel::take_inherited(5, &SECRET)?, 32).ok()?;
        let pair = memfd::read(channel::take_inherited(6, &TLS)?, tls::PEM_BYTES_MAX).ok()?;
        let ledger = channel::take_inherited(7, &LEDGER)?;
        let vault = memfd::read(channel::take_inherited(8, &VAULT)?, KEY_BYTES).ok()?.try_into().ok()?;
        let spans = if traced { Some(channel::take_inherited(9, &SPANS)?) } else { None };
        let server = secret.try_into().ok()?;
        let secrets = Secrets { server, tls: None, ledger: Some(ledger), vault, spans };
        Some((control, settings, secrets, pair))
    };
    match inherited() {
        Some((control, settings, secrets, pair)) => match with_tls(&settings, pair) {
            Ok(tls) => serve(control, settings, Secrets { tls, ..secrets }),
            Err(why) => {
                log::line("refused", &[("step", "TLS".into()), ("error", why.into())]);
                GONE
            }
        },
        None => {
            log::line("refused", &[("why", "gaoler frontend is started by gaoler-supervisor alone".into())]);
            GONE
        }
    }
}

/// TLS exactly where the settings ask for it: a key that was lost on the way must not become a plain listener.
fn with_tls(settings: &Settings, pair: Vec<u8>) -> Result<Option<TlsAcceptor>, String> {
    match (settings.server.tls_certificate.as_os_str().is_empty(), pair.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => {
            tls::from_both(pair).map(Some).map_err(|_| "the certificate and key are none".into())
        }
        _ => Err("the settings and what was handed over do not say the same".into()),
    }
}

/// Confines this process and serves until the supervisor goes away.
pub fn main(control: OwnedFd, settings: Settings, secrets: Secrets) -> ExitCode {
    serve(control, settings, secrets).into()
}

fn serve(control: OwnedFd, settings: Settings, secrets: Secrets) -> u8 {
    match confined(control, settings, secrets) {
        Ok(never) => match never {},
        Err((step, error)) => {
            log::line("refused", &[("step", step.into()), ("error", error.to_string().into())]);
            GONE
        }
    }
}

type Step = (&'static str, io::Error);

fn confined(control: OwnedFd, settings: Settings, secrets: Secrets) -> Result<Infallible, Step> {
    // The supervisor alone decides when to stop: it sends Drain, and a signal to the group means it, not us.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().map_err(|e| ("block signals", e.into()))?;
    // One large body, or many connections, must not cost memory for good.
    gaoler_sys::process::keep_little();
    confine::before_threads(Files::None).map_err(|e| (e.step, e.error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(READERS)
        .enable_io()
        .enable_time()
        .build()
        .map_err(|e| ("runtime", e))?;
    confine::after_threads(Process::Frontend).map_err(|e| (e.step, e.error))?;
    // A policy that does not hold is worse than none, for it is believed.
    if !confine::failed_open() {
        return Err(("a file could be opened after the confinement", io::ErrorKind::Other.into()));
    }
    runtime.block_on(converse(control, settings, secrets));
    // Exit takes every lease with it, so that no cage outlives this process. Nothing else is to be saved, and
    // a runtime that waits for its tasks would only keep clients in the dark.
    std::process::exit(i32::from(GONE))
}

/// What the rest of the frontend asks the control task to say.
enum Notice {
    Proven(Proven),
    Drained,
}

/// Speaks with the supervisor until it goes away. This is the frontend without its confinement, which tests
/// can run inside their own process.
pub async fn converse(control: OwnedFd, settings: Settings, secrets: Secrets) {
    let pending_max = settings.runs.max as usize + PENDING_EXTRA;
    let (supervisor, asks) = Supervisor::new(pending_max);
    let ledger = match Ledger::new(secrets.ledger) {
        Ok(ledger) => ledger,
        Err(error) => return log::line("ledger", &[("error", error.to_string().into())]),
    };
    let traces = match trace::Traces::new(secrets.spans, &settings) {
        Ok(traces) => traces,
        Err(error) => return log::line("exporter", &[("error", error.to_string().into())]),
    };
    let (reloads, begun) = Reloads::new();
    let frontend = Arc::new(Frontend {
        reloads,
        ledger,
        traces,
        vault: secrets.vault,
        admission: Admission::new(&settings.runs),
        budgets: Budgets::new(&settings),
        live: ArcSwap::from_pointee(Live::new(settings, secrets.tls)),
        secret: Secret::new(secrets.server),
        supervisor,
        layers: OnceLock::new(),
        listen: OnceLock::new(),
        health: Mutex::default(),
        draining: watch::Sender::new(false),
        ending: AtomicBool::new(false),
        busy: watch::Sender::new(()),
        bodies: Arc::default(),
        readers: std::array::from_fn(|_| Semaphore::new(1)),
        runs: Arc::default(),
        filing: Arc::default(),
        waits: waits::Waits::default(),
        vouching: vouching::Vouching::default(),
    });
    let runs = Arc::clone(&frontend.runs);
    tokio::spawn(async move { runs.sweep().await });
    let control = match Socket::new(control) {
        Ok(control) => control,
        Err(error) => return log::line("supervisor", &[("error", error.to_string().into())]),
    };
    let mut task = Control { socket: control, sequence: 0, pending: HashMap::new(), pending_max };
    if let Err(error) = task.serve(&frontend, asks, begun).await {
        log::line("supervisor", &[("error", error.to_string().into())]);
    }
}

/// The only owner of the control socket.
struct Control {
    socket: Socket,
    sequence: u64,
    pending: HashMap<RunId, oneshot::Sender<Result<Run, Refused>>>,
    pending_max: usize,
}

impl Control {
    async fn serve(
        &mut self,
        frontend: &Arc<Frontend>,
        mut asks: mpsc::Receiver<Ask>,
        reload: reload::Ends,
    ) -> io::Result<()> {
        let (notices, mut noticed) = mpsc::channel(2);
        let reload::Ends { mut wishes, begun } = reload;
        tokio::spawn(reload::read(Arc::clone(frontend), begun));
        self.send(&Message::Ready(Ready { role: Role::Frontend, threads: THREADS }), &[]).await?;
        loop {
            tokio::select! {
                received = self.socket.receive() => match received? {
                    Some((message, fds)) => self.handle(message, fds, frontend, &notices)?,
                    None => return Ok(()),
                },
                Some(ask) = asks.recv() => self.ask(ask).await?,
                Some(asks) = wishes.recv() => self.send(&Message::Reload(Reload { asks }), &[]).await?,
                Some(notice) = noticed.recv() => match notice {
                    Notice::Proven(proven) => self.send(&Message::Proven(proven), &[]).await?,
                    Notice::Drained => self.send(&Message::Drained(Empty {}), &[]).await?,
                },
            }
        }
    }

    fn handle(
        &mut self,
        message: Message,
        mut fds: Vec<OwnedFd>,
        frontend: &Arc<Frontend>,
        notices: &mpsc::Sender<Notice>,
    ) -> io::Result<()> {
        match message {
            Message::Spawned(spawned) => {
                // A run that nobody waits for any more is dropped here, and its lease with it.
                let run = Run::new(spawned, fds)?;
                if let Some(reply) = self.pending.remove(&spawned.run) {
                    let _ = reply.send(Ok(run));
                }
            }
            Message::Refused(refused) => {
                if let Some(reply) = self.pending.remove(&refused.run) {
                    let _ = reply.send(Err(refused));
                }
            }
            Message::Layers(layers) => {
                let _ = frontend.layers.set(layers);
            }
            Message::Prove(asked) => {
                let (frontend, notices) = (Arc::clone(frontend), notices.clone());
                tokio::spawn(async move {
                    let proven = prove::prove(&frontend, asked.rules).await;
                    let _ = notices.send(Notice::Proven(proven)).await;
                });
            }
            Message::Listen(listen) => {
                let socket = fds.pop().ok_or_else(|| out_of_turn(&message))?;
                frontend.listen.set(listen).map_err(|_| out_of_turn(&message))?;
                let listener = connections::listener(socket)?;
                tokio::spawn(connections::serve(listener, Arc::clone(frontend)));
            }
            Message::Reload(Reload { asks }) => frontend.reloads.has_begun(asks, fds.pop())?,
            Message::Drain(_) => {
                // Under the lock of the drain, so that no end of another drain comes between.
                frontend.draining.send_modify(|draining| {
                    frontend.ending.store(true, Ordering::Relaxed);
                    *draining = true;
                });
                let (frontend, notices) = (Arc::clone(frontend), notices.clone());
                tokio::spawn(async move {
                    frontend.busy.closed().await;
                    let _ = notices.send(Notice::Drained).await;
                });
            }
            other => return Err(out_of_turn(&other)),
        }
        Ok(())
    }

    async fn ask(&mut self, ask: Ask) -> io::Result<()> {
        let Ask { spawn, fds, reply } = ask;
        if reply.is_closed() {
            return Ok(());
        }
        let refusal = Refused { run: spawn.run, reason: Refusal::Busy, step: 0, errno: 0 };
        if self.pending.len() >= self.pending_max {
            let _ = reply.send(Err(refusal));
            return Ok(());
        }
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        self.send(&Message::Spawn(spawn), &borrowed).await?;
        self.pending.insert(spawn.run, reply);
        Ok(())
    }

    async fn send(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.sequence += 1;
        let frame = message.encode(self.sequence);
        self.socket.send(&frame, fds).await
    }
}

fn out_of_turn(message: &Message) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{} out of turn", message.name()))
}
