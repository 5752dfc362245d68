//! MCP servers over HTTP: real ones from npm inside the cage, and a remote one that only egress can open.
//! Needs root, the CLI and node. It must never reach a network but loopback.

mod support;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
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
    for url in [
        "http://169.254.169.254/latest",
        "http://127.0.0.1:1/",
        "http://mcp.example.com/",
        "https://localhost/",
        "https://mcp.example.com:8443/",
        "https://0x7f.1/",
    ] {
        check(named(url), none(), 400, "invalid_request", "mcp_servers.s.url");
    }
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
    assert!(of_run().any(|line| line.contains("\"event\":\"vouched\"")), "{log}");
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
