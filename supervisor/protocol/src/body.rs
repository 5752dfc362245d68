//! The bodies of the messages, each field bounded where it is read.
//! A body never holds text of unbounded size: that travels in descriptors.

use crate::layer::names;
use crate::{Cursor, Field, LAYER_ROWS, LayerName, LayerRow, LayerState, Malformed, Reader, Tier};

/// A run's id: 128 random bits, made by whoever asks for the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunId(pub [u8; 16]);

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// The capability of a tenant: HMAC-SHA256 of their credential under the server's secret. Never logged.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TenantKey(pub [u8; 32]);

impl std::fmt::Debug for TenantKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TenantKey(..)")
    }
}

/// The per-run secret that stands for the credential inside a cage: 256 random bits. Never logged.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Placeholder(pub [u8; 32]);

impl std::fmt::Debug for Placeholder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Placeholder(..)")
    }
}

impl Placeholder {
    /// The text that the CLI gets as its token: the shape of one, with 64 hexadecimal digits.
    pub fn token(&self) -> String {
        use std::fmt::Write;
        self.0.iter().fold(String::from("sk-ant-oat01-"), |mut s, b| {
            let _ = write!(s, "{b:02x}");
            s
        })
    }
}

names! {
    /// What a run is for.
    Kind {
        /// The Claude Code CLI, with a credential held by egress.
        Cli = 1, "cli";
        /// Any command, only from the command line's own supervisor.
        Exec = 2, "exec";
        /// gaoler's own program in all workspaces of the tenant.
        Files = 3, "files";
        /// The same in all sessions of the tenant.
        Sessions = 4, "sessions";
        /// As `files`, with the level's proxy.
        Fetch = 5, "fetch";
    }
}

impl Kind {
    /// Whether it has a way out, and so needs a credential.
    pub fn has_egress(self) -> bool {
        matches!(self, Kind::Cli | Kind::Fetch)
    }

    /// How many descriptors come with it: options, a credential, and servers for egress. One that has none needs the
    /// credential for a new tenant only.
    pub fn fds(self) -> std::ops::RangeInclusive<usize> {
        match self {
            Kind::Exec => 1..=1,
            Kind::Cli | Kind::Fetch => 2..=3,
            Kind::Files | Kind::Sessions => 1..=2,
        }
    }
}

names! {
    /// How strict a run is, strictest first.
    Level {
        /// Public service, unknown users.
        Paranoid = 1, "paranoid";
        /// Production, known users.
        Balanced = 2, "balanced";
        /// Own team.
        Developer = 3, "developer";
    }
}

names! {
    /// Which rules the CLI itself gets: what they must hold depends on what holds beside them.
    Rules {
        /// The cage is the boundary: the rules keep what cannot work there out of the agent's way.
        Cage = 1, "cage";
        /// Nothing else keeps tenants apart: file tools inside the workspace, and no command.
        Directory = 2, "directory";
    }
}

names! {
    /// Where the conversation of a CLI run lives.
    Conversation {
        /// Nowhere: it dies with the run.
        Stateless = 1, "stateless";
        /// In the tenant's folder of this session: resumed where it exists, begun where it does not.
        Session = 2, "session";
    }
}

names! {
    /// Why a run was not started.
    Refusal {
        /// As many runs as the operator allows are running.
        Busy = 1, "busy";
        /// The range of tenant uids is used up.
        TenantsFull = 2, "tenants_full";
        /// The upstream does not accept the credential.
        CredentialRefused = 3, "credential_refused";
        /// The upstream could not be asked whether it accepts the credential.
        UpstreamUnavailable = 4, "upstream_unavailable";
        /// The level or tier is not available here.
        LevelUnavailable = 5, "level_unavailable";
        /// The server is draining.
        Draining = 6, "draining";
        /// A step of the cage failed; `step` and `errno` say which.
        CageFailed = 7, "cage_failed";
        /// execve of the command failed; `errno` says why.
        ExecFailed = 8, "exec_failed";
        /// This session has a run already.
        SessionBusy = 9, "session_busy";
        /// The credential or the options are not what they must be.
        Unacceptable = 10, "unacceptable";
        /// The egress of this run died.
        EgressFailed = 11, "egress_failed";
        /// This tenant has no such workspace.
        WorkspaceUnknown = 12, "workspace_unknown";
        /// The session was begun in another workspace.
        WorkspaceOther = 13, "workspace_other";
    }
}

names! {
    /// Why a run ended.
    Reason {
        /// The command exited by itself; `code` is its status.
        Exited = 1, "exited";
        /// A signal ended the command; `signal` is its number.
        Signaled = 2, "signaled";
        /// The wall-clock limit.
        Wall = 3, "wall";
        /// The memory limit.
        Oom = 4, "oom";
        /// The lease was dropped: the client went away or cancelled.
        Cancelled = 5, "cancelled";
        /// The run's egress died.
        EgressDied = 6, "egress_died";
        /// pid 1 of the cage died without a word.
        InitDied = 7, "init_died";
        /// The server shut down.
        Drained = 8, "drained";
        /// Its holder had all that it wanted of it, and said so on the lease with [`LEASE_DONE`].
        Finished = 9, "finished";
        /// The task limit: forks were refused, and the command failed.
        Tasks = 10, "tasks";
        /// More output than its limit; its reader said so on the lease with [`LEASE_OUTPUT`].
        Output = 11, "output";
        /// The limit on disk or on files of the tenant.
        Disk = 12, "disk";
        /// No output for too long; its reader said so on the lease with [`LEASE_IDLE`].
        Idle = 13, "idle";
        /// More locks on files than a run may have.
        Locks = 14, "locks";
    }
}

names! {
    /// What the cage tried at its egress.
    Denial {
        /// A request without the placeholder.
        Placeholder = 1, "placeholder";
        /// A path or method that the policy does not name.
        Path = 2, "path";
        /// A body that is not what the policy allows (server-side tools, MCP connectors, not JSON).
        Body = 3, "body";
        /// More than the policy's bytes, connections or requests.
        Quota = 4, "quota";
        /// A host or port that the level's list does not name.
        Host = 5, "host";
        /// A host whose address is private, loopback, link-local, a metadata service's, or otherwise not public.
        Address = 6, "address";
        /// A tunnel whose TLS names another host than it was opened for.
        Name = 7, "name";
    }
}

names! {
    /// Which process speaks.
    Role {
        /// The frontend.
        Frontend = 1, "frontend";
        /// An egress.
        Egress = 2, "egress";
        /// The embedded upstream.
        Upstream = 3, "upstream";
        /// The ledger.
        Ledger = 4, "ledger";
        /// The exporter of traces.
        Exporter = 5, "exporter";
    }
}

names! {
    /// What a credential is, and so which header it goes into upstream.
    Scheme {
        /// `authorization: Bearer`, with the OAuth beta.
        OAuth = 1, "oauth";
        /// `x-api-key`.
        ApiKey = 2, "api_key";
    }
}

macro_rules! bodies {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }

        impl Field for $name {
            fn put(&self, _out: &mut Cursor<'_>) { $(self.$field.put(_out);)* }
            fn take(_from: &mut Reader<'_>, _: &'static str) -> Result<Self, Malformed> {
                Ok($name { $($field: <$type as Field>::take(_from, stringify!($field))?,)* })
            }
        }
    )*};
}

bodies! {
    /// Nothing but its kind.
    Empty {}

    /// "I have confined myself."
    Ready {
        /// Who speaks.
        role: Role,
        /// Threads that the process has, all of which must carry the filter.
        threads: u32,
    }

    /// The settings, once more.
    Reload {
        /// How often the frontend had asked for it.
        asks: u64,
    }

    /// What the self-test of the CLI must show.
    Prove {
        /// The rules that every CLI run of this instance gets.
        rules: Rules,
    }

    /// What the self-test of the CLI found.
    Proven {
        /// 0 = every check held; else the number of the check that did not.
        failed: u32,
        /// The CLI's version, as three numbers.
        version: [u16; 3],
    }

    /// The socket, and what its answers may claim.
    Listen {
        /// The tier in force.
        tier: Tier,
        /// The default level.
        level: Level,
        /// Runs at the same time, at most.
        runs_max: u32,
        /// 1 = the upstream is the embedded model.
        embedded: bool,
    }

    /// A run, as asked for. Zero in a limit means the level's own.
    Spawn {
        /// Its id.
        run: RunId,
        /// Whose it is.
        tenant: TenantKey,
        /// For what.
        kind: Kind,
        /// How strict.
        level: Level,
        /// Where the conversation lives (kind cli).
        conversation: Conversation,
        /// 1 = the workspace dies with the run, and `tenant` is not looked at.
        ephemeral: bool,
        /// 1 = a run of the self-test: pid 1 plants the hostile workspace.
        proof: bool,
        /// The session's UUID (kind cli); the CLI's own id for a stateless run.
        session: [u8; 16],
        /// The workspace's UUID (kind cli), or [`WORKSPACE_DEFAULT`]; zeros = the session's own, or the default.
        workspace: [u8; 16],
        /// The model, or an empty string.
        model: Model,
        /// Reasoning effort, passed to the CLI where it is not `unset`.
        effort: Effort,
        /// Agent turns at most; 0 = no limit.
        turns_max: u32,
        /// 1 = the tools of MCP servers are refused: its client said that nobody permits them.
        mcp_refused: bool,
        /// What the run may cost by the CLI's price list, millionths of a US dollar; 0 = no limit.
        budget_microusd: u32,
        /// The limits wished for, each clamped to the level's.
        limits: Limits,
    }

    /// The run's gate is open.
    Spawned {
        /// Which.
        run: RunId,
        /// The limits that were written and read back.
        limits: Limits,
        /// Microseconds from Spawn's arrival to the opened gate.
        launch_us: u64,
        /// The tier of this run.
        tier: Tier,
    }

    /// No run.
    Refused {
        /// Which.
        run: RunId,
        /// Why.
        reason: Refusal,
        /// The number of the cage's step, 0 where that does not apply; Vouched's seconds for UpstreamUnavailable.
        step: u8,
        /// The kernel's word, 0 where that does not apply; an HTTP status for UpstreamUnavailable.
        errno: u16,
    }

    /// What an egress must serve.
    Serve {
        /// For which run.
        run: RunId,
        /// What the cage must show to be served.
        placeholder: Placeholder,
        /// The level whose egress policy holds.
        level: Level,
        /// 1 = ask the upstream for this credential first and answer Vouched.
        vouch: bool,
        /// Requests at most, 0 = the policy's.
        requests_max: u32,
        /// Bytes through the proxy at most, both ways, MiB; 0 = the policy's.
        egress_mib: u32,
        /// The uid that may come to the listeners, as the kernel names a socket's peer; 0 = any, where the
        /// listeners lie in a cage that only this run can enter.
        peer_uid: u32,
        /// Whose run it is: the truncated SHA-256 of the tenant's key. A stored credential opens for no other.
        tenant: [u8; 16],
    }

    /// The upstream's word on a credential.
    Vouched {
        /// For which run.
        run: RunId,
        /// 1 = accepted.
        accepted: bool,
        /// The HTTP status that it is judged by; 0 = no answer.
        status: u16,
        /// Seconds that the upstream asks to be left alone, 255 at most; 0 = it does not say.
        after: u8,
    }

    /// What went through an egress. Counted there, not in the cage.
    Totals {
        /// Of which run.
        run: RunId,
        /// Requests forwarded.
        requests: u32,
        /// Requests denied.
        denials: u32,
        /// The upstream's status of the newest answer, 0 = none yet.
        status: u16,
        /// Tokens in, as the upstream counted.
        input_tokens: u64,
        /// Tokens out, as the upstream counted.
        output_tokens: u64,
        /// Tokens written to the upstream's cache.
        cache_write_tokens: u64,
        /// Tokens read from the upstream's cache.
        cache_read_tokens: u64,
        /// Bytes of bodies sent upstream.
        bytes_up: u64,
        /// Bytes of bodies received.
        bytes_down: u64,
    }

    /// One denial at the egress.
    Denied {
        /// Of which run.
        run: RunId,
        /// What was denied.
        what: Denial,
    }

    /// Something was denied or hit.
    Violation {
        /// Of which run.
        run: RunId,
        /// What.
        what: Denial,
        /// How often so far.
        count: u32,
    }

    /// How a run ended.
    Exit {
        /// Which.
        run: RunId,
        /// Why.
        reason: Reason,
        /// The exit status.
        code: u8,
        /// The signal's number.
        signal: u8,
        /// 1 = teardown went past its deadline and the uid is quarantined.
        quarantined: bool,
        /// Microseconds from the gate to the end.
        wall_us: u64,
        /// Microseconds of user CPU.
        user_us: u64,
        /// Microseconds of system CPU.
        system_us: u64,
        /// The largest resident set of one process, KiB.
        maxrss_kib: u64,
        /// The cgroup's memory peak, bytes; 0 = not known.
        memory_peak: u64,
        /// The cgroup's task peak; 0 = not known.
        tasks_peak: u32,
        /// Processes killed by the memory limit.
        oom_kills: u32,
        /// Forks refused by the task limit.
        tasks_denied: u32,
        /// Microseconds from the end to the last thing removed.
        teardown_us: u64,
        /// Requests that egress forwarded.
        requests: u32,
        /// Requests that egress denied.
        denials: u32,
        /// Tokens in.
        input_tokens: u64,
        /// Tokens out.
        output_tokens: u64,
        /// Tokens written to the upstream's cache.
        cache_write_tokens: u64,
        /// Tokens read from the upstream's cache.
        cache_read_tokens: u64,
        /// Bytes sent upstream.
        bytes_up: u64,
        /// Bytes received from upstream.
        bytes_down: u64,
    }

    /// The host, as tried.
    Layers {
        /// The tier that follows.
        tier: Tier,
        /// The Landlock ABI, 0 = none.
        landlock_abi: u8,
        /// The cgroup version whose limits hold: 0, 1 or 2.
        cgroup: u8,
        /// The rows.
        rows: Rows,
    }

    /// Bounds of a run. In Spawn a wish (0 = the level's), in Spawned what is in force.
    Limits {
        /// Memory, MiB.
        memory_mib: u32,
        /// Tasks (processes and threads).
        tasks: u32,
        /// CPU, percent of one core.
        cpu_percent: u32,
        /// Wall clock, milliseconds.
        wall_ms: u32,
        /// Temporary files, MiB (/tmp, home and /dev/shm each).
        tmp_mib: u32,
        /// One file, MiB.
        file_mib: u32,
        /// Open files a process.
        open_files: u32,
        /// Milliseconds without a byte of output. Counted by the peer that reads the output.
        idle_ms: u32,
        /// Output, stdout and stderr together, MiB. Counted by the peer that reads it.
        output_mib: u32,
        /// What the tenant's workspaces and sessions may take of the disk, MiB.
        disk_mib: u32,
        /// How many files and folders they may be, thousands.
        disk_kfiles: u32,
        /// Bytes through the run's proxy, both ways, MiB.
        egress_mib: u32,
    }
}

macro_rules! limits {
    ($($name:ident)*) => {
        impl Limits {
            /// No wish: the level's own limits.
            pub const NONE: Limits = Limits { $($name: 0,)* };

            /// The words that users see for them, in order.
            pub const NAMES: [&str; 12] = [$(stringify!($name),)*];

            /// The limit with this name.
            pub fn named(&mut self, name: &str) -> Option<&mut u32> {
                match name {
                    $(stringify!($name) => Some(&mut self.$name),)*
                    _ => None,
                }
            }

            /// These limits, none above `most`; a zero is `most`'s own.
            pub fn within(&self, most: &Limits) -> Limits {
                let least = |wish: u32, most: u32| if wish == 0 { most } else { wish.min(most) };
                Limits { $($name: least(self.$name, most.$name),)* }
            }
        }
    };
}

limits! {
    memory_mib tasks cpu_percent wall_ms tmp_mib file_mib open_files idle_ms output_mib disk_mib disk_kfiles egress_mib
}

impl Limits {
    /// Every limit with its name.
    pub fn rows(mut self) -> impl Iterator<Item = (&'static str, u32)> {
        Limits::NAMES.into_iter().filter_map(move |name| Some((name, *self.named(name)?)))
    }
}

impl Totals {
    /// Nothing counted yet.
    pub const fn none(run: RunId) -> Totals {
        Totals {
            run,
            requests: 0,
            denials: 0,
            status: 0,
            input_tokens: 0,
            output_tokens: 0,
            cache_write_tokens: 0,
            cache_read_tokens: 0,
            bytes_up: 0,
            bytes_down: 0,
        }
    }
}

/// A model's name: at most 64 of `A-Z a-z 0-9 . _ : / @ [ ] -`, not beginning with `-`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Model {
    bytes: [u8; 64],
}

impl Model {
    /// The model that the CLI takes by itself.
    pub const DEFAULT: Model = Model { bytes: [0; 64] };

    /// A name.
    ///
    /// # Errors
    /// A name that is too long or holds another character.
    pub fn new(name: &str) -> Result<Model, Malformed> {
        let fits = |b: &u8| b.is_ascii_alphanumeric() || b"._:/@[]-".contains(b);
        if name.len() > 64 || name.starts_with('-') || !name.as_bytes().iter().all(fits) {
            return Err(Malformed::Field("model"));
        }
        let mut bytes = [0; 64];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Model { bytes })
    }

    /// The name; empty for the default.
    pub fn as_str(&self) -> &str {
        let end = self.bytes.iter().position(|&b| b == 0).unwrap_or(64);
        std::str::from_utf8(&self.bytes[..end]).unwrap_or_default()
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Model({})", self.as_str())
    }
}

names! {
    /// Reasoning effort.
    Effort {
        /// Not asked for.
        Unset = 1, "unset";
        /// Low.
        Low = 2, "low";
        /// Medium.
        Medium = 3, "medium";
        /// High.
        High = 4, "high";
    }
}

/// The rows of [`Layers`]: at most [`LAYER_ROWS`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rows {
    rows: [Option<LayerRow>; LAYER_ROWS],
}

impl Rows {
    /// These rows; more than [`LAYER_ROWS`] are cut, which a test of the layers forbids.
    pub fn new(rows: impl IntoIterator<Item = LayerRow>) -> Rows {
        let mut out = Rows { rows: [None; LAYER_ROWS] };
        out.rows.iter_mut().zip(rows).for_each(|(slot, row)| *slot = Some(row));
        out
    }

    /// The rows, in order.
    pub fn iter(&self) -> impl Iterator<Item = LayerRow> + '_ {
        self.rows.iter().map_while(|row| *row)
    }
}

macro_rules! integers {
    ($($int:ty)*) => {$(
        impl Field for $int {
            fn put(&self, out: &mut Cursor<'_>) { out.put(&self.to_le_bytes()); }
            fn take(from: &mut Reader<'_>, _: &'static str) -> Result<Self, Malformed> {
                Ok(<$int>::from_le_bytes(from.take()))
            }
        }
    )*};
}
integers!(u8 u16 u32 u64);

macro_rules! opaque {
    ($($type:ident)*) => {$(
        impl Field for $type {
            fn put(&self, out: &mut Cursor<'_>) { out.put(&self.0); }
            fn take(from: &mut Reader<'_>, _: &'static str) -> Result<Self, Malformed> { Ok($type(from.take())) }
        }
    )*};
}
opaque!(RunId TenantKey Placeholder);

impl Field for bool {
    fn put(&self, out: &mut Cursor<'_>) {
        out.put(&[u8::from(*self)]);
    }
    fn take(from: &mut Reader<'_>, name: &'static str) -> Result<Self, Malformed> {
        match from.take::<1>() {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(Malformed::Field(name)),
        }
    }
}

impl<T: Field + Default + Copy, const N: usize> Field for [T; N] {
    fn put(&self, out: &mut Cursor<'_>) {
        self.iter().for_each(|item| item.put(out));
    }
    fn take(from: &mut Reader<'_>, name: &'static str) -> Result<Self, Malformed> {
        let mut items = [T::default(); N];
        items.iter_mut().try_for_each(|item| T::take(from, name).map(|found| *item = found))?;
        Ok(items)
    }
}

impl Field for Model {
    fn put(&self, out: &mut Cursor<'_>) {
        out.put(&self.bytes);
    }
    fn take(from: &mut Reader<'_>, name: &'static str) -> Result<Self, Malformed> {
        let bytes: [u8; 64] = from.take();
        let text = std::str::from_utf8(&bytes).map_err(|_| Malformed::Field(name))?;
        // A NUL before the end is no character of a name, and so refused.
        Model::new(text.trim_end_matches('\0'))
    }
}

impl Field for Rows {
    fn put(&self, out: &mut Cursor<'_>) {
        for row in self.iter() {
            out.put(&[row.name as u8, row.state as u8]);
            row.errno.put(out);
        }
    }
    fn take(from: &mut Reader<'_>, name: &'static str) -> Result<Self, Malformed> {
        let mut rows = Rows { rows: [None; LAYER_ROWS] };
        for slot in &mut rows.rows {
            let [layer, state] = from.take();
            let errno = u16::take(from, name)?;
            if [layer, state] == [0, 0] && errno == 0 {
                break;
            }
            let (layer, state) = (LayerName::from_number(layer)?, LayerState::from_number(state)?);
            *slot = Some(LayerRow { name: layer, state, errno });
        }
        Ok(rows)
    }
}

/// The workspace that every tenant has, in the place of a UUID.
pub const WORKSPACE_DEFAULT: [u8; 16] = *b"default\0\0\0\0\0\0\0\0\0";

/// What the holder of a lease sends on it to say that the run may end because its work is done. A lease that just
/// closes is a run that is cancelled.
pub const LEASE_DONE: &[u8] = b"done";
/// The same for a run that wrote more than [`Limits::output_mib`].
pub const LEASE_OUTPUT: &[u8] = b"over";
/// The same for a run that wrote nothing for [`Limits::idle_ms`].
pub const LEASE_IDLE: &[u8] = b"idle";

/// A credential memfd: one byte of [`Scheme`], then the token's bytes. At most this many bytes.
pub const CREDENTIAL_BYTES_MAX: usize = 16 * 1024;

/// Runs beyond `runs.max`, at most: those by which the frontend finds out whether the upstream knows a credential. Nobody
/// who is known waits for them.
pub const VOUCHING_MAX: u32 = 8;

/// What a line of the operator's hosts begins with where it names an MCP server in the operator's own network: it may
/// have any address, and no tool may reach it.
pub const INTERNAL_MARK: &str = "mcp ";

/// A memfd of remote servers: JSON that egress reads. At most this many bytes.
pub const REMOTES_BYTES_MAX: usize = 256 * 1024;

/// The options memfd of a run is a list of sections: `tag u8, length u32 LE, bytes`. Its parser is pid 1 of
/// the cage, unprivileged. At most this many bytes in all.
pub const OPTIONS_BYTES_MAX: usize = 64 * 1024 * 1024;

names! {
    /// A section of the options.
    Section {
        /// Text appended to the CLI's system prompt.
        System = 1, "system";
        /// The transcript of earlier turns, JSON lines; the CLI resumes it.
        Transcript = 2, "transcript";
        /// The command of an exec run, each word ended by NUL.
        Argv = 3, "argv";
        /// The CLI's MCP servers, in its own form of JSON.
        Mcp = 4, "mcp";
    }
}

/// One section, as bytes to append to an options memfd.
pub fn section(tag: Section, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(5 + bytes.len());
    out.push(tag as u8);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
    out
}

/// The sections of an options memfd, in order.
///
/// # Errors
/// A tag without a name, or a length that goes past the end.
pub fn sections(mut bytes: &[u8]) -> Result<Vec<(Section, &[u8])>, Malformed> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_at_checked(5).ok_or(Malformed::Field("section"))?;
        let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let (body, rest) = rest.split_at_checked(length).ok_or(Malformed::Field("section"))?;
        out.push((Section::from_number(head[0])?, body));
        bytes = rest;
    }
    Ok(out)
}
