//! What a CLI says at its worst, over HTTP and without a cage: it ends its own run, and costs nobody else anything.
//! It must never leave a line out of what is tried because an honest CLI would not say it.

mod fake;

use std::sync::Arc;
use std::time::Duration;

use fake::{BEARER, House, LONG, Play, Script, Until, recorded, settings};
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;

const INIT: &str = "{\"type\":\"system\",\"subtype\":\"init\"}\n";
const START: &str = "{\"type\":\"stream_event\",\"event\":{\"type\":\"message_start\",\"message\":{\"id\":\"s\",\"model\":\"m\"}}}\n";
/// Bytes of a line that is within its bound.
const LARGE: usize = 4_000_000;
/// Bytes that the process may take for one such line, its own and the double's copies of it among them.
const PEAK_BYTES_MAX: usize = 64 << 20;

/// Bytes of memory that this process has, and the most that it had since this was asked last.
fn memory() -> (usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
        line.split_whitespace().next().and_then(|kib| kib.parse::<usize>().ok()).expect("KiB") * 1024
    };
    let found = (field("VmRSS:"), field("VmHWM:"));
    std::fs::write("/proc/self/clear_refs", "5").expect("the mark is set back");
    found
}

/// As many of these as a large line has room for.
fn many(one: &str) -> String {
    vec![one; LARGE / (one.len() + 1)].join(",")
}

fn assistant(model: &str, content: &str) -> String {
    format!(
        "{{\"type\":\"assistant\",\"message\":{{\"id\":\"w\",\"model\":\"{model}\",\"content\":[{content}]}}}}\n"
    )
}

/// Lines, with the word that their run's error has.
fn hostile() -> Vec<(&'static str, String, &'static str)> {
    let text = r#"{"type":"text","text":""}"#;
    let word = "x".repeat(LARGE);
    let asks = |id: &str, method: &str| {
        format!(
            "{{\"type\":\"control_request\",\"request_id\":\"{id}\",\"request\":{{\"subtype\":\"mcp_message\",\
             \"server_name\":\"client\",\"message\":{{\"id\":1,\"method\":\"{method}\"}}}}}}\n"
        )
    };
    vec![
        ("a model's name", assistant(&word, text), "bytes of a model's name"),
        ("blocks", assistant("m", &many(text)), "blocks of a line"),
        ("blocks of nothing", assistant("m", &many("{}")), "cli_garbage"),
        ("both", assistant(&word[..LARGE / 2], &many(text)[..LARGE / 2]), "cli_garbage"),
        ("nodes in a block", assistant("m", &format!(r#"{{"type":"text","x":[{}]}}"#, many(r#"{"":0}"#))), "cli_garbage"),
        ("a line", format!("{{\"type\":\"novel\",\"x\":\"{word}{word}\"}}\n"), "bytes of a line"),
        ("a request's id", asks(&word, "ping"), "a word of a request"),
        ("a request's method", asks("r", &word), "a word of a request"),
        ("depth", format!("{}\n", "[".repeat(LARGE)), "cli_garbage"),
        ("empty lines", "\n".repeat(LARGE), "cli_garbage"),
        ("tools", format!("{{\"type\":\"system\",\"subtype\":\"init\",\"tools\":[{}]}}\n", many("\"\"")), "tools"),
        ("results", format!("{{\"type\":\"user\",\"message\":{{\"content\":[{}]}}}}\n", many("{}")), "blocks of a line"),
        (
            "a number",
            "{\"type\":\"stream_event\",\"event\":{\"type\":\"message_delta\",\"usage\":{\"output_tokens\":-1}}}\n".into(),
            "cli_garbage",
        ),
        ("small blocks, again and again", assistant("m", &vec![text; 1000].join(",")).repeat(100), "16777216 bytes"),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o01_whatever_a_cli_says_ends_its_own_run_with_what_it_had_too_much_of_and_takes_little_memory() {
    let ways = [
        ("/v1/messages", r#"{"messages":[{"role":"user","content":"Hello"}]}"#),
        (
            "/v1/chat/completions",
            r#"{"model":"sonnet","stream":true,"messages":[{"role":"user","content":"Hello"}]}"#,
        ),
    ];
    for (name, lines, word) in hostile() {
        let play = || Script::Play(Play::of(format!("{INIT}{lines}")).until(Until::LeaseDrops));
        let house = House::new(settings(120), ways.iter().map(|_| play()).collect()).await;
        for (path, body) in ways {
            let (before, _) = memory();
            let reply = house.request(&format!("POST {path} HTTP/1.1\r\n{BEARER}"), body.as_bytes()).await;
            let (_, peak) = memory();
            assert!(reply.body.contains(word), "{name}, {path}: {:.300}", reply.body);
            let took = peak.saturating_sub(before);
            assert!(took <= PEAK_BYTES_MAX, "{name}, {path}: {} MiB", took >> 20);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o02_a_neighbour_is_answered_while_a_run_says_a_hundred_thousand_blocks_in_a_loud_models_name() {
    let told = Arc::new(Notify::new());
    let lines = [
        assistant(&"m".repeat(250), &vec![r#"{"type":"text","text":"x"}"#; 1000].join(",")).repeat(10),
        assistant(&"m".repeat(LARGE / 2), &many(r#"{"type":"text","text":"x"}"#)[..LARGE / 2]),
    ];
    let play =
        Play::of(format!("{INIT}{START}")).until(Until::GoesOn(Arc::clone(&told), lines.concat().into()));
    let house =
        House::new(settings(120), vec![Script::Play(play), Script::Play(Play::of(recorded("plain")))]).await;
    let body = br#"{"model":"sonnet","stream":true,"messages":[{"role":"user","content":"Hello"}]}"#;
    let mut loud = house.connect(&format!("POST /v1/chat/completions HTTP/1.1\r\n{BEARER}"), body).await;
    let mut head = [0; 12];
    loud.read_exact(&mut head).await.expect("it has begun");
    assert_eq!(&head, b"HTTP/1.1 200");
    told.notify_one();
    let asks = "POST /v1/messages HTTP/1.1\r\nauthorization: Bearer sk-ant-oat01-another-tenants-token\r\n";
    let neighbour = house.request(asks, br#"{"messages":[{"role":"user","content":"Hello"}]}"#).await;
    assert_eq!(neighbour.status, 200, "{neighbour:?}");
    let mut rest = Vec::new();
    tokio::time::timeout(LONG, loud.read_to_end(&mut rest)).await.expect("in time").expect("read");
    assert!(String::from_utf8_lossy(&rest).contains("cli_garbage"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o03_a_cli_that_asks_for_a_clients_tools_for_ever_ends_its_run_and_takes_little_memory() {
    let asks = |n: usize, method: &str| {
        format!(
            "{{\"type\":\"control_request\",\"request_id\":\"r{n}\",\"request\":{{\"subtype\":\"mcp_message\",\
             \"server_name\":\"client\",\"message\":{{\"jsonrpc\":\"2.0\",\"id\":{n},\"method\":\"{method}\"}}}}}}\n"
        )
    };
    let flood = |method: &str| (0..100_000).map(|n| asks(n, method)).collect::<String>();
    let schema = format!(r#"{{"type":"object","description":"{}"}}"#, "s".repeat(500_000));
    let body = format!(
        r#"{{"messages":[{{"role":"user","content":"Hello"}}],"tools":[{{"name":"w","input_schema":{schema}}}]}}"#
    );
    // One that reads nothing of what it asks for, and two that do, or may.
    for (play, word) in [
        (Play::of(format!("{INIT}{}", flood("ping"))).until(Until::LeaseDrops), "did not read"),
        (Play::of(format!("{INIT}{}", flood("tools/list"))).until(Until::LeaseDrops), "bytes of answers"),
        (Play::of(INIT).until(Until::Reads(flood("tools/list").into())), "bytes of answers"),
    ] {
        let mut house = House::new(settings(120), vec![Script::Play(play)]).await;
        let (before, _) = memory();
        let reply = house.messages(&body).await;
        let (_, peak) = memory();
        assert_eq!((reply.status, reply.code().as_str()), (500, "cli_garbage"), "{:.300}", reply.body);
        assert!(reply.body.contains(word), "{:.300}", reply.body);
        assert!(peak.saturating_sub(before) <= PEAK_BYTES_MAX, "{} MiB", (peak - before) >> 20);
        assert!(house.seen().await.lease_dropped);
    }
}

#[tokio::test]
async fn o04_a_tools_result_of_twenty_megabytes_is_no_fault_of_its_run() {
    let result = format!(
        "{{\"type\":\"user\",\"message\":{{\"role\":\"user\",\"content\":[{{\"type\":\"tool_result\",\
         \"tool_use_id\":\"t\",\"content\":[{{\"type\":\"image\",\"source\":{{\"data\":\"{}\"}}}}]}}]}}}}\n",
        "A".repeat(20 << 20)
    );
    let plain = String::from_utf8(recorded("plain")).expect("UTF-8");
    let (init, rest) = plain.split_once('\n').expect("lines");
    let house =
        House::new(settings(120), vec![Script::Play(Play::of(format!("{init}\n{result}{rest}")))]).await;
    let reply = tokio::time::timeout(
        Duration::from_secs(60),
        house.messages(r#"{"messages":[{"role":"user","content":"Hello"}]}"#),
    )
    .await
    .expect("in time");
    assert_eq!(reply.status, 200, "{:.300}", reply.body);
}

/// A turn that calls the client's tool, and what the CLI says after its result.
fn turn_with_a_call() -> (String, String) {
    let stream = |event: &str| format!("{{\"type\":\"stream_event\",\"event\":{event}}}\n");
    let call = r#"{"type":"content_block_start","index":0,"content_block":{"type":"tool_use","id":"t1","name":"mcp__client__w"}}"#;
    let first =
        [INIT.to_owned(), START.to_owned(), stream(call), stream(r#"{"type":"message_stop"}"#)].concat();
    let text =
        r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":"after it"}}"#;
    let end =
        "{\"type\":\"result\",\"subtype\":\"success\",\"is_error\":false,\"stop_reason\":\"end_turn\"}\n";
    (first, [START.to_owned(), stream(text), end.to_owned()].concat())
}

#[tokio::test]
async fn r13_a_result_goes_to_the_run_that_waits_only_where_that_has_what_the_request_names() {
    let tools = r#""tools":[{"name":"w","input_schema":{"type":"object"}}]"#;
    let first = |more: &str| format!(r#"{{{tools}{more},"messages":[{{"role":"user","content":"Hello"}}]}}"#);
    let second = |more: &str| {
        format!(
            r#"{{{tools}{more},"messages":[{{"role":"user","content":"Hello"}},{{"role":"assistant","content":[{{"type":"tool_use","id":"t1","name":"w","input":{{}}}}]}},{{"role":"user","content":[{{"type":"tool_result","tool_use_id":"t1","content":"r"}}]}}]}}"#
        )
    };
    let server = r#","mcp_servers":{"s":{"command":"x"}}"#;
    let other = r#","mcp_servers":{"s":{"command":"y"}}"#;
    // What is named first, what is named then, whether it is the same run that goes on, its level and a limit of it.
    let rows = [
        ("", "", true, "balanced", 0),
        (r#","security_level":"PARANOID""#, "", true, "paranoid", 0),
        (r#","security_level":"PARANOID""#, r#","security_level":"PARANOID""#, true, "paranoid", 0),
        ("", r#","security_level":"PARANOID""#, false, "paranoid", 0),
        (r#","security_level":"PARANOID""#, r#","security_level":"BALANCED""#, false, "balanced", 0),
        (r#","limits":{"memory_mib":300}"#, "", true, "balanced", 300),
        (r#","limits":{"memory_mib":300}"#, r#","limits":{"memory_mib":300}"#, true, "balanced", 300),
        ("", r#","limits":{"memory_mib":300}"#, false, "balanced", 300),
        (server, "", true, "balanced", 0),
        (server, server, true, "balanced", 0),
        (server, other, false, "balanced", 0),
        ("", server, false, "balanced", 0),
    ];
    for (named, then, goes_on, level, memory) in rows {
        let (begins, ends) = turn_with_a_call();
        let told = Arc::new(Notify::new());
        let waits = Play::of(begins).until(Until::GoesOn(Arc::clone(&told), ends.clone().into()));
        let anew = Play::of(format!("{INIT}{ends}"));
        let mut house = House::new(settings(120), vec![Script::Play(waits), Script::Play(anew)]).await;
        let reply = house.messages(&first(named)).await;
        assert_eq!((reply.status, &reply.json()["stop_reason"]), (200, &"tool_use".into()), "{reply:?}");
        if goes_on {
            told.notify_one();
        }
        let reply = house.messages(&second(then)).await;
        assert_eq!(reply.json()["content"][0]["text"], "after it", "{named}, {then}: {reply:?}");
        assert_eq!(reply.header("x-gaoler-level"), Some(level), "{named}, {then}");
        let seen = house.seen().await;
        let serves = match goes_on {
            true => {
                assert!(house.seen.try_recv().is_err(), "{named}, {then}: a second run");
                seen
            }
            false => house.seen().await,
        };
        let limit = serves.spawn.limits.memory_mib;
        assert_eq!((serves.spawn.level.name(), limit), (level, memory), "{named}, {then}");
    }
}
