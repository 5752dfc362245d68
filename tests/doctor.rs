//! `gaoler doctor` on the machine that runs the tests: every layer tried once, nothing left behind.
//! It must never be skipped silently: without root, or without the supervisor beside gaoler, it fails and says so.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use gaoler_protocol::LayerName;

#[test]
fn every_layer_is_tried_once_and_leaves_nothing_behind() {
    assert!(nix::unistd::geteuid().is_root(), "this suite needs root");
    let state = tempfile::tempdir().expect("a folder");
    let before = groups();
    let output = doctor(&state.path().join("state"), None);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code().is_some_and(|code| code < 2), "{said}");
    let host = serde_json::from_slice::<serde_json::Value>(&output.stdout);
    let host = host.unwrap_or_else(|error| panic!("{error}: {said}"));
    let rows = host["layers"].as_array().expect("rows");
    let names: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    let expected: Vec<&str> = LayerName::ALL.iter().map(|name| name.name()).collect();
    assert_eq!(names, expected);
    for row in rows {
        let holds = row["state"] == "enforced";
        assert_eq!(holds, row["fix"].is_null(), "what does not hold says what would mend it: {row}");
        println!("{:<24}{}", row["name"].as_str().unwrap_or_default(), row["state"]);
    }
    let left: Vec<_> = std::fs::read_dir(state.path().join("state"))
        .expect("a list")
        .flatten()
        .map(|e| e.file_name())
        .collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("probe")), "{left:?}");
    let own = groups().into_iter().filter(|group| !before.contains(group)).collect::<Vec<_>>();
    assert!(own.is_empty(), "{own:?}");
}

#[test]
fn an_ordinary_user_is_told_the_truth_and_what_to_do() {
    assert!(nix::unistd::geteuid().is_root(), "this suite needs root");
    let state = tempfile::tempdir().expect("a folder");
    let output = doctor(&state.path().join("state"), Some(65_534));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code().is_some_and(|code| code < 2), "{said}");
    let host = serde_json::from_slice::<serde_json::Value>(&output.stdout);
    let host = host.unwrap_or_else(|error| panic!("{error}: {said}"));
    assert_ne!(host["tier"], "kernel");
    let rows = host["layers"].as_array().expect("rows");
    assert_eq!(rows.len(), LayerName::ALL.len());
    for row in rows {
        println!("{:<24}{:<10}{}", row["name"].as_str().unwrap_or_default(), row["state"], row["errno"]);
    }
    let uid = rows.iter().find(|row| row["name"] == "uid").expect("the row");
    assert_eq!((&uid["state"], &uid["errno"]), (&"absent".into(), &"EINVAL".into()));
    assert!(uid["fix"].as_str().is_some_and(|fix| fix.contains("root")), "{uid}");
    let left = std::fs::read_dir(std::env::temp_dir()).expect("a list").flatten();
    let left: Vec<_> = left.filter(|e| e.file_name().to_string_lossy().contains("gaoler-doctor")).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn doctor(state: &Path, uid: Option<u32>) -> Output {
    let gaoler = Path::new(env!("CARGO_BIN_EXE_gaoler"));
    let supervisor = gaoler.with_file_name("gaoler-supervisor");
    assert!(
        supervisor.exists(),
        "run `cargo build --workspace` first: {} is not there",
        supervisor.display()
    );
    let mut command = Command::new(gaoler);
    command.args(["doctor", "--json"]).env("GAOLER_STATE__DIR", state);
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    command.output().expect("gaoler starts")
}

/// Groups of gaoler's, directly below each hierarchy.
fn groups() -> Vec<String> {
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let inside =
        hierarchies.flat_map(|folder| std::fs::read_dir(folder.path()).into_iter().flatten().flatten());
    inside.map(|entry| entry.path().display().to_string()).filter(|path| path.contains("/gaoler-")).collect()
}
