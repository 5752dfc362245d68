//! An exporter whose collector has a name: what it may do until that is found, and what it may do afterwards.
//! Needs root, for a name server's port and to try an exporter's rights in its own place.
#![allow(missing_docs)]

#[path = "../../tests/support/collector.rs"]
#[allow(dead_code)]
mod collector;
#[path = "common/hand.rs"]
mod hand;
#[path = "../../tests/support/names.rs"]
#[allow(dead_code)]
mod names;

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use collector::{Authority, Collector};
use command_fds::{CommandFdExt, FdMapping};
use gaoler_exporter_wire::{Frame, Settings, Side, Span, encode, encode_settings};
use gaoler_policy::landlock;
use gaoler_protocol::{FRAME_BYTES, Message, Ready, Role};
use gaoler_sys::{channel, memfd};
use hand::Hand;
use names::Names;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// No answer takes longer, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(30);

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// An exporter, as a supervisor starts it.
struct Exporter {
    child: Child,
    control: OwnedFd,
    spans: OwnedFd,
    told: u64,
}

impl Exporter {
    fn start(settings: &Settings, names: &Names) -> Exporter {
        let (control, its_control) = channel::pair().expect("a pair");
        let (spans, its_spans) = channel::pair().expect("a pair");
        let settings = memfd::sealed("settings", &encode_settings(settings)).expect("a memory file");
        let resolv_conf = OwnedFd::from(names.resolv_conf().into_file());
        let fds = [its_control, settings, its_spans, resolv_conf];
        let mappings = fds.into_iter().zip(3..);
        let mappings = mappings.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_gaoler-exporter"));
        command.env_clear().fd_mappings(mappings).expect("mappings");
        let child = command.spawn().expect("the binary starts");
        Exporter { child, control, spans, told: 0 }
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits until it has confined itself.
    fn ready(&self) {
        let mut fds = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).expect("a timeout");
        assert!(poll(&mut fds, timeout).expect("poll") > 0, "the exporter says nothing");
        let frame = channel::receive::<FRAME_BYTES>(self.control.as_fd()).expect("a frame");
        let (_, message) = Message::decode(&frame.bytes).expect("a frame of the list");
        assert_eq!(message, Message::Ready(Ready { role: Role::Exporter, threads: 1 }));
    }

    /// Hands it a span of this name.
    fn tell(&mut self, name: &'static str) {
        let span = Span {
            trace: [1; 16],
            id: [2; 8],
            parent: None,
            remote: false,
            state: String::new(),
            name: name.into(),
            side: Side::Internal,
            start: 1,
            end: 2,
            attributes: Vec::new(),
            events: Vec::new(),
            links: Vec::new(),
            failed: false,
        };
        let frame = encode(&Frame { before: self.told, spans: vec![span] }).expect("it fits");
        channel::send(self.spans.as_fd(), &frame, &[]).expect("it is sent");
        self.told += 1;
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn once_its_collector_is_found_an_exporter_can_reach_no_name_server_any_more() {
    let names = Names::silent("127.0.0.82");
    let authority = Authority::new();
    let collector = Collector::secure("collector.example", &authority);
    let address = collector.url.replace("https://collector.example", "127.0.0.1");
    let address = address.parse().expect("its address");
    // Name servers are asked over TCP too: what listens there must not be reached afterwards.
    let server = TcpListener::bind(names.address).expect("port 53 of TCP");
    let other = TcpListener::bind("127.0.0.1:0").expect("a port");
    let (server, other) = [server, other].map(|it| (it.local_addr().expect("an address"), it)).into();
    let settings = Settings {
        url: format!("{}/v1/traces", collector.url),
        headers: Vec::new(),
        authorities: std::fs::read_to_string(authority.file().path()).expect("a certificate"),
    };
    let mut exporter = Exporter::start(&settings, &names);
    let knows_tcp = landlock::abi().is_ok_and(|abi| abi >= landlock::ABI_TCP);
    let refused = |errno| if knows_tcp { Err(errno) } else { Ok(()) };

    // While it asks: the collector's port and the name servers', over both transports, and no other; and no file.
    until("a question", || (!names.asked().is_empty()).then_some(()));
    let hand = Hand::on(exporter.pid());
    assert_eq!(hand.connects(address), Ok(()));
    assert_eq!(hand.connects(server.0), Ok(()));
    assert_eq!(hand.makes_datagrams(), Ok(()));
    assert_eq!(hand.connects(other.0), refused(Errno::EACCES));
    drop(hand);

    // What was handed over meanwhile waits, and is sent to where the name led.
    exporter.tell("early");
    names.answer();
    exporter.ready();
    until("its span", || collector.spans().iter().any(|span| span.name == "early").then_some(()));
    let asked = names.asked();
    assert!(asked.iter().all(|name| name == "collector.example."), "{asked:?}");

    // Afterwards: the collector's port alone.
    let hand = Hand::on(exporter.pid());
    assert_eq!(hand.connects(address), Ok(()));
    assert_eq!(hand.connects(server.0), refused(Errno::EACCES), "over TCP");
    assert_eq!(hand.makes_datagrams(), Err(Errno::EAFNOSUPPORT), "over UDP");
    assert_eq!(hand.connects(other.0), refused(Errno::EACCES));
    assert_eq!(hand.opens("/etc/hostname"), Err(Errno::EACCES));
    drop(hand);

    // It was not harmed by the attempts, and asks nobody again.
    exporter.tell("late");
    until("its span", || collector.spans().iter().any(|span| span.name == "late").then_some(()));
    assert_eq!(names.asked(), asked);
}
