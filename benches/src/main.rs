//! `make bench`: what a cage costs, as ratios taken in one run, contenders interleaved in random order.
//! It must never compare figures of different runs, nor leave a server or a folder behind.

#![forbid(unsafe_code)]

mod bombs;
mod http;
mod launch;
mod request;
mod strangers;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serde_json::json;

/// Measures the launch of a cage, a whole request, and a request beside a bomb. Needs root, bubblewrap, and an otherwise idle machine.
#[derive(Parser)]
struct Flags {
    /// Launches of each contender, back to back, and again with 30 ms gaps
    #[arg(long, default_value_t = 200)]
    launches: u32,
    /// Whole requests of each contender; 0 = none
    #[arg(long, default_value_t = 20)]
    requests: u32,
    /// Times that each bomb runs beside a neighbour; 0 = none
    #[arg(long, default_value_t = 2)]
    bombs: u32,
    /// Half-second slices of requests that start no run, beside plain hyper; 0 = none
    #[arg(long, default_value_t = 9)]
    slices: u32,
    /// Idle streams that are held at the same time, over runs of the CLI's double; 0 = none
    #[arg(long, default_value_t = 0)]
    streams: usize,
    /// An earlier build's programs: its server takes part in the whole requests
    #[arg(long, value_name = "FOLDER")]
    before: Option<PathBuf>,
    /// The CLI's double
    #[arg(long, default_value = "tests/double/claude")]
    double: PathBuf,
    /// The peer's own process: serve this body
    #[arg(long, hide = true)]
    peer: Option<String>,
    /// The Claude Code CLI
    #[arg(long)]
    cli: PathBuf,
    /// One JSON object instead of tables
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let mut asked = Flags::parse();
    let done = match asked.peer.take() {
        Some(body) => http::peer(body),
        None => measure(&asked),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("bench: {why}");
            ExitCode::FAILURE
        }
    }
}

fn measure(asked: &Flags) -> Result<(), String> {
    // Strangers hold ten thousand connections.
    gaoler_sys::process::raise_open_files().map_err(|error| format!("open files: {error}"))?;
    let mut tables = Vec::new();
    if asked.launches > 0 {
        tables.push(launch::back_to_back(asked.launches)?);
        tables.push(launch::with_gaps(asked.launches)?);
    }
    let mut memory = None;
    if asked.requests > 0 {
        let (requests, rss_kib) = request::whole(asked.requests, &asked.cli, asked.before.as_deref())?;
        tables.extend(requests);
        memory = Some(rss_kib);
    }
    let bombs = (asked.bombs > 0).then(|| bombs::beside(asked.bombs, &asked.cli)).transpose()?;
    let http = http::http(asked.slices, asked.streams, &asked.cli, &asked.double)?;
    let machine = machine();
    if asked.json {
        let tables: Vec<_> = tables.iter().map(table::Table::json).collect();
        let bombs = bombs.as_ref().map(bombs::Bombs::json);
        let all = json!({ "machine": machine, "tables": tables, "supervisor_rss_kib": memory, "bombs": bombs, "http": http.json() });
        println!("{all:#}");
        return Ok(());
    }
    println!("{machine}");
    tables.iter().for_each(|table| println!("\n{table}"));
    if let Some(rss_kib) = memory {
        println!("\nsupervisor, resident after these requests: {rss_kib} KiB");
    }
    if let Some(bombs) = bombs {
        println!("\n{bombs}");
    }
    println!("\n{http}");
    Ok(())
}

/// The machine that the figures belong to.
fn machine() -> String {
    let line = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
        line.split_once(':').map_or(line.clone(), |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = line("/proc/meminfo", "MemTotal");
    format!(
        "{}, {cores} cores, {memory}, Linux {}",
        line("/proc/cpuinfo", "model name"),
        line("/proc/sys/kernel/osrelease", "")
    )
}
