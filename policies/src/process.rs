//! One policy per confined process: which system calls it may make, each rule with its reason.
//! It must never be read from anywhere but this folder, and only when gaoler is built.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::{Arch, Why, syscalls};

/// Why a policy's text is not a policy.
#[derive(Debug, PartialEq, Eq)]
pub enum PolicyError {
    /// Not TOML, or an unknown key.
    Toml(String),
    /// A name that libc's table does not know.
    Unknown(String),
    /// A call that two rules speak of.
    Twice(String),
    /// A rule that contradicts itself or says nothing.
    Shape(String),
}

impl std::fmt::Display for PolicyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PolicyError::Toml(error) => write!(f, "policy is not readable: {error}"),
            PolicyError::Unknown(name) => write!(f, "policy names {name:?}, which is not in the table"),
            PolicyError::Twice(name) => write!(f, "policy speaks of {name:?} twice"),
            PolicyError::Shape(name) => write!(f, "policy rule of {name:?} is not well formed"),
        }
    }
}

impl std::error::Error for PolicyError {}

/// What the kernel answers to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The call is made.
    Allow,
    /// The call is not made, and fails with this errno.
    Errno(u16),
    /// The process ends with SIGSYS.
    Kill,
}

/// A test of one argument. Only the low 32 bits are looked at, because that is all that the kernel reads of
/// an `int` argument: a filter that compared 64 could be passed by with rubbish in the upper half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// Which argument, 0 to 5.
    pub arg: u8,
    /// These bits only.
    pub mask: u32,
    /// The values to compare with.
    pub values: Vec<u32>,
    /// Whether one of the values must be there, or none may.
    pub wanted: bool,
}

/// A call that is allowed only for some arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// One of these lists must pass; a list passes when all of its tests do.
    pub any: Vec<Vec<Test>>,
    /// The answer where none passes.
    pub otherwise: Action,
}

/// What becomes of one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Always the same.
    Plain(Action),
    /// It depends on the arguments.
    Guarded(Guard),
}

/// The policy of one process: an answer per call number, and one for every other call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessPolicy {
    /// For calls that no rule names.
    pub default: Action,
    /// For those that a rule names, by number.
    pub answers: BTreeMap<u32, Answer>,
}

impl ProcessPolicy {
    /// The policy of a file's text.
    ///
    /// # Errors
    /// Anything that is not exactly a policy, see [`PolicyError`].
    pub fn parse(text: &str, arch: Arch) -> Result<ProcessPolicy, PolicyError> {
        let file: File = toml::from_str(text).map_err(|error| PolicyError::Toml(error.to_string()))?;
        let default = action(&file.default)?;
        let mut seen = Vec::new();
        let mut answers = BTreeMap::new();
        for (rule, allowed) in
            file.allow.iter().map(|r| (r, true)).chain(file.deny.iter().map(|r| (r, false)))
        {
            let names: Vec<&String> = rule.calls.iter().chain(&rule.call).collect();
            let answer = rule.answer(allowed)?;
            for name in names {
                if seen.contains(&name) {
                    return Err(PolicyError::Twice(name.clone()));
                }
                seen.push(name);
                let number =
                    syscalls::number(name, arch).ok_or_else(|| PolicyError::Unknown(name.clone()))?;
                if let Some(number) = number {
                    answers.insert(number, answer.clone());
                }
            }
        }
        Ok(ProcessPolicy { default, answers })
    }
}

/// A file under policies/, as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    default: String,
    #[serde(default)]
    allow: Vec<RawRule>,
    #[serde(default)]
    deny: Vec<RawRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    #[serde(default)]
    calls: Vec<String>,
    call: Option<String>,
    arg: Option<u8>,
    mask: Option<Value>,
    any_of: Option<Vec<Value>>,
    none_of: Option<Vec<Value>>,
    any: Option<Vec<Vec<RawTest>>>,
    errno: Option<String>,
    #[serde(rename = "why")]
    _why: Why,
}

#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
struct RawTest {
    arg: u8,
    mask: Option<Value>,
    any_of: Option<Vec<Value>>,
    none_of: Option<Vec<Value>>,
}

/// A number, or names of the table joined by `|`.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum Value {
    Number(u32),
    Name(String),
}

impl RawRule {
    fn answer(&self, allowed: bool) -> Result<Answer, PolicyError> {
        let name = self.call.as_ref().or(self.calls.first()).cloned().unwrap_or_default();
        let shape = || PolicyError::Shape(name.clone());
        let errno = self.errno.as_deref().map(action).transpose()?;
        let short = self.arg.map(|arg| RawTest {
            arg,
            mask: self.mask.clone(),
            any_of: self.any_of.clone(),
            none_of: self.none_of.clone(),
        });
        let lists = match (short, &self.any) {
            (None, None) => {
                let bare = self.mask.is_none() && self.any_of.is_none() && self.none_of.is_none();
                return match (bare && self.call.is_none() && !self.calls.is_empty(), allowed, errno) {
                    (true, true, None) => Ok(Answer::Plain(Action::Allow)),
                    (true, false, Some(action)) => Ok(Answer::Plain(action)),
                    _ => Err(shape()),
                };
            }
            (Some(test), None) => vec![vec![test]],
            (None, Some(lists)) => lists.clone(),
            (Some(_), Some(_)) => return Err(shape()),
        };
        if !allowed || self.call.is_none() || !self.calls.is_empty() {
            return Err(shape());
        }
        let any: Vec<Vec<Test>> = lists
            .into_iter()
            .map(|list| list.into_iter().map(|test| test.parse(&name)).collect())
            .collect::<Result<_, _>>()?;
        if any.is_empty() || any.iter().any(Vec::is_empty) {
            return Err(shape());
        }
        let otherwise = errno.unwrap_or(Action::Errno(libc::EPERM as u16));
        Ok(Answer::Guarded(Guard { any, otherwise }))
    }
}

impl RawTest {
    fn parse(self, call: &str) -> Result<Test, PolicyError> {
        let shape = || PolicyError::Shape(call.to_string());
        let (values, wanted) = match (self.any_of, self.none_of) {
            (Some(values), None) => (values, true),
            (None, Some(values)) => (values, false),
            _ => return Err(shape()),
        };
        let mask = self.mask.map_or(Ok(u32::MAX), |mask| mask.number())?;
        let values: Vec<u32> = values.iter().map(Value::number).collect::<Result<_, _>>()?;
        if self.arg > 5 || values.is_empty() || values.iter().any(|value| value & !mask != 0) {
            return Err(shape());
        }
        Ok(Test { arg: self.arg, mask, values, wanted })
    }
}

impl Value {
    fn number(&self) -> Result<u32, PolicyError> {
        match self {
            Value::Number(number) => Ok(*number),
            Value::Name(name) => syscalls::constant(name).ok_or_else(|| PolicyError::Unknown(name.clone())),
        }
    }
}

/// The action of a word in a policy file. Only these: a rule with another errno needs a reason first.
fn action(word: &str) -> Result<Action, PolicyError> {
    match word {
        "kill" => Ok(Action::Kill),
        "allow" => Ok(Action::Allow),
        "ENOSYS" => Ok(Action::Errno(libc::ENOSYS as u16)),
        "EPERM" => Ok(Action::Errno(libc::EPERM as u16)),
        "EACCES" => Ok(Action::Errno(libc::EACCES as u16)),
        "EAFNOSUPPORT" => Ok(Action::Errno(libc::EAFNOSUPPORT as u16)),
        "EINVAL" => Ok(Action::Errno(libc::EINVAL as u16)),
        "ENOMEM" => Ok(Action::Errno(libc::ENOMEM as u16)),
        "E2BIG" => Ok(Action::Errno(libc::E2BIG as u16)),
        "EOPNOTSUPP" => Ok(Action::Errno(libc::EOPNOTSUPP as u16)),
        "ENOPROTOOPT" => Ok(Action::Errno(libc::ENOPROTOOPT as u16)),
        // The call is not made, and its caller is told that it was: for what the kernel takes as a wish.
        "unheeded" => Ok(Action::Errno(0)),
        other => Err(PolicyError::Unknown(other.to_string())),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Every process that has a filter, and its policy.
    pub(crate) const HOUSE: [(&str, &str); 11] = [
        ("frontend", include_str!("../frontend.toml")),
        ("egress", include_str!("../egress.toml")),
        ("upstream", include_str!("../upstream.toml")),
        ("ledger", include_str!("../ledger.toml")),
        ("init", include_str!("../init.toml")),
        ("cage", include_str!("../cage.toml")),
        ("reaper", include_str!("../reaper.toml")),
        ("buffers", include_str!("../buffers.toml")),
        ("uncounted", include_str!("../uncounted.toml")),
        ("shared", include_str!("../shared.toml")),
        ("alone", include_str!("../alone.toml")),
    ];

    #[test]
    fn t01_every_policy_of_the_house_is_a_policy() {
        for (name, text) in HOUSE {
            for &arch in Arch::ALL {
                let policy = ProcessPolicy::parse(text, arch).unwrap_or_else(|e| panic!("{name}: {e}"));
                // Those that stand beside the cage's only take away.
                let beside = ["buffers", "uncounted", "shared", "alone"].contains(&name);
                let default = if beside { Action::Allow } else { Action::Errno(libc::ENOSYS as u16) };
                assert_eq!(policy.default, default, "{name}");
            }
        }
    }

    #[test]
    fn t02_a_text_that_is_not_exactly_a_policy_is_refused() {
        let check = |rules: &str, expected: PolicyError| {
            let text = format!("default = \"ENOSYS\"\n{rules}");
            assert_eq!(ProcessPolicy::parse(&text, Arch::X86_64), Err(expected), "{rules}");
        };
        let name = String::from;
        check("[[allow]]\ncalls=['raed']\nwhy='x'", PolicyError::Unknown(name("raed")));
        check("[[allow]]\ncalls=['read','read']\nwhy='x'", PolicyError::Twice(name("read")));
        check(
            "[[allow]]\ncalls=['read']\nwhy='x'\n[[deny]]\ncalls=['read']\nerrno='EPERM'\nwhy='x'",
            PolicyError::Twice(name("read")),
        );
        check("[[allow]]\ncalls=['read']\nerrno='EPERM'\nwhy='x'", PolicyError::Shape(name("read")));
        check("[[deny]]\ncalls=['read']\nwhy='x'", PolicyError::Shape(name("read")));
        check("[[deny]]\ncalls=['read']\nerrno='EBADF'\nwhy='x'", PolicyError::Unknown(name("EBADF")));
        check("[[allow]]\ncall='read'\nwhy='x'", PolicyError::Shape(name("read")));
        check("[[allow]]\ncalls=[]\nwhy='x'", PolicyError::Shape(String::new()));
        check("[[allow]]\ncall='socket'\nany_of=[1]\nwhy='x'", PolicyError::Shape(name("socket")));
        check("[[allow]]\ncall='socket'\narg=0\nwhy='x'", PolicyError::Shape(name("socket")));
        check("[[allow]]\ncall='socket'\narg=6\nany_of=[1]\nwhy='x'", PolicyError::Shape(name("socket")));
        check("[[allow]]\ncall='socket'\narg=0\nany_of=[]\nwhy='x'", PolicyError::Shape(name("socket")));
        // A value outside its mask could never be found: the rule would say less than it seems to.
        check(
            "[[allow]]\ncall='socket'\narg=0\nmask=1\nany_of=[2]\nwhy='x'",
            PolicyError::Shape(name("socket")),
        );
        check(
            "[[allow]]\ncall='socket'\narg=0\nany_of=['AF_ROOT']\nwhy='x'",
            PolicyError::Unknown(name("AF_ROOT")),
        );
        for (end, part) in
            [("why='x'\nlog=true", "unknown field"), ("why=' '", "without a reason"), ("", "missing field")]
        {
            let text = format!("default = 'ENOSYS'\n[[allow]]\ncalls=['read']\n{end}");
            let error = ProcessPolicy::parse(&text, Arch::X86_64).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn t04_numbers_are_the_targets() {
        assert_eq!(syscalls::number("openat", Arch::X86_64), Some(Some(257)));
        assert_eq!(syscalls::number("openat", Arch::Aarch64), Some(Some(56)));
        assert_eq!(syscalls::number("open", Arch::Aarch64), Some(None));
        assert_eq!(syscalls::number("raed", Arch::Aarch64), None);
    }

    #[test]
    fn t03_constants_join() {
        assert_eq!(syscalls::constant("CLONE_VM | CLONE_THREAD"), Some(0x0001_0100));
        assert_eq!(syscalls::constant("CLONE_VM|CLONE_WM"), None);
    }
}
