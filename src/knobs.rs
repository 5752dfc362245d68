//! Every setting: its flag, what it means and what it may be. The help of `gaoler serve`, the README's table, the schema
//! and the annotated file are written from here. It must never name a setting that is not there, nor leave one out.

use std::collections::BTreeMap;
use std::fmt::Write;

use gaoler_policy::settings::Settings;
use serde_json::{Map, Value as Json, json};
use toml::{Table, Value};

/// A setting.
#[derive(Debug, Clone, Copy)]
pub struct Knob {
    /// `section.name`.
    pub key: &'static str,
    /// The flag of `gaoler serve` that stands for it; empty = none.
    pub flag: &'static str,
    /// What it means, as half a sentence.
    pub about: &'static str,
    /// What it may be.
    pub kind: Kind,
    /// Whether a reload takes it.
    pub live: bool,
}

/// What a setting may be.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Any text.
    Text,
    /// One of these words.
    Word(&'static [&'static str]),
    /// Yes or no.
    Switch,
    /// A number within these bounds.
    Number(u32, u32),
    /// Dollars, as a decimal.
    Usd,
    /// First and count of uids.
    Range,
    /// A part of a whole, 0 to 1.
    Part,
    /// One uid.
    Uid,
    /// Texts of this form.
    List(&'static str),
    /// Tables with these keys; of those that must be there the name has no `?` at its end.
    Tables(&'static [&'static str]),
}

const TIERS: Kind = Kind::Word(&["kernel", "namespaces", "uid", "directory"]);
const LEVELS: Kind = Kind::Word(&["paranoid", "balanced", "developer"]);

const fn knob(key: &'static str, flag: &'static str, kind: Kind, about: &'static str) -> Knob {
    Knob { key, flag, about, kind, live: false }
}

/// One that nobody but the frontend goes by, and so a reload takes.
const fn live(key: &'static str, flag: &'static str, kind: Kind, about: &'static str) -> Knob {
    Knob { live: true, ..knob(key, flag, kind, about) }
}

/// All of them, in the order in which they are shown.
pub const KNOBS: &[Knob] = &[
    knob("isolation.minimum", "--minimum", TIERS, "the weakest tier to start with"),
    knob(
        "isolation.tenants_together",
        "",
        Kind::Switch,
        "in the tier `directory`: runs of different tenants at a time",
    ),
    knob("level.default", "--level", LEVELS, "how strict a run is whose request does not say"),
    knob("level.maximum", "", LEVELS, "the loosest level that a request may get"),
    knob(
        "level.file",
        "",
        Kind::Text,
        "a file of yours that changes one level's limits, hosts, env, visible",
    ),
    knob("level.hosts", "", Kind::List("HOST:PORT"), "more destinations of the levels' proxies"),
    knob("credentials.mode", "", Kind::Word(&["broker"]), "the token never enters a cage"),
    knob(
        "server.listen",
        "--listen",
        Kind::Text,
        "`HOST:PORT`; another address than loopback needs TLS, or `server.trusted_proxy`",
    ),
    live(
        "server.tls_certificate",
        "--tls-certificate",
        Kind::Text,
        "a PEM file: the certificate, then those that signed it",
    ),
    live(
        "server.tls_key",
        "--tls-key",
        Kind::Text,
        "a PEM file: its private key; read at the start and at each reload",
    ),
    knob(
        "server.trusted_proxy",
        "",
        Kind::Switch,
        "`true` where nobody but a proxy that ends TLS can reach the listener",
    ),
    live("server.metrics", "", Kind::Switch, "`GET /metrics`, for whoever can reach the listener"),
    knob("state.dir", "--state", Kind::Text, "the folder of durable state; made 0700"),
    knob("uids.tenant", "", Kind::Range, "first and count: one for each tenant, kept for ever"),
    knob("uids.run", "", Kind::Range, "one for each running cage"),
    knob("uids.egress", "", Kind::Range, "one for each running egress"),
    knob("uids.frontend", "", Kind::Uid, "of the frontend"),
    knob("uids.upstream", "", Kind::Uid, "of the embedded upstream"),
    knob("uids.ledger", "", Kind::Uid, "of the ledger"),
    knob("uids.exporter", "", Kind::Uid, "of the exporter of traces"),
    knob(
        "upstream.url",
        "--upstream",
        Kind::Text,
        "the API that answers, `https://HOST[:PORT]`, or `embedded`",
    ),
    knob("cli.path", "--cli", Kind::Text, "the Claude Code CLI, a native binary"),
    knob("cli.version", "", Kind::Text, "what the CLI must say of itself"),
    knob("runs.max", "", Kind::Number(1, 1024), "runs at the same time"),
    live("runs.tenant_max", "", Kind::Number(1, 1024), "of those, one tenant's"),
    knob("runs.queue_max", "", Kind::Number(0, 4096), "requests that wait for a run; `0` = none"),
    live("runs.queue_seconds", "", Kind::Number(1, 600), "that one waits, at most"),
    knob("runs.drain_seconds", "", Kind::Number(1, 3600), "that runs have to finish after SIGTERM"),
    knob("runs.silence_seconds", "", Kind::Number(1, 3600), "of the upstream, after which a run is ended"),
    live(
        "identity.require_key",
        "",
        Kind::Switch,
        "`true` where a credential of the upstream alone is not enough: a request must show a tenant key",
    ),
    live(
        "rates.tenant_per_minute",
        "",
        Kind::Number(0, 1_000_000),
        "runs that one tenant may ask for in a minute; `0` = any number",
    ),
    live(
        "rates.address_per_minute",
        "",
        Kind::Number(0, 1_000_000),
        "requests of one address (of IPv6 one /64) in a minute; `0` = any number",
    ),
    live(
        "rates.address_max",
        "",
        Kind::Number(0, 100_000),
        "requests of one address at the same time, with their streams; `0` = any number",
    ),
    live(
        "budget.tokens_per_day",
        "",
        Kind::Number(0, u32::MAX),
        "of one tenant, as egress counts them, without what the upstream's cache gave; `0` = any number",
    ),
    live(
        "budget.tokens_per_month",
        "",
        Kind::Number(0, u32::MAX),
        "the same of a month; days and months are UTC's",
    ),
    live(
        "budget.cost_per_day_usd",
        "",
        Kind::Usd,
        "dollars of one tenant, for what egress counted, at `prices.list`; `0` = any sum",
    ),
    live("budget.cost_per_month_usd", "", Kind::Usd, "the same of a month"),
    live(
        "budget.reserve_tokens",
        "",
        Kind::Number(0, 100_000_000),
        "that each live run of a tenant is taken to use, beside what was used; in dollars at its model's dearest price",
    ),
    live(
        "prices.list",
        "",
        Kind::Tables(&["model", "input", "output", "cache_write", "cache_read"]),
        "dollars of a million tokens, by what a model's name begins with, such as `claude-sonnet-`",
    ),
    knob("ledger.runs_days", "", Kind::Number(1, 3660), "days that the record of one run is kept"),
    knob(
        "ledger.usage_days",
        "",
        Kind::Number(31, 3660),
        "days that the sums of a tenant's day are kept; a month's budget is counted from those of its days",
    ),
    knob(
        "telemetry.otlp_endpoint",
        "",
        Kind::Text,
        "a collector of traces, `http://` or `https://`, by OTLP over HTTP; `/v1/traces` is added; empty = no traces",
    ),
    knob(
        "telemetry.otlp_headers",
        "",
        Kind::Text,
        "a file of headers for it, one `name: value` a line; read once, at the start; needs `https://` or loopback",
    ),
    knob(
        "telemetry.otlp_ca",
        "",
        Kind::Text,
        "a PEM file of certificates to trust in place of the built-in ones",
    ),
    live(
        "telemetry.sample_ratio",
        "",
        Kind::Part,
        "of the traces that begin here; a request that brings a trace has decided for itself",
    ),
    live(
        "models.list",
        "",
        Kind::Tables(&["id", "display_name?", "model?"]),
        "what `GET /v1/models` lists beside the aliases; it forbids no other. With `model` it is a name of your own, and that \
         is what it stands for",
    ),
    live(
        "sessions.ttl_days",
        "",
        Kind::Number(0, 36_500),
        "days after which a session that nobody uses is removed; `0` = never",
    ),
    live("mcp.remote", "", Kind::Switch, "whether requests may name remote MCP servers"),
    knob(
        "mcp.internal",
        "",
        Kind::List("HOST:PORT"),
        "MCP servers and hosts of repositories in your own network that requests may name, by address and in the clear too; no \
         tool of a run gets there",
    ),
    live(
        "mcp.catalog",
        "",
        Kind::Tables(&[
            "name",
            "description?",
            "command?",
            "args?",
            "env?",
            "url?",
            "transport?",
            "token_file?",
        ]),
        "MCP servers that you offer by name, each with a command or a url",
    ),
];

/// Whether this key is one of those that make the listener speak TLS.
pub fn is_tls(key: &str) -> bool {
    key.starts_with("server.tls_")
}

/// The bounds of a number.
pub fn bounds(key: &str) -> Option<(u32, u32)> {
    match KNOBS.iter().find(|knob| knob.key == key)?.kind {
        Kind::Number(low, high) => Some((low, high)),
        _ => None,
    }
}

/// The defaults, by key.
pub fn defaults() -> Vec<(String, Value)> {
    flat(&Table::try_from(Settings::default()).unwrap_or_default())
}

/// Settings by key, without what the command line alone writes.
pub fn flat(settings: &Table) -> Vec<(String, Value)> {
    let sections = settings.iter().filter_map(|(section, keys)| Some((section, keys.as_table()?)));
    let keys = sections.flat_map(|(section, keys)| {
        keys.iter().map(move |(key, value)| (format!("{section}.{key}"), value.clone()))
    });
    keys.filter(|(key, _)| key != "level.own").collect()
}

fn default_of(key: &str) -> Option<Value> {
    defaults().into_iter().find_map(|(name, value)| (name == key).then_some(value))
}

/// A value as people write it where no quotes are needed.
pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

/// The lines of the help: key, default, meaning.
pub fn help() -> String {
    let mut text = String::new();
    for knob in KNOBS {
        let default = default_of(knob.key).as_ref().map(plain).unwrap_or_default();
        let flag = if knob.flag.is_empty() { String::new() } else { format!(" ({})", knob.flag) };
        let _ = writeln!(text, "  {:<27} {default:<17} {}{flag}", knob.key, knob.about.replace('`', ""));
    }
    text
}

/// The README's table.
#[cfg(test)]
fn table() -> String {
    let mut text = String::from("| key | flag | default | reload | |\n|---|---|---|---|---|\n");
    for knob in KNOBS {
        let default = default_of(knob.key).as_ref().map(plain).unwrap_or_default();
        let code = |text: &str| if text.is_empty() { String::new() } else { format!("`{text}`") };
        let words = match knob.kind {
            Kind::Word(words) if words.len() > 1 => {
                format!(": {}", words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "))
            }
            Kind::Number(low, high) => format!(" ({low} to {high})"),
            Kind::Part => " (0 to 1)".into(),
            Kind::List(form) => format!("; `[\"{form}\", ...]`"),
            Kind::Tables(keys) => format!("; `[{{ {} }}, ...]`", keys.join(", ")),
            _ => String::new(),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {}{words} |",
            code(knob.key),
            code(knob.flag),
            code(&default),
            if knob.live { "yes" } else { "" },
            knob.about
        );
    }
    text
}

/// Settings in force, each with where its value was written.
pub struct Shown {
    rows: Vec<(String, Value, String)>,
}

impl Shown {
    /// These, with the places of those that are no defaults.
    pub fn new(settings: &Settings, places: &BTreeMap<String, String>) -> Shown {
        let values: BTreeMap<String, Value> =
            flat(&Table::try_from(settings).unwrap_or_default()).into_iter().collect();
        let row = |knob: &Knob| {
            let value = values.get(knob.key)?.clone();
            let place = places.get(knob.key).map_or("default", String::as_str);
            Some((knob.key.to_owned(), value, place.to_owned()))
        };
        Shown { rows: KNOBS.iter().filter_map(row).collect() }
    }

    /// For people.
    pub fn text(&self) -> String {
        let width = |of: fn(&(String, Value, String)) -> usize| self.rows.iter().map(of).max().unwrap_or(0);
        let (keys, values) = (width(|row| row.0.len()), width(|row| row.1.to_string().len()).min(48));
        let mut text = String::new();
        for (key, value, place) in &self.rows {
            let _ = writeln!(text, "{key:<keys$}  {:<values$}  {place}", value.to_string());
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> String {
        let rows =
            self.rows.iter().map(|(key, value, place)| (key.clone(), json!({"value": value, "from": place})));
        format!("{:#}\n", Json::Object(rows.collect()))
    }
}

/// A file with every setting at its default, each with its meaning.
pub fn file() -> String {
    let mut text = String::from(
        "# gaoler's settings, each with its default. A flag wins over the environment, the environment over this file.\n\
         # Check it with `gaoler config check --config FILE`.\n",
    );
    let mut section = "";
    for knob in KNOBS {
        let (of, name) = knob.key.split_once('.').unwrap_or_default();
        if of != section {
            section = of;
            let _ = write!(text, "\n[{section}]\n");
        }
        let form = match knob.kind {
            Kind::Word(words) if words.len() > 1 => format!(" ({})", words.join(", ")),
            Kind::Number(low, high) => format!(" ({low} to {high})"),
            Kind::Part => " (0 to 1)".into(),
            Kind::List(form) => format!(" ([\"{form}\", ...])"),
            Kind::Tables(keys) => format!(" ([{{ {} }}, ...])", keys.join(", ")),
            _ => String::new(),
        };
        let default = default_of(knob.key).map(|value| value.to_string()).unwrap_or_default();
        let live = if knob.live { "; a reload takes it" } else { "" };
        let _ = writeln!(text, "# {}{form}{live}\n{name} = {default}", knob.about);
    }
    text
}

/// A JSON schema of such a file, for editors.
pub fn schema() -> Json {
    let mut sections = Map::new();
    for knob in KNOBS {
        let (section, name) = knob.key.split_once('.').unwrap_or_default();
        let section = sections
            .entry(section)
            .or_insert_with(|| json!({"type": "object", "additionalProperties": false, "properties": {}}));
        let mut schema = match knob.kind {
            Kind::Text => json!({"type": "string"}),
            Kind::Word(words) => json!({"type": "string", "enum": words}),
            Kind::Switch => json!({"type": "boolean"}),
            Kind::Usd => json!({"type": "number", "minimum": 0}),
            Kind::Number(low, high) => json!({"type": "integer", "minimum": low, "maximum": high}),
            Kind::Part => json!({"type": "number", "minimum": 0, "maximum": 1}),
            Kind::Range => {
                json!({"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": u32::MAX}, "minItems": 2, "maxItems": 2})
            }
            Kind::Uid => json!({"type": "integer", "minimum": 65_536, "maximum": u32::MAX}),
            Kind::List(form) => json!({"type": "array", "items": {"type": "string", "description": form}}),
            Kind::Tables(keys) => tables(keys),
        };
        schema["description"] = json!(knob.about);
        schema["x-reload"] = json!(knob.live);
        schema["default"] =
            default_of(knob.key).and_then(|value| serde_json::to_value(value).ok()).unwrap_or_default();
        section["properties"][name] = schema;
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "gaoler's settings",
        "type": "object",
        "additionalProperties": false,
        "properties": sections,
    })
}

fn tables(keys: &[&str]) -> Json {
    let bare = |key: &str| key.trim_end_matches('?').to_owned();
    let required: Vec<String> = keys.iter().filter(|key| !key.ends_with('?')).map(|key| bare(key)).collect();
    let kind = |name: &str| match name {
        "input" | "output" | "cache_write" | "cache_read" => json!({"type": "number", "minimum": 0}),
        "args" => json!({"type": "array", "items": {"type": "string"}}),
        "env" => json!({"type": "object", "additionalProperties": {"type": "string"}}),
        _ => json!({"type": "string"}),
    };
    let properties: Map<String, Json> = keys.iter().map(|key| (bare(key), kind(&bare(key)))).collect();
    json!({
        "type": "array",
        "items": {"type": "object", "additionalProperties": false, "required": required, "properties": properties},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    /// A file of the tree that is written from here.
    fn kept(name: &str, written: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        if std::env::var_os("GAOLER_TEST_BLESS").is_some() {
            std::fs::write(&path, written).expect("written");
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(
            found, written,
            "{name}; if this is meant: GAOLER_TEST_BLESS=1 cargo test -p gaoler --lib knobs"
        );
    }

    #[test]
    fn every_setting_has_its_row_and_the_other_way_round() {
        let rows: Vec<String> = KNOBS.iter().map(|knob| knob.key.to_owned()).collect();
        let there: BTreeSet<String> = defaults().into_iter().map(|(key, _)| key).collect();
        assert_eq!(rows.iter().cloned().collect::<BTreeSet<_>>(), there);
        assert_eq!(rows.len(), there.len(), "a row comes twice");
        for (knob, (_, value)) in KNOBS
            .iter()
            .map(|knob| (knob, defaults().into_iter().find(|(key, _)| key == knob.key).expect("there")))
        {
            let fits = match knob.kind {
                Kind::Text => value.is_str(),
                Kind::Word(words) => value.as_str().is_some_and(|word| words.contains(&word)),
                Kind::Switch => value.is_bool(),
                Kind::Usd => value.is_float(),
                Kind::Number(low, high) => {
                    value.as_integer().is_some_and(|n| (i64::from(low)..=i64::from(high)).contains(&n))
                }
                Kind::Range => value.as_array().is_some_and(|list| list.len() == 2),
                Kind::Part => value.as_float().is_some_and(|part| (0.0..=1.0).contains(&part)),
                Kind::Uid => value.is_integer(),
                Kind::List(_) | Kind::Tables(_) => value.is_array(),
            };
            assert!(fits, "{} = {value}", knob.key);
        }
    }

    #[test]
    fn the_files_that_are_checked_in_are_written_from_the_table() {
        kept("docs/gaoler.toml", &file());
        kept("docs/config.schema.json", &format!("{:#}\n", schema()));
        let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
        let text = std::fs::read_to_string(&readme).expect("the README");
        let (before, rest) =
            text.split_once("<!-- settings: generated, see src/knobs.rs -->\n").expect("a mark");
        let (_, after) = rest.split_once("<!-- end of settings -->").expect("its end");
        let mark = "<!-- settings: generated, see src/knobs.rs -->\n";
        kept("README.md", &format!("{before}{mark}{}<!-- end of settings -->{after}", table()));
    }

    #[test]
    fn what_is_shown_says_where_it_was_written() {
        let settings = Settings::default();
        let places = BTreeMap::from([("runs.max".to_owned(), "GAOLER_RUNS__MAX".to_owned())]);
        let shown = Shown::new(&settings, &places);
        let rows: Json = serde_json::from_str(&shown.json()).expect("JSON");
        assert_eq!(rows["runs.max"], json!({"value": 64, "from": "GAOLER_RUNS__MAX"}));
        assert_eq!(rows["isolation.minimum"]["from"], "default");
        assert_eq!(rows.as_object().map(Map::len), Some(KNOBS.len()));
        assert_eq!(shown.text().lines().count(), KNOBS.len());
    }

    #[test]
    fn the_annotated_file_is_one_that_changes_nothing() {
        let settings: Settings = toml::from_str(&file()).expect("settings");
        assert_eq!(settings, Settings::default());
        let validator = jsonschema::validator_for(&schema()).expect("a schema");
        let value: Json = serde_json::to_value(file().parse::<Table>().expect("TOML")).expect("JSON");
        let errors: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert_eq!(errors, [""; 0]);
        assert!(!validator.is_valid(&json!({"runs": {"max": 0}})));
        assert!(!validator.is_valid(&json!({"runs": {"maximum": 1}})));
        assert!(!validator.is_valid(&json!({"mcp": {"catalog": [{"command": "x"}]}})));
    }
}
