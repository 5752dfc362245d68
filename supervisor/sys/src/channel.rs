//! Frames and descriptors over SOCK_SEQPACKET, and the control socket that a child inherits.
//! It must never block on a peer, and never keep a descriptor that the kernel truncated.

use std::io::{Error, IoSlice, IoSliceMut, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

/// The descriptor of a child's control socket.
pub const CONTROL_FD: RawFd = 3;
/// More than the queue of a unix socket holds where nobody may enlarge it: one look goes on to the next descriptors.
const QUEUE_BYTES: usize = 512 << 10;
/// More packets than it holds of the smallest.
const QUEUE_PACKETS: usize = 1_024;

/// One received frame: its bytes, its descriptors, and whether the kernel cut any of it.
#[derive(Debug)]
pub struct Received {
    /// Bytes of the frame; empty at the end of the stream.
    pub bytes: Vec<u8>,
    /// The descriptors that came beside it, in order, all close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The sender's pid, translated by the kernel; only where [`ask_for_pids`] was called.
    pub pid: Option<i32>,
    /// The frame was longer than the buffer, or more descriptors came than fit.
    pub truncated: bool,
}

/// A connected pair, close-on-exec and non-blocking at both ends.
///
/// # Errors
/// Those of socketpair(2).
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?)
}

/// From now on everything received here names its sender's pid.
///
/// # Errors
/// Those of setsockopt(2).
pub fn ask_for_pids(socket: &OwnedFd) -> Result<()> {
    Ok(nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::PassCred, &true)?)
}

/// Sends one frame with its descriptors. Never blocks and never raises SIGPIPE.
///
/// # Errors
/// Those of sendmsg(2); `WouldBlock` where the peer's buffer is full.
pub fn send(to: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?;
    if sent == bytes.len() { Ok(()) } else { Err(Error::from_raw_os_error(libc::EMSGSIZE)) }
}

/// Receives one frame of at most `N` bytes. Never blocks.
///
/// # Errors
/// Those of recvmsg(2); `WouldBlock` where nothing is there.
pub fn receive<const N: usize>(from: BorrowedFd<'_>) -> Result<Received> {
    let mut buffer = [0u8; N];
    let received = take(from, &mut buffer, MsgFlags::empty())?;
    // Whoever closes a socket with SO_LINGER last waits for its peer, for as long as the sender chose (tcp(7)). Whatever came
    // unasked is closed by who receives it, so nothing that was received lingers; what is no socket says ENOTSOCK.
    let at_once = libc::linger { l_onoff: 0, l_linger: 0 };
    for fd in &received.fds {
        let _ = nix::sys::socket::setsockopt(fd, nix::sys::socket::sockopt::Linger, &at_once);
    }
    Ok(received)
}

/// Copies of the descriptors that are on their way to a unix socket, at most a few more than `most`: what waits there
/// goes on waiting. Whoever reads at the socket meanwhile, or says itself where to peek, may have some of them passed
/// over and others met twice; but it is looked at no longer than one queue lasts.
///
/// # Errors
/// Those of setsockopt(2) and recvmsg(2).
pub fn on_their_way(socket: BorrowedFd<'_>, most: usize) -> Result<Vec<OwnedFd>> {
    let mut buffer = vec![0; QUEUE_BYTES];
    let (mut fds, mut bytes, mut end) = (Vec::new(), 0, Ok(()));
    peek_at(socket, 0)?;
    for _ in 0..QUEUE_PACKETS {
        match take(socket, &mut buffer, MsgFlags::MSG_PEEK) {
            Ok(received) => {
                bytes += received.bytes.len();
                // Nothing at all is the end of a stream.
                let at_end = received.bytes.is_empty() && received.fds.is_empty();
                fds.extend(received.fds);
                if at_end || fds.len() > most || bytes > QUEUE_BYTES {
                    break;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => {
                end = Err(error);
                break;
            }
        }
    }
    peek_at(socket, -1).and(end).map(|()| fds)
}

/// From where in the queue MSG_PEEK begins, and that it goes on; -1: it always begins at the first byte.
fn peek_at(socket: BorrowedFd<'_>, offset: libc::c_int) -> Result<()> {
    // SAFETY: the number is a live local of the length that is told.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

fn take(from: BorrowedFd<'_>, buffer: &mut [u8], more: MsgFlags) -> Result<Received> {
    // Room for SCM_MAX_FD (253) descriptors, so that a hostile peer can never have some of them cut: cut
    // control messages are not listed by nix, and what did fit would leak.
    let mut space = nix::cmsg_space!([RawFd; 253], nix::sys::socket::UnixCredentials);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT | more;
    let (length, truncated, fds, pid) = {
        let message = recvmsg::<()>(from.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
        let (mut fds, mut pid) = (Vec::new(), None);
        let cut = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        if let Ok(list) = message.cmsgs() {
            for control in list {
                match control {
                    ControlMessageOwned::ScmRights(raw) => {
                        // SAFETY: the kernel has just installed these descriptors for this process; nothing
                        // else knows their numbers yet.
                        fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                    ControlMessageOwned::ScmCredentials(sender) => pid = Some(sender.pid()),
                    _ => {}
                }
            }
        }
        (message.bytes, cut, fds, pid)
    };
    Ok(Received { bytes: buffer[..length].to_vec(), fds, pid, truncated })
}

/// The control socket that this process inherited as descriptor 3. `None` the second time, and where
/// descriptor 3 is not a SOCK_SEQPACKET socket.
pub fn inherited_control() -> Option<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    take_inherited(CONTROL_FD, &TAKEN).filter(is_seqpacket)
}

fn is_seqpacket(fd: &OwnedFd) -> bool {
    let kind = nix::sys::socket::getsockopt(fd, nix::sys::socket::sockopt::SockType);
    matches!(kind, Ok(SockType::SeqPacket))
}

/// Another descriptor that this process inherited by number (such as the server's secret). `None` where it
/// is not open. Each number may be taken once; the caller's `taken` flag sees to it.
pub fn take_inherited(fd: RawFd, taken: &AtomicBool) -> Option<OwnedFd> {
    if taken.swap(true, Ordering::SeqCst) {
        return None;
    }
    // SAFETY: F_GETFD and F_SETFD have no memory effects, and fail with EBADF on a closed descriptor.
    let open = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
    // SAFETY: the descriptor is open, was inherited, and `taken` makes this its only owner.
    open.then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}
