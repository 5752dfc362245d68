//! From start to the poll loop: everything that needs the host's root is opened here, before it is left.
//! It must never go on past a layer that the operator's minimum names and this host does not enforce.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use gaoler_policy::landlock::{AccessClass, CageRules};
use gaoler_policy::level::{LevelPolicy, VisibleAccess};
use gaoler_policy::process::Process;
use gaoler_policy::seccomp;
use gaoler_policy::settings::Settings;
use gaoler_protocol::{Layers, Level, Limits, Message, Tier};
use gaoler_sys::{channel, memfd, process};
use nix::fcntl::{OFlag, openat};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode as FileMode;

use crate::cage::Common;
use crate::cgroup::Cgroups;
use crate::fault::{Doing, Fault};
use crate::invocation;
use crate::monitor::{Monitor, Parts};
use crate::spawn::{self, Network};
use crate::tenants::Tenants;
use crate::uids::Uids;
use crate::{layers, template, tiers};

/// Bytes of settings, at most: a table of a few dozen short keys.
const SETTINGS_BYTES_MAX: usize = 64 * 1024;

/// What this supervisor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The HTTP server's.
    Serve,
    /// The command line's own, for commands.
    Exec,
    /// Only to look at the host.
    Doctor,
}

/// What was opened while the host's root was still there.
pub struct Host {
    /// What this supervisor is for.
    pub mode: Mode,
    /// The operator's settings.
    pub settings: Settings,
    /// The level in force.
    pub level: LevelBounds,
    /// The host's /proc.
    pub proc_fd: OwnedFd,
    /// The folder and name that /etc/resolv.conf really is: read anew for each egress, for it changes.
    resolver: Option<(OwnedFd, OsString)>,
    /// The egress program.
    pub egress: Option<OwnedFd>,
    /// The HTTP listener, until the frontend may have it.
    pub listener: Option<TcpListener>,
    /// Its address.
    pub address: String,
    /// Where egress forwards to.
    pub upstream_url: String,
    /// Where egress forwards to in the self-test.
    pub proving_url: String,
    /// The tenants' upstream is the embedded one.
    pub embedded: bool,
}

/// The level's policy with its limits at hand.
pub struct LevelBounds {
    /// The policy.
    pub policy: LevelPolicy,
    /// Its own limits.
    pub limits: Limits,
}

impl LevelBounds {
    /// A wish within the level's bounds.
    pub fn clamp(&self, wish: &Limits) -> Limits {
        self.policy.clamp(wish)
    }
}

impl Host {
    /// The host's resolv.conf as it is now; an empty file where there is none.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn resolver(&self) -> nix::Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let real = self.resolver.as_ref().and_then(|(folder, name)| {
            openat(folder, name.as_os_str(), flags | OFlag::O_NOFOLLOW, FileMode::empty()).ok()
        });
        real.map_or_else(|| nix::fcntl::open("/etc/resolv.conf", flags, FileMode::empty()), Ok)
    }
}

/// Boots in this mode and watches; the status to exit with.
///
/// # Errors
/// The first thing that this host refuses.
pub fn run(mode: Mode) -> Result<u8, Fault> {
    // SIGTERM and SIGINT are read from a descriptor; a terminal's Ctrl-C reaches every process of its group.
    let mut caught = SigSet::empty();
    caught.add(Signal::SIGTERM);
    caught.add(Signal::SIGINT);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&caught), None).doing("block signals")?;
    let signals = SignalFd::with_flags(&caught, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .doing("open a descriptor for signals")?;
    nix::sys::stat::umask(FileMode::from_bits_truncate(0o022));
    process::not_dumpable().doing("become untraceable")?;
    if !nix::unistd::geteuid().is_root() {
        return Err(Fault::new(
            "start",
            "the kernel tier needs root; run it with sudo or as a system service",
        ));
    }
    let settings = settings()?;
    crate::log::decisions(mode == Mode::Serve);
    let control = match mode {
        Mode::Serve => None,
        Mode::Exec | Mode::Doctor => {
            let control = channel::inherited_control();
            Some(control.ok_or_else(|| Fault::new("take the control socket", "descriptor 3 is none"))?)
        }
    };

    let state = state(&settings.state.dir)?;
    let uids_file = settings.state.dir.join("uids");
    let mut uids = Uids::open(&uids_file, settings.uids.run).doing("open the state's uids")?;
    // Held while it is tried, so that no other supervisor's run has it.
    let tried = uids.take().ok_or_else(|| Fault::new("take a run's uid", "the range is used up"))?;
    let layers = layers::probe(state.as_fd(), uids.uid(&tried));
    uids.release(tried);
    if mode == Mode::Doctor {
        let control = control.ok_or_else(|| Fault::new("report", "no control socket"))?;
        channel::send(control.as_fd(), &Message::Layers(layers).encode(1), &[]).doing("report")?;
        return Ok(0);
    }
    refuse_below(&settings, &layers)?;

    let level = LevelPolicy::of(Level::Balanced).map_err(|why| Fault::new("read the level's policy", why))?;
    let level = LevelBounds { limits: level.limits(), policy: level };
    let proc_fd = folder("/proc")?;
    let resolver = fs::canonicalize("/etc/resolv.conf")
        .ok()
        .and_then(|path| Some((folder(path.parent()?.to_str()?).ok()?, path.file_name()?.to_owned())));
    let cgroups = Cgroups::open(proc_fd.as_fd())?;
    let egress_uids = Uids::open(&uids_file, settings.uids.egress).doing("open the state's uids")?;
    let cli = cli(&settings, mode)?;
    let (mut listener, mut address, mut programs) = (None, String::new(), None);
    if mode == Mode::Serve {
        let bound = TcpListener::bind(&settings.server.listen)
            .doing(format!("listen on {} (another program may hold it)", settings.server.listen))?;
        bound.set_nonblocking(true).doing("make the listener non-blocking")?;
        address = bound.local_addr().map(|at| at.to_string()).doing("name the listener")?;
        listener = Some(bound);
        programs = Some(Programs::open()?);
    }
    let secret = if mode == Mode::Serve { Some(secret(&settings.state.dir)?) } else { None };

    template::enter(&settings.state.dir, cli.as_deref(), &level.policy.cli.managed_settings)?;
    let state = folder(template::STATE)?;
    let tenants = Tenants::open(&state, settings.uids.tenant)?;
    let common = common(&level.policy)?;

    let mut host = Host {
        mode,
        level,
        proc_fd,
        resolver,
        egress: None,
        listener,
        address,
        upstream_url: settings.upstream.url.clone(),
        proving_url: String::new(),
        embedded: settings.upstream.url == "embedded",
        settings,
    };
    let (mut frontend, mut upstream, mut peer) = (None, None, control);
    if let (Some(programs), Some(secret)) = (programs, secret) {
        let (url, attended) = start_upstream(&programs, host.settings.uids.upstream)?;
        host.proving_url = url.clone();
        if host.embedded {
            host.upstream_url = url;
        }
        upstream = Some(attended);
        let text = toml::to_string(&host.settings)
            .map_err(|why| Fault::new("write the settings", why.to_string()))?;
        let text = memfd::sealed("settings", text.as_bytes()).doing("seal the settings")?;
        let uid = host.settings.uids.frontend;
        let more = [text.as_fd(), secret.as_fd()];
        let mut attended = spawn::start(
            programs.gaoler.as_fd(),
            &["gaoler", "frontend"],
            uid,
            Network::Empty,
            &more,
            || {},
        )?;
        peer = Some(std::mem::replace(&mut attended.control, text));
        frontend = Some(attended);
        host.egress = Some(programs.egress);
    }
    let peer = peer.ok_or_else(|| Fault::new("start", "nobody to answer to"))?;
    let parts = Parts {
        host,
        common,
        layers,
        cgroups,
        uids,
        egress_uids,
        tenants,
        peer,
        frontend,
        upstream,
        signals,
    };
    Ok(Monitor::new(parts).watch())
}

/// The programs beside this one.
struct Programs {
    gaoler: OwnedFd,
    egress: OwnedFd,
    upstream: OwnedFd,
}

impl Programs {
    fn open() -> Result<Programs, Fault> {
        let own = std::env::current_exe().doing("find the own program")?;
        let beside = |name: &str| -> Result<OwnedFd, Fault> {
            let path = own.with_file_name(name);
            let file = File::open(&path).doing(format!("open {}", path.display()))?;
            Ok(file.into())
        };
        Ok(Programs {
            gaoler: beside("gaoler")?,
            egress: beside("gaoler-egress")?,
            upstream: beside("gaoler-upstream")?,
        })
    }
}

fn start_upstream(programs: &Programs, uid: u32) -> Result<(String, spawn::Attended), Fault> {
    let listener =
        TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).doing("listen for the embedded upstream")?;
    listener.set_nonblocking(true).doing("make a listener non-blocking")?;
    let address = listener.local_addr().doing("name the embedded upstream's listener")?;
    let attended = spawn::start(
        programs.upstream.as_fd(),
        &["gaoler-upstream"],
        uid,
        Network::Host,
        &[listener.as_fd()],
        || {},
    )?;
    Ok((format!("http://{address}"), attended))
}

/// The settings that the command line has resolved and sealed, as descriptor 4.
fn settings() -> Result<Settings, Fault> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let fd = channel::take_inherited(4, &TAKEN).ok_or_else(|| {
        Fault::new("take the settings", "descriptor 4 is not open; start this by `gaoler serve`")
    })?;
    let bytes = memfd::read(fd, SETTINGS_BYTES_MAX).doing("read the settings")?;
    let text = String::from_utf8(bytes).map_err(|_| Fault::new("read the settings", "they are not UTF-8"))?;
    toml::from_str(&text).map_err(|why| Fault::new("parse the settings", why.to_string()))
}

/// The state folder: root's alone, made where it is missing.
fn state(dir: &Path) -> Result<OwnedFd, Fault> {
    let what = format!("open the state folder {}", dir.display());
    DirBuilder::new().recursive(true).mode(0o700).create(dir).doing(what.clone())?;
    let folder = File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(dir);
    let folder = folder.doing(what.clone())?;
    let found = folder.metadata().doing(what.clone())?;
    if found.uid() != 0 || found.mode() & 0o077 != 0 {
        return Err(Fault::new(what, "it must be owned by root with mode 0700 (chown root, chmod 700)"));
    }
    Ok(folder.into())
}

/// The server's secret, made at the first start, as a sealed memory file for the frontend.
fn secret(dir: &Path) -> Result<OwnedFd, Fault> {
    let path = dir.join("secret");
    if !path.exists() {
        let fresh: [u8; 32] = process::random().doing("draw the server's secret")?;
        let draft = dir.join(".secret");
        let written = File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft);
        std::io::Write::write_all(&mut written.doing("write the server's secret")?, &fresh)
            .and_then(|()| fs::rename(&draft, &path))
            .doing("write the server's secret")?;
    }
    let file = File::open(&path).doing("open the server's secret")?;
    let found = file.metadata().doing("look at the server's secret")?;
    if found.uid() != 0 || found.mode() & 0o077 != 0 || found.len() != 32 {
        return Err(Fault::new(
            "open the server's secret",
            "it must be 32 bytes, owned by root with mode 0600",
        ));
    }
    let mut bytes = Vec::new();
    file.take(32).read_to_end(&mut bytes).doing("read the server's secret")?;
    let sealed = memfd::sealed("secret", &bytes).doing("seal the server's secret");
    bytes.fill(0);
    sealed
}

fn cli(settings: &Settings, mode: Mode) -> Result<Option<PathBuf>, Fault> {
    let path: &PathBuf = &settings.cli.path;
    match File::open(path) {
        Ok(_) => Ok(Some(path.clone())),
        // A command needs no CLI; the cage is the same without it.
        Err(_) if mode == Mode::Exec => Ok(None),
        Err(error) => Err(error).doing(format!("open the Claude Code CLI {}", path.display())),
    }
}

fn common(level: &LevelPolicy) -> Result<Common, Fault> {
    let filter = |process: Process| {
        let policy = process.policy().map_err(|why| Fault::new("read a filter's policy", why.to_string()))?;
        seccomp::compile(&policy).doing("compile a filter")
    };
    let visible = level.visible.iter().map(|rule| {
        let class = match rule.access {
            VisibleAccess::Read => AccessClass::Read,
            VisibleAccess::Execute => AccessClass::ReadExecute,
        };
        (rule.path.as_path(), class)
    });
    let devices = level.device.iter().map(|rule| (rule.path.as_path(), AccessClass::Device));
    let own = [
        ("/", AccessClass::List),
        ("/opt/claude", AccessClass::ReadExecute),
        ("/etc", AccessClass::Read),
        ("/dev", AccessClass::Read),
    ];
    let own = own.iter().map(|(path, class)| (Path::new(path), *class));
    // A link's own inode needs no rule: what it leads to has one.
    let real = |(path, _): &(&Path, AccessClass)| !path.is_symlink();
    let rules =
        CageRules::open(visible.chain(devices).chain(own).filter(real)).doing("open the cage's places")?;
    let environment = invocation::constants(&level.env).collect();
    Ok(Common {
        cage_filter: filter(Process::Cage)?,
        init_filter: filter(Process::Init)?,
        rules,
        environment,
        path: level.env.iter().find(|it| it.name == "PATH").map(|it| it.value.clone()).unwrap_or_default(),
    })
}

fn folder(path: &str) -> Result<OwnedFd, Fault> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, FileMode::empty()).doing(format!("open {path}"))
}

/// Refuses to start below the operator's minimum, naming every layer that is missing.
fn refuse_below(settings: &Settings, layers: &Layers) -> Result<(), Fault> {
    let minimum = Tier::from_name(&settings.isolation.minimum).ok_or_else(|| {
        Fault::new("read isolation.minimum", "it is none of kernel, namespaces, uid, directory")
    })?;
    // Only the kernel tier is built: below it there is nothing to run in, whatever the minimum says.
    let needed = minimum.max(Tier::Kernel);
    if layers.tier >= needed {
        return Ok(());
    }
    let rows: Vec<_> = layers.rows.iter().collect();
    let missing: Vec<String> = tiers::missing(needed, &rows)
        .iter()
        .map(|row| {
            format!("{} is {} ({})", row.name, row.state, nix::errno::Errno::from_raw(row.errno.into()))
        })
        .collect();
    let why = format!(
        "this host reaches tier {}: {}; `gaoler doctor` says what would fix it",
        layers.tier,
        missing.join(", ")
    );
    Err(Fault::new(format!("reach tier {needed}"), why))
}
