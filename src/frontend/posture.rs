//! What /health, /livez, /readyz and /v1/security say: whether runs are taken, the tier, the guarantees and the layers, as the supervisor tried them.
//! It must never claim more than a row says, and an absent row is an absent layer.

use serde::Serialize;
use serde_json::{Value, json};

use gaoler_policy::settings::Levels;
use gaoler_protocol::{Layers, Level, Listen};

/// `GET /health`. Asked often, so it is written from types.
#[derive(Serialize)]
pub struct Health {
    status: &'static str,
    version: &'static str,
    security_level: &'static str,
    tier: Option<&'static str>,
    level: &'static str,
    runs: Load,
    embedded: bool,
}

#[derive(Serialize)]
struct Load {
    running: usize,
    waiting: usize,
}

/// What `GET /health` says.
pub fn health(
    listen: Option<&Listen>,
    layers: Option<&Layers>,
    draining: bool,
    (running, waiting): (usize, usize),
) -> Health {
    let level = listen.map_or(Level::Balanced, |listen| listen.level);
    Health {
        status: if draining { "draining" } else { "healthy" },
        version: env!("CARGO_PKG_VERSION"),
        // As the predecessor wrote them.
        security_level: match level {
            Level::Paranoid => "PARANOID",
            Level::Balanced => "BALANCED",
            Level::Developer => "DEVELOPER",
        },
        tier: listen.map(|listen| listen.tier.name()).or(layers.map(|layers| layers.tier.name())),
        level: level.name(),
        runs: Load { running, waiting },
        embedded: listen.is_some_and(|listen| listen.embedded),
    }
}

/// `GET /livez`: whoever can say this is alive.
pub fn live() -> Value {
    json!({ "status": "alive" })
}

/// Why no new run is taken; `None` where they are. A server that is full is ready: a place in it is soon free.
pub fn unready(listen: Option<&Listen>, draining: bool) -> Option<&'static str> {
    match (listen, draining) {
        (_, true) => Some("draining"),
        (None, false) => Some("starting"),
        (Some(_), false) => None,
    }
}

/// `GET /readyz`, with what [`unready`] says.
pub fn ready(reason: Option<&str>) -> Value {
    reason.map_or_else(
        || json!({ "status": "ready" }),
        |reason| json!({ "status": "unready", "reason": reason }),
    )
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

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_protocol::Tier;

    #[test]
    fn no_run_is_promised_before_the_start_is_over_nor_in_a_drain() {
        let listen = Listen { tier: Tier::Kernel, level: Level::Balanced, runs_max: 1, embedded: false };
        assert_eq!(unready(None, false), Some("starting"));
        assert_eq!(unready(Some(&listen), false), None);
        assert_eq!(unready(Some(&listen), true), Some("draining"));
        assert_eq!(unready(None, true), Some("draining"));
        assert_eq!(ready(None), json!({"status": "ready"}));
        assert_eq!(ready(Some("starting")), json!({"status": "unready", "reason": "starting"}));
    }
}
