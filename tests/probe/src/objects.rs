//! Attempts that make kernel objects, as many as they are told or can, keep them, say how many, and stay until they
//! are ended: whoever asked looks from outside at what they take.
//! It must never let go of what it has made.

use std::fs::File;
use std::io::{Read, Write};
use std::mem::size_of_val;

use nix::errno::Errno;

use crate::Outcome;
use crate::attempts::errno;

/// One write into a socket or pipe.
const BLOCK: usize = 64_000;
/// Rounds of writing after which a set of sockets that always takes more is given up as bottomless.
const ROUNDS_MAX: usize = 4_000;
/// An error queue holds an acknowledgement of each of so many datagrams, whole.
const DATAGRAMS: usize = 300;
/// Questions in one message to netlink, and such messages.
const QUESTIONS: usize = 400;
const MESSAGES: usize = 100;

/// Makes `count` objects of this kind, says how many it has and what stopped it, and stays until stdin ends.
pub fn hold(kind: &str, count: &str) -> Outcome {
    let count: usize = count.parse().map_err(|_| Errno::EINVAL)?;
    let mut kept = Vec::new();
    let (made, stopped) = match kind {
        "tcp" => connections(count, true, &mut kept)?,
        "tcp-unaccepted" => connections(count, false, &mut kept)?,
        "udp" => datagrams(count, &mut kept)?,
        "udp-errors" => each(count, || errors(&mut kept)),
        "udp-corked" => each(count, || {
            let socket = datagram(&mut kept)?;
            connect(socket, 9)?;
            send(socket, BLOCK, libc::MSG_MORE).map(drop)
        }),
        "netlink" => each(count, || answers(&mut kept)),
        "unix" => each(count, || {
            let [near, far] = pair()?;
            kept.extend([near, far]);
            fill(near);
            Ok(())
        }),
        "pipe" => each(count, || {
            let mut ends = [0; 2];
            // SAFETY: `ends` has room for two descriptors.
            Errno::result(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK) })?;
            kept.extend(ends);
            // SAFETY: F_SETPIPE_SZ takes numbers.
            Errno::result(unsafe { libc::fcntl(ends[1], libc::F_SETPIPE_SZ, 1 << 20) })?;
            let block = [1u8; BLOCK];
            // SAFETY: `block` has so many bytes.
            while unsafe { libc::write(ends[1], block.as_ptr().cast(), block.len()) } > 0 {}
            Ok(())
        }),
        // SAFETY: these calls take numbers.
        "eventfd" => each(count, || keep(unsafe { libc::eventfd(0, 0) }, &mut kept)),
        // SAFETY: as above.
        "timerfd" => each(count, || keep(unsafe { libc::timerfd_create(0, 0) }, &mut kept)),
        // SAFETY: as above.
        "epoll" => each(count, || keep(unsafe { libc::epoll_create1(0) }, &mut kept)),
        "memfd" => each(count, || {
            // SAFETY: the name ends with NUL.
            let fd = Errno::result(unsafe { libc::memfd_create(c"x".as_ptr(), libc::MFD_ALLOW_SEALING) })?;
            kept.push(fd);
            let block = [1u8; BLOCK];
            // SAFETY: `block` has so many bytes; the seal takes a number.
            Errno::result(unsafe {
                libc::write(fd, block.as_ptr().cast(), block.len());
                libc::fcntl(
                    fd,
                    libc::F_ADD_SEALS,
                    libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE,
                )
            })
            .map(drop)
        }),
        "timer" => each(count, || {
            let mut timer: libc::timer_t = std::ptr::null_mut();
            // SAFETY: without an event the default one is taken; `timer` is a valid place for the answer.
            Errno::result(unsafe { libc::timer_create(0, std::ptr::null_mut(), &raw mut timer) }).map(drop)
        }),
        "signal" => queue(count)?,
        "tmpfs-inode" => {
            std::fs::create_dir("/tmp/o").map_err(errno)?;
            numbered(count, |n| File::create(format!("/tmp/o/{n}")).map(drop).map_err(errno))
        }
        "negative-dentry" => {
            // Names that nobody has asked for: one that is remembered is counted for who asked first.
            let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos());
            numbered(count, |n| match std::fs::metadata(format!("/usr/{now}-{n:0>160}")) {
                Ok(_) => Err(Errno::EEXIST),
                Err(_) => Ok(()),
            })
        }
        "process" => each(count, child),
        "page-table" => sparse(count),
        "io-context" => each(count, || {
            // IOPRIO_CLASS_BE for this process: one object a process, however often.
            // SAFETY: ioprio_set takes numbers.
            Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, 2 << 13 | 7) }).map(drop)
        }),
        "tcp-waiting" => waiting(count)?,
        _ => return Err(Errno::EINVAL),
    };
    let mut stdout = std::io::stdout();
    let line = format!("held {made} {}\n", stopped.map_or("all".to_owned(), |errno| format!("{errno:?}")));
    stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()).map_err(errno)?;
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    drop(kept);
    Ok(made.to_string())
}

/// How many there were, and the refusal that ended it.
type Made = (usize, Option<Errno>);

fn each(count: usize, mut one: impl FnMut() -> Result<(), Errno>) -> Made {
    numbered(count, |_| one())
}

fn numbered(count: usize, mut one: impl FnMut(usize) -> Result<(), Errno>) -> Made {
    for n in 0..count {
        if let Err(errno) = one(n) {
            return (n, Some(errno));
        }
    }
    (count, None)
}

fn keep(fd: i32, kept: &mut Vec<i32>) -> Result<(), Errno> {
    kept.push(Errno::result(fd)?);
    Ok(())
}

fn socket(family: i32, kind: i32, protocol: i32, kept: &mut Vec<i32>) -> Result<i32, Errno> {
    // SAFETY: socket takes numbers.
    let fd = Errno::result(unsafe { libc::socket(family, kind | libc::SOCK_NONBLOCK, protocol) })?;
    kept.push(fd);
    Ok(fd)
}

fn pair() -> Result<[i32; 2], Errno> {
    let mut ends = [0; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
    // SAFETY: `ends` has room for two descriptors.
    Errno::result(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
    Ok(ends)
}

fn option(fd: i32, level: i32, name: i32, value: i32) -> Result<(), Errno> {
    // SAFETY: the option is four bytes.
    Errno::result(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), 4) }).map(drop)
}

/// Asks for the largest receive buffer; 8 MiB are what a host allows at most where this was measured.
fn largest(fd: i32) -> Result<(), Errno> {
    option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 8 << 20)
}

fn loopback(port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_be_bytes([127, 0, 0, 1]).to_be() },
        sin_zero: [0; 8],
    }
}

fn bind(fd: i32) -> Result<u16, Errno> {
    let mut address = loopback(0);
    let mut length = size_of_val(&address) as u32;
    // SAFETY: `address` is a sockaddr_in of this length.
    unsafe {
        Errno::result(libc::bind(fd, (&raw const address).cast(), length))?;
        Errno::result(libc::getsockname(fd, (&raw mut address).cast(), &raw mut length))?;
    }
    Ok(u16::from_be(address.sin_port))
}

/// Connects; what is under way counts, since nobody is far away.
fn connect(fd: i32, port: u16) -> Result<(), Errno> {
    let address = loopback(port);
    // SAFETY: `address` is a sockaddr_in of this length.
    match Errno::result(unsafe {
        libc::connect(fd, (&raw const address).cast(), size_of_val(&address) as u32)
    }) {
        Ok(_) | Err(Errno::EINPROGRESS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn send(fd: i32, bytes: usize, flags: i32) -> Result<usize, Errno> {
    let block = [1u8; BLOCK];
    // SAFETY: `block` has at least so many bytes.
    Errno::result(unsafe {
        libc::send(fd, block.as_ptr().cast(), bytes.min(BLOCK), flags | libc::MSG_NOSIGNAL)
    })
    .map(|sent| sent.unsigned_abs())
}

fn fill(fd: i32) {
    while send(fd, BLOCK, 0).is_ok() {}
}

/// TCP over loopback, written to until none of them takes more and read by nobody. Also where the listener, whom each
/// connection takes after, asked for the largest buffer and never accepts.
fn connections(count: usize, accepts: bool, kept: &mut Vec<i32>) -> Result<Made, Errno> {
    let listener = socket(libc::AF_INET, libc::SOCK_STREAM, 0, kept)?;
    if !accepts {
        largest(listener)?;
    }
    let port = bind(listener)?;
    // SAFETY: listen takes numbers.
    Errno::result(unsafe { libc::listen(listener, 4096) })?;
    let mut writers = Vec::new();
    let made = each(count, || {
        let writer = socket(libc::AF_INET, libc::SOCK_STREAM, 0, kept)?;
        connect(writer, port)?;
        if accepts {
            // SAFETY: without an address accept4 takes numbers.
            let accept = || unsafe {
                libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_NONBLOCK)
            };
            kept.push(Errno::result(accept())?);
        }
        writers.push(writer);
        Ok(())
    });
    for _ in 0..ROUNDS_MAX {
        let taken: usize = writers.iter().map(|writer| send(*writer, BLOCK, 0).unwrap_or(0)).sum();
        if taken == 0 {
            break;
        }
    }
    Ok(made)
}

/// Connections that both sides have closed: each waits for a minute.
fn waiting(count: usize) -> Result<Made, Errno> {
    let listener = socket(libc::AF_INET, libc::SOCK_STREAM, 0, &mut Vec::new())?;
    let port = bind(listener)?;
    // SAFETY: listen takes numbers.
    Errno::result(unsafe { libc::listen(listener, 64) })?;
    Ok(each(count, || {
        let near = socket(libc::AF_INET, libc::SOCK_STREAM, 0, &mut Vec::new())?;
        connect(near, port)?;
        // SAFETY: as above; both descriptors are this function's own, and poll gets one live entry.
        unsafe {
            // On a busy machine the handshake's last step is another's work, a moment later.
            let mut listens = libc::pollfd { fd: listener, events: libc::POLLIN, revents: 0 };
            Errno::result(libc::poll(&raw mut listens, 1, 10_000))?;
            let far = Errno::result(libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut()))?;
            libc::close(near);
            libc::close(far);
        }
        Ok(())
    }))
}

fn datagram(kept: &mut Vec<i32>) -> Result<i32, Errno> {
    socket(libc::AF_INET, libc::SOCK_DGRAM, 0, kept)
}

/// UDP sockets with the largest buffer, sent to until they are full.
fn datagrams(count: usize, kept: &mut Vec<i32>) -> Result<Made, Errno> {
    let sender = datagram(kept)?;
    Ok(each(count, || {
        let receiver = datagram(kept)?;
        largest(receiver)?;
        let port = bind(receiver)?;
        connect(sender, port)?;
        for _ in 0..DATAGRAMS {
            let _ = send(sender, BLOCK, 0);
        }
        Ok(())
    }))
}

/// A UDP socket that is told of each datagram that it was sent, with the datagram.
fn errors(kept: &mut Vec<i32>) -> Result<(), Errno> {
    const SO_TIMESTAMPING: i32 = 37;
    // SOF_TIMESTAMPING_TX_SOFTWARE, SOF_TIMESTAMPING_RX_SOFTWARE, SOF_TIMESTAMPING_SOFTWARE.
    const STAMPS: i32 = 1 << 1 | 1 << 3 | 1 << 4;
    let socket = datagram(kept)?;
    largest(socket)?;
    option(socket, libc::SOL_SOCKET, SO_TIMESTAMPING, STAMPS)?;
    connect(socket, 9)?;
    for _ in 0..DATAGRAMS {
        let _ = send(socket, BLOCK, 0);
    }
    Ok(())
}

/// A netlink socket whose answers nobody reads.
fn answers(kept: &mut Vec<i32>) -> Result<(), Errno> {
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE, kept)?;
    largest(socket)?;
    // struct nlmsghdr and one word: RTM_GETLINK, NLM_F_REQUEST and NLM_F_ACK.
    let question: [u32; 5] = [20, 18 | 5 << 16, 0, 0, 0];
    let questions = [question; QUESTIONS];
    for _ in 0..MESSAGES {
        // SAFETY: `questions` has so many bytes.
        unsafe { libc::send(socket, questions.as_ptr().cast(), size_of_val(&questions), 0) };
    }
    Ok(())
}

/// Signals of one's own that are never taken.
fn queue(count: usize) -> Result<Made, Errno> {
    // SAFETY: the set is filled by the call before it is used; one thread.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        Errno::result(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
    }
    // SAFETY: sigqueue takes numbers and a value that nobody reads.
    Ok(each(count, || unsafe {
        let value = libc::sigval { sival_ptr: std::ptr::null_mut() };
        Errno::result(libc::sigqueue(libc::getpid(), libc::SIGRTMIN(), value)).map(drop)
    }))
}

/// A child that waits, and ends with its parent.
fn child() -> Result<(), Errno> {
    // SAFETY: one thread; the child only waits.
    match Errno::result(unsafe { libc::fork() })? {
        0 => loop {
            // SAFETY: as above.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                for fd in 0..64 {
                    libc::close(fd);
                }
                libc::pause();
            }
        },
        _ => Ok(()),
    }
}

/// One byte in each so many: a page of tables for each.
fn sparse(count: usize) -> Made {
    const APART: usize = 2 << 20;
    let length = count.saturating_mul(APART);
    // SAFETY: a fresh mapping, touched within its length.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let start = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return (0, Some(Errno::last()));
        }
        libc::madvise(start, length, libc::MADV_NOHUGEPAGE);
        // Read, so that every page is the one of zeros, and the tables are all that is new.
        for n in 0..count {
            start.cast::<u8>().add(n * APART).read_volatile();
        }
    }
    (count, None)
}
