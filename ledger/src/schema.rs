//! The database's form, version by version, and how it is opened.
//! It must never change a version that was released, nor open a database of a later one.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

/// The database's file in the ledger's folder.
pub const FILE: &str = "ledger.db";
/// "gaol", so that no other program's database is taken for ours.
const APPLICATION: i32 = 0x6761_6f6c;
/// How long to wait for whoever else writes: a command line beside the server.
const BUSY: Duration = Duration::from_secs(5);

/// What makes each version out of the one before.
const VERSIONS: [&str; 3] = [VERSION_1, VERSION_2, VERSION_3];

const VERSION_1: &str = "
CREATE TABLE tenants (
    id TEXT PRIMARY KEY NOT NULL,
    name TEXT NOT NULL UNIQUE,
    secret BLOB NOT NULL CHECK (length(secret) = 32),
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE keys (
    id TEXT PRIMARY KEY NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('tenant', 'admin')),
    tenant TEXT REFERENCES tenants (id) ON DELETE CASCADE,
    hash BLOB NOT NULL CHECK (length(hash) = 32),
    label TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER,
    last_used_at INTEGER,
    CHECK ((kind = 'tenant') = (tenant IS NOT NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_of_tenant ON keys (tenant);
CREATE TABLE credentials (
    tenant TEXT PRIMARY KEY NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    sealed BLOB NOT NULL,
    scheme TEXT NOT NULL,
    vault BLOB NOT NULL CHECK (length(vault) = 32),
    stored_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE links (
    digest BLOB PRIMARY KEY NOT NULL CHECK (length(digest) = 32),
    tenant TEXT NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    linked_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX links_of_tenant ON links (tenant);
CREATE TABLE runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    ended_at INTEGER NOT NULL,
    key TEXT,
    session TEXT,
    model TEXT NOT NULL,
    level TEXT NOT NULL,
    tier TEXT NOT NULL,
    outcome TEXT NOT NULL,
    status INTEGER NOT NULL,
    launch_us INTEGER NOT NULL,
    wall_us INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    denials INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL,
    cache_read_tokens INTEGER NOT NULL,
    bytes_up INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL
) STRICT;
CREATE INDEX runs_of_tenant ON runs (tenant, number);
CREATE INDEX runs_by_end ON runs (ended_at);
CREATE TABLE usage (
    day INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    runs INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    wall_us INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    denials INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL,
    cache_read_tokens INTEGER NOT NULL,
    bytes_up INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL,
    PRIMARY KEY (day, tenant)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_of_tenant ON usage (tenant, day);
";

/// What a tenant may, and what runs cost.
const VERSION_2: &str = "
CREATE TABLE allowances (
    tenant TEXT PRIMARY KEY NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    tenant_per_minute INTEGER,
    tenant_max INTEGER,
    tokens_per_day INTEGER,
    tokens_per_month INTEGER,
    cost_per_day_microusd INTEGER,
    cost_per_month_microusd INTEGER
) STRICT, WITHOUT ROWID;
ALTER TABLE runs ADD COLUMN cost_microusd INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage ADD COLUMN cost_microusd INTEGER NOT NULL DEFAULT 0;
";

/// The MCP servers of sessions. Their owner is a tenant's id, or a credential that is its own tenant, which no table has.
const VERSION_3: &str = "
CREATE TABLE session_servers (
    owner TEXT NOT NULL,
    session TEXT NOT NULL CHECK (length(session) = 36),
    locked BLOB NOT NULL CHECK (length(locked) <= 28672),
    used_at INTEGER NOT NULL,
    PRIMARY KEY (owner, session)
) STRICT;
";

/// Opens the database in this folder, makes it where there is none, and brings it to this program's version.
///
/// # Errors
/// What SQLite says, or that the database is another program's or a later one's, with what to do.
pub fn open(folder: &Path) -> Result<Connection, String> {
    let path = folder.join(FILE);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NOFOLLOW
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || -> rusqlite::Result<Connection> {
        let database = Connection::open_with_flags(&path, flags)?;
        database.busy_timeout(BUSY)?;
        // What a page holds of a file that somebody else wrote is not believed.
        database.pragma_update(None, "trusted_schema", false)?;
        database.pragma_update(None, "cell_size_check", true)?;
        // No temporary file: there is no folder for one.
        database.pragma_update(None, "temp_store", "memory")?;
        // FULL: in this mode of the log NORMAL would lose, with the power, what was acknowledged.
        database.pragma_update(None, "journal_mode", "wal")?;
        database.pragma_update(None, "synchronous", "full")?;
        database.pragma_update(None, "foreign_keys", true)?;
        // What is deleted (a hash, a sealed credential) is gone from the file.
        database.pragma_update(None, "secure_delete", true)?;
        Ok(database)
    };
    let mut database = open().map_err(|error| format!("open {FILE}: {error}"))?;
    migrate(&mut database)?;
    Ok(database)
}

fn migrate(database: &mut Connection) -> Result<(), String> {
    let failed = |error: rusqlite::Error| format!("bring {FILE} to version {}: {error}", VERSIONS.len());
    let found = database.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
    let number = |name| found.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i32>(0));
    let (version, application) =
        (number("user_version").map_err(failed)?, number("application_id").map_err(failed)?);
    let tables = "SELECT count(*) FROM sqlite_schema";
    let empty = found.query_row(tables, [], |row| row.get::<_, i64>(0)).map_err(failed)? == 0;
    if application != APPLICATION && !(empty && application == 0 && version == 0) {
        return Err(format!("{FILE} is another program's database; move it away"));
    }
    let done = usize::try_from(version).unwrap_or(usize::MAX);
    if done > VERSIONS.len() {
        return Err(format!(
            "{FILE} has version {version} and this gaoler knows {}: it was written by a later one; start that, or \
             put a backup of before in its place",
            VERSIONS.len()
        ));
    }
    for sql in &VERSIONS[done..] {
        found.execute_batch(sql).map_err(failed)?;
    }
    if done < VERSIONS.len() {
        found.pragma_update(None, "application_id", APPLICATION).map_err(failed)?;
        found.pragma_update(None, "user_version", VERSIONS.len() as i64).map_err(failed)?;
    }
    found.commit().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_made_once_and_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = open(folder.path()).expect("made");
        first.execute("INSERT INTO tenants VALUES ('t', 'n', zeroblob(32), 1)", []).expect("a row");
        let second = open(folder.path()).expect("opened beside the first");
        let rows: i64 =
            second.query_row("SELECT count(*) FROM tenants", [], |row| row.get(0)).expect("a count");
        assert_eq!(rows, 1);
        let mode: String = second.query_row("PRAGMA journal_mode", [], |row| row.get(0)).expect("a mode");
        let synchronous: i64 =
            second.query_row("PRAGMA synchronous", [], |row| row.get(0)).expect("a number");
        assert_eq!((mode.as_str(), synchronous), ("wal", 2));
        let orphan = "INSERT INTO links VALUES (zeroblob(32), 'nobody', 1)";
        assert!(second.execute(orphan, []).is_err(), "foreign keys hold");
        let wrong = "INSERT INTO tenants VALUES ('u', 'm', zeroblob(31), 1)";
        assert!(second.execute(wrong, []).is_err(), "a secret has its length");
    }

    #[test]
    fn a_later_or_a_foreign_database_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        open(folder.path()).expect("made").pragma_update(None, "user_version", 99).expect("set");
        let why = open(folder.path()).expect_err("later");
        assert!(why.contains("has version 99 and this gaoler knows 3"), "{why}");
        let other = tempfile::tempdir().expect("a folder");
        let foreign = Connection::open(other.path().join(FILE)).expect("made");
        foreign.execute_batch("CREATE TABLE theirs (x)").expect("a table");
        let why = open(other.path()).expect_err("foreign");
        assert!(why.contains("another program's"), "{why}");
    }
}
