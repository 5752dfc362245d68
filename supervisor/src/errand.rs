//! Small deeds in folders that tenants write: done by a child with the folder's uid, as confined as a cage, and told
//! in two numbers. Nothing there is ever listed, followed or removed with a right that its owner has not.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use gaoler_policy::landlock::{AccessClass, restrict_cage};
use gaoler_policy::seccomp::{CAGE, Threads};
use gaoler_sys::clone::{Child, Side, fork};
use gaoler_sys::process;
use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fchmod, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::fault::{Doing, Fault};
use crate::plan::{Ids, Plan};
use crate::uids::become_uid;

/// How deep folders may nest below a tenant's own. A look at a deeper one would cost more with each level: Landlock
/// walks up from it every time. So a measurement moves it up, and its tenant finds it there.
const DEPTH_MAX: usize = 500;
/// Where it is moved to: the workspace or the session, below `<tenant>/workspaces` or `<tenant>/sessions`.
const OWN: usize = 2;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// Everything below the folder is removed.
    Wipe,
    /// What it takes of the disk is summed, up to so many files.
    Measure(u64),
}

/// An errand under way.
#[derive(Debug)]
pub struct Errand {
    /// Who does it.
    pub child: Child,
    /// What it was sent for.
    pub deed: Deed,
    answer: OwnedFd,
}

/// What a folder takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on the disk.
    pub bytes: u64,
    /// Files and folders; the most there can be where folders nest too deep to count.
    pub files: u64,
}

impl Errand {
    /// Sends a child into a folder whose owner is this uid.
    ///
    /// # Errors
    /// Those of pipe(2) and clone(2).
    pub fn start(
        plan: &Plan,
        deed: Deed,
        folder: impl AsFd,
        uid: u32,
        wipe: impl FnOnce(),
    ) -> Result<Errand, Fault> {
        let (answer, told) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).doing("make a pipe")?;
        match fork(0, None).doing("fork for an errand")? {
            Side::Parent(child) => Ok(Errand { child, deed, answer }),
            Side::Child => {
                wipe();
                // On some hosts its owner can take every right from it, and would then never be measured nor wiped.
                let opened = |()| Ok(fchmod(&folder, Mode::S_IRWXU)?);
                let done = confine(plan, &folder, uid, &told).and_then(opened).and_then(|()| match deed {
                    Deed::Wipe => wiped(&folder).map(|()| Usage::default()),
                    Deed::Measure(files_max) => measured(&folder, files_max),
                });
                let Ok(usage) = done else { process::exit(1) };
                let words = [usage.bytes.to_le_bytes(), usage.files.to_le_bytes()].concat();
                process::exit(u8::from(File::from(told).write_all(&words).is_err()))
            }
        }
    }

    /// What it found, once its child has ended; `None` where it could not.
    pub fn answer(self) -> Option<Usage> {
        let mut words = [0; 16];
        File::from(self.answer).read_exact(&mut words).ok()?;
        let number = |at: usize| u64::from_le_bytes(words[at..at + 8].try_into().unwrap_or_default());
        Some(Usage { bytes: number(0), files: number(8) })
    }
}

fn confine(plan: &Plan, folder: &impl AsFd, uid: u32, told: &OwnedFd) -> std::io::Result<()> {
    let mut keep = [folder.as_fd().as_raw_fd(), told.as_raw_fd()];
    keep.sort_unstable();
    process::close_all_but(&keep)?;
    if plan.ids != Ids::Same {
        become_uid(uid)?;
    }
    process::die_with_parent()?;
    process::not_dumpable()?;
    process::drop_permitted()?;
    process::no_new_privs()?;
    if plan.landlock {
        restrict_cage(&[(folder.as_fd(), AccessClass::Full)], &[], Some(&[]))?;
    }
    CAGE.install(Threads::One)
}

/// A folder's entries but itself and its parent.
fn entries(folder: &impl AsFd) -> nix::Result<Vec<(CString, bool)>> {
    let mut list = Dir::openat(folder.as_fd(), ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let entry = |entry: nix::Result<nix::dir::Entry>| {
        let entry = entry.ok()?;
        let name: &CStr = entry.file_name();
        (name != c"." && name != c"..").then(|| (name.into(), entry.file_type() == Some(Type::Directory)))
    };
    Ok(list.iter().filter_map(entry).collect())
}

/// Opens a folder that we own, whatever its mode says.
fn enter(parent: &impl AsFd, name: &CStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(parent.as_fd(), name, flags, Mode::empty()) {
        Err(Errno::EACCES) => {
            nix::sys::stat::fchmodat(
                parent.as_fd(),
                name,
                Mode::S_IRWXU,
                nix::sys::stat::FchmodatFlags::FollowSymlink,
            )?;
            openat(parent.as_fd(), name, flags, Mode::empty())
        }
        opened => {
            let folder = opened?;
            let mode = Mode::from_bits_truncate(fstat(&folder)?.st_mode);
            // Without the right to pass through, what lies there has no size.
            if !mode.contains(Mode::S_IXUSR) {
                fchmod(&folder, mode | Mode::S_IXUSR)?;
            }
            Ok(folder)
        }
    }
}

/// Removes everything below a folder. A folder inside is emptied by moving its own folders up, next to it: no depth
/// costs more than as many steps.
fn wiped(top: &impl AsFd) -> std::io::Result<()> {
    let mut moved = 0u64;
    loop {
        let here = entries(top)?;
        if here.is_empty() {
            return Ok(());
        }
        for (name, _) in here {
            if unlinkat(top.as_fd(), &*name, UnlinkatFlags::NoRemoveDir).is_ok() {
                continue;
            }
            match unlinkat(top.as_fd(), &*name, UnlinkatFlags::RemoveDir) {
                Ok(()) => continue,
                Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::EACCES) => {}
                Err(errno) => return Err(errno.into()),
            }
            let folder = enter(top, &name)?;
            // Its owner may have made it read-only.
            fchmod(&folder, Mode::S_IRWXU)?;
            for (inner, _) in entries(&folder)? {
                if unlinkat(&folder, &*inner, UnlinkatFlags::NoRemoveDir).is_err() {
                    // To move a folder takes the right to write into it: its parent entry changes.
                    let _ = enter(&folder, &inner).and_then(|it| fchmod(&it, Mode::S_IRWXU));
                    moved += 1;
                    let name = format!(".gaoler-{moved}");
                    renameat(&folder, &*inner, top.as_fd(), name.as_str())?;
                }
            }
            unlinkat(top.as_fd(), &*name, UnlinkatFlags::RemoveDir)?;
        }
    }
}

/// Sums what lies below a folder. What goes away meanwhile is not counted, and what cannot be looked at is not ours.
fn measured(top: &impl AsFd, files_max: u64) -> std::io::Result<Usage> {
    let mut usage = Usage::default();
    let mut open: Vec<(OwnedFd, Vec<(CString, bool)>)> =
        vec![(top.as_fd().try_clone_to_owned()?, entries(top)?)];
    while let Some((folder, left)) = open.last_mut() {
        let Some((name, is_folder)) = left.pop() else {
            open.pop();
            continue;
        };
        usage.files += 1;
        if usage.files > files_max {
            return Ok(Usage { files: u64::MAX, ..usage });
        }
        if let Ok(found) = fstatat(&*folder, &*name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            // A file with several names is counted once for each: never too little.
            usage.bytes += found.st_blocks.max(0) as u64 * 512;
        }
        if is_folder && let Ok(inner) = enter(folder, &name) {
            if open.len() < DEPTH_MAX {
                let list = entries(&inner).unwrap_or_default();
                open.push((inner, list));
            } else if let Some(raised) = raise(&open, &name, &inner)
                && let Some((_, left)) = open.get_mut(OWN)
            {
                left.push((raised, true));
            } else {
                return Ok(Usage { files: u64::MAX, ..usage });
            }
        }
    }
    Ok(usage)
}

/// Moves a folder of the lowest open one up; its new name.
fn raise(open: &[(OwnedFd, Vec<(CString, bool)>)], name: &CStr, inner: &OwnedFd) -> Option<CString> {
    let ((own, _), (folder, _)) = (open.get(OWN)?, open.last()?);
    let raised = CString::new(format!(".gaoler-deep-{}", fstat(inner).ok()?.st_ino)).ok()?;
    // To move a folder takes the right to write into it, and into the one that it is in.
    [inner, folder].into_iter().try_for_each(|it| fchmod(it, Mode::S_IRWXU)).ok()?;
    renameat(folder, name, own, &*raised).ok()?;
    Some(raised)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t01_a_tree_is_measured_and_then_gone_however_deep_and_odd() {
        let dir = tempfile::tempdir().unwrap();
        let top = File::open(dir.path()).unwrap();
        std::fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        std::fs::write(dir.path().join("a/b/big"), vec![1; 1 << 20]).unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("a/link")).unwrap();
        use std::os::unix::fs::PermissionsExt;
        let closed = |mode| std::fs::set_permissions(dir.path().join("a/b"), PermissionsExt::from_mode(mode));
        closed(0o400).unwrap();
        let usage = measured(&top, 5000).unwrap();
        assert_eq!(usage.files, 5);
        assert!((1 << 20..2 << 20).contains(&usage.bytes), "{usage:?}");

        let mut folder: OwnedFd = top.try_clone().unwrap().into();
        for _ in 0..DEPTH_MAX + 20 {
            nix::sys::stat::mkdirat(&folder, "deep", Mode::S_IRWXU).unwrap();
            folder = enter(&folder, c"deep").unwrap();
        }
        // One of them is met twice: where it was, and where it is now.
        assert_eq!(measured(&top, 5000).unwrap().files, 5 + DEPTH_MAX as u64 + 20 + 1);
        assert_eq!(measured(&top, 5000).unwrap().files, 5 + DEPTH_MAX as u64 + 20);
        assert_eq!(measured(&top, 500).unwrap().files, u64::MAX);
        let raised = std::fs::read_dir(dir.path().join("deep/deep")).unwrap();
        let raised: Vec<_> = raised.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
        assert!(raised.len() == 2 && raised.iter().any(|it| it.starts_with(".gaoler-deep-")), "{raised:?}");
        closed(0o000).unwrap();
        wiped(&top).unwrap();
        assert!(entries(&top).unwrap().is_empty());
        assert!(std::path::Path::new("/etc/passwd").exists());
    }
}
