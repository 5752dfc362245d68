//! The supervisor as the frontend sees it: a run is asked for, its pipes are served, its end is awaited.
//! It must never outlive the lease: dropping a [`Run`] is what kills its cage.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde_json::{Map, Value};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use gaoler_protocol::{
    Exit, FRAME_BYTES, LEASE_DONE, LEASE_IDLE, LEASE_OUTPUT, Level, Message, Refusal, Refused, RunId, Spawn,
    Spawned,
};
use gaoler_sys::channel;

use crate::ledger::{self, Ledger};
use crate::meter::{Meter, Past};

use super::admission::Ticket;
use super::answer::{Answer, Ending};
use super::books::{self, Note};
use super::budget::Watch;
use super::cli::client::{Asked, Client};
use super::cli::decode::Usage;
use super::cli::decode::{Bound, Garbage};
use super::cli::{decode, input};
use super::counts::Counts;
use super::error::ApiError;
use super::files::{self, Whose};
use super::http::App;
use super::job::Block;
use super::job::tools::Tool;
use super::runs::{Share, Why, Writer};
use super::trace::{self, Trace};
use super::{log, metrics, way};

/// Bytes of one read from a cage: a thousand silent runs hold as many of these, twice.
const READ_BYTES: usize = 16 * 1024;
/// Bytes of stderr that are kept. Only the operator's self-test looks at them.
const STDERR_BYTES_MAX: usize = 64 * 1024;
/// Pieces waiting for a CLI's stdin: a prompt, an interrupt, and the answers to what it asks, each of which is small or in
/// memory once.
const STDIN_PIECES_MAX: usize = 256;
/// A CLI asks, reads nothing, and asks on.
const UNREAD: Bound =
    Bound { what: "pieces of answers that the CLI asked for and did not read", most: STDIN_PIECES_MAX };
/// How long an interrupted CLI has to end by itself.
const INTERRUPT_WAIT: Duration = Duration::from_secs(3);
/// How much longer than the upstream a tool may be silent: the CLI itself ends a command after 10 minutes.
const TOOL_EXTRA: Duration = Duration::from_secs(600);
/// How long a client waits for its run's Exit. The supervisor's own deadline for a teardown is 2 s.
const EXIT_WAIT: Duration = Duration::from_secs(5);
/// Output of one CLI run, MiB, whatever its level allows: no answer of a model comes near it.
const OUTPUT_MIB_MAX: u32 = 64;
/// How a run ends whose session its CLI could not read, among other reasons.
const DOUBTFUL: [&str; 4] = ["cage_failed", "cli_exited", "cli_failed", "idle_limit"];
/// Destinations in a log line, at most.
const DESTINATIONS_MAX: usize = 32;

/// A question to the supervisor, on its way to the control task.
pub struct Ask {
    /// The message.
    pub spawn: Spawn,
    /// Options, then the credential.
    pub fds: Vec<OwnedFd>,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<Run, Refused>>,
}

/// The way to the supervisor.
#[derive(Clone)]
pub struct Supervisor {
    asks: mpsc::Sender<Ask>,
}

impl Supervisor {
    /// A way, and the end of it that the control task serves.
    pub fn new(pending_max: usize) -> (Supervisor, mpsc::Receiver<Ask>) {
        let (asks, served) = mpsc::channel(pending_max);
        (Supervisor { asks }, served)
    }

    /// Asks for a run. Dropping the future gives the run up, whenever it comes.
    ///
    /// # Errors
    /// The supervisor's refusal; `Busy` where too many questions wait already.
    pub async fn spawn(&self, spawn: Spawn, fds: Vec<OwnedFd>) -> Result<Run, Refused> {
        let refusal = |reason| Refused { run: spawn.run, reason, step: 0, errno: 0 };
        let (reply, answer) = oneshot::channel();
        self.asks.try_send(Ask { spawn, fds, reply }).map_err(|_| refusal(Refusal::Busy))?;
        answer.await.unwrap_or_else(|_| Err(refusal(Refusal::Draining)))
    }
}

/// A run: its pipes, its lease and its report. Dropping it kills the cage.
pub struct Run {
    /// What the supervisor said of it.
    pub spawned: Spawned,
    stdin: pipe::Sender,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
    lease: OwnedFd,
    report: Report,
    ledger: pipe::Receiver,
}

impl Run {
    /// A run out of the six descriptors of Spawned.
    ///
    /// # Errors
    /// A descriptor that is not what it must be; then the supervisor is not what it must be either.
    pub fn new(mut spawned: Spawned, fds: Vec<OwnedFd>) -> io::Result<Run> {
        let output_mib = &mut spawned.limits.output_mib;
        *output_mib = if *output_mib == 0 { OUTPUT_MIB_MAX } else { OUTPUT_MIB_MAX.min(*output_mib) };
        let [stdin, stdout, stderr, lease, report, ledger]: [OwnedFd; 6] =
            fds.try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Run {
            spawned,
            stdin: pipe::Sender::from_owned_fd(stdin)?,
            stdout: pipe::Receiver::from_owned_fd(stdout)?,
            stderr: pipe::Receiver::from_owned_fd(stderr)?,
            lease,
            report: Report { socket: Socket::new(report)? },
            ledger: pipe::Receiver::from_owned_fd(ledger)?,
        })
    }
}

/// The socket that only the supervisor writes to.
struct Report {
    socket: Socket,
}

impl Report {
    /// Waits for Exit; `None` where the socket ends without one.
    async fn exit(&mut self) -> Option<Exit> {
        loop {
            match self.socket.receive().await.ok()?? {
                (Message::Exit(exit), _) => return Some(exit),
                (Message::Violation(violation), _) => {
                    metrics::violation(&violation);
                    let fields =
                        [("run", violation.run.to_string().into()), ("what", violation.what.name().into())];
                    log::line("violation", &fields);
                }
                _ => {}
            }
        }
    }
}

/// A socket to the supervisor. tokio serves it as a stream socket, but only ever waits on it: frames go
/// through sendmsg(2) and recvmsg(2) of our own.
pub struct Socket {
    inner: UnixStream,
}

impl Socket {
    /// This socket, which must not block.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn new(socket: OwnedFd) -> io::Result<Socket> {
        Ok(Socket { inner: UnixStream::from_std(socket.into())? })
    }

    /// The next message; `None` at the end. Safe to drop while it waits.
    ///
    /// # Errors
    /// A frame that is not one of the list, or was cut: the supervisor is not itself any more.
    pub async fn receive(&self) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        let malformed = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let received = self
            .inner
            .async_io(Interest::READABLE, || channel::receive::<FRAME_BYTES>(self.inner.as_fd()))
            .await?;
        if received.bytes.is_empty() {
            return Ok(None);
        }
        if received.truncated {
            return Err(malformed("a frame that the kernel cut".into()));
        }
        let (_, message) = Message::decode(&received.bytes).map_err(|e| malformed(e.to_string()))?;
        match message.fds().contains(&received.fds.len()) {
            true => Ok(Some((message, received.fds))),
            false => Err(malformed(format!("{} with {} descriptors", message.name(), received.fds.len()))),
        }
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub async fn send(&self, frame: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.inner.async_io(Interest::WRITABLE, || channel::send(self.inner.as_fd(), frame, fds)).await
    }
}

/// Bounds of one run's conversation.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// How long the upstream may be silent.
    pub silence: Duration,
    /// How strict the run is.
    pub level: Level,
    /// Nothing of the run is needed after its answer: no session to be saved.
    pub disposable: bool,
}

/// How an answer's steps become bytes.
pub type Render = fn(&Answer, &[super::answer::Emit]) -> bytes::Bytes;

/// An exchange with one CLI, from its first answer to the last trace of its run.
pub struct Exchange {
    talk: Talk,
    spawned: Spawned,
    level: Level,
    running: metrics::Running,
    /// What its answers have told so far.
    told: Usage,
    /// What the ledger is told at the end.
    note: Note,
    /// Its place among all runs, free again before its client hears of the end.
    place: Ticket,
    /// The trace of the request that it serves now.
    trace: Trace,
    /// When it was launched.
    begun: Instant,
    /// The session that it goes on with, which its agent may have broken.
    resumed: Option<Resumed>,
}

/// A session that a run goes on with.
pub struct Resumed {
    /// The server.
    pub frontend: App,
    /// Whose it is.
    pub whose: Whose,
    /// Which.
    pub session: Uuid,
}

impl Resumed {
    /// The same failure, or that the session cannot be read, where that is why.
    pub async fn explain(&self, error: &ApiError) -> Option<ApiError> {
        match DOUBTFUL.contains(&error.code) {
            true => files::broken(&self.frontend, self.whose.clone(), self.session).await,
            false => None,
        }
    }
}

/// An answer that ends with calls for its client, not yet told.
pub struct Calls {
    /// The exchange, which waits.
    pub exchange: Exchange,
    /// Their ids.
    pub calls: Vec<String>,
    answer: Answer,
    ending: Ending,
    writer: Writer,
}

impl Calls {
    /// The run, as its client knows the answer.
    pub fn run(&self) -> RunId {
        self.writer.about().run
    }

    /// Tells the client. From here on it may answer.
    pub fn tell(self) -> Exchange {
        self.writer.end(Some(self.answer), self.ending, way::now_ms());
        self.exchange
    }
}

impl Exchange {
    /// One that begins with these lines. The client may have tools of its own.
    pub fn begin(
        run: Run,
        lines: Vec<u8>,
        tools: Vec<Tool>,
        bounds: Bounds,
        note: Note,
        place: Ticket,
        trace: Trace,
    ) -> Exchange {
        let (spawned, level) = (run.spawned, bounds.level);
        let running = metrics::Running::begin(&spawned, level);
        let mut talk = Talk::new(run, bounds, note.watch());
        talk.client = Client::new(&tools);
        talk.say(lines);
        trace.runs(&spawned);
        let (told, begun) = (Usage::default(), Instant::now());
        Exchange { talk, spawned, level, running, told, note, place, trace, begun, resumed: None }
    }

    /// The same, of a session.
    pub fn resumes(self, resumed: Option<Resumed>) -> Exchange {
        Exchange { resumed, ..self }
    }

    /// One answer. Where it has calls for its client, the exchange goes on after them; otherwise the answer is written to
    /// its end, and the run has ended. It ends too where nobody wants it any more.
    pub async fn answer(mut self, answer: Answer, render: Render, writer: Writer) -> Option<Calls> {
        let mut answer = answer.after(self.told);
        let mut cli = self.trace.begin("cli");
        self.talk.turn(&mut answer, render, &writer, &mut cli).await;
        cli.stop();
        if answer.waits() {
            let calls = answer.calls().to_vec();
            let (rest, ending) = answer.finish();
            let _ = writer.write(render(&answer, &rest)).await;
            if let Ending::Done(done) = &ending {
                self.told = self.told.plus(&done.usage);
            }
            return Some(Calls { exchange: self, calls, answer, ending, writer });
        }
        let Exchange { talk, spawned, level, running, note, place, trace, begun, resumed, .. } = self;
        let mut place = Some(place);
        let teardown = trace.begin("teardown");
        let (exit, ledger, late) = talk.end_in_time().await;
        drop(teardown);
        // That its lease was ended is no word of the run's, nor of anybody who cancelled it.
        answer.exited(exit.as_ref().filter(|_| !late));
        if let (Some(resumed), Some(Ending::Failed(error))) = (&resumed, answer.ending())
            && DOUBTFUL.contains(&error.code)
        {
            // The look is a run of its own.
            place = None;
            if let Some(error) = resumed.explain(error).await {
                answer.because(error);
            }
        }
        let (rest, ending) = answer.finish();
        if answer.begun() {
            // Where nobody is left to read it, the log keeps it for who comes back.
            let _ = writer.write(render(&answer, &rest)).await;
        }
        drop(running);
        cli.ended(&ending, begun.into_std(), exit.as_ref());
        drop(cli);
        ended(&spawned, level, &ending, exit.as_ref(), &ledger.destinations, &trace);
        let noted = note.write(&spawned, level, books::told(&ending), exit.as_ref(), &ledger);
        drop(place);
        writer.end(Some(answer), ending, way::now_ms());
        noted.await;
        None
    }

    /// Ends when the run has ended by itself, or may use no more. Safe to drop.
    pub async fn ended(&mut self) {
        if self.talk.exit.is_none() {
            let spent = self.talk.counts.spent(true);
            tokio::select! {
                biased;
                exit = self.talk.report.exit() => self.talk.exit = Some(exit),
                _ = spent => {}
            }
        }
    }

    /// Hands over what the client says of these calls, and goes on.
    pub fn go_on(&mut self, calls: &[String], prompt: &[Block], trace: Trace) {
        trace.runs(&self.spawned);
        trace.follows(&self.trace);
        self.trace = trace;
        self.talk.meter.meter.touch();
        let lines = self.talk.client.results(calls, prompt);
        self.talk.unread = !lines.is_empty() && !self.talk.say(lines);
    }

    /// Ends it without an answer: its client did not come back, or may use no more. In the first case a session is let save
    /// what was said.
    pub async fn abandon(self) {
        let Exchange { mut talk, spawned, level, running, note, place, trace, .. } = self;
        let spent = talk.counts.why();
        if !talk.bounds.disposable && spent.is_none() {
            talk.interrupted().await;
        }
        talk.lease = None;
        let teardown = trace.begin("teardown");
        let (exit, ledger) = talk.end().await;
        drop(teardown);
        drop(running);
        let gone = || ApiError::new(499, "client_gone", "The client did not answer the calls.");
        let ending = Ending::Failed(spent.unwrap_or_else(gone));
        ended(&spawned, level, &ending, exit.as_ref(), &ledger.destinations, &trace);
        drop(place);
        note.write(&spawned, level, books::told(&ending), exit.as_ref(), &ledger).await;
    }
}

/// The log's word on a run.
fn ended(
    spawned: &Spawned,
    level: Level,
    ending: &Ending,
    exit: Option<&Exit>,
    ledger: &[Map<String, Value>],
    trace: &Trace,
) {
    let (status, code) = books::told(ending);
    metrics::ended(level, code, exit);
    let mut fields = vec![
        ("run", spawned.run.to_string().into()),
        ("level", level.name().into()),
        ("tier", spawned.tier.name().into()),
        ("status", status.into()),
        ("code", code.into()),
    ];
    fields.extend(trace.id().map(|id| ("trace", id.into())));
    match exit {
        Some(exit) => {
            fields.push(("reason", exit.reason.name().into()));
            fields.push(("wall_us", exit.wall_us.into()));
            fields.push(("quarantined", exit.quarantined.into()));
            fields.push(("hit", ledger::hit(exit).into()));
            fields.push(("memory_peak", exit.memory_peak.into()));
            fields.push(("tasks_peak", exit.tasks_peak.into()));
            // A destination that was refused is a tenant's text; one that was reached is on a list or public.
            let reached = |line: &&Map<String, Value>| line.get("connections").is_some_and(|n| *n != 0);
            let place = |line: &Map<String, Value>| {
                ["host", "port", "bytes_up", "bytes_down"]
                    .map(|key| line.get(key).cloned().unwrap_or_default())
            };
            let egress = ledger.iter().filter(reached).take(DESTINATIONS_MAX).map(place);
            fields.push(("egress", egress.map(|row| Value::from(row.to_vec())).collect()));
        }
        None => fields.push(("reason", "unknown".into())),
    }
    log::line("run", &fields);
}

/// A run's pipes in use.
pub struct Talk {
    id: RunId,
    stdin: Option<mpsc::Sender<Bytes>>,
    /// Something that it must hear did not fit its stdin.
    unread: bool,
    stdout: pipe::Receiver,
    lease: Option<OwnedFd>,
    report: Report,
    /// Exit, where it came before stdout's end.
    exit: Option<Option<Exit>>,
    lines: decode::Lines,
    /// Where it is counted what they take, and how much was told there.
    share: Option<Share>,
    shared: usize,
    /// Lines have been taken since it was this task's turn.
    decoded: bool,
    read: BytesMut,
    meter: Arc<Metered>,
    /// What its egress has counted, and whether its tenant may use more.
    pub counts: Counts,
    bounds: Bounds,
    /// The client's own tools.
    client: Client,
    stderr: oneshot::Receiver<Vec<u8>>,
}

/// What came of waiting for a line.
enum Heard {
    Line(BytesMut),
    End,
    Garbage(Garbage),
    Past(Past),
    Silence,
    Unwanted(Why),
    Spent(ApiError),
}

/// A run's meter, and a word for whoever waits for the run when stderr has gone past it.
struct Metered {
    meter: Meter,
    excess: Notify,
}

impl Metered {
    /// Ends when the run has gone past a limit.
    async fn past(&self) -> Past {
        loop {
            match self.meter.look(Instant::now().into_std()) {
                Err(past) => return past,
                Ok(next) => tokio::select! {
                    () = self.excess.notified() => {}
                    () = tokio::time::sleep_until(next.into()) => {}
                },
            }
        }
    }
}

impl Talk {
    /// Takes the run's pipes into use, within this budget.
    pub fn new(run: Run, bounds: Bounds, budget: Option<Watch>) -> Talk {
        let Run { spawned, stdin, stdout, stderr, lease, report, ledger } = run;
        let meter = Arc::new(Metered { meter: Meter::new(&spawned.limits), excess: Notify::new() });
        Talk {
            id: spawned.run,
            stdin: Some(writer(stdin)),
            unread: false,
            stdout,
            lease: Some(lease),
            report,
            exit: None,
            lines: decode::Lines::default(),
            share: None,
            shared: 0,
            decoded: false,
            read: BytesMut::new(),
            stderr: drain(stderr, Arc::clone(&meter)),
            meter,
            counts: Counts::begin(ledger, budget),
            bounds,
            client: Client::default(),
        }
    }

    /// The way to stdin of a program of our own, once, for whoever has more to write than lines. Its end closes stdin.
    pub fn feeder(&mut self) -> Option<mpsc::Sender<Bytes>> {
        self.lines = decode::Lines::of_a_program();
        self.stdin.take()
    }

    /// What has been read after the last line.
    pub fn rest(&mut self) -> BytesMut {
        self.lines.take_rest()
    }

    /// The next bytes of stdout; `None` at its end, and where the run is past a limit. Safe to drop while it waits.
    pub async fn piece(&mut self) -> Option<BytesMut> {
        loop {
            self.read.reserve(READ_BYTES);
            tokio::select! {
                biased;
                read = self.stdout.read_buf(&mut self.read) => {
                    if !read.is_ok_and(|n| n > 0) || !self.meter.meter.count(self.read.len()) {
                        return None;
                    }
                    return Some(self.read.split());
                }
                exit = self.report.exit(), if self.exit.is_none() => self.exit = Some(exit),
                _ = self.meter.past() => return None,
            }
        }
    }

    /// Whoever reads was slow, and the run is not to blame for that.
    pub fn touch(&self) {
        let _ = self.meter.meter.count(0);
    }

    /// Queues a line for stdin; whether it fits. Where it does not, the CLI reads nothing.
    pub fn say(&self, line: Vec<u8>) -> bool {
        self.say_all(vec![line.into()])
    }

    /// The same with a line in pieces: all of them or none.
    fn say_all(&self, pieces: Vec<Bytes>) -> bool {
        let Some(stdin) = &self.stdin else { return false };
        let Ok(places) = stdin.try_reserve_many(pieces.len()) else { return false };
        places.zip(pieces).for_each(|(place, piece)| place.send(piece));
        true
    }

    /// Answers what the CLI asks; whether something waits for the client now.
    fn asked(&mut self, asked: Asked, answer: &Answer) -> Result<bool, Garbage> {
        let is_shown = |call: &str| answer.calls().iter().any(|shown| shown == call);
        match self.client.answer(asked, is_shown)? {
            Some(pieces) => self.say_all(pieces).then_some(false).ok_or(Garbage::Over(UNREAD)),
            None => Ok(true),
        }
    }

    /// Serves one turn until the answer has an ending, and leaves the run in a state that can only end.
    async fn turn(&mut self, answer: &mut Answer, render: Render, writer: &Writer, cli: &mut trace::Span) {
        (self.share, self.shared) = (Some(writer.share()), 0);
        self.tell_share();
        if self.unread {
            return self.abort(answer, garbage(Garbage::Over(UNREAD)));
        }
        while answer.ending().is_none() {
            let begun = answer.begun();
            let steps = match self.hear(answer, writer).await {
                Heard::Line(line) => match decode::event(&line) {
                    Ok(decode::Event::Asked(asked)) => match self.asked(asked, answer) {
                        Ok(false) => continue,
                        Ok(true) => {
                            answer.call_waits();
                            continue;
                        }
                        Err(what) => return self.abort(answer, garbage(what)),
                    },
                    Ok(event) => answer.feed(event),
                    Err(what) => return self.abort(answer, garbage(what)),
                },
                Heard::End => return,
                Heard::Garbage(what) => return self.abort(answer, garbage(what)),
                // Its Exit says why, and so does the error that is made of it.
                Heard::Past(Past::Output) => return self.last_word(LEASE_OUTPUT),
                Heard::Past(Past::Idle) => return self.last_word(LEASE_IDLE),
                Heard::Silence => {
                    let error = "The upstream API did not answer in time.";
                    let error = ApiError::new(504, "upstream_silent", error);
                    return self.interrupt(answer, error.final_word()).await;
                }
                // What was said so far is the session's; nobody else has any use for it.
                Heard::Unwanted(why @ (Why::Cancelled | Why::Stopped)) if !self.bounds.disposable => {
                    return self.interrupt(answer, why.error()).await;
                }
                Heard::Unwanted(why) => return self.abort(answer, why.error()),
                // At once, whether or not there is a session: a cage could go on for as long as it is let end.
                Heard::Spent(error) => return self.abort(answer, error),
            };
            if steps.is_empty() && begun == answer.begun() {
                continue;
            }
            cli.happens("first_output");
            writer.holds(answer.bytes());
            let goes_on = answer.tool_at_work();
            let stopped = tokio::select! {
                biased;
                written = writer.write(render(answer, &steps)) => written.err().map(Why::error),
                error = self.counts.spent(goes_on) => Some(error),
            };
            if let Some(error) = stopped {
                return self.abort(answer, error);
            }
        }
        match answer.ending() {
            // Its client has the word.
            _ if answer.waits() => {}
            // Nothing that a failed turn still does is of use to anybody.
            Some(Ending::Failed(_)) => self.lease = None,
            // Left to itself the CLI takes 60 ms to end, and the client would wait for them.
            Some(Ending::Done(_)) if self.bounds.disposable => self.last_word(LEASE_DONE),
            _ => {}
        }
    }

    /// Ends the run, and says why.
    pub fn last_word(&mut self, word: &[u8]) {
        if let Some(lease) = self.lease.take() {
            let _ = channel::send(lease.as_fd(), word, &[]);
        }
    }

    fn abort(&mut self, answer: &mut Answer, error: ApiError) {
        answer.fail(error);
        self.give_up();
    }

    /// Ends the run, without a word.
    pub fn give_up(&mut self) {
        self.lease = None;
    }

    /// Ends a turn politely, so that the CLI saves its transcript, and then the cage.
    async fn interrupt(&mut self, answer: &mut Answer, error: ApiError) {
        self.interrupted().await;
        self.abort(answer, error);
    }

    async fn interrupted(&mut self) {
        self.say(input::interrupt());
        let deadline = Instant::now() + INTERRUPT_WAIT;
        while let Ok(Ok(Some(line))) = timeout_at(deadline, self.line()).await {
            if matches!(decode::event(&line), Ok(decode::Event::Result(_)) | Err(_)) {
                break;
            }
        }
    }

    async fn hear(&mut self, answer: &Answer, writer: &Writer) -> Heard {
        let silence = match answer.tool_at_work() {
            true => self.bounds.silence + TOOL_EXTRA,
            false => self.bounds.silence,
        };
        let deadline = Instant::now() + silence;
        let goes_on = answer.tool_at_work();
        let spent = self.counts.spent(goes_on);
        tokio::select! {
            biased;
            why = writer.unwanted() => Heard::Unwanted(why),
            error = spent => Heard::Spent(error),
            heard = timeout_at(deadline, self.line()) => match heard {
                Ok(Ok(Some(line))) => Heard::Line(line),
                Ok(Ok(None)) => Heard::End,
                Ok(Err(Unheard::Garbage(what))) => Heard::Garbage(what),
                Ok(Err(Unheard::Past(past))) => Heard::Past(past),
                Err(_) => Heard::Silence,
            },
        }
    }

    /// The next line of stdout; `None` at its end. Safe to drop while it waits.
    pub async fn line(&mut self) -> Result<Option<BytesMut>, Unheard> {
        loop {
            match self.lines.take_line() {
                Ok(Some(line)) => {
                    self.decoded = true;
                    return Ok(Some(line));
                }
                Ok(None) => {}
                Err(what) => return Err(Unheard::Garbage(what)),
            }
            self.read.reserve(READ_BYTES);
            let more = tokio::select! {
                biased;
                read = self.stdout.read_buf(&mut self.read) => read.is_ok_and(|n| n > 0),
                exit = self.report.exit(), if self.exit.is_none() => {
                    // Nothing of the run is left to write; what it wrote is still in the pipe, and then its end.
                    self.exit = Some(exit);
                    continue;
                }
                past = self.meter.past() => return Err(Unheard::Past(past)),
            };
            if !more {
                return Ok(None);
            }
            if !self.meter.meter.count(self.read.len()) {
                return Err(Unheard::Past(Past::Output));
            }
            self.lines.push(&self.read.split());
            self.tell_share();
            // One read of lines a turn: decoding takes its time, and a CLI that floods would keep a worker from everybody
            // else. A line that has no end yet costs nothing.
            if std::mem::take(&mut self.decoded) {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Has counted what was heard and is no answer yet.
    fn tell_share(&mut self) {
        let bytes = self.lines.bytes() + self.client.bytes();
        if let Some(share) = self.share.as_ref().filter(|_| bytes != self.shared) {
            share.hears(bytes);
            self.shared = bytes;
        }
    }

    /// Lets the CLI end, and waits until nothing of the run is left. Beside its Exit comes its ledger.
    pub async fn end(self) -> (Option<Exit>, Ledger) {
        let (exit, ledger, _) = self.end_in_time().await;
        (exit, ledger)
    }

    /// The same, and whether it had to be ended, as it did not end in time.
    async fn end_in_time(mut self) -> (Option<Exit>, Ledger, bool) {
        let (exit, late) = self.exited().await;
        (exit, self.counts.end().await, late)
    }

    async fn exited(&mut self) -> (Option<Exit>, bool) {
        self.stdin = None;
        if let Some(exit) = self.exit {
            return (exit, false);
        }
        let mut late = false;
        let mut deadline = Instant::now() + EXIT_WAIT;
        let mut rest = BytesMut::with_capacity(READ_BYTES);
        let mut open = true;
        let spent = self.counts.spent(false);
        let mut spent = std::pin::pin!(spent);
        loop {
            rest.clear();
            tokio::select! {
                exit = self.report.exit() => return (exit, late),
                read = self.stdout.read_buf(&mut rest), if open => open = read.is_ok_and(|n| n > 0),
                // A session's run that is let end by itself, and does not.
                _ = &mut spent, if self.lease.is_some() => self.lease = None,
                () = tokio::time::sleep_until(deadline) => {
                    if self.lease.take().is_some() {
                        // It was let end, and did not. Until it is gone it uses what its tenant pays for, and that counts.
                        deadline = Instant::now() + EXIT_WAIT;
                        late = true;
                        continue;
                    }
                    log::line("exit_late", &[("run", self.id.to_string().into())]);
                    return (None, true);
                }
            }
        }
    }

    /// The same, with what stderr said: for the operator's self-test only.
    pub async fn end_with_stderr(mut self) -> (Option<Exit>, Vec<u8>) {
        let (_, none) = oneshot::channel();
        let stderr = std::mem::replace(&mut self.stderr, none);
        let (exit, _) = self.end().await;
        let said = tokio::time::timeout(Duration::from_secs(1), stderr).await;
        (exit, said.ok().and_then(Result::ok).unwrap_or_default())
    }
}

/// Why there is no line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unheard {
    /// A line without end.
    Garbage(Garbage),
    /// The run is past a limit.
    Past(Past),
}

fn garbage(what: Garbage) -> ApiError {
    let message = format!("The CLI wrote something that is not its protocol: {what}.");
    ApiError::internal("cli_garbage", message).final_word()
}

/// A task that writes lines to stdin, so that reading never waits for writing. It ends with its channel, and
/// closes stdin then.
fn writer(mut stdin: pipe::Sender) -> mpsc::Sender<Bytes> {
    let (pieces, mut queue) = mpsc::channel::<Bytes>(STDIN_PIECES_MAX);
    tokio::spawn(async move {
        while let Some(piece) = queue.recv().await {
            if stdin.write_all(&piece).await.is_err() {
                return;
            }
        }
    });
    pieces
}

/// A task that reads stderr to its end, so that the CLI never waits for it, counts it, and keeps the first part.
fn drain(mut stderr: pipe::Receiver, meter: Arc<Metered>) -> oneshot::Receiver<Vec<u8>> {
    let (done, kept) = oneshot::channel();
    tokio::spawn(async move {
        let mut first = Vec::new();
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        while stderr.read_buf(&mut buffer).await.is_ok_and(|n| n > 0) {
            if !meter.meter.count(buffer.len()) {
                meter.excess.notify_one();
            }
            let room = STDERR_BYTES_MAX.saturating_sub(first.len());
            first.extend_from_slice(&buffer[..buffer.len().min(room)]);
            buffer.clear();
        }
        let _ = done.send(first);
    });
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_protocol::{Limits, Reason, Tier};
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use std::io::{PipeReader, PipeWriter, Write};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Bytes that wait in the pipe before anybody reads: what an ordinary user may have there.
    const FLOOD_BYTES: usize = 1 << 20;

    /// The supervisor's and the cage's ends of a run.
    struct Ends {
        stdout: PipeWriter,
        lease: OwnedFd,
        report: OwnedFd,
        ledger: PipeWriter,
        _others: (PipeReader, PipeWriter),
    }

    fn a_run() -> (Run, Ends) {
        let pipe = || std::io::pipe().expect("a pipe");
        let ((out, stdout), (stderr, complaints), (stdin, writer), (ledger, told)) =
            (pipe(), pipe(), pipe(), pipe());
        let (lease, their_lease) = channel::pair().expect("a pair");
        let (report, their_report) = channel::pair().expect("a pair");
        let spawned = Spawned { run: RunId([0; 16]), limits: Limits::NONE, launch_us: 0, tier: Tier::Kernel };
        let (reads, writes) = (|it: PipeReader| OwnedFd::from(it), |it: PipeWriter| OwnedFd::from(it));
        let fds = [writes(writer), reads(out), reads(stderr), lease, report, reads(ledger)].map(|fd| {
            fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a flag");
            fd
        });
        let run = Run::new(spawned, fds.into()).expect("a run");
        let others = (stdin, complaints);
        (run, Ends { stdout, lease: their_lease, report: their_report, ledger: told, _others: others })
    }

    #[tokio::test]
    async fn r07_what_a_run_uses_that_is_let_end_and_does_not_is_counted_until_it_is_gone() {
        let (run, ends) = a_run();
        let bounds = Bounds { silence: Duration::from_secs(60), level: Level::Balanced, disposable: false };
        let talk = Talk::new(run, bounds, None);
        let mut ledger = ends.ledger;
        let egress = tokio::spawn(async move {
            // It goes on until its lease ends; then its egress has one more answer to tell of, and it is gone.
            let lease = UnixStream::from_std(ends.lease.into()).expect("a socket");
            lease.readable().await.expect("its end");
            ledger.write_all(b"{\"model\":\"late\",\"input_tokens\":7}\n").expect("written");
            let exit = Message::Exit(gone()).encode(1);
            channel::send(ends.report.as_fd(), &exit, &[]).expect("sent");
            (ends.stdout, ends._others)
        });
        let (exit, told) = talk.end().await;
        assert!(exit.is_some(), "it is waited for");
        assert_eq!(told.models.len(), 1, "{told:?}");
        drop(egress.await.expect("no panic"));
    }

    fn gone() -> Exit {
        Exit {
            run: RunId([0; 16]),
            reason: Reason::Cancelled,
            code: 0,
            signal: 0,
            quarantined: false,
            wall_us: 1,
            user_us: 0,
            system_us: 0,
            maxrss_kib: 0,
            memory_peak: 0,
            tasks_peak: 0,
            oom_kills: 0,
            tasks_denied: 0,
            teardown_us: 0,
            requests: 0,
            denials: 0,
            input_tokens: 0,
            output_tokens: 0,
            cache_write_tokens: 0,
            cache_read_tokens: 0,
            bytes_up: 0,
            bytes_down: 0,
        }
    }

    #[tokio::test]
    async fn a_flood_is_read_a_piece_at_a_time_between_its_neighbours_turns() {
        let (run, mut ends) = a_run();
        fcntl(&ends.stdout, FcntlArg::F_SETPIPE_SZ(i32::try_from(FLOOD_BYTES).expect("small")))
            .expect("a size");
        let line = "{\"type\":\"novel\"}\n";
        let lines = FLOOD_BYTES / line.len();
        ends.stdout.write_all(line.repeat(lines).as_bytes()).expect("it fits");
        let bounds = Bounds { silence: Duration::from_secs(60), level: Level::Balanced, disposable: true };
        let mut talk = Talk::new(run, bounds, None);

        // A neighbour on the same worker, who counts the turns that it gets.
        let turns = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&turns);
        let neighbour = tokio::spawn(async move {
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        });
        for _ in 0..lines {
            assert_eq!(talk.line().await.expect("a line").expect("no end").len(), line.len() - 1);
        }
        let (reads, turns) = (FLOOD_BYTES / READ_BYTES, turns.load(Ordering::Relaxed));
        assert!(turns + 1 >= reads, "{turns} turns of a neighbour beside {reads} reads");
        neighbour.abort();
        drop(ends);
    }
}
