//! One [`Settings`] out of flags, environment, file and defaults, each value checked before anything starts.
//! It must never guess: an unknown key, or a value that gaoler cannot honour, ends the command with its place.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use gaoler_policy::settings::{ListedModel, OfferedServer, Price, Settings};
use gaoler_protocol::{Level, Tier, VOUCHING_MAX};
use toml::{Table, Value};

use crate::frontend::job;
use crate::{knobs, mcp, operator, telemetry};

/// The prefix of every environment variable that gaoler reads.
pub const PREFIX: &str = "GAOLER_";
/// Names with this prefix belong to the test suites and are passed over.
const TEST_PREFIX: &str = "GAOLER_TEST_";
/// A configuration file is a page of text; anything larger is not one.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Models that an operator may list. Every client reads the whole list.
const MODELS_MAX: usize = 100;
/// Dollars of a budget, and of a million tokens, at most.
const USD_MAX: f64 = 1e9;
const PRICE_MAX: f64 = 100_000.0;
/// Bytes of a model's name.
const MODEL_NAME_BYTES_MAX: usize = 100;

/// The settings of a command, by the key that each flag stands for. Paths may be relative.
#[derive(Debug, Default, Clone)]
pub struct Flags {
    values: Vec<(&'static str, &'static str, Value)>,
}

impl Flags {
    /// Adds `--flag VALUE`, which stands for `section.key`, where it was given.
    #[must_use]
    pub fn with(mut self, flag: &'static str, key: &'static str, value: Option<impl Into<String>>) -> Flags {
        self.values.extend(value.map(|value| (flag, key, Value::String(value.into()))));
        self
    }
}

/// What was wrong, where it was written, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong(pub String);

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

/// The settings in force: flags before environment before file before defaults.
///
/// # Errors
/// The first unknown key, unreadable file, value of a wrong type, or value that gaoler cannot honour.
pub fn resolve(
    flags: &Flags,
    environment: impl IntoIterator<Item = (String, String)>,
    file: Option<&Path>,
) -> Result<Settings, Wrong> {
    explain(flags, environment, file).map(|(settings, _)| settings)
}

/// The same, with where each value that is no default was written, by its key.
///
/// # Errors
/// As above.
pub fn explain(
    flags: &Flags,
    environment: impl IntoIterator<Item = (String, String)>,
    file: Option<&Path>,
) -> Result<(Settings, BTreeMap<String, String>), Wrong> {
    let mut layers = Layers::of_defaults();
    if let Some(path) = file {
        layers.add_file(path, &read_file("--config", path)?)?;
    }
    // The order of an environment is nobody's promise; sorted, the first error is always the same one.
    for (name, value) in environment.into_iter().collect::<BTreeMap<_, _>>() {
        layers.add_variable(&name, &value)?;
    }
    for (flag, key, value) in &flags.values {
        layers.set(key, value.clone(), (*flag).to_owned())?;
    }
    let places = layers.places.clone();
    Ok((layers.finish()?, places))
}

/// The values so far, and where each was written.
struct Layers {
    known: Table,
    values: Table,
    places: BTreeMap<String, String>,
}

impl Layers {
    fn of_defaults() -> Layers {
        let known = Table::try_from(Settings::default()).unwrap_or_default();
        Layers { values: known.clone(), known, places: BTreeMap::new() }
    }

    fn add_file(&mut self, path: &Path, text: &str) -> Result<(), Wrong> {
        let place = path.display().to_string();
        let table: Table =
            text.parse().map_err(|error| Wrong(format!("{place}: not TOML: {}", in_toml(&error))))?;
        for (section, body) in table {
            let Some(keys) = self.known.get(&section).and_then(Value::as_table) else {
                return Err(Wrong(format!(
                    "{place}: unknown key `{section}`; the sections are {}",
                    listed(self.known.keys())
                )));
            };
            let Value::Table(body) = body else {
                return Err(Wrong(format!("{place}: `{section}` is a section: write [{section}]")));
            };
            if let Some(key) = body.keys().find(|key| !keys.contains_key(*key)) {
                return Err(Wrong(format!(
                    "{place}: unknown key `{section}.{key}`; [{section}] knows {}",
                    listed(keys.keys())
                )));
            }
            for (key, value) in body {
                self.set(&format!("{section}.{key}"), value, format!("{place}: {section}.{key}"))?;
            }
        }
        Ok(())
    }

    fn add_variable(&mut self, name: &str, value: &str) -> Result<(), Wrong> {
        let Some(rest) = name.strip_prefix(PREFIX).filter(|_| !name.starts_with(TEST_PREFIX)) else {
            return Ok(());
        };
        let path = rest.to_ascii_lowercase();
        let Some((section, key)) = path.split_once("__").filter(|(s, k)| self.knows(s, k)) else {
            let near = self.variables().into_iter().find(|known| known.replace("__", "_") == name);
            let hint = near
                .map_or("a setting is GAOLER_SECTION__KEY, see `gaoler serve --help`".into(), |near| {
                    format!("did you mean {near}?")
                });
            return Err(Wrong(format!("environment: unknown variable {name}; {hint}")));
        };
        let key = format!("{section}.{key}");
        let value = match self.default_of(&key) {
            Some(Value::String(_)) => Value::String(value.to_owned()),
            // Numbers and lists are written as in the file; what does not parse is a string of a wrong type.
            _ => format!("v = {value}")
                .parse::<Table>()
                .ok()
                .and_then(|mut table| table.remove("v"))
                .unwrap_or_else(|| Value::String(value.to_owned())),
        };
        self.set(&key, value, name.to_owned())
    }

    fn set(&mut self, key: &str, value: Value, place: String) -> Result<(), Wrong> {
        let expected = self.default_of(key).map_or("", Value::type_str);
        let value = match value {
            // People write 5 for 5.0.
            Value::Integer(whole) if expected == "float" => Value::Float(whole as f64),
            value => value,
        };
        if value.type_str() != expected {
            return Err(Wrong(format!(
                "{place}: must be {}, not {}",
                article(expected),
                article(value.type_str())
            )));
        }
        if let Some((section, name)) = key.split_once('.')
            && let Some(Value::Table(body)) = self.values.get_mut(section)
        {
            body.insert(name.to_owned(), value);
        }
        self.places.insert(key.to_owned(), place);
        Ok(())
    }

    fn finish(self) -> Result<Settings, Wrong> {
        let settings = Value::Table(self.values.clone()).try_into::<Settings>();
        let settings = settings.map_err(|error| self.out_of_range(&error.to_string()))?;
        check(settings, &|key| match self.places.get(key) {
            Some(place) => place.clone(),
            None => format!("{key} (default)"),
        })
    }

    /// Types were checked before, so what serde still refuses is a number that does not fit, or an entry's key.
    fn out_of_range(&self, error: &str) -> Wrong {
        let misfit = |key: &str, value: &Value| match value {
            Value::Integer(n) => u32::try_from(*n).is_err(),
            Value::Array(list) if list.iter().any(Value::is_table) => match key {
                "models.list" => value.clone().try_into::<Vec<ListedModel>>().is_err(),
                "prices.list" => value.clone().try_into::<Vec<Price>>().is_err(),
                "mcp.catalog" => value.clone().try_into::<Vec<OfferedServer>>().is_err(),
                _ => true,
            },
            // A list of numbers or of texts; one of anything else is neither.
            Value::Array(list) => {
                let texts = list.iter().all(Value::is_str);
                !texts && (list.len() != 2 || list.iter().any(|n| !fits(n)))
            }
            _ => false,
        };
        let place =
            self.places.iter().find(|(key, _)| self.value_of(key).is_some_and(|value| misfit(key, value)));
        let place = place.map_or("settings", |(_, place)| place);
        Wrong(format!("{place}: {}", without_text(&error.trim().replace('\n', " "))))
    }

    fn value_of(&self, key: &str) -> Option<&Value> {
        let (section, name) = key.split_once('.')?;
        self.values.get(section)?.get(name)
    }

    fn default_of(&self, key: &str) -> Option<&Value> {
        let (section, name) = key.split_once('.')?;
        self.known.get(section)?.get(name)
    }

    fn knows(&self, section: &str, key: &str) -> bool {
        self.known.get(section).is_some_and(|keys| keys.get(key).is_some())
    }

    fn variables(&self) -> Vec<String> {
        let sections = self.known.iter().filter_map(|(section, keys)| Some((section, keys.as_table()?)));
        sections
            .flat_map(|(section, keys)| keys.keys().map(move |key| format!("{section}__{key}")))
            .map(|path| format!("{PREFIX}{}", path.to_ascii_uppercase()))
            .collect()
    }
}

/// Where an error is in a file, and what it is. The line itself, which may hold a secret (a variable that the operator sets),
/// is left out: this is logged where a running server reads its files again.
pub fn in_toml(error: &toml::de::Error) -> String {
    let (whole, message) = (error.to_string(), without_text(&error.message().replace('\n', " ")));
    match whole.lines().next().filter(|_| error.span().is_some()) {
        Some(position) => format!("{position}: {message}"),
        None => message,
    }
}

/// What serde says of a value of a wrong type, without the value where it is a text: whoever writes `env = "TOKEN=..."`
/// for a table has written a secret.
fn without_text(message: &str) -> String {
    const BEGINS: &str = "string \"";
    let Some((before, text)) = message.split_once(BEGINS) else { return message.to_owned() };
    // As Debug writes a text: what ends it is the first quote without a backslash before it.
    let mut escaped = false;
    let ends = text.find(|letter| {
        let is_end = letter == '"' && !escaped;
        escaped = letter == '\\' && !escaped;
        is_end
    });
    let after = ends.map_or("", |at| &text[at + 1..]);
    format!("{before}string{}", without_text(after))
}

fn fits(value: &Value) -> bool {
    value.as_integer().is_some_and(|n| u32::try_from(n).is_ok())
}

fn article(kind: &str) -> String {
    match kind {
        "string" | "float" | "boolean" | "datetime" | "table" => format!("a {kind}"),
        "array" => "a list".to_owned(),
        other => format!("an {other}"),
    }
}

fn listed<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// The text of a file that decides what root starts; `name` is what named it.
fn read_file(name: &str, path: &Path) -> Result<String, Wrong> {
    use std::os::unix::fs::MetadataExt;
    let place = path.display();
    let wrong =
        |error: std::io::Error| Wrong(format!("{name} {place}: {error}; give the path of a TOML file"));
    let file = std::fs::File::open(path).map_err(wrong)?;
    let meta = file.metadata().map_err(wrong)?;
    if !meta.is_file() || meta.len() > FILE_BYTES_MAX {
        return Err(Wrong(format!("{name} {place}: not a regular file of at most {FILE_BYTES_MAX} bytes")));
    }
    // Whoever can write this file decides what root starts.
    let ours = [0, nix::unistd::geteuid().as_raw()].contains(&meta.uid());
    if !ours || meta.mode() & 0o022 != 0 {
        return Err(Wrong(format!(
            "{name} {place}: others than root can write it; run: chown root {place} && chmod go-w {place}"
        )));
    }
    let mut text = String::new();
    std::io::Read::read_to_string(&mut std::io::Read::take(file, FILE_BYTES_MAX), &mut text)
        .map_err(wrong)?;
    Ok(text)
}

/// Checks every value, and makes paths absolute, because the supervisor starts from another folder.
fn check(mut settings: Settings, place: &dyn Fn(&str) -> String) -> Result<Settings, Wrong> {
    let wrong = |key: &str, what: String| Err(Wrong(format!("{}: {what}", place(key))));
    let s = &mut settings;
    if let Err(what) = tier(&s.isolation.minimum) {
        return wrong("isolation.minimum", what);
    }
    let (default, maximum) = match (level(&s.level.default), level(&s.level.maximum)) {
        (Ok(default), Ok(maximum)) => (default, maximum),
        (Err(what), _) => return wrong("level.default", what),
        (_, Err(what)) => return wrong("level.maximum", what),
    };
    if default > maximum {
        let what = format!("{default} is looser than level.maximum, which is {maximum}; raise that too");
        return wrong("level.default", what);
    }
    match s.credentials.mode.as_str() {
        "broker" => {}
        "file" => return wrong("credentials.mode", "`file` comes with a later release; use `broker`".into()),
        other => return wrong("credentials.mode", format!("`{other}` is not a mode; use `broker`")),
    }
    let has_tls = match (s.server.tls_certificate.as_os_str(), s.server.tls_key.as_os_str()) {
        (certificate, key) if certificate.is_empty() == key.is_empty() => !key.is_empty(),
        (certificate, _) if certificate.is_empty() => {
            return wrong("server.tls_key", "TLS needs server.tls_certificate beside it".into());
        }
        _ => return wrong("server.tls_certificate", "TLS needs server.tls_key beside it".into()),
    };
    match listen(&s.server.listen, has_tls || s.server.trusted_proxy) {
        Ok(address) => s.server.listen = address.to_string(),
        Err(what) => return wrong("server.listen", what),
    }
    let tls = [
        ("server.tls_certificate", &mut s.server.tls_certificate),
        ("server.tls_key", &mut s.server.tls_key),
    ];
    let tls = tls.into_iter().filter(|_| has_tls);
    for (key, path) in [("state.dir", &mut s.state.dir), ("cli.path", &mut s.cli.path)].into_iter().chain(tls)
    {
        match absolute(path) {
            Ok(full) => *path = full,
            Err(what) => return wrong(key, what),
        }
    }
    if let Err((at, what)) = hosts(&s.level.hosts) {
        return wrong("level.hosts", format!("entry {at}: {what}"));
    }
    if s.level.file != Path::new("") {
        let path = std::mem::take(&mut s.level.file);
        let text = read_file(&place("level.file"), &path)?;
        let own = operator::level(&text, &s.state.dir);
        s.level.own = Some(own.map_err(|what| Wrong(format!("{}: {what}", path.display())))?);
    }
    if let Err(what) = upstream(&s.upstream.url) {
        return wrong("upstream.url", what);
    }
    if let Err(what) = models(&s.models.list) {
        return wrong("models.list", what);
    }
    if let Err(what) = prices(&s.prices.list) {
        return wrong("prices.list", what);
    }
    let budget = &s.budget;
    for (key, usd) in [
        ("budget.cost_per_day_usd", budget.cost_per_day_usd),
        ("budget.cost_per_month_usd", budget.cost_per_month_usd),
    ] {
        if !(0.0..=USD_MAX).contains(&usd) {
            return wrong(key, format!("{usd} is not between 0 and {USD_MAX}"));
        }
        if usd > 0.0 && s.prices.list.is_empty() {
            let what = "nothing says what a token costs; write prices.list, or 0 here";
            return wrong(key, what.into());
        }
    }
    if let Err((key, what)) = mcp::check(&s.mcp) {
        return wrong(key, what);
    }
    let version = s.cli.version.split('.').map(str::parse::<u16>).collect::<Result<Vec<_>, _>>();
    if !version.is_ok_and(|numbers| numbers.len() == 3) {
        return wrong("cli.version", format!("`{}` is not a version such as 2.1.330", s.cli.version));
    }
    if let Err((key, what)) = telemetry::check(&mut s.telemetry, absolute) {
        return wrong(key, what);
    }
    if let Err((key, what)) = uids(s) {
        return wrong(key, what);
    }
    // Of those some are for credentials that the upstream has not vouched for yet.
    let cages = s.uids.run[1].min(s.uids.egress[1]).saturating_sub(VOUCHING_MAX);
    let numbers = [
        ("runs.max", s.runs.max),
        ("runs.tenant_max", s.runs.tenant_max),
        ("runs.queue_max", s.runs.queue_max),
        ("runs.queue_seconds", s.runs.queue_seconds),
        ("runs.drain_seconds", s.runs.drain_seconds),
        ("runs.silence_seconds", s.runs.silence_seconds),
        ("sessions.ttl_days", s.sessions.ttl_days),
        ("ledger.runs_days", s.ledger.runs_days),
        ("rates.tenant_per_minute", s.rates.tenant_per_minute),
        ("rates.address_per_minute", s.rates.address_per_minute),
        ("rates.address_max", s.rates.address_max),
        ("budget.tokens_per_day", s.budget.tokens_per_day),
        ("budget.tokens_per_month", s.budget.tokens_per_month),
        ("budget.reserve_tokens", s.budget.reserve_tokens),
        ("ledger.usage_days", s.ledger.usage_days),
    ];
    for (key, value) in numbers {
        let Some((low, most)) = knobs::bounds(key) else { continue };
        let high = if key == "runs.max" { most.min(cages) } else { most };
        if !(low..=high).contains(&value) {
            let why = match key {
                "runs.max" if value > high && high < most => {
                    ": uids.run and uids.egress must have 8 more, for credentials that are not known yet"
                }
                "ledger.usage_days" => ": a month's budget is counted from its days; ask for 31 at least",
                _ => "",
            };
            return wrong(key, format!("{value} is not between {low} and {high}{why}"));
        }
    }
    Ok(settings)
}

/// A tier to insist on.
fn tier(name: &str) -> Result<Tier, String> {
    let known = || Tier::ALL.iter().rev().map(|tier| tier.name()).collect::<Vec<_>>().join(", ");
    match Tier::from_name(name) {
        Some(tier) => Ok(tier),
        None => Err(format!("`{name}` is not a tier; the tiers are {}", known())),
    }
}

/// A level by its name.
pub fn level(name: &str) -> Result<Level, String> {
    let known = || Level::ALL.iter().map(|level| level.name()).collect::<Vec<_>>().join(", ");
    Level::from_name(name).ok_or_else(|| format!("`{name}` is not a level; the levels are {}", known()))
}

/// What `GET /v1/models` may list: models that a request may name, and names of the operator's own for such; each once.
fn models(list: &[ListedModel]) -> Result<(), String> {
    if list.len() > MODELS_MAX {
        return Err(format!("{} entries; at most {MODELS_MAX} are listed", list.len()));
    }
    for (at, ListedModel { id, display_name, model }) in list.iter().enumerate() {
        let name = |b: u8| b.is_ascii_alphanumeric() || b"-._:/@+".contains(&b);
        let own = !id.is_empty() && id.len() <= MODEL_NAME_BYTES_MAX && id.bytes().all(name);
        if model.is_empty() && !job::is_model(id) {
            return Err(format!(
                "entry {at}: `{id}` is not a full id such as claude-sonnet-5; a name of your own needs `model`"
            ));
        }
        if !model.is_empty() && !own {
            return Err(format!(
                "entry {at}: `{id}` is no name: 1 to {MODEL_NAME_BYTES_MAX} letters, digits and -._:/@+"
            ));
        }
        if !model.is_empty() && !job::is_model(model) {
            return Err(format!("entry {at}: model `{model}` is not one such as sonnet or claude-sonnet-5"));
        }
        // The aliases are always listed.
        let alias = job::is_model(id) && !id.starts_with("claude-");
        if alias || list[..at].iter().any(|other| other.id == *id) {
            return Err(format!("entry {at}: `{id}` is listed already"));
        }
        if display_name.len() > MODEL_NAME_BYTES_MAX || display_name.chars().any(char::is_control) {
            return Err(format!(
                "entry {at}: display_name must be one line of at most {MODEL_NAME_BYTES_MAX} bytes"
            ));
        }
    }
    Ok(())
}

/// Prices, each of another beginning of models' names, and of every kind of token.
fn prices(list: &[Price]) -> Result<(), String> {
    if list.len() > MODELS_MAX {
        return Err(format!("{} entries; at most {MODELS_MAX} are kept", list.len()));
    }
    for (at, price) in list.iter().enumerate() {
        let Price { model, input, output, cache_write, cache_read } = price;
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-".contains(&b);
        if !model.starts_with("claude-") || !model.bytes().all(plain) || model.len() > MODEL_NAME_BYTES_MAX {
            return Err(format!(
                "entry {at}: `{model}` is not what a model's name begins with, such as claude-sonnet-"
            ));
        }
        if list[..at].iter().any(|other| other.model == *model) {
            return Err(format!("entry {at}: `{model}` is there already"));
        }
        let kinds =
            [("input", input), ("output", output), ("cache_write", cache_write), ("cache_read", cache_read)];
        if let Some((kind, _)) = kinds.iter().find(|(_, usd)| !(0.0..=PRICE_MAX).contains(*usd)) {
            return Err(format!(
                "entry {at}: {kind}: write the dollars of a million tokens, from 0 to {PRICE_MAX}"
            ));
        }
    }
    Ok(())
}

fn hosts(list: &[String]) -> Result<(), (usize, String)> {
    list.iter().enumerate().try_for_each(|(at, host)| operator::destination(host).map_err(|what| (at, what)))
}

/// `covered`: what travels to this address is under TLS, ours or that of a proxy before us.
fn listen(text: &str, covered: bool) -> Result<SocketAddr, String> {
    if text.starts_with("unix:") {
        return Err("unix sockets come with a later release; use HOST:PORT such as 127.0.0.1:8080".into());
    }
    // The one name that needs no resolver.
    let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
    let address: SocketAddr = numeric.as_deref().unwrap_or(text).parse().map_err(|_| {
        format!("`{text}` is not HOST:PORT; use an IP address and a port, such as 127.0.0.1:8080")
    })?;
    match address.ip().is_loopback() || covered {
        true => Ok(address),
        false => Err(format!(
            "`{text}` is not loopback, so tenants' tokens would cross a network in the clear; set \
             server.tls_certificate and server.tls_key, or server.trusted_proxy = true where nobody but a proxy that \
             ends TLS can reach it, or listen on 127.0.0.1"
        )),
    }
}

fn upstream(url: &str) -> Result<(), String> {
    if url == "embedded" {
        return Ok(());
    }
    let form = || format!("`{url}` is not `embedded`, https://HOST[:PORT] or http://LOOPBACK[:PORT]");
    // What stands before an @ may be a password: it is not shown.
    if url.contains('@') {
        return Err("leave out the user; the upstream is asked with its tenant's own credential".into());
    }
    let (scheme, authority) = url.split_once("://").ok_or_else(form)?;
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    let (host, port) = match authority.rsplit_once(':').filter(|_| !authority.ends_with(']')) {
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_name = !host.is_empty()
        && host.len() <= 253
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-');
    let is_host = bare.map_or(is_name, |v6| v6.parse::<std::net::Ipv6Addr>().is_ok());
    if !is_host || port.is_some_and(|port| !port.parse::<u16>().is_ok_and(|port| port != 0)) {
        return Err(form());
    }
    let address = bare.unwrap_or(host).parse::<IpAddr>();
    let is_loopback = host == "localhost" || address.is_ok_and(|address| address.is_loopback());
    match scheme {
        "https" => Ok(()),
        "http" if is_loopback => Ok(()),
        "http" => Err(format!("`{url}` would send tenants' tokens in the clear; use https://")),
        _ => Err(form()),
    }
}

fn absolute(path: &Path) -> Result<PathBuf, String> {
    if path.as_os_str().is_empty() {
        return Err("the path is empty".into());
    }
    let full = std::path::absolute(path).map_err(|error| format!("{}: {error}", path.display()))?;
    if full.to_str().is_none() {
        return Err(format!("{}: the path is not UTF-8; choose another", full.display()));
    }
    // The supervisor opens component by component and refuses to climb.
    match full.components().any(|part| part == std::path::Component::ParentDir) {
        true => Err(format!("{}: leave out the `..`", full.display())),
        false => Ok(full),
    }
}

/// Ranges that are not root's, do not overflow and do not touch.
fn uids(settings: &Settings) -> Result<(), (&'static str, String)> {
    let uids = &settings.uids;
    let ranges = [
        ("uids.tenant", uids.tenant),
        ("uids.run", uids.run),
        ("uids.egress", uids.egress),
        ("uids.frontend", [uids.frontend, 1]),
        ("uids.upstream", [uids.upstream, 1]),
        ("uids.ledger", [uids.ledger, 1]),
        ("uids.exporter", [uids.exporter, 1]),
    ];
    // 65534 is the kernel's overflow uid, and everything below belongs to the host's users.
    const FIRST: u32 = 65_536;
    for (at, (key, [first, count])) in ranges.iter().enumerate() {
        let end = u64::from(*first) + u64::from(*count);
        if *first < FIRST || *count == 0 || end > u64::from(u32::MAX) {
            return Err((*key, format!("[{first}, {count}] is not a range of uids of {FIRST} or higher")));
        }
        let touches = |other: &&(&'static str, [u32; 2])| {
            u64::from(other.1[0]) < end && u64::from(*first) < u64::from(other.1[0]) + u64::from(other.1[1])
        };
        if let Some(other) = ranges[at + 1..].iter().find(touches) {
            return Err((*key, format!("overlaps with {}; uids belong to one of them only", other.0)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resolves a table row: a flag, an environment, a file's text.
    fn resolved(
        listen: Option<&str>,
        environment: &[(&str, &str)],
        file: Option<&str>,
    ) -> Result<Settings, Wrong> {
        let flags = Flags::default().with("--listen", "server.listen", listen);
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("gaoler.toml");
        if let Some(text) = file {
            std::fs::write(&path, text).expect("a file");
        }
        let place = path.display().to_string();
        let settings = resolve(&flags, environment, file.map(|_| path.as_path()));
        settings.map_err(|wrong| Wrong(wrong.0.replace(&place, "FILE")))
    }

    #[test]
    fn the_strongest_place_wins() {
        let file = "[server]\nlisten = '127.0.0.1:3'";
        let env: &[(&str, &str)] = &[("GAOLER_SERVER__LISTEN", "127.0.0.1:2"), ("HOME", "/root")];
        let rows = [
            (Some("127.0.0.1:1"), env, Some(file), "127.0.0.1:1"),
            (None, env, Some(file), "127.0.0.1:2"),
            (None, &[], Some(file), "127.0.0.1:3"),
            (None, &[], None, "127.0.0.1:8080"),
            (Some("localhost:9"), &[], None, "127.0.0.1:9"),
            (Some("[::1]:9"), &[], None, "[::1]:9"),
        ];
        for (flag, env, file, expected) in rows {
            let settings = resolved(flag, env, file).expect("good values");
            assert_eq!(settings.server.listen, expected);
        }
    }

    #[test]
    fn every_key_can_come_from_the_environment() {
        let env = [
            ("GAOLER_RUNS__MAX", "7"),
            ("GAOLER_UIDS__RUN", "[3000000, 15]"),
            ("GAOLER_UPSTREAM__URL", "embedded"),
            ("GAOLER_STATE__DIR", "/srv/gaoler"),
            ("GAOLER_TEST_ANYTHING", "is not ours"),
        ];
        let settings = resolved(None, &env, None).expect("good values");
        assert_eq!(settings.runs.max, 7);
        assert_eq!(settings.uids.run, [3_000_000, 15]);
        assert_eq!(settings.upstream.url, "embedded");
        assert_eq!(settings.state.dir, Path::new("/srv/gaoler"));
        let variables = Layers::of_defaults().variables();
        assert!(variables.contains(&"GAOLER_ISOLATION__MINIMUM".to_owned()), "{variables:?}");
    }

    #[test]
    fn r14_a_months_days_are_kept_for_its_budget() {
        let days = |days: &str| resolved(None, &[("GAOLER_LEDGER__USAGE_DAYS", days)], None);
        assert_eq!(days("31").expect("a month").ledger.usage_days, 31);
        for few in ["1", "30"] {
            let Wrong(error) = days(few).expect_err("less than a month");
            assert!(error.starts_with("GAOLER_LEDGER__USAGE_DAYS: "), "{error}");
            assert!(error.contains("is not between 31 and 3660: a month's budget"), "{error}");
        }
    }

    #[test]
    fn only_what_tls_covers_may_leave_the_machine() {
        let pair = [("GAOLER_SERVER__TLS_CERTIFICATE", "/c"), ("GAOLER_SERVER__TLS_KEY", "k")];
        let settings = resolved(Some("0.0.0.0:443"), &pair, None).expect("with TLS");
        assert_eq!(settings.server.listen, "0.0.0.0:443");
        assert_eq!(settings.server.tls_key, std::env::current_dir().expect("a folder").join("k"));
        let proxy = [("GAOLER_SERVER__TRUSTED_PROXY", "true")];
        let settings = resolved(Some("[::]:80"), &proxy, None).expect("behind a proxy");
        assert_eq!((settings.server.listen.as_str(), settings.server.trusted_proxy), ("[::]:80", true));
        let file = "[server]\nlisten = '10.0.0.1:80'\ntrusted_proxy = false";
        assert!(resolved(None, &[], Some(file)).is_err());
        let settings = resolved(None, &pair, None).expect("TLS on loopback is nobody's harm");
        assert_eq!(settings.server.tls_certificate, Path::new("/c"));
    }

    #[test]
    fn every_level_can_be_chosen() {
        for name in ["paranoid", "balanced", "developer"] {
            let env = [("GAOLER_LEVEL__DEFAULT", name), ("GAOLER_LEVEL__MAXIMUM", "developer")];
            assert_eq!(resolved(None, &env, None).expect("good values").level.default, name);
        }
    }

    #[test]
    fn a_level_of_the_operators_own_travels_in_the_settings() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = "extends = 'balanced'\nhosts = ['git.example.com:443']\n[limits]\ntasks = 99";
        std::fs::write(file.path(), text).expect("written");
        let path = file.path().to_str().expect("text");
        let env = [("GAOLER_LEVEL__FILE", path)];
        let settings = resolved(None, &env, None).expect("good values");
        let own = settings.level.own.clone().expect("a level");
        assert_eq!((own.extends.as_str(), own.limits["tasks"]), ("balanced", 99));
        assert_eq!(own.hosts, ["git.example.com:443"]);
        let sealed = toml::to_string(&settings).expect("TOML");
        assert_eq!(toml::from_str::<Settings>(&sealed).expect("settings"), settings);
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o666)).expect("chmod");
        let wrong = resolved(None, &env, None).expect_err("writable").to_string();
        assert!(wrong.contains("others than root can write it"), "{wrong}");
    }

    #[test]
    fn an_operator_lists_models_in_the_file_or_in_the_environment() {
        let file = "[[models.list]]\nid = 'claude-opus-4-8'\ndisplay_name = 'Claude Opus 4.8'\n\
                    [[models.list]]\nid = 'claude-sonnet-5[1m]'";
        let settings = resolved(None, &[], Some(file)).expect("good values");
        let listed: Vec<(&str, &str)> =
            settings.models.list.iter().map(|m| (m.id.as_str(), m.display_name.as_str())).collect();
        assert_eq!(listed, [("claude-opus-4-8", "Claude Opus 4.8"), ("claude-sonnet-5[1m]", "")]);
        let sealed = toml::to_string(&settings).expect("TOML");
        assert_eq!(toml::from_str::<Settings>(&sealed).expect("settings"), settings);
        let env = [("GAOLER_MODELS__LIST", "[{ id = 'claude-x' }]")];
        assert_eq!(resolved(None, &env, Some(file)).expect("good values").models.list.len(), 1);
    }

    #[test]
    fn relative_paths_become_absolute() {
        let settings = resolved(None, &[("GAOLER_CLI__PATH", "bin/claude")], None).expect("good values");
        assert_eq!(settings.cli.path, std::env::current_dir().expect("a folder").join("bin/claude"));
    }

    #[test]
    fn every_wrong_value_says_what_and_where() {
        type Row = (
            Option<&'static str>,
            &'static [(&'static str, &'static str)],
            Option<&'static str>,
            &'static str,
        );
        let rows: &[Row] = &[
            (
                None,
                &[],
                Some("[sever]\nlisten = 'x'"),
                "FILE: unknown key `sever`; the sections are budget, cli, \
              credentials, identity, isolation, ledger, level, mcp, models, prices, rates, runs, server, sessions, state, \
              telemetry, uids, upstream",
            ),
            (
                None,
                &[],
                Some("[server]\nlissten = 'x'"),
                "FILE: unknown key `server.lissten`; [server] knows listen, metrics, tls_certificate, tls_key, trusted_proxy",
            ),
            (None, &[], Some("server = 1"), "FILE: `server` is a section: write [server]"),
            (
                None,
                &[],
                Some("[server]\nlisten = 8080"),
                "FILE: server.listen: must be a string, not an integer",
            ),
            (None, &[], Some("[runs]\nmax = '7'"), "FILE: runs.max: must be an integer, not a string"),
            (None, &[], Some("[runs]\nmax = 0"), "FILE: runs.max: 0 is not between 1 and 1016"),
            (
                None,
                &[],
                Some("[runs]\nmax = 1024"),
                "FILE: runs.max: 1024 is not between 1 and 1016: uids.run and uids.egress must have 8 more, for credentials \
                 that are not known yet",
            ),
            (
                None,
                &[],
                Some("[uids]\nrun = [0, 5]"),
                "FILE: uids.run: [0, 5] is not a range of uids of 65536 or higher",
            ),
            (
                None,
                &[],
                Some("[uids]\nrun = [2000001, 5]\n[runs]\nmax = 5"),
                "uids.tenant (default): overlaps with uids.run; uids belong to one of them only",
            ),
            (
                None,
                &[("GAOLER_RUNS__MAX", "many")],
                None,
                "GAOLER_RUNS__MAX: must be an integer, not a string",
            ),
            (
                None,
                &[("GAOLER_RUNS__MAXIMUM", "1")],
                None,
                "environment: unknown variable GAOLER_RUNS__MAXIMUM; a \
              setting is GAOLER_SECTION__KEY, see `gaoler serve --help`",
            ),
            (
                None,
                &[("GAOLER_SERVER_LISTEN", "x")],
                None,
                "environment: unknown variable GAOLER_SERVER_LISTEN; \
              did you mean GAOLER_SERVER__LISTEN?",
            ),
            (
                Some("8080"),
                &[],
                None,
                "--listen: `8080` is not HOST:PORT; use an IP address and a port, such as \
              127.0.0.1:8080",
            ),
            (
                Some("unix:/run/x"),
                &[],
                None,
                "--listen: unix sockets come with a later release; use HOST:PORT such \
              as 127.0.0.1:8080",
            ),
            (
                Some("0.0.0.0:80"),
                &[],
                None,
                "--listen: `0.0.0.0:80` is not loopback, so tenants' tokens would cross a network in the clear; set \
              server.tls_certificate and server.tls_key, or server.trusted_proxy = true where nobody but a proxy \
              that ends TLS can reach it, or listen on 127.0.0.1",
            ),
            (
                Some("0.0.0.0:80"),
                &[("GAOLER_SERVER__TLS_KEY", "/k")],
                None,
                "GAOLER_SERVER__TLS_KEY: TLS needs server.tls_certificate beside it",
            ),
            (
                None,
                &[("GAOLER_SERVER__TLS_CERTIFICATE", "/c")],
                None,
                "GAOLER_SERVER__TLS_CERTIFICATE: TLS needs server.tls_key beside it",
            ),
            (
                None,
                &[("GAOLER_SERVER__TRUSTED_PROXY", "yes")],
                None,
                "GAOLER_SERVER__TRUSTED_PROXY: must be a boolean, not a string",
            ),
            (
                None,
                &[("GAOLER_LEVEL__MAXIMUM", "paranoid")],
                None,
                "level.default (default): balanced is looser than level.maximum, which is paranoid; raise that too",
            ),
            (
                None,
                &[("GAOLER_LEVEL__DEFAULT", "developer")],
                None,
                "GAOLER_LEVEL__DEFAULT: developer is looser than level.maximum, which is balanced; raise that too",
            ),
            (
                None,
                &[("GAOLER_LEVEL__HOSTS", "['a.example:443', 'b']")],
                None,
                "GAOLER_LEVEL__HOSTS: entry 1: `b` is not HOST:PORT or *.DOMAIN:PORT, such as example.com:443",
            ),
            (
                None,
                &[("GAOLER_BUDGET__COST_PER_DAY_USD", "5")],
                None,
                "GAOLER_BUDGET__COST_PER_DAY_USD: nothing says what a token costs; write prices.list, or 0 here",
            ),
            (
                None,
                &[("GAOLER_BUDGET__COST_PER_MONTH_USD", "-0.5")],
                None,
                "GAOLER_BUDGET__COST_PER_MONTH_USD: -0.5 is not between 0 and 1000000000",
            ),
            (
                None,
                &[],
                Some("[[prices.list]]\nmodel = 'claude-'\ninput = 3\noutput = 15.5\ncache_write = 1"),
                "FILE: prices.list: entry 0: cache_read: write the dollars of a million tokens, from 0 to 100000",
            ),
            (
                None,
                &[],
                Some("[[prices.list]]\nmodel = 'sonnet'"),
                "FILE: prices.list: entry 0: `sonnet` is not what a model's name begins with, such as claude-sonnet-",
            ),
            (
                None,
                &[("GAOLER_PRICES__LIST", "[{ model = 'claude-', input = 'x' }]")],
                None,
                "GAOLER_PRICES__LIST: invalid type: string, expected f64 in `prices.list.input`",
            ),
            (
                None,
                &[("GAOLER_LEVEL__FILE", "/nowhere.toml")],
                None,
                "GAOLER_LEVEL__FILE /nowhere.toml: No such file or directory (os error 2); give the path of a TOML file",
            ),
            (
                None,
                &[],
                Some("[level]\nown = {}"),
                "FILE: unknown key `level.own`; [level] knows default, file, hosts, maximum",
            ),
            (
                None,
                &[("GAOLER_MODELS__LIST", "x")],
                None,
                "GAOLER_MODELS__LIST: must be a list, not a string",
            ),
            (
                None,
                &[],
                Some("[[models.list]]\nid = 'claude-x'\nname = 'x'"),
                "FILE: models.list: unknown field `name`, expected one of `id`, `display_name`, `model` in `models.list`",
            ),
            (
                None,
                &[("GAOLER_RUNS__MAX", "5000000000")],
                Some("[[models.list]]\nid = 'claude-x'"),
                "GAOLER_RUNS__MAX: invalid value: integer `5000000000`, expected u32 in `runs.max`",
            ),
            (
                None,
                &[("GAOLER_MODELS__LIST", "[{ id = 'gpt-4' }]")],
                None,
                "GAOLER_MODELS__LIST: entry 0: `gpt-4` is not a full id such as claude-sonnet-5; a name of your own needs \
                 `model`",
            ),
            (
                None,
                &[("GAOLER_MODELS__LIST", "[{ id = 'gpt 4', model = 'sonnet' }]")],
                None,
                "GAOLER_MODELS__LIST: entry 0: `gpt 4` is no name: 1 to 100 letters, digits and -._:/@+",
            ),
            (
                None,
                &[(
                    "GAOLER_MODELS__LIST",
                    "[{ id = 'a', model = 'sonnet' }, { id = 'b', model = '--model' }]",
                )],
                None,
                "GAOLER_MODELS__LIST: entry 1: model `--model` is not one such as sonnet or claude-sonnet-5",
            ),
            (
                None,
                &[("GAOLER_MODELS__LIST", "[{ id = 'sonnet', model = 'opus' }]")],
                None,
                "GAOLER_MODELS__LIST: entry 0: `sonnet` is listed already",
            ),
            (
                None,
                &[("GAOLER_MODELS__LIST", "[{ id = 'opus' }]")],
                None,
                "GAOLER_MODELS__LIST: entry 0: `opus` is listed already",
            ),
            (
                None,
                &[("GAOLER_MODELS__LIST", "[{ id = 'claude-x' }, { id = 'claude-x' }]")],
                None,
                "GAOLER_MODELS__LIST: entry 1: `claude-x` is listed already",
            ),
            (
                None,
                &[("GAOLER_MODELS__LIST", "[{ id = 'claude-x', display_name = \"a\\nb\" }]")],
                None,
                "GAOLER_MODELS__LIST: entry 0: display_name must be one line of at most 100 bytes",
            ),
            (
                None,
                &[("GAOLER_LEVEL__MAXIMUM", "lax")],
                None,
                "GAOLER_LEVEL__MAXIMUM: `lax` is not a level; the levels are paranoid, balanced, developer",
            ),
            (
                None,
                &[("GAOLER_ISOLATION__MINIMUM", "strong")],
                None,
                "GAOLER_ISOLATION__MINIMUM: `strong` is not a tier; the tiers are kernel, namespaces, uid, directory",
            ),
            (
                None,
                &[("GAOLER_ISOLATION__MINIMUM", "none")],
                None,
                "GAOLER_ISOLATION__MINIMUM: `none` is not a tier; \
              the tiers are kernel, namespaces, uid, directory",
            ),
            (
                None,
                &[("GAOLER_CREDENTIALS__MODE", "file")],
                None,
                "GAOLER_CREDENTIALS__MODE: `file` comes with a later release; use `broker`",
            ),
            (
                None,
                &[("GAOLER_CLI__VERSION", "2.1")],
                None,
                "GAOLER_CLI__VERSION: `2.1` is not a version such as 2.1.330",
            ),
            (None, &[("GAOLER_STATE__DIR", "")], None, "GAOLER_STATE__DIR: the path is empty"),
            (
                None,
                &[("GAOLER_STATE__DIR", "/a/../b")],
                None,
                "GAOLER_STATE__DIR: /a/../b: leave out the `..`",
            ),
            (
                None,
                &[("GAOLER_UPSTREAM__URL", "http://example.com")],
                None,
                "GAOLER_UPSTREAM__URL: \
              `http://example.com` would send tenants' tokens in the clear; use https://",
            ),
            (
                None,
                &[("GAOLER_UPSTREAM__URL", "https://u@h")],
                None,
                "GAOLER_UPSTREAM__URL: leave out the user; the upstream is asked with its tenant's own credential",
            ),
        ];
        for (flag, env, file, expected) in rows {
            let wrong = resolved(*flag, env, *file).expect_err(expected);
            assert_eq!(wrong.to_string(), *expected);
        }
    }

    #[test]
    fn a_text_in_a_wrong_place_is_not_repeated() {
        let catalog = |env: &str| format!("[[mcp.catalog]]\nname = 'a'\ncommand = 'b'\n{env}");
        for row in [
            r#"env = "TOKEN=canary""#,
            r#"env = 'TOKEN="canary\'"#,
            r#"env = 'TOKEN=\"canary" and string "canary'"#,
            r#"args = "--token canary""#,
        ] {
            let wrong = resolved(None, &[], Some(&catalog(row))).expect_err(row).to_string();
            assert!(wrong.starts_with("FILE: mcp.catalog: invalid type: string, expected a "), "{wrong}");
            assert!(!wrong.contains("canary") && wrong.contains("mcp.catalog"), "{wrong}");
            let level = format!("extends = 'balanced'\n{}", row.replace("args", "hosts"));
            let wrong = operator::level(&level, Path::new("/var/lib/gaoler")).expect_err(row);
            assert!(wrong.contains("line 2") && wrong.contains("invalid type: string, "), "{wrong}");
            assert!(!wrong.contains("canary"), "{wrong}");
        }
        let url = "[upstream]\nurl = 'https://me:canary@proxy.example'";
        let wrong = resolved(None, &[], Some(url)).expect_err("a password").to_string();
        assert!(wrong.contains("leave out the user") && !wrong.contains("canary"), "{wrong}");
    }

    #[test]
    fn text_that_is_not_toml_names_its_line() {
        let wrong = resolved(None, &[], Some("[server\n")).expect_err("not TOML").to_string();
        assert!(wrong.starts_with("FILE: not TOML: TOML parse error at line 1"), "{wrong}");
        let secret = "[[mcp.catalog]]\nname = 'a'\nenv = { TOKEN = 'canary }";
        let wrong = resolved(None, &[], Some(secret)).expect_err("not TOML").to_string();
        assert!(
            wrong.contains("line 3") && !wrong.contains("canary"),
            "what stands there is not shown: {wrong}"
        );
        let wrong = resolved(None, &[], Some("[runs]\nmax = 5000000000")).expect_err("too large").to_string();
        assert!(
            wrong.starts_with("FILE: runs.max: invalid value: integer `5000000000`, expected u32"),
            "{wrong}"
        );
    }

    #[test]
    fn upstreams_are_https_or_loopback() {
        let good = [
            "embedded",
            "https://api.anthropic.com",
            "https://h:8443/",
            "http://127.0.0.1:9",
            "http://[::1]:9",
            "http://localhost:1",
            "https://[2001:db8::1]",
        ];
        let bad = [
            "",
            "https://",
            "https://h:0",
            "https://h:x",
            "https://h/v1",
            "ftp://h",
            "http://10.0.0.1",
            "https://h?x",
            "https://[::1",
            "https://a b",
        ];
        good.iter().for_each(|url| assert_eq!(upstream(url), Ok(()), "{url}"));
        bad.iter().for_each(|url| assert!(upstream(url).is_err(), "{url}"));
    }

    #[test]
    fn a_file_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o666)).expect("chmod");
        let wrong = resolve(&Flags::default(), [], Some(file.path())).expect_err("writable").to_string();
        assert!(wrong.contains("others than root can write it; run: chown root"), "{wrong}");
        let wrong = resolve(&Flags::default(), [], Some(Path::new("/nowhere.toml"))).expect_err("missing");
        assert!(wrong.0.starts_with("--config /nowhere.toml: No such file"), "{wrong}");
    }
}
