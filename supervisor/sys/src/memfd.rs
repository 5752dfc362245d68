//! Sealed memory files: how text of any size travels between gaoler's processes.
//! A reader must never map or read one that is not fully sealed.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

const SEALS: SealFlag = SealFlag::F_SEAL_SEAL
    .union(SealFlag::F_SEAL_SHRINK)
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_WRITE);

/// A memfd with these bytes that nobody can change any more.
///
/// # Errors
/// Those of memfd_create(2), write(2) and fcntl(2).
pub fn sealed(name: &str, bytes: &[u8]) -> Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    file.seek(SeekFrom::Start(0))?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(file.into())
}

/// Whether this descriptor is a fully sealed memfd of at most `bytes_max` bytes.
pub fn is_sealed(fd: impl AsFd, bytes_max: usize) -> bool {
    let seals = fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS);
    let sealed = matches!(seals, Ok(bits) if SealFlag::from_bits_truncate(bits).contains(SEALS));
    let size = nix::sys::stat::fstat(fd.as_fd()).map_or(-1, |stat| stat.st_size);
    sealed && usize::try_from(size).is_ok_and(|size| size <= bytes_max)
}

/// The bytes of a sealed memfd.
///
/// # Errors
/// `InvalidData` where it is not sealed or is larger than `bytes_max`.
pub fn read(fd: OwnedFd, bytes_max: usize) -> Result<Vec<u8>> {
    if !is_sealed(&fd, bytes_max) {
        return Err(Error::new(ErrorKind::InvalidData, "not a sealed memory file of the size allowed"));
    }
    let mut file = File::from(fd);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}
