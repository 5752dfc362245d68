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

/// A run with a report, on a state of its own.
fn reported(words: &[&str], stdin: Stdio) -> (i32, Value) {
    let state = tempfile::tempdir().expect("a folder");
    let report = state.path().join("report.json");
    let words = [&["--report", report.to_str().expect("text")], words].concat();
    let output = exec(state.path(), &words).stdin(stdin).output().expect("gaoler");
    (status(&output), read(&report))
}

#[test]
fn t01_a_limit_that_is_hit_ends_the_run_and_is_named() {
    // How the run ends, its status, and the words of its report.
    let rows: &[(&[&str], i32, &str, &[&str])] = &[
        (&["--", "true"], 0, "exited", &[]),
        (&["--limit", "wall_ms=300", "--", "sleep", "600"], 124, "wall", &["wall"]),
        (&["--limit", "idle_ms=300", "--", "sh", "-c", "echo once; sleep 600"], 124, "idle", &["idle"]),
        (&["--limit", "output_mib=1", "--", "yes"], 137, "output", &["output"]),
        (&["--limit", "output_mib=1", "--", "sh", "-c", "yes >&2"], 137, "output", &["output"]),
        // Each second of output is one: a run that writes is not idle.
        (
            &["--limit", "idle_ms=700", "--", "sh", "-c", "for i in 1 2 3 4; do sleep 0.4; echo; done"],
            0,
            "exited",
            &[],
        ),
    ];
    for (words, expected, reason, hit) in rows {
        let (status, report) = reported(words, Stdio::null());
        assert_eq!(status, *expected, "{words:?}: {report}");
        assert_eq!(report["exit"]["reason"], *reason, "{words:?}");
        assert_eq!(report["hit"], Value::from(*hit), "{words:?}");
    }
}

#[test]
fn t02_a_reader_who_is_slow_does_not_make_its_run_an_idle_one() {
    let state = tempfile::tempdir().expect("a folder");
    let words = ["--limit", "idle_ms=300", "--", "sh", "-c", "head -c 4000000 /dev/zero; echo end >&2"];
    let mut child = exec(state.path(), &words).spawn().expect("gaoler");
    let (mut stdout, mut stderr) =
        (child.stdout.take().expect("a pipe"), child.stderr.take().expect("a pipe"));
    // Until stdout's pipes are full, and then for longer than the run may be idle: nothing else tells the time.
    stdout.read_exact(&mut [0; 1]).expect("a byte");
    let waited = Command::new("sleep").arg("1.2").status().expect("sleep");
    assert!(waited.success());
    let mut bytes = Vec::new();
    stdout.read_to_end(&mut bytes).expect("the rest");
    let mut said = String::new();
    stderr.read_to_string(&mut said).expect("the rest");
    assert_eq!(
        (child.wait().expect("an end").code(), bytes.len(), said.as_str()),
        (Some(0), 3_999_999, "end\n")
    );
}

#[test]
fn t03_a_level_is_what_its_table_says() {
    let at = |level: &str, script: &str| -> String {
        let output = run(&["--level", level, "--", "sh", "-c", script]);
        text(&output.stdout)
    };
    // Folders of /proc that are processes: the run's own, without pid 1, or all of its cage.
    let processes = "cd /proc; ls -d [0-9]* | wc -l";
    let (first, counters) =
        ("test -d /proc/1 && echo seen", "cat /proc/uptime /proc/meminfo /proc/stat | wc -l");
    for (level, sees_first, sees_counters, ps) in
        [("paranoid", "", false, "failed\n"), ("balanced", "", true, ""), ("developer", "seen\n", true, "")]
    {
        assert_eq!(at(level, first), sees_first, "{level}");
        assert_eq!(at(level, counters) != "0\n", sees_counters, "{level}");
        assert_eq!(at(level, "ps aux > /dev/null || echo failed"), ps, "{level}");
        // A neighbour's processes and the host's are in none: only those of this shell and its pipe.
        let seen: u32 = at(level, processes).trim().parse().expect("a number");
        assert!((2..=5).contains(&seen), "{level}: {seen}");
        let limits = ["--level", level, "--limit", "memory_mib=4294967295,tasks=20", "--", "true"];
        let (status, report) = reported(&limits, Stdio::null());
        assert_eq!((status, &report["level"]), (0, &level.into()));
        let memory = [("paranoid", 768), ("balanced", 1024), ("developer", 4096)];
        let memory = memory.iter().find(|(name, _)| *name == level).expect("a row").1;
        assert_eq!(
            (&report["limits"]["memory_mib"], &report["limits"]["tasks"]),
            (&memory.into(), &20.into())
        );
    }
    // What the levels see of the host: developer has the names of ports, paranoid not even the time zone.
    let places =
        "cat /etc/localtime > /dev/null 2>&1 && echo time; cat /etc/services > /dev/null 2>&1 && echo ports";
    let here = |path: &str, word| if Path::new(path).exists() { word } else { "" };
    assert_eq!(at("paranoid", places), "");
    assert_eq!(at("balanced", places), here("/etc/localtime", "time\n"));
    let both = [here("/etc/localtime", "time\n"), here("/etc/services", "ports\n")].concat();
    assert_eq!(at("developer", places), both);
    assert!(!both.is_empty(), "this host has neither, and so shows nothing");
}

#[test]
fn t04_a_file_of_the_operators_changes_its_level() {
    let state = tempfile::tempdir().expect("a folder");
    // Not below /tmp, which in a cage is the run's own.
    let shown =
        tempfile::Builder::new().prefix("gaoler-shown-").tempdir_in("/srv").expect("a folder in /srv");
    std::fs::set_permissions(shown.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("chmod");
    std::fs::write(shown.path().join("tool"), "#!/bin/sh\necho tool $GREETING\n").expect("a file");
    let tool = shown.path().join("tool");
    std::fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    let place = shown.path().display().to_string();
    let file = state.path().join("level.toml");
    let text_of = format!(
        "extends = 'balanced'\n[limits]\nmemory_mib = 1500\n[[env]]\nname = 'GREETING'\nvalue = 'hello'\nwhy = 'a test'\n\
         [[visible]]\npath = '{place}'\naccess = 'execute'\nwhy = 'a test'\n"
    );
    std::fs::write(&file, text_of).expect("a file");
    let ran = |level: &str, script: &str| {
        let mut command = exec(state.path(), &["--level", level, "--", "sh", "-c", script]);
        let output = command.env("GAOLER_LEVEL__FILE", &file).output().expect("gaoler");
        (status(&output), text(&output.stdout))
    };
    let tool = tool.display().to_string();
    assert_eq!(ran("balanced", &tool), (0, "tool hello\n".into()));
    // Read-only, and of no other level.
    assert_eq!(ran("balanced", &format!("echo x > {place}/new")).0, 2);
    assert_eq!(ran("developer", &tool).0, 126);
    assert_eq!(ran("developer", "echo $GREETING"), (0, "\n".into()));
    assert_eq!(ran("paranoid", &tool).0, 127);
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
