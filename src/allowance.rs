//! What one tenant may, in the form that operators read and write: the names of the settings, dollars as decimals.
//! It must never round a sum of money but to millionths of a dollar.

use gaoler_ledger_wire::Allowance;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Millionths in one.
const MILLION: f64 = 1e6;

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Form {
    tenant_per_minute: Option<u64>,
    tenant_max: Option<u64>,
    tokens_per_day: Option<u64>,
    tokens_per_month: Option<u64>,
    cost_per_day_usd: Option<f64>,
    cost_per_month_usd: Option<f64>,
}

/// Dollars as a number of JSON.
pub fn usd(micro: u64) -> Value {
    json!(micro as f64 / MILLION)
}

/// Dollars as millionths; a sum that is none is more than anybody may have.
pub fn micro(usd: f64) -> u64 {
    // A cast takes what is too large as the largest, and this is not negative.
    if usd.is_finite() && usd >= 0.0 { (usd * MILLION).round() as u64 } else { u64::MAX }
}

/// All of it; `null` = as the server's settings say of everybody.
pub fn json(allowance: &Allowance) -> Value {
    json!({
        "tenant_per_minute": allowance.tenant_per_minute,
        "tenant_max": allowance.tenant_max,
        "tokens_per_day": allowance.tokens_per_day,
        "tokens_per_month": allowance.tokens_per_month,
        "cost_per_day_usd": allowance.cost_per_day_microusd.map(usd),
        "cost_per_month_usd": allowance.cost_per_month_microusd.map(usd),
    })
}

/// Reads that form; what is left out is `null`.
///
/// # Errors
/// The field that is wrong, and what it may be.
pub fn parse(value: &Value) -> Result<Allowance, String> {
    if !value.is_object() {
        return Err("the body must be an object".into());
    }
    let form = Form::deserialize(value).map_err(|error| error.to_string())?;
    let allowance = Allowance {
        tenant_per_minute: form.tenant_per_minute,
        tenant_max: form.tenant_max,
        tokens_per_day: form.tokens_per_day,
        tokens_per_month: form.tokens_per_month,
        cost_per_day_microusd: form.cost_per_day_usd.map(micro),
        cost_per_month_microusd: form.cost_per_month_usd.map(micro),
    };
    match allowance.wrong() {
        None => Ok(allowance),
        Some((column, bounds)) => {
            let name = column.replace("microusd", "usd");
            let scale = if name == column { 1.0 } else { MILLION };
            let [low, high] = [*bounds.start(), *bounds.end()].map(|bound| bound as f64 / scale);
            Err(format!("{name}: must be a number from {low} to {high}, or null for the server's"))
        }
    }
}

/// With these changes, each `NAME=NUMBER` or `NAME=default`.
///
/// # Errors
/// The one that is wrong.
pub fn change(allowance: &Allowance, changes: &[String]) -> Result<Allowance, String> {
    let mut form: Map<String, Value> = json(allowance).as_object().cloned().unwrap_or_default();
    for change in changes {
        let known = || {
            let names: Vec<&str> = form.keys().map(String::as_str).collect();
            format!("{change}: write NAME=NUMBER or NAME=default, NAME one of {}", names.join(", "))
        };
        let (name, value) = change.split_once('=').ok_or_else(known)?;
        let value: Value = match value {
            "default" => Value::Null,
            number => serde_json::from_str(number).ok().filter(Value::is_number).ok_or_else(known)?,
        };
        if !form.contains_key(name) {
            return Err(known());
        }
        form.insert(name.to_owned(), value);
    }
    parse(&Value::Object(form))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowance_is_read_as_it_is_written_and_nothing_else_is() {
        let words = ["tenant_max=2", "cost_per_day_usd=0.25", "tokens_per_month=0"].map(str::to_owned);
        let changed = change(&Allowance::default(), &words).expect("changes");
        assert_eq!((changed.tenant_max, changed.cost_per_day_microusd), (Some(2), Some(250_000)));
        assert_eq!(parse(&json(&changed)), Ok(changed));
        assert_eq!(json(&changed)["cost_per_day_usd"], json!(0.25));
        let back = change(&changed, &["tenant_max=default".to_owned()]).expect("a change");
        assert_eq!((back.tenant_max, back.tokens_per_month), (None, Some(0)));
        for wrong in ["tenant_max", "tenant_max=", "tenant_max=x", "tenant_max=0", "tenant_max=1025", "x=1"] {
            assert!(change(&changed, &[wrong.to_owned()]).is_err(), "{wrong}");
        }
        for wrong in
            ["cost_per_day_usd=-1", "cost_per_day_usd=1e300", "tokens_per_day=0.5", "tokens_per_day=-1"]
        {
            assert!(change(&changed, &[wrong.to_owned()]).is_err(), "{wrong}");
        }
        let why = parse(&json!({"tenant_max": 0})).expect_err("none");
        assert_eq!(why, "tenant_max: must be a number from 1 to 1024, or null for the server's");
        assert!(parse(&json!({"x": 1})).is_err() && parse(&json!([])).is_err());
        assert_eq!(parse(&json!({})), Ok(Allowance::default()));
        assert_eq!((micro(0.000_001), usd(1).to_string().as_str()), (1, "1e-6"));
    }
}
