//! gaoler's library: what the binary runs and what tests reach.
//! It must never hold privileged code: that lives under supervisor/.

#![forbid(unsafe_code)]

pub mod frontend;
