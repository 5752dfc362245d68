//! HTTP itself: requests a second that start no run, beside a plain hyper server that says the same bytes; and what a
//! stream costs the frontend that says nothing for a while. It must never let the peer do less than answer.

use std::convert::Infallible;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Builder;

use crate::request::{Server, beside_us};
use crate::table::percentile;

/// Connections that ask at the same time, each its next request when it has the answer to the last one.
const CONNECTIONS: usize = 32;
/// How long one contender is asked before it is another's turn.
const SLICE: Duration = Duration::from_millis(500);
/// Workers of the peer: as many as the frontend has.
const WORKERS: usize = 2;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);
const TOKEN: &str = "sk-ant-oat01-bench-0000000000000000000000000000000000000000";

/// Requests a second of one path, ours and the peer's.
pub struct Rate {
    path: &'static str,
    ours: f64,
    theirs: f64,
    /// The median of what each pair of slices says: a host that is slow for a second is slow for both.
    ratio: f64,
}

/// All that was measured of HTTP.
pub struct Http {
    rates: Vec<Rate>,
    streams: Option<Streams>,
}

/// Streams that are open and silent.
pub struct Streams {
    open: usize,
    before_kib: u64,
    with_kib: u64,
}

impl Http {
    /// For programs.
    pub fn json(&self) -> Value {
        let rates = self.rates.iter().map(|it| {
            json!({"path": it.path, "ours_per_second": it.ours, "hyper_per_second": it.theirs, "ratio": it.ratio})
        });
        let streams = self.streams.as_ref().map(|it| {
            json!({"open": it.open, "frontend_rss_kib_before": it.before_kib, "frontend_rss_kib": it.with_kib})
        });
        json!({"rates": rates.collect::<Vec<_>>(), "idle_streams": streams})
    }
}

impl std::fmt::Display for Http {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.rates.is_empty() {
            writeln!(f, "HTTP without a run, {CONNECTIONS} connections")?;
            let heads = ["requests a second", "gaoler", "plain hyper", "median ratio"];
            writeln!(f, "{:<22}{:>12}{:>14}{:>14}", heads[0], heads[1], heads[2], heads[3])?;
        }
        for it in &self.rates {
            writeln!(f, "{:<22}{:>12.0}{:>14.0}{:>14.2}", it.path, it.ours, it.theirs, it.ratio)?;
        }
        if let Some(it) = &self.streams {
            write!(
                f,
                "\n{} idle streams: the frontend has {} KiB resident, {} without them",
                it.open, it.with_kib, it.before_kib
            )?;
        }
        Ok(())
    }
}

/// Measures: so many slices of each contender, and so many idle streams, over runs of this CLI.
///
/// # Errors
/// Whatever could not be started, or answered wrongly.
pub fn http(slices: u32, streams: usize, cli: &Path, double: &Path) -> Result<Http, String> {
    let mut rates = Vec::new();
    if slices > 0 {
        let folder = tempfile::tempdir().map_err(|error| format!("a folder: {error}"))?;
        let cli = std::fs::canonicalize(cli).map_err(|error| format!("{}: {error}", cli.display()))?;
        let server = Server::start(folder.path(), &cli, &[])?;
        for path in ["/health", "/v1/models"] {
            rates.push(rate(path, slices, server.address())?);
        }
        server.end()?;
    }
    let streams = (streams > 0).then(|| idle(streams, double)).transpose()?;
    Ok(Http { rates, streams })
}

fn rate(path: &'static str, slices: u32, ours: &str) -> Result<Rate, String> {
    let body = ask_once(ours, path)?;
    let peer = Peer::start(&body)?;
    let mut counts = [0u64; 2];
    let mut ratios = Vec::new();
    // One pair more, and first, to warm both up. Whoever was second is first the next time.
    for slice in 0..=slices {
        let mut pair = [0u64; 2];
        for contender in if slice % 2 == 0 { [0, 1] } else { [1, 0] } {
            let address = if contender == 0 { ours } else { &peer.address };
            pair[contender] = load(address, path)?;
        }
        if slice > 0 {
            counts = [counts[0] + pair[0], counts[1] + pair[1]];
            ratios.push(pair[0] as f64 / pair[1] as f64);
        }
    }
    let ratio = percentile(ratios, 50);
    let seconds = SLICE.as_secs_f64() * f64::from(slices);
    let per_second = |count: u64| count as f64 / seconds;
    Ok(Rate { path, ours: per_second(counts[0]), theirs: per_second(counts[1]), ratio })
}

fn head(address: &str, path: &str, more: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {TOKEN}\r\n{more}\r\n")
}

/// The body of one answer, which the peer is to say too.
fn ask_once(address: &str, path: &str) -> Result<Vec<u8>, String> {
    let mut stream = TcpStream::connect(address).map_err(|error| format!("connect: {error}"))?;
    stream
        .write_all(head(address, path, "connection: close\r\n").as_bytes())
        .map_err(|e| format!("send: {e}"))?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text).map_err(|error| format!("read: {error}"))?;
    let at = text.windows(4).position(|four| four == b"\r\n\r\n").ok_or("no head")?;
    match text.starts_with(b"HTTP/1.1 200 ") {
        true => Ok(text[at + 4..].to_vec()),
        false => Err(format!("{path}: {}", String::from_utf8_lossy(&text))),
    }
}

/// How many answers come in a slice.
fn load(address: &str, path: &str) -> Result<u64, String> {
    let runtime = Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let (count, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let request: Arc<[u8]> = head(address, path, "").into_bytes().into();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..CONNECTIONS {
            let stream =
                tokio::net::TcpStream::connect(address).await.map_err(|error| format!("connect: {error}"))?;
            let _ = stream.set_nodelay(true);
            tasks.spawn(ask_on(stream, request.clone(), count.clone(), over.clone()));
        }
        let until = Instant::now() + SLICE;
        tokio::time::sleep_until(until.into()).await;
        over.store(true, Ordering::Relaxed);
        let counted = count.load(Ordering::Relaxed);
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(|error| error.to_string())??;
        }
        Ok(counted)
    })
}

/// Asks on one connection until it is over.
async fn ask_on(
    mut stream: tokio::net::TcpStream,
    request: Arc<[u8]>,
    count: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
) -> Result<(), String> {
    let mut buffer = vec![0; 64 * 1024];
    while !over.load(Ordering::Relaxed) {
        stream.write_all(&request).await.map_err(|error| format!("send: {error}"))?;
        let mut filled = 0;
        loop {
            let length =
                stream.read(&mut buffer[filled..]).await.map_err(|error| format!("read: {error}"))?;
            if length == 0 {
                return Err("the server closed".into());
            }
            filled += length;
            if whole(&buffer[..filled])? {
                break;
            }
        }
        count.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Whether this is an answer to its last byte.
fn whole(text: &[u8]) -> Result<bool, String> {
    let Some(at) = text.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(false) };
    let head = std::str::from_utf8(&text[..at]).map_err(|error| error.to_string())?;
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(head.lines().next().unwrap_or_default().to_owned());
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    Ok(text.len() >= at + 4 + length.ok_or("an answer without a length")?)
}

/// A plain hyper server in a process of its own.
struct Peer {
    child: Child,
    address: String,
}

impl Peer {
    fn start(body: &[u8]) -> Result<Peer, String> {
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut child = Command::new(own)
            .arg("--peer")
            .arg(String::from_utf8_lossy(body).as_ref())
            .args(["--cli", "none"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("the peer: {error}"))?;
        let mut line = String::new();
        let stdout = child.stdout.take().ok_or("no stdout")?;
        BufReader::new(stdout).read_line(&mut line).map_err(|error| error.to_string())?;
        Ok(Peer { child, address: line.trim().to_owned() })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The peer: says these bytes to every request, for ever.
///
/// # Errors
/// What could not be opened.
pub fn peer(body: String) -> Result<(), String> {
    let runtime = Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build();
    runtime.map_err(|error| error.to_string())?.block_on(async {
        let listener =
            tokio::net::TcpListener::bind("127.0.0.1:0").await.map_err(|error| error.to_string())?;
        println!("{}", listener.local_addr().map_err(|error| error.to_string())?);
        let body = Bytes::from(body);
        loop {
            let (stream, _) = listener.accept().await.map_err(|error| error.to_string())?;
            let _ = stream.set_nodelay(true);
            let body = body.clone();
            tokio::spawn(async move {
                let answer = service_fn(move |_: Request<hyper::body::Incoming>| {
                    let body = body.clone();
                    async move {
                        let response = Response::builder().header("content-type", "application/json");
                        Ok::<_, Infallible>(response.body(Full::new(body)).unwrap_or_default())
                    }
                });
                let mut builder = hyper::server::conn::http1::Builder::new();
                let serving = builder.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), answer);
                let _ = serving.await;
            });
        }
    })
}

/// Opens streams that say a word and then nothing, and looks at the frontend.
fn idle(streams: usize, double: &Path) -> Result<Streams, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("a folder: {error}"))?;
    let double = std::fs::canonicalize(double).map_err(|error| format!("{}: {error}", double.display()))?;
    let max = streams.to_string();
    let settings = [
        ("GAOLER_RUNS__MAX", max.as_str()),
        ("GAOLER_RUNS__TENANT_MAX", max.as_str()),
        ("GAOLER_RUNS__SILENCE_SECONDS", "3600"),
    ];
    let server = Server::start(folder.path(), &double, &settings)?;
    let frontend = beside_us(server.pid(), "gaoler")?;
    let before_kib = rss_kib(frontend)?;
    let body = json!({"model": "sonnet", "max_tokens": 64, "stream": true,
        "messages": [{"role": "user", "content": "HANG LATE:"}]})
    .to_string();
    let mut open = Vec::with_capacity(streams);
    for number in 0..streams {
        let mut stream = TcpStream::connect(server.address()).map_err(|error| format!("connect: {error}"))?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
        let tenant = number % 50;
        let head = format!(
            "POST /v1/messages HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer sk-ant-oat01-bench-{tenant:044}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            server.address(),
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).map_err(|error| format!("send: {error}"))?;
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&seen).contains("it begins") {
            let length = stream.read(&mut buffer).map_err(|error| format!("stream {number}: {error}"))?;
            if length == 0 {
                return Err(format!("stream {number} ended: {}", String::from_utf8_lossy(&seen)));
            }
            seen.extend_from_slice(&buffer[..length]);
        }
        open.push(stream);
        if number % 100 == 99 {
            eprintln!("bench: {} streams are open", number + 1);
        }
    }
    let with_kib = rss_kib(frontend)?;
    let open = open.len();
    server.end_at_once()?;
    Ok(Streams { open, before_kib, with_kib })
}

fn rss_kib(pid: u32) -> Result<u64, String> {
    let status =
        std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|error| format!("/proc: {error}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).ok_or_else(|| "no VmRSS".into())
}
