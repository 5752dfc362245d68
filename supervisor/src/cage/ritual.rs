//! The ritual, in order, as pid 1 of the new namespaces performs it. The order is decisive: mounts before
//! the user namespace (they stay the host's), ids before PDEATHSIG (which a change of ids clears), Landlock
//! after the last mount (a Landlocked task may not mount), seccomp last.
//! Nothing here may go on after a refusal: the step and the errno are said, and the cage ends.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;

use gaoler_protocol::{OPTIONS_BYTES_MAX, Section, sections};
use gaoler_sys::{memfd, mount as mounts, process};
use nix::fcntl::{OFlag, openat};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::word::{Step, Word, say};
use super::{Blueprint, Command, Common, Ends, init, worker};
use crate::template::INSIDE;

/// Where the CLI reads and writes its transcript: its home, and its working directory with every character
/// that is not alphanumeric turned into a dash.
const SESSION: &str = "/home/agent/.claude/projects/-workspace";
/// The broker's door.
const DOOR: &str = "/run/gaoler/api.sock";
/// Text for the system prompt.
const SYSTEM: &str = "/run/gaoler/system.md";

/// A step that failed. Anything that is no error of the kernel's counts as EINVAL.
pub(super) struct Failure(pub Step, pub i32);

pub(super) trait At<T> {
    fn at(self, step: Step) -> Result<T, Failure>;
}

impl<T, E: Into<std::io::Error>> At<T> for Result<T, E> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.map_err(|error| Failure(step, error.into().raw_os_error().unwrap_or(libc::EINVAL)))
    }
}

/// What the options said, read by a process without privileges.
pub(super) struct Wishes {
    /// The words of an exec run.
    pub argv: Vec<Vec<u8>>,
    /// There is text for the system prompt.
    pub system: bool,
    /// There is a transcript to resume.
    pub resume: bool,
}

/// Performs the ritual, becomes pid 1 of the cage, and never returns.
pub(super) fn perform(common: &Common, blueprint: &Blueprint, tasks: &[BorrowedFd<'_>], ends: Ends) -> ! {
    let begun = enter(common, blueprint, tasks, &ends)
        .and_then(|bounds| leave(blueprint, bounds))
        .and_then(|wishes| worker::fork(common, blueprint, &wishes, &ends));
    match begun {
        Ok(command) => init::watch(common, &command, ends),
        Err(Failure(step, errno)) => {
            let _ = say(&ends.line, Word::Failed(step as u8, errno as u16), &[]);
            process::exit(125)
        }
    }
}

/// Steps 1 to 10, as the host's root.
fn enter(
    common: &Common,
    blueprint: &Blueprint,
    tasks: &[BorrowedFd<'_>],
    ends: &Ends,
) -> Result<OwnedFd, Failure> {
    process::close_all_but(&kept(common, blueprint, tasks, ends)).at(Step::Descriptors)?;
    for group in tasks {
        nix::unistd::write(group, b"0").at(Step::Cgroup)?;
    }
    unshare(CloneFlags::CLONE_NEWCGROUP).at(Step::CgroupNamespace)?;
    setns(&blueprint.network_namespace, CloneFlags::CLONE_NEWNET).at(Step::Network)?;
    nix::unistd::sethostname("cage").at(Step::HostName)?;

    let (uid, mib) = (blueprint.uid, blueprint.limits.tmp_mib);
    tmpfs("/tmp", uid, mib, MsFlags::empty()).at(Step::Temporary)?;
    tmpfs("/dev/shm", uid, mib, MsFlags::MS_NOEXEC).at(Step::Temporary)?;
    tmpfs("/home/agent", uid, mib, MsFlags::empty()).at(Step::Temporary)?;
    // The options are copied here and into the home.
    tmpfs("/run/gaoler", uid, (OPTIONS_BYTES_MAX >> 20) as u32 + 1, MsFlags::MS_NOEXEC)
        .at(Step::Temporary)?;
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let proc = |options| mount(Some("proc"), "/proc", Some("proc"), hardened, Some(options)).at(Step::Proc);
    let subset = common.proc_options.contains("subset=pid");
    // A subset has no /proc/sys, which a later step needs: that is opened below the one that the run sees.
    proc(if subset { "" } else { common.proc_options })?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let bounds = nix::fcntl::open("/proc/sys/user", flags, Mode::empty()).at(Step::Proc)?;
    if subset {
        proc(common.proc_options)?;
    }

    match &blueprint.workspace {
        Some(tree) => mounts::attach(tree.as_fd(), c"/workspace").at(Step::Workspace)?,
        None => tmpfs("/workspace", uid, mib, MsFlags::empty()).at(Step::Workspace)?,
    }
    if let Some(tree) = &blueprint.session {
        for folder in ["/home/agent/.claude", "/home/agent/.claude/projects", SESSION] {
            DirBuilder::new().mode(0o700).create(folder).at(Step::Workspace)?;
            nix::unistd::chown(folder, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))
                .at(Step::Workspace)?;
        }
        mounts::attach(tree.as_fd(), c"/home/agent/.claude/projects/-workspace").at(Step::Workspace)?;
    }

    if let Command::Cli(_) = blueprint.command {
        let door = UnixListener::bind(DOOR).at(Step::Listener)?;
        fs::set_permissions(DOOR, Permissions::from_mode(0o666)).at(Step::Listener)?;
        say(&ends.line, Word::Listener, &[door.as_fd()]).at(Step::Listener)?;
    }
    Ok(bounds)
}

/// Steps 11 to 14: from root to nobody, and only then the first look at a tenant's bytes. `bounds` is
/// /proc/sys/user.
fn leave(blueprint: &Blueprint, bounds: OwnedFd) -> Result<Wishes, Failure> {
    setns(&blueprint.user_namespace, CloneFlags::CLONE_NEWUSER).at(Step::UserNamespace)?;
    // Inside the namespace we hold CAP_SYS_RESOURCE for a moment: nobody below may make another.
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let namespaces = openat(&bounds, "max_user_namespaces", flags, Mode::empty()).at(Step::UserNamespace)?;
    nix::unistd::write(&namespaces, b"0").at(Step::UserNamespace)?;
    drop((namespaces, bounds));
    let (uid, gid) = (Uid::from_raw(INSIDE), Gid::from_raw(INSIDE));
    setgroups(&[]).at(Step::Ids)?;
    setresgid(gid, gid, gid).at(Step::Ids)?;
    setresuid(uid, uid, uid).at(Step::Ids)?;
    process::die_with_parent().at(Step::Privileges)?;
    process::not_dumpable().at(Step::Privileges)?;
    process::drop_capabilities().at(Step::Privileges)?;
    process::no_new_privs().at(Step::Privileges)?;
    // A run before this one may have taken its own folder's mode away: the owner gives it back, or no run of
    // this tenant would ever start again.
    fs::set_permissions("/workspace", Permissions::from_mode(0o700)).at(Step::Privileges)?;
    nix::unistd::chdir("/workspace").at(Step::Privileges)?;
    let options = blueprint.options.try_clone().at(Step::Options)?;
    let bytes = memfd::read(options, OPTIONS_BYTES_MAX).at(Step::Options)?;
    unpack(blueprint, &bytes).at(Step::Options)
}

/// Copies the options into files at constant paths.
fn unpack(blueprint: &Blueprint, bytes: &[u8]) -> std::io::Result<Wishes> {
    let mut wishes = Wishes { argv: Vec::new(), system: false, resume: false };
    let session = match &blueprint.command {
        Command::Cli(invocation) => Some(format!("{SESSION}/{}.jsonl", invocation.session)),
        Command::Exec => None,
    };
    for (section, body) in sections(bytes).map_err(std::io::Error::other)? {
        match section {
            Section::System => {
                write(SYSTEM, 0o400, body)?;
                wishes.system = true;
            }
            Section::Transcript => {
                if let Some(path) = &session {
                    DirBuilder::new().recursive(true).mode(0o700).create(SESSION)?;
                    write(path, 0o600, body)?;
                }
            }
            Section::Argv => {
                let words = body.strip_suffix(b"\0").unwrap_or(body).split(|&b| b == 0);
                wishes.argv = words.map(<[u8]>::to_vec).collect();
            }
        }
    }
    // A session that was begun before is resumed; one whose first run wrote nothing is begun again.
    wishes.resume = session.is_some_and(|path| fs::metadata(path).is_ok_and(|found| found.len() > 0));
    if let Command::Cli(invocation) = &blueprint.command
        && invocation.proof
    {
        plant()?;
    }
    Ok(wishes)
}

/// The workspace of a self-test: everything that would act if the CLI heeded it.
fn plant() -> std::io::Result<()> {
    DirBuilder::new().mode(0o700).create("/workspace/.claude")?;
    let settings = r#"{"env":{"ANTHROPIC_BASE_URL":"http://127.0.0.1:9"},"hooks":{"SessionStart":[{"hooks":[{"type":"command","command":"touch /workspace/hooked-by-settings"}]}]}}"#;
    write("/workspace/.claude/settings.json", 0o600, settings.as_bytes())?;
    let servers = r#"{"mcpServers":{"planted":{"command":"touch","args":["/workspace/hooked-by-mcp"]}}}"#;
    write("/workspace/.mcp.json", 0o600, servers.as_bytes())?;
    write("/workspace/CLAUDE.md", 0o600, b"CANARY-CLAUDE-MD\n")?;
    write("/workspace/attach-canary.txt", 0o600, b"CANARY-ATTACHED\n")
}

fn write(path: &str, mode: u32, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)
}

fn tmpfs(path: &str, uid: u32, mib: u32, more: MsFlags) -> nix::Result<()> {
    // One inode for every 4 KiB: as many files as the space could hold, and a bound on what they cost.
    let options = format!("mode=700,uid={uid},gid={uid},size={mib}m,nr_inodes={}", u64::from(mib) * 256);
    mount(
        Some("gaoler"),
        path,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | more,
        Some(options.as_str()),
    )
}

/// The descriptors that this cage needs, in ascending order.
fn kept(common: &Common, blueprint: &Blueprint, tasks: &[BorrowedFd<'_>], ends: &Ends) -> Vec<RawFd> {
    let mut keep: Vec<RawFd> = tasks.iter().map(AsRawFd::as_raw_fd).collect();
    let owned = |fd: &OwnedFd| fd.as_raw_fd();
    keep.extend([&blueprint.user_namespace, &blueprint.network_namespace, &blueprint.options].map(owned));
    keep.extend(common.rules.base().iter().map(|(place, _)| place.as_raw_fd()));
    keep.extend(blueprint.workspace.as_ref().map(owned));
    keep.extend(blueprint.session.as_ref().map(owned));
    keep.extend([&ends.line, &ends.gate, &ends.stdin, &ends.stdout, &ends.stderr].map(owned));
    keep.sort_unstable();
    keep
}
