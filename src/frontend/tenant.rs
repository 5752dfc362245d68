//! Who asks: the credential of a request, and the tenant's key that follows from it.
//! A token must never be stored, shown, compared in the open, or outlive the request that carried it.

use hmac::{Hmac, KeyInit, Mac};
use http::HeaderMap;
use http::header::{self, HeaderName};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use gaoler_ledger_wire::Hex;
use gaoler_protocol::{Scheme, TenantKey};
use gaoler_seal::Lock;

use super::error::ApiError;
use super::job::BodyCredential;

/// Characters of a token after `sk-ant-`, at least. Real ones have about 100; tests have short ones.
const TOKEN_BYTES_MIN: usize = 8;
/// And at most: five times what is seen, far below what a header may hold.
const TOKEN_BYTES_MAX: usize = 512;
/// Where the API's own clients show a key.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// What sets this use of the server's secret apart from any other.
const KEY_PREFIX: &[u8] = b"gaoler/tenant/v1/token\0";
const KEYED_PREFIX: &[u8] = b"gaoler/tenant/v1/key\0";
const LINK_PREFIX: &[u8] = b"gaoler/link/v1\0";
const SERVERS_PREFIX: &[u8] = b"gaoler/servers/v1\0";

/// The server's secret, 32 random bytes. Never shown.
#[derive(Clone)]
pub struct Secret(Zeroizing<[u8; 32]>);

impl Secret {
    /// This secret.
    pub fn new(bytes: [u8; 32]) -> Secret {
        Secret(Zeroizing::new(bytes))
    }

    fn mac(&self, prefix: &[u8], text: &[u8]) -> [u8; 32] {
        // HMAC takes a key of any length, so this cannot fail.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(self.0.as_slice()) else { std::process::abort() };
        mac.update(prefix);
        mac.update(text);
        mac.finalize().into_bytes().into()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A token of a known form. Zeroed when dropped.
pub struct Credential {
    scheme: Scheme,
    token: Zeroizing<String>,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credential({})", self.scheme)
    }
}

impl Credential {
    /// A token: `sk-ant-oat…` or `sk-ant-api…`, then letters, digits, `_` and `-`.
    ///
    /// # Errors
    /// 401 for anything else, without repeating it.
    pub fn parse(token: &str) -> Result<Credential, ApiError> {
        let scheme = Credential::scheme_of(token)?;
        Ok(Credential { scheme, token: Zeroizing::new(token.to_string()) })
    }

    /// What a text is that has a token's form.
    ///
    /// # Errors
    /// As [`Credential::parse`].
    pub fn scheme_of(token: &str) -> Result<Scheme, ApiError> {
        let rest = token.strip_prefix("sk-ant-").unwrap_or_default();
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        let fits = (TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&rest.len()) && rest.bytes().all(plain);
        match rest {
            rest if fits && rest.starts_with("oat") => Ok(Scheme::OAuth),
            rest if fits && rest.starts_with("api") => Ok(Scheme::ApiKey),
            _ => Err(ApiError::unauthenticated(
                "invalid_token_format",
                "Invalid OAuth token format: a token begins with sk-ant-oat or sk-ant-api.",
            )),
        }
    }

    /// The tenant that holds this token.
    pub fn tenant(&self, secret: &Secret) -> TenantKey {
        TenantKey(secret.mac(KEY_PREFIX, self.token.as_bytes()))
    }

    /// What the ledger knows of it where it was linked. Whoever has this has neither the token nor the tenant's key.
    pub fn digest(&self, secret: &Secret) -> [u8; 32] {
        secret.mac(LINK_PREFIX, self.token.as_bytes())
    }

    /// What it is, in a word.
    pub fn scheme(&self) -> &'static str {
        self.scheme.name()
    }

    /// The bytes of the credential's sealed memory file.
    pub fn bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(1 + self.token.len()));
        bytes.push(self.scheme as u8);
        bytes.extend_from_slice(self.token.as_bytes());
        bytes
    }
}

/// What a request's headers show: `authorization`, then `x-api-key`. A header wins over the body; one of a wrong form
/// is an error even where another place holds a good one, so that nobody runs under an identity that they did not mean.
pub fn shown(headers: &HeaderMap) -> Option<&str> {
    let header = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or_default().trim());
    if let Some(value) = header(header::AUTHORIZATION) {
        let (scheme, token) = value.split_once(' ').unwrap_or_default();
        return Some(if scheme.eq_ignore_ascii_case("bearer") { token.trim() } else { "" });
    }
    header(API_KEY)
}

/// The credential of a body.
///
/// # Errors
/// 401 where it has no known form, or where its `expires_at` has passed.
pub fn in_body(body: &BodyCredential, now_ms: u64) -> Result<Credential, ApiError> {
    let credential = Credential::parse(&body.access_token)?;
    match body.expires_at_ms {
        Some(expires_at_ms) if expires_at_ms <= now_ms => Err(ApiError::unauthenticated(
            "credential_expired",
            "The access token has expired (oauth_credentials.expires_at is in the past); refresh it and try again.",
        )),
        _ => Ok(credential),
    }
}

/// The capability of a tenant with this secret, which its keys share.
pub fn keyed(server: &Secret, tenant: &[u8; 32]) -> TenantKey {
    TenantKey(server.mac(KEYED_PREFIX, tenant))
}

/// What locks the MCP servers of this session: nobody without the server's secret can open them, nor for another session.
pub fn lock(server: &Secret, tenant: &TenantKey, session: &[u8; 16]) -> Lock {
    Lock::of(server.mac(SERVERS_PREFIX, &Zeroizing::new([tenant.0.as_slice(), session].concat())))
}

/// A tenant's id: what its folder is called, and what a stored credential is sealed for.
pub fn id(key: &TenantKey) -> [u8; 16] {
    std::array::from_fn(|at| Sha256::digest(key.0)[at])
}

/// The name in the books of a tenant that is nothing but its credential.
pub fn raw_name(key: &TenantKey) -> String {
    format!("raw:{}", Hex(id(key).to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(rows: &[(&'static str, &str)]) -> HeaderMap {
        let value = |v: &str| HeaderValue::from_str(v).expect("a header value");
        rows.iter().map(|(name, v)| (http::HeaderName::from_static(name), value(v))).collect()
    }

    #[test]
    fn a_token_has_one_of_two_forms() {
        let check = |token: &str, expected: Option<Scheme>| {
            assert_eq!(Credential::parse(token).ok().map(|c| c.scheme), expected, "{token}");
        };
        check("sk-ant-oat01-abcDEF_123-x", Some(Scheme::OAuth));
        check("sk-ant-api03-abcDEF_123-x", Some(Scheme::ApiKey));
        check("sk-ant-ort01-a-refresh-token", None);
        check("sk-ant-admin01-abcdefgh", None);
        check("sk-ant-oat01", None);
        check("sk-ant-oat01-with space", None);
        check("sk-ant-oat01-with\nnewline", None);
        check("sk-ant-oat01-é-letter", None);
        check("gaol_t_something", None);
        check("", None);
        check(&format!("sk-ant-oat01-{}", "a".repeat(506)), Some(Scheme::OAuth));
        check(&format!("sk-ant-oat01-{}", "a".repeat(507)), None);
    }

    #[test]
    fn a_header_wins_over_the_body_and_a_bad_header_is_an_error() {
        let body = |token: &str, expires_at_ms| BodyCredential {
            access_token: Zeroizing::new(token.to_string()),
            expires_at_ms,
        };
        let good = body("sk-ant-oat01-in-the-body", None);
        let read = |rows: &[(&'static str, &str)], body: Option<&BodyCredential>| {
            match (shown(&headers(rows)), body) {
                (Some(token), _) => Credential::parse(token),
                (None, Some(body)) => in_body(body, 1_000),
                (None, None) => Err(ApiError::unauthenticated("credential_missing", "")),
            }
            .map(|c| c.token.to_string())
            .map_err(|e| (e.status, e.code))
        };
        assert_eq!(read(&[], None), Err((401, "credential_missing")));
        assert_eq!(read(&[], Some(&good)), Ok("sk-ant-oat01-in-the-body".into()));
        assert_eq!(
            read(&[("authorization", "Bearer sk-ant-oat01-in-the-header")], Some(&good)),
            Ok("sk-ant-oat01-in-the-header".into())
        );
        assert_eq!(read(&[("x-api-key", "sk-ant-api03-as-a-key")], None), Ok("sk-ant-api03-as-a-key".into()));
        assert_eq!(
            read(
                &[("authorization", "bearer sk-ant-oat01-first"), ("x-api-key", "sk-ant-api03-second")],
                None
            ),
            Ok("sk-ant-oat01-first".into())
        );
        assert_eq!(read(&[("authorization", "Basic abc")], Some(&good)), Err((401, "invalid_token_format")));
        assert_eq!(read(&[("x-api-key", "nonsense")], Some(&good)), Err((401, "invalid_token_format")));
        assert_eq!(
            read(&[], Some(&body("sk-ant-oat01-old-token", Some(999)))),
            Err((401, "credential_expired"))
        );
        assert_eq!(
            read(&[], Some(&body("sk-ant-oat01-new-token", Some(1_001)))),
            Ok("sk-ant-oat01-new-token".into())
        );
    }

    #[test]
    fn a_key_depends_on_the_token_and_on_the_secret_and_debug_shows_neither() {
        let token = |t: &str| Credential::parse(t).expect("a token");
        let (one, two) = (Secret::new([1; 32]), Secret::new([2; 32]));
        let a = token("sk-ant-oat01-tenant-a");
        assert!(a.tenant(&one) == token("sk-ant-oat01-tenant-a").tenant(&one));
        assert!(a.tenant(&one) != token("sk-ant-oat01-tenant-b").tenant(&one));
        assert!(a.tenant(&one) != a.tenant(&two));
        assert!(a.digest(&one) != a.tenant(&one).0 && a.digest(&one) != a.digest(&two));
        assert!(
            keyed(&one, &[3; 32]) != keyed(&one, &[4; 32]) && keyed(&one, &[3; 32]) != keyed(&two, &[3; 32])
        );
        let locked = lock(&one, &a.tenant(&one), &[5; 16]).lock(b"", b"text").expect("locked");
        let opens =
            |secret, tenant: &TenantKey, session| lock(secret, tenant, session).open(b"", &locked).is_some();
        assert!(opens(&one, &a.tenant(&one), &[5; 16]), "the same of all three");
        assert!(!opens(&two, &a.tenant(&one), &[5; 16]), "another server's secret");
        assert!(!opens(&one, &TenantKey([6; 32]), &[5; 16]), "another tenant");
        assert!(!opens(&one, &a.tenant(&one), &[6; 16]), "another session");
        assert_eq!(a.bytes()[0], Scheme::OAuth as u8);
        assert_eq!(format!("{a:?} {one:?}"), "Credential(oauth) Secret(..)");
    }
}
