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
    let baseline = server.baseline();
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
    server.settles_to(&baseline);
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
    let deleted = request(&client, "a", "DELETE", &path, &Value::Null);
    assert_eq!(deleted.status, 200, "{deleted:?}");
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
