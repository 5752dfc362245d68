//! `gaoler-files`: answers one question about a tenant's own sessions or workspaces, inside that tenant's cage.
//! It must never write through a link, nor leave half of a change behind.

#![forbid(unsafe_code)]

mod archive;
mod beneath;
mod budget;
mod clone;
mod diff;
mod draft;
mod failure;
mod frames;
mod multipart;
mod note;
mod sessions;
mod snapshots;
mod spoken;
mod tree;
mod workspaces;

use std::io::{BufRead, BufWriter, Read, Write};
use std::process::ExitCode;

use gaoler_files::{Answer, Code, QUESTION_BYTES_MAX, Question, Sized, What};
use serde_json::value::to_raw_value;
use serde_json::{Value, json};

use beneath::Folder;
use failure::{Doing, Failed, failed};
use frames::{FramesIn, FramesOut};

/// Writes the bytes of an answer.
type Pour = Box<dyn FnOnce(&mut dyn Write) -> std::io::Result<()>>;

/// What a question leads to.
pub enum Outcome {
    /// An answer in one line.
    Done(Value),
    /// Bytes that follow it.
    Bytes(Option<u64>, Pour),
}

fn main() -> ExitCode {
    // The own program, which the cage gave us to be started from, is of no use to git.
    let _ = nix::unistd::close(3);
    let mut input = std::io::stdin().lock();
    let outcome = question(&mut input).and_then(|question| answer(question, &mut input));
    let mut output = BufWriter::with_capacity(128 * 1024, std::io::stdout().lock());
    match say(outcome, &mut output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn question(input: &mut impl BufRead) -> Result<Question, Failed> {
    let mut line = Vec::new();
    input.take(QUESTION_BYTES_MAX as u64).read_until(b'\n', &mut line).doing("read the question")?;
    serde_json::from_slice(&line)
        .map_err(|error| failed(Code::Internal, format!("the question is none: {error}")))
}

fn answer(question: Question, input: &mut impl Read) -> Result<Outcome, Failed> {
    let top = Folder::open(".").doing("open the own folder")?;
    let what = question.what.clone();
    carried_out(&top, question, input).map_err(|error| match error.0.code {
        // Another request may have removed what this one was about.
        Code::Internal => still_there(&top, &what).err().unwrap_or(error),
        _ => error,
    })
}

/// Whether what is asked about is there.
fn still_there(top: &Folder, what: &What) -> Result<(), Failed> {
    match what {
        What::Session { id }
        | What::NameSession { id, .. }
        | What::DropSession { id }
        | What::ForkSession { id, .. }
        | What::Transcript { id, .. } => sessions::is_there(top, id),
        What::Restore { id, snapshot } | What::DropSnapshot { id, snapshot } => {
            workspaces::open(top, id)?;
            snapshots::open(top, id, snapshot).map(drop)
        }
        What::Workspace { id }
        | What::DropWorkspace { id }
        | What::ReadFile { id, .. }
        | What::WriteFile { id, .. }
        | What::DropFile { id, .. }
        | What::Tree { id, .. }
        | What::Pack { id, .. }
        | What::Unpack { id, .. }
        | What::MakeSnapshot { id, .. }
        | What::Snapshots { id }
        | What::Diff { id, .. } => workspaces::open(top, id).map(drop),
        What::Sweep { .. }
        | What::Clean
        | What::Usage
        | What::Sessions { .. }
        | What::Workspaces
        | What::MakeWorkspace { .. }
        | What::CloneWorkspace { .. } => Ok(()),
    }
}

fn carried_out(top: &Folder, question: Question, input: &mut impl Read) -> Result<Outcome, Failed> {
    let Question { disk_bytes, disk_files, ttl_days, elsewhere, what } = question;
    let mut body = FramesIn::new(input);
    let budget = |top: &Folder| {
        let (bytes, files) =
            (disk_bytes.saturating_sub(elsewhere.bytes), disk_files.saturating_sub(elsewhere.files));
        budget::Budget::left(top, bytes, files)
    };
    let done = match what {
        What::Sweep { known } => sessions::swept(top, ttl_days, known),
        What::Clean => sessions::clean(top, draft::OWN_WAIT).map(|remains| json!({ "remains": remains })),
        What::Usage => budget::whole(top).map(|(bytes, files)| json!({ "bytes": bytes, "files": files })),
        What::Sessions { limit, after } => sessions::list(top, limit, after.as_deref(), ttl_days),
        What::Session { id } => sessions::one(top, &id, ttl_days),
        What::NameSession { id, title } => sessions::name(top, &id, &title, ttl_days),
        What::DropSession { id } => sessions::remove(top, &id, ttl_days),
        What::ForkSession { id, new, title } => sessions::fork(top, &id, &new, title, ttl_days, budget(top)?),
        What::Transcript { id, limit, offset } => sessions::transcript(top, &id, limit, offset, ttl_days),
        What::Workspaces => workspaces::list(top),
        What::MakeWorkspace { id, title } => workspaces::make(top, &id, title),
        What::CloneWorkspace { id, title, url, reference, depth, via } => {
            let wanted =
                clone::Wanted { url: &url, reference: reference.as_deref(), depth, via: via.as_deref() };
            clone::clone(top, &id, title, &wanted)
        }
        What::Workspace { id } => workspaces::one(top, &id, (disk_bytes, disk_files), elsewhere),
        What::DropWorkspace { id } => workspaces::remove(top, &id),
        What::ReadFile { id, path } => return workspaces::read(top, &id, &path),
        What::WriteFile { id, path } => workspaces::write(top, &id, &path, &mut body, budget(top)?),
        What::DropFile { id, path } => workspaces::remove_file(top, &id, &path),
        What::Tree { id, path, depth, limit } => tree::tree(top, &id, &path, depth, limit),
        What::Pack { id, format } => return archive::pack(top, &id, format),
        What::Unpack { id, path, format, boundary } => {
            archive::unpack(top, &id, &path, (format, &boundary), &mut body, budget(top)?)
        }
        What::MakeSnapshot { id, new, title } => snapshots::make(top, &id, &new, title, budget(top)?),
        What::Snapshots { id } => snapshots::list(top, &id),
        What::Restore { id, snapshot } => snapshots::restore(top, &id, &snapshot, budget(top)?),
        What::DropSnapshot { id, snapshot } => snapshots::remove(top, &id, &snapshot),
        What::Diff { id, from, unified } => return diff::diff(top, &id, &from, unified),
    };
    done.map(Outcome::Done)
}

fn say(outcome: Result<Outcome, Failed>, output: &mut impl Write) -> std::io::Result<()> {
    let (line, bytes) = match outcome {
        Ok(Outcome::Done(value)) => (Answer::Done(to_raw_value(&value)?), None),
        Ok(Outcome::Bytes(bytes, rest)) => (Answer::Bytes(Sized { bytes }), Some(rest)),
        Err(Failed(failure)) => (Answer::Failed(failure), None),
    };
    serde_json::to_writer(&mut *output, &line)?;
    output.write_all(b"\n")?;
    if let Some(rest) = bytes {
        let mut frames = FramesOut::new(&mut *output);
        rest(&mut frames)?;
        frames.end()?;
    }
    output.flush()
}
