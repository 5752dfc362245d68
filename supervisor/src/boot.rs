//! From start to the poll loop: everything that needs the host's root is opened here, before it is left.
//! It must never go on past a layer that the operator's minimum names and this host does not enforce.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use gaoler_policy::settings::{self, Settings};
use gaoler_protocol::{
    FRAME_BYTES, LayerName, LayerRow, LayerState, Layers, Message, Ready, Role, Rows, Tier, VOUCHING_MAX,
};
use gaoler_sys::clone::{Side, fork};
use gaoler_sys::{channel, memfd, process};
use nix::fcntl::{OFlag, openat};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode as FileMode;

use crate::cage::attest::{Posture, place, rights};
use crate::cgroup::Cgroups;
use crate::errand::{Deed, Errand, Usage};
use crate::exporter::Exporter;
use crate::fault::{Doing, Fault};
use crate::level::Levels;
use crate::monitor::{Monitor, Stage};
use crate::notify::Notify;
use crate::plan::{Ids, Plan, Root};
use crate::pool::Pool;
use crate::reload::Reload;
use crate::spawn::{self, Attended, Network};
use crate::template::Views;
use crate::tenants::{self, Folder, Tenants};
use crate::uids::{self, Uids};
use crate::{inside, layers, namespaces, template, tiers};

/// Bytes of a certificate chain and its key, at most.
const TLS_BYTES_MAX: usize = 256 * 1024;

/// How long the ledger may take to open its database, a migration included.
const LEDGER_WAIT_MS: u16 = 60_000;

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
    /// The levels that runs may have.
    pub levels: Levels,
    /// The own mount namespaces, where cages have roots of their own.
    pub views: Option<Views>,
    /// Where the state lies, for cages without a root of their own.
    pub state: PathBuf,
    /// Where the CLI lies, for the same.
    pub cli: PathBuf,
    /// The folder of runs' own folders, where they cannot be file systems of their own.
    pub folders: Option<OwnedFd>,
    /// The host's /proc.
    pub proc_fd: OwnedFd,
    /// The folder of the kernel's settings, where cages' networks are made ahead.
    pub network: Option<OwnedFd>,
    /// Read anew for each egress, for it changes.
    resolver: Option<Resolver>,
    /// The egress program.
    pub egress: Option<OwnedFd>,
    /// The program of runs over files.
    pub files: Option<OwnedFd>,
    /// The key that opens stored credentials, for each egress.
    pub vault: Option<OwnedFd>,
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
    /// The service manager.
    pub notify: Notify,
}

impl Host {
    /// The host's resolv.conf as it is now; an empty file where there is none.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn resolver(&self) -> nix::Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let none = FileMode::empty();
        let real = self.resolver.as_ref().and_then(|resolver| match resolver {
            Resolver::Named(folder, name) => {
                openat(folder, name.as_os_str(), flags | OFlag::O_NOFOLLOW, none).ok()
            }
            Resolver::Mounted(file) => {
                openat(&self.proc_fd, format!("self/fd/{}", file.as_raw_fd()).as_str(), flags, none).ok()
            }
        });
        real.map_or_else(|| nix::fcntl::open("/etc/resolv.conf", flags, none), Ok)
    }
}

/// What /etc/resolv.conf really is.
enum Resolver {
    /// A file of this name in this folder, which may be replaced.
    Named(OwnedFd, OsString),
    /// A mount of its own, as containers have it: it is written to and never replaced. Its name ends with the host's
    /// root, for what is mounted below a root that is left goes apart, and another file comes to light there.
    Mounted(OwnedFd),
}

impl Resolver {
    /// This host's.
    fn find() -> Option<Resolver> {
        let path = fs::canonicalize("/etc/resolv.conf").ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        if mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|point| Path::new(point) == path) {
            let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
            return nix::fcntl::open(&path, flags, FileMode::empty()).ok().map(Resolver::Mounted);
        }
        Some(Resolver::Named(folder(path.parent()?).ok()?, path.file_name()?.to_owned()))
    }
}

/// Open files of a supervisor or a frontend without a run, and at most of each run.
const FILES_OWN: u64 = 256;
const FILES_A_RUN: u64 = 18;

/// Boots in this mode and watches; the status to exit with. `inside`: as the root of an ordinary user's namespace.
///
/// # Errors
/// The first thing that this host refuses.
pub fn run(mode: Mode, inside: bool) -> Result<u8, Fault> {
    if !inside && !nix::unistd::geteuid().is_root() {
        inside::enter(&preview()?.uids)?;
    }
    let handed = [0, 1, 2].map(|at| handed_on(mode, at));
    let signals = signals()?;
    nix::sys::stat::umask(FileMode::from_bits_truncate(0o022));
    process::not_dumpable().doing("become untraceable")?;
    let mut settings = settings()?;
    if inside {
        inside::check(&mut settings.uids)?;
    }
    crate::log::decisions(mode == Mode::Serve);
    // Frontend and egress inherit the bound; a cage's command has its own.
    let files = process::raise_open_files().doing("raise the bound on open files")?;
    let wanted = FILES_OWN + u64::from(settings.runs.max + VOUCHING_MAX) * FILES_A_RUN;
    if mode == Mode::Serve && files < wanted {
        let why = format!(
            "{wanted} are needed and {files} are allowed; lower runs.max or raise LimitNOFILE (ulimit -Hn)"
        );
        return Err(Fault::new("have open files for runs.max", why));
    }
    let mut peer = None;
    if mode != Mode::Serve {
        let control = channel::inherited_control();
        peer = Some(control.ok_or_else(|| Fault::new("take the control socket", "descriptor 3 is none"))?);
    }
    let ordinary = inside || !nix::unistd::geteuid().is_root();
    if ordinary && let (Mode::Doctor, Some(peer)) = (mode, &peer) {
        return report(peer, shown(look(&settings)?, inside));
    }

    let state = state(&settings.state.dir)?;
    let uids_file = settings.state.dir.join("uids");
    let mut uids = Uids::open(&uids_file, settings.uids.run).doing("open the state's uids")?;
    // Held while it is tried, so that no other supervisor's run has it.
    let tried = uids.take().ok_or_else(|| Fault::new("take a run's uid", "the range is used up"))?;
    let layers = layers::probe(state.as_fd(), &settings.state.dir, uids.uid(&tried));
    let plan = Plan::of(&layers.rows.iter().collect::<Vec<_>>(), inside);
    let layers = shown(layers, inside);
    if let (Mode::Doctor, Some(peer)) = (mode, &peer) {
        return report(peer, layers);
    }
    refuse_below(&settings, &layers)?;
    if plan.ids == Ids::Same && !inside && nix::unistd::geteuid().is_root() {
        let why =
            "this root cannot change its uid, and no cage may run as root; start gaoler as an ordinary user";
        return Err(Fault::new("choose a uid for cages", why));
    }
    if plan.walks() {
        walkable(&state, &settings.state.dir, uids.uid(&tried))?;
    }
    uids.release(tried);

    let proc_fd = folder("/proc")?;
    let network = plan.ahead.then(namespaces::settings).transpose()?;
    let resolver = Resolver::find();
    let cgroups = if plan.cgroup { Some(Cgroups::open(proc_fd.as_fd())?) } else { None };
    let egress_uids = Uids::open(&uids_file, settings.uids.egress).doing("open the state's uids")?;
    let cli = cli(&settings, mode)?;
    let service =
        if mode == Mode::Serve { Some(Service::open(&settings, handed, &state, &plan)?) } else { None };
    let notify = Notify::open();
    if !plan.has_pids() {
        // Whoever a cage's end leaves without a parent comes to us, and is ended.
        let what = "adopt orphans, which a host without a pid namespace for cages must let us";
        process::adopt_orphans().doing(what)?;
    }

    let left = (mode == Mode::Serve && plan.root == Root::Own).then(|| folder("/")).transpose()?;
    let levels = Levels::of(&settings.level, &settings.mcp.internal)?;
    let whole = fs::canonicalize(&settings.state.dir).doing("find the state folder")?;
    let mut folders = None;
    let owned = if plan.root == Root::Own {
        template::enter(&settings.state.dir, cli.as_deref(), &levels, inside)?;
        folder(template::STATE)?
    } else {
        folders = plan.has_folder().then(|| runs(&state, &plan)).transpose()?;
        state
    };
    let same = plan.ids == Ids::Same;
    let tenants = Tenants::open(&owned, settings.uids.tenant, same, plan.walks())?;
    let views = (plan.root == Root::Own).then(|| Views::part(proc_fd.as_fd())).transpose()?;
    let cli_path = cli.unwrap_or_else(|| settings.cli.path.clone());
    let commons = levels.commons(plan, &whole, &cli_path)?;

    let mut host = Host {
        mode,
        views,
        state: whole,
        cli: cli_path,
        folders,
        levels,
        proc_fd,
        network,
        resolver,
        egress: None,
        files: None,
        vault: None,
        listener: None,
        address: String::new(),
        upstream_url: settings.upstream.url.clone(),
        proving_url: String::new(),
        embedded: settings.upstream.url == "embedded",
        notify,
        settings,
    };
    let (mut frontend, mut upstream, mut ledger, mut exporter, mut reload) = (None, None, None, None, None);
    if let Some(mut service) = service {
        upstream = Some(service.start_upstream(&mut host, &plan)?);
        let (attended, questions) = service.start_ledger(&host, &plan)?;
        ledger = Some(attended);
        let mut spans = None;
        if let Some((made, ours)) = service.traces.take() {
            spans = Some(ours);
            exporter.insert(made).start(&host, &plan, || {});
        }
        reload = Some(service.reload(left)?);
        let (attended, control) = service.start_frontend(&mut host, &plan, questions, spans)?;
        (frontend, peer) = (Some(attended), Some(control));
    }
    let monitor = Monitor {
        stage: if mode == Mode::Serve { Stage::Confining } else { Stage::Serving },
        host,
        plan,
        commons,
        layers,
        cgroups,
        uids,
        egress_uids,
        tenants,
        peer,
        frontend,
        upstream,
        ledger,
        exporter,
        reload,
        signals,
        heard: None,
        said: 0,
        pool: Pool::default(),
        locks: None,
        locks_unseen: 0,
        next_look: std::time::Instant::now(),
        far_over: std::collections::BTreeMap::new(),
        measured: std::collections::BTreeMap::new(),
        grown: 0,
        alone: true,
        runs: Vec::new(),
        status: None,
    };
    Ok(monitor.watch())
}

/// The layers as they are told. What an ordinary user has is had inside a user namespace, and there only.
fn shown(layers: Layers, inside: bool) -> Layers {
    use LayerName::*;
    let borrowed = [
        UserNamespace,
        PidNamespace,
        MountNamespace,
        NetworkNamespace,
        IpcNamespace,
        UtsNamespace,
        CgroupNamespace,
        PivotRoot,
        MountApi,
        Proc,
        TmpfsSize,
        Chroot,
        BindMounts,
    ];
    let rows = layers.rows.iter().map(|row| match inside && borrowed.contains(&row.name) {
        true if row.state == LayerState::Enforced => {
            LayerRow { state: LayerState::Degraded, errno: libc::EPERM as u16, ..row }
        }
        _ => row,
    });
    Layers { rows: Rows::new(rows.collect::<Vec<_>>()), ..layers }
}

/// Tenants' own processes walk through the state folder to theirs: they may pass, and not look around.
fn walkable(state: &OwnedFd, path: &Path, uid: u32) -> Result<(), Fault> {
    nix::sys::stat::fchmod(state, FileMode::from_bits_truncate(0o711))
        .doing("open the state to passing through")?;
    let passes = || -> nix::Result<()> {
        uids::become_uid(uid)?;
        nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, FileMode::empty())?;
        nix::sys::stat::stat(&path.join(".")).map(drop)
    };
    let child = match fork(0, None).doing("try the way to the state")? {
        Side::Child => process::exit(u8::from(passes().is_err())),
        Side::Parent(child) => child.reap_blocking().doing("try the way to the state")?,
    };
    if child.is_some_and(|ended| ended.code == Some(0)) {
        return Ok(());
    }
    let why = "on this host cages walk there under their own uids, and a folder on the way does not let them pass; \
               chmod o+x it, or choose another place with --state";
    Err(Fault::new(format!("open {} to cages", path.display()), why))
}

/// The folder of runs' own folders, without those of earlier lives.
fn runs(state: &OwnedFd, plan: &Plan) -> Result<OwnedFd, Fault> {
    let folder = tenants::private(state, "runs", nix::unistd::geteuid().as_raw())?;
    let mode = if plan.walks() { 0o711 } else { 0o700 };
    nix::sys::stat::fchmod(&folder, FileMode::from_bits_truncate(mode))
        .doing("set the mode of the runs' folder")?;
    for (dead, uid) in Folder::dead(&folder)? {
        let errand = Errand::start(plan, Deed::Wipe, &*dead.lock, uid, || Ok(Usage::default()))?;
        errand.child.reap_blocking().doing("wait for a folder to be wiped")?;
        let removed = dead.remove(&folder);
        crate::log::event("swept_folder", &[("folder", &dead.name), ("removed", &removed)]);
    }
    Ok(folder)
}

/// SIGTERM, SIGINT and SIGHUP are read from a descriptor; a terminal's Ctrl-C reaches every process of its group.
fn signals() -> Result<SignalFd, Fault> {
    let caught = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD]);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&caught), None).doing("block signals")?;
    SignalFd::with_flags(&caught, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .doing("open a descriptor for signals")
}

/// The layers as an ordinary user has them. The state folder is root's, so the attempts get another one.
fn look(settings: &Settings) -> Result<Layers, Fault> {
    let dir = std::env::temp_dir().join(format!("gaoler-doctor-{}", std::process::id()));
    let made = DirBuilder::new().mode(0o700).create(&dir);
    made.doing(format!("make the folder {}, to try layers in", dir.display()))?;
    let layers = folder(&dir).map(|folder| layers::probe(folder.as_fd(), &dir, settings.uids.run[0]));
    fs::remove_dir(&dir).doing("remove the folder that layers were tried in")?;
    layers
}

fn report(peer: &OwnedFd, layers: Layers) -> Result<u8, Fault> {
    channel::send(peer.as_fd(), &Message::Layers(layers).encode(1), &[]).doing("report")?;
    Ok(0)
}

/// What the HTTP server's supervisor has beside the command line's.
struct Service {
    listener: TcpListener,
    secret: OwnedFd,
    tls: OwnedFd,
    /// The exporter, where there is to be one, and the frontend's end of its socket.
    traces: Option<(Exporter, OwnedFd)>,
    gaoler: OwnedFd,
    /// How it was called.
    origin: OwnedFd,
    egress: OwnedFd,
    files: OwnedFd,
    upstream: OwnedFd,
    ledger: OwnedFd,
    /// The ledger's folder.
    folder: OwnedFd,
    /// What opens stored credentials, and what they are sealed with.
    vault: [OwnedFd; 2],
}

impl Service {
    fn open(
        settings: &Settings,
        [tls, origin, traces]: [Option<OwnedFd>; 3],
        state: &OwnedFd,
        plan: &Plan,
    ) -> Result<Service, Fault> {
        let listen = &settings.server.listen;
        let own = std::env::current_exe().doing("find the own program")?;
        let beside = |name: &str| -> Result<OwnedFd, Fault> {
            let path = own.with_file_name(name);
            Ok(File::open(&path).doing(format!("open {}", path.display()))?.into())
        };
        let traces =
            traces.map(|settings| Exporter::new(beside("gaoler-exporter")?, settings)).transpose()?;
        Ok(Service {
            listener: TcpListener::bind(listen)
                .doing(format!("listen on {listen} (another program may hold it)"))?,
            secret: secret(&settings.state.dir)?,
            // Without it the frontend is given nothing, and refuses where the settings speak of TLS.
            tls: tls.map_or_else(|| memfd::sealed("tls", b"").doing("seal nothing"), Ok)?,
            traces,
            // Without it a reload says that it knows of none.
            origin: origin.map_or_else(|| memfd::sealed("origin", b"").doing("seal nothing"), Ok)?,
            gaoler: beside("gaoler")?,
            egress: beside("gaoler-egress")?,
            files: beside("gaoler-files")?,
            upstream: beside("gaoler-upstream")?,
            ledger: beside("gaoler-ledger")?,
            folder: tenants::private(state, "ledger", plan.own_uid(settings.uids.ledger))?,
            // Made by `gaoler serve`: there is no arithmetic of keys in this process.
            vault: [kept(&settings.state.dir, "vault")?, kept(&settings.state.dir, "vault.pub")?],
        })
    }

    /// Starts the embedded upstream, which the self-test needs even where tenants' is another one.
    fn start_upstream(&self, host: &mut Host, plan: &Plan) -> Result<Attended, Fault> {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .doing("listen for the embedded upstream")?;
        listener.set_nonblocking(true).doing("make a listener non-blocking")?;
        let address = listener.local_addr().doing("name the embedded upstream's listener")?;
        host.proving_url = format!("http://{address}");
        if host.embedded {
            host.upstream_url = host.proving_url.clone();
        }
        let (uid, more) = (host.settings.uids.upstream, [listener.as_fd()]);
        spawn::start(plan, self.upstream.as_fd(), &["gaoler-upstream"], uid, Network::Host, &more, || {})
    }

    /// Starts the ledger. It has opened its database, and has been looked at, before anybody can ask it.
    fn start_ledger(&self, host: &Host, plan: &Plan) -> Result<(Attended, OwnedFd), Fault> {
        let (ours, theirs) = channel::pair().doing("make the ledger's socket")?;
        let (keep, uid) = (&host.settings.ledger, host.settings.uids.ledger);
        let [runs, usage] = [keep.runs_days, keep.usage_days].map(|days| days.to_string());
        let argv = ["gaoler-ledger", "--runs-days", &runs, "--usage-days", &usage];
        let (folder, more) = (Network::Folder(self.folder.as_fd()), [theirs.as_fd()]);
        let ledger = spawn::start(plan, self.ledger.as_fd(), &argv, uid, folder, &more, || {})?;
        drop(theirs);
        poll(&mut [PollFd::new(ledger.control.as_fd(), PollFlags::POLLIN)], LEDGER_WAIT_MS)
            .doing("wait for the ledger")?;
        let word = channel::receive::<{ FRAME_BYTES + 1 }>(ledger.control.as_fd());
        let word = word.ok().and_then(|received| Message::decode(&received.bytes).ok());
        let Some((_, Message::Ready(Ready { role: Role::Ledger, threads }))) = word else {
            ledger.child.kill();
            return Err(Fault::new(
                "start the ledger",
                "it is not ready; its own line, if there is one, says why",
            ));
        };
        let (proc_fd, posture) = (host.proc_fd.as_fd(), Posture::own(plan, uid, true, threads));
        place(proc_fd, ledger.child.pid, &posture)
            .and_then(|_| rights(proc_fd, ledger.child.pid, &posture))?;
        Ok((ledger, ours))
    }

    /// What a reload needs, with the host's root where that is left.
    fn reload(&mut self, root: Option<OwnedFd>) -> Result<Reload, Fault> {
        let copy = |fd: &OwnedFd| fd.try_clone().doing("copy a descriptor");
        let (gaoler, origin) = (copy(&self.gaoler)?, copy(&self.origin)?);
        Ok(Reload { gaoler, origin, root, child: None, again: false, asks: 0 })
    }

    /// Starts the frontend, and leaves the rest to the monitor.
    fn start_frontend(
        self,
        host: &mut Host,
        plan: &Plan,
        questions: OwnedFd,
        spans: Option<OwnedFd>,
    ) -> Result<(Attended, OwnedFd), Fault> {
        self.listener.set_nonblocking(true).doing("make the listener non-blocking")?;
        host.address = self.listener.local_addr().doing("name the listener")?.to_string();
        let text = toml::to_string(&host.settings)
            .map_err(|why| Fault::new("write the settings", why.to_string()))?;
        let text = memfd::sealed("settings", text.as_bytes()).doing("seal the settings")?;
        let [private, public] = self.vault;
        let uid = host.settings.uids.frontend;
        let more = [&text, &self.secret, &self.tls, &questions, &public];
        let more: Vec<_> = more.into_iter().chain(&spans).map(AsFd::as_fd).collect();
        let argv = ["gaoler", "frontend"];
        let mut attended = spawn::start(plan, self.gaoler.as_fd(), &argv, uid, Network::Empty, &more, || {})?;
        (host.listener, host.egress, host.files) = (Some(self.listener), Some(self.egress), Some(self.files));
        host.vault = Some(private);
        let control = std::mem::replace(&mut attended.control, text);
        Ok((attended, control))
    }
}

/// What the command line has sealed for others: as descriptor 5 the listener's certificate and key, for the frontend; as 6
/// how it was called, for itself; and as 7 the exporter's settings. Taken before anything is opened: later that number could be anybody's.
fn handed_on(mode: Mode, at: usize) -> Option<OwnedFd> {
    static TAKEN: [AtomicBool; 3] = [const { AtomicBool::new(false) }; 3];
    let fd = if mode == Mode::Serve { channel::take_inherited(5 + at as i32, &TAKEN[at]) } else { None };
    fd.filter(|fd| memfd::is_sealed(fd, TLS_BYTES_MAX))
}

/// The settings that the command line has resolved and sealed, as descriptor 4.
fn settings() -> Result<Settings, Fault> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let fd = channel::take_inherited(4, &TAKEN).ok_or_else(|| {
        Fault::new("take the settings", "descriptor 4 is not open; start this by `gaoler serve`")
    })?;
    parsed(memfd::read(fd, settings::BYTES_MAX).doing("read the settings")?)
}

/// The same before this program starts anew, which takes them a second time.
fn preview() -> Result<Settings, Fault> {
    let file = File::open("/proc/self/fd/4").doing("look at the settings; start this by `gaoler serve`")?;
    parsed(memfd::read(file.into(), settings::BYTES_MAX).doing("read the settings")?)
}

fn parsed(bytes: Vec<u8>) -> Result<Settings, Fault> {
    let text = String::from_utf8(bytes).map_err(|_| Fault::new("read the settings", "they are not UTF-8"))?;
    toml::from_str(&text).map_err(|why| Fault::new("parse the settings", why.to_string()))
}

/// The state folder: root's alone, made where it is missing.
fn state(dir: &Path) -> Result<OwnedFd, Fault> {
    let what = format!("open the state folder {}", dir.display());
    DirBuilder::new().recursive(true).mode(0o700).create(dir).doing(what.clone())?;
    let folder = File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(dir);
    let folder = folder.doing(what.clone())?;
    match roots_alone(&folder, &what)? {
        Some(_) => Ok(folder.into()),
        None => {
            let why = "it must be owned by whoever runs gaoler, with mode 0700 (chown, chmod 700)";
            Err(Fault::new(what, why))
        }
    }
}

/// The length of a file or folder that nobody but us can read or write; a folder may be passed through.
fn roots_alone(file: &File, what: &str) -> Result<Option<u64>, Fault> {
    let found = file.metadata().doing(what)?;
    let others = if found.is_dir() { 0o066 } else { 0o077 };
    let alone = found.uid() == nix::unistd::geteuid().as_raw() && found.mode() & others == 0;
    Ok(alone.then_some(found.len()))
}

/// The server's secret, made at the first start, as a sealed memory file for the frontend.
fn secret(dir: &Path) -> Result<OwnedFd, Fault> {
    let (path, draft) = (dir.join("secret"), dir.join(".secret"));
    if !path.exists() {
        let fresh: [u8; 32] = process::random().doing("draw the server's secret")?;
        let written = File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft);
        written
            .and_then(|mut file| file.write_all(&fresh))
            .and_then(|()| fs::rename(&draft, &path))
            .doing("write the server's secret")?;
    }
    kept(dir, "secret")
}

/// A key of the state folder, as a sealed memory file.
fn kept(dir: &Path, name: &str) -> Result<OwnedFd, Fault> {
    let what = format!("open {}", dir.join(name).display());
    let file = File::open(dir.join(name)).doing(what.clone())?;
    if roots_alone(&file, &what)? != Some(32) {
        return Err(Fault::new(what, "it must be 32 bytes, owned by root with mode 0600"));
    }
    let mut bytes = Vec::new();
    file.take(32).read_to_end(&mut bytes).doing(what)?;
    let sealed = memfd::sealed(name, &bytes).doing("seal a key of the state folder");
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

fn folder(path: impl AsRef<Path>) -> Result<OwnedFd, Fault> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let path = path.as_ref();
    nix::fcntl::open(path, flags, FileMode::empty()).doing(format!("open {}", path.display()))
}

/// Refuses to start below the operator's minimum, naming every layer that is missing.
fn refuse_below(settings: &Settings, layers: &Layers) -> Result<(), Fault> {
    let minimum = Tier::from_name(&settings.isolation.minimum).ok_or_else(|| {
        Fault::new("read isolation.minimum", "it is none of kernel, namespaces, uid, directory")
    })?;
    let needed = minimum;
    if layers.tier >= needed {
        return Ok(());
    }
    let rows: Vec<_> = layers.rows.iter().collect();
    let errno = |row: &LayerRow| nix::errno::Errno::from_raw(row.errno.into());
    let missing = tiers::missing(needed, &rows);
    let missing: Vec<_> =
        missing.iter().map(|row| format!("{} is {} ({})", row.name, row.state, errno(row))).collect();
    let (tier, missing) = (layers.tier, missing.join(", "));
    let why = format!(
        "this host reaches tier {tier}: {missing}; `gaoler doctor` says what would fix it, and isolation.minimum = \
         \"{tier}\" accepts what there is"
    );
    Err(Fault::new(format!("reach tier {needed}"), why))
}
