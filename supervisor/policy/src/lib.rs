//! What the operator and gaoler's own policies decide, as types that cannot be wrong.
//! It must never read a file that anybody but root can write, nor a byte of a tenant.

pub mod landlock;
pub mod level;
pub mod seccomp;
pub mod settings;
