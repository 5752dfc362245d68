//! The CLI's own rules, as the CLI reads them: argv and managed settings for each of the places that it may run in.
//! It must never write a key or a tool's name that the pinned CLI does not know: a settings file that it does not
//! understand, it drops as a whole.

use serde::{Deserialize, Serialize};

use crate::{Result, Why};

/// What stands in the settings for the run's workspace and for the instance's state, until a run is begun.
const WORKSPACE: &str = "@WORKSPACE@";
const STATE: &str = "@STATE@";

/// How the CLI is called.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cli {
    /// Arguments of every run, before those of the rule set.
    argv: Vec<String>,
    deny: Vec<Deny>,
    cage: RuleSet,
    directory: RuleSet,
    directory_sandboxed: RuleSet,
    #[serde(rename = "why")]
    _why: Why,
}

/// The rules of a place.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleSet {
    /// Arguments beside those of every run.
    argv: Vec<String>,
    /// Tools that run without a question, beside what the mode allows.
    #[serde(default)]
    allow: Vec<Tool>,
    sandbox: Option<Sandbox>,
    #[serde(rename = "why")]
    _why: Why,
}

/// A tool that no run gets, in these places.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Deny {
    name: Tool,
    rules: Vec<Place>,
    #[serde(rename = "why")]
    _why: Why,
}

/// Where the CLI runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Place {
    /// In a cage of its own, which is the boundary.
    Cage,
    /// In a folder, with nothing else between tenants.
    Directory,
    /// The same, with commands in the CLI's own sandbox.
    DirectorySandboxed,
}

/// A tool of the pinned CLI, by its name there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
enum Tool {
    Agent,
    Bash,
    Glob,
    NotebookEdit,
    RemoteTrigger,
    Skill,
    WebFetch,
    WebSearch,
    Workflow,
}

/// The CLI's sandbox for commands.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sandbox {
    /// Folders that a command finds empty.
    deny_read: Vec<String>,
    /// Folders below those that it sees all the same.
    allow_read: Vec<String>,
    /// Hosts that it may speak to.
    allowed_domains: Vec<String>,
    #[serde(rename = "why")]
    _why: Why,
}

/// The policy tier's settings, in the CLI's own words.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Managed<'a> {
    allow_managed_hooks_only: bool,
    allow_managed_mcp_servers_only: bool,
    allow_managed_permission_rules_only: bool,
    disable_all_hooks: bool,
    permissions: Permissions<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox: Option<ManagedSandbox<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Permissions<'a> {
    #[serde(skip_serializing_if = "<[Tool]>::is_empty")]
    allow: &'a [Tool],
    deny: Vec<Tool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disable_bypass_permissions_mode: Option<Disable>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disable_auto_mode: Option<Disable>,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
enum Disable {
    Disable,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ManagedSandbox<'a> {
    enabled: bool,
    fail_if_unavailable: bool,
    allow_unsandboxed_commands: bool,
    auto_allow_bash_if_sandboxed: bool,
    filesystem: Filesystem<'a>,
    network: Network<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Filesystem<'a> {
    deny_read: &'a [String],
    allow_read: &'a [String],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Network<'a> {
    allowed_domains: &'a [String],
}

impl Cli {
    fn of(&self, place: Place) -> &RuleSet {
        match place {
            Place::Cage => &self.cage,
            Place::Directory => &self.directory,
            Place::DirectorySandboxed => &self.directory_sandboxed,
        }
    }

    /// The arguments of a run there, before those of the request's enums and ids.
    pub(crate) fn argv(&self, place: Place) -> Vec<&str> {
        self.argv.iter().chain(&self.of(place).argv).map(String::as_str).collect()
    }

    /// The managed settings of a run there: one line of JSON.
    pub(crate) fn managed(&self, place: Place) -> Result<String> {
        let rules = self.of(place);
        // Where the cage is the boundary, its mode is to permit everything.
        let disable = (place != Place::Cage).then_some(Disable::Disable);
        let denied = self.deny.iter().filter(|deny| deny.rules.contains(&place)).map(|deny| deny.name);
        let settings = Managed {
            allow_managed_hooks_only: true,
            allow_managed_mcp_servers_only: true,
            allow_managed_permission_rules_only: true,
            disable_all_hooks: true,
            permissions: Permissions {
                allow: &rules.allow,
                deny: denied.collect(),
                disable_bypass_permissions_mode: disable,
                disable_auto_mode: disable,
            },
            // Not one of these four is a choice: without any of them a command could run outside.
            sandbox: rules.sandbox.as_ref().map(|sandbox| ManagedSandbox {
                enabled: true,
                fail_if_unavailable: true,
                allow_unsandboxed_commands: false,
                auto_allow_bash_if_sandboxed: true,
                filesystem: Filesystem { deny_read: &sandbox.deny_read, allow_read: &sandbox.allow_read },
                network: Network { allowed_domains: &sandbox.allowed_domains },
            }),
        };
        serde_json::to_string(&settings).map_err(|error| error.to_string())
    }

    /// What makes these rules worth nothing where nothing else keeps tenants apart.
    ///
    /// # Errors
    /// The first of it, as a sentence.
    pub(crate) fn check(&self) -> Result<()> {
        let has = |place, words: &[&str]| self.argv(place).windows(words.len()).any(|found| found == words);
        for place in [Place::Directory, Place::DirectorySandboxed] {
            for needed in
                [&["--restricted"][..], &["--permission-prompts", "none"], &["--setting-sources", ""]]
            {
                if !has(place, needed) {
                    return Err(format!("{place:?}: the rules need {}", needed.join(" ")));
                }
            }
            if has(place, &["bypassPermissions"]) {
                return Err(format!("{place:?}: the rules permit everything"));
            }
        }
        let commands = |place| self.argv(place).iter().any(|word| word.split(',').any(|tool| tool == "Bash"));
        if commands(Place::Directory) || self.directory.sandbox.is_some() {
            return Err("directory: a command belongs into the sandbox".into());
        }
        match &self.directory_sandboxed.sandbox {
            Some(sandbox)
                if sandbox.deny_read.iter().any(|path| path == STATE)
                    && sandbox.allow_read == [WORKSPACE]
                    && sandbox.allowed_domains.is_empty() =>
            {
                Ok(())
            }
            _ => Err(format!("directory_sandboxed: it hides {STATE}, shows {WORKSPACE}, and has no network")),
        }
    }
}
