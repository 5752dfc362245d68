//! What a bomb in one tenant's run costs the next tenant: its requests, and the health check, while the bomb is at work
//! and while nothing is, by turns. It must never count a request that began before its bomb, or ended after it.

use std::fmt::{Display, Formatter};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::request::{Asked, Server};
use crate::strangers::Stranger;
use crate::table::{at, ratio};

/// What is at work beside the neighbour.
enum Bomb {
    /// A run of another tenant's: its limits, and its prompt.
    Run(&'static str, &'static str),
    /// Somebody without a credential, at another address.
    Stranger(Stranger),
}

const BOMBS: [(&str, Bomb); 17] = [
    (
        "forks",
        Bomb::Run("tasks=256,wall_ms=20000", "RUN: bash -c 'bomb() { bomb | bomb & }; bomb; sleep 600'"),
    ),
    (
        "memory, again and again",
        Bomb::Run(
            "memory_mib=768,wall_ms=20000",
            "RUN: while :; do python3 -ISc 'b\"x\" * 4_000_000_000'; done",
        ),
    ),
    (
        "temporary files",
        Bomb::Run(
            "memory_mib=768,tmp_mib=256,wall_ms=20000",
            "RUN: while :; do dd if=/dev/zero of=/tmp/f bs=1M count=300; rm /tmp/f; done 2>/dev/null",
        ),
    ),
    (
        "disk",
        Bomb::Run(
            "disk_mib=4096,file_mib=200,wall_ms=20000",
            "RUN: while :; do dd if=/dev/zero of=f bs=1M count=150; rm f; done 2>/dev/null",
        ),
    ),
    (
        "files",
        Bomb::Run(
            "wall_ms=20000",
            "RUN: while :; do mkdir d; for n in $(seq 5000); do : > d/$n; done; rm -r d; done",
        ),
    ),
    ("output", Bomb::Run("output_mib=4096,wall_ms=20000", "RUN: yes | cat >&2")),
    (
        "files without a name",
        Bomb::Run(
            "disk_mib=1024,wall_ms=20000",
            "RUN: python3 -ISc 'import os
kept = []
while True:
    file = open(\"z\", \"wb\", 0)
    os.unlink(\"z\")
    kept.append(file)
    for _ in range(100): file.write(bytes(1 << 20))'",
        ),
    ),
    (
        "file locks",
        Bomb::Run(
            "wall_ms=20000",
            "RUN: python3 -ISc 'import fcntl, struct
kept = [open(str(n), \"w\") for n in range(1000)]
for file in kept:
    for at in range(2500, 0, -1):
        fcntl.fcntl(file, fcntl.F_SETLK, struct.pack(\"hhqqi4x\", fcntl.F_WRLCK, 0, at * 2, 1, 0))'",
        ),
    ),
    (
        "socket buffers",
        Bomb::Run(
            "wall_ms=20000",
            "RUN: python3 -ISc 'import socket, time
kept, server = [], socket.create_server((\"127.0.0.1\", 0), backlog=500)
for _ in range(500):
    one = socket.create_connection(server.getsockname())
    kept += [one, server.accept()[0]]
    one.setblocking(False)
    try:
        while True: one.send(bytes(1 << 16))
    except BlockingIOError: pass
time.sleep(600)'",
        ),
    ),
    ("strangers' slow bodies", Bomb::Stranger(Stranger::SlowBodies)),
    ("strangers' tiny chunks", Bomb::Stranger(Stranger::TinyChunks)),
    ("invented credentials", Bomb::Stranger(Stranger::InventedCredentials)),
    ("10,000 connections", Bomb::Stranger(Stranger::Connections)),
    ("of 256 addresses", Bomb::Stranger(Stranger::ConnectionsOfMany)),
    ("slow heads", Bomb::Stranger(Stranger::SlowHeads)),
    ("slow readers", Bomb::Stranger(Stranger::SlowReaders)),
    ("1.0, half-closed, trailers", Bomb::Stranger(Stranger::Oddities)),
];
/// A bomb that ends earlier is asked for again.
const BOMB_MIN: Duration = Duration::from_secs(15);
/// The CLI needs about this long before its tool begins.
const FUSE: Duration = Duration::from_millis(1500);
/// The time of a health check that is too long.
const HEALTH_MS_MAX: f64 = 100.0;
/// How much slower than in quiet a neighbour may be.
const RATIO_MAX: f64 = 2.0;

/// The neighbour of one bomb.
struct Row {
    name: &'static str,
    quiet: Vec<Duration>,
    beside: Vec<Duration>,
    health: Vec<Duration>,
}

impl Row {
    /// How much longer the slowest twentieth takes.
    fn p95_ratio(&self) -> f64 {
        at(&self.beside, 95) / at(&self.quiet, 95)
    }
}

/// Every bomb's.
pub struct Bombs(Vec<Row>);

/// Runs each bomb so many times.
///
/// # Errors
/// Whatever could not be started, or a neighbour who was answered wrongly.
pub fn beside(rounds: u32, cli: &Path) -> Result<Bombs, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("a folder: {error}"))?;
    let server = Server::start(folder.path(), cli, &[])?;
    let neighbour = Asked { tenant: "neighbour", limits: None, prompt: "ECHO: hello" };
    // The first request of a tenant also makes its folder.
    for _ in 0..2 {
        server.request(neighbour)?;
        server.request(Asked { tenant: "bomber", ..neighbour })?;
    }
    let row = |name| Row { name, quiet: Vec::new(), beside: Vec::new(), health: Vec::new() };
    let mut rows: Vec<Row> = BOMBS.iter().map(|bomb| row(bomb.0)).collect();
    for _ in 0..rounds {
        for ((_, bomb), row) in BOMBS.iter().zip(&mut rows) {
            let over = AtomicBool::new(false);
            thread::scope(|scope| -> Result<(), String> {
                let bomb = scope.spawn(|| {
                    let until = Instant::now() + BOMB_MIN;
                    let done = match bomb {
                        Bomb::Run(limits, prompt) => {
                            // How it ends is its limits' business, or the CLI's, which ends a command that says
                            // too much.
                            while Instant::now() < until {
                                let _ =
                                    server.request(Asked { tenant: "bomber", limits: Some(limits), prompt });
                            }
                            Ok(())
                        }
                        Bomb::Stranger(stranger) => stranger.at_work(server.address(), until),
                    };
                    over.store(true, Ordering::Relaxed);
                    done
                });
                thread::sleep(FUSE);
                let health = scope.spawn(|| -> Result<Vec<Duration>, String> {
                    let mut took = Vec::new();
                    while !over.load(Ordering::Relaxed) {
                        took.push(server.health()?);
                        thread::sleep(Duration::from_millis(20));
                    }
                    Ok(took)
                });
                while !over.load(Ordering::Relaxed) {
                    let (_, end) = server.request(neighbour)?;
                    if !over.load(Ordering::Relaxed) {
                        row.beside.push(end);
                    }
                }
                row.health.extend(health.join().map_err(|_| "a health check failed")??);
                bomb.join().map_err(|_| "a bomb did not come back".to_owned())?
            })?;
            // As many in quiet, right afterwards: the machine is the same.
            let settled = Instant::now() + Duration::from_millis(500);
            thread::sleep(settled.saturating_duration_since(Instant::now()));
            while row.quiet.len() < row.beside.len() {
                row.quiet.push(server.request(neighbour)?.1);
            }
        }
    }
    server.end()?;
    Ok(Bombs(rows))
}

impl Bombs {
    /// For programs; milliseconds.
    pub fn json(&self) -> Value {
        let rows = self.0.iter().map(|row| {
            json!({
                "bomb": row.name, "requests": row.beside.len(), "health_checks": row.health.len(),
                "quiet_p50_ms": at(&row.quiet, 50), "quiet_p95_ms": at(&row.quiet, 95),
                "beside_p50_ms": at(&row.beside, 50), "beside_p95_ms": at(&row.beside, 95),
                "p50_ratio": ratio(&row.beside, &row.quiet), "p95_ratio": row.p95_ratio(),
                "health_p50_ms": at(&row.health, 50), "health_max_ms": at(&row.health, 100),
            })
        });
        rows.collect()
    }
}

impl Display for Bombs {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "a neighbour's whole request while a bomb is at work, and in quiet; health checks meanwhile"
        )?;
        let heads =
            ["requests", "quiet p50", "p95", "beside p50", "p95", "ratio p50", "p95", "health p50", "max"];
        write!(f, "{:<26}", "ms")?;
        heads.iter().try_for_each(|head| write!(f, "{head:>11}"))?;
        writeln!(f)?;
        for row in &self.0 {
            let (ratio, health) = (ratio(&row.beside, &row.quiet), at(&row.health, 100));
            let held = ratio <= RATIO_MAX && row.p95_ratio() <= RATIO_MAX && health <= HEALTH_MS_MAX;
            writeln!(
                f,
                "{:<26}{:>11}{:>11.0}{:>11.0}{:>11.0}{:>11.0}{:>11.2}{:>11.2}{:>11.1}{:>11.1}{}",
                row.name,
                row.beside.len(),
                at(&row.quiet, 50),
                at(&row.quiet, 95),
                at(&row.beside, 50),
                at(&row.beside, 95),
                ratio,
                row.p95_ratio(),
                at(&row.health, 50),
                health,
                if held { "" } else { "  more than 2 times, or a health check of more than 100 ms" }
            )?;
        }
        Ok(())
    }
}
