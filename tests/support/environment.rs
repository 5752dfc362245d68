//! Where the suites run and what that place promises: `tests/environments/suite` names it, and each test asks
//! here instead of assuming the kernel tier. It must never promise less than the tier's own page: a test that
//! asks for less would pass on a server that does less.

use std::path::PathBuf;

/// What a run sees of the host's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// A root of its own, with the workspace at /workspace.
    Own,
    /// The host's, with what is not the run's covered; the workspace is at its place in the state folder.
    Covered,
    /// The host's as it is.
    Host,
}

/// Whose uid a run has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// One of its own.
    Run,
    /// Its tenant's.
    Tenant,
    /// That of gaoler itself: all tenants have one.
    Same,
}

/// An environment and its promises.
#[derive(Debug, Clone, Copy)]
pub struct Environment {
    /// Its name, as tests/environments/run knows it.
    pub name: &'static str,
    /// The tier that gaoler must reach, and with which it is started as the minimum.
    pub tier: &'static str,
    /// What a run sees.
    pub root: Root,
    /// Under which ids.
    pub ids: Ids,
    /// Whether the agent may run commands. Where it may not, the CLI's file tools are all that it has.
    pub commands: bool,
    /// Whether whoever runs gaoler, and so these tests, sees tenants' files.
    pub sees: bool,
    /// Whether runs of different tenants run beside each other, where the operator does not say otherwise.
    pub together: bool,
    /// Whether runs have a network namespace of their own.
    pub network: bool,
    /// Whether runs have pids of their own.
    pub pids: bool,
    /// Whether limits are those of control groups.
    pub cgroups: bool,
    /// Whether /proc shows what the counts in traces.rs are made of (gVisor's has no locks, NSpid or mnt).
    pub full_proc: bool,
    /// Whether suites ask the real CLI unless they say otherwise, and not its double: on an emulated processor it
    /// takes most of a minute to start.
    pub real_cli: bool,
    /// Whether `ls` and `stat` of coreutils work: Debian's gVisor refuses a flag of statx(2) that they use.
    /// So does the `find` that the CLI puts in front of GNU's.
    pub lists: bool,
    /// Whether only one server may start at a time.
    pub one_start: bool,
    /// Whether tests are root.
    pub root_user: bool,
    /// How many times longer than elsewhere anything may take: for gVisor under ptrace, and an emulated processor.
    pub slower: u32,
}

const KERNEL: Environment = Environment {
    name: "kernel",
    tier: "kernel",
    root: Root::Own,
    ids: Ids::Run,
    commands: true,
    sees: true,
    together: true,
    network: true,
    pids: true,
    cgroups: true,
    full_proc: true,
    real_cli: true,
    lists: true,
    one_start: false,
    root_user: true,
    slower: 1,
};

/// Every environment of tests/environments/run.
pub const ALL: [Environment; 10] = [
    KERNEL,
    Environment { name: "vm", real_cli: false, slower: 10, ..KERNEL },
    Environment { name: "docker-kernel", ..KERNEL },
    Environment { name: "docker-old", tier: "namespaces", root: Root::Covered, ids: Ids::Tenant, ..KERNEL },
    Environment {
        name: "user",
        tier: "namespaces",
        ids: Ids::Same,
        cgroups: false,
        root_user: false,
        ..KERNEL
    },
    Environment {
        name: "user-ids",
        tier: "namespaces",
        ids: Ids::Tenant,
        sees: false,
        cgroups: false,
        root_user: false,
        ..KERNEL
    },
    Environment {
        name: "docker-root",
        tier: "uid",
        root: Root::Host,
        ids: Ids::Tenant,
        network: false,
        pids: false,
        cgroups: false,
        ..KERNEL
    },
    Environment {
        name: "docker-user",
        tier: "directory",
        root: Root::Host,
        ids: Ids::Same,
        together: false,
        network: false,
        pids: false,
        cgroups: false,
        root_user: false,
        ..KERNEL
    },
    Environment {
        name: "gvisor-root",
        tier: "uid",
        // It makes mount namespaces that isolate nothing.
        root: Root::Host,
        ids: Ids::Tenant,
        cgroups: false,
        full_proc: false,
        lists: false,
        one_start: true,
        slower: 3,
        ..KERNEL
    },
    Environment {
        name: "gvisor-user",
        tier: "directory",
        root: Root::Host,
        ids: Ids::Same,
        commands: false,
        sees: true,
        together: false,
        network: true,
        pids: true,
        cgroups: false,
        full_proc: false,
        real_cli: true,
        lists: false,
        one_start: true,
        root_user: false,
        slower: 3,
    },
];

/// The one that this test runs in; `kernel` where nobody says.
pub fn environment() -> Environment {
    let name = std::env::var("GAOLER_TEST_ENVIRONMENT").unwrap_or_else(|_| "kernel".into());
    let found = ALL.into_iter().find(|environment| environment.name == name);
    let environment = found.unwrap_or_else(|| panic!("GAOLER_TEST_ENVIRONMENT={name} is no environment"));
    // A suite that runs elsewhere than it believes would test nothing.
    assert_eq!(nix::unistd::geteuid().is_root(), environment.root_user, "{name}: another user was expected");
    environment
}

impl Environment {
    /// The command that prints the names in the current folder, one a line.
    pub fn list(&self) -> &'static str {
        if self.lists { "ls -A" } else { "/usr/bin/find . -mindepth 1 -maxdepth 1 -printf '%P\\n' | sort" }
    }

    /// The agent's uid as itself sees it, where that is not the host's matter.
    pub fn agent(&self) -> Option<u32> {
        (self.root == Root::Own).then_some(1000)
    }

    /// Where a run's workspace is for itself; `None` where that is its tenant's folder in the state.
    pub fn workspace(&self) -> Option<PathBuf> {
        (self.root == Root::Own).then(|| PathBuf::from("/workspace"))
    }
}

/// The folder with the programs, the CLI and its double, where a suite does not run in the tree that it was
/// built in.
pub fn kit() -> Option<PathBuf> {
    std::env::var_os("GAOLER_TEST_KIT").map(PathBuf::from)
}
