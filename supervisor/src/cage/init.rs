//! pid 1 of a cage: reaps, watches the supervisor's line, and ends the cage with the command or with the
//! supervisor, whichever ends first. It must never do anything else, and its own filter sees to that.

use std::os::fd::{AsFd, AsRawFd};

use gaoler_policy::seccomp::Threads;
use gaoler_sys::clone::{Child, wait};
use gaoler_sys::process;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::word::{Step, Word, say};
use super::{Common, Ends};

/// Watches until the command ends, says how, and ends: the kernel then kills all that is left in the cage.
pub(super) fn watch(common: &Common, command: &Child, ends: Ends) -> ! {
    let Ends { line, gate, stdin, stdout, stderr } = ends;
    // The pipes and the gate are the command's: held here, they would never show their end.
    drop((gate, stdin, stdout, stderr));
    let confined = ended_children().and_then(|children| {
        let mut keep = [line.as_raw_fd(), command.pidfd.as_raw_fd(), children.as_raw_fd()];
        keep.sort_unstable();
        process::close_all_but(&keep)?;
        common.init_filter.install(Threads::One)?;
        Ok(children)
    });
    let children = match confined {
        Ok(children) => children,
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::EINVAL) as u16;
            let _ = say(&line, Word::Failed(Step::Seccomp as u8, errno), &[]);
            process::exit(125);
        }
    };
    loop {
        // Orphans come to pid 1 and count as tasks until they are reaped: a build leaves hundreds a second.
        // The timeout is for those that ended before SIGCHLD was blocked.
        let mut fds = [
            PollFd::new(line.as_fd(), PollFlags::empty()),
            PollFd::new(command.pidfd.as_fd(), PollFlags::POLLIN),
            PollFd::new(children.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::from(1000u16));
        let hung_up = fds[0].revents().is_some_and(|events| !events.is_empty());
        if hung_up {
            process::exit(125);
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
                process::exit(0);
            }
        }
    }
}

/// A descriptor that is readable when a child has ended.
fn ended_children() -> std::io::Result<SignalFd> {
    let mut ended = SigSet::empty();
    ended.add(Signal::SIGCHLD);
    ended.thread_block()?;
    Ok(SignalFd::with_flags(&ended, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}
