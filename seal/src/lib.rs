//! How a stored credential is sealed: HPKE (RFC 9180) to the key pair of this installation, for one tenant.
//! Whoever has only the public key must never be able to open what it has sealed, nor anybody for another tenant.

#![forbid(unsafe_code)]

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
/// What sets this use of the key pair apart from any other.
const INFO: &[u8] = b"gaoler/credential/v1";

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

    /// What was sealed for this tenant. `None` where it was sealed for another, with another key, or changed since.
    #[must_use]
    pub fn open(&self, tenant: &[u8; 16], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (key, text) = sealed.split_at_checked(KEY_BYTES)?;
        let key = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(key).ok()?;
        let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(self.0.as_slice()).ok()?;
        single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &private,
            &key,
            INFO,
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
    let public = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(public).ok()?;
    let (key, text) = single_shot_seal::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
        &OpModeS::Base,
        &public,
        INFO,
        credential,
        tenant,
    )
    .ok()?;
    Some([key.to_bytes().as_slice(), &text].concat())
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
}
