//! A workspace out of a git repository, fetched by the host's own git through the cage's proxy.
//! It must never run what a repository brings: no hook, no filter of its own, no submodule, no other protocol.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use gaoler_files::Code;
use serde_json::Value;

use crate::beneath::Folder;
use crate::draft::Draft;
use crate::failure::{Doing, Failed, failed};
use crate::note::Note;
use crate::workspaces;

/// Bytes of what git says that are repeated.
const SAID_BYTES_MAX: usize = 500;
/// What git says of a login that a host does not take.
const REFUSED: &str = "Authentication failed";
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

/// What is to be cloned.
pub struct Wanted<'a> {
    /// Where it is.
    pub url: &'a str,
    /// A branch, a tag or a commit.
    pub reference: Option<&'a str>,
    /// Commits; 0 = all.
    pub depth: u32,
    /// Scheme and host by which the cage asks for it, where egress adds what opens it.
    pub via: Option<&'a str>,
}

/// Where an address begins: scheme and host. It is an address that git may be given: https, a host, and nothing that
/// could be an option, a login or a line. In the clear only egress may go, where the operator lets it.
fn base_of<'a>(url: &'a str, via: Option<&str>) -> Option<&'a str> {
    let rest =
        url.strip_prefix("https://").or_else(|| url.strip_prefix("http://").filter(|_| via.is_some()))?;
    let host = rest.split('/').next().unwrap_or_default();
    let plain = |b: u8| b.is_ascii_graphic() && !b"\"'\\`<>{}|^".contains(&b);
    let named = |b: u8| b.is_ascii_alphanumeric() || b".-:".contains(&b);
    let fits = url.len() <= 2000 && url.bytes().all(plain) && !host.is_empty() && host.bytes().all(named);
    fits.then(|| &url[..url.len() - rest.len() + host.len()])
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
pub fn clone(top: &Folder, id: &str, title: Option<String>, wanted: &Wanted<'_>) -> Result<Value, Failed> {
    let Wanted { url, reference, depth, via } = *wanted;
    let Some(base) = base_of(url, via) else {
        let message = "git.url: must be https://HOST/PATH, without a user or a password in it.";
        return Err(failed(Code::Clone, message));
    };
    // The repository remembers where it really is; only what is asked now takes the other way.
    let way =
        via.map(|via| [format!("url.{via}/.insteadOf={base}/"), "protocol.http.allow=always".to_owned()]);
    let git =
        |words: &[&str]| git(words, way.as_ref().map_or(&[][..], |way| &way[..]), via.map(|via| (via, base)));
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
    let asked = reference.unwrap_or("HEAD");
    let mut fetch = vec!["fetch", "--quiet", "--no-recurse-submodules"];
    if depth != "--depth=0" {
        fetch.push(&depth);
    }
    fetch.extend(["--", "origin", asked]);
    git(&fetch)?;
    let commit = reference.is_some_and(|it| it.len() == 40 && it.bytes().all(|b| b.is_ascii_hexdigit()));
    match (reference, commit) {
        (Some(name), false) => git(&["checkout", "--quiet", "-B", name, "FETCH_HEAD"])?,
        (Some(_), true) => git(&["checkout", "--quiet", "--detach", "FETCH_HEAD"])?,
        (None, _) => git(&["checkout", "--quiet", "-B", "main", "FETCH_HEAD"])?,
    }
    workspaces::place(top, &draft, &folder, id, Note::now(title, Some(url.to_owned())))
}

/// Runs git once, with these settings more. What it says of the first of `names` is said of the second.
fn git(words: &[&str], more: &[String], names: Option<(&str, &str)>) -> Result<(), Failed> {
    let mut command = Command::new("git");
    let settings = SETTINGS.iter().copied().chain(more.iter().map(String::as_str));
    command.args(settings.flat_map(|setting| ["-c", setting])).args(words);
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
    // It would ask for a login where nobody could answer.
    if [REFUSED, "could not read Username", "could not read Password"]
        .iter()
        .any(|words| last.contains(words))
    {
        let message = "the host wants a login, or refuses this one: git.token opens a private repository, and must be \
                       one of this host's that may read it.";
        return Err(failed(Code::Clone, message));
    }
    let last = names.map_or(last.to_owned(), |(inside, outside)| last.replace(inside, outside));
    let last: String = last.chars().filter(|c| !c.is_control()).take(SAID_BYTES_MAX).collect();
    Err(failed(Code::Clone, format!("git {}: {last}", words.first().copied().unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_of_https_and_of_nothing_else() {
        for good in ["https://example.com/a.git", "https://example.com:8443/a/b"] {
            assert!(base_of(good, None).is_some(), "{good}");
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
            assert!(base_of(bad, None).is_none(), "{bad}");
        }
        let via = Some("http://s0.git.invalid");
        assert_eq!(base_of("http://10.0.0.7:80/a/b", via), Some("http://10.0.0.7:80"));
        assert_eq!(base_of("https://example.com/a/b", via), Some("https://example.com"));
        assert_eq!(base_of("http://user:pw@10.0.0.7/a", via), None);
        for good in ["main", "v1.2.3", "feature/x", "0123456789012345678901234567890123456789"] {
            assert!(is_reference(good), "{good}");
        }
        for bad in ["", "-x", "a b", "a..b", "a:b", "a;b"] {
            assert!(!is_reference(bad), "{bad}");
        }
    }
}
