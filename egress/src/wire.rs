//! The head of a request as it is on the wire, before hyper reads it: what hyper mends or leaves out can be judged only
//! here. It must never hold back or change a byte, nor keep a head once it is judged.

use std::io::Result;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that are kept of a head that has not ended. No level takes one of this length, and hyper, which reads what this
/// has judged, gives up before.
const HEAD_BYTES_MAX: usize = 512 * 1024;
/// Digits of a length: those of the largest number of 63 bits.
const LENGTH_DIGITS_MAX: usize = 19;

/// What the first head of a connection turned out to be, for whoever answers it.
#[derive(Clone, Default)]
pub struct Head(Arc<AtomicBool>);

impl Head {
    /// Whether it can be read in one way alone. Asked once the head was read.
    pub fn is_plain(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }

    fn is_odd(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A connection whose first head is looked at as it comes.
pub struct Watched<S> {
    stream: S,
    seen: Head,
    /// What came of the head; `None` once it is judged.
    bytes: Option<Vec<u8>>,
}

impl<S> Watched<S> {
    /// Watches a connection, and tells there what its head is.
    pub fn new(stream: S, seen: Head) -> Watched<S> {
        Watched { stream, seen, bytes: Some(Vec::new()) }
    }

    fn look(&mut self, piece: &[u8]) {
        let Some(bytes) = &mut self.bytes else { return };
        let begin = bytes.len();
        bytes.extend_from_slice(piece);
        for at in memchr::memchr_iter(b'\n', piece).map(|at| begin + at) {
            let line = &bytes[..=at];
            let ended = line.ends_with(b"\r\n\r\n");
            if line.ends_with(b"\r\n") && !ended {
                continue;
            }
            if !ended || !is_plain(line) {
                self.seen.is_odd();
            }
            self.bytes = None;
            return;
        }
        if bytes.len() > HEAD_BYTES_MAX {
            self.seen.is_odd();
            self.bytes = None;
        }
    }
}

/// Whether two readers of a head must take it for the same: each line ends with CRLF and none is folded, the request line
/// is three words, and what says where the request goes and where its body ends is said once, in digits or as `chunked`.
fn is_plain(head: &[u8]) -> bool {
    let Some(head) = head.strip_suffix(b"\r\n\r\n") else { return false };
    // What is no UTF-8 may stand in a value: nothing here depends on it.
    let head = String::from_utf8_lossy(head);
    let mut lines = head.split("\r\n");
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, "HTTP/1.1" | "HTTP/1.0"] = words[..] else { return false };
    if method.is_empty() || target.is_empty() || target.contains('#') {
        return false;
    }
    let (mut hosts, mut lengths, mut codings) = (0, 0, 0);
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { return false };
        let value = value.trim_matches([' ', '\t']);
        // A line that begins with a blank goes on with the one before it, to some; so does a blank before the colon.
        if name.is_empty() || name.contains([' ', '\t']) || line.contains(['\r', '\n', '\0']) {
            return false;
        }
        let count = match name.to_ascii_lowercase().as_str() {
            "host" => &mut hosts,
            "content-length" if is_length(value) => &mut lengths,
            "transfer-encoding" if value.eq_ignore_ascii_case("chunked") => &mut codings,
            "content-length" | "transfer-encoding" => return false,
            _ => continue,
        };
        *count += 1;
    }
    hosts <= 1 && lengths + codings <= 1
}

/// A plain number: no sign, no leading zero, no list.
fn is_length(text: &str) -> bool {
    let fits =
        (1..=LENGTH_DIGITS_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    fits && (text == "0" || !text.starts_with('0'))
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        let begin = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.look(&buffer.filled()[begin..]);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        list: &[std::io::IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, list)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\nx: y z\r\n\r\n";

    /// Whether a connection that begins with these bytes has a plain head, however they come.
    fn check(text: &str, plain: bool) {
        for size in [1, 2, 3, 16, text.len()] {
            let seen = Head::default();
            let mut watched = Watched::new((), seen.clone());
            text.as_bytes().chunks(size).for_each(|piece| watched.look(piece));
            assert_eq!(seen.is_plain(), plain, "{text:?} in pieces of {size}");
            assert!(watched.bytes.is_none(), "{text:?} is judged and kept");
        }
    }

    #[test]
    fn a_head_is_plain_in_any_pieces_and_its_body_is_not_looked_at() {
        check(GOOD, true);
        check(&format!("{GOOD}\n\r\n\n body\r"), true);
        check("GET http://a.example/b?c HTTP/1.0\r\n\r\n", true);
        check("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n", true);
        check("POST / HTTP/1.1\r\nTransfer-Encoding:\tCHUNKED \r\n\r\n", true);
        check("POST / HTTP/1.1\r\ncontent-length:0\r\n\r\n", true);
    }

    #[test]
    fn what_two_readers_could_take_differently_is_no_plain_head() {
        for (from, to) in [
            ("\r\n", "\n"),
            ("\r\nhost", "\nhost"),
            ("\r\n\r\n", "\r\n\n"),
            ("\r\n\r\n", "\n\r\n"),
            ("y z", "y\rz"),
            ("y z", "y\0z"),
            ("POST", "\r\nPOST"),
            ("POST", "\nPOST"),
            ("POST", " POST"),
            ("POST ", "POST  "),
            ("POST ", "POST\t"),
            ("HTTP/1.1", "HTTP/1.1 "),
            ("HTTP/1.1", "HTTP/1.2"),
            (" HTTP/1.1", ""),
            ("/a", ""),
            ("/a", "/a#b"),
            ("x: y", " x: y"),
            ("x: y", "\tx: y"),
            ("x: y", "x : y"),
            ("x: y", ": y"),
            ("x: y z", "x"),
            ("x: y", "Host: a"),
            ("x: y z", "Content-Length: 10"),
            ("x: y z", "Content-Length: 11"),
            ("x: y z", "transfer-encoding: chunked"),
            ("content-length: 10", "transfer-encoding: chunked\r\ntransfer-encoding: chunked"),
            ("content-length: 10", "transfer-encoding: gzip, chunked"),
            ("content-length: 10", "transfer-encoding: chunked;q=1"),
            ("content-length: 10", "transfer-encoding: "),
            (": 10", ": 10, 10"),
            (": 10", ": +10"),
            (": 10", ": -10"),
            (": 10", ": 010"),
            (": 10", ": 00"),
            (": 10", ": 0xa"),
            (": 10", ": 1 0"),
            (": 10", ": "),
            (": 10", ": 18446744073709551616"),
        ] {
            assert!(GOOD.contains(from), "{from:?}");
            check(&GOOD.replacen(from, to, 1), false);
        }
    }

    #[test]
    fn a_head_without_end_is_not_kept() {
        let seen = Head::default();
        let mut watched = Watched::new((), seen.clone());
        watched.look(b"GET / HTTP/1.1\r\nx: ");
        (0..100).for_each(|_| watched.look(&[b'x'; 10_000]));
        assert!(!seen.is_plain() && watched.bytes.is_none());
    }
}
