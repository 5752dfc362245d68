//! Sessions over HTTP: the real CLI's, listed, read, copied and deleted, each by a run in its tenant's cage.
//! Needs root and the CLI. It must never judge by anything but what a client, or the disk, shows.

mod support;

use serde_json::{Value, json};
use support::{Client, Options, Response, Server, ask, bearer, environment};

const SESSION: &str = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";
const SECOND: &str = "7a2d1f1e-9e3c-4d8f-8b62-1d3e4f5a6b7c";

fn request(client: &Client, tenant: &str, method: &str, path: &str, body: &Value) -> Response {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    client.request(method, path, &[bearer(tenant)], body.as_bytes())
}

fn get(client: &Client, tenant: &str, path: &str) -> Response {
    request(client, tenant, "GET", path, &Value::Null)
}

/// Says something in a session, and returns the answer's text.
fn says(client: &Client, tenant: &str, session: &str, text: &str) -> String {
    let mut body = ask(text);
    body["session_id"] = session.into();
    let response = client.messages(tenant, &body);
    assert_eq!(response.status, 200, "{text}: {response:?}");
    response.text()
}

fn code(response: &Response) -> (u16, String) {
    let code = response.json()["error"]["details"]["error_code"].clone();
    (response.status, code.as_str().unwrap_or_default().to_owned())
}

fn ids(response: &Response) -> Vec<String> {
    assert_eq!(response.status, 200, "{response:?}");
    let rows = response.json()["data"].as_array().expect("rows").clone();
    rows.iter().filter_map(|row| row["id"].as_str().map(str::to_owned)).collect()
}

#[test]
fn t113_a_session_is_listed_read_named_copied_and_deleted_and_lasts_over_a_restart() {
    let mut server = Server::start(Options::default());
    let client = server.client();
    assert_eq!(ids(&get(&client, "a", "/v1/sessions")), Vec::<String>::new());
    says(&client, "a", SESSION, "my bird is a bittern");
    says(&client, "a", SESSION, "and it is called Bo");
    says(&client, "a", SECOND, "another matter");

    let list = get(&client, "a", "/v1/sessions");
    assert_eq!(ids(&list), [SECOND, SESSION], "the newest first");
    let row = &list.json()["data"][1];
    assert_eq!(
        (&row["turns"], &row["workspace_id"], &row["running"]),
        (&json!(2), &json!("default"), &json!(false))
    );
    assert_eq!(ids(&get(&client, "a", "/v1/sessions?limit=1")), [SECOND]);
    assert_eq!(ids(&get(&client, "a", &format!("/v1/sessions?limit=1&after_id={SECOND}"))), [SESSION]);

    let transcript = get(&client, "a", &format!("/v1/sessions/{SESSION}/transcript")).json();
    let said: Vec<(String, String)> = transcript["data"]
        .as_array()
        .expect("messages")
        .iter()
        .map(|it| (it["role"].to_string(), it["content"][0]["text"].as_str().unwrap_or_default().to_owned()))
        .collect();
    let (user, assistant) = ("\"user\"".to_owned(), "\"assistant\"".to_owned());
    let texts = ["my bird is a bittern", "[embedded] my bird is a bittern", "and it is called Bo"];
    assert_eq!(said[0], (user.clone(), texts[0].to_owned()));
    assert_eq!(said[1], (assistant, texts[1].to_owned()));
    assert_eq!(said[2], (user, texts[2].to_owned()));
    assert_eq!(said.len(), 4, "{transcript}");

    let path = format!("/v1/sessions/{SESSION}");
    let named = request(&client, "a", "POST", &path, &json!({"title": "Birds"}));
    assert_eq!((named.status, &named.json()["title"]), (200, &json!("Birds")));

    // The copy remembers, and from then on both go their own ways.
    let fork = request(&client, "a", "POST", &format!("{path}/fork"), &json!({"title": "Other birds"}));
    assert_eq!((fork.status, &fork.json()["title"]), (201, &json!("Other birds")), "{fork:?}");
    let copy = fork.json()["id"].as_str().expect("an id").to_owned();
    assert!(says(&client, "a", &copy, "HISTORY?").contains("and it is called Bo"));
    says(&client, "a", &copy, "only the copy knows of owls");
    let (old, new) = (says(&client, "a", SESSION, "HISTORY?"), says(&client, "a", &copy, "HISTORY?"));
    assert!(old.contains("bittern") && !old.contains("owls"), "{old}");
    assert!(new.contains("bittern") && new.contains("owls"), "{new}");

    // Nothing of it is in anybody's memory.
    assert!(server.stop().success());
    let options = server.options.clone();
    let mut again = Server::start(options);
    let client = again.client();
    assert!(says(&client, "a", &copy, "HISTORY?").contains("owls"));
    assert_eq!(get(&client, "a", &path).json()["title"], "Birds");

    let deleted = request(&client, "a", "DELETE", &format!("/v1/sessions/{copy}"), &Value::Null);
    assert_eq!((deleted.status, deleted.json()), (200, json!({"id": copy, "deleted": true})));
    assert_eq!(code(&get(&client, "a", &format!("/v1/sessions/{copy}"))), (404, "session_not_found".into()));
    assert_eq!(ids(&get(&client, "a", "/v1/sessions")).len(), 2);
    assert!(!says(&client, "a", &copy, "HISTORY?").contains("owls"), "a deleted session is begun anew");
    assert!(again.stop().success());
}

#[test]
fn t114_nobody_lists_reads_names_copies_or_deletes_anothers_session() {
    let server = Server::start(Options::default());
    let client = server.client();
    says(&client, "a", SESSION, "my bird is a bittern");
    says(&client, "b", SECOND, "hello");
    let baseline = environment().full_proc.then(|| server.baseline());
    let missing = SESSION.replace("6f1c", "0000");
    assert_eq!(ids(&get(&client, "b", "/v1/sessions")), [SECOND]);
    let rows: [(&str, &str, Value); 5] = [
        ("GET", "", Value::Null),
        ("GET", "/transcript", Value::Null),
        ("POST", "", json!({"title": "mine"})),
        ("POST", "/fork", Value::Null),
        ("DELETE", "", Value::Null),
    ];
    for (method, rest, body) in &rows {
        let ask = |tenant: &str, id: &str| {
            request(&client, tenant, method, &format!("/v1/sessions/{id}{rest}"), body)
        };
        let (theirs, none) = (ask("b", SESSION), ask("b", &missing));
        assert_eq!(code(&theirs), (404, "session_not_found".into()), "{method} {rest}");
        // What is somebody else's, and what is nobody's, are one.
        let plain = |response: &Response| {
            let mut body = response.json();
            body["request_id"] = "".into();
            let names: Vec<String> = response.headers.iter().map(|(name, _)| name.clone()).collect();
            (response.status, body, names)
        };
        assert_eq!(plain(&theirs), plain(&none), "{method} {rest}");
    }
    // A stranger whose token nobody vouches for gets no folder.
    let refused = client.request("GET", "/v1/sessions", &[("authorization", "Bearer nonsense".into())], b"");
    assert_eq!(code(&refused), (401, "invalid_token_format".into()));
    assert_eq!(ids(&get(&client, "a", "/v1/sessions")), [SESSION]);
    let path = format!("/v1/sessions/{SESSION}");
    assert_eq!(get(&client, "a", &path).json()["title"], Value::Null);
    assert!(get(&client, "a", &format!("{path}/transcript")).text_of_all().contains("bittern"));
    baseline.iter().for_each(|baseline| server.settles_to(baseline));
}

trait TextOfAll {
    fn text_of_all(&self) -> String;
}

impl TextOfAll for Response {
    fn text_of_all(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

#[test]
fn t115_a_session_with_a_run_is_neither_copied_nor_deleted() {
    if !environment().commands {
        return;
    }
    let server = Server::start(Options::default());
    let client = server.client();
    says(&client, "a", SESSION, "hello");
    let running = client.clone();
    let path = format!("/v1/sessions/{SESSION}");
    let talk = std::thread::spawn(move || {
        says(&running, "a", SESSION, "RUN: touch begun; while [ ! -e /workspace/go ]; do sleep 0.05; done")
    });
    let mut busy = None;
    support::until("a run in the session", || {
        (get(&client, "a", &path).json()["running"] == true).then_some(())
    });
    for (method, rest) in [("DELETE", ""), ("POST", "/fork")] {
        let refused = request(&client, "a", method, &format!("{path}{rest}"), &Value::Null);
        assert_eq!(code(&refused), (409, "session_busy".into()), "{refused:?}");
        assert_eq!(refused.header("x-should-retry"), Some("false"));
        busy = Some(refused);
    }
    assert!(busy.is_some());
    let refused = request(&client, "a", "DELETE", "/v1/workspaces/default", &Value::Null);
    assert_eq!(code(&refused), (409, "session_busy".into()), "{refused:?}");
    // A file comes into a workspace beside its run.
    let go = client.request("PUT", "/v1/workspaces/default/files/go", &[bearer("a")], b"");
    assert_eq!(go.status, 200, "{go:?}");
    talk.join().expect("the run goes on");
    // On a busy machine the CLI may end after its answer.
    support::until("the session's end", || {
        let deleted = request(&client, "a", "DELETE", &path, &Value::Null);
        assert!(deleted.status == 200 || code(&deleted).1 == "session_busy", "{deleted:?}");
        (deleted.status == 200).then_some(())
    });
}

#[test]
fn t116_sessions_that_nobody_uses_are_removed_after_their_days() {
    let mut server = Server::start(Options::default());
    says(&server.client(), "a", SESSION, "my bird is a bittern");
    says(&server.client(), "a", SECOND, "hello");
    assert!(server.stop().success());
    let tenant =
        std::fs::read_dir(server.state.join("tenants")).expect("tenants").flatten().next().expect("one");
    let transcript = tenant.path().join("sessions").join(SESSION).join(format!("{SESSION}.jsonl"));
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3 * 24 * 3600);
    let file = std::fs::File::options().write(true).open(&transcript).expect("a transcript");
    file.set_modified(old).expect("a time");
    drop(file);

    let options = server.options.clone().with("GAOLER_SESSIONS__TTL_DAYS", 2);
    let again = Server::start(options);
    // A request of its own kind sweeps, and so does one that only wants to go on with the session.
    let said = says(&again.client(), "a", SESSION, "HISTORY?");
    assert!(!said.contains("bittern"), "{said}");
    assert_eq!(ids(&get(&again.client(), "a", "/v1/sessions")), [SESSION, SECOND]);
}

/// What an agent puts in its transcript's place, by a command in its own run.
const LEAVINGS: [(&str, &str); 6] = [
    (
        "transcript_is_folder",
        "mkdir $T; head -c 3000000 /dev/urandom > $T/big; mkdir -p $T/a/b/c; chmod 0 $T/a/b",
    ),
    ("transcript_is_link", "ln -s /workspace/elsewhere $T"),
    ("transcript_is_special", "mkfifo $T"),
    ("transcript_is_closed", "echo x > $T; chmod 0 $T"),
    ("transcript_says_nothing", "printf 'no JSON\\n\\0\\0\\0\\n[]\\n' > $T"),
    ("transcript_says_nothing", "head -c 50000000 /dev/zero > $T"),
];

#[test]
fn b08_a_session_that_its_agent_broke_is_listed_counted_told_and_deleted() {
    if !environment().commands {
        return;
    }
    let server = Server::start(Options::with_double());
    let client = server.client();
    for (number, (why, command)) in LEAVINGS.into_iter().enumerate() {
        let session = format!("6f1c0f0e-8d2b-4c7e-9a51-{number:012x}");
        let path = format!("/v1/sessions/{session}");
        says(&client, "a", &session, "hello");
        // The control: it is read, copied and gone on with.
        assert!(says(&client, "a", &session, "HISTORY?").contains("hello"));
        assert_eq!(get(&client, "a", &format!("{path}/transcript")).status, 200);
        assert_eq!(get(&client, "a", &path).json()["unreadable"], Value::Null);
        // The double writes its turn down after its command, so what is left there is left behind its back.
        let find = "T=$(ls -d $HOME/.claude/projects/*/)/";
        let later = format!("{find}{session}.jsonl; rm -f $T; {command}; kill -9 $PPID");
        let mut body = ask(&format!("RUN: {later}"));
        body["session_id"] = session.as_str().into();
        let broken = client.messages("a", &body);
        assert_ne!(broken.status, 200, "{broken:?}");

        let row = get(&client, "a", &path);
        assert_eq!((row.status, &row.json()["unreadable"]), (200, &json!(why)), "{number}: {row:?}");
        assert!(ids(&get(&client, "a", "/v1/sessions")).contains(&session));
        for (method, rest) in [("GET", "/transcript"), ("POST", "/fork")] {
            let told = request(&client, "a", method, &format!("{path}{rest}"), &Value::Null);
            assert_eq!(code(&told), (409, "session_unreadable".into()), "{number} {method}: {told:?}");
            assert_eq!(told.header("x-should-retry"), Some("false"));
        }
        let mut body = ask("HISTORY?");
        body["session_id"] = session.as_str().into();
        let told = client.messages("a", &body);
        assert_eq!(code(&told), (409, "session_unreadable".into()), "{number}: {told:?}");
        let named = request(&client, "a", "POST", &path, &json!({"title": "broken"}));
        assert_eq!((named.status, &named.json()["title"]), (200, &json!("broken")));
        let deleted = request(&client, "a", "DELETE", &path, &Value::Null);
        assert_eq!(
            (deleted.status, deleted.json()),
            (200, json!({"id": session, "deleted": true})),
            "{number}"
        );
        assert_eq!(code(&get(&client, "a", &path)), (404, "session_not_found".into()));
        // Its id is free again.
        assert!(!says(&client, "a", &session, "HISTORY?").contains("hello"));
        assert_eq!(request(&client, "a", "DELETE", &path, &Value::Null).status, 200);
    }
    // Nothing of it was written anywhere else.
    let elsewhere = get(&client, "a", "/v1/workspaces/default/files/elsewhere");
    assert_eq!(code(&elsewhere), (404, "file_not_found".into()));
}

#[test]
fn b08_what_lies_in_sessions_is_in_the_quota_and_a_tenant_over_it_cleans_up_over_http() {
    if !environment().commands {
        return;
    }
    let options = Options::with_double();
    let server = Server::start(options);
    let client = server.client();
    let used = || {
        let quota = get(&client, "a", "/v1/workspaces/default").json()["quota"].clone();
        (quota["used_bytes"].as_u64().expect("bytes"), quota["used_files"].as_u64().expect("files"))
    };
    says(&client, "a", SESSION, "hello");
    let before = used();
    let command = "T=$(ls -d $HOME/.claude/projects/*/); mkdir $T/many; head -c 60000000 /dev/urandom > $T/big; \
                   cd $T/many; for i in $(seq 2000); do : > $i; done";
    says(&client, "a", SESSION, &format!("RUN: {command}"));
    let after = used();
    assert!(after.0 > before.0 + 60_000_000 && after.1 > before.1 + 2000, "{before:?} {after:?}");
    let path = format!("/v1/sessions/{SESSION}");
    assert!(get(&client, "a", &path).json()["disk_bytes"].as_u64().is_some_and(|bytes| bytes > 60_000_000));
    // With a smaller part of the disk this tenant is over it: writing is refused as such, in a word that says what to do.
    let small = [bearer("a"), ("x-gaoler-limits", "disk_mib=20".to_owned())];
    let write = || client.request("PUT", "/v1/workspaces/default/files/f", &small, &[7; 1000]);
    let refused = write();
    assert_eq!(code(&refused), (413, "workspace_full".into()), "{refused:?}");
    let fork = client.request("POST", &format!("{path}/fork"), &small, b"{}");
    assert_eq!(code(&fork), (413, "workspace_full".into()), "{fork:?}");
    let deleted = client.request("DELETE", &path, &small, b"");
    assert_eq!(deleted.status, 200, "{deleted:?}");
    assert_eq!(write().status, 200);
    let (bytes, files) = used();
    assert!(bytes < before.0 + 100_000 && files <= before.1 + 5, "{before:?} {bytes} {files}");
}

#[test]
fn b08_a_broken_session_is_swept_by_its_days_whatever_time_its_agent_sets() {
    if !environment().commands {
        return;
    }
    let mut server = Server::start(Options::with_double());
    let client = server.client();
    says(&client, "a", SESSION, "hello");
    says(&client, "a", SECOND, "hello");
    let command = format!(
        "T=$(ls -d $HOME/.claude/projects/*/)/{SESSION}.jsonl; rm $T; mkdir $T; touch -d 2099-01-01 $T; kill -9 $PPID"
    );
    let mut body = ask(&format!("RUN: {command}"));
    body["session_id"] = SESSION.into();
    assert_ne!(client.messages("a", &body).status, 200);
    let used = get(&client, "a", &format!("/v1/sessions/{SESSION}")).json()["last_used_at"].to_string();
    assert!(!used.contains("2099"), "{used}");
    assert!(server.stop().success());
    let tenant =
        std::fs::read_dir(server.state.join("tenants")).expect("tenants").flatten().next().expect("one");
    let transcript = tenant.path().join("sessions").join(SESSION).join(format!("{SESSION}.jsonl"));
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3 * 24 * 3600);
    std::fs::File::open(&transcript).expect("a folder").set_modified(old).expect("a time");
    let again = Server::start(server.options.clone().with("GAOLER_SESSIONS__TTL_DAYS", 2));
    assert_eq!(ids(&get(&again.client(), "a", "/v1/sessions")), [SECOND]);
    assert!(!transcript.exists());
}

#[test]
fn b08_an_agent_that_shuts_its_sessions_folder_shuts_nobody_out() {
    if !environment().commands {
        return;
    }
    let server = Server::start(Options::with_double());
    let client = server.client();
    says(&client, "a", SESSION, "my bird is a bittern");
    let mut body = ask("RUN: chmod 0 $HOME/.claude/projects/*/; kill -9 $PPID");
    body["session_id"] = SESSION.into();
    assert_ne!(client.messages("a", &body).status, 200);
    assert!(says(&client, "a", SESSION, "HISTORY?").contains("bittern"));
    let path = format!("/v1/sessions/{SESSION}");
    assert_ne!(client.messages("a", &body).status, 200);
    assert_eq!(get(&client, "a", &path).json()["unreadable"], Value::Null);
    assert_eq!(request(&client, "a", "DELETE", &path, &Value::Null).status, 200);
}
