//! The body of an answer to the cage, from whichever side of egress it comes.
//! It must never end quietly where it is not whole: an error in it breaks the connection.

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};

/// An answer's body. An error in it breaks the connection to the cage.
pub type Answer = UnsyncBoxBody<Bytes, Broken>;

/// The answer ends here, unfinished.
#[derive(Debug)]
pub struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the answer broke off")
    }
}

impl std::error::Error for Broken {}

/// A body that is all there.
pub fn whole(bytes: Bytes) -> Answer {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}
