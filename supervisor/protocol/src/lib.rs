//! The closed list of messages between gaoler's processes: 256 bytes each, little-endian, nothing else.
//! It must never allocate by a peer's word, and never accept a value that it cannot name.
//!
//! A frame is `magic u32, version u16, kind u16, sequence u64, body [u8; 240]`. The kernel frames
//! (SOCK_SEQPACKET); a frame of any other length is [`Malformed::Length`]. Descriptors travel beside a
//! frame; how many and in which order is part of each message's documentation, and [`Message::fds`] says
//! how many a receiver must have got.

mod body;
mod layer;

pub use body::*;
pub use layer::{LAYER_ROWS, LayerName, LayerRow, LayerState, Tier};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes in every frame. Fixed, so that a receiver's buffer never depends on its peer.
pub const FRAME_BYTES: usize = 256;
/// Bytes of a frame that belong to the message's kind.
pub const BODY_BYTES: usize = 240;
/// Descriptors that may travel beside one frame, at most (Serve carries seven).
pub const FDS_MAX: usize = 7;
/// "GAOL", read as little-endian bytes.
pub const MAGIC: u32 = u32::from_le_bytes(*b"GAOL");
/// Both ends of a socket come from one build; another version is a foreign peer.
pub const VERSION: u16 = 1;

/// A frame as it lies on the wire.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Frame {
    magic: U32,
    version: U16,
    kind: U16,
    sequence: U64,
    body: [u8; BODY_BYTES],
}

/// Why a frame was not accepted. Every one of them ends the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// Not exactly [`FRAME_BYTES`] bytes.
    Length(usize),
    /// The first four bytes are not [`MAGIC`].
    Magic,
    /// Another [`VERSION`].
    Version(u16),
    /// A kind that is not in the list.
    Kind(u16),
    /// A field of this message holds a value that has no name, or is out of its bounds.
    Field(&'static str),
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Malformed::Length(n) => write!(f, "a frame of {n} bytes, not {FRAME_BYTES}"),
            Malformed::Magic => write!(f, "a frame without the magic number"),
            Malformed::Version(v) => write!(f, "a frame of version {v}, not {VERSION}"),
            Malformed::Kind(k) => write!(f, "a frame of unknown kind {k}"),
            Malformed::Field(name) => write!(f, "a frame whose field `{name}` is out of bounds"),
        }
    }
}

impl std::error::Error for Malformed {}

macro_rules! messages {
    ($($(#[$doc:meta])* $kind:literal $name:ident($body:ty) fds $fds:expr;)*) => {
        /// Every message there is. One variant, one kind number, one body.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Message { $($(#[$doc])* $name($body),)* }

        impl Message {
            /// The number on the wire.
            pub fn kind(&self) -> u16 { match self { $(Message::$name(_) => $kind,)* } }

            /// The name, for a log line.
            pub fn name(&self) -> &'static str { match self { $(Message::$name(_) => stringify!($name),)* } }

            /// How many descriptors must have come beside this message.
            pub fn fds(&self) -> std::ops::RangeInclusive<usize> { match self { $(Message::$name(_) => $fds,)* } }

            fn write(&self, out: &mut [u8; BODY_BYTES]) {
                match self { $(Message::$name(body) => body.put(&mut Cursor { bytes: out, at: 0 }),)* }
            }

            fn read(kind: u16, bytes: &[u8; BODY_BYTES]) -> Result<Message, Malformed> {
                let reader = &mut Reader { bytes, at: 0 };
                let message = match kind {
                    $($kind => <$body as Field>::take(reader, stringify!($name)).map(Message::$name)?,)*
                    other => return Err(Malformed::Kind(other)),
                };
                reader.end()?;
                Ok(message)
            }
        }
    };
}

messages! {
    /// F, E, U to S: this process has confined itself and asks to be looked at.
    1 Ready(Ready) fds 0..=0;
    /// S to F: prove that the CLI's invocation holds, with runs against the embedded upstream.
    2 Prove(Prove) fds 0..=0;
    /// F to S: what the proof found.
    3 Proven(Proven) fds 0..=0;
    /// S to F: here is the listening socket; from now on tenants may come.
    4 Listen(Listen) fds 1..=1;
    /// F to S: start a run. Fds: `[options, credential, remotes]`, the second as [`Kind::fds`] says, the third the remote
    /// servers of a request that names some (MCP, a repository's host), for egress alone.
    5 Spawn(Spawn) fds 1..=3;
    /// S to F: the run has passed its gate. Fds: stdin (write), stdout (read), stderr (read), lease, report,
    /// ledger (read; lines of JSON that egress writes, one a destination, at the run's end).
    6 Spawned(Spawned) fds 6..=6;
    /// S to F: the run was not started, or died before its gate.
    7 Refused(Refused) fds 0..=0;
    /// S to E: serve this run. Fds: credential, the host's resolv.conf; and unless egress only vouches the
    /// operator's hosts (sealed text, one `HOST:PORT` a line), the ledger (write), the cage's unix listener, and
    /// where the level has a proxy its TCP listener, and after that the run's remote MCP servers where it has any.
    8 Serve(Serve) fds 2..=7;
    /// E to S: what the upstream said of the credential.
    9 Vouched(Vouched) fds 0..=0;
    /// E to S: totals so far, after each upstream answer.
    10 Counted(Totals) fds 0..=0;
    /// E to S: the cage asked for something that its policy does not allow.
    11 Denied(Denied) fds 0..=0;
    /// S to E: close the listeners, forget the credential, answer Revoked.
    12 Revoke(Empty) fds 0..=0;
    /// E to S: done; the totals.
    13 Revoked(Totals) fds 0..=0;
    /// S to F on report: something was denied.
    14 Violation(Violation) fds 0..=0;
    /// S to F on report: what went out so far.
    15 Progress(Totals) fds 0..=0;
    /// S to F on report: how it ended. Always the last.
    16 Exit(Exit) fds 0..=0;
    /// S to F: the tier and every layer, as tried on this host.
    17 Layers(Layers) fds 0..=0;
    /// S to F: accept nothing new, finish what runs.
    18 Drain(Empty) fds 0..=0;
    /// F to S: nothing runs any more.
    19 Drained(Empty) fds 0..=0;
    /// F to S: read the settings again. S to F: they are being read, and whoever does tells it on this socket; without
    /// one, it could not be started.
    20 Reload(Reload) fds 0..=1;
}

impl Message {
    /// The frame for this message.
    pub fn encode(&self, sequence: u64) -> [u8; FRAME_BYTES] {
        let mut body = [0; BODY_BYTES];
        self.write(&mut body);
        let frame = Frame {
            magic: MAGIC.into(),
            version: VERSION.into(),
            kind: self.kind().into(),
            sequence: sequence.into(),
            body,
        };
        let mut bytes = [0; FRAME_BYTES];
        bytes.copy_from_slice(frame.as_bytes());
        bytes
    }

    /// The sequence number and message of a frame.
    ///
    /// # Errors
    /// Anything that is not exactly a frame of the list.
    pub fn decode(bytes: &[u8]) -> Result<(u64, Message), Malformed> {
        let frame = Frame::ref_from_bytes(bytes).map_err(|_| Malformed::Length(bytes.len()))?;
        if frame.magic.get() != MAGIC {
            return Err(Malformed::Magic);
        }
        if frame.version.get() != VERSION {
            return Err(Malformed::Version(frame.version.get()));
        }
        Ok((frame.sequence.get(), Message::read(frame.kind.get(), &frame.body)?))
    }
}

/// A body or a field of one, which knows how to lie in 240 bytes.
trait Field: Sized {
    fn put(&self, out: &mut Cursor<'_>);
    fn take(from: &mut Reader<'_>, name: &'static str) -> Result<Self, Malformed>;
}

struct Cursor<'a> {
    bytes: &'a mut [u8; BODY_BYTES],
    at: usize,
}

impl Cursor<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
}

struct Reader<'a> {
    bytes: &'a [u8; BODY_BYTES],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        out
    }

    /// Bytes past the last field are zero, or the frame is refused: there is no room for a covert or forgotten
    /// field.
    fn end(&self) -> Result<(), Malformed> {
        match self.bytes[self.at..].iter().all(|&b| b == 0) {
            true => Ok(()),
            false => Err(Malformed::Field("padding")),
        }
    }
}
