//! What has changed in a workspace since a snapshot: a list, or a unified diff.
//! It must never hold more of two files than its bounds, nor take a link's target for a file.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::json;
use similar::TextDiff;

use crate::beneath::{Folder, Found, Kind, Relative};
use crate::failure::{Doing, Failed};
use crate::{Outcome, snapshots, workspaces};

/// Bytes of a file that is shown line by line.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a whole diff.
const DIFF_BYTES_MAX: usize = 16 << 20;
/// Rows of a list.
const ROWS_MAX: usize = 10_000;
/// How long one file may take to be compared.
const FILE_WAIT: Duration = Duration::from_secs(1);

type Entries = BTreeMap<Relative, Found>;

/// Everything below a folder, but what git keeps for itself.
fn entries(folder: &Folder) -> Result<Entries, Failed> {
    let mut all = Entries::new();
    folder
        .walk(&mut |_, name, path, found| {
            if name == OsStr::new(".git") {
                return Ok(false);
            }
            if found.kind != Kind::Folder {
                all.insert(path.clone(), found);
            }
            Ok(true)
        })
        .doing("list a workspace")?;
    Ok(all)
}

/// What lies at a path: a file's bytes up to a bound, or where a link leads.
fn content(top: &Folder, path: &Relative, found: &Found) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let (Some(folder), Some((_, name))) = (path.folder(top)?, path.split()) {
        match found.kind {
            Kind::File => drop(folder.read(name)?.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes)?),
            Kind::Link => bytes = folder.link(name)?.into_encoded_bytes(),
            Kind::Folder | Kind::Other => {}
        }
    }
    Ok(bytes)
}

/// Whether two entries are the same, byte by byte.
fn same(old: (&Folder, &Found), new: (&Folder, &Found), path: &Relative) -> std::io::Result<bool> {
    if (old.1.kind, old.1.executable, old.1.bytes) != (new.1.kind, new.1.executable, new.1.bytes) {
        return Ok(false);
    }
    if old.1.kind != Kind::File || old.1.bytes <= TEXT_BYTES_MAX {
        return Ok(content(old.0, path, old.1)? == content(new.0, path, new.1)?);
    }
    let open = |top: &Folder| -> std::io::Result<std::fs::File> {
        match (path.folder(top)?, path.split()) {
            (Some(folder), Some((_, name))) => folder.read(name),
            _ => Err(std::io::ErrorKind::NotFound.into()),
        }
    };
    let (mut one, mut other) = (open(old.0)?, open(new.0)?);
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let got = one.read(&mut left)?;
        if got == 0 {
            return Ok(true);
        }
        if other.read_exact(&mut right[..got]).is_err() || left[..got] != right[..got] {
            return Ok(false);
        }
    }
}

/// Compares a workspace with one of its snapshots.
pub fn diff(top: &Folder, id: &str, from: &str, unified: bool) -> Result<Outcome, Failed> {
    let (kept, workspace) = (snapshots::open(top, id, from)?, workspaces::open(top, id)?);
    let (before, after) = (entries(&kept)?, entries(&workspace)?);
    let mut paths: Vec<&Relative> = before.keys().chain(after.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    let (mut rows, mut text, mut cut) = (Vec::new(), Vec::new(), false);
    for path in paths {
        let (old, new) = (before.get(path), after.get(path));
        let status = match (old, new) {
            (Some(old), Some(new)) => {
                // What goes away while it is looked at has changed.
                if same((&kept, old), (&workspace, new), path).unwrap_or(false) {
                    continue;
                }
                "changed"
            }
            (Some(_), None) => "removed",
            (None, _) => "added",
        };
        if rows.len() >= ROWS_MAX || text.len() >= DIFF_BYTES_MAX {
            cut = true;
            break;
        }
        if unified {
            let read = |top: &Folder, found: Option<&Found>| match found {
                Some(found) => content(top, path, found).unwrap_or_default(),
                None => Vec::new(),
            };
            let (one, other) = (read(&kept, old), read(&workspace, new));
            show(&mut text, path, status, &one, &other);
        }
        let size = |found: Option<&Found>| found.map(|found| found.bytes);
        rows.push(json!({
            "path": path.text(),
            "status": status,
            "bytes_before": size(old),
            "bytes_after": size(new),
        }));
    }
    if unified {
        if cut {
            text.extend_from_slice(b"The rest is left out: it is too much.\n");
        }
        let length = text.len() as u64;
        return Ok(Outcome::Bytes(Some(length), Box::new(move |out| out.write_all(&text))));
    }
    Ok(Outcome::Done(json!({ "from": from, "data": rows, "has_more": cut })))
}

/// One file's lines.
fn show(text: &mut Vec<u8>, path: &Relative, status: &str, old: &[u8], new: &[u8]) {
    // A name with a line break in it must not look like a line of its own.
    let name: String = path.text().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    let before = if status == "added" { "/dev/null".to_owned() } else { format!("a/{name}") };
    let after = if status == "removed" { "/dev/null".to_owned() } else { format!("b/{name}") };
    let shown = |bytes: &[u8]| bytes.len() as u64 <= TEXT_BYTES_MAX && !bytes.contains(&0);
    let _ = match (std::str::from_utf8(old), std::str::from_utf8(new)) {
        (Ok(one), Ok(other)) if shown(old) && shown(new) => {
            let diff = TextDiff::configure().deadline(Instant::now() + FILE_WAIT).diff_lines(one, other);
            match one == other {
                true => writeln!(text, "mode changed: {name}"),
                false => write!(text, "{}", diff.unified_diff().context_radius(3).header(&before, &after)),
            }
        }
        _ => writeln!(text, "Binary files {before} and {after} differ"),
    };
}
