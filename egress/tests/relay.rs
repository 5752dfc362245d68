//! What goes upstream and what comes back: headers, counts, silence, and never the credential.
#![allow(missing_docs)]

mod common;

use std::io::Read;

use common::{
    Act, CANARY, Egress, PLACEHOLDER, Raw, chunk, embedded, question, request, stream_head, streamed,
};
use gaoler_protocol::{Denial, Scheme};
use serde_json::json;

const JSON: &str = "content-type: application/json\r\n";

#[test]
fn the_upstream_gets_the_credential_and_nothing_else_of_the_cage() {
    let upstream = Raw::answering("200 OK", JSON, "{}");
    let more = "anthropic-beta: claude-code-20250219,web-search-2025-03-05,oauth-2025-04-20\r\n\
        x-stainless-lang: js\r\nx-app: cli\r\ncookie: a=b\r\nx-forwarded-for: 1.2.3.4\r\naccept-encoding: gzip\r\n\
        proxy-authorization: Basic x\r\nx-claude-code-session-id: s\r\nconnection: x-app\r\n";
    let body = question("hello").to_string();
    for (scheme, line, beta) in [
        (Scheme::OAuth, format!("authorization: Bearer {CANARY}"), "claude-code-20250219,oauth-2025-04-20"),
        (Scheme::ApiKey, format!("x-api-key: {CANARY}"), "claude-code-20250219"),
    ] {
        let egress = Egress::serving(&upstream.url(), &[], scheme, CANARY);
        assert_eq!(egress.raw(&request("POST /v1/messages?beta=true", more, &body)).status, 200);
        let seen = upstream.seen().pop().expect("a request");
        let (head, sent) = seen.split_once("\r\n\r\n").expect("a head");
        let mut lines: Vec<_> = head.lines().collect();
        assert_eq!(lines.remove(0), "POST /v1/messages?beta=true HTTP/1.1");
        lines.sort_unstable();
        let host = format!("host: {}", upstream.address);
        let length = format!("content-length: {}", body.len());
        let beta = format!("anthropic-beta: {beta}");
        let mut expected = vec![
            "accept-encoding: identity",
            "anthropic-version: 2023-06-01",
            "content-type: application/json",
            "x-app: cli",
            "x-claude-code-session-id: s",
            "x-stainless-lang: js",
            &beta,
            &host,
            &length,
            &line,
        ];
        expected.sort_unstable();
        assert_eq!(lines, expected);
        assert_eq!(sent, body);
        assert!(!seen.contains(&PLACEHOLDER.token()));
    }
}

#[test]
fn only_named_headers_come_back() {
    let headers = format!(
        "{JSON}request-id: req_1\r\nretry-after: 3\r\nx-should-retry: true\r\nset-cookie: a=b\r\nserver: x\r\n\
        anthropic-ratelimit-tokens-limit: 5\r\nanthropic-organization-id: org\r\nvia: y\r\n"
    );
    let upstream = Raw::answering("429 Too Many Requests", &headers, r#"{"type":"error"}"#);
    let egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
    let reply = egress.ask("hello");
    assert_eq!((reply.status, reply.body.as_str()), (429, r#"{"type":"error"}"#));
    let mut names: Vec<_> = reply.head.lines().skip(1).filter_map(|line| line.split(':').next()).collect();
    names.sort_unstable();
    let expected = [
        "anthropic-ratelimit-tokens-limit",
        "connection",
        "content-length",
        "content-type",
        "date",
        "request-id",
        "retry-after",
        "x-should-retry",
    ];
    assert_eq!(names, expected);
}

#[test]
fn totals_are_exact() {
    let mut egress = Egress::serving(&embedded(), &[], Scheme::OAuth, CANARY);
    let (first, second) = (question("hello"), streamed("hello again"));
    let one = egress.post(&first);
    let totals = egress.hear_counted();
    let usage = &one.json()["usage"];
    assert_eq!(Some(totals.input_tokens), usage["input_tokens"].as_u64());
    assert_eq!(Some(totals.output_tokens), usage["output_tokens"].as_u64());
    assert_eq!((totals.requests, totals.denials, totals.status), (1, 0, 200));
    assert_eq!(totals.bytes_up, first.to_string().len() as u64);
    assert_eq!(totals.bytes_down, one.body.len() as u64);

    let two = egress.post(&second);
    assert!(two.whole && two.body.contains("message_stop"));
    let after = egress.hear_counted();
    let events = two.events();
    let delta = events.iter().find(|(name, _)| name == "message_delta").expect("a message_delta");
    assert_eq!(Some(after.output_tokens - totals.output_tokens), delta.1["usage"]["output_tokens"].as_u64());
    assert_eq!(after.bytes_up, totals.bytes_up + second.to_string().len() as u64);
    assert_eq!(after.bytes_down, totals.bytes_down + two.body.len() as u64);
    assert_eq!(egress.revoke(), after);
    assert_eq!(egress.exit(), 0);
}

#[test]
fn tokens_of_the_cache_are_counted() {
    let usage = json!({"input_tokens": 1, "output_tokens": 2, "cache_creation_input_tokens": 3,
        "cache_read_input_tokens": 4});
    let upstream = Raw::answering("200 OK", JSON, &json!({"usage": usage}).to_string());
    let mut egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
    egress.ask("hello");
    let totals = egress.hear_counted();
    let tokens =
        (totals.input_tokens, totals.output_tokens, totals.cache_write_tokens, totals.cache_read_tokens);
    assert_eq!(tokens, (1, 2, 3, 4));
}

#[test]
fn an_answer_with_the_credential_is_cut() {
    let (left, right) = CANARY.split_at(20);
    let rows = [
        (Raw::answering("200 OK", JSON, &format!("{{\"echo\":\"{CANARY}\"}}")), 502),
        (Raw::answering("401 Unauthorized", JSON, &format!("bad token {CANARY}")), 502),
        (Raw::answering("200 OK", &format!("{JSON}request-id: {CANARY}\r\n"), "{}"), 502),
        (
            Raw::start(&[
                stream_head(),
                chunk("event: a\n\n"),
                chunk(&format!("data: {CANARY}\n\n")),
                chunk("data: never\n\n"),
                Act::Hang,
            ]),
            200,
        ),
        (
            Raw::start(&[
                stream_head(),
                chunk(&format!("data: {left}")),
                chunk(&format!("{right}\n\n")),
                Act::Hang,
            ]),
            200,
        ),
    ];
    for (number, (upstream, status)) in rows.into_iter().enumerate() {
        let mut egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
        // That the canary is not in it, every reply of these tests is checked for.
        let reply = egress.ask("hello");
        assert_eq!(reply.status, status, "row {number}");
        assert!(status != 200 || !reply.whole, "row {number}: {reply:?}");
        assert!(!reply.body.contains(right) && !reply.body.contains("never"), "row {number}");
        assert_eq!(egress.hear_denied(), Denial::Body, "row {number}");
        assert!(upstream.seen()[0].contains(CANARY), "row {number}: the upstream has it to echo");
    }
}

#[test]
fn a_redirect_is_not_followed() {
    let target = Raw::answering("200 OK", JSON, "{}");
    for status in ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"] {
        let upstream = Raw::answering(status, &format!("location: {}/v1/messages\r\n", target.url()), "");
        let egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
        let reply = egress.ask("hello");
        assert_eq!((reply.status, reply.header("location")), (502, None), "{status}");
    }
    assert!(target.seen().is_empty());
}

#[test]
fn an_encoded_answer_is_refused() {
    let upstream = Raw::answering("200 OK", &format!("{JSON}content-encoding: gzip\r\n"), "x");
    let egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
    assert_eq!(egress.ask("hello").status, 502);
}

#[test]
fn a_silent_upstream_is_given_up() {
    let silent = ["--silence-seconds", "1"];
    let mut egress = Egress::serving(&embedded(), &silent, Scheme::OAuth, CANARY);
    let reply = egress.ask("SILENT:");
    assert_eq!((reply.status, reply.header("x-should-retry")), (504, Some("false")));
    assert_eq!(reply.json()["error"]["type"], "timeout_error");
    assert_eq!(egress.hear_counted().requests, 1);

    let reply = egress.post(&streamed("STALL: some text that stops in the middle"));
    assert!(reply.whole && reply.body.contains("[embedded]"));
    let last = reply.body.trim_end().rsplit("\n\n").next().expect("an event");
    assert!(last.starts_with("event: error\ndata: {") && last.contains("timeout_error"), "{last}");
    assert_eq!(egress.hear_counted().requests, 2);
}

#[test]
fn a_slow_upstream_is_not_silent() {
    let mut egress = Egress::serving(&embedded(), &["--silence-seconds", "1"], Scheme::OAuth, CANARY);
    let reply = egress.post(&streamed("SLOW: 400 a text of a few pieces, each later than the last"));
    assert!(reply.whole && reply.body.contains("message_stop"));
    egress.hear_counted();
}

/// What the ledger holds just now, each line by its model and what went in.
fn told(egress: &mut Egress) -> Vec<(String, u64)> {
    let mut bytes = [0; 4096];
    let length = egress.ledger.as_mut().expect("it serves").read(&mut bytes).expect("something is told");
    let lines = std::str::from_utf8(&bytes[..length]).expect("text").lines();
    let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON");
    let read = lines.map(line).map(|line| {
        (line["model"].as_str().expect("a name").to_owned(), line["input_tokens"].as_u64().expect("a count"))
    });
    read.collect()
}

#[test]
fn counts_are_told_as_each_answer_ends_while_the_run_lives() {
    let mut egress = Egress::serving(&embedded(), &[], Scheme::OAuth, CANARY);
    let mut sum = 0;
    for asked in [question("hello"), streamed("hello again"), streamed("CUT: some text that is cut off")] {
        egress.post(&asked);
        let totals = egress.hear_counted();
        assert!(totals.input_tokens > sum, "{totals:?}");
        sum = totals.input_tokens;
        let model = asked["model"].as_str().expect("a name").to_owned();
        assert_eq!(told(&mut egress), [(model, sum)], "one line, with all so far");
    }
    // An answer without counts is no line; and what was told is not told again at the end.
    assert_eq!(egress.ask("FAIL: 400").status, 400);
    egress.hear_counted();
    egress.revoke();
    let mut rest = String::new();
    egress.ledger.take().expect("it served").read_to_string(&mut rest).expect("text");
    assert_eq!(rest, "");
}

#[test]
fn pieces_come_through_at_once() {
    let upstream =
        Raw::start(&[stream_head(), chunk("event: ping\ndata: {\"type\":\"ping\"}\n\n"), Act::Hang]);
    let egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
    let mut stream = egress.connect();
    let bytes = request("POST /v1/messages", "", &streamed("hello").to_string());
    std::io::Write::write_all(&mut stream, &bytes).expect("sent");
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains("event: ping") {
        let count = stream.read(&mut buffer).expect("it comes although the upstream goes on");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    assert!(seen.to_ascii_lowercase().contains("transfer-encoding: chunked"));
}

#[test]
fn a_broken_answer_stays_broken() {
    let egress = Egress::serving(&embedded(), &[], Scheme::OAuth, CANARY);
    let reply = egress.post(&streamed("CUT: some text that is cut off"));
    assert!(!reply.whole && reply.body.contains("[embedded]"));
    assert_eq!(egress.ask("CUT: some text").status, 502);
}

#[test]
fn errors_of_the_upstream_come_through() {
    let egress = Egress::serving(&embedded(), &[], Scheme::ApiKey, CANARY);
    for status in [400, 401, 429, 500, 529] {
        let reply = egress.ask(&format!("FAIL: {status}"));
        assert_eq!(reply.status, status);
        assert_eq!(reply.json()["request_id"].as_str(), reply.header("request-id"));
    }
    let nobody = Egress::serving("http://127.0.0.1:1", &[], Scheme::OAuth, CANARY);
    assert_eq!(nobody.ask("hello").status, 502);
}

#[test]
fn a_cage_that_goes_away_ends_its_request() {
    let upstream = Raw::start(&[stream_head(), chunk("event: ping\n\n"), Act::Hang]);
    let mut egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
    let mut stream = egress.connect();
    let bytes = request("POST /v1/messages", "", &streamed("hello").to_string());
    std::io::Write::write_all(&mut stream, &bytes).expect("sent");
    stream.read_exact(&mut [0; 12]).expect("an answer begins");
    drop(stream);
    let totals = egress.hear_counted();
    assert_eq!((totals.requests, totals.status), (1, 200));
}
