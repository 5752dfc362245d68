//! Drafts: folders for what is not whole yet, and for what is on its way out. Whoever makes one holds it.
//! It must never remove one that somebody holds, nor let what others have left keep a request from its own work.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::beneath::{Folder, Kind};
use crate::failure::{Doing, Failed};

/// Where they are, beside what they are for.
const DRAFTS: &str = ".drafts";
/// How long a request removes what was its own to remove. Its client waits for it, and a million files may take longer:
/// the rest is out of sight, is counted, and goes with later requests.
pub const OWN_WAIT: Duration = Duration::from_secs(8);
/// How long a request removes what others have left.
pub const LEFT_WAIT: Duration = Duration::from_secs(2);
/// Drafts that are looked at in one request: as many descriptors are open then.
const LEFT_MAX: usize = 64;

/// One of them.
pub struct Draft {
    drafts: Folder,
    name: OsString,
    /// It.
    pub folder: Folder,
    _held: Option<Flock<OwnedFd>>,
}

impl Draft {
    /// An empty one. What others have left is removed, as far as there is time.
    pub fn new(top: &Folder) -> Result<Draft, Failed> {
        let drafts = top.make(OsStr::new(DRAFTS)).map(|(folder, _)| folder);
        let drafts = drafts.doing("make a folder of gaoler's own")?;
        // Whoever makes one holds it before anybody else can look whether somebody does.
        let making = drafts.lock(FlockArg::LockExclusive).doing("wait for others' drafts")?;
        // Its process's number is its own in this cage, and another cage's may be the same: so the time as well.
        let nanos =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let name = OsString::from(format!("{}-{nanos}", std::process::id()));
        let (folder, _) = drafts.make(&name).doing("make a draft")?;
        let held = folder.lock(FlockArg::LockExclusiveNonblock).doing("hold a draft")?;
        let left = left(&drafts)?;
        drop(making);
        removed(&drafts, left, Instant::now() + LEFT_WAIT);
        Ok(Draft { drafts, name, folder, _held: held })
    }

    /// Removes it with all that is in it, as far as there is time; whether something remains.
    pub fn end(self) -> bool {
        self.drafts.remove_until(&self.name, Instant::now() + OWN_WAIT).is_ok_and(|gone| !gone)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = self.drafts.remove_until(&self.name, Instant::now() + OWN_WAIT);
    }
}

/// Removes what others have left, until then; whether something remains.
pub fn clean(top: &Folder, until: Instant) -> Result<bool, Failed> {
    let drafts = OsStr::new(DRAFTS);
    match top.look(drafts).doing("look for drafts")? {
        Some(found) if found.kind == Kind::Folder => {}
        _ => return Ok(false),
    }
    let drafts = top.enter(drafts).doing("open the drafts")?;
    let making = drafts.lock(FlockArg::LockExclusive).doing("wait for others' drafts")?;
    let left = left(&drafts)?;
    drop(making);
    Ok(!removed(&drafts, left, until))
}

/// What nobody holds, held; a file is what a write that was cut off has left.
type Left = Vec<(OsString, Option<Flock<OwnedFd>>)>;

fn left(drafts: &Folder) -> Result<Left, Failed> {
    let mut left = Left::new();
    let look = drafts.each(&mut |name| {
        match drafts.enter(name) {
            Ok(folder) => {
                if let Some(held) = folder.lock(FlockArg::LockExclusiveNonblock)? {
                    left.push((name.to_owned(), Some(held)));
                }
            }
            Err(_) => left.push((name.to_owned(), None)),
        }
        Ok(left.len() < LEFT_MAX)
    });
    look.doing("look at drafts")?;
    Ok(left)
}

/// Whether all of it is gone.
fn removed(drafts: &Folder, left: Left, until: Instant) -> bool {
    let full = left.len() >= LEFT_MAX;
    let mut gone = true;
    for (name, _held) in left {
        gone &= gone && drafts.remove_until(&name, until).unwrap_or(true);
    }
    gone && !full
}
