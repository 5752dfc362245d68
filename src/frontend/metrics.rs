//! The figures of GET /metrics: counted in this process, like its log, and forgotten with it.
//! It must never have a label that is not a word of gaoler's own: each is `&'static str` or a number of ours.

use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::{LazyLock, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use http::{Request, Response, StatusCode};
use hyper::body::{Frame, SizeHint};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use gaoler_protocol::{Exit, Layers, Level, Listen, Spawned, Tier, Violation};

use super::admission::Admission;
use super::crowd::Carried;
use super::docs::openapi;
use super::rates::UnderWay;
use super::trace;
use crate::ledger;

/// `content-type` of the text.
pub const KIND: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Seconds of a launch: a cage takes 3 ms, a host under load or an emulated one a thousand times that.
const LAUNCH_BUCKETS: [f64; 10] = [0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0, 10.0];
/// Seconds of a request: a page takes none, an agent up to its level's time.
const REQUEST_BUCKETS: [f64; 12] = [0.005, 0.05, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    route: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    route: &'static str,
    status: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    level: &'static str,
    outcome: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfLevel {
    level: &'static str,
}

/// One word: an error's code, a limit's name, what a violation was, a direction.
macro_rules! words {
    ($($name:ident { $label:ident })*) => {$(
        #[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
        struct $name { $label: &'static str }
    )*};
}

words! {
    Code { code }
    Limit { limit }
    What { what }
    Direction { direction }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Server {
    version: &'static str,
    tier: &'static str,
    level: &'static str,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

struct Metrics {
    registry: Registry,
    server: Family<Server, Gauge>,
    draining: Gauge,
    requests: Family<Answered, Counter>,
    request: Histograms<Route>,
    first_event: Histogram,
    errors: Family<Code, Counter>,
    running: Gauge,
    queue_waiting: Gauge,
    queue_longest: Gauge<f64, AtomicU64>,
    queue_wait: Histogram,
    runs: Family<Ended, Counter>,
    launch: Histograms<OfLevel>,
    run: Histograms<OfLevel>,
    limits: Family<Limit, Counter>,
    violations: Family<What, Counter>,
    egress_bytes: Family<Direction, Counter>,
    egress_requests: Counter,
    egress_denials: Counter,
    tokens: Family<Direction, Counter>,
    spans_exported: Counter,
    spans_dropped: Counter,
}

impl Metrics {
    fn new() -> Metrics {
        let long: fn() -> Histogram = || Histogram::new(REQUEST_BUCKETS);
        let short: fn() -> Histogram = || Histogram::new(LAUNCH_BUCKETS);
        let mut metrics = Metrics {
            registry: Registry::with_prefix("gaoler"),
            server: Family::default(),
            draining: Gauge::default(),
            requests: Family::default(),
            request: Family::new_with_constructor(long),
            first_event: long(),
            errors: Family::default(),
            running: Gauge::default(),
            queue_waiting: Gauge::default(),
            queue_longest: Gauge::default(),
            queue_wait: long(),
            runs: Family::default(),
            launch: Family::new_with_constructor(short),
            run: Family::new_with_constructor(long),
            limits: Family::default(),
            violations: Family::default(),
            egress_bytes: Family::default(),
            egress_requests: Counter::default(),
            egress_denials: Counter::default(),
            tokens: Family::default(),
            spans_exported: Counter::default(),
            spans_dropped: Counter::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let to = &mut self.registry;
        to.register("server", "1, with what /health says", self.server.clone());
        to.register("draining", "1 while the server shuts down", self.draining.clone());
        to.register("requests", "Requests by route and status", self.requests.clone());
        to.register_with_unit(
            "request",
            "From a request's head to its answer's last byte",
            Unit::Seconds,
            self.request.clone(),
        );
        to.register_with_unit(
            "first_event",
            "From a streamed message's head to its first event",
            Unit::Seconds,
            self.first_event.clone(),
        );
        to.register("errors", "Requests that were answered with an error", self.errors.clone());
        to.register("runs_in_progress", "Runs that are alive", self.running.clone());
        to.register("queue_waiting", "Requests that wait for a run", self.queue_waiting.clone());
        to.register_with_unit(
            "queue_longest_wait",
            "How long the one has waited that has waited longest",
            Unit::Seconds,
            self.queue_longest.clone(),
        );
        to.register_with_unit(
            "queue_wait",
            "How long runs waited before they began",
            Unit::Seconds,
            self.queue_wait.clone(),
        );
        to.register("runs", "Runs that ended, by stop reason or error, and by Exit", self.runs.clone());
        to.register_with_unit("launch", "From Spawn to the gate", Unit::Seconds, self.launch.clone());
        to.register_with_unit("run", "A run's wall time", Unit::Seconds, self.run.clone());
        to.register("limits_hit", "Limits that runs hit", self.limits.clone());
        to.register("violations", "What cages tried at their egress", self.violations.clone());
        to.register_with_unit("egress", "Bytes through egress", Unit::Bytes, self.egress_bytes.clone());
        to.register("egress_requests", "Requests to the upstream", self.egress_requests.clone());
        to.register("egress_denials", "Requests that egress refused", self.egress_denials.clone());
        to.register("tokens", "Tokens of the upstream, as egress read them", self.tokens.clone());
        to.register("spans_exported", "Spans that the collector has taken", self.spans_exported.clone());
        to.register("spans_dropped", "Spans that were given up", self.spans_dropped.clone());
    }
}

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// What is counted of one route. What most requests touch is looked up once.
struct Counted {
    route: &'static str,
    seconds: OnceLock<Histogram>,
    fine: OnceLock<Counter>,
}

impl Counted {
    const fn new(route: &'static str) -> Counted {
        Counted { route, seconds: OnceLock::new(), fine: OnceLock::new() }
    }

    fn took(&self, time: Duration) {
        let labels = Route { route: self.route };
        self.seconds.get_or_init(|| METRICS.request.get_or_create_owned(&labels)).observe(time.as_secs_f64());
    }

    fn answered(&self, status: StatusCode) {
        let counter = || {
            let labels = Answered { route: self.route, status: status.as_u16().into() };
            METRICS.requests.get_or_create_owned(&labels)
        };
        match status {
            StatusCode::OK => self.fine.get_or_init(counter).inc(),
            _ => counter().inc(),
        };
    }
}

static OTHER: Counted = Counted::new("other");

/// The routes that the document names: whatever else is asked for is `other`, or a stranger could make labels.
static ROUTES: LazyLock<matchit::Router<Counted>> = LazyLock::new(|| {
    let mut routes = matchit::Router::new();
    for path in openapi::paths() {
        // The document knows no parameter that is all of the rest of a path.
        let pattern = path.strip_suffix("/{path}").map(|folder| format!("{folder}/{{*path}}"));
        // A path that contradicts another one cannot be routed either, and a test asks for each.
        let _ = routes.insert(pattern.as_deref().unwrap_or(path), Counted::new(path));
    }
    routes
});

/// The route of a path.
fn route(path: &str) -> &'static Counted {
    ROUTES.at(path).map_or(&OTHER, |found| found.value)
}

/// A request on its way. Where it is dropped, its time is over.
pub struct Timed {
    route: &'static Counted,
    begun: Instant,
    /// It as a span, which ends with it.
    span: trace::Request,
    /// Its place among its address' requests.
    under_way: Option<UnderWay>,
    _carried: Carried,
}

impl Timed {
    /// A request whose head is there.
    pub fn begin<B>(request: &Request<B>, traces: &trace::Traces, carried: Carried) -> Timed {
        let route = route(request.uri().path());
        let span = traces.begin(request.method(), route.route, request.headers());
        Timed { route, begun: Instant::now(), span, under_way: None, _carried: carried }
    }

    /// Keeps this to the end of its answer.
    pub fn holds(&mut self, under_way: Option<UnderWay>) {
        self.under_way = under_way;
    }

    /// Its trace.
    pub fn trace(&self) -> trace::Trace {
        self.span.trace()
    }

    /// Counts the answer, and goes with its body to the end.
    pub fn answered(mut self, response: Response<Body>) -> Response<TimedBody> {
        self.span.answered(&response);
        self.route.answered(response.status());
        response.map(|body| TimedBody { body, _timed: self })
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        self.route.took(self.begun.elapsed());
    }
}

/// A body that nothing is changed of.
pub struct TimedBody {
    body: Body,
    _timed: Timed,
}

impl HttpBody for TimedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A streamed message has its first event.
pub fn first_event(after: Duration) {
    METRICS.first_event.observe(after.as_secs_f64());
}

/// A request was answered with an error.
pub fn error(code: &'static str) {
    METRICS.errors.get_or_create(&Code { code }).inc();
}

/// A run has its place, after so long.
pub fn waited(wait: Duration) {
    METRICS.queue_wait.observe(wait.as_secs_f64());
}

/// A run that is alive, until this is dropped.
pub struct Running(());

impl Running {
    /// A run that was launched.
    pub fn begin(spawned: &Spawned, level: Level) -> Running {
        METRICS.running.inc();
        let seconds = Duration::from_micros(spawned.launch_us).as_secs_f64();
        METRICS.launch.get_or_create(&OfLevel { level: level.name() }).observe(seconds);
        Running(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        METRICS.running.dec();
    }
}

/// A run has ended: with this stop reason or error.
pub fn ended(level: Level, outcome: &'static str, exit: Option<&Exit>) {
    let level = level.name();
    let reason = exit.map_or("unknown", |exit| exit.reason.name());
    METRICS.runs.get_or_create(&Ended { level, outcome, reason }).inc();
    let Some(exit) = exit else { return };
    METRICS.run.get_or_create(&OfLevel { level }).observe(Duration::from_micros(exit.wall_us).as_secs_f64());
    for limit in ledger::hit(exit) {
        METRICS.limits.get_or_create(&Limit { limit }).inc();
    }
    for (direction, bytes) in [("up", exit.bytes_up), ("down", exit.bytes_down)] {
        METRICS.egress_bytes.get_or_create(&Direction { direction }).inc_by(bytes);
    }
    for (direction, tokens) in [("input", exit.input_tokens), ("output", exit.output_tokens)] {
        METRICS.tokens.get_or_create(&Direction { direction }).inc_by(tokens);
    }
    METRICS.egress_requests.inc_by(exit.requests.into());
    METRICS.egress_denials.inc_by(exit.denials.into());
}

/// A cage tried something at its egress.
pub fn violation(violation: &Violation) {
    METRICS.violations.get_or_create(&What { what: violation.what.name() }).inc();
}

/// The collector has taken so many spans.
pub fn spans_exported(count: u64) {
    METRICS.spans_exported.inc_by(count);
}

/// So many spans were given up: there was no room, no exporter or no collector for them.
pub fn spans_dropped(count: u64) {
    METRICS.spans_dropped.inc_by(count);
}

/// How many were.
#[cfg(test)]
pub fn spans_dropped_total() -> u64 {
    METRICS.spans_dropped.get()
}

/// Everything, as text.
pub fn text(
    listen: Option<&Listen>,
    layers: Option<&Layers>,
    draining: bool,
    admission: &Admission,
) -> String {
    METRICS.draining.set(draining.into());
    METRICS.queue_waiting.set(i64::try_from(admission.load().1).unwrap_or(i64::MAX));
    METRICS.queue_longest.set(admission.longest_wait().as_secs_f64());
    let tier = listen.map(|listen| listen.tier).or(layers.map(|layers| layers.tier));
    let server = Server {
        version: env!("CARGO_PKG_VERSION"),
        tier: tier.map_or("unknown", Tier::name),
        level: listen.map_or(Level::Balanced, |listen| listen.level).name(),
    };
    METRICS.server.get_or_create(&server).set(1);
    let mut text = String::new();
    // A String takes everything that is written to it.
    let _ = encode(&mut text, &METRICS.registry);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_of_the_document_has_a_label_and_nothing_else_has() {
        for path in openapi::paths() {
            // With a value for each parameter, and more than one part for what is all of the rest.
            let asked = path.replace("{path}", "a/b").replace('{', "v").replace('}', "");
            assert_eq!(route(&asked).route, path, "{asked}");
        }
        for path in ["", "/v1", "/v1/messages/", "/v1/message", "/docs/a/b", "*"] {
            assert_eq!(route(path).route, "other", "{path}");
        }
    }
}
