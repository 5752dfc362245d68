//! The objects of the kernel's that a cage can make, kind by kind, as docs/kernel-objects.md has them: each is counted by
//! its run's control group, or its run is bounded by something else, while a process outside takes what it likes. Needs root.
//! It must never judge by the probe's word: what is held is read from the host's counts and from the group's.

#[path = "support/probe.rs"]
mod probe;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const MIB: u64 = 1 << 20;
/// The memory of a run of this suite, and what its sockets may hold on top of it (version 1) or within (version 2).
const MEMORY_MIB: u64 = 256;
const SOCKETS_MIB: u64 = 32;
/// What one socket may hold that no group counts, KiB: what ARCHITECTURE and the settings of a cage's network say.
const UNCOUNTED_KIB: u64 = 256;
/// What other tests on this machine may have in flight meanwhile.
const SLACK: u64 = 24 * MIB;
/// What a group keeps charged beyond what is used: 64 pages a processor.
const STOCK: u64 = 256 << 10;
/// A bound on what must happen by itself; never a measurement.
const PATIENCE: Duration = Duration::from_secs(120);

/// A process that holds objects, in a cage or outside.
struct Holder {
    child: Child,
    /// What it said that it holds.
    held: usize,
    /// The word that ended its making.
    why: String,
    report: Option<PathBuf>,
    _state: tempfile::TempDir,
}

impl Holder {
    /// Has `count` objects of this kind made in a cage under these flags of `gaoler exec`.
    fn caged(kind: &str, count: usize, flags: &[&str]) -> Holder {
        let state = tempfile::tempdir().expect("a folder");
        fs::set_permissions(state.path(), fs::Permissions::from_mode(0o700)).expect("a mode");
        let report = state.path().join("report.json");
        // A pipe that nobody writes to is a stdin that does not end.
        let load = "cat > /tmp/probe && chmod 700 /tmp/probe && mkfifo /tmp/never && exec /tmp/probe \"$@\" 0<>/tmp/never";
        let attempt = format!("hold {kind} {count}");
        let words = [
            &["--timeout", "120", "--report", report.to_str().expect("text")],
            flags,
            &["--", "sh", "-c", load, "probe", &attempt],
        ];
        let mut command = probe::exec(state.path(), &words.concat());
        command.stdin(fs::File::open(probe::probe()).expect("the probe"));
        Holder::of(command, Some(report), state)
    }

    /// The same here, as root and confined by nothing.
    fn free(kind: &str, count: usize) -> Holder {
        let mut command = Command::new(probe::probe());
        command.arg(format!("hold {kind} {count}")).stdin(Stdio::piped()).stdout(Stdio::piped());
        Holder::of(command, None, tempfile::tempdir().expect("a folder"))
    }

    fn of(mut command: Command, report: Option<PathBuf>, state: tempfile::TempDir) -> Holder {
        let mut child = command.spawn().expect("started");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("a line");
        let mut words = line.split_whitespace();
        let mut holder = Holder { child, held: 0, why: line.clone(), report, _state: state };
        if words.next() == Some("held") {
            holder.held = words.next().and_then(|word| word.parse().ok()).expect("a number");
            holder.why = words.next().unwrap_or_default().to_owned();
        }
        holder
    }

    /// Bytes that the run's group counts, but for those of sockets that version 1 counts beside.
    fn counted(&self) -> u64 {
        let pid = until("a process of the run's", || {
            let mut all = fs::read_dir("/proc")
                .expect("/proc")
                .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
            all.find(|pid| is_below(*pid, self.child.id()) && command_line(*pid).starts_with("/tmp/probe"))
        });
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("groups");
        let of = |controller: &str| {
            groups.lines().find_map(|line| {
                let (names, path) = line.split_once(':')?.1.split_once(':')?;
                names.split(',').any(|name| name == controller).then(|| path.to_owned())
            })
        };
        let number = |path: String| {
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            text.trim().parse::<u64>().expect("a number")
        };
        match of("memory") {
            Some(path) => number(format!("/sys/fs/cgroup/memory{path}/memory.usage_in_bytes")),
            None => number(format!("/sys/fs/cgroup{}/memory.current", of("").expect("a group"))),
        }
    }

    /// Waits for the end of its run; the report.
    fn ends(mut self) -> Value {
        until("the end of the run", || self.child.try_wait().expect("a child"));
        let report = fs::read(self.report.as_ref().expect("a run")).expect("a report");
        serde_json::from_slice(&report).expect("JSON")
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn command_line(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

/// Whether a process descends from another.
fn is_below(pid: u32, ancestor: u32) -> bool {
    let parent = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse::<u32>().ok())
    };
    std::iter::successors(Some(pid), |pid| parent(*pid)).take(64).any(|it| it == ancestor)
}

/// Bytes that the whole host's TCP and UDP sockets hold, by its sockstat, and its slabs of netlink's and errors' kind.
fn sockets() -> u64 {
    let sockstat = fs::read_to_string("/proc/net/sockstat").expect("sockstat");
    let pages = sockstat.lines().filter(|line| line.starts_with("TCP:") || line.starts_with("UDP:"));
    let pages = pages.filter_map(|line| line.split(" mem ").nth(1)?.split(' ').next()?.parse::<u64>().ok());
    pages.sum::<u64>() * 4096
}

/// Bytes of the buffers that packets are kept in, small ones, by the host's slabs.
fn buffers() -> u64 {
    let slabs = fs::read_to_string("/proc/slabinfo").expect("slabinfo");
    let of = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let is_ours = ["skbuff_small_head", "skbuff_head_cache"].contains(&name);
        let numbers: Vec<u64> = words.take(3).filter_map(|word| word.parse().ok()).collect();
        is_ours.then(|| numbers[0] * numbers[2])
    };
    slabs.lines().filter_map(of).sum()
}

/// What a holder makes the host's count grow by: the count while it holds, less the count before.
fn grown(count: fn() -> u64, hold: impl FnOnce() -> Holder) -> (u64, Holder) {
    let before = count();
    let holder = hold();
    (count().saturating_sub(before), holder)
}

fn memory(mib: u64) -> [String; 2] {
    ["--limit".into(), format!("memory_mib={mib}")]
}

/// The objects of one kind outside take more than `most`, and in a cage at most that.
fn check(kind: &str, count: usize, held: fn() -> u64, most: u64) {
    // The control comes first, and is gone before the cage is measured.
    let (free, control) = grown(held, || Holder::free(kind, count));
    assert_eq!(control.held, count, "{kind}: {}", control.why);
    drop(control);
    let flags = memory(MEMORY_MIB);
    let (caged, holder) = grown(held, || Holder::caged(kind, count, &flags.each_ref().map(String::as_str)));
    println!("{kind}: {count} hold {} MiB outside and {} MiB in a cage", free / MIB, caged / MIB);
    assert_eq!(holder.held, count, "{kind}: {}", holder.why);
    assert!(caged <= most + SLACK, "{kind}: {} MiB in a cage", caged / MIB);
    assert!(free > 2 * (most + SLACK), "{kind}: only {} MiB outside", free / MIB);
}

#[test]
fn t43_what_sockets_hold_is_bounded_whatever_their_kind() {
    // Counted by the group: as much as it has for sockets. One allocation more is let through for each.
    check("tcp", 100, sockets, SOCKETS_MIB * MIB);
    check("udp", 200, sockets, SOCKETS_MIB * MIB);
    // Counted by nobody: each so much as one socket may hold.
    check("tcp-unaccepted", 100, sockets, SOCKETS_MIB * MIB + 100 * (UNCOUNTED_KIB << 10));
    check("netlink", 100, buffers, 100 * (UNCOUNTED_KIB << 10));
}

#[test]
fn t44_a_run_with_more_sockets_than_it_may_have_is_ended() {
    let flags = memory(MEMORY_MIB);
    let flags = flags.each_ref().map(String::as_str);
    for kind in ["tcp-unaccepted", "netlink", "udp-errors", "udp-corked", "unix"] {
        let below = Holder::caged(kind, 40, &flags);
        assert_eq!(below.held, 40, "{kind}: {}", below.why);
        drop(below);
        let report = Holder::caged(kind, 400, &flags).ends();
        assert_eq!(report["exit"]["reason"], "oom", "{kind}: {report}");
        assert_eq!(report["hit"], serde_json::json!(["memory"]), "{kind}: {report}");
    }
}

#[test]
fn t45_every_other_object_of_the_kernels_is_counted_by_the_runs_group() {
    // A machine of 3 GB lets no user have 20,000.
    let limits = fs::read_to_string("/proc/self/limits").expect("limits");
    let pending = limits.lines().find_map(|line| line.strip_prefix("Max pending signals")).expect("a limit");
    let pending = pending.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(usize::MAX);
    // How many, and what the kernel takes at least for each (bytes, by the slabs' sizes of Linux 6.1).
    let rows: &[(&str, usize, u64)] = &[
        ("unix", 50, 180_000),
        ("pipe", 40, 900_000),
        ("eventfd", 3_900, 280),
        ("timerfd", 3_900, 280),
        ("epoll", 3_900, 280),
        ("memfd", 500, 60_000),
        ("timer", 10_000, 200),
        ("signal", pending.saturating_sub(500).min(20_000), 64),
        ("tmpfs-inode", 20_000, 700),
        ("process", 60, 40_000),
        ("page-table", 4_000, 4_000),
    ];
    for (kind, count, bytes) in rows {
        let limits = ["--limit", "memory_mib=768,open_files=4096"];
        let one = Holder::caged(kind, 1, &limits);
        assert_eq!(one.held, 1, "{kind}: {}", one.why);
        let base = one.counted();
        drop(one);
        let holder = Holder::caged(kind, *count, &limits);
        assert_eq!(holder.held, *count, "{kind}: {}", holder.why);
        let counted = holder.counted().saturating_sub(base);
        let least = *count as u64 * bytes;
        println!("{kind}: {count} take {} KiB of the group, of {} KiB at least", counted >> 10, least >> 10);
        assert!(counted + 2 * STOCK >= least, "{kind}: {counted} bytes are counted, of {least}");
        drop(holder);
    }
    // Names that are not there the kernel may drop at any time; what there is of them is counted.
    let names = || {
        let slabs = fs::read_to_string("/proc/slabinfo").expect("slabinfo");
        let line = slabs.lines().find(|line| line.starts_with("dentry ")).expect("its slab");
        line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).expect("a number") * 192
    };
    let limits = ["--limit", "memory_mib=768,open_files=4096"];
    let base = Holder::caged("negative-dentry", 1, &limits).counted();
    let before = names();
    let holder = Holder::caged("negative-dentry", 300_000, &limits);
    assert_eq!(holder.held, 300_000, "{}", holder.why);
    let (counted, taken) = (holder.counted().saturating_sub(base), names().saturating_sub(before));
    println!("negative-dentry: {} KiB of the group, of {} KiB taken", counted >> 10, taken >> 10);
    assert!(counted + SLACK >= taken, "{counted} bytes are counted, of {taken}");
}

#[test]
fn t46_connections_that_wait_for_their_time_are_bounded() {
    let waiting = || {
        let slabs = fs::read_to_string("/proc/slabinfo").expect("slabinfo");
        let line = slabs.lines().find(|line| line.starts_with("tw_sock_TCP ")).expect("its slab");
        line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).expect("a number")
    };
    let flags = memory(MEMORY_MIB);
    let (caged, holder) =
        grown(waiting, || Holder::caged("tcp-waiting", 12_000, &flags.each_ref().map(String::as_str)));
    assert_eq!(holder.held, 12_000, "{}", holder.why);
    // What others on this machine close meanwhile waits too.
    assert!(caged <= 4_096 + 2_000, "{caged} wait");
}

#[test]
fn t47_no_ruleset_can_be_made() {
    // landlock_create_ruleset(2), which has one number everywhere: outside it says that the ruleset is empty.
    probe::check(&[("call 444 @@ 8 0", "ENOMSG", "ENOSYS")]);
}
