//! Reads the upstream's own token counts out of an answer as it passes.
//! It must never change or delay a byte, and never believe a count of anybody but the upstream.

use serde::Deserialize;

/// A line of a stream that is longer than this is not read: the lines that count are short.
const LINE_BYTES_MAX: usize = 256 * 1024;

/// Tokens of one answer.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// In.
    pub input: u64,
    /// Out.
    pub output: u64,
    /// Written to the cache.
    pub cache_write: u64,
    /// Read from the cache.
    pub cache_read: u64,
}

/// The counts as the API writes them; a missing one means that the earlier one still holds.
#[derive(Deserialize)]
struct Counts {
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
}

/// A whole message, or an event that holds counts.
#[derive(Deserialize)]
struct Counted {
    message: Option<Started>,
    usage: Option<Counts>,
}

#[derive(Deserialize)]
struct Started {
    usage: Option<Counts>,
}

impl Usage {
    /// The counts of a whole JSON answer; none where it holds none.
    pub fn of_message(bytes: &[u8]) -> Usage {
        let mut usage = Usage::default();
        usage.take(bytes);
        usage
    }

    fn take(&mut self, json: &[u8]) {
        let Ok(counted) = serde_json::from_slice::<Counted>(json) else { return };
        let Some(counts) = counted.usage.or(counted.message.and_then(|started| started.usage)) else {
            return;
        };
        self.input = counts.input_tokens.unwrap_or(self.input);
        self.output = counts.output_tokens.unwrap_or(self.output);
        self.cache_write = counts.cache_creation_input_tokens.unwrap_or(self.cache_write);
        self.cache_read = counts.cache_read_input_tokens.unwrap_or(self.cache_read);
    }
}

/// The counts of a stream of events.
#[derive(Default)]
pub struct Meter {
    line: Vec<u8>,
    too_long: bool,
    usage: Usage,
}

impl Meter {
    /// Takes a piece of the stream and gives the counts so far.
    pub fn take(&mut self, piece: &[u8]) -> Usage {
        let mut lines = piece.split(|&byte| byte == b'\n').peekable();
        while let Some(part) = lines.next() {
            self.too_long |= self.line.len() + part.len() > LINE_BYTES_MAX;
            if !self.too_long {
                self.line.extend_from_slice(part);
            }
            // The last part has no line feed behind it yet.
            if lines.peek().is_some() {
                self.end_line();
            }
        }
        self.usage
    }

    fn end_line(&mut self) {
        let data = self.line.strip_prefix(b"data:").filter(|_| !self.too_long);
        // Most lines hold no counts; looking for the word is cheaper than parsing them all.
        if let Some(data) = data.filter(|data| memchr::memmem::find(data, b"\"usage\"").is_some()) {
            self.usage.take(data);
        }
        self.line.clear();
        self.too_long = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":\
        {\"input_tokens\":7,\"output_tokens\":1,\"cache_creation_input_tokens\":3,\"cache_read_input_tokens\":4}}}\n\n\
        event: content_block_delta\ndata: {\"delta\":{\"text\":\"\\\"usage\\\":{\\\"input_tokens\\\":9}\"}}\n\n\
        event: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":50}}\r\n\r\n";
    const EXPECTED: Usage = Usage { input: 7, output: 50, cache_write: 3, cache_read: 4 };

    #[test]
    fn a_stream_counts_the_same_in_any_pieces() {
        for size in [1, 2, 3, 7, 64, 4096] {
            let mut meter = Meter::default();
            let usage = STREAM.as_bytes().chunks(size).map(|piece| meter.take(piece)).last();
            assert_eq!(usage, Some(EXPECTED), "pieces of {size}");
        }
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let mut meter = Meter::default();
        for _ in 0..100 {
            meter.take(&[b'x'; 10_000]);
        }
        assert!(meter.line.len() <= LINE_BYTES_MAX);
        assert_eq!(meter.take(format!("\n{STREAM}").as_bytes()), EXPECTED);
    }

    #[test]
    fn a_whole_message_counts() {
        let usage = Usage::of_message(br#"{"type":"message","usage":{"input_tokens":1,"output_tokens":2}}"#);
        assert_eq!(usage, Usage { input: 1, output: 2, ..Usage::default() });
        assert_eq!(Usage::of_message(br#"{"input_tokens":5}"#), Usage::default());
        assert_eq!(Usage::of_message(b"not json"), Usage::default());
    }
}
