//! A blocking HTTP/1.1 client of one request a connection. It must never repair what a server sends: a test
//! sees the status, the fields and the bytes as they came.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use super::bearer;

/// A client of one server.
#[derive(Debug, Clone)]
pub struct Client {
    /// `HOST:PORT`.
    pub address: String,
    /// How long it waits for the next byte.
    pub patience: Duration,
}

/// An answer, whole.
#[derive(Clone)]
pub struct Response {
    /// Its status.
    pub status: u16,
    /// Its fields, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Its body, unchunked.
    pub body: Vec<u8>,
    /// Whether the body ended as its framing says; `false` for a connection that broke off.
    pub whole: bool,
}

impl std::fmt::Debug for Response {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body: String = String::from_utf8_lossy(&self.body).chars().take(4000).collect();
        write!(f, "{} {:?} whole={}\n{body}", self.status, self.headers, self.whole)
    }
}

/// One server-sent event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its `event:` line.
    pub name: String,
    /// Its `data:` line.
    pub data: Value,
}

impl Response {
    /// The first field of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The text of a message: of its JSON, or of its events.
    pub fn text(&self) -> String {
        if self.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")) {
            let deltas = self.events().into_iter().filter(|event| event.name == "content_block_delta");
            return deltas
                .filter_map(|event| event.data["delta"]["text"].as_str().map(str::to_owned))
                .collect();
        }
        let json = self.json();
        let blocks = json["content"].as_array().unwrap_or_else(|| panic!("no content: {self:?}"));
        blocks.iter().filter_map(|block| block["text"].as_str()).collect()
    }

    /// The type of an error.
    pub fn error(&self) -> String {
        self.json()["error"]["type"].as_str().unwrap_or_else(|| panic!("no error: {self:?}")).to_owned()
    }

    /// The message of an error.
    pub fn complaint(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap_or_else(|| panic!("no error: {self:?}")).to_owned()
    }

    /// The events of a stream, pings left out: they come by the clock.
    pub fn events(&self) -> Vec<Event> {
        let text = String::from_utf8(self.body.clone()).expect("UTF-8");
        let event = |block: &str| {
            let (name, data) = block.split_once('\n').unwrap_or_else(|| panic!("two lines: {block:?}"));
            Event {
                name: name.strip_prefix("event: ").unwrap_or_else(|| panic!("a name: {block:?}")).to_owned(),
                data: serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON"),
            }
        };
        let blocks = text.split("\n\n").filter(|block| !block.is_empty());
        blocks.map(event).filter(|event| event.name != "ping").collect()
    }
}

impl Client {
    /// A connection.
    pub fn connect(&self) -> std::io::Result<TcpStream> {
        let stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(self.patience))?;
        stream.set_write_timeout(Some(self.patience))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// POST /v1/messages as this tenant.
    pub fn messages(&self, tenant: &str, body: &Value) -> Response {
        self.post(&[bearer(tenant)], body.to_string().as_bytes())
    }

    /// POST /v1/messages with these fields and this body.
    pub fn post(&self, headers: &[(&str, String)], body: &[u8]) -> Response {
        self.request("POST", "/v1/messages", headers, body)
    }

    /// One request.
    pub fn request(&self, method: &str, path: &str, headers: &[(&str, String)], body: &[u8]) -> Response {
        let response = self.try_request(method, path, headers, body);
        response.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// One request, whose connection may break.
    pub fn try_request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, String)],
        body: &[u8],
    ) -> std::io::Result<Response> {
        let stream = self.connect()?;
        self.send(&stream, method, path, headers, body)?;
        read(&mut BufReader::new(stream))
    }

    /// Sends a request and leaves the answer where it is.
    pub fn send(
        &self,
        mut stream: &TcpStream,
        method: &str,
        path: &str,
        headers: &[(&str, String)],
        body: &[u8],
    ) -> std::io::Result<()> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.address);
        head += &format!("content-length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
            head += "content-type: application/json\r\n";
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        stream.write_all(head.as_bytes())?;
        // A server may answer and close before it has read a body that is too large.
        match stream.write_all(body) {
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                Ok(())
            }
            other => other,
        }
    }
}

/// Reads one answer.
pub fn read(reader: &mut impl BufRead) -> std::io::Result<Response> {
    let mut response = head(reader)?;
    let length = response.header("content-length").and_then(|length| length.parse::<usize>().ok());
    response.whole = match (response.header("transfer-encoding"), length) {
        (Some("chunked"), _) => unchunk(reader, &mut response.body),
        (_, Some(length)) => {
            reader.take(length as u64).read_to_end(&mut response.body).is_ok()
                && response.body.len() == length
        }
        _ => reader.read_to_end(&mut response.body).is_ok(),
    };
    Ok(response)
}

/// Reads an answer's head; its body is still to come.
pub fn head(reader: &mut impl BufRead) -> std::io::Result<Response> {
    let mut line = || -> std::io::Result<String> {
        let mut line = String::new();
        match reader.read_line(&mut line)? {
            0 => Err(std::io::Error::new(ErrorKind::UnexpectedEof, "the connection ended in the head")),
            _ => Ok(line.trim_end().to_owned()),
        }
    };
    let status = line()?;
    let number = status.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let status = number.unwrap_or_else(|| panic!("no status line: {status:?}"));
    let mut headers = Vec::new();
    loop {
        let line = line()?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("no field: {line:?}"));
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    Ok(Response { status, headers, body: Vec::new(), whole: false })
}

/// Reads chunks until the last; whether it came.
fn unchunk(reader: &mut impl BufRead, body: &mut Vec<u8>) -> bool {
    loop {
        let mut line = String::new();
        if !reader.read_line(&mut line).is_ok_and(|n| n > 0) {
            return false;
        }
        let Ok(length) = usize::from_str_radix(line.trim_end(), 16) else { return false };
        let before = body.len();
        if reader.by_ref().take(length as u64).read_to_end(body).is_err() || body.len() - before != length {
            return false;
        }
        let mut end = [0; 2];
        if reader.read_exact(&mut end).is_err() || &end != b"\r\n" {
            return false;
        }
        if length == 0 {
            return true;
        }
    }
}
