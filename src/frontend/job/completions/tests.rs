//! The second dialect's parser, row by row, beside what the first one makes of the same words.

use super::*;
use crate::frontend::job::{self as first, Shape, Thinking};

const PIXEL: &str = "data:image/png;base64,iVBORw0KGgo=";
const ID: &str = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";

fn with(field: &str) -> String {
    let comma = if field.is_empty() { "" } else { "," };
    format!(r#"{{{field}{comma}"messages":[{{"role":"user","content":"hi"}}]}}"#)
}

fn of(messages: &str) -> String {
    format!(r#"{{"messages":{messages}}}"#)
}

fn parsed(body: &str) -> Job {
    parse(body.as_bytes(), None, &[]).unwrap_or_else(|e| panic!("{}: {body}", e.message))
}

#[test]
fn a_bad_request_names_the_path_of_what_is_wrong() {
    let check = |body: &str, status: u16, message: &str| {
        let error = parse(body.as_bytes(), None, &[]).expect_err(body);
        assert_eq!((error.status, error.message.as_str()), (status, message), "{body}");
    };
    let user = |content: &str| of(&format!(r#"[{{"role":"user","content":{content}}}]"#));
    let image = |url: &str| user(&format!(r#"[{{"type":"image_url","image_url":{{"url":"{url}"}}}}]"#));
    check("[]", 400, "The body must be a JSON object.");
    check("{}", 400, "messages: field required.");
    check(&of("[]"), 400, "messages: at least one message is required.");
    check(&of("[1]"), 400, "messages[0]: must be an object, not a number.");
    check(
        &with(r#""model":"gpt-4o""#),
        404,
        "model: not known here. Use opus, sonnet, haiku, a full id that begins with claude-, or one of GET /v1/models.",
    );
    check(
        &of(r#"[{"role":"function","content":"x"}]"#),
        400,
        "messages[0].role: must be system, developer, user, assistant or tool.",
    );
    check(&of(r#"[{"role":"user"}]"#), 400, "messages[0].content: field required.");
    check(&user("\"\""), 400, "messages[0].content: must not be empty.");
    check(&user("5"), 400, "messages[0].content: must be a string or an array of parts, not a number.");
    check(
        &user(r#"[{"type":"input_audio"}]"#),
        400,
        "messages[0].content[0].type: not supported here. A user's parts are text and image_url.",
    );
    check(&user(r#"[{"type":"image_url"}]"#), 400, "messages[0].content[0].image_url: field required.");
    let place = "messages[0].content[0].image_url.url: ";
    let fetched = "images are not fetched here; send the image itself, as data:image/png;base64,...";
    check(&image("https://example.com/a.png"), 400, &format!("{place}{fetched}"));
    check(&image("http://169.254.169.254/"), 400, &format!("{place}{fetched}"));
    let form = "must be a data: URL in base64, such as data:image/png;base64,...";
    check(&image("data:image/png,abc"), 400, &format!("{place}{form}"));
    check(&image("file:///etc/passwd"), 400, &format!("{place}{form}"));
    check(
        &image("data:image/svg+xml;base64,AAAA"),
        400,
        &format!("{place}must be one of image/jpeg, image/png, image/gif, image/webp."),
    );
    check(&image("data:image/png;base64,AA A"), 400, &format!("{place}must be base64 without line breaks."));
    check(
        &of(r#"[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]"#),
        400,
        "messages: the last message must be the user's.",
    );
    check(
        &of(r#"[{"role":"system","content":5},{"role":"user","content":"x"}]"#),
        400,
        "messages[0].content: must be a string or an array of text blocks, not a number.",
    );
    check(
        &of(r#"[{"role":"assistant","tool_calls":[{"id":"1","function":{"name":"f","arguments":"["}}]}]"#),
        400,
        "messages[0].tool_calls[0].function.arguments: must be a JSON object in a string.",
    );
    check(&of(r#"[{"role":"tool","content":"x"}]"#), 400, "messages[0].tool_call_id: field required.");
    check(&with(r#""n":2"#), 400, "n: a request gets one answer here; send it as often as you need.");
    check(&with(r#""n":0"#), 400, "n: must be at least 1.");
    check(&with(r#""max_completion_tokens":0"#), 400, "max_completion_tokens: must be at least 1.");
    check(&with(r#""stream":1"#), 400, "stream: must be a boolean, not a number.");
    check(&with(r#""stream_options":true"#), 400, "stream_options: must be an object, not a boolean.");
    check(
        &with(r#""reasoning_effort":"most""#),
        400,
        "reasoning_effort: must be none, minimal, low, medium, high, xhigh or max.",
    );
    check(
        &with(r#""function_call":{"name":"f"}"#),
        400,
        "function_call: functions are not offered here, so no call can be promised; send tools instead.",
    );
    let choice = "tool_choice: must be none, auto, required or name a function.";
    check(&with(r#""tool_choice":"any""#), 400, choice);
    check(&with(r#""tool_choice":{"type":"tool"}"#), 400, choice);
    check(&with(r#""tool_choice":{}"#), 400, "tool_choice.type: field required.");
    check(&with(r#""tool_choice":true"#), 400, "tool_choice: must be a string or an object, not a boolean.");
    check(&with(r#""parallel_tool_calls":0"#), 400, "parallel_tool_calls: must be a boolean, not a number.");
    let tool = |function: &str| with(&format!(r#""tools":[{{"type":"function","function":{function}}}]"#));
    check(&with(r#""tools":{}"#), 400, "tools: must be an array, not an object.");
    check(&with(r#""tools":[7]"#), 400, "tools[0]: must be an object, not a number.");
    check(&with(r#""tools":[{}]"#), 400, "tools[0].type: field required.");
    check(&with(r#""tools":[{"type":"function"}]"#), 400, "tools[0].function: field required.");
    check(&tool("{}"), 400, "tools[0].function.name: field required.");
    let form = "tools[0].function.name: must have 1 to 64 of A-Z, a-z, 0-9, _ and -.";
    check(&tool(r#"{"name":"a b"}"#), 400, form);
    check(&tool(r#"{"name":"Bash(ls)"}"#), 400, form);
    check(
        &tool(r#"{"name":"a","parameters":[]}"#),
        400,
        "tools[0].function.parameters: must be an object, not an array.",
    );
    check(
        &tool(r#"{"name":"a","strict":1}"#),
        400,
        "tools[0].function.strict: must be a boolean, not a number.",
    );
    let twice = r#"{"type":"function","function":{"name":"a"}}"#;
    check(&with(&format!(r#""tools":[{twice},{twice}]"#)), 400, "tools[1].name: another tool has this name.");
    check(
        &with(r#""security_level":"LAX""#),
        400,
        "security_level: must be PARANOID, BALANCED or DEVELOPER.",
    );
}

#[test]
fn what_has_no_effect_is_named_and_what_asks_for_nothing_is_not() {
    let check = |field: &str, expected: &str| {
        assert_eq!(parsed(&with(field)).ignored.join(","), expected, "{field}");
    };
    check("", "");
    check(r#""temperature":0.5,"seed":7,"stop":null"#, "seed,temperature");
    check(r#""max_tokens":5,"max_completion_tokens":5"#, "max_tokens,max_completion_tokens");
    let function = r#"{"type":"function","function":{"name":"f"}}"#;
    check(&format!(r#""tools":[{function}],"tool_choice":"auto","parallel_tool_calls":true"#), "");
    check(&format!(r#""tools":[{function}],"tool_choice":"none","parallel_tool_calls":null"#), "");
    check(&format!(r#""tools":[{function}],"tool_choice":"required""#), "tool_choice");
    let named = r#"{"type":"function","function":{"name":"f"}}"#;
    check(&format!(r#""tools":[{function}],"tool_choice":{named}"#), "tool_choice");
    check(r#""tools":[{"type":"custom","custom":{"name":"g"}}]"#, "tools");
    check(r#""tools":[{"type":"function","function":{"name":"f","strict":true}}]"#, "tools.strict");
    check(r#""tools":[{"type":"function","function":{"name":"f","strict":false}}]"#, "");
    check(r#""parallel_tool_calls":false"#, "parallel_tool_calls");
    check(r#""functions":[{"name":"f"}],"function_call":"auto""#, "function_call,functions");
    check(r#""logprobs":true,"top_logprobs":2"#, "logprobs,top_logprobs");
    check(r#""n":1,"logprobs":false,"store":false,"modalities":["text"]"#, "");
    check(r#""response_format":{"type":"text"}"#, "");
    check(r#""response_format":{"type":"json_object"}"#, "response_format");
    check(
        r#""stream_options":{"include_usage":true,"include_obfuscation":true}"#,
        "stream_options.include_obfuscation",
    );
    check(r#""stream_options":{"include_obfuscation":false}"#, "");
    // What chat front ends send of their own.
    check(
        r#""chat_id":"c","id":"m","session_id":"lJ2xk9Zq-socketAAAB","metadata":{},"user":{"name":"x"}"#,
        "session_id,chat_id,id,metadata,user",
    );
    let message = r#"[{"role":"user","name":"eve","content":[{"type":"image_url",
        "image_url":{"url":"data:image/jpg;base64,AAAA","detail":"high"}}]}]"#;
    let job = parsed(&of(message));
    assert_eq!(job.ignored, ["messages.name", "messages.image_url.detail"]);
    let Block::Image(image) = &job.prompt[0] else { panic!("{:?}", job.prompt) };
    assert_eq!((image.media_type, image.data.as_str()), ("image/jpeg", "AAAA"));
    assert_eq!(job.prompt[1], Block::Text("(see above)".into()));
}

#[test]
fn a_conversation_is_the_same_in_both_dialects() {
    let rows = [
        (
            of(r#"[{"role":"system","content":"Be terse."},{"role":"user","content":"q1"},
                {"role":"assistant","content":"a1"},{"role":"developer","content":[{"type":"text","text":"Now."}]},
                {"role":"user","content":"q2"},{"role":"user","content":[{"type":"text","text":"q3"}]}]"#),
            r#"{"system":"Be terse.\n\nNow.","messages":[{"role":"user","content":"q1"},
                {"role":"assistant","content":"a1"},{"role":"user","content":"q2"},{"role":"user","content":"q3"}]}"#
                .to_string(),
        ),
        (
            of(&format!(
                r#"[{{"role":"user","content":[{{"type":"text","text":"look"}},
                {{"type":"image_url","image_url":{{"url":"{PIXEL}"}}}}]}}]"#
            )),
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"look"},{"type":"image",
                "source":{"type":"base64","media_type":"image/png","data":"iVBORw0KGgo="}}]}]}"#
                .to_string(),
        ),
        (
            of(r#"[{"role":"user","content":"q"},{"role":"assistant","content":null,"tool_calls":[
                {"id":"t1","type":"function","function":{"name":"f","arguments":"{\"a\":1}"}},
                {"id":"t2","type":"function","function":{"name":"g","arguments":""}}]},
                {"role":"tool","tool_call_id":"t1","content":"one"},{"role":"tool","tool_call_id":"t2","content":""},
                {"role":"user","content":"and?"}]"#),
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":[
                {"type":"tool_use","id":"t1","name":"f","input":{"a":1}},
                {"type":"tool_use","id":"t2","name":"g","input":{}}]},
                {"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":"one"},
                {"type":"tool_result","tool_use_id":"t2"},{"type":"text","text":"and?"}]}]}"#
                .to_string(),
        ),
        (
            with(r#""tools":[{"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object"}}},
                {"type":"function","function":{"name":"g"}}]"#),
            with(r#""tools":[{"name":"f","description":"d","input_schema":{"type":"object"}},
                {"name":"g","input_schema":{"type":"object","properties":{}}}]"#),
        ),
        (
            with(r#""tool_choice":"none","tools":[{"type":"function","function":{"name":"f"}}]"#),
            with(r#""tool_choice":{"type":"none"},"tools":[{"name":"f","input_schema":{}}]"#),
        ),
        // A call is known by the CLI's name for it; its result alone is what a run waits for.
        (
            r#"{"tools":[{"type":"function","function":{"name":"f"}}],"messages":[{"role":"user","content":"q"},
                {"role":"assistant","content":null,"tool_calls":[{"id":"t1","type":"function","function":{"name":"f",
                "arguments":"{}"}}]},{"role":"tool","tool_call_id":"t1","content":[{"type":"text","text":"one"}]}]}"#
                .to_string(),
            r#"{"tools":[{"name":"f","input_schema":{"type":"object","properties":{}}}],"messages":[
                {"role":"user","content":"q"},{"role":"assistant","content":[{"type":"tool_use","id":"t1","name":"f",
                "input":{}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":"one"}]}]}"#
                .to_string(),
        ),
        (with(r#""reasoning_effort":"xhigh""#), with(r#""output_config":{"effort":"xhigh"}"#)),
        (with(r#""reasoning_effort":"minimal""#), with(r#""output_config":{"effort":"low"}"#)),
        (with(r#""thinking":{"type":"enabled"}"#), with(r#""thinking":{"type":"enabled"}"#)),
        (with(r#""model":"opus","max_turns":3"#), with(r#""model":"opus","max_turns":3"#)),
        (with(&format!(r#""session_id":"{ID}""#)), with(&format!(r#""session_id":"{ID}""#))),
    ];
    for (ours, theirs) in rows {
        let (job, model) = (parsed(&ours), first::parse(theirs.as_bytes(), &[]).expect("a job"));
        assert_eq!(format!("{job:?}"), format!("{model:?}"), "{ours}");
    }
}

#[test]
fn a_session_is_named_by_the_header_or_by_a_uuid_in_the_body() {
    let other = "0a1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";
    let check = |field: &str, header: Option<&str>, expected: Result<Option<&str>, &str>| {
        let job = parse(with(field).as_bytes(), header, &[]);
        let session = job.map(|job| job.session.map(|id| id.to_string())).map_err(|error| {
            assert_eq!((error.status, error.code), (400, "invalid_session_id"));
            error.message
        });
        assert_eq!(session, expected.map(|id| id.map(str::to_string)).map_err(str::to_string), "{field}");
    };
    let in_body = |id: &str| format!(r#""session_id":"{id}""#);
    check("", None, Ok(None));
    check("", Some(ID), Ok(Some(ID)));
    check(&in_body(ID), None, Ok(Some(ID)));
    check(&in_body(ID), Some(ID), Ok(Some(ID)));
    check(&in_body("a-socket"), Some(ID), Ok(Some(ID)));
    check(&in_body("../../etc"), None, Ok(None));
    check(r#""session_id":7"#, None, Ok(None));
    let form = "x-session-id: must be a UUID such as 6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b.";
    for wrong in ["", "x", "00000000-0000-0000-0000-000000000000", "6f1c0f0e8d2b4c7e9a510c2d3e4f5a6b"] {
        check("", Some(wrong), Err(form));
    }
    let two = "x-session-id, session_id: two different sessions; send one of them.";
    check(&in_body(other), Some(ID), Err(two));
}

#[test]
fn a_session_keeps_its_own_history_and_a_stream_may_end_with_its_usage() {
    let history = r#"[{"role":"user","content":"a"},{"role":"assistant","content":"b","reasoning_content":"c"},
        {"role":"user","content":"d"}]"#;
    let job = parse(of(history).as_bytes(), Some(ID), &[]).expect("a job");
    assert_eq!(job.earlier, []);
    assert_eq!(job.ignored, ["messages.thinking", "messages.earlier"]);
    assert_eq!((job.shape, job.usage_last, job.thinking), (Shape::Json, false, Thinking::Hidden));
    let job = parsed(&with(r#""stream":true,"stream_options":{"include_usage":true}"#));
    assert_eq!((job.shape, job.usage_last), (Shape::Events, true));
}
