//! Folders by their descriptors: every step is one name, and no step follows a link.
//! It must never open a path of more than one name, except for the own folder that it begins with.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Result;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, Instant};

use gaoler_files::{Code, DEPTH_MAX};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};

use crate::failure::{Failed, failed};

/// How deep a walk goes: as many descriptors are open then, and a cage has some thousands.
const WALK_DEPTH_MAX: usize = 1000;
/// What removes without a bound of time tries for so long at once, and then again.
const REMOVAL_PIECE: Duration = Duration::from_secs(60);
/// A folder's mode, and a file's.
const FOLDER: Mode = Mode::from_bits_truncate(0o755);

/// An open folder.
#[derive(Debug)]
pub struct Folder(OwnedFd);

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Folder,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
    /// A pipe, a socket or a device.
    Other,
}

/// What an entry's inode says.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    /// What it is.
    pub kind: Kind,
    /// Its length.
    pub bytes: u64,
    /// What it takes of the disk.
    pub disk_bytes: u64,
    /// Seconds since 1970 of its last change.
    pub modified: i64,
    /// The same, and never later than its inode was changed: its owner may set the one to any time, and not the other.
    pub used: i64,
    /// Whether its owner may execute it.
    pub executable: bool,
    /// Whether its owner may read it.
    pub readable: bool,
}

impl From<FileStat> for Found {
    fn from(stat: FileStat) -> Found {
        let kind = match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFDIR => Kind::Folder,
            SFlag::S_IFREG => Kind::File,
            SFlag::S_IFLNK => Kind::Link,
            _ => Kind::Other,
        };
        Found {
            kind,
            bytes: stat.st_size.max(0) as u64,
            disk_bytes: stat.st_blocks.max(0) as u64 * 512,
            modified: stat.st_mtime,
            used: stat.st_mtime.min(stat.st_ctime),
            executable: stat.st_mode & 0o100 != 0,
            readable: stat.st_mode & 0o400 != 0,
        }
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Folder {
    /// The folder that everything is below.
    pub fn open(path: &str) -> Result<Folder> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Folder(nix::fcntl::open(path, flags, Mode::empty())?))
    }

    /// One of its folders. One that its owner closed to itself is opened again.
    pub fn enter(&self, name: &OsStr) -> Result<Folder> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        match openat(&self.0, name, flags, Mode::empty()) {
            // Not every host says the same of a link; and its target is not what is to be opened.
            Err(errno) if self.look(name)?.is_some_and(|found| found.kind != Kind::Folder) => {
                Err(if errno == Errno::ELOOP { errno } else { Errno::ENOTDIR }.into())
            }
            Err(Errno::EACCES) => {
                fchmodat(&self.0, name, Mode::S_IRWXU, FchmodatFlags::FollowSymlink)?;
                Ok(Folder(openat(&self.0, name, flags, Mode::empty())?))
            }
            opened => Ok(Folder(opened?)),
        }
    }

    /// One of its folders, made if it is missing; whether it was.
    pub fn make(&self, name: &OsStr) -> Result<(Folder, bool)> {
        let made = match mkdirat(&self.0, name, FOLDER) {
            Ok(()) => true,
            Err(Errno::EEXIST) => false,
            Err(errno) => return Err(errno.into()),
        };
        Ok((self.enter(name)?, made))
    }

    /// A file of it, to be read. One that its owner closed to itself is opened all the same, and stays as closed as it was.
    pub fn read(&self, name: &OsStr) -> Result<File> {
        // A pipe would wait for a writer: it is opened without waiting, and then refused for what it is.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        match openat(&self.0, name, flags, Mode::empty()) {
            Err(Errno::EACCES) => {
                let stat = fstatat(&self.0, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
                    return Err(Errno::EACCES.into());
                }
                let mode = Mode::from_bits_truncate(stat.st_mode);
                fchmodat(&self.0, name, mode | Mode::S_IRUSR, FchmodatFlags::FollowSymlink)?;
                let opened = openat(&self.0, name, flags, Mode::empty())?;
                nix::sys::stat::fchmod(&opened, mode)?;
                Ok(opened.into())
            }
            opened => Ok(opened?.into()),
        }
    }

    /// A new file of it.
    pub fn create(&self, name: &OsStr, executable: bool) -> Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let mode = Mode::from_bits_truncate(if executable { 0o755 } else { 0o644 });
        Ok(openat(&self.0, name, flags, mode)?.into())
    }

    /// What an entry is; `None` where there is none.
    pub fn look(&self, name: &OsStr) -> Result<Option<Found>> {
        match fstatat(&self.0, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat.into())),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What the folder itself is.
    pub fn own(&self) -> Result<Found> {
        Ok(fstat(&self.0)?.into())
    }

    /// Its entries, by their names.
    pub fn names(&self) -> Result<Vec<OsString>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut list = Dir::openat(&self.0, ".", flags, Mode::empty())?;
        let name = |entry: nix::dir::Entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        let mut names: Vec<OsString> =
            list.iter().map(|entry| entry.map(name)).collect::<nix::Result<_>>()?;
        names.retain(|name| name != "." && name != "..");
        names.sort_unstable();
        Ok(names)
    }

    /// Tells its entries' names one after another, in no order, and keeps none of them: there may be a million. What says
    /// no ends it.
    pub fn each(&self, tell: &mut dyn FnMut(&OsStr) -> Result<bool>) -> Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut list = Dir::openat(&self.0, ".", flags, Mode::empty())?;
        for entry in list.iter() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." && !tell(name)? {
                break;
            }
        }
        Ok(())
    }

    /// Where a link says that it leads.
    pub fn link(&self, name: &OsStr) -> Result<OsString> {
        Ok(readlinkat(&self.0, name)?)
    }

    /// Makes a link.
    pub fn make_link(&self, name: &OsStr, target: &OsStr) -> Result<()> {
        Ok(symlinkat(target, &self.0, name)?)
    }

    /// Moves an entry into another folder, over what is there.
    pub fn rename(&self, name: &OsStr, to: &Folder, new: &OsStr) -> Result<()> {
        Ok(renameat(&self.0, name, &to.0, new)?)
    }

    /// Removes an entry that is no folder.
    pub fn unlink(&self, name: &OsStr) -> Result<()> {
        Ok(unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir)?)
    }

    /// Removes an entry with all that is below it, however deep: what lies in an inner folder is moved up first.
    pub fn remove(&self, name: &OsStr) -> Result<()> {
        while !self.remove_until(name, Instant::now() + REMOVAL_PIECE)? {}
        Ok(())
    }

    /// The same until then; whether it is gone.
    pub fn remove_until(&self, name: &OsStr, until: Instant) -> Result<bool> {
        match unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => return Ok(true),
            Err(Errno::EISDIR | Errno::EPERM | Errno::EACCES) => {}
            Err(errno) => return Err(errno.into()),
        }
        let gone = self.enter(name)?.clear_until(until)?;
        if gone {
            unlinkat(&self.0, name, UnlinkatFlags::RemoveDir)?;
        }
        Ok(gone)
    }

    /// Removes everything in it, until then; whether it is empty. A look at it keeps no names: there may be a million.
    fn clear_until(&self, until: Instant) -> Result<bool> {
        let (mut moved, mut late) = (0u64, false);
        self.open_to_owner()?;
        loop {
            let mut seen = false;
            self.each(&mut |name| {
                seen = true;
                if unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir).is_err() {
                    late = !self.dissolve(name, until, &mut moved)?;
                }
                late |= Instant::now() >= until;
                Ok(!late)
            })?;
            if late || !seen {
                return Ok(!late);
            }
        }
    }

    /// Removes one of its folders and the files in it; folders in it are moved up, next to it. Whether there was time.
    fn dissolve(&self, name: &OsStr, until: Instant, moved: &mut u64) -> Result<bool> {
        let inner = self.enter(name)?;
        inner.open_to_owner()?;
        let mut late = false;
        loop {
            let mut seen = false;
            inner.each(&mut |below| {
                seen = true;
                if unlinkat(&inner.0, below, UnlinkatFlags::NoRemoveDir).is_err() {
                    // To move a folder takes the right to write into it: its parent entry changes.
                    inner.enter(below).and_then(|it| it.open_to_owner())?;
                    self.take_in(&inner, below, moved)?;
                }
                late = Instant::now() >= until;
                Ok(!late)
            })?;
            if late {
                return Ok(false);
            }
            if !seen {
                break;
            }
        }
        unlinkat(&self.0, name, UnlinkatFlags::RemoveDir)?;
        Ok(true)
    }

    /// Moves an entry of a folder here, under a name that nothing has yet: an earlier removal may have been cut off.
    fn take_in(&self, from: &Folder, name: &OsStr, moved: &mut u64) -> Result<()> {
        loop {
            *moved += 1;
            let new = format!(".gaoler-{moved}");
            if self.look(OsStr::new(&new))?.is_none() {
                return from.rename(name, self, OsStr::new(&new));
            }
        }
    }

    /// Gives its owner every right to it.
    pub fn open_to_owner(&self) -> Result<()> {
        Ok(nix::sys::stat::fchmod(&self.0, Mode::S_IRWXU)?)
    }

    /// Locks it, if nobody else holds it; `None` where somebody does.
    pub fn lock(&self, how: FlockArg) -> Result<Option<Flock<OwnedFd>>> {
        match Flock::lock(self.0.try_clone()?, how) {
            Ok(held) => Ok(Some(held)),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }

    /// Visits everything below it, each folder before what is in it. The visitor says whether to go into a folder.
    pub fn walk(
        &self,
        visit: &mut dyn FnMut(&Folder, &OsStr, &Relative, Found) -> Result<bool>,
    ) -> Result<()> {
        let mut open = vec![(Folder(self.0.try_clone()?), self.names()?.into_iter())];
        let mut path = Relative(Vec::new());
        while let Some((folder, names)) = open.last_mut() {
            let Some(name) = names.next() else {
                open.pop();
                path.0.pop();
                continue;
            };
            // It may have gone meanwhile.
            let Some(found) = folder.look(&name)? else { continue };
            path.0.push(name.clone());
            let goes_in = visit(folder, &name, &path, found)? && found.kind == Kind::Folder;
            let inner = if goes_in && open.len() < WALK_DEPTH_MAX {
                let (folder, _) = &open[open.len() - 1];
                folder.enter(&name).and_then(|inner| Ok((inner.names()?, inner))).ok()
            } else {
                None
            };
            match inner {
                Some((names, folder)) => open.push((folder, names.into_iter())),
                None => {
                    path.0.pop();
                }
            }
        }
        Ok(())
    }
}

/// A path below a folder: names that are neither empty nor `.` nor `..`.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Relative(pub Vec<OsString>);

impl Relative {
    /// A path of an address, with percent signs. Empty for the folder itself.
    pub fn of_address(path: &str) -> std::result::Result<Relative, Failed> {
        let bytes: Vec<u8> = percent_encoding::percent_decode_str(path).collect();
        Relative::of(&bytes).ok_or_else(|| {
            let message = "path: must be names with slashes between them, below the workspace, none of them `.` or `..`.";
            failed(Code::Path, message)
        })
    }

    /// A path in bytes; `None` for one that leads elsewhere. A slash at its end, and `./` before it, mean nothing.
    pub fn of(bytes: &[u8]) -> Option<Relative> {
        let mut bytes = bytes.strip_suffix(b"/").unwrap_or(bytes);
        while let Some(rest) = bytes.strip_prefix(b"./") {
            bytes = rest;
        }
        if bytes.is_empty() || bytes == b"." {
            return Some(Relative::default());
        }
        let fits = |name: &&[u8]| {
            (1..=255).contains(&name.len()) && *name != b"." && *name != b".." && !name.contains(&0)
        };
        let names: Vec<&[u8]> = bytes.split(|&b| b == b'/').collect();
        if names.len() > DEPTH_MAX || bytes.len() > 4095 || !names.iter().all(fits) {
            return None;
        }
        Some(Relative(names.into_iter().map(|name| OsString::from_vec(name.to_vec())).collect()))
    }

    /// Its last name, and what is before it.
    pub fn split(&self) -> Option<(&[OsString], &OsStr)> {
        self.0.split_last().map(|(last, before)| (before, last.as_os_str()))
    }

    /// The folder that it is in, below this one.
    pub fn folder(&self, top: &Folder) -> Result<Option<Folder>> {
        let Some((before, _)) = self.split() else { return Ok(None) };
        steps(top, before).map(Some)
    }

    /// Its bytes, with slashes.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.iter().map(|name| name.as_bytes()).collect::<Vec<_>>().join(&b'/')
    }

    /// For people, and for programs where all of it is text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }
}

/// The folder behind these names.
pub fn steps(top: &Folder, names: &[OsString]) -> Result<Folder> {
    let mut at = Folder(top.0.try_clone()?);
    for name in names {
        at = at.enter(name)?;
    }
    Ok(at)
}

/// The same, each folder made if it is missing; how many were.
pub fn make_steps(top: &Folder, names: &[OsString]) -> Result<(Folder, u64)> {
    let (mut at, mut count) = (Folder(top.0.try_clone()?), 0);
    for name in names {
        let (next, made) = at.make(name)?;
        (at, count) = (next, count + u64::from(made));
    }
    Ok((at, count))
}

/// Whether this errno says that a path is not there, or leads through what is no folder.
pub fn is_missing(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP))
}

/// Whether something else is in the way.
pub fn is_in_the_way(error: &std::io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOTDIR | Errno::ELOOP | Errno::EISDIR | Errno::EEXIST | Errno::ENOTEMPTY))
}
