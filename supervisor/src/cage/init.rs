//! pid 1 of a cage: reaps, watches the supervisor's line, and ends the cage with the command or with the
//! supervisor, whichever ends first. It must never do anything else, and its own filter sees to that.

use std::os::fd::AsFd;

use gaoler_policy::seccomp::Threads;
use gaoler_sys::clone::{Child, wait};
use gaoler_sys::process;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::word::{Step, Word, say};
use super::{Common, Ends};

/// Watches until the command ends, says how, and ends: the kernel then kills all that is left in the cage.
pub(super) fn watch(common: &Common, command: &Child, ends: Ends) -> ! {
    let Ends { line, gate, stdin, stdout, stderr } = ends;
    // The pipes and the gate are the command's: held here, they would never show their end.
    drop((gate, stdin, stdout, stderr));
    let keep = {
        use std::os::fd::AsRawFd;
        let mut keep = [line.as_raw_fd(), command.pidfd.as_raw_fd()];
        keep.sort_unstable();
        keep
    };
    let confined = process::close_all_but(&keep).and_then(|()| common.init_filter.install(Threads::One));
    if let Err(error) = confined {
        let errno = error.raw_os_error().unwrap_or(libc::EINVAL) as u16;
        let _ = say(&line, Word::Failed(Step::Seccomp as u8, errno), &[]);
        process::exit(125);
    }
    loop {
        // Orphans come to pid 1 without a descriptor to poll: they are reaped at least once a second.
        let mut fds = [
            PollFd::new(line.as_fd(), PollFlags::empty()),
            PollFd::new(command.pidfd.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::from(1000u16));
        let hung_up = fds[0].revents().is_some_and(|events| !events.is_empty());
        if hung_up {
            process::exit(125);
        }
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
