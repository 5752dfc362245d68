//! The parser of tenants' JSON, row by row.

use super::*;

fn with(field: &str) -> String {
    format!(
        r#"{{{field}{}"messages":[{{"role":"user","content":"hi"}}]}}"#,
        if field.is_empty() { "" } else { "," }
    )
}

fn job(body: &str) -> Job {
    parse(body.as_bytes(), &[]).unwrap_or_else(|e| panic!("{}: {body}", e.message))
}

#[test]
fn a_bad_request_names_the_path_of_what_is_wrong() {
    let check = |body: &str, status: u16, message: &str| {
        let error = parse(body.as_bytes(), &[]).expect_err(body);
        assert_eq!((error.status, error.message.as_str()), (status, message), "{body}");
    };
    let messages = |m: &str| format!(r#"{{"messages":{m}}}"#);
    check("", 400, "The body is not valid JSON: line 1, column 0.");
    check("{\"a\":\n]", 400, "The body is not valid JSON: line 2, column 1.");
    check("\"x\"", 400, "The body must be a JSON object.");
    check("{}", 400, "messages: field required.");
    check(&messages("null"), 400, "messages: field required.");
    check(&messages("7"), 400, "messages: must be an array, not a number.");
    check(&messages("[]"), 400, "messages: at least one message is required.");
    check(&messages("[1]"), 400, "messages[0]: must be an object, not a number.");
    check(&messages(r#"[{"content":"x"}]"#), 400, "messages[0].role: field required.");
    check(
        &messages(r#"[{"role":"tool","content":"x"}]"#),
        400,
        "messages[0].role: must be user, assistant or system.",
    );
    check(&messages(r#"[{"role":"user"}]"#), 400, "messages[0].content: field required.");
    check(&messages(r#"[{"role":"user","content":" "}]"#), 400, "messages[0].content: must not be empty.");
    check(
        &messages(r#"[{"role":"user","content":5}]"#),
        400,
        "messages[0].content: must be a string or an array of blocks, not a number.",
    );
    check(
        &messages(r#"[{"role":"user","content":[{"type":"text","text":1}]}]"#),
        400,
        "messages[0].content[0].text: must be a string, not a number.",
    );
    check(
        &messages(r#"[{"role":"user","content":[{"type":"audio"}]}]"#),
        400,
        "messages[0].content[0].type: not supported here. A user's blocks are text, image, document, search_result and tool_result.",
    );
    check(
        &messages(
            r#"[{"role":"user","content":[{"type":"image","source":{"type":"url","url":"https://x"}}]}]"#,
        ),
        400,
        "messages[0].content[0].source.type: url images are not fetched here; send the image as base64.",
    );
    check(
        &messages(
            r#"[{"role":"user","content":[{"type":"image","source":{"type":"base64","media_type":"image/svg+xml","data":"AAAA"}}]}]"#,
        ),
        400,
        "messages[0].content[0].source.media_type: must be one of image/jpeg, image/png, image/gif, image/webp.",
    );
    check(
        &messages(
            r#"[{"role":"user","content":[{"type":"image","source":{"type":"base64","media_type":"image/png","data":"A\nAA"}}]}]"#,
        ),
        400,
        "messages[0].content[0].source.data: must be base64 without line breaks.",
    );
    check(
        &messages(r#"[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]"#),
        400,
        "messages: the last message must be the user's.",
    );
    check(&with(r#""stream":"yes""#), 400, "stream: must be a boolean, not a string.");
    check(&with(r#""max_tokens":-1"#), 400, "max_tokens: must be a whole number, 0 or more.");
    check(&with(r#""max_tokens":0"#), 400, "max_tokens: must be at least 1.");
    check(&with(r#""max_turns":10001"#), 400, "max_turns: must be at most 10000.");
    check(
        &with(r#""system":{"a":1}"#),
        400,
        "system: must be a string or an array of text blocks, not an object.",
    );
    check(&with(r#""system":[{"type":"image"}]"#), 400, "system[0].type: must be \"text\".");
    check(
        &with(r#""thinking":{"type":"maybe"}"#),
        400,
        "thinking.type: must be enabled, adaptive or disabled.",
    );
    check(&with(r#""oauth_credentials":{}"#), 400, "oauth_credentials.access_token: field required.");
    check(
        &with(r#""session_id":"6F1C0F0E8D2B4C7E9A510C2D3E4F5A6B""#),
        400,
        "session_id: must be a UUID such as 6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b.",
    );
}

#[test]
fn a_model_is_an_alias_or_a_full_id_and_nothing_that_could_be_an_option() {
    let check = |name: &str, known: bool| {
        let body = with(&format!("\"model\":{}", serde_json::to_string(name).expect("a string")));
        match parse(body.as_bytes(), &[]) {
            Ok(job) => assert!(known && job.model.as_str() == name, "{name}"),
            Err(error) => assert!(!known && error.status == 404, "{name}"),
        }
    };
    for name in ["opus", "sonnet", "haiku", "claude-sonnet-5", "claude-3.5-x", "claude-opus-4-8[1m]"] {
        check(name, true);
    }
    for name in [
        "",
        "gpt-4",
        "claude-",
        "claude-UPPER",
        "claude-x y",
        "--model",
        "claude-x[2m]",
        "opus[1m]",
        "claude-/../x",
    ] {
        check(name, false);
    }
    check(&format!("claude-{}", "a".repeat(80)), false);
    assert_eq!(job(&with("")).model.as_str(), "sonnet");
}

#[test]
fn a_name_of_the_operators_is_the_model_that_it_stands_for() {
    let listed =
        |id: &str, model: &str| ListedModel { id: id.into(), model: model.into(), ..Default::default() };
    let names = [listed("gpt-4o", "haiku"), listed("claude-old", "claude-new"), listed("claude-plain", "")];
    for (name, model) in [
        ("gpt-4o", Some("haiku")),
        ("claude-old", Some("claude-new")),
        ("claude-plain", Some("claude-plain")),
        ("claude-other", Some("claude-other")),
        ("opus", Some("opus")),
        ("gpt-4", None),
        ("", None),
    ] {
        let body = with(&format!("\"model\":\"{name}\""));
        let found = parse(body.as_bytes(), &names).map(|job| job.model.as_str().to_owned());
        assert_eq!(found.map_err(|error| error.status), model.map(str::to_owned).ok_or(404), "{name}");
        let found =
            completions::parse(body.as_bytes(), None, &names).map(|job| job.model.as_str().to_owned());
        assert_eq!(found.map_err(|error| error.status), model.map(str::to_owned).ok_or(404), "{name}");
    }
}

#[test]
fn what_has_no_effect_is_named() {
    let check =
        |field: &str, expected: &str| assert_eq!(job(&with(field)).ignored.join(","), expected, "{field}");
    check("", "");
    for name in WITHOUT_EFFECT {
        check(&format!("\"{name}\":1"), name);
    }
    check(r#""top_p":1,"unheard_of":{},"metadata":{"user_id":"u"}"#, "metadata,top_p,unheard_of");
    check(r#""bad name\r\nx-evil: 1":1,"ümlaut":2"#, "other");
    check(r#""thinking":{"type":"enabled","budget_tokens":1024}"#, "thinking.budget_tokens");
    check(r#""container":"c""#, "container");
    let many: String = (0..100).map(|i| format!("\"k{i}\":1,")).collect();
    assert_eq!(job(&with(many.trim_end_matches(','))).ignored.len(), IGNORED_MAX + 1);
}

#[test]
fn neighbours_of_one_role_are_one_turn_and_a_session_needs_no_history() {
    let body = r#"{"messages":[{"role":"user","content":"a"},{"role":"user","content":"b"},
        {"role":"assistant","content":[{"type":"thinking","thinking":"t","signature":"s"},{"type":"text","text":"c"},
          {"type":"tool_use","id":"t1","name":"x","input":{"k":[1]}}]},
        {"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":"r"}]},
        {"role":"user","content":"d"}]SESSION}"#;
    let stateless = job(&body.replace("SESSION", ""));
    let shape: Vec<_> = stateless.earlier.iter().map(|turn| (turn.role, turn.blocks.len())).collect();
    assert_eq!(shape, [(Role::User, 2), (Role::Assistant, 2)]);
    assert_eq!(stateless.prompt.len(), 2);
    assert_eq!(stateless.ignored, ["messages.thinking"]);
    let session = job(&body.replace("SESSION", r#","session_id":"6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b""#));
    assert!(session.earlier.is_empty());
    assert_eq!(session.ignored, ["messages.thinking", "messages.earlier"]);
}

#[test]
fn an_image_alone_gets_a_text() {
    let image = r#"{"type":"image","source":{"type":"base64","media_type":"image/png","data":"AAAA"}}"#;
    let prompt =
        |blocks: &str| job(&format!(r#"{{"messages":[{{"role":"user","content":[{blocks}]}}]}}"#)).prompt;
    assert_eq!(prompt(image).len(), 2);
    assert_eq!(prompt(&format!(r#"{image},{{"type":"text","text":" "}}"#)).len(), 2);
    assert_eq!(prompt(&format!(r#"{image},{{"type":"text","text":"what?"}}"#)).len(), 2);
    let document =
        r#"{"type":"document","source":{"type":"text","media_type":"text/plain","data":"D"},"title":"T"}"#;
    assert!(matches!(&prompt(document)[0], Block::Document { title: Some(t), .. } if t == "T"));
}

#[test]
fn the_refresh_token_is_not_kept_and_seconds_are_told_from_milliseconds() {
    let credential = |rest: &str| {
        let field =
            format!(r#""oauth_credentials":{{"access_token":"sk-ant-oat01-x","refresh_token":"R"{rest}}}"#);
        job(&with(&field)).credential.expect("a credential")
    };
    assert_eq!(format!("{:?}", credential("")), "BodyCredential(..)");
    assert_eq!(credential("").expires_at_ms, None);
    assert_eq!(credential(r#","expires_at":1762444195608"#).expires_at_ms, Some(1_762_444_195_608));
    assert_eq!(credential(r#","expires_at":1762444195"#).expires_at_ms, Some(1_762_444_195_000));
}
