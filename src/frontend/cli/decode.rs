//! The decoder of the CLI's stdout: bytes to lines, lines to events, without I/O.
//! Every event is the tenant's claim, for a tool can write to its parent's pipes; nothing here is trusted.

use bytes::{Buf, BytesMut};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::client::Asked;

/// Bytes of one line, at most. A tool's result of a few MiB is legal; a line without end is not.
pub const LINE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Why a line was not accepted. Either ends the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Garbage {
    /// Longer than [`LINE_BYTES_MAX`].
    TooLong,
    /// Not a JSON object of the form that its type has.
    NotAnEvent,
}

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    buffer: BytesMut,
    /// Bytes of `buffer` that are known to hold no line break.
    searched: usize,
}

impl Lines {
    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// What was added and is no line yet.
    pub fn take_rest(&mut self) -> BytesMut {
        self.searched = 0;
        self.buffer.split()
    }

    /// The next whole line without its line break, if there is one.
    ///
    /// # Errors
    /// [`Garbage::TooLong`].
    pub fn take_line(&mut self) -> Result<Option<BytesMut>, Garbage> {
        let found =
            self.buffer[self.searched..].iter().position(|&b| b == b'\n').map(|at| at + self.searched);
        match found {
            Some(end) if end > LINE_BYTES_MAX => Err(Garbage::TooLong),
            Some(end) => {
                let line = self.buffer.split_to(end);
                self.buffer.advance(1);
                self.searched = 0;
                Ok(Some(line))
            }
            None if self.buffer.len() > LINE_BYTES_MAX => Err(Garbage::TooLong),
            None => {
                self.searched = self.buffer.len();
                Ok(None)
            }
        }
    }
}

/// What the CLI says, as far as an answer depends on it.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A turn begins.
    Init(Init),
    /// A piece of the model's stream, of the main agent only.
    Stream(Stream),
    /// Blocks of a whole message, of the main agent only.
    Assistant(Assistant),
    /// Results of these tool calls came back to the main agent.
    ToolResults(Vec<String>),
    /// The CLI is about to repeat a request; the status that made it.
    Retry(Option<u16>),
    /// Where the tenant's plan stands.
    RateLimit(RateLimit),
    /// The CLI asks something of whoever started it.
    Asked(Asked),
    /// The end of a turn.
    Result(Box<Outcome>),
    /// How the MCP servers stand: the answer to a question of ours.
    Servers(Vec<Server>),
    /// Anything else, known or not.
    Other,
}

/// `system/init`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default)]
pub struct Init {
    /// The version that the CLI says it has.
    pub claude_code_version: String,
    /// The permission mode in force.
    #[serde(rename = "permissionMode")]
    pub permission_mode: String,
    /// The MCP servers that it knows.
    pub mcp_servers: Vec<Server>,
    /// The tools that it has, in its own order.
    #[serde(default)]
    pub tools: Vec<String>,
}

/// An MCP server, by the CLI's word.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default)]
pub struct Server {
    /// Its name.
    pub name: String,
    /// How it stands; read it by [`Server::word`].
    pub status: String,
    /// Its tools, where it is connected and the CLI was asked for them.
    pub tools: Vec<Tool>,
    /// What it says of itself.
    #[serde(rename = "serverInfo")]
    pub about: Option<About>,
    /// Why it failed.
    pub error: Option<String>,
}

/// A tool of an MCP server.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
}

/// What an MCP server says of itself.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default)]
pub struct About {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// The word for a server that the CLI says nothing of.
pub const MISSING: &str = "missing";

impl Server {
    /// How it stands, as one of few words.
    pub fn word(&self) -> &'static str {
        let words = ["connected", "failed", "pending", "needs-auth", "disabled"];
        words.into_iter().find(|word| *word == self.status).unwrap_or("unknown")
    }
}

/// One event of the model's stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Stream {
    /// `message_start`.
    Start {
        /// The upstream's id of the message.
        id: String,
        /// The model that answers.
        model: String,
        /// What it has used so far.
        usage: Usage,
    },
    /// `content_block_start`.
    BlockStart {
        /// Its number in the message.
        index: u64,
        /// Its kind.
        block: BlockStart,
    },
    /// `content_block_delta`.
    Delta {
        /// The block's number.
        index: u64,
        /// What is added.
        delta: Delta,
    },
    /// `content_block_stop`.
    BlockStop {
        /// The block's number.
        index: u64,
    },
    /// `message_delta`: what the message has used when it ends.
    Used(Usage),
    /// `message_stop`.
    Stop,
    /// What is not known.
    Other,
}

/// The kind of a block, and what it begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockStart {
    /// Text.
    Text(String),
    /// Thinking.
    Thinking(String),
    /// Thinking that only the model can read.
    RedactedThinking(String),
    /// A call of a tool.
    ToolUse {
        /// Its id.
        id: String,
        /// The tool, as the CLI calls it.
        name: String,
        /// Its input, where it is whole already.
        input: Option<String>,
    },
    /// What is not known.
    Other,
}

/// What is added to a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// To a text.
    Text(String),
    /// To thinking.
    Thinking(String),
    /// The signature of thinking.
    Signature(String),
    /// To a call's input.
    Input(String),
    /// What is not known, or not shown.
    Other,
}

/// An `assistant` line.
#[derive(Debug, Clone, PartialEq)]
pub struct Assistant {
    /// The upstream's id, or the CLI's for what it wrote by itself.
    pub id: String,
    /// The model; `<synthetic>` for what the CLI wrote by itself.
    pub model: String,
    /// The blocks of this line.
    pub blocks: Vec<BlockStart>,
}

/// `rate_limit_event`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RateLimit {
    /// allowed, allowed_warning or rejected.
    pub status: String,
    /// Seconds since 1970.
    pub resets_at: Option<u64>,
}

/// `result`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default)]
pub struct Outcome {
    /// success, error_max_turns, …; not to be judged by alone.
    pub subtype: String,
    /// Whether the turn failed.
    pub is_error: bool,
    /// The upstream's status that ended it.
    pub api_error_status: Option<u16>,
    /// What the CLI calls a failure that has no status, such as `max_output_tokens`.
    pub api_error: Option<String>,
    /// The last text, or the error's.
    pub result: Option<String>,
    /// The model's last stop reason.
    pub stop_reason: Option<String>,
    /// Why the CLI's loop ended.
    pub terminal_reason: Option<String>,
    /// What it used in all.
    pub usage: Usage,
    /// What it cost by the CLI's price list, US dollars.
    pub total_cost_usd: Option<f64>,
    /// Turns of the agent.
    pub num_turns: u64,
    /// The answer in JSON, where a schema asked for one.
    pub structured_output: Option<serde_json::Value>,
}

/// Tokens used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// In.
    pub input_tokens: u64,
    /// Out.
    pub output_tokens: u64,
    /// Written to the cache.
    #[serde(deserialize_with = "or_zero")]
    pub cache_creation_input_tokens: u64,
    /// Read from the cache.
    #[serde(deserialize_with = "or_zero")]
    pub cache_read_input_tokens: u64,
    /// Of those written, how long they are kept.
    #[serde(deserialize_with = "or_default")]
    pub cache_creation: CacheCreation,
}

impl Usage {
    /// Both together.
    pub fn plus(&self, more: &Usage) -> Usage {
        self.with(more, u64::saturating_add)
    }

    /// Without what was told already.
    pub fn minus(&self, told: &Usage) -> Usage {
        self.with(told, u64::saturating_sub)
    }

    fn with(&self, other: &Usage, count: fn(u64, u64) -> u64) -> Usage {
        let (mine, its) = (&self.cache_creation, &other.cache_creation);
        Usage {
            input_tokens: count(self.input_tokens, other.input_tokens),
            output_tokens: count(self.output_tokens, other.output_tokens),
            cache_creation_input_tokens: count(
                self.cache_creation_input_tokens,
                other.cache_creation_input_tokens,
            ),
            cache_read_input_tokens: count(self.cache_read_input_tokens, other.cache_read_input_tokens),
            cache_creation: CacheCreation {
                ephemeral_5m_input_tokens: count(
                    mine.ephemeral_5m_input_tokens,
                    its.ephemeral_5m_input_tokens,
                ),
                ephemeral_1h_input_tokens: count(
                    mine.ephemeral_1h_input_tokens,
                    its.ephemeral_1h_input_tokens,
                ),
            },
        }
    }
}

/// Tokens written to the cache, by their lifetime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct CacheCreation {
    /// Five minutes.
    pub ephemeral_5m_input_tokens: u64,
    /// One hour.
    pub ephemeral_1h_input_tokens: u64,
}

/// The envelope of every line. What depends on the type stays raw until the type is known, for `type` may
/// come last, and an unknown type may hold anything under these names.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(rename = "type")]
    kind: String,
    #[serde(borrow, default)]
    subtype: Option<&'a RawValue>,
    #[serde(borrow, default)]
    parent_tool_use_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    event: Option<&'a RawValue>,
    #[serde(borrow, default)]
    message: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error_status: Option<&'a RawValue>,
    #[serde(borrow, default)]
    rate_limit_info: Option<&'a RawValue>,
    #[serde(borrow, default)]
    request_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    request: Option<&'a RawValue>,
    #[serde(borrow, default)]
    response: Option<&'a RawValue>,
}

/// The answer to a control request; only one that we ask has these fields.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Response {
    response: ResponseBody,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ResponseBody {
    #[serde(rename = "mcpServers")]
    servers: Option<Vec<Server>>,
}

/// The event of one line.
///
/// # Errors
/// [`Garbage::NotAnEvent`].
pub fn event(line: &[u8]) -> Result<Event, Garbage> {
    let envelope: Envelope<'_> = parse(std::str::from_utf8(line).map_err(|_| Garbage::NotAnEvent)?)?;
    let main = envelope.parent_tool_use_id.is_none_or(|raw| raw.get() == "null");
    let subtype = envelope.subtype.map_or("", |raw| raw.get().trim_matches('"'));
    match (envelope.kind.as_str(), subtype) {
        ("system", "init") => from_line(line).map(Event::Init),
        ("system", "api_retry") => {
            Ok(Event::Retry(envelope.error_status.and_then(|raw| raw.get().parse().ok())))
        }
        ("stream_event", _) if main => stream(envelope.event.ok_or(Garbage::NotAnEvent)?).map(Event::Stream),
        ("assistant", _) if main => assistant(envelope.message.ok_or(Garbage::NotAnEvent)?),
        ("user", _) if main => Ok(envelope.message.map_or(Event::Other, tool_results)),
        ("rate_limit_event", _) => {
            envelope.rate_limit_info.map_or(Ok(Event::Other), |raw| parse(raw.get()).map(Event::RateLimit))
        }
        ("control_request", _) => {
            let id = envelope.request_id.and_then(|raw| serde_json::from_str(raw.get()).ok());
            let asked = id.zip(envelope.request).and_then(|(id, request)| Asked::parse(id, request));
            Ok(asked.map_or(Event::Other, Event::Asked))
        }
        ("control_response", _) => {
            let response: Response =
                parse(envelope.response.ok_or(Garbage::NotAnEvent)?.get()).unwrap_or_default();
            Ok(response.response.servers.map_or(Event::Other, Event::Servers))
        }
        ("result", _) => from_line(line).map(|outcome| Event::Result(Box::new(outcome))),
        _ => Ok(Event::Other),
    }
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Garbage> {
    serde_json::from_str(text).map_err(|_| Garbage::NotAnEvent)
}

fn from_line<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T, Garbage> {
    serde_json::from_slice(line).map_err(|_| Garbage::NotAnEvent)
}

#[derive(Deserialize)]
struct RawStream<'a> {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    index: u64,
    #[serde(borrow, default)]
    message: Option<&'a RawValue>,
    #[serde(borrow, default)]
    content_block: Option<&'a RawValue>,
    #[serde(borrow, default)]
    delta: Option<&'a RawValue>,
    #[serde(borrow, default)]
    usage: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawMessage<'a> {
    #[serde(default)]
    id: String,
    #[serde(default)]
    model: String,
    #[serde(default)]
    usage: Usage,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum RawBlock {
    Text {
        text: String,
    },
    Thinking {
        #[serde(default)]
        thinking: String,
    },
    RedactedThinking {
        #[serde(default)]
        data: String,
    },
    ToolUse {
        id: String,
        #[serde(default)]
        name: String,
        #[serde(default)]
        input: serde_json::Map<String, serde_json::Value>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(clippy::enum_variant_names)]
enum RawDelta {
    TextDelta {
        text: String,
    },
    ThinkingDelta {
        thinking: String,
    },
    SignatureDelta {
        signature: String,
    },
    InputJsonDelta {
        partial_json: String,
    },
    #[serde(other)]
    Other,
}

fn stream(raw: &RawValue) -> Result<Stream, Garbage> {
    let raw: RawStream<'_> = parse(raw.get())?;
    let index = raw.index;
    match raw.kind.as_str() {
        "message_start" => {
            let message: RawMessage<'_> = parse(raw.message.ok_or(Garbage::NotAnEvent)?.get())?;
            Ok(Stream::Start { id: message.id, model: message.model, usage: message.usage })
        }
        "content_block_start" => {
            let block: RawBlock = parse(raw.content_block.ok_or(Garbage::NotAnEvent)?.get())?;
            Ok(Stream::BlockStart { index, block: block.into() })
        }
        "content_block_delta" => {
            let delta: RawDelta = parse(raw.delta.ok_or(Garbage::NotAnEvent)?.get())?;
            Ok(Stream::Delta { index, delta: delta.into() })
        }
        "content_block_stop" => Ok(Stream::BlockStop { index }),
        "message_delta" => {
            Ok(Stream::Used(raw.usage.map_or(Ok(Usage::default()), |usage| parse(usage.get()))?))
        }
        "message_stop" => Ok(Stream::Stop),
        _ => Ok(Stream::Other),
    }
}

fn assistant(raw: &RawValue) -> Result<Event, Garbage> {
    let message: RawMessage<'_> = parse(raw.get())?;
    let blocks: Vec<RawBlock> = message.content.map_or(Ok(Vec::new()), |content| parse(content.get()))?;
    let blocks = blocks.into_iter().map(BlockStart::from).collect();
    Ok(Event::Assistant(Assistant { id: message.id, model: message.model, blocks }))
}

fn tool_results(raw: &RawValue) -> Event {
    #[derive(Deserialize)]
    struct Message {
        content: Vec<Block>,
    }
    #[derive(Deserialize)]
    struct Block {
        tool_use_id: Option<String>,
    }
    // The content of a user's line may also be a plain string, which holds no result.
    match parse::<Message>(raw.get()) {
        Ok(message) => {
            Event::ToolResults(message.content.into_iter().filter_map(|b| b.tool_use_id).collect())
        }
        Err(_) => Event::Other,
    }
}

impl From<RawBlock> for BlockStart {
    fn from(raw: RawBlock) -> BlockStart {
        match raw {
            RawBlock::Text { text } => BlockStart::Text(text),
            RawBlock::Thinking { thinking } => BlockStart::Thinking(thinking),
            RawBlock::RedactedThinking { data } => BlockStart::RedactedThinking(data),
            RawBlock::ToolUse { id, name, input } => {
                let whole = (!input.is_empty()).then(|| serde_json::Value::Object(input).to_string());
                BlockStart::ToolUse { id, name, input: whole }
            }
            RawBlock::Other => BlockStart::Other,
        }
    }
}

impl From<RawDelta> for Delta {
    fn from(raw: RawDelta) -> Delta {
        match raw {
            RawDelta::TextDelta { text } => Delta::Text(text),
            RawDelta::ThinkingDelta { thinking } => Delta::Thinking(thinking),
            RawDelta::SignatureDelta { signature } => Delta::Signature(signature),
            RawDelta::InputJsonDelta { partial_json } => Delta::Input(partial_json),
            RawDelta::Other => Delta::Other,
        }
    }
}

fn or_zero<'de, D: serde::Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    Option::<u64>::deserialize(from).map(Option::unwrap_or_default)
}

fn or_default<'de, D: serde::Deserializer<'de>>(from: D) -> Result<CacheCreation, D::Error> {
    Option::<CacheCreation>::deserialize(from).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_at_line_breaks_wherever_reads_end() {
        let stream = b"one\n\ntwo three\nfour";
        for size in 1..=stream.len() {
            let mut lines = Lines::default();
            let mut out = Vec::new();
            for chunk in stream.chunks(size) {
                lines.push(chunk);
                while let Some(line) = lines.take_line().expect("short lines") {
                    out.push(String::from_utf8(line.to_vec()).expect("UTF-8"));
                }
            }
            assert_eq!(out, ["one", "", "two three"], "reads of {size}");
        }
    }

    #[test]
    fn a_line_without_end_is_garbage() {
        let mut lines = Lines::default();
        lines.push(&vec![b'x'; LINE_BYTES_MAX]);
        assert_eq!(lines.take_line(), Ok(None));
        lines.push(b"x");
        assert_eq!(lines.take_line(), Err(Garbage::TooLong));
    }

    #[test]
    fn what_is_not_an_event_is_garbage_and_what_is_unknown_is_not() {
        let check =
            |line: &str, expected: Result<Event, Garbage>| assert_eq!(event(line.as_bytes()), expected);
        check("", Err(Garbage::NotAnEvent));
        check("hello", Err(Garbage::NotAnEvent));
        check("[1]", Err(Garbage::NotAnEvent));
        check("{}", Err(Garbage::NotAnEvent));
        check(r#"{"type":1}"#, Err(Garbage::NotAnEvent));
        check(r#"{"type":"stream_event"}"#, Err(Garbage::NotAnEvent));
        check(r#"{"type":"new_thing","message":5,"event":[]}"#, Ok(Event::Other));
        check(r#"{"type":"system","subtype":{"odd":1}}"#, Ok(Event::Other));
        check(r#"{"type":"stream_event","event":{"type":"novel"}}"#, Ok(Event::Stream(Stream::Other)));
        check(r#"{"event":{"type":"message_stop"},"type":"stream_event"}"#, Ok(Event::Stream(Stream::Stop)));
        check(
            r#"{"type":"stream_event","event":{"type":"message_stop"},"parent_tool_use_id":"toolu_1"}"#,
            Ok(Event::Other),
        );
        check(r#"{"type":"system","subtype":"api_retry","error_status":401}"#, Ok(Event::Retry(Some(401))));
        check(r#"{"type":"system","subtype":"api_retry","error_status":null}"#, Ok(Event::Retry(None)));
        check(r#"{"type":"user","message":{"role":"user","content":"text"}}"#, Ok(Event::Other));
        check(
            r#"{"type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"t1"},{"type":"text"}]}}"#,
            Ok(Event::ToolResults(vec!["t1".into()])),
        );
        assert_eq!(event(b"{\"type\":\"\xff\"}"), Err(Garbage::NotAnEvent));
    }
}
