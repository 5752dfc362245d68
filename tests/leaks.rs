//! A thousand runs, a third of them killed at a random moment, over several lives of the server, some of which are
//! themselves cut short: after each life and at the end there is what there was before. Needs root.
//! It must never depend on luck: whatever the order and the moments, the same must be true. The seed is printed.

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::traces::{Role, descriptors, groups, memory_kib, processes};
use support::{Client, Options, Response, Server, Traces, ask, bearer, environment, until};

/// Requests at the same time: more than two cores can serve at once, so that ends meet beginnings.
const WORKERS: usize = 8;
const TENANTS: usize = 10;
/// A random moment of a run lies within this: a run of the double takes some 50 to 300 ms here.
const MOMENT_MS: u64 = 250;
/// The supervisor's own memory may grow by this over the second half of a long life: its tables grow to the most runs
/// at a time, which the first half has seen; what is lost with each run would be seen from a few hundred bytes on.
const GROWTH_KIB: u64 = 128;

/// How many runs; hosts without namespaces and groups take apart by looking, which is slower.
fn runs() -> usize {
    if environment().cgroups { 1000 } else { 100 }
}

/// Random numbers that are the same for the same seed (Steele, Lea and Flood's SplitMix64).
struct Random(u64);

impl Random {
    fn seeded() -> Random {
        let given = std::env::var("GAOLER_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let clock =
            || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos();
        let seed = given.unwrap_or_else(|| clock() as u64);
        println!("GAOLER_TEST_SEED={seed}");
        Random(seed)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    fn moment(&mut self) -> Duration {
        Duration::from_micros(self.below(MOMENT_MS * 1000))
    }
}

/// What happens to a run.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Ends,
    ClientGoes(Duration),
    /// Somebody's egress or pid 1 is killed: with several runs at a time, not always this one's.
    Killed(Role, Duration, usize),
}

/// One request that is to be made.
#[derive(Debug, Clone)]
struct Plan {
    tenant: String,
    body: Value,
    fate: Fate,
}

impl Plan {
    fn new(random: &mut Random, number: usize) -> Plan {
        let text = match random.below(4) {
            0 => format!("hello {number}"),
            1 => format!("SLOW: {}", random.below(3)),
            2 => {
                format!("RUN: echo {number} > mine-{number}; sleep 600 > /dev/null 2>&1 & cat mine-{number}")
            }
            _ => format!(
                "RUN: mkdir -p /tmp/a/b; echo {number} > /tmp/a/b/c; head -c 3000000 /dev/zero > $HOME/d"
            ),
        };
        let mut body = ask(&text);
        body["stream"] = json!(random.below(2) == 0);
        if random.below(4) == 0 {
            body["session_id"] = json!(format!("00000000-0000-4000-8000-{number:012}"));
        }
        let pick = random.below(1 << 20) as usize;
        // One in three is killed, one way or the other.
        let fate = match (number % 3, random.below(3)) {
            (1.., _) => Fate::Ends,
            (_, 0) => Fate::ClientGoes(random.moment()),
            (_, 1) => Fate::Killed(Role::Egress, random.moment(), pick),
            (_, _) => Fate::Killed(Role::Init, random.moment(), pick),
        };
        Plan { tenant: format!("leaks-{}", number % TENANTS), body, fate }
    }
}

/// What became of many requests.
#[derive(Debug, Default)]
struct Tally {
    answered: AtomicUsize,
    broken: AtomicUsize,
    gone: AtomicUsize,
    killed: AtomicUsize,
}

/// Whether an answer says in the API's own form that its run came to a bad end. Nothing else may be wrong with it.
fn is_broken(response: &Response) -> bool {
    let codes =
        ["egress_died", "egress_failed", "cli_exited", "cage_failed", "upstream_unavailable", "cli_ended"];
    let text = String::from_utf8_lossy(&response.body);
    let error = text.contains("\"type\":\"error\"");
    let known = codes.iter().any(|code| text.contains(code));
    assert!(!error || known, "an error of another kind: {response:?}");
    error
}

/// Kills one of the server's processes that has this role now.
fn kill_one(server: &Server, role: Role, pick: usize) -> bool {
    let mut found = processes(server.pid(), server.options.uids);
    found.retain(|it| it.role == role && !it.zombie);
    let Some(victim) = found.get(pick % found.len().max(1)) else { return false };
    kill(Pid::from_raw(victim.pid), Signal::SIGKILL).is_ok()
}

fn one(server: &Server, client: &Client, plan: &Plan, tally: &Tally) {
    let body = plan.body.to_string();
    let request = || client.try_request("POST", "/v1/messages", &[bearer(&plan.tenant)], body.as_bytes());
    let response = match plan.fate {
        Fate::Ends => request(),
        Fate::ClientGoes(moment) => {
            let stream = client.connect().expect("a connection");
            client
                .send(&stream, "POST", "/v1/messages", &[bearer(&plan.tenant)], body.as_bytes())
                .expect("sent");
            thread::sleep(moment);
            tally.gone.fetch_add(1, Ordering::Relaxed);
            return;
        }
        Fate::Killed(role, moment, pick) => thread::scope(|scope| {
            let asked = scope.spawn(request);
            thread::sleep(moment);
            // Its moment may be before its cage is there: then it is that of the next one to be seen.
            let mut looks = 0..200;
            while !asked.is_finished() && looks.next().is_some() {
                if kill_one(server, role, pick) {
                    tally.killed.fetch_add(1, Ordering::Relaxed);
                    break;
                }
            }
            asked.join().expect("no panic")
        }),
    };
    let response = response.unwrap_or_else(|error| panic!("{plan:?}: {error}"));
    assert!(response.whole, "{plan:?}: {response:?}");
    if is_broken(&response) {
        tally.broken.fetch_add(1, Ordering::Relaxed);
    } else {
        assert_eq!(response.status, 200, "{plan:?}: {response:?}");
        assert!(
            response.text().starts_with("[embedded]") || response.text().starts_with("double"),
            "{response:?}"
        );
        tally.answered.fetch_add(1, Ordering::Relaxed);
    }
}

/// Makes all these requests, some at a time.
fn all(server: &Server, plans: Vec<Plan>, tally: &Tally) {
    let plans = Mutex::new(plans);
    let client = &server.client();
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(plan) = { plans.lock().expect("no panic").pop() } {
                    one(server, client, &plan, tally);
                }
            });
        }
    });
}

/// A server whose tenants have been admitted, and what it has when nobody asks.
fn begin(options: &Options) -> (Server, Traces) {
    let server = Server::start(options.clone());
    for tenant in 0..TENANTS {
        server.says(&format!("leaks-{tenant}"), "hello");
    }
    let baseline = server.baseline();
    (server, baseline)
}

fn frontend(server: &Server) -> i32 {
    let found = processes(server.pid(), server.options.uids);
    found.iter().find(|it| it.role == Role::Frontend).expect("a frontend").pid
}

/// What a dead server has left that only a next start can remove: nothing else may be there.
fn is_dead(server: &mut Server) {
    let (pid, uids) = (server.pid(), server.options.uids);
    until("the end of every process", || processes(pid, uids).iter().all(|it| it.pid == pid).then_some(()));
    server.wait();
    // Children that were only just born belong to nobody yet that can be told: they hold what the supervisor held.
    until("the end of what it held", || {
        let left = server.traces();
        (left.processes.is_empty() && left.uid_locks == 0 && left.namespaces == 0).then_some(())
    });
}

/// The server's end in the middle of its work: the one who is killed, at a random moment.
fn cut_short(mut server: Server, role: Role, random: &mut Random, number: usize) -> i32 {
    let plans: Vec<Plan> =
        (0..WORKERS).map(|n| Plan { fate: Fate::Ends, ..Plan::new(random, number + n) }).collect();
    let moment = random.moment();
    let client = &server.client();
    thread::scope(|scope| {
        for plan in &plans {
            // An error, an answer that breaks off, or one that came before: but an end.
            scope.spawn(|| {
                let body = plan.body.to_string();
                let _ = client.try_request("POST", "/v1/messages", &[bearer(&plan.tenant)], body.as_bytes());
            });
        }
        thread::sleep(moment);
        let pid = if role == Role::Frontend { frontend(&server) } else { server.pid() };
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("killed");
    });
    is_dead(&mut server);
    server.pid()
}

#[test]
fn t01_a_thousand_runs_a_third_of_them_killed_leave_nothing() {
    let random = &mut Random::seeded();
    let folder = tempfile::Builder::new().prefix("gaoler-leaks-").tempdir().expect("a folder");
    let state = folder.path().join("state");
    let options = Options { state: Some(state.clone()), ..Options::with_double() };
    let tally = &Tally::default();
    let mut number = 0;
    let mut plans = |random: &mut Random, count: usize| -> Vec<Plan> {
        let from = number;
        number += count;
        (from..number).map(|number| Plan::new(random, number)).collect()
    };

    // One long life: what a run costs for ever is seen here.
    let (mut server, first) = begin(&options);
    println!("{first:?}");
    let frontend_has = descriptors(frontend(&server));
    let mut memory = Vec::new();
    for _ in 0..2 {
        all(&server, plans(random, runs() / 4), tally);
        server.settles_to(&first);
        until("the frontend's connections to end", || {
            (descriptors(frontend(&server)) <= frontend_has).then_some(())
        });
        memory.push(memory_kib(server.pid()));
    }
    println!("memory of the supervisor: {memory:?} KiB; {tally:?}");
    assert!(memory[0] > 0 && memory[1] <= memory[0] + GROWTH_KIB, "{memory:?} KiB");
    let mut pids = vec![server.pid()];
    assert!(server.stop().success());
    assert!(server.traces().is_nothing(), "{:?}", server.traces());

    // Short lives, each of which is cut off in the middle of its work.
    for role in [Role::Frontend, Role::Supervisor, Role::Frontend, Role::Supervisor, Role::Supervisor] {
        let (server, before) = begin(&options);
        assert_eq!(before, first, "a start finds more than the first one did");
        all(&server, plans(random, runs() / 10), tally);
        server.settles_to(&before);
        let more = plans(random, WORKERS).len();
        pids.push(cut_short(server, role, random, 10_000 + more));
    }

    // The last start takes away what the ones that were killed could not.
    let (mut server, last) = begin(&options);
    assert_eq!(last, first, "the last start finds more than the first one did");
    for pid in pids {
        assert_eq!(groups(pid), [] as [&Path; 0]);
    }
    assert!(server.stop().success());
    assert!(server.traces().is_nothing(), "{:?}", server.traces());
    assert_eq!(server.traces().folders, 0);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(state.to_str().expect("text")), "{mounts}");
    let names: BTreeSet<String> = std::fs::read_dir(state.join("tenants"))
        .expect("the tenants")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(names.len() == TENANTS && names.iter().all(|name| !name.starts_with('.')), "{names:?}");

    // The control: nearly as many were killed as were to be. A few had ended before their moment came.
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    let (answered, broken) = (count(&tally.answered), count(&tally.broken));
    let (gone, killed) = (count(&tally.gone), count(&tally.killed));
    println!("answered {answered}, broken {broken}, clients gone {gone}, processes killed {killed}");
    assert!(gone + killed >= runs() / 4, "{tally:?}");
    assert!(broken > 0 && broken <= killed, "{tally:?}");
}

#[test]
fn r01_a_session_that_is_busy_loses_no_uid_and_no_group() {
    let server = Server::start(Options::with_double());
    let client = &server.client();
    let mut body = ask("SLOW: 20");
    body["session_id"] = json!("00000000-0000-4000-8000-000000000001");
    let body = &body.to_string();
    server.says("a", "hello");
    let baseline = server.baseline();
    let spawned = || server.log().matches("\"spawned\"").count();
    let before = spawned();
    thread::scope(|scope| {
        let holder = scope.spawn(|| client.post(&[bearer("a")], body.as_bytes()));
        until("the holder's run", || (spawned() > before).then_some(()));
        for _ in 0..20 {
            let refused = client.post(&[bearer("a")], body.as_bytes());
            assert_eq!(refused.status, 409, "{refused:?}");
        }
        assert_eq!(holder.join().expect("no panic").status, 200);
    });
    server.settles_to(&baseline);
}
