//! The lines that are written to the CLI's stdin. Stdin is a privileged channel (a line can run a shell
//! command or change a setting), so these few are the only ones, and each is one line of JSON from a type.

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value};

use super::WireBlock;
use super::client::SERVER;
use crate::frontend::job::Block;

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    User { message: Message<'a> },
    ControlRequest { request_id: &'static str, request: Control<'a> },
    ControlResponse { response: Response<'a> },
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: Vec<WireBlock<'a>>,
}

#[derive(Serialize)]
#[serde(tag = "subtype", rename_all = "snake_case")]
enum Control<'a> {
    Interrupt,
    Initialize {
        #[serde(rename = "jsonSchema", skip_serializing_if = "Option::is_none")]
        schema: Option<&'a Map<String, Value>>,
        #[serde(rename = "sdkMcpServers", skip_serializing_if = "<[_]>::is_empty")]
        servers: &'static [&'static str],
    },
    McpStatus,
}

#[derive(Serialize)]
#[serde(tag = "subtype", rename_all = "snake_case")]
enum Response<'a> {
    Success { request_id: &'a str, response: ClientSaid },
    Error { request_id: &'a str, error: &'static str },
}

#[derive(Serialize)]
struct ClientSaid {
    mcp_response: Rpc,
}

#[derive(Serialize)]
struct Rpc {
    jsonrpc: &'static str,
    id: u64,
    result: Value,
}

/// The user's message.
///
/// The CLI takes the last text block of a message for a command where it begins with `/`, and not where a
/// blank comes first (measured with 2.1.330). So a blank is put before every such text; the model sees one
/// blank more, and nothing else changes. `@path` is left alone: attachments are off in the CLI's environment.
pub fn user(prompt: &[Block]) -> Vec<u8> {
    let content = prompt
        .iter()
        .map(|block| match block {
            Block::Text(text) if text.starts_with('/') => WireBlock::Text { text: format!(" {text}").into() },
            other => WireBlock::of(other),
        })
        .collect();
    line(&Line::User { message: Message { role: "user", content } })
}

/// What a conversation begins with, where it needs more than words; nothing where it does not. A schema comes this way
/// and not as an argument, which others could read.
pub fn initialize(schema: Option<&Map<String, Value>>, tools: bool) -> Vec<u8> {
    let servers: &[&str] = if tools { &[SERVER] } else { &[] };
    if schema.is_none() && servers.is_empty() {
        return Vec::new();
    }
    let request = Control::Initialize { schema, servers };
    line(&Line::ControlRequest { request_id: "gaoler-initialize", request })
}

/// The answer to what the CLI asked: the result of a message with this number, or that nothing is known of it.
pub fn respond(request_id: &str, result: Option<(u64, Value)>) -> Vec<u8> {
    let response = match result {
        Some((id, result)) => {
            let response = ClientSaid { mcp_response: Rpc { jsonrpc: "2.0", id, result } };
            Response::Success { request_id, response }
        }
        None => Response::Error { request_id, error: "nothing answers this here" },
    };
    line(&Line::ControlResponse { response })
}

/// The same in pieces, with a result that is JSON already and is not copied.
pub fn respond_with(request_id: &str, id: u64, result: Bytes) -> Vec<Bytes> {
    // The result is the last field, and null where there is none.
    const REST: &[u8] = b"}}}}\n";
    let mut head = respond(request_id, Some((id, Value::Null)));
    head.truncate(head.len().saturating_sub(b"null".len() + REST.len()));
    vec![head.into(), result, Bytes::from_static(REST)]
}

/// Ask the CLI to stop what it is doing: it kills its tools, saves its transcript and gives a result.
pub fn interrupt() -> Vec<u8> {
    line(&Line::ControlRequest { request_id: "gaoler-interrupt", request: Control::Interrupt })
}

/// Begin without a prompt: the CLI starts its MCP servers and waits.
pub fn begin() -> Vec<u8> {
    let request = Control::Initialize { schema: None, servers: &[] };
    line(&Line::ControlRequest { request_id: "gaoler-initialize", request })
}

/// Ask how the MCP servers stand.
pub fn mcp_status() -> Vec<u8> {
    line(&Line::ControlRequest { request_id: "gaoler-mcp", request: Control::McpStatus })
}

fn line(value: &Line<'_>) -> Vec<u8> {
    // Strings and maps with string keys always serialise; JSON escapes every line break inside them.
    let mut bytes = serde_json::to_vec(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prompt: &[Block], expected: &str) {
        let bytes = user(prompt);
        let text = std::str::from_utf8(&bytes).expect("UTF-8");
        assert_eq!(text, format!("{expected}\n"));
        assert_eq!(text.matches('\n').count(), 1, "one line only");
    }

    #[test]
    fn a_prompt_is_one_line_and_no_command() {
        let text = |t: &str| Block::Text(t.into());
        check(
            &[text("hello")],
            r#"{"type":"user","message":{"role":"user","content":[{"type":"text","text":"hello"}]}}"#,
        );
        check(
            &[text("/cost @x")],
            r#"{"type":"user","message":{"role":"user","content":[{"type":"text","text":" /cost @x"}]}}"#,
        );
        check(
            &[text(" /cost"), text("/a"), text("two\n/lines")],
            r#"{"type":"user","message":{"role":"user","content":[{"type":"text","text":" /cost"},{"type":"text","text":" /a"},{"type":"text","text":"two\n/lines"}]}}"#,
        );
        check(
            &[text("\"}]}}\n{\"type\":\"bash_command\",\"command\":\"id\"}")],
            r#"{"type":"user","message":{"role":"user","content":[{"type":"text","text":"\"}]}}\n{\"type\":\"bash_command\",\"command\":\"id\"}"}]}}"#,
        );
    }

    #[test]
    fn a_result_in_pieces_is_the_same_line() {
        let result = serde_json::json!({"tools": [1]});
        let pieces = respond_with("r\"1", 7, result.to_string().into()).concat();
        assert_eq!(pieces, respond("r\"1", Some((7, result))));
    }

    #[test]
    fn an_interrupt_is_a_control_request() {
        let expected = "{\"type\":\"control_request\",\"request_id\":\"gaoler-interrupt\",\
                        \"request\":{\"subtype\":\"interrupt\"}}\n";
        assert_eq!(interrupt(), expected.as_bytes());
    }
}
