//! One thin wrapper per system call that nix does not offer safely; the only `unsafe` beside the probe.
//! A wrapper here must never decide anything: it calls, and hands on the errno.

#![allow(unsafe_code)]

pub mod channel;
pub mod memfd;
pub mod probe;
pub mod seccomp;
