//! What lies in a folder, row by row.
//! It must never follow a link: it says where one leads, and no more.

use gaoler_files::{DEPTH_MAX, TREE_MAX};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use serde_json::{Value, json};

use crate::beneath::{Kind, Relative, is_missing, steps};
use crate::failure::{Doing, Failed, failed};
use crate::{beneath::Folder, note, workspaces};

/// What a path of an address may hold as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// Entries below a folder, each folder before what is in it.
pub fn tree(top: &Folder, id: &str, path: &str, depth: u32, limit: u32) -> Result<Value, Failed> {
    let (workspace, path) = (workspaces::open(top, id)?, Relative::of_address(path)?);
    let from = match steps(&workspace, &path.0) {
        Err(error) if is_missing(&error) => {
            let message = "There is no such folder in this workspace; links are not followed.";
            return Err(failed(gaoler_files::Code::NoFile, message));
        }
        other => other.doing("open a folder")?,
    };
    let (depth, limit) = ((depth as usize).clamp(1, DEPTH_MAX), limit.clamp(1, TREE_MAX) as usize);
    let (mut rows, mut more) = (Vec::new(), false);
    from.walk(&mut |folder, name, below, found| {
        if rows.len() >= limit {
            more = true;
            return Ok(false);
        }
        let mut whole = path.clone();
        whole.0.extend(below.0.iter().cloned());
        let bytes = whole.bytes();
        let mut row = json!({
            "path": whole.text(),
            "type": word(found.kind),
            "bytes": found.bytes,
            "modified_at": note::time(found.modified),
            "executable": found.kind == Kind::File && found.executable,
        });
        if std::str::from_utf8(&bytes).is_err() {
            // Its name is no text: this is what to put into an address.
            row["address"] = percent_encode(&bytes, PLAIN).to_string().into();
        }
        if found.kind == Kind::Link {
            row["target"] = folder.link(name).unwrap_or_default().to_string_lossy().into_owned().into();
        }
        rows.push(row);
        Ok(below.0.len() < depth)
    })
    .doing("list a folder")?;
    Ok(json!({ "path": path.text(), "data": rows, "has_more": more }))
}

/// What people call it.
pub fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Folder => "folder",
        Kind::File => "file",
        Kind::Link => "link",
        Kind::Other => "other",
    }
}
