//! The collector: one address, one path, a client that speaks to nobody else.
//! It must never follow a redirect, show a header, nor read more of an answer than says what became of the spans.

use std::io::{Error, ErrorKind, Result};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use gaoler_exporter_wire::Settings;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message as _;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tower_service::Service;

/// How long one request may take, its connection included.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How long a connection is kept for the next batch.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// Bytes of an answer that are read.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Of an error, what is logged: a certificate's names are the collector's own choice.
const CAUSE_CHARS_MAX: usize = 200;

/// Where the collector is.
pub struct Target {
    /// Its name or address, without a port.
    pub host: String,
    /// Its port.
    pub port: u16,
    secure: bool,
    uri: Uri,
}

impl Target {
    /// What the settings name.
    ///
    /// # Errors
    /// An address that the command line would have refused.
    pub fn of(settings: &Settings) -> Result<Target> {
        let wrong =
            || Error::new(ErrorKind::InvalidInput, "telemetry.otlp_endpoint is no http:// or https:// URL");
        let uri: Uri = settings.url.parse().map_err(|_| wrong())?;
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(wrong()),
        };
        let host = uri.host().ok_or_else(wrong)?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Ok(Target { host, port, secure, uri })
    }

    /// Whether it has a name, which may lead elsewhere one day.
    pub fn is_named(&self) -> bool {
        self.host.parse::<IpAddr>().is_err() && self.host != "localhost"
    }
}

/// Answers with the addresses that were found before this process confined itself.
#[derive(Clone)]
struct Found(Arc<[SocketAddr]>);

impl Service<Name> for Found {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = Error;
    type Future = std::future::Ready<Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Name) -> Self::Future {
        let all: Vec<SocketAddr> = self.0.iter().copied().collect();
        std::future::ready(Ok(all.into_iter()))
    }
}

/// What the collector says of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// Taken, but for so many spans.
    Taken(u64),
    /// Not now; no sooner than this, where it says when.
    Later(Option<Duration>),
    /// Nothing, for this reason: it is not there, is not believed, or is too slow.
    Away(String),
    /// Never: with this status.
    Never(u16),
}

/// The client of the collector.
pub struct Collector {
    client: Client<HttpsConnector<HttpConnector<Found>>, Full<Bytes>>,
    uri: Uri,
    headers: HeaderMap,
}

impl Collector {
    /// A client for this target at these addresses.
    ///
    /// # Errors
    /// Certificates or headers that are none.
    pub fn new(settings: &Settings, target: &Target, addresses: Vec<SocketAddr>) -> Result<Collector> {
        let mut http = HttpConnector::new_with_resolver(Found(addresses.into()));
        http.enforce_http(false);
        http.set_connect_timeout(Some(REQUEST_TIME));
        let builder = HttpsConnectorBuilder::new().with_tls_config(tls(&settings.authorities)?);
        let builder = if target.secure { builder.https_only() } else { builder.https_or_http() };
        let connector = builder.enable_http1().wrap_connector(http);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIME)
            .pool_max_idle_per_host(1)
            .build(connector);
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("gaoler/", env!("CARGO_PKG_VERSION"))));
        for (at, (name, value)) in settings.headers.iter().enumerate() {
            let wrong = |_| {
                Error::new(ErrorKind::InvalidInput, format!("header {at} of telemetry.otlp_headers is none"))
            };
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong(()))?;
            let mut value = HeaderValue::from_str(value).map_err(|_| wrong(()))?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(Collector { client, uri: target.uri.clone(), headers })
    }

    /// Sends one batch, once.
    pub async fn send(&self, body: Bytes) -> Said {
        match tokio::time::timeout(REQUEST_TIME, self.exchange(body)).await {
            Ok(Ok(said)) => said,
            Ok(Err(error)) => Said::Away(cause(&error)),
            Err(_) => Said::Away("the collector does not answer in time".into()),
        }
    }

    async fn exchange(&self, body: Bytes) -> std::result::Result<Said, hyper_util::client::legacy::Error> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        let response = self.client.request(request).await?;
        let status = response.status().as_u16();
        let after =
            response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        Ok(match status {
            200..=299 => {
                let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
                Said::Taken(body.map_or(0, |body| rejected(&body.to_bytes())))
            }
            429 | 502..=504 => Said::Later(after.map(Duration::from_secs)),
            status => Said::Never(status),
        })
    }
}

/// What is at the bottom of an error: `Connection refused`, or what is wrong with a certificate. No header is in it.
fn cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(below) = last.source() {
        last = below;
    }
    last.to_string().chars().take(CAUSE_CHARS_MAX).collect()
}

/// How many spans of a batch were not taken. A collector that answers in another form has taken all.
fn rejected(body: &[u8]) -> u64 {
    let answer = ExportTraceServiceResponse::decode(body).unwrap_or_default();
    let rejected = answer.partial_success.map_or(0, |partial| partial.rejected_spans);
    u64::try_from(rejected).unwrap_or(0)
}

/// TLS with the built-in roots, or those of the operator in their place.
fn tls(authorities: &str) -> Result<ClientConfig> {
    let invalid = |what: String| Error::new(ErrorKind::InvalidInput, format!("telemetry.otlp_ca: {what}"));
    let mut roots = RootCertStore::empty();
    if authorities.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    for certificate in CertificateDer::pem_slice_iter(authorities.as_bytes()) {
        let certificate = certificate.map_err(|error| invalid(error.to_string()))?;
        roots.add(certificate).map_err(|error| invalid(error.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(versions.map_err(Error::other)?.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTracePartialSuccess;

    fn settings(url: &str) -> Settings {
        Settings { url: url.into(), headers: Vec::new(), authorities: String::new() }
    }

    #[test]
    fn a_target_is_a_whole_address() {
        let of = |url: &str| Target::of(&settings(url)).map(|it| (it.host, it.port, it.secure)).ok();
        assert_eq!(of("http://127.0.0.1:4318/v1/traces"), Some(("127.0.0.1".into(), 4318, false)));
        assert_eq!(of("https://collector.example/v1/traces"), Some(("collector.example".into(), 443, true)));
        assert_eq!(of("http://[::1]:9/v1/traces"), Some(("::1".into(), 9, false)));
        assert_eq!(of("ftp://collector/"), None);
        assert_eq!(of("/v1/traces"), None);
    }

    #[test]
    fn what_the_collector_did_not_take_is_counted() {
        let partial = ExportTracePartialSuccess { rejected_spans: 3, error_message: "full".into() };
        let answer = ExportTraceServiceResponse { partial_success: Some(partial) };
        assert_eq!(rejected(&answer.encode_to_vec()), 3);
        assert_eq!(rejected(b""), 0);
        assert_eq!(rejected(b"{\"not\":\"protobuf\"}"), 0);
    }

    #[test]
    fn what_is_no_header_is_refused_by_its_place_alone() {
        let mut settings = settings("http://127.0.0.1:4318/v1/traces");
        settings.headers = vec![("fine".into(), "yes".into()), ("bad".into(), "line\nsecret".into())];
        let target = Target::of(&settings).expect("a target");
        let error = Collector::new(&settings, &target, Vec::new()).err().expect("refused").to_string();
        assert_eq!(error, "header 1 of telemetry.otlp_headers is none");
    }
}
