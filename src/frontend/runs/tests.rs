//! The registry and its logs without a run: who joins what, what is kept, and for how long.

use ::http::{HeaderMap, HeaderName, HeaderValue};
use bytes::Bytes;

use super::log::{GRACE, Stage, Wanted};
use super::*;
use crate::frontend::answer::{Answer, Done, Ending, Heading};
use crate::frontend::cli::decode::Usage;
use crate::frontend::dialect::Dialect;
use crate::frontend::job::{OnDisconnect, Shape, Thinking};
use gaoler_protocol::Level;

fn asked(tenant: u8, head: &[(&'static str, &str)], body: &str) -> Asked {
    let value = |text: &str| HeaderValue::from_str(text).expect("a value");
    let head: HeaderMap =
        head.iter().map(|(name, text)| (HeaderName::from_static(name), value(text))).collect();
    Asked::new(&head, &[b"/v1/messages"], body.as_bytes()).expect("a key")(TenantKey([tenant; 32]))
}

fn about(run: u8) -> About {
    About {
        owner: "t".into(),
        owner_key: None,
        run: RunId([run; 16]),
        dialect: Dialect::Messages,
        shape: Shape::Events,
        session: None,
        model: "sonnet".into(),
        level: Level::Balanced,
        on_disconnect: OnDisconnect::Cancel,
        ids: false,
        asked_ms: u64::from(run),
    }
}

fn begun(runs: &Arc<Runs>, asked: &Asked, about: About) -> (Writer, Reader) {
    match runs.enter(asked, about).expect("no conflict") {
        Entered::Begun(writer, reader) => (writer, reader),
        Entered::Joined(_) => panic!("it joined"),
    }
}

fn joined(runs: &Arc<Runs>, asked: &Asked) -> Option<RunId> {
    // The run of a number that nobody has: it is a new one where nothing is joined.
    match runs.enter(asked, about(255)).expect("no conflict") {
        Entered::Joined(reader) => Some(reader.log().entry.about.run),
        Entered::Begun(writer, _) => {
            writer.end(None, Ending::Failed(ApiError::draining()), 0);
            None
        }
    }
}

fn answer(run: u8) -> Answer {
    let heading = Heading {
        id: "msg_01".into(),
        session: None,
        run: RunId([run; 16]),
        model: "m".into(),
        asked_at: 0,
        usage_last: false,
        servers: Vec::new(),
    };
    Answer::new(heading, Shape::Events, Thinking::Hidden)
}

fn done() -> Ending {
    Ending::Done(Done { stop_reason: "end_turn", usage: Usage::default(), cost_usd: None })
}

fn event(text: &str) -> Bytes {
    Bytes::from(format!("event: x\ndata: {text}\n\n"))
}

const MOMENT: Duration = Duration::from_millis(1);
const FIRST: &[(&str, &str)] = &[("x-stainless-retry-count", "0")];
const AGAIN: &[(&str, &str)] = &[("x-stainless-retry-count", "1")];

#[tokio::test]
async fn a_retry_joins_the_newest_first_attempt_of_the_same_words_by_the_same_tenant() {
    let runs = Arc::new(Runs::default());
    let (writer, reader) = begun(&runs, &asked(1, FIRST, "a"), about(1));
    assert_eq!(joined(&runs, &asked(1, AGAIN, "a")), Some(RunId([1; 16])));
    for other in [asked(2, AGAIN, "a"), asked(1, AGAIN, "b"), asked(1, FIRST, "c"), asked(1, &[], "c")] {
        assert_eq!(joined(&runs, &other), None);
    }
    // The same words without a word of an earlier attempt are another request, and a retry is then that one's.
    let (second, _also) = begun(&runs, &asked(1, FIRST, "a"), about(2));
    assert_eq!(joined(&runs, &asked(1, AGAIN, "a")), Some(RunId([2; 16])));
    // One that never was a run leaves nothing to join, the older one neither: that was another request.
    second.end(None, Ending::Failed(ApiError::draining()), 0);
    assert_eq!(joined(&runs, &asked(1, AGAIN, "a")), None);
    drop((writer, reader));
}

#[tokio::test]
async fn an_unnamed_answer_that_was_read_is_kept_for_half_a_minute_and_one_that_was_not_for_fifteen() {
    let runs = Arc::new(Runs::default());
    for (read, kept) in [(true, KEPT_READ), (false, KEPT)] {
        let body = format!("read {read}");
        let (writer, mut reader) = begun(&runs, &asked(1, FIRST, &body), about(u8::from(read) + 1));
        writer.write(event("one")).await.expect("a reader");
        if !read {
            drop(reader);
            writer.end(Some(answer(1)), done(), 0);
        } else {
            writer.end(Some(answer(1)), done(), 0);
            assert!(matches!(reader.read().await, Read::Events(1, events) if events.len() == 3));
            assert!(matches!(reader.read().await, Read::End(_)));
            drop(reader);
        }
        let ended =
            runs.find(&TenantKey([1; 32]), RunId([u8::from(read) + 1; 16])).expect("known").ended_at();
        let ended = ended.expect("it has ended");
        runs.tidy(ended + kept);
        assert!(joined(&runs, &asked(1, AGAIN, &body)).is_some(), "{body}");
        runs.tidy(ended + kept + MOMENT);
        assert_eq!(joined(&runs, &asked(1, AGAIN, &body)), None, "{body}");
    }
    assert_eq!(runs.held.all(), 0);
}

#[tokio::test]
async fn a_name_stands_for_one_request_of_one_tenant() {
    let runs = Arc::new(Runs::default());
    let key = &[("idempotency-key", "k-1")];
    let (writer, reader) = begun(&runs, &asked(1, key, "a"), about(1));
    assert_eq!(joined(&runs, &asked(1, key, "a")), Some(RunId([1; 16])));
    let conflict = runs.enter(&asked(1, key, "b"), about(9)).err().expect("another request");
    assert_eq!((conflict.status, conflict.should_retry), (409, Some(false)));
    assert_eq!(joined(&runs, &asked(2, key, "a")), None);
    writer.end(Some(answer(1)), done(), 0);
    drop(reader);
    let ended = runs.find(&TenantKey([1; 32]), RunId([1; 16])).expect("known").ended_at().expect("ended");
    runs.tidy(ended + KEPT);
    assert_eq!(joined(&runs, &asked(1, key, "a")), Some(RunId([1; 16])));
    runs.tidy(ended + KEPT + MOMENT);
    assert_eq!(joined(&runs, &asked(1, key, "b")), None, "the name is free again");
    let long = "x".repeat(KEY_BYTES_MAX + 1);
    for wrong in ["", "a b", &long] {
        let head =
            [(HeaderName::from_static("idempotency-key"), HeaderValue::from_str(wrong).expect("a value"))];
        let refused = Asked::new(&head.into_iter().collect(), &[], b"").err().expect("no key");
        assert_eq!(refused.status, 400);
    }
}

#[tokio::test]
async fn a_failure_is_tried_anew_unless_something_was_done_already() {
    let runs = Arc::new(Runs::default());
    for (error, again) in [
        (ApiError::internal("upstream_error", "x"), None),
        (ApiError::internal("upstream_error", "x").final_word(), Some(RunId([1; 16]))),
    ] {
        let (writer, _reader) = begun(&runs, &asked(1, FIRST, "a"), about(1));
        writer.end(Some(answer(1)), Ending::Failed(error), 0);
        assert_eq!(joined(&runs, &asked(1, AGAIN, "a")), again);
    }
}

#[tokio::test]
async fn a_run_without_a_reader_is_unwanted_at_once_later_or_never() {
    let runs = Arc::new(Runs::default());
    let begin = |run: u8, head: &[(&'static str, &str)], on_disconnect| {
        begun(&runs, &asked(1, head, &run.to_string()), About { on_disconnect, ..about(run) })
    };
    let (plain, reader) = begin(1, &[], OnDisconnect::Cancel);
    let log = Arc::clone(reader.log());
    assert_eq!(log.wanted(), Wanted::Yes);
    drop(reader);
    assert_eq!(log.wanted(), Wanted::No(Why::Gone));
    assert_eq!(plain.unwanted().await, Why::Gone);
    let (_returns, reader) = begin(2, FIRST, OnDisconnect::Cancel);
    let log = Arc::clone(reader.log());
    let before = Instant::now();
    drop(reader);
    let Wanted::Until(at) = log.wanted() else { panic!("its client may come back") };
    assert!(at >= before + GRACE && at <= Instant::now() + GRACE);
    // It is back, and so is its run.
    let reader = Reader::new(Arc::clone(&log), 1);
    assert_eq!(log.wanted(), Wanted::Yes);
    drop(reader);
    let (goes_on, reader) = begin(3, &[], OnDisconnect::Continue);
    let log = Arc::clone(reader.log());
    drop(reader);
    assert_eq!(log.wanted(), Wanted::Yes);
    runs.find(&TenantKey([1; 32]), RunId([3; 16])).expect("known").cancel(Why::Cancelled);
    assert_eq!(goes_on.unwanted().await, Why::Cancelled);
    // Another tenant does not know it, and each knows its own, the newest first.
    assert!(runs.find(&TenantKey([2; 32]), RunId([3; 16])).is_none());
    let own: Vec<u8> = runs.of(&TenantKey([1; 32])).iter().map(|log| log.entry.about.run.0[0]).collect();
    assert_eq!(own, [3, 2, 1]);
    assert!(runs.of(&TenantKey([2; 32])).is_empty());
}

#[tokio::test]
async fn a_full_log_drops_what_was_read_waits_for_what_was_not_and_gives_up_who_takes_nothing() {
    let runs = Arc::new(Runs::default());
    let (writer, mut reader) = begun(&runs, &asked(1, FIRST, "a"), about(1));
    let big = event(&"x".repeat(1 << 20));
    for _ in 0..3 {
        writer.write(big.clone()).await.expect("room");
    }
    for number in 1..=3 {
        // Each is more than a reader is handed at once.
        assert!(
            matches!(reader.read().await, Read::Events(first, events) if (first, events.len()) == (number, 1))
        );
    }
    // What was read goes, and whoever comes now cannot have it from the start.
    for _ in 0..3 {
        writer.write(big.clone()).await.expect("room");
    }
    let late = Reader::new(Arc::clone(reader.log()), 1).read().await;
    assert!(matches!(late, Read::Missing));
    assert!(reader.log().keeps_from() > 1);
    // Who takes nothing holds the writer up, until it is given up; then there is nobody.
    let log = Arc::clone(reader.log());
    {
        let mut held_up = std::pin::pin!(writer.write(big.clone()));
        let waits = |cx: &mut std::task::Context<'_>| {
            std::task::Poll::Ready(std::future::Future::poll(held_up.as_mut(), cx).is_pending())
        };
        assert!(std::future::poll_fn(waits).await);
        log.give_up();
        held_up.await.expect("what nobody waits for goes");
    }
    assert!(matches!(log.wanted(), Wanted::Until(_)));
    assert!(matches!(reader.read().await, Read::Missing));
    drop((writer, reader));
    runs.tidy(Instant::now() + KEPT + MOMENT);
    drop((log, late));
    assert_eq!(runs.held.all(), 0);
    assert!(runs.state().runs.is_empty());
}

#[tokio::test]
async fn all_together_have_a_bound_and_who_holds_most_gives_way() {
    let runs = Arc::new(Runs::default());
    let big = event(&"x".repeat(3 << 20));
    let keep = |run: u8, tenant: u8| {
        let (runs, big) = (Arc::clone(&runs), big.clone());
        async move {
            let key = run.to_string();
            let asked = asked(tenant, &[("idempotency-key", &key)], "a");
            let (writer, reader) = begun(&runs, &asked, about(run));
            writer.write(big).await.expect("room");
            writer.end(Some(answer(run)), done(), 0);
            drop(reader);
            asked
        }
    };
    let quiet = keep(1, 1).await;
    let mut loud = Vec::new();
    for run in 2..=60 {
        loud.push(keep(run, 2).await);
        assert!(runs.held.all() <= HELD_BYTES_MAX + (4 << 20));
    }
    assert_eq!(joined(&runs, &quiet), Some(RunId([1; 16])));
    assert_eq!(joined(&runs, &loud[0]), None);
    assert_eq!(joined(&runs, loud.last().expect("some")), Some(RunId([60; 16])));
}

/// Requests of this tenant that end at once, each of a number from this one on: refused, or after an agent ran.
fn end_many(runs: &Arc<Runs>, tenant: u32, from: u32, many: usize, refused: bool) {
    for number in from..from + u32::try_from(many).expect("few") {
        let of_tenant = |head: &[(&'static str, &str)]| {
            let mut asked = asked(0, head, &number.to_string());
            asked.tenant[..4].copy_from_slice(&tenant.to_be_bytes());
            asked
        };
        let mut run = [0; 16];
        run[..8].copy_from_slice(&[tenant.to_be_bytes(), number.to_be_bytes()].concat());
        let key = number.to_string();
        let (writer, _reader) =
            begun(runs, &of_tenant(&[("idempotency-key", &key)]), About { run: RunId(run), ..about(1) });
        match refused {
            true => writer.end(None, Ending::Failed(ApiError::draining()), 0),
            false => writer.end(Some(answer(1)), done(), 0),
        }
    }
}

#[tokio::test]
async fn r08_no_ones_burst_makes_anothers_name_for_a_request_forgotten() {
    let runs = Arc::new(Runs::default());
    let key = &[("idempotency-key", "quiet")];
    let (writer, reader) = begun(&runs, &asked(1, key, "a"), about(1));
    writer.end(Some(answer(1)), done(), 0);
    drop(reader);
    let known = |tenant: u32| {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&tenant.to_be_bytes());
        runs.of(&TenantKey(key)).len()
    };
    // One tenant's refusals; of many tenants, who each have fewer than one may; the same of runs.
    end_many(&runs, 7, 0, ENDED_MAX + 1, true);
    assert_eq!(known(7), TENANT_REFUSED_MAX);
    end_many(&runs, 7, 100_000, 2 * TENANT_ENDED_MAX, false);
    assert_eq!(known(7), TENANT_REFUSED_MAX + TENANT_ENDED_MAX);
    for (refused, from, all) in [(true, 0, REFUSED_MAX), (false, 100_000, ENDED_MAX)] {
        for tenant in 1000..1001 + u32::try_from(all / TENANT_REFUSED_MAX).expect("few") {
            end_many(&runs, tenant, from, TENANT_REFUSED_MAX, refused);
        }
    }
    runs.tidy(Instant::now());
    // Who had most has given way, and the quiet one's retry still finds its run.
    assert!(known(7) < TENANT_REFUSED_MAX + TENANT_ENDED_MAX, "{}", known(7));
    assert_eq!(joined(&runs, &asked(1, key, "a")), Some(RunId([1; 16])));
    let state = runs.state();
    assert_eq!((state.ended.all, state.refused.all), (ENDED_MAX, REFUSED_MAX));
    assert_eq!(state.runs.len(), ENDED_MAX + REFUSED_MAX);
    drop(state);
    // Of one's own, what nobody may come back for goes first: an unnamed run's answer, which was not kept.
    let runs = Arc::new(Runs::default());
    let (writer, reader) = begun(&runs, &asked(1, key, "a"), about(1));
    writer.end(Some(answer(1)), done(), 0);
    drop(reader);
    for number in 0..2 * TENANT_ENDED_MAX {
        let about = About { run: RunId((number as u128).to_be_bytes()), ..about(1) };
        let (writer, reader) = begun(&runs, &asked(1, &[], &number.to_string()), about);
        drop(reader);
        writer.end(Some(answer(1)), done(), 0);
    }
    assert_eq!(runs.of(&TenantKey([1; 32])).len(), TENANT_ENDED_MAX);
    assert!(runs.of(&TenantKey([1; 32])).iter().all(|log| log.stage() == Stage::Ended));
    assert_eq!(joined(&runs, &asked(1, key, "a")), Some(RunId([1; 16])));
    // After their time, nothing is left of any.
    runs.tidy(Instant::now() + KEPT + MOMENT);
    let state = runs.state();
    assert!(state.runs.is_empty() && state.ended.tenants.is_empty() && state.refused.tenants.is_empty());
    assert_eq!((state.ended.all, state.refused.all), (0, 0));
}

/// An answer of so many blocks, each made of one of these lines.
fn filled(run: u8, lines: &[String]) -> Answer {
    use crate::frontend::cli::decode;
    let mut answer = Answer::new(answer(run).heading, Shape::Json, Thinking::Shown).offering(true);
    for line in lines {
        answer.feed(decode::event(line.as_bytes()).expect("a line"));
    }
    assert_eq!(answer.ending(), None);
    answer
}

/// Bytes of memory that this process has.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").expect("statm");
    let pages = pages.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("pages");
    pages * nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).expect("a size").expect("one") as usize
}

/// What r04 measures in a process of its own, where nobody else's memory comes and goes.
const KIND: &str = "GAOLER_TEST_KIND";

/// Lines of one kind, some 3 MiB of an answer.
fn lines_of(kind: &str) -> Vec<String> {
    let message = |content: String| {
        format!(r#"{{"type":"assistant","message":{{"id":"m","model":"m","content":[{content}]}}}}"#)
    };
    let stream = |event: String| format!(r#"{{"type":"stream_event","event":{event}}}"#);
    let (text, small) = ("x".repeat(1 << 20), "x".repeat(100));
    let in_pieces = |of: &str, field: &str| {
        let start = stream(r#"{"type":"message_start","message":{"id":"s","model":"m"}}"#.to_owned());
        let block = r#"{"type":"content_block_start","index":0,"content_block":{"type":"thinking"}}"#;
        let delta = format!(r#"{{"type":"{of}","{field}":"{small}"}}"#);
        let piece = stream(format!(r#"{{"type":"content_block_delta","index":0,"delta":{delta}}}"#));
        [start, stream(block.to_owned())].into_iter().chain(vec![piece; 30_000]).collect()
    };
    let call = |n: usize| {
        let input = format!(r#"{{"a":"{}"}}"#, &text[..8000]);
        format!(r#"{{"type":"tool_use","id":"{n:0200}","name":"mcp__client__{small}","input":{input}}}"#)
    };
    match kind {
        "texts" => vec![message(format!(r#"{{"type":"text","text":"{text}"}}"#)); 3],
        "redacted thinking" => vec![message(format!(r#"{{"type":"redacted_thinking","data":"{text}"}}"#)); 3],
        "signatures" => in_pieces("signature_delta", "signature"),
        "thinking" => in_pieces("thinking_delta", "thinking"),
        "calls" => (0..4)
            .map(|k| message((0..100).map(|n| call(k * 100 + n)).collect::<Vec<_>>().join(",")))
            .collect(),
        "empty blocks" => vec![message(vec![r#"{"type":"text","text":""}"#; 1000].join(",")); 13],
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn r04_what_answers_are_said_to_take_is_what_they_take_of_every_kind() {
    const KINDS: &[&str] =
        &["texts", "redacted thinking", "signatures", "thinking", "calls", "empty blocks", "events"];
    let Ok(kind) = std::env::var(KIND) else {
        for kind in KINDS {
            let name =
                "frontend::runs::tests::r04_what_answers_are_said_to_take_is_what_they_take_of_every_kind";
            let mut child = std::process::Command::new(std::env::current_exe().expect("a path"));
            let measured =
                child.args(["--exact", name, "--nocapture"]).env(KIND, kind).output().expect("it runs");
            let said = String::from_utf8_lossy(&measured.stdout) + String::from_utf8_lossy(&measured.stderr);
            assert!(measured.status.success() && said.contains("1 passed"), "{kind}: {said}");
        }
        return;
    };
    let runs = Arc::new(Runs::default());
    let mut live = Vec::new();
    let one = |run: u8| begun(&runs, &asked(1, &[("idempotency-key", &run.to_string())], "a"), about(run));
    let lines = if kind == "events" { Vec::new() } else { lines_of(&kind) };
    let before = resident();
    for number in 0..10 {
        let (writer, reader) = one(number);
        match (kind.as_str(), number % 2) {
            // Of every size, read by nobody.
            ("events", _) => {
                let event = event(&"x".repeat([1, 10, 100, 1000, 10_000][usize::from(number % 5)]));
                for _ in 0..(3 << 20) / (event.len() + 128) {
                    writer.write(event.clone()).await.expect("room");
                }
                live.push((writer, reader, None));
            }
            // Kept after its end, and still being made.
            (_, 0) => writer.end(Some(filled(number, &lines)), done(), 0),
            _ => {
                let answer = filled(number, &lines);
                writer.holds(answer.bytes());
                live.push((writer, reader, Some(answer)));
            }
        }
    }
    let (took, held) = (resident().saturating_sub(before), runs.held.all());
    assert!((28 << 20..=HELD_BYTES_MAX).contains(&held), "{held}: none was forgotten");
    // What a line took while it was read is the allocator's to give back or not.
    assert!(took < held + held / 4 + (12 << 20), "{kind}: {took} bytes in an account of {held}");
    drop(live);
    runs.tidy(Instant::now() + KEPT + MOMENT);
    assert_eq!(runs.held.all(), 0);
}

#[tokio::test]
async fn r09_who_reads_nothing_of_most_is_cut_and_nobody_else_forgets_waits_or_is_cut() {
    let runs = Arc::new(Runs::default());
    let big = event(&"x".repeat(1 << 20));
    let keyed = |tenant: u8, run: u8| asked(tenant, &[("idempotency-key", &run.to_string())], "a");
    // A quiet tenant: an answer that is kept, one that is being read slowly, and a stream that goes on.
    let (writer, _) = begun(&runs, &keyed(1, 1), about(1));
    writer.end(Some(answer(1)), done(), 0);
    let (writer, mut slow) = begun(&runs, &keyed(1, 2), about(2));
    writer.write(big.clone()).await.expect("room");
    writer.end(Some(answer(2)), done(), 0);
    let (quiet, _reads) = begun(&runs, &keyed(1, 3), about(3));
    // A loud one: readers that take nothing of answers that have ended, and of some that have not.
    let mut loud = Vec::new();
    for run in 10..=80 {
        let (writer, reader) = begun(&runs, &keyed(2, run), about(run));
        for _ in 0..3 {
            writer.write(big.clone()).await.expect("room");
        }
        writer.end(Some(answer(run)), done(), 0);
        loud.push(reader);
        assert!(runs.held.all() <= HELD_BYTES_MAX + (4 << 20), "{} MiB after {run}", runs.held.all() >> 20);
    }
    assert!(matches!(loud[0].read().await, Read::Missing), "it is told that it is not kept");
    assert!(matches!(loud.pop().expect("the newest").read().await, Read::Events(1, _)));
    // The quiet one's are where they were, and its stream is not held up.
    assert_eq!(joined(&runs, &keyed(1, 1)), Some(RunId([1; 16])));
    assert!(matches!(slow.read().await, Read::Events(1, _)));
    for _ in 0..3 {
        quiet.write(big.clone()).await.expect("room");
    }
    assert!(!runs.is_crowded(&[1; 32]));
}

#[tokio::test]
async fn r09_answers_that_are_still_being_made_have_a_bound_and_the_largest_run_of_who_holds_most_ends() {
    let runs = Arc::new(Runs::default());
    let (quiet, _reads) = begun(&runs, &asked(1, &[], "quiet"), about(1));
    quiet.holds(16 << 20);
    let mut loud = Vec::new();
    for run in 10..30 {
        let (writer, reader) = begun(&runs, &asked(2, &[], &run.to_string()), about(run));
        writer.holds(9 << 20);
        writer.share().hears(usize::from(run) << 10);
        loud.push((writer, reader));
        if loud.iter().any(|(writer, _)| !matches!(writer.wanted(), Wanted::Yes)) {
            break;
        }
    }
    assert!(runs.held.all() > LIVE_BYTES_MAX && runs.held.all() < LIVE_BYTES_MAX + (16 << 20));
    let ended: Vec<_> =
        loud.iter().map(|(writer, _)| writer.wanted()).filter(|it| *it != Wanted::Yes).collect();
    assert_eq!(ended, [Wanted::No(Why::Crowded)]);
    assert_eq!(loud.last().expect("some").0.wanted(), Wanted::No(Why::Crowded), "it hears most");
    assert_eq!(quiet.wanted(), Wanted::Yes);
    // While it is about to end nobody else is: that is enough.
    quiet.share().hears(1);
    assert_eq!(loud.iter().filter(|(writer, _)| writer.wanted() != Wanted::Yes).count(), 1);
    let error = Why::Crowded.error();
    assert_eq!((error.code, error.should_retry), ("output_limit", Some(false)));
    assert!(error.message.contains("192 MiB"), "{}", error.message);
}

#[tokio::test]
async fn r09_a_large_answer_is_made_once_for_all_its_readers_and_told_in_pieces_that_end_where_it_is_cut() {
    use super::log::Form;
    use http_body_util::BodyExt;
    let runs = Arc::new(Runs::default());
    let asked = asked(1, &[("idempotency-key", "k")], "a");
    let json = About { shape: Shape::Json, ..about(1) };
    let (writer, reader) = begun(&runs, &asked, json.clone());
    let text = format!(r#"{{"type":"text","text":"{}"}}"#, "x".repeat(1 << 20));
    let line = format!(r#"{{"type":"assistant","message":{{"id":"m","model":"m","content":[{text}]}}}}"#);
    let answer = filled(1, &[line]);
    let bytes = answer.bytes();
    writer.end(Some(answer), done(), 0);
    let traces = crate::frontend::trace::Traces::new(None, &Default::default()).expect("none");
    let trace = traces.begin(&::http::Method::GET, "", &HeaderMap::new()).trace();
    let id = crate::frontend::http::RequestId("req".into(), trace);
    let whole = reply::answer(reader, &id, false).await.expect("an answer");
    let length: usize = whole.headers()["content-length"].to_str().expect("text").parse().expect("a number");
    let log = runs.find(&TenantKey([1; 32]), RunId([1; 16])).expect("known");
    assert_eq!(log.bytes(), bytes + length);
    // Others who read it, as a body and as events, take nothing more but the one other form.
    let mut others: Vec<_> = (0..8).map(|_| Reader::new(Arc::clone(&log), 1)).collect();
    assert!(matches!(others[0].read().await, Read::End(_)));
    assert_eq!(others[0].render(Form::Body, || panic!("it is made already")).len(), length);
    let events = reply::follow(others.pop().expect("some"), id.clone(), 2).into_body();
    let events = events.collect().await.expect("whole").to_bytes();
    assert!(events.starts_with(b"id: 01010101010101010101010101010101-3\nevent: content_block_delta"));
    assert!(events.ends_with(b"event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"));
    let held = log.bytes();
    assert!(held > bytes + 2 * length && held < bytes + 2 * length + 4096, "{held}");
    let mut body = whole.into_body();
    let first = body.frame().await.expect("a piece").expect("no error").into_data().expect("data");
    assert!(first.len() <= 64 << 10 && first.starts_with(b"{\"id\":"));
    // It is cut: a reader in the middle of it hears that it is not whole, and nothing is held.
    log.cut();
    assert_eq!((log.bytes(), runs.held.all()), (0, 0));
    assert!(body.frame().await.expect("a word").is_err());
}
