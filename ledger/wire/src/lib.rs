//! What may be asked of the ledger, and what it answers: JSON frames of a bounded size, each with its number.
//! A question must never name a tenant that is not the asker's own: whose it is follows from what it proves.

#![forbid(unsafe_code)]

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroize;

/// Bytes of one frame, at most, either way.
pub const FRAME_BYTES_MAX: usize = 64 * 1024;
/// Rows of one answer, at most: as many of the largest as fit a frame.
pub const ROWS_MAX: u32 = 50;
/// Bytes of a tenant's name or a key's label, at most.
pub const NAME_BYTES_MAX: usize = 64;
/// Bytes of a sealed credential, at most: five times a token.
pub const SEALED_BYTES_MAX: usize = 4096;
/// Bytes of the locked MCP servers of one session, at most: what fits a frame in hexadecimal, with room around it.
pub const SERVERS_BYTES_MAX: usize = 28 * 1024;
/// Sessions of one tenant that have MCP servers of their own, at most.
pub const SERVED_MAX: usize = 256;
/// Characters of a session's id.
pub const SESSION_CHARS: usize = 36;

/// Bytes, written in hexadecimal. Wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Hex(pub Vec<u8>);

impl Drop for Hex {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Hex {
    /// These bytes as an array of a known length.
    pub fn array<const N: usize>(&self) -> Option<[u8; N]> {
        self.0.as_slice().try_into().ok()
    }

    /// Reads an even number of lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Hex> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let pair = |pair: &[u8]| Some(digit(pair[0])? << 4 | digit(pair[1])?);
        let even = text.len().is_multiple_of(2);
        even.then(|| text.as_bytes().chunks(2).map(pair).collect::<Option<Vec<u8>>>().map(Hex)).flatten()
    }
}

impl std::fmt::Display for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hex({} bytes)", self.0.len())
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Hex, D::Error> {
        let text = String::deserialize(from)?;
        Hex::parse(&text).ok_or_else(|| serde::de::Error::custom("not hexadecimal"))
    }
}

/// A question, its number, and what its asker can prove.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// The answer has the same.
    pub id: u64,
    /// Who asks, where that matters.
    pub by: Option<Proof>,
    /// What.
    pub question: Question,
}

/// What an asker shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Proof {
    /// A tenant's or an admin's key.
    Key {
        /// Its public part.
        id: String,
        /// SHA-256 of its secret part.
        hash: Hex,
    },
    /// A credential of the upstream: its digest under the server's secret.
    Credential {
        /// 32 bytes.
        digest: Hex,
    },
}

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyKind {
    /// Runs of one tenant.
    Tenant,
    /// The operator's routes.
    Admin,
}

impl KeyKind {
    /// What a key of this kind begins with.
    pub fn prefix(self) -> &'static str {
        match self {
            KeyKind::Tenant => "gaol_t_",
            KeyKind::Admin => "gaol_a_",
        }
    }
}

/// What may be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    /// Who shows this proof? Answered with [`Answer::Who`]; a credential that nobody has linked is nobody's.
    Who,
    /// Keeps a sealed credential for the asking tenant, in the place of the one before.
    KeepCredential {
        /// What egress alone can open.
        sealed: Hex,
        /// What it is, in a word.
        scheme: String,
        /// The public key that it was sealed with.
        vault: Hex,
    },
    /// Forgets the asking tenant's credential.
    DropCredential,
    /// From now on whoever shows the credential of this digest is the asking tenant.
    Link {
        /// 32 bytes.
        digest: Hex,
    },
    /// And from now on not any more.
    Unlink {
        /// 32 bytes.
        digest: Hex,
    },
    /// The MCP servers of one of the asker's sessions. Answered with [`Answer::Servers`].
    Servers {
        /// The session.
        session: String,
    },
    /// Which of the asker's sessions have such servers. Answered with [`Answer::Served`].
    Served,
    /// Keeps the MCP servers of one of the asker's sessions, in the place of those before.
    KeepServers {
        /// The session.
        session: String,
        /// What the frontend alone can open.
        locked: Hex,
        /// When the session was used last, as far as is known: Unix seconds.
        used_at: i64,
    },
    /// Forgets those of these sessions, where they have any.
    DropServers {
        /// The sessions.
        sessions: Vec<String>,
    },
    /// A run has ended.
    Record(Box<RunRecord>),
    /// What was used, day by day, newest first. Of one tenant, or of all (which only an admin may ask).
    Usage {
        /// Whose; `None` = everybody's.
        tenant: Option<String>,
        /// Days before this one; `None` = up to today.
        before: Option<String>,
        /// Rows at most.
        limit: u32,
    },
    /// Runs, newest first.
    Runs {
        /// Whose; `None` = everybody's.
        tenant: Option<String>,
        /// Those before this number; `None` = the newest.
        before: Option<i64>,
        /// Rows at most.
        limit: u32,
    },
    /// A new tenant.
    CreateTenant {
        /// For people; nobody else has it.
        name: String,
    },
    /// Tenants by name.
    Tenants {
        /// Those after this name.
        after: Option<String>,
        /// Rows at most.
        limit: u32,
    },
    /// Forgets a tenant, its keys, its credential and its links. Its files and what it used stay.
    RemoveTenant {
        /// By name or id.
        tenant: String,
    },
    /// What a tenant may, where that is not what the server's settings say.
    Allowance {
        /// By name or id.
        tenant: String,
    },
    /// From now on a tenant may this, in the place of what was said before.
    Allow {
        /// By name or id.
        tenant: String,
        /// All of it.
        allowance: Allowance,
    },
    /// A new key. Only its hash is told.
    CreateKey {
        /// Its public part.
        id: String,
        /// SHA-256 of its secret part.
        hash: Hex,
        /// What for.
        kind: KeyKind,
        /// Whose, by name or id.
        tenant: Option<String>,
        /// Makes the tenant where there is none of this name.
        make_tenant: bool,
        /// For people.
        label: String,
        /// Unix seconds; `None` = never.
        expires_at: Option<i64>,
    },
    /// Keys by their id.
    Keys {
        /// Of this tenant alone, by name or id.
        tenant: Option<String>,
        /// Those after this id.
        after: Option<String>,
        /// Rows at most.
        limit: u32,
    },
    /// From now on nobody can use this key.
    RevokeKey {
        /// Its public part.
        id: String,
    },
    /// Reads every page and says what is wrong.
    Integrity,
}

/// An answer and the number of its question.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    /// The question's.
    pub id: u64,
    /// The answer, or why there is none.
    pub answer: Result<Answer, Refusal>,
}

/// Why a question is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No such key, or another secret.
    KeyUnknown,
    /// The key's day has passed.
    KeyExpired,
    /// The key was revoked.
    KeyRevoked,
    /// Whoever proves this may not ask that.
    Forbidden,
    /// There is no such thing.
    NotFound,
    /// There is one already.
    Conflict,
    /// A field is not what it must be.
    Invalid,
    /// The database failed; the ledger's log says how.
    Failed,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done.
    Done,
    /// Who asks.
    Who(Who),
    /// Days.
    Usage(Vec<UsageDay>),
    /// Runs.
    Runs(Vec<RunRow>),
    /// Tenants.
    Tenants(Vec<TenantRow>),
    /// Keys.
    Keys(Vec<KeyRow>),
    /// What a tenant may.
    Allowance(Allowance),
    /// A session's MCP servers.
    Servers(Option<KeptServers>),
    /// Sessions.
    Served(Vec<String>),
    /// What is wrong with the database; nothing where it is whole.
    Integrity(Vec<String>),
}

/// Who shows a proof.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    /// Nobody that the ledger knows: a credential that is its own tenant.
    Unlinked,
    /// The operator.
    Admin,
    /// A tenant.
    Tenant(Box<Grant>),
}

/// A tenant, to whoever proved to be it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grant {
    /// Its id.
    pub tenant: String,
    /// Its name.
    pub name: String,
    /// 32 random bytes, from which its capability follows.
    pub secret: Hex,
    /// The key's public part; `None` where a linked credential was shown.
    pub key: Option<String>,
    /// When that key ends.
    pub expires_at: Option<i64>,
    /// What is kept for it.
    pub credential: Option<KeptCredential>,
    /// What it may.
    pub allowance: Allowance,
}

macro_rules! allowance {
    ($($(#[$doc:meta])* $name:ident: $bounds:expr,)*) => {
        /// What one tenant may, where that is not what the server's settings say of everybody; `None` = as they say.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Allowance { $($(#[$doc])* pub $name: Option<u64>,)* }

        impl Allowance {
            /// The columns of these figures, in order.
            pub const COLUMNS: &[&str] = &[$(stringify!($name),)*];

            /// The figures, in the same order.
            pub fn figures(&self) -> Vec<Option<i64>> {
                vec![$(self.$name.map(|figure| i64::try_from(figure).unwrap_or(i64::MAX)),)*]
            }

            /// Figures in that order.
            ///
            /// # Errors
            /// Whatever `next` gives.
            pub fn read<E>(mut next: impl FnMut() -> Result<Option<i64>, E>) -> Result<Allowance, E> {
                Ok(Allowance { $($name: next()?.map(|figure| u64::try_from(figure).unwrap_or_default()),)* })
            }

            /// A column whose figure is out of its bounds, with these.
            pub fn wrong(&self) -> Option<(&'static str, std::ops::RangeInclusive<u64>)> {
                $(if self.$name.is_some_and(|figure| !($bounds).contains(&figure)) {
                    return Some((stringify!($name), $bounds));
                })*
                None
            }
        }
    };
}

/// The most of a figure that has no bound of its own: what a number of JSON holds exactly.
const FIGURE_MAX: u64 = 1 << 52;

allowance! {
    /// Runs that it may ask for in a minute; 0 = any number.
    tenant_per_minute: 0..=1_000_000,
    /// Its runs at the same time.
    tenant_max: 1..=1024,
    /// Tokens of a day; 0 = any number.
    tokens_per_day: 0..=FIGURE_MAX,
    /// Tokens of a month; 0 = any number.
    tokens_per_month: 0..=FIGURE_MAX,
    /// Millionths of a dollar of a day; 0 = any number.
    cost_per_day_microusd: 0..=FIGURE_MAX,
    /// Millionths of a dollar of a month; 0 = any number.
    cost_per_month_microusd: 0..=FIGURE_MAX,
}

/// A credential as it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeptCredential {
    /// What egress alone can open.
    pub sealed: Hex,
    /// What it is.
    pub scheme: String,
    /// The public key that it was sealed with.
    pub vault: Hex,
    /// Unix seconds.
    pub stored_at: i64,
}

/// A session's MCP servers as they are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeptServers {
    /// What the frontend alone can open.
    pub locked: Hex,
    /// When the session was used last, as far as is known: Unix seconds.
    pub used_at: i64,
}

macro_rules! counted {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)*) => {
        /// What was counted, by egress and by the supervisor.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Counted { $($(#[$doc])* pub $name: $type,)* }

        impl Counted {
            /// The columns of these figures, in order.
            pub const COLUMNS: &[&str] = &[$(stringify!($name),)*];

            /// The figures, in the same order.
            pub fn figures(&self) -> Vec<i64> {
                vec![$(i64::try_from(self.$name).unwrap_or(i64::MAX),)*]
            }

            /// Figures in that order.
            ///
            /// # Errors
            /// Whatever `next` gives.
            pub fn read<E>(mut next: impl FnMut() -> Result<i64, E>) -> Result<Counted, E> {
                Ok(Counted { $($name: <$type>::try_from(next()?).unwrap_or_default(),)* })
            }
        }
    };
}

counted! {
    /// Microseconds from the gate to the end.
    wall_us: u64,
    /// Requests to the upstream.
    requests: u64,
    /// What was denied.
    denials: u64,
    /// Tokens in.
    input_tokens: u64,
    /// Tokens out.
    output_tokens: u64,
    /// Tokens written to the upstream's cache.
    cache_write_tokens: u64,
    /// Tokens read from it.
    cache_read_tokens: u64,
    /// Bytes to the upstream.
    bytes_up: u64,
    /// Bytes from it.
    bytes_down: u64,
    /// What that cost at the prices of that time, in millionths of a dollar.
    cost_microusd: u64,
}

/// A run that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Its id.
    pub run: String,
    /// Whose it was.
    pub tenant: String,
    /// The key that it was asked with.
    pub key: Option<String>,
    /// The session, where it had one.
    pub session: Option<String>,
    /// The model that was asked for.
    pub model: String,
    /// How strict.
    pub level: String,
    /// What kept it apart.
    pub tier: String,
    /// `end_turn`, or an error's code.
    pub outcome: String,
    /// The HTTP status.
    pub status: u16,
    /// Microseconds from Spawn to the opened gate.
    pub launch_us: u64,
    /// What it took.
    pub counted: Counted,
}

/// A recorded run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRow {
    /// Its number, by which lists go on.
    pub number: i64,
    /// Unix seconds.
    pub ended_at: i64,
    /// The run.
    #[serde(flatten)]
    pub record: RunRecord,
}

/// A tenant's day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageDay {
    /// `2026-01-31`, UTC.
    pub day: String,
    /// Whose.
    pub tenant: String,
    /// Runs that ended that day.
    pub runs: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// What they took.
    #[serde(flatten)]
    pub counted: Counted,
}

/// A tenant, as the operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantRow {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Unix seconds.
    pub created_at: i64,
    /// Keys that can be used.
    pub keys: u64,
    /// It has a stored credential.
    pub credential: bool,
    /// Linked credentials.
    pub links: u64,
}

/// A key, as the operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRow {
    /// Its public part.
    pub id: String,
    /// What for.
    pub kind: KeyKind,
    /// Whose, by name.
    pub tenant: Option<String>,
    /// For people.
    pub label: String,
    /// Unix seconds.
    pub created_at: i64,
    /// When it ends.
    pub expires_at: Option<i64>,
    /// When it was revoked.
    pub revoked_at: Option<i64>,
    /// When it was used last, to a minute.
    pub last_used_at: Option<i64>,
}

/// A frame of this.
///
/// # Errors
/// One that is larger than a frame may be.
pub fn encode(what: &impl Serialize) -> Result<Vec<u8>, String> {
    let frame = serde_json::to_vec(what).map_err(|error| error.to_string())?;
    match frame.len() <= FRAME_BYTES_MAX {
        true => Ok(frame),
        false => Err(format!("{} bytes do not fit a frame", frame.len())),
    }
}

/// What a frame says.
///
/// # Errors
/// Where it is not exactly one of the list. The text names a place, and none of the frame's values.
pub fn decode<T: for<'de> Deserialize<'de>>(frame: &[u8]) -> Result<T, String> {
    serde_json::from_slice(frame).map_err(|error| format!("line {} column {}", error.line(), error.column()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_answers_fit_a_frame() {
        let text = |length| "x".repeat(length);
        let counted = Counted::read(|| Ok::<i64, ()>(i64::MAX)).expect("figures");
        let record = RunRecord {
            run: text(32),
            tenant: text(64),
            key: Some(text(32)),
            session: Some(text(36)),
            model: text(100),
            level: text(16),
            tier: text(16),
            outcome: text(40),
            status: 500,
            launch_us: u64::MAX,
            counted,
        };
        let row = RunRow { number: i64::MAX, ended_at: i64::MAX, record };
        let day = UsageDay { day: text(10), tenant: text(64), runs: u64::MAX, failed: u64::MAX, counted };
        let key = KeyRow {
            id: text(32),
            kind: KeyKind::Tenant,
            tenant: Some("\u{1}".repeat(NAME_BYTES_MAX)),
            label: "\u{1}".repeat(NAME_BYTES_MAX),
            created_at: i64::MIN,
            expires_at: Some(i64::MIN),
            revoked_at: Some(i64::MIN),
            last_used_at: Some(i64::MIN),
        };
        let rows = ROWS_MAX as usize;
        let locked = Hex(vec![0xff; SERVERS_BYTES_MAX]);
        let servers = KeptServers { locked: locked.clone(), used_at: i64::MIN };
        let answers = [
            Answer::Runs(vec![row; rows]),
            Answer::Usage(vec![day; rows]),
            Answer::Keys(vec![key; rows]),
            Answer::Servers(Some(servers)),
            Answer::Served(vec![text(SESSION_CHARS); SERVED_MAX]),
        ];
        for answer in answers {
            let frame = encode(&Told { id: u64::MAX, answer: Ok(answer.clone()) }).expect("it fits");
            let told: Told = decode(&frame).expect("it is read");
            assert_eq!(told.answer, Ok(answer));
        }
        let by = Some(Proof::Key { id: text(16), hash: Hex(vec![0; 32]) });
        let question = Question::KeepServers { session: text(SESSION_CHARS), locked, used_at: i64::MIN };
        encode(&Asked { id: u64::MAX, by, question }).expect("the largest question fits");
    }

    #[test]
    fn what_is_not_of_the_list_is_refused_without_its_values() {
        for frame in [
            "",
            "{}",
            "{\"id\":1,\"by\":null,\"question\":\"gaol_t_x\"}",
            "{\"id\":1,\"by\":null,\"question\":\"who\",\"x\":1}",
        ] {
            let why = decode::<Asked>(frame.as_bytes()).expect_err(frame);
            assert!(!why.contains("gaol_t_"), "{why}");
        }
        assert_eq!(Allowance::COLUMNS.len(), Allowance::default().figures().len());
        assert!(Hex::parse("0g").is_none() && Hex::parse("abc").is_none() && Hex::parse("AB").is_none());
        assert_eq!(Hex::parse("00ff").expect("hex").0, [0, 255]);
        assert_eq!(format!("{:?}", Hex(vec![7; 3])), "Hex(3 bytes)");
    }
}
