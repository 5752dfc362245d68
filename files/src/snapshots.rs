//! Snapshots: whole copies of a workspace, beside the workspaces, where no run sees them.
//! It must never make one of a workspace half, nor restore one into a workspace in which a run is.

use std::ffi::{OsStr, OsString};
use std::fs::FileTimes;

use gaoler_files::{Code, SNAPSHOTS_MAX};
use serde_json::{Value, json};

use crate::beneath::{Folder, Kind, is_missing, steps};
use crate::budget::{Budget, usage};
use crate::draft::Draft;
use crate::failure::{Doing, Failed, failed};
use crate::note::Note;
use crate::workspaces;

/// Where they are.
pub const FOLDER: &str = ".snapshots";

fn missing() -> Failed {
    failed(Code::NoSnapshot, "This workspace has no such snapshot.")
}

/// The folder of a workspace's snapshots.
fn of(top: &Folder, id: &str) -> Result<Folder, Failed> {
    workspaces::open(top, id)?;
    let all = workspaces::own(top, FOLDER)?;
    Ok(all.make(OsStr::new(id)).doing("open a workspace's snapshots")?.0)
}

/// One of them.
pub fn open(top: &Folder, id: &str, snapshot: &str) -> Result<Folder, Failed> {
    let folder = of(top, id)?;
    if !workspaces::is_name(snapshot) {
        return Err(missing());
    }
    match folder.enter(OsStr::new(snapshot)) {
        Err(error) if is_missing(&error) => Err(missing()),
        other => other.doing("open a snapshot"),
    }
}

/// Copies what is below a folder into another: folders, files and links, with the times of files. `each` is told what
/// it takes before it is made.
pub fn copy(
    from: &Folder,
    to: &Folder,
    each: &mut dyn FnMut(u64) -> std::io::Result<()>,
) -> std::io::Result<()> {
    from.walk(&mut |folder, name, path, found| {
        let Some((before, last)) = path.split() else { return Ok(false) };
        if matches!(found.kind, Kind::Other) {
            return Ok(false);
        }
        each(found.disk_bytes)?;
        let target = steps(to, before)?;
        match found.kind {
            Kind::Folder => drop(target.make(last)?),
            Kind::Link => target.make_link(last, &folder.link(name)?)?,
            Kind::File => {
                let mut source = match folder.read(name) {
                    // Gone meanwhile, or closed by its owner to itself.
                    Err(error) if is_missing(&error) => return Ok(false),
                    source => source?,
                };
                let mut file = target.create(last, found.executable)?;
                std::io::copy(&mut source, &mut file)?;
                let modified = source.metadata()?.modified()?;
                file.set_times(FileTimes::new().set_modified(modified))?;
            }
            Kind::Other => {}
        }
        Ok(true)
    })
}

/// Keeps a workspace as it is.
pub fn make(
    top: &Folder,
    id: &str,
    new: &str,
    title: Option<String>,
    mut budget: Budget,
) -> Result<Value, Failed> {
    let (workspace, folder) = (workspaces::open(top, id)?, of(top, id)?);
    if names(&folder)?.len() >= SNAPSHOTS_MAX {
        let message = format!("This workspace has {SNAPSHOTS_MAX} snapshots already; delete one first.");
        return Err(failed(Code::Many, message));
    }
    let draft = Draft::new(top)?;
    let name = OsStr::new(new);
    let (copied, _) = draft.folder.make(name).doing("make a snapshot")?;
    copy(&workspace, &copied, &mut |bytes| budget.file().and_then(|()| budget.bytes(bytes)))
        .doing("copy a workspace")?;
    Note::now(title, None).write(&folder, &format!("{new}.note"))?;
    draft.folder.rename(name, &folder, name).doing("put a snapshot in its place")?;
    row(&folder, new)
}

fn names(folder: &Folder) -> Result<Vec<String>, Failed> {
    let names = folder.names().doing("list the snapshots")?;
    let names = names.into_iter().filter_map(|name: OsString| name.into_string().ok());
    Ok(names.filter(|name| workspaces::is_name(name)).collect())
}

fn row(folder: &Folder, id: &str) -> Result<Value, Failed> {
    let (bytes, files) = usage(&folder.enter(OsStr::new(id)).doing("open a snapshot")?)?;
    let note = Note::read(folder, &format!("{id}.note"));
    let created = note.created_at.as_deref().and_then(crate::note::read_time);
    Ok(json!({
        "id": id,
        "title": note.title,
        "created_at": created.unwrap_or_else(|| crate::note::time(0)),
        "bytes": bytes,
        "files": files,
    }))
}

/// All of a workspace's, the newest first.
pub fn list(top: &Folder, id: &str) -> Result<Value, Failed> {
    let folder = of(top, id)?;
    let mut rows: Vec<Value> = names(&folder)?.iter().filter_map(|id| row(&folder, id).ok()).collect();
    rows.sort_by(|one, other| other["created_at"].as_str().cmp(&one["created_at"].as_str()));
    Ok(json!({ "data": rows, "has_more": false }))
}

/// Makes a workspace what it was. Its copy is whole before anything of it is removed.
pub fn restore(top: &Folder, id: &str, snapshot: &str, mut budget: Budget) -> Result<Value, Failed> {
    let kept = open(top, id, snapshot)?;
    let workspace = workspaces::open(top, id)?;
    let _held = workspaces::held(&workspace)?;
    let draft = Draft::new(top)?;
    copy(&kept, &draft.folder, &mut |bytes| budget.file().and_then(|()| budget.bytes(bytes)))
        .doing("copy a snapshot")?;
    // Out of sight first, so that no number of files makes it a half one.
    let before = Draft::new(top)?;
    workspaces::empty(&workspace, &before)?;
    for name in draft.folder.names().doing("list what was kept")? {
        draft.folder.rename(&name, &workspace, &name).doing("put back what was kept")?;
    }
    Ok(json!({ "id": id, "snapshot_id": snapshot, "restored": true }))
}

/// Forgets one.
pub fn remove(top: &Folder, id: &str, snapshot: &str) -> Result<Value, Failed> {
    let kept = open(top, id, snapshot)?;
    let folder = of(top, id)?;
    let draft = Draft::new(top)?;
    let name = OsStr::new(snapshot);
    kept.open_to_owner().doing("open a snapshot")?;
    folder.rename(name, &draft.folder, name).doing("remove a snapshot")?;
    let _ = folder.remove(OsStr::new(&format!("{snapshot}.note")));
    Ok(json!({ "id": snapshot, "deleted": true, "remains": draft.end() }))
}
