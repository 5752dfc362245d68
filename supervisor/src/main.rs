//! The supervisor: everything privileged, and nothing else.
//! It must never interpret a byte that came from the network, from a tenant or from the CLI.

mod admit;
mod boot;
mod cage;
mod cgroup;
mod fault;
mod invocation;
mod layers;
mod log;
mod monitor;
mod namespaces;
mod notify;
mod pool;
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
    match boot::run(mode) {
        Ok(status) => ExitCode::from(status),
        Err(fault) => {
            eprintln!("gaoler: cannot {fault}");
            ExitCode::from(1)
        }
    }
}
