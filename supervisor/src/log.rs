//! Decisions, one JSON line each on stderr: names, ids and numbers.
//! It must never be given a tenant's byte, a path of a tenant, or a secret.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

static DECISIONS: AtomicBool = AtomicBool::new(false);

/// Whether decisions are written. The command line's own supervisor shares its stderr with a command, and
/// tells what it decided by messages instead.
pub fn decisions(on: bool) {
    DECISIONS.store(on, Ordering::Relaxed);
}

/// Writes one line. A stderr that nobody reads loses the line, never the supervisor.
pub fn event(name: &str, fields: &[(&str, &dyn std::fmt::Display)]) {
    if !DECISIONS.load(Ordering::Relaxed) {
        return;
    }
    let mut line = format!("{{\"event\":\"{name}\"");
    for (key, value) in fields {
        let _ = write!(line, ",\"{key}\":\"{}\"", Plain(&value.to_string()));
    }
    line.push_str("}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Text inside JSON quotes: everything but plain ASCII is replaced.
struct Plain<'a>(&'a str);

impl std::fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '"' | '\\' => f.write_char('\''),
            ' '..='~' => f.write_char(c),
            _ => f.write_char('?'),
        })
    }
}
