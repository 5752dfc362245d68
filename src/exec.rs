//! `gaoler exec`: any command in the cage that a CLI run gets, through a supervisor of its own.
//! It must never end with a status that could be the command's when the failure was ours: that is 125.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gaoler_policy::settings::Settings;
use gaoler_protocol::{
    Conversation, Effort, Exit, Kind, LEASE_IDLE, LEASE_OUTPUT, Layers, Level, Limits, Message, Model,
    Reason, Refusal, Refused, RunId, Section, Spawn, Spawned, TenantKey, Violation, section,
};
use gaoler_sys::{channel, memfd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sha2::{Digest, Sha256};

use crate::ledger;
use crate::meter::{Meter, Past};
use crate::relay::{Pipes, relay};
use crate::report::{Report, ReportFile};
use crate::supervisor::{Heard, Supervisor, hear, readable};

/// Trying every layer of a busy host takes a second or two; longer than this is a hang.
const START_WAIT: Duration = Duration::from_secs(60);
/// After the lease is dropped: the supervisor's teardown deadline is 2 s.
const CANCEL_WAIT: Duration = Duration::from_secs(5);
/// The words of a command and their NULs; the kernel's own limit of one argument.
const ARGV_BYTES_MAX: usize = 128 * 1024;

/// gaoler's own failure.
pub const STATUS_FAILED: u8 = 125;
/// The time was up.
pub const STATUS_TIMEOUT: u8 = 124;
/// Found, but not to be executed.
pub const STATUS_NOT_EXECUTABLE: u8 = 126;
/// Not found.
pub const STATUS_NOT_FOUND: u8 = 127;
/// Added to a signal's number.
pub const STATUS_SIGNAL: u8 = 128;

/// What to run.
pub struct Request {
    /// Whose workspace; none = one that dies with the run.
    pub tenant: Option<String>,
    /// The limits wished for; a zero is the level's own.
    pub limits: Limits,
    /// Where the report goes.
    pub report: Option<PathBuf>,
    /// The command and its arguments.
    pub argv: Vec<OsString>,
}

/// Runs the command and returns the status to exit with.
///
/// # Errors
/// gaoler's own failure, as a sentence; its status is [`STATUS_FAILED`].
pub fn exec(settings: &Settings, level: Level, request: &Request) -> Result<u8, String> {
    let argv = argv(&request.argv)?;
    let file = request.report.as_deref().map(ReportFile::prepare).transpose()?;
    // Blocked before any thread or child is there, so that a signal is only ever seen by our own poll.
    let signals = caught()?;
    let mut supervisor = Supervisor::start("exec", settings)?;
    let mut report = Report { level: Some(level), ..Report::default() };
    let outcome = run(&mut supervisor, &signals, &mut report, spawn(level, request), &argv);
    if supervisor.end().is_none() {
        eprintln!("gaoler: the supervisor is still cleaning up; what it leaves is swept by the next start");
    }
    if let Some(file) = file {
        file.write(&report.json(*outcome.as_ref().unwrap_or(&STATUS_FAILED)))?;
    }
    outcome
}

/// From the supervisor's first word to the run's last.
fn run(
    supervisor: &mut Supervisor,
    signals: &SignalFd,
    report: &mut Report,
    spawn: Spawn,
    argv: &[u8],
) -> Result<u8, String> {
    match next(supervisor, signals)? {
        Said::Layers(layers) => report.layers = Some(layers),
        Said::Refused(refused) => return refusal(report, refused),
        Said::Spawned(..) => return Err("the supervisor answered before it was asked".into()),
        Said::Signal(number) => return Ok(STATUS_SIGNAL + number),
    }
    let options = memfd::sealed("options", argv).map_err(|error| format!("memfd_create: {error}"))?;
    supervisor.tell(&Message::Spawn(spawn), &[options.as_fd()])?;
    drop(options);
    match next(supervisor, signals)? {
        Said::Spawned(spawned, fds) => {
            report.spawned = Some(spawned);
            accompany(fds, signals, report, &spawned.limits)
        }
        Said::Refused(refused) => refusal(report, refused),
        Said::Layers(_) => Err("the supervisor said its layers twice".into()),
        Said::Signal(number) => Ok(STATUS_SIGNAL + number),
    }
}

/// Relays and listens until the run's last word.
fn accompany(
    fds: [OwnedFd; 6],
    signals: &SignalFd,
    report: &mut Report,
    limits: &Limits,
) -> Result<u8, String> {
    let [stdin, stdout, stderr, lease, words, ledger] = fds;
    let meter = Arc::new(Meter::new(limits));
    let relay = relay(Pipes { stdin, stdout, stderr }, &meter).map_err(|error| format!("relay: {error}"))?;
    let poll = |error| format!("poll: {error}");
    let mut lease = Some(lease);
    let mut signal = None;
    let mut deadline = None;
    let exit = loop {
        // Until it is told to end, a run is watched for what it writes.
        let next = if lease.is_some() { meter.look(Instant::now()) } else { Ok(Instant::now()) };
        let past = match next {
            Err(past) => Some(past),
            Ok(_) if lease.is_none() => None,
            Ok(next) => {
                let all = [words.as_fd(), signals.as_fd(), relay.over.as_fd()].map(Some);
                match readable(&all, Some(next)).map_err(poll)? {
                    Some(2) => Some(Past::Output),
                    Some(_) => None,
                    None => continue,
                }
            }
        };
        if let (Some(past), Some(held)) = (past, lease.take_if(|_| past.is_some())) {
            let word = if past == Past::Output { LEASE_OUTPUT } else { LEASE_IDLE };
            let _ = channel::send(held.as_fd(), word, &[]);
            deadline = Some(Instant::now() + CANCEL_WAIT);
        }
        // A second signal does not wait for the teardown: the closed lease has already ended the run.
        match hear(words.as_fd(), Some(signals.as_fd()), deadline) {
            Heard::Message(Message::Violation(violation), _) => report.note(violation),
            Heard::Message(Message::Progress(_), _) => {}
            Heard::Message(Message::Exit(exit), _) => break exit,
            Heard::Message(other, _) => return Err(format!("the supervisor said {} of a run", other.name())),
            Heard::Ended => return Err("the supervisor ended before the run did".into()),
            Heard::Broken(why) => return Err(format!("the supervisor sent {why}")),
            Heard::Interrupted => match (number(signals), lease.take()) {
                (Some(number), Some(held)) => {
                    drop(held);
                    signal = Some(number);
                    deadline = Some(Instant::now() + CANCEL_WAIT);
                }
                (Some(number), None) => return Ok(STATUS_SIGNAL + number),
                (None, held) => lease = held,
            },
            Heard::Late => match signal {
                Some(number) => return Ok(STATUS_SIGNAL + number),
                None => return Err("the supervisor has not ended the run in time".into()),
            },
        }
    };
    report.exit = Some(exit);
    report.egress = ledger::read(&ledger).destinations;
    if let Some(number) = signal {
        return Ok(STATUS_SIGNAL + number);
    }
    // Every writer is gone, so the relay ends as soon as our reader has taken the rest.
    match readable(&[Some(relay.drained.as_fd()), Some(signals.as_fd())], None).map_err(poll)? {
        Some(1) => Ok(STATUS_SIGNAL + number(signals).unwrap_or_default()),
        _ => status(&exit),
    }
}

/// The exit status for how a run ended.
///
/// # Errors
/// Ends that are gaoler's own failure.
pub fn status(exit: &Exit) -> Result<u8, String> {
    match exit.reason {
        Reason::Exited => Ok(exit.code),
        Reason::Signaled => Ok(STATUS_SIGNAL.saturating_add(exit.signal)),
        Reason::Wall | Reason::Idle => Ok(STATUS_TIMEOUT),
        // The command went on to an end of its own after a fork was refused.
        Reason::Tasks if exit.signal == 0 => Ok(exit.code),
        // The kernel's way to end a process that is out of memory is SIGKILL; so is ours for other limits.
        Reason::Oom | Reason::Tasks | Reason::Output | Reason::Disk | Reason::Locks => {
            Ok(STATUS_SIGNAL + Signal::SIGKILL as u8)
        }
        Reason::Cancelled => Err("the run was cancelled".into()),
        Reason::Finished => Err("the run was ended before its command".into()),
        Reason::EgressDied => Err("the run's egress died".into()),
        Reason::InitDied => Err("pid 1 of the cage died without a word".into()),
        Reason::Drained => Err("the supervisor shut down".into()),
    }
}

/// The status for a run that did not start.
///
/// # Errors
/// Every refusal but that of execve, as a sentence.
fn refusal(report: &mut Report, refused: Refused) -> Result<u8, String> {
    report.refused = Some(refused);
    let errno = nix::errno::Errno::from_raw(i32::from(refused.errno));
    match refused.reason {
        Refusal::ExecFailed => {
            eprintln!("gaoler: the command cannot be executed in the cage: {}", errno.desc());
            Ok(match errno {
                nix::errno::Errno::ENOENT => STATUS_NOT_FOUND,
                _ => STATUS_NOT_EXECUTABLE,
            })
        }
        Refusal::CageFailed => Err(format!(
            "step {} of the cage failed: {}; `gaoler doctor` says what this host lacks",
            refused.step,
            errno.desc()
        )),
        Refusal::LevelUnavailable => {
            Err("this host does not reach the tier that was asked for; `gaoler doctor` says what it lacks"
                .into())
        }
        Refusal::TenantsFull => {
            Err("the range of tenant uids is used up; widen uids.tenant or drop --tenant".into())
        }
        Refusal::Busy
        | Refusal::CredentialRefused
        | Refusal::UpstreamUnavailable
        | Refusal::Draining
        | Refusal::SessionBusy
        | Refusal::WorkspaceUnknown
        | Refusal::WorkspaceOther
        | Refusal::Unacceptable
        | Refusal::EgressFailed => Err(format!("the supervisor refused the run: {}", refused.reason)),
    }
}

/// What the supervisor may say on its control socket here.
enum Said {
    Layers(Layers),
    Spawned(Spawned, [OwnedFd; 6]),
    Refused(Refused),
    Signal(u8),
}

fn next(supervisor: &Supervisor, signals: &SignalFd) -> Result<Said, String> {
    let deadline = Some(Instant::now() + START_WAIT);
    loop {
        return match hear(supervisor.control(), Some(signals.as_fd()), deadline) {
            Heard::Message(Message::Layers(layers), _) => Ok(Said::Layers(layers)),
            Heard::Message(Message::Refused(refused), _) => Ok(Said::Refused(refused)),
            Heard::Message(Message::Spawned(spawned), fds) => {
                let fds = <[OwnedFd; 6]>::try_from(fds);
                fds.map(|fds| Said::Spawned(spawned, fds))
                    .map_err(|_| "Spawned without its descriptors".into())
            }
            Heard::Message(other, _) => Err(format!("the supervisor said {}", other.name())),
            Heard::Ended => Err("the supervisor did not start; its own message says why".into()),
            Heard::Broken(why) => Err(format!("the supervisor sent {why}")),
            Heard::Interrupted => match number(signals) {
                Some(number) => Ok(Said::Signal(number)),
                None => continue,
            },
            Heard::Late => Err(format!("the supervisor has not answered in {} s", START_WAIT.as_secs())),
        };
    }
}

fn caught() -> Result<SignalFd, String> {
    let set: SigSet =
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
    set.thread_block().map_err(|errno| format!("sigprocmask: {errno}"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|errno| format!("signalfd: {errno}"))
}

fn number(signals: &SignalFd) -> Option<u8> {
    signals.read_signal().ok().flatten().and_then(|info| u8::try_from(info.ssi_signo).ok())
}

fn spawn(level: Level, request: &Request) -> Spawn {
    Spawn {
        run: RunId(rand::random()),
        tenant: TenantKey(request.tenant.as_deref().map_or([0; 32], tenant_key)),
        kind: Kind::Exec,
        level,
        conversation: Conversation::Stateless,
        ephemeral: request.tenant.is_none(),
        proof: false,
        session: [0; 16],
        workspace: [0; 16],
        model: Model::DEFAULT,
        effort: Effort::Unset,
        turns_max: 0,
        mcp_refused: false,
        budget_microusd: 0,
        limits: request.limits,
    }
}

/// The key of a tenant who is only a name on this machine. It can never be a served tenant's, whose key is
/// an HMAC under the server's secret; whoever may run `gaoler exec` is root and needs no capability.
fn tenant_key(name: &str) -> [u8; 32] {
    Sha256::new().chain_update(b"exec-tenant\0").chain_update(name).finalize().into()
}

/// A tenant's name on the command line.
///
/// # Errors
/// Another character, or another length.
pub fn tenant_name(name: &str) -> Result<String, String> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    match (1..=64).contains(&name.len()) && name.bytes().all(fits) && !name.starts_with(['.', '-']) {
        true => Ok(name.to_owned()),
        false => Err("a tenant's name is 1 to 64 of A-Z a-z 0-9 . _ - and does not begin with . or -".into()),
    }
}

fn argv(words: &[OsString]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    for word in words {
        bytes.extend_from_slice(word.as_bytes());
        bytes.push(0);
    }
    match bytes.len() {
        0..=ARGV_BYTES_MAX => Ok(section(Section::Argv, &bytes)),
        length => Err(format!("the command has {length} bytes; at most {ARGV_BYTES_MAX} are handed on")),
    }
}

impl Report {
    /// Keeps the newest count of each kind of violation.
    fn note(&mut self, violation: Violation) {
        match self.violations.iter_mut().find(|known| known.what == violation.what) {
            Some(known) => *known = violation,
            None => self.violations.push(violation),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(reason: Reason, code: u8, signal: u8) -> Exit {
        Exit {
            run: RunId([0; 16]),
            reason,
            code,
            signal,
            quarantined: false,
            wall_us: 0,
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

    #[test]
    fn every_end_has_its_status() {
        let rows = [
            (ended(Reason::Exited, 0, 0), Some(0)),
            (ended(Reason::Exited, 7, 0), Some(7)),
            (ended(Reason::Exited, 255, 0), Some(255)),
            (ended(Reason::Signaled, 0, 9), Some(137)),
            (ended(Reason::Signaled, 0, 13), Some(141)),
            (ended(Reason::Wall, 0, 9), Some(124)),
            (ended(Reason::Oom, 0, 9), Some(137)),
            (ended(Reason::Idle, 0, 9), Some(124)),
            (ended(Reason::Tasks, 3, 0), Some(3)),
            (ended(Reason::Tasks, 0, 9), Some(137)),
            (ended(Reason::Output, 0, 9), Some(137)),
            (ended(Reason::Disk, 0, 9), Some(137)),
            (ended(Reason::Locks, 0, 9), Some(137)),
            (ended(Reason::Cancelled, 0, 9), None),
            (ended(Reason::Finished, 0, 9), None),
            (ended(Reason::EgressDied, 0, 9), None),
            (ended(Reason::InitDied, 0, 9), None),
            (ended(Reason::Drained, 0, 9), None),
        ];
        for (exit, expected) in rows {
            assert_eq!(status(&exit).ok(), expected, "{:?}", exit.reason);
        }
        assert_eq!(rows.map(|(exit, _)| exit.reason).len(), Reason::ALL.len() + 4);
    }

    #[test]
    fn every_refusal_has_its_status() {
        for reason in Refusal::ALL {
            for errno in [0u16, libc_enoent(), 13] {
                let refused = Refused { run: RunId([0; 16]), reason: *reason, step: 3, errno };
                let expected = match (reason, errno) {
                    (Refusal::ExecFailed, 2) => Some(127),
                    (Refusal::ExecFailed, _) => Some(126),
                    _ => None,
                };
                assert_eq!(refusal(&mut Report::default(), refused).ok(), expected, "{reason} {errno}");
            }
        }
    }

    fn libc_enoent() -> u16 {
        nix::errno::Errno::ENOENT as u16
    }

    #[test]
    fn names_of_tenants_are_plain_words() {
        let good = ["a", "Team-1", "a.b_c", &"x".repeat(64)];
        let bad = ["", ".", "..", "-x", "a/b", "a b", "é", "a\0", &"x".repeat(65)];
        good.iter().for_each(|name| assert_eq!(tenant_name(name).as_deref(), Ok(*name)));
        bad.iter().for_each(|name| assert!(tenant_name(name).is_err(), "{name}"));
        assert_ne!(tenant_key("a"), tenant_key("b"));
    }

    #[test]
    fn words_travel_ended_by_nul() {
        let words = ["sh".into(), "-c".into(), String::new().into()];
        let options = argv(&words).expect("short");
        let sections = gaoler_protocol::sections(&options).expect("well-formed");
        assert_eq!(sections, [(Section::Argv, &b"sh\0-c\0\0"[..])]);
        assert!(argv(&["x".repeat(ARGV_BYTES_MAX).into()]).is_err());
    }
}
