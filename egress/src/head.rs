//! Judges the head of a request from the cage, and writes those that go on: pure functions.
//! It must never let a request through whose framing two readers could see differently.

use crate::policy::EgressPolicy;
use gaoler_protocol::{Denial, Scheme};
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap,
    HeaderName, HeaderValue, RETRY_AFTER, TRANSFER_ENCODING, UPGRADE, USER_AGENT,
};
use hyper::http::request::Parts;
use hyper::{Method, Version};

use crate::placeholder::{Expected, X_API_KEY};
use crate::refusal::Refusal;

/// The beta that goes with an OAuth credential, and only with one. It is ours to set.
const OAUTH_BETA: &str = "oauth-2025-04-20";
/// Betas in one request at most, and characters of one.
const BETAS_MAX: usize = 32;
const BETA_CHARS_MAX: usize = 64;
/// The API's version where a request names none.
const VERSION: HeaderValue = HeaderValue::from_static("2023-06-01");

const ANTHROPIC_BETA: HeaderName = HeaderName::from_static("anthropic-beta");
const ANTHROPIC_VERSION: HeaderName = HeaderName::from_static("anthropic-version");

/// Where a client inside the cage believes that it is. Another name would be a request for another server.
const HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// Request headers that go on as they are, beside those that begin with `x-stainless-`.
const FORWARDED: [&str; 4] = [
    "anthropic-dangerous-direct-browser-access",
    "x-app",
    "x-claude-code-session-id",
    "x-claude-code-agent-id",
];
/// Answer headers that come back, beside those that begin with `anthropic-ratelimit-`.
const RETURNED: [&str; 4] = ["request-id", "retry-after-ms", "x-should-retry", "anthropic-fast-mode"];

/// What becomes of a request, as far as its head tells.
#[derive(Debug, PartialEq, Eq)]
pub enum Route {
    /// A greeting, answered here.
    Hello,
    /// To the upstream, at this path and query.
    Forward(&'static str),
}

/// Judges a head.
///
/// # Errors
/// How it is refused.
pub fn judge(head: &Parts, expected: &Expected, policy: &EgressPolicy) -> Result<Route, Refusal> {
    framing(head)?;
    // hyper bounds what it reads of a head only roughly.
    let fields = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len());
    let bytes = fields.sum::<usize>() + head.uri.to_string().len();
    if bytes as u64 > policy.header_bytes_max {
        return Err(Refusal::denied(431, Denial::Path, "the head is larger than the level allows"));
    }
    let path = head.uri.path();
    if matches!(head.method, Method::HEAD | Method::GET) && matches!(path, "/" | "/api/hello") {
        return Ok(Route::Hello);
    }
    if !expected.is_in(&head.headers) {
        return Err(Refusal::denied(401, Denial::Placeholder, "this is not the key of this run"));
    }
    let known = match path {
        "/v1/messages" => ["/v1/messages", "/v1/messages?beta=true"],
        "/v1/messages/count_tokens" => ["/v1/messages/count_tokens", "/v1/messages/count_tokens?beta=true"],
        _ => return Err(Refusal::denied(404, Denial::Path, "a run reaches only /v1/messages")),
    };
    let query = match head.uri.query() {
        None => known[0],
        Some("beta=true") => known[1],
        Some(_) => return Err(Refusal::denied(403, Denial::Path, "this query is not allowed")),
    };
    match policy.allows_path(head.method.as_str(), path) {
        true => Ok(Route::Forward(query)),
        false => Err(Refusal::denied(403, Denial::Path, "this method is not allowed")),
    }
}

/// What must hold of every request, whatever it asks for.
fn framing(head: &Parts) -> Result<(), Refusal> {
    let refuse = |what| Err(Refusal::denied(400, Denial::Path, what));
    let headers = &head.headers;
    let once = |name: &HeaderName| headers.get_all(name).iter().count() <= 1;
    if head.version != Version::HTTP_11 {
        return refuse("only HTTP/1.1 is spoken here");
    }
    if matches!(head.method, Method::CONNECT | Method::TRACE | Method::OPTIONS) {
        return Err(Refusal::denied(403, Denial::Path, "this method is not allowed"));
    }
    if head.uri.scheme().is_some() || head.uri.authority().is_some() || !head.uri.path().starts_with('/') {
        return refuse("the target must be a path");
    }
    if headers.contains_key(UPGRADE) {
        return refuse("no other protocol is spoken here");
    }
    // Every body comes with its length: without chunks there is no second reading of where it ends. (hyper
    // has dropped a content-length that came beside.)
    if headers.contains_key(TRANSFER_ENCODING) {
        return refuse("a body must come with content-length, not in chunks");
    }
    if ![&HOST, &AUTHORIZATION, &X_API_KEY, &CONTENT_TYPE, &CONTENT_LENGTH].into_iter().all(once) {
        return refuse("a header came twice");
    }
    if !headers.get(HOST).is_some_and(is_own_host) {
        return refuse("the host must be localhost");
    }
    match headers.get(CONTENT_ENCODING) {
        Some(coding) if coding != "identity" => {
            Err(Refusal::denied(415, Denial::Body, "a body must not be compressed"))
        }
        _ => Ok(()),
    }
}

fn is_own_host(host: &HeaderValue) -> bool {
    let Ok(host) = host.to_str() else { return false };
    let port =
        |rest: &str| rest.is_empty() || rest.strip_prefix(':').is_some_and(|p| p.parse::<u16>().is_ok());
    HOSTS.iter().any(|own| host.strip_prefix(own).is_some_and(port))
}

/// The headers of the request that goes on, but for the credential.
pub fn forwarded(headers: &HeaderMap, scheme: Scheme, policy: &EgressPolicy) -> HeaderMap {
    let mut out = HeaderMap::new();
    let passes = |name: &HeaderName| {
        [ACCEPT, USER_AGENT].contains(name)
            || FORWARDED.contains(&name.as_str())
            || name.as_str().starts_with("x-stainless-")
    };
    headers.iter().filter(|(name, _)| passes(name)).for_each(|(name, value)| {
        out.insert(name.clone(), value.clone());
    });
    out.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // An answer must be readable for the counting and for the search.
    out.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    out.insert(ANTHROPIC_VERSION, headers.get(ANTHROPIC_VERSION).cloned().unwrap_or(VERSION));
    let asked: Vec<&str> = headers.get_all(ANTHROPIC_BETA).iter().filter_map(|v| v.to_str().ok()).collect();
    let betas = betas(policy, scheme, &asked.join(",")).join(",");
    if let Ok(value) = HeaderValue::from_str(&betas)
        && !betas.is_empty()
    {
        out.insert(ANTHROPIC_BETA, value);
    }
    out
}

/// The headers of a request of our own.
pub fn own(scheme: Scheme) -> HeaderMap {
    let mut out = HeaderMap::new();
    out.insert(ACCEPT, HeaderValue::from_static("application/json"));
    out.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    out.insert(USER_AGENT, HeaderValue::from_static(concat!("gaoler/", env!("CARGO_PKG_VERSION"))));
    out.insert(ANTHROPIC_VERSION, VERSION);
    if scheme == Scheme::OAuth {
        out.insert(ANTHROPIC_BETA, HeaderValue::from_static(OAUTH_BETA));
    }
    out
}

/// The headers of an answer that come back to the cage.
pub fn returned(headers: &HeaderMap) -> HeaderMap {
    let passes = |name: &HeaderName| {
        [CONTENT_TYPE, RETRY_AFTER].contains(name)
            || RETURNED.contains(&name.as_str())
            || name.as_str().starts_with("anthropic-ratelimit-")
    };
    headers
        .iter()
        .filter(|(name, _)| passes(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// The betas of a request that go on, with OAuth's where the credential needs it.
fn betas<'a>(policy: &EgressPolicy, scheme: Scheme, asked: &'a str) -> Vec<&'a str> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let is_name = |name: &str| name.len() <= BETA_CHARS_MAX && name.bytes().all(fits);
    let passes = |name: &&str| is_name(name) && *name != OAUTH_BETA && policy.allows_beta(name);
    let oauth = (scheme == Scheme::OAuth).then_some(OAUTH_BETA);
    asked.split(',').map(str::trim).filter(passes).take(BETAS_MAX).chain(oauth).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::BALANCED;

    /// What Claude Code 2.1.330 sends with an OAuth token, recorded.
    const CLI_BETAS: &str = "claude-code-20250219,oauth-2025-04-20,interleaved-thinking-2025-05-14,\
        context-management-2025-06-27,per-turn-control-2026-07-01,thinking-token-count-2026-05-13,\
        advanced-tool-use-2025-11-20,effort-2025-11-24,thinking-display-updates-2026-08-18,\
        extended-cache-ttl-2025-04-11";

    fn filtered(scheme: Scheme, asked: &str) -> String {
        betas(&BALANCED, scheme, asked).join(",")
    }

    #[test]
    fn the_cli_keeps_its_betas() {
        let without = CLI_BETAS.replace("oauth-2025-04-20,", "");
        assert_eq!(filtered(Scheme::ApiKey, CLI_BETAS), without);
        assert_eq!(filtered(Scheme::OAuth, CLI_BETAS), format!("{without},{OAUTH_BETA}"));
        assert_eq!(filtered(Scheme::OAuth, ""), OAUTH_BETA);
    }

    #[test]
    fn betas_that_reach_out_are_dropped() {
        for door in [
            "mcp-client-2025-04-04",
            "mcp-servers-2025-12-04",
            "code-execution-2025-05-22",
            "web-search-2025-03-05",
            "web-fetch-2025-09-10",
            "files-api-2025-04-14",
            "skills-2025-10-02",
            "managed-agents-2026-04-01",
            "EFFORT-2025-11-24",
            "effort-\u{e9}",
        ] {
            assert_eq!(filtered(Scheme::ApiKey, door), "", "{door}");
        }
    }

    #[test]
    fn only_loopback_is_our_host() {
        for (host, ours) in [
            ("localhost", true),
            ("localhost:80", true),
            ("127.0.0.1:8080", true),
            ("[::1]", true),
            ("api.anthropic.com", false),
            ("localhost.evil.example", false),
            ("localhost:99999", false),
            ("localhost:", false),
            ("evil@localhost", false),
            ("", false),
        ] {
            assert_eq!(is_own_host(&HeaderValue::from_static(host)), ours, "{host}");
        }
    }
}
