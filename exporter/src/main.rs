//! `gaoler-exporter`: takes spans that have ended from the frontend and sends them to the operator's collector, by OTLP
//! over HTTP. It finds its control socket at descriptor 3, its settings at 4, the spans at 5 and the host's resolv.conf
//! at 6. It must never reach anybody but the collector, hold a run up, or keep more than its bounds.

#![forbid(unsafe_code)]

mod collector;
mod otlp;
mod resolve;
mod send;
mod spans;

use std::io::{Error, ErrorKind, Result, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram as StdUnixDatagram;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use gaoler_confine::{self as confine, Files, Process};
use gaoler_exporter_wire::{SETTINGS_BYTES_MAX, Settings, decode};
use gaoler_protocol::{FRAME_BYTES, Message, Ready, Role};
use gaoler_sys::{channel, memfd};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

use crate::collector::Collector;

/// The port of name servers, which are asked over TCP where an answer is too long for UDP.
const DNS_PORT: u16 = 53;
/// The descriptors beside the control socket.
const SETTINGS_FD: RawFd = 4;
const SPANS_FD: RawFd = 5;
const RESOLVER_FD: RawFd = 6;
/// How long it may still send when the supervisor ends it: the supervisor waits for a second.
const LAST_SEND: Duration = Duration::from_millis(700);

fn main() -> ExitCode {
    if std::env::args_os().len() > 1 {
        eprintln!("usage: gaoler-exporter, started by gaoler-supervisor alone");
        return ExitCode::from(64);
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log("failed", &[("error", error.to_string().into())]);
            ExitCode::FAILURE
        }
    }
}

/// One line on stderr. It must never hold a header.
fn log(event: &str, fields: &[(&str, serde_json::Value)]) {
    let mut line = serde_json::json!({ "process": "exporter", "event": event });
    fields.iter().for_each(|(name, value)| line[*name] = value.clone());
    // In one piece: others write to the same place.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// What it was handed.
struct Handed {
    control: UnixDatagram,
    settings: Settings,
    spans: OwnedFd,
    resolver: OwnedFd,
}

fn handed() -> Result<Handed> {
    static SETTINGS: AtomicBool = AtomicBool::new(false);
    static SPANS: AtomicBool = AtomicBool::new(false);
    static RESOLVER: AtomicBool = AtomicBool::new(false);
    let missing = |what| Error::new(ErrorKind::NotFound, what);
    let control = channel::inherited_control().ok_or_else(|| missing("descriptor 3 is no control socket"))?;
    let settings = channel::take_inherited(SETTINGS_FD, &SETTINGS)
        .ok_or_else(|| missing("descriptor 4 is not open"))
        .and_then(|fd| memfd::read(fd, SETTINGS_BYTES_MAX))?;
    let settings = decode(&settings).ok_or_else(|| missing("descriptor 4 has no settings"))?;
    let take = |fd, taken, what| channel::take_inherited(fd, taken).ok_or_else(|| missing(what));
    let spans = take(SPANS_FD, &SPANS, "descriptor 5 is not open")?;
    let resolver = take(RESOLVER_FD, &RESOLVER, "descriptor 6 is not open")?;
    // tokio has no type for SOCK_SEQPACKET; its datagram type serves, since only readiness is asked of it.
    let control = StdUnixDatagram::from(control);
    control.set_nonblocking(true)?;
    Ok(Handed { control: UnixDatagram::from_std(control)?, settings, spans, resolver })
}

/// Confines itself in two steps, around the only question that it has for a name server.
fn run() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let Handed { control, settings, spans, resolver } = handed()?;
        let target = collector::Target::of(&settings)?;
        confine::before_threads(Files::ButConnect(&[target.port, DNS_PORT])).map_err(Error::other)?;
        let addresses = tokio::select! {
            addresses = resolve::addresses(&target, resolver) => addresses?,
            ended = end_of(&control) => return ended,
        };
        confine::before_threads(Files::ButConnect(&[target.port])).map_err(Error::other)?;
        let collector = Collector::new(&settings, &target, addresses)?;
        confine::after_threads(Process::Exporter).map_err(Error::other)?;
        if !confine::failed_open() {
            return Err(Error::other("a file could be opened after the confinement"));
        }
        let ready = Message::Ready(Ready { role: Role::Exporter, threads: 1 });
        channel::send(control.as_fd(), &ready.encode(1), &[])?;
        let (queue, source) = spans::queue(spans)?;
        let sending = send::send(&collector, target.is_named(), queue);
        let ended = async {
            let ended = end_of(&control).await;
            source.close();
            ended
        };
        // Both go on to their end: what was handed over before the end is sent, for as long as there is time.
        let last = async {
            ended.await?;
            tokio::time::sleep(LAST_SEND).await;
            Ok(())
        };
        tokio::select! {
            ended = last => ended,
            sent = sending => sent,
            failed = source.read() => failed,
        }
    })
}

/// Waits for the end of the control socket. The supervisor has nothing to say to this process, so any frame is an error.
async fn end_of(control: &UnixDatagram) -> Result<()> {
    let receive = || channel::receive::<FRAME_BYTES>(control.as_fd());
    match control.async_io(Interest::READABLE, receive).await {
        Ok(frame) if frame.bytes.is_empty() => Ok(()),
        Ok(_) => Err(Error::new(ErrorKind::InvalidData, "an unexpected control message")),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error),
    }
}
