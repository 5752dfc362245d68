//! Connections: where they come from, what they may cost, and how they end.
//! It must never serve more of them than their bound, nor wait for a silent one without a deadline.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::crowd::{Crowd, Place};
use super::entrance;
use super::http::{App, router};
use super::tls::HANDSHAKE_WAIT;
use super::wire::{HEAD_BYTES_MAX, HEAD_FIELDS_MAX, Heads, Wire};

/// Connections at the same time beside those of runs and of requests that wait for one, at most. Each costs a descriptor
/// and a few KiB. One more makes one end that carries no request; where all do, it waits, and nobody for it.
const CONNECTIONS_MORE: usize = 512;
/// How long a client may take for the head of a request, and how long an idle connection is kept.
const HEAD_WAIT: Duration = Duration::from_secs(30);
/// Bytes that a connection's buffer holds, at most: a head, and what is read at once of a body.
const BUFFER_BYTES_MAX: usize = HEAD_BYTES_MAX + 8 * 1024;
/// How long a connection that has not asked yet may do so when a drain begins.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// How long a drain waits for a connection on which nobody known has asked: for a page, and no longer.
const STRANGER_WAIT: Duration = Duration::from_secs(3);
/// A pause after a failed accept(2), so that a lack of descriptors is no busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The listening socket that the supervisor handed over.
///
/// # Errors
/// A descriptor that is no such socket.
pub fn listener(socket: OwnedFd) -> io::Result<TcpListener> {
    // By fcntl(2), not ioctl(2): the frontend's filter knows no ioctl.
    let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
    fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    TcpListener::from_std(socket.into())
}

/// Accepts connections to the end, in a drain too: whoever asks then is told, and goes elsewhere.
pub async fn serve(listener: TcpListener, frontend: App) {
    let runs = frontend.settings().runs.clone();
    let crowd = Crowd::new(runs.max as usize + runs.queue_max as usize + CONNECTIONS_MORE);
    let router = router(Arc::clone(&frontend));
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Nobody is ended for a connection that does not come, and nobody waits for one that waits for room.
        match crowd.try_enter(peer.ip()) {
            Some(place) => begin(stream, place, &router, &frontend),
            None => {
                let (crowd, router, frontend) = (Arc::clone(&crowd), router.clone(), Arc::clone(&frontend));
                tokio::spawn(async move {
                    if let Some(place) = crowd.enter(peer.ip()).await {
                        begin(stream, place, &router, &frontend);
                    }
                });
            }
        }
    }
}

fn begin(stream: TcpStream, place: Place, router: &Router, frontend: &App) {
    let connection = Arc::clone(place.connection());
    let task = tokio::spawn(arrival(stream, place, router.clone(), Arc::clone(frontend)));
    connection.is_served_by(task.abort_handle());
}

/// A connection from its first byte: under TLS where the listener has it, and never without it there.
async fn arrival(stream: TcpStream, place: Place, router: Router, frontend: App) {
    // Small events must not wait for large segments; where this fails they only come later.
    let _ = stream.set_nodelay(true);
    let Some(tls) = frontend.live().tls.clone() else {
        return connection(stream, place, router, frontend).await;
    };
    // A client that fails here has been told why by its own library; a line a failure would be anybody's to write.
    if let Ok(Ok(stream)) = timeout(HANDSHAKE_WAIT, tls.accept(stream)).await {
        connection(stream, place, router, frontend).await;
    }
}

async fn connection<S>(stream: S, place: Place, router: Router, frontend: App)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut draining = frontend.draining.subscribe();
    // One that comes in a drain gets one answer, and the drain does not wait for it: anybody could hold it up.
    let late = *draining.borrow();
    let busy = (!late).then(|| frontend.busy.subscribe());
    let heads = Arc::new(Heads::default());
    let service =
        service_fn(|request| entrance::pass(&router, &frontend, (place.connection(), &heads), request));
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(!late)
        .header_read_timeout(HEAD_WAIT)
        .max_buf_size(BUFFER_BYTES_MAX)
        .max_headers(HEAD_FIELDS_MAX)
        .serve_connection(TokioIo::new(Wire::new(stream, Arc::clone(&heads))), service);
    let mut serving = std::pin::pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => Some(ended),
        _ = draining.wait_for(|&draining| draining), if !late => None,
    };
    if ended.is_none() {
        if !place.connection().has_asked() {
            // Its first request may be on its way, and is to be told. Nobody waits for it, as for one that comes now.
            drop(busy);
            if timeout(FIRST_WAIT, serving.as_mut()).await.is_ok() {
                return;
            }
        }
        serving.as_mut().graceful_shutdown();
        if !place.connection().is_known() && timeout(STRANGER_WAIT, serving.as_mut()).await.is_err() {
            // Whatever it reads so slowly, or sends: it is nobody's for whom a drain would wait.
            return;
        }
        let _ = serving.await;
    }
}
