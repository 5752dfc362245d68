//! A level: how strict a run is, as the build has read it from policies/*.toml. Data, and one comparison.
//! It must never be looser for a request than the level says: a wish can only lower a limit.

use gaoler_protocol::{Level, Limits, Rules};

use crate::landlock::AccessClass;

/// The level paranoid: policies/paranoid.toml, on top of balanced.
pub const PARANOID: LevelPolicy = include!(concat!(env!("OUT_DIR"), "/paranoid.rs"));
/// The level balanced: policies/balanced.toml, where each entry has its reason.
pub const BALANCED: LevelPolicy = include!(concat!(env!("OUT_DIR"), "/balanced.rs"));
/// The level developer: policies/developer.toml, on top of balanced.
pub const DEVELOPER: LevelPolicy = include!(concat!(env!("OUT_DIR"), "/developer.rs"));

/// The policy of a level.
pub fn level(level: Level) -> &'static LevelPolicy {
    match level {
        Level::Paranoid => &PARANOID,
        Level::Balanced => &BALANCED,
        Level::Developer => &DEVELOPER,
    }
}

/// What a level decides. What its egress lets through is not here: only egress knows that.
#[derive(Debug)]
pub struct LevelPolicy {
    /// The word that users see.
    pub name: &'static str,
    /// The limits of a run that wishes for nothing, which are also the highest.
    pub limits: Limits,
    /// The options that a cage's /proc is mounted with.
    pub proc_options: &'static str,
    /// Every port that the run's proxy may dial; empty = there is no proxy.
    pub proxy_ports: &'static [u16],
    /// What of the host a cage sees: where, on the host and in the cage, and what may be done there, which is
    /// never writing. Places that a host does not have are left out.
    pub visible: &'static [(&'static str, AccessClass)],
    /// Device nodes of the cage's own /dev: where, and the minor number (the major one is 1).
    pub devices: &'static [(&'static str, u64)],
    /// Environment of every run: names and values.
    pub env: &'static [(&'static str, &'static str)],
    /// Environment of CLI runs, beside `env`.
    pub cli_env: &'static [(&'static str, &'static str)],
    /// Arguments of every CLI run, before those of the request's enums and ids.
    pub argv: &'static [&'static str],
    /// The policy tier's settings: one line of JSON, for `--managed-settings` and the cage's /etc.
    pub managed_settings: &'static str,
    /// The arguments where nothing but the CLI's own rules keeps tenants apart.
    pub argv_directory: &'static [&'static str],
    /// The settings there.
    pub managed_settings_directory: &'static str,
}

impl LevelPolicy {
    /// The arguments of a CLI run under these rules, before those of the request's enums and ids.
    pub fn argv(&self, rules: Rules) -> &'static [&'static str] {
        match rules {
            Rules::Cage => self.argv,
            Rules::Directory => self.argv_directory,
        }
    }

    /// The managed settings of a CLI run under these rules.
    pub fn managed_settings(&self, rules: Rules) -> &'static str {
        match rules {
            Rules::Cage => self.managed_settings,
            Rules::Directory => self.managed_settings_directory,
        }
    }

    /// The limits of a run that wishes for these (0 = the level's own): never above the level's.
    #[must_use]
    pub fn clamp(&self, wish: &Limits) -> Limits {
        wish.within(&self.limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t01_a_wish_only_lowers() {
        let nothing = Limits::NONE;
        assert_eq!(BALANCED.clamp(&nothing), BALANCED.limits);
        let wish = Limits { memory_mib: u32::MAX, tasks: 20, ..nothing };
        assert_eq!(BALANCED.clamp(&wish), Limits { tasks: 20, ..BALANCED.limits });
    }

    #[test]
    fn t02_no_constant_of_the_environment_holds_a_secret_or_comes_twice() {
        for policy in Level::ALL.iter().map(|it| level(*it)) {
            let mut names: Vec<&str> =
                policy.env.iter().chain(policy.cli_env).map(|(name, _)| *name).collect();
            assert!(!names.iter().any(|name| name.contains("TOKEN") || name.contains("KEY")));
            assert!(!names.contains(&"IS_SANDBOX"));
            let all = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), all);
        }
    }

    #[test]
    fn t03_every_level_is_the_one_of_its_name() {
        for wanted in Level::ALL {
            assert_eq!(level(*wanted).name, wanted.name());
        }
    }
}
