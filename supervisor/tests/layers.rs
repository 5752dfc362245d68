//! The layers of the machine that the tests run on, tried as the supervisor tries them at start.
//! It must never run beside other threads: the attempts fork, so this suite has no harness.

use std::fs::File;
use std::os::fd::AsFd;

use gaoler_protocol::{LayerName, LayerState};

#[path = "../src/cgroup.rs"]
#[allow(dead_code)]
mod cgroup;
#[path = "../src/fault.rs"]
mod fault;
#[path = "../src/layers.rs"]
mod layers;
#[path = "../src/log.rs"]
mod log;
#[path = "../src/namespaces.rs"]
#[allow(dead_code)]
mod namespaces;
#[path = "../src/tiers.rs"]
#[allow(dead_code)]
mod tiers;

/// A uid that no account and no run has.
const UID: u32 = 2_109_000;

fn main() {
    // The test runner asks a suite without a harness for its list like any other; nothing here is ignored.
    let asked: Vec<String> = std::env::args().collect();
    if asked.iter().any(|word| word == "--list") {
        if !asked.iter().any(|word| word == "--ignored") {
            println!("t01_every_layer_is_tried_and_leaves_nothing_behind: test");
        }
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let folder = File::open(state.path()).unwrap();
    let before = left_behind(state.path());
    let started = std::time::Instant::now();
    let found = layers::probe(folder.as_fd(), UID);
    let took = started.elapsed();
    for row in found.rows.iter() {
        println!("{:<22} {:<9} {}", row.name, row.state, std::io::Error::from_raw_os_error(row.errno.into()));
    }
    println!("tier {}, Landlock ABI {}, cgroup v{}, {took:?}", found.tier, found.landlock_abi, found.cgroup);
    let names: Vec<LayerName> = found.rows.iter().map(|row| row.name).collect();
    assert_eq!(names, LayerName::ALL, "every layer is tried once, and in order");
    for row in found.rows.iter() {
        assert_eq!(row.errno == 0, row.state == LayerState::Enforced || row.errno == 0, "{}", row.name);
    }
    assert_eq!(left_behind(state.path()), before, "nothing is left behind");
    println!("test t01_every_layer_is_tried_and_leaves_nothing_behind ... ok");
}

/// What an attempt could leave: files in the state, groups, mounts, children.
fn left_behind(state: &std::path::Path) -> (usize, Vec<String>, usize, bool) {
    let files = std::fs::read_dir(state).unwrap().count();
    let own = format!("gaoler-{}", std::process::id());
    let mut groups = Vec::new();
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        groups.extend(hierarchy.path().join(&own).exists().then(|| hierarchy.path().display().to_string()));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines().count();
    let childless = nix::sys::wait::wait() == Err(nix::errno::Errno::ECHILD);
    (files, groups, mounts, childless)
}
