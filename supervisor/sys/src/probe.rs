//! What a kernel says of itself, for the layers and for Landlock.
//! It must never change anything: each call here only asks.

/// The newest Landlock ABI of this kernel; the errno where there is none (ENOSYS not built, EOPNOTSUPP
/// switched off at boot).
///
/// # Errors
/// Those of landlock_create_ruleset(2).
pub fn landlock_abi() -> std::io::Result<u8> {
    const VERSION: libc::c_ulong = 1;
    let nothing = std::ptr::null::<u8>();
    // SAFETY: with this flag the call takes a null pointer of length 0 and only answers a number.
    let answer = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0usize, VERSION) };
    match u8::try_from(answer) {
        Ok(abi) => Ok(abi),
        Err(_) if answer < 0 => Err(std::io::Error::last_os_error()),
        Err(_) => Ok(u8::MAX),
    }
}
