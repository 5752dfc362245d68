//! Tenants' folders: `<state>/tenants/<id>`, whose owner is the tenant's uid and so the allocation itself.
//! Nothing below a tenant's folder may be listed, followed, copied or deleted by root.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use gaoler_protocol::{Refusal, TenantKey};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, symlinkat, unlinkat};
use sha2::{Digest, Sha256};

use crate::fault::{Doing, Fault};

/// The truncated SHA-256 of a tenant key, in hexadecimal: what names the folder, and what logs show.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TenantId(pub String);

impl TenantId {
    /// The id of a key. 128 bits: nobody finds a second key for it.
    pub fn of(key: &TenantKey) -> TenantId {
        TenantId(Sha256::digest(key.0)[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The same as bytes, for the egress of a run: a stored credential opens for its own tenant alone.
    pub fn bytes(&self) -> [u8; 16] {
        std::array::from_fn(|at| u8::from_str_radix(&self.0[2 * at..2 * at + 2], 16).unwrap_or(0))
    }
}

/// The workspace that every tenant has.
pub const DEFAULT: &str = "default";

/// The folder of all tenants.
#[derive(Debug)]
pub struct Tenants {
    folder: OwnedFd,
    range: [u32; 2],
    /// All of them have one uid, gaoler's own.
    same: bool,
}

/// One tenant's folder, open.
#[derive(Debug)]
pub struct Tenant {
    /// Open.
    pub folder: OwnedFd,
    /// The owner of everything in it.
    pub uid: u32,
}

/// A run's own folder in the state, where it can have no file system of its own. Locked for as long as the run lives,
/// so that no sweep takes it for a dead one's.
#[derive(Debug)]
pub struct Folder {
    /// Its name among the runs' folders.
    pub name: String,
    /// Open, and locked.
    pub lock: Flock<File>,
}

impl Folder {
    /// A fresh one, with its parts, all of this uid.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn make(folders: &OwnedFd, name: String, uid: u32, parts: &[&str]) -> Result<Folder, Fault> {
        mkdirat(folders, name.as_str(), Mode::S_IRWXU).doing("make a run's folder")?;
        let folder = beneath(folders, &name).doing("open a run's folder")?;
        for part in parts {
            private(&folder, part, uid)?;
        }
        fchown(&folder, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid))).doing("give a run its folder")?;
        let held = Flock::lock(File::from(folder), FlockArg::LockExclusiveNonblock);
        let lock = held.map_err(|(_, errno)| errno).doing("lock a run's folder")?;
        Ok(Folder { name, lock })
    }

    /// The folders that no run holds any more, and the uid that each belongs to.
    ///
    /// # Errors
    /// A folder that cannot be listed.
    pub fn dead(folders: &OwnedFd) -> Result<Vec<(Folder, u32)>, Fault> {
        let what = "list the runs' folders";
        let mut list =
            Dir::openat(folders, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).doing(what)?;
        let mut dead = Vec::new();
        for entry in list.iter() {
            let name = entry.doing(what)?.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') {
                continue;
            }
            let folder = File::from(beneath(folders, &name).doing(what)?);
            let uid = fstat(&folder).doing(what)?.st_uid;
            if let Ok(lock) = Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
                dead.push((Folder { name, lock }, uid));
            }
        }
        Ok(dead)
    }

    /// Removes it, once it is empty.
    pub fn remove(&self, folders: &OwnedFd) -> bool {
        let removed = unlinkat(folders, self.name.as_str(), UnlinkatFlags::RemoveDir);
        matches!(removed, Ok(()) | Err(Errno::ENOENT))
    }
}

/// Why a tenant, or a run of theirs, has no folder.
#[derive(Debug)]
pub enum Closed {
    /// There is none for it, and this is why.
    Refused(Refusal),
    /// The kernel, or what lies there, said no.
    Fault(Fault),
}

impl From<Fault> for Closed {
    fn from(fault: Fault) -> Closed {
        Closed::Fault(fault)
    }
}

impl AsFd for Tenants {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

impl Tenants {
    /// The tenants below this state folder, with uids out of `[first, count]`, or all with the uid of this process.
    /// Where their own processes walk to their folders (`walked`), everybody may pass through that of all, and
    /// nobody can list it: its names are 128 bits of a hash.
    ///
    /// # Errors
    /// A folder that cannot be made or opened.
    pub fn open(state: &OwnedFd, range: [u32; 2], same: bool, walked: bool) -> Result<Tenants, Fault> {
        let folder = private(state, "tenants", nix::unistd::geteuid().as_raw())?;
        let mode = if walked { 0o711 } else { 0o700 };
        fchmod(&folder, Mode::from_bits_truncate(mode)).doing("set the mode of the tenants' folder")?;
        let tenants = Tenants { folder, range, same };
        let own = nix::unistd::geteuid().as_raw();
        if tenants.owners()?.iter().any(|uid| (*uid == own) != same) {
            let why = "there are folders of tenants who had other uids than this host gives them now (with the ids that \
                       /etc/subuid lends to an ordinary user, or without); bring those back, or choose another --state";
            return Err(Fault::new("open the tenants' folder", why));
        }
        Ok(tenants)
    }

    /// The owner of each folder here.
    fn owners(&self) -> Result<Vec<u32>, Fault> {
        let mut list = Dir::openat(&self.folder, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .doing("list the tenants' folder")?;
        let mut owners = Vec::new();
        for entry in list.iter() {
            let entry = entry.doing("list the tenants' folder")?;
            if ![c".", c".."].contains(&entry.file_name()) {
                let stat = fstatat(&self.folder, entry.file_name(), AtFlags::AT_SYMLINK_NOFOLLOW);
                owners.push(stat.doing("look at a tenant's folder")?.st_uid);
            }
        }
        Ok(owners)
    }

    /// The folder of a tenant who has one.
    ///
    /// # Errors
    /// A folder that is not what this module makes.
    pub fn find(&self, id: &TenantId) -> Result<Option<Tenant>, Fault> {
        let folder = match beneath(&self.folder, &id.0) {
            Err(Errno::ENOENT) => return Ok(None),
            other => other.doing("open a tenant's folder")?,
        };
        let stat = fstat(&folder).doing("look at a tenant's folder")?;
        let [first, count] = self.range;
        let owned = match self.same {
            true => stat.st_uid == nix::unistd::geteuid().as_raw(),
            false => (first..first.saturating_add(count)).contains(&stat.st_uid),
        };
        if !owned || stat.st_mode & 0o077 != 0 {
            return Err(Fault::new("open a tenant's folder", "its owner or mode is not what gaoler gave it"));
        }
        Ok(Some(Tenant { folder, uid: stat.st_uid }))
    }

    /// The folder of a tenant, made if there is none. Under a lock, so that two supervisors never give one
    /// uid to two tenants.
    ///
    /// # Errors
    /// No uid left, or the kernel's refusal.
    pub fn admit(&self, id: &TenantId) -> Result<Tenant, Closed> {
        let lock = openat(&self.folder, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        let lock = File::from(lock.doing("open the tenants' folder")?);
        let _held = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .doing("lock the tenants' folder")?;
        if let Some(tenant) = self.find(id)? {
            return Ok(tenant);
        }
        let uid = match self.same {
            true => nix::unistd::geteuid().as_raw(),
            false => self.free_uid()?.ok_or(Closed::Refused(Refusal::TenantsFull))?,
        };
        // Made under another name and moved in place when it is whole: a crash leaves no half tenant.
        let draft = format!(".{}", id.0);
        let folder = private(&self.folder, &draft, uid)?;
        let workspaces = private(&folder, "workspaces", uid)?;
        private(&workspaces, DEFAULT, uid)?;
        private(&folder, "sessions", uid)?;
        nix::fcntl::renameat(&self.folder, draft.as_str(), &self.folder, id.0.as_str())
            .doing("move a tenant's folder in place")?;
        Ok(Tenant { folder, uid })
    }

    /// The lowest uid of the range that owns no folder.
    fn free_uid(&self) -> Result<Option<u32>, Fault> {
        let [first, count] = self.range;
        let mut taken = vec![false; count as usize];
        for uid in self.owners()? {
            if let Some(slot) = uid.checked_sub(first).and_then(|n| taken.get_mut(n as usize)) {
                *slot = true;
            }
        }
        Ok(taken.iter().position(|taken| !taken).map(|n| first + n as u32))
    }
}

impl Tenant {
    /// All workspaces or all sessions, for gaoler's own program.
    ///
    /// # Errors
    /// ELOOP or ENOENT where the tenant's tree is not what this module made.
    pub fn part(&self, name: &str) -> Result<OwnedFd, Fault> {
        // On some hosts cages see the first as well, and walk through both.
        [".", name].into_iter().try_for_each(|path| opened(&self.folder, path).map(drop))?;
        opened(&self.folder, name)
    }

    /// A workspace, held so that nobody removes it while a run is in it.
    ///
    /// # Errors
    /// A workspace that is not there; `EWOULDBLOCK` where it is being removed.
    pub fn workspace(&self, name: &str) -> Result<Flock<File>, Closed> {
        let folder = match opened(&self.part("workspaces")?, name) {
            Err(fault) if fault.errno() == libc::ENOENT as u16 => {
                return Err(Closed::Refused(Refusal::WorkspaceUnknown));
            }
            other => other?,
        };
        let held = Flock::lock(File::from(folder), FlockArg::LockSharedNonblock);
        Ok(held.map_err(|(_, errno)| errno).doing("hold a workspace")?)
    }

    /// The name of the workspace that a session was begun in, or where it is new the one that is wished for. The note
    /// of it is our own; but on some hosts its tenant could change it, so it must be a name and nothing else.
    ///
    /// # Errors
    /// A wish for another workspace than the session's.
    pub fn workspace_of(&self, session: &str, wish: Option<&str>) -> Result<String, Closed> {
        let sessions = self.part("sessions")?;
        let note = readlinkat(&sessions, note(session).as_str()).ok().and_then(|it| it.into_string().ok());
        let begun = fstatat(&sessions, session, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok();
        let own = note.or_else(|| begun.then(|| DEFAULT.to_owned()));
        let plain = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        match (own, wish) {
            (None, wish) => Ok(wish.unwrap_or(DEFAULT).to_owned()),
            (Some(own), wish) if plain(&own) && wish.is_none_or(|wish| wish == own) => Ok(own),
            (Some(_), _) => Err(Closed::Refused(Refusal::WorkspaceOther)),
        }
    }

    /// The folder of a session, made if there is none, and locked for this run. A new one is of this workspace.
    ///
    /// # Errors
    /// `EWOULDBLOCK` where another run holds the session.
    pub fn session(&self, session: &str, workspace: &str) -> Result<Flock<File>, Fault> {
        let sessions = self.part("sessions")?;
        let folder = match beneath(&sessions, session) {
            Err(Errno::ENOENT) => {
                if workspace != DEFAULT {
                    match symlinkat(workspace, &sessions, note(session).as_str()) {
                        Ok(()) | Err(Errno::EEXIST) => {}
                        Err(errno) => return Err(errno).doing("note a session's workspace"),
                    }
                }
                private(&sessions, session, self.uid)?
            }
            // Its agent may have taken every right to it away, and each later turn would forget what was said.
            Ok(_) => opened(&sessions, session)?,
            other => other.doing("open a session")?,
        };
        Flock::lock(File::from(folder), FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| errno)
            .doing("lock a session")
    }
}

/// The note of a session's workspace: a link beside its folder, that leads nowhere and is never followed.
fn note(session: &str) -> String {
    format!("{session}.workspace")
}

/// Opens a folder to its owner, who may have taken every right from it, and would then never get a cage again.
fn opened(folder: &OwnedFd, path: &str) -> Result<OwnedFd, Fault> {
    let folder = beneath(folder, path).doing("open a folder of a tenant's")?;
    fchmod(&folder, Mode::S_IRWXU).doing("open a folder to its owner")?;
    Ok(folder)
}

/// Opens a folder below another, name by name, as every host can; no link of any kind is followed. The paths are
/// our own, and none goes upwards.
fn beneath(folder: &OwnedFd, path: &str) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let (first, rest) = path.split_once('/').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let opened = openat(folder, first, flags, Mode::empty())?;
    match rest {
        Some(rest) => beneath(&opened, rest),
        None => Ok(opened),
    }
}

/// A folder of mode 0700 with this owner, made if it is missing.
pub fn private(parent: &OwnedFd, name: &str, uid: u32) -> Result<OwnedFd, Fault> {
    match mkdirat(parent.as_fd(), name, Mode::S_IRWXU) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno).doing(format!("make a folder for {name}")),
    }
    let folder = beneath(parent, name).doing("open a folder that was just made")?;
    fchown(&folder, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))
        .doing("give a folder to its tenant")?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(range: [u32; 2]) -> (tempfile::TempDir, Tenants) {
        let dir = tempfile::tempdir().unwrap();
        let fd = OwnedFd::from(File::open(dir.path()).unwrap());
        let tenants = Tenants::open(&fd, range, false, false).unwrap();
        (dir, tenants)
    }

    const SESSION: &str = "11111111-1111-4111-8111-111111111111";

    fn id(n: u8) -> TenantId {
        TenantId::of(&TenantKey([n; 32]))
    }

    #[test]
    fn a_full_range_refuses_new_tenants_only() {
        let (_dir, tenants) = state([2_000_000, 2]);
        let first = tenants.admit(&id(1)).unwrap();
        let second = tenants.admit(&id(2)).unwrap();
        assert_eq!((first.uid, second.uid), (2_000_000, 2_000_001));
        assert!(matches!(tenants.admit(&id(3)), Err(Closed::Refused(Refusal::TenantsFull))));
        assert_eq!(tenants.admit(&id(1)).unwrap().uid, 2_000_000);
        assert!(tenants.find(&id(3)).unwrap().is_none());
    }

    #[test]
    fn a_workspace_swapped_for_a_link_is_refused() {
        let (dir, tenants) = state([2_000_000, 2]);
        let tenant = tenants.admit(&id(1)).unwrap();
        assert!(tenant.workspace(DEFAULT).is_ok());
        let workspace = dir.path().join("tenants").join(id(1).0).join("workspaces/default");
        std::fs::remove_dir(&workspace).unwrap();
        std::os::unix::fs::symlink("/etc", &workspace).unwrap();
        let refused = tenant.workspace(DEFAULT);
        assert!(matches!(refused, Err(Closed::Fault(fault)) if fault.errno() == libc::ENOTDIR as u16));
    }

    #[test]
    fn a_workspace_without_rights_is_opened_to_its_owner_again() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, tenants) = state([2_000_000, 2]);
        let tenant = tenants.admit(&id(1)).unwrap();
        let workspace = dir.path().join("tenants").join(id(1).0).join("workspaces/default");
        std::fs::set_permissions(&workspace, std::fs::Permissions::from_mode(0o000)).unwrap();
        tenant.workspace(DEFAULT).unwrap();
        assert_eq!(std::fs::metadata(&workspace).unwrap().permissions().mode() & 0o7777, 0o700);
    }

    #[test]
    fn tenants_of_another_kind_of_uid_stop_the_start() {
        let (dir, tenants) = state([2_000_000, 2]);
        let again =
            |same| Tenants::open(&OwnedFd::from(File::open(dir.path()).unwrap()), tenants.range, same, false);
        assert!(again(true).is_ok() && again(false).is_ok());
        tenants.admit(&id(1)).unwrap();
        assert!(again(false).is_ok());
        assert!(again(true).unwrap_err().to_string().contains("another --state"));
    }

    #[test]
    fn a_session_is_held_by_one_run_at_a_time() {
        let (_dir, tenants) = state([2_000_000, 2]);
        let tenant = tenants.admit(&id(1)).unwrap();
        let held = tenant.session(SESSION, DEFAULT).unwrap();
        let again = tenant.session(SESSION, DEFAULT);
        assert_eq!(again.unwrap_err().errno(), libc::EWOULDBLOCK as u16);
        drop(held);
        assert!(tenant.session(SESSION, DEFAULT).is_ok());
    }

    #[test]
    fn a_session_stays_in_the_workspace_that_it_was_begun_in() {
        let (dir, tenants) = state([2_000_000, 2]);
        let tenant = tenants.admit(&id(1)).unwrap();
        let refusal = |closed: Result<String, Closed>| match closed {
            Err(Closed::Refused(refusal)) => refusal,
            other => panic!("{other:?}"),
        };
        let sessions = dir.path().join("tenants").join(id(1).0).join("sessions");
        let other = "22222222-2222-4222-8222-222222222222";
        assert_eq!(tenant.workspace_of(SESSION, None).unwrap(), DEFAULT);
        assert_eq!(tenant.workspace_of(SESSION, Some(other)).unwrap(), other);
        drop(tenant.session(SESSION, other).unwrap());
        assert_eq!(tenant.workspace_of(SESSION, None).unwrap(), other);
        assert_eq!(tenant.workspace_of(SESSION, Some(other)).unwrap(), other);
        assert_eq!(refusal(tenant.workspace_of(SESSION, Some(DEFAULT))), Refusal::WorkspaceOther);
        // What a tenant could make of it is a name of theirs or nothing.
        std::fs::remove_file(sessions.join(note(SESSION))).unwrap();
        for evil in ["../../x", "/etc", "."] {
            let _ = std::fs::remove_file(sessions.join(note(SESSION)));
            std::os::unix::fs::symlink(evil, sessions.join(note(SESSION))).unwrap();
            assert_eq!(refusal(tenant.workspace_of(SESSION, None)), Refusal::WorkspaceOther, "{evil}");
        }
        std::fs::remove_file(sessions.join(note(SESSION))).unwrap();
        assert_eq!(tenant.workspace_of(SESSION, None).unwrap(), DEFAULT);
        assert_eq!(refusal(tenant.workspace_of(SESSION, Some(other))), Refusal::WorkspaceOther);
        assert!(matches!(tenant.workspace(other), Err(Closed::Refused(Refusal::WorkspaceUnknown))));
    }
}
