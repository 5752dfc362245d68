//! TLS to the upstream: the certificate is verified, and the credential waits for that.
#![allow(missing_docs)]

mod common;

use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};

use common::{CANARY, Egress, PLACEHOLDER, RUN, credential, read_request, resolv_conf_of};
use gaoler_protocol::{Level, Message, Scheme, Serve};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

struct Secure {
    port: u16,
    ca_file: tempfile::NamedTempFile,
    seen: Arc<Mutex<Vec<String>>>,
}

/// A TLS server whose certificate is for this name, by a CA of its own.
fn secure(name: &str) -> Secure {
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a CA");
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
    let leaf = params.signed_by(&key, &issuer).expect("a certificate");
    let mut ca_file = tempfile::NamedTempFile::new().expect("a file");
    ca_file.write_all(issuer.pem().as_bytes()).expect("written");

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .expect("a server");
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let shared = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let connection = ServerConnection::new(config.clone()).expect("a connection");
            let mut stream = StreamOwned::new(connection, stream);
            if let Some(request) = read_request(&mut stream) {
                shared.lock().expect("no panic").push(request);
                let _ =
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}");
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        }
    });
    Secure { port, ca_file, seen }
}

fn vouched(url: &str, more: &[&str]) -> (bool, u16) {
    let mut egress = Egress::start(url, more);
    egress.serve(true, Scheme::OAuth, CANARY, None);
    let vouched = egress.hear_vouched();
    (vouched.accepted, vouched.status)
}

#[test]
fn a_certificate_is_verified() {
    let server = secure("localhost");
    let url = format!("https://localhost:{}", server.port);
    let path = server.ca_file.path().to_str().expect("a path");
    // The positive control: with its CA and its name it is believed.
    assert_eq!(vouched(&url, &["--ca-file", path]), (true, 200));
    assert_eq!(server.seen.lock().expect("no panic").len(), 1);
    // By an unknown CA, or for another name, it is not, and sees nothing of the request.
    assert_eq!(vouched(&url, &[]), (false, 0));
    assert_eq!(vouched(&format!("https://127.0.0.1:{}", server.port), &["--ca-file", path]), (false, 0));
    let other = secure("localhost");
    let other_path = other.ca_file.path().to_str().expect("a path");
    assert_eq!(vouched(&url, &["--ca-file", other_path]), (false, 0));
    assert_eq!(server.seen.lock().expect("no panic").len(), 1);
}

#[test]
fn a_certificate_of_another_name_is_refused() {
    let server = secure("other.example");
    let path = server.ca_file.path().to_str().expect("a path");
    assert_eq!(vouched(&format!("https://localhost:{}", server.port), &["--ca-file", path]), (false, 0));
    assert!(server.seen.lock().expect("no panic").is_empty());
}

/// A name server that knows every name as 127.0.0.1, and tells which it was asked for.
fn name_server(address: &str) -> Arc<Mutex<Vec<String>>> {
    let socket = UdpSocket::bind((address, 53)).expect("port 53 can be bound, as root");
    let asked = Arc::new(Mutex::new(Vec::new()));
    let shared = asked.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let (mut name, mut at) = (String::new(), 12);
            while buffer[at] != 0 {
                let label = usize::from(buffer[at]);
                name.push_str(&String::from_utf8_lossy(&buffer[at + 1..=at + label]));
                name.push('.');
                at += 1 + label;
            }
            let is_a = buffer[at + 1..at + 3] == [0, 1];
            let question = &buffer[12..at + 5];
            shared.lock().expect("no panic").push(name.to_ascii_lowercase());
            assert!(length >= at + 5);
            let mut answer = vec![buffer[0], buffer[1], 0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0];
            answer.extend_from_slice(question);
            if is_a {
                answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
            }
            let _ = socket.send_to(&answer, peer);
        }
    });
    asked
}

#[test]
fn a_name_is_asked_of_the_hosts_server_and_nothing_else_is() {
    let asked = name_server("127.0.0.77");
    let server = secure("upstream.example");
    let path = server.ca_file.path().to_str().expect("a path");
    let mut egress =
        Egress::start(&format!("https://upstream.example:{}", server.port), &["--ca-file", path]);
    let serve = Serve {
        run: RUN,
        placeholder: PLACEHOLDER,
        level: Level::Balanced,
        vouch: true,
        requests_max: 0,
        egress_mib: 0,
        peer_uid: 0,
        tenant: [0; 16],
    };
    let fds = [credential(Scheme::OAuth, CANARY), resolv_conf_of("127.0.0.77")];
    egress.say(Message::Serve(serve), &fds);
    assert!(egress.hear_vouched().accepted);
    let asked = asked.lock().expect("no panic");
    assert!(!asked.is_empty() && asked.iter().all(|name| name == "upstream.example."), "{asked:?}");
}
