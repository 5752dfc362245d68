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

use support::traces::{Process, Role, processes};
use support::{Options, Server, ask, bearer, environment, token, until};

const SCAN: &str = include_str!("support/scan.py");

/// Asks the broker for an answer with a token, as the CLI would; prints the status and what stands for the token
/// in this run. usage: call.py TOKEN|own [PID]: a process of the run, where that is not the asker itself.
const CALL: &str = include_str!("support/call.py");

fn server() -> Server {
    Server::start(Options::default())
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
    for place in ["environ of", "cmdline of", "below/planted"] {
        assert!(found.contains(place), "{place}: {scan:?}");
    }
    // Where memory is shown to those above alone, this is who is above.
    let own = token(&name).repeat(2);
    let held = found.contains("memory of")
        || !environment().full_proc && memory_holds(holder.id().cast_signed(), [&own, ""]).1[0];
    assert!(held, "{scan:?}");
    drop(holder.stdin.take());
    holder.wait().expect("an end");

    // Where the host's root is everybody's, a run may read what the host lets everybody read.
    fs::remove_dir_all(folder.path().join("below")).expect("removed");

    let server = server();
    let here = environment();
    if !here.full_proc {
        // A process sees the memory of those below it and of no other: the CLI's is looked at from outside.
        scanned_from_outside(&server, &name, folder.path());
    }
    if !here.commands {
        let said = server.says(&name, "RUN: python3 scan.py");
        assert_eq!(said, "[embedded] RUN: the request offers no tool Bash");
        for path in ["/proc/self/environ", "/proc/self/mem", "/proc/self/fd/3"] {
            let said = server.looks(&name, path);
            assert!(said.contains("CALLS 1 error:"), "{said}");
        }
        return;
    }
    server.writes(&name, "scan.py", SCAN);
    let places = ". /home /tmp /run /etc /dev/shm /var /opt /mnt";
    let said = server.says(&name, &format!("RUN: python3 scan.py {name} all {places}"));
    assert!(said.contains("hits []"), "{said}");
    // It has looked: at the CLI, at bash and at itself, and at the files that every cage has.
    let (processes, files, pages) = looked(&said);
    let least = if here.full_proc { 3 } else { 1 };
    let enough = if here.full_proc && here.real_cli { 10_000 } else { 1_000 };
    assert!(processes >= least && files >= 5 && pages >= enough, "{said}");
}

/// What a scan says that it has looked at: processes, files, pages.
fn looked(said: &str) -> (u64, u64, u64) {
    let number = |what: &str| -> u64 {
        let rest = said.split_once(&format!("'{what}': ")).expect("a number").1;
        rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().expect("a number")
    };
    (number("processes"), number("files"), number("pages"))
}

/// What a tenant's run says while [`beside_a_run`] looks at it.
const LONG_TEXT: &str = "a long text of which nobody sees the end";

/// Does something while a run of this tenant's talks, and ends that run. `within` gets the pid of its CLI, and
/// must see that it is there.
fn beside_a_run<T>(server: &Server, tenant: &str, within: impl FnOnce(i32) -> T) -> T {
    let client = server.client();
    let clis = || -> Vec<i32> {
        let all = processes(server.pid(), server.options.uids).into_iter();
        all.filter(|it| it.program == "claude" && !it.zombie).map(|it| it.pid).collect()
    };
    let mut body = ask(&format!("SLOW: 3000 {}", LONG_TEXT.repeat(20)));
    body["stream"] = true.into();
    let stream = client.connect().expect("a connection");
    let body = body.to_string();
    let sent = client.send(&stream, "POST", "/v1/messages", &[bearer(tenant)], body.as_bytes());
    sent.expect("sent");
    // When its answer begins, it has read what stands for the token.
    let begun = support::client::head(&mut BufReader::new(&stream)).expect("an answer");
    assert_eq!(begun.status, 200, "{begun:?}");
    // Its own end, and no sweep's: where one run is all there may be, the next one needs its place.
    let end = format!("\"event\":\"exit\",\"run\":\"{}\"", begun.header("x-gaoler-run").expect("its run"));
    let pid = until("the CLI", || clis().first().copied());
    let done = within(pid);
    drop(stream);
    until("its end", || server.log().contains(&end).then_some(()));
    done
}

/// Looks for the token from outside, as who started the server: in the CLI's memory, environment and files, and
/// in all that the state holds while it runs.
fn scanned_from_outside(server: &Server, name: &str, folder: &Path) {
    beside_a_run(server, name, |pid| {
        // The control: it is the CLI's memory, with the broker's door.
        let (pages, [door, token]) = memory_holds(pid, ["ANTHROPIC_UNIX_SOCKET", &token(name)]);
        assert!(door && pages >= 10_000, "{pages} pages of {pid}, {door}");
        assert!(!token, "memory of {pid}");
        let mut scan = Command::new("python3");
        scan.arg(folder.join("scan.py")).args([name, &pid.to_string()]);
        scan.args([server.state.join("runs"), server.state.join("tenants")]);
        let output = scan.output().expect("python3");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("hits []") && looked(&said).1 >= 1, "{output:?}");
    });
}

/// How many pages of a process this has read, and which of the texts they hold. By this process and no child of
/// it: where memory is shown to those above alone, they are who started it.
fn memory_holds(pid: i32, texts: [&str; 2]) -> (usize, [bool; 2]) {
    use std::os::unix::fs::FileExt;
    /// Bytes of an area that are read: the CLI reserves more than it touches.
    const AREA: u64 = 64 << 20;
    /// Bytes that are read at once, and of the next ones to see what lies across.
    const STEP: usize = 1 << 20;
    const ACROSS: usize = 256;
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("mem");
    let (mut area, mut pages, mut held) = (0..0, 0, [false; 2]);
    let mut block = vec![0; STEP + ACROSS];
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let number = |text: &str| u64::from_str_radix(text, 16).expect("an address");
            let readable = words.next().is_some_and(|flags| flags.starts_with('r'));
            let (start, end) = (number(start), if readable { number(end) } else { number(start) });
            area = start..end.min(start.saturating_add(AREA));
        } else if first == "Rss:" && words.next() != Some("0") {
            let mut at = area.start;
            while at < area.end {
                let length = block.len().min((area.end - at) as usize);
                let Ok(read @ 1..) = memory.read_at(&mut block[..length], at) else { break };
                let text = String::from_utf8_lossy(&block[..read]);
                held = std::array::from_fn(|n| held[n] || text.contains(texts[n]));
                pages += read.min(STEP) / 4096;
                at += STEP as u64;
            }
        }
    }
    (pages, held)
}

#[test]
fn t51_the_placeholder_dies_with_its_run() {
    let server = server();
    let script = tempfile::NamedTempFile::new().expect("a file");
    fs::write(script.path(), CALL).expect("written");
    // By a command of the run's own; where there is none, from outside and beside it, under its uid.
    let call = |tenant: &str, shown: &str| -> String {
        if environment().commands {
            return server.says(tenant, &format!("RUN: python3 call.py {shown}"));
        }
        beside_a_run(&server, tenant, |pid| {
            let mut call = Command::new("python3");
            let output = call.arg(script.path()).args([shown, &pid.to_string()]).output().expect("python3");
            assert!(output.status.success(), "{output:?}");
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    };
    let tenants = ["a", "b"];
    if environment().commands {
        tenants.iter().for_each(|tenant| server.writes(tenant, "call.py", CALL));
    }
    // The control: while its run lives, the placeholder is taken.
    let first = call("a", "own");
    assert!(first.contains("status 200 placeholder sk-ant-oat01-"), "{first}");
    let old = first.rsplit_once("placeholder ").expect("one").1;
    let old: String = old.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
    assert_ne!(old, token("a"));
    let later = call("a", &old);
    assert!(later.contains("status 401") && !later.contains(&format!("placeholder {old}")), "{later}");
    // Another tenant has no use for it either, nor for a token of its own invention.
    for guess in [old.as_str(), "sk-ant-oat01-guess", &token("b")] {
        let said = call("b", guess);
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
    server.writes("canary", "own", "canary");
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
    let client = server.client();
    let asked = std::thread::spawn(move || {
        client.messages("canary", &ask("SLOW: 300 one two three four five six seven eight nine ten"))
    });
    let mut closed = std::collections::BTreeMap::new();
    while !asked.is_finished() {
        for process in processes(server.pid(), server.options.uids) {
            let pid = process.pid;
            assert!(!contains(&shown(pid), b"test-canary"), "{process:?}");
            // Who holds a token for a moment is not dumpable: nobody of its uid reads it, and it leaves no core.
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let confined = status.contains("Seccomp:\t2");
            // Between its execve and its first step it is open still, and has no token yet: looked at again.
            let known = closed.get(&pid).is_some_and(|found: &(Role, bool)| found.1);
            if confined && matches!(process.role, Role::Egress | Role::Frontend) && !known {
                closed.extend(is_closed(&process, server.pid()).map(|is| (pid, (process.role, is))));
            }
        }
    }
    let response = asked.join().expect("an answer");
    assert_eq!(response.status, 200, "{response:?}");
    if !environment().commands {
        // No shield holds there, and none is claimed: so nobody gets a command who could look.
        let security = server.client().request("GET", "/v1/security", &[], b"").json();
        let rows = security["layers"].as_array().expect("layers");
        let shield = rows.iter().find(|row| row["name"] == "process_shield").expect("a row");
        assert_eq!(shield["state"], "absent", "{security}");
        assert_eq!(server.says("canary", "RUN: id"), "[embedded] RUN: the request offers no tool Bash");
        return;
    }
    for role in [Role::Egress, Role::Frontend] {
        let found: Vec<bool> = closed.values().filter(|it| it.0 == role).map(|it| it.1).collect();
        assert!(!found.is_empty() && found.iter().all(|closed| *closed), "{role:?} can be traced: {found:?}");
    }
}

/// Whether a process is closed to others of its own uid; `None` where it has just ended.
fn is_closed(process: &Process, supervisor: i32) -> Option<bool> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).ok();
    // The supervisor's own is closed to its uid too, where it is not in a namespace of ours.
    let other = namespace(&supervisor.to_string()).is_some_and(|found| Some(found) != namespace("self"));
    if !other || !environment().full_proc {
        // What /proc shows of it is root's then, and not its own.
        let owner = fs::metadata(format!("/proc/{}/environ", process.pid)).ok()?.uid();
        assert_ne!(process.uid, 0, "{process:?}");
        return Some(owner == 0);
    }
    // In a user namespace its root is an ordinary user's, who made it and may do all in it: so somebody else
    // there, without a capability, tries it. The control: they can read their own kind.
    let look =
        "cat /proc/$$/environ /proc/self/environ > /dev/null && echo control; cat /proc/$1/environ 2>&1";
    let mut other = Command::new("nsenter");
    other.args(["--user", "--preserve-credentials", "--target", &supervisor.to_string(), "setpriv"]);
    other.args(["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "sh", "-c", look, "sh"]);
    let output = other.arg(process.pid.to_string()).output().expect("nsenter");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(said.starts_with("control\n"), "{said}");
    (!said.contains("No such")).then(|| said.contains("Permission denied"))
}
