//! The embedded model serves the real CLI, whose binary the environment variable GAOLER_TEST_CLI names.
//! It must never be skipped without a word: without the variable it fails.
#![allow(missing_docs)]

mod common;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use common::Upstream;
use serde_json::{Value, json};

/// The CLI refuses to work as root, so that a test that runs as root gives it this uid.
const NOBODY: u32 = 65534;

/// The result event of one turn of the CLI.
fn turn(upstream: &Upstream, prompt: &str) -> Value {
    let cli = std::env::var_os("GAOLER_TEST_CLI")
        .expect("GAOLER_TEST_CLI must name the Claude Code binary that the test runs (make test sets it)");
    let home = tempfile::tempdir().expect("a folder");
    std::fs::set_permissions(home.path(), PermissionsExt::from_mode(0o777)).expect("its mode");
    std::fs::write(home.path().join("a.txt"), "canary\n").expect("a file");
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
        .env("ANTHROPIC_BASE_URL", format!("http://{}", upstream.address))
        .env("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-dummy")
        .env("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
        .env("CLAUDE_CODE_DISABLE_ATTACHMENTS", "1")
        .env("CLAUDE_CODE_MAX_RETRIES", "1")
        .env("DISABLE_AUTOUPDATER", "1")
        .current_dir(home.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let is_root =
        std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0);
    if is_root {
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut child = command.spawn().expect("the CLI starts");
    let line = json!({"type": "user", "message": {"role": "user", "content": prompt}});
    let mut stdin = child.stdin.take().expect("stdin is piped");
    writeln!(stdin, "{line}").expect("the CLI reads");
    drop(stdin);
    let output = child.wait_with_output().expect("the CLI ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events.rfind(|event| event["type"] == "result").unwrap_or_else(|| panic!("no result: {text}"))
}

#[test]
fn the_real_cli_runs_its_tools_and_sees_failures() {
    let upstream = Upstream::start();
    let check = |prompt: &str, expected: &str| {
        assert_eq!(turn(&upstream, prompt)["result"], expected, "{prompt}");
    };
    check("hello there", "[embedded] hello there");
    check("RUN: cat a.txt", "[embedded] RUN ok:\ncanary");
    check("READ: a.txt", "[embedded] READ ok:\n1\tcanary\n2\t");
    check("TOOLS: sleep 0.2; echo 1 ;; echo 2", "[embedded] TOOLS 1 ok:\n1\nTOOLS 2 ok:\n2");
    check("STEPS: echo 1 ;; false", "[embedded] STEPS 1 ok:\n1\nSTEPS 2 error:\nExit code 1");
    check("THINK: a thought", "[embedded] a thought");
    check("FAIL: 529 once", "[embedded] FAIL: 529 once");
    let failed = turn(&upstream, "FAIL: 400");
    assert_eq!((&failed["is_error"], &failed["api_error_status"]), (&json!(true), &json!(400)));
    assert_eq!(turn(&upstream, "CUT: some text that is cut off")["is_error"], true);
}
