//! Names for requests, messages and runs: random, so that none can be guessed from another.
//! It must never name anything by a tenant's data.

use std::sync::Arc;

use gaoler_protocol::RunId;

const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A run's id.
pub fn run() -> RunId {
    RunId(rand::random())
}

/// A request's id, in the API's own form.
pub fn request() -> Arc<str> {
    let mut text = *b"req_01                      ";
    text["req_01".len()..].copy_from_slice(&drawn());
    // Each of the bytes is ASCII.
    std::str::from_utf8(&text).unwrap_or_default().into()
}

/// A message's id, in the API's own form.
pub fn message() -> String {
    format!("msg_01{}", letters())
}

/// A chat completion's id, in that dialect's form.
pub fn completion() -> String {
    format!("chatcmpl-{}", letters())
}

fn letters() -> String {
    drawn().iter().copied().map(char::from).collect()
}

/// 22 letters: 131 bits, less a bias that no one can use.
fn drawn() -> [u8; 22] {
    let mut drawn = [0u8; 22];
    rand::fill(&mut drawn);
    drawn.map(|b| LETTERS[usize::from(b) % LETTERS.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_its_form_and_comes_once() {
        let ids: std::collections::HashSet<Arc<str>> = (0..1000).map(|_| request()).collect();
        assert_eq!(ids.len(), 1000);
        for id in ids {
            assert!(id.len() == 28 && id.starts_with("req_01"), "{id}");
            assert!(id[6..].bytes().all(|b| b.is_ascii_alphanumeric()), "{id}");
        }
    }
}
