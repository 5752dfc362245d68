//! What the operator and gaoler's own files decide, parsed once into types that cannot be wrong, and made
//! into filters. It must never read a file that anybody but root can write, nor a byte of a tenant.

pub mod confine;
pub mod landlock;
pub mod level;
pub mod process;
pub mod seccomp;
pub mod settings;
mod syscalls;
