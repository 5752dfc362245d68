//! GET /v1/mcp/catalog, and POST /v1/mcp/probe: a run of the CLI that starts the named servers, asks nobody anything,
//! and says which of them answered. What it says is its own cage's claim, and bounded here.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use gaoler_policy::settings::Mcp;
use gaoler_protocol::{Conversation, Effort, Kind, LEASE_DONE, Limits, Model, Section, Spawn, section};

use super::books::Note;
use super::cli::decode::{self, Event, MISSING, Server};
use super::cli::input;
use super::error::ApiError;
use super::http::{App, json_bytes};
use super::job::mcp::{self, Question};
use super::run::Talk;
use super::sent::{Sent, WORDS_BYTES_MAX};
use super::{budget, id, identity, log, metrics, vouching, way};

/// How long servers have to answer. A package that has to be fetched first takes its time.
const ANSWER_WAIT: Duration = Duration::from_secs(45);
/// How often the CLI is asked.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// Tools of one server that are told.
const TOOLS_MAX: usize = 256;
/// Characters of a text of a server's.
const TEXT_CHARS_MAX: usize = 500;

/// What a server turned out to be.
#[derive(Debug, PartialEq, Serialize)]
struct Found {
    name: String,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<About>,
    tools: Vec<Tool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, PartialEq, Serialize)]
struct About {
    name: String,
    version: String,
}

#[derive(Debug, PartialEq, Serialize)]
struct Tool {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
}

/// The servers that the operator offers.
pub fn catalog(settings: &Mcp) -> Value {
    let servers = settings.catalog.iter().map(|server| {
        let kind = if server.command.is_empty() { "remote" } else { "local" };
        json!({"name": server.name, "description": server.description, "kind": kind})
    });
    json!({ "servers": servers.collect::<Vec<_>>() })
}

/// Tries the servers that a request names.
///
/// # Errors
/// Those of a request for a run.
pub async fn probe(frontend: &App, headers: &HeaderMap, body: Sent) -> Result<Response, ApiError> {
    let shown = identity::may_run(identity::shown(frontend, headers).await?, headers)?;
    if *frontend.draining.borrow() {
        return Err(ApiError::draining());
    }
    let whose = body.whose(frontend, &shown)?;
    let (bytes, hold) = body.read(frontend, whose, WORDS_BYTES_MAX).await?;
    let Question { servers, level, credential, ignored } =
        way::parsed(frontend, whose, bytes, mcp::question).await?;
    drop(hold);
    let caller = identity::caller(frontend, shown, headers, credential.as_ref(), way::now_ms()).await?;
    let level = way::level(frontend, headers, level)?;
    let settled = servers.settle(&frontend.settings().mcp, level, way::tier(frontend))?;
    let tenant = caller.tenant;
    if caller.unlinked {
        vouching::pass(frontend, &tenant, &caller.credential).await?;
    }
    frontend.live().rates.tenant(&tenant, &caller.allowance)?;
    let most = caller.allowance.tenant_max;
    let reserved = budget::reserve(frontend, &caller.name, &caller.allowance, "").await?;
    let note = Note::of_a_probe(frontend, caller.name, caller.key, reserved);
    let spawn = Spawn {
        run: id::run(),
        tenant,
        kind: Kind::Cli,
        level,
        conversation: Conversation::Stateless,
        ephemeral: false,
        proof: false,
        session: uuid::Builder::from_random_bytes(rand::random()).into_uuid().into_bytes(),
        model: Model::DEFAULT,
        effort: Effort::Unset,
        turns_max: 1,
        mcp_refused: true,
        budget_microusd: 0,
        workspace: gaoler_protocol::WORKSPACE_DEFAULT,
        limits: Limits::NONE,
    };
    let fds = way::descriptors(&section(Section::Mcp, &settled.config), &caller.credential, &settled)?;
    drop(caller.credential);
    let place = way::place(frontend, tenant, most, settled.config.len(), |_| {}).await?;
    metrics::waited(place.waited);
    let waited = place.waited.as_millis();
    if let Some(budget) = note.watch() {
        budget.left().await?;
    }
    let guard = (frontend.busy.subscribe(), place);
    let run = frontend.supervisor.spawn(spawn, fds).await.map_err(|refused| ApiError::refused(&refused))?;
    let spawned = run.spawned;
    let mut talk = Talk::new(run, way::bounds(frontend, level, true), note.watch());
    // A task of its own: the run's place is free only once nothing of it is left, whether or not its client stays.
    let (mut reply, answer) = oneshot::channel();
    let names = settled.names;
    tokio::spawn(async move {
        let spent = talk.counts.spent(true);
        let tried = tokio::select! {
            biased;
            () = reply.closed() => None,
            error = spent => Some(Err(error)),
            tried = tried(&mut talk, &names) => Some(tried),
        };
        talk.last_word(LEASE_DONE);
        let (exit, egress) = talk.end().await;
        let reason = exit.as_ref().map_or("unknown", |exit| exit.reason.name());
        log::line("probe", &[("run", spawn.run.to_string().into()), ("reason", reason.into())]);
        // It asks no model. A server in its cage may have, and that is its tenant's like any other.
        if exit.as_ref().is_none_or(|exit| exit.requests > 0) {
            let told = match &tried {
                Some(Err(error)) => (error.status, error.code),
                Some(Ok(_)) => (200, "done"),
                None => (499, "client_gone"),
            };
            note.write(&spawned, level, told, exit.as_ref(), &egress).await;
        }
        drop(guard);
        if let Some(tried) = tried {
            let _ = reply.send(tried);
        }
    });
    let lost = || ApiError::internal("run_lost", "The run ended and no word of it came.");
    let found = answer.await.map_err(|_| lost())??;
    let body = serde_json::to_vec(&json!({ "servers": found })).unwrap_or_default();
    let mut response = json_bytes(StatusCode::OK, Body::from(body));
    for (name, value) in [
        (way::RUN_ID, spawn.run.to_string()),
        (way::LEVEL, level.name().to_owned()),
        (way::QUEUED, waited.to_string()),
        (way::IGNORED, ignored.join(",")),
    ] {
        if let Some(value) = HeaderValue::from_str(&value).ok().filter(|value| !value.is_empty()) {
            response.headers_mut().insert(name, value);
        }
    }
    Ok(response)
}

/// Asks until no server is on its way any more, or its time is up.
async fn tried(talk: &mut Talk, names: &[String]) -> Result<Vec<Found>, ApiError> {
    let deadline = Instant::now() + ANSWER_WAIT;
    let mut servers = Vec::new();
    talk.say(input::begin());
    while Instant::now() < deadline {
        talk.say(input::mcp_status());
        let next = Instant::now() + ASK_EVERY;
        while let Ok(heard) = timeout_at(next, talk.line()).await {
            let line = heard
                .ok()
                .flatten()
                .ok_or_else(|| ApiError::internal("cli_exited", "The CLI ended without a result."))?;
            if let Ok(Event::Servers(list)) = decode::event(&line) {
                servers = list;
            }
        }
        let settled = |name: &String| servers.iter().any(|it| it.name == *name && it.word() != "pending");
        if names.iter().all(settled) {
            break;
        }
    }
    Ok(names.iter().map(|name| found(name, servers.iter().find(|it| it.name == *name))).collect())
}

fn found(name: &str, server: Option<&Server>) -> Found {
    let Some(server) = server else {
        return Found { name: name.into(), status: MISSING, server: None, tools: Vec::new(), error: None };
    };
    let tool = |tool: &decode::Tool| Tool {
        name: short(&tool.name),
        description: tool.description.as_deref().map(short),
    };
    Found {
        name: name.into(),
        status: server.word(),
        server: server.about.as_ref().map(|it| About { name: short(&it.name), version: short(&it.version) }),
        tools: server.tools.iter().take(TOOLS_MAX).map(tool).collect(),
        error: server.error.as_deref().map(short),
    }
}

fn short(text: &str) -> String {
    text.chars().take(TEXT_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_claims_is_bounded() {
        let tools = (0..300).map(|n| decode::Tool { name: "x".repeat(n + 400), description: None });
        let about = decode::About { name: "a".into(), version: "v".repeat(1000) };
        let claimed = Server {
            name: "s".into(),
            status: "<script>".into(),
            tools: tools.collect(),
            about: Some(about),
            error: Some("e".repeat(1000)),
        };
        let found = found("s", Some(&claimed));
        assert_eq!((found.status, found.tools.len()), ("unknown", TOOLS_MAX));
        assert!(found.tools.iter().all(|tool| tool.name.len() <= TEXT_CHARS_MAX));
        assert_eq!(found.server.expect("about").version.len(), TEXT_CHARS_MAX);
        assert_eq!(found.error.expect("an error").len(), TEXT_CHARS_MAX);
        assert_eq!(super::found("s", None).status, "missing");
    }

    #[test]
    fn the_catalogue_names_servers_and_nothing_of_how_they_are_started() {
        let servers: Mcp = toml::from_str(
            "[[catalog]]\nname = 'a'\ndescription = 'A'\ncommand = 'secret-path'\n\
             [[catalog]]\nname = 'b'\nurl = 'https://b.example'",
        )
        .expect("settings");
        let expected = json!({"servers": [
            {"name": "a", "description": "A", "kind": "local"},
            {"name": "b", "description": "", "kind": "remote"},
        ]});
        assert_eq!(catalog(&servers), expected);
    }
}
