//! The tenant's credential and the placeholder that stands for it in the cage.
//! Neither may ever be printed, logged or put into an error; both are zeroed when they are dropped.

use std::os::fd::OwnedFd;

use gaoler_protocol::{CREDENTIAL_BYTES_MAX, Placeholder, Scheme};
use gaoler_sys::memfd;
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HeaderName, HeaderValue};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// `x-api-key`.
pub const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// A token shorter than this cannot be told from ordinary text, and is no secret: answers are not searched
/// for it.
const SECRET_BYTES_MIN: usize = 16;

/// The real credential.
pub struct Credential {
    scheme: Scheme,
    token: Zeroizing<Vec<u8>>,
}

impl Credential {
    /// Reads it from its sealed memory file. `None` where that is not one, or holds anything but a scheme
    /// and visible ASCII.
    pub fn read(fd: OwnedFd) -> Option<Credential> {
        let bytes = Zeroizing::new(memfd::read(fd, CREDENTIAL_BYTES_MAX).ok()?);
        let (scheme, token) = bytes.split_first()?;
        let scheme = Scheme::from_number(*scheme).ok()?;
        let visible = !token.is_empty() && token.iter().all(u8::is_ascii_graphic);
        visible.then(|| Credential { scheme, token: Zeroizing::new(token.to_vec()) })
    }

    /// What it is, and so which header it goes into.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Puts it into a request's headers.
    pub fn insert(&self, headers: &mut HeaderMap) {
        let (name, text) = match self.scheme {
            Scheme::OAuth => (AUTHORIZATION, Zeroizing::new([b"Bearer ", self.token.as_slice()].concat())),
            Scheme::ApiKey => (X_API_KEY, self.token.clone()),
        };
        // The bytes were checked to be visible ASCII when they were read.
        if let Ok(mut value) = HeaderValue::from_bytes(&text) {
            value.set_sensitive(true);
            headers.insert(name, value);
        }
    }

    /// The bytes that no answer may contain; `None` for a token that is no secret.
    pub fn needle(&self) -> Option<Zeroizing<Vec<u8>>> {
        (self.token.len() >= SECRET_BYTES_MIN).then(|| self.token.clone())
    }
}

/// The placeholder, as the CLI sends it.
pub struct Expected(Zeroizing<Vec<u8>>);

impl Expected {
    /// The token text of a placeholder.
    pub fn new(placeholder: &Placeholder) -> Expected {
        Expected(Zeroizing::new(placeholder.token().into_bytes()))
    }

    /// Whether a request carries it, as a bearer token or as a key. The time taken tells nothing about where
    /// a wrong one differs.
    pub fn is_in(&self, headers: &HeaderMap) -> bool {
        let bearer = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let key = headers.get(X_API_KEY).map(HeaderValue::as_bytes);
        [bearer, key].into_iter().flatten().any(|shown| bool::from(shown.ct_eq(&self.0)))
    }
}
