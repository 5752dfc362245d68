//! What a run's egress wrote of its destinations, and which limits a run hit: the parts that every report has.
//! It must never wait for a writer, nor believe that what it reads is of any size or form.

use std::os::fd::OwnedFd;

use gaoler_protocol::{Exit, Reason};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde_json::{Map, Value};

/// Bytes of a ledger: what a pipe holds.
const LEDGER_BYTES_MAX: usize = 64 * 1024;
/// Lines of it: egress names 16 models and 256 destinations, and sums up the rest.
const LINES_MAX: usize = 280;

/// What a run's egress wrote.
#[derive(Debug, Default)]
pub struct Ledger {
    /// What each model took, as the upstream said.
    pub models: Vec<Map<String, Value>>,
    /// A line for each destination.
    pub destinations: Vec<Map<String, Value>>,
}

/// The lines of a ledger, read when its run has ended. What is not an object on a line is left out.
pub fn read(ledger: &OwnedFd) -> Ledger {
    let (models, destinations) = lines(ledger).into_iter().partition(|line| line.contains_key("model"));
    Ledger { models, destinations }
}

fn lines(ledger: &OwnedFd) -> Vec<Map<String, Value>> {
    // The writer is gone; a read that would wait all the same is the end.
    if let Ok(flags) = fcntl(ledger, FcntlArg::F_GETFL) {
        let _ = fcntl(ledger, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK));
    }
    let mut bytes = vec![0; LEDGER_BYTES_MAX];
    let mut length = 0;
    while let Ok(more @ 1..) = nix::unistd::read(ledger, &mut bytes[length..]) {
        length += more;
    }
    let lines = bytes[..length].split(|&byte| byte == b'\n');
    lines.take(LINES_MAX).filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// The limits that a run hit, by the words of its report.
pub fn hit(exit: &Exit) -> Vec<&'static str> {
    let ended = |reason| exit.reason == reason;
    let rows = [
        ("memory", ended(Reason::Oom) || exit.oom_kills > 0),
        ("tasks", ended(Reason::Tasks) || exit.tasks_denied > 0),
        ("wall", ended(Reason::Wall)),
        ("output", ended(Reason::Output)),
        ("disk", ended(Reason::Disk)),
        ("idle", ended(Reason::Idle)),
    ];
    rows.into_iter().filter(|(_, hit)| *hit).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_ledger_is_read_to_its_end_and_no_further() {
        let (ledger, mut writer) = std::io::pipe().expect("a pipe");
        writer
            .write_all(b"{\"model\":\"claude-a\"}\n{\"host\":\"a\",\"port\":443}\nno JSON\n[1]\n\n{\"host\":\"b\"}\n{\"cu")
            .expect("written");
        let Ledger { models, destinations: lines } = read(&ledger.into());
        // The writer lives still, and nobody waits for it.
        drop(writer);
        assert_eq!((models.len(), lines.len()), (1, 2), "{lines:?}");
        assert_eq!((&lines[0]["host"], &lines[1]["host"]), (&"a".into(), &"b".into()));

        let (ledger, mut writer) = std::io::pipe().expect("a pipe");
        let writing = std::thread::spawn(move || while writer.write_all(b"{}\n").is_ok() {});
        let ledger = ledger.into();
        let mut most = 0;
        while most < LINES_MAX {
            let lines = read(&ledger).destinations.len();
            assert!(lines <= LINES_MAX);
            most = most.max(lines);
        }
        drop(ledger);
        writing.join().expect("no panic");
    }
}
