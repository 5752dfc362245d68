//! The operator's own file: what it changes of one level, checked while everything can still be refused.
//! It must never make a place visible that is gaoler's own or that others than root may read nothing of.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use gaoler_policy::settings::{OwnConstant, OwnLevel, OwnPlace};
use gaoler_protocol::{Level, Limits};
use serde::Deserialize;

use crate::config::in_toml;

/// Rows of one list, at most: a page of text.
const ROWS_MAX: usize = 256;
/// Places that are gaoler's own in a cage: neither they nor what lies below or above them can be the host's.
const TAKEN: [&str; 10] =
    ["/dev", "/home", "/mnt", "/opt/claude", "/proc", "/run", "/sys", "/tmp", "/var", "/workspace"];
/// Beginnings of variables by which a CLI finds its credential, its upstream and its rules, or a program its code.
const RESERVED: [&str; 7] = ["ANTHROPIC_", "CLAUDE", "GAOLER_", "HOME", "IS_SANDBOX", "LD_", "TMPDIR"];

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    extends: String,
    #[serde(default)]
    limits: BTreeMap<String, u32>,
    #[serde(default)]
    hosts: Vec<String>,
    #[serde(default)]
    env: Vec<Constant>,
    #[serde(default)]
    visible: Vec<Visible>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Constant {
    name: String,
    value: String,
    why: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Visible {
    path: PathBuf,
    access: Access,
    why: String,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Access {
    Read,
    Execute,
}

/// What a file's text changes, for an instance whose state lies there.
///
/// # Errors
/// The first thing in it that is wrong, with its place.
pub fn level(text: &str, state: &Path) -> Result<OwnLevel, String> {
    let file: File = toml::from_str(text).map_err(|error| in_toml(&error))?;
    if Level::from_name(&file.extends).is_none() {
        return Err(format!("extends: `{}` is not a level", file.extends));
    }
    let mut known = Limits::NONE;
    for (name, limit) in &file.limits {
        match (known.named(name), limit) {
            (None, _) => {
                return Err(format!("limits.{name}: unknown; the limits are {}", Limits::NAMES.join(", ")));
            }
            (Some(_), 0) => return Err(format!("limits.{name}: 0 is no limit; leave it out")),
            (Some(_), _) => {}
        }
    }
    file.hosts
        .iter()
        .enumerate()
        .try_for_each(|(at, host)| destination(host).map_err(|what| format!("hosts[{at}]: {what}")))?;
    if file.env.len().max(file.visible.len()).max(file.hosts.len()) > ROWS_MAX {
        return Err(format!("more than {ROWS_MAX} rows in a list"));
    }
    Ok(OwnLevel {
        env: file.env.into_iter().map(constant).collect::<Result<_, _>>()?,
        visible: file.visible.into_iter().map(|it| place(it, state)).collect::<Result<_, _>>()?,
        extends: file.extends,
        limits: file.limits,
        hosts: file.hosts,
    })
}

fn reason(what: &str, why: &str) -> Result<(), String> {
    if why.trim().is_empty() { Err(format!("{what}: without a reason; say `why`")) } else { Ok(()) }
}

fn constant(row: Constant) -> Result<OwnConstant, String> {
    let what = format!("env {}", row.name);
    reason(&what, &row.why)?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    if row.name.is_empty() || !row.name.bytes().all(plain) || row.value.contains('\0') {
        return Err(format!("{what}: a name is of A-Z a-z 0-9 _, and a value holds no NUL"));
    }
    match RESERVED.iter().find(|begin| row.name.starts_with(**begin)) {
        Some(begin) => Err(format!("{what}: what begins with {begin} is gaoler's own")),
        None => Ok(OwnConstant { name: row.name, value: row.value }),
    }
}

fn place(row: Visible, state: &Path) -> Result<OwnPlace, String> {
    let what = format!("visible {}", row.path.display());
    reason(&what, &row.why)?;
    let plain = row.path.is_absolute()
        && row.path.to_str().is_some_and(|path| !path.contains(['\0', '\n']) && !path.ends_with('/'))
        && row.path.components().eq(row.path.canonicalize().iter().flat_map(|real| real.components()));
    if !plain {
        return Err(format!("{what}: it must be there, absolute, and no link on its way"));
    }
    let meets = |other: &Path| row.path.starts_with(other) || other.starts_with(&row.path);
    // Of /etc single places can be shown, but not all of it: a cage has one of its own.
    if TAKEN.iter().map(Path::new).any(meets) || row.path == Path::new("/etc") {
        return Err(format!("{what}: this place is gaoler's own in a cage"));
    }
    if meets(state) {
        return Err(format!("{what}: tenants' files are below state.dir"));
    }
    // Files are copied as root, so what only root may read must be refused here.
    let found = row.path.metadata().map_err(|error| format!("{what}: {error}"))?;
    if !(found.is_dir() || found.is_file()) || found.mode() & 0o004 == 0 {
        return Err(format!("{what}: it must be a file or folder that everybody may read"));
    }
    Ok(OwnPlace { path: row.path, execute: row.access == Access::Execute })
}

/// `HOST:PORT` or `*.DOMAIN:PORT`, in the one spelling that egress compares.
///
/// # Errors
/// Any other spelling, as a sentence.
pub fn destination(text: &str) -> Result<(), String> {
    let form = || format!("`{text}` is not HOST:PORT or *.DOMAIN:PORT, such as example.com:443");
    let (host, port) = text.rsplit_once(':').ok_or_else(form)?;
    if !port.parse::<u16>().is_ok_and(|number| number != 0 && number.to_string() == port) {
        return Err(form());
    }
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if let Some(bare) = bare {
        // Egress compares texts: each address has one.
        let one = bare.parse::<Ipv6Addr>().is_ok_and(|address| address.to_string() == bare);
        return if one { Ok(()) } else { Err(form()) };
    }
    let name = host.strip_prefix("*.").unwrap_or(host);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A name whose last part begins with a digit is an address in one of its many spellings; only the usual one is taken.
    let numeric = name.rsplit('.').next().is_some_and(|last| last.starts_with(|b: char| b.is_ascii_digit()));
    let named = name.len() <= 253 && name.split('.').all(label) && name.contains('.') && !numeric;
    match named || (host == name && name.parse::<Ipv4Addr>().is_ok()) {
        true => Ok(()),
        false => Err(form()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<(), &str>) {
        let found = level(text, Path::new("/srv/state"));
        match expected {
            Ok(()) => assert!(found.is_ok(), "{text}: {found:?}"),
            Err(part) => assert!(found.as_ref().is_err_and(|why| why.contains(part)), "{text}: {found:?}"),
        }
    }

    #[test]
    fn a_file_of_the_operators_is_checked_to_its_last_row() {
        check("extends = 'balanced'", Ok(()));
        check("extends = 'balanced'\nhosts = ['git.example.com:443']\n[limits]\nmemory_mib = 2048", Ok(()));
        check("extends = 'lax'", Err("`lax` is not a level"));
        check("[limits]", Err("missing field `extends`"));
        check("extends = 'balanced'\nnice = 1", Err("unknown field `nice`"));
        check(
            "extends = 'balanced'\n[limits]\nnice = 1",
            Err("limits.nice: unknown; the limits are memory_mib"),
        );
        check("extends = 'balanced'\n[limits]\ntasks = 0", Err("limits.tasks: 0 is no limit"));
        check("extends = 'balanced'\nhosts = ['x']", Err("hosts[0]: `x` is not HOST:PORT"));
        let env = |name: &str, value: &str, why: &str| {
            format!("extends = 'balanced'\n[[env]]\nname = '{name}'\nvalue = \"{value}\"\nwhy = '{why}'")
        };
        check(&env("CC", "gcc-12", "old"), Ok(()));
        check(&env("CC", "gcc-12", " "), Err("env CC: without a reason"));
        check(&env("C C", "gcc", "x"), Err("a name is of A-Z"));
        check(&env("CC", "a\\u0000b", "x"), Err("holds no NUL"));
        for name in
            ["ANTHROPIC_BASE_URL", "CLAUDE_CODE_TMPDIR", "CLAUDECODE", "LD_PRELOAD", "HOME", "IS_SANDBOX"]
        {
            check(&env(name, "x", "x"), Err("is gaoler's own"));
        }
    }

    #[test]
    fn a_place_of_the_operators_must_be_there_and_be_nobody_elses() {
        use std::os::unix::fs::PermissionsExt;
        // Not below /tmp, which is a cage's own.
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a folder");
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod")
        };
        set(folder.path(), 0o755);
        let (secret, link) = (folder.path().join("secret"), folder.path().join("link"));
        std::fs::write(&secret, "x").expect("a file");
        set(&secret, 0o600);
        std::os::unix::fs::symlink(&secret, &link).expect("a link");
        let row = |path: &str| {
            format!("extends = 'balanced'\n[[visible]]\npath = '{path}'\naccess = 'execute'\nwhy = 'tools'")
        };
        let show = |path: &Path| path.display().to_string();
        check(&row(&show(folder.path())), Ok(()));
        check(&row(&show(&secret)), Err("that everybody may read"));
        check(&row(&show(&link)), Err("no link on its way"));
        check(&row("/no-such"), Err("it must be there"));
        check(&row("usr"), Err("it must be there, absolute"));
        for taken in ["/", "/proc", "/opt", "/home", "/etc", "/dev/null", "/proc/self"] {
            let found = level(&row(taken), Path::new("/srv/state"));
            assert!(found.is_err_and(|why| why.contains("visible")), "{taken}");
        }
        let found = level(&row(&show(folder.path())), &folder.path().join("state"));
        assert!(found.is_err_and(|why| why.contains("below state.dir")));
    }

    #[test]
    fn a_destination_has_one_spelling() {
        for good in
            ["example.com:443", "*.example.com:80", "a-b.example:1", "192.0.2.1:22", "[2001:db8::1]:443"]
        {
            assert_eq!(destination(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "example.com",
            "example.com:0",
            "example.com:65536",
            "example.com:0443",
            "Example.com:443",
            "example.com.:443",
            "*:443",
            "*.com.:1",
            "a.*.b:1",
            "**.a.b:1",
            "exa mple.com:1",
            "a..b:1",
            "-a.b:1",
            "user@a.b:1",
            "a.b/c:1",
            "127.1:80",
            "0x7f.1:80",
            "2130706433:80",
            "*.192.0.2.1:80",
            "[::1:443",
            "[fe80::1%eth0]:1",
            "[2001:DB8::1]:443",
            "[2001:db8:0::1]:443",
            "é.com:1",
            "a.b:+1",
            "a.b:1\nc.d:2",
        ] {
            assert!(destination(bad).is_err(), "{bad}");
        }
    }
}
