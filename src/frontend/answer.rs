//! The merger: however many turns an agent takes, the client gets one well-formed message.
//! Without I/O. It must never show a tool call of the CLI's own, nor a message that the CLI wrote by itself.

use std::collections::HashSet;

use uuid::Uuid;

use gaoler_protocol::{Exit, Reason, RunId};

use super::cli::client::PREFIX;
use super::cli::decode::{
    Assistant, BlockStart, Delta, Event, Init, MISSING, Outcome, RateLimit, Server, Stream, Usage,
};
use super::error::ApiError;
use super::job::{Shape, Thinking};

/// Tool calls that are open at the same time, at most; more are not counted.
const OPEN_TOOLS_MAX: usize = 1024;
/// Calls of a client's tools in one turn, at most. A turn with more is no model's.
const CALLS_MAX: usize = 1024;
/// Bytes of memory that an answer takes, at most: some thirty times the longest that a model gives in one turn.
pub const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes of a text in one event. One that comes at once is told in such pieces: an event is memory that its readers hold.
const PIECE_BYTES_MAX: usize = 32 * 1024;
/// What a block takes beside its bytes, in a list that has grown.
const BLOCK_COST: usize = 256;
/// The model that the CLI names where it wrote a message by itself.
const SYNTHETIC: &str = "<synthetic>";
/// The tool by which the model gives an answer in JSON.
const STRUCTURED: &str = "StructuredOutput";
/// The upstream's stop reasons that a client may see. `tool_use` is not one: those tools were the CLI's.
pub(super) const STOP_REASONS: &[&str] =
    &["end_turn", "max_tokens", "stop_sequence", "pause_turn", "refusal", "model_context_window_exceeded"];
/// Why an answer stops that has calls for its client.
pub(super) const TOOL_USE: &str = "tool_use";
/// Seconds of `retry-after` beyond which an official client should not wait at all.
const RETRY_AFTER_WORTH: u64 = 60;

/// One step of the answer, to be written as a server-sent event.
#[derive(Debug, Clone, PartialEq)]
pub enum Emit {
    /// The message begins.
    Start,
    /// A block begins, empty.
    BlockStart(usize, Kind),
    /// Text is added to a block, of the kind that it has.
    Text(usize, String),
    /// Thinking is added.
    Thinking(usize, String),
    /// A signature is added.
    Signature(usize, String),
    /// A piece of a call's input, JSON, is added.
    Input(usize, String),
    /// A block ends.
    BlockStop(usize),
}

/// The kind of a block that a client sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// Thinking.
    Thinking,
    /// Thinking that only the model can read; whole from the start.
    Redacted(String),
    /// A call of a tool of the client's. Its text is its input, JSON.
    ToolUse {
        /// The id that its result refers to.
        id: String,
        /// The tool, as the client calls it.
        name: String,
    },
}

/// A block as it is so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Its kind.
    pub kind: Kind,
    /// Its text or thinking.
    pub text: String,
    /// Its signature, where it is thinking.
    pub signature: String,
}

impl Shown {
    /// Bytes of memory that it takes.
    fn bytes(&self) -> usize {
        let kind = match &self.kind {
            Kind::Text | Kind::Thinking => 0,
            Kind::Redacted(data) => data.capacity(),
            Kind::ToolUse { id, name } => id.capacity() + name.capacity(),
        };
        BLOCK_COST + kind + self.text.capacity() + self.signature.capacity()
    }
}

/// Who the answer is for, and what it is called.
#[derive(Debug, Clone)]
pub struct Heading {
    /// The message's id.
    pub id: String,
    /// The session, where the request named one.
    pub session: Option<Uuid>,
    /// The run.
    pub run: RunId,
    /// The model that was asked for; the upstream's word replaces it.
    pub model: String,
    /// Seconds since 1970 when it was asked for.
    pub asked_at: u64,
    /// Whether a stream of completions ends with what was used.
    pub usage_last: bool,
    /// MCP servers that the request named.
    pub servers: Vec<String>,
}

/// How it ended, once it has.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// With a message.
    Done(Done),
    /// Without.
    Failed(ApiError),
}

/// The end of a message.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// Why the model stopped.
    pub stop_reason: &'static str,
    /// What was used in all turns.
    pub usage: Usage,
    /// US dollars, by the CLI's price list.
    pub cost_usd: Option<f64>,
}

/// The answer so far.
#[derive(Debug)]
pub struct Answer {
    /// Its name.
    pub heading: Heading,
    /// Its blocks.
    pub blocks: Vec<Shown>,
    /// What the first turn had used when it began.
    pub first_usage: Usage,
    /// How each MCP server of the request stood when the turn began, by the CLI's word.
    pub servers: Vec<(String, &'static str)>,
    shape: Shape,
    thinking: Thinking,
    begun: bool,
    /// Bytes of memory that its blocks take.
    bytes: usize,
    /// Which of its blocks are calls.
    called: Vec<usize>,
    /// The first of its blocks that is not empty: of text, of thinking.
    said: [Option<usize>; 2],
    /// The upstream's number of the block that is open, and ours.
    open: Option<(u64, usize)>,
    /// Our number of the first block of this turn.
    turn_begins: usize,
    /// The upstream's id of the message that was streamed last.
    streamed: String,
    open_tools: HashSet<String>,
    tools_ran: bool,
    rate_limit: Option<RateLimit>,
    result_text: String,
    /// The text is JSON that follows a schema, and nothing that the model says beside it.
    structured: bool,
    /// The client has tools of its own.
    offers: bool,
    /// The newest message came whole, not streamed.
    whole: bool,
    /// Calls of these in this turn, by their ids.
    calls: Vec<String>,
    /// What the turns so far have used, where no result says it.
    used: Usage,
    /// What the run's earlier answers have told of what it used.
    told: Usage,
    ending: Option<Ending>,
}

impl Answer {
    /// An answer with nothing in it.
    pub fn new(heading: Heading, shape: Shape, thinking: Thinking) -> Answer {
        Answer {
            heading,
            blocks: Vec::new(),
            first_usage: Usage::default(),
            servers: Vec::new(),
            shape,
            thinking,
            begun: false,
            bytes: 0,
            called: Vec::new(),
            said: [None, None],
            open: None,
            turn_begins: 0,
            streamed: String::new(),
            open_tools: HashSet::new(),
            tools_ran: false,
            rate_limit: None,
            result_text: String::new(),
            structured: false,
            offers: false,
            whole: false,
            calls: Vec::new(),
            used: Usage::default(),
            told: Usage::default(),
            ending: None,
        }
    }

    /// The same, whose text is JSON.
    pub fn structured(self, structured: bool) -> Answer {
        Answer { structured, ..self }
    }

    /// The same, for a client with tools of its own.
    pub fn offering(self, offers: bool) -> Answer {
        Answer { offers, ..self }
    }

    /// A call that was shown waits for its client. A message that was not streamed has no end of its own: it ends here.
    pub fn call_waits(&mut self) {
        if self.whole && self.ending.is_none() {
            self.stop_for_calls();
        }
    }

    fn stop_for_calls(&mut self) {
        let done = Done { stop_reason: TOOL_USE, usage: self.used, cost_usd: None };
        self.ending = Some(Ending::Done(done));
    }

    /// The same, of a run whose earlier answers have told this much.
    pub fn after(self, told: Usage) -> Answer {
        Answer { told, ..self }
    }

    /// The calls that its client has been shown and has to answer.
    pub fn calls(&self) -> &[String] {
        &self.calls
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.bytes + self.result_text.capacity()
    }

    /// How many of the blocks before this one are calls.
    pub fn calls_before(&self, block: usize) -> usize {
        self.called.partition_point(|call| *call < block)
    }

    /// Whether a block before this one has something of this kind to say.
    pub fn said_before(&self, block: usize, kind: &Kind) -> bool {
        said_of(kind).and_then(|which| self.said[which]).is_some_and(|first| first < block)
    }

    /// Whether the run waits for its client.
    pub fn waits(&self) -> bool {
        matches!(&self.ending, Some(Ending::Done(done)) if done.stop_reason == TOOL_USE)
    }

    /// Whether the upstream has begun to answer: from here on the credential is proven and the status is 200.
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// How it ended, if it has.
    pub fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    /// Whether a tool of the CLI is at work, so that silence is not the upstream's.
    pub fn tool_at_work(&self) -> bool {
        !self.open_tools.is_empty()
    }

    /// Takes one event in. Nothing follows an ending.
    pub fn feed(&mut self, event: Event) -> Vec<Emit> {
        let mut out = Vec::new();
        if self.ending.is_some() {
            return out;
        }
        match event {
            Event::Init(init) => self.init(&init),
            // Whoever reads the CLI's lines answers what it asks.
            Event::Asked(_) | Event::Servers(_) | Event::Other => {}
            Event::Stream(stream) => self.stream(stream, &mut out),
            Event::Assistant(message) => self.assistant(message, &mut out),
            Event::ToolResults(ids) => ids.iter().for_each(|id| {
                self.open_tools.remove(id);
            }),
            // The CLI would repeat a request that no repetition can help; the client waits for nothing.
            Event::Retry(Some(status @ (401 | 403))) => self.fail(ApiError::upstream(Some(status), "")),
            Event::Retry(_) => self.retry(&mut out),
            Event::RateLimit(rate_limit) => self.rate_limit = Some(rate_limit),
            Event::Result(outcome) => self.result(*outcome, &mut out),
        }
        if self.bytes > ANSWER_BYTES_MAX {
            let message =
                format!("The answer takes more than {ANSWER_BYTES_MAX} bytes; ask for less at once.");
            self.fail(ApiError::internal("output_limit", message).final_word());
        }
        out
    }

    /// Ends the answer with this error, unless it has ended.
    pub fn fail(&mut self, error: ApiError) {
        self.ending.get_or_insert(Ending::Failed(error));
    }

    /// Says why it failed, where somebody knows more.
    pub fn because(&mut self, error: ApiError) {
        self.ending = Some(Ending::Failed(error));
    }

    /// The run's end, after which nothing more can come: decides for an answer that has no ending yet.
    pub fn exited(&mut self, exit: Option<&Exit>) {
        if self.ending.is_some() {
            return;
        }
        self.fail(exit_error(exit));
    }

    /// The ending, and the steps that are still missing before it. Call it once, after the last event.
    pub fn finish(&mut self) -> (Vec<Emit>, Ending) {
        let mut out = Vec::new();
        match self.ending.take() {
            Some(Ending::Done(done)) => {
                self.begin(&mut out);
                self.close(&mut out);
                let has_first = |block: &Shown| matches!(block.kind, Kind::Text | Kind::ToolUse { .. });
                if !self.blocks.iter().any(has_first) {
                    // Clients read content[0].text; the CLI's own last word is the best that there is.
                    let text = std::mem::take(&mut self.result_text);
                    self.whole(Kind::Text, text, &mut out);
                }
                (out, Ending::Done(done))
            }
            Some(Ending::Failed(mut error)) => {
                self.close(&mut out);
                if self.tools_ran && error.status >= 429 {
                    error.should_retry = Some(false);
                }
                (out, Ending::Failed(error))
            }
            None => {
                self.exited(None);
                self.finish()
            }
        }
    }

    /// A schema that the CLI does not take it leaves out without a word: then the tool is not there.
    fn init(&mut self, init: &Init) {
        let word = |name: &String| {
            let found = init.mcp_servers.iter().find(|server| server.name == *name);
            (name.clone(), found.map_or(MISSING, Server::word))
        };
        self.servers = self.heading.servers.iter().map(word).collect();
        if self.structured && !init.tools.iter().any(|tool| tool == STRUCTURED) {
            let message = "output_config.format.schema: the CLI does not take this schema; it must be valid, and that of an object.";
            self.fail(ApiError::new(400, "schema_refused", message));
        }
    }

    fn begin(&mut self, out: &mut Vec<Emit>) {
        if !self.begun {
            self.begun = true;
            out.push(Emit::Start);
        }
    }

    fn stream(&mut self, stream: Stream, out: &mut Vec<Emit>) {
        match stream {
            Stream::Start { id, model, usage } => {
                if !self.begun {
                    self.first_usage = usage;
                    self.heading.model = model;
                }
                self.begin(out);
                self.close(out);
                self.turn_begins = self.blocks.len();
                self.whole = false;
                self.streamed = id;
                self.used = self.used.plus(&Usage { output_tokens: 0, ..usage });
            }
            // A block before any message is a forgery or a fault; neither is shown.
            _ if !self.begun => {}
            Stream::BlockStart { index, block } => {
                self.close(out);
                if let Some((kind, text)) = self.shown(block) {
                    let ours = self.start_block(kind, out);
                    self.open = Some((index, ours));
                    self.add(ours, Delta::Text(text), out);
                }
            }
            Stream::Delta { index, delta } => match self.open {
                Some((theirs, ours)) if theirs == index => self.add(ours, delta, out),
                _ => {}
            },
            Stream::BlockStop { .. } => self.close(out),
            Stream::Used(Usage { output_tokens, .. }) => {
                self.used = self.used.plus(&Usage { output_tokens, ..Usage::default() });
            }
            Stream::Stop => {
                self.close(out);
                // The turn's other tools go on meanwhile; what comes of them is in the next answer.
                if !self.calls.is_empty() {
                    self.stop_for_calls();
                }
            }
            Stream::Other => {}
        }
    }

    /// A whole message that was not streamed: the CLI's answer after it gave up streaming.
    fn assistant(&mut self, message: Assistant, out: &mut Vec<Emit>) {
        if message.model == SYNTHETIC {
            return;
        }
        if message.id == self.streamed && self.begun {
            return;
        }
        if !self.begun {
            self.heading.model = message.model;
        }
        self.begin(out);
        self.whole = true;
        for block in message.blocks {
            if let Some((kind, text)) = self.shown(block) {
                self.close(out);
                self.whole(kind, text, out);
            }
        }
    }

    /// What of a block is shown: its kind and what it begins with.
    fn shown(&mut self, block: BlockStart) -> Option<(Kind, String)> {
        match block {
            BlockStart::Text(_) if self.structured => None,
            BlockStart::Text(text) => Some((Kind::Text, text)),
            BlockStart::Thinking(text) => {
                (self.thinking == Thinking::Shown).then_some((Kind::Thinking, text))
            }
            BlockStart::RedactedThinking(data) => {
                (self.thinking == Thinking::Shown).then_some((Kind::Redacted(data), String::new()))
            }
            BlockStart::ToolUse { id, name, input } => {
                if let Some(name) = name.strip_prefix(PREFIX).filter(|_| self.offers) {
                    if self.calls.len() >= CALLS_MAX {
                        let message =
                            format!("There are more than {CALLS_MAX} calls of your tools in one turn.");
                        self.fail(ApiError::internal("cli_garbage", message).final_word());
                        return None;
                    }
                    self.calls.push(id.clone());
                    return Some((Kind::ToolUse { id, name: name.to_owned() }, input.unwrap_or_default()));
                }
                self.tools_ran = true;
                if self.open_tools.len() < OPEN_TOOLS_MAX {
                    self.open_tools.insert(id);
                }
                None
            }
            BlockStart::Other => None,
        }
    }

    fn start_block(&mut self, kind: Kind, out: &mut Vec<Emit>) -> usize {
        let ours = self.blocks.len();
        out.push(Emit::BlockStart(ours, kind.clone()));
        if let Kind::ToolUse { .. } = kind {
            self.called.push(ours);
        }
        let shown = Shown { kind, text: String::new(), signature: String::new() };
        self.bytes += shown.bytes();
        self.blocks.push(shown);
        ours
    }

    fn whole(&mut self, kind: Kind, text: String, out: &mut Vec<Emit>) {
        let ours = self.start_block(kind, out);
        self.add(ours, Delta::Text(text), out);
        out.push(Emit::BlockStop(ours));
    }

    fn add(&mut self, ours: usize, delta: Delta, out: &mut Vec<Emit>) {
        let Some(block) = self.blocks.get_mut(ours) else { return };
        let before = block.bytes();
        match (&block.kind, delta) {
            (_, Delta::Text(text) | Delta::Thinking(text)) if text.is_empty() => {}
            (Kind::Text, Delta::Text(text)) => {
                block.text.push_str(&text);
                out.extend(pieces(text).map(|piece| Emit::Text(ours, piece)));
            }
            (Kind::Thinking, Delta::Thinking(text) | Delta::Text(text)) => {
                block.text.push_str(&text);
                out.extend(pieces(text).map(|piece| Emit::Thinking(ours, piece)));
            }
            (Kind::ToolUse { .. }, Delta::Input(text) | Delta::Text(text)) => {
                block.text.push_str(&text);
                out.extend(pieces(text).map(|piece| Emit::Input(ours, piece)));
            }
            (Kind::Thinking, Delta::Signature(signature)) => {
                block.signature.push_str(&signature);
                out.push(Emit::Signature(ours, signature));
            }
            // A delta of another kind than its block, or of no known kind, is not shown.
            _ => {}
        }
        self.bytes += block.bytes() - before;
        if let Some(which) = said_of(&block.kind).filter(|_| !block.text.is_empty()) {
            self.said[which].get_or_insert(ours);
        }
    }

    fn close(&mut self, out: &mut Vec<Emit>) {
        if let Some((_, ours)) = self.open.take() {
            out.push(Emit::BlockStop(ours));
        }
    }

    /// The upstream's stream broke and the CLI asks again from the turn's start. What a client has already
    /// got cannot be taken back; a JSON body has not been sent yet and leaves the broken piece out.
    fn retry(&mut self, out: &mut Vec<Emit>) {
        self.close(out);
        // What was called in the broken piece never came to the CLI's own ears.
        self.calls.clear();
        if self.shape == Shape::Json {
            self.blocks.truncate(self.turn_begins);
            self.bytes = self.blocks.iter().map(Shown::bytes).sum();
            self.called.truncate(self.calls_before(self.turn_begins));
            let begins = self.turn_begins;
            self.said = self.said.map(|first| first.filter(|first| *first < begins));
        }
    }

    fn result(&mut self, outcome: Outcome, out: &mut Vec<Emit>) {
        self.close(out);
        let stop_reason = outcome.stop_reason.as_deref().unwrap_or_default();
        let known = STOP_REASONS.iter().find(|&&reason| reason == stop_reason).copied();
        let done = |stop_reason| {
            let usage = outcome.usage.minus(&self.told);
            Ending::Done(Done { stop_reason, usage, cost_usd: outcome.total_cost_usd })
        };
        let claim = outcome.result.as_deref().unwrap_or_default();
        // `subtype` stays "success" for most failures, so `is_error` and the status are asked first.
        let ending = match (outcome.subtype.as_str(), outcome.is_error, outcome.api_error_status) {
            ("error_max_turns" | "error_max_budget_usd", ..) => done("pause_turn"),
            (_, true, Some(429)) => Ending::Failed(self.rate_limited(claim)),
            (_, true, Some(status)) => Ending::Failed(ApiError::upstream(Some(status), claim)),
            _ if stop_reason == "refusal" => done("refusal"),
            // The model's answer was cut, again and again: what there is of it is an answer all the same.
            (_, true, None) if self.begun && outcome.api_error.as_deref() == Some("max_output_tokens") => {
                done("max_tokens")
            }
            ("success", true, None) => Ending::Failed(ApiError::upstream(None, "")),
            ("success", false, _) if self.structured && outcome.structured_output.is_none() => {
                let message = "The model did not give an answer that follows the schema.";
                Ending::Failed(ApiError::internal("schema_not_met", message).final_word())
            }
            ("success", false, _) => done(known.unwrap_or("end_turn")),
            _ => Ending::Failed(ApiError::internal("cli_failed", "The CLI ended its turn with an error.")),
        };
        // A refusal's text would be the CLI's advice to its user at a terminal; the stop reason says enough.
        let json = outcome.structured_output.filter(|_| self.structured);
        self.result_text = json.or(outcome.result.filter(|_| !outcome.is_error)).unwrap_or_default();
        self.ending = Some(ending);
    }

    fn rate_limited(&self, claim: &str) -> ApiError {
        let error = ApiError::upstream(Some(429), claim);
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |elapsed| elapsed.as_secs());
        let resets_at = self.rate_limit.as_ref().filter(|r| r.status == "rejected").and_then(|r| r.resets_at);
        match resets_at.map(|at| at.saturating_sub(now).max(1)) {
            Some(seconds) if seconds > RETRY_AFTER_WORTH => {
                ApiError { code: "plan_limit", ..error.after(seconds).final_word() }
            }
            Some(seconds) => error.after(seconds),
            None => error,
        }
    }
}

/// A text in pieces for an event each.
fn pieces(text: String) -> impl Iterator<Item = String> {
    let mut out = Vec::new();
    let mut at = 0;
    while text.len() - at > PIECE_BYTES_MAX {
        // A character has four bytes, at most.
        let end = (0..4).map(|back| at + PIECE_BYTES_MAX - back).find(|end| text.is_char_boundary(*end));
        let end = end.unwrap_or(text.len());
        out.push(text[at..end].to_owned());
        at = end;
    }
    out.push(if at == 0 { text } else { text[at..].to_owned() });
    out.into_iter()
}

/// Where it is noted that a block of this kind has said something.
fn said_of(kind: &Kind) -> Option<usize> {
    match kind {
        Kind::Text => Some(0),
        Kind::Thinking => Some(1),
        Kind::Redacted(_) | Kind::ToolUse { .. } => None,
    }
}

/// What a run's end means to whoever waits for its answer.
pub fn exit_error(exit: Option<&Exit>) -> ApiError {
    match exit.map(|exit| exit.reason) {
        Some(Reason::Oom) => ApiError::internal("memory_limit", "The run hit its memory limit.").final_word(),
        Some(Reason::Wall) => ApiError::new(504, "wall_limit", "The run hit its time limit.").final_word(),
        Some(Reason::Idle) => {
            ApiError::new(504, "idle_limit", "The run was silent for too long.").final_word()
        }
        Some(Reason::Tasks) => {
            ApiError::internal("task_limit", "The run hit its limit of processes.").final_word()
        }
        Some(Reason::Output) => {
            ApiError::internal("output_limit", "The run wrote more output than it may.").final_word()
        }
        Some(Reason::Disk) => {
            ApiError::internal(
                "disk_limit",
                "Your workspaces and sessions take more of the disk than they may together: DELETE some, or files in them. GET \
                 /v1/workspaces/default says how much it is.",
            )
            .final_word()
        }
        Some(Reason::Locks) => {
            ApiError::internal("lock_limit", "The run held more locks on files than it may.").final_word()
        }
        Some(Reason::EgressDied) => {
            ApiError::internal("egress_died", "The run's way to the upstream API broke down.")
        }
        Some(Reason::Drained) => ApiError::draining(),
        Some(Reason::Cancelled) => ApiError::internal("cancelled", "The run was cancelled."),
        Some(Reason::Exited | Reason::Signaled | Reason::InitDied | Reason::Finished) => {
            ApiError::internal("cli_exited", "The CLI ended without a result.")
        }
        None => ApiError::internal("run_lost", "The run ended and no word of it came."),
    }
}

#[cfg(test)]
mod tests;
