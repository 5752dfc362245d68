//! An HTTP answer as it came, for tests of any package. It must never be repaired while it is read.
#![allow(dead_code, missing_docs)]

use serde_json::Value;

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
    /// The body came to its announced end.
    pub whole: bool,
}

impl Reply {
    /// Reads all bytes of a connection; `ended` says whether it was closed in good order.
    pub fn read(text: &str, ended: bool) -> Reply {
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
