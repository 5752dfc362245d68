//! The socket to the frontend: spans come, and what became of them goes back.
//! It must never wait for the frontend, nor take a frame that is not exactly one of the list.

use std::cell::{Cell, RefCell};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdUnixDatagram;
use std::rc::Rc;

use gaoler_exporter_wire::{FRAME_BYTES_MAX, Frame, Report, Span, decode, encode};
use gaoler_sys::channel;
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::sync::mpsc;

/// Spans that wait for the collector, at most; what comes beyond is dropped.
const WAITING_MAX: usize = 4096;
/// Frames that are still taken when the end has come: more do not fit the socket.
const LAST_FRAMES_MAX: usize = 4096;

/// What became of spans, told to the frontend when it has room for it.
struct Tally {
    socket: UnixDatagram,
    untold: Cell<Report>,
}

impl Tally {
    fn add(&self, add: impl FnOnce(&mut Report)) {
        let mut report = self.untold.get();
        add(&mut report);
        let frame = encode(&report).unwrap_or_default();
        let sent = channel::send(self.socket.as_fd(), &frame, &[]);
        self.untold.set(if sent.is_ok() { Report::default() } else { report });
    }
}

/// Where spans come from.
pub struct Source {
    tally: Rc<Tally>,
    queue: RefCell<Option<mpsc::Sender<Span>>>,
    /// A frame has been read.
    begun: Cell<bool>,
}

/// The spans that wait.
pub struct Queue {
    spans: mpsc::Receiver<Span>,
    tally: Rc<Tally>,
}

/// A queue, and what fills it from this socket.
///
/// # Errors
/// Those of epoll_ctl(2).
pub fn queue(socket: OwnedFd) -> Result<(Queue, Source)> {
    let socket = StdUnixDatagram::from(socket);
    socket.set_nonblocking(true)?;
    let tally = Rc::new(Tally { socket: UnixDatagram::from_std(socket)?, untold: Cell::default() });
    let (queue, spans) = mpsc::channel(WAITING_MAX);
    let source =
        Source { tally: Rc::clone(&tally), queue: RefCell::new(Some(queue)), begun: Cell::new(false) };
    Ok((Queue { spans, tally }, source))
}

impl Queue {
    /// The next span; `None` at the end. Safe to drop while it waits.
    pub async fn next(&mut self) -> Option<Span> {
        self.spans.recv().await
    }

    /// So many were taken by the collector, and so many given up.
    pub fn settle(&self, exported: u64, dropped: u64) {
        self.tally.add(|report| {
            report.exported += exported;
            report.dropped += dropped;
        });
    }
}

impl Source {
    /// Reads until the frontend is gone, and then leaves the queue to its end. Never returns but with an error.
    ///
    /// # Errors
    /// `InvalidData` for a frame that is none; those of recvmsg(2).
    pub async fn read(&self) -> Result<()> {
        let socket = &self.tally.socket;
        loop {
            let receive = || channel::receive::<{ FRAME_BYTES_MAX + 1 }>(socket.as_fd());
            let received = match socket.async_io(Interest::READABLE, receive).await {
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                received => received?,
            };
            if received.bytes.is_empty() {
                break;
            }
            self.take(&received)?;
        }
        self.queue.take();
        std::future::pending().await
    }

    /// Takes what has been handed over up to now, and nothing after it.
    pub fn close(&self) {
        for _ in 0..LAST_FRAMES_MAX {
            let received = channel::receive::<{ FRAME_BYTES_MAX + 1 }>(self.tally.socket.as_fd());
            let Ok(received) = received else { break };
            if received.bytes.is_empty() || self.take(&received).is_err() {
                break;
            }
        }
        self.queue.take();
    }

    fn take(&self, received: &channel::Received) -> Result<()> {
        let invalid = || Error::new(ErrorKind::InvalidData, "a frame of the frontend that is none");
        let whole = !received.truncated && received.fds.is_empty();
        let frame: Frame = decode(&received.bytes).filter(|_| whole).ok_or_else(invalid)?;
        if !self.begun.replace(true) {
            self.tally.add(|report| report.from = Some(frame.before));
        }
        let queue = self.queue.borrow();
        let full = |span| queue.as_ref().is_none_or(|queue| queue.try_send(span).is_err());
        let dropped = frame.spans.into_iter().map(full).filter(|dropped| *dropped).count();
        if dropped > 0 {
            self.tally.add(|report| report.dropped += dropped as u64);
        }
        Ok(())
    }
}
