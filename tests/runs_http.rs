//! Runs that outlive a connection: who joins them, who follows them, who ends them, and who never hears of them.
//! It must never wait by sleeping: every wait ends with what it waits for, or with a liveness bound.

mod fake;

use std::sync::Arc;

use fake::{BEARER, House, LONG, Play, Reply, Script, Until, recorded, settings};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::Notify;

const HELLO: &str = r#"{"messages":[{"role":"user","content":"Hello"}]}"#;
const HELLO_STREAMED: &str = r#"{"stream":true,"messages":[{"role":"user","content":"Hello"}]}"#;
const OTHER: &str = "authorization: Bearer sk-ant-oat01-another-tenants-token\r\n";

/// A run that begins to answer, and goes on when it is told to.
fn told() -> (Script, Arc<Notify>) {
    let told = Arc::new(Notify::new());
    let [first, rest] = halves();
    (Script::Play(Play::of(first).until(Until::GoesOn(Arc::clone(&told), rest.into()))), told)
}

/// What the CLI says up to its first piece of text, and the rest.
fn halves() -> [String; 2] {
    let said = String::from_utf8(recorded("plain")).expect("UTF-8");
    let at = said.find("content_block_delta").expect("a text");
    let at = at + said[at..].find('\n').expect("a line") + 1;
    [said[..at].to_owned(), said[at..].to_owned()]
}

/// One that ends with its stdin, like the CLI.
fn plain() -> Script {
    Script::Play(Play::of(recorded("plain")))
}

/// What the CLI says first; the run then goes on until its lease is dropped.
fn endless() -> Script {
    Script::Play(Play::of(halves()[0].clone()).until(Until::LeaseDrops))
}

async fn post(house: &House, head: &str, body: &str) -> Reply {
    house.request(&format!("POST /v1/messages HTTP/1.1\r\n{head}"), body.as_bytes()).await
}

async fn get(house: &House, path: &str, head: &str) -> Reply {
    house.request(&format!("GET {path} HTTP/1.1\r\n{head}"), b"").await
}

/// Looks until it is so.
async fn until<T>(mut look: impl AsyncFnMut() -> Option<T>) -> T {
    tokio::time::timeout(LONG, async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
        }
    })
    .await
    .expect("in time")
}

/// A request whose answer is read until it contains these words, and then left.
async fn cut(house: &House, head: &str, body: &str, words: &str) -> TcpStream {
    let head = format!("POST /v1/messages HTTP/1.1\r\n{BEARER}{head}");
    let mut stream = house.connect(&head, body.as_bytes()).await;
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains(words) {
        assert!(stream.read_buf(&mut bytes).await.expect("read") > 0);
    }
    stream
}

/// This tenant's only run, once there is one in this state.
async fn only(house: &House, status: &str) -> Value {
    until(async || {
        let list = get(house, "/v1/runs", BEARER).await.json();
        list["data"].as_array().expect("a list").iter().find(|run| run["status"] == status).cloned()
    })
    .await
}

/// The text of an answer: of its JSON, or of its events.
fn text(body: &str) -> String {
    if let Ok(message) = serde_json::from_str::<Value>(body) {
        return message["content"][0]["text"].as_str().unwrap_or_default().to_owned();
    }
    let events =
        body.lines().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
    events.filter_map(|event| event["delta"]["text"].as_str().map(ToOwned::to_owned)).collect()
}

#[tokio::test]
async fn t140_a_retry_joins_the_run_of_its_first_attempt_and_the_agent_runs_once() {
    for (body, shape) in [(HELLO, "json"), (HELLO_STREAMED, "events")] {
        // One script: a second run would have none.
        let (script, told) = told();
        let mut house = House::new(settings(120), vec![script]).await;
        let first = cut(&house, "x-stainless-retry-count: 0\r\n", body, "").await;
        only(&house, "running").await;
        drop(first);
        // The first attempt is cut while it waits; its run goes on, and the second hears it from the start.
        let head = format!("{BEARER}x-stainless-retry-count: 1\r\n");
        told.notify_one();
        let reply = post(&house, &head, body).await;
        assert_eq!(reply.status, 200, "{shape} {reply:?}");
        assert_eq!(reply.header("x-gaoler-idempotent-replay"), Some("true"), "{shape}");
        assert_eq!(text(&reply.body), "[embedded] Hello", "{shape} {reply:?}");
        if shape == "events" {
            assert!(reply.body.starts_with("event: message_start"), "{reply:?}");
            assert!(reply.body.ends_with("data: {\"type\":\"message_stop\"}\n\n"), "{reply:?}");
        }
        // And a third, after the end, the same.
        let third = post(&house, &format!("{BEARER}x-stainless-retry-count: 2\r\n"), body).await;
        assert_eq!((third.status, &third.body), (200, &reply.body), "{shape}");
        assert_eq!(third.header("x-gaoler-idempotent-replay"), Some("true"));
        assert_eq!(house.seen().await.stdin.matches("\"type\":\"user\"").count(), 1);
    }
}

#[tokio::test]
async fn t141_no_tenant_joins_sees_or_ends_another_tenants_run() {
    let (script, told) = told();
    let mut house = House::new(settings(120), vec![script, plain(), plain()]).await;
    let head = "x-stainless-retry-count: 0\r\nidempotency-key: same\r\n";
    let first = cut(&house, head, HELLO_STREAMED, "message_start").await;
    let run = only(&house, "running").await["id"].as_str().expect("an id").to_owned();
    for head in ["x-stainless-retry-count: 1\r\n", "idempotency-key: same\r\n"] {
        let others = post(&house, &format!("{OTHER}{head}"), HELLO_STREAMED).await;
        assert_eq!((others.status, others.header("x-gaoler-idempotent-replay")), (200, None));
        assert_ne!(others.header("x-gaoler-run"), Some(run.as_str()));
        assert_eq!(house.seen().await.stdin.matches("\"type\":\"user\"").count(), 1);
    }
    let known = get(&house, "/v1/runs", OTHER).await.json();
    assert!(known["data"].as_array().expect("a list").iter().all(|one| one["id"] != run.as_str()), "{known}");
    // A run of somebody else's is like one that is not, in every byte but the request's name.
    let nobodys = "0".repeat(32);
    for (method, path) in [("GET", ""), ("GET", "/events"), ("POST", "/cancel")] {
        let mut answers = Vec::new();
        for id in [run.as_str(), &nobodys, "no-id"] {
            let reply =
                house.request(&format!("{method} /v1/runs/{id}{path} HTTP/1.1\r\n{OTHER}"), b"").await;
            assert_eq!((reply.status, reply.code().as_str()), (404, "run_not_found"), "{method} {path}");
            answers.push(reply.json()["error"].clone());
        }
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
        let nobody = house.request(&format!("{method} /v1/runs/{run}{path} HTTP/1.1\r\n"), b"").await;
        assert_eq!((nobody.status, nobody.code().as_str()), (401, "credential_missing"));
    }
    assert_eq!(get(&house, &format!("/v1/runs/{run}"), BEARER).await.json()["status"], "running");
    told.notify_one();
    drop(first);
}

#[tokio::test]
async fn t142_a_key_stands_for_one_request() {
    let mut house = House::new(settings(120), vec![plain()]).await;
    let head = format!("{BEARER}idempotency-key: order-7\r\n");
    let first = post(&house, &head, HELLO).await;
    assert_eq!((first.status, first.header("x-gaoler-idempotent-replay")), (200, None));
    let again = post(&house, &head, HELLO).await;
    assert_eq!((again.status, &again.body), (200, &first.body));
    assert_eq!(again.header("x-gaoler-idempotent-replay"), Some("true"));
    assert_eq!(again.header("x-gaoler-run"), first.header("x-gaoler-run"));
    for (body, more) in [(HELLO_STREAMED, ""), (HELLO, "x-gaoler-level: paranoid\r\n")] {
        let other = post(&house, &format!("{head}{more}"), body).await;
        assert_eq!((other.status, other.code().as_str()), (409, "idempotency_conflict"));
        assert_eq!(other.header("x-should-retry"), Some("false"));
    }
    let wrong = post(&house, &format!("{BEARER}idempotency-key: a b\r\n"), HELLO).await;
    assert_eq!((wrong.status, wrong.code().as_str()), (400, "invalid_request"));
    assert_eq!(house.seen().await.stdin.matches("\"type\":\"user\"").count(), 1);
    // A failure in which nothing was done is no answer: the same request may be tried anew.
    let scripts = vec![Script::Refuse(gaoler_protocol::Refusal::Busy, 0), plain()];
    let house = House::new(settings(120), scripts).await;
    assert_eq!(post(&house, &head, HELLO).await.status, 529);
    assert_eq!(post(&house, &head, HELLO).await.status, 200);
}

#[tokio::test]
async fn t143_a_run_may_go_on_without_its_client_and_be_heard_to_the_end() {
    for streamed in [true, false] {
        let (script, told) = told();
        let mut house = House::new(settings(120), vec![script]).await;
        let body = format!(
            r#"{{"on_disconnect":"continue","stream":{streamed},"messages":[{{"role":"user","content":"Hello"}}]}}"#
        );
        let first = cut(&house, "", &body, if streamed { "content_block_start" } else { "" }).await;
        let run = only(&house, "running").await;
        assert_eq!((&run["on_disconnect"], &run["ended_at"]), (&"continue".into(), &Value::Null));
        drop(first);
        told.notify_one();
        let seen = house.seen().await;
        assert!(seen.stdin.contains("Hello"));
        let run = only(&house, "ended").await;
        assert_eq!((&run["stop_reason"], &run["error_code"]), (&"end_turn".into(), &Value::Null));
        assert!(run["usage"]["output_tokens"].as_u64() > Some(0), "{run}");
        // From the start, each event with its id; then from the middle.
        let id = run["id"].as_str().expect("an id");
        let path = format!("/v1/runs/{id}/events");
        let all = get(&house, &path, BEARER).await;
        assert_eq!((all.status, all.header("content-type")), (200, Some("text/event-stream; charset=utf-8")));
        let events: Vec<&str> = all.body.split_terminator("\n\n").collect();
        for (number, event) in events.iter().enumerate() {
            assert!(event.starts_with(&format!("id: {id}-{}\nevent: ", number + 1)), "{event}");
        }
        assert!(events[0].contains("message_start") && events[events.len() - 1].contains("message_stop"));
        assert_eq!(text(&all.body), "[embedded] Hello");
        let rest = get(&house, &path, &format!("{BEARER}last-event-id: {id}-3\r\n")).await;
        assert_eq!(rest.body, events[3..].join("\n\n") + "\n\n");
        for wrong in ["3", "x-3", &format!("{}-3", "0".repeat(32)), &format!("{id}-"), &format!("{id}--1")] {
            let reply = get(&house, &path, &format!("{BEARER}last-event-id: {wrong}\r\n")).await;
            assert_eq!((reply.status, reply.code().as_str()), (400, "invalid_request"), "{wrong}");
        }
    }
}

#[tokio::test]
async fn t144_a_stream_with_ids_goes_on_where_it_was_cut() {
    let (script, told) = told();
    let mut house = House::new(settings(120), vec![script]).await;
    let head = "idempotency-key: k\r\nx-gaoler-events: ids\r\n";
    let first = cut(&house, head, HELLO_STREAMED, "-2\nevent: content_block_start").await;
    let id = only(&house, "running").await["id"].as_str().expect("an id").to_owned();
    drop(first);
    // Whoever follows a live run gets its rest as it comes.
    let path = format!("GET /v1/runs/{id}/events HTTP/1.1\r\n{BEARER}last-event-id: {id}-2\r\n");
    let mut follower = house.connect(&path, b"").await;
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains("-3\nevent: content_block_delta") {
        assert!(follower.read_buf(&mut bytes).await.expect("read") > 0);
    }
    assert!(!String::from_utf8_lossy(&bytes).contains("content_block_start"));
    told.notify_one();
    tokio::time::timeout(LONG, follower.read_to_end(&mut bytes)).await.expect("in time").expect("read");
    assert!(String::from_utf8_lossy(&bytes).contains("event: message_stop"));
    assert_eq!(house.seen().await.stdin.matches("\"type\":\"user\"").count(), 1);
    // Without the header no id is written.
    let house = House::new(settings(120), vec![plain()]).await;
    assert!(!post(&house, BEARER, HELLO_STREAMED).await.body.contains("id: "));
}

#[tokio::test]
async fn t145_a_tenant_ends_its_run_by_name_and_whoever_reads_it_is_told() {
    let session = r#"{"session_id":"6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b","messages":[{"role":"user","content":"Hello"}]}"#;
    for (body, polite) in [(HELLO, false), (session, true)] {
        let mut house = House::new(settings(120), vec![endless()]).await;
        let head = format!("POST /v1/messages HTTP/1.1\r\n{BEARER}");
        let mut waiting = house.connect(&head, body.as_bytes()).await;
        let id = only(&house, "running").await["id"].as_str().expect("an id").to_owned();
        let line = format!("POST /v1/runs/{id}/cancel HTTP/1.1\r\n{BEARER}");
        assert_eq!(house.request(&line, b"").await.status, 200);
        let mut bytes = Vec::new();
        tokio::time::timeout(LONG, waiting.read_to_end(&mut bytes)).await.expect("in time").expect("read");
        let text = String::from_utf8_lossy(&bytes);
        assert!(
            text.contains(r#""error_code":"cancelled""#) && text.contains("x-should-retry: false"),
            "{text}"
        );
        let run = get(&house, &format!("/v1/runs/{id}"), BEARER).await.json();
        assert_eq!((&run["status"], &run["error_code"]), (&"ended".into(), &"cancelled".into()));
        let seen = house.seen().await;
        assert!(seen.lease_dropped);
        // A session is told first, so that it keeps what was said.
        assert_eq!(seen.stdin.contains("interrupt"), polite);
        assert_eq!(house.request(&line, b"").await.status, 200, "twice is no error");
    }
}

#[tokio::test]
async fn t146_one_who_waits_knows_its_place_and_can_leave_the_queue() {
    let mut settings = settings(120);
    settings.runs.max = 1;
    let (script, told) = told();
    let mut house = House::new(settings, vec![script, plain()]).await;
    let running = cut(&house, "", HELLO_STREAMED, "message_start").await;
    let head = format!("POST /v1/messages HTTP/1.1\r\n{BEARER}");
    let mut waiting = Vec::new();
    for number in 1..=2 {
        waiting.push(house.connect(&head, HELLO.as_bytes()).await);
        until(async || {
            let list = get(&house, "/v1/runs", BEARER).await.json();
            let places = list["data"].as_array().expect("a list").iter();
            (places.filter(|run| run["queue_position"].is_u64()).count() == number).then_some(())
        })
        .await;
    }
    let list = get(&house, "/v1/runs", BEARER).await.json();
    let queued: Vec<&Value> =
        list["data"].as_array().expect("a list").iter().filter(|run| run["status"] == "queued").collect();
    let mut places: Vec<u64> = queued.iter().filter_map(|run| run["queue_position"].as_u64()).collect();
    places.sort_unstable();
    assert_eq!(places, [1, 2]);
    let first = queued.iter().find(|run| run["queue_position"] == 1).expect("the first");
    let id = first["id"].as_str().expect("an id");
    let line = format!("POST /v1/runs/{id}/cancel HTTP/1.1\r\n{BEARER}");
    assert_eq!(house.request(&line, b"").await.status, 200);
    told.notify_one();
    // One of both was cancelled, the other has its turn.
    let mut answers = Vec::new();
    for mut stream in waiting {
        let mut bytes = Vec::new();
        tokio::time::timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("in time").expect("read");
        answers.push(String::from_utf8_lossy(&bytes).into_owned());
    }
    assert_eq!(answers.iter().filter(|answer| answer.contains("\"cancelled\"")).count(), 1, "{answers:?}");
    assert_eq!(answers.iter().filter(|answer| answer.contains("[embedded] Hello")).count(), 1, "{answers:?}");
    // The one that never had a place never was a run.
    house.seen().await;
    house.seen().await;
    assert!(house.seen.try_recv().is_err());
    drop(running);
}

/// A stranger's request with a credential of its own invention.
async fn stranger(house: &House, number: usize, body: &str) -> TcpStream {
    let head = format!("authorization: Bearer sk-ant-oat01-invented-{number:08}\r\n");
    house.connect(&format!("POST /v1/messages HTTP/1.1\r\n{head}"), body.as_bytes()).await
}

/// All that comes back on a connection.
async fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    tokio::time::timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("in time").expect("read");
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn r05_credentials_that_nobody_knows_take_no_place_and_no_turn_of_who_is_known() {
    const STRANGERS: usize = 100;
    let mut settings = settings(120);
    (settings.runs.max, settings.runs.tenant_max, settings.runs.queue_max) = (1, 1, 2);
    let (asks, mut asked) = tokio::sync::mpsc::unbounded_channel::<fake::Asked>();
    // A script for each run of the quiet tenant, and none for anybody else: whoever else begins one ends the double.
    let quiet_runs = 5;
    let house = House::asking(settings, (0..quiet_runs).map(|_| plain()).collect(), Some(asks)).await;
    let quiet = async || {
        let reply = post(&house, BEARER, HELLO).await;
        let waited = reply.header("x-gaoler-queue-ms").and_then(|ms| ms.parse::<u64>().ok());
        (reply.status, waited.is_some_and(|ms| ms < 1000))
    };
    // The upstream is asked about it once, and then it is known.
    let (first, ()) = tokio::join!(quiet(), async {
        asked.recv().await.expect("a question").status.send(200).expect("heard");
    });
    assert_eq!(first, (200, true));
    // An upstream that takes its time: no question is answered for now. Each request asks to outlive its connection.
    let body = r#"{"on_disconnect":"continue","messages":[{"role":"user","content":"Hello"}]}"#;
    let mut strangers = Vec::new();
    for number in 0..STRANGERS {
        strangers.push(stranger(&house, number, body).await);
    }
    let mut pending = vec![asked.recv().await.expect("a question"), asked.recv().await.expect("a question")];
    // All of them come from one address, which has its part of the lane and no more; the quiet tenant has its place.
    for _ in 1..quiet_runs {
        assert_eq!(quiet().await, (200, true));
        assert!(asked.try_recv().is_err(), "more questions at a time than one address may have");
    }
    assert_eq!(
        get(&house, "/v1/runs", BEARER).await.json()["data"].as_array().map(Vec::len),
        Some(quiet_runs)
    );
    // Who goes away is not asked about, whatever they wished: what is left is what has been asked already.
    let stays = strangers.split_off(STRANGERS / 2);
    drop(strangers);
    let mut refused = 0;
    let mut busy = 0;
    let answers = async {
        for stream in stays {
            let answer = rest(stream).await;
            refused += usize::from(answer.contains("401") && answer.contains("credential_refused"));
            busy += usize::from(answer.starts_with("HTTP/1.1 529") && answer.contains("retry-after: "));
        }
    };
    let mut questions = pending.len();
    let upstream = async {
        loop {
            let next = match pending.pop() {
                Some(next) => next,
                None => asked.recv().await.expect("a question"),
            };
            questions += 1;
            next.status.send(401).expect("heard");
        }
    };
    tokio::select! {
        () = answers => {}
        () = upstream => {}
    }
    assert_eq!(refused + busy, STRANGERS / 2, "{refused} {busy}");
    // Those that stayed and had a place in the lane's queue, the two that were asked about already, and nobody else.
    assert!(questions <= STRANGERS / 2 + 4, "{questions}");
    assert_eq!(house.said.len(), 0);
}

#[tokio::test]
async fn r05_the_upstreams_no_is_remembered_and_its_yes_too() {
    let (asks, mut asked) = tokio::sync::mpsc::unbounded_channel::<fake::Asked>();
    let house = House::asking(settings(120), vec![plain(), plain()], Some(asks)).await;
    let answered = async |status: u16, head: &str| {
        let upstream = async {
            let question = asked.recv().await.expect("a question");
            question.status.send(status).expect("heard");
            question.credential
        };
        tokio::join!(post(&house, head, HELLO), upstream)
    };
    let mut answered = answered;
    // What is no word on the credential is handed on, and asked again.
    for (status, code) in
        [(429, "upstream_rate_limited"), (529, "upstream_overloaded"), (503, "upstream_unavailable")]
    {
        let (reply, credential) = answered(status, OTHER).await;
        assert_eq!(reply.code(), code, "{reply:?}");
        assert!(reply.header("retry-after").is_some(), "{reply:?}");
        assert!(credential.ends_with("sk-ant-oat01-another-tenants-token"));
    }
    assert_eq!(answered(401, OTHER).await.0.status, 401);
    // From here on nobody is asked about either: there is nobody who would answer.
    let (reply, _) = answered(200, BEARER).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    drop(asked);
    let again = post(&house, OTHER, HELLO).await;
    assert_eq!((again.status, again.code().as_str()), (401, "credential_refused"));
    // Its body is not even read.
    let unread = house.request(&format!("POST /v1/messages HTTP/1.1\r\n{OTHER}"), b"nonsense").await;
    assert_eq!((unread.status, unread.code().as_str()), (401, "credential_refused"));
    assert_eq!(post(&house, BEARER, HELLO).await.status, 200);
}
