//! The document against the code: routes, fields, errors, and what the parser takes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use gaoler_protocol::{Refusal, Refused, RunId};
use serde_json::{Value, json};

use super::*;
use crate::frontend::error::ApiError;
use crate::frontend::job;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// The frontend's sources but for tests and for these documents.
fn sources() -> Vec<String> {
    let mut folders = vec![folder().join("src/frontend")];
    let mut texts = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") && !path.ends_with("tests.rs") {
                let text = std::fs::read_to_string(&path).expect("a source");
                texts.push(text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned());
            }
        }
    }
    assert!(texts.len() > 10);
    texts
}

/// The text between a quote at the beginning and the next one.
fn quoted(text: &str) -> Option<&str> {
    text.trim_start().strip_prefix('"')?.split('"').next()
}

fn schema(name: &str) -> &'static Value {
    let schema = &openapi::document()["components"]["schemas"][name];
    assert!(schema.is_object(), "{name}");
    schema
}

fn validator(name: &str) -> jsonschema::Validator {
    let document = openapi::document();
    let root = json!({"$ref": format!("#/components/schemas/{name}"), "components": document["components"]});
    jsonschema::validator_for(&root).expect("a schema")
}

fn set<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    names.into_iter().map(ToOwned::to_owned).collect()
}

#[test]
fn the_document_that_is_checked_in_is_the_one_that_is_served() {
    let path = folder().join("docs/openapi.json");
    if std::env::var_os("GAOLER_TEST_BLESS").is_some() {
        std::fs::write(&path, openapi::text()).expect("written");
    }
    let kept: Value =
        serde_json::from_slice(&std::fs::read(&path).expect("docs/openapi.json")).expect("JSON");
    assert_eq!(
        &kept,
        openapi::document(),
        "if this is meant: GAOLER_TEST_BLESS=1 cargo test --lib the_document_that_is_checked_in"
    );
}

#[test]
fn every_route_is_in_the_document_and_the_other_way_round() {
    let mut routes = BTreeSet::new();
    for source in sources() {
        for after in source.split(".route(").skip(1) {
            let path = quoted(after).expect("a route's path is written where the route is made");
            let handlers = after.split_once(',').expect("a handler").1;
            let handlers =
                handlers.split(".route(").next().unwrap_or_default().split('\n').next().unwrap_or_default();
            let methods = ["get", "post", "put", "patch", "delete"];
            let methods = methods.into_iter().filter(|method| handlers.contains(&format!("{method}(")));
            // All of the rest of a path is one parameter of it.
            let path = path.replace("{*", "{");
            let methods: Vec<String> = methods.map(|method| format!("{method} {path}")).collect();
            assert!(!methods.is_empty(), "{path}: {handlers}");
            routes.extend(methods);
        }
    }
    let mut told = BTreeSet::new();
    for (path, item) in openapi::document()["paths"].as_object().expect("paths") {
        told.extend(item.as_object().expect("an item").keys().map(|method| format!("{method} {path}")));
    }
    assert_eq!(routes, told);
}

#[test]
fn every_operation_has_a_name_of_its_own() {
    let paths = openapi::document()["paths"].as_object().expect("paths");
    let operations: Vec<&Value> =
        paths.values().flat_map(|item| item.as_object().expect("an item").values()).collect();
    let names: BTreeSet<&str> =
        operations.iter().map(|it| it["operationId"].as_str().expect("a name")).collect();
    assert_eq!(names.len(), operations.len());
}

/// Names that functions of the parser read, by the function.
fn read_by(functions: &[&str]) -> BTreeSet<String> {
    let read = |name: &str| std::fs::read_to_string(folder().join("src/frontend").join(name)).expect(name);
    let text = ["job.rs", "job/blocks.rs", "job/mcp.rs", "job/tools.rs", "job/wishes.rs"].map(read).concat();
    let mut function = "";
    let mut names = BTreeSet::new();
    for line in text.lines() {
        let begins = line.strip_prefix("pub ").or_else(|| line.strip_prefix("pub(super) ")).unwrap_or(line);
        let begins = begins.strip_prefix("fn ");
        if let Some(begins) = begins {
            function = begins.split(['(', '<']).next().unwrap_or_default();
        }
        // A name that is an argument itself stands where it is given.
        let line = if line.starts_with("fn ") { "" } else { line };
        let taken = line.split("take(").skip(1).chain(line.split("parse_tokens_max(").skip(1));
        for name in taken.filter_map(|after| after.split_once(", ").and_then(|(_, after)| quoted(after))) {
            assert!(READERS.iter().any(|(known, _)| known.contains(&function)), "{function} reads {name}");
            if functions.contains(&function) {
                names.insert(name.to_owned());
            }
        }
    }
    names
}

/// Who reads what, and the schemas that say so.
const READERS: &[(&[&str], &[&str])] = &[
    (&["parse", "common", "messages", "servers", "wishes", "tools"], &["MessagesRequest"]),
    (&["question", "servers"], &["McpProbe"]),
    (&["one"], &["McpServer"]),
    (&["is_wanted"], &["McpTools"]),
    (&["with_name"], &["McpListed"]),
    (&["parse_thinking"], &["Thinking"]),
    (&["parse_output"], &["OutputConfig"]),
    (&["parse_format", "parse_schema"], &["OutputFormat"]),
    (&["parse_tool"], &["Tool"]),
    (&["parse_credential"], &["OauthCredentials"]),
    (&["parse_messages"], &["UserMessage", "AssistantMessage", "SystemMessage"]),
    (
        &[
            "text_block",
            "parse_block",
            "parse_image",
            "parse_document",
            "parse_media",
            "parse_tool_result",
            "parse_search_result",
            "parse_content_source",
        ],
        &[
            "SearchResultBlock",
            "ContentSource",
            "TextBlock",
            "ImageBlock",
            "DocumentBlock",
            "ToolUseBlock",
            "ToolResultBlock",
            "ImageSource",
            "DocumentSource",
            "TextSource",
        ],
    ),
];

#[test]
fn every_field_that_is_read_is_described_and_the_other_way_round() {
    for (functions, schemas) in READERS {
        let read = read_by(functions);
        let mut described = BTreeSet::new();
        for (name, field) in
            schemas.iter().flat_map(|name| schema(name)["properties"].as_object().expect("an object"))
        {
            // A field that nobody reads is described where people send it, and marked.
            if field.get(messages::IGNORED).is_none() || read.contains(name) {
                described.insert(name.clone());
            }
        }
        assert_eq!(read, described, "{functions:?}");
    }
    let limits = schema("Limits")["properties"].as_object().expect("an object");
    assert_eq!(set(gaoler_protocol::Limits::NAMES), set(limits.keys().map(String::as_str)));
    let marked = |(name, field): (&String, &Value)| field.get(messages::IGNORED).map(|_| name.clone());
    let marked: BTreeSet<String> = schema("MessagesRequest")["properties"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(marked)
        .collect();
    assert_eq!(marked, set(job::WITHOUT_EFFECT.iter().copied()));
}

#[test]
fn every_error_has_its_row_and_every_row_its_error() {
    let table: BTreeSet<(u16, String)> = errors::NO_ROUTE
        .iter()
        .chain(errors::MESSAGES)
        .chain(errors::NO_RUN)
        .chain(errors::KEPT)
        .chain(errors::OPERATORS)
        .map(|row| (row.status, row.code.to_owned()))
        .collect();
    let tables = [errors::NO_ROUTE, errors::MESSAGES, errors::NO_RUN, errors::KEPT, errors::OPERATORS];
    let rows: usize = tables.iter().map(|rows| rows.len()).sum();
    assert_eq!(table.len(), rows, "a row comes twice");
    let files: BTreeSet<_> = errors::FILES.iter().map(|row| (row.status, row.code.to_owned())).collect();
    assert_eq!(files.len(), errors::FILES.len(), "a row comes twice");
    let table: BTreeSet<_> = table.union(&files).cloned().collect();
    // What the program over files says has its own table, every row of which is one of these.
    let told = gaoler_files::Code::ALL.iter().map(|code| code.told());
    let mut made: BTreeSet<_> = told.map(|(status, code)| (status, code.to_owned())).collect();
    assert!(made.is_subset(&files), "{made:?}");
    for source in sources() {
        for after in source.split("ApiError::new(").skip(1) {
            let Some((status, after)) = after.split_once(',') else { continue };
            if let (Ok(status), Some(code)) = (status.trim().parse(), quoted(after)) {
                made.insert((status, code.to_owned()));
            }
        }
        for (maker, status) in [("ApiError::internal(", 500), ("ApiError::unauthenticated(", 401)] {
            made.extend(source.split(maker).skip(1).filter_map(quoted).map(|code| (status, code.to_owned())));
        }
        // An error that is another one's with a code of its own.
        made.extend(
            source.split("ApiError { code:").skip(1).filter_map(quoted).map(|code| (429, code.to_owned())),
        );
    }
    made.retain(|(_, code)| !errors::UNSENT.contains(&code.as_str()));
    assert_eq!(made, table);
}

#[test]
fn whatever_a_refusal_or_the_upstream_becomes_is_in_the_table() {
    let known = |error: &ApiError| {
        let found = errors::MESSAGES.iter().any(|row| (row.status, row.code) == (error.status, error.code));
        assert!(found, "{} {}", error.status, error.code);
    };
    for &reason in Refusal::ALL {
        for errno in [0, 13, 401, 403, 429, 500, 529] {
            known(&ApiError::refused(&Refused { run: RunId([1; 16]), reason, step: 0, errno }));
        }
    }
    known(&ApiError::upstream(None, ""));
    for status in 300..600 {
        known(&ApiError::upstream(Some(status), "it said so"));
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_schema_is_referred_to() {
    fn walk(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(place)) = fields.get("$ref") {
                    let pointer = place.strip_prefix('#').expect("inside the document");
                    assert!(openapi::document().pointer(pointer).is_some(), "{place}");
                    found.insert(place.clone());
                }
                fields.values().for_each(|value| walk(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| walk(value, found)),
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    walk(openapi::document(), &mut found);
    for part in ["schemas", "headers"] {
        for name in openapi::document()["components"][part].as_object().expect("components").keys() {
            assert!(found.contains(&format!("#/components/{part}/{name}")), "nothing refers to {name}");
        }
    }
}

#[test]
fn the_schema_takes_what_the_parser_takes() {
    let validator = validator("MessagesRequest");
    let check = |fields: &str, takes: bool| {
        let text = match fields.contains("\"messages\"") {
            true => format!("{{{fields}}}"),
            false => format!(
                r#"{{{fields}{}"messages":[{{"role":"user","content":"hi"}}]}}"#,
                if fields.is_empty() { "" } else { "," }
            ),
        };
        let value: Value = serde_json::from_str(&text).expect("JSON");
        let parsed = job::parse(text.as_bytes(), &[]);
        assert_eq!(parsed.is_ok(), takes, "the parser: {text}: {:?}", parsed.err());
        let errors: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert_eq!(errors.is_empty(), takes, "the schema: {text}: {errors:?}");
    };
    let says = |role: &str, content: &str| {
        format!(r#""messages":[{{"role":"{role}","content":{content}}},{{"role":"user","content":"hi"}}]"#)
    };
    let nulls: Vec<String> = schema("MessagesRequest")["properties"]
        .as_object()
        .expect("an object")
        .keys()
        .filter(|name| *name != "messages")
        .map(|name| format!("\"{name}\":null"))
        .collect();
    check(&nulls.join(","), true);
    for good in [
        "",
        r#""model":"opus""#,
        r#""model":"claude-sonnet-5[1m]""#,
        r#""system":"be brief""#,
        r#""system":[{"type":"text","text":"be brief","cache_control":{"type":"ephemeral"}}]"#,
        r#""stream":true"#,
        r#""session_id":"6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b""#,
        r#""thinking":{"type":"enabled","budget_tokens":2048}"#,
        r#""thinking":{"type":"disabled"}"#,
        r#""workspace_id":"default""#,
        r#""workspace_id":"6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b""#,
        r#""output_config":{"effort":"xhigh","format":{"type":"json_schema","schema":{"type":"object"}}}"#,
        r#""output_config":{"format":null}"#,
        r#""output_format":{"type":"json_schema","schema":{}}"#,
        r#""max_budget_usd":0.25"#,
        r#""max_budget_usd":4000"#,
        r#""on_disconnect":"continue""#,
        r#""tools":[{"type":"custom","name":"a-b_C","description":null,"input_schema":{"type":"object"}}]"#,
        r#""tools":[{"type":null,"name":"a","input_schema":{}},{"type":"web_search_20250305","name":"web_search"}]"#,
        r#""tool_choice":{"type":"none"}"#,
        r#""max_turns":0"#,
        r#""max_turns":10000"#,
        r#""security_level":"PARANOID""#,
        r#""security_level":"developer""#,
        r#""limits":{"memory_mib":600,"wall_ms":4294967295}"#,
        r#""limits":{}"#,
        r#""oauth_credentials":{"access_token":"sk-ant-oat01-abcdefgh","refresh_token":"x","expires_at":1762444195608,"scopes":["user:inference"],"subscription_type":"max"}"#,
        r#""max_tokens":1"#,
        r#""mcp_servers":{"a":{"command":"npx","args":["-y","x"],"env":{"DEBUG":"true"}}},"skip_mcp_permissions":true"#,
        r#""mcp_servers":{"a":{"url":"https://a.example/sse","transport":"sse","auth_type":"jwt","auth_token":"x"}}"#,
        r#""mcp_servers":[{"type":"url","name":"a","url":"https://a.example","authorization_token":"x","tool_configuration":{"enabled":true}}]"#,
        r#""mcp_servers":{"a":{"type":"stdio","command":"x"},"b":{"type":"http","url":"https://b.example","headers":{"x":"y"}},"c":{"catalog":"c"}}"#,
        r#""temperature":0.5,"stop_sequences":["x"],"tools":[],"unknown":{}"#,
    ] {
        check(good, true);
    }
    for (role, content) in [
        ("user", r#""text""#),
        (
            "user",
            r#"[{"type":"text","text":"x"},{"type":"image","source":{"type":"base64","media_type":"image/png","data":"aGk="}}]"#,
        ),
        (
            "user",
            r#"[{"type":"document","title":null,"context":"c","source":{"type":"base64","media_type":"application/pdf","data":"aGkh"}}]"#,
        ),
        ("user", r#"[{"type":"document","source":{"type":"text","media_type":"text/plain","data":""}}]"#),
        (
            "user",
            r#"[{"type":"tool_result","tool_use_id":"t","content":[{"type":"text","text":"x"}],"is_error":true}]"#,
        ),
        ("user", r#"[{"type":"tool_result","tool_use_id":"t"}]"#),
        (
            "user",
            r#"[{"type":"document","source":{"type":"content","content":"x"},"citations":{"enabled":true}}]"#,
        ),
        (
            "user",
            r#"[{"type":"document","source":{"type":"content","content":[{"type":"text","text":"x"}]}}]"#,
        ),
        (
            "user",
            r#"[{"type":"search_result","source":"https://x","title":"t","content":[{"type":"text","text":"x"}]}]"#,
        ),
        ("assistant", r#""""#),
        ("assistant", r#"[{"type":"thinking","thinking":"t","signature":"s"},{"type":"text","text":"x"}]"#),
        ("assistant", r#"[{"type":"tool_use","id":"t","name":"Bash","input":{}}]"#),
        ("assistant", r#"[{"type":"novel"}]"#),
        ("system", r#""be brief""#),
        ("system", "null"),
    ] {
        check(&says(role, content), true);
    }
    for bad in [
        r#""messages":[]"#,
        r#""messages":null"#,
        r#""messages":{}"#,
        r#""model":7"#,
        r#""model":"gpt-4""#,
        r#""model":"sonnet[1m]""#,
        r#""model":"claude-""#,
        r#""system":7"#,
        r#""system":[{"type":"image"}]"#,
        r#""stream":"yes""#,
        r#""session_id":"x""#,
        r#""session_id":"00000000-0000-0000-0000-000000000000""#,
        r#""session_id":"6f1c0f0e8d2b4c7e9a510c2d3e4f5a6b""#,
        r#""thinking":{}"#,
        r#""thinking":{"type":"perhaps"}"#,
        r#""thinking":{"type":"enabled","budget_tokens":-1}"#,
        r#""output_config":{"effort":"much"}"#,
        r#""mcp_servers":7"#,
        r#""mcp_servers":{"a b":{"command":"x"}}"#,
        r#""mcp_servers":{"a":{}}"#,
        r#""mcp_servers":{"a":{"command":"x","url":"https://a.example"}}"#,
        r#""mcp_servers":{"a":{"command":"x","args":[1]}}"#,
        r#""mcp_servers":{"a":{"url":"https://a.example","transport":"ws"}}"#,
        r#""mcp_servers":[{"url":"https://a.example"}]"#,
        r#""skip_mcp_permissions":"yes""#,
        r#""workspace_id":"x""#,
        r#""workspace_id":"../default""#,
        r#""workspace_id":"00000000-0000-0000-0000-000000000000""#,
        r#""output_config":{"format":{"type":"json_schema"}}"#,
        r#""output_config":{"format":{"type":"text","schema":{}}}"#,
        r#""output_format":{"type":"json_schema","schema":[]}"#,
        r#""max_budget_usd":0"#,
        r#""max_budget_usd":-1"#,
        r#""max_budget_usd":4000.5"#,
        r#""max_budget_usd":"much""#,
        r#""on_disconnect":"perhaps""#,
        r#""tools":[{"name":"a b","input_schema":{}}]"#,
        r#""tools":[{"name":"a"}]"#,
        r#""tools":[{"input_schema":{}}]"#,
        r#""tools":[{"name":"a","input_schema":[]}]"#,
        r#""tools":{}"#,
        r#""tool_choice":{"type":"perhaps"}"#,
        r#""tool_choice":"auto""#,
        r#""max_turns":10001"#,
        r#""max_turns":-1"#,
        r#""security_level":"LAX""#,
        r#""limits":{"nice":1}"#,
        r#""limits":{"tasks":0}"#,
        r#""limits":{"tasks":null}"#,
        r#""limits":{"tasks":4294967296}"#,
        r#""oauth_credentials":{}"#,
        r#""oauth_credentials":{"access_token":"x","expires_at":"soon"}"#,
        r#""max_tokens":0"#,
        r#""max_tokens":"many""#,
    ] {
        check(bad, false);
    }
    for (role, content) in [
        ("tool", r#""x""#),
        ("user", r#""""#),
        ("user", r#"" ""#),
        ("user", "[]"),
        ("user", "7"),
        ("user", "null"),
        ("user", r#"[{"type":"audio"}]"#),
        ("user", r#"[{"type":"text"}]"#),
        ("user", r#"[{"type":"image","source":{"type":"url","url":"https://example.com/x"}}]"#),
        ("user", r#"[{"type":"image","source":{"type":"base64","media_type":"image/tiff","data":"aGk="}}]"#),
        ("user", r#"[{"type":"image","source":{"type":"base64","media_type":"image/png","data":"aGk"}}]"#),
        ("user", r#"[{"type":"image","source":{"type":"base64","media_type":"image/png","data":""}}]"#),
        ("user", r#"[{"type":"document","source":{"type":"text"}}]"#),
        ("user", r#"[{"type":"document","source":{"type":"content","content":[{"type":"image"}]}}]"#),
        ("user", r#"[{"type":"document","source":{"type":"content"}}]"#),
        ("user", r#"[{"type":"document","source":{"type":"file","file_id":"file_1"}}]"#),
        ("user", r#"[{"type":"search_result","source":"x","content":[]}]"#),
        ("user", r#"[{"type":"search_result","source":"x","title":"t","content":"x"}]"#),
        ("user", r#"[{"type":"container_upload","file_id":"file_1"}]"#),
        ("user", r#"[{"type":"tool_result","tool_use_id":""}]"#),
        (
            "user",
            r#"[{"type":"tool_result","tool_use_id":"t","content":[{"type":"tool_result","tool_use_id":"u"}]}]"#,
        ),
        ("user", r#"[{"type":"tool_use","id":"t","name":"Bash","input":{}}]"#),
        ("assistant", r#"[{"type":"tool_use","id":"t","name":"","input":{}}]"#),
        ("assistant", r#"[{"type":"tool_use","id":"t","name":"Bash","input":[]}]"#),
        ("assistant", r#"[{"type":"text","text":7}]"#),
        ("system", r#"[{"type":"image"}]"#),
    ] {
        check(&says(role, content), false);
    }
}

#[test]
fn the_schema_of_completions_takes_the_tools_that_its_parser_takes() {
    let validator = validator("CompletionsRequest");
    let check = |field: &str, takes: bool| {
        let text = format!(r#"{{{field},"messages":[{{"role":"user","content":"hi"}}]}}"#);
        let value: Value = serde_json::from_str(&text).expect("JSON");
        let parsed = job::completions::parse(text.as_bytes(), None, &[]);
        assert_eq!(parsed.is_ok(), takes, "the parser: {text}: {:?}", parsed.err());
        let errors: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert_eq!(errors.is_empty(), takes, "the schema: {text}: {errors:?}");
    };
    for good in [
        r#""tools":null,"tool_choice":null,"parallel_tool_calls":null,"functions":null"#,
        r#""tools":[]"#,
        r#""tools":[{"type":"function","function":{"name":"a-b_C"}}]"#,
        r#""tools":[{"type":"function","function":{"name":"a","description":null,"parameters":null,"strict":null}}]"#,
        r#""tools":[{"type":"function","function":{"name":"a","parameters":{"type":"object"},"strict":true}}]"#,
        r#""tools":[{"type":"custom","custom":{"name":"grammar"}}]"#,
        r#""tool_choice":"none""#,
        r#""tool_choice":"required""#,
        r#""tool_choice":{"type":"function","function":{"name":"a"}}"#,
        r#""tool_choice":{"type":"allowed_tools","allowed_tools":{"mode":"auto","tools":[]}}"#,
        r#""parallel_tool_calls":false"#,
        r#""functions":[{"name":"a"}],"function_call":"auto""#,
    ] {
        check(good, true);
    }
    for bad in [
        r#""tools":{}"#,
        r#""tools":[7]"#,
        r#""tools":[{}]"#,
        r#""tools":[{"type":7}]"#,
        r#""tools":[{"type":"function"}]"#,
        r#""tools":[{"type":"function","function":{}}]"#,
        r#""tools":[{"type":"function","function":{"name":"a b"}}]"#,
        r#""tools":[{"type":"function","function":{"name":"a","parameters":[]}}]"#,
        r#""tools":[{"type":"function","function":{"name":"a","strict":"yes"}}]"#,
        r#""tool_choice":"any""#,
        r#""tool_choice":{}"#,
        r#""tool_choice":{"type":"tool"}"#,
        r#""tool_choice":7"#,
        r#""parallel_tool_calls":"no""#,
        r#""function_call":{"name":"a"}"#,
    ] {
        check(bad, false);
    }
}

fn posture(base: &str, embedded: bool) -> guide::Posture {
    guide::Posture {
        health: json!({"version": "1", "status": "healthy", "embedded": embedded}),
        security: json!({
            "tier": "kernel", "guarantees": [], "layers": [], "landlock_abi": 6, "cgroup": 2, "level": "balanced",
            "level_maximum": "balanced", "operator_file": false, "credentials": "broker",
        }),
        base: base.to_owned(),
    }
}

#[test]
fn every_example_is_a_request_that_is_taken() {
    let request = validator("MessagesRequest");
    let guide = guide::guide(posture("http://127.0.0.1:8080", true));
    assert!(validator("Guide").is_valid(&guide), "{:?}", validator("Guide").iter_errors(&guide).next());
    let curls = guide["examples"].as_array().expect("examples").iter();
    let bodies =
        curls.filter_map(|row| Some(row["curl"].as_str()?.split_once("-d '")?.1.trim_end_matches('\'')));
    let bodies = bodies.map(|body| serde_json::from_str::<Value>(body).expect("JSON"));
    let patterns = guide["patterns"].as_array().expect("patterns").iter();
    let requests = patterns.flat_map(|pattern| pattern["requests"].as_array().expect("requests").clone());
    let shown = &openapi::document()["paths"]["/v1/messages"]["post"]["requestBody"]["content"]["application/json"]
        ["examples"];
    let shown = shown.as_object().expect("examples").values().map(|example| example["value"].clone());
    let all: Vec<Value> = bodies.chain(requests).chain(shown).collect();
    assert!(all.len() >= 10, "{all:#?}");
    for body in all {
        assert!(request.is_valid(&body), "{body}");
        assert!(job::parse(body.to_string().as_bytes(), &[]).is_ok(), "{body}");
    }
    // What a session spares: 10 texts instead of 1 + 3 + 5 + ... + 19.
    assert_eq!(guide["patterns"][0]["sent"]["tokens_in_requests"], 10_000);
    assert_eq!(guide["patterns"][1]["sent"]["tokens_in_requests"], 1_000);
}

#[test]
fn the_page_says_what_the_guide_says_and_nothing_of_it_is_markup() {
    let mut guide = guide::guide(posture("http://x", false));
    guide["what"] = json!("<script>alert('\"&')</script>");
    let page = guide::page(&guide);
    assert!(page.contains("&lt;script&gt;alert(&#39;&quot;&amp;&#39;)&lt;/script&gt;"), "{page}");
    assert!(!page.contains("<script"), "{page}");
    for path in openapi::paths() {
        assert!(page.contains(&format!("<code>{path}</code>")), "{path}");
    }
    for name in ["messages", "session_id", "x-gaoler-level"] {
        assert!(page.contains(&format!("<code>{name}</code>")), "{name}");
    }
    // Every element that was opened is closed.
    for element in ["details", "table", "ul", "main", "pre", "tr", "div"] {
        let count = |mark: String| page.matches(&mark).count();
        let opened = count(format!("<{element}>")) + count(format!("<{element} "));
        assert_eq!(opened, count(format!("</{element}>")), "{element}");
    }
}

#[test]
fn a_browser_gets_the_page_and_a_program_json() {
    let check = |accept: &[&str], expected: bool| {
        let headers =
            accept.iter().map(|value| (header::ACCEPT, HeaderValue::from_str(value).expect("a value")));
        assert_eq!(wants_page(&headers.collect()), expected, "{accept:?}");
    };
    check(&[], false);
    check(&["*/*"], false);
    check(&["application/json"], false);
    check(&["text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"], true);
    check(&["TEXT/HTML"], true);
    check(&["text/plain", "text/html"], true);
    check(&["text/html;q=0"], false);
    check(&["text/html; q=0.4, application/json; q=0.9"], false);
    check(&["text/html; q=nonsense"], true);
    check(&["text/htmlx"], false);
}

#[test]
fn examples_name_the_address_that_was_used_and_nothing_else() {
    let check = |host: &str, is_tls: bool, expected: &str| {
        let headers = [(header::HOST, HeaderValue::from_str(host).expect("a value"))];
        assert_eq!(base(&headers.into_iter().collect(), is_tls), expected, "{host}");
    };
    check("127.0.0.1:9000", false, "http://127.0.0.1:9000");
    check("gaoler.example.com", true, "https://gaoler.example.com");
    check("[::1]:8080", false, "http://[::1]:8080");
    for odd in ["", "a b", "a'; rm -rf /", "a/b", "user@host", "<b>", &"a".repeat(262)] {
        check(odd, false, "http://127.0.0.1:8080");
    }
    assert_eq!(base(&HeaderMap::new(), true), "https://127.0.0.1:8080");
}
