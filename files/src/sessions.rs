//! Sessions: the CLI's transcripts, each in a folder of its own that is named after it, with notes of ours beside it.
//! It must never touch one that a run holds, nor believe a transcript: its agent can write what it likes there.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};

use gaoler_files::{Code, PAGE_MAX};
use nix::fcntl::FlockArg;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::beneath::{Folder, Found, Kind, is_missing};
use crate::failure::{Doing, Failed, failed};
use crate::note::{self, Note};

/// Bytes of a line of a transcript, at most: a message with images in it. What is longer is left out.
const LINE_BYTES_MAX: usize = 40 * 1024 * 1024;
/// Bytes of one page of messages.
const PAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Sessions that are looked at.
const SESSIONS_MAX: usize = 100_000;
const DAY: i64 = 24 * 60 * 60;

/// A line of a transcript, as far as it matters here.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Line {
    r#type: String,
    timestamp: Option<String>,
    is_sidechain: bool,
    is_meta: bool,
    message: Option<Message>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    id: Option<String>,
    role: String,
    content: Value,
}

/// What somebody said: the message's name, where it has one, who, in which blocks, and when.
struct Said {
    name: Option<String>,
    role: String,
    blocks: Vec<Value>,
    at: Option<String>,
}

impl Line {
    /// What somebody said, in blocks; `None` for what is none of the conversation.
    fn said(self) -> Option<Said> {
        let spoken =
            matches!(self.r#type.as_str(), "user" | "assistant") && !self.is_sidechain && !self.is_meta;
        let message = self.message.filter(|_| spoken)?;
        if message.role != self.r#type {
            return None;
        }
        let blocks = match message.content {
            Value::String(text) => vec![json!({ "type": "text", "text": text })],
            Value::Array(blocks) => {
                blocks.into_iter().filter(|block| block.get("type").is_some_and(Value::is_string)).collect()
            }
            _ => return None,
        };
        let at = self.timestamp.as_deref().and_then(note::read_time);
        Some(Said { name: message.id, role: message.role, blocks, at })
    }
}

fn transcript_of(id: &str) -> String {
    format!("{id}.jsonl")
}

/// Whether a folder's name is a session's.
fn is_id(name: &str) -> bool {
    name.len() == 36
        && name.bytes().enumerate().all(|(at, b)| match at {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_digit() || (b'a'..=b'f').contains(&b),
        })
}

fn missing() -> Failed {
    failed(Code::NoSession, "There is no such session.")
}

/// A session's folder, and its transcript's inode. One without a transcript was never begun.
pub fn open(top: &Folder, id: &str) -> Result<(Folder, Found), Failed> {
    if !is_id(id) {
        return Err(missing());
    }
    let folder = match top.enter(OsStr::new(id)) {
        Err(error) if is_missing(&error) => return Err(missing()),
        other => other.doing("open a session")?,
    };
    match folder.look(OsStr::new(&transcript_of(id))).doing("look at a session")? {
        Some(found) if found.kind == Kind::File && found.bytes > 0 => Ok((folder, found)),
        _ => Err(missing()),
    }
}

/// The same after those that are too old have gone.
fn fresh(top: &Folder, id: &str, ttl_days: u32) -> Result<(Folder, Found), Failed> {
    sweep(top, ttl_days)?;
    open(top, id)
}

fn busy() -> Failed {
    failed(Code::Busy, "This session has a run: wait for its end.")
}

/// The lines of a transcript, each whole; one that is too long, or none, is left out.
fn lines(file: File, mut each: impl FnMut(&[u8]) -> Result<bool, Failed>) -> Result<(), Failed> {
    let mut reader = BufReader::with_capacity(256 * 1024, file);
    let mut line = Vec::new();
    let mut whole = true;
    loop {
        let piece = reader.fill_buf().doing("read a transcript")?;
        if piece.is_empty() {
            break;
        }
        let (length, ends) = match piece.iter().position(|&b| b == b'\n') {
            Some(at) => (at + 1, true),
            None => (piece.len(), false),
        };
        whole &= line.len() + length <= LINE_BYTES_MAX;
        if whole {
            line.extend_from_slice(&piece[..length]);
        }
        reader.consume(length);
        if ends {
            if whole && !each(line.strip_suffix(b"\n").unwrap_or(&line))? {
                return Ok(());
            }
            line.clear();
            whole = true;
        }
    }
    if whole && !line.is_empty() {
        each(&line)?;
    }
    Ok(())
}

/// What a list says of it.
fn row(top: &Folder, id: &str) -> Result<Value, Failed> {
    let (folder, found) = open(top, id)?;
    let running = folder.lock(FlockArg::LockSharedNonblock).doing("look at a session")?.is_none();
    let (mut turns, mut created) = (0u64, None);
    let file = folder.read(OsStr::new(&transcript_of(id))).doing("open a transcript")?;
    lines(file, |line| {
        // A person's word is a user's line that is more than results of tools.
        if let Ok(line) = serde_json::from_slice::<Line>(line) {
            if created.is_none() {
                created = line.timestamp.as_deref().and_then(note::read_time);
            }
            if line.r#type == "user"
                && let Some(said) = line.said()
            {
                turns += u64::from(said.blocks.iter().any(|block| block["type"] != "tool_result"));
            }
        }
        Ok(true)
    })?;
    let used = note::time(found.modified);
    let workspace = top.link(OsStr::new(&format!("{id}.workspace"))).ok();
    let workspace = workspace.and_then(|it| it.into_string().ok()).filter(|it| is_id(it));
    Ok(json!({
        "id": id,
        "title": Note::read(top, &format!("{id}.note")).title,
        "workspace_id": workspace.unwrap_or_else(|| "default".to_owned()),
        "created_at": created.unwrap_or_else(|| used.clone()),
        "last_used_at": used,
        "turns": turns,
        "bytes": found.bytes,
        "running": running,
    }))
}

/// Every session that was begun, and when it was used last; the newest first.
fn all(top: &Folder) -> Result<Vec<(i64, String)>, Failed> {
    let mut found = Vec::new();
    for name in top.names().doing("list the sessions")? {
        let Some(id) = name.to_str().filter(|name| is_id(name)) else { continue };
        if let Ok((_, transcript)) = open(top, id) {
            found.push((transcript.modified, id.to_owned()));
        }
        if found.len() >= SESSIONS_MAX {
            break;
        }
    }
    found.sort_unstable_by(|one, other| other.cmp(one));
    Ok(found)
}

/// A page of them.
pub fn list(top: &Folder, limit: u32, after: Option<&str>) -> Result<Value, Failed> {
    let all = all(top)?;
    let begin = match after {
        None => 0,
        Some(id) => 1 + all.iter().position(|(_, it)| it == id).ok_or_else(missing)?,
    };
    let end = all.len().min(begin + limit.clamp(1, PAGE_MAX) as usize);
    let rows = all[begin..end].iter().filter_map(|(_, id)| row(top, id).ok());
    Ok(json!({ "data": rows.collect::<Vec<_>>(), "has_more": end < all.len() }))
}

/// One.
pub fn one(top: &Folder, id: &str, ttl_days: u32) -> Result<Value, Failed> {
    fresh(top, id, ttl_days)?;
    row(top, id)
}

/// Gives it a title.
pub fn name(top: &Folder, id: &str, title: &str, ttl_days: u32) -> Result<Value, Failed> {
    fresh(top, id, ttl_days)?;
    Note::now(Some(title.to_owned()).filter(|it| !it.is_empty()), None).write(top, &format!("{id}.note"))?;
    row(top, id)
}

/// Removes it, unless a run holds it.
pub fn remove(top: &Folder, id: &str, ttl_days: u32) -> Result<Value, Failed> {
    let (folder, _) = fresh(top, id, ttl_days)?;
    let held = folder.lock(FlockArg::LockExclusiveNonblock).doing("lock a session")?;
    let _held = held.ok_or_else(busy)?;
    discard(top, id)?;
    Ok(json!({ "id": id, "deleted": true }))
}

/// Out of sight first, so that what is cut off here leaves nothing half.
fn discard(top: &Folder, id: &str) -> Result<(), Failed> {
    let gone = format!(".gone-{id}");
    let name = OsStr::new(&gone);
    if top.look(name).doing("look for remains")?.is_some() {
        top.remove(name).doing("remove remains")?;
    }
    top.rename(OsStr::new(id), top, name).doing("remove a session")?;
    for note in ["workspace", "note"] {
        let _ = top.unlink(OsStr::new(&format!("{id}.{note}")));
    }
    top.remove(name).doing("remove a session")
}

/// Removes sessions that nobody has used for so many days, and what an earlier removal left; how many.
pub fn sweep(top: &Folder, ttl_days: u32) -> Result<u64, Failed> {
    for name in top.names().doing("list the sessions")? {
        if name.to_str().is_some_and(|name| name.starts_with(".gone-")) {
            top.remove(&name).doing("remove remains")?;
        }
    }
    if ttl_days == 0 {
        return Ok(0);
    }
    let oldest = note::now() - i64::from(ttl_days) * DAY;
    let mut removed = 0;
    for (used, id) in all(top)? {
        if used >= oldest {
            continue;
        }
        let Ok((folder, _)) = open(top, &id) else { continue };
        if let Some(_held) = folder.lock(FlockArg::LockExclusiveNonblock).doing("lock a session")? {
            discard(top, &id)?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// The same, and which of these sessions are not there.
pub fn swept(top: &Folder, ttl_days: u32, known: Vec<String>) -> Result<Value, Failed> {
    let removed = sweep(top, ttl_days)?;
    let gone = |id: &String| matches!(open(top, id), Err(Failed(failure)) if failure.code == Code::NoSession);
    Ok(json!({ "removed": removed, "gone": known.into_iter().filter(gone).collect::<Vec<_>>() }))
}

/// Copies it under a new id. The CLI finds a session by its file's name, and goes on with the id that its lines have:
/// both are the new one's.
pub fn fork(
    top: &Folder,
    id: &str,
    new: &str,
    title: Option<String>,
    ttl_days: u32,
) -> Result<Value, Failed> {
    let (folder, _) = fresh(top, id, ttl_days)?;
    let held = folder.lock(FlockArg::LockExclusiveNonblock).doing("lock a session")?;
    let _held = held.ok_or_else(busy)?;
    if !is_id(new) || top.look(OsStr::new(new)).doing("look for the new session")?.is_some() {
        return Err(failed(Code::Conflict, "There is a session of that id already."));
    }
    let draft = format!(".gone-{new}");
    let (copy, _) = top.make(OsStr::new(&draft)).doing("make a session")?;
    nix::sys::stat::fchmod(&copy, nix::sys::stat::Mode::S_IRWXU).doing("close a session to others")?;
    let file = folder.read(OsStr::new(&transcript_of(id))).doing("open a transcript")?;
    let mut out = std::io::BufWriter::new(
        copy.create(OsStr::new(&transcript_of(new)), false).doing("write a transcript")?,
    );
    let whole = [format!("\"{id}\""), format!("\"{new}\"")];
    let within = [format!("/{id}/"), format!("/{new}/")];
    lines(file, |line| {
        // What is no line of JSON, such as one that was cut, is left behind.
        if let Ok(text) = std::str::from_utf8(line)
            && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
        {
            let text = text.replace(&whole[0], &whole[1]).replace(&within[0], &within[1]);
            out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).doing("write a transcript")?;
        }
        Ok(true)
    })?;
    out.flush().doing("write a transcript")?;
    drop(out);
    // Results of tools that were too large for a line.
    if let Ok(beside) = folder.enter(OsStr::new(id)) {
        let (to, _) = copy.make(OsStr::new(new)).doing("copy a session")?;
        crate::snapshots::copy(&beside, &to, &mut |_| Ok(())).doing("copy a session")?;
    }
    if let Ok(workspace) = top.link(OsStr::new(&format!("{id}.workspace"))) {
        top.make_link(OsStr::new(&format!("{new}.workspace")), &workspace)
            .doing("note a session's workspace")?;
    }
    Note::now(title.or(Note::read(top, &format!("{id}.note")).title), Some(id.to_owned()))
        .write(top, &format!("{new}.note"))?;
    top.rename(OsStr::new(&draft), top, OsStr::new(new)).doing("put a session in its place")?;
    row(top, new)
}

/// Messages of it, oldest first. The CLI writes a line for each block; those of one message are joined.
pub fn transcript(top: &Folder, id: &str, limit: u32, offset: u64, ttl_days: u32) -> Result<Value, Failed> {
    let (folder, _) = fresh(top, id, ttl_days)?;
    let file = folder.read(OsStr::new(&transcript_of(id))).doing("open a transcript")?;
    let (mut page, mut bytes, mut count, mut more) = (Vec::<Value>::new(), 0, 0u64, false);
    let mut last: Option<(String, String)> = None;
    let limit = limit.clamp(1, PAGE_MAX) as usize;
    lines(file, |line| {
        let size = line.len();
        let said = serde_json::from_slice::<Line>(line).ok().and_then(Line::said);
        let Some(Said { name, role, blocks, at }) = said.filter(|said| !said.blocks.is_empty()) else {
            return Ok(true);
        };
        let same = name.clone().zip(Some(role.clone()));
        let joined = same.is_some() && same == last;
        last = same;
        count += u64::from(!joined);
        if count <= offset {
            return Ok(true);
        }
        bytes += size;
        if (!joined && page.len() >= limit) || (!page.is_empty() && bytes > PAGE_BYTES_MAX && !joined) {
            more = true;
            return Ok(false);
        }
        match (joined, page.last_mut()) {
            (true, Some(message)) if bytes <= PAGE_BYTES_MAX => {
                message["content"]
                    .as_array_mut()
                    .into_iter()
                    .for_each(|content| content.extend(blocks.clone()));
            }
            (true, _) => {}
            (false, _) => page.push(json!({ "role": role, "content": blocks, "created_at": at })),
        }
        Ok(true)
    })?;
    Ok(json!({ "session_id": id, "data": page, "has_more": more }))
}
