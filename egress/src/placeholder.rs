//! What stands for the credential in the cage, as requests show it.
//! It must never be printed, and never be compared in a time that tells where a wrong one differs.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gaoler_protocol::Placeholder;
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HeaderName, HeaderValue, PROXY_AUTHORIZATION};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// `x-api-key`.
pub const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// The user's name in the proxy's URL; clients send it beside the password.
const PROXY_USER: &str = "run";

/// The placeholder of one run. Zeroed when it is dropped.
pub struct Expected {
    token: Zeroizing<Vec<u8>>,
    basic: Zeroizing<Vec<u8>>,
}

impl Expected {
    /// The token text of a placeholder.
    pub fn new(placeholder: &Placeholder) -> Expected {
        let token = Zeroizing::new(placeholder.token());
        let pair = Zeroizing::new(format!("{PROXY_USER}:{}", *token));
        let basic = Zeroizing::new(STANDARD.encode(pair.as_bytes()).into_bytes());
        Expected { token: Zeroizing::new(token.as_bytes().to_vec()), basic }
    }

    /// Whether a request to the API carries it, as a bearer token or as a key. Where it has both, both must be right:
    /// nobody may tell it by one of them and somebody else by the other.
    pub fn is_in(&self, headers: &HeaderMap) -> bool {
        let bearer = headers.get(AUTHORIZATION).map(|value| after(value, b"bearer ").unwrap_or_default());
        let key = headers.get(X_API_KEY).map(HeaderValue::as_bytes);
        let right = |shown: &[u8]| bool::from(shown.ct_eq(&self.token));
        (bearer.is_some() || key.is_some()) && [bearer, key].into_iter().flatten().all(right)
    }

    /// Whether a request to the proxy carries it; `None` where it carries nothing of the kind.
    pub fn is_in_proxy(&self, headers: &HeaderMap) -> Option<bool> {
        let value = headers.get(PROXY_AUTHORIZATION)?;
        let shown = [(after(value, b"basic "), &self.basic), (after(value, b"bearer "), &self.token)];
        Some(
            shown.into_iter().any(|(shown, expected)| {
                shown.is_some_and(|shown| bool::from(shown.ct_eq(expected.as_slice())))
            }),
        )
    }
}

/// What comes after a scheme's name, whose case does not matter.
fn after<'a>(value: &'a HeaderValue, scheme: &[u8]) -> Option<&'a [u8]> {
    let (name, rest) = value.as_bytes().split_at_checked(scheme.len())?;
    name.eq_ignore_ascii_case(scheme).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_takes_the_placeholder_as_clients_send_it() {
        let placeholder = Placeholder([9; 32]);
        let expected = Expected::new(&placeholder);
        let token = placeholder.token();
        let basic = |text: String| format!("Basic {}", STANDARD.encode(text));
        let check = |value: String, right: bool| {
            let headers = HeaderMap::from_iter([(PROXY_AUTHORIZATION, value.parse().unwrap())]);
            assert_eq!(expected.is_in_proxy(&headers), Some(right), "{value}");
            // What opens the proxy is not what opens the API.
            assert!(!expected.is_in(&headers));
        };
        check(basic(format!("run:{token}")), true);
        check(basic(format!("run:{token}")).replace("Basic", "basic"), true);
        check(format!("Bearer {token}"), true);
        check(basic(format!("run:{token}x")), false);
        check(basic(format!("root:{token}")), false);
        check(basic(token.clone()), false);
        check(format!("Basic {token}"), false);
        check(format!("Digest {token}"), false);
        check("Basic ".into(), false);
        check("Bearer".into(), false);
        assert_eq!(expected.is_in_proxy(&HeaderMap::new()), None);
    }
}
