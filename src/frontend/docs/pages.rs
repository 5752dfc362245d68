//! What /openapi.json says of the pages that explain the API: `/`, /openapi.json and /docs.
//! It must never name a file of /docs that is not in the binary.

use serde_json::{Value, json};

use super::openapi::{Group, request_id};
use super::{FILES, errors};

/// The group.
pub fn group() -> Group {
    Group {
        name: "Documentation",
        about: "What you are reading. All of it is in the binary; nothing is loaded from elsewhere.",
        paths: vec![("/", root()), ("/openapi.json", openapi()), ("/docs", docs()), ("/docs/{file}", file())],
        schemas: vec![("Guide", guide())],
    }
}

fn page(about: &str) -> Value {
    json!({
        "description": about,
        "headers": request_id(),
        "content": {"text/html": {"schema": {"type": "string"}}},
    })
}

fn root() -> Value {
    let mut answer =
        page("A page for a browser, which asks for `text/html`; the same as JSON for everybody else.");
    answer["content"]["application/json"] = json!({"schema": super::openapi::schema("Guide")});
    json!({"get": {
        "operationId": "guide",
        "summary": "How to use this server",
        "responses": {"200": answer},
    }})
}

fn openapi() -> Value {
    json!({"get": {
        "operationId": "openapi",
        "summary": "This document",
        "responses": {"200": {
            "description": "OpenAPI 3.1.",
            "headers": request_id(),
            "content": {"application/json": {"schema": {"type": "object", "required": ["openapi", "info", "paths"]}}},
        }},
    }})
}

fn docs() -> Value {
    json!({"get": {
        "operationId": "docs",
        "summary": "Swagger UI: this document, with requests that can be tried",
        "responses": {"200": page("A page for a browser.")},
    }})
}

fn file() -> Value {
    let names: Vec<&str> = FILES.iter().map(|file| file.name).collect();
    let mut responses = errors::responses(&errors::NO_ROUTE[..1], errors::Form::Plain);
    let mut content = serde_json::Map::new();
    for file in FILES {
        let kind = file.kind.split(';').next().unwrap_or_default();
        content.insert(kind.to_owned(), json!({"schema": {"type": "string"}}));
    }
    responses.insert(
        "200".to_owned(),
        json!({"description": "The file.", "headers": request_id(), "content": content}),
    );
    json!({"get": {
        "operationId": "docs_file",
        "summary": "What the pages are made of",
        "parameters": [{
            "name": "file", "in": "path", "required": true, "schema": {"type": "string", "enum": names},
        }],
        "responses": responses,
    }})
}

fn guide() -> Value {
    let rows =
        |required: &[&str]| json!({"type": "array", "items": {"type": "object", "required": required}});
    json!({
        "description": "How to use this server, for a program or a model that reads it.",
        "type": "object",
        "required": [
            "name", "version", "status", "what", "authentication", "endpoints", "parameters", "examples", "patterns",
            "errors", "security", "documentation",
        ],
        "additionalProperties": false,
        "properties": {
            "name": {"const": "gaoler"},
            "version": {"type": "string"},
            "status": {"type": "string", "enum": ["healthy", "draining"]},
            "what": {"type": "string"},
            "authentication": {"type": "array", "items": {"type": "string"}},
            "endpoints": rows(&["method", "path", "summary", "credential"]),
            "parameters": rows(&["name", "type", "required", "about"]),
            "examples": rows(&["title", "curl"]),
            "patterns": rows(&["title", "about", "requests", "sent"]),
            "errors": rows(&["status", "code", "means"]),
            "security": super::openapi::schema("Security"),
            "documentation": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    })
}
