//! `gaoler-files` alone, over folders of a test: what hostile archives, links and names come to without any cage
//! around it. It must never judge by the program's own word: a canary outside is looked at.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tar::{EntryType, Header};

const ID: &str = "11111111-1111-4111-8111-111111111111";
const OTHER: &str = "22222222-2222-4222-8222-222222222222";
const MIB: u64 = 1 << 20;

/// A tenant's folder, and a canary beside it.
struct Place {
    dir: tempfile::TempDir,
}

/// What came of a question.
#[derive(Debug)]
struct Told {
    answer: Value,
    bytes: Vec<u8>,
    whole: bool,
}

impl Told {
    fn code(&self) -> &str {
        self.answer["failed"]["code"].as_str().unwrap_or_else(|| panic!("no failure: {:?}", self.answer))
    }

    fn done(&self) -> &Value {
        let done = &self.answer["done"];
        assert!(done.is_object(), "{:?}", self.answer);
        done
    }
}

impl Place {
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().expect("a folder") };
        fs::create_dir_all(place.at("default")).expect("made");
        fs::create_dir(place.canary()).expect("made");
        fs::write(place.canary().join("secret"), "CANARY").expect("written");
        place
    }

    /// A place in the tenant's folder.
    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("tenant").join(path)
    }

    /// A place outside.
    fn canary(&self) -> PathBuf {
        self.dir.path().join("canary")
    }

    /// Everything below the own folder that is not a draft, and everything outside.
    fn all(&self) -> (BTreeMap<PathBuf, Vec<u8>>, BTreeMap<PathBuf, Vec<u8>>) {
        (files(&self.at("default")), files(&self.canary()))
    }

    fn ask(&self, question: Value, body: Option<&[u8]>) -> Told {
        self.ask_within(question, body, 1000 * MIB, 1_000_000)
    }

    fn ask_within(&self, mut question: Value, body: Option<&[u8]>, bytes: u64, entries: u64) -> Told {
        question["disk_bytes"] = bytes.into();
        question["disk_files"] = entries.into();
        if question.get("ttl_days").is_none() {
            question["ttl_days"] = 0.into();
        }
        let mut input = question.to_string().into_bytes();
        input.push(b'\n');
        if let Some(body) = body {
            for piece in body.chunks(60_000) {
                input.extend_from_slice(&(piece.len() as u32).to_le_bytes());
                input.extend_from_slice(piece);
            }
            input.extend_from_slice(&0u32.to_le_bytes());
        }
        self.send(input)
    }

    fn send(&self, input: Vec<u8>) -> Told {
        let mut child = Command::new(env!("CARGO_BIN_EXE_gaoler-files"))
            .current_dir(self.at(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program");
        let mut stdin = child.stdin.take().expect("a pipe");
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a line");
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest).expect("the rest");
        feeder.join().expect("fed");
        assert!(child.wait().expect("an end").code().is_some(), "it was killed");
        let answer = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let (mut bytes, mut whole, mut at) = (Vec::new(), false, 0);
        while let Some(length) = rest.get(at..at + 4) {
            let length = u32::from_le_bytes(length.try_into().expect("four")) as usize;
            at += 4;
            whole = length == 0;
            bytes.extend_from_slice(&rest[at..at + length]);
            at += length;
        }
        Told { answer, bytes, whole }
    }

    fn unpack(&self, archive: &[u8]) -> Told {
        self.ask(json!({"what": "unpack", "id": "default", "path": "", "format": "tar_gz"}), Some(archive))
    }
}

fn files(top: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(top).expect("a folder") {
        let path = entry.expect("an entry").path();
        let meta = fs::symlink_metadata(&path).expect("an inode");
        if meta.is_dir() {
            found.insert(path.clone(), b"folder".to_vec());
            found.extend(files(&path));
        } else if meta.is_symlink() {
            found.insert(path.clone(), fs::read_link(&path).expect("a link").as_os_str().as_bytes().to_vec());
        } else if meta.is_file() {
            found.insert(path.clone(), fs::read(&path).expect("read"));
        } else {
            found.insert(path, b"special".to_vec());
        }
    }
    found
}

/// An entry whose name is written as it is, whatever a library thinks of it.
fn entry(kind: EntryType, name: &[u8], target: &[u8], mode: u32, body: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(body.len() as u64);
    header.set_mtime(1_000_000_000);
    let raw = header.as_gnu_mut().expect("gnu");
    raw.name[..name.len()].copy_from_slice(name);
    raw.linkname[..target.len()].copy_from_slice(target);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes.resize(bytes.len().div_ceil(512) * 512, 0);
    bytes
}

fn file(name: &[u8], body: &[u8]) -> Vec<u8> {
    entry(EntryType::Regular, name, b"", 0o644, body)
}

fn tar_gz(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut gz = GzEncoder::new(Vec::new(), Compression::default());
    entries.iter().for_each(|entry| gz.write_all(entry).expect("packed"));
    gz.write_all(&[0; 1024]).expect("packed");
    gz.finish().expect("packed")
}

#[test]
fn t101_an_archive_writes_nothing_outside_of_its_folder() {
    let place = Place::new();
    fs::write(place.at("default/kept"), "kept").expect("written");
    let canary = place.canary().display().to_string();
    let absolute = format!("{canary}/new");
    let secret = format!("{canary}/secret");
    let link = |name: &[u8], target: &[u8]| entry(EntryType::Symlink, name, target, 0o777, b"");
    let hard = |name: &[u8], target: &[u8]| entry(EntryType::Link, name, target, 0o644, b"");
    let special = |kind: EntryType| entry(kind, b"special", b"", 0o666, b"");
    let good = file(b"good", b"good");
    let before = place.all();
    let hostile: &[&[Vec<u8>]] = &[
        &[file(b"../../canary/new", b"x")],
        &[file(b"a/../../../canary/new", b"x")],
        &[file(absolute.as_bytes(), b"x")],
        &[file(b"..", b"x")],
        &[file(b"a//b", b"x")],
        &[link(b"l", canary.as_bytes()), file(b"l/new", b"x")],
        &[link(b"l", b"../../canary")],
        &[link(b"d/l", b"../../../canary")],
        &[link(b"l", b"a/../../x")],
        &[link(b"l", b"d"), file(b"l/new", b"x")],
        &[link(b"l", secret.as_bytes())],
        &[hard(b"h", secret.as_bytes())],
        &[hard(b"h", b"../../canary/secret")],
        &[hard(b"h", b"nothing")],
        &[link(b"l", b"good"), hard(b"h", b"l")],
        &[special(EntryType::Char)],
        &[special(EntryType::Block)],
        &[special(EntryType::Fifo)],
        &[file(b"d/f", b"x"), file(b"d", b"x")],
        &[file(b"f", b"x"), file(b"f/g", b"x")],
    ];
    for entries in hostile {
        // The same archive with a good entry before it: all of it is refused.
        let archive = tar_gz(&[std::slice::from_ref(&good), entries].concat());
        let told = place.unpack(&archive);
        assert_eq!(told.code(), "unsafe", "{:?}", told.answer);
        assert_eq!(place.all(), before, "{:?}", told.answer);
    }
    assert_eq!(place.unpack(b"this is no archive").code(), "broken");
    assert_eq!(place.all(), before);
    // Nothing is wrong with the good one.
    assert_eq!(place.unpack(&tar_gz(&[good])).done()["entries"], 1);
    assert_eq!(fs::read(place.at("default/good")).expect("read"), b"good");
    assert_eq!(fs::read_dir(place.at(".drafts")).expect("drafts").count(), 0);
}

#[test]
fn t102_a_zip_writes_nothing_outside_of_its_folder() {
    let place = Place::new();
    let before = place.all();
    // Written by hand: no library writes such names.
    let zip = |name: &str, body: &[u8], mode: u32| -> Vec<u8> {
        let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .unix_permissions(0o644);
        let stand_in = "x".repeat(name.len());
        writer.start_file(&stand_in, options).expect("begun");
        writer.write_all(body).expect("written");
        let mut bytes = writer.finish().expect("packed").into_inner();
        for at in 0..bytes.len() - name.len() {
            if &bytes[at..at + name.len()] == stand_in.as_bytes() {
                bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
            }
        }
        // The mode is in the upper half of the external attributes of the list's entry.
        let list = bytes.windows(4).position(|it| it == b"PK\x01\x02").expect("a list");
        bytes[list + 38..list + 42].copy_from_slice(&(mode << 16).to_le_bytes());
        bytes
    };
    let ask = |archive: &[u8]| {
        place.ask(json!({"what": "unpack", "id": "default", "path": "in", "format": "zip"}), Some(archive))
    };
    for (name, mode) in [
        ("../../canary/new", 0o100_644),
        ("/canary/new", 0o100_644),
        ("link", 0o120_777),
        ("device", 0o020_666),
        ("pipe", 0o010_666),
    ] {
        let told = ask(&zip(name, b"../../canary/secret", mode));
        assert_eq!(told.code(), "unsafe", "{name}: {:?}", told.answer);
        assert_eq!(place.all(), before, "{name}");
    }
    assert_eq!(ask(b"PK\x05\x06 and nothing").code(), "broken");
    assert_eq!(ask(&zip("good", b"good", 0o104_755)).done()["entries"], 1);
    let good = fs::metadata(place.at("default/in/good")).expect("there");
    assert_eq!(good.permissions().mode() & 0o7777, 0o755, "setuid is not kept");
    assert_eq!(fs::read_dir(place.at(".drafts")).expect("drafts").count(), 0);
}

#[test]
fn t103_a_link_in_the_workspace_is_never_written_or_read_through() {
    let place = Place::new();
    symlink(place.canary(), place.at("default/out")).expect("a link");
    symlink(place.canary().join("secret"), place.at("default/file")).expect("a link");
    // It does lead there: without the program's care everything below would succeed.
    assert_eq!(fs::read(place.at("default/out/secret")).expect("read"), b"CANARY");
    let canary = files(&place.canary());
    let write =
        |path: &str| place.ask(json!({"what": "write_file", "id": "default", "path": path}), Some(b"evil"));
    let read = |path: &str| place.ask(json!({"what": "read_file", "id": "default", "path": path}), None);
    assert_eq!(write("out/new").code(), "conflict");
    assert_eq!(write("out/secret").code(), "conflict");
    assert_eq!(place.unpack(&tar_gz(&[file(b"out/new", b"evil")])).code(), "conflict");
    for path in ["out/secret", "file", "out"] {
        assert_eq!(read(path).code(), "no_file", "{path}");
    }
    for path in ["../../canary/secret", "..", "a/../../x", "%2e%2e/x", "/etc/passwd", "a%00b"] {
        assert_eq!(read(path).code(), "path", "{path}");
        assert_eq!(write(path).code(), "path", "{path}");
    }
    let tree =
        place.ask(json!({"what": "tree", "id": "default", "path": "out", "depth": 3, "limit": 10}), None);
    assert_eq!(tree.code(), "no_file");
    let tree = place.ask(json!({"what": "tree", "id": "default", "path": "", "depth": 9, "limit": 10}), None);
    assert_eq!(tree.done()["data"].as_array().expect("rows").len(), 2, "nothing behind the links: {tree:?}");
    // What is packed are the links, not what lies behind them.
    let packed = place.ask(json!({"what": "pack", "id": "default", "format": "tar_gz"}), None);
    assert!(packed.whole && !String::from_utf8_lossy(&unzipped(&packed.bytes)).contains("CANARY"));
    let dropped = place.ask(json!({"what": "drop_file", "id": "default", "path": "out/secret"}), None);
    assert_eq!(dropped.code(), "no_file");
    // In the place of a link itself a file may be put; and a link may be removed.
    assert_eq!(write("file").done()["created"], false);
    assert_eq!(fs::read(place.at("default/file")).expect("read"), b"evil");
    place.ask(json!({"what": "drop_file", "id": "default", "path": "out"}), None).done();
    assert_eq!(files(&place.canary()), canary);
    for id in ["..", ".drafts", "../canary", "", "/etc", ".snapshots"] {
        assert_eq!(
            place.ask(json!({"what": "drop_workspace", "id": id}), None).code(),
            "no_workspace",
            "{id}"
        );
    }
    assert_eq!(files(&place.canary()), canary);
}

fn unzipped(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    flate2::read::GzDecoder::new(bytes).read_to_end(&mut out).expect("whole");
    out
}

#[test]
fn t104_modes_are_our_own_and_a_second_name_is_a_copy() {
    let place = Place::new();
    let with = |name: &[u8], mode: u32| entry(EntryType::Regular, name, b"", mode, b"x");
    let folder = entry(EntryType::Directory, b"shut", b"", 0, b"");
    let archive = tar_gz(&[
        with(b"setuid", 0o6755),
        with(b"open", 0o777),
        with(b"none", 0),
        folder,
        with(b"shut/in", 0o600),
        entry(EntryType::Link, b"again", b"open", 0, b""),
        entry(EntryType::Symlink, b"inside", b"shut/in", 0, b""),
    ]);
    place.unpack(&archive).done();
    let mode = |name: &str| {
        let at = place.at("default").join(name);
        fs::symlink_metadata(at).expect("there").permissions().mode() & 0o7777
    };
    assert_eq!((mode("setuid"), mode("open"), mode("none")), (0o755, 0o755, 0o644));
    assert_eq!((mode("shut"), mode("shut/in"), mode("again")), (0o755, 0o644, 0o755));
    fs::write(place.at("default/open"), "changed").expect("written");
    assert_eq!(fs::read(place.at("default/again")).expect("read"), b"x");
    assert_eq!(fs::read(place.at("default/inside")).expect("read"), b"x");
    let old = fs::metadata(place.at("default/setuid")).expect("there").modified().expect("a time");
    assert_eq!(old, SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000));
}

#[test]
fn t105_a_bomb_ends_at_its_bound_and_leaves_nothing() {
    let place = Place::new();
    let before = place.all();
    let zeros = vec![0; 24 << 20];
    let bomb = tar_gz(&[file(b"zeros", &zeros)]);
    assert!(bomb.len() < 60 << 10, "{}", bomb.len());
    let question = || json!({"what": "unpack", "id": "default", "path": "", "format": "tar_gz"});
    assert_eq!(place.ask_within(question(), Some(&bomb), 10 * MIB, 1000).code(), "full");
    assert_eq!(place.ask(question(), Some(&bomb)).code(), "unsafe", "more than 250 times its size");
    let many: Vec<Vec<u8>> = (0..300).map(|n| file(format!("d{n}/f").as_bytes(), b"")).collect();
    assert_eq!(place.ask_within(question(), Some(&tar_gz(&many)), 10 * MIB, 300).code(), "full");
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    writer.start_file("zeros", zip::write::SimpleFileOptions::default()).expect("begun");
    writer.write_all(&zeros).expect("written");
    let zip = writer.finish().expect("packed").into_inner();
    let question = || json!({"what": "unpack", "id": "default", "path": "", "format": "zip"});
    assert_eq!(place.ask_within(question(), Some(&zip), 10 * MIB, 1000).code(), "full");
    assert_eq!(place.ask(question(), Some(&zip)).code(), "unsafe");
    let write = json!({"what": "write_file", "id": "default", "path": "big"});
    assert_eq!(place.ask_within(write, Some(&zeros), 10 * MIB, 1000).code(), "full");
    assert_eq!(place.all(), before);
    assert_eq!(fs::read_dir(place.at(".drafts")).expect("drafts").count(), 0);
    // As many as fit, do.
    let question = || json!({"what": "unpack", "id": "default", "path": "", "format": "tar_gz"});
    assert_eq!(place.ask_within(question(), Some(&tar_gz(&many)), 10 * MIB, 700).done()["entries"], 300);
}

#[test]
fn t106_what_breaks_off_changes_nothing() {
    let place = Place::new();
    fs::write(place.at("default/f"), "old").expect("written");
    let before = place.all();
    for what in ["write_file", "unpack"] {
        let question = json!({
            "what": what, "id": "default", "path": "f", "format": "tar_gz", "disk_bytes": MIB, "disk_files": 100,
            "ttl_days": 0,
        });
        let archive = tar_gz(&[file(b"x", &[7; 100_000])]);
        let mut input = format!("{question}\n").into_bytes();
        input.extend_from_slice(&(archive.len() as u32).to_le_bytes());
        input.extend_from_slice(&archive);
        // Everything but the last frame; a part of a frame; a frame that is longer than one may be.
        for (cut, more) in [(0, &b""[..]), (10, b""), (0, &[255, 255, 255, 0, 1])] {
            let mut input = input[..input.len() - cut].to_vec();
            input.extend_from_slice(more);
            let told = place.send(input);
            assert_eq!(told.code(), "cut", "{what}: {:?}", told.answer);
            assert_eq!(place.all(), before, "{what}");
        }
    }
    assert_eq!(fs::read_dir(place.at(".drafts")).expect("drafts").count(), 0);
    // What somebody was killed over is cleared away by the next.
    fs::create_dir_all(place.at(".drafts/left/deep")).expect("made");
    place.ask(json!({"what": "write_file", "id": "default", "path": "f"}), Some(b"new")).done();
    assert_eq!(fs::read(place.at("default/f")).expect("read"), b"new");
    assert_eq!(fs::read_dir(place.at(".drafts")).expect("drafts").count(), 0);
}

#[test]
fn t122_a_form_writes_its_files_and_nothing_outside_of_its_folder() {
    let place = Place::new();
    let form = |name: &str| -> Vec<u8> {
        format!(
            "--XX\r\ncontent-disposition: form-data; name=\"f\"; filename=\"{name}\"\r\n\r\nnew\r\n--XX--\r\n"
        )
        .into_bytes()
    };
    let ask = |body: &[u8], bytes: u64| {
        let question =
            json!({"what": "unpack", "id": "default", "path": "in", "format": "form", "boundary": "XX"});
        place.ask_within(question, Some(body), bytes, 100)
    };
    let before = place.all();
    for name in ["../../canary/secret", "/etc/x", "..", "a/../../../canary/secret"] {
        assert_eq!(ask(&form(name), MIB).code(), "unsafe", "{name}");
        assert_eq!(place.all(), before, "{name}");
    }
    assert_eq!(ask(&form("f")[..60], MIB).code(), "broken");
    assert_eq!(ask(&form("f"), 2).code(), "full");
    assert_eq!(place.all(), before);
    assert_eq!(ask(&form("a/f"), MIB).done()["bytes"], 3);
    assert_eq!(fs::read(place.at("default/in/a/f")).expect("read"), b"new");
}

#[test]
fn t107_names_that_are_no_text_come_and_go() {
    let place = Place::new();
    place.unpack(&tar_gz(&[file(b"caf\xe9", b"coffee"), file(b"new\nline", b"n")])).done();
    let tree = place.ask(json!({"what": "tree", "id": "default", "path": "", "depth": 1, "limit": 10}), None);
    let rows = tree.done()["data"].as_array().expect("rows").clone();
    assert_eq!(rows[0]["address"], "caf%E9", "{rows:?}");
    assert_eq!(rows[1]["path"], "new\nline");
    let read = |path: &str| place.ask(json!({"what": "read_file", "id": "default", "path": path}), None);
    assert_eq!(read("caf%E9").bytes, b"coffee");
    assert_eq!(read("new%0Aline").bytes, b"n");
    let packed = place.ask(json!({"what": "pack", "id": "default", "format": "tar_gz"}), None);
    let other = Place::new();
    other.unpack(&packed.bytes).done();
    assert!(fs::read(other.at("default").join(OsStr::from_bytes(b"caf\xe9"))).is_ok());
}

#[test]
fn t108_what_was_packed_is_unpacked_as_it_was_and_a_snapshot_is_whole() {
    let place = Place::new();
    fs::create_dir_all(place.at("default/a/b")).expect("made");
    fs::write(place.at("default/a/b/c"), "one\ntwo\n").expect("written");
    fs::write(place.at("default/run"), "#!/bin/sh\n").expect("written");
    fs::set_permissions(place.at("default/run"), fs::Permissions::from_mode(0o755)).expect("a mode");
    symlink("a/b/c", place.at("default/link")).expect("a link");
    for format in ["tar_gz", "zip"] {
        let packed = place.ask(json!({"what": "pack", "id": "default", "format": format}), None);
        assert!(packed.whole, "{format}");
        let other = Place::new();
        other
            .ask(
                json!({"what": "unpack", "id": "default", "path": "", "format": format}),
                Some(&packed.bytes),
            )
            .done();
        let relative = |place: &Place| {
            let all = place.all().0.into_iter();
            let top = place.at("default");
            all.map(|(path, bytes)| (path.strip_prefix(&top).expect("below").to_owned(), bytes))
                .collect::<Vec<_>>()
        };
        assert_eq!(relative(&other), relative(&place), "{format}");
        let mode = fs::metadata(other.at("default/run")).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o755, "{format}");
        let time = |place: &Place| {
            let time = fs::metadata(place.at("default/run")).expect("there").modified().expect("a time");
            time.duration_since(SystemTime::UNIX_EPOCH).expect("later").as_secs()
        };
        // A zip archive counts by two seconds.
        assert!(time(&place).abs_diff(time(&other)) < 2, "{format}");
    }
    let before = place.all();
    place.ask(json!({"what": "make_snapshot", "id": "default", "new": ID, "title": "first"}), None).done();
    fs::write(place.at("default/a/b/c"), "one\n2\n").expect("written");
    fs::remove_file(place.at("default/run")).expect("removed");
    fs::write(place.at("default/added"), [0, 1, 2]).expect("written");
    let diff = place.ask(json!({"what": "diff", "id": "default", "from": ID, "unified": false}), None);
    let rows: Vec<_> = diff.done()["data"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| (&row["path"], &row["status"]))
        .collect();
    let (a, c, r) = (json!("added"), json!("changed"), json!("removed"));
    assert_eq!(rows, [(&json!("a/b/c"), &c), (&json!("added"), &a), (&json!("run"), &r)]);
    let diff = place.ask(json!({"what": "diff", "id": "default", "from": ID, "unified": true}), None);
    let text = String::from_utf8(diff.bytes).expect("text");
    assert!(text.contains("--- a/a/b/c\n+++ b/a/b/c\n") && text.contains("-two\n+2\n"), "{text}");
    assert!(text.contains("Binary files /dev/null and b/added differ"), "{text}");
    place.ask(json!({"what": "restore", "id": "default", "snapshot": ID}), None).done();
    assert_eq!(place.all(), before);
    assert_eq!(
        place.ask(json!({"what": "restore", "id": "default", "snapshot": OTHER}), None).code(),
        "no_snapshot"
    );
    let full = place.ask_within(
        json!({"what": "make_snapshot", "id": "default", "new": OTHER, "title": null}),
        None,
        4096,
        9,
    );
    assert_eq!(full.code(), "full");
    place.ask(json!({"what": "drop_snapshot", "id": "default", "snapshot": ID}), None).done();
    assert_eq!(
        place.ask(json!({"what": "diff", "id": "default", "from": ID, "unified": true}), None).code(),
        "no_snapshot"
    );
}

#[test]
fn t109_what_a_run_holds_stays() {
    let place = Place::new();
    fs::create_dir(place.at(ID)).expect("made");
    let said = line("user", json!({"role": "user", "content": "hello"}));
    fs::write(place.at(ID).join(format!("{ID}.jsonl")), said).expect("written");
    let lock = |path: &str, shared: bool| {
        let file = fs::File::open(place.at(path)).expect("open");
        if shared { file.lock_shared() } else { file.lock() }.expect("locked");
        file
    };
    let held = lock(ID, false);
    for question in [
        json!({"what": "drop_session", "id": ID}),
        json!({"what": "fork_session", "id": ID, "new": OTHER, "title": null}),
    ] {
        assert_eq!(place.ask(question, None).code(), "busy");
    }
    assert_eq!(place.ask(json!({"what": "session", "id": ID}), None).done()["running"], true);
    drop(held);
    assert_eq!(place.ask(json!({"what": "session", "id": ID}), None).done()["running"], false);
    place.ask(json!({"what": "drop_session", "id": ID}), None).done();
    assert_eq!(place.ask(json!({"what": "session", "id": ID}), None).code(), "no_session");

    place.ask(json!({"what": "make_snapshot", "id": "default", "new": ID, "title": null}), None).done();
    let held = lock("default", true);
    for question in [
        json!({"what": "drop_workspace", "id": "default"}),
        json!({"what": "restore", "id": "default", "snapshot": ID}),
    ] {
        assert_eq!(place.ask(question, None).code(), "busy");
    }
    drop(held);
    place.ask(json!({"what": "restore", "id": "default", "snapshot": ID}), None).done();
    place.ask(json!({"what": "drop_workspace", "id": "default"}), None).done();
}

/// A transcript's line, as the CLI writes it.
fn line(kind: &str, message: Value) -> String {
    let line = json!({
        "type": kind, "sessionId": ID, "uuid": OTHER, "timestamp": "2026-01-02T03:04:05.678Z", "isSidechain": false,
        "message": message,
    });
    format!("{line}\n")
}

#[test]
fn t110_a_transcript_is_a_claim_and_is_read_within_its_bounds() {
    let place = Place::new();
    fs::create_dir(place.at(ID)).expect("made");
    let path = place.at(ID).join(format!("{ID}.jsonl"));
    let quote = format!("he said \"{ID}\" and left");
    let text = [
        line("user", json!({"role": "user", "content": quote})),
        "nonsense\n{\"type\":7}\n[]\n".to_owned(),
        line(
            "assistant",
            json!({"id": "m1", "role": "assistant", "content": [{"type": "text", "text": "a"}]}),
        ),
        line(
            "assistant",
            json!({"id": "m1", "role": "assistant", "content": [{"type": "tool_use", "id": "t"}]}),
        ),
        line("user", json!({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}, 7]})),
        line("user", json!({"role": "assistant", "content": "a lie"})),
        line(
            "assistant",
            json!({"id": "m2", "role": "assistant", "content": [{"type": "text", "text": "b"}]}),
        ),
        "{\"type\":\"user\",\"message\":{\"role\":\"user\",\"content\":\"cut".to_owned(),
    ];
    fs::write(&path, text.concat()).expect("written");
    let session = place.ask(json!({"what": "session", "id": ID}), None);
    assert_eq!(
        (&session.done()["turns"], &session.done()["created_at"]),
        (&json!(1), &json!("2026-01-02T03:04:05Z"))
    );
    let said = |limit: u32, offset: u32| {
        place
            .ask(json!({"what": "transcript", "id": ID, "limit": limit, "offset": offset}), None)
            .done()
            .clone()
    };
    let all = said(100, 0);
    let roles: Vec<_> = all["data"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["role"].as_str().expect("a role"))
        .collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"], "{all}");
    assert_eq!(all["data"][1]["content"].as_array().expect("blocks").len(), 2, "{all}");
    assert_eq!((&said(1, 1)["data"][0], &said(1, 1)["has_more"]), (&all["data"][1], &json!(true)));
    assert_eq!(
        (said(2, 2)["data"].as_array().map(Vec::len), &said(2, 2)["has_more"]),
        (Some(2), &json!(false))
    );
    assert_eq!(said(2, 9)["data"], json!([]));

    // The fork's lines are the fork's; what somebody said stays as it was.
    fs::create_dir_all(place.at(ID).join(ID).join("tool-results")).expect("made");
    fs::write(place.at(ID).join(ID).join("tool-results/1.txt"), "large").expect("written");
    symlink(OTHER, place.at(&format!("{ID}.workspace"))).expect("a note");
    let fork = place.ask(json!({"what": "fork_session", "id": ID, "new": OTHER, "title": "copy"}), None);
    assert_eq!((&fork.done()["title"], &fork.done()["workspace_id"]), (&json!("copy"), &json!(OTHER)));
    let copied = fs::read_to_string(place.at(OTHER).join(format!("{OTHER}.jsonl"))).expect("there");
    assert!(
        !copied.contains(&format!("\"sessionId\":\"{ID}\""))
            && copied.contains(&format!("\\\"{ID}\\\" and left"))
    );
    assert!(copied.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{copied}");
    assert_eq!(fs::read(place.at(OTHER).join(OTHER).join("tool-results/1.txt")).expect("there"), b"large");
    assert_eq!(fs::metadata(place.at(OTHER)).expect("there").permissions().mode() & 0o777, 0o700);
    let again = place.ask(json!({"what": "fork_session", "id": ID, "new": OTHER, "title": null}), None);
    assert_eq!(again.code(), "conflict");

    // A transcript that is a link, or a pipe, is none.
    fs::remove_file(&path).expect("removed");
    symlink(place.canary().join("secret"), &path).expect("a link");
    assert_eq!(
        place.ask(json!({"what": "transcript", "id": ID, "limit": 1, "offset": 0}), None).code(),
        "unreadable"
    );
    fs::remove_file(&path).expect("removed");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let session = place.ask(json!({"what": "session", "id": ID}), None);
    assert_eq!(session.done()["unreadable"], "transcript_is_special");
    let list = place.ask(json!({"what": "sessions", "limit": 100, "after": null}), None);
    assert_eq!(list.done()["data"].as_array().map(Vec::len), Some(2), "{list:?}");
    for id in ["..", "default", "../canary", "", "11111111-1111-4111-8111-11111111111G"] {
        assert_eq!(place.ask(json!({"what": "session", "id": id}), None).code(), "no_session", "{id}");
        assert_eq!(place.ask(json!({"what": "drop_session", "id": id}), None).code(), "no_session", "{id}");
    }
}

#[test]
fn t111_a_session_that_nobody_uses_goes_and_one_with_a_run_stays() {
    let place = Place::new();
    let old = SystemTime::now() - Duration::from_secs(3 * 24 * 3600);
    for id in [ID, OTHER] {
        fs::create_dir(place.at(id)).expect("made");
        let path = place.at(id).join(format!("{id}.jsonl"));
        fs::write(&path, "{}\n").expect("written");
        fs::File::options().write(true).open(&path).expect("open").set_modified(old).expect("a time");
    }
    let sweep =
        |days: u32| place.ask(json!({"what": "sweep", "ttl_days": days}), None).done()["removed"].clone();
    assert_eq!((sweep(0), sweep(4)), (json!(0), json!(0)));
    // Of those that somebody knows it says which are not there.
    let gone = |days: u32| {
        let known = json!([ID, OTHER, "33333333-3333-4333-8333-333333333333", "../canary"]);
        place.ask(json!({"what": "sweep", "ttl_days": days, "known": known}), None).done()["gone"].clone()
    };
    assert_eq!(gone(0), json!(["33333333-3333-4333-8333-333333333333", "../canary"]));
    let held = fs::File::open(place.at(OTHER)).expect("open");
    held.lock().expect("locked");
    assert_eq!(place.ask(json!({"what": "session", "id": ID, "ttl_days": 2}), None).code(), "no_session");
    assert!(!place.at(ID).exists() && place.at(OTHER).exists());
    assert_eq!(gone(2), json!([ID, "33333333-3333-4333-8333-333333333333", "../canary"]));
    drop(held);
    assert_eq!(sweep(2), 1);
    assert!(!place.at(OTHER).exists());
}

#[test]
fn t112_no_depth_and_no_mode_keeps_a_folder_from_being_listed_packed_or_removed() {
    let place = Place::new();
    let mut deep = place.at("default/deep");
    fs::create_dir(&deep).expect("made");
    for _ in 0..900 {
        deep.push("d");
        fs::create_dir(&deep).expect("made");
    }
    fs::create_dir(place.at("default/shut")).expect("made");
    fs::write(place.at("default/shut/f"), "x").expect("written");
    fs::set_permissions(place.at("default/shut"), fs::Permissions::from_mode(0o000)).expect("a mode");
    let question = json!({"what": "tree", "id": "default", "path": "", "depth": 100, "limit": 10000});
    let tree = place.ask(question, None);
    assert_eq!(tree.done()["data"].as_array().map(Vec::len), Some(102), "a hundred levels, and what is shut");
    let packed = place.ask(json!({"what": "pack", "id": "default", "format": "tar_gz"}), None);
    assert!(packed.whole);
    place.ask(json!({"what": "drop_file", "id": "default", "path": "deep"}), None).done();
    place.ask(json!({"what": "drop_file", "id": "default", "path": "shut"}), None).done();
    assert_eq!(fs::read_dir(place.at("default")).expect("a folder").count(), 0);
}

/// A session that says something, with its folder.
fn session(place: &Place, id: &str) -> PathBuf {
    fs::create_dir(place.at(id)).expect("made");
    let path = place.at(id).join(format!("{id}.jsonl"));
    fs::write(&path, line("user", json!({"role": "user", "content": "hello"}))).expect("written");
    path
}

fn rows(place: &Place) -> Vec<Value> {
    let list = place.ask(json!({"what": "sessions", "limit": 100, "after": null}), None);
    list.done()["data"].as_array().expect("rows").clone()
}

/// Sets times as an agent can: of a file, a folder, or a link itself.
fn aged(path: &Path, seconds: i64) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_secs() as i64;
    let time = nix::sys::time::TimeSpec::new(now + seconds, 0);
    let flag = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, flag).expect("times");
}

/// Leaves something at a path.
type Leave<'a> = Box<dyn Fn(&Path) + 'a>;

/// What an agent can leave in its transcript's place, or of it.
fn leavings(place: &Place) -> Vec<(&'static str, Leave<'_>)> {
    let text = |bytes: &'static [u8]| move |path: &Path| fs::write(path, bytes).expect("written");
    vec![
        (
            "transcript_is_folder",
            Box::new(|path| {
                fs::create_dir(path).expect("made");
                fs::write(path.join("big"), vec![7; 5 << 20]).expect("written");
            }),
        ),
        (
            "transcript_is_link",
            Box::new(|path| symlink(place.canary().join("secret"), path).expect("a link")),
        ),
        ("transcript_is_link", Box::new(|path| symlink("nowhere", path).expect("a link"))),
        (
            "transcript_is_special",
            Box::new(|path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe")),
        ),
        (
            "transcript_is_special",
            Box::new(|path| drop(std::os::unix::net::UnixListener::bind(path).expect("a socket"))),
        ),
        (
            "transcript_is_closed",
            Box::new(|path| {
                fs::write(path, line("user", json!({"role": "user", "content": "x"}))).expect("written");
                fs::set_permissions(path, fs::Permissions::from_mode(0o0)).expect("a mode");
            }),
        ),
        (
            "transcript_is_too_large",
            Box::new(|path| fs::File::create(path).and_then(|it| it.set_len(1 << 40)).expect("sparse")),
        ),
        ("transcript_says_nothing", Box::new(text(b"no JSON\n[]\n{}\n"))),
        ("transcript_says_nothing", Box::new(text(b"\0\0\0\0\n\0\0\xff\xfe\n"))),
        (
            "transcript_says_nothing",
            // One line that does not end.
            Box::new(|path| fs::write(path, vec![b'x'; 41 << 20]).expect("written")),
        ),
        (
            "transcript_says_nothing",
            // As many values as a line holds: a reader that made something of each would need thirty times as much.
            Box::new(|path| {
                let text = format!(
                    "{{\"type\":\"user\",\"message\":{{\"role\":\"user\",\"content\":[{}0]}}}}\n",
                    "[],".repeat(1 << 20)
                );
                fs::write(path, text).expect("written");
            }),
        ),
    ]
}

#[test]
fn b08_whatever_an_agent_leaves_of_a_session_is_listed_counted_told_and_deleted() {
    let probe = Place::new();
    for (number, (why, leave)) in leavings(&probe).into_iter().enumerate() {
        let place = Place::new();
        let canary = files(&probe.canary());
        let path = session(&place, ID);
        session(&place, OTHER);
        // The control: as it was it is read.
        let ask = |what: &str| {
            let rest = json!({"what": what, "id": ID, "limit": 1, "offset": 0, "new": "33333333-3333-4333-8333-333333333333", "title": "x"});
            place.ask(rest, None)
        };
        assert_eq!(ask("transcript").done()["data"].as_array().map(Vec::len), Some(1));
        fs::remove_file(&path).expect("removed");
        leave(&path);
        let row = ask("session").done().clone();
        assert_eq!(row["unreadable"], why, "{number}: {row}");
        let row = rows(&place).into_iter().find(|row| row["id"] == ID).expect("it is listed");
        assert_eq!(row["unreadable"], why, "{number}");
        assert_eq!(rows(&place).len(), 2, "{number}: its neighbour is listed too");
        if number == 0 {
            assert!(row["disk_bytes"].as_u64().is_some_and(|bytes| bytes > 5 << 20), "{row}");
        }
        for what in ["transcript", "fork_session"] {
            let told = ask(what);
            assert_eq!(told.code(), "unreadable", "{number} {what}: {told:?}");
            let message = told.answer["failed"]["message"].as_str().expect("a message");
            assert!(message.contains("DELETE"), "{message}");
        }
        assert_eq!(ask("name_session").done()["title"], "x");
        assert_eq!(ask("drop_session").done(), &json!({"id": ID, "deleted": true, "remains": false}));
        assert_eq!(ask("session").code(), "no_session");
        let left: Vec<_> =
            fs::read_dir(place.at("")).expect("a folder").flatten().map(|it| it.file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().contains(ID)), "{number}: {left:?}");
        assert_eq!(fs::read_dir(place.at(".drafts")).expect("drafts").count(), 0, "{number}");
        assert_eq!(files(&probe.canary()), canary, "{number}");
    }
}

#[test]
fn b08_what_lies_in_place_of_a_sessions_folder_or_notes_is_listed_and_deleted_too() {
    let place = Place::new();
    let drop_it = || place.ask(json!({"what": "drop_session", "id": ID}), None);
    let leave: [&dyn Fn(); 3] = [
        &|| fs::write(place.at(ID), "a file").expect("written"),
        &|| symlink(place.canary(), place.at(ID)).expect("a link"),
        &|| nix::unistd::mkfifo(&place.at(ID), nix::sys::stat::Mode::S_IRWXU).expect("a pipe"),
    ];
    for leave in leave {
        leave();
        assert_eq!(rows(&place)[0]["unreadable"], "no_folder");
        let told = place.ask(json!({"what": "transcript", "id": ID, "limit": 1, "offset": 0}), None);
        assert_eq!(told.code(), "unreadable");
        drop_it().done();
        assert!(rows(&place).is_empty() && fs::symlink_metadata(place.at(ID)).is_err());
    }
    assert_eq!(fs::read(place.canary().join("secret")).expect("there"), b"CANARY");
    // A folder in the place of each note.
    session(&place, ID);
    for note in ["workspace", "note", "note.new"] {
        fs::create_dir_all(place.at(&format!("{ID}.{note}/full"))).expect("made");
        fs::set_permissions(place.at(&format!("{ID}.{note}")), fs::Permissions::from_mode(0o0))
            .expect("a mode");
    }
    assert_eq!(rows(&place)[0]["workspace_id"], "default");
    let named = place.ask(json!({"what": "name_session", "id": ID, "title": "x"}), None);
    assert_eq!(named.done()["title"], "x");
    drop_it().done();
    assert_eq!(fs::read_dir(place.at("")).expect("a folder").count(), 2, "default, and where drafts are");
    // A session that never said anything, or lost all of it, is begun anew by its next turn: so it is no broken one.
    fs::create_dir_all(place.at(ID).join("left")).expect("made");
    fs::write(place.at(ID).join("left/big"), vec![7; 3 << 20]).expect("written");
    let row = rows(&place)[0].clone();
    assert_eq!((&row["unreadable"], &row["turns"], &row["bytes"]), (&Value::Null, &json!(0), &json!(0)));
    assert!(row["disk_bytes"].as_u64().is_some_and(|bytes| bytes > 3 << 20), "{row}");
    drop_it().done();
    assert!(rows(&place).is_empty());
}

#[test]
fn b08_no_leaving_and_no_time_that_an_agent_sets_keeps_a_session_from_its_days() {
    let probe = Place::new();
    for (number, (_, leave)) in leavings(&probe).into_iter().enumerate() {
        let place = Place::new();
        let path = session(&place, ID);
        fs::remove_file(&path).expect("removed");
        leave(&path);
        aged(&path, -3 * 24 * 3600);
        let swept = place.ask(json!({"what": "sweep", "ttl_days": 2, "known": [ID]}), None);
        assert_eq!(swept.done(), &json!({"removed": 1, "gone": [ID], "remains": false}), "{number}");
    }
    let place = Place::new();
    // One that was never begun ages by its folder.
    fs::create_dir(place.at(ID)).expect("made");
    aged(&place.at(ID), -3 * 24 * 3600);
    assert_eq!(place.ask(json!({"what": "sweep", "ttl_days": 2}), None).done()["removed"], 1);
    // What an agent says of the future is taken for now: it is not the last one for ever.
    let ahead = session(&place, ID);
    aged(&ahead, 50 * 365 * 24 * 3600);
    assert!(fs::metadata(&ahead).expect("there").modified().expect("a time") > SystemTime::now());
    let year = rows(&place)[0]["last_used_at"].as_str().expect("a time")[..4].parse::<i32>().expect("a year");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_secs();
    assert!((i64::from(year) - 1970) * 365 * 24 * 3600 <= now as i64, "{year}");
}

#[test]
fn b08_a_session_of_very_many_files_goes_at_once_and_is_removed_by_and_by() {
    let place = Place::new();
    session(&place, ID);
    let count = 120_000u64;
    let folder = place.at(ID).join("many");
    fs::create_dir(&folder).expect("made");
    let one = folder.join("0");
    fs::write(&one, "").expect("written");
    for number in 1..count {
        // Names of one file, as an ext4 has at most 65,000 of each.
        let one = folder.join((number / 60_000 * 60_000).to_string());
        let path = folder.join(number.to_string());
        fs::hard_link(&one, &path).or_else(|_| fs::write(&path, "")).expect("made");
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o500)).expect("a mode");
    let taken = place.ask(json!({"what": "usage"}), None).done()["files"].as_u64().expect("a number");
    assert!(taken > count, "{taken}");
    let mut remains = place.ask(json!({"what": "drop_session", "id": ID}), None).done()["remains"].clone();
    assert!(rows(&place).is_empty());
    let mut rounds = 0;
    while remains == json!(true) {
        remains = place.ask(json!({"what": "clean"}), None).done()["remains"].clone();
        rounds += 1;
        assert!(rounds < 100, "it goes on");
    }
    assert_eq!(fs::read_dir(place.at(".drafts")).expect("drafts").count(), 0);
}

#[test]
fn b08_what_a_removal_left_is_counted_and_goes_with_the_next_request() {
    let place = Place::new();
    session(&place, ID);
    // As a removal leaves it that was cut off, of this version and of the one before.
    for left in [".drafts/7-7", ".gone-x"] {
        fs::create_dir_all(place.at(left).join("deep/deeper")).expect("made");
        fs::write(place.at(left).join("deep/big"), vec![7; 2 << 20]).expect("written");
        fs::set_permissions(place.at(left).join("deep"), fs::Permissions::from_mode(0o0)).expect("a mode");
    }
    let taken = place.ask(json!({"what": "usage"}), None).done()["bytes"].as_u64().expect("a number");
    assert!(taken > 4 << 20, "{taken}");
    assert_eq!(rows(&place).len(), 1);
    assert_eq!(fs::read_dir(place.at(".drafts")).expect("drafts").count(), 0);
    assert!(!place.at(".gone-x").exists());
}

#[test]
fn r20_a_fork_is_not_swept_midway_by_another_request() {
    let place = Place::new();
    let path = session(&place, ID);
    let beside = place.at(ID).join(ID);
    fs::create_dir_all(&beside).expect("made");
    fs::write(beside.join("result"), "large").expect("written");
    let text = line("user", json!({"role": "user", "content": "x".repeat(1000)})).repeat(20_000);
    fs::write(&path, &text).expect("written");
    let mut child = Command::new(env!("CARGO_BIN_EXE_gaoler-files"))
        .current_dir(place.at(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program");
    let fork = json!({
        "what": "fork_session", "id": ID, "new": OTHER, "title": null, "disk_bytes": 1000 * MIB, "disk_files": 1000, "ttl_days": 0,
    });
    child.stdin.take().expect("a pipe").write_all(format!("{fork}\n").as_bytes()).expect("asked");
    // It is stopped where its copy has begun and is not whole.
    let begun = |top: &Path| files(top).keys().any(|it| it.ends_with(format!("{OTHER}.jsonl")));
    while !begun(&place.at("")) {
        assert!(child.try_wait().expect("a child").is_none(), "it ended before its copy was seen");
    }
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("stopped");
    assert!(!place.at(OTHER).exists(), "it is midway");
    // Every request about sessions sweeps.
    place.ask(json!({"what": "sweep", "ttl_days": 9}), None).done();
    assert_eq!(rows(&place).len(), 1);
    session(&place, "33333333-3333-4333-8333-333333333333");
    let drop_other = json!({"what": "drop_session", "id": "33333333-3333-4333-8333-333333333333"});
    place.ask(drop_other, None).done();
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).expect("goes on");
    let output = child.wait_with_output().expect("an end");
    let told: Value = serde_json::from_slice(&output.stdout).expect("an answer");
    assert_eq!(told["done"]["id"], OTHER, "{told}");
    assert_eq!(fs::read(place.at(OTHER).join(OTHER).join("result")).expect("there"), b"large");
    let copied = fs::read_to_string(place.at(OTHER).join(format!("{OTHER}.jsonl"))).expect("there");
    assert_eq!(copied.lines().count(), 20_000);
    assert_eq!(fs::read_dir(place.at(".drafts")).expect("drafts").count(), 0);
}

#[test]
fn b08_a_fork_keeps_to_its_tenants_part_of_the_disk() {
    let place = Place::new();
    let path = session(&place, ID);
    let said = line("user", json!({"role": "user", "content": "x".repeat(1000)}));
    fs::write(&path, said.repeat(3000)).expect("written");
    let fork = json!({"what": "fork_session", "id": ID, "new": OTHER, "title": null});
    assert_eq!(place.ask_within(fork.clone(), None, 5 * MIB, 100).code(), "full");
    assert!(!place.at(OTHER).exists() && rows(&place).len() == 1);
    // What lies elsewhere is of the same part.
    let mut elsewhere = fork.clone();
    elsewhere["elsewhere"] = json!({"bytes": 5 * MIB, "files": 1});
    assert_eq!(place.ask_within(elsewhere, None, 9 * MIB, 100).code(), "full");
    assert_eq!(place.ask_within(fork, None, 9 * MIB, 100).done()["id"], OTHER);
}

#[test]
fn b08_a_list_of_very_many_sessions_is_paged_and_takes_little_memory() {
    let place = Place::new();
    let count = 1_500;
    let id = |number: usize| format!("{number:08x}-1111-4111-8111-111111111111");
    for number in 0..count {
        session(&place, &id(number));
    }
    let (mut seen, mut after) = (std::collections::BTreeSet::new(), Value::Null);
    loop {
        let page = place.ask(json!({"what": "sessions", "limit": 100, "after": after}), None);
        let page = page.done();
        let rows = page["data"].as_array().expect("rows");
        for row in rows {
            assert!(seen.insert(row["id"].as_str().expect("an id").to_owned()), "{row} comes twice");
        }
        after = rows.last().map_or(Value::Null, |row| row["id"].clone());
        if page["has_more"] == false {
            break;
        }
    }
    assert_eq!(seen.len(), count);
    // A row more has a limit of its own on memory.
    let mut child = Command::new("/bin/sh")
        .args(["-c", "ulimit -v 30000; exec \"$0\"", env!("CARGO_BIN_EXE_gaoler-files")])
        .current_dir(place.at(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program");
    let question = json!({"what": "sessions", "limit": 100, "after": null, "disk_bytes": 0, "disk_files": 0, "ttl_days": 0});
    child.stdin.take().expect("a pipe").write_all(format!("{question}\n").as_bytes()).expect("asked");
    let output = child.wait_with_output().expect("an end");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("an answer");
    assert_eq!(answer["done"]["data"].as_array().map(Vec::len), Some(100));
}
