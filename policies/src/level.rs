//! A level: how strict a run is, from what it sees to what its egress forwards. Data, each entry with a reason.
//! It must never be looser for a request than the operator's file says: a wish can only lower a limit.

use std::path::PathBuf;

use serde::Deserialize;

use crate::egress::EgressPolicy;
use crate::{Result, Why};

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
    #[serde(rename = "why")]
    _why: Why,
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

/// A device node.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Where, on the host and in the cage.
    pub path: PathBuf,
    /// Its minor number; the major one is 1, memory devices.
    pub minor: u64,
    #[serde(rename = "why")]
    _why: Why,
}

/// A constant of the environment.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constant {
    /// The variable.
    pub name: String,
    /// Its value.
    pub value: String,
    #[serde(rename = "why")]
    _why: Why,
}

/// How the CLI is called.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cli {
    /// Arguments of every run, before those of the request's enums and ids.
    pub argv: Vec<String>,
    /// The policy tier's settings: one line of JSON, for `--managed-settings` and the cage's /etc.
    pub managed_settings: String,
    #[serde(rename = "why")]
    _why: Why,
}

/// A list as a slice's expression.
pub(crate) fn list<T>(items: &[T], item: impl Fn(&T) -> String) -> String {
    format!("&[{}]", items.iter().map(item).collect::<Vec<_>>().join(", "))
}

/// A structure's expression.
pub(crate) fn literal(name: &str, rows: &[(&str, String)]) -> String {
    let rows: String = rows.iter().map(|(field, value)| format!("    {field}: {value},\n")).collect();
    format!("{name} {{\n{rows}}}\n")
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
    idle_ms: u32,
    output_mib: u32,
    disk_mib: u32,
    disk_kfiles: u32,
    egress_mib: u32,
    #[serde(rename = "why")]
    _why: Why,
}

impl LevelPolicy {
    /// The policy of a file's text.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence: unknown key, missing reason, relative path, a limit of zero.
    pub fn parse(text: &str) -> Result<LevelPolicy> {
        let policy: LevelPolicy = toml::from_str(text).map_err(|error| error.to_string())?;
        let paths = policy.visible.iter().map(|v| &v.path).chain(policy.device.iter().map(|d| &d.path));
        if let Some(path) = paths.into_iter().find(|path| !path.is_absolute()) {
            return Err(format!("level {}: {} is not absolute", policy.level, path.display()));
        }
        if policy.limits.rows().iter().any(|(_, limit)| *limit == 0) {
            return Err(format!("level {}: a limit is zero", policy.level));
        }
        Ok(policy)
    }

    /// The limit of what goes through the proxy, which egress itself keeps.
    pub(crate) fn egress_mib(&self) -> u32 {
        self.limits.egress_mib
    }

    /// What the supervisor needs of this policy, as an expression of type `LevelPolicy`.
    pub(crate) fn rust(&self) -> String {
        let limits = self.limits.rows().map(|(name, limit)| (name, limit.to_string()));
        let constants =
            |of: &[Constant]| list(of, |constant| format!("({:?}, {:?})", constant.name, constant.value));
        let rows = [
            ("limits", literal("Limits", &limits)),
            (
                "visible",
                list(&self.visible, |rule| {
                    let access = match rule.access {
                        VisibleAccess::Read => "Read",
                        VisibleAccess::Execute => "ReadExecute",
                    };
                    format!("({:?}, AccessClass::{access})", rule.path)
                }),
            ),
            ("devices", list(&self.device, |rule| format!("({:?}, {})", rule.path, rule.minor))),
            ("env", constants(&self.env)),
            ("cli_env", constants(&self.cli_env)),
            ("argv", list(&self.cli.argv, |word| format!("{word:?}"))),
            ("managed_settings", format!("{:?}", self.cli.managed_settings)),
        ];
        literal("LevelPolicy", &rows)
    }
}

impl RawLimits {
    fn rows(&self) -> [(&'static str, u32); 12] {
        [
            ("memory_mib", self.memory_mib),
            ("tasks", self.tasks),
            ("cpu_percent", self.cpu_percent),
            ("wall_ms", self.wall_ms),
            ("tmp_mib", self.tmp_mib),
            ("file_mib", self.file_mib),
            ("open_files", self.open_files),
            ("idle_ms", self.idle_ms),
            ("output_mib", self.output_mib),
            ("disk_mib", self.disk_mib),
            ("disk_kfiles", self.disk_kfiles),
            ("egress_mib", self.egress_mib),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BALANCED: &str = include_str!("../balanced.toml");

    #[test]
    fn t01_every_level_is_a_policy_with_reasons() {
        let policy = LevelPolicy::parse(BALANCED).unwrap();
        assert_eq!(policy.level, "balanced");
        assert!(policy.rust().contains("(\"/usr\", AccessClass::ReadExecute)"), "{}", policy.rust());
        let egress = policy.egress.rust(policy.egress_mib());
        assert!(egress.contains("(\"POST\", \"/v1/messages\")"), "{egress}");
    }

    #[test]
    fn t04_a_level_without_a_reason_or_with_an_unknown_key_is_refused() {
        let check = |from: &str, to: &str, part: &str| {
            let error = LevelPolicy::parse(&BALANCED.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        check("why = \"bash, and every tool\"", "why = \" \"", "without a reason");
        check("tasks = 256", "tasks = 0", "a limit is zero");
        check("[limits]", "[limits]\nnice = 1", "unknown field");
        check("path = \"/usr\"", "path = \"usr\"", "usr is not absolute");
        check("access = \"read\"", "access = \"write\"", "unknown variant");
    }

    #[test]
    fn t05_no_constant_of_the_environment_holds_a_secret_or_comes_twice() {
        let policy = LevelPolicy::parse(BALANCED).unwrap();
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
