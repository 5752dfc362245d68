//! `gaoler-egress`: the credential broker of one run, the only door out of its cage. It holds exactly one
//! credential, gives it to exactly one upstream, and must never outlive its run or show what it holds.
//!
//! The way of a request: [`wire`] and [`head`] judge how it is put and where it goes, [`body`] what it asks for, [`relay`] takes it to the
//! [`upstream`] and the answer back past [`meter`] and [`scan`]; [`tally`] keeps the counts, which [`control`]
//! tells the supervisor. Beside that stands the [`proxy`], for what is not the upstream; it has no credential.

#![forbid(unsafe_code)]

mod answer;
mod arguments;
mod body;
mod control;
mod credential;
mod door;
mod head;
mod meter;
mod placeholder;
mod policy;
mod proxy;
mod refusal;
mod relay;
mod resolve;
mod scan;
mod tally;
mod upstream;
mod wire;

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io::{Error, ErrorKind, Result, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use gaoler_confine::{self as confine, Files, Process};
use gaoler_protocol::{Denial, Message, Ready, Role, RunId, Serve, Totals, Vouched};
use gaoler_seal::{KEY_BYTES, Vault};
use gaoler_sys::{channel, memfd};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use crate::arguments::{Arguments, USAGE};
use crate::control::Control;
use crate::credential::Credential;
use crate::door::Door;
use crate::policy::EgressPolicy;
use crate::relay::Job;
use crate::resolve::NameServers;
use crate::tally::Tally;

/// How long the cage may take for a request's head.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// The port of name servers, which are asked over TCP where an answer is too long for UDP.
const DNS_PORT: u16 = 53;
/// The least buffer that hyper takes for a head.
const HEAD_BYTES_MIN: usize = 8192;
/// The descriptor of the key that opens stored credentials, where there is one.
const VAULT_FD: RawFd = 4;
/// Statuses of this process.
const USAGE_ERROR: u8 = 64;
const HOSTILE_CONTROL: u8 = 2;

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("gaoler-egress: {why}\n{USAGE}");
            return ExitCode::from(USAGE_ERROR);
        }
    };
    let log = Log::default();
    match run(arguments, &log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.failed(&error);
            ExitCode::from(if error.kind() == ErrorKind::InvalidData { HOSTILE_CONTROL } else { 1 })
        }
    }
}

/// Makes ready, confines itself, serves.
fn run(arguments: Arguments, log: &Log) -> Result<()> {
    let tls = upstream::tls(arguments.ca_file.as_deref())?;
    let vault = RefCell::new(vault());
    let mut ports = arguments.connect.clone();
    ports.extend([arguments.upstream.port, DNS_PORT]);
    confine::before_threads(Files::ButConnect(&ports)).map_err(Error::other)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let control = Control::take()?;
        confine::after_threads(Process::Egress).map_err(Error::other)?;
        if !confine::failed_open() {
            return Err(Error::other("a file could be opened after the confinement"));
        }
        control.send(Message::Ready(Ready { role: Role::Egress, threads: 1 })).await?;
        let broker = Broker { arguments, tls, control, vault, log };
        // Said before the control socket closes: whoever sees its end ends this process.
        broker.attend().await.inspect_err(|error| log.failed(error))
    })
}

/// What the supervisor said.
enum Told {
    Serve(Serve, Vec<OwnedFd>),
    Revoke,
    /// The supervisor is gone.
    End,
}

/// This process, once it is confined.
struct Broker<'a> {
    arguments: Arguments,
    tls: rustls::ClientConfig,
    control: Control,
    /// Until the run's credential has been opened for the last time.
    vault: RefCell<Option<Vault>>,
    log: &'a Log,
}

impl Broker<'_> {
    /// Does what it is told until the end: vouches where asked to, then serves.
    async fn attend(&self) -> Result<()> {
        let (serve, fds) = match self.told().await? {
            Told::Serve(serve, fds) => (serve, fds),
            Told::Revoke => return self.revoked(nothing(RunId([0; 16]))).await,
            Told::End => return Ok(()),
        };
        self.log.run.set(Some(serve.run));
        let (job, door) = self.job(serve, fds)?;
        if serve.vouch {
            let (status, after) = tokio::select! {
                said = job.vouch() => said,
                told = self.told() => return self.end(told?, &job.tally, door).await,
            };
            let accepted = upstream::is_accepted(status);
            self.log.event("vouched", &[("status", &status.to_string())]);
            self.control.send(Message::Vouched(Vouched { run: serve.run, accepted, status, after })).await?;
        }
        if let Some(door) = door {
            return self.serve(job, door).await;
        }
        if !serve.vouch {
            return Err(hostile("neither a listener nor something to vouch for"));
        }
        let (again, fds) = match self.told().await? {
            Told::Serve(again, fds) if again.run == serve.run && !again.vouch => (again, fds),
            Told::Serve(..) => return Err(hostile("a second run, or a second vouching")),
            told => return self.end(told, &job.tally, None).await,
        };
        match self.job(again, fds)? {
            (job, Some(door)) => self.serve(job, door).await,
            (_, None) => Err(hostile("nothing to serve")),
        }
    }

    /// Reads what came beside a Serve: what the upstream's side needs, and the door, if the run is there already.
    fn job(&self, serve: Serve, fds: Vec<OwnedFd>) -> Result<(Job, Option<Door>)> {
        let mut fds = fds.into_iter();
        let (Some(credential), Some(resolv_conf)) = (fds.next(), fds.next()) else {
            return Err(hostile("descriptors are missing"));
        };
        let vault = self.vault.take();
        let credential = Credential::read(credential, vault.as_ref(), &serve.tenant)
            .ok_or_else(|| hostile("the credential is unusable"))?;
        let policy =
            EgressPolicy::of(serve.level).ok_or_else(|| Error::other("a level that is not there"))?;
        let Arguments { upstream, silence, requests_max, .. } = &self.arguments;
        let servers = NameServers::new(resolv_conf)?;
        let client = upstream::client(self.tls.clone(), upstream, servers.clone());
        let job = Job::new(serve, policy, credential, client, upstream.clone(), *silence, *requests_max);
        let door = match fds.next() {
            None => {
                self.vault.replace(vault);
                None
            }
            // The key that opens others' too is dropped before anybody of the cage can come.
            Some(hosts) => {
                let tls = Arc::new(self.tls.clone());
                let (tally, vault) = (job.tally.clone(), vault.as_ref());
                Some(Door::new(&serve, &policy, servers, tally, (tls, vault), hosts, fds)?)
            }
        };
        Ok((job, door))
    }

    /// Serves the cage until it is told to stop.
    async fn serve(&self, job: Job, door: Door) -> Result<()> {
        let job = Arc::new(job);
        let connections_max = usize::try_from(job.policy.connections_max).unwrap_or(1);
        let requests = Arc::new(AtomicU64::new(0));
        let mut connections = JoinSet::new();
        let mut proxying = Box::pin(async {
            match &door.proxy_listener {
                Some(listener) => door.proxy.serve(listener).await,
                None => std::future::pending().await,
            }
        });
        let told = loop {
            let open = connections.len() < connections_max && job.tally.is_open();
            tokio::select! {
                told = self.told() => break told?,
                never = &mut proxying => match never {},
                () = job.tally.changed() => {
                    // As each answer ends: whoever keeps a budget reads it while the run lives.
                    job.tally.write(&door.ledger);
                    self.tell(&job.tally).await?;
                }
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = door.listener.accept(), if open => {
                    if let Ok((stream, _)) = accepted {
                        if door.admits(&stream) {
                            connections.spawn(connection(job.clone(), stream, requests.clone()));
                        } else {
                            job.tally.refuse(Denial::Placeholder);
                        }
                    }
                }
            }
        };
        if matches!(told, Told::Serve(..)) {
            return Err(hostile("a second listener"));
        }
        // Who stands in the doors first; what they had counted is in the totals after that.
        drop(proxying);
        connections.shutdown().await;
        let tally = job.tally.clone();
        // The last owner: this zeroes the credential.
        drop(job);
        self.end(told, &tally, Some(door)).await
    }

    /// Waits for the supervisor's next word.
    async fn told(&self) -> Result<Told> {
        match self.control.next().await? {
            None => Ok(Told::End),
            Some((Message::Serve(serve), fds)) => Ok(Told::Serve(serve, fds)),
            Some((Message::Revoke(_), _)) => Ok(Told::Revoke),
            Some((other, _)) => Err(hostile(other.name())),
        }
    }

    /// Closes the door, tells where the run went, and then how much went.
    async fn end(&self, told: Told, tally: &Tally, door: Option<Door>) -> Result<()> {
        if let Some(Door { proxy, ledger, .. }) = door {
            // First, so that what was not told yet has room.
            tally.write(&ledger);
            proxy.write_ledger(ledger);
        }
        match told {
            Told::End => Ok(()),
            Told::Serve(..) => Err(hostile("Serve out of turn")),
            Told::Revoke => {
                self.tell(tally).await?;
                self.revoked(tally.totals()).await
            }
        }
    }

    async fn revoked(&self, totals: Totals) -> Result<()> {
        self.log.event("revoked", &[("requests", &totals.requests.to_string())]);
        self.control.send(Message::Revoked(totals)).await
    }

    /// Tells the supervisor what it has not heard yet.
    async fn tell(&self, tally: &Tally) -> Result<()> {
        for message in tally.take_untold() {
            match &message {
                Message::Denied(denied) => self.log.event("denied", &[("what", denied.what.name())]),
                Message::Counted(totals) => {
                    self.log.event("answered", &[("status", &totals.status.to_string())])
                }
                _ => {}
            }
            self.control.send(message).await?;
        }
        Ok(())
    }
}

/// One connection from the cage: one request. Without keep-alive there is no second request whose beginning
/// anybody could argue about, and on this machine a new connection costs next to nothing.
async fn connection(job: Arc<Job>, stream: UnixStream, requests: Arc<AtomicU64>) {
    let head_bytes =
        usize::try_from(job.policy.header_bytes_max).unwrap_or(HEAD_BYTES_MIN).max(HEAD_BYTES_MIN);
    let tally = job.tally.clone();
    let seen = wire::Head::default();
    let stream = wire::Watched::new(stream, seen.clone());
    let answer = service_fn(move |request| {
        let (job, number) = (job.clone(), requests.fetch_add(1, Ordering::Relaxed));
        let plain = seen.is_plain();
        async move {
            let id = format!("req_gaoler{number:08x}");
            Ok::<_, Infallible>(job.answer(request, plain, &id).await)
        }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(head_bytes)
        .keep_alive(false);
    // hyper has answered what it could not parse with 400 or 431; that is a denial like any other.
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), answer).await
        && error.is_parse()
    {
        tally.deny(Denial::Path);
    }
}

/// The key that opens stored credentials. Read at an offset: every egress has the same open file.
fn vault() -> Option<Vault> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let file = channel::take_inherited(VAULT_FD, &TAKEN).filter(|fd| memfd::is_sealed(fd, KEY_BYTES))?;
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    std::fs::File::from(file).read_exact_at(bytes.as_mut_slice(), 0).ok()?;
    Some(Vault::of(*bytes))
}

fn nothing(run: RunId) -> Totals {
    Tally::new(run).totals()
}

/// The supervisor, or whoever took its place, does not keep to the list.
fn hostile(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("control: {what}"))
}

/// One JSON line per decision on stderr: ids and words of ours only.
#[derive(Default)]
struct Log {
    run: Cell<Option<RunId>>,
    has_failed: Cell<bool>,
}

impl Log {
    /// Once. The error's text is ours or the kernel's: nothing of a tenant or an upstream gets into one.
    fn failed(&self, error: &Error) {
        if !self.has_failed.replace(true) {
            self.event("failed", &[("error", &error.to_string())]);
        }
    }

    fn event(&self, event: &str, more: &[(&str, &str)]) {
        let mut line = serde_json::Map::new();
        line.insert("process".into(), "egress".into());
        line.insert("event".into(), event.into());
        if let Some(run) = self.run.get() {
            line.insert("run".into(), run.to_string().into());
        }
        line.extend(more.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())));
        // In one piece: others write to the same place.
        let line = format!("{}\n", serde_json::Value::Object(line));
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}
