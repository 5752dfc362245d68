//! The bytes of a connection before anybody reads them as HTTP: each head is looked at as it came, and what two readers
//! could understand in two ways goes no further. It must never hand on a byte of a head that it has not judged.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::error::ApiError;

/// Bytes of a request's head, at most.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Fields of a request's head, at most.
pub const HEAD_FIELDS_MAX: usize = 100;
/// How long a head may take from its first byte to its last.
const HEAD_WAIT: Duration = Duration::from_secs(10);
/// How long a client may take nothing of an answer that it has asked for, where its side is full already.
const UNREAD_WAIT: Duration = Duration::from_secs(120);
/// Bytes that are read of a head at once.
const PIECE_BYTES: usize = 4 * 1024;
/// Bytes of the line before a chunk, which nobody needs to be longer, and of all that follows the last one.
const CHUNK_LINE_BYTES_MAX: usize = 256;
const TRAILER_BYTES_MAX: usize = 8 * 1024;
/// Bytes of a refused head's path that are kept.
const PATH_BYTES: usize = 64;
/// Bytes after a head that was refused which are read and dropped.
const DROPPED_BYTES_MAX: usize = 256 * 1024;

/// A request in the place of one that is refused: who serves the connection knows it by its number, and answers with why.
const INSTEAD: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// Fields that a request must not have twice: two of them could be read in two ways.
const SINGLE: [&str; 22] = [
    "authorization",
    "x-api-key",
    "x-claude-credential",
    "host",
    "content-length",
    "transfer-encoding",
    "content-type",
    "content-encoding",
    "expect",
    "idempotency-key",
    "anthropic-version",
    "x-session-id",
    "x-gaoler-level",
    "x-gaoler-limits",
    "x-gaoler-events",
    "last-event-id",
    "traceparent",
    "range",
    "if-range",
    "upgrade",
    "x-stainless-retry-count",
    "proxy-authorization",
];

/// What is known of the heads of one connection by those on both sides of it.
#[derive(Default)]
pub struct Heads {
    /// How many were handed on.
    judged: AtomicU64,
    /// How many were served.
    served: AtomicU64,
    /// Which was refused, with what it asked for and why. It is the last.
    refused: OnceLock<(u64, Vec<u8>, ApiError)>,
}

impl Heads {
    /// A request is served: why it is refused, where its head was.
    pub fn serve(&self) -> Option<(&[u8], &ApiError)> {
        let number = self.served.fetch_add(1, Ordering::Relaxed);
        let (of, path, error) = self.refused.get()?;
        (*of == number).then_some((path, error))
    }
}

/// How a body is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
}

enum Phase {
    /// A head comes.
    Head,
    /// So many bytes of what is held are handed on, and then comes this.
    Gives(usize, Framing),
    /// So many bytes of a body come.
    Length(u64),
    Chunked(Chunk),
    /// A head was refused: so many bytes of what stands in its place are handed on, and nothing after them: so many
    /// are still read and dropped, so that its sender reads our answer.
    Instead(usize, usize),
}

/// Where in a chunked body the next byte is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// In the line before a chunk: its size so far, how long the line is, whether its digits are over, whether CR has come.
    Line { size: u64, length: usize, extends: bool, ends: bool },
    /// In the chunk.
    Data(u64),
    /// After it: the bytes of CRLF that have come.
    After(u8),
    /// In what follows the last: how long all of it is, how long this line is, whether CR has come.
    Trailer { all: usize, line: usize, ends: bool },
    /// After the last byte.
    Over,
}

impl Chunk {
    const FIRST: Chunk = Chunk::Line { size: 0, length: 0, extends: false, ends: false };

    /// What comes after this byte; `None` where it must not be there.
    fn after(self, byte: u8) -> Option<Chunk> {
        Some(match (self, byte) {
            (Chunk::Line { size: 0, length: 1.., ends: true, .. }, b'\n') => {
                Chunk::Trailer { all: 0, line: 0, ends: false }
            }
            (Chunk::Line { size, length: 1.., ends: true, .. }, b'\n') => Chunk::Data(size),
            (Chunk::Line { ends: true, .. }, _) => return None,
            (Chunk::Line { length: CHUNK_LINE_BYTES_MAX.., .. }, _) => return None,
            (Chunk::Line { size, length: length @ 1.., extends, .. }, b'\r') => {
                Chunk::Line { size, length, extends, ends: true }
            }
            (Chunk::Line { size, length: length @ 1.., extends: false, .. }, b';') => {
                Chunk::Line { size, length: length + 1, extends: true, ends: false }
            }
            (Chunk::Line { size, length, extends: true, .. }, b'\t' | b' '..=b'~') => {
                Chunk::Line { size, length: length + 1, extends: true, ends: false }
            }
            // Eight digits are four gigabytes.
            (Chunk::Line { size, length: length @ ..8, extends: false, .. }, digit) => {
                let digit = (digit as char).to_digit(16)?;
                Chunk::Line {
                    size: size << 4 | u64::from(digit),
                    length: length + 1,
                    extends: false,
                    ends: false,
                }
            }
            (Chunk::Line { .. }, _) => return None,
            (Chunk::Data(1), _) => Chunk::After(0),
            (Chunk::Data(left), _) => Chunk::Data(left - 1),
            (Chunk::After(0), b'\r') => Chunk::After(1),
            (Chunk::After(1), b'\n') => Chunk::FIRST,
            (Chunk::After(_), _) => return None,
            (Chunk::Trailer { line: 0, ends: true, .. }, b'\n') => Chunk::Over,
            (Chunk::Trailer { all, ends: true, .. }, b'\n') => Chunk::Trailer { all, line: 0, ends: false },
            (Chunk::Trailer { ends: true, .. }, _) => return None,
            (Chunk::Trailer { all: TRAILER_BYTES_MAX.., .. }, _) => return None,
            (Chunk::Trailer { all, line, .. }, b'\r') => Chunk::Trailer { all: all + 1, line, ends: true },
            (Chunk::Trailer { line: 0, .. }, b' ' | b'\t') => return None,
            (Chunk::Trailer { all, line, .. }, b'\t' | b' '..=b'~' | 0x80..) => {
                Chunk::Trailer { all: all + 1, line: line + 1, ends: false }
            }
            (Chunk::Trailer { .. } | Chunk::Over, _) => return None,
        })
    }

    /// Goes over these bytes, to the end of the body or theirs; how many were its own.
    fn over(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() && *self != Chunk::Over {
            match self {
                Chunk::Data(left @ 2..) => {
                    let here = (*left - 1).min((bytes.len() - at) as u64);
                    *left -= here;
                    at += here as usize;
                }
                _ => {
                    *self = self.after(bytes[at])?;
                    at += 1;
                }
            }
        }
        Some(at)
    }
}

/// A connection whose heads are judged.
pub struct Wire<S> {
    stream: S,
    heads: Arc<Heads>,
    phase: Phase,
    /// What has come and was not handed on: of a head, or after the end of a body.
    held: BytesMut,
    /// How much of it was looked at for the end of a head.
    seen: usize,
    /// When the head that comes must be there.
    until: Option<Pin<Box<Sleep>>>,
    /// When something of the answer must have been taken.
    unread: Option<Pin<Box<Sleep>>>,
}

impl<S> Wire<S> {
    /// This connection.
    pub fn new(stream: S, heads: Arc<Heads>) -> Wire<S> {
        Wire { stream, heads, phase: Phase::Head, held: BytesMut::new(), seen: 0, until: None, unread: None }
    }

    /// Looks at what has come of a head.
    fn look(&mut self) {
        // Empty lines before a head, which some clients send after a body, are nothing.
        while self.held.starts_with(b"\r\n") {
            self.held.advance(2);
            self.seen = self.seen.saturating_sub(2);
        }
        let (mut at, mut end) = (self.seen, None);
        let mut wrong = None;
        while at < self.held.len() {
            let before = at.checked_sub(1).map(|before| self.held[before]);
            match (self.held[at], before) {
                (b'\n', Some(b'\r')) if self.held[..at - 1].ends_with(b"\r\n") => {
                    end = Some(at + 1);
                    break;
                }
                (b'\n', Some(b'\r')) => {}
                (b'\n', _) | (_, Some(b'\r')) => {
                    wrong = Some("a line of the head ends with something else than CRLF.");
                    break;
                }
                _ => {}
            }
            at += 1;
        }
        self.seen = at;
        if let Some(wrong) = wrong {
            return self.refuse(bad(wrong));
        }
        match end {
            Some(end) if end > HEAD_BYTES_MAX => self.refuse(too_large()),
            Some(end) => match judge(&self.held[..end]) {
                Ok(framing) => {
                    self.heads.judged.fetch_add(1, Ordering::Relaxed);
                    self.phase = Phase::Gives(end, framing);
                }
                Err(error) => self.refuse(error),
            },
            None if self.held.len() > HEAD_BYTES_MAX => self.refuse(too_large()),
            None => {}
        }
        if !matches!(self.phase, Phase::Head) {
            (self.seen, self.until) = (0, None);
        }
    }

    /// A connection that holds nothing takes no memory for it.
    fn settle(&mut self) {
        if self.held.is_empty() {
            self.held = BytesMut::new();
        }
    }

    fn refuse(&mut self, error: ApiError) {
        let target = self.held[..].split(|&byte| byte == b' ').nth(1).unwrap_or_default();
        let path = target.split(|&byte| byte == b'?').next().unwrap_or_default();
        // None that any form is decided by is longer.
        let path = path[..path.len().min(PATH_BYTES)].to_vec();
        let number = self.heads.judged.load(Ordering::Relaxed);
        let _ = self.heads.refused.set((number, path, error));
        self.held = BytesMut::new();
        self.phase = Phase::Instead(0, DROPPED_BYTES_MAX);
    }
}

/// 400 for a head that could be read in two ways.
fn bad(what: &str) -> ApiError {
    ApiError::invalid(format!("The head of the request: {what}")).final_word()
}

/// 431.
fn too_large() -> ApiError {
    let message = "The head of the request is larger than 64 KiB, or has more than 100 fields; send less in its headers.";
    ApiError::new(431, "head_too_large", message)
}

fn is_token(text: &[u8]) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !text.is_empty() && text.iter().all(plain)
}

/// How the body after this head is framed.
///
/// # Errors
/// 400 with what could be read in two ways; 431 for too many fields.
fn judge(head: &[u8]) -> Result<Framing, ApiError> {
    let mut lines = head.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first: Vec<&[u8]> = lines.next().unwrap_or_default().split(|&byte| byte == b' ').collect();
    let [method, target, version] = first[..] else {
        return Err(bad(
            "its first line must be a method, a path and a version with one blank between them.",
        ));
    };
    let is_old = match version {
        b"HTTP/1.1" => false,
        b"HTTP/1.0" => true,
        _ => return Err(bad("its version must be HTTP/1.1 or HTTP/1.0.")),
    };
    if !is_token(method) {
        return Err(bad("its method is none."));
    }
    // A whole address would name the host a second time.
    if !target.starts_with(b"/") || !target.iter().all(u8::is_ascii_graphic) {
        return Err(bad("its path must begin with / and be of visible ASCII characters."));
    }
    let mut fields: Vec<(String, &[u8])> = Vec::new();
    for line in lines.take_while(|line| !line.is_empty()) {
        if fields.len() == HEAD_FIELDS_MAX {
            return Err(too_large());
        }
        if line.starts_with(b" ") || line.starts_with(b"\t") {
            return Err(bad("a field must be on one line."));
        }
        let Some(colon) = line.iter().position(|&byte| byte == b':') else {
            return Err(bad("a line has no colon."));
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        // Also a blank before the colon.
        if !is_token(name) {
            return Err(bad("a name of a field is none."));
        }
        if value.iter().any(|&byte| byte != b'\t' && (byte < b' ' || byte == 0x7f)) {
            return Err(bad("a field has a control character."));
        }
        fields.push((String::from_utf8_lossy(name).to_ascii_lowercase(), value));
    }
    for single in SINGLE {
        if fields.iter().filter(|(name, _)| name == single).count() > 1 {
            return Err(bad(&format!("{single} must be there once.")));
        }
    }
    let field = |wanted: &str| fields.iter().find(|(name, _)| name == wanted).map(|(_, value)| *value);
    match field("host") {
        None if !is_old => return Err(bad("host is missing.")),
        Some(host) if host.iter().any(|&byte| b" \t,/?#@\\".contains(&byte)) => {
            return Err(bad("host must be one name."));
        }
        _ => {}
    }
    if let (Some(bearer), Some(key)) = (field("authorization"), field("x-api-key")) {
        let token = bearer.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
        if token.is_none_or(|(_, token)| token.trim_ascii() != key) {
            return Err(bad("authorization and x-api-key show two different credentials; send one of them."));
        }
    }
    match (field("transfer-encoding"), field("content-length")) {
        (Some(_), Some(_)) => Err(bad("content-length beside transfer-encoding.")),
        (Some(_), None) if is_old => Err(bad("transfer-encoding with HTTP/1.0.")),
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
        (Some(_), None) => Err(bad("transfer-encoding must be chunked.")),
        (None, None) => Ok(Framing::Length(0)),
        (None, Some(length)) => {
            let text =
                std::str::from_utf8(length).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
            let length = text.and_then(|text| text.parse().ok());
            length.map(Framing::Length).ok_or_else(|| bad("content-length must be one number."))
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            match &mut this.phase {
                Phase::Head => {
                    if this.held.len() > this.seen {
                        this.look();
                        continue;
                    }
                    if !this.held.is_empty() {
                        let late = || Box::pin(sleep_until(Instant::now() + HEAD_WAIT));
                        if this.until.get_or_insert_with(late).as_mut().poll(cx).is_ready() {
                            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                        }
                    }
                    let mut bytes = [0; PIECE_BYTES];
                    let mut piece = ReadBuf::new(&mut bytes);
                    ready!(Pin::new(&mut this.stream).poll_read(cx, &mut piece))?;
                    if piece.filled().is_empty() {
                        return Poll::Ready(Ok(()));
                    }
                    this.held.extend_from_slice(piece.filled());
                }
                Phase::Gives(left, framing) => {
                    let here = out.remaining().min(*left);
                    out.put_slice(&this.held[..here]);
                    this.held.advance(here);
                    *left -= here;
                    if *left == 0 {
                        this.phase = match framing {
                            Framing::Length(0) => Phase::Head,
                            Framing::Length(length) => Phase::Length(*length),
                            Framing::Chunked => Phase::Chunked(Chunk::FIRST),
                        };
                    }
                    this.settle();
                    return Poll::Ready(Ok(()));
                }
                Phase::Length(left) => {
                    let most = usize::try_from(*left).unwrap_or(usize::MAX).min(out.remaining());
                    let here = match this.held.len() {
                        0 => ready!(read(&mut this.stream, cx, out, most))?,
                        held => {
                            let here = most.min(held);
                            out.put_slice(&this.held[..here]);
                            this.held.advance(here);
                            here
                        }
                    };
                    *left -= here as u64;
                    if *left == 0 {
                        this.phase = Phase::Head;
                    }
                    this.settle();
                    return Poll::Ready(Ok(()));
                }
                Phase::Chunked(chunk) => {
                    let wrong = || io::Error::from(io::ErrorKind::InvalidData);
                    if this.held.is_empty() {
                        let before = out.filled().len();
                        ready!(Pin::new(&mut this.stream).poll_read(cx, out))?;
                        let own = chunk.over(&out.filled()[before..]).ok_or_else(wrong)?;
                        // What comes after the body is the next head.
                        this.held.extend_from_slice(&out.filled()[before + own..]);
                        out.set_filled(before + own);
                    } else {
                        let here = out.remaining().min(this.held.len());
                        let own = chunk.over(&this.held[..here]).ok_or_else(wrong)?;
                        out.put_slice(&this.held[..own]);
                        this.held.advance(own);
                    }
                    if *chunk == Chunk::Over {
                        this.phase = Phase::Head;
                    }
                    this.settle();
                    return Poll::Ready(Ok(()));
                }
                Phase::Instead(given, dropped) => {
                    let rest = &INSTEAD[*given..];
                    if rest.is_empty() {
                        let mut bytes = [0; PIECE_BYTES];
                        while *dropped > 0 {
                            let mut piece = ReadBuf::new(&mut bytes);
                            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut piece))?;
                            *dropped = match piece.filled().len() {
                                0 => 0,
                                read => dropped.saturating_sub(read),
                            };
                        }
                        // Its answer closes the connection.
                        return Poll::Pending;
                    }
                    let here = out.remaining().min(rest.len());
                    out.put_slice(&rest[..here]);
                    *given += here;
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

/// Reads so many bytes at most.
fn read<S: AsyncRead + Unpin>(
    stream: &mut S,
    cx: &mut Context<'_>,
    out: &mut ReadBuf<'_>,
    most: usize,
) -> Poll<io::Result<usize>> {
    let before = out.filled().len();
    if most >= out.remaining() {
        ready!(Pin::new(stream).poll_read(cx, out))?;
        return Poll::Ready(Ok(out.filled().len() - before));
    }
    let mut piece = ReadBuf::new(out.initialize_unfilled_to(most));
    ready!(Pin::new(stream).poll_read(cx, &mut piece))?;
    let here = piece.filled().len();
    out.advance(here);
    Poll::Ready(Ok(here))
}

impl<S: AsyncWrite + Unpin> Wire<S> {
    /// Whether a write that has taken nothing for long is to be given up.
    fn taken(&mut self, cx: &mut Context<'_>, wrote: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if wrote.is_ready() {
            self.unread = None;
            return wrote;
        }
        let late = || Box::pin(sleep_until(Instant::now() + UNREAD_WAIT));
        match self.unread.get_or_insert_with(late).as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.taken(cx, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.taken(cx, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    fn judged(head: &str) -> Result<Framing, u16> {
        judge(head.as_bytes()).map_err(|error| error.status)
    }

    #[test]
    fn b09_what_could_be_read_in_two_ways_is_refused() {
        let head = |fields: &str| format!("POST /v1/messages HTTP/1.1\r\nhost: x\r\n{fields}\r\n");
        for (fields, framing) in [
            ("", Framing::Length(0)),
            ("content-length: 7\r\n", Framing::Length(7)),
            ("Transfer-Encoding: Chunked\r\n", Framing::Chunked),
            ("authorization: Bearer a\r\nx-api-key: a\r\n", Framing::Length(0)),
            ("accept: a\r\naccept: b\r\nx-empty:\r\nx-tab: a\tb\r\n", Framing::Length(0)),
        ] {
            assert_eq!(judged(&head(fields)), Ok(framing), "{fields}");
        }
        for fields in [
            "authorization: Bearer a\r\nAuthorization: Bearer a\r\n",
            "x-api-key: a\r\nx-api-key: b\r\n",
            "authorization: Bearer a\r\nx-api-key: b\r\n",
            "authorization: Basic a\r\nx-api-key: a\r\n",
            "host: y\r\n",
            "content-length: 1\r\ncontent-length: 1\r\n",
            "content-length: 1, 1\r\n",
            "content-length: +1\r\n",
            "content-length: -1\r\n",
            "content-length: 0x1\r\n",
            "content-length: \r\n",
            "content-length: 99999999999999999999\r\n",
            "content-length: 1\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: gzip, chunked\r\n",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: identity\r\n",
            "x-folded: a\r\n b\r\n",
            " x-folded: a\r\n",
            "x-blank : a\r\n",
            "no colon\r\n",
            ": no name\r\n",
            "x-control: a\0b\r\n",
            "idempotency-key: a\r\nidempotency-key: b\r\n",
            "x-gaoler-level: paranoid\r\nx-gaoler-level: developer\r\n",
        ] {
            assert_eq!(judged(&head(fields)), Err(400), "{fields:?}");
        }
        for first in [
            "GET  / HTTP/1.1",
            "GET / HTTP/1.1 ",
            "GET / HTTP/2.0",
            "GET / http/1.1",
            "GET /",
            "G(T / HTTP/1.1",
            "GET http://x/ HTTP/1.1",
            "GET //x\u{e9} HTTP/1.1",
            "CONNECT x:443 HTTP/1.1",
            "OPTIONS * HTTP/1.1",
            "",
        ] {
            assert_eq!(judged(&format!("{first}\r\nhost: x\r\n\r\n")), Err(400), "{first:?}");
        }
        assert_eq!(judged("GET / HTTP/1.1\r\n\r\n"), Err(400), "no host");
        assert_eq!(judged("GET / HTTP/1.0\r\n\r\n"), Ok(Framing::Length(0)));
        assert_eq!(judged("POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n"), Err(400));
        assert_eq!(judged(&head(&"a: b\r\n".repeat(HEAD_FIELDS_MAX))), Err(431));
    }

    /// What is handed on of these pieces, and why the rest is refused.
    async fn handed_on(pieces: &[&[u8]]) -> (String, Option<String>) {
        let mut from = coming(pieces);
        let heads = Arc::new(Heads::default());
        let mut wire = Wire::new(&mut from, Arc::clone(&heads));
        let mut out = Vec::new();
        // What is refused stays open for its answer: nothing more comes then.
        while let Ok(Ok(read)) =
            tokio::time::timeout(Duration::from_millis(50), wire.read_buf(&mut out)).await
        {
            if read == 0 {
                break;
            }
        }
        let why = heads.refused.get().map(|(_, _, error)| error.message.clone());
        (String::from_utf8_lossy(&out).into_owned(), why)
    }

    /// A connection on which these pieces come, one at a time.
    fn coming(pieces: &[&[u8]]) -> impl AsyncRead + Unpin {
        struct Pieces(std::collections::VecDeque<Vec<u8>>);
        impl AsyncRead for Pieces {
            fn poll_read(
                mut self: Pin<&mut Self>,
                _: &mut Context<'_>,
                out: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                if let Some(first) = self.0.front_mut() {
                    let here = first.len().min(out.remaining());
                    out.put_slice(&first[..here]);
                    first.drain(..here);
                    if first.is_empty() {
                        self.0.pop_front();
                    }
                }
                Poll::Ready(Ok(()))
            }
        }
        Pieces(pieces.iter().map(|piece| piece.to_vec()).collect())
    }

    #[tokio::test]
    async fn b09_every_head_of_a_connection_is_judged_and_no_body_is_taken_for_one() {
        let good = "GET /a HTTP/1.1\r\nhost: x\r\n\r\n";
        let long =
            "POST /b HTTP/1.1\r\nhost: x\r\ncontent-length: 28\r\n\r\nGET /c HTTP/1.1\nhost: x\r\n\r\n\r";
        let chunks = "POST /d HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n\
                      5;a=b\r\nG\n\r\n\n\r\n1\r\nx\r\n0\r\na: b\r\n\r\n";
        let bare = "GET /e HTTP/1.1\nhost: x\n\n";
        let all = format!("{good}{long}{chunks}{good}{bare}{good}");
        let passed = format!("{good}{long}{chunks}{good}{}", String::from_utf8_lossy(INSTEAD));
        let each: Vec<&[u8]> = all.as_bytes().chunks(1).collect();
        let by_seven: Vec<&[u8]> = all.as_bytes().chunks(7).collect();
        for pieces in [vec![all.as_bytes()], each, by_seven] {
            let (handed, why) = handed_on(&pieces).await;
            assert_eq!(handed, passed);
            assert!(why.is_some_and(|why| why.contains("CRLF")));
        }
        for wrong in [
            "\n",
            "x\r\n",
            "1\n\r\n",
            "1 \r\n",
            "-1\r\n",
            "123456789\r\n",
            "1\r\nab\r\n",
            "1\r\na\n",
            "0\r\n b\r\n",
            "0\r\na\n",
        ] {
            let text =
                format!("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{wrong}{good}");
            let (handed, _) = handed_on(&[text.as_bytes()]).await;
            assert!(!handed.ends_with(good), "{wrong:?}");
        }
        let (handed, why) = handed_on(&[format!("\r\n\r\n{good}").as_bytes()]).await;
        assert_eq!((handed.as_str(), why), (good, None), "empty lines before a head are nothing");
        let large = format!("GET / HTTP/1.1\r\nhost: x\r\na: {}", "b".repeat(HEAD_BYTES_MAX));
        let (handed, why) = handed_on(&[large.as_bytes()]).await;
        assert_eq!(handed.as_bytes(), INSTEAD);
        assert!(why.is_some_and(|why| why.contains("64 KiB")));
    }
}
