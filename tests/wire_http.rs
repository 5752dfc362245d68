//! Every field and every block that the API knows, one row each: honoured, named as ignored, or refused by its path.
//! It must never leave a row out because nothing happens: that nothing happens silently is what it is against.

mod fake;

use fake::{BEARER, House, Play, Reply, Script, Seen, recorded, settings};
use gaoler_protocol::{Effort, Section};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn plain() -> Script {
    Script::Play(Play::of(recorded("plain")))
}

/// One request with these fields more, and what its run was given; nothing where it was refused.
async fn ask(fields: &Value) -> (Reply, Option<Seen>) {
    let mut house = House::new(settings(120), vec![plain()]).await;
    let mut body = json!({"model": "sonnet", "messages": [{"role": "user", "content": "Hello"}]});
    for (name, value) in fields.as_object().expect("fields") {
        body[name] = value.clone();
    }
    let reply = house.messages(&body.to_string()).await;
    // A refusal admits nobody, so there is no run to be seen.
    let ran = reply.header("x-gaoler-run").is_some();
    let seen = if ran { Some(house.seen().await) } else { None };
    (reply, seen)
}

#[tokio::test]
async fn t150_every_field_of_the_api_is_honoured_or_named() {
    // Fields, what is named, and a look at what the run was given where a field is honoured there.
    type Look = fn(&Seen) -> bool;
    let any: Look = |_| true;
    let tool = json!({"type": "web_search_20250305", "name": "web_search"});
    let schema = json!({"type": "json_schema", "schema": {"type": "object", "title": "CANARY"}});
    let rows: Vec<(Value, &str, Look)> = vec![
        (json!({"max_tokens": 64}), "max_tokens", any),
        (
            json!({"system": "CANARY"}),
            "",
            |seen| matches!(&seen.options[0], (Section::System, text) if text == "CANARY"),
        ),
        (
            json!({"system": [{"type": "text", "text": "CANARY", "cache_control": {"type": "ephemeral"}}]}),
            "",
            |seen| matches!(&seen.options[0], (Section::System, text) if text == "CANARY"),
        ),
        (json!({"stream": true}), "", any),
        (json!({"metadata": {"user_id": "u"}}), "metadata", any),
        (json!({"stop_sequences": ["x"]}), "stop_sequences", any),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 2048}}), "thinking.budget_tokens", any),
        (json!({"thinking": {"type": "adaptive"}}), "", any),
        (json!({"thinking": {"type": "disabled"}}), "", any),
        (json!({"output_config": {"effort": "low"}}), "", |seen| seen.spawn.effort == Effort::Low),
        (json!({"cache_control": {"type": "ephemeral"}}), "cache_control", any),
        (json!({"container": "container_1"}), "container", any),
        (json!({"service_tier": "auto"}), "service_tier", any),
        (json!({"inference_geo": "eu"}), "inference_geo", any),
        (json!({"speed": "fast"}), "speed", any),
        (json!({"diagnostics": {}}), "diagnostics", any),
        (json!({"context_management": {"edits": []}}), "context_management", any),
        (json!({"temperature": 0.5, "top_p": 0.9, "top_k": 5}), "temperature,top_k,top_p", any),
        (json!({"tools": [tool]}), "tools", any),
        (json!({"max_turns": 3}), "", |seen| seen.spawn.turns_max == 3),
        (json!({"max_budget_usd": 0.25}), "", |seen| seen.spawn.budget_microusd == 250_000),
        (json!({"on_disconnect": "continue"}), "", any),
        (json!({"limits": {"tasks": 40}}), "", |seen| seen.spawn.limits.tasks == 40),
        (json!({"security_level": "PARANOID"}), "", |seen| {
            seen.spawn.level == gaoler_protocol::Level::Paranoid
        }),
        (json!({"session_id": null, "tools": null, "temperature": null, "container": null}), "", any),
        (json!({"of_tomorrow": 1}), "of_tomorrow", any),
    ];
    for (fields, named, look) in rows {
        let (reply, seen) = ask(&fields).await;
        assert_eq!(reply.status, 200, "{fields}: {reply:?}");
        assert_eq!(reply.header("x-gaoler-ignored").unwrap_or_default(), named, "{fields}");
        assert!(look(&seen.expect("a run")), "{fields}");
    }
    // A schema goes down the CLI's stdin before the prompt, and this recording has no such tool: a clean refusal.
    for fields in [json!({"output_config": {"format": schema}}), json!({"output_format": schema})] {
        let (reply, seen) = ask(&fields).await;
        assert_eq!((reply.status, reply.code().as_str()), (400, "schema_refused"), "{fields}");
        assert_eq!(reply.header("x-gaoler-ignored"), None);
        let stdin = seen.expect("a run").stdin;
        let first: Value = serde_json::from_str(stdin.lines().next().expect("a line")).expect("JSON");
        assert_eq!(first["request"]["jsonSchema"], schema["schema"]);
        assert!(stdin.lines().nth(1).is_some_and(|line| line.contains("\"Hello\"")));
    }
    let large = json!({"type": "json_schema", "schema": {"title": "x".repeat(64 * 1024)}});
    for (fields, path) in [
        (json!({"output_config": {"format": {"type": "text"}}}), "output_config.format.type: "),
        (json!({"output_config": {"format": {"type": "json_schema"}}}), "output_config.format.schema: "),
        (json!({"output_config": {"format": large}}), "output_config.format.schema: must have at most 65536"),
        (json!({"max_budget_usd": 0}), "max_budget_usd: "),
        (json!({"max_budget_usd": "1"}), "max_budget_usd: "),
        (json!({"max_turns": 10_001}), "max_turns: "),
        (json!({"on_disconnect": "never"}), "on_disconnect: "),
    ] {
        let (reply, seen) = ask(&fields).await;
        assert_eq!((reply.status, seen.is_none()), (400, true), "{fields}");
        let message = reply.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert!(message.starts_with(path), "{fields}: {message}");
    }
}

#[tokio::test]
async fn t151_every_block_of_the_api_is_taken_named_or_refused() {
    let text = |text: &str| json!({"type": "text", "text": text});
    let pdf = json!({"type": "base64", "media_type": "application/pdf", "data": "aGkh"});
    let found = json!({"type": "search_result", "source": "https://example.com/a", "title": "T", "content": [text("CANARY")]});
    let cited = {
        let mut found = found.clone();
        found["citations"] = json!({"enabled": true});
        found
    };
    let said = "Search result: T\\nSource: https://example.com/a\\n\\nCANARY";
    // What a user says, what is named, and what of it the CLI's stdin has.
    let rows = vec![
        (json!([text("CANARY")]), "", r#"{"type":"text","text":"CANARY"}"#),
        (json!([found, text("?")]), "", said),
        (json!([cited, text("?")]), "messages.citations", said),
        (
            json!([{"type": "document", "source": pdf, "title": "T"}, text("?")]),
            "",
            r#""media_type":"application/pdf","data":"aGkh""#,
        ),
        (
            json!([{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "CANARY"}}, text("?")]),
            "",
            r#"{"type":"text","media_type":"text/plain","data":"CANARY"}"#,
        ),
        (
            json!([{"type": "document", "source": {"type": "content", "content": [text("CANARY"), text("B")]}}, text("?")]),
            "",
            r#""data":"CANARY\n\nB""#,
        ),
        (
            json!([{"type": "document", "citations": {"enabled": false}, "source": {"type": "content", "content": "CANARY"}}]),
            "",
            r#""data":"CANARY""#,
        ),
        (json!([{"type": "tool_result", "tool_use_id": "t", "content": [found]}]), "", said),
    ];
    for (content, named, expected) in rows {
        let (reply, seen) = ask(&json!({"messages": [{"role": "user", "content": content}]})).await;
        assert_eq!(reply.status, 200, "{content}: {reply:?}");
        assert_eq!(reply.header("x-gaoler-ignored").unwrap_or_default(), named, "{content}");
        let stdin = seen.expect("a run").stdin;
        assert!(stdin.contains(expected), "{content}: {stdin}");
    }
    // What an earlier answer may hold: told where the CLI has words for it, named where not.
    let histories = vec![
        (json!([text("CANARY")]), "", true),
        (json!([text("CANARY"), {"type": "tool_use", "id": "t", "name": "x", "input": {}}]), "", true),
        (
            json!([{"type": "thinking", "thinking": "t", "signature": "s"}, text("CANARY")]),
            "messages.thinking",
            true,
        ),
        (json!([{"type": "redacted_thinking", "data": "d"}, text("CANARY")]), "messages.thinking", true),
        (
            json!([
                {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "q"}},
                {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
                text("CANARY"),
            ]),
            "messages.assistant.other",
            true,
        ),
        (json!([{"type": "container_upload", "file_id": "f"}]), "messages.assistant.other", false),
    ];
    for (content, named, told) in histories {
        let messages = json!([
            {"role": "user", "content": "q1"}, {"role": "assistant", "content": content},
            {"role": "user", "content": "q2"},
        ]);
        let (reply, seen) = ask(&json!({ "messages": messages })).await;
        assert_eq!(reply.status, 200, "{content}: {reply:?}");
        assert_eq!(reply.header("x-gaoler-ignored").unwrap_or_default(), named, "{content}");
        let options = seen.expect("a run").options;
        let transcript = options.iter().find(|(section, _)| *section == Section::Transcript);
        assert_eq!(transcript.is_some_and(|(_, text)| text.contains("CANARY")), told, "{content}");
    }
    // In the middle of a conversation the operator's words join the system prompt.
    let messages = json!([
        {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"},
        {"role": "system", "content": [text("CANARY")]}, {"role": "user", "content": "q2"},
    ]);
    let (_, seen) = ask(&json!({"system": "first", "messages": messages})).await;
    assert_eq!(seen.expect("a run").options[0], (Section::System, "first\n\nCANARY".to_owned()));
    for (content, path) in [
        (
            json!([{"type": "image", "source": {"type": "url", "url": "https://x"}}]),
            "messages[0].content[0].source.type: url",
        ),
        (
            json!([{"type": "image", "source": {"type": "file", "file_id": "f"}}]),
            "messages[0].content[0].source.type: ",
        ),
        (
            json!([{"type": "document", "source": {"type": "url", "url": "https://x"}}]),
            "messages[0].content[0].source.type: url",
        ),
        (
            json!([{"type": "document", "source": {"type": "file", "file_id": "f"}}]),
            "messages[0].content[0].source.type: ",
        ),
        (
            json!([{"type": "document", "source": {"type": "content", "content": [{"type": "image"}]}}]),
            "messages[0].content[0].source.content[0].type: ",
        ),
        (
            json!([{"type": "search_result", "source": "s", "title": "t", "content": "c"}]),
            "messages[0].content[0].content: ",
        ),
        (
            json!([{"type": "container_upload", "file_id": "f"}]),
            "messages[0].content[0].type: not supported here",
        ),
        (json!([{"type": "thinking", "thinking": "t"}]), "messages[0].content[0].type: not supported here"),
        (
            json!([{"type": "tool_use", "id": "t", "name": "x", "input": {}}]),
            "messages[0].content[0].type: not supported here",
        ),
    ] {
        let (reply, seen) = ask(&json!({"messages": [{"role": "user", "content": content}]})).await;
        assert_eq!((reply.status, seen.is_none()), (400, true), "{content}");
        let message = reply.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert!(message.starts_with(path), "{content}: {message}");
    }
}

#[tokio::test]
async fn t152_tokens_are_estimated_without_a_run_and_the_answer_says_so() {
    let house = House::new(settings(120), vec![]).await;
    let line = "POST /v1/messages/count_tokens HTTP/1.1\r\n";
    let count = async |head: &str, body: &str| house.request(&format!("{line}{head}"), body.as_bytes()).await;
    let short = count(BEARER, r#"{"model":"sonnet","messages":[{"role":"user","content":"Hello"}]}"#).await;
    assert_eq!((short.status, short.header("x-gaoler-estimate")), (200, Some("true")));
    assert_eq!(
        short.json().as_object().map(|fields| fields.keys().cloned().collect::<Vec<_>>()),
        Some(vec!["input_tokens".to_owned()])
    );
    let long = format!(r#"{{"messages":[{{"role":"user","content":"{}"}}]}}"#, "word ".repeat(1000));
    let long = count(BEARER, &long).await.json()["input_tokens"].as_u64().expect("a number");
    assert!((1000..2000).contains(&long), "{long}");
    for (head, body, status, code) in [
        ("", "{}", 401, "credential_missing"),
        (BEARER, "{}", 400, "invalid_request"),
        (BEARER, r#"{"model":"gpt-4","messages":[{"role":"user","content":"x"}]}"#, 404, "model_not_found"),
    ] {
        let reply = count(head, body).await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code), "{body}");
    }
}

#[tokio::test]
async fn t153_a_head_that_is_too_large_is_told_so_in_the_form_that_was_asked() {
    let house = House::new(settings(120), vec![plain()]).await;
    // The largest one that is taken, to a few bytes.
    let fits = format!("{BEARER}x-filler: {}\r\n", "x".repeat(65_000));
    let body = r#"{"messages":[{"role":"user","content":"Hello"}]}"#;
    let head = |path: &str, fields: &str| format!("POST {path} HTTP/1.1\r\n{fields}");
    assert_eq!(house.request(&head("/v1/messages", &fits), body.as_bytes()).await.status, 200);
    for size in [66_000, 100_000, 150_000] {
        let fields = format!("{BEARER}x-filler: {}\r\n", "x".repeat(size));
        let reply = house.request(&head("/v1/messages", &fields), body.as_bytes()).await;
        assert_eq!((reply.status, reply.code().as_str()), (431, "head_too_large"), "{size}");
        assert_eq!(
            reply.json()["request_id"].as_str().map(str::to_lowercase).as_deref(),
            reply.header("request-id")
        );
        let reply = house.request(&head("/v1/chat/completions", &fields), body.as_bytes()).await;
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (431, &json!("head_too_large")), "{size}");
    }
    // In its path as well.
    let long = format!("GET /{} HTTP/1.1\r\nx-filler: {}\r\n", "x".repeat(60_000), "x".repeat(6_000));
    let reply = house.request(&long, b"").await;
    assert_eq!((reply.status, reply.code().as_str()), (431, "head_too_large"));
    // One that fills what is read of any head gets a bare answer, and nobody waits for its end.
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", house.port)).await.expect("a connection");
    let endless = format!("GET /health HTTP/1.1\r\nhost: x\r\nx-filler: {}", "x".repeat(250_000));
    let _ = stream.write_all(endless.as_bytes()).await;
    let mut bytes = vec![0; 32];
    let read = tokio::time::timeout(fake::LONG, stream.read(&mut bytes)).await.expect("in time").unwrap_or(0);
    let answer = String::from_utf8_lossy(&bytes[..read]).into_owned();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
}

#[tokio::test]
async fn t159_results_whose_run_is_gone_are_history_or_words() {
    let tools = json!([{"name": "weather", "input_schema": {"type": "object"}}]);
    let result = json!({"type": "tool_result", "tool_use_id": "toolu_1", "content": "snow in Oslo"});
    let history = |last: Value| {
        json!([
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}]},
            {"role": "user", "content": last},
        ])
    };
    for (last, prompt) in
        [(json!([result]), "Go on."), (json!([result, {"type": "text", "text": "and now?"}]), "and now?")]
    {
        let (reply, seen) = ask(&json!({"tools": tools, "messages": history(last)})).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let seen = seen.expect("a run");
        // The call and its result are earlier turns, under the name that the CLI gives the tool.
        let (_, transcript) =
            seen.options.iter().find(|(section, _)| *section == Section::Transcript).expect("one");
        let lines: Vec<Value> =
            transcript.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines.len(), 3, "{transcript}");
        assert_eq!(lines[1]["message"]["content"][0]["name"], "mcp__client__weather");
        let told = &lines[2]["message"]["content"];
        assert_eq!((&told[0]["type"], &told[0]["tool_use_id"]), (&json!("tool_result"), &json!("toolu_1")));
        assert_eq!(told[0]["content"][0]["text"], "snow in Oslo");
        let stdin: Vec<Value> =
            seen.stdin.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(stdin[0]["request"]["sdkMcpServers"], json!(["client"]));
        assert_eq!(stdin[1]["message"]["content"], json!([{"type": "text", "text": prompt}]));
    }
    // A session's history is the CLI's own, so what came of the call is said in words.
    let id = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";
    let (_, seen) =
        ask(&json!({"session_id": id, "tools": tools, "messages": history(json!([result]))})).await;
    let stdin = seen.expect("a run").stdin;
    assert!(stdin.contains("The call toolu_1 gave:") && stdin.contains("snow in Oslo"), "{stdin}");
    assert!(!stdin.contains("tool_result"), "{stdin}");
}
