//! A cage: what one is made of, and how it is begun. The ritual itself is in `ritual`, step by step.
//! A cage must never run a command before the supervisor has looked at it from outside and opened its gate.

pub mod attest;
mod init;
mod places;
mod ritual;
pub mod word;
mod worker;

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use gaoler_policy::landlock::CageRules;
use gaoler_protocol::Limits;
use gaoler_sys::channel;
use gaoler_sys::clone::{Child, Side, fork};

use crate::cgroup::Leaf;
use crate::fault::{Doing, Fault};
use crate::plan::Plan;
use crate::template::Covers;

pub use places::Places;

/// What all cages share, made once at boot.
pub struct Common {
    /// By which mechanisms.
    pub plan: Plan,
    /// Landlock rules on what all cages see.
    pub rules: CageRules,
    /// What covers the host's folders, where a cage has no root of its own but mounts.
    pub covers: Option<Rc<Covers>>,
    /// `NAME=value` for every command.
    pub environment: Vec<CString>,
    /// Where a command without a slash is looked for, as in PATH.
    pub path: String,
    /// The options of its /proc.
    pub proc_options: &'static str,
}

/// What this cage is made of. Everything in it is fresh and belongs to one run.
pub struct Blueprint {
    /// Its uid and gid on the host; inside a user namespace 1000 stands for it.
    pub uid: u32,
    /// The user and the network namespace that were made ahead.
    pub ahead: Option<[OwnedFd; 2]>,
    /// Where things are, as the command sees them.
    pub places: Places,
    /// The tenant's workspace as a detached mount; without one it is a fresh file system that dies with the run,
    /// or where nothing can be mounted, already at its place.
    pub workspace: Option<OwnedFd>,
    /// The session's folder as a detached mount.
    pub session: Option<OwnedFd>,
    /// The session's folder by its path, where nothing can be mounted.
    pub session_path: Option<PathBuf>,
    /// A proxy is wanted.
    pub proxy: bool,
    /// What becomes descriptor 3: what the CLI reads its token from, where its environment could be read by others; or
    /// the program of a run over files.
    pub third: Option<OwnedFd>,
    /// It has a door, and where the level says so a proxy.
    pub egress: bool,
    /// The sealed options.
    pub options: OwnedFd,
    /// What is to be run.
    pub command: Command,
    /// The bounds that the ritual itself sets (files, tmpfs, rlimits).
    pub limits: Limits,
}

/// What is to be run behind the gate.
pub enum Command {
    /// The CLI.
    Cli(Invocation),
    /// The words of the options' Argv section.
    Exec,
    /// gaoler's own program, by its descriptor: no path of it is in a cage.
    Files,
}

/// The CLI's argv and environment: constants, validated enums and ids.
pub struct Invocation {
    /// The session's UUID as text.
    pub session: String,
    /// Words between the constants and the session.
    pub words: Vec<CString>,
    /// What stands for the credential.
    pub placeholder: String,
    /// `NAME=value` beside what every command has; the placeholder is in it, unless others could read it there.
    pub environment: Vec<CString>,
    /// A self-test run: a hostile workspace is planted first.
    pub proof: bool,
}

/// A cage that has been begun, as the supervisor holds it.
#[derive(Debug)]
pub struct Begun {
    /// pid 1.
    pub init: Child,
    /// Words of pid 1. Its end at the supervisor going away ends the cage.
    pub line: OwnedFd,
    /// Words of the process before the gate, and the gate itself.
    pub gate: OwnedFd,
    /// The write end of the command's stdin.
    pub stdin: OwnedFd,
    /// The read end of its stdout.
    pub stdout: OwnedFd,
    /// The read end of its stderr.
    pub stderr: OwnedFd,
}

/// The child's ends.
struct Ends {
    line: OwnedFd,
    gate: OwnedFd,
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// Begins a cage: forks it and returns at once. The rest is told by its words.
///
/// `wipe` runs in the child before anything else and must overwrite what belongs to other runs.
///
/// # Errors
/// Those of pipe(2), socketpair(2) and clone(2).
pub fn begin(
    common: &Common,
    blueprint: &Blueprint,
    leaf: Option<&Leaf>,
    wipe: impl FnOnce(),
) -> Result<Begun, Fault> {
    let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).doing("make a pipe");
    let (stdin_read, stdin) = pipe()?;
    let (stdout, stdout_write) = pipe()?;
    let (stderr, stderr_write) = pipe()?;
    let (line, line_child) = channel::pair().doing("make a cage's line")?;
    let (gate, gate_child) = channel::pair().doing("make a gate")?;
    channel::ask_for_pids(&gate).doing("ask for the pids of a gate's words")?;
    let side = fork(common.plan.namespaces, leaf.and_then(Leaf::clone_into)).doing("fork a cage")?;
    match side {
        Side::Parent(init) => Ok(Begun { init, line, gate, stdin, stdout, stderr }),
        Side::Child => {
            wipe();
            drop((line, gate, stdin, stdout, stderr));
            let ends = Ends {
                line: line_child,
                gate: gate_child,
                stdin: stdin_read,
                stdout: stdout_write,
                stderr: stderr_write,
            };
            let tasks: Vec<_> = leaf.iter().flat_map(|leaf| leaf.tasks()).map(AsFd::as_fd).collect();
            ritual::perform(common, blueprint, &tasks, ends)
        }
    }
}
