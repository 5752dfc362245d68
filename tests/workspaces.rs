//! Workspaces and their files over HTTP, each request a run in its tenant's cage; and what hostile archives and agents
//! make of them. Needs root and the CLI. It must never judge by a tenant's word where a canary can be looked at.

mod support;

use std::io::Write;
use std::time::Instant;

use serde_json::{Value, json};
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
    let baseline = server.baseline();
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
    // A hundred thousand entries are an archive like any other.
    let names: Vec<String> = (0..100_000).map(|n| format!("d{}/f{n}", n % 100)).collect();
    let entries: Vec<(u8, &str, &str, &[u8])> =
        names.iter().map(|name| (b'0', name.as_str(), "", &b""[..])).collect();
    let begun = Instant::now();
    let many = request(&client, "a", "POST", upload, &tar_gz(&entries));
    assert_eq!(many.status, 200, "{many:?}");
    assert_eq!(many.json()["entries"], 100_000);
    println!("100000 entries in {:?}", begun.elapsed());
    let tree = get(&client, "a", "/v1/workspaces/default/tree?limit=3").json();
    assert_eq!((tree["data"].as_array().map(Vec::len), &tree["has_more"]), (Some(3), &json!(true)));
    // Every mode of these entries was 6755.
    assert_eq!(tree["data"][1]["executable"], true);
    assert_eq!(request(&client, "a", "DELETE", "/v1/workspaces/default", b"").status, 200);
    server.settles_to(&baseline);
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
    let baseline = server.baseline();
    // Half of a body, and then nothing more.
    let mut stream = client.connect().expect("a connection");
    let (name, value) = bearer("a");
    let head = format!(
        "PUT /v1/workspaces/default/files/f HTTP/1.1\r\nhost: x\r\n{name}: {value}\r\ncontent-length: 1000000\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).expect("sent");
    stream.write_all(&[b'n'; 500_000]).expect("sent");
    drop(stream);
    server.settles_to(&baseline);
    assert_eq!(get(&client, "a", "/v1/workspaces/default/files/f").body, b"old");
    let tree = get(&client, "a", "/v1/workspaces/default/tree").json();
    assert_eq!(tree["data"].as_array().map(Vec::len), Some(1), "{tree}");
    // A download that nobody reads.
    let big = vec![b'b'; 30 << 20];
    assert_eq!(request(&client, "a", "PUT", "/v1/workspaces/default/files/big", &big).status, 200);
    let stream = client.connect().expect("a connection");
    client.send(&stream, "GET", "/v1/workspaces/default/files/big", &[bearer("a")], b"").expect("sent");
    drop(stream);
    server.settles_to(&baseline);
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
    for url in
        ["http://github.com/x/y", "file:///etc", "ext::sh -c id", "/etc", "https://u:p@github.com/x/y", "-x"]
    {
        let refused = clone(url);
        assert_eq!(code(&refused), (400, "clone_failed".into()), "{refused:?}");
        assert!(refused.complaint().contains("git.url: must be https://HOST/PATH"), "{refused:?}");
    }
    // No host that the level does not list, and no address of this machine.
    for url in ["https://example.com/x/y", "https://127.0.0.1/x", "https://169.254.169.254/x"] {
        let refused = clone(url);
        assert_eq!(code(&refused), (400, "clone_failed".into()), "{refused:?}");
        assert!(refused.complaint().contains("403"), "{refused:?}");
    }
    let list: Value = get(&client, "a", "/v1/workspaces").json();
    assert_eq!(list["data"].as_array().map(Vec::len), Some(1), "{list}");
}
