//! The key pair that stored credentials are sealed with: made once, at the first start, in the state folder.
//! It must never replace a key that is there: what was sealed with it could not be opened any more.

use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Read, Result, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use gaoler_seal::{KEY_BYTES, Vault};
use zeroize::Zeroizing;

/// What opens, and what seals. Both are the supervisor's to hand on, so their names are its too.
const PRIVATE: &str = "vault";
const PUBLIC: &str = "vault.pub";

/// Makes the pair where there is none. A state folder that cannot be the server's is left for the supervisor to refuse.
///
/// # Errors
/// A file that cannot be written or is no key, with what to do.
pub fn keys(state: &Path) -> std::result::Result<(), String> {
    if !is_ours(state) {
        return Ok(());
    }
    let failed = |name: &str| {
        let path = state.join(name);
        move |error: std::io::Error| {
            format!("{}: {error}; it must be gaoler's to read and write", path.display())
        }
    };
    if !state.join(PRIVATE).exists() {
        make(state).map_err(failed(PRIVATE))?;
    }
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    let read = File::open(state.join(PRIVATE)).and_then(|mut file| file.read_exact(bytes.as_mut_slice()));
    read.map_err(failed(PRIVATE))?;
    let public = Vault::of(*bytes)
        .public()
        .ok_or_else(|| format!("{}: it is no key", state.join(PRIVATE).display()))?;
    match fs::read(state.join(PUBLIC)) {
        Ok(found) if found == public => Ok(()),
        _ => replace(state, PUBLIC, &public).map_err(failed(PUBLIC)),
    }
}

/// What seals, once [`keys`] has been here. `None` for a state folder that the supervisor will refuse.
pub fn public(state: &Path) -> Option<[u8; KEY_BYTES]> {
    fs::read(state.join(PUBLIC)).ok()?.try_into().ok()
}

/// Whether the folder is there and ours alone; made where it is missing.
fn is_ours(state: &Path) -> bool {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(state);
    let found = made.and_then(|()| fs::symlink_metadata(state));
    found.is_ok_and(|found| {
        found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw() && found.mode() & 0o066 == 0
    })
}

/// A fresh key under its name, unless another start was quicker.
fn make(state: &Path) -> Result<()> {
    let vault = Vault::draw();
    let draft = state.join(format!(".{PRIVATE}-{}", std::process::id()));
    let _ = fs::remove_file(&draft);
    write(&draft, vault.bytes())?;
    let linked = match fs::hard_link(&draft, state.join(PRIVATE)) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        // Some file systems know no links; there a rename must do.
        Err(_) => return fs::rename(&draft, state.join(PRIVATE)),
        linked => linked,
    };
    fs::remove_file(&draft)?;
    linked
}

fn replace(state: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let draft = state.join(format!(".{name}-{}", std::process::id()));
    let _ = fs::remove_file(&draft);
    write(&draft, bytes)?;
    fs::rename(draft, state.join(name))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_pair_is_made_once_and_mended_never_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = folder.path().join("state");
        assert_eq!(keys(&state), Ok(()));
        let read = |name: &str| fs::read(state.join(name)).expect("a key");
        let (private, public) = (read(PRIVATE), read(PUBLIC));
        assert_eq!((private.len(), public.len()), (KEY_BYTES, KEY_BYTES));
        assert_eq!(state.join(PRIVATE).metadata().expect("a file").mode() & 0o777, 0o600);
        fs::remove_file(state.join(PUBLIC)).expect("removed");
        assert_eq!(keys(&state), Ok(()));
        assert_eq!((read(PRIVATE), read(PUBLIC)), (private, public));
        assert_eq!(fs::read_dir(&state).expect("a folder").count(), 2, "no draft is left");
        fs::write(state.join(PRIVATE), b"short").expect("written");
        assert!(keys(&state).expect_err("no key").contains("vault"));
        let others = tempfile::tempdir().expect("a folder");
        fs::set_permissions(others.path(), fs::Permissions::from_mode(0o755)).expect("a mode");
        assert_eq!(keys(others.path()), Ok(()), "the supervisor says what is wrong");
        assert_eq!(fs::read_dir(others.path()).expect("a folder").count(), 0);
    }
}
