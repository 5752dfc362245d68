//! `gaoler serve`: looks at everything that can be looked at without privilege, then becomes the supervisor.
//! It must never start a server that a later step would refuse for a reason that is already visible.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gaoler_policy::settings::{BYTES_MAX, Settings};
use gaoler_seal::OFFERED;
use gaoler_sys::memfd;
use zeroize::{Zeroize, Zeroizing};

use crate::frontend::tls::{self, Wrong};
use crate::mcp::Place;
use crate::reload::Origin;
use crate::{supervisor, telemetry, vault};

/// Bytes of a token of the operator's catalogue.
const TOKEN_BYTES_MAX: u64 = 4096;

/// Becomes the server.
///
/// # Errors
/// What stands in the way, as a sentence that says what to do.
pub fn serve(settings: &Settings, arguments: &[OsString]) -> Result<Infallible, String> {
    cli(&settings.cli.path)?;
    let traces = telemetry::settings(&settings.telemetry)?;
    vault::keys(&settings.state.dir)?;
    port(&settings.server.listen)?;
    let found = found(settings, &settings.state.dir)?;
    let tls = memfd::sealed("tls", &found.tls).map_err(|error| format!("memfd_create: {error}"))?;
    supervisor::become_server(&found.settings, tls, Origin::sealed(arguments, settings)?, traces)
}

/// Settings, with what they name files for.
pub struct Found {
    /// As processes are told them.
    pub settings: Settings,
    /// The listener's certificate and key, empty without TLS: whoever serves has the key's bytes and no way to its file.
    pub tls: Zeroizing<Vec<u8>>,
}

/// What these settings name, with tokens sealed by the key of this state folder.
///
/// # Errors
/// A file that is not what it must be, as a sentence.
pub fn found(settings: &Settings, state: &Path) -> Result<Found, String> {
    let tls = tls(settings)?;
    let settings = with_tokens(settings, state)?;
    let bytes = toml::to_string(&settings).map_err(|error| format!("settings: {error}"))?.len();
    match bytes > BYTES_MAX {
        true => Err(format!("the settings take {bytes} bytes, and may take {BYTES_MAX}; list less")),
        false => Ok(Found { settings, tls }),
    }
}

/// The settings as processes are told them: in the place of each token's file is the token, sealed for egress together
/// with the place that it opens. Nobody between here and there can read it, or have it sent elsewhere.
fn with_tokens(settings: &Settings, state: &Path) -> Result<Settings, String> {
    let mut settings = settings.clone();
    let public = vault::public(state);
    let places = settings.mcp.clone();
    for (at, server) in settings.mcp.catalog.iter_mut().enumerate() {
        if server.token_file.is_empty() {
            continue;
        }
        let key = format!("mcp.catalog: entry {at}: token_file {}", server.token_file);
        let text = std::fs::File::open(&server.token_file).and_then(|file| {
            let mut text = Zeroizing::new(Vec::new());
            file.take(TOKEN_BYTES_MAX + 1).read_to_end(&mut text).map(|_| text)
        });
        let text = text.map_err(|error| format!("{key}: {error}; name a file that gaoler may read"))?;
        let token = text.trim_ascii();
        let fits =
            (1..=TOKEN_BYTES_MAX).contains(&(token.len() as u64)) && token.iter().all(u8::is_ascii_graphic);
        if !fits {
            return Err(format!("{key}: must hold one token of 1 to {TOKEN_BYTES_MAX} visible characters"));
        }
        let place = Place::parse(&server.url, &places).map_err(|what| format!("{key}: url {what}"))?;
        let what = format!("{}{}\n", place.origin(), place.path);
        let opens = Zeroizing::new([what.as_bytes(), token].concat());
        // Without a key the supervisor refuses the state folder, and says why.
        let sealed = public.as_ref().and_then(|public| gaoler_seal::seal(public, &OFFERED, &opens));
        server.token_file = sealed.map(|sealed| STANDARD.encode(sealed)).unwrap_or_default();
    }
    Ok(settings)
}

/// The listener's certificate and key in one text, empty without TLS.
fn tls(settings: &Settings) -> Result<Zeroizing<Vec<u8>>, String> {
    let server = &settings.server;
    let mut both = Zeroizing::new(Vec::new());
    if !server.tls_certificate.as_os_str().is_empty() {
        let (certificate, key) = (&server.tls_certificate, &server.tls_key);
        let mut text = pem("server.tls_certificate", certificate)?;
        both.append(&mut text);
        text = pem("server.tls_key", key)?;
        tls::acceptor(&both, &text).map_err(|wrong| match wrong {
            Wrong::Certificate(what) => format!("server.tls_certificate {}: {what}", certificate.display()),
            Wrong::Key(what) => format!("server.tls_key {}: {what}", key.display()),
        })?;
        // A file need not end with the line's end that the next text needs before it.
        both.push(b'\n');
        both.extend_from_slice(&text);
        text.zeroize();
    }
    Ok(both)
}

fn pem(key: &str, path: &Path) -> Result<Vec<u8>, String> {
    let place = path.display();
    let wrong =
        |error: std::io::Error| format!("{key} {place}: {error}; name a PEM file that gaoler may read");
    let file = std::fs::File::open(path).map_err(wrong)?;
    let meta = file.metadata().map_err(wrong)?;
    if !meta.is_file() || meta.len() > tls::PEM_BYTES_MAX as u64 / 2 {
        return Err(format!("{key} {place}: not a regular file of at most {} bytes", tls::PEM_BYTES_MAX / 2));
    }
    let mut text = Vec::new();
    file.take(meta.len()).read_to_end(&mut text).map_err(wrong)?;
    Ok(text)
}

fn cli(path: &Path) -> Result<(), String> {
    let place = path.display();
    let fetch = "fetch the pinned one with scripts/fetch-cli and name it with --cli";
    let meta = std::fs::metadata(path).map_err(|error| format!("the CLI {place}: {error}; {fetch}"))?;
    match meta.is_file() && meta.permissions().mode() & 0o111 != 0 {
        true => Ok(()),
        false => Err(format!("the CLI {place} is not an executable file; {fetch}")),
    }
}

/// The supervisor binds for itself; this only turns a port that is taken into a plain sentence.
fn port(listen: &str) -> Result<(), String> {
    let address: SocketAddr = listen.parse().map_err(|error| format!("{listen}: {error}"))?;
    match TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Err(format!("{address} is taken by another process; choose another address with --listen"))
        }
        Err(error) => Err(format!("cannot listen on {address}: {error}; choose another with --listen")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let missing = cli(Path::new("/nowhere/claude")).expect_err("missing");
        assert!(missing.starts_with("the CLI /nowhere/claude: No such file"), "{missing}");
        let plain = cli(Path::new("/etc/passwd")).expect_err("no program");
        assert!(plain.starts_with("the CLI /etc/passwd is not an executable file"), "{plain}");
        let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
        let taken = holder.local_addr().expect("bound").to_string();
        let sentence = format!("{taken} is taken by another process; choose another address with --listen");
        assert_eq!(port(&taken), Err(sentence));
        assert_eq!(port("127.0.0.1:0"), Ok(()));
    }

    #[test]
    fn a_token_of_the_catalogue_is_sealed_with_its_place_before_anybody_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("token");
        let of = |token: &str| {
            std::fs::write(&file, token).expect("written");
            let mut settings = Settings::default();
            settings.state.dir = folder.path().join("state");
            settings.mcp.catalog = vec![gaoler_policy::settings::OfferedServer {
                name: "a".into(),
                url: "https://A.example/mcp".into(),
                token_file: file.display().to_string(),
                ..Default::default()
            }];
            settings
        };
        let settings = of("the-operators-token\n");
        vault::keys(&settings.state.dir).expect("keys");
        let state = settings.state.dir.clone();
        let told = with_tokens(&settings, &state).expect("settings");
        let sealed = STANDARD.decode(&told.mcp.catalog[0].token_file).expect("base64");
        let key =
            std::fs::read(settings.state.dir.join("vault")).expect("a key").try_into().expect("32 bytes");
        let opened = gaoler_seal::Vault::of(key).open(&OFFERED, &sealed).expect("opened");
        assert_eq!(opened.as_slice(), b"https://a.example:443/mcp\nthe-operators-token");
        for wrong in ["", "two words", "\u{e9}"] {
            let why = with_tokens(&of(wrong), &state).expect_err("no token");
            assert!(why.contains("must hold one token"), "{why}");
        }
        std::fs::remove_file(&file).expect("removed");
        let why = with_tokens(&settings, &state).expect_err("no file");
        assert!(why.contains("entry 0: token_file") && why.contains("No such file"), "{why}");
    }
}
