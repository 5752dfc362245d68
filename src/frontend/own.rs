//! What a tenant may ask of what is kept for it: who it is, what it used, and its stored credential.
//! It must never answer for another tenant, nor show a credential: one can be put here, and not be read again.

use axum::Router;
use axum::extract::{Extension, RawQuery, State};
use axum::response::Response;
use axum::routing::{get, put};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use zeroize::Zeroize;

use gaoler_ledger_wire::{
    Allowance, Answer, Counted, Grant, Hex, Proof, Question, ROWS_MAX, Refusal, UsageDay,
};

use super::Frontend;
use super::bodies::Whose;
use super::budget::{Bounds, Used};
use super::error::ApiError;
use super::http::{App, RequestId, failure, json as json_response};
use super::identity::{self, CREDENTIAL, Shown};
use super::ledger::{refused, unavailable};
use super::sent::Sent;
use super::tenant::{self, Credential};
use crate::allowance;

/// Bytes of a body here, at most: a token and a few words.
const BODY_BYTES_MAX: usize = 16 * 1024;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/me", get(me))
        .route("/v1/usage", get(usage))
        .route("/v1/credential", put(keep).get(kept).delete(drop_it))
        .route("/v1/credential/link", put(link).delete(unlink))
}

/// A body of `PUT /v1/credential` and of the link.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Given {
    #[serde(default)]
    credential: Option<String>,
}

impl Drop for Given {
    fn drop(&mut self) {
        self.credential.zeroize();
    }
}

async fn me(State(app): State<App>, Extension(id): Extension<RequestId>, headers: HeaderMap) -> Response {
    answered(&id, async {
        let shown = identity::somebody(&app, &headers).await?;
        Ok(match &shown {
            Shown::Tenant(grant, _) => of_tenant(&app, "key", grant),
            Shown::Credential(_, Some(grant)) => of_tenant(&app, "linked_credential", grant),
            Shown::Credential(credential, None) => json!({
                "type": "tenant",
                "by": "credential",
                "id": tenant::raw_name(&credential.tenant(&app.secret)),
            }),
            Shown::Admin(_) => json!({ "type": "admin", "by": "key" }),
            Shown::Nobody => return Err(unavailable()),
        })
    })
    .await
}

fn of_tenant(app: &Frontend, by: &str, grant: &Grant) -> Value {
    json!({
        "type": "tenant",
        "by": by,
        "id": grant.tenant,
        "name": grant.name,
        "key": grant.key,
        "key_expires_at": grant.expires_at.map(moment),
        "credential": metadata(app, grant),
    })
}

/// What may be told of a stored credential: that it is there.
fn metadata(app: &Frontend, grant: &Grant) -> Value {
    grant.credential.as_ref().map_or(Value::Null, |kept| {
        json!({
            "type": "credential",
            "scheme": kept.scheme,
            "stored_at": moment(kept.stored_at),
            "usable": kept.vault.0 == app.vault,
        })
    })
}

async fn usage(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Response {
    answered(&id, async {
        let (tenant, allowance) = match identity::somebody(&app, &headers).await? {
            Shown::Tenant(grant, _) | Shown::Credential(_, Some(grant)) => (grant.tenant, grant.allowance),
            Shown::Credential(credential, None) => {
                (tenant::raw_name(&credential.tenant(&app.secret)), Allowance::default())
            }
            Shown::Admin(_) | Shown::Nobody => return Err(no_tenant()),
        };
        let page = Page::parse(&query.unwrap_or_default())?;
        let question =
            Question::Usage { tenant: Some(tenant.clone()), before: page.before, limit: page.limit };
        match app.ledger.try_ask(None, question).await? {
            Ok(Answer::Usage(days)) => {
                let data: Vec<Value> = days.iter().map(|row| day(&app, row)).collect();
                let more = days.len() == page.limit as usize;
                let last = days.last().map(|day| day.day.clone());
                let next = last.filter(|_| more);
                let mut page = json!({ "object": "list", "data": data, "has_more": more, "next_page": next });
                (page["limits"], page["left"]) = left(&app, &tenant, &allowance).await?;
                Ok(page)
            }
            Err(Refusal::Invalid) => Err(ApiError::invalid("before: must be a day such as 2026-01-31.")),
            Err(refusal) => Err(refused(refusal)),
            Ok(_) => Err(unavailable()),
        }
    })
    .await
}

/// What a tenant may, and what of it is left beside what its live runs hold; `null` = any number.
async fn left(app: &Frontend, tenant: &str, own: &Allowance) -> Result<(Value, Value), ApiError> {
    let settings = app.settings();
    let bounds = Bounds::of(&settings, own);
    let some = |figure: u64| Some(figure).filter(|figure| *figure > 0);
    let held = app.budgets.held(tenant);
    let used = match bounds == Bounds::default() {
        true => Used::default(),
        false => Used::of_tenant(&app.ledger, tenant).await?,
    };
    let left = |most: u64, used: u64, held: u64| {
        some(most).map(|most| most.saturating_sub(used).saturating_sub(held))
    };
    let most = own.tenant_max.unwrap_or(settings.runs.tenant_max.into()).min(settings.runs.max.into());
    let limits = Allowance {
        tenant_per_minute: some(own.tenant_per_minute.unwrap_or(settings.rates.tenant_per_minute.into())),
        tenant_max: Some(most),
        tokens_per_day: some(bounds.day.tokens),
        tokens_per_month: some(bounds.month.tokens),
        cost_per_day_microusd: some(bounds.day.micro),
        cost_per_month_microusd: some(bounds.month.micro),
    };
    let left = json!({
        "tokens_per_day": left(bounds.day.tokens, used.day.tokens, held.tokens),
        "tokens_per_month": left(bounds.month.tokens, used.month.tokens, held.tokens),
        "cost_per_day_usd": left(bounds.day.micro, used.day.micro, held.micro).map(allowance::usd),
        "cost_per_month_usd": left(bounds.month.micro, used.month.micro, held.micro).map(allowance::usd),
    });
    Ok((allowance::json(&limits), left))
}

/// What something cost, in dollars; `null` where the operator has set no prices.
fn cost(app: &Frontend, microusd: u64) -> Value {
    if app.budgets.terms().prices.are_set() { allowance::usd(microusd) } else { Value::Null }
}

/// A day in the words of the API's own usage.
pub fn day(app: &Frontend, day: &UsageDay) -> Value {
    let told = json!({ "day": day.day, "runs": day.runs, "failed": day.failed });
    with_counted(app, told, &day.counted)
}

/// The same with what was counted of it.
pub fn with_counted(app: &Frontend, mut told: Value, counted: &Counted) -> Value {
    for (name, count) in [
        ("wall_ms", counted.wall_us / 1000),
        ("requests", counted.requests),
        ("denials", counted.denials),
        ("input_tokens", counted.input_tokens),
        ("output_tokens", counted.output_tokens),
        ("cache_creation_input_tokens", counted.cache_write_tokens),
        ("cache_read_input_tokens", counted.cache_read_tokens),
        ("bytes_up", counted.bytes_up),
        ("bytes_down", counted.bytes_down),
    ] {
        told[name] = count.into();
    }
    told["cost_usd"] = cost(app, counted.cost_microusd);
    told
}

/// Which part of a list.
pub struct Page {
    /// Where it goes on, for lists that begin with the newest.
    pub before: Option<String>,
    /// The same for lists by name.
    pub after: Option<String>,
    /// Whose; the operator's lists alone ask.
    pub tenant: Option<String>,
    /// Rows at most.
    pub limit: u32,
}

impl Page {
    /// Those fields of a query.
    ///
    /// # Errors
    /// 400 for a limit that is none.
    pub fn parse(query: &str) -> Result<Page, ApiError> {
        let mut page = Page { before: None, after: None, tenant: None, limit: 30 };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match name.as_ref() {
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=ROWS_MAX).contains(limit));
                    let wrong =
                        || ApiError::invalid(format!("limit: must be a whole number from 1 to {ROWS_MAX}."));
                    page.limit = limit.ok_or_else(wrong)?;
                }
                "before" => page.before = Some(value.into_owned()),
                "after" => page.after = Some(value.into_owned()),
                "tenant" => page.tenant = Some(value.into_owned()),
                _ => {}
            }
        }
        Ok(page)
    }
}

async fn keep(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Sent,
) -> Response {
    answered(&id, async {
        let (grant, proof) = owner(&app, &headers).await?;
        let credential = given(&app, &grant, &headers, body).await?;
        let tenant = tenant::id(&identity::keyed(&app, &grant)?);
        let sealed = gaoler_seal::seal(&app.vault, &tenant, &credential.bytes())
            .ok_or_else(|| ApiError::internal("not_sealed", "The credential could not be sealed."))?;
        let question = Question::KeepCredential {
            sealed: Hex(sealed),
            scheme: credential.scheme().to_owned(),
            vault: Hex(app.vault.to_vec()),
        };
        app.ledger.ask(Some(proof.clone()), question).await?;
        let (grant, _) = owner(&app, &headers).await?;
        Ok(metadata(&app, &grant))
    })
    .await
}

async fn kept(State(app): State<App>, Extension(id): Extension<RequestId>, headers: HeaderMap) -> Response {
    answered(&id, async {
        let (grant, _) = owner(&app, &headers).await?;
        match metadata(&app, &grant) {
            Value::Null => Err(no_credential()),
            metadata => Ok(metadata),
        }
    })
    .await
}

async fn drop_it(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
) -> Response {
    answered(&id, async {
        let (_, proof) = owner(&app, &headers).await?;
        match app.ledger.try_ask(Some(proof), Question::DropCredential).await? {
            Ok(_) => Ok(json!({ "type": "credential_deleted" })),
            Err(Refusal::NotFound) => Err(no_credential()),
            Err(refusal) => Err(refused(refusal)),
        }
    })
    .await
}

async fn link(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Sent,
) -> Response {
    answered(&id, async {
        let (grant, proof) = owner(&app, &headers).await?;
        let digest = Hex(given(&app, &grant, &headers, body).await?.digest(&app.secret).to_vec());
        match app.ledger.try_ask(Some(proof), Question::Link { digest }).await? {
            Ok(_) => Ok(json!({ "type": "credential_link" })),
            Err(Refusal::Conflict) => {
                let message = "This credential is linked to another tenant of this server.";
                Err(ApiError::new(409, "credential_linked", message).final_word())
            }
            Err(Refusal::Invalid) => {
                let message = "This tenant has as many links as one may have; remove one.";
                Err(ApiError::new(409, "links_full", message).final_word())
            }
            Err(refusal) => Err(refused(refusal)),
        }
    })
    .await
}

async fn unlink(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Sent,
) -> Response {
    answered(&id, async {
        let (grant, proof) = owner(&app, &headers).await?;
        let digest = Hex(given(&app, &grant, &headers, body).await?.digest(&app.secret).to_vec());
        match app.ledger.try_ask(Some(proof), Question::Unlink { digest }).await? {
            Ok(_) => Ok(json!({ "type": "credential_link_deleted" })),
            Err(Refusal::NotFound) => Err(ApiError::new(
                404,
                "credential_not_linked",
                "This credential is not linked to this tenant.",
            )),
            Err(refusal) => Err(refused(refusal)),
        }
    })
    .await
}

/// The tenant of the operator's that asks by its key: a credential alone has nothing that could be kept for it.
async fn owner(app: &Frontend, headers: &HeaderMap) -> Result<(Box<Grant>, Proof), ApiError> {
    match identity::somebody(app, headers).await? {
        Shown::Tenant(grant, proof) => Ok((grant, proof)),
        Shown::Credential(..) => {
            let message = "This needs a tenant key (gaol_t_…), which the operator issues.";
            Err(ApiError::new(403, "key_insufficient", message))
        }
        Shown::Admin(_) | Shown::Nobody => Err(no_tenant()),
    }
}

fn no_tenant() -> ApiError {
    ApiError::new(403, "key_insufficient", "An admin key is no tenant; use a tenant's key.")
}

fn no_credential() -> ApiError {
    ApiError::new(404, "credential_not_stored", "There is no stored credential.")
}

/// The credential that is to be kept or linked: the header's, else the body's.
async fn given(
    app: &Frontend,
    grant: &Grant,
    headers: &HeaderMap,
    body: Sent,
) -> Result<Credential, ApiError> {
    if let Some(value) = headers.get(CREDENTIAL) {
        return Credential::parse(value.to_str().unwrap_or_default().trim());
    }
    let whose = Whose::Known(identity::keyed(app, grant)?.0);
    let (bytes, _held) = body.read(app, whose, BODY_BYTES_MAX).await?;
    let given: Given = if bytes.is_empty() {
        Given::default()
    } else {
        // serde's own message could repeat what was sent.
        let wrong = |_| ApiError::invalid("The body must be {\"credential\": \"sk-ant-…\"}.");
        serde_json::from_slice(&bytes).map_err(wrong)?
    };
    let missing = || ApiError::invalid("credential: field required, in the body or as x-claude-credential.");
    Credential::parse(given.credential.as_deref().ok_or_else(missing)?)
}

/// Unix seconds as the API writes moments.
pub fn moment(seconds: i64) -> Option<String> {
    OffsetDateTime::from_unix_timestamp(seconds).ok()?.format(&Rfc3339).ok()
}

/// An answer in JSON, or an error.
pub async fn answered(id: &RequestId, answer: impl Future<Output = Result<Value, ApiError>>) -> Response {
    match answer.await {
        Ok(body) => json_response(StatusCode::OK, &body),
        Err(error) => failure(&error, id),
    }
}
