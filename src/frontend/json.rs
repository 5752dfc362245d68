//! JSON that somebody else wrote, read within a bound on what it becomes: an object of one name takes a hundred times the
//! bytes that it is written with. It must never build a value before it has counted what that would take.

use std::collections::HashMap;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// Bytes that values which are held together may take beside their strings. A message with as many blocks as one may have
/// takes about as much; a body of 32 MB that is nothing but `{"":0}` would take 4 GB.
pub const STRUCTURE_BYTES_MAX: usize = 24 * 1024 * 1024;
/// Names of an object that is read in parts, at most.
pub const NAMES_MAX: usize = 256;

/// What a value takes beside its text, in bytes, never too little: a node of a `BTreeMap` has eleven places and is never
/// less than half full where there are more; a vector begins with four places and doubles; the least that the allocator
/// gives is 32.
const OBJECT_BYTES: usize = 640;
const NAME_BYTES: usize = 128;
const ARRAY_BYTES: usize = 128;
const PLACE_BYTES: usize = 64;
const STRING_BYTES: usize = 32;

/// Why a text was not read.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is no JSON from this byte on.
    Wrong(usize),
    /// It holds more than [`STRUCTURE_BYTES_MAX`].
    Large,
    /// It is no object.
    NoObject,
    /// It is no array.
    NoArray,
    /// It has more than [`NAMES_MAX`] names.
    Names,
}

/// What is left for values that are held together.
pub struct Room(usize);

impl Room {
    /// All of it.
    pub fn new() -> Room {
        Room(STRUCTURE_BYTES_MAX)
    }

    /// A text as a value.
    ///
    /// # Errors
    /// A text that is none, or that would take more than is left.
    pub fn value(&mut self, text: &str) -> Result<Value, Fault> {
        self.0 = self.0.checked_sub(structure(text.as_bytes(), self.0)).ok_or(Fault::Large)?;
        serde_json::from_str(text).map_err(|error| Fault::Wrong(place(text, &error)))
    }
}

/// What the values of a text take beside their strings; where that is more than `most`, any number above it.
fn structure(text: &[u8], most: usize) -> usize {
    let (mut bytes, mut at) = (0usize, 0);
    while let Some(&byte) = text.get(at) {
        at += 1;
        bytes += match byte {
            b'{' => OBJECT_BYTES,
            b'[' => ARRAY_BYTES,
            b':' => NAME_BYTES,
            b',' => PLACE_BYTES,
            b'"' => {
                while let Some(&byte) = text.get(at) {
                    at += if byte == b'\\' { 2 } else { 1 };
                    if byte == b'"' {
                        break;
                    }
                }
                STRING_BYTES
            }
            _ => continue,
        };
        if bytes > most {
            break;
        }
    }
    bytes
}

/// Where in a text an error is.
fn place(text: &str, error: &serde_json::Error) -> usize {
    let before = text.split_inclusive('\n').take(error.line().saturating_sub(1));
    before.map(str::len).sum::<usize>() + error.column()
}

/// An object's values by name, each as it is written. Of a name that is there twice the last one holds.
///
/// # Errors
/// A text that is no object, or one with too many names.
pub fn object(text: &str) -> Result<HashMap<String, &RawValue>, Fault> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let read = Parts.deserialize(&mut reader);
    let read = read.and_then(|read| reader.end().map(|()| read));
    match read {
        Ok(parts) if parts.len() > NAMES_MAX => Err(Fault::Names),
        Ok(parts) => Ok(parts),
        Err(error) if error.is_data() && !text.trim_start().starts_with('{') => Err(Fault::NoObject),
        Err(error) => Err(Fault::Wrong(place(text, &error))),
    }
}

/// Removes a value; null counts as absent.
pub fn take<'a>(parts: &mut HashMap<String, &'a RawValue>, name: &str) -> Option<&'a RawValue> {
    parts.remove(name).filter(|value| value.get() != "null")
}

/// An array's values, each as it is written: so many, and one more where there are more.
///
/// # Errors
/// A text that is no array.
pub fn array(text: &str, most: usize) -> Result<Vec<&RawValue>, Fault> {
    match List(most).deserialize(&mut serde_json::Deserializer::from_str(text)) {
        Ok(list) => Ok(list),
        Err(error) if error.is_data() && !text.trim_start().starts_with('[') => Err(Fault::NoArray),
        Err(error) => Err(Fault::Wrong(place(text, &error))),
    }
}

struct Parts;

impl<'de> DeserializeSeed<'de> for Parts {
    type Value = HashMap<String, &'de RawValue>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Parts {
    type Value = HashMap<String, &'de RawValue>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut parts = HashMap::new();
        // What is over the bound is read and dropped, so that a text that is no JSON is told as that.
        while parts.len() <= NAMES_MAX {
            let Some(name) = map.next_key::<String>()? else { return Ok(parts) };
            parts.insert(name, map.next_value::<&RawValue>()?);
        }
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(parts)
    }
}

struct List(usize);

impl<'de> DeserializeSeed<'de> for List {
    type Value = Vec<&'de RawValue>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Self::Value, S::Error> {
        let mut list = Vec::new();
        while list.len() <= self.0 {
            let Some(value) = seq.next_element::<&RawValue>()? else { return Ok(list) };
            list.push(value);
        }
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r01_what_a_text_becomes_is_counted_before_it_is_built() {
        let small = |text: &str| Room::new().value(text).unwrap_or_else(|fault| panic!("{text}: {fault:?}"));
        assert_eq!(small(r#"{"a":["{[,:\"\\",1]}"#)["a"][1], 1);
        let units =
            ["{\"\":0},", "[],", "0,", "\"a\",", "{},", "[[[[[[0]]]]]],", "null,", "{\"a\":{\"a\":{}}},"];
        for unit in units {
            let text = format!("[{}0]", unit.repeat(8 * 1024 * 1024 / unit.len()));
            assert_eq!(Room::new().value(&text), Err(Fault::Large), "{unit}");
        }
        let text = format!("[{}0]", "[],".repeat(80_000));
        let mut room = Room::new();
        assert!(room.value(&text).is_ok());
        assert_eq!(room.value(&text), Err(Fault::Large), "what is held together is counted together");
        let string = format!("\"{}\"", "a,{[:".repeat(1024 * 1024));
        assert!(Room::new().value(&string).is_ok(), "a string is itself");
        assert_eq!(
            Room::new().value(&"[".repeat(1_000)),
            Err(Fault::Wrong(128)),
            "no deeper than the reader goes"
        );
        assert_eq!(Room::new().value("\"\\"), Err(Fault::Wrong(2)));
    }

    #[test]
    fn an_object_and_an_array_are_read_in_parts() {
        let parts = object(" {\"a\": [1, 2],\n\"b\":{}, \"a\":3}").expect("an object");
        assert_eq!((parts.len(), parts["a"].get(), parts["b"].get()), (2, "3", "{}"));
        let names = |count| (0..count).map(|n| format!("\"{n}\":0")).collect::<Vec<_>>().join(",");
        assert_eq!(object(&format!("{{{}}}", names(NAMES_MAX))).map(|it| it.len()), Ok(NAMES_MAX));
        assert_eq!(object(&format!("{{{}}}", names(NAMES_MAX + 9))).err(), Some(Fault::Names));
        assert_eq!(
            object(&format!("{{{},", names(NAMES_MAX + 9))).err().map(|it| it == Fault::Names),
            Some(false)
        );
        assert_eq!(object("[]").err(), Some(Fault::NoObject));
        assert_eq!(object("{\"a\":1} x").err(), Some(Fault::Wrong(9)));
        assert_eq!(object("{\n\"a\":!}").err(), Some(Fault::Wrong(7)));
        assert_eq!(array("[1, [2], 3]", 2).map(|list| list.len()), Ok(3));
        assert_eq!(array("[1, [2], 3, 4, 5]", 2).map(|list| list.len()), Ok(3), "one more, and no further");
        assert_eq!(array("{}", 2).err(), Some(Fault::NoArray));
    }
}
