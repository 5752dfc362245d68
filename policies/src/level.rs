//! A level: how strict a run is, from what it sees to what its egress forwards. Data, each entry with a reason.
//! It must never be looser for a request than the operator's file says: a wish can only lower a limit.

use std::path::PathBuf;

use serde::Deserialize;

use crate::egress::EgressPolicy;
use crate::rules::{Cli, Place};
use crate::{Result, Why};

/// What a level decides.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LevelPolicy {
    /// Its name.
    pub level: String,
    limits: RawLimits,
    proc: Proc,
    /// What of the host a cage sees, read-only. Places that a host does not have are left out.
    pub visible: Vec<Visible>,
    /// Device nodes of the cage's own /dev.
    pub device: Vec<Device>,
    /// Environment of every run.
    pub env: Vec<Constant>,
    /// Environment of CLI runs, beside `env`.
    pub cli_env: Vec<Constant>,
    /// How the CLI is called.
    pub(crate) cli: Cli,
    /// What egress lets through.
    pub egress: EgressPolicy,
}

/// What of /proc a run sees.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proc {
    view: ProcView,
    #[serde(rename = "why")]
    _why: Why,
}

/// How much of its own cage's /proc a run sees. Another cage's is never there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ProcView {
    /// The folders of its own processes and nothing else: no statistics of the host, so that `ps` fails.
    Pids,
    /// That, and the files beside them; pid 1, which is ours, is not there.
    Own,
    /// All of its cage, pid 1 too.
    Full,
}

impl ProcView {
    /// The options of the mount.
    fn options(self) -> &'static str {
        match self {
            ProcView::Pids => "hidepid=invisible,subset=pid",
            ProcView::Own => "hidepid=invisible",
            ProcView::Full => "",
        }
    }
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
    /// The policy of a table: a file's, and of what that extends.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence: unknown key, missing reason, relative path, a limit of zero.
    pub fn of(table: toml::Table) -> Result<LevelPolicy> {
        let policy: LevelPolicy = table.try_into().map_err(|error: toml::de::Error| error.to_string())?;
        let paths = policy.visible.iter().map(|v| &v.path).chain(policy.device.iter().map(|d| &d.path));
        if let Some(path) = paths.into_iter().find(|path| !path.is_absolute()) {
            return Err(format!("level {}: {} is not absolute", policy.level, path.display()));
        }
        // A level without a proxy has nothing to count there.
        if policy.limits.rows().iter().any(|(name, limit)| *limit == 0 && *name != "egress_mib") {
            return Err(format!("level {}: a limit is zero", policy.level));
        }
        policy.cli.check().map_err(|error| format!("level {}: {error}", policy.level))?;
        Ok(policy)
    }

    /// The limit of what goes through the proxy, which egress itself keeps.
    pub(crate) fn egress_mib(&self) -> u32 {
        self.limits.egress_mib
    }

    /// What the supervisor needs of this policy, as an expression of type `LevelPolicy`.
    ///
    /// # Errors
    /// Settings that cannot be written.
    pub(crate) fn rust(&self) -> Result<String> {
        let limits = self.limits.rows().map(|(name, limit)| (name, limit.to_string()));
        let constants =
            |of: &[Constant]| list(of, |constant| format!("({:?}, {:?})", constant.name, constant.value));
        let rows = [
            ("name", format!("{:?}", self.level)),
            ("limits", literal("Limits", &limits)),
            ("proc_options", format!("{:?}", self.proc.view.options())),
            ("proxy_ports", list(&self.egress.proxy_ports(), ToString::to_string)),
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
        ];
        let mut rows = Vec::from(rows);
        for (place, argv, settings) in [
            (Place::Cage, "argv", "managed_settings"),
            (Place::Directory, "argv_directory", "managed_settings_directory"),
        ] {
            rows.push((argv, list(&self.cli.argv(place), |word| format!("{word:?}"))));
            rows.push((settings, format!("{:?}", self.cli.managed(place)?)));
        }
        Ok(literal("LevelPolicy", &rows))
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

    fn level(name: &str) -> LevelPolicy {
        crate::parsed(name).unwrap()
    }

    fn all() -> [LevelPolicy; 3] {
        ["paranoid", "balanced", "developer"].map(level)
    }

    fn parse(text: &str) -> Result<LevelPolicy> {
        LevelPolicy::of(crate::extend::extended(text, crate::read)?)
    }

    #[test]
    fn t01_every_level_is_a_policy_with_reasons() {
        for (policy, name) in all().iter().zip(["paranoid", "balanced", "developer"]) {
            assert_eq!(policy.level, name);
            assert!(policy.rust().unwrap().contains("(\"/usr\", AccessClass::ReadExecute)"));
            let egress = policy.egress.rust(policy.egress_mib());
            assert!(egress.contains("(\"POST\", \"/v1/messages\")"), "{egress}");
        }
    }

    #[test]
    fn t04_a_level_without_a_reason_or_with_an_unknown_key_is_refused() {
        let check = |from: &str, to: &str, part: &str| {
            let error = parse(&BALANCED.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        check("why = \"bash, and every tool\"", "why = \" \"", "without a reason");
        check("tasks = 256", "tasks = 0", "a limit is zero");
        check("[limits]", "[limits]\nnice = 1", "unknown field");
        check("path = \"/usr\"", "path = \"usr\"", "usr is not absolute");
        check("access = \"read\"", "access = \"write\"", "unknown variant");
        check("view = \"own\"", "view = \"host\"", "unknown variant");
        check("\"--restricted\",", "", "the rules need --restricted");
        check("\"acceptEdits\"", "\"bypassPermissions\"", "the rules permit everything");
        check("Read,Write,Edit,Grep", "Read,Write,Edit,Grep,Bash", "no rules hold a command");
    }

    #[test]
    fn t05_no_constant_of_the_environment_holds_a_secret_or_comes_twice() {
        for policy in all() {
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

    #[test]
    fn t07_a_stricter_level_is_in_nothing_looser() {
        for [strict, loose] in
            [[level("paranoid"), level("balanced")], [level("balanced"), level("developer")]]
        {
            for ((name, less), (_, more)) in strict.limits.rows().iter().zip(loose.limits.rows()) {
                assert!(*less <= more, "{}: {name} is {less}, {} has {more}", strict.level, loose.level);
            }
            let seen = |of: &LevelPolicy| of.visible.iter().map(|v| v.path.clone()).collect::<Vec<_>>();
            assert!(seen(&strict).iter().all(|path| seen(&loose).contains(path)), "{}", strict.level);
            assert!(strict.proc.view as u8 <= loose.proc.view as u8, "{}", strict.level);
            let (less, more) = (strict.egress.proxy_ports(), loose.egress.proxy_ports());
            assert!(less.iter().all(|port| more.contains(port)), "{}", strict.level);
            // The cages of all levels share one root, and with it one managed-settings.json and one /dev.
            assert_eq!(strict.cli.managed(Place::Cage), loose.cli.managed(Place::Cage));
            assert_eq!(strict.device, loose.device);
        }
    }
}
