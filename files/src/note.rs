//! Small files of our own beside what they are about: titles and origins. And time, as people write it.
//! It must never trust one: on some hosts its tenant could have written it.

use std::ffi::OsStr;
use std::io::{Read, Write};

use gaoler_files::TITLE_CHARS_MAX;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::beneath::{Folder, Kind};
use crate::failure::{Doing, Failed};

/// Bytes of one, at most.
const BYTES_MAX: u64 = 8 * 1024;

/// What is noted.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Note {
    /// For people.
    pub title: Option<String>,
    /// When it was made.
    pub created_at: Option<String>,
    /// Where it came from.
    pub origin: Option<String>,
}

impl Note {
    /// One of now.
    pub fn now(title: Option<String>, origin: Option<String>) -> Note {
        Note { title: title.map(|it| plain(&it)), created_at: Some(time(now())), origin }
    }

    /// The note of this name; an empty one where there is none that can be read.
    pub fn read(folder: &Folder, name: &str) -> Note {
        let mut text = Vec::new();
        let read = folder.read(OsStr::new(name)).and_then(|file| file.take(BYTES_MAX).read_to_end(&mut text));
        let note: Note = read.ok().and_then(|_| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let bounded = |text: Option<String>| text.map(|text| plain(&text));
        Note {
            title: bounded(note.title),
            created_at: note.created_at.map(|it| plain(&it)),
            origin: bounded(note.origin),
        }
    }

    /// Writes it, whole or not at all.
    pub fn write(&self, folder: &Folder, name: &str) -> Result<(), Failed> {
        let draft = format!("{name}.new");
        let text = serde_json::to_vec(self).unwrap_or_default();
        // Whatever is in the place of either is none of ours.
        let _ = folder.remove(OsStr::new(&draft));
        if folder.look(OsStr::new(name)).is_ok_and(|found| found.is_some_and(|it| it.kind == Kind::Folder)) {
            folder.remove(OsStr::new(name)).doing("remove what is in a note's place")?;
        }
        folder
            .create(OsStr::new(&draft), false)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| folder.rename(OsStr::new(&draft), folder, OsStr::new(name)))
            .doing("write a note")
    }
}

/// A title in one line, of a bounded length.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TITLE_CHARS_MAX).collect()
}

/// Seconds since 1970.
pub fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

/// A time, as RFC 3339 has it.
pub fn time(seconds: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    time.format(&Rfc3339).unwrap_or_default()
}

/// Such a time as it was written, if it is one; without fractions.
pub fn read_time(text: &str) -> Option<String> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(|it| time(it.unix_timestamp()))
}
