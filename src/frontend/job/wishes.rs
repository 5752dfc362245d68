//! What a request of either dialect may ask of its run beside the conversation: fields of gaoler's own.
//! It must never take a word for a number, nor let one through that is out of bounds.

use serde_json::{Map, Value};

use super::tools::Tool;
use super::{object, required_string, string, take, wrong};
use crate::frontend::error::ApiError;

/// Bounds of `max_budget_usd`: the smallest step that is told the CLI, and more than a run can cost.
pub const BUDGET_LEAST_USD: f64 = 0.000_001;
/// See [`BUDGET_LEAST_USD`].
pub const BUDGET_MAX_USD: f64 = 4000.0;
/// Bytes of a JSON schema. The API's own bounds are far below.
pub const SCHEMA_BYTES_MAX: usize = 64 * 1024;

/// What a client's going away means for its run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnDisconnect {
    /// The run ends.
    #[default]
    Cancel,
    /// The run goes on to its end, within its limits.
    Continue,
}

/// The wishes.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// What happens without a client.
    pub on_disconnect: OnDisconnect,
    /// What the run may cost by the CLI's price list, millionths of a US dollar; 0 = no limit.
    pub budget_microusd: u32,
    /// The JSON schema that the answer's text must follow.
    pub schema: Option<Map<String, Value>>,
    /// The client's own tools.
    pub tools: Vec<Tool>,
}

/// Takes the wishes out of a request's fields.
///
/// # Errors
/// 400 with the path of what is wrong.
pub fn wishes(fields: &mut Map<String, Value>) -> Result<Wishes, ApiError> {
    let on_disconnect = match string(take(fields, "on_disconnect"), "on_disconnect")?.as_deref() {
        None | Some("cancel") => OnDisconnect::Cancel,
        Some("continue") => OnDisconnect::Continue,
        Some(_) => return Err(ApiError::invalid("on_disconnect: must be cancel or continue.")),
    };
    let budget_microusd = match take(fields, "max_budget_usd") {
        None => 0,
        Some(Value::Number(dollars)) => {
            let dollars = dollars.as_f64().unwrap_or_default();
            if !(BUDGET_LEAST_USD..=BUDGET_MAX_USD).contains(&dollars) {
                let message = format!("max_budget_usd: must be from {BUDGET_LEAST_USD} to {BUDGET_MAX_USD}.");
                return Err(ApiError::invalid(message));
            }
            // Within its bounds it is far from the ends of a u32.
            (dollars * 1e6).round() as u32
        }
        Some(other) => return Err(wrong("max_budget_usd", "a number", &other)),
    };
    // As a beta had it; `output_config.format` is where it is now.
    let schema = parse_format(take(fields, "output_format"), "output_format")?;
    Ok(Wishes { on_disconnect, budget_microusd, schema, tools: Vec::new() })
}

/// The schema of an answer in JSON.
///
/// # Errors
/// 400 with the path of what is wrong.
pub fn parse_format(value: Option<Value>, path: &str) -> Result<Option<Map<String, Value>>, ApiError> {
    let Some(mut fields) = object(value, path)? else { return Ok(None) };
    if required_string(take(&mut fields, "type"), &format!("{path}.type"))? != "json_schema" {
        return Err(ApiError::invalid(format!("{path}.type: must be json_schema.")));
    }
    parse_schema(take(&mut fields, "schema"), &format!("{path}.schema")).map(Some)
}

/// A schema, whose meaning is the CLI's to judge: one that it does not take is a 400 as well.
///
/// # Errors
/// 400 with the path of what is wrong.
pub fn parse_schema(value: Option<Value>, path: &str) -> Result<Map<String, Value>, ApiError> {
    let schema = object(value, path)?;
    let schema = schema.ok_or_else(|| ApiError::invalid(format!("{path}: field required.")))?;
    match serde_json::to_vec(&schema).map_or(usize::MAX, |text| text.len()) <= SCHEMA_BYTES_MAX {
        true => Ok(schema),
        false => Err(ApiError::invalid(format!("{path}: must have at most {SCHEMA_BYTES_MAX} bytes."))),
    }
}
