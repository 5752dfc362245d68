//! A wish for limits as one line of text, `NAME=NUMBER,NAME=NUMBER`: of a flag or of a request's header.
//! It must never raise anything: a wish is clamped to the level's own limits by the supervisor.

use gaoler_protocol::Limits;
use serde_json::{Map, Value};

/// The wish that a text says. A limit that it does not name stays the level's own.
///
/// # Errors
/// An unknown name, one that comes twice, or what is no number from 1 up, as a sentence.
pub fn wish(text: &str) -> Result<Limits, String> {
    let mut limits = Limits::NONE;
    for one in text.split(',') {
        let (name, number) =
            one.split_once('=').ok_or("write NAME=NUMBER, several with commas between them")?;
        set(&mut limits, name.trim(), number.trim().parse().ok())?;
    }
    Ok(limits)
}

/// The wish of a JSON object.
///
/// # Errors
/// As for [`wish`].
pub fn of_object(fields: &Map<String, Value>) -> Result<Limits, String> {
    let mut limits = Limits::NONE;
    for (name, number) in fields {
        set(&mut limits, name, number.as_u64().and_then(|number| u32::try_from(number).ok()))?;
    }
    Ok(limits)
}

/// One wish for two: the lower of each limit.
pub fn both(mut one: Limits, other: &Limits) -> Limits {
    for (name, limit) in other.rows().filter(|(_, limit)| *limit != 0) {
        if let Some(mine) = one.named(name) {
            *mine = if *mine == 0 { limit } else { limit.min(*mine) };
        }
    }
    one
}

fn set(limits: &mut Limits, name: &str, number: Option<u32>) -> Result<(), String> {
    let unknown = || format!("the limits are {}", Limits::NAMES.join(", "));
    let limit = limits.named(name).ok_or_else(unknown)?;
    match number {
        Some(number) if number > 0 && *limit == 0 => {
            *limit = number;
            Ok(())
        }
        Some(number) if number > 0 => Err("a limit comes twice".into()),
        _ => Err("a limit is a whole number from 1 to 4294967295".into()),
    }
}

/// Limits as JSON.
pub fn json(limits: &Limits) -> Value {
    limits.rows().map(|(name, limit)| (name.to_owned(), limit.into())).collect::<Map<_, _>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_has_one_reading() {
        let good = Limits { memory_mib: 256, tasks: 32, ..Limits::NONE };
        assert_eq!(wish("memory_mib=256,tasks=32"), Ok(good));
        assert_eq!(wish(" tasks = 32 , memory_mib=256 "), Ok(good));
        for (bad, part) in [
            ("", "NAME=NUMBER"),
            ("tasks", "NAME=NUMBER"),
            ("tasks=1,", "NAME=NUMBER"),
            ("nice=1", "the limits are memory_mib, tasks"),
            ("tasks=0", "a whole number"),
            ("tasks=-1", "a whole number"),
            ("tasks=4294967296", "a whole number"),
            ("tasks=1,tasks=2", "comes twice"),
        ] {
            assert!(wish(bad).is_err_and(|why| why.contains(part)), "{bad}");
        }
        let object =
            |text: &str| of_object(serde_json::from_str::<Value>(text).unwrap().as_object().unwrap());
        assert_eq!(object(r#"{"memory_mib":256,"tasks":32}"#), Ok(good));
        assert_eq!(object("{}"), Ok(Limits::NONE));
        for bad in
            [r#"{"nice":1}"#, r#"{"tasks":0}"#, r#"{"tasks":"1"}"#, r#"{"tasks":1.5}"#, r#"{"tasks":null}"#]
        {
            assert!(object(bad).is_err(), "{bad}");
        }
        assert_eq!(json(&good)["tasks"], 32);
        assert_eq!(json(&good).as_object().map(Map::len), Some(Limits::NAMES.len()));
    }
}
