//! The real CLI through an egress, over the unix socket that a cage would have.
//! It must never be skipped without a word: without GAOLER_TEST_CLI it fails.
#![allow(missing_docs)]

mod common;

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use common::net::{Net, PROXY, With};
use common::{CANARY, Egress, PLACEHOLDER, embedded};
use gaoler_protocol::Scheme;
use serde_json::{Value, json};

/// The CLI refuses to work as root, so that a test that runs as root gives it this uid.
const NOBODY: u32 = 65534;

fn turn(egress: &Egress, prompt: &str) -> Value {
    turn_in(egress, prompt, &[], |mut command| command.spawn())
}

/// One turn with more in its environment, started by somebody.
fn turn_in(
    egress: &Egress,
    prompt: &str,
    more: &[(&str, String)],
    start: impl FnOnce(Command) -> std::io::Result<Child>,
) -> Value {
    let cli = std::env::var_os("GAOLER_TEST_CLI")
        .expect("GAOLER_TEST_CLI must name the Claude Code binary that the test runs (make test sets it)");
    let home = tempfile::tempdir().expect("a folder");
    let open = || PermissionsExt::from_mode(0o777);
    let socket = egress.socket();
    std::fs::set_permissions(home.path(), open()).expect("its mode");
    std::fs::set_permissions(&socket, open()).expect("its mode");
    std::fs::set_permissions(socket.parent().expect("a folder"), open()).expect("its mode");
    let mut command = Command::new(cli);
    command
        .args([
            "-p",
            "--setting-sources",
            "",
            "--strict-mcp-config",
            "--permission-mode",
            "bypassPermissions",
        ])
        .args(["--input-format", "stream-json", "--output-format", "stream-json", "--verbose"])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", home.path())
        .env("CLAUDE_CODE_TMPDIR", home.path())
        .env("ANTHROPIC_BASE_URL", "http://localhost")
        .env("ANTHROPIC_UNIX_SOCKET", &socket)
        .env("CLAUDE_CODE_OAUTH_TOKEN", PLACEHOLDER.token())
        .env("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
        .env("CLAUDE_CODE_DISABLE_ATTACHMENTS", "1")
        .env("CLAUDE_CODE_MAX_RETRIES", "2")
        .env("DISABLE_AUTOUPDATER", "1")
        .envs(more.iter().map(|(name, value)| (*name, value)))
        .current_dir(home.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    if std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0) {
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut child = start(command).expect("the CLI starts");
    let line = json!({"type": "user", "message": {"role": "user", "content": prompt}});
    let mut stdin = child.stdin.take().expect("stdin is piped");
    writeln!(stdin, "{line}").expect("the CLI reads");
    drop(stdin);
    let output = child.wait_with_output().expect("the CLI ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains(CANARY));
    let mut events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events.rfind(|event| event["type"] == "result").unwrap_or_else(|| panic!("no result: {text}"))
}

#[test]
fn the_real_cli_works_without_a_single_denial() {
    let mut egress = Egress::serving(&embedded(), &["--silence-seconds", "2"], Scheme::OAuth, CANARY);
    let check = |prompt: &str, expected: &str| {
        assert_eq!(turn(&egress, prompt)["result"], expected, "{prompt}");
    };
    check("hello there", "[embedded] hello there");
    check("RUN: echo hi", "[embedded] RUN ok:\nhi");
    check("FAIL: 529 once", "[embedded] FAIL: 529 once");
    assert_eq!(turn(&egress, "FAIL: 400")["api_error_status"], 400);
    assert_eq!(turn(&egress, "SILENT:")["is_error"], true);
    let shown = turn(&egress, "HEADERS?")["result"].as_str().unwrap_or_default().to_owned();
    // The upstream saw the real token: its public prefix is all that it tells.
    assert!(shown.contains("authorization: Bearer sk-ant-oat01…"), "{shown}");
    let totals = egress.revoke();
    assert_eq!(totals.denials, 0, "{totals:?}");
    assert!(totals.requests >= 7);
}

#[test]
fn t15_the_real_cli_leaves_the_proxy_to_its_tools() {
    let net = Net::new(&["github.com"]);
    net.put("github.com", "hello", b"hello from the world");
    let mut proxied = net.egress(With { upstream: net.host.run(embedded), ..With::default() });
    let url = format!("http://run:{}@{PROXY}", PLACEHOLDER.token());
    let ca = net.ca_file().to_str().expect("a path").to_owned();
    let mut more: Vec<(&str, String)> =
        ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"].map(|name| (name, url.clone())).to_vec();
    more.extend(["no_proxy", "NO_PROXY"].map(|name| (name, "localhost,127.0.0.1,::1".to_owned())));
    more.push(("CURL_CA_BUNDLE", ca));
    let turn = |prompt: &str| {
        let turn =
            turn_in(&proxied.egress, prompt, &more, |mut command| net.cage.run(move || command.spawn()));
        turn["result"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(turn("hello there"), "[embedded] hello there");
    assert_eq!(turn("RUN: curl -sS https://github.com/hello"), "[embedded] RUN ok:\nhello from the world");
    let totals = proxied.egress.revoke();
    assert_eq!((totals.denials, totals.requests), (0, 3), "{totals:?}");
    let lines = proxied.lines();
    // One as each answer ended, the last of which has all; then where it went.
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert!(lines[2]["model"].as_str().is_some_and(|model| model.starts_with("claude-")), "{lines:?}");
    let counted = [totals.input_tokens, totals.output_tokens].map(serde_json::Value::from);
    assert_eq!([&lines[2]["input_tokens"], &lines[2]["output_tokens"]], [&counted[0], &counted[1]]);
    assert_eq!((&lines[3]["host"], &lines[3]["connections"]), (&"github.com".into(), &1.into()));
}
