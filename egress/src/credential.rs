//! The tenant's credential.
//! It must never be printed, logged or put into an error, nor be given to the proxy; it is zeroed when it is dropped.

use std::os::fd::OwnedFd;

use gaoler_protocol::{CREDENTIAL_BYTES_MAX, Scheme};
use gaoler_seal::{SEALED, Vault};
use gaoler_sys::memfd;
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HeaderValue};
use zeroize::Zeroizing;

use crate::placeholder::X_API_KEY;
use crate::scan::SECRET_BYTES_MIN;

/// The real credential.
pub struct Credential {
    scheme: Scheme,
    token: Zeroizing<Vec<u8>>,
}

impl Credential {
    /// Reads it from its sealed memory file, and opens it where it is a stored one of this tenant. `None` where that
    /// is not one, or holds anything but a scheme and visible ASCII.
    pub fn read(fd: OwnedFd, vault: Option<&Vault>, tenant: &[u8; 16]) -> Option<Credential> {
        let mut bytes = Zeroizing::new(memfd::read(fd, CREDENTIAL_BYTES_MAX).ok()?);
        if let [SEALED, sealed @ ..] = bytes.as_slice() {
            bytes = vault?.open(tenant, sealed)?;
        }
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
