//! The command line: what may be asked of gaoler, in words that scripts rely on, and the exit codes.
//! It must never start anything before every flag has been understood.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, CommandFactory, Parser, Subcommand};
use gaoler_policy::settings::Settings;
use gaoler_protocol::{Limits, Message, Tier};

use crate::config::{self, Flags};
use crate::exec::{self, Request, STATUS_FAILED};
use crate::keeper::{self, Deed, KeyDeed, LedgerDeed, TenantDeed, Where};
use crate::supervisor::{Heard, Supervisor, hear};
use crate::{doctor, knobs, limits, reload, serve};

/// A failure while running.
const FAILED: u8 = 1;
/// A command line or a setting that gaoler does not understand or cannot honour.
const USAGE: u8 = 2;
/// Trying every layer takes a second or two.
const DOCTOR_WAIT: Duration = Duration::from_secs(60);

const OVERVIEW: &str = "\
Start here:
  gaoler doctor                           what this host's kernel offers, layer by layer
  sudo gaoler exec -- id                  one command in a cage
  sudo gaoler serve --upstream embedded   a server that needs no account and no network

Every command explains itself and its exit codes: gaoler COMMAND --help";

const SERVE_BEFORE: &str = "\
Examples:
  sudo gaoler serve --upstream embedded --cli ./claude
      Try it without an account: the answers come from a small built-in model.
  sudo gaoler serve --cli /usr/local/lib/gaoler/claude
      The real upstream. Each tenant sends a token of their own.
  curl http://127.0.0.1:8080/v1/messages -H 'authorization: Bearer TOKEN' \\
      -H 'content-type: application/json' \\
      -d '{\"model\":\"sonnet\",\"max_tokens\":1024,\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]}'

Settings: a flag wins over the environment, the environment over the file, the file over the default.
Unknown keys end the command. A key such as isolation.minimum is written
  [isolation]                             in the file of --config
  minimum = \"kernel\"
  GAOLER_ISOLATION__MINIMUM=kernel        in the environment
";

const SERVE_AFTER: &str = "\
Prints one line `ready tier=TIER address=ADDRESS` when tenants may come. SIGTERM or SIGINT drains. SIGHUP
reads the settings again and takes those that the table of the README marks; a line in the log says which.

Exit codes:
  0  drained after SIGTERM or SIGINT
  1  could not start, or had to stop; the reason is on stderr
  2  a flag, a variable or a key that is unknown or cannot be honoured";

const EXEC: &str = "\
Examples:
  sudo gaoler exec -- id                          another uid, no capability
  sudo gaoler exec -- sh -c 'ls -la / ; ps ax'    the view from inside
  echo hello | sudo gaoler exec -- tr a-z A-Z     stdio is relayed through pipes
  sudo gaoler exec --timeout 5 -- sleep 60        exits with 124
  sudo gaoler exec --limit memory_mib=256,tasks=32 -- make    never above the level's own limits
  sudo gaoler exec --level paranoid -- ps         fails: see policies/paranoid.toml
  sudo gaoler exec --report run.json -- make      what kept it apart and what it took
  sudo gaoler exec --tenant build -- touch seen   a workspace that stays, under that name

It works beside a running server on the same state. SIGINT, SIGTERM, SIGHUP and SIGQUIT end the run and
everything in its cage.

Exit codes:
  N      the command's own status
  124    --timeout, or the level's time or idle limit, was reached
  125    gaoler's own failure, a wrong flag or setting included; the reason is on stderr
  126    the command was found but cannot be executed
  127    the command was not found in the cage
  128+N  signal N ended the command, or gaoler itself";

const CONFIG: &str = "\
Examples:
  gaoler config check --config /etc/gaoler.toml    what gaoler serve would say to it, exit 0 or 2
  gaoler config show --config /etc/gaoler.toml     every setting, its value, and where that was written
  gaoler config default > gaoler.toml              a file to begin with
  gaoler config schema > gaoler.schema.json        for editors

Nothing is started, and no root is needed where the file can be read.";

const DOCTOR: &str = "\
Examples:
  sudo gaoler doctor           the table, with what is missing, why, and how to get it
  sudo gaoler doctor --json    {tier, guarantees, layers} for a program

Nothing is changed on the host: each layer is tried in a throw-away child.

Exit codes:
  0  the host reaches isolation.minimum
  1  it does not, or could not be tried; the reason is on stderr
  2  a flag or a variable that is unknown or cannot be honoured";

/// Runs the real Claude Code CLI for mutually hostile tenants, each run in a cage of its own.
#[derive(Parser)]
#[command(name = "gaoler", version, after_help = OVERVIEW, max_term_width = 100)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the Messages API: each request is answered by the CLI in a cage of its own
    #[command(after_help = serve_help())]
    Serve(Serve),
    /// Run any command in exactly the cage that a CLI run gets
    #[command(after_help = EXEC)]
    Exec(Exec),
    /// Say what this host offers, layer by layer
    #[command(after_help = DOCTOR)]
    Doctor(Doctor),
    /// Look at settings without starting anything
    #[command(subcommand, after_help = CONFIG)]
    Config(Config),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder
    Man {
        /// The folder, which must be there
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Keys: make one, list them, end one
    #[command(after_help = keeper::KEY)]
    Key {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        deed: KeyDeed,
    },
    /// Tenants: list them, forget one
    #[command(after_help = keeper::TENANT)]
    Tenant {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        deed: TenantDeed,
    },
    /// What is remembered: copy it, check it
    #[command(after_help = keeper::LEDGER)]
    Ledger {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        deed: LedgerDeed,
    },
    /// The frontend of a supervisor, which alone can start it.
    #[command(hide = true)]
    Frontend,
    /// A reload of a supervisor, which alone can start it.
    #[command(hide = true)]
    Resolve,
}

#[derive(Subcommand)]
enum Config {
    /// Check a file, the environment and flags as `gaoler serve` would
    Check(Serve),
    /// Show every setting in force and where its value was written
    Show {
        /// For programs
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        of: Serve,
    },
    /// Print a file with every setting at its default, each with its meaning
    Default,
    /// Print a JSON schema of such a file, for editors
    Schema,
}

#[derive(Args)]
struct Serve {
    /// A TOML file of settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to listen, HOST:PORT [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// A PEM file with the listener's certificate; with --tls-key
    #[arg(long, value_name = "FILE")]
    tls_certificate: Option<String>,
    /// A PEM file with its private key
    #[arg(long, value_name = "FILE")]
    tls_key: Option<String>,
    /// The folder of durable state [default: /var/lib/gaoler]
    #[arg(long, value_name = "DIR")]
    state: Option<String>,
    /// The Claude Code CLI, a native binary [default: /usr/local/lib/gaoler/claude]
    #[arg(long, value_name = "PATH")]
    cli: Option<String>,
    /// The API that answers, or `embedded` [default: https://api.anthropic.com]
    #[arg(long, value_name = "URL|embedded")]
    upstream: Option<String>,
    /// How strict runs are: paranoid, balanced or developer [default: balanced]
    #[arg(long, value_name = "LEVEL")]
    level: Option<String>,
    /// The weakest tier to start with: kernel, namespaces, uid or directory [default: kernel]
    #[arg(long, value_name = "TIER")]
    minimum: Option<String>,
}

#[derive(Args)]
struct Exec {
    /// The folder of durable state [default: /var/lib/gaoler]
    #[arg(long, value_name = "DIR")]
    state: Option<String>,
    /// Keep the workspace, under this name; without it the workspace dies with the run
    #[arg(long, value_name = "NAME", value_parser = exec::tenant_name)]
    tenant: Option<String>,
    /// How strict the run is: paranoid, balanced or developer [default: balanced]
    #[arg(long, value_name = "LEVEL")]
    level: Option<String>,
    /// The weakest tier to run in: kernel, namespaces, uid or directory [default: kernel]
    #[arg(long, value_name = "TIER")]
    minimum: Option<String>,
    /// End the run after this many seconds, at most a week [default: the level's limit]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=604_800))]
    timeout: Option<u32>,
    /// Lower limits of the level, such as memory_mib=256,tasks=32
    #[arg(long, value_name = "NAME=NUMBER,...", value_parser = limits::wish)]
    limit: Option<Limits>,
    /// Write a JSON report of the run
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", required = true, last = true)]
    argv: Vec<OsString>,
}

#[derive(Args)]
struct Doctor {
    /// For programs
    #[arg(long)]
    json: bool,
}

/// Parses the arguments, does what they ask, and says how it went.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // A status of `exec` that is not 125 must be the command's.
    let is_exec = arguments.get(1).is_some_and(|word| word == "exec");
    let usage = if is_exec { STATUS_FAILED } else { USAGE };
    match CommandLine::try_parse_from(&arguments) {
        // Its own way out: it ends when the supervisor does, and confines itself on the way in.
        Ok(line) => act(line.command, &arguments).into(),
        Err(error) => {
            // A closed stdout or stderr leaves nobody to tell.
            let _ = error.print();
            if error.use_stderr() { usage.into() } else { ExitCode::SUCCESS }
        }
    }
}

fn act(command: Command, arguments: &[OsString]) -> u8 {
    match command {
        Command::Serve(asked) => match serve_settings(&asked) {
            Ok(settings) => match serve::serve(&settings, arguments) {
                Ok(never) => match never {},
                Err(why) => failed(FAILED, &why),
            },
            Err(wrong) => failed(USAGE, &wrong.0),
        },
        Command::Exec(asked) => match exec_settings(&asked) {
            Ok(settings) => execute(&settings, asked),
            Err(wrong) => failed(STATUS_FAILED, &wrong.0),
        },
        Command::Doctor(asked) => match config::resolve(&Flags::default(), environment(), None) {
            Ok(settings) => diagnose(&settings, &asked).unwrap_or_else(|why| failed(FAILED, &why)),
            Err(wrong) => failed(USAGE, &wrong.0),
        },
        Command::Config(asked) => configured(asked),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut CommandLine::command(), "gaoler", &mut script);
            say(&String::from_utf8_lossy(&script));
            0
        }
        Command::Man { dir } => match clap_mangen::generate_to(CommandLine::command(), &dir) {
            Ok(()) => 0,
            Err(error) => failed(FAILED, &format!("{}: {error}", dir.display())),
        },
        Command::Key { place, deed } => keep(&place, &Deed::Key(deed)),
        Command::Tenant { place, deed } => keep(&place, &Deed::Tenant(deed)),
        Command::Ledger { place, deed } => keep(&place, &Deed::Ledger(deed)),
        Command::Frontend => crate::frontend::from_descriptors(),
        Command::Resolve => reload::resolve(),
    }
}

fn configured(asked: Config) -> u8 {
    let explained = |of: &Serve| config::explain(&serve_flags(of), environment(), of.config.as_deref());
    match asked {
        Config::Check(of) => match explained(&of) {
            Ok((_, places)) => {
                say(&format!("the settings can be honoured; {} of them are not defaults\n", places.len()));
                0
            }
            Err(wrong) => failed(USAGE, &wrong.0),
        },
        Config::Show { json, of } => match explained(&of) {
            Ok((settings, places)) => {
                let shown = knobs::Shown::new(&settings, &places);
                say(&if json { shown.json() } else { shown.text() });
                0
            }
            Err(wrong) => failed(USAGE, &wrong.0),
        },
        Config::Default => {
            say(&knobs::file());
            0
        }
        Config::Schema => {
            say(&format!("{:#}\n", knobs::schema()));
            0
        }
    }
}

fn keep(place: &Where, deed: &Deed) -> u8 {
    let flags = Flags::default().with("--state", "state.dir", place.state.clone());
    match config::resolve(&flags, environment(), place.config.as_deref()) {
        Ok(settings) => match keeper::act(&settings, place, deed) {
            Ok(text) => {
                say(&text);
                0
            }
            Err(why) => failed(FAILED, &why),
        },
        Err(wrong) => failed(USAGE, &wrong.0),
    }
}

fn failed(status: u8, why: &str) -> u8 {
    eprintln!("gaoler: {why}");
    status
}

fn serve_settings(asked: &Serve) -> Result<Settings, config::Wrong> {
    config::resolve(&serve_flags(asked), environment(), asked.config.as_deref())
}

/// The settings of a server that was called like this, as they are now.
///
/// # Errors
/// What is wrong with them, as a sentence.
pub fn settings_of_server(
    arguments: &[OsString],
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Settings, String> {
    match CommandLine::try_parse_from(arguments).map(|line| line.command) {
        Ok(Command::Serve(asked)) => {
            config::resolve(&serve_flags(&asked), environment, asked.config.as_deref())
                .map_err(|wrong| wrong.0)
        }
        _ => Err("the arguments of this server are none of `gaoler serve`".into()),
    }
}

fn serve_flags(asked: &Serve) -> Flags {
    Flags::default()
        .with("--listen", "server.listen", asked.listen.clone())
        .with("--tls-certificate", "server.tls_certificate", asked.tls_certificate.clone())
        .with("--tls-key", "server.tls_key", asked.tls_key.clone())
        .with("--state", "state.dir", asked.state.clone())
        .with("--cli", "cli.path", asked.cli.clone())
        .with("--upstream", "upstream.url", asked.upstream.clone())
        .with("--level", "level.default", asked.level.clone())
        .with("--minimum", "isolation.minimum", asked.minimum.clone())
}

fn serve_help() -> String {
    [SERVE_BEFORE, &knobs::help(), SERVE_AFTER].join("\n")
}

fn exec_settings(asked: &Exec) -> Result<Settings, config::Wrong> {
    let flags = Flags::default()
        .with("--state", "state.dir", asked.state.clone())
        .with("--level", "level.default", asked.level.clone())
        // Whoever may run this is root, and bound by no maximum but a wish of their own.
        .with("--level", "level.maximum", asked.level.clone())
        .with("--minimum", "isolation.minimum", asked.minimum.clone());
    config::resolve(&flags, environment(), None)
}

/// The variables that could be gaoler's. Others need not even be text.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
}

fn execute(settings: &Settings, asked: Exec) -> u8 {
    let Exec { tenant, timeout, limit, report, argv, .. } = asked;
    let mut limits = limit.unwrap_or(Limits::NONE);
    if let Some(seconds) = timeout {
        limits.wall_ms = seconds.saturating_mul(1000);
    }
    let request = Request { tenant, limits, report, argv };
    let status = config::level(&settings.level.default)
        .and_then(|level| exec::exec(settings, level, &request))
        .unwrap_or_else(|why| failed(STATUS_FAILED, &why));
    // Threads of the relay may still be blocked on our own stdin; nothing waits for them.
    status
}

fn diagnose(settings: &Settings, asked: &Doctor) -> Result<u8, String> {
    let supervisor = Supervisor::start("doctor", settings)?;
    let heard = hear(supervisor.control(), None, Some(Instant::now() + DOCTOR_WAIT));
    supervisor.end();
    let layers = match heard {
        Heard::Message(Message::Layers(layers), _) => layers,
        Heard::Message(other, _) => return Err(format!("the supervisor said {}", other.name())),
        Heard::Ended => return Err("the supervisor did not start; its own message says why".into()),
        Heard::Broken(why) => return Err(format!("the supervisor sent {why}")),
        Heard::Interrupted | Heard::Late => {
            return Err(format!("the layers were not tried in {} s", DOCTOR_WAIT.as_secs()));
        }
    };
    match asked.json {
        true => say(&format!("{:#}\n", doctor::json(&layers))),
        false => say(&doctor::render_table(&layers, std::io::stdout().is_terminal())),
    }
    let minimum = Tier::from_name(&settings.isolation.minimum).unwrap_or(Tier::Kernel);
    Ok(if layers.tier >= minimum { 0 } else { FAILED })
}

/// Prints; a reader who has gone away is not an error of ours.
fn say(text: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn wrong_usage_has_its_status() {
        let status = |words: &[&str]| format!("{:?}", run(words.iter().map(OsString::from)));
        let code = |number: u8| format!("{:?}", ExitCode::from(number));
        let rows: &[(&[&str], u8)] = &[
            (&["gaoler"], 2),
            (&["gaoler", "--help"], 0),
            (&["gaoler", "--version"], 0),
            (&["gaoler", "frontend", "x"], 2),
            (&["gaoler", "serve", "--no-such-flag"], 2),
            (&["gaoler", "serve", "--level", "lax"], 2),
            (&["gaoler", "serve", "--level", "developer"], 2),
            (&["gaoler", "serve", "--minimum", "lax"], 2),
            (&["gaoler", "serve", "--listen", "0.0.0.0:1"], 2),
            (&["gaoler", "doctor", "--nope"], 2),
            (&["gaoler", "config"], 2),
            (&["gaoler", "config", "check"], 0),
            (&["gaoler", "config", "check", "--level", "lax"], 2),
            (&["gaoler", "config", "check", "--config", "/no/such/file"], 2),
            (&["gaoler", "config", "show", "--json"], 0),
            (&["gaoler", "config", "schema"], 0),
            (&["gaoler", "completions", "bash"], 0),
            (&["gaoler", "completions", "tcsh"], 2),
            (&["gaoler", "man", "/no/such/folder"], 1),
            (&["gaoler", "key"], 2),
            (&["gaoler", "key", "create"], 2),
            (&["gaoler", "key", "create", "--admin", "--tenant", "x"], 2),
            (&["gaoler", "key", "create", "--admin", "--expires-in", "0"], 2),
            (&["gaoler", "ledger", "backup"], 2),
            (&["gaoler", "exec"], 125),
            (&["gaoler", "exec", "id"], 125),
            (&["gaoler", "exec", "--help"], 0),
            (&["gaoler", "exec", "--timeout", "0", "--", "id"], 125),
            (&["gaoler", "exec", "--tenant", "../x", "--", "id"], 125),
            (&["gaoler", "exec", "--level", "lax", "--", "id"], 125),
            (&["gaoler", "exec", "--limit", "nice=1", "--", "id"], 125),
            (&["gaoler", "exec", "--limit", "tasks=0", "--", "id"], 125),
        ];
        for (words, expected) in rows {
            assert_eq!(status(words), code(*expected), "{words:?}");
        }
    }

    #[test]
    fn serve_help_names_every_key_with_its_default() {
        let table = toml::Table::try_from(Settings::default()).expect("a table");
        for (section, keys) in &table {
            for (key, value) in keys.as_table().expect("sections only") {
                let name = format!("{section}.{key}");
                let help = serve_help();
                let line = help.lines().find(|line| line.trim_start().starts_with(&format!("{name} ")));
                let value = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
                assert!(line.is_some_and(|line| line.contains(&value)), "{name} = {value}");
            }
        }
    }
}
