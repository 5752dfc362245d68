//! Tells the service manager when tenants may come and when they no longer may (sd_notify(3)'s protocol).
//! It must never wait for it, nor fail because of it: a manager that does not listen is nobody's guarantee.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The variable that names the service manager's ear.
pub const VARIABLE: &str = "NOTIFY_SOCKET";

/// The service manager's ear, where there is one.
#[derive(Debug, Default)]
pub struct Notify {
    socket: Option<UnixDatagram>,
}

impl Notify {
    /// Connects to what the variable names: a path, or `@` and a name without one. To be called while the
    /// host's root is still there; no child is given the variable, since each gets an environment of its own.
    pub fn open() -> Notify {
        let socket = std::env::var_os(VARIABLE).and_then(|name| {
            let address = match name.as_bytes() {
                [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
                _ => SocketAddr::from_pathname(&name),
            };
            let socket = UnixDatagram::unbound().ok()?;
            socket.set_nonblocking(true).ok()?;
            socket.connect_addr(&address.ok()?).ok()?;
            Some(socket)
        });
        Notify { socket }
    }

    /// Tenants may come.
    pub fn ready(&self) {
        self.say("READY=1\nSTATUS=serving");
    }

    /// What runs may finish, and nothing new begins.
    pub fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=draining");
    }

    fn say(&self, text: &str) {
        if let Some(socket) = &self.socket {
            let _ = socket.send(text.as_bytes());
        }
    }
}
