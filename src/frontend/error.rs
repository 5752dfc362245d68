//! The errors that a client can get, each one row of a closed table in the Messages API's own form.
//! A message must never hold a token, nor a byte of another tenant.

use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};

use gaoler_protocol::{Refusal, Refused};

/// Bytes of text that came out of a cage which an error may repeat to the tenant whose cage it was.
const CLAIM_BYTES_MAX: usize = 500;

/// One error, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// `error.type`, which the official clients map to their exception classes.
    pub kind: &'static str,
    /// `error.message`.
    pub message: String,
    /// `error.details.error_code`: stable, for programs.
    pub code: &'static str,
    /// Seconds for `retry-after`.
    pub retry_after: Option<u64>,
    /// `x-should-retry`, which the official clients obey above all else.
    pub should_retry: Option<bool>,
}

impl ApiError {
    /// An error of this status; its type follows from the status alone.
    pub fn new(status: u16, code: &'static str, message: impl Into<String>) -> ApiError {
        let message = message.into();
        ApiError { status, kind: kind_of(status), message, code, retry_after: None, should_retry: None }
    }

    /// 400: the request is not what it must be.
    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(400, "invalid_request", message)
    }

    /// 401: no credential, or one that cannot be used.
    pub fn unauthenticated(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(401, code, message)
    }

    /// 500 for what can only be a fault of gaoler or of the cage's content.
    pub fn internal(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(500, code, message)
    }

    /// The same, with `retry-after`.
    pub fn after(self, seconds: u64) -> ApiError {
        ApiError { retry_after: Some(seconds), ..self }
    }

    /// The same, with the word that clients must not repeat it.
    pub fn final_word(self) -> ApiError {
        ApiError { should_retry: Some(false), ..self }
    }

    /// A run that the supervisor did not start.
    pub fn refused(refused: &Refused) -> ApiError {
        // What the upstream says of it, or what is usual.
        let after = |usual: u64| if refused.step == 0 { usual } else { u64::from(refused.step) };
        match refused.reason {
            Refusal::Busy => {
                ApiError::new(529, "busy", "As many runs as this server allows are running.").after(5)
            }
            Refusal::TenantsFull => {
                ApiError::new(529, "tenants_full", "This server has no room for another tenant.").after(60)
            }
            Refusal::CredentialRefused => ApiError::unauthenticated(
                "credential_refused",
                "The upstream API does not accept this credential.",
            ),
            Refusal::UpstreamUnavailable if matches!(refused.errno, 429) => {
                let message = "The upstream API limits this credential, or this server's address, and does not say whether \
                               it knows the credential.";
                ApiError::new(429, "upstream_rate_limited", message).after(after(10))
            }
            Refusal::UpstreamUnavailable if matches!(refused.errno, 529) => {
                ApiError::new(529, "upstream_overloaded", "The upstream API is overloaded.").after(after(10))
            }
            Refusal::UpstreamUnavailable if matches!(refused.errno, 403) => {
                ApiError::new(403, "upstream_forbidden", "The upstream API does not permit this credential.")
            }
            Refusal::UpstreamUnavailable => {
                ApiError::new(503, "upstream_unavailable", "The upstream API could not be asked.")
                    .after(after(5))
            }
            Refusal::LevelUnavailable => ApiError::new(
                403,
                "level_unavailable",
                "This security level is not available on this server.",
            ),
            Refusal::Draining => ApiError::draining(),
            Refusal::CageFailed => ApiError::internal(
                "cage_failed",
                "The run's cage could not be built; the operator's log says why.",
            ),
            Refusal::ExecFailed => ApiError::internal(
                "exec_failed",
                "The CLI could not be started; the operator's log says why.",
            ),
            Refusal::SessionBusy => {
                ApiError::new(409, "session_busy", "This session has a run already, or its workspace is being changed.")
                    .final_word()
            }
            Refusal::WorkspaceUnknown => {
                ApiError::new(404, "workspace_not_found", "There is no such workspace.")
            }
            Refusal::WorkspaceOther => ApiError::new(
                409,
                "workspace_conflict",
                "workspace_id: this session was begun in another workspace; leave it out, or begin another session.",
            )
            .final_word(),
            Refusal::Unacceptable => {
                ApiError::internal("unacceptable", "The run's options were not accepted.")
            }
            Refusal::EgressFailed => {
                ApiError::internal("egress_failed", "The run's way to the upstream API could not be set up.")
            }
        }
    }

    /// The server is shutting down.
    pub fn draining() -> ApiError {
        ApiError::new(503, "draining", "This server is shutting down.").after(5)
    }

    /// A status that the upstream gave, as the CLI reports it. `claim` is the CLI's text: the tenant's own
    /// claim, repeated to nobody else.
    pub fn upstream(status: Option<u16>, claim: &str) -> ApiError {
        let claim = repeatable(claim);
        let said = |words: &str| if claim.is_empty() { words.to_string() } else { claim.clone() };
        match status {
            Some(400) => {
                ApiError::new(400, "upstream_invalid_request", said("The upstream API refused the request."))
            }
            Some(401) => ApiError::unauthenticated(
                "credential_refused",
                "The upstream API does not accept this credential.",
            ),
            Some(402) => ApiError::new(402, "upstream_billing", said("The upstream API asks for payment.")),
            Some(403) => ApiError::new(
                403,
                "upstream_forbidden",
                "The upstream API does not permit this to this credential.",
            ),
            Some(404) => ApiError::new(
                404,
                "model_not_found",
                "The upstream API does not know this model, or this credential may not use it.",
            ),
            Some(413) => ApiError::new(
                413,
                "upstream_too_large",
                "The request, with what the agent adds to it, is too large for the upstream API.",
            ),
            Some(429) => {
                ApiError::new(429, "upstream_rate_limited", said("The upstream API limits this credential."))
                    .after(10)
            }
            Some(529) => {
                ApiError::new(529, "upstream_overloaded", "The upstream API is overloaded.").after(10)
            }
            Some(500..=599) => {
                ApiError::internal("upstream_error", "The upstream API failed while it served this request.")
            }
            Some(_) => {
                ApiError::internal("upstream_error", said("The upstream API gave an unexpected answer."))
            }
            None => ApiError::new(
                503,
                "upstream_unavailable",
                "The connection to the upstream API was lost or could not be made.",
            )
            .after(5),
        }
    }

    /// The body, in the API's own form.
    pub fn body(&self, request_id: &str) -> Value {
        json!({
            "type": "error",
            "error": {"type": self.kind, "message": self.message, "details": {"error_code": self.code}},
            "request_id": request_id,
        })
    }

    /// The body as the second dialect has it.
    pub fn completions_body(&self) -> Value {
        json!({
            "error": {"message": self.message, "type": self.kind, "param": self.param(), "code": self.code},
        })
    }

    /// The body for a client of either family: the API's own form, and what the other's clients look for.
    pub fn body_for_both(&self, request_id: &str) -> Value {
        let mut body = self.body(request_id);
        body["error"]["param"] = json!(self.param());
        body["error"]["code"] = json!(self.code);
        body
    }

    /// The body in the form that clients of this path read.
    pub fn body_at(&self, path: &[u8], request_id: &str) -> Value {
        match path {
            b"/v1/chat/completions" => self.completions_body(),
            b"/v1/models" => self.body_for_both(request_id),
            path if path.starts_with(b"/v1/models/") => self.body_for_both(request_id),
            _ => self.body(request_id),
        }
    }

    /// The field that is wrong: every message about one begins with its path.
    fn param(&self) -> Option<&str> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-.[]".contains(&b);
        let about_a_field = matches!(self.status, 400 | 404);
        let (path, _) = self.message.split_once(": ").filter(|_| about_a_field)?;
        Some(path).filter(|path| !path.is_empty() && path.bytes().all(plain))
    }

    /// The headers that go with it.
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, HeaderValue)> {
        let retry_after = self.retry_after.map(|seconds| ("retry-after", HeaderValue::from(seconds)));
        let should_retry = self
            .should_retry
            .map(|retry| ("x-should-retry", HeaderValue::from_static(if retry { "true" } else { "false" })));
        retry_after.into_iter().chain(should_retry)
    }

    /// The status for hyper. 529 has no name there, and needs none.
    pub fn status_code(&self) -> StatusCode {
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

/// `error.type` for a status, as the official clients know them.
fn kind_of(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        402 => "billing_error",
        403 => "permission_error",
        404 => "not_found_error",
        409 => "conflict_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        504 => "timeout_error",
        529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}

/// A claim made fit for an error message: one line, bounded, with nothing in it that looks like a token.
pub fn repeatable(claim: &str) -> String {
    const TOKEN: &str = "sk-ant-";
    let mut out = String::new();
    let mut rest = claim;
    while let Some(at) = rest.find(TOKEN) {
        out.push_str(&rest[..at]);
        out.push_str("[token]");
        rest = rest[at + TOKEN.len()..]
            .trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    }
    out.push_str(rest);
    let mut line: String = out.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > CLAIM_BYTES_MAX {
        let end = (0..=CLAIM_BYTES_MAX).rev().find(|&i| line.is_char_boundary(i)).unwrap_or(0);
        line.truncate(end);
    }
    line.trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_repeated_without_tokens_and_bounded() {
        let check = |claim: &str, expected: &str| assert_eq!(repeatable(claim), expected);
        check("plain", "plain");
        check("a sk-ant-oat01-abc_DEF-9 b", "a [token] b");
        check("sk-ant-", "[token]");
        check("two\nlines", "two lines");
        assert_eq!(repeatable(&"é".repeat(1000)).len(), CLAIM_BYTES_MAX);
    }

    #[test]
    fn the_second_dialect_names_the_field_that_is_wrong() {
        let check = |error: ApiError, param: Value| {
            let expected = json!({"error": {"message": error.message, "type": error.kind, "param": param,
                "code": error.code}});
            assert_eq!(error.completions_body(), expected);
        };
        check(ApiError::invalid("messages[0].role: field required."), json!("messages[0].role"));
        check(ApiError::new(404, "model_not_found", "model: not known here."), json!("model"));
        check(ApiError::invalid("x-gaoler-limits: a limit is"), json!("x-gaoler-limits"));
        check(ApiError::invalid("The body is not valid JSON: line 1."), Value::Null);
        check(ApiError::invalid("one, other: two."), Value::Null);
        check(ApiError::internal("cage_failed", "a: b"), Value::Null);
        let both = ApiError::invalid("limit: no.").body_for_both("req_1");
        assert_eq!((&both["type"], &both["request_id"]), (&json!("error"), &json!("req_1")));
        assert_eq!(both["error"]["details"]["error_code"], both["error"]["code"]);
        assert_eq!(both["error"]["param"], "limit");
    }

    #[test]
    fn every_refusal_has_a_status_and_no_secret() {
        for &reason in Refusal::ALL {
            let refused = Refused { run: gaoler_protocol::RunId([1; 16]), reason, step: 3, errno: 13 };
            let error = ApiError::refused(&refused);
            assert!((400..600).contains(&error.status), "{reason}");
            assert_eq!(error.body("req_1")["type"], "error");
        }
    }
}
