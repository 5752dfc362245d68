//! What /openapi.json says of the operator's routes.
//! It must never describe one that does without an admin key.

use serde_json::{Value, json};

use super::errors::{self, Form, Known};
use super::openapi::{Group, answers, nullable, schema};

/// The group.
pub fn group() -> Group {
    Group {
        name: "Operator",
        about: "Tenants, keys, usage and runs that were, for whoever has an admin key: `gaoler key create --admin`.",
        paths: vec![
            ("/admin/v1/tenants", tenants()),
            ("/admin/v1/tenants/{tenant}", tenant()),
            ("/admin/v1/tenants/{tenant}/limits", limits()),
            ("/admin/v1/keys", keys()),
            ("/admin/v1/keys/{id}", key()),
            ("/admin/v1/usage", usage()),
            ("/admin/v1/runs", runs()),
            ("/admin/v1/runs/live", live()),
            ("/admin/v1/runs/{run}/cancel", cancel()),
            ("/admin/v1/drain", drain()),
            ("/admin/v1/reload", reload()),
        ],
        schemas: vec![
            ("TenantPage", page(schema("TenantRow"))),
            ("TenantRow", tenant_row()),
            ("NewTenant", new_tenant()),
            ("MadeTenant", object(json!({"type": {"const": "tenant"}, "name": {"type": "string"}}))),
            (
                "RemovedTenant",
                object(json!({"type": {"const": "tenant_deleted"}, "tenant": {"type": "string"}})),
            ),
            ("Allowance", limits_schema()),
            (
                "TenantLimits",
                object(json!({
                    "type": {"const": "tenant_limits"},
                    "tenant": {"description": "As it was asked for.", "type": "string"},
                    "limits": schema("Allowance"),
                })),
            ),
            ("KeyPage", page(schema("KeyRow"))),
            ("KeyRow", key_row()),
            ("NewKey", new_key()),
            ("MadeKey", made_key()),
            ("RevokedKey", object(json!({"type": {"const": "key_revoked"}, "id": {"type": "string"}}))),
            ("AllUsagePage", page(schema("TenantDay"))),
            ("TenantDay", super::own::day_of(Some("tenant"))),
            ("RunPage", page(schema("RunRow"))),
            ("RunRow", run_row()),
            (
                "LiveRunList",
                object(json!({
                    "object": {"const": "list"},
                    "data": {"type": "array", "items": schema("LiveRun")},
                })),
            ),
            ("LiveRun", live_run()),
            ("CancelledRun", object(json!({"type": {"const": "run_cancelled"}, "run": {"type": "string"}}))),
            ("Drain", drain_schema()),
            ("Reload", reload_schema()),
        ],
    }
}

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

/// With a part of a list named by the query.
fn listed(mut operation: Value, more: &[&str]) -> Value {
    let mut parameters = vec![json!({"name": "limit", "in": "query", "description": "Rows on the page.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 50, "default": 30}})];
    parameters.extend(more.iter().map(|name| {
        let about = match *name {
            "tenant" => "Of this tenant alone.",
            _ => "Where the list goes on, as `next_page` of the page before names it.",
        };
        json!({"name": name, "in": "query", "description": about, "schema": {"type": "string"}})
    }));
    operation["parameters"] = Value::from(parameters);
    operation
}

fn with_body(mut operation: Value, name: &str) -> Value {
    operation["requestBody"] =
        json!({"required": true, "content": {"application/json": {"schema": schema(name)}}});
    operation
}

fn with_path(mut operation: Value, name: &str) -> Value {
    operation["parameters"] =
        json!([{"name": name, "in": "path", "required": true, "schema": {"type": "string"}}]);
    operation
}

fn tenants() -> Value {
    let get = operation("tenants", "Tenants by name", errors::OPERATOR, "A page of them.", "TenantPage");
    let post =
        operation("create_tenant", "Make a tenant", errors::OPERATOR_MAKES, "It is there.", "MadeTenant");
    json!({"get": listed(get, &["after"]), "post": with_body(post, "NewTenant")})
}

fn tenant() -> Value {
    let mut delete = operation(
        "remove_tenant",
        "Forget a tenant's keys, stored credential and links",
        errors::OPERATOR_FINDS,
        "It is forgotten.",
        "RemovedTenant",
    );
    delete["description"] = json!("Its files and what it used stay.");
    json!({"delete": with_path(delete, "tenant")})
}

fn limits() -> Value {
    let mut get = operation(
        "tenant_limits",
        "What a tenant may",
        errors::OPERATOR_FINDS,
        "Its own limits.",
        "TenantLimits",
    );
    get["description"] = json!("`null` is what the server's settings say of everybody.");
    let mut put = operation(
        "limit_tenant",
        "Say what a tenant may",
        errors::OPERATOR_CHANGES,
        "In force for its next request.",
        "TenantLimits",
    );
    put["description"] =
        json!("All of it: what is left out is `null`, as the server's settings say of everybody.");
    json!({"get": with_path(get, "tenant"), "put": with_body(with_path(put, "tenant"), "Allowance")})
}

fn limits_schema() -> Value {
    const FIGURE_MAX: u64 = 1 << 52;
    let figure = |about: &str, low: u64, high: u64| {
        nullable(json!({"description": about, "type": "integer", "minimum": low, "maximum": high}))
    };
    let usd = |about: &str| {
        nullable(
            json!({"description": about, "type": "number", "minimum": 0, "maximum": FIGURE_MAX / 1_000_000}),
        )
    };
    json!({
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "tenant_per_minute": figure("Runs that it may ask for in a minute; 0 = any number.", 0, 1_000_000),
            "tenant_max": figure("Its runs at the same time.", 1, 1024),
            "tokens_per_day": figure("0 = any number.", 0, FIGURE_MAX),
            "tokens_per_month": figure("0 = any number.", 0, FIGURE_MAX),
            "cost_per_day_usd": usd("0 = any sum."),
            "cost_per_month_usd": usd("0 = any sum."),
        },
    })
}

fn keys() -> Value {
    let get = operation(
        "keys",
        "Keys, without their secrets",
        errors::OPERATOR_FINDS,
        "A page of them.",
        "KeyPage",
    );
    let mut post =
        operation("create_key", "Make a key", errors::OPERATOR_MAKES, "The key, this once.", "MadeKey");
    post["description"] =
        json!("The tenant must be there. The key is answered once and kept as its hash alone.");
    json!({"get": listed(get, &["after", "tenant"]), "post": with_body(post, "NewKey")})
}

fn key() -> Value {
    let delete =
        operation("revoke_key", "End a key at once", errors::OPERATOR_FINDS, "It has ended.", "RevokedKey");
    json!({"delete": with_path(delete, "id")})
}

fn usage() -> Value {
    let get = operation(
        "all_usage",
        "What was used, by day and tenant",
        errors::OPERATOR,
        "Days, newest first.",
        "AllUsagePage",
    );
    json!({"get": listed(get, &["before", "tenant"])})
}

fn runs() -> Value {
    let mut get = operation(
        "recorded_runs",
        "Runs that ended, newest first",
        errors::OPERATOR,
        "A page of them.",
        "RunPage",
    );
    get["description"] = json!(
        "Kept for `ledger.runs_days`. Nothing that a tenant said is in it. Clones of repositories are among them."
    );
    json!({"get": listed(get, &["before", "tenant"])})
}

fn live() -> Value {
    let mut get = operation(
        "live_runs",
        "Runs that wait or run, oldest first",
        errors::OPERATOR,
        "All of them.",
        "LiveRunList",
    );
    get["description"] = json!(
        "Runs of messages and chat completions, and requests about sessions, workspaces and files, without what they are \
         about. An MCP probe has a place of its own for a moment, and no name; `/health` counts it."
    );
    get["parameters"] = json!([{"name": "tenant", "in": "query", "description": "Of this tenant alone, by its id.",
        "schema": {"type": "string"}}]);
    json!({"get": get})
}

fn cancel() -> Value {
    let mut post = operation(
        "end_run",
        "End a run, or take it out of the queue",
        errors::OPERATOR_ENDS,
        "It is about to end.",
        "CancelledRun",
    );
    post["description"] = json!(
        "Its client gets the error `cancelled_by_operator`. A download that has begun breaks off before its end."
    );
    json!({"post": with_path(post, "run")})
}

fn drain() -> Value {
    let mut post = operation("drain", "Take no new run", errors::OPERATOR, "No new run is taken.", "Drain");
    post["description"] = json!(
        "`/readyz` is red from now on, new runs get 503 `draining`, and those that run go on. The process stays until its \
         service manager stops it, or `DELETE` ends the drain."
    );
    let mut delete = operation(
        "undrain",
        "Take new runs again",
        errors::OPERATOR_UNDRAINS,
        "New runs are taken, now or still.",
        "Drain",
    );
    delete["description"] =
        json!("Only where `POST` began the drain: a server that is being stopped answers 409.");
    json!({"post": post, "delete": delete})
}

fn reload() -> Value {
    let about = "What was taken, and what waits for the next start.";
    let mut post = operation("reload", "Read the settings again", errors::OPERATOR_RELOADS, about, "Reload");
    post["description"] = json!(
        "The file, the environment and the flags that the server was started with, as they are now; `SIGHUP` does the same. \
         What the frontend alone goes by is in force from the next request on (`x-reload` in `gaoler config schema`), \
         with the certificate, its key and the catalogue's tokens read again; live runs go on as they began. Settings that \
         cannot be honoured change nothing."
    );
    json!({"post": post})
}

fn reload_schema() -> Value {
    let keys = |about: &str| json!({"description": about, "type": "array", "items": {"type": "string"}});
    object(json!({
        "type": {"const": "reload"},
        "taken": keys("Keys of settings whose new values are in force."),
        "restart_needed_for": keys("Keys of settings that have changed and are in force after the next start."),
    }))
}

fn object(properties: Value) -> Value {
    let names: Vec<&String> = properties.as_object().into_iter().flat_map(|fields| fields.keys()).collect();
    json!({"type": "object", "required": names, "additionalProperties": false, "properties": properties})
}

fn page(row: Value) -> Value {
    object(json!({
        "object": {"const": "list"},
        "data": {"type": "array", "items": row},
        "has_more": {"type": "boolean"},
        "next_page": nullable(json!({"type": "string"})),
    }))
}

fn moment() -> Value {
    json!({"type": "string", "format": "date-time"})
}

fn count() -> Value {
    json!({"type": "integer", "minimum": 0})
}

fn tenant_row() -> Value {
    object(json!({
        "id": {"type": "string"},
        "name": {"type": "string"},
        "created_at": moment(),
        "keys": {"description": "That can be used.", "type": "integer", "minimum": 0},
        "credential_stored": {"type": "boolean"},
        "links": count(),
    }))
}

fn new_tenant() -> Value {
    object(json!({"name": {"type": "string", "pattern": "^[0-9A-Za-z][0-9A-Za-z._@-]{0,63}$"}}))
}

fn kind() -> Value {
    json!({"enum": ["tenant", "admin"]})
}

fn key_row() -> Value {
    object(json!({
        "id": {"type": "string"},
        "kind": kind(),
        "tenant": nullable(json!({"type": "string"})),
        "label": {"type": "string"},
        "created_at": moment(),
        "expires_at": nullable(moment()),
        "revoked_at": nullable(moment()),
        "last_used_at": nullable(json!({"description": "To a minute.", "type": "string", "format": "date-time"})),
        "state": {"enum": ["active", "expired", "revoked"]},
    }))
}

fn new_key() -> Value {
    json!({
        "description": "Either a tenant's or an admin's.",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "tenant": nullable(json!({"description": "By name or id.", "type": "string"})),
            "admin": {"type": "boolean", "default": false},
            "label": {"type": "string", "maxLength": 64, "default": ""},
            "expires_in_days": nullable(json!({"type": "integer", "minimum": 1, "maximum": 3660})),
        },
    })
}

fn made_key() -> Value {
    object(json!({
        "type": {"const": "key"},
        "id": {"type": "string"},
        "key": {"description": "Answered this once.", "type": "string"},
        "kind": kind(),
        "tenant": nullable(json!({"type": "string"})),
        "label": {"type": "string"},
        "expires_at": nullable(moment()),
    }))
}

fn run_row() -> Value {
    object(json!({
        "run": {"type": "string"},
        "tenant": {"type": "string"},
        "key": nullable(json!({"type": "string"})),
        "session": nullable(json!({"type": "string"})),
        "model": {"description": "Empty for a clone of a repository.", "type": "string"},
        "level": {"type": "string"},
        "tier": {"type": "string"},
        "outcome": {"description": "A stop reason, `done` for a clone, or an error's code.", "type": "string"},
        "status": {"type": "integer"},
        "ended_at": moment(),
        "launch_us": count(),
        "wall_ms": count(),
        "requests": count(),
        "denials": count(),
        "input_tokens": count(),
        "output_tokens": count(),
        "cache_creation_input_tokens": count(),
        "cache_read_input_tokens": count(),
        "bytes_up": count(),
        "bytes_down": count(),
        "cost_usd": super::own::cost(),
    }))
}

fn live_run() -> Value {
    object(json!({
        "run": {"type": "string"},
        "kind": {
            "description": "`cli` is a run of the CLI; the others are requests about files of workspaces, about sessions, and \
                            clones of repositories.",
            "enum": ["cli", "files", "sessions", "fetch"],
        },
        "tenant": {"type": "string"},
        "key": nullable(json!({"type": "string"})),
        "session": nullable(json!({"type": "string"})),
        "model": nullable(json!({"description": "`null` where none is asked.", "type": "string"})),
        "level": {"type": "string"},
        "endpoint": {"description": "Of requests about files the group that they are of.", "type": "string"},
        "state": {
            "description": "`awaiting_client` keeps its place until its client has answered the calls of its own tools.",
            "enum": ["queued", "running", "awaiting_client"],
        },
        "queue_position": nullable(json!({"description": "Among its tenant's.", "type": "integer", "minimum": 1})),
        "asked_at": moment(),
        "since": nullable(json!({"description": "Since when it is in that state.", "type": "string", "format": "date-time"})),
    }))
}

fn drain_schema() -> Value {
    object(json!({
        "status": {"enum": ["healthy", "draining"]},
        "runs": object(json!({"running": count(), "waiting": count()})),
    }))
}
