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
