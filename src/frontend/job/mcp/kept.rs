//! Servers as they are kept for a session: what opens one sealed for egress, the rest as text that the frontend locks.
//! It must never write a secret in the clear, nor show one.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

use gaoler_policy::settings::Mcp;
use gaoler_seal::KEY_BYTES;

use super::{Asked, Header, Headers, Servers, offered};
use crate::frontend::error::ApiError;
use crate::mcp::{Place, transport};

/// What is locked.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// The public key that headers were sealed with, in base64.
    vault: String,
    servers: Vec<(String, Form)>,
}

/// A server. Like the request's own form, but with nothing in it that was not understood.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Form {
    Local { command: String, args: Vec<String>, env: BTreeMap<String, String> },
    Remote { url: String, transport: String, headers: Sealed },
    Offered { name: String, headers: Sealed },
}

/// Headers that egress alone can open, in a run of their tenant's, for the one place that they are for.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Sealed {
    names: Vec<String>,
    origin: String,
    text: String,
}

impl Sealed {
    /// The sealed text, for this place. Egress would not take it for another, and end the run.
    ///
    /// # Errors
    /// 400 where the operator has moved the server.
    pub(super) fn of(&self, place: &Place, path: &str) -> Result<&str, ApiError> {
        match self.text.is_empty() || self.origin == place.origin() {
            true => Ok(&self.text),
            false => Err(ApiError::invalid(format!(
                "{path}: the operator has moved this server since its headers were kept."
            ))),
        }
    }

    fn seal(
        headers: &[Header],
        place: &Place,
        (public, tenant): (&[u8; KEY_BYTES], &[u8; 16]),
    ) -> Result<Sealed, ApiError> {
        if headers.is_empty() {
            return Ok(Sealed::default());
        }
        let pairs: Vec<_> = headers.iter().map(|it| (it.name.as_str(), it.value.as_str())).collect();
        let pairs = Zeroizing::new(serde_json::to_vec(&pairs).unwrap_or_default());
        let origin = place.origin();
        let opens = Zeroizing::new([origin.as_bytes(), b"\n", pairs.as_slice()].concat());
        let sealed = gaoler_seal::seal_servers(public, tenant, &opens).ok_or_else(not_sealed)?;
        let names = headers.iter().map(|it| it.name.clone()).collect();
        Ok(Sealed { names, origin, text: STANDARD.encode(sealed) })
    }
}

/// What stands in the way of keeping anything.
pub fn not_sealed() -> ApiError {
    ApiError::internal("not_sealed", "The servers' secrets could not be sealed.")
}

impl Servers {
    /// The text that is to be locked. What opens a server is sealed with this key for this tenant.
    ///
    /// # Errors
    /// As of [`Servers::settle`], which must have been asked before; 500 where nothing can be sealed.
    pub fn keep(
        &self,
        settings: &Mcp,
        public: &[u8; KEY_BYTES],
        tenant: &[u8; 16],
    ) -> Result<Zeroizing<Vec<u8>>, ApiError> {
        let sealed = |headers: &Headers, url: &str, name: &str| match headers {
            Headers::Kept(sealed) => Ok(sealed.clone()),
            Headers::Said(headers) => {
                let wrong = |what| ApiError::invalid(format!("mcp_servers.{name}.url: {what}."));
                Sealed::seal(headers, &Place::parse(url, settings).map_err(wrong)?, (public, tenant))
            }
        };
        let mut servers = Vec::new();
        for (name, asked) in &self.list {
            let form = match asked {
                Asked::Local { command, args, env } => {
                    Form::Local { command: command.clone(), args: args.clone(), env: env.clone() }
                }
                Asked::Remote { url, transport, headers } => Form::Remote {
                    url: url.to_string(),
                    transport: (*transport).to_owned(),
                    headers: sealed(headers, url, name)?,
                },
                Asked::Offered { name: offer, headers } => {
                    // A local one has no headers that anybody would read.
                    let url = offered(settings, offer).map_or("", |it| it.url.as_str());
                    let none = Headers::Said(Vec::new());
                    let headers = if url.is_empty() { &none } else { headers };
                    let headers = match headers {
                        Headers::Said(said) if said.is_empty() => Sealed::default(),
                        headers => sealed(headers, url, name)?,
                    };
                    Form::Offered { name: offer.clone(), headers }
                }
            };
            servers.push((name.clone(), form));
        }
        let kept = Kept { vault: STANDARD.encode(public), servers };
        serde_json::to_vec(&kept).map(Zeroizing::new).map_err(|_| not_sealed())
    }

    /// What was kept, as if a request had named it. `None` where it is nothing that this server has written, or was
    /// sealed with a key that it does not have any more.
    pub fn kept(text: &[u8], public: &[u8; KEY_BYTES]) -> Option<Servers> {
        let kept: Kept = serde_json::from_slice(text).ok()?;
        let whole = kept.vault == STANDARD.encode(public);
        let mut list = Vec::new();
        for (name, form) in kept.servers {
            let asked = match form {
                Form::Local { command, args, env } => Asked::Local { command, args, env },
                Form::Remote { url, transport: word, headers } => {
                    let url = Zeroizing::new(url);
                    if !whole && !headers.text.is_empty() {
                        return None;
                    }
                    Asked::Remote { url, transport: transport(&word)?, headers: Headers::Kept(headers) }
                }
                Form::Offered { headers, .. } if !whole && !headers.text.is_empty() => return None,
                Form::Offered { name, headers } => Asked::Offered { name, headers: Headers::Kept(headers) },
            };
            list.push((name, asked));
        }
        Some(Servers { list, named: true, refused: false })
    }

    /// What may be shown: the names of headers and variables, and none of their values. A URL is cut where its query
    /// begins, which may be a secret too.
    pub fn shown(&self) -> Value {
        let named = |headers: &Headers| match headers {
            Headers::Said(headers) => headers.iter().map(|it| it.name.clone()).collect(),
            Headers::Kept(sealed) => sealed.names.clone(),
        };
        let servers = self.list.iter().map(|(name, asked)| {
            let shown = match asked {
                Asked::Local { command, args, env } => {
                    json!({"command": command, "args": args, "env": env.keys().collect::<Vec<_>>()})
                }
                Asked::Remote { url, transport, headers } => {
                    let (plain, query) = url.split_once('?').map_or((url.as_str(), false), |it| (it.0, true));
                    json!({"url": plain, "query": query, "transport": transport, "headers": named(headers)})
                }
                Asked::Offered { name, headers } => json!({"catalog": name, "headers": named(headers)}),
            };
            (name.clone(), shown)
        });
        Value::Object(servers.collect::<Map<_, _>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::job::Ignored;
    use gaoler_policy::settings::OfferedServer;
    use gaoler_protocol::{Level, Tier};
    use gaoler_seal::Vault;

    const TENANT: [u8; 16] = [1; 16];

    fn parsed(servers: &str) -> Servers {
        let Ok(Value::Object(mut fields)) = serde_json::from_str(&format!(r#"{{"mcp_servers":{servers}}}"#))
        else {
            panic!("{servers}")
        };
        super::super::servers(&mut fields, &mut Ignored::default()).expect("servers")
    }

    fn settings(url: &str) -> Mcp {
        let corp = OfferedServer { name: "corp".into(), url: url.into(), ..OfferedServer::default() };
        let tool = OfferedServer { name: "tool".into(), command: "node".into(), ..OfferedServer::default() };
        Mcp { catalog: vec![corp, tool], ..Mcp::default() }
    }

    const ALL: &str = r#"{
        "local": {"command": "node", "args": ["a.js", "-v"], "env": {"API_KEY": "SECRET-env"}},
        "remote": {"url": "https://mcp.example.com/sse?key=SECRET-query", "transport": "sse", "auth_type": "oauth",
            "auth_token": "SECRET-token", "headers": {"X-Team": "SECRET-header"}},
        "bare": {"type": "http", "url": "https://mcp.example.com/"},
        "corp": {"catalog": "corp", "auth_token": "SECRET-corp"},
        "tool": {"catalog": "tool"}}"#;

    #[test]
    fn what_is_kept_is_the_same_servers_and_only_egress_can_open_what_opens_them() {
        let vault = Vault::draw();
        let public = vault.public().expect("a key");
        let settings = settings("https://corp.example/mcp");
        let said = parsed(ALL);
        let text = said.keep(&settings, &public, &TENANT).expect("kept");
        let readable = String::from_utf8(text.to_vec()).expect("UTF-8");
        for secret in ["SECRET-token", "SECRET-header", "SECRET-corp"] {
            assert!(!readable.contains(secret), "{secret}: {readable}");
        }
        let kept = Servers::kept(&text, &public).expect("servers");
        let settle =
            |servers: &Servers| servers.settle(&settings, Level::Balanced, Tier::Kernel).expect("settled");
        let (before, after) = (settle(&said), settle(&kept));
        assert_eq!((&before.names, &before.config), (&after.names, &after.config));
        let remotes: Vec<Value> = serde_json::from_slice(&after.remotes).expect("JSON");
        let opened = |at: usize| {
            let sealed = STANDARD.decode(remotes[at]["kept"].as_str().expect("sealed")).expect("base64");
            vault.open_servers(&TENANT, &sealed).map(|text| String::from_utf8(text.to_vec()).expect("UTF-8"))
        };
        let of = |authority: &str, sealed: bool| {
            let found = |it: &Value| it["authority"] == authority && it["kept"].is_string() == sealed;
            remotes.iter().position(found).expect(authority)
        };
        assert_eq!(
            opened(of("mcp.example.com:443", true)).as_deref(),
            Some(
                "https://mcp.example.com:443\n[[\"x-team\",\"SECRET-header\"],[\"authorization\",\"Bearer SECRET-token\"]]"
            )
        );
        let corp = of("corp.example:443", true);
        assert_eq!(
            opened(corp).as_deref(),
            Some("https://corp.example:443\n[[\"authorization\",\"Bearer SECRET-corp\"]]")
        );
        assert_eq!(remotes[of("mcp.example.com:443", false)]["headers"], json!([]));
        // Kept again, as for a copy, it is what it was.
        assert_eq!(kept.keep(&settings, &public, &TENANT).expect("kept"), text);
        // With another key of the server's nobody could open it.
        let other = Vault::draw().public().expect("a key");
        assert!(Servers::kept(&text, &other).is_none() && Servers::kept(b"{}", &public).is_none());
        let plain =
            parsed(r#"{"local": {"command": "node"}}"#).keep(&settings, &public, &TENANT).expect("kept");
        assert!(Servers::kept(&plain, &other).is_some(), "what has no secret needs no key");
    }

    #[test]
    fn what_is_shown_has_no_value_of_a_header_a_variable_or_a_query() {
        let vault = Vault::draw().public().expect("a key");
        let said = parsed(ALL);
        let text = said.keep(&settings("https://corp.example/"), &vault, &TENANT).expect("kept");
        let kept = Servers::kept(&text, &vault).expect("servers");
        let expected = json!({
            "local": {"command": "node", "args": ["a.js", "-v"], "env": ["API_KEY"]},
            "remote": {"url": "https://mcp.example.com/sse", "query": true, "transport": "sse", "headers": ["x-team", "authorization"]},
            "bare": {"url": "https://mcp.example.com/", "query": false, "transport": "http", "headers": []},
            "corp": {"catalog": "corp", "headers": ["authorization"]},
            "tool": {"catalog": "tool", "headers": []},
        });
        assert_eq!(kept.shown(), expected);
        assert_eq!(said.shown(), expected, "before as after");
        assert!(!expected.to_string().contains("SECRET"));
    }

    #[test]
    fn a_server_that_the_operator_has_moved_since_gets_nothing_that_was_kept() {
        let public = Vault::draw().public().expect("a key");
        let before = settings("https://corp.example/mcp");
        let servers = parsed(r#"{"corp": {"catalog": "corp", "auth_token": "t"}}"#);
        let kept = servers.keep(&before, &public, &TENANT).expect("kept");
        let kept = Servers::kept(&kept, &public).expect("servers");
        let settled =
            |settings: &Mcp| kept.settle(settings, Level::Balanced, Tier::Kernel).map(|it| it.names);
        assert_eq!(settled(&before).expect("settled"), ["corp"]);
        assert!(
            settled(&settings("https://corp.example/elsewhere")).is_ok(),
            "another path of the same place"
        );
        let why = settled(&settings("https://corp.example.org/mcp")).expect_err("moved");
        assert!(why.status == 400 && why.message.contains("the operator has moved this server"), "{why:?}");
    }
}
