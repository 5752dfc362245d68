//! Who asks: keys of the operator's, credentials of the upstream, what is stored for a tenant, and what it used.
//! Needs root and the CLI. It must never take a server's word for what it can see in its files.

mod support;

use std::io::{BufReader, Read, Write};
use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};
use support::traces::{Process, Role, processes};
use support::{Client, Options, Response, Server, ask, environment, gaoler, token, until};

/// `gaoler WORDS --state STATE --json`, with this server's uids.
fn command(server: &Server, words: &[&str]) -> Output {
    let mut command = gaoler();
    command.args(words).arg("--json").arg("--state").arg(&server.state);
    for (name, value) in &server.options.settings {
        command.env(name, value);
    }
    command.output().expect("gaoler")
}

fn said(server: &Server, words: &[&str]) -> Value {
    let output = command(server, words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A key of this tenant, made by the command line.
fn key(server: &Server, tenant: &str) -> String {
    said(server, &["key", "create", "--tenant", tenant])["key"].as_str().expect("a key").to_owned()
}

fn bearer(key: &str) -> (&'static str, String) {
    ("authorization", format!("Bearer {key}"))
}

fn beside(name: &str) -> (&'static str, String) {
    ("x-claude-credential", token(name))
}

fn runs(client: &Client, headers: &[(&str, String)], text: &str) -> Response {
    client.post(headers, ask(text).to_string().as_bytes())
}

fn says(client: &Client, headers: &[(&str, String)], text: &str) -> String {
    let response = runs(client, headers, text);
    assert_eq!(response.status, 200, "{text}: {response:?}");
    response.text()
}

#[track_caller]
fn refused(response: &Response, status: u16, code: &str) {
    let found = response.json()["error"]["details"]["error_code"].clone();
    assert_eq!((response.status, found), (status, json!(code)), "{response:?}");
}

fn get(client: &Client, path: &str, headers: &[(&str, String)]) -> Response {
    client.request("GET", path, headers, b"")
}

fn ledger(server: &Server) -> Process {
    let all = processes(server.pid(), server.options.uids);
    all.into_iter().find(|process| process.role == Role::Ledger).expect("a ledger")
}

/// Whether any file below a folder holds these bytes.
fn holds(folder: &Path, text: &str) -> bool {
    std::fs::read_dir(folder).expect("a folder").flatten().any(|entry| {
        let path = entry.path();
        match entry.file_type().expect("a type").is_dir() {
            true => holds(&path, text),
            false => {
                let bytes = std::fs::read(&path).unwrap_or_default();
                bytes.windows(text.len()).any(|part| part == text.as_bytes())
            }
        }
    })
}

#[test]
fn t85_a_key_is_its_tenant_on_every_route_and_brings_its_credential() {
    let server = Server::start(Options::default());
    let client = server.client();
    let key = key(&server, "acme");
    assert!(key.starts_with("gaol_t_") && key.len() == 88, "{}", key.len());
    let me = get(&client, "/v1/me", &[bearer(&key)]).json();
    assert_eq!((&me["type"], &me["by"], &me["name"]), (&json!("tenant"), &json!("key"), &json!("acme")));
    assert_eq!(get(&client, "/v1/models", &[bearer(&key)]).status, 200);
    assert_eq!(get(&client, "/v1/models", &[("x-api-key", key.clone())]).status, 200);

    refused(&runs(&client, &[bearer(&key)], "hello"), 401, "credential_missing");
    assert_eq!(says(&client, &[bearer(&key), beside("one")], "hello"), "[embedded] hello");
    let mut body = ask("by the body");
    body["oauth_credentials"] = json!({ "access_token": token("two") });
    let response = client.post(&[("x-api-key", key.clone())], body.to_string().as_bytes());
    assert_eq!((response.status, response.text().as_str()), (200, "[embedded] by the body"), "{response:?}");
    let chat = json!({"model": "sonnet", "messages": [{"role": "user", "content": "chat"}]}).to_string();
    let path = "/v1/chat/completions";
    let response = client.request("POST", path, &[bearer(&key), beside("one")], chat.as_bytes());
    assert_eq!(response.json()["choices"][0]["message"]["content"], "[embedded] chat", "{response:?}");

    // What the upstream refuses is said as that, and not as a fault of the key.
    let bad = ("x-claude-credential", "sk-ant-oat01-refused-00000000".to_owned());
    refused(&runs(&client, &[bearer(&key), bad.clone()], "hello"), 401, "credential_refused");
    let fresh = self::key(&server, "new");
    refused(&runs(&client, &[bearer(&fresh), bad], "hello"), 401, "credential_refused");
    for wrong in ["gaol_t_x", &key[..87], &format!("{}0", &key[..87]), "gaol_x_0", "gaol_"] {
        let response = runs(&client, &[bearer(wrong), beside("one")], "hello");
        assert_eq!(response.status, 401, "{wrong}");
        assert!(
            ["key_unknown", "invalid_token_format"]
                .iter()
                .any(|code| { response.json()["error"]["details"]["error_code"] == *code })
        );
        assert_eq!(get(&client, "/v1/models", &[bearer(wrong)]).status, 401, "{wrong}");
    }
    let log = server.log();
    assert!(!log.contains(&key) && !log.contains(&key[24..]), "a key is in the log");
    assert!(!holds(&server.state.join("ledger"), &key[24..]), "a key's secret is in the ledger");
}

#[test]
fn t234_a_key_without_a_credential_clones_nothing_and_ends_nothing() {
    let server = Server::start(Options::default());
    let client = server.client();
    let key = key(&server, "acme");
    let body = json!({"git": {"url": "https://github.com/x/y", "token": "of-a-git-host"}}).to_string();
    let clone =
        |headers: &[(&str, String)]| client.request("POST", "/v1/workspaces", headers, body.as_bytes());
    // A clone goes out, and what goes out is vouched for: that needs a credential, where other work on files needs none.
    says(&client, &[bearer(&key), beside("one")], "hello");
    refused(&clone(&[bearer(&key)]), 401, "credential_missing");
    assert_eq!(get(&client, "/v1/workspaces", &[bearer(&key)]).status, 200);
    // More servers than egress would read are refused as well, and not handed to whoever must refuse them.
    let headers =
        |n: usize| (0..20).map(|h| (format!("x-{n}-{h}"), json!("v".repeat(1000)))).collect::<Value>();
    let servers =
        (0..15).map(|n| (format!("s{n}"), json!({"url": "https://mcp.example.com/", "headers": headers(n)})));
    let mut many = ask("hello");
    many["mcp_servers"] = servers.collect();
    let response = client.post(&[bearer(&key), beside("one")], many.to_string().as_bytes());
    refused(&response, 413, "request_too_large");
    assert_eq!(says(&client, &[bearer(&key), beside("one")], "still there"), "[embedded] still there");
}

#[test]
fn t86_a_rotated_credential_or_key_keeps_the_workspace_of_its_tenant() {
    let server = Server::start(Options::default());
    let client = server.client();
    let (first, second, other) = (key(&server, "acme"), key(&server, "acme"), key(&server, "other"));
    says(&client, &[bearer(&first), beside("old")], "RUN: echo heron > bird");
    let reads = |headers: &[(&str, String)]| says(&client, headers, "RUN: cat bird 2>&1; true");
    assert!(reads(&[bearer(&first), beside("new")]).contains("heron"));
    assert!(reads(&[bearer(&second), beside("new")]).contains("heron"));
    // The same credential under another tenant's key, or alone, is somebody else.
    assert!(!reads(&[bearer(&other), beside("old")]).contains("heron"));
    assert!(!reads(&[bearer(&token("old"))]).contains("heron"));
}

#[test]
fn t87_a_credential_is_its_own_tenant_until_it_is_linked() {
    let server = Server::start(Options::default());
    let client = server.client();
    let (acme, other) = (key(&server, "acme"), key(&server, "other"));
    says(&client, &[bearer(&acme), beside("mine")], "RUN: echo heron > bird");
    let alone = [bearer(&token("mine"))];
    let reads = || says(&client, &alone, "RUN: cat bird 2>&1; true");
    assert!(!reads().contains("heron"));
    assert!(get(&client, "/v1/me", &alone).json()["id"].as_str().expect("an id").starts_with("raw:"));
    let link = |method: &str, key: &str| {
        client.request(method, "/v1/credential/link", &[bearer(key), beside("mine")], b"")
    };
    refused(&client.request("PUT", "/v1/credential/link", &alone, b"{}"), 403, "key_insufficient");
    assert_eq!(link("PUT", &acme).status, 200);
    assert_eq!(link("PUT", &acme).status, 200, "twice is once");
    refused(&link("PUT", &other), 409, "credential_linked");
    assert!(reads().contains("heron"));
    assert_eq!(get(&client, "/v1/me", &alone).json()["by"], "linked_credential");
    refused(&link("DELETE", &other), 404, "credential_not_linked");
    assert_eq!(link("DELETE", &acme).status, 200);
    assert!(!reads().contains("heron"));
}

#[test]
fn t88_a_stored_credential_serves_its_tenant_and_is_in_no_file() {
    let mut server = Server::start(Options::default());
    let client = server.client();
    let key = key(&server, "acme");
    let kept =
        |method: &str, body: &str| client.request(method, "/v1/credential", &[bearer(&key)], body.as_bytes());
    refused(&kept("GET", ""), 404, "credential_not_stored");
    let body = json!({ "credential": token("kept") }).to_string();
    let stored = kept("PUT", &body);
    assert_eq!((stored.status, &stored.json()["scheme"]), (200, &json!("oauth")), "{stored:?}");
    let shown = kept("GET", "");
    assert_eq!(shown.json()["usable"], true, "{shown:?}");
    for answer in [&stored, &shown] {
        assert!(!String::from_utf8_lossy(&answer.body).contains("sk-ant"), "{answer:?}");
    }
    assert_eq!(says(&client, &[bearer(&key)], "hello"), "[embedded] hello");
    // A credential that comes along wins.
    let bad = ("x-claude-credential", "sk-ant-oat01-refused-00000000".to_owned());
    refused(&runs(&client, &[bearer(&key), bad], "hello"), 401, "credential_refused");
    assert!(!holds(&server.state, "sk-ant-oat01-test-kept"), "the credential is in a file");
    assert!(!server.log().contains("sk-ant-"), "it is in the log");
    // It is there after a new start, too.
    server.stop();
    let server = Server::start(Options { state: Some(server.state.clone()), ..server.options.clone() });
    let client = server.client();
    assert_eq!(says(&client, &[bearer(&key)], "again"), "[embedded] again");
    assert_eq!(client.request("DELETE", "/v1/credential", &[bearer(&key)], b"").status, 200);
    refused(&runs(&client, &[bearer(&key)], "hello"), 401, "credential_missing");
    for wrong in ["{}", "[]", "{\"credential\":1}", "{\"credential\":\"sk-ant-oat01-a\",\"x\":1}", "x"] {
        let response = client.request("PUT", "/v1/credential", &[bearer(&key)], wrong.as_bytes());
        refused(&response, 400, "invalid_request");
    }
    let huge = "x".repeat(17 * 1024);
    refused(
        &client.request("PUT", "/v1/credential", &[bearer(&key)], huge.as_bytes()),
        413,
        "request_too_large",
    );
}

#[test]
fn t89_a_stored_credential_opens_in_no_other_tenants_run() {
    let mut server = Server::start(Options::default());
    let client = server.client();
    let (acme, other) = (key(&server, "acme"), key(&server, "other"));
    for (key, name) in [(&acme, "acme-kept"), (&other, "other-kept")] {
        let body = json!({ "credential": token(name) }).to_string();
        assert_eq!(client.request("PUT", "/v1/credential", &[bearer(key)], body.as_bytes()).status, 200);
        assert_eq!(says(&client, &[bearer(key)], "hello"), "[embedded] hello");
    }
    server.stop();
    // Whoever can write the database gives one tenant the other's.
    let swap = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); \
                n = d.execute('UPDATE credentials SET sealed = (SELECT sealed FROM credentials JOIN tenants ON id = tenant \
                WHERE name = \"acme\")').rowcount; d.commit(); d.close(); sys.exit(n != 2)";
    let database = server.state.join("ledger/ledger.db");
    let swapped = std::process::Command::new("python3").args(["-c", swap]).arg(&database).status();
    assert!(swapped.expect("python3").success());
    let server = Server::start(Options { state: Some(server.state.clone()), ..server.options.clone() });
    let client = server.client();
    assert_eq!(says(&client, &[bearer(&acme)], "hello"), "[embedded] hello", "its own opens");
    let response = runs(&client, &[bearer(&other)], "hello");
    assert_eq!(response.status, 500, "{response:?}");
    // Its egress ends, before its cage is there or right after.
    let code = response.json()["error"]["details"]["error_code"].clone();
    assert!(code == "egress_died" || code == "egress_failed", "{response:?}");
    assert!(server.log().contains("the credential is unusable"), "{}", server.log());
    // Its tenant stores it again, and goes on.
    let body = json!({ "credential": token("other-kept") }).to_string();
    assert_eq!(client.request("PUT", "/v1/credential", &[bearer(&other)], body.as_bytes()).status, 200);
    assert_eq!(says(&client, &[bearer(&other)], "hello"), "[embedded] hello");
}

#[test]
fn t90_a_key_ends_at_once_when_it_is_revoked_and_says_so() {
    let server = Server::start(Options::default());
    let client = server.client();
    let key = key(&server, "acme");
    assert_eq!(get(&client, "/v1/me", &[bearer(&key)]).status, 200);
    said(&server, &["key", "revoke", &key[7..23]]);
    refused(&get(&client, "/v1/me", &[bearer(&key)]), 401, "key_revoked");
    refused(&runs(&client, &[bearer(&key), beside("one")], "hello"), 401, "key_revoked");
    // Only whoever has the key learns that: a guess is unknown.
    let guess = format!("{}{}", &key[..24], "0".repeat(64));
    refused(&get(&client, "/v1/me", &[bearer(&guess)]), 401, "key_unknown");
    let keys = said(&server, &["key", "list", "--tenant", "acme"]);
    assert_eq!((&keys[0]["state"], &keys[0]["tenant"]), (&json!("revoked"), &json!("acme")), "{keys}");
    let admin = said(&server, &["key", "create", "--admin", "--label", "ops", "--expires-in", "1"]);
    let admin = admin["key"].as_str().expect("a key");
    assert_eq!(get(&client, "/v1/me", &[bearer(admin)]).json()["type"], "admin");
    refused(&runs(&client, &[bearer(admin), beside("one")], "hello"), 403, "key_insufficient");
    refused(&get(&client, "/v1/usage", &[bearer(admin)]), 403, "key_insufficient");
}

#[test]
fn t91_no_key_is_taken_from_an_address() {
    let server = Server::start(Options::default());
    let client = server.client();
    let key = key(&server, "acme");
    for query in [format!("key={key}"), format!("token={}", token("one")), "k=%67aol%5Ft%5Fsecret".to_owned()]
    {
        for path in ["/v1/messages", "/v1/models", "/health", "/nowhere"] {
            let response = client.request("GET", &format!("{path}?{query}"), &[bearer(&key)], b"");
            refused(&response, 400, "key_in_query");
            assert!(!String::from_utf8_lossy(&response.body).contains(&query), "{response:?}");
        }
    }
    assert_eq!(get(&client, "/v1/models?beta=true", &[bearer(&key)]).status, 200);
    assert!(!server.log().contains("gaol_t_") && !server.log().contains("sk-ant-"));
}

#[test]
fn t92_a_server_that_insists_on_keys_takes_no_credential_alone() {
    let server = Server::start(Options::default().with("GAOLER_IDENTITY__REQUIRE_KEY", true));
    let client = server.client();
    let key = key(&server, "acme");
    refused(&runs(&client, &[support::bearer("one")], "hello"), 401, "key_required");
    refused(&get(&client, "/v1/models", &[support::bearer("one")]), 401, "key_required");
    let mut body = ask("hello");
    body["oauth_credentials"] = json!({ "access_token": token("one") });
    refused(&client.post(&[], body.to_string().as_bytes()), 401, "key_required");
    assert_eq!(says(&client, &[bearer(&key), beside("one")], "hello"), "[embedded] hello");
}

#[test]
fn t93_usage_is_a_tenants_own_and_what_egress_counted() {
    let server = Server::start(Options::default());
    let client = server.client();
    let (acme, other) = (key(&server, "acme"), key(&server, "other"));
    assert_eq!(get(&client, "/v1/usage", &[bearer(&acme)]).json()["data"], json!([]));
    let message = runs(&client, &[bearer(&acme), beside("one")], "hello").json();
    says(&client, &[bearer(&acme), beside("one")], "hello again");
    says(&client, &[support::bearer("raw")], "hello");
    let used = get(&client, "/v1/usage", &[bearer(&acme)]).json();
    let day = &used["data"][0];
    assert_eq!(
        (&day["runs"], &day["failed"], &used["has_more"]),
        (&json!(2), &json!(0), &json!(false)),
        "{used}"
    );
    let tokens = day["output_tokens"].as_u64().expect("a number");
    assert!(tokens >= message["usage"]["output_tokens"].as_u64().expect("a number"), "{used} {message}");
    assert!(day["requests"].as_u64().expect("a number") >= 2 && day["bytes_up"] != 0, "{used}");
    let runs_of = |headers: &[(&str, String)]| {
        let used = get(&client, "/v1/usage", headers).json();
        used["data"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|day| day["runs"].as_u64().expect("a number"))
            .sum::<u64>()
    };
    assert_eq!((runs_of(&[bearer(&other)]), runs_of(&[support::bearer("raw")])), (0, 1));
    refused(&get(&client, "/v1/usage", &[]), 401, "credential_missing");
    refused(&get(&client, "/v1/usage?limit=0", &[bearer(&acme)]), 400, "invalid_request");
    refused(&get(&client, "/v1/usage?before=soon", &[bearer(&acme)]), 400, "invalid_request");
}

#[test]
fn t94_a_ledger_that_dies_ends_its_server_in_order_and_the_next_start_has_all() {
    let mut server = Server::start(Options::default());
    let client = server.client();
    let key = key(&server, "acme");
    says(&client, &[bearer(&key), beside("one")], "hello");
    let pid = nix::unistd::Pid::from_raw(ledger(&server).pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("killed");
    assert_eq!(server.wait().code(), Some(1));
    assert!(server.log().contains("ledger_ended"), "{}", server.log());
    let left = processes(server.pid(), server.options.uids);
    assert!(left.is_empty(), "{left:?}");
    let server = Server::start(Options { state: Some(server.state.clone()), ..server.options.clone() });
    let used = get(&server.client(), "/v1/usage", &[bearer(&key)]).json();
    assert_eq!(used["data"][0]["runs"], 1, "{used}");
    assert_eq!(said(&server, &["ledger", "check"])["whole"], true);
}

#[test]
fn t95_the_ledger_has_one_folder_its_own_uid_and_no_network() {
    let server = Server::start(Options::default());
    let ledger = ledger(&server);
    let proc = format!("/proc/{}", ledger.pid);
    let status = std::fs::read_to_string(format!("{proc}/status")).expect("a status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        line.unwrap_or_else(|| panic!("{name}: {status}")).trim().to_owned()
    };
    assert_eq!((field("NoNewPrivs").as_str(), field("Seccomp").as_str()), ("1", "2"));
    assert_eq!(
        (field("CapEff").as_str(), field("CapPrm").as_str()),
        ("0000000000000000", "0000000000000000")
    );
    assert_eq!(field("Threads"), "1");
    let folder = server.state.join("ledger");
    if environment().root_user {
        assert!(server.options.uids.is_ledger(ledger.uid), "{}", ledger.uid);
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&folder.metadata().expect("a folder")), ledger.uid);
        // The tier kernel: its folder is its root, and its network has nothing.
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&path.metadata().expect("a place"));
        assert_eq!(inode(Path::new(&format!("{proc}/root"))), inode(&folder));
        let net = |proc: &str| std::fs::read_link(format!("{proc}/ns/net")).expect("a namespace");
        assert_ne!(net(&proc), net("/proc/self"));
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&folder.metadata().expect("a folder").permissions());
    assert_eq!(mode & 0o777, 0o700);
    let descriptors = std::fs::read_dir(format!("{proc}/fd")).expect("descriptors").flatten();
    let open: Vec<String> = descriptors
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .map(|path| path.display().to_string())
        .collect();
    let known = |path: &String| {
        path.contains("ledger.db")
            || path.starts_with("socket:")
            || path == "/dev/null"
            || path.ends_with("/stderr")
            || path.starts_with("pipe:")
    };
    assert!(open.iter().all(known), "{open:?}");
}

#[test]
fn t96_a_copy_of_the_ledger_is_whole_and_is_not_written_over() {
    let server = Server::start(Options::default());
    let key = key(&server, "acme");
    says(&server.client(), &[bearer(&key), beside("one")], "hello");
    let place = tempfile::tempdir().expect("a folder");
    let copy = place.path().join("copy.db");
    let path = copy.to_str().expect("text");
    let told = said(&server, &["ledger", "backup", path]);
    assert_eq!(told["bytes"].as_u64(), Some(copy.metadata().expect("a copy").len()));
    assert!(std::fs::read(&copy).expect("a copy").starts_with(b"SQLite format 3\0"));
    let again = command(&server, &["ledger", "backup", path]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("not there yet"));
    // Put in place of the ledger of another state, it knows the key.
    let mut other = Server::start(Options::default());
    other.stop();
    let database = other.state.join("ledger/ledger.db");
    for end in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{end}", database.display()));
    }
    std::fs::write(&database, std::fs::read(&copy).expect("a copy")).expect("written");
    let other = Server::start(Options { state: Some(other.state.clone()), ..other.options.clone() });
    until("the key", || (get(&other.client(), "/v1/me", &[bearer(&key)]).status == 200).then_some(()));
}

#[test]
fn t97_keys_are_made_listed_and_ended_without_a_server() {
    let mut server = Server::start(Options::default());
    server.stop();
    let made = said(&server, &["key", "create", "--tenant", "acme", "--label", "ci", "--expires-in", "7"]);
    assert!(made["expires_at"].is_string(), "{made}");
    let keys = said(&server, &["key", "list"]);
    assert_eq!((&keys[0]["label"], &keys[0]["state"]), (&json!("ci"), &json!("active")), "{keys}");
    assert!(
        keys[0].get("key").is_none()
            && !keys.to_string().contains(&made["key"].as_str().expect("a key")[24..])
    );
    let tenants = said(&server, &["tenant", "list"]);
    assert_eq!((&tenants[0]["name"], &tenants[0]["keys"]), (&json!("acme"), &json!(1)), "{tenants}");
    let wrong: [(&[&str], &str); 5] = [
        (&["key", "revoke", "0000000000000000"], "there is no such key"),
        (&["key", "list", "--tenant", "nobody"], "there is no such tenant"),
        (&["tenant", "remove", "nobody"], "there is no such tenant"),
        (&["key", "create", "--tenant", "a b"], "a tenant's name is"),
        (&["key", "create", "--admin", "--label", "a\nb"], "one line"),
    ];
    for (words, part) in wrong {
        let output = command(&server, words);
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && why.contains(part), "{words:?}: {why}");
    }
    said(&server, &["tenant", "remove", "acme"]);
    assert_eq!(said(&server, &["tenant", "list"]), json!([]));
    let server = Server::start(Options { state: Some(server.state.clone()), ..server.options.clone() });
    let key = made["key"].as_str().expect("a key");
    refused(&get(&server.client(), "/v1/me", &[bearer(key)]), 401, "key_unknown");
}

#[test]
fn t98_an_operator_keeps_tenants_and_keys_over_http_and_nobody_else_does() {
    let server = Server::start(Options::default());
    let client = server.client();
    let admin = said(&server, &["key", "create", "--admin"])["key"].as_str().expect("a key").to_owned();
    let tenants_key = key(&server, "acme");
    let asks = |method: &str, path: &str, body: Value| {
        client.request(method, path, &[bearer(&admin)], body.to_string().as_bytes())
    };
    let routes = [
        ("GET", "/admin/v1/tenants"),
        ("POST", "/admin/v1/tenants"),
        ("DELETE", "/admin/v1/tenants/acme"),
        ("GET", "/admin/v1/tenants/acme/limits"),
        ("PUT", "/admin/v1/tenants/acme/limits"),
        ("GET", "/admin/v1/keys"),
        ("POST", "/admin/v1/keys"),
        ("DELETE", "/admin/v1/keys/0000000000000000"),
        ("GET", "/admin/v1/usage"),
        ("GET", "/admin/v1/runs"),
        ("GET", "/admin/v1/runs/live"),
        ("POST", "/admin/v1/runs/00000000000000000000000000000000/cancel"),
        ("DELETE", "/admin/v1/drain"),
        ("POST", "/admin/v1/drain"),
    ];
    for (method, path) in routes {
        let none = client.request(method, path, &[], b"{}");
        refused(&none, 401, "credential_missing");
        for who in [bearer(&tenants_key), support::bearer("raw")] {
            refused(&client.request(method, path, &[who], b"{}"), 403, "key_insufficient");
        }
    }
    assert_eq!(asks("POST", "/admin/v1/tenants", json!({"name": "globex"})).status, 200);
    refused(&asks("POST", "/admin/v1/tenants", json!({"name": "globex"})), 409, "conflict");
    refused(&asks("POST", "/admin/v1/tenants", json!({"name": "a b"})), 400, "invalid_request");
    refused(&asks("POST", "/admin/v1/keys", json!({"tenant": "nobody"})), 404, "not_found");
    refused(
        &asks("POST", "/admin/v1/keys", json!({"tenant": "globex", "admin": true})),
        400,
        "invalid_request",
    );
    let made =
        asks("POST", "/admin/v1/keys", json!({"tenant": "globex", "label": "ci", "expires_in_days": 3}))
            .json();
    let globex = made["key"].as_str().expect("a key").to_owned();
    assert_eq!(says(&client, &[bearer(&globex), beside("one")], "hello"), "[embedded] hello");
    let runs = asks("GET", "/admin/v1/runs", json!({})).json();
    let run = &runs["data"][0];
    assert_eq!(
        (&run["outcome"], &run["key"], &run["status"]),
        (&json!("end_turn"), &made["id"], &json!(200)),
        "{runs}"
    );
    let usage = asks("GET", "/admin/v1/usage", json!({})).json();
    assert_eq!(
        (&usage["data"][0]["tenant"], &usage["data"][0]["runs"]),
        (&run["tenant"], &json!(1)),
        "{usage}"
    );
    let tenants = asks("GET", "/admin/v1/tenants?limit=1", json!({})).json();
    assert_eq!(
        (&tenants["data"][0]["name"], &tenants["next_page"]),
        (&json!("acme"), &json!("acme")),
        "{tenants}"
    );
    let rest = asks("GET", "/admin/v1/tenants?after=acme", json!({})).json();
    assert_eq!((&rest["data"][0]["name"], &rest["has_more"]), (&json!("globex"), &json!(false)), "{rest}");
    let keys = asks("GET", "/admin/v1/keys?tenant=globex", json!({})).json();
    assert_eq!(
        (&keys["data"][0]["label"], &keys["data"][0]["state"]),
        (&json!("ci"), &json!("active")),
        "{keys}"
    );
    assert!(!keys.to_string().contains(&globex[24..]));
    let id = made["id"].as_str().expect("an id");
    assert_eq!(asks("DELETE", &format!("/admin/v1/keys/{id}"), json!({})).status, 200);
    refused(&get(&client, "/v1/me", &[bearer(&globex)]), 401, "key_revoked");
    assert_eq!(asks("DELETE", "/admin/v1/tenants/acme", json!({})).status, 200);
    refused(&get(&client, "/v1/me", &[bearer(&tenants_key)]), 401, "key_unknown");
    assert_eq!(asks("POST", "/admin/v1/drain", json!({})).json()["status"], "draining");
    assert_eq!(get(&client, "/readyz", &[]).status, 503);
    refused(&runs_of_drained(&client), 503, "draining");
    let mut server = server;
    assert_eq!(server.stop().code(), Some(0), "a drain that was asked for before changes nothing");
}

fn runs_of_drained(client: &Client) -> Response {
    runs(client, &[support::bearer("raw")], "hello")
}

#[test]
fn t99_a_ledger_that_says_nothing_is_a_503_and_nobody_hangs() {
    let server = Server::start(Options::default());
    let client = server.client();
    let key = key(&server, "acme");
    let pid = nix::unistd::Pid::from_raw(ledger(&server).pid);
    let signal = |signal| nix::sys::signal::kill(pid, signal).expect("sent");
    signal(nix::sys::signal::Signal::SIGSTOP);
    let asked = std::time::Instant::now();
    let answers: Vec<Response> = std::thread::scope(|scope| {
        let by_key = || runs(&client, &[bearer(&key), beside("one")], "hello");
        let alone = || runs(&client, &[support::bearer("raw")], "hello");
        let listed = || get(&client, "/v1/models", &[bearer(&key)]);
        let all = [scope.spawn(by_key), scope.spawn(alone), scope.spawn(listed)];
        // Who needs nobody to be recognized is served.
        assert_eq!(get(&client, "/health", &[]).status, 200);
        all.map(|asked| asked.join().expect("an answer")).into()
    });
    assert!(asked.elapsed() < support::patience(), "{:?}", asked.elapsed());
    for answer in &answers {
        refused(answer, 503, "ledger_unavailable");
        assert_eq!(answer.header("retry-after"), Some("5"), "{answer:?}");
    }
    signal(nix::sys::signal::Signal::SIGCONT);
    until("the ledger", || (get(&client, "/v1/me", &[bearer(&key)]).status == 200).then_some(()));
    assert_eq!(says(&client, &[bearer(&key), beside("one")], "hello"), "[embedded] hello");
}

#[test]
fn t100_a_rate_holds_for_one_tenant_and_one_address() {
    let options = Options::default().with("GAOLER_RATES__TENANT_PER_MINUTE", 1);
    let server = Server::start(options.with("GAOLER_RATES__ADDRESS_PER_MINUTE", 8));
    let client = server.client();
    assert_eq!(says(&client, &[support::bearer("one")], "hello"), "[embedded] hello");
    let second = runs(&client, &[support::bearer("one")], "hello");
    refused(&second, 429, "rate_limited");
    let wait: u64 = second.header("retry-after").expect("a time").parse().expect("seconds");
    assert!((1..=60).contains(&wait) && second.error() == "rate_limit_error", "{second:?}");
    // What works on a tenant's files is a run too.
    refused(&get(&client, "/v1/sessions", &[support::bearer("one")]), 429, "rate_limited");
    assert_eq!(says(&client, &[support::bearer("two")], "hello"), "[embedded] hello");
    let models = || get(&client, "/v1/models", &[support::bearer("one")]);
    let answers: Vec<Response> = (0..10).map(|_| models()).collect();
    refused(&answers[9], 429, "rate_limited");
    assert_eq!(get(&client, "/health", &[]).status, 200, "probes are never limited");
}

#[test]
fn t101_a_tenant_that_has_used_its_tokens_waits_for_another_day() {
    let server = Server::start(Options::default().with("GAOLER_BUDGET__TOKENS_PER_DAY", 1));
    let client = server.client();
    let key = key(&server, "acme");
    assert_eq!(says(&client, &[bearer(&key), beside("one")], "hello"), "[embedded] hello");
    let second = runs(&client, &[bearer(&key), beside("other")], "hello");
    refused(&second, 429, "budget_exhausted");
    assert_eq!((second.error().as_str(), second.header("x-should-retry")), ("billing_error", Some("false")));
    let wait: u64 = second.header("retry-after").expect("a time").parse().expect("seconds");
    assert!((1..=86_401).contains(&wait), "{wait}");
    // Somebody else has a budget of their own.
    assert_eq!(says(&client, &[support::bearer("two")], "hello"), "[embedded] hello");
    refused(&runs(&client, &[support::bearer("two")], "hello"), 429, "budget_exhausted");
}

fn admin(server: &Server) -> String {
    said(server, &["key", "create", "--admin"])["key"].as_str().expect("a key").to_owned()
}

/// The live runs, as the operator sees them.
fn under_way(client: &Client, admin: &str) -> Vec<Value> {
    let list = get(client, "/admin/v1/runs/live", &[bearer(admin)]).json();
    list["data"].as_array().expect("a list").clone()
}

/// The same, once they are so many.
fn live(client: &Client, admin: &str, state: &str, count: usize) -> Vec<Value> {
    until("live runs", || {
        let rows = under_way(client, admin);
        (rows.iter().filter(|row| row["state"] == state).count() == count).then_some(rows)
    })
}

#[test]
fn t210_an_operator_sees_live_runs_and_ends_one_that_runs_and_one_that_waits() {
    let options = Options::default().with("GAOLER_RUNS__TENANT_MAX", 1);
    let server = Server::start(options);
    let client = server.client();
    let (admin, acme) = (admin(&server), key(&server, "acme"));
    assert_eq!(live(&client, &admin, "running", 0), Vec::<Value>::new());
    let cancel = |run: &Value| {
        let path = format!("/admin/v1/runs/{}/cancel", run["run"].as_str().expect("an id"));
        client.request("POST", &path, &[bearer(&admin)], b"")
    };
    let asks = |name| {
        let (client, headers) = (client.clone(), [bearer(&acme), beside(name)]);
        std::thread::spawn(move || runs(&client, &headers, WAITS))
    };
    let first = asks("one");
    let running = live(&client, &admin, "running", 1).remove(0);
    let second = asks("two");
    let rows = live(&client, &admin, "queued", 1);
    let waiting = rows.iter().find(|row| row["state"] == "queued").expect("one that waits").clone();
    let me = get(&client, "/v1/me", &[bearer(&acme)]).json();
    for row in &rows {
        assert_eq!((&row["tenant"], &row["key"]), (&me["id"], &me["key"]), "{row}");
        assert_eq!((&row["endpoint"], &row["level"]), (&json!("/v1/messages"), &json!("balanced")), "{row}");
        assert!(row["since"].is_string() && !row.to_string().contains("sleep"), "{row}");
    }
    assert_eq!((&waiting["queue_position"], &running["queue_position"]), (&json!(1), &Value::Null));
    let others = get(&client, "/admin/v1/runs/live?tenant=nobody", &[bearer(&admin)]).json();
    assert_eq!(others["data"], json!([]));
    // Nobody but the operator, and no other id.
    let path = format!("/admin/v1/runs/{}/cancel", running["run"].as_str().expect("an id"));
    refused(&client.request("POST", &path, &[bearer(&acme)], b""), 403, "key_insufficient");
    for wrong in ["0".repeat(32), "x".into()] {
        refused(&cancel(&json!({ "run": wrong })), 404, "run_not_found");
    }
    assert_eq!(cancel(&waiting).json()["type"], "run_cancelled");
    let told = second.join().expect("an answer");
    refused(&told, 500, "cancelled_by_operator");
    assert_eq!(told.header("x-should-retry"), Some("false"), "{told:?}");
    assert_eq!(live(&client, &admin, "running", 1).len(), 1, "the other one goes on");
    assert_eq!(cancel(&running).status, 200);
    refused(&first.join().expect("an answer"), 500, "cancelled_by_operator");
    live(&client, &admin, "running", 0);
    refused(&cancel(&running), 404, "run_not_found");
    until("the record", || {
        let runs = get(&client, "/admin/v1/runs", &[bearer(&admin)]).json();
        (runs["data"][0]["outcome"] == "cancelled_by_operator").then_some(())
    });
    assert_eq!(says(&client, &[bearer(&acme), beside("one")], "hello"), "[embedded] hello");
}

#[test]
fn t211_a_drain_ends_by_the_word_that_began_it_and_one_of_the_supervisors_does_not() {
    let mut server = Server::start(Options::default());
    let client = server.client();
    let (admin, acme) = (admin(&server), key(&server, "acme"));
    let drain = |method: &str| client.request(method, "/admin/v1/drain", &[bearer(&admin)], b"");
    assert_eq!(drain("DELETE").json()["status"], "healthy", "there is none");
    assert_eq!(drain("POST").json()["status"], "draining");
    refused(&runs_of_drained(&client), 503, "draining");
    assert_eq!(drain("DELETE").json()["status"], "healthy");
    assert_eq!(get(&client, "/readyz", &[]).status, 200);
    assert_eq!(says(&client, &[bearer(&acme), beside("one")], "hello"), "[embedded] hello");
    let (asks, headers) = (client.clone(), [bearer(&acme), beside("one")]);
    let last = std::thread::spawn(move || runs(&asks, &headers, WAITS));
    let run = live(&client, &admin, "running", 1).remove(0);
    server.signal(nix::sys::signal::Signal::SIGTERM);
    until("the drain", || (get(&client, "/readyz", &[]).status == 503).then_some(()));
    refused(&drain("DELETE"), 409, "drain_final");
    refused(&runs_of_drained(&client), 503, "draining");
    // A run that keeps the server from its end can be ended in a drain, too.
    let path = format!("/admin/v1/runs/{}/cancel", run["run"].as_str().expect("an id"));
    assert_eq!(client.request("POST", &path, &[bearer(&admin)], b"").status, 200);
    refused(&last.join().expect("an answer"), 500, "cancelled_by_operator");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn t214_a_tenants_own_limits_are_in_force_for_its_next_request_and_for_nobody_else() {
    let server = Server::start(Options::default());
    let client = server.client();
    let (admin, acme, other) = (admin(&server), key(&server, "acme"), key(&server, "other"));
    let path = "/admin/v1/tenants/acme/limits";
    let limit = |limits: Value| client.request("PUT", path, &[bearer(&admin)], limits.to_string().as_bytes());
    let none = get(&client, path, &[bearer(&admin)]).json();
    assert_eq!(
        (&none["limits"]["tokens_per_day"], &none["limits"]["tenant_max"]),
        (&Value::Null, &Value::Null)
    );
    let missing = client.request("GET", "/admin/v1/tenants/nobody/limits", &[bearer(&admin)], b"");
    refused(&missing, 404, "not_found");
    refused(
        &client.request("PUT", "/admin/v1/tenants/nobody/limits", &[bearer(&admin)], b"{}"),
        404,
        "not_found",
    );
    for wrong in [
        json!([]),
        json!({"x": 1}),
        json!({"tenant_max": 0}),
        json!({"tokens_per_day": -1}),
        json!({"cost_per_day_usd": 1e300}),
    ] {
        refused(&limit(wrong), 400, "invalid_request");
    }
    assert_eq!(says(&client, &[bearer(&acme), beside("one")], "hello"), "[embedded] hello");
    // Tokens: what it has used is more than that.
    assert_eq!(limit(json!({"tokens_per_day": 1})).json()["limits"]["tokens_per_day"], 1);
    refused(&runs(&client, &[bearer(&acme), beside("one")], "hello"), 429, "budget_exhausted");
    assert_eq!(says(&client, &[bearer(&other), beside("one")], "hello"), "[embedded] hello");
    let used = get(&client, "/v1/usage", &[bearer(&acme)]).json();
    assert_eq!(
        (&used["limits"]["tokens_per_day"], &used["left"]["tokens_per_day"]),
        (&json!(1), &json!(0)),
        "{used}"
    );
    let used = get(&client, "/v1/usage", &[bearer(&other)]).json();
    assert_eq!(
        (&used["limits"]["tokens_per_day"], &used["left"]["tokens_per_day"]),
        (&Value::Null, &Value::Null)
    );
    // A rate, by the command line, beside the server. What is not named stays as it was.
    let said = |words: &[&str]| said(&server, &[&["tenant", "limits", "acme"], words].concat());
    assert_eq!(said(&["tenant_per_minute=1"])["tokens_per_day"], 1);
    assert_eq!(said(&["tokens_per_day=default"])["tenant_per_minute"], 1);
    assert_eq!(says(&client, &[bearer(&acme), beside("one")], "hello"), "[embedded] hello");
    refused(&runs(&client, &[bearer(&acme), beside("one")], "hello"), 429, "rate_limited");
    refused(&get(&client, "/v1/sessions", &[bearer(&acme)]), 429, "rate_limited");
    assert_eq!(get(&client, "/v1/sessions", &[bearer(&other)]).status, 200);
    for wrong in [
        &["tenant", "limits", "acme", "x=1"][..],
        &["tenant", "limits", "nobody"],
        &["tenant", "limits", "acme", "tenant_max"],
    ] {
        assert_eq!(command(&server, wrong).status.code(), Some(1), "{wrong:?}");
    }
    // Runs at a time.
    assert_eq!(limit(json!({"tenant_max": 1})).json()["limits"]["tenant_per_minute"], Value::Null);
    let (asks, headers) = (client.clone(), [bearer(&acme), beside("one")]);
    let first = std::thread::spawn(move || runs(&asks, &headers, WAITS));
    let running = live(&client, &admin, "running", 1).remove(0);
    let (asks, headers) = (client.clone(), [bearer(&acme), beside("two")]);
    let second = std::thread::spawn(move || runs(&asks, &headers, "hello"));
    live(&client, &admin, "queued", 1);
    assert_eq!(says(&client, &[bearer(&other), beside("one")], "hello"), "[embedded] hello");
    let path = format!("/admin/v1/runs/{}/cancel", running["run"].as_str().expect("an id"));
    assert_eq!(client.request("POST", &path, &[bearer(&admin)], b"").status, 200);
    refused(&first.join().expect("an answer"), 500, "cancelled_by_operator");
    assert_eq!(second.join().expect("an answer").text(), "[embedded] hello", "its place is free again");
}

/// What goes on until it is ended. A command that is nothing but a sleep is refused by the CLI.
const WAITS: &str = "RUN: until test -e never; do sleep 0.1; done";

const PRICES: &str = "[{ model = 'claude-', input = 300, output = 1500, cache_write = 375, cache_read = 30 }, \
                       { model = 'claude-sonnet-', input = 3, output = 15, cache_write = 3.75, cache_read = 0.3 }]";

#[test]
fn t215_a_run_costs_what_egress_counted_of_each_model_and_a_budget_of_money_holds() {
    let server = Server::start(Options::default().with("GAOLER_PRICES__LIST", PRICES));
    let client = server.client();
    let (admin, acme) = (admin(&server), key(&server, "acme"));
    let mut body = ask("hello");
    body["model"] = json!("sonnet");
    let asks = || client.post(&[bearer(&acme), beside("one")], body.to_string().as_bytes());
    assert_eq!(asks().text(), "[embedded] hello");
    let used = get(&client, "/v1/usage", &[bearer(&acme)]).json();
    let day = &used["data"][0];
    let tokens = |name: &str| day[name].as_u64().expect("a number");
    // Thousandths of a millionth of a dollar. No request was of another model, so none has the dearer price.
    let thousandths = 3000 * tokens("input_tokens")
        + 15_000 * tokens("output_tokens")
        + 3750 * tokens("cache_creation_input_tokens")
        + 300 * tokens("cache_read_input_tokens");
    assert!(thousandths > 0, "{used}");
    let expected = json!(thousandths.div_ceil(1000) as f64 / 1e6);
    assert_eq!(day["cost_usd"], expected, "{used}");
    assert_eq!(get(&client, "/admin/v1/runs", &[bearer(&admin)]).json()["data"][0]["cost_usd"], expected);
    assert_eq!(get(&client, "/admin/v1/usage", &[bearer(&admin)]).json()["data"][0]["cost_usd"], expected);
    let limits = json!({"cost_per_day_usd": 0.000001}).to_string();
    let limit = |server: &Server, admin: &str| {
        let client = server.client();
        client.request("PUT", "/admin/v1/tenants/acme/limits", &[bearer(admin)], limits.as_bytes())
    };
    assert_eq!(limit(&server, &admin).json()["limits"]["cost_per_day_usd"], json!(0.000001));
    refused(&asks(), 429, "budget_exhausted");
    let used = get(&client, "/v1/usage", &[bearer(&acme)]).json();
    assert_eq!(
        (&used["left"]["cost_per_day_usd"], &used["left"]["tokens_per_day"]),
        (&json!(0.0), &Value::Null)
    );
    // Where nothing has a price, a budget of money lets nobody through, and nobody is told a cost.
    let server = Server::start(Options::default());
    let client = server.client();
    let (admin, acme) = (self::admin(&server), key(&server, "acme"));
    let asks = || client.post(&[bearer(&acme), beside("one")], body.to_string().as_bytes());
    assert_eq!(asks().text(), "[embedded] hello");
    let used = get(&client, "/v1/usage", &[bearer(&acme)]).json();
    assert_eq!(used["data"][0]["cost_usd"], Value::Null, "{used}");
    assert_eq!(limit(&server, &admin).status, 200);
    refused(&asks(), 403, "model_unpriced");
}

#[test]
fn t216_of_many_runs_at_once_no_more_begin_than_the_budget_has_room_for() {
    let options = Options::default().with("GAOLER_BUDGET__TOKENS_PER_DAY", 10_000_000);
    let server = Server::start(options.with("GAOLER_BUDGET__RESERVE_TOKENS", 3_000_000));
    let client = server.client();
    let (admin, acme, other) = (admin(&server), key(&server, "acme"), key(&server, "other"));
    let left = |key: &str| {
        let used = get(&client, "/v1/usage", &[bearer(key)]).json();
        used["left"]["tokens_per_day"].as_u64().expect("a number")
    };
    assert_eq!(left(&acme), 10_000_000);
    // The fifth would begin with 4 * 3,000,000 held. Twice: what has ended gives back what it held.
    for round in 0..2 {
        let asking: Vec<_> = (0..8)
            .map(|_| {
                let (client, headers) = (client.clone(), [bearer(&acme), beside("one")]);
                std::thread::spawn(move || runs(&client, &headers, WAITS))
            })
            .collect();
        let running = live(&client, &admin, "running", 4);
        until("the others", || (asking.iter().filter(|it| it.is_finished()).count() == 4).then_some(()));
        assert_eq!(running.len(), 4, "{running:?}");
        assert_eq!(left(&acme), 0, "round {round}");
        assert_eq!(left(&other), 10_000_000, "another tenant's is its own");
        for run in &running {
            let path = format!("/admin/v1/runs/{}/cancel", run["run"].as_str().expect("an id"));
            assert_eq!(client.request("POST", &path, &[bearer(&admin)], b"").status, 200);
        }
        let answers: Vec<Response> = asking.into_iter().map(|it| it.join().expect("an answer")).collect();
        let (held, ended): (Vec<_>, Vec<_>) = answers.iter().partition(|it| it.status == 429);
        assert_eq!((held.len(), ended.len()), (4, 4));
        held.into_iter().for_each(|it| refused(it, 429, "budget_reserved"));
        ended.into_iter().for_each(|it| refused(it, 500, "cancelled_by_operator"));
        let left = left(&acme);
        assert!(
            (9_000_000..=10_000_000).contains(&left),
            "round {round}: only what was used is gone: {left}"
        );
    }
    // A start that fails gives back what it held; and so does what nobody waits for.
    let before = left(&acme);
    let bad = ("x-claude-credential", "sk-ant-oat01-refused-00000000".to_owned());
    let fresh = key(&server, "fresh");
    refused(&runs(&client, &[bearer(&fresh), bad], "hello"), 401, "credential_refused");
    assert_eq!((left(&fresh), left(&acme)), (10_000_000, before));
    // With less than one run is taken to use, one begins all the same; who asks for the same again joins it.
    said(&server, &["tenant", "limits", "other", "tokens_per_day=1000000"]);
    let named = |client: &Client| {
        let (client, headers) =
            (client.clone(), [bearer(&other), beside("one"), ("idempotency-key", "k".to_owned())]);
        std::thread::spawn(move || {
            runs(&client, &headers, "RUN: until test -e go; do sleep 0.1; done; echo gone")
        })
    };
    let first = named(&client);
    live(&client, &admin, "running", 1);
    let second = named(&client);
    refused(&runs(&client, &[bearer(&other), beside("one")], "hello"), 429, "budget_reserved");
    let run = live(&client, &admin, "running", 1).remove(0);
    let path = format!("/admin/v1/runs/{}/cancel", run["run"].as_str().expect("an id"));
    assert_eq!(client.request("POST", &path, &[bearer(&admin)], b"").status, 200);
    for answer in [first, second] {
        refused(&answer.join().expect("an answer"), 500, "cancelled_by_operator");
    }
    until("its end", || (left(&other) > 900_000).then_some(()));
    assert_eq!(says(&client, &[bearer(&other), beside("one")], "hello"), "[embedded] hello");
}

#[test]
fn t275_an_operator_has_the_settings_read_again_and_is_told_what_that_did() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("gaoler.toml");
    let is = |text: &str| std::fs::write(&config, text).expect("written");
    is("");
    let server = Server::start(Options { config: Some(config.clone()), ..Options::with_double() });
    let client = server.client();
    let (admin, acme) = (admin(&server), key(&server, "acme"));
    let reload = |key: &str| client.request("POST", "/admin/v1/reload", &[bearer(key)], b"");
    refused(&client.request("POST", "/admin/v1/reload", &[], b""), 401, "credential_missing");
    refused(&reload(&acme), 403, "key_insufficient");
    let told = |taken: Value, restart: Value| json!({"type": "reload", "taken": taken, "restart_needed_for": restart});
    assert_eq!(reload(&admin).json(), told(json!([]), json!([])));

    // What is taken is in force when the answer comes: each of these is tried.
    let raw = [("authorization", format!("Bearer {}", token("one")))];
    assert_eq!(says(&client, &raw, "hello"), "[embedded] double: hello");
    assert_eq!(get(&client, "/metrics", &[]).status, 404);
    is(
        "identity.require_key = true\nserver.metrics = true\nbudget.tokens_per_day = 7\nlevel.maximum = 'developer'\n",
    );
    let taken = json!(["server.metrics", "identity.require_key", "budget.tokens_per_day"]);
    assert_eq!(reload(&admin).json(), told(taken, json!(["level.maximum"])));
    refused(&runs(&client, &raw, "hello"), 401, "key_required");
    assert_eq!(get(&client, "/metrics", &[]).status, 200);
    let usage = get(&client, "/v1/usage", &[bearer(&acme)]).json();
    assert_eq!(usage["left"]["tokens_per_day"], 7, "{usage}");
    let loose = [bearer(&acme), beside("one"), ("x-gaoler-level", "developer".to_owned())];
    refused(&runs(&client, &loose, "hello"), 403, "level_not_allowed");
    let prices = format!("prices.list = {PRICES}\nmcp.remote = false\n");
    is(&prices);
    let taken = json!([
        "server.metrics",
        "identity.require_key",
        "budget.tokens_per_day",
        "prices.list",
        "mcp.remote"
    ]);
    assert_eq!(reload(&admin).json(), told(taken, json!([])));
    assert_eq!(says(&client, &[bearer(&acme), beside("one")], "hello"), "[embedded] double: hello");
    let usage = get(&client, "/v1/usage", &[bearer(&acme)]).json();
    assert_eq!(usage["left"]["tokens_per_day"], Value::Null, "{usage}");
    assert!(usage["data"][0]["cost_usd"].is_number(), "there are prices: {usage}");

    // Settings that are wrong change nothing, and the operator is told where.
    is("mcp.remote = 'perhaps'");
    let wrong = reload(&admin);
    refused(&wrong, 409, "settings_wrong");
    let message = wrong.json()["error"]["message"].as_str().expect("a message").to_owned();
    assert!(message.contains("gaoler.toml: mcp.remote: must be a boolean"), "{message}");
    assert_eq!(wrong.header("x-should-retry"), Some("false"));

    // Many at once are all told, of a reload that began after each had asked.
    is(&prices);
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..12).map(|_| scope.spawn(|| reload(&admin).json())).collect();
        for answer in asking {
            assert_eq!(answer.join().expect("an answer"), told(json!([]), json!([])));
        }
    });
    assert_eq!(client.request("POST", "/admin/v1/drain", &[bearer(&admin)], b"").status, 200);
    refused(&reload(&admin), 503, "draining");
}

/// What asks the upstream by itself, as a tool of a hostile cage can: so often, and then a word.
const ASKS: &str = include_str!("support/call.py");

fn asks_itself(times: u32) -> String {
    format!(
        "RUN: n=0; while [ $n -lt {times} ]; do python3 call.py own > /dev/null || exit; n=$((n+1)); done; echo $n"
    )
}

/// The newest records of this tenant, once there are so many.
fn records(client: &Client, admin: &str, tenant: &str, count: usize) -> Vec<Value> {
    until("the records", || {
        let page = get(client, &format!("/admin/v1/runs?tenant={tenant}"), &[bearer(admin)]).json();
        let rows = page["data"].as_array().expect("a list").clone();
        assert!(rows.len() <= count, "{rows:?}");
        (rows.len() == count).then_some(rows)
    })
}

fn figure(row: &Value, name: &str) -> u64 {
    row[name].as_u64().unwrap_or_else(|| panic!("{name}: {row}"))
}

/// What a budget counts of it.
fn tokens(row: &Value) -> u64 {
    ["input_tokens", "output_tokens", "cache_creation_input_tokens"]
        .iter()
        .map(|name| figure(row, name))
        .sum()
}

fn me(client: &Client, key: &str) -> String {
    get(client, "/v1/me", &[bearer(key)]).json()["id"].as_str().expect("an id").to_owned()
}

#[test]
fn t250_a_run_that_goes_on_past_its_tenants_budget_is_ended_and_its_last_answer_is_not() {
    if !environment().commands {
        return;
    }
    // The real CLI's turn has some ten thousand tokens.
    const BUDGET: u64 = 45_000;
    let server = Server::start(Options::default().with("GAOLER_BUDGET__TOKENS_PER_DAY", BUDGET));
    let client = server.client();
    let admin = admin(&server);
    let steps = format!("STEPS: {}", ["echo step"; 14].join(";;"));
    let check = |name: &str, more: Value, asks: &dyn Fn(&str, &[u8]) -> Option<Response>| {
        let key = key(&server, name);
        let mut body = ask(&steps);
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let answer = asks(&key, body.to_string().as_bytes());
        let row = records(&client, &admin, &me(&client, &key), 1).remove(0);
        assert_eq!((&row["outcome"], &row["status"]), (&json!("budget_exhausted"), &json!(429)), "{row}");
        // Not before it was spent; and what is past it is an answer that was under way, and one more at most.
        let (used, requests) = (tokens(&row), figure(&row, "requests"));
        assert!(used >= BUDGET && used - BUDGET < 3 * used / requests, "{row}");
        assert!((4..=8).contains(&requests), "{row}");
        // The tenant's sum is the same, once.
        let day = get(&client, "/v1/usage", &[bearer(&key)]).json();
        assert_eq!(day["left"]["tokens_per_day"], 0, "{day}");
        assert_eq!((tokens(&day["data"][0]), figure(&day["data"][0], "runs")), (used, 1), "{day}");
        let next = runs(&client, &[bearer(&key), beside("one")], "hello");
        refused(&next, 429, "budget_exhausted");
        assert!(next.complaint().contains("there is more from 2"), "{next:?}");
        answer
    };
    let posts = |key: &str, body: &[u8]| Some(client.post(&[bearer(key), beside("one")], body));
    let answer = check("json", json!({}), &posts).expect("an answer");
    refused(&answer, 429, "budget_exhausted");
    assert_eq!((answer.error().as_str(), answer.header("x-should-retry")), ("billing_error", Some("false")));
    let wait: u64 = answer.header("retry-after").expect("a time").parse().expect("seconds");
    assert!((1..=86_401).contains(&wait), "{wait}");
    // As a stream, which has begun: what was said, and then why there is no more.
    let answer = check("stream", json!({"stream": true}), &posts).expect("an answer");
    let last = answer.events().pop().expect("an event");
    assert_eq!((answer.status, last.name.as_str()), (200, "error"), "{answer:?}");
    assert_eq!(last.data["error"]["details"]["error_code"], "budget_exhausted");
    assert!(answer.text().contains("step 3 of 14"), "{answer:?}");
    // Nobody listens, and a session is there to be saved.
    let session = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";
    let goes = |key: &str, body: &[u8]| {
        let stream = client.connect().expect("a connection");
        client.send(&stream, "POST", "/v1/messages", &[bearer(key), beside("one")], body).expect("sent");
        live(&client, &admin, "running", 1);
        None
    };
    check("gone", json!({"on_disconnect": "continue", "session_id": session}), &goes);
    // One whose only answer spends all of it has that answer.
    let last = key(&server, "last");
    said(&server, &["tenant", "limits", "last", "tokens_per_day=1"]);
    for _ in 0..2 {
        assert_eq!(says(&client, &[bearer(&last), beside("one")], "hello"), "[embedded] hello");
        said(&server, &["tenant", "limits", "last", "tokens_per_day=15000"]);
    }
    refused(&runs(&client, &[bearer(&last), beside("one")], "hello"), 429, "budget_exhausted");
}

#[test]
fn t251_runs_that_spend_a_budget_together_are_ended_together_and_nobody_elses_are() {
    if !environment().commands {
        return;
    }
    const BUDGET: u64 = 1500;
    let server = Server::start(Options::with_double().with("GAOLER_BUDGET__RESERVE_TOKENS", 10));
    let client = server.client();
    let admin = admin(&server);
    let [acme, other, free] = ["acme", "other", "free"].map(|name| key(&server, name));
    said(&server, &["tenant", "limits", "acme", &format!("tokens_per_day={BUDGET}")]);
    said(&server, &["tenant", "limits", "other", "tokens_per_month=1000000"]);
    for key in [&acme, &other, &free] {
        let headers = [bearer(key), beside("one")];
        let path = "/v1/workspaces/default/files/call.py";
        assert_eq!(client.request("PUT", path, &headers, ASKS.as_bytes()).status, 200);
    }
    let begin = |key: &str, times: u32| {
        let (client, headers) = (client.clone(), [bearer(key), beside("one")]);
        std::thread::spawn(move || runs(&client, &headers, &asks_itself(times)))
    };
    let both = [begin(&acme, 100_000), begin(&acme, 100_000)];
    let others = [begin(&other, 100), begin(&free, 100)];
    for answer in both {
        refused(&answer.join().expect("an answer"), 429, "budget_exhausted");
    }
    let rows = records(&client, &admin, &me(&client, &acme), 2);
    assert!(rows.iter().all(|row| row["outcome"] == "budget_exhausted" && tokens(row) > 0), "{rows:?}");
    let sum = |of: &dyn Fn(&Value) -> u64| rows.iter().map(of).sum::<u64>();
    let (used, requests) = (sum(&tokens), sum(&|row| figure(row, "requests")));
    // Of each run the answer that was under way, and those that came until its end was known.
    assert!(used >= BUDGET && used - BUDGET <= 8 * used.div_ceil(requests), "{rows:?}");
    refused(&runs(&client, &[bearer(&acme), beside("one")], "hello"), 429, "budget_exhausted");
    for answer in others {
        assert_eq!(answer.join().expect("an answer").text(), "[embedded] RUN ok:\n100");
    }
    for key in [&other, &free] {
        let row = records(&client, &admin, &me(&client, key), 1).remove(0);
        assert_eq!((&row["outcome"], figure(&row, "requests")), (&json!("end_turn"), 100), "{row}");
    }
}

#[test]
fn t252_a_run_that_waits_for_its_client_ends_when_its_tenants_budget_is_spent() {
    if !environment().commands {
        return;
    }
    let options = Options::default().with("GAOLER_BUDGET__TOKENS_PER_DAY", 45_000);
    let server = Server::start(options.with("GAOLER_BUDGET__RESERVE_TOKENS", 10_000));
    let client = server.client();
    let (admin, acme) = (admin(&server), key(&server, "acme"));
    let headers = [bearer(&acme), beside("one")];
    let mut body = ask("CALLS: mcp__client__weather {\"city\":\"Oslo\"}");
    body["tools"] = json!([{"name": "weather", "input_schema": {"type": "object"}}]);
    let asks = client.post(&headers, body.to_string().as_bytes());
    assert_eq!(asks.json()["stop_reason"], "tool_use", "{asks:?}");
    live(&client, &admin, "awaiting_client", 1);
    // Not by what another run holds, but by what it uses.
    assert_eq!(says(&client, &headers, "hello"), "[embedded] hello");
    live(&client, &admin, "awaiting_client", 1);
    let steps = format!("STEPS: {}", ["echo step"; 14].join(";;"));
    refused(&runs(&client, &headers, &steps), 429, "budget_exhausted");
    live(&client, &admin, "awaiting_client", 0);
    let rows = records(&client, &admin, &me(&client, &acme), 3);
    let outcomes: Vec<_> = rows.iter().map(|row| row["outcome"].as_str().expect("a word")).collect();
    assert_eq!(outcomes.iter().filter(|it| **it == "budget_exhausted").count(), 2, "{rows:?}");
    // Its client comes back too late.
    let call = asks.json()["content"]
        .as_array()
        .expect("blocks")
        .iter()
        .find_map(|block| (block["type"] == "tool_use").then(|| block["id"].clone()));
    body["messages"].as_array_mut().expect("messages").extend([
        json!({"role": "assistant", "content": asks.json()["content"]}),
        json!({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call, "content": "snow"}]}),
    ]);
    refused(&client.post(&headers, body.to_string().as_bytes()), 429, "budget_exhausted");
}

#[test]
fn t254_an_operator_sees_requests_about_files_and_ends_one() {
    let server = Server::start(Options::default().with("GAOLER_RUNS__TENANT_MAX", 1));
    let client = server.client();
    let (admin, acme) = (admin(&server), key(&server, "acme"));
    let headers = [bearer(&acme), beside("one")];
    let path = "/v1/workspaces/default/files/secret-name";
    assert_eq!(client.request("PUT", path, &headers, b"old").status, 200);
    let cancel = |run: &Value| {
        let path = format!("/admin/v1/runs/{}/cancel", run["run"].as_str().expect("an id"));
        client.request("POST", &path, &[bearer(&admin)], b"")
    };
    // Half of a body, and then nothing more.
    let mut stream = client.connect().expect("a connection");
    let fields: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("PUT {path} HTTP/1.1\r\nhost: x\r\n{fields}content-length: 1000000\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("sent");
    stream.write_all(&[b'n'; 500_000]).expect("sent");
    // The tenant's own first sweep may be under way as well.
    let row = until("the upload", || {
        let is_it = |row: &Value| row["kind"] == "files" && row["state"] == "running";
        under_way(&client, &admin).into_iter().find(is_it)
    });
    let identity = get(&client, "/v1/me", &[bearer(&acme)]).json();
    assert_eq!((&row["tenant"], &row["key"]), (&identity["id"], &identity["key"]), "{row}");
    assert_eq!((&row["kind"], &row["endpoint"]), (&json!("files"), &json!("/v1/workspaces")), "{row}");
    assert!(row["model"].is_null() && row["session"].is_null() && row["since"].is_string(), "{row}");
    assert!(!row.to_string().contains("secret"), "a file's name is its tenant's: {row}");
    // Another one waits for its place.
    let (waits, own) = (client.clone(), headers.clone());
    let waiting = std::thread::spawn(move || get(&waits, "/v1/sessions", &own));
    let rows = live(&client, &admin, "queued", 1);
    let queued = rows.iter().find(|row| row["state"] == "queued").expect("one that waits");
    assert_eq!((&queued["kind"], &queued["queue_position"]), (&json!("sessions"), &json!(1)), "{queued}");
    refused(&client.request("POST", "/admin/v1/runs/x/cancel", &[bearer(&admin)], b""), 404, "run_not_found");
    assert_eq!(cancel(queued).json()["type"], "run_cancelled");
    refused(&waiting.join().expect("an answer"), 500, "cancelled_by_operator");
    assert_eq!(cancel(&row).status, 200);
    let told = support::client::read(&mut BufReader::new(&stream)).expect("an answer");
    refused(&told, 500, "cancelled_by_operator");
    assert_eq!(told.header("x-should-retry"), Some("false"), "{told:?}");
    live(&client, &admin, "running", 0);
    refused(&cancel(&row), 404, "run_not_found");
    // Nothing of it is there, and the place is free.
    assert_eq!(get(&client, path, &headers).body, b"old");
    // A download that nobody takes: its connection breaks.
    let big = vec![b'b'; 30 << 20];
    assert_eq!(client.request("PUT", path, &headers, &big).status, 200);
    let stream = client.connect().expect("a connection");
    client.send(&stream, "GET", path, &headers, b"").expect("sent");
    let mut reader = BufReader::new(&stream);
    assert_eq!(support::client::head(&mut reader).expect("a head").status, 200);
    let row = live(&client, &admin, "running", 1).remove(0);
    assert_eq!(cancel(&row).status, 200);
    live(&client, &admin, "running", 0);
    // The answer was on its way with a length, which it does not reach.
    let mut came = Vec::new();
    let _ = reader.read_to_end(&mut came);
    assert!(came.len() < big.len(), "it must not be taken for all of it");
    assert_eq!(get(&client, path, &headers).body.len(), big.len());
}

#[test]
fn t278_a_name_of_the_operators_is_the_model_that_it_stands_for_in_both_dialects() {
    let list = "[{ id = 'gpt-4o', model = 'claude-haiku-4-5', display_name = 'House model' }]";
    let server = Server::start(Options::default().with("GAOLER_MODELS__LIST", list));
    let client = server.client();
    let headers = [bearer(&token("one"))];
    let listed = get(&client, "/v1/models/gpt-4o", &headers).json();
    assert_eq!((&listed["id"], &listed["display_name"]), (&json!("gpt-4o"), &json!("House model")));
    for (path, model, status) in [
        ("/v1/messages", "gpt-4o", 200),
        ("/v1/chat/completions", "gpt-4o", 200),
        ("/v1/messages/count_tokens", "gpt-4o", 200),
        ("/v1/messages", "gpt-4", 404),
        ("/v1/chat/completions", "gpt-4", 404),
        ("/v1/messages/count_tokens", "gpt-4", 404),
    ] {
        let mut body = ask("hello");
        body["model"] = model.into();
        let answer = client.request("POST", path, &headers, body.to_string().as_bytes());
        assert_eq!(answer.status, status, "{path} {model}: {answer:?}");
        if status == 200 && !path.ends_with("count_tokens") {
            // What ran is what the operator has said, and what egress counted is told by that name.
            assert_eq!(answer.json()["model"], "claude-haiku-4-5", "{path}: {answer:?}");
        }
    }
}

#[test]
fn t279_an_address_has_no_more_requests_at_a_time_than_the_operator_allows() {
    let options = Options::default().with("GAOLER_RATES__ADDRESS_MAX", 2);
    let server = Server::start(options.with("GAOLER_SERVER__TRUSTED_PROXY", "true"));
    let client = server.client();
    let at = |address: &str| [bearer(&token("one")), ("x-forwarded-for", address.to_owned())];
    let (loud, other) = (at("192.0.2.1"), at("192.0.2.2"));
    assert_eq!(says(&client, &loud, "hello"), "[embedded] hello");
    std::thread::scope(|scope| {
        let text = "RUN: until test -e go; do sleep 0.1; done; echo it-went-on";
        let waits: Vec<_> = (0..2).map(|_| scope.spawn(|| runs(&client, &loud, text))).collect();
        // Whoever is turned away is told at once; probes are nobody's, and answered.
        until("two under way", || (get(&client, "/v1/models", &loud).status == 429).then_some(()));
        let turned_away = runs(&client, &loud, "hello");
        refused(&turned_away, 429, "address_busy");
        assert_eq!(turned_away.header("retry-after"), Some("1"));
        assert_eq!(
            (get(&client, "/health", &loud).status, get(&client, "/readyz", &loud).status),
            (200, 200)
        );
        // Another address has its own, with the same key too.
        let said = says(&client, &other, "RUN: touch go; echo it-is-there");
        assert!(said.contains("it-is-there"), "{said}");
        for wait in waits {
            let answer = wait.join().expect("an answer");
            assert!(answer.text().contains("it-went-on"), "{answer:?}");
        }
    });
    // An answer that has ended makes room.
    assert_eq!(says(&client, &loud, "hello"), "[embedded] hello");
}

#[test]
fn r11_a_body_that_stops_coming_ends_its_request_on_every_route() {
    let server = Server::start(Options::with_double());
    // Longer than the pace of an upload lets a piece take.
    let client = Client { patience: std::time::Duration::from_secs(90), ..server.client() };
    let (admin, keyed) = (admin(&server), key(&server, "acme"));
    let stored = json!({ "credential": token("acme") }).to_string();
    let stored = client.request("PUT", "/v1/credential", &[bearer(&keyed)], stored.as_bytes());
    assert_eq!(stored.status, 200, "{stored:?}");
    // Every route that the document gives a body.
    let document: Value = serde_json::from_str(include_str!("../docs/openapi.json")).expect("JSON");
    let mut routes = Vec::new();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let session = path.starts_with("/v1/sessions");
        let id = if session { "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b" } else { "default" };
        let path = path.replace("{id}", id).replace("{tenant}", "acme").replace("{path}", "file");
        for (method, route) in methods.as_object().expect("methods") {
            if let Some(content) = route["requestBody"]["content"].as_object() {
                let kind = content.keys().next().expect("a kind of body").clone();
                routes.push((method.to_uppercase(), path.clone(), kind));
            }
        }
    }
    assert!(routes.len() >= 17, "{routes:?}");
    let ask = |(method, path, kind): &(String, String, String)| {
        let key = if path.starts_with("/admin") { &admin } else { &keyed };
        let mut stream = client.connect().expect("a connection");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\
             content-type: {kind}\r\ncontent-length: 1000\r\n\r\n{{"
        );
        stream.write_all(head.as_bytes()).expect("sent");
        let answer = support::client::head(&mut BufReader::new(&stream));
        format!("{method} {path} {}", answer.map_or(0, |answer| answer.status))
    };
    let said: Vec<String> = std::thread::scope(|scope| {
        let asking: Vec<_> = routes.iter().map(|route| scope.spawn(|| ask(route))).collect();
        asking.into_iter().map(|it| it.join().expect("an answer")).collect()
    });
    let other: Vec<_> = said.iter().filter(|it| !it.ends_with(" 408")).collect();
    assert!(other.is_empty(), "{other:#?}");
}
