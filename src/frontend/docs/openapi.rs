//! The OpenAPI document: what the groups of routes say, in one frame, with what they share.
//! It must never be written by hand elsewhere: docs/openapi.json is its copy, and a test compares both.

use std::sync::LazyLock;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::{
    admin, completions, errors, mcp, messages, models, own, pages, runs, sessions, state, workspaces,
};

/// Routes that belong together. A new one is a file beside this one and a line in [`GROUPS`].
pub struct Group {
    /// What Swagger UI calls it.
    pub name: &'static str,
    /// One sentence.
    pub about: &'static str,
    /// Path items by path.
    pub paths: Vec<(&'static str, Value)>,
    /// Schemas that the paths refer to, by name.
    pub schemas: Vec<(&'static str, Value)>,
}

/// All of them, in the order in which they are shown.
const GROUPS: [fn() -> Group; 11] = [
    messages::group,
    completions::group,
    runs::group,
    sessions::group,
    workspaces::group,
    models::group,
    mcp::group,
    own::group,
    admin::group,
    state::group,
    pages::group,
];

/// The document.
pub fn document() -> &'static Value {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(build);
    &DOCUMENT
}

/// The document as it is sent.
pub fn text() -> Bytes {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| {
        let text = serde_json::to_string_pretty(document()).unwrap_or_default();
        Bytes::from(text + "\n")
    });
    TEXT.clone()
}

/// Every path of the document. They live as long as the process, so they can be labels.
pub fn paths() -> impl Iterator<Item = &'static str> {
    document()["paths"].as_object().into_iter().flat_map(|paths| paths.keys().map(String::as_str))
}

/// A schema of the document, by its name.
pub fn schema(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// What may also be null, as the official clients send it for "not given".
pub fn nullable(schema: Value) -> Value {
    let mut schema = schema;
    match (schema.get("type").cloned(), schema.get_mut("enum")) {
        (Some(Value::String(kind)), listed) => {
            if let Some(listed) = listed.and_then(Value::as_array_mut) {
                listed.push(Value::Null);
            }
            schema["type"] = json!([kind, "null"]);
            schema
        }
        _ => {
            // The words about it stay where a reader looks for them.
            let about = schema.as_object_mut().and_then(|fields| fields.remove("description"));
            let mut either = json!({"anyOf": [schema, {"type": "null"}]});
            if let Some(about) = about {
                either["description"] = about;
            }
            either
        }
    }
}

/// The one header that every answer has.
pub fn request_id() -> Value {
    json!({"request-id": {"$ref": "#/components/headers/RequestId"}})
}

/// A successful JSON answer of this schema.
pub fn answers(about: &str, name: &str) -> Value {
    json!({
        "description": about,
        "headers": request_id(),
        "content": {"application/json": {"schema": schema(name)}},
    })
}

fn build() -> Value {
    let groups = GROUPS.map(|group| group());
    let mut paths = Map::new();
    let mut schemas = Map::new();
    let mut tags = Vec::new();
    for group in groups {
        tags.push(json!({"name": group.name, "description": group.about}));
        for (path, mut item) in group.paths {
            for operation in item.as_object_mut().into_iter().flat_map(Map::values_mut) {
                operation["tags"] = json!([group.name]);
            }
            paths.insert(path.to_owned(), item);
        }
        schemas.extend(group.schemas.into_iter().map(|(name, schema)| (name.to_owned(), schema)));
    }
    schemas.insert("Error".to_owned(), error(false));
    schemas.insert("ErrorForBoth".to_owned(), error(true));
    schemas.insert("CompletionsError".to_owned(), completions_error());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "gaoler",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "The Messages API, answered by the Claude Code CLI, one cage a request",
            "description": about(),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "the server that this document came from"}],
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": headers(),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key of this server (`gaol_t_...`), or a credential of your own: `sk-ant-oat...` or `sk-ant-api...`.",
                },
                "api_key": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "x-api-key",
                    "description": "The same in the other header that official clients use.",
                },
            },
        },
    })
}

fn about() -> String {
    let nowhere: Vec<String> =
        errors::NO_ROUTE.iter().map(|row| format!("{} `{}`: {}.", row.status, row.code, row.means)).collect();
    format!(
        "The official Anthropic SDKs work unmodified. A base URL may have a prefix before `/v1/messages`. An error has one \
         form everywhere, with a stable code in `error.details.error_code`; of no route of its own is {} A key in an address is refused. A head of a \
         request that is malformed, or larger than 192 KiB, is answered by a bare 400 or 431.",
        nowhere.join(" ")
    )
}

fn headers() -> Value {
    let text = |about: &str| json!({"description": about, "schema": {"type": "string"}});
    json!({
        "RequestId": {
            "description": "Names this request, in the answer and in the operator's log.",
            "required": true,
            "schema": {"type": "string", "pattern": "^req_01[0-9A-Za-z]{22}$"},
        },
        "RetryAfter": {
            "description": "Seconds after which asking again may help.",
            "schema": {"type": "integer", "minimum": 0},
        },
        "ShouldRetry": {
            "description": "Whether to ask again at all; official clients obey it above all else.",
            "schema": {"type": "string", "enum": ["true", "false"]},
        },
        "Ignored": text("Fields of the request that had no effect, with commas between them. Absent where there are none."),
        "Estimate": {
            "description": "The number is an estimate.",
            "required": true,
            "schema": {"type": "string", "const": "true"},
        },
        "Replay": {
            "description": "`true` where another request, which this one repeats, began the run.",
            "schema": {"type": "string", "const": "true"},
        },
        "Run": {
            "description": "The run, as it is called in the operator's log.",
            "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        },
        "Level": {
            "description": "The level that was in force.",
            "schema": {"type": "string", "enum": state::levels()},
        },
        "Queue": {
            "description": "Milliseconds that the request waited for a run.",
            "schema": {"type": "integer", "minimum": 0},
        },
        "Limits": text("The limits that were in force, `NAME=NUMBER` with commas between them."),
    })
}

/// `both`: with what clients of the other family look for.
fn error(both: bool) -> Value {
    let mut error = json!({
        "description": "An error, in the form that the official clients know.",
        "type": "object",
        "required": ["type", "error", "request_id"],
        "additionalProperties": false,
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message", "details"],
                "additionalProperties": false,
                "properties": {
                    "type": {"description": "Follows from the status.", "type": "string"},
                    "message": {"description": "For people: what is wrong, where, and what to do.", "type": "string"},
                    "details": {
                        "type": "object",
                        "required": ["error_code"],
                        "additionalProperties": false,
                        "properties": {
                            "error_code": {"description": "For programs; never renamed.", "type": "string"},
                        },
                    },
                },
            },
            "request_id": {"type": "string"},
        },
    });
    if both {
        let inner = &mut error["properties"]["error"];
        inner["required"] = json!(["type", "message", "details", "param", "code"]);
        inner["properties"]["param"] = json!({"type": ["string", "null"]});
        inner["properties"]["code"] = json!({"description": "`details.error_code` again.", "type": "string"});
    }
    error
}

fn completions_error() -> Value {
    json!({
        "description": "An error, in the form that clients of chat completions know.",
        "type": "object",
        "required": ["error"],
        "additionalProperties": false,
        "properties": {"error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": false,
            "properties": {
                "message": {"description": "For people: what is wrong, where, and what to do.", "type": "string"},
                "type": {"description": "Follows from the status.", "type": "string"},
                "param": {"description": "The field that is wrong.", "type": ["string", "null"]},
                "code": {"description": "For programs; never renamed.", "type": "string"},
            },
        }},
    })
}
