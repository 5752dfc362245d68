//! MCP servers over HTTP: real ones from npm inside the cage, and a remote one that only egress can open.
//! Needs root, the CLI and node. It must never reach a network but loopback.

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::{Options, Response, Server, ask, bearer, tree};

/// What opens the remote server of these tests.
const SECRET: &str = "eyJhbGciOiJub25lIn0.of-a-test-0123456789";

/// The servers from npm, as `make test` names them.
fn packages() -> PathBuf {
    let path = std::env::var_os("GAOLER_TEST_MCP");
    let path = path.expect("GAOLER_TEST_MCP must name the folder of scripts/fetch-mcp (make test sets it)");
    std::fs::canonicalize(tree().join(path)).expect("the folder is there").join("node_modules")
}

/// The main file of one of them.
fn package(name: &str) -> String {
    packages().join("@modelcontextprotocol").join(name).join("dist/index.js").display().to_string()
}

/// A folder with a level whose cages see the servers, as an operator would show them.
struct Shown {
    folder: tempfile::TempDir,
}

impl Shown {
    fn new() -> Shown {
        let folder = tempfile::tempdir().expect("a folder");
        let level = format!(
            "extends = 'balanced'\n[[visible]]\npath = '{}'\naccess = 'read'\nwhy = 'MCP servers'\n",
            packages().display()
        );
        std::fs::write(folder.path().join("level.toml"), level).expect("written");
        Shown { folder }
    }

    fn options(&self) -> Options {
        Options::default().with("GAOLER_LEVEL__FILE", self.folder.path().join("level.toml").display())
    }
}

/// The remote server, until it is dropped.
struct Remote {
    child: Child,
    address: String,
    _folder: tempfile::TempDir,
}

impl Remote {
    fn start() -> Remote {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::copy(tree().join("tests/mcp/remote.mjs"), folder.path().join("remote.mjs")).expect("copied");
        std::os::unix::fs::symlink(packages(), folder.path().join("node_modules")).expect("linked");
        let mut child = Command::new("node")
            .arg(folder.path().join("remote.mjs"))
            .arg(SECRET)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("node");
        let mut port = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut port).expect("a line");
        Remote { child, address: format!("127.0.0.1:{}", port.trim()), _folder: folder }
    }

    /// A server whose operator has named it.
    fn server(&self) -> Server {
        Server::start(Options::default().with("GAOLER_MCP__INTERNAL", json!([self.address])))
    }

    /// It in the predecessor's form.
    fn named(&self, path: &str, transport: &str, token: &str) -> Value {
        let url = format!("http://{}{path}", self.address);
        json!({"url": url, "transport": transport, "auth_type": "jwt", "auth_token": token})
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn with(text: &str, servers: Value) -> Value {
    let mut body = ask(text);
    body["mcp_servers"] = servers;
    body
}

fn says(server: &Server, body: &Value) -> (String, Value) {
    let response = server.client().messages("a", body);
    assert_eq!(response.status, 200, "{response:?}");
    (response.text(), response.json()["mcp_servers"].clone())
}

fn probe(server: &Server, body: &Value) -> Response {
    server.client().request("POST", "/v1/mcp/probe", &[bearer("a")], body.to_string().as_bytes())
}

#[test]
fn t180_a_local_server_runs_in_the_cage_and_sees_no_more_than_its_command_would() {
    let shown = Shown::new();
    let server = Server::start(shown.options());
    let servers = json!({
        "memory": {"command": "node", "args": [package("server-memory")], "env": {"MEMORY_FILE_PATH": "/workspace/memory.jsonl"}},
        "fs": {"type": "stdio", "command": "node", "args": [package("server-filesystem"), "/"], "env": {"DEBUG": "true"}},
    });
    let entity = json!({"entities": [{"name": "bittern", "entityType": "bird", "observations": ["booms"]}]});
    let (text, stood) = says(
        &server,
        &with(
            &format!("CALLS: mcp__memory__create_entities {entity} ;; mcp__memory__read_graph {{}}"),
            servers.clone(),
        ),
    );
    assert!(text.contains("CALLS 1 ok") && text.contains("CALLS 2 ok") && text.contains("booms"), "{text}");
    assert_eq!(
        stood,
        json!([{"name": "fs", "status": "connected"}, {"name": "memory", "status": "connected"}])
    );
    // What it wrote is the tenant's, and another run's server finds it there.
    let (text, _) = says(&server, &with("CALLS: mcp__memory__read_graph {}", servers.clone()));
    assert!(text.contains("booms"), "{text}");
    assert!(!server.says("b", "RUN: cat memory.jsonl 2>&1; echo it-ran").contains("booms"));
    // Everything that the host has and the cage has not is not there for a server either.
    let state = server.state.display();
    let (text, _) = says(
        &server,
        &with(
            &format!(
                "CALLS: mcp__fs__read_text_file {{\"path\":\"/workspace/memory.jsonl\"}} ;; \
                 mcp__fs__list_directory {{\"path\":\"{state}\"}} ;; mcp__fs__read_text_file {{\"path\":\"/etc/shadow\"}} ;; \
                 mcp__fs__read_text_file {{\"path\":\"/proc/1/environ\"}} ;; \
                 mcp__fs__write_file {{\"path\":\"/usr/share/planted\",\"content\":\"x\"}}"
            ),
            servers,
        ),
    );
    assert!(text.contains("CALLS 1 ok") && text.contains("booms"), "{text}");
    for call in 2..=5 {
        assert!(text.contains(&format!("CALLS {call} error")), "{call}: {text}");
    }
}

#[test]
fn t181_a_remote_server_is_reached_by_egress_and_what_opens_it_is_never_in_the_cage() {
    let remote = Remote::start();
    let server = remote.server();
    let servers = json!({
        "custom": remote.named("/sse", "sse", SECRET),
        "plain": {"type": "http", "url": format!("http://{}/mcp", remote.address), "headers": {"Authorization": format!("Bearer {SECRET}")}},
    });
    let look = format!(
        "RUN: cat /run/gaoler/mcp.json; env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; curl -sS -m 5 --noproxy '*' http://{}/mcp 2>&1; NO_PROXY= no_proxy= curl -sS -m 5 -o /dev/null -w 'proxied %{{http_code}}' http://{}/mcp; echo it-ran",
        remote.address, remote.address
    );
    let (text, stood) =
        says(&server, &with("CALLS: mcp__custom__whoami {} ;; mcp__plain__whoami {}", servers.clone()));
    assert!(text.contains("CALLS 1 ok") && text.contains("CALLS 2 ok"), "{text}");
    assert_eq!(text.matches("authorization").count(), 2, "both were opened: {text}");
    assert!(!text.contains("proxy-authorization"), "{text}");
    assert_eq!(
        stood,
        json!([{"name": "custom", "status": "connected"}, {"name": "plain", "status": "connected"}])
    );
    let (text, _) = says(&server, &with(&look, servers.clone()));
    assert!(text.contains("s0.mcp.invalid/sse") && text.contains("s1.mcp.invalid/mcp"), "{text}");
    assert!(!text.contains(SECRET), "{text}");
    // A tool does not get there by itself, neither past the proxy nor through it.
    assert!(text.contains("onnect") && text.contains("proxied 403") && text.contains("it-ran"), "{text}");
    // Another tenant, who names the place without the token, is not let in by what opened it for the first.
    let mut body = ask("CALLS: mcp__custom__whoami {}");
    body["mcp_servers"] =
        json!({"custom": {"url": format!("http://{}/sse", remote.address), "transport": "sse"}});
    let response = server.client().messages("b", &body);
    assert_eq!(response.status, 200, "{response:?}");
    assert!(response.text().contains("CALLS 1 error"), "{response:?}");
    assert_ne!(response.json()["mcp_servers"][0]["status"], "connected", "{response:?}");
    assert!(!server.log().contains(SECRET), "{}", server.log());
}

#[test]
fn t182_a_place_that_no_operator_named_is_refused_before_anything_starts() {
    let remote = Remote::start();
    let server = remote.server();
    let check = |servers: Value, more: (&str, Value), status: u16, code: &str, part: &str| {
        let mut body = with("hello", servers);
        body[more.0] = more.1;
        let response = server.client().messages("a", &body);
        assert_eq!(response.status, status, "{response:?}");
        assert_eq!(response.json()["error"]["details"]["error_code"], code, "{response:?}");
        assert!(response.complaint().contains(part), "{response:?}");
        assert!(!String::from_utf8_lossy(&response.body).contains(SECRET), "{response:?}");
    };
    let named = |url: &str| json!({"s": {"url": url, "auth_type": "bearer", "auth_token": SECRET}});
    let none = || ("ignored", Value::Null);
    let started = || server.log().matches("\"event\":\"spawned\"").count();
    let before = started();
    for url in [
        "http://169.254.169.254/latest",
        "http://127.0.0.1:1/",
        "http://mcp.example.com/",
        "https://localhost/",
        "https://mcp.example.com:8443/",
        "https://0x7f.1/",
        "https://127.0.0.1/",
        "https://169.254.169.254/",
        "https://10.0.0.1/",
        "https://8.8.8.8/",
        "https://2130706433/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[fd00:ec2::254]/",
        "https://a.localhost/",
        "https://printer.local/",
        "https://metadata.google.internal/",
        "https://s0.mcp.invalid/",
        "https://mcp.example.com./",
        "https://mcp.example.com:0443/",
        "https://mcp.example.com:+443/",
        "https://mcp.example.com:99999/",
        "https://user@mcp.example.com/",
    ] {
        check(named(url), none(), 400, "invalid_request", "mcp_servers.s.url");
        // To be tried, or to be kept for a session, is no other way in.
        let body = json!({"mcp_servers": named(url)}).to_string();
        let session = format!("/v1/sessions/{}/mcp", "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b");
        for (method, path) in [("POST", "/v1/mcp/probe"), ("PUT", session.as_str())] {
            let head = [bearer("a"), ("content-type", "application/json".into())];
            let response = server.client().request(method, path, &head, body.as_bytes());
            assert_eq!(response.status, 400, "{path} {url}: {response:?}");
            assert!(response.complaint().contains("mcp_servers.s.url: must"), "{path} {url}: {response:?}");
        }
    }
    assert_eq!(started(), before, "nothing was started");
    check(
        json!({"s": {"command": "x", "url": "y"}}),
        none(),
        400,
        "invalid_request",
        "mcp_servers.s: must have one",
    );
    check(json!({"s": {"catalog": "none"}}), none(), 400, "invalid_request", "GET /v1/mcp/catalog");
    let own = ("tools", json!([{"name": "mine", "input_schema": {"type": "object"}}]));
    check(json!({"client": {"command": "x"}}), own, 400, "invalid_request", "call the server something else");
    let strict = ("security_level", json!("PARANOID"));
    check(named(&format!("http://{}/mcp", remote.address)), strict, 403, "mcp_remote_refused", "paranoid");
}

#[test]
fn t183_tools_are_used_without_asking_unless_the_request_says_that_nobody_permits_them() {
    let shown = Shown::new();
    let server = Server::start(shown.options());
    let servers = json!({"memory": {"command": "node", "args": [package("server-memory")]}});
    for (skip, ok) in [(Value::Null, true), (json!(true), true), (json!(false), false)] {
        let mut body = with("CALLS: mcp__memory__read_graph {}", servers.clone());
        body["skip_mcp_permissions"] = skip.clone();
        let (text, _) = says(&server, &body);
        assert_eq!(text.contains("CALLS 1 ok"), ok, "{skip}: {text}");
        assert_eq!(text.contains("CALLS 1 error"), !ok, "{skip}: {text}");
    }
}

#[test]
fn t184_the_operators_catalogue_is_named_and_its_servers_are_had_by_name() {
    let shown = Shown::new();
    let catalog = format!(
        "[{{name = 'memory', description = 'A graph of what was said', command = 'node', args = ['{}']}}]",
        package("server-memory")
    );
    let server = Server::start(shown.options().with("GAOLER_MCP__CATALOG", catalog));
    let response = server.client().request("GET", "/v1/mcp/catalog", &[bearer("a")], b"");
    assert_eq!(
        response.json(),
        json!({"servers": [{"name": "memory", "description": "A graph of what was said", "kind": "local"}]})
    );
    assert_eq!(server.client().request("GET", "/v1/mcp/catalog", &[], b"").status, 401);
    let (text, stood) =
        says(&server, &with("CALLS: mcp__mem__read_graph {}", json!({"mem": {"catalog": "memory"}})));
    assert!(text.contains("CALLS 1 ok"), "{text}");
    assert_eq!(stood, json!([{"name": "mem", "status": "connected"}]));
}

#[test]
fn t185_a_probe_says_what_connects_and_which_tools_it_offers_and_asks_no_model() {
    let remote = Remote::start();
    let shown = Shown::new();
    let server = Server::start(shown.options().with("GAOLER_MCP__INTERNAL", json!([remote.address])));
    let servers = json!({
        "memory": {"command": "node", "args": [package("server-memory")]},
        "none": {"command": "/no/such/program"},
        "remote": remote.named("/mcp", "http", SECRET),
        "closed": remote.named("/mcp", "http", "a-wrong-token"),
    });
    let response = probe(&server, &json!({"mcp_servers": servers}));
    assert_eq!(response.status, 200, "{response:?}");
    assert!(response.header("x-gaoler-run").is_some(), "{response:?}");
    let found = response.json();
    let of = |name: &str| {
        let list = found["servers"].as_array().expect("a list");
        list.iter().find(|it| it["name"] == name).unwrap_or_else(|| panic!("{name}: {found}")).clone()
    };
    assert_eq!(of("memory")["status"], "connected");
    assert_eq!(of("memory")["server"]["name"], "memory-server");
    let tools = of("memory")["tools"].as_array().expect("tools").clone();
    assert!(tools.iter().any(|tool| tool["name"] == "create_entities"), "{tools:?}");
    assert_eq!(of("none")["status"], "failed");
    assert_eq!(of("remote")["status"], "connected");
    assert_eq!(of("remote")["tools"][0]["name"], "whoami");
    assert!(["failed", "needs-auth"].contains(&of("closed")["status"].as_str().expect("a word")), "{found}");
    assert!(!String::from_utf8_lossy(&response.body).contains(SECRET));
    // The run has ended, and the upstream was asked for the credential alone.
    support::until("the run's line", || server.log().contains("\"event\":\"probe\"").then_some(()));
    let run = response.header("x-gaoler-run").expect("a run").to_owned();
    let log = server.log();
    let of_run = || log.lines().filter(|line| line.contains(&run));
    assert!(log.contains("\"event\":\"vouched\"") && of_run().count() > 0, "{log}");
    assert!(!of_run().any(|line| line.contains("\"event\":\"answered\"")), "{log}");
    for (body, code) in
        [("{}", "invalid_request"), ("{\"mcp_servers\":{}}", "invalid_request"), ("[", "invalid_request")]
    {
        let response = server.client().request("POST", "/v1/mcp/probe", &[bearer("a")], body.as_bytes());
        assert_eq!(
            (response.status, response.json()["error"]["details"]["error_code"].as_str()),
            (400, Some(code))
        );
    }
}

#[test]
fn t233_the_operators_own_token_opens_a_server_and_nobody_but_egress_has_it() {
    let remote = Remote::start();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("token");
    std::fs::write(&file, format!("{SECRET}\n")).expect("written");
    let catalog = format!(
        "[{{name = 'corp', url = 'http://{}/mcp', token_file = '{}'}}, {{name = 'bare', url = 'http://{}/mcp'}}]",
        remote.address,
        file.display(),
        remote.address
    );
    let options = Options::default()
        .with("GAOLER_MCP__INTERNAL", json!([remote.address]))
        .with("GAOLER_MCP__CATALOG", catalog);
    // What is shown of the settings is where the token is.
    let shown = support::gaoler().args(["config", "show"]).envs(options.settings.iter().cloned()).output();
    let shown = String::from_utf8(shown.expect("gaoler").stdout).expect("UTF-8");
    assert!(shown.contains(&file.display().to_string()), "{shown}");
    let server = Server::start(options);
    std::fs::remove_file(&file).expect("it was read at the start");
    let servers = json!({"corp": {"catalog": "corp"}, "bare": {"catalog": "bare"}});
    let (text, _) =
        says(&server, &with("CALLS: mcp__corp__whoami {} ;; mcp__bare__whoami {}", servers.clone()));
    assert!(text.contains("CALLS 1 ok") && text.contains("CALLS 2 error"), "{text}");
    assert_eq!(text.matches("authorization").count(), 1, "{text}");
    let look = "RUN: cat /run/gaoler/mcp.json; env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; echo it-ran";
    let (looked, _) = says(&server, &with(look, servers.clone()));
    assert!(looked.contains("s0.mcp.invalid") && looked.contains("it-ran"), "{looked}");
    // A request's own token does not take the operator's place.
    let own = json!({"corp": {"catalog": "corp", "auth_token": "of-the-request"}});
    let (text, _) = says(&server, &with("CALLS: mcp__corp__whoami {}", own));
    assert!(text.contains("CALLS 1 ok"), "{text}");
    let probed = probe(&server, &json!({"mcp_servers": servers}));
    assert_eq!(probed.status, 200, "{probed:?}");
    let listed = server.client().request("GET", "/v1/mcp/catalog", &[bearer("a")], b"");
    assert_eq!(listed.json()["servers"][0], json!({"name": "corp", "description": "", "kind": "remote"}));
    for told in [shown, looked, format!("{probed:?}"), format!("{listed:?}"), server.log()] {
        assert!(!told.contains(SECRET), "{told}");
    }
}

#[test]
fn t274_a_reload_takes_the_catalogue_and_reads_its_tokens_again() {
    let remote = Remote::start();
    let folder = tempfile::tempdir().expect("a folder");
    let (file, config) = (folder.path().join("token"), folder.path().join("gaoler.toml"));
    std::fs::write(&file, "another-token").expect("written");
    let catalog = |name: &str| {
        let (address, file) = (&remote.address, file.display());
        let entry = format!("{{ name = '{name}', url = 'http://{address}/mcp', token_file = '{file}' }}");
        format!("[mcp]\ninternal = ['{address}']\ncatalog = [{entry}]\n")
    };
    std::fs::write(&config, catalog("corp")).expect("written");
    let server = Server::start(Options { config: Some(config.clone()), ..Options::default() });
    let asked = |name: &str| {
        let servers = json!({ name: {"catalog": name} });
        server.client().messages("a", &with(&format!("CALLS: mcp__{name}__whoami {{}}"), servers))
    };
    let reloads = |count: usize| {
        server.signal(Signal::SIGHUP);
        let is_there = || (server.log().matches("\"event\":\"reloaded\"").count() == count).then_some(());
        support::until("a reload", is_there);
    };
    assert!(!asked("corp").text().contains("CALLS 1 ok"), "the token is a wrong one");
    std::fs::write(&file, SECRET).expect("written");
    assert!(!asked("corp").text().contains("CALLS 1 ok"), "nobody has asked for a reload");
    reloads(1);
    let answer = asked("corp");
    assert!(answer.text().contains("CALLS 1 ok"), "{answer:?}");
    std::fs::write(&config, catalog("renamed")).expect("written");
    reloads(2);
    assert_eq!(asked("corp").status, 400);
    assert!(asked("renamed").text().contains("CALLS 1 ok"));
    assert!(!server.log().contains(SECRET) && !server.log().contains("another-token"));
}

const SESSION: &str = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";
const SECOND: &str = "7a2d1f1e-9e3c-4d8f-8b62-1d3e4f5a6b7c";

/// Something said in a session.
fn turn(session: &str, text: &str) -> Value {
    let mut body = ask(text);
    body["session_id"] = session.into();
    body
}

fn on(server: &Server, tenant: &str, method: &str, path: &str, body: &Value) -> Response {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    server.client().request(method, &format!("/v1/sessions/{path}"), &[bearer(tenant)], body.as_bytes())
}

/// Sets a session's servers.
fn set(server: &Server, session: &str, servers: Value) -> Response {
    let response = on(server, "a", "PUT", &format!("{session}/mcp"), &json!({"mcp_servers": servers}));
    assert_eq!(response.status, 200, "{response:?}");
    response
}

fn set_now(server: &Server, session: &str) -> Value {
    let response = on(server, "a", "GET", &format!("{session}/mcp"), &Value::Null);
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(response.json()["session_id"], session);
    response.json()["mcp_servers"].clone()
}

#[track_caller]
fn refused(response: &Response, status: u16, code: &str) {
    let found = response.json()["error"]["details"]["error_code"].clone();
    assert_eq!((response.status, found), (status, json!(code)), "{response:?}");
}

/// How many sessions' servers the ledger has, by its own file.
fn kept(server: &Server) -> u64 {
    let count = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); \
                 print(d.execute('SELECT count(*) FROM session_servers').fetchone()[0])";
    let database = server.state.join("ledger/ledger.db");
    let output = Command::new("python3").args(["-c", count]).arg(&database).output().expect("python3");
    String::from_utf8_lossy(&output.stdout).trim().parse().unwrap_or_else(|_| panic!("{output:?}"))
}

/// The files below a folder that hold this text.
fn holding(folder: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let (path, kind) = (entry.path(), entry.file_type().expect("a type"));
        if kind.is_dir() {
            found.extend(holding(&path, text));
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).expect("a file");
            if bytes.windows(text.len()).any(|part| part == text.as_bytes()) {
                found.push(path);
            }
        }
    }
    found
}

fn memory() -> Value {
    json!({"memory": {
        "command": "node", "args": [package("server-memory")], "env": {"MEMORY_FILE_PATH": "/workspace/memory.jsonl"},
    }})
}

#[test]
fn t240_a_sessions_servers_are_had_by_each_turn_until_a_request_names_others_or_they_are_deleted() {
    let shown = Shown::new();
    let server = Server::start(shown.options());
    says(&server, &turn(SESSION, "hello"));
    assert_eq!(set_now(&server, SESSION), json!({}));
    let told = set(&server, SESSION, memory()).json();
    let expected = json!({"memory": {"command": "node", "args": [package("server-memory")], "env": ["MEMORY_FILE_PATH"]}});
    assert_eq!(told, json!({"session_id": SESSION, "mcp_servers": expected}));
    assert_eq!(set_now(&server, SESSION), expected);
    // Two turns that name none, in either dialect.
    let entity = json!({"entities": [{"name": "bittern", "entityType": "bird", "observations": ["booms"]}]});
    let (text, stood) =
        says(&server, &turn(SESSION, &format!("CALLS: mcp__memory__create_entities {entity}")));
    assert!(text.contains("CALLS 1 ok"), "{text}");
    assert_eq!(stood, json!([{"name": "memory", "status": "connected"}]));
    let chat = json!({"model": "sonnet", "messages": [{"role": "user", "content": "CALLS: mcp__memory__read_graph {}"}]});
    let headers = [bearer("a"), ("x-session-id", SESSION.to_owned())];
    let path = "/v1/chat/completions";
    let answer = server.client().request("POST", path, &headers, chat.to_string().as_bytes());
    let said = answer.json()["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned();
    assert!(said.contains("CALLS 1 ok") && said.contains("booms"), "{answer:?}");
    // A request's own replace them for its turn, all of them; an empty list is none.
    let other = json!({"fs": {"command": "node", "args": [package("server-filesystem"), "/workspace"]}});
    let mut body = turn(
        SESSION,
        "CALLS: mcp__fs__list_directory {\"path\":\"/workspace\"} ;; mcp__memory__read_graph {}",
    );
    body["mcp_servers"] = other;
    let (text, stood) = says(&server, &body);
    assert!(text.contains("CALLS 1 ok") && text.contains("CALLS 2 error"), "{text}");
    assert_eq!(stood, json!([{"name": "fs", "status": "connected"}]));
    for none in [json!({}), json!([])] {
        let mut body = turn(SESSION, "CALLS: mcp__memory__read_graph {}");
        body["mcp_servers"] = none;
        let (text, stood) = says(&server, &body);
        assert!(text.contains("CALLS 1 error") && stood.is_null(), "{text} {stood}");
    }
    // Whether anybody permits the tools stays the request's to say.
    let mut body = turn(SESSION, "CALLS: mcp__memory__read_graph {}");
    body["skip_mcp_permissions"] = json!(false);
    assert!(says(&server, &body).0.contains("CALLS 1 error"));
    let (text, _) = says(&server, &turn(SESSION, "CALLS: mcp__memory__read_graph {}"));
    assert!(text.contains("CALLS 1 ok"), "{text}");
    // They are this session's alone.
    let (_, stood) = says(&server, &turn(SECOND, "hello"));
    assert!(stood.is_null() && says(&server, &ask("hello")).1.is_null(), "{stood}");
    let gone = on(&server, "a", "DELETE", &format!("{SESSION}/mcp"), &Value::Null);
    assert_eq!((gone.status, gone.json()), (200, json!({"id": SESSION, "deleted": true})));
    assert_eq!((set_now(&server, SESSION), kept(&server)), (json!({}), 0));
    assert!(says(&server, &turn(SESSION, "hello")).1.is_null());
    assert_eq!(on(&server, "a", "DELETE", &format!("{SESSION}/mcp"), &Value::Null).status, 200, "again");
}

#[test]
fn t241_what_opens_a_sessions_server_lasts_over_a_restart_and_is_in_no_file_log_or_answer() {
    let remote = Remote::start();
    let (header, variable, query) =
        ("canary-of-a-header-01", "canary-of-a-variable-02", "canary-of-a-query-03");
    let shown = Shown::new();
    let mut server = Server::start(shown.options().with("GAOLER_MCP__INTERNAL", json!([remote.address])));
    says(&server, &turn(SESSION, "hello"));
    let mut custom = remote.named(&format!("/mcp?key={query}"), "http", SECRET);
    custom["headers"] = json!({"X-Team": header});
    let local = json!({"command": "node", "args": [package("server-memory")], "env": {"API_KEY": variable}});
    let told = set(&server, SESSION, json!({"custom": custom, "memory": local}));
    let expected = json!({
        "custom": {"url": format!("http://{}/mcp", remote.address), "query": true, "transport": "http",
            "headers": ["x-team", "authorization"]},
        "memory": {"command": "node", "args": [package("server-memory")], "env": ["API_KEY"]},
    });
    assert_eq!(told.json()["mcp_servers"], expected);
    let calls = "CALLS: mcp__custom__whoami {} ;; mcp__memory__read_graph {}";
    let works = |server: &Server| {
        let (text, stood) = says(server, &turn(SESSION, calls));
        assert!(text.contains("CALLS 1 ok") && text.contains("CALLS 2 ok"), "{text}");
        assert!(text.contains("authorization") && text.contains("x-team"), "{text}");
        let connected = |name: &str| json!({"name": name, "status": "connected"});
        assert_eq!(stood, json!([connected("custom"), connected("memory")]));
    };
    works(&server);
    let look = "RUN: cat /run/gaoler/mcp.json; env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; echo it-ran";
    says(&server, &turn(SECOND, "hello"));
    set(&server, SECOND, json!({"custom": custom}));
    let (looked, _) = says(&server, &turn(SECOND, look));
    assert!(looked.contains("s0.mcp.invalid/mcp") && looked.contains("it-ran"), "{looked}");
    assert!(!looked.contains(SECRET) && !looked.contains(header), "{looked}");
    let quiet = |server: &Server| {
        let got = on(server, "a", "GET", &format!("{SESSION}/mcp"), &Value::Null);
        for secret in [SECRET, header, variable, query] {
            assert!(!format!("{told:?} {got:?} {}", server.log()).contains(secret), "{secret}");
        }
        // The tenant's own transcript has what its own command was shown: the query is a part of the address.
        for secret in [SECRET, header, variable] {
            assert_eq!(holding(&server.state, secret), Vec::<PathBuf>::new(), "{secret}");
        }
        assert_eq!(holding(&server.state.join("ledger"), query), Vec::<PathBuf>::new());
        assert_eq!(holding(&server.state.join("ledger"), &remote.address), Vec::<PathBuf>::new());
        assert_eq!(holding(&server.state.join("ledger"), "server-memory"), Vec::<PathBuf>::new());
    };
    quiet(&server);
    assert!(
        !holding(&server.state.join("ledger"), SESSION).is_empty(),
        "this way of looking finds what is there"
    );
    assert!(server.stop().success());
    quiet_files(&server, &[SECRET, header, variable]);
    let again = Server::start(server.options.clone());
    assert_eq!(set_now(&again, SESSION), expected);
    works(&again);
    quiet(&again);
}

fn quiet_files(server: &Server, secrets: &[&str]) {
    for secret in secrets {
        assert_eq!(holding(&server.state, secret), Vec::<PathBuf>::new(), "{secret}");
    }
}

#[test]
fn t242_another_tenants_session_has_no_servers_to_be_seen_set_or_deleted() {
    let shown = Shown::new();
    let server = Server::start(shown.options());
    says(&server, &turn(SESSION, "hello"));
    set(&server, SESSION, memory());
    // Somebody who has sessions too, and somebody who has none.
    assert_eq!(server.client().messages("b", &turn(SECOND, "hello")).status, 200);
    let named = json!({"mcp_servers": {"x": {"command": "x"}}});
    for tenant in ["b", "c"] {
        for (method, body) in [("GET", Value::Null), ("PUT", named.clone()), ("DELETE", Value::Null)] {
            let theirs = on(&server, tenant, method, &format!("{SESSION}/mcp"), &body);
            let none = on(&server, tenant, method, "11111111-1111-4111-8111-111111111111/mcp", &body);
            refused(&theirs, 404, "session_not_found");
            let plain = |response: &Response| (response.status, response.json()["error"].clone());
            assert_eq!(plain(&theirs), plain(&none), "{tenant} {method}");
        }
    }
    for odd in ["default", "..%2f..", "6f1c0f0e8d2b4c7e9a510c2d3e4f5a6b"] {
        refused(&on(&server, "a", "GET", &format!("{odd}/mcp"), &Value::Null), 404, "session_not_found");
    }
    assert_eq!(server.client().request("GET", &format!("/v1/sessions/{SESSION}/mcp"), &[], b"").status, 401);
    // The same id is another session of somebody else's, and begins with nothing.
    let mine = server.client().messages("b", &turn(SESSION, "CALLS: mcp__memory__read_graph {}"));
    assert!(mine.text().contains("CALLS 1 error") && mine.json()["mcp_servers"].is_null(), "{mine:?}");
    let gone = on(&server, "b", "DELETE", &format!("{SESSION}/mcp"), &Value::Null);
    assert_eq!(gone.status, 200, "now there is one: {gone:?}");
    assert_eq!(set_now(&server, SESSION)["memory"]["command"], "node", "and the first one has what it had");
    assert_eq!(kept(&server), 1);
}

#[test]
fn t243_what_the_level_does_not_permit_is_refused_when_it_is_set_and_at_each_turn() {
    let remote = Remote::start();
    let server = remote.server();
    says(&server, &turn(SESSION, "hello"));
    let path = format!("{SESSION}/mcp");
    let named = json!({"mcp_servers": {"custom": remote.named("/mcp", "http", SECRET)}});
    let mut strict = named.clone();
    strict["security_level"] = json!("PARANOID");
    refused(&on(&server, "a", "PUT", &path, &strict), 403, "mcp_remote_refused");
    for (body, code) in [
        (json!({}), "invalid_request"),
        (json!({"mcp_servers": {}}), "invalid_request"),
        (json!({"mcp_servers": {"a": {"url": "http://10.0.0.1/"}}}), "invalid_request"),
        (json!({"mcp_servers": {"a": {"catalog": "none"}}}), "invalid_request"),
        (json!({"mcp_servers": {"a b": {"command": "x"}}}), "invalid_request"),
    ] {
        refused(&on(&server, "a", "PUT", &path, &body), 400, code);
    }
    // 28 KiB are as many as are kept.
    let large =
        json!({"mcp_servers": {"a": {"command": "x", "args": ["v".repeat(15_000), "v".repeat(15_000)]}}});
    refused(&on(&server, "a", "PUT", &path, &large), 413, "request_too_large");
    assert_eq!(kept(&server), 0);
    let response = on(&server, "a", "PUT", &path, &named);
    assert_eq!(response.status, 200, "{response:?}");
    let mut body = turn(SESSION, "CALLS: mcp__custom__whoami {}");
    body["security_level"] = json!("PARANOID");
    let response = server.client().messages("a", &body);
    refused(&response, 403, "mcp_remote_refused");
    assert!(
        response.complaint().contains("mcp_servers.custom")
            && response.complaint().contains("an empty mcp_servers")
    );
    body["mcp_servers"] = json!({});
    assert!(says(&server, &body).0.contains("CALLS 1 error"));
    assert!(says(&server, &turn(SESSION, "CALLS: mcp__custom__whoami {}")).0.contains("CALLS 1 ok"));
    // What the operator has closed since then is closed for sessions too.
    let mut server = server;
    assert!(server.stop().success());
    let again = Server::start(server.options.clone().with("GAOLER_MCP__REMOTE", false));
    refused(&again.client().messages("a", &turn(SESSION, "hello")), 403, "mcp_remote_refused");
    let mut without = turn(SESSION, "hello");
    without["mcp_servers"] = json!([]);
    assert_eq!(says(&again, &without).0, "[embedded] hello");
}

#[test]
fn t244_servers_go_with_their_session_and_a_copy_has_them_too() {
    let shown = Shown::new();
    let mut server = Server::start(shown.options());
    says(&server, &turn(SESSION, "hello"));
    set(&server, SESSION, memory());
    let copy = on(&server, "a", "POST", &format!("{SESSION}/fork"), &json!({}));
    assert_eq!(copy.status, 201, "{copy:?}");
    let copy = copy.json()["id"].as_str().expect("an id").to_owned();
    assert_eq!(set_now(&server, &copy), set_now(&server, SESSION));
    assert_eq!(kept(&server), 2);
    assert_eq!(on(&server, "a", "DELETE", SESSION, &Value::Null).status, 200);
    assert_eq!(kept(&server), 1, "the deleted session's are gone");
    // The same id again is a session that has none.
    let (text, stood) = says(&server, &turn(SESSION, "CALLS: mcp__memory__read_graph {}"));
    assert!(text.contains("CALLS 1 error") && stood.is_null(), "{text}");
    assert_eq!(set_now(&server, SESSION), json!({}));
    let (text, _) = says(&server, &turn(&copy, "CALLS: mcp__memory__read_graph {}"));
    assert!(text.contains("CALLS 1 ok"), "the copy's own: {text}");
    // One that nobody has used for as many days as the operator keeps it.
    let transcripts = |id: &str| {
        let tenant = std::fs::read_dir(server.state.join("tenants")).expect("tenants").flatten().next();
        tenant.expect("one").path().join("sessions").join(id).join(format!("{id}.jsonl"))
    };
    let age = |id: &str| {
        let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3 * 24 * 3600);
        let file = std::fs::File::options().write(true).open(transcripts(id)).expect("a transcript");
        file.set_modified(old).expect("a time");
    };
    for id in [SESSION, &copy] {
        age(id);
        set(&server, id, memory());
    }
    says(&server, &turn(SECOND, "hello"));
    set(&server, SECOND, memory());
    assert_eq!(kept(&server), 3);
    assert!(server.stop().success());
    let again = Server::start(server.options.clone().with("GAOLER_SESSIONS__TTL_DAYS", 2));
    let (text, stood) = says(&again, &turn(SESSION, "CALLS: mcp__memory__read_graph {}"));
    assert!(text.contains("CALLS 1 error") && stood.is_null(), "a new session of an old id: {text}");
    let (text, _) = says(&again, &turn(SECOND, "CALLS: mcp__memory__read_graph {}"));
    assert!(text.contains("CALLS 1 ok"), "{text}");
    assert_eq!(kept(&again), 1, "the copy, which nobody asked for, went with its session too");
}

#[test]
fn t245_what_is_kept_for_one_session_or_tenant_opens_for_no_other_whoever_writes_the_database() {
    let remote = Remote::start();
    let mut server = remote.server();
    for (tenant, session) in [("a", SESSION), ("a", SECOND), ("b", SESSION)] {
        assert_eq!(server.client().messages(tenant, &turn(session, "hello")).status, 200);
        let named = json!({"mcp_servers": {"custom": remote.named("/mcp", "http", SECRET)}});
        assert_eq!(on(&server, tenant, "PUT", &format!("{session}/mcp"), &named).status, 200);
    }
    assert!(says(&server, &turn(SESSION, "CALLS: mcp__custom__whoami {}")).0.contains("CALLS 1 ok"));
    assert!(server.stop().success());
    // All three get what was kept for one of them.
    let swap = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); \
                one = d.execute('SELECT locked FROM session_servers GROUP BY owner HAVING count(*) = 1').fetchone()[0]; \
                n = d.execute('UPDATE session_servers SET locked = ?', (one,)).rowcount; d.commit(); d.close(); sys.exit(n != 3)";
    let database = server.state.join("ledger/ledger.db");
    let swapped = Command::new("python3").args(["-c", swap]).arg(&database).status();
    assert!(swapped.expect("python3").success());
    let again = Server::start(server.options.clone());
    let own = again.client().messages("b", &turn(SESSION, "CALLS: mcp__custom__whoami {}"));
    assert!(own.text().contains("CALLS 1 ok"), "its own opens: {own:?}");
    for session in [SESSION, SECOND] {
        refused(&again.client().messages("a", &turn(session, "hello")), 409, "mcp_unreadable");
        refused(&on(&again, "a", "GET", &format!("{session}/mcp"), &Value::Null), 409, "mcp_unreadable");
        refused(&on(&again, "a", "POST", &format!("{session}/fork"), &json!({})), 409, "mcp_unreadable");
    }
    let list = server_sessions(&again);
    assert_eq!(list, 2, "no copy was left");
    // Its tenant says what it wants, and goes on.
    set(&again, SESSION, json!({"custom": remote.named("/mcp", "http", SECRET)}));
    assert!(says(&again, &turn(SESSION, "CALLS: mcp__custom__whoami {}")).0.contains("CALLS 1 ok"));
    assert_eq!(on(&again, "a", "DELETE", &format!("{SECOND}/mcp"), &Value::Null).status, 200);
    assert_eq!(says(&again, &turn(SECOND, "hello")).0, "[embedded] hello");
}

fn server_sessions(server: &Server) -> usize {
    let list = server.client().request("GET", "/v1/sessions", &[bearer("a")], b"");
    list.json()["data"].as_array().expect("rows").len()
}

#[test]
fn t246_each_kind_of_token_that_the_predecessor_had_is_carried_by_egress() {
    let remote = Remote::start();
    let server = remote.server();
    says(&server, &turn(SESSION, "hello"));
    let kinds = ["jwt", "oauth", "bearer", "JWT"];
    let servers: Value = kinds
        .iter()
        .enumerate()
        .map(|(n, kind)| {
            let (path, transport) = if n % 2 == 0 { ("/sse", "sse") } else { ("/mcp", "http") };
            let mut named = remote.named(path, transport, SECRET);
            named["auth_type"] = json!(kind);
            (format!("s{n}"), named)
        })
        .collect();
    let calls: Vec<String> = (0..kinds.len()).map(|n| format!("mcp__s{n}__whoami {{}}")).collect();
    let calls = format!("CALLS: {}", calls.join(" ;; "));
    let opened = |text: &str| {
        for call in 1..=kinds.len() {
            assert!(text.contains(&format!("CALLS {call} ok")), "{text}");
        }
        assert_eq!(text.matches("authorization").count(), kinds.len(), "{text}");
    };
    opened(&says(&server, &with(&calls, servers.clone())).0);
    set(&server, SESSION, servers.clone());
    opened(&says(&server, &turn(SESSION, &calls)).0);
    let mut wrong = servers;
    wrong["s0"]["auth_type"] = json!("basic");
    let response = server.client().messages("a", &with("hello", wrong));
    refused(&response, 400, "invalid_request");
    assert!(response.complaint().contains("mcp_servers.s0.auth_type"), "{response:?}");
}
