//! What a request of either dialect may ask of its run beside the conversation: fields of gaoler's own.
//! It must never take a word for a number, nor let one through that is out of bounds.

use serde_json::{Map, Value};

use super::{string, take};
use crate::frontend::error::ApiError;

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
    Ok(Wishes { on_disconnect })
}
