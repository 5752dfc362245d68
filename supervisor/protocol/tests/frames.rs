//! Frames: every message reads as it was written, and nothing else is a message.

use gaoler_protocol::*;

const RUN: RunId = RunId([7; 16]);
const LIMITS: Limits = Limits {
    memory_mib: 1,
    tasks: 2,
    cpu_percent: 3,
    wall_ms: 4,
    tmp_mib: 5,
    file_mib: 6,
    open_files: u32::MAX,
    idle_ms: 8,
    output_mib: 9,
    disk_mib: 10,
    disk_kfiles: 11,
    egress_mib: 12,
};
const TOTALS: Totals = Totals {
    run: RUN,
    requests: 1,
    denials: 2,
    status: 529,
    input_tokens: 3,
    output_tokens: 4,
    cache_write_tokens: 5,
    cache_read_tokens: 6,
    bytes_up: u64::MAX,
    bytes_down: 8,
};

fn every_message() -> Vec<Message> {
    let layers = LayerName::ALL.iter().map(|&name| LayerRow { name, state: LayerState::Degraded, errno: 38 });
    vec![
        Message::Ready(Ready { role: Role::Egress, threads: 3 }),
        Message::Prove(Prove { rules: Rules::Directory }),
        Message::Proven(Proven { failed: 4, version: [2, 1, 330] }),
        Message::Listen(Listen { tier: Tier::Kernel, level: Level::Balanced, runs_max: 64, embedded: true }),
        Message::Spawn(Spawn {
            run: RUN,
            tenant: TenantKey([9; 32]),
            kind: Kind::Cli,
            level: Level::Balanced,
            conversation: Conversation::Session,
            ephemeral: false,
            proof: true,
            session: [3; 16],
            workspace: [0; 16],
            model: Model::new("claude-sonnet-5[1m]").unwrap(),
            effort: Effort::High,
            turns_max: 12,
            mcp_refused: true,
            budget_microusd: 1_250_000,
            limits: LIMITS,
        }),
        Message::Spawned(Spawned { run: RUN, limits: LIMITS, launch_us: 1_500, tier: Tier::Kernel }),
        Message::Refused(Refused { run: RUN, reason: Refusal::CageFailed, step: 17, errno: 13 }),
        Message::Serve(Serve {
            run: RUN,
            placeholder: Placeholder([5; 32]),
            level: Level::Balanced,
            vouch: true,
            requests_max: 10,
            egress_mib: 11,
            peer_uid: 12,
            tenant: [9; 16],
        }),
        Message::Vouched(Vouched { run: RUN, accepted: true, status: 200, after: 0 }),
        Message::Counted(TOTALS),
        Message::Denied(Denied { run: RUN, what: Denial::Path }),
        Message::Revoke(Empty {}),
        Message::Revoked(TOTALS),
        Message::Violation(Violation { run: RUN, what: Denial::Quota, count: 9 }),
        Message::Progress(TOTALS),
        Message::Exit(Exit {
            run: RUN,
            reason: Reason::Oom,
            code: 1,
            signal: 9,
            quarantined: true,
            wall_us: 1,
            user_us: 2,
            system_us: 3,
            maxrss_kib: 4,
            memory_peak: 5,
            tasks_peak: 6,
            oom_kills: 7,
            tasks_denied: 8,
            teardown_us: 9,
            requests: 10,
            denials: 11,
            input_tokens: 12,
            output_tokens: 13,
            cache_write_tokens: 0,
            cache_read_tokens: 0,
            bytes_up: 14,
            bytes_down: 15,
        }),
        Message::Layers(Layers { tier: Tier::Kernel, landlock_abi: 7, cgroup: 1, rows: Rows::new(layers) }),
        Message::Drain(Empty {}),
        Message::Drained(Empty {}),
        Message::Reload(Reload { asks: 7 }),
    ]
}

#[test]
fn every_message_reads_as_it_was_written() {
    for (sequence, message) in every_message().into_iter().enumerate() {
        let frame = message.encode(sequence as u64);
        assert_eq!(Message::decode(&frame), Ok((sequence as u64, message)));
    }
    assert!(LayerName::ALL.len() <= LAYER_ROWS, "Layers would cut rows");
}

#[test]
fn a_frame_that_is_not_exactly_one_is_none() {
    let good = Message::Drain(Empty {}).encode(1);
    let changed = |at: usize, to: u8| {
        let mut frame = good;
        frame[at] = to;
        frame.to_vec()
    };
    let check = |name: &str, bytes: &[u8], expected: Malformed| {
        assert_eq!(Message::decode(bytes), Err(expected), "{name}");
    };
    check("empty", &[], Malformed::Length(0));
    check("short", &good[..255], Malformed::Length(255));
    check("long", &[&good[..], &[0]].concat(), Malformed::Length(257));
    check("magic", &changed(0, b'g'), Malformed::Magic);
    check("version", &changed(4, 2), Malformed::Version(2));
    check("kind zero", &changed(6, 0), Malformed::Kind(0));
    check("kind unknown", &changed(6, 99), Malformed::Kind(99));
    check("padding", &changed(255, 1), Malformed::Field("padding"));
    let spawn = every_message().remove(4).encode(1);
    let spawn_with = |at: usize, to: u8| {
        let mut frame = spawn;
        frame[16 + at] = to;
        frame.to_vec()
    };
    check("kind of run", &spawn_with(48, 9), Malformed::Field("Kind"));
    check("level", &spawn_with(49, 0), Malformed::Field("Level"));
    check("conversation", &spawn_with(50, 200), Malformed::Field("Conversation"));
    check("a bool that is two", &spawn_with(51, 2), Malformed::Field("ephemeral"));
    check("a model with a blank", &spawn_with(86, b' '), Malformed::Field("model"));
    check("a model that is an option", &spawn_with(85, b'-'), Malformed::Field("model"));
    check("bytes after the model's end", &spawn_with(85 + 63, b'x'), Malformed::Field("model"));
}

/// A hundred thousand frames, random and mutated: each is refused or reads as what it says.
#[test]
fn no_bytes_make_the_decoder_panic() {
    let messages = every_message();
    // xorshift64: the same frames at every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut accepted = 0;
    for round in 0..100_000 {
        let mut frame = messages[round % messages.len()].encode(round as u64).to_vec();
        for _ in 0..=random() % 4 {
            let at = random() as usize % frame.len();
            frame[at] = random() as u8;
        }
        if random() % 16 == 0 {
            frame.truncate(random() as usize % 257);
        }
        if let Ok((sequence, message)) = Message::decode(&frame) {
            assert_eq!(message.encode(sequence).as_slice(), frame, "a frame with two readings");
            accepted += 1;
        }
    }
    assert!(accepted > 1_000, "the mutations are too wild to reach past the header: {accepted}");
}

#[test]
fn sections_read_as_written_and_never_past_the_end() {
    let bytes = [section(Section::System, b"be kind"), section(Section::Argv, b"ls\0-l\0")].concat();
    let read = sections(&bytes).unwrap();
    assert_eq!(read, [(Section::System, &b"be kind"[..]), (Section::Argv, &b"ls\0-l\0"[..])]);
    assert_eq!(sections(&bytes[..bytes.len() - 1]), Err(Malformed::Field("section")));
    assert_eq!(sections(&[9, 0, 0, 0, 0]), Err(Malformed::Field("Section")));
    assert_eq!(sections(&[1, 255, 255, 255, 255]), Err(Malformed::Field("section")));
}

#[test]
fn every_limit_has_its_name() {
    assert_eq!(LIMITS.rows().count(), Limits::NAMES.len());
    // One number each: a name that stood for another's field would show it twice.
    let mut limits = Limits::NONE;
    for (at, name) in Limits::NAMES.into_iter().enumerate() {
        *limits.named(name).unwrap() = at as u32 + 1;
    }
    assert!(limits.rows().map(|(_, limit)| limit).eq(1..=12));
    assert_eq!(limits.named("nice"), None);
}
