//! `gaoler exec` as scripts rely on it: statuses, stdio, reports, signals. Needs root.
//! It must never judge by a time: deadlines here only end what hangs.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// `gaoler exec` on a state of its own below this folder.
fn exec(state: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gaoler"));
    command.args(["exec", "--state"]).arg(state.join("state")).args(words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(words: &[&str]) -> Output {
    let state = tempfile::tempdir().expect("a folder");
    exec(state.path(), words).output().expect("gaoler")
}

fn status(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("ended by a signal: {output:?}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn every_end_of_a_command_has_its_status() {
    let rows: &[(&[&str], i32, &str)] = &[
        (&["--", "true"], 0, ""),
        (&["--minimum", "kernel", "--level", "balanced", "--", "sh", "-c", "exit 7"], 7, ""),
        (&["--", "sh", "-c", "exit 255"], 255, ""),
        (&["--", "sh", "-c", "kill -TERM $$"], 143, ""),
        (&["--", "sh", "-c", "kill -KILL $$"], 137, ""),
        (&["--timeout", "1", "--", "sleep", "600"], 124, ""),
        (
            &["--", "/etc/passwd"],
            126,
            "gaoler: the command cannot be executed in the cage: Permission denied\n",
        ),
        (
            &["--", "no-such"],
            127,
            "gaoler: the command cannot be executed in the cage: No such file or directory\n",
        ),
        (
            &["--report", "/nowhere/r", "--", "true"],
            125,
            "gaoler: --report /nowhere/r: No such file or directory",
        ),
        (
            &["--minimum", "strong", "--", "true"],
            125,
            "gaoler: --minimum: `strong` is not a tier; the tiers are kernel, namespaces, uid, directory",
        ),
        (&["true"], 125, "error: unexpected argument 'true' found"),
    ];
    for (words, expected, complaint) in rows {
        let output = run(words);
        assert_eq!(status(&output), *expected, "{words:?}: {output:?}");
        assert!(text(&output.stderr).starts_with(complaint), "{words:?}: {output:?}");
    }
}

#[test]
fn bytes_are_relayed_both_ways_to_the_last() {
    let state = tempfile::tempdir().expect("a folder");
    let mut child = exec(state.path(), &["--", "sh", "-c", "cat; echo end >&2"]);
    let mut child = child.stdin(Stdio::piped()).spawn().expect("gaoler");
    // More than any pipe holds, so that both directions must flow at the same time.
    let sent: Vec<u8> = (0..4_000_000u32).map(|n| n.to_le_bytes()[(n % 3) as usize]).collect();
    let mut stdin = child.stdin.take().expect("a pipe");
    let copy = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&copy));
    let output = child.wait_with_output().expect("an end");
    writer.join().expect("no panic").expect("all written");
    assert_eq!(status(&output), 0);
    assert!(output.stdout == sent, "{} bytes came back", output.stdout.len());
    assert_eq!(text(&output.stderr), "end\n");
}

#[test]
fn a_reader_who_goes_away_ends_the_command() {
    let state = tempfile::tempdir().expect("a folder");
    let mut child = exec(state.path(), &["--", "yes"]).spawn().expect("gaoler");
    let mut stdout = child.stdout.take().expect("a pipe");
    stdout.read_exact(&mut [0; 2]).expect("a line");
    drop(stdout);
    // yes finds nobody to write to, as it would in a pipeline of a shell.
    let ended = child.wait().expect("an end").code();
    assert!(matches!(ended, Some(1 | 141)), "{ended:?}");
}

#[test]
fn a_signal_to_gaoler_ends_the_whole_cage() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let state = tempfile::tempdir().expect("a folder");
        let report = state.path().join("report.json");
        let words =
            ["--report", report.to_str().expect("text"), "--", "sh", "-c", "sleep 600 & echo up; wait"];
        let mut child = exec(state.path(), &words).spawn().expect("gaoler");
        wait_for_up(&mut child);
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("sent");
        let output = child.wait_with_output().expect("an end");
        assert_eq!(status(&output), 128 + signal as i32);
        assert_eq!(read(&report)["exit"]["reason"], "cancelled");
    }
}

#[test]
fn a_killed_gaoler_takes_its_cage_along() {
    let state = tempfile::tempdir().expect("a folder");
    let mut child = exec(state.path(), &["--", "sh", "-c", "echo up; sleep 600"]).spawn().expect("gaoler");
    let mut stdout = wait_for_up(&mut child);
    child.kill().expect("killed");
    child.wait().expect("an end");
    // The pipe's other end is in the cage: its end of stream says that nothing there lives any more.
    assert_eq!(stdout.read(&mut [0; 1]).expect("the end"), 0);
}

#[test]
fn a_tenant_finds_its_files_again_and_nobody_elses() {
    let state = tempfile::tempdir().expect("a folder");
    let ran = |words: &[&str]| text(&exec(state.path(), words).output().expect("gaoler").stdout);
    assert_eq!(ran(&["--tenant", "a", "--", "sh", "-c", "echo canary > kept; ls"]), "kept\n");
    assert_eq!(ran(&["--tenant", "a", "--", "cat", "kept"]), "canary\n");
    assert_eq!(ran(&["--tenant", "b", "--", "ls", "-A"]), "");
    assert_eq!(ran(&["--", "ls", "-A"]), "");
}

#[test]
fn the_report_says_what_kept_it_apart_and_what_it_took() {
    let state = tempfile::tempdir().expect("a folder");
    let path = state.path().join("report.json");
    let words = ["--report", path.to_str().expect("text"), "--timeout", "77", "--", "sh", "-c", "exit 3"];
    assert_eq!(status(&exec(state.path(), &words).output().expect("gaoler")), 3);
    let report = read(&path);
    assert_eq!(report["tier"], "kernel");
    assert_eq!(report["status"], 3);
    assert_eq!(report["exit"]["reason"], "exited");
    assert_eq!(report["exit"]["code"], 3);
    assert_eq!(report["limits"]["wall_ms"], 77_000);
    assert_eq!(report["violations"], Value::Array(Vec::new()));
    assert!(report["rusage"]["maxrss_kib"].as_u64() > Some(0), "{report}");
    assert!(report["layers"].as_array().is_some_and(|layers| !layers.is_empty()), "{report}");
    let never = state.path().join("never.json");
    let words = ["--report", never.to_str().expect("text"), "--", "no-such"];
    assert_eq!(status(&exec(state.path(), &words).output().expect("gaoler")), 127);
    assert_eq!(read(&never)["refused"]["reason"], "exec_failed");
}

#[test]
fn runs_beside_each_other_do_not_disturb() {
    let state = tempfile::tempdir().expect("a folder");
    let started: Vec<Child> = (0..4)
        .map(|n| {
            exec(state.path(), &["--", "sh", "-c", &format!("id -u; echo {n}")]).spawn().expect("gaoler")
        })
        .collect();
    for (n, child) in started.into_iter().enumerate() {
        let output = child.wait_with_output().expect("an end");
        assert_eq!(text(&output.stdout), format!("1000\n{n}\n"), "{output:?}");
    }
}

fn wait_for_up(child: &mut Child) -> std::process::ChildStdout {
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut line = [0; 3];
    stdout.read_exact(&mut line).expect("a line");
    assert_eq!(&line, b"up\n");
    stdout
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a report")).expect("JSON")
}
