//! How a stored credential, and what opens a session's MCP servers, is sealed: HPKE (RFC 9180) to the key pair of this
//! installation, for one tenant; and how the frontend locks what it alone may read again.
//! Whoever has only the public key must never be able to open what it has sealed, nor anybody for another tenant.

#![forbid(unsafe_code)]

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable, single_shot_open, single_shot_seal};
use zeroize::Zeroizing;

/// Bytes of either key.
pub const KEY_BYTES: usize = 32;
/// Bytes that a seal adds: the encapsulated key and the tag.
pub const SEAL_BYTES: usize = 32 + 16;
/// The first byte of a run's credential file that holds a sealed one; a token's own begins with its scheme.
pub const SEALED: u8 = 0x80;
/// What sets each use of the key pair apart from the other.
const CREDENTIAL: &[u8] = b"gaoler/credential/v1";
const SERVERS: &[u8] = b"gaoler/servers/v1";
/// Bytes that a lock adds: the nonce and the tag.
pub const LOCK_BYTES: usize = NONCE_BYTES + 16;
const NONCE_BYTES: usize = 24;

/// The private key: each egress has it, for as long as it has not opened its credential.
pub struct Vault(Zeroizing<[u8; KEY_BYTES]>);

impl Vault {
    /// A fresh one.
    ///
    /// # Panics
    /// Where the kernel has no randomness.
    #[must_use]
    pub fn draw() -> Vault {
        let (private, _) = X25519HkdfSha256::gen_keypair();
        Vault(Zeroizing::new(private.to_bytes().into()))
    }

    /// The one of these bytes, which its owner has kept.
    #[must_use]
    pub fn of(bytes: [u8; KEY_BYTES]) -> Vault {
        Vault(Zeroizing::new(bytes))
    }

    /// Its bytes, to be kept.
    #[must_use]
    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// The key to seal with. `None` for bytes that are no key.
    #[must_use]
    pub fn public(&self) -> Option<[u8; KEY_BYTES]> {
        let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(self.0.as_slice()).ok()?;
        Some(X25519HkdfSha256::sk_to_pk(&private).to_bytes().into())
    }

    /// The credential that was sealed for this tenant. `None` where it was sealed for another, with another key, or
    /// changed since.
    #[must_use]
    pub fn open(&self, tenant: &[u8; 16], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.opened(CREDENTIAL, tenant, sealed)
    }

    /// The same of what [`seal_servers`] has sealed.
    #[must_use]
    pub fn open_servers(&self, tenant: &[u8; 16], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.opened(SERVERS, tenant, sealed)
    }

    fn opened(&self, info: &[u8], tenant: &[u8; 16], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (key, text) = sealed.split_at_checked(KEY_BYTES)?;
        let key = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(key).ok()?;
        let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(self.0.as_slice()).ok()?;
        single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &private,
            &key,
            info,
            text,
            tenant,
        )
        .ok()
        .map(Zeroizing::new)
    }
}

/// In the place of a tenant, for tokens of the operator's catalogue. What is sealed for it begins with the one place that
/// the token is for, `SCHEME://HOST:PORT` and a line's end.
pub const OFFERED: [u8; 16] = *b"operator:catalog";

/// Seals a credential for a tenant. `None` for a public key that is none.
#[must_use]
pub fn seal(public: &[u8; KEY_BYTES], tenant: &[u8; 16], credential: &[u8]) -> Option<Vec<u8>> {
    sealed(CREDENTIAL, public, tenant, credential)
}

/// Seals what opens an MCP server of a tenant's session. It begins with the one place that it is for, as a token of the
/// operator's catalogue does. `None` for a public key that is none.
#[must_use]
pub fn seal_servers(public: &[u8; KEY_BYTES], tenant: &[u8; 16], text: &[u8]) -> Option<Vec<u8>> {
    sealed(SERVERS, public, tenant, text)
}

fn sealed(info: &[u8], public: &[u8; KEY_BYTES], tenant: &[u8; 16], text: &[u8]) -> Option<Vec<u8>> {
    let public = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(public).ok()?;
    let (key, text) = single_shot_seal::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
        &OpModeS::Base,
        &public,
        info,
        text,
        tenant,
    )
    .ok()?;
    Some([key.to_bytes().as_slice(), &text].concat())
}

/// A key of whoever keeps something elsewhere and reads it again itself.
pub struct Lock(Zeroizing<[u8; KEY_BYTES]>);

impl Lock {
    /// The one of this key.
    #[must_use]
    pub fn of(key: [u8; KEY_BYTES]) -> Lock {
        Lock(Zeroizing::new(key))
    }

    /// Locks a text, which opens for the same owner alone. `None` for a text that is longer than the cipher takes, and
    /// where the kernel has no randomness.
    #[must_use]
    pub fn lock(&self, owner: &[u8], text: &[u8]) -> Option<Vec<u8>> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).ok()?;
        let locked = self.cipher().encrypt(&XNonce::from(nonce), Payload { msg: text, aad: owner }).ok()?;
        Some([nonce.as_slice(), &locked].concat())
    }

    /// What was locked for this owner. `None` where it was locked for another, with another key, or changed since.
    #[must_use]
    pub fn open(&self, owner: &[u8], locked: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (nonce, text) = locked.split_first_chunk::<NONCE_BYTES>()?;
        let opened = self.cipher().decrypt(&XNonce::from(*nonce), Payload { msg: text, aad: owner });
        opened.ok().map(Zeroizing::new)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(&(*self.0).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_opens_for_its_tenant_with_its_key_and_for_nobody_else() {
        let (vault, other) = (Vault::draw(), Vault::draw());
        let public = vault.public().expect("a key");
        let sealed = seal(&public, &[1; 16], b"\x01sk-ant-oat01-a-token").expect("sealed");
        assert_eq!(sealed.len(), 21 + SEAL_BYTES);
        assert!(!sealed.windows(6).any(|part| part == b"sk-ant"));
        let again = Vault::of(*vault.bytes());
        assert_eq!(again.open(&[1; 16], &sealed).expect("opened").as_slice(), b"\x01sk-ant-oat01-a-token");
        assert!(vault.open(&[2; 16], &sealed).is_none(), "another tenant's");
        assert!(other.open(&[1; 16], &sealed).is_none(), "another key");
        assert!(Vault::of(public).open(&[1; 16], &sealed).is_none(), "the public key");
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(vault.open(&[1; 16], &changed).is_none(), "byte {at} changed");
        }
        for length in 0..sealed.len() {
            assert!(vault.open(&[1; 16], &sealed[..length]).is_none(), "cut to {length}");
        }
        assert_ne!(sealed, seal(&public, &[1; 16], b"\x01sk-ant-oat01-a-token").expect("sealed"));
    }

    #[test]
    fn what_opens_a_server_is_no_credential_and_the_other_way_round() {
        let vault = Vault::draw();
        let public = vault.public().expect("a key");
        let text = b"https://a.example:443\n[]";
        let sealed = seal_servers(&public, &[1; 16], text).expect("sealed");
        assert_eq!(vault.open_servers(&[1; 16], &sealed).expect("opened").as_slice(), text);
        assert!(vault.open_servers(&[2; 16], &sealed).is_none(), "another tenant's");
        assert!(vault.open(&[1; 16], &sealed).is_none(), "as a credential");
        assert!(vault.open(&OFFERED, &sealed).is_none(), "as the operator's");
        let credential = seal(&public, &[1; 16], text).expect("sealed");
        assert!(vault.open_servers(&[1; 16], &credential).is_none(), "a credential as a server's");
    }

    #[test]
    fn a_lock_opens_for_its_owner_with_its_key_and_never_the_same_twice() {
        let lock = Lock::of([7; 32]);
        let locked = lock.lock(b"owner", b"a secret text").expect("locked");
        assert_eq!(locked.len(), 13 + LOCK_BYTES);
        assert!(!locked.windows(6).any(|part| part == b"secret"));
        assert_eq!(lock.open(b"owner", &locked).expect("opened").as_slice(), b"a secret text");
        assert!(lock.open(b"other", &locked).is_none(), "another owner's");
        assert!(Lock::of([8; 32]).open(b"owner", &locked).is_none(), "another key");
        for at in 0..locked.len() {
            let mut changed = locked.clone();
            changed[at] ^= 1;
            assert!(lock.open(b"owner", &changed).is_none(), "byte {at} changed");
            assert!(lock.open(b"owner", &locked[..at]).is_none(), "cut to {at}");
        }
        assert_ne!(locked, lock.lock(b"owner", b"a secret text").expect("locked"));
    }
}
