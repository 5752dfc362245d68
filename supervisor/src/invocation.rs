//! The CLI's argv and environment for a run: the level's constants, validated enums and ids, nothing else.
//! It must never let a word through that a client wrote: text travels in sealed memory files.

use std::ffi::CString;

use gaoler_policy::level::LevelPolicy;
use gaoler_protocol::{Effort, Placeholder, Rules, Spawn};

use crate::cage::Invocation;

/// The invocation of this run. Where other processes' environments are `readable`, the token comes by descriptor 3.
pub fn of(
    spawn: &Spawn,
    placeholder: &Placeholder,
    readable: bool,
    rules: Rules,
    level: &LevelPolicy,
) -> Invocation {
    let mut words: Vec<String> = level.argv(rules).iter().copied().map(String::from).collect();
    let mut option = |name: &str, value: &str| words.extend([name.to_owned(), value.to_owned()]);
    option("--managed-settings", level.managed_settings(rules));
    if !spawn.model.as_str().is_empty() {
        option("--model", spawn.model.as_str());
    }
    if spawn.effort != Effort::Unset {
        option("--effort", spawn.effort.name());
    }
    if spawn.turns_max != 0 {
        option("--max-turns", &spawn.turns_max.to_string());
    }
    if spawn.mcp_refused {
        option("--disallowedTools", "mcp__*");
    }
    if spawn.budget_microusd != 0 {
        let (dollars, rest) = (spawn.budget_microusd / 1_000_000, spawn.budget_microusd % 1_000_000);
        option("--max-budget-usd", &format!("{dollars}.{rest:06}"));
    }
    let placeholder = placeholder.token();
    let token = match readable {
        false => format!("CLAUDE_CODE_OAUTH_TOKEN={placeholder}"),
        true => "CLAUDE_CODE_API_KEY_FILE_DESCRIPTOR=3".to_owned(),
    };
    Invocation {
        session: uuid(&spawn.session),
        placeholder,
        words: words.into_iter().flat_map(CString::new).collect(),
        environment: constants(level.cli_env.iter().copied()).chain(CString::new(token)).collect(),
        proof: spawn.proof,
    }
}

/// Constants of a level as `NAME=value`.
pub fn constants<'a>(of: impl Iterator<Item = (&'a str, &'a str)>) -> impl Iterator<Item = CString> {
    of.flat_map(|(name, value)| CString::new(format!("{name}={value}")))
}

/// A UUID's text.
pub fn uuid(bytes: &[u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_reads_as_its_bytes() {
        let bytes = [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0x4d, 0xef, 0x81, 0x23, 0, 1, 2, 3, 4, 0xff];
        assert_eq!(uuid(&bytes), "12345678-9abc-4def-8123-0001020304ff");
    }
}
