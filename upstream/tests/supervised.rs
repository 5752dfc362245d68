//! The embedded model as the supervisor starts it: a control socket at 3, a listening socket at 4, confined.
//! No test here may rely on its command line: supervised it has none.
#![allow(missing_docs)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command};

use command_fds::{CommandFdExt, FdMapping};
use gaoler_protocol::{Empty, Message, Role};
use gaoler_sys::channel;

/// The process, our end of its control socket (only readiness and plain reads are asked of it), its port.
fn start() -> (Child, UnixDatagram, u16) {
    let (ours, theirs) = channel::pair().expect("a socket pair");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gaoler-upstream"));
    let mappings = vec![
        FdMapping { parent_fd: theirs, child_fd: 3 },
        FdMapping { parent_fd: OwnedFd::from(listener), child_fd: 4 },
    ];
    command.fd_mappings(mappings).expect("two mappings");
    let child = command.spawn().expect("the binary starts");
    let control = UnixDatagram::from(ours);
    control.set_nonblocking(false).expect("blocking");
    control.set_read_timeout(Some(std::time::Duration::from_secs(30))).expect("a timeout");
    let mut frame = [0; 256];
    assert_eq!(control.recv(&mut frame).expect("it is ready"), frame.len());
    let (_, message) = Message::decode(&frame).expect("a frame");
    assert!(matches!(message, Message::Ready(ready) if ready.role == Role::Upstream && ready.threads == 1));
    (child, control, port)
}

#[test]
fn it_answers_on_what_it_was_handed_and_ends_with_its_supervisor() {
    let (mut child, control, port) = start();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream
        .write_all(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-api-key: k\r\nconnection: close\r\n\r\n")
        .expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    assert!(text.starts_with("HTTP/1.1 200") && text.contains("[embedded]"), "{text}");
    drop(control);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}

#[test]
fn a_word_to_it_ends_it() {
    let (mut child, control, _) = start();
    channel::send(control.as_fd(), &Message::Drain(Empty {}).encode(1), &[]).expect("sent");
    assert_eq!(child.wait().expect("it ends").code(), Some(1));
}
