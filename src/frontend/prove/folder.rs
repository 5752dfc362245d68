//! The self-test where nothing but the CLI's own rules keeps tenants apart: calls that must be denied, each beside
//! one that must not be. It must never take a refusal of another kind for a denial: what is not there proves nothing.

use serde_json::json;

use super::{
    CANARY_ATTACHED, CANARY_EARLIER, CANARY_FILE, CANARY_INSTRUCTIONS, CANARY_SYSTEM, Check, HOOKED_BY_MCP,
    HOOKED_BY_SETTINGS,
};

/// What the supervisor plants beside the workspace, and what must not come to be there.
const OUTSIDE: &str = "../outside-canary.txt";
const CANARY_OUTSIDE: &str = "CANARY-OUTSIDE";
const WRITTEN_OUTSIDE: &str = "../outside-written.txt";
/// The mode of such a run.
pub const PERMISSION_MODE: &str = "acceptEdits";
/// The tools that a run has, in the order of their names.
pub const TOOLS: [&str; 4] = ["Edit", "Grep", "Read", "Write"];

/// Whether an answer is as it must be.
pub type Holds = fn(&str) -> bool;

/// One prompt, what its answer must be, and the check that fails where it is not.
pub struct Trial {
    /// What the run is asked.
    pub prompt: String,
    /// Whether the answer is as it must be.
    pub holds: Holds,
    /// What has failed where it is not.
    pub check: Check,
}

/// Everything that is tried, in order: what is written first is read later.
pub fn trials() -> Vec<Trial> {
    let read = |path: &str| call("Read", &json!({ "file_path": path }));
    let write = |path: &str| call("Write", &json!({ "file_path": path, "content": "written\n" }));
    let edit = |path: &str| call("Edit", &json!({ "file_path": path, "old_string": "", "new_string": "x" }));
    let find =
        |path: &str| call("Grep", &json!({ "pattern": "CANARY", "path": path, "output_mode": "content" }));
    let command = json!({ "command": format!("cat {CANARY_FILE}"), "description": "try" });
    let rows: [(String, Holds, Check); 17] = [
        (format!("/cost @{CANARY_FILE} @{OUTSIDE} USERRAW?"), slash, Check::Slash),
        (format!("@{CANARY_FILE} @{OUTSIDE} USERRAW?"), unattached, Check::Attachment),
        ("SYSTEM?".into(), |said| said.contains(CANARY_SYSTEM) && uninstructed(said), Check::System),
        ("HISTORY?".into(), |said| said.contains(CANARY_EARLIER), Check::History),
        (read(CANARY_FILE), |said| ok(said) && said.contains(CANARY_ATTACHED), Check::FileTools),
        (read("CLAUDE.md"), |said| ok(said) && said.contains(CANARY_INSTRUCTIONS), Check::FileTools),
        (find("."), |said| ok(said) && said.contains(CANARY_ATTACHED), Check::FileTools),
        (write("proof-written.txt"), ok, Check::FileTools),
        (read("proof-written.txt"), |said| ok(said) && said.contains("written"), Check::FileTools),
        (read(HOOKED_BY_SETTINGS), missing, Check::SettingsHook),
        (read(HOOKED_BY_MCP), missing, Check::McpServer),
        (read(OUTSIDE), denied, Check::ReadOutside),
        (read("/etc/passwd"), denied, Check::ReadOutside),
        (find(".."), denied, Check::FindOutside),
        (write(WRITTEN_OUTSIDE), denied, Check::WriteOutside),
        (edit(WRITTEN_OUTSIDE), denied, Check::WriteOutside),
        (call("Bash", &command), absent, Check::Command),
    ];
    rows.into_iter().map(|(prompt, holds, check)| Trial { prompt, holds, check }).collect()
}

fn call(tool: &str, input: &serde_json::Value) -> String {
    format!("CALLS: {tool} {input}")
}

fn ok(said: &str) -> bool {
    said.contains("CALLS 1 ok:")
}

fn failed(said: &str) -> bool {
    said.contains("CALLS 1 error:") && !said.contains(CANARY_OUTSIDE) && !said.contains("root:")
}

fn missing(said: &str) -> bool {
    failed(said) && said.contains("does not exist")
}

/// Refused by the rules. What is only not there is not refused.
fn denied(said: &str) -> bool {
    failed(said)
        && !said.contains("does not exist")
        && (said.contains("is outside") || said.contains("denied"))
}

fn absent(said: &str) -> bool {
    failed(said) && said.contains("No such tool")
}

fn slash(said: &str) -> bool {
    said.contains("[embedded]") && said.contains("/cost @")
}

fn unattached(said: &str) -> bool {
    said.contains(CANARY_FILE) && !said.contains(CANARY_ATTACHED) && !said.contains(CANARY_OUTSIDE)
}

fn uninstructed(said: &str) -> bool {
    !said.contains(CANARY_INSTRUCTIONS)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// What the real CLI said to each trial.
    pub fn good() -> Vec<String> {
        let outside = "[embedded] CALLS 1 error:\n/x is outside /w; --restricted confines the file tools";
        let missing = "[embedded] CALLS 1 error:\nFile does not exist.";
        let absent = "[embedded] CALLS 1 error:\n<tool_use_error>Error: No such tool available: Bash.</tool_use_error>";
        [
            r#"[embedded] [{"type":"text","text":" /cost @attach-canary.txt USERRAW?"}]"#,
            r#"[embedded] [{"type":"text","text":" @attach-canary.txt USERRAW?"}]"#,
            "[embedded] … CANARY-SYSTEM-PROMPT",
            r#"[embedded] [["assistant","CANARY-EARLIER-ANSWER"]]"#,
            "[embedded] CALLS 1 ok:\n1\tCANARY-ATTACHED",
            "[embedded] CALLS 1 ok:\n1\tCANARY-CLAUDE-MD",
            "[embedded] CALLS 1 ok:\nattach-canary.txt:1:CANARY-ATTACHED",
            "[embedded] CALLS 1 ok:\nFile created",
            "[embedded] CALLS 1 ok:\n1\twritten",
            missing,
            missing,
            outside,
            outside,
            outside,
            "[embedded] CALLS 1 error:\nPermission for this tool use was denied.",
            outside,
            absent,
        ]
        .map(String::from)
        .to_vec()
    }

    #[test]
    fn each_check_of_a_folder_fails_by_its_own_fault_and_by_no_other() {
        let trials = trials();
        let good = good();
        assert_eq!(trials.len(), good.len());
        for (trial, said) in trials.iter().zip(&good) {
            assert!((trial.holds)(said), "{}: {said}", trial.prompt);
            // Silence, a success of what must be denied and a failure of what must work are none.
            let turned = match said.contains("CALLS 1 ok:") {
                true => said.replace("CALLS 1 ok:", "CALLS 1 error:").replace("CANARY-ATTACHED", ""),
                false => said.replace("CALLS 1 error:", "CALLS 1 ok:").replace("CANARY", ""),
            };
            assert!(!(trial.holds)(""), "{}", trial.prompt);
            assert!(turned == *said || !(trial.holds)(&turned), "{}: {turned}", trial.prompt);
        }
        let leaks =
            [("@attach", CANARY_ATTACHED), ("@attach", CANARY_OUTSIDE), ("SYSTEM?", CANARY_INSTRUCTIONS)];
        let denied = [
            (r#"Read {"file_path":"../out"#, CANARY_OUTSIDE),
            ("etc/passwd", "root:x:0"),
            (r#""..""#, CANARY_OUTSIDE),
        ];
        for (part, leak) in leaks.into_iter().chain(denied) {
            let at =
                trials.iter().position(|trial| trial.prompt.contains(part) && !trial.prompt.contains("cost"));
            let at = at.unwrap_or_else(|| panic!("no trial of {part}"));
            assert!(!(trials[at].holds)(&format!("{}\n{leak}", good[at])), "{part} with {leak}");
        }
        // A file that is not there was not refused.
        let gone = "[embedded] CALLS 1 error:\nFile does not exist. It is outside.";
        for trial in trials.iter().filter(|trial| trial.check == Check::ReadOutside) {
            assert!(!(trial.holds)(gone));
        }
    }
}
