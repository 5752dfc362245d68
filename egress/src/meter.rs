//! Reads the upstream's own token counts out of an answer as it passes.
//! It must never change or delay a byte, and never believe a count of anybody but the upstream.

use std::borrow::Cow;

use serde::Deserialize;

/// A line of a stream that is longer than this is not read: the lines that count are short.
const LINE_BYTES_MAX: usize = 256 * 1024;

/// Bytes of text that one token stands for at most, on the average of an answer: it is some four in prose, and fewer in
/// code and other scripts. What an answer has brought counts at least as much as that until its end says how much it was, so
/// that who breaks it off has not had it for nothing.
const TOKEN_BYTES: u64 = 8;
/// Tokens of one answer that are believed. No model takes as many, and the sums of many answers stay numbers.
const TOKENS_MAX: u64 = 1 << 32;

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

/// An event that holds a piece of the answer.
#[derive(Deserialize)]
struct Piece<'a> {
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
}

/// The piece, in whichever of its forms.
#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    thinking: Option<Cow<'a, str>>,
    #[serde(borrow)]
    partial_json: Option<Cow<'a, str>>,
}

impl Delta<'_> {
    fn bytes(&self) -> u64 {
        let all = [&self.text, &self.thinking, &self.partial_json];
        all.into_iter().flatten().map(|text| text.len() as u64).sum()
    }
}

impl Usage {
    /// The counts of a whole JSON answer; none where it holds none.
    pub fn of_message(bytes: &[u8]) -> Usage {
        let mut usage = Usage::default();
        usage.take(bytes);
        usage
    }

    /// Takes what some JSON counts, and says whether that is of an answer's end and not of its beginning.
    fn take(&mut self, json: &[u8]) -> bool {
        let Ok(counted) = serde_json::from_slice::<Counted>(json) else { return false };
        let is_end = counted.usage.as_ref().is_some_and(|counts| counts.output_tokens.is_some());
        let Some(counts) = counted.usage.or(counted.message.and_then(|started| started.usage)) else {
            return false;
        };
        let of = |count: Option<u64>, before: u64| count.map_or(before, |count| count.min(TOKENS_MAX));
        self.input = of(counts.input_tokens, self.input);
        self.output = of(counts.output_tokens, self.output);
        self.cache_write = of(counts.cache_creation_input_tokens, self.cache_write);
        self.cache_read = of(counts.cache_read_input_tokens, self.cache_read);
        is_end
    }
}

/// The counts of a stream of events.
#[derive(Default)]
pub struct Meter {
    line: Vec<u8>,
    too_long: bool,
    usage: Usage,
    /// Bytes of the answer's text that came.
    text: u64,
    /// The answer's end has said how much it was.
    is_told: bool,
}

impl Meter {
    /// Takes a piece of the stream and gives the counts so far: until the end tells them, at least what must have been
    /// billed for what came.
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
        let least = if self.is_told { 0 } else { self.text / TOKEN_BYTES };
        Usage { output: self.usage.output.max(least), ..self.usage }
    }

    fn end_line(&mut self) {
        let data = self.line.strip_prefix(b"data:").filter(|_| !self.too_long);
        // Most lines hold no counts; looking for the word is cheaper than parsing them all.
        if let Some(data) = data.filter(|data| memchr::memmem::find(data, b"\"usage\"").is_some()) {
            self.is_told |= self.usage.take(data);
        }
        if let Some(data) = data.filter(|data| memchr::memmem::find(data, b"\"delta\"").is_some()) {
            let piece = serde_json::from_slice::<Piece<'_>>(data).ok().and_then(|piece| piece.delta);
            self.text = self.text.saturating_add(piece.map_or(0, |delta| delta.bytes()));
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
    fn r18_an_answer_that_is_broken_off_counts_at_least_what_came_of_it() {
        let start = "data: {\"message\":{\"usage\":{\"input_tokens\":7,\"output_tokens\":1}}}\n\n";
        let delta = |field: &str, text: &str| {
            format!("data: {{\"type\":\"content_block_delta\",\"delta\":{{\"{field}\":\"{text}\"}}}}\n\n")
        };
        let end = "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\
                   \"usage\":{\"output_tokens\":3}}\n\n";
        let text = "x".repeat(800);
        for field in ["text", "thinking", "partial_json"] {
            let mut meter = Meter::default();
            assert_eq!(meter.take(start.as_bytes()).output, 1);
            assert_eq!(meter.take(delta(field, &text).as_bytes()).output, 100, "{field}");
            // A text that is written in escapes is as long as what it says.
            assert_eq!(meter.take(delta(field, &"\\u0041".repeat(80)).as_bytes()).output, 110, "{field}");
            // What the upstream says in the end holds, however little.
            assert_eq!(meter.take(end.as_bytes()).output, 3, "{field}");
        }
        let mut meter = Meter::default();
        let usage = meter.take(delta("signature", &text).as_bytes());
        assert_eq!(usage.output, 0, "what nobody is billed for");
        // A text that speaks of counts tells none.
        let spoken = delta("text", "\\\"usage\\\":{\\\"output_tokens\\\":0}");
        meter.take(delta("text", &text).as_bytes());
        assert!(meter.take(spoken.as_bytes()).output >= 100);
    }

    #[test]
    fn r19_a_count_that_no_model_reaches_is_not_believed() {
        let usage = |count: &str| {
            let json = format!(r#"{{"usage":{{"input_tokens":{count},"output_tokens":{count}}}}}"#);
            Usage::of_message(json.as_bytes()).output
        };
        for (count, expected) in [
            ("1000000", 1_000_000),
            ("4294967296", TOKENS_MAX),
            ("9223372036854775807", TOKENS_MAX),
            ("9223372036854775808", TOKENS_MAX),
            ("18446744073709551615", TOKENS_MAX),
            ("18446744073709551616", 0),
            ("-1", 0),
            ("1.5", 0),
            ("1e300", 0),
        ] {
            assert_eq!(usage(count), expected, "{count}");
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
