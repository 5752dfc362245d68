//! One thin wrapper per system call that nix does not offer safely; the only `unsafe` beside the probe.
//! A wrapper here must never decide anything: it calls, and hands on the errno.

#![allow(unsafe_code)]

pub mod channel;
pub mod clone;
pub mod memfd;
pub mod mount;
pub mod probe;
pub mod process;
pub mod seccomp;

use std::io::{Error, Result};

/// The result of a raw system call.
pub(crate) fn check(result: libc::c_long) -> Result<libc::c_long> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}
