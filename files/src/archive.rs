//! Archives, both ways. What comes in is unpacked beside the workspace and moved in when it is whole.
//! It must never write where an entry's name leads through a link or upwards, nor make what is neither a folder, a file
//! nor a link that stays inside; every mode is its own.

use std::ffi::{OsStr, OsString};
use std::fs::{File, FileTimes};
use std::io::{BufReader, Read, Result, Seek, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, UNIX_EPOCH};

use flate2::Compression;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use gaoler_files::{Code, Format};
use serde_json::{Value, json};
use tar::EntryType;
use time::{Date, Month, OffsetDateTime, Time};
use zip::write::SimpleFileOptions;

use crate::Outcome;
use crate::beneath::{Folder, Found, Kind, Relative, is_in_the_way, make_steps, steps};
use crate::budget::Budget;
use crate::draft::Draft;
use crate::failure::{Doing, Failed, Told, failed};
use crate::frames::FramesIn;
use crate::multipart::Form;
use crate::workspaces::{self, pour};

/// Entries of one archive, at most.
const ENTRIES_MAX: u64 = 200_000;
/// How many times its own size an archive may become, and from how many bytes on that counts: a short one of zeros is
/// no bomb.
const RATIO_MAX: u64 = 250;
const RATIO_FROM: u64 = 16 << 20;
/// Bytes of a link's target.
const TARGET_BYTES_MAX: u64 = 4096;

/// Packs a workspace.
pub fn pack(top: &Folder, id: &str, format: Format) -> std::result::Result<Outcome, Failed> {
    let workspace = workspaces::open(top, id)?;
    Ok(Outcome::Bytes(
        None,
        Box::new(move |out| match format {
            Format::Zip => pack_zip(&workspace, out),
            Format::TarGz | Format::Form => pack_tar(&workspace, out),
        }),
    ))
}

fn pack_tar(workspace: &Folder, out: &mut dyn Write) -> Result<()> {
    let mut tar = tar::Builder::new(GzEncoder::new(out, Compression::fast()));
    workspace.walk(&mut |folder, name, path, found| {
        let mut header = tar::Header::new_gnu();
        header.set_mtime(found.modified.max(0) as u64);
        header.set_mode(if found.kind == Kind::Folder || found.executable { 0o755 } else { 0o644 });
        header.set_size(0);
        let path = OsString::from_vec(path.bytes());
        match found.kind {
            Kind::Folder => {
                header.set_entry_type(EntryType::Directory);
                tar.append_data(&mut header, &path, std::io::empty())?;
            }
            Kind::Link => {
                header.set_entry_type(EntryType::Symlink);
                tar.append_link(&mut header, &path, folder.link(name)?)?;
            }
            Kind::File => {
                let Ok(file) = folder.read(name) else { return Ok(false) };
                let length = file.metadata()?.len();
                header.set_entry_type(EntryType::Regular);
                header.set_size(length);
                // It may grow or shrink meanwhile; its entry has the length that was announced.
                tar.append_data(&mut header, &path, file.chain(std::io::repeat(0)).take(length))?;
            }
            Kind::Other => {}
        }
        Ok(true)
    })?;
    tar.into_inner()?.finish()?.flush()
}

fn pack_zip(workspace: &Folder, out: &mut dyn Write) -> Result<()> {
    let mut zip = zip::ZipWriter::new_stream(out);
    workspace.walk(&mut |folder, name, path, found| {
        let mode = if found.kind == Kind::Folder || found.executable { 0o755 } else { 0o644 };
        let options = SimpleFileOptions::default().unix_permissions(mode).large_file(found.bytes >= 1 << 32);
        let options = dos_time(found.modified).map_or(options, |time| options.last_modified_time(time));
        let path = path.text();
        match found.kind {
            Kind::Folder => zip.add_directory(path, options)?,
            Kind::Link => zip.add_symlink(path, folder.link(name)?.to_string_lossy(), options)?,
            Kind::File => {
                let Ok(file) = folder.read(name) else { return Ok(false) };
                zip.start_file(path, options)?;
                std::io::copy(&mut file.take(found.bytes), &mut zip)?;
            }
            Kind::Other => {}
        }
        Ok(true)
    })?;
    zip.finish()?;
    Ok(())
}

/// A time as zip has it: local to nobody, so UTC's; from 1980 to 2107.
fn dos_time(seconds: i64) -> Option<zip::DateTime> {
    let time = OffsetDateTime::from_unix_timestamp(seconds).ok()?;
    let year = u16::try_from(time.year()).ok()?;
    let (month, day) = (u8::from(time.month()), time.day());
    zip::DateTime::from_date_and_time(year, month, day, time.hour(), time.minute(), time.second()).ok()
}

/// The same the other way round.
fn unix_time(time: zip::DateTime) -> Option<u64> {
    let month = Month::try_from(time.month()).ok()?;
    let date = Date::from_calendar_date(time.year().into(), month, time.day()).ok()?;
    let clock = Time::from_hms(time.hour(), time.minute(), time.second()).ok()?;
    u64::try_from(OffsetDateTime::new_utc(date, clock).unix_timestamp()).ok()
}

/// Unpacks an archive into a folder of a workspace.
pub fn unpack(
    top: &Folder,
    id: &str,
    path: &str,
    (format, boundary): (Format, &str),
    body: &mut FramesIn<'_>,
    mut budget: Budget,
) -> std::result::Result<Value, Failed> {
    let (workspace, path) = (workspaces::open(top, id)?, Relative::of_address(path)?);
    let draft = Draft::new(top)?;
    let (tree, _) = draft.folder.make(OsStr::new("tree")).doing("make a draft")?;
    let mut unpacked = Unpacked {
        tree: &tree,
        budget: &mut budget,
        entries: 0,
        bytes: 0,
        packed: 0,
        piece: vec![0; 64 * 1024],
    };
    match format {
        Format::TarGz => unpacked.tar(body).doing("unpack the archive")?,
        Format::Form => unpacked.form(body, boundary).doing("read the form")?,
        Format::Zip => {
            // Its list is at its end, so all of it is needed first.
            let mut file = draft.folder.create(OsStr::new("zip"), false).doing("keep the archive")?;
            unpacked.packed = pour(body, &mut file, unpacked.budget).doing("keep the archive")?;
            file.rewind().doing("read the archive")?;
            unpacked.zip(file).doing("unpack the archive")?;
            draft.folder.unlink(OsStr::new("zip")).doing("drop the archive")?;
        }
    }
    // A body that was cut inside its last frame must change nothing.
    std::io::copy(body, &mut std::io::sink()).doing("read the body's end")?;
    let (files, bytes) = (unpacked.entries, unpacked.bytes);
    let moved = make_steps(&workspace, &path.0).and_then(|(target, _)| merge(&tree, &target));
    match moved {
        Err(error) if is_in_the_way(&error) => {
            let message = "Something in the workspace is in the way of the archive: a file of a folder, a folder of a \
                           file, or a link; what came before it in the archive is in its place.";
            return Err(failed(Code::Conflict, message));
        }
        other => other.doing("move what was unpacked to its place")?,
    }
    Ok(json!({ "path": path.text(), "entries": files, "bytes": bytes }))
}

/// Moves a whole tree into another: over files, into folders, never through a link nor over a folder.
fn merge(from: &Folder, to: &Folder) -> Result<()> {
    from.walk(&mut |folder, name, path, found| {
        let Some((before, last)) = path.split() else { return Ok(false) };
        let target = steps(to, before)?;
        match (found.kind, target.look(last)?.map(|it| it.kind)) {
            // All of it at once, where nothing is in its place.
            (_, None) => {
                folder.rename(name, &target, last)?;
                Ok(false)
            }
            (Kind::Folder, Some(Kind::Folder)) => Ok(true),
            (Kind::Folder, Some(_)) => Err(std::io::Error::from_raw_os_error(nix::libc::ENOTDIR)),
            (_, Some(Kind::Folder)) => Err(std::io::Error::from_raw_os_error(nix::libc::EISDIR)),
            (_, Some(_)) => {
                folder.rename(name, &target, last)?;
                Ok(false)
            }
        }
    })
}

/// What an archive has become so far.
struct Unpacked<'a> {
    tree: &'a Folder,
    budget: &'a mut Budget,
    entries: u64,
    bytes: u64,
    packed: u64,
    piece: Vec<u8>,
}

fn unsafe_entry(name: &[u8], why: &str) -> std::io::Error {
    let name: String = String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).take(200).collect();
    Told::io(Code::Unsafe, format!("The archive's entry \"{name}\" {why}; nothing was unpacked."))
}

fn broken(error: impl std::fmt::Display) -> std::io::Error {
    Told::io(Code::Broken, format!("The archive is broken, or is none of this form: {error}."))
}

/// An error of a reader: what we said ourselves stays what it is.
fn read_error(error: std::io::Error) -> std::io::Error {
    let ours = |error: &std::io::Error| error.get_ref().is_some_and(|inner| inner.is::<Told>());
    // The reader of archives wraps errors in its own, the first of which is ours.
    let mut source: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|it| it as _);
    while let Some(inner) = source {
        if let Some(Told(code, message)) = inner.downcast_ref::<Told>() {
            return Told::io(*code, message.clone());
        }
        if let Some(Told(code, message)) = inner
            .downcast_ref::<std::io::Error>()
            .and_then(|it| it.get_ref())
            .and_then(|it| it.downcast_ref::<Told>())
        {
            return Told::io(*code, message.clone());
        }
        source = inner.source();
    }
    if ours(&error) || error.raw_os_error().is_some() { error } else { broken(error) }
}

impl Unpacked<'_> {
    fn tar(&mut self, body: &mut FramesIn<'_>) -> Result<()> {
        let mut counted = Counted { inner: body, count: std::rc::Rc::default() };
        let count = counted.count.clone();
        let mut archive = tar::Archive::new(MultiGzDecoder::new(BufReader::new(&mut counted)));
        for entry in archive.entries().map_err(read_error)? {
            let mut entry = entry.map_err(read_error)?;
            self.packed = count.get();
            let name = entry.path_bytes().into_owned();
            let kind = entry.header().entry_type();
            let executable = entry.header().mode().unwrap_or(0) & 0o111 != 0;
            let modified = entry.header().mtime().unwrap_or(0);
            match kind {
                EntryType::XGlobalHeader => {}
                EntryType::Directory => self.folder(&name)?,
                EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                    let count = count.clone();
                    self.file(&name, executable, modified, &mut entry, &move || count.get())?;
                }
                EntryType::Symlink => {
                    let target = entry.link_name_bytes().map(|it| it.into_owned()).unwrap_or_default();
                    self.link(&name, &target)?;
                }
                EntryType::Link => {
                    let target = entry.link_name_bytes().map(|it| it.into_owned()).unwrap_or_default();
                    self.again(&name, &target)?;
                }
                _ => {
                    return Err(unsafe_entry(
                        &name,
                        "is a device, a pipe or something else that nobody may have here",
                    ));
                }
            }
        }
        Ok(())
    }

    fn form(&mut self, body: &mut FramesIn<'_>, boundary: &str) -> Result<()> {
        let mut form = Form::new(body, boundary)?;
        while let Some(name) = form.next()? {
            if name.is_empty() {
                form.pour(&mut std::io::sink())?;
                continue;
            }
            let Some((folder, last, _)) = self.fresh(&name)? else { continue };
            let file = folder.create(&last, false)?;
            let mut counted = Within { file, budget: self.budget, bytes: &mut self.bytes };
            form.pour(&mut counted)?;
        }
        Ok(())
    }

    fn zip(&mut self, file: File) -> Result<()> {
        let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(broken)?;
        if archive.len() as u64 > ENTRIES_MAX {
            return Err(too_many());
        }
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).map_err(broken)?;
            let name = entry.name_raw().to_vec();
            let mode = entry.unix_mode().unwrap_or(0);
            let kind = mode & 0o170_000;
            if name.ends_with(b"/") || kind == 0o040_000 {
                self.folder(&name)?;
            } else if kind == 0o120_000 {
                let mut target = Vec::new();
                (&mut entry).take(TARGET_BYTES_MAX).read_to_end(&mut target).map_err(broken)?;
                self.link(&name, &target)?;
            } else if kind == 0 || kind == 0o100_000 {
                let packed = self.packed;
                let modified = entry.last_modified().and_then(unix_time).unwrap_or(0);
                self.file(&name, mode & 0o111 != 0, modified, &mut entry, &|| packed)?;
            } else {
                return Err(unsafe_entry(
                    &name,
                    "is a device, a pipe or something else that nobody may have here",
                ));
            }
        }
        Ok(())
    }

    /// Where an entry belongs; `None` for the folder that all of it is in.
    fn place(&mut self, name: &[u8]) -> Result<Option<(Folder, OsString, Relative)>> {
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(too_many());
        }
        let path =
            Relative::of(name).ok_or_else(|| unsafe_entry(name, "leads out of the folder, or is no path"))?;
        let Some((before, last)) = path.split() else { return Ok(None) };
        let (folder, made) = match make_steps(self.tree, before) {
            Err(error) if is_in_the_way(&error) => {
                return Err(unsafe_entry(name, "leads through a link or a file of the archive"));
            }
            other => other?,
        };
        for _ in 0..=made {
            self.budget.file()?;
        }
        Ok(Some((folder, last.to_owned(), path)))
    }

    fn folder(&mut self, name: &[u8]) -> Result<()> {
        let Some((folder, last, _)) = self.place(name)? else { return Ok(()) };
        match folder.make(&last) {
            Err(error) if is_in_the_way(&error) => {
                Err(unsafe_entry(name, "is in the place of another of its entries"))
            }
            other => other.map(drop),
        }
    }

    /// A later entry of the same name takes the place of the earlier, as tar has it; but never of a folder.
    fn fresh(&mut self, name: &[u8]) -> Result<Option<(Folder, OsString, Relative)>> {
        let Some((folder, last, path)) = self.place(name)? else {
            return Err(unsafe_entry(name, "has no name"));
        };
        match folder.look(&last)? {
            Some(Found { kind: Kind::Folder, .. }) => {
                Err(unsafe_entry(name, "is in the place of another of its entries"))
            }
            Some(_) => folder.unlink(&last).map(|()| Some((folder, last, path))),
            None => Ok(Some((folder, last, path))),
        }
    }

    fn file(
        &mut self,
        name: &[u8],
        executable: bool,
        modified: u64,
        from: &mut dyn Read,
        packed: &dyn Fn() -> u64,
    ) -> Result<()> {
        let Some((folder, last, _)) = self.fresh(name)? else { return Ok(()) };
        let mut file = folder.create(&last, executable)?;
        loop {
            let got = from.read(&mut self.piece).map_err(read_error)?;
            if got == 0 {
                break;
            }
            self.bytes += got as u64;
            self.packed = self.packed.max(packed());
            if self.bytes > RATIO_FROM && self.bytes / RATIO_MAX > self.packed {
                let message = format!(
                    "The archive becomes more than {RATIO_MAX} times its size; nothing was unpacked."
                );
                return Err(Told::io(Code::Unsafe, message));
            }
            self.budget.bytes(got as u64)?;
            file.write_all(&self.piece[..got])?;
        }
        if modified > 0 && modified < 1 << 35 {
            let at = UNIX_EPOCH + Duration::from_secs(modified);
            file.set_times(FileTimes::new().set_modified(at))?;
        }
        Ok(())
    }

    /// A symbolic link that leads to a place inside.
    fn link(&mut self, name: &[u8], target: &[u8]) -> Result<()> {
        let Some((folder, last, path)) = self.fresh(name)? else { return Ok(()) };
        let mut depth = path.0.len() as i64 - 1;
        let mut inside = !target.is_empty() && !target.starts_with(b"/") && !target.contains(&0);
        for part in target.split(|&b| b == b'/') {
            depth += match part {
                b"" | b"." => 0,
                b".." => -1,
                _ => 1,
            };
            inside &= depth >= 0;
        }
        if !inside {
            return Err(unsafe_entry(name, "is a link that leads out of the folder"));
        }
        folder.make_link(&last, OsStr::from_bytes(target))
    }

    /// A second name of a file becomes a copy of it: two names of one file would change together.
    fn again(&mut self, name: &[u8], target: &[u8]) -> Result<()> {
        let wrong = || unsafe_entry(name, "is a link to what is no earlier file of the archive");
        let source = Relative::of(target).ok_or_else(wrong)?;
        let open =
            source.folder(self.tree).ok().flatten().zip(source.split()).and_then(|(folder, (_, last))| {
                let found = folder.look(last).ok().flatten().filter(|found| found.kind == Kind::File)?;
                Some((folder.read(last).ok()?, found.executable))
            });
        let (mut file, executable) = open.ok_or_else(wrong)?;
        let modified = file.metadata()?.modified().ok().and_then(|it| it.duration_since(UNIX_EPOCH).ok());
        // A copy of what was counted costs nothing to send; the budget counts it all the same.
        self.file(name, executable, modified.map_or(0, |it| it.as_secs()), &mut file, &|| {
            u64::MAX / RATIO_MAX
        })
    }
}

/// A file that is written within a budget.
struct Within<'a> {
    file: File,
    budget: &'a mut Budget,
    bytes: &'a mut u64,
}

impl Write for Within<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.budget.bytes(bytes.len() as u64)?;
        self.file.write_all(bytes)?;
        *self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

fn too_many() -> std::io::Error {
    Told::io(Code::Full, format!("The archive has more than {ENTRIES_MAX} entries; nothing was unpacked."))
}

/// Counts what is read.
struct Counted<'a, 'b> {
    inner: &'a mut FramesIn<'b>,
    count: std::rc::Rc<std::cell::Cell<u64>>,
}

impl Read for Counted<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let got = self.inner.read(buffer)?;
        self.count.set(self.count.get() + got as u64);
        Ok(got)
    }
}
