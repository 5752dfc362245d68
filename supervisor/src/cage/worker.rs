//! The command's own process, from its fork to execve: confined first, looked at from outside, then let go.
//! It must never reach execve without the supervisor's byte.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;

use gaoler_policy::landlock::{AccessClass, place, restrict_cage};
use gaoler_policy::seccomp::Threads;
use gaoler_protocol::Limits;
use gaoler_sys::clone::{Child, Side, clone3};
use gaoler_sys::process::{self, Attempt, Strings};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::ritual::{At, Failure, Wishes};
use super::word::{Step, Word, say};
use super::{Blueprint, Command, Common, Ends, Invocation};
use crate::template::{CLI, PROBE};

/// What was mounted for this run alone, and so has inodes that no rule made at boot can know.
const PER_RUN: [(&str, AccessClass); 6] = [
    ("/workspace", AccessClass::Full),
    ("/home/agent", AccessClass::Full),
    ("/tmp", AccessClass::Full),
    ("/dev/shm", AccessClass::Full),
    ("/run/gaoler", AccessClass::Read),
    ("/proc", AccessClass::Read),
];

/// Forks the command's process. In pid 1 it returns; in the fork it never does.
pub(super) fn fork(
    common: &Common,
    blueprint: &Blueprint,
    wishes: &Wishes,
    ends: &Ends,
) -> Result<Child, Failure> {
    match clone3(0, None).at(Step::Fork)? {
        Side::Parent(child) => Ok(child),
        Side::Child => {
            let word = match confine(common, blueprint, ends) {
                Ok(()) => depart(common, &blueprint.command, wishes, ends),
                Err(Failure(step, errno)) => Word::Failed(step as u8, errno as u16),
            };
            let _ = say(&ends.gate, word, &[]);
            process::exit(125)
        }
    }
}

/// Steps 16 to 19.
fn confine(common: &Common, blueprint: &Blueprint, ends: &Ends) -> Result<(), Failure> {
    // The supervisor looks at where we are while we go on.
    say(&ends.gate, Word::Born, &[]).at(Step::Process)?;
    nix::unistd::setsid().at(Step::Process)?;
    process::new_session_keyring().at(Step::Process)?;
    bound(&blueprint.limits).at(Step::Process)?;
    crate::spawn::default_signals().at(Step::Process)?;
    process::place(&[ends.stdin.as_fd(), ends.stdout.as_fd(), ends.stderr.as_fd()], 0).at(Step::Process)?;
    // The gate's byte is waited for, so its end here blocks.
    let flags = fcntl(&ends.gate, FcntlArg::F_GETFL).at(Step::Process)?;
    let blocking = OFlag::from_bits_truncate(flags) & !OFlag::O_NONBLOCK;
    fcntl(&ends.gate, FcntlArg::F_SETFL(blocking)).at(Step::Process)?;

    // The positive control of the self-test: without Landlock the probe file opens.
    std::fs::File::open(PROBE).at(Step::SelfTest)?;
    landlock(common).at(Step::Landlock)?;
    process::close_all_but(&[0, 1, 2, ends.gate.as_raw_fd()]).at(Step::Descriptors)?;
    common.cage_filter.install(Threads::One).at(Step::Seccomp)?;

    let wrong = || Failure(Step::SelfTest, 0);
    match std::fs::File::open(PROBE) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {}
        _ => return Err(wrong()),
    }
    for (attempt, errno) in [
        (Attempt::Mount, libc::EPERM),
        (Attempt::UnshareUser, libc::EPERM),
        (Attempt::SocketAlg, libc::EAFNOSUPPORT),
        (Attempt::IoUring, libc::EPERM),
        (Attempt::Ptrace, libc::EPERM),
    ] {
        if process::refusal(attempt) != errno {
            return Err(wrong());
        }
    }
    Ok(())
}

/// Landlock: the template's files read-only, and what was mounted for this run.
fn landlock(common: &Common) -> std::io::Result<()> {
    let places = PER_RUN.iter().map(|(path, class)| Ok((place(path.as_ref())?, *class)));
    let places: Vec<_> = places.collect::<std::io::Result<_>>()?;
    let per_run: Vec<_> = places.iter().map(|(fd, class)| (fd.as_fd(), *class)).collect();
    restrict_cage(&common.rules.base(), &per_run).map(|_| ())
}

/// rlimits: a second bound beside the cgroup, and the only one on files and cores.
fn bound(limits: &Limits) -> std::io::Result<()> {
    // One more than the group's: the group must be what refuses, since only the group counts refusals.
    process::limit(libc::RLIMIT_NPROC, u64::from(limits.tasks) + 1)?;
    process::limit(libc::RLIMIT_NOFILE, limits.open_files.into())?;
    process::limit(libc::RLIMIT_FSIZE, u64::from(limits.file_mib) << 20)?;
    process::limit(libc::RLIMIT_MEMLOCK, 64 << 10)?;
    process::limit(libc::RLIMIT_MSGQUEUE, 0)?;
    // 1, not 0: a core that is piped to a program is only given up for exactly 1 (fs/coredump.c).
    process::limit(libc::RLIMIT_CORE, 1)
}

/// Says that it is ready, waits for the gate, and executes. Returns only with what went wrong.
fn depart(common: &Common, command: &Command, wishes: &Wishes, ends: &Ends) -> Word {
    let (paths, argv, environment) = match prepare(common, command, wishes) {
        Some(prepared) => prepared,
        None => return Word::ExecFailed(libc::EINVAL as u16),
    };
    if say(&ends.gate, Word::Ready, &[]).is_err() {
        process::exit(125);
    }
    let mut byte = [0; 1];
    if nix::unistd::read(&ends.gate, &mut byte) != Ok(1) {
        process::exit(125);
    }
    // As a shell does it: the search goes on past what is not there, and remembers what may not be run.
    let mut worst = libc::ENOENT;
    for path in &paths {
        let errno = process::execute(path, &argv, &environment).raw_os_error().unwrap_or(libc::EINVAL);
        if errno != libc::ENOENT && errno != libc::ENOTDIR {
            worst = errno;
        }
    }
    Word::ExecFailed(worst as u16)
}

fn prepare(common: &Common, command: &Command, wishes: &Wishes) -> Option<(Vec<CString>, Strings, Strings)> {
    let mut environment = common.environment.clone();
    let (paths, argv) = match command {
        Command::Cli(invocation) => {
            environment.extend(invocation.environment.iter().cloned());
            (vec![CString::new(CLI).ok()?], cli_argv(invocation, wishes))
        }
        Command::Exec => {
            let name = wishes.argv.first()?;
            let paths = match name.contains(&b'/') {
                true => vec![CString::new(name.clone()).ok()?],
                false => common
                    .path
                    .split(':')
                    .filter_map(|folder| {
                        let path = std::path::Path::new(folder).join(OsStr::from_bytes(name));
                        CString::new(path.as_os_str().as_bytes()).ok()
                    })
                    .collect(),
            };
            (paths, wishes.argv.iter().filter_map(|word| CString::new(word.clone()).ok()).collect())
        }
    };
    Some((paths, Strings::new(argv), Strings::new(environment)))
}

fn cli_argv(invocation: &Invocation, wishes: &Wishes) -> Vec<CString> {
    let constant = |words: &[&str]| words.iter().filter_map(|s| CString::new(*s).ok()).collect::<Vec<_>>();
    let mut argv = constant(&["claude"]);
    argv.extend(invocation.words.iter().cloned());
    if wishes.system {
        argv.extend(constant(&["--append-system-prompt-file", "/run/gaoler/system.md"]));
    }
    argv.extend(constant(&[if wishes.resume { "--resume" } else { "--session-id" }, &invocation.session]));
    argv
}
