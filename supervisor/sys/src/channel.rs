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
    // Room for SCM_MAX_FD (253) descriptors, so that a hostile peer can never have some of them cut: cut
    // control messages are not listed by nix, and what did fit would leak.
    let mut space = nix::cmsg_space!([RawFd; 253], nix::sys::socket::UnixCredentials);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
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
    // Whoever closes a socket with SO_LINGER last waits for its peer, for as long as the sender chose (tcp(7)). Whatever came
    // unasked is closed by who receives it, so nothing that was received lingers; what is no socket says ENOTSOCK.
    let at_once = libc::linger { l_onoff: 0, l_linger: 0 };
    for fd in &fds {
        let _ = nix::sys::socket::setsockopt(fd, nix::sys::socket::sockopt::Linger, &at_once);
    }
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
