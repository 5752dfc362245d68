//! Inspects a request's body without building it: memory stays bounded by the body itself.
//! It must never let a body through that another JSON parser could read differently.

use std::collections::HashSet;
use std::fmt;

use crate::policy::EgressPolicy;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Keys of one object at most; the largest tool schemas have a few hundred.
const KEYS_MAX: usize = 4096;
/// A `type` or a model's name that is longer than this is not of the API.
const WORD_BYTES_MAX: usize = 128;

/// Why a body is not forwarded.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not one JSON object, or one with a key twice.
    Shape,
    /// It asks for something that the level does not let out.
    Policy,
    /// It names a model that the level does not know.
    Model,
}

/// Inspects a body. Gives the model that it names, if it names one.
///
/// # Errors
/// Why it may not go on.
pub fn inspect(bytes: &[u8], policy: &EgressPolicy) -> Result<Option<String>, Fault> {
    let (mut fault, mut model) = (None, None);
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let node = Node { place: Place::Top, policy, fault: &mut fault, model: &mut model };
    let read = node.deserialize(&mut json).and_then(|()| json.end());
    match (read, fault) {
        (Err(_), _) => Err(Fault::Shape),
        (Ok(()), Some(fault)) => Err(fault),
        (Ok(()), None) => Ok(model),
    }
}

/// Where in a request's body a value lies, as far as a rule speaks of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The body.
    Top,
    /// `tools`.
    Tools,
    /// One of them.
    Tool,
    /// `messages`, and `content` wherever blocks may lie.
    Blocks,
    /// A message or a block, which both may hold `content`; a block may hold a `source` too.
    Block,
    /// `source`.
    Source,
    /// `model`.
    Model,
    /// The `type` of a tool.
    ToolType,
    /// The `type` of a source.
    SourceType,
    /// Nothing of these.
    Other,
}

impl Place {
    /// The place of a field of an object that lies here.
    fn field(self, key: &str) -> Place {
        match (self, key) {
            (Place::Top, "tools") => Place::Tools,
            (Place::Top, "model") => Place::Model,
            (Place::Top, "messages" | "system") => Place::Blocks,
            (Place::Tool, "type") => Place::ToolType,
            (Place::Block, "content") => Place::Blocks,
            (Place::Block, "source") => Place::Source,
            // Tools may also be changed in mid-conversation, by blocks.
            (Place::Block, "tools") => Place::Tools,
            (Place::Block, "tool") => Place::Tool,
            (Place::Source, "type") => Place::SourceType,
            (Place::Source, "content") => Place::Blocks,
            _ => Place::Other,
        }
    }

    /// The place of an element of an array that lies here.
    fn element(self) -> Place {
        match self {
            Place::Tools => Place::Tool,
            Place::Blocks => Place::Block,
            _ => Place::Other,
        }
    }
}

/// One value on the way down. serde_json bounds the depth at 128.
struct Node<'a> {
    place: Place,
    policy: &'a EgressPolicy,
    /// The first thing that may not go on.
    fault: &'a mut Option<Fault>,
    /// The model, once it was seen. A key comes once.
    model: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a body of the Messages API")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        self.word_only();
        let mut keys = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            let place = self.place.field(&key);
            if self.place == Place::Top && self.policy.denies_field(&key) {
                self.fault.get_or_insert(Fault::Policy);
            }
            if keys.len() >= KEYS_MAX || !keys.insert(key) {
                return Err(A::Error::custom("a key twice, or too many keys"));
            }
            map.next_value_seed(self.below(place))?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        self.word_only();
        self.object_only()?;
        let place = self.place.element();
        while list.next_element_seed(self.below(place))?.is_some() {}
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.object_only()?;
        let fits = text.len() <= WORD_BYTES_MAX;
        let fault = match self.place {
            Place::Model if !fits || !self.policy.allows_model(text) => Fault::Model,
            Place::ToolType if !fits || !self.policy.allows_tool(Some(text)) => Fault::Policy,
            Place::SourceType if !fits || self.policy.denies_source(text) => Fault::Policy,
            Place::Model => {
                *self.model = Some(text.to_owned());
                return Ok(());
            }
            _ => return Ok(()),
        };
        self.fault.get_or_insert(fault);
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.scalar()
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.scalar()
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.scalar()
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.scalar()
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        // `"type": null` says as much as no type at all.
        self.object_only()
    }
}

impl Node<'_> {
    /// A value within this one.
    fn below(&mut self, place: Place) -> Node<'_> {
        Node { place, policy: self.policy, fault: &mut *self.fault, model: &mut *self.model }
    }

    fn object_only<E: Error>(&self) -> Result<(), E> {
        match self.place {
            Place::Top => Err(E::custom("not an object")),
            _ => Ok(()),
        }
    }

    /// Where a rule speaks of a word, something else in its place is of no API that the rule knows.
    fn word_only(&mut self) {
        if matches!(self.place, Place::Model | Place::ToolType | Place::SourceType) {
            self.fault.get_or_insert(Fault::Policy);
        }
    }

    fn scalar<E: Error>(mut self) -> Result<(), E> {
        self.word_only();
        self.object_only()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::BALANCED;

    fn inspected(body: &[u8]) -> Result<(), Fault> {
        inspect(body, &BALANCED).map(drop)
    }

    fn check(body: &str, expected: Result<(), Fault>) {
        assert_eq!(inspected(body.as_bytes()), expected, "{body}");
    }

    #[test]
    fn only_one_object_without_double_keys_passes() {
        check("{}", Ok(()));
        check(r#"{"a":{"b":1},"c":[{"b":1},{"b":-1.5e3},null,true]}"#, Ok(()));
        for bad in [
            "",
            "[]",
            "1",
            "\"a\"",
            "null",
            "{} {}",
            "{\"a\":1,}",
            "{'a':1}",
            "{\"a\":NaN}",
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"\u0061":1}"#,
            r#"{"a":{"b":[{"c":1,"c":2}]}}"#,
            r#"{"a":"\ud800"}"#,
        ] {
            check(bad, Err(Fault::Shape));
        }
        assert_eq!(inspected(b"{\"a\":\"\xff\"}"), Err(Fault::Shape));
        check(&format!("{{\"a\":{}{}}}", "[".repeat(500), "]".repeat(500)), Err(Fault::Shape));
        let many: Vec<_> = (0..5000).map(|n| format!("\"{n}\":0")).collect();
        check(&format!("{{{}}}", many.join(",")), Err(Fault::Shape));
    }

    #[test]
    fn nothing_that_reaches_out_passes() {
        let tool = |kind: &str| format!(r#"{{"tools":[{{"name":"a"}},{{"type":{kind},"name":"b"}}]}}"#);
        check(&tool("\"custom\""), Ok(()));
        check(&tool("null"), Ok(()));
        for kind in ["\"web_search_20250305\"", "\"web_fetch_20250910\"", "\"code_execution_20250522\"", "7"]
        {
            check(&tool(kind), Err(Fault::Policy));
        }
        check(r#"{"mcp_servers":[]}"#, Err(Fault::Policy));
        check(r#"{"container":"c"}"#, Err(Fault::Policy));
        let block = |source: &str| format!(r#"{{"messages":[{{"role":"user","content":[{source}]}}]}}"#);
        let image = |kind: &str| format!(r#"{{"type":"image","source":{{"type":"{kind}","data":"x"}}}}"#);
        check(&block(&image("base64")), Ok(()));
        check(&block(&image("url")), Err(Fault::Policy));
        check(&block(&image("file")), Err(Fault::Policy));
        check(
            &block(&format!(r#"{{"type":"tool_result","content":[{}]}}"#, image("url"))),
            Err(Fault::Policy),
        );
        let nested =
            format!(r#"{{"type":"document","source":{{"type":"content","content":[{}]}}}}"#, image("url"));
        check(&block(&nested), Err(Fault::Policy));
        // What a tool is called with is data, whatever it looks like.
        let input = r#"{"type":"tool_use","input":{"source":{"type":"url"},"mcp_servers":[]}}"#;
        check(&block(input), Ok(()));
        check(r#"{"model":"claude-sonnet-5"}"#, Ok(()));
        assert_eq!(
            inspect(br#"{"a":{"model":"x"},"model":"claude-sonnet-5"}"#, &BALANCED),
            Ok(Some("claude-sonnet-5".into()))
        );
        assert_eq!(inspect(br#"{"messages":[{"model":"claude-x"}]}"#, &BALANCED), Ok(None));
        check(r#"{"model":"other"}"#, Err(Fault::Model));
        check(r#"{"model":["claude-sonnet-5"]}"#, Err(Fault::Policy));
    }
}
