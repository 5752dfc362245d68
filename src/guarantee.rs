//! What a tenant cares about, and which layers carry it on a host.
//! It must never name a layer that does not carry its guarantee: doctor and /v1/security judge by this list.

use gaoler_protocol::LayerName::{self, *};
use gaoler_protocol::{LayerState, Layers};

/// A promise to tenants.
#[derive(Debug, Clone, Copy)]
pub struct Guarantee {
    /// The word that users see.
    pub name: &'static str,
    /// What it means.
    pub means: &'static str,
    /// How it can be carried, strongest first.
    ways: &'static [Way],
}

/// One way to carry a guarantee.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// The layers that carry it, all of them. None: it is carried by the design, not by a mechanism of the kernel.
    pub layers: &'static [LayerName],
    /// How much of it is carried.
    pub strength: Strength,
    /// How, in a few words; where it is a part, what is missing.
    pub how: &'static str,
}

/// How much of a guarantee a host carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strength {
    /// All of it.
    Full,
    /// A part.
    Part,
    /// Nothing.
    Nothing,
}

impl Strength {
    /// The word of tables.
    pub const fn word(self) -> &'static str {
        match self {
            Strength::Full => "yes",
            Strength::Part => "partly",
            Strength::Nothing => "no",
        }
    }
}

const fn full(layers: &'static [LayerName], how: &'static str) -> Way {
    Way { layers, strength: Strength::Full, how }
}

const fn part(layers: &'static [LayerName], how: &'static str) -> Way {
    Way { layers, strength: Strength::Part, how }
}

impl Guarantee {
    /// Every one, in the order of doctor's table.
    pub const ALL: &[Guarantee] = &[
        Guarantee {
            name: "files_apart",
            means: "no tenant can read or change another's files",
            ways: &[
                full(
                    &[Uid, MountNamespace, PivotRoot, MountApi, IdMappedMounts, LandlockFiles],
                    "a root and a uid of each run's own, and Landlock",
                ),
                full(
                    &[MountNamespace, PivotRoot, MountApi],
                    "a root of each run's own, in which nobody else's files have a name",
                ),
                full(&[Uid, LandlockFiles], "a uid of each tenant's own, and Landlock"),
                full(
                    &[Uid],
                    "a uid of each tenant's own; files that the host lets everybody read can be read",
                ),
                full(&[LandlockFiles, ProcessShield], "Landlock alone: all runs have one uid"),
                part(
                    &[],
                    "the CLI's own rules: its file tools stay in the workspace, and there are no commands",
                ),
            ],
        },
        Guarantee {
            name: "processes_apart",
            means: "no tenant can see, signal or trace another's processes",
            ways: &[
                full(
                    &[Uid, PidNamespace, UserNamespace, IpcNamespace, Proc],
                    "a uid and a pid namespace of each run's own",
                ),
                full(&[PidNamespace, IpcNamespace, Proc], "a pid namespace of each run's own"),
                part(
                    &[ProcessShield],
                    "no signal and no trace; but names and command lines of others can be listed",
                ),
                part(&[PidNamespace], "no signal; but what the host's /proc shows of others can be read"),
            ],
        },
        Guarantee {
            name: "network_apart",
            means: "no run reaches a network but through its egress",
            ways: &[
                full(&[NetworkNamespace, Seccomp], "a network of each run's own, with nothing in it"),
                full(
                    &[LandlockTcp, Seccomp],
                    "Landlock names the one TCP port, seccomp refuses every other kind of socket",
                ),
                full(&[Seccomp], "seccomp refuses all sockets but unix ones"),
            ],
        },
        Guarantee {
            name: "kernel_surface_reduced",
            means: "a run can make the system calls that the CLI needs, without a privilege",
            ways: &[
                full(
                    &[Seccomp, NoNewPrivs, Capabilities, UserNamespace],
                    "a filter, and no capability in any namespace",
                ),
                full(&[Seccomp, NoNewPrivs, Capabilities], "a filter, and no capability"),
            ],
        },
        Guarantee {
            name: "resources_bounded",
            means: "a run cannot take more than its share",
            ways: &[
                full(
                    &[CgroupMemory, CgroupTasks, CgroupCpu, TmpfsSize, Rlimits],
                    "a control group, sized file systems and rlimits; the disk and the number of sockets by a watchdog",
                ),
                part(
                    &[Rlimits],
                    "rlimits and a watchdog, which sees a run that takes too much a quarter of a second later; CPU is shared by the kernel's choice, and what sockets and pipes hold is bounded by their number and size",
                ),
            ],
        },
        Guarantee {
            name: "credential_absent",
            means: "the credential is never in the cage",
            ways: &[full(&[], "the broker: the token never enters a cage")],
        },
        Guarantee {
            name: "nothing_left_behind",
            means: "no process, file, mount or group of a run outlives it",
            ways: &[
                full(
                    &[PidNamespace, MountNamespace, ParentDeath],
                    "the end of its pid 1 is everybody's, and its file systems go with it",
                ),
                full(
                    &[PidNamespace, ParentDeath],
                    "the end of its pid 1 is everybody's, and its folders are wiped",
                ),
                full(&[ParentDeath], "what descends from it is found and ended, and its folders are wiped"),
            ],
        },
    ];

    /// The way in which this host carries it, and how much of it; without one nothing does.
    pub fn carried(&self, layers: &Layers) -> Option<&'static Way> {
        // Degraded layers carry: what an ordinary user has inside a user namespace holds there.
        let holds = |name: &LayerName| {
            layers.rows.iter().any(|row| row.name == *name && row.state <= LayerState::Degraded)
        };
        self.ways.iter().find(|way| way.layers.iter().all(holds))
    }

    /// How much of it this host carries.
    pub fn strength(&self, layers: &Layers) -> Strength {
        self.carried(layers).map_or(Strength::Nothing, |way| way.strength)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_protocol::{LayerRow, Rows, Tier};

    /// The hosts that the suites run on, by the snapshots of what doctor says there: a name for each column.
    const HOSTS: [(&str, &str, &str); 7] = [
        ("kernel", "kernel", "root on a machine"),
        ("user", "namespaces", "an ordinary user on it"),
        ("user-ids", "namespaces", "such a user, with ids that the host lends"),
        ("docker-root", "uid", "root in Docker's default container"),
        ("gvisor-root", "uid", "root in gVisor of 2022"),
        ("docker-user", "directory", "an ordinary user in the container"),
        ("gvisor-user", "directory", "an ordinary user in gVisor"),
    ];
    const BEGIN: &str = "<!-- guarantees: generated, see src/guarantee.rs -->\n";
    const END: &str = "<!-- end of guarantees -->\n";

    fn layers(host: &str) -> Layers {
        let path = format!("{}/tests/environments/snapshots/{host}.txt", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let mut tier = None;
        let mut rows = Vec::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["tier:", name, ..] => tier = Tier::from_name(name.trim_end_matches(',')),
                [name, state, ..] => {
                    let state = LayerState::ALL.iter().copied().find(|it| it.name() == state);
                    if let (Some(name), Some(state)) = (LayerName::from_name(name), state)
                        && !rows.iter().any(|row: &LayerRow| row.name == name)
                    {
                        rows.push(LayerRow { name, state, errno: 0 });
                    }
                }
                _ => {}
            }
        }
        assert_eq!(
            rows.len(),
            LayerName::ALL.len(),
            "{host}: bless the snapshots anew (tests/environments/matrix)"
        );
        let tier = tier.unwrap_or_else(|| panic!("{host}: no tier"));
        Layers { tier, landlock_abi: 0, cgroup: 0, rows: Rows::new(rows) }
    }

    fn table() -> String {
        let hosts = HOSTS.map(|(file, tier, words)| (layers(file), tier, words));
        let mut out = String::from("| guarantee |");
        for (_, tier, words) in &hosts {
            out += &format!(" {tier}: {words} |");
        }
        out += "\n|---|";
        out += &"---|".repeat(hosts.len());
        out.push('\n');
        let mut notes: Vec<&str> = Vec::new();
        for guarantee in Guarantee::ALL {
            out += &format!("| `{}`: {} |", guarantee.name, guarantee.means);
            for (layers, ..) in &hosts {
                let note = guarantee.carried(layers).map_or("nothing carries it", |way| way.how);
                let number = notes.iter().position(|known| *known == note).unwrap_or_else(|| {
                    notes.push(note);
                    notes.len() - 1
                });
                out += &format!(" {} ({}) |", guarantee.strength(layers).word(), number + 1);
            }
            out.push('\n');
        }
        out.push('\n');
        for (number, note) in notes.iter().enumerate() {
            out += &format!("{}. {note}\n", number + 1);
        }
        out
    }

    #[test]
    fn the_table_of_guarantees_is_what_the_code_derives() {
        for (file, tier, _) in HOSTS {
            assert_eq!(layers(file).tier.name(), tier, "{file}");
        }
        let path = format!("{}/SECURITY.md", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).expect("SECURITY.md");
        let (before, rest) = text.split_once(BEGIN).expect("the mark where it begins");
        let (written, after) = rest.split_once(END).expect("the mark where it ends");
        if std::env::var_os("GAOLER_TEST_BLESS").is_some() {
            std::fs::write(&path, format!("{before}{BEGIN}{}{END}{after}", table())).expect("written");
        } else {
            assert_eq!(written, table(), "if this is meant: GAOLER_TEST_BLESS=1 cargo test guarantees");
        }
    }

    #[test]
    fn a_way_is_never_stronger_than_those_before_it() {
        for guarantee in Guarantee::ALL {
            let strengths: Vec<_> = guarantee.ways.iter().map(|way| way.strength).collect();
            let falls =
                strengths.windows(2).all(|pair| pair[0] == Strength::Full || pair[1] == Strength::Part);
            assert!(falls, "{}", guarantee.name);
        }
        let nothing = Layers { tier: Tier::Directory, landlock_abi: 0, cgroup: 0, rows: Rows::new([]) };
        let held = |name: &str| {
            let found = Guarantee::ALL.iter().find(|it| it.name == name).expect("one");
            found.strength(&nothing)
        };
        assert_eq!(held("processes_apart"), Strength::Nothing);
        assert_eq!(held("files_apart"), Strength::Part);
        assert_eq!(held("credential_absent"), Strength::Full);
    }
}
