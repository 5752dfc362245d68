//! POST /v1/messages/count_tokens: an estimate, and told as one. Only an egress may ask the upstream, and an egress
//! serves a cage: a launch for a number would cost more than the request that it is asked for.
//! It must never start a run, nor be taken for a count.

use axum::Router;
use axum::extract::{Extension, State};
use axum::response::Response;
use axum::routing::post;
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode};
use serde_json::json;

use super::error::ApiError;
use super::http::{App, RequestId, failed, json};
use super::job::{self, Block, DocumentSource, Job};
use super::sent::Sent;
use super::way::BODY_BYTES_MAX;
use super::{identity, way};

/// Bytes of text to a token, in tenths: English has about 4, code and other languages less.
const TENTHS_OF_BYTES: u64 = 35;
/// What a message costs beside its content.
const MESSAGE_TOKENS: u64 = 4;
/// An image, whatever its size: the most that the API counts for one.
const IMAGE_TOKENS: u64 = 1600;
/// A page of a PDF, and the bytes in base64 that are taken for one.
const PAGE_TOKENS: u64 = 2000;
const PAGE_BYTES: u64 = 100_000;

const ESTIMATE: HeaderName = HeaderName::from_static("x-gaoler-estimate");

/// The route.
pub fn routes() -> Router<App> {
    Router::new().route("/v1/messages/count_tokens", post(count_tokens))
}

async fn count_tokens(
    State(frontend): State<App>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Sent,
) -> Response {
    match counted(&frontend, &headers, body).await {
        Ok(tokens) => {
            let mut response = json(StatusCode::OK, &json!({ "input_tokens": tokens }));
            response.headers_mut().insert(ESTIMATE, HeaderValue::from_static("true"));
            response
        }
        Err(error) => failed(&error, &error.body(&id.0)),
    }
}

async fn counted(frontend: &App, headers: &HeaderMap, body: Sent) -> Result<u64, ApiError> {
    way::refuse_encoding(headers)?;
    let shown = identity::somebody(frontend, headers).await?;
    let whose = body.whose(frontend, &shown)?;
    let (body, _held) = body.read(frontend, whose, BODY_BYTES_MAX).await?;
    let settings = frontend.settings();
    let read = move |body: &[u8]| job::parse(body, &settings.models.list).map(|job| estimate(&job));
    way::parsed(frontend, whose, body, read).await
}

/// The estimate: what the request says, without what the CLI adds to it.
fn estimate(job: &Job) -> u64 {
    let turns = job.earlier.len() as u64 + 1;
    let blocks = job.earlier.iter().flat_map(|turn| &turn.blocks).chain(&job.prompt).map(of_block);
    let schema = job.wishes.schema.as_ref().and_then(|schema| serde_json::to_string(schema).ok());
    turns * MESSAGE_TOKENS
        + blocks.sum::<u64>()
        + of_text(&job.system)
        + schema.map_or(0, |schema| of_text(&schema))
}

fn of_text(text: &str) -> u64 {
    (text.len() as u64 * 10).div_ceil(TENTHS_OF_BYTES)
}

fn of_block(block: &Block) -> u64 {
    match block {
        Block::Text(text) => of_text(text),
        Block::Image(_) => IMAGE_TOKENS,
        Block::Document { source, title, context } => {
            let about = [title, context].into_iter().flatten().map(|text| of_text(text)).sum::<u64>();
            about
                + match source {
                    DocumentSource::Text(text) => of_text(text),
                    DocumentSource::Base64(media) => {
                        (media.data.len() as u64).div_ceil(PAGE_BYTES) * PAGE_TOKENS
                    }
                }
        }
        Block::ToolUse { name, input, .. } => of_text(name) + of_text(input.text()),
        Block::ToolResult { content, .. } => content.iter().map(of_block).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_request_counts_and_more_of_it_counts_more() {
        let of = |body: &str| estimate(&job::parse(body.as_bytes(), &[]).expect("a request"));
        let least = of(r#"{"messages":[{"role":"user","content":"hi"}]}"#);
        assert_eq!(least, 5);
        let more = [
            r#"{"messages":[{"role":"user","content":"hi there, and more of it"}]}"#,
            r#"{"system":"be kind","messages":[{"role":"user","content":"hi"}]}"#,
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"hi"}]}"#,
            r#"{"messages":[{"role":"user","content":[{"type":"image","source":{"type":"base64","media_type":"image/png","data":"aGk="}}]}]}"#,
            r#"{"messages":[{"role":"user","content":[{"type":"document","source":{"type":"base64","media_type":"application/pdf","data":"aGk="}}]}]}"#,
            r#"{"messages":[{"role":"user","content":[{"type":"tool_result","tool_use_id":"t","content":"a long result"}]}]}"#,
            r#"{"output_config":{"format":{"type":"json_schema","schema":{"type":"object"}}},"messages":[{"role":"user","content":"hi"}]}"#,
        ];
        for body in more {
            assert!(of(body) > least, "{body}: {}", of(body));
        }
    }
}
