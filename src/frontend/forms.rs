//! Forms of what a cage says: rows that are counted as they are read, and blocks that are handed on as they are.
//! It must never make values of what it does not know: a line of a few megabytes would become many times as much.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Arrays and objects within each other that a client is handed, at most: what most parsers take.
const DEPTH_MAX: usize = 120;

/// At most so many of something: more are no answer of `gaoler-files`.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Rows<T, const MOST: usize>(pub Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Rows<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Counted<T, const MOST: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Counted<T, MOST> {
            type Value = Rows<T, MOST>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MOST} rows")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut rows = Vec::new();
                while let Some(row) = seq.next_element()? {
                    if rows.len() >= MOST {
                        return Err(A::Error::invalid_length(MOST + 1, &self));
                    }
                    rows.push(row);
                }
                Ok(Rows(rows))
            }
        }
        deserializer.deserialize_seq(Counted(PhantomData))
    }
}

/// A message's blocks as they came: an array of objects, not deeper than parsers go.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Blocks(Box<RawValue>);

impl<'de> Deserialize<'de> for Blocks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        serde_json::from_str::<Objects>(text.get()).map_err(D::Error::custom)?;
        match depth(text.get()) <= DEPTH_MAX {
            true => Ok(Blocks(text)),
            false => Err(D::Error::custom("blocks that are too deep")),
        }
    }
}

/// An array of objects, and nothing of it is kept.
struct Objects;

impl<'de> Deserialize<'de> for Objects {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Array;
        impl<'de> Visitor<'de> for Array {
            type Value = Objects;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of objects")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Objects, A::Error> {
                while seq.next_element::<Object>()?.is_some() {}
                Ok(Objects)
            }
        }
        deserializer.deserialize_seq(Array)
    }
}

struct Object;

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Object)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// How deep arrays and objects lie in a text that is JSON.
fn depth(json: &str) -> usize {
    let (mut now, mut most, mut within, mut escaped) = (0usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if within => escaped = true,
            b'"' => within = !within,
            _ if within => {}
            b'[' | b'{' => {
                now += 1;
                most = most.max(now);
            }
            b']' | b'}' => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_rows_than_there_may_be_are_no_answer() {
        let read = serde_json::from_str::<Rows<u8, 3>>;
        assert_eq!(read("[1,2,3]").expect("three").0, [1, 2, 3]);
        assert!(read("[1,2,3,4]").is_err() && read("7").is_err() && read("[\"x\"]").is_err());
    }

    #[test]
    fn blocks_are_handed_on_as_they_are_and_nothing_deep_or_else_is() {
        let read = |text: &str| serde_json::from_str::<Blocks>(text);
        let text = r#"[{"type":"text","text":"a\"]}[{"},{"b":[1,{"c":[]}]}]"#;
        assert_eq!(serde_json::to_string(&read(text).expect("blocks")).expect("JSON"), text);
        for bad in ["7", "{}", "[7]", "[[]]", "[{}", "[{},\"x\"]"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        let deep = |n: usize| format!("[{{\"a\":{}{}}}]", "[".repeat(n), "]".repeat(n));
        assert!(read(&deep(DEPTH_MAX - 2)).is_ok() && read(&deep(DEPTH_MAX - 1)).is_err());
        assert!(read(&deep(1_000_000)).is_err());
    }
}
