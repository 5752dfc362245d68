//! How the Claude Code CLI is spoken to and understood: lines in, lines out, and its transcript.
//! Nothing here does I/O, and nothing hands a client's JSON on: each value is written anew from its type.

pub mod client;
pub mod decode;
pub mod input;
pub mod transcript;

use serde::Serialize;

use super::job::{Block, DocumentSource, Input, Media};

/// A block as the Messages API and the CLI write it.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum WireBlock<'a> {
    Text {
        text: std::borrow::Cow<'a, str>,
    },
    Image {
        source: WireSource<'a>,
    },
    Document {
        source: WireSource<'a>,
        #[serde(skip_serializing_if = "Option::is_none")]
        title: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        context: Option<&'a str>,
    },
    ToolUse {
        id: &'a str,
        name: &'a str,
        input: &'a Input,
    },
    ToolResult {
        tool_use_id: &'a str,
        content: Vec<WireBlock<'a>>,
        is_error: bool,
    },
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum WireSource<'a> {
    Base64 { media_type: &'a str, data: &'a str },
    Text { media_type: &'a str, data: &'a str },
}

impl<'a> WireBlock<'a> {
    fn of(block: &'a Block) -> WireBlock<'a> {
        match block {
            Block::Text(text) => WireBlock::Text { text: text.as_str().into() },
            Block::Image(media) => WireBlock::Image { source: WireSource::base64(media) },
            Block::Document { source, title, context } => WireBlock::Document {
                source: match source {
                    DocumentSource::Base64(media) => WireSource::base64(media),
                    DocumentSource::Text(data) => WireSource::Text { media_type: "text/plain", data },
                },
                title: title.as_deref(),
                context: context.as_deref(),
            },
            Block::ToolUse { id, name, input } => WireBlock::ToolUse { id, name, input },
            Block::ToolResult { id, content, is_error } => WireBlock::ToolResult {
                tool_use_id: id,
                content: content.iter().map(WireBlock::of).collect(),
                is_error: *is_error,
            },
        }
    }
}

impl<'a> WireSource<'a> {
    fn base64(media: &'a Media) -> WireSource<'a> {
        WireSource::Base64 { media_type: media.media_type, data: &media.data }
    }
}
