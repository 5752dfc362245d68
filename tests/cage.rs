//! What a command in a cage cannot do, however hard it tries; and that all of it works outside. Needs root.
//! It must never judge by the probe's word alone: what was not to be touched is looked at from outside.

#[path = "support/probe.rs"]
mod probe;

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use probe::{Canary, Row, check, check_on, exec, inside, outside};
use serde_json::Value;

/// A bound on what must end by itself; never a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// A state folder: root's alone, whatever the suite's umask is.
fn state() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).expect("a mode");
    folder
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn until(what: &str, mut look: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !look() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The workspace of the only tenant of a state, as the host sees it.
fn workspace(state: &Path) -> PathBuf {
    let tenants = fs::read_dir(state.join("tenants")).expect("tenants");
    let tenants: Vec<PathBuf> = tenants.map(|it| it.expect("an entry").path()).collect();
    assert_eq!(tenants.len(), 1, "{tenants:?}");
    tenants[0].join("workspaces/default")
}

fn run(state: &Path, words: &[&str]) -> Output {
    exec(state, words).output().expect("gaoler")
}

/// Runs with a report; the output and the report.
fn reported(state: &Path, words: &[&str]) -> (Output, Value) {
    let path = state.join("report.json");
    let words = [&["--report", path.to_str().expect("text")], words].concat();
    let output = run(state, &words);
    let report = fs::read(&path).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output, serde_json::from_slice(&report).expect("JSON"))
}

/// The same for attempts of the probe.
fn probed(state: &Path, flags: &[&str], attempts: &[&str]) -> (Output, Value) {
    let path = state.join("report.json");
    let flags = [&["--report", path.to_str().expect("text")], flags].concat();
    let output = probe::caged(state, &flags, attempts).output().expect("gaoler");
    let report = fs::read(&path).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output, serde_json::from_slice(&report).expect("JSON"))
}

// ---- files --------------------------------------------------------------------------------------------

#[test]
fn t20_no_file_of_the_host_can_be_named() {
    let state = state();
    let folder = tempfile::tempdir().expect("a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("a mode");
    let canary = Canary::at(folder.path().join("canary"));
    let other =
        run(state.path(), &["--tenant", "other", "--", "sh", "-c", "echo canary > kept; chmod 666 kept"]);
    assert!(other.status.success(), "{other:?}");
    let kept = workspace(state.path()).join("kept");
    let (path, kept, own) =
        (canary.path(), kept.to_str().expect("text"), state.path().to_str().expect("text"));
    // This process stands for the supervisor and everybody else: root may look into it, and a cage sees no such
    // number.
    let pid = std::process::id();
    let attempts = [
        format!("read {path}"),
        format!("read /proc/self/root{path}"),
        format!("read /proc/{pid}/root{path}"),
        format!("read /proc/self/cwd/..{path}"),
        format!("read /workspace/../../../..{path}"),
        format!("write {path}"),
        format!("stat {path}"),
        format!("list {own}"),
        format!("read {kept}"),
        format!("write {kept}"),
        format!("read /proc/{pid}/environ"),
        format!("read /proc/{pid}/cmdline"),
        format!("read /proc/{pid}/maps"),
        format!("list /proc/{pid}/fd"),
        format!("list /proc/{pid}/root"),
        format!("kind /proc/{pid}/exe"),
        format!("kind /proc/{pid}/cwd"),
    ];
    let mut rows: Vec<Row<'_>> = attempts.iter().map(|it| (it.as_str(), "ok", "ENOENT")).collect();
    // The tests stand in another folder, and there is no /workspace here.
    (rows[3].1, rows[4].1) = ("-", "-");
    rows.extend([
        ("read /etc/shadow", "ok", "ENOENT"),
        ("list /root", "ok", "ENOENT"),
        ("list /boot", "ok", "ENOENT"),
        ("list /sys", "ok", "ENOENT"),
        ("list /sys/fs/cgroup", "ok", "ENOENT"),
        ("list /var/lib", "ok", "ENOENT"),
        ("list /mnt", "ok", "EACCES"),
        ("read /proc/1/environ", "-", "ENOENT"),
        ("list /proc/1/root", "-", "ENOENT"),
        ("kind /proc/1/exe", "-", "ENOENT"),
        ("read /.probe", "-", "EACCES"),
        ("read /proc/kcore", "-", "ENOENT"),
        ("read /proc/kmsg", "-", "EACCES"),
        ("stat /dev/kmsg", "-", "ENOENT"),
        ("stat /dev/mem", "-", "ENOENT"),
        ("stat /dev/kvm", "-", "ENOENT"),
        ("stat /dev/fuse", "-", "ENOENT"),
        ("stat /dev/vsock", "-", "ENOENT"),
        ("stat /dev/net/tun", "-", "ENOENT"),
        ("stat /dev/loop-control", "-", "ENOENT"),
        ("stat /dev/tty", "ok", "ENOENT"),
        ("stat /dev/ptmx", "ok", "ENOENT"),
        ("list /dev/pts", "ok", "ENOENT"),
    ]);
    let said = check_on(state.path(), &[], &rows);
    assert!(!said.concat().contains("canary"), "{said:?}");
    // The controls have written; a cage would have written once more.
    assert_eq!(fs::read_to_string(&canary.0).expect("the canary").matches("hurt").count(), 1);
    assert_eq!(fs::read_to_string(kept).expect("the file"), "canary\nhurt");
}

#[test]
fn t21_nothing_of_the_host_that_is_visible_can_be_changed() {
    let state = state();
    let canary = Canary::at(PathBuf::from(format!("/usr/share/gaoler-canary-{}", std::process::id())));
    let cli = tempfile::tempdir().expect("a folder");
    let cli = Canary::at(cli.path().join("claude"));
    fs::set_permissions(&cli.0, fs::Permissions::from_mode(0o777)).expect("a mode");
    let path = canary.path();
    let before = fs::metadata(path).expect("the canary");
    let attempts = [
        (format!("read {path}"), "ok", "ok"),
        (format!("write {path}"), "ok", "EROFS"),
        (format!("truncate {path}"), "ok", "EROFS"),
        (format!("utimes {path}"), "ok", "EROFS"),
        (format!("chmod 666 {path}"), "ok", "EROFS"),
        (format!("chown {path}"), "ok", "EROFS"),
        (format!("setxattr {path} user.x"), "ok", "EROFS"),
        (format!("rename {path} {path}-moved"), "-", "EROFS"),
        (format!("unlink {path}"), "-", "EROFS"),
        (format!("link {path} {{W}}/linked"), "-", "EXDEV"),
        (format!("create {path}-new"), "-", "EROFS"),
        (format!("mkdir {path}-new"), "-", "EROFS"),
    ];
    let mut rows: Vec<Row<'_>> =
        attempts.iter().map(|(it, free, caged)| (it.as_str(), *free, *caged)).collect();
    rows.extend([
        ("create /new", "-", "EROFS"),
        ("create /etc/new", "-", "EROFS"),
        ("write /etc/passwd", "-", "EACCES"),
        ("chmod 666 /etc/passwd", "-", "EROFS"),
        ("unlink /etc/passwd", "-", "EROFS"),
        ("link /etc/passwd {W}/passwd", "-", "EXDEV"),
        ("create /dev/new", "-", "EROFS"),
        ("unlink /dev/null", "-", "EROFS"),
        ("chmod 600 /dev/null", "-", "EROFS"),
        ("utimes /dev/null", "-", "EROFS"),
        ("write /opt/claude/claude", "-", "EROFS"),
        ("truncate /opt/claude/claude", "-", "EROFS"),
        ("unlink /opt/claude/claude", "-", "EROFS"),
        ("write /proc/self/exe", "ETXTBSY", "ETXTBSY"),
        ("open-write /proc/sys/kernel/core_pattern", "ok", "EACCES"),
        ("open-write /proc/sys/kernel/hostname", "ok", "EACCES"),
        ("open-write /proc/sys/vm/drop_caches", "ok", "EACCES"),
        ("open-write /proc/sys/user/max_user_namespaces", "-", "EACCES"),
        ("open-write /proc/self/oom_score_adj", "ok", "EACCES"),
        ("open-write /proc/self/mem", "ok", "EACCES"),
        ("open-write /proc/self/uid_map", "ok", "EACCES"),
        ("create /run/gaoler/new", "-", "EACCES"),
    ]);
    let words: Vec<&str> = rows.iter().map(|row| row.0).collect();
    // The controls hurt the canary, so they come first, and then it is healed.
    let control: Vec<&str> = rows.iter().filter(|row| row.1 == "ok").map(|row| row.0).collect();
    for (attempt, said) in control.iter().zip(outside(&control)) {
        assert_eq!(probe::first(&said), "ok", "{attempt}: {said}");
    }
    canary.heal();
    let mut command = probe::caged(
        state.path(),
        &[],
        &words
            .iter()
            .map(|it| it.replace("{W}", "/workspace"))
            .collect::<Vec<_>>()
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>(),
    );
    let output = command.env("GAOLER_CLI__PATH", &cli.0).output().expect("gaoler");
    let said = text(&output.stdout);
    let said: Vec<&str> = said.lines().filter_map(|line| line.split_once('\t')).map(|it| it.1).collect();
    assert_eq!(said.len(), rows.len(), "{output:?}");
    let wrong: Vec<String> = rows
        .iter()
        .zip(&said)
        .filter(|(row, said)| probe::first(said) != row.2)
        .map(|(row, said)| format!("{}: {said}, not {}", row.0, row.2))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(canary.is_unhurt() && cli.is_unhurt());
    let after = fs::metadata(path).expect("the canary");
    assert_eq!((before.mode(), before.uid(), before.nlink()), (after.mode(), after.uid(), after.nlink()));
}

#[test]
fn t22_no_device_link_or_attribute_gives_privilege() {
    check(&[
        ("create {W}/a", "ok", "ok"),
        ("mknod char {W}/char", "ok", "EPERM"),
        ("mknod block {W}/block", "ok", "EPERM"),
        ("mknod fifo {W}/fifo", "ok", "ok"),
        // The one device that everybody may make: it stands for an absent file and cannot be opened.
        ("call renameat2 -100 @{W}/a -100 @{W}/b 4", "ok", "ok"),
        ("read {W}/a", "*", "EACCES"),
        ("rename {W}/b {W}/a", "ok", "ok"),
        ("chown {W}/a", "*", "EINVAL"),
        ("setxattr {W}/a security.capability", "*", "EPERM"),
        ("setxattr {W}/a trusted.x", "*", "EPERM"),
        ("setxattr {W}/a security.x", "*", "EPERM"),
        ("immutable {W}/a", "*", "EPERM"),
        ("chroot {W}", "ok", "EPERM"),
        ("copy /proc/self/exe {W}/probe", "ok", "ok"),
        ("chmod 6755 {W}/probe", "ok", "ok"),
        ("run {W}/probe ids", "ok", "ok"),
        ("field NoNewPrivs", "ok", "ok"),
        ("field CapEff", "ok", "ok"),
        ("field CapBnd", "ok", "ok"),
    ]);
    let state = state();
    let said = inside(
        state.path(),
        &[],
        &["ids", "field NoNewPrivs", "field CapEff", "field CapBnd", "field CapAmb", "field Seccomp"],
    );
    let none = "ok 0000000000000000";
    assert_eq!(said, ["ok 1000 1000 1000 1000", "ok 1", none, none, none, "ok 2"]);
}

#[test]
fn t23_a_file_of_root_with_the_setuid_bit_gives_nothing() {
    let state = state();
    assert!(run(state.path(), &["--tenant", "a", "--", "true"]).status.success());
    let planted = workspace(state.path()).join("planted");
    fs::copy(probe::probe(), &planted).expect("copied");
    fs::set_permissions(&planted, fs::Permissions::from_mode(0o6755)).expect("a mode");
    // The control: run by nobody in particular, the same file makes him root.
    let folder = tempfile::tempdir().expect("a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("a mode");
    let here = folder.path().join("planted");
    fs::copy(probe::probe(), &here).expect("copied");
    fs::set_permissions(&here, fs::Permissions::from_mode(0o6755)).expect("a mode");
    let mut control = std::process::Command::new(&here);
    let control = std::os::unix::process::CommandExt::uid(&mut control, 65534).arg("ids").output();
    assert!(text(&control.expect("run").stdout).contains("ok 65534 0 "), "no setuid here: {folder:?}");
    let output = run(state.path(), &["--tenant", "a", "--", "/workspace/planted", "ids"]);
    assert_eq!(text(&output.stdout), "ids\tok 1000 1000 1000 1000\n", "{output:?}");
}

// ---- processes and the kernel's interface ---------------------------------------------------------------

#[test]
fn t24_no_other_process_can_be_reached() {
    check(&[
        ("ptrace attach child", "ok", "EPERM"),
        ("ptrace seize child", "ok", "EPERM"),
        ("ptrace traceme 0", "ok", "EPERM"),
        ("ptrace attach 1", "-", "EPERM"),
        ("vm-read child", "ok", "EPERM"),
        ("vm-write child", "ok", "EPERM"),
        ("vm-read 1", "-", "EPERM"),
        ("pidfd-getfd child", "ok", "EPERM"),
        ("call process_madvise 0 0 0 0 0", "*", "EPERM"),
        ("call kcmp 1 1 0 0 0", "-", "EPERM"),
        ("kill 1 9", "-", "EPERM"),
        ("kill 1 0", "ok", "EPERM"),
        ("read /proc/1/maps", "-", "ENOENT"),
        ("call setuid 0", "ok", "EINVAL"),
        ("call setgid 0", "ok", "EINVAL"),
        ("call setuid 1001", "-", "EINVAL"),
        ("call setgroups 0 0", "ok", "EPERM"),
    ]);
}

#[test]
fn t25_the_kernel_surface_is_closed_call_by_call() {
    check(&[
        // Namespaces.
        ("call unshare 0x10000000", "ok", "EPERM"),
        ("call unshare 0x20000", "ok", "EPERM"),
        ("call unshare 0x40000000", "ok", "EPERM"),
        ("call unshare 0", "ok", "EPERM"),
        ("clone-user", "ok", "EPERM"),
        ("clone3-user", "ok", "ENOSYS"),
        ("setns /proc/self/ns/net", "ok", "EPERM"),
        ("setns /proc/self/ns/mnt", "ok", "EPERM"),
        // Mounts.
        ("call mount @none @/nonexistent @tmpfs 0 0", "*", "EPERM"),
        ("call umount2 @/nonexistent 0", "*", "EPERM"),
        ("call pivot_root @/nonexistent @/nonexistent", "*", "EPERM"),
        ("call chroot @/", "ok", "EPERM"),
        ("call fsopen @tmpfs 0", "ok", "EPERM"),
        ("call fsconfig -1 0 0 0 0", "*", "EPERM"),
        ("call fsmount -1 0 0", "*", "EPERM"),
        ("call fspick -1 @/ 0", "*", "EPERM"),
        ("call open_tree -100 @/ 1", "ok", "EPERM"),
        ("call move_mount -1 @ -1 @ 0", "*", "EPERM"),
        ("call mount_setattr -1 @ 0 0 0", "*", "EPERM"),
        // Foreign ABIs: socket, ptrace, getpid of i386; getpid of x32.
        ("int80 359 1 1 0", "-", "killed SIGSYS"),
        ("int80 26 0 0 0", "-", "killed SIGSYS"),
        ("int80 20", "-", "killed SIGSYS"),
        ("call 1073741863", "-", "killed SIGSYS"),
        ("call 1073742345", "-", "killed SIGSYS"),
        // Filters of one's own.
        ("filter", "ok", "EPERM"),
        ("call seccomp 2 0 0", "*", "EPERM"),
        ("call seccomp 1 8 0", "*", "EPERM"),
        // prctl: new privileges, ambient capabilities, securebits, memory map, dispatch, tracer.
        ("call prctl 38 0 0 0 0", "-", "EINVAL"),
        ("call prctl 47 2 21 0 0", "-", "EPERM"),
        ("call prctl 28 0", "ok", "EPERM"),
        ("call prctl 35 6 4096 0 0", "-", "EPERM"),
        ("call prctl 59 0 0 0 0", "ok", "EPERM"),
        ("call prctl 0x59616d61 1 0 0 0", "*", "EPERM"),
        ("call prctl 0x100000023 6 4096 0 0", "-", "EPERM"),
        ("call personality 0x400000", "ok", "EPERM"),
        ("call personality 0x40000", "ok", "EPERM"),
        ("call personality 8", "ok", "EPERM"),
        // The calls with a record.
        ("call bpf 9999 0 0", "*", "EPERM"),
        ("call perf_event_open 0 0 -1 -1 0", "*", "EPERM"),
        ("call userfaultfd 0", "*", "EPERM"),
        ("call io_uring_setup 1 @@", "*", "EPERM"),
        ("call io_uring_enter -1 0 0 0 0", "*", "EPERM"),
        ("call io_uring_register -1 0 0 0", "*", "EPERM"),
        ("call fanotify_init 0 0", "*", "EPERM"),
        ("call fanotify_mark -1 0 0 0 0", "*", "EPERM"),
        ("call keyctl 0 -3 1", "*", "EPERM"),
        ("call add_key @user @x @x 1 -2", "*", "EPERM"),
        ("call request_key @user @x 0 -2", "*", "EPERM"),
        ("call memfd_secret 0", "*", "EPERM"),
        ("call name_to_handle_at -100 @/ 0 0 0", "*", "EPERM"),
        ("call open_by_handle_at -1 0 0", "*", "EPERM"),
        ("call vmsplice -1 0 0 0", "*", "EPERM"),
        ("call move_pages 0 0 0 0 0 0", "*", "EPERM"),
        ("call migrate_pages 0 0 0 0", "*", "EPERM"),
        // Administration of the machine.
        ("call kexec_load 0 999 0 0", "*", "EPERM"),
        ("call kexec_file_load -1 -1 0 0 0", "*", "EPERM"),
        ("call init_module 0 0 0", "*", "EPERM"),
        ("call finit_module -1 0 0", "*", "EPERM"),
        ("call delete_module @no-such 0", "*", "EPERM"),
        ("call iopl 4", "*", "EPERM"),
        ("call ioperm 0x100000 1 1", "*", "EPERM"),
        ("call modify_ldt 99 0 0", "*", "EPERM"),
        ("call acct @/nonexistent", "*", "EPERM"),
        ("call swapon @/nonexistent 0", "*", "EPERM"),
        ("call swapoff @/nonexistent", "*", "EPERM"),
        ("call quotactl 0 0 0 0", "*", "EPERM"),
        ("call quotactl_fd -1 0 0 0", "*", "EPERM"),
        ("call reboot 0 0 0 0", "*", "EPERM"),
        ("call sethostname 0 -1", "*", "EPERM"),
        ("call setdomainname 0 -1", "*", "EPERM"),
        ("call settimeofday 1 0", "*", "EPERM"),
        ("call clock_settime 99 0", "*", "EPERM"),
        ("call adjtimex 0", "*", "EPERM"),
        ("call clock_adjtime 99 0", "*", "EPERM"),
        ("call syslog 99 0 0", "*", "EPERM"),
        ("call lookup_dcookie 0 0 0", "*", "EPERM"),
        ("call nfsservctl 0 0 0", "*", "EPERM"),
        ("call vhangup", "-", "EPERM"),
        // Unlisted ones look like an older kernel's.
        ("call splice -1 0 -1 0 0 0", "*", "ENOSYS"),
        ("call tee -1 -1 0 0", "*", "ENOSYS"),
        ("call remap_file_pages 0 0 0 0 0", "*", "ENOSYS"),
        ("call 9999", "-", "ENOSYS"),
        // Priority-inheriting futexes.
        ("call futex @@ 6 0 0", "ok", "ENOSYS"),
        ("call futex @@ 134 0 0", "ok", "ENOSYS"),
        // Input pushed back into a terminal, line disciplines; also with bits that the kernel ignores.
        ("ioctl 0x5412", "*", "EPERM"),
        ("ioctl 0x100005412", "*", "EPERM"),
        ("ioctl 0x541c", "*", "EPERM"),
        ("ioctl 0x5423", "*", "EPERM"),
    ]);
}

#[test]
fn t26_only_plain_sockets_can_be_made() {
    let mut rows: Vec<(String, &str, &str)> = Vec::new();
    // AX25 to VSOCK, XDP, MCTP: every family but UNIX (1), INET (2), INET6 (10), NETLINK (16).
    for family in (3..=45).filter(|family| ![10, 16].contains(family)) {
        for kind in [2, 3] {
            rows.push((format!("call socket {family} {kind} 0"), "-", "EAFNOSUPPORT"));
        }
    }
    for (words, free) in [
        // PACKET works outside; a raw one, ICMP, SCTP, MPTCP; AF_ALG with a bit that the kernel ignores.
        ("17 3 768", "ok"),
        ("2 3 1", "ok"),
        ("10 3 58", "ok"),
        ("2 3 255", "ok"),
        ("2 1 132", "-"),
        ("2 1 262", "-"),
        ("1 3 0", "-"),
        ("0x100000011 3 768", "ok"),
        // NETLINK: XFRM, AUDIT, NETFILTER, KOBJECT_UEVENT, GENERIC.
        ("16 3 15", "ok"),
        ("16 3 16", "ok"),
        ("16 3 9", "-"),
        ("16 3 12", "-"),
        ("16 3 6", "-"),
    ] {
        rows.push((format!("call socket {words}"), free, "EAFNOSUPPORT"));
    }
    for words in ["1 1 0", "1 2 0", "2 1 0", "2 2 0", "10 1 6", "2 2 17", "16 3 0"] {
        rows.push((format!("call socket {words}"), "ok", "ok"));
    }
    let rows: Vec<Row<'_>> = rows.iter().map(|(it, free, caged)| (it.as_str(), *free, *caged)).collect();
    check(&rows);
    check(&[
        ("ulp 6", "*", "ENOPROTOOPT"),
        ("ulp 0x100000006", "*", "ENOPROTOOPT"),
        ("call shmget 0 4096 0x3b6", "ok", "ENOSYS"),
        ("call semget 0 1 0x3b6", "ok", "ENOSYS"),
        ("call msgget 0 0x3b6", "ok", "ENOSYS"),
        ("call mq_open @x 0 0 0", "*", "ENOSYS"),
    ]);
}

#[test]
fn b13_options_of_sockets_with_a_record_of_escalation_are_those_of_a_kernel_without() {
    let rows = [
        // ESP in UDP, as IKE daemons have it; also with bits that the kernel ignores.
        ("udp 17 100 2", "ok"),
        ("udp 0x100000011 100 2", "ok"),
        ("udp6 17 100 2", "ok"),
        // Upper layers of TCP, signed segments; zero copies.
        ("tcp 6 31", "*"),
        ("tcp 6 14", "*"),
        ("tcp 6 32", "*"),
        ("tcp 6 38", "-"),
        ("tcp 1 60", "ok"),
        // Packet programs.
        ("udp 1 26", "*"),
        ("udp 1 50", "*"),
        ("udp 1 51", "*"),
        ("udp 1 52", "*"),
        // Options and headers of packets.
        ("udp 0 4", "*"),
        ("udp6 41 1", "*"),
        ("udp6 41 57", "*"),
        // Memberships and sources of multicast groups, anycast, flow labels.
        ("udp 0 35", "*"),
        ("udp 0 0x100000023", "*"),
        ("udp 0 39", "*"),
        ("udp 0 41", "*"),
        ("udp 0 42", "*"),
        ("udp 0 46", "*"),
        ("udp 0 48", "*"),
        ("udp6 41 20", "*"),
        ("udp6 41 27", "*"),
        ("udp6 41 32", "*"),
        ("udp6 41 42", "*"),
        ("udp6 41 46", "*"),
        ("udp6 41 48", "*"),
        // Levels that nobody needs: raw sockets', kernel TLS', MPTCP's.
        ("udp 255 1", "-"),
        ("tcp 282 1", "-"),
        ("tcp 284 1", "-"),
    ];
    let rows = rows.map(|(words, free)| (format!("option {words}"), free, "ENOPROTOOPT"));
    // What servers and clients set.
    let plain = [
        "tcp 1 2",
        "tcp 1 9",
        "tcp 1 15",
        "tcp 6 1",
        "tcp 6 18",
        "udp 0 8",
        "udp6 41 26",
        "udp 17 104",
        "udp 17 103",
    ];
    let plain = plain.map(|words| (format!("option {words}"), "ok", "ok"));
    let rows: Vec<_> = rows.into_iter().chain(plain).collect();
    let mut rows: Vec<Row<'_>> = rows.iter().map(|(it, free, caged)| (it.as_str(), *free, *caged)).collect();
    rows.extend([
        // These ask for a capability: netfilter's, repair, IPsec, headers of packets.
        ("option udp 0 64", "-", "EPERM"),
        ("option tcp 6 19", "ok", "EPERM"),
        ("option udp 0 17", "*", "EPERM"),
        ("option udp6 41 54", "*", "EPERM"),
        ("option udp6 41 59", "*", "EPERM"),
        ("out-of-band sendto", "ok", "EOPNOTSUPP"),
        ("out-of-band sendmsg", "ok", "EOPNOTSUPP"),
        ("out-of-band sendmmsg", "ok", "EOPNOTSUPP"),
    ]);
    check(&rows);
}

#[test]
fn b01_what_the_kernel_counts_for_nobody_cannot_be_made() {
    // Where the control may have one of that length: a disk's are shorter, a tmpfs keeps them in memory.
    let listed = PathBuf::from(format!("/dev/shm/gaoler-listed-{}", std::process::id()));
    let list = format!("access-list {} 7800", listed.display());
    let uncounted = [
        // Locks that belong to no process, and leases.
        ("fcntl {W}/a 37 lock", "ok", "EINVAL"),
        ("fcntl {W}/a 38 lock", "ok", "EINVAL"),
        ("fcntl {W}/a 0x100000025 lock", "ok", "EINVAL"),
        ("fcntl {W}/a 1024 1", "ok", "EINVAL"),
        ("fcntl {W}/a 1040 0", "-", "EINVAL"),
        ("fcntl {W}/a 9999 0", "-", "EINVAL"),
        // POSIX locks, and asking for either kind, are there; so is flock.
        ("fcntl {W}/a 6 lock", "ok", "ok"),
        ("fcntl {W}/a 7 lock", "ok", "ok"),
        ("fcntl {W}/a 36 lock", "ok", "ok"),
        ("lock {W}/a", "ok", "ok"),
        ("fcntl {W}/a 1030 3", "ok", "ok"),
        // A table of descriptors that outlives who took a lock in it.
        ("clone-files", "ok", "EPERM"),
        // Access lists: 61 KiB for each file.
        (list.as_str(), "ok", "E2BIG"),
        ("access-list {W}/b 20", "ok", "ok"),
        ("setxattr {W}/b user.x", "ok", "ok"),
        // What mbind says of parts of shared files.
        ("call mbind 0 0 0 0 0 0", "*", "ENOSYS"),
        ("call set_mempolicy 0 0 0", "*", "ENOSYS"),
        // Huge pages; without a reservation of them these succeed wherever the kernel knows them.
        ("call mmap 0 0x200000 3 0x44022 -1 0", "ok", "ENOMEM"),
        ("call memfd_create @x 4", "ok", "EINVAL"),
        ("call memfd_create @x 0x78000004", "*", "EINVAL"),
        ("call memfd_create @x 1", "ok", "ok"),
        // Pages joined with those of others.
        ("call madvise 0 0 12", "ok", "EINVAL"),
    ];
    let tried = std::panic::catch_unwind(|| check(&uncounted));
    let _ = fs::remove_file(&listed);
    assert!(tried.is_ok());
}

#[test]
fn t27_a_limit_can_only_be_lowered() {
    check(&[
        ("limit 7 1048576", "-", "EPERM"),
        ("limit 6 65536", "ok", "EPERM"),
        ("limit 1 0xffffffffffffffff", "ok", "EPERM"),
        ("limit 8 0x10000000", "-", "EPERM"),
        ("limit 4 4096", "ok", "EPERM"),
        ("limit 12 8192", "ok", "EPERM"),
        ("limit 7 64", "ok", "ok"),
        ("segv", "-", "killed SIGSEGV"),
    ]);
    let state = state();
    let output = run(state.path(), &["--", "sh", "-c", "kill -SEGV $$; :"]);
    assert_eq!(output.status.code(), Some(139), "{output:?}");
}

// ---- descriptors and what processes share ---------------------------------------------------------------

#[test]
fn t28_a_command_holds_its_three_pipes_and_nothing_else() {
    let state = state();
    assert!(run(state.path(), &["--tenant", "a", "--", "true"]).status.success());
    let planted = workspace(state.path()).join("probe");
    fs::copy(probe::probe(), &planted).expect("copied");
    fs::set_permissions(&planted, fs::Permissions::from_mode(0o755)).expect("a mode");
    // A caller who leaks: the descriptor is there for gaoler, and stays there.
    let secret = fs::File::open("/etc/shadow").expect("a secret");
    nix::fcntl::fcntl(&secret, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).expect("leaks");
    let control = std::process::Command::new(probe::probe()).arg("first-descriptors").output().expect("run");
    let leaked = secret.as_raw_fd().to_string();
    assert!(text(&control.stdout).trim().split([',', '\t']).any(|fd| fd == leaked), "{control:?}");
    let words = [
        "--tenant",
        "a",
        "--",
        "/workspace/probe",
        "first-descriptors",
        "kind /proc/self/fd/0",
        "kind /proc/self/fd/1",
        "kind /proc/self/fd/2",
    ];
    let output = run(state.path(), &words);
    let said = text(&output.stdout);
    let mut lines = said.lines();
    assert_eq!(lines.next(), Some("first-descriptors\t0,1,2"), "{output:?}");
    assert_eq!(lines.filter(|line| line.contains("\tok pipe:[")).count(), 3, "{output:?}");
}

#[test]
fn t29_the_callers_environment_and_folder_stay_outside() {
    let state = state();
    let mut command = exec(state.path(), &["--", "env"]);
    let output =
        command.env("CANARY", "canary").env("LD_PRELOAD", "/nonexistent").current_dir("/usr").output();
    let output = output.expect("gaoler");
    let mut lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    let expected = [
        "HOME=/home/agent",
        "LANG=C.UTF-8",
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "TMPDIR=/tmp",
        "USER=agent",
    ];
    assert_eq!(lines, expected, "{output:?}");
    assert_eq!(text(&run(state.path(), &["--", "pwd"]).stdout), "/workspace\n");
    // The names that the kernel shows hold no tenant's name and nothing of the host's cgroups.
    let shown =
        run(state.path(), &["--tenant", "canary", "--", "cat", "/proc/self/mountinfo", "/proc/self/cgroup"]);
    let shown = text(&shown.stdout);
    assert!(
        shown.contains(" /workspace ") && !shown.contains("canary") && !shown.contains("gaoler-"),
        "{shown}"
    );
}

#[test]
fn t30_no_socket_of_the_host_can_be_reached() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("a mode");
    let path = folder.path().join("socket");
    let _unix = std::os::unix::net::UnixListener::bind(&path).expect("a listener");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("a mode");
    let name = format!("gaoler-canary-{}", std::process::id());
    let address =
        <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(&name);
    let _abstract =
        std::os::unix::net::UnixListener::bind_addr(&address.expect("an address")).expect("bound");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    udp.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
    let attempts = [
        (format!("unix {}", path.display()), "ok", "ENOENT"),
        (format!("abstract {name}"), "ok", "ECONNREFUSED"),
        (format!("tcp {}", tcp.local_addr().expect("bound")), "ok", "ECONNREFUSED"),
        ("tcp 1.1.1.1:443".into(), "-", "ENETUNREACH"),
        ("tcp [2606:4700::1111]:443".into(), "-", "ENETUNREACH"),
        ("udp 1.1.1.1:443".into(), "-", "ENETUNREACH"),
        ("udp 8.8.8.8:53".into(), "-", "ENETUNREACH"),
        ("udp 169.254.169.254:80".into(), "-", "ENETUNREACH"),
        ("udp [2606:4700::1111]:443".into(), "-", "ENETUNREACH"),
        ("listen 0.0.0.0:0".into(), "ok", "ok"),
        ("unix /run/docker.sock".into(), "-", "ENOENT"),
        ("unix /run/systemd/private".into(), "-", "ENOENT"),
        ("unix /run/dbus/system_bus_socket".into(), "-", "ENOENT"),
        ("unix /var/run/nscd/socket".into(), "-", "ENOENT"),
    ];
    let rows: Vec<Row<'_>> = attempts.iter().map(|(it, free, caged)| (it.as_str(), *free, *caged)).collect();
    check(&rows);
    // Datagrams: the control arrives; that of a cage is lost in its own loopback.
    let send = format!("udp {}", udp.local_addr().expect("bound"));
    assert_eq!(outside(&[&send]), ["ok"]);
    assert_eq!(udp.recv(&mut [0; 8]).expect("the control's datagram"), 1);
    let state = state();
    let said = inside(state.path(), &[], &[&send, "interfaces"]);
    assert!(["ok", "ECONNREFUSED"].contains(&said[0].as_str()), "{said:?}");
    assert_eq!(said[1], "ok lo");
    assert_eq!(udp.recv(&mut [0; 8]).expect_err("nothing").kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn t31_runs_beside_each_other_cannot_meet() {
    let state = state();
    let hold = |tenant: &str| -> Child {
        let script =
            "echo up > /tmp/up; echo x > /dev/shm/x; sleep 600 & echo $! > pid; echo up; cat; kill $!; true";
        let mut child = exec(state.path(), &["--tenant", tenant, "--", "sh", "-c", script]);
        let mut child = child.stdin(Stdio::piped()).spawn().expect("gaoler");
        let mut up = [0; 3];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut up).expect("up");
        child
    };
    let first = hold("same");
    // For a moment there may be one more: who measures the tenant's folder, with the tenant's uid.
    let uid_of = |child: &Child| {
        let mut uids = Vec::new();
        until("one uid", || {
            uids = caged_uids(child.id());
            uids.len() == 1
        });
        uids
    };
    let second = hold("same");
    let (one, two) = (uid_of(&first), uid_of(&second));
    // Every cage has a uid of its own, also of one tenant.
    assert!(one.len() == 1 && two.len() == 1 && one != two, "{one:?} {two:?}");
    assert!(!one.contains(&0) && !two.contains(&0));
    let said = inside(
        state.path(),
        &["--tenant", "same"],
        &["list /tmp", "list /dev/shm", "kill -1 0", "list /workspace"],
    );
    assert_eq!(said[0], "ok probe");
    assert_eq!(said[1], "ok");
    // The tenant's files are common to its runs; its processes are not.
    assert!(said[3].contains("pid"), "{said:?}");
    let seen = run(state.path(), &["--tenant", "same", "--", "sh", "-c", "ls /proc | grep -c '^[0-9]*$'"]);
    assert!(text(&seen.stdout).trim().parse::<u32>().expect("a number") <= 4, "{seen:?}");
    let killed = run(state.path(), &["--tenant", "same", "--", "sh", "-c", "kill -9 -1; true"]);
    assert!(killed.status.code().is_some(), "{killed:?}");
    for mut child in [first, second] {
        assert!(child.try_wait().expect("a child").is_none(), "a run was ended by another");
        drop(child.stdin.take());
        assert!(child.wait().expect("an end").success());
    }
}

/// The uids of what a `gaoler exec` has started, but root's.
fn caged_uids(gaoler: u32) -> Vec<u32> {
    let mut family = vec![gaoler];
    let mut uids = Vec::new();
    let mut known = 0;
    while known < family.len() {
        known = family.len();
        for entry in fs::read_dir("/proc").expect("/proc").filter_map(Result::ok) {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name))?;
                line.split_whitespace().next()?.parse::<u32>().ok()
            };
            let (Some(parent), Some(uid)) = (field("PPid:"), field("Uid:")) else { continue };
            if family.contains(&parent) && !family.contains(&pid) {
                family.push(pid);
                uids.push(uid);
            }
        }
    }
    uids.retain(|uid| *uid != 0);
    uids.sort_unstable();
    uids.dedup();
    uids
}

#[test]
fn t32_what_others_open_cannot_be_watched() {
    let canary = Canary::at(PathBuf::from(format!("/usr/share/gaoler-watched-{}", std::process::id())));
    let rows: &[Row<'_>] = &[("watch /usr/share up", "*", "ENOSYS"), ("notify /usr/share", "ok", "EINVAL")];
    assert!(canary.is_unhurt());
    check(rows);
}

#[test]
fn b07_no_call_tells_whether_a_page_of_usr_is_in_memory_or_drops_it() {
    let path = PathBuf::from(format!("/usr/share/gaoler-pages-{}", std::process::id()));
    let canary = Canary::at(path.clone());
    fs::write(&path, vec![b'x'; 64 * 4096]).expect("64 pages");
    fs::File::open(&path).and_then(|file| file.sync_all()).expect("on the disk");
    // As all of /usr: nobody but root may write it.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("a mode");
    let path = canary.path();
    // Dropped from outside, so that none is there; and the control says so.
    let dropped =
        || assert_eq!(outside(&[&format!("drop {path}"), &format!("resident {path}")])[1], "ok 0/64");
    dropped();
    let state = state();
    let attempts = [format!("resident {path}")];
    let attempts: Vec<&str> = attempts.iter().map(String::as_str).collect();
    // Of a file that one cannot write, the kernel says the same in any case.
    assert_eq!(inside(state.path(), &[], &attempts), ["ok 64/64"]);
    dropped();
    let rows = [
        // Outside it is EAGAIN, but where the disk is quicker than the call that has asked it.
        (format!("preadv2 {path} 8"), "*", "EOPNOTSUPP"),
        (format!("preadv2 {path} 0x80"), "-", "EOPNOTSUPP"),
        (format!("preadv2 {path} 0x100000008"), "*", "EOPNOTSUPP"),
        (format!("preadv2 {path} 0x4000"), "-", "EOPNOTSUPP"),
        (format!("preadv2 {path} 0"), "ok", "ok"),
        // Once it is there, the same call says that.
        (format!("preadv2 {path} 8"), "ok", "EOPNOTSUPP"),
        (format!("drop {path}"), "ok", "EINVAL"),
        ("pwritev2 {W}/a 0x80".into(), "-", "EOPNOTSUPP"),
        ("pwritev2 {W}/a 8".into(), "-", "EOPNOTSUPP"),
        ("pwritev2 {W}/a 0x10".into(), "ok", "ok"),
        // cachestat, whatever the machine's number of it is: both have this one.
        ("call 451 0 @@ @@ 0".into(), "*", "ENOSYS"),
        // Pages pushed out, joined into huge ones, poisoned.
        ("call madvise 0 0 20".into(), "ok", "EINVAL"),
        ("call madvise 0 0 21".into(), "ok", "EINVAL"),
        ("call madvise 0 0 25".into(), "-", "EINVAL"),
        ("call madvise 0 0 100".into(), "-", "EINVAL"),
        ("call madvise 0 0 101".into(), "-", "EINVAL"),
        ("call madvise 0 0 4".into(), "ok", "ok"),
        ("call madvise 0 0 8".into(), "ok", "ok"),
        ("call madvise 0 0 22".into(), "ok", "ok"),
    ];
    let rows: Vec<Row<'_>> = rows.iter().map(|(it, free, caged)| (it.as_str(), *free, *caged)).collect();
    check_on(state.path(), &[], &rows);
    // What is there stays there, whatever a cage says of it.
    let there = || outside(&[&format!("resident {path}")]).concat();
    assert_eq!(outside(&[&format!("preadv2 {path} 0")]), ["ok"]);
    let before = there();
    assert_ne!(before, "ok 0/64");
    assert_eq!(inside(state.path(), &[], &[&format!("drop {path}")]), ["EINVAL"]);
    assert_eq!(there(), before);
}

#[test]
fn b06_no_lock_of_anybody_can_be_seen_in_a_cage() {
    let folder = tempfile::tempdir().expect("a folder");
    let held = fs::File::create(folder.path().join("held")).expect("a file");
    // Of the kind that belongs to no process, which every process namespace shows.
    let lock = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: 0,
        l_start: 424_242,
        l_len: 1,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&held, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).expect("locked");
    let list = fs::read_to_string("/proc/locks").expect("the host's locks");
    assert!(list.contains(" 424242 424242"), "the control: {list}");
    let state = state();
    for (level, said) in [("paranoid", "ENOENT"), ("balanced", "ok"), ("developer", "ok")] {
        assert_eq!(inside(state.path(), &["--level", level], &["read /proc/locks"]), [said], "{level}");
    }
}

#[test]
fn b06_what_counts_the_whole_machines_network_is_shut() {
    let rows: Vec<(String, &str, &str)> = ["softnet_stat", "sockstat", "sockstat6", "protocols"]
        .map(|name| (format!("read /proc/self/net/{name}"), "ok", "EACCES"))
        .into_iter()
        .chain(["dev", "tcp", "unix"].map(|name| (format!("read /proc/self/net/{name}"), "ok", "ok")))
        .collect();
    let rows: Vec<Row<'_>> = rows.iter().map(|(it, free, caged)| (it.as_str(), *free, *caged)).collect();
    let state = state();
    for level in ["paranoid", "balanced", "developer"] {
        check_on(state.path(), &["--level", level], &rows);
    }
    assert_eq!(inside(state.path(), &[], &["chmod 444 /proc/self/net/sockstat"]), ["EPERM"]);
}

#[test]
fn b06_every_file_of_proc_that_a_cage_can_open_has_its_row_and_its_reason() {
    let table: toml::Table = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/policies/seen.toml"))
        .expect("the table")
        .parse()
        .expect("TOML");
    let rows: Vec<(&str, &str)> = table["seen"]
        .as_array()
        .expect("rows")
        .iter()
        .flat_map(|row| {
            let levels = row["levels"].as_str().expect("levels");
            assert!(["every", "counters"].contains(&levels), "{row}");
            assert!(["own", "settings", "machine"].contains(&row["tells"].as_str().expect("tells")), "{row}");
            row["paths"]
                .as_array()
                .expect("paths")
                .iter()
                .map(move |path| (path.as_str().expect("text"), levels))
        })
        .collect();
    let fits = |pattern: &str, path: &str| {
        let (mut names, mut parts) = (path.split('/'), pattern.split('/'));
        loop {
            match (parts.next(), names.next()) {
                (Some("**"), Some(_)) | (None, None) => return true,
                (Some("*"), Some(_)) => {}
                (Some(part), Some(name)) if part == name => {}
                _ => return false,
            }
        }
    };
    // A shell opens what it lists, and reads nothing: the log of the kernel would wait.
    let script = "cd /proc; find . -maxdepth 1 ! -name . ! -name '[0-9]*' ! -name self ! -name thread-self -print0 | \
                  xargs -0 -I{} find {} -type f -print > /tmp/list; find self/ -path self/task -prune -o -type f -print >> /tmp/list; \
                  while read -r f; do { : < \"$f\"; } 2> /dev/null && echo \"${f#./}\"; done < /tmp/list; true";
    let state = state();
    for level in ["paranoid", "balanced", "developer"] {
        let output = run(state.path(), &["--level", level, "--", "bash", "-c", script]);
        let said = text(&output.stdout);
        let known = |path: &str| {
            let row = rows.iter().find(|(pattern, _)| fits(pattern, path));
            row.is_some_and(|(_, levels)| *levels == "every" || level != "paranoid")
        };
        let unknown: Vec<&str> =
            said.lines().map(|path| path.trim_start_matches("self//")).filter(|path| !known(path)).collect();
        assert!(said.contains("self/status"), "{level}: {output:?}");
        assert_eq!(said.contains("meminfo"), level != "paranoid", "{level}: {output:?}");
        assert_eq!(unknown, Vec::<&str>::new(), "{level}: neither covered nor in policies/seen.toml");
    }
}

// ---- too much -------------------------------------------------------------------------------------------

#[test]
fn t33_a_fork_bomb_is_bounded_and_counted() {
    let state = state();
    let (output, report) = probed(state.path(), &["--timeout", "60"], &["forks 2000"]);
    assert!(text(&output.stdout).ends_with(" EAGAIN\n"), "{output:?}");
    assert_eq!(report["exit"]["reason"], "exited", "{report}");
    assert!(report["peaks"]["tasks_denied"].as_u64() >= Some(1), "{report}");
    assert!(report["peaks"]["tasks"].as_u64() <= report["limits"]["tasks"].as_u64(), "{report}");
    let bomb = "bomb() { bomb | bomb & }; bomb; sleep 600";
    let (output, report) = reported(state.path(), &["--timeout", "3", "--", "bash", "-c", bomb]);
    assert_eq!(output.status.code(), Some(124), "{report}");
    assert!(report["peaks"]["tasks"].as_u64() <= report["limits"]["tasks"].as_u64(), "{report}");
    assert_eq!(report["exit"]["quarantined"], false, "{report}");
}

/// How many locks the host lists.
fn locks() -> usize {
    fs::read_to_string("/proc/locks").expect("the host's locks").lines().count()
}

#[test]
fn b01_a_run_with_too_many_locks_is_ended_and_named_and_its_neighbour_is_not() {
    let state = state();
    let script = "echo up; cat > /dev/null; echo alive";
    let mut neighbour = exec(state.path(), &["--", "sh", "-c", script]);
    let mut neighbour = neighbour.stdin(Stdio::piped()).spawn().expect("gaoler");
    neighbour.stdout.as_mut().expect("a pipe").read_exact(&mut [0; 3]).expect("up");
    let before = locks();
    // The control: outside nobody minds, and each is one line of the host's list.
    let mut control = std::process::Command::new(probe::probe());
    let control =
        std::os::unix::process::CommandExt::process_group(&mut control, 0).arg("locks posix 1 5000");
    let mut control = control.stdout(Stdio::null()).spawn().expect("the probe");
    until("5,000 locks outside", || locks() >= before + 5_000);
    let group = nix::unistd::Pid::from_raw(control.id().cast_signed());
    nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).expect("killed");
    let _ = control.wait();
    // As few as programs have: the watchdog has looked several times by then.
    let (output, report) = probed(state.path(), &["--timeout", "60"], &["locks posix 4 200"]);
    assert!(text(&output.stdout).contains("ok 800"), "{output:?}");
    assert_eq!((&report["exit"]["reason"], &report["hit"]), (&"exited".into(), &serde_json::json!([])));
    // Many of one process, of many processes with few each, and of the other kind.
    for bomb in ["locks posix 1 60000", "locks posix 20 200", "locks flock 1 3000"] {
        let (output, report) = probed(state.path(), &["--timeout", "60"], &[bomb]);
        assert_eq!(output.status.code(), Some(137), "{bomb}: {report}");
        assert_eq!(report["exit"]["reason"], "locks", "{bomb}: {report}");
        assert_eq!(report["hit"], serde_json::json!(["locks"]), "{bomb}: {report}");
        assert_eq!(report["exit"]["quarantined"], false, "{bomb}: {report}");
    }
    assert!(neighbour.try_wait().expect("a child").is_none(), "the neighbour was ended");
    drop(neighbour.stdin.take());
    let mut said = String::new();
    neighbour.stdout.take().expect("a pipe").read_to_string(&mut said).expect("text");
    assert_eq!(said, "alive\n");
    assert!(neighbour.wait().expect("an end").success());
}

#[test]
fn r01_orphans_are_reaped_as_they_end() {
    let state = state();
    assert_eq!(inside(state.path(), &["--timeout", "60"], &["orphans 3000"]), ["ok"]);
}

#[test]
fn t34_memory_is_bounded_and_a_neighbour_lives() {
    let state = state();
    let script = "echo up; cat > /dev/null; echo alive";
    let mut neighbour = exec(state.path(), &["--", "sh", "-c", script]);
    let mut neighbour = neighbour.stdin(Stdio::piped()).spawn().expect("gaoler");
    neighbour.stdout.as_mut().expect("a pipe").read_exact(&mut [0; 3]).expect("up");
    // The bomb is the command itself, so that its end is the run's.
    assert!(run(state.path(), &["--tenant", "a", "--", "true"]).status.success());
    let planted = workspace(state.path()).join("probe");
    fs::copy(probe::probe(), &planted).expect("copied");
    fs::set_permissions(&planted, fs::Permissions::from_mode(0o755)).expect("a mode");
    for bomb in ["anonymous 4000", "memfd 4000"] {
        // The probe's child takes the memory; the kernel picks the largest, and nobody else dies.
        let words = ["--tenant", "a", "--timeout", "120", "--", "/workspace/probe", bomb];
        let (output, report) = reported(state.path(), &words);
        let said = text(&output.stdout);
        let ended = said == format!("{bomb}\tkilled SIGKILL\n")
            || report["exit"]["reason"] == "oom"
            || said.contains("EFBIG");
        assert!(ended, "{output:?} {report}");
        if !said.contains("EFBIG") {
            assert!(report["peaks"]["oom_kills"].as_u64() >= Some(1), "{report}");
        }
        let most = report["limits"]["memory_mib"].as_u64().expect("a limit") << 20;
        assert!(report["peaks"]["memory_bytes"].as_u64() <= Some(most), "{report}");
    }
    let eat = "x = bytearray(1)\nwhile True: x += bytes([1]) * 10_000_000";
    let (output, report) = reported(state.path(), &["--timeout", "120", "--", "python3", "-c", eat]);
    assert_eq!(report["exit"]["reason"], "oom", "{report}");
    assert_eq!(output.status.code(), Some(137));
    drop(neighbour.stdin.take());
    let output = neighbour.wait_with_output().expect("an end");
    assert_eq!(text(&output.stdout), "alive\n", "{output:?}");
}

#[test]
fn t35_files_and_descriptors_are_bounded() {
    let state = state();
    let attempts =
        ["grow /tmp/big 600", "files /tmp 600 100", "inodes /dev/shm 200000", "open-files 5000", "list /usr"];
    let said = inside(state.path(), &["--timeout", "120"], &attempts);
    assert_eq!(&said[..4], ["EFBIG", "ENOSPC", "ENOSPC", "EMFILE"], "{said:?}");
    // The bound is the cage's own: a next run finds all of it again.
    assert_eq!(inside(state.path(), &["--timeout", "60"], &["files /tmp 400 100"]), ["ok"]);
}

#[test]
fn t36_the_wall_ends_what_never_ends() {
    let state = state();
    for (stuck, reads) in [
        ("trap '' TERM INT HUP; while :; do :; done", true),
        ("yes | head -c 9M; sleep 60", false),
        ("kill -STOP $$", true),
    ] {
        let (output, report) = {
            let path = state.path().join("report.json");
            let words = ["--timeout", "1", "--report", path.to_str().expect("text"), "--", "sh", "-c", stuck];
            let mut child = exec(state.path(), &words).spawn().expect("gaoler");
            // Somebody who never reads: the pipe is full, and nobody waits for him.
            if !reads {
                until("the report", || {
                    path.exists() && fs::read(&path).is_ok_and(|it| !it.is_empty())
                        || child.try_wait().is_ok_and(|it| it.is_some())
                        || report_of_run_is_over(&child)
                });
            }
            let output = child.wait_with_output().expect("an end");
            (output, serde_json::from_slice::<Value>(&fs::read(&path).expect("a report")).expect("JSON"))
        };
        assert_eq!(output.status.code(), Some(124), "{stuck}: {:?}", output.status);
        assert_eq!(report["exit"]["reason"], "wall", "{stuck}: {report}");
        fs::remove_file(state.path().join("report.json")).expect("removed");
    }
}

/// Whether nothing but gaoler itself and its supervisor is left of a run.
fn report_of_run_is_over(child: &Child) -> bool {
    caged_uids(child.id()).is_empty()
}

#[test]
fn t37_a_folder_deeper_than_any_path_is_gone_with_its_run() {
    let state = state();
    let (output, report) = probed(state.path(), &["--timeout", "120"], &["deep /workspace 5000"]);
    assert_eq!(text(&output.stdout), "deep /workspace 5000\tok 5000\n", "{report}");
    assert_eq!(report["exit"]["quarantined"], false, "{report}");
    assert_eq!(report["exit"]["reason"], "exited", "{report}");
    assert_eq!(inside(state.path(), &[], &["list /workspace"]), ["ok"]);
}

// ---- what a run leaves ----------------------------------------------------------------------------------

#[test]
fn t38_a_daemon_ends_with_its_run() {
    let state = state();
    let mark = workspace_of_tenant_a(&state).join("beat");
    // The control: outside, it lives on when the one who started it is gone.
    let here = tempfile::tempdir().expect("a folder");
    let beat = here.path().join("beat");
    let attempt = format!("daemon {}", beat.display());
    assert_eq!(outside(&[&attempt]), ["ok"]);
    until("the daemon", || beat.exists());
    let before = fs::read_to_string(&beat).expect("a beat");
    until("the daemon's next beat", || {
        fs::read_to_string(&beat).is_ok_and(|now| now != before && !now.is_empty())
    });
    end(&attempt);
    let script = "cat > /tmp/p; chmod 700 /tmp/p; /tmp/p 'daemon /workspace/beat' < /dev/null; until [ -s beat ]; do :; done";
    let mut command = exec(state.path(), &["--tenant", "a", "--", "sh", "-c", script]);
    let output = command.stdin(fs::File::open(probe::probe()).expect("the probe")).output().expect("gaoler");
    assert!(output.status.success(), "{output:?}");
    let last = fs::read(&mark).expect("it has lived");
    assert_eq!(living("daemon /workspace/beat"), 0);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(fs::read(&mark).expect("a beat"), last);
}

/// The workspace of tenant a, made by a first run.
fn workspace_of_tenant_a(state: &tempfile::TempDir) -> PathBuf {
    assert!(run(state.path(), &["--tenant", "a", "--", "true"]).status.success());
    workspace(state.path())
}

fn with_word(word: &str) -> Vec<i32> {
    let entries = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    let own = |path: &Path| fs::read(path.join("cmdline")).unwrap_or_default();
    entries
        .filter(|entry| own(&entry.path()).split(|b| *b == 0).any(|found| found == word.as_bytes()))
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .collect()
}

fn living(word: &str) -> usize {
    with_word(word).len()
}

/// Ends the control.
fn end(word: &str) {
    for pid in with_word(word) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

#[test]
fn t39_nothing_that_a_run_leaves_is_executed_or_followed_outside() {
    let state = state();
    let hooked = tempfile::tempdir().expect("a folder");
    fs::set_permissions(hooked.path(), fs::Permissions::from_mode(0o777)).expect("a mode");
    let mark = hooked.path().join("hooked");
    let canary = Canary::at(hooked.path().join("canary"));
    let plant = format!(
        r#"set -e
        mkdir -p .claude bin
        echo '{{"hooks":{{"SessionStart":[{{"hooks":[{{"type":"command","command":"touch {mark}"}}]}}]}}}}' > .claude/settings.json
        for name in sh ls true env cat gaoler-supervisor; do printf '#!/bin/sh\ntouch {mark}\n' > bin/$name; chmod 755 bin/$name; cp bin/$name $name; done
        printf 'touch {mark}\n' | tee .bashrc .profile .bash_profile .envrc > /dev/null
        ln -s {canary} link; ln -s / root; ln -s /proc/1/root up
        mkfifo fifo; touch -- '--help' '-rf' "$(printf 'new\nline')"; chmod 000 fifo"#,
        mark = mark.display(),
        canary = canary.path(),
    );
    let planted = run(state.path(), &["--tenant", "a", "--", "bash", "-c", &plant]);
    assert!(planted.status.success(), "{planted:?}");
    let workspace = workspace(state.path());
    // The control: who follows these outside reaches what they name.
    assert!(fs::read_to_string(workspace.join("link")).expect("followed").starts_with("canary of"));
    for words in [&["sh", "-c", "true"][..], &["ls", "-la"], &["bash", "-lc", "true"], &["env"]] {
        let output = run(state.path(), &[&["--tenant", "a", "--"], words].concat());
        assert!(output.status.success(), "{output:?}");
    }
    let attempts =
        ["read link", "write link", "list root/root", "read root/etc/shadow", "list up", "read --help"];
    let said = inside(state.path(), &["--tenant", "a"], &attempts);
    assert_eq!(&said[..5], ["ENOENT", "ENOENT", "ENOENT", "ENOENT", "ENOENT"], "{said:?}");
    assert!(!mark.exists() && canary.is_unhurt());
}

#[test]
fn r02_a_tenant_cannot_lock_itself_out() {
    let state = state();
    let ran = |script: &str| run(state.path(), &["--tenant", "a", "--", "sh", "-c", script]);
    assert!(ran("echo canary > kept; chmod 000 /workspace").status.success());
    let output = ran("cat kept");
    assert_eq!(text(&output.stdout), "canary\n", "{output:?}");
    let found = fs::metadata(workspace(state.path())).expect("the workspace");
    assert_eq!(found.mode() & 0o777, 0o700);
}

#[test]
fn t40_a_workspace_swapped_for_a_link_is_refused() {
    let state = state();
    let workspace = workspace_of_tenant_a(&state);
    let target = tempfile::tempdir().expect("a folder");
    let canary = Canary::at(target.path().join("canary"));
    fs::remove_dir_all(&workspace).expect("removed");
    std::os::unix::fs::symlink(target.path(), &workspace).expect("linked");
    let output = run(state.path(), &["--tenant", "a", "--", "sh", "-c", "echo hurt >> canary"]);
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(text(&output.stderr).contains("Not a directory"), "{output:?}");
    assert!(canary.is_unhurt());
}

#[test]
fn t41_tenants_share_neither_files_nor_ids() {
    let state = state();
    let ran = |tenant: &str, script: &str| run(state.path(), &["--tenant", tenant, "--", "sh", "-c", script]);
    assert!(ran("a", "umask 000; echo canary > kept; mkdir -m 777 open").status.success());
    assert_eq!(text(&ran("b", "ls -A; find / -name kept 2>/dev/null").stdout), "");
    assert_eq!(text(&ran("a", "cat kept").stdout), "canary\n");
    let owners: Vec<(u32, u32)> = fs::read_dir(state.path().join("tenants"))
        .expect("tenants")
        .map(|it| it.expect("an entry").metadata().expect("a folder"))
        .map(|it| (it.uid(), it.mode() & 0o777))
        .collect();
    assert_eq!(owners.len(), 2);
    assert!(owners[0].0 != owners[1].0 && owners.iter().all(|it| it.0 != 0 && it.1 == 0o700), "{owners:?}");
}

#[test]
fn t42_many_runs_leave_nothing_behind() {
    let state = state();
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("mounts").lines().count();
    let before = mounts();
    for _ in 0..10 {
        assert!(run(state.path(), &["--", "sh", "-c", "sleep 600 & mkdir /tmp/x"]).status.success());
    }
    assert_eq!(mounts(), before);
    let left: Vec<_> =
        fs::read_dir(state.path()).expect("the state").map(|it| it.expect("an entry").file_name()).collect();
    assert!(left.iter().all(|name| name == "uids" || name == "tenants"), "{left:?}");
}
