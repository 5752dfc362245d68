//! `gaoler-ledger`: what gaoler remembers, in one SQLite database. Supervised it finds its control socket at descriptor
//! 3 and the frontend's questions at 4; for the command line it answers one question, or writes a copy.
//! It must never reach anything but its one folder, nor hold what opens a stored credential.

#![forbid(unsafe_code)]

mod alone;
mod book;
mod rights;
mod schema;
mod serve;
mod time;

use std::io::Write;
use std::process::ExitCode;

use crate::book::Keep;

const USAGE: &str = "usage: gaoler-ledger --runs-days N --usage-days N
       gaoler-ledger --folder DIR --uid N (ask | backup)
The first is the supervisor's, with a control socket at descriptor 3 and a socket of questions at 4; the second the
command line's: `ask` reads one question from stdin and prints its answer, `backup` writes a copy to stdout.";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u32>().ok().filter(|n| *n > 0);
    let result = match words.as_slice() {
        ["--runs-days", runs, "--usage-days", usage] => match (number(runs), number(usage)) {
            (Some(runs_days), Some(usage_days)) => serve::supervised(Keep { runs_days, usage_days }),
            _ => return usage_error(),
        },
        ["--folder", folder, "--uid", uid, word @ ("ask" | "backup")] => match uid.parse() {
            Ok(uid) if *word == "ask" => alone::ask(folder, uid),
            Ok(uid) => alone::backup(folder, uid),
            Err(_) => return usage_error(),
        },
        _ => return usage_error(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let line = serde_json::json!({ "process": "ledger", "event": "failed", "error": why });
            // In one piece: others write to the same place.
            let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn usage_error() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(64)
}
