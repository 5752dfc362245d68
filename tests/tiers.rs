//! What every host must show of its own tier, wherever the suite runs: the tier is told, one below the minimum is
//! refused with what would mend it, and the tenant beside another finds neither its files nor gaoler's processes.
//! Needs the CLI. A refusal must never be taken for a success of another kind: each has its positive half.

mod support;

use std::process::Stdio;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::{Options, Server, ask, bearer, environment, real_cli, until};

fn security(server: &Server) -> Value {
    get(server, "/v1/security")
}

fn get(server: &Server, path: &str) -> Value {
    server.client().request("GET", path, &[], b"").json()
}

fn layer(security: &Value, name: &str) -> String {
    let rows = security["layers"].as_array().expect("layers");
    let row = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no layer {name}"));
    row["state"].as_str().expect("a state").to_owned()
}

#[test]
fn t70_the_tier_that_is_told_is_the_hosts_and_nothing_more_is_claimed() {
    let environment = environment();
    // With the real CLI wherever it is: a start has it prove itself.
    let server = Server::start(Options { cli: real_cli(), ..Options::default() });
    assert!(server.ready.contains(&format!("tier={}", environment.tier)), "{}", server.ready);
    let health = get(&server, "/health");
    assert_eq!(health["tier"], environment.tier, "{health}");
    let security = security(&server);
    assert_eq!(security["tier"], environment.tier);
    let held = |name: &str| {
        let rows = security["guarantees"].as_array().expect("guarantees");
        let row = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name}"));
        row["held"].as_str().expect("a word").to_owned()
    };
    assert_eq!(held("resources_bounded"), if environment.cgroups { "yes" } else { "partly" });
    assert_eq!(held("files_apart"), if environment.commands { "yes" } else { "partly" });
    assert_eq!(held("credential_absent"), "yes");
    assert_eq!(layer(&security, "cgroup_memory") == "enforced", environment.cgroups);
    assert_eq!(layer(&security, "network_namespace") != "absent", environment.network);
    assert_eq!(layer(&security, "pid_namespace") != "absent", environment.pids);
}

#[test]
fn t71_below_the_minimum_it_does_not_start_and_says_what_would_mend_it() {
    let environment = environment();
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Options::with_double().command(&folder.path().join("state"));
    // Where root of this host has everything, an ordinary user has not.
    let mut command = match environment.tier {
        "kernel" => {
            use std::os::unix::process::CommandExt;
            std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))
                .expect("a mode");
            command.uid(65_533).gid(65_533);
            command
        }
        _ => {
            let mut other = support::gaoler();
            other.args(command.get_args().filter(|word| *word != "--minimum" && *word != environment.tier));
            other.args(["--minimum", "kernel"]).env("GAOLER_STATE__DIR", folder.path().join("state"));
            other.stdin(Stdio::null());
            other
        }
    };
    let output = command.output().expect("gaoler");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(said.contains("cannot reach tier kernel: this host reaches tier "), "{said}");
    // The layers by name, each with the kernel's word, and where to read what mends them.
    assert!(said.contains(" is absent (") && said.contains("id_mapped_mounts"), "{said}");
    assert!(said.contains("gaoler doctor") && said.contains("isolation.minimum"), "{said}");
}

#[test]
fn t72_a_tenant_reads_its_own_file_and_no_other_tenants() {
    let server = Server::start(Options::default());
    server.writes("alice", "own.txt", "canary-of-alice");
    let said = server.looks("alice", "own.txt");
    assert!(said.contains("canary-of-alice"), "{said}");

    // By its real place on the host, by the way up, and by the process that a run of hers had.
    let tenants = std::fs::read_dir(server.state.join("tenants")).expect("tenants");
    let folder = tenants.map(|entry| entry.expect("an entry").path()).next().expect("alice's");
    let whole = folder.join("workspaces/default/own.txt");
    assert_eq!(whole.exists(), environment().sees, "{whole:?}");
    for path in
        [whole.display().to_string(), "../../../*/workspaces/default/own.txt".into(), "own.txt".into()]
    {
        let said = server.looks("bob", &path);
        assert!(!said.contains("canary-of-alice"), "{path}: {said}");
        assert!(said.contains("it-ran") || said.contains("CALLS 1 error"), "{path}: {said}");
    }
}

#[test]
fn t73_no_process_of_gaolers_can_be_signalled_or_read_from_a_run() {
    if !environment().commands {
        // Without a command there is nobody to try it; that there is none is what the start-up proof shows.
        let server = Server::start(Options::default());
        let said = server.says("alice", "RUN: true");
        assert!(said.contains("offers no tool Bash"), "{said}");
        return;
    }
    let server = Server::start(Options::default());
    let supervisor = server.pid();
    // The shell's own pid is the positive half: that one can be signalled and read.
    let said = server.says(
        "alice",
        &format!(
            "RUN: kill -0 $$ && head -c1 /proc/self/environ >/dev/null && echo own-is-mine; \
             for p in {supervisor} $(cd /proc; echo [0-9]*); do n=$(cat /proc/$p/comm 2>/dev/null); \
             case $n in gaoler*) kill -0 $p 2>/dev/null && echo signalled $p $n; \
             head -c1 /proc/$p/mem 2>/dev/null >/dev/null && echo read $p $n; esac; done; echo it-ran"
        ),
    );
    assert!(said.contains("own-is-mine") && said.contains("it-ran"), "{said}");
    assert!(!said.contains("signalled") && !said.contains("read "), "{said}");
}

#[test]
fn t74_where_nothing_else_separates_tenants_one_runs_at_a_time() {
    let alone = !environment().together;
    let slow = |server: &Server| {
        let client = server.client();
        std::thread::spawn(move || client.messages("alice", &ask("SLOW: 2000 for some seconds")))
    };
    let running = |server: &Server| {
        let of_cli =
            |line: &&str| line.contains("\"event\":\"spawned\"") && line.contains("\"kind\":\"cli\"");
        // After the self-test's.
        until("alice's own run", || (server.log().lines().filter(of_cli).count() >= 2).then_some(()));
    };
    let server = Server::start(Options::default());
    let busy = slow(&server);
    running(&server);
    let beside = server.client().messages("bob", &ask("hello"));
    if alone {
        assert_eq!(beside.status, 529, "{beside:?}");
        assert!(beside.header("retry-after").is_some(), "{beside:?}");
    } else {
        assert_eq!(beside.status, 200, "{beside:?}");
    }
    // The tenant's own runs are no others'.
    let own = server.client().messages("alice", &ask("hello"));
    assert_eq!(own.status, 200, "{own:?}");
    assert_eq!(busy.join().expect("an answer").status, 200);
    let after = server.client().messages("bob", &ask("hello"));
    assert_eq!(after.status, 200, "{after:?}");
    drop(server);

    // The operator may say otherwise.
    let server = Server::start(Options::default().with("GAOLER_ISOLATION__TENANTS_TOGETHER", true));
    let busy = slow(&server);
    running(&server);
    assert_eq!(server.client().messages("bob", &ask("hello")).status, 200);
    assert_eq!(busy.join().expect("an answer").status, 200);
}

#[test]
fn t75_memory_and_tasks_of_a_run_are_bounded_on_every_host() {
    if !environment().commands {
        // File tools take no memory and start nothing: that they are all there is, t73 shows.
        let server = Server::start(Options::default());
        assert!(server.says("alice", "RUN: true").contains("offers no tool Bash"));
        return;
    }
    let server = Server::start(Options::default());
    let asked = [bearer("alice"), ("x-gaoler-limits", "memory_mib=700,tasks=40".into())];
    let greedy = "RUN: python3 -c 'import time; a=[bytes([1])*(64<<20) for _ in range(20)]; time.sleep(20)'; echo status $?";
    let response = server.client().post(&asked, ask(greedy).to_string().as_bytes());
    // A control group ends the command alone, the watchdog the run.
    let killed = environment().cgroups && response.status == 200 && response.text().contains("status 137");
    assert!(killed || server.log().contains("\"reason\":\"oom\""), "{response:?}\n{}", server.log());
    let forks = "RUN: for i in $(seq 200); do sleep 20 & done; wait";
    let response = server.client().post(&asked, ask(forks).to_string().as_bytes());
    // The command is refused its forks, the CLI ends for want of them, or the watchdog ends the run: what it never
    // had is more than its bound.
    let log = server.log();
    let mut runs = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let run = runs.rfind(|line| line["event"] == "run").expect("a run's line");
    let peak = run["tasks_peak"].as_u64().expect("a peak");
    let bound = if environment().cgroups { 40 } else { 41 };
    assert!(peak <= bound, "{run}");
    // One shell's words and another's.
    let words = ["Resource temporarily unavailable", "Cannot fork"];
    let refused = || words.iter().any(|word| response.text().contains(word));
    assert!(response.status != 200 || refused(), "{response:?}");
    // And nobody is left of either.
    let quiet = || server.says("alice", "RUN: ps ax 2>/dev/null | grep -c '[s]leep 20'; echo it-ran");
    until("no sleeper", || quiet().contains("ok:\n0\n").then_some(()));
}

#[test]
fn t76_a_tenant_can_shut_out_neither_itself_nor_the_measuring_of_its_disk() {
    if !environment().commands {
        // Without a command no mode is changed; that there is none, the answer shows.
        let server = Server::start(Options::default());
        assert!(server.says("alice", "RUN: true").contains("offers no tool Bash"));
        return;
    }
    let server = Server::start(Options::default());
    let asked = [bearer("alice"), ("x-gaoler-limits", "disk_mib=64".into())];
    let flood = "RUN: for n in 1 2 3; do dd if=/dev/zero of=$n bs=1M count=60 2>/dev/null; done; \
                 for n in 1 2 3 4 5 6 7 8 9; do chmod 000 ../.. .. . 2>/dev/null; sleep 2; done";
    let response = server.client().post(&asked, ask(flood).to_string().as_bytes());
    assert_ne!(response.status, 200, "{response:?}");
    assert!(server.log().contains("\"reason\":\"disk\""), "{}", server.log());
    assert_eq!(server.says("alice", "RUN: rm -f 1 2 3; echo mine-again"), "[embedded] RUN ok:\nmine-again");
}

#[test]
fn t77_a_reload_finds_the_operators_files_on_every_host() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("gaoler.toml");
    let lists = |id: &str| {
        std::fs::write(&config, format!("models.list = [{{ id = '{id}' }}]\n")).expect("written");
    };
    lists("claude-before");
    let server = Server::start(Options { config: Some(config.clone()), ..Options::with_double() });
    let listed = |id: &str| {
        let page = server.client().request("GET", "/v1/models", &[bearer("a")], b"");
        String::from_utf8_lossy(&page.body).contains(id)
    };
    assert!(listed("claude-before") && !listed("claude-after"));
    lists("claude-after");
    server.signal(Signal::SIGHUP);
    until("the new list", || listed("claude-after").then_some(()));
    assert!(!listed("claude-before"));
    // Whoever was asked to read it is gone, and the server answers.
    lists("not a model");
    server.signal(Signal::SIGHUP);
    until("a refusal", || server.log().contains("is not a full id").then_some(()));
    assert!(listed("claude-after") && server.says("a", "hello").contains("hello"));
}
