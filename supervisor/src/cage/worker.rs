//! The command's own process, from its fork to execve: confined first, looked at from outside, then let go.
//! It must never reach execve without the supervisor's byte.

use std::ffi::{CString, OsStr};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use gaoler_policy::landlock::{AccessClass, place, restrict_cage};
use gaoler_policy::seccomp::Threads;
use gaoler_protocol::{Limits, Tier};
use gaoler_sys::clone::{Child, Side, fork};
use gaoler_sys::process::{self, Attempt, Strings};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::ritual::{At, Failure, Wishes};
use super::word::{Step, Word, say};
use super::{Blueprint, Command, Common, Ends, Invocation};
use crate::plan::Root;
use crate::template::PROBE;

/// Less than this, and the CLI does not start.
const DATA_LEAST: u64 = 2 << 30;
/// Above every number that a command's descriptors are placed at.
const ABOVE: i32 = 64;

/// Forks the command's process. In pid 1 it returns; in the fork it never does.
pub(super) fn begin(
    common: &Common,
    blueprint: &Blueprint,
    wishes: &Wishes,
    ends: &Ends,
) -> Result<Child, Failure> {
    match fork(0, None).at(Step::Fork)? {
        Side::Parent(child) => Ok(child),
        Side::Child => {
            let word = match confine(common, blueprint, wishes, ends) {
                Ok(()) => depart(common, blueprint, wishes, ends),
                Err(Failure(step, errno)) => Word::Failed(step as u8, errno as u16),
            };
            let _ = say(&ends.gate, word, &[]);
            process::exit(125)
        }
    }
}

/// Steps 16 to 19.
fn confine(common: &Common, blueprint: &Blueprint, wishes: &Wishes, ends: &Ends) -> Result<(), Failure> {
    let plan = &common.plan;
    // The supervisor looks at where we are while we go on.
    say(&ends.gate, Word::Born, &[]).at(Step::Process)?;
    if !plan.has_pids() {
        // It kept them apart from its stand-in for pid 1, which ends with the supervisor; we end with it.
        process::die_with_parent().at(Step::Process)?;
    }
    nix::unistd::setsid().at(Step::Process)?;
    if plan.keyring {
        process::new_session_keyring().at(Step::Process)?;
    }
    bound(&blueprint.limits, plan.cgroup, plan.tier).at(Step::Process)?;
    crate::spawn::default_signals().at(Step::Process)?;
    // The gate's byte is waited for, so its end here blocks.
    let flags = fcntl(&ends.gate, FcntlArg::F_GETFL).at(Step::Process)?;
    let blocking = OFlag::from_bits_truncate(flags) & !OFlag::O_NONBLOCK;
    fcntl(&ends.gate, FcntlArg::F_SETFL(blocking)).at(Step::Process)?;
    let mut stdio = vec![ends.stdin.as_fd(), ends.stdout.as_fd(), ends.stderr.as_fd()];
    // Out of the way of the numbers that are given below.
    let third = blueprint.third.as_ref().map(|fd| process::copy_above(fd.as_fd(), ABOVE)).transpose();
    // Never dropped: it is closed below by its number, and what is left goes at execve.
    let third = third.at(Step::Process)?.map(ManuallyDrop::new);
    stdio.extend(third.as_ref().map(|fd| fd.as_fd()));
    process::place(&stdio, 0).at(Step::Process)?;

    // The positive control of the self-test: without Landlock the probe file opens.
    std::fs::File::open(probe(common)).at(Step::SelfTest)?;
    if plan.landlock {
        landlock(common, blueprint, wishes).at(Step::Landlock)?;
    }
    let mut keep: Vec<i32> = (0..stdio.len() as i32).collect();
    keep.push(ends.gate.as_raw_fd());
    process::close_all_but(&keep).at(Step::Descriptors)?;
    for filter in plan.filters() {
        filter.install(Threads::One).at(Step::Seccomp)?;
    }

    let wrong = || Failure(Step::SelfTest, 0);
    match std::fs::File::open(probe(common)) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {}
        Ok(_) if !plan.landlock => {}
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

/// A file that everybody may open and that no Landlock rule covers.
fn probe(common: &Common) -> &'static str {
    if common.plan.root == Root::Own { PROBE } else { "/" }
}

/// Landlock: what all cages see, and what is this run's alone, whose inodes no rule made at boot can know.
fn landlock(common: &Common, blueprint: &Blueprint, wishes: &Wishes) -> std::io::Result<()> {
    let places = &blueprint.places;
    let mut own = vec![
        (places.workspace.as_path(), AccessClass::Full),
        (&places.home, AccessClass::Full),
        (&places.tmp, AccessClass::Full),
        (&places.run, AccessClass::Read),
        (Path::new("/proc"), AccessClass::Read),
    ];
    match common.plan.root {
        Root::Own => own.push((Path::new("/dev/shm"), AccessClass::Full)),
        Root::Covered => {
            own.extend([(Path::new("/dev/shm"), AccessClass::Full), (Path::new("/etc"), AccessClass::Read)]);
        }
        Root::Host => {}
    }
    own.extend(blueprint.session_path.iter().map(|path| (path.as_path(), AccessClass::Full)));
    let places = own.into_iter().map(|(path, class)| Ok((place(path)?, class)));
    let places: Vec<_> = places.collect::<std::io::Result<_>>()?;
    let mut per_run: Vec<_> = places.iter().map(|(fd, class)| (fd.as_fd(), *class)).collect();
    if let (Command::Files, Some(program)) = (&blueprint.command, &blueprint.third) {
        per_run.push((program.as_fd(), AccessClass::ReadExecute));
    }
    // In a network of its own a command may listen and connect as it likes.
    let ports: Vec<u16> = wishes.proxy.into_iter().collect();
    let ports = if common.plan.network { None } else { Some(&ports[..]) };
    restrict_cage(&common.rules.base(), &per_run, ports).map(|_| ())
}

/// rlimits: a second bound beside the cgroup, and the only one on files and cores.
fn bound(limits: &Limits, counted: bool, tier: Tier) -> std::io::Result<()> {
    if !counted {
        // Of one process alone; the watchdog looks at their sum.
        process::limit(libc::RLIMIT_DATA, (u64::from(limits.memory_mib) << 20).max(DATA_LEAST))?;
    }
    // One more than the group's: the group must be what refuses, since only the group counts refusals.
    process::limit(libc::RLIMIT_NPROC, u64::from(limits.tasks) + 1)?;
    process::limit(libc::RLIMIT_NOFILE, limits.open_files.into())?;
    process::limit(libc::RLIMIT_FSIZE, u64::from(limits.file_mib) << 20)?;
    for (resource, bound) in [
        (libc::RLIMIT_MEMLOCK, 64 << 10),
        (libc::RLIMIT_MSGQUEUE, 0),
        // 1, not 0: a core that is piped to a program is only given up for exactly 1 (fs/coredump.c).
        (libc::RLIMIT_CORE, 1),
    ] {
        match process::limit(resource, bound) {
            // gVisor has no such thing to limit, and says so.
            Err(error) if tier < Tier::Kernel && error.raw_os_error() == Some(libc::EPERM) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Says that it is ready, waits for the gate, and executes. Returns only with what went wrong.
fn depart(common: &Common, blueprint: &Blueprint, wishes: &Wishes, ends: &Ends) -> Word {
    let (paths, argv, environment) = match prepare(common, blueprint, wishes) {
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

fn prepare(
    common: &Common,
    blueprint: &Blueprint,
    wishes: &Wishes,
) -> Option<(Vec<CString>, Strings, Strings)> {
    let text = |bytes: &[u8]| CString::new(bytes).ok();
    let mut environment = common.environment.clone();
    let (paths, argv) = match &blueprint.command {
        Command::Cli(invocation) => {
            environment.extend(invocation.environment.iter().cloned());
            (
                vec![text(blueprint.places.cli.as_os_str().as_bytes())?],
                cli_argv(blueprint, invocation, wishes),
            )
        }
        Command::Exec => {
            let name = wishes.argv.first()?;
            let paths = match name.contains(&b'/') {
                true => vec![text(name)?],
                false => common
                    .path
                    .split(':')
                    .filter_map(|folder| {
                        let path = Path::new(folder).join(OsStr::from_bytes(name));
                        text(path.as_os_str().as_bytes())
                    })
                    .collect(),
            };
            (paths, wishes.argv.iter().filter_map(|word| text(word)).collect())
        }
        Command::Files => (vec![c"/proc/self/fd/3".into()], vec![c"gaoler-files".into()]),
    };
    // What the level says of places holds in a root of our own; elsewhere they lie where the run has its folders.
    for (name, value) in blueprint.places.variables() {
        if let Some(slot) = environment.iter_mut().find(|it| variable(it) == name.as_bytes()) {
            *slot = text(format!("{name}={}", value.display()).as_bytes())?;
        }
    }
    if let Some(port) = wishes.proxy {
        environment.extend(proxy(blueprint, common.plan.network, port));
    }
    Some((paths, Strings::new(argv), Strings::new(environment)))
}

/// What tells tools of the proxy. Where others could come to its port, what opens it is the placeholder.
fn proxy(blueprint: &Blueprint, own: bool, port: u16) -> impl Iterator<Item = CString> {
    let password = match (&blueprint.command, own) {
        (Command::Cli(invocation), false) => format!("run:{}@", invocation.placeholder),
        _ => String::new(),
    };
    let url = format!("http://{password}127.0.0.1:{port}");
    // Names in capitals are for those who do not read the others, and the other way round.
    let names = ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"];
    let to = names.into_iter().map(move |name| format!("{name}={url}"));
    let not = ["no_proxy", "NO_PROXY"].map(|name| format!("{name}=localhost,127.0.0.1,::1"));
    to.chain(not).flat_map(CString::new)
}

/// The name in `NAME=value`.
fn variable(pair: &CString) -> &[u8] {
    pair.as_bytes().split(|&byte| byte == b'=').next().unwrap_or_default()
}

fn cli_argv(blueprint: &Blueprint, invocation: &Invocation, wishes: &Wishes) -> Vec<CString> {
    let constant = |words: &[&str]| words.iter().filter_map(|s| CString::new(*s).ok()).collect::<Vec<_>>();
    let mut argv = constant(&["claude"]);
    argv.extend(invocation.words.iter().cloned());
    if wishes.system {
        let system = blueprint.places.system();
        argv.extend(constant(&["--append-system-prompt-file", &system.to_string_lossy()]));
    }
    if wishes.mcp {
        argv.extend(constant(&["--mcp-config", &blueprint.places.mcp().to_string_lossy()]));
    }
    argv.extend(constant(&[if wishes.resume { "--resume" } else { "--session-id" }, &invocation.session]));
    argv
}
