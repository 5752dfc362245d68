//! Where a run went, one row a destination, and the lines that the supervisor gets of it at the end.
//! It must never wait for its reader, grow with what a cage does, or hold a text that is not a host's one spelling.

use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Serialize;
use tokio::net::unix::pipe::Sender;

use super::host::Destination;

/// Destinations with a row of their own; all others share the last one.
const ROWS_MAX: usize = 256;
/// The hosts of that last row, and of requests whose host nobody could read.
const OTHERS: &str = "(others)";
const UNREADABLE: &str = "(unreadable)";
/// A write of at most this many bytes goes into a pipe whole or not at all (pipe(7)).
const PIPE_BYTES: usize = 4096;
/// Room that every block leaves in its page for the last line, whose numbers have at most 20 digits.
const LAST_LINE_BYTES: usize = 384;

/// What went to one destination. Times are milliseconds since serving began.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    host: String,
    port: u16,
    /// The address of the newest connection.
    address: Option<IpAddr>,
    connections: u64,
    refused: u64,
    bytes_up: u64,
    bytes_down: u64,
    first_ms: u64,
    last_ms: u64,
    /// Not all destinations are in lines of their own for want of room in the pipe.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    truncated: bool,
}

impl Row {
    fn new(host: String, port: u16, now: u64) -> Row {
        let (first_ms, last_ms) = (now, now);
        let (connections, refused, bytes_up, bytes_down) = (0, 0, 0, 0);
        let (address, truncated) = (None, false);
        Row { host, port, address, connections, refused, bytes_up, bytes_down, first_ms, last_ms, truncated }
    }

    fn add(&mut self, other: &Row) {
        self.connections += other.connections;
        self.refused += other.refused;
        self.bytes_up += other.bytes_up;
        self.bytes_down += other.bytes_down;
        self.first_ms = self.first_ms.min(other.first_ms);
        self.last_ms = self.last_ms.max(other.last_ms);
    }

    fn line(&self) -> Vec<u8> {
        // Of strings and numbers alone: this cannot fail.
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

/// A row of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowId(usize);

/// The ledger of one run.
pub struct Ledger {
    rows: Mutex<Vec<Row>>,
    start: Instant,
}

impl Ledger {
    /// One that begins now.
    pub fn new() -> Ledger {
        Ledger { rows: Mutex::default(), start: Instant::now() }
    }

    fn rows(&self) -> MutexGuard<'_, Vec<Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The row of a destination; `None` for one that could not be read.
    pub fn row(&self, destination: Option<&Destination>) -> RowId {
        let (host, port) = destination.map_or((UNREADABLE.into(), 0), |to| (to.host.to_string(), to.port));
        let now = self.now();
        let mut rows = self.rows();
        let found = rows.iter().position(|row| row.port == port && row.host == host);
        let id = found.unwrap_or_else(|| {
            match rows.len() {
                ..ROWS_MAX => rows.push(Row::new(host, port, now)),
                ROWS_MAX => rows.push(Row::new(OTHERS.into(), 0, now)),
                _ => {}
            }
            rows.len() - 1
        });
        rows[id].last_ms = now;
        RowId(id)
    }

    /// A connection was made there.
    pub fn connected(&self, id: RowId, address: IpAddr) {
        let row = &mut self.rows()[id.0];
        row.connections += 1;
        row.address = (row.host != OTHERS).then_some(address);
    }

    /// Something was refused there.
    pub fn refused(&self, id: RowId) {
        self.rows()[id.0].refused += 1;
    }

    /// So many bytes went there, and came from there.
    pub fn moved(&self, id: RowId, up: usize, down: usize) {
        let now = self.now();
        let row = &mut self.rows()[id.0];
        row.bytes_up += up as u64;
        row.bytes_down += down as u64;
        row.last_ms = now;
    }

    /// Writes a line for each row, as far as the pipe has room; what has none is summed up in the last line.
    pub fn write(&self, mut pipe: File) {
        let rows = self.rows().clone();
        let mut left = rows.as_slice();
        while !left.is_empty() {
            let block = block(left);
            let bytes: Vec<u8> = left[..block].iter().flat_map(Row::line).collect();
            if pipe.write_all(&bytes).is_err() {
                // Full, or its reader is gone: an error either way.
                break;
            }
            left = &left[block..];
        }
        if let [first, rest @ ..] = left {
            let mut last =
                Row { host: OTHERS.into(), port: 0, address: None, truncated: true, ..first.clone() };
            rest.iter().for_each(|row| last.add(row));
            // The room for it was left over in the page of the block before.
            let _ = pipe.write_all(&last.line());
        }
    }
}

/// How many of these rows go into one write: at least one, whose line is shorter than a page.
fn block(rows: &[Row]) -> usize {
    let mut bytes = 0;
    let fits = rows.iter().take_while(|row| {
        bytes += row.line().len();
        bytes <= PIPE_BYTES - LAST_LINE_BYTES
    });
    fits.count().max(1)
}

/// The write end of the supervisor's pipe.
///
/// # Errors
/// Where it is something else.
pub fn pipe(fd: OwnedFd) -> std::io::Result<File> {
    // This looks at what it is, and makes it non-blocking.
    Ok(File::from(Sender::from_owned_fd(fd)?.into_nonblocking_fd()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn destination(number: usize) -> Destination {
        Destination::parse(&format!("{}{number}.example:443", "host".repeat(12)), None)
            .expect("a destination")
    }

    /// What a reader gets of a ledger that was written before it read.
    async fn written(ledger: &Ledger, taken: usize) -> Vec<serde_json::Value> {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let mut pipe = pipe(writer.into()).expect("the end of a pipe");
        pipe.write_all(&vec![b' '; taken]).expect("room for what was there before");
        ledger.write(pipe);
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("text");
        text[taken..].lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }

    fn sum(lines: &[serde_json::Value], field: &str) -> u64 {
        lines.iter().filter_map(|line| line[field].as_u64()).sum()
    }

    #[tokio::test]
    async fn a_ledger_has_a_line_for_each_destination_up_to_a_bound() {
        let ledger = Ledger::new();
        for number in 0..1000 {
            let id = ledger.row(Some(&destination(number % 500)));
            ledger.connected(id, [192, 0, 2, 1].into());
            ledger.moved(id, 3, 5);
        }
        let lines = written(&ledger, 0).await;
        assert_eq!(lines.len(), ROWS_MAX + 1);
        assert_eq!(lines[0]["address"], "192.0.2.1");
        assert_eq!((&lines[0]["connections"], &lines[0]["bytes_up"]), (&2.into(), &6.into()));
        let last = &lines[ROWS_MAX];
        assert_eq!((&last["host"], &last["connections"]), (&OTHERS.into(), &488.into()));
        assert!(last["address"].is_null() && last.get("truncated").is_none());
        assert_eq!((sum(&lines, "bytes_up"), sum(&lines, "bytes_down")), (3000, 5000));
    }

    #[tokio::test]
    async fn a_pipe_without_room_cuts_the_ledger_and_says_so() {
        let ledger = Ledger::new();
        for number in 0..ROWS_MAX {
            let id = ledger.row(Some(&destination(number)));
            ledger.connected(id, [192, 0, 2, 1].into());
            ledger.moved(id, usize::MAX >> 12, usize::MAX >> 12);
        }
        // Pages of the pipe that were taken before, of its sixteen.
        for taken in [4, 12, 15] {
            let lines = written(&ledger, taken * PIPE_BYTES).await;
            assert!(lines.len() > 1 && lines.len() < ROWS_MAX, "{}", lines.len());
            let (last, whole) = lines.split_last().expect("lines");
            assert_eq!((&last["host"], &last["truncated"]), (&OTHERS.into(), &true.into()), "{last}");
            assert!(whole.iter().all(|line| line.get("truncated").is_none()));
            assert_eq!(sum(&lines, "connections"), ROWS_MAX as u64);
        }
        assert_eq!(written(&ledger, 16 * PIPE_BYTES).await.len(), 0);
    }

    #[tokio::test]
    async fn what_is_no_pipe_is_no_ledger() {
        let file = tempfile::tempfile().expect("a file");
        assert!(pipe(file.into()).is_err());
        let (reader, _writer) = std::io::pipe().expect("a pipe");
        assert!(pipe(reader.into()).is_err());
    }
}
