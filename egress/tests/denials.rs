//! What a cage cannot get through its egress, each with the exact status and what the supervisor hears.
//! Every refusal stands beside the same request that is let through, so that it proves something.
#![allow(missing_docs)]

mod common;

use common::{CANARY, Egress, PLACEHOLDER, Raw, embedded, question, request};
use gaoler_protocol::{Denial, Scheme};
use serde_json::{Value, json};

fn serving() -> Egress {
    Egress::serving(&embedded(), &[], Scheme::OAuth, CANARY)
}

/// Sends a request that must be refused with this status, and hears the denial.
fn refused(egress: &mut Egress, bytes: &[u8], status: u16, what: Denial) -> Value {
    let reply = egress.raw(bytes);
    assert_eq!(reply.status, status, "{}\n{reply:?}", String::from_utf8_lossy(bytes));
    assert_eq!(egress.hear_denied(), what, "{}", String::from_utf8_lossy(bytes));
    reply.json()
}

/// The honest request that all the others differ from.
fn passes(egress: &mut Egress) {
    let reply = egress.ask("hello");
    assert_eq!((reply.status, reply.text()), (200, "[embedded] hello".into()));
    egress.hear_counted();
}

#[test]
fn a_request_without_the_placeholder_is_refused() {
    let mut egress = serving();
    passes(&mut egress);
    let body = question("hello").to_string();
    let token = PLACEHOLDER.token();
    let with = |header: &str| {
        let length = body.len();
        format!(
            "POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n{header}content-length: {length}\r\n\r\n{body}"
        )
    };
    for header in [
        String::new(),
        "authorization: Bearer wrong\r\n".into(),
        format!("authorization: Bearer {}0\r\n", &token[..token.len() - 1]),
        format!("authorization: Bearer {}\r\n", &token[..token.len() - 1]),
        format!("authorization: Bearer {token}x\r\n"),
        format!("authorization: {token}\r\n"),
        format!("authorization: Basic {token}\r\n"),
        "x-api-key: \r\n".into(),
    ] {
        let error = refused(&mut egress, with(&header).as_bytes(), 401, Denial::Placeholder);
        assert_eq!(error["error"]["type"], "authentication_error");
        assert!(error["request_id"].is_string());
    }
    // Of two, both must be right: whoever reads the other one must not be told something else.
    for both in [
        format!("authorization: Bearer {token}\r\nx-api-key: wrong\r\n"),
        format!("authorization: Bearer wrong\r\nx-api-key: {token}\r\n"),
        format!("authorization: Basic {token}\r\nx-api-key: {token}\r\n"),
    ] {
        refused(&mut egress, with(&both).as_bytes(), 401, Denial::Placeholder);
    }
    // As a key it is as good as a bearer token.
    let key = with(&format!("x-api-key: {token}\r\n"));
    assert_eq!(egress.raw(key.as_bytes()).status, 200);
}

#[test]
fn other_paths_and_methods_are_refused() {
    let mut egress = serving();
    passes(&mut egress);
    let body = question("hello").to_string();
    for (line, status) in [
        ("POST /v1/files", 404),
        ("GET /v1/models", 404),
        ("POST /v1/messages/batches", 404),
        ("POST /v1/messages/", 404),
        ("POST //v1/messages", 404),
        ("POST /v1/./messages", 404),
        ("POST /v1/%6dessages", 404),
        ("POST /V1/messages", 404),
        ("POST /", 404),
        ("GET /api/oauth/profile", 404),
        ("GET /v1/messages", 403),
        ("PUT /v1/messages", 403),
        ("POST /v1/messages?beta=false", 403),
        ("POST /v1/messages?beta=true&x=1", 403),
        ("POST /v1/messages?", 403),
        ("TRACE /v1/messages", 403),
        ("OPTIONS /v1/messages", 403),
    ] {
        refused(&mut egress, &request(line, "", &body), status, Denial::Path);
    }
    let count = request("POST /v1/messages/count_tokens", "", &body);
    assert!(egress.raw(&count).json()["input_tokens"].is_u64());
}

#[test]
fn greetings_are_answered_here() {
    let upstream = Raw::answering("200 OK", "", "");
    let egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
    for line in ["HEAD /", "GET /api/hello", "HEAD /api/hello"] {
        let reply = egress.raw(format!("{line} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes());
        assert_eq!(reply.status, 200, "{line}");
    }
    assert!(upstream.seen().is_empty());
}

#[test]
fn smuggling_is_refused() {
    let mut egress = serving();
    passes(&mut egress);
    let token = PLACEHOLDER.token();
    let body = question("hello").to_string();
    let length = body.len();
    let good = format!("host: localhost\r\nauthorization: Bearer {token}\r\n");
    let framed = format!("{good}content-length: {length}\r\n");
    let chunked = format!("{length:x}\r\n{body}\r\n0\r\n\r\n");
    let post = "POST /v1/messages HTTP/1.1\r\n";
    let rows = [
        ("TE and CL", format!("{post}{framed}transfer-encoding: chunked\r\n\r\n{chunked}")),
        (
            "CL and TE",
            format!("{post}{good}transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n{chunked}"),
        ),
        ("TE", format!("{post}{good}transfer-encoding: chunked\r\n\r\n{chunked}")),
        ("TE unknown", format!("{post}{framed}transfer-encoding: xchunked\r\n\r\n{body}")),
        ("two CLs", format!("{post}{framed}content-length: 1\r\n\r\n{body}")),
        ("two equal CLs", format!("{post}{framed}content-length: {length}\r\n\r\n{body}")),
        ("a list of CLs", format!("{post}{good}content-length: {length}, {length}\r\n\r\n{body}")),
        ("a padded CL", format!("{post}{good}content-length: 0{length}\r\n\r\n{body}")),
        ("bare line feeds", format!("{post}{framed}\r\n{body}").replacen("\r\n", "\n", 5)),
        ("a bare line feed", format!("{post}{framed}\r\n{body}").replacen("localhost\r\n", "localhost\n", 1)),
        ("a bare carriage return", format!("{post}{framed}x-app: a\rb\r\n\r\n{body}")),
        ("an empty line before it", format!("\r\n{post}{framed}\r\n{body}")),
        ("a fragment", format!("{post}{framed}\r\n{body}").replacen("messages", "messages#x", 1)),
        ("a signed CL", format!("{post}{good}content-length: +{length}\r\n\r\n{body}")),
        ("obs-fold", format!("{post}{framed}x-app: a\r\n b\r\n\r\n{body}")),
        ("a blank before the colon", format!("{post}{good}content-length : {length}\r\n\r\n{body}")),
        ("absolute form", format!("POST http://evil.example/v1/messages HTTP/1.1\r\n{framed}\r\n{body}")),
        (
            "absolute form, own host",
            format!("POST http://localhost/v1/messages HTTP/1.1\r\n{framed}\r\n{body}"),
        ),
        ("another host", format!("{post}{framed}\r\n{body}").replace("localhost", "api.anthropic.com")),
        ("two hosts", format!("{post}{framed}host: localhost\r\n\r\n{body}")),
        ("no host", format!("{post}{framed}\r\n{body}").replace("host: localhost\r\n", "")),
        ("two tokens", format!("{post}{framed}authorization: Bearer other\r\n\r\n{body}")),
        ("HTTP/1.0", format!("POST /v1/messages HTTP/1.0\r\n{framed}\r\n{body}")),
        ("an upgrade", format!("{post}{framed}connection: upgrade\r\nupgrade: websocket\r\n\r\n{body}")),
        ("NUL in a header", format!("{post}{framed}x-app: a\0b\r\n\r\n{body}")),
    ];
    for (name, text) in rows {
        let reply = egress.raw(text.as_bytes());
        assert_eq!(reply.status, 400, "{name}: {reply:?}");
        assert_eq!(egress.hear_denied(), Denial::Path, "{name}");
    }
    // Another protocol is hung up on.
    assert_eq!(egress.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").status, 0);
    assert_eq!(egress.hear_denied(), Denial::Path);
    let connect = "CONNECT evil.example:443 HTTP/1.1\r\nhost: evil.example\r\n\r\n";
    refused(&mut egress, connect.as_bytes(), 403, Denial::Path);
    for length in [70_000, 5_000_000] {
        let large = format!("{post}{framed}x-app: {}\r\n\r\n{body}", "a".repeat(length));
        refused(&mut egress, large.as_bytes(), 431, Denial::Path);
    }
}

#[test]
fn one_connection_is_one_request() {
    let upstream = Raw::answering("200 OK", "content-type: application/json\r\n", "{}");
    let egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
    let one = request("POST /v1/messages", "", &question("hello").to_string());
    let reply = egress.raw(&[one.clone(), one].concat());
    assert_eq!((reply.status, reply.header("connection")), (200, Some("close")));
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn bodies_that_reach_out_are_refused() {
    let mut egress = serving();
    passes(&mut egress);
    let with = |key: &str, value: Value| {
        let mut body = question("hello");
        body[key] = value;
        body
    };
    let source = |kind: &str| {
        let image = json!({"type": "image", "source": {"type": kind, "url": "https://evil.example/?secret"}});
        with("messages", json!([{"role": "user", "content": [image, {"type": "text", "text": "hello"}]}]))
    };
    for kind in [
        "web_search_20250305",
        "web_fetch_20250910",
        "code_execution_20250825",
        "computer_use",
        "mcp_toolset",
    ] {
        let body = with("tools", json!([{"type": kind, "name": "x"}]));
        let error =
            refused(&mut egress, &request("POST /v1/messages", "", &body.to_string()), 403, Denial::Body);
        assert_eq!(error["error"]["type"], "permission_error", "{kind}");
    }
    for body in [
        with("mcp_servers", json!([{"type": "url", "url": "https://evil.example", "name": "x"}])),
        with("container", json!("container_01")),
        source("url"),
        source("file"),
    ] {
        refused(&mut egress, &request("POST /v1/messages", "", &body.to_string()), 403, Denial::Body);
    }
    let unknown = with("model", json!("other-model"));
    refused(&mut egress, &request("POST /v1/messages", "", &unknown.to_string()), 404, Denial::Body);
    for body in ["", "[]", "not json", r#"{"model":"claude-a","model":"claude-b"}"#, "{\"a\":\"\u{0}\"}"] {
        refused(&mut egress, &request("POST /v1/messages", "", body), 400, Denial::Body);
    }
    let gzip = request("POST /v1/messages", "content-encoding: gzip\r\n", &question("hello").to_string());
    refused(&mut egress, &gzip, 415, Denial::Body);
    let client = with("tools", json!([{"name": "Bash"}, {"type": "bash_20250124", "name": "bash"}]));
    assert_eq!(egress.post(&client).status, 200);
}

#[test]
fn quotas_hold() {
    let mut egress = Egress::serving(&embedded(), &["--requests-max", "2"], Scheme::OAuth, CANARY);
    passes(&mut egress);
    passes(&mut egress);
    let body = question("hello").to_string();
    refused(&mut egress, &request("POST /v1/messages", "", &body), 429, Denial::Quota);
    // Refused by its announced length alone.
    let token = PLACEHOLDER.token();
    let head = format!("POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n");
    let huge = format!("{head}content-length: 99999999\r\n\r\n");
    refused(&mut egress, huge.as_bytes(), 413, Denial::Quota);
    assert_eq!(egress.revoke().requests, 2);
}

#[test]
fn denials_without_end_close_the_door() {
    let mut egress = serving();
    for _ in 0..256 {
        refused(&mut egress, b"GET /x HTTP/1.1\r\nhost: localhost\r\n\r\n", 401, Denial::Placeholder);
    }
    // Nobody accepts any more: the connection waits in the listener's queue.
    let mut stream = egress.connect();
    stream.set_read_timeout(Some(std::time::Duration::from_millis(300))).expect("a timeout");
    std::io::Write::write_all(&mut stream, b"HEAD / HTTP/1.1\r\nhost: localhost\r\n\r\n").expect("queued");
    assert!(std::io::Read::read(&mut stream, &mut [0; 1]).is_err());
    assert_eq!(egress.revoke().denials, 256);
}
