//! What /health and /v1/security say: the tier, the guarantees and the layers, as the supervisor tried them.
//! It must never claim more than a row says, and an absent row is an absent layer.

use serde_json::{Value, json};

use gaoler_policy::settings::Levels;
use gaoler_protocol::{LayerName, LayerState, Layers, Level, Listen};

use crate::guarantee::Guarantee;

/// `GET /health`.
pub fn health(listen: Option<&Listen>, layers: Option<&Layers>) -> Value {
    let level = listen.map_or(Level::Balanced, |listen| listen.level);
    json!({
        "status": "healthy",
        "version": env!("CARGO_PKG_VERSION"),
        "security_level": level.name().to_ascii_uppercase(),
        "tier": listen.map(|listen| listen.tier.name()).or(layers.map(|layers| layers.tier.name())),
        "level": level.name(),
        "embedded": listen.is_some_and(|listen| listen.embedded),
    })
}

/// `GET /v1/security`.
pub fn security(listen: Option<&Listen>, layers: Option<&Layers>, levels: &Levels) -> Value {
    let rows: Vec<_> = layers.iter().flat_map(|layers| layers.rows.iter()).collect();
    let state = |name: LayerName| rows.iter().find(|row| row.name == name).map(|row| row.state);
    let guarantee = |guarantee: &Guarantee| {
        let names = guarantee.layers;
        let missing: Vec<_> = names
            .iter()
            .filter(|&&name| state(name) != Some(LayerState::Enforced))
            .map(|name| name.name())
            .collect();
        json!({
            "name": guarantee.name,
            "held": missing.is_empty(),
            "layers": names.iter().map(|name| name.name()).collect::<Vec<_>>(),
            "missing": missing,
        })
    };
    let mut security = layers.map_or_else(|| json!({}), crate::doctor::json);
    security["level"] = json!(listen.map(|listen| listen.level.name()));
    security["level_maximum"] = json!(levels.maximum);
    // What the file says is the operator's own matter; that there is one is not.
    security["operator_file"] = json!(levels.own.is_some());
    security["credentials"] = json!("broker");
    if security["guarantees"].is_null() {
        security["guarantees"] = Guarantee::ALL.iter().map(guarantee).collect();
    }
    security
}
