//! What /openapi.json says of a tenant's workspaces and of the files in them.
//! It must never describe another form than `workspaces.rs` lets through.

use gaoler_files::{DEPTH_MAX, TITLE_CHARS_MAX, TREE_MAX};
use serde_json::{Value, json};

use super::openapi::{Group, answers, request_id, schema};
use super::sessions::{in_path, in_query, operation, page, remains, with_body};
use crate::frontend::repository::SECRET_BYTES_MAX;

/// The group.
pub fn group() -> Group {
    Group {
        name: "Workspaces",
        about: "Folders in which runs work. `default` is always there. Each of these requests is a run in the tenant's own \
            cage, so what an archive or a link tries there is nobody else's trouble.",
        paths: vec![
            ("/v1/workspaces", json!({"get": list(), "post": make()})),
            ("/v1/workspaces/{id}", json!({"get": one(), "delete": remove()})),
            (
                "/v1/workspaces/{id}/files/{path}",
                json!({"get": read(), "put": write(), "delete": remove_file()}),
            ),
            ("/v1/workspaces/{id}/tree", json!({"get": tree()})),
            ("/v1/workspaces/{id}/archive", json!({"get": pack()})),
            ("/v1/workspaces/{id}/upload", json!({"post": unpack()})),
            ("/v1/workspaces/{id}/snapshots", json!({"get": snapshots(), "post": snap()})),
            ("/v1/workspaces/{id}/snapshots/{snapshot}", json!({"delete": remove_snapshot()})),
            ("/v1/workspaces/{id}/snapshots/{snapshot}/restore", json!({"post": restore()})),
            ("/v1/workspaces/{id}/diff", json!({"get": diff()})),
        ],
        schemas: vec![
            ("WorkspaceList", page("Workspace")),
            ("Workspace", workspace_schema()),
            ("WorkspaceRequest", request_schema()),
            ("Written", written_schema()),
            ("FileDeleted", file_deleted_schema()),
            ("Tree", tree_schema()),
            ("TreeEntry", entry_schema()),
            ("Unpacked", unpacked_schema()),
            ("SnapshotList", page("Snapshot")),
            ("Snapshot", snapshot_schema()),
            ("Restored", restored_schema()),
            ("Diff", diff_schema()),
            ("DiffEntry", change_schema()),
        ],
    }
}

fn id() -> Value {
    in_path("id", "The workspace: `default`, or its UUID.")
}

fn snapshot() -> Value {
    in_path("snapshot", "The snapshot.")
}

fn file() -> Vec<Value> {
    vec![
        id(),
        in_path(
            "path",
            "Names with slashes between them. A name that is no text has percent signs for its bytes.",
        ),
    ]
}

/// Bytes of a tenant's.
fn bytes(about: &str, kinds: &[&str]) -> Value {
    let content = kinds
        .iter()
        .map(|kind| ((*kind).to_owned(), json!({"schema": {"type": "string", "format": "binary"}})));
    json!({"description": about, "headers": request_id(), "content": content.collect::<serde_json::Map<_, _>>()})
}

fn list() -> Value {
    operation("workspaces", "Your workspaces", "", ("200", answers("All of them.", "WorkspaceList")), vec![])
}

fn make() -> Value {
    let about = "Empty, or out of a git repository: `https://` alone, from a host that the level's proxy lets through. \
        What opens a private one is `git.token`: egress adds it to what is asked of that host, and no process of the cage \
        has it. Submodules are not fetched, and no hook is run.";
    let done = ("201", answers("The new workspace.", "Workspace"));
    with_body(operation("makeWorkspace", "Make a workspace", about, done, vec![]), false, "WorkspaceRequest")
}

fn one() -> Value {
    let about = "With what it takes, and what all of your workspaces take of your part of the disk.";
    operation(
        "workspace",
        "One workspace",
        about,
        ("200", answers("The workspace.", "Workspace")),
        vec![id()],
    )
}

fn remove() -> Value {
    let about = "With its snapshots. `default` is emptied. One in which a run is stays: 409.";
    operation(
        "dropWorkspace",
        "Delete a workspace",
        about,
        ("200", answers("It is gone.", "Deleted")),
        vec![id()],
    )
}

fn read() -> Value {
    let done = bytes(
        "The file's bytes. A browser is told to keep them, not to show them.",
        &["application/octet-stream"],
    );
    operation("readFile", "Read a file", "Links are not followed.", ("200", done), file())
}

fn write() -> Value {
    let about = "Whole, or not at all; folders on the way are made. A link in its place is replaced, and none on the way \
        is followed. At most 1 GiB.";
    let done = ("200", answers("It is written.", "Written"));
    let mut operation = operation("writeFile", "Write a file", about, done, file());
    operation["requestBody"] = json!({
        "required": true,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    });
    operation
}

fn remove_file() -> Value {
    let about = "A file, a link, or a folder with all that is in it.";
    operation("dropFile", "Delete a file", about, ("200", answers("It is gone.", "FileDeleted")), file())
}

fn path_in_query(about: &str) -> Value {
    in_query("path", about, json!({"type": "string", "default": ""}))
}

fn tree() -> Value {
    let number = |most: u64, otherwise: u64| json!({"type": "integer", "minimum": 1, "maximum": most, "default": otherwise});
    let parameters = vec![
        id(),
        path_in_query("The folder."),
        in_query("depth", "Folders within each other.", number(DEPTH_MAX as u64, DEPTH_MAX as u64)),
        in_query("limit", "Entries.", number(TREE_MAX.into(), 1000)),
    ];
    let about = "Each folder before what is in it.";
    operation("tree", "What lies in a folder", about, ("200", answers("Its entries.", "Tree")), parameters)
}

fn format() -> Value {
    in_query("format", "The form of the archive.", json!({"type": "string", "enum": ["tar.gz", "zip"]}))
}

fn pack() -> Value {
    let done = bytes("The archive, while it is made.", &["application/gzip", "application/zip"]);
    let about = "Without `format` a compressed tar archive.";
    operation("pack", "Download a workspace", about, ("200", done), vec![id(), format()])
}

fn unpack() -> Value {
    let about = "A compressed tar archive, a zip archive, or the files of a form. All of it, or nothing. An entry that would lead out of the folder, by its name or through a link, a device \
        and anything else that is neither folder, file nor link make the archive unsafe: 400. Modes are 755 or 644. At most \
        1 GiB, 200000 entries, 250 times its own size, and your part of the disk.";
    let done = ("200", answers("It is unpacked.", "Unpacked"));
    let parameters = vec![id(), path_in_query("The folder to unpack into; it is made."), format()];
    let mut operation = operation("unpack", "Upload an archive", about, done, parameters);
    let binary = json!({"schema": {"type": "string", "format": "binary"}});
    let form =
        json!({"schema": {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}});
    operation["requestBody"] = json!({
        "required": true,
        "content": {"application/gzip": binary.clone(), "application/zip": binary, "multipart/form-data": form},
    });
    operation
}

fn snapshots() -> Value {
    let about = "The newest first.";
    let done = ("200", answers("All of them.", "SnapshotList"));
    operation("snapshots", "Snapshots of a workspace", about, done, vec![id()])
}

fn snap() -> Value {
    let about = "A whole copy, which counts as yours of the disk. Runs do not see it.";
    let done = ("201", answers("The snapshot.", "Snapshot"));
    with_body(
        operation("makeSnapshot", "Keep a workspace as it is", about, done, vec![id()]),
        false,
        "Titled",
    )
}

fn remove_snapshot() -> Value {
    let done = ("200", answers("It is gone.", "Deleted"));
    operation("dropSnapshot", "Delete a snapshot", "", done, vec![id(), snapshot()])
}

fn restore() -> Value {
    let about = "Everything that came since is gone. A workspace in which a run is stays as it is: 409.";
    let done = ("200", answers("It is as it was.", "Restored"));
    operation("restore", "Make a workspace what it was", about, done, vec![id(), snapshot()])
}

fn diff() -> Value {
    let mut done = answers("What has changed.", "Diff");
    done["content"]["text/x-diff"] = json!({"schema": {"type": "string", "format": "binary"}});
    let parameters = vec![
        id(),
        json!({"name": "from", "in": "query", "required": true, "description": "A snapshot.", "schema": {"type": "string"}}),
        in_query(
            "format",
            "Lines or a list.",
            json!({"type": "string", "enum": ["unified", "json"], "default": "unified"}),
        ),
    ];
    let about = "Folders named `.git` are left out. Files larger than 1 MiB, and those that are no text, differ or do not.";
    operation("diff", "What has changed since a snapshot", about, ("200", done), parameters)
}

fn object(required: &[&str], properties: Value) -> Value {
    json!({"type": "object", "required": required, "additionalProperties": false, "properties": properties})
}

fn count() -> Value {
    json!({"type": "integer", "minimum": 0})
}

fn time() -> Value {
    json!({"type": "string", "format": "date-time"})
}

fn workspace_schema() -> Value {
    let usage = object(&["bytes", "files"], json!({"bytes": count(), "files": count()}));
    let mut quota = object(
        &["bytes", "files", "used_bytes", "used_files"],
        json!({"bytes": count(), "files": count(), "used_bytes": count(), "used_files": count()}),
    );
    quota["description"] = "Your part of the disk, and what all of your workspaces, snapshots and sessions take of it together: \
        every file and folder of any kind, and what was deleted and is still being removed."
        .into();
    object(
        &["id", "title", "origin", "created_at"],
        json!({
            "id": {"type": "string"},
            "title": {"type": ["string", "null"]},
            "origin": {"description": "The repository that it was made of.", "type": ["string", "null"]},
            "created_at": time(),
            "usage": usage,
            "quota": quota,
        }),
    )
}

fn request_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "title": {"description": "One line.", "type": ["string", "null"], "maxLength": TITLE_CHARS_MAX},
            "git": {
                "type": ["object", "null"],
                "required": ["url"],
                "properties": {
                    "url": {"description": "`https://HOST/PATH`, without a login.", "type": "string", "maxLength": 2000},
                    "ref": {"description": "A branch, a tag, or a commit's whole id.", "type": ["string", "null"], "maxLength": 2000},
                    "depth": {"description": "Commits; 0 = all.", "type": ["integer", "null"], "minimum": 0, "maximum": 1_000_000},
                    "token": {
                        "description": "What opens a private repository, as a password beside `username`. It is kept nowhere, and for \
                            a host on port 443 alone.",
                        "type": ["string", "null"], "minLength": 1, "maxLength": SECRET_BYTES_MAX, "pattern": "^[!-~]+$", "writeOnly": true,
                    },
                    "username": {
                        "description": "Beside `token`; most hosts look at the token alone. `x-access-token` where it is left out.",
                        "type": ["string", "null"], "minLength": 1, "maxLength": SECRET_BYTES_MAX, "pattern": "^[!-9;-~]+$",
                    },
                },
            },
        },
    })
}

fn written_schema() -> Value {
    object(
        &["path", "bytes", "created"],
        json!({
            "path": {"type": "string"},
            "bytes": count(),
            "created": {"description": "Whether nothing was in its place.", "type": "boolean"},
        }),
    )
}

fn file_deleted_schema() -> Value {
    let fields = json!({"path": {"type": "string"}, "deleted": {"const": true}, "remains": remains()});
    object(&["path", "deleted"], fields)
}

fn tree_schema() -> Value {
    object(
        &["path", "data", "has_more"],
        json!({
            "path": {"type": "string"},
            "data": {"type": "array", "items": schema("TreeEntry")},
            "has_more": {"description": "Whether some were left out.", "type": "boolean"},
        }),
    )
}

fn entry_schema() -> Value {
    object(
        &["path", "type", "bytes", "modified_at", "executable"],
        json!({
            "path": {"type": "string"},
            "type": {"type": "string", "enum": ["folder", "file", "link", "other"]},
            "bytes": count(),
            "modified_at": time(),
            "executable": {"type": "boolean"},
            "address": {"description": "The path for an address, where its name is no text.", "type": "string"},
            "target": {"description": "Where a link says that it leads.", "type": "string"},
        }),
    )
}

fn unpacked_schema() -> Value {
    object(
        &["path", "entries", "bytes"],
        json!({"path": {"type": "string"}, "entries": count(), "bytes": count()}),
    )
}

fn snapshot_schema() -> Value {
    object(
        &["id", "title", "created_at", "bytes", "files"],
        json!({
            "id": {"type": "string", "format": "uuid"},
            "title": {"type": ["string", "null"]},
            "created_at": time(),
            "bytes": count(),
            "files": count(),
        }),
    )
}

fn restored_schema() -> Value {
    object(
        &["id", "snapshot_id", "restored"],
        json!({"id": {"type": "string"}, "snapshot_id": {"type": "string"}, "restored": {"const": true}}),
    )
}

fn diff_schema() -> Value {
    object(
        &["from", "data", "has_more"],
        json!({
            "from": {"type": "string"},
            "data": {"type": "array", "items": schema("DiffEntry")},
            "has_more": {"description": "Whether some were left out.", "type": "boolean"},
        }),
    )
}

fn change_schema() -> Value {
    let size = || json!({"type": ["integer", "null"], "minimum": 0});
    object(
        &["path", "status", "bytes_before", "bytes_after"],
        json!({
            "path": {"type": "string"},
            "status": {"type": "string", "enum": ["added", "removed", "changed"]},
            "bytes_before": size(),
            "bytes_after": size(),
        }),
    )
}
