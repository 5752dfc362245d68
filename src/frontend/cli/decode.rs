//! The decoder of the CLI's stdout: bytes to lines, lines to events, without I/O.
//! Every event is the tenant's claim, for a tool can write to its parent's pipes; nothing here is trusted.

use std::fmt;

use bytes::{Buf, BytesMut};
use gaoler_files::ANSWER_BYTES_MAX;
use serde::Deserialize;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::client::Asked;

/// Bytes of one line of the CLI's, at most: twice what the largest answer of a model takes, escaped. What comes of a line
/// is done in one piece, so this bounds how long a worker is at it.
pub const LINE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes of a string in a user's line that are kept. Such a line holds what tools gave, whole images among it, and
/// nothing of that is shown to anybody: it may be of any length, and takes no memory.
const PASSED_BYTES_MAX: usize = 1024;
/// How a user's line begins.
const USER: &[u8] = br#"{"type":"user","#;
/// Bytes of a line from which on its buffer is given back with it.
const LARGE_BYTES: usize = 64 * 1024;
/// Bytes of an id or a name: of a message, a model, a call, a tool. A client's own ids have no more.
pub const WORD_BYTES_MAX: usize = 256;
/// Of what only the model can read, which is told in one event: four times what its longest thinking makes.
const UNREADABLE: Bound =
    Bound { what: "bytes of a signature or of redacted thinking", most: 2 * 1024 * 1024 };
/// Blocks of one line. The CLI writes a line a block; a message that was not streamed has all of its own.
pub const BLOCKS_MAX: usize = 1024;
/// Tools that a CLI names when it begins, MCP servers' included.
const TOOLS_MAX: usize = 16 * 1024;
/// MCP servers that it names. A request has 16, and the operator's come beside them.
const SERVERS_MAX: usize = 256;
/// Tools of one MCP server that are read. Nobody is told of more.
const SERVER_TOOLS_MAX: usize = 256;

/// Why a line was not accepted. Either ends the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Garbage {
    /// More of something than there may be.
    Over(Bound),
    /// Not a JSON object of the form that its type has.
    NotAnEvent,
}

/// A bound of what a CLI may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// What it bounds, with its unit.
    pub what: &'static str,
    /// How much of it there may be.
    pub most: usize,
}

const LINE: Bound = Bound { what: "bytes of a line", most: LINE_BYTES_MAX };

impl fmt::Display for Garbage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Garbage::Over(Bound { what, most }) => write!(out, "there are more than {most} {what}"),
            Garbage::NotAnEvent => write!(out, "a line is not of its form"),
        }
    }
}

impl Bound {
    /// Whether there is no more than this.
    ///
    /// # Errors
    /// [`Garbage::Over`].
    pub fn holds(self, found: usize) -> Result<(), Garbage> {
        if found <= self.most { Ok(()) } else { Err(Garbage::Over(self)) }
    }
}

/// A word of the CLI's, within its bound.
fn word(what: &'static str, word: String) -> Result<String, Garbage> {
    Bound { what, most: WORD_BYTES_MAX }.holds(word.len())?;
    Ok(word)
}

/// Cuts a stream of bytes into lines.
#[derive(Debug)]
pub struct Lines {
    buffer: BytesMut,
    /// Bytes of `buffer` that are known to hold no line break.
    searched: usize,
    /// Bytes of a line, at most.
    line: Bound,
    /// How far the strings of a user's line have been cut.
    cut: Option<Cut>,
}

/// Where a line stands whose long strings are cut.
#[derive(Debug, Default)]
struct Cut {
    /// Bytes of the line that are done with.
    done: usize,
    /// In a string: how much of it has been seen.
    string: Option<usize>,
    /// Bytes that still belong to an escape, and that one begins.
    escape: usize,
    escaped: bool,
    /// The rest of this string goes.
    drops: bool,
}

impl Cut {
    /// Whether this byte, the next one of the line, is kept.
    fn keeps(&mut self, byte: u8) -> bool {
        let Some(seen) = &mut self.string else {
            self.string = (byte == b'"').then_some(0);
            return true;
        };
        *seen += 1;
        match (self.escaped, self.escape, byte) {
            (true, ..) => (self.escaped, self.escape) = (false, if byte == b'u' { 4 } else { 0 }),
            (false, 1.., _) => self.escape -= 1,
            (false, 0, b'"') => {
                (self.string, self.drops) = (None, false);
                return true;
            }
            (false, 0, _) => {
                // Neither an escape nor a character is cut in the middle.
                self.drops |= *seen > PASSED_BYTES_MAX && !(0x80..0xc0).contains(&byte);
                self.escaped = byte == b'\\';
            }
        }
        !self.drops
    }
}

impl Default for Lines {
    fn default() -> Lines {
        Lines { buffer: BytesMut::new(), searched: 0, line: LINE, cut: None }
    }
}

impl Lines {
    /// The lines of a program of our own, whose answers are longer than any of the CLI's.
    pub fn of_a_program() -> Lines {
        Lines { line: Bound { most: ANSWER_BYTES_MAX, ..LINE }, ..Lines::default() }
    }

    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes of memory that they take, where that is worth a word.
    pub fn bytes(&self) -> usize {
        Some(self.buffer.capacity()).filter(|bytes| *bytes > LARGE_BYTES).unwrap_or_default()
    }

    /// What was added and is no line yet.
    pub fn take_rest(&mut self) -> BytesMut {
        self.searched = 0;
        self.cut = None;
        self.buffer.split()
    }

    /// The next whole line without its line break, if there is one. Its long strings are cut where it is a user's.
    ///
    /// # Errors
    /// [`Garbage::Over`].
    pub fn take_line(&mut self) -> Result<Option<BytesMut>, Garbage> {
        let found =
            self.buffer[self.searched..].iter().position(|&b| b == b'\n').map(|at| at + self.searched);
        if let Some(end) = found {
            self.line.holds(end)?;
            let line = self.buffer.split_to(end);
            self.buffer.advance(1);
            self.searched = 0;
            self.cut = None;
            if line.len() > LARGE_BYTES {
                // What is left would keep all of the line's memory for as long as the run lasts.
                self.buffer = BytesMut::from(&self.buffer[..]);
            }
            return Ok(Some(line));
        }
        if self.buffer.len() > LARGE_BYTES && self.buffer.starts_with(USER) {
            self.cut_strings();
        }
        self.searched = self.buffer.len();
        self.line.holds(self.buffer.len())?;
        Ok(None)
    }

    /// Cuts the long strings of the line that has no end yet, as far as it has come. Each byte is looked at once.
    fn cut_strings(&mut self) {
        let cut = self.cut.get_or_insert_default();
        let mut kept = cut.done;
        for at in cut.done..self.buffer.len() {
            let byte = self.buffer[at];
            if cut.keeps(byte) {
                self.buffer[kept] = byte;
                kept += 1;
            }
        }
        cut.done = kept;
        self.buffer.truncate(kept);
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
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Init {
    /// The version that the CLI says it has.
    pub claude_code_version: String,
    /// The permission mode in force.
    pub permission_mode: String,
    /// The MCP servers that it knows.
    pub mcp_servers: Vec<Server>,
    /// The tools that it has, in its own order.
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
    /// The first of its tools, where it is connected and the CLI was asked for them.
    #[serde(deserialize_with = "first_tools")]
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
    /// The answer in JSON, where a schema asked for one: as it is, for nobody here looks into it.
    #[serde(deserialize_with = "as_it_is")]
    pub structured_output: Option<String>,
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
    response: Option<&'a RawValue>,
    #[serde(borrow, default)]
    request_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    request: Option<&'a RawValue>,
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
    servers: Option<First<Server, SERVERS_MAX>>,
}

/// The first so many things of a list, and how many there are. The others take no memory.
struct First<T, const MOST: usize> {
    items: Vec<T>,
    found: usize,
}

impl<T, const MOST: usize> Default for First<T, MOST> {
    fn default() -> First<T, MOST> {
        First { items: Vec::new(), found: 0 }
    }
}

impl<T, const MOST: usize> First<T, MOST> {
    /// All of them.
    fn all(self, what: &'static str) -> Result<Vec<T>, Garbage> {
        Bound { what, most: MOST }.holds(self.found)?;
        Ok(self.items)
    }
}

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for First<T, MOST> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct List<T, const MOST: usize>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for List<T, MOST> {
            type Value = First<T, MOST>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut first = First::default();
                while first.items.len() < MOST {
                    let Some(item) = list.next_element()? else { return Ok(first) };
                    first.items.push(item);
                    first.found += 1;
                }
                while list.next_element::<IgnoredAny>()?.is_some() {
                    first.found += 1;
                }
                Ok(first)
            }
        }
        from.deserialize_seq(List(std::marker::PhantomData))
    }
}

fn first_tools<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Tool>, D::Error> {
    First::<Tool, SERVER_TOOLS_MAX>::deserialize(from).map(|first| first.items)
}

fn as_it_is<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Option::<Box<RawValue>>::deserialize(from).map(|raw| raw.map(|raw| raw.get().to_owned()))
}

/// The event of one line. What it takes is in proportion to the line, whatever the line holds: fields are read by their
/// names, lists have bounds, and everything else is passed over.
///
/// # Errors
/// [`Garbage`].
pub fn event(line: &[u8]) -> Result<Event, Garbage> {
    LINE.holds(line.len())?;
    let line = std::str::from_utf8(line).map_err(|_| Garbage::NotAnEvent)?;
    let envelope: Envelope<'_> = parse(line)?;
    let main = envelope.parent_tool_use_id.is_none_or(|raw| raw.get() == "null");
    let subtype = envelope.subtype.map_or("", |raw| raw.get().trim_matches('"'));
    match (envelope.kind.as_str(), subtype) {
        ("system", "init") => init(line),
        ("system", "api_retry") => {
            Ok(Event::Retry(envelope.error_status.and_then(|raw| raw.get().parse().ok())))
        }
        ("stream_event", _) if main => stream(envelope.event.ok_or(Garbage::NotAnEvent)?).map(Event::Stream),
        ("assistant", _) if main => assistant(envelope.message.ok_or(Garbage::NotAnEvent)?),
        ("user", _) if main => envelope.message.map_or(Ok(Event::Other), tool_results),
        ("rate_limit_event", _) => match envelope.rate_limit_info {
            Some(raw) => {
                let RateLimit { status, resets_at } = parse(raw.get())?;
                Ok(Event::RateLimit(RateLimit {
                    status: word("bytes of a limit's status", status)?,
                    resets_at,
                }))
            }
            None => Ok(Event::Other),
        },
        ("control_response", _) => {
            let response: Response =
                parse(envelope.response.ok_or(Garbage::NotAnEvent)?.get()).unwrap_or_default();
            match response.response.servers {
                Some(servers) => servers.all("MCP servers").map(Event::Servers),
                None => Ok(Event::Other),
            }
        }
        ("control_request", _) => {
            let id = envelope.request_id.and_then(|raw| serde_json::from_str(raw.get()).ok());
            match id.zip(envelope.request) {
                Some((id, request)) => {
                    Asked::parse(id, request).map(|it| it.map_or(Event::Other, Event::Asked))
                }
                None => Ok(Event::Other),
            }
        }
        ("result", _) => parse(line).map(|outcome| Event::Result(Box::new(outcome))),
        _ => Ok(Event::Other),
    }
}

fn init(line: &str) -> Result<Event, Garbage> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Raw {
        claude_code_version: String,
        #[serde(rename = "permissionMode")]
        permission_mode: String,
        mcp_servers: First<Server, SERVERS_MAX>,
        tools: First<String, TOOLS_MAX>,
    }
    let raw: Raw = parse(line)?;
    Ok(Event::Init(Init {
        claude_code_version: raw.claude_code_version,
        permission_mode: raw.permission_mode,
        mcp_servers: raw.mcp_servers.all("MCP servers")?,
        tools: raw.tools.all("tools")?,
    }))
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Garbage> {
    serde_json::from_str(text).map_err(|_| Garbage::NotAnEvent)
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

/// A block. Its fields stay raw until its type is known, like those of a line.
#[derive(Deserialize)]
struct RawBlock<'a> {
    #[serde(rename = "type")]
    kind: String,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    thinking: Option<&'a RawValue>,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawDelta<'a> {
    #[serde(rename = "type")]
    kind: String,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    thinking: Option<&'a RawValue>,
    #[serde(borrow, default)]
    signature: Option<&'a RawValue>,
    #[serde(borrow, default)]
    partial_json: Option<&'a RawValue>,
}

/// A field that must be there.
fn text(raw: Option<&RawValue>) -> Result<String, Garbage> {
    parse(raw.ok_or(Garbage::NotAnEvent)?.get())
}

fn text_or_none(raw: Option<&RawValue>) -> Result<String, Garbage> {
    raw.map_or(Ok(String::new()), |raw| parse(raw.get()))
}

fn stream(raw: &RawValue) -> Result<Stream, Garbage> {
    let raw: RawStream<'_> = parse(raw.get())?;
    let index = raw.index;
    match raw.kind.as_str() {
        "message_start" => {
            let mut message: RawMessage<'_> = parse(raw.message.ok_or(Garbage::NotAnEvent)?.get())?;
            let (id, model) = message.names()?;
            Ok(Stream::Start { id, model, usage: message.usage })
        }
        "content_block_start" => {
            let block: RawBlock<'_> = parse(raw.content_block.ok_or(Garbage::NotAnEvent)?.get())?;
            Ok(Stream::BlockStart { index, block: block.read()? })
        }
        "content_block_delta" => {
            let delta: RawDelta<'_> = parse(raw.delta.ok_or(Garbage::NotAnEvent)?.get())?;
            Ok(Stream::Delta { index, delta: delta.read()? })
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
    let mut message: RawMessage<'_> = parse(raw.get())?;
    let (id, model) = message.names()?;
    let blocks: First<RawBlock<'_>, BLOCKS_MAX> =
        message.content.map_or(Ok(First::default()), |content| parse(content.get()))?;
    let blocks = blocks.all("blocks of a line")?.into_iter().map(RawBlock::read);
    Ok(Event::Assistant(Assistant { id, model, blocks: blocks.collect::<Result<_, _>>()? }))
}

fn tool_results(raw: &RawValue) -> Result<Event, Garbage> {
    #[derive(Deserialize)]
    struct Message {
        content: First<Block, BLOCKS_MAX>,
    }
    #[derive(Deserialize)]
    struct Block {
        tool_use_id: Option<String>,
    }
    // The content of a user's line may also be a plain string, which holds no result.
    let Ok(message) = parse::<Message>(raw.get()) else { return Ok(Event::Other) };
    let results = message.content.all("blocks of a line")?.into_iter().filter_map(|block| block.tool_use_id);
    results.map(|id| word("bytes of a call's id", id)).collect::<Result<_, _>>().map(Event::ToolResults)
}

impl RawMessage<'_> {
    /// Its id and its model.
    fn names(&mut self) -> Result<(String, String), Garbage> {
        let id = word("bytes of a message's id", std::mem::take(&mut self.id))?;
        Ok((id, word("bytes of a model's name", std::mem::take(&mut self.model))?))
    }
}

impl RawBlock<'_> {
    fn read(self) -> Result<BlockStart, Garbage> {
        Ok(match self.kind.as_str() {
            "text" => BlockStart::Text(text(self.text)?),
            "thinking" => BlockStart::Thinking(text_or_none(self.thinking)?),
            "redacted_thinking" => BlockStart::RedactedThinking(unreadable(text_or_none(self.data)?)?),
            "tool_use" => BlockStart::ToolUse {
                id: word("bytes of a call's id", text(self.id)?)?,
                name: word("bytes of a tool's name", text_or_none(self.name)?)?,
                input: self.input.map_or(Ok(None), input)?,
            },
            _ => BlockStart::Other,
        })
    }
}

fn unreadable(text: String) -> Result<String, Garbage> {
    UNREADABLE.holds(text.len())?;
    Ok(text)
}

/// A call's input where it is whole: an object, as it is; nothing where it is empty.
fn input(raw: &RawValue) -> Result<Option<String>, Garbage> {
    let Some(inside) = raw.get().strip_prefix('{') else { return Err(Garbage::NotAnEvent) };
    Ok(Some(raw.get()).filter(|_| inside.trim_start() != "}").map(str::to_owned))
}

impl RawDelta<'_> {
    fn read(self) -> Result<Delta, Garbage> {
        Ok(match self.kind.as_str() {
            "text_delta" => Delta::Text(text(self.text)?),
            "thinking_delta" => Delta::Thinking(text(self.thinking)?),
            "signature_delta" => Delta::Signature(unreadable(text(self.signature)?)?),
            "input_json_delta" => Delta::Input(text(self.partial_json)?),
            _ => Delta::Other,
        })
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
        assert_eq!(lines.take_line(), Err(Garbage::Over(LINE)));
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

    #[test]
    fn r02_a_tools_result_of_any_length_takes_no_memory_and_is_known_by_its_call() {
        let text = "\u{e9}\\u00e9\\\"\\\\x".repeat(500_000);
        let line = format!(
            r#"{{"type":"user","message":{{"role":"user","content":[{{"type":"tool_result","tool_use_id":"t1","content":"{text}"}},{{"tool_use_id":"t2"}}]}}}}"#
        );
        assert!(line.len() > LINE_BYTES_MAX);
        for size in [4093, 16 * 1024] {
            let mut lines = Lines::default();
            for chunk in line.as_bytes().chunks(size) {
                lines.push(chunk);
                assert_eq!(lines.take_line(), Ok(None));
                assert!(lines.buffer.len() <= LARGE_BYTES + size, "{}", lines.buffer.len());
            }
            lines.push(b"\n");
            let line = lines.take_line().expect("within its bounds").expect("a line");
            assert_eq!(event(&line), Ok(Event::ToolResults(vec!["t1".into(), "t2".into()])));
        }
        // One that is shown to somebody is whole, or too long.
        let line =
            format!(r#"{{"type":"assistant","message":{{"content":[{{"type":"text","text":"{text}"}}]}}}}"#);
        let mut lines = Lines::default();
        let over = line.as_bytes().chunks(size_of::<Cut>() * 100).find_map(|chunk| {
            lines.push(chunk);
            lines.take_line().err()
        });
        assert_eq!(over, Some(Garbage::Over(LINE)));
    }

    #[test]
    fn r02_what_a_line_names_has_a_bound_and_a_list_ends_where_it_may() {
        let long = "x".repeat(WORD_BYTES_MAX + 1);
        let many = |one: &str, count: usize| vec![one; count].join(",");
        let assistant = |id: &str, model: &str, content: &str| {
            format!(
                r#"{{"type":"assistant","message":{{"id":"{id}","model":"{model}","content":[{content}]}}}}"#
            )
        };
        let text = r#"{"type":"text","text":""}"#;
        let user = |content: &str| format!(r#"{{"type":"user","message":{{"content":[{content}]}}}}"#);
        let init = |field: &str| format!(r#"{{"type":"system","subtype":"init",{field}}}"#);
        let servers = |list: &str| {
            format!(r#"{{"type":"control_response","response":{{"response":{{"mcpServers":[{list}]}}}}}}"#)
        };
        let start = |model: &str| {
            format!(
                r#"{{"type":"stream_event","event":{{"type":"message_start","message":{{"model":"{model}"}}}}}}"#
            )
        };
        let asks = |id: &str, method: &str| {
            format!(
                r#"{{"type":"control_request","request_id":"{id}","request":{{"subtype":"mcp_message","server_name":"client","message":{{"method":"{method}"}}}}}}"#
            )
        };
        let limit = |status: &str| {
            format!(r#"{{"type":"rate_limit_event","rate_limit_info":{{"status":"{status}"}}}}"#)
        };
        // What is at its bound is taken, what is past it is not.
        let rows = [
            (assistant("m", &long[1..], text), assistant("m", &long, text)),
            (assistant(&long[1..], "m", text), assistant(&long, "m", text)),
            (assistant("m", "m", &many(text, BLOCKS_MAX)), assistant("m", "m", &many(text, BLOCKS_MAX + 1))),
            (user(&many("{}", BLOCKS_MAX)), user(&many("{}", BLOCKS_MAX + 1))),
            (user(r#"{"tool_use_id":"t"}"#), user(&format!(r#"{{"tool_use_id":"{long}"}}"#))),
            (
                init(&format!(r#""tools":[{}]"#, many(r#""""#, TOOLS_MAX))),
                init(&format!(r#""tools":[{}]"#, many(r#""""#, TOOLS_MAX + 1))),
            ),
            (servers(&many("{}", SERVERS_MAX)), servers(&many("{}", SERVERS_MAX + 1))),
            (start(&long[1..]), start(&long)),
            (asks("r", "ping"), asks(&long, "ping")),
            (asks("r", "ping"), asks("r", &long)),
            (limit("rejected"), limit(&long)),
        ];
        for (row, (within, over)) in rows.iter().enumerate() {
            assert!(event(within.as_bytes()).is_ok(), "row {row}");
            assert!(matches!(event(over.as_bytes()), Err(Garbage::Over(_))), "row {row}");
        }
        // Tools of a server are told up to a number, and the rest takes nothing.
        let tools = servers(&format!(r#"{{"name":"s","tools":[{}]}}"#, many("{}", 10_000)));
        let Ok(Event::Servers(found)) = event(tools.as_bytes()) else { panic!("servers") };
        assert_eq!(found[0].tools.len(), SERVER_TOOLS_MAX);
        assert_eq!(
            Garbage::Over(LINE).to_string(),
            format!("there are more than {LINE_BYTES_MAX} bytes of a line")
        );
    }

    #[test]
    fn r02_numbers_keys_and_depth_of_any_kind_are_garbage_or_nothing() {
        let stream = |event: &str| format!(r#"{{"type":"stream_event","event":{event}}}"#);
        let used = |usage: &str| stream(&format!(r#"{{"type":"message_delta","usage":{usage}}}"#));
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        let garbage = [
            stream(r#"{"type":"content_block_stop","index":-1}"#),
            stream(r#"{"type":"content_block_stop","index":18446744073709551616}"#),
            stream(r#"{"type":"content_block_stop","index":1e3}"#),
            used(r#"{"output_tokens":-1}"#),
            used(r#"{"output_tokens":1e300}"#),
            used(r#"{"output_tokens":1,"output_tokens":2}"#),
            r#"{"type":"result","total_cost_usd":1e999}"#.to_owned(),
            r#"{"type":"user","type":"user"}"#.to_owned(),
            stream(&deep),
            String::new(),
            " ".to_owned(),
            "[".repeat(1_000_000),
            r#"{"type":"assistant","message":{"content":[{"type":"tool_use","id":"t","input":[]}]}}"#
                .to_owned(),
        ];
        for line in &garbage {
            assert_eq!(event(line.as_bytes()), Err(Garbage::NotAnEvent), "{:.80}", line);
        }
        let nothing = [
            stream(&format!(r#"{{"type":"novel","content_block":{deep}}}"#)),
            format!(r#"{{"type":"novel","x":{deep}}}"#),
            format!(r#"{{"x":{deep},"type":"user","message":{{"content":{deep}}}}}"#),
        ];
        for line in &nothing {
            let found = event(line.as_bytes());
            assert!(matches!(found, Ok(Event::Other | Event::Stream(Stream::Other))), "{found:?}");
        }
        // What is nobody's here to look into passes as it is.
        let call = format!(
            r#"{{"type":"assistant","message":{{"content":[{{"type":"tool_use","id":"t","input":{{"a":{deep},"a":1}}}}]}}}}"#
        );
        let Ok(Event::Assistant(found)) = event(call.as_bytes()) else { panic!("a message") };
        let [BlockStart::ToolUse { input: Some(input), .. }] = &found.blocks[..] else { panic!("a call") };
        assert_eq!(*input, format!(r#"{{"a":{deep},"a":1}}"#));
    }
}
