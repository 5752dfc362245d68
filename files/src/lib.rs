//! What the frontend and `gaoler-files` say to each other: a question, an answer, and bytes in frames.
//! It must never hold code of either: whoever reads an answer has to take it for a tenant's claim.
//!
//! A question is one line of JSON on stdin, and frames where it brings bytes. An answer is one line of JSON on stdout,
//! and frames where it brings bytes. A frame is `length u32 LE, bytes`; one of length 0 is the end, so that what was cut
//! is told from what is whole.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Bytes of one frame, at most.
pub const FRAME_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a question's line, at most.
pub const QUESTION_BYTES_MAX: usize = 64 * 1024;
/// Bytes of an answer's line, at most: a page of a transcript is the largest.
pub const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Rows of one page, at most.
pub const PAGE_MAX: u32 = 100;
/// Entries of a tree, at most.
pub const TREE_MAX: u32 = 10_000;
/// Folders within each other that a path may name.
pub const DEPTH_MAX: usize = 100;
/// Bytes of a transcript that is read, at most: the CLI itself can hold no text of half of that.
pub const TRANSCRIPT_BYTES_MAX: u64 = 1 << 30;
/// Characters of a title.
pub const TITLE_CHARS_MAX: usize = 200;
/// Workspaces of one tenant.
pub const WORKSPACES_MAX: usize = 100;
/// Snapshots of one workspace.
pub const SNAPSHOTS_MAX: usize = 50;

/// What is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Question {
    /// Bytes that all workspaces may take together.
    pub disk_bytes: u64,
    /// Files and folders that they may be.
    pub disk_files: u64,
    /// Days after which an unused session is removed; 0 = never.
    pub ttl_days: u32,
    /// What the tenant takes elsewhere, of the same part of the disk: by sessions where this is about workspaces, and the
    /// other way round.
    #[serde(default)]
    pub elsewhere: Taken,
    /// For what.
    #[serde(flatten)]
    pub what: What,
}

/// What is taken of the disk, as the supervisor counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Bytes.
    pub bytes: u64,
    /// Files and folders.
    pub files: u64,
}

/// For what. Ids are names of folders; paths are as in an address, with percent signs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
#[allow(missing_docs, reason = "the fields' names are the documentation's")]
pub enum What {
    /// Removes sessions that are too old, and says which of these are not there any more. Every other question about
    /// sessions removes those as well, before anything else.
    Sweep {
        #[serde(default)]
        known: Vec<String>,
    },
    /// Removes more of what has been deleted and was too much for one request; whether something remains.
    Clean,
    /// What all of it takes.
    Usage,
    /// Sessions, the newest first.
    Sessions { limit: u32, after: Option<String> },
    /// One of them.
    Session { id: String },
    /// Gives it a title.
    NameSession { id: String, title: String },
    /// Removes it.
    DropSession { id: String },
    /// Copies it.
    ForkSession { id: String, new: String, title: Option<String> },
    /// What was said in it.
    Transcript { id: String, limit: u32, offset: u64 },
    /// All workspaces.
    Workspaces,
    /// A new one.
    MakeWorkspace { id: String, title: Option<String> },
    /// A new one out of a repository.
    CloneWorkspace {
        id: String,
        title: Option<String>,
        url: String,
        reference: Option<String>,
        depth: u32,
        /// Scheme and host by which the cage asks for it, where egress adds what opens it.
        via: Option<String>,
    },
    /// One of them, and what it takes.
    Workspace { id: String },
    /// Removes it; the default one is emptied.
    DropWorkspace { id: String },
    /// A file's bytes.
    ReadFile { id: String, path: String },
    /// Writes a file; its bytes follow.
    WriteFile { id: String, path: String },
    /// Removes a file or a folder.
    DropFile { id: String, path: String },
    /// What lies in a folder.
    Tree { id: String, path: String, depth: u32, limit: u32 },
    /// All of it, packed.
    Pack { id: String, format: Format },
    /// Unpacks an archive, whose bytes follow, into it.
    Unpack {
        id: String,
        path: String,
        format: Format,
        #[serde(default)]
        boundary: String,
    },
    /// Keeps it as it is now.
    MakeSnapshot { id: String, new: String, title: Option<String> },
    /// What was kept.
    Snapshots { id: String },
    /// Makes it what it was.
    Restore { id: String, snapshot: String },
    /// Forgets what was kept.
    DropSnapshot { id: String, snapshot: String },
    /// What has changed since.
    Diff { id: String, from: String, unified: bool },
}

impl What {
    /// Whether it depends on what the tenant takes of the disk in all.
    pub fn needs_elsewhere(&self) -> bool {
        match self {
            What::ForkSession { .. }
            | What::Workspace { .. }
            | What::WriteFile { .. }
            | What::Unpack { .. }
            | What::MakeSnapshot { .. }
            | What::Restore { .. } => true,
            What::Sweep { .. }
            | What::Clean
            | What::Usage
            | What::Sessions { .. }
            | What::Session { .. }
            | What::NameSession { .. }
            | What::DropSession { .. }
            | What::Transcript { .. }
            | What::Workspaces
            | What::MakeWorkspace { .. }
            // What git fetches is bounded by the supervisor's look alone.
            | What::CloneWorkspace { .. }
            | What::DropWorkspace { .. }
            | What::ReadFile { .. }
            | What::DropFile { .. }
            | What::Tree { .. }
            | What::Pack { .. }
            | What::Snapshots { .. }
            | What::DropSnapshot { .. }
            | What::Diff { .. } => false,
        }
    }
}

/// A form of archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A tar archive, compressed.
    TarGz,
    /// A zip archive.
    Zip,
    /// No archive: the files of a form.
    Form,
}

/// What is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done. Whoever reads it looks for the fields that are known, and makes nothing of any other.
    Done(Box<RawValue>),
    /// Done; frames follow.
    Bytes(Sized),
    /// Not done.
    Failed(Failure),
}

/// How many bytes follow, where it is known.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sized {
    /// Bytes of all frames together.
    pub bytes: Option<u64>,
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs.
    pub code: Code,
    /// What, where, and what to do.
    pub message: String,
}

/// Why a session cannot be read. It is still its tenant's: listed, counted, and deleted like any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unreadable {
    /// Something else is in the place of its folder.
    NoFolder,
    /// A folder is in the place of its transcript.
    TranscriptIsFolder,
    /// A link is.
    TranscriptIsLink,
    /// A pipe, a socket or a device is.
    TranscriptIsSpecial,
    /// Its owner has closed it to itself.
    TranscriptIsClosed,
    /// It is longer than anybody reads.
    TranscriptIsTooLarge,
    /// No line of it is anything that was said.
    TranscriptSaysNothing,
    /// The disk says no.
    DiskFailed,
}

impl Unreadable {
    /// All of them.
    pub const ALL: &[Unreadable] = &[
        Unreadable::NoFolder,
        Unreadable::TranscriptIsFolder,
        Unreadable::TranscriptIsLink,
        Unreadable::TranscriptIsSpecial,
        Unreadable::TranscriptIsClosed,
        Unreadable::TranscriptIsTooLarge,
        Unreadable::TranscriptSaysNothing,
        Unreadable::DiskFailed,
    ];

    /// What is wrong, and what to do.
    pub fn message(self) -> String {
        let what = match self {
            Unreadable::NoFolder => "something else is in the place of its folder",
            Unreadable::TranscriptIsFolder => "a folder is in the place of its transcript",
            Unreadable::TranscriptIsLink => "a link is in the place of its transcript",
            Unreadable::TranscriptIsSpecial => {
                "a pipe, a socket or a device is in the place of its transcript"
            }
            Unreadable::TranscriptIsClosed => "its transcript's mode lets nobody read it",
            Unreadable::TranscriptIsTooLarge => "its transcript is longer than 1 GiB",
            Unreadable::TranscriptSaysNothing => "no line of its transcript is anything that was said",
            Unreadable::DiskFailed => "its transcript could not be read from the disk",
        };
        format!(
            "This session cannot be read any more: {what}. Something that its agent ran may have done that. DELETE the \
             session, and go on in a new one."
        )
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $status:literal, $code:literal;)*) => {
        /// A code, with the status and the word that clients get.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Code { $($(#[$doc])* $name,)* }

        impl Code {
            /// All of them.
            pub const ALL: &[Code] = &[$(Code::$name,)*];

            /// The HTTP status and the error code.
            pub fn told(self) -> (u16, &'static str) {
                match self { $(Code::$name => ($status, $code),)* }
            }
        }
    };
}

codes! {
    /// No such session.
    NoSession = 404, "session_not_found";
    /// A session that cannot be read.
    Unreadable = 409, "session_unreadable";
    /// No such workspace.
    NoWorkspace = 404, "workspace_not_found";
    /// No such file or folder.
    NoFile = 404, "file_not_found";
    /// No such snapshot.
    NoSnapshot = 404, "snapshot_not_found";
    /// A run is in it.
    Busy = 409, "session_busy";
    /// It is there already, or something else is.
    Conflict = 409, "path_conflict";
    /// A path that is none.
    Path = 400, "invalid_path";
    /// An archive that is none, or is broken.
    Broken = 400, "invalid_archive";
    /// An archive that would write elsewhere, or make what nobody may have.
    Unsafe = 400, "unsafe_archive";
    /// A repository that could not be had.
    Clone = 400, "clone_failed";
    /// There is no room.
    Full = 413, "workspace_full";
    /// As many of them as there may be.
    Many = 413, "too_many";
    /// The bytes broke off.
    Cut = 400, "body_cut";
    /// The disk, or we ourselves.
    Internal = 500, "files_failed";
}
