//! Landlock: what a process may open and connect to, decided for the newest ABI that is both here and tested.
//! It must never call a restriction that the kernel did only in part a success.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, fstat};

/// The newest ABI that the tests have seen. A newer kernel is used as if it had this one: what it would
/// handle beyond has not been tried.
pub const ABI_TESTED: u8 = 7;
/// The oldest ABI with which a confinement is worth its name: the first that can speak of rename and link.
pub const ABI_MINIMUM: u8 = 2;
/// The first ABI that limits TCP ports.
pub const ABI_TCP: u8 = 4;
/// The first ABI that limits ioctl on devices.
pub const ABI_IOCTL: u8 = 5;
/// The first ABI with scopes: signals and abstract sockets.
pub const ABI_SCOPES: u8 = 6;

/// What a run may do below a place. Each class is a superset of nothing: a place has exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessClass {
    /// List folders, open nothing.
    List,
    /// Read files and list folders.
    Read,
    /// That, and execute.
    ReadExecute,
    /// Read, write and control an existing device or file, create nothing.
    Device,
    /// Everything but making devices and controlling them.
    Full,
}

impl AccessClass {
    fn rights(self, abi: ABI) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let wanted = match self {
            AccessClass::List => AccessFs::ReadDir.into(),
            AccessClass::Read => read,
            AccessClass::ReadExecute => read | AccessFs::Execute,
            AccessClass::Device => read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev,
            AccessClass::Full => {
                AccessFs::from_all(abi) & !(AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev)
            }
        };
        wanted & AccessFs::from_all(abi)
    }
}

/// A place for a rule: the inode behind this path, opened without access to its content.
///
/// # Errors
/// Those of open(2); ELOOP where the last part is a symbolic link.
pub fn place(path: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let fd = nix::fcntl::open(path, flags, Mode::empty())?;
    // With O_PATH the kernel opens the link itself; a rule for it would cover nothing.
    match kind(fd.as_fd())? == SFlag::S_IFLNK {
        true => Err(Error::from_raw_os_error(libc::ELOOP)),
        false => Ok(fd),
    }
}

fn kind(fd: BorrowedFd<'_>) -> Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT)
}

/// The ABI that restrictions use on this kernel.
///
/// # Errors
/// ENOSYS or EOPNOTSUPP without Landlock; `Unsupported` below [`ABI_MINIMUM`].
pub fn abi() -> Result<u8> {
    let abi = gaoler_sys::probe::landlock_abi()?.min(ABI_TESTED);
    match abi >= ABI_MINIMUM {
        true => Ok(abi),
        false => Err(Error::new(ErrorKind::Unsupported, format!("Landlock ABI {abi}, not {ABI_MINIMUM}"))),
    }
}

/// Takes every file, every TCP port and every scope away from the calling thread, and from all that it
/// starts from now on. Descriptors that it holds stay usable. Returns the ABI that is in force.
///
/// # Errors
/// Where the kernel has no Landlock or does not enforce all that its ABI offers.
pub fn no_files() -> Result<u8> {
    restrict(&[], Some(&[]))
}

/// As [`no_files`], but TCP may connect to these ports.
///
/// # Errors
/// As for [`no_files`].
pub fn no_files_but_connect(ports: &[u16]) -> Result<u8> {
    restrict(&[], Some(ports))
}

/// As [`no_files`], but for one folder, in which everything but devices is allowed.
///
/// # Errors
/// As for [`no_files`], and where the folder cannot be opened.
pub fn no_files_but_below(folder: &Path) -> Result<u8> {
    let folder = place(folder)?;
    restrict(&[&[(folder.as_fd(), AccessClass::Full)]], Some(&[]))
}

/// The restriction of a cage: these places and nothing else; no signal and no abstract socket out of it. `connect`
/// names the TCP ports that it may connect to; `None` leaves TCP to its network namespace, in which there is nothing
/// but its own loopback: programs under test listen there on ports that nobody can name ahead. `base` is opened once at boot, `per_run` belongs to this run.
/// Returns the ABI in force.
///
/// # Errors
/// As for [`no_files`], and where a rule cannot be added.
pub fn restrict_cage(
    base: &[(BorrowedFd<'_>, AccessClass)],
    per_run: &[(BorrowedFd<'_>, AccessClass)],
    connect: Option<&[u16]>,
) -> Result<u8> {
    restrict(&[base, per_run], connect)
}

/// The places that every cage of a host sees, opened once at boot.
///
/// A rule is tied to the inode, so it holds wherever the folder is mounted in the cage; but a fresh /proc
/// or tmpfs is another inode, whose rule must come from inside (`per_run`).
#[derive(Debug)]
pub struct CageRules {
    places: Vec<(OwnedFd, AccessClass)>,
}

impl CageRules {
    /// Opens these places. One that does not exist is left out, since what is not there needs no rule; and so
    /// is a symbolic link, whose target is covered by its own place or by none.
    ///
    /// # Errors
    /// Those of open(2) other than ENOENT and ELOOP.
    pub fn open<'a>(places: impl IntoIterator<Item = (&'a Path, AccessClass)>) -> Result<CageRules> {
        let mut out = Vec::new();
        for (path, class) in places {
            match place(path) {
                Ok(fd) => out.push((fd, class)),
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ELOOP)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(CageRules { places: out })
    }

    /// The rules, for [`restrict_cage`].
    pub fn base(&self) -> Vec<(BorrowedFd<'_>, AccessClass)> {
        self.places.iter().map(|(fd, class)| (fd.as_fd(), *class)).collect()
    }
}

/// `connect`: the TCP ports that may be connected to; `None` leaves TCP to the network namespace.
fn restrict(places: &[&[(BorrowedFd<'_>, AccessClass)]], connect: Option<&[u16]>) -> Result<u8> {
    let number = abi()?;
    let abi = ABI::from(i32::from(number));
    let refused = |error: &dyn std::error::Error| Error::other(format!("Landlock ABI {number}: {error}"));
    // HardRequirement: whatever this kernel cannot do is an error here, and not silently left out.
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(abi))
        .map_err(|error| refused(&error))?;
    if number >= ABI_TCP && connect.is_some() {
        ruleset = ruleset.handle_access(AccessNet::from_all(abi)).map_err(|error| refused(&error))?;
    }
    if number >= ABI_SCOPES {
        ruleset = ruleset.scope(Scope::from_all(abi)).map_err(|error| refused(&error))?;
    }
    let mut created = ruleset.create().map_err(|error| refused(&error))?;
    for &(fd, class) in places.iter().copied().flatten() {
        let rights = match kind(fd)? == SFlag::S_IFDIR {
            true => class.rights(abi),
            // The rights of folders mean nothing on a file, and the kernel refuses a rule that has them.
            false => class.rights(abi) & AccessFs::from_file(abi),
        };
        created = created.add_rule(PathBeneath::new(fd, rights)).map_err(|error| refused(&error))?;
    }
    for &port in connect.unwrap_or_default().iter().filter(|_| number >= ABI_TCP) {
        created =
            created.add_rule(NetPort::new(port, AccessNet::ConnectTcp)).map_err(|error| refused(&error))?;
    }
    let status = created.restrict_self().map_err(|error| refused(&error))?;
    match (status.ruleset, status.no_new_privs) {
        (RulesetStatus::FullyEnforced, true) => Ok(number),
        (ruleset, _) => Err(Error::other(format!("Landlock ABI {number}: {ruleset:?}"))),
    }
}
