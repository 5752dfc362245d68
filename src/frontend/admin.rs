//! The operator's routes: tenants, keys, runs that are and were, usage, and the end of new runs. Each needs an admin key.
//! It must never answer with a secret but with a key that was made by that very request.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::extract::{Extension, FromRequestParts, Path, RawQuery};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use http::request::Parts;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use gaoler_ledger_wire::{Allowance, Answer, KeyKind, Proof, Question, Refusal, RunRow};

use gaoler_protocol::{Kind, RunId};

use super::Frontend;
use super::bodies::Whose;
use super::error::ApiError;
use super::filing::Filed;
use super::http::{App, RequestId, failure};
use super::identity::{self, Shown};
use super::ledger::{refused, unavailable};
use super::own::{Page, answered, day, moment, with_counted};
use super::reload::Changes;
use super::runs::http::{date, end, position};
use super::runs::{self, Log, Stage, Why};
use super::sent::Sent;
use super::way::now_ms;
use crate::allowance;
use crate::keeper::{key_json, tenant_json};

/// Bytes of a body here, at most.
const BODY_BYTES_MAX: usize = 16 * 1024;
/// Days that a key may be good for, at most: ten years.
const KEY_DAYS_MAX: u32 = 3660;
/// Seconds of a day.
const DAY: i64 = 86_400;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/admin/v1/tenants", get(tenants).post(create_tenant))
        .route("/admin/v1/tenants/{tenant}", delete(remove_tenant))
        .route("/admin/v1/tenants/{tenant}/limits", get(limits).put(allow))
        .route("/admin/v1/keys", get(keys).post(create_key))
        .route("/admin/v1/keys/{id}", delete(revoke_key))
        .route("/admin/v1/usage", get(usage))
        .route("/admin/v1/runs", get(recorded))
        .route("/admin/v1/runs/live", get(live))
        .route("/admin/v1/runs/{run}/cancel", post(cancel))
        .route("/admin/v1/drain", post(drain).delete(undrain))
        .route("/admin/v1/reload", post(reload))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewTenant {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewKey {
    tenant: Option<String>,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    label: String,
    expires_in_days: Option<u32>,
}

/// A request of the operator's. Nothing of it is done before its key was looked up.
struct Operator {
    app: App,
    id: RequestId,
    proof: Proof,
}

impl FromRequestParts<App> for Operator {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Operator, Response> {
        let id = Extension::<RequestId>::from_request_parts(parts, app).await;
        let Extension(id) = id.map_err(IntoResponse::into_response)?;
        let shown = identity::somebody(app, &parts.headers).await;
        let proof = shown.and_then(|shown| match shown {
            Shown::Admin(proof) => Ok(proof),
            _ => Err(ApiError::new(403, "key_insufficient", "This needs an admin key (gaol_a_…).")),
        });
        match proof {
            Ok(proof) => Ok(Operator { app: Arc::clone(app), id, proof }),
            Err(error) => Err(failure(&error, &id)),
        }
    }
}

impl Operator {
    /// Asks the ledger in the operator's name; what came, which may be a refusal.
    async fn try_ask(&self, question: Question) -> Result<Result<Answer, Refusal>, ApiError> {
        self.app.ledger.try_ask(Some(self.proof.clone()), question).await
    }

    /// The same, where a refusal is an error.
    async fn ask(&self, question: Question) -> Result<Answer, ApiError> {
        self.try_ask(question).await?.map_err(refused)
    }
}

async fn asked<T: DeserializeOwned>(app: &App, body: Sent) -> Result<T, ApiError> {
    let (bytes, _held) = body.read(app, Whose::Operator, BODY_BYTES_MAX).await?;
    serde_json::from_slice(&bytes).map_err(|error| ApiError::invalid(format!("The body: {error}.")))
}

async fn tenants(by: Operator, RawQuery(query): RawQuery) -> Response {
    answered(&by.id, async {
        let page = Page::parse(&query.unwrap_or_default())?;
        match by.ask(Question::Tenants { after: page.after, limit: page.limit }).await? {
            Answer::Tenants(rows) => {
                let next = rows.last().map(|row| row.name.clone());
                Ok(list(rows.iter().map(tenant_json).collect(), page.limit, next))
            }
            _ => Err(unavailable()),
        }
    })
    .await
}

async fn create_tenant(by: Operator, body: Sent) -> Response {
    answered(&by.id, async {
        let NewTenant { name } = asked(&by.app, body).await?;
        let question = Question::CreateTenant { name: name.clone() };
        by.try_ask(question).await?.map_err(|refusal| wrong_name("name", refusal))?;
        Ok(json!({ "type": "tenant", "name": name }))
    })
    .await
}

async fn remove_tenant(Path(tenant): Path<String>, by: Operator) -> Response {
    answered(&by.id, async {
        let question = Question::RemoveTenant { tenant: tenant.clone() };
        by.try_ask(question).await?.map_err(|refusal| wrong_name("tenant", refusal))?;
        Ok(json!({ "type": "tenant_deleted", "tenant": tenant }))
    })
    .await
}

async fn limits(Path(tenant): Path<String>, by: Operator) -> Response {
    answered(&by.id, async {
        match by.ask(Question::Allowance { tenant: tenant.clone() }).await? {
            Answer::Allowance(allowance) => Ok(limits_of(&tenant, &allowance)),
            _ => Err(unavailable()),
        }
    })
    .await
}

/// Says all of what a tenant may: what is left out is what the settings say.
async fn allow(Path(tenant): Path<String>, by: Operator, body: Sent) -> Response {
    answered(&by.id, async {
        let allowance = allowance::parse(&asked(&by.app, body).await?);
        let allowance = allowance.map_err(|what| ApiError::invalid(format!("{what}.")))?;
        by.ask(Question::Allow { tenant: tenant.clone(), allowance }).await?;
        Ok(limits_of(&tenant, &allowance))
    })
    .await
}

fn limits_of(tenant: &str, allowance: &Allowance) -> Value {
    json!({ "type": "tenant_limits", "tenant": tenant, "limits": allowance::json(allowance) })
}

async fn keys(by: Operator, RawQuery(query): RawQuery) -> Response {
    answered(&by.id, async {
        let page = Page::parse(&query.unwrap_or_default())?;
        let question = Question::Keys { tenant: page.tenant, after: page.after, limit: page.limit };
        let answer = by.try_ask(question).await?;
        match answer.map_err(|refusal| wrong_name("tenant", refusal))? {
            Answer::Keys(rows) => {
                let next = rows.last().map(|row| row.id.clone());
                Ok(list(rows.iter().map(key_json).collect(), page.limit, next))
            }
            _ => Err(unavailable()),
        }
    })
    .await
}

async fn create_key(by: Operator, body: Sent) -> Response {
    answered(&by.id, async {
        let NewKey { tenant, admin, label, expires_in_days } = asked(&by.app, body).await?;
        let kind = match (&tenant, admin) {
            (Some(_), false) => KeyKind::Tenant,
            (None, true) => KeyKind::Admin,
            _ => return Err(ApiError::invalid("tenant, admin: send one of them.")),
        };
        if expires_in_days.is_some_and(|days| !(1..=KEY_DAYS_MAX).contains(&days)) {
            let message = format!("expires_in_days: must be a whole number from 1 to {KEY_DAYS_MAX}.");
            return Err(ApiError::invalid(message));
        }
        let now = i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX);
        let expires_at = expires_in_days.map(|days| now + i64::from(days) * DAY);
        let key = identity::issue(kind);
        let question = Question::CreateKey {
            id: key.id.clone(),
            hash: key.hash.clone(),
            kind,
            tenant: tenant.clone(),
            make_tenant: false,
            label: label.clone(),
            expires_at,
        };
        by.try_ask(question).await?.map_err(|refusal| wrong_name("tenant, label", refusal))?;
        Ok(json!({
            "type": "key",
            "id": key.id,
            "key": *key.text,
            "kind": kind,
            "tenant": tenant,
            "label": label,
            "expires_at": expires_at.and_then(moment),
        }))
    })
    .await
}

async fn revoke_key(Path(key): Path<String>, by: Operator) -> Response {
    answered(&by.id, async {
        by.ask(Question::RevokeKey { id: key.clone() }).await?;
        Ok(json!({ "type": "key_revoked", "id": key }))
    })
    .await
}

async fn usage(by: Operator, RawQuery(query): RawQuery) -> Response {
    answered(&by.id, async {
        let page = Page::parse(&query.unwrap_or_default())?;
        let limit = page.limit;
        let question = Question::Usage { tenant: page.tenant, before: page.before, limit };
        match by.try_ask(question).await? {
            Ok(Answer::Usage(days)) => {
                let next = days.last().map(|row| format!("{}/{}", row.day, row.tenant));
                let rows = days.iter().map(|row| {
                    let mut value = day(&by.app, row);
                    value["tenant"] = json!(row.tenant);
                    value
                });
                Ok(list(rows.collect(), limit, next))
            }
            Err(Refusal::Invalid) => Err(ApiError::invalid("before: must be a day such as 2026-01-31.")),
            Err(refusal) => Err(refused(refusal)),
            Ok(_) => Err(unavailable()),
        }
    })
    .await
}

async fn recorded(by: Operator, RawQuery(query): RawQuery) -> Response {
    answered(&by.id, async {
        let page = Page::parse(&query.unwrap_or_default())?;
        let wrong = |_| ApiError::invalid("before: must be the number that next_page names.");
        let before = page.before.as_deref().map(str::parse).transpose().map_err(wrong)?;
        let question = Question::Runs { tenant: page.tenant, before, limit: page.limit };
        match by.ask(question).await? {
            Answer::Runs(rows) => {
                let next = rows.last().map(|row| row.number.to_string());
                Ok(list(rows.iter().map(|row| run(&by.app, row)).collect(), page.limit, next))
            }
            _ => Err(unavailable()),
        }
    })
    .await
}

/// Runs that wait, run, or keep their place until their client has answered a call; and requests about files.
async fn live(by: Operator, RawQuery(query): RawQuery) -> Response {
    answered(&by.id, async {
        let tenant = Page::parse(&query.unwrap_or_default())?.tenant;
        let waits = by.app.waits.runs();
        let asked_for = |owner: &String| tenant.as_ref().is_none_or(|tenant| tenant == owner);
        let runs = by.app.runs.all(|log| asked_for(&log.entry.about.owner) && alive(log, &waits).is_some());
        let files = by.app.filing.all(|filed| asked_for(&filed.about.owner));
        let runs = runs
            .iter()
            .filter_map(|log| Some((log.entry.about.asked_ms, live_run(&by.app, log, alive(log, &waits)?))));
        let files = files.iter().map(|filed| (filed.about.asked_ms, live_files(&by.app, filed)));
        let mut rows: Vec<_> = runs.chain(files).collect();
        rows.sort_by_key(|(asked_ms, _)| *asked_ms);
        Ok(json!({ "object": "list", "data": rows.into_iter().map(|(_, row)| row).collect::<Vec<_>>() }))
    })
    .await
}

/// What a run does, where it has not ended; and since when.
fn alive(log: &Log, waits: &HashSet<RunId>) -> Option<(&'static str, Option<u64>)> {
    match log.stage() {
        Stage::Queued(_) => Some(("queued", Some(log.entry.about.asked_ms))),
        Stage::Running(since) => Some(("running", Some(since))),
        Stage::Ended if waits.contains(&log.entry.about.run) => {
            Some(("awaiting_client", log.finished().map(|finished| finished.at_ms)))
        }
        Stage::Ended => None,
    }
}

fn live_run(app: &App, log: &Log, (state, since): (&str, Option<u64>)) -> Value {
    let about = &log.entry.about;
    json!({
        "run": about.run.to_string(),
        "kind": Kind::Cli.name(),
        "tenant": about.owner,
        "key": about.owner_key,
        "session": about.session.map(|session| session.to_string()),
        "model": about.model,
        "level": about.level.name(),
        "endpoint": about.dialect.path(),
        "state": state,
        "queue_position": position(app, log),
        "asked_at": date(Some(about.asked_ms)),
        "since": date(since),
    })
}

/// The same of a request about files. Which ones is its tenant's own.
fn live_files(app: &App, filed: &Filed) -> Value {
    let about = &filed.about;
    let (state, since, position) = match filed.stage() {
        Stage::Queued(ticket) => {
            let position = ticket.and_then(|ticket| app.admission.position(&about.tenant, ticket));
            ("queued", about.asked_ms, position)
        }
        Stage::Running(since) => ("running", since, None),
        Stage::Ended => ("running", about.asked_ms, None),
    };
    let endpoint = if about.kind == Kind::Sessions { "/v1/sessions" } else { "/v1/workspaces" };
    json!({
        "run": about.run.to_string(),
        "kind": about.kind.name(),
        "tenant": about.owner,
        "key": about.owner_key,
        "session": null,
        "model": null,
        "level": about.level.name(),
        "endpoint": endpoint,
        "state": state,
        "queue_position": position,
        "asked_at": date(Some(about.asked_ms)),
        "since": date(Some(since)),
    })
}

/// Ends anybody's run, or takes it out of the queue.
async fn cancel(Path(run): Path<String>, by: Operator) -> Response {
    answered(&by.id, async {
        let waits = by.app.waits.runs();
        let named = runs::http::run(&run);
        let is = |log: &Log| Some(log.entry.about.run) == named && alive(log, &waits).is_some();
        let files = by.app.filing.all(|filed| Some(filed.about.run) == named).pop();
        match (by.app.runs.all(is).pop(), files) {
            (Some(log), _) => end(&by.app, &log, Why::Stopped),
            (None, Some(filed)) => filed.end(Why::Stopped),
            (None, None) => return Err(ApiError::new(404, "run_not_found", "There is no such live run.")),
        }
        Ok(json!({ "type": "run_cancelled", "run": run }))
    })
    .await
}

/// From now on no new run is taken; those that run go on. The process stays, for whoever manages it to stop.
async fn drain(by: Operator) -> Response {
    answered(&by.id, async {
        by.app.draining.send_replace(true);
        Ok(drain_of(&by.app))
    })
    .await
}

/// And from now on they are taken again, where it was the operator's word that kept them away.
async fn undrain(by: Operator) -> Response {
    answered(&by.id, async {
        let mut ends = false;
        by.app.draining.send_if_modified(|draining| {
            ends = by.app.ending.load(Ordering::Relaxed);
            !ends && std::mem::take(draining)
        });
        if ends {
            let message = "This server is being stopped; there is no way back but a new start.";
            return Err(ApiError::new(409, "drain_final", message).final_word());
        }
        Ok(drain_of(&by.app))
    })
    .await
}

/// Has the operator's settings read again, and says what that changed.
async fn reload(by: Operator) -> Response {
    answered(&by.id, async {
        if *by.app.draining.borrow() {
            return Err(ApiError::draining());
        }
        let Changes { taken, restart } = by.app.reloads.ask().await?;
        Ok(json!({ "type": "reload", "taken": taken, "restart_needed_for": restart }))
    })
    .await
}

fn drain_of(app: &Frontend) -> Value {
    let (running, waiting) = app.admission.load();
    let status = if *app.draining.borrow() { "draining" } else { "healthy" };
    json!({ "status": status, "runs": { "running": running, "waiting": waiting } })
}

fn run(app: &Frontend, row: &RunRow) -> Value {
    let record = &row.record;
    let told = json!({
        "run": record.run,
        "tenant": record.tenant,
        "key": record.key,
        "session": record.session,
        "model": record.model,
        "level": record.level,
        "tier": record.tier,
        "outcome": record.outcome,
        "status": record.status,
        "ended_at": moment(row.ended_at),
        "launch_us": record.launch_us,
    });
    with_counted(app, told, &record.counted)
}

/// A page of a list, and by what the next one is asked for.
fn list(data: Vec<Value>, limit: u32, next: Option<String>) -> Value {
    let more = data.len() == limit as usize;
    json!({ "object": "list", "data": data, "has_more": more, "next_page": next.filter(|_| more) })
}

fn wrong_name(field: &str, refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Invalid => ApiError::invalid(format!(
            "{field}: a tenant's name is 1 to 64 letters, digits and ._@-, a letter or digit first; a label one line of \
             at most 64 bytes."
        )),
        refusal => refused(refusal),
    }
}
