//! The attempts by their first word. Each asks the kernel for one thing and hands on what it said.
//! It must never clean up what an attempt has made: the canary outside is looked at afterwards.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;

use crate::calls::{call, int80, value};
use crate::{Outcome, bombs, objects};

/// Tries what the words say.
pub fn attempt(line: &str) -> Outcome {
    let words: Vec<&str> = line.split(' ').collect();
    match *words.as_slice() {
        // Files.
        ["read", path] => said(fs::File::open(path).and_then(|mut file| {
            let mut start = [0; 64];
            let length = file.read(&mut start)?;
            Ok(String::from_utf8_lossy(&start[..length]).into_owned())
        })),
        ["write", path] => {
            quiet(File::options().append(true).open(path).and_then(|mut f| f.write_all(b"hurt")))
        }
        ["open-write", path] => quiet(File::options().write(true).open(path)),
        ["create", path] => quiet(File::options().write(true).create_new(true).open(path)),
        ["path", path] => quiet(File::options().read(true).custom_flags(libc::O_PATH).open(path)),
        ["list", path] => said(fs::read_dir(path).map(|list| {
            list.filter_map(Result::ok)
                .map(|it| it.file_name().to_string_lossy().into_owned())
                .collect::<Vec<_>>()
                .join(",")
        })),
        ["stat", path] => quiet(fs::symlink_metadata(path)),
        ["truncate", path] => returned(unsafe_truncate, path),
        ["unlink", path] => quiet(fs::remove_file(path)),
        ["mkdir", path] => quiet(fs::create_dir(path)),
        ["rename", from, to] => quiet(fs::rename(from, to)),
        ["link", from, to] => quiet(fs::hard_link(from, to)),
        ["symlink", target, path] => quiet(std::os::unix::fs::symlink(target, path)),
        ["copy", from, to] => quiet(fs::copy(from, to)),
        ["chmod", mode, path] => {
            let mode = u32::from_str_radix(mode, 8).map_err(|_| Errno::EINVAL)?;
            quiet(fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        }
        ["chown", path] => quiet(std::os::unix::fs::lchown(path, Some(0), Some(0))),
        ["utimes", path] => returned(unsafe_utimes, path),
        ["setxattr", path, name] => setxattr(path, name),
        ["mknod", kind, path] => mknod(kind, path),
        ["fifo", path] => mknod("fifo", path),
        ["device", path] => {
            let found = fs::symlink_metadata(path).map_err(errno)?.file_type();
            if found.is_char_device() || found.is_block_device() {
                Ok(String::new())
            } else {
                Err(Errno::ENODEV)
            }
        }
        ["immutable", path] => immutable(path),
        ["flags-of", path] => {
            said(fs::metadata(path).map(|it| format!("{:o} {} {}", it.mode(), it.uid(), it.nlink())))
        }
        ["run", path, ref rest @ ..] => {
            let output = Command::new(path).args(rest).output().map_err(errno)?;
            Ok(format!(
                "{} {}",
                output.status.code().unwrap_or(-1),
                String::from_utf8_lossy(&output.stdout).trim()
            ))
        }
        ["chroot", path] => call(&["chroot", &format!("@{path}")]),
        // Who one is.
        ["ids"] => {
            // SAFETY: these calls only answer.
            let ids = unsafe { (libc::getuid(), libc::geteuid(), libc::getgid(), libc::getegid()) };
            Ok(format!("{} {} {} {}", ids.0, ids.1, ids.2, ids.3))
        }
        ["field", name] => {
            let status = fs::read_to_string("/proc/self/status").map_err(errno)?;
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
            line.map(str::to_owned).ok_or(Errno::ENODATA)
        }
        // Processes.
        ["ptrace", request, pid] => {
            let request = match request {
                "attach" => libc::PTRACE_ATTACH,
                "seize" => libc::PTRACE_SEIZE,
                "traceme" => libc::PTRACE_TRACEME,
                _ => return Err(Errno::EINVAL),
            };
            call(&["ptrace", &request.to_string(), &target(pid)?.to_string()])
        }
        ["vm-read", pid] => vm(libc::SYS_process_vm_readv, target(pid)?),
        ["vm-write", pid] => vm(libc::SYS_process_vm_writev, target(pid)?),
        ["kill", pid, signal] => {
            returned_by(unsafe_kill(target(pid)?, signal.parse().map_err(|_| Errno::EINVAL)?))
        }
        ["pidfd-getfd", pid] => {
            // SAFETY: pidfd_open takes two numbers.
            let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, target(pid)?, 0) })?;
            call(&["pidfd_getfd", &fd.to_string(), "0", "0"])
        }
        ["clone3-user"] => {
            let arguments = [libc::CLONE_NEWUSER as u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
            // SAFETY: `arguments` is a clone_args of 64 bytes without pointers.
            let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), 64) })?;
            if pid == 0 {
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(0) }
            }
            Ok(String::new())
        }
        ["clone-user"] => {
            let flags = i64::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
            // SAFETY: without CLONE_VM this is a fork.
            let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })?;
            if pid == 0 {
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(0) }
            }
            Ok(String::new())
        }
        ["setns", path] => {
            let file = File::open(path).map_err(errno)?;
            call(&["setns", &file.as_raw_fd().to_string(), "0"])
        }
        ["int80", number, ref rest @ ..] => {
            let argument = |i: usize| rest.get(i).and_then(|w| w.parse().ok()).unwrap_or(0);
            int80(number.parse().map_err(|_| Errno::EINVAL)?, argument(0), argument(1), argument(2))
        }
        ["call", ref rest @ ..] => call(rest),
        ["filter"] => {
            // A program of one instruction, "allow", by the older of the two calls.
            let allow = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 };
            let program = libc::sock_fprog { len: 1, filter: (&raw const allow).cast_mut() };
            call(&["prctl", "22", "2", &(&raw const program as i64).to_string()])
        }
        ["limit", resource, value_] => {
            let resource = resource.parse().map_err(|_| Errno::EINVAL)?;
            let value = value(value_).ok_or(Errno::EINVAL)?.cast_unsigned();
            let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
            // SAFETY: `limit` is a valid rlimit.
            returned_by(unsafe { libc::setrlimit(resource, &limit) })
        }
        ["segv"] => {
            // SAFETY: the process ends by the signal, which std would otherwise catch.
            unsafe {
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                libc::raise(libc::SIGSEGV);
            }
            Ok(String::new())
        }
        // Descriptors.
        ["descriptors", upto] => Ok(descriptors(upto.parse().map_err(|_| Errno::EINVAL)?)),
        ["kind", path] => said(fs::read_link(path).map(|it| it.to_string_lossy().into_owned())),
        // Sockets.
        ["tcp", address] => {
            let address: SocketAddr = address.parse().map_err(|_| Errno::EINVAL)?;
            quiet(TcpStream::connect_timeout(&address, Duration::from_secs(5)))
        }
        ["udp", address] => {
            let address: SocketAddr = address.parse().map_err(|_| Errno::EINVAL)?;
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            quiet(UdpSocket::bind(any).and_then(|socket| {
                socket.connect(address)?;
                socket.send(b"x")
            }))
        }
        ["listen", address] => quiet(TcpListener::bind(address)),
        ["unix", path] => quiet(UnixStream::connect(path)),
        ["abstract", name] => {
            let address = std::os::unix::net::SocketAddr::from_abstract_name(name).map_err(errno)?;
            quiet(UnixStream::connect_addr(&address))
        }
        ["interfaces"] => said(fs::read_to_string("/proc/net/dev").map(|text| {
            text.lines()
                .filter_map(|line| line.split_once(':').map(|it| it.0.trim()))
                .collect::<Vec<_>>()
                .join(",")
        })),
        ["ulp", level] => ulp(value(level).ok_or(Errno::EINVAL)?),
        ["ioctl", request] => call(&["ioctl", "0", request, "@@"]),
        // Listening to others.
        ["watch", path, ready] => watch(path, ready),
        ["notify", path] => {
            let folder = File::open(path).map_err(errno)?;
            call(&["fcntl", &folder.as_raw_fd().to_string(), "1026", "0x80000001"])
        }
        ["lock", path] => {
            let file = File::open(path).map_err(errno)?;
            // SAFETY: flock takes two numbers.
            returned_by(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) })
        }
        ["fcntl", path, command, argument] => fcntl(path, command, argument),
        ["clone-files"] => {
            let flags = i64::from(libc::CLONE_FILES | libc::SIGCHLD);
            // SAFETY: without CLONE_VM this is a fork, whose child does nothing.
            let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })?;
            if pid == 0 {
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(0) }
            }
            Ok(String::new())
        }
        ["access-list", path, entries] => access_list(path, entries.parse().map_err(|_| Errno::EINVAL)?),
        ["preadv2", path, flags] => preadv2(path, value(flags).ok_or(Errno::EINVAL)?),
        ["pwritev2", path, flags] => pwritev2(path, value(flags).ok_or(Errno::EINVAL)?),
        ["drop", path] => {
            let file = File::open(path).map_err(errno)?;
            // SAFETY: posix_fadvise takes numbers, and says the errno itself.
            match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
                0 => Ok(String::new()),
                number => Err(Errno::from_raw(number)),
            }
        }
        ["resident", path] => resident(path),
        ["out-of-band", call] => out_of_band(call),
        ["option", kind, level, name] => option(kind, level, name, "1"),
        ["option", kind, level, name, to] => option(kind, level, name, to),
        // Objects of the kernel's.
        ["hold", kind, count] => objects::hold(kind, count),
        // Too much.
        [bomb, ref rest @ ..] => bombs::go(bomb, rest),
        [] => Err(Errno::EINVAL),
    }
}

/// Which of 0 to `upto` are open.
pub fn descriptors(upto: i32) -> String {
    let is_open = |fd: &i32| {
        // SAFETY: F_GETFD takes two numbers.
        unsafe { libc::fcntl(*fd, libc::F_GETFD) >= 0 }
    };
    (0..=upto).filter(is_open).map(|fd| fd.to_string()).collect::<Vec<_>>().join(",")
}

/// An errno out of an error of std's; what is none counts as EPROTO.
pub fn errno(error: std::io::Error) -> Errno {
    match error.raw_os_error() {
        Some(number) => Errno::from_raw(number),
        None if error.kind() == std::io::ErrorKind::TimedOut => Errno::ETIMEDOUT,
        None => Errno::EPROTO,
    }
}

fn quiet<T>(result: std::io::Result<T>) -> Outcome {
    result.map(|_| String::new()).map_err(errno)
}

fn said(result: std::io::Result<String>) -> Outcome {
    result.map_err(errno)
}

fn returned_by(result: i32) -> Outcome {
    Errno::result(result).map(|_| String::new())
}

fn returned(call: impl FnOnce(&CString) -> i32, path: &str) -> Outcome {
    let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
    returned_by(call(&path))
}

fn unsafe_truncate(path: &CString) -> i32 {
    // SAFETY: `path` ends with NUL and outlives the call.
    unsafe { libc::truncate(path.as_ptr(), 0) }
}

fn unsafe_utimes(path: &CString) -> i32 {
    // SAFETY: as above; without times it is "now".
    unsafe { libc::utimes(path.as_ptr(), std::ptr::null()) }
}

fn unsafe_kill(pid: i32, signal: i32) -> i32 {
    // SAFETY: kill takes two numbers.
    unsafe { libc::kill(pid, signal) }
}

/// A pid: a number, `parent`, or `child`, who is made for it.
fn target(word: &str) -> Result<i32, Errno> {
    match word {
        // SAFETY: getppid only answers.
        "parent" => Ok(unsafe { libc::getppid() }),
        "child" => {
            let (mut ready, readies) = std::io::pipe().map_err(errno)?;
            // SAFETY: one thread; the child only waits, and ends with its parent.
            let pid = Errno::result(unsafe { libc::fork() })?;
            if pid == 0 {
                // SAFETY: as above. Closing the pipes is how it says that it is ready.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    for fd in 3..64 {
                        libc::close(fd);
                    }
                    loop {
                        libc::pause();
                    }
                }
            }
            drop(readies);
            let _ = ready.read(&mut [0; 1]);
            Ok(pid)
        }
        number => number.parse().map_err(|_| Errno::EINVAL),
    }
}

fn setxattr(path: &str, name: &str) -> Outcome {
    let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    // A version 2 capability set of one bit, so that security.capability is well-formed; 20 bytes.
    let body: [u32; 5] = [0x0200_0001, 1 << 21, 0, 0, 0];
    // SAFETY: both texts end with NUL, and `body` has 20 bytes.
    returned_by(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), body.as_ptr().cast(), 20, 0) })
}

fn mknod(kind: &str, path: &str) -> Outcome {
    let (mode, device) = match kind {
        "char" => (libc::S_IFCHR, libc::makedev(1, 3)),
        "block" => (libc::S_IFBLK, libc::makedev(7, 0)),
        "fifo" => (libc::S_IFIFO, 0),
        _ => return Err(Errno::EINVAL),
    };
    // SAFETY: `p` ends with NUL and outlives the call.
    returned(|p| unsafe { libc::mknod(p.as_ptr(), mode | 0o666, device) }, path)
}

fn immutable(path: &str) -> Outcome {
    let file = File::open(path).map_err(errno)?;
    let flags: libc::c_long = 0x10;
    // SAFETY: FS_IOC_SETFLAGS reads one long.
    returned_by(unsafe { libc::ioctl(file.as_raw_fd(), 0x4008_6602, &flags) })
}

/// Reads or writes four bytes of another process where this one's own stack is: after a fork the same place.
fn vm(number: i64, pid: i32) -> Outcome {
    let mut bytes = [0u8; 4];
    let part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 4 };
    let part = &raw const part;
    // SAFETY: both vectors are one valid iovec; the other process is a copy of this one or anybody.
    Errno::result(unsafe { libc::syscall(number, pid, part, 1, part, 1, 0) }).map(|_| String::new())
}

/// Asks for kernel TLS on a socket; `level` lets the caller set bits that the kernel ignores.
fn ulp(level: i64) -> Outcome {
    // SAFETY: socket takes numbers; the option is three letters and a NUL.
    let result = unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        libc::syscall(libc::SYS_setsockopt, i64::from(socket), level, 31i64, c"tls".as_ptr(), 4i64)
    };
    Errno::result(result).map(|_| String::new())
}

/// Watches a folder; says on stdout that it does, waits for stdin to end, and says what it saw.
fn watch(path: &str, ready: &str) -> Outcome {
    let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
    // SAFETY: inotify_init1 takes a number.
    let fd = Errno::result(unsafe { libc::inotify_init1(libc::IN_NONBLOCK) })?;
    let mask = libc::IN_OPEN | libc::IN_ACCESS | libc::IN_CLOSE;
    // SAFETY: `path` ends with NUL.
    Errno::result(unsafe { libc::inotify_add_watch(fd, path.as_ptr(), mask) })?;
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(format!("{ready}\n").as_bytes()).and_then(|()| stdout.flush());
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    let mut events = [0u8; 4096];
    // SAFETY: `events` has 4096 bytes.
    let length = Errno::result(unsafe { libc::read(fd, events.as_mut_ptr().cast(), events.len()) })?;
    Ok(String::from_utf8_lossy(&events[..length as usize]).chars().filter(char::is_ascii_graphic).collect())
}

/// A command of fcntl on a file, made if it is not there; `lock` stands for a write lock of the first byte.
fn fcntl(path: &str, command: &str, argument: &str) -> Outcome {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.map_err(errno)?;
    // SAFETY: flock is made of numbers.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_len) = (libc::F_WRLCK as i16, 1);
    let argument = match argument {
        "lock" => &raw const lock as i64,
        number => value(number).ok_or(Errno::EINVAL)?,
    };
    call(&["fcntl", &file.as_raw_fd().to_string(), command, &argument.to_string()])
}

/// An access list of so many entries, all for this user.
fn access_list(path: &str, entries: usize) -> Outcome {
    File::options().write(true).create(true).truncate(false).open(path).map_err(errno)?;
    // SAFETY: getuid only answers.
    let own = unsafe { libc::getuid() };
    let entry = |tag: u16, mode: u16, id: u32| {
        [&tag.to_le_bytes()[..], &mode.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let mut body = 2u32.to_le_bytes().to_vec();
    body.extend(entry(0x01, 6, u32::MAX));
    (0..entries).for_each(|_| body.extend(entry(0x02, 6, own)));
    for tag in [0x04, 0x10, 0x20] {
        body.extend(entry(tag, 6, u32::MAX));
    }
    let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
    let name = c"system.posix_acl_access";
    // SAFETY: both texts end with NUL, and `body` has as many bytes as it says.
    returned_by(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), body.as_ptr().cast(), body.len(), 0) })
}

fn preadv2(path: &str, flags: i64) -> Outcome {
    let file = File::open(path).map_err(errno)?;
    vectored(libc::SYS_preadv2, &file, flags)
}

fn pwritev2(path: &str, flags: i64) -> Outcome {
    let file = File::options().write(true).create(true).truncate(false).open(path).map_err(errno)?;
    vectored(libc::SYS_pwritev2, &file, flags)
}

fn vectored(number: i64, file: &File, flags: i64) -> Outcome {
    let mut bytes = [0u8; 16];
    let part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: one valid vector of 16 bytes, at offset 0.
    Errno::result(unsafe {
        libc::syscall(number, file.as_raw_fd(), &raw const part, 1i64, 0i64, 0i64, flags)
    })
    .map(|_| String::new())
}

/// How many of a file's pages mincore calls resident, of how many.
fn resident(path: &str) -> Outcome {
    let file = File::open(path).map_err(errno)?;
    let length = file.metadata().map_err(errno)?.len() as usize;
    let mut seen = vec![0u8; length.div_ceil(4096)];
    // SAFETY: a fresh mapping of the whole file, never read; `seen` has a byte a page.
    unsafe {
        let fd = file.as_raw_fd();
        let at = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
        if at == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Errno::result(libc::mincore(at, length, seen.as_mut_ptr()))?;
    }
    Ok(format!("{}/{}", seen.iter().filter(|page| **page & 1 == 1).count(), seen.len()))
}

/// One byte out of band over a pair of unix sockets, by one of the calls that send.
fn out_of_band(by: &str) -> Outcome {
    let (a, _b) = UnixStream::pair().map_err(errno)?;
    let part = libc::iovec { iov_base: c"x".as_ptr().cast_mut().cast(), iov_len: 1 };
    // SAFETY: an empty header is one of zeros.
    let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
    (header.msg_hdr.msg_iov, header.msg_hdr.msg_iovlen) = ((&raw const part).cast_mut(), 1);
    let fd = a.as_raw_fd();
    // SAFETY: one header with one vector of one byte.
    Errno::result(unsafe {
        match by {
            "sendto" => libc::send(fd, part.iov_base, 1, libc::MSG_OOB) as i32,
            "sendmsg" => libc::sendmsg(fd, &header.msg_hdr, libc::MSG_OOB) as i32,
            "sendmmsg" => libc::sendmmsg(fd, &mut header, 1, libc::MSG_OOB),
            _ => return Err(Errno::EINVAL),
        }
    })
    .map(|_| String::new())
}

/// Sets an option of a fresh socket: `tcp`, `udp`, or the same with a 6.
fn option(kind: &str, level: &str, name: &str, to: &str) -> Outcome {
    let family = if kind.ends_with('6') { libc::AF_INET6 } else { libc::AF_INET };
    let kind = if kind.starts_with("tcp") { libc::SOCK_STREAM } else { libc::SOCK_DGRAM };
    let (level, name) = (value(level).ok_or(Errno::EINVAL)?, value(name).ok_or(Errno::EINVAL)?);
    let to: i32 = to.parse().map_err(|_| Errno::EINVAL)?;
    // SAFETY: socket takes numbers; the value has 4 bytes.
    let result = unsafe {
        let socket = libc::socket(family, kind, 0);
        libc::syscall(libc::SYS_setsockopt, i64::from(socket), level, name, &raw const to, 4i64)
    };
    Errno::result(result).map(|_| String::new())
}
