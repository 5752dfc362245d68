//! TLS of the listener: one certificate and its key, read before there are tenants, HTTP/1.1 and nothing else.
//! It must never show a byte of the key, nor serve with a certificate that the key does not belong to.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{Error, InconsistentKeys, ServerConfig};
use tokio_rustls::TlsAcceptor;
use zeroize::Zeroize;

/// Bytes of the certificates and the key together, at most: a long chain has some 10 KiB.
pub const PEM_BYTES_MAX: usize = 256 * 1024;
/// How long a client may take for a handshake. A connection costs a permit meanwhile.
pub const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);

/// What is wrong, and with which of the two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wrong {
    /// The certificate.
    Certificate(String),
    /// The key.
    Key(String),
}

/// What accepts connections with the certificates and the key of these PEM texts.
///
/// # Errors
/// A text without what it must hold, or two that do not belong together.
pub fn acceptor(certificate: &[u8], key: &[u8]) -> Result<TlsAcceptor, Wrong> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(certificate)
        .collect::<Result<_, _>>()
        .map_err(|error| Wrong::Certificate(format!("is not PEM: {error}")))?;
    if chain.is_empty() {
        return Err(Wrong::Certificate("holds no certificate (-----BEGIN CERTIFICATE-----)".into()));
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| {
        Wrong::Key("holds no private key (-----BEGIN PRIVATE KEY-----) without a passphrase".into())
    })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Wrong::Certificate(error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key);
    let mut config = config.map_err(|error| match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            Wrong::Key("does not belong to the first certificate; renew both from one place".into())
        }
        Error::InvalidCertificate(_) => {
            Wrong::Certificate("begins with a certificate that cannot be read".into())
        }
        // Whatever rustls says of a key is about its form, and shows none of it.
        other => Wrong::Key(format!("cannot be used: {other}")),
    })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The same, from both texts behind each other, as the supervisor hands them over. They are overwritten.
///
/// # Errors
/// As [`acceptor`].
pub fn from_both(mut both: Vec<u8>) -> Result<TlsAcceptor, Wrong> {
    let made = acceptor(&both, &both);
    both.zeroize();
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("a certificate");
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    fn wrong(certificate: &str, key: &str) -> Wrong {
        acceptor(certificate.as_bytes(), key.as_bytes()).err().expect("refused")
    }

    #[test]
    fn t01_a_pair_is_taken_and_anything_else_says_which_of_both_is_wrong() {
        let ((certificate, key), (other, _)) = (pair(), pair());
        let taken = acceptor(certificate.as_bytes(), key.as_bytes()).expect("a pair");
        assert_eq!(taken.config().alpn_protocols, [b"http/1.1".to_vec()]);
        assert!(from_both(format!("{certificate}{key}").into_bytes()).is_ok());
        assert!(matches!(wrong(&other, &key), Wrong::Key(text) if text.contains("does not belong")));
        assert!(
            matches!(wrong(&key, &key), Wrong::Certificate(text) if text.contains("holds no certificate"))
        );
        assert!(
            matches!(wrong(&certificate, &certificate), Wrong::Key(text) if text.contains("holds no private key"))
        );
        assert!(matches!(wrong("", &key), Wrong::Certificate(_)));
        let broken = certificate.replacen('M', "!", 1);
        assert!(matches!(wrong(&broken, &key), Wrong::Certificate(text) if text.starts_with("is not PEM")));
        let rubbish = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(wrong(rubbish, &key), Wrong::Certificate(_)));
        let rubbish = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        assert!(matches!(wrong(&certificate, rubbish), Wrong::Key(text) if !text.contains("AAAA")));
    }
}
