//! Blocks of content that the CLI has no words of its own for: they become ones that it has.
//! It must never drop what a user said without saying so.

use serde_json::{Map, Value};

use super::{
    BLOCKS_MAX, Block, DocumentSource, Ignored, append_paragraph, required_string, take, text_block, wrong,
};
use crate::frontend::error::ApiError;

/// A result of a search, as text with its source: citations of it cannot be asked for.
pub(super) fn parse_search_result(
    mut block: Map<String, Value>,
    path: &str,
    ignored: &mut Ignored,
) -> Result<Block, ApiError> {
    let source = required_string(take(&mut block, "source"), &format!("{path}.source"))?;
    let title = required_string(take(&mut block, "title"), &format!("{path}.title"))?;
    if take(&mut block, "citations").is_some_and(|citations| citations["enabled"] != false) {
        ignored.name("messages.citations");
    }
    let text = texts(take(&mut block, "content"), &format!("{path}.content"))?;
    Ok(Block::Text(format!("Search result: {title}\nSource: {source}\n\n{text}")))
}

/// A document's content that is given as text, or as blocks of text.
pub(super) fn parse_content_source(
    mut source: Map<String, Value>,
    path: &str,
) -> Result<DocumentSource, ApiError> {
    let path = format!("{path}.content");
    match take(&mut source, "content") {
        Some(Value::String(text)) => Ok(DocumentSource::Text(text)),
        other => texts(other, &path).map(DocumentSource::Text),
    }
}

/// Blocks of text as one text.
fn texts(value: Option<Value>, path: &str) -> Result<String, ApiError> {
    let blocks = match value {
        None => return Err(ApiError::invalid(format!("{path}: field required."))),
        Some(Value::Array(blocks)) if blocks.len() > BLOCKS_MAX => {
            return Err(ApiError::invalid(format!("{path}: at most {BLOCKS_MAX} blocks are accepted.")));
        }
        Some(Value::Array(blocks)) => blocks,
        Some(other) => return Err(wrong(path, "an array of text blocks", &other)),
    };
    let mut out = String::new();
    for (i, block) in blocks.into_iter().enumerate() {
        append_paragraph(&mut out, &text_block(block, &format!("{path}[{i}]"))?);
    }
    Ok(out)
}
