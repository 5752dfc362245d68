//! A workspace out of a git repository, fetched by the host's own git through the cage's proxy.
//! It must never run what a repository brings: no hook, no filter of its own, no submodule, no other protocol.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use gaoler_files::Code;
use serde_json::Value;

use crate::beneath::Folder;
use crate::failure::{Doing, Failed, failed};
use crate::note::Note;
use crate::workspaces::{self, Draft};

/// Bytes of what git says that are repeated.
const SAID_BYTES_MAX: usize = 500;
/// What holds for every git that is run here.
const SETTINGS: [&str; 14] = [
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.symlinks=true",
    "credential.helper=",
    "fetch.recurseSubmodules=false",
    "http.followRedirects=initial",
    "init.templateDir=",
    "protocol.allow=never",
    "protocol.https.allow=always",
    "protocol.ext.allow=never",
    "protocol.file.allow=never",
    "submodule.recurse=false",
    "transfer.fsckObjects=true",
    "gc.auto=0",
];

/// An address that git may be given: https, a host, and nothing that could be an option, a login or a line.
fn is_address(url: &str) -> bool {
    let Some(rest) = url.strip_prefix("https://") else { return false };
    let host = rest.split('/').next().unwrap_or_default();
    let plain = |b: u8| b.is_ascii_graphic() && !b"\"'\\`<>{}|^".contains(&b);
    let named = |b: u8| b.is_ascii_alphanumeric() || b".-:".contains(&b);
    url.len() <= 2000 && url.bytes().all(plain) && !host.is_empty() && host.bytes().all(named)
}

/// A branch, a tag, or a commit's whole id.
fn is_reference(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._/-+".contains(&b);
    (1..=200).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with('-')
        && !name.contains("..")
}

/// Clones it.
pub fn clone(
    top: &Folder,
    id: &str,
    title: Option<String>,
    url: &str,
    reference: Option<&str>,
    depth: u32,
) -> Result<Value, Failed> {
    if !is_address(url) {
        let message = "git.url: must be https://HOST/PATH, without a user or a password in it.";
        return Err(failed(Code::Clone, message));
    }
    if reference.is_some_and(|it| !is_reference(it)) {
        return Err(failed(Code::Clone, "git.ref: must be the name of a branch or a tag, or a commit's id."));
    }
    workspaces::may_make(top, id)?;
    let draft = Draft::new(top)?;
    let (folder, _) = draft.folder.make(OsStr::new(id)).doing("make a workspace")?;
    nix::unistd::fchdir(&folder).doing("enter a new workspace")?;
    // A fetch into an empty repository is the same for a branch, a tag and a commit.
    git(&["init", "--quiet", "--initial-branch=main", "."])?;
    git(&["remote", "add", "--", "origin", url])?;
    let depth = format!("--depth={depth}");
    let wanted = reference.unwrap_or("HEAD");
    let mut fetch = vec!["fetch", "--quiet", "--no-recurse-submodules"];
    if depth != "--depth=0" {
        fetch.push(&depth);
    }
    fetch.extend(["--", "origin", wanted]);
    git(&fetch)?;
    let commit = reference.is_some_and(|it| it.len() == 40 && it.bytes().all(|b| b.is_ascii_hexdigit()));
    match (reference, commit) {
        (Some(name), false) => git(&["checkout", "--quiet", "-B", name, "FETCH_HEAD"])?,
        (Some(_), true) => git(&["checkout", "--quiet", "--detach", "FETCH_HEAD"])?,
        (None, _) => git(&["checkout", "--quiet", "-B", "main", "FETCH_HEAD"])?,
    }
    workspaces::place(top, &draft, &folder, id, Note::now(title, Some(url.to_owned())))
}

/// Runs git once.
fn git(words: &[&str]) -> Result<(), Failed> {
    let mut command = Command::new("git");
    command.args(SETTINGS.iter().flat_map(|setting| ["-c", setting])).args(words);
    let none =
        [("GIT_CONFIG_NOSYSTEM", "1"), ("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_TERMINAL_PROMPT", "0")];
    command.envs(none).env("GIT_ASKPASS", "/bin/false").env("GIT_LFS_SKIP_SMUDGE", "1");
    // Past the proxy there is nothing, and what it says of a host is what a client should hear.
    command.env("no_proxy", "").env("NO_PROXY", "");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let output = command.output().map_err(|error| {
        failed(Code::Clone, format!("git could not be started: {error}; this host has none that cages see."))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    let last: String = last.chars().filter(|c| !c.is_control()).take(SAID_BYTES_MAX).collect();
    Err(failed(Code::Clone, format!("git {}: {last}", words.first().copied().unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_of_https_and_of_nothing_else() {
        for good in ["https://example.com/a.git", "https://example.com:8443/a/b"] {
            assert!(is_address(good), "{good}");
        }
        for bad in [
            "http://example.com/a",
            "https://user:pw@example.com/a",
            "https:///a",
            "ext::sh -c id",
            "--upload-pack=id",
            "https://example.com/a b",
            "https://example.com/\na",
            "/etc",
            "file:///etc",
            "git@example.com:a",
        ] {
            assert!(!is_address(bad), "{bad}");
        }
        for good in ["main", "v1.2.3", "feature/x", "0123456789012345678901234567890123456789"] {
            assert!(is_reference(good), "{good}");
        }
        for bad in ["", "-x", "a b", "a..b", "a:b", "a;b"] {
            assert!(!is_reference(bad), "{bad}");
        }
    }
}
