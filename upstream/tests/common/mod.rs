//! A running embedded model and the smallest HTTP client that can see what it really sends.
//! It must never repair what it reads: a broken answer stays visible as one.
#![allow(dead_code, missing_docs)]

mod reply;

pub use reply::Reply;

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
