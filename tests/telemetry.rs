//! Traces, as a collector of the operator's sees them: what they say, what they never say, and that nobody waits for it.
//! Needs root and the CLI. It must never wait without a bound.

#[path = "support/collector.rs"]
mod collector;
#[path = "support/names.rs"]
mod names;
mod support;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use collector::{Answer, Authority, Collector, attribute};
use names::Names;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::{Value, json};
use support::traces::{Process, Role, processes};
use support::{Options, Response, Server, ask, bearer, environment, token, until};

/// The spans of one request and its run.
const NAMES: [&str; 6] = ["POST /v1/messages", "queue", "launch", "cli", "upstream", "teardown"];
/// A prompt that would be seen wherever it went.
const PROMPT: &str = "hello, my-very-own-words";
/// What a key of the collector's looks like.
const KEY: &str = "the-collectors-own-key-0123456789";

fn options(url: &str) -> Options {
    Options::default().with("GAOLER_TELEMETRY__OTLP_ENDPOINT", url).with("GAOLER_SERVER__METRICS", "true")
}

fn exporter(server: &Server) -> Option<Process> {
    let mut all = processes(server.pid(), server.options.uids).into_iter();
    // Until it is itself it still is what the supervisor forked.
    all.find(|it| it.role == Role::Exporter && it.program == "gaoler-exporter" && !it.zombie)
}

/// The figure of this name.
fn figure(server: &Server, name: &str) -> u64 {
    let answer = server.client().request("GET", "/metrics", &[], b"");
    let text = String::from_utf8(answer.body.clone()).expect("text");
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    found.unwrap_or_else(|| panic!("no {name}: {text}"))
}

fn settled(server: &Server) -> [u64; 2] {
    ["gaoler_spans_exported_total", "gaoler_spans_dropped_total"].map(|name| figure(server, name))
}

/// Waits for as many spans.
fn spans(collector: &Collector, count: usize) -> Vec<Span> {
    until("spans", || Some(collector.spans()).filter(|spans| spans.len() >= count))
}

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let mut all = spans.iter().filter(|span| span.name == name);
    let found = all.next().unwrap_or_else(|| panic!("no {name} in {spans:#?}"));
    assert!(all.next().is_none(), "{name} comes twice");
    found
}

fn asked(server: &Server, headers: &[(&str, &str)]) -> Response {
    let (name, value) = bearer("a");
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    let all: Vec<_> = [(name, value)].into_iter().chain(headers).collect();
    server.client().request("POST", "/v1/messages", &all, ask("hello").to_string().as_bytes())
}

/// A server whose exporter shows the collector a key. Its file is read at the start, and need not stay.
fn with_key(collector: &Collector) -> Server {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), format!("x-collector-key: {KEY}\n")).expect("written");
    Server::start(options(&collector.url).with("GAOLER_TELEMETRY__OTLP_HEADERS", file.path().display()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn t200_each_step_of_a_run_is_a_span_and_no_span_has_a_tenants_words() {
    let collector = Collector::new();
    let server = with_key(&collector);
    assert!(server.says("a", PROMPT).contains("my-very-own-words"));
    let spans = spans(&collector, NAMES.len());
    assert_eq!(spans.iter().map(|span| span.name.as_str()).collect::<BTreeSet<_>>(), BTreeSet::from(NAMES));
    let [request, queue, launch, cli, upstream, teardown] = NAMES.map(|name| named(&spans, name));

    // One tree.
    assert!(spans.iter().all(|span| span.trace_id == request.trace_id && span.trace_id.len() == 16));
    assert!(request.parent_span_id.is_empty());
    for step in [queue, launch, cli, teardown] {
        assert_eq!(step.parent_span_id, request.span_id, "{}", step.name);
    }
    assert_eq!(upstream.parent_span_id, cli.span_id);
    let ids: BTreeSet<_> = spans.iter().map(|span| &span.span_id).collect();
    assert_eq!(ids.len(), NAMES.len());
    let kinds = [request, upstream, cli].map(|span| span.kind);
    assert_eq!(kinds, [SpanKind::Server, SpanKind::Client, SpanKind::Internal].map(i32::from));

    // In order.
    let order = [
        request.start_time_unix_nano,
        queue.start_time_unix_nano,
        queue.end_time_unix_nano,
        launch.start_time_unix_nano,
        launch.end_time_unix_nano,
        cli.start_time_unix_nano,
        cli.events[0].time_unix_nano,
        cli.end_time_unix_nano,
        teardown.start_time_unix_nano,
        teardown.end_time_unix_nano,
        request.end_time_unix_nano,
    ];
    assert!(order.is_sorted(), "{order:?}");
    assert_eq!(cli.events[0].name, "first_output");
    assert!(upstream.start_time_unix_nano >= launch.end_time_unix_nano);
    assert_eq!(upstream.end_time_unix_nano, cli.end_time_unix_nano);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_nanos();
    let age = now - u128::from(request.start_time_unix_nano);
    assert!(age < Duration::from_secs(600).as_nanos(), "{age}");

    // What they say.
    let of = |span: &Span, name: &str| attribute(&span.attributes, name);
    let said = |span: &Span, name: &str| of(span, name).unwrap_or_else(|| panic!("no {name}: {span:#?}"));
    assert_eq!(said(request, "http.request.method"), "POST");
    assert_eq!(said(request, "http.route"), "/v1/messages");
    assert_eq!(said(request, "http.response.status_code"), "200");
    assert_eq!(of(request, "error.type"), None);
    assert_eq!(said(upstream, "gaoler.upstream.requests"), "1");
    assert!(said(upstream, "gen_ai.usage.output_tokens").parse::<u64>().expect("a number") > 0);
    assert!(said(launch, "gaoler.launch_us").parse::<u64>().expect("a number") > 0);
    assert_eq!(said(cli, "gaoler.stop_reason"), "end_turn");
    for span in &spans {
        assert_eq!(said(span, "gaoler.level"), "balanced");
        assert_eq!(said(span, "gaoler.tier"), environment().tier);
        assert_eq!(said(span, "gen_ai.request.model"), "sonnet");
        assert_eq!(said(span, "gaoler.run"), said(request, "gaoler.run"));
        assert_eq!(said(span, "gaoler.tenant"), said(request, "gaoler.tenant"));
    }
    let taken = collector.taken();
    let resource = taken[0].request.resource_spans[0].resource.as_ref().expect("a resource");
    assert_eq!(attribute(&resource.attributes, "service.name").as_deref(), Some("gaoler"));
    assert!(taken[0].head.starts_with("post /v1/traces http/1.1\r\n"), "{}", taken[0].head);
    assert!(taken[0].head.contains(&format!("x-collector-key: {KEY}\r\n")), "{}", taken[0].head);

    // What they never say.
    let secrets = [&token("a"), "my-very-own-words", "[embedded]", KEY, "/workspace", "sk-ant"];
    for taken in &taken {
        let body = String::from_utf8_lossy(&taken.body);
        for secret in secrets {
            assert!(!body.contains(secret), "{secret} in {body}");
        }
    }
    let log = server.log();
    assert!(!log.contains(KEY) && !log.contains("my-very-own-words"), "{log}");
    let run = log.lines().find(|line| line.contains("\"event\":\"run\"")).expect("the run's line");
    assert!(run.contains(&format!("\"trace\":\"{}\"", hex(&request.trace_id))), "{run}");
    until("its counts", || (settled(&server) == [NAMES.len() as u64, 0]).then_some(()));
}

#[test]
fn t201_a_valid_parent_is_followed_and_an_invalid_one_is_a_new_trace_and_no_error() {
    let collector = Collector::new();
    let server = Server::start(options(&collector.url).with("GAOLER_TELEMETRY__SAMPLE_RATIO", "0"));
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let unsampled = format!("00-{trace}-b7ad6b7169203331-00");
    let sampled = format!("00-{trace}-b7ad6b7169203332-01");
    // None of these is sent: two begin here, where none is wanted, and one was not wanted by whoever began it.
    for headers in [&[][..], &[("traceparent", "00-nonsense-01")], &[("traceparent", &unsampled)]] {
        assert_eq!(asked(&server, headers).status, 200, "{headers:?}");
    }
    let state = ("tracestate", "vendor=value,other=1");
    assert_eq!(asked(&server, &[("traceparent", &sampled), state]).status, 200);
    let found = spans(&collector, NAMES.len());
    assert_eq!(found.len(), NAMES.len(), "{found:#?}");
    let request = named(&found, NAMES[0]);
    assert_eq!(hex(&request.parent_span_id), "b7ad6b7169203332");
    assert!(found.iter().all(|span| hex(&span.trace_id) == trace && span.trace_state == state.1));
    // In the log are all of them.
    let log = server.log();
    let traces: Vec<&str> =
        log.lines().filter_map(|line| line.split("\"trace\":\"").nth(1)?.get(..32)).collect();
    assert_eq!(traces.len(), 4, "{log}");
    assert_eq!(traces.iter().filter(|id| **id == trace).count(), 2);
}

#[test]
fn t202_a_collector_that_is_slow_or_asks_for_time_holds_nobody_up_and_has_each_span_once() {
    let collector = Collector::new();
    collector.answers([
        Answer::Status(503, "1"),
        Answer::Status(429, ""),
        Answer::After(Duration::from_secs(8)),
    ]);
    let server = Server::start(options(&collector.url));
    for _ in 0..3 {
        assert_eq!(asked(&server, &[]).status, 200);
    }
    // What asked for time has not been taken yet.
    assert!(collector.spans().is_empty());
    let all = spans(&collector, 3 * NAMES.len());
    let ids: BTreeSet<_> = all.iter().map(|span| span.span_id.clone()).collect();
    assert_eq!((ids.len(), all.len()), (3 * NAMES.len(), 3 * NAMES.len()));
    until("its counts", || (settled(&server) == [3 * NAMES.len() as u64, 0]).then_some(()));
    let tries: Vec<u16> = collector.taken().iter().map(|taken| taken.status).collect();
    assert_eq!(tries[..3], [503, 429, 200]);
}

#[test]
fn t203_a_collector_that_is_not_there_costs_spans_and_no_run() {
    // A port that nobody listens at any more.
    let address = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let mut server = Server::start(options(&format!("http://{address}")));
    let begun = Instant::now();
    assert_eq!(server.says("a", "hello"), "[embedded] hello");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    until("the count of what was given up", || (settled(&server) == [0, NAMES.len() as u64]).then_some(()));
    assert!(server.log().contains("export_failed"), "{}", server.log());
    assert!(server.stop().success());
}

#[test]
fn t204_a_killed_exporter_is_started_again_and_what_it_had_is_counted() {
    let collector = Collector::new();
    let mut server = Server::start(options(&collector.url));
    assert_eq!(server.says("a", "hello"), "[embedded] hello");
    let first = until("an exporter", || exporter(&server)).pid;
    kill(Pid::from_raw(first), Signal::SIGKILL).expect("killed");
    assert_eq!(server.says("a", "hello"), "[embedded] hello", "while there is none");
    let second = until("another exporter", || exporter(&server).filter(|it| it.pid != first));
    assert_ne!(second.pid, first);
    assert_eq!(server.says("a", "hello"), "[embedded] hello");
    let sum = 3 * NAMES.len() as u64;
    until("a count of each", || (settled(&server).iter().sum::<u64>() == sum).then_some(()));
    let [exported, _] = settled(&server);
    assert!(exported >= 2 * NAMES.len() as u64, "what came while there was none waits: {exported}");
    assert_eq!(collector.spans().len() as u64, exported);
    assert!(server.stop().success());
}

#[test]
fn t205_the_exporter_has_its_own_uid_no_file_and_no_right() {
    let collector = Collector::new();
    let server = with_key(&collector);
    server.says("a", "hello");
    spans(&collector, 1);
    let exporter = exporter(&server).expect("an exporter");
    let proc = format!("/proc/{}", exporter.pid);
    let status = std::fs::read_to_string(format!("{proc}/status")).expect("a status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        line.unwrap_or_else(|| panic!("{name}: {status}")).trim().to_owned()
    };
    let wanted = ["1", "2", "0000000000000000", "0000000000000000", "1"];
    let found = ["NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "Threads"].map(field);
    assert_eq!(found, wanted);
    if environment().root_user {
        assert!(server.options.uids.is_exporter(exporter.uid), "{}", exporter.uid);
    }
    let descriptors = std::fs::read_dir(format!("{proc}/fd")).expect("descriptors").flatten();
    let open: Vec<String> = descriptors
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .map(|path| path.display().to_string())
        .collect();
    let known = |path: &String| {
        ["socket:", "anon_inode:", "pipe:"].iter().any(|start| path.starts_with(start))
            || path == "/dev/null"
            || path.ends_with("/stderr")
    };
    assert!(open.iter().all(known), "{open:?}");
    // The key of the collector is in no place that others can read, and with no other process.
    for process in processes(server.pid(), server.options.uids) {
        for file in ["cmdline", "environ"] {
            let text = std::fs::read(format!("/proc/{}/{file}", process.pid)).unwrap_or_default();
            assert!(!String::from_utf8_lossy(&text).contains(KEY), "{process:?} {file}");
        }
    }
}

#[test]
fn t206_without_a_collector_there_is_no_exporter_and_no_trace() {
    let server = Server::start(Options::default().with("GAOLER_SERVER__METRICS", "true"));
    assert_eq!(asked(&server, &[("traceparent", "00-nonsense")]).status, 200);
    assert!(exporter(&server).is_none());
    assert!(!server.log().contains("\"trace\""), "{}", server.log());
    assert_eq!(settled(&server), [0, 0]);
}

#[test]
fn t207_a_collector_under_tls_is_believed_by_the_operators_authority_alone() {
    let (own, other) = (Authority::new(), Authority::new());
    let ca = own.file();
    let trusting = |collector: &Collector| {
        let options = options(&collector.url).with("GAOLER_TELEMETRY__OTLP_CA", ca.path().display());
        Server::start(options)
    };
    // By the operator's authority, and under the name that it vouches for.
    let collector = Collector::secure("localhost", &own);
    let server = trusting(&collector);
    assert_eq!(server.says("a", "hello"), "[embedded] hello");
    spans(&collector, NAMES.len());
    until("its counts", || (settled(&server) == [NAMES.len() as u64, 0]).then_some(()));
    drop(server);
    // By another authority, by the own one for another name, and where the built-in roots are to be believed.
    let mut elsewhere = Collector::secure("other", &own);
    elsewhere.url = elsewhere.url.replace("other", "127.0.0.1");
    let strangers = [
        (Collector::secure("localhost", &other), true),
        (elsewhere, true),
        (Collector::secure("localhost", &own), false),
    ];
    let servers = strangers.map(|(collector, trusts)| {
        let server = if trusts { trusting(&collector) } else { Server::start(options(&collector.url)) };
        let begun = Instant::now();
        assert_eq!(server.says("a", PROMPT), format!("[embedded] {PROMPT}"));
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        (collector, server)
    });
    for (collector, mut server) in servers {
        until("the count of what was given up", || {
            (settled(&server) == [0, NAMES.len() as u64]).then_some(())
        });
        assert!(collector.connections() > 1, "it was tried, and again");
        assert!(collector.taken().is_empty());
        let log = server.log();
        let said = log.lines().find(|line| line.contains("export_failed")).expect("a line of it");
        assert!(said.contains("invalid peer certificate"), "{said}");
        assert!(server.stop().success());
    }
}

#[test]
fn t208_a_collector_by_name_is_looked_up_with_the_hosts_servers_and_no_other_name_is() {
    let names = Names::new("127.0.0.81");
    let authority = Authority::new();
    let collector = Collector::secure("collector.example", &authority);
    let (ca, resolv_conf) = (authority.file(), names.resolv_conf());
    let mut options = options(&collector.url).with("GAOLER_TELEMETRY__OTLP_CA", ca.path().display());
    // A host with another resolv.conf; everything else of it is this one.
    let there = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
    let file = resolv_conf.path().display().to_string();
    options.under = ["unshare", "--mount", "sh", "-c", there, &file].map(ToOwned::to_owned).to_vec();
    let server = Server::start(options);
    assert_eq!(server.says("a", "hello"), "[embedded] hello");
    spans(&collector, NAMES.len());
    until("its counts", || (settled(&server) == [NAMES.len() as u64, 0]).then_some(()));
    assert!(
        collector.taken()[0].head.contains("\r\nhost: collector.example:"),
        "{}",
        collector.taken()[0].head
    );
    let asked = names.asked();
    assert!(!asked.is_empty() && asked.iter().all(|name| name == "collector.example."), "{asked:?}");
    // What comes later asks nobody.
    assert_eq!(server.says("a", "hello"), "[embedded] hello");
    spans(&collector, 2 * NAMES.len());
    assert_eq!(names.asked(), asked);
    drop(server);
    // `localhost` is this machine, whoever answers for names.
    let collector = Collector::named("localhost");
    let server = Server::start(self::options(&collector.url));
    assert_eq!(server.says("a", "hello"), "[embedded] hello");
    spans(&collector, NAMES.len());
    assert_eq!(names.asked(), asked);
}

#[test]
fn t209_a_run_that_its_clients_tools_continue_is_a_trace_for_each_request_and_they_are_linked() {
    let collector = Collector::new();
    let server = Server::start(options(&collector.url));
    let tools = json!([{
        "name": "get_weather", "description": "The weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }]);
    let asks = |body: &Value, headers: &[(&'static str, String)]| {
        let all = [&[bearer("a")], headers].concat();
        let response = server.client().request("POST", "/v1/messages", &all, body.to_string().as_bytes());
        assert_eq!(response.status, 200, "{response:?}");
        response
    };
    let mut body = ask("CALLS: mcp__client__get_weather {\"city\": \"Oslo\"}");
    body["tools"] = tools;
    let first = asks(&body, &[]);
    let message = first.json();
    assert_eq!(message["stop_reason"], "tool_use", "{message}");
    let call =
        message["content"].as_array().expect("content").iter().find(|block| block["type"] == "tool_use");
    let result =
        json!({"type": "tool_result", "tool_use_id": call.expect("a call")["id"], "content": "snow in Oslo"});
    let messages = body["messages"].as_array_mut().expect("messages");
    messages.push(json!({"role": "assistant", "content": message["content"]}));
    messages.push(json!({"role": "user", "content": [result]}));
    // The second request is of another trace of the client's.
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("00-{trace}-b7ad6b7169203332-01");
    let second = asks(&body, &[("traceparent", parent)]);
    assert_eq!(second.json()["stop_reason"], "end_turn");
    assert!(second.text().contains("snow in Oslo"), "{second:?}");

    let all = spans(&collector, 8);
    let (later, earlier): (Vec<Span>, Vec<Span>) =
        all.into_iter().partition(|span| hex(&span.trace_id) == trace);
    let names = |spans: &[Span]| spans.iter().map(|span| span.name.clone()).collect::<BTreeSet<_>>();
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    // What launched the run is in the first one's trace, what ended it in the last one's.
    assert_eq!((earlier.len(), names(&earlier)), (4, set(&[NAMES[0], "queue", "launch", "cli"])));
    assert_eq!((later.len(), names(&later)), (4, set(&[NAMES[0], "cli", "upstream", "teardown"])));
    let (asked, went_on) = (named(&earlier, NAMES[0]), named(&later, NAMES[0]));
    assert!(earlier.iter().all(|span| span.trace_id == asked.trace_id));
    assert_eq!(hex(&went_on.parent_span_id), "b7ad6b7169203332");
    // The one leads to the other.
    let links: Vec<_> = went_on.links.iter().map(|link| (&link.trace_id, &link.span_id)).collect();
    assert_eq!(links, [(&asked.trace_id, &asked.span_id)]);
    let others = earlier.iter().chain(&later).filter(|span| span.span_id != went_on.span_id);
    assert!(others.into_iter().all(|span| span.links.is_empty()));
    // No span begins before the one that it is a part of.
    for (spans, request) in [(&earlier, asked), (&later, went_on)] {
        for span in spans.iter().filter(|span| span.span_id != request.span_id) {
            let parent =
                spans.iter().find(|parent| parent.span_id == span.parent_span_id).expect("its parent");
            assert!(parent.start_time_unix_nano <= span.start_time_unix_nano, "{span:#?}");
        }
    }
    // One run, by the name that it has everywhere, and what each client was told.
    let said = |span: &Span, name: &str| attribute(&span.attributes, name);
    let run = first.header("x-gaoler-run").map(ToOwned::to_owned);
    let continued_as = second.header("x-gaoler-run").map(ToOwned::to_owned);
    assert!(run.is_some() && continued_as.is_some() && run != continued_as, "{run:?} {continued_as:?}");
    for span in earlier.iter().chain(&later) {
        assert_eq!(said(span, "gaoler.run"), run, "{span:#?}");
        assert_eq!(said(span, "gaoler.tier").as_deref(), Some(environment().tier));
    }
    assert!(earlier.iter().all(|span| said(span, "gaoler.continued_as").is_none()));
    assert!(later.iter().all(|span| said(span, "gaoler.continued_as") == continued_as));
    // Egress tells of the whole run, once.
    assert_eq!(said(named(&later, "upstream"), "gaoler.upstream.requests").as_deref(), Some("2"));
    let log = server.log();
    let line = log.lines().find(|line| line.contains("\"event\":\"run\"")).expect("the run's line");
    assert!(line.contains(&format!("\"trace\":\"{trace}\"")), "{line}");
}
