//! Answers in the form of the Messages API: JSON, server-sent events, error bodies.
//! It must never send an event whose `type` is not its name, or a block index out of order.

use std::time::Duration;

use serde_json::{Value, json};

use crate::model::{Block, Pace, SILENCE_MAX};
use crate::script::{Script, Step};

/// A text goes out in pieces of at least this many bytes, so that even a short one is several deltas.
const PIECE_BYTES_MIN: usize = 12;
/// A text goes out in about this many pieces at most, so that a large one is not millions of events.
const PIECES_MAX: usize = 512;

/// What a message needs beside its blocks.
pub struct Envelope<'a> {
    /// A number that no other answer of this process has.
    pub number: u64,
    /// The model of the request.
    pub model: &'a str,
    /// Tokens of the request.
    pub input_tokens: u64,
}

/// Bytes make tokens at this rate, everywhere.
pub fn tokens(bytes: usize) -> u64 {
    (bytes as u64 / 4).max(1)
}

/// A whole message as JSON.
pub fn message(envelope: &Envelope<'_>, blocks: &[Block]) -> Value {
    let content: Vec<_> =
        blocks.iter().enumerate().map(|(n, block)| whole_block(envelope, n, block)).collect();
    skeleton(envelope, content, Some(stop_reason(blocks)), output_tokens(blocks))
}

/// A message as server-sent events.
pub fn events(envelope: &Envelope<'_>, blocks: &[Block], pace: Pace) -> Script {
    let mut steps = begin(envelope);
    for (index, block) in blocks.iter().enumerate() {
        let pieces = deltas(block);
        // A cut or a stall comes in the middle of a block, where nothing closes it.
        let (sent, broken) = match pace {
            Pace::Cut => (pieces.len().div_ceil(2), Some(Step::Cut)),
            Pace::Stall => (pieces.len().div_ceil(2), Some(Step::Wait(SILENCE_MAX))),
            Pace::AtOnce | Pace::Slow(_) => (pieces.len(), None),
        };
        let start = json!({"index": index, "content_block": opening(envelope, index, block)});
        steps.push(event("content_block_start", start));
        for delta in &pieces[..sent] {
            if let Pace::Slow(delay) = pace {
                steps.push(Step::Wait(delay));
            }
            steps.push(event("content_block_delta", json!({"index": index, "delta": delta})));
        }
        if let Some(broken) = broken {
            // The short wait lets what was sent reach the client before the connection breaks.
            steps.extend([Step::Wait(Duration::from_millis(20)), broken, Step::Cut]);
            return Script::new(steps);
        }
        steps.push(event("content_block_stop", json!({"index": index})));
    }
    let delta = json!({"stop_reason": stop_reason(blocks), "stop_sequence": null});
    let usage = json!({"output_tokens": output_tokens(blocks)});
    steps.push(event("message_delta", json!({"delta": delta, "usage": usage})));
    steps.push(event("message_stop", json!({})));
    Script::new(steps)
}

/// A stream that begins like any other and ends in an error.
pub fn broken_events(envelope: &Envelope<'_>, kind: &str, request_id: &str) -> Script {
    let mut steps = begin(envelope);
    let opening = json!({"index": 0, "content_block": {"type": "text", "text": ""}});
    let delta = json!({"index": 0, "delta": {"type": "text_delta", "text": crate::model::MARK}});
    steps.push(event("content_block_start", opening));
    steps.push(event("content_block_delta", delta));
    let error = json!({"type": kind, "message": "[embedded] broken off, as the request wished"});
    steps.push(event("error", json!({"error": error, "request_id": request_id})));
    Script::new(steps)
}

/// An error body.
pub fn error(kind: &str, message: &str, request_id: &str) -> Value {
    json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})
}

/// The API's error type for a status.
pub fn error_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        402 => "billing_error",
        403 => "permission_error",
        404 => "not_found_error",
        408 | 504 => "timeout_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}

/// The status of an error type.
pub fn error_status(kind: &str) -> u16 {
    [401, 402, 403, 404, 504, 413, 429, 529, 400].into_iter().find(|&s| error_type(s) == kind).unwrap_or(500)
}

fn begin(envelope: &Envelope<'_>) -> Vec<Step> {
    let start = skeleton(envelope, vec![], None, 1);
    vec![event("message_start", json!({"message": start})), event("ping", json!({}))]
}

fn skeleton(envelope: &Envelope<'_>, content: Vec<Value>, stop: Option<&str>, output: u64) -> Value {
    json!({
        "id": format!("msg_embedded{:016x}", envelope.number), "type": "message", "role": "assistant",
        "model": envelope.model, "content": content, "stop_reason": stop, "stop_sequence": null,
        "stop_details": null, "container": null,
        "usage": {
            "input_tokens": envelope.input_tokens, "output_tokens": output,
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
            "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
            "server_tool_use": null, "service_tier": "standard",
        },
    })
}

fn stop_reason(blocks: &[Block]) -> &'static str {
    let calls = blocks.iter().any(|block| matches!(block, Block::Call { .. }));
    if calls { "tool_use" } else { "end_turn" }
}

fn output_tokens(blocks: &[Block]) -> u64 {
    let bytes = |block: &Block| match block {
        Block::Text(text) | Block::Thinking(text) => text.len(),
        Block::Call { input, .. } => input.to_string().len(),
    };
    tokens(blocks.iter().map(bytes).sum())
}

fn call_id(envelope: &Envelope<'_>, index: usize) -> String {
    format!("toolu_embedded{:014x}{index:02}", envelope.number)
}

/// A signature in the shape of the API's: base64, and not empty.
const SIGNATURE: &str = "ZW1iZWRkZWQ=";

fn whole_block(envelope: &Envelope<'_>, index: usize, block: &Block) -> Value {
    match block {
        Block::Text(text) => json!({"type": "text", "text": text, "citations": null}),
        Block::Thinking(text) => json!({"type": "thinking", "thinking": text, "signature": SIGNATURE}),
        Block::Call { tool, input } => {
            json!({"type": "tool_use", "id": call_id(envelope, index), "name": tool, "input": input})
        }
    }
}

fn opening(envelope: &Envelope<'_>, index: usize, block: &Block) -> Value {
    match block {
        Block::Text(_) => json!({"type": "text", "text": ""}),
        Block::Thinking(_) => json!({"type": "thinking", "thinking": "", "signature": ""}),
        Block::Call { tool, .. } => {
            json!({"type": "tool_use", "id": call_id(envelope, index), "name": tool, "input": {}})
        }
    }
}

fn deltas(block: &Block) -> Vec<Value> {
    match block {
        Block::Text(text) => pieces(text).map(|piece| json!({"type": "text_delta", "text": piece})).collect(),
        Block::Thinking(text) => pieces(text)
            .map(|piece| json!({"type": "thinking_delta", "thinking": piece}))
            .chain([json!({"type": "signature_delta", "signature": SIGNATURE})])
            .collect(),
        Block::Call { input, .. } => pieces(&input.to_string())
            .map(|piece| json!({"type": "input_json_delta", "partial_json": piece}))
            .collect(),
    }
}

/// A text in pieces that end between characters.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let size = PIECE_BYTES_MIN.max(text.len().div_ceil(PIECES_MAX));
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = (size.min(rest.len())..=rest.len()).find(|&end| rest.is_char_boundary(end))?;
        let (piece, later) = rest.split_at(end);
        rest = later;
        Some(piece).filter(|piece| !piece.is_empty())
    })
}

fn event(name: &str, mut data: Value) -> Step {
    data["type"] = name.into();
    Step::Send(format!("event: {name}\ndata: {data}\n\n").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_up_the_text_again() {
        for text in ["", "a", "[embedded] hello there", "\u{1F600}\u{1F600}\u{1F600}\u{1F600}\u{e9}"] {
            assert_eq!(pieces(text).collect::<String>(), text);
        }
        assert_eq!(pieces("[embedded] hello").count(), 2);
        assert!(pieces(&"x".repeat(1_000_000)).count() <= PIECES_MAX);
    }

    #[test]
    fn every_error_type_has_its_status() {
        for status in [400, 401, 402, 403, 404, 413, 429, 500, 504, 529] {
            assert_eq!(error_status(error_type(status)), status);
        }
    }
}
