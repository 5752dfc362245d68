//! What /openapi.json says of POST /v1/chat/completions: the fields that `job/completions.rs` reads and what
//! `completions.rs` writes. It must never describe a field that nobody reads, nor leave one out: tests compare them.

use serde_json::{Value, json};

use super::errors;
use super::messages::{constant, described, exact, ignored, object, one_of, run_headers, run_parameters};
use super::openapi::{Group, nullable, schema};
use crate::frontend::job::tools::{NAME_BYTES_MAX, TOOLS_MAX};
use crate::frontend::job::{BLOCKS_MAX, MESSAGES_MAX};

/// The group.
pub fn group() -> Group {
    Group {
        name: "Chat completions",
        about: "The same run in the dialect of chat completions, for clients that speak no other.",
        paths: vec![("/v1/chat/completions", path())],
        schemas: vec![
            ("CompletionsRequest", request()),
            (
                "CompletionsMessage",
                one_of(&["CompletionsText", "CompletionsUser", "CompletionsAssistant", "CompletionsTool"]),
            ),
            (
                "CompletionsText",
                spoken(&["system", "developer"], json!({"type": ["string", "array", "null"]}), json!({})),
            ),
            ("CompletionsUser", spoken(&["user"], content(schema("CompletionsPart")), json!({}))),
            ("CompletionsAssistant", assistant()),
            ("CompletionsTool", tool()),
            ("CompletionsFunction", function()),
            ("CompletionsPart", one_of(&["TextBlock", "CompletionsImage"])),
            ("CompletionsImage", image()),
            ("Completion", completion()),
            ("CompletionChunk", chunk()),
            ("CompletionUsage", usage()),
        ],
    }
}

fn path() -> Value {
    let mut responses = errors::responses(errors::MESSAGES, errors::Form::Completions);
    responses.insert("200".to_owned(), done());
    let mut parameters = run_parameters();
    parameters.push(json!({
        "name": "x-session-id", "in": "header",
        "description": "A UUID of yours: the conversation to begin or to go on with, as `session_id` in the body.",
        "schema": {"type": "string", "format": "uuid"},
    }));
    json!({"post": {
        "operationId": "completions",
        "summary": "Ask the agent, as a chat completion",
        "description": "For clients that speak no other dialect; the run, its cage and its bounds are those of \
            `POST /v1/messages`. The agent's own tools run in its cage and are never shown; calls of yours come as `tool_calls`. \
            `n` above 1 is refused, and what else has no effect is named in `x-gaoler-ignored`.",
        "security": [{"bearer": []}, {"api_key": []}],
        "parameters": parameters,
        "requestBody": {
            "required": true,
            "description": "At most 32 MB, uncompressed.",
            "content": {"application/json": {
                "schema": schema("CompletionsRequest"),
                "examples": {"one_answer": {"summary": "One answer", "value": {
                    "model": "sonnet", "messages": [{"role": "user", "content": "RUN: id; pwd; ls /"}],
                }}},
            }},
        },
        "responses": responses,
    }})
}

fn done() -> Value {
    json!({
        "description": "The answer. Should a run fail after 50 s of white space, `x_error` says how and `finish_reason` is \
            `length`. A stream ends with `data: [DONE]`, or with an object `error`.",
        "headers": run_headers(),
        "content": {
            "application/json": {"schema": schema("Completion")},
            "text/event-stream": {
                "schema": {"description": "Server-sent events, `data: JSON`; each JSON is a CompletionChunk."},
                "x-event-schema": schema("CompletionChunk"),
            },
        },
    })
}

fn request() -> Value {
    let number = || json!({"type": "integer", "minimum": 1});
    let of_messages =
        |name: &str| json!({"$ref": format!("#/components/schemas/MessagesRequest/properties/{name}")});
    object(
        "A request. Fields that are not listed have no effect.",
        &["messages"],
        json!({
            "messages": {
                "type": "array", "minItems": 1, "maxItems": MESSAGES_MAX, "items": schema("CompletionsMessage"),
            },
            "model": of_messages("model"),
            "stream": of_messages("stream"),
            "stream_options": nullable(object(
                "",
                &[],
                json!({"include_usage": nullable(json!({
                    "description": "A last chunk with the usage, before `[DONE]`.", "type": "boolean", "default": false,
                }))}),
            )),
            "session_id": described(
                "A UUID of yours: the conversation to begin or to go on with. What is none has no effect.",
                json!({}),
            ),
            "reasoning_effort": nullable(json!({
                "type": "string", "enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max"],
            })),
            "thinking": of_messages("thinking"),
            "max_turns": of_messages("max_turns"),
            "security_level": of_messages("security_level"),
            "limits": of_messages("limits"),
            "workspace_id": of_messages("workspace_id"),
            "on_disconnect": of_messages("on_disconnect"),
            "max_budget_usd": of_messages("max_budget_usd"),
            "output_format": of_messages("output_format"),
            "oauth_credentials": of_messages("oauth_credentials"),
            "mcp_servers": of_messages("mcp_servers"),
            "skip_mcp_permissions": of_messages("skip_mcp_permissions"),
            "n": nullable(json!({"type": "integer", "const": 1})),
            "tools": nullable(json!({
                "description": "Your own functions. The model's calls of them come as `tool_calls` with the `finish_reason` \
                    `tool_calls`; send a message of the role `tool` for each within 5 minutes and the same run goes on, later \
                    (or where somebody needed its place meanwhile) a new one begins out of the history. Tools of other kinds have no effect.",
                "type": "array", "maxItems": TOOLS_MAX, "items": schema("CompletionsFunction"),
            })),
            "tool_choice": nullable(json!({
                "description": "`none` offers no tools. `required` and a function's name cannot be promised: they count as `auto`, \
                    and are named.",
                "anyOf": [
                    {"type": "string", "enum": ["none", "auto", "required"]},
                    object(
                        "",
                        &["type"],
                        json!({"type": {"type": "string", "enum": ["function", "custom", "allowed_tools"]}}),
                    ),
                ],
            })),
            "parallel_tool_calls": nullable(json!({
                "description": "false cannot be promised, and is named.", "type": "boolean", "default": true,
            })),
            "functions": ignored(json!({})),
            "function_call": nullable(json!({"type": "string", "enum": ["auto", "none"]})),
            "max_tokens": ignored(nullable(number())),
            "max_completion_tokens": ignored(nullable(number())),
        }),
    )
}

fn content(part: Value) -> Value {
    json!({"anyOf": [{"type": "string"}, {"type": "array", "maxItems": BLOCKS_MAX, "items": part}]})
}

fn spoken(roles: &[&str], content: Value, more: Value) -> Value {
    let mut properties = json!({
        "role": {"type": "string", "enum": roles},
        "content": content,
        "name": described("No effect here.", json!({})),
    });
    if let (Some(properties), Value::Object(more)) = (properties.as_object_mut(), more) {
        properties.extend(more);
    }
    let required: &[&str] = if roles == ["user"] { &["role", "content"] } else { &["role"] };
    object("", required, properties)
}

fn assistant() -> Value {
    let call = object(
        "A call of a tool in an earlier turn: shown to the model, never executed.",
        &["id", "function"],
        json!({
            "id": {"type": "string"},
            "function": object(
                "",
                &["name"],
                json!({"name": {"type": "string"}, "arguments": nullable(json!({"type": "string"}))}),
            ),
        }),
    );
    let calls =
        json!({"tool_calls": nullable(json!({"type": "array", "maxItems": BLOCKS_MAX, "items": call}))});
    spoken(&["assistant"], json!({"type": ["string", "array", "null"]}), calls)
}

fn tool() -> Value {
    let id = json!({"tool_call_id": {"type": "string", "minLength": 1}});
    spoken(&["tool"], json!({"type": ["string", "array", "null"]}), id)
}

fn function() -> Value {
    let function = object(
        "",
        &["name"],
        json!({
            "name": {"type": "string", "pattern": format!("^[A-Za-z0-9_-]{{1,{NAME_BYTES_MAX}}}$")},
            "description": nullable(json!({"type": "string"})),
            "parameters": nullable(json!({"description": "The JSON schema of its arguments.", "type": "object"})),
            "strict": nullable(json!({"description": "true cannot be promised, and is named.", "type": "boolean"})),
        }),
    );
    json!({
        "description": "A function of the client's.",
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"type": "string", "description": "`function`; other kinds have no effect."},
        },
        "if": {"properties": {"type": {"const": "function"}}},
        "then": {"required": ["function"], "properties": {"function": function}},
    })
}

fn call() -> Value {
    exact(
        "A call of one of your functions.",
        json!({
            "id": {"type": "string"},
            "type": {"const": "function"},
            "function": exact("", json!({
                "name": {"type": "string"},
                "arguments": {"description": "JSON.", "type": "string"},
            })),
        }),
    )
}

fn image() -> Value {
    object(
        "Nothing is fetched from a URL: send the bytes, `data:image/png;base64,...`.",
        &["type", "image_url"],
        json!({
            "type": constant("image_url"),
            "image_url": {"anyOf": [
                {"type": "string"},
                object("", &["url"], json!({"url": {"type": "string", "pattern": "^[dD][aA][tT][aA]:"}})),
            ]},
        }),
    )
}

fn finish_reasons() -> Value {
    json!(["stop", "length", "content_filter", "tool_calls"])
}

fn completion() -> Value {
    let mut completion = exact(
        "",
        json!({
            "id": {"type": "string", "pattern": "^chatcmpl-"},
            "object": {"const": "chat.completion"},
            "created": {"description": "Seconds since the epoch.", "type": "integer"},
            "model": {"type": "string"},
            "system_fingerprint": {"type": "null"},
            "choices": {"type": "array", "minItems": 1, "maxItems": 1, "items": exact(
                "",
                json!({
                    "index": {"const": 0},
                    "message": {
                        "type": "object",
                        "required": ["role", "content", "refusal"],
                        "additionalProperties": false,
                        "properties": {
                            "role": {"const": "assistant"},
                            "content": {
                                "description": "All turns of the agent; null where there are calls alone.",
                                "type": ["string", "null"],
                            },
                            "tool_calls": {"type": "array", "minItems": 1, "items": call()},
                            "refusal": {"type": "null"},
                            "reasoning_content": {"description": "Where `thinking` asks for it.", "type": "string"},
                        },
                    },
                    "logprobs": {"type": "null"},
                    "finish_reason": {"type": "string", "enum": finish_reasons()},
                }),
            )},
            "usage": schema("CompletionUsage"),
            "session_id": {"type": ["string", "null"]},
            "run_id": {"type": "string"},
        }),
    );
    completion["properties"]["x_cost"] =
        json!({"description": "What the CLI says that it cost.", "type": "object"});
    completion["properties"]["x_error"] =
        json!({"description": "The run failed after this had begun.", "type": "object"});
    completion
}

fn chunk() -> Value {
    let delta = json!({
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "role": {"const": "assistant"},
            "content": {"type": "string"},
            "reasoning_content": {"type": "string"},
            "tool_calls": {"type": "array", "minItems": 1, "maxItems": 1, "items": {
                "type": "object",
                "required": ["index", "function"],
                "additionalProperties": false,
                "properties": {
                    "index": {"type": "integer", "minimum": 0},
                    "id": {"description": "In a call's first piece, as its type and name.", "type": "string"},
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "required": ["arguments"],
                        "additionalProperties": false,
                        "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
                    },
                },
            }},
        },
    });
    let mut chunk = exact(
        "",
        json!({
            "id": {"type": "string", "pattern": "^chatcmpl-"},
            "object": {"const": "chat.completion.chunk"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "system_fingerprint": {"type": "null"},
            "choices": {"type": "array", "maxItems": 1, "items": exact(
                "",
                json!({
                    "index": {"const": 0},
                    "delta": delta,
                    "logprobs": {"type": "null"},
                    "finish_reason": {"type": ["string", "null"], "enum": ["stop", "length", "content_filter", "tool_calls", null]},
                }),
            )},
        }),
    );
    chunk["properties"]["usage"] = json!({"anyOf": [schema("CompletionUsage"), {"type": "null"}]});
    chunk["properties"]["x_cost"] = json!({"type": "object"});
    chunk
}

fn usage() -> Value {
    let count = || json!({"type": "integer", "minimum": 0});
    exact(
        "",
        json!({
            "prompt_tokens": count(),
            "completion_tokens": count(),
            "total_tokens": count(),
            "prompt_tokens_details": exact("", json!({"cached_tokens": count()})),
        }),
    )
}
