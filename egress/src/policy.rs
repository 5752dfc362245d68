//! What a level lets through to the upstream, as the build has read it from policies/*.toml.
//! It must never let through what no list names; lists of what is denied only take away.

use gaoler_protocol::Level;

/// The level paranoid: policies/paranoid.toml, on top of balanced.
pub const PARANOID: EgressPolicy = include!(concat!(env!("OUT_DIR"), "/paranoid.rs"));
/// The level developer: policies/developer.toml, on top of balanced.
pub const DEVELOPER: EgressPolicy = include!(concat!(env!("OUT_DIR"), "/developer.rs"));
/// The level balanced: policies/balanced.toml, where each entry has its reason.
pub const BALANCED: EgressPolicy = include!(concat!(env!("OUT_DIR"), "/balanced.rs"));

/// What egress lets through. Lists name what is allowed, but for those called denied.
#[derive(Debug, Clone, Copy)]
pub struct EgressPolicy {
    /// Requests of one run, at most.
    pub requests_max: u64,
    /// Bytes of one request's body, at most.
    pub request_bytes_max: u64,
    /// Bytes of all answers of a run together, at most.
    pub response_bytes_max: u64,
    /// Bytes of one request's head, at most.
    pub header_bytes_max: u64,
    /// Connections out of the cage at a time, at most.
    pub connections_max: u64,
    /// Methods and paths.
    pub paths: &'static [(&'static str, &'static str)],
    /// Beginnings of models' names.
    pub models: &'static [&'static str],
    /// Beginnings of values of `anthropic-beta`.
    pub betas: &'static [&'static str],
    /// Beginnings of tools' types.
    pub tools: &'static [&'static str],
    /// Fields at the top of a body that end a request.
    pub denied_fields: &'static [&'static str],
    /// Types of a block's source that end a request.
    pub denied_sources: &'static [&'static str],
    /// Where the proxy goes.
    pub proxy: ProxyPolicy,
}

/// What the proxy lets through.
#[derive(Debug, Clone, Copy)]
pub struct ProxyPolicy {
    /// How it judges a destination.
    pub mode: ProxyMode,
    /// Hosts, or `*.` and a domain, with their ports.
    pub hosts: &'static [(&'static str, &'static [u16])],
    /// Ports of any public address, in [`ProxyMode::Public`] only.
    pub ports: &'static [u16],
    /// Connections out of the cage at a time, at most.
    pub connections_max: u32,
    /// Milliseconds for a name and a connection together.
    pub dial_ms: u32,
    /// Milliseconds after which a connection on which nothing moves ends.
    pub idle_ms: u32,
    /// MiB through the proxy at most, both ways.
    pub egress_mib: u32,
}

/// How the proxy of a level judges where a cage wants to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyMode {
    /// There is no proxy.
    #[allow(dead_code, reason = "named by levels without one")]
    None,
    /// The listed hosts only.
    List,
    /// Any public address at the listed ports, and the listed hosts.
    #[allow(dead_code, reason = "named by levels that trust their agents with the network")]
    Public,
}

impl EgressPolicy {
    /// The policy of a level; `None` for one that has no file yet.
    pub fn of(level: Level) -> Option<EgressPolicy> {
        match level {
            Level::Paranoid => Some(PARANOID),
            Level::Balanced => Some(BALANCED),
            Level::Developer => Some(DEVELOPER),
        }
    }

    /// Whether a request line is allowed; `path` without its query.
    pub fn allows_path(&self, method: &str, path: &str) -> bool {
        self.paths.contains(&(method, path))
    }

    /// Whether a request may name this model.
    pub fn allows_model(&self, model: &str) -> bool {
        starts(self.models, model)
    }

    /// Whether one value of `anthropic-beta` may go out. One that may not is left out; the request still goes.
    pub fn allows_beta(&self, beta: &str) -> bool {
        starts(self.betas, beta)
    }

    /// Whether `tools[].type` may be this. `None`: the tool has no type.
    pub fn allows_tool(&self, kind: Option<&str>) -> bool {
        kind.is_none_or(|kind| starts(self.tools, kind))
    }

    /// Whether a field at the top of the body ends the request.
    pub fn denies_field(&self, field: &str) -> bool {
        self.denied_fields.contains(&field)
    }

    /// Whether a `source.type` of an image or document block ends the request.
    pub fn denies_source(&self, kind: &str) -> bool {
        self.denied_sources.contains(&kind)
    }
}

fn starts(beginnings: &[&str], text: &str) -> bool {
    beginnings.iter().any(|beginning| text.starts_with(beginning))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inference_goes_through_and_nothing_else() {
        let path =
            |method, path, expected| assert_eq!(BALANCED.allows_path(method, path), expected, "{path}");
        path("POST", "/v1/messages", true);
        path("POST", "/v1/messages/count_tokens", true);
        path("GET", "/v1/messages", false);
        path("POST", "/v1/messages/batches", false);
        path("POST", "/v1/messages/", false);
        path("POST", "/v1/files", false);
        let tool = |kind, expected| assert_eq!(BALANCED.allows_tool(kind), expected, "{kind:?}");
        tool(None, true);
        tool(Some("custom"), true);
        tool(Some("web_search_20250305"), false);
        tool(Some("web_fetch_20250910"), false);
        tool(Some("code_execution_20250825"), false);
        tool(Some("mcp_toolset"), false);
        tool(Some(""), false);
        let beta = |name, expected| assert_eq!(BALANCED.allows_beta(name), expected, "{name}");
        beta("claude-code-20250219", true);
        beta("mid-conversation-tool-changes-2026-07-01", true);
        beta("mcp-client-2025-11-20", false);
        beta("files-api-2025-04-14", false);
        beta("code-execution-2025-08-25", false);
        assert!(BALANCED.denies_field("mcp_servers") && BALANCED.denies_field("container"));
        assert!(!BALANCED.denies_field("messages"));
        assert!(BALANCED.denies_source("url") && !BALANCED.denies_source("base64"));
        assert!(BALANCED.allows_model("claude-sonnet-5") && !BALANCED.allows_model("gpt"));
        assert!(Level::ALL.iter().filter(|level| EgressPolicy::of(**level).is_some()).count() == 3);
    }
}
