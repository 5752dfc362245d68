//! The outside half of the escape suite: runs the probe where nothing confines it and in a cage, and compares
//! both with a table. An attempt that works nowhere proves nothing, so the control comes first.

#![allow(dead_code, reason = "each suite uses its own part of this")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One attempt: what it is, what the kernel says outside, what it says in a cage. `{W}` is a folder that the
/// attempt may write, here and there. An expectation is the first word of an outcome; outside, `*` is
/// anything but what the cage must say, and `-` is not tried because it would harm this machine.
pub type Row<'a> = (&'a str, &'a str, &'a str);

/// One of the tree's programs, or where a suite runs elsewhere, of the kit's.
fn program(name: &str) -> PathBuf {
    match std::env::var_os("GAOLER_TEST_KIT") {
        Some(kit) => Path::new(&kit).join(name),
        None => Path::new(env!("CARGO_BIN_EXE_gaoler")).with_file_name(name),
    }
}

/// The probe's program, beside gaoler's.
pub fn probe() -> PathBuf {
    let path = program("gaoler-probe");
    assert!(path.exists(), "{} is missing: cargo build --workspace --bins", path.display());
    path
}

/// `gaoler exec` on this state, with nothing of the suite's environment.
pub fn exec(state: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(program("gaoler"));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.args(["exec", "--state"]).arg(state).args(words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The attempts in one cage, with these flags of `gaoler exec`; what each said.
pub fn inside(state: &Path, flags: &[&str], attempts: &[&str]) -> Vec<String> {
    let mut command = caged(state, flags, attempts);
    let output = command.output().expect("gaoler");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    outcomes(&text, attempts, &format!("{output:?}"))
}

/// The command that runs the probe in a cage: it comes through stdin, since a cage sees no file of ours.
pub fn caged(state: &Path, flags: &[&str], attempts: &[&str]) -> Command {
    let load = "cat > /tmp/probe && chmod 700 /tmp/probe && exec /tmp/probe \"$@\" < /dev/null";
    let words = [flags, &["--", "sh", "-c", load, "probe"], attempts].concat();
    let mut command = exec(state, &words);
    command.stdin(File::open(probe()).expect("the probe"));
    command
}

/// The attempts here, as root and confined by nothing; what each said.
pub fn outside(attempts: &[&str]) -> Vec<String> {
    let output = Command::new(probe()).args(attempts).stdin(Stdio::null()).output().expect("the probe");
    outcomes(&String::from_utf8_lossy(&output.stdout), attempts, &format!("{output:?}"))
}

/// Tries every row on both sides and fails with all that differ.
pub fn check(rows: &[Row<'_>]) {
    let state = tempfile::tempdir().expect("a folder");
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(state.path(), private).expect("a mode");
    check_on(state.path(), &[], rows);
}

/// The same on this state, with these flags. What the cage said.
pub fn check_on(state: &Path, flags: &[&str], rows: &[Row<'_>]) -> Vec<String> {
    let here = tempfile::tempdir().expect("a folder");
    let here = here.path().to_str().expect("text");
    let words: Vec<String> = rows.iter().map(|row| row.0.replace("{W}", here)).collect();
    let tried: Vec<&str> =
        words.iter().zip(rows).filter(|(_, row)| row.1 != "-").map(|(word, _)| word.as_str()).collect();
    let mut control = outside(&tried).into_iter();
    let words: Vec<String> = rows.iter().map(|row| row.0.replace("{W}", "/workspace")).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let caged = inside(state, flags, &words);
    let mut wrong = Vec::new();
    for ((attempt, free, confined), said) in rows.iter().zip(&caged) {
        let first = first(said);
        if first != *confined {
            wrong.push(format!("{attempt}: in the cage {said}, not {confined}"));
        }
        if *free == "-" {
            continue;
        }
        let control = control.next().expect("one outcome an attempt");
        let proves = match *free {
            "*" => self::first(&control) != *confined,
            exact => self::first(&control) == exact,
        };
        if !proves {
            wrong.push(format!("{attempt}: outside {control}, not {free}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    caged
}

/// What an expectation is compared with: the outcome without its detail.
pub fn first(outcome: &str) -> &str {
    match outcome.strip_prefix("ok ") {
        Some(_) => "ok",
        None => outcome,
    }
}

fn outcomes(text: &str, attempts: &[&str], whole: &str) -> Vec<String> {
    let lines: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once('\t')).collect();
    let names: Vec<&str> = lines.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, attempts, "{whole}");
    lines.into_iter().map(|(_, outcome)| outcome.to_owned()).collect()
}

/// A file whose content says whether somebody has written it; removed at the end.
pub struct Canary(pub PathBuf);

impl Canary {
    /// A file that everybody may read and write, in a folder that everybody may enter.
    pub fn at(path: PathBuf) -> Canary {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(&path, text(&path)).expect("a canary");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).expect("a mode");
        Canary(path)
    }

    /// Its path.
    pub fn path(&self) -> &str {
        self.0.to_str().expect("text")
    }

    /// Makes it whole again after a control that was meant to hurt it.
    pub fn heal(&self) {
        std::fs::write(&self.0, text(&self.0)).expect("a canary");
    }

    /// Whether it is as it was.
    pub fn is_unhurt(&self) -> bool {
        std::fs::read_to_string(&self.0).is_ok_and(|found| found == text(&self.0))
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn text(path: &Path) -> String {
    format!("canary of {}\n", path.display())
}
