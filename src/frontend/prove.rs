//! The self-test of the CLI's invocation: one run of the real CLI in a hostile workspace, against the embedded
//! upstream. It must never pass where it has not looked: each check has a positive half.

mod folder;

use std::time::Duration;

use tokio::time::timeout;

use gaoler_protocol::{Limits, Proven, Refused, Rules, Spawn};

use super::answer::{Answer, Ending, Heading};
use super::cli::decode::{self, Event, Init};
use super::cli::input;
use super::job::mcp::Settled;
use super::job::{self, Block, Job, Shape, Thinking};
use super::run::Talk;
use super::tenant::Credential;
use super::{Frontend, id, log, way};

/// How long all of it may take: less than deploy/gaoler.service waits. It takes about one second, and a minute
/// where a busy host emulates its system calls; a CLI that hangs must not hang the start.
const PROOF_WAIT: Duration = Duration::from_secs(100);
const TOKEN: &str = "sk-ant-oat01-selftest-of-the-invocation";
const PERMISSION_MODE: &str = "bypassPermissions";
/// What the supervisor plants in the workspace of a proof run, or what that would leave behind.
const CANARY_FILE: &str = "attach-canary.txt";
const CANARY_ATTACHED: &str = "CANARY-ATTACHED";
const CANARY_INSTRUCTIONS: &str = "CANARY-CLAUDE-MD";
const HOOKED_BY_SETTINGS: &str = "hooked-by-settings";
const HOOKED_BY_MCP: &str = "hooked-by-mcp";
/// What this test itself gives to the CLI.
const CANARY_SYSTEM: &str = "CANARY-SYSTEM-PROMPT";
const CANARY_EARLIER: &str = "CANARY-EARLIER-ANSWER";

macro_rules! checks {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $message:literal;)*) => {
        /// One property of the invocation, by the number in Proven.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Check { $($(#[$doc])* $name = $number,)* }

        impl Check {
            /// What it means that this check failed, for the operator.
            pub const fn message(self) -> &'static str { match self { $(Check::$name => $message,)* } }

            /// The check with this number.
            pub fn from_number(number: u32) -> Option<Check> {
                match number { $($number => Some(Check::$name),)* _ => None }
            }
        }
    };
}

checks! {
    /// The run starts.
    Starts = 1, "a cage for the self-test could not be started; the supervisor's log says which step failed";
    /// The CLI answers each prompt.
    Answers = 2, "the CLI did not answer the self-test: it does not run in a cage here, or the hostile workspace took its upstream away; the lines above say more";
    /// It is the version that was measured.
    Version = 3, "the CLI is not of the version in cli.version; fetch the pinned one, or its behaviour is unknown";
    /// Tools are permitted as asked: the cage is the boundary.
    PermissionMode = 4, "the CLI is not in the permission mode that it was started with";
    /// No MCP server of the workspace is known.
    McpConfig = 5, "the CLI took MCP servers from the workspace in spite of --strict-mcp-config";
    /// A prompt that begins with `/` reaches the model.
    Slash = 6, "the CLI took a prompt that begins with a slash for a command of its own";
    /// `@file` in a prompt attaches nothing.
    Attachment = 7, "the CLI attached a file that a prompt named with @";
    /// The tools work, or the next three checks would prove nothing.
    Tools = 8, "the CLI's Bash tool did not list the workspace of the self-test";
    /// Hooks of the workspace's settings do not run.
    SettingsHook = 9, "a hook in the workspace's .claude/settings.json ran in spite of --setting-sources";
    /// MCP servers of the workspace do not start.
    McpServer = 10, "a server in the workspace's .mcp.json was started";
    /// CLAUDE.md is not read.
    Instructions = 11, "the workspace's CLAUDE.md was sent to the model";
    /// The system prompt arrives.
    System = 12, "the system prompt of a request does not reach the model";
    /// Earlier turns arrive.
    History = 13, "the earlier turns of a request do not reach the model";
    /// The tools are those of the rules.
    ToolSet = 14, "the CLI offers other tools than its rules name";
    /// File tools work in the workspace, or the denials would prove nothing.
    FileTools = 15, "the CLI's file tools did not work inside the workspace of the self-test";
    /// Nothing outside the workspace is read.
    ReadOutside = 16, "the CLI did not refuse to read a file outside the workspace: its rules keep no tenants apart here";
    /// Nothing outside the workspace is searched.
    FindOutside = 17, "the CLI did not refuse to search outside the workspace: its rules keep no tenants apart here";
    /// Nothing outside the workspace is written.
    WriteOutside = 18, "the CLI did not refuse to write outside the workspace: its rules keep no tenants apart here";
    /// There are no commands.
    Command = 19, "the CLI ran a command, or said nothing of its absence, under rules that allow none";
}

/// Runs the self-test and says what it found. The operator's messages go to the log.
pub async fn prove(frontend: &Frontend, rules: Rules) -> Proven {
    let mut seen = Seen::default();
    let verdict = match timeout(PROOF_WAIT, look(frontend, rules, &mut seen)).await {
        Ok(Ok(())) => judge(&seen, &frontend.settings().cli.version, rules),
        Ok(Err(check)) => Err(check),
        Err(_) => Err(Check::Answers),
    };
    let failed = match verdict {
        Ok(()) => 0,
        Err(check) => {
            let fields = [("check", (check as u32).into()), ("why", check.message().into())];
            log::line("self_test_failed", &fields);
            check as u32
        }
    };
    Proven { failed, version: numbers(&seen.init.claude_code_version) }
}

/// What the run showed.
#[derive(Debug, Default)]
struct Seen {
    init: Init,
    /// The answer to each prompt, in order.
    answers: Vec<String>,
}

/// The prompts, one turn each, all in one process. What each is for, [`judge`] says.
fn prompts(rules: Rules) -> Vec<String> {
    match rules {
        Rules::Cage => {
            let raw = format!("/cost @{CANARY_FILE} USERRAW?");
            vec![raw, "RUN: echo .[!.]* *".into(), "SYSTEM?".into(), "HISTORY?".into()]
        }
        Rules::Directory => folder::trials().into_iter().map(|trial| trial.prompt).collect(),
    }
}

async fn look(frontend: &Frontend, rules: Rules, seen: &mut Seen) -> Result<(), Check> {
    let job = job()?;
    let credential = Credential::parse(TOKEN).map_err(|_| Check::Starts)?;
    let level = gaoler_protocol::Level::from_name(&frontend.settings().level.default)
        .unwrap_or(gaoler_protocol::Level::Balanced);
    let version = &frontend.settings().cli.version;
    let order = way::Order::new(&job, credential.tenant(&frontend.secret), level, Limits::NONE);
    let spawn = Spawn { ephemeral: true, proof: true, ..order.spawn };
    let (fds, _) =
        order.fds(&job, &Settled::default(), &credential.bytes(), version).map_err(|_| Check::Starts)?;
    let run = frontend.supervisor.spawn(spawn, fds).await.map_err(not_started)?;
    let mut talk = Talk::new(run, way::bounds(frontend, level, false), None);
    let result = turns(&mut talk, rules, seen).await;
    let (_, stderr) = talk.end_with_stderr().await;
    if result.is_err() {
        // This run is the operator's own, not a tenant's: what its CLI said may be shown.
        String::from_utf8_lossy(&stderr)
            .lines()
            .take(20)
            .for_each(|text| log::line("self_test_stderr", &[("text", text.into())]));
    }
    result
}

fn not_started(refused: Refused) -> Check {
    let fields = [
        ("reason", refused.reason.name().into()),
        ("step", refused.step.into()),
        ("errno", refused.errno.into()),
    ];
    log::line("self_test_refused", &fields);
    Check::Starts
}

fn job() -> Result<Job, Check> {
    let body = format!(
        r#"{{"system":"{CANARY_SYSTEM}","messages":[{{"role":"user","content":"earlier"}},
            {{"role":"assistant","content":"{CANARY_EARLIER}"}},{{"role":"user","content":"now"}}]}}"#
    );
    job::parse(body.as_bytes(), &[]).map_err(|_| Check::Starts)
}

async fn turns(talk: &mut Talk, rules: Rules, seen: &mut Seen) -> Result<(), Check> {
    for prompt in prompts(rules) {
        talk.say(input::user(&[Block::Text(prompt)]));
        let heading = Heading {
            id: id::message(),
            session: None,
            run: id::run(),
            model: String::new(),
            asked_at: 0,
            usage_last: false,
            servers: Vec::new(),
        };
        let mut answer = Answer::new(heading, Shape::Json, Thinking::Hidden);
        while answer.ending().is_none() {
            let Ok(Some(line)) = talk.line().await else { return Err(Check::Answers) };
            match decode::event(&line) {
                Ok(Event::Init(init)) => seen.init = init,
                Ok(event) => drop(answer.feed(event)),
                Err(_) => return Err(Check::Answers),
            }
        }
        match answer.finish() {
            (_, Ending::Done(_)) => {
                seen.answers.push(answer.blocks.iter().map(|block| block.text.as_str()).collect());
            }
            (_, Ending::Failed(error)) => {
                log::line("self_test_error", &[("status", error.status.into()), ("code", error.code.into())]);
                return Err(Check::Answers);
            }
        }
    }
    Ok(())
}

/// Judges what was seen.
fn judge(seen: &Seen, version: &str, rules: Rules) -> Result<(), Check> {
    match rules {
        Rules::Cage => judge_cage(seen, version),
        Rules::Directory => judge_folder(seen, version),
    }
}

fn judge_folder(seen: &Seen, version: &str) -> Result<(), Check> {
    let hold = |held: bool, check: Check| if held { Ok(()) } else { Err(check) };
    let trials = folder::trials();
    hold(seen.init.claude_code_version == version, Check::Version)?;
    hold(seen.init.permission_mode == folder::PERMISSION_MODE, Check::PermissionMode)?;
    hold(seen.init.mcp_servers.is_empty(), Check::McpConfig)?;
    let mut tools: Vec<&str> = seen.init.tools.iter().map(String::as_str).collect();
    tools.sort_unstable();
    hold(tools == folder::TOOLS, Check::ToolSet)?;
    hold(trials.len() == seen.answers.len(), Check::Answers)?;
    trials.iter().zip(&seen.answers).try_for_each(|(trial, said)| hold((trial.holds)(said), trial.check))
}

fn judge_cage(seen: &Seen, version: &str) -> Result<(), Check> {
    let [raw, listing, system, history] = seen.answers.as_slice() else { return Err(Check::Answers) };
    let hold = |held: bool, check: Check| if held { Ok(()) } else { Err(check) };
    let nowhere = |canary: &str| !seen.answers.iter().any(|answer| answer.contains(canary));
    hold(seen.init.claude_code_version == version, Check::Version)?;
    hold(seen.init.permission_mode == PERMISSION_MODE, Check::PermissionMode)?;
    hold(seen.init.mcp_servers.is_empty(), Check::McpConfig)?;
    hold(raw.contains("[embedded]") && raw.contains("/cost @"), Check::Slash)?;
    hold(raw.contains(CANARY_FILE) && nowhere(CANARY_ATTACHED), Check::Attachment)?;
    hold(listing.contains(CANARY_FILE), Check::Tools)?;
    hold(!listing.contains(HOOKED_BY_SETTINGS), Check::SettingsHook)?;
    hold(!listing.contains(HOOKED_BY_MCP), Check::McpServer)?;
    hold(listing.contains("CLAUDE.md") && nowhere(CANARY_INSTRUCTIONS), Check::Instructions)?;
    hold(system.contains(CANARY_SYSTEM), Check::System)?;
    hold(history.contains(CANARY_EARLIER), Check::History)
}

/// A version as three numbers; zeros for what is none.
fn numbers(version: &str) -> [u16; 3] {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    [parts.next().unwrap_or(0), parts.next().unwrap_or(0), parts.next().unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Seen {
        Seen {
            init: Init {
                claude_code_version: "2.1.330".into(),
                permission_mode: PERMISSION_MODE.into(),
                mcp_servers: Vec::new(),
                tools: Vec::new(),
            },
            answers: vec![
                r#"[embedded] [{"type":"text","text":" /cost @attach-canary.txt USERRAW?"}]"#.into(),
                "[embedded] RUN ok:\n.claude\n.mcp.json\nCLAUDE.md\nattach-canary.txt".into(),
                "[embedded] … CANARY-SYSTEM-PROMPT".into(),
                r#"[embedded] [["user","earlier"],["assistant","CANARY-EARLIER-ANSWER"]]"#.into(),
            ],
        }
    }

    #[test]
    fn each_check_fails_by_its_own_fault_and_by_no_other() {
        let check = |spoil: fn(&mut Seen), expected: Result<(), Check>| {
            let mut seen = good();
            spoil(&mut seen);
            assert_eq!(judge(&seen, "2.1.330", Rules::Cage), expected);
        };
        check(|_| {}, Ok(()));
        check(|seen| drop(seen.answers.pop()), Err(Check::Answers));
        check(|seen| seen.init.claude_code_version = "2.1.331".into(), Err(Check::Version));
        check(|seen| seen.init.permission_mode = "default".into(), Err(Check::PermissionMode));
        check(|seen| seen.init.mcp_servers.push(decode::Server::default()), Err(Check::McpConfig));
        check(|seen| seen.answers[0] = "Total cost: $0".into(), Err(Check::Slash));
        check(|seen| seen.answers[0].push_str(CANARY_ATTACHED), Err(Check::Attachment));
        check(|seen| seen.answers[1] = "[embedded] RUN error:\n".into(), Err(Check::Tools));
        check(|seen| seen.answers[1].push_str("\nhooked-by-settings"), Err(Check::SettingsHook));
        check(|seen| seen.answers[1].push_str("\nhooked-by-mcp"), Err(Check::McpServer));
        check(|seen| seen.answers[3].push_str(CANARY_INSTRUCTIONS), Err(Check::Instructions));
        check(|seen| seen.answers[2].clear(), Err(Check::System));
        check(|seen| seen.answers[3] = "[embedded] []".into(), Err(Check::History));
    }

    #[test]
    fn a_folder_is_judged_by_each_of_its_answers() {
        let tools = folder::TOOLS.iter().rev().map(ToString::to_string).collect();
        let good = || Seen {
            init: Init {
                claude_code_version: "2.1.330".into(),
                permission_mode: "acceptEdits".into(),
                mcp_servers: Vec::new(),
                tools: Vec::clone(&tools),
            },
            answers: folder::tests::good(),
        };
        let check = |spoil: &dyn Fn(&mut Seen), expected: Result<(), Check>| {
            let mut seen = good();
            spoil(&mut seen);
            assert_eq!(judge(&seen, "2.1.330", Rules::Directory), expected);
        };
        check(&|_| {}, Ok(()));
        check(&|seen| drop(seen.answers.pop()), Err(Check::Answers));
        check(&|seen| seen.init.claude_code_version.clear(), Err(Check::Version));
        check(&|seen| seen.init.permission_mode = "bypassPermissions".into(), Err(Check::PermissionMode));
        check(&|seen| seen.init.mcp_servers.push(decode::Server::default()), Err(Check::McpConfig));
        check(&|seen| seen.init.tools.push("Glob".into()), Err(Check::ToolSet));
        check(&|seen| drop(seen.init.tools.pop()), Err(Check::ToolSet));
        for (at, trial) in folder::trials().into_iter().enumerate() {
            check(&|seen| seen.answers[at].clear(), Err(trial.check));
        }
    }

    #[test]
    fn every_check_has_its_number() {
        for number in 1..=19 {
            let check = Check::from_number(number).expect("a check");
            assert_eq!(check as u32, number);
            assert!(!check.message().is_empty());
        }
        assert_eq!(Check::from_number(0), None);
        assert_eq!(numbers("2.1.330"), [2, 1, 330]);
        assert_eq!(numbers("odd"), [0, 0, 0]);
    }
}
