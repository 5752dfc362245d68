//! Every confinement is tried for real, in a child of its own that first shows that the attempt works.
//! It must never judge a denial whose positive control did not succeed in the same child.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use gaoler_confine::{Files, Process, after_threads, before_threads, failed_open, no_capabilities};
use gaoler_policy::landlock::{AccessClass, CageRules, no_files, place, restrict_cage};
use gaoler_policy::seccomp::{CAGE, INIT, Threads};
use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket, socketpair};

/// Which case a child runs; the whole of its protocol with its parent is this variable and its exit code.
const CHILD: &str = "GAOLER_CONFINE_CASE";

const CASES: &[(&str, fn())] = &[
    ("t01_the_frontend_can_open_connect_and_start_nothing", || serving(Process::Frontend, Files::None)),
    ("t02_the_upstream_can_open_connect_and_start_nothing", || serving(Process::Upstream, Files::None)),
    ("t03_egress_reaches_its_port_and_no_other", egress),
    ("t04_pid_1_reaps_and_nothing_else", init),
    ("t05_the_cage_filter_refuses_each_with_its_errno", cage_refuses),
    ("t06_ordinary_tools_work_under_the_cage_filter", cage_works),
    ("t07_a_cage_sees_the_places_of_its_rules_and_no_other", cage_places),
    ("t08_landlock_alone_takes_every_file_and_port_away", landlock_alone),
    ("t09_capabilities_read_back_as_zero", capabilities),
    ("t10_the_ledger_opens_its_folder_and_nothing_else", ledger),
    ("t11_the_exporter_reaches_its_port_and_nothing_else", exporter),
];

fn main() {
    if let Some(name) = std::env::var_os(CHILD) {
        let (_, case) = CASES.iter().find(|(known, _)| name == *known).expect("a known case");
        return case();
    }
    // The test runner asks a suite without a harness for its list like any other; nothing here is ignored.
    let asked: Vec<String> = std::env::args().collect();
    if asked.iter().any(|word| word == "--list") {
        let is_ignored = asked.iter().any(|word| word == "--ignored");
        CASES.iter().filter(|_| !is_ignored).for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let mut failed = 0;
    for (name, _) in
        CASES.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| name.contains(w)))
    {
        let output = Command::new(std::env::current_exe().unwrap())
            .env(CHILD, name)
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let word = if output.status.success() { "ok" } else { "FAILED" };
        println!("test {name} ... {word}");
        if !output.status.success() {
            failed += 1;
            println!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
        }
    }
    println!("\ntest result: {failed} failed of {}", CASES.len());
    std::process::exit(i32::from(failed > 0));
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn errno<T>(result: std::io::Result<T>) -> Errno {
    result.err().and_then(|error| error.raw_os_error()).map_or(Errno::from_raw(0), Errno::from_raw)
}

fn refused<T>(result: nix::Result<T>) -> Errno {
    result.err().unwrap_or(Errno::from_raw(0))
}

fn stream(family: AddressFamily) -> nix::Result<OwnedFd> {
    socket(family, SockType::Stream, SockFlag::empty(), None)
}

/// The attempt to make a socket whose last closer waits for its peer.
fn linger(socket: &impl AsFd) -> Errno {
    let hour = nix::libc::linger { l_onoff: 1, l_linger: 3600 };
    refused(nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::Linger, &hour))
}

/// A socket that was there before a confinement, on which the attempt works.
fn can_linger() -> OwnedFd {
    let socket = stream(AddressFamily::Inet).unwrap();
    assert_eq!(linger(&socket), Errno::from_raw(0), "control: SO_LINGER works");
    socket
}

fn start() -> std::io::Result<std::process::ExitStatus> {
    Command::new("/bin/true").status()
}

/// What a process that serves can do before its confinement and cannot after.
fn serving(process: Process, files: Files<'_>) {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = door.local_addr().unwrap();
    drop(TcpStream::connect(address).expect("control: connect works"));
    drop(door.accept().unwrap());
    assert!(start().expect("control: starting works").success());
    assert!(!failed_open(), "control: opening works");
    assert!(nix::sys::sysinfo::sysinfo().is_ok(), "control: an unlisted call works");
    // A client that connected before, as the kernel's queue holds it for the one that was handed the socket.
    let mut client = TcpStream::connect(address).unwrap();
    let lingering = can_linger();

    assert!(before_threads(files).unwrap() >= 2);
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        asked.recv().unwrap();
        errno(File::open("/proc/self/status"))
    });
    after_threads(process).unwrap();

    assert!(failed_open());
    assert_eq!(errno(File::open("/etc/hostname")), Errno::EACCES);
    assert_eq!(errno(std::fs::metadata("/etc/hostname")), Errno::EACCES);
    ask.send(()).unwrap();
    assert_eq!(thread.join().unwrap(), Errno::EACCES, "the thread that was there carries the filter too");
    assert_eq!(refused(stream(AddressFamily::Inet)), Errno::EPERM);
    assert_eq!(refused(stream(AddressFamily::Unix)), Errno::EPERM);
    assert_eq!(start().map_err(|error| error.kind()).err(), Some(ErrorKind::PermissionDenied));
    assert_eq!(refused(nix::sys::sysinfo::sysinfo()), Errno::ENOSYS);
    assert_eq!(refused(nix::sched::unshare(CloneFlags::CLONE_NEWUSER)), Errno::EPERM);

    assert_eq!(linger(&lingering), Errno::EPERM);

    // What it is there for still works: accepting, reading, writing, threads, memory files.
    let (mut peer, _) = door.accept().unwrap();
    peer.set_nodelay(true).unwrap();
    peer.set_nonblocking(false).unwrap();
    client.write_all(b"question").unwrap();
    let mut buffer = [0; 8];
    peer.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"question");
    assert_eq!(std::thread::spawn(|| vec![7u8; 8 << 20][4096]).join().unwrap(), 7);
    if process == Process::Frontend {
        let memory = gaoler_sys::memfd::sealed("options", b"text").unwrap();
        assert_eq!(gaoler_sys::memfd::read(memory, 16).unwrap(), b"text");
    }
}

fn egress() {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let (allowed, forbidden) = (door.local_addr().unwrap(), other.local_addr().unwrap());
    drop(TcpStream::connect(forbidden).expect("control: connecting works"));
    assert!(start().expect("control: starting works").success());

    let lingering = can_linger();

    let abi = before_threads(Files::ButConnect(&[allowed.port()])).unwrap();
    after_threads(Process::Egress).unwrap();

    assert_eq!(linger(&lingering), Errno::EPERM);
    assert_eq!(linger(&TcpStream::connect(allowed).unwrap()), Errno::EPERM);
    if abi >= gaoler_policy::landlock::ABI_TCP {
        assert_eq!(errno(TcpStream::connect(forbidden)), Errno::EACCES);
        assert_eq!(errno(TcpListener::bind("127.0.0.1:0")), Errno::EACCES);
    }
    // A DNS question needs a UDP socket with a port of its own.
    let question = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    question.connect("127.0.0.1:53").unwrap();
    assert!(failed_open());
    assert_eq!(refused(stream(AddressFamily::Unix)), Errno::EAFNOSUPPORT);
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), None);
    assert_eq!(refused(raw), Errno::EAFNOSUPPORT);
    assert_eq!(start().map_err(|error| error.kind()).err(), Some(ErrorKind::PermissionDenied));
    assert_eq!(errno(std::thread::Builder::new().spawn(|| ())), Errno::EPERM);
}

fn exporter() {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let (allowed, forbidden) = (door.local_addr().unwrap(), other.local_addr().unwrap());
    drop(TcpStream::connect(forbidden).expect("control: connecting works"));
    drop(std::net::UdpSocket::bind("127.0.0.1:0").expect("control: a datagram works"));
    assert!(start().expect("control: starting works").success());

    // As it does: first with the name servers' port beside its own, then without.
    before_threads(Files::ButConnect(&[allowed.port(), forbidden.port()])).unwrap();
    drop(TcpStream::connect(forbidden).expect("control: it was allowed until here"));
    let abi = before_threads(Files::ButConnect(&[allowed.port()])).unwrap();
    let lingering = can_linger();
    after_threads(Process::Exporter).unwrap();

    assert_eq!(linger(&lingering), Errno::EPERM);
    assert_eq!(linger(&TcpStream::connect(allowed).unwrap()), Errno::EPERM);
    if abi >= gaoler_policy::landlock::ABI_TCP {
        assert_eq!(errno(TcpStream::connect(forbidden)), Errno::EACCES);
    }
    assert_eq!(errno(TcpListener::bind("127.0.0.1:0")), Errno::EPERM);
    assert_eq!(errno(std::net::UdpSocket::bind("127.0.0.1:0")), Errno::EAFNOSUPPORT);
    assert_eq!(errno(door.accept()), Errno::EPERM);
    assert!(failed_open());
    assert_eq!(errno(File::open("/etc/hostname")), Errno::EACCES);
    assert_eq!(refused(stream(AddressFamily::Unix)), Errno::EAFNOSUPPORT);
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), None);
    assert_eq!(refused(raw), Errno::EAFNOSUPPORT);
    assert_eq!(start().map_err(|error| error.kind()).err(), Some(ErrorKind::PermissionDenied));
    assert_eq!(errno(std::thread::Builder::new().spawn(|| ())), Errno::EPERM);
}

fn ledger() {
    let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(other.path().join("file"), "theirs").unwrap();
    assert!(File::open(other.path().join("file")).is_ok(), "control: opening works");
    assert!(start().expect("control: starting works").success());
    let lingering = can_linger();
    assert!(before_threads(Files::ButBelow(own.path())).unwrap() >= 2);
    after_threads(Process::Ledger).unwrap();
    assert_eq!(linger(&lingering), Errno::EPERM);

    // What a database needs: a file that is made, written, locked, synchronized, read and removed.
    let path = own.path().join("ledger.db");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"page").unwrap();
    file.sync_all().unwrap();
    let lock = libc_lock();
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETLK(&lock)).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"page");
    std::fs::remove_file(&path).unwrap();

    assert!(failed_open());
    assert_eq!(errno(File::open(other.path().join("file"))), Errno::EACCES);
    assert_eq!(errno(File::create(other.path().join("new"))), Errno::EACCES);
    assert_eq!(errno(std::fs::remove_file(other.path().join("file"))), Errno::EACCES);
    assert_eq!(errno(std::fs::create_dir(own.path().join("folder"))), Errno::EACCES);
    assert_eq!(errno(std::os::unix::fs::symlink("/etc", own.path().join("link"))), Errno::EACCES);
    assert_eq!(refused(stream(AddressFamily::Inet)), Errno::EPERM);
    assert_eq!(refused(stream(AddressFamily::Unix)), Errno::EPERM);
    assert_eq!(start().map_err(|error| error.kind()).err(), Some(ErrorKind::PermissionDenied));
    assert_eq!(errno(std::thread::Builder::new().spawn(|| ())), Errno::EPERM);
    assert_eq!(refused(nix::unistd::chroot(".")), Errno::EPERM);
    // Its folder is the test's to remove, and this process may not.
    std::process::exit(0);
}

fn libc_lock() -> nix::libc::flock {
    nix::libc::flock { l_type: nix::libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 1, l_pid: 0 }
}

fn init() {
    let mut child = Command::new("/bin/sleep").arg("0.05").spawn().unwrap();
    assert!(!failed_open(), "control: opening works");
    before_threads(Files::None).unwrap();
    let lingering = can_linger();
    INIT.install(Threads::All).unwrap();
    assert_ne!(linger(&lingering), Errno::from_raw(0));
    assert!(child.wait().unwrap().success());
    assert_eq!(errno(File::open("/")), Errno::EACCES);
    assert_eq!(start().map_err(|error| error.kind()).err(), Some(ErrorKind::PermissionDenied));
    assert_eq!(refused(stream(AddressFamily::Unix)), Errno::EPERM);
}

fn cage_filter() {
    nix::sys::prctl::set_no_new_privs().unwrap();
    CAGE.install(Threads::One).unwrap();
}

/// One attempt with its name.
type Attempt = (&'static str, fn() -> Errno, Errno);

fn cage_refuses() {
    let family = |family| refused(socket(family, SockType::Datagram, SockFlag::empty(), None));
    // A control says what the attempt gives without the filter: anything but the filter's answer.
    let attempts: &[Attempt] = &[
        ("unshare", || refused(nix::sched::unshare(CloneFlags::CLONE_NEWUTS)), Errno::EPERM),
        ("mount", || refused(mount_tmpfs()), Errno::EPERM),
        ("chroot", || refused(nix::unistd::chroot("/")), Errno::EPERM),
        ("mknod char", || mknod(nix::sys::stat::SFlag::S_IFCHR), Errno::EPERM),
        ("personality", || refused(randomize_off()), Errno::EPERM),
        ("raw socket", || raw(AddressFamily::Inet), Errno::EAFNOSUPPORT),
        ("packet socket", || raw(AddressFamily::Packet), Errno::EAFNOSUPPORT),
        ("setns", || refused(setns()), Errno::EPERM),
    ];
    for (name, attempt, answer) in attempts {
        assert_ne!(attempt(), *answer, "control: {name} is not refused this way without the filter");
    }
    let lingering = can_linger();
    cage_filter();
    assert_eq!(linger(&lingering), Errno::ENOPROTOOPT);
    for (name, attempt, answer) in attempts {
        assert_eq!(attempt(), *answer, "{name}");
    }
    for refused in [AddressFamily::Alg, AddressFamily::Vsock, AddressFamily::Can, AddressFamily::Key] {
        assert_eq!(family(refused), Errno::EAFNOSUPPORT, "{refused:?}");
    }
    assert_eq!(refused(nix::sys::ptrace::traceme()), Errno::EPERM);
    for allowed in [AddressFamily::Unix, AddressFamily::Inet, AddressFamily::Inet6] {
        assert_eq!(family(allowed), Errno::from_raw(0), "{allowed:?}");
    }
    let route = nix::sys::socket::SockProtocol::NetlinkRoute;
    socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), route).unwrap();
    let audit = nix::sys::socket::SockProtocol::NetlinkAudit;
    let other = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), audit);
    assert_eq!(refused(other), Errno::EAFNOSUPPORT);
    socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty()).unwrap();
    assert_eq!(mknod(nix::sys::stat::SFlag::S_IFIFO), Errno::from_raw(0), "a pipe by name is allowed");
}

fn mount_tmpfs() -> nix::Result<()> {
    let place = tempfile::tempdir().unwrap();
    let none = None::<&str>;
    nix::mount::mount(none, place.path(), Some("tmpfs"), nix::mount::MsFlags::empty(), none)?;
    nix::mount::umount(place.path())
}

fn mknod(kind: nix::sys::stat::SFlag) -> Errno {
    let folder = tempfile::tempdir().unwrap();
    let mode = nix::sys::stat::Mode::S_IRUSR;
    refused(nix::sys::stat::mknod(&folder.path().join("node"), kind, mode, nix::sys::stat::makedev(1, 3)))
}

fn randomize_off() -> nix::Result<()> {
    use nix::sys::personality;
    let before = personality::get()?;
    personality::set(before | personality::Persona::ADDR_NO_RANDOMIZE)?;
    personality::set(before).map(drop)
}

fn raw(family: AddressFamily) -> Errno {
    refused(socket(family, SockType::Raw, SockFlag::empty(), nix::sys::socket::SockProtocol::Icmp))
}

fn setns() -> nix::Result<()> {
    nix::sched::setns(File::open("/proc/self/ns/uts").unwrap(), CloneFlags::CLONE_NEWUTS)
}

const TOOLS: &str = r#"
set -e
cd "$1"
echo text > a; cp -a a b; mv b c; ln -s a d; ln a e; chmod 600 a; touch -d yesterday a; mkfifo pipe; rm e
tar cf t.tar a c d; tar tf t.tar | sort | head -1; dd if=/dev/zero of=z bs=64k count=4 status=none; truncate -s 1 z
grep -r text . > /dev/null; find . -type f | xargs wc -l > /dev/null; df . > /dev/null; nproc; timeout 5 sleep 0.01
(sleep 5 & kill $!); echo <(true) > /dev/null; ulimit -n 64; nice -n 1 true; bash -c 'coproc cat; kill $!'
if command -v perl; then perl -e 'alarm 5; open(my $f, "<", "a"); print <$f>; my $p = fork(); exit 0 unless $p; waitpid($p, 0)'; fi
if command -v git; then
  export HOME="$1" GIT_CONFIG_NOSYSTEM=1
  git init -q r; cd r; echo x > f; git add f
  git -c user.name=a -c user.email=a@a commit -qm x; git log --oneline | wc -l; git gc -q; git clone -q . ../r2; cd ..
fi
if command -v python3; then python3 - <<'P'
import threading, subprocess, socket, multiprocessing, os, tempfile, select, signal, time, random, shutil
t = threading.Thread(target=lambda: None); t.start(); t.join()
assert subprocess.run(["true"]).returncode == 0
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(); c = socket.create_connection(s.getsockname()); c.close()
socket.if_nameindex(); os.memfd_create("x"); shutil.copy("a", "a2"); select.epoll().close()
q = multiprocessing.get_context("fork").Queue(); q.put(1); assert q.get() == 1
assert multiprocessing.Pool(2).map(abs, [-1, -2]) == [1, 2]
P
fi
if command -v node; then node -e 'const{execSync}=require("child_process");execSync("true");require("os").networkInterfaces();new (require("worker_threads").Worker)("",{eval:true});setTimeout(()=>process.exit(0),50)'; fi
if command -v gcc; then echo 'int main(){return 0;}' > m.c; printf 'm: m.c\n\tgcc -o m m.c\n' > Makefile; make -s -j2 && ./m; fi
if command -v curl; then curl -s file://"$1"/a > /dev/null; fi
if command -v rg; then rg -q text; fi
echo all done
"#;

fn cage_works() {
    let run = || {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        std::fs::write(&script, TOOLS).unwrap();
        let output = Command::new("/bin/bash").arg(&script).arg(folder.path()).output().unwrap();
        let found = text(&output.stdout).lines().last() == Some("all done") && output.status.success();
        (found, format!("{}{}", text(&output.stdout), text(&output.stderr)))
    };
    let (works, said) = run();
    assert!(works, "control: {said}");
    cage_filter();
    let (works, said_inside) = run();
    assert!(works, "{said_inside}");
}

fn cage_places() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("file"), "text").unwrap();
        path
    };
    let (read, full, outside) = (make("read"), make("full"), make("outside"));
    assert!(std::fs::read(outside.join("file")).is_ok(), "control: reading works");
    assert!(std::fs::write(read.join("new"), "").is_ok(), "control: writing works");
    assert!(start().expect("control: starting works").success());
    let base = CageRules::open([
        (Path::new("/usr"), AccessClass::ReadExecute),
        (Path::new("/dev/null"), AccessClass::Device),
        (Path::new("/nowhere"), AccessClass::Read),
        (read.as_path(), AccessClass::Read),
    ])
    .unwrap();
    assert_eq!(base.base().len(), 3);
    let own = place(&full).unwrap();
    let abi = restrict_cage(&base.base(), &[(own.as_fd(), AccessClass::Full)], None).unwrap();

    assert_eq!(errno(File::open(outside.join("file"))), Errno::EACCES);
    assert_eq!(errno(File::open("/etc/hostname")), Errno::EACCES);
    assert_eq!(std::fs::read(read.join("file")).unwrap(), b"text");
    assert_eq!(errno(std::fs::write(read.join("file"), "")), Errno::EACCES);
    assert_eq!(errno(std::fs::write(read.join("newer"), "")), Errno::EACCES);
    assert_eq!(errno(std::fs::remove_file(read.join("new"))), Errno::EACCES);
    std::fs::write(full.join("new"), "x").unwrap();
    std::fs::create_dir(full.join("folder")).unwrap();
    std::fs::rename(full.join("new"), full.join("folder/new")).unwrap();
    std::fs::write("/dev/null", "x").unwrap();
    assert!(start().unwrap().success(), "/usr may be executed");
    std::fs::copy(read.join("file"), full.join("copy")).unwrap();
    assert_eq!(errno(std::fs::rename(full.join("copy"), read.join("copy"))), Errno::EACCES);
    assert!(abi >= gaoler_policy::landlock::ABI_MINIMUM);
    // TCP is the network namespace's to bound.
    drop(TcpListener::bind("127.0.0.1:0").unwrap());
    // A symbolic link is no place: its target could be anything by the time that a rule is made of it.
    assert_eq!(errno(place(Path::new("/proc/self"))), Errno::ELOOP);
}

fn landlock_alone() {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = door.local_addr().unwrap();
    drop(TcpStream::connect(address).expect("control: connect works"));
    assert!(!failed_open(), "control: opening works");
    let held = File::open("/etc/passwd").unwrap();
    let abi = no_files().unwrap();
    assert!(failed_open());
    assert_eq!(errno(File::open("/etc/passwd")), Errno::EACCES);
    let mut byte = [0];
    assert_eq!((&held).read(&mut byte).unwrap(), 1, "what is held stays usable");
    if abi >= gaoler_policy::landlock::ABI_TCP {
        assert_eq!(errno(TcpStream::connect(address)), Errno::EACCES);
    }
}

fn capabilities() {
    let line = |name: &str| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let found = status.lines().find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(found.unwrap().trim(), 16).unwrap()
    };
    let root = nix::unistd::geteuid().is_root();
    assert_eq!(line("CapEff:") != 0, root, "control: root has some");
    no_capabilities().unwrap();
    for name in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(line(name), 0, "{name}");
    }
    assert!(!root || line("CapBnd:") == 0);
}
