//! What may still be written: bytes and files that are left of the tenant's part of the disk.
//! It must never let a writer past it; the supervisor measures the same from outside, later and more roughly.

use std::io::Result;

use gaoler_files::Code;

use crate::beneath::Folder;
use crate::failure::{Doing, Failed, Told};

/// What is left.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    bytes: u64,
    files: u64,
}

impl Budget {
    /// What is left of this much, with what is below this folder.
    pub fn left(top: &Folder, bytes: u64, files: u64) -> std::result::Result<Budget, Failed> {
        let (taken, entries) = usage(top)?;
        Ok(Budget { bytes: bytes.saturating_sub(taken), files: files.saturating_sub(entries) })
    }

    /// Takes so many bytes of it.
    pub fn bytes(&mut self, count: u64) -> Result<()> {
        let full = || {
            Told::io(Code::Full, "There is no room for it on your part of the disk; remove something first.")
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

/// Bytes on the disk, and files and folders, below a folder.
pub fn usage(top: &Folder) -> std::result::Result<(u64, u64), Failed> {
    let (mut bytes, mut entries) = (0u64, 0u64);
    top.walk(&mut |_, _, _, found| {
        bytes = bytes.saturating_add(found.disk_bytes);
        entries += 1;
        Ok(true)
    })
    .doing("measure what is there")?;
    Ok((bytes, entries))
}
