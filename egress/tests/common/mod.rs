//! A supervisor, a cage and upstreams, as far as an egress can tell.
//! It must never read or change anything of the egress but through its descriptors.
#![allow(dead_code, missing_docs)]

pub mod net;
#[path = "../../../upstream/tests/common/reply.rs"]
mod reply;

pub use reply::Reply;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use gaoler_protocol::{
    Denial, Empty, FRAME_BYTES, Level, Message, Placeholder, RunId, Scheme, Serve, Totals, Vouched,
};
use gaoler_seal::Vault;
use gaoler_sys::{channel, memfd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};

/// No answer takes longer, unless something hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The credential that must never be seen in the cage.
pub const CANARY: &str = "sk-ant-oat01-CANARY-0123456789abcdef";
pub const RUN: RunId = RunId([7; 16]);
pub const PLACEHOLDER: Placeholder = Placeholder([9; 32]);

pub struct Egress {
    child: Child,
    control: Option<OwnedFd>,
    folder: tempfile::TempDir,
    sequence: u64,
    /// The other end of its ledger, once it serves.
    pub ledger: Option<std::io::PipeReader>,
}

impl Egress {
    /// An egress that has confined itself.
    pub fn start(upstream: &str, more: &[&str]) -> Egress {
        Egress::start_with(upstream, more, None)
    }

    /// One that may also open stored credentials.
    pub fn start_with(upstream: &str, more: &[&str], vault: Option<&Vault>) -> Egress {
        let (ours, theirs) = channel::pair().expect("a socket pair");
        let mut command = Command::new(env!("CARGO_BIN_EXE_gaoler-egress"));
        command.args(["--upstream", upstream]).args(more).env_clear();
        let mut mappings = vec![FdMapping { parent_fd: theirs, child_fd: channel::CONTROL_FD }];
        if let Some(vault) = vault {
            let parent_fd = memfd::sealed("vault", vault.bytes()).expect("a memory file");
            mappings.push(FdMapping { parent_fd, child_fd: channel::CONTROL_FD + 1 });
        }
        command.fd_mappings(mappings).expect("mappings");
        let child = command.spawn().expect("the binary starts");
        drop(command);
        let folder = tempfile::tempdir().expect("a folder");
        let mut egress = Egress { child, control: Some(ours), folder, sequence: 0, ledger: None };
        assert!(matches!(egress.hear(), Some(Message::Ready(ready)) if ready.threads == 1));
        egress
    }

    /// One that serves a cage with this credential.
    pub fn serving(upstream: &str, more: &[&str], scheme: Scheme, token: &str) -> Egress {
        let mut egress = Egress::start(upstream, more);
        let listener = egress.listener();
        egress.serve(false, scheme, token, Some(listener));
        egress
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    pub fn listener(&self) -> OwnedFd {
        UnixListener::bind(self.socket()).expect("a socket").into()
    }

    pub fn serve(&mut self, vouch: bool, scheme: Scheme, token: &str, listener: Option<OwnedFd>) {
        let serve = Serve {
            run: RUN,
            placeholder: PLACEHOLDER,
            level: Level::Balanced,
            vouch,
            requests_max: 0,
            egress_mib: 0,
            peer_uid: 0,
            tenant: [0; 16],
        };
        let mut fds = vec![credential(scheme, token), resolv_conf_of(NOWHERE)];
        if let Some(listener) = listener {
            let (read, ledger) = std::io::pipe().expect("a pipe");
            fds.extend([memfd::sealed("hosts", b"").expect("a memory file"), ledger.into(), listener]);
            self.ledger = Some(read);
        }
        self.say(Message::Serve(serve), &fds);
    }

    pub fn say(&mut self, message: Message, fds: &[OwnedFd]) {
        self.sequence += 1;
        self.send(&message.encode(self.sequence), fds);
    }

    pub fn send(&self, bytes: &[u8], fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        channel::send(self.control.as_ref().expect("not hung up").as_fd(), bytes, &fds).expect("it is sent");
    }

    /// The next message; `None` at the end.
    pub fn hear(&mut self) -> Option<Message> {
        let control = self.control.as_ref().expect("not hung up").as_fd();
        let mut fds = [PollFd::new(control, PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).expect("a timeout");
        assert!(poll(&mut fds, timeout).expect("poll") > 0, "egress says nothing");
        let frame = channel::receive::<FRAME_BYTES>(control).expect("a frame");
        if frame.bytes.is_empty() {
            return None;
        }
        Some(Message::decode(&frame.bytes).expect("a frame of the list").1)
    }

    pub fn hear_vouched(&mut self) -> Vouched {
        match self.hear() {
            Some(Message::Vouched(vouched)) => vouched,
            other => panic!("not Vouched: {other:?}"),
        }
    }

    pub fn hear_denied(&mut self) -> Denial {
        match self.hear() {
            Some(Message::Denied(denied)) if denied.run == RUN => denied.what,
            other => panic!("not Denied: {other:?}"),
        }
    }

    pub fn hear_counted(&mut self) -> Totals {
        match self.hear() {
            Some(Message::Counted(totals)) if totals.run == RUN => totals,
            other => panic!("not Counted: {other:?}"),
        }
    }

    /// Revokes and gives the totals, passing over what was on its way.
    pub fn revoke(&mut self) -> Totals {
        self.say(Message::Revoke(Empty {}), &[]);
        loop {
            match self.hear() {
                Some(Message::Revoked(totals)) => return totals,
                Some(Message::Counted(_) | Message::Denied(_)) => {}
                other => panic!("not Revoked: {other:?}"),
            }
        }
    }

    pub fn hang_up(&mut self) {
        self.control = None;
    }

    /// The status that it exits with.
    pub fn exit(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.child.try_wait().expect("wait") {
                Some(status) => return status.code().expect("no signal"),
                None if Instant::now() > deadline => panic!("egress does not exit"),
                None => std::thread::yield_now(),
            }
        }
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }

    /// Sends these bytes from the cage and reads to the end.
    pub fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect();
        // It may refuse before it has read everything.
        let _ = stream.write_all(bytes);
        finish(stream)
    }

    pub fn post(&self, body: &Value) -> Reply {
        self.raw(&request("POST /v1/messages?beta=true", "", &body.to_string()))
    }

    pub fn ask(&self, text: &str) -> Reply {
        self.post(&question(text))
    }
}

impl Drop for Egress {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn finish(mut stream: impl Read) -> Reply {
    let mut bytes = Vec::new();
    let ended = stream.read_to_end(&mut bytes).is_ok();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert!(!text.contains(CANARY), "the cage has seen the credential: {text}");
    Reply::read(&text, ended)
}

pub fn credential(scheme: Scheme, token: &str) -> OwnedFd {
    let bytes = [&[scheme as u8], token.as_bytes()].concat();
    memfd::sealed("credential", &bytes).expect("a memory file")
}

/// A name server that does not exist.
pub const NOWHERE: &str = "127.0.0.1";

pub fn resolv_conf() -> OwnedFd {
    resolv_conf_of(NOWHERE)
}

pub fn resolv_conf_of(server: &str) -> OwnedFd {
    let mut file = tempfile::tempfile().expect("a file");
    writeln!(file, "search example.com\nnameserver {server}").expect("written");
    std::io::Seek::rewind(&mut file).expect("rewound");
    OwnedFd::from(File::from(OwnedFd::from(file)))
}

pub fn question(text: &str) -> Value {
    json!({"model": "claude-sonnet-5", "max_tokens": 100, "messages": [{"role": "user", "content": text}]})
}

pub fn streamed(text: &str) -> Value {
    let mut body = question(text);
    body["stream"] = true.into();
    body
}

/// A request with the placeholder; `more` are header lines.
pub fn request(line: &str, more: &str, body: &str) -> Vec<u8> {
    let (token, length) = (PLACEHOLDER.token(), body.len());
    let head =
        format!("host: localhost\r\nauthorization: Bearer {token}\r\ncontent-length: {length}\r\n{more}");
    format!("{line} HTTP/1.1\r\n{head}\r\n{body}").into_bytes()
}

/// The embedded model, on a thread of this test.
pub fn embedded() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("non-blocking");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            gaoler_upstream::serve::serve(listener).await
        })
    });
    format!("http://{address}")
}

/// What an upstream does once it has read a request.
#[derive(Clone)]
pub enum Act {
    Send(Vec<u8>),
    /// Keeps the connection open and says nothing more.
    Hang,
}

/// An upstream that answers every request with the same bytes, whatever they are, and remembers what it got.
pub struct Raw {
    pub address: SocketAddr,
    pub seen: Arc<Mutex<Vec<String>>>,
}

impl Raw {
    pub fn start(acts: &[Act]) -> Raw {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let raw = Raw { address: listener.local_addr().expect("an address"), seen: Arc::default() };
        let (seen, acts) = (raw.seen.clone(), acts.to_vec());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, acts) = (seen.clone(), acts.clone());
                std::thread::spawn(move || play(stream, &seen, &acts));
            }
        });
        raw
    }

    /// One that answers with this status, these header lines and this body.
    pub fn answering(status: &str, headers: &str, body: &str) -> Raw {
        let length = body.len();
        let text = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n{body}");
        Raw::start(&[Act::Send(text.into_bytes())])
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().expect("no panic").clone()
    }
}

fn play(mut stream: TcpStream, seen: &Mutex<Vec<String>>, acts: &[Act]) {
    while let Some(request) = read_request(&mut stream) {
        seen.lock().expect("no panic").push(request);
        for act in acts {
            match act {
                Act::Send(bytes) => {
                    if stream.write_all(bytes).is_err() {
                        return;
                    }
                }
                // Until the egress closes.
                Act::Hang => return drop(stream.read(&mut [0; 1])),
            }
        }
    }
}

/// A request with its body; `None` at the end.
pub fn read_request(stream: &mut impl Read) -> Option<String> {
    let mut bytes = Vec::new();
    let mut byte = [0; 1];
    while !bytes.ends_with(b"\r\n\r\n") {
        (stream.read(&mut byte).ok()? == 1).then(|| bytes.push(byte[0]))?;
    }
    let head = String::from_utf8(bytes).ok()?;
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some(head + &String::from_utf8_lossy(&body))
}

/// A chunk of a chunked body.
pub fn chunk(text: &str) -> Act {
    Act::Send(format!("{:x}\r\n{text}\r\n", text.len()).into_bytes())
}

pub fn stream_head() -> Act {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    Act::Send(head.into())
}
