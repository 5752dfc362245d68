//! The supervisor: everything privileged, and nothing else.
//! It must never interpret a byte that came from the network, from a tenant or from the CLI.

mod admit;
mod boot;
mod cage;
mod cgroup;
mod errand;
mod exporter;
mod family;
mod fault;
mod inside;
mod invocation;
mod layers;
mod level;
mod log;
mod monitor;
mod namespaces;
mod notify;
mod plan;
mod pool;
mod reload;
mod run;
mod spawn;
mod template;
mod tenants;
mod tiers;
mod uids;

use std::process::ExitCode;

use boot::Mode;

fn main() -> ExitCode {
    let mode = match std::env::args().nth(1).as_deref() {
        Some("serve") => Mode::Serve,
        Some("exec") => Mode::Exec,
        Some("doctor") => Mode::Doctor,
        _ => {
            eprintln!("gaoler-supervisor is started by gaoler: see gaoler --help");
            return ExitCode::from(2);
        }
    };
    // As started anew by itself, inside an ordinary user's namespace.
    let inside = std::env::args().nth(2).as_deref() == Some(inside::WORD);
    match boot::run(mode, inside) {
        Ok(status) => ExitCode::from(status),
        Err(fault) => {
            eprintln!("gaoler: cannot {fault}");
            ExitCode::from(1)
        }
    }
}
