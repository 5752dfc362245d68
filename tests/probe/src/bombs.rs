//! Attempts that take too much, and one that refuses to go.
//! It must never stop before the kernel does, but for a bound that the caller gives.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;

use nix::errno::Errno;

use crate::Outcome;
use crate::attempts::errno;

/// Takes `words` of what `bomb` names.
pub fn go(bomb: &str, words: &[&str]) -> Outcome {
    let number = |word: &str| word.parse::<usize>().map_err(|_| Errno::EINVAL);
    match (bomb, words) {
        ("anonymous", [mib]) => {
            let kept: Vec<Vec<u8>> = (0..number(mib)?).map(|n| vec![n as u8 | 1; 1 << 20]).collect();
            Ok(kept.len().to_string())
        }
        ("memfd", [mib]) => {
            // SAFETY: the name ends with NUL.
            let fd = Errno::result(unsafe { libc::memfd_create(c"bomb".as_ptr(), 0) })?;
            fill(&format!("/proc/self/fd/{fd}"), fd, number(mib)?)
        }
        ("grow", [path, mib]) => {
            let file = File::options().write(true).create(true).truncate(true).open(path).map_err(errno)?;
            // SAFETY: SIG_IGN is a valid disposition; the limit's signal would hide its errno.
            unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
            file.set_len((number(mib)? as u64) << 20).map_err(errno)?;
            Ok(String::new())
        }
        ("file", [path, mib]) => fill(path, -1, number(mib)?),
        ("files", [path, mib, each]) => {
            for n in 0..number(mib)? / number(each)? {
                fill(&format!("{path}/{n}"), -1, number(each)?)?;
            }
            Ok(String::new())
        }
        ("inodes", [path, count]) => {
            for n in 0..number(count)? {
                File::create(format!("{path}/i{n}")).map_err(errno)?;
            }
            Ok(String::new())
        }
        ("open-files", [count]) => {
            let mut kept = Vec::new();
            for _ in 0..number(count)? {
                kept.push(File::open("/dev/null").map_err(errno)?);
            }
            Ok(kept.len().to_string())
        }
        ("locks", [kind, processes, each]) => locks(kind, number(processes)?, number(each)?),
        ("forks", [count]) => forks(number(count)?),
        ("orphans", [count]) => orphans(number(count)?),
        ("deep", [path, count]) => deep(path, number(count)?),
        ("daemon", [path]) => daemon(path),
        ("spin", []) => loop {
            std::hint::spin_loop();
        },
        ("flood", [mib]) => {
            let line = vec![b'x'; 1 << 20];
            let mut stdout = std::io::stdout();
            for _ in 0..number(mib)? {
                stdout.write_all(&line).map_err(errno)?;
            }
            Ok(String::new())
        }
        _ => Err(Errno::EINVAL),
    }
}

fn fill(path: &str, fd: i32, mib: usize) -> Outcome {
    let mut file = match fd {
        -1 => File::options().write(true).create(true).truncate(true).open(path).map_err(errno)?,
        // SAFETY: the descriptor was just made and belongs to nobody else.
        fd => unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) },
    };
    // The file size limit's signal would hide its errno.
    // SAFETY: SIG_IGN is a valid disposition.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let block = vec![1u8; 1 << 20];
    for _ in 0..mib {
        file.write_all(&block).map_err(errno)?;
    }
    Ok(String::new())
}

/// So many locks of this kind (`posix` or `flock`) on a file of its own by each of so many processes, and then nothing more
/// for as long as somebody may take to look: two seconds for few, and for ever for many.
fn locks(kind: &str, processes: usize, each: usize) -> Outcome {
    let (mut ready, readies) = std::io::pipe().map_err(errno)?;
    for _ in 1..processes {
        // SAFETY: one thread; the child goes on as its parent does.
        if Errno::result(unsafe { libc::fork() })? == 0 {
            break;
        }
    }
    let path = format!("/tmp/locked-{}", std::process::id());
    let mut kept = Vec::new();
    // Downwards: upwards each would be looked for behind all before it.
    for place in (0..each).rev() {
        if kind == "flock" || kept.is_empty() {
            kept.push(File::options().write(true).create(true).truncate(false).open(&path).map_err(errno)?);
        }
        // SAFETY: flock is made of numbers.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_start, lock.l_len) = (libc::F_WRLCK as i16, 2 * place as i64, 1);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&kept[kept.len() - 1]);
        // SAFETY: flock takes two numbers, and F_SETLK a valid lock.
        Errno::result(match kind {
            "flock" => unsafe { libc::flock(fd, libc::LOCK_SH | libc::LOCK_NB) },
            _ => unsafe { libc::fcntl(fd, libc::F_SETLK, &lock) },
        })?;
    }
    drop(readies);
    // Until all have theirs.
    let _ = std::io::Read::read(&mut ready, &mut [0]);
    std::thread::sleep(std::time::Duration::from_secs(if processes * each > 1_000 { 60 } else { 2 }));
    Ok((processes * each).to_string())
}

/// Children that stay, until the kernel refuses one; how many there were before that.
fn forks(count: usize) -> Outcome {
    for n in 0..count {
        // SAFETY: one thread; the child only waits, and keeps nobody waiting for the end of a pipe.
        match unsafe { libc::fork() } {
            0 => loop {
                for fd in 0..64 {
                    // SAFETY: nothing of this process is used any more.
                    unsafe { libc::close(fd) };
                }
                // SAFETY: as above.
                unsafe { libc::pause() };
            },
            -1 => return Ok(format!("{} {:?}", n, Errno::last())),
            _ => {}
        }
    }
    Ok(count.to_string())
}

/// Children whose own children are left to pid 1 at once: somebody must reap them.
fn orphans(count: usize) -> Outcome {
    for _ in 0..count {
        // SAFETY: one thread; the child forks and ends, the grandchild ends.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: as above.
                let refused = unsafe { libc::fork() } < 0;
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(i32::from(refused)) }
            }
            -1 => return Err(Errno::last()),
            pid => {
                let mut status = 0;
                // SAFETY: `status` is a valid place for the result.
                unsafe { libc::waitpid(pid, &mut status, 0) };
                if status != 0 {
                    return Err(Errno::EAGAIN);
                }
            }
        }
    }
    Ok(String::new())
}

/// A folder in a folder in a folder: far longer than any path may be.
fn deep(path: &str, count: usize) -> Outcome {
    std::env::set_current_dir(path).map_err(errno)?;
    let name = CString::new("d").map_err(|_| Errno::EINVAL)?;
    for n in 0..count {
        // SAFETY: `name` ends with NUL.
        let made = unsafe { libc::mkdir(name.as_ptr(), 0o700) == 0 && libc::chdir(name.as_ptr()) == 0 };
        if !made {
            return Ok(format!("{n} {:?}", Errno::last()));
        }
    }
    Ok(count.to_string())
}

/// Leaves its parent, its session and its descriptors, ignores every signal, and goes on writing.
fn daemon(path: &str) -> Outcome {
    for generation in 0..2 {
        // SAFETY: one thread.
        match Errno::result(unsafe { libc::fork() })? {
            0 => {}
            _ if generation == 0 => return Ok(String::new()),
            // SAFETY: ends the process at once.
            _ => unsafe { libc::_exit(0) },
        }
        // SAFETY: setsid and prctl take numbers only.
        unsafe {
            libc::setsid();
            libc::prctl(libc::PR_SET_PDEATHSIG, 0);
        }
    }
    for signal in 1..=64 {
        // SAFETY: SIG_IGN is a valid disposition; signals that cannot be ignored refuse.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    for fd in 0..1024 {
        // SAFETY: nothing of this process is used any more.
        unsafe { libc::close(fd) };
    }
    for n in 0u64.. {
        let _ = fs::write(path, n.to_string());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(String::new())
}
