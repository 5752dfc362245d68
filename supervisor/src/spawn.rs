//! Starts the unprivileged processes beside the cages: ledger, frontend, egress, embedded upstream, exporter.
//! Each gets its own uid, no capability, no file of the state but the ledger's folder, and exactly the descriptors
//! named here. The one exception is the command line, for a reload: it reads the operator's files in the operator's name,
//! for a few milliseconds, and hears nobody.

use std::ffi::CString;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use gaoler_sys::channel;
use gaoler_sys::clone::{Child, Side, fork};
use gaoler_sys::process::{self, Strings};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use crate::fault::{Doing, Fault};
use crate::plan::{Ids, Plan, Root};
use crate::uids::become_uid;

/// Seconds that the command line may take for a reload.
const COMMAND_SECONDS: u32 = 30;
/// Above every number that a descriptor is placed at: 0 to 2, the control socket, and at most six more.
const ABOVE: i32 = 64;

/// The network that a process lives in.
#[derive(Debug, Clone, Copy)]
pub enum Network<'a> {
    /// The host's: it has to reach the upstream.
    Host,
    /// None at all.
    Empty,
    /// None at all, and a folder to work in, which becomes its root where a root can be changed.
    Folder(BorrowedFd<'a>),
    /// The host's, and the host's root where this process has left it: the command line keeps all of our rights.
    Command(Option<BorrowedFd<'a>>),
}

/// A process with a control socket.
#[derive(Debug)]
pub struct Attended {
    /// The process.
    pub child: Child,
    /// Our end of its control socket.
    pub control: OwnedFd,
}

/// Starts a program under this uid. It finds its control socket as descriptor 3 and `more` from 4 on.
///
/// # Errors
/// Those of socketpair(2) and clone(2). A failure after the fork shows as the end of the control socket.
pub fn start(
    plan: &Plan,
    program: BorrowedFd<'_>,
    argv: &[&str],
    uid: u32,
    network: Network<'_>,
    more: &[BorrowedFd<'_>],
    wipe: impl FnOnce(),
) -> Result<Attended, Fault> {
    let (control, theirs) = channel::pair().doing("make a control socket")?;
    let own = plan.namespaces & !libc::CLONE_NEWNET;
    let namespaces = match network {
        Network::Command(_) => 0,
        Network::Host => own,
        _ if plan.network => own | libc::CLONE_NEWNET,
        _ => own,
    };
    match fork(namespaces, None).doing(format!("fork {}", argv.first().unwrap_or(&"a process")))? {
        Side::Parent(child) => Ok(Attended { child, control }),
        Side::Child => {
            wipe();
            let fds: Vec<BorrowedFd<'_>> =
                std::iter::once(theirs.as_fd()).chain(more.iter().copied()).collect();
            let fault = become_it(plan, program, argv, uid, network, &fds);
            crate::log::event(
                "start_failed",
                &[("program", &argv.first().unwrap_or(&"?")), ("fault", &fault)],
            );
            process::exit(125)
        }
    }
}

/// In the child: gives everything up and executes. Returns only with what went wrong.
fn become_it(
    plan: &Plan,
    program: BorrowedFd<'_>,
    argv: &[&str],
    uid: u32,
    network: Network<'_>,
    fds: &[BorrowedFd<'_>],
) -> Fault {
    let words = argv.iter().filter_map(|word| CString::new(*word).ok()).collect();
    let (argv, environment) = (Strings::new(words), Strings::new(Vec::new()));
    let command = matches!(network, Network::Command(_));
    let given_up = || -> Result<ManuallyDrop<OwnedFd>, Fault> {
        if let Network::Command(root) = network {
            nix::unistd::alarm::set(COMMAND_SECONDS);
            if let Some(root) = root {
                nix::unistd::fchdir(root).doing("enter the host's root")?;
                nix::unistd::chroot(".").doing("enter the host's root")?;
            }
        }
        // Before the root changes: in the ledger's folder there is none.
        let null = File::options().read(true).write(true).open("/dev/null").map(ManuallyDrop::new);
        let null = null.doing("open /dev/null")?;
        if let Network::Folder(folder) = network {
            nix::unistd::fchdir(folder).doing("enter the ledger's folder")?;
            match nix::unistd::chroot(".") {
                // Nobody may change a root here: its own uid and Landlock keep it in its folder, which has a name.
                Err(Errno::EPERM) if plan.root != Root::Own => {}
                changed => changed.doing("change the root")?,
            }
        }
        if plan.bounds() && !command {
            process::empty_bounding_set().doing("empty the bounding set")?;
        }
        if plan.ids != Ids::Same && !command {
            become_uid(uid).doing("change uid, gid and groups")?;
        }
        process::die_with_parent().doing("ask for the parent's death signal")?;
        process::not_dumpable().doing("become untraceable")?;
        process::no_new_privs().doing("set no_new_privs")?;
        process::limit(libc::RLIMIT_CORE, 1).doing("forbid cores")?;
        default_signals().doing("reset signals")?;
        // Out of the way of the numbers that they are to have. Never dropped: their numbers are closed below
        // by number, and what is left dies with this process or at execve.
        let high = |fd: &BorrowedFd<'_>| process::copy_above(*fd, ABOVE).map(ManuallyDrop::new);
        let program = high(&program).doing("copy a descriptor")?;
        let fds = fds.iter().map(high).collect::<Result<Vec<_>, _>>().doing("copy a descriptor")?;
        process::place(&[null.as_fd(), null.as_fd()], 0).doing("place stdin and stdout")?;
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
        process::place(&borrowed, channel::CONTROL_FD).doing("place descriptors")?;
        let mut keep: Vec<i32> = (0..channel::CONTROL_FD + fds.len() as i32).collect();
        keep.push(program.as_raw_fd());
        process::close_all_but(&keep).doing("close descriptors")?;
        if !command {
            process::drop_permitted().doing("drop capabilities")?;
        }
        Ok(program)
    };
    match given_up() {
        Ok(program) => Err::<(), _>(process::execute_file(program.as_fd(), &argv, &environment))
            .doing("execute")
            .expect_err("execveat returns only on error"),
        Err(fault) => fault,
    }
}

/// Rust ignores SIGPIPE and the supervisor blocks what it reads from a signalfd: neither may be inherited.
///
/// # Errors
/// Those of sigaction(2) and sigprocmask(2).
pub fn default_signals() -> nix::Result<()> {
    process::default_signal(Signal::SIGPIPE)?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}
