//! Clients without a credential that take what they can: connections, room for bodies, places of runs.
//! They must never come from the neighbour's address, nor outlast their time.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};

/// Where they call from: not 127.0.0.1, which is the neighbour's.
const ADDRESS: [u8; 4] = [127, 0, 0, 66];
/// Addresses of whoever has many: 127.0.7.0 and those after it.
const ADDRESSES: usize = 256;
/// Connections of whoever has many.
const CONNECTIONS: usize = 10_000;
/// Clients that each do something odd, again and again.
const ODD_CLIENTS: usize = 100;
/// How long a client that got no further waits before its next attempt.
const AGAIN: Duration = Duration::from_millis(500);
/// Requests in one piece, of a client that reads no answer.
const PIPELINED: usize = 200;
/// Connections that each have a body of their own: more than a process of 1,024 descriptors, which a service manager
/// gives by default, can hold beside its own.
const SLOW_BODIES: u32 = 710;
/// Between two bytes of a slow body.
const SLOW_PAUSE: Duration = Duration::from_secs(3);
/// Chunks of one byte in a body: 3 MB on the wire.
const CHUNKS: usize = 524_287;
/// Between two requests with a new token: 200 a second.
const TOKENS_PAUSE: Duration = Duration::from_millis(5);
/// How long an answer to an invented token may take before its client leaves.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// What they do.
#[derive(Debug, Clone, Copy)]
pub enum Stranger {
    /// Hundreds of bodies at once, a byte every few seconds.
    SlowBodies,
    /// Bodies in pieces of one byte, held open.
    TinyChunks,
    /// Small requests, each with a token of its own that the embedded upstream refuses.
    InventedCredentials,
    /// Thousands of connections of one address that say nothing.
    Connections,
    /// As many, of 256 addresses.
    ConnectionsOfMany,
    /// Heads that never end, a byte every few seconds.
    SlowHeads,
    /// Answers, many and large, that nobody reads.
    SlowReaders,
    /// HTTP/1.0, the sending half closed, and trailers that never end.
    Oddities,
}

impl Stranger {
    /// At work until then. What the server answers is its business.
    ///
    /// # Errors
    /// Where it cannot work at all: a runtime that does not start, or nobody listening at the start.
    pub fn at_work(self, server: &str, until: Instant) -> Result<(), String> {
        let server: SocketAddr = server.parse().map_err(|error| format!("{server}: {error}"))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("a runtime: {error}"))?;
        runtime.block_on(async {
            drop(connect(server).await?);
            let left = until.saturating_duration_since(Instant::now());
            let work = async {
                match self {
                    Stranger::SlowBodies => slow_bodies(server).await,
                    Stranger::TinyChunks => tiny_chunks(server).await,
                    Stranger::InventedCredentials => invented_credentials(server).await,
                    Stranger::Connections => connections(server, 1).await,
                    Stranger::ConnectionsOfMany => connections(server, ADDRESSES).await,
                    Stranger::SlowHeads => slow_heads(server).await,
                    Stranger::SlowReaders => slow_readers(server).await,
                    Stranger::Oddities => oddities(server).await,
                }
            };
            // It goes on until its time is over.
            let _ = timeout(left, work).await;
            Ok(())
        })
    }
}

async fn connect(server: SocketAddr) -> Result<TcpStream, String> {
    connect_from(ADDRESS, server).await
}

async fn connect_from(address: [u8; 4], server: SocketAddr) -> Result<TcpStream, String> {
    let socket = TcpSocket::new_v4().map_err(|error| format!("a socket: {error}"))?;
    socket.bind(SocketAddr::from((address, 0))).map_err(|error| format!("bind: {error}"))?;
    socket.connect(server).await.map_err(|error| format!("connect: {error}"))
}

/// The head of a request; `extra` lines end with a line's end.
fn head(server: SocketAddr, extra: &str) -> String {
    format!("POST /v1/messages HTTP/1.1\r\nhost: {server}\r\ncontent-type: application/json\r\n{extra}\r\n")
}

async fn slow_bodies(server: SocketAddr) {
    let mut all = JoinSet::new();
    for _ in 0..SLOW_BODIES {
        all.spawn(async move {
            loop {
                if let Ok(mut stream) = connect(server).await {
                    let head = head(server, "content-length: 30000000\r\n");
                    let mut sent = stream.write_all(head.as_bytes()).await;
                    while sent.is_ok() {
                        sleep(SLOW_PAUSE).await;
                        sent = stream.write_all(b" ").await;
                    }
                }
                sleep(SLOW_PAUSE).await;
            }
        });
    }
    all.join_all().await;
}

async fn tiny_chunks(server: SocketAddr) {
    let chunks = b"1\r\n \r\n".repeat(CHUNKS);
    loop {
        if let Ok(mut stream) = connect(server).await {
            let head = head(server, "transfer-encoding: chunked\r\n");
            let sent = stream.write_all(head.as_bytes()).await;
            if sent.is_ok() && stream.write_all(&chunks).await.is_ok() {
                // Held open for as long as the server bears it.
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Each comes again when it was ended.
async fn connections(server: SocketAddr, addresses: usize) {
    let mut all = JoinSet::new();
    for n in 0..CONNECTIONS {
        let address = if addresses == 1 { ADDRESS } else { [127, 0, 7, (n % addresses) as u8] };
        all.spawn(async move {
            loop {
                if let Ok(mut stream) = connect_from(address, server).await {
                    let _ = stream.read_to_end(&mut Vec::new()).await;
                }
                sleep(AGAIN).await;
            }
        });
    }
    all.join_all().await;
}

/// Some clients that do this again and again.
async fn clients<F: Future<Output = Result<(), std::io::Error>> + Send + 'static>(
    server: SocketAddr,
    number: usize,
    act: impl Fn(TcpStream) -> F + Copy + Send + 'static,
) {
    let mut all = JoinSet::new();
    for _ in 0..number {
        all.spawn(async move {
            loop {
                if let Ok(stream) = connect(server).await {
                    // However it ends, the next one begins.
                    let _ = act(stream).await;
                }
                sleep(AGAIN).await;
            }
        });
    }
    all.join_all().await;
}

async fn slow_heads(server: SocketAddr) {
    clients(server, SLOW_BODIES as usize, |mut stream| async move {
        stream.write_all(b"GET /health HTTP/1.1\r\nx-slow: ").await?;
        loop {
            sleep(SLOW_PAUSE).await;
            stream.write_all(b"a").await?;
        }
    })
    .await;
}

async fn slow_readers(server: SocketAddr) {
    clients(server, ODD_CLIENTS, |mut stream| async move {
        let request = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n";
        stream.write_all(&request.repeat(PIPELINED)).await?;
        loop {
            sleep(SLOW_PAUSE).await;
            stream.read_u8().await?;
        }
    })
    .await;
}

async fn oddities(server: SocketAddr) {
    let old = clients(server, ODD_CLIENTS, |mut stream| async move {
        stream.write_all(b"GET /v1/models HTTP/1.0\r\n\r\n").await?;
        stream.read_to_end(&mut Vec::new()).await.map(drop)
    });
    let half = clients(server, ODD_CLIENTS, |mut stream| async move {
        stream
            .write_all(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
            .await?;
        stream.shutdown().await?;
        stream.read_to_end(&mut Vec::new()).await.map(drop)
    });
    let trailers = clients(server, ODD_CLIENTS, |mut stream| async move {
        let head = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n";
        stream.write_all(head).await?;
        loop {
            stream.write_all(b"x-trailer: more of it\r\n").await?;
            sleep(Duration::from_millis(50)).await;
        }
    });
    tokio::join!(old, half, trailers);
}

async fn invented_credentials(server: SocketAddr) {
    let body =
        r#"{"model":"claude-sonnet-5","max_tokens":1,"messages":[{"role":"user","content":"ECHO: x"}]}"#;
    let (mut all, mut ticks) = (JoinSet::new(), interval(TOKENS_PAUSE));
    loop {
        ticks.tick().await;
        while all.try_join_next().is_some() {}
        let token: u128 = rand::random();
        let extra = format!(
            "authorization: Bearer sk-ant-oat01-refused-{token:032x}\r\ncontent-length: {}\r\nconnection: close\r\n",
            body.len()
        );
        let request = head(server, &extra) + body;
        all.spawn(timeout(ANSWER_WAIT, async move {
            let mut stream = connect(server).await?;
            stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
            stream.read_to_end(&mut Vec::new()).await.map_err(|error| error.to_string())
        }));
    }
}
