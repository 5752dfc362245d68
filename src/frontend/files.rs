//! A question to `gaoler-files`, in a cage of its tenant: bytes go in and come out in frames, and one line is the answer.
//! It must never believe that answer further than its form: it is what a tenant's cage says.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use zeroize::Zeroizing;

use gaoler_files::{
    ANSWER_BYTES_MAX, Answer as Said, Code, FRAME_BYTES_MAX, Question as Asked, Taken, Unreadable, What,
};
use gaoler_ledger_wire::{Answer, Proof, Question};
use gaoler_protocol::{
    Conversation, Effort, Exit, Kind, LEASE_DONE, Level, Limits, Model, Refused, Spawn, Spawned, TenantKey,
};
use gaoler_sys::memfd;

use super::books::Note;
use super::error::{ApiError, repeatable};
use super::filing::{About, Entry};
use super::http::App;
use super::identity::Holder;
use super::run::Talk;
use super::runs::Why;
use super::sent::{Pace, Sent, too_slow};
use super::{answer, id, identity, ledger, log, metrics, vouching, way};

/// Bytes that one request may bring.
pub const UPLOAD_BYTES_MAX: u64 = 1 << 30;
/// Bytes of a body that nobody wants any more which are read and dropped, so that its sender reads our answer.
const DROPPED_BYTES_MAX: u64 = 64 << 20;
/// How long a client may take nothing of an answer before it counts as gone.
const CLIENT_WAIT: Duration = Duration::from_secs(120);
/// How long what is done beside a request may take.
const SWEEP_WAIT: Duration = Duration::from_secs(5);
/// How often a tenant's sessions are looked at for their age, at most.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);
/// Runs that go on with one removal, at most: each takes seconds, and any later request goes on too.
const CLEANS_MAX: u32 = 100;
/// Tenants whose last look is remembered.
const SWEPT_MAX: usize = 4096;

/// How a run ended that did what it was asked to, and one whose answer broke off.
const DONE: (u16, &str) = (200, "done");
const CUT: (u16, &str) = (500, "cut");

/// Whose files are asked for.
pub struct Asker {
    /// The tenant, with the bytes of a credential's file: one whom nobody has seen yet must be vouched for.
    pub holder: Holder,
    /// What egress alone is told of where a repository is; empty = nothing.
    pub remotes: Zeroizing<Vec<u8>>,
}

impl Asker {
    /// The same, to undo what was asked.
    pub fn again(&self) -> Asker {
        Asker { holder: self.holder.clone(), remotes: self.remotes.clone() }
    }
}

/// What came of it.
pub enum Told {
    /// An answer in one line, as it came: whoever reads it says in which form.
    Done(Box<RawValue>),
    /// Bytes, and how many where that is known.
    Bytes(Option<u64>, Body),
}

/// Who asks, by a credential in a header: these requests have no other place for one.
///
/// # Errors
/// 401 where it is none; 503 in a drain.
pub async fn asker(frontend: &App, headers: &HeaderMap) -> Result<Asker, ApiError> {
    let holder = identity::holder(frontend, headers).await?;
    if *frontend.draining.borrow() {
        return Err(ApiError::draining());
    }
    Ok(Asker { holder, remotes: Zeroizing::default() })
}

/// Asks, with the bytes of a body where the question brings some.
///
/// # Errors
/// What the program, the supervisor or the body's sender did wrong.
pub async fn ask(
    frontend: &App,
    headers: &HeaderMap,
    Asker { holder, remotes }: Asker,
    kind: Kind,
    what: What,
    body: Option<Sent>,
) -> Result<Told, ApiError> {
    let whose = holder.whose();
    let Holder { tenant, allowance, credential, unlinked, .. } = holder;
    // What goes out must be vouched for. A Spawn without it would be taken for a hostile one, and end all runs.
    if kind.has_egress() && credential.is_none() {
        return Err(ApiError::unauthenticated(
            "credential_missing",
            "This goes out through egress, which needs a credential for the upstream: send x-claude-credential, or store \
             one with PUT /v1/credential.",
        ));
    }
    if let (true, Some(credential)) = (unlinked, &credential) {
        vouching::pass(frontend, &tenant, credential).await?;
    }
    // A run like any other, so the tenant's rate counts it.
    frontend.live().rates.tenant(&tenant, &allowance)?;
    let bounds = (way::level(frontend, headers, None)?, way::limits(headers, &Limits::NONE)?);
    let elsewhere = match what.needs_elsewhere() {
        true => elsewhere(frontend, whose.clone(), kind).await?,
        false => Taken::default(),
    };
    // Servers come third, so that without a credential there are none.
    let remotes = credential.is_some().then_some(remotes).filter(|remotes| !remotes.is_empty());
    let secrets = [("credential", credential), ("remotes", remotes)];
    let secrets = secrets.into_iter().filter_map(|(name, bytes)| Some(sealed(name, &bytes?)));
    let secrets = secrets.collect::<Result<_, _>>()?;
    begin(frontend, whose, bounds, kind, (what, elsewhere), secrets, body).await
}

/// What a run over files said is not what it was asked for.
pub fn unreadable() -> ApiError {
    ApiError::internal("files_failed", "The run over your files gave no answer that can be read.")
}

/// A tenant, as a run of its is known by.
#[derive(Clone)]
pub struct Whose {
    /// The capability.
    pub tenant: TenantKey,
    /// Its name in the books.
    pub name: String,
    /// The key that was shown.
    pub key: Option<String>,
    /// Runs that it may have at a time, where that is not what the settings say.
    pub most: Option<u64>,
}

/// What a tenant takes of the disk in the other of its two parts: no run over files sees both.
async fn elsewhere(frontend: &App, whose: Whose, kind: Kind) -> Result<Taken, ApiError> {
    let other = if kind == Kind::Sessions { Kind::Files } else { Kind::Sessions };
    match on(frontend, whose, other, What::Usage).await {
        Ok(Told::Done(taken)) => serde_json::from_str(taken.get()).map_err(|_| unreadable()),
        Ok(Told::Bytes(..)) => Err(unreadable()),
        // One who has a folder yet to be made has nothing in it.
        Err(error) if error.code == "credential_refused" => Ok(Taken::default()),
        Err(error) => Err(error),
    }
}

/// Begins such a run in a task of its own: it is told and counted to its end, also where nobody waits for it any more.
async fn begin(
    frontend: &App,
    whose: Whose,
    (level, limits): (Level, Limits),
    kind: Kind,
    what: (What, Taken),
    secrets: Vec<OwnedFd>,
    body: Option<Sent>,
) -> Result<Told, ApiError> {
    let Whose { tenant, name, key, most } = whose;
    let about = About {
        run: id::run(),
        tenant: tenant.0,
        owner: name.clone(),
        owner_key: key.clone(),
        kind,
        level,
        asked_ms: way::now_ms(),
    };
    let (entry, asking) = frontend.filing.add(about);
    // What goes out is counted like any other run that does.
    let note = kind.has_egress().then(|| Note::of_no_model(frontend, name, key));
    let bounds = (tenant, most, limits);
    let running = tokio::spawn(run(Arc::clone(frontend), entry, bounds, note, what, secrets, body));
    let lost = |_| ApiError::internal("run_lost", "The run ended and no word of it came.");
    let told = running.await.map_err(lost)?;
    asking.answered();
    told
}

/// Has a tenant's old sessions removed, where the operator wants that and nobody has looked for an hour; and what is kept
/// for those that are not there any more.
pub async fn sweep(frontend: &App, whose: Whose, proof: &Proof) {
    static SWEPT: Mutex<Vec<([u8; 32], Instant)>> = Mutex::new(Vec::new());
    if frontend.settings().sessions.ttl_days == 0 {
        return;
    }
    {
        let mut swept = SWEPT.lock().unwrap_or_else(PoisonError::into_inner);
        swept.retain(|(_, at)| at.elapsed() < SWEEP_EVERY);
        if swept.iter().any(|(key, _)| *key == whose.tenant.0) {
            return;
        }
        if swept.len() >= SWEPT_MAX {
            swept.remove(0);
        }
        swept.push((whose.tenant.0, Instant::now()));
    }
    // A tenant without a folder has no sessions, and is refused.
    let _ = timeout(SWEEP_WAIT, forget_gone(frontend, whose, proof)).await;
}

/// The same at once.
///
/// # Errors
/// Those of a run, and of the ledger.
pub async fn forget_gone(frontend: &App, whose: Whose, proof: &Proof) -> Result<(), ApiError> {
    let known = match frontend.ledger.ask(Some(proof.clone()), Question::Served).await? {
        Answer::Served(known) => known,
        _ => return Err(ledger::unavailable()),
    };
    let told = on_sessions(frontend, whose, What::Sweep { known: known.clone() }).await?;
    let Told::Done(told) = told else { return Ok(()) };
    let Swept { gone } = serde_json::from_str(told.get()).unwrap_or_default();
    // It is a cage's word: only what was asked for, and of its own tenant, can be meant.
    let gone: HashSet<String> = gone.into_iter().collect();
    let sessions: Vec<String> = known.into_iter().filter(|id| gone.contains(id)).collect();
    if !sessions.is_empty() {
        frontend.ledger.ask(Some(proof.clone()), Question::DropServers { sessions }).await?;
    }
    Ok(())
}

/// What a sweep has found.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Swept {
    gone: Vec<String>,
}

/// What a removal has left.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Left {
    remains: bool,
}

/// Goes on with a removal that was too much for one request: nobody waits for it.
pub fn clean(frontend: &App, whose: Whose, kind: Kind) {
    let frontend = Arc::clone(frontend);
    tokio::spawn(async move {
        for _ in 0..CLEANS_MAX {
            let Ok(Told::Done(told)) = on(&frontend, whose.clone(), kind, What::Clean).await else { return };
            if !serde_json::from_str::<Left>(told.get()).unwrap_or_default().remains {
                return;
            }
        }
    });
}

/// A question about sessions that no client has asked.
///
/// # Errors
/// Those of a run.
pub async fn on_sessions(frontend: &App, whose: Whose, what: What) -> Result<Told, ApiError> {
    on(frontend, whose, Kind::Sessions, what).await
}

/// Why a session whose turn has failed cannot be read, where that is so: its agent may have broken its transcript, and the
/// CLI says no more than that it ended.
pub async fn broken(frontend: &App, whose: Whose, session: Uuid) -> Option<ApiError> {
    let what = What::Session { id: session.to_string() };
    let told = timeout(SWEEP_WAIT, on_sessions(frontend, whose, what)).await.ok()?.ok()?;
    let Told::Done(told) = told else { return None };
    let why = serde_json::from_str::<Sound>(told.get()).ok()?.unreadable?;
    let (status, code) = Code::Unreadable.told();
    Some(ApiError::new(status, code, why.message()).final_word())
}

/// Whether a session can be read.
#[derive(Deserialize)]
struct Sound {
    unreadable: Option<Unreadable>,
}

async fn on(frontend: &App, whose: Whose, kind: Kind, what: What) -> Result<Told, ApiError> {
    let level = way::level(frontend, &HeaderMap::new(), None).unwrap_or(Level::Paranoid);
    begin(frontend, whose, (level, Limits::NONE), kind, (what, Taken::default()), Vec::new(), None).await
}

fn sealed(name: &str, bytes: &[u8]) -> Result<OwnedFd, ApiError> {
    let failed = |_| ApiError::internal("no_memory_file", "This server is out of descriptors or memory.");
    memfd::sealed(name, bytes).map_err(failed)
}

async fn run(
    frontend: App,
    entry: Entry,
    (tenant, most, limits): (TenantKey, Option<u64>, Limits),
    note: Option<Note>,
    (what, elsewhere): (What, Taken),
    secrets: Vec<OwnedFd>,
    body: Option<Sent>,
) -> Result<Told, ApiError> {
    let &About { run, kind, level, .. } = entry.about();
    let spawn = Spawn {
        run,
        tenant,
        kind,
        level,
        conversation: Conversation::Stateless,
        ephemeral: false,
        proof: false,
        session: [0; 16],
        workspace: [0; 16],
        model: Model::DEFAULT,
        effort: Effort::Unset,
        turns_max: 0,
        mcp_refused: false,
        budget_microusd: 0,
        limits,
    };
    let fds = std::iter::once(sealed("options", b"")?).chain(secrets).collect();
    let unwanted = entry.unwanted();
    let mut unwanted = std::pin::pin!(unwanted);
    let place = tokio::select! {
        biased;
        why = &mut unwanted => return Err(why.error()),
        place = way::place(&frontend, tenant, most, 0, |ticket| entry.queued(ticket)) => place?,
    };
    metrics::waited(place.waited);
    let busy = frontend.busy.subscribe();
    let mut run = tokio::select! {
        biased;
        why = &mut unwanted => return Err(why.error()),
        spawned = frontend.supervisor.spawn(spawn, fds) => {
            spawned.map_err(|refused: Refused| ApiError::refused(&refused))?
        }
    };
    entry.running();
    let (spawned, running) = (run.spawned, metrics::Running::begin(&run.spawned, level));
    // What comes out of it is bounded by the tenant's part of the disk, not by what an answer of a model may be.
    run.spawned.limits.output_mib = 0;
    let question = Asked {
        disk_bytes: u64::from(spawned.limits.disk_mib) << 20,
        disk_files: u64::from(spawned.limits.disk_kfiles) * 1000,
        ttl_days: frontend.settings().sessions.ttl_days,
        elsewhere,
        what,
    };
    let mut talk = Talk::new(run, way::bounds(&frontend, level, true), None);
    let fed = talk.feeder().map(|stdin| tokio::spawn(feed(stdin, question, body)));
    let ending = Ending { entry, spawned, note, busy, place: (place, running) };
    let line = tokio::select! {
        biased;
        why = &mut unwanted => {
            talk.give_up();
            ending.end(talk, Some(told(why))).await;
            return Err(why.error());
        }
        line = talk.line() => line,
    };
    let heard = match line {
        Ok(Some(line)) if line.len() <= ANSWER_BYTES_MAX => serde_json::from_slice::<Said>(&line).ok(),
        _ => None,
    };
    match heard {
        Some(Said::Bytes(sized)) => Ok(Told::Bytes(sized.bytes, stream(talk, sized.bytes, ending))),
        Some(Said::Done(value)) => {
            talk.last_word(LEASE_DONE);
            ending.end(talk, Some(DONE)).await;
            Ok(Told::Done(value))
        }
        Some(Said::Failed(failure)) => {
            talk.last_word(LEASE_DONE);
            let (status, code) = failure.code.told();
            ending.end(talk, Some((status, code))).await;
            // Whoever sent the body knows why it was cut; the program only saw that it was.
            if let Some(Err(error)) = finished(fed).await
                && matches!(failure.code, Code::Cut)
            {
                return Err(error);
            }
            let error = ApiError::new(status, code, repeatable(&failure.message));
            let final_word = matches!(failure.code, Code::Busy | Code::Unreadable);
            Err(if final_word { error.final_word() } else { error })
        }
        None => {
            let exit = ending.end(talk, None).await;
            if let Some(Err(error)) = finished(fed).await {
                return Err(error);
            }
            Err(exit_error(exit.as_ref()))
        }
    }
}

/// What the end of such a run means. A full part of the disk is its tenant's, and has the code that the program itself has
/// for it.
fn exit_error(exit: Option<&Exit>) -> ApiError {
    let error = answer::exit_error(exit);
    if error.code != "disk_limit" {
        return error;
    }
    let (status, code) = Code::Full.told();
    ApiError::new(status, code, error.message).final_word()
}

/// The same of one that had to end.
fn told(why: Why) -> (u16, &'static str) {
    let error = why.error();
    (error.status, error.code)
}

async fn finished(
    fed: Option<tokio::task::JoinHandle<Result<(), ApiError>>>,
) -> Option<Result<(), ApiError>> {
    fed?.await.ok()
}

/// What is left of a run, and its last line in the log.
struct Ending<B, P> {
    entry: Entry,
    spawned: Spawned,
    /// What the ledger is told, where it went out.
    note: Option<Note>,
    busy: B,
    place: P,
}

impl<B: Send + 'static, P> Ending<B, P> {
    /// How it ended, with a status and a word; without them as its end says.
    async fn end(self, talk: Talk, told: Option<(u16, &'static str)>) -> Option<Exit> {
        let Ending { entry, spawned, note, busy, place } = self;
        let &About { run, kind, level, .. } = entry.about();
        let (exit, egress) = talk.end().await;
        let (status, outcome) = told.unwrap_or_else(|| {
            let error = exit_error(exit.as_ref());
            (error.status, error.code)
        });
        let reason = exit.as_ref().map_or("unknown", |exit| exit.reason.name());
        metrics::ended(level, outcome, exit.as_ref());
        let fields = [
            ("run", run.to_string().into()),
            ("kind", kind.name().into()),
            ("level", level.name().into()),
            ("code", outcome.into()),
            ("reason", reason.into()),
        ];
        log::line("files", &fields);
        if let Some(note) = note {
            let noted = note.write(&spawned, level, (status, outcome), exit.as_ref(), &egress);
            // A drain waits for it, and its client does not.
            tokio::spawn(async move {
                noted.await;
                drop(busy);
            });
        }
        drop(place);
        exit
    }
}

/// Writes the question, and the body in frames. A body that breaks off is not ended, so that nobody takes it for whole.
async fn feed(stdin: mpsc::Sender<Bytes>, question: Asked, body: Option<Sent>) -> Result<(), ApiError> {
    let mut line = serde_json::to_vec(&question).unwrap_or_default();
    line.push(b'\n');
    let mut wanted = stdin.send(line.into()).await.is_ok();
    let Some(mut body) = body.map(Sent::into_body) else { return Ok(()) };
    let (mut taken, mut dropped) = (0u64, 0u64);
    let begun = Instant::now();
    loop {
        let until = Pace::UPLOAD.until(begun, taken);
        let frame = match timeout_at(until, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(_))) => return Err(ApiError::invalid("The body broke off.")),
            Ok(None) => break,
            Err(_) => return Err(too_slow()),
        };
        let Ok(mut data) = frame.into_data() else { continue };
        taken += data.len() as u64;
        wanted &= taken <= UPLOAD_BYTES_MAX;
        while data.has_remaining() {
            let piece = data.split_to(data.len().min(FRAME_BYTES_MAX));
            if !wanted {
                dropped += piece.len() as u64;
                continue;
            }
            let mut frame = Vec::with_capacity(4 + piece.len());
            frame.extend_from_slice(&(piece.len() as u32).to_le_bytes());
            frame.extend_from_slice(&piece);
            wanted = stdin.send(frame.into()).await.is_ok();
        }
        if dropped > DROPPED_BYTES_MAX {
            break;
        }
    }
    if taken > UPLOAD_BYTES_MAX {
        return Err(ApiError::new(413, "upload_too_large", "The upload is larger than 1 GiB."));
    }
    let _ = stdin.send(Bytes::from_static(b"\0\0\0\0")).await;
    Ok(())
}

/// The frames of an answer as a body. What ends without the last frame, is of another length than was announced, or has to
/// end before, is a connection that breaks.
fn stream<B: Send + 'static, P: Send + 'static>(
    mut talk: Talk,
    announced: Option<u64>,
    ending: Ending<B, P>,
) -> Body {
    let (pieces, out) = mpsc::channel::<Result<Bytes, io::Error>>(4);
    tokio::spawn(async move {
        let mut frames = Frames { buffer: talk.rest(), ..Frames::default() };
        let (mut sum, mut outcome) = (0u64, DONE);
        let unwanted = ending.entry.unwanted();
        let mut unwanted = std::pin::pin!(unwanted);
        loop {
            match frames.take() {
                Ok(Some(bytes)) if bytes.is_empty() => {
                    if announced.is_some_and(|announced| announced != sum) {
                        outcome = CUT;
                    }
                    break;
                }
                Ok(Some(bytes)) => {
                    sum += bytes.len() as u64;
                    if announced.is_some_and(|announced| sum > announced) {
                        outcome = CUT;
                        break;
                    }
                    let sent = tokio::select! {
                        biased;
                        why = &mut unwanted => Err(why),
                        sent = pieces.send_timeout(Ok(bytes), CLIENT_WAIT) => sent.map_err(|_| Why::Gone),
                    };
                    talk.touch();
                    if let Err(why) = sent {
                        outcome = told(why);
                        break;
                    }
                    continue;
                }
                Ok(None) => {}
                Err(()) => {
                    outcome = CUT;
                    break;
                }
            }
            let piece = tokio::select! {
                biased;
                why = &mut unwanted => Err(told(why)),
                piece = talk.piece() => piece.ok_or(CUT),
            };
            match piece {
                Ok(bytes) => frames.buffer.extend_from_slice(&bytes),
                Err(why) => {
                    outcome = why;
                    break;
                }
            }
        }
        talk.last_word(LEASE_DONE);
        ending.end(talk, Some(outcome)).await;
        if outcome != DONE {
            let _ = pieces.send_timeout(Err(io::Error::other("the answer was cut")), CLIENT_WAIT).await;
        }
    });
    Body::from_stream(futures_util::stream::unfold(out, |mut out| async move {
        let deadline = Instant::now() + CLIENT_WAIT * 10;
        let piece = timeout_at(deadline, out.recv()).await.ok().flatten()?;
        Some((piece, out))
    }))
}

/// Frames out of bytes.
#[derive(Default)]
struct Frames {
    buffer: BytesMut,
    left: usize,
}

impl Frames {
    /// The next bytes; empty ones are the end, and none means that more must come.
    fn take(&mut self) -> Result<Option<Bytes>, ()> {
        if self.left == 0 {
            if self.buffer.len() < 4 {
                return Ok(None);
            }
            self.left = self.buffer.get_u32_le() as usize;
            match self.left {
                0 => return Ok(Some(Bytes::new())),
                n if n > FRAME_BYTES_MAX => return Err(()),
                _ => {}
            }
        }
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let bytes = self.buffer.split_to(self.buffer.len().min(self.left)).freeze();
        self.left -= bytes.len();
        Ok(Some(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_come_and_a_wrong_one_is_told() {
        let mut frames = Frames::default();
        let mut out = Vec::new();
        let mut bytes = 5u32.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"hello");
        bytes.extend_from_slice(&1u32.to_le_bytes());
        bytes.extend_from_slice(b"!");
        bytes.extend_from_slice(&0u32.to_le_bytes());
        let mut ended = false;
        for byte in bytes {
            frames.buffer.extend_from_slice(&[byte]);
            match frames.take() {
                Ok(Some(piece)) if piece.is_empty() => ended = true,
                Ok(Some(piece)) => out.extend_from_slice(&piece),
                Ok(None) => {}
                Err(()) => panic!("a good frame"),
            }
        }
        assert_eq!((out.as_slice(), ended), (&b"hello!"[..], true));
        let mut frames = Frames::default();
        frames.buffer.extend_from_slice(&(FRAME_BYTES_MAX as u32 + 1).to_le_bytes());
        assert_eq!(frames.take(), Err(()));
    }
}
