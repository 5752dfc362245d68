//! What /openapi.json says of a tenant's sessions.
//! It must never describe another form than `sessions.rs` lets through.

use gaoler_files::{PAGE_MAX, TITLE_CHARS_MAX, Unreadable};
use serde_json::{Value, json};

use super::openapi::{Group, answers, schema};
use super::{errors, messages};

/// The group.
pub fn group() -> Group {
    Group {
        name: "Sessions",
        about: "Conversations that last. Each of these requests is a run in the tenant's own cage; another tenant's session \
            is one that is not there.",
        paths: vec![
            ("/v1/sessions", json!({"get": list()})),
            ("/v1/sessions/{id}", json!({"get": one(), "post": rename(), "delete": remove()})),
            ("/v1/sessions/{id}/fork", json!({"post": fork()})),
            (
                "/v1/sessions/{id}/mcp",
                json!({"get": servers(), "put": set_servers(), "delete": drop_servers()}),
            ),
            ("/v1/sessions/{id}/transcript", json!({"get": transcript()})),
        ],
        schemas: vec![
            ("SessionList", page("Session")),
            ("Session", session_schema()),
            ("Titled", titled()),
            ("Deleted", deleted()),
            ("SessionServersSet", servers_set()),
            ("SessionServers", servers_schema()),
            ("KeptServer", kept_server()),
            ("Transcript", transcript_schema()),
            ("TranscriptMessage", message_schema()),
        ],
    }
}

/// A request that needs a credential.
pub fn operation(id: &str, summary: &str, about: &str, done: (&str, Value), parameters: Vec<Value>) -> Value {
    operation_with(errors::FILES, id, summary, about, done, parameters)
}

fn operation_with(
    rows: &[errors::Known],
    id: &str,
    summary: &str,
    about: &str,
    done: (&str, Value),
    parameters: Vec<Value>,
) -> Value {
    let parameters: Vec<Value> = parameters.into_iter().chain(messages::run_parameters()).collect();
    let mut responses = errors::responses(&errors::of_somebody(rows), errors::Form::Plain);
    responses.insert(done.0.to_owned(), done.1);
    json!({
        "operationId": id,
        "summary": summary,
        "description": about,
        "security": [{"bearer": []}, {"api_key": []}],
        "parameters": parameters,
        "responses": responses,
    })
}

/// A parameter of the path.
pub fn in_path(name: &str, about: &str) -> Value {
    json!({"name": name, "in": "path", "required": true, "description": about, "schema": {"type": "string"}})
}

/// A parameter of the query.
pub fn in_query(name: &str, about: &str, kind: Value) -> Value {
    json!({"name": name, "in": "query", "description": about, "schema": kind})
}

/// The same request, with a small body.
pub fn with_body(mut operation: Value, required: bool, name: &str) -> Value {
    operation["requestBody"] = json!({
        "required": required,
        "content": {"application/json": {"schema": schema(name)}},
    });
    operation
}

/// A page of these.
pub fn page(of: &str) -> Value {
    json!({
        "type": "object",
        "required": ["data", "has_more"],
        "additionalProperties": false,
        "properties": {
            "data": {"type": "array", "items": schema(of)},
            "has_more": {"description": "Whether another page follows.", "type": "boolean"},
        },
    })
}

fn id() -> Value {
    in_path("id", "The session.")
}

fn list() -> Value {
    let parameters = vec![
        in_query(
            "limit",
            "Sessions on the page.",
            json!({"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": 20}),
        ),
        in_query(
            "after_id",
            "The page begins after this session.",
            json!({"type": "string", "format": "uuid"}),
        ),
    ];
    let about = "Those that were used last come first. One that nobody can read any more is listed too, and says why. A page \
        ends early where reading it would take long: `has_more` says whether another follows.";
    operation(
        "sessions",
        "Your sessions",
        about,
        ("200", answers("A page of the list.", "SessionList")),
        parameters,
    )
}

fn one() -> Value {
    operation("session", "One session", "", ("200", answers("The session.", "Session")), vec![id()])
}

fn rename() -> Value {
    let done = ("200", answers("The session, with its title.", "Session"));
    let about = "An empty title takes it away.";
    with_body(operation("nameSession", "Give a session a title", about, done, vec![id()]), true, "Titled")
}

fn remove() -> Value {
    let about =
        "With all that its agent left there, readable or not. A session that has a run is not deleted: 409.";
    operation(
        "dropSession",
        "Delete a session",
        about,
        ("200", answers("It is gone.", "Deleted")),
        vec![id()],
    )
}

fn fork() -> Value {
    let done = ("201", answers("The new session.", "Session"));
    let about = "A new session that remembers the same and goes its own way from here. Its workspace is the same, and so \
        are its MCP servers.";
    let fork = operation_with(errors::SERVERS_SET, "forkSession", "Copy a session", about, done, vec![id()]);
    with_body(fork, false, "Titled")
}

fn servers() -> Value {
    let about = "Names, places and commands; of headers and variables the names alone. Nobody can read the values again.";
    let done = ("200", answers("What is set.", "SessionServers"));
    operation_with(errors::SERVERS, "sessionServers", "A session's MCP servers", about, done, vec![id()])
}

fn set_servers() -> Value {
    let about = "From now on each turn of the session, in either dialect, has these servers, in the place of those before. A \
        turn that names `mcp_servers` itself has its own and none of these; one that names an empty `mcp_servers` has none. \
        The level and the operator's settings are asked now, and at each turn again: a turn whose level does not permit them \
        is refused. They last over a restart, go with the session, and a copy of it has them too. Headers and tokens are \
        sealed at once: egress alone can open them, for the one place that they are for.";
    let mut done = answers("What is set.", "SessionServers");
    done["headers"]["x-gaoler-ignored"] = json!({"$ref": "#/components/headers/Ignored"});
    let summary = "Set a session's MCP servers";
    let done = ("200", done);
    let set = operation_with(errors::SERVERS_SET, "setSessionServers", summary, about, done, vec![id()]);
    with_body(set, true, "SessionServersSet")
}

fn drop_servers() -> Value {
    let about = "Turns have none any more but their own. Without any set, nothing changes.";
    let done = ("200", answers("There are none.", "Deleted"));
    let summary = "Forget a session's MCP servers";
    operation_with(errors::SERVERS, "dropSessionServers", summary, about, done, vec![id()])
}

fn servers_set() -> Value {
    messages::object(
        "At least one server; together at most 28 KiB as they are kept. Fields that are not listed have no effect.",
        &["mcp_servers"],
        json!({
            "mcp_servers": schema("McpServers"),
            "security_level": {"$ref": "#/components/schemas/MessagesRequest/properties/security_level"},
        }),
    )
}

fn servers_schema() -> Value {
    messages::exact(
        "The MCP servers of a session, by their names.",
        json!({
            "session_id": {"type": "string", "format": "uuid"},
            "mcp_servers": {"type": "object", "additionalProperties": schema("KeptServer")},
        }),
    )
}

fn kept_server() -> Value {
    let text = json!({"type": "string"});
    let names = |about: &str| json!({"description": about, "type": "array", "items": {"type": "string"}});
    let headers = || names("Names of the headers that egress adds.");
    json!({
        "description": "A server as it is kept, without its secrets.",
        "oneOf": [
            messages::exact("A program in the run's cage.", json!({
                "command": text, "args": names("Its arguments."), "env": names("Names of variables."),
            })),
            messages::exact("A remote server.", json!({
                "url": {"description": "Up to its query, which may be a secret.", "type": "string"},
                "query": {"description": "Whether it has one.", "type": "boolean"},
                "transport": {"type": "string", "enum": ["http", "sse"]},
                "headers": headers(),
            })),
            messages::exact("One of the operator's.", json!({"catalog": text, "headers": headers()})),
        ],
    })
}

fn transcript() -> Value {
    let parameters = vec![
        id(),
        in_query(
            "limit",
            "Messages on the page.",
            json!({"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_MAX}),
        ),
        in_query(
            "offset",
            "Messages before the page.",
            json!({"type": "integer", "minimum": 0, "maximum": u32::MAX, "default": 0}),
        ),
    ];
    let about = "What was said, oldest first, calls of tools and their results included. It is what the agent's own \
        transcript says, which the agent could change.";
    let done = ("200", answers("A page of messages.", "Transcript"));
    operation("transcript", "What was said in a session", about, done, parameters)
}

fn session_schema() -> Value {
    let words = Unreadable::ALL.iter().filter_map(|why| serde_json::to_value(why).ok());
    let unreadable: Vec<Value> = words.chain([Value::Null]).collect();
    json!({
        "type": "object",
        "required": [
            "id", "title", "workspace_id", "created_at", "last_used_at", "turns", "bytes", "disk_bytes", "running", "unreadable",
        ],
        "additionalProperties": false,
        "properties": {
            "id": {"type": "string", "format": "uuid"},
            "title": {"type": ["string", "null"]},
            "workspace_id": {"description": "Where its runs work: `default`, or a workspace's id.", "type": "string"},
            "created_at": {"type": "string", "format": "date-time"},
            "last_used_at": {"type": "string", "format": "date-time"},
            "turns": {"description": "What the user said, so many times.", "type": "integer", "minimum": 0},
            "bytes": {"description": "Of its transcript.", "type": "integer", "minimum": 0},
            "disk_bytes": {
                "description": "What all of it takes of the disk, whatever its agent left beside the transcript.",
                "type": "integer",
                "minimum": 0,
            },
            "running": {"description": "Whether it has a run now.", "type": "boolean"},
            "unreadable": {
                "description": "Why nobody can read it any more; null for one that can be read. Its turns, its transcript and \
                    copies of it are refused with 409 `session_unreadable`, and it can be deleted.",
                "type": ["string", "null"],
                "enum": unreadable,
            },
        },
    })
}

fn titled() -> Value {
    json!({
        "type": "object",
        "properties": {
            "title": {"description": "One line.", "type": ["string", "null"], "maxLength": TITLE_CHARS_MAX},
        },
    })
}

fn deleted() -> Value {
    json!({
        "type": "object",
        "required": ["id", "deleted"],
        "additionalProperties": false,
        "properties": {"id": {"type": "string"}, "deleted": {"const": true}, "remains": remains()},
    })
}

/// Of an answer to a removal.
pub fn remains() -> Value {
    json!({
        "description": "There was more than a client waits for. It is out of everybody's sight, counts as used, and is being \
            removed by runs of yours that go on with it; later requests of the same kind go on too.",
        "const": true,
    })
}

fn transcript_schema() -> Value {
    json!({
        "type": "object",
        "required": ["session_id", "data", "has_more"],
        "additionalProperties": false,
        "properties": {
            "session_id": {"type": "string", "format": "uuid"},
            "data": {"type": "array", "items": schema("TranscriptMessage")},
            "has_more": {"type": "boolean"},
        },
    })
}

fn message_schema() -> Value {
    json!({
        "type": "object",
        "required": ["role", "content", "created_at"],
        "additionalProperties": false,
        "properties": {
            "role": {"type": "string", "enum": ["user", "assistant"]},
            "content": {
                "description": "Blocks, as the Messages API has them.",
                "type": "array",
                "items": {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}},
            },
            "created_at": {"type": ["string", "null"], "format": "date-time"},
        },
    })
}
