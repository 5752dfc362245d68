//! How cages are made on this host: each mechanism by itself, where it was seen to hold. Pure.
//! It must never plan for what was not seen, nor leave out what was: there is no switch.

use gaoler_policy::seccomp::{ALONE, BUFFERS, CAGE, Program, SHARED, UNCOUNTED};
use gaoler_protocol::{LayerName, LayerRow, LayerState, Rules, Tier};

use crate::tiers;

/// What a cage sees of the host's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// A root of our own: the host's is gone.
    Own,
    /// The host's, with a fresh file system over each folder that the level does not show.
    Covered,
    /// The host's. Permissions and Landlock alone decide.
    Host,
}

/// Under which ids a cage's processes run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// One per run: the tenant's files are mapped to it.
    Run,
    /// The tenant's own.
    Tenant,
    /// Those of gaoler itself.
    Same,
}

/// The mechanisms of every cage of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// What this makes.
    pub tier: Tier,
    /// Root is an ordinary user's, in a user namespace of this supervisor.
    pub inside: bool,
    /// The root.
    pub root: Root,
    /// The ids.
    pub ids: Ids,
    /// CLONE_NEW flags of pid 1.
    pub namespaces: i32,
    /// A user and a network namespace are made ahead, and entered.
    pub ahead: bool,
    /// The network is the cage's own.
    pub network: bool,
    /// Limits are a control group's; without one they are rlimits' and the watchdog's.
    pub cgroup: bool,
    /// The control group's namespace is left.
    pub cgroup_namespace: bool,
    /// Landlock on files.
    pub landlock: bool,
    /// Landlock on TCP ports.
    pub ports: bool,
    /// The kernel names who connects to a socket.
    pub peers: bool,
    /// A keyring of its own.
    pub keyring: bool,
    /// What the CLI's own rules must do here.
    pub rules: Rules,
}

impl Plan {
    /// The plan for a host of these layers, as they were tried.
    pub fn of(rows: &[LayerRow], inside: bool) -> Plan {
        use LayerName::*;
        let held =
            |name: LayerName| rows.iter().any(|row| row.name == name && row.state == LayerState::Enforced);
        let all = |names: &[LayerName]| names.iter().all(|name| held(*name));
        let root = match (all(&[MountNamespace, TmpfsSize, Proc]), all(&[PivotRoot, MountApi])) {
            (true, true) => Root::Own,
            (true, false) => Root::Covered,
            (false, _) => Root::Host,
        };
        let (network, ahead) = (held(NetworkNamespace), all(&[NetworkNamespace, UserNamespace]));
        let ids = match held(Uid) {
            true if root == Root::Own && ahead && held(IdMappedMounts) => Ids::Run,
            true => Ids::Tenant,
            false => Ids::Same,
        };
        let flags = [
            (PidNamespace, libc::CLONE_NEWPID),
            (MountNamespace, libc::CLONE_NEWNS),
            (IpcNamespace, libc::CLONE_NEWIPC),
            (UtsNamespace, libc::CLONE_NEWUTS),
        ];
        let flags = flags.iter().filter(|(name, _)| held(*name)).fold(0, |flags, (_, flag)| flags | flag);
        let cgroup = all(&[CgroupMemory, CgroupTasks, CgroupCpu]);
        // Where nothing of the kernel's keeps a command's hands off other tenants' files and gaoler's own
        // processes, the CLI's rules are all that is left, and they hold for its file tools alone.
        let apart = root == Root::Own || held(Uid) || held(LandlockFiles);
        Plan {
            tier: tiers::tier(rows),
            inside,
            root,
            ids,
            namespaces: if network && !ahead { flags | libc::CLONE_NEWNET } else { flags },
            ahead,
            network,
            cgroup,
            cgroup_namespace: cgroup && held(CgroupNamespace),
            landlock: held(LandlockFiles),
            ports: held(LandlockTcp),
            peers: held(PeerCredentials),
            keyring: held(Keyring),
            rules: if apart && held(ProcessShield) { Rules::Cage } else { Rules::Directory },
        }
    }

    /// The filters of a command, in the order in which they are installed; the strictest answer counts.
    pub fn filters(&self) -> impl Iterator<Item = Program> {
        let network = match (self.network, self.ports) {
            (true, _) => None,
            (false, true) => Some(SHARED),
            (false, false) => Some(ALONE),
        };
        let counted = if self.cgroup { None } else { Some(UNCOUNTED) };
        network.into_iter().chain(counted).chain([BUFFERS, CAGE])
    }

    /// A uid of ours for one of our own processes: this one, where processes can have others.
    pub fn own_uid(&self, uid: u32) -> u32 {
        if self.ids == Ids::Same { nix::unistd::geteuid().as_raw() } else { uid }
    }

    /// The namespaces that a cage's process, or one of our own, must have for itself.
    pub fn apart(&self, cage: bool) -> Vec<&'static str> {
        let flags = [
            ("mnt", libc::CLONE_NEWNS),
            ("pid", libc::CLONE_NEWPID),
            ("ipc", libc::CLONE_NEWIPC),
            ("uts", libc::CLONE_NEWUTS),
        ];
        let own = flags.iter().filter(|(_, flag)| self.namespaces & flag != 0).map(|(name, _)| *name);
        let net = (cage && self.namespaces & libc::CLONE_NEWNET != 0).then_some("net");
        own.chain(net).chain((cage && self.cgroup_namespace).then_some("cgroup")).collect()
    }

    /// Whether the bounding set can be emptied. Where it cannot, no_new_privs makes it moot.
    pub fn bounds(&self) -> bool {
        self.inside || self.ids != Ids::Same
    }

    /// Whether pid 1 is the first of a namespace, whose end the kernel makes everybody's.
    pub fn has_pids(&self) -> bool {
        self.namespaces & libc::CLONE_NEWPID != 0
    }

    /// Whether a cage sees the entries of its own processes in /proc and no others.
    pub fn has_own_proc(&self) -> bool {
        self.root != Root::Host
    }

    /// Whether a run's own folders lie in the state, and not in file systems of its own.
    pub fn has_folder(&self) -> bool {
        self.root == Root::Host
    }

    /// Whether tenants' processes walk through the state folder to their own.
    pub fn walks(&self) -> bool {
        self.root != Root::Own && self.ids == Ids::Tenant
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(lost: &[LayerName]) -> Plan {
        let state = |name| if lost.contains(&name) { LayerState::Absent } else { LayerState::Enforced };
        let rows = LayerName::ALL.iter().map(|&name| LayerRow { name, state: state(name), errno: 1 });
        Plan::of(&rows.collect::<Vec<_>>(), false)
    }

    #[test]
    fn t01_every_host_gets_all_that_holds_there() {
        use LayerName::*;
        let full = plan(&[]);
        assert_eq!(
            (full.tier, full.root, full.ids, full.rules),
            (Tier::Kernel, Root::Own, Ids::Run, Rules::Cage)
        );
        assert!(full.ahead && full.network && full.cgroup && full.landlock && full.has_pids());
        assert_eq!(full.filters().count(), 2);

        let landlock = [LandlockFiles, LandlockTcp, LandlockIoctl, LandlockScopes];
        let cgroups = [CgroupMemory, CgroupTasks, CgroupCpu];
        let gvisor =
            [&landlock[..], &cgroups, &[UserNamespace, PivotRoot, MountApi, IdMappedMounts, Clone3]].concat();
        let gvisor = plan(&gvisor);
        assert_eq!((gvisor.tier, gvisor.root, gvisor.ids), (Tier::Namespaces, Root::Covered, Ids::Tenant));
        assert!(gvisor.network && !gvisor.ahead && gvisor.namespaces & libc::CLONE_NEWNET != 0);
        assert_eq!((gvisor.rules, gvisor.filters().count()), (Rules::Cage, 3));

        let user = plan(&[&cgroups[..], &[Uid, IdMappedMounts]].concat());
        assert_eq!(
            (user.tier, user.root, user.ids, user.rules),
            (Tier::Namespaces, Root::Own, Ids::Same, Rules::Cage)
        );

        let mounts = [MountNamespace, PivotRoot, MountApi, IdMappedMounts, TmpfsSize, Proc];
        let namespaces =
            [UserNamespace, PidNamespace, NetworkNamespace, IpcNamespace, UtsNamespace, CgroupNamespace];
        let docker = [&cgroups[..], &mounts, &namespaces].concat();
        let root = plan(&docker);
        assert_eq!(
            (root.tier, root.root, root.ids, root.rules),
            (Tier::Uid, Root::Host, Ids::Tenant, Rules::Cage)
        );
        assert!(!root.has_pids() && root.has_folder() && root.walks());
        assert_eq!(root.filters().count(), 4);

        let nothing = plan(LayerName::ALL);
        assert_eq!((nothing.tier, nothing.root, nothing.ids), (Tier::Directory, Root::Host, Ids::Same));
        assert_eq!(nothing.rules, Rules::Directory);
    }

    #[test]
    fn t02_commands_are_allowed_only_where_files_and_processes_are_apart() {
        use LayerName::*;
        let roots = [MountNamespace, PivotRoot];
        assert_eq!(plan(&[&roots[..], &[Uid]].concat()).rules, Rules::Cage);
        assert_eq!(plan(&[&roots[..], &[Uid, LandlockFiles]].concat()).rules, Rules::Directory);
        assert_eq!(plan(&[ProcessShield]).rules, Rules::Directory);
    }
}
