//! What a level lets out of its cages: the requests to the upstream. Data, each entry with a reason.
//! It must never let through what no list names; lists of what is denied only take away.

use serde::Deserialize;

use crate::Why;
use crate::level::{list, literal};

/// What egress lets through. Lists name what is allowed, but for those called denied.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
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
    path: Vec<RawPath>,
    model: Vec<RawName>,
    beta: Vec<RawName>,
    tool: Vec<RawName>,
    denied_field: Vec<RawName>,
    denied_source: Vec<RawName>,
    #[serde(rename = "why")]
    _why: Why,
}

impl EgressPolicy {
    /// Every port that the run's proxy may dial; none = no proxy.
    pub(crate) fn proxy_ports(&self) -> Vec<u16> {
        Vec::new()
    }

    /// This policy as an expression of type `EgressPolicy`.
    pub(crate) fn rust(&self) -> String {
        let names = |rules: &[RawName]| list(rules, |rule| format!("{:?}", rule.name));
        let rows = [
            ("requests_max", self.requests_max.to_string()),
            ("request_bytes_max", self.request_bytes_max.to_string()),
            ("response_bytes_max", self.response_bytes_max.to_string()),
            ("header_bytes_max", self.header_bytes_max.to_string()),
            ("connections_max", self.connections_max.to_string()),
            ("paths", list(&self.path, |rule| format!("({:?}, {:?})", rule.method, rule.path))),
            ("models", names(&self.model)),
            ("betas", names(&self.beta)),
            ("tools", names(&self.tool)),
            ("denied_fields", names(&self.denied_field)),
            ("denied_sources", names(&self.denied_source)),
        ];
        literal("EgressPolicy", &rows)
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPath {
    method: String,
    path: String,
    #[serde(rename = "why")]
    _why: Why,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawName {
    #[serde(alias = "prefix", alias = "field", alias = "kind")]
    name: String,
    #[serde(rename = "why")]
    _why: Why,
}
