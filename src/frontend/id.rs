//! Names for requests, messages and runs: random, so that none can be guessed from another.
//! It must never name anything by a tenant's data.

use gaoler_protocol::RunId;

const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A run's id.
pub fn run() -> RunId {
    RunId(rand::random())
}

/// A request's id, in the API's own form.
pub fn request() -> String {
    format!("req_01{}", letters())
}

/// A message's id, in the API's own form.
pub fn message() -> String {
    format!("msg_01{}", letters())
}

/// A chat completion's id, in that dialect's form.
pub fn completion() -> String {
    format!("chatcmpl-{}", letters())
}

/// 22 letters: 131 bits, less a bias that no one can use.
fn letters() -> String {
    rand::random::<[u8; 22]>().iter().map(|&b| char::from(LETTERS[usize::from(b) % LETTERS.len()])).collect()
}
