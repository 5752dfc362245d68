//! How the unprivileged processes confine themselves, in two steps around the start of their threads.
//! It must never report success for a step that it has not read back.
//!
//! Landlock and capabilities belong to a thread, so they come before the first one is started and are
//! inherited; the filter comes after, on all threads at once, because starting a runtime needs calls that
//! serving does not.

#![forbid(unsafe_code)]

use std::io::{Error, Result};
use std::path::Path;

use caps::{CapSet, Capability};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

use gaoler_policy::landlock;
use gaoler_policy::seccomp::{Program, Threads};

/// A process that confines itself with a filter of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// The HTTP side.
    Frontend,
    /// The credential broker of one run.
    Egress,
    /// The embedded model.
    Upstream,
    /// What is remembered.
    Ledger,
    /// Traces, on their way to the operator's collector.
    Exporter,
}

impl Process {
    /// Its filter, as the build has compiled it from its file under policies/.
    #[must_use]
    pub const fn filter(self) -> Program {
        match self {
            Process::Frontend => Program(include!(concat!(env!("OUT_DIR"), "/frontend.rs"))),
            Process::Egress => Program(include!(concat!(env!("OUT_DIR"), "/egress.rs"))),
            Process::Upstream => Program(include!(concat!(env!("OUT_DIR"), "/upstream.rs"))),
            Process::Ledger => Program(include!(concat!(env!("OUT_DIR"), "/ledger.rs"))),
            Process::Exporter => Program(include!(concat!(env!("OUT_DIR"), "/exporter.rs"))),
        }
    }
}

// The build knew the target's call numbers from a table: a wrong one ends the build here.
#[allow(clippy::unnecessary_cast)]
const _: () = include!(concat!(env!("OUT_DIR"), "/numbers.rs"));

/// What a process may still reach by name, once confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files<'a> {
    /// No file, no TCP port.
    None,
    /// No file; TCP connections to these ports only (on kernels whose Landlock knows TCP).
    ButConnect(&'a [u16]),
    /// One folder and what is in it; no TCP port.
    ButBelow(&'a Path),
}

/// A step of the confinement that failed.
#[derive(Debug)]
pub struct ConfineError {
    /// Which.
    pub step: &'static str,
    /// What the kernel said.
    pub error: Error,
}

impl std::fmt::Display for ConfineError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "confining this process failed at {}: {}", self.step, self.error)
    }
}

impl std::error::Error for ConfineError {}

/// The first step, while there is one thread: not dumpable, no core, no new privileges, no capability, no
/// file. Returns the Landlock ABI that is in force, 0 where the kernel has none: the supervisor, which has tried it
/// on this host, judges whether that will do, and each filter has no call that opens a file.
///
/// # Errors
/// The step that did not hold. The process must end then.
pub fn before_threads(files: Files<'_>) -> std::result::Result<u8, ConfineError> {
    // Not dumpable: no other process of this uid can trace it or read its memory, and no core has it.
    step("dumpable", not_dumpable())?;
    step("core limit", setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(Error::from))?;
    step("no_new_privs", prctl::set_no_new_privs().map_err(Error::from))?;
    // Capabilities go before Landlock is judged: a process with all of them can look past its scopes.
    step("capabilities", no_capabilities())?;
    let restricted = match files {
        Files::None => landlock::no_files(),
        Files::ButConnect(ports) => landlock::no_files_but_connect(ports),
        Files::ButBelow(folder) => landlock::no_files_but_below(folder),
    };
    match restricted {
        // Not built, or switched off at boot: said so, never passed over.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(0),
        restricted => step("landlock", restricted),
    }
}

/// The second step, when all threads are there: the filter of this process, on all of them.
///
/// # Errors
/// The step that did not hold. The process must end then.
pub fn after_threads(process: Process) -> std::result::Result<(), ConfineError> {
    step("seccomp", process.filter().install(Threads::All))
}

/// Proof of the confinement from inside: whether the root folder and this process's own status both fail
/// to open.
#[must_use]
pub fn failed_open() -> bool {
    let fails = |path: &str| std::fs::File::open(Path::new(path)).is_err();
    fails("/") && fails("/proc/self/status")
}

/// Empties the capabilities of the calling thread and reads them back.
///
/// The bounding set can only be emptied by who holds CAP_SETPCAP; for others no_new_privs already makes it
/// moot. Where it could be emptied, it must be.
///
/// # Errors
/// Those of prctl(2) and capset(2), or what is left.
pub fn no_capabilities() -> Result<()> {
    let may_bound = has(CapSet::Effective, Capability::CAP_SETPCAP)?;
    if may_bound {
        caps::clear(None, CapSet::Bounding).map_err(Error::other)?;
    }
    caps::securebits::set_keepcaps(false).map_err(Error::other)?;
    // A kernel without an ambient set (gVisor's) cannot be asked for it, and so has nothing in it.
    let ambient = caps::read(None, CapSet::Ambient).is_ok().then_some(CapSet::Ambient);
    let sets = [CapSet::Effective, CapSet::Inheritable, CapSet::Permitted];
    for set in ambient.into_iter().chain(sets) {
        caps::clear(None, set).map_err(Error::other)?;
    }
    let bounding = may_bound.then_some(CapSet::Bounding);
    for set in ambient.into_iter().chain(sets).chain(bounding) {
        let left = caps::read(None, set).map_err(Error::other)?;
        if !left.is_empty() {
            return Err(Error::other(format!("{} capabilities are left in the {set:?} set", left.len())));
        }
    }
    Ok(())
}

fn has(set: CapSet, capability: Capability) -> Result<bool> {
    caps::has_cap(None, set, capability).map_err(Error::other)
}

fn not_dumpable() -> Result<()> {
    prctl::set_dumpable(false)?;
    match prctl::get_dumpable()? {
        false => Ok(()),
        true => Err(Error::other("still dumpable")),
    }
}

fn step<T>(step: &'static str, result: Result<T>) -> std::result::Result<T, ConfineError> {
    result.map_err(|error| ConfineError { step, error })
}
