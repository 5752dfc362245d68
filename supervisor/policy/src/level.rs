//! A level: how strict a run is, from what it sees to what its egress forwards. Data, each entry with a reason.
//! It must never be looser for a request than the operator's file says: a wish can only lower a limit.

use std::path::PathBuf;

use gaoler_protocol::{Level, Limits};
use serde::Deserialize;

use crate::landlock::AccessClass;

/// What a level decides.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LevelPolicy {
    /// Its name.
    pub level: String,
    limits: RawLimits,
    /// What of the host a cage sees, read-only. Places that a host does not have are left out.
    pub visible: Vec<Visible>,
    /// Device nodes of the cage's own /dev.
    pub device: Vec<Device>,
    /// Environment of every run.
    pub env: Vec<Constant>,
    /// Environment of CLI runs, beside `env`.
    pub cli_env: Vec<Constant>,
    /// How the CLI is called.
    pub cli: Cli,
    /// What egress lets through.
    pub egress: EgressPolicy,
}

/// A place of the host.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Visible {
    /// Where, on the host and in the cage.
    pub path: PathBuf,
    /// What may be done there.
    pub access: VisibleAccess,
    why: String,
}

/// What may be done with a place of the host: never writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VisibleAccess {
    /// Reading and listing.
    Read,
    /// That, and executing.
    Execute,
}

impl From<VisibleAccess> for AccessClass {
    fn from(access: VisibleAccess) -> AccessClass {
        match access {
            VisibleAccess::Read => AccessClass::Read,
            VisibleAccess::Execute => AccessClass::ReadExecute,
        }
    }
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Where, on the host and in the cage.
    pub path: PathBuf,
    why: String,
}

/// A constant of the environment.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constant {
    /// The variable.
    pub name: String,
    /// Its value.
    pub value: String,
    why: String,
}

/// How the CLI is called.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cli {
    /// Arguments of every run, before those of the request's enums and ids.
    pub argv: Vec<String>,
    /// The policy tier's settings: one line of JSON, for `--managed-settings` and the cage's /etc.
    pub managed_settings: String,
    why: String,
}

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
    model: Vec<RawPrefix>,
    beta: Vec<RawPrefix>,
    tool: Vec<RawPrefix>,
    denied_field: Vec<RawField>,
    denied_source: Vec<RawSource>,
    why: String,
}

impl EgressPolicy {
    /// Whether a request line is allowed; `path` without its query.
    pub fn allows_path(&self, method: &str, path: &str) -> bool {
        self.path.iter().any(|rule| rule.method == method && rule.path == path)
    }

    /// Whether a request may name this model.
    pub fn allows_model(&self, model: &str) -> bool {
        starts(&self.model, model)
    }

    /// Whether one value of `anthropic-beta` may go out. One that may not is left out; the request still goes.
    pub fn allows_beta(&self, beta: &str) -> bool {
        starts(&self.beta, beta)
    }

    /// Whether `tools[].type` may be this. `None`: the tool has no type.
    pub fn allows_tool(&self, kind: Option<&str>) -> bool {
        kind.is_none_or(|kind| starts(&self.tool, kind))
    }

    /// Whether a field at the top of the body ends the request.
    pub fn denies_field(&self, field: &str) -> bool {
        self.denied_field.iter().any(|rule| rule.field == field)
    }

    /// Whether a `source.type` of an image or document block ends the request.
    pub fn denies_source(&self, kind: &str) -> bool {
        self.denied_source.iter().any(|rule| rule.kind == kind)
    }
}

fn starts(rules: &[RawPrefix], text: &str) -> bool {
    rules.iter().any(|rule| text.starts_with(&rule.prefix))
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPath {
    method: String,
    path: String,
    why: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPrefix {
    prefix: String,
    why: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawField {
    field: String,
    why: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSource {
    kind: String,
    why: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLimits {
    memory_mib: u32,
    tasks: u32,
    cpu_percent: u32,
    wall_ms: u32,
    tmp_mib: u32,
    file_mib: u32,
    open_files: u32,
    why: String,
}

impl LevelPolicy {
    /// The policy of a level, from the file that is compiled in.
    ///
    /// # Errors
    /// A sentence, for a level that has no file yet.
    pub fn of(level: Level) -> Result<LevelPolicy, String> {
        match level {
            Level::Balanced => LevelPolicy::parse(include_str!("../../../policies/balanced.toml")),
            other => Err(format!("level {other} is not there yet; use balanced")),
        }
    }

    /// The policy of a file's text.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence: unknown key, missing reason, relative path, a limit of zero.
    pub fn parse(text: &str) -> Result<LevelPolicy, String> {
        let policy: LevelPolicy = toml::from_str(text).map_err(|error| error.to_string())?;
        if let Some(entry) = policy.reasons().into_iter().find(|(_, why)| why.trim().is_empty()) {
            return Err(format!("level {}: {} has no reason", policy.level, entry.0));
        }
        let paths = policy.visible.iter().map(|v| &v.path).chain(policy.device.iter().map(|d| &d.path));
        if let Some(path) = paths.into_iter().find(|path| !path.is_absolute()) {
            return Err(format!("level {}: {} is not absolute", policy.level, path.display()));
        }
        let Limits { memory_mib, tasks, cpu_percent, wall_ms, tmp_mib, file_mib, open_files } =
            policy.limits();
        if [memory_mib, tasks, cpu_percent, wall_ms, tmp_mib, file_mib, open_files].contains(&0) {
            return Err(format!("level {}: a limit is zero", policy.level));
        }
        Ok(policy)
    }

    /// The limits of a run that wishes for nothing, which are also the highest.
    pub fn limits(&self) -> Limits {
        let RawLimits { memory_mib, tasks, cpu_percent, wall_ms, tmp_mib, file_mib, open_files, .. } =
            self.limits;
        Limits { memory_mib, tasks, cpu_percent, wall_ms, tmp_mib, file_mib, open_files }
    }

    /// The limits of a run that wishes for these (0 = the level's own): never above the level's.
    #[must_use]
    pub fn clamp(&self, wish: &Limits) -> Limits {
        let most = self.limits();
        let least = |wish: u32, most: u32| if wish == 0 { most } else { wish.min(most) };
        Limits {
            memory_mib: least(wish.memory_mib, most.memory_mib),
            tasks: least(wish.tasks, most.tasks),
            cpu_percent: least(wish.cpu_percent, most.cpu_percent),
            wall_ms: least(wish.wall_ms, most.wall_ms),
            tmp_mib: least(wish.tmp_mib, most.tmp_mib),
            file_mib: least(wish.file_mib, most.file_mib),
            open_files: least(wish.open_files, most.open_files),
        }
    }

    /// Every entry with its reason.
    pub fn reasons(&self) -> Vec<(String, &str)> {
        let mut out: Vec<(String, &str)> = vec![
            ("limits".into(), &self.limits.why),
            ("cli".into(), &self.cli.why),
            ("egress".into(), &self.egress.why),
        ];
        let egress = &self.egress;
        out.extend(self.visible.iter().map(|rule| (rule.path.display().to_string(), rule.why.as_str())));
        out.extend(self.device.iter().map(|rule| (rule.path.display().to_string(), rule.why.as_str())));
        out.extend(self.env.iter().chain(&self.cli_env).map(|rule| (rule.name.clone(), rule.why.as_str())));
        out.extend(egress.path.iter().map(|rule| (rule.path.clone(), rule.why.as_str())));
        let prefixes = egress.model.iter().chain(&egress.beta).chain(&egress.tool);
        out.extend(prefixes.map(|rule| (rule.prefix.clone(), rule.why.as_str())));
        out.extend(egress.denied_field.iter().map(|rule| (rule.field.clone(), rule.why.as_str())));
        out.extend(egress.denied_source.iter().map(|rule| (rule.kind.clone(), rule.why.as_str())));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t01_every_level_is_a_policy_with_reasons() {
        let policy = LevelPolicy::of(Level::Balanced).unwrap();
        assert_eq!(policy.level, Level::Balanced.name());
        assert!(policy.reasons().len() > 30);
        let missing = Level::ALL.iter().filter(|level| LevelPolicy::of(**level).is_err()).count();
        assert_eq!(missing, Level::ALL.len() - 1);
    }

    #[test]
    fn t02_a_wish_only_lowers() {
        let policy = LevelPolicy::of(Level::Balanced).unwrap();
        let most = policy.limits();
        let nothing = Limits {
            memory_mib: 0,
            tasks: 0,
            cpu_percent: 0,
            wall_ms: 0,
            tmp_mib: 0,
            file_mib: 0,
            open_files: 0,
        };
        assert_eq!(policy.clamp(&nothing), most);
        let wish = Limits { memory_mib: u32::MAX, tasks: 20, ..nothing };
        assert_eq!(policy.clamp(&wish), Limits { tasks: 20, ..most });
    }

    #[test]
    fn t03_egress_lets_inference_through_and_nothing_else() {
        let egress = LevelPolicy::of(Level::Balanced).unwrap().egress;
        let path = |method, path, expected| assert_eq!(egress.allows_path(method, path), expected, "{path}");
        path("POST", "/v1/messages", true);
        path("POST", "/v1/messages/count_tokens", true);
        path("GET", "/v1/messages", false);
        path("POST", "/v1/messages/batches", false);
        path("POST", "/v1/messages/", false);
        path("POST", "/v1/files", false);
        let tool = |kind, expected| assert_eq!(egress.allows_tool(kind), expected, "{kind:?}");
        tool(None, true);
        tool(Some("custom"), true);
        tool(Some("web_search_20250305"), false);
        tool(Some("web_fetch_20250910"), false);
        tool(Some("code_execution_20250825"), false);
        tool(Some("mcp_toolset"), false);
        tool(Some(""), false);
        let beta = |name, expected| assert_eq!(egress.allows_beta(name), expected, "{name}");
        beta("claude-code-20250219", true);
        beta("mid-conversation-tool-changes-2026-07-01", true);
        beta("mcp-client-2025-11-20", false);
        beta("files-api-2025-04-14", false);
        beta("code-execution-2025-08-25", false);
        assert!(egress.denies_field("mcp_servers") && egress.denies_field("container"));
        assert!(!egress.denies_field("messages"));
        assert!(egress.denies_source("url") && !egress.denies_source("base64"));
        assert!(egress.allows_model("claude-sonnet-5") && !egress.allows_model("gpt"));
    }

    #[test]
    fn t04_a_level_without_a_reason_or_with_an_unknown_key_is_refused() {
        let text = include_str!("../../../policies/balanced.toml");
        let check = |from: &str, to: &str, part: &str| {
            let error = LevelPolicy::parse(&text.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        check("why = \"bash, and every tool\"", "why = \" \"", "/dev/null has no reason");
        check("tasks = 256", "tasks = 0", "a limit is zero");
        check("[limits]", "[limits]\nnice = 1", "unknown field");
        check("path = \"/usr\"", "path = \"usr\"", "usr is not absolute");
        check("access = \"read\"", "access = \"write\"", "unknown variant");
    }

    #[test]
    fn t05_no_constant_of_the_environment_holds_a_secret_or_comes_twice() {
        let policy = LevelPolicy::of(Level::Balanced).unwrap();
        let mut names: Vec<&str> =
            policy.env.iter().chain(&policy.cli_env).map(|v| v.name.as_str()).collect();
        assert!(!names.iter().any(|name| name.contains("TOKEN") || name.contains("KEY")));
        assert!(!names.contains(&"IS_SANDBOX"));
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
