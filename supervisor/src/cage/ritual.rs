//! The ritual, in order, as pid 1 of the new namespaces performs it. The order is decisive: mounts before
//! the user namespace (they stay the host's), ids before PDEATHSIG (which a change of ids clears), Landlock
//! after the last mount (a Landlocked task may not mount), seccomp last. Steps that the plan does not have are
//! left out; the order is the same on every host.
//! Nothing here may go on after a refusal: the step and the errno are said, and the cage ends.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use gaoler_protocol::{OPTIONS_BYTES_MAX, Rules, Section, sections};
use gaoler_sys::{memfd, mount as mounts, process};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};

use super::word::{Step, Word, say};
use super::{Blueprint, Command, Common, Ends, init, worker};
use crate::plan::{Ids, Root};
use crate::template::{self, INSIDE};
use crate::uids::{become_ids, become_uid};

/// The proxy's port, where the network is the cage's own.
const PROXY: u16 = 3128;

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
    /// There are MCP servers.
    pub mcp: bool,
    /// There is a transcript to resume.
    pub resume: bool,
    /// The proxy's port, where there is one.
    pub proxy: Option<u16>,
}

/// Performs the ritual, becomes pid 1 of the cage, and never returns.
pub(super) fn perform(common: &Common, blueprint: &Blueprint, tasks: &[BorrowedFd<'_>], ends: Ends) -> ! {
    let begun = enter(common, blueprint, tasks, &ends).and_then(|(proxy, bounds)| {
        let wishes = Wishes { proxy, ..leave(common, blueprint, bounds)? };
        worker::begin(common, blueprint, &wishes, &ends)
    });
    match begun {
        Ok(command) => init::watch(common, &command, ends),
        Err(Failure(step, errno)) => {
            let _ = say(&ends.line, Word::Failed(step as u8, errno as u16), &[]);
            process::exit(125)
        }
    }
}

/// Steps 1 to 10, with all the rights that the supervisor has; the proxy's port.
fn enter(
    common: &Common,
    blueprint: &Blueprint,
    tasks: &[BorrowedFd<'_>],
    ends: &Ends,
) -> Result<(Option<u16>, Option<OwnedFd>), Failure> {
    let (plan, mut bounds) = (&common.plan, None);
    process::close_all_but(&kept(common, blueprint, tasks, ends)).at(Step::Descriptors)?;
    for group in tasks {
        nix::unistd::write(group, b"0").at(Step::Cgroup)?;
    }
    if plan.cgroup_namespace {
        unshare(CloneFlags::CLONE_NEWCGROUP).at(Step::CgroupNamespace)?;
    }
    match &blueprint.ahead {
        Some([_, network]) => setns(network, CloneFlags::CLONE_NEWNET).at(Step::Network)?,
        // Some hosts have it up already and refuse to be asked: the listeners below show whether it is.
        None if plan.network => drop(process::loopback_up()),
        None => {}
    }
    if plan.namespaces & libc::CLONE_NEWUTS != 0 {
        nix::unistd::sethostname("cage").at(Step::HostName)?;
    }
    match plan.root {
        Root::Own => {
            temporary(blueprint).at(Step::Temporary)?;
            bounds = proc(common).at(Step::Proc)?;
        }
        Root::Covered => {
            common.covers.iter().try_for_each(|covers| covers.put()).at(Step::Temporary)?;
            temporary(blueprint).at(Step::Temporary)?;
            bounds = proc(common).at(Step::Proc)?;
        }
        Root::Host => {}
    }
    folders(common, blueprint).at(Step::Workspace)?;

    if !blueprint.egress {
        return Ok((None, bounds));
    }
    let path = blueprint.places.door();
    let door = UnixListener::bind(&path).at(Step::Listener)?;
    let mode = if plan.root == Root::Host { 0o600 } else { 0o666 };
    fs::set_permissions(&path, Permissions::from_mode(mode)).at(Step::Listener)?;
    give(&path, blueprint.uid).at(Step::Listener)?;
    let proxy = match (blueprint.proxy, plan.network) {
        (false, _) => None,
        (true, own) => {
            Some(TcpListener::bind(("127.0.0.1", if own { PROXY } else { 0 })).at(Step::Listener)?)
        }
    };
    let port = proxy.as_ref().map(|it| it.local_addr().map(|at| at.port())).transpose();
    let listeners: Vec<_> =
        [Some(door.as_fd()), proxy.as_ref().map(AsFd::as_fd)].into_iter().flatten().collect();
    say(&ends.line, Word::Listener, &listeners).at(Step::Listener)?;
    Ok((port.at(Step::Listener)?, bounds))
}

/// The run's own file systems, each of a size.
fn temporary(blueprint: &Blueprint) -> nix::Result<()> {
    let (uid, mib, places) = (blueprint.uid, blueprint.limits.tmp_mib, &blueprint.places);
    tmpfs(&places.tmp, uid, mib, MsFlags::empty())?;
    tmpfs(Path::new("/dev/shm"), uid, mib, MsFlags::MS_NOEXEC)?;
    tmpfs(&places.home, uid, mib, MsFlags::empty())?;
    // The options are copied here and into the home.
    tmpfs(&places.run, uid, (OPTIONS_BYTES_MAX >> 20) as u32 + 1, MsFlags::MS_NOEXEC)
}

/// The cage's own /proc, as the level shows it, and where a user namespace comes later the folder of its bounds.
fn proc(common: &Common) -> nix::Result<Option<OwnedFd>> {
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let proc = |options| mount(Some("proc"), "/proc", Some("proc"), hardened, Some(options));
    let subset = common.proc_options.contains("subset=pid");
    // A subset has no /proc/sys, which a later step needs: that is opened below the one that the run sees.
    proc(if subset { "" } else { common.proc_options })?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let bounds =
        common.plan.ahead.then(|| nix::fcntl::open("/proc/sys/user", flags, Mode::empty())).transpose()?;
    if subset {
        proc(common.proc_options)?;
    } else {
        cover(Path::new("/proc/locks"))?;
    }
    Ok(bounds)
}

/// Puts an empty file over one of the cage's own /proc, where there is one: the host's locks are everybody's.
fn cover(path: &Path) -> nix::Result<()> {
    let none: Option<&str> = None;
    match mount(Some(template::EMPTY), path, none, MsFlags::MS_BIND, none) {
        Err(Errno::ENOENT) => Ok(()),
        covered => covered,
    }
}

/// The workspace and the session's folder.
fn folders(common: &Common, blueprint: &Blueprint) -> std::io::Result<()> {
    let (uid, places) = (blueprint.uid, &blueprint.places);
    let mine = |path: &Path| {
        DirBuilder::new().mode(0o700).create(path)?;
        give(path, uid)
    };
    match (&blueprint.workspace, common.plan.root) {
        (Some(tree), _) => mounts::attach(tree.as_fd(), c"/workspace")?,
        (None, Root::Own) => tmpfs(&places.workspace, uid, blueprint.limits.tmp_mib, MsFlags::empty())?,
        // A tenant's is there already; one that dies with the run lies in the run's own folder.
        (None, _) if places.workspace.starts_with(&places.home) => mine(&places.workspace)?,
        (None, _) => {}
    }
    let session = places.session();
    let projects = session.parent().unwrap_or(&session);
    if blueprint.session.is_some() || blueprint.session_path.is_some() {
        mine(&places.home.join(".claude"))?;
        mine(projects)?;
    }
    if let Some(tree) = &blueprint.session {
        mine(&session)?;
        mounts::attach(tree.as_fd(), c"/home/agent/.claude/projects/-workspace")?;
    }
    match &blueprint.session_path {
        Some(path) => symlink(path, &session),
        None => Ok(()),
    }
}

fn give(path: &Path, uid: u32) -> std::io::Result<()> {
    Ok(nix::unistd::chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))?)
}

/// Steps 11 to 14: from root to nobody, and only then the first look at a tenant's bytes. `bounds` is
/// /proc/sys/user.
fn leave(common: &Common, blueprint: &Blueprint, bounds: Option<OwnedFd>) -> Result<Wishes, Failure> {
    let mut uid = blueprint.uid;
    if common.plan.bounds() && blueprint.ahead.is_none() {
        // It takes a capability, which the change of ids takes away.
        process::empty_bounding_set().at(Step::Ids)?;
    }
    if let Some([user, _]) = &blueprint.ahead {
        setns(user, CloneFlags::CLONE_NEWUSER).at(Step::UserNamespace)?;
        // Inside the namespace we hold CAP_SYS_RESOURCE for a moment: nobody below may make another.
        let bounds = bounds.ok_or(Failure(Step::UserNamespace, libc::ENOENT))?;
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let namespaces = openat(&bounds, "max_user_namespaces", flags, Mode::empty());
        nix::unistd::write(namespaces.at(Step::UserNamespace)?, b"0").at(Step::UserNamespace)?;
        uid = INSIDE;
    }
    if blueprint.ahead.is_some() || common.plan.ids != Ids::Same {
        // An ordinary user's namespace has no other groups to drop, and may not.
        if common.plan.inside { become_ids(uid) } else { become_uid(uid) }.at(Step::Ids)?;
    }
    process::die_with_parent().at(Step::Privileges)?;
    process::not_dumpable().at(Step::Privileges)?;
    if blueprint.ahead.is_some() {
        process::empty_bounding_set().at(Step::Privileges)?;
    }
    if !common.plan.has_pids() {
        process::adopt_orphans().at(Step::Privileges)?;
    }
    process::drop_permitted().at(Step::Privileges)?;
    process::no_new_privs().at(Step::Privileges)?;
    let workspace = &blueprint.places.workspace;
    // A run before this one may have taken its own folder's mode away: the owner gives it back, or no run of
    // this tenant would ever start again.
    fs::set_permissions(workspace, Permissions::from_mode(0o700)).at(Step::Privileges)?;
    nix::unistd::chdir(workspace).at(Step::Privileges)?;
    let options = blueprint.options.try_clone().at(Step::Options)?;
    let bytes = memfd::read(options, OPTIONS_BYTES_MAX).at(Step::Options)?;
    unpack(common, blueprint, &bytes).at(Step::Options)
}

/// Copies the options into files at constant paths.
fn unpack(common: &Common, blueprint: &Blueprint, bytes: &[u8]) -> std::io::Result<Wishes> {
    let mut wishes = Wishes { argv: Vec::new(), system: false, mcp: false, resume: false, proxy: None };
    let places = &blueprint.places;
    let folder = places.session();
    let session = match &blueprint.command {
        Command::Cli(invocation) => Some(folder.join(format!("{}.jsonl", invocation.session))),
        Command::Exec | Command::Files(_) => None,
    };
    for (section, body) in sections(bytes).map_err(std::io::Error::other)? {
        match section {
            Section::System => {
                write(&places.system(), 0o400, body)?;
                wishes.system = true;
            }
            Section::Mcp => {
                write(&places.mcp(), 0o400, body)?;
                wishes.mcp = true;
            }
            Section::Transcript => {
                if let Some(path) = &session {
                    DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
                    write(path, 0o600, body)?;
                }
            }
            Section::Argv => {
                let words = body.strip_suffix(b"\0").unwrap_or(body).split(|&b| b == 0);
                wishes.argv = words.map(<[u8]>::to_vec).collect();
            }
        }
    }
    // A session that was begun before is resumed; one whose first run wrote nothing is begun again. What its agent put in
    // the transcript's place is none: the CLI would wait at a pipe, write through a link, or die of a folder.
    let found = session.and_then(|path| fs::symlink_metadata(path).ok());
    if found.as_ref().is_some_and(|found| !found.is_file()) {
        return Err(Errno::EISDIR.into());
    }
    wishes.resume = found.is_some_and(|found| found.len() > 0);
    if let Command::Cli(invocation) = &blueprint.command
        && invocation.proof
    {
        plant(&places.workspace)?;
        if let (Rules::Directory, Some(beside)) = (common.plan.rules, places.workspace.parent()) {
            write(&beside.join("outside-canary.txt"), 0o600, b"CANARY-OUTSIDE\n")?;
        }
    }
    Ok(wishes)
}

/// The workspace of a self-test: everything that would act if the CLI heeded it.
fn plant(workspace: &Path) -> std::io::Result<()> {
    let at = workspace.display();
    DirBuilder::new().mode(0o700).create(workspace.join(".claude"))?;
    let settings = format!(
        r#"{{"env":{{"ANTHROPIC_BASE_URL":"http://127.0.0.1:9"}},"hooks":{{"SessionStart":[{{"hooks":[{{"type":"command","command":"touch {at}/hooked-by-settings"}}]}}]}}}}"#
    );
    write(&workspace.join(".claude/settings.json"), 0o600, settings.as_bytes())?;
    let servers =
        format!(r#"{{"mcpServers":{{"planted":{{"command":"touch","args":["{at}/hooked-by-mcp"]}}}}}}"#);
    write(&workspace.join(".mcp.json"), 0o600, servers.as_bytes())?;
    write(&workspace.join("CLAUDE.md"), 0o600, b"CANARY-CLAUDE-MD\n")?;
    write(&workspace.join("attach-canary.txt"), 0o600, b"CANARY-ATTACHED\n")
}

fn write(path: &Path, mode: u32, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)
}

fn tmpfs(path: &Path, uid: u32, mib: u32, more: MsFlags) -> nix::Result<()> {
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
    keep.extend(blueprint.ahead.iter().flatten().map(owned));
    keep.extend([&blueprint.options].map(owned));
    keep.extend(blueprint.third.as_ref().map(owned));
    keep.extend(common.rules.base().iter().map(|(place, _)| place.as_raw_fd()));
    keep.extend(blueprint.workspace.as_ref().map(owned));
    keep.extend(blueprint.session.as_ref().map(owned));
    keep.extend([&ends.line, &ends.gate, &ends.stdin, &ends.stdout, &ends.stderr].map(owned));
    keep.sort_unstable();
    keep
}
