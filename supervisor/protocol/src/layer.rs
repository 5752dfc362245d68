//! The names of tiers and layers, shared by doctor, reports and /v1/security.
//! A name is never proof: a state is set only by code that tried the layer on this host.

use crate::Malformed;

macro_rules! names {
    ($(#[$doc:meta])* $enum:ident { $($(#[$vdoc:meta])* $variant:ident = $number:literal, $name:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $enum { $($(#[$vdoc])* $variant = $number,)* }

        impl $enum {
            /// Every value, in order.
            pub const ALL: &[$enum] = &[$($enum::$variant,)*];

            /// The word that users see, in configuration, reports and messages.
            pub const fn name(self) -> &'static str { match self { $($enum::$variant => $name,)* } }

            /// The value with this word.
            pub fn from_name(name: &str) -> Option<$enum> {
                match name { $($name => Some($enum::$variant),)* _ => None }
            }

            /// The value with this number on the wire.
            ///
            /// # Errors
            /// A number that has no name.
            pub const fn from_number(number: u8) -> Result<$enum, Malformed> {
                match number { $($number => Ok($enum::$variant),)* _ => Err(Malformed::Field(stringify!($enum))) }
            }
        }

        impl std::fmt::Display for $enum {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.pad(self.name()) }
        }

        impl $crate::Field for $enum {
            fn put(&self, out: &mut $crate::Cursor<'_>) { out.put(&[*self as u8]); }
            fn take(from: &mut $crate::Reader<'_>, _: &'static str) -> Result<$enum, Malformed> {
                $enum::from_number(from.take::<1>()[0])
            }
        }
    };
}
pub(crate) use names;

names! {
    /// What keeps tenants apart on this host, strongest last (so that `>=` reads as "at least").
    Tier {
        /// One uid; folders and the CLI's own rules.
        Directory = 1, "directory";
        /// A uid per run.
        Uid = 2, "uid";
        /// Namespaces and seccomp.
        Namespaces = 3, "namespaces";
        /// Everything: uid, namespaces, own root, Landlock, seccomp, cgroup.
        Kernel = 4, "kernel";
    }
}

names! {
    /// One mechanism each. The order is the order of doctor's table.
    LayerName {
        /// setresuid and chown to another uid, proved by a 0600 file that this uid cannot read.
        Uid = 1, "uid";
        /// A user namespace with a one-id map, made ahead and entered.
        UserNamespace = 2, "user_namespace";
        /// CLONE_NEWPID.
        PidNamespace = 3, "pid_namespace";
        /// CLONE_NEWNS.
        MountNamespace = 4, "mount_namespace";
        /// CLONE_NEWNET, with loopback up and a listener inside.
        NetworkNamespace = 5, "network_namespace";
        /// CLONE_NEWIPC.
        IpcNamespace = 6, "ipc_namespace";
        /// CLONE_NEWUTS.
        UtsNamespace = 7, "uts_namespace";
        /// CLONE_NEWCGROUP.
        CgroupNamespace = 8, "cgroup_namespace";
        /// clone3, which puts a child into its cgroup at birth.
        Clone3 = 9, "clone3";
        /// pivot_root onto a root of our own.
        PivotRoot = 10, "pivot_root";
        /// open_tree, move_mount, mount_setattr.
        MountApi = 11, "mount_api";
        /// An id-mapped mount of the state folder.
        IdMappedMounts = 12, "id_mapped_mounts";
        /// /proc of the own pid namespace only, as observed.
        Proc = 13, "proc";
        /// Landlock on files, ABI 2 or newer.
        LandlockFiles = 14, "landlock_files";
        /// Landlock on TCP ports (ABI 4).
        LandlockTcp = 15, "landlock_tcp";
        /// Landlock on device ioctls (ABI 5).
        LandlockIoctl = 16, "landlock_ioctl";
        /// Landlock scopes: signals and abstract sockets (ABI 6).
        LandlockScopes = 17, "landlock_scopes";
        /// A seccomp filter that answers as written.
        Seccomp = 18, "seccomp";
        /// no_new_privs.
        NoNewPrivs = 19, "no_new_privs";
        /// Capabilities and bounding set to zero.
        Capabilities = 20, "capabilities";
        /// A memory limit by cgroup.
        CgroupMemory = 21, "cgroup_memory";
        /// A task limit by cgroup.
        CgroupTasks = 22, "cgroup_tasks";
        /// A CPU limit by cgroup.
        CgroupCpu = 23, "cgroup_cpu";
        /// rlimits, as observed.
        Rlimits = 24, "rlimits";
        /// tmpfs with a size that holds.
        TmpfsSize = 25, "tmpfs_size";
        /// PR_SET_PDEATHSIG, as observed.
        ParentDeath = 26, "parent_death_signal";
        /// openat2 with RESOLVE_BENEATH.
        Openat2 = 27, "openat2";
        /// memfd seals.
        MemfdSeals = 28, "memfd_seals";
        /// A session keyring of its own.
        Keyring = 29, "session_keyring";
        /// chroot.
        Chroot = 30, "chroot";
        /// A bind mount that is really read-only.
        BindMounts = 31, "bind_mounts";
        /// /proc with hidepid that really hides.
        Hidepid = 32, "hidepid";
        /// pidfd_open.
        Pidfd = 33, "pidfd";
        /// close_range.
        CloseRange = 34, "close_range";
        /// A process as confined as a cage's can neither signal nor read the supervisor.
        ProcessShield = 35, "process_shield";
        /// SO_PEERCRED that names whoever connects.
        PeerCredentials = 36, "peer_credentials";
    }
}

names! {
    /// What was seen of a layer on this host.
    LayerState {
        /// Tried, and it held.
        Enforced = 1, "enforced";
        /// Tried, and it holds in part.
        Degraded = 2, "degraded";
        /// Tried, and refused by the kernel.
        Absent = 3, "absent";
    }
}

/// Layers in one message, at most: 4 bytes each.
pub const LAYER_ROWS: usize = 50;

/// One layer as seen on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerRow {
    /// Which.
    pub name: LayerName,
    /// What was seen.
    pub state: LayerState,
    /// The errno of the attempt, 0 where it held.
    pub errno: u16,
}
