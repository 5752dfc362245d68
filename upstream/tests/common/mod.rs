//! A running embedded model and the smallest HTTP client that can see what it really sends.
//! It must never repair what it reads: a broken answer stays visible as one.
#![allow(dead_code, missing_docs)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

/// No answer of these tests takes longer, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Upstream {
    child: Child,
    pub address: SocketAddr,
}

impl Upstream {
    pub fn start() -> Upstream {
        let mut child = Command::new(env!("CARGO_BIN_EXE_gaoler-upstream"))
            .args(["--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line comes");
        let address = line.trim().strip_prefix("ready ").and_then(|text| text.parse().ok());
        Upstream { child, address: address.expect("the line names an address") }
    }

    pub fn send(&self, head: &str, body: &str) -> Reply {
        let mut stream = TcpStream::connect(self.address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
        let length = body.len();
        let text = format!(
            "{head}\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(text.as_bytes()).expect("it reads");
        let mut bytes = Vec::new();
        let ended = stream.read_to_end(&mut bytes).is_ok();
        Reply::read(&String::from_utf8_lossy(&bytes), ended)
    }

    pub fn post(&self, body: &Value) -> Reply {
        self.send("POST /v1/messages?beta=true HTTP/1.1\r\nx-api-key: dummy", &body.to_string())
    }

    /// Asks with one user message, not streamed and with the tools that the CLI has.
    pub fn ask(&self, content: impl Into<Value>) -> Reply {
        self.post(&question(content))
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn question(content: impl Into<Value>) -> Value {
    json!({"model": "claude-sonnet-5", "max_tokens": 100, "tools": [{"name": "Bash"}, {"name": "Read"}],
        "messages": [{"role": "user", "content": content.into()}]})
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
    /// The body came to its announced end.
    pub whole: bool,
}

impl Reply {
    fn read(text: &str, ended: bool) -> Reply {
        let (head, rest) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
        let head = head.to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        let chunked = head.contains("transfer-encoding: chunked");
        let (body, whole) = if chunked { dechunk(rest) } else { (rest.to_owned(), ended) };
        Reply { status, head, body, whole }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let line = |line: &'_ str| line.split_once(": ").filter(|(key, _)| *key == name).is_some();
        self.head
            .lines()
            .find(|text| line(text))
            .and_then(|line| line.split_once(": "))
            .map(|(_, value)| value)
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or(Value::Null)
    }

    /// The first text block of a message.
    pub fn text(&self) -> String {
        self.json()["content"][0]["text"].as_str().unwrap_or_default().to_owned()
    }

    /// `(name, data)` of every server-sent event.
    pub fn events(&self) -> Vec<(String, Value)> {
        let event = |block: &str| {
            let (name, data) = block.split_once('\n')?;
            let data = serde_json::from_str(data.strip_prefix("data: ")?).ok()?;
            Some((name.strip_prefix("event: ")?.to_owned(), data))
        };
        self.body.split_terminator("\n\n").map(|block| event(block).expect(block)).collect()
    }
}

fn dechunk(mut rest: &str) -> (String, bool) {
    let mut body = String::new();
    while let Some((size, later)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        if size == 0 {
            return (body, true);
        }
        let Some(piece) = later.get(..size) else { break };
        body.push_str(piece);
        rest = later.get(size + 2..).unwrap_or_default();
    }
    (body, false)
}
