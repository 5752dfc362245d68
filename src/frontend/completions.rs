//! The bytes of an answer in the second dialect: a chat completion and its chunks, written from types.
//! It must never write a chunk that is more than one line, nor say of an answer what the first dialect would not.

use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;

use super::answer::{Answer, Done, Emit, Kind, Shown, TOOL_USE};
use super::cli::decode::Usage;
use super::error::ApiError;
use super::sse::{Cost, cost};

/// Between what the agent said in two turns: the dialect has one string for both.
const BETWEEN: &str = "\n\n";
/// The one kind of tool.
const FUNCTION: &str = "function";
/// The arguments of a call that has none.
const NO_INPUT: &str = "{}";

/// The whole answer.
#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: Option<()>,
    choices: [Choice<'a>; 1],
    usage: Tokens,
    session_id: Option<String>,
    run_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    x_cost: Option<Cost>,
    #[serde(skip_serializing_if = "Option::is_none")]
    x_error: Option<Value>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u8,
    message: Message<'a>,
    logprobs: Option<()>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    /// Null where the answer is calls alone.
    content: Option<String>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call<'a>>,
}

/// A call of one of the client's functions.
#[derive(Serialize)]
struct Call<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    function: Function<'a>,
}

#[derive(Serialize)]
struct Function<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

/// A call's beginning, or a piece of its arguments.
#[derive(Serialize)]
struct CallPart<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: Function<'a>,
}

/// A piece of it.
#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: Option<()>,
    choices: &'a [Part<'a>],
    /// Left out, null, or told: the last two where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Tokens>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    x_cost: Option<Cost>,
}

#[derive(Serialize)]
struct Part<'a> {
    index: u8,
    delta: Delta<'a>,
    logprobs: Option<()>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize, Default)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallPart<'a>; 1]>,
}

#[derive(Serialize)]
struct Tokens {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokens,
}

#[derive(Serialize)]
struct PromptTokens {
    cached_tokens: u64,
}

/// The chunks of these steps; none for a step that the dialect has no word for.
pub fn events(answer: &Answer, steps: &[Emit]) -> Bytes {
    let mut out = Vec::new();
    // Whose text has begun in these steps.
    let mut begun = None;
    for (at, step) in steps.iter().enumerate() {
        let mut follows = |block: usize, kind: &Kind| {
            let is_new = begun.replace(block) != Some(block);
            is_new && is_first(answer, block, &steps[at..]) && answer.said_before(block, kind)
        };
        let delta = match step {
            Emit::Start => Delta { role: Some("assistant"), content: Some(""), ..Delta::default() },
            Emit::Text(block, text) => {
                if follows(*block, &Kind::Text) {
                    chunk(&mut out, answer, Delta { content: Some(BETWEEN), ..Delta::default() });
                }
                Delta { content: Some(text), ..Delta::default() }
            }
            Emit::Thinking(block, text) => {
                if follows(*block, &Kind::Thinking) {
                    chunk(&mut out, answer, Delta { reasoning_content: Some(BETWEEN), ..Delta::default() });
                }
                Delta { reasoning_content: Some(text), ..Delta::default() }
            }
            Emit::BlockStart(block, Kind::ToolUse { id, name }) => calling(CallPart {
                index: answer.calls_before(*block),
                id: Some(id),
                kind: Some(FUNCTION),
                function: Function { name: Some(name), arguments: "" },
            }),
            Emit::Input(block, arguments) => calling(more(answer, *block, arguments)),
            // Clients parse what the pieces make, and nothing is no JSON.
            Emit::BlockStop(block) if is_call_without_input(answer, *block) => {
                calling(more(answer, *block, NO_INPUT))
            }
            // A signature is for a model that gets the turn back, and this dialect has no place for it.
            Emit::BlockStart(..) | Emit::Signature(..) | Emit::BlockStop(_) => continue,
        };
        chunk(&mut out, answer, delta);
    }
    out.into()
}

fn calling(call: CallPart<'_>) -> Delta<'_> {
    Delta { tool_calls: Some([call]), ..Delta::default() }
}

fn more<'a>(answer: &Answer, block: usize, arguments: &'a str) -> CallPart<'a> {
    CallPart {
        index: answer.calls_before(block),
        id: None,
        kind: None,
        function: Function { name: None, arguments },
    }
}

fn is_call_without_input(answer: &Answer, block: usize) -> bool {
    let shown = answer.blocks.get(block);
    shown.is_some_and(|shown| matches!(shown.kind, Kind::ToolUse { .. }) && shown.text.trim().is_empty())
}

/// Whether the text that these steps begin with is all that its block has. What comes of one event for one block comes in
/// a row, so that each step is looked at once.
fn is_first(answer: &Answer, block: usize, steps: &[Emit]) -> bool {
    let bytes = |step: &Emit| match step {
        Emit::Text(at, text) | Emit::Thinking(at, text) if *at == block => Some(text.len()),
        _ => None,
    };
    answer
        .blocks
        .get(block)
        .is_some_and(|shown| shown.text.len() == steps.iter().map_while(bytes).sum::<usize>())
}

/// The last chunks, and the word that ends a stream.
pub fn ending(answer: &Answer, done: &Done) -> Bytes {
    let mut out = Vec::new();
    let last = Part {
        index: 0,
        delta: Delta::default(),
        logprobs: None,
        finish_reason: Some(finish_reason(done.stop_reason)),
    };
    write(&mut out, &Chunk { choices: &[last], ..empty(answer) });
    if answer.heading.usage_last {
        let usage = Some(Some(tokens(&done.usage)));
        write(&mut out, &Chunk { usage, x_cost: cost(done), ..empty(answer) });
    }
    out.extend_from_slice(b"data: [DONE]\n\n");
    out.into()
}

/// A terminal error: the official clients raise it, and read no further.
pub fn error(error: &ApiError) -> Bytes {
    let mut out = Vec::new();
    write(&mut out, &error.completions_body());
    out.into()
}

/// A comment, which every client skips and every proxy counts as traffic.
pub fn alive() -> Bytes {
    Bytes::from_static(b": alive\n\n")
}

/// The whole answer as a JSON body.
pub fn body(answer: &Answer, done: &Done) -> Bytes {
    let content = joined(&answer.blocks, &Kind::Text);
    let completion = completion(answer, content, finish_reason(done.stop_reason), &done.usage);
    bytes(&Completion { x_cost: cost(done), ..completion })
}

/// What came before a failure, for a client whose status line has already said 200. `length` tells it that the
/// answer is not whole; an error object would be taken for a completion without choices.
pub fn failed_body(answer: &Answer, error: &ApiError) -> Bytes {
    let mut content = joined(&answer.blocks, &Kind::Text);
    append(&mut content, &format!("[gaoler: the run failed: {}]", error.message));
    let completion = completion(answer, content, "length", &answer.first_usage);
    bytes(&Completion { x_error: Some(error.completions_body()), ..completion })
}

fn completion<'a>(
    answer: &'a Answer,
    content: String,
    finish_reason: &'static str,
    usage: &Usage,
) -> Completion<'a> {
    let thought = joined(&answer.blocks, &Kind::Thinking);
    let reasoning_content = Some(thought).filter(|thought| !thought.is_empty());
    let tool_calls: Vec<Call<'_>> = answer.blocks.iter().filter_map(call).collect();
    let content = Some(content).filter(|content| tool_calls.is_empty() || !content.is_empty());
    let message = Message { role: "assistant", content, refusal: None, reasoning_content, tool_calls };
    Completion {
        id: &answer.heading.id,
        object: "chat.completion",
        created: answer.heading.asked_at,
        model: &answer.heading.model,
        system_fingerprint: None,
        choices: [Choice { index: 0, message, logprobs: None, finish_reason }],
        usage: tokens(usage),
        session_id: answer.heading.session.map(|id| id.to_string()),
        run_id: answer.heading.run.to_string(),
        x_cost: None,
        x_error: None,
    }
}

fn call(block: &Shown) -> Option<Call<'_>> {
    let Kind::ToolUse { id, name } = &block.kind else { return None };
    let arguments = if block.text.trim().is_empty() { NO_INPUT } else { &block.text };
    Some(Call { id, kind: FUNCTION, function: Function { name: Some(name), arguments } })
}

fn joined(blocks: &[Shown], kind: &Kind) -> String {
    let mut out = String::new();
    blocks.iter().filter(|block| block.kind == *kind).for_each(|block| append(&mut out, &block.text));
    out
}

fn append(out: &mut String, text: &str) {
    if !out.is_empty() && !text.is_empty() {
        out.push_str(BETWEEN);
    }
    out.push_str(text);
}

/// `finish_reason` for a message's `stop_reason`.
fn finish_reason(stop_reason: &str) -> &'static str {
    match stop_reason {
        "end_turn" | "stop_sequence" => "stop",
        "refusal" => "content_filter",
        TOOL_USE => "tool_calls",
        // The rest say that there would have been more: tokens, turns or the model's window ran out.
        _ => "length",
    }
}

/// This dialect counts what was read from a cache, and what was put there, as part of the prompt.
fn tokens(usage: &Usage) -> Tokens {
    let cached_tokens = usage.cache_read_input_tokens;
    let prompt_tokens =
        usage.input_tokens.saturating_add(usage.cache_creation_input_tokens).saturating_add(cached_tokens);
    Tokens {
        prompt_tokens,
        completion_tokens: usage.output_tokens,
        total_tokens: prompt_tokens.saturating_add(usage.output_tokens),
        prompt_tokens_details: PromptTokens { cached_tokens },
    }
}

fn chunk(out: &mut Vec<u8>, answer: &Answer, delta: Delta<'_>) {
    let part = Part { index: 0, delta, logprobs: None, finish_reason: None };
    write(out, &Chunk { choices: &[part], ..empty(answer) });
}

fn empty(answer: &Answer) -> Chunk<'_> {
    Chunk {
        id: &answer.heading.id,
        object: "chat.completion.chunk",
        created: answer.heading.asked_at,
        model: &answer.heading.model,
        system_fingerprint: None,
        choices: &[],
        usage: answer.heading.usage_last.then_some(None),
        x_cost: None,
    }
}

fn write(out: &mut Vec<u8>, data: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    // JSON writes a line break inside a string as \n, so data is one line.
    out.extend(serde_json::to_vec(data).unwrap_or_default());
    out.extend_from_slice(b"\n\n");
}

fn bytes(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::answer::{Ending, Heading};
    use crate::frontend::cli::decode;
    use crate::frontend::job::{Shape, Thinking};
    use gaoler_protocol::RunId;

    fn answer() -> Answer {
        let (id, model) = ("chatcmpl-x".into(), "asked".into());
        let heading = Heading {
            id,
            session: None,
            run: RunId([0; 16]),
            model,
            asked_at: 7,
            usage_last: false,
            servers: Vec::new(),
        };
        Answer::new(heading, Shape::Events, Thinking::Shown)
    }

    /// What a client puts together out of chunks: the text, and the thinking.
    fn heard(bytes: &[u8]) -> [String; 2] {
        let mut out = [String::new(), String::new()];
        for event in std::str::from_utf8(bytes).expect("UTF-8").split_terminator("\n\n") {
            let data = event.strip_prefix("data: ").expect("an event");
            assert!(!data.contains('\n'), "{data:?}");
            let chunk: Value = serde_json::from_str(data).expect("JSON");
            for (at, name) in ["content", "reasoning_content"].iter().enumerate() {
                out[at].push_str(chunk["choices"][0]["delta"][name].as_str().unwrap_or_default());
            }
        }
        out
    }

    #[test]
    fn a_stream_and_a_body_say_the_same_of_every_recording_of_the_cli() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli-events");
        let (mut turns, mut thoughts) = (0, 0);
        for entry in std::fs::read_dir(folder).expect("recordings") {
            let path = entry.expect("an entry").path();
            if path.extension().is_none_or(|end| end != "jsonl") {
                continue;
            }
            let (mut answer, mut out) = (answer(), Vec::new());
            for line in std::fs::read(&path).expect("a recording").split(|&b| b == b'\n') {
                let Ok(event) = decode::event(line) else { continue };
                let steps = answer.feed(event);
                out.extend_from_slice(&events(&answer, &steps));
            }
            let (steps, ending) = answer.finish();
            out.extend_from_slice(&events(&answer, &steps));
            let Ending::Done(done) = ending else { continue };
            let body: Value = serde_json::from_slice(&body(&answer, &done)).expect("JSON");
            let message = &body["choices"][0]["message"];
            let [text, thought] = heard(&out);
            assert_eq!(message["content"], text.as_str(), "{}", path.display());
            assert_eq!(
                message["reasoning_content"].as_str().unwrap_or_default(),
                thought,
                "{}",
                path.display()
            );
            turns += usize::from(text.contains(BETWEEN));
            thoughts += usize::from(!thought.is_empty());
        }
        assert!(turns > 0 && thoughts > 0, "{turns} answers of several turns, {thoughts} with thinking");
    }

    /// What a client puts together of an answer's calls: id, name and arguments, by their index.
    fn calls_heard(bytes: &[u8]) -> Vec<[String; 3]> {
        let mut out: Vec<[String; 3]> = Vec::new();
        for event in std::str::from_utf8(bytes).expect("UTF-8").split_terminator("\n\n") {
            let data = event.strip_prefix("data: ").expect("an event");
            let chunk: Value = serde_json::from_str(data).expect("JSON");
            for call in chunk["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten() {
                let at = call["index"].as_u64().expect("an index") as usize;
                if let Some(id) = call["id"].as_str() {
                    assert_eq!((at, &call["type"]), (out.len(), &"function".into()), "{data}");
                    let name = call["function"]["name"].as_str().expect("a name").to_owned();
                    out.push([id.to_owned(), name, String::new()]);
                }
                out[at][2].push_str(call["function"]["arguments"].as_str().expect("a string"));
            }
        }
        out
    }

    #[test]
    fn a_stream_and_a_body_have_the_same_calls_of_the_clients_functions() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli-events");
        let text = std::fs::read_to_string(format!("{folder}/parallel_tools.jsonl")).expect("a recording");
        // The CLI's own tool as if it were the client's; and once as one that takes nothing.
        let ours = text.replace(r#""name":"Bash""#, r#""name":"mcp__client__Bash""#);
        let bare: String = ours
            .lines()
            .filter(|line| !line.contains("input_json_delta"))
            .map(|line| format!("{line}\n"))
            .collect();
        for (text, arguments) in [(&ours, None), (&bare, Some(NO_INPUT))] {
            let (mut answer, mut out) = (answer().offering(true), Vec::new());
            for line in text.lines() {
                let Ok(event) = decode::event(line.as_bytes()) else { continue };
                let steps = answer.feed(event);
                out.extend_from_slice(&events(&answer, &steps));
            }
            let (steps, ending) = answer.finish();
            out.extend_from_slice(&events(&answer, &steps));
            let Ending::Done(done) = ending else { panic!("{ending:?}") };
            let body: Value = serde_json::from_slice(&body(&answer, &done)).expect("JSON");
            let choice = &body["choices"][0];
            assert_eq!(
                (&choice["finish_reason"], &choice["message"]["content"]),
                (&"tool_calls".into(), &Value::Null)
            );
            let whole: Vec<[String; 3]> = choice["message"]["tool_calls"]
                .as_array()
                .expect("calls")
                .iter()
                .map(|call| {
                    let function = &call["function"];
                    [&call["id"], &function["name"], &function["arguments"]]
                        .map(|word| word.as_str().expect("a string").to_owned())
                })
                .collect();
            assert_eq!(calls_heard(&out), whole);
            assert!(whole.len() > 1 && whole.iter().all(|[_, name, _]| name == "Bash"), "{whole:?}");
            for [_, _, found] in &whole {
                assert!(serde_json::from_str::<Value>(found).is_ok_and(|found| found.is_object()), "{found}");
                assert!(arguments.is_none_or(|expected| expected == found), "{found}");
            }
        }
    }

    #[test]
    fn every_reason_to_stop_has_a_word_that_clients_know() {
        let rows = [
            ("end_turn", "stop"),
            ("stop_sequence", "stop"),
            ("max_tokens", "length"),
            ("model_context_window_exceeded", "length"),
            ("pause_turn", "length"),
            ("refusal", "content_filter"),
            ("tool_use", "tool_calls"),
        ];
        rows.iter().for_each(|(theirs, ours)| assert_eq!(finish_reason(theirs), *ours, "{theirs}"));
    }

    #[test]
    fn a_failure_after_the_status_line_is_a_completion_that_is_not_whole() {
        let error = ApiError::internal("wall_limit", "The run hit its time limit.");
        let body: Value = serde_json::from_slice(&failed_body(&answer(), &error)).expect("JSON");
        let choice = &body["choices"][0];
        assert_eq!(choice["finish_reason"], "length");
        assert_eq!(choice["message"]["content"], "[gaoler: the run failed: The run hit its time limit.]");
        assert_eq!((&body["x_error"]["error"]["code"], &body["created"]), (&"wall_limit".into(), &7.into()));
    }

    #[test]
    fn what_a_cache_held_is_part_of_the_prompt() {
        let usage = Usage {
            input_tokens: 1,
            cache_creation_input_tokens: 20,
            cache_read_input_tokens: 300,
            output_tokens: 4000,
            ..Usage::default()
        };
        let told = serde_json::to_value(tokens(&usage)).expect("JSON");
        let expected = serde_json::json!({"prompt_tokens": 321, "completion_tokens": 4000, "total_tokens": 4321,
            "prompt_tokens_details": {"cached_tokens": 300}});
        assert_eq!(told, expected);
    }
}
