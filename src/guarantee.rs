//! What a tenant cares about, and which layers carry it.
//! It must never name a layer that does not carry its guarantee: doctor and /v1/security judge by this list.

use gaoler_protocol::LayerName::{self, *};

/// A promise to tenants.
#[derive(Debug, Clone, Copy)]
pub struct Guarantee {
    /// The word that users see.
    pub name: &'static str,
    /// The layers that carry it; all of them must be enforced. None: it is carried by the design (the broker),
    /// not by a mechanism of the kernel.
    pub layers: &'static [LayerName],
}

impl Guarantee {
    /// Every one, in the order of doctor's table.
    pub const ALL: &[Guarantee] = &[
        // No tenant can read or change another's files.
        Guarantee {
            name: "files_apart",
            layers: &[Uid, MountNamespace, PivotRoot, MountApi, IdMappedMounts, LandlockFiles],
        },
        // No tenant can see, signal or trace another's processes.
        Guarantee {
            name: "processes_apart",
            layers: &[Uid, PidNamespace, UserNamespace, IpcNamespace, Proc],
        },
        // No run reaches a network but through its egress.
        Guarantee { name: "network_apart", layers: &[NetworkNamespace, Seccomp] },
        // The kernel's surface is reduced to what the CLI needs.
        Guarantee {
            name: "kernel_surface_reduced",
            layers: &[Seccomp, NoNewPrivs, Capabilities, UserNamespace],
        },
        // A run cannot take more than its share.
        Guarantee {
            name: "resources_bounded",
            layers: &[CgroupMemory, CgroupTasks, CgroupCpu, TmpfsSize, Rlimits],
        },
        // The credential is never in the cage.
        Guarantee { name: "credential_absent", layers: &[] },
        // No process, file, mount or group of a run outlives it.
        Guarantee { name: "nothing_left_behind", layers: &[PidNamespace, MountNamespace, ParentDeath] },
    ];
}
