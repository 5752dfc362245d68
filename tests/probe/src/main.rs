//! The inside half of the escape suite: each word of argv is one attempt, tried in a process of its own, and
//! one line says how it went: `ok`, the name of an errno, or `killed` and the signal.
//! It must never judge: what should have happened is known outside.

mod attempts;
mod bombs;
mod calls;
mod objects;

use std::io::{Read, Write};

use nix::errno::Errno;

/// How an attempt went, as its process says it: a few words, or the kernel's refusal.
pub type Outcome = Result<String, Errno>;

/// Bytes that an attempt may say.
const SAID_MAX: usize = 4096;

fn main() {
    // Before anything else is opened: what was there at the first instruction.
    let wanted = std::env::args().any(|word| word == "first-descriptors");
    let inherited = if wanted { attempts::descriptors(65_535) } else { String::new() };
    for word in std::env::args().skip(1) {
        let outcome = match word.as_str() {
            "first-descriptors" => inherited.clone(),
            word => apart(word),
        };
        // One write a line, so that lines of a bomb's children cannot cut it.
        let line = format!("{word}\t{outcome}\n");
        let _ = std::io::stdout().write_all(line.as_bytes());
    }
}

/// Tries one attempt in a process of its own, which may die of it.
fn apart(word: &str) -> String {
    let (mut said, mut says) = std::io::pipe().expect("a pipe");
    // SAFETY: this program has one thread, so the child may do whatever the parent may.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        drop(said);
        let line = match attempts::attempt(word) {
            Ok(detail) if detail.is_empty() => "ok".to_owned(),
            Ok(detail) => format!("ok {detail}"),
            Err(errno) => format!("{errno:?}"),
        };
        let line: String = line.chars().take(SAID_MAX).collect();
        let _ = says.write_all(line.escape_debug().to_string().as_bytes());
        // SAFETY: ends the process at once; no destructor is wanted.
        unsafe { libc::_exit(0) }
    }
    drop(says);
    if pid < 0 {
        return format!("fork {:?}", Errno::last());
    }
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        let core = if libc::WCOREDUMP(status) { " core" } else { "" };
        return match signal {
            libc::SIGSYS => format!("killed SIGSYS{core}"),
            libc::SIGSEGV => format!("killed SIGSEGV{core}"),
            libc::SIGKILL => format!("killed SIGKILL{core}"),
            other => format!("killed {other}{core}"),
        };
    }
    let mut text = String::new();
    let _ = said.by_ref().take(SAID_MAX as u64).read_to_string(&mut text);
    text
}
