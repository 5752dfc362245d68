//! Reads the policies of this folder and makes constants of them, when gaoler is built.
//! It must never be linked into a program that runs: build scripts alone use it, and they write what it made
//! into their `OUT_DIR` as Rust, so that no confined or privileged process has a parser or a compiler of rules.

#![forbid(unsafe_code)]

mod egress;
mod extend;
mod level;
mod process;
mod rules;
mod seccomp;
mod syscalls;

use std::path::{Path, PathBuf};
use std::{env, fs};

pub use egress::EgressPolicy;
pub use level::LevelPolicy;
pub use process::{PolicyError, ProcessPolicy};

/// What a build script answers with: nothing, or a sentence that ends the build.
pub type Result<T> = std::result::Result<T, String>;

/// An architecture that filters can be made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// 64-bit x86, without x32.
    X86_64,
    /// 64-bit ARM.
    Aarch64,
}

impl Arch {
    /// Every architecture.
    pub const ALL: &[Arch] = &[Arch::X86_64, Arch::Aarch64];

    /// The architecture that cargo builds for, which need not be the one that it builds on.
    fn target() -> Result<Arch> {
        match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
            Ok("x86_64") => Ok(Arch::X86_64),
            Ok("aarch64") => Ok(Arch::Aarch64),
            other => {
                Err(format!("there are no system call numbers for {other:?} in policies/src/syscalls.rs"))
            }
        }
    }
}

/// For a build script: writes the filters of these processes as `NAME.rs`, each an expression of type
/// `&[libc::sock_filter]`, and `numbers.rs`, an expression that compiles only where the numbers are right.
///
/// # Errors
/// What is wrong with a policy, with its file's name.
pub fn filters(names: &[&str]) -> Result<()> {
    let arch = Arch::target()?;
    for name in names {
        let policy = ProcessPolicy::parse(&read(name)?, arch).map_err(|error| format!("{name}: {error}"))?;
        let program = seccomp::compile(&policy, arch).map_err(|error| format!("{name}: {error}"))?;
        write(name, &seccomp::rust(&program))?;
    }
    write("numbers", &syscalls::proof(arch))
}

/// For a build script: writes what the supervisor must know of a level as `NAME.rs`, an expression of type
/// `LevelPolicy`.
///
/// # Errors
/// What is wrong with it, with its file's name.
pub fn level(name: &str) -> Result<()> {
    write(name, &parsed(name)?.rust()?)
}

/// For a build script: writes what egress must know of a level as `NAME.rs`, an expression of type
/// `EgressPolicy`.
///
/// # Errors
/// What is wrong with it, with its file's name.
pub fn egress(name: &str) -> Result<()> {
    let policy = parsed(name)?;
    write(name, &policy.egress.rust(policy.egress_mib()))
}

fn parsed(name: &str) -> Result<LevelPolicy> {
    let table = extend::extended(&read(name)?, read).map_err(|error| format!("{name}: {error}"))?;
    LevelPolicy::of(table).map_err(|error| format!("{name}: {error}"))
}

/// The text of a policy; cargo runs the build script again when it changes.
fn read(name: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("{name}.toml"));
    println!("cargo::rerun-if-changed={}", path.display());
    fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(name: &str, text: &str) -> Result<()> {
    let folder =
        env::var_os("OUT_DIR").map(PathBuf::from).ok_or("OUT_DIR is not set: this is for build scripts")?;
    let path = folder.join(format!("{name}.rs"));
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Why a rule is there. A rule without a reason cannot be read: the rule about reasons, made a type.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
struct Why;

impl TryFrom<String> for Why {
    type Error = &'static str;

    fn try_from(text: String) -> std::result::Result<Why, &'static str> {
        if text.trim().is_empty() { Err("a rule without a reason") } else { Ok(Why) }
    }
}
