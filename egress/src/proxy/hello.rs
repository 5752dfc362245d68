//! The first words of a tunnel: which name its TLS asks for, before anything is forwarded.
//! It must never parse TLS itself: rustls does, as it does for servers.

use std::io::{Error, ErrorKind, Result};

use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::host::Host;

/// Bytes of a ClientHello; those with post-quantum keys have about two thousand.
const HELLO_BYTES_MAX: usize = 32 * 1024;
/// A fatal alert, unrecognized_name (RFC 8446, 6): what a server says to a name that is not its own.
pub const ALERT: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 112];

/// What a client began with.
pub struct Hello {
    /// The server name that it asks for, if it does.
    pub name: Option<String>,
    /// All that was read so far, which is to be forwarded.
    pub bytes: Vec<u8>,
}

impl Hello {
    /// Reads one. `None` where the client closes before it has said anything.
    ///
    /// # Errors
    /// What is not TLS, is too long, or ends too early.
    pub async fn read(cage: &mut (impl AsyncRead + Unpin)) -> Result<Option<Hello>> {
        let mut acceptor = Acceptor::default();
        let mut bytes = Vec::new();
        while bytes.len() < HELLO_BYTES_MAX {
            let mut buffer = [0; 4096];
            let length = cage.read(&mut buffer).await?;
            if length == 0 && bytes.is_empty() {
                return Ok(None);
            }
            if length == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            bytes.extend_from_slice(&buffer[..length]);
            let mut piece = &buffer[..length];
            while !piece.is_empty() {
                if acceptor.read_tls(&mut piece)? == 0 {
                    return Err(Error::other("a record that is too long"));
                }
                if let Some(accepted) = acceptor.accept().map_err(|(error, _)| Error::other(error))? {
                    let name = accepted.client_hello().server_name().map(str::to_owned);
                    return Ok(Some(Hello { name, bytes }));
                }
            }
        }
        Err(Error::other("a hello that is too long"))
    }

    /// Whether it asks for this host: for an address TLS has no name to ask for.
    pub fn is_for(&self, host: &Host) -> bool {
        match (host, &self.name) {
            (Host::Name(host), Some(name)) => name.eq_ignore_ascii_case(host),
            (Host::Address(_), None) => true,
            (Host::Name(_), None) | (Host::Address(_), Some(_)) => false,
        }
    }
}
