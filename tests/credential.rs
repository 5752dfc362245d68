//! The tenant's token: what a cage, a log, a file or a neighbour can learn of it, which is nothing; with the
//! real CLI in its cage. Needs root, the CLI and python3. Its scanner must never find what was not planted.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::{Options, Server, ask, token, until};

const SCAN: &str = include_str!("support/scan.py");

/// Asks the broker for an answer with a token, as the CLI would; prints the status.
const CALL: &str = r#"import glob, re, socket, sys
own = b"".join(open(path, "rb").read() for path in glob.glob("/proc/[0-9]*/environ"))
own = re.search(b"CLAUDE_CODE_OAUTH_TOKEN=([^\0]*)", own).group(1).decode()
token = own if sys.argv[1] == "own" else sys.argv[1]
body = '{"model":"claude-sonnet-4-5","max_tokens":9,"messages":[{"role":"user","content":"hello"}]}'
door = socket.socket(socket.AF_UNIX)
door.connect("/run/gaoler/api.sock")
door.sendall(("POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nanthropic-version: 2023-06-01\r\n"
    f"authorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}").encode())
print("status", door.makefile("rb").readline().split()[1].decode(), "placeholder", own)
"#;

fn server() -> Server {
    Server::start(Options::default())
}

/// Puts a text into a tenant's workspace, by a run of the tenant's own.
fn plant(server: &Server, tenant: &str, name: &str, text: &str) {
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    let said = server.says(tenant, &format!("RUN: printf %s {hex} | python3 -c 'import sys; open(\"{name}\", \"w\").write(bytes.fromhex(sys.stdin.read()).decode())' && wc -c < {name}"));
    assert!(said.contains(&text.len().to_string()), "{said}");
}

#[test]
fn t50_the_token_is_nowhere_in_the_cage() {
    let name = format!("canary{}", std::process::id());
    // The control: planted in a file, an environment and an argument, each is found.
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("scan.py"), SCAN).expect("written");
    fs::create_dir(folder.path().join("below")).expect("made");
    fs::write(folder.path().join("below/planted"), token(&name)).expect("written");
    let mut holder = Command::new("python3");
    holder.args([
        "-c",
        "import os; kept = os.environ['KEPT'] * 2; print(flush=True); input()",
        &token(&name),
    ]);
    let mut holder = holder
        .env("KEPT", token(&name))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3");
    BufReader::new(holder.stdout.as_mut().expect("a pipe")).read_line(&mut String::new()).expect("ready");
    let scan = Command::new("python3")
        .arg(folder.path().join("scan.py"))
        .args([&name, &holder.id().to_string()])
        .arg(folder.path().join("below"))
        .output()
        .expect("python3");
    let found = String::from_utf8_lossy(&scan.stdout).into_owned();
    for place in ["environ of", "cmdline of", "memory of", "below/planted"] {
        assert!(found.contains(place), "{place}: {scan:?}");
    }
    drop(holder.stdin.take());
    holder.wait().expect("an end");

    let server = server();
    plant(&server, &name, "scan.py", SCAN);
    let places = ". /home /tmp /run /etc /dev/shm /var /opt /mnt";
    let said = server.says(&name, &format!("RUN: python3 scan.py {name} all {places}"));
    assert!(said.contains("hits []"), "{said}");
    // It has looked: at the CLI, at bash and at itself, and at the files that every cage has.
    let number = |what: &str| -> u64 {
        let rest = said.split_once(&format!("'{what}': ")).expect("a number").1;
        rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().expect("a number")
    };
    assert!(number("processes") >= 3 && number("files") >= 5 && number("pages") >= 10_000, "{said}");
}

#[test]
fn t51_the_placeholder_dies_with_its_run() {
    let server = server();
    plant(&server, "a", "call.py", CALL);
    // The control: while its run lives, the placeholder is taken.
    let first = server.says("a", "RUN: python3 call.py own");
    assert!(first.contains("status 200 placeholder sk-ant-oat01-"), "{first}");
    let old = first.split_once("placeholder ").expect("one").1;
    let old: String = old.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
    assert_ne!(old, token("a"));
    let later = server.says("a", &format!("RUN: python3 call.py {old}"));
    assert!(later.contains("status 401") && !later.contains(&format!("placeholder {old}")), "{later}");
    // Another tenant has no use for it either, nor for a token of its own invention.
    plant(&server, "b", "call.py", CALL);
    for guess in [old.as_str(), "sk-ant-oat01-guess", &token("b")] {
        let said = server.says("b", &format!("RUN: python3 call.py {guess}"));
        assert!(said.contains("status 401"), "{guess}: {said}");
    }
}

#[test]
fn t52_the_upstream_gets_the_token_and_never_the_placeholder() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let upstream = format!("http://{}", listener.local_addr().expect("bound"));
    let heard = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a request");
        let mut reader = BufReader::new(stream.try_clone().expect("a copy"));
        let mut head = String::new();
        while reader.read_line(&mut head).expect("a line") > 2 {}
        let body = r#"{"type":"error","error":{"type":"authentication_error","message":"no"}}"#;
        let _ = write!(
            stream,
            "HTTP/1.1 401 Unauthorized\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let _ = stream.flush();
        let _ = reader.read_to_string(&mut String::new());
        head
    });
    let server = Server::start(Options { upstream, ..Options::default() });
    let response = server.client().messages("canary", &ask("hello"));
    assert_eq!(response.status, 401, "{response:?}");
    let head = heard.join().expect("heard");
    assert!(head.contains(&format!("authorization: Bearer {}\r\n", token("canary"))), "{head}");
    // Refused by the upstream: neither a folder nor a word about the token.
    assert_eq!(fs::read_dir(server.state.join("tenants")).expect("tenants").count(), 0);
    assert!(!format!("{response:?}").contains("canary") && !server.log().contains("canary"));
}

#[test]
fn t53_no_log_file_or_error_holds_the_token() {
    let server = server();
    assert!(server.says("canary", "hello").starts_with("[embedded]"));
    let mut answers = Vec::new();
    for text in ["FAIL: 400", "FAIL: 401", "FAIL: 429", "FAIL: 529", "CUT: x", "ERROR: overloaded_error"] {
        answers.push(format!("{:?}", server.client().messages("canary", &ask(text))));
    }
    answers.push(format!("{:?}", server.client().messages("canary-refused", &ask("x"))));
    answers.push(format!("{:?}", server.client().messages("canary-forbidden", &ask("x"))));
    let bad = [("authorization", format!("Basic {}", token("canary")))];
    answers.push(format!("{:?}", server.client().post(&bad, b"{}")));
    let bad = [("authorization", format!("Bearer {}", token("canary")))];
    answers.push(format!("{:?}", server.client().post(&bad, b"{not JSON")));
    assert!(answers.iter().all(|it| !it.contains("canary")), "{answers:#?}");
    assert!(!server.log().contains("canary"), "{}", server.log());
    // The control: the search finds what the tenant itself has put there.
    assert!(server.says("canary", "RUN: echo can''ary > own").contains("ok"));
    let own: Vec<_> = below(&server.state).into_iter().filter(|it| contains(&it.1, b"canary")).collect();
    assert!(own.len() == 1 && own[0].0.ends_with("own"), "{own:?}");
    fs::remove_file(&own[0].0).expect("removed");
    let holding: Vec<PathBuf> = below(&server.state)
        .into_iter()
        .filter(|(path, bytes)| contains(bytes, b"canary") || path.to_string_lossy().contains("canary"))
        .map(|it| it.0)
        .collect();
    assert!(holding.is_empty(), "{holding:?}");
}

/// Every file below a folder.
fn below(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder").filter_map(Result::ok) {
            match entry.file_type().expect("a type") {
                kind if kind.is_dir() => folders.push(entry.path()),
                kind if kind.is_file() => {
                    files.insert(entry.path(), fs::read(entry.path()).expect("a file"));
                }
                _ => {}
            }
        }
    }
    files
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

/// What /proc shows of a process to root.
fn shown(pid: i32) -> Vec<u8> {
    let part = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    [part("environ"), part("cmdline")].concat()
}

#[test]
fn t54_no_process_of_the_server_shows_the_token() {
    let mut control = Command::new("sleep").arg("600").env("X", token("canary")).spawn().expect("sleep");
    until("the control", || contains(&shown(control.id().cast_signed()), b"test-canary").then_some(()));
    control.kill().expect("killed");
    control.wait().expect("an end");

    let server = server();
    let uids = server.options.uids;
    let client = server.client();
    let asked = std::thread::spawn(move || {
        client.messages("canary", &ask("SLOW: 300 one two three four five six seven eight nine ten"))
    });
    let (mut egresses, mut frontends) = (0, 0);
    while !asked.is_finished() {
        for entry in fs::read_dir("/proc").expect("/proc").filter_map(Result::ok) {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let uid = status
                .lines()
                .find_map(|line| line.strip_prefix("Uid:\t")?.split('\t').next()?.parse::<u32>().ok());
            let Some(uid) = uid.filter(|uid| uids.contains(*uid) || pid == server.pid()) else { continue };
            assert!(!contains(&shown(pid), b"test-canary"), "{pid}");
            // Who holds a token for a moment is not dumpable: its /proc is root's, and it leaves no core.
            let owner = || fs::metadata(entry.path().join("environ")).map(|it| it.uid());
            let confined = status.contains("Seccomp:\t2");
            if confined && uids.is_egress(uid) && owner().is_ok_and(|owner| owner == 0) {
                egresses += 1;
            }
            if confined && uids.is_frontend(uid) && owner().is_ok_and(|owner| owner == 0) {
                frontends += 1;
            }
        }
    }
    let response = asked.join().expect("an answer");
    assert_eq!(response.status, 200, "{response:?}");
    assert!(egresses > 0, "no egress was seen that nobody can trace");
    assert!(frontends > 0, "no frontend was seen that nobody can trace");
}
