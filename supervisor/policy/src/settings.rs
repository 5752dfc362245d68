//! The resolved settings of one instance, handed from the command line to the supervisor as a sealed
//! memory file of TOML. It must never hold a secret: secrets travel in descriptors of their own.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Bytes of settings as text, at most: a table of a few dozen short keys, and lists.
pub const BYTES_MAX: usize = 64 * 1024;

/// Everything that the supervisor needs to know. Defaults are the documented ones; unknown keys are fatal.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// `[isolation]`
    pub isolation: Isolation,
    /// `[level]`
    pub level: Levels,
    /// `[credentials]`
    pub credentials: Credentials,
    /// `[server]`
    pub server: Server,
    /// `[state]`
    pub state: State,
    /// `[uids]`
    pub uids: Uids,
    /// `[upstream]`
    pub upstream: Upstream,
    /// `[cli]`
    pub cli: Cli,
    /// `[runs]`
    pub runs: Runs,
    /// `[models]`
    pub models: Models,
    /// `[mcp]`
    pub mcp: Mcp,
    /// `[sessions]`
    pub sessions: Sessions,
    /// `[identity]`
    pub identity: Identity,
    /// `[ledger]`
    pub ledger: Ledger,
    /// `[rates]`
    pub rates: Rates,
    /// `[budget]`
    pub budget: Budget,
    /// `[telemetry]`
    pub telemetry: Telemetry,
    /// `[prices]`
    pub prices: Prices,
}

macro_rules! sections {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $type:ty = $default:expr,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }

        impl Default for $name {
            fn default() -> Self { $name { $($field: $default,)* } }
        }
    )*};
}

sections! {
    /// What keeps tenants apart.
    Isolation {
        /// The weakest tier that gaoler may start with: kernel, namespaces, uid or directory.
        minimum: String = "kernel".into(),
        /// On a host of the tier directory: different tenants may have runs at the same time, with nothing but the
        /// CLI's own rules, and Landlock where it is there, between them.
        tenants_together: bool = false,
    }

    /// How strict runs are.
    Levels {
        /// For a request that names none.
        default: String = "balanced".into(),
        /// The loosest that a request may get.
        maximum: String = "balanced".into(),
        /// A file of the operator's that changes one level; empty = none. Only the command line reads it.
        file: PathBuf = PathBuf::new(),
        /// Destinations that proxies let through beside the levels' own, `HOST:PORT` or `*.DOMAIN:PORT`.
        hosts: Vec<String> = Vec::new(),
        /// What that file says, checked. Never written by hand.
        #[serde(skip_serializing_if = "Option::is_none")]
        own: Option<OwnLevel> = None,
    }

    /// What the operator's file changes of one level.
    OwnLevel {
        /// Which.
        extends: String = "balanced".into(),
        /// Limits by their names; what is not there stays.
        limits: BTreeMap<String, u32> = BTreeMap::new(),
        /// As `level.hosts`, for this level alone.
        hosts: Vec<String> = Vec::new(),
        /// Environment beside the level's own, or instead of it.
        env: Vec<OwnConstant> = Vec::new(),
        /// What of the host its cages see beside the level's own.
        visible: Vec<OwnPlace> = Vec::new(),
    }

    /// A constant of the environment.
    OwnConstant {
        /// The variable.
        name: String = String::new(),
        /// Its value.
        value: String = String::new(),
    }

    /// A place of the host, read-only.
    OwnPlace {
        /// Where, on the host and in the cage.
        path: PathBuf = PathBuf::new(),
        /// 1 = what lies there may be executed.
        execute: bool = false,
    }

    /// Where credentials are.
    Credentials {
        /// broker: the token stays in egress and never enters a cage.
        mode: String = "broker".into(),
    }

    /// The listener.
    Server {
        /// `HOST:PORT`.
        listen: String = "127.0.0.1:8080".into(),
        /// PEM file of the certificate and those that signed it, in this order; empty = no TLS.
        tls_certificate: PathBuf = PathBuf::new(),
        /// PEM file of its private key.
        tls_key: PathBuf = PathBuf::new(),
        /// Whether only a proxy that ends TLS can reach an address that is not loopback.
        trusted_proxy: bool = false,
        /// Whether `GET /metrics` is there, for whoever can reach the listener.
        metrics: bool = false,
    }

    /// Durable state.
    State {
        /// The folder; created 0700 where it is missing.
        dir: PathBuf = PathBuf::from("/var/lib/gaoler"),
    }

    /// Uids (and gids of the same number) that gaoler may use. Ranges are `[first, count]` and must not overlap
    /// with each other nor with the host's users.
    Uids {
        /// One per tenant, for their files on disk; kept for ever.
        tenant: [u32; 2] = [2_000_000, 65_536],
        /// One per running cage.
        run: [u32; 2] = [2_100_000, 1_024],
        /// One per running egress.
        egress: [u32; 2] = [2_110_000, 1_024],
        /// The frontend's.
        frontend: u32 = 2_120_000,
        /// The embedded upstream's.
        upstream: u32 = 2_120_001,
        /// The ledger's.
        ledger: u32 = 2_120_002,
        /// The exporter's.
        exporter: u32 = 2_120_003,
    }

    /// The API that egress forwards to.
    Upstream {
        /// `https://HOST[:PORT]`, `http://` of loopback only, or `embedded`.
        url: String = "https://api.anthropic.com".into(),
    }

    /// The Claude Code CLI.
    Cli {
        /// The native binary.
        path: PathBuf = PathBuf::from("/usr/local/lib/gaoler/claude"),
        /// The version that it must report.
        version: String = "2.1.330".into(),
    }

    /// Models beside the aliases.
    Models {
        /// What `GET /v1/models` lists, in this order. It forbids no other.
        list: Vec<ListedModel> = Vec::new(),
    }

    /// One of them.
    ListedModel {
        /// The full id, such as `claude-opus-4-8`.
        id: String = String::new(),
        /// For people; empty = the id.
        display_name: String = String::new(),
        /// What it stands for, where it is a name of the operator's own; empty = itself.
        model: String = String::new(),
    }

    /// MCP servers.
    Mcp {
        /// Whether requests may name remote servers at all; a level without a proxy has none in any case.
        remote: bool = true,
        /// `HOST:PORT` of servers in the operator's own network, which requests may name in spite of their address,
        /// and over plain HTTP. No tool of a run can reach them but as the server that its request named.
        internal: Vec<String> = Vec::new(),
        /// Servers that the operator offers by name.
        catalog: Vec<OfferedServer> = Vec::new(),
    }

    /// One of them: a command, or a URL.
    OfferedServer {
        /// The name: letters, digits, `_` and `-`.
        name: String = String::new(),
        /// For people.
        description: String = String::new(),
        /// The program, as it is found in a cage; empty = a remote server.
        command: String = String::new(),
        /// Its arguments.
        args: Vec<String> = Vec::new(),
        /// Its environment. No secrets: every run that uses it can read them.
        env: BTreeMap<String, String> = BTreeMap::new(),
        /// The URL of a remote server.
        url: String = String::new(),
        /// The file with its token. Processes are told that token in its place, sealed to egress.
        token_file: String = String::new(),
        /// `http` or `sse`.
        transport: String = "http".into(),
    }

    /// What tenants' conversations leave behind.
    Sessions {
        /// Days after which a session that nobody uses is removed; 0 = never.
        ttl_days: u32 = 0,
    }

    /// Who may ask.
    Identity {
        /// A credential of the upstream alone is not enough: a request must show a tenant key.
        require_key: bool = false,
    }

    /// What is remembered, and for how long.
    Ledger {
        /// Days that the record of one run is kept.
        runs_days: u32 = 90,
        /// Days that the sums of a tenant's day are kept.
        usage_days: u32 = 800,
    }

    /// Requests a minute; 0 = no limit.
    Rates {
        /// For runs, of one tenant.
        tenant_per_minute: u32 = 0,
        /// For anything but probes, of one address (of IPv6: of one /64).
        address_per_minute: u32 = 0,
        /// Of one address at the same time.
        address_max: u32 = 0,
    }

    /// Tokens and dollars of one tenant, as egress counts them; 0 = no limit. Days and months are UTC's.
    Budget {
        /// A day.
        tokens_per_day: u32 = 0,
        /// A month.
        tokens_per_month: u32 = 0,
        /// Dollars of a day, at `prices`.
        cost_per_day_usd: f64 = 0.0,
        /// Of a month.
        cost_per_month_usd: f64 = 0.0,
        /// Tokens that a live run is taken to use: the CLI's first request alone has some 30,000.
        reserve_tokens: u32 = 50_000,
    }

    /// What tokens cost.
    Prices {
        /// By the beginnings of models' names; the longest that fits holds.
        list: Vec<Price> = Vec::new(),
    }

    /// Dollars of a million tokens; what is not written is -1, and refused.
    Price {
        /// What its models' names begin with.
        model: String = String::new(),
        /// Read anew.
        input: f64 = -1.0,
        /// Written.
        output: f64 = -1.0,
        /// Written to the upstream's cache.
        cache_write: f64 = -1.0,
        /// Read from it.
        cache_read: f64 = -1.0,
    }

    /// Traces. What is secret of it is in a descriptor of its own, for the exporter alone.
    Telemetry {
        /// The collector, `http://` or `https://`; empty = no traces.
        otlp_endpoint: String = String::new(),
        /// A file of headers for it; empty = none. Only the command line reads it.
        otlp_headers: PathBuf = PathBuf::new(),
        /// A PEM file of certificates to trust in place of the built-in ones. Only the command line reads it.
        otlp_ca: PathBuf = PathBuf::new(),
        /// The part of the traces that begin here which are sent.
        sample_ratio: f64 = 1.0,
    }

    /// Bounds of the whole instance.
    Runs {
        /// Runs at the same time, at most.
        max: u32 = 64,
        /// Of those, one tenant's, at most.
        tenant_max: u32 = 16,
        /// Requests that wait for a run, at most; 0 = none.
        queue_max: u32 = 128,
        /// Seconds that one waits, at most.
        queue_seconds: u32 = 30,
        /// Seconds that a drain waits for runs to finish.
        drain_seconds: u32 = 30,
        /// Seconds of silence of the upstream after which a run is ended.
        silence_seconds: u32 = 120,
    }
}
