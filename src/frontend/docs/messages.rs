//! What /openapi.json says of POST /v1/messages: the fields that `job.rs` reads and the bytes that `sse.rs` writes.
//! It must never describe a field that nobody reads, nor leave one out: tests compare it with both.

use gaoler_protocol::Limits;
use serde_json::{Map, Value, json};

use super::errors;
use super::openapi::{Group, nullable, schema};
use super::state::levels;
use crate::frontend::answer::{STOP_REASONS, TOOL_USE};
use crate::frontend::job::tools::{NAME_BYTES_MAX, TOOLS_MAX};
use crate::frontend::job::wishes::{BUDGET_LEAST_USD, BUDGET_MAX_USD, SCHEMA_BYTES_MAX};
use crate::frontend::job::{
    BLOCKS_MAX, DEFAULT_MODEL, DOCUMENT_TYPES, IMAGE_TYPES, MESSAGES_MAX, TOOL_ID_BYTES_MAX, TURNS_MAX,
    WITHOUT_EFFECT,
};
use crate::frontend::models::ALIASES;

/// Marks a field that is read and has no effect; the answer's `x-gaoler-ignored` names it.
pub const IGNORED: &str = "x-gaoler-ignored";

/// The group.
pub fn group() -> Group {
    Group {
        name: "Messages",
        about: "One request, one run of the CLI in a cage of its own, one answer.",
        paths: vec![("/v1/messages", path()), ("/v1/messages/count_tokens", count_tokens())],
        schemas: requests().into_iter().chain(answers()).chain(events()).collect(),
    }
}

fn path() -> Value {
    let mut responses = errors::responses(errors::MESSAGES, errors::Form::Messages);
    responses.insert("200".to_owned(), done());
    json!({"post": {
        "operationId": "messages",
        "summary": "Ask the agent",
        "description": "Without `session_id` the request is stateless: `messages` holds the whole conversation, and \
            nothing is kept. With it the conversation lasts: send the new message alone. All turns of the agent come as one \
            message. What the CLI cannot honour has no effect, and is named in `x-gaoler-ignored`.\n\nThe credential comes \
            in `authorization`, in `x-api-key` or as `oauth_credentials` in the body; the first of these that is there \
            counts. A client that goes away ends its run.",
        "security": [{"bearer": []}, {"api_key": []}],
        "parameters": run_parameters(),
        "requestBody": {
            "required": true,
            "description": "At most 32 MB, uncompressed.",
            "content": {"application/json": {
                "schema": schema("MessagesRequest"),
                "examples": {
                    "one_answer": {"summary": "One answer", "value": {
                        "model": DEFAULT_MODEL, "max_tokens": 1024,
                        "messages": [{"role": "user", "content": "RUN: id; pwd; ls /"}],
                    }},
                    "session": {"summary": "A session's next turn", "value": {
                        "model": DEFAULT_MODEL, "max_tokens": 1024,
                        "session_id": "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b",
                        "messages": [{"role": "user", "content": "my bird is a bittern"}],
                    }},
                },
            }},
        },
        "responses": responses,
    }})
}

fn count_tokens() -> Value {
    let mut responses = errors::responses(&errors::of_somebody(errors::TOKENS), errors::Form::Plain);
    let mut done = super::openapi::answers("The estimate.", "TokenCount");
    done["headers"]["x-gaoler-estimate"] = json!({"$ref": "#/components/headers/Estimate"});
    responses.insert("200".to_owned(), done);
    json!({"post": {
        "operationId": "count_tokens",
        "summary": "How many tokens a request has, about",
        "description": "An estimate from the size of what the request says, without what the CLI adds to it (its system \
            prompt and its tools, some thousands of tokens). It starts no run and asks no upstream.",
        "security": [{"bearer": []}, {"api_key": []}],
        "requestBody": {
            "required": true,
            "description": "As for `POST /v1/messages`.",
            "content": {"application/json": {"schema": schema("MessagesRequest")}},
        },
        "responses": responses,
    }})
}

/// A workspace, as a request for a run names it.
pub fn workspace_id() -> Value {
    json!({
        "description": "Where the run works: `default`, or an id of `GET /v1/workspaces`. A session stays in the workspace \
            that it was begun in.",
        "type": "string",
        "pattern": "^(default|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})$",
        "not": {"const": "00000000-0000-0000-0000-000000000000"},
    })
}

/// The headers that a request for a run may have.
pub fn run_parameters() -> Vec<Value> {
    vec![
        json!({
            "name": "x-claude-credential", "in": "header",
            "description": "The run's credential, `sk-ant-oat...` or `sk-ant-api...`, beside a tenant key. Without it that of the \
                body, or else the stored one.",
            "schema": {"type": "string"},
        }),
        json!({
            "name": "x-gaoler-level", "in": "header",
            "description": "The level of this run, as strict as the server's maximum or stricter. Of this and \
                `security_level` the stricter one holds.",
            "schema": {"type": "string", "enum": levels()},
        }),
        json!({
            "name": "x-gaoler-limits", "in": "header",
            "description": "Lower limits for this run, `NAME=NUMBER` with commas between them; the names are those of \
                `limits`. Of both the lower one holds.",
            "schema": {"type": "string"},
            "example": "memory_mib=700,wall_ms=60000",
        }),
        json!({
            "name": "idempotency-key", "in": "header",
            "description": "A name of yours for this request. Sent again with it, the request joins the run that it began, or \
                gets its answer once more, up to 15 minutes after its end. Another request under the same name is a 409.",
            "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
        }),
        json!({
            "name": "x-gaoler-events", "in": "header",
            "description": "`ids` puts an id before each event of a stream; `GET /v1/runs/{id}/events` goes on after one.",
            "schema": {"type": "string"},
        }),
        json!({
            "name": "traceparent", "in": "header",
            "description": "Your trace, as W3C Trace Context has it. Where the operator collects traces, this request and its run \
                are a part of it, and its `sampled` flag decides whether they are sent. One that is not valid, or comes twice, \
                is ignored, and a new trace begins. No answer has it.",
            "schema": {"type": "string"},
            "example": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        }),
        json!({
            "name": "tracestate", "in": "header",
            "description": "What goes with a valid `traceparent`, up to 512 bytes; it is sent with each span. One that is not valid \
                is left out.",
            "schema": {"type": "string"},
            "example": "vendor=value",
        }),
    ]
}

/// The headers of whatever is answered by a run.
pub fn run_headers() -> Value {
    json!({
        "request-id": {"$ref": "#/components/headers/RequestId"},
        "x-gaoler-run": {"$ref": "#/components/headers/Run"},
        "x-gaoler-level": {"$ref": "#/components/headers/Level"},
        "x-gaoler-limits": {"$ref": "#/components/headers/Limits"},
        "x-gaoler-queue-ms": {"$ref": "#/components/headers/Queue"},
        "x-gaoler-ignored": {"$ref": "#/components/headers/Ignored"},
        "x-gaoler-idempotent-replay": {"$ref": "#/components/headers/Replay"},
    })
}

fn done() -> Value {
    json!({
        "description": "The answer. A JSON answer that takes longer than 50 s begins with 200 and white space, and goes on with it \
            while the run works; should the run then fail, `x_error` says how and `stop_reason` is `pause_turn`. A \
            stream that fails ends with the event `error`.",
        "headers": run_headers(),
        "content": {
            "application/json": {"schema": schema("Message")},
            "text/event-stream": {
                "schema": {
                    "description": "Server-sent events, `event: NAME` and `data: JSON`; each JSON is a StreamEvent.",
                },
                "x-event-schema": schema("StreamEvent"),
            },
        },
    })
}

type Schemas = Vec<(&'static str, Value)>;

/// An object of these fields, of which some are required. Other fields have no effect.
pub fn object(about: &str, required: &[&str], properties: Value) -> Value {
    described(about, json!({"type": "object", "required": required, "properties": properties}))
}

/// With words about it.
pub fn described(about: &str, mut schema: Value) -> Value {
    if !about.is_empty() {
        schema["description"] = json!(about);
    }
    schema
}

/// One of the written objects, which have no other fields.
pub fn exact(about: &str, properties: Value) -> Value {
    let names: Vec<String> = properties.as_object().into_iter().flat_map(Map::keys).cloned().collect();
    let schema =
        json!({"type": "object", "required": names, "additionalProperties": false, "properties": properties});
    described(about, schema)
}

/// One of these schemas.
pub fn one_of(names: &[&str]) -> Value {
    json!({"oneOf": names.iter().map(|name| schema(name)).collect::<Vec<_>>()})
}

/// This word alone.
pub fn constant(word: &str) -> Value {
    json!({"type": "string", "const": word})
}

fn string(about: &str) -> Value {
    nullable(json!({"description": about, "type": "string"}))
}

/// A field that has no effect, and is marked as one.
pub fn ignored(mut schema: Value) -> Value {
    schema[IGNORED] = json!(true);
    schema
}

fn requests() -> Schemas {
    vec![
        ("MessagesRequest", messages_request()),
        ("UserMessage", spoken("user", schema("UserBlock"))),
        ("AssistantMessage", spoken("assistant", schema("AssistantBlock"))),
        ("SystemMessage", system_message()),
        (
            "UserBlock",
            one_of(&["TextBlock", "ImageBlock", "DocumentBlock", "SearchResultBlock", "ToolResultBlock"]),
        ),
        ("AssistantBlock", assistant_block()),
        ("TextBlock", text_block()),
        ("ImageBlock", image_block()),
        ("DocumentBlock", document_block()),
        ("SearchResultBlock", search_result_block()),
        ("ToolUseBlock", tool_use_block()),
        ("ToolResultBlock", tool_result_block()),
        ("ImageSource", media("base64", IMAGE_TYPES)),
        ("DocumentSource", media("base64", DOCUMENT_TYPES)),
        ("TextSource", text_source()),
        ("ContentSource", content_source()),
        ("Thinking", thinking()),
        ("OutputConfig", output_config()),
        ("OutputFormat", output_format()),
        ("Tool", tool()),
        ("ToolChoice", tool_choice()),
        ("OauthCredentials", oauth_credentials()),
        ("Limits", limits()),
    ]
}

fn messages_request() -> Value {
    let model = format!("^({}|claude-[a-z0-9.-]+(\\[1m\\])?)$", ALIASES.map(|(alias, _)| alias).join("|"));
    // Any mixture of cases is read; these are what people write.
    let levels: Vec<String> =
        levels().iter().flat_map(|level| [level.to_ascii_uppercase(), (*level).to_owned()]).collect();
    let mut properties = json!({
        "messages": {
            "description": "The conversation, oldest first. The last message is the user's. With `session_id` only what \
                the user says now counts.",
            "type": "array",
            "minItems": 1,
            "maxItems": MESSAGES_MAX,
            "items": one_of(&["UserMessage", "AssistantMessage", "SystemMessage"]),
        },
        "model": nullable(json!({
            "description": "An alias, or a full id that begins with `claude-`.",
            "type": "string",
            "pattern": model,
            "maxLength": 64,
            "default": DEFAULT_MODEL,
        })),
        "system": {
            "description": "Joins the CLI's own system prompt.",
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": schema("TextBlock")},
                {"type": "null"},
            ],
        },
        "workspace_id": nullable(workspace_id()),
        "stream": nullable(json!({
            "description": "Server-sent events instead of one JSON body.", "type": "boolean", "default": false,
        })),
        "session_id": nullable(json!({
            "description": "A UUID of yours: the conversation to begin or to go on with.",
            "type": "string",
            "format": "uuid",
            "pattern": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
            "not": {"const": "00000000-0000-0000-0000-000000000000"},
        })),
        "thinking": nullable(schema("Thinking")),
        "output_config": nullable(schema("OutputConfig")),
        "max_turns": nullable(json!({
            "description": "Turns of the agent, at most; 0 = no limit. At the limit `stop_reason` is `pause_turn`.",
            "type": "integer", "minimum": 0, "maximum": TURNS_MAX, "default": 0,
        })),
        "security_level": nullable(json!({
            "description": "The level of this run, as strict as the server's maximum or stricter; in any case.",
            "type": "string",
            "enum": levels,
        })),
        "limits": nullable(schema("Limits")),
        "tools": nullable(json!({
            "description": "Your own tools. The model's calls of them come as `tool_use` blocks with `stop_reason` `tool_use`; send \
                their `tool_result` blocks within 5 minutes and the same run goes on, later (or where somebody needed its place \
                meanwhile) a new one begins out of the history. Tools of the API's own kinds have no effect.",
            "type": "array", "maxItems": TOOLS_MAX, "items": schema("Tool"),
        })),
        "tool_choice": nullable(schema("ToolChoice")),
        "max_budget_usd": nullable(json!({
            "description": "What the run may cost by the CLI's price list, in US dollars; looked at after each of the model's \
                answers. At the limit `stop_reason` is `pause_turn`.",
            "type": "number", "minimum": BUDGET_LEAST_USD, "maximum": BUDGET_MAX_USD,
        })),
        "output_format": described("As `output_config.format`.", nullable(schema("OutputFormat"))),
        "on_disconnect": nullable(json!({
            "description": "What your going away means: the run ends, or goes on to its end within its limits. An official \
                client, or one with an idempotency-key, has 10 s to come back.",
            "type": "string", "enum": ["cancel", "continue"], "default": "cancel",
        })),
        "oauth_credentials": nullable(schema("OauthCredentials")),
        "mcp_servers": described(
            "Of this turn alone, in the place of those that the session has (PUT /v1/sessions/{id}/mcp); empty = none.",
            nullable(schema("McpServers")),
        ),
        "skip_mcp_permissions": nullable(json!({
            "description": "false: the tools of `mcp_servers` are refused, since there is nobody to ask. Otherwise they are \
                used without asking: the cage is the boundary.",
            "type": "boolean",
        })),
        "max_tokens": ignored(nullable(json!({
            "description": "Sent by every official client; the CLI has limits of its own.",
            "type": "integer", "minimum": 1,
        }))),
    });
    for name in WITHOUT_EFFECT.iter().filter(|name| **name != "max_tokens") {
        properties[*name] = ignored(json!({"description": "No effect here."}));
    }
    object("A request. Fields that are not listed have no effect.", &["messages"], properties)
}

/// A message of this role: text, or blocks.
fn spoken(role: &str, block: Value) -> Value {
    let text = match role {
        // An earlier answer may be empty, once its thinking is left out.
        "assistant" => json!({"type": "string"}),
        _ => json!({"type": "string", "pattern": "\\S"}),
    };
    let least = usize::from(role == "user");
    object(
        "",
        &["role", "content"],
        json!({
            "role": constant(role),
            "content": {"anyOf": [text, {"type": "array", "minItems": least, "maxItems": BLOCKS_MAX, "items": block}]},
        }),
    )
}

fn system_message() -> Value {
    object(
        "Joins the system prompt, wherever it stands.",
        &["role"],
        json!({
            "role": constant("system"),
            "content": {"anyOf": [
                {"type": "string"}, {"type": "array", "items": schema("TextBlock")}, {"type": "null"},
            ]},
        }),
    )
}

fn assistant_block() -> Value {
    let told = ["text", "tool_use"];
    json!({"oneOf": [
        schema("TextBlock"),
        schema("ToolUseBlock"),
        object(
            "Whatever else an answer had, thinking above all: left out, and named in `x-gaoler-ignored`.",
            &["type"],
            json!({"type": {"type": "string", "not": {"enum": told}}}),
        ),
    ]})
}

fn text_block() -> Value {
    object("", &["type", "text"], json!({"type": constant("text"), "text": {"type": "string"}}))
}

fn image_block() -> Value {
    object("", &["type", "source"], json!({"type": constant("image"), "source": schema("ImageSource")}))
}

fn document_block() -> Value {
    object(
        "",
        &["type", "source"],
        json!({
            "type": constant("document"),
            "source": {"oneOf": [schema("DocumentSource"), schema("TextSource"), schema("ContentSource")]},
            "title": string("Its title."),
            "context": string("What the user says about it."),
            "citations": citations(),
        }),
    )
}

fn citations() -> Value {
    json!({"description": "Cannot be had; named in `x-gaoler-ignored` unless it is off."})
}

fn search_result_block() -> Value {
    object(
        "A result of a search. The agent gets it as text with its source.",
        &["type", "source", "title", "content"],
        json!({
            "type": constant("search_result"),
            "source": {"type": "string"},
            "title": {"type": "string"},
            "content": {"type": "array", "maxItems": BLOCKS_MAX, "items": schema("TextBlock")},
            "citations": citations(),
        }),
    )
}

fn content_source() -> Value {
    object(
        "",
        &["type", "content"],
        json!({
            "type": constant("content"),
            "content": {"anyOf": [
                {"type": "string"}, {"type": "array", "maxItems": BLOCKS_MAX, "items": schema("TextBlock")},
            ]},
        }),
    )
}

fn media(kind: &str, types: &[&str]) -> Value {
    object(
        "Nothing is fetched from a URL: send the bytes.",
        &["type", "media_type", "data"],
        json!({
            "type": constant(kind),
            "media_type": {"type": "string", "enum": types},
            "data": {
                "description": "Base64 without line breaks.",
                "type": "string",
                "contentEncoding": "base64",
                "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{3}=|[A-Za-z0-9+/]{2}==)$",
            },
        }),
    )
}

fn text_source() -> Value {
    object("", &["type", "data"], json!({"type": constant("text"), "data": {"type": "string"}}))
}

fn tool_id() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": TOOL_ID_BYTES_MAX})
}

fn tool_use_block() -> Value {
    object(
        "A call of a tool in an earlier turn: shown to the model, never executed.",
        &["type", "id", "name"],
        json!({
            "type": constant("tool_use"),
            "id": tool_id(),
            "name": tool_id(),
            "input": {"type": ["object", "null"]},
        }),
    )
}

fn tool_result_block() -> Value {
    object(
        "The result of such a call.",
        &["type", "tool_use_id"],
        json!({
            "type": constant("tool_result"),
            "tool_use_id": tool_id(),
            "content": {"anyOf": [
                {"type": "string"},
                {"type": "array", "maxItems": BLOCKS_MAX, "items": one_of(&["TextBlock", "ImageBlock", "DocumentBlock"])},
                {"type": "null"},
            ]},
            "is_error": {"type": ["boolean", "null"], "default": false},
        }),
    )
}

fn thinking() -> Value {
    object(
        "",
        &["type"],
        json!({
            "type": {
                "description": "Whether the answer shows what the model thought.",
                "type": "string", "enum": ["enabled", "adaptive", "disabled"],
            },
            "budget_tokens": ignored(json!({"type": ["integer", "null"], "minimum": 0})),
        }),
    )
}

fn output_config() -> Value {
    object(
        "",
        &[],
        json!({
            "effort": nullable(json!({"type": "string", "enum": ["low", "medium", "high", "xhigh", "max"]})),
            "format": nullable(schema("OutputFormat")),
        }),
    )
}

fn tool() -> Value {
    let kind = json!({"type": ["string", "null"], "description": "`custom`, or one of the API's own kinds, which has no effect."});
    json!({
        "description": "A tool of the client's.",
        "type": "object",
        "properties": {
            "type": kind,
            "name": {"type": "string"},
            "description": {"type": ["string", "null"]},
            "input_schema": {"type": "object", "description": "The JSON schema of its input."},
        },
        "if": {"properties": {"type": {"enum": ["custom", null]}}},
        "then": {
            "required": ["name", "input_schema"],
            "properties": {"name": {"pattern": format!("^[A-Za-z0-9_-]{{1,{NAME_BYTES_MAX}}}$")}},
        },
    })
}

fn tool_choice() -> Value {
    object(
        "`none` offers no tools. `any` and `tool` cannot be promised: they count as `auto`, and are named.",
        &["type"],
        json!({"type": {"type": "string", "enum": ["auto", "any", "tool", "none"]}}),
    )
}

fn output_format() -> Value {
    object(
        "The answer's text is JSON that follows this schema, and nothing else.",
        &["type", "schema"],
        json!({
            "type": constant("json_schema"),
            "schema": described(&format!("Of an object, {SCHEMA_BYTES_MAX} bytes at most."), json!({"type": "object"})),
        }),
    )
}

fn oauth_credentials() -> Value {
    object(
        "The credential, where no header has one.",
        &["access_token"],
        json!({
            "access_token": {"type": "string", "pattern": "^sk-ant-(oat|api)[A-Za-z0-9_-]+$"},
            "refresh_token": {"description": "Dropped unread: gaoler refreshes nothing.", "type": ["string", "null"]},
            "expires_at": nullable(json!({
                "description": "Since 1970, in milliseconds or seconds; a time that has passed is a 401.",
                "type": "integer", "minimum": 0,
            })),
            "scopes": {"description": "No effect here.", "type": ["array", "null"], IGNORED: true},
            "subscription_type": {"description": "No effect here.", "type": ["string", "null"], IGNORED: true},
        }),
    )
}

fn limits() -> Value {
    let one = |name: &str| (name.to_owned(), json!({"type": "integer", "minimum": 1, "maximum": u32::MAX}));
    let properties: Map<String, Value> = Limits::NAMES.into_iter().map(one).collect();
    json!({
        "description": "Lower limits for this run. One above the level's own has no effect.",
        "type": "object",
        "additionalProperties": false,
        "properties": properties,
    })
}

fn answers() -> Schemas {
    vec![
        ("Message", message(json!({"type": "array", "items": schema("AnswerBlock")}), stop_reason(), true)),
        ("AnswerBlock", answer_block(json!({"type": "null"}))),
        ("Usage", usage()),
        ("TokenCount", exact("", json!({"input_tokens": count()}))),
        ("Cost", exact("By the CLI's price list.", json!({"total_cost_usd": {"type": "number"}}))),
    ]
}

fn stop_reason() -> Value {
    let all: Vec<&str> = STOP_REASONS.iter().copied().chain([TOOL_USE]).collect();
    json!({"type": "string", "enum": all})
}

fn message(content: Value, stop_reason: Value, is_whole: bool) -> Value {
    let nothing = json!({"type": "null"});
    let mut schema = exact(
        "",
        json!({
            "id": {"type": "string", "pattern": "^msg_01[0-9A-Za-z]{22}$"},
            "type": constant("message"),
            "role": constant("assistant"),
            "model": {"description": "What the upstream called it.", "type": "string"},
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": nothing,
            "stop_details": nothing,
            "container": nothing,
            "usage": schema("Usage"),
            "session_id": {"description": "The session, where the request named one.", "type": ["string", "null"], "format": "uuid"},
            "run_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        }),
    );
    schema["properties"]["mcp_servers"] = json!({
        "description": "How each server of the request stood when the turn began; only where it named some.",
        "type": "array", "items": self::schema("McpStatus"),
    });
    if is_whole {
        // These two are there where there is something to say.
        schema["properties"]["x_cost"] = self::schema("Cost");
        schema["properties"]["x_error"] = self::schema("Error");
    }
    schema
}

/// The blocks of an answer; a stream leaves `citations` out.
fn answer_block(citations: Value) -> Value {
    let mut text = json!({"type": constant("text"), "text": {"type": "string"}});
    if !citations.is_boolean() {
        text["citations"] = citations;
    }
    let string = json!({"type": "string"});
    json!({"oneOf": [
        exact("", text),
        exact(
            "Only where `thinking` asked for it.",
            json!({"type": constant("thinking"), "thinking": string, "signature": string}),
        ),
        exact("", json!({"type": constant("redacted_thinking"), "data": string})),
        exact(
            "A call of one of your tools.",
            json!({"type": constant("tool_use"), "id": string, "name": string, "input": {"type": "object"}}),
        ),
    ]})
}

fn count() -> Value {
    json!({"type": "integer", "minimum": 0})
}

fn usage() -> Value {
    exact(
        "Of all turns together.",
        json!({
            "input_tokens": count(),
            "output_tokens": count(),
            "cache_creation_input_tokens": count(),
            "cache_read_input_tokens": count(),
            "cache_creation": exact(
                "",
                json!({"ephemeral_5m_input_tokens": count(), "ephemeral_1h_input_tokens": count()}),
            ),
            "server_tool_use": {"type": "null"},
            "service_tier": constant("standard"),
        }),
    )
}

fn events() -> Schemas {
    const NAMES: [&str; 8] = [
        "MessageStart",
        "ContentBlockStart",
        "ContentBlockDelta",
        "ContentBlockStop",
        "MessageDelta",
        "MessageStop",
        "Ping",
        "Error",
    ];
    let string = json!({"type": "string"});
    let delta = |kind: &str, field: &str| {
        let mut properties = json!({"type": constant(kind)});
        properties[field] = string.clone();
        exact("", properties)
    };
    let stop = exact("", json!({"stop_reason": stop_reason(), "stop_sequence": {"type": "null"}}));
    let totals = exact(
        "",
        json!({
            "input_tokens": count(),
            "output_tokens": count(),
            "cache_creation_input_tokens": count(),
            "cache_read_input_tokens": count(),
        }),
    );
    let mut message_delta =
        exact("", json!({"type": constant("message_delta"), "delta": stop, "usage": totals}));
    message_delta["properties"]["x_cost"] = schema("Cost");
    let start = message(json!({"type": "array", "maxItems": 0}), json!({"type": "null"}), false);
    vec![
        ("StreamEvent", one_of(&NAMES)),
        ("MessageStart", exact("", json!({"type": constant("message_start"), "message": start}))),
        (
            "ContentBlockStart",
            exact(
                "",
                json!({
                    "type": constant("content_block_start"),
                    "index": count(),
                    "content_block": answer_block(Value::Bool(false)),
                }),
            ),
        ),
        (
            "ContentBlockDelta",
            exact(
                "",
                json!({
                    "type": constant("content_block_delta"),
                    "index": count(),
                    "delta": {"oneOf": [
                        delta("text_delta", "text"),
                        delta("thinking_delta", "thinking"),
                        delta("signature_delta", "signature"),
                        delta("input_json_delta", "partial_json"),
                    ]},
                }),
            ),
        ),
        ("ContentBlockStop", exact("", json!({"type": constant("content_block_stop"), "index": count()}))),
        ("MessageDelta", message_delta),
        ("MessageStop", exact("", json!({"type": constant("message_stop")}))),
        ("Ping", exact("Every few seconds of silence.", json!({"type": constant("ping")}))),
    ]
}
