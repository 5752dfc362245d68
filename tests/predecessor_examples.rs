//! The examples of the server that gaoler replaces, each as its users wrote it, against the real agent.
//! Needs root and the CLI. An example may be changed in nothing but its token and its address.

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::{Options, Server, bearer, token, tree};

fn server() -> Server {
    Server::start(Options::default())
}

/// The example's body, as `curl -d` sends it.
fn sends(server: &Server, headers: &[(&str, String)], body: &str) -> support::Response {
    let mut all = vec![("content-type", "application/json".to_owned())];
    all.extend(headers.iter().cloned());
    server.client().post(&all, body.as_bytes())
}

/// What its users read.
fn text(response: &support::Response) -> String {
    assert_eq!(response.status, 200, "{response:?}");
    response.json()["content"][0]["text"].as_str().expect("response[\"content\"][0][\"text\"]").to_owned()
}

#[test]
fn t190_form_a_the_token_in_a_header() {
    let server = server();
    let body = r#"{"messages":[{"role":"user","content":"Hello"}],"session_id":null,"model":"sonnet"}"#;
    assert_eq!(text(&sends(&server, &[bearer("a")], body)), "[embedded] Hello");
    let refused = sends(&server, &[("authorization", "Bearer not-a-token".into())], body);
    assert_eq!(refused.status, 401, "{refused:?}");
    assert_eq!(refused.json()["error"]["details"]["error_code"], "invalid_token_format");
}

#[test]
fn t191_form_b_the_credentials_in_the_body() {
    let server = server();
    let body = |expires_at: u64| {
        json!({"oauth_credentials": {"access_token": token("a"), "refresh_token": "sk-ant-ort01-never-read-0000",
                "expires_at": expires_at, "scopes": ["user:inference", "user:profile"], "subscription_type": "max"},
            "messages": [{"role": "user", "content": "Hello!"}], "model": "sonnet", "stream": false})
        .to_string()
    };
    assert_eq!(text(&sends(&server, &[], &body(4_000_000_000_000))), "[embedded] Hello!");
    let refused = sends(&server, &[], &body(1_762_444_195_608));
    assert_eq!(refused.status, 401, "{refused:?}");
    assert_eq!(refused.json()["error"]["details"]["error_code"], "credential_expired");
    // The refresh token is nowhere, not even where a file could keep it.
    assert!(!server.log().contains("never-read"));
}

#[test]
fn t192_a_stateless_request_holds_the_whole_history() {
    let server = server();
    let body = json!({"model": "haiku", "messages": [
        {"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"},
        {"role": "user", "content": "HISTORY?"}]});
    let said = text(&sends(&server, &[bearer("a")], &body.to_string()));
    let places: Vec<usize> = ["Q1", "A1", "Q2", "A2"].map(|turn| said.find(turn).expect(turn)).to_vec();
    assert!(places.is_sorted(), "{said}");
    // Without a session nothing is kept.
    let body = json!({"model": "haiku", "messages": [{"role": "user", "content": "HISTORY?"}]});
    assert!(!text(&sends(&server, &[bearer("a")], &body.to_string())).contains("Q1"));
}

#[test]
fn t193_a_session_gets_the_new_message_alone() {
    let server = server();
    let ask = |content: &str| {
        let body = json!({"model": "sonnet", "session_id": "3f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6d",
            "messages": [{"role": "user", "content": content}]});
        text(&sends(&server, &[bearer("a")], &body.to_string()))
    };
    ask("my bird is a bittern");
    assert!(ask("HISTORY?").contains("bittern"));
}

#[test]
fn t194_local_mcp_servers_as_their_users_wrote_them() {
    let packages = std::env::var_os("GAOLER_TEST_MCP")
        .expect("GAOLER_TEST_MCP must name the folder of scripts/fetch-mcp");
    let packages = std::fs::canonicalize(tree().join(packages)).expect("the folder").join("node_modules");
    let folder = tempfile::tempdir().expect("a folder");
    let level = folder.path().join("level.toml");
    let shown =
        format!("[[visible]]\npath = '{}'\naccess = 'execute'\nwhy = 'MCP servers'\n", packages.display());
    std::fs::write(&level, format!("extends = 'balanced'\n{shown}")).expect("written");
    let server = Server::start(Options::default().with("GAOLER_LEVEL__FILE", level.display()));
    // npx finds what the workspace has, and asks no registry.
    let wanted = r#"{"dependencies":{"@modelcontextprotocol/server-filesystem":"*","@modelcontextprotocol/server-memory":"*"}}"#;
    let made = format!(
        "RUN: echo '{wanted}' > package.json && ln -s {} node_modules && echo linked",
        packages.display()
    );
    let said = server.says("a", &made);
    assert!(said.contains("linked"), "{said}");
    let servers: Value = serde_json::from_str(
        r#"{"memory":{"command":"npx","args":["-y","@modelcontextprotocol/server-memory"]},
            "fs":{"command":"npx","args":["-y","@modelcontextprotocol/server-filesystem","/workspace"],"env":{"DEBUG":"true"}}}"#,
    )
    .expect("JSON");
    let body = json!({"messages": [{"role": "user", "content":
            "CALLS: mcp__memory__read_graph {} ;; mcp__fs__list_directory {\"path\":\"/workspace\"}"}],
        "model": "sonnet", "mcp_servers": servers, "skip_mcp_permissions": true});
    let response = sends(&server, &[bearer("a")], &body.to_string());
    let said = text(&response);
    assert!(said.contains("CALLS 1 ok") && said.contains("CALLS 2 ok"), "{response:?}");
}

#[test]
fn t195_a_remote_mcp_server_as_its_users_wrote_it() {
    let server = server();
    let secret = "eyJhbGciOiJIUzI1NiJ9.an-example";
    let body = json!({"messages": [{"role": "user", "content": "Hello"}], "model": "sonnet", "mcp_servers": {"custom":
        {"url": "https://mcp.example.com/sse", "transport": "sse", "auth_type": "jwt", "auth_token": secret}}});
    let response = sends(&server, &[bearer("a")], &body.to_string());
    // Nobody is there: the run goes on, and its answer says so.
    assert_eq!(text(&response), "[embedded] Hello");
    assert_eq!(response.json()["mcp_servers"][0]["name"], "custom");
    assert_ne!(response.json()["mcp_servers"][0]["status"], "connected");
    assert!(!server.log().contains(secret));
}

#[test]
fn t196_the_other_endpoints() {
    let server = server();
    let get = |path: &str, accept: &str| {
        let response = server.client().request("GET", path, &[("accept", accept.to_owned())], b"");
        assert_eq!(response.status, 200, "{path}: {response:?}");
        response
    };
    let health = get("/health", "application/json").json();
    assert_eq!(
        (health["status"].as_str(), health["security_level"].as_str()),
        (Some("healthy"), Some("BALANCED"))
    );
    assert!(health["version"].is_string());
    let root = get("/", "application/json").json();
    for part in ["endpoints", "security"] {
        assert!(!root[part].is_null(), "{part}: {root:#}");
    }
    assert!(root.to_string().contains("curl"));
    let security = get("/v1/security", "application/json").json();
    assert!(security["guarantees"].is_array() && security["layers"].is_array());
    assert!(String::from_utf8_lossy(&get("/docs", "text/html").body).contains("swagger"));
}

#[test]
fn t197_levels_do_what_their_table_said() {
    let server = Server::start(Options::default().with("GAOLER_LEVEL__MAXIMUM", "developer"));
    let said = |level: &str, command: &str| {
        let body = json!({"messages": [{"role": "user", "content": format!("RUN: {command}; echo it-ran")}],
            "security_level": level});
        let said = text(&sends(&server, &[bearer("a")], &body.to_string()));
        assert!(said.contains("it-ran"), "{level}: {command}: {said}");
        said
    };
    for level in ["PARANOID", "BALANCED", "DEVELOPER"] {
        // Nobody else's process is there to be seen; whether its own are is the level's.
        let seen = said(level, "ps aux 2>&1");
        let others = ["gaoler-egress", "gaoler frontend", "gaoler-upstream", "systemd"];
        assert!(!others.iter().any(|other| seen.contains(other)), "{level}: {seen}");
        assert_eq!(seen.contains("ps aux"), level != "PARANOID", "{level}: {seen}");
        // /tmp is there at every level, and is the run's own: it was another tenant's that was to be blocked.
        assert!(!said(level, "ls -A /tmp").contains("gaoler"), "{level}");
        // Processes of other tenants are in nobody's /proc.
        let pids = said(level, "ls /proc | grep -c '^[0-9]'");
        let count =
            pids.split_whitespace().filter_map(|word| word.parse::<u32>().ok()).max().expect("a count");
        assert!(count < 20, "{level}: {pids}");
        assert!(
            said(level, "ls /workspaces /var/lib/gaoler 2>&1 || true").contains("No such file"),
            "{level}"
        );
        assert!(said(level, "sudo -n id 2>&1 || echo not-root").contains("not-root"), "{level}");
        assert!(
            said(level, "rm -rf /usr/bin/env 2>&1; /usr/bin/env echo still-there").contains("still-there")
        );
    }
}

#[test]
fn t198_the_python_client_object() {
    let server = server();
    let script = format!(
        "from secure_multi_tenant_api import *\n\
         api = SecureMultiTenantAPI('http://{}', security_level=SecurityLevel.BALANCED)\n\
         answer = api.create_message(oauth_token='{}', messages=[{{'role': 'user', 'content': 'RUN: pwd'}}],\n\
         \x20   session_id='5f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6e', model='sonnet', mcp_servers={{}})\n\
         print(answer['content'][0]['text'].split()[-1], api.get_workspace_path('{}'))\n\
         try:\n    api.create_message(oauth_token='nonsense', messages=[])\n\
         except APIError as error:\n    print(error.status, error.code)\n",
        server.address,
        token("a"),
        token("a"),
    );
    let done = Command::new("python3")
        .args(["-c", &script])
        .env("PYTHONPATH", tree().join("clients/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("python3");
    let said = String::from_utf8_lossy(&done.stdout);
    assert_eq!(
        said,
        "/workspace /workspace\n401 invalid_token_format\n",
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
}
