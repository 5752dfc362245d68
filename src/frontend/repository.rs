//! A repository to clone: what the cage is told of it, and what only egress may know.
//! It must never let a token into the first, into an error, or into an address.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};
use zeroize::{Zeroize, Zeroizing};

use gaoler_files::Code;
use gaoler_policy::settings::Settings;

use super::error::ApiError;
use crate::mcp::Place;

/// Bytes of an address and of a reference.
const TEXT_BYTES_MAX: usize = 2000;
/// Bytes of a token and of a user's name.
pub const SECRET_BYTES_MAX: usize = 4096;
/// Commits of a repository, at most.
const DEPTH_MAX: u64 = 1_000_000;
/// Whom a token is shown as where nobody says it: hosts look at the token alone, and want some name beside it.
const USER: &str = "x-access-token";
/// The cage's name for the repository's host.
const INSIDE: &str = "http://s0.git.invalid";

/// What a request says.
#[derive(Debug)]
pub struct Repository {
    /// Where it is, as the client wrote it.
    pub url: String,
    /// A branch, a tag or a commit.
    pub reference: Option<String>,
    /// Commits; 0 = all.
    pub depth: u32,
    /// The cage's way there, where egress has something to add or the host is in the operator's network.
    pub via: Option<String>,
    /// What egress reads; empty = nothing.
    pub remotes: Zeroizing<Vec<u8>>,
}

impl Repository {
    /// Reads `git` out of a body, and forgets what must not be kept.
    ///
    /// # Errors
    /// 400 with the path of what is wrong.
    pub fn parse(mut git: Map<String, Value>, settings: &Settings) -> Result<Repository, ApiError> {
        let token = secret(&mut git, "token")?;
        let user = secret(&mut git, "username")?;
        let url = text(&git, "url")?.ok_or_else(|| ApiError::invalid("git.url: field required."))?;
        let reference = text(&git, "ref")?;
        let depth = match git.get("depth") {
            None | Some(Value::Null) => 0,
            Some(depth) => depth.as_u64().filter(|depth| *depth <= DEPTH_MAX).ok_or_else(|| {
                ApiError::invalid(format!("git.depth: must be a whole number from 0 to {DEPTH_MAX}."))
            })? as u32,
        };
        let plain = Repository { url, reference, depth, via: None, remotes: Zeroizing::default() };
        if user.is_some() && token.is_none() {
            return Err(ApiError::invalid("git.token: field required beside username."));
        }
        let place = if token.is_some() {
            let wrong = |what| ApiError::invalid(format!("git.url: {what}."));
            Place::parse(&plain.url, &settings.mcp).map_err(wrong)?
        } else {
            // What no proxy lets through starts nothing.
            let (status, code) = Code::Clone.told();
            let wrong = |what| ApiError::new(status, code, format!("git.url: {what}."));
            let level = &settings.level;
            let own = level.own.as_ref().map_or(&[][..], |own| &own.hosts);
            let place = Place::parse_plain(&plain.url, &settings.mcp, &[&level.hosts, own]).map_err(wrong)?;
            if !settings.mcp.internal.contains(&place.authority) {
                return Ok(plain);
            }
            place
        };
        let mut headers = Vec::new();
        let opens = token.map(|token| {
            let user = user.as_ref().map_or(USER, |user| user.as_str());
            let login = Zeroizing::new(format!("{user}:{}", *token));
            Zeroizing::new(format!("Basic {}", *Zeroizing::new(STANDARD.encode(login.as_bytes()))))
        });
        if let Some(opens) = &opens {
            headers.push(("authorization", opens.as_str()));
        }
        #[derive(serde::Serialize)]
        struct Line<'a> {
            secure: bool,
            authority: &'a str,
            path: &'a str,
            headers: Vec<(&'a str, &'a str)>,
            git: bool,
        }
        // git knows nothing of a query, and asks below this path.
        let path = place.path.split('?').next().unwrap_or_default();
        let line = Line { secure: place.secure, authority: &place.authority, path, headers, git: true };
        let remotes = Zeroizing::new(serde_json::to_vec(&[line]).unwrap_or_default());
        Ok(Repository { via: Some(INSIDE.to_owned()), remotes, ..plain })
    }
}

fn text(git: &Map<String, Value>, name: &str) -> Result<Option<String>, ApiError> {
    match git.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.len() <= TEXT_BYTES_MAX => Ok(Some(text.clone())),
        Some(_) => {
            Err(ApiError::invalid(format!("git.{name}: must be a string of at most {TEXT_BYTES_MAX} bytes.")))
        }
    }
}

/// A token, or a name beside it: what can stand in a header.
fn secret(git: &mut Map<String, Value>, name: &str) -> Result<Option<Zeroizing<String>>, ApiError> {
    let fits = |text: &str| {
        (1..=SECRET_BYTES_MAX).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_graphic())
            && (name == "token" || !text.contains(':'))
    };
    match git.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if fits(&text) => Ok(Some(Zeroizing::new(text))),
        Some(other) => {
            if let Value::String(mut text) = other {
                text.zeroize();
            }
            let colon = if name == "token" { "" } else { ", without a colon" };
            Err(ApiError::invalid(format!(
                "git.{name}: must be 1 to {SECRET_BYTES_MAX} visible characters{colon}."
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(git: Value) -> Result<Repository, String> {
        let mut settings = Settings::default();
        settings.mcp.internal = vec!["127.0.0.1:9000".into()];
        let code =
            if git["token"].is_null() && git["url"].is_string() { "clone_failed" } else { "invalid_request" };
        let Value::Object(git) = git else { panic!("{git}") };
        Repository::parse(git, &settings).map_err(|error| {
            assert!(error.status == 400 && [code, "invalid_request"].contains(&error.code), "{error:?}");
            error.message
        })
    }

    #[test]
    fn what_opens_a_repository_is_for_egress_alone() {
        let check = |git: Value, remotes: Option<Value>| {
            let repository = parsed(git.clone()).expect("a repository");
            let told = serde_json::from_slice::<Value>(&repository.remotes).ok();
            assert_eq!(told, remotes, "{git}");
            assert_eq!(repository.via.is_some(), remotes.is_some(), "{git}");
            let of_the_cage = format!("{:?}", (&repository.url, &repository.via, &repository.reference));
            assert!(!of_the_cage.contains("SECRET"), "{of_the_cage}");
        };
        let line = |secure: bool, authority: &str, path: &str, headers: Value| {
            let line = json!({"secure": secure, "authority": authority, "path": path, "headers": headers, "git": true});
            Some(json!([line]))
        };
        let url = "https://git.example.com/a/b.git";
        check(json!({"url": url}), None);
        check(json!({"url": url, "token": null}), None);
        let basic = format!("Basic {}", STANDARD.encode("x-access-token:SECRET"));
        check(
            json!({"url": url, "token": "SECRET"}),
            line(true, "git.example.com:443", "/a/b.git", json!([["authorization", basic]])),
        );
        let basic = format!("Basic {}", STANDARD.encode("oauth2:SECRET:x"));
        check(
            json!({"url": url, "token": "SECRET:x", "username": "oauth2"}),
            line(true, "git.example.com:443", "/a/b.git", json!([["authorization", basic]])),
        );
        // A host in the operator's network has no other way.
        check(json!({"url": "http://127.0.0.1:9000/r"}), line(false, "127.0.0.1:9000", "/r", json!([])));
    }

    #[test]
    fn what_is_wrong_is_named_and_no_token_is_repeated() {
        let check = |git: Value, message: &str| {
            let found = parsed(git.clone()).map(|_| ()).expect_err(message);
            assert!(found.contains(message) && !found.contains("SECRET"), "{git}: {found}");
        };
        let url = "https://git.example.com/a";
        check(json!({}), "git.url: field required.");
        check(json!({"url": 7}), "git.url: must be a string");
        check(json!({"url": url, "depth": -1}), "git.depth: must be a whole number");
        check(json!({"url": url, "token": ""}), "git.token: must be 1 to 4096 visible characters.");
        check(json!({"url": url, "token": "SECRET\n"}), "git.token: must be 1 to 4096 visible characters.");
        check(json!({"url": url, "token": 7}), "git.token: must be");
        check(
            json!({"url": url, "token": "SECRET", "username": "a:b"}),
            "git.username: must be 1 to 4096 visible characters, without a colon.",
        );
        check(json!({"url": url, "username": "a"}), "git.token: field required beside username.");
        for bad in [
            "ext::sh -c id",
            "file:///etc",
            "http://git.example.com/a",
            "https://127.0.0.1/a",
            "https://169.254.169.254/a",
            "https://2130706433/a",
            "https://[::1]/a",
            "https://git.internal/a",
        ] {
            check(json!({"url": bad}), "git.url: must");
        }
        for bad in [
            "https://127.0.0.1/a",
            "http://git.example.com/a",
            "https://SECRET@git.example.com/a",
            "https://git.example.com:8443/a",
            "file:///etc",
            "git@git.example.com:a",
        ] {
            check(json!({"url": bad, "token": "SECRET"}), "git.url: must");
        }
    }
}
