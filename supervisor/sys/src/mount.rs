//! The descriptor-based mount calls: open_tree, move_mount, mount_setattr.
//! They must never take a path that a tenant wrote: sources are descriptors.

use std::ffi::CStr;
use std::io::Result;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::check;

/// What a mount is restricted to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attributes<'a> {
    /// Nothing can be written through it.
    pub read_only: bool,
    /// Set-uid bits have no effect through it.
    pub nosuid: bool,
    /// Device nodes have no effect through it.
    pub nodev: bool,
    /// Ids are mapped by this user namespace.
    pub idmap: Option<BorrowedFd<'a>>,
}

/// A detached copy of the mount at an open file or folder; with everything below it if `recursive`.
///
/// # Errors
/// Those of open_tree(2): EINVAL where the descriptor is of another mount namespace.
pub fn clone_tree(source: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
    let deep = if recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32 | deep;
    // SAFETY: the path is an empty C string; the result is a fresh descriptor.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), c"".as_ptr(), flags))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Attaches a detached mount at a path of this process's own root.
///
/// # Errors
/// Those of move_mount(2).
pub fn attach(tree: BorrowedFd<'_>, at: &CStr) -> Result<()> {
    const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
    // SAFETY: both paths are C strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            at.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map(|_| ())
}

/// Restricts a mount; with everything below it if `recursive`.
///
/// # Errors
/// Those of mount_setattr(2): EINVAL where the file system takes no id map.
pub fn restrict(tree: BorrowedFd<'_>, attributes: Attributes<'_>, recursive: bool) -> Result<()> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        userns: u64,
    }
    let bit = |on: bool, bit: u64| if on { bit } else { 0 };
    let attr = MountAttr {
        set: bit(attributes.read_only, libc::MOUNT_ATTR_RDONLY)
            | bit(attributes.nosuid, libc::MOUNT_ATTR_NOSUID)
            | bit(attributes.nodev, libc::MOUNT_ATTR_NODEV)
            | bit(attributes.idmap.is_some(), libc::MOUNT_ATTR_IDMAP),
        clear: 0,
        propagation: libc::MS_PRIVATE,
        userns: attributes.idmap.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let deep = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the structure is a live local of the size that is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | deep,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
    .map(|_| ())
}
