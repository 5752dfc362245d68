//! What /openapi.json says of GET /v1/models, GET /v1/models/{id} and of what clients ask for before anything else.
//! It must never describe another form than `models.rs` writes, which both families of clients read.

use serde_json::{Value, json};

use super::errors;
use super::openapi::{Group, answers, schema};

/// The group.
pub fn group() -> Group {
    Group {
        name: "Models",
        about: "The models that this server names. One form for both families of clients; nothing is asked upstream.",
        paths: vec![("/v1/models", page()), ("/v1/models/{id}", one()), ("/api/hello", hello())],
        schemas: vec![("ModelList", list_schema()), ("Model", model_schema()), ("Hello", hello_schema())],
    }
}

fn page() -> Value {
    let mut responses = errors::responses(errors::MODELS, errors::Form::Both);
    responses.insert("200".to_owned(), answers("A page of the list.", "ModelList"));
    let query = |name: &str, about: &str, kind: Value| json!({"name": name, "in": "query", "description": about, "schema": kind});
    json!({"get": {
        "operationId": "models",
        "summary": "The models that can be asked for by a short name",
        "description": "A full id that begins with `claude-` may be asked for although it is not in the list; the upstream \
            decides.",
        "security": [{"bearer": []}, {"api_key": []}],
        "parameters": [
            query("limit", "Models on the page.", json!({"type": "integer", "minimum": 1, "maximum": 1000, "default": 1000})),
            query("after_id", "The page begins after this model. Not together with `before_id`.", json!({"type": "string"})),
            query("before_id", "The page ends before this model.", json!({"type": "string"})),
        ],
        "responses": responses,
    }})
}

fn one() -> Value {
    let mut responses = errors::responses(errors::MODEL, errors::Form::Both);
    responses.insert("200".to_owned(), answers("The model.", "Model"));
    json!({"get": {
        "operationId": "model",
        "summary": "One model of the list",
        "security": [{"bearer": []}, {"api_key": []}],
        "parameters": [{"name": "id", "in": "path", "required": true, "schema": {"type": "string"}}],
        "responses": responses,
    }})
}

fn hello() -> Value {
    json!({"get": {
        "operationId": "hello",
        "summary": "What Claude Code asks for before anything else",
        "responses": {"200": answers("The server is there.", "Hello")},
    }})
}

fn list_schema() -> Value {
    let id = || json!({"type": ["string", "null"]});
    json!({
        "type": "object",
        "required": ["object", "data", "has_more", "first_id", "last_id"],
        "additionalProperties": false,
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": schema("Model")},
            "has_more": {"description": "Whether another page follows in the direction asked for.", "type": "boolean"},
            "first_id": id(),
            "last_id": id(),
        },
    })
}

fn model_schema() -> Value {
    json!({
        "description": "A model, as both families of clients read it.",
        "type": "object",
        "required": ["type", "id", "display_name", "created_at", "object", "created", "owned_by"],
        "additionalProperties": false,
        "properties": {
            "type": {"const": "model"},
            "id": {"type": "string"},
            "display_name": {"type": "string"},
            "created_at": {"description": "The epoch: what an alias stands for changes.", "type": "string", "format": "date-time"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
        },
    })
}

fn hello_schema() -> Value {
    json!({
        "type": "object",
        "required": ["message"],
        "additionalProperties": false,
        "properties": {"message": {"type": "string"}},
    })
}
