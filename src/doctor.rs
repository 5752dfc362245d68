//! What this host offers, layer by layer, for people and for programs, and what would fix what is missing.
//! It must never call a layer enforced that the supervisor has not tried.

use std::fmt::Write;

use gaoler_protocol::{LayerName, LayerRow, LayerState, Layers};
use nix::errno::Errno;
use serde_json::{Value, json};

use crate::guarantee::{Guarantee, Strength};

/// The host as one JSON object, in the schema of doctor, reports and `/v1/security`.
pub fn json(layers: &Layers) -> Value {
    let guarantees: Vec<Value> = Guarantee::ALL
        .iter()
        .map(|guarantee| {
            let way = guarantee.carried(layers);
            let names = way.iter().flat_map(|way| way.layers).map(|layer| layer.name());
            json!({
                "name": guarantee.name,
                "held": guarantee.strength(layers).word(),
                "layers": names.collect::<Vec<_>>(),
                "how": way.map(|way| way.how),
                "means": guarantee.means,
            })
        })
        .collect();
    let rows: Vec<Value> = layers
        .rows
        .iter()
        .map(|row| {
            json!({
                "name": row.name.name(),
                "state": row.state.name(),
                "errno": errno(&row),
                "fix": fix(&row, layers),
            })
        })
        .collect();
    json!({
        "tier": layers.tier.name(),
        "guarantees": guarantees,
        "layers": rows,
        "landlock_abi": layers.landlock_abi,
        "cgroup": layers.cgroup,
    })
}

/// The host as a table: the tier, each layer, each guarantee, then one line for each thing to mend.
pub fn render_table(layers: &Layers, color: bool) -> String {
    let paint = |text: String, code: u8| match color {
        true => format!("\x1b[{code}m{text}\x1b[0m"),
        false => text,
    };
    let mut out = String::new();
    let mut line = |text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{}", text.trim_end());
    };
    line(format!("tier: {}", paint(layers.tier.name().to_string(), 1)));
    let cgroup = match layers.cgroup {
        0 => "no limits by cgroup".to_string(),
        version => format!("cgroup version {version}"),
    };
    line(format!("Landlock ABI {}, {cgroup}\n", layers.landlock_abi));
    line(format!("{:<24}{:<11}{}", "LAYER", "STATE", "ERRNO"));
    for row in layers.rows.iter() {
        let state = paint(format!("{:<11}", row.state.name()), shade(row.state));
        line(format!("{:<24}{state}{}", row.name.name(), errno(&row).unwrap_or_default()));
    }
    line(format!("\n{:<24}{:<11}{}", "GUARANTEE", "HELD", "BECAUSE OF"));
    for guarantee in Guarantee::ALL {
        let strength = guarantee.strength(layers);
        let code = match strength {
            Strength::Full => 32,
            Strength::Part => 33,
            Strength::Nothing => 31,
        };
        let because = guarantee.carried(layers).map_or("nothing carries it here", |way| way.how);
        line(format!("{:<24}{}{because}", guarantee.name, paint(format!("{:<11}", strength.word()), code)));
    }
    // One cause often takes several layers away, and one line mends them all.
    let mut fixes: Vec<(String, Vec<&str>)> = Vec::new();
    for row in layers.rows.iter() {
        let Some(text) = fix(&row, layers) else { continue };
        match fixes.iter_mut().find(|(known, _)| *known == text) {
            Some((_, names)) => names.push(row.name.name()),
            None => fixes.push((text, vec![row.name.name()])),
        }
    }
    if !fixes.is_empty() {
        line("\nTo mend:".to_string());
    }
    for (text, names) in fixes {
        line(format!("  {}\n    {text}", names.join(", ")));
    }
    out
}

fn shade(state: LayerState) -> u8 {
    match state {
        LayerState::Enforced => 32,
        LayerState::Degraded => 33,
        LayerState::Absent => 31,
    }
}

fn state(name: LayerName, layers: &Layers) -> LayerState {
    layers.rows.iter().find(|row| row.name == name).map_or(LayerState::Absent, |row| row.state)
}

/// The errno's name; `None` where the layer held, or was accepted and had no effect.
fn errno(row: &LayerRow) -> Option<String> {
    (row.errno != 0).then(|| match Errno::from_raw(row.errno.into()) {
        Errno::UnknownErrno => row.errno.to_string(),
        known => format!("{known:?}"),
    })
}

const AS_ROOT: &str = "start gaoler as root: sudo gaoler doctor, or a systemd unit without User=";
const IN_CONTAINER: &str = "give the container the right to make namespaces and mounts: docker run --cap-add SYS_ADMIN \
     --cap-add NET_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined \
     --security-opt systempaths=unconfined (podman: --security-opt unmask=ALL), or use a virtual machine";
const SANDBOXED_KERNEL: &str = "this kernel takes the call and ignores it (gVisor does so): use a virtual machine, or Cloud Run's \
     second generation (--execution-environment gen2)";
const PROFILE: &str =
    "or a container's system call profile hides it: docker run --security-opt seccomp=unconfined";

/// What a stranger can do about a layer, in one line; `None` where it holds.
pub fn fix(row: &LayerRow, layers: &Layers) -> Option<String> {
    use LayerName::*;
    if row.state == LayerState::Enforced {
        return None;
    }
    let errno = Errno::from_raw(row.errno.into());
    let refused = matches!(errno, Errno::EPERM | Errno::EACCES);
    // Root that may change its uid but not its namespaces sits in a container without CAP_SYS_ADMIN.
    let has_uids = state(Uid, layers) == LayerState::Enforced;
    let rights = if has_uids { IN_CONTAINER } else { AS_ROOT };
    let kernel =
        |version: &str, option: &str| format!("use Linux {version} or newer, built with {option}; {PROFILE}");
    let text = match (row.name, errno) {
        (_, Errno::ETIMEDOUT) => "the attempt took longer than 2 s: run doctor again when the machine is idle".into(),
        (CgroupMemory | CgroupTasks | CgroupCpu, errno) => cgroup_fix(errno),
        // Both take somebody else to be tried; and what is mapped for one uid alone is no map.
        (Hidepid, _) if row.errno == 0 && !has_uids => return uid_fix(layers),
        (PeerCredentials, _) if !has_uids => return uid_fix(layers),
        (IdMappedMounts, Errno::EINVAL) if !has_uids => AS_ROOT.into(),
        (_, _) if row.errno == 0 => SANDBOXED_KERNEL.into(),
        (UserNamespace, Errno::ENOSPC | Errno::EUSERS) => "sysctl -w user.max_user_namespaces=15000".into(),
        (UserNamespace, _) if refused && row.state == LayerState::Absent => {
            "allow user namespaces: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04; or an \
             AppArmor profile for gaoler-supervisor with the rule `userns,`), sysctl -w \
             kernel.unprivileged_userns_clone=1 (older Debian), docker run --security-opt seccomp=unconfined"
                .into()
        }
        (name, Errno::ENOSPC) if namespace(name).is_some() => {
            format!("sysctl -w user.max_{}_namespaces=15000", namespace(name).unwrap_or_default().0)
        }
        (name, Errno::EINVAL | Errno::ENOSYS) if namespace(name).is_some() => {
            kernel("5.10", namespace(name).unwrap_or_default().1)
        }
        (Uid, Errno::EINVAL) => {
            "an ordinary user has one uid: have the host lend it more (apt-get install uidmap; usermod --add-subuids \
             100000-165535 --add-subgids 100000-165535 USER, or another range that no line of /etc/subuid and /etc/subgid \
             has), or start gaoler as root (sudo gaoler doctor, or a systemd unit without User=), outside of a rootless \
             container"
                .into()
        }
        (IdMappedMounts, Errno::EINVAL) => {
            "put state.dir on a file system with id-mapped mounts (ext4, xfs, btrfs, tmpfs): gaoler serve --state DIR".into()
        }
        (Keyring, Errno::EDQUOT) => "sysctl -w kernel.keys.root_maxkeys=1000000 kernel.keys.maxkeys=20000".into(),
        (Keyring, Errno::ENOSYS) => kernel("5.10", "CONFIG_KEYS"),
        (ProcessShield, _) => {
            "nothing keeps a run from gaoler's own processes: use Linux 6.12 or newer with Landlock, or start gaoler as \
             root, so that runs have uids of their own"
                .into()
        }
        (PeerCredentials, _) => SANDBOXED_KERNEL.into(),
        (UserNamespace, Errno::EOPNOTSUPP) => SANDBOXED_KERNEL.into(),
        (Pidfd, _) => kernel("5.3", "nothing special"),
        (CloseRange, _) => kernel("5.9", "nothing special"),
        (Clone3, _) => kernel("5.3", "nothing special"),
        (Openat2, _) => kernel("5.6", "nothing special"),
        (MountApi | IdMappedMounts, Errno::ENOSYS) => kernel("5.12", "nothing special"),
        (LandlockFiles | LandlockTcp | LandlockIoctl | LandlockScopes, errno) => landlock_fix(row.name, errno, layers),
        (Seccomp, Errno::EINVAL | Errno::ENOSYS) => kernel("5.10", "CONFIG_SECCOMP_FILTER"),
        (Keyring | Seccomp | NoNewPrivs | MemfdSeals, _) if refused => {
            "a container's system call profile refuses it: docker run --security-opt seccomp=unconfined".into()
        }
        (_, _) if refused => rights.into(),
        (_, Errno::ENOSYS) => kernel("5.12", "namespaces, seccomp and Landlock"),
        (Proc | MountNamespace | PivotRoot | TmpfsSize, Errno::EINVAL) => SANDBOXED_KERNEL.into(),
        (name, errno) => format!("{name} failed with {errno:?}, which gaoler has not met before: please report it"),
    };
    Some(text)
}

/// What gives a run a uid of its own, for whatever cannot be tried without one.
fn uid_fix(layers: &Layers) -> Option<String> {
    layers.rows.iter().find(|row| row.name == LayerName::Uid).and_then(|uid| fix(&uid, layers))
}

/// The sysctl's word and the kernel's option of a namespace.
fn namespace(name: LayerName) -> Option<(&'static str, &'static str)> {
    match name {
        LayerName::UserNamespace => Some(("user", "CONFIG_USER_NS")),
        LayerName::PidNamespace | LayerName::Proc => Some(("pid", "CONFIG_PID_NS")),
        LayerName::MountNamespace | LayerName::PivotRoot | LayerName::TmpfsSize => {
            Some(("mnt", "CONFIG_NAMESPACES"))
        }
        LayerName::NetworkNamespace => Some(("net", "CONFIG_NET_NS")),
        LayerName::IpcNamespace => Some(("ipc", "CONFIG_IPC_NS")),
        LayerName::UtsNamespace => Some(("uts", "CONFIG_UTS_NS")),
        LayerName::CgroupNamespace => Some(("cgroup", "CONFIG_CGROUPS")),
        _ => None,
    }
}

fn cgroup_fix(errno: Errno) -> String {
    match errno {
        Errno::EROFS => {
            "the cgroup tree is read-only: docker run --cgroupns=private -v /sys/fs/cgroup:/sys/fs/cgroup:rw \
             --cap-add SYS_ADMIN"
        }
        Errno::EACCES | Errno::EPERM => {
            "start gaoler as root, or in a delegated group: systemd-run --property=Delegate=yes gaoler serve"
        }
        Errno::EBUSY | Errno::ENOTSUP => {
            "the group that gaoler starts in has other processes: Delegate=yes in its systemd unit, or start it alone in \
             a group of its own"
        }
        Errno::ENODATA => {
            "groups do not count all that a run takes: boot without cgroup.memory=nokmem or nosocket, and where the host has \
             swap with swapaccount=1, or turn swap off (swapoff -a)"
        }
        _ => {
            "no cgroup hierarchy with memory, pids and cpu is mounted: boot with systemd.unified_cgroup_hierarchy=1 \
             (and cgroup_enable=memory on a Raspberry Pi), or hand /sys/fs/cgroup to the container"
        }
    }
    .into()
}

fn landlock_fix(name: LayerName, errno: Errno, layers: &Layers) -> String {
    let version = match name {
        LayerName::LandlockTcp => "6.7",
        LayerName::LandlockIoctl => "6.10",
        LayerName::LandlockScopes => "6.12",
        _ => "5.19",
    };
    match (errno, layers.landlock_abi) {
        (Errno::EOPNOTSUPP, 0) => {
            "Landlock is built in but off: add landlock to lsm= on the kernel's command line, such as \
             lsm=landlock,lockdown,yama,integrity,apparmor (cat /sys/kernel/security/lsm shows today's list)"
                .into()
        }
        (Errno::EOPNOTSUPP, abi) => format!("use Linux {version} or newer: this one has Landlock ABI {abi}"),
        _ => format!("use Linux {version} or newer, built with CONFIG_SECURITY_LANDLOCK; {PROFILE}"),
    }
}

#[cfg(test)]
mod tests {
    use gaoler_protocol::{Rows, Tier};

    use super::*;

    fn host(tier: Tier, abi: u8, lost: &[(LayerName, LayerState, Errno)]) -> Layers {
        let rows = LayerName::ALL.iter().map(|&name| {
            let found = lost.iter().find(|(lost, _, _)| *lost == name);
            let (state, errno) =
                found.map_or((LayerState::Enforced, 0), |(_, state, errno)| (*state, *errno as u16));
            LayerRow { name, state, errno }
        });
        Layers { tier, landlock_abi: abi, cgroup: 2, rows: Rows::new(rows) }
    }

    fn fix_of(name: LayerName, layers: &Layers) -> Option<String> {
        layers.rows.iter().find(|row| row.name == name).and_then(|row| fix(&row, layers))
    }

    #[test]
    fn t01_a_whole_host_has_nothing_to_mend() {
        let whole = host(Tier::Kernel, 7, &[]);
        let value = json(&whole);
        assert_eq!(value["tier"], "kernel");
        assert_eq!(value["landlock_abi"], 7);
        assert_eq!(value["cgroup"], 2);
        assert_eq!(value["layers"].as_array().unwrap().len(), LayerName::ALL.len());
        for row in value["layers"].as_array().unwrap() {
            assert_eq!(row["state"], "enforced");
            assert!(row["errno"].is_null() && row["fix"].is_null(), "{row}");
        }
        for row in value["guarantees"].as_array().unwrap() {
            assert_eq!(row["held"], "yes", "{row}");
            assert!(row["layers"].is_array());
        }
        let table = render_table(&whole, false);
        assert!(!table.contains("mend") && !table.contains('\x1b') && table.contains("credential_absent"));
        assert!(table.lines().all(|line| line == line.trim_end()));
        assert!(render_table(&whole, true).contains("\x1b[32menforced"));
    }

    #[test]
    fn t02_a_lost_layer_loses_its_guarantees_and_names_its_errno() {
        let lost = host(Tier::Namespaces, 7, &[(LayerName::CgroupTasks, LayerState::Absent, Errno::EROFS)]);
        let value = json(&lost);
        let held = |name: &str| {
            let list = value["guarantees"].as_array().unwrap();
            list.iter().find(|row| row["name"] == name).unwrap()["held"].as_str().unwrap()
        };
        assert_eq!((held("resources_bounded"), held("files_apart")), ("partly", "yes"));
        let row =
            value["layers"].as_array().unwrap().iter().find(|row| row["name"] == "cgroup_tasks").unwrap();
        assert_eq!(row["errno"], "EROFS");
        assert!(row["fix"].as_str().unwrap().contains("/sys/fs/cgroup"));
    }

    #[test]
    fn t03_the_fix_fits_the_errno_and_the_host() {
        use LayerName::*;
        use LayerState::*;
        let check = |lost: &[(LayerName, LayerState, Errno)], abi: u8, part: &str| {
            let layers = host(Tier::Directory, abi, lost);
            let text = fix_of(lost[0].0, &layers).unwrap();
            assert!(text.contains(part), "{:?}: {text}", lost[0]);
            assert!(!text.contains('\n') && !text.contains("  "), "one line: {text:?}");
        };
        // An ordinary user has no right to another uid; root in a container does.
        check(
            &[(PidNamespace, Degraded, Errno::EPERM), (Uid, Absent, Errno::EPERM)],
            7,
            "sudo gaoler doctor",
        );
        check(&[(PidNamespace, Degraded, Errno::EPERM)], 7, "--cap-add SYS_ADMIN");
        check(&[(NetworkNamespace, Absent, Errno::ENOSPC)], 7, "user.max_net_namespaces");
        check(&[(UserNamespace, Absent, Errno::ENOSPC)], 7, "user.max_user_namespaces");
        check(&[(UserNamespace, Absent, Errno::EPERM)], 7, "apparmor_restrict_unprivileged_userns");
        check(&[(IpcNamespace, Absent, Errno::EINVAL)], 7, "CONFIG_IPC_NS");
        check(&[(Clone3, Absent, Errno::ENOSYS)], 7, "seccomp=unconfined");
        check(&[(MountApi, Absent, Errno::ENOSYS)], 7, "5.12");
        check(&[(IdMappedMounts, Absent, Errno::EINVAL)], 7, "--state");
        check(&[(Proc, Absent, Errno::EPERM)], 7, "systempaths=unconfined");
        check(&[(LandlockFiles, Absent, Errno::EOPNOTSUPP)], 0, "lsm=");
        check(&[(LandlockFiles, Absent, Errno::ENOSYS)], 0, "CONFIG_SECURITY_LANDLOCK");
        check(&[(LandlockScopes, Absent, Errno::EOPNOTSUPP)], 4, "Linux 6.12");
        check(&[(CgroupCpu, Absent, Errno::EACCES)], 7, "Delegate=yes");
        check(&[(CgroupCpu, Absent, Errno::ENOENT)], 7, "unified_cgroup_hierarchy");
        check(&[(CgroupMemory, Absent, Errno::ENODATA)], 7, "swapaccount=1");
        check(&[(Rlimits, Absent, Errno::from_raw(0))], 7, "gVisor");
        check(&[(Keyring, Absent, Errno::EDQUOT)], 7, "maxkeys");
        check(&[(Uid, Absent, Errno::ETIMEDOUT)], 7, "idle");
        check(&[(PeerCredentials, Absent, Errno::EPERM)], 7, "gVisor");
        check(&[(Hidepid, Absent, Errno::from_raw(0))], 7, "gVisor");
    }

    #[test]
    fn what_takes_a_second_uid_is_mended_by_a_loan_of_ids() {
        use LayerName::*;
        // As an ordinary user's host looks without newuidmap, or without a line in /etc/subuid.
        let one = |name, errno| (name, LayerState::Absent, errno);
        let loan = host(
            Tier::Namespaces,
            7,
            &[
                one(Uid, Errno::EINVAL),
                one(Hidepid, Errno::from_raw(0)),
                one(PeerCredentials, Errno::EPERM),
                one(IdMappedMounts, Errno::EINVAL),
            ],
        );
        let uid = fix_of(Uid, &loan).unwrap();
        assert!(uid.contains("uidmap") && uid.contains("usermod --add-subuids"), "{uid}");
        assert_eq!(fix_of(Hidepid, &loan), Some(uid.clone()));
        assert_eq!(fix_of(PeerCredentials, &loan), Some(uid));
        // A loan does not help there, and neither does another file system.
        assert_eq!(fix_of(IdMappedMounts, &loan).as_deref(), Some(AS_ROOT));
        let table = render_table(&loan, false);
        assert!(!table.contains("gVisor") && table.matches("--add-subuids").count() == 1, "{table}");
    }

    #[test]
    fn t04_every_layer_and_errno_has_a_fix_of_one_line() {
        for &name in LayerName::ALL {
            for errno in 0..134 {
                let row = LayerRow { name, state: LayerState::Absent, errno };
                let text = fix(&row, &host(Tier::Directory, 0, &[])).unwrap();
                assert!(!text.is_empty() && !text.contains('\n'), "{name} {errno}");
            }
        }
    }

    #[test]
    fn t05_one_cause_is_mended_by_one_line() {
        use LayerName::*;
        let lost: Vec<_> = [PidNamespace, MountNamespace, PivotRoot]
            .map(|name| (name, LayerState::Degraded, Errno::EPERM))
            .to_vec();
        let table = render_table(&host(Tier::Namespaces, 7, &lost), false);
        assert_eq!(table.matches("--cap-add SYS_ADMIN").count(), 1, "{table}");
        assert!(table.contains("  pid_namespace, mount_namespace, pivot_root\n"));
    }
}
