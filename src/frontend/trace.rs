//! Traces of runs: each request that asks for one is a span, and each step of its run another, for the exporter to send.
//! It must never wait for the exporter, keep more than its bounds, or let a tenant's text in: no prompt, no credential,
//! no name of a file.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use gaoler_exporter_wire::{FRAME_BYTES_MAX, Frame, Report, Side, Span as Told, Value, Word, decode, encode};
use gaoler_ledger_wire::Hex;
use gaoler_policy::settings::Settings;
use gaoler_protocol::{Exit, Spawn, Spawned};
use gaoler_sys::channel;
use http::{HeaderMap, Response};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::answer::Ending;
use super::dialect::Dialect;
use super::error::ApiError;
use super::{log, metrics, way};

/// Bytes of a `tracestate` that is passed on; a longer one is left out.
const STATE_BYTES_MAX: usize = 512;
/// Spans of a trace that wait for its end.
const KEPT_MAX: usize = 32;
/// Attributes of one span, and what is known of its run.
const ATTRIBUTES_MAX: usize = 32;

/// The way to the exporter. Without one nothing is traced, and nothing costs anything.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Way>>);

struct Way {
    socket: UnixStream,
    /// The bits of a number.
    ratio: AtomicU64,
    scheme: &'static str,
    /// Spans that were handed over.
    handed: Mutex<u64>,
}

impl Traces {
    /// Over this socket.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn new(socket: Option<OwnedFd>, settings: &Settings) -> io::Result<Traces> {
        let Some(socket) = socket else { return Ok(Traces(None)) };
        let scheme = if settings.server.tls_certificate.as_os_str().is_empty() { "http" } else { "https" };
        let ratio = AtomicU64::new(settings.telemetry.sample_ratio.to_bits());
        let socket = UnixStream::from_std(socket.into())?;
        let way = Arc::new(Way { socket, ratio, scheme, handed: Mutex::new(0) });
        let heard = Arc::clone(&way);
        tokio::spawn(async move {
            if let Err(error) = heard.hear().await {
                log::line("exporter", &[("error", error.to_string().into())]);
            }
        });
        Ok(Traces(Some(way)))
    }

    /// From now on, of the traces that begin here.
    pub fn sample(&self, ratio: f64) {
        if let Some(way) = &self.0 {
            way.ratio.store(ratio.to_bits(), Ordering::Relaxed);
        }
    }

    /// A request whose head is there. Only one that asks for a run has a trace: it is its client's where that sent a
    /// valid `traceparent`, and a new one otherwise.
    pub fn begin(&self, method: &http::Method, route: &'static str, headers: &HeaderMap) -> Request {
        let asks = || [Dialect::Messages, Dialect::Completions].iter().any(|dialect| dialect.path() == route);
        let Some(way) = self.0.as_ref().filter(|_| method == http::Method::POST && asks()) else {
            return Request { span: None, trace: Trace(None) };
        };
        let parent = Parent::of(headers);
        let id = parent.as_ref().map_or_else(draw::<16>, |parent| parent.trace);
        let sampled = parent.as_ref().map_or_else(|| is_sampled(&id, way.ratio()), |parent| parent.sampled);
        let span = draw::<8>();
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (wall, begun) = (u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX), Instant::now());
        let known = Mutex::new(Known::default());
        let (parent, state) = parent.map_or((None, String::new()), |it| (Some(it.span), it.state));
        let trace = Trace(Some(Arc::new(Inner {
            way: Arc::clone(way),
            id,
            root: span,
            state,
            sampled,
            wall,
            begun,
            known,
        })));
        let mut span = trace.open(format!("POST {route}").into(), span, parent, Side::Server);
        if let Some((_, told)) = &mut span.0 {
            told.remote = parent.is_some();
        }
        for (key, value) in [
            ("http.request.method", "POST"),
            ("http.route", route),
            ("url.path", route),
            ("url.scheme", way.scheme),
        ] {
            span.set(key, value);
        }
        span.set("gen_ai.operation.name", "chat");
        Request { span: Some(Box::new(span)), trace }
    }
}

impl Way {
    fn ratio(&self) -> f64 {
        f64::from_bits(self.ratio.load(Ordering::Relaxed))
    }

    /// Hears what became of spans, for as long as the supervisor keeps the other end.
    async fn hear(&self) -> io::Result<()> {
        let mut settled = 0u64;
        loop {
            let receive = || channel::receive::<{ FRAME_BYTES_MAX + 1 }>(self.socket.as_fd());
            let received = self.socket.async_io(Interest::READABLE, receive).await?;
            if received.bytes.is_empty() {
                return Ok(());
            }
            let wrong = || io::Error::new(io::ErrorKind::InvalidData, "a frame of the exporter that is none");
            let whole = !received.truncated && received.fds.is_empty();
            let report: Report = decode(&received.bytes).filter(|_| whole).ok_or_else(wrong)?;
            if let Some(from) = report.from {
                // What an exporter before this one had taken, and did not live to tell of.
                metrics::spans_dropped(from.saturating_sub(settled));
                settled = from;
            }
            metrics::spans_exported(report.exported);
            metrics::spans_dropped(report.dropped);
            settled = settled.saturating_add(report.exported).saturating_add(report.dropped);
        }
    }

    /// Hands these over, as far as there is room for them now.
    fn hand(&self, mut spans: Vec<Told>) {
        let count = spans.len();
        let mut handed = self.handed.lock().unwrap_or_else(PoisonError::into_inner);
        let frame = Frame { before: *handed, spans };
        if let Some(bytes) = encode(&frame) {
            match channel::send(self.socket.as_fd(), &bytes, &[]) {
                Ok(()) => *handed += count as u64,
                Err(_) => metrics::spans_dropped(count as u64),
            }
            return;
        }
        drop(handed);
        spans = frame.spans;
        match count {
            0 | 1 => metrics::spans_dropped(count as u64),
            _ => {
                let rest = spans.split_off(count / 2);
                self.hand(spans);
                self.hand(rest);
            }
        }
    }
}

/// Whose trace a request belongs to, as its client says (W3C Trace Context).
#[derive(Debug, PartialEq, Eq)]
struct Parent {
    trace: [u8; 16],
    span: [u8; 8],
    sampled: bool,
    state: String,
}

impl Parent {
    /// `None` where there is no `traceparent`, more than one, or one that is not valid: then the trace is a new one.
    fn of(headers: &HeaderMap) -> Option<Parent> {
        let mut all = headers.get_all("traceparent").iter();
        let text = all.next().filter(|_| all.next().is_none())?.to_str().ok()?;
        let mut fields = text.split('-');
        let [version, trace, span, flags] = [fields.next()?, fields.next()?, fields.next()?, fields.next()?];
        let [version] = bytes::<1>(version)?;
        // A later version may say more after what is known; this one says no more.
        if version == 0xff || version == 0 && fields.next().is_some() {
            return None;
        }
        let (trace, span, [flags]) = (bytes::<16>(trace)?, bytes::<8>(span)?, bytes::<1>(flags)?);
        let is_some = trace != [0; 16] && span != [0; 8];
        is_some.then(|| Parent { trace, span, sampled: flags & 1 == 1, state: state(headers) })
    }
}

/// The `tracestate` of a request; nothing where it is too long or is none.
fn state(headers: &HeaderMap) -> String {
    let all: Option<Vec<&str>> =
        headers.get_all("tracestate").iter().map(|value| value.to_str().ok().map(str::trim)).collect();
    let text = all.unwrap_or_default().join(",");
    let members = || text.split(',').map(str::trim).filter(|member| !member.is_empty());
    let is_member = |member: &str| {
        let (key, value) = member.split_once('=').unwrap_or_default();
        let in_key = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-*/@".contains(&b);
        !key.is_empty() && !value.is_empty() && key.bytes().all(in_key) && !value.contains('=')
    };
    let good = text.len() <= STATE_BYTES_MAX && members().count() <= 32 && members().all(is_member);
    if good { text } else { String::new() }
}

/// Bytes of lower-case hexadecimal digits.
fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    Hex::parse(text)?.array()
}

/// An id that is not all zero.
fn draw<const N: usize>() -> [u8; N] {
    loop {
        let mut id = [0; N];
        rand::fill(&mut id[..]);
        if id != [0; N] {
            return id;
        }
    }
}

/// Whether a trace that begins here is sent: by its id, so that all who see it decide alike.
fn is_sampled(id: &[u8; 16], ratio: f64) -> bool {
    let [.., a, b, c, d, e, f, g, h] = *id;
    let place = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1;
    (place as f64) < ratio * (1u64 << 63) as f64
}

/// The trace that a run belongs to; nothing where nothing is traced.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Inner>>);

struct Inner {
    way: Arc<Way>,
    id: [u8; 16],
    root: [u8; 8],
    state: String,
    sampled: bool,
    /// One moment by both clocks: times of a trace go forward whatever happens to the wall's.
    wall: u64,
    begun: Instant,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// What holds of each span of it.
    of_all: Vec<(Word, Value)>,
    /// Spans that have ended and were not handed over.
    ended: Vec<Told>,
    /// The request before this one, where it goes on with that one's run.
    follows: Option<([u8; 16], [u8; 8])>,
    /// What its run failed of: a status and a code.
    error: Option<(u16, &'static str)>,
}

impl Inner {
    fn known(&self) -> MutexGuard<'_, Known> {
        // What is done under the lock cannot stop half way.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, at: Instant) -> u64 {
        let nanoseconds =
            |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        match at.checked_duration_since(self.begun) {
            Some(after) => self.wall.saturating_add(nanoseconds(after)),
            None => self.wall.saturating_sub(nanoseconds(self.begun - at)),
        }
    }

    fn ended(&self, span: Told, is_last: bool) {
        let mut known = self.known();
        known.ended.push(span);
        if is_last || known.ended.len() >= KEPT_MAX {
            self.hand(known);
        }
    }

    fn hand(&self, mut known: MutexGuard<'_, Known>) {
        let mut spans = std::mem::take(&mut known.ended);
        for span in &mut spans {
            let room = ATTRIBUTES_MAX.saturating_sub(span.attributes.len());
            span.attributes.extend(known.of_all.iter().take(room).cloned());
            if span.id == self.root {
                span.links.extend(known.follows);
            }
        }
        drop(known);
        if !spans.is_empty() {
            self.way.hand(spans);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.hand(self.known());
    }
}

impl Trace {
    /// Its id, as it is written.
    pub fn id(&self) -> Option<String> {
        self.0.as_ref().map(|inner| Hex(inner.id.to_vec()).to_string())
    }

    /// Something that holds of each of its spans.
    fn know(&self, key: &'static str, value: impl Into<Value>) {
        let Some(inner) = self.0.as_ref().filter(|inner| inner.sampled) else { return };
        let mut known = inner.known();
        let (key, value) = (Cow::Borrowed(key), value.into());
        match known.of_all.iter_mut().find(|(name, _)| *name == key) {
            Some((_, before)) => *before = value,
            None => known.of_all.push((key, value)),
        }
    }

    /// What is known of this.
    fn known(&self, key: &'static str) -> Option<Value> {
        let known = self.0.as_ref()?.known();
        known.of_all.iter().find(|(name, _)| *name == key).map(|(_, value)| value.clone())
    }

    /// It has a run, for this tenant.
    pub fn asks(&self, spawn: &Spawn, tenant: &str, model: &str) {
        if self.0.is_some() {
            self.know("gaoler.run", spawn.run.to_string());
            self.know("gaoler.level", spawn.level.name());
            self.know("gaoler.tenant", tenant.to_owned());
            self.know("gen_ai.provider.name", "anthropic");
            self.know("gen_ai.request.model", model.to_owned());
        }
    }

    /// Its run goes by this name and runs there. A request that goes on with a run has a name of its own too.
    pub fn runs(&self, spawned: &Spawned) {
        let run = Value::from(spawned.run.to_string());
        match self.known("gaoler.run") {
            Some(own) if own != run => self.know("gaoler.continued_as", own),
            _ => {}
        }
        self.know("gaoler.run", run);
        self.know("gaoler.tier", spawned.tier.name());
    }

    /// It goes on with the run of that trace's request.
    pub fn follows(&self, before: &Trace) {
        let (Some(inner), Some(before)) = (&self.0, &before.0) else { return };
        // What was not sent is not there to be led to.
        if before.sampled {
            inner.known().follows = Some((before.id, before.root));
        }
    }

    /// A step of its run, until what is returned is dropped.
    pub fn begin(&self, name: &'static str) -> Span {
        let parent = self.0.as_ref().map(|inner| inner.root);
        self.open(name.into(), draw(), parent, Side::Internal)
    }

    fn open(&self, name: Word, id: [u8; 8], parent: Option<[u8; 8]>, side: Side) -> Span {
        let Some(inner) = self.0.as_ref().filter(|inner| inner.sampled) else { return Span(None) };
        let told = Told {
            trace: inner.id,
            id,
            parent,
            remote: false,
            state: inner.state.clone(),
            name,
            side,
            start: inner.at(Instant::now()),
            end: 0,
            attributes: Vec::new(),
            events: Vec::new(),
            links: Vec::new(),
            failed: false,
        };
        Span(Some((Arc::clone(inner), Box::new(told))))
    }
}

/// A step that is under way; it ends when this is dropped.
pub struct Span(Option<(Arc<Inner>, Box<Told>)>);

impl Span {
    /// Something that is known of it.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some((_, told)) = &mut self.0
            && told.attributes.len() < ATTRIBUTES_MAX
        {
            told.attributes.push((key.into(), value.into()));
        }
    }

    /// Something that happens now. Only the first of a name is kept.
    pub fn happens(&mut self, name: &'static str) {
        if let Some((inner, told)) = &mut self.0
            && told.events.iter().all(|(known, _)| known != name)
        {
            told.events.push((name.into(), inner.at(Instant::now())));
        }
    }

    /// It has failed, and its run with it.
    pub fn fail(&mut self, error: &ApiError) {
        self.set("error.type", error.code);
        if let Some((inner, told)) = &mut self.0 {
            told.failed = true;
            inner.known().error = Some((error.status, error.code));
        }
    }

    /// It ends now, though more may be said of it.
    pub fn stop(&mut self) {
        if let Some((inner, told)) = &mut self.0 {
            told.end = inner.at(Instant::now());
        }
    }

    /// It was the launch of this run.
    pub fn launched(&mut self, spawned: &Spawned) {
        self.set("gaoler.launch_us", spawned.launch_us);
    }

    /// It was the CLI of a run that was launched then, and has ended.
    pub fn ended(&mut self, ending: &Ending, launched: Instant, exit: Option<&Exit>) {
        match ending {
            Ending::Done(done) => self.set("gaoler.stop_reason", done.stop_reason),
            Ending::Failed(error) => self.fail(error),
        }
        if let Some(exit) = exit {
            self.set("gaoler.exit_reason", exit.reason.name());
            self.upstream(launched, exit);
        }
    }

    /// What egress counted of the upstream since then, as a part of this span.
    fn upstream(&self, since: Instant, exit: &Exit) {
        let Some((inner, own)) = &self.0 else { return };
        let trace = Trace(Some(Arc::clone(inner)));
        let mut span = trace.open("upstream".into(), draw(), Some(own.id), Side::Client);
        span.set("gen_ai.operation.name", "chat");
        span.set("gen_ai.usage.input_tokens", exit.input_tokens);
        span.set("gen_ai.usage.output_tokens", exit.output_tokens);
        span.set("gen_ai.usage.cache_creation.input_tokens", exit.cache_write_tokens);
        span.set("gen_ai.usage.cache_read.input_tokens", exit.cache_read_tokens);
        span.set("gaoler.upstream.requests", u64::from(exit.requests));
        span.set("gaoler.upstream.denials", u64::from(exit.denials));
        if let Some((inner, told)) = &mut span.0 {
            // Of a run that was launched for a request before this one, it is a part of what is served now.
            told.start = inner.at(since).max(own.start);
            told.end = own.end;
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some((inner, mut told)) = self.0.take() {
            if told.end == 0 {
                told.end = inner.at(Instant::now());
            }
            let is_last = told.side == Side::Server;
            inner.ended(*told, is_last);
        }
    }
}

/// A request, to the last byte of its answer.
pub struct Request {
    /// Apart, for most requests have none and their answers carry this along.
    span: Option<Box<Span>>,
    trace: Trace,
}

impl Request {
    /// Its trace.
    pub fn trace(&self) -> Trace {
        self.trace.clone()
    }

    /// Its answer's head is there.
    pub fn answered<B>(&mut self, response: &Response<B>) {
        let Some(span) = &mut self.span else { return };
        span.set("http.response.status_code", u64::from(response.status().as_u16()));
        // A request that joined a run has not begun it, and knows no other name.
        let run = response.headers().get(way::RUN_ID).and_then(|run| run.to_str().ok());
        if let Some(run) = run.filter(|_| self.trace.known("gaoler.run").is_none()) {
            self.trace.know("gaoler.run", run.to_owned());
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let Some(mut span) = self.span.take() else { return };
        let Some((inner, told)) = &mut span.0 else { return };
        let status = told.attributes.iter().find_map(|(key, value)| match value {
            Value::Number(status) if key == "http.response.status_code" => Some(*status),
            _ => None,
        });
        let error = inner.known().error;
        let kind: Value = match (status, error) {
            // A client's own fault is no failure of the server's, and neither is its leaving.
            (_, Some((500.., code))) => code.into(),
            (Some(status @ 500..), _) => status.to_string().into(),
            (None, _) => "client_gone".into(),
            _ => return,
        };
        told.failed = status.is_some();
        span.set("error.type", kind);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue, Method};

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).expect("a value"))
        };
        list.iter().map(pair).collect()
    }

    #[test]
    fn a_valid_parent_is_taken_and_any_other_is_none() {
        let parent =
            Parent::of(&headers(&[("traceparent", VALID), ("tracestate", "a=1, b@c=x")])).expect("valid");
        assert_eq!(parent.trace[..2], [0x0a, 0xf7]);
        assert_eq!((parent.span[7], parent.sampled, parent.state.as_str()), (0x31, true, "a=1, b@c=x"));
        let unsampled = VALID.replace("-01", "-00");
        assert!(!Parent::of(&headers(&[("traceparent", &unsampled)])).expect("valid").sampled);
        let later = format!("01{}-more", &VALID[2..]);
        assert!(Parent::of(&headers(&[("traceparent", &later)])).is_some());
        for wrong in [
            "",
            "x",
            &VALID.to_uppercase(),
            &VALID[..54],
            &format!("{VALID}-more"),
            &format!("ff{}", &VALID[2..]),
            &VALID.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &VALID.replace("b7ad6b7169203331", &"0".repeat(16)),
            &VALID.replace("b7ad", "b7a "),
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        ] {
            assert_eq!(Parent::of(&headers(&[("traceparent", wrong)])), None, "{wrong}");
        }
        assert_eq!(Parent::of(&headers(&[("traceparent", VALID), ("traceparent", VALID)])), None, "two");
        assert_eq!(Parent::of(&HeaderMap::new()), None);
    }

    #[test]
    fn a_state_that_is_none_is_left_out() {
        let of = |list: &[(&'static str, &str)]| state(&headers(list));
        assert_eq!(of(&[("tracestate", "a=1"), ("tracestate", "b=2")]), "a=1,b=2");
        for wrong in ["a", "=1", "A=1", "a=1=2", &format!("a={}", "x".repeat(512)), &"a=1,".repeat(33)] {
            assert_eq!(of(&[("tracestate", wrong)]), "", "{wrong}");
        }
    }

    #[test]
    fn a_part_of_the_traces_is_sent() {
        let part = |ratio| (0..4000).filter(|_| is_sampled(&draw(), ratio)).count();
        assert_eq!((part(0.0), part(1.0)), (0, 4000));
        let half = part(0.5);
        assert!((1700..2300).contains(&half), "{half} of 4000");
    }

    #[tokio::test]
    async fn what_does_not_fit_is_dropped_and_nobody_waits() {
        let (ours, theirs) = channel::pair().expect("a pair");
        let traces = Traces::new(Some(ours), &Settings::default()).expect("traces");
        let before = metrics::spans_dropped_total();
        let begun = Instant::now();
        for _ in 0..20_000 {
            let request = traces.begin(&Method::POST, "/v1/messages", &HeaderMap::new());
            drop(request.trace().begin("queue"));
        }
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
        let dropped = metrics::spans_dropped_total() - before;
        assert!(dropped > 0, "nobody reads, so the socket is full");
        // What did fit is whole, and counted on.
        let mut taken = 0;
        while let Ok(received) = channel::receive::<{ FRAME_BYTES_MAX + 1 }>(theirs.as_fd()) {
            let frame: Frame = decode(&received.bytes).expect("a frame");
            assert_eq!(frame.before, taken);
            let names: Vec<&str> = frame.spans.iter().map(|span| &*span.name).collect();
            assert_eq!(names, ["queue", "POST /v1/messages"]);
            taken += frame.spans.len() as u64;
        }
        assert!(dropped >= 40_000 - taken, "{dropped} dropped and {taken} taken of 40000");
    }

    #[test]
    fn without_an_exporter_nothing_is_traced() {
        let request =
            Traces::default().begin(&Method::POST, "/v1/messages", &headers(&[("traceparent", VALID)]));
        assert!(request.span.is_none() && request.trace().id().is_none());
        assert!(request.trace().begin("queue").0.is_none());
    }

    #[tokio::test]
    async fn only_requests_for_runs_are_traced_and_an_unsampled_parent_is_obeyed() {
        let (ours, theirs) = channel::pair().expect("a pair");
        let traces = Traces::new(Some(ours), &Settings::default()).expect("traces");
        drop(traces.begin(&Method::GET, "/v1/models", &HeaderMap::new()));
        drop(traces.begin(&Method::GET, "/v1/messages", &HeaderMap::new()));
        let unsampled = VALID.replace("-01", "-00");
        let request = traces.begin(&Method::POST, "/v1/messages", &headers(&[("traceparent", &unsampled)]));
        assert_eq!(request.trace().id().as_deref(), Some("0af7651916cd43dd8448eb211c80319c"), "for the log");
        drop(request);
        let nothing = channel::receive::<{ FRAME_BYTES_MAX + 1 }>(theirs.as_fd());
        assert_eq!(nothing.expect_err("nothing").kind(), io::ErrorKind::WouldBlock);
    }
}
