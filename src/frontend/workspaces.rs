//! Requests about a tenant's workspaces and the files in them: each is a run in that tenant's cage.
//! It must never put a byte that comes out of a cage into a header, nor let a browser take it for a page.

use axum::Router;
use axum::extract::{Extension, RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode, Uri};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use gaoler_files::{DEPTH_MAX, Format, TREE_MAX, What};
use gaoler_policy::settings::Settings;
use gaoler_protocol::{Kind, WORKSPACE_DEFAULT};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::error::ApiError;
use super::files::{self, Asker, Told};
use super::forms::Rows;
use super::http::{App, RequestId, failure};
use super::repository::Repository;
use super::sent::Sent;
use super::sessions::{
    Deleted, Gone, Page, answer, asks, fields, form, gone_for, is_false, number, part, title, word,
};

/// The workspace that is always there.
const DEFAULT: &str = "default";
/// Entries of a tree where nobody says how many.
const TREE: u64 = 1000;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/workspaces", get(list).post(make))
        .route("/v1/workspaces/{id}", get(one).delete(remove))
        .route("/v1/workspaces/{id}/files/{*path}", get(read).put(write).delete(remove_file))
        .route("/v1/workspaces/{id}/tree", get(tree))
        .route("/v1/workspaces/{id}/archive", get(pack))
        .route("/v1/workspaces/{id}/upload", post(unpack))
        .route("/v1/workspaces/{id}/snapshots", get(snapshots).post(snap))
        .route("/v1/workspaces/{id}/snapshots/{snapshot}", delete(remove_snapshot))
        .route("/v1/workspaces/{id}/snapshots/{snapshot}/restore", post(restore))
        .route("/v1/workspaces/{id}/diff", get(diff))
}

#[derive(Debug, Serialize, Deserialize)]
struct Workspace {
    id: String,
    title: Option<String>,
    origin: Option<String>,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quota: Option<Quota>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Usage {
    bytes: u64,
    files: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Quota {
    bytes: u64,
    files: u64,
    used_bytes: u64,
    used_files: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    path: String,
    bytes: u64,
    created: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Removed {
    path: String,
    deleted: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    remains: bool,
}

impl Gone for Removed {
    fn remains(&self) -> bool {
        self.remains
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Tree {
    path: String,
    data: Rows<Entry, { TREE_MAX as usize }>,
    has_more: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    path: String,
    r#type: EntryType,
    bytes: u64,
    modified_at: String,
    executable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum EntryType {
    Folder,
    File,
    Link,
    Other,
}

#[derive(Debug, Serialize, Deserialize)]
struct Unpacked {
    path: String,
    entries: u64,
    bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Snapshot {
    id: String,
    title: Option<String>,
    created_at: String,
    bytes: u64,
    files: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Restored {
    id: String,
    snapshot_id: String,
    restored: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Diff {
    from: String,
    data: Rows<Change, { TREE_MAX as usize }>,
    has_more: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Change {
    path: String,
    status: Status,
    bytes_before: Option<u64>,
    bytes_after: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Added,
    Removed,
    Changed,
}

/// A workspace's id, as a name: `default` or a UUID.
fn name(id: &str) -> Option<String> {
    if id == DEFAULT {
        return Some(id.to_owned());
    }
    Uuid::try_parse(id).ok().filter(|found| id.len() == 36 && !found.is_nil()).map(|id| id.to_string())
}

/// A workspace's id out of an address.
fn workspace(id: &str) -> Result<String, ApiError> {
    name(id).ok_or_else(|| ApiError::new(404, "workspace_not_found", "There is no such workspace."))
}

/// A workspace's id out of a request for a run, as the supervisor is told it.
pub fn number_of(id: &str) -> Option<[u8; 16]> {
    match name(id)?.as_str() {
        DEFAULT => Some(WORKSPACE_DEFAULT),
        uuid => Uuid::try_parse(uuid).ok().map(Uuid::into_bytes),
    }
}

fn snapshot(id: &str) -> Result<String, ApiError> {
    let missing = || ApiError::new(404, "snapshot_not_found", "This workspace has no such snapshot.");
    name(id).filter(|id| id != DEFAULT).ok_or_else(missing)
}

/// A name for something new.
fn fresh() -> String {
    uuid::Builder::from_random_bytes(rand::random()).into_uuid().to_string()
}

/// The path of a file, with its percent signs: a file's name need not be text.
fn path_of(uri: &Uri) -> String {
    let rest = uri.path().splitn(6, '/').nth(5).unwrap_or_default();
    rest.to_owned()
}

async fn list(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
) -> Response {
    asks!(frontend, headers, request, StatusCode::OK, Kind::Files, Page<Workspace>, { What::Workspaces })
}

async fn make(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    body: Sent,
) -> Response {
    let result = async {
        let asker = files::asker(&frontend, &headers).await?;
        let mut fields = fields(&frontend, &asker, body).await?;
        let (kind, what, remotes) = made(&mut fields, &frontend.settings())?;
        let asker = Asker { remotes, ..asker };
        form::<Workspace>(files::ask(&frontend, &headers, asker, kind, what, None).await?)
    };
    answer(StatusCode::CREATED, result.await, &request)
}

/// What a body asks to be made, and what only egress is told of it.
fn made(
    fields: &mut Map<String, Value>,
    settings: &Settings,
) -> Result<(Kind, What, Zeroizing<Vec<u8>>), ApiError> {
    let (id, title) = (fresh(), title(fields)?);
    let git = match fields.remove("git") {
        None | Some(Value::Null) => {
            return Ok((Kind::Files, What::MakeWorkspace { id, title }, Zeroizing::default()));
        }
        Some(Value::Object(git)) => git,
        Some(_) => return Err(ApiError::invalid("git: must be an object.")),
    };
    let Repository { url, reference, depth, via, remotes } = Repository::parse(git, settings)?;
    Ok((Kind::Fetch, What::CloneWorkspace { id, title, url, reference, depth, via }, remotes))
}

async fn one(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    asks!(frontend, headers, request, StatusCode::OK, Kind::Files, Workspace, {
        What::Workspace { id: workspace(part(&uri, 3))? }
    })
}

async fn remove(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let result = async {
        let what = || Ok(What::DropWorkspace { id: workspace(part(&uri, 3))? });
        removed::<Deleted>(&frontend, &headers, what).await
    };
    answer(StatusCode::OK, result.await, &request)
}

/// A removal, which goes on after its answer where there is more than a client waits for.
async fn removed<T: Gone>(
    frontend: &App,
    headers: &HeaderMap,
    what: impl FnOnce() -> Result<What, ApiError>,
) -> Result<T, ApiError> {
    let asker = files::asker(frontend, headers).await?;
    let whose = asker.holder.whose();
    let told = files::ask(frontend, headers, asker, Kind::Files, what()?, None).await?;
    gone_for(frontend, whose, Kind::Files, told)
}

/// A tenant's bytes: a download, whatever they look like.
fn download(told: Told, kind: &'static str) -> Result<Response, ApiError> {
    let Told::Bytes(length, body) = told else {
        return Err(files::unreadable());
    };
    let mut response = body.into_response();
    let fields: [(HeaderName, &'static str); 5] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_DISPOSITION, "attachment"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'; sandbox"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    let headers = response.headers_mut();
    headers.extend(fields.map(|(name, value)| (name, HeaderValue::from_static(value))));
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(response)
}

/// One question whose answer is bytes.
async fn bytes(
    frontend: &App,
    headers: &HeaderMap,
    request: &RequestId,
    what: Result<What, ApiError>,
    kind: &'static str,
) -> Response {
    let result = async {
        let asker = files::asker(frontend, headers).await?;
        download(files::ask(frontend, headers, asker, Kind::Files, what?, None).await?, kind)
    };
    result.await.unwrap_or_else(|error| failure(&error, request))
}

async fn read(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let what = workspace(part(&uri, 3)).map(|id| What::ReadFile { id, path: path_of(&uri) });
    bytes(&frontend, &headers, &request, what, "application/octet-stream").await
}

async fn write(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    body: Sent,
) -> Response {
    let result = async {
        let asker = files::asker(&frontend, &headers).await?;
        let what = What::WriteFile { id: workspace(part(&uri, 3))?, path: path_of(&uri) };
        form::<Written>(files::ask(&frontend, &headers, asker, Kind::Files, what, Some(body)).await?)
    };
    answer(StatusCode::OK, result.await, &request)
}

async fn remove_file(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let result = async {
        let what = || Ok(What::DropFile { id: workspace(part(&uri, 3))?, path: path_of(&uri) });
        removed::<Removed>(&frontend, &headers, what).await
    };
    answer(StatusCode::OK, result.await, &request)
}

/// A path in a query, as one of an address: what is decoded there is encoded again.
fn path_in(query: &str) -> String {
    let path = word(query, "path").unwrap_or_default();
    form_urlencoded::byte_serialize(path.as_bytes()).collect::<String>().replace('+', "%20")
}

async fn tree(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    RawQuery(query): RawQuery,
) -> Response {
    let query = query.unwrap_or_default();
    asks!(frontend, headers, request, StatusCode::OK, Kind::Files, Tree, {
        What::Tree {
            id: workspace(part(&uri, 3))?,
            path: path_in(&query),
            depth: number(&query, "depth", DEPTH_MAX as u64, DEPTH_MAX as u64)? as u32,
            limit: number(&query, "limit", TREE_MAX.into(), TREE)? as u32,
        }
    })
}

async fn pack(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    RawQuery(query): RawQuery,
) -> Response {
    let (format, kind) = match word(&query.unwrap_or_default(), "format").as_deref() {
        None | Some("tar.gz") => (Ok(Format::TarGz), "application/gzip"),
        Some("zip") => (Ok(Format::Zip), "application/zip"),
        Some(_) => (Err(ApiError::invalid("format: must be tar.gz or zip.")), "application/gzip"),
    };
    let what = workspace(part(&uri, 3)).and_then(|id| Ok(What::Pack { id, format: format? }));
    bytes(&frontend, &headers, &request, what, kind).await
}

/// The boundary of a form's parts: letters that mean nothing else to anybody.
fn boundary_of(headers: &HeaderMap) -> Option<String> {
    let kind = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let found = kind.split(';').map(str::trim).find_map(|part| part.strip_prefix("boundary="))?;
    let text = found.trim_matches('"');
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"'()+_,-./:=?".contains(&b);
    ((1..=70).contains(&text.len()) && text.bytes().all(plain)).then(|| text.to_owned())
}

async fn unpack(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    RawQuery(query): RawQuery,
    body: Sent,
) -> Response {
    let result = async {
        let asker = files::asker(&frontend, &headers).await?;
        let query = query.unwrap_or_default();
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let mut boundary = String::new();
        let format = match (word(&query, "format").as_deref(), kind.as_str()) {
            (None, "multipart/form-data") => {
                let wrong = || {
                    ApiError::invalid(
                        "content-type: multipart/form-data needs a boundary of 1 to 70 characters.",
                    )
                };
                boundary = boundary_of(&headers).ok_or_else(wrong)?;
                Format::Form
            }
            (Some("tar.gz"), _) => Format::TarGz,
            (Some("zip"), _) => Format::Zip,
            (None, "application/gzip" | "application/x-gzip" | "application/x-tar+gzip") => Format::TarGz,
            (None, "application/zip" | "application/x-zip-compressed") => Format::Zip,
            _ => {
                let message = "content-type: must be application/gzip (a compressed tar archive), application/zip or \
                               multipart/form-data, or send ?format=tar.gz or ?format=zip.";
                return Err(ApiError::invalid(message));
            }
        };
        let what = What::Unpack { id: workspace(part(&uri, 3))?, path: path_in(&query), format, boundary };
        form::<Unpacked>(files::ask(&frontend, &headers, asker, Kind::Files, what, Some(body)).await?)
    };
    answer(StatusCode::OK, result.await, &request)
}

async fn snapshots(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    asks!(frontend, headers, request, StatusCode::OK, Kind::Files, Page<Snapshot>, {
        What::Snapshots { id: workspace(part(&uri, 3))? }
    })
}

async fn snap(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    body: Sent,
) -> Response {
    asks!(frontend, headers, request, StatusCode::CREATED, Kind::Files, Snapshot, asker => {
        let id = workspace(part(&uri, 3))?;
        What::MakeSnapshot { id, new: fresh(), title: title(&fields(&frontend, &asker, body).await?)? }
    })
}

async fn restore(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    asks!(frontend, headers, request, StatusCode::OK, Kind::Files, Restored, {
        What::Restore { id: workspace(part(&uri, 3))?, snapshot: snapshot(part(&uri, 5))? }
    })
}

async fn remove_snapshot(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let result = async {
        let what =
            || Ok(What::DropSnapshot { id: workspace(part(&uri, 3))?, snapshot: snapshot(part(&uri, 5))? });
        removed::<Deleted>(&frontend, &headers, what).await
    };
    answer(StatusCode::OK, result.await, &request)
}

async fn diff(
    State(frontend): State<App>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    uri: Uri,
    RawQuery(query): RawQuery,
) -> Response {
    let query = query.unwrap_or_default();
    let asked = || -> Result<(String, String), ApiError> {
        let from = word(&query, "from").ok_or_else(|| ApiError::invalid("from: must name a snapshot."))?;
        Ok((workspace(part(&uri, 3))?, snapshot(&from)?))
    };
    match word(&query, "format").as_deref() {
        Some("json") => asks!(frontend, headers, request, StatusCode::OK, Kind::Files, Diff, {
            let (id, from) = asked()?;
            What::Diff { id, from, unified: false }
        }),
        None | Some("unified") => {
            let what = asked().map(|(id, from)| What::Diff { id, from, unified: true });
            bytes(&frontend, &headers, &request, what, "text/x-diff").await
        }
        Some(_) => {
            let wrong: Result<(), ApiError> = files::asker(&frontend, &headers)
                .await
                .and_then(|_| Err(ApiError::invalid("format: must be unified or json.")));
            answer(StatusCode::OK, wrong, &request)
        }
    }
}
