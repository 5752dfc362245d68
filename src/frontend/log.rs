//! One JSON line on stderr for each decision. It must never hold a tenant's byte: ids, numbers and names only.

use std::io::Write;

use serde_json::{Map, Value};

/// Writes one line. A log that cannot be written is no reason to stop serving.
pub fn line(event: &str, fields: &[(&'static str, Value)]) {
    let mut object = Map::new();
    object.insert("event".into(), event.into());
    object.extend(fields.iter().map(|(name, value)| ((*name).to_string(), value.clone())));
    let mut bytes = serde_json::to_vec(&object).unwrap_or_default();
    bytes.push(b'\n');
    let _ = std::io::stderr().write_all(&bytes);
}
