//! The client side: TLS that is ready before the confinement, and a connection pool of one upstream.
//! It must never follow a redirect, nor speak to anybody but the upstream that the operator named.

use std::io::{Error, ErrorKind, Result};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{HeaderMap, RETRY_AFTER};
use hyper::{Method, Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tower_service::Service;

use crate::arguments::Upstream;
use crate::credential::Credential;
use crate::head;
use crate::resolve::{NameServers, Resolve};

/// Name, TCP and TLS together.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long the upstream may think about a credential; the supervisor waits a little longer.
const VOUCH_TIME: Duration = Duration::from_secs(20);
/// How long a connection is kept for the next request: tools run in between.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// Idle connections that are kept.
const IDLE_MAX: usize = 4;

/// The client of one run.
pub type HttpClient = Client<Bounded, Full<Bytes>>;

type Connector = HttpsConnector<HttpConnector<Resolve>>;
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A connector that gives up after [`CONNECT_TIME`], whichever step takes so long.
#[derive(Clone)]
pub struct Bounded(Connector);

impl Service<Uri> for Bounded {
    type Response = <Connector as Service<Uri>>::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = std::result::Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<std::result::Result<(), BoxError>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        Box::pin(async move { tokio::time::timeout(CONNECT_TIME, connecting).await? })
    }
}

/// TLS with these roots: the built-in ones, or those of a file in their place.
///
/// # Errors
/// Where the file cannot be read or holds no certificate.
pub fn tls(ca_file: Option<&Path>) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(path) => {
            let invalid =
                |error: &dyn std::fmt::Display| Error::new(ErrorKind::InvalidData, error.to_string());
            let list = CertificateDer::pem_file_iter(path).map_err(|error| invalid(&error))?;
            for certificate in list {
                let certificate = certificate.map_err(|error| invalid(&error))?;
                roots.add(certificate).map_err(|error| invalid(&error))?;
            }
            if roots.is_empty() {
                return Err(invalid(&"no certificate in the CA file"));
            }
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(versions.map_err(Error::other)?.with_root_certificates(roots).with_no_client_auth())
}

/// A client for this upstream.
pub fn client(tls: ClientConfig, upstream: &Upstream, servers: NameServers) -> HttpClient {
    let host = upstream.authority.rsplit_once(':').map_or(upstream.authority.as_str(), |(host, port)| {
        match port.bytes().all(|byte| byte.is_ascii_digit()) {
            true => host,
            false => &upstream.authority,
        }
    });
    let mut http = HttpConnector::new_with_resolver(Resolve::new(host, servers));
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_keepalive(Some(IDLE_TIME));
    let builder = HttpsConnectorBuilder::new().with_tls_config(tls);
    let builder = if upstream.secure { builder.https_only() } else { builder.https_or_http() };
    let connector = Bounded(builder.enable_http1().wrap_connector(http));
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIME)
        .pool_max_idle_per_host(IDLE_MAX)
        .build(connector)
}

/// What the upstream says of a credential: the status that it answers with, 0 where it does not answer; and for how many
/// seconds it asks to be left alone, 0 where it does not say.
pub async fn vouch(client: &HttpClient, upstream: &Upstream, credential: &Credential) -> (u16, u8) {
    let mut request = Request::new(Full::default());
    *request.method_mut() = Method::GET;
    let Ok(url) = upstream.url("/v1/models?limit=1").parse() else { return (0, 0) };
    *request.uri_mut() = url;
    *request.headers_mut() = head::own(credential.scheme());
    credential.insert(request.headers_mut());
    match tokio::time::timeout(VOUCH_TIME, client.request(request)).await {
        Ok(Ok(response)) => (status(&response), retry_after(response.headers())),
        Ok(Err(_)) | Err(_) => (0, 0),
    }
}

/// Whether that status means that the upstream knows the credential. Whoever is limited need not be known: an upstream, or
/// what stands before it, may limit by address before it looks at the credential.
pub fn is_accepted(status: u16) -> bool {
    status == 200
}

/// The header's seconds, as many as the frame has room for. A date is not read: the API sends none.
fn retry_after(headers: &HeaderMap) -> u8 {
    let text = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()).unwrap_or_default().trim();
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().unwrap_or(u8::MAX) } else { 0 }
}

/// The status as a number.
pub fn status(response: &Response<Incoming>) -> u16 {
    response.status().as_u16()
}
