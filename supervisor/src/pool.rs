//! What a run needs that takes time to make, made ahead: a uid, its user namespace, a network namespace and
//! a cgroup leaf, as far as this host has them. Nothing from the pool is ever used twice.

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
    /// The user namespace that maps 1000 to it, and a network namespace with loopback alone.
    pub ahead: Option<[OwnedFd; 2]>,
    /// The cgroup leaf.
    pub leaf: Option<Leaf>,
    /// The namespaces' identities, by their names in /proc/PID/ns.
    pub identities: Vec<(&'static str, u64)>,
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
    /// The folder of the kernel's settings, where namespaces are made ahead.
    pub network: Option<BorrowedFd<'a>>,
    /// Uids of runs.
    pub uids: &'a mut Uids,
    /// Groups, where a leaf is wanted.
    pub cgroups: Option<&'a mut Cgroups>,
    /// All runs have the uid of this process.
    pub same: bool,
    /// Root is an ordinary user's, in a user namespace.
    pub inside: bool,
    /// The limits that a leaf gets ahead of knowing its run.
    pub limits: Limits,
}

impl Set {
    /// Puts it under these limits.
    ///
    /// # Errors
    /// A limit that does not hold.
    pub fn bound(&mut self, limits: Limits) -> Result<(), Fault> {
        match &mut self.leaf {
            Some(leaf) if leaf.limits() != limits => leaf.bound(limits),
            _ => Ok(()),
        }
    }

    /// Gives it to another uid than that of its slot, before it is used.
    ///
    /// # Errors
    /// As for [`namespaces::user`].
    pub fn belongs_to(&mut self, proc_fd: BorrowedFd<'_>, uid: u32) -> Result<(), Fault> {
        self.uid = uid;
        if let Some([user, _]) = &mut self.ahead {
            *user = namespaces::user(proc_fd, INSIDE, uid)?;
            let identity = namespaces::identity(user.as_fd()).doing("look at a namespace")?;
            self.identities.iter_mut().filter(|(name, _)| *name == "user").for_each(|it| it.1 = identity);
        }
        Ok(())
    }
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

    /// A set, from the pool or made now.
    ///
    /// # Errors
    /// No uid left, or the kernel's refusal.
    pub fn take(&mut self, source: Source<'_>) -> Result<Set, Fault> {
        self.failed = false;
        match self.ready.pop() {
            Some(set) => Ok(set),
            None => make(source),
        }
    }

    /// Empties the pool.
    pub fn drain(&mut self) -> Vec<Set> {
        std::mem::take(&mut self.ready)
    }
}

fn make(source: Source<'_>) -> Result<Set, Fault> {
    let slot = source.uids.take().ok_or_else(|| Fault::new("take a run's uid", "the range is used up"))?;
    let uid = if source.same { nix::unistd::geteuid().as_raw() } else { source.uids.uid(&slot) };
    let parts = || -> Result<_, Fault> {
        let mut identities = Vec::new();
        let mut ahead = None;
        if let Some(settings) = source.network {
            let user = namespaces::user(source.proc_fd, INSIDE, uid)?;
            let network = namespaces::network(source.proc_fd, settings, source.inside)?;
            for (name, namespace) in [("user", &user), ("net", &network)] {
                identities
                    .push((name, namespaces::identity(namespace.as_fd()).doing("look at a namespace")?));
            }
            ahead = Some([user, network]);
        }
        let leaf = source.cgroups.map(|cgroups| cgroups.leaf(source.limits)).transpose()?;
        Ok((ahead, leaf, identities))
    };
    match parts() {
        Ok((ahead, leaf, identities)) => Ok(Set { slot, uid, ahead, leaf, identities }),
        Err(fault) => {
            source.uids.release(slot);
            Err(fault)
        }
    }
}
