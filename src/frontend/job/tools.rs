//! The tools that a client offers: what the model is told of them, and nothing that could be run here.
//! It must never take a name that the CLI could read as one of its own.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::{Block, Ignored, Job, Role, Turn, required_string, string, take, with_text, wrong};
use crate::frontend::error::ApiError;

/// Tools of one request, at most.
pub const TOOLS_MAX: usize = 128;
/// Bytes of a tool's name. With what the CLI puts before it, it stays within what the API takes.
pub const NAME_BYTES_MAX: usize = 64;
/// Bytes of all tools together, as they are told to the model.
pub const TOOLS_BYTES_MAX: usize = 512 * 1024;

/// A tool of the client's.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// `[A-Za-z0-9_-]`, unique in its request.
    pub name: String,
    /// What it does.
    pub description: String,
    /// The JSON schema of its input.
    pub schema: Map<String, Value>,
}

/// Results in a prompt whose run is gone: a new run would find their calls broken off, and say so to the model. Without a
/// session they become part of the history, as their calls are; a session's own history cannot be written to, so there
/// they become words.
pub fn settle(job: &mut Job) {
    let is_result = |block: &Block| matches!(block, Block::ToolResult { .. });
    if !job.prompt.iter().any(is_result) {
        return;
    }
    let prompt = std::mem::take(&mut job.prompt);
    let called = job.earlier.last().is_some_and(|turn| {
        turn.role == Role::Assistant && turn.blocks.iter().any(|block| matches!(block, Block::ToolUse { .. }))
    });
    if called {
        let (results, rest) = prompt.into_iter().partition(is_result);
        job.earlier.push(Turn { role: Role::User, blocks: results });
        job.prompt = if rest.is_empty() { vec![Block::Text("Go on.".to_owned())] } else { with_text(rest) };
        return;
    }
    for block in prompt {
        match block {
            Block::ToolResult { id, content, is_error } => {
                let what = if is_error { "failed" } else { "gave" };
                job.prompt.push(Block::Text(format!("The call {id} {what}:")));
                job.prompt.extend(content);
            }
            other => job.prompt.push(other),
        }
    }
}

/// Takes the tools and the choice among them out of a request's fields. Tools of the API's own kinds cannot be had
/// here, and no call can be promised: both are named.
///
/// # Errors
/// 400 with the path of what is wrong.
pub(super) fn tools(fields: &mut Map<String, Value>, ignored: &mut Ignored) -> Result<Vec<Tool>, ApiError> {
    let tools = listed(take(fields, "tools"), ignored, parse_tool)?;
    let offers = match take(fields, "tool_choice") {
        None => true,
        Some(Value::Object(mut choice)) => {
            match required_string(choice.remove("type"), "tool_choice.type")?.as_str() {
                "auto" => true,
                "none" => false,
                "any" | "tool" => {
                    ignored.name("tool_choice");
                    true
                }
                _ => return Err(ApiError::invalid("tool_choice.type: must be auto, any, tool or none.")),
            }
        }
        Some(other) => return Err(wrong("tool_choice", "an object", &other)),
    };
    Ok(if offers { tools } else { Vec::new() })
}

/// How a dialect writes one tool: its object, its path, and where to name what has no effect. `None` is one that
/// cannot be had here.
pub(super) type Reads = fn(Map<String, Value>, &str, &mut Ignored) -> Result<Option<Tool>, ApiError>;

/// The tools of a list, in either dialect.
///
/// # Errors
/// 400 with the path of what is wrong.
pub(super) fn listed(
    value: Option<Value>,
    ignored: &mut Ignored,
    reads: Reads,
) -> Result<Vec<Tool>, ApiError> {
    let listed = match value {
        None => Vec::new(),
        Some(Value::Array(listed)) if listed.len() <= TOOLS_MAX => listed,
        Some(Value::Array(_)) => {
            return Err(ApiError::invalid(format!("tools: at most {TOOLS_MAX} tools are accepted.")));
        }
        Some(other) => return Err(wrong("tools", "an array", &other)),
    };
    let mut tools = Vec::new();
    let (mut names, mut bytes) = (HashSet::new(), 0);
    for (i, tool) in listed.into_iter().enumerate() {
        let path = format!("tools[{i}]");
        let Value::Object(tool) = tool else { return Err(wrong(&path, "an object", &tool)) };
        let Some(tool) = reads(tool, &path, ignored)? else { continue };
        if !names.insert(tool.name.clone()) {
            return Err(ApiError::invalid(format!("{path}.name: another tool has this name.")));
        }
        let schema = serde_json::to_vec(&tool.schema).map_or(usize::MAX, |schema| schema.len());
        bytes += tool.description.len().saturating_add(schema);
        if bytes > TOOLS_BYTES_MAX {
            return Err(ApiError::invalid(format!("tools: must have at most {TOOLS_BYTES_MAX} bytes.")));
        }
        tools.push(tool);
    }
    Ok(tools)
}

/// A tool's name, which becomes a part of a name of the CLI's.
pub(super) fn name_of(value: Option<Value>, path: &str) -> Result<String, ApiError> {
    let name = required_string(value, path)?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    match (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(plain) {
        true => Ok(name),
        false => {
            let message = format!("{path}: must have 1 to {NAME_BYTES_MAX} of A-Z, a-z, 0-9, _ and -.");
            Err(ApiError::invalid(message))
        }
    }
}

/// One tool; `None` for one of the API's own kinds.
fn parse_tool(
    mut tool: Map<String, Value>,
    path: &str,
    ignored: &mut Ignored,
) -> Result<Option<Tool>, ApiError> {
    if string(take(&mut tool, "type"), &format!("{path}.type"))?.is_some_and(|kind| kind != "custom") {
        ignored.name("tools");
        return Ok(None);
    }
    let name = name_of(take(&mut tool, "name"), &format!("{path}.name"))?;
    let description = string(take(&mut tool, "description"), &format!("{path}.description"))?;
    let schema = match take(&mut tool, "input_schema") {
        Some(Value::Object(schema)) => schema,
        Some(other) => return Err(wrong(&format!("{path}.input_schema"), "an object", &other)),
        None => return Err(ApiError::invalid(format!("{path}.input_schema: field required."))),
    };
    Ok(Some(Tool { name, description: description.unwrap_or_default(), schema }))
}
