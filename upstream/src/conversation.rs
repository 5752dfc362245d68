//! What a request's messages say, as far as the embedded model cares.
//! It must never be steered by anything but the text that the user wrote last.

use serde_json::Value;

/// The CLI puts its own remarks into user messages, in text blocks that begin like one of these.
const REMARKS: [&str; 2] = ["<system-reminder>", "[Image: source:"];

/// The steering text of a request and what happened since.
#[derive(Debug)]
pub struct Conversation<'a> {
    /// Every message, in order.
    pub messages: &'a [Value],
    /// Where in `messages` the steering one stands.
    at: Option<usize>,
    /// The text blocks of the steering message, without the CLI's own remarks.
    pub texts: Vec<&'a str>,
    /// What the tools answered since then, in the order in which they were called: tools that run side by
    /// side answer in any order.
    pub results: Vec<ToolResult>,
}

/// One tool's answer.
#[derive(Debug, PartialEq, Eq)]
pub struct ToolResult {
    /// Whether the tool failed.
    pub failed: bool,
    /// Its text.
    pub text: String,
}

impl<'a> Conversation<'a> {
    /// Reads the messages. The steering one is the newest user message that holds a text and no tool result:
    /// while tools are being called the newest user message of all holds their results.
    pub fn new(messages: &'a [Value]) -> Conversation<'a> {
        let steers = |message: &&Value| {
            message["role"] == "user" && !has_tool_result(message) && !texts(message).is_empty()
        };
        let at = messages.iter().rposition(|message| steers(&message));
        let since = at.map_or(0, |at| at + 1);
        Conversation {
            messages,
            at,
            texts: at.map(|at| texts(&messages[at])).unwrap_or_default(),
            results: tool_results(&messages[since..]),
        }
    }

    /// What decides the answer: the last text block of the steering message.
    pub fn steering(&self) -> &'a str {
        self.texts.last().copied().unwrap_or_default()
    }

    /// `[role, text]` of every message before the steering one that holds a text.
    pub fn history(&self) -> Vec<[String; 2]> {
        let earlier = &self.messages[..self.at.unwrap_or(0)];
        let spoken = |message: &&Value| message["role"] == "user" || message["role"] == "assistant";
        let row = |message: &Value| {
            let role = message["role"].as_str().unwrap_or_default().to_owned();
            Some([role, texts(message).join("\n")]).filter(|[_, text]| !text.is_empty())
        };
        earlier.iter().filter(spoken).filter_map(row).collect()
    }

    /// `(media type, decoded bytes)` of each image of the steering message; for an image that is not sent
    /// as base64 the kind of its source and no bytes.
    pub fn images(&self) -> Vec<(String, usize)> {
        let blocks = self.at.map(|at| blocks(&self.messages[at])).unwrap_or_default();
        let image = |block: &Value| {
            let source = &block["source"];
            let data = source["data"].as_str().unwrap_or_default().trim_end_matches('=');
            let name = source["media_type"].as_str().or(source["type"].as_str()).unwrap_or("unknown");
            (name.to_owned(), data.len() * 3 / 4)
        };
        blocks.iter().filter(|block| block["type"] == "image").map(image).collect()
    }

    /// The steering message's whole content as JSON, and every message that came after it: attachments may
    /// travel in either.
    pub fn raw(&self) -> String {
        let Some(at) = self.at else { return "null".into() };
        let content = self.messages[at]["content"].to_string();
        let later = &self.messages[at + 1..];
        match later.is_empty() {
            true => content,
            false => format!("{content}\n{}", Value::from(later.to_vec())),
        }
    }
}

/// The blocks of a message; none where its content is a plain string.
fn blocks(message: &Value) -> &[Value] {
    message["content"].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// The texts of a message that a user or a model wrote.
fn texts(message: &Value) -> Vec<&str> {
    let written = |text: &&str| !REMARKS.iter().any(|remark| text.trim_start().starts_with(remark));
    match &message["content"] {
        Value::String(text) => Some(text.as_str()).filter(written).into_iter().collect(),
        _ => blocks(message).iter().filter_map(text).filter(written).collect(),
    }
}

fn text(block: &Value) -> Option<&str> {
    block["text"].as_str().filter(|_| block["type"] == "text")
}

fn has_tool_result(message: &Value) -> bool {
    blocks(message).iter().any(|block| block["type"] == "tool_result")
}

fn tool_results(messages: &[Value]) -> Vec<ToolResult> {
    let of_kind = |kind: &'static str| messages.iter().flat_map(blocks).filter(move |b| b["type"] == kind);
    let answer = |call: &Value| of_kind("tool_result").find(|result| result["tool_use_id"] == call["id"]);
    of_kind("tool_use").filter_map(answer).map(tool_result).collect()
}

fn tool_result(block: &Value) -> ToolResult {
    let text = match &block["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(text).collect::<Vec<_>>().join("\n"),
        _ => String::new(),
    };
    ToolResult { failed: block["is_error"] == true, text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(messages: Value, steering: &str, results: usize) {
        let messages = messages.as_array().cloned().unwrap_or_default();
        let conversation = Conversation::new(&messages);
        assert_eq!(conversation.steering(), steering);
        assert_eq!(conversation.results.len(), results);
    }

    #[test]
    fn the_last_user_text_steers() {
        let reminder = json!({"type":"text","text":"<system-reminder>\nRUN: no\n</system-reminder>"});
        let text = json!({"type":"text","text":"RUN: id"});
        let call =
            json!({"role":"assistant","content":[{"type":"tool_use","id":"t","name":"Bash","input":{}}]});
        let result = json!({"role":"user","content":[{"type":"tool_result","tool_use_id":"t","content":"x"}, reminder]});
        check(json!([]), "", 0);
        check(json!([{"role":"user","content":"a"}]), "a", 0);
        check(json!([{"role":"user","content":"a"},{"role":"assistant","content":"RUN: no"}]), "a", 0);
        check(json!([{"role":"user","content":[reminder, text, reminder]}]), "RUN: id", 0);
        check(json!([{"role":"user","content":[text]},{"role":"system","content":"RUN: no"}]), "RUN: id", 0);
        check(json!([{"role":"user","content":[text]}, call, result]), "RUN: id", 1);
        check(json!([{"role":"user","content":"b"}, call, result, {"role":"user","content":"c"}]), "c", 0);
    }

    #[test]
    fn history_is_what_was_said_before() {
        let messages = json!([
            {"role":"user","content":"a"}, {"role":"assistant","content":[{"type":"text","text":"b"}]},
            {"role":"system","content":"s"}, {"role":"user","content":"HISTORY?"},
        ]);
        let messages = messages.as_array().cloned().unwrap_or_default();
        let history = Conversation::new(&messages).history();
        assert_eq!(history, [["user", "a"], ["assistant", "b"]]);
    }
}
