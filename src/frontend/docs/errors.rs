//! Every error that a route can answer, with what it means to a client: the table that /openapi.json and `/` show.
//! It must never lack one: a test compares it with the sources, and another with what refusals become.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{messages, openapi};

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// The HTTP status.
    pub status: u16,
    /// `error.details.error_code`.
    pub code: &'static str,
    /// What happened, and what helps.
    pub means: &'static str,
}

const fn known(status: u16, code: &'static str, means: &'static str) -> Known {
    Known { status, code, means }
}

/// These rows and those of a list.
macro_rules! rows {
    ($($row:expr),+; $list:ident) => { &both::<{ [$($row),+].len() + $list.len() }>(&[$($row),+], $list) };
}

const fn both<const N: usize>(first: &[Known], then: &[Known]) -> [Known; N] {
    let mut all = [INVALID; N];
    let mut at = 0;
    while at < N {
        all[at] = if at < first.len() { first[at] } else { then[at - first.len()] };
        at += 1;
    }
    all
}

/// Of any path and method that no route answers. 405 comes with an `allow` header.
pub const NO_ROUTE: &[Known] = &[
    known(404, "not_found", "there is nothing at this path"),
    known(405, "method_not_allowed", "the path does not know this method"),
    known(431, "head_too_large", "the head of the request is larger than 64 KiB"),
];

/// Of `POST /v1/messages`, before the answer has begun.
pub const MESSAGES: &[Known] = &[
    known(400, "invalid_request", "the message names the field and what it must be"),
    known(
        400,
        "key_in_query",
        "the address holds a key or credential, and addresses are written down: revoke it",
    ),
    known(400, "invalid_session_id", "session_id is no UUID"),
    known(400, "invalid_workspace_id", "workspace_id is neither default nor a UUID"),
    known(400, "schema_refused", "the CLI does not take the JSON schema"),
    known(400, "upstream_invalid_request", "the upstream API refused the request; the message says why"),
    known(
        401,
        "credential_missing",
        "no credential, neither in a header nor in the body, nor stored for the key",
    ),
    known(401, "key_unknown", "this server has issued no such key"),
    known(401, "key_expired", "the key has expired: the operator issues another"),
    known(401, "key_revoked", "the key was revoked: the operator issues another"),
    known(401, "key_required", "this server asks for a key of its own beside the credential"),
    known(
        401,
        "invalid_token_format",
        "the credential is none: a token begins with sk-ant-oat or sk-ant-api",
    ),
    known(401, "credential_expired", "oauth_credentials.expires_at has passed: refresh the token"),
    known(
        401,
        "credential_refused",
        "the upstream API does not accept the credential; it is not asked again for a minute",
    ),
    known(402, "upstream_billing", "the upstream API asks for payment"),
    known(403, "key_insufficient", "the key, or the credential alone, is not for this"),
    known(403, "level_not_allowed", "the level is looser than this server allows"),
    known(403, "level_unavailable", "this server has no such level"),
    known(403, "model_unpriced", "you have a budget of money, and this server has no price for the model"),
    MCP_UNAVAILABLE,
    MCP_REMOTE,
    known(403, "upstream_forbidden", "the upstream API does not permit this to the credential"),
    known(404, "model_not_found", "no such model, here or upstream"),
    known(404, "workspace_not_found", "there is no such workspace"),
    known(408, "body_timeout", "the body came too slowly"),
    known(409, "workspace_conflict", "the session was begun in another workspace: leave workspace_id out"),
    known(409, "idempotency_conflict", "the idempotency-key stands for another request: use a new one"),
    MCP_UNREADABLE,
    known(409, "session_busy", "the session has a run already: wait for its end"),
    UNREADABLE,
    known(410, "events_gone", "the answer is not kept any more"),
    known(413, "request_too_large", "the request is larger than 32 MB"),
    known(413, "upstream_too_large", "the upstream API finds the request too large"),
    known(415, "request_body_encoding_unsupported", "the body is compressed: send it as it is"),
    known(
        429,
        "budget_exhausted",
        "you have used your tokens or money of the day or month, before the run or by it; retry-after says when there is more",
    ),
    known(429, "budget_reserved", "your live runs may use what is left: wait for their end"),
    known(
        429,
        "rate_limited",
        "you or your address sent more requests a minute than allowed: wait as retry-after says",
    ),
    BUSY_ADDRESS,
    known(429, "tenant_busy", "you have as many runs as one tenant may have: wait as retry-after says"),
    known(
        429,
        "upstream_rate_limited",
        "the upstream API limits the credential, or this server: wait as retry-after says",
    ),
    known(429, "plan_limit", "the plan's limit is reached; retry-after says when it begins anew"),
    known(500, "no_memory_file", "the server is out of descriptors or memory"),
    known(500, "cage_failed", "the run's cage could not be built; the operator's log says why"),
    known(500, "exec_failed", "the CLI could not be started; the operator's log says why"),
    known(500, "egress_failed", "the run's way to the upstream API could not be set up"),
    known(500, "egress_died", "the run's way to the upstream API broke down"),
    known(500, "unacceptable", "the run's options were not accepted"),
    known(500, "memory_limit", "the run hit its memory limit"),
    known(500, "task_limit", "the run hit its limit of processes"),
    known(500, "output_limit", "the run wrote more output than it may"),
    known(500, "disk_limit", "the workspace is larger than it may be"),
    known(500, "lock_limit", "the run held more locks on files than it may"),
    known(500, "cancelled", "the run was cancelled"),
    known(500, "cancelled_by_operator", "the operator ended the run"),
    known(500, "schema_not_met", "the model gave no answer that follows the JSON schema"),
    known(500, "cli_exited", "the CLI ended without a result"),
    known(500, "cli_failed", "the CLI ended its turn with an error"),
    known(500, "cli_garbage", "the CLI wrote something that is not its protocol"),
    known(500, "run_lost", "the run ended and no word of it came"),
    known(500, "upstream_error", "the upstream API failed, or gave an unexpected answer"),
    known(503, "ledger_unavailable", "keys and usage cannot be looked up at the moment: ask again"),
    DRAINING,
    known(503, "upstream_unavailable", "the upstream API could not be asked"),
    known(504, "wall_limit", "the run hit its time limit"),
    known(504, "idle_limit", "the run was silent for too long"),
    known(504, "upstream_silent", "the upstream API did not answer in time"),
    known(
        529,
        "busy",
        "as many runs as this server allows are running, or it has not seen the credential yet and asks about too many others",
    ),
    known(529, "tenants_full", "the server has no room for another tenant"),
    known(529, "bodies_full", "the server is reading too many requests"),
    known(529, "upstream_overloaded", "the upstream API is overloaded"),
];

/// Of everything about sessions, workspaces and files.
pub const FILES: &[Known] = &[
    known(400, "invalid_request", "the message names the field and what it must be"),
    known(400, "invalid_path", "the path leads out of the workspace, or is none"),
    known(400, "invalid_archive", "the archive is broken, or is of another form"),
    known(
        400,
        "unsafe_archive",
        "the archive would write elsewhere, or make what nobody may have; nothing was unpacked",
    ),
    known(400, "clone_failed", "the repository could not be had; the message says why"),
    known(400, "body_cut", "the body broke off; nothing was changed"),
    NO_CREDENTIAL,
    NO_TOKEN,
    known(
        401,
        "credential_refused",
        "the upstream API does not accept the credential; it is not asked again for a minute",
    ),
    known(403, "level_not_allowed", "the level is looser than this server allows"),
    known(403, "level_unavailable", "this server has no such level"),
    known(403, "upstream_forbidden", "the upstream API does not permit this to the credential"),
    known(404, "session_not_found", "there is no such session"),
    known(404, "workspace_not_found", "there is no such workspace"),
    known(404, "file_not_found", "there is no such file or folder; links are not followed"),
    known(404, "snapshot_not_found", "the workspace has no such snapshot"),
    known(408, "body_timeout", "the body came too slowly"),
    known(409, "session_busy", "a run is in the session or the workspace: wait for its end"),
    UNREADABLE,
    known(409, "path_conflict", "something else is in the way"),
    known(413, "request_too_large", "the request is larger than 32 MB"),
    known(413, "upload_too_large", "the upload is larger than 1 GiB"),
    known(413, "workspace_full", "your part of the disk is full: remove something first"),
    known(413, "too_many", "you have as many as there may be: delete one first"),
    known(429, "tenant_busy", "you have as many runs as one tenant may have: wait as retry-after says"),
    known(
        429,
        "upstream_rate_limited",
        "the upstream API limits the credential, or this server: wait as retry-after says",
    ),
    known(500, "files_failed", "the run over your files failed; the message says where"),
    known(500, "no_memory_file", "the server is out of descriptors or memory"),
    known(500, "cage_failed", "the run's cage could not be built; the operator's log says why"),
    known(500, "exec_failed", "the run's program could not be started; the operator's log says why"),
    known(500, "egress_failed", "the run's way to the upstream API could not be set up"),
    known(500, "egress_died", "the run's way out broke down"),
    known(500, "unacceptable", "the run's options were not accepted"),
    known(500, "memory_limit", "the run hit its memory limit"),
    known(500, "task_limit", "the run hit its limit of processes"),
    known(500, "output_limit", "the run wrote more output than it may"),
    known(500, "lock_limit", "the run held more locks on files than it may"),
    known(500, "cancelled", "the run was cancelled"),
    known(500, "cancelled_by_operator", "the operator ended the request"),
    known(500, "cli_exited", "the run ended without an answer"),
    known(500, "run_lost", "the run ended and no word of it came"),
    DRAINING,
    known(503, "upstream_unavailable", "the upstream API could not be asked"),
    known(504, "wall_limit", "the run hit its time limit"),
    known(504, "idle_limit", "the run was silent for too long"),
    known(
        529,
        "busy",
        "as many runs as this server allows are running, or it has not seen the credential yet and asks about too many others",
    ),
    known(529, "tenants_full", "the server has no room for another tenant"),
    known(529, "bodies_full", "the server is reading too many requests"),
    known(529, "upstream_overloaded", "the upstream API is overloaded"),
];

/// Of a session's MCP servers that are looked at or forgotten.
pub const SERVERS: &[Known] = rows![MCP_UNREADABLE; FILES];
/// Of those that are set.
pub const SERVERS_SET: &[Known] = rows![MCP_UNAVAILABLE, MCP_REMOTE, NOT_SEALED; SERVERS];

const MCP_UNAVAILABLE: Known =
    known(403, "mcp_unavailable", "on this host nothing would keep an MCP server apart from other tenants");
const MCP_REMOTE: Known =
    known(403, "mcp_remote_refused", "remote MCP servers are not reached at this level, or from this server");
const UNREADABLE: Known = known(
    409,
    "session_unreadable",
    "nobody can read the session any more, as its agent broke its transcript; the message says how: DELETE the session",
);
const MCP_UNREADABLE: Known =
    known(409, "mcp_unreadable", "the session's MCP servers cannot be opened any more: set them again");
const NO_CREDENTIAL: Known = known(401, "credential_missing", "no credential in a header");
const NO_TOKEN: Known = known(
    401,
    "invalid_token_format",
    "the credential is none: a token begins with sk-ant-oat or sk-ant-api",
);

/// Of routes that keep something for a tenant, and of no other.
pub const KEPT: &[Known] = &[NOT_STORED, NOT_LINKED, LINKED, LINKS_FULL, CONFLICT, NOT_SEALED];

const NOT_STORED: Known = known(404, "credential_not_stored", "there is no stored credential");
const NOT_LINKED: Known = known(404, "credential_not_linked", "the credential is not linked to this tenant");
const LINKED: Known = known(409, "credential_linked", "the credential is linked to another tenant");
const LINKS_FULL: Known = known(409, "links_full", "the tenant has as many links as one may have");
const CONFLICT: Known = known(409, "conflict", "there is one of this name already");
const NOT_SEALED: Known =
    known(500, "not_sealed", "the credential, or what opens a server, could not be sealed");

const UNKNOWN: Known = known(401, "key_unknown", "this server has issued no such key");
const EXPIRED: Known = known(401, "key_expired", "the key has expired: the operator issues another");
const REVOKED: Known = known(401, "key_revoked", "the key was revoked: the operator issues another");
const REQUIRED: Known = known(401, "key_required", "this server asks for a key of its own");
const INSUFFICIENT: Known =
    known(403, "key_insufficient", "the key, or the credential alone, is not for this");
const DRAINING: Known = known(503, "draining", "the server is shutting down: ask another one, or later");
const UNAVAILABLE: Known =
    known(503, "ledger_unavailable", "keys and usage cannot be looked up at the moment");
const INVALID: Known = known(
    400,
    "invalid_request",
    "the message names what is wrong: in the head of the request, which could be read in two ways, or in what it asks for",
);
const IN_QUERY: Known = known(400, "key_in_query", "the address holds a key or credential");
const RATE: Known = known(429, "rate_limited", "your address sent more requests a minute than allowed");
const BUSY_ADDRESS: Known =
    known(429, "address_busy", "your address has as many requests under way as it may have at a time");
const TOO_SLOW: Known = known(408, "body_timeout", "the body came too slowly");
const BODIES_FULL: Known = known(529, "bodies_full", "the server is reading too many requests");
const TOO_LARGE: Known = known(413, "request_too_large", "the body is larger than it may be here");

/// Of whatever needs somebody.
pub const SOMEBODY: &[Known] = &[
    INVALID,
    IN_QUERY,
    NO_CREDENTIAL,
    NO_TOKEN,
    UNKNOWN,
    EXPIRED,
    REVOKED,
    REQUIRED,
    RATE,
    BUSY_ADDRESS,
    UNAVAILABLE,
];
/// Of whatever a key of the other kind is not for.
pub const HOLDER: &[Known] = rows![INSUFFICIENT; SOMEBODY];

/// Of `GET /v1/usage`.
pub const USAGE: &[Known] = HOLDER;
/// Of a stored credential that is looked at or forgotten.
pub const STORED: &[Known] = rows![NOT_STORED; HOLDER];
/// Of one that is given.
pub const GIVEN: &[Known] = rows![TOO_SLOW, BODIES_FULL, TOO_LARGE, NOT_SEALED; HOLDER];
const NOTHING: Known = known(404, "not_found", "there is no such thing");
const NOT_LIVE: Known = known(404, "run_not_found", "there is no such run that waits or runs");

/// Of the operator's lists.
pub const OPERATOR: &[Known] = USAGE;
/// Of what the operator names.
pub const OPERATOR_FINDS: &[Known] = rows![NOTHING; HOLDER];
/// Of a run that the operator ends.
pub const OPERATOR_ENDS: &[Known] = rows![NOT_LIVE; HOLDER];
/// Of the operator's routes, and of no other.
pub const OPERATORS: &[Known] = &[FINAL, SETTINGS_WRONG, RELOAD_UNAVAILABLE];
const FINAL: Known =
    known(409, "drain_final", "the server is being stopped: there is no way back but a new start");
const SETTINGS_WRONG: Known = known(
    409,
    "settings_wrong",
    "the settings cannot be honoured: `message` says where; nothing was changed",
);
const RELOAD_UNAVAILABLE: Known =
    known(503, "reload_unavailable", "the settings could not be read again in time");
/// Of a drain that the operator ends.
pub const OPERATOR_UNDRAINS: &[Known] = rows![FINAL; HOLDER];
/// Of a reload.
pub const OPERATOR_RELOADS: &[Known] = rows![SETTINGS_WRONG, RELOAD_UNAVAILABLE, DRAINING; HOLDER];
/// Of what the operator names and changes.
pub const OPERATOR_CHANGES: &[Known] = rows![NOTHING, TOO_SLOW, BODIES_FULL, TOO_LARGE; HOLDER];
/// Of what the operator makes.
pub const OPERATOR_MAKES: &[Known] = rows![NOTHING, CONFLICT, TOO_SLOW, BODIES_FULL, TOO_LARGE; HOLDER];
/// Of a link.
pub const LINK: &[Known] = rows![LINKED, LINKS_FULL, TOO_SLOW, BODIES_FULL, TOO_LARGE; HOLDER];
/// Of its end.
pub const UNLINK: &[Known] = rows![NOT_LINKED, TOO_SLOW, BODIES_FULL, TOO_LARGE; HOLDER];

/// Of `GET /v1/models`.
pub const MODELS: &[Known] = SOMEBODY;

/// Of `GET /v1/models/{id}`.
pub const MODEL: &[Known] = rows![NO_MODEL; SOMEBODY];

const NO_MODEL: Known = known(404, "model_not_found", "the model is not in the list");

/// Of `GET /v1/mcp/catalog`.
pub const CATALOG: &[Known] = &[NO_CREDENTIAL, NO_TOKEN];
/// Of `POST /v1/messages/count_tokens`.
pub const TOKENS: &[Known] = &[
    known(400, "invalid_request", "the message names the field and what it must be"),
    known(400, "invalid_session_id", "session_id is no UUID"),
    known(400, "invalid_workspace_id", "workspace_id is neither default nor a UUID"),
    NO_CREDENTIAL,
    NO_TOKEN,
    known(404, "model_not_found", "no such model"),
    known(408, "body_timeout", "the body came too slowly"),
    known(413, "request_too_large", "the request is larger than 32 MB"),
    known(415, "request_body_encoding_unsupported", "the body is compressed: send it as it is"),
    known(529, "bodies_full", "the server is reading too many requests"),
];

/// Of the routes of one run.
pub const NO_RUN: &[Known] =
    &[known(404, "run_not_found", "no such run, or it ended more than 15 minutes ago, or it is not yours")];

/// Of `GET /v1/runs`.
pub const RUNS: &[Known] = &[NO_CREDENTIAL, NO_TOKEN];

/// Of `GET /v1/runs/{id}` and `POST /v1/runs/{id}/cancel`.
pub const RUN: &[Known] = &[NO_CREDENTIAL, NO_TOKEN, NO_RUN[0]];

/// Of `GET /v1/runs/{id}/events`.
pub const RUN_EVENTS: &[Known] = &[
    known(400, "invalid_request", "last-event-id is no id of this run's events"),
    NO_CREDENTIAL,
    NO_TOKEN,
    NO_RUN[0],
    known(410, "events_gone", "these events are not kept any more"),
];

/// These and whatever may be said to who shows a key or credential.
pub fn of_somebody(rows: &[Known]) -> Vec<Known> {
    let mut all = rows.to_vec();
    for row in SOMEBODY.iter().chain([&INSUFFICIENT]) {
        if !all.iter().any(|it| (it.status, it.code) == (row.status, row.code)) {
            all.push(*row);
        }
    }
    all
}

/// Codes that only the log has: their client is gone.
#[cfg(test)]
pub const UNSENT: &[&str] = &["client_gone"];

/// The form of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The Messages API's, of a route that starts no run.
    Plain,
    /// The same, of one that does.
    Messages,
    /// The other dialect's.
    Completions,
    /// One that clients of both families read.
    Both,
}

/// The OpenAPI responses of these rows, one for each status.
pub fn responses(rows: &[Known], form: Form) -> Map<String, Value> {
    let mut statuses: BTreeMap<u16, Vec<&Known>> = BTreeMap::new();
    for row in rows {
        statuses.entry(row.status).or_default().push(row);
    }
    let responses = statuses.into_iter().map(|(status, rows)| (status.to_string(), response(&rows, form)));
    responses.collect()
}

fn response(rows: &[&Known], form: Form) -> Value {
    let lines: Vec<String> = rows.iter().map(|row| format!("* `{}`: {}", row.code, row.means)).collect();
    let codes: Vec<&str> = rows.iter().map(|row| row.code).collect();
    // An error of a run has the headers of a run, as far as it came.
    let mut headers = match form {
        Form::Messages | Form::Completions => messages::run_headers(),
        Form::Plain | Form::Both => openapi::request_id(),
    };
    headers["retry-after"] = json!({"$ref": "#/components/headers/RetryAfter"});
    headers["x-should-retry"] = json!({"$ref": "#/components/headers/ShouldRetry"});
    let (schema, codes) = match form {
        Form::Plain | Form::Messages => {
            ("Error", json!({"details": {"properties": {"error_code": {"enum": codes}}}}))
        }
        Form::Completions => ("CompletionsError", json!({"code": {"enum": codes}})),
        Form::Both => ("ErrorForBoth", json!({"code": {"enum": codes}})),
    };
    json!({
        "description": lines.join("\n"),
        "headers": headers,
        "content": {"application/json": {"schema": {
            "allOf": [
                openapi::schema(schema),
                {"properties": {"error": {"properties": codes}}},
            ],
        }}},
    })
}
