//! The rules of the house, as tests: what the layout, the dependencies and the documents promise.
//! It must never need root, a network or a built binary: it reads the tree and cargo's own metadata.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// Packages that run with privilege, or whose code such a process links.
const PRIVILEGED: [&str; 4] = ["gaoler-supervisor", "gaoler-protocol", "gaoler-sys", "gaoler-policy"];
/// What they may depend on directly, beside each other. A new line here needs a paragraph in its commit.
const PRIVILEGED_MAY_USE: [&str; 10] =
    ["landlock", "libc", "nix", "rand", "serde", "sha2", "tempfile", "toml", "tracing", "zerocopy"];
/// What their build scripts may use: it reads the policies and writes constants, and is never linked.
const PRIVILEGED_MAY_BUILD_WITH: [&str; 1] = ["gaoler-policies"];
/// One person can read this much in two afternoons.
const PRIVILEGED_LINES_MAX: usize = 7896;
/// Where `unsafe` may stand.
const UNSAFE_MAY_STAND_IN: [&str; 2] = ["supervisor/sys/src/", "tests/probe/"];
/// Crate roots that must forbid it.
const UNPRIVILEGED_SOURCES: [&str; 11] = [
    "src",
    "egress/src",
    "files/src",
    "upstream/src",
    "confine/src",
    "policies/src",
    "ledger/src",
    "ledger/wire/src",
    "exporter/src",
    "exporter/wire/src",
    "seal/src",
];

#[test]
fn unsafe_stands_only_where_it_may() {
    let found: Vec<String> = sources()
        .into_iter()
        .filter(|(path, _)| !UNSAFE_MAY_STAND_IN.iter().any(|place| path.starts_with(place)))
        .filter(|(_, text)| words(&code(text)).any(|word| word == "unsafe"))
        .map(|(path, _)| path)
        .collect();
    assert!(found.is_empty(), "unsafe in {found:?}");
}

#[test]
fn unprivileged_crates_forbid_unsafe() {
    for folder in UNPRIVILEGED_SOURCES {
        for root in ["lib.rs", "main.rs"] {
            let path = root_folder().join(folder).join(root);
            if let Ok(text) = std::fs::read_to_string(&path) {
                assert!(code(&text).contains("#![forbid(unsafe_code)]"), "{folder}/{root}");
            }
        }
    }
}

#[test]
fn log_lines_are_written_in_one_piece() {
    // The pieces of a value that is formatted onto stderr mix with what other processes write there.
    let pieces = ["eprintln!(\"{}\"", "eprintln!(\"{line}\"", "eprint!(\"{}\""];
    let ours = |path: &str| !path.starts_with("tests/") && !path.starts_with("benches/");
    let found: Vec<String> = sources()
        .into_iter()
        .filter(|(path, text)| ours(path) && pieces.iter().any(|piece| text.contains(piece)))
        .map(|(path, _)| path)
        .collect();
    assert!(found.is_empty(), "lines in pieces: {found:?}");
}

#[test]
fn every_source_says_what_it_is() {
    let silent: Vec<String> =
        sources().into_iter().filter(|(_, text)| !text.starts_with("//! ")).map(|(path, _)| path).collect();
    assert!(silent.is_empty(), "without //! {silent:?}");
}

#[test]
fn privileged_dependencies_are_the_listed_ones() {
    let metadata = metadata();
    for package in packages(&metadata).filter(|package| PRIVILEGED.contains(&name(package))) {
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = name(dependency);
            let is_test_only = dependency["kind"] == "dev";
            let may = PRIVILEGED.contains(&used) || PRIVILEGED_MAY_USE.contains(&used);
            let builds = dependency["kind"] == "build" && PRIVILEGED_MAY_BUILD_WITH.contains(&used);
            assert!(is_test_only || may || builds, "{} depends on {used}", name(package));
        }
    }
}

#[test]
fn privileged_code_never_reaches_across_the_boundary() {
    let privileged = |path: &str| path.starts_with("supervisor/") && path.contains("/src/");
    for (path, text) in sources().into_iter().filter(|(path, _)| privileged(path)) {
        let code = code(&text);
        for foreign in [
            "gaoler_egress",
            "gaoler_files",
            "gaoler_upstream",
            "gaoler_ledger",
            "gaoler_exporter",
            "gaoler_seal",
            "gaoler::",
        ] {
            assert!(!code.contains(foreign), "{path} names {foreign}");
        }
        assert!(!code.contains("#[path"), "{path} takes a module from elsewhere");
    }
}

#[test]
fn what_privileged_code_links_is_in_the_snapshot() {
    let metadata = metadata();
    let linked = linked(&metadata, "gaoler-supervisor", |kind| kind["kind"] != "dev");
    let linked: String = linked.iter().map(|name| format!("{name}\n")).collect();
    let path = root_folder().join("tests/snapshots/privileged-dependencies.txt");
    if std::env::var_os("GAOLER_TEST_BLESS").is_some() {
        std::fs::write(&path, &linked).expect("written");
    }
    let snapshot = std::fs::read_to_string(&path).expect("the snapshot");
    assert_eq!(linked, snapshot, "if this is meant: GAOLER_TEST_BLESS=1 cargo test --test house");
}

#[test]
fn all_that_the_supervisor_links_of_this_house_is_counted() {
    let metadata = metadata();
    let linked = linked(&metadata, "gaoler-supervisor", |kind| kind["kind"].is_null());
    for package in packages(&metadata).filter(|package| package["source"].is_null()) {
        let path = package["manifest_path"].as_str().unwrap_or_default();
        let inside = PathBuf::from(path).starts_with(root_folder().join("supervisor"));
        assert!(inside || !linked.contains(name(package)), "{} is linked and not counted", name(package));
    }
}

/// Counted is every source that ends up in gaoler-supervisor. Not counted are its build scripts and what they
/// use (policies/src): they run as whoever builds gaoler, read this repository alone, and are not in the
/// program. What they write is tables of numbers and strings, whose source is policies/*.toml.
#[test]
fn privileged_code_is_two_afternoons_reading() {
    let lines: BTreeMap<String, usize> = sources()
        .into_iter()
        .filter(|(path, _)| path.starts_with("supervisor/") && path.contains("/src/"))
        .filter(|(path, _)| !path.ends_with("/tests.rs") && !path.contains("/tests/"))
        .map(|(path, text)| (path, lines_of_code(&text)))
        .collect();
    let sum: usize = lines.values().sum();
    println!("privileged lines: {sum} of {PRIVILEGED_LINES_MAX}");
    assert!(sum < PRIVILEGED_LINES_MAX, "{sum} lines: {lines:#?}");
}

#[test]
fn every_policy_rule_has_its_reason() {
    let folder = root_folder().join("policies");
    let mut files = 0;
    for entry in std::fs::read_dir(&folder).expect("policies/") {
        let path = entry.expect("an entry").path();
        let is_policy = path.extension().is_some_and(|end| end == "toml") && !path.ends_with("Cargo.toml");
        if !is_policy {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a policy");
        let policy: toml::Table = text.parse().expect("TOML");
        files += 1;
        let place = path.display().to_string();
        assert_eq!(unreasoned(&policy, &place), Vec::<String>::new());
    }
    assert!(files > 0, "no policies");
}

/// Rules without a reason: entries of a list of tables, and sections. What lies inside an entry is a part of it.
fn unreasoned(table: &toml::Table, place: &str) -> Vec<String> {
    let has_reason = |rule: &toml::Value| {
        let why = rule.get("why").and_then(toml::Value::as_str).unwrap_or_default();
        why.trim().len() > 3
    };
    let mut found = Vec::new();
    for (section, body) in table {
        let place = format!("{place} {section}");
        let rules: Vec<&toml::Value> = match body {
            toml::Value::Array(list) => list.iter().filter(|rule| rule.is_table()).collect(),
            toml::Value::Table(inner) => {
                found.extend(unreasoned(inner, &place));
                vec![body]
            }
            _ => continue,
        };
        found.extend(rules.iter().filter(|rule| !has_reason(rule)).map(|rule| format!("{place}: {rule}")));
    }
    found
}

/// System calls of a cage that leave nothing in the kernel: they use, ask about, change or remove what another one made.
#[rustfmt::skip]
const MAKE_NOTHING: &[&str] = &[
    "arch_prctl", "capget", "capset", "chmod", "chown", "clock_getres", "clock_gettime",
    "clock_nanosleep", "close_range", "epoll_pwait", "epoll_pwait2", "epoll_wait", "exit", "exit_group",
    "fadvise64", "fchdir", "fchmod", "fchmodat", "fchmodat2", "fchown", "fchownat", "fdatasync",
    "fgetxattr", "flistxattr", "fremovexattr", "fstat", "fstatfs", "fsync", "futex", "futimesat",
    "get_mempolicy", "get_robust_list", "getcpu", "getcwd", "getdents", "getdents64", "getegid",
    "geteuid", "getgid", "getgroups", "getitimer", "getpeername", "getpgid", "getpgrp", "getpid",
    "getppid", "getpriority", "getrandom", "getresgid", "getresuid", "getrlimit", "getrusage", "getsid",
    "getsockname", "getsockopt", "gettid", "gettimeofday", "getuid", "ioctl", "ioprio_get", "lchown",
    "lseek", "membarrier", "mincore", "msync", "munlock", "munlockall", "nanosleep", "pause",
    "personality", "pkey_alloc", "pkey_free", "pkey_mprotect", "poll", "ppoll", "pread64", "preadv",
    "preadv2", "prlimit64", "pselect6", "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readv",
    "recvfrom", "recvmmsg", "recvmsg", "restart_syscall", "rmdir", "rseq", "rt_sigaction",
    "rt_sigpending", "rt_sigprocmask", "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait",
    "sched_get_priority_max", "sched_get_priority_min", "sched_getaffinity", "sched_getattr",
    "sched_getparam", "sched_getscheduler", "sched_rr_get_interval", "sched_setaffinity", "sched_setattr",
    "sched_setparam", "sched_setscheduler", "sched_yield", "select", "set_mempolicy", "set_tid_address",
    "setfsgid", "setfsuid", "setgid", "setgroups", "setpgid", "setpriority", "setregid", "setresgid",
    "setresuid", "setreuid", "setrlimit", "setsid", "setuid", "sync", "sync_file_range", "syncfs",
    "sysinfo", "time", "timer_delete", "timer_getoverrun", "timer_gettime", "timerfd_gettime", "times",
    "umask", "uname", "unlink", "unlinkat", "utime", "utimensat", "utimes", "wait4", "waitid",
];

/// Each kind of object that a cage can make is a row of docs/kernel-objects.md: with the calls that make it, in the second
/// cell, and its tests, in the last one.
#[test]
fn every_object_that_a_cage_can_make_has_its_row_and_its_test() {
    let policy: toml::Table = page("policies/cage.toml").parse().expect("TOML");
    let allowed: BTreeSet<&str> = policy["allow"]
        .as_array()
        .expect("rules")
        .iter()
        .flat_map(|rule| {
            let one = rule.get("call").into_iter();
            let many = rule.get("calls").and_then(toml::Value::as_array).into_iter().flatten();
            one.chain(many).filter_map(toml::Value::as_str)
        })
        .collect();
    let page = page("docs/kernel-objects.md");
    let quoted =
        |cell: &str| -> BTreeSet<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let rows: Vec<Vec<&str>> = page
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| object |"))
        .map(|line| line.trim_matches(['|', ' ']).split('|').map(str::trim).collect())
        .collect();
    assert!(rows.len() > 20, "{} rows", rows.len());
    let tests = tests("");
    let mut made = BTreeSet::new();
    for row in &rows {
        let shown = quoted(row.last().expect("a cell"));
        assert!(!shown.is_empty(), "{} names no test", row[0]);
        let missing: Vec<_> = shown.difference(&tests).collect();
        assert!(missing.is_empty(), "{} names {missing:?}, which is no test", row[0]);
        // Rows of three cells are of what cannot be made.
        if row.len() > 3 {
            assert_eq!(row.len(), 9, "{row:?}");
            assert!(row[2..7].iter().all(|cell| !cell.is_empty()), "{row:?}");
            made.extend(quoted(row[1]));
        }
    }
    let named: BTreeSet<&str> = made.iter().map(String::as_str).chain(MAKE_NOTHING.iter().copied()).collect();
    let unnamed: Vec<_> = allowed.difference(&named).collect();
    assert!(unnamed.is_empty(), "docs/kernel-objects.md does not say what {unnamed:?} make");
    let both: Vec<_> = MAKE_NOTHING.iter().filter(|call| made.contains(**call)).collect();
    assert!(both.is_empty(), "{both:?} make something and nothing");
}

#[test]
fn every_promise_is_a_test_and_every_promised_test_exists() {
    let promised: BTreeSet<String> = words(&page("SECURITY.md")).filter(|word| is_promise(word)).collect();
    // The suites are named after promises; a unit test beside its code may use such a name for itself.
    let suites: BTreeSet<String> = tests("tests/").into_iter().filter(|test| is_promise(test)).collect();
    let everywhere = tests("");
    let untested: Vec<_> = promised.difference(&everywhere).collect();
    let untold: Vec<_> = suites.difference(&promised).collect();
    assert!(untested.is_empty(), "SECURITY.md promises, no test shows: {untested:#?}");
    assert!(untold.is_empty(), "tests show, SECURITY.md does not say: {untold:#?}");
}

#[test]
fn every_test_that_a_page_names_exists() {
    let tests = tests("");
    for name in ["README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        for quoted in page(name).split('`').skip(1).step_by(2) {
            let is_sentence = quoted.split('_').count() >= 4
                && quoted.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
            assert!(!is_sentence || tests.contains(quoted), "{name} names {quoted}, which is no test");
        }
    }
}

#[test]
fn lock_files_name_no_registry_host() {
    let lock = page("Cargo.lock");
    // Cargo's own name of its default registry, whichever mirror answers for it.
    let default = "registry+https://github.com/rust-lang/crates.io-index";
    for source in lock.lines().filter_map(|line| line.strip_prefix("source = ")) {
        assert_eq!(source.trim_matches('"'), default);
    }
    let locks = files().into_iter().filter(|path| {
        let in_matrix =
            path.starts_with("tests/sdk/") && path.ends_with(".txt") || path.ends_with("package-lock.json");
        in_matrix
            || ["tests/browser/openapi.txt", "tests/schema/schemathesis.txt"].contains(&path.as_str())
            || path.ends_with(".lock") && path != "Cargo.lock"
    });
    let locks: Vec<String> = locks.collect();
    assert!(locks.len() >= 6, "{locks:?}");
    for path in locks {
        let text = page(&path);
        for mark in ["://", "\"resolved\"", "--index-url", "--extra-index-url", "--find-links"] {
            assert!(!text.contains(mark), "{path} contains {mark}");
        }
    }
}

#[test]
fn the_pinned_cli_is_the_same_everywhere() {
    let lock = page("scripts/cli.lock");
    let pinned = lock.lines().find_map(|line| line.strip_prefix("version ")).expect("a version");
    assert_eq!(gaoler_policy::settings::Settings::default().cli.version, pinned);
    assert!(page("README.md").contains(pinned), "README.md");
}

#[test]
fn every_licence_is_an_allowed_one() {
    let deny: toml::Table = page("deny.toml").parse().expect("TOML");
    let allowed: Vec<&str> =
        deny["licenses"]["allow"].as_array().into_iter().flatten().filter_map(toml::Value::as_str).collect();
    let metadata = metadata();
    for package in packages(&metadata).filter(|package| !package["source"].is_null()) {
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(may_use(licence, &allowed), "{} is under {licence}", name(package));
    }
}

#[test]
fn licences_are_read_as_they_are_meant() {
    let rows = [
        ("MIT", true),
        ("MIT OR GPL-3.0", true),
        ("MIT/Apache-2.0", true),
        ("MIT AND GPL-3.0", false),
        ("(MIT OR GPL-3.0) AND Apache-2.0", true),
        ("(MIT AND GPL-3.0) OR Apache-2.0", true),
        ("GPL-3.0", false),
        ("none", false),
        ("", false),
    ];
    for (expression, expected) in rows {
        assert_eq!(may_use(expression, &["MIT", "Apache-2.0"]), expected, "{expression}");
    }
}

#[test]
fn code_is_told_from_comments_and_text() {
    let text = "//! unsafe\nfn a() { /* unsafe /* nested */ unsafe */ let b = \"unsafe \\\" unsafe\"; }\n\
                let c = r#\"unsafe \" unsafe\"#; let d = '\"'; // unsafe\nlet e: &'static str;\n";
    assert!(words(&code(text)).all(|word| word != "unsafe"), "{}", code(text));
    assert!(words(&code(text)).any(|word| word == "static"));
    let counted = "//! doc\n\nfn a() {}\n// why\nfn b() {\n}\n#[cfg(test)]\nmod tests {\n fn c() { \"}\"; }\n}\nfn d() {}\n";
    assert_eq!(lines_of_code(counted), 4);
}

fn is_promise(word: &str) -> bool {
    let digits = word.strip_prefix('t').and_then(|rest| rest.split_once('_')).map(|(digits, _)| digits);
    digits.is_some_and(|digits| digits.len() >= 2 && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// The names of the tests below a folder.
fn tests(folder: &str) -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for (_, text) in sources().into_iter().filter(|(path, _)| path.starts_with(folder)) {
        let code = code(&text);
        let mut is_test = false;
        for line in code.lines().map(str::trim) {
            if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                is_test = true;
            }
            let after = line.split_once("fn ").map(|(_, after)| after);
            if let Some(after) = after.filter(|_| is_test) {
                tests.extend(words(after).next());
                is_test = false;
            }
        }
    }
    tests
}

fn root_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn page(path: &str) -> String {
    std::fs::read_to_string(root_folder().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file of the tree, but for what was built or fetched.
fn files() -> Vec<String> {
    let root = root_folder();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let skipped = ["target", "node_modules"].contains(&name.as_str()) || name.starts_with('.');
            if path.is_dir() && !skipped {
                folders.push(path);
            } else if path.is_file() {
                let relative = path.strip_prefix(&root).unwrap_or(&path);
                found.push(relative.to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    found
}

/// Every Rust source and its text.
fn sources() -> Vec<(String, String)> {
    let paths = files().into_iter().filter(|path| path.ends_with(".rs"));
    paths.map(|path| (path.clone(), page(&path))).collect()
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        .args(["--filter-platform", &format!("{}-unknown-linux-gnu", std::env::consts::ARCH)])
        .current_dir(root_folder())
        .output()
        .expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

fn name(value: &Value) -> &str {
    value["name"].as_str().unwrap_or_default()
}

/// Names of all packages that this one depends on, through dependencies of the kinds that count.
fn linked(metadata: &Value, package: &str, counts: fn(&Value) -> bool) -> BTreeSet<String> {
    let names: BTreeMap<&str, &str> =
        packages(metadata).filter_map(|package| Some((package["id"].as_str()?, name(package)))).collect();
    let nodes = || metadata["resolve"]["nodes"].as_array().into_iter().flatten();
    let start = names.iter().find(|(_, name)| **name == package).map(|(id, _)| *id).expect("the package");
    let mut seen = BTreeSet::from([start]);
    let mut waiting = vec![start];
    while let Some(id) = waiting.pop() {
        let node = nodes().find(|node| node["id"] == id).expect("a node");
        for dependency in node["deps"].as_array().into_iter().flatten() {
            let kinds = dependency["dep_kinds"].as_array().into_iter().flatten();
            let is_linked = kinds.into_iter().any(counts);
            if let Some(id) = dependency["pkg"].as_str().filter(|id| is_linked && seen.insert(id)) {
                waiting.push(id);
            }
        }
    }
    seen.remove(start);
    seen.iter().filter_map(|id| names.get(id)).map(|name| (*name).to_owned()).collect()
}

/// Whether an SPDX expression can be met with these licences. `/` is cargo's old way to write OR.
fn may_use(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    any_of(&mut words.as_slice(), allowed)
}

fn any_of(words: &mut &[&str], allowed: &[&str]) -> bool {
    let mut met = all_of(words, allowed);
    while let Some((&"OR", rest)) = words.split_first() {
        *words = rest;
        let other = all_of(words, allowed);
        met = met || other;
    }
    met
}

fn all_of(words: &mut &[&str], allowed: &[&str]) -> bool {
    let mut met = one(words, allowed);
    while let Some((&"AND", rest)) = words.split_first() {
        *words = rest;
        let other = one(words, allowed);
        met = met && other;
    }
    met
}

fn one(words: &mut &[&str], allowed: &[&str]) -> bool {
    let Some((&first, rest)) = words.split_first() else { return false };
    *words = rest;
    if first == "(" {
        let met = any_of(words, allowed);
        *words = words.get(1..).unwrap_or_default();
        return met;
    }
    // An exception only adds permissions.
    if let [_with, _exception, rest @ ..] = *words
        && words.first() == Some(&"WITH")
    {
        *words = rest;
    }
    allowed.contains(&first)
}

fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .map(ToOwned::to_owned)
}

/// The text without comments and without the insides of strings; lines stay lines.
fn code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    let keep_lines = |skipped: &str, out: &mut String| out.extend(skipped.chars().filter(|c| *c == '\n'));
    while at < bytes.len() {
        let rest = &text[at..];
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            comment_length(rest)
        } else {
            string_length(rest, at > 0 && is_word(bytes[at - 1])).unwrap_or_default()
        };
        if skipped == 0 {
            let next = rest.chars().next().unwrap_or(' ');
            out.push(next);
            at += next.len_utf8();
        } else {
            keep_lines(&rest[..skipped], &mut out);
            if !rest.starts_with('/') {
                out.push('"');
            }
            at += skipped;
        }
    }
    out
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn comment_length(text: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    at
}

/// The length of the string or character literal that `text` begins with.
fn string_length(text: &str, in_word: bool) -> Option<usize> {
    let raw = text.strip_prefix("br").or_else(|| text.strip_prefix('r')).filter(|_| !in_word);
    if let Some(after) = raw {
        let marks = after.bytes().take_while(|b| *b == b'#').count();
        if after[marks..].starts_with('"') {
            let open = text.len() - after.len() + marks + 1;
            let close = format!("\"{}", "#".repeat(marks));
            return Some(text[open..].find(&close).map_or(text.len(), |end| open + end + close.len()));
        }
    }
    if let Some(after) = text.strip_prefix('\'') {
        // A lifetime has no closing quote right behind it.
        let mut chars = after.char_indices();
        let (_, first) = chars.next()?;
        if first == '\\' {
            return after[2..].find('\'').map(|end| 1 + 2 + end + 1);
        }
        let (second, quote) = chars.next()?;
        return (quote == '\'').then_some(1 + second + 1);
    }
    let after = text.strip_prefix('"')?;
    let mut escaped = false;
    for (at, c) in after.char_indices() {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return Some(1 + at + 1),
            _ => escaped = false,
        }
    }
    Some(text.len())
}

/// Lines that are neither blank, comment nor test.
fn lines_of_code(text: &str) -> usize {
    let code = code(text);
    let mut lines = code.lines().filter(|line| !line.trim().is_empty());
    let mut count = 0;
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            count += 1;
            continue;
        }
        // The item behind the attribute: to its semicolon, or to its closing brace.
        let mut depth = 0isize;
        for line in lines.by_ref() {
            depth += line.matches('{').count() as isize - line.matches('}').count() as isize;
            if depth == 0 && (line.contains('}') || line.contains(';')) {
                break;
            }
        }
    }
    count
}

#[test]
fn every_yes_of_the_comparison_leads_to_a_test() {
    let readme = page("README.md");
    let table = readme.split("## Beside other wrappers").nth(1).expect("the comparison");
    let table = table.split("\n## ").next().unwrap_or_default();
    let mut count = 0;
    for link in table.split("[yes](").skip(1) {
        let link = link.split(')').next().unwrap_or_default();
        let (file, name) = link.split_once(' ').unwrap_or((link, ""));
        let text = page(file);
        let name = name.trim_matches('"');
        let is_there = text.contains(&format!("fn {name}(")) || text.contains(&format!("def {name}("));
        assert!(name.is_empty() || is_there, "{file} has no {name}");
        count += 1;
    }
    assert!(count > 15, "{count}");
    let rows = table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |"));
    assert!(rows.clone().all(|row| row.contains("[yes](")), "{rows:?}");
}
