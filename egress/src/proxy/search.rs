//! The answers of a server that something opens: searched for that, and read for the second place of an older MCP server.
//! It must never let the last byte of a secret through, in whichever pieces it comes.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use gaoler_protocol::Denial;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame};
use zeroize::Zeroizing;

use crate::answer::{Answer, Broken};
use crate::scan::{self, SECRET_BYTES_MIN, Scan};
use crate::tally::Tally;

/// Places of one server that are remembered, the newest ones; each of its sessions names one.
const ANNOUNCED_MAX: usize = 64;
/// Bytes of such a place, and of a line of a stream that is read for one.
const PLACE_BYTES_MAX: usize = 4096;

/// The secrets of one server that no answer may hold.
#[derive(Default)]
pub struct Needles(Vec<Arc<Zeroizing<Vec<u8>>>>);

impl Needles {
    /// Those of these headers: what comes after a scheme's name, as it opens the server with or without it. One that is too
    /// short to be a secret would be found everywhere.
    pub fn new<'a>(values: impl Iterator<Item = &'a [u8]>) -> Needles {
        let mut needles = Vec::new();
        let mut add = |secret: &[u8]| {
            if secret.len() >= SECRET_BYTES_MIN {
                needles.push(Arc::new(Zeroizing::new(secret.to_vec())));
            }
        };
        for value in values {
            let secret = value.rsplit(|&byte| byte == b' ').next().unwrap_or_default();
            add(secret);
            // A user and a password lie in one text; a host may say the second one by itself.
            if value.len() > secret.len()
                && value[..value.len() - secret.len()].eq_ignore_ascii_case(b"basic ")
            {
                let pair = Zeroizing::new(STANDARD.decode(secret).unwrap_or_default());
                let at = pair.iter().position(|&byte| byte == b':').map_or(0, |at| at + 1);
                add(&pair[at..]);
            }
        }
        Needles(needles)
    }

    /// Whether there is nothing to search for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether some bytes hold one.
    pub fn are_in(&self, bytes: &[u8]) -> bool {
        self.0.iter().any(|needle| scan::contains(Some(needle), bytes))
    }
}

/// Places that a server has named in its answers.
#[derive(Default)]
pub struct Announced(Mutex<VecDeque<String>>);

impl Announced {
    /// Remembers one, and forgets the oldest where there are too many.
    pub fn add(&self, place: &str) {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if place.len() > PLACE_BYTES_MAX || places.iter().any(|known| known == place) {
            return;
        }
        if places.len() == ANNOUNCED_MAX {
            places.pop_front();
        }
        places.push_back(place.to_owned());
    }

    /// Whether it is one of them.
    pub fn contains(&self, place: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|known| known == place)
    }
}

/// Reads `endpoint` events out of a stream.
struct Endpoints {
    announced: Arc<Announced>,
    /// The path that the stream was asked for.
    from: String,
    line: Vec<u8>,
    is_endpoint: bool,
}

impl Endpoints {
    fn take(&mut self, piece: &[u8]) {
        for part in piece.split_inclusive(|&byte| byte == b'\n') {
            // One byte more than is read: a longer line is told from one that fits.
            let room = (PLACE_BYTES_MAX + 1).saturating_sub(self.line.len());
            self.line.extend_from_slice(&part[..part.len().min(room)]);
            if part.ends_with(b"\n") {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let line =
            String::from_utf8_lossy(if line.len() > PLACE_BYTES_MAX { b":".as_slice() } else { &line });
        let line = line.trim_end_matches(['\r', '\n']);
        match line.split_once(':').map(|(field, value)| (field, value.strip_prefix(' ').unwrap_or(value))) {
            Some(("event", kind)) => self.is_endpoint = kind == "endpoint",
            Some(("data", place)) if self.is_endpoint => {
                if let Some(place) = beside(&self.from, place) {
                    self.announced.add(&place);
                }
            }
            _ if line.is_empty() => self.is_endpoint = false,
            _ => {}
        }
    }
}

/// A place as the stream of another one names it: from the host's root, or beside that one. A whole URL is of another
/// host than the one that the cage's client has asked, which clients refuse.
fn beside(from: &str, place: &str) -> Option<String> {
    let odd = |place: &str| place.contains("://") || place.starts_with("//") || place.contains("..");
    let path = from.split('?').next().unwrap_or_default();
    match place.chars().next() {
        _ if odd(place) => None,
        None => None,
        Some('/') => Some(place.to_owned()),
        Some('?') => Some(format!("{path}{place}")),
        Some(_) => Some(format!("{}/{place}", path.rsplit_once('/').map_or("", |(folder, _)| folder))),
    }
}

/// An answer on its way to the cage.
pub struct Search {
    body: Answer,
    /// One for each secret: what one lets pass goes to the next.
    scans: Vec<Scan>,
    endpoints: Option<Endpoints>,
    tally: Arc<Tally>,
    over: bool,
}

impl Search {
    /// Searches a body; with `announced`, reads where a stream that was asked for at that path wants to be spoken to.
    pub fn of(
        body: Answer,
        needles: &Needles,
        announced: Option<(Arc<Announced>, String)>,
        tally: Arc<Tally>,
    ) -> Answer {
        let scans = needles.0.iter().map(|needle| Scan::new(Some(needle.clone()))).collect();
        let endpoints = announced.map(|(announced, from)| {
            let (line, is_endpoint) = (Vec::new(), false);
            Endpoints { announced, from, line, is_endpoint }
        });
        Search { body, scans, endpoints, tally, over: false }.boxed_unsync()
    }

    fn pass(&mut self, piece: Bytes) -> Result<Bytes, Broken> {
        let passed = self.scans.iter_mut().try_fold(piece, |piece, scan| scan.pass(piece));
        passed.map_err(|_| self.found())
    }

    /// What was held back, once nothing can follow it.
    fn finish(&mut self) -> Result<Bytes, Broken> {
        let mut rest = BytesMut::new();
        for scan in &mut self.scans {
            let Ok(passed) = scan.pass(rest.split().freeze()) else { return Err(self.found()) };
            rest.extend_from_slice(&passed);
            rest.extend_from_slice(&scan.finish());
        }
        Ok(rest.freeze())
    }

    fn found(&self) -> Broken {
        self.tally.refuse(Denial::Body);
        Broken
    }
}

impl Body for Search {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        while !self.over {
            let out = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.pass(data),
                    // Trailers go no further: nobody has searched them.
                    Err(_) => continue,
                },
                Some(Err(broken)) => Err(broken),
                None => {
                    self.over = true;
                    self.finish()
                }
            };
            match out {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => {
                    if let Some(endpoints) = &mut self.endpoints {
                        endpoints.take(&bytes);
                    }
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                Err(broken) => {
                    self.over = true;
                    return Poll::Ready(Some(Err(broken)));
                }
            }
        }
        Poll::Ready(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_protocol::RunId;

    const FIRST: &str = "the-first-secret-of-all";
    const SECOND: &str = "another-secret-of-some-length";

    /// What comes out of a body of these pieces, and whether it came to its end.
    async fn searched(pieces: Vec<&'static str>, secrets: &[&str]) -> (String, bool) {
        let body = Pieces(pieces.into()).boxed_unsync();
        let needles = Needles::new(secrets.iter().map(|secret| secret.as_bytes()));
        let mut body = Search::of(body, &needles, None, Arc::new(Tally::new(RunId([1; 16]))));
        let mut text = String::new();
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return (text, false) };
            text.push_str(&String::from_utf8_lossy(&frame.into_data().expect("data")));
        }
        (text, true)
    }

    /// A body that comes like this.
    struct Pieces(VecDeque<&'static str>);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Broken;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
            Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(Bytes::from(piece)))))
        }
    }

    #[tokio::test]
    async fn r10_an_answer_that_holds_what_opens_its_server_is_cut_wherever_it_is_split() {
        let bearer = format!("Bearer {FIRST}");
        for secret in [FIRST, SECOND] {
            for at in 0..=secret.len() {
                let (left, right) = secret.split_at(at);
                let (text, whole) = searched(vec!["a ", left, right, " b"], &[&bearer, SECOND]).await;
                assert!(!whole && !text.contains(secret), "{at}: {text}");
            }
        }
        for honest in
            [vec!["a b"], vec!["the-first-", "secret"], vec!["another-secret-of-some-lengt"], vec![]]
        {
            let expected = honest.concat();
            assert_eq!(searched(honest, &[&bearer, SECOND]).await, (expected, true));
        }
        // A password is one without its user, too.
        let basic = format!("Basic {}", STANDARD.encode(format!("x-access-token:{FIRST}")));
        assert!(!searched(vec![FIRST], &[&basic]).await.1);
        // What is no secret is found in nothing.
        assert_eq!(searched(vec!["red"], &["red", "Bearer "]).await, ("red".into(), true));
    }

    #[test]
    fn r10_a_stream_names_the_place_where_its_server_is_spoken_to() {
        let check = |from: &str, stream: &str, expected: &[&str]| {
            for size in [1, 3, 4096] {
                let announced = Arc::new(Announced::default());
                let (line, is_endpoint) = (Vec::new(), false);
                let mut endpoints =
                    Endpoints { announced: announced.clone(), from: from.into(), line, is_endpoint };
                stream.as_bytes().chunks(size).for_each(|piece| endpoints.take(piece));
                let found: Vec<String> = announced.0.lock().unwrap().iter().cloned().collect();
                assert_eq!(found, expected, "{stream:?}");
                assert!(endpoints.line.len() <= PLACE_BYTES_MAX + 1);
            }
        };
        check("/sse", "event: endpoint\r\ndata: /messages?id=7\r\n\r\n", &["/messages?id=7"]);
        check("/a/sse?x", "event:endpoint\ndata:messages?id=7\n\n", &["/a/messages?id=7"]);
        check("/a/sse?x", "event: endpoint\ndata: ?id=7\n\n", &["/a/sse?id=7"]);
        check("/sse", "event: message\ndata: /admin\n\nevent: endpoint\n\ndata: /admin\n\n", &[]);
        for odd in ["https://other.example/x", "//other.example/x", "/a/../admin", "../admin", ""] {
            check("/sse", &format!("event: endpoint\ndata: {odd}\n\n"), &[]);
        }
        check("/sse", &format!("event: endpoint\ndata: /{}\n\n", "x".repeat(100_000)), &[]);
        let announced = Announced::default();
        (0..1000).for_each(|n| announced.add(&format!("/{n}")));
        assert!(announced.contains("/999") && !announced.contains("/0"));
        assert_eq!(announced.0.lock().unwrap().len(), ANNOUNCED_MAX);
    }
}
