//! The document against the running frontend: every route answers as /openapi.json says, byte by byte where it is JSON.
//! It must never judge an answer by a schema of its own: the document comes from the frontend that is judged.

mod fake;

use std::collections::BTreeSet;

use fake::{BEARER, House, Play, Reply, Script, Until, recorded, settings};
use gaoler_protocol::{Reason, Refusal};
use serde_json::{Value, json};

const HELLO: &str = r#"{"messages":[{"role":"user","content":"Hello"}]}"#;
const HELLO_STREAMED: &str = r#"{"stream":true,"messages":[{"role":"user","content":"Hello"}]}"#;
const BROWSER: &str = "accept: text/html,application/xhtml+xml,*/*;q=0.8\r\n";

fn plays(name: &str) -> Script {
    Script::Play(Play::of(recorded(name)))
}

async fn house(scripts: Vec<Script>) -> House {
    House::new(settings(120), scripts).await
}

async fn get(house: &House, path: &str, headers: &str) -> Reply {
    house.request(&format!("GET {path} HTTP/1.1\r\n{headers}"), b"").await
}

/// The document, as a judge.
struct Document(Value);

impl Document {
    async fn of(house: &House) -> Document {
        let reply = get(house, "/openapi.json", "").await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
        Document(reply.json())
    }

    /// Judges by a schema, which may refer to others.
    fn judge(&self, schema: &Value, value: &Value, of: &str) {
        let mut root = schema.clone();
        root["components"] = self.0["components"].clone();
        let validator = jsonschema::validator_for(&root).expect("a schema");
        let errors: Vec<String> = validator.iter_errors(value).map(|error| error.to_string()).collect();
        assert_eq!(errors, Vec::<String>::new(), "{of}: {value}");
    }

    /// Judges a reply: its status, its headers, its kind and its body are all described.
    fn reply(&self, method: &str, path: &str, reply: &Reply) {
        let of = format!("{method} {path}: {}", reply.status);
        let operation = &self.0["paths"][path][method];
        assert!(operation.is_object(), "{of}");
        let response = &operation["responses"][reply.status.to_string()];
        assert!(response.is_object(), "{of} is not described");
        let described = response["headers"].as_object().expect("headers");
        for name in described.keys() {
            let component = described[name]["$ref"].as_str().expect("a reference").trim_start_matches('#');
            let header = self.0.pointer(component).expect("a header");
            let Some(value) = reply.header(name) else {
                assert!(header["required"] != true, "{of}: no {name}");
                continue;
            };
            let value = match header["schema"]["type"] == "integer" {
                true => json!(value.parse::<u64>().expect("a number")),
                false => json!(value),
            };
            if name != "request-id" {
                self.judge(&header["schema"], &value, name);
            }
        }
        let own = reply.head.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name);
        let own: Vec<&str> =
            own.filter(|name| name.starts_with("x-gaoler") || *name == "retry-after").collect();
        assert!(own.iter().all(|name| described.contains_key(*name)), "{of}: {own:?}");
        let kind = reply.header("content-type").and_then(|kind| kind.split(';').next()).expect("a kind");
        let content = &response["content"][kind];
        assert!(content.is_object(), "{of}: {kind} is not described");
        if kind == "application/json" {
            self.judge(&content["schema"], &reply.json(), &of);
        }
    }
}

#[tokio::test]
async fn d01_every_route_answers_as_the_document_says() {
    let mut settings = settings(120);
    settings.server.metrics = true;
    let house = House::new(settings, vec![plays("plain"), plays("plain")]).await;
    let document = Document::of(&house).await;
    let files = document.0["paths"]["/docs/{file}"]["get"]["parameters"][0]["schema"]["enum"].clone();
    let mut asked = BTreeSet::new();
    for (path, item) in document.0["paths"].as_object().expect("paths") {
        for method in item.as_object().expect("an item").keys() {
            asked.insert(path.clone());
            let reply = match (method.as_str(), path.as_str()) {
                ("post", "/v1/messages") => house.messages(HELLO).await,
                ("post", "/v1/chat/completions") => {
                    let head = format!("POST {path} HTTP/1.1\r\n");
                    document.reply(method, path, &house.request(&head, HELLO.as_bytes()).await);
                    house.request(&format!("{head}{BEARER}"), HELLO.as_bytes()).await
                }
                ("post", "/v1/mcp/probe") => {
                    let head = format!("POST {path} HTTP/1.1\r\n");
                    document.reply(
                        method,
                        path,
                        &house.request(&head, br#"{"mcp_servers":{"a":{"command":"x"}}}"#).await,
                    );
                    house.request(&format!("{head}{BEARER}"), b"{}").await
                }
                ("get", "/v1/mcp/catalog") => {
                    document.reply(method, path, &get(&house, path, "").await);
                    get(&house, path, BEARER).await
                }
                ("get", "/v1/models") => {
                    document.reply(method, path, &get(&house, path, "").await);
                    document.reply(method, path, &get(&house, "/v1/models?limit=0", BEARER).await);
                    get(&house, path, BEARER).await
                }
                ("get", "/v1/models/{id}") => {
                    document.reply(method, path, &get(&house, "/v1/models/nothing", BEARER).await);
                    get(&house, "/v1/models/opus", BEARER).await
                }
                ("post", "/v1/messages/count_tokens") => {
                    let head = format!("POST {path} HTTP/1.1\r\n");
                    document.reply(method, path, &house.request(&head, HELLO.as_bytes()).await);
                    let head = format!("{head}{BEARER}");
                    document.reply(method, path, &house.request(&head, b"{}").await);
                    house.request(&head, HELLO.as_bytes()).await
                }
                ("get", "/v1/runs") => {
                    document.reply(method, path, &get(&house, path, "").await);
                    get(&house, path, BEARER).await
                }
                (method, path) if path.starts_with("/v1/runs/") => {
                    let known = get(&house, "/v1/runs", BEARER).await.json();
                    let id = known["data"][0]["id"].as_str().expect("a run").to_owned();
                    let line = |id: &str| format!("{} {}", method.to_uppercase(), path.replace("{id}", id));
                    let none = format!("{} HTTP/1.1\r\n{BEARER}", line("none"));
                    document.reply(method, path, &house.request(&none, b"").await);
                    house.request(&format!("{} HTTP/1.1\r\n{BEARER}", line(&id)), b"").await
                }
                ("get", "/docs/{file}") => {
                    for file in files.as_array().expect("files") {
                        let reply =
                            get(&house, &format!("/docs/{}", file.as_str().expect("a name")), "").await;
                        assert_eq!(reply.status, 200, "{file}");
                        document.reply("get", path, &reply);
                    }
                    get(&house, "/docs/nothing.js", "").await
                }
                // What these do is a run's; d12 has it. Here nobody asks.
                (method, path) if path.starts_with("/v1/sessions") || path.starts_with("/v1/workspaces") => {
                    let head = format!("{} {path} HTTP/1.1\r\n", method.to_uppercase());
                    house.request(&head, b"").await
                }
                ("put" | "delete", path) => {
                    let head = format!("{} {path} HTTP/1.1\r\n", method.to_ascii_uppercase());
                    document.reply(method, path, &house.request(&head, b"{}").await);
                    house.request(&format!("{head}{BEARER}"), b"{}").await
                }
                ("post", path) if path.starts_with("/admin/") => {
                    let head = format!("POST {path} HTTP/1.1\r\n");
                    document.reply(method, path, &house.request(&head, b"{}").await);
                    house.request(&format!("{head}{BEARER}"), b"{}").await
                }
                ("get", path) => get(&house, path, "").await,
                other => panic!("this test knows no {other:?}: ask it, and judge the reply"),
            };
            document.reply(method, path, &reply);
            // Any other method is refused, and not described.
            let refused = house.request(&format!("PATCH {path} HTTP/1.1\r\n"), b"").await;
            assert_eq!((refused.status, refused.code().as_str()), (405, "method_not_allowed"), "{path}");
        }
    }
    assert!(asked.len() >= 10, "{asked:?}");
    document.reply("get", "/", &get(&house, "/", BROWSER).await);
}

#[tokio::test]
async fn d02_every_kind_of_answer_is_one_that_the_document_describes() {
    let names = [
        "plain",
        "thinking",
        "tool_use",
        "max_turns",
        "max_tokens",
        "refusal",
        "err400",
        "err401",
        "err403",
        "err404",
        "err413",
        "err429",
        "err500",
        "err529",
        "ratelimit_rejected",
    ];
    let reasons =
        [Reason::Oom, Reason::Wall, Reason::Idle, Reason::Tasks, Reason::Output, Reason::Disk, Reason::Locks];
    let mut scripts: Vec<Script> = names.iter().map(|name| plays(name)).collect();
    scripts.extend(Refusal::ALL.iter().map(|&reason| Script::Refuse(reason, 0)));
    scripts.extend(reasons.map(|reason| Script::Play(Play { reason, ..Play::of("").until(Until::Now) })));
    let runs = scripts.len();
    let house = house(scripts).await;
    let document = Document::of(&house).await;
    let thinking = r#"{"thinking":{"type":"enabled"},"messages":[{"role":"user","content":"Hello"}]}"#;
    let mut statuses = BTreeSet::new();
    for run in 0..runs {
        let reply = house.messages(if run == 1 { thinking } else { HELLO }).await;
        document.reply("post", "/v1/messages", &reply);
        statuses.insert(reply.status);
    }
    for (head, body) in [
        ("", HELLO),
        ("authorization: Bearer nonsense\r\n", HELLO),
        ("x-gaoler-level: developer\r\n", HELLO),
        ("content-encoding: gzip\r\n", HELLO),
        (BEARER, "{"),
        (BEARER, r#"{"session_id":"x","messages":[{"role":"user","content":"x"}]}"#),
        (BEARER, r#"{"model":"gpt-4","messages":[{"role":"user","content":"x"}]}"#),
    ] {
        let reply = house.request(&format!("POST /v1/messages HTTP/1.1\r\n{head}"), body.as_bytes()).await;
        document.reply("post", "/v1/messages", &reply);
        statuses.insert(reply.status);
    }
    for status in [200, 400, 401, 403, 404, 409, 413, 415, 429, 500, 503, 504, 529] {
        assert!(statuses.contains(&status), "{status} was never seen: {statuses:?}");
    }
}

#[tokio::test]
async fn d03_every_event_of_a_stream_is_one_that_the_document_describes() {
    let names = ["plain", "thinking", "tool_use", "midstream_error", "parallel_tools"];
    let mut house = house(names.iter().map(|name| plays(name)).collect()).await;
    let document = Document::of(&house).await;
    let schema = json!({"$ref": "#/components/schemas/StreamEvent"});
    let mut kinds = BTreeSet::new();
    for name in names {
        let thinking = HELLO_STREAMED.replace("{\"stream\"", r#"{"thinking":{"type":"enabled"},"stream""#);
        let reply = house.messages(&thinking).await;
        document.reply("post", "/v1/messages", &reply);
        for event in reply.body.split("\n\n").filter(|event| !event.is_empty()) {
            let data = event.split_once("\ndata: ").expect("data").1;
            let data: Value = serde_json::from_str(data).expect("JSON");
            document.judge(&schema, &data, name);
            kinds.insert(data["type"].as_str().unwrap_or_default().to_owned());
        }
        house.seen().await;
    }
    assert!(kinds.len() >= 6, "{kinds:?}");
}

#[tokio::test]
async fn d04_the_pages_load_nothing_from_elsewhere_and_run_no_script_of_anybody_else() {
    let house = house(vec![]).await;
    let document = Document::of(&house).await;
    for (path, headers) in
        [("/", BROWSER), ("/", ""), ("/docs", BROWSER), ("/docs/swagger.js", ""), ("/openapi.json", "")]
    {
        let reply = get(&house, path, headers).await;
        let policy = reply.header("content-security-policy").expect("a policy");
        assert!(policy.starts_with("default-src 'none';"), "{path}: {policy}");
        assert!(policy.contains("frame-ancestors 'none'"), "{path}: {policy}");
        assert!(
            !policy.contains("unsafe") && !policy.contains('*') && !policy.contains("http"),
            "{path}: {policy}"
        );
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(reply.header("referrer-policy"), Some("no-referrer"), "{path}");
    }
    for path in ["/", "/docs"] {
        let page = get(&house, path, BROWSER).await;
        assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"), "{path}");
        // What a page takes in is a file of ours; nothing is written into it that runs.
        for attribute in ["src=\"", "rel=\"stylesheet\" href=\""] {
            for place in page.body.split(attribute).skip(1) {
                let place = place.split('"').next().unwrap_or_default();
                assert_eq!(get(&house, &format!("/{place}"), "").await.status, 200, "{path}: {place}");
            }
        }
        for inline in ["<style", " style=", " onload=", " onclick=", "<script>"] {
            assert!(!page.body.contains(inline), "{path}: {inline}");
        }
    }
    let guide = get(&house, "/", "").await;
    assert_eq!(
        (guide.header("content-type"), guide.header("vary")),
        (Some("application/json"), Some("accept, host"))
    );
    document.judge(&json!({"$ref": "#/components/schemas/Guide"}), &guide.json(), "the guide");
    assert_eq!(guide.json()["security"], get(&house, "/v1/security", "").await.json());
    assert!(guide.body.contains("http://x/v1/messages"), "the address that was used");
}

#[tokio::test]
async fn d05_the_guide_says_nothing_of_the_machine() {
    let house = house(vec![]).await;
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("a name").trim().to_owned();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a version").trim().to_owned();
    for (path, headers) in [("/", ""), ("/", BROWSER), ("/openapi.json", ""), ("/docs", BROWSER)] {
        let body = get(&house, path, headers).await.body;
        for secret in
            [kernel.as_str(), "/var/lib", "/usr/local", "/home/", "/root", env!("CARGO_MANIFEST_DIR")]
        {
            assert!(!body.contains(secret), "{path} says {secret}");
        }
        let words = body.split(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '.');
        assert!(
            hostname == "localhost" || words.clone().all(|word| word != hostname),
            "{path} says {hostname}"
        );
    }
}

/// The sum of all lines of the text that begin so.
fn sum(text: &str, begins: &str) -> f64 {
    let lines = text.lines().filter(|line| line.starts_with(begins));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[tokio::test]
async fn d06_metrics_are_there_only_where_the_operator_wants_them() {
    let closed = house(vec![]).await;
    let reply = get(&closed, "/metrics", "").await;
    assert_eq!((reply.status, reply.code().as_str()), (404, "not_found"));
    Document::of(&closed).await.reply("get", "/metrics", &reply);
}

#[tokio::test]
async fn d07_metrics_count_what_happened_and_no_label_is_a_tenants() {
    let mut settings = settings(120);
    settings.server.metrics = true;
    let ledger = "{\"host\":\"tenants-own.example.com\",\"port\":443,\"connections\":1}\n";
    let slow = Play { ledger, ..Play::of(recorded("plain")) };
    let limited = Play { reason: Reason::Oom, ..Play::of("").until(Until::Now) };
    let scripts =
        vec![Script::Play(slow), plays("plain"), Script::Refuse(Refusal::Busy, 0), Script::Play(limited)];
    let mut house = House::new(settings, scripts).await;
    // Other tests of this process count too, so what is judged is what was added.
    let before = get(&house, "/metrics", "").await.body;
    for body in [HELLO, HELLO_STREAMED, HELLO, HELLO] {
        house.messages(body).await;
    }
    get(&house, "/no-such-path-of-a-tenant", "").await;
    for _ in 0..3 {
        house.seen().await;
    }
    let after = get(&house, "/metrics", "").await;
    assert_eq!(
        after.header("content-type"),
        Some("application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    let text = after.body;
    let more = |begins: &str, least: f64| {
        let added = sum(&text, begins) - sum(&before, begins);
        assert!(added >= least, "{begins}: {added}\n{text}");
    };
    more("gaoler_requests_total{route=\"/v1/messages\",status=\"200\"}", 2.0);
    more("gaoler_requests_total{route=\"/v1/messages\",status=\"529\"}", 1.0);
    more("gaoler_requests_total{route=\"other\",status=\"404\"}", 1.0);
    more("gaoler_request_seconds_count{route=\"/v1/messages\"}", 4.0);
    more("gaoler_first_event_seconds_count", 1.0);
    more("gaoler_errors_total{code=\"busy\"}", 1.0);
    more("gaoler_errors_total{code=\"memory_limit\"}", 1.0);
    more("gaoler_runs_total{level=\"balanced\",outcome=\"end_turn\",reason=", 2.0);
    more("gaoler_runs_total{level=\"balanced\",outcome=\"memory_limit\",reason=\"oom\"}", 1.0);
    more("gaoler_launch_seconds_count{level=\"balanced\"}", 3.0);
    more("gaoler_run_seconds_count{level=\"balanced\"}", 3.0);
    more("gaoler_limits_hit_total{limit=\"memory\"}", 1.0);
    assert!(text.contains("gaoler_server{version=\""), "{text}");
    for line in [
        "gaoler_draining 0",
        "gaoler_queue_waiting 0",
        "gaoler_queue_longest_wait_seconds 0.0",
        "# TYPE gaoler_egress_bytes counter",
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    for secret in ["tenants-own", "no-such-path", "sk-ant"] {
        assert!(!text.contains(secret), "{secret}\n{text}");
    }
}

/// Every request about sessions, workspaces and files: what it asks of the run, what that answers, and what the client
/// gets.
#[tokio::test]
async fn d12_every_answer_about_files_is_in_the_form_of_the_document() {
    const ID: &str = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";
    let time = "2026-01-02T03:04:05Z";
    let session = json!({
        "id": ID, "title": null, "workspace_id": "default", "created_at": time, "last_used_at": time, "turns": 1,
        "bytes": 2, "disk_bytes": 4096, "running": false, "unreadable": null, "a field of tomorrow": 1,
    });
    let workspace = json!({"id": "default", "title": "t", "origin": null, "created_at": time});
    let whole = json!({
        "id": ID, "title": null, "origin": "https://example.com/a", "created_at": time,
        "usage": {"bytes": 1, "files": 2}, "quota": {"bytes": 1, "files": 2, "used_bytes": 3, "used_files": 4},
    });
    let snapshot = json!({"id": ID, "title": null, "created_at": time, "bytes": 1, "files": 2});
    let said = json!({"role": "user", "content": [{"type": "text", "text": "hi"}], "created_at": null});
    let entry = json!({
        "path": "a", "type": "link", "bytes": 1, "modified_at": time, "executable": false, "target": "b", "address": "%ff",
    });
    let change = json!({"path": "a", "status": "added", "bytes_before": null, "bytes_after": 1});
    let list = |row: &Value| json!({"data": [row], "has_more": false});
    let gone = json!({"id": ID, "deleted": true});
    let one = "/v1/sessions/{id}";
    let files = "/v1/workspaces/{id}/files/{path}";
    let rows: &[(&str, &str, &str, &str, u16, Value)] = &[
        ("get", "/v1/sessions", "?limit=2", "", 200, list(&session)),
        ("get", one, "", "", 200, session.clone()),
        ("post", one, "", r#"{"title":"t"}"#, 200, session.clone()),
        ("delete", one, "", "", 200, gone.clone()),
        ("post", "/v1/sessions/{id}/fork", "", "", 201, session.clone()),
        ("get", "/v1/sessions/{id}/mcp", "", "", 200, session.clone()),
        ("delete", "/v1/sessions/{id}/mcp", "", "", 200, session.clone()),
        (
            "get",
            "/v1/sessions/{id}/transcript",
            "",
            "",
            200,
            json!({"session_id": ID, "data": [said], "has_more": true}),
        ),
        ("get", "/v1/workspaces", "", "", 200, list(&workspace)),
        ("post", "/v1/workspaces", "", r#"{"title":"t"}"#, 201, workspace.clone()),
        ("post", "/v1/workspaces", "", r#"{"git":{"url":"https://example.com/a"}}"#, 201, workspace.clone()),
        ("get", "/v1/workspaces/{id}", "", "", 200, whole),
        ("delete", "/v1/workspaces/{id}", "", "", 200, gone.clone()),
        ("put", files, "", "bytes", 200, json!({"path": "a", "bytes": 5, "created": true})),
        ("delete", files, "", "", 200, json!({"path": "a", "deleted": true})),
        (
            "get",
            "/v1/workspaces/{id}/tree",
            "?depth=2",
            "",
            200,
            json!({"path": "", "data": [entry], "has_more": false}),
        ),
        (
            "post",
            "/v1/workspaces/{id}/upload",
            "?format=zip",
            "PK",
            200,
            json!({"path": "", "entries": 1, "bytes": 1}),
        ),
        ("get", "/v1/workspaces/{id}/snapshots", "", "", 200, list(&snapshot)),
        ("post", "/v1/workspaces/{id}/snapshots", "", "", 201, snapshot.clone()),
        ("delete", "/v1/workspaces/{id}/snapshots/{snapshot}", "", "", 200, gone),
        (
            "post",
            "/v1/workspaces/{id}/snapshots/{snapshot}/restore",
            "",
            "",
            200,
            json!({"id": "default", "snapshot_id": ID, "restored": true}),
        ),
        (
            "get",
            "/v1/workspaces/{id}/diff",
            &format!("?format=json&from={ID}"),
            "",
            200,
            json!({"from": ID, "data": [change], "has_more": false}),
        ),
    ];
    let line = |answer: Value| Script::Play(Play::of(answer.to_string() + "\n"));
    let frames = || {
        let mut bytes = br#"{"bytes":{"bytes":5}}"#.to_vec();
        bytes.extend_from_slice(b"\n\x05\0\0\0hello\0\0\0\0");
        Script::Play(Play::of(bytes))
    };
    let raw = [
        (files, "", "application/octet-stream"),
        ("/v1/workspaces/{id}/archive", "?format=zip", "application/zip"),
        ("/v1/workspaces/{id}/archive", "", "application/gzip"),
        ("/v1/workspaces/{id}/diff", &format!("?from={ID}"), "text/x-diff"),
    ];
    let failures = gaoler_files::Code::ALL;
    let mut scripts: Vec<Script> = rows.iter().map(|row| line(json!({"done": row.5}))).collect();
    scripts.extend(raw.iter().map(|_| frames()));
    scripts.extend(
        failures
            .iter()
            .map(|code| line(json!({"failed": {"code": code, "message": "because\r\nx-evil: 1"}}))),
    );
    // What is no answer, and one of another form.
    scripts.extend([Script::Play(Play::of("nonsense\n")), line(json!({"done": {"id": 7}}))]);
    scripts.push(line(json!({"done": {"path": "", "entries": 1, "bytes": 1}})));
    let mut house = house(scripts).await;
    let document = Document::of(&house).await;
    let address = |path: &str| path.replace("{id}", ID).replace("{snapshot}", ID).replace("{path}", "a/%ff");
    for (method, path, query, body, status, _) in rows {
        let head = format!("{} {}{query} HTTP/1.1\r\n{BEARER}", method.to_uppercase(), address(path));
        let reply = house.request(&head, body.as_bytes()).await;
        assert_eq!(reply.status, *status, "{method} {path}: {reply:?}");
        document.reply(method, path, &reply);
        assert!(!reply.body.contains("tomorrow"), "{reply:?}");
        let seen = house.seen().await;
        assert!(!seen.credential.is_empty() && seen.stdin.contains("\"what\""), "{seen:?}");
    }
    for (path, query, kind) in &raw {
        let reply = get(&house, &format!("{}{query}", address(path)), BEARER).await;
        assert_eq!((reply.status, reply.body.as_str()), (200, "hello"), "{path}");
        assert_eq!(reply.header("content-type"), Some(*kind));
        assert_eq!(reply.header("content-disposition"), Some("attachment"));
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
        document.reply("get", path, &reply);
        house.seen().await;
    }
    for code in failures {
        let reply = get(&house, &address(one), BEARER).await;
        assert_eq!((reply.status, reply.code().as_str()), code.told(), "{reply:?}");
        assert_eq!(reply.header("x-evil"), None);
        document.reply("get", one, &reply);
        house.seen().await;
    }
    let lost = get(&house, &address(one), BEARER).await;
    assert_eq!((lost.status, lost.code().as_str()), (500, "cli_exited"), "{lost:?}");
    document.reply("get", one, &lost);
    let odd = get(&house, &address(one), BEARER).await;
    assert_eq!((odd.status, odd.code().as_str()), (500, "files_failed"), "{odd:?}");
    let upload = "/v1/workspaces/{id}/upload";
    let form = |kind: &str| format!("POST {} HTTP/1.1\r\n{BEARER}content-type: {kind}\r\n", address(upload));
    for kind in ["multipart/form-data", "multipart/form-data; boundary=\"a b\"", "text/plain"] {
        let refused = house.request(&form(kind), b"x").await;
        assert_eq!((refused.status, refused.code().as_str()), (400, "invalid_request"), "{kind}");
    }
    while house.seen.try_recv().is_ok() {}
    let sent = house.request(&form("multipart/form-data; boundary=\"XX\""), b"--XX--").await;
    assert_eq!(sent.status, 200, "{sent:?}");
    document.reply("post", upload, &sent);
    let seen = house.seen().await;
    assert!(seen.stdin.contains("\"boundary\":\"XX\"") && seen.stdin.contains("--XX--"), "{seen:?}");
    // What is wrong in the request is said before a run is asked for.
    for (method, path, body, status, code) in [
        ("get", "/v1/sessions?limit=0", "", 400, "invalid_request"),
        ("get", "/v1/sessions?limit=101", "", 400, "invalid_request"),
        ("get", "/v1/sessions/default", "", 404, "session_not_found"),
        ("get", "/v1/sessions/..%2f..%2fx", "", 404, "session_not_found"),
        ("post", &format!("/v1/sessions/{ID}"), "[]", 400, "invalid_request"),
        ("post", &format!("/v1/sessions/{ID}"), "{}", 400, "invalid_request"),
        ("post", &format!("/v1/sessions/{ID}"), r#"{"title":"a\nb"}"#, 400, "invalid_request"),
        ("get", "/v1/sessions/%ff", "", 400, "invalid_request"),
        ("delete", "/v1/workspaces/%ff", "", 400, "invalid_request"),
        ("get", "/v1/workspaces/default/files/%f", "", 400, "invalid_request"),
        ("get", "/v1/workspaces/.snapshots", "", 404, "workspace_not_found"),
        ("get", "/v1/workspaces/default/diff", "", 400, "invalid_request"),
        ("get", "/v1/workspaces/default/diff?from=default", "", 404, "snapshot_not_found"),
        ("get", "/v1/workspaces/default/archive?format=rar", "", 400, "invalid_request"),
        ("post", "/v1/workspaces/default/upload", "x", 400, "invalid_request"),
        ("post", "/v1/workspaces", r#"{"git":"x"}"#, 400, "invalid_request"),
        ("post", "/v1/workspaces", r#"{"git":{"url":"https://x/y","depth":-1}}"#, 400, "invalid_request"),
    ] {
        let head = format!("{} {path} HTTP/1.1\r\n{BEARER}", method.to_uppercase());
        let reply = house.request(&head, body.as_bytes()).await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code), "{path}: {reply:?}");
    }
}
