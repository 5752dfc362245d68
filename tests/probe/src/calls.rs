//! System calls by name or number, with the arguments that a row of a table gives.
//! It must never add what the row did not say: an argument that is missing is 0.

use nix::errno::Errno;

use crate::Outcome;

/// `NAME ARG...` as a system call. An argument is a number, or `@text` for the address of that text, or
/// `@@` for the address of a page of zeros.
pub fn call(words: &[&str]) -> Outcome {
    let (name, rest) = words.split_first().ok_or(Errno::EINVAL)?;
    let number = match name.parse() {
        Ok(number) => number,
        Err(_) => self::number(name).ok_or(Errno::EINVAL)?,
    };
    let mut texts = Vec::new();
    let mut arguments = [0i64; 6];
    for (place, word) in arguments.iter_mut().zip(rest) {
        *place = match word.strip_prefix('@') {
            Some("@") => {
                texts.push(vec![0u8; 4096]);
                texts.last().map_or(0, |text| text.as_ptr() as i64)
            }
            Some(text) => {
                texts.push([text.as_bytes(), &[0]].concat());
                texts.last().map_or(0, |text| text.as_ptr() as i64)
            }
            None => value(word).ok_or(Errno::EINVAL)?,
        };
    }
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the child of a fork with one thread; pointers are to `texts`, which outlive the call, or are
    // what the row says, and the kernel checks them.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    drop(texts);
    Errno::result(result).map(|_| String::new())
}

/// A number: decimal, or hexadecimal after 0x; `-1` too.
pub fn value(word: &str) -> Option<i64> {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok().map(u64::cast_signed),
        None => word.parse().ok(),
    }
}

/// A system call of i386 by its number, through the gate that every x86-64 kernel may have.
#[cfg(target_arch = "x86_64")]
pub fn int80(number: i32, first: i32, second: i32, third: i32) -> Outcome {
    let result: i32;
    // SAFETY: int 0x80 returns to the next instruction; rbx, which the compiler keeps for itself, is put
    // back; r8 to r11 may be changed by the kernel.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {first:r}",
            "int 0x80",
            "xchg rbx, {first:r}",
            first = inout(reg) i64::from(first) => _,
            inlateout("eax") number => result,
            in("ecx") second,
            in("edx") third,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    match result {
        0.. => Ok(result.to_string()),
        _ => Err(Errno::from_raw(-result)),
    }
}

fn number(name: &str) -> Option<i64> {
    let known = [
        ("accept", libc::SYS_accept),
        ("acct", libc::SYS_acct),
        ("add_key", libc::SYS_add_key),
        ("adjtimex", libc::SYS_adjtimex),
        ("bpf", libc::SYS_bpf),
        ("chroot", libc::SYS_chroot),
        ("clock_adjtime", libc::SYS_clock_adjtime),
        ("clock_settime", libc::SYS_clock_settime),
        ("clone", libc::SYS_clone),
        ("clone3", libc::SYS_clone3),
        ("delete_module", libc::SYS_delete_module),
        ("fadvise64", libc::SYS_fadvise64),
        ("fanotify_init", libc::SYS_fanotify_init),
        ("fanotify_mark", libc::SYS_fanotify_mark),
        ("fcntl", libc::SYS_fcntl),
        ("finit_module", libc::SYS_finit_module),
        ("fsconfig", libc::SYS_fsconfig),
        ("fsmount", libc::SYS_fsmount),
        ("fsopen", libc::SYS_fsopen),
        ("fspick", libc::SYS_fspick),
        ("futex", libc::SYS_futex),
        ("init_module", libc::SYS_init_module),
        ("io_uring_enter", libc::SYS_io_uring_enter),
        ("io_uring_register", libc::SYS_io_uring_register),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("ioctl", libc::SYS_ioctl),
        ("ioperm", libc::SYS_ioperm),
        ("iopl", libc::SYS_iopl),
        ("kcmp", libc::SYS_kcmp),
        ("kexec_file_load", libc::SYS_kexec_file_load),
        ("kexec_load", libc::SYS_kexec_load),
        ("keyctl", libc::SYS_keyctl),
        ("lookup_dcookie", libc::SYS_lookup_dcookie),
        ("madvise", libc::SYS_madvise),
        ("mbind", libc::SYS_mbind),
        ("memfd_create", libc::SYS_memfd_create),
        ("memfd_secret", libc::SYS_memfd_secret),
        ("migrate_pages", libc::SYS_migrate_pages),
        ("mmap", libc::SYS_mmap),
        ("modify_ldt", libc::SYS_modify_ldt),
        ("mount", libc::SYS_mount),
        ("mount_setattr", libc::SYS_mount_setattr),
        ("move_mount", libc::SYS_move_mount),
        ("move_pages", libc::SYS_move_pages),
        ("mq_open", libc::SYS_mq_open),
        ("msgget", libc::SYS_msgget),
        ("name_to_handle_at", libc::SYS_name_to_handle_at),
        ("nfsservctl", libc::SYS_nfsservctl),
        ("open_by_handle_at", libc::SYS_open_by_handle_at),
        ("open_tree", libc::SYS_open_tree),
        ("perf_event_open", libc::SYS_perf_event_open),
        ("personality", libc::SYS_personality),
        ("pidfd_getfd", libc::SYS_pidfd_getfd),
        ("pivot_root", libc::SYS_pivot_root),
        ("prctl", libc::SYS_prctl),
        ("prlimit64", libc::SYS_prlimit64),
        ("process_madvise", libc::SYS_process_madvise),
        ("process_vm_readv", libc::SYS_process_vm_readv),
        ("process_vm_writev", libc::SYS_process_vm_writev),
        ("ptrace", libc::SYS_ptrace),
        ("quotactl", libc::SYS_quotactl),
        ("quotactl_fd", libc::SYS_quotactl_fd),
        ("reboot", libc::SYS_reboot),
        ("remap_file_pages", libc::SYS_remap_file_pages),
        ("renameat2", libc::SYS_renameat2),
        ("request_key", libc::SYS_request_key),
        ("seccomp", libc::SYS_seccomp),
        ("semget", libc::SYS_semget),
        ("set_mempolicy", libc::SYS_set_mempolicy),
        ("setdomainname", libc::SYS_setdomainname),
        ("sethostname", libc::SYS_sethostname),
        ("setns", libc::SYS_setns),
        ("settimeofday", libc::SYS_settimeofday),
        ("setuid", libc::SYS_setuid),
        ("setgid", libc::SYS_setgid),
        ("setgroups", libc::SYS_setgroups),
        ("shmget", libc::SYS_shmget),
        ("socket", libc::SYS_socket),
        ("splice", libc::SYS_splice),
        ("swapoff", libc::SYS_swapoff),
        ("swapon", libc::SYS_swapon),
        ("syslog", libc::SYS_syslog),
        ("tee", libc::SYS_tee),
        ("umount2", libc::SYS_umount2),
        ("unshare", libc::SYS_unshare),
        ("userfaultfd", libc::SYS_userfaultfd),
        ("vhangup", libc::SYS_vhangup),
        ("vmsplice", libc::SYS_vmsplice),
    ];
    known.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}
