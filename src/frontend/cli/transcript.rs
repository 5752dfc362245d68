//! Earlier turns as the CLI's own transcript, so that a resumed CLI sends them to the model as real messages.
//! It must never hold the credential, nor a field that a client wrote by itself.

use serde::Serialize;
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::WireBlock;
use crate::frontend::job::{Role, Turn};

/// The CLI's working directory in every cage.
const CWD: &str = "/workspace";
/// The model named in earlier answers. The CLI does not send it; it must only not be empty.
const MODEL: &str = "claude-sonnet-5";

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    parent_uuid: Option<Uuid>,
    is_sidechain: bool,
    user_type: &'static str,
    cwd: &'static str,
    session_id: Uuid,
    version: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    message: Message<'a>,
    uuid: Uuid,
    timestamp: String,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Message<'a> {
    User {
        role: &'static str,
        content: Vec<WireBlock<'a>>,
    },
    Assistant {
        id: String,
        #[serde(rename = "type")]
        kind: &'static str,
        role: &'static str,
        model: &'static str,
        content: Vec<WireBlock<'a>>,
        stop_reason: &'static str,
        stop_sequence: Option<&'static str>,
        usage: Usage,
    },
}

#[derive(Serialize)]
struct Usage {
    input_tokens: u32,
    output_tokens: u32,
}

/// The transcript of these turns for this session, as a CLI of `version` would have written it until `now`.
/// Empty where there are none.
pub fn lines(turns: &[Turn], session: Uuid, version: &str, now: OffsetDateTime) -> Vec<u8> {
    let mut out = Vec::new();
    let mut parent = None;
    for (i, turn) in turns.iter().enumerate() {
        let uuid = numbered(session, i);
        let content = turn.blocks.iter().map(WireBlock::of).collect();
        let (kind, message) = match turn.role {
            Role::User => ("user", Message::User { role: "user", content }),
            Role::Assistant => (
                "assistant",
                Message::Assistant {
                    id: format!("msg_{}", uuid.simple()),
                    kind: "message",
                    role: "assistant",
                    model: MODEL,
                    content,
                    stop_reason: "end_turn",
                    stop_sequence: None,
                    usage: Usage { input_tokens: 1, output_tokens: 1 },
                },
            ),
        };
        let age = Duration::seconds(turns.len() as i64 - i as i64);
        let line = Line {
            parent_uuid: parent,
            is_sidechain: false,
            user_type: "external",
            cwd: CWD,
            session_id: session,
            version,
            kind,
            message,
            uuid,
            timestamp: now.saturating_sub(age).format(&Rfc3339).unwrap_or_default(),
        };
        out.extend(serde_json::to_vec(&line).unwrap_or_default());
        out.push(b'\n');
        parent = Some(uuid);
    }
    out
}

/// The id of the n-th line: unique in its session, which is all that the CLI needs.
fn numbered(session: Uuid, n: usize) -> Uuid {
    let (high, low) = session.as_u64_pair();
    uuid::Builder::from_u128((u128::from(high) << 64) | u128::from(low.wrapping_add(1 + n as u64)))
        .with_version(uuid::Version::Random)
        .with_variant(uuid::Variant::RFC4122)
        .into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::job::Block;

    #[test]
    fn two_turns_are_two_linked_lines() {
        let session = Uuid::parse_str("11111111-2222-4333-8444-555555555555").expect("a UUID");
        let turns = [
            Turn { role: Role::User, blocks: vec![Block::Text("/cost\nis text here".into())] },
            Turn { role: Role::Assistant, blocks: vec![Block::Text("A1".into())] },
        ];
        let bytes = lines(&turns, session, "2.1.330", OffsetDateTime::UNIX_EPOCH + Duration::days(1));
        let text = String::from_utf8(bytes).expect("UTF-8");
        let expected = concat!(
            r#"{"parentUuid":null,"isSidechain":false,"userType":"external","cwd":"/workspace","#,
            r#""sessionId":"11111111-2222-4333-8444-555555555555","version":"2.1.330","type":"user","#,
            r#""message":{"role":"user","content":[{"type":"text","text":"/cost\nis text here"}]},"#,
            r#""uuid":"11111111-2222-4333-8444-555555555556","timestamp":"1970-01-01T23:59:58Z"}"#,
            "\n",
            r#"{"parentUuid":"11111111-2222-4333-8444-555555555556","isSidechain":false,"userType":"external","#,
            r#""cwd":"/workspace","sessionId":"11111111-2222-4333-8444-555555555555","version":"2.1.330","#,
            r#""type":"assistant","message":{"id":"msg_11111111222243338444555555555557","type":"message","#,
            r#""role":"assistant","model":"claude-sonnet-5","content":[{"type":"text","text":"A1"}],"#,
            r#""stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}},"#,
            r#""uuid":"11111111-2222-4333-8444-555555555557","timestamp":"1970-01-01T23:59:59Z"}"#,
            "\n",
        );
        assert_eq!(text, expected);
        assert!(lines(&[], session, "2.1.330", OffsetDateTime::UNIX_EPOCH).is_empty());
    }
}
