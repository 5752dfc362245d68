//! The launch of a small program: in a cage, by posix_spawn, and in bubblewrap with every namespace.
//! It must never give a contender less to set up than a real run of it would have.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use gaoler::supervisor::{Heard, Supervisor, hear};
use gaoler_policy::settings::Settings;
use gaoler_protocol::{
    Conversation, Effort, Kind, Level, Limits, Message, Model, RunId, Section, Spawn, TenantKey, section,
};
use gaoler_sys::memfd;
use rand::seq::SliceRandom;

use crate::table::{Row, Table};

/// Between launches, where there are gaps: long enough for a supervisor to make the next set ready.
const GAP: Duration = Duration::from_millis(30);
/// Rounds before counting starts: caches fill, pools fill.
const WARM_UP: u32 = 5;
/// Far beyond any launch; past it something hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is launched: the same dynamically linked file for everybody.
const PROGRAM: &str = "/usr/bin/echo";

/// No pause between launches.
///
/// # Errors
/// Whatever a contender needs and does not have.
pub fn back_to_back(rounds: u32) -> Result<Table, String> {
    launches("launch, back to back".into(), rounds, None)
}

/// 30 ms between launches.
///
/// # Errors
/// Whatever a contender needs and does not have.
pub fn with_gaps(rounds: u32) -> Result<Table, String> {
    launches("launch, 30 ms gaps".into(), rounds, Some(GAP))
}

fn launches(title: String, rounds: u32, gap: Option<Duration>) -> Result<Table, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("a folder: {error}"))?;
    let mut settings = Settings::default();
    settings.state.dir = folder.path().join("state");
    let workspace = folder.path().join("workspace");
    std::fs::create_dir(&workspace).map_err(|error| format!("a workspace: {error}"))?;
    let mut supervisor = Supervisor::start("exec", &settings)?;
    match hear(supervisor.control(), None, Some(Instant::now() + PATIENCE)) {
        Heard::Message(Message::Layers(_), _) => {}
        other => return Err(format!("the supervisor did not start: {other:?}")),
    }
    let mut rows = [Row::new("cage"), Row::new("posix_spawn"), Row::new("bubblewrap")];
    for round in 0..rounds + WARM_UP {
        let mut order = [0, 1, 2];
        order.shuffle(&mut rand::rng());
        for contender in order {
            let (first, end) = match contender {
                0 => cage(&mut supervisor)?,
                1 => child(&mut Command::new(PROGRAM))?,
                _ => child(&mut bubblewrap(&workspace))?,
            };
            if round >= WARM_UP {
                rows[contender].first.push(first);
                rows[contender].end.push(end);
            }
            if let Some(gap) = gap {
                std::thread::sleep(gap);
            }
        }
    }
    supervisor.end();
    Ok(Table { title: format!("{title}: {PROGRAM}, {rounds} rounds"), rows: rows.into() })
}

/// One run of a supervisor that is there, as a server's is: from the question to the first byte, and to Exit.
fn cage(supervisor: &mut Supervisor) -> Result<(Duration, Duration), String> {
    let started = Instant::now();
    let argv = section(Section::Argv, format!("{PROGRAM}\0x\0").as_bytes());
    let options = memfd::sealed("options", &argv).map_err(|error| format!("memfd: {error}"))?;
    supervisor.tell(&Message::Spawn(spawn()), &[options.as_fd()])?;
    let fds = match hear(supervisor.control(), None, Some(started + PATIENCE)) {
        Heard::Message(Message::Spawned(_), fds) => fds,
        other => return Err(format!("no cage: {other:?}")),
    };
    let [stdin, stdout, _stderr, _lease, report, _ledger] =
        <[OwnedFd; 6]>::try_from(fds).map_err(|_| "Spawned without its descriptors")?;
    drop(stdin);
    let first = first_byte(stdout.into(), started)?;
    loop {
        match hear(report.as_fd(), None, Some(started + PATIENCE)) {
            Heard::Message(Message::Exit(exit), _) if exit.code == 0 && exit.signal == 0 => {
                return Ok((first, started.elapsed()));
            }
            Heard::Message(Message::Progress(_), _) => {}
            other => return Err(format!("the cage ended badly: {other:?}")),
        }
    }
}

fn spawn() -> Spawn {
    Spawn {
        run: RunId(rand::random()),
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

/// A child of ours, which std starts by posix_spawn: to its first byte, and to its end.
fn child(command: &mut Command) -> Result<(Duration, Duration), String> {
    let started = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    // bubblewrap has its program in the arguments already.
    if command.get_args().next().is_none() {
        command.arg("x");
    }
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().map_err(|error| format!("{name}: {error}"))?;
    let stdout = child.stdout.take().ok_or("no stdout")?;
    let first = first_byte(OwnedFd::from(stdout).into(), started)?;
    let status = child.wait().map_err(|error| format!("wait: {error}"))?;
    match status.success() {
        true => Ok((first, started.elapsed())),
        false => Err(format!("{name} ended with {status}")),
    }
}

/// Namespaces, a root of its own and no capability; no Landlock, no seccomp, no cgroup, no uid per run.
fn bubblewrap(workspace: &std::path::Path) -> Command {
    let mut command = Command::new("bwrap");
    command.args(["--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000"]);
    command.args(["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]);
    command.args([
        "--ro-bind",
        "/usr",
        "/usr",
        "--symlink",
        "usr/bin",
        "/bin",
        "--symlink",
        "usr/lib",
        "/lib",
    ]);
    command.args(["--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev"]);
    command.args(["--tmpfs", "/tmp", "--tmpfs", "/home/agent", "--bind"]).arg(workspace).arg("/workspace");
    command.args(["--chdir", "/workspace", PROGRAM, "x"]);
    command
}

fn first_byte(mut from: std::fs::File, started: Instant) -> Result<Duration, String> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = fcntl(&from, FcntlArg::F_GETFL).map_err(|errno| format!("fcntl: {errno}"))?;
    let flags = OFlag::from_bits_truncate(flags) - OFlag::O_NONBLOCK;
    fcntl(&from, FcntlArg::F_SETFL(flags)).map_err(|errno| format!("fcntl: {errno}"))?;
    match from.read(&mut [0; 1]) {
        Ok(1) => Ok(started.elapsed()),
        Ok(_) => Err("the program said nothing".into()),
        Err(error) => Err(format!("read: {error}")),
    }
}
