//! The tests of the server that gaoler replaces, by their names, with the real agent running the commands.
//! Needs root and the CLI. A row must never pass because the command failed: each ends with a word of its own.

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde_json::json;
use support::environment::{Ids, Root};
use support::{Options, Server, ask, environment, token};

const SESSION: &str = "7d1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6c";

fn server() -> Server {
    Server::start(Options::default())
}

/// What a tenant's agent says of a command, which must have run to its end.
fn ran(server: &Server, tenant: &str, command: &str) -> String {
    let said = server.says(tenant, &format!("RUN: {command}; echo it-ran"));
    assert!(said.contains("it-ran"), "{command}: {said}");
    said
}

/// Where there are no commands: that this one is not run, and that the file tools read none of these files.
fn refused(server: &Server, tenant: &str, command: &str, files: &[&str]) -> String {
    let said = server.says(tenant, &format!("RUN: {command}; echo it-ran"));
    assert_eq!(said, "[embedded] RUN: the request offers no tool Bash", "{command}");
    let mut all = String::new();
    for file in files {
        let parts = file.rsplit_once('/').expect("a folder");
        let calls = [
            ("Read", json!({ "file_path": file })),
            ("Grep", json!({ "pattern": ".", "path": parts.0, "output_mode": "content" })),
        ];
        for (tool, input) in calls {
            let said = server.says(tenant, &format!("CALLS: {tool} {input}"));
            // Refused by the rules: what is only not there proves nothing.
            let denied = ["is outside", "denied", "does not read"].iter().any(|word| said.contains(word));
            assert!(said.contains("CALLS 1 error:") && denied, "{tool} {input}: {said}");
            all += &said;
        }
    }
    all
}

/// The tenants' folders on the host, in the order in which they came.
fn tenants(server: &Server) -> Vec<PathBuf> {
    let folder = fs::read_dir(server.state.join("tenants")).expect("tenants");
    let mut folders: Vec<PathBuf> = folder.map(|entry| entry.expect("an entry").path()).collect();
    folders.sort_by_key(|path| {
        let found = fs::metadata(path).expect("a folder");
        // Where all have one uid, the time tells.
        (found.uid(), found.mtime(), found.mtime_nsec())
    });
    folders
}

/// What a command is told of another tenant's file: that there is none, where it has a root of its own.
fn refusal() -> &'static str {
    if environment().root == Root::Own { "No such file or directory" } else { "Permission denied" }
}

#[test]
fn t60_token_isolation() {
    let server = server();
    let steal = "ls -laR /tmp /home 2>&1; cat ~/.claude/.credentials.json /tmp/*/.credentials.json /home/*/.claude/.credentials.json 2>&1; env";
    let said = if environment().commands {
        ran(&server, "alice", "ls -la ~");
        ran(&server, "bob", steal)
    } else {
        server.writes("alice", "own.txt", "of-alice");
        let home = "../../../../runs/x/home/.claude/.credentials.json";
        refused(&server, "bob", steal, &["/proc/self/environ", home, "/etc/passwd"])
    };
    assert!(
        !said.contains(&token("alice")) && !said.contains("alice") && !said.contains(&token("bob")),
        "{said}"
    );
}

#[test]
fn t61_token_not_in_ps() {
    let server = server();
    if !environment().commands {
        return no_token_in_ps_where_nobody_can_run_it(&server);
    }
    let client = server.client();
    let running = std::thread::spawn(move || {
        client.messages("alice", &ask("RUN: until [ -e go ]; do sleep 0.1; done # alices-own-command"))
    });
    // The control: on the host the command is to be seen while it runs.
    support::until("alice's command", || {
        let processes = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
        processes
            .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
            .any(|line| String::from_utf8_lossy(&line).contains("alices-own-command"))
            .then_some(())
    });
    let look = "ps auxeww 2>/dev/null; cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' ' '";
    let beside = if environment().together {
        Some(ran(&server, "bob", look))
    } else {
        let refused = server.client().messages("bob", &ask("RUN: true"));
        assert_eq!((refused.status, refused.error().as_str()), (529, "overloaded_error"), "{refused:?}");
        None
    };
    assert!(!running.is_finished(), "alice's command was over too soon");
    ran(&server, "alice", "touch go");
    assert_eq!(running.join().expect("an answer").status, 200);
    let said = beside.unwrap_or_else(|| ran(&server, "bob", look));
    assert!(!said.contains(&token("alice")) && !said.contains(&token("bob")), "{said}");
    if environment().root == Root::Host {
        // Names and command lines of others can be listed there, in gVisor environments too: none holds a secret, and
        // what stands for one in an own network is in no environment at all.
        assert!(!environment().network || !said.contains("sk-ant-"), "{said}");
    } else {
        assert!(!said.contains("alice"), "{said}");
    }
}

/// The same by who may look: nobody in a run may, and to this host no process of a run shows a token.
fn no_token_in_ps_where_nobody_can_run_it(server: &Server) {
    let client = server.client();
    let running =
        std::thread::spawn(move || client.messages("alice", &ask("SLOW: 1000 alices long text of words")));
    let (mut seen, mut shown) = (0, String::new());
    while !running.is_finished() {
        for process in support::traces::processes(server.pid(), server.options.uids) {
            let part = |name: &str| fs::read(format!("/proc/{}/{name}", process.pid)).unwrap_or_default();
            let (line, environment) = (part("cmdline"), part("environ"));
            // The control: it is the CLI itself that is seen, its environment too.
            if process.program == "claude" && String::from_utf8_lossy(&environment).contains("ANTHROPIC_") {
                seen += 1;
            }
            shown += &String::from_utf8_lossy(&[line, environment].concat());
        }
        assert!(!shown.contains("sk-ant-"), "{shown}");
        shown.clear();
    }
    assert!(seen > 0, "the CLI was not seen");
    assert_eq!(running.join().expect("an answer").status, 200);
    let look = ["/proc/self/environ", "/proc/1/cmdline", "/proc/1/environ"];
    let said = refused(server, "bob", "ps auxeww", &look);
    assert!(!said.contains("sk-ant-") && !said.contains("alice"), "{said}");
}

#[test]
fn t62_code_isolation() {
    let server = server();
    if !environment().commands {
        server.writes("alice", "secret.txt", "API_KEY=canary-of-alice");
        assert!(server.looks("alice", "secret.txt").contains("canary-of-alice"));
        let path = tenants(&server)[0].join("workspaces/default/secret.txt");
        assert!(fs::read_to_string(&path).expect("alice's file").contains("canary-of-alice"));
        let path = path.display().to_string();
        let up = path.replace(&server.state.display().to_string(), "../../../..");
        let said = refused(&server, "bob", &format!("cat {path}"), &[&path, &up]);
        assert!(!said.contains("canary-of-alice"), "{said}");
        return;
    }
    ran(&server, "alice", "echo API_KEY=canary-of-alice > secret.txt; chmod 666 secret.txt; chmod 777 .");
    assert!(ran(&server, "alice", "cat secret.txt").contains("canary-of-alice"));
    let root = server.state.display();
    let said = ran(
        &server,
        "bob",
        &format!(
            "ls -la {root} {root}/tenants /workspaces .. / 2>&1; cat {root}/tenants/*/workspaces/default/secret.txt ../*/secret.txt 2>&1; find / -name secret.txt 2>/dev/null"
        ),
    );
    assert!(!said.contains("canary-of-alice"), "{said}");
    let path = tenants(&server)[0].join("workspaces/default/secret.txt");
    assert!(fs::read_to_string(&path).expect("alice's file").contains("canary-of-alice"));
    let said = ran(&server, "bob", &format!("cat {} 2>&1", path.display()));
    assert!(said.contains(refusal()) && !said.contains("canary-of-alice"), "{said}");
}

#[test]
fn t63_file_permissions() {
    let server = server();
    if environment().commands {
        seen_by_alice(&server);
    } else {
        server.writes("alice", "folder/open", "x");
    }
    for folder in tenants(&server) {
        let owner = fs::metadata(&folder).expect("a folder").uid();
        let own = nix::unistd::geteuid().as_raw();
        assert_eq!(owner == own, environment().ids == Ids::Same, "{owner}");
        for name in ["", "workspaces", "workspaces/default", "sessions"] {
            let found = fs::metadata(folder.join(name)).expect("a folder");
            assert_eq!((found.mode() & 0o777, found.uid()), (0o700, owner), "{name}");
        }
    }
    let secret = fs::metadata(server.state.join("secret")).expect("the server's secret");
    assert_eq!((secret.mode() & 0o777, secret.uid()), (0o600, nix::unistd::geteuid().as_raw()));
}

/// What alice's own commands say of the modes of her places.
fn seen_by_alice(server: &Server) {
    ran(server, "alice", "umask 000; echo x > open; mkdir folder");
    // By find and not by stat, which gVisor's statx(2) does not serve.
    let said = ran(
        server,
        "alice",
        "for at in $PWD ~ ${TMPDIR:-/tmp}; do /usr/bin/find $at -maxdepth 0 -printf '%p %m\n'; done; /usr/bin/find ~ -name .credentials.json",
    );
    let place = server.workspace("alice");
    let mut private = vec![format!("{place} 700")];
    if environment().root != Root::Host {
        private.extend(["/home/agent 700".into(), "/tmp 700".into()]);
    }
    for place in &private {
        assert!(said.contains(place.as_str()), "{place}: {said}");
    }
    // No file with a credential exists at all; what the host keeps is the tenant's alone.
    assert!(!said.contains(".credentials.json\n"), "{said}");
}

#[test]
fn t64_a_session_of_a_continued_by_b_knows_nothing() {
    let server = server();
    let tell = |tenant: &str, text: &str| {
        let mut body = ask(text);
        body["session_id"] = json!(SESSION);
        let response = server.client().messages(tenant, &body);
        assert_eq!(response.status, 200, "{response:?}");
        response.text()
    };
    tell("alice", "we discuss the canary project");
    // The control: alice's own session remembers.
    assert!(tell("alice", "HISTORY?").contains("canary project"));
    let said = tell("bob", "HISTORY?");
    assert!(!said.contains("canary"), "{said}");
    let said = match environment().commands {
        true => tell("bob", "RUN: grep -r canar[y] ~ .; echo it-ran"),
        false => tell("bob", r#"CALLS: Grep {"pattern":"canar[y]","path":".","output_mode":"content"}"#),
    };
    assert!(said.contains("it-ran") || said.contains("CALLS 1 ok:"), "{said}");
    assert!(!said.contains("canary project"), "{said}");
    assert!(tell("alice", "HISTORY?").contains("canary project"));
}

#[test]
fn t65_git_clone_by_a_unreadable_for_b() {
    let server = server();
    if !environment().commands {
        // Nobody clones there; what a folder like a clone holds is no more readable.
        server.writes("alice", "clone/code", "canary-of-alice");
        let path = tenants(&server)[0].join("workspaces/default/clone/code").display().to_string();
        assert_eq!(fs::read_to_string(&path).expect("the clone"), "canary-of-alice");
        let said = refused(&server, "bob", &format!("git clone {path} stolen"), &[&path]);
        assert!(!said.contains("canary-of-alice"), "{said}");
        return;
    }
    ran(
        &server,
        "alice",
        "git init -q origin && cd origin && echo canary-of-alice > code && git add code && git -c user.name=a -c user.email=a@example.com commit -qm first && cd .. && git clone -q origin clone && cat clone/code",
    );
    let path = tenants(&server)[0].join("workspaces/default/clone");
    assert_eq!(fs::read_to_string(path.join("code")).expect("the clone"), "canary-of-alice\n");
    let said = ran(
        &server,
        "bob",
        &format!(
            "git clone {} stolen 2>&1; git -C {} log 2>&1; cat {}/code stolen/code 2>&1; ls",
            path.display(),
            path.display(),
            path.display()
        ),
    );
    assert!(said.contains("does not exist") || said.contains(refusal()), "{said}");
    assert!(!said.contains("canary-of-alice"), "{said}");
}

#[test]
fn t66_symlink_from_bs_workspace_into_as() {
    let server = server();
    server.writes("alice", "secret.txt", "canary-of-alice\n");
    let path = tenants(&server)[0].join("workspaces/default");
    if environment().commands {
        ran(&server, "alice", "chmod 666 secret.txt");
        ran(&server, "bob", &format!("ln -s {0} folder; ln -s {0}/secret.txt file; ls", path.display()));
    } else {
        // No tool makes a link there; one that lies there all the same leads no further.
        server.writes("bob", "own", "of bob");
        let bobs = tenants(&server)[1].join("workspaces/default");
        std::os::unix::fs::symlink(&path, bobs.join("folder")).expect("a link");
        std::os::unix::fs::symlink(path.join("secret.txt"), bobs.join("file")).expect("a link");
    }
    // The control: on the host the links lead there.
    let bobs = tenants(&server)[1].join("workspaces/default");
    assert_eq!(fs::read_to_string(bobs.join("file")).expect("followed"), "canary-of-alice\n");
    let read = format!("READ: {}/file", server.workspace("bob"));
    let asks: &[&str] = match environment().commands {
        true => &["RUN: cat file folder/secret.txt; echo hurt >> file; ls folder/; echo it-ran", &read],
        false => &[
            &read,
            r#"CALLS: Read {"file_path":"folder/secret.txt"}"#,
            r#"CALLS: Write {"file_path":"file","content":"hurt"}"#,
            r#"CALLS: Edit {"file_path":"file","old_string":"canary","new_string":"hurt"}"#,
            r#"CALLS: Grep {"pattern":"alice","path":"folder","output_mode":"content"}"#,
        ],
    };
    for text in asks {
        let said = server.says("bob", text);
        assert!(!said.contains("canary-of-alice"), "{said}");
        assert!(said.contains("it-ran") || said.contains("error:"), "{said}");
    }
    assert_eq!(fs::read_to_string(path.join("secret.txt")).expect("alice's file"), "canary-of-alice\n");
}
