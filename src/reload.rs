//! A reload as the command line does it: the settings resolved once more, as `gaoler serve` was called, and told to the
//! frontend. It must never change anything, nor hear a word: whoever listens is unprivileged, and this is root.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gaoler_policy::settings::Settings;
use gaoler_sys::{channel, memfd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::config::PREFIX;
use crate::{command, serve};

/// The descriptor on which a reload finds how the server was called.
const ORIGIN_FD: i32 = channel::CONTROL_FD + 1;
/// Bytes of that, at most: arguments and an environment.
const ORIGIN_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes told at once: less than a socket's buffer holds.
const PART_BYTES: usize = 16 * 1024;
/// Bytes told altogether, at most: settings, and a certificate with its key.
pub const TOLD_BYTES_MAX: usize = 1024 * 1024;

/// How a server was called, and where its state lies.
#[derive(Debug, Serialize, Deserialize)]
pub struct Origin {
    arguments: Vec<OsString>,
    directory: OsString,
    environment: Vec<(String, String)>,
    state: OsString,
}

/// What a reload has found. There is a key in it, so nothing prints it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// Settings that can be honoured.
    Found {
        /// As TOML, with the catalogue's tokens sealed.
        settings: String,
        /// The listener's certificate and key in base64, empty without TLS.
        tls: Zeroizing<String>,
    },
    /// Why there are none.
    Wrong(String),
}

impl Origin {
    /// This command line, in a sealed memory file for a reload to come.
    ///
    /// # Errors
    /// Those of memfd_create(2), as a sentence.
    pub fn sealed(arguments: &[OsString], settings: &Settings) -> Result<OwnedFd, String> {
        let origin = Origin {
            arguments: arguments.to_vec(),
            directory: std::env::current_dir().map(Into::into).unwrap_or_default(),
            environment: command::environment().filter(|(name, _)| name.starts_with(PREFIX)).collect(),
            state: settings.state.dir.clone().into(),
        };
        let text = serde_json::to_vec(&origin).map_err(|error| format!("the own arguments: {error}"))?;
        memfd::sealed("origin", &text).map_err(|error| format!("memfd_create: {error}"))
    }

    fn found(&self) -> Result<Told, String> {
        std::env::set_current_dir(&self.directory)
            .map_err(|error| format!("{}: {error}", Path::new(&self.directory).display()))?;
        let environment = self.environment.iter().cloned();
        let settings = command::settings_of_server(&self.arguments, environment)?;
        // The running server's keys open what is sealed here, wherever its next start will look for them.
        let found = serve::found(&settings, Path::new(&self.state))?;
        Ok(Told::Found {
            settings: toml::to_string(&found.settings).map_err(|error| format!("settings: {error}"))?,
            tls: STANDARD.encode(&*found.tls).into(),
        })
    }
}

/// The hidden subcommand: takes descriptors 3 (where to tell) and 4 (how the server was called); the status to exit with.
pub fn resolve() -> u8 {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let (control, origin) = (channel::inherited_control(), channel::take_inherited(ORIGIN_FD, &TAKEN));
    let (Some(control), Some(origin)) = (control, origin) else {
        eprintln!("gaoler: resolve is started by gaoler-supervisor alone");
        return 1;
    };
    let origin = memfd::read(origin, ORIGIN_BYTES_MAX).ok();
    let origin = origin.and_then(|text| serde_json::from_slice::<Origin>(&text).ok());
    let found = match origin {
        Some(origin) => origin.found(),
        None => Err("this server does not know how it was called".to_owned()),
    };
    let told = found.unwrap_or_else(Told::Wrong);
    let text = serde_json::to_vec(&told).map(Zeroizing::new);
    u8::from(text.is_err() || text.is_ok_and(|text| tell(&control, &text).is_err()))
}

fn tell(to: &OwnedFd, text: &[u8]) -> std::io::Result<()> {
    for part in text.chunks(PART_BYTES) {
        loop {
            match channel::send(to.as_fd(), part, &[]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    poll(&mut [PollFd::new(to.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?;
                }
                sent => break sent?,
            }
        }
    }
    // The reader ends first: then nothing depends on what a host keeps of a sender that is gone.
    shutdown(to.as_raw_fd(), Shutdown::Write)?;
    while poll(&mut [PollFd::new(to.as_fd(), PollFlags::empty())], PollTimeout::NONE)? == 0 {}
    Ok(())
}
