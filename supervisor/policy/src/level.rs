//! A level: how strict a run is, as the build has read it from policies/*.toml. Data, and one comparison.
//! It must never be looser for a request than the level says: a wish can only lower a limit.

use gaoler_protocol::Limits;

use crate::landlock::AccessClass;

/// The level balanced: policies/balanced.toml, where each entry has its reason.
pub const BALANCED: LevelPolicy = include!(concat!(env!("OUT_DIR"), "/balanced.rs"));

/// What a level decides. What its egress lets through is not here: only egress knows that.
#[derive(Debug)]
pub struct LevelPolicy {
    /// The limits of a run that wishes for nothing, which are also the highest.
    pub limits: Limits,
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
}

impl LevelPolicy {
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
        let mut names: Vec<&str> =
            BALANCED.env.iter().chain(BALANCED.cli_env).map(|(name, _)| *name).collect();
        assert!(!names.iter().any(|name| name.contains("TOKEN") || name.contains("KEY")));
        assert!(!names.contains(&"IS_SANDBOX"));
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
