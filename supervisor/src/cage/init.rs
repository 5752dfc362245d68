//! pid 1 of a cage, or where there is no pid namespace its stand-in: reaps, watches the supervisor's line, and ends
//! the cage with the command or with the supervisor, whichever ends first. It must never do anything else, and its
//! own filter sees to that.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use gaoler_policy::seccomp::{INIT, REAPER, Threads};
use gaoler_sys::clone::{Child, wait};
use gaoler_sys::process;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::word::{Step, Word, say};
use super::{Common, Ends};
use crate::family;

/// Watches until the command ends, says how, and ends. Where it is pid 1 the kernel then kills all that is left in
/// the cage; else it does so itself.
pub(super) fn watch(common: &Common, command: &Child, ends: Ends) -> ! {
    let Ends { line, gate, stdin, stdout, stderr } = ends;
    // The pipes and the gate are the command's: held here, they would never show their end.
    drop((gate, stdin, stdout, stderr));
    let confined = ended_children().and_then(|children| {
        let proc: Option<OwnedFd> = match common.plan.has_pids() {
            true => None,
            false => Some(std::fs::File::open("/proc")?.into()),
        };
        let mut keep = vec![line.as_raw_fd(), children.as_raw_fd()];
        keep.extend(proc.as_ref().map(AsRawFd::as_raw_fd));
        keep.sort_unstable();
        process::close_all_but(&keep)?;
        if proc.is_some() { REAPER } else { INIT }.install(Threads::One)?;
        Ok((children, proc))
    });
    let (children, proc) = match confined {
        Ok(confined) => confined,
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::EINVAL) as u16;
            let _ = say(&line, Word::Failed(Step::Seccomp as u8, errno), &[]);
            process::exit(125);
        }
    };
    loop {
        // Orphans come to pid 1 and count as tasks until they are reaped: a build leaves hundreds a second.
        let mut fds =
            [PollFd::new(line.as_fd(), PollFlags::empty()), PollFd::new(children.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::from(1000u16));
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
        let hung_up = fds[0].revents().is_some_and(|events| events.intersects(gone));
        if hung_up {
            depart(proc.as_ref());
        }
        // Read before reaping: who ends in between is told again.
        let _ = children.read_signal();
        while let Ok(Some((pid, ended))) = wait(-1, libc::WNOHANG) {
            if pid == command.pid {
                let word = match (ended.code, ended.signal) {
                    (Some(code), _) => Word::Exited(code),
                    (None, signal) => Word::Signaled(signal.unwrap_or_default()),
                };
                let _ = say(&line, word, &[]);
                depart(proc.as_ref());
            }
        }
    }
}

/// Ends, after everybody below where nobody else sees to that.
fn depart(proc: Option<&OwnedFd>) -> ! {
    if let Some(proc) = proc {
        let own = std::process::id().cast_signed();
        while !family::end(proc, own) {
            while let Ok(Some(_)) = wait(-1, libc::WNOHANG) {}
        }
    }
    process::exit(0)
}

/// A descriptor that is readable when a child has ended.
fn ended_children() -> std::io::Result<SignalFd> {
    let mut ended = SigSet::empty();
    ended.add(Signal::SIGCHLD);
    ended.thread_block()?;
    Ok(SignalFd::with_flags(&ended, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}
