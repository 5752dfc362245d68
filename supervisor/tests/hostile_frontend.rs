//! A frontend that has been taken over: whatever it sends, it is ended, its runs with it, and the
//! supervisor goes in good order. Each case begins with a well-formed run as its positive control.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use gaoler_policy::settings::Settings;
use gaoler_protocol::*;
use gaoler_sys::{channel, memfd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Far more than any answer takes, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

struct Hostile {
    supervisor: Child,
    control: OwnedFd,
    sequence: u64,
    _state: tempfile::TempDir,
}

impl Hostile {
    /// A supervisor whose peer is this test, after its first word.
    fn new() -> Hostile {
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        let state = tempfile::Builder::new().permissions(private).tempdir().unwrap();
        let mut settings = Settings::default();
        settings.state.dir = state.path().into();
        let text = memfd::sealed("settings", toml::to_string(&settings).unwrap().as_bytes()).unwrap();
        let (control, theirs) = channel::pair().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_gaoler-supervisor"));
        command.arg("exec").stdin(Stdio::null()).stdout(Stdio::null());
        let mappings =
            vec![FdMapping { parent_fd: theirs, child_fd: 3 }, FdMapping { parent_fd: text, child_fd: 4 }];
        command.fd_mappings(mappings).unwrap();
        let supervisor = command.spawn().unwrap();
        drop(command);
        let mut hostile = Hostile { supervisor, control, sequence: 0, _state: state };
        assert!(matches!(hostile.hear(), Some((Message::Layers(_), _))), "the supervisor did not start");
        hostile
    }

    fn send(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) {
        self.sequence += 1;
        channel::send(self.control.as_fd(), &message.encode(self.sequence), fds).unwrap();
    }

    /// The next message, or `None` once the supervisor has closed.
    fn hear(&mut self) -> Option<(Message, Vec<OwnedFd>)> {
        wait_readable(self.control.as_fd());
        match channel::receive::<FRAME_BYTES>(self.control.as_fd()) {
            Ok(received) if !received.bytes.is_empty() => {
                Some((Message::decode(&received.bytes).unwrap().1, received.fds))
            }
            _ => None,
        }
    }

    /// Starts a command as an honest frontend would.
    fn run(&mut self, argv: &[u8]) -> Vec<OwnedFd> {
        let options = options(argv);
        self.send(&Message::Spawn(spawn(self.sequence as u8)), &[options.as_fd()]);
        match self.hear() {
            Some((Message::Spawned(_), fds)) => fds,
            other => panic!("an honest run was not started: {other:?}"),
        }
    }

    /// The positive control: what an honest frontend asks is done.
    fn works(mut self) -> Hostile {
        let fds = self.run(b"echo\0works\0");
        let mut text = String::new();
        File::from(fds[1].try_clone().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "works\n");
        self
    }

    /// The supervisor has ended its peer and itself, with status 1 and without a panic.
    fn expect_end(mut self, case: &str) {
        let until = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.supervisor.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < until, "{case}: the supervisor still serves a hostile peer");
            // Its replies are read, so that it is never ended for want of that.
            let _ = channel::receive::<FRAME_BYTES>(self.control.as_fd());
            std::thread::yield_now();
        };
        assert_eq!(status.code(), Some(1), "{case}");
        assert!(leaves_of(self.supervisor.id()).is_empty(), "{case}: a cgroup is left");
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
    }
}

fn wait_readable(fd: BorrowedFd<'_>) {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()), Ok(1), "nothing was said");
}

fn leaves_of(pid: u32) -> Vec<String> {
    let groups = ["/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/cpu"];
    groups
        .iter()
        .map(|group| format!("{group}/gaoler-{pid}"))
        .filter(|path| std::fs::exists(path).unwrap())
        .collect()
}

fn options(argv: &[u8]) -> OwnedFd {
    memfd::sealed("options", &section(Section::Argv, argv)).unwrap()
}

fn spawn(id: u8) -> Spawn {
    Spawn {
        run: RunId([id; 16]),
        tenant: TenantKey([0; 32]),
        kind: Kind::Exec,
        level: Level::Balanced,
        conversation: Conversation::Stateless,
        ephemeral: true,
        proof: false,
        session: [0; 16],
        workspace: [0; 16],
        model: Model::DEFAULT,
        effort: Effort::Unset,
        turns_max: 0,
        mcp_refused: false,
        budget_microusd: 0,
        limits: Limits::NONE,
    }
}

/// Sends these bytes and descriptors after an honest run.
fn check(case: &str, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let hostile = Hostile::new().works();
    channel::send(hostile.control.as_fd(), bytes, fds).unwrap();
    hostile.expect_end(case);
}

#[test]
fn t01_a_frame_that_is_malformed_truncated_oversized_or_unknown_ends_its_sender() {
    let good = Message::Drained(Empty {}).encode(1_000);
    check("truncated", &good[..100], &[]);
    check("oversized", &[&good[..], &[0; 4_000]].concat(), &[]);
    check("one byte too long", &[&good[..], &[0]].concat(), &[]);
    let mut unknown = good;
    unknown[6] = 77;
    check("unknown", &unknown, &[]);
    check("noise", &[0xa5; FRAME_BYTES], &[]);
}

#[test]
fn t02_a_message_out_of_turn_or_of_another_way_ends_its_sender() {
    check(
        "Proven in the middle",
        &Message::Proven(Proven { failed: 0, version: [2, 1, 330] }).encode(1_000),
        &[],
    );
    check(
        "Ready in the middle",
        &Message::Ready(Ready { role: Role::Frontend, threads: 1 }).encode(1_000),
        &[],
    );
    let refused = Refused { run: RunId([1; 16]), reason: Refusal::Busy, step: 0, errno: 0 };
    check("the supervisor's own message", &Message::Refused(refused).encode(1_000), &[]);
}

#[test]
fn t03_a_replayed_frame_or_run_id_ends_its_sender() {
    let mut hostile = Hostile::new();
    let options = options(b"sleep\x001000\0");
    hostile.send(&Message::Spawn(spawn(9)), &[options.as_fd()]);
    assert!(matches!(hostile.hear(), Some((Message::Spawned(_), _))));
    channel::send(hostile.control.as_fd(), &Message::Spawn(spawn(9)).encode(1), &[options.as_fd()]).unwrap();
    hostile.expect_end("the same frame again");

    let mut hostile = Hostile::new();
    hostile.send(&Message::Spawn(spawn(9)), &[options.as_fd()]);
    // The descriptors are held: the run lives on, and its id with it.
    let held = hostile.hear();
    assert!(matches!(held, Some((Message::Spawned(_), _))));
    hostile.send(&Message::Spawn(spawn(9)), &[options.as_fd()]);
    hostile.expect_end("the id of a live run again");
}

#[test]
fn t04_wrong_descriptors_end_their_sender() {
    let sealed = options(b"true\0");
    let folder: OwnedFd = File::open("/").unwrap().into();
    let (socket, _other) = channel::pair().unwrap();
    let unsealed =
        nix::sys::memfd::memfd_create("unsealed", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let frame = Message::Spawn(spawn(200)).encode(1_000);
    check("none", &frame, &[]);
    check("a folder", &frame, &[folder.as_fd()]);
    check("a socket", &frame, &[socket.as_fd()]);
    check("an unsealed memory file", &frame, &[unsealed.as_fd()]);
    check("two where one belongs", &frame, &[sealed.as_fd(), sealed.as_fd()]);
    let many: Vec<BorrowedFd<'_>> = std::iter::repeat_n(sealed.as_fd(), 200).collect();
    check("two hundred", &frame, &many);
    check("one where none belongs", &Message::Drained(Empty {}).encode(1_000), &[sealed.as_fd()]);
}

#[test]
fn t05_a_run_that_this_peer_may_not_ask_for_ends_it() {
    let sealed = options(b"true\0");
    let cli = Spawn { kind: Kind::Cli, ..spawn(200) };
    check("a CLI run", &Message::Spawn(cli).encode(1_000), &[sealed.as_fd(), sealed.as_fd()]);
    check("a reload of settings that are nobody's", &Message::Reload(Reload { asks: 1 }).encode(1_000), &[]);
    let proof = Spawn { proof: true, ..spawn(200) };
    check("a self-test run", &Message::Spawn(proof).encode(1_000), &[sealed.as_fd()]);
}

#[test]
fn t06_a_peer_that_never_reads_is_ended_and_stalls_nobody() {
    let hostile = Hostile::new().works();
    let options = options(b"true\0");
    let until = Instant::now() + PATIENCE;
    let mut id = 1_000_u64;
    // Every Spawn is answered, and no answer is read.
    loop {
        id += 1;
        let mut asked = spawn(0);
        asked.run.0[..8].copy_from_slice(&id.to_le_bytes());
        // A level that is refused at once: cheap to ask, and answered all the same.
        asked.level = Level::Developer;
        match channel::send(hostile.control.as_fd(), &Message::Spawn(asked).encode(id), &[options.as_fd()]) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(_) => break,
        }
        assert!(Instant::now() < until, "a peer that does not read is still served");
    }
    hostile.expect_end("unread");
}

#[test]
fn t07_the_runs_of_an_ended_peer_end_with_it() {
    let mut hostile = Hostile::new();
    let fds = hostile.run(b"sh\0-c\0echo up; sleep 1000\0");
    let mut stdout = File::from(fds[1].try_clone().unwrap());
    let mut up = [0; 3];
    stdout.read_exact(&mut up).unwrap();
    channel::send(hostile.control.as_fd(), b"nonsense", &[]).unwrap();
    // The end of its stdout is the end of every process in the cage.
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    hostile.expect_end("nonsense");
}

/// A connection whose last closer waits for as long as the other side, which is given too, does not read.
fn lingering() -> (OwnedFd, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (silent, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    while std::io::Write::write(&mut stream, &[0; 1 << 16]).is_ok() {}
    let hour = nix::libc::linger { l_onoff: 1, l_linger: 3600 };
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &hour).unwrap();
    (stream.into(), silent)
}

#[test]
fn t08_a_descriptor_whose_last_closer_waits_holds_the_supervisor_up_for_no_time() {
    // The positive control: whoever closes one last waits until its peer is gone.
    let (held, silent) = lingering();
    let (tell, told) = std::sync::mpsc::channel();
    let closing = std::thread::spawn(move || {
        drop(held);
        tell.send(()).unwrap();
    });
    assert!(told.recv_timeout(Duration::from_millis(300)).is_err(), "nobody waits");
    drop(silent);
    closing.join().unwrap();

    let sealed = options(b"true\0");
    let (drained, spawned) =
        (Message::Drained(Empty {}).encode(1_000), Message::Spawn(spawn(200)).encode(1_000));
    for (case, bytes, many) in [
        ("beside a message that takes none", &drained[..], 1),
        ("beside one that takes another", &spawned[..], 1),
        ("beside noise", &[0xa5; FRAME_BYTES][..], 1),
        ("beside a frame that is too long", &[0xa5; 4_000][..], 1),
        ("as many as a frame can have", &drained[..], 253),
    ] {
        let hostile = Hostile::new().works();
        let supervisor = nix::unistd::Pid::from_raw(hostile.supervisor.id().cast_signed());
        // Stopped, so that nobody but the supervisor has the descriptor when it comes to closing it.
        nix::sys::signal::kill(supervisor, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let stopped = nix::sys::wait::waitpid(supervisor, Some(nix::sys::wait::WaitPidFlag::WUNTRACED));
        assert!(matches!(stopped, Ok(nix::sys::wait::WaitStatus::Stopped(..))), "{stopped:?}");
        let (held, _silent) = lingering();
        let mut fds = vec![held.as_fd(); many];
        if case.contains("another") {
            fds.push(sealed.as_fd());
        }
        channel::send(hostile.control.as_fd(), bytes, &fds).unwrap();
        drop(held);
        nix::sys::signal::kill(supervisor, nix::sys::signal::Signal::SIGCONT).unwrap();
        hostile.expect_end(case);
    }
}
