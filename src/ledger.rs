//! What a run's egress wrote of its destinations, and which limits a run hit: the parts that every report has.
//! It must never wait for a writer, nor believe that what it reads is of any size or form.

use std::os::fd::OwnedFd;

use gaoler_protocol::{Exit, Reason};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde_json::{Map, Value};

/// Bytes of one read: a whole pipe takes sixteen of them.
const READ_BYTES: usize = 4096;
/// Reads of a ledger whose run has ended: what a pipe holds.
const READS_MAX: usize = 16;
/// Bytes of a line; egress' own are shorter. A longer one is left out.
const LINE_BYTES_MAX: usize = 4096;
/// Models and destinations: egress names 16 and 256, and sums up the rest.
const MODELS_MAX: usize = 17;
const DESTINATIONS_MAX: usize = 280;

/// What a run's egress wrote.
#[derive(Debug, Default)]
pub struct Ledger {
    /// What each model took, as the upstream said.
    pub models: Vec<Map<String, Value>>,
    /// A line for each destination.
    pub destinations: Vec<Map<String, Value>>,
    /// The beginning of a line whose end has not come.
    rest: Vec<u8>,
}

impl Ledger {
    /// Takes the next bytes in; how many lines about models they end. A model's line says all that it took, so a later one
    /// takes the place of an earlier one. What is not an object on a line is left out.
    pub fn take(&mut self, bytes: &[u8]) -> usize {
        let mut models = 0;
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            // One byte more than fits tells a line that is too long from one that is not.
            let room = (LINE_BYTES_MAX + 1).saturating_sub(self.rest.len());
            self.rest.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.rest);
                models += usize::from(line.len() <= LINE_BYTES_MAX && self.line(&line));
            }
        }
        models
    }

    /// Whether it was about a model.
    fn line(&mut self, line: &[u8]) -> bool {
        let Ok(line) = serde_json::from_slice::<Map<String, Value>>(line) else { return false };
        let Some(model) = line.get("model") else {
            if self.destinations.len() < DESTINATIONS_MAX {
                self.destinations.push(line);
            }
            return false;
        };
        match self.models.iter().position(|known| known.get("model") == Some(model)) {
            Some(at) => self.models[at] = line,
            None if self.models.len() < MODELS_MAX => self.models.push(line),
            None => return false,
        }
        true
    }
}

/// The lines of a ledger, read when its run has ended.
pub fn read(ledger: &OwnedFd) -> Ledger {
    // The writer is gone; a read that would wait all the same is the end.
    if let Ok(flags) = fcntl(ledger, FcntlArg::F_GETFL) {
        let _ = fcntl(ledger, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK));
    }
    let mut found = Ledger::default();
    rest(&mut found, |bytes| nix::unistd::read(ledger, bytes).ok());
    found
}

/// Reads on to the end, or as far as a pipe can reach.
pub fn rest(ledger: &mut Ledger, mut read: impl FnMut(&mut [u8]) -> Option<usize>) {
    let mut bytes = [0; READ_BYTES];
    for _ in 0..READS_MAX {
        let Some(length @ 1..) = read(&mut bytes) else { return };
        ledger.take(&bytes[..length]);
    }
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
        ("locks", ended(Reason::Locks)),
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
        let Ledger { models, destinations: lines, .. } = read(&ledger.into());
        // The writer lives still, and nobody waits for it.
        drop(writer);
        assert_eq!((models.len(), lines.len()), (1, 2), "{lines:?}");
        assert_eq!((&lines[0]["host"], &lines[1]["host"]), (&"a".into(), &"b".into()));

        let (ledger, mut writer) = std::io::pipe().expect("a pipe");
        let writing = std::thread::spawn(move || while writer.write_all(b"{}\n").is_ok() {});
        let ledger = ledger.into();
        let mut most = 0;
        while most < DESTINATIONS_MAX {
            let lines = read(&ledger).destinations.len();
            assert!(lines <= DESTINATIONS_MAX);
            most = most.max(lines);
        }
        drop(ledger);
        writing.join().expect("no panic");
    }

    #[test]
    fn a_models_last_line_holds_and_lines_come_in_any_pieces() {
        let text = "{\"model\":\"a\",\"input_tokens\":1}\n{\"model\":\"b\"}\n{\"model\":\"a\",\"input_tokens\":7}\n{\"host\":\"h\"}\n";
        for size in [1, 3, 40, 4096] {
            let mut ledger = Ledger::default();
            let models: usize = text.as_bytes().chunks(size).map(|piece| ledger.take(piece)).sum();
            assert_eq!((models, ledger.models.len(), ledger.destinations.len()), (3, 2, 1), "{size}");
            assert_eq!(ledger.models[0]["input_tokens"], 7);
        }
        // Neither a line without end nor names without end take more than their bound.
        let mut ledger = Ledger::default();
        (0..100).for_each(|_| assert_eq!(ledger.take(&[b'x'; 1000]), 0));
        assert!(ledger.rest.len() <= LINE_BYTES_MAX + 1);
        assert_eq!(ledger.take(b"\n{\"model\":\"a\"}\n"), 1);
        let names = (0..100).map(|n| format!("{{\"model\":\"{n}\"}}\n"));
        let taken: usize = names.map(|line| ledger.take(line.as_bytes())).sum();
        assert_eq!((taken, ledger.models.len()), (MODELS_MAX - 1, MODELS_MAX));
    }
}
