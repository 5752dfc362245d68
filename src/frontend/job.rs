//! The only parser of tenants' JSON: a request's body becomes a [`Job`], a type that cannot be wrong.
//! It must never hand on a value that it has not named: what goes to the CLI is written anew from these types.

mod blocks;
pub mod completions;
pub mod mcp;
pub mod tools;
pub mod wishes;

use std::collections::HashMap;

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};
use uuid::Uuid;
use zeroize::Zeroizing;

use gaoler_policy::settings::ListedModel;
use gaoler_protocol::{Effort, Level, Limits, Model};

use super::cli::client::name_calls;
use super::error::ApiError;
use super::json::{self, Fault, NAMES_MAX, Room};
use super::models::ALIASES;
use super::workspaces;
use crate::limits;

pub use wishes::{OnDisconnect, Wishes};

/// Messages of one request, at most (the API's own bound).
pub(super) const MESSAGES_MAX: usize = 100_000;
/// Blocks of one message, at most. More than this is no conversation, and each costs memory.
pub(super) const BLOCKS_MAX: usize = 10_000;
/// Blocks of all messages, at most: what they are takes a sixth of a request's memory then. A body of 32 MB of them has
/// 160 bytes for each.
const BLOCKS_OF_ALL_MAX: usize = 200_000;
/// Names in `x-gaoler-ignored`, at most, so that a client cannot make a header of any size.
const IGNORED_MAX: usize = 32;
/// Bytes of such a name.
const IGNORED_NAME_BYTES_MAX: usize = 64;
/// Agent turns that a request may ask for.
pub(super) const TURNS_MAX: u64 = 10_000;
/// Bytes of an id of a tool call.
pub(super) const TOOL_ID_BYTES_MAX: usize = 256;

/// What a tenant asks for.
#[derive(Debug)]
pub struct Job {
    /// An alias or a full id; `sonnet` where the request names none.
    pub model: Model,
    /// Server-sent events or one JSON body.
    pub shape: Shape,
    /// The session to resume or begin; `None` is a stateless request.
    pub session: Option<Uuid>,
    /// The workspace, as the supervisor is told it; zeros where the request names none.
    pub workspace: [u8; 16],
    /// Text for the system prompt; empty = none.
    pub system: String,
    /// The earlier turns, oldest first. The last of them is never a user's.
    pub earlier: Vec<Turn>,
    /// What the user says now: never empty.
    pub prompt: Vec<Block>,
    /// Whether the answer shows thinking blocks.
    pub thinking: Thinking,
    /// Reasoning effort.
    pub effort: Effort,
    /// Agent turns at most; 0 = no limit.
    pub turns_max: u32,
    /// The level asked for; `None` = the operator's default.
    pub level: Option<Level>,
    /// The limits wished for; a zero is the level's own.
    pub limits: Limits,
    /// The credential in the body, where there is one.
    pub credential: Option<BodyCredential>,
    /// Fields of the request that have no effect, to be named in the answer.
    pub ignored: Vec<String>,
    /// Whether a stream of completions ends with what was used.
    pub usage_last: bool,
    /// MCP servers.
    pub mcp: mcp::Servers,
    /// What else is asked of the run.
    pub wishes: Wishes,
}

/// How the answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// One JSON object.
    Json,
    /// Server-sent events.
    Events,
}

/// Whether thinking is part of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thinking {
    /// Not part of it.
    Hidden,
    /// Part of it.
    Shown,
}

/// The credential of the body's `oauth_credentials`. The refresh token is dropped while parsing.
pub struct BodyCredential {
    /// The token; [`super::tenant`] checks its form.
    pub access_token: Zeroizing<String>,
    /// Milliseconds since 1970, where given.
    pub expires_at_ms: Option<u64>,
}

impl std::fmt::Debug for BodyCredential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BodyCredential(..)")
    }
}

/// Who speaks in an earlier turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The user, and results of tools.
    User,
    /// The model.
    Assistant,
}

/// One earlier message.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// Who.
    pub role: Role,
    /// What, never empty.
    pub blocks: Vec<Block>,
}

/// A block of content, of a kind that the CLI is given.
#[derive(Debug, Clone, PartialEq)]
pub enum Block {
    /// Text, never empty.
    Text(String),
    /// An image in base64.
    Image(Media),
    /// A document.
    Document {
        /// Its content.
        source: DocumentSource,
        /// Its title.
        title: Option<String>,
        /// What the user says about it.
        context: Option<String>,
    },
    /// A call of a tool in an earlier turn of the assistant: data, never executed.
    ToolUse {
        /// The id that its result refers to.
        id: String,
        /// The tool.
        name: String,
        /// Its input.
        input: Input,
    },
    /// The result of such a call.
    ToolResult {
        /// The id of the call.
        id: String,
        /// Text and images.
        content: Vec<Block>,
        /// Whether the tool failed.
        is_error: bool,
    },
}

impl Block {
    /// It and those that it holds.
    fn count(&self) -> usize {
        match self {
            Block::ToolResult { content, .. } => 1 + content.len(),
            _ => 1,
        }
    }
}

/// The input of a call, an object: written anew, and kept as a text, which takes a fraction of what its values take.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Input(Box<RawValue>);

impl Input {
    fn of(fields: &Map<String, Value>) -> Input {
        // A map with strings for names always serialises.
        Input(to_raw_value(fields).unwrap_or_else(|_| RawValue::NULL.to_owned()))
    }

    /// As it is written.
    pub fn text(&self) -> &str {
        self.0.get()
    }
}

impl PartialEq for Input {
    fn eq(&self, other: &Input) -> bool {
        self.text() == other.text()
    }
}

/// Base64 data of a known media type.
#[derive(Debug, Clone, PartialEq)]
pub struct Media {
    /// From a closed list.
    pub media_type: &'static str,
    /// Base64, checked character by character.
    pub data: String,
}

/// Where a document's content is.
#[derive(Debug, Clone, PartialEq)]
pub enum DocumentSource {
    /// A PDF in base64.
    Base64(Media),
    /// Plain text.
    Text(String),
}

pub(super) const IMAGE_TYPES: &[&str] = &["image/jpeg", "image/png", "image/gif", "image/webp"];
pub(super) const DOCUMENT_TYPES: &[&str] = &["application/pdf"];
pub(super) const DEFAULT_MODEL: &str = "sonnet";
/// Fields of the API, and of the predecessor, which have no effect here.
/// They are named in the answer like any unknown field; this list only documents them.
pub(super) const WITHOUT_EFFECT: &[&str] = &[
    "max_tokens",
    "cache_control",
    "diagnostics",
    "inference_geo",
    "speed",
    "context_management",
    "metadata",
    "stop_sequences",
    "temperature",
    "top_p",
    "top_k",
    "service_tier",
    "container",
];

/// Whether a request may name this model: an alias, or `claude-` and `[a-z0-9.-]`, with `[1m]` at the end or not.
/// Closed, so that a name can be an argument of the CLI; the upstream decides whether the model exists.
pub fn is_model(name: &str) -> bool {
    let plain = name.strip_suffix("[1m]").unwrap_or(name);
    let full = plain.strip_prefix("claude-").is_some_and(|rest| {
        !rest.is_empty()
            && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-".contains(&b))
    });
    (ALIASES.iter().any(|(alias, _)| *alias == name) || full) && Model::new(name).is_ok()
}

/// Parses a body of the Messages API. `names` may hold names of the operator's own for models.
///
/// # Errors
/// 400 with the path of what is wrong; 404 for a model that no rule names.
pub fn parse(body: &[u8], names: &[ListedModel]) -> Result<Job, ApiError> {
    let Fields { mut fields, messages } = fields(body)?;
    let mut ignored = Ignored::default();
    let session = parse_session(take(&mut fields, "session_id"))?;
    let common = common(&mut fields, &mut ignored, names)?;
    let mut system = parse_system(take(&mut fields, "system"))?;
    let (effort, schema) = parse_output(take(&mut fields, "output_config"))?;
    parse_tokens_max(&mut fields, "max_tokens", &mut ignored)?;
    let (turns, prompt) = parse_messages(&messages.list()?, &mut system, &mut ignored)?;
    let tools = tools::tools(&mut fields, &mut ignored)?;
    let words = Words { session, system, effort, schema, turns, prompt, usage_last: false };
    let mut job = job(fields, common, words, ignored);
    // The model knows them by the CLI's names, in what it said before as well.
    job.earlier.iter_mut().for_each(|turn| name_calls(&mut turn.blocks, &tools));
    job.wishes.tools = tools;
    Ok(job)
}

/// The object that a body must be: its messages as they are written, for they are read one after the other, and the rest.
struct Fields<'a> {
    fields: Map<String, Value>,
    messages: Messages<'a>,
}

/// `messages`, in the body that they are a part of.
struct Messages<'a> {
    body: &'a str,
    value: Option<&'a RawValue>,
}

fn fields(body: &[u8]) -> Result<Fields<'_>, ApiError> {
    let body = std::str::from_utf8(body).map_err(|_| ApiError::invalid("The body is not valid UTF-8."))?;
    let mut parts = json::object(body).map_err(|fault| unread(body, body, &fault))?;
    let value = messages(&mut parts);
    let mut room = Room::new();
    let read = |(name, raw): (String, &RawValue)| {
        let value = room.value(raw.get());
        value.map(|value| (name, value)).map_err(|fault| unread(body, raw.get(), &fault))
    };
    let fields = parts.into_iter().map(read).collect::<Result<_, _>>()?;
    Ok(Fields { fields, messages: Messages { body, value } })
}

fn messages<'a>(parts: &mut HashMap<String, &'a RawValue>) -> Option<&'a RawValue> {
    json::take(parts, "messages")
}

/// Why a part of a body could not be read.
fn unread(body: &str, part: &str, fault: &Fault) -> ApiError {
    match fault {
        Fault::Wrong(at) => {
            let begins = (part.as_ptr() as usize).saturating_sub(body.as_ptr() as usize);
            let before = &body.as_bytes()[..body.len().min(begins + at)];
            let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
            let column = before.iter().rev().take_while(|&&byte| byte != b'\n').count();
            ApiError::invalid(format!("The body is not valid JSON: line {line}, column {column}."))
        }
        Fault::Large => ApiError::new(
            413,
            "request_too_large",
            "The body holds more objects, arrays and values than are read here; send fewer of them.",
        ),
        Fault::Names => ApiError::invalid(format!("The body must have at most {NAMES_MAX} fields.")),
        Fault::NoObject | Fault::NoArray => ApiError::invalid("The body must be a JSON object."),
    }
}

impl<'a> Messages<'a> {
    /// Them, within their bounds.
    fn list(&self) -> Result<List<'a>, ApiError> {
        let value = self.value.ok_or_else(|| ApiError::invalid("messages: field required."))?;
        match json::array(value.get(), MESSAGES_MAX) {
            Ok(list) if list.is_empty() => {
                Err(ApiError::invalid("messages: at least one message is required."))
            }
            Ok(list) if list.len() > MESSAGES_MAX => {
                Err(ApiError::invalid(format!("messages: at most {MESSAGES_MAX} messages are accepted.")))
            }
            Ok(list) => Ok(List { body: self.body, list }),
            Err(Fault::NoArray) => Err(wrong("messages", "an array", &kind_of(value))),
            Err(fault) => Err(unread(self.body, value.get(), &fault)),
        }
    }
}

/// The messages of a request.
struct List<'a> {
    body: &'a str,
    list: Vec<&'a RawValue>,
}

impl List<'_> {
    /// One after the other, so that the values of one are gone before the next one's are made.
    fn each(&self) -> impl Iterator<Item = (String, Result<Map<String, Value>, ApiError>)> {
        self.list.iter().enumerate().map(|(i, raw)| {
            let path = format!("messages[{i}]");
            let message = match Room::new().value(raw.get()) {
                Ok(Value::Object(message)) => Ok(message),
                Ok(other) => Err(wrong(&path, "an object", &other)),
                Err(Fault::Large) => Err(ApiError::new(
                    413,
                    "request_too_large",
                    format!("{path}: holds more blocks and values than are read here; send fewer of them."),
                )),
                Err(fault) => Err(unread(self.body, raw.get(), &fault)),
            };
            (path, message)
        })
    }
}

/// A value of the same kind, for who tells of it.
fn kind_of(value: &RawValue) -> Value {
    match value.get().as_bytes().first() {
        Some(b'{') => Value::Object(Map::new()),
        Some(b'"') => Value::String(String::new()),
        Some(b't' | b'f') => Value::Bool(true),
        _ => Value::from(0),
    }
}

/// What both dialects call by the same names.
struct Common {
    model: Model,
    shape: Shape,
    thinking: Thinking,
    turns_max: u32,
    level: Option<Level>,
    limits: Limits,
    workspace: [u8; 16],
    credential: Option<BodyCredential>,
    mcp: mcp::Servers,
    wishes: Wishes,
}

fn common(
    fields: &mut Map<String, Value>,
    ignored: &mut Ignored,
    names: &[ListedModel],
) -> Result<Common, ApiError> {
    Ok(Common {
        model: parse_model(take(fields, "model"), names)?,
        shape: match boolean(take(fields, "stream"), "stream")? {
            Some(true) => Shape::Events,
            _ => Shape::Json,
        },
        thinking: parse_thinking(take(fields, "thinking"), ignored)?,
        turns_max: match unsigned(take(fields, "max_turns"), "max_turns")? {
            Some(n) if n > TURNS_MAX => {
                return Err(ApiError::invalid(format!("max_turns: must be at most {TURNS_MAX}.")));
            }
            n => n.unwrap_or(0) as u32,
        },
        level: parse_level(take(fields, "security_level"))?,
        limits: match object(take(fields, "limits"), "limits")? {
            Some(fields) => {
                limits::of_object(&fields).map_err(|what| ApiError::invalid(format!("limits: {what}.")))?
            }
            None => Limits::NONE,
        },
        workspace: parse_workspace(take(fields, "workspace_id"))?,
        credential: parse_credential(take(fields, "oauth_credentials"))?,
        mcp: {
            let permitted = boolean(take(fields, "skip_mcp_permissions"), "skip_mcp_permissions")?;
            mcp::servers(fields, ignored)?.permitted(permitted != Some(false))
        },
        wishes: wishes::wishes(fields)?,
    })
}

/// What each dialect says in words of its own.
struct Words {
    session: Option<Uuid>,
    system: String,
    effort: Effort,
    schema: Option<Map<String, Value>>,
    turns: Vec<Turn>,
    prompt: Vec<Block>,
    usage_last: bool,
}

/// The job; whatever is left of the fields has no effect.
fn job(fields: Map<String, Value>, common: Common, words: Words, mut ignored: Ignored) -> Job {
    let Common { model, shape, thinking, turns_max, level, limits, workspace, credential, mcp, mut wishes } =
        common;
    let Words { session, system, effort, schema, turns: mut earlier, prompt, usage_last } = words;
    wishes.schema = schema.or(wishes.schema);
    if session.is_some() && !earlier.is_empty() {
        // A session remembers its own earlier turns; a second history would contradict it.
        earlier.clear();
        ignored.name("messages.earlier");
    }
    fields.iter().filter(|(_, value)| !value.is_null()).for_each(|(name, _)| ignored.name(name));
    let ignored = ignored.names;
    Job {
        model,
        shape,
        session,
        workspace,
        system,
        earlier,
        prompt,
        thinking,
        effort,
        turns_max,
        level,
        limits,
        credential,
        ignored,
        usage_last,
        mcp,
        wishes,
    }
}

fn parse_tokens_max(
    fields: &mut Map<String, Value>,
    name: &str,
    ignored: &mut Ignored,
) -> Result<(), ApiError> {
    match unsigned(take(fields, name), name)? {
        Some(0) => return Err(ApiError::invalid(format!("{name}: must be at least 1."))),
        Some(_) => ignored.name(name),
        None => {}
    }
    Ok(())
}

#[derive(Default)]
struct Ignored {
    names: Vec<String>,
}

impl Ignored {
    fn name(&mut self, name: &str) {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        let shown = match name.len() <= IGNORED_NAME_BYTES_MAX && !name.is_empty() && name.bytes().all(plain)
        {
            true => name,
            false => "other",
        };
        let shown = if self.names.len() >= IGNORED_MAX { "other" } else { shown };
        if !self.names.iter().any(|n| n == shown) {
            self.names.push(shown.to_string());
        }
    }
}

/// Removes a field; null counts as absent, as the official clients send it for "not given".
fn take(fields: &mut Map<String, Value>, name: &str) -> Option<Value> {
    fields.remove(name).filter(|value| !value.is_null())
}

fn wrong(path: &str, expected: &str, got: &Value) -> ApiError {
    let got = match got {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    ApiError::invalid(format!("{path}: must be {expected}, not {got}."))
}

fn boolean(value: Option<Value>, path: &str) -> Result<Option<bool>, ApiError> {
    match value {
        None => Ok(None),
        Some(Value::Bool(b)) => Ok(Some(b)),
        Some(other) => Err(wrong(path, "a boolean", &other)),
    }
}

fn unsigned(value: Option<Value>, path: &str) -> Result<Option<u64>, ApiError> {
    match value {
        None => Ok(None),
        Some(Value::Number(n)) if n.is_u64() => Ok(n.as_u64()),
        Some(Value::Number(_)) => {
            Err(ApiError::invalid(format!("{path}: must be a whole number, 0 or more.")))
        }
        Some(other) => Err(wrong(path, "a whole number", &other)),
    }
}

fn string(value: Option<Value>, path: &str) -> Result<Option<String>, ApiError> {
    match value {
        None => Ok(None),
        Some(Value::String(s)) => Ok(Some(s)),
        Some(other) => Err(wrong(path, "a string", &other)),
    }
}

fn required_string(value: Option<Value>, path: &str) -> Result<String, ApiError> {
    string(value, path)?.ok_or_else(|| ApiError::invalid(format!("{path}: field required.")))
}

fn object(value: Option<Value>, path: &str) -> Result<Option<Map<String, Value>>, ApiError> {
    match value {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(other) => Err(wrong(path, "an object", &other)),
    }
}

fn parse_model(value: Option<Value>, names: &[ListedModel]) -> Result<Model, ApiError> {
    let name = string(value, "model")?.unwrap_or_else(|| DEFAULT_MODEL.to_string());
    let own = names.iter().find(|own| own.id == name && !own.model.is_empty());
    let name = own.map_or(name.as_str(), |own| &own.model);
    match Model::new(name) {
        Ok(model) if is_model(name) => Ok(model),
        _ => Err(ApiError::new(
            404,
            "model_not_found",
            "model: not known here. Use opus, sonnet, haiku, a full id that begins with claude-, or one of GET /v1/models.",
        )),
    }
}

fn parse_session(value: Option<Value>) -> Result<Option<Uuid>, ApiError> {
    let Some(text) = string(value, "session_id")? else { return Ok(None) };
    session(&text).map(Some).ok_or_else(|| no_session("session_id"))
}

fn parse_workspace(value: Option<Value>) -> Result<[u8; 16], ApiError> {
    let Some(text) = string(value, "workspace_id")? else { return Ok([0; 16]) };
    workspaces::number_of(&text).ok_or_else(|| {
        let message = "workspace_id: must be `default`, or an id of GET /v1/workspaces.";
        ApiError::new(400, "invalid_workspace_id", message)
    })
}

/// A session's id, in the one form that an id has.
fn session(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok().filter(|id| text.len() == 36 && !id.is_nil())
}

fn no_session(place: &str) -> ApiError {
    let message = format!("{place}: must be a UUID such as 6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b.");
    ApiError::new(400, "invalid_session_id", message)
}

fn parse_system(value: Option<Value>) -> Result<String, ApiError> {
    match value {
        None => Ok(String::new()),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(blocks)) => {
            let mut out = String::new();
            for (i, block) in blocks.into_iter().enumerate() {
                append_paragraph(&mut out, &text_block(block, &format!("system[{i}]"))?);
            }
            Ok(out)
        }
        Some(other) => Err(wrong("system", "a string or an array of text blocks", &other)),
    }
}

fn append_paragraph(out: &mut String, text: &str) {
    if !out.is_empty() && !text.is_empty() {
        out.push_str("\n\n");
    }
    out.push_str(text);
}

fn text_block(block: Value, path: &str) -> Result<String, ApiError> {
    let Value::Object(mut block) = block else { return Err(wrong(path, "a text block", &block)) };
    match take(&mut block, "type") {
        Some(Value::String(kind)) if kind == "text" => {}
        _ => return Err(ApiError::invalid(format!("{path}.type: must be \"text\"."))),
    }
    required_string(take(&mut block, "text"), &format!("{path}.text"))
}

fn parse_thinking(value: Option<Value>, ignored: &mut Ignored) -> Result<Thinking, ApiError> {
    let Some(mut fields) = object(value, "thinking")? else { return Ok(Thinking::Hidden) };
    let kind = required_string(take(&mut fields, "type"), "thinking.type")?;
    if unsigned(take(&mut fields, "budget_tokens"), "thinking.budget_tokens")?.is_some() {
        ignored.name("thinking.budget_tokens");
    }
    match kind.as_str() {
        "enabled" | "adaptive" => Ok(Thinking::Shown),
        "disabled" => Ok(Thinking::Hidden),
        _ => Err(ApiError::invalid("thinking.type: must be enabled, adaptive or disabled.")),
    }
}

fn parse_output(value: Option<Value>) -> Result<(Effort, Option<Map<String, Value>>), ApiError> {
    let Some(mut fields) = object(value, "output_config")? else { return Ok((Effort::Unset, None)) };
    let effort = match string(take(&mut fields, "effort"), "output_config.effort")?.as_deref() {
        None => Effort::Unset,
        Some("low") => Effort::Low,
        Some("medium") => Effort::Medium,
        Some("high" | "xhigh" | "max") => Effort::High,
        Some(_) => {
            return Err(ApiError::invalid("output_config.effort: must be low, medium, high, xhigh or max."));
        }
    };
    let schema = wishes::parse_format(take(&mut fields, "format"), "output_config.format")?;
    Ok((effort, schema))
}

fn parse_level(value: Option<Value>) -> Result<Option<Level>, ApiError> {
    let Some(name) = string(value, "security_level")? else { return Ok(None) };
    Level::from_name(&name.to_ascii_lowercase())
        .map(Some)
        .ok_or_else(|| ApiError::invalid("security_level: must be PARANOID, BALANCED or DEVELOPER."))
}

fn parse_credential(value: Option<Value>) -> Result<Option<BodyCredential>, ApiError> {
    let Some(mut fields) = object(value, "oauth_credentials")? else { return Ok(None) };
    // Whatever else the client put there, above all the refresh token, dies here.
    drop(take(&mut fields, "refresh_token").map(|value| match value {
        Value::String(text) => Zeroizing::new(text),
        _ => Zeroizing::new(String::new()),
    }));
    let path = "oauth_credentials.access_token";
    let access_token = Zeroizing::new(required_string(take(&mut fields, "access_token"), path)?);
    // Seconds and milliseconds are both seen in the wild; 10^11 seconds are the year 5138.
    let expires_at_ms = unsigned(take(&mut fields, "expires_at"), "oauth_credentials.expires_at")?
        .map(|n| if n < 100_000_000_000 { n * 1000 } else { n });
    Ok(Some(BodyCredential { access_token, expires_at_ms }))
}

/// The earlier turns and the prompt. Messages of the role `system` join the system prompt: the CLI has no
/// place for them between two turns, and their authority matters more than their position.
fn parse_messages(
    messages: &List<'_>,
    system: &mut String,
    ignored: &mut Ignored,
) -> Result<(Vec<Turn>, Vec<Block>), ApiError> {
    let mut said = Said::default();
    for (path, message) in messages.each() {
        let mut message = message?;
        let role = required_string(take(&mut message, "role"), &format!("{path}.role"))?;
        let content = take(&mut message, "content");
        let role = match role.as_str() {
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "system" => {
                append_paragraph(system, &parse_system(content).map_err(|e| within(&path, "content", e))?);
                continue;
            }
            _ => return Err(ApiError::invalid(format!("{path}.role: must be user, assistant or system."))),
        };
        let blocks = parse_content(content, role, &format!("{path}.content"), ignored)?;
        said.add(role, blocks, &path)?;
    }
    with_prompt(said.turns)
}

/// What was said so far.
#[derive(Default)]
struct Said {
    turns: Vec<Turn>,
    blocks: usize,
}

impl Said {
    /// Adds what somebody said.
    fn add(&mut self, role: Role, blocks: Vec<Block>, path: &str) -> Result<(), ApiError> {
        self.blocks += blocks.iter().map(Block::count).sum::<usize>();
        if self.blocks > BLOCKS_OF_ALL_MAX {
            let message =
                format!("{path}: all messages together may have at most {BLOCKS_OF_ALL_MAX} blocks.");
            return Err(ApiError::new(413, "request_too_large", message));
        }
        match (role, self.turns.last_mut()) {
            (Role::User, _) if blocks.is_empty() => {
                return Err(ApiError::invalid(format!("{path}.content: must not be empty.")));
            }
            // What was left of an earlier answer may be nothing, once its thinking is left out.
            (Role::Assistant, _) if blocks.is_empty() => {}
            // The API joins neighbours of one role, and so must we: the CLI would answer an unanswered turn.
            (role, Some(last)) if last.role == role => last.blocks.extend(blocks),
            (role, _) => self.turns.push(Turn { role, blocks }),
        }
        Ok(())
    }
}

/// The last turn is the prompt.
fn with_prompt(mut turns: Vec<Turn>) -> Result<(Vec<Turn>, Vec<Block>), ApiError> {
    match turns.pop() {
        Some(Turn { role: Role::User, blocks }) => Ok((turns, with_text(blocks))),
        _ => Err(ApiError::invalid("messages: the last message must be the user's.")),
    }
}

fn within(path: &str, field: &str, error: ApiError) -> ApiError {
    let message = error.message.replacen("system", &format!("{path}.{field}"), 1);
    ApiError { message, ..error }
}

/// A prompt of images alone gets a text, for an empty one makes the CLI's conversation unusable.
fn with_text(mut blocks: Vec<Block>) -> Vec<Block> {
    let says = |block: &Block| match block {
        Block::Text(text) => !text.trim().is_empty(),
        Block::ToolResult { .. } => true,
        Block::Image(_) | Block::Document { .. } | Block::ToolUse { .. } => false,
    };
    if !blocks.iter().any(says) {
        blocks.push(Block::Text("(see above)".to_string()));
    }
    blocks
}

fn parse_content(
    content: Option<Value>,
    role: Role,
    path: &str,
    ignored: &mut Ignored,
) -> Result<Vec<Block>, ApiError> {
    match content {
        None => Err(ApiError::invalid(format!("{path}: field required."))),
        Some(Value::String(text)) => {
            Ok(Some(text).filter(|t| !t.trim().is_empty()).map(Block::Text).into_iter().collect())
        }
        Some(Value::Array(blocks)) if blocks.len() > BLOCKS_MAX => {
            Err(ApiError::invalid(format!("{path}: at most {BLOCKS_MAX} blocks are accepted.")))
        }
        Some(Value::Array(blocks)) => {
            let mut out = Vec::with_capacity(blocks.len());
            for (i, block) in blocks.into_iter().enumerate() {
                out.extend(parse_block(block, role, &format!("{path}[{i}]"), ignored)?);
            }
            Ok(out)
        }
        Some(other) => Err(wrong(path, "a string or an array of blocks", &other)),
    }
}

/// One block; `None` for one that is left out: an empty text, or what only the model could read again.
fn parse_block(
    block: Value,
    role: Role,
    path: &str,
    ignored: &mut Ignored,
) -> Result<Option<Block>, ApiError> {
    let Value::Object(mut block) = block else { return Err(wrong(path, "an object", &block)) };
    let kind = required_string(take(&mut block, "type"), &format!("{path}.type"))?;
    match (kind.as_str(), role) {
        ("text", _) => {
            let text = required_string(take(&mut block, "text"), &format!("{path}.text"))?;
            Ok(Some(text).filter(|t| !t.trim().is_empty()).map(Block::Text))
        }
        ("image", Role::User) => parse_image(block, path).map(Some),
        ("document", Role::User) => parse_document(block, path, ignored).map(Some),
        ("search_result", Role::User) => blocks::parse_search_result(block, path, ignored).map(Some),
        ("tool_use", Role::Assistant) => {
            let id = tool_id(take(&mut block, "id"), &format!("{path}.id"))?;
            let name = tool_id(take(&mut block, "name"), &format!("{path}.name"))?;
            let input = object(take(&mut block, "input"), &format!("{path}.input"))?.unwrap_or_default();
            Ok(Some(Block::ToolUse { id, name, input: Input::of(&input) }))
        }
        ("tool_result", Role::User) => parse_tool_result(block, path, ignored).map(Some),
        // A signature holds for the very turn that it was made in, and turns are merged in our answers.
        ("thinking" | "redacted_thinking", Role::Assistant) => {
            ignored.name("messages.thinking");
            Ok(None)
        }
        (_, Role::Assistant) => {
            ignored.name("messages.assistant.other");
            Ok(None)
        }
        (_, Role::User) => Err(ApiError::invalid(format!(
            "{path}.type: not supported here. A user's blocks are text, image, document, search_result and tool_result."
        ))),
    }
}

fn tool_id(value: Option<Value>, path: &str) -> Result<String, ApiError> {
    let id = required_string(value, path)?;
    match (1..=TOOL_ID_BYTES_MAX).contains(&id.len()) {
        true => Ok(id),
        false => Err(ApiError::invalid(format!("{path}: must have 1 to {TOOL_ID_BYTES_MAX} bytes."))),
    }
}

fn parse_image(mut block: Map<String, Value>, path: &str) -> Result<Block, ApiError> {
    let path = format!("{path}.source");
    let mut source = object(take(&mut block, "source"), &path)?
        .ok_or_else(|| ApiError::invalid(format!("{path}: field required.")))?;
    match required_string(take(&mut source, "type"), &format!("{path}.type"))?.as_str() {
        "base64" => parse_media(source, &path, IMAGE_TYPES).map(Block::Image),
        "url" => Err(ApiError::invalid(format!(
            "{path}.type: url images are not fetched here; send the image as base64."
        ))),
        _ => Err(ApiError::invalid(format!("{path}.type: must be base64."))),
    }
}

fn parse_document(
    mut block: Map<String, Value>,
    path: &str,
    ignored: &mut Ignored,
) -> Result<Block, ApiError> {
    if take(&mut block, "citations").is_some_and(|citations| citations["enabled"] != false) {
        ignored.name("messages.citations");
    }
    let title = string(take(&mut block, "title"), &format!("{path}.title"))?;
    let context = string(take(&mut block, "context"), &format!("{path}.context"))?;
    let path = format!("{path}.source");
    let mut source = object(take(&mut block, "source"), &path)?
        .ok_or_else(|| ApiError::invalid(format!("{path}: field required.")))?;
    let source = match required_string(take(&mut source, "type"), &format!("{path}.type"))?.as_str() {
        "base64" => DocumentSource::Base64(parse_media(source, &path, DOCUMENT_TYPES)?),
        "text" => DocumentSource::Text(required_string(take(&mut source, "data"), &format!("{path}.data"))?),
        "content" => blocks::parse_content_source(source, &path)?,
        "url" => {
            return Err(ApiError::invalid(format!(
                "{path}.type: url documents are not fetched here; send the document as base64 or text."
            )));
        }
        _ => return Err(ApiError::invalid(format!("{path}.type: must be base64, text or content."))),
    };
    Ok(Block::Document { source, title, context })
}

fn parse_media(
    mut source: Map<String, Value>,
    path: &str,
    types: &[&'static str],
) -> Result<Media, ApiError> {
    let named = required_string(take(&mut source, "media_type"), &format!("{path}.media_type"))?;
    let Some(&media_type) = types.iter().find(|&&t| t == named) else {
        return Err(ApiError::invalid(format!("{path}.media_type: must be one of {}.", types.join(", "))));
    };
    let data = required_string(take(&mut source, "data"), &format!("{path}.data"))?;
    match is_base64(data.as_bytes()) {
        true => Ok(Media { media_type, data }),
        false => Err(ApiError::invalid(format!("{path}.data: must be base64 without line breaks."))),
    }
}

fn is_base64(data: &[u8]) -> bool {
    let body = data.strip_suffix(b"==").or_else(|| data.strip_suffix(b"=")).unwrap_or(data);
    let letter = |b: &u8| b.is_ascii_alphanumeric() || *b == b'+' || *b == b'/';
    !body.is_empty() && data.len().is_multiple_of(4) && body.iter().all(letter)
}

fn parse_tool_result(
    mut block: Map<String, Value>,
    path: &str,
    ignored: &mut Ignored,
) -> Result<Block, ApiError> {
    let id = tool_id(take(&mut block, "tool_use_id"), &format!("{path}.tool_use_id"))?;
    let is_error = boolean(take(&mut block, "is_error"), &format!("{path}.is_error"))?.unwrap_or(false);
    let path = format!("{path}.content");
    let content = match take(&mut block, "content") {
        None => Vec::new(),
        some => parse_content(some, Role::User, &path, ignored)?,
    };
    let plain = |block: &Block| matches!(block, Block::Text(_) | Block::Image(_) | Block::Document { .. });
    match content.iter().all(plain) {
        true => Ok(Block::ToolResult { id, content, is_error }),
        false => {
            Err(ApiError::invalid(format!("{path}: a tool's result holds text, images and documents only.")))
        }
    }
}

#[cfg(test)]
mod tests;
