//! A supervisor double inside the test's own process: it answers each Spawn with pipes that a script drives.
//! It must never start a process: what the frontend does with HTTP is tested without a cage.

#![allow(dead_code)]

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gaoler::frontend;
use gaoler_policy::settings::Settings;
use gaoler_protocol::{
    Empty, Exit, FRAME_BYTES, Kind, LEASE_DONE, LEASE_IDLE, LEASE_OUTPUT, LayerName, LayerRow, LayerState,
    Layers, Level, Limits, Listen, Message, Reason, Refusal, Refused, Rows, RunId, Section, Spawn, Spawned,
    Tier, sections,
};
use gaoler_sys::{channel, memfd};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::pipe;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

/// How long a test waits for anything. A liveness bound: nothing here takes a tenth of it.
pub const LONG: Duration = Duration::from_secs(30);

/// What the double does with one Spawn.
pub enum Script {
    /// Refuses.
    Refuse(Refusal, u16),
    /// Plays these bytes on stdout.
    Play(Play),
}

/// A run that is played.
pub struct Play {
    /// On stdout, as soon as the prompt's line has come.
    pub stdout: Vec<u8>,
    /// On stderr, before.
    pub stderr: Vec<u8>,
    /// When it ends.
    pub until: Until,
    /// How it ends.
    pub reason: Reason,
    /// The limits in force.
    pub limits: Limits,
    /// What egress wrote of its destinations.
    pub ledger: &'static str,
}

/// When a played run ends, whatever the lease says first.
pub enum Until {
    /// When stdin is closed, like the CLI.
    StdinCloses,
    /// At once, like a crash.
    Now,
    /// When the lease is dropped.
    LeaseDrops,
    /// When the test says so, after stdin has been closed.
    Told(Arc<Notify>),
    /// When the lease is dropped. Meanwhile it says this, and reads its stdin at the same time.
    Reads(Vec<u8>),
    /// When its stdin is closed, after it has gone on with these bytes at the test's word.
    GoesOn(Arc<Notify>, Vec<u8>),
}

impl Play {
    /// A CLI that prints this and ends when its stdin is closed.
    pub fn of(stdout: impl Into<Vec<u8>>) -> Play {
        Play {
            stdout: stdout.into(),
            stderr: Vec::new(),
            until: Until::StdinCloses,
            reason: Reason::Exited,
            limits: Limits::NONE,
            ledger: "",
        }
    }

    /// The same with another end.
    pub fn until(self, until: Until) -> Play {
        Play { until, ..self }
    }
}

/// What the double saw of one run.
#[derive(Debug)]
pub struct Seen {
    /// The message.
    pub spawn: Spawn,
    /// The options' sections.
    pub options: Vec<(Section, String)>,
    /// The credential's bytes.
    pub credential: Vec<u8>,
    /// Everything that was written to stdin.
    pub stdin: String,
    /// Whether the lease was dropped before the run ended by itself.
    pub lease_dropped: bool,
}

/// A frontend that serves, and the double behind it.
pub struct House {
    /// Where it listens.
    pub port: u16,
    /// The double's end of the control socket.
    pub control: Arc<UnixStream>,
    /// What was seen, one entry a run, after its end.
    pub seen: mpsc::UnboundedReceiver<Seen>,
    /// What the frontend said that is no Spawn.
    pub said: mpsc::UnboundedReceiver<Message>,
    /// The frontend.
    pub frontend: JoinHandle<()>,
}

/// A question to the upstream about a credential.
pub struct Asked {
    /// The credential's bytes.
    pub credential: String,
    /// Where the upstream's status goes. Dropped, it cannot be asked.
    pub status: oneshot::Sender<u16>,
}

/// Settings with this silence.
pub fn settings(silence_seconds: u32) -> Settings {
    let mut settings = Settings::default();
    settings.runs.silence_seconds = silence_seconds;
    settings
}

/// A recording of the real CLI.
pub fn recorded(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/cli-events/{name}.jsonl", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

impl House {
    /// A frontend that has got its listener, with these scripts for the next runs. Every tenant is known.
    pub async fn new(settings: Settings, scripts: Vec<Script>) -> House {
        House::asking(settings, scripts, None).await
    }

    /// The same where nobody is known but whom `asked` says is: by the upstream's status.
    pub async fn asking(
        settings: Settings,
        scripts: Vec<Script>,
        asked: Option<mpsc::UnboundedSender<Asked>>,
    ) -> House {
        let (ours, theirs) = channel::pair().expect("a pair");
        let secrets =
            frontend::Secrets { server: [7; 32], tls: None, ledger: None, vault: [0; 32], spans: None };
        let frontend = tokio::spawn(frontend::converse(theirs, settings, secrets));
        let control = Arc::new(UnixStream::from_std(ours.into()).expect("a socket"));
        let (seen_to, seen) = mpsc::unbounded_channel();
        let (said_to, mut said) = mpsc::unbounded_channel();
        let scripts = Arc::new(Mutex::new(VecDeque::from(scripts)));
        tokio::spawn(serve(Arc::clone(&control), scripts, seen_to, said_to, asked));
        let ready = tokio::time::timeout(LONG, said.recv()).await.expect("in time");
        assert!(matches!(ready, Some(Message::Ready(_))), "{ready:?}");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        send(&control, &layers(), &[]).await;
        let listen = Listen { tier: Tier::Kernel, level: Level::Balanced, runs_max: 64, embedded: true };
        send(&control, &Message::Listen(listen), &[listener.as_fd()]).await;
        House { port, control, seen, said, frontend }
    }

    /// What was seen of the next run that ended.
    pub async fn seen(&mut self) -> Seen {
        tokio::time::timeout(LONG, self.seen.recv()).await.expect("in time").expect("a run")
    }

    /// One request, and everything that comes back.
    pub async fn request(&self, head: &str, body: &[u8]) -> Reply {
        let mut stream = self.connect(head, body).await;
        let mut bytes = Vec::new();
        tokio::time::timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("in time").expect("read");
        Reply::parse(&bytes)
    }

    /// POST /v1/messages with a good credential.
    pub async fn messages(&self, body: &str) -> Reply {
        self.request(&format!("POST /v1/messages HTTP/1.1\r\n{BEARER}"), body.as_bytes()).await
    }

    /// A connection on which one request was written.
    pub async fn connect(&self, head: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.expect("a connection");
        let head = format!("{head}host: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).await.expect("written");
        stream.write_all(body).await.expect("written");
        stream
    }
}

/// A good credential, as a header's line.
pub const BEARER: &str = "authorization: Bearer sk-ant-oat01-a-tenants-own-token\r\n";

/// A response.
#[derive(Debug)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// The head, in lower case.
    pub head: String,
    /// The body, without chunks' sizes.
    pub body: String,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Reply {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let head = head.to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let chunked = head.contains("transfer-encoding: chunked");
        let body = if chunked { unchunked(body) } else { body.to_string() };
        Reply { status, head, body }
    }

    /// A field of the head.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    /// `error.details.error_code`.
    pub fn code(&self) -> String {
        self.json()["error"]["details"]["error_code"].as_str().unwrap_or_default().to_string()
    }
}

fn unchunked(mut rest: &str) -> String {
    let mut out = String::new();
    while let Some((size, more)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        if size == 0 || more.len() < size {
            break;
        }
        out.push_str(&more[..size]);
        rest = more[size..].trim_start_matches("\r\n");
    }
    out
}

/// Sends a frame as the supervisor.
pub async fn send(control: &UnixStream, message: &Message, fds: &[BorrowedFd<'_>]) {
    let frame = message.encode(1);
    control
        .async_io(Interest::WRITABLE, || channel::send(control.as_fd(), &frame, fds))
        .await
        .expect("the frontend takes the frame");
}

/// The next frame; `None` at the end.
pub async fn receive(socket: &UnixStream) -> Option<(Message, Vec<OwnedFd>)> {
    let receive = || channel::receive::<FRAME_BYTES>(socket.as_fd());
    let received = socket.async_io(Interest::READABLE, receive).await.ok()?;
    let (_, message) = Message::decode(&received.bytes).ok()?;
    Some((message, received.fds))
}

async fn serve(
    control: Arc<UnixStream>,
    scripts: Arc<Mutex<VecDeque<Script>>>,
    seen: mpsc::UnboundedSender<Seen>,
    said: mpsc::UnboundedSender<Message>,
    asked: Option<mpsc::UnboundedSender<Asked>>,
) {
    // Whom the upstream has vouched for.
    let known = Arc::new(Mutex::new(HashSet::new()));
    while let Some((message, fds)) = receive(&control).await {
        match message {
            // Without a credential: whether a tenant is known, or what it takes of the disk.
            Message::Spawn(spawn)
                if spawn.kind != Kind::Cli
                    && (fds.len() == 1 || spawn.kind == Kind::Sessions && asked.is_some()) =>
            {
                let known = Arc::clone(&known);
                tokio::spawn(look(Arc::clone(&control), spawn, fds, asked.clone(), known));
            }
            Message::Spawn(spawn) => {
                let script = scripts.lock().expect("scripts").pop_front().expect("a script for this run");
                match script {
                    Script::Refuse(reason, errno) => {
                        let refused = Refused { run: spawn.run, reason, step: 0, errno };
                        send(&control, &Message::Refused(refused), &[]).await;
                    }
                    Script::Play(play) => {
                        tokio::spawn(run(Arc::clone(&control), spawn, fds, play, seen.clone()));
                    }
                }
            }
            other => drop(said.send(other)),
        }
    }
}

/// The least run of a tenant: refused where nobody knows it, and played as one that does nothing.
async fn look(
    control: Arc<UnixStream>,
    spawn: Spawn,
    fds: Vec<OwnedFd>,
    asked: Option<mpsc::UnboundedSender<Asked>>,
    known: Arc<Mutex<HashSet<[u8; 32]>>>,
) {
    if let Some(asked) = asked
        && !known.lock().expect("known").contains(&spawn.tenant.0)
    {
        let mut refusal = (Refusal::CredentialRefused, 0);
        if let Some(credential) = fds.into_iter().nth(1) {
            let credential = memfd::read(credential, 1 << 14).expect("sealed");
            let credential = String::from_utf8(credential).expect("UTF-8");
            let (status, answer) = oneshot::channel();
            asked.send(Asked { credential, status }).expect("the test listens");
            refusal = match answer.await.unwrap_or_default() {
                200 => (Refusal::Busy, 200),
                status @ (401 | 403) => (Refusal::CredentialRefused, status),
                status => (Refusal::UpstreamUnavailable, status),
            };
        }
        let (reason, errno) = refusal;
        if errno != 200 {
            let refused = Refused { run: spawn.run, reason, step: 0, errno };
            return send(&control, &Message::Refused(refused), &[]).await;
        }
        known.lock().expect("known").insert(spawn.tenant.0);
    }
    let (lease, their_lease) = channel::pair().expect("a pair");
    let (report, their_report) = channel::pair().expect("a pair");
    let (stdin, mut prompts) = pipe::pipe().expect("a pipe");
    let (mut stdout, answers) = pipe::pipe().expect("a pipe");
    let (_stderr, complaints) = pipe::pipe().expect("a pipe");
    let (ledger, _) = std::io::pipe().expect("a pipe");
    let theirs = [
        stdin.into_nonblocking_fd().expect("a pipe"),
        answers.into_nonblocking_fd().expect("a pipe"),
        complaints.into_nonblocking_fd().expect("a pipe"),
        their_lease,
        their_report,
        ledger.into(),
    ];
    let limits = Limits::NONE;
    let spawned = Message::Spawned(Spawned { run: spawn.run, limits, launch_us: 1, tier: Tier::Kernel });
    send(&control, &spawned, &theirs.each_ref().map(AsFd::as_fd)).await;
    drop(theirs);
    let usage = async {
        let mut question = Vec::new();
        while !question.contains(&b'\n') {
            if prompts.read_buf(&mut question).await.expect("stdin") == 0 {
                std::future::pending::<()>().await;
            }
        }
        assert!(question.windows(7).any(|it| it == b"\"usage\""), "{}", String::from_utf8_lossy(&question));
        stdout.write_all(b"{\"done\":{\"bytes\":0,\"files\":0}}\n").await.expect("stdout");
    };
    let lease = UnixStream::from_std(lease.into()).expect("a socket");
    let reason = tokio::select! {
        () = usage => Reason::Finished,
        _ = said(&lease) => Reason::Cancelled,
    };
    drop(stdout);
    let report = UnixStream::from_std(report.into()).expect("a socket");
    let frame = Message::Exit(exit(spawn.run, reason)).encode(1);
    let _ = report.async_io(Interest::WRITABLE, || channel::send(report.as_fd(), &frame, &[])).await;
}

async fn run(
    control: Arc<UnixStream>,
    spawn: Spawn,
    fds: Vec<OwnedFd>,
    play: Play,
    seen: mpsc::UnboundedSender<Seen>,
) {
    let mut fds = fds.into_iter();
    let options = memfd::read(fds.next().expect("options"), 1 << 26).expect("sealed");
    let credential = memfd::read(fds.next().expect("a credential"), 1 << 14).expect("sealed");
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    let options = sections(&options).expect("sections").into_iter().map(|(tag, b)| (tag, text(b))).collect();

    let (stdin, mut prompts) = pipe::pipe().expect("a pipe");
    let (mut stdout, answers) = pipe::pipe().expect("a pipe");
    let (mut stderr, complaints) = pipe::pipe().expect("a pipe");
    let (lease, their_lease) = channel::pair().expect("a pair");
    let (report, their_report) = channel::pair().expect("a pair");
    let (ledger, mut lines) = std::io::pipe().expect("a pipe");
    std::io::Write::write_all(&mut lines, play.ledger.as_bytes()).expect("written");
    let theirs = [
        stdin.into_nonblocking_fd().expect("a pipe"),
        answers.into_nonblocking_fd().expect("a pipe"),
        complaints.into_nonblocking_fd().expect("a pipe"),
        their_lease,
        their_report,
        ledger.into(),
    ];
    let limits = play.limits;
    let spawned = Message::Spawned(Spawned { run: spawn.run, limits, launch_us: 1, tier: Tier::Kernel });
    send(&control, &spawned, &theirs.each_ref().map(AsFd::as_fd)).await;
    drop(theirs);

    let lease = UnixStream::from_std(lease.into()).expect("a socket");
    let mut written = Vec::new();
    let mut lease_said = None;
    let life = async {
        stderr.write_all(&play.stderr).await.expect("stderr");
        while !written.contains(&b'\n') {
            if prompts.read_buf(&mut written).await.expect("stdin") == 0 {
                break;
            }
        }
        let _ = stdout.write_all(&play.stdout).await;
        match play.until {
            Until::Now => {}
            Until::LeaseDrops => {
                while prompts.read_buf(&mut written).await.expect("stdin") > 0 {}
                std::future::pending::<()>().await;
            }
            Until::StdinCloses => while prompts.read_buf(&mut written).await.expect("stdin") > 0 {},
            Until::Told(ref told) => {
                while prompts.read_buf(&mut written).await.expect("stdin") > 0 {}
                told.notified().await;
            }
            Until::Reads(ref more) => {
                let mut read = vec![0; 1 << 16];
                let says = async {
                    let _ = stdout.write_all(more).await;
                };
                let reads = async { while prompts.read(&mut read).await.expect("stdin") > 0 {} };
                tokio::join!(says, reads);
                std::future::pending::<()>().await;
            }
            Until::GoesOn(ref told, ref more) => {
                told.notified().await;
                let _ = stdout.write_all(more).await;
                while prompts.read_buf(&mut written).await.expect("stdin") > 0 {}
            }
        }
    };
    tokio::select! {
        () = life => {}
        word = said(&lease) => lease_said = Some(word),
    }
    drop((stdout, lines));
    let reason = lease_said.as_deref().map_or(play.reason, |word| match word {
        LEASE_DONE => Reason::Finished,
        LEASE_OUTPUT => Reason::Output,
        LEASE_IDLE => Reason::Idle,
        _ => Reason::Cancelled,
    });
    let lease_dropped = lease_said.is_some();
    let report = UnixStream::from_std(report.into()).expect("a socket");
    let frame = Message::Exit(exit(spawn.run, reason)).encode(1);
    let _ = report.async_io(Interest::WRITABLE, || channel::send(report.as_fd(), &frame, &[])).await;
    let stdin = String::from_utf8(written).expect("UTF-8");
    let _ = seen.send(Seen { spawn, options, credential, stdin, lease_dropped });
}

/// What the lease's holder says when it ends it; nothing where it just goes away.
async fn said(lease: &UnixStream) -> Vec<u8> {
    let receive = || channel::receive::<FRAME_BYTES>(lease.as_fd());
    lease.async_io(Interest::READABLE, receive).await.map(|received| received.bytes).unwrap_or_default()
}

/// An Exit.
pub fn exit(run: RunId, reason: Reason) -> Exit {
    Exit {
        run,
        reason,
        code: 0,
        signal: 0,
        quarantined: false,
        wall_us: 1,
        user_us: 0,
        system_us: 0,
        maxrss_kib: 0,
        memory_peak: 0,
        tasks_peak: 0,
        oom_kills: 0,
        tasks_denied: 0,
        teardown_us: 0,
        requests: 0,
        denials: 0,
        input_tokens: 0,
        output_tokens: 0,
        cache_write_tokens: 0,
        cache_read_tokens: 0,
        bytes_up: 0,
        bytes_down: 0,
    }
}

fn layers() -> Message {
    let row = LayerRow { name: LayerName::Uid, state: LayerState::Enforced, errno: 0 };
    Message::Layers(Layers { tier: Tier::Kernel, landlock_abi: 6, cgroup: 2, rows: Rows::new([row]) })
}

/// A Drain.
pub fn drain() -> Message {
    Message::Drain(Empty {})
}
