//! Workspaces: folders that are named by their ids, with what belongs to them in folders that begin with a dot.
//! It must never show or take a name that begins with a dot for a workspace's.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use gaoler_files::{Code, Taken, WORKSPACES_MAX};
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use crate::Outcome;
use crate::beneath::{Folder, Kind, Relative, is_in_the_way, is_missing, make_steps};
use crate::budget::{Budget, usage, whole};
use crate::draft::Draft;
use crate::failure::{Doing, Failed, Told, failed};
use crate::frames::FramesIn;
use crate::note::{self, Note};

/// The one that is always there.
pub const DEFAULT: &str = "default";
/// Where notes are.
const NOTES: &str = ".notes";
/// Bytes that are copied at a time.
const PIECE: usize = 64 * 1024;

/// Whether this is a name that a workspace or snapshot may have: `default`, or a UUID.
pub fn is_name(name: &str) -> bool {
    let uuid = name.len() == 36
        && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b) || b == b'-');
    name == DEFAULT || uuid
}

fn missing() -> Failed {
    failed(Code::NoWorkspace, "There is no such workspace.")
}

/// A workspace's folder.
pub fn open(top: &Folder, id: &str) -> Result<Folder, Failed> {
    if !is_name(id) {
        return Err(missing());
    }
    match top.enter(OsStr::new(id)) {
        Err(error) if is_missing(&error) => Err(missing()),
        other => other.doing("open a workspace"),
    }
}

/// Holds a workspace against every run.
pub fn held(folder: &Folder) -> Result<Flock<OwnedFd>, Failed> {
    let held = folder.lock(FlockArg::LockExclusiveNonblock).doing("lock a workspace")?;
    held.ok_or_else(|| failed(Code::Busy, "A run is in this workspace: wait for its end."))
}

/// A folder of our own beside the workspaces.
pub fn own(top: &Folder, name: &str) -> Result<Folder, Failed> {
    top.make(OsStr::new(name)).map(|(folder, _)| folder).doing("make a folder of gaoler's own")
}

fn row(top: &Folder, id: &str) -> Result<Value, Failed> {
    let found = open(top, id)?.own().doing("look at a workspace")?;
    let note = Note::read(&own(top, NOTES)?, id);
    Ok(json!({
        "id": id,
        "title": note.title,
        "origin": note.origin,
        "created_at": note.created_at.as_deref().and_then(note::read_time).unwrap_or_else(|| note::time(found.modified)),
    }))
}

fn names(top: &Folder) -> Result<Vec<String>, Failed> {
    let names = top.names().doing("list the workspaces")?;
    let names = names.into_iter().filter_map(|name| name.into_string().ok()).filter(|name| is_name(name));
    Ok(names.collect())
}

/// All of them.
pub fn list(top: &Folder) -> Result<Value, Failed> {
    let mut names = names(top)?;
    names.sort_by_key(|name| (name != DEFAULT, name.clone()));
    let rows = names.iter().filter_map(|id| row(top, id).ok());
    Ok(json!({ "data": rows.collect::<Vec<_>>(), "has_more": false }))
}

/// Whether there may be one more of this name.
pub fn may_make(top: &Folder, id: &str) -> Result<(), Failed> {
    if names(top)?.len() >= WORKSPACES_MAX {
        let message = format!("You have {WORKSPACES_MAX} workspaces already; delete one first.");
        return Err(failed(Code::Many, message));
    }
    match !is_name(id) || top.look(OsStr::new(id)).doing("look for a workspace")?.is_some() {
        true => Err(failed(Code::Conflict, "There is a workspace of that id already.")),
        false => Ok(()),
    }
}

/// An empty one.
pub fn make(top: &Folder, id: &str, title: Option<String>) -> Result<Value, Failed> {
    may_make(top, id)?;
    let draft = Draft::new(top)?;
    let (folder, _) = draft.folder.make(OsStr::new(id)).doing("make a workspace")?;
    place(top, &draft, &folder, id, Note::now(title, None))
}

/// Moves what has been made as a draft to its place.
pub fn place(top: &Folder, draft: &Draft, folder: &Folder, id: &str, note: Note) -> Result<Value, Failed> {
    nix::sys::stat::fchmod(folder, nix::sys::stat::Mode::S_IRWXU).doing("close a workspace to others")?;
    note.write(&own(top, NOTES)?, id)?;
    draft.folder.rename(OsStr::new(id), top, OsStr::new(id)).doing("put a workspace in its place")?;
    row(top, id)
}

/// One, with what it takes, and what all of them and what is elsewhere take together.
pub fn one(
    top: &Folder,
    id: &str,
    (disk_bytes, disk_files): (u64, u64),
    elsewhere: Taken,
) -> Result<Value, Failed> {
    let mut row = row(top, id)?;
    let (bytes, files) = usage(&open(top, id)?)?;
    let (all_bytes, all_files) = whole(top)?;
    let (all_bytes, all_files) =
        (all_bytes.saturating_add(elsewhere.bytes), all_files.saturating_add(elsewhere.files));
    row["usage"] = json!({ "bytes": bytes, "files": files });
    row["quota"] = json!({
        "bytes": disk_bytes, "files": disk_files, "used_bytes": all_bytes, "used_files": all_files,
    });
    Ok(row)
}

/// Removes it with its snapshots, unless a run is in it. Out of sight first: what takes longer than a client waits for is
/// removed later, and is said.
pub fn remove(top: &Folder, id: &str) -> Result<Value, Failed> {
    if !is_name(id) {
        return Err(missing());
    }
    let name = OsStr::new(id);
    let draft = Draft::new(top)?;
    match top.look(name).doing("look for a workspace")? {
        None => return Err(missing()),
        Some(found) if found.kind == Kind::Folder => {
            let folder = open(top, id)?;
            let _held = held(&folder)?;
            if id == DEFAULT {
                empty(&folder, &draft)?;
            } else {
                folder.open_to_owner().doing("open a workspace")?;
                top.rename(name, &draft.folder, name).doing("remove a workspace")?;
            }
        }
        // Whatever else is in its place is no workspace, and can go all the same.
        Some(_) => top.unlink(name).doing("remove what is in a workspace's place")?,
    }
    let _ = own(top, NOTES)?.remove(name);
    let snapshots = own(top, crate::snapshots::FOLDER)?;
    if snapshots.look(name).doing("look for snapshots")?.is_some() {
        let _ = snapshots.enter(name).and_then(|folder| folder.open_to_owner());
        snapshots.rename(name, &draft.folder, OsStr::new("snapshots")).doing("remove snapshots")?;
    }
    Ok(json!({ "id": id, "deleted": true, "remains": draft.end() }))
}

/// Moves all that is in a workspace out of sight.
pub fn empty(folder: &Folder, draft: &Draft) -> Result<(), Failed> {
    folder.open_to_owner().doing("open a workspace")?;
    let (out, _) = draft.folder.make(OsStr::new("emptied")).doing("make a draft")?;
    loop {
        let mut seen = false;
        let moved = folder.each(&mut |name| {
            seen = true;
            // To move a folder takes the right to write into it: its parent entry changes.
            let _ = folder.enter(name).and_then(|inner| inner.open_to_owner());
            folder.rename(name, &out, name).map(|()| true)
        });
        moved.doing("empty a workspace")?;
        if !seen {
            return Ok(());
        }
    }
}

fn no_file() -> Failed {
    failed(Code::NoFile, "There is no such file or folder in this workspace; links are not followed.")
}

/// A file's bytes.
pub fn read(top: &Folder, id: &str, path: &str) -> Result<Outcome, Failed> {
    let (workspace, path) = (open(top, id)?, Relative::of_address(path)?);
    let found = |result: std::io::Result<_>| match result {
        Err(error) if is_missing(&error) => Err(no_file()),
        other => other.doing("open a file"),
    };
    let Some((_, name)) = path.split() else { return Err(no_file()) };
    let Some(folder) = found(path.folder(&workspace))? else { return Err(no_file()) };
    match folder.look(name).doing("look at a file")? {
        Some(entry) if entry.kind == Kind::File => {}
        _ => return Err(no_file()),
    }
    let mut file = match folder.read(name) {
        Err(error) if is_missing(&error) => return Err(no_file()),
        other => other.doing("open a file")?,
    };
    let meta = file.metadata().doing("look at a file")?;
    if !meta.is_file() {
        return Err(no_file());
    }
    let length = meta.len();
    Ok(Outcome::Bytes(
        Some(length),
        Box::new(move |out| {
            // As many as were announced: it may grow meanwhile.
            let copied = std::io::copy(&mut (&mut file).take(length), out)?;
            if copied == length { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
        }),
    ))
}

/// Copies bytes within a budget; how many.
pub fn pour(from: &mut dyn Read, to: &mut dyn Write, budget: &mut Budget) -> std::io::Result<u64> {
    let mut piece = vec![0; PIECE];
    let mut sum = 0;
    loop {
        let got = match from.read(&mut piece) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            got => got?,
        };
        if got == 0 {
            return Ok(sum);
        }
        budget.bytes(got as u64)?;
        to.write_all(&piece[..got])?;
        sum += got as u64;
    }
}

fn in_the_way(path: &Relative) -> Failed {
    let message = format!("{}: something else is in the way, a folder, a file or a link.", path.text());
    failed(Code::Conflict, message)
}

/// Moves a new file to its place: over a file, never over a folder, and through no link.
pub fn put(workspace: &Folder, path: &Relative, draft: &Folder, name: &OsStr) -> Result<bool, Failed> {
    let Some((before, last)) = path.split() else { return Err(in_the_way(path)) };
    let put = make_steps(workspace, before).and_then(|(folder, _)| {
        let there = folder.look(last)?;
        if there.is_some_and(|it| it.kind == Kind::Folder) {
            return Err(std::io::Error::from_raw_os_error(nix::libc::EISDIR));
        }
        draft.rename(name, &folder, last)?;
        Ok(there.is_none())
    });
    match put {
        Err(error) if is_in_the_way(&error) => Err(in_the_way(path)),
        other => other.doing("put a file in its place"),
    }
}

/// Writes a file: whole, or not at all.
pub fn write(
    top: &Folder,
    id: &str,
    path: &str,
    body: &mut FramesIn<'_>,
    mut budget: Budget,
) -> Result<Value, Failed> {
    let (workspace, path) = (open(top, id)?, Relative::of_address(path)?);
    if path.0.is_empty() {
        return Err(failed(Code::Path, "path: must name a file."));
    }
    let draft = Draft::new(top)?;
    let name = OsStr::new("file");
    for _ in 0..=path.0.len() {
        budget.file().doing("write a file")?;
    }
    let mut file = draft.folder.create(name, executable(&workspace, &path)).doing("write a file")?;
    let bytes = pour(body, &mut file, &mut budget).doing("write a file")?;
    let created = put(&workspace, &path, &draft.folder, name)?;
    Ok(json!({ "path": path.text(), "bytes": bytes, "created": created }))
}

/// Whether what is there may be executed: a new file in its place may be as well.
fn executable(workspace: &Folder, path: &Relative) -> bool {
    let folder = path.folder(workspace).ok().flatten();
    let found = folder.zip(path.split()).and_then(|(folder, (_, name))| folder.look(name).ok().flatten());
    found.is_some_and(|found| found.kind == Kind::File && found.executable)
}

/// Removes a file, a link, or a folder with all that is in it.
pub fn remove_file(top: &Folder, id: &str, path: &str) -> Result<Value, Failed> {
    let (workspace, path) = (open(top, id)?, Relative::of_address(path)?);
    let Some((_, name)) = path.split() else {
        return Err(failed(
            Code::Path,
            "path: must name a file or a folder; DELETE the workspace to empty it.",
        ));
    };
    let draft = Draft::new(top)?;
    let removed = path.folder(&workspace).and_then(|folder| {
        let none = || Told::io(Code::NoFile, "There is no such file.");
        let folder = folder.ok_or_else(none)?;
        match folder.look(name)?.ok_or_else(none)?.kind {
            // Out of sight first, with all that is in it.
            Kind::Folder => {
                folder.enter(name)?.open_to_owner()?;
                folder.rename(name, &draft.folder, OsStr::new("removed"))
            }
            _ => folder.unlink(name),
        }
    });
    match removed {
        Err(error) if is_missing(&error) => Err(no_file()),
        other => other.doing("remove a file"),
    }?;
    Ok(json!({ "path": path.text(), "deleted": true, "remains": draft.end() }))
}
