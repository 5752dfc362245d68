//! What a run needs that takes time to make, made ahead: a uid, its user namespace, a network namespace and
//! a cgroup leaf. Nothing from the pool is ever used twice.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use gaoler_protocol::Limits;

use crate::cgroup::{Cgroups, Leaf};
use crate::fault::{Doing, Fault};
use crate::namespaces;
use crate::template::INSIDE;
use crate::uids::{Slot, Uids};

/// Sets kept ready. Two cover a request that comes while the last one's set is being replaced; a set costs
/// about 0.3 MB of kernel memory, most of it the network namespace.
const READY: usize = 2;

/// Everything fresh for one run.
pub struct Set {
    /// The uid's lease.
    pub slot: Slot,
    /// The uid.
    pub uid: u32,
    /// The user namespace that maps 1000 to it.
    pub user_namespace: OwnedFd,
    /// A network namespace with loopback alone.
    pub network_namespace: OwnedFd,
    /// The cgroup leaf.
    pub leaf: Leaf,
    /// The namespaces' identities, by their names in /proc/PID/ns.
    pub identities: [(&'static str, u64); 2],
}

/// Sets that wait for a run.
#[derive(Default)]
pub struct Pool {
    ready: Vec<Set>,
    /// The last attempt to make one failed: nothing is tried again before somebody needs it.
    failed: bool,
}

/// Where sets come from.
pub struct Source<'a> {
    /// The host's /proc.
    pub proc_fd: BorrowedFd<'a>,
    /// Uids of runs.
    pub uids: &'a mut Uids,
    /// Groups.
    pub cgroups: &'a mut Cgroups,
    /// The limits that a leaf gets ahead of knowing its run.
    pub limits: Limits,
}

impl Pool {
    /// Whether there is room for another set.
    pub fn wants_more(&self) -> bool {
        !self.failed && self.ready.len() < READY
    }

    /// Makes one set more.
    ///
    /// # Errors
    /// As for [`Pool::take`].
    pub fn refill(&mut self, source: Source<'_>) -> Result<(), Fault> {
        let made = make(source);
        self.failed = made.is_err();
        self.ready.push(made?);
        Ok(())
    }

    /// A set under these limits, from the pool or made now.
    ///
    /// # Errors
    /// No uid left, or the kernel's refusal.
    pub fn take(&mut self, source: Source<'_>, limits: Limits) -> Result<Set, Fault> {
        self.failed = false;
        let mut set = match self.ready.pop() {
            Some(set) => set,
            None => make(source)?,
        };
        if set.leaf.limits() != limits {
            set.leaf.bound(limits)?;
        }
        Ok(set)
    }

    /// Empties the pool.
    pub fn drain(&mut self) -> Vec<Set> {
        std::mem::take(&mut self.ready)
    }
}

fn make(source: Source<'_>) -> Result<Set, Fault> {
    let slot = source.uids.take().ok_or_else(|| Fault::new("take a run's uid", "the range is used up"))?;
    let uid = source.uids.uid(&slot);
    let made = namespaces::user(source.proc_fd, INSIDE, uid).and_then(|user_namespace| {
        let network_namespace = namespaces::network(source.proc_fd)?;
        let identities = [
            ("user", namespaces::identity(user_namespace.as_fd()).doing("look at a user namespace")?),
            ("net", namespaces::identity(network_namespace.as_fd()).doing("look at a network namespace")?),
        ];
        let leaf = source.cgroups.leaf(source.limits)?;
        Ok((user_namespace, network_namespace, identities, leaf))
    });
    match made {
        Ok((user_namespace, network_namespace, identities, leaf)) => {
            Ok(Set { slot, uid, user_namespace, network_namespace, leaf, identities })
        }
        Err(fault) => {
            source.uids.release(slot);
            Err(fault)
        }
    }
}
