//! What a client of the frontend sees, status by status and byte by byte, without a cage.
//! It must never wait by sleeping: every wait ends with what it waits for, or with a liveness bound.

mod fake;

use std::sync::Arc;

use fake::{BEARER, House, LONG, Play, Script, Until, drain, recorded, send, settings};
use gaoler_protocol::{Conversation, Effort, Kind, Level, Limits, Message, Reason, Refusal, Section};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

const HELLO: &str = r#"{"messages":[{"role":"user","content":"Hello"}]}"#;
const HELLO_STREAMED: &str = r#"{"stream":true,"messages":[{"role":"user","content":"Hello"}]}"#;

async fn house(scripts: Vec<Script>) -> House {
    House::new(settings(120), scripts).await
}

fn plays(name: &str) -> Script {
    Script::Play(Play::of(recorded(name)))
}

/// Replaces the random letters of ids, so that bytes can be compared.
fn named(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = ["msg_01", "req_01"].iter().filter_map(|p| rest.find(p)).min() {
        out.push_str(&rest[..at + 6]);
        rest = &rest[at + 6 + 22..];
    }
    out.push_str(rest);
    match out.find("\"run_id\":\"") {
        Some(at) => out.replace(&out[at + 10..at + 42].to_string(), "RUN"),
        None => out,
    }
}

#[tokio::test]
async fn w01_a_json_answer_has_the_shape_of_the_api() {
    let house = house(vec![plays("plain")]).await;
    let reply = house.messages(HELLO).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert!(reply.header("request-id").is_some_and(|id| id.starts_with("req_01") && id.len() == 28));
    let mut json = reply.json();
    for number in ["input_tokens", "output_tokens"] {
        assert!(json["usage"][number].as_u64().is_some_and(|n| n > 0));
        json["usage"][number] = 0.into();
    }
    assert!(json["x_cost"]["total_cost_usd"].is_f64());
    json["x_cost"] = serde_json::Value::Null;
    json["model"] = "MODEL".into();
    assert_eq!(
        named(&json.to_string()),
        concat!(
            r#"{"container":null,"content":[{"citations":null,"text":"[embedded] Hello","type":"text"}],"#,
            r#""id":"msg_01","model":"MODEL","role":"assistant","run_id":"RUN","session_id":null,"#,
            r#""stop_details":null,"stop_reason":"end_turn","stop_sequence":null,"type":"message","#,
            r#""usage":{"cache_creation":{"ephemeral_1h_input_tokens":0,"ephemeral_5m_input_tokens":0},"#,
            r#""cache_creation_input_tokens":0,"cache_read_input_tokens":0,"input_tokens":0,"output_tokens":0,"#,
            r#""server_tool_use":null,"service_tier":"standard"},"x_cost":null}"#
        )
    );
}

const STREAM: &str = r#"{"type":"system","subtype":"init","claude_code_version":"2.1.330"}
{"type":"stream_event","event":{"type":"message_start","message":{"id":"m1","model":"claude-x","usage":{"input_tokens":3,"output_tokens":1}}},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"one"}},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"content_block_stop","index":0},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"t1","name":"Bash","input":{}}},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{}"}},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"content_block_stop","index":1},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"message_delta","delta":{"stop_reason":"tool_use"},"usage":{"output_tokens":7}},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"message_stop"},"parent_tool_use_id":null}
{"type":"user","message":{"role":"user","content":[{"tool_use_id":"t1","type":"tool_result","content":"x"}]}}
{"type":"stream_event","event":{"type":"message_start","message":{"id":"m2","model":"claude-x","usage":{"input_tokens":9,"output_tokens":1}}},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"two\n"}},"parent_tool_use_id":null}
"#;
const STREAM_END: &str = r#"{"type":"stream_event","event":{"type":"content_block_stop","index":0},"parent_tool_use_id":null}
{"type":"stream_event","event":{"type":"message_stop"},"parent_tool_use_id":null}
{"type":"result","subtype":"success","is_error":false,"api_error_status":null,"stop_reason":"end_turn","result":"two","usage":{"input_tokens":12,"output_tokens":14},"total_cost_usd":0.5}
"#;

const EVENTS: &str = r#"event: message_start
data: {"type":"message_start","message":{"id":"msg_01","type":"message","role":"assistant","model":"claude-x","content":[],"stop_reason":null,"stop_sequence":null,"stop_details":null,"container":null,"usage":{"input_tokens":3,"output_tokens":1,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"cache_creation":{"ephemeral_5m_input_tokens":0,"ephemeral_1h_input_tokens":0},"server_tool_use":null,"service_tier":"standard"},"session_id":null,"run_id":"RUN"}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"one"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: content_block_start
data: {"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"two\n"}}

event: content_block_stop
data: {"type":"content_block_stop","index":1}

"#;
const EVENTS_END: &str = r#"event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"input_tokens":12,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":14},"x_cost":{"total_cost_usd":0.5}}

event: message_stop
data: {"type":"message_stop"}

"#;

#[tokio::test]
async fn w02_two_turns_are_one_message_in_exact_bytes() {
    let house = house(vec![Script::Play(Play::of(format!("{STREAM}{STREAM_END}")))]).await;
    let reply = house.messages(HELLO_STREAMED).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    assert_eq!(reply.header("x-accel-buffering"), Some("no"));
    assert_eq!(named(&reply.body), format!("{EVENTS}{EVENTS_END}"));
}

#[tokio::test]
async fn w03_a_failure_after_the_first_byte_is_an_error_event() {
    let house = house(vec![Script::Play(Play::of(STREAM).until(Until::Now))]).await;
    let reply = house.messages(HELLO_STREAMED).await;
    assert_eq!(reply.status, 200);
    let error = concat!(
        "event: error\ndata: {\"error\":{\"details\":{\"error_code\":\"cli_exited\"},\"message\":",
        "\"The CLI ended without a result.\",\"type\":\"api_error\"},\"request_id\":\"req_01\",\"type\":\"error\"}\n\n"
    );
    assert_eq!(named(&reply.body), format!("{EVENTS}{error}"));
}

#[tokio::test]
async fn w04_the_end_of_an_answer_follows_exit() {
    let told = Arc::new(Notify::new());
    let play = Play::of(format!("{STREAM}{STREAM_END}")).until(Until::Told(Arc::clone(&told)));
    let mut house = house(vec![Script::Play(play)]).await;
    let head = format!("POST /v1/messages HTTP/1.1\r\n{BEARER}");
    // With a session, whose run is let end by itself.
    let body = HELLO_STREAMED.replacen('{', r#"{"session_id":"6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b","#, 1);
    let mut stream = house.connect(&head, body.as_bytes()).await;
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains("two") {
        assert!(stream.read_buf(&mut bytes).await.expect("read") > 0);
    }
    // The run has given its result; only its Exit is missing, and the end of the message waits for it.
    assert!(!String::from_utf8_lossy(&bytes).contains("message_stop"));
    told.notify_one();
    tokio::time::timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("in time").expect("read");
    assert!(String::from_utf8_lossy(&bytes).contains("message_stop"));
    assert!(!house.seen().await.lease_dropped);
}

#[tokio::test]
async fn w05_a_refusal_of_the_supervisor_has_its_status() {
    let rows = [
        (Refusal::Busy, 0, 529, "overloaded_error", Some("5"), None),
        (Refusal::TenantsFull, 0, 529, "overloaded_error", Some("60"), None),
        (Refusal::CredentialRefused, 401, 401, "authentication_error", None, None),
        (Refusal::UpstreamUnavailable, 0, 503, "api_error", Some("5"), None),
        (Refusal::UpstreamUnavailable, 529, 529, "overloaded_error", Some("10"), None),
        (Refusal::UpstreamUnavailable, 429, 429, "rate_limit_error", Some("10"), None),
        (Refusal::UpstreamUnavailable, 403, 403, "permission_error", None, None),
        (Refusal::LevelUnavailable, 0, 403, "permission_error", None, None),
        (Refusal::Draining, 0, 503, "api_error", Some("5"), None),
        (Refusal::CageFailed, 13, 500, "api_error", None, None),
        (Refusal::ExecFailed, 2, 500, "api_error", None, None),
        (Refusal::SessionBusy, 0, 409, "conflict_error", None, Some("false")),
        (Refusal::Unacceptable, 0, 500, "api_error", None, None),
        (Refusal::EgressFailed, 0, 500, "api_error", None, None),
    ];
    let house = house(rows.iter().map(|row| Script::Refuse(row.0, row.1)).collect()).await;
    for (reason, _, status, kind, retry_after, should_retry) in rows {
        let reply = house.messages(HELLO).await;
        assert_eq!((reply.status, reply.json()["error"]["type"].as_str()), (status, Some(kind)), "{reason}");
        assert_eq!(reply.json()["request_id"].as_str(), reply.json()["request_id"].as_str(), "{reason}");
        assert_eq!(reply.header("retry-after"), retry_after, "{reason}");
        assert_eq!(reply.header("x-should-retry"), should_retry, "{reason}");
    }
}

#[tokio::test]
async fn w06_a_bad_request_is_refused_in_the_apis_form_and_starts_nothing() {
    let deep = format!("{{\"messages\":{}{}}}", "[".repeat(200), "]".repeat(200));
    let cases: Vec<(&str, &[u8], u16, &str)> = vec![
        ("", b"{", 401, "credential_missing"),
        ("authorization: Bearer nonsense\r\n", b"{}", 401, "invalid_token_format"),
        ("authorization: Basic c2s6c2s=\r\n", b"{}", 401, "invalid_token_format"),
        ("x-api-key: sk-ant-ort01-refresh-token\r\n", b"{}", 401, "invalid_token_format"),
        (BEARER, b"{", 400, "invalid_request"),
        (BEARER, b"[]", 400, "invalid_request"),
        (BEARER, b"", 400, "invalid_request"),
        (BEARER, b"{\"messages\":\"\xff\"}", 400, "invalid_request"),
        (BEARER, deep.as_bytes(), 400, "invalid_request"),
        (BEARER, br#"{"model":"gpt-4","messages":[{"role":"user","content":"x"}]}"#, 404, "model_not_found"),
        (
            BEARER,
            br#"{"session_id":"x","messages":[{"role":"user","content":"x"}]}"#,
            400,
            "invalid_session_id",
        ),
        (
            BEARER,
            br#"{"security_level":"DEVELOPER","messages":[{"role":"user","content":"x"}]}"#,
            403,
            "level_not_allowed",
        ),
    ];
    let house = house(vec![]).await;
    for (head, body, status, code) in cases {
        // Without a credential the body is looked at first, for it may hold one: so it must be whole there.
        let body = if head.is_empty() { HELLO.as_bytes() } else { body };
        let reply = house.request(&format!("POST /v1/messages HTTP/1.1\r\n{head}"), body).await;
        assert_eq!(
            (reply.status, reply.code().as_str()),
            (status, code),
            "{}",
            String::from_utf8_lossy(body)
        );
        assert_eq!(
            reply.json()["request_id"].as_str().map(str::to_lowercase).as_deref(),
            reply.header("request-id")
        );
    }
}

#[tokio::test]
async fn w07_paths_methods_and_encodings() {
    let house = house(vec![plays("plain"), plays("plain")]).await;
    let check = async |line: &str, expected: u16| {
        let reply = house.request(&format!("{line} HTTP/1.1\r\n{BEARER}"), HELLO.as_bytes()).await;
        assert_eq!(reply.status, expected, "{line}");
        assert!(reply.header("request-id").is_some(), "{line}");
        reply
    };
    check("POST /v1/messages?beta=true", 200).await;
    check("POST /prefix/v1/messages", 200).await;
    assert_eq!(check("GET /v1/messages", 405).await.json()["error"]["type"], "invalid_request_error");
    assert_eq!(check("POST /v1/nothing", 404).await.json()["error"]["type"], "not_found_error");
    assert_eq!(check("GET /favicon.ico", 404).await.code(), "not_found");
    check("HEAD /", 200).await;
    let health = check("GET /health", 200).await.json();
    assert_eq!((&health["status"], &health["security_level"]), (&"healthy".into(), &"BALANCED".into()));
    assert_eq!((&health["tier"], &health["level"]), (&"kernel".into(), &"balanced".into()));
    assert_eq!(check("GET /livez", 200).await.body, r#"{"status":"alive"}"#);
    assert_eq!(check("GET /readyz", 200).await.body, r#"{"status":"ready"}"#);
    check("POST /readyz", 405).await;
    let security = check("GET /v1/security", 200).await.json();
    assert_eq!((&security["tier"], &security["layers"][0]["name"]), (&"kernel".into(), &"uid".into()));
    assert_eq!((&security["level"], &security["operator_file"]), (&"balanced".into(), &false.into()));
    assert_eq!(security["guarantees"].as_array().map(Vec::len), Some(7));
    let gzip = format!("POST /v1/messages HTTP/1.1\r\n{BEARER}content-encoding: gzip\r\n");
    let reply = house.request(&gzip, b"\x1f\x8b").await;
    assert_eq!((reply.status, reply.code().as_str()), (415, "request_body_encoding_unsupported"));
}

#[tokio::test]
async fn w17_a_request_may_tighten_its_level_and_its_limits_and_never_loosen_them() {
    let mut settings = settings(120);
    settings.level.maximum = "developer".into();
    // Headers, fields of the body, and the level and limits that the supervisor is asked for.
    let none = Limits::NONE;
    let rows = [
        ("", "", Level::Balanced, none),
        ("x-gaoler-level: paranoid\r\n", "", Level::Paranoid, none),
        ("X-Gaoler-Level: DEVELOPER\r\n", "", Level::Developer, none),
        ("x-gaoler-level: developer\r\n", r#""security_level":"PARANOID","#, Level::Paranoid, none),
        ("x-gaoler-limits: tasks=9\r\n", "", Level::Balanced, Limits { tasks: 9, ..none }),
        (
            "x-gaoler-limits: tasks=9, wall_ms=5\r\n",
            r#""limits":{"tasks":7},"#,
            Level::Balanced,
            Limits { tasks: 7, wall_ms: 5, ..none },
        ),
    ];
    let mut house = House::new(settings, rows.iter().map(|_| plays("plain")).collect()).await;
    let ask = async |house: &House, headers: &str, fields: &str| {
        let body = format!(r#"{{{fields}"messages":[{{"role":"user","content":"Hello"}}]}}"#);
        house.request(&format!("POST /v1/messages HTTP/1.1\r\n{BEARER}{headers}"), body.as_bytes()).await
    };
    for (headers, fields, level, limits) in rows {
        let reply = ask(&house, headers, fields).await;
        assert_eq!(
            (reply.status, reply.header("x-gaoler-level")),
            (200, Some(level.name())),
            "{headers}{fields}"
        );
        let said = reply.header("x-gaoler-limits").expect("the limits in force").to_owned();
        let spawn = house.seen().await.spawn;
        assert_eq!((spawn.level, spawn.limits), (level, limits), "{headers}{fields}");
        assert!(said.starts_with("memory_mib=") && said.split(',').count() == Limits::NAMES.len(), "{said}");
    }
    for (headers, fields, place) in [
        ("x-gaoler-level: lax\r\n", "", "x-gaoler-level: must be"),
        ("x-gaoler-level: \r\n", "", "x-gaoler-level: must be"),
        ("", r#""security_level":"LAX","#, "security_level: must be"),
        ("x-gaoler-limits: nice=1\r\n", "", "x-gaoler-limits: the limits are"),
        ("x-gaoler-limits: tasks=0\r\n", "", "x-gaoler-limits: a limit is"),
        ("", r#""limits":{"tasks":-1},"#, "limits: a limit is"),
        ("", r#""limits":7,"#, "limits: must be an object"),
    ] {
        let reply = ask(&house, headers, fields).await;
        let message = reply.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert_eq!(reply.status, 400, "{headers}{fields}: {message}");
        assert!(message.starts_with(place), "{message}");
    }
}

#[tokio::test]
async fn w08_a_body_of_33_megabytes_is_too_large() {
    let house = house(vec![]).await;
    let body = vec![b' '; 33 * 1024 * 1024];
    let reply = house.request(&format!("POST /v1/messages HTTP/1.1\r\n{BEARER}"), &body).await;
    assert_eq!((reply.status, reply.code().as_str()), (413, "request_too_large"));
    assert_eq!(reply.json()["error"]["type"], "request_too_large");
}

#[tokio::test]
async fn w09_a_client_that_goes_away_drops_the_lease() {
    let quiet = || Script::Play(Play::of("").until(Until::LeaseDrops));
    let begun = || Script::Play(Play::of(STREAM).until(Until::LeaseDrops));
    let mut house = house(vec![plays("plain"), quiet(), quiet(), begun()]).await;
    // Whoever goes away before it is known who they are has no run at all.
    assert_eq!(house.messages(HELLO).await.status, 200);
    house.seen().await;
    let head = format!("POST /v1/messages HTTP/1.1\r\n{BEARER}");
    for (body, words) in [(HELLO, ""), (HELLO_STREAMED, ""), (HELLO_STREAMED, "two")] {
        let mut stream = house.connect(&head, body.as_bytes()).await;
        let mut bytes = Vec::new();
        while !String::from_utf8_lossy(&bytes).contains(words) {
            assert!(stream.read_buf(&mut bytes).await.expect("read") > 0);
        }
        drop(stream);
        let seen = house.seen().await;
        assert!(seen.lease_dropped);
        assert!(!seen.stdin.contains("control_request"), "nothing polite for a client that is gone");
    }
}

#[tokio::test]
async fn w10_silence_of_the_upstream_is_interrupted_and_then_ended() {
    let silent = Play::of("{\"type\":\"system\",\"subtype\":\"init\"}\n").until(Until::LeaseDrops);
    let mut house = House::new(settings(1), vec![Script::Play(silent)]).await;
    let reply = house.messages(HELLO).await;
    assert_eq!((reply.status, reply.code().as_str()), (504, "upstream_silent"));
    assert_eq!(reply.header("x-should-retry"), Some("false"));
    let seen = house.seen().await;
    assert!(seen.lease_dropped);
    let interrupt =
        r#"{"type":"control_request","request_id":"gaoler-interrupt","request":{"subtype":"interrupt"}}"#;
    assert_eq!(seen.stdin.lines().nth(1), Some(interrupt));
}

#[tokio::test]
async fn w11_a_cli_that_prints_garbage_floods_crashes_or_complains_is_an_error() {
    let flood = vec![b'x'; 17 * 1024 * 1024];
    let play = |bytes: &[u8]| Script::Play(Play::of(bytes).until(Until::LeaseDrops));
    let noisy = Play { stderr: vec![b'e'; 300 * 1024], ..Play::of(recorded("plain")) };
    let reason = |reason| Script::Play(Play { reason, ..Play::of("").until(Until::Now) });
    let past = |limits, stdout: &[u8], stderr: &[u8]| {
        let play = Play::of(stdout).until(Until::LeaseDrops);
        Script::Play(Play { limits, stderr: stderr.into(), ..play })
    };
    let (idle, output) = (Limits { idle_ms: 50, ..Limits::NONE }, Limits { output_mib: 1, ..Limits::NONE });
    let lines = b"{\"type\":\"novel\"}\n".repeat(100_000);
    let ledger =
        "{\"host\":\"a.example\",\"port\":443,\"connections\":1,\"bytes_up\":2,\"bytes_down\":3}\nodd\n";
    let traded = Play { ledger, ..Play::of(recorded("plain")) };
    let rows = vec![
        (past(idle, b"", b""), 504, "idle_limit"),
        (past(idle, &lines, b""), 504, "idle_limit"),
        (past(output, &lines, b""), 500, "output_limit"),
        (past(output, b"", &[b'e'; 1_100_000]), 500, "output_limit"),
        (Script::Play(traded), 200, ""),
        (play(b"hello world\n"), 500, "cli_garbage"),
        (play(b"{\"type\":7}\n"), 500, "cli_garbage"),
        (play(b"{\"type\":\"\xff\"}\n"), 500, "cli_garbage"),
        (play(&flood), 500, "cli_garbage"),
        (Script::Play(noisy), 200, ""),
        (reason(Reason::Exited), 500, "cli_exited"),
        (reason(Reason::Signaled), 500, "cli_exited"),
        (reason(Reason::Oom), 500, "memory_limit"),
        (reason(Reason::Wall), 504, "wall_limit"),
        (reason(Reason::EgressDied), 500, "egress_died"),
        (reason(Reason::Drained), 503, "draining"),
    ];
    let (scripts, expected): (Vec<_>, Vec<_>) =
        rows.into_iter().map(|(script, status, code)| (script, (status, code))).unzip();
    let house = house(scripts).await;
    for (row, (status, code)) in expected.into_iter().enumerate() {
        let reply = house.messages(HELLO).await;
        let got = if reply.status == 200 { String::new() } else { reply.code() };
        assert_eq!((reply.status, got.as_str()), (status, code), "row {row}");
    }
}

#[tokio::test]
async fn w12_what_the_real_cli_said_of_each_error_has_its_status() {
    let rows = [
        ("err400", 400, "invalid_request_error"),
        ("err401", 401, "authentication_error"),
        ("err403", 403, "permission_error"),
        ("err404", 404, "not_found_error"),
        ("err413", 413, "request_too_large"),
        ("err429", 429, "rate_limit_error"),
        ("err500", 500, "api_error"),
        ("err529", 529, "overloaded_error"),
        ("ratelimit_rejected", 429, "rate_limit_error"),
        ("refused_connection", 503, "api_error"),
        ("control_interrupt_silent", 500, "api_error"),
    ];
    let house = house(rows.iter().map(|row| plays(row.0)).collect()).await;
    for (name, status, kind) in rows {
        let reply = house.messages(HELLO).await;
        assert_eq!((reply.status, reply.json()["error"]["type"].as_str()), (status, Some(kind)), "{name}");
        assert!(!reply.body.contains("sk-ant-"), "{name}");
        if name == "ratelimit_rejected" {
            assert_eq!(reply.code(), "plan_limit");
            assert_eq!(reply.header("x-should-retry"), Some("false"));
            assert!(reply.header("retry-after").is_some());
        }
    }
}

#[tokio::test]
async fn w13_a_request_becomes_a_spawn_a_prompt_and_sealed_options() {
    let mut house = house(vec![plays("plain"), plays("plain")]).await;
    let body = r#"{"model":"claude-opus-4-8[1m]","max_tokens":5,"system":"Be terse.","temperature":1,"odd key":1,
        "output_config":{"effort":"low"},"max_turns":7,"oauth_credentials":{"access_token":"sk-ant-oat01-ignored-token"},
        "messages":[{"role":"user","content":"q1"},{"role":"assistant","content":"a1"},
        {"role":"system","content":"Now in French."},{"role":"user","content":[{"type":"text","text":"/cost"}]}]}"#;
    let reply = house.messages(body).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("x-gaoler-ignored"), Some("max_tokens,other,temperature"));
    let seen = house.seen().await;
    let spawn = seen.spawn;
    assert_eq!(
        (spawn.kind, spawn.level, spawn.conversation),
        (Kind::Cli, Level::Balanced, Conversation::Stateless)
    );
    assert_eq!(
        (spawn.effort, spawn.turns_max, spawn.model.as_str()),
        (Effort::Low, 7, "claude-opus-4-8[1m]")
    );
    assert!(!spawn.ephemeral && !spawn.proof);
    assert_eq!(seen.credential, b"\x01sk-ant-oat01-a-tenants-own-token");
    let prompt = r#"{"type":"user","message":{"role":"user","content":[{"type":"text","text":" /cost"}]}}"#;
    assert_eq!(seen.stdin, format!("{prompt}\n"));
    assert_eq!(seen.options[0], (Section::System, "Be terse.\n\nNow in French.".to_string()));
    let (Section::Transcript, transcript) = &seen.options[1] else { panic!("{:?}", seen.options) };
    assert_eq!(transcript.lines().count(), 2);
    let session = uuid(&spawn.session);
    assert!(transcript.lines().all(|line| line.contains(&session)));
    assert!(!reply.json()["session_id"].is_string());

    let id = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";
    let body = format!(
        r#"{{"session_id":"{id}","oauth_credentials":{{"access_token":"sk-ant-oat01-in-the-body",
        "refresh_token":"sk-ant-ort01-never-kept","expires_at":99999999999999,"scopes":["user:inference"],
        "subscription_type":"max"}},"messages":[{{"role":"user","content":"more"}}]}}"#
    );
    let reply = house.request("POST /v1/messages HTTP/1.1\r\n", body.as_bytes()).await;
    assert_eq!((reply.status, reply.json()["session_id"].as_str()), (200, Some(id)));
    let second = house.seen().await;
    assert_eq!(second.spawn.conversation, Conversation::Session);
    assert_eq!(uuid(&second.spawn.session), id);
    assert_eq!(second.credential, b"\x01sk-ant-oat01-in-the-body");
    assert!(second.spawn.tenant != spawn.tenant, "another token is another tenant");
    assert!(second.options.is_empty());
}

fn uuid(bytes: &[u8; 16]) -> String {
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[tokio::test]
async fn w14_a_frontend_ends_with_its_supervisor_and_on_a_malformed_frame() {
    let gone = house(vec![]).await;
    let House { control, frontend, .. } = gone;
    nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&*control), nix::sys::socket::Shutdown::Both)
        .expect("shut down");
    tokio::time::timeout(LONG, frontend).await.expect("in time").expect("ends");

    let bad: [&[u8]; 3] = [&[0; 256], b"short", &Message::Drained(gaoler_protocol::Empty {}).encode(9)];
    for frame in bad {
        let house = house(vec![]).await;
        gaoler_sys::channel::send(std::os::fd::AsFd::as_fd(&*house.control), frame, &[]).expect("sent");
        tokio::time::timeout(LONG, house.frontend).await.expect("in time").expect("ends");
    }
}

#[tokio::test]
async fn w15_a_drain_lets_runs_finish_and_then_says_so() {
    let told = Arc::new(Notify::new());
    let play = Play::of(STREAM).until(Until::GoesOn(Arc::clone(&told), STREAM_END.into()));
    let mut house = house(vec![Script::Play(play)]).await;
    let head = format!("POST /v1/messages HTTP/1.1\r\n{BEARER}");
    let mut stream = house.connect(&head, HELLO_STREAMED.as_bytes()).await;
    let mut idle = tokio::net::TcpStream::connect(("127.0.0.1", house.port)).await.expect("a connection");
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains("two") {
        assert!(stream.read_buf(&mut bytes).await.expect("read") > 0);
    }
    let mut fresh = from("127.0.0.1", house.port).await;
    // Accepted before the drain: whoever comes after it has been answered.
    assert!(is_answered(&mut from("127.0.0.1", house.port).await).await);
    send(&house.control, &drain(), &[]).await;
    let until = tokio::time::timeout(LONG, async {
        while house.request("GET /readyz HTTP/1.1\r\n", b"").await.status == 200 {}
    });
    until.await.expect("in time");
    // One that has not asked yet is told, an idle connection ends at once, a busy one with its answer.
    assert!(is_answered(&mut fresh).await);
    let _ = idle.write_all(b"").await;
    let mut rest = Vec::new();
    tokio::time::timeout(LONG, idle.read_to_end(&mut rest)).await.expect("in time").expect("read");
    let early = house.said.try_recv();
    assert!(early.is_err(), "nothing is drained while a run is alive: {early:?}");
    // Whoever comes now is told, each on a connection for one answer.
    for (line, status, body) in [
        ("GET /readyz", 503, r#"{"reason":"draining","status":"unready"}"#),
        ("GET /livez", 200, r#"{"status":"alive"}"#),
        ("GET /health", 200, r#""status":"draining""#),
        ("POST /v1/messages", 503, r#""error_code":"draining""#),
    ] {
        let mut late = tokio::net::TcpStream::connect(("127.0.0.1", house.port)).await.expect("a connection");
        let request = format!("{line} HTTP/1.1\r\nhost: x\r\n{BEARER}content-length: 0\r\n\r\n");
        late.write_all(request.as_bytes()).await.expect("written");
        let mut answer = Vec::new();
        tokio::time::timeout(LONG, late.read_to_end(&mut answer)).await.expect("in time").expect("read");
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(body),
            "{line}: {answer}"
        );
    }
    // One that says nothing is waited for by nobody.
    let _silent = tokio::net::TcpStream::connect(("127.0.0.1", house.port)).await.expect("a connection");
    told.notify_one();
    tokio::time::timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("in time").expect("read");
    assert!(String::from_utf8_lossy(&bytes).contains("message_stop"));
    let said = tokio::time::timeout(LONG, house.said.recv()).await.expect("in time");
    assert!(matches!(said, Some(Message::Drained(_))), "{said:?}");
}

/// POST /v1/chat/completions with more lines in its head.
async fn completions(house: &House, head: &str, body: &str) -> fake::Reply {
    let line = "POST /v1/chat/completions HTTP/1.1\r\n";
    house.request(&format!("{line}{BEARER}{head}"), body.as_bytes()).await
}

#[tokio::test]
async fn w18_models_are_listed_for_both_families_and_start_nothing() {
    let mut settings = settings(120);
    let (id, display_name) = ("claude-opus-4-8[1m]".to_string(), "Claude Opus 4.8".to_string());
    settings.models.list =
        vec![gaoler_policy::settings::ListedModel { id, display_name, ..Default::default() }];
    let house = House::new(settings, vec![]).await;
    let check =
        async |line: &str, head: &str| house.request(&format!("{line} HTTP/1.1\r\n{head}"), b"").await;
    let list = check("GET /v1/models", BEARER).await;
    assert_eq!((list.status, list.header("content-type")), (200, Some("application/json")));
    assert_eq!(list.header("x-request-id"), list.header("request-id"));
    let list = list.json();
    let ids: Vec<&str> =
        list["data"].as_array().expect("a list").iter().filter_map(|m| m["id"].as_str()).collect();
    assert_eq!(ids, ["opus", "sonnet", "haiku", "claude-opus-4-8[1m]"]);
    assert_eq!((&list["object"], &list["has_more"]), (&"list".into(), &false.into()));
    assert_eq!((&list["first_id"], &list["last_id"]), (&"opus".into(), &"claude-opus-4-8[1m]".into()));

    let page =
        check("GET /prefix/v1/models?limit=1&after_id=opus", "x-api-key: sk-ant-api03-a-good-key\r\n").await;
    assert_eq!(
        (page.json()["last_id"].as_str(), page.json()["has_more"].as_bool()),
        (Some("sonnet"), Some(true))
    );
    let one = check("GET /v1/models/claude-opus-4-8%5B1m%5D", BEARER).await.json();
    assert_eq!((&one["display_name"], &one["object"]), (&"Claude Opus 4.8".into(), &"model".into()));
    for (line, head, status, kind, code) in [
        ("GET /v1/models", "", 401, "authentication_error", "credential_missing"),
        (
            "GET /v1/models/opus",
            "authorization: Bearer no\r\n",
            401,
            "authentication_error",
            "invalid_token_format",
        ),
        ("GET /v1/models/gpt-4", BEARER, 404, "not_found_error", "model_not_found"),
        ("GET /v1/models?limit=0", BEARER, 400, "invalid_request_error", "invalid_request"),
        ("GET /v1/models/", BEARER, 404, "not_found_error", "not_found"),
        ("POST /v1/models", BEARER, 405, "invalid_request_error", "method_not_allowed"),
    ] {
        let reply = check(line, head).await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code), "{line}");
        assert_eq!(
            (&reply.json()["type"], &reply.json()["error"]["type"]),
            (&"error".into(), &kind.into()),
            "{line}"
        );
    }
    let wrong = check("GET /v1/models?limit=x", BEARER).await.json();
    assert_eq!(
        (&wrong["error"]["param"], &wrong["error"]["code"]),
        (&"limit".into(), &"invalid_request".into())
    );
    for line in ["HEAD /", "HEAD /api/hello", "GET /api/hello", "HEAD /v1/models"] {
        assert_eq!(check(line, BEARER).await.status, 200, "{line}");
    }
}

/// Replaces what differs from one completion to the next.
fn anonymous(text: &str) -> String {
    let mut out = text.to_string();
    for (before, after, length) in
        [("\"chatcmpl-", "\"", Some(22)), ("\"created\":", ",", None), ("\"run_id\":\"", "\"", Some(32))]
    {
        let (mut done, mut rest) = (String::new(), out.as_str());
        while let Some(at) = rest.find(before) {
            let end = rest[at + before.len()..].find(after).expect("an end");
            assert!(length.is_none_or(|length| length == end), "{rest}");
            done.push_str(&rest[..at + before.len()]);
            done.push('X');
            rest = &rest[at + before.len() + end..];
        }
        done.push_str(rest);
        out = done;
    }
    out
}

#[tokio::test]
async fn w19_a_completion_has_the_shape_of_its_dialect() {
    let house = house(vec![Script::Play(Play::of(format!("{STREAM}{STREAM_END}")))]).await;
    let reply = completions(&house, "", HELLO).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")), "{reply:?}");
    assert!(reply.header("x-gaoler-run").is_some_and(|run| reply.body.contains(run)));
    assert_eq!(reply.header("x-gaoler-level"), Some("balanced"));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs();
    assert!(reply.json()["created"].as_u64().is_some_and(|created| now - created < 60));
    assert_eq!(
        anonymous(&reply.body),
        concat!(
            r#"{"id":"chatcmpl-X","object":"chat.completion","created":X,"model":"claude-x","system_fingerprint":null,"#,
            r#""choices":[{"index":0,"message":{"role":"assistant","content":"one\n\ntwo\n","refusal":null},"#,
            r#""logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":12,"completion_tokens":14,"#,
            r#""total_tokens":26,"prompt_tokens_details":{"cached_tokens":0}},"session_id":null,"run_id":"X","#,
            r#""x_cost":{"total_cost_usd":0.5}}"#
        )
    );
}

#[tokio::test]
async fn w20_chunks_are_exact_bytes_and_usage_comes_last_where_it_is_asked_for() {
    let play = || Script::Play(Play::of(format!("{STREAM}{STREAM_END}")));
    let house = house(vec![play(), play()]).await;
    let chunk = |choices: &str, rest: &str| {
        format!(
            "data: {{\"id\":\"chatcmpl-X\",\"object\":\"chat.completion.chunk\",\"created\":X,\"model\":\"claude-x\",\
             \"system_fingerprint\":null,\"choices\":[{choices}]{rest}}}\n\n"
        )
    };
    let part = |delta: &str, reason: &str, rest: &str| {
        let choice =
            format!("{{\"index\":0,\"delta\":{{{delta}}},\"logprobs\":null,\"finish_reason\":{reason}}}");
        chunk(&choice, rest)
    };
    for (options, rest, last) in [
        ("", "", String::new()),
        (
            r#""stream_options":{"include_usage":true},"#,
            ",\"usage\":null",
            chunk(
                "",
                r#","usage":{"prompt_tokens":12,"completion_tokens":14,"total_tokens":26,"prompt_tokens_details":{"cached_tokens":0}},"x_cost":{"total_cost_usd":0.5}"#,
            ),
        ),
    ] {
        let reply = completions(&house, "", &HELLO_STREAMED.replacen('{', &format!("{{{options}"), 1)).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        assert_eq!(reply.header("content-type"), Some("text/event-stream; charset=utf-8"));
        assert_eq!(
            (reply.header("cache-control"), reply.header("x-accel-buffering")),
            (Some("no-cache"), Some("no"))
        );
        assert_eq!(reply.header("x-gaoler-ignored"), None);
        let expected = [
            part(r#""role":"assistant","content":"""#, "null", rest),
            part(r#""content":"one""#, "null", rest),
            part(r#""content":"\n\n""#, "null", rest),
            part(r#""content":"two\n""#, "null", rest),
            part("", "\"stop\"", rest),
            last,
            "data: [DONE]\n\n".to_string(),
        ];
        assert_eq!(anonymous(&reply.body), expected.concat());
    }
}

#[tokio::test]
async fn w21_errors_have_the_form_of_the_dialect_that_was_spoken() {
    let cut = Script::Play(Play::of(STREAM).until(Until::Now));
    let refused = |reason, errno| Script::Refuse(reason, errno);
    let scripts = vec![
        cut,
        refused(Refusal::SessionBusy, 0),
        refused(Refusal::Busy, 0),
        plays("err401"),
        plays("err529"),
    ];
    let house = house(scripts).await;
    let stream = completions(&house, "", HELLO_STREAMED).await;
    assert_eq!(stream.status, 200);
    let end = concat!(
        "data: {\"error\":{\"code\":\"cli_exited\",\"message\":\"The CLI ended without a result.\",",
        "\"param\":null,\"type\":\"api_error\"}}\n\n"
    );
    assert!(stream.body.ends_with(end) && !stream.body.contains("[DONE]"), "{}", stream.body);
    for (status, kind, code, retry_after, should_retry) in [
        (409, "conflict_error", "session_busy", None, Some("false")),
        (529, "overloaded_error", "busy", Some("5"), None),
        (401, "authentication_error", "credential_refused", None, None),
        (529, "overloaded_error", "upstream_overloaded", Some("10"), None),
    ] {
        let reply = completions(&house, "", HELLO).await;
        let error = &reply.json()["error"];
        assert_eq!((reply.status, &error["type"], &error["code"]), (status, &kind.into(), &code.into()));
        assert_eq!(
            (reply.header("retry-after"), reply.header("x-should-retry")),
            (retry_after, should_retry)
        );
        assert_eq!(reply.header("x-request-id"), reply.header("request-id"));
        assert_eq!(reply.json().as_object().map(serde_json::Map::len), Some(1), "{}", reply.body);
    }
    let none = "POST /v1/chat/completions HTTP/1.1\r\n";
    for (head, body, status, code, param) in [
        (none.to_string(), HELLO.to_string(), 401, "credential_missing", None),
        (
            format!("{none}authorization: Bearer sk-openai\r\n"),
            HELLO.into(),
            401,
            "invalid_token_format",
            None,
        ),
        (
            format!("{none}{BEARER}"),
            HELLO.replacen('{', r#"{"model":"gpt-4o","#, 1),
            404,
            "model_not_found",
            Some("model"),
        ),
        (format!("{none}{BEARER}"), r#"{"messages":[]}"#.into(), 400, "invalid_request", Some("messages")),
        (
            format!("{none}{BEARER}x-session-id: x\r\n"),
            HELLO.into(),
            400,
            "invalid_session_id",
            Some("x-session-id"),
        ),
        (
            format!("{none}{BEARER}x-gaoler-level: developer\r\n"),
            HELLO.into(),
            403,
            "level_not_allowed",
            None,
        ),
        (
            format!("{none}{BEARER}content-encoding: br\r\n"),
            HELLO.into(),
            415,
            "request_body_encoding_unsupported",
            None,
        ),
    ] {
        let reply = house.request(&head, body.as_bytes()).await;
        let error = &reply.json()["error"];
        assert_eq!(
            (reply.status, error["code"].as_str(), error["param"].as_str()),
            (status, Some(code), param)
        );
        assert!(error["message"].is_string() && error["type"].is_string(), "{}", reply.body);
    }
}

#[tokio::test]
async fn w22_a_completion_is_a_run_like_a_messages() {
    let mut house = house(vec![plays("plain"), plays("plain"), plays("plain")]).await;
    let body = r#"{"model":"claude-opus-4-8","max_completion_tokens":5,"reasoning_effort":"low","temperature":1,
        "max_turns":7,"chat_id":"c","session_id":"not-a-uuid","tools":[{"type":"custom","custom":{"name":"f"}}],
        "messages":[{"role":"system","content":"Be terse."},{"role":"user","content":"q1"},
        {"role":"assistant","content":"a1"},{"role":"developer","content":"Now in French."},
        {"role":"user","content":[{"type":"text","text":"/cost"}]}]}"#;
    let head = "x-gaoler-level: paranoid\r\nx-gaoler-limits: tasks=9\r\n";
    let reply = completions(&house, head, body).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let ignored = "session_id,max_completion_tokens,tools,chat_id,temperature";
    assert_eq!(reply.header("x-gaoler-ignored"), Some(ignored));
    assert_eq!(reply.header("x-gaoler-level"), Some("paranoid"));
    let seen = house.seen().await;
    let spawn = seen.spawn;
    assert_eq!((spawn.level, spawn.conversation), (Level::Paranoid, Conversation::Stateless));
    assert_eq!((spawn.effort, spawn.turns_max, spawn.model.as_str()), (Effort::Low, 7, "claude-opus-4-8"));
    assert_eq!(spawn.limits, Limits { tasks: 9, ..Limits::NONE });
    assert_eq!(seen.credential, b"\x01sk-ant-oat01-a-tenants-own-token");
    let prompt = r#"{"type":"user","message":{"role":"user","content":[{"type":"text","text":" /cost"}]}}"#;
    assert_eq!(seen.stdin, format!("{prompt}\n"));
    assert_eq!(seen.options[0], (Section::System, "Be terse.\n\nNow in French.".to_string()));
    assert_eq!(seen.options[1].0, Section::Transcript);

    let id = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";
    let reply = completions(&house, &format!("x-session-id: {id}\r\n"), body).await;
    assert_eq!((reply.status, reply.json()["session_id"].as_str()), (200, Some(id)));
    assert!(reply.header("x-gaoler-ignored").is_some_and(|names| names.contains("messages.earlier")));
    let second = house.seen().await;
    assert_eq!(
        (second.spawn.conversation, uuid(&second.spawn.session).as_str()),
        (Conversation::Session, id)
    );
    assert!(second.spawn.tenant == spawn.tenant, "one token is one tenant in both dialects");
    house.messages(HELLO).await;
    assert!(house.seen().await.spawn.tenant == spawn.tenant);
}

#[tokio::test]
async fn w23_reasoning_is_shown_where_thinking_is_asked_for() {
    let house = house((0..4).map(|_| plays("thinking")).collect()).await;
    let thinking = r#"{"thinking":{"type":"enabled"},"#;
    for (shown, body) in [(false, HELLO.to_string()), (true, HELLO.replacen('{', thinking, 1))] {
        let message = completions(&house, "", &body).await.json()["choices"][0]["message"].clone();
        assert_eq!(message["content"], "[embedded] deep");
        assert_eq!(message["reasoning_content"].as_str(), shown.then_some("deep"));
        let streamed = completions(&house, "", &body.replacen('{', r#"{"stream":true,"#, 1)).await.body;
        assert_eq!(streamed.contains(r#""delta":{"reasoning_content":"deep"}"#), shown, "{streamed}");
        assert!(!streamed.contains("signature"));
    }
}

#[tokio::test]
async fn w24_a_silent_stream_says_that_it_is_alive() {
    let house =
        house((0..2).map(|_| Script::Play(Play::of(STREAM).until(Until::LeaseDrops))).collect()).await;
    let listen = async |path: &str, sign: &str| {
        let head = format!("POST {path} HTTP/1.1\r\n{BEARER}");
        let mut stream = house.connect(&head, HELLO_STREAMED.as_bytes()).await;
        let mut bytes = Vec::new();
        let heard = async {
            while !String::from_utf8_lossy(&bytes).contains(sign) {
                assert!(stream.read_buf(&mut bytes).await.expect("read") > 0);
            }
        };
        tokio::time::timeout(LONG, heard).await.expect("in time");
    };
    tokio::join!(
        listen("/v1/messages", "event: ping\ndata: {\"type\":\"ping\"}\n\n"),
        listen("/v1/chat/completions", "\n: alive\n\n"),
    );
}

/// A connection from this address of ours.
async fn from(address: &str, port: u16) -> tokio::net::TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind(format!("{address}:0").parse().expect("an address")).expect("bound");
    let to = format!("127.0.0.1:{port}").parse().expect("an address");
    tokio::time::timeout(LONG, socket.connect(to)).await.expect("in time").expect("a connection")
}

/// Asks for the server's health on a connection that stays, and whether it says so.
async fn is_answered(stream: &mut tokio::net::TcpStream) -> bool {
    let asked = stream.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut bytes = Vec::new();
    let answered = async {
        while !String::from_utf8_lossy(&bytes).ends_with(r#"{"status":"alive"}"#) {
            if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                return false;
            }
        }
        true
    };
    asked.is_ok() && tokio::time::timeout(LONG, answered).await.expect("in time")
}

#[tokio::test]
async fn w25_an_address_with_all_connections_makes_room_for_another_and_no_request_ends_for_it() {
    let mut settings = settings(120);
    (settings.runs.max, settings.runs.queue_max) = (1, 0);
    // As connections.rs has it: one of the run, and 512.
    let bound = 513;
    let told = Arc::new(Notify::new());
    let play = Play::of(STREAM).until(Until::GoesOn(Arc::clone(&told), STREAM_END.into()));
    let house = House::new(settings, vec![Script::Play(play)]).await;
    let mut quiet = from("127.0.0.2", house.port).await;
    assert!(is_answered(&mut quiet).await);
    let head = format!("POST /v1/messages HTTP/1.1\r\n{BEARER}");
    let mut stream = house.connect(&head, HELLO_STREAMED.as_bytes()).await;
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains("two") {
        assert!(stream.read_buf(&mut bytes).await.expect("read") > 0);
    }
    // Half of them begin a request and leave it there.
    let mut loud = Vec::new();
    for number in 0..bound + 20 {
        let mut one = from("127.0.0.1", house.port).await;
        if number % 2 == 0 {
            one.write_all(b"GET /livez HTTP/1.1\r\n").await.expect("written");
        }
        loud.push(one);
    }
    let begun = std::time::Instant::now();
    assert!(is_answered(&mut from("127.0.0.3", house.port).await).await);
    assert!(begun.elapsed() < std::time::Duration::from_secs(20), "before silence alone ends one, 30 s");
    assert!(is_answered(&mut quiet).await, "of few connections none ends, though it is the oldest");
    let mut ended = 0;
    for one in &mut loud {
        let mut byte = [0];
        let read = tokio::time::timeout(std::time::Duration::ZERO, one.read(&mut byte)).await;
        ended += u32::from(matches!(read, Ok(Ok(0) | Err(_))));
    }
    assert!((1..40).contains(&ended), "as many as there was no room for, not {ended}");
    told.notify_one();
    tokio::time::timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("in time").expect("read");
    assert!(String::from_utf8_lossy(&bytes).contains("message_stop"), "a stream goes on");
}
