//! What went wrong: the operation and the errno, said once.
//! It must never hold a byte of a tenant.

use std::fmt::{Display, Formatter};
use std::io::Error;

/// An operation that failed.
#[derive(Debug)]
pub struct Fault {
    doing: String,
    /// The kernel's word.
    pub error: Error,
}

impl Fault {
    /// A fault of our own making, with no errno of the kernel's.
    pub fn new(doing: impl Into<String>, why: impl Into<String>) -> Fault {
        Fault { doing: doing.into(), error: Error::other(why.into()) }
    }

    /// The errno, 0 where the kernel gave none.
    pub fn errno(&self) -> u16 {
        self.error.raw_os_error().and_then(|n| u16::try_from(n).ok()).unwrap_or(0)
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.doing, self.error)
    }
}

/// Names the operation whose error this is.
pub trait Doing<T> {
    /// The same result, its error named.
    ///
    /// # Errors
    /// The error that it had.
    fn doing(self, what: impl Into<String>) -> Result<T, Fault>;
}

impl<T, E: Into<Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl Into<String>) -> Result<T, Fault> {
        self.map_err(|error| Fault { doing: what.into(), error: error.into() })
    }
}
