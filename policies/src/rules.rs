//! The CLI's own rules, as the CLI reads them: argv and managed settings for each of the places that it may run in.
//! It must never write a key or a tool's name that the pinned CLI does not know: a settings file that it does not
//! understand, it drops as a whole.

use serde::{Deserialize, Serialize};

use crate::{Result, Why};

/// How the CLI is called.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cli {
    /// Arguments of every run, before those of the rule set.
    argv: Vec<String>,
    deny: Vec<Deny>,
    cage: RuleSet,
    directory: RuleSet,
    #[serde(rename = "why")]
    _why: Why,
}

/// The rules of a place.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleSet {
    /// Arguments beside those of every run.
    argv: Vec<String>,
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

/// The policy tier's settings, in the CLI's own words.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Managed {
    allow_managed_hooks_only: bool,
    allow_managed_mcp_servers_only: bool,
    allow_managed_permission_rules_only: bool,
    disable_all_hooks: bool,
    permissions: Permissions,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Permissions {
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

impl Cli {
    fn of(&self, place: Place) -> &RuleSet {
        match place {
            Place::Cage => &self.cage,
            Place::Directory => &self.directory,
        }
    }

    /// The arguments of a run there, before those of the request's enums and ids.
    pub(crate) fn argv(&self, place: Place) -> Vec<&str> {
        self.argv.iter().chain(&self.of(place).argv).map(String::as_str).collect()
    }

    /// The managed settings of a run there: one line of JSON.
    pub(crate) fn managed(&self, place: Place) -> Result<String> {
        // Where the cage is the boundary, its mode is to permit everything.
        let disable = (place != Place::Cage).then_some(Disable::Disable);
        let denied = self.deny.iter().filter(|deny| deny.rules.contains(&place)).map(|deny| deny.name);
        let settings = Managed {
            allow_managed_hooks_only: true,
            allow_managed_mcp_servers_only: true,
            allow_managed_permission_rules_only: true,
            disable_all_hooks: true,
            permissions: Permissions {
                deny: denied.collect(),
                disable_bypass_permissions_mode: disable,
                disable_auto_mode: disable,
            },
        };
        serde_json::to_string(&settings).map_err(|error| error.to_string())
    }

    /// What makes these rules worth nothing where nothing else keeps tenants apart.
    ///
    /// # Errors
    /// The first of it, as a sentence.
    pub(crate) fn check(&self) -> Result<()> {
        let argv = self.argv(Place::Directory);
        let has = |words: &[&str]| argv.windows(words.len()).any(|found| found == words);
        for needed in [&["--restricted"][..], &["--permission-prompts", "none"], &["--setting-sources", ""]] {
            if !has(needed) {
                return Err(format!("directory: the rules need {}", needed.join(" ")));
            }
        }
        if has(&["bypassPermissions"]) {
            return Err("directory: the rules permit everything".into());
        }
        if argv.iter().any(|word| word.split(',').any(|tool| tool == "Bash")) {
            return Err("directory: no rules hold a command".into());
        }
        Ok(())
    }
}
