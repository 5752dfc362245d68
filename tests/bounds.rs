//! What no control group counts, on every host: locks, sockets, disk that has no name. Each is tried beside its control,
//! below the bound and above it, wherever the suite runs; where a host's own kernel bounds it, that is what is shown.
//! Needs the CLI's double. It must never take a run that ended by something else for one that its bound has ended.

mod support;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use support::{Client, Options, Response, Server, ask, bearer, environment, until};

/// A run ends by its bound, and this only finds a hang.
const PATIENCE: Duration = Duration::from_secs(180);
/// What a bound of the disk's is here, MiB, and what is written above it.
const DISK_MIB: u32 = 64;

/// Where nobody can look, the whole disk's loss counts: one test at a time writes much.
static DISK: Mutex<()> = Mutex::new(());

fn alone_on_the_disk() -> MutexGuard<'static, ()> {
    DISK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What became of a run: the answer, and the server's line about it.
#[derive(Debug)]
struct Outcome {
    answer: Response,
    line: Value,
}

impl Outcome {
    fn ended_by(&self, reason: &str, hit: &str) -> bool {
        let hits = self.line["hit"].as_array().is_some_and(|hits| hits.iter().any(|it| it == hit));
        self.line["reason"] == reason
            && hits
            && self.line["quarantined"] == false
            && self.answer.status != 200
    }
}

fn lines(server: &Server) -> Vec<Value> {
    let log = server.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["event"] == "run").collect()
}

/// This script of Python's as a tenant's command.
fn run(server: &Server, limits: &str, script: &str) -> Outcome {
    assert!(!script.contains('\''), "{script}");
    let text = format!("RUN: python3 -ISc '{script}' 2>&1");
    let client = Client { patience: PATIENCE, ..server.client() };
    let head = [bearer("a"), ("x-gaoler-limits", format!("{limits},wall_ms=150000"))];
    let before = lines(server).len();
    let answer = client.post(&head, ask(&text).to_string().as_bytes());
    let line = until("the run's line", || lines(server).get(before).cloned());
    // Whatever became of it, its tenant goes on, and so does another.
    assert!(server.says("a", "RUN: echo on").ends_with("on"), "{line}");
    assert!(server.says("b", "RUN: echo beside").ends_with("beside"), "{line}");
    Outcome { answer, line }
}

/// A server, where a command can be run at all. Elsewhere that there is none, the answer shows.
fn server() -> Option<Server> {
    let server = Server::start(Options::with_double());
    let has = environment().commands;
    let said = server.says("a", "RUN: echo it-ran");
    assert_eq!(said.contains("it-ran"), has, "{said}");
    has.then_some(server)
}

/// gVisor's kernel is a process: what it keeps is memory of the container's, and it tells nobody of locks.
fn is_sentry() -> bool {
    environment().name.starts_with("gvisor")
}

#[test]
fn b01_locks_that_nobody_counts_end_their_run() {
    let Some(server) = server() else { return };
    let hold = |locks: u32, seconds: u32| {
        format!(
            "import fcntl, os, time
fd = os.open(\"locked\", os.O_RDWR | os.O_CREAT)
for n in range({locks}): fcntl.lockf(fd, fcntl.LOCK_EX, 1, 2 * n)
time.sleep({seconds})
print(\"held\", {locks})"
        )
    };
    let few = run(&server, "tasks=64", &hold(500, 3));
    assert!(few.answer.text().ends_with("held 500"), "{few:?}");
    let many = run(&server, "tasks=64", &hold(4000, 40));
    if is_sentry() {
        assert!(many.answer.text().ends_with("held 4000"), "{many:?}");
    } else {
        assert!(many.ended_by("locks", "locks"), "{many:?}");
    }
}

#[test]
fn b01_a_run_has_no_more_sockets_than_it_may() {
    let Some(server) = server() else { return };
    let hold = |pairs: u32, seconds: u32| {
        format!(
            "import errno, resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))
kept = []
try:
    for n in range({pairs}): kept.append(socket.socketpair())
    time.sleep({seconds})
except OSError as why: print(errno.errorcode[why.errno])
print(\"held\", len(kept))"
        )
    };
    // What is set for a cage's network is set for no other.
    let settings = || {
        ["tcp_rmem", "tcp_wmem", "tcp_max_tw_buckets"]
            .map(|name| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok())
    };
    let before = settings();
    let limits = "memory_mib=256,open_files=2000";
    let few = run(&server, limits, &hold(60, 2));
    assert!(few.answer.text().ends_with("held 60"), "{few:?}");
    let many = run(&server, limits, &hold(400, 40));
    // Where the network is the host's, its sockets are everybody's: a run's descriptors bound them.
    if environment().network && !is_sentry() {
        assert!(many.ended_by("oom", "memory"), "{many:?}");
    } else {
        assert!(many.answer.text().ends_with("held 400"), "{many:?}");
        let most = run(&server, limits, &hold(1500, 2)).answer.text();
        assert!(most.contains("EMFILE"), "{most}");
    }
    assert_eq!(settings(), before);
    let own = server.says("a", "RUN: cat /proc/sys/net/ipv4/tcp_rmem");
    if environment().network && !is_sentry() {
        assert!(
            own.split_whitespace().last() == Some("262144")
                && !before[0].as_ref().is_some_and(|it| it.contains("\t262144")),
            "{own} {before:?}"
        );
    }
}

#[test]
fn b02_disk_that_has_no_name_counts_wherever_it_is_held() {
    let _alone = alone_on_the_disk();
    let Some(server) = server() else { return };
    let hold = |way: &str, mib: u32, seconds: u32| {
        format!(
            "import array, mmap, os, socket, time
kept = []
for n in range(4):
    fd = os.open(f\"file-{{n}}\", os.O_RDWR | os.O_CREAT)
    for _ in range({mib}): os.write(fd, b\"x\" * 1048576)
    os.unlink(f\"file-{{n}}\")
    way = \"{way}\"
    if way == \"mapped\": kept.append(mmap.mmap(fd, 4096)); os.close(fd)
    if way == \"elsewhere\":
        if os.fork() == 0:
            os.close(1); os.close(2); time.sleep({seconds}); os._exit(0)
        os.close(fd)
    if way == \"flying\":
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        pair[0].sendmsg([b\"x\"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array(\"i\", [fd]))])
        os.close(fd); kept.append(pair)
time.sleep({seconds})
print(\"held\")"
        )
    };
    const WAYS: [&str; 4] = ["open", "elsewhere", "mapped", "flying"];
    // Below, for longer than it takes to be looked at twice, beside each other. What nobody can look at is taken for what
    // the whole disk has lost: it is given room for what this machine writes meanwhile.
    let client = Client { patience: PATIENCE, ..server.client() };
    let below = &|way: &str| {
        let text = format!("RUN: python3 -ISc '{}' 2>&1", hold(way, 1, 8));
        let head = [bearer(way), ("x-gaoler-limits", format!("disk_mib={},wall_ms=150000", DISK_MIB * 16))];
        let below = client.post(&head, ask(&text).to_string().as_bytes());
        assert!(below.status == 200 && below.text().ends_with("held"), "{way}: {below:?}");
    };
    match environment().together {
        true => std::thread::scope(|scope| {
            for way in WAYS {
                scope.spawn(move || below(way));
            }
        }),
        false => WAYS.into_iter().for_each(below),
    };
    for way in WAYS {
        // This gVisor shows neither what is mapped nor what is on its way: a run is ended for it where a look came before.
        if is_sentry() && ["mapped", "flying"].contains(&way) {
            continue;
        }
        let above = run(&server, &format!("disk_mib={DISK_MIB}"), &hold(way, DISK_MIB, 60));
        assert!(above.ended_by("disk", "disk"), "{way}: {above:?}");
    }
}

#[test]
fn b02_what_a_neighbour_writes_is_not_taken_for_a_runs_own() {
    let _alone = alone_on_the_disk();
    if !environment().together {
        return;
    }
    let Some(server) = server() else { return };
    // Memory that is shared looks like a file that has been deleted.
    let script = "import array, mmap, os, socket, time
kept = mmap.mmap(-1, 4096)
file = os.open(\"file\", os.O_RDWR | os.O_CREAT)
pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
pair[0].sendmsg([b\"x\"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array(\"i\", [file]))])
os.close(file)
time.sleep(15)
print(\"held\")";
    let client = Client { patience: PATIENCE, ..server.client() };
    let (waits, writes) = std::thread::scope(|scope| {
        let started = lines(&server).len();
        let beside = scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(2));
            let text = format!(
                "RUN: head -c {}M /dev/zero > big && sleep 6 && rm big && echo written",
                DISK_MIB * 2
            );
            client.post(&[bearer("b")], ask(&text).to_string().as_bytes())
        });
        let head = [bearer("a"), ("x-gaoler-limits", format!("disk_mib={DISK_MIB},wall_ms=150000"))];
        let text = format!("RUN: python3 -ISc '{script}' 2>&1");
        let answer = client.post(&head, ask(&text).to_string().as_bytes());
        let beside = beside.join().expect("an answer");
        until("both lines", || (lines(&server).len() >= started + 2).then_some(()));
        (answer, beside)
    });
    assert!(writes.text().ends_with("written"), "{writes:?}");
    assert!(waits.status == 200 && waits.text().ends_with("held"), "{waits:?} {:?}", lines(&server));
}

#[test]
fn b02_nobody_hides_files_by_shutting_their_folder_again_and_again() {
    let _alone = alone_on_the_disk();
    let Some(server) = server() else { return };
    let script = format!(
        "import os, time
os.mkdir(\"shut\")
files = [open(f\"shut/file-{{n}}\", \"wb\", buffering=0) for n in range(8)]
end = time.time() + 60
for n in range(3):
    if os.fork() == 0:
        os.close(1); os.close(2)
        while time.time() < end: os.chmod(\"shut\", 0)
        os._exit(0)
time.sleep(1)
for file in files:
    for _ in range({}): file.write(b\"x\" * 1048576)
time.sleep(end - time.time())
os.chmod(\"shut\", 448)
print(\"hidden\")",
        DISK_MIB / 4
    );
    let hidden = run(&server, &format!("disk_mib={DISK_MIB}"), &script);
    assert!(hidden.ended_by("disk", "disk"), "{hidden:?}");
}
