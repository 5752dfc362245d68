//! `gaoler-upstream`: the embedded model as a process. Supervised it finds its control socket at descriptor
//! 3 and a listening socket at 4; alone it is told where to listen. It must never outlive its supervisor.

#![forbid(unsafe_code)]

use std::io::{Error, ErrorKind, Result, Write};
use std::os::fd::{AsFd, RawFd};
use std::os::unix::net::UnixDatagram as StdUnixDatagram;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use gaoler_confine::{self as confine, Files, Process};
use gaoler_protocol::{FRAME_BYTES, Message, Ready, Role};
use gaoler_sys::channel;
use gaoler_upstream::serve;
use tokio::io::Interest;
use tokio::net::{TcpListener, UnixDatagram};

const USAGE: &str = "usage: gaoler-upstream [--listen HOST:PORT]
Without --listen: supervised, with a control socket at descriptor 3 and a listening socket at 4.";

/// The descriptor of the listening socket.
const LISTENER_FD: RawFd = 4;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        [] => confine::before_threads(Files::None)
            .map_err(Error::other)
            .and_then(|_abi| runtime()?.block_on(supervised())),
        ["--listen", address] => runtime().and_then(|runtime| runtime.block_on(alone(address))),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(64);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gaoler-upstream: {error}");
            ExitCode::FAILURE
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Listens at this address and says so, until it is killed.
async fn alone(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).await?;
    println!("ready {}", serve::address(&listener)?);
    std::io::stdout().flush()?;
    serve::serve(listener).await
}

/// Serves what it was handed, until the control socket ends.
async fn supervised() -> Result<()> {
    static LISTENER: AtomicBool = AtomicBool::new(false);
    let missing = |what| Error::new(ErrorKind::NotFound, what);
    let control = channel::inherited_control().ok_or_else(|| missing("descriptor 3 is no control socket"))?;
    let listener = channel::take_inherited(LISTENER_FD, &LISTENER)
        .ok_or_else(|| missing("descriptor 4 is no listening socket"))?;
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    // tokio has no type for SOCK_SEQPACKET; its datagram type serves, since only readiness is asked of it.
    let control = StdUnixDatagram::from(control);
    control.set_nonblocking(true)?;
    let control = UnixDatagram::from_std(control)?;
    confine::after_threads(Process::Upstream).map_err(Error::other)?;
    if !confine::failed_open() {
        return Err(Error::other("a file could be opened after the confinement"));
    }
    let ready = Message::Ready(Ready { role: Role::Upstream, threads: 1 });
    channel::send(control.as_fd(), &ready.encode(1), &[])?;
    tokio::select! {
        ended = end_of(&control) => ended,
        stopped = serve::serve(listener) => stopped,
    }
}

/// Waits for the end of the control socket. The supervisor has nothing to say to this process, so any frame
/// is an error.
async fn end_of(control: &UnixDatagram) -> Result<()> {
    let receive = || channel::receive::<FRAME_BYTES>(control.as_fd());
    match control.async_io(Interest::READABLE, receive).await {
        Ok(frame) if frame.bytes.is_empty() => Ok(()),
        Ok(_) => Err(Error::new(ErrorKind::InvalidData, "an unexpected control message")),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error),
    }
}
