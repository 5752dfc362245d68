//! Sessions: the CLI's transcripts, each in a folder of its own that is named after it, with notes of ours beside it.
//! It must never touch one that a run holds, nor believe a transcript: its agent can write what it likes there.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use gaoler_files::{Code, PAGE_MAX, TRANSCRIPT_BYTES_MAX, Unreadable};
use nix::fcntl::{Flock, FlockArg};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::beneath::{Folder, Found, Kind, is_missing};
use crate::budget::{self, Budget};
use crate::draft::{self, Draft};
use crate::failure::{Doing, Failed, failed};
use crate::note::{self, Note};
use crate::spoken::Spoken;

/// Bytes of a line of a transcript, at most: a message with images in it. What is longer is left out.
const LINE_BYTES_MAX: usize = 40 * 1024 * 1024;
/// Bytes of one page of messages.
const PAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long a page's transcripts are read. It ends early then, and another follows.
const PAGE_WAIT: Duration = Duration::from_secs(5);
/// Sessions that one sweep removes; the next one goes on.
const SWEPT_MAX: usize = 10_000;
/// How often a session is tried to be held, and how long between: whoever looks at it holds it for a moment.
const HOLDS_MAX: u32 = 20;
const HOLD_WAIT: Duration = Duration::from_millis(5);
const DAY: i64 = 24 * 60 * 60;
/// What an earlier version called what it removed.
const GONE: &str = ".gone-";

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

fn unreadable(why: Unreadable) -> Failed {
    failed(Code::Unreadable, why.message())
}

/// What lies under a session's id, whatever it is.
struct There {
    /// Its folder, where it is one.
    folder: Option<Folder>,
    /// Bytes of its transcript; none where it was never begun.
    bytes: u64,
    /// When it was used last. An agent can set a file's own time to any year, and this it cannot set ahead.
    used: i64,
    /// Whether what is in its transcript's place can be read, as far as that is seen without reading it.
    sound: Result<(), Unreadable>,
}

/// Looks at a session; `None` where there is nothing.
fn look(top: &Folder, id: &str) -> Result<Option<There>, Failed> {
    if !is_id(id) {
        return Ok(None);
    }
    let Some(own) = top.look(OsStr::new(id)).doing("look for a session")? else { return Ok(None) };
    if own.kind != Kind::Folder {
        return Ok(Some(There { folder: None, bytes: 0, used: own.used, sound: Err(Unreadable::NoFolder) }));
    }
    let folder = match top.enter(OsStr::new(id)) {
        // Another request removes it.
        Err(error) if is_missing(&error) => return Ok(None),
        other => other.doing("open a session")?,
    };
    let transcript = folder.look(OsStr::new(&transcript_of(id)));
    let (bytes, used, sound) = match transcript {
        Ok(None) => (0, own.used, Ok(())),
        Ok(Some(found)) => {
            let bytes = if found.kind == Kind::File { found.bytes } else { 0 };
            (bytes, found.used, sound(&found))
        }
        Err(_) => (0, own.used, Err(Unreadable::DiskFailed)),
    };
    Ok(Some(There { folder: Some(folder), bytes, used, sound }))
}

/// Whether this is a transcript that can be read.
fn sound(found: &Found) -> Result<(), Unreadable> {
    match found.kind {
        Kind::Folder => Err(Unreadable::TranscriptIsFolder),
        Kind::Link => Err(Unreadable::TranscriptIsLink),
        Kind::Other => Err(Unreadable::TranscriptIsSpecial),
        Kind::File if !found.readable => Err(Unreadable::TranscriptIsClosed),
        Kind::File if found.bytes > TRANSCRIPT_BYTES_MAX => Err(Unreadable::TranscriptIsTooLarge),
        Kind::File => Ok(()),
    }
}

/// Whether it is there.
pub fn is_there(top: &Folder, id: &str) -> Result<(), Failed> {
    look(top, id)?.map(drop).ok_or_else(missing)
}

/// A session, after those that are too old have gone.
fn fresh(top: &Folder, id: &str, ttl_days: u32) -> Result<There, Failed> {
    sweep(top, ttl_days)?;
    look(top, id)?.ok_or_else(missing)
}

/// The same of one that is to be read: its folder.
fn sound_one(there: There) -> Result<Folder, Failed> {
    there.sound.map_err(unreadable)?;
    there.folder.ok_or_else(missing)
}

/// Its transcript; none where it was never begun.
fn transcript_in(folder: &Folder, id: &str) -> Result<Option<File>, Failed> {
    match folder.read(OsStr::new(&transcript_of(id))) {
        Err(error) if is_missing(&error) => Ok(None),
        other => {
            let file = other.doing("open a transcript")?;
            // It may have become something else since it was looked at, and a pipe's reader waits for ever.
            let is_file = file.metadata().doing("look at a transcript")?.is_file();
            if is_file { Ok(Some(file)) } else { Err(unreadable(Unreadable::TranscriptIsSpecial)) }
        }
    }
}

/// Holds a session against every run.
fn held(folder: &Folder) -> Result<Flock<OwnedFd>, Failed> {
    for _ in 1..HOLDS_MAX {
        if let Some(held) = folder.lock(FlockArg::LockExclusiveNonblock).doing("lock a session")? {
            return Ok(held);
        }
        std::thread::sleep(HOLD_WAIT);
    }
    folder.lock(FlockArg::LockExclusiveNonblock).doing("lock a session")?.ok_or_else(busy)
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

/// What a list says of it. Nothing that an agent leaves there makes it fail.
fn row(top: &Folder, id: &str, there: &There) -> Result<Value, Failed> {
    let (mut said, mut turns, mut created) = (false, 0u64, None);
    let (mut running, mut taken, mut readable) = (false, 0u64, there.sound);
    if let Some(folder) = &there.folder {
        running = folder.lock(FlockArg::LockSharedNonblock).doing("look at a session")?.is_none();
        taken = budget::whole(folder).map_or(0, |(bytes, _)| bytes);
        let mut counted = |folder: &Folder| -> Result<(), Failed> {
            let Some(file) = transcript_in(folder, id)? else { return Ok(()) };
            lines(file, |line| {
                let Ok(line) = serde_json::from_slice::<Spoken>(line) else { return Ok(true) };
                if created.is_none() {
                    created = line.timestamp.as_deref().and_then(note::read_time);
                }
                said |= line.by_somebody();
                turns += u64::from(line.by_a_person());
                Ok(true)
            })
        };
        if readable.is_ok() && counted(folder).is_err() {
            readable = Err(Unreadable::DiskFailed);
        }
    }
    // A run's first words may be on their way.
    if readable.is_ok() && !said && there.bytes > 0 && !running {
        readable = Err(Unreadable::TranscriptSaysNothing);
    }
    let used = note::time(there.used);
    let workspace = top.link(OsStr::new(&format!("{id}.workspace"))).ok();
    let workspace = workspace.and_then(|it| it.into_string().ok()).filter(|it| is_id(it));
    Ok(json!({
        "id": id,
        "title": Note::read(top, &format!("{id}.note")).title,
        "workspace_id": workspace.unwrap_or_else(|| "default".to_owned()),
        "created_at": created.unwrap_or_else(|| used.clone()),
        "last_used_at": used,
        "turns": turns,
        "bytes": there.bytes,
        "disk_bytes": taken,
        "running": running,
        "unreadable": readable.err(),
    }))
}

/// Tells every session, one after another, and when it was used last.
fn each(top: &Folder, tell: &mut dyn FnMut(&str, &There)) -> Result<(), Failed> {
    let told = top.each(&mut |name| {
        // One that another request removes meanwhile is none.
        if let Some(id) = name.to_str().filter(|name| is_id(name))
            && let Ok(Some(there)) = look(top, id)
        {
            tell(id, &there);
        }
        Ok(true)
    });
    told.doing("list the sessions")
}

/// A page of them, the newest first. It keeps as many as the page has, however many there are.
pub fn list(top: &Folder, limit: u32, after: Option<&str>, ttl_days: u32) -> Result<Value, Failed> {
    sweep(top, ttl_days)?;
    let before = match after {
        None => None,
        Some(id) => Some((look(top, id)?.ok_or_else(missing)?.used, id)),
    };
    let limit = limit.clamp(1, PAGE_MAX) as usize;
    let mut newest = BinaryHeap::new();
    each(top, &mut |id, there| {
        if before.is_none_or(|before| (there.used, id) < before) {
            newest.push(Reverse((there.used, id.to_owned())));
            if newest.len() > limit + 1 {
                newest.pop();
            }
        }
    })?;
    let begun = Instant::now();
    let (mut rows, mut more) = (Vec::new(), newest.len() > limit);
    for (at, Reverse((_, id))) in newest.into_sorted_vec().into_iter().take(limit).enumerate() {
        if at > 0 && begun.elapsed() > PAGE_WAIT {
            more = true;
            break;
        }
        if let Some(there) = look(top, &id)? {
            rows.push(row(top, &id, &there)?);
        }
    }
    Ok(json!({ "data": rows, "has_more": more }))
}

/// One.
pub fn one(top: &Folder, id: &str, ttl_days: u32) -> Result<Value, Failed> {
    let there = fresh(top, id, ttl_days)?;
    row(top, id, &there)
}

/// Gives it a title.
pub fn name(top: &Folder, id: &str, title: &str, ttl_days: u32) -> Result<Value, Failed> {
    let there = fresh(top, id, ttl_days)?;
    Note::now(Some(title.to_owned()).filter(|it| !it.is_empty()), None).write(top, &format!("{id}.note"))?;
    row(top, id, &there)
}

/// Removes it, whatever is left of it, unless a run holds it.
pub fn remove(top: &Folder, id: &str, ttl_days: u32) -> Result<Value, Failed> {
    let there = fresh(top, id, ttl_days)?;
    let _held = there.folder.as_ref().map(held).transpose()?;
    let draft = Draft::new(top)?;
    discard(top, id, &there, &draft)?;
    Ok(json!({ "id": id, "deleted": true, "remains": draft.end() }))
}

/// Moves it and its notes out of sight at once, so that what is cut off here leaves nothing half.
fn discard(top: &Folder, id: &str, there: &There, draft: &Draft) -> Result<(), Failed> {
    // To move a folder takes the right to write into it.
    there.folder.as_ref().map(Folder::open_to_owner).transpose().doing("open a session to its owner")?;
    match top.rename(OsStr::new(id), &draft.folder, OsStr::new(id)) {
        Err(error) if is_missing(&error) => return Err(missing()),
        other => other.doing("remove a session")?,
    }
    for note in ["workspace", "note", "note.new"] {
        let note = format!("{id}.{note}");
        if top.unlink(OsStr::new(&note)).is_err() {
            let _ = top.enter(OsStr::new(&note)).and_then(|folder| folder.open_to_owner());
            let _ = top.rename(OsStr::new(&note), &draft.folder, OsStr::new(&note));
        }
    }
    Ok(())
}

/// Removes sessions that nobody has used for so many days, and what earlier removals left, as far as there is time; how
/// many, and whether something remains.
fn sweep(top: &Folder, ttl_days: u32) -> Result<(u64, bool), Failed> {
    let remains = clean(top, draft::LEFT_WAIT)?;
    if ttl_days == 0 {
        return Ok((0, remains));
    }
    let oldest = note::now() - i64::from(ttl_days) * DAY;
    let mut old = Vec::new();
    each(top, &mut |id, there| {
        if there.used < oldest && old.len() < SWEPT_MAX {
            old.push(id.to_owned());
        }
    })?;
    let mut draft = None;
    let mut removed = 0;
    for id in &old {
        // Somebody may have used it meanwhile, or removed it.
        let Some(there) = look(top, id)?.filter(|there| there.used < oldest) else { continue };
        let held = match &there.folder {
            Some(folder) => folder.lock(FlockArg::LockExclusiveNonblock).doing("lock a session")?.map(Some),
            None => Some(None),
        };
        let Some(_held) = held else { continue };
        let draft = match &mut draft {
            Some(draft) => draft,
            none => none.insert(Draft::new(top)?),
        };
        match discard(top, id, &there, draft) {
            Err(Failed(failure)) if failure.code == Code::NoSession => {}
            other => {
                other?;
                removed += 1;
            }
        }
    }
    let left = draft.is_some_and(Draft::end);
    Ok((removed, remains || left || old.len() >= SWEPT_MAX))
}

/// Removes more of what has been deleted, for so long; whether something remains.
pub fn clean(top: &Folder, wait: Duration) -> Result<bool, Failed> {
    let until = Instant::now() + wait;
    let mut remains = draft::clean(top, until)?;
    let mut gone = Vec::new();
    let listed = top.each(&mut |name| {
        if name.to_str().is_some_and(|name| name.starts_with(GONE)) {
            gone.push(name.to_owned());
        }
        Ok(gone.len() < PAGE_MAX as usize)
    });
    listed.doing("list the sessions")?;
    for name in gone {
        remains |= !top.remove_until(&name, until).unwrap_or(true);
    }
    Ok(remains)
}

/// The same, and which of these sessions are not there.
pub fn swept(top: &Folder, ttl_days: u32, known: Vec<String>) -> Result<Value, Failed> {
    let (removed, remains) = sweep(top, ttl_days)?;
    let gone = |id: &String| matches!(look(top, id), Ok(None));
    let gone: Vec<String> = known.into_iter().filter(gone).collect();
    Ok(json!({ "removed": removed, "gone": gone, "remains": remains }))
}

/// Copies it under a new id. The CLI finds a session by its file's name, and goes on with the id that its lines have:
/// both are the new one's.
pub fn fork(
    top: &Folder,
    id: &str,
    new: &str,
    title: Option<String>,
    ttl_days: u32,
    mut budget: Budget,
) -> Result<Value, Failed> {
    let folder = sound_one(fresh(top, id, ttl_days)?)?;
    let _held = held(&folder)?;
    if !is_id(new) || top.look(OsStr::new(new)).doing("look for the new session")?.is_some() {
        return Err(failed(Code::Conflict, "There is a session of that id already."));
    }
    let draft = Draft::new(top)?;
    budget.file().doing("make a session")?;
    let (copy, _) = draft.folder.make(OsStr::new(new)).doing("make a session")?;
    nix::sys::stat::fchmod(&copy, nix::sys::stat::Mode::S_IRWXU).doing("close a session to others")?;
    budget.file().doing("write a transcript")?;
    let file = transcript_in(&folder, id)?;
    let mut said = file.is_none();
    let mut out = std::io::BufWriter::new(
        copy.create(OsStr::new(&transcript_of(new)), false).doing("write a transcript")?,
    );
    let whole = [format!("\"{id}\""), format!("\"{new}\"")];
    let within = [format!("/{id}/"), format!("/{new}/")];
    let copied = |line: &[u8]| {
        // What is no line of JSON, such as one that was cut, is left behind.
        if let Ok(text) = std::str::from_utf8(line)
            && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
        {
            said |= serde_json::from_str::<Spoken>(text).is_ok_and(|line| line.by_somebody());
            let text = text.replace(&whole[0], &whole[1]).replace(&within[0], &within[1]);
            budget.bytes(text.len() as u64 + 1).doing("write a transcript")?;
            out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).doing("write a transcript")?;
        }
        Ok(true)
    };
    file.map_or(Ok(()), |file| lines(file, copied))?;
    if !said {
        return Err(unreadable(Unreadable::TranscriptSaysNothing));
    }
    out.flush().doing("write a transcript")?;
    drop(out);
    // Results of tools that were too large for a line.
    if let Ok(beside) = folder.enter(OsStr::new(id)) {
        let (to, _) = copy.make(OsStr::new(new)).doing("copy a session")?;
        let mut each = |bytes| budget.file().and_then(|()| budget.bytes(bytes));
        crate::snapshots::copy(&beside, &to, &mut each).doing("copy a session")?;
    }
    if let Ok(workspace) = top.link(OsStr::new(&format!("{id}.workspace"))) {
        top.make_link(OsStr::new(&format!("{new}.workspace")), &workspace)
            .doing("note a session's workspace")?;
    }
    Note::now(title.or(Note::read(top, &format!("{id}.note")).title), Some(id.to_owned()))
        .write(top, &format!("{new}.note"))?;
    draft.folder.rename(OsStr::new(new), top, OsStr::new(new)).doing("put a session in its place")?;
    one(top, new, 0)
}

/// Messages of it, oldest first. The CLI writes a line for each block; those of one message are joined.
pub fn transcript(top: &Folder, id: &str, limit: u32, offset: u64, ttl_days: u32) -> Result<Value, Failed> {
    let there = fresh(top, id, ttl_days)?;
    let begun = there.bytes > 0;
    let folder = sound_one(there)?;
    let running = folder.lock(FlockArg::LockSharedNonblock).doing("look at a session")?.is_none();
    let Some(file) = transcript_in(&folder, id)? else {
        return Ok(json!({ "session_id": id, "data": [], "has_more": false }));
    };
    let (mut page, mut bytes, mut count, mut more) = (Vec::<Value>::new(), 0, 0u64, false);
    let mut last: Option<(String, String)> = None;
    let mut any = false;
    let limit = limit.clamp(1, PAGE_MAX) as usize;
    lines(file, |line| {
        let size = line.len();
        let said = serde_json::from_slice::<Line>(line).ok().and_then(Line::said);
        let Some(Said { name, role, blocks, at }) = said.filter(|said| !said.blocks.is_empty()) else {
            return Ok(true);
        };
        any = true;
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
    if begun && !any && !running {
        return Err(unreadable(Unreadable::TranscriptSaysNothing));
    }
    Ok(json!({ "session_id": id, "data": page, "has_more": more }))
}
