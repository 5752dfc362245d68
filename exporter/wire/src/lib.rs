//! What the frontend hands to the exporter, and what that says back: JSON frames of a bounded size.
//! A span must never hold a prompt, a credential or a file's name: its keys are this house's own words.

#![forbid(unsafe_code)]

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// Bytes of one frame, at most, either way.
pub const FRAME_BYTES_MAX: usize = 32 * 1024;
/// Bytes of the exporter's settings, at most: an address, some headers and a few certificates.
pub const SETTINGS_BYTES_MAX: usize = 256 * 1024;

/// A word of this house, or one that came over the wire.
pub type Word = Cow<'static, str>;

/// What the command line has settled for the exporter. It travels as a sealed memory file, for the headers may hold a key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where spans go: the whole address.
    pub url: String,
    /// Headers of each request.
    pub headers: Vec<(String, String)>,
    /// Certificates to trust in place of the built-in ones, as PEM; empty = the built-in ones.
    pub authorities: String,
}

/// Spans that have ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frame {
    /// How many spans the frontend has handed over before these.
    pub before: u64,
    /// They.
    pub spans: Vec<Span>,
}

/// One span.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// Its trace.
    pub trace: [u8; 16],
    /// Itself.
    pub id: [u8; 8],
    /// The span that it is a part of.
    pub parent: Option<[u8; 8]>,
    /// Whether that span is the client's.
    pub remote: bool,
    /// The client's `tracestate`.
    pub state: String,
    /// What it is.
    pub name: Word,
    /// Whose end of a conversation it is.
    pub side: Side,
    /// Nanoseconds since 1970.
    pub start: u64,
    /// The same of its end.
    pub end: u64,
    /// What is known of it.
    pub attributes: Vec<(Word, Value)>,
    /// What happened meanwhile, and when.
    pub events: Vec<(Word, u64)>,
    /// Spans of other traces that it follows from: their trace, and they.
    pub links: Vec<([u8; 16], [u8; 8])>,
    /// It failed.
    pub failed: bool,
}

/// Whose end of a conversation a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Nobody's: a step within this server.
    Internal,
    /// A client was served.
    Server,
    /// Another server was asked.
    Client,
}

/// What an attribute says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// A number.
    Number(i64),
    /// A word.
    Text(Word),
}

impl From<&'static str> for Value {
    fn from(text: &'static str) -> Value {
        Value::Text(Cow::Borrowed(text))
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Text(Cow::Owned(text))
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Value {
        Value::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

/// What became of spans, since the exporter said so last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Of an exporter that is new: the first frame that it reads comes after so many spans.
    pub from: Option<u64>,
    /// The collector has taken so many.
    pub exported: u64,
    /// So many were given up.
    pub dropped: u64,
}

/// A frame's bytes; `None` where they are too many.
pub fn encode(what: &impl Serialize) -> Option<Vec<u8>> {
    serde_json::to_vec(what).ok().filter(|frame| frame.len() <= FRAME_BYTES_MAX)
}

/// The exporter's settings as bytes.
pub fn encode_settings(settings: &Settings) -> Vec<u8> {
    serde_json::to_vec(settings).unwrap_or_default()
}

/// What a frame says; `None` where it is not exactly one of ours.
pub fn decode<T: for<'de> Deserialize<'de>>(frame: &[u8]) -> Option<T> {
    serde_json::from_slice(frame).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_as_it_was_written_and_nothing_else_is() {
        let span = Span {
            trace: [1; 16],
            id: [2; 8],
            parent: Some([3; 8]),
            remote: true,
            state: "a=b".into(),
            name: "queue".into(),
            side: Side::Internal,
            start: 1_700_000_000_000_000_000,
            end: u64::MAX,
            attributes: vec![("gaoler.run".into(), "00".into()), ("n".into(), Value::from(7))],
            events: vec![("first_output".into(), 1_700_000_000_000_000_001)],
            links: vec![([4; 16], [5; 8])],
            failed: false,
        };
        let frame = Frame { before: 9, spans: vec![span] };
        let bytes = encode(&frame).expect("it fits");
        assert_eq!(decode::<Frame>(&bytes), Some(frame.clone()));
        assert_eq!(decode::<Report>(&bytes), None);
        assert_eq!(decode::<Frame>(&bytes[1..]), None);
        let long = Frame { before: 0, spans: vec![frame.spans[0].clone(); 200] };
        assert_eq!(encode(&long), None, "what is too long is none");
    }
}
