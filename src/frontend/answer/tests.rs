//! The answer against what the real CLI printed, one snapshot for all recordings, and against forgeries.

use super::*;
use crate::frontend::cli::decode::{Lines, event};

fn answer(shape: Shape, thinking: Thinking) -> Answer {
    let heading = Heading {
        id: "msg".into(),
        session: None,
        run: RunId([0; 16]),
        model: "asked".into(),
        asked_at: 0,
        usage_last: false,
        servers: Vec::new(),
    };
    Answer::new(heading, shape, thinking)
}

/// Feeds every line, checks that what is emitted is well-formed, and returns the ending.
fn play(answer: &mut Answer, bytes: &[u8]) -> (Vec<Emit>, Ending) {
    let mut lines = Lines::default();
    lines.push(bytes);
    let mut emitted = Vec::new();
    while let Some(line) = lines.take_line().expect("short lines") {
        emitted.extend(answer.feed(event(&line).expect("a line of the CLI")));
    }
    answer.exited(None);
    let (rest, ending) = answer.finish();
    emitted.extend(rest);
    // A JSON answer forgets a broken turn that it has never shown; only events are a promise.
    if answer.shape == Shape::Events {
        well_formed(&emitted);
    }
    (emitted, ending)
}

/// One start, first; indexes 0, 1, 2, …; each block closed before the next begins.
fn well_formed(emitted: &[Emit]) {
    let mut open = None;
    let mut next = 0;
    for (i, step) in emitted.iter().enumerate() {
        match step {
            Emit::Start => assert_eq!(i, 0, "a second message_start: {emitted:?}"),
            Emit::BlockStart(index, _) => {
                assert!(i > 0 && open.is_none() && *index == next, "{emitted:?}");
                open = Some(*index);
                next += 1;
            }
            Emit::Text(index, _)
            | Emit::Thinking(index, _)
            | Emit::Signature(index, _)
            | Emit::Input(index, _) => {
                assert_eq!(open, Some(*index), "{emitted:?}");
            }
            Emit::BlockStop(index) => assert_eq!(open.take(), Some(*index), "{emitted:?}"),
        }
    }
    assert_eq!(open, None, "{emitted:?}");
}

#[test]
fn every_recording_of_the_cli_gives_the_answer_in_the_snapshot() {
    use std::fmt::Write;
    let folder = format!("{}/tests/cli-events", env!("CARGO_MANIFEST_DIR"));
    let mut names: Vec<_> = std::fs::read_dir(&folder)
        .expect("recordings")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    assert!(names.len() > 30);
    let mut seen = String::new();
    for name in &names {
        let bytes = std::fs::read(format!("{folder}/{name}")).expect("a recording");
        play(&mut answer(Shape::Events, Thinking::Shown), &bytes);
        play(&mut answer(Shape::Events, Thinking::Hidden), &bytes);
        let mut answer = answer(Shape::Json, Thinking::Shown);
        let (_, ending) = play(&mut answer, &bytes);
        let _ = writeln!(seen, "== {name}");
        for block in &answer.blocks {
            let short: String = block.text.chars().take(100).collect();
            let _ = writeln!(seen, "{:?} {short:?} ({} bytes)", block.kind, block.text.len());
        }
        let _ = match ending {
            Ending::Done(done) => writeln!(seen, "done {} of {}", done.stop_reason, answer.heading.model),
            Ending::Failed(error) => {
                writeln!(
                    seen,
                    "failed {} {} {:?} {}",
                    error.status, error.code, error.should_retry, error.message
                )
            }
        };
    }
    let path = format!("{}/tests/snapshots/answers.txt", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("GAOLER_TEST_BLESS").is_some() {
        std::fs::write(&path, &seen).expect("written");
    }
    let snapshot = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(seen, snapshot, "if this is meant: GAOLER_TEST_BLESS=1 cargo test --lib");
}

#[test]
fn a_stream_is_well_formed_whatever_a_tool_writes_to_the_clis_stdout() {
    const LINES: &[&str] = &[
        r#"{"type":"stream_event","event":{"type":"message_start","message":{"id":"a","model":"m","usage":{}}}}"#,
        r#"{"type":"stream_event","event":{"type":"message_stop"}}"#,
        r#"{"type":"stream_event","event":{"type":"content_block_start","index":0,"content_block":{"type":"text","text":"t"}}}"#,
        r#"{"type":"stream_event","event":{"type":"content_block_start","index":9,"content_block":{"type":"thinking"}}}"#,
        r#"{"type":"stream_event","event":{"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"x"}}}"#,
        r#"{"type":"stream_event","event":{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"d"}}}"#,
        r#"{"type":"stream_event","event":{"type":"content_block_delta","index":9,"delta":{"type":"signature_delta","signature":"s"}}}"#,
        r#"{"type":"stream_event","event":{"type":"content_block_stop","index":0}}"#,
        r#"{"type":"stream_event","event":{"type":"content_block_stop","index":77}}"#,
        r#"{"type":"assistant","message":{"id":"b","model":"m","content":[{"type":"text","text":"whole"}]}}"#,
        r#"{"type":"assistant","message":{"id":"c","model":"<synthetic>","content":[{"type":"text","text":"no"}]}}"#,
        r#"{"type":"system","subtype":"api_retry","error_status":null}"#,
    ];
    // Every sequence of four lines, for both kinds of client of thinking: 41,472 streams.
    let n = LINES.len();
    for thinking in [Thinking::Shown, Thinking::Hidden] {
        for code in 0..n.pow(4) {
            let stream: String =
                (0..4).map(|place| format!("{}\n", LINES[code / n.pow(place) % n])).collect();
            let mut answer = answer(Shape::Events, thinking);
            let (emitted, _) = play(&mut answer, stream.as_bytes());
            assert!(!emitted.iter().any(|step| matches!(step, Emit::Text(_, text) if text == "no")));
        }
    }
}

#[test]
fn an_answer_without_text_still_has_a_first_block_of_text() {
    let mut answer = answer(Shape::Json, Thinking::Hidden);
    let result = r#"{"type":"result","subtype":"success","is_error":false,"result":"said by the CLI"}"#;
    let (emitted, ending) = play(&mut answer, format!("{result}\n").as_bytes());
    assert!(matches!(ending, Ending::Done(Done { stop_reason: "end_turn", .. })));
    assert_eq!(emitted[0], Emit::Start);
    assert_eq!(answer.blocks[0].text, "said by the CLI");
}

#[test]
fn what_ran_tools_must_not_be_repeated_blindly() {
    let tool =
        r#"{"type":"assistant","message":{"id":"b","model":"m","content":[{"type":"tool_use","id":"t"}]}}"#;
    let mut answer = answer(Shape::Json, Thinking::Hidden);
    answer.feed(event(tool.as_bytes()).expect("a line"));
    assert!(answer.tool_at_work());
    let back = r#"{"type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"t"}]}}"#;
    answer.feed(event(back.as_bytes()).expect("a line"));
    assert!(!answer.tool_at_work());
    answer.exited(None);
    let (_, ending) = answer.finish();
    assert!(matches!(ending, Ending::Failed(error) if error.should_retry == Some(false)));
}

#[test]
fn a_refused_credential_does_not_wait_for_the_clis_retries() {
    for (status, expected) in [(401, 401), (403, 403)] {
        let mut answer = answer(Shape::Json, Thinking::Hidden);
        answer.feed(Event::Retry(Some(status)));
        assert!(matches!(answer.ending(), Some(Ending::Failed(error)) if error.status == expected));
    }
    let mut answer = answer(Shape::Json, Thinking::Hidden);
    answer.feed(Event::Retry(Some(529)));
    assert_eq!(answer.ending(), None);
}

/// An answer for a client with tools, fed with these lines.
fn offered(lines: &[serde_json::Value]) -> Answer {
    let mut answer = answer(Shape::Json, Thinking::Hidden).offering(true);
    for line in lines {
        let _ =
            answer.feed(crate::frontend::cli::decode::event(line.to_string().as_bytes()).expect("an event"));
    }
    answer
}

#[test]
fn calls_of_a_clients_tools_end_the_answer_with_their_message_and_other_tools_do_not() {
    use serde_json::json;
    let stream = |event: serde_json::Value| json!({"type": "stream_event", "parent_tool_use_id": null, "event": event});
    let start = stream(
        json!({"type": "message_start", "message": {"id": "m", "model": "x", "usage": {"input_tokens": 3, "output_tokens": 1}}}),
    );
    let call = |id: &str, name: &str| {
        stream(
            json!({"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "id": id, "name": name, "input": {}}}),
        )
    };
    let piece = |text: &str| {
        stream(
            json!({"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": text}}),
        )
    };
    let used = stream(
        json!({"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}}),
    );
    let stop = stream(json!({"type": "message_stop"}));
    let theirs = "mcp__client__weather";
    let mut one = offered(&[
        start.clone(),
        call("t1", theirs),
        piece("{\"a\":"),
        piece("1}"),
        used.clone(),
        stop.clone(),
    ]);
    assert!(one.waits());
    assert_eq!(one.calls(), ["t1"]);
    let (_, ending) = one.finish();
    let Ending::Done(done) = ending else { panic!("an end") };
    assert_eq!((done.stop_reason, done.usage.input_tokens, done.usage.output_tokens), ("tool_use", 3, 9));
    assert_eq!(one.blocks.len(), 1, "no text is made up beside a call");
    assert_eq!(one.blocks[0].text, "{\"a\":1}");
    // The CLI's own tools and those of other servers are no client's.
    for (id, name) in [("t1", "Bash"), ("t1", "mcp__other__weather")] {
        assert!(!offered(&[start.clone(), call(id, name), stop.clone()]).waits(), "{name}");
    }
    // What a broken stream called is not called.
    let retry = json!({"type": "system", "subtype": "api_retry", "error_status": 529});
    assert!(!offered(&[start.clone(), call("t1", theirs), retry, start.clone(), stop.clone()]).waits());
    // A message that was not streamed ends when its call waits.
    let block = json!({"type": "tool_use", "id": "t2", "name": theirs, "input": {"a": 1}});
    let whole = json!({"type": "assistant", "message": {"id": "m9", "model": "x", "content": [block]}});
    let mut answer = offered(&[whole]);
    assert!(!answer.waits());
    answer.call_waits();
    assert!(answer.waits());
    assert_eq!(answer.blocks[0].text, "{\"a\":1}");
}

#[test]
fn r02_an_answer_that_takes_too_much_memory_is_an_error_of_its_run_in_either_dialect() {
    use crate::frontend::{completions, sse};
    let line = |blocks: &str| {
        format!(r#"{{"type":"assistant","message":{{"id":"m","model":"m","content":[{blocks}]}}}}"#)
    };
    let many = |block: &str| line(&vec![block; 1024].join(","));
    let large = "x".repeat(1 << 20);
    let rows = [
        many(r#"{"type":"text","text":""}"#),
        line(&format!(r#"{{"type":"redacted_thinking","data":"{large}"}}"#)),
        line(&format!(r#"{{"type":"text","text":"{large}"}}"#)),
    ];
    for row in rows {
        let (mut answer, mut taken, mut written) = (answer(Shape::Events, Thinking::Shown), 0, 0);
        while answer.ending().is_none() {
            let steps = answer.feed(event(row.as_bytes()).expect("a line"));
            for bytes in [sse::events(&answer, &steps), completions::events(&answer, &steps)] {
                // A chunk's own words, and what it says, which is in the line.
                assert!(bytes.len() <= 512 * steps.len() + row.len(), "{} of {}", bytes.len(), steps.len());
                written += bytes.len();
            }
            taken += row.len();
            assert!(taken < 64 << 20, "the bound is never asked");
        }
        assert!(answer.bytes() > ANSWER_BYTES_MAX && answer.bytes() < 2 * ANSWER_BYTES_MAX);
        assert!(written < 16 * ANSWER_BYTES_MAX);
        let (_, ending) = answer.finish();
        let Ending::Failed(error) = ending else { panic!("{ending:?}") };
        assert_eq!((error.code, error.should_retry), ("output_limit", Some(false)));
        assert!(error.message.contains(&ANSWER_BYTES_MAX.to_string()), "{}", error.message);
    }
    // Calls have a number that is said too.
    let call = |n: usize| {
        let block = format!(r#"{{"type":"tool_use","id":"t{n}","name":"mcp__client__w"}}"#);
        format!(
            r#"{{"type":"stream_event","event":{{"type":"content_block_start","index":0,"content_block":{block}}}}}"#
        )
    };
    let start =
        r#"{"type":"stream_event","event":{"type":"message_start","message":{"id":"m","model":"m"}}}"#;
    let mut answer = answer(Shape::Events, Thinking::Shown).offering(true);
    answer.feed(event(start.as_bytes()).expect("a line"));
    for n in 0..=CALLS_MAX {
        assert_eq!(answer.ending(), None);
        answer.feed(event(call(n).as_bytes()).expect("a line"));
    }
    assert_eq!(answer.calls_before(7), 7);
    assert!(matches!(answer.ending(), Some(Ending::Failed(error)) if error.message.contains("1024 calls")));
}

#[test]
fn r02_a_broken_turn_that_is_left_out_leaves_no_count_of_it() {
    let block = |text: &str| {
        format!(
            r#"{{"type":"stream_event","event":{{"type":"content_block_start","index":0,"content_block":{{"type":"text","text":"{text}"}}}}}}"#
        )
    };
    let start =
        r#"{"type":"stream_event","event":{"type":"message_start","message":{"id":"m","model":"m"}}}"#;
    let mut answer = answer(Shape::Json, Thinking::Shown);
    for line in [start, &block("one"), start, &block("two"), &block("three")] {
        answer.feed(event(line.as_bytes()).expect("a line"));
    }
    assert!(answer.said_before(1, &Kind::Text) && !answer.said_before(0, &Kind::Text));
    answer.feed(Event::Retry(None));
    assert_eq!(answer.blocks.len(), 1);
    assert_eq!(answer.bytes(), answer.blocks[0].bytes());
    answer.feed(Event::Retry(None));
    assert_eq!(answer.blocks.len(), 1);
}
