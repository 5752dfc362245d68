//! Bombs beside a neighbour: one tenant's run takes all that it can get, another tenant asks all the while, and each of
//! the neighbour's answers must be right. What the bomb hit stands in the log, it leaves nothing, and its tenant goes on.
//! Needs root and the CLI. It must never take more of this machine than the limits that each bomb is run under.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use support::{Client, Options, Response, Server, ask, bearer, environment, until};

/// Answers that the neighbour must have had while a bomb was at work.
const ANSWERS_MIN: usize = 3;
/// Between two questions of the neighbour's.
const PAUSE: Duration = Duration::from_millis(100);
/// A bomb on a busy machine: it ends by its own limits, and this only finds a hang.
const BOMB_PATIENCE: Duration = Duration::from_secs(180);

/// What came of a bomb.
struct Blast {
    /// What its tenant was answered.
    answer: Response,
    /// The frontend's line about its run.
    line: Value,
}

impl Blast {
    fn reason(&self) -> &str {
        self.line["reason"].as_str().unwrap_or_default()
    }

    fn hit(&self, limit: &str) -> bool {
        self.line["hit"].as_array().is_some_and(|hit| hit.iter().any(|it| it == limit))
    }
}

impl std::fmt::Debug for Blast {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n{:?}", self.line, self.answer)
    }
}

/// The question of tenant `a` under these limits.
fn asked(client: &Client, limits: &str, text: &str) -> Response {
    client.post(&[bearer("a"), ("x-gaoler-limits", limits.to_owned())], ask(text).to_string().as_bytes())
}

/// The neighbour, until `over`: how many answers there were, each its own.
fn neighbour(client: &Client, over: &AtomicBool) -> usize {
    let mut answers = 0;
    while !over.load(Ordering::Relaxed) || answers < ANSWERS_MIN {
        let text = format!("RUN: echo answer {answers}");
        let response = client.messages("b", &ask(&text));
        assert_eq!(response.status, 200, "the neighbour's answer {answers}: {response:?}");
        assert_eq!(response.text(), format!("[embedded] RUN ok:\nanswer {answers}"));
        let health = client.request("GET", "/health", &[], b"");
        assert_eq!(health.status, 200, "{health:?}");
        answers += 1;
        thread::sleep(PAUSE);
    }
    answers
}

/// The bomb in tenant a's run under these limits, beside the neighbour; afterwards nothing is left of it.
fn blast(server: &Server, limits: &str, text: &str) -> Blast {
    let client = Client { patience: BOMB_PATIENCE, ..server.client() };
    for tenant in ["a", "b"] {
        client.messages(tenant, &ask("hello"));
    }
    let baseline = server.baseline();
    let over = &AtomicBool::new(false);
    let before = runs(server).len();
    let answer = thread::scope(|scope| {
        let beside = scope.spawn(|| neighbour(&client, over));
        let answer = asked(&client, limits, text);
        over.store(true, Ordering::Relaxed);
        assert!(beside.join().expect("every answer right") >= ANSWERS_MIN);
        answer
    });
    server.settles_to(&baseline);
    // An answer that is an error names no run: but the neighbour has none of that kind.
    let id = answer.header("x-gaoler-run");
    let its = |run: &&Value| id.map_or(run["status"] != 200, |id| run["run"] == *id);
    let line = until("the run's line", || runs(server)[before..].iter().find(its).cloned());
    Blast { answer, line }
}

/// The frontend's line of each run that has ended.
fn runs(server: &Server) -> Vec<Value> {
    let log = server.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["event"] == "run").collect()
}

/// The tenant of the bomb has lost nothing, and runs as before.
fn goes_on(server: &Server) {
    let text = asked(&server.client(), "tasks=64", "RUN: echo on").text();
    assert_eq!(text, "[embedded] RUN ok:\non");
}

/// A server with the CLI's double: its runs are a tenth of the real CLI's work, and its commands are the same.
fn server() -> Server {
    Server::start(Options::with_double())
}

/// A command that runs this script of Python's.
fn python(script: &str) -> String {
    assert!(!script.contains('\''), "{script}");
    format!("RUN: python3 -ISc '{script}' 2>&1")
}

const FORK_BOMB: &str = "RUN: bash -c 'bomb() { bomb | bomb & }; bomb; sleep 600'";
const ANONYMOUS: &str = "kept = []\nwhile True: kept.append(b\"x\" * 10_000_000)";
const MEMFD: &str = "import os
fds = []
while True:
    fds.append(os.memfd_create(\"bomb\"))
    for _ in range(16): os.write(fds[-1], b\"x\" * 1_000_000)";
const DISK_FLOOD: &str = "n = 0
while True:
    n += 1
    with open(f\"flood-{n}\", \"wb\") as file:
        for _ in range(8): file.write(b\"x\" * 1_000_000)";
const INODE_FLOOD: &str = "import os
n = 0
while True:
    n += 1
    if n % 1000 == 1: os.mkdir(f\"flood-{n}\"); at = f\"flood-{n}\"
    open(f\"{at}/{n}\", \"w\").close()";
/// Steps into each folder that it makes: no path is long enough for the last.
const DEEP: &str = "import os
for _ in range(40_000):
    os.mkdir(\"d\"); os.chdir(\"d\")
print(\"deep\")";

/// A measurement meanwhile moves up what is too deep, also past somebody who removes it.
const CLEAN: &str = "RUN: until [ -z \"$(ls -A)\" ]; do ls -A | xargs rm -rf; done; ls -A | wc -l";

#[test]
fn t01_a_fork_bomb_costs_its_neighbour_nothing() {
    let server = server();
    let blast = blast(&server, "tasks=64,wall_ms=4000", FORK_BOMB);
    assert_eq!(blast.reason(), "wall", "{blast:?}");
    assert!(blast.hit("tasks") && blast.hit("wall"), "{blast:?}");
    assert!(blast.line["tasks_peak"].as_u64() <= Some(64), "{blast:?}");
    assert_eq!(blast.line["quarantined"], false, "{blast:?}");
    goes_on(&server);
}

#[test]
fn t02_memory_bombs_of_every_kind_cost_their_neighbour_nothing() {
    let server = server();
    let limits = "memory_mib=160,wall_ms=60000";
    for (kind, text) in [
        ("anonymous", python(ANONYMOUS)),
        ("memfd", python(MEMFD)),
        // More temporary files than there is memory for them.
        ("tmpfs", "RUN: for n in 1 2 3 4; do dd if=/dev/zero of=/tmp/$n bs=1M count=100 2>&1; done".into()),
    ] {
        let blast = blast(&server, limits, &text);
        assert!(blast.hit("memory"), "{kind}: {blast:?}");
        assert!(["finished", "oom", "exited", "init_died"].contains(&blast.reason()), "{kind}: {blast:?}");
        assert!(blast.line["memory_peak"].as_u64() <= Some(160 << 20), "{kind}: {blast:?}");
        assert_eq!(blast.line["quarantined"], false, "{kind}: {blast:?}");
        goes_on(&server);
    }
    // Temporary files have a bound of their own, and a next run finds all of it again.
    for _ in 0..2 {
        let text =
            "RUN: dd if=/dev/zero of=/tmp/big bs=1M count=100 2>&1 | grep -o \"No space left on device\"";
        let blast = blast(&server, "memory_mib=512,tmp_mib=32", text);
        assert_eq!(blast.answer.text(), "[embedded] RUN ok:\nNo space left on device", "{blast:?}");
    }
}

/// A flood of the workspace ends its run; its tenant, who is over the bound now, can still clean up.
fn flood(server: &Server, limits: &str, text: &str) {
    let blast = blast(server, limits, text);
    assert_eq!((blast.reason(), blast.hit("disk")), ("disk", true), "{blast:?}");
    assert_eq!(blast.line["quarantined"], false, "{blast:?}");
    assert_ne!(blast.answer.status, 200, "{blast:?}");
    // Longer than two looks of whoever measures.
    let cleaned = asked(&server.client(), limits, "RUN: sleep 2; ls | grep -c flood; rm -rf flood*; echo $?");
    assert_eq!(cleaned.status, 200, "{cleaned:?}");
    assert!(cleaned.text().ends_with("\n0") && !cleaned.text().contains("\n0\n"), "{cleaned:?}");
    let kept = asked(&server.client(), limits, "RUN: echo kept > kept; sleep 2; cat *");
    assert_eq!(kept.text(), "[embedded] RUN ok:\nkept", "{kept:?}");
}

#[test]
fn t03_a_flood_of_the_disk_ends_its_run_and_its_tenant_can_clean_up() {
    flood(&server(), "disk_mib=64,wall_ms=60000", &python(DISK_FLOOD));
}

#[test]
fn t04_a_flood_of_files_ends_its_run_and_its_tenant_can_clean_up() {
    flood(&server(), "disk_kfiles=5,wall_ms=60000", &python(INODE_FLOOD));
}

#[test]
fn t05_a_hoard_of_descriptors_is_bounded_and_costs_its_neighbour_nothing() {
    let server = server();
    // In its processes, and on their way in sockets, where no process's bound counts them.
    let hoard = "import array, errno, os, socket
kept = []
try:
    while True: kept.append(os.open(\"/dev/null\", os.O_RDONLY))
except OSError as why: print(errno.errorcode[why.errno], len(kept) < 256)
for fd in kept[10:]: os.close(fd)
pairs, sent = [], 0
try:
    while True:
        pairs.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        pairs[-1][0].setblocking(False)
        try:
            while True: pairs[-1][0].sendmsg([b\"x\"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array(\"i\", kept[:10]))]); sent += 10
        except BlockingIOError: pass
except OSError as why: print(errno.errorcode[why.errno], sent < 1000)";
    let blast = blast(&server, "open_files=256,wall_ms=60000", &python(hoard));
    let said = blast.answer.text();
    assert_eq!(said, "[embedded] RUN ok:\nEMFILE True\nETOOMANYREFS True", "{blast:?}");
    goes_on(&server);
}

#[test]
fn t06_a_flood_of_output_ends_its_run_and_costs_its_neighbour_nothing() {
    let server = server();
    for flood in ["NOISE", "STDERR FLOOD"] {
        let blast = blast(&server, "output_mib=32,wall_ms=60000", flood);
        assert_eq!((blast.reason(), blast.hit("output")), ("output", true), "{flood}: {blast:?}");
        assert_ne!(blast.answer.status, 200, "{blast:?}");
        goes_on(&server);
    }
}

#[test]
fn t07_a_folder_deeper_than_any_path_costs_nobody_anything() {
    // Forty thousand folders take a busy disk longer than an upstream may be silent.
    let server = Server::start(Options::with_double().with("GAOLER_RUNS__SILENCE_SECONDS", 200));
    let blast = blast(&server, "wall_ms=170000", &python(DEEP));
    assert_eq!(blast.answer.text(), "[embedded] RUN ok:\ndeep", "{blast:?}");
    assert_eq!(blast.line["quarantined"], false, "{blast:?}");
    // It is that many folders, no more, and its tenant finds and removes them all: no path of them is too long now.
    // In rounds: on a slow disk some still come while others go.
    let count = "RUN: n=0; for round in $(seq 25); do sleep 5; n=$((n + $(ls -A | grep -c deep))); \
                 ls -A | xargs -r rm -rf; [ -z \"$(ls -A)\" ] && break; done; echo $n; ls -A | wc -l";
    let client = Client { patience: BOMB_PATIENCE, ..server.client() };
    let text = asked(&client, "wall_ms=170000", count).text();
    let said: Vec<usize> = text.lines().skip(1).map(|line| line.parse().expect("a number")).collect();
    // As many as are 500 or fewer levels each.
    assert!(matches!(said[..], [80..=400, 0]), "{text}");
}

#[test]
fn r01_whoever_cannot_be_measured_is_ended() {
    // Deep folders count as what they are, so that a flood of them is one.
    let server = server();
    let blast = blast(&server, "disk_kfiles=5,wall_ms=160000", &format!("{}; sleep 150", python(DEEP)));
    assert_eq!(blast.reason(), "disk", "{blast:?}");
    let client = Client { patience: BOMB_PATIENCE, ..server.client() };
    let cleaned = asked(&client, "wall_ms=170000", CLEAN);
    assert_eq!(cleaned.text(), "[embedded] RUN ok:\n0", "{cleaned:?}");
    // A folder that nobody may pass through hides nothing.
    let hidden = "RUN: mkdir flood; cd flood; for n in 1 2 3; do dd if=/dev/zero of=$n bs=1M count=60; done 2>&1; \
                  chmod 400 .; sleep 150";
    let blast = self::blast(&server, "disk_mib=64,wall_ms=160000", hidden);
    assert_eq!(blast.reason(), "disk", "{blast:?}");
}

#[test]
fn t08_the_bombs_of_the_real_cli_are_held_as_those_of_its_double() {
    let server = Server::start(Options::default());
    let blast = |limits: &str, text: &str| blast(&server, limits, text);
    let forks = blast("tasks=100,wall_ms=8000", FORK_BOMB);
    // The CLI's runtime may abort first, where it needs a thread and gets none.
    assert!(forks.hit("tasks") && ["wall", "signaled"].contains(&forks.reason()), "{forks:?}");
    let memory = blast("memory_mib=600,wall_ms=60000", &python(ANONYMOUS));
    assert!(memory.hit("memory"), "{memory:?}");
    let disk = blast("disk_mib=64,wall_ms=60000", &python(DISK_FLOOD));
    assert_eq!((disk.reason(), disk.hit("disk")), ("disk", true), "{disk:?}");
    // Under the level's own bound: under that of the flood it would be ended where it is measured before it removes.
    let text = asked(&server.client(), "wall_ms=60000", "RUN: rm -rf flood*; ls | wc -l").text();
    assert_eq!(text, "[embedded] RUN ok:\n0");
    assert!(environment().commands);
}

/// Files of so many MiB each, held without a name in one of these ways, and then for so many seconds.
const UNNAMED: &str = "import array, mmap, os, shutil, socket, subprocess, time
kept = []
def flood(fd):
    for _ in range(MIB): os.write(fd, b\"x\" * 1048576)
    return fd
def unlinked(name):
    fd = os.open(name, os.O_RDWR | os.O_CREAT)
    os.unlink(name)
    return flood(fd)
def send(to, fd):
    to.sendmsg([b\"x\"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array(\"i\", [fd]))])
    os.close(fd)
def running(name):
    shutil.copy(\"/usr/bin/sleep\", name)
    os.close(flood(os.open(name, os.O_WRONLY | os.O_APPEND)))
    kept.append(subprocess.Popen([os.path.abspath(name), \"60\"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    os.unlink(name)
for n in range(4):
    for way in WAYS:
        name = f\"z-{way}-{n}\"
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        if way == \"running\": running(name); continue
        fd = flood(os.open(\".\", os.O_TMPFILE | os.O_RDWR)) if way == \"tmpfile\" else unlinked(name)
        if way == \"mapped\": kept.append(mmap.mmap(fd, 4096))
        if way == \"path\": kept.append(os.open(f\"/proc/self/fd/{fd}\", os.O_PATH))
        if way == \"elsewhere\" and os.fork() == 0: os.close(1); os.close(2); time.sleep(60)
        if way in (\"flying\", \"nested\"): send(pair[0], fd); kept.append(pair); fd = None
        if way == \"nested\":
            outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            send(outer[0], os.dup(pair[1].fileno()))
            pair[0].close(); pair[1].close(); kept.append(outer)
        if way in (\"mapped\", \"path\", \"elsewhere\"): os.close(fd)
time.sleep(SECONDS)
print(\"held\")";

/// The ways in which something is held without a name; the last ones where nobody can look.
const WAYS: [&str; 8] = ["unlinked", "tmpfile", "mapped", "path", "elsewhere", "running", "flying", "nested"];

fn unnamed(ways: &[&str], mib: u32, seconds: u32) -> String {
    let ways = format!("{ways:?}");
    let script = UNNAMED.replace("WAYS", &ways).replace("MIB", &mib.to_string());
    python(&script.replace("SECONDS", &seconds.to_string()))
}

#[test]
fn b02_a_flood_without_a_name_ends_its_run_however_it_is_held() {
    // Of what nobody can look at the whole disk tells: here nobody else writes on it.
    let disk = Small::new(2048);
    let server = Server::start(Options { state: Some(disk.state()), ..Options::with_double() });
    // Below the bound each way works, for longer than two looks take.
    for way in WAYS {
        let held = asked(
            &server.client(),
            "wall_ms=60000",
            &unnamed(&[way], 1, if way == "flying" { 12 } else { 0 }),
        );
        assert!(held.text().contains("held"), "{way}: {held:?}");
        let blast = blast(&server, "disk_mib=64,wall_ms=60000", &unnamed(&[way], 50, 50));
        assert_eq!((blast.reason(), blast.hit("disk")), ("disk", true), "{way}: {blast:?}");
        assert_eq!(blast.line["quarantined"], false, "{way}: {blast:?}");
        goes_on(&server);
    }
    // A session's folder is the tenant's as well.
    let mut body = ask(&format!(
        "RUN: cd ~/.claude/projects/*/ && {}",
        &unnamed(&["unlinked"], 50, 50)["RUN: ".len()..]
    ));
    body["session_id"] = "0b2e7a5c-1f6d-4c0e-9a51-2f0c3d4e5f60".into();
    let limits = ("x-gaoler-limits", "disk_mib=64,wall_ms=60000".to_owned());
    let before = runs(&server).len();
    let answer = server.client().post(&[bearer("a"), limits], body.to_string().as_bytes());
    let line = until("the run's line", || runs(&server)[before..].first().cloned());
    assert_eq!(line["reason"], "disk", "{line} {answer:?}");
}

#[test]
fn b02_a_flood_of_files_without_names_ends_its_run() {
    let server = server();
    let flood = |files: u32, seconds: u32| {
        python(&format!(
            "import os, time
for _ in range(8):
    if os.fork() == 0:
        for n in range({files}):
            name = f\"{{os.getpid()}}-{{n}}\"
            os.open(name, os.O_CREAT | os.O_RDWR); os.unlink(name)
        os.close(1); os.close(2); time.sleep({seconds}); os._exit(0)
for _ in range(8): os.wait()
print(\"held\")"
        ))
    };
    let limits = "disk_kfiles=5,wall_ms=60000";
    let held = asked(&server.client(), limits, &flood(300, 7));
    assert!(held.text().contains("held"), "{held:?}");
    let blast = blast(&server, limits, &flood(1200, 50));
    assert_eq!((blast.reason(), blast.hit("disk")), ("disk", true), "{blast:?}");
    goes_on(&server);
}

#[test]
fn b02_nothing_reserves_disk_without_writing_it() {
    let server = server();
    // posix_fallocate writes then, and giving back works.
    let script = "import ctypes, errno, fcntl, os, struct
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open(\"f\", os.O_RDWR | os.O_CREAT)
def allocate(mode):
    failed = libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(1 << 20))
    return errno.errorcode[ctypes.get_errno()] if failed else \"done\"
print(*[allocate(mode) for mode in (0, 1, 16, 17, 32, 64, 128)])
range_ = struct.pack(\"hhqqiI4i\", 0, 0, 0, 1 << 20, 0, 0, 0, 0, 0, 0)
for call in (0x40305828, 0x4030582a, 0x40305839, 0x401c5820):
    try: fcntl.ioctl(fd, call, range_); print(\"done\")
    except OSError as why: print(errno.errorcode[why.errno])
print(os.fstat(fd).st_blocks)
os.posix_fallocate(fd, 0, 1 << 20)
print(os.fstat(fd).st_blocks, allocate(3), os.fstat(fd).st_blocks)";
    let text = asked(&server.client(), "wall_ms=60000", &python(script)).text();
    let refused = ["ENOTSUP"; 7].join(" ");
    let wanted = format!("[embedded] RUN ok:\n{refused}\nEPERM\nEPERM\nEPERM\nEPERM\n0\n2048 done 0");
    assert_eq!(text, wanted);
    // Outside of a cage the first of them has it at once.
    let outside = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    nix::fcntl::fallocate(&outside, nix::fcntl::FallocateFlags::empty(), 0, 1 << 20).expect("reserved");
}

/// A file system of this many MiB, mounted for as long as this lives.
struct Small {
    folder: tempfile::TempDir,
}

impl Small {
    fn new(mib: u64) -> Small {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("image");
        std::fs::File::create(&image).and_then(|file| file.set_len(mib << 20)).expect("an image");
        std::fs::create_dir(folder.path().join("mount")).expect("a place");
        let small = Small { folder };
        small.does("mkfs.ext4", &["-q", "-m", "0", "image"]);
        small.does("mount", &["-o", "loop", "image", "mount"]);
        small
    }

    fn does(&self, program: &str, words: &[&str]) {
        let status = std::process::Command::new(program).args(words).current_dir(&self.folder).status();
        assert!(status.expect(program).success(), "{program} {words:?}");
    }

    fn state(&self) -> std::path::PathBuf {
        let state = self.folder.path().join("mount/state");
        std::fs::create_dir_all(&state).expect("a state");
        state
    }

    fn free(&self) -> u64 {
        let stat = nix::sys::statvfs::statvfs(&self.folder.path().join("mount")).expect("a file system");
        stat.blocks_available() * stat.fragment_size()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        self.does("umount", &["mount"]);
    }
}

#[test]
fn b02_whoever_would_take_the_reserve_is_ended_first_and_costs_nobody_else_a_turn() {
    let disk = Small::new(2048);
    let server = Server::start(Options { state: Some(disk.state()), ..Options::with_double() });
    let client = Client { patience: BOMB_PATIENCE, ..server.client() };
    let session = |n: u32, text: &str| {
        let mut body = ask(text);
        body["session_id"] = format!("0b2e7a5c-1f6d-4c0e-9a51-{n:012}").into();
        client.messages("b", &body)
    };
    session(0, "remember the word owls");
    // Its own bound is far above what there is. With room left, it may have what it takes.
    let held = asked(&client, "wall_ms=60000", &unnamed(&["unlinked"], 100, 3));
    assert!(held.text().contains("held"), "{held:?}");
    for flood in [unnamed(&["unlinked"], 500, 50), unnamed(&["flying"], 500, 50), python(DISK_FLOOD)] {
        let over = &AtomicBool::new(false);
        let before = runs(&server).len();
        let least = thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut least = u64::MAX;
                while !over.load(Ordering::Relaxed) {
                    least = least.min(disk.free());
                    thread::sleep(Duration::from_millis(5));
                }
                least
            });
            let beside = scope.spawn(|| {
                for n in 1..=3 {
                    let text = format!("RUN: echo turn {n}");
                    assert_eq!(session(n, &text).text(), format!("[embedded] RUN ok:\nturn {n}"));
                }
            });
            asked(&client, "wall_ms=60000", &flood);
            over.store(true, Ordering::Relaxed);
            beside.join().expect("every turn right");
            watch.join().expect("a number")
        });
        let ended = runs(&server)[before..].iter().filter(|run| run["reason"] == "disk").count();
        assert_eq!(ended, 1, "{:?}", &runs(&server)[before..]);
        assert!(least > 0, "the disk was full");
        println!("least free: {} MiB", least >> 20);
    }
    // What has a name stays, and the disk is as good as full: turns and their transcripts go on all the same.
    assert!(session(0, "HISTORY?").text().contains("owls"));
    assert!(session(0, "HISTORY?").text().contains("HISTORY"));
    let cleaned = asked(&client, "wall_ms=60000", "RUN: rm -rf flood*; ls | grep -c flood");
    assert!(cleaned.text().ends_with("\n0"), "{cleaned:?}");
}
