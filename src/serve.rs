//! `gaoler serve`: looks at everything that can be looked at without privilege, then becomes the supervisor.
//! It must never start a server that a later step would refuse for a reason that is already visible.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use gaoler_policy::settings::Settings;

use crate::supervisor;

/// Becomes the server.
///
/// # Errors
/// What stands in the way, as a sentence that says what to do.
pub fn serve(settings: &Settings) -> Result<Infallible, String> {
    cli(&settings.cli.path)?;
    port(&settings.server.listen)?;
    supervisor::become_server(settings)
}

fn cli(path: &Path) -> Result<(), String> {
    let place = path.display();
    let fetch = "fetch the pinned one with scripts/fetch-cli and name it with --cli";
    let meta = std::fs::metadata(path).map_err(|error| format!("the CLI {place}: {error}; {fetch}"))?;
    match meta.is_file() && meta.permissions().mode() & 0o111 != 0 {
        true => Ok(()),
        false => Err(format!("the CLI {place} is not an executable file; {fetch}")),
    }
}

/// The supervisor binds for itself; this only turns a port that is taken into a plain sentence.
fn port(listen: &str) -> Result<(), String> {
    let address: SocketAddr = listen.parse().map_err(|error| format!("{listen}: {error}"))?;
    match TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Err(format!("{address} is taken by another process; choose another address with --listen"))
        }
        Err(error) => Err(format!("cannot listen on {address}: {error}; choose another with --listen")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let missing = cli(Path::new("/nowhere/claude")).expect_err("missing");
        assert!(missing.starts_with("the CLI /nowhere/claude: No such file"), "{missing}");
        let plain = cli(Path::new("/etc/passwd")).expect_err("no program");
        assert!(plain.starts_with("the CLI /etc/passwd is not an executable file"), "{plain}");
        let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
        let taken = holder.local_addr().expect("bound").to_string();
        let sentence = format!("{taken} is taken by another process; choose another address with --listen");
        assert_eq!(port(&taken), Err(sentence));
        assert_eq!(port("127.0.0.1:0"), Ok(()));
    }
}
