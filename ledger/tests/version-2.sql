-- A database of version 2, written by the statements of the gaoler that had it. It must never be changed.
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
PRAGMA application_id = 1734438764;
PRAGMA user_version = 2;
INSERT INTO tenants VALUES ('tn_acme', 'acme', unhex(replace(hex(zeroblob(32)), '00', '07')), 1700000000);
INSERT INTO keys VALUES ('0000000000000001', 'tenant', 'tn_acme', unhex(replace(hex(zeroblob(32)), '00', '01')), 'ci', 1700000000, NULL, NULL, NULL);
INSERT INTO keys VALUES ('0000000000000002', 'admin', NULL, unhex(replace(hex(zeroblob(32)), '00', '02')), '', 1700000000, NULL, 1700000001, NULL);
INSERT INTO credentials VALUES ('tn_acme', x'09090909', 'oauth', zeroblob(32), 1700000000);
INSERT INTO links VALUES (zeroblob(32), 'tn_acme', 1700000000);
INSERT INTO runs VALUES (1, '00000000000000000000000000000001', 'tn_acme', unixepoch(), '0000000000000001', NULL, 'sonnet', 'balanced', 'kernel', 'end_turn', 200, 3, 1, 1, 1, 2, 2, 6, 7, 8, 9, 10);
INSERT INTO runs VALUES (2, '00000000000000000000000000000002', 'tn_acme', unixepoch(), NULL, NULL, 'opus', 'paranoid', 'kernel', 'client_gone', 499, 3, 0, 1, 2, 2, 3, 0, 0, 0, 0, 0);
INSERT INTO usage VALUES (unixepoch() / 86400, 'tn_acme', 2, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10);
INSERT INTO allowances VALUES ('tn_acme', NULL, 2, 9, NULL, NULL, 5);
