//! A client's tools as an MCP server that is no process: the CLI asks for it on its stdout, and is answered on its
//! stdin. Without I/O. It must never run anything, nor answer a call that nobody was shown.

use std::collections::HashMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::decode::{BLOCKS_MAX, Bound, Garbage};
use super::input;
use crate::frontend::job::tools::{TOOLS_BYTES_MAX, Tool};
use crate::frontend::job::{Block, DocumentSource};

/// The server's name: the CLI calls its tools `mcp__client__NAME`.
pub const SERVER: &str = "client";
/// What it puts before a tool's name.
pub const PREFIX: &str = "mcp__client__";
/// Calls that wait at the same time, at most: as many as a client can have been shown.
const WAITING_MAX: usize = BLOCKS_MAX;
/// Of an id, a version or a method that the CLI names.
const WORD: Bound = Bound { what: "bytes of a word of a request of the CLI's", most: 128 };
/// Of what one run's CLI is answered beside results. It asks for the tools once for each of its starts, and this is all
/// tools that there can be, 64 times: a line of 150 bytes must not become half a MiB without an end.
const ANSWERED: Bound =
    Bound { what: "bytes of answers to what the CLI asked for", most: 64 * TOOLS_BYTES_MAX };

/// What the CLI asks of us.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    id: String,
    /// A message to our server; `None` for what we know nothing of.
    message: Option<Message>,
}

#[derive(Debug, Clone, PartialEq)]
struct Message {
    method: String,
    id: Option<u64>,
    version: String,
    tool_use_id: String,
}

impl Asked {
    /// What a control request asks; `None` for what is no request.
    ///
    /// # Errors
    /// [`Garbage::Over`].
    pub fn parse(id: String, request: &RawValue) -> Result<Option<Asked>, Garbage> {
        #[derive(Deserialize)]
        struct Request {
            #[serde(default)]
            subtype: String,
            #[serde(default)]
            server_name: String,
            #[serde(default)]
            message: Option<Rpc>,
        }
        #[derive(Deserialize)]
        struct Rpc {
            #[serde(default)]
            method: String,
            #[serde(default)]
            id: Option<u64>,
            #[serde(default)]
            params: Params,
        }
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Params {
            #[serde(rename = "protocolVersion")]
            version: String,
            #[serde(rename = "_meta")]
            meta: Meta,
        }
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Meta {
            #[serde(rename = "claudecode/toolUseId")]
            tool_use_id: String,
        }
        WORD.holds(id.len())?;
        let Ok(request) = serde_json::from_str::<Request>(request.get()) else { return Ok(None) };
        let ours = request.subtype == "mcp_message" && request.server_name == SERVER;
        let message = request.message.filter(|_| ours).map(|rpc| Message {
            method: rpc.method,
            id: rpc.id,
            version: rpc.params.version,
            tool_use_id: rpc.params.meta.tool_use_id,
        });
        for word in message.iter().flat_map(|it| [&it.method, &it.version, &it.tool_use_id]) {
            WORD.holds(word.len())?;
        }
        Ok(Some(Asked { id, message }))
    }
}

/// The server.
#[derive(Debug, Default)]
pub struct Client {
    /// Its tools, as the CLI is told of them; `None` where there are none.
    listed: Option<Bytes>,
    /// Calls that wait for their result, by the call's id: how the CLI wants it answered.
    waiting: HashMap<String, (String, u64)>,
    /// Results whose call has not come yet: the CLI makes some of its calls one after the other.
    results: HashMap<String, Bytes>,
    /// Bytes that were answered beside results.
    answered: usize,
}

impl Client {
    /// A server of these tools.
    pub fn new(tools: &[Tool]) -> Client {
        let listed = json!({"tools": tools.iter().map(described).collect::<Vec<_>>()});
        // Written once, however often it is asked for.
        let listed = (!tools.is_empty()).then(|| listed.to_string().into());
        Client { listed, ..Client::default() }
    }

    /// The pieces of the line that answers, if there is one yet. `is_shown`: the client has been shown a call of this id.
    ///
    /// # Errors
    /// [`Garbage::Over`]: it was answered enough.
    pub fn answer(
        &mut self,
        asked: Asked,
        is_shown: impl FnOnce(&str) -> bool,
    ) -> Result<Option<Vec<Bytes>>, Garbage> {
        let Some((message, listed)) = asked.message.zip(self.listed.clone()) else {
            return self.answered(vec![input::respond(&asked.id, None).into()]);
        };
        let id = message.id.unwrap_or(0);
        let result = match message.method.as_str() {
            "initialize" => json!({
                "protocolVersion": message.version,
                "capabilities": {"tools": {}},
                "serverInfo": {"name": SERVER, "version": env!("CARGO_PKG_VERSION")},
            }),
            "tools/list" => return self.answered(input::respond_with(&asked.id, id, listed)),
            "tools/call" => match self.results.remove(&message.tool_use_id) {
                Some(result) => return Ok(Some(input::respond_with(&asked.id, id, result))),
                None if is_shown(&message.tool_use_id) && self.waiting.len() < WAITING_MAX => {
                    self.waiting.insert(message.tool_use_id, (asked.id, id));
                    return Ok(None);
                }
                // A call of an agent below the agent: nobody sees it who could answer.
                None => failure("Only the main agent can call this tool."),
            },
            _ => json!({}),
        };
        self.answered(vec![input::respond(&asked.id, Some((id, result))).into()])
    }

    fn answered(&mut self, pieces: Vec<Bytes>) -> Result<Option<Vec<Bytes>>, Garbage> {
        self.answered += pieces.iter().map(Bytes::len).sum::<usize>();
        ANSWERED.holds(self.answered)?;
        Ok(Some(pieces))
    }

    /// Bytes of results that it keeps.
    pub fn bytes(&self) -> usize {
        self.results.values().map(Bytes::len).sum()
    }

    /// Takes what the client says of its calls: the lines for those that wait already, together. A call of these that is
    /// not among the results has failed.
    pub fn results(&mut self, calls: &[String], prompt: &[Block]) -> Vec<u8> {
        let mut results = given(prompt);
        let mut lines = Vec::new();
        for call in calls {
            let none = || failure("The client gave no result for this call.");
            let result = results.remove(call).unwrap_or_else(none);
            match self.waiting.remove(call) {
                Some((asked, id)) => lines.extend(input::respond(&asked, Some((id, result)))),
                None => drop(self.results.insert(call.clone(), result.to_string().into())),
            }
        }
        lines
    }
}

fn described(tool: &Tool) -> Value {
    json!({
        "name": tool.name,
        "description": tool.description,
        "inputSchema": tool.schema,
        // Calls of one turn come at once, and the tool is in the model's sight without a search for it.
        "annotations": {"readOnlyHint": true},
        "_meta": {"anthropic/alwaysLoad": true},
    })
}

fn failure(text: &str) -> Value {
    json!({"content": [{"type": "text", "text": text}], "isError": true})
}

/// The results in what a user says, by their call. What else the user says goes with the last of them.
fn given(prompt: &[Block]) -> HashMap<String, Value> {
    let mut rest: Vec<Value> = Vec::new();
    let mut found: Vec<(String, Vec<Value>, bool)> = Vec::new();
    for block in prompt {
        match block {
            Block::ToolResult { id, content, is_error } => {
                found.push((id.clone(), content.iter().filter_map(content_of).collect(), *is_error));
            }
            other => rest.extend(content_of(other)),
        }
    }
    if let Some((_, content, _)) = found.last_mut() {
        content.extend(rest);
    }
    let result = |content: Vec<Value>, is_error: bool| json!({"content": content, "isError": is_error});
    found.into_iter().map(|(id, content, is_error)| (id, result(content, is_error))).collect()
}

/// A block as MCP has it.
fn content_of(block: &Block) -> Option<Value> {
    #[derive(Serialize)]
    struct Resource<'a> {
        uri: &'static str,
        #[serde(rename = "mimeType")]
        kind: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        text: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        blob: Option<&'a str>,
    }
    let uri = "client:document";
    Some(match block {
        Block::Text(text) => json!({"type": "text", "text": text}),
        Block::Image(media) => json!({"type": "image", "data": media.data, "mimeType": media.media_type}),
        Block::Document { source, .. } => {
            let resource = match source {
                DocumentSource::Text(text) => {
                    Resource { uri, kind: "text/plain", text: Some(text), blob: None }
                }
                DocumentSource::Base64(media) => {
                    Resource { uri, kind: media.media_type, text: None, blob: Some(&media.data) }
                }
            };
            json!({"type": "resource", "resource": resource})
        }
        Block::ToolUse { .. } | Block::ToolResult { .. } => return None,
    })
}

/// Calls of a client's tools in earlier turns, under the names that the CLI knows.
pub fn name_calls(blocks: &mut [Block], tools: &[Tool]) {
    for block in blocks {
        if let Block::ToolUse { name, .. } = block
            && tools.iter().any(|tool| tool.name == *name)
        {
            *name = format!("{PREFIX}{name}");
        }
    }
}

/// The input of a call, out of the pieces that it came in: as it is, where they make an object.
pub fn input_of(text: &str) -> Option<&RawValue> {
    serde_json::from_str::<&RawValue>(text).ok().filter(|raw| raw.get().starts_with('{'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(id: &str, message: Value) -> Asked {
        let request = json!({"subtype": "mcp_message", "server_name": SERVER, "message": message});
        let raw = RawValue::from_string(request.to_string()).expect("JSON");
        Asked::parse(id.into(), &raw).expect("within its bounds").expect("a request")
    }

    fn call(id: &str, number: u64, tool_use: &str) -> Asked {
        let params = json!({"name": "x", "arguments": {}, "_meta": {"claudecode/toolUseId": tool_use}});
        asked(id, json!({"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}))
    }

    fn client() -> Client {
        let tool = Tool { name: "weather".into(), description: "d".into(), schema: serde_json::Map::new() };
        Client::new(&[tool])
    }

    fn read(line: Result<Option<Vec<Bytes>>, Garbage>) -> Value {
        let line = line.expect("within its bounds").expect("a line").concat();
        assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
        serde_json::from_slice(&line).expect("JSON")
    }

    #[test]
    fn a_call_waits_for_its_result_and_a_result_for_its_call() {
        let mut client = client();
        let list = asked("r0", json!({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}));
        let line = read(client.answer(list, |_| false));
        let tools = &line["response"]["response"]["mcp_response"]["result"]["tools"];
        assert_eq!((&tools[0]["name"], &line["response"]["request_id"]), (&json!("weather"), &json!("r0")));
        assert_eq!(client.answer(call("r1", 2, "toolu_1"), |id| id == "toolu_1"), Ok(None));
        // One that nobody was shown is answered at once.
        let line = read(client.answer(call("r2", 3, "toolu_9"), |id| id == "toolu_1"));
        assert_eq!(line["response"]["response"]["mcp_response"]["result"]["isError"], true);
        let result = |id: &str, text: &str| Block::ToolResult {
            id: id.into(),
            content: vec![Block::Text(text.into())],
            is_error: false,
        };
        let prompt = [result("toolu_1", "one"), result("toolu_2", "two"), Block::Text("and more".into())];
        let calls = ["toolu_1", "toolu_2", "toolu_3"].map(String::from);
        let lines = client.results(&calls, &prompt);
        // The others have not been called yet.
        let line = read(Ok(Some(vec![lines.into()])));
        let answer = &line["response"]["response"]["mcp_response"];
        assert_eq!((&answer["id"], &answer["result"]["content"][0]["text"]), (&json!(2), &json!("one")));
        let line = read(client.answer(call("r3", 4, "toolu_2"), |_| true));
        let content = &line["response"]["response"]["mcp_response"]["result"]["content"];
        assert_eq!((&content[0]["text"], &content[1]["text"]), (&json!("two"), &json!("and more")));
        let line = read(client.answer(call("r4", 5, "toolu_3"), |_| true));
        assert_eq!(line["response"]["response"]["mcp_response"]["result"]["isError"], true);
    }

    #[test]
    fn what_is_not_ours_is_refused_and_nothing_is_offered_without_tools() {
        let other = json!({"subtype": "can_use_tool", "tool_name": "Bash"});
        let raw = RawValue::from_string(other.to_string()).expect("JSON");
        let asked_other = Asked::parse("r1".into(), &raw).expect("within its bounds").expect("a request");
        let line = read(client().answer(asked_other, |_| true));
        assert_eq!(line["response"]["subtype"], "error");
        let line = read(Client::default().answer(call("r2", 1, "t"), |_| true));
        assert_eq!(line["response"]["subtype"], "error");
        assert_eq!(Asked::parse("x".repeat(WORD.most + 1), &raw), Err(Garbage::Over(WORD)));
    }

    #[test]
    fn r03_a_cli_that_asks_for_the_tools_for_ever_is_told_them_once_in_memory_and_so_often() {
        let schema = serde_json::Map::from_iter([("description".to_owned(), "s".repeat(500_000).into())]);
        let mut client = Client::new(&[Tool { name: "w".into(), description: String::new(), schema }]);
        let list = |n: u64| asked("r0", json!({"jsonrpc": "2.0", "id": n, "method": "tools/list"}));
        let mut said: Vec<Vec<Bytes>> = Vec::new();
        let over = loop {
            match client.answer(list(said.len() as u64), |_| false) {
                Ok(pieces) => said.push(pieces.expect("an answer")),
                Err(over) => break over,
            }
        };
        assert_eq!(over, Garbage::Over(ANSWERED));
        assert!((60..100).contains(&said.len()), "{}", said.len());
        // What takes memory is there once, whoever still waits to read it.
        let large: Vec<_> =
            said.iter().flatten().filter(|piece| piece.len() > 1024).map(|it| it.as_ptr()).collect();
        assert!(large.len() == said.len() && large.iter().all(|at| *at == large[0]));
        assert_eq!(read(Ok(Some(said.remove(7))))["response"]["response"]["mcp_response"]["id"], 7);
    }
}
