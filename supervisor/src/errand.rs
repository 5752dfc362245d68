//! Small deeds in folders that tenants write: done by a child with the folder's uid, as confined as a cage, and told
//! in three numbers. Nothing there is ever listed, followed or removed with a right that its owner has not.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use gaoler_policy::landlock::{AccessClass, restrict_cage};
use gaoler_policy::seccomp::{CAGE, Threads};
use gaoler_sys::clone::{Child, Side, fork};
use gaoler_sys::{channel, memfd, process};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat, renameat};
use nix::sys::socket::{UnixAddr, getsockname};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat, fstatat, major, minor};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::cgroup::{listed, read_at};
use crate::fault::{Doing, Fault};
use crate::plan::{Ids, Plan};
use crate::uids::become_uid;

/// How deep folders may nest below a tenant's own. A look at a deeper one would cost more with each level: Landlock
/// walks up from it every time. So a measurement moves it up, and its tenant finds it there.
const DEPTH_MAX: usize = 500;
/// Where it is moved to: the workspace or the session, below `<tenant>/workspaces` or `<tenant>/sessions`.
const OWN: usize = 2;
/// What its name begins with there.
const RAISED: &str = ".gaoler-deep-";
/// Bytes that an errand may take: it holds one piece of a list a level, whatever lies in the folders.
const DATA_BYTES: u64 = 128 << 20;

/// Descriptors and mappings that are looked at, at most: a second's work. More than any program known has; who has more
/// counts as one who has too many files.
const LOOKED_MAX: u32 = 500_000;
/// What kcmp(2) calls what two tasks may have in common.
const KCMP_VM: i32 = 1;
const KCMP_FILES: i32 = 2;
/// Where in a line of /proc/<pid>/maps the device begins, at the latest: after two addresses, the rights and the offset.
const MAPS_DEVICE_WITHIN: usize = 60;

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
    /// Of those, such as are on their way in a socket, where nobody can look at them.
    pub flying: u64,
}

impl Usage {
    /// Of so many bytes and files.
    pub const fn of(bytes: u64, files: u64) -> Usage {
        Usage { bytes, files, flying: 0 }
    }

    /// Whether no more than so many times the reserve is left.
    pub fn within(self, reserve: Usage, times: u64) -> bool {
        self.bytes < reserve.bytes * times || self.files < reserve.files * times
    }

    /// The same with this.
    pub fn and(self, other: Usage) -> Usage {
        Usage {
            bytes: self.bytes.saturating_add(other.bytes),
            files: self.files.saturating_add(other.files),
            flying: self.flying.saturating_add(other.flying),
        }
    }
}

impl Errand {
    /// Sends a child into a folder whose owner is this uid. What it does before it is confined is to overwrite what
    /// is not its own, and may be to look at what the folder's runs hold: it is added to what it finds. Where root may
    /// not look at another's processes (a container's), it looks as their owner.
    ///
    /// # Errors
    /// Those of pipe(2) and clone(2).
    pub fn start(
        plan: &Plan,
        deed: Deed,
        folder: impl AsFd,
        uid: u32,
        mut first: impl FnMut() -> nix::Result<Usage>,
    ) -> Result<Errand, Fault> {
        let (answer, told) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).doing("make a pipe")?;
        match fork(0, None).doing("fork for an errand")? {
            Side::Parent(child) => Ok(Errand { child, deed, answer }),
            Side::Child => {
                // Its parent's end is its own also while it is root.
                let bounded =
                    process::limit(libc::RLIMIT_DATA, DATA_BYTES).and_then(|()| process::die_with_parent());
                let mut root = plan.ids != Ids::Same;
                let looked = bounded.and_then(|()| {
                    Ok(first().or_else(|_| {
                        std::mem::take(&mut root).then(|| become_uid(uid)).transpose().and_then(|_| first())
                    })?)
                });
                let Ok(held) = looked else { process::exit(1) };
                // On some hosts its owner can take every right from it, and would then never be measured nor wiped.
                // gVisor takes its owner for another before it has been asked about it.
                let opened = |()| match fstat(&folder)?.st_mode & libc::S_IRWXU {
                    libc::S_IRWXU => Ok(()),
                    _ => Ok(fchmod(&folder, Mode::S_IRWXU)?),
                };
                let done =
                    confine(plan, &folder, root.then_some(uid), &told).and_then(opened).and_then(|()| {
                        match deed {
                            Deed::Wipe => wiped(&folder).map(|()| Usage::default()),
                            Deed::Measure(files_max) => measured(&folder, files_max),
                        }
                    });
                let Ok(usage) = done.map(|usage| usage.and(held)) else { process::exit(1) };
                let words = [usage.bytes, usage.files, usage.flying].map(u64::to_le_bytes).concat();
                process::exit(u8::from(File::from(told).write_all(&words).is_err()))
            }
        }
    }

    /// What it found, once its child has ended; `None` where it could not.
    pub fn answer(self) -> Option<Usage> {
        let mut words = [0; 24];
        File::from(self.answer).read_exact(&mut words).ok()?;
        let number = |at: usize| u64::from_le_bytes(words[at..at + 8].try_into().unwrap_or_default());
        Some(Usage { bytes: number(0), files: number(8), flying: number(16) })
    }
}

/// What these tasks hold on this device that has no name: open or mapped files, the folders that they are in, the
/// programs that they run. Each counts once, whoever else holds it.
///
/// # Errors
/// A task that may not be looked at.
pub fn held(proc_fd: BorrowedFd<'_>, tasks: &[i32], device: u64) -> nix::Result<Usage> {
    let (mut usage, mut met, mut looked) = (Usage::default(), BTreeSet::new(), 0);
    let mut look = |task: i32, part: &str, usage: &mut Usage| {
        looked += 1;
        if looked > LOOKED_MAX {
            return Err(Errno::EOVERFLOW);
        }
        let path = format!("{task}/{part}");
        let Some(found) = unless_gone(fstatat(proc_fd, path.as_str(), AtFlags::empty()))? else {
            return Ok(());
        };
        // gVisor tells it in the name alone.
        let deleted =
            || readlinkat(proc_fd, path.as_str()).is_ok_and(|name| name.as_bytes().ends_with(b" (deleted)"));
        let mut is_new = |it: &FileStat| met.insert((it.st_dev, it.st_ino));
        let is_unnamed = |it: &FileStat| it.st_dev == device && it.st_nlink == 0;
        let bytes = |it: &FileStat| it.st_blocks.max(0) as u64 * 512;
        let unnamed = is_unnamed(&found) || (found.st_dev == device && deleted());
        // Only a unix socket's line tells this. It also holds the place that it was bound to, which may have no name.
        let is_socket = found.st_mode & libc::S_IFMT == libc::S_IFSOCK;
        let flying = is_socket.then(|| scm_fds(proc_fd, task, &part.replace("fd/", "fdinfo/"))).flatten();
        if (!unnamed && flying.is_none()) || !is_new(&found) {
            return Ok(());
        }
        let (own, files) = (if unnamed { bytes(&found) } else { 0 }, flying.unwrap_or(0));
        let waits = if files > 0 { on_their_way(proc_fd, task, part, files) } else { Some(Vec::new()) };
        let seen = waits.iter().flatten().filter(|it| is_unnamed(it) && is_new(it)).map(bytes).sum::<u64>();
        let flying = if waits.is_some() { 0 } else { files };
        *usage = usage.and(Usage { bytes: own.saturating_add(seen), files: 1 + files, flying });
        Ok(())
    };
    let mut all = || {
        for (at, task) in tasks.iter().enumerate() {
            look(*task, "cwd", &mut usage)?;
            look(*task, "exe", &mut usage)?;
            // The threads of a program come one after another, and what they have in common is looked at once.
            let is_new = |what| at == 0 || !process::share(tasks[at - 1], *task, what);
            let mut each = |part: &str, usage: &mut Usage| -> nix::Result<()> {
                let names = unless_gone(listed(proc_fd, &format!("{task}/{part}")))?.unwrap_or_default();
                names.iter().try_for_each(|name| look(*task, &format!("{part}/{name}"), usage))
            };
            if is_new(KCMP_FILES) {
                each("fd", &mut usage)?;
            }
            if is_new(KCMP_VM) {
                match each("map_files", &mut usage) {
                    Err(Errno::EPERM) => {
                        let flying = mapped(proc_fd, *task)?;
                        usage = usage.and(Usage { bytes: 0, files: flying, flying });
                    }
                    looked => looked?,
                }
            }
        }
        Ok(())
    };
    match all() {
        Err(Errno::EOVERFLOW) => Ok(Usage::of(0, u64::MAX)),
        done => done.map(|()| usage),
    }
}

/// How many descriptors are on their way to a unix socket; `None` of anything else.
fn scm_fds(proc_fd: BorrowedFd<'_>, task: i32, info: &str) -> Option<u64> {
    let told = read_at(proc_fd, &format!("{task}/{info}")).ok()?;
    told.lines().find_map(|line| line.strip_prefix("scm_fds:"))?.trim().parse().ok()
}

/// What is on its way to a task's socket, where all of it was seen: so many different files as there are descriptors,
/// and nothing to which more is on its way.
fn on_their_way(proc_fd: BorrowedFd<'_>, task: i32, part: &str, number: u64) -> Option<Vec<FileStat>> {
    let socket = process::copy_of(task, part.strip_prefix("fd/")?.parse().ok()?).ok()?;
    let fds = channel::on_their_way(socket.as_fd(), usize::try_from(number).ok()?).ok()?;
    let found: Vec<FileStat> = fds.iter().filter_map(|fd| fstat(fd).ok()).collect();
    let different: BTreeSet<_> = found.iter().map(|it| (it.st_dev, it.st_ino)).collect();
    let own = std::process::id().cast_signed();
    // A unix socket that does not tell may hold anything.
    let empty = |fd: &OwnedFd| match getsockname::<UnixAddr>(fd.as_raw_fd()) {
        Ok(_) => scm_fds(proc_fd, own, &format!("fdinfo/{}", fd.as_raw_fd())) == Some(0),
        Err(_) => true,
    };
    let more = !fds.iter().all(empty);
    (different.len() as u64 == number && !more).then_some(found)
}

/// Files without a name that a task has mapped, where only the host's root may follow a mapping: how large they are nobody can
/// say. What the kernel keeps of shared memory is none.
fn mapped(proc_fd: BorrowedFd<'_>, task: i32) -> nix::Result<u64> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let Some(maps) = unless_gone(openat(proc_fd, format!("{task}/maps").as_str(), flags, Mode::empty()))?
    else {
        return Ok(0);
    };
    // Its name could be anybody's; its device is the kernel's own.
    let memory = fstat(memfd::sealed("maps", b"").map_err(|_| Errno::ENOMEM)?)?.st_dev;
    let memory = format!(" {:02x}:{:02x} ", major(memory), minor(memory));
    let is_memory =
        |line: &[u8]| line.windows(memory.len()).take(MAPS_DEVICE_WITHIN).any(|it| it == memory.as_bytes());
    let lines = BufReader::new(File::from(maps)).split(b'\n').map_while(std::result::Result::ok);
    Ok(lines.filter(|line| line.ends_with(b" (deleted)") && !is_memory(line)).count() as u64)
}

fn confine(plan: &Plan, folder: &impl AsFd, uid: Option<u32>, told: &OwnedFd) -> std::io::Result<()> {
    let mut keep = [folder.as_fd().as_raw_fd(), told.as_raw_fd()];
    keep.sort_unstable();
    process::close_all_but(&keep)?;
    if let Some(uid) = uid {
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

/// Opens a folder's list. Its owner may, and does, without a trace: nobody is to see how far a measurement has come.
fn list(folder: &impl AsFd) -> nix::Result<Dir> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOATIME;
    Dir::openat(folder.as_fd(), ".", flags, Mode::empty())
}

/// The next entry but the folder itself and its parent.
fn next(list: &mut Dir) -> Option<CString> {
    loop {
        // The list goes on where it was: an iterator that is dropped winds it back.
        let entry = ManuallyDrop::new(list.iter()).next()?.ok()?;
        if ![c".", c".."].contains(&entry.file_name()) {
            return Some(entry.file_name().into());
        }
    }
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
        // A list may pass over what comes or goes meanwhile, so lists are read until there is nothing in one.
        let (mut here, mut empty) = (list(top)?, true);
        while let Some(name) = next(&mut here) {
            empty = false;
            if unlinkat(top.as_fd(), &*name, UnlinkatFlags::NoRemoveDir).is_ok() {
                continue;
            }
            match unlinkat(top.as_fd(), &*name, UnlinkatFlags::RemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => continue,
                Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::EACCES) => {}
                Err(errno) => return Err(errno.into()),
            }
            let folder = enter(top, &name)?;
            // Its owner may have made it read-only.
            fchmod(&folder, Mode::S_IRWXU)?;
            let mut inners = list(&folder)?;
            while let Some(inner) = next(&mut inners) {
                if unlinkat(&folder, &*inner, UnlinkatFlags::NoRemoveDir).is_err() {
                    // To move a folder takes the right to write into it: its parent entry changes.
                    let _ = enter(&folder, &inner).and_then(|it| fchmod(&it, Mode::S_IRWXU));
                    moved += 1;
                    let name = format!(".gaoler-{moved}");
                    renameat(&folder, &*inner, top.as_fd(), name.as_str())?;
                }
            }
        }
        if empty {
            return Ok(());
        }
    }
}

/// Sums what lies below a folder. What goes away meanwhile is not counted; where something is kept from being looked
/// at, there is no sum.
fn measured(top: &impl AsFd, files_max: u64) -> std::io::Result<Usage> {
    let mut usage = Usage::default();
    let mut raised = BTreeSet::new();
    let mut open = vec![list(top)?];
    loop {
        let at_own = open.len() == OWN + 1;
        let Some(folder) = open.last_mut() else { return Ok(usage) };
        let name = match next(folder) {
            // Those have their turn when the list is at its end, once each.
            Some(name) if at_own && name.to_bytes().starts_with(RAISED.as_bytes()) => {
                raised.insert(name);
                continue;
            }
            Some(name) => name,
            None => match at_own.then(|| raised.pop_first()).flatten() {
                Some(name) => name,
                None => {
                    open.pop();
                    continue;
                }
            },
        };
        usage.files += 1;
        if usage.files > files_max {
            return Ok(Usage { files: u64::MAX, ..usage });
        }
        let look = |folder: &Dir| fstatat(folder, &*name, AtFlags::AT_SYMLINK_NOFOLLOW);
        let found = match look(folder) {
            // Its owner has shut the folder meanwhile.
            Err(Errno::EACCES) => fchmod(&*folder, Mode::S_IRWXU).and_then(|()| look(folder)),
            found => found,
        };
        let Some(found) = unless_gone(found)? else { continue };
        // A file with several names is counted once for each: never too little. A folder counts as it is, also where
        // it has grown and is empty again.
        usage.bytes += found.st_blocks.max(0) as u64 * 512;
        if found.st_mode & libc::S_IFMT == libc::S_IFDIR
            && let Some(inner) = unless_gone(enter(folder, &name))?
        {
            if open.len() < DEPTH_MAX {
                open.extend(unless_gone(list(&inner))?);
            } else if list(&inner).is_ok_and(|mut list| next(&mut list).is_none()) {
                // There is nothing deeper, and somebody may be about to enter it by its name.
            } else if let Some(name) = raise(&open, &name, &inner) {
                raised.insert(name);
            } else {
                return Ok(Usage { files: u64::MAX, ..usage });
            }
        }
    }
}

/// What was found, if there was anything: another may stand where a folder was, and a task may have ended.
fn unless_gone<T>(found: nix::Result<T>) -> nix::Result<Option<T>> {
    match found {
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ESRCH) => Ok(None),
        found => found.map(Some),
    }
}

/// Moves a folder of the lowest open one up; its new name.
fn raise(open: &[Dir], name: &CStr, inner: &OwnedFd) -> Option<CString> {
    let (own, folder) = (open.get(OWN)?, open.last()?);
    let raised = CString::new(format!("{RAISED}{}", fstat(inner).ok()?.st_ino)).ok()?;
    // To move a folder takes the right to write into it, and into the one that it is in.
    [inner.as_fd(), folder.as_fd()].into_iter().try_for_each(|it| fchmod(it, Mode::S_IRWXU)).ok()?;
    renameat(folder, name, own, &*raised).ok()?;
    Some(raised)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

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
        assert_eq!(next(&mut list(&top).unwrap()), None);
        assert!(std::path::Path::new("/etc/passwd").exists());
    }

    /// A folder on a disk, and what this process holds there without a name.
    fn place() -> (tempfile::TempDir, impl Fn() -> Usage) {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let device = std::fs::metadata(dir.path()).unwrap().dev();
        let proc = File::open("/proc").unwrap();
        let own = std::process::id().cast_signed();
        (dir, move || held(proc.as_fd(), &[own, own], device).unwrap())
    }

    #[test]
    fn t02_what_a_process_holds_without_a_name_counts_once_and_what_has_one_does_not() {
        let (dir, held) = place();
        let before = held();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        let again = file.try_clone().unwrap();
        assert_eq!(held().files, before.files, "it has a name");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(held(), before.and(Usage { bytes: 1 << 20, files: 1, flying: 0 }));
        // A folder that has been large, and has neither entries nor a name.
        let folder = dir.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        let names = || (0..2000).map(|n| folder.join(format!("{n:0200}")));
        names().for_each(|name| std::fs::write(name, "").unwrap());
        names().for_each(|name| std::fs::remove_file(name).unwrap());
        let large = measured(&File::open(dir.path()).unwrap(), 5000).unwrap();
        assert!(large.files == 1 && large.bytes > 200_000, "{large:?}");
        let open = File::open(&folder).unwrap();
        std::fs::remove_dir(&folder).unwrap();
        assert!(held().bytes >= before.bytes + (1 << 20) + large.bytes, "{:?} {large:?}", held());
        drop((file, again, open));
        assert_eq!(held(), before);
    }

    #[test]
    fn t03_what_is_on_its_way_is_looked_at_where_it_waits_and_goes_on_waiting() {
        use std::os::unix::net::{UnixDatagram, UnixStream};
        let (dir, held) = place();
        let nameless = |mib: usize| {
            let path = dir.path().join("file");
            std::fs::write(&path, vec![1; mib << 20]).unwrap();
            let file = File::open(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            file
        };
        let found = |bytes: u64, files| Usage::of(bytes << 20, files);
        let send = |to: BorrowedFd<'_>, fds: &[BorrowedFd<'_>]| channel::send(to, b"x", fds).unwrap();

        // Packets: what has a name weighs nothing, the rest what it is, however often it is looked at.
        let (one, other) = UnixDatagram::pair().unwrap();
        let quiet = held();
        send(one.as_fd(), &[dir_fd("/proc".as_ref()).as_fd(), dir_fd(dir.path()).as_fd()]);
        send(one.as_fd(), &[]);
        send(one.as_fd(), &[nameless(2).as_fd()]);
        assert_eq!(held(), quiet.and(found(2, 3)));
        assert_eq!(held(), quiet.and(found(2, 3)));
        // Everything is still there, in order.
        let received: Vec<usize> =
            (0..3).map(|_| channel::receive::<8>(other.as_fd()).unwrap().fds.len()).collect();
        assert_eq!(received, [2, 0, 1]);
        assert_eq!(held(), quiet);
        // One file twice: whether something was passed over nobody can tell.
        let file = nameless(1);
        let open = held();
        send(one.as_fd(), &[file.as_fd(), file.as_fd()]);
        assert_eq!(held(), open.and(Usage { bytes: 0, files: 2, flying: 2 }));
        drop((one, other, file));

        // A stream, behind as much as it holds.
        let (one, other) = UnixStream::pair().unwrap();
        one.set_nonblocking(true).unwrap();
        let quiet = held();
        send(one.as_fd(), &[nameless(1).as_fd()]);
        (&one).write_all(&[0; 50_000]).unwrap();
        send(one.as_fd(), &[nameless(1).as_fd()]);
        while (&one).write(&[0; 4096]).is_ok() {}
        assert_eq!(held(), quiet.and(found(2, 2)));
        assert_eq!(channel::receive::<8>(other.as_fd()).unwrap().fds.len(), 1);
        assert_eq!(held(), quiet.and(found(1, 1)));
        drop((one, other));

        // Behind more than any queue holds that its owner may not enlarge: a look has an end, whoever feeds it.
        let (one, other) = UnixDatagram::pair().unwrap();
        nix::sys::socket::setsockopt(&one, nix::sys::socket::sockopt::SndBufForce, &(8 << 20)).unwrap();
        let quiet = held();
        one.send(&vec![0; 1 << 20]).unwrap();
        one.send(&[0; 100_000]).unwrap();
        send(one.as_fd(), &[nameless(1).as_fd()]);
        assert_eq!(held(), quiet.and(Usage { bytes: 0, files: 1, flying: 1 }));
        drop((one, other));

        // In a socket that is on its way itself, and where nobody has accepted yet, nobody looks.
        let (one, other) = UnixDatagram::pair().unwrap();
        let (outer, end) = UnixDatagram::pair().unwrap();
        let quiet = held();
        send(one.as_fd(), &[nameless(1).as_fd()]);
        send(outer.as_fd(), &[other.as_fd()]);
        drop(other);
        let nested = held();
        assert_eq!((nested.flying, nested.bytes), (1, quiet.bytes), "{nested:?}");
        drop((one, outer, end));
        let path = dir.path().join("listens");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let one = UnixStream::connect(&path).unwrap();
        send(one.as_fd(), &[nameless(1).as_fd()]);
        assert_eq!(held().flying, 1, "{:?}", held());
        drop(listener);
    }

    fn dir_fd(path: &std::path::Path) -> File {
        File::open(path).unwrap()
    }

    #[test]
    fn p05_a_folder_of_many_names_is_measured_and_wiped_piece_by_piece() {
        let dir = tempfile::tempdir().unwrap();
        let top = File::open(dir.path()).unwrap();
        let names = 3000;
        std::fs::create_dir(dir.path().join("many")).unwrap();
        for n in 0..names {
            std::fs::write(dir.path().join(format!("many/{n:0200}")), "").unwrap();
        }
        assert_eq!(measured(&top, 5000).unwrap().files, names as u64 + 1);
        wiped(&top).unwrap();
        assert_eq!(next(&mut list(&top).unwrap()), None);
    }
}
