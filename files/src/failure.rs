//! Why a question was not answered: a code for programs, and a sentence for people.
//! It must never show a path of the host: what it names is below the tenant's own folder.

use gaoler_files::{Code, Failure};
use nix::errno::Errno;

/// Why not.
#[derive(Debug)]
pub struct Failed(pub Failure);

/// A failure of this code.
pub fn failed(code: Code, message: impl Into<String>) -> Failed {
    Failed(Failure { code, message: message.into() })
}

/// Names what was being done when the system said no.
pub trait Doing<T> {
    /// As `what`; a full disk is said to be full.
    ///
    /// # Errors
    /// The same, as a failure.
    fn doing(self, what: &str) -> Result<T, Failed>;
}

impl<T, E: Into<std::io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: &str) -> Result<T, Failed> {
        self.map_err(|error| {
            let error = error.into();
            match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG) => {
                    failed(Code::Full, format!("could not {what}: there is no room; remove something first."))
                }
                Some(errno) => failed(Code::Internal, format!("could not {what}: {errno}.")),
                // What a reader of frames or of an archive says.
                None => match error.get_ref().and_then(|inner| inner.downcast_ref::<Told>()) {
                    Some(Told(code, message)) => failed(*code, message.clone()),
                    None => failed(Code::Broken, format!("could not {what}: {error}.")),
                },
            }
        })
    }
}

/// A failure on its way through an interface that knows errors of the system alone.
#[derive(Debug)]
pub struct Told(pub Code, pub String);

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.1)
    }
}

impl std::error::Error for Told {}

impl Told {
    /// It as such an error.
    pub fn io(code: Code, message: impl Into<String>) -> std::io::Error {
        std::io::Error::other(Told(code, message.into()))
    }
}
