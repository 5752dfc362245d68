//! `gaoler key`, `gaoler tenant` and `gaoler ledger`: root's questions to the ledger, whether a server runs or not.
//! It must never open the database itself: gaoler-ledger does, under the ledger's uid and confined as ever.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::{Args, Subcommand};
use gaoler_ledger_wire::{
    Answer, FRAME_BYTES_MAX, KeyKind, KeyRow, Question, ROWS_MAX, Refusal, TenantRow, Told, decode, encode,
};
use gaoler_policy::settings::Settings;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::allowance;
use crate::frontend::identity;

/// For `gaoler key --help`.
pub const KEY: &str = "\
Examples:
  sudo gaoler key create --tenant acme                     a key of the tenant acme, who is made where there is none
  sudo gaoler key create --tenant acme --label ci --expires-in 30
  sudo gaoler key create --admin --label grafana           a key of the operator's own routes
  sudo gaoler key list --tenant acme --json
  sudo gaoler key revoke 0123456789abcdef                  at once, also in a server that runs

A key is printed once and kept as its hash alone. It works beside a running server, and without one.

Exit codes: 0 done, 1 not done (the reason is on stderr), 2 a flag or a setting that cannot be honoured";

/// For `gaoler tenant --help`.
pub const TENANT: &str = "\
Examples:
  sudo gaoler tenant list
  sudo gaoler tenant limits acme      what it may, where that is not what the settings say
  sudo gaoler tenant limits acme tokens_per_day=2000000 tenant_max=4 cost_per_day_usd=default
  sudo gaoler tenant remove acme      its keys, its stored credential and its links; files and usage stay

Exit codes: 0 done, 1 not done (the reason is on stderr), 2 a flag or a setting that cannot be honoured";

/// For `gaoler ledger --help`.
pub const LEDGER: &str = "\
Examples:
  sudo gaoler ledger backup /var/backups/ledger.db    a whole copy, also while a server writes
  sudo gaoler ledger check                            reads every page and says what is wrong

To restore: stop the server, put the copy in place of STATE/ledger/ledger.db (the owner and mode of the old one),
remove ledger.db-wal and ledger.db-shm beside it, and start the server.

Exit codes: 0 done and whole, 1 not (the reason is on stderr), 2 a flag or a setting that cannot be honoured";

/// Where the state is.
#[derive(Args)]
pub struct Where {
    /// A TOML file of settings
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// The folder of durable state [default: /var/lib/gaoler]
    #[arg(long, value_name = "DIR", global = true)]
    pub state: Option<String>,
    /// For programs
    #[arg(long, global = true)]
    json: bool,
}

/// What may be done.
pub enum Deed {
    /// With keys.
    Key(KeyDeed),
    /// With tenants.
    Tenant(TenantDeed),
    /// With the database.
    Ledger(LedgerDeed),
}

/// `gaoler key`
#[derive(Subcommand)]
pub enum KeyDeed {
    /// Make a key and print it, this once
    Create(Create),
    /// List keys
    List {
        /// Of this tenant alone, by name or id
        #[arg(long, value_name = "NAME")]
        tenant: Option<String>,
    },
    /// End a key
    Revoke {
        /// Its 16 digits: what stands between `gaol_t_` and the next `_`
        id: String,
    },
}

/// `gaoler key create`
#[derive(Args)]
#[command(group = clap::ArgGroup::new("whose").required(true).args(["tenant", "admin"]))]
pub struct Create {
    /// Whose, by name; made where there is none
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// The operator's
    #[arg(long)]
    admin: bool,
    /// A word for people
    #[arg(long, value_name = "TEXT", default_value = "")]
    label: String,
    /// End it after this many days [default: never]
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=3660))]
    expires_in: Option<u32>,
}

/// `gaoler tenant`
#[derive(Subcommand)]
pub enum TenantDeed {
    /// List tenants
    List,
    /// Show what a tenant may, or change it: NAME=NUMBER, or NAME=default for what the settings say of everybody
    Limits {
        /// By name or id
        name: String,
        /// tenant_per_minute, tenant_max, tokens_per_day, tokens_per_month, cost_per_day_usd, cost_per_month_usd
        #[arg(value_name = "NAME=NUMBER")]
        changes: Vec<String>,
    },
    /// Forget a tenant's keys, stored credential and links
    Remove {
        /// By name or id
        name: String,
    },
}

/// `gaoler ledger`
#[derive(Subcommand)]
pub enum LedgerDeed {
    /// Write a whole copy of the database
    Backup {
        /// A file that is not there yet
        file: PathBuf,
    },
    /// Read every page and say what is wrong
    Check,
}

/// Does it; what to print.
///
/// # Errors
/// What stands in the way, as a sentence.
pub fn act(settings: &Settings, place: &Where, deed: &Deed) -> Result<String, String> {
    let ledger = Ledger::find(settings)?;
    match deed {
        Deed::Key(KeyDeed::Create(asked)) => create(&ledger, asked, place.json),
        Deed::Key(KeyDeed::List { tenant }) => {
            let keys = all(|after| {
                let (tenant, after) = (tenant.clone(), after.map(|key: &KeyRow| key.id.clone()));
                match ledger.ask(&Question::Keys { tenant, after, limit: ROWS_MAX })? {
                    Answer::Keys(keys) => Ok(keys),
                    other => Err(unexpected(&other)),
                }
            })?;
            match place.json {
                true => Ok(line(&Value::from(keys.iter().map(key_json).collect::<Vec<_>>()))),
                false => Ok(table(
                    &["KEY", "TENANT", "LABEL", "CREATED", "EXPIRES", "LAST USED", "STATE"],
                    keys.iter().map(key_row),
                )),
            }
        }
        Deed::Key(KeyDeed::Revoke { id }) => {
            let id = id.trim_start_matches("gaol_t_").trim_start_matches("gaol_a_");
            let id = id.split('_').next().unwrap_or_default().to_owned();
            ledger.ask(&Question::RevokeKey { id: id.clone() })?;
            Ok(if place.json {
                line(&json!({ "revoked": id }))
            } else {
                format!("{id} can no longer be used\n")
            })
        }
        Deed::Tenant(TenantDeed::List) => {
            let tenants = all(|after| {
                let after = after.map(|tenant: &TenantRow| tenant.name.clone());
                match ledger.ask(&Question::Tenants { after, limit: ROWS_MAX })? {
                    Answer::Tenants(tenants) => Ok(tenants),
                    other => Err(unexpected(&other)),
                }
            })?;
            match place.json {
                true => Ok(line(&Value::from(tenants.iter().map(tenant_json).collect::<Vec<_>>()))),
                false => Ok(table(
                    &["TENANT", "ID", "CREATED", "KEYS", "CREDENTIAL", "LINKS"],
                    tenants.iter().map(|tenant| {
                        let stored = if tenant.credential { "stored" } else { "-" };
                        [
                            tenant.name.clone(),
                            tenant.id.clone(),
                            moment(Some(tenant.created_at)),
                            tenant.keys.to_string(),
                            stored.into(),
                            tenant.links.to_string(),
                        ]
                    }),
                )),
            }
        }
        Deed::Tenant(TenantDeed::Limits { name, changes }) => {
            let found = match ledger.ask(&Question::Allowance { tenant: name.clone() })? {
                Answer::Allowance(allowance) => allowance,
                other => return Err(unexpected(&other)),
            };
            let allowance = allowance::change(&found, changes)?;
            if allowance != found {
                ledger.ask(&Question::Allow { tenant: name.clone(), allowance })?;
            }
            let form = allowance::json(&allowance);
            let rows = form.as_object().into_iter().flatten();
            match place.json {
                true => Ok(line(&form)),
                false => Ok(table(
                    &["LIMIT", "VALUE"],
                    rows.map(|(name, value)| {
                        [
                            name.clone(),
                            if value.is_null() { "(the server's)".into() } else { value.to_string() },
                        ]
                    }),
                )),
            }
        }
        Deed::Tenant(TenantDeed::Remove { name }) => {
            ledger.ask(&Question::RemoveTenant { tenant: name.clone() })?;
            Ok(if place.json { line(&json!({ "removed": name })) } else { format!("{name} is forgotten\n") })
        }
        Deed::Ledger(LedgerDeed::Backup { file }) => {
            let bytes = ledger.backup(file)?;
            let file = file.display().to_string();
            Ok(if place.json {
                line(&json!({ "file": file, "bytes": bytes }))
            } else {
                format!("{file}: {bytes} bytes\n")
            })
        }
        Deed::Ledger(LedgerDeed::Check) => match ledger.ask(&Question::Integrity)? {
            Answer::Integrity(wrong) if wrong.is_empty() => Ok(if place.json {
                line(&json!({ "whole": true }))
            } else {
                "the database is whole\n".into()
            }),
            Answer::Integrity(wrong) => {
                Err(format!("the database is damaged: {}; restore a backup", wrong.join("; ")))
            }
            other => Err(unexpected(&other)),
        },
    }
}

fn create(ledger: &Ledger, asked: &Create, json: bool) -> Result<String, String> {
    let kind = if asked.admin { KeyKind::Admin } else { KeyKind::Tenant };
    let key = identity::issue(kind);
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let expires_at = asked.expires_in.map(|days| now + i64::from(days) * 86_400);
    ledger.ask(&Question::CreateKey {
        id: key.id.clone(),
        hash: key.hash.clone(),
        kind,
        tenant: asked.tenant.clone(),
        make_tenant: true,
        label: asked.label.clone(),
        expires_at,
    })?;
    if json {
        return Ok(line(&json!({
            "id": key.id,
            "key": *key.text,
            "kind": kind,
            "tenant": asked.tenant,
            "label": asked.label,
            "expires_at": expires_at.and_then(rfc3339),
        })));
    }
    // The key alone is on stdout, so that `KEY=$(gaoler key create ...)` works.
    eprintln!("This key is shown only now; `gaoler key revoke {}` ends it.", key.id);
    Ok(format!("{}\n", *key.text))
}

/// The ledger's program and its folder.
struct Ledger {
    program: PathBuf,
    folder: PathBuf,
    uid: u32,
}

impl Ledger {
    fn find(settings: &Settings) -> Result<Ledger, String> {
        let own = std::env::current_exe().map_err(|error| format!("find the own program: {error}"))?;
        let (state, folder) = (&settings.state.dir, settings.state.dir.join("ledger"));
        if !folder.exists() {
            make(state, &folder, settings.uids.ledger)?;
        }
        let what = || format!("look at {}", folder.display());
        let uid = folder.symlink_metadata().map_err(|error| format!("{}: {error}", what()))?.uid();
        let own_uid = nix::unistd::geteuid();
        if uid != own_uid.as_raw() && !own_uid.is_root() {
            return Err(format!("{} belongs to uid {uid}; run this as root", folder.display()));
        }
        Ok(Ledger { program: own.with_file_name("gaoler-ledger"), folder, uid })
    }

    fn command(&self, word: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--folder").arg(&self.folder).args(["--uid", &self.uid.to_string(), word]).env_clear();
        command
    }

    fn ask(&self, question: &Question) -> Result<Answer, String> {
        let frame = encode(question)?;
        let failed = |error: std::io::Error| format!("{}: {error}", self.program.display());
        let mut child =
            self.command("ask").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        // A ledger that cannot start says so on stderr; that its stdin is closed then is no news.
        let _ = child.stdin.take().map(|mut stdin| stdin.write_all(&frame));
        let mut told = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(FRAME_BYTES_MAX as u64).read_to_end(&mut told).map_err(failed)?;
        }
        if !child.wait().map_err(failed)?.success() {
            return Err("the ledger gave no answer; its own line above says why".into());
        }
        let told: Told = decode(&told).map_err(|why| format!("the ledger's answer is none: {why}"))?;
        told.answer.map_err(|refusal| refused(refusal, question))
    }

    fn backup(&self, path: &Path) -> Result<u64, String> {
        let failed =
            |error: std::io::Error| format!("{}: {error}; name a file that is not there yet", path.display());
        let file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        let out = file.try_clone().map_err(failed)?;
        let status = self.command("backup").stdin(Stdio::null()).stdout(out).status();
        let done = status.map_err(failed)?.success() && file.sync_all().is_ok();
        match (done, file.metadata()) {
            (true, Ok(found)) => Ok(found.len()),
            _ => {
                let _ = std::fs::remove_file(path);
                Err("there is no copy; the ledger's own line above says why".into())
            }
        }
    }
}

/// Makes the folder as a server would, so that keys can be made before the first start.
fn make(state: &Path, folder: &Path, uid: u32) -> Result<(), String> {
    let failed =
        |error: std::io::Error| format!("{}: {error}; name the state folder with --state", folder.display());
    if !nix::unistd::geteuid().is_root() {
        return Err(format!("{} is not there; start the server once, or run this as root", folder.display()));
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state).map_err(failed)?;
    std::fs::DirBuilder::new().mode(0o700).create(folder).map_err(failed)?;
    std::os::unix::fs::chown(folder, Some(uid), Some(uid)).map_err(failed)
}

fn refused(refusal: Refusal, question: &Question) -> String {
    let what = match (refusal, question) {
        (Refusal::NotFound, Question::RevokeKey { .. }) => {
            "there is no such key; `gaoler key list` names them"
        }
        (Refusal::NotFound, _) => "there is no such tenant; `gaoler tenant list` names them",
        (Refusal::Conflict, _) => "there is one already",
        (Refusal::Invalid, _) => {
            "a tenant's name is 1 to 64 letters, digits, `.`, `_`, `@` and `-` (a letter or digit first), a label one \
             line of at most 64 bytes"
        }
        (Refusal::Failed, _) => "the database failed; the ledger's own line above says how",
        _ => "the ledger refused",
    };
    what.into()
}

fn unexpected(answer: &Answer) -> String {
    format!("the ledger answered something else: {}", std::any::type_name_of_val(answer))
}

/// All pages of a list.
fn all<T>(mut page: impl FnMut(Option<&T>) -> Result<Vec<T>, String>) -> Result<Vec<T>, String> {
    let mut rows = Vec::new();
    loop {
        let more = page(rows.last())?;
        let last = more.len() < ROWS_MAX as usize;
        rows.extend(more);
        if last {
            return Ok(rows);
        }
    }
}

fn state(key: &KeyRow) -> &'static str {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    match key {
        KeyRow { revoked_at: Some(_), .. } => "revoked",
        KeyRow { expires_at: Some(at), .. } if *at <= now => "expired",
        _ => "active",
    }
}

fn key_row(key: &KeyRow) -> [String; 7] {
    [
        format!("{}{}", key.kind.prefix(), key.id),
        key.tenant.clone().unwrap_or_else(|| "(admin)".into()),
        if key.label.is_empty() { "-".into() } else { key.label.clone() },
        moment(Some(key.created_at)),
        moment(key.expires_at),
        moment(key.last_used_at),
        state(key).into(),
    ]
}

/// A key, for programs.
pub fn key_json(key: &KeyRow) -> Value {
    json!({
        "id": key.id,
        "kind": key.kind,
        "tenant": key.tenant,
        "label": key.label,
        "created_at": rfc3339(key.created_at),
        "expires_at": key.expires_at.and_then(rfc3339),
        "revoked_at": key.revoked_at.and_then(rfc3339),
        "last_used_at": key.last_used_at.and_then(rfc3339),
        "state": state(key),
    })
}

/// A tenant, for programs.
pub fn tenant_json(tenant: &TenantRow) -> Value {
    json!({
        "id": tenant.id,
        "name": tenant.name,
        "created_at": rfc3339(tenant.created_at),
        "keys": tenant.keys,
        "credential_stored": tenant.credential,
        "links": tenant.links,
    })
}

fn rfc3339(seconds: i64) -> Option<String> {
    OffsetDateTime::from_unix_timestamp(seconds).ok()?.format(&Rfc3339).ok()
}

fn moment(seconds: Option<i64>) -> String {
    seconds.and_then(rfc3339).unwrap_or_else(|| "-".into())
}

fn line(value: &Value) -> String {
    format!("{value}\n")
}

fn table<const N: usize>(head: &[&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let head = head.map(str::to_owned);
    let rows: Vec<[String; N]> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..N).map(width).collect();
    let text = |row: &[String; N]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(text).collect()
}
