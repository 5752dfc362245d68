//! What /openapi.json says of /health, /livez, /readyz, /v1/security and /metrics.
//! It must never list a name by hand that the protocol has a list of.

use gaoler_protocol::{LayerName, LayerState, Level, Tier};
use serde_json::{Value, json};

use super::errors;
use super::openapi::{Group, answers, request_id, schema};
use crate::guarantee::{Guarantee, Strength};

/// The group.
pub fn group() -> Group {
    Group {
        name: "State",
        about: "What the server is, whether it takes runs, and what keeps its tenants apart. No credential is asked for.",
        paths: vec![
            ("/health", health()),
            ("/livez", live()),
            ("/readyz", ready()),
            ("/v1/security", security()),
            ("/metrics", metrics()),
        ],
        schemas: vec![
            ("Health", health_schema()),
            ("Alive", word("status", &["alive"])),
            ("Ready", word("status", &["ready"])),
            ("Unready", unready_schema()),
            ("Security", security_schema()),
            ("Guarantee", guarantee_schema()),
            ("Layer", layer_schema()),
        ],
    }
}

/// The levels' names, strictest first.
pub fn levels() -> Vec<&'static str> {
    Level::ALL.iter().map(|level| level.name()).collect()
}

fn tiers() -> Vec<&'static str> {
    Tier::ALL.iter().map(|tier| tier.name()).collect()
}

fn health() -> Value {
    json!({"get": {
        "operationId": "health",
        "summary": "Tier, level and version",
        "description": "Always 200; in a drain `status` is `draining`.",
        "responses": {"200": answers("What the server is.", "Health")},
    }})
}

fn live() -> Value {
    json!({"get": {
        "operationId": "livez",
        "summary": "Whether the process answers",
        "responses": {"200": answers("It does.", "Alive")},
    }})
}

fn ready() -> Value {
    json!({"get": {
        "operationId": "readyz",
        "summary": "Whether new runs are taken",
        "description": "A server that is full is ready: a place in it is soon free.",
        "responses": {
            "200": answers("They are.", "Ready"),
            "503": answers("They are not, yet or any more.", "Unready"),
        },
    }})
}

fn security() -> Value {
    json!({"get": {
        "operationId": "security",
        "summary": "What keeps tenants apart, as it was tried on this host",
        "responses": {"200": answers("Guarantees, the layers that carry them, and the levels in force.", "Security")},
    }})
}

fn metrics() -> Value {
    let mut responses = errors::responses(&errors::NO_ROUTE[..1], errors::Form::Plain);
    responses.insert(
        "200".to_owned(),
        json!({
            "description": "Counters, gauges and histograms in OpenMetrics' text form. No label holds a tenant's byte.",
            "headers": request_id(),
            "content": {"application/openmetrics-text": {"schema": {"type": "string"}}},
        }),
    );
    json!({"get": {
        "operationId": "metrics",
        "summary": "Figures for Prometheus",
        "description": "There only where the operator has set `server.metrics = true`; 404 elsewhere.",
        "responses": responses,
    }})
}

fn word(field: &str, words: &[&str]) -> Value {
    json!({
        "type": "object",
        "required": [field],
        "additionalProperties": false,
        "properties": {field: {"type": "string", "enum": words}},
    })
}

fn health_schema() -> Value {
    let loud: Vec<String> = levels().iter().map(|level| level.to_ascii_uppercase()).collect();
    json!({
        "type": "object",
        "required": ["status", "version", "security_level", "tier", "level", "embedded", "runs"],
        "additionalProperties": false,
        "properties": {
            "status": {"type": "string", "enum": ["healthy", "draining"]},
            "version": {"type": "string"},
            "security_level": {"description": "`level`, in capitals.", "type": "string", "enum": loud},
            "tier": {"description": "What the host carries.", "type": "string", "enum": tiers()},
            "level": {"description": "The level of a request that names none.", "type": "string", "enum": levels()},
            "runs": {
                "type": "object",
                "required": ["running", "waiting"],
                "additionalProperties": false,
                "properties": {
                    "running": {"description": "Runs that have not ended.", "type": "integer", "minimum": 0},
                    "waiting": {"description": "Requests that wait for a run.", "type": "integer", "minimum": 0},
                },
            },
            "embedded": {"description": "Whether answers come from the embedded upstream, which is no model.", "type": "boolean"},
        },
    })
}

fn unready_schema() -> Value {
    json!({
        "type": "object",
        "required": ["status", "reason"],
        "additionalProperties": false,
        "properties": {
            "status": {"const": "unready"},
            "reason": {"type": "string", "enum": ["starting", "draining"]},
        },
    })
}

fn security_schema() -> Value {
    json!({
        "type": "object",
        "required": [
            "tier", "guarantees", "layers", "landlock_abi", "cgroup", "level", "level_maximum", "operator_file", "credentials",
        ],
        "additionalProperties": false,
        "properties": {
            "tier": {"type": "string", "enum": tiers()},
            "guarantees": {"type": "array", "items": schema("Guarantee")},
            "layers": {"type": "array", "items": schema("Layer")},
            "landlock_abi": {"description": "The kernel's version of Landlock; 0 = none.", "type": "integer"},
            "cgroup": {"description": "The version of control groups; 0 = none.", "type": "integer"},
            "level": {"description": "Of a request that names none.", "type": "string", "enum": levels()},
            "level_maximum": {"description": "The loosest that a request may get.", "type": "string", "enum": levels()},
            "operator_file": {"description": "Whether a file of the operator's changes a level.", "type": "boolean"},
            "credentials": {"description": "The token stays out of the cage.", "const": "broker"},
        },
    })
}

fn guarantee_schema() -> Value {
    let names: Vec<&str> = Guarantee::ALL.iter().map(|guarantee| guarantee.name).collect();
    let words = [Strength::Full, Strength::Part, Strength::Nothing].map(Strength::word);
    let layers: Vec<&str> = LayerName::ALL.iter().map(|layer| layer.name()).collect();
    json!({
        "description": "A promise to tenants, and what carries it here.",
        "type": "object",
        "required": ["name", "held", "layers", "how", "means"],
        "additionalProperties": false,
        "properties": {
            "name": {"type": "string", "enum": names},
            "held": {"type": "string", "enum": words},
            "layers": {"type": "array", "items": {"type": "string", "enum": layers}},
            "how": {"type": ["string", "null"]},
            "means": {"type": "string"},
        },
    })
}

fn layer_schema() -> Value {
    let names: Vec<&str> = LayerName::ALL.iter().map(|layer| layer.name()).collect();
    let states: Vec<&str> = LayerState::ALL.iter().map(|state| state.name()).collect();
    json!({
        "description": "A mechanism of the kernel, as it was tried.",
        "type": "object",
        "required": ["name", "state", "errno", "fix"],
        "additionalProperties": false,
        "properties": {
            "name": {"type": "string", "enum": names},
            "state": {"type": "string", "enum": states},
            "errno": {"type": ["string", "null"]},
            "fix": {"description": "What would mend it.", "type": ["string", "null"]},
        },
    })
}
