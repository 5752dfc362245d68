//! Spans as OTLP has them.
//! It must never add what the frontend did not say, but for who this server is.

use bytes::Bytes;
use gaoler_exporter_wire::{Side, Span, Value, Word};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::{Event, Link, SpanKind};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span as OtlpSpan, Status};
use prost::Message as _;

/// `flags`: sampled, and whether it is known that the parent is somebody else's.
const SAMPLED: u32 = 0x001;
const REMOTE_KNOWN: u32 = 0x100;
const REMOTE: u32 = 0x200;

/// Who sends.
pub struct Identity {
    resource: Resource,
    scope: InstrumentationScope,
}

impl Identity {
    /// This server, under an id of its own.
    pub fn draw() -> Identity {
        let id = format!("{:032x}", rand::random::<u128>());
        let attributes = vec![
            attribute("service.name".into(), "gaoler".into()),
            attribute("service.version".into(), env!("CARGO_PKG_VERSION").into()),
            attribute("service.instance.id".into(), id.into()),
        ];
        let scope = InstrumentationScope {
            name: "gaoler".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..InstrumentationScope::default()
        };
        Identity { resource: Resource { attributes, ..Resource::default() }, scope }
    }

    /// A request with these spans.
    pub fn request(&self, spans: Vec<Span>) -> Bytes {
        let scope_spans = vec![ScopeSpans {
            scope: Some(self.scope.clone()),
            spans: spans.into_iter().map(span).collect(),
            ..ScopeSpans::default()
        }];
        let resource = Some(self.resource.clone());
        let resource_spans = vec![ResourceSpans { resource, scope_spans, ..ResourceSpans::default() }];
        ExportTraceServiceRequest { resource_spans }.encode_to_vec().into()
    }
}

fn span(span: Span) -> OtlpSpan {
    let kind = match span.side {
        Side::Internal => SpanKind::Internal,
        Side::Server => SpanKind::Server,
        Side::Client => SpanKind::Client,
    };
    let event =
        |(name, at): (Word, u64)| Event { name: name.into_owned(), time_unix_nano: at, ..Event::default() };
    let link = |(trace, id): ([u8; 16], [u8; 8])| Link {
        trace_id: trace.to_vec(),
        span_id: id.to_vec(),
        ..Link::default()
    };
    let status = span.failed.then(|| Status { message: String::new(), code: StatusCode::Error.into() });
    OtlpSpan {
        trace_id: span.trace.to_vec(),
        span_id: span.id.to_vec(),
        trace_state: span.state,
        parent_span_id: span.parent.map(Vec::from).unwrap_or_default(),
        flags: SAMPLED | REMOTE_KNOWN | if span.remote { REMOTE } else { 0 },
        name: span.name.into_owned(),
        kind: kind.into(),
        start_time_unix_nano: span.start,
        end_time_unix_nano: span.end,
        attributes: span.attributes.into_iter().map(|(key, value)| attribute(key, value)).collect(),
        events: span.events.into_iter().map(event).collect(),
        links: span.links.into_iter().map(link).collect(),
        status,
        ..OtlpSpan::default()
    }
}

fn attribute(key: Word, value: Value) -> KeyValue {
    let value = match value {
        Value::Number(number) => any_value::Value::IntValue(number),
        Value::Text(text) => any_value::Value::StringValue(text.into_owned()),
    };
    KeyValue { key: key.into_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}
