//! What stands around a server: TLS on its listener, and the service manager. Needs root and the CLI.
//! It must never trust a certificate that the test did not make.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::{Options, Server, ask, bearer, patience, traces, until};

/// A certificate for `localhost` and its key, as files.
struct Pair {
    certificate: PathBuf,
    key: PathBuf,
}

fn pair(folder: &Path, name: &str) -> Pair {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("a certificate");
    let pair =
        Pair { certificate: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) };
    fs::write(&pair.certificate, made.cert.pem()).expect("a file");
    fs::write(&pair.key, made.signing_key.serialize_pem()).expect("a file");
    pair
}

fn with_tls(pair: &Pair) -> Options {
    let options = Options::with_double().with("GAOLER_SERVER__TLS_CERTIFICATE", pair.certificate.display());
    options.with("GAOLER_SERVER__TLS_KEY", pair.key.display())
}

/// curl, a client that is not ours, asking for an answer under TLS with this certificate alone as its trust.
fn curl(address: &str, trusted: &Path, more: &[&str]) -> Output {
    let port = address.rsplit_once(':').expect("a port").1;
    let (name, value) = bearer("a");
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--verbose", "--max-time", "60", "--cacert"]).arg(trusted);
    command.arg("--resolve").arg(format!("localhost:{port}:127.0.0.1"));
    command.arg("--header").arg(format!("{name}: {value}"));
    command.args(["--header", "content-type: application/json", "--data"]).arg(ask("hello").to_string());
    command.args(more).arg(format!("https://localhost:{port}/v1/messages"));
    command.output().expect("curl")
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn t01_a_listener_with_tls_answers_under_tls_and_not_otherwise() {
    let folder = tempfile::tempdir().expect("a folder");
    let (own, other) = (pair(folder.path(), "own"), pair(folder.path(), "other"));
    let server = Server::start(with_tls(&own));
    for (more, version) in [(&["--tlsv1.3"][..], "TLSv1.3"), (&["--tls-max", "1.2"], "TLSv1.2")] {
        // HTTP/2 is offered, and not taken.
        let output = curl(&server.address, &own.certificate, &[more, &["--http2"]].concat());
        let (answer, log) = said(&output);
        assert!(output.status.success() && answer.contains("double: hello"), "{version}: {answer}\n{log}");
        assert!(log.contains(version) && log.contains("ALPN") && log.contains("http/1.1"), "{log}");
        assert!(!log.contains("using h2") && log.contains("HTTP/1.1 200 OK"), "{log}");
    }
    let refused = curl(&server.address, &other.certificate, &[]);
    assert_eq!(refused.status.code(), Some(60), "a client that trusts another: {refused:?}");
    let old = curl(&server.address, &own.certificate, &["--tls-max", "1.1"]);
    assert_eq!(old.status.code(), Some(35), "TLS 1.1: {old:?}");

    // Without TLS there is no answer, and certainly not one of HTTP.
    let mut plain = TcpStream::connect(&server.address).expect("a connection");
    plain.set_read_timeout(Some(patience())).expect("a timeout");
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").expect("sent");
    let mut heard = Vec::new();
    let _ = plain.read_to_end(&mut heard);
    assert!(!heard.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&heard));

    // A client that says nothing is let go, and keeps nobody waiting meanwhile.
    let mut silent = TcpStream::connect(&server.address).expect("a connection");
    silent.set_read_timeout(Some(patience())).expect("a timeout");
    let begun = Instant::now();
    assert!(curl(&server.address, &own.certificate, &[]).status.success());
    assert!(
        begun.elapsed() < Duration::from_secs(9),
        "a silent neighbour held a client up: {:?}",
        begun.elapsed()
    );
    assert_eq!(silent.read(&mut [0; 1]).expect("the end"), 0);
    let waited = begun.elapsed();
    assert!((9..30).contains(&waited.as_secs()), "let go after {waited:?}");
}

#[test]
fn t02_the_private_key_is_in_no_reach_but_the_frontends_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let own = pair(folder.path(), "own");
    let server = Server::start(with_tls(&own));
    assert!(curl(&server.address, &own.certificate, &[]).status.success());
    let pem = fs::read_to_string(&own.key).expect("the key");
    let line = pem.lines().nth(1).expect("a line of base64").to_owned();
    let holds = |bytes: &[u8]| bytes.windows(line.len()).any(|window| window == line.as_bytes());
    assert!(holds(pem.as_bytes()), "the control");
    assert!(!server.log().contains(&line));
    for process in traces::processes(server.pid(), server.options.uids) {
        let part = |name: &str| fs::read(format!("/proc/{}/{name}", process.pid)).unwrap_or_default();
        assert!(!holds(&part("environ")) && !holds(&part("cmdline")), "{process:?}");
        // No file of it is held open: what was handed over was read, and closed.
        let fds = fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten().flatten();
        for fd in fds {
            let name = fs::read_link(fd.path()).map(|path| path.display().to_string()).unwrap_or_default();
            assert!(!name.contains("own.key") && !name.contains("memfd:tls"), "{process:?} holds {name}");
        }
    }
}

#[test]
fn t03_a_certificate_or_key_that_is_none_is_refused_at_the_start_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let (own, other) = (pair(folder.path(), "own"), pair(folder.path(), "other"));
    let at = |name: &str| folder.path().join(name);
    fs::write(at("empty"), "").expect("a file");
    let huge = fs::File::create(at("huge")).expect("a file");
    huge.set_len(1 << 20).expect("a length");
    let rows: [(&Path, &Path, &str); 7] = [
        (&own.certificate, &other.key, "server.tls_key {K}: does not belong to the first certificate"),
        (&own.key, &own.key, "server.tls_certificate {C}: holds no certificate"),
        (&own.certificate, &own.certificate, "server.tls_key {K}: holds no private key"),
        (&at("empty"), &own.key, "server.tls_certificate {C}: holds no certificate"),
        (&at("missing"), &own.key, "server.tls_certificate {C}: No such file"),
        (&own.certificate, &at("huge"), "server.tls_key {K}: not a regular file of at most"),
        (&own.certificate, Path::new("/dev/zero"), "server.tls_key {K}: not a regular file of at most"),
    ];
    for (certificate, key, expected) in rows {
        let expected = expected.replace("{C}", &certificate.display().to_string());
        let expected = expected.replace("{K}", &key.display().to_string());
        let pair = Pair { certificate: certificate.to_owned(), key: key.to_owned() };
        let Err((status, log)) = Server::try_start(with_tls(&pair)) else { panic!("started: {expected}") };
        assert!(!status.success() && log.contains(&expected), "{expected}: {status} {log}");
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}

#[test]
fn t273_a_renewed_certificate_is_served_after_a_reload_and_a_wrong_one_never() {
    let folder = tempfile::tempdir().expect("a folder");
    let (own, other) = (pair(folder.path(), "own"), pair(folder.path(), "other"));
    let server = Server::start(with_tls(&own));
    let trusts = |trusted: &Pair| curl(&server.address, &trusted.certificate, &[]).status.code();
    assert_eq!((trusts(&own), trusts(&other)), (Some(0), Some(60)));
    let ended = |event: &str| server.log().matches(&format!("\"event\":\"{event}\"")).count();
    let reload = |event: &str, count: usize| {
        server.signal(Signal::SIGHUP);
        until(event, || (ended(event) == count).then_some(()));
    };
    // Renewing replaces files under their names.
    let kept = folder.path().join("kept.pem");
    fs::copy(&own.certificate, &kept).expect("copied");
    fs::copy(&other.key, &own.key).expect("copied");
    reload("reload_failed", 1);
    assert!(server.log().contains("does not belong to the first certificate"), "{}", server.log());
    let old = Pair { certificate: kept, key: own.key.clone() };
    assert_eq!((trusts(&old), trusts(&other)), (Some(0), Some(60)), "half a renewal changes nothing");
    fs::copy(&other.certificate, &own.certificate).expect("copied");
    reload("reloaded", 1);
    assert_eq!((trusts(&old), trusts(&other)), (Some(60), Some(0)));
    let pem = fs::read_to_string(&other.key).expect("the key");
    assert!(!server.log().contains(pem.lines().nth(1).expect("a line of base64")));
}

#[test]
fn t04_the_service_manager_is_told_when_tenants_may_come_and_when_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("notify");
    let name = format!("gaoler-test-notify-{}", std::process::id());
    let by_path = UnixDatagram::bind(&path).expect("a socket");
    let by_name =
        SocketAddr::from_abstract_name(&name).and_then(|at| UnixDatagram::bind_addr(&at)).expect("a socket");
    for (socket, address) in [(by_path, path.display().to_string()), (by_name, format!("@{name}"))] {
        socket.set_read_timeout(Some(patience())).expect("a timeout");
        let mut server = Server::start(Options::with_double().with("NOTIFY_SOCKET", &address));
        let heard = || {
            let mut text = [0; 256];
            let length = socket.recv(&mut text).expect("a word");
            String::from_utf8_lossy(&text[..length]).into_owned()
        };
        assert_eq!(heard(), "READY=1\nSTATUS=serving", "{address}");
        // It was said when it was so: an answer comes at once.
        assert_eq!(server.says("a", "hello"), "[embedded] double: hello");
        assert!(server.stop().success());
        assert_eq!(heard(), "STOPPING=1\nSTATUS=draining", "{address}");
        socket.set_nonblocking(true).expect("a flag");
        assert!(socket.recv(&mut [0; 256]).is_err(), "nobody else has a word: no cage, no frontend");
    }
    // A manager that has gone, or that never reads, changes nothing.
    let full = folder.path().join("full");
    let _never_reads = UnixDatagram::bind(&full).expect("a socket");
    for address in [path, full] {
        let mut server = Server::start(Options::with_double().with("NOTIFY_SOCKET", address.display()));
        assert_eq!(server.says("a", "hello"), "[embedded] double: hello");
        assert!(server.stop().success());
    }
}

#[test]
fn t05_another_address_than_loopback_is_served_only_where_tls_covers_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let own = pair(folder.path(), "own");
    let bare = Options { listen: "0.0.0.0:0", ..Options::with_double() };
    let Err((status, log)) = Server::try_start(bare) else { panic!("started without TLS") };
    assert_eq!(status.code(), Some(2), "{log}");
    assert!(log.contains("is not loopback") && log.contains("server.tls_certificate"), "{log}");
    for options in [with_tls(&own), Options::with_double().with("GAOLER_SERVER__TRUSTED_PROXY", true)] {
        let options = Options { listen: "0.0.0.0:0", ..options };
        let server = Server::start(options);
        let port = server.address.rsplit_once(':').expect("a port").1.to_owned();
        assert_eq!(server.address, format!("0.0.0.0:{port}"));
        until("a connection", || TcpStream::connect(format!("127.0.0.2:{port}")).ok());
    }
}
