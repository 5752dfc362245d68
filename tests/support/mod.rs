//! What the end-to-end suites share: a real server on a state of its own, a client that sees every byte, and
//! a count of what a server leaves on the machine. Nothing here may wait without a bound, or outlive its test.

#![allow(dead_code, unused_imports, reason = "each suite uses its own part of this")]

pub mod client;
pub mod environment;
pub mod traces;

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

pub use client::{Client, Response};
pub use environment::{Environment, environment};
pub use traces::Traces;

/// How long anything may take before a test says that it hangs. Never a measurement.
pub fn patience() -> Duration {
    Duration::from_secs(60) * environment().slower
}
/// A pause between two looks at something that is not so yet.
const LOOK: Duration = Duration::from_millis(10);

/// Looks until something is so, and returns what the look gave.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {:?}: {what}", patience());
        std::thread::sleep(LOOK);
    }
}

/// A token that the embedded upstream accepts; every name is another tenant.
pub fn token(name: &str) -> String {
    format!("sk-ant-oat01-test-{name}-0000000000000000")
}

/// The `authorization` header of a tenant.
pub fn bearer(name: &str) -> (&'static str, String) {
    ("authorization", format!("Bearer {}", token(name)))
}

/// The body of a request with one user message.
pub fn ask(text: &str) -> Value {
    json!({"model": "sonnet", "max_tokens": 1024, "messages": [{"role": "user", "content": text}]})
}

/// The real CLI, as `make test` names it.
pub fn real_cli() -> PathBuf {
    let path = std::env::var_os("GAOLER_TEST_CLI");
    let path = path
        .expect("GAOLER_TEST_CLI must name the Claude Code binary that the tests run (make test sets it)");
    PathBuf::from(path)
}

/// The tree that this was built in, or what stands for it in another environment.
pub fn tree() -> PathBuf {
    environment::kit().unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into())
}

/// A program of gaoler's, beside the others.
pub fn program(name: &str) -> PathBuf {
    let built = || Path::new(env!("CARGO_BIN_EXE_gaoler")).with_file_name(name);
    environment::kit().map_or_else(built, |kit| kit.join(name))
}

/// The CLI's double, which misbehaves on demand: see its own first lines.
pub fn double() -> PathBuf {
    tree().join("tests/double/claude")
}

/// The server's own program; the others lie beside it.
pub fn gaoler() -> Command {
    gaoler_under(&[])
}

fn gaoler_under(words: &[String]) -> Command {
    let mut words = words.iter().map(PathBuf::from).chain([program("gaoler")]);
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words);
    // Of the environment only what a program needs: a variable of the suite is no setting of the server.
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// How a server is started.
#[derive(Debug, Clone)]
pub struct Options {
    /// `--cli`
    pub cli: PathBuf,
    /// `--config`
    pub config: Option<PathBuf>,
    /// `--upstream`
    pub upstream: String,
    /// `--listen`
    pub listen: &'static str,
    /// A program and its arguments that becomes what is named after them; empty = none.
    pub under: Vec<String>,
    /// An existing state folder; `None` = a fresh one.
    pub state: Option<PathBuf>,
    /// More settings, as environment variables.
    pub settings: Vec<(&'static str, String)>,
    /// Uids that no other server of these suites has; what is found under them is this server's.
    pub uids: Uids,
}

/// Ten thousand uids.
#[derive(Debug, Clone, Copy)]
pub struct Uids(pub u32);

impl Uids {
    /// Some that nobody else has: by this process's id, and a count within it.
    fn fresh() -> Uids {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed) % 16;
        Uids(3_000_000 + (std::process::id() % 20_000 * 16 + count) * 10_000)
    }

    /// The settings that give them to a server.
    fn settings(self) -> [(&'static str, String); 7] {
        let Uids(first) = self;
        [
            ("GAOLER_UIDS__RUN", format!("[{first}, 1024]")),
            ("GAOLER_UIDS__EGRESS", format!("[{}, 1024]", first + 2000)),
            ("GAOLER_UIDS__TENANT", format!("[{}, 4096]", first + 4000)),
            ("GAOLER_UIDS__FRONTEND", (first + 9000).to_string()),
            ("GAOLER_UIDS__UPSTREAM", (first + 9001).to_string()),
            ("GAOLER_UIDS__LEDGER", (first + 9002).to_string()),
            ("GAOLER_UIDS__EXPORTER", (first + 9003).to_string()),
        ]
    }

    /// Whether one is among them.
    pub fn contains(self, uid: u32) -> bool {
        (self.0..self.0 + 10_000).contains(&uid)
    }

    /// Whether it is a cage's.
    pub fn is_run(self, uid: u32) -> bool {
        (self.0..self.0 + 1024).contains(&uid)
    }

    /// Whether it is a tenant's.
    pub fn is_tenant(self, uid: u32) -> bool {
        (self.0 + 4000..self.0 + 8096).contains(&uid)
    }

    /// Whether it is an egress's.
    pub fn is_egress(self, uid: u32) -> bool {
        (self.0 + 2000..self.0 + 3024).contains(&uid)
    }

    /// Whether it is the ledger's.
    pub fn is_ledger(self, uid: u32) -> bool {
        uid == self.0 + 9002
    }

    /// Whether it is the exporter's.
    pub fn is_exporter(self, uid: u32) -> bool {
        uid == self.0 + 9003
    }

    /// Whether it is the frontend's.
    pub fn is_frontend(self, uid: u32) -> bool {
        uid == self.0 + 9000
    }
}

impl Default for Options {
    fn default() -> Options {
        Options {
            cli: if environment().real_cli { real_cli() } else { double() },
            config: None,
            upstream: "embedded".into(),
            listen: "127.0.0.1:0",
            under: Vec::new(),
            state: None,
            settings: Vec::new(),
            uids: Uids::fresh(),
        }
    }
}

impl Options {
    /// The same, with one setting more: `("GAOLER_RUNS__MAX", "3")`.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl ToString) -> Options {
        self.settings.push((name, value.to_string()));
        self
    }

    /// The same, with the CLI's double.
    #[must_use]
    pub fn with_double() -> Options {
        Options {
            cli: double(),
            config: None,
            upstream: "embedded".into(),
            listen: "127.0.0.1:0",
            under: Vec::new(),
            state: None,
            settings: Vec::new(),
            uids: Uids::fresh(),
        }
    }

    /// The command that starts it.
    pub fn command(&self, state: &Path) -> Command {
        let mut command = gaoler_under(&self.under);
        command.args(["serve", "--listen", self.listen, "--upstream", &self.upstream]);
        command.arg("--cli").arg(&self.cli).arg("--state").arg(state);
        command.args(self.config.iter().flat_map(|path| [OsStr::new("--config"), path.as_os_str()]));
        // The tier that this environment must reach is asked for: with less, the server must not start.
        command.args(["--minimum", environment().tier]);
        command.envs(self.uids.settings()).envs(self.settings.iter().cloned());
        command.stdin(Stdio::null());
        command
    }
}

/// A server that answers. Dropping it ends it, politely first.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: String,
    /// Its first line.
    pub ready: String,
    /// Its state folder.
    pub state: PathBuf,
    /// What it was started with; with `state` filled in, what starts it again.
    pub options: Options,
    folder: Option<tempfile::TempDir>,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Server {
    /// Starts one, and waits until it answers.
    pub fn start(options: Options) -> Server {
        match Server::try_start(options) {
            Ok(server) => server,
            Err((status, log)) => panic!("the server did not start: {status}\n{log}"),
        }
    }

    /// Starts one; its status and what it wrote to stderr where it refuses.
    pub fn try_start(mut options: Options) -> Result<Server, (ExitStatus, String)> {
        let folder = tempfile::Builder::new().prefix("gaoler-test-").tempdir().expect("a folder");
        let state = options.state.clone().unwrap_or_else(|| folder.path().join("state"));
        if !state.exists() {
            std::fs::create_dir(&state).expect("a state folder");
        }
        std::fs::set_permissions(&state, Permissions::from_mode(0o700)).expect("a mode");
        options.state = Some(state.clone());
        let log = folder.path().join("stderr");
        let stderr = File::create(&log).expect("a log");
        let mut command = options.command(&state);
        // gVisor takes a mount namespace and keeps one table of mounts: what one start tries shows in another's.
        let alone = File::create(std::env::temp_dir().join("gaoler-test-start")).expect("a lock");
        if environment().one_start {
            alone.lock().expect("locked");
        }
        let mut child = command.stdout(Stdio::piped()).stderr(stderr).spawn().expect("gaoler");
        // The line comes within a second, or the process ends and the pipe with it; nextest ends a hang.
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let Some(address) = line.trim_end().rsplit_once("address=").map(|(_, address)| address.to_owned())
        else {
            return Err((child.wait().expect("an end"), text));
        };
        let ready = line.trim_end().to_owned();
        Ok(Server { child, address, ready, state, options, folder: Some(folder), log, ended: None })
    }

    /// The supervisor's process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// A client of it.
    pub fn client(&self) -> Client {
        Client { address: self.address.clone(), patience: patience() }
    }

    /// Asks as this tenant, and returns the text of the answer. Anything but a message fails the test.
    pub fn says(&self, tenant: &str, text: &str) -> String {
        let response = self.client().messages(tenant, &ask(text));
        assert_eq!(response.status, 200, "{text}: {response:?}");
        response.text()
    }

    /// Has this tenant's agent write a file into its workspace: by a command, or where there is none by the
    /// CLI's own tool. No command line and no transcript of a command has the text as it is.
    pub fn writes(&self, tenant: &str, name: &str, text: &str) {
        let (ask, done) = if environment().commands {
            let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
            let put = "import sys; open(sys.argv[1], \"w\").write(bytes.fromhex(sys.stdin.read()).decode())";
            let ask = format!("RUN: printf %s {hex} | python3 -c '{put}' {name} && wc -c < {name}");
            (ask, text.len().to_string())
        } else {
            let ask = format!("CALLS: Write {}", json!({ "file_path": name, "content": text }));
            (ask, "CALLS 1 ok:".to_owned())
        };
        let said = self.says(tenant, &ask);
        assert!(said.contains(&done), "{said}");
    }

    /// What this tenant's agent says of a look at a file: by a command, or where there is none by the CLI's own
    /// tool, whose refusals begin with `CALLS 1 error`.
    pub fn looks(&self, tenant: &str, path: &str) -> String {
        match environment().commands {
            true => self.says(tenant, &format!("RUN: cat {path} 2>&1; echo it-ran")),
            false => self.says(tenant, &format!("CALLS: Read {}", json!({ "file_path": path }))),
        }
    }

    /// Where this tenant's runs have their workspace, as they see it.
    pub fn workspace(&self, tenant: &str) -> String {
        if let Some(path) = environment().workspace() {
            return path.display().to_string();
        }
        if environment().commands {
            return self.says(tenant, "RUN: pwd").trim_start_matches("[embedded] RUN ok:\n").to_owned();
        }
        // Nobody can say it there: whose file it is, is where it is.
        self.writes(tenant, "whose", tenant);
        let folders = std::fs::read_dir(self.state.join("tenants")).expect("tenants").flatten();
        let mut workspaces = folders.map(|folder| folder.path().join("workspaces/default"));
        let is_its = |at: &PathBuf| std::fs::read_to_string(at.join("whose")).is_ok_and(|it| it == tenant);
        let found = workspaces.find(is_its).expect("its workspace");
        std::fs::remove_file(found.join("whose")).expect("removed");
        found.display().to_string()
    }

    /// What it has written to stderr so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal to the supervisor.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("sent");
    }

    /// Waits until the supervisor has ended.
    pub fn wait(&mut self) -> ExitStatus {
        if let Some(ended) = self.ended {
            return ended;
        }
        let ended = until("the server's end", || self.child.try_wait().expect("a child"));
        self.ended = Some(ended);
        ended
    }

    /// Ends it politely.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Everything of it that is on the machine now.
    pub fn traces(&self) -> Traces {
        Traces::of(self.pid(), self.options.uids, &self.state)
    }

    /// What an idle server has: looked at until the pool of ready sets is full, which takes no request.
    pub fn baseline(&self) -> Traces {
        let mut last = self.traces();
        let mut same = 0;
        until("an idle server", || {
            let now = self.traces();
            same = if now == last { same + 1 } else { 0 };
            last = now.clone();
            (same >= 20).then_some(now)
        })
    }

    /// Waits until there is nothing but what was there before.
    pub fn settles_to(&self, baseline: &Traces) {
        let deadline = Instant::now() + patience();
        loop {
            let now = self.traces();
            if now == *baseline {
                return;
            }
            assert!(Instant::now() < deadline, "left behind:\nbefore {baseline:?}\nnow    {now:?}");
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(10);
            while self.child.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < deadline {
                std::thread::sleep(LOOK);
                // Whatever still runs is of no use to anybody: the second signal waits for nothing.
                let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("---- stderr of the server ----\n{}", self.log());
            // A run may have left folders that are deeper than our own stack.
            if let Some(folder) = &self.folder {
                let _ = Command::new("rm").arg("-rf").arg(folder.path()).status();
            }
        }
        drop(self.folder.take());
    }
}
