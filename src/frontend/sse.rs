//! The bytes of an answer: the Messages API's events and its JSON body, written from types.
//! It must never write an event whose `event:` line and `type` differ, nor a line break inside `data:`.

use bytes::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;

use super::answer::{Answer, Done, Emit, Kind, Shown};
use super::cli::client::input_of;
use super::cli::decode::Usage;
use super::error::ApiError;

/// A message, as a body or inside `message_start`.
#[derive(Serialize)]
struct Message<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    role: &'static str,
    model: &'a str,
    content: Vec<Block<'a>>,
    stop_reason: Option<&'a str>,
    stop_sequence: Option<&'a str>,
    stop_details: Option<&'a str>,
    container: Option<&'a str>,
    usage: FullUsage,
    session_id: Option<String>,
    run_id: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mcp_servers: Vec<Server<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    x_cost: Option<Cost>,
    #[serde(skip_serializing_if = "Option::is_none")]
    x_error: Option<serde_json::Value>,
}

/// An MCP server of the request.
#[derive(Serialize)]
struct Server<'a> {
    name: &'a str,
    status: &'static str,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block<'a> {
    Text {
        text: &'a str,
        #[serde(skip_serializing_if = "Citations::is_left_out")]
        citations: Citations,
    },
    Thinking {
        thinking: &'a str,
        signature: &'a str,
    },
    RedactedThinking {
        data: &'a str,
    },
    ToolUse {
        id: &'a str,
        name: &'a str,
        input: Input<'a>,
    },
}

/// A call's input: an object as it came, or an empty one.
#[derive(Serialize)]
#[serde(untagged)]
enum Input<'a> {
    Raw(&'a RawValue),
    Empty {},
}

impl<'a> Input<'a> {
    fn of(text: &'a str) -> Input<'a> {
        input_of(text).map_or(Input::Empty {}, Input::Raw)
    }
}

/// `citations` is null in a body and absent in `content_block_start`, as the official servers do it.
#[derive(Serialize, PartialEq)]
#[serde(untagged)]
enum Citations {
    Null(Option<()>),
    LeftOut,
}

impl Citations {
    fn is_left_out(&self) -> bool {
        *self == Citations::LeftOut
    }
}

/// What was used, in the API's own form.
#[derive(Serialize)]
pub struct FullUsage {
    input_tokens: u64,
    output_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    cache_creation: Lifetimes,
    server_tool_use: Option<()>,
    service_tier: &'static str,
}

#[derive(Serialize)]
struct Lifetimes {
    ephemeral_5m_input_tokens: u64,
    ephemeral_1h_input_tokens: u64,
}

#[derive(Serialize)]
struct FinalUsage {
    input_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    output_tokens: u64,
}

/// What a run cost, by the CLI's price list.
#[derive(Serialize)]
pub struct Cost {
    total_cost_usd: f64,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart {
        message: Box<Message<'a>>,
    },
    ContentBlockStart {
        index: usize,
        content_block: Block<'a>,
    },
    ContentBlockDelta {
        index: usize,
        delta: Delta<'a>,
    },
    ContentBlockStop {
        index: usize,
    },
    MessageDelta {
        delta: Stop<'a>,
        usage: FinalUsage,
        #[serde(skip_serializing_if = "Option::is_none")]
        x_cost: Option<Cost>,
    },
    MessageStop,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(clippy::enum_variant_names)]
enum Delta<'a> {
    TextDelta { text: &'a str },
    ThinkingDelta { thinking: &'a str },
    SignatureDelta { signature: &'a str },
    InputJsonDelta { partial_json: &'a str },
}

#[derive(Serialize)]
struct Stop<'a> {
    stop_reason: &'a str,
    stop_sequence: Option<&'a str>,
}

impl Event<'_> {
    fn name(&self) -> &'static str {
        match self {
            Event::MessageStart { .. } => "message_start",
            Event::ContentBlockStart { .. } => "content_block_start",
            Event::ContentBlockDelta { .. } => "content_block_delta",
            Event::ContentBlockStop { .. } => "content_block_stop",
            Event::MessageDelta { .. } => "message_delta",
            Event::MessageStop => "message_stop",
        }
    }
}

/// The events of these steps.
pub fn events(answer: &Answer, steps: &[Emit]) -> Bytes {
    let mut out = Vec::new();
    for step in steps {
        let event = match step {
            Emit::Start => Event::MessageStart { message: Box::new(beginning(answer)) },
            Emit::BlockStart(index, kind) => Event::ContentBlockStart {
                index: *index,
                content_block: match kind {
                    Kind::Text => Block::Text { text: "", citations: Citations::LeftOut },
                    Kind::Thinking => Block::Thinking { thinking: "", signature: "" },
                    Kind::Redacted(data) => Block::RedactedThinking { data },
                    Kind::ToolUse { id, name } => Block::ToolUse { id, name, input: Input::Empty {} },
                },
            },
            Emit::Text(index, text) => {
                Event::ContentBlockDelta { index: *index, delta: Delta::TextDelta { text } }
            }
            Emit::Thinking(index, thinking) => {
                Event::ContentBlockDelta { index: *index, delta: Delta::ThinkingDelta { thinking } }
            }
            Emit::Signature(index, signature) => {
                Event::ContentBlockDelta { index: *index, delta: Delta::SignatureDelta { signature } }
            }
            Emit::Input(index, partial_json) => {
                Event::ContentBlockDelta { index: *index, delta: Delta::InputJsonDelta { partial_json } }
            }
            Emit::BlockStop(index) => Event::ContentBlockStop { index: *index },
        };
        write(&mut out, event.name(), &event);
    }
    out.into()
}

/// `message_delta` and `message_stop`.
pub fn ending(done: &Done) -> Bytes {
    let mut out = Vec::new();
    let usage = FinalUsage {
        input_tokens: done.usage.input_tokens,
        cache_creation_input_tokens: done.usage.cache_creation_input_tokens,
        cache_read_input_tokens: done.usage.cache_read_input_tokens,
        output_tokens: done.usage.output_tokens,
    };
    let delta = Event::MessageDelta {
        delta: Stop { stop_reason: done.stop_reason, stop_sequence: None },
        usage,
        x_cost: cost(done),
    };
    write(&mut out, delta.name(), &delta);
    write(&mut out, Event::MessageStop.name(), &Event::MessageStop);
    out.into()
}

/// A terminal `error`.
pub fn error(error: &ApiError, request_id: &str) -> Bytes {
    let mut out = Vec::new();
    write(&mut out, "error", &error.body(request_id));
    out.into()
}

/// A `ping`, which every client skips and every proxy counts as traffic.
pub fn ping() -> Bytes {
    Bytes::from_static(b"event: ping\ndata: {\"type\":\"ping\"}\n\n")
}

/// The whole message as a JSON body.
pub fn body(answer: &Answer, done: &Done) -> Bytes {
    let message = Message {
        content: content(&answer.blocks),
        stop_reason: Some(done.stop_reason),
        usage: full_usage(&done.usage),
        x_cost: cost(done),
        ..beginning(answer)
    };
    serde_json::to_vec(&message).unwrap_or_default().into()
}

/// What came before a failure, as a message, for a client whose status line has already said 200. `pause_turn`
/// tells it that the turn is not whole; an error object would be taken for a message without content.
pub fn failed_body(answer: &Answer, error: &ApiError, request_id: &str) -> Bytes {
    let note = Shown {
        kind: Kind::Text,
        text: format!("[gaoler: the run failed: {}]", error.message),
        signature: String::new(),
    };
    let mut content = content(&answer.blocks);
    content.push(Block::Text { text: &note.text, citations: Citations::Null(None) });
    let message = Message {
        content,
        stop_reason: Some("pause_turn"),
        x_error: Some(error.body(request_id)),
        ..beginning(answer)
    };
    serde_json::to_vec(&message).unwrap_or_default().into()
}

fn beginning(answer: &Answer) -> Message<'_> {
    Message {
        id: &answer.heading.id,
        kind: "message",
        role: "assistant",
        model: &answer.heading.model,
        content: Vec::new(),
        stop_reason: None,
        stop_sequence: None,
        stop_details: None,
        container: None,
        usage: full_usage(&answer.first_usage),
        session_id: answer.heading.session.map(|id| id.to_string()),
        run_id: answer.heading.run.to_string(),
        mcp_servers: answer.servers.iter().map(|(name, status)| Server { name, status }).collect(),
        x_cost: None,
        x_error: None,
    }
}

fn content(blocks: &[Shown]) -> Vec<Block<'_>> {
    blocks
        .iter()
        .map(|block| match &block.kind {
            Kind::Text => Block::Text { text: &block.text, citations: Citations::Null(None) },
            Kind::Thinking => Block::Thinking { thinking: &block.text, signature: &block.signature },
            Kind::Redacted(data) => Block::RedactedThinking { data },
            Kind::ToolUse { id, name } => Block::ToolUse { id, name, input: Input::of(&block.text) },
        })
        .collect()
}

/// What was used, as a message says it.
pub fn full_usage(usage: &Usage) -> FullUsage {
    FullUsage {
        input_tokens: usage.input_tokens,
        output_tokens: usage.output_tokens,
        cache_creation_input_tokens: usage.cache_creation_input_tokens,
        cache_read_input_tokens: usage.cache_read_input_tokens,
        cache_creation: Lifetimes {
            ephemeral_5m_input_tokens: usage.cache_creation.ephemeral_5m_input_tokens,
            ephemeral_1h_input_tokens: usage.cache_creation.ephemeral_1h_input_tokens,
        },
        server_tool_use: None,
        service_tier: "standard",
    }
}

/// What there is to tell of the cost.
pub fn cost(done: &Done) -> Option<Cost> {
    done.cost_usd.filter(|cost| cost.is_finite()).map(|total_cost_usd| Cost { total_cost_usd })
}

fn write(out: &mut Vec<u8>, name: &str, data: &impl Serialize) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\ndata: ");
    // JSON writes a line break inside a string as \n, so data is one line.
    out.extend(serde_json::to_vec(data).unwrap_or_default());
    out.extend_from_slice(b"\n\n");
}
