//! The MCP servers of a request, in every form that clients write them, and what becomes of them: a file for the CLI,
//! and for egress what only it may know. A secret must never be in the first.

mod kept;

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

use gaoler_policy::settings::{Mcp, OfferedServer};
use gaoler_protocol::{Level, REMOTES_BYTES_MAX, Tier};

use super::{BodyCredential, Fields, Ignored, boolean, object, string, take, wrong};
use crate::frontend::error::ApiError;
use crate::mcp::{Place, is_name, transport};

pub use kept::not_sealed;

/// Servers of one request.
const SERVERS_MAX: usize = 16;
/// Arguments, variables and headers of one server.
const WORDS_MAX: usize = 128;
/// Bytes of one of them, and of a token.
const WORD_BYTES_MAX: usize = 16 * 1024;
/// Headers of one server, its token's among them.
const HEADERS_MAX: usize = 32;
/// Headers that are between two neighbours, and so nobody's to choose.
const FRAMING: [&str; 9] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "keep-alive",
];
/// Bytes of what the CLI reads.
const CONFIG_BYTES_MAX: usize = 128 * 1024;

/// What a request says of MCP.
#[derive(Default)]
pub struct Servers {
    list: Vec<(String, Asked)>,
    /// Somebody has named them, if only to say that there are none.
    pub named: bool,
    /// Their tools are to be refused: nobody permits them.
    pub refused: bool,
}

impl std::fmt::Debug for Servers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.list.iter().map(|(name, _)| name)).finish()
    }
}

/// A server as it was asked for.
enum Asked {
    Local { command: String, args: Vec<String>, env: BTreeMap<String, String> },
    Remote { url: Zeroizing<String>, transport: &'static str, headers: Headers },
    Offered { name: String, headers: Headers },
}

/// What opens a server, as it came with a request, or as it was kept for a session.
enum Headers {
    Said(Vec<Header>),
    Kept(kept::Sealed),
}

/// A header with a secret.
struct Header {
    name: String,
    value: Zeroizing<String>,
}

/// What a run gets of them.
#[derive(Default)]
pub struct Settled {
    /// Their names, as they were asked for.
    pub names: Vec<String>,
    /// What the CLI reads; empty = no servers.
    pub config: Vec<u8>,
    /// What egress reads; empty = no remote servers.
    pub remotes: Zeroizing<Vec<u8>>,
}

/// A remote server, as egress reads it.
#[derive(Serialize)]
struct Remote<'a> {
    secure: bool,
    authority: String,
    /// Its path and query: what opens it is for them alone.
    path: String,
    /// It names a second place, in its stream.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    sse: bool,
    headers: Vec<(&'a str, &'a str)>,
    /// The operator's token for it, which nobody but egress can open.
    #[serde(skip_serializing_if = "str::is_empty")]
    sealed: &'a str,
    /// The headers that were kept for a session, which nobody but egress can open.
    #[serde(skip_serializing_if = "str::is_empty")]
    kept: &'a str,
}

/// What a request to try servers says.
pub struct Question {
    /// The servers.
    pub servers: Servers,
    /// The level asked for.
    pub level: Option<Level>,
    /// The credential in the body.
    pub credential: Option<BodyCredential>,
    /// Fields without effect.
    pub ignored: Vec<String>,
}

/// Reads the body of a request to try servers.
///
/// # Errors
/// 400 with the path of what is wrong.
pub fn question(body: &[u8]) -> Result<Question, ApiError> {
    let Fields { mut fields, messages } = super::fields(body)?;
    let mut ignored = Ignored::default();
    if messages.value.is_some() {
        ignored.name("messages");
    }
    let servers = servers(&mut fields, &mut ignored)?;
    if servers.list.is_empty() {
        return Err(ApiError::invalid("mcp_servers: at least one server is required."));
    }
    let level = super::parse_level(take(&mut fields, "security_level"))?;
    let credential = super::parse_credential(take(&mut fields, "oauth_credentials"))?;
    fields.iter().filter(|(_, value)| !value.is_null()).for_each(|(name, _)| ignored.name(name));
    Ok(Question { servers, level, credential, ignored: ignored.names })
}

/// Reads `mcp_servers`.
///
/// # Errors
/// 400 with the path of what is wrong.
pub(super) fn servers(fields: &mut Map<String, Value>, ignored: &mut Ignored) -> Result<Servers, ApiError> {
    let mut servers = Servers::default();
    let named = match take(fields, "mcp_servers") {
        None => return Ok(servers),
        Some(Value::Object(map)) => map.into_iter().collect(),
        Some(Value::Array(list)) => {
            list.into_iter().enumerate().map(with_name).collect::<Result<Vec<_>, _>>()?
        }
        Some(other) => return Err(wrong("mcp_servers", "an object or an array", &other)),
    };
    servers.named = true;
    if named.len() > SERVERS_MAX {
        return Err(ApiError::invalid(format!("mcp_servers: at most {SERVERS_MAX} servers are accepted.")));
    }
    for (name, value) in named {
        if !is_name(&name) {
            return Err(ApiError::invalid(
                "mcp_servers: a server's name must be 1 to 64 letters, digits, `_` and `-`.",
            ));
        }
        if servers.list.iter().any(|(other, _)| *other == name) {
            return Err(ApiError::invalid(format!("mcp_servers.{name}: is there twice.")));
        }
        if let Some(asked) = one(value, &format!("mcp_servers.{name}"), ignored)? {
            servers.list.push((name, asked));
        }
    }
    Ok(servers)
}

/// An entry of the API's own list, whose name is inside.
fn with_name((at, value): (usize, Value)) -> Result<(String, Value), ApiError> {
    let path = format!("mcp_servers[{at}]");
    let Value::Object(mut server) = value else { return Err(wrong(&path, "an object", &value)) };
    let name = string(take(&mut server, "name"), &format!("{path}.name"))?;
    let name = name.ok_or_else(|| ApiError::invalid(format!("{path}.name: field required.")))?;
    Ok((name, Value::Object(server)))
}

/// One server; `None` where its client has turned it off.
fn one(value: Value, path: &str, ignored: &mut Ignored) -> Result<Option<Asked>, ApiError> {
    let Value::Object(mut server) = value else { return Err(wrong(path, "an object", &value)) };
    let text = |value: Option<Value>, name: &str| string(value, &format!("{path}.{name}"));
    let command = text(take(&mut server, "command"), "command")?;
    let url = text(take(&mut server, "url"), "url")?;
    let offered = text(take(&mut server, "catalog"), "catalog")?;
    let kind = text(take(&mut server, "type"), "type")?;
    let said = text(take(&mut server, "transport"), "transport")?;
    let auth = text(take(&mut server, "auth_type"), "auth_type")?;
    let token = text(take(&mut server, "auth_token"), "auth_token")?.map(Zeroizing::new);
    let other = text(take(&mut server, "authorization_token"), "authorization_token")?.map(Zeroizing::new);
    let headers = headers(take(&mut server, "headers"), token.or(other), auth.as_deref(), path)?;
    let (args, env) = (take(&mut server, "args"), take(&mut server, "env"));
    let on = is_wanted(take(&mut server, "tool_configuration"), path, ignored)?;
    server.keys().for_each(|key| ignored.name(&format!("mcp_servers.{key}")));
    let asked = match (command, url, offered) {
        (Some(command), None, None) => {
            if command.is_empty() || !is_word(&command) {
                return Err(ApiError::invalid(format!(
                    "{path}.command: must be 1 to {WORD_BYTES_MAX} bytes."
                )));
            }
            let args = words(args, &format!("{path}.args"))?;
            Asked::Local { command, args, env: variables(env, &format!("{path}.env"))? }
        }
        (None, Some(url), None) => {
            let named = said.or(kind).unwrap_or_else(|| "http".into());
            let transport = transport(&named)
                .ok_or_else(|| ApiError::invalid(format!("{path}.transport: must be http or sse.")))?;
            Asked::Remote { url: Zeroizing::new(url), transport, headers: Headers::Said(headers) }
        }
        (None, None, Some(name)) => Asked::Offered { name, headers: Headers::Said(headers) },
        _ => {
            return Err(ApiError::invalid(format!(
                "{path}: must have one of command (a program in the run's cage), url (a remote server) and catalog (a \
                 name of GET /v1/mcp/catalog)."
            )));
        }
    };
    Ok(on.then_some(asked))
}

/// Whether the client wants the server's tools at all.
fn is_wanted(value: Option<Value>, path: &str, ignored: &mut Ignored) -> Result<bool, ApiError> {
    let path = format!("{path}.tool_configuration");
    let mut tools = object(value, &path)?.unwrap_or_default();
    let on = boolean(take(&mut tools, "enabled"), &format!("{path}.enabled"))?;
    tools.keys().for_each(|key| ignored.name(&format!("mcp_servers.tool_configuration.{key}")));
    Ok(on != Some(false))
}

fn is_word(text: &str) -> bool {
    text.len() <= WORD_BYTES_MAX && !text.contains('\0')
}

fn words(value: Option<Value>, path: &str) -> Result<Vec<String>, ApiError> {
    let list = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= WORDS_MAX => list,
        Some(Value::Array(_)) => {
            return Err(ApiError::invalid(format!("{path}: at most {WORDS_MAX} words are accepted.")));
        }
        Some(other) => return Err(wrong(path, "an array of strings", &other)),
    };
    let word = |(at, value)| match value {
        Value::String(text) if is_word(&text) => Ok(text),
        Value::String(_) => {
            Err(ApiError::invalid(format!("{path}[{at}]: must be at most {WORD_BYTES_MAX} bytes.")))
        }
        other => Err(wrong(&format!("{path}[{at}]"), "a string", &other)),
    };
    list.into_iter().enumerate().map(word).collect()
}

fn variables(value: Option<Value>, path: &str) -> Result<BTreeMap<String, String>, ApiError> {
    let map = object(value, path)?.unwrap_or_default();
    if map.len() > WORDS_MAX {
        return Err(ApiError::invalid(format!("{path}: at most {WORDS_MAX} variables are accepted.")));
    }
    let variable = |(name, value): (String, Value)| match value {
        Value::String(text)
            if is_word(&text) && is_word(&name) && !name.is_empty() && !name.contains('=') =>
        {
            Ok((name, text))
        }
        // Not the name: whoever mistook a value for one would find it in a log.
        _ => Err(ApiError::invalid(format!(
            "{path}: must be names with strings, each at most {WORD_BYTES_MAX} bytes."
        ))),
    };
    map.into_iter().map(variable).collect()
}

/// The headers that open a server: its token, and what its client adds.
fn headers(
    value: Option<Value>,
    token: Option<Zeroizing<String>>,
    auth: Option<&str>,
    path: &str,
) -> Result<Vec<Header>, ApiError> {
    let at = format!("{path}.headers");
    let mut headers = Vec::new();
    for (name, value) in object(value, &at)?.unwrap_or_default() {
        let lower = name.to_ascii_lowercase();
        let fits = http::HeaderName::from_bytes(lower.as_bytes()).is_ok()
            && !FRAMING.contains(&lower.as_str())
            && !lower.starts_with("proxy-");
        match value {
            Value::String(value) if fits && is_visible(&value) => {
                headers.push(Header { name: lower, value: Zeroizing::new(value) });
            }
            _ => {
                return Err(ApiError::invalid(format!(
                    "{at}: must be names of headers with strings of visible characters, and none of those that frame a \
                     request."
                )));
            }
        }
    }
    // All three mean the same header: they say where the token came from.
    if auth.is_some_and(|auth| !["jwt", "oauth", "bearer"].contains(&auth.to_ascii_lowercase().as_str())) {
        return Err(ApiError::invalid(format!("{path}.auth_type: must be jwt, oauth or bearer.")));
    }
    match token {
        Some(token) if token.is_empty() || !is_visible(&token) => {
            return Err(ApiError::invalid(format!("{path}.auth_token: must be visible characters.")));
        }
        Some(token) => headers.push(Header {
            name: "authorization".into(),
            value: Zeroizing::new(format!("Bearer {}", *token)),
        }),
        None if auth.is_some() => {
            return Err(ApiError::invalid(format!("{path}.auth_token: field required beside auth_type.")));
        }
        None => {}
    }
    match headers.len() <= HEADERS_MAX {
        true => Ok(headers),
        false => Err(ApiError::invalid(format!("{at}: at most {HEADERS_MAX} headers are accepted."))),
    }
}

fn is_visible(text: &str) -> bool {
    text.len() <= WORD_BYTES_MAX && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
}

impl Servers {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The same, with or without anybody's permission to use their tools.
    #[must_use]
    pub fn permitted(self, permitted: bool) -> Servers {
        Servers { refused: !permitted, ..self }
    }

    /// What a run of this level on a host of this tier gets of them.
    ///
    /// # Errors
    /// 403 where such servers are not to be had there, 400 for a place or a name that is none.
    pub fn settle(&self, settings: &Mcp, level: Level, tier: Tier) -> Result<Settled, ApiError> {
        if self.list.is_empty() {
            return Ok(Settled::default());
        }
        if tier == Tier::Directory {
            let message = "mcp_servers: on this server nothing but the CLI's own rules keeps tenants apart, so no \
                           server is started or reached.";
            return Err(ApiError::new(403, "mcp_unavailable", message));
        }
        let (mut config, mut remotes) = (Map::new(), Vec::new());
        for (name, asked) in &self.list {
            let path = format!("mcp_servers.{name}");
            let entry = match asked {
                Asked::Local { command, args, env } => local(command, args, env),
                Asked::Remote { url, transport, headers } => {
                    let opens = Opens { headers, sealed: "" };
                    remote(&mut remotes, url, transport, opens, &path, settings, level)?
                }
                Asked::Offered { name, headers } => match offered(settings, name) {
                    Some(it) if it.command.is_empty() => {
                        let transport = transport(&it.transport).unwrap_or("http");
                        let opens = Opens { headers, sealed: &it.token_file };
                        remote(&mut remotes, &it.url, transport, opens, &path, settings, level)?
                    }
                    Some(it) => local(&it.command, &it.args, &it.env),
                    None => {
                        return Err(ApiError::invalid(format!(
                            "{path}.catalog: this server offers no such one; GET /v1/mcp/catalog lists them."
                        )));
                    }
                },
            };
            config.insert(name.clone(), entry);
        }
        let config = json!({ "mcpServers": config }).to_string().into_bytes();
        if config.len() > CONFIG_BYTES_MAX {
            let message = format!("mcp_servers: more than {CONFIG_BYTES_MAX} bytes.");
            return Err(ApiError::new(413, "request_too_large", message));
        }
        let remotes = match remotes.is_empty() {
            true => Zeroizing::default(),
            false => Zeroizing::new(serde_json::to_vec(&remotes).unwrap_or_default()),
        };
        // What egress would not read, the supervisor would take for a hostile Spawn, and end all runs.
        if remotes.len() > REMOTES_BYTES_MAX {
            let message = format!("mcp_servers: more than {REMOTES_BYTES_MAX} bytes of headers and tokens.");
            return Err(ApiError::new(413, "request_too_large", message));
        }
        Ok(Settled { names: self.list.iter().map(|(name, _)| name.clone()).collect(), config, remotes })
    }
}

fn offered<'a>(settings: &'a Mcp, name: &str) -> Option<&'a OfferedServer> {
    settings.catalog.iter().find(|server| server.name == name)
}

fn local(command: &str, args: &[String], env: &BTreeMap<String, String>) -> Value {
    json!({"type": "stdio", "command": command, "args": args, "env": env})
}

/// What opens a remote server: what the request says, and the operator's token, sealed.
struct Opens<'a> {
    headers: &'a Headers,
    sealed: &'a str,
}

/// A remote server, under the name that the cage has for it.
fn remote<'a>(
    remotes: &mut Vec<Remote<'a>>,
    url: &str,
    transport: &'static str,
    Opens { headers, sealed }: Opens<'a>,
    path: &str,
    settings: &Mcp,
    level: Level,
) -> Result<Value, ApiError> {
    if level == Level::Paranoid || !settings.remote {
        let message = format!(
            "{path}: remote servers are not reached {}.",
            if settings.remote { "at the level paranoid" } else { "from this server" }
        );
        return Err(ApiError::new(403, "mcp_remote_refused", message));
    }
    let place =
        Place::parse(url, settings).map_err(|what| ApiError::invalid(format!("{path}.url: {what}.")))?;
    let inside = format!("http://s{}.mcp.invalid{}", remotes.len(), place.path);
    let (headers, kept) = match headers {
        Headers::Said(headers) => {
            (headers.iter().map(|it| (it.name.as_str(), it.value.as_str())).collect(), "")
        }
        Headers::Kept(sealed) => (Vec::new(), sealed.of(&place, path)?),
    };
    let (secure, sse) = (place.secure, transport == "sse");
    remotes.push(Remote { secure, authority: place.authority, path: place.path, sse, headers, sealed, kept });
    Ok(json!({"type": transport, "url": inside}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<(Servers, Vec<String>), String> {
        let Ok(Value::Object(mut fields)) = serde_json::from_str(text) else { panic!("{text}") };
        let mut ignored = Ignored::default();
        let servers = servers(&mut fields, &mut ignored).map_err(|error| error.message)?;
        Ok((servers, ignored.names))
    }

    fn settings() -> Mcp {
        let memory = OfferedServer {
            name: "memory".into(),
            command: "node".into(),
            args: vec!["/srv/memory.js".into()],
            ..OfferedServer::default()
        };
        Mcp { internal: vec!["127.0.0.1:9000".into()], catalog: vec![memory], ..Mcp::default() }
    }

    fn settled(servers: &str) -> Settled {
        let (servers, _) = parsed(&format!(r#"{{"mcp_servers":{servers}}}"#)).expect("servers");
        servers.settle(&settings(), Level::Balanced, Tier::Kernel).expect("settled")
    }

    fn config(settled: &Settled) -> Value {
        serde_json::from_slice(&settled.config).expect("JSON")
    }

    #[test]
    fn every_form_that_clients_write_is_read() {
        // The predecessor's.
        let it = settled(
            r#"{"fs":{"command":"npx","args":["-y","@modelcontextprotocol/server-filesystem","/workspace"],"env":{"DEBUG":"true"}},
                "custom":{"url":"https://mcp.example.com/sse","transport":"sse","auth_type":"jwt","auth_token":"eyJ-secret"}}"#,
        );
        assert_eq!(
            config(&it),
            json!({"mcpServers": {
                "fs": {"type": "stdio", "command": "npx",
                    "args": ["-y", "@modelcontextprotocol/server-filesystem", "/workspace"], "env": {"DEBUG": "true"}},
                "custom": {"type": "sse", "url": "http://s0.mcp.invalid/sse"},
            }})
        );
        assert_eq!(
            serde_json::from_slice::<Value>(&it.remotes).expect("JSON"),
            json!([{"secure": true, "authority": "mcp.example.com:443", "path": "/sse", "sse": true, "headers": [["authorization", "Bearer eyJ-secret"]]}])
        );
        // The API's own.
        let it = settled(
            r#"[{"type":"url","name":"a","url":"https://a.example/mcp","authorization_token":"t"},
                {"type":"url","name":"b","url":"https://b.example/mcp","tool_configuration":{"enabled":false}}]"#,
        );
        assert_eq!(it.names, ["a"]);
        assert_eq!(config(&it)["mcpServers"]["a"]["type"], "http");
        // The CLI's.
        let it = settled(
            r#"{"h":{"type":"http","url":"http://127.0.0.1:9000/m?x=1","headers":{"X-Api-Key":"secret"}}}"#,
        );
        assert_eq!(config(&it)["mcpServers"]["h"]["url"], "http://s0.mcp.invalid/m?x=1");
        assert!(!String::from_utf8_lossy(&it.config).contains("secret"));
        assert!(String::from_utf8_lossy(&it.remotes).contains(r#"["x-api-key","secret"]"#));
        // The operator's.
        let it = settled(r#"{"mem":{"catalog":"memory"}}"#);
        assert_eq!(config(&it)["mcpServers"]["mem"]["args"], json!(["/srv/memory.js"]));
        assert!(it.remotes.is_empty());
        assert!(settled("{}").config.is_empty());
    }

    #[test]
    fn what_is_wrong_is_named_and_no_secret_is_repeated() {
        let check = |servers: &str, part: &str| {
            let why = parsed(&format!(r#"{{"mcp_servers":{servers}}}"#)).map(|_| ()).expect_err(servers);
            assert!(why.contains(part) && !why.contains("SECRET"), "{servers}: {why}");
        };
        check("7", "mcp_servers: must be an object or an array");
        check(r#"{"a b":{"command":"x"}}"#, "a server's name must be");
        check(r#"[{"url":"https://a.example"}]"#, "mcp_servers[0].name: field required");
        check(r#"[{"name":"a","command":"x"},{"name":"a","command":"x"}]"#, "mcp_servers.a: is there twice");
        check(r#"{"a":{}}"#, "mcp_servers.a: must have one of command");
        check(r#"{"a":{"command":"x","url":"https://a.example"}}"#, "must have one of command");
        check(r#"{"a":{"command":""}}"#, "mcp_servers.a.command");
        check(r#"{"a":{"command":"x","args":"y"}}"#, "mcp_servers.a.args: must be an array of strings");
        check(r#"{"a":{"command":"x","args":[1]}}"#, "mcp_servers.a.args[0]: must be a string");
        check(r#"{"a":{"command":"x","env":{"SECRET":1}}}"#, "mcp_servers.a.env: must be names with strings");
        check(r#"{"a":{"url":"https://a.example","transport":"ws"}}"#, "transport: must be http or sse");
        check(
            r#"{"a":{"url":"https://a.example","auth_type":"basic","auth_token":"SECRET"}}"#,
            "auth_type: must be jwt",
        );
        check(r#"{"a":{"url":"https://a.example","auth_type":"jwt"}}"#, "auth_token: field required");
        check(r#"{"a":{"url":"https://a.example","auth_token":"SECRET\n"}}"#, "auth_token: must be visible");
        check(r#"{"a":{"url":"https://a.example","headers":{"host":"SECRET"}}}"#, "mcp_servers.a.headers");
        check(
            r#"{"a":{"url":"https://a.example","headers":{"x":"SECRET\r\ny: z"}}}"#,
            "mcp_servers.a.headers",
        );
        let many: Vec<String> = (0..17).map(|n| format!(r#""s{n}":{{"command":"x"}}"#)).collect();
        check(&format!("{{{}}}", many.join(",")), "at most 16 servers");
        let (_, ignored) = parsed(
            r#"{"mcp_servers":{"a":{"command":"x","cwd":"/","tool_configuration":{"allowed_tools":["t"]}}}}"#,
        )
        .expect("servers");
        assert_eq!(ignored, ["mcp_servers.tool_configuration.allowed_tools", "mcp_servers.cwd"]);
    }

    #[test]
    fn level_and_tier_bound_what_a_request_gets() {
        let settle = |servers: &str, settings: &Mcp, level, tier| {
            let (servers, _) = parsed(&format!(r#"{{"mcp_servers":{servers}}}"#)).expect("servers");
            servers
                .settle(settings, level, tier)
                .map(|it| it.names)
                .map_err(|error| (error.status, error.code))
        };
        let (local, remote) = (r#"{"a":{"command":"x"}}"#, r#"{"a":{"url":"https://a.example"}}"#);
        let fine = || Ok(vec!["a".to_owned()]);
        assert_eq!(settle(local, &settings(), Level::Paranoid, Tier::Kernel), fine());
        assert_eq!(settle(remote, &settings(), Level::Balanced, Tier::Uid), fine());
        assert_eq!(
            settle(remote, &settings(), Level::Paranoid, Tier::Kernel),
            Err((403, "mcp_remote_refused"))
        );
        let off = Mcp { remote: false, ..settings() };
        assert_eq!(settle(remote, &off, Level::Developer, Tier::Kernel), Err((403, "mcp_remote_refused")));
        assert_eq!(
            settle(local, &settings(), Level::Developer, Tier::Directory),
            Err((403, "mcp_unavailable"))
        );
        let check = |servers: &str| settle(servers, &settings(), Level::Developer, Tier::Kernel);
        let large = "v".repeat(WORD_BYTES_MAX);
        let headers: Map<String, Value> = (0..17).map(|n| (format!("x-{n}"), json!(large))).collect();
        let large = json!({"a": {"url": "https://a.example", "headers": headers}}).to_string();
        assert_eq!(check(&large), Err((413, "request_too_large")));
        assert_eq!(check(r#"{"a":{"catalog":"other"}}"#), Err((400, "invalid_request")));
        assert_eq!(check(r#"{"a":{"url":"http://10.0.0.1/"}}"#), Err((400, "invalid_request")));
    }
}
