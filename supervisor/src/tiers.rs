//! Which tier the layers of a host make, and which are missing for another one. Pure.
//! It must never call a layer held that was not seen to hold.

use gaoler_protocol::{LayerName, LayerRow, LayerState, Tier};

/// The strongest tier that these rows carry.
#[must_use]
pub fn tier(rows: &[LayerRow]) -> Tier {
    Tier::ALL.iter().rev().copied().find(|tier| missing(*tier, rows).is_empty()).unwrap_or(Tier::Directory)
}

/// The layers that this tier needs and these rows do not have.
#[must_use]
pub fn missing(wanted: Tier, rows: &[LayerRow]) -> Vec<LayerRow> {
    let unseen = |name| LayerRow { name, state: LayerState::Absent, errno: 0 };
    let row = |name: LayerName| rows.iter().copied().find(|row| row.name == name).unwrap_or(unseen(name));
    // An ordinary user gets namespaces only inside a user namespace, which is said to be degraded.
    let least = if wanted == Tier::Namespaces { LayerState::Degraded } else { LayerState::Enforced };
    let alone = row(LayerName::Uid).state > LayerState::Enforced;
    let lacks = |row: &LayerRow| row.state > least;
    let needed = LayerName::ALL.iter().filter(|name| needs(wanted, **name, alone));
    needed.map(|name| row(*name)).filter(lacks).collect()
}

/// Whether a tier needs this layer; `alone`: on a host where all runs have one uid.
fn needs(tier: Tier, name: LayerName, alone: bool) -> bool {
    use LayerName::*;
    match tier {
        Tier::Directory => false,
        Tier::Uid => matches!(name, Uid | Rlimits | Seccomp | NoNewPrivs | ProcessShield),
        Tier::Namespaces => match name {
            PidNamespace | MountNamespace | NetworkNamespace | IpcNamespace => true,
            Proc | TmpfsSize | Seccomp | NoNewPrivs | ProcessShield => true,
            // Without uids only a root of their own keeps tenants from each other's files.
            PivotRoot | MountApi => alone,
            _ => false,
        },
        // Landlock older than ports, ioctls and scopes will do: the other layers of this tier cover these.
        // What no cage of this tier is made with is tried for the report, and for weaker tiers.
        Tier::Kernel => !matches!(
            name,
            LandlockTcp
                | LandlockIoctl
                | LandlockScopes
                | Chroot
                | BindMounts
                | Hidepid
                | Pidfd
                | Openat2
                | PeerCredentials
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(state: impl Fn(LayerName) -> LayerState) -> Vec<LayerRow> {
        LayerName::ALL.iter().map(|&name| LayerRow { name, state: state(name), errno: 1 }).collect()
    }

    #[test]
    fn t01_hosts_get_the_tier_of_what_held() {
        use LayerName::*;
        use LayerState::*;
        let check = |expected: Tier, state: &dyn Fn(LayerName) -> LayerState| {
            assert_eq!(tier(&rows(state)), expected);
        };
        check(Tier::Kernel, &|_| Enforced);
        // Landlock older than ports, ioctl and scopes is enough: ABI 2 is the minimum.
        check(Tier::Kernel, &|name| match name {
            LandlockTcp | LandlockIoctl | LandlockScopes => Absent,
            _ => Enforced,
        });
        check(Tier::Namespaces, &|name| if name == CgroupTasks { Absent } else { Enforced });
        check(Tier::Namespaces, &|name| if name == PidNamespace { Degraded } else { Enforced });
        check(Tier::Uid, &|name| if name == PidNamespace { Absent } else { Enforced });
        check(Tier::Directory, &|name| match name {
            PidNamespace => Absent,
            Uid => Degraded,
            _ => Enforced,
        });
        check(Tier::Directory, &|_| Absent);
        assert_eq!(tier(&[]), Tier::Directory);
    }

    #[test]
    fn t02_what_is_missing_comes_with_its_errno() {
        let found = rows(|name| match name {
            LayerName::MountApi => LayerState::Absent,
            _ => LayerState::Enforced,
        });
        let expected = LayerRow { name: LayerName::MountApi, state: LayerState::Absent, errno: 1 };
        assert_eq!(missing(Tier::Kernel, &found), [expected]);
        assert_eq!(missing(Tier::Kernel, &[]).len(), 27);
    }
}
