//! The ledger as a process, confined: its death in the middle of writing, the command line beside it, its confinement.
//! It must never need root, another process of gaoler's, or a network.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use gaoler_ledger_wire::{
    Allowance, Answer, Asked, Counted, FRAME_BYTES_MAX, Hex, KeyKind, Proof, Question, Refusal, RunRecord,
    Told, Who, decode, encode,
};
use gaoler_protocol::{FRAME_BYTES, Message, Role};
use gaoler_sys::channel;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rusqlite::Connection;

/// How long anything may take before a test says that it hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the ledger is killed while it writes.
const KILLS: u32 = 25;

struct Ledger {
    child: Child,
    control: OwnedFd,
    questions: OwnedFd,
    next: u64,
}

impl Ledger {
    /// One in this folder, once it is ready.
    fn start(folder: &Path) -> Ledger {
        let (control, their_control) = channel::pair().expect("a pair");
        let (questions, their_questions) = channel::pair().expect("a pair");
        let mut command = Command::new(env!("CARGO_BIN_EXE_gaoler-ledger"));
        command.args(["--runs-days", "90", "--usage-days", "800"]).current_dir(folder).env_clear();
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let fds = vec![
            FdMapping { parent_fd: their_control, child_fd: 3 },
            FdMapping { parent_fd: their_questions, child_fd: 4 },
        ];
        command.fd_mappings(fds).expect("descriptors");
        let child = command.spawn().expect("a ledger");
        drop(command);
        let ledger = Ledger { child, control, questions, next: 0 };
        wait(&ledger.control);
        let frame = channel::receive::<FRAME_BYTES>(ledger.control.as_fd()).expect("a frame");
        let (_, message) = Message::decode(&frame.bytes).expect("a message");
        assert!(matches!(message, Message::Ready(ready) if ready.role == Role::Ledger && ready.threads == 1));
        ledger
    }

    /// Whether there was room for it.
    fn send(&mut self, by: Option<Proof>, question: Question) -> bool {
        self.next += 1;
        let frame = encode(&Asked { id: self.next, by, question }).expect("a frame");
        channel::send(self.questions.as_fd(), &frame, &[]).is_ok()
    }

    /// The next answer; `None` at the end.
    fn told(&self) -> Option<Told> {
        wait(&self.questions);
        let frame = channel::receive::<FRAME_BYTES_MAX>(self.questions.as_fd()).ok()?;
        (!frame.bytes.is_empty()).then(|| decode(&frame.bytes).expect("an answer"))
    }

    fn ask(&mut self, by: Option<Proof>, question: Question) -> Result<Answer, Refusal> {
        assert!(self.send(by, question));
        let told = self.told().expect("an answer");
        assert_eq!(told.id, self.next);
        told.answer
    }

    fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(fd: &OwnedFd) {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::try_from(PATIENCE).expect("short")), Ok(1), "nothing was said");
}

/// The command line's ledger on this folder.
fn alone(folder: &Path, word: &str, question: Option<&Question>) -> Output {
    let uid = nix::unistd::geteuid().to_string();
    let mut child = Command::new(env!("CARGO_BIN_EXE_gaoler-ledger"))
        .args(["--folder", folder.to_str().expect("text"), "--uid", &uid, word])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a ledger");
    let mut stdin = child.stdin.take().expect("a pipe");
    if let Some(question) = question {
        stdin.write_all(&encode(question).expect("a frame")).expect("written");
    }
    drop(stdin);
    child.wait_with_output().expect("an end")
}

fn root(folder: &Path, question: &Question) -> Result<Answer, Refusal> {
    let output = alone(folder, "ask", Some(question));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    decode::<Told>(&output.stdout).expect("an answer").answer
}

fn record(run: u64) -> Question {
    Question::Record(Box::new(RunRecord {
        run: format!("{run:032x}"),
        tenant: "tn_test".into(),
        key: None,
        session: None,
        model: "sonnet".into(),
        level: "balanced".into(),
        tier: "kernel".into(),
        outcome: "end_turn".into(),
        status: 200,
        launch_us: 1,
        counted: Counted { output_tokens: 1, ..Counted::default() },
    }))
}

fn usage(ledger: &mut Ledger) -> (u64, u64) {
    let question = Question::Usage { tenant: Some("tn_test".into()), before: None, limit: 50 };
    let Ok(Answer::Usage(days)) = ledger.ask(None, question) else { panic!("no usage") };
    (days.iter().map(|day| day.runs).sum(), days.iter().map(|day| day.counted.output_tokens).sum())
}

fn key(n: u8, kind: KeyKind, tenant: Option<&str>) -> (Proof, Question) {
    let (id, hash) = (format!("{n:016x}"), Hex(vec![n; 32]));
    let tenant = tenant.map(ToOwned::to_owned);
    let question = Question::CreateKey {
        id: id.clone(),
        hash: hash.clone(),
        kind,
        tenant,
        make_tenant: true,
        label: String::new(),
        expires_at: None,
    };
    (Proof::Key { id, hash }, question)
}

#[test]
fn t80_a_ledger_that_is_killed_while_it_writes_has_all_that_it_acknowledged() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut sent, mut acknowledged) = (0u64, 0u64);
    for round in 0..KILLS {
        let mut ledger = Ledger::start(folder.path());
        let (runs, tokens) = usage(&mut ledger);
        assert!((acknowledged..=sent).contains(&runs), "round {round}: {acknowledged} <= {runs} <= {sent}");
        assert_eq!(runs, tokens, "round {round}: a record is whole or not there");
        // Records come in order, from the last one that was acknowledged: told again, it must not count twice.
        let first = acknowledged.max(1);
        let (mut next, mut told, target) = (first, 0, 1 + u64::from(round) * 3 % 40);
        while told < target {
            for _ in 0..16 {
                if !ledger.send(None, record(next)) {
                    break;
                }
                sent = sent.max(next);
                next += 1;
            }
            assert_eq!(ledger.told().expect("alive").answer, Ok(Answer::Done));
            told += 1;
        }
        // Nobody knows how far it is with the rest.
        ledger.kill();
        acknowledged = acknowledged.max(first + told - 1);
    }
    assert!(acknowledged > u64::from(KILLS), "{acknowledged}");
    let mut ledger = Ledger::start(folder.path());
    let (runs, tokens) = usage(&mut ledger);
    assert!((acknowledged..=sent).contains(&runs) && runs == tokens, "{acknowledged} <= {runs} <= {sent}");
    assert_eq!(root(folder.path(), &Question::Integrity), Ok(Answer::Integrity(vec![])));
}

#[test]
fn t81_a_command_line_works_beside_a_ledger_that_serves_and_without_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let (proof, create) = key(1, KeyKind::Tenant, Some("acme"));
    assert_eq!(root(folder.path(), &create), Ok(Answer::Done), "without one");
    let mut ledger = Ledger::start(folder.path());
    assert!(matches!(ledger.ask(Some(proof.clone()), Question::Who), Ok(Answer::Who(Who::Tenant(_)))));
    let (admin, create) = key(2, KeyKind::Admin, None);
    assert_eq!(ledger.ask(Some(admin.clone()), Question::Who), Err(Refusal::KeyUnknown));
    assert_eq!(root(folder.path(), &create), Ok(Answer::Done), "beside one");
    assert_eq!(ledger.ask(Some(admin), Question::Who), Ok(Answer::Who(Who::Admin)));
    assert_eq!(root(folder.path(), &Question::RevokeKey { id: format!("{:016x}", 1) }), Ok(Answer::Done));
    assert_eq!(ledger.ask(Some(proof), Question::Who), Err(Refusal::KeyRevoked), "at once");
}

#[test]
fn t82_a_backup_of_a_ledger_that_writes_is_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut ledger = Ledger::start(folder.path());
    for run in 1..=50 {
        assert_eq!(ledger.ask(None, record(run)), Ok(Answer::Done));
    }
    for run in 51..=90 {
        ledger.send(None, record(run));
    }
    let copy = alone(folder.path(), "backup", None);
    assert!(copy.status.success(), "{}", String::from_utf8_lossy(&copy.stderr));
    ledger.kill();
    let restored = tempfile::tempdir().expect("a folder");
    std::fs::write(restored.path().join("ledger.db"), &copy.stdout).expect("written");
    assert_eq!(root(restored.path(), &Question::Integrity), Ok(Answer::Integrity(vec![])));
    let mut ledger = Ledger::start(restored.path());
    let (runs, tokens) = usage(&mut ledger);
    assert!((50..=90).contains(&runs) && runs == tokens, "{runs} {tokens}");
}

#[test]
fn t83_a_ledger_refuses_what_is_no_question_and_a_database_of_a_later_version() {
    let folder = tempfile::tempdir().expect("a folder");
    for nonsense in [&b"{}"[..], b"\xff\xff", &[b' '; FRAME_BYTES_MAX + 1]] {
        let ledger = Ledger::start(folder.path());
        channel::send(ledger.questions.as_fd(), nonsense, &[]).expect("sent");
        assert!(ledger.told().is_none(), "it ends");
    }
    let mut ledger = Ledger::start(folder.path());
    let (_, create) = key(1, KeyKind::Admin, None);
    assert_eq!(ledger.ask(None, create), Err(Refusal::Forbidden), "the frontend makes no key by itself");
    assert_eq!(ledger.ask(None, Question::Integrity), Err(Refusal::Forbidden));
    drop(ledger);
    let later = tempfile::tempdir().expect("a folder");
    let copy = alone(folder.path(), "backup", None).stdout;
    let mut copy = copy;
    // user_version: bytes 60 to 63 of a database.
    copy[60..64].copy_from_slice(&99u32.to_be_bytes());
    std::fs::write(later.path().join("ledger.db"), copy).expect("written");
    let refused = alone(later.path(), "ask", Some(&Question::Integrity));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("has version 99"), "{said}");
}

/// Databases of earlier versions, with what they may hold, as their logs leave them: never written back.
const EARLIER: [&str; 2] = [include_str!("version-1.sql"), include_str!("version-2.sql")];
/// The version of this program.
const NEWEST: i64 = 3;

fn earlier(folder: &Path, sql: &str) {
    let database = Connection::open(folder.join("ledger.db")).expect("a database");
    database.pragma_update(None, "journal_mode", "wal").expect("a mode");
    database.execute_batch(sql).expect("an earlier version");
}

/// Which version a database has, and whether it is that and nothing between.
fn version(folder: &Path) -> i64 {
    let database = Connection::open(folder.join("ledger.db")).expect("a database");
    let number = |sql: &str| database.query_row(sql, [], |row| row.get::<_, i64>(0)).expect(sql);
    let version = number("PRAGMA user_version");
    let tables = ["allowances", "session_servers"]
        .map(|table| number(&format!("SELECT count(*) FROM sqlite_schema WHERE name = '{table}'")));
    assert_eq!(tables, [i64::from(version >= 2), i64::from(version >= 3)], "version {version}");
    let columns = ["runs", "usage"].map(|table| {
        let sql = "SELECT count(*) FROM pragma_table_info('{}') WHERE name = 'cost_microusd'";
        number(&sql.replace("{}", table))
    });
    assert_eq!(columns, [i64::from(version >= 2); 2], "version {version}");
    let rows = ["tenants", "keys", "credentials", "links", "runs", "usage"]
        .map(|table| number(&format!("SELECT count(*) FROM {table}")));
    assert_eq!(rows, [1, 2, 1, 1, 2, 1], "nothing is lost");
    version
}

#[test]
fn t212_a_database_of_the_first_version_is_brought_to_this_one_with_all_that_it_holds() {
    let folder = tempfile::tempdir().expect("a folder");
    earlier(folder.path(), EARLIER[0]);
    assert_eq!(version(folder.path()), 1);
    let mut ledger = Ledger::start(folder.path());
    let proof = Proof::Key { id: format!("{:016x}", 1), hash: Hex(vec![1; 32]) };
    let Ok(Answer::Who(Who::Tenant(grant))) = ledger.ask(Some(proof.clone()), Question::Who) else {
        panic!("the key is known")
    };
    assert_eq!((grant.name.as_str(), &grant.secret), ("acme", &Hex(vec![7; 32])));
    assert_eq!(grant.credential.expect("kept").sealed, Hex(vec![9; 4]));
    assert_eq!(grant.allowance, Allowance::default());
    let question = Question::Usage { tenant: Some("tn_acme".into()), before: None, limit: 50 };
    let Ok(Answer::Usage(days)) = ledger.ask(None, question) else { panic!("no usage") };
    let counted =
        Counted { wall_us: 1, requests: 2, denials: 3, input_tokens: 4, output_tokens: 5, ..days[0].counted };
    assert_eq!((days[0].runs, days[0].counted, counted.cost_microusd), (2, counted, 0));
    let allowance = Allowance { tokens_per_day: Some(9), ..Allowance::default() };
    let allow = Question::Allow { tenant: "acme".into(), allowance };
    assert_eq!(root(folder.path(), &allow), Ok(Answer::Done));
    let Ok(Answer::Who(Who::Tenant(grant))) = ledger.ask(Some(proof), Question::Who) else { panic!("a key") };
    assert_eq!(grant.allowance, allowance, "in force for the next request");
    drop(ledger);
    assert_eq!(version(folder.path()), NEWEST);
}

#[test]
fn t247_a_database_of_the_second_version_is_brought_to_this_one_with_all_that_it_holds() {
    let folder = tempfile::tempdir().expect("a folder");
    earlier(folder.path(), EARLIER[1]);
    assert_eq!(version(folder.path()), 2);
    let mut ledger = Ledger::start(folder.path());
    let proof = || Some(Proof::Key { id: format!("{:016x}", 1), hash: Hex(vec![1; 32]) });
    let Ok(Answer::Who(Who::Tenant(grant))) = ledger.ask(proof(), Question::Who) else {
        panic!("the key is known")
    };
    let allowance = Allowance {
        tenant_max: Some(2),
        tokens_per_day: Some(9),
        cost_per_month_microusd: Some(5),
        ..Allowance::default()
    };
    assert_eq!(grant.allowance, allowance);
    let question = Question::Usage { tenant: Some("tn_acme".into()), before: None, limit: 50 };
    let Ok(Answer::Usage(days)) = ledger.ask(None, question) else { panic!("no usage") };
    assert_eq!((days[0].runs, days[0].counted.cost_microusd), (2, 10));
    let session = || "00000000-0000-0000-0000-000000000001".to_owned();
    assert_eq!(ledger.ask(proof(), Question::Served), Ok(Answer::Served(vec![])));
    let keep = Question::KeepServers { session: session(), locked: Hex(vec![3; 9]), used_at: 1 };
    assert_eq!(ledger.ask(proof(), keep), Ok(Answer::Done));
    assert_eq!(ledger.ask(proof(), Question::Served), Ok(Answer::Served(vec![session()])));
    drop(ledger);
    assert_eq!(version(folder.path()), NEWEST);
}

#[test]
fn t248_a_ledger_that_is_killed_while_it_keeps_servers_has_each_as_it_was_acknowledged_or_newer() {
    let folder = tempfile::tempdir().expect("a folder");
    let (by, create) = key(1, KeyKind::Tenant, Some("acme"));
    assert_eq!(root(folder.path(), &create), Ok(Answer::Done));
    let session = |n: u64| format!("00000000-0000-0000-0000-{:012x}", n % 8);
    // What is kept for a session says which question it came with, over and over.
    let locked = |n: u64| Hex(n.to_le_bytes().repeat(1000));
    let (mut next, mut acknowledged) = (0u64, [None::<u64>; 8]);
    for round in 0..KILLS {
        let mut ledger = Ledger::start(folder.path());
        // Of each session: what came with its last acknowledged question, or with a later one, and whole.
        for (n, least) in (0u64..).zip(acknowledged) {
            let question = Question::Servers { session: session(n) };
            let Ok(Answer::Servers(found)) = ledger.ask(Some(by.clone()), question) else {
                panic!("no answer")
            };
            let Some(kept) = found else {
                assert_eq!(least, None, "round {round}: what was acknowledged is there");
                continue;
            };
            let told = u64::from_le_bytes(kept.locked.0[..8].try_into().expect("eight bytes"));
            assert_eq!(kept.locked, locked(told), "round {round}: whole");
            assert!(told % 8 == n && told < next, "round {round}: {told}");
            assert!(least.is_none_or(|least| told >= least), "round {round}: {told} is older than {least:?}");
        }
        let target = next + 1 + u64::from(round) % 5;
        let begun = next;
        while next < target + 4 {
            let question = Question::KeepServers { session: session(next), locked: locked(next), used_at: 1 };
            assert!(ledger.send(Some(by.clone()), question));
            next += 1;
        }
        for n in begun..target {
            assert_eq!(ledger.told().expect("alive").answer, Ok(Answer::Done));
            acknowledged[usize::try_from(n % 8).expect("small")] = Some(n);
        }
        // Nobody knows how far it is with the rest.
        ledger.kill();
    }
    assert!(acknowledged.iter().all(Option::is_some), "{acknowledged:?}");
    assert_eq!(root(folder.path(), &Question::Integrity), Ok(Answer::Integrity(vec![])));
}

#[test]
fn t213_a_migration_that_is_killed_anywhere_leaves_one_version_or_the_other() {
    for (sql, before) in EARLIER.into_iter().zip(1..) {
        killed_anywhere(sql, before);
    }
}

fn killed_anywhere(sql: &str, before: usize) {
    let newest = usize::try_from(NEWEST).expect("small");
    // Killed by the clock, wherever that finds it.
    let mut killed = [0; 4];
    for step in 0..KILLS {
        let folder = tempfile::tempdir().expect("a folder");
        earlier(folder.path(), sql);
        let uid = nix::unistd::geteuid().to_string();
        let mut child = Command::new(env!("CARGO_BIN_EXE_gaoler-ledger"))
            .args(["--folder", folder.path().to_str().expect("text"), "--uid", &uid, "ask"])
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("a ledger");
        let question = encode(&Question::Integrity).expect("a frame");
        child.stdin.take().expect("a pipe").write_all(&question).expect("written");
        std::thread::sleep(Duration::from_micros(u64::from(step) * 400));
        child.kill().expect("killed");
        child.wait().expect("reaped");
        killed[usize::try_from(version(folder.path())).expect("small")] += 1;
    }
    assert_eq!(killed[before] + killed[newest], KILLS, "{killed:?}");
    // Whatever part of its log had reached the disk.
    let folder = tempfile::tempdir().expect("a folder");
    earlier(folder.path(), sql);
    Ledger::start(folder.path()).kill();
    let file = |name: &str| std::fs::read(folder.path().join(name)).expect("a file");
    let (database, log) = (file("ledger.db"), file("ledger.db-wal"));
    let mut found = [0; 4];
    for length in (0..=log.len()).step_by(256).chain([log.len()]) {
        let cut = tempfile::tempdir().expect("a folder");
        std::fs::write(cut.path().join("ledger.db"), &database).expect("written");
        std::fs::write(cut.path().join("ledger.db-wal"), &log[..length]).expect("written");
        found[usize::try_from(version(cut.path())).expect("small")] += 1;
        assert_eq!(root(cut.path(), &Question::Integrity), Ok(Answer::Integrity(vec![])), "{length}");
        assert_eq!(version(cut.path()), NEWEST, "the next start ends it: {length}");
    }
    assert_eq!(found.iter().sum::<i32>(), found[before] + found[newest], "{found:?}");
    assert!(found[before] > 10 && found[newest] > 0, "{found:?} of {} bytes", log.len());
}

#[test]
fn t84_a_ledger_ends_with_its_supervisor() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut ledger = Ledger::start(folder.path());
    let (kept, _) = channel::pair().expect("a pair");
    let control = std::mem::replace(&mut ledger.control, kept);
    drop(control);
    assert!(ledger.child.wait().expect("an end").success());
}
