//! What /health and /v1/security say: the tier, the guarantees and the layers, as the supervisor tried them.
//! It must never claim more than a row says, and an absent row is an absent layer.

use serde_json::{Value, json};

use gaoler_policy::settings::Levels;
use gaoler_protocol::{Layers, Level, Listen};

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
    let mut security = layers.map_or_else(|| json!({}), crate::doctor::json);
    security["level"] = json!(listen.map(|listen| listen.level.name()));
    security["level_maximum"] = json!(levels.maximum);
    // What the file says is the operator's own matter; that there is one is not.
    security["operator_file"] = json!(levels.own.is_some());
    security["credentials"] = json!("broker");
    security
}
