//! A collector of traces on loopback: it takes OTLP over HTTP as the proto types read it, and answers as it is told.
//! It must never wait without a bound, nor take a request that is not exactly one of the protocol.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

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

/// A collector that listens until its test ends.
pub struct Collector {
    /// Where.
    pub url: String,
    taken: Arc<Mutex<Vec<Taken>>>,
    answers: Arc<Mutex<VecDeque<Answer>>>,
}

impl Collector {
    /// One that takes everything.
    pub fn new() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (taken, answers) = (Arc::default(), Arc::default());
        let collector = Collector { url, taken: Arc::clone(&taken), answers: Arc::clone(&answers) };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (taken, answers) = (Arc::clone(&taken), Arc::clone(&answers));
                std::thread::spawn(move || serve(stream, &taken, &answers));
            }
        });
        collector
    }

    /// It answers the next requests like this, and those after them as it should.
    pub fn answers(&self, answers: impl IntoIterator<Item = Answer>) {
        self.answers.lock().expect("answers").extend(answers);
    }

    /// Everything that came.
    pub fn taken(&self) -> Vec<Taken> {
        self.taken.lock().expect("what came").clone()
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

fn serve(stream: TcpStream, taken: &Mutex<Vec<Taken>>, answers: &Mutex<VecDeque<Answer>>) {
    stream.set_read_timeout(Some(Duration::from_secs(120))).expect("a bound");
    let mut reader = BufReader::new(stream.try_clone().expect("a stream"));
    let mut stream = stream;
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            match reader.read_line(&mut head) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
        let head = head.to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
        let mut body = vec![0; length.expect("a length")];
        reader.read_exact(&mut body).expect("a body");
        let request = ExportTraceServiceRequest::decode(&body[..]).expect("a request of the protocol");
        let answer = answers.lock().expect("answers").pop_front();
        let (status, after) = match answer {
            Some(Answer::Status(status, after)) => (status, after),
            Some(Answer::After(time)) => {
                std::thread::sleep(time);
                (200, "")
            }
            None => (200, ""),
        };
        taken.lock().expect("what came").push(Taken { head, body, request, status });
        let mut answer = format!("HTTP/1.1 {status} x\r\ncontent-type: application/x-protobuf\r\n");
        if !after.is_empty() {
            answer += &format!("retry-after: {after}\r\n");
        }
        let said = ExportTraceServiceResponse::default().encode_to_vec();
        answer += &format!("content-length: {}\r\n\r\n", said.len());
        if stream.write_all(answer.as_bytes()).and_then(|()| stream.write_all(&said)).is_err() {
            return;
        }
    }
}
