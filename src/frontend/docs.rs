//! What the server says of itself to a reader: the page at `/`, /openapi.json, and Swagger UI at /docs.
//! It must never load a byte from elsewhere, nor show a path, a host's name or a version beside its own.

mod admin;
mod completions;
mod errors;
mod guide;
mod mcp;
mod messages;
mod models;
pub mod openapi;
mod own;
mod pages;
mod runs;
mod sessions;
mod state;
mod workspaces;

use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use super::http::{App, RequestId, not_found};
use super::posture;

/// A file that a page is made of.
pub struct File {
    /// Below /docs.
    pub name: &'static str,
    /// `content-type`.
    pub kind: &'static str,
    bytes: &'static [u8],
}

const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const PAGE: &str = "text/html; charset=utf-8";

macro_rules! built {
    ($name:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $name))
    };
}

/// Every file. The first three are gaoler's own; build.rs takes the others out of a crate.
pub const FILES: &[File] = &[
    File { name: "page.css", kind: STYLE, bytes: include_bytes!("docs/page.css") },
    File { name: "swagger.css", kind: STYLE, bytes: include_bytes!("docs/swagger.css") },
    File { name: "swagger.js", kind: SCRIPT, bytes: include_bytes!("docs/swagger.js") },
    File { name: "swagger-ui.css", kind: STYLE, bytes: built!("swagger-ui.css") },
    File { name: "swagger-ui-bundle.js", kind: SCRIPT, bytes: built!("swagger-ui-bundle.js") },
    File { name: "swagger-ui-LICENSE.txt", kind: TEXT, bytes: built!("swagger-ui-LICENSE.txt") },
    File { name: "swagger-ui-NOTICE.txt", kind: TEXT, bytes: built!("swagger-ui-NOTICE.txt") },
];

/// The page at `/` needs one style and nothing else.
const PAGE_POLICY: &str =
    "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Swagger UI runs its script, asks this server alone, and has icons of its own inside its style.
const SWAGGER_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// What is not a page can do nothing, should a browser take it for one.
const FILE_POLICY: &str = "default-src 'none'; frame-ancestors 'none'";
/// How long a browser keeps a file. A newer gaoler's are seen that much later.
const FILE_CACHE: &str = "public, max-age=3600";

/// The routes of these pages.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/", get(root))
        .route("/openapi.json", get(document))
        .route("/docs", get(swagger))
        .route("/docs/{file}", get(file))
}

async fn root(State(frontend): State<App>, headers: HeaderMap) -> Response {
    let (listen, layers) = (frontend.listen.get(), frontend.layers.get());
    let settings = frontend.settings();
    let posture = guide::Posture {
        health: serde_json::json!(posture::health(
            listen,
            layers,
            *frontend.draining.borrow(),
            frontend.admission.load()
        )),
        security: posture::security(listen, layers, &settings.level),
        base: base(&headers, frontend.live().tls.is_some() || settings.server.trusted_proxy),
    };
    let guide = guide::guide(posture);
    let (kind, body) = match wants_page(&headers) {
        true => (PAGE, guide::page(&guide)),
        false => ("application/json", serde_json::to_string_pretty(&guide).unwrap_or_default() + "\n"),
    };
    let mut response = answer(kind, PAGE_POLICY, "no-cache", Body::from(body));
    // One address, two forms, and examples that name the address.
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept, host"));
    response
}

async fn document() -> Response {
    answer("application/json", FILE_POLICY, "no-cache", Body::from(openapi::text()))
}

async fn swagger() -> Response {
    answer(PAGE, SWAGGER_POLICY, "no-cache", Body::from(include_str!("docs/swagger.html")))
}

async fn file(Path(name): Path<String>, id: Extension<RequestId>) -> Response {
    match FILES.iter().find(|file| file.name == name) {
        Some(file) => answer(file.kind, FILE_POLICY, FILE_CACHE, Body::from(file.bytes)),
        None => not_found(id).await,
    }
}

fn answer(kind: &'static str, policy: &'static str, cache: &'static str, body: Body) -> Response {
    let mut response = body.into_response();
    let headers: [(HeaderName, &'static str); 6] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::CACHE_CONTROL, cache),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    response.headers_mut().extend(headers.map(|(name, value)| (name, HeaderValue::from_static(value))));
    response
}

/// Whether HTML is asked for by name, and rather than JSON. A client that takes anything is a program.
fn wants_page(headers: &HeaderMap) -> bool {
    let ranges = || {
        let values = headers.get_all(header::ACCEPT).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(','))
    };
    let quality = |wanted: &str| {
        let named = ranges().filter_map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().filter(|kind| kind.eq_ignore_ascii_case(wanted));
            let quality = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok());
            kind.map(|_| quality.unwrap_or(1.0))
        });
        named.fold(0.0, f32::max)
    };
    let html = quality("text/html");
    html > 0.0 && html >= quality("application/json")
}

/// The address that the client used, for examples that can be copied. What is not plainly one is left out.
fn base(headers: &HeaderMap, is_tls: bool) -> String {
    /// Bytes of a host's name and its port.
    const HOST_BYTES_MAX: usize = 261;
    let plain = |host: &&str| {
        let letter = |b: u8| b.is_ascii_alphanumeric() || b".-:[]".contains(&b);
        (1..=HOST_BYTES_MAX).contains(&host.len()) && host.bytes().all(letter)
    };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).filter(plain);
    let scheme = if is_tls { "https" } else { "http" };
    format!("{scheme}://{}", host.unwrap_or("127.0.0.1:8080"))
}

#[cfg(test)]
mod tests;
