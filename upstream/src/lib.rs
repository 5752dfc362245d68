//! The embedded model: a small deterministic stand-in for the Messages API, for demos and tests.
//! It must never pass for the real one: every text that it writes begins with `[embedded] `.
//!
//! The way of a request: [`serve`] reads it, [`conversation`] finds what steers it, [`model`] decides the
//! answer, [`wire`] writes that answer down as a [`script`] of bytes and waits, which `serve` plays.

#![forbid(unsafe_code)]

pub mod serve;

mod conversation;
mod model;
mod script;
mod wire;
