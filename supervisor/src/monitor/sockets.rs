//! The sockets of a run that has a network of its own, counted where no group counts what they hold.
//! It must never look into a queue: how much one may hold is bounded by the network's settings and by the filter.

use std::io::ErrorKind;
use std::os::fd::AsFd;

use gaoler_protocol::Reason;

use super::Monitor;
use super::end::end;
use crate::cgroup::read_at;
use crate::log::event;
use crate::run::Run;

/// A run may have one for each so many MiB of its memory, and in any case so many. What no group counts of one (a
/// connection that nobody has accepted, a queue of errors, of netlink's answers) is at most 256 KiB, so that all of them
/// are a quarter of the memory. The CLI has some 20, and a server under load one for each of its connections.
const MIB_PER_SOCKET: u32 = 1;
const SOCKETS_LEAST: u32 = 128;

impl Monitor {
    /// Ends a run that has more sockets than it may.
    pub(super) fn count_sockets(&self, run: &mut Run) {
        let (Some(init), true) = (&run.init, self.plan.network) else { return };
        let path = format!("{}/net/sockstat", init.pid);
        let sockets = match read_at(self.host.proc_fd.as_fd(), &path) {
            // It has ended; or this host's networks have no such file.
            Err(error) if [Some(libc::ENOENT), Some(libc::ESRCH)].contains(&error.raw_os_error()) => Ok(0),
            sockstat => sockstat.and_then(|text| used(&text).ok_or(ErrorKind::InvalidData.into())),
        };
        let sockets = sockets.unwrap_or_else(|error| {
            event("sockets_unseen", &[("run", &run.id()), ("error", &error)]);
            u32::MAX
        });
        let most = (run.limits.memory_mib / MIB_PER_SOCKET).max(SOCKETS_LEAST);
        if sockets > most {
            event("socket_limit", &[("run", &run.id()), ("sockets", &sockets), ("most", &most)]);
            run.ends(Reason::Oom, 0, libc::SIGKILL as u8);
            end(run);
        }
    }
}

/// All sockets of the network, closed ones that still send or wait included: the first line of its sockstat.
fn used(sockstat: &str) -> Option<u32> {
    sockstat.lines().find_map(|line| line.strip_prefix("sockets: used ")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sockets_of_a_network_are_the_first_line_of_its_sockstat() {
        assert_eq!(used("sockets: used 1203\nTCP: inuse 2 orphan 0 tw 0 alloc 2 mem 1\n"), Some(1203));
        assert_eq!(used("TCP: inuse 2\n"), None);
        assert_eq!(used(""), None);
    }
}
