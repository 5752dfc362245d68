//! A whole request: over HTTP to a server of ours, and the bare CLI with the same argv, environment and
//! upstream. It must never let the bare CLI do less than the one in the cage.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gaoler_policy::level::BALANCED;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::seq::SliceRandom;

use crate::table::{Row, Table};

/// A cold cache makes the first of each a measurement of the disk.
const WARM_UP: u32 = 2;
/// Start-up self-tests run the CLI a few times.
const READY_WAIT: Duration = Duration::from_secs(120);
/// A uid that owns nothing.
const NOBODY: u32 = 65_534;
const TOKEN: &str = "sk-ant-oat01-bench-0000000000000000000000000000000000000000";
/// What the embedded upstream says first.
const MARK: &str = "[embedded]";
const PROMPT: &str = "ECHO: hello";
const MODEL: &str = "claude-sonnet-5";

/// Whole requests of all, in random order, and the supervisor's resident memory after them, KiB. Where an earlier build
/// takes part, also how long the launches of both took and the teardowns, by their own word.
///
/// # Errors
/// Whatever could not be started, or answered wrongly.
pub fn whole(rounds: u32, cli: &Path, before: Option<&Path>) -> Result<(Vec<Table>, u64), String> {
    let folder = tempfile::tempdir().map_err(|error| format!("a folder: {error}"))?;
    let cli = std::fs::canonicalize(cli).map_err(|error| format!("{}: {error}", cli.display()))?;
    let server = Server::start(folder.path(), &cli, &[])?;
    let earlier = before.map(|programs| {
        let folder = folder.path().join("before");
        std::fs::create_dir(&folder).map_err(|error| format!("a folder: {error}"))?;
        Server::start_from(programs, &folder, &cli, &[])
    });
    let earlier = earlier.transpose()?;
    let upstream = Upstream::start()?;
    let bare = Bare::new(folder.path(), cli, &upstream.address)?;
    let asked = Asked { tenant: "whole", limits: None, prompt: PROMPT };
    let mut rows = vec![Row::new("gaoler, over HTTP"), Row::new("bare CLI")];
    rows.extend(earlier.as_ref().map(|_| Row::new("gaoler before")));
    for round in 0..rounds + WARM_UP {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.shuffle(&mut rand::rng());
        for contender in order {
            let (first, end) = match (contender, &earlier) {
                (0, _) => server.request(asked)?,
                (2, Some(earlier)) => earlier.request(asked)?,
                _ => bare.run()?,
            };
            if round >= WARM_UP {
                rows[contender].first.push(first);
                rows[contender].end.push(end);
            }
        }
    }
    let rss_kib = server.rss_kib()?;
    let mut tables = vec![Table { title: format!("whole request, streamed: {rounds} rounds"), rows }];
    if let Some(earlier) = earlier {
        let rows = vec![server.own_times("gaoler", rounds)?, earlier.own_times("gaoler before", rounds)?];
        tables.push(Table {
            title: "their launches (first) and teardowns (end), as each says itself".into(),
            rows,
        });
        earlier.end()?;
    }
    server.end()?;
    Ok((tables, rss_kib))
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Who asks: a part of a token.
    pub tenant: &'a str,
    /// The limits that are wished for.
    pub limits: Option<&'a str>,
    /// What is said.
    pub prompt: &'a str,
}

/// `gaoler serve`, whose process id becomes the supervisor's.
pub struct Server {
    child: Child,
    address: String,
    log: PathBuf,
}

impl Server {
    /// Starts one with a state in this folder.
    ///
    /// # Errors
    /// Why it did not start.
    pub fn start(folder: &Path, cli: &Path, settings: &[(&str, &str)]) -> Result<Server, String> {
        Server::start_from(&beside("")?, folder, cli, settings)
    }

    /// The same, of the programs in a folder.
    fn start_from(
        programs: &Path,
        folder: &Path,
        cli: &Path,
        settings: &[(&str, &str)],
    ) -> Result<Server, String> {
        // Its log says why it did not start, and how long its runs took.
        let log = folder.join("serve.log");
        let complaints = std::fs::File::create(&log).map_err(|error| format!("a log: {error}"))?;
        let mut child = Command::new(programs.join("gaoler"))
            .args(["serve", "--upstream", "embedded", "--listen", "127.0.0.1:0"])
            .arg("--state")
            .arg(folder.join("state"))
            .arg("--cli")
            .arg(cli)
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(complaints)
            .spawn()
            .map_err(|error| format!("gaoler serve: {error}"))?;
        let address = ready_line(&mut child, |line| {
            let word = line.strip_prefix("ready ")?.split(' ').find_map(|word| word.strip_prefix("address="));
            word.map(ToOwned::to_owned)
        });
        let address = address.map_err(|why| {
            format!("gaoler serve: {why}\n{}", std::fs::read_to_string(&log).unwrap_or_default())
        })?;
        Ok(Server { child, address, log })
    }

    /// What its log says of the last so many runs of the CLI: how long each took to launch, and to clean up.
    fn own_times(&self, name: &'static str, runs: u32) -> Result<Row, String> {
        let log = std::fs::read_to_string(&self.log).map_err(|error| format!("its log: {error}"))?;
        let lines: Vec<serde_json::Value> =
            log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let is_cli = |line: &&serde_json::Value| line["event"] == "spawned" && line["kind"] == "cli";
        let clis: Vec<_> =
            lines.iter().rev().filter(is_cli).take(runs as usize).map(|line| &line["run"]).collect();
        let last = |event: &str, field: &str| {
            let of = |line: &&serde_json::Value| line["event"] == event && clis.contains(&&line["run"]);
            let took = lines.iter().filter(of).filter_map(|line| line[field].as_str()?.parse().ok());
            took.map(Duration::from_micros).collect()
        };
        Ok(Row { name, first: last("spawned", "launch_us"), end: last("exit", "teardown_us") })
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The supervisor.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it with all that runs: the second signal waits for nothing.
    ///
    /// # Errors
    /// An end that does not come.
    pub fn end_at_once(mut self) -> Result<(), String> {
        let pid = i32::try_from(self.child.id()).map_err(|error| error.to_string())?;
        for _ in 0..2 {
            kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|errno| format!("kill: {errno}"))?;
            std::thread::sleep(Duration::from_millis(100));
        }
        self.child.wait().map(drop).map_err(|error| format!("wait: {error}"))
    }

    /// To the first byte of text, and to the end of the response, which comes after the run's Exit.
    ///
    /// # Errors
    /// A connection that broke, or an answer that is none.
    pub fn request(&self, asked: Asked<'_>) -> Result<(Duration, Duration), String> {
        let body = serde_json::json!({
            "model": MODEL, "max_tokens": 64, "stream": true,
            "messages": [{ "role": "user", "content": asked.prompt }],
        });
        let body = body.to_string();
        let token = format!("sk-ant-oat01-bench-{}-00000000000000000000000000000000", asked.tenant);
        let limits = asked.limits.map(|limits| format!("x-gaoler-limits: {limits}\r\n")).unwrap_or_default();
        let started = Instant::now();
        let mut stream = TcpStream::connect(&self.address).map_err(|error| format!("connect: {error}"))?;
        let head = format!(
            "POST /v1/messages HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {token}\r\n{limits}\
             content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).map_err(|error| format!("send: {error}"))?;
        until_end(stream, started, MARK, "message_stop")
    }

    /// How long a health check takes.
    ///
    /// # Errors
    /// One that failed.
    pub fn health(&self) -> Result<Duration, String> {
        let started = Instant::now();
        let mut stream = TcpStream::connect(&self.address).map_err(|error| format!("connect: {error}"))?;
        let head = format!("GET /health HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.address);
        stream.write_all(head.as_bytes()).map_err(|error| format!("send: {error}"))?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map_err(|error| format!("read: {error}"))?;
        if text.starts_with("HTTP/1.1 200 ") { Ok(started.elapsed()) } else { Err(format!("health: {text}")) }
    }

    fn rss_kib(&self) -> Result<u64, String> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.map_err(|error| format!("/proc: {error}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).ok_or_else(|| "no VmRSS".into())
    }

    /// Ends it politely.
    ///
    /// # Errors
    /// An end that is not a clean one.
    pub fn end(mut self) -> Result<(), String> {
        let pid = i32::try_from(self.child.id()).map_err(|error| error.to_string())?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|errno| format!("kill: {errno}"))?;
        let status = self.child.wait().map_err(|error| format!("wait: {error}"))?;
        if status.success() { Ok(()) } else { Err(format!("gaoler serve ended with {status}")) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After a clean end this fails, and nobody minds.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The embedded upstream by itself.
struct Upstream {
    child: Child,
    address: String,
}

impl Upstream {
    fn start() -> Result<Upstream, String> {
        let mut child = Command::new(beside("gaoler-upstream")?)
            .args(["--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("gaoler-upstream: {error}"))?;
        let address = ready_line(&mut child, |line| line.strip_prefix("ready ").map(ToOwned::to_owned))?;
        Ok(Upstream { child, address })
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The CLI as the level's policy runs it, without a cage.
struct Bare {
    cli: PathBuf,
    homes: PathBuf,
    upstream: String,
}

impl Bare {
    fn new(folder: &Path, cli: PathBuf, upstream: &str) -> Result<Bare, String> {
        let homes = folder.join("homes");
        std::fs::create_dir(&homes).map_err(|error| format!("homes: {error}"))?;
        // The CLI runs as nobody, who must get through to its home.
        for place in [folder, &homes] {
            let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(place, open).map_err(|error| format!("chmod: {error}"))?;
        }
        Ok(Bare { cli, homes, upstream: format!("http://{upstream}") })
    }

    fn run(&self) -> Result<(Duration, Duration), String> {
        let home = tempfile::tempdir_in(&self.homes).map_err(|error| format!("home: {error}"))?;
        let workspace = home.path().join("workspace");
        std::fs::create_dir(&workspace).map_err(|error| format!("workspace: {error}"))?;
        for place in [home.path(), &workspace] {
            chown(place, Some(NOBODY), Some(NOBODY)).map_err(|error| format!("chown: {error}"))?;
        }
        let started = Instant::now();
        let mut command = Command::new(&self.cli);
        command
            .args(BALANCED.argv)
            .args(["--managed-settings", BALANCED.managed_settings, "--model", MODEL])
            .env_clear()
            .envs(BALANCED.env.iter().chain(BALANCED.cli_env).copied())
            .env_remove("ANTHROPIC_UNIX_SOCKET")
            .env("ANTHROPIC_BASE_URL", &self.upstream)
            .env("CLAUDE_CODE_OAUTH_TOKEN", TOKEN)
            .env("HOME", home.path())
            .env("CLAUDE_CODE_TMPDIR", home.path())
            .current_dir(&workspace)
            .uid(NOBODY)
            .gid(NOBODY)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().map_err(|error| format!("{}: {error}", self.cli.display()))?;
        let line = format!(
            r#"{{"type":"user","message":{{"role":"user","content":[{{"type":"text","text":"{PROMPT}"}}]}}}}"#
        );
        let mut stdin = child.stdin.take().ok_or("no stdin")?;
        writeln!(stdin, "{line}").map_err(|error| format!("stdin: {error}"))?;
        drop(stdin);
        let stdout = child.stdout.take().ok_or("no stdout")?;
        let (first, _) = until_end(stdout, started, MARK, "\"type\":\"result\"")?;
        child.wait().map_err(|error| format!("wait: {error}"))?;
        Ok((first, started.elapsed()))
    }
}

/// Reads to the end of the stream; the time of `first`, and of the end, which must have been preceded by
/// `last`.
fn until_end(
    mut from: impl Read,
    started: Instant,
    first: &str,
    last: &str,
) -> Result<(Duration, Duration), String> {
    let (mut text, mut buffer, mut seen) = (Vec::new(), [0; 16 * 1024], None);
    loop {
        let length = from.read(&mut buffer).map_err(|error| format!("read: {error}"))?;
        if length == 0 {
            break;
        }
        text.extend_from_slice(&buffer[..length]);
        if seen.is_none() && find(&text, first) {
            seen = Some(started.elapsed());
        }
    }
    match seen {
        Some(seen) if find(&text, last) => Ok((seen, started.elapsed())),
        _ => Err(format!("a wrong answer: {}", String::from_utf8_lossy(&text))),
    }
}

fn find(text: &[u8], word: &str) -> bool {
    text.windows(word.len()).any(|window| window == word.as_bytes())
}

/// A child's address, out of the line that says it is ready. The rest of its output is read and dropped.
fn ready_line(child: &mut Child, parse: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let stdout = child.stdout.take().ok_or("no stdout")?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                continue;
            }
        }
    });
    let deadline = Instant::now() + READY_WAIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left) {
            Ok(line) => {
                if let Some(address) = parse(&line) {
                    return Ok(address);
                }
            }
            Err(_) => {
                let _ = child.kill();
                return Err("it did not become ready".into());
            }
        }
    }
}

/// The child of this process that has this name.
///
/// # Errors
/// Where there is none.
pub fn beside_us(parent: u32, name: &str) -> Result<u32, String> {
    let entries = std::fs::read_dir("/proc").map_err(|error| format!("/proc: {error}"))?.flatten();
    let is_it = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let rest = stat.split_once(") ").map(|(before, rest)| (before.split_once('(').map(|it| it.1), rest));
        rest.is_some_and(|(comm, rest)| {
            comm == Some(name) && rest.split(' ').nth(1).and_then(|it| it.parse().ok()) == Some(parent)
        })
    };
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(is_it).ok_or_else(|| format!("{parent} has no child {name}"))
}

fn beside(name: &str) -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| format!("/proc/self/exe: {error}"))?;
    Ok(own.with_file_name(name))
}
