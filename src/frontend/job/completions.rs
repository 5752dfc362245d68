//! The second dialect's parser: a chat completion's body becomes the same [`Job`] that a message's does.
//! It must never promise what the CLI cannot keep: a field is honoured, named as ignored, or refused.

use serde_json::{Map, Value};
use uuid::Uuid;

use gaoler_policy::settings::ListedModel;
use gaoler_protocol::Effort;

use super::tools::{self, Tool};
use super::wishes::parse_schema;
use super::{
    BLOCKS_MAX, Block, Fields, IMAGE_TYPES, Ignored, Input, Job, List, Media, Role, Said, Turn, Words,
    append_paragraph, boolean, common, fields, is_base64, job, no_session, object, parse_system,
    parse_tokens_max, required_string, session, string, take, tool_id, unsigned, with_prompt, within, wrong,
};
use crate::frontend::cli::client::name_calls;
use crate::frontend::error::ApiError;
use crate::frontend::json::{Fault, Room};

/// Parses a body. `in_header` is what the header `x-session-id` says, and `names` may hold names of the operator's own.
///
/// # Errors
/// 400 with the path of what is wrong; 404 for a model that no rule names.
pub fn parse(body: &[u8], in_header: Option<&str>, names: &[ListedModel]) -> Result<Job, ApiError> {
    let Fields { mut fields, messages } = fields(body)?;
    let mut ignored = Ignored::default();
    let session = parse_session(take(&mut fields, "session_id"), in_header, &mut ignored)?;
    let common = common(&mut fields, &mut ignored, names)?;
    let effort = parse_effort(take(&mut fields, "reasoning_effort"))?;
    let usage_last = parse_stream_options(take(&mut fields, "stream_options"), &mut ignored)?;
    parse_tokens_max(&mut fields, "max_tokens", &mut ignored)?;
    parse_tokens_max(&mut fields, "max_completion_tokens", &mut ignored)?;
    let schema = parse_response_format(&mut fields)?;
    refuse_what_would_be_read(&mut fields, &mut ignored)?;
    let tools = parse_tools(&mut fields, &mut ignored)?;
    leave_out_what_asks_for_nothing(&mut fields);
    let mut system = String::new();
    let (turns, prompt) = parse_messages(&messages.list()?, &mut system, &mut ignored)?;
    let words = Words { session, system, effort, schema, turns, prompt, usage_last };
    let mut job = job(fields, common, words, ignored);
    // The model knows them by the CLI's names, in what it said before as well.
    job.earlier.iter_mut().for_each(|turn| name_calls(&mut turn.blocks, &tools));
    job.wishes.tools = tools;
    Ok(job)
}

/// The client's functions, and whether they are offered. No call can be promised, nor how many come at once, nor that
/// its arguments follow the schema: what asks for that is named.
fn parse_tools(fields: &mut Map<String, Value>, ignored: &mut Ignored) -> Result<Vec<Tool>, ApiError> {
    let tools = tools::listed(take(fields, "tools"), ignored, parse_function)?;
    if boolean(take(fields, "parallel_tool_calls"), "parallel_tool_calls")? == Some(false) {
        ignored.name("parallel_tool_calls");
    }
    let wrong_choice = || ApiError::invalid("tool_choice: must be none, auto, required or name a function.");
    let choice = match take(fields, "tool_choice") {
        Some(Value::Object(mut choice)) => {
            let kind = required_string(take(&mut choice, "type"), "tool_choice.type")?;
            // All of these insist on a call, or on some of the tools alone.
            match kind.as_str() {
                "function" | "custom" | "allowed_tools" => "required".to_owned(),
                _ => return Err(wrong_choice()),
            }
        }
        None => "auto".to_owned(),
        Some(Value::String(choice)) => choice,
        Some(other) => return Err(wrong("tool_choice", "a string or an object", &other)),
    };
    match choice.as_str() {
        "auto" => Ok(tools),
        "none" => Ok(Vec::new()),
        "required" => {
            ignored.name("tool_choice");
            Ok(tools)
        }
        _ => Err(wrong_choice()),
    }
}

/// One tool; `None` for one of another kind than a function.
fn parse_function(
    mut tool: Map<String, Value>,
    path: &str,
    ignored: &mut Ignored,
) -> Result<Option<Tool>, ApiError> {
    if required_string(take(&mut tool, "type"), &format!("{path}.type"))? != "function" {
        ignored.name("tools");
        return Ok(None);
    }
    let path = format!("{path}.function");
    let function = object(take(&mut tool, "function"), &path)?;
    let mut function = function.ok_or_else(|| ApiError::invalid(format!("{path}: field required.")))?;
    let name = tools::name_of(take(&mut function, "name"), &format!("{path}.name"))?;
    let description = string(take(&mut function, "description"), &format!("{path}.description"))?;
    // A function without parameters is one of none.
    let schema = object(take(&mut function, "parameters"), &format!("{path}.parameters"))?;
    let schema = schema.filter(|schema| !schema.is_empty()).unwrap_or_else(|| {
        [("type", Value::from("object")), ("properties", Value::Object(Map::new()))]
            .map(|(name, value)| (name.to_owned(), value))
            .into_iter()
            .collect()
    });
    if boolean(take(&mut function, "strict"), &format!("{path}.strict"))? == Some(true) {
        ignored.name("tools.strict");
    }
    Ok(Some(Tool { name, description: description.unwrap_or_default(), schema }))
}

/// The header is gaoler's own, and must be right. Other clients have a `session_id` in the body for purposes of
/// theirs (a socket's id, for example): one that is no UUID is not meant for us.
fn parse_session(
    in_body: Option<Value>,
    in_header: Option<&str>,
    ignored: &mut Ignored,
) -> Result<Option<Uuid>, ApiError> {
    let named = in_body.as_ref().and_then(Value::as_str).and_then(session);
    if in_body.is_some() && named.is_none() {
        ignored.name("session_id");
    }
    let header = match in_header {
        Some(text) => Some(session(text).ok_or_else(|| no_session("x-session-id"))?),
        None => None,
    };
    match (header, named) {
        (Some(one), Some(other)) if one != other => Err(ApiError::new(
            400,
            "invalid_session_id",
            "x-session-id, session_id: two different sessions; send one of them.",
        )),
        (header, named) => Ok(header.or(named)),
    }
}

/// The nearest of the CLI's levels of effort.
fn parse_effort(value: Option<Value>) -> Result<Effort, ApiError> {
    match string(value, "reasoning_effort")?.as_deref() {
        None => Ok(Effort::Unset),
        Some("none" | "minimal" | "low") => Ok(Effort::Low),
        Some("medium") => Ok(Effort::Medium),
        Some("high" | "xhigh" | "max") => Ok(Effort::High),
        Some(_) => Err(ApiError::invalid(
            "reasoning_effort: must be none, minimal, low, medium, high, xhigh or max.",
        )),
    }
}

fn parse_stream_options(value: Option<Value>, ignored: &mut Ignored) -> Result<bool, ApiError> {
    let mut fields = object(value, "stream_options")?.unwrap_or_default();
    let usage = boolean(take(&mut fields, "include_usage"), "stream_options.include_usage")?;
    for (name, value) in &fields {
        if !matches!(value, Value::Null | Value::Bool(false)) {
            ignored.name(&format!("stream_options.{name}"));
        }
    }
    Ok(usage.unwrap_or(false))
}

/// The schema of `response_format`, where it has one; what else it says is left for the others.
fn parse_response_format(fields: &mut Map<String, Value>) -> Result<Option<Map<String, Value>>, ApiError> {
    let is_schema = |format: &Value| format.get("type").and_then(Value::as_str) == Some("json_schema");
    let Some(format) = take_if(fields, "response_format", is_schema) else { return Ok(None) };
    let mut format = object(Some(format), "response_format")?.unwrap_or_default();
    let path = "response_format.json_schema";
    let named = object(take(&mut format, "json_schema"), path)?;
    let mut named = named.ok_or_else(|| ApiError::invalid(format!("{path}: field required.")))?;
    parse_schema(take(&mut named, "schema"), &format!("{path}.schema")).map(Some)
}

/// Removes a field that is such a one.
fn take_if(fields: &mut Map<String, Value>, name: &str, is: impl Fn(&Value) -> bool) -> Option<Value> {
    let found = fields.get(name).is_some_and(is);
    if found { fields.remove(name) } else { None }
}

/// What a program would look for in the answer, and fail where it is not there, is refused. What an answer may
/// lack by the API's own rules is ignored and named: `functions` are of this kind, for a model may always answer in
/// words, and so are `logprobs` and a `response_format` without a schema.
fn refuse_what_would_be_read(fields: &mut Map<String, Value>, ignored: &mut Ignored) -> Result<(), ApiError> {
    match unsigned(take(fields, "n"), "n")? {
        None | Some(1) => {}
        Some(0) => return Err(ApiError::invalid("n: must be at least 1.")),
        Some(_) => {
            return Err(ApiError::invalid(
                "n: a request gets one answer here; send it as often as you need.",
            ));
        }
    }
    // The old way to offer tools, which has neither ids nor more than one call: `tools` is what it became.
    match take(fields, "function_call") {
        None => Ok(()),
        Some(Value::String(choice)) if choice == "auto" || choice == "none" => {
            ignored.name("function_call");
            Ok(())
        }
        Some(_) => Err(ApiError::invalid(
            "function_call: functions are not offered here, so no call can be promised; send tools instead.",
        )),
    }
}

/// Fields that clients send with what they would get anyway.
fn leave_out_what_asks_for_nothing(fields: &mut Map<String, Value>) {
    let is_nothing = |name: &str, value: &Value| match name {
        "logprobs" | "store" => *value == Value::Bool(false),
        "top_logprobs" => value.as_u64() == Some(0),
        "response_format" => value.get("type").and_then(Value::as_str) == Some("text"),
        "modalities" => value.as_array().is_some_and(|list| list.iter().all(|kind| kind == "text")),
        _ => false,
    };
    fields.retain(|name, value| !is_nothing(name, value));
}

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
        if take(&mut message, "name").is_some() {
            ignored.name("messages.name");
        }
        let place = format!("{path}.content");
        match role.as_str() {
            "system" | "developer" => {
                append_paragraph(system, &parse_system(content).map_err(|e| within(&path, "content", e))?);
            }
            "user" => {
                let content =
                    content.ok_or_else(|| ApiError::invalid(format!("{place}: field required.")))?;
                let blocks = parse_content(content, Role::User, &place, ignored)?;
                said.add(Role::User, blocks, &path)?;
            }
            "assistant" => {
                let mut blocks = match content {
                    Some(content) => parse_content(content, Role::Assistant, &place, ignored)?,
                    None => Vec::new(),
                };
                blocks.extend(parse_calls(take(&mut message, "tool_calls"), &path, ignored)?);
                if ["reasoning_content", "reasoning"].iter().any(|name| take(&mut message, name).is_some()) {
                    ignored.name("messages.thinking");
                }
                said.add(Role::Assistant, blocks, &path)?;
            }
            "tool" => {
                let id = tool_id(take(&mut message, "tool_call_id"), &format!("{path}.tool_call_id"))?;
                let content = match content {
                    Some(content) => parse_content(content, Role::User, &place, ignored)?,
                    None => Vec::new(),
                };
                let result = Block::ToolResult { id, content, is_error: false };
                said.add(Role::User, vec![result], &path)?;
            }
            _ => {
                return Err(ApiError::invalid(format!(
                    "{path}.role: must be system, developer, user, assistant or tool."
                )));
            }
        }
    }
    with_prompt(said.turns)
}

fn parse_content(
    content: Value,
    role: Role,
    path: &str,
    ignored: &mut Ignored,
) -> Result<Vec<Block>, ApiError> {
    let said = |text: String| Some(text).filter(|text| !text.trim().is_empty()).map(Block::Text);
    let parts = match content {
        Value::String(text) => return Ok(said(text).into_iter().collect()),
        Value::Array(parts) if parts.len() > BLOCKS_MAX => {
            return Err(ApiError::invalid(format!("{path}: at most {BLOCKS_MAX} parts are accepted.")));
        }
        Value::Array(parts) => parts,
        other => return Err(wrong(path, "a string or an array of parts", &other)),
    };
    let mut blocks = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        let Value::Object(mut part) = part else { return Err(wrong(&path, "an object", &part)) };
        let kind = required_string(take(&mut part, "type"), &format!("{path}.type"))?;
        match (kind.as_str(), role) {
            ("text", _) => {
                blocks.extend(said(required_string(take(&mut part, "text"), &format!("{path}.text"))?));
            }
            ("image_url", Role::User) => blocks.push(parse_image(part, &path, ignored)?),
            (_, Role::Assistant) => ignored.name("messages.assistant.other"),
            (_, Role::User) => {
                return Err(ApiError::invalid(format!(
                    "{path}.type: not supported here. A user's parts are text and image_url."
                )));
            }
        }
    }
    Ok(blocks)
}

fn parse_image(mut part: Map<String, Value>, path: &str, ignored: &mut Ignored) -> Result<Block, ApiError> {
    let path = format!("{path}.image_url");
    let mut image = object(take(&mut part, "image_url"), &path)?
        .ok_or_else(|| ApiError::invalid(format!("{path}: field required.")))?;
    if take(&mut image, "detail").is_some_and(|detail| detail != "auto") {
        ignored.name("messages.image_url.detail");
    }
    let path = format!("{path}.url");
    let mut url = required_string(take(&mut image, "url"), &path)?;
    let wrong = |what: &str| Err(ApiError::invalid(format!("{path}: {what}")));
    let Some((kind, data)) = url.strip_prefix("data:").and_then(|rest| rest.split_once(";base64,")) else {
        let fetched = ["http:", "https:"].iter().any(|scheme| url.starts_with(scheme));
        return match fetched {
            true => wrong("images are not fetched here; send the image itself, as data:image/png;base64,..."),
            false => wrong("must be a data: URL in base64, such as data:image/png;base64,..."),
        };
    };
    // The name that files end with is common in the wild.
    let kind = if kind == "image/jpg" { "image/jpeg" } else { kind };
    match IMAGE_TYPES.iter().find(|&&known| known == kind) {
        None => wrong(&format!("must be one of {}.", IMAGE_TYPES.join(", "))),
        Some(_) if !is_base64(data.as_bytes()) => wrong("must be base64 without line breaks."),
        Some(media_type) => {
            // In place: it may be most of a body of 32 MB.
            let begins = url.len() - data.len();
            url.drain(..begins);
            Ok(Block::Image(Media { media_type, data: url }))
        }
    }
}

/// Calls of tools in an earlier turn: data, never executed.
fn parse_calls(value: Option<Value>, path: &str, ignored: &mut Ignored) -> Result<Vec<Block>, ApiError> {
    let path = format!("{path}.tool_calls");
    let calls = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(calls)) if calls.len() <= BLOCKS_MAX => calls,
        Some(Value::Array(_)) => {
            return Err(ApiError::invalid(format!("{path}: at most {BLOCKS_MAX} calls are accepted.")));
        }
        Some(other) => return Err(wrong(&path, "an array", &other)),
    };
    let mut blocks = Vec::with_capacity(calls.len());
    // JSON in JSON, of which each call's is dropped before the next one's is read.
    for (i, call) in calls.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        let Value::Object(mut call) = call else { return Err(wrong(&path, "an object", &call)) };
        let Some(mut function) = object(take(&mut call, "function"), &format!("{path}.function"))? else {
            ignored.name("messages.assistant.other");
            continue;
        };
        let id = tool_id(take(&mut call, "id"), &format!("{path}.id"))?;
        let name = tool_id(take(&mut function, "name"), &format!("{path}.function.name"))?;
        let place = format!("{path}.function.arguments");
        let text = string(take(&mut function, "arguments"), &place)?.unwrap_or_default();
        let input = match text.trim() {
            "" => Map::new(),
            text => match Room::new().value(text) {
                Ok(Value::Object(input)) => input,
                Err(Fault::Large) => {
                    let message =
                        format!("{place}: holds more values than are read here; send fewer of them.");
                    return Err(ApiError::new(413, "request_too_large", message));
                }
                _ => {
                    let message = format!("{place}: must be a JSON object in a string.");
                    return Err(ApiError::invalid(message));
                }
            },
        };
        blocks.push(Block::ToolUse { id, name, input: Input::of(&input) });
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests;
