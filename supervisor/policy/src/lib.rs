//! What the operator and gaoler's own files decide, parsed once into types that cannot be wrong, and made
//! into filters. It must never read a file that anybody but root can write, nor a byte of a tenant.

pub mod confine;
pub mod landlock;
pub mod level;
pub mod process;
pub mod seccomp;
pub mod settings;
mod syscalls;

/// Why a rule is there. A rule without a reason cannot be read: style 16, made a type.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
struct Why;

impl TryFrom<String> for Why {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Why, &'static str> {
        if text.trim().is_empty() { Err("a rule without a reason") } else { Ok(Why) }
    }
}
