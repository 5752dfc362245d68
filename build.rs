//! Takes the files of Swagger UI that /docs shows out of the archive that a crate carries.
//! It must never fetch anything: the archive's bytes are vouched for by Cargo.lock.

use std::error::Error;
use std::fs;
use std::io::{Cursor, Read};
use std::path::PathBuf;

use utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED as ARCHIVE;

/// What is taken, by the end of its name in the archive, and what it is called here.
const FILES: [(&str, &str); 4] = [
    ("/dist/swagger-ui-bundle.js", "swagger-ui-bundle.js"),
    ("/dist/swagger-ui.css", "swagger-ui.css"),
    ("/LICENSE", "swagger-ui-LICENSE.txt"),
    ("/NOTICE", "swagger-ui-NOTICE.txt"),
];
/// Bytes of one of them, at most: three times what the largest has.
const FILE_BYTES_MAX: u64 = 5 * 1024 * 1024;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set; cargo sets it")?);
    let mut archive = zip::ZipArchive::new(Cursor::new(ARCHIVE))?;
    for (end, name) in FILES {
        // One folder is above everything, with the version in its name.
        let mut names = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned()));
        let inside = names.find(|path| path.find('/').is_some_and(|at| &path[at..] == end));
        let inside = inside.ok_or_else(|| format!("Swagger UI's archive has no {end}"))?;
        drop(names);
        let mut bytes = Vec::new();
        archive.by_name(&inside)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        fs::write(out.join(name), bytes)?;
    }
    Ok(())
}
