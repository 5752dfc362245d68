//! What this host offers, layer by layer, for people and for programs.
//! It must never call a layer enforced that the supervisor has not tried.

use gaoler_protocol::Layers;
use serde_json::{Value, json};

/// The host as one JSON object, in the schema of doctor, reports and `/v1/security`.
pub fn json(layers: &Layers) -> Value {
    let rows = layers.rows.iter();
    let rows: Vec<Value> = rows
        .map(|row| json!({ "name": row.name.name(), "state": row.state.name(), "errno": row.errno }))
        .collect();
    json!({ "tier": layers.tier.name(), "layers": rows })
}

/// The host as a table.
pub fn render_table(layers: &Layers) -> String {
    use std::fmt::Write;
    layers.rows.iter().fold(format!("tier {}\n", layers.tier), |mut out, row| {
        let _ = writeln!(out, "{:24} {:10} {}", row.name, row.state, row.errno);
        out
    })
}
