//! The levels of this instance: the build's policies, and what the operator's file changes of one of them.
//! It must never hold a level above the operator's maximum: what is not here, no run can get.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

use gaoler_policy::landlock::{AccessClass, CageRules};
use gaoler_policy::level::{LevelPolicy, level};
use gaoler_policy::settings::{Levels as Settings, OwnLevel};
use gaoler_protocol::{INTERNAL_MARK, Level, Limits};
use gaoler_sys::memfd;

use crate::cage::Common;
use crate::fault::{Doing, Fault};
use crate::invocation;
use crate::plan::{Plan, Root};
use crate::template::Covers;

/// Files of the template's own /etc. What else lies there is the host's, and each level's to name.
const OWN_ETC: [&str; 9] = [
    "/etc/bash.bashrc",
    "/etc/claude-code",
    "/etc/gitconfig",
    "/etc/group",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/resolv.conf",
];

/// What every cage has of its own under covers, so that nothing that it needs of the host may lie there.
const COVERED: [&str; 4] = ["/tmp", "/home", "/run", "/etc"];

/// The levels up to the operator's maximum, strictest first.
pub struct Levels {
    levels: Vec<Bounds>,
    /// For a request that names none.
    pub default: Level,
    /// The loosest.
    pub maximum: Level,
}

/// One of them.
pub struct Bounds {
    /// What the build knows of it.
    pub policy: &'static LevelPolicy,
    /// The limits of a run that wishes for nothing, which are also the highest.
    pub limits: Limits,
    /// Destinations of its proxy beside the policy's, one a line, as egress reads them.
    pub hosts: OwnedFd,
    /// Ports that its egress may dial for the proxy.
    pub proxy_ports: BTreeSet<u16>,
    visible: Vec<(String, AccessClass)>,
    env: Vec<(String, String)>,
}

impl Levels {
    /// The levels that these settings allow.
    ///
    /// # Errors
    /// A name that is no level's, or a limit's that is none: the command line has checked them.
    pub fn of(settings: &Settings, internal: &[String]) -> Result<Levels, Fault> {
        let named = |name: &str| {
            Level::from_name(name).ok_or_else(|| Fault::new("read the levels", format!("`{name}` is none")))
        };
        let (default, maximum) = (named(&settings.default)?, named(&settings.maximum)?);
        let levels = Level::ALL.iter().filter(|it| **it <= maximum).map(|it| {
            let own = settings.own.as_ref().filter(|own| own.extends == it.name());
            Bounds::of(level(*it), own, &settings.hosts, internal)
        });
        Ok(Levels { levels: levels.collect::<Result<_, _>>()?, default: default.min(maximum), maximum })
    }

    /// A level; the strictest in place of one above the maximum, which is never admitted.
    pub fn get(&self, level: Level) -> &Bounds {
        self.levels.get(level as usize - 1).unwrap_or(&self.levels[0])
    }

    /// Every place of the host that any of them shows, parents first.
    pub fn visible(&self) -> BTreeSet<&str> {
        self.levels.iter().flat_map(|it| &it.visible).map(|(path, _)| path.as_str()).collect()
    }

    /// What the cages of each share, as [`Levels::get`] finds it. The template must have been entered.
    ///
    /// # Errors
    /// A place that cannot be opened.
    pub fn commons(&self, plan: Plan, state: &Path, cli: &Path) -> Result<Vec<Common>, Fault> {
        let kept = [state, cli];
        if plan.root == Root::Covered
            && let Some(path) = kept.iter().find(|path| COVERED.iter().any(|folder| path.starts_with(folder)))
        {
            let own = COVERED.join(", ");
            let why =
                format!("on this host a cage has its own {own}; choose another place with --state or --cli");
            return Err(Fault::new(format!("use {}", path.display()), why));
        }
        let covers = (plan.root == Root::Covered).then(|| Covers::of(self, &kept)).transpose()?.map(Rc::new);
        self.levels.iter().map(|level| level.common(plan, cli, covers.clone())).collect()
    }
}

impl Bounds {
    fn of(
        policy: &'static LevelPolicy,
        own: Option<&OwnLevel>,
        hosts: &[String],
        internal: &[String],
    ) -> Result<Bounds, Fault> {
        let mut limits = policy.limits;
        for (name, limit) in own.iter().flat_map(|own| &own.limits) {
            let unknown = || Fault::new("read the level's limits", format!("`{name}` is none"));
            *limits.named(name).ok_or_else(unknown)? = *limit;
        }
        let mut visible: Vec<_> =
            policy.visible.iter().map(|(path, class)| ((*path).into(), *class)).collect();
        let mut env: Vec<_> =
            policy.env.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        if let Some(own) = own {
            visible.extend(own.visible.iter().map(|place| {
                let class = if place.execute { AccessClass::ReadExecute } else { AccessClass::Read };
                (place.path.display().to_string(), class)
            }));
            env.retain(|(name, _): &(String, String)| own.env.iter().all(|it| it.name != *name));
            env.extend(own.env.iter().map(|it| (it.name.clone(), it.value.clone())));
        }
        // A level without a proxy has no destinations that anybody could add to.
        let proxy = !policy.proxy_ports.is_empty();
        let hosts = hosts.iter().chain(own.iter().flat_map(|own| &own.hosts)).filter(|_| proxy);
        // MCP servers in the operator's own network are marked: they are no destination of a tool's.
        let internal = internal.iter().filter(|_| proxy).map(|it| format!("{INTERNAL_MARK}{it}"));
        let hosts: Vec<String> = hosts.cloned().chain(internal).collect();
        let ports = hosts.iter().filter_map(|host| host.rsplit_once(':')?.1.parse().ok());
        Ok(Bounds {
            policy,
            limits,
            proxy_ports: policy.proxy_ports.iter().copied().chain(ports).collect(),
            hosts: memfd::sealed("hosts", hosts.join("\n").as_bytes()).doing("seal the operator's hosts")?,
            visible,
            env,
        })
    }

    /// A wish within these bounds.
    pub fn clamp(&self, wish: &Limits) -> Limits {
        wish.within(&self.limits)
    }

    /// In a root of our own the rules are about what was put there; in the host's they name the little of it that
    /// a command needs.
    fn common(&self, plan: Plan, cli: &Path, covers: Option<Rc<Covers>>) -> Result<Common, Fault> {
        let own: &[(&str, AccessClass)] = match plan.root {
            Root::Own => &[
                ("/", AccessClass::List),
                ("/opt/claude", AccessClass::ReadExecute),
                ("/dev", AccessClass::Read),
            ],
            Root::Covered | Root::Host => &[("/dev", AccessClass::List)],
        };
        let own = own.iter().copied();
        let etc = OWN_ETC.map(|path| (path, AccessClass::Read));
        let devices = self.policy.devices.iter().map(|(path, _)| (*path, AccessClass::Device));
        let places = self.visible.iter().map(|(path, class)| (path.as_str(), *class));
        let places = places.chain(devices).chain(own).chain(etc);
        let places = places.map(|(path, class)| (Path::new(path), class));
        let places = places.chain((plan.root != Root::Own).then_some((cli, AccessClass::ReadExecute)));
        let rules = CageRules::open(places);
        let path = self.env.iter().find(|(name, _)| name == "PATH");
        Ok(Common {
            plan,
            covers,
            rules: rules.doing("open the cage's places")?,
            environment: invocation::constants(self.env.iter().map(|(n, v)| (n.as_str(), v.as_str())))
                .collect::<Vec<CString>>(),
            path: path.map_or_else(String::new, |(_, value)| value.clone()),
            proc_options: self.policy.proc_options,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_policy::settings::{OwnConstant, OwnPlace};

    fn settings(maximum: &str) -> Settings {
        let own = OwnLevel {
            extends: "paranoid".into(),
            limits: [("tasks".to_owned(), 7)].into(),
            env: vec![
                OwnConstant { name: "LANG".into(), value: "C".into() },
                OwnConstant { name: "A".into(), value: "b".into() },
            ],
            visible: vec![OwnPlace { path: "/srv/tools".into(), execute: true }],
            ..OwnLevel::default()
        };
        Settings {
            default: "paranoid".into(),
            maximum: maximum.into(),
            own: Some(own),
            ..Settings::default()
        }
    }

    #[test]
    fn a_file_of_the_operators_changes_one_level_and_no_other() {
        let levels = Levels::of(&settings("developer"), &[]).unwrap();
        let paranoid = levels.get(Level::Paranoid);
        assert_eq!(paranoid.limits, Limits { tasks: 7, ..paranoid.policy.limits });
        let values: Vec<_> = paranoid.env.iter().filter(|(name, _)| name == "LANG" || name == "A").collect();
        assert_eq!(values, [&("LANG".into(), "C".into()), &("A".into(), "b".into())]);
        assert!(levels.visible().contains("/srv/tools"));
        for other in [Level::Balanced, Level::Developer] {
            let other = levels.get(other);
            assert_eq!(other.limits, other.policy.limits);
            assert_eq!(other.env.len(), other.policy.env.len());
            assert_eq!(other.visible.len(), other.policy.visible.len());
        }
    }

    #[test]
    fn no_level_above_the_maximum_is_there() {
        let levels = Levels::of(&settings("balanced"), &["10.0.0.7:9000".into()]).unwrap();
        assert_eq!(levels.get(Level::Balanced).policy.name, "balanced");
        assert_eq!(levels.get(Level::Developer).policy.name, "paranoid");
        assert!(!levels.visible().contains("/etc/services"));
        assert!(Levels::of(&settings("lax"), &[]).is_err());
    }
}
