//! Makes constants of the filters of the processes that confine themselves.
//! It must never decide anything: a policy that cannot be read ends the build.

fn main() -> Result<(), String> {
    gaoler_policies::filters(&["frontend", "egress", "upstream", "ledger", "exporter"])
}
