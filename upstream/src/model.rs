//! The model itself: from a conversation to what is answered, a pure function.
//! It must never look at a clock, at chance, or at anything that the request does not hold.

use std::time::Duration;

use serde_json::{Value, json};

use crate::conversation::{Conversation, ToolResult};

/// What every text begins with.
pub const MARK: &str = "[embedded] ";
/// The longest silence that a request can ask for.
pub const SILENCE_MAX: Duration = Duration::from_secs(600);
/// The longest delay between two pieces that a request can ask for.
const DELAY_MAX_MS: u64 = 60_000;
/// The largest text that a request can ask for, kB.
const BIG_MAX_KB: usize = 16_384;
/// Tools called in one request, at most.
const TOOLS_MAX: usize = 16;

/// What the model does with a request.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// A message of these blocks.
    Message(Vec<Block>, Pace),
    /// This status with an error body.
    Fail(u16),
    /// As `Fail`, but only the first time that this process is asked; then a message of these blocks.
    FailOnce(u16, Vec<Block>),
    /// An error of this type, in mid-stream where there is one.
    Broken(String),
    /// Nothing at all, for [`SILENCE_MAX`].
    Silent,
}

/// One block of a message.
#[derive(Debug, PartialEq)]
pub enum Block {
    /// Text.
    Text(String),
    /// A thinking block.
    Thinking(String),
    /// A call of a client's tool.
    Call {
        /// The tool's name.
        tool: String,
        /// Its arguments.
        input: Value,
    },
}

/// How a message is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// As fast as it goes.
    AtOnce,
    /// With this delay before each piece of text.
    Slow(Duration),
    /// Cut off before its end.
    Cut,
    /// Silent for [`SILENCE_MAX`] before its end.
    Stall,
}

/// What else of a request an answer may show.
pub struct Request<'a> {
    /// Its JSON body.
    pub body: &'a Value,
    /// Names of its headers, and the shape of its credential.
    pub headers: &'a [String],
}

/// Decides the answer.
pub fn answer(request: &Request<'_>, conversation: &Conversation<'_>) -> Answer {
    let steering = conversation.steering().trim_start();
    if steering.contains("USERRAW?") {
        return say(conversation.raw());
    }
    let (word, rest) = steering.split_once([':', '?']).unwrap_or_default();
    let asks = steering.as_bytes().get(word.len()) == Some(&b'?');
    let rest = rest.trim();
    let results = &conversation.results;
    match (word, asks) {
        ("RUN", false) => call(request, "RUN", "Bash", &[rest], results),
        ("READ", false) => call(request, "READ", "Read", &[rest], results),
        ("TOOLS", false) => call(request, "TOOLS", "Bash", &split(rest), results),
        ("CALLS", false) => calls(request, &split(rest), results),
        ("STEPS", false) => step(request, &split(rest), results),
        ("FAIL", false) => fail(rest, steering),
        ("SLOW", false) => {
            let (ms, text) = rest.split_once(' ').unwrap_or((rest, ""));
            let delay = Duration::from_millis(ms.parse().unwrap_or(0).min(DELAY_MAX_MS));
            Answer::Message(vec![text_block(text)], Pace::Slow(delay))
        }
        ("SILENT", false) => Answer::Silent,
        ("STALL", false) => Answer::Message(vec![text_block(rest)], Pace::Stall),
        ("CUT", false) => Answer::Message(vec![text_block(rest)], Pace::Cut),
        ("ERROR", false) => Answer::Broken(rest.chars().take(64).collect()),
        ("THINK", false) => {
            Answer::Message(vec![Block::Thinking(rest.into()), text_block(rest)], Pace::AtOnce)
        }
        ("BIG", false) => say("x".repeat(rest.parse::<usize>().unwrap_or(1).min(BIG_MAX_KB) * 1000)),
        ("ECHO", false) => say(rest),
        ("IMAGE", true) => {
            let images = conversation.images();
            let list: Vec<_> = images.iter().map(|(kind, size)| format!("{kind} {size} bytes")).collect();
            say(format!("{} images\n{}", images.len(), list.join("\n")).trim_end())
        }
        ("HISTORY", true) => say(json!(conversation.history()).to_string()),
        ("SYSTEM", true) => say(system(request.body)),
        ("HEADERS", true) => say(request.headers.join("\n")),
        _ => say(conversation.texts.join("\n")),
    }
}

fn say(text: impl AsRef<str>) -> Answer {
    Answer::Message(vec![text_block(text.as_ref())], Pace::AtOnce)
}

fn text_block(text: &str) -> Block {
    Block::Text(format!("{MARK}{text}"))
}

fn split(list: &str) -> Vec<&str> {
    list.split(";;").map(str::trim).filter(|one| !one.is_empty()).take(TOOLS_MAX).collect()
}

/// Calls a tool once for each argument, or reports what came back. A request that does not offer the tool
/// (the CLI asks for titles with the user's text, for example) gets a plain text.
fn call(request: &Request<'_>, word: &str, tool: &str, arguments: &[&str], results: &[ToolResult]) -> Answer {
    if !results.is_empty() {
        return say(report(word, results));
    }
    if !offers(request.body, tool) {
        return say(format!("{word}: the request offers no tool {tool}"));
    }
    Answer::Message(arguments.iter().map(|argument| tool_call(tool, argument)).collect(), Pace::AtOnce)
}

/// Calls any tools with any input, `TOOL JSON`, whether the request offers them or not: what a model that
/// follows an injected prompt may try. A request without any tools (the CLI asks for titles) gets a plain text.
fn calls(request: &Request<'_>, wanted: &[&str], results: &[ToolResult]) -> Answer {
    if !results.is_empty() {
        return say(report("CALLS", results));
    }
    if request.body["tools"].as_array().is_none_or(Vec::is_empty) {
        return say("CALLS: the request offers no tools");
    }
    let parsed = wanted.iter().map(|one| {
        let (tool, input) = one.split_once(' ')?;
        let input = serde_json::from_str(input).ok().filter(Value::is_object)?;
        Some(Block::Call { tool: tool.chars().take(64).collect(), input })
    });
    match parsed.collect::<Option<Vec<_>>>() {
        Some(blocks) if !blocks.is_empty() => Answer::Message(blocks, Pace::AtOnce),
        _ => say("CALLS: a tool's name and a JSON object must follow"),
    }
}

/// One tool a turn, until all were called.
fn step(request: &Request<'_>, commands: &[&str], results: &[ToolResult]) -> Answer {
    let Some(command) = commands.get(results.len()) else { return say(report("STEPS", results)) };
    if !offers(request.body, "Bash") {
        return say("STEPS: the request offers no tool Bash");
    }
    let text = text_block(&format!("step {} of {}", results.len() + 1, commands.len()));
    Answer::Message(vec![text, tool_call("Bash", command)], Pace::AtOnce)
}

fn offers(body: &Value, tool: &str) -> bool {
    body["tools"].as_array().is_some_and(|tools| tools.iter().any(|one| one["name"] == tool))
}

fn tool_call(tool: &str, argument: &str) -> Block {
    let input = match tool {
        "Read" => json!({"file_path": argument}),
        _ => json!({"command": argument, "description": "Run the command of the request"}),
    };
    Block::Call { tool: tool.to_owned(), input }
}

/// `RUN ok:` and the output; for several results each under its own head, numbered.
fn report(word: &str, results: &[ToolResult]) -> String {
    let verdict = |result: &ToolResult| if result.failed { "error" } else { "ok" };
    if let ([only], "RUN" | "READ") = (results, word) {
        return format!("{word} {}:\n{}", verdict(only), only.text);
    }
    let numbered = results.iter().enumerate();
    let parts = numbered.map(|(n, result)| format!("{word} {} {}:\n{}", n + 1, verdict(result), result.text));
    parts.collect::<Vec<_>>().join("\n")
}

fn fail(rest: &str, steering: &str) -> Answer {
    let mut words = rest.split_whitespace();
    let status =
        words.next().and_then(|word| word.parse().ok()).filter(|status| (400..=599).contains(status));
    match (status, words.next()) {
        (None, _) => say("FAIL: a status from 400 to 599 must follow"),
        (Some(status), Some("once")) => Answer::FailOnce(status, vec![text_block(steering)]),
        (Some(status), _) => Answer::Fail(status),
    }
}

fn system(body: &Value) -> String {
    match &body["system"] {
        Value::String(text) => text.clone(),
        Value::Array(blocks) => {
            blocks.iter().filter_map(|block| block["text"].as_str()).collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Answer) {
        let body = json!({"messages":[{"role":"user","content":text}], "tools":[{"name":"Bash"},{"name":"Read"}],
            "system":[{"type":"text","text":"one"},{"type":"text","text":"two"}]});
        let messages = body["messages"].as_array().cloned().unwrap_or_default();
        let request = Request { body: &body, headers: &["accept".into()] };
        assert_eq!(answer(&request, &Conversation::new(&messages)), expected, "{text}");
    }

    #[test]
    fn each_word_has_its_answer() {
        let bash = |command: &str| tool_call("Bash", command);
        let message = |blocks, pace| Answer::Message(blocks, pace);
        check("hello: there?", say("hello: there?"));
        check("ECHO: a ;; b", say("a ;; b"));
        check("RUN: ls -l\nid", message(vec![bash("ls -l\nid")], Pace::AtOnce));
        check("READ: /a", message(vec![tool_call("Read", "/a")], Pace::AtOnce));
        check("TOOLS: a ;; b", message(vec![bash("a"), bash("b")], Pace::AtOnce));
        check("STEPS: a ;; b", message(vec![text_block("step 1 of 2"), bash("a")], Pace::AtOnce));
        let grep = Block::Call { tool: "Grep".into(), input: json!({"pattern": "a ; b"}) };
        let none = Block::Call { tool: "None".into(), input: json!({}) };
        check(r#"CALLS: Grep {"pattern":"a ; b"} ;; None {}"#, message(vec![grep, none], Pace::AtOnce));
        check("CALLS: Grep", say("CALLS: a tool's name and a JSON object must follow"));
        check("CALLS: Grep []", say("CALLS: a tool's name and a JSON object must follow"));
        check("FAIL: 529", Answer::Fail(529));
        check("FAIL: 529 once x", Answer::FailOnce(529, vec![text_block("FAIL: 529 once x")]));
        check("FAIL: 200", say("FAIL: a status from 400 to 599 must follow"));
        check("SLOW: 20 a b", message(vec![text_block("a b")], Pace::Slow(Duration::from_millis(20))));
        check("SILENT:", Answer::Silent);
        check("STALL: a", message(vec![text_block("a")], Pace::Stall));
        check("CUT: a", message(vec![text_block("a")], Pace::Cut));
        check("ERROR: overloaded_error", Answer::Broken("overloaded_error".into()));
        check("THINK: a", message(vec![Block::Thinking("a".into()), text_block("a")], Pace::AtOnce));
        check("BIG: 2", say("x".repeat(2000)));
        check("IMAGE?", say("0 images"));
        check("HISTORY?", say("[]"));
        check("SYSTEM?", say("one\ntwo"));
        check("HEADERS?", say("accept"));
        check("please USERRAW?", say("\"please USERRAW?\""));
    }
}
