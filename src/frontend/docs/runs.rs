//! What /openapi.json says of runs by name: the list, one run's status, its events and its end.
//! It must never describe another form than `runs/http.rs` writes: a test judges its answers by this.

use serde_json::{Value, json};

use super::errors;
use super::messages::{constant, described, exact};
use super::openapi::{Group, answers, request_id, schema};
use super::state::levels;

/// The group.
pub fn group() -> Group {
    Group {
        name: "Runs",
        about: "The runs of your own credential: those that wait or run, and those that ended in the last 15 minutes. They live \
                in memory; a restart of the server forgets them.",
        paths: vec![
            ("/v1/runs", list()),
            ("/v1/runs/{id}", one()),
            ("/v1/runs/{id}/events", events()),
            ("/v1/runs/{id}/cancel", cancel()),
        ],
        schemas: vec![("RunList", list_schema()), ("Run", run_schema())],
    }
}

fn id() -> Value {
    json!({
        "name": "id", "in": "path", "required": true,
        "description": "`x-gaoler-run` of the answer, or `run_id` in it.",
        "schema": {"type": "string"},
    })
}

fn operation(name: &str, summary: &str, parameters: &[Value], mut responses: Value, done: Value) -> Value {
    responses["200"] = done;
    json!({
        "operationId": name,
        "summary": summary,
        "security": [{"bearer": []}, {"api_key": []}],
        "parameters": parameters,
        "responses": responses,
    })
}

fn errors_of(rows: &[errors::Known]) -> Value {
    Value::Object(errors::responses(&errors::of_somebody(rows), errors::Form::Plain))
}

fn list() -> Value {
    let done = answers("Your runs, the newest first.", "RunList");
    json!({"get": operation("runs", "Your runs", &[], errors_of(errors::RUNS), done)})
}

fn one() -> Value {
    let done = answers("The run.", "Run");
    json!({"get": operation("run", "One run", &[id()], errors_of(errors::RUN), done)})
}

fn cancel() -> Value {
    let done = answers(
        "The run; it may take a moment until it has ended. One that has ended stays as it is.",
        "Run",
    );
    json!({"post": operation("cancel_run", "End a run", &[id()], errors_of(errors::RUN), done)})
}

fn events() -> Value {
    let after = json!({
        "name": "last-event-id", "in": "header",
        "description": "The last event that you have: the stream begins after it. Without it, it begins at the start.",
        "schema": {"type": "string"},
    });
    let done = json!({
        "description": "The run's answer as events, in the dialect that it was asked in, each with an id; to its end. The \
            events of an answer that was asked for as JSON come all at its end. What went past the bound of 4 MiB, or is older \
            than 15 minutes, is a 410.",
        "headers": request_id(),
        "content": {"text/event-stream": {
            "schema": {"description": "Server-sent events, in the dialect that the run was asked in."},
            "x-event-schema": schema("StreamEvent"),
        }},
    });
    let summary = "A run's events, from any point";
    json!({"get": operation("run_events", summary, &[id(), after], errors_of(errors::RUN_EVENTS), done)})
}

fn list_schema() -> Value {
    let id = || json!({"type": ["string", "null"]});
    exact(
        "",
        json!({
            "data": {"type": "array", "items": schema("Run")},
            "has_more": {"const": false},
            "first_id": id(),
            "last_id": id(),
        }),
    )
}

fn run_schema() -> Value {
    let date = || json!({"type": ["string", "null"], "format": "date-time"});
    let text = || json!({"type": ["string", "null"]});
    exact(
        "A run.",
        json!({
            "type": constant("run"),
            "id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            "status": {"type": "string", "enum": ["queued", "running", "ended"]},
            "queue_position": {
                "description": "Of your own requests that wait; the first has 1. Null for one that does not wait.",
                "type": ["integer", "null"], "minimum": 1,
            },
            "endpoint": {"type": "string", "enum": ["/v1/messages", "/v1/chat/completions"]},
            "stream": {"type": "boolean"},
            "model": {"description": "As it was asked for.", "type": "string"},
            "level": {"type": "string", "enum": levels()},
            "session_id": text(),
            "on_disconnect": {"type": "string", "enum": ["cancel", "continue"]},
            "created_at": date(),
            "ended_at": date(),
            "stop_reason": described("Of a run that ended with an answer.", text()),
            "error_code": described("Of one that did not.", text()),
            "usage": {"anyOf": [schema("Usage"), {"type": "null"}]},
            "events": {"description": "How many there are so far; 0 for an answer asked for as JSON.", "type": "integer", "minimum": 0},
        }),
    )
}
