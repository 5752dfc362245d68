//! temporary
use gaoler_protocol::*;
pub fn judge(rows: Vec<LayerRow>) -> Layers {
    Layers { tier: Tier::Kernel, landlock_abi: 7, cgroup: 1, rows: Rows::new(rows) }
}
pub fn missing(_: Tier, _: &[LayerRow]) -> Vec<LayerRow> {
    Vec::new()
}
