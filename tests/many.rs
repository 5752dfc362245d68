//! Many tenants at once: each gets its own answer, nobody's else, and what is left afterwards is nothing.
//! Needs root and the CLI. It must never measure: its deadlines only end what hangs.

mod support;

use std::io::{BufRead, BufReader};
use std::thread;
use std::time::Duration;

use serde_json::json;
use support::{Client, Options, Response, Server, ask, bearer, environment, until};

const TENANTS: usize = 10;
const REQUESTS: usize = 50;

/// What tenant `tenant` knows and nobody else does.
fn canary(tenant: usize) -> String {
    format!("CANARY-{tenant}-OF-{}", ["OTTER", "HERON", "LYNX", "MOTH", "NEWT"][tenant % 5])
}

/// Sends a streamed request and goes away as soon as its answer has begun.
fn cut(client: &Client, tenant: &str, text: &str) {
    let mut body = ask(text);
    body["stream"] = json!(true);
    let stream = client.connect().expect("a connection");
    client
        .send(&stream, "POST", "/v1/messages", &[bearer(tenant)], body.to_string().as_bytes())
        .expect("sent");
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.contains("text_delta") {
        line.clear();
        assert!(reader.read_line(&mut line).expect("a line") > 0, "the answer ended before it began");
    }
}

/// Fifty requests at once; every tenth client goes away half way.
fn fifty(server: &Server, slow: &str) {
    // Fifty starts of the CLI are more than a minute's work for two busy cores; a hang is still found.
    let client = Client { patience: Duration::from_secs(240), ..server.client() };
    let baseline = server.baseline();
    let answers: Vec<(usize, String, Response)> = thread::scope(|scope| {
        let one = |number: usize| {
            let client = &client;
            scope.spawn(move || {
                let (tenant, name) = (number % TENANTS, format!("many-{}", number % TENANTS));
                if number % 10 == 9 - number / 10 % 10 {
                    cut(client, &name, slow);
                    return None;
                }
                let canary = canary(tenant);
                let text =
                    format!("RUN: echo {canary} > mine-{number}; cat mine-*; {}", environment().list());
                Some((tenant, canary, client.messages(&name, &ask(&text))))
            })
        };
        let running: Vec<_> = (0..REQUESTS).map(one).collect();
        running.into_iter().filter_map(|it| it.join().expect("no panic")).collect()
    });
    assert_eq!(answers.len(), REQUESTS - REQUESTS / 10);
    for (tenant, own, response) in &answers {
        assert_eq!(response.status, 200, "{response:?}");
        let text = response.text();
        assert!(text.starts_with("[embedded] RUN ok:") && text.contains(own.as_str()), "{tenant}: {text}");
        for other in (0..TENANTS).filter(|other| other != tenant) {
            assert!(!text.contains(&canary(other)), "tenant {tenant} sees tenant {other}: {text}");
        }
    }
    server.settles_to(&baseline);
}

#[test]
fn t01_fifty_requests_of_ten_tenants_are_answered_each_with_its_own() {
    let server = Server::start(Options::default());
    // Admitted one by one first: what a tenant leaves for ever is no leftover.
    for tenant in 0..TENANTS {
        server.client().messages(&format!("many-{tenant}"), &ask("hello"));
    }
    fifty(&server, "SLOW: 500 an answer that comes slowly and whose client does not wait for its end at all");
    // What each wrote is still its own.
    let kept = server.says("many-3", "RUN: cat mine-* | sort -u");
    assert_eq!(kept, format!("[embedded] RUN ok:\n{}", canary(3)));
}

#[test]
fn t02_a_hundred_runs_of_the_double_leave_nothing() {
    let server = Server::start(Options::with_double());
    for tenant in 0..TENANTS {
        server.says(&format!("many-{tenant}"), "hello");
    }
    for _ in 0..2 {
        fifty(&server, "SLOW: 100");
    }
}

#[test]
fn t03_more_runs_than_allowed_are_told_to_come_back() {
    let server =
        Server::start(Options::with_double().with("GAOLER_RUNS__MAX", 3).with("GAOLER_RUNS__QUEUE_MAX", 0));
    let client = &server.client();
    server.says("a", "hello");
    let baseline = server.baseline();
    let slow = "SLOW: 1000";
    thread::scope(|scope| {
        let running: Vec<_> = (0..3)
            .map(|_| {
                let mut body = ask(slow);
                body["stream"] = json!(true);
                let stream = client.connect().expect("a connection");
                client
                    .send(&stream, "POST", "/v1/messages", &[bearer("a")], body.to_string().as_bytes())
                    .expect("sent");
                stream
            })
            .collect();
        until("three cages", || {
            let inits = server.traces().processes.iter().filter(|name| *name == "init").count();
            (inits == 3).then_some(())
        });
        let more: Vec<_> =
            ["a", "b", "a"].map(|tenant| scope.spawn(move || client.messages(tenant, &ask("hello")))).into();
        for one in more {
            let refused = one.join().expect("no panic");
            assert_eq!((refused.status, refused.error().as_str()), (529, "overloaded_error"), "{refused:?}");
            assert!(
                refused.header("retry-after").is_some_and(|after| after.parse::<u32>().is_ok()),
                "{refused:?}"
            );
        }
        drop(running);
    });
    server.settles_to(&baseline);
    assert_eq!(server.says("a", "hello"), "[embedded] double: hello");
}

#[test]
fn t04_a_quiet_tenant_waits_for_one_run_of_a_loud_one_and_no_more() {
    let options = Options::with_double().with("GAOLER_RUNS__MAX", 2).with("GAOLER_RUNS__TENANT_MAX", 1);
    let server = Server::start(options);
    let client = &Client { patience: Duration::from_secs(120), ..server.client() };
    for tenant in ["loud", "quiet"] {
        server.says(tenant, "hello");
    }
    let baseline = server.baseline();
    let load = || {
        let runs = client.request("GET", "/health", &[], b"").json()["runs"].clone();
        (runs["running"].as_u64(), runs["waiting"].as_u64())
    };
    thread::scope(|scope| {
        let loud: Vec<_> =
            (0..6).map(|_| scope.spawn(move || client.messages("loud", &ask("RUN: sleep 0.4")))).collect();
        // One runs although two could: the other place is another tenant's to have.
        until("the queue", || (load() == (Some(1), Some(5))).then_some(()));
        let quiet = client.messages("quiet", &ask("hello"));
        assert_eq!(quiet.status, 200, "{quiet:?}");
        let waiting = load().1.expect("a number");
        assert!(waiting >= 1, "the loud one's queue was over before the quiet one was answered");
        let mut waits = Vec::new();
        for one in loud {
            let response = one.join().expect("no panic");
            assert_eq!(response.status, 200, "{response:?}");
            waits.push(
                response.header("x-gaoler-queue-ms").and_then(|ms| ms.parse::<u64>().ok()).expect("a number"),
            );
        }
        waits.sort_unstable();
        assert!(waits[0] < 300 && waits[5] >= 5 * 300, "{waits:?}");
    });
    assert_eq!(load(), (Some(0), Some(0)));
    // Who goes away from the queue leaves no place behind, and starts nothing.
    thread::scope(|scope| {
        let running = scope.spawn(|| client.messages("loud", &ask("RUN: sleep 2")));
        until("its run", || (load() == (Some(1), Some(0))).then_some(()));
        let stream = client.connect().expect("a connection");
        client
            .send(&stream, "POST", "/v1/messages", &[bearer("loud")], ask("hello").to_string().as_bytes())
            .expect("sent");
        until("the queue", || (load() == (Some(1), Some(1))).then_some(()));
        drop(stream);
        until("nobody in it", || (load() == (Some(1), Some(0))).then_some(()));
        assert_eq!(running.join().expect("no panic").status, 200);
    });
    server.settles_to(&baseline);
    // With no place to wait, the tenant's own bound is said.
    drop(server);
    let options = Options::with_double().with("GAOLER_RUNS__TENANT_MAX", 1).with("GAOLER_RUNS__QUEUE_MAX", 0);
    let server = Server::start(options);
    let client = &server.client();
    thread::scope(|scope| {
        let running = scope.spawn(|| client.messages("loud", &ask("RUN: sleep 2")));
        let log =
            || server.log().contains("\"run\"") && server.traces().processes.iter().any(|it| it == "init");
        until("its run", || log().then_some(()));
        let more = client.messages("loud", &ask("hello"));
        assert_eq!((more.status, more.error().as_str()), (429, "rate_limit_error"), "{more:?}");
        let after: u64 = more.header("retry-after").and_then(|it| it.parse().ok()).expect("seconds");
        assert!((1..=60).contains(&after), "{after}");
        assert_eq!(client.messages("other", &ask("hello")).status, 200);
        assert_eq!(running.join().expect("no panic").status, 200);
    });
}

#[test]
fn t05_a_thousand_sessions_of_fifty_tenants_are_nobody_elses_and_last_over_a_restart() {
    const TENANTS: usize = 50;
    const SESSIONS: usize = 1_000;
    const CLIENTS: usize = 4;
    let folder = tempfile::tempdir().expect("a folder");
    let options = Options { state: Some(folder.path().join("state")), ..Options::with_double() };
    // A step that is prime to all of them visits each once, far from its neighbours.
    let order: Vec<usize> = (0..SESSIONS).map(|n| n * 397 % SESSIONS).collect();
    let id = |session: usize| format!("{session:08x}-0000-4000-8000-000000000001");
    let word = |session: usize| format!("WORD-{session}-OF-{}.", session % TENANTS);
    let turn = |server: &Server, session: usize, text: &str| {
        let client = Client { patience: Duration::from_secs(240), ..server.client() };
        let mut body = ask(text);
        body["session_id"] = json!(id(session));
        let response = client.messages(&format!("many-{}", session % TENANTS), &body);
        assert_eq!(response.status, 200, "{session}: {response:?}");
        response.text()
    };
    let all = |server: &Server, each: &(dyn Fn(&Server, usize) + Sync)| {
        thread::scope(|scope| {
            for part in 0..CLIENTS {
                let order = &order;
                scope
                    .spawn(move || order.iter().skip(part).step_by(CLIENTS).for_each(|&it| each(server, it)));
            }
        });
    };
    let mut server = Server::start(options);
    let again = server.options.clone();
    all(&server, &|server, session| {
        turn(server, session, &word(session));
    });
    assert!(server.stop().success());
    drop(server);
    // Everything anew: what is remembered is what the state folder holds.
    let server = Server::start(again);
    all(&server, &|server, session| {
        let history = turn(server, session, "HISTORY?");
        assert!(history.contains(&word(session)), "{session}: {history}");
        assert_eq!(
            history.matches("WORD-").count(),
            2,
            "its own word, said and answered: {session}: {history}"
        );
    });
    // Another tenant's id is a session of one's own, with nothing in it.
    let mut body = ask("HISTORY?");
    body["session_id"] = json!(id(0));
    let response = server.client().messages("many-1", &body);
    assert!(!response.text().contains("WORD-"), "{response:?}");
}

/// An upstream that knows one credential, and takes its time to say that it knows no other.
fn slow_to_refuse(known: String, slow: Duration) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = format!("http://{}", listener.local_addr().expect("bound"));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let known = known.clone();
            thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().expect("a copy"));
                let mut head = String::new();
                while reader.read_line(&mut head).is_ok_and(|bytes| bytes > 2) {}
                let status = if head.contains(&known) {
                    "200 OK"
                } else {
                    thread::sleep(slow);
                    "401 Unauthorized"
                };
                let answer =
                    format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}");
                let _ = std::io::Write::write_all(&mut &stream, answer.as_bytes());
            });
        }
    });
    address
}

#[test]
fn r05_two_hundred_invented_credentials_a_second_cost_a_quiet_tenant_nothing() {
    // Longer than the quiet tenant may wait: whoever waits for one stranger's refusal is found.
    let slow = Duration::from_secs(3);
    let upstream = slow_to_refuse(support::token("quiet"), slow);
    let options = Options { upstream, ..Options::with_double() };
    let server = Server::start(options.with("GAOLER_RUNS__MAX", 2).with("GAOLER_RUNS__QUEUE_MAX", 4));
    let client = &Client { patience: Duration::from_secs(120), ..server.client() };
    server.says("quiet", "hello");
    let baseline = server.baseline();
    let (over, sent) = (&std::sync::atomic::AtomicBool::new(false), &std::sync::atomic::AtomicUsize::new(0));
    thread::scope(|scope| {
        let flood = move || {
            let mut waiting = std::collections::VecDeque::new();
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let number = sent.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let mut body = ask("hello");
                body["on_disconnect"] = json!("continue");
                let stream = client.connect().expect("a connection");
                let head = [bearer(&format!("invented-{number}"))];
                let _ = client.send(&stream, "POST", "/v1/messages", &head, body.to_string().as_bytes());
                // Some two hundred of them are connected at a time; the others have gone away again.
                waiting.push_back(stream);
                if waiting.len() > 50 {
                    waiting.pop_front();
                }
                thread::sleep(Duration::from_millis(20));
            }
        };
        let floods: Vec<_> = (0..4).map(|_| scope.spawn(flood)).collect();
        let asked = || server.traces().processes.iter().filter(|it| it.contains("egress")).count();
        until("strangers who are asked about", || (asked() >= 1).then_some(()));
        for _ in 0..10 {
            let answer = client.messages("quiet", &ask("hello"));
            assert_eq!(answer.status, 200, "{answer:?}");
            let waited = answer.header("x-gaoler-queue-ms").and_then(|ms| ms.parse::<u64>().ok());
            assert!(waited.is_some_and(|ms| ms < 1000), "it waited for a stranger: {waited:?} ms");
            // Its own, and no more for one address than its part of the lane.
            assert!(asked() <= 4, "{} egresses", asked());
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        floods.into_iter().for_each(|flood| flood.join().expect("no panic"));
    });
    println!("{} strangers", sent.load(std::sync::atomic::Ordering::Relaxed));
    server.settles_to(&baseline);
    // Nobody but the quiet one was given a folder.
    assert_eq!(std::fs::read_dir(server.state.join("tenants")).expect("tenants").count(), 1);
}
