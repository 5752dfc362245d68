//! What may still be written: bytes and files that are left of the tenant's part of the disk.
//! It must never let a writer past it; the supervisor measures the same from outside, later and more roughly.

use std::io::Result;

use gaoler_files::Code;

use crate::beneath::{Folder, Kind};
use crate::failure::{Doing, Failed, Told};

/// What is left.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    bytes: u64,
    files: u64,
}

impl Budget {
    /// What is left of this much, with what this folder takes.
    pub fn left(top: &Folder, bytes: u64, files: u64) -> std::result::Result<Budget, Failed> {
        let (taken, entries) = whole(top)?;
        Ok(Budget { bytes: bytes.saturating_sub(taken), files: files.saturating_sub(entries) })
    }

    /// Takes so many bytes of it.
    pub fn bytes(&mut self, count: u64) -> Result<()> {
        let full = || {
            Told::io(
                Code::Full,
                "There is no room for it on your part of the disk, which your workspaces and sessions share; remove something first.",
            )
        };
        self.bytes = self.bytes.checked_sub(count).ok_or_else(full)?;
        Ok(())
    }

    /// Takes a file or folder of it, which costs a block.
    pub fn file(&mut self) -> Result<()> {
        let full =
            || Told::io(Code::Full, "You have as many files and folders as you may have; remove some first.");
        self.files = self.files.checked_sub(1).ok_or_else(full)?;
        Ok(())
    }
}

/// The same with the folder itself.
pub fn whole(top: &Folder) -> std::result::Result<(u64, u64), Failed> {
    let (bytes, entries) = usage(top)?;
    Ok((bytes.saturating_add(top.own().doing("look at the own folder")?.disk_bytes), entries + 1))
}

/// Folders within each other that are looked into, as many descriptors are open then. Whoever nests deeper is ended by the
/// supervisor, which moves what is there up.
const DEPTH_MAX: usize = 1000;

/// Bytes on the disk, and files and folders, below a folder: every entry of any kind, folders too, each name of a file
/// for itself, as the supervisor counts them. It keeps the names of folders alone: there may be a million files.
pub fn usage(top: &Folder) -> std::result::Result<(u64, u64), Failed> {
    let (mut bytes, mut entries) = (0u64, 0u64);
    let mut look = |folder: &Folder| {
        let mut folders = Vec::new();
        let seen = folder.each(&mut |name| {
            // It may have gone meanwhile.
            if let Some(found) = folder.look(name)? {
                bytes = bytes.saturating_add(found.disk_bytes);
                entries += 1;
                if found.kind == Kind::Folder {
                    folders.push(name.to_owned());
                }
            }
            Ok(true)
        });
        seen.map(|()| folders)
    };
    let below = look(top).doing("measure what is there")?;
    let mut open = vec![(None::<Folder>, below)];
    while let Some((folder, left)) = open.last_mut() {
        let Some(name) = left.pop() else {
            open.pop();
            continue;
        };
        let Ok(inner) = folder.as_ref().unwrap_or(top).enter(&name) else { continue };
        if open.len() < DEPTH_MAX
            && let Ok(below) = look(&inner)
        {
            open.push((Some(inner), below));
        }
    }
    Ok((bytes, entries))
}
