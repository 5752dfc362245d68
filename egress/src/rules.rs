//! What each level lets out of a cage: beta headers, tools, body fields.
//! Below developer nothing may make the upstream reach the network, other data or a machine for the cage.

use gaoler_protocol::{Level, Scheme};

/// The beta that goes with an OAuth credential, and only with one. It is ours to set.
const OAUTH_BETA: &str = "oauth-2025-04-20";
/// Betas in one request at most, and characters of one.
const BETAS_MAX: usize = 32;
const BETA_CHARS_MAX: usize = 64;

/// Families of betas (the name before its date) that change how the model thinks, counts, caches or calls
/// the client's own tools. Those that would run, fetch, store or reach something on the upstream's side are
/// not here: web search and fetch, code execution, MCP, files, skills, agents, memories, batches.
const BETA_FAMILIES: &[&str] = &[
    "advanced-tool-use",
    "afk-mode",
    "auto-mode-classifier",
    "cache-diagnosis",
    "cache-keepalive",
    "claude-code",
    "claude-code-side-query",
    "computer-use",
    "context-1m",
    "context-hint",
    "context-management",
    "dangerous-tool-use",
    "effort",
    "extended-cache-ttl",
    "fallback-credit",
    "fast-mode",
    "fine-grained-tool-streaming",
    "inline-tools",
    "interleaved-thinking",
    "mid-conversation-system",
    "mid-conversation-system-clear-at",
    "mid-conversation-tool-changes",
    "model-context-window-exceeded",
    "output-128k",
    "per-turn-control",
    "prompt-caching",
    "prompt-caching-evict",
    "prompt-caching-scope",
    "redact-thinking",
    "request-tags",
    "resumption",
    "server-side-fallback",
    "structured-outputs",
    "task-budgets",
    "thinking-binding-controls",
    "thinking-display-updates",
    "thinking-resumption",
    "thinking-token-count",
    "timing",
    "token-counting",
    "token-efficient-tools",
    "tool-provenance",
    "tool-search-tool",
];

/// Types of tools that the client itself carries out. A tool without a type is the client's too.
const CLIENT_TOOLS: &[&str] = &["custom"];
/// Beginnings of such types; a date follows.
const CLIENT_TOOL_FAMILIES: &[&str] =
    &["bash_", "computer_", "memory_", "str_replace_", "text_editor_", "tool_search_tool_"];

/// Body fields that hand work to the upstream's own machines or to other servers.
const DOORS: &[&str] = &["mcp_servers", "container"];

/// Kinds of sources that the upstream would fetch or look up by itself.
const FETCHED_SOURCES: &[&str] = &["url", "file"];

/// The betas of a request that go on, with OAuth's where the credential needs it.
pub fn betas(level: Level, scheme: Scheme, asked: &str) -> Vec<&str> {
    let passes = |name: &&str| match level {
        Level::Paranoid | Level::Balanced => family(name).is_some_and(|one| BETA_FAMILIES.contains(&one)),
        Level::Developer => true,
    };
    let named = asked.split(',').map(str::trim).filter(|name| is_name(name) && *name != OAUTH_BETA);
    let oauth = matches!(scheme, Scheme::OAuth).then_some(OAUTH_BETA);
    named.filter(passes).take(BETAS_MAX).chain(oauth).collect()
}

/// Whether a body may hold this field.
pub fn field_passes(level: Level, name: &str) -> bool {
    level == Level::Developer || !DOORS.contains(&name)
}

/// Whether a body may declare a tool of this type.
pub fn tool_passes(level: Level, kind: &str) -> bool {
    let families = || CLIENT_TOOL_FAMILIES.iter().any(|family| kind.starts_with(family));
    level == Level::Developer || CLIENT_TOOLS.contains(&kind) || families()
}

/// Whether a block may draw on a source of this type.
pub fn source_passes(level: Level, kind: &str) -> bool {
    level == Level::Developer || !FETCHED_SOURCES.contains(&kind)
}

fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !name.is_empty() && name.len() <= BETA_CHARS_MAX && name.bytes().all(fits)
}

/// The name before `-YYYY-MM-DD` or `-YYYYMMDD`.
fn family(name: &str) -> Option<&str> {
    let digits = |text: &str, count: usize| text.len() == count && text.bytes().all(|b| b.is_ascii_digit());
    let (rest, last) = name.rsplit_once('-')?;
    if digits(last, 8) {
        return Some(rest);
    }
    let (rest, month) = rest.rsplit_once('-')?;
    let (rest, year) = rest.rsplit_once('-')?;
    (digits(last, 2) && digits(month, 2) && digits(year, 4)).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn betas_are_filtered_by_level_and_scheme() {
        let check = |level, scheme, asked, expected: &[&str]| {
            assert_eq!(betas(level, scheme, asked), expected, "{asked}");
        };
        let asked = "claude-code-20250219, web-search-2025-03-05,effort-2025-11-24,oauth-2025-04-20";
        let kept = ["claude-code-20250219", "effort-2025-11-24"];
        check(Level::Balanced, Scheme::ApiKey, asked, &kept);
        check(Level::Paranoid, Scheme::OAuth, asked, &[kept[0], kept[1], OAUTH_BETA]);
        check(Level::Developer, Scheme::ApiKey, asked, &[kept[0], "web-search-2025-03-05", kept[1]]);
        check(Level::Balanced, Scheme::OAuth, "", &[OAUTH_BETA]);
        for door in ["mcp-client-2025-04-04", "code-execution-2025-05-22", "web-fetch-2025-09-10",
            "files-api-2025-04-14", "skills-2025-10-02", "effort", "effort-x-2025-11-24", "EFFORT-2025-11-24"] {
            check(Level::Balanced, Scheme::ApiKey, door, &[]);
        }
    }

    #[test]
    fn tools_of_the_upstream_pass_only_for_developers() {
        for kind in ["custom", "bash_20250124", "text_editor_20250728", "computer_20250124"] {
            assert!(tool_passes(Level::Paranoid, kind), "{kind}");
        }
        for kind in ["web_search_20250305", "web_fetch_20250910", "code_execution_20250522", "mcp_toolset",
            "advisor_20260301", ""] {
            assert!(!tool_passes(Level::Balanced, kind), "{kind}");
            assert!(tool_passes(Level::Developer, kind), "{kind}");
        }
    }
}
