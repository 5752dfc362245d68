//! Filters as the build has compiled them from policies/*.toml, and how one is installed.
//! It must never allocate, nor hold a rule of its own: there is no parser and no compiler in a privileged process.

use std::io::Result;

use libc::sock_filter;

/// Which threads get a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling one: a forked child has no other.
    One,
    /// All of the process at once, or none (TSYNC).
    All,
}

/// A filter, ready to install.
#[derive(Clone, Copy)]
pub struct Program(pub &'static [sock_filter]);

/// The filter of pid 1 of a cage, once it has started the CLI: policies/init.toml.
pub const INIT: Program = Program(include!(concat!(env!("OUT_DIR"), "/init.rs")));
/// The filter of the CLI and everything below it: policies/cage.toml.
pub const CAGE: Program = Program(include!(concat!(env!("OUT_DIR"), "/cage.rs")));
/// The same where there is no pid namespace: policies/reaper.toml.
pub const REAPER: Program = Program(include!(concat!(env!("OUT_DIR"), "/reaper.rs")));
/// Beside [`CAGE`], everywhere: policies/buffers.toml.
pub const BUFFERS: Program = Program(include!(concat!(env!("OUT_DIR"), "/buffers.rs")));
/// Beside [`CAGE`], where no control group counts memory: policies/uncounted.toml.
pub const UNCOUNTED: Program = Program(include!(concat!(env!("OUT_DIR"), "/uncounted.rs")));
/// Beside [`CAGE`], where the network is the host's and Landlock names TCP ports: policies/shared.toml.
pub const SHARED: Program = Program(include!(concat!(env!("OUT_DIR"), "/shared.rs")));
/// Beside [`CAGE`], where the network is the host's and nothing names ports: policies/alone.toml.
pub const ALONE: Program = Program(include!(concat!(env!("OUT_DIR"), "/alone.rs")));

// The build knew the target's call numbers from a table: a wrong one ends the build here.
#[allow(clippy::unnecessary_cast)]
const _: () = include!(concat!(env!("OUT_DIR"), "/numbers.rs"));

impl Program {
    /// Installs the filter. Cannot be undone; needs no_new_privs. Does not allocate.
    ///
    /// # Errors
    /// Those of seccomp(2).
    pub fn install(&self, threads: Threads) -> Result<()> {
        let flags = match threads {
            Threads::One => 0,
            Threads::All => gaoler_sys::seccomp::TSYNC,
        };
        gaoler_sys::seccomp::set_filter(self.0, flags)
    }
}

#[cfg(not(target_endian = "little"))]
compile_error!("the filters read the low half of an argument as a little-endian machine has it");
