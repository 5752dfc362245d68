//! The embedded model over HTTP, as the official clients would see it.
//! No test here may need the CLI, an account or a network.
#![allow(missing_docs)]

mod common;

use common::{Upstream, question};
use serde_json::{Value, json};

fn streamed(content: impl Into<Value>) -> Value {
    let mut body = question(content);
    body["stream"] = true.into();
    body
}

#[test]
fn a_plain_message_is_echoed_with_its_mark() {
    let upstream = Upstream::start();
    let reply = upstream.ask("hello");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert!(reply.header("request-id").is_some_and(|id| id.starts_with("req_embedded")));
    let message = reply.json();
    assert_eq!(message["content"], json!([{"type":"text","text":"[embedded] hello","citations":null}]));
    assert_eq!(message["stop_reason"], "end_turn");
    assert_eq!(message["usage"]["output_tokens"], 4);
}

#[test]
fn the_same_request_has_the_same_answer_and_count() {
    let upstream = Upstream::start();
    let (first, second) = (upstream.ask("hello").json(), upstream.ask("hello").json());
    assert_eq!(first["content"], second["content"]);
    assert_eq!(first["usage"], second["usage"]);
    let path = "POST /v1/messages/count_tokens HTTP/1.1\r\nauthorization: Bearer dummy";
    let count = upstream.send(path, &question("hello").to_string()).json();
    assert_eq!(count["input_tokens"], first["usage"]["input_tokens"]);
}

#[test]
fn a_stream_has_every_event_in_order_and_several_deltas() {
    let upstream = Upstream::start();
    let reply = upstream.post(&streamed("THINK: a thought that is long enough"));
    assert_eq!(reply.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert!(reply.whole);
    let events = reply.events();
    assert!(events.iter().all(|(name, data)| data["type"] == **name));
    let mut names: Vec<_> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    let block = ["content_block_start", "content_block_delta", "content_block_stop"];
    let expected = [&["message_start", "ping"][..], &block, &block, &["message_delta", "message_stop"]];
    assert_eq!(names, expected.concat());
    let deltas = |kind: &str| -> Vec<_> {
        events.iter().filter(|(_, data)| data["delta"]["type"] == kind).map(|(_, data)| data).collect()
    };
    let join = |kind: &str, key: &str| -> String {
        deltas(kind).iter().filter_map(|data| data["delta"][key].as_str()).collect()
    };
    assert_eq!(join("thinking_delta", "thinking"), "a thought that is long enough");
    assert_eq!(join("text_delta", "text"), "[embedded] a thought that is long enough");
    assert!(deltas("text_delta").len() > 1);
    assert_eq!(deltas("signature_delta").len(), 1);
}

#[test]
fn a_tool_is_called_in_json_deltas_and_its_result_reported() {
    let upstream = Upstream::start();
    let events = upstream.post(&streamed("RUN: echo a rather long line")).events();
    let json: String = events.iter().filter_map(|(_, data)| data["delta"]["partial_json"].as_str()).collect();
    let input: Value = serde_json::from_str(&json).expect("the deltas make up JSON");
    assert_eq!(input["command"], "echo a rather long line");
    let start = events.iter().find(|(name, _)| name == "content_block_start").expect("a block starts");
    assert_eq!(start.1["content_block"]["name"], "Bash");
    let delta = events.iter().find(|(name, _)| name == "message_delta").expect("it ends");
    assert_eq!(delta.1["delta"]["stop_reason"], "tool_use");

    let id = &start.1["content_block"]["id"];
    for (failed, head) in [(false, "ok"), (true, "error")] {
        let mut next = question("RUN: echo a rather long line");
        let messages = next["messages"].as_array_mut().expect("messages");
        messages.push(
            json!({"role":"assistant","content":[{"type":"tool_use","id":id,"name":"Bash","input":input}]}),
        );
        messages.push(json!({"role":"user","content":[
            {"type":"tool_result","tool_use_id":id,"is_error":failed,"content":[{"type":"text","text":"out\nput"}]},
            {"type":"text","text":"<system-reminder>nothing</system-reminder>"}]}));
        assert_eq!(upstream.post(&next).text(), format!("[embedded] RUN {head}:\nout\nput"));
    }
}

#[test]
fn a_request_without_the_tool_gets_a_text() {
    let upstream = Upstream::start();
    let mut body = question("RUN: id");
    body["tools"] = json!([]);
    assert_eq!(upstream.post(&body).text(), "[embedded] RUN: the request offers no tool Bash");
}

#[test]
fn failures_come_as_asked_for() {
    let upstream = Upstream::start();
    for (status, kind) in
        [(400, "invalid_request_error"), (401, "authentication_error"), (529, "overloaded_error")]
    {
        let reply = upstream.ask(format!("FAIL: {status}"));
        assert_eq!((reply.status, reply.json()["error"]["type"].as_str()), (status, Some(kind)));
        assert_eq!(reply.json()["request_id"].as_str(), reply.header("request-id"));
    }
    assert_eq!(upstream.ask("FAIL: 500 once a").status, 500);
    assert_eq!(upstream.ask("FAIL: 500 once a").status, 200);
    assert_eq!(upstream.ask("FAIL: 500 once b").status, 500);
}

#[test]
fn a_stream_can_break_in_each_way() {
    let upstream = Upstream::start();
    let cut = upstream.post(&streamed("CUT: some text that is never finished"));
    assert!(!cut.whole && cut.body.contains("[embedded]") && !cut.body.contains("message_stop"));
    let error = upstream.post(&streamed("ERROR: overloaded_error"));
    let (name, data) = error.events().pop().expect("events");
    assert_eq!((name.as_str(), &data["error"]["type"]), ("error", &json!("overloaded_error")));
    assert_eq!(upstream.ask("ERROR: overloaded_error").status, 529);
    let slow = upstream.post(&streamed("SLOW: 1 some text"));
    assert!(slow.whole && slow.body.contains("message_stop"));
}

#[test]
fn a_credential_decides_whether_it_is_accepted() {
    let upstream = Upstream::start();
    let ask = |header: &str| upstream.send(&format!("GET /v1/models?limit=1 HTTP/1.1{header}"), "");
    assert_eq!(ask("").status, 401);
    assert_eq!(ask("\r\nauthorization: Bearer sk-refused").status, 401);
    assert_eq!(ask("\r\nx-api-key: sk-forbidden").status, 403);
    let limited = ask("\r\nx-api-key: sk-ratelimited");
    assert_eq!((limited.status, limited.header("retry-after")), (429, Some("1")));
    let listed = ask("\r\nx-api-key: sk-anything");
    assert_eq!((listed.status, &listed.json()["has_more"]), (200, &json!(false)));
    let refused = "POST /v1/messages HTTP/1.1\r\nx-api-key: refused";
    assert_eq!(upstream.send(refused, &question("a").to_string()).status, 401);
}

#[test]
fn bad_requests_are_told_apart() {
    let upstream = Upstream::start();
    let post = |body: &str| upstream.send("POST /v1/messages HTTP/1.1\r\nx-api-key: k", body).status;
    assert_eq!(post("not json"), 400);
    assert_eq!(post("[]"), 400);
    assert_eq!(post(r#"{"model":"claude-x","max_tokens":1,"messages":[]}"#), 400);
    assert_eq!(post(r#"{"model":"nosuch","max_tokens":1,"messages":[{"role":"user","content":"a"}]}"#), 404);
    assert_eq!(upstream.send("GET /v1/messages HTTP/1.1\r\nx-api-key: k", "").status, 405);
    assert_eq!(upstream.send("GET /nothing HTTP/1.1\r\nx-api-key: k", "").status, 404);
    assert_eq!(upstream.send("HEAD / HTTP/1.1", "").status, 200);
}

#[test]
fn what_was_received_can_be_shown() {
    let upstream = Upstream::start();
    let image = json!({"type":"image","source":{"type":"base64","media_type":"image/png","data":"QUJDRA=="}});
    let content =
        json!([image, {"type":"text","text":"IMAGE?"}, {"type":"text","text":"[Image: source: /x]"}]);
    assert_eq!(upstream.ask(content).text(), "[embedded] 1 images\nimage/png 4 bytes");
    let mut body = question("HISTORY?");
    let last = body["messages"][0].clone();
    body["messages"] = json!([{"role":"user","content":"a"},{"role":"assistant","content":"b"}, last]);
    body["system"] = json!([{"type":"text","text":"be brief"}]);
    assert_eq!(upstream.post(&body).text(), r#"[embedded] [["user","a"],["assistant","b"]]"#);
    body["messages"][2]["content"] = "SYSTEM?".into();
    assert_eq!(upstream.post(&body).text(), "[embedded] be brief");
    let secret = "POST /v1/messages HTTP/1.1\r\nauthorization: Bearer sk-ant-oat01-SECRET";
    let shown = upstream.send(secret, &question("HEADERS?").to_string()).text();
    assert!(shown.contains("authorization: Bearer sk-ant-oat01…") && !shown.contains("SECRET"), "{shown}");
}
