//! A collector of traces on loopback: it takes OTLP over HTTP as the proto types read it, and answers as it is told.
//! It must never wait without a bound, nor take a request that is not exactly one of the protocol.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// How it answers one request.
#[derive(Debug, Clone, Copy)]
pub enum Answer {
    /// With this status and this `retry-after`.
    Status(u16, &'static str),
    /// As it should, but only after this time.
    After(Duration),
}

/// What one request brought.
#[derive(Debug, Clone)]
pub struct Taken {
    /// Its head, in lower case.
    pub head: String,
    /// Its body, as it came.
    pub body: Vec<u8>,
    /// The same, read.
    pub request: ExportTraceServiceRequest,
    /// The status that was answered with.
    pub status: u16,
}

/// An authority of a test's own.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// A new one, which nobody trusts yet.
    pub fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Authority(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    /// Its certificate, in a file.
    pub fn file(&self) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), self.0.pem()).expect("written");
        file
    }

    /// A server's side of TLS, under this name.
    fn serves(&self, name: &str) -> Arc<ServerConfig> {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        let leaf = params.signed_by(&key, &self.0).expect("a certificate");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider);
        let config = config.with_safe_default_protocol_versions().expect("versions").with_no_client_auth();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Arc::new(config.with_single_cert(vec![leaf.der().clone()], key).expect("a server"))
    }
}

/// A collector that listens until its test ends.
pub struct Collector {
    /// Where.
    pub url: String,
    told: Arc<Told>,
}

/// What it was told, and is to say.
#[derive(Default)]
struct Told {
    taken: Mutex<Vec<Taken>>,
    answers: Mutex<VecDeque<Answer>>,
    connections: AtomicU32,
}

impl Collector {
    /// One that takes everything.
    pub fn new() -> Collector {
        Collector::start("http", "127.0.0.1", None)
    }

    /// The same under a name, without TLS.
    pub fn named(name: &str) -> Collector {
        Collector::start("http", name, None)
    }

    /// The same under TLS, with a certificate of this authority for this name.
    pub fn secure(name: &str, authority: &Authority) -> Collector {
        Collector::start("https", name, Some(authority.serves(name)))
    }

    fn start(scheme: &str, name: &str, tls: Option<Arc<ServerConfig>>) -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("{scheme}://{name}:{}", listener.local_addr().expect("an address").port());
        let collector = Collector { url, told: Arc::default() };
        let told = Arc::clone(&collector.told);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                stream.set_read_timeout(Some(Duration::from_secs(120))).expect("a bound");
                told.connections.fetch_add(1, Ordering::Relaxed);
                let (told, tls) = (Arc::clone(&told), tls.clone());
                std::thread::spawn(move || match tls {
                    Some(tls) => {
                        let connection = ServerConnection::new(tls).expect("a connection");
                        serve(StreamOwned::new(connection, stream), &told);
                    }
                    None => serve(stream, &told),
                });
            }
        });
        collector
    }

    /// It answers the next requests like this, and those after them as it should.
    pub fn answers(&self, answers: impl IntoIterator<Item = Answer>) {
        self.told.answers.lock().expect("answers").extend(answers);
    }

    /// Everything that came.
    pub fn taken(&self) -> Vec<Taken> {
        self.told.taken.lock().expect("what came").clone()
    }

    /// How often somebody has connected.
    pub fn connections(&self) -> u32 {
        self.told.connections.load(Ordering::Relaxed)
    }

    /// The spans that it has taken, in the order in which they came.
    pub fn spans(&self) -> Vec<Span> {
        let good = self.taken().into_iter().filter(|taken| taken.status == 200);
        let resources = good.flat_map(|taken| taken.request.resource_spans);
        resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect()
    }
}

/// The attribute of this name, as text.
pub fn attribute(attributes: &[KeyValue], name: &str) -> Option<String> {
    let value = &attributes.iter().find(|attribute| attribute.key == name)?.value.as_ref()?.value;
    match value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text.clone()),
        any_value::Value::IntValue(number) => Some(number.to_string()),
        other => panic!("{name} is {other:?}"),
    }
}

fn serve(stream: impl Read + Write, told: &Told) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            match stream.read_line(&mut head) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
        let head = head.to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
        let mut body = vec![0; length.expect("a length")];
        stream.read_exact(&mut body).expect("a body");
        let request = ExportTraceServiceRequest::decode(&body[..]).expect("a request of the protocol");
        let answer = told.answers.lock().expect("answers").pop_front();
        let (status, after) = match answer {
            Some(Answer::Status(status, after)) => (status, after),
            Some(Answer::After(time)) => {
                std::thread::sleep(time);
                (200, "")
            }
            None => (200, ""),
        };
        told.taken.lock().expect("what came").push(Taken { head, body, request, status });
        let mut answer = format!("HTTP/1.1 {status} x\r\ncontent-type: application/x-protobuf\r\n");
        if !after.is_empty() {
            answer += &format!("retry-after: {after}\r\n");
        }
        let said = ExportTraceServiceResponse::default().encode_to_vec();
        answer += &format!("content-length: {}\r\n\r\n", said.len());
        let stream = stream.get_mut();
        let sent = stream.write_all(answer.as_bytes()).and_then(|()| stream.write_all(&said));
        if sent.and_then(|()| stream.flush()).is_err() {
            return;
        }
    }
}
