//! A line of a transcript, read for who speaks and in what kind of blocks, and for nothing that is said.
//! It must never keep what it reads: a line may be 40 MiB, and its values would take many times that.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Such a line.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Spoken<'a> {
    #[serde(borrow)]
    r#type: Cow<'a, str>,
    /// When.
    #[serde(borrow)]
    pub timestamp: Option<Cow<'a, str>>,
    is_sidechain: bool,
    is_meta: bool,
    #[serde(borrow)]
    message: Option<Message<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
    content: Content,
}

/// What a message is made of.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Nothing that has a form.
    #[default]
    None,
    /// Results of tools alone.
    Results,
    /// Words, or anything else with them.
    Words,
}

impl Spoken<'_> {
    fn content(&self) -> Content {
        let spoken = matches!(&*self.r#type, "user" | "assistant") && !self.is_sidechain && !self.is_meta;
        let message = self.message.as_ref().filter(|message| spoken && message.role == self.r#type);
        message.map_or(Content::None, |message| message.content)
    }

    /// Whether it is part of the conversation.
    pub fn by_somebody(&self) -> bool {
        self.content() != Content::None
    }

    /// Whether a person said it: a user's line that is more than results of tools.
    pub fn by_a_person(&self) -> bool {
        self.r#type == "user" && self.content() == Content::Words
    }
}

/// One visitor for all that a content and a block may be: what it is not made for is no block.
macro_rules! passes {
    ($of:ty, $otherwise:expr) => {
        fn visit_bool<E>(self, _: bool) -> Result<$of, E> {
            Ok($otherwise)
        }
        fn visit_i64<E>(self, _: i64) -> Result<$of, E> {
            Ok($otherwise)
        }
        fn visit_u64<E>(self, _: u64) -> Result<$of, E> {
            Ok($otherwise)
        }
        fn visit_f64<E>(self, _: f64) -> Result<$of, E> {
            Ok($otherwise)
        }
        fn visit_unit<E>(self) -> Result<$of, E> {
            Ok($otherwise)
        }
    };
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        struct Whole;
        impl<'de> Visitor<'de> for Whole {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a message's content")
            }

            passes!(Content, Content::None);

            fn visit_str<E>(self, _: &str) -> Result<Content, E> {
                Ok(Content::Words)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Content::None)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut blocks: A) -> Result<Content, A::Error> {
                let mut content = Content::None;
                while let Some(Block(block)) = blocks.next_element()? {
                    content = match (content, block) {
                        (known, Content::None) => known,
                        (Content::Words, _) | (_, Content::Words) => Content::Words,
                        _ => Content::Results,
                    };
                }
                Ok(content)
            }
        }
        deserializer.deserialize_any(Whole)
    }
}

/// What one block is.
struct Block(Content);

impl<'de> Deserialize<'de> for Block {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Block, D::Error> {
        struct One;
        impl<'de> Visitor<'de> for One {
            type Value = Block;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a block")
            }

            passes!(Block, Block(Content::None));

            fn visit_str<E>(self, _: &str) -> Result<Block, E> {
                Ok(Block(Content::None))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Block, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Block(Content::None))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Block, A::Error> {
                let mut kind = Content::None;
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    if key == "type" {
                        kind = map.next_value::<Kind>()?.0;
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(Block(kind))
            }
        }
        deserializer.deserialize_any(One)
    }
}

/// What a block says that it is.
struct Kind(Content);

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Kind, D::Error> {
        struct Word;
        impl<'de> Visitor<'de> for Word {
            type Value = Kind;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a kind of block")
            }

            passes!(Kind, Kind(Content::None));

            fn visit_str<E>(self, word: &str) -> Result<Kind, E> {
                Ok(Kind(if word == "tool_result" { Content::Results } else { Content::Words }))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Kind, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Kind(Content::None))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Kind, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Kind(Content::None))
            }
        }
        deserializer.deserialize_any(Word)
    }
}
