//! Reloads, as whoever edits a file and sends a signal sees them. Needs root and the CLI.
//! It must never take a log line for what it says: each setting that is said to be taken is tried.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::{Options, Response, Server, ask, bearer, environment, until};

/// A configuration file, which changes.
struct Config(PathBuf);

impl Config {
    fn new(folder: &Path, text: &str) -> Config {
        let config = Config(folder.join("gaoler.toml"));
        config.is(text);
        config
    }

    fn is(&self, text: &str) {
        fs::write(&self.0, text).expect("written");
    }

    fn options(&self) -> Options {
        Options { config: Some(self.0.clone()), ..Options::default() }
    }
}

/// The lines of the log that say how reloads ended.
fn ended(server: &Server) -> Vec<Value> {
    let log = server.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| ["reloaded", "reload_failed"].iter().any(|event| line["event"] == *event)).collect()
}

/// Sends the signal, and waits for the one line that says how it ended.
fn reload(server: &Server) -> Value {
    let before = ended(server).len();
    server.signal(Signal::SIGHUP);
    until("the reload's line", || ended(server).get(before).cloned())
}

fn models(server: &Server) -> Vec<String> {
    let page = server.client().request("GET", "/v1/models", &[bearer("a")], b"");
    assert_eq!(page.status, 200, "{page:?}");
    let page = page.json();
    let ids = page["data"].as_array().expect("a list").iter();
    ids.map(|model| model["id"].as_str().expect("an id").to_owned()).filter(|id| id.contains('-')).collect()
}

fn asks(server: &Server, tenant: &str, text: &str) -> Response {
    server.client().messages(tenant, &ask(text))
}

#[test]
fn t270_a_signal_takes_what_it_may_and_names_what_waits_for_a_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config::new(folder.path(), "models.list = [{ id = 'claude-one' }]\nruns.max = 8\n");
    let server = Server::start(config.options());
    server.says("a", "hello");
    let baseline = server.baseline();
    assert_eq!(models(&server), ["claude-one"]);
    thread::scope(|scope| {
        // A run that began before, and has an order to wait for.
        let goes_on = environment().commands.then(|| {
            let running = scope.spawn(|| {
                asks(
                    &server,
                    "a",
                    "RUN: echo it-is > here; until test -e go; do sleep 0.1; done; echo it-went-on",
                )
            });
            until("a run that waits", || server.looks("a", "here").contains("it-is").then_some(()));
            running
        });
        config.is("models.list = [{ id = 'claude-two' }]\nruns = { max = 1, tenant_max = 3 }\nrates.tenant_per_minute = 2\n");
        assert_eq!(models(&server), ["claude-one"], "nobody has asked for a reload");
        let line = reload(&server);
        assert_eq!(line["event"], "reloaded", "{line}");
        assert_eq!(line["taken"], json!(["runs.tenant_max", "rates.tenant_per_minute", "models.list"]));
        assert_eq!(line["restart_needed_for"], json!(["runs.max"]));
        assert_eq!(models(&server), ["claude-two"]);
        // With one run at a time neither of these could begin.
        let answers: Vec<Response> = (0..3).map(|_| asks(&server, "b", "hello")).collect();
        let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        assert_eq!(statuses, [200, 200, 429], "{answers:?}");
        assert_eq!(answers[2].json()["error"]["details"]["error_code"], "rate_limited");
        // What is the same is no change, and a rate goes on as it was counted.
        let line = reload(&server);
        assert_eq!((&line["taken"], &line["restart_needed_for"]), (&json!([]), &json!(["runs.max"])));
        assert_eq!(asks(&server, "b", "hello").status, 429);
        if let Some(running) = goes_on {
            assert!(!running.is_finished(), "a reload ended a run");
            server.writes("a", "go", "on");
            let answer = running.join().expect("an answer");
            assert!(answer.status == 200 && answer.text().contains("it-went-on"), "{answer:?}");
        }
    });
    // Nothing of a reload is left: no process, no descriptor.
    if environment().full_proc {
        server.settles_to(&baseline);
    }
}

#[test]
fn t271_settings_that_cannot_be_honoured_change_nothing_and_say_where() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = "models.list = [{ id = 'claude-one' }]\n";
    let config = Config::new(folder.path(), good);
    let server = Server::start(config.options());
    let place = config.0.display().to_string();
    let catalog =
        "mcp.catalog = [{ name = 'a', url = 'https://a.example/mcp', token_file = '/no/such/token' }]";
    let unknown = "models.list = [{ id = 'claude-two' }]\nrates.tenant_per_hour = 1";
    for (text, why) in [
        ("models.list = [", format!("{place}: not TOML")),
        (unknown, format!("{place}: unknown key `rates.tenant_per_hour`")),
        ("runs.max = 'many'", format!("{place}: runs.max: must be an integer")),
        ("rates.tenant_per_minute = 2000000", format!("{place}: rates.tenant_per_minute")),
        (catalog, "mcp.catalog: entry 0: token_file /no/such/token: No such file".to_owned()),
        ("server.tls_key = '/no/such/key'", format!("{place}: server.tls_key: TLS needs")),
    ] {
        config.is(text);
        let line = reload(&server);
        assert_eq!(line["event"], "reload_failed", "{text}: {line}");
        assert!(line["error"].as_str().expect("a reason").starts_with(&why), "{text}: {line}");
        assert_eq!(models(&server), ["claude-one"], "{text}");
    }
    fs::remove_file(&config.0).expect("removed");
    // What never ends is ended: nobody writes to this one.
    nix::unistd::mkfifo(&config.0, nix::sys::stat::Mode::S_IRUSR).expect("a fifo");
    let line = reload(&server);
    assert!(line["error"].as_str().is_some_and(|why| why.contains("in time")), "{line}");
    fs::remove_file(&config.0).expect("removed");
    assert_eq!(reload(&server)["event"], "reload_failed");
    // It serves on, and a file that is right is taken.
    assert!(server.says("a", "hello").contains("hello"));
    config.is("models.list = [{ id = 'claude-three' }]\n");
    assert_eq!(reload(&server)["event"], "reloaded");
    assert_eq!(models(&server), ["claude-three"]);
}

#[test]
fn t272_of_many_signals_the_last_one_counts_and_none_disturbs_a_client() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config::new(folder.path(), "models.list = [{ id = 'claude-0' }]\n");
    let mut server = Server::start(Options { config: Some(config.0.clone()), ..Options::with_double() });
    let baseline = server.baseline();
    // A file is replaced whole: one that is read half way would be a reload that failed.
    let replaced = |text: String| {
        let draft = folder.path().join("draft");
        fs::write(&draft, text).expect("written");
        fs::rename(&draft, &config.0).expect("replaced");
    };
    for round in 1..=50 {
        replaced(format!("models.list = [{{ id = 'claude-{round}' }}]\n"));
        server.signal(Signal::SIGHUP);
        if round % 10 == 0 {
            assert!(server.says("a", &format!("hello {round}")).contains(&round.to_string()));
        }
    }
    until("the last one", || (models(&server) == ["claude-50"]).then_some(()));
    assert!(ended(&server).iter().all(|line| line["event"] == "reloaded"), "{:?}", ended(&server));
    if environment().full_proc {
        server.settles_to(&baseline);
    }
    // What is kept for reloads is gaoler's own settings: the rest of its environment may hold anything.
    let folder = format!("/proc/{}/fd", server.pid());
    let kept = fs::read_dir(folder).expect("descriptors").flatten().find(|fd| {
        fs::read_link(fd.path()).is_ok_and(|place| place.display().to_string().contains("memfd:origin"))
    });
    let kept = fs::read_to_string(kept.expect("how it was called").path()).expect("text");
    assert!(kept.contains("GAOLER_UIDS__RUN") && !kept.contains("\"PATH\""), "{kept}");
    // In a drain there is nobody left to reload for.
    server.signal(Signal::SIGHUP);
    assert_eq!(server.stop().code(), Some(0));
}
