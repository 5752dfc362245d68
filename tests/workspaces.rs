//! Workspaces and their files over HTTP, each request a run in its tenant's cage; and what hostile archives and agents
//! make of them. Needs root and the CLI. It must never judge by a tenant's word where a canary can be looked at.

mod support;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use serde_json::{Value, json};
use support::traces::{Role, processes};
use support::{Client, Options, Response, Server, ask, bearer, environment};

const SESSION: &str = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";

fn request(client: &Client, tenant: &str, method: &str, path: &str, body: &[u8]) -> Response {
    client.request(method, path, &[bearer(tenant)], body)
}

fn get(client: &Client, tenant: &str, path: &str) -> Response {
    request(client, tenant, "GET", path, b"")
}

fn code(response: &Response) -> (u16, String) {
    let code = response.json()["error"]["details"]["error_code"].clone();
    (response.status, code.as_str().unwrap_or_default().to_owned())
}

/// A new workspace's path.
fn make(client: &Client, tenant: &str) -> (String, String) {
    let made = request(client, tenant, "POST", "/v1/workspaces", br#"{"title":"mine"}"#);
    assert_eq!(made.status, 201, "{made:?}");
    let id = made.json()["id"].as_str().expect("an id").to_owned();
    (format!("/v1/workspaces/{id}"), id)
}

/// A tar archive by its entries: type, name, target, bytes.
fn tar_gz(entries: &[(u8, &str, &str, &[u8])]) -> Vec<u8> {
    let mut tar = Vec::new();
    for (kind, name, target, body) in entries {
        let mut header = [0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, b"0006755\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}\0", body.len()).as_bytes());
        put(136, b"00000000000\0");
        put(148, b"        ");
        put(156, &[*kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend_from_slice(&header);
        tar.extend_from_slice(body);
        tar.resize(tar.len().div_ceil(512) * 512, 0);
    }
    tar.extend_from_slice(&[0; 1024]);
    gzip(&tar)
}

/// By the host's own gzip: these suites link no packer.
fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut child = std::process::Command::new("gzip")
        .args(["-1", "-c"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("gzip");
    let mut stdin = child.stdin.take().expect("a pipe");
    let bytes = bytes.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&bytes).expect("fed"));
    let packed = child.wait_with_output().expect("packed").stdout;
    feeder.join().expect("fed");
    packed
}

#[test]
fn t117_a_workspace_is_made_filled_looked_at_kept_and_removed() {
    let server = Server::start(Options::default());
    let client = server.client();
    let list = get(&client, "a", "/v1/workspaces");
    assert_eq!(list.json()["data"][0]["id"], "default", "a tenant's first request may be this one: {list:?}");
    let (path, id) = make(&client, "a");
    let put = request(&client, "a", "PUT", &format!("{path}/files/src/a%20b.txt"), b"one\ntwo\n");
    assert_eq!(put.json(), json!({"path": "src/a b.txt", "bytes": 8, "created": true}));
    let file = get(&client, "a", &format!("{path}/files/src/a%20b.txt"));
    assert_eq!((file.status, file.body.as_slice(), file.whole), (200, &b"one\ntwo\n"[..], true));
    assert_eq!(file.header("content-length"), Some("8"));

    // A run works there; its session stays there, whoever asks.
    let mut body = ask("READ: src/a b.txt");
    body["workspace_id"] = id.as_str().into();
    body["session_id"] = SESSION.into();
    let said = client.messages("a", &body);
    assert!(said.status == 200 && said.text().contains("two"), "{said:?}");
    body.as_object_mut().expect("fields").remove("workspace_id");
    assert!(client.messages("a", &body).text().contains("two"), "the session remembers where it was begun");
    body["workspace_id"] = "default".into();
    assert_eq!(code(&client.messages("a", &body)), (409, "workspace_conflict".into()));
    let listed = get(&client, "a", &format!("/v1/sessions/{SESSION}"));
    assert_eq!(listed.json()["workspace_id"], id.as_str());

    let snapshot = request(&client, "a", "POST", &format!("{path}/snapshots"), b"");
    assert_eq!(snapshot.status, 201, "{snapshot:?}");
    let kept = snapshot.json()["id"].as_str().expect("an id").to_owned();
    request(&client, "a", "PUT", &format!("{path}/files/src/a%20b.txt"), b"one\n2\n");
    let diff = get(&client, "a", &format!("{path}/diff?from={kept}"));
    assert!(String::from_utf8_lossy(&diff.body).contains("-two\n+2\n"), "{diff:?}");
    let diff = get(&client, "a", &format!("{path}/diff?format=json&from={kept}"));
    assert_eq!(diff.json()["data"][0]["status"], "changed");
    let restored = request(&client, "a", "POST", &format!("{path}/snapshots/{kept}/restore"), b"");
    assert_eq!(restored.status, 200, "{restored:?}");
    assert_eq!(get(&client, "a", &format!("{path}/files/src/a%20b.txt")).body, b"one\ntwo\n");

    for format in ["tar.gz", "zip"] {
        let packed = get(&client, "a", &format!("{path}/archive?format={format}"));
        assert!(packed.status == 200 && packed.whole, "{packed:?}");
        let upload = format!("{path}/upload?format={format}&path=copy/{format}");
        let unpacked = request(&client, "a", "POST", &upload, &packed.body);
        assert_eq!(unpacked.status, 200, "{unpacked:?}");
        let file = get(&client, "a", &format!("{path}/files/copy/{format}/src/a%20b.txt"));
        assert_eq!(file.body, b"one\ntwo\n", "{format}");
    }
    let tree = get(&client, "a", &format!("{path}/tree?path=copy&depth=1")).json();
    assert_eq!(tree["data"].as_array().map(Vec::len), Some(2), "{tree}");
    let whole = get(&client, "a", &path).json();
    assert!(whole["usage"]["files"].as_u64() >= Some(8), "{whole}");
    assert!(whole["quota"]["used_bytes"].as_u64() > whole["usage"]["bytes"].as_u64(), "{whole}");
    for (method, rest) in [("DELETE", format!("/snapshots/{kept}")), ("DELETE", "/files/src".to_owned())] {
        assert_eq!(request(&client, "a", method, &format!("{path}{rest}"), b"").status, 200, "{rest}");
    }
    assert_eq!(
        code(&get(&client, "a", &format!("{path}/files/src/a%20b.txt"))),
        (404, "file_not_found".into())
    );
    assert_eq!(request(&client, "a", "DELETE", &path, b"").status, 200);
    assert_eq!(code(&get(&client, "a", &path)), (404, "workspace_not_found".into()));
    body.as_object_mut().expect("fields").remove("workspace_id");
    assert_eq!(
        code(&client.messages("a", &body)),
        (404, "workspace_not_found".into()),
        "its session has no place"
    );
}

#[test]
fn t118_nobody_reaches_anothers_workspace_or_files() {
    let server = Server::start(Options::default());
    let client = server.client();
    let (path, id) = make(&client, "a");
    request(&client, "a", "PUT", &format!("{path}/files/secret.txt"), b"KEY=1");
    let kept = request(&client, "a", "POST", &format!("{path}/snapshots"), b"").json()["id"].clone();
    let kept = kept.as_str().expect("an id");
    let list = get(&client, "b", "/v1/workspaces").json();
    assert_eq!(list["data"].as_array().map(Vec::len), Some(1), "{list}");
    let missing = path.replace(&id[..4], "0000");
    let zip = tar_gz(&[(b'0', "new", "", b"x")]);
    let rows: [(&str, String, &[u8]); 13] = [
        ("GET", String::new(), b""),
        ("DELETE", String::new(), b""),
        ("GET", "/files/secret.txt".into(), b""),
        ("PUT", "/files/secret.txt".into(), b"mine"),
        ("DELETE", "/files/secret.txt".into(), b""),
        ("GET", "/tree".into(), b""),
        ("GET", "/archive".into(), b""),
        ("POST", "/upload?format=tar.gz".into(), &zip),
        ("GET", "/snapshots".into(), b""),
        ("POST", "/snapshots".into(), b""),
        ("POST", format!("/snapshots/{kept}/restore"), b""),
        ("DELETE", format!("/snapshots/{kept}"), b""),
        ("GET", format!("/diff?from={kept}"), b""),
    ];
    for (method, rest, body) in &rows {
        let theirs = request(&client, "b", method, &format!("{path}{rest}"), body);
        let none = request(&client, "b", method, &format!("{missing}{rest}"), body);
        assert_eq!(code(&theirs), (404, "workspace_not_found".into()), "{method} {rest}");
        let plain = |response: &Response| (response.status, response.json()["error"].clone());
        assert_eq!(plain(&theirs), plain(&none), "{method} {rest}");
    }
    let mut body = ask("hello");
    body["workspace_id"] = id.as_str().into();
    assert_eq!(code(&client.messages("b", &body)), (404, "workspace_not_found".into()));
    // B's agent makes links to where A's files are; they lead nowhere, for every request.
    let tenants: Vec<_> =
        std::fs::read_dir(server.state.join("tenants")).expect("tenants").flatten().collect();
    for tenant in &tenants {
        let target = tenant.path().join("workspaces").join(&id).display().to_string();
        let link = tar_gz(&[(b'2', "out", &target[..target.len().min(99)], b"")]);
        let refused = request(&client, "b", "POST", "/v1/workspaces/default/upload?format=tar.gz", &link);
        assert_eq!(code(&refused), (400, "unsafe_archive".into()), "{refused:?}");
        if environment().commands {
            server.says("b", &format!("RUN: ln -sfn {target} out; ls -la"));
            let read = get(&client, "b", "/v1/workspaces/default/files/out/secret.txt");
            assert_eq!(code(&read), (404, "file_not_found".into()));
            let write = request(&client, "b", "PUT", "/v1/workspaces/default/files/out/new", b"x");
            assert_eq!(code(&write), (409, "path_conflict".into()));
            assert_eq!(request(&client, "b", "DELETE", "/v1/workspaces/default/files/out", b"").status, 200);
        }
    }
    assert_eq!(get(&client, "a", &format!("{path}/files/secret.txt")).body, b"KEY=1");
    assert_eq!(get(&client, "a", &format!("{path}/tree")).json()["data"].as_array().map(Vec::len), Some(1));
}

#[test]
fn t119_a_hostile_archive_harms_nobody_and_leaves_nothing() {
    let server = Server::start(Options::default().with("GAOLER_RUNS__TENANT_MAX", 4));
    let client = server.client();
    let upload = "/v1/workspaces/default/upload?format=tar.gz";
    assert_eq!(get(&client, "a", "/v1/workspaces").status, 200);
    let baseline = environment().full_proc.then(|| server.baseline());
    for entries in [
        &[(b'0', "../../evil", "", &b"x"[..])][..],
        &[(b'0', "/evil", "", b"x")],
        &[(b'2', "l", "/", b""), (b'0', "l/evil", "", b"x")],
        &[(b'2', "l", "..", b"")],
        &[(b'1', "h", "/etc/passwd", b"")],
        &[(b'3', "d", "", b"")],
        &[(b'4', "d", "", b"")],
        &[(b'6', "p", "", b"")],
    ] {
        let refused = request(&client, "a", "POST", upload, &tar_gz(entries));
        assert_eq!(code(&refused), (400, "unsafe_archive".into()), "{entries:?}");
    }
    // More than a tenant's part of the disk, and more than 250 times its own size.
    let limits = [bearer("a"), ("x-gaoler-limits", "disk_mib=8".to_owned())];
    let zeros = vec![0; 40 << 20];
    let bomb = tar_gz(&[(b'0', "zeros", "", &zeros)]);
    let refused = client.request("POST", upload, &limits, &bomb);
    assert_eq!(code(&refused), (413, "workspace_full".into()), "{refused:?}");
    // gzip's fast way packs zeros 1:220, twice packed they are a bomb.
    let tree = get(&client, "a", "/v1/workspaces/default/tree").json();
    assert_eq!(tree["data"], json!([]), "{tree}");
    // A hundred thousand entries are an archive like any other; where each call costs a hundred times more, fewer.
    let count = if environment().slower > 1 { 5_000 } else { 100_000 };
    let names: Vec<String> = (0..count).map(|n| format!("d{}/f{n}", n % 100)).collect();
    let entries: Vec<(u8, &str, &str, &[u8])> =
        names.iter().map(|name| (b'0', name.as_str(), "", &b""[..])).collect();
    let begun = Instant::now();
    let many = request(&client, "a", "POST", upload, &tar_gz(&entries));
    assert_eq!(many.status, 200, "{many:?}");
    assert_eq!(many.json()["entries"], count);
    println!("{count} entries in {:?}", begun.elapsed());
    let tree = get(&client, "a", "/v1/workspaces/default/tree?limit=3").json();
    assert_eq!((tree["data"].as_array().map(Vec::len), &tree["has_more"]), (Some(3), &json!(true)));
    // Every mode of these entries was 6755.
    assert_eq!(tree["data"][1]["executable"], true);
    assert_eq!(request(&client, "a", "DELETE", "/v1/workspaces/default", b"").status, 200);
    baseline.iter().for_each(|baseline| server.settles_to(baseline));
    if environment().sees {
        let tenant =
            std::fs::read_dir(server.state.join("tenants")).expect("tenants").flatten().next().expect("one");
        let drafts = tenant.path().join("workspaces/.drafts");
        assert_eq!(std::fs::read_dir(drafts).expect("drafts").count(), 0);
    }
}

#[test]
fn t120_an_upload_that_breaks_off_and_a_client_that_goes_leave_nothing() {
    let server = Server::start(Options::default());
    let client = server.client();
    assert_eq!(request(&client, "a", "PUT", "/v1/workspaces/default/files/f", b"old").status, 200);
    let baseline = environment().full_proc.then(|| server.baseline());
    // Half of a body, and then nothing more.
    let mut stream = client.connect().expect("a connection");
    let (name, value) = bearer("a");
    let head = format!(
        "PUT /v1/workspaces/default/files/f HTTP/1.1\r\nhost: x\r\n{name}: {value}\r\ncontent-length: 1000000\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).expect("sent");
    stream.write_all(&[b'n'; 500_000]).expect("sent");
    drop(stream);
    baseline.iter().for_each(|baseline| server.settles_to(baseline));
    assert_eq!(get(&client, "a", "/v1/workspaces/default/files/f").body, b"old");
    let tree = get(&client, "a", "/v1/workspaces/default/tree").json();
    assert_eq!(tree["data"].as_array().map(Vec::len), Some(1), "{tree}");
    // A download that nobody reads.
    let big = vec![b'b'; 30 << 20];
    assert_eq!(request(&client, "a", "PUT", "/v1/workspaces/default/files/big", &big).status, 200);
    let stream = client.connect().expect("a connection");
    client.send(&stream, "GET", "/v1/workspaces/default/files/big", &[bearer("a")], b"").expect("sent");
    drop(stream);
    baseline.iter().for_each(|baseline| server.settles_to(baseline));
    let whole = get(&client, "a", "/v1/workspaces/default/files/big");
    assert!(whole.whole && whole.body == big);
    let packed = get(&client, "a", "/v1/workspaces/default/archive");
    assert!(packed.whole && packed.body.starts_with(&[0x1f, 0x8b]));
}

#[test]
fn t121_only_https_is_cloned_and_only_through_the_levels_proxy() {
    if !environment().commands {
        return;
    }
    let server = Server::start(Options::default());
    let client = server.client();
    let clone = |url: &str| -> Response {
        let body = json!({"git": {"url": url, "depth": 1}}).to_string();
        request(&client, "a", "POST", "/v1/workspaces", body.as_bytes())
    };
    let started = || server.log().matches("\"event\":\"spawned\"").count();
    let before = started();
    for url in
        ["http://github.com/x/y", "file:///etc", "ext::sh -c id", "/etc", "https://u:p@github.com/x/y", "-x"]
    {
        let refused = clone(url);
        assert_eq!(code(&refused), (400, "clone_failed".into()), "{refused:?}");
        let complaint = refused.complaint();
        let form = ["git.url: must be https://HOST/PATH", "git.url: must not hold a user or password"];
        assert!(form.iter().any(|form| complaint.contains(form)), "{refused:?}");
    }
    // No address of this machine or of its network.
    for url in
        ["https://127.0.0.1/x", "https://169.254.169.254/x", "https://[::1]/x", "https://git.internal/x"]
    {
        let refused = clone(url);
        assert_eq!(code(&refused), (400, "clone_failed".into()), "{refused:?}");
        assert!(
            refused.complaint().contains("git.url: must name a host of the public internet"),
            "{refused:?}"
        );
    }
    assert_eq!(started(), before, "nothing was started");
    // No host that the level does not list. This tenant is known by now, so nobody asks the upstream about it first.
    get(&client, "a", "/v1/workspaces");
    let before = started();
    let refused = clone("https://example.com/x/y");
    assert_eq!(code(&refused), (400, "clone_failed".into()), "{refused:?}");
    assert!(refused.complaint().contains("403"), "{refused:?}");
    assert_eq!(started(), before + 1, "and that was");
    let list: Value = get(&client, "a", "/v1/workspaces").json();
    assert_eq!(list["data"].as_array().map(Vec::len), Some(1), "{list}");
}

/// What opens the private repositories of these tests.
const OPENS: &str = "of-the-git-tests-0123456789abcdef";

/// A host of repositories on loopback: git's own server side, with a login where the first part of the path says so.
struct GitHost {
    address: String,
    /// The heads of all requests.
    seen: Arc<Mutex<Vec<String>>>,
    /// The first request below `/held` that asks for something has come, and waits for a word.
    held: Mutex<mpsc::Receiver<mpsc::Sender<()>>>,
    _folder: tempfile::TempDir,
}

impl GitHost {
    fn start() -> GitHost {
        let folder = tempfile::tempdir().expect("a folder");
        let git = |words: &[&str]| {
            let mut command = Command::new("git");
            command.current_dir(folder.path()).args(["-c", "user.name=a", "-c", "user.email=a@b.c"]);
            let output = command.args(words).output().expect("git");
            assert!(output.status.success(), "{words:?}: {output:?}");
        };
        git(&["init", "-q", "-b", "main", "work"]);
        std::fs::write(folder.path().join("work/README"), "from the host\n").expect("written");
        // Large enough that git asks in more than one piece, and small enough for anybody.
        let noise: Vec<u8> =
            (0..200_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        std::fs::write(folder.path().join("work/noise"), noise).expect("written");
        for (words, name) in [("first", "v1"), ("second", "v2")] {
            std::fs::write(folder.path().join("work/word"), words).expect("written");
            git(&["-C", "work", "add", "."]);
            git(&["-C", "work", "commit", "-qm", words]);
            git(&["-C", "work", "tag", name]);
        }
        git(&["clone", "-q", "--bare", "work", "repository.git"]);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let seen = Arc::<Mutex<Vec<String>>>::default();
        let (arrived, held) = mpsc::channel();
        let (root, heads, own) = (folder.path().to_owned(), Arc::clone(&seen), address.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (root, heads, own, arrived) =
                    (root.clone(), Arc::clone(&heads), own.clone(), arrived.clone());
                std::thread::spawn(move || drop(answer(stream, &root, &heads, &own, &arrived)));
            }
        });
        GitHost { address, seen, held: Mutex::new(held), _folder: folder }
    }

    fn url(&self, first: &str) -> String {
        format!("http://{}/{first}/repository.git", self.address)
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().expect("no panic").clone()
    }
}

/// One request to such a host.
fn answer(
    stream: TcpStream,
    root: &Path,
    heads: &Mutex<Vec<String>>,
    own: &str,
    arrived: &mpsc::Sender<mpsc::Sender<()>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(());
        }
    }
    let is_first = {
        let mut heads = heads.lock().expect("no panic");
        // git asks for names, and then for what they stand for: one of the two is held.
        let held = |head: &String| head.starts_with("POST /held");
        let is_first = held(&head) && !heads.iter().any(held);
        heads.push(head.clone());
        is_first
    };
    let field = |name: &str| {
        let mut lines = head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
    };
    let mut body = vec![0; field("content-length").and_then(|length| length.parse().ok()).unwrap_or(0)];
    reader.read_exact(&mut body)?;
    if field("transfer-encoding").is_some() {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let length = usize::from_str_radix(line.trim(), 16).expect("a chunk's length");
            let mut chunk = vec![0; length + 2];
            reader.read_exact(&mut chunk)?;
            body.extend_from_slice(&chunk[..length]);
            if length == 0 {
                break;
            }
        }
    }
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (first, rest) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
    let mut stream = stream;
    let login = field("authorization").unwrap_or_default();
    let mut tell = |status: &str, more: &str| {
        write!(stream, "HTTP/1.1 {status}\r\n{more}content-length: 0\r\nconnection: close\r\n\r\n")
    };
    match first {
        "moved" => return tell("301 Moved", &format!("location: http://{own}/private/{rest}?{query}\r\n")),
        "away" => return tell("302 Found", &format!("location: https://example.com/{rest}?{query}\r\n")),
        "private" | "held" if login != basic("x-access-token", OPENS) => {
            return tell("401 Unauthorized", "www-authenticate: Basic realm=\"git\"\r\n");
        }
        "held" if is_first => {
            let (go_on, word) = mpsc::channel();
            arrived.send(go_on).expect("somebody waits");
            let _ = word.recv();
        }
        _ => {}
    }
    let mut child = Command::new("git")
        .args(["-c", "safe.directory=*", "http-backend"])
        .envs([("GIT_PROJECT_ROOT", root.as_os_str()), ("GIT_HTTP_EXPORT_ALL", OsStr::new("1"))])
        .envs([("PATH_INFO", format!("/{rest}")), ("QUERY_STRING", query.to_owned())])
        .envs([("REQUEST_METHOD", method.to_owned()), ("CONTENT_LENGTH", body.len().to_string())])
        .env("CONTENT_TYPE", field("content-type").unwrap_or_default())
        .env("HTTP_CONTENT_ENCODING", field("content-encoding").unwrap_or_default())
        .env("GIT_PROTOCOL", field("git-protocol").unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdin.take().expect("a pipe").write_all(&body)?;
    let output = child.wait_with_output()?.stdout;
    let end = output.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
    let told = String::from_utf8_lossy(&output[..end]).into_owned();
    let status = told.lines().find_map(|line| line.strip_prefix("Status: ")).unwrap_or("200 OK");
    let rest: String =
        told.lines().filter(|line| !line.starts_with("Status")).map(|line| format!("{line}\r\n")).collect();
    let length = output.len() - end - 4;
    write!(stream, "HTTP/1.1 {status}\r\n{rest}content-length: {length}\r\nconnection: close\r\n\r\n")?;
    stream.write_all(&output[end + 4..])
}

/// A login as it stands in a header.
fn basic(user: &str, password: &str) -> String {
    let line = format!("{user}:{password}");
    let output =
        Command::new("base64").args(["-w", "0"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = output.expect("base64");
    child.stdin.take().expect("a pipe").write_all(line.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("its words");
    format!("Basic {}", String::from_utf8(output.stdout).expect("UTF-8"))
}

fn clone(client: &Client, git: Value) -> Response {
    let body = json!({ "git": git }).to_string();
    request(client, "a", "POST", "/v1/workspaces", body.as_bytes())
}

/// The files of a workspace, by their paths.
fn cloned(made: &Response) -> String {
    assert_eq!(made.status, 201, "{made:?}");
    format!("/v1/workspaces/{}/files", made.json()["id"].as_str().expect("an id"))
}

#[test]
fn t231_a_repository_is_cloned_and_a_private_one_with_a_token_alone() {
    if !environment().commands {
        return;
    }
    let host = GitHost::start();
    let server = Server::start(Options::default().with("GAOLER_MCP__INTERNAL", json!([host.address])));
    let client = server.client();
    // A public one, whole, and by a tag with one commit of history.
    let files = cloned(&clone(&client, json!({"url": host.url("open")})));
    assert_eq!(get(&client, "a", &format!("{files}/README")).body, b"from the host\n");
    assert_eq!(get(&client, "a", &format!("{files}/word")).body, b"second");
    assert_eq!(get(&client, "a", &format!("{files}/noise")).body.len(), 800_000);
    let files = cloned(&clone(&client, json!({"url": host.url("open"), "ref": "v1", "depth": 1})));
    assert_eq!(get(&client, "a", &format!("{files}/word")).body, b"first");
    assert!(host.seen().iter().all(|head| !head.to_ascii_lowercase().contains("authorization:")));
    // A private one: with its token, and with it alone.
    let made = clone(&client, json!({"url": host.url("private"), "token": OPENS}));
    let files = cloned(&made);
    assert_eq!(get(&client, "a", &format!("{files}/word")).body, b"second");
    assert_eq!(made.json()["origin"], host.url("private"));
    for refused in
        [json!({"url": host.url("private")}), json!({"url": host.url("private"), "token": "wrong"})]
    {
        let refused = clone(&client, refused);
        assert_eq!(code(&refused), (400, "clone_failed".into()), "{refused:?}");
        assert!(refused.complaint().contains("git.token"), "{refused:?}");
    }
    let user = json!({"url": host.url("private"), "token": OPENS, "username": "somebody-else"});
    assert_eq!(code(&clone(&client, user)), (400, "clone_failed".into()));
    let missing = clone(&client, json!({"url": format!("{}x", host.url("open")), "token": OPENS}));
    assert_eq!(code(&missing), (400, "clone_failed".into()));
    assert!(
        missing.complaint().contains(&host.address) && !missing.complaint().contains("invalid/"),
        "{missing:?}"
    );
    // A host that points to a place of its own is followed; one that points elsewhere is not given away.
    cloned(&clone(&client, json!({"url": host.url("moved"), "token": OPENS})));
    let away = clone(&client, json!({"url": host.url("away"), "token": OPENS}));
    assert_eq!(code(&away), (400, "clone_failed".into()), "{away:?}");
    assert!(away.complaint().contains("403") || away.complaint().contains("example.com"), "{away:?}");
    // A place that nobody named, and a form that is wrong, are refused before anything starts.
    let before = host.seen().len();
    for git in [
        json!({"url": host.url("private").replace(&host.address, "127.0.0.1:1"), "token": OPENS}),
        json!({"url": "https://git.example.com:8443/a", "token": OPENS}),
        json!({"url": host.url("private"), "token": "a b"}),
        json!({"url": host.url("private"), "username": "a"}),
    ] {
        let refused = clone(&client, git.clone());
        assert_eq!(code(&refused), (400, "invalid_request".into()), "{git}: {refused:?}");
        assert!(!refused.complaint().contains(OPENS), "{refused:?}");
    }
    // Another host than the level's, with a token too.
    let closed = clone(&client, json!({"url": "https://example.com/x/y", "token": OPENS}));
    assert_eq!(code(&closed), (400, "clone_failed".into()), "{closed:?}");
    assert!(closed.complaint().contains("403") && !closed.complaint().contains(OPENS), "{closed:?}");
    assert_eq!(host.seen().len(), before);
    assert!(!server.log().contains(OPENS));
}

/// Whether a process has one of these words anywhere: its command line, its environment, or its memory.
fn has(pid: i32, words: &[&[u8]]) -> bool {
    let finds = |bytes: &[u8]| words.iter().any(|word| bytes.windows(word.len()).any(|found| found == *word));
    let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    if finds(&read("cmdline")) || finds(&read("environ")) {
        return true;
    }
    let Ok(memory) = std::fs::File::open(format!("/proc/{pid}/mem")) else { return false };
    String::from_utf8_lossy(&read("maps")).lines().any(|line| {
        let (range, rest) = line.split_once(' ').unwrap_or_default();
        let (from, to) = range.split_once('-').unwrap_or_default();
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap_or(0);
        let (from, to) = (number(from), number(to));
        // What is only reserved is as long as it likes; what came over a wire is where a process writes.
        let mut bytes = vec![0; usize::try_from(to - from).unwrap_or(0).min(1 << 26)];
        rest.starts_with("rw") && memory.read_at(&mut bytes, from).is_ok_and(|length| finds(&bytes[..length]))
    })
}

/// Files below a folder that have one of these words.
fn files_with(folder: &Path, words: &[&[u8]]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().expect("a type"));
        if kind.is_dir() {
            found.extend(files_with(&path, words));
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let finds = |word: &&[u8]| bytes.windows(word.len()).any(|found| found == *word);
            found.extend(words.iter().any(finds).then_some(path));
        }
    }
    found
}

#[test]
fn t253_a_clone_is_counted_like_a_run_that_asks_no_model() {
    if !environment().commands {
        return;
    }
    let host = GitHost::start();
    let server = Server::start(Options::default().with("GAOLER_MCP__INTERNAL", json!([host.address])));
    let client = server.client();
    let usage = || get(&client, "a", "/v1/usage").json();
    let day = |usage: &Value, name: &str| usage["data"][0][name].as_u64();
    assert_eq!(request(&client, "a", "POST", "/v1/workspaces", b"{}").status, 201);
    assert_eq!(usage()["data"], json!([]), "what stays inside is not counted");
    cloned(&clone(&client, json!({"url": host.url("open")})));
    let once = usage();
    assert_eq!((day(&once, "runs"), day(&once, "failed")), (Some(1), Some(0)), "{once}");
    assert_eq!((day(&once, "input_tokens"), day(&once, "requests")), (Some(0), Some(0)), "{once}");
    // The noise alone has 800,000 bytes, which nothing compresses to a quarter; and git says what it wants.
    let (up, down) = (day(&once, "bytes_up").expect("a sum"), day(&once, "bytes_down").expect("a sum"));
    assert!((200..100_000).contains(&up) && (200_000..2_000_000).contains(&down), "{once}");
    assert!(day(&once, "wall_ms") > Some(0), "{once}");
    // One that fails is counted with what it took, and so is one whose client goes away.
    let refused = clone(&client, json!({"url": host.url("private")}));
    assert_eq!(code(&refused), (400, "clone_failed".into()), "{refused:?}");
    let twice = usage();
    assert_eq!((day(&twice, "runs"), day(&twice, "failed")), (Some(2), Some(1)), "{twice}");
    assert!(day(&twice, "bytes_up") > Some(up), "{twice}");
    let body = json!({"git": {"url": host.url("held"), "token": OPENS}}).to_string();
    let stream = client.connect().expect("a connection");
    client.send(&stream, "POST", "/v1/workspaces", &[bearer("a")], body.as_bytes()).expect("sent");
    let held = host.held.lock().expect("no panic");
    let go_on = held.recv_timeout(support::patience()).expect("it asks");
    drop(stream);
    support::until("its end", || (day(&usage(), "runs") == Some(3)).then_some(()));
    assert!(day(&usage(), "failed") == Some(2) && day(&usage(), "bytes_up") > day(&twice, "bytes_up"));
    drop(go_on);
}

#[test]
fn t232_a_repositorys_token_is_never_in_the_cage_nor_in_what_was_cloned() {
    if !environment().commands || !environment().root_user {
        return;
    }
    let host = GitHost::start();
    let server = Server::start(Options::default().with("GAOLER_MCP__INTERNAL", json!([host.address])));
    let client = server.client();
    let login = basic("x-access-token", OPENS);
    let secret = login.strip_prefix("Basic ").expect("a login").to_owned();
    let words = [OPENS.as_bytes(), secret.as_bytes()];
    let git = json!({"url": host.url("held"), "token": OPENS});
    let cloning = {
        let client = server.client();
        std::thread::spawn(move || clone(&client, git))
    };
    // The host has the request and says nothing: now git waits in its cage.
    let patience = std::time::Duration::from_secs(60);
    let go_on = host.held.lock().expect("no panic").recv_timeout(patience).expect("a request");
    let all = processes(server.pid(), server.options.uids);
    let caged: Vec<_> = all.iter().filter(|it| it.is_caged()).collect();
    assert!(caged.iter().any(|it| it.name.starts_with("git")), "{caged:?}");
    for process in &caged {
        assert!(!has(process.pid, &words), "{process:?}");
    }
    // The look finds what is there: the cage's name for the host, and in egress what opens it.
    assert!(caged.iter().any(|it| has(it.pid, &[b"s0.git.invalid"])), "{caged:?}");
    assert!(all.iter().any(|it| it.role == Role::Egress && has(it.pid, &words)), "{all:?}");
    go_on.send(()).expect("it waits");
    let files = cloned(&cloning.join().expect("an answer"));
    let config = get(&client, "a", &format!("{files}/.git/config"));
    let config = String::from_utf8(config.body).expect("UTF-8");
    assert!(config.contains(&format!("url = {}\n", host.url("held"))), "{config}");
    assert!(!config.contains("invalid") && !config.contains("insteadOf"), "{config}");
    // Nothing of it is on the disk, and the origin is: so the look works there as well.
    assert_eq!(files_with(&server.state, &words), Vec::<PathBuf>::new());
    assert!(!files_with(&server.state, &[host.url("held").as_bytes()]).is_empty());
    assert!(!server.log().contains(OPENS) && !server.log().contains(&secret));
}

#[test]
fn t280_requests_that_race_for_one_thing_have_it_or_are_told_that_it_is_gone() {
    let server = Server::start(Options::with_double());
    let client = server.client();
    make(&client, "a");
    for round in 0..8 {
        let (path, _) = make(&client, "a");
        assert_eq!(request(&client, "a", "PUT", &format!("{path}/files/f"), b"text").status, 200);
        let session = format!("6f1c0f0e-8d2b-4c7e-9a51-{round:012x}");
        let mut turn = ask("hello");
        turn["session_id"] = session.as_str().into();
        assert_eq!(client.messages("a", &turn).status, 200);
        let conversation = format!("/v1/sessions/{session}");
        let (snapshots, file) = (format!("{path}/snapshots"), format!("{path}/files/f"));
        let asks: [(&str, &str, &[u8]); 8] = [
            ("POST", &snapshots, b"{}"),
            ("PUT", &file, b"other"),
            ("POST", &snapshots, b"{}"),
            ("DELETE", &conversation, b""),
            ("DELETE", &path, b""),
            ("DELETE", &conversation, b""),
            ("POST", &snapshots, b"{}"),
            ("DELETE", &path, b""),
        ];
        let (client, asks) = (&client, &asks);
        let answers: Vec<Response> = std::thread::scope(|scope| {
            let asked = asks
                .map(|(method, path, body)| scope.spawn(move || request(client, "a", method, path, body)));
            asked.into_iter().map(|it| it.join().expect("an answer")).collect()
        });
        let known = [200, 201, 404, 409];
        assert!(answers.iter().all(|answer| known.contains(&answer.status)), "round {round}: {answers:?}");
        // What somebody has removed nobody else has, and it is gone.
        for (path, places) in [(conversation.as_str(), [3, 5]), (path.as_str(), [4, 7])] {
            let removed = places.iter().filter(|at| answers[**at].status == 200).count();
            let there = get(client, "a", path).status;
            assert!(
                removed <= 1 && there == if removed == 1 { 404 } else { 200 },
                "round {round}: {answers:?}"
            );
        }
    }
}
