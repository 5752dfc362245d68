//! What /openapi.json says of what is kept for a tenant: who it is, what it used, its stored credential and its links.
//! It must never describe a way to read a credential: there is none.

use serde_json::{Value, json};

use super::errors::{self, Form, Known};
use super::openapi::{Group, answers, nullable, schema};

/// The group.
pub fn group() -> Group {
    Group {
        name: "Tenant",
        about: "What is kept for whoever asks. A tenant key (`gaol_t_...`) is issued by the operator: `gaoler key create`.",
        paths: vec![
            ("/v1/me", me()),
            ("/v1/usage", usage()),
            ("/v1/credential", credential()),
            ("/v1/credential/link", link()),
        ],
        schemas: vec![
            ("Me", me_schema()),
            ("UsagePage", page_schema()),
            ("UsageDay", day_schema()),
            ("Left", left_schema()),
            ("StoredCredential", stored_schema()),
            ("GivenCredential", given_schema()),
            ("Done", done_schema()),
        ],
    }
}

/// An operation that somebody must be recognized for.
fn operation(id: &str, summary: &str, errors: &[Known], about: &str, name: &str) -> Value {
    let mut responses = errors::responses(errors, Form::Plain);
    responses.insert("200".to_owned(), answers(about, name));
    json!({
        "operationId": id,
        "summary": summary,
        "security": [{"bearer": []}, {"api_key": []}],
        "responses": responses,
    })
}

fn me() -> Value {
    json!({"get": operation("me", "Who I am here", errors::SOMEBODY, "Who asks.", "Me")})
}

fn usage() -> Value {
    let mut operation =
        operation("usage", "What I used, by day", errors::USAGE, "Days, newest first.", "UsagePage");
    operation["description"] = json!(
        "Tokens and bytes are counted outside the cages, where what goes to the upstream passes. A clone of a repository is a \
         run without tokens, and its bytes are those to and from the repository's host. Other requests about files are not \
         counted. Days are UTC's."
    );
    operation["parameters"] = json!([
        {"name": "limit", "in": "query", "description": "Days on the page.",
            "schema": {"type": "integer", "minimum": 1, "maximum": 50, "default": 30}},
        {"name": "before", "in": "query", "description": "Days before this one, as `next_page` names it.",
            "schema": {"type": "string", "format": "date"}},
    ]);
    json!({"get": operation})
}

/// With the credential beside the key, in a header or in the body.
fn given(mut operation: Value) -> Value {
    operation["parameters"] = json!([{
        "name": "x-claude-credential",
        "in": "header",
        "description": "The credential, `sk-ant-oat...` or `sk-ant-api...`; without it the body has it.",
        "schema": {"type": "string"},
    }]);
    operation["requestBody"] = json!({
        "required": false,
        "content": {"application/json": {"schema": schema("GivenCredential")}},
    });
    operation
}

fn credential() -> Value {
    let mut put = given(operation(
        "keep_credential",
        "Store the credential that my runs use",
        errors::GIVEN,
        "It is stored.",
        "StoredCredential",
    ));
    put["description"] = json!(
        "It is sealed so that only the process that brings it to the upstream can open it, and only in a run of this \
         tenant. It takes the place of the one before, and cannot be read again."
    );
    let get = operation(
        "kept_credential",
        "Whether a credential is stored",
        errors::STORED,
        "What may be told of it.",
        "StoredCredential",
    );
    let delete =
        operation("drop_credential", "Forget the stored credential", errors::STORED, "It is gone.", "Done");
    json!({"put": put, "get": get, "delete": delete})
}

fn link() -> Value {
    let mut put = given(operation(
        "link_credential",
        "Be this tenant also by this credential alone",
        errors::LINK,
        "Whoever shows the credential alone is this tenant from now on.",
        "Done",
    ));
    put["description"] = json!(
        "A credential of the upstream alone is a tenant by itself, with a workspace that is lost when it is rotated. \
         Linked, it is this tenant. Only its keyed digest is kept."
    );
    let delete = given(operation(
        "unlink_credential",
        "End that",
        errors::UNLINK,
        "It is a tenant by itself again.",
        "Done",
    ));
    json!({"put": put, "delete": delete})
}

fn me_schema() -> Value {
    json!({
        "type": "object",
        "required": ["type", "by"],
        "additionalProperties": false,
        "properties": {
            "type": {"enum": ["tenant", "admin"]},
            "by": {"description": "What was shown.", "enum": ["key", "credential", "linked_credential"]},
            "id": {"description": "What usage is counted under.", "type": "string"},
            "name": {"type": "string"},
            "key": nullable(json!({"description": "The key's public part.", "type": "string"})),
            "key_expires_at": nullable(json!({"type": "string", "format": "date-time"})),
            "credential": nullable(schema("StoredCredential")),
        },
    })
}

fn page_schema() -> Value {
    json!({
        "type": "object",
        "required": ["object", "data", "has_more", "next_page", "limits", "left"],
        "additionalProperties": false,
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": schema("UsageDay")},
            "has_more": {"type": "boolean"},
            "next_page": nullable(json!({"description": "`before` of the next page.", "type": "string"})),
            "limits": {
                "description": "What you may; `null` is any number.",
                "allOf": [schema("Allowance")],
            },
            "left": schema("Left"),
        },
    })
}

fn left_schema() -> Value {
    let tokens = || nullable(json!({"type": "integer", "minimum": 0}));
    let usd = || nullable(json!({"type": "number", "minimum": 0}));
    let properties = json!({
        "tokens_per_day": tokens(),
        "tokens_per_month": tokens(),
        "cost_per_day_usd": usd(),
        "cost_per_month_usd": usd(),
    });
    let names: Vec<&String> = properties.as_object().into_iter().flat_map(|fields| fields.keys()).collect();
    json!({
        "description": "What of that is left, beside what your live runs are taken to use or have used, whichever is more; \
                        `null` where there is no limit. Of tokens that the upstream took from its cache only the cost counts.",
        "type": "object",
        "required": names,
        "additionalProperties": false,
        "properties": properties,
    })
}

/// What something cost.
pub fn cost() -> Value {
    nullable(json!({
        "description": "Dollars: what was counted outside the cages, at the operator's prices of that time, by the model of \
                        each request; what has no price there costs what the dearest model does. `null` where the operator \
                        has set none.",
        "type": "number",
        "minimum": 0,
    }))
}

fn day_schema() -> Value {
    day_of(None)
}

/// A day; with whose it was.
pub fn day_of(more: Option<&str>) -> Value {
    let count = |about: &str| json!({"description": about, "type": "integer", "minimum": 0});
    let mut properties = json!({
        "day": {"type": "string", "format": "date"},
        "runs": count("Runs that ended, and clones of repositories."),
        "failed": count("Those of them that ended with an error."),
        "wall_ms": count("Their time."),
        "requests": count("Requests to the upstream."),
        "denials": count("What they tried and were denied."),
        "input_tokens": count("As the upstream counted."),
        "output_tokens": count("As the upstream counted."),
        "cache_creation_input_tokens": count("As the upstream counted."),
        "cache_read_input_tokens": count("As the upstream counted."),
        "bytes_up": count("To the upstream; of a clone, to the repository's host."),
        "bytes_down": count("From the upstream; of a clone, from the repository's host."),
        "cost_usd": cost(),
    });
    if let Some(name) = more {
        properties[name] = json!({"type": "string"});
    }
    let names: Vec<&String> = properties.as_object().into_iter().flat_map(|fields| fields.keys()).collect();
    json!({"type": "object", "required": names, "additionalProperties": false, "properties": properties})
}

fn stored_schema() -> Value {
    json!({
        "type": "object",
        "required": ["type", "scheme", "stored_at", "usable"],
        "additionalProperties": false,
        "properties": {
            "type": {"const": "credential"},
            "scheme": {"enum": ["oauth", "api_key"]},
            "stored_at": {"type": "string", "format": "date-time"},
            "usable": {"description": "`false` where it was sealed for another installation's key.", "type": "boolean"},
        },
    })
}

fn given_schema() -> Value {
    json!({
        "type": "object",
        "required": ["credential"],
        "additionalProperties": false,
        "properties": {"credential": {"type": "string", "writeOnly": true}},
    })
}

fn done_schema() -> Value {
    json!({
        "type": "object",
        "required": ["type"],
        "additionalProperties": false,
        "properties": {"type": {"enum": [
            "credential_deleted", "credential_link", "credential_link_deleted",
        ]}},
    })
}
