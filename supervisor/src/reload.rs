//! A reload: the command line resolves the settings once more, in the host's root, and tells the frontend.
//! It must never read what is told, nor take a setting for this process: it was looked at with those that it has.

use std::os::fd::{AsFd, OwnedFd};

use gaoler_sys::clone::Child;

use crate::fault::Fault;
use crate::plan::Plan;
use crate::spawn::{self, Attended, Network};

/// What starts a reload, and the one that is under way.
#[derive(Debug)]
pub struct Reload {
    /// The command line.
    pub gaoler: OwnedFd,
    /// How it was called when it started this server, in its own words.
    pub origin: OwnedFd,
    /// The host's root, where this process has left it.
    pub root: Option<OwnedFd>,
    /// The one under way.
    pub child: Option<Child>,
    /// Somebody has asked since it began, or before there could be one.
    pub again: bool,
    /// How often the frontend has asked.
    pub asks: u64,
}

impl Reload {
    /// Starts one; the socket on which it will tell what it found.
    ///
    /// # Errors
    /// Those of socketpair(2) and clone(2).
    pub fn start(&mut self, plan: &Plan, wipe: impl FnOnce()) -> Result<OwnedFd, Fault> {
        self.again = false;
        let network = Network::Command(self.root.as_ref().map(AsFd::as_fd));
        let argv = ["gaoler", "resolve"];
        let Attended { child, control } =
            spawn::start(plan, self.gaoler.as_fd(), &argv, 0, network, &[self.origin.as_fd()], wipe)?;
        self.child = Some(child);
        Ok(control)
    }
}
