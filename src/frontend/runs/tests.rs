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
    assert_eq!(runs.held.load(Ordering::Relaxed), 0);
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
    assert!(matches!(reader.read().await, Read::Events(1, events) if events.len() == 3));
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
    assert_eq!(runs.held.load(Ordering::Relaxed), 0);
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
        assert!(runs.held.load(Ordering::Relaxed) <= HELD_BYTES_MAX + (4 << 20));
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
