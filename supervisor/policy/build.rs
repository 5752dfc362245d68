//! Makes constants of the policies that the supervisor and its cages need.
//! It must never decide anything: a policy that cannot be read ends the build.

fn main() -> Result<(), String> {
    gaoler_policies::filters(&["init", "reaper", "cage", "buffers", "uncounted", "shared", "alone"])?;
    ["paranoid", "balanced", "developer"].into_iter().try_for_each(gaoler_policies::level)
}
