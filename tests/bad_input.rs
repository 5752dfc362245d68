//! Whatever comes in, from the network or from the CLI, is answered in the API's own form, within a bound, and
//! leaves nothing behind. The CLI is a double here (tests/double/claude), for the real one does not misbehave.

mod support;

use std::fs::{self, Permissions};
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Instant;

use serde_json::json;
use support::client::read;
use support::{Client, Options, Response, Server, ask, bearer, environment, patience, token, until};

/// An error in the API's form, of this status and type.
fn is_error(response: &Response, status: u16, kind: &str, what: &str) {
    assert_eq!(response.status, status, "{what}: {response:?}");
    assert_eq!(response.error(), kind, "{what}: {response:?}");
    assert_eq!(response.header("content-type"), Some("application/json"), "{what}");
    let id = response.header("request-id").unwrap_or_else(|| panic!("{what}: no request-id"));
    assert_eq!(response.json()["request_id"], id, "{what}");
}

/// What is answered to these very bytes; `None` where the connection just ends.
fn raw(client: &Client, bytes: &[u8]) -> Option<Response> {
    let mut stream = client.connect().expect("a connection");
    stream.write_all(bytes).expect("sent");
    read(&mut BufReader::new(stream)).ok()
}

fn head(client: &Client, line: &str, fields: &str) -> String {
    let (_, authorization) = bearer("a");
    format!("{line}\r\nhost: {}\r\nauthorization: {authorization}\r\n{fields}\r\n", client.address)
}

#[test]
fn t01_a_wrong_body_is_named_by_its_path_and_nobody_is_admitted_for_it() {
    let server = Server::start(Options::with_double());
    let client = server.client();
    let text = |content: &str| format!(r#"{{"messages":[{{"role":"user","content":{content}}}]}}"#);
    let rows: Vec<(String, &str)> = vec![
        ("".into(), "not valid JSON: line 1, column 0"),
        ("{".into(), "not valid JSON"),
        ("[]".into(), "must be a JSON object"),
        ("null".into(), "must be a JSON object"),
        ("{}".into(), "messages: field required."),
        (r#"{"messages":{}}"#.into(), "messages: must be an array, not an object."),
        (r#"{"messages":[]}"#.into(), "messages: at least one message is required."),
        (r#"{"messages":[1]}"#.into(), "messages[0]: must be an object, not a number."),
        (r#"{"messages":[{"role":"robot","content":"x"}]}"#.into(), "messages[0].role: must be"),
        (r#"{"messages":[{"role":"user"}]}"#.into(), "messages[0].content: field required."),
        (
            r#"{"messages":[{"role":"assistant","content":"x"}]}"#.into(),
            "the last message must be the user's",
        ),
        (text("7"), "messages[0].content: must be a string or an array of blocks, not a number."),
        (text("\"\""), "messages[0].content: must not be empty."),
        (
            text(r#"[{"type":"text","text":7}]"#),
            "messages[0].content[0].text: must be a string, not a number.",
        ),
        (
            text(r#"[{"type":"text","text":"a"},{"type":"video"}]"#),
            "messages[0].content[1].type: not supported",
        ),
        (text(r#"[{"type":"image","source":{"type":"url","url":"http://x"}}]"#), "send the image as base64"),
        (
            text(r#"[{"type":"image","source":{"type":"base64","media_type":"image/png","data":"a b"}}]"#),
            "messages[0].content[0].source.data: must be base64",
        ),
        (text(&"[".repeat(5000)), "not valid JSON"),
    ];
    for (body, expected) in rows {
        let response = client.post(&[bearer("a")], body.as_bytes());
        is_error(&response, 400, "invalid_request_error", &body);
        assert!(response.complaint().contains(expected), "{body}: {}", response.complaint());
    }
    let fields = [
        ("stream", json!("yes"), "stream: must be a boolean, not a string."),
        ("system", json!(5), "system: must be a string or an array of text blocks"),
        ("max_tokens", json!(0), "max_tokens: must be at least 1."),
        ("max_tokens", json!(1.5), "max_tokens: must be a whole number"),
        ("max_turns", json!(-1), "max_turns: must be a whole number"),
        ("model", json!(["sonnet"]), "model: must be a string, not an array."),
        ("session_id", json!("x"), "session_id: must be a UUID"),
        ("thinking", json!({"type": "loud"}), "thinking.type: must be"),
        ("output_config", json!({"effort": "much"}), "output_config.effort: must be"),
        ("security_level", json!("NONE"), "security_level: must be"),
        ("oauth_credentials", json!({"access_token": 5}), "oauth_credentials.access_token: must be a string"),
    ];
    for (name, value, expected) in fields {
        let mut body = ask("hello");
        body[name] = value;
        let response = client.messages("a", &body);
        is_error(&response, 400, "invalid_request_error", name);
        assert!(response.complaint().contains(expected), "{name}: {}", response.complaint());
    }
    let invalid =
        [&b"{\"messages\":[{\"role\":\"user\",\"content\":\""[..], &[0xff, 0xfe], b"\"}]}"].concat();
    let response = client.post(&[bearer("a")], &invalid);
    is_error(&response, 400, "invalid_request_error", "invalid UTF-8");
    assert!(response.complaint().contains("UTF-8"), "{response:?}");
    for model in ["gpt-4", "claude-", "claude-x;rm -rf", "--help", "", "Sonnet"] {
        let mut body = ask("hello");
        body["model"] = json!(model);
        is_error(&client.messages("a", &body), 404, "not_found_error", model);
    }
    // Nobody was admitted for any of this; the control: one good request is, and its folder appears.
    assert_eq!(tenants(&server), 0);
    assert_eq!(server.says("a", "hello"), "[embedded] double: hello");
    assert_eq!(tenants(&server), 1);
}

/// How many tenants have a folder, or half of one.
fn tenants(server: &Server) -> usize {
    fs::read_dir(server.state.join("tenants")).map_or(0, Iterator::count)
}

#[test]
fn t02_a_credential_that_is_none_or_is_refused_gets_no_uid_and_no_folder() {
    let server = Server::start(Options::with_double());
    let client = server.client();
    let baseline = server.baseline();
    let hello = ask("hello").to_string();
    let header = |name: &'static str, value: &str| [(name, value.to_owned())];
    let malformed = [
        header("authorization", "Bearer nonsense"),
        header("authorization", "Basic c2stYW50LW9hdDAx"),
        header("authorization", "Bearer"),
        header("authorization", ""),
        header("authorization", "Bearer sk-ant-ort01-a-refresh-token-00000"),
        header("authorization", &format!("Bearer sk-ant-oat01-{}", "a".repeat(600))),
        header("authorization", "Bearer ../../../../etc/passwd"),
        header("x-api-key", "sk-ant-oat01-with space inside"),
    ];
    for headers in &malformed {
        let response = client.post(headers, hello.as_bytes());
        is_error(&response, 401, "authentication_error", &headers[0].1);
        assert!(response.complaint().contains("Invalid OAuth token format"), "{response:?}");
        let word = headers[0].1.trim_start_matches("Bearer ");
        assert!(word.len() < 8 || !String::from_utf8_lossy(&response.body).contains(word), "{response:?}");
    }
    is_error(&client.post(&[], hello.as_bytes()), 401, "authentication_error", "no credential");
    // Well formed, and the upstream does not take it.
    for stream in [false, true] {
        let mut body = ask("hello");
        body["stream"] = json!(stream);
        let response = client.messages("refused", &body);
        is_error(&response, 401, "authentication_error", "refused");
        assert!(!String::from_utf8_lossy(&response.body).contains(&token("refused")), "{response:?}");
    }
    let forbidden = client.messages("forbidden", &ask("hello"));
    assert!(matches!(forbidden.status, 401 | 403), "{forbidden:?}");
    // One that the upstream limits before it says whether it knows it: its word is handed on, and it gets nothing either.
    let limited = client.messages("ratelimited", &ask("hello"));
    is_error(&limited, 429, "rate_limit_error", "limited");
    assert_eq!(limited.json()["error"]["details"]["error_code"], "upstream_rate_limited");
    assert_eq!(limited.header("retry-after"), Some("1"), "as the upstream says");
    assert_eq!(tenants(&server), 0, "a refused credential was given a folder");
    server.settles_to(&baseline);
    assert_eq!(server.says("accepted", "hello"), "[embedded] double: hello");
    assert_eq!(tenants(&server), 1);
}

#[test]
fn t03_http_that_is_odd_slow_or_too_large_is_answered_or_ended() {
    let server = Server::start(Options::with_double());
    let client = server.client();
    let hello = ask("hello").to_string();
    let length = format!("content-length: {}\r\n", hello.len());

    // Too large: an answer, not a reset.
    let large = format!(r#"{{"messages":[{{"role":"user","content":"{}"}}]}}"#, "x".repeat(33 * 1024 * 1024));
    is_error(&client.post(&[bearer("a")], large.as_bytes()), 413, "request_too_large", "33 MB");
    // The control: what is just small enough is taken (and the double repeats it).
    let fits =
        format!(r#"{{"messages":[{{"role":"user","content":"EXIT: 3 {}"}}]}}"#, "x".repeat(1024 * 1024));
    assert_eq!(client.post(&[bearer("a")], fits.as_bytes()).status, 500);

    is_error(&client.request("GET", "/v1/nothing", &[], b""), 404, "not_found_error", "unknown path");
    is_error(
        &client.request("GET", "/v1/messages", &[], b""),
        405,
        "invalid_request_error",
        "unknown method",
    );
    is_error(&client.request("DELETE", "/health", &[], b""), 405, "invalid_request_error", "unknown method");
    let zipped = [bearer("a"), ("content-encoding", "gzip".to_owned())];
    is_error(&client.post(&zipped, hello.as_bytes()), 415, "invalid_request_error", "gzip");
    let query = client.request("POST", "/prefix/v1/messages?beta=true", &[bearer("a")], hello.as_bytes());
    assert_eq!(query.text(), "[embedded] double: hello");

    // A head without a bound.
    let huge = head(&client, "POST /v1/messages HTTP/1.1", &format!("x-huge: {}\r\n", "y".repeat(300_000)));
    let answer = raw(&client, huge.as_bytes());
    assert!(answer.as_ref().is_none_or(|answer| answer.status == 431), "{answer:?}");
    let many: String = (0..200).map(|n| format!("x-{n}: y\r\n")).collect();
    let answer = raw(&client, head(&client, "POST /v1/messages HTTP/1.1", &many).as_bytes());
    assert!(answer.as_ref().is_none_or(|answer| answer.status == 431), "{answer:?}");
    for nonsense in [
        &b"\x16\x03\x01\x02\x00\x01\x00"[..],
        b"HELO example\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\r\nX",
    ] {
        let answer = raw_closed(&client, nonsense);
        assert!(answer.as_ref().is_none_or(|answer| answer.status == 400), "{nonsense:?}: {answer:?}");
    }
    // Two readers must not see two requests.
    let both = format!("{length}transfer-encoding: chunked\r\n");
    let smuggled = head(&client, "POST /v1/messages HTTP/1.1", &both)
        + "0\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    let answer = raw_closed(&client, smuggled.as_bytes());
    assert!(answer.as_ref().is_none_or(|answer| answer.status == 400), "{answer:?}");

    // A body in chunks.
    let chunked =
        head(&client, "POST /v1/messages HTTP/1.1", "transfer-encoding: chunked\r\nconnection: close\r\n");
    let (one, two) = hello.split_at(20);
    let chunks = format!("{:x}\r\n{one}\r\n{:x};ext=1\r\n{two}\r\n0\r\n\r\n", one.len(), two.len());
    let answer = raw(&client, (chunked.clone() + &chunks).as_bytes()).expect("an answer");
    assert_eq!(answer.text(), "[embedded] double: hello");
    let broken = raw_closed(&client, (chunked + "zz\r\n").as_bytes());
    assert!(broken.as_ref().is_none_or(|answer| answer.status == 400), "{broken:?}");

    // Expect: 100-continue.
    let mut stream = client.connect().expect("a connection");
    let expecting = head(
        &client,
        "POST /v1/messages HTTP/1.1",
        &format!("{length}expect: 100-continue\r\nconnection: close\r\n"),
    );
    stream.write_all(expecting.as_bytes()).expect("sent");
    let mut interim = [0; 25];
    stream.read_exact(&mut interim).expect("an interim answer");
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(hello.as_bytes()).expect("sent");
    assert_eq!(read(&mut BufReader::new(&stream)).expect("an answer").text(), "[embedded] double: hello");

    // Two requests at once on one connection are answered in their order.
    let keep = head(&client, "POST /v1/messages HTTP/1.1", &length) + &hello;
    let last = head(&client, "GET /health HTTP/1.1", "connection: close\r\n");
    let mut stream = client.connect().expect("a connection");
    stream.write_all((keep + &last).as_bytes()).expect("sent");
    let mut reader = BufReader::new(stream);
    assert_eq!(read(&mut reader).expect("the first").text(), "[embedded] double: hello");
    assert_eq!(read(&mut reader).expect("the second").json()["status"], "healthy");

    // A head that never ends, a body that never comes: the server ends them by itself. Both at once, for each
    // takes as long as the server's patience.
    thread::scope(|scope| {
        scope.spawn(|| {
            let begun = Instant::now();
            assert!(raw(&client, b"POST /v1/messages HTTP/1.1\r\nhost: x\r\n").is_none());
            assert!(begun.elapsed() < patience());
        });
        scope.spawn(|| {
            let starved = head(&client, "POST /v1/messages HTTP/1.1", &length);
            let answer = raw(&client, starved.as_bytes()).expect("an answer");
            is_error(&answer, 408, "invalid_request_error", "a body that never comes");
        });
    });
    assert_eq!(server.says("a", "still there"), "[embedded] double: still there");
}

/// As [`raw`], with our direction closed, so that a server that waits for more sees that none comes.
fn raw_closed(client: &Client, bytes: &[u8]) -> Option<Response> {
    let mut stream = client.connect().expect("a connection");
    stream.write_all(bytes).expect("sent");
    stream.shutdown(std::net::Shutdown::Write).expect("half closed");
    read(&mut BufReader::new(stream)).ok()
}

#[test]
fn t04_a_cli_that_is_missing_or_is_not_the_real_one_is_refused_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let start = |cli: &std::path::Path| {
        let options = Options { cli: cli.to_owned(), ..Options::with_double() };
        match Server::try_start(options) {
            Ok(_) => panic!("{} was accepted", cli.display()),
            Err((status, log)) => {
                assert!(!status.success(), "{status}");
                log
            }
        }
    };
    let missing = folder.path().join("none");
    let log = start(&missing);
    assert!(log.contains(missing.to_str().expect("text")) && log.contains("No such file"), "{log}");
    let program = |name: &str, text: &str, mode: u32| {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("a mode");
        path
    };
    let plain = start(&program("plain", "#!/bin/sh\n", 0o644));
    assert!(plain.contains("is not an executable file"), "{plain}");
    for (name, text) in [
        ("silent", "#!/bin/sh\nexit 0\n"),
        ("failing", "#!/bin/sh\necho why-it-failed >&2\nexit 9\n"),
        ("garbage", "#!/bin/sh\necho hello\nsleep 600\n"),
        ("no-program", "\x7fELF nonsense"),
    ] {
        let log = start(&program(name, text, 0o755));
        assert!(log.contains("self_test"), "{name}: {log}");
        assert!(name != "failing" || log.contains("why-it-failed"), "{log}");
    }
    // The double itself is one version off.
    let text =
        fs::read_to_string(support::double()).expect("the double").replace("\"2.1.330\"", "\"2.1.331\"");
    let log = start(&program("other-version", &text, 0o755));
    assert!(log.contains("the CLI is not of the version in cli.version"), "{log}");
}

#[test]
fn t05_a_cli_that_misbehaves_ends_its_own_run_and_nothing_else() {
    let here = environment();
    let mut options = Options::with_double().with("GAOLER_RUNS__SILENCE_SECONDS", 3 * here.slower);
    if !here.together {
        // One tenant at a time is what such a host promises: then who hangs is alone until its end, and no longer.
        let server = Server::start(options.clone());
        let of_cli =
            |line: &&str| line.contains("\"event\":\"spawned\"") && line.contains("\"kind\":\"cli\"");
        let spawned = || server.log().lines().filter(of_cli).count();
        let before = spawned();
        thread::scope(|scope| {
            let hangs = scope.spawn(|| server.client().messages("a", &ask("HANG")));
            until("the run that hangs", || (spawned() > before).then_some(()));
            is_error(&server.client().messages("b", &ask("beside")), 529, "overloaded_error", "beside");
            assert_eq!(hangs.join().expect("an answer").status, 504);
        });
        assert_eq!(server.says("b", "afterwards"), "[embedded] double: afterwards");
        // The rest is for the operator who lets them run together.
        options = options.with("GAOLER_ISOLATION__TENANTS_TOGETHER", true);
    }
    let server = Server::start(options);
    let client = server.client();
    server.says("a", "hello");
    server.says("b", "hello");
    let baseline = server.baseline();
    let rows = [
        ("CRASH", 500, "cli_exited"),
        ("CRASH LATE", 500, "cli_exited"),
        ("EXIT: 0", 500, "cli_exited"),
        ("EXIT: 7", 500, "cli_exited"),
        ("HANG", 504, "upstream_silent"),
        ("HANG LATE", 504, "upstream_silent"),
        ("DEAF", 500, "run_lost"),
        ("GARBAGE", 500, "cli_garbage"),
        ("BYTES", 500, "cli_garbage"),
        ("FLOOD", 500, "output_limit"),
        ("NOISE", 500, "output_limit"),
        ("LONG: 100", 500, "cli_garbage"),
    ];
    let all: Vec<_> = rows.iter().flat_map(|row| [(row, false), (row, true)]).collect();
    for some in all.chunks(6) {
        thread::scope(|scope| {
            // Whatever they do, a neighbour is answered meanwhile.
            scope.spawn(|| assert_eq!(server.says("b", "a neighbour"), "[embedded] double: a neighbour"));
            for &(&(text, status, code), stream) in some {
                let client = &client;
                scope.spawn(move || {
                    let mut body = ask(text);
                    body["stream"] = json!(stream);
                    let response = client.messages("a", &body);
                    assert!(response.whole, "{text}: {response:?}");
                    let begun = response.status == 200;
                    assert_eq!(
                        begun,
                        stream && (text.ends_with("LATE") || text == "FLOOD"),
                        "{text}: {response:?}"
                    );
                    let error = match begun {
                        true => {
                            let last = response.events().pop().expect("an event");
                            assert_eq!(last.name, "error", "{text}");
                            last.data
                        }
                        false => {
                            assert_eq!(response.status, status, "{text}: {response:?}");
                            response.json()
                        }
                    };
                    assert_eq!(error["error"]["details"]["error_code"], code, "{text}: {error}");
                });
            }
        });
    }
    // These are no faults of the run: it ends well.
    assert_eq!(server.says("a", "STDERR"), "[embedded] double: it is said");
    // By itself: beside the floods above, a debug build is longer at decoding those than the silence that it allows.
    let flooded = client.messages("a", &ask("STDERR FLOOD"));
    let code = flooded.json()["error"]["details"]["error_code"].clone();
    assert_eq!((flooded.status, code), (500, json!("output_limit")), "{flooded:?}");
    assert_eq!(server.says("a", "CHILD"), "[embedded] double: with a child");
    let lies = client.messages("a", &{
        let mut body = ask("LIES");
        body["stream"] = json!(true);
        body
    });
    let names: Vec<String> = lies.events().into_iter().map(|event| event.name).collect();
    assert_eq!(names.iter().filter(|name| *name == "message_start").count(), 1, "{lies:?}");
    assert_eq!(names.last().map(String::as_str), Some("message_stop"), "{lies:?}");
    assert!(!lies.text().contains("synthetic") && !lies.text().contains("before all"), "{lies:?}");
    let starts = lies.events().into_iter().filter(|event| event.name == "content_block_start");
    assert!(starts.into_iter().all(|event| event.data["content_block"]["type"] == "text"), "{lies:?}");
    // What a CLI writes to its stderr is the tenant's, not the log's.
    assert!(!server.log().contains("in-the-noise"), "a CLI's stderr stands in the log");
    server.settles_to(&baseline);
}
