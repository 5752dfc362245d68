//! The answers to questions, out of the database and into it.
//! It must never answer with a secret but to whoever has proved to be its tenant, nor change anything halfway.

use gaoler_ledger_wire::{
    Allowance, Answer, Counted, Grant, Hex, KeptCredential, KeptServers, KeyKind, KeyRow, NAME_BYTES_MAX,
    Proof, Question, ROWS_MAX, Refusal, RunRecord, RunRow, SEALED_BYTES_MAX, SERVED_MAX, SERVERS_BYTES_MAX,
    SESSION_CHARS, TenantRow, UsageDay, Who,
};
use rusqlite::types::Value;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, params, params_from_iter};
use subtle::ConstantTimeEq;

use crate::rights::{Asker, permits};
use crate::time::{DAY, now};

/// How exact the time of a key's last use is, in seconds: a write for each request would be one too many.
const LAST_USE_EXACT: i64 = 60;
/// What a tenant's id begins with; no name does.
const TENANT_PREFIX: &str = "tn_";
/// How often old rows are looked for, in seconds, and how many of them go at a time.
const PRUNE_EVERY: i64 = 3600;
const PRUNE_ROWS: u32 = 10_000;
/// Keys of one tenant, links of one tenant, and tenants, at most.
const KEYS_MAX: i64 = 1000;
const LINKS_MAX: i64 = 100;
const TENANTS_MAX: i64 = 100_000;

/// Days that are kept.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    /// Of runs.
    pub runs_days: u32,
    /// Of sums.
    pub usage_days: u32,
}

/// The database, and what is to be written when nobody waits.
pub struct Book {
    database: Connection,
    touched: Vec<String>,
    pruned_at: i64,
}

type Answered = Result<Answer, Refusal>;

/// Whether a question may change something.
#[must_use]
pub fn writes(question: &Question) -> bool {
    match question {
        Question::Who
        | Question::Usage { .. }
        | Question::Runs { .. }
        | Question::Tenants { .. }
        | Question::Keys { .. }
        | Question::Allowance { .. }
        | Question::Servers { .. }
        | Question::Served
        | Question::Integrity => false,
        Question::KeepCredential { .. }
        | Question::DropCredential
        | Question::Link { .. }
        | Question::Unlink { .. }
        | Question::KeepServers { .. }
        | Question::DropServers { .. }
        | Question::Record(_)
        | Question::CreateTenant { .. }
        | Question::RemoveTenant { .. }
        | Question::Allow { .. }
        | Question::CreateKey { .. }
        | Question::RevokeKey { .. } => true,
    }
}

impl Book {
    /// Over an open database.
    pub fn new(database: Connection) -> Book {
        Book { database, touched: Vec::new(), pruned_at: 0 }
    }

    /// Answers all of these, in order, with one commit: when this returns, what was answered is on the disk.
    pub fn answer_all(&mut self, questions: Vec<(Option<Proof>, Question)>) -> Vec<Answered> {
        let count = questions.len();
        let any = questions.iter().any(|(_, question)| writes(question));
        let failed = |error: &rusqlite::Error| {
            log("batch", error);
            vec![Err(Refusal::Failed); count]
        };
        if any && let Err(error) = self.database.execute_batch("BEGIN IMMEDIATE") {
            return failed(&error);
        }
        let answers: Vec<Answered> = questions
            .into_iter()
            .map(|(by, question)| {
                let asker = match (self.who(by.as_ref())?, by) {
                    (Who::Unlinked, Some(Proof::Credential { digest })) => Asker::Credential(digest),
                    (who, _) => Asker::Frontend(who),
                };
                self.answer(&asker, question, any)
            })
            .collect();
        if any && let Err(error) = self.database.execute_batch("COMMIT") {
            let _ = self.database.execute_batch("ROLLBACK");
            return failed(&error);
        }
        answers
    }

    /// Answers root's command line.
    ///
    /// # Errors
    /// As every answer.
    pub fn answer_root(&mut self, question: Question) -> Answered {
        let any = writes(&question);
        let sql = |sql| self.database.execute_batch(sql).map_err(|error| refused("begin", &error));
        if any {
            sql("BEGIN IMMEDIATE")?;
        }
        let answer = self.answer(&Asker::Root, question, any);
        if any {
            self.database.execute_batch("COMMIT").map_err(|error| refused("commit", &error))?;
        }
        answer
    }

    /// One question, which is undone where it fails.
    fn answer(&mut self, asker: &Asker, question: Question, savepoint: bool) -> Answered {
        if !permits(asker, &question) {
            return Err(Refusal::Forbidden);
        }
        if !savepoint {
            return self.act(asker, question);
        }
        let sql =
            |book: &Book, sql| book.database.execute_batch(sql).map_err(|error| refused("savepoint", &error));
        sql(self, "SAVEPOINT one")?;
        let answer = self.act(asker, question);
        sql(self, if answer.is_ok() { "RELEASE one" } else { "ROLLBACK TO one; RELEASE one" })?;
        answer
    }

    fn act(&mut self, asker: &Asker, question: Question) -> Answered {
        let tenant = match asker {
            Asker::Frontend(Who::Tenant(grant)) => grant.tenant.as_str(),
            _ => "",
        };
        let owner = asker.owner().unwrap_or_default();
        match question {
            Question::Who => match asker {
                Asker::Frontend(who) => Ok(Answer::Who(who.clone())),
                Asker::Credential(_) => Ok(Answer::Who(Who::Unlinked)),
                Asker::Root => Err(Refusal::Forbidden),
            },
            Question::KeepCredential { sealed, scheme, vault } => {
                check(sealed.0.len() <= SEALED_BYTES_MAX && vault.0.len() == 32 && scheme.len() <= 16)?;
                let sql = "INSERT OR REPLACE INTO credentials VALUES (?1, ?2, ?3, ?4, ?5)";
                self.run(sql, params![tenant, sealed.0, scheme, vault.0, now()])?;
                Ok(Answer::Done)
            }
            Question::DropCredential => {
                self.one("DELETE FROM credentials WHERE tenant = ?1", params![tenant])
            }
            Question::Link { digest } => self.link(tenant, &digest),
            Question::Unlink { digest } => {
                self.one("DELETE FROM links WHERE digest = ?1 AND tenant = ?2", params![digest.0, tenant])
            }
            Question::Servers { session } => self.servers(&owner, session),
            Question::Served => {
                let sql = "SELECT session FROM session_servers WHERE owner = ?1 ORDER BY session";
                Ok(Answer::Served(self.rows(sql, vec![owner.into()], |row| row.get(0))?))
            }
            Question::KeepServers { session, locked, used_at } => {
                self.keep_servers(&owner, &session, &locked, used_at)
            }
            Question::DropServers { sessions } => {
                for session in sessions {
                    let sql = "DELETE FROM session_servers WHERE owner = ?1 AND session = ?2";
                    self.run(sql, params![owner, session])?;
                }
                Ok(Answer::Done)
            }
            Question::Record(record) => self.record(&record),
            Question::Usage { tenant, before, limit } => self.usage(tenant, before.as_deref(), limit),
            Question::Runs { tenant, before, limit } => self.runs(tenant, before, limit),
            Question::CreateTenant { name } => self.create_tenant(&name).map(|_| Answer::Done),
            Question::Tenants { after, limit } => self.tenants(after, limit),
            Question::RemoveTenant { tenant } => {
                let id = self.tenant(&tenant)?.ok_or(Refusal::NotFound)?;
                self.run("DELETE FROM session_servers WHERE owner = ?1", params![id])?;
                self.one("DELETE FROM tenants WHERE id = ?1", params![id])
            }
            Question::Allowance { tenant } => self.allowance(&tenant),
            Question::Allow { tenant, allowance } => self.allow(&tenant, &allowance),
            Question::CreateKey { id, hash, kind, tenant, make_tenant, label, expires_at } => {
                let owner = self.owner(kind, tenant.as_deref(), make_tenant)?;
                check(is_hex(&id, 16) && hash.0.len() == 32 && is_label(&label))?;
                check(expires_at.is_none_or(|at| at > now()))?;
                let many = "SELECT count(*) FROM keys WHERE tenant IS ?1";
                check(self.count(many, params![owner])? < KEYS_MAX)?;
                let sql = "INSERT INTO keys VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, NULL, NULL)";
                self.run(sql, params![id, word(kind), owner, hash.0, label, now(), expires_at])?;
                Ok(Answer::Done)
            }
            Question::Keys { tenant, after, limit } => self.keys(tenant.as_deref(), after, limit),
            Question::RevokeKey { id } => {
                let sql = "UPDATE keys SET revoked_at = ?2 WHERE id = ?1 AND revoked_at IS NULL";
                match self.run(sql, params![id, now()])? {
                    0 if self.count("SELECT count(*) FROM keys WHERE id = ?1", params![id])? == 0 => {
                        Err(Refusal::NotFound)
                    }
                    _ => Ok(Answer::Done),
                }
            }
            Question::Integrity => {
                let whole: Vec<String> = self.rows("PRAGMA integrity_check", vec![], |row| row.get(0))?;
                let orphans: Vec<String> = self.rows("PRAGMA foreign_key_check", vec![], |row| {
                    Ok(format!("a row of {} has no parent", row.get::<_, String>(0)?))
                })?;
                let wrong = whole.into_iter().filter(|line| line != "ok").chain(orphans).take(20);
                Ok(Answer::Integrity(wrong.collect()))
            }
        }
    }

    /// Who shows this.
    ///
    /// # Errors
    /// A key that is none, or none any more.
    fn who(&mut self, by: Option<&Proof>) -> Result<Who, Refusal> {
        match by {
            None => Ok(Who::Unlinked),
            Some(Proof::Key { id, hash }) => {
                let sql =
                    "SELECT kind, hash, expires_at, revoked_at, last_used_at, tenant FROM keys WHERE id = ?1";
                type Found = (String, Vec<u8>, Option<i64>, Option<i64>, Option<i64>, Option<String>);
                let found: Option<Found> = self
                    .database
                    .prepare(sql)
                    .and_then(|mut sql| {
                        sql.query_row(params![id], |row| {
                            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?))
                        })
                        .optional()
                    })
                    .map_err(|error| refused("key", &error))?;
                let (kind, kept, expires_at, revoked_at, last_used_at, tenant) =
                    found.ok_or(Refusal::KeyUnknown)?;
                if !bool::from(kept.as_slice().ct_eq(&hash.0)) {
                    return Err(Refusal::KeyUnknown);
                }
                if revoked_at.is_some() {
                    return Err(Refusal::KeyRevoked);
                }
                if expires_at.is_some_and(|at| at <= now()) {
                    return Err(Refusal::KeyExpired);
                }
                if last_used_at.is_none_or(|at| at + LAST_USE_EXACT <= now()) && !self.touched.contains(id) {
                    self.touched.push(id.clone());
                }
                match (kind.as_str(), tenant) {
                    ("admin", None) => Ok(Who::Admin),
                    (_, Some(tenant)) => self.grant(&tenant, Some(id), expires_at),
                    _ => Err(Refusal::KeyUnknown),
                }
            }
            Some(Proof::Credential { digest }) => {
                let tenant: Option<String> = self
                    .database
                    .prepare("SELECT tenant FROM links WHERE digest = ?1")
                    .and_then(|mut sql| sql.query_row(params![digest.0], |row| row.get(0)).optional())
                    .map_err(|error| refused("link", &error))?;
                tenant.map_or(Ok(Who::Unlinked), |tenant| self.grant(&tenant, None, None))
            }
        }
    }

    fn grant(&self, tenant: &str, key: Option<&String>, expires_at: Option<i64>) -> Result<Who, Refusal> {
        let columns = Allowance::COLUMNS.join(", ");
        let sql = format!(
            "SELECT name, secret, sealed, scheme, vault, stored_at, {columns} FROM tenants \
             LEFT JOIN credentials c ON c.tenant = id LEFT JOIN allowances a ON a.tenant = id WHERE id = ?1"
        );
        let read = |row: &Row<'_>| -> rusqlite::Result<Grant> {
            let credential = match row.get::<_, Option<Vec<u8>>>(2)? {
                None => None,
                Some(sealed) => Some(KeptCredential {
                    sealed: Hex(sealed),
                    scheme: row.get(3)?,
                    vault: Hex(row.get(4)?),
                    stored_at: row.get(5)?,
                }),
            };
            Ok(Grant {
                tenant: tenant.to_owned(),
                name: row.get(0)?,
                secret: Hex(row.get(1)?),
                key: key.cloned(),
                expires_at,
                credential,
                allowance: allowance(row, 6)?,
            })
        };
        let grant = self.database.prepare(&sql).and_then(|mut sql| sql.query_row([tenant], read));
        Ok(Who::Tenant(Box::new(grant.map_err(|error| refused("grant", &error))?)))
    }

    fn link(&self, tenant: &str, digest: &Hex) -> Answered {
        check(digest.0.len() == 32)?;
        let sql = "SELECT tenant FROM links WHERE digest = ?1";
        let owner: Option<String> = self
            .database
            .query_row(sql, params![digest.0], |row| row.get(0))
            .optional()
            .map_err(|error| refused("link", &error))?;
        match owner {
            Some(owner) if owner == tenant => Ok(Answer::Done),
            Some(_) => Err(Refusal::Conflict),
            None => {
                let many = "SELECT count(*) FROM links WHERE tenant = ?1";
                check(self.count(many, params![tenant])? < LINKS_MAX)?;
                self.run("INSERT INTO links VALUES (?1, ?2, ?3)", params![digest.0, tenant, now()])?;
                Ok(Answer::Done)
            }
        }
    }

    fn servers(&self, owner: &str, session: String) -> Answered {
        let sql = "SELECT locked, used_at FROM session_servers WHERE owner = ?1 AND session = ?2";
        let kept = self.rows(sql, vec![owner.to_owned().into(), session.into()], |row| {
            Ok(KeptServers { locked: Hex(row.get(0)?), used_at: row.get(1)? })
        });
        Ok(Answer::Servers(kept?.pop()))
    }

    /// Those of one session more than a tenant may have are a conflict.
    fn keep_servers(&self, owner: &str, session: &str, locked: &Hex, used_at: i64) -> Answered {
        check(session.len() == SESSION_CHARS && locked.0.len() <= SERVERS_BYTES_MAX)?;
        let others = "SELECT count(*) FROM session_servers WHERE owner = ?1 AND session <> ?2";
        if self.count(others, params![owner, session])? >= SERVED_MAX as i64 {
            return Err(Refusal::Conflict);
        }
        let sql = "INSERT OR REPLACE INTO session_servers VALUES (?1, ?2, ?3, ?4)";
        self.run(sql, params![owner, session, locked.0, used_at])?;
        Ok(Answer::Done)
    }

    /// Notes a run once, however often it is told.
    fn record(&self, record: &RunRecord) -> Answered {
        let texts =
            [&record.run, &record.tenant, &record.model, &record.level, &record.tier, &record.outcome];
        let more = [&record.key, &record.session].into_iter().flatten();
        check(texts.into_iter().chain(more).all(|text| text.len() <= 256))?;
        let figures = record.counted.figures();
        let columns = Counted::COLUMNS.join(", ");
        let text = |text: &String| Value::from(text.clone());
        let maybe = |text: &Option<String>| text.clone().map_or(Value::Null, Value::from);
        let mut values = vec![
            text(&record.run),
            text(&record.tenant),
            Value::from(now()),
            maybe(&record.key),
            maybe(&record.session),
            text(&record.model),
            text(&record.level),
            text(&record.tier),
            text(&record.outcome),
            Value::from(i64::from(record.status)),
            Value::from(i64::try_from(record.launch_us).unwrap_or(i64::MAX)),
        ];
        values.extend(figures.iter().copied().map(Value::from));
        let places = vec!["?"; values.len()].join(", ");
        let insert = format!(
            "INSERT OR IGNORE INTO runs (run, tenant, ended_at, key, session, model, level, tier, outcome, status, \
             launch_us, {columns}) VALUES ({places})"
        );
        let fresh = self.run(&insert, params_from_iter(values))?;
        if fresh == 0 {
            return Ok(Answer::Done);
        }
        let failed = i64::from(record.status >= 400);
        let mut values =
            vec![Value::from(now() / DAY), text(&record.tenant), Value::from(1), Value::from(failed)];
        values.extend(figures.into_iter().map(Value::from));
        let places = vec!["?"; values.len()].join(", ");
        // A sum that would overflow stays at the most that there is.
        let most = i64::MAX;
        let sum = |name: &str| format!("{name} = {name} + min(excluded.{name}, {most} - {name})");
        let sums: Vec<String> =
            ["runs", "failed"].iter().chain(Counted::COLUMNS).map(|name| sum(name)).collect();
        let upsert = format!(
            "INSERT INTO usage (day, tenant, runs, failed, {columns}) VALUES ({places}) \
             ON CONFLICT (day, tenant) DO UPDATE SET {}",
            sums.join(", ")
        );
        self.run(&upsert, params_from_iter(values))?;
        Ok(Answer::Done)
    }

    fn usage(&self, tenant: Option<String>, before: Option<&str>, limit: u32) -> Answered {
        // A row's place: its day, and within that its tenant.
        let (day, after) = match before {
            None => (i64::MAX, String::new()),
            Some(cursor) => {
                let (day, after) = cursor.split_once('/').unwrap_or((cursor, "\u{10ffff}"));
                let sql = "SELECT unixepoch(?1) / 86400 WHERE length(?1) = 10";
                let day: Option<Option<i64>> = self
                    .database
                    .query_row(sql, [day], |row| row.get(0))
                    .optional()
                    .map_err(|error| refused("day", &error))?;
                (day.flatten().ok_or(Refusal::Invalid)?, after.to_owned())
            }
        };
        let columns = Counted::COLUMNS.join(", ");
        let whose = if tenant.is_some() { "tenant = ?1" } else { "?1 IS NULL" };
        let sql = format!(
            "SELECT date(day * 86400, 'unixepoch'), tenant, runs, failed, {columns} FROM usage WHERE {whose} AND \
             (day < ?2 OR day = ?2 AND tenant > ?3) ORDER BY day DESC, tenant LIMIT ?4"
        );
        let values = vec![tenant.map_or(Value::Null, Value::from), day.into(), after.into(), rows_of(limit)];
        let days = self.rows(&sql, values, |row| {
            let count =
                |at: usize| Ok::<u64, rusqlite::Error>(u64::try_from(row.get::<_, i64>(at)?).unwrap_or(0));
            Ok(UsageDay {
                day: row.get(0)?,
                tenant: row.get(1)?,
                runs: count(2)?,
                failed: count(3)?,
                counted: counted(row, 4)?,
            })
        });
        Ok(Answer::Usage(days?))
    }

    fn runs(&self, tenant: Option<String>, before: Option<i64>, limit: u32) -> Answered {
        let columns = Counted::COLUMNS.join(", ");
        let whose = if tenant.is_some() { "tenant = ?1" } else { "?1 IS NULL" };
        let sql = format!(
            "SELECT number, ended_at, run, tenant, key, session, model, level, tier, outcome, status, launch_us, \
             {columns} FROM runs WHERE {whose} AND number < ?2 ORDER BY number DESC LIMIT ?3"
        );
        let values =
            vec![tenant.map_or(Value::Null, Value::from), before.unwrap_or(i64::MAX).into(), rows_of(limit)];
        let runs = self.rows(&sql, values, |row| {
            let record = RunRecord {
                run: row.get(2)?,
                tenant: row.get(3)?,
                key: row.get(4)?,
                session: row.get(5)?,
                model: row.get(6)?,
                level: row.get(7)?,
                tier: row.get(8)?,
                outcome: row.get(9)?,
                status: row.get(10)?,
                launch_us: u64::try_from(row.get::<_, i64>(11)?).unwrap_or(0),
                counted: counted(row, 12)?,
            };
            Ok(RunRow { number: row.get(0)?, ended_at: row.get(1)?, record })
        });
        Ok(Answer::Runs(runs?))
    }

    fn tenants(&self, after: Option<String>, limit: u32) -> Answered {
        let sql = "SELECT id, name, created_at, \
                   (SELECT count(*) FROM keys WHERE tenant = id AND revoked_at IS NULL \
                    AND (expires_at IS NULL OR expires_at > unixepoch())), \
                   EXISTS (SELECT 1 FROM credentials WHERE tenant = id), \
                   (SELECT count(*) FROM links WHERE tenant = id) \
                   FROM tenants t WHERE name > ?1 ORDER BY name LIMIT ?2";
        // Inside a subquery `id` would be the key's own: the outer one is meant.
        let sql = sql.replace("= id", "= t.id");
        let values = vec![after.unwrap_or_default().into(), rows_of(limit)];
        let tenants = self.rows(&sql, values, |row| {
            Ok(TenantRow {
                id: row.get(0)?,
                name: row.get(1)?,
                created_at: row.get(2)?,
                keys: u64::try_from(row.get::<_, i64>(3)?).unwrap_or(0),
                credential: row.get(4)?,
                links: u64::try_from(row.get::<_, i64>(5)?).unwrap_or(0),
            })
        });
        Ok(Answer::Tenants(tenants?))
    }

    fn keys(&self, tenant: Option<&str>, after: Option<String>, limit: u32) -> Answered {
        let owner = match tenant {
            None => Value::Null,
            Some(tenant) => self.tenant(tenant)?.ok_or(Refusal::NotFound)?.into(),
        };
        let sql = "SELECT k.id, kind, name, label, k.created_at, expires_at, revoked_at, last_used_at FROM keys k \
                   LEFT JOIN tenants t ON t.id = k.tenant WHERE (?1 IS NULL OR k.tenant = ?1) AND k.id > ?2 \
                   ORDER BY k.id LIMIT ?3";
        let values = vec![owner, after.unwrap_or_default().into(), rows_of(limit)];
        let keys = self.rows(sql, values, |row| {
            Ok(KeyRow {
                id: row.get(0)?,
                kind: if row.get::<_, String>(1)? == word(KeyKind::Admin) {
                    KeyKind::Admin
                } else {
                    KeyKind::Tenant
                },
                tenant: row.get(2)?,
                label: row.get(3)?,
                created_at: row.get(4)?,
                expires_at: row.get(5)?,
                revoked_at: row.get(6)?,
                last_used_at: row.get(7)?,
            })
        });
        Ok(Answer::Keys(keys?))
    }

    fn allowance(&self, tenant: &str) -> Answered {
        let id = self.tenant(tenant)?.ok_or(Refusal::NotFound)?;
        let sql = format!("SELECT {} FROM allowances WHERE tenant = ?1", Allowance::COLUMNS.join(", "));
        let found = self.rows(&sql, vec![id.into()], |row| allowance(row, 0))?;
        Ok(Answer::Allowance(found.first().copied().unwrap_or_default()))
    }

    fn allow(&self, tenant: &str, allowance: &Allowance) -> Answered {
        check(allowance.wrong().is_none())?;
        let id = self.tenant(tenant)?.ok_or(Refusal::NotFound)?;
        let figures = allowance.figures().into_iter().map(|figure| figure.map_or(Value::Null, Value::from));
        let values: Vec<Value> = std::iter::once(id.into()).chain(figures).collect();
        let places = vec!["?"; values.len()].join(", ");
        let columns = Allowance::COLUMNS.join(", ");
        let sql = format!("INSERT OR REPLACE INTO allowances (tenant, {columns}) VALUES ({places})");
        self.run(&sql, params_from_iter(values))?;
        Ok(Answer::Done)
    }

    fn owner(&self, kind: KeyKind, tenant: Option<&str>, make: bool) -> Result<Option<String>, Refusal> {
        match (kind, tenant) {
            (KeyKind::Admin, None) => Ok(None),
            (KeyKind::Tenant, Some(tenant)) => match self.tenant(tenant)? {
                Some(id) => Ok(Some(id)),
                None if make => self.create_tenant(tenant).map(Some),
                None => Err(Refusal::NotFound),
            },
            _ => Err(Refusal::Invalid),
        }
    }

    fn create_tenant(&self, name: &str) -> Result<String, Refusal> {
        check(is_name(name) && self.count("SELECT count(*) FROM tenants", [])? < TENANTS_MAX)?;
        let id = format!("{TENANT_PREFIX}{}", Hex(rand::random::<[u8; 16]>().to_vec()));
        let secret = rand::random::<[u8; 32]>();
        self.run("INSERT INTO tenants VALUES (?1, ?2, ?3, ?4)", params![id, name, secret, now()])?;
        Ok(id)
    }

    /// The id of a tenant, by name or id.
    fn tenant(&self, tenant: &str) -> Result<Option<String>, Refusal> {
        let sql = "SELECT id FROM tenants WHERE id = ?1 OR name = ?1";
        let found = self.database.query_row(sql, [tenant], |row| row.get(0)).optional();
        found.map_err(|error| refused("tenant", &error))
    }

    /// Does what can wait: the times of last use, and what has been kept long enough.
    pub fn tidy(&mut self, keep: Keep) {
        let touched = std::mem::take(&mut self.touched);
        for id in touched {
            let _ = self.run("UPDATE keys SET last_used_at = ?2 WHERE id = ?1", params![id, now()]);
        }
        if now() < self.pruned_at + PRUNE_EVERY {
            return;
        }
        self.pruned_at = now();
        let [runs, usage] = [keep.runs_days, keep.usage_days].map(i64::from);
        let old = "DELETE FROM runs WHERE number IN (SELECT number FROM runs WHERE ended_at < ?1 LIMIT ?2)";
        let gone = self.run(old, params![now() - runs * DAY, PRUNE_ROWS]).unwrap_or_default();
        if gone == PRUNE_ROWS as usize {
            self.pruned_at = 0;
        }
        let _ = self.run("DELETE FROM usage WHERE day < ?1", params![now() / DAY - usage]);
    }

    /// The database as the bytes of one file, as it is at one moment.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn image(&mut self) -> Result<Vec<u8>, String> {
        let image = self.database.serialize("main").map_err(|error| format!("copy the database: {error}"))?;
        Ok(image.to_vec())
    }

    fn run(&self, sql: &str, values: impl rusqlite::Params) -> Result<usize, Refusal> {
        let done = self.database.prepare(sql).and_then(|mut sql| sql.execute(values));
        done.map_err(|error| refused("write", &error))
    }

    /// A change that must find something.
    fn one(&self, sql: &str, values: impl rusqlite::Params) -> Answered {
        match self.run(sql, values)? {
            0 => Err(Refusal::NotFound),
            _ => Ok(Answer::Done),
        }
    }

    fn count(&self, sql: &str, values: impl rusqlite::Params) -> Result<i64, Refusal> {
        let count = self.database.prepare(sql).and_then(|mut sql| sql.query_row(values, |row| row.get(0)));
        count.map_err(|error| refused("count", &error))
    }

    fn rows<T>(
        &self,
        sql: &str,
        values: Vec<Value>,
        read: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, Refusal> {
        let rows = || -> rusqlite::Result<Vec<T>> {
            let mut sql = self.database.prepare(sql)?;
            sql.query_map(params_from_iter(values), |row| read(row))?.collect()
        };
        rows().map_err(|error| refused("list", &error))
    }
}

fn counted(row: &Row<'_>, first: usize) -> rusqlite::Result<Counted> {
    let mut at = first;
    Counted::read(|| {
        at += 1;
        row.get(at - 1)
    })
}

fn allowance(row: &Row<'_>, first: usize) -> rusqlite::Result<Allowance> {
    let mut at = first;
    Allowance::read(|| {
        at += 1;
        row.get(at - 1)
    })
}

fn rows_of(limit: u32) -> Value {
    Value::from(i64::from(limit.clamp(1, ROWS_MAX)))
}

fn word(kind: KeyKind) -> &'static str {
    match kind {
        KeyKind::Tenant => "tenant",
        KeyKind::Admin => "admin",
    }
}

fn check(holds: bool) -> Result<(), Refusal> {
    if holds { Ok(()) } else { Err(Refusal::Invalid) }
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && Hex::parse(text).is_some()
}

/// A name that people can type and that no id can be taken for.
fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._@-".contains(&b);
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(plain)
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && !name.starts_with(TENANT_PREFIX)
}

fn is_label(label: &str) -> bool {
    label.len() <= NAME_BYTES_MAX && !label.chars().any(char::is_control)
}

/// What SQLite says, for the log; never a value, which its messages do not hold either.
fn refused(step: &str, error: &rusqlite::Error) -> Refusal {
    if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) {
        return Refusal::Conflict;
    }
    log(step, error);
    Refusal::Failed
}

fn log(step: &str, error: &rusqlite::Error) {
    let line = serde_json::json!({
        "process": "ledger", "event": "database", "step": step, "error": error.to_string(),
    });
    // In one piece: others write to the same place.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
}

#[cfg(test)]
mod tests;
