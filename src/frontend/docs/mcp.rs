//! What /openapi.json says of MCP: the servers that a request names, the operator's catalogue, and the probe.
//! It must never describe a form that `job/mcp.rs` does not read.

use serde_json::{Value, json};

use super::errors;
use super::messages::{exact, object, run_headers, run_parameters};
use super::openapi::{Group, answers, nullable, schema};

/// How a server may stand.
const STATUSES: [&str; 7] =
    ["connected", "failed", "pending", "needs-auth", "disabled", "missing", "unknown"];

/// The group.
pub fn group() -> Group {
    Group {
        name: "MCP",
        about: "Servers whose tools the agent gets: local ones run in the cage, remote ones are asked by egress.",
        paths: vec![("/v1/mcp/catalog", catalog()), ("/v1/mcp/probe", probe())],
        schemas: vec![
            ("McpServers", servers()),
            ("McpServer", server()),
            (
                "McpTools",
                object(
                    "",
                    &[],
                    json!({"enabled": nullable(json!({"description": "false leaves the server out.", "type": "boolean"}))}),
                ),
            ),
            ("McpListed", object("One of a list.", &["name"], json!({"name": name()}))),
            (
                "McpStatus",
                exact("How a server stands, by the CLI's word.", json!({"name": name(), "status": status()})),
            ),
            ("McpCatalog", exact("", json!({"servers": {"type": "array", "items": schema("McpOffer")}}))),
            (
                "McpOffer",
                exact(
                    "A server that the operator offers.",
                    json!({"name": name(), "description": {"type": "string"}, "kind": {"type": "string", "enum": ["local", "remote"]}}),
                ),
            ),
            ("McpProbe", probe_request()),
            ("McpProbed", exact("", json!({"servers": {"type": "array", "items": schema("McpFound")}}))),
            ("McpFound", found()),
        ],
    }
}

fn name() -> Value {
    json!({"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"})
}

fn status() -> Value {
    json!({"type": "string", "enum": STATUSES})
}

fn catalog() -> Value {
    let mut responses = errors::responses(errors::CATALOG, errors::Form::Plain);
    responses.insert("200".to_owned(), answers("What the operator offers.", "McpCatalog"));
    json!({"get": {
        "operationId": "mcp_catalog",
        "summary": "The MCP servers that the operator offers by name",
        "description": "A request names one as `{\"catalog\": NAME}`.",
        "security": [{"bearer": []}, {"api_key": []}],
        "responses": responses,
    }})
}

fn probe() -> Value {
    let mut responses = errors::responses(errors::MESSAGES, errors::Form::Messages);
    responses.insert(
        "200".to_owned(),
        json!({
            "description": "How each server stands, in the order of their names.",
            "headers": run_headers(),
            "content": {"application/json": {"schema": schema("McpProbed")}},
        }),
    );
    json!({"post": {
        "operationId": "mcp_probe",
        "summary": "Try MCP servers",
        "description": "A run of the CLI that starts or reaches the servers and asks no model. A server has 45 s to answer.",
        "security": [{"bearer": []}, {"api_key": []}],
        "parameters": run_parameters().into_iter().take(1).collect::<Vec<_>>(),
        "requestBody": {
            "required": true,
            "content": {"application/json": {
                "schema": schema("McpProbe"),
                "example": {"mcp_servers": {"memory": {"command": "npx", "args": ["-y", "@modelcontextprotocol/server-memory"]}}},
            }},
        },
        "responses": responses,
    }})
}

fn probe_request() -> Value {
    let of_messages =
        |name: &str| json!({"$ref": format!("#/components/schemas/MessagesRequest/properties/{name}")});
    object(
        "Servers to try. Fields that are not listed have no effect.",
        &["mcp_servers"],
        json!({
            "mcp_servers": schema("McpServers"),
            "security_level": of_messages("security_level"),
            "oauth_credentials": of_messages("oauth_credentials"),
        }),
    )
}

fn servers() -> Value {
    json!({
        "description": "At most 16, by their names, or as a list of which each has its `name`.",
        "oneOf": [
            {
                "type": "object",
                "maxProperties": 16,
                "propertyNames": {"pattern": "^[A-Za-z0-9_-]{1,64}$"},
                "additionalProperties": schema("McpServer"),
            },
            {
                "type": "array",
                "maxItems": 16,
                "items": {"allOf": [
                    schema("McpServer"),
                    schema("McpListed"),
                ]},
            },
        ],
    })
}

fn server() -> Value {
    let text = |about: &str| nullable(json!({"description": about, "type": "string"}));
    let map = |about: &str| {
        nullable(json!({"description": about, "type": "object", "additionalProperties": {"type": "string"}}))
    };
    let one_of = |field: &str| json!({"required": [field], "properties": {field: {"type": "string"}}});
    let mut server = object(
        "A server: `command` (a program in the run's cage), `url` (a remote server, which egress asks; the secret stays there) \
         or `catalog` (a name of GET /v1/mcp/catalog). Remote servers are https on port 443, unless the operator named the \
         place, and are not had at the level paranoid.",
        &[],
        json!({
            "command": text("The program."),
            "args": nullable(json!({"description": "Its arguments.", "type": "array", "items": {"type": "string"}, "maxItems": 128})),
            "env": map("Its environment, beside the run's own."),
            "url": text("Where the server is."),
            "catalog": text("The operator's name for it."),
            "transport": nullable(json!({"description": "`http` where it is not given.", "type": "string", "enum": ["http", "sse"]})),
            "type": nullable(json!({
                "description": "The same in other clients' words.", "type": "string", "enum": ["http", "sse", "streamable-http", "streamable_http", "url", "stdio"],
            })),
            "auth_type": nullable(json!({"description": "Where the token came from; all go into the same header.", "type": "string", "enum": ["jwt", "oauth", "bearer"]})),
            "auth_token": text("Sent as `authorization: Bearer` by egress; never in the cage."),
            "authorization_token": text("The same in the official clients' words."),
            "headers": map("Headers for the server, which egress adds; never in the cage."),
            "tool_configuration": nullable(schema("McpTools")),
        }),
    );
    server["oneOf"] = json!([one_of("command"), one_of("url"), one_of("catalog")]);
    server
}

fn found() -> Value {
    let text = json!({"type": "string"});
    let mut schema = exact(
        "A server as it was found.",
        json!({"name": name(), "status": status(), "tools": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": false,
                "properties": {"name": text, "description": text},
            },
        }}),
    );
    schema["properties"]["server"] = exact("What it says of itself.", json!({"name": text, "version": text}));
    schema["properties"]["error"] =
        json!({"description": "Why it failed, by the CLI's word.", "type": "string"});
    schema
}
