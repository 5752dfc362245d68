//! The control socket: frames from and to the supervisor.
//! It must never wait for the supervisor without a bound, nor go on after a frame that is not of the list.

use std::cell::Cell;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdUnixDatagram;
use std::time::Duration;

use gaoler_protocol::{FRAME_BYTES, Message};
use gaoler_sys::channel;
use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// How long the supervisor may leave its end full. It reads in a poll loop that never blocks.
const SEND_TIME: Duration = Duration::from_secs(2);

/// The socket at descriptor 3.
pub struct Control {
    // tokio has no type for SOCK_SEQPACKET; its datagram type serves, since only readiness is asked of it.
    socket: UnixDatagram,
    sequence: Cell<u64>,
}

impl Control {
    /// Takes the inherited socket.
    ///
    /// # Errors
    /// Where descriptor 3 is not a control socket.
    pub fn take() -> Result<Control> {
        let missing = || Error::new(ErrorKind::NotFound, "descriptor 3 is no control socket");
        let socket = StdUnixDatagram::from(channel::inherited_control().ok_or_else(missing)?);
        socket.set_nonblocking(true)?;
        Ok(Control { socket: UnixDatagram::from_std(socket)?, sequence: Cell::new(0) })
    }

    /// The next message with its descriptors; `None` at the end of the socket. May be dropped at any wait.
    ///
    /// # Errors
    /// `InvalidData` for whatever is not exactly a frame of the list.
    pub async fn next(&self) -> Result<Option<(Message, Vec<OwnedFd>)>> {
        let receive = || channel::receive::<FRAME_BYTES>(self.socket.as_fd());
        let frame = match self.socket.async_io(Interest::READABLE, receive).await {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            other => other?,
        };
        if frame.bytes.is_empty() && frame.fds.is_empty() && !frame.truncated {
            return Ok(None);
        }
        let invalid = |what: String| Error::new(ErrorKind::InvalidData, what);
        if frame.truncated {
            return Err(invalid("a truncated frame".into()));
        }
        let (_, message) = Message::decode(&frame.bytes).map_err(|error| invalid(error.to_string()))?;
        match message.fds().contains(&frame.fds.len()) {
            true => Ok(Some((message, frame.fds))),
            false => Err(invalid(format!("{} with {} descriptors", message.name(), frame.fds.len()))),
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// Those of sendmsg(2), and `TimedOut` where the supervisor does not read.
    pub async fn send(&self, message: Message) -> Result<()> {
        self.sequence.set(self.sequence.get() + 1);
        let frame = message.encode(self.sequence.get());
        let send = || channel::send(self.socket.as_fd(), &frame, &[]);
        match tokio::time::timeout(SEND_TIME, self.socket.async_io(Interest::WRITABLE, send)).await {
            Ok(sent) => sent,
            Err(_) => Err(Error::new(ErrorKind::TimedOut, "the supervisor does not read")),
        }
    }
}
