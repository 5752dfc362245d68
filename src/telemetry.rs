//! Traces as the command line sees them: where they go is checked, and what is secret of it sealed for the exporter.
//! It must never put a header's value into a message, an argument or the settings.

use std::io::Read;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use gaoler_exporter_wire::{SETTINGS_BYTES_MAX, Settings, encode_settings};
use gaoler_policy::settings::Telemetry;
use gaoler_sys::memfd;
use http::{HeaderName, HeaderValue, Uri};
use zeroize::Zeroize;

/// Where a collector takes traces.
const PATH: &str = "/v1/traces";
/// Bytes of either file.
const FILE_BYTES_MAX: u64 = SETTINGS_BYTES_MAX as u64 / 4;
/// Headers, at most.
const HEADERS_MAX: usize = 32;
/// Headers that are the exporter's own.
const OWN: [&str; 6] =
    ["content-type", "content-length", "host", "connection", "transfer-encoding", "content-encoding"];

/// Checks the section, and makes its paths absolute.
///
/// # Errors
/// The key, and what is wrong with it.
pub fn check(
    telemetry: &mut Telemetry,
    absolute: impl Fn(&Path) -> Result<PathBuf, String>,
) -> Result<(), (&'static str, String)> {
    let Telemetry { otlp_endpoint, otlp_headers, otlp_ca, sample_ratio } = telemetry;
    if !(0.0..=1.0).contains(sample_ratio) {
        return Err(("telemetry.sample_ratio", format!("{sample_ratio} is not between 0 and 1")));
    }
    let is_set = !otlp_endpoint.is_empty();
    let covered = if is_set {
        let uri = endpoint(otlp_endpoint).map_err(|what| ("telemetry.otlp_endpoint", what))?;
        uri.scheme_str() == Some("https") || uri.host().is_some_and(is_loopback)
    } else {
        false
    };
    for (key, path) in [("telemetry.otlp_headers", otlp_headers), ("telemetry.otlp_ca", otlp_ca)] {
        if path.as_os_str().is_empty() {
            continue;
        }
        if !is_set {
            return Err((key, "it needs telemetry.otlp_endpoint beside it".into()));
        }
        if key == "telemetry.otlp_headers" && !covered {
            let what =
                "they would cross a network in the clear; name an https:// endpoint, or one on loopback";
            return Err((key, what.into()));
        }
        *path = absolute(path).map_err(|what| (key, what))?;
    }
    Ok(())
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// The whole address: the setting, and the path unless it has one.
fn endpoint(text: &str) -> Result<Uri, String> {
    let wrong = || format!("`{text}` is not a collector's address; write one such as http://127.0.0.1:4318");
    // What stands before an @ may be a password: it is not shown.
    if text.contains('@') {
        return Err("leave out the user; a key goes into the file of telemetry.otlp_headers".into());
    }
    let uri: Uri = text.parse().map_err(|_| wrong())?;
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    if !known || uri.host().is_none_or(str::is_empty) || uri.query().is_some() || uri.port_u16() == Some(0) {
        return Err(wrong());
    }
    let path = uri.path().trim_end_matches('/');
    let path = if path.ends_with(PATH) { path.to_owned() } else { format!("{path}{PATH}") };
    let mut parts = uri.into_parts();
    parts.path_and_query = Some(path.parse().map_err(|_| wrong())?);
    Uri::from_parts(parts).map_err(|_| wrong())
}

/// The exporter's settings in a sealed memory file; `None` where there are to be no traces.
///
/// # Errors
/// A file that cannot be read, or holds no headers or no certificates.
pub fn settings(telemetry: &Telemetry) -> Result<Option<OwnedFd>, String> {
    if telemetry.otlp_endpoint.is_empty() {
        return Ok(None);
    }
    let url =
        endpoint(&telemetry.otlp_endpoint).map_err(|what| format!("telemetry.otlp_endpoint: {what}"))?;
    let mut text = file("telemetry.otlp_headers", &telemetry.otlp_headers)?;
    let headers = headers(&text)
        .map_err(|what| format!("telemetry.otlp_headers {}: {what}", telemetry.otlp_headers.display()));
    text.zeroize();
    let authorities = file("telemetry.otlp_ca", &telemetry.otlp_ca)?;
    if !telemetry.otlp_ca.as_os_str().is_empty() && !authorities.contains("-----BEGIN CERTIFICATE-----") {
        return Err(format!(
            "telemetry.otlp_ca {}: there is no certificate in it",
            telemetry.otlp_ca.display()
        ));
    }
    let mut bytes = encode_settings(&Settings { url: url.to_string(), headers: headers?, authorities });
    let sealed = memfd::sealed("traces", &bytes).map_err(|error| format!("memfd_create: {error}"));
    bytes.zeroize();
    sealed.map(Some)
}

/// The text of a file; nothing where none is named.
fn file(key: &str, path: &Path) -> Result<String, String> {
    if path.as_os_str().is_empty() {
        return Ok(String::new());
    }
    let place = path.display();
    let wrong = |error: std::io::Error| format!("{key} {place}: {error}; name a file that gaoler may read");
    let file = std::fs::File::open(path).map_err(wrong)?;
    let meta = file.metadata().map_err(wrong)?;
    if !meta.is_file() || meta.len() > FILE_BYTES_MAX {
        return Err(format!("{key} {place}: not a regular file of at most {FILE_BYTES_MAX} bytes"));
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(wrong)?;
    Ok(text)
}

/// Lines of `name: value`. What is wrong is told by its line, never by its text.
fn headers(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = || format!("line {at} is not `name: value`");
        let (name, value) = line.split_once(':').ok_or_else(wrong)?;
        let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| wrong())?;
        let value = value.trim();
        HeaderValue::from_str(value).map_err(|_| wrong())?;
        if OWN.contains(&name.as_str()) {
            return Err(format!("line {at} names {name}, which is gaoler's own"));
        }
        found.push((name.to_string(), value.to_owned()));
    }
    match found.len() <= HEADERS_MAX {
        true => Ok(found),
        false => Err(format!("{} headers; at most {HEADERS_MAX}", found.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_whole_address() {
        let of = |text: &str| endpoint(text).map(|uri| uri.to_string());
        let good = [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
            ("https://otel.example/api/x", "https://otel.example/api/x/v1/traces"),
            ("https://otel.example/v1/traces", "https://otel.example/v1/traces"),
            ("http://[::1]:4318", "http://[::1]:4318/v1/traces"),
        ];
        for (text, whole) in good {
            assert_eq!(of(text).as_deref(), Ok(whole), "{text}");
        }
        for text in ["127.0.0.1:4318", "/v1/traces", "ftp://x", "http://", "http://x?key=1", "http://x:0"] {
            assert!(of(text).is_err(), "{text}");
        }
        let error = of("http://user:secret@x").expect_err("a user");
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn what_goes_with_what_is_said() {
        let telemetry = |endpoint: &str, headers: &str, ratio| Telemetry {
            otlp_endpoint: endpoint.into(),
            otlp_headers: headers.into(),
            sample_ratio: ratio,
            ..Telemetry::default()
        };
        let key = |mut telemetry| check(&mut telemetry, |path| Ok(path.to_owned())).map_err(|(key, _)| key);
        assert_eq!(key(Telemetry::default()), Ok(()));
        assert_eq!(key(telemetry("http://collector:4318", "", 0.5)), Ok(()));
        assert_eq!(key(telemetry("http://localhost:4318", "/h", 0.0)), Ok(()));
        assert_eq!(key(telemetry("https://collector", "/h", 1.0)), Ok(()));
        assert_eq!(key(telemetry("http://collector:4318", "/h", 1.0)), Err("telemetry.otlp_headers"));
        assert_eq!(key(telemetry("", "/h", 1.0)), Err("telemetry.otlp_headers"));
        assert_eq!(key(telemetry("collector:4318", "", 1.0)), Err("telemetry.otlp_endpoint"));
        for ratio in [-0.1, 1.1, f64::NAN] {
            assert_eq!(key(telemetry("", "", ratio)), Err("telemetry.sample_ratio"), "{ratio}");
        }
    }

    #[test]
    fn headers_are_lines_and_their_values_are_never_shown() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let text = "# of the collector\nX-Api-Key: s3cret: with a colon\n\nx-scope:  a \n";
        let found = vec![pair("x-api-key", "s3cret: with a colon"), pair("x-scope", "a")];
        assert_eq!(headers(text), Ok(found));
        for text in ["s3cret", "bad name: s3cret", "x: s3\u{1}cret", "host: s3cret"] {
            let error = headers(text).expect_err("refused");
            assert!(error.starts_with("line 1 ") && !error.contains("cret"), "{error}");
        }
        assert!(headers(&"a: b\n".repeat(HEADERS_MAX + 1)).is_err());
    }

    #[test]
    fn what_the_exporter_needs_is_sealed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("headers");
        std::fs::write(&path, "x-api-key: s3cret\n").expect("written");
        let telemetry = Telemetry {
            otlp_endpoint: "http://127.0.0.1:4318".into(),
            otlp_headers: path.clone(),
            ..Telemetry::default()
        };
        let sealed = settings(&telemetry).expect("sealed").expect("some");
        let bytes = memfd::read(sealed, SETTINGS_BYTES_MAX).expect("read");
        let text = String::from_utf8(bytes).expect("UTF-8");
        assert!(text.contains("s3cret") && text.contains("http://127.0.0.1:4318/v1/traces"), "{text}");
        assert!(settings(&Telemetry::default()).expect("fine").is_none());
        let ca = Telemetry { otlp_ca: path, ..telemetry };
        assert!(settings(&ca).expect_err("no certificate").contains("no certificate"));
    }
}
