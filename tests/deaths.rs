//! What happens when a process dies: every cage goes with whoever answers for it, no client hangs, and the next
//! start finds nothing. Needs root and the CLI. It must never wait without a bound.

mod support;

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::traces::{Process, Role, groups, processes};
use support::{Client, Options, Server, ask, bearer, environment, until};

/// Everything in a cage is gone this long after its supervisor: the promise is 1 s, the rest is the machine's.
const CAGE_GONE: Duration = Duration::from_secs(5);
/// A prompt whose answer takes longer than any test.
const ENDLESS: &str =
    "SLOW: 2000 this is an answer of a good many pieces, and each of them lets us wait for two seconds";

/// What the server says of itself at this path.
fn asks(client: &Client, path: &str) -> (u16, serde_json::Value) {
    let answer = client.request("GET", path, &[], b"");
    (answer.status, answer.json())
}

/// Waits until readiness is red.
fn drains(client: &Client) {
    let red = (503, json!({"status": "unready", "reason": "draining"}));
    until("red readiness", || (asks(client, "/readyz") == red).then_some(()));
}

/// One whose answer takes some seconds.
const LASTING: &str = "SLOW: 1000 this is an answer of some seconds, and of six pieces";

/// A streamed answer that has begun, and is not at its end.
struct Begun {
    reader: BufReader<TcpStream>,
}

impl Begun {
    fn new(client: &Client, tenant: &str, text: &str) -> Begun {
        let mut body = ask(text);
        body["stream"] = json!(true);
        let stream = client.connect().expect("a connection");
        let (name, value) = bearer(tenant);
        client
            .send(&stream, "POST", "/v1/messages", &[(name, value)], body.to_string().as_bytes())
            .expect("sent");
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        while !line.contains("text_delta") {
            line.clear();
            assert!(reader.read_line(&mut line).expect("a line") > 0, "the answer ended before it began");
        }
        Begun { reader }
    }

    /// What comes until the end, and whether the connection ended by a reset. A client that hangs fails here.
    fn rest(mut self) -> (String, bool) {
        let mut text = String::new();
        loop {
            match self.reader.read_line(&mut text) {
                Ok(0) => return (text, false),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return (text, true),
                Err(error) => panic!("the client hangs: {error}; so far {text}"),
            }
        }
    }
}

/// The processes of the server that are what `is` says.
fn of(server: &Server, is: impl Fn(&Process) -> bool) -> Vec<Process> {
    processes(server.pid(), server.options.uids)
        .into_iter()
        .filter(|process| !process.zombie && is(process))
        .collect()
}

fn die(process: &Process) {
    kill(Pid::from_raw(process.pid), Signal::SIGKILL).expect("killed");
}

/// Everything of the server is gone but what only a next start can remove, and that start removes it.
fn nothing_is_left_after_the_next_start(mut server: Server) {
    let (pid, uids) = (server.pid(), server.options.uids);
    let begun = Instant::now();
    until("the end of every cage", || processes(pid, uids).iter().all(|it| !it.is_caged()).then_some(()));
    assert!(begun.elapsed() < CAGE_GONE, "the cages lived for {:?}", begun.elapsed());
    until("the end of the others", || processes(pid, uids).iter().all(|it| it.pid == pid).then_some(()));
    server.wait();
    until("the end of the locks", || (server.traces().uid_locks == 0).then_some(()));
    let mut next = Server::start(server.options.clone());
    until("the sweep", || groups(pid).is_empty().then_some(()));
    assert_eq!(next.says("after", "hello"), "[embedded] hello");
    assert!(next.stop().success());
    assert!(next.traces().is_nothing(), "{:?}", next.traces());
}

#[test]
fn t01_a_killed_supervisor_takes_everything_along() {
    let server = Server::start(Options::default());
    let client = server.client();
    let clients = [Begun::new(&client, "a", ENDLESS), Begun::new(&client, "b", ENDLESS)];
    assert_eq!(of(&server, |it| it.role == Role::Init).len(), 2, "two cages run");
    server.signal(Signal::SIGKILL);
    for begun in clients {
        let (rest, _) = begun.rest();
        assert!(!rest.contains("message_stop"), "{rest}");
    }
    nothing_is_left_after_the_next_start(server);
}

#[test]
fn t02_a_killed_frontend_takes_every_cage_and_the_server_along() {
    let mut server = Server::start(Options::default());
    let client = server.client();
    let clients = [Begun::new(&client, "a", ENDLESS), Begun::new(&client, "b", ENDLESS)];
    let frontends = of(&server, |it| it.role == Role::Frontend);
    assert_eq!(frontends.len(), 1, "{frontends:?}");
    die(&frontends[0]);
    for begun in clients {
        let (rest, _) = begun.rest();
        assert!(!rest.contains("message_stop"), "{rest}");
    }
    // With an error, so that a service manager starts it again.
    assert_eq!(server.wait().code(), Some(1), "{}", server.log());
    assert!(server.traces().is_nothing(), "{:?}", server.traces());
    nothing_is_left_after_the_next_start(server);
}

#[test]
fn t03_a_killed_egress_or_init_ends_its_own_run_only() {
    let server = Server::start(Options::default());
    let client = server.client();
    server.says("a", "hello");
    server.says("b", "hello");
    let baseline = server.baseline();
    for (code, role) in [("egress_died", Role::Egress), ("cli_exited", Role::Init)] {
        let before: Vec<i32> = of(&server, |it| it.role == role).iter().map(|it| it.pid).collect();
        let victim = Begun::new(&client, "a", ENDLESS);
        let found = of(&server, |it| it.role == role && !before.contains(&it.pid));
        assert_eq!(found.len(), 1, "{code}: {found:?}");
        let bystander = Begun::new(&client, "b", LASTING);
        die(&found[0]);
        let (rest, reset) = victim.rest();
        assert!(rest.contains("event: error") && rest.contains(code) && !reset, "{code}: {rest}");
        // The neighbour's answer goes on, to its end.
        let (rest, _) = bystander.rest();
        assert!(rest.contains("event: message_stop"), "{code}: {rest}");
        server.settles_to(&baseline);
        assert_eq!(server.says("a", "hello again"), "[embedded] hello again");
    }
}

#[test]
fn t04_a_client_that_goes_away_ends_its_run() {
    let server = Server::start(Options::default());
    let client = server.client();
    server.says("a", "hello");
    let baseline = server.baseline();
    for _ in 0..3 {
        let begun = Begun::new(&client, "a", ENDLESS);
        // The control: what a run has on the machine is seen.
        let now = server.traces();
        assert!(now.processes.len() >= baseline.processes.len() + 3, "{now:?}");
        let here = environment();
        assert!(!here.network || now.networks > baseline.networks, "{now:?}");
        assert!(!here.pids || !here.full_proc || now.homes > baseline.homes, "{now:?}");
        drop(begun);
        server.settles_to(&baseline);
    }
    // One that goes before a word has come, too.
    let stream = client.connect().expect("a connection");
    client
        .send(&stream, "POST", "/v1/messages", &[bearer("a")], ask(ENDLESS).to_string().as_bytes())
        .expect("sent");
    until("a cage", || (!of(&server, Process::is_caged).is_empty()).then_some(()));
    drop(stream);
    server.settles_to(&baseline);
    assert_eq!(server.says("a", "hello"), "[embedded] hello");
}

#[test]
fn t05_sigterm_lets_what_runs_finish_and_takes_nothing_new() {
    let mut server = Server::start(Options::default());
    let client = server.client();
    let begun = Begun::new(&client, "a", LASTING);
    assert_eq!(asks(&client, "/readyz"), (200, json!({"status": "ready"})));
    assert_eq!(asks(&client, "/health").1["status"], "healthy");
    server.signal(Signal::SIGTERM);
    // Readiness goes red first, and whoever looks can see it: the run still goes on, and the server is well.
    drains(&client);
    assert_eq!(asks(&client, "/livez"), (200, json!({"status": "alive"})));
    let (status, health) = asks(&client, "/health");
    assert_eq!((status, &health["status"], &health["level"]), (200, &json!("draining"), &json!("balanced")));
    let refused = client.messages("b", &ask("hello"));
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("5")), "{refused:?}");
    assert!(refused.header("x-gaoler-run").is_none(), "{refused:?}");
    let (rest, reset) = begun.rest();
    assert!(rest.contains("event: message_stop") && !reset, "{rest}");
    assert_eq!(server.wait().code(), Some(0), "{}", server.log());
    assert!(server.traces().is_nothing(), "{:?}", server.traces());
    assert_eq!(groups(server.pid()).len(), 0);
}

#[test]
fn t06_a_second_sigterm_waits_for_nothing() {
    let mut server = Server::start(Options::default());
    let client = server.client();
    let begun = Begun::new(&client, "a", ENDLESS);
    server.signal(Signal::SIGTERM);
    drains(&client);
    // A signal right after the first one would be the same wish, told to a process and to its group.
    let first = std::time::Instant::now();
    until("a second wish", || (first.elapsed() > std::time::Duration::from_millis(200)).then_some(()));
    server.signal(Signal::SIGTERM);
    let (rest, _) = begun.rest();
    assert!(!rest.contains("message_stop"), "{rest}");
    assert_eq!(server.wait().code(), Some(0), "{}", server.log());
    assert!(server.traces().is_nothing(), "{:?}", server.traces());
}

#[test]
fn t07_a_run_that_outlasts_the_drain_is_ended_and_its_client_is_told() {
    let mut server = Server::start(Options::default().with("GAOLER_RUNS__DRAIN_SECONDS", 1));
    let client = server.client();
    let (begun, whole) = std::thread::scope(|scope| {
        // One whose status is still to come, and one that has begun: by then both run.
        let whole = scope.spawn(|| client.messages("b", &ask(ENDLESS)));
        until("a cage", || (!of(&server, |it| it.role == Role::Init).is_empty()).then_some(()));
        let begun = Begun::new(&client, "a", ENDLESS);
        server.signal(Signal::SIGTERM);
        drains(&client);
        (begun, whole.join().expect("an answer"))
    });
    assert_eq!((whole.status, whole.error().as_str()), (503, "api_error"), "{whole:?}");
    let (rest, reset) = begun.rest();
    assert!(rest.contains("event: error") && rest.contains("draining") && !reset, "{rest}");
    assert!(!rest.contains("message_stop"), "{rest}");
    assert_eq!(server.wait().code(), Some(0), "{}", server.log());
    // The supervisor ended both for this, and the frontend heard why.
    let log = server.log();
    let told = |event: &str| {
        log.lines().filter(|it| it.contains(event) && it.contains(r#""reason":"drained""#)).count()
    };
    assert_eq!((told(r#""event":"exit""#), told(r#""event":"run""#)), (2, 2), "{log}");
    assert!(server.traces().is_nothing(), "{:?}", server.traces());
}

#[test]
fn t08_a_run_that_nobody_can_resume_ends_with_its_answer_and_one_with_a_session_by_itself() {
    let server = Server::start(Options::default());
    let mut resumable = ask("hello");
    resumable["session_id"] = json!("6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b");
    for (body, reason) in [(ask("hello"), "finished"), (resumable, "exited")] {
        let answer = server.client().messages("a", &body);
        assert_eq!(answer.text(), "[embedded] hello", "{answer:?}");
        let run = answer.header("x-gaoler-run").expect("a run");
        // The log has its word before the client has the last byte.
        let lines = server.log();
        let mut lines = lines.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let line =
            lines.find(|line| line["event"] == "run" && line["run"] == run).expect("a word on the run");
        assert_eq!((&line["reason"], &line["code"]), (&json!(reason), &json!("end_turn")), "{line}");
    }
}

#[test]
fn r01_a_start_takes_a_running_neighbour_for_a_dead_one() {
    // On version 1 the two may share the pids hierarchy and not the memory hierarchy: a start that knew only
    // its own memory group took the other's groups for a dead instance's, and killed what ran in them.
    let server = Server::start(Options::default());
    let begun = Begun::new(&server.client(), "a", LASTING);
    let memory = groups(server.pid()).into_iter().find(|path| path.starts_with("/sys/fs/cgroup/memory"));
    let elsewhere = memory.and_then(|path| path.parent().map(|parent| parent.join("test-neighbour")));
    if let Some(folder) = &elsewhere {
        std::fs::create_dir_all(folder).expect("a memory group");
    }
    let mut neighbour = std::process::Command::new("/bin/sh");
    let own = Options::default();
    let state = tempfile::tempdir().expect("a folder");
    let serve = own.command(&state.path().join("state"));
    let enter = elsewhere.as_ref().map(|folder| format!("echo $$ > {}/cgroup.procs && ", folder.display()));
    neighbour.args(["-c", &format!("{}exec \"$0\" \"$@\"", enter.unwrap_or_default())]);
    neighbour.arg(serve.get_program()).args(serve.get_args()).env_clear();
    neighbour.envs(serve.get_envs().filter_map(|(name, value)| Some((name, value?))));
    neighbour.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
    let mut neighbour = neighbour.spawn().expect("a neighbour");
    let mut line = String::new();
    BufReader::new(neighbour.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
    let (rest, _) = begun.rest();
    kill(Pid::from_raw(neighbour.id().cast_signed()), Signal::SIGTERM).expect("sent");
    neighbour.wait().expect("an end");
    if let Some(folder) = &elsewhere {
        let _ = std::fs::remove_dir(folder);
    }
    assert!(line.starts_with("ready "), "the neighbour did not start: {line:?}");
    assert!(rest.contains("event: message_stop"), "the run was killed: {rest}");
    assert_eq!(server.says("a", "hello"), "[embedded] hello");
}

#[test]
fn r02_a_late_teardown_leaves_its_cgroup_and_uid_for_ever() {
    let server = Server::start(Options::with_double());
    server.says("a", "hello");
    let baseline = server.baseline();
    let mut stranger = std::process::Command::new("sleep").arg("600").spawn().expect("sleep");
    let response = std::thread::scope(|scope| {
        let client = server.client();
        let running = scope.spawn(move || client.messages("a", &ask("SLOW: 20")));
        // A process that is not the run's stays in its group, as one that the kernel is slow to end would.
        let leaves = || groups(server.pid()).into_iter().flat_map(std::fs::read_dir).flatten().flatten();
        until("the run's leaf", || {
            let used = |path: &std::path::Path| {
                std::fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|text| !text.is_empty())
            };
            let leaf = leaves().map(|leaf| leaf.path()).find(|path| used(path))?;
            std::fs::write(leaf.join("cgroup.procs"), stranger.id().to_string()).ok()
        });
        running.join().expect("an answer")
    });
    // The client is released all the same, and the operator is told.
    assert_eq!(response.status, 200, "{response:?}");
    assert!(server.log().contains("\"quarantined\""), "{}", server.log());
    assert_ne!(server.traces(), baseline);
    assert_eq!(server.says("a", "hello"), "[embedded] double: hello");
    stranger.kill().expect("killed");
    stranger.wait().expect("an end");
    server.settles_to(&baseline);
}
