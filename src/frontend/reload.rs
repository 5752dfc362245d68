//! A reload: what of the operator's settings is taken while tenants are served, and what waits for the next start.
//! It must never take a setting that another process was started or confined with, nor half of what was found.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use toml::{Table, Value};

use gaoler_policy::settings::Settings;

use super::error::ApiError;
use super::rates::Rates;
use super::{Frontend, log, tls};
use crate::knobs::{self, KNOBS};
use crate::reload::{TOLD_BYTES_MAX, Told};

/// How long a reload may be read. The supervisor gives it 30 s.
const TOLD_WAIT: Duration = Duration::from_secs(40);
/// How long an operator waits for one, with another before it.
const ASKED_WAIT: Duration = Duration::from_secs(100);
/// Reloads that have begun and were not looked at. The supervisor starts one after another.
const BEGUN_MAX: usize = 16;
/// More than a part of what is told.
const PART_BYTES: usize = 64 * 1024;

/// What holds until the next reload.
pub struct Live {
    /// The settings in force.
    pub settings: Arc<Settings>,
    /// Who asked how often.
    pub rates: Rates,
    /// What the listener's connections begin with.
    pub tls: Option<TlsAcceptor>,
    /// The first page of the models, as it is sent.
    pub models: OnceLock<Option<Bytes>>,
}

impl Live {
    /// As the server starts.
    pub fn new(settings: Settings, tls: Option<TlsAcceptor>) -> Live {
        Live { rates: Rates::new(&settings), settings: Arc::new(settings), tls, models: OnceLock::new() }
    }
}

/// What a reload has done: keys of settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// In force from now on.
    pub taken: Vec<&'static str>,
    /// In force after the next start.
    pub restart: Vec<&'static str>,
}

/// What an operator who has asked for a reload is told.
type Outcome = Result<Changes, String>;

/// A reload that the supervisor has started: the frontend's word that it came after, and where it tells what it finds.
pub type Begun = (u64, Option<OwnedFd>);

/// Those who have asked for a reload, and those that have begun.
pub struct Reloads {
    asked: Mutex<Asked>,
    wishes: mpsc::Sender<u64>,
    begun: mpsc::Sender<Begun>,
}

#[derive(Default)]
struct Asked {
    count: u64,
    /// Whoever waits, with the count that theirs was.
    waiting: Vec<(u64, oneshot::Sender<Outcome>)>,
}

/// The other ends.
pub struct Ends {
    /// What the supervisor is to be told: how often there was a wish, each time.
    pub wishes: mpsc::Receiver<u64>,
    /// What [`read`] reads.
    pub begun: mpsc::Receiver<Begun>,
}

impl Reloads {
    /// None yet.
    pub fn new() -> (Reloads, Ends) {
        let (wishes, wished) = mpsc::channel(BEGUN_MAX);
        let (begun, read) = mpsc::channel(BEGUN_MAX);
        (Reloads { asked: Mutex::default(), wishes, begun }, Ends { wishes: wished, begun: read })
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        // What is done under the lock cannot stop half way.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a reload that begins from now on, and waits for what it did.
    ///
    /// # Errors
    /// 409 for settings that cannot be honoured; 503 where nobody can say.
    pub async fn ask(&self) -> Result<Changes, ApiError> {
        let unavailable =
            || ApiError::new(503, "reload_unavailable", "The settings could not be read again in time.");
        let (told, heard) = oneshot::channel();
        let number = {
            let mut asked = self.asked();
            asked.count += 1;
            let number = asked.count;
            asked.waiting.push((number, told));
            number
        };
        self.wishes.send(number).await.map_err(|_| unavailable())?;
        match timeout(ASKED_WAIT, heard).await {
            Ok(Ok(Ok(changes))) => Ok(changes),
            Ok(Ok(Err(why))) => {
                let message = format!("Nothing was changed: {why}.");
                Err(ApiError::new(409, "settings_wrong", message).final_word())
            }
            _ => Err(unavailable()),
        }
    }

    /// The supervisor has started one, or could not.
    ///
    /// # Errors
    /// More of them than there can be.
    pub fn has_begun(&self, asks: u64, told: Option<OwnedFd>) -> io::Result<()> {
        self.begun.try_send((asks, told)).map_err(|error| io::Error::other(error.to_string()))
    }

    /// Tells everybody who had asked before it began.
    fn answer(&self, asks: u64, outcome: &Outcome) {
        for (_, told) in self.asked().waiting.extract_if(.., |(number, _)| *number <= asks) {
            let _ = told.send(outcome.clone());
        }
    }
}

/// Reads what reloads find, one after another, and takes it.
pub async fn read(frontend: Arc<Frontend>, mut begun: mpsc::Receiver<Begun>) {
    while let Some((asks, told)) = begun.recv().await {
        let found = match told {
            Some(told) => timeout(TOLD_WAIT, whole(told)).await.unwrap_or_else(|_| Err(late())),
            None => Err("the reload could not be started; the supervisor's log says why".into()),
        };
        let outcome = found.and_then(|found| take(&frontend, found));
        match &outcome {
            Ok(changes) => log::line(
                "reloaded",
                &[("taken", json!(changes.taken)), ("restart_needed_for", json!(changes.restart))],
            ),
            Err(why) => log::line("reload_failed", &[("error", why.as_str().into())]),
        }
        frontend.reloads.answer(asks, &outcome);
    }
}

fn late() -> String {
    "the files of the settings could not be read in time".into()
}

async fn whole(told: OwnedFd) -> Result<Told, String> {
    let broken = |error: io::Error| format!("the reload cannot be heard: {error}");
    // Packets, each read whole; the last one is empty.
    let mut socket = UnixStream::from_std(told.into()).map_err(broken)?;
    let (mut text, mut part) = (zeroize::Zeroizing::new(Vec::new()), vec![0; PART_BYTES]);
    loop {
        let length = socket.read(&mut part).await.map_err(broken)?;
        if length == 0 {
            break;
        }
        if text.len() + length > TOLD_BYTES_MAX {
            return Err(format!("settings and certificate take more than {TOLD_BYTES_MAX} bytes"));
        }
        text.extend_from_slice(&part[..length]);
    }
    zeroize::Zeroize::zeroize(&mut part);
    if text.is_empty() {
        return Err(late());
    }
    serde_json::from_slice(&text).map_err(|_| "the reload ended before its last word".into())
}

/// All of it or nothing.
fn take(frontend: &Frontend, found: Told) -> Outcome {
    let (text, pair) = match found {
        Told::Found { settings, tls } => (settings, tls),
        Told::Wrong(why) => return Err(why),
    };
    let found: Settings = toml::from_str(&text).map_err(|error| error.to_string())?;
    let live = frontend.live();
    let (settings, changes) = merged(&live.settings, &found)?;
    let tls = match (&live.tls, has_tls(&found)) {
        (Some(_), true) => {
            let pair = STANDARD.decode(&*pair).map_err(|_| "the certificate did not arrive".to_owned())?;
            Some(tls::from_both(pair).map_err(|_| "the certificate and key are none".to_owned())?)
        }
        (old, _) => old.clone(),
    };
    frontend.admission.bound(&settings.runs);
    frontend.budgets.set(&settings);
    frontend.traces.sample(settings.telemetry.sample_ratio);
    let rates = live.rates.with(&settings);
    frontend.set_live(Live { settings: Arc::new(settings), rates, tls, models: OnceLock::new() });
    Ok(changes)
}

fn has_tls(settings: &Settings) -> bool {
    !settings.server.tls_certificate.as_os_str().is_empty()
}

/// What is in force with what was found, and what that changes.
fn merged(old: &Settings, found: &Settings) -> Result<(Settings, Changes), String> {
    let table = |settings: &Settings| Table::try_from(settings).map_err(|error| error.to_string());
    let (mut taken, new) = (table(old)?, table(found)?);
    // A token's seal is another one each time.
    let (before, after) = (table(&unsealed(old))?, table(&unsealed(found))?);
    let at = |table: &Table, key: &str| -> Option<Value> {
        let (section, name) = key.split_once('.')?;
        Some(table.get(section)?.as_table()?.get(name)?.clone())
    };
    let mut changes = Changes::default();
    for knob in KNOBS {
        let key = knob.key;
        let own = key == "level.file" && old.level.own != found.level.own;
        let changed = own || at(&before, key) != at(&after, key);
        // TLS comes and goes with a start: other settings were checked with it.
        let live = knob.live && (!knobs::is_tls(key) || has_tls(old) == has_tls(found));
        if let (true, Some((section, name)), Some(value)) = (live, key.split_once('.'), at(&new, key))
            && let Some(section) = taken.get_mut(section).and_then(Value::as_table_mut)
        {
            section.insert(name.to_owned(), value);
        }
        match (changed, live) {
            (true, true) => changes.taken.push(key),
            (true, false) => changes.restart.push(key),
            (false, _) => {}
        }
    }
    Ok((taken.try_into().map_err(|error: toml::de::Error| error.to_string())?, changes))
}

fn unsealed(settings: &Settings) -> Settings {
    let mut settings = settings.clone();
    for server in settings.mcp.catalog.iter_mut().filter(|server| !server.token_file.is_empty()) {
        server.token_file = "sealed".into();
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_policy::settings::{OfferedServer, OwnLevel};

    #[test]
    fn every_setting_is_taken_or_waits_for_a_start_and_is_named() {
        // Each setting alone has another value; the rest must stay as it is.
        let old = Settings::default();
        let before = Table::try_from(&old).expect("a table");
        for knob in KNOBS {
            let (section, name) = knob.key.split_once('.').expect("a key");
            let mut after = before.clone();
            let value = after[section].as_table_mut().expect("a section").get_mut(name).expect("a value");
            *value = match (&*value, knob.key) {
                (Value::String(text), _) => Value::String(format!("{text}x")),
                (Value::Integer(n), _) => Value::Integer(n + 1),
                (Value::Float(n), _) => Value::Float(n + 0.25),
                (Value::Boolean(is), _) => Value::Boolean(!is),
                (Value::Array(list), _) if !list.is_empty() => {
                    Value::Array(list.iter().rev().cloned().collect())
                }
                (_, "models.list") => {
                    toml::from_str::<Table>("v = [{ id = \"a\" }]").expect("a list")["v"].clone()
                }
                (_, "mcp.catalog") => toml::from_str::<Table>("v = [{ name = \"a\", command = \"b\" }]")
                    .expect("a list")["v"]
                    .clone(),
                (_, "prices.list") => {
                    let text = "v = [{ model = \"a\", input = 1.0, output = 1.0, cache_write = 1.0, cache_read = 1.0 }]";
                    toml::from_str::<Table>(text).expect("a list")["v"].clone()
                }
                (Value::Array(_), _) => Value::Array(vec![Value::String("a.example:443".into())]),
                (other, key) => panic!("{key}: {other}"),
            };
            let found: Settings = after.try_into().expect(knob.key);
            let (taken, changes) = merged(&old, &found).expect(knob.key);
            // To begin with TLS is a matter of a start, whichever of the two says so.
            let live = knob.live && knob.key != "server.tls_certificate";
            let expected =
                if live { (&found, [vec![knob.key], vec![]]) } else { (&old, [vec![], vec![knob.key]]) };
            assert_eq!((&taken, [changes.taken, changes.restart]), expected, "{}", knob.key);
        }
    }

    #[test]
    fn a_certificate_is_renewed_and_tls_neither_begun_nor_ended() {
        let with = |certificate: &str| {
            let mut settings = Settings::default();
            (settings.server.tls_certificate, settings.server.tls_key) = (certificate.into(), "k".into());
            settings
        };
        let (plain, old, new) = (Settings::default(), with("a"), with("b"));
        let keys = |old, new| {
            let (taken, changes) = merged(old, new).expect("settings");
            (taken.server.tls_certificate.clone(), changes.taken, changes.restart)
        };
        assert_eq!(keys(&old, &new), ("b".into(), vec!["server.tls_certificate"], vec![]));
        let both = vec!["server.tls_certificate", "server.tls_key"];
        assert_eq!(keys(&plain, &new), ("".into(), vec![], both.clone()));
        assert_eq!(keys(&old, &plain), ("a".into(), vec![], both));
    }

    #[test]
    fn a_level_of_the_operators_and_a_renewed_token_are_seen_for_what_they_are() {
        let mut old = Settings::default();
        old.level.file = "/level.toml".into();
        let mut new = old.clone();
        new.level.own = Some(OwnLevel::default());
        let (taken, changes) = merged(&old, &new).expect("settings");
        assert_eq!((taken.level.own.is_none(), changes.restart), (true, vec!["level.file"]));
        let with = |token: &str| {
            let server = OfferedServer {
                name: "a".into(),
                url: "https://a.example".into(),
                token_file: token.into(),
                ..OfferedServer::default()
            };
            let mut settings = Settings::default();
            settings.mcp.catalog = vec![server];
            settings
        };
        let (taken, changes) = merged(&with("one"), &with("two")).expect("settings");
        assert_eq!((taken.mcp.catalog[0].token_file.as_str(), changes), ("two", Changes::default()));
        let (_, changes) = merged(&with(""), &with("two")).expect("settings");
        assert_eq!(changes.taken, ["mcp.catalog"]);
    }
}
