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
                }
            };
            // It goes on until its time is over.
            let _ = timeout(left, work).await;
            Ok(())
        })
    }
}

async fn connect(server: SocketAddr) -> Result<TcpStream, String> {
    let socket = TcpSocket::new_v4().map_err(|error| format!("a socket: {error}"))?;
    socket.bind(SocketAddr::from((ADDRESS, 0))).map_err(|error| format!("bind: {error}"))?;
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
