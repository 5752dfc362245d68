//! The ledger as the frontend sees it: questions go out as they come, and answers find who waits for them.
//! It must never let a request wait without a deadline: a ledger that is silent is a 503.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use gaoler_ledger_wire::{
    Answer, Asked, FRAME_BYTES_MAX, Proof, Question, Refusal, Told, Who, decode, encode,
};
use gaoler_sys::channel;

use super::error::ApiError;
use super::log;

/// Questions that wait for an answer, at most. Each is answered in the time of one write to the disk.
const PENDING_MAX: usize = 1024;
/// How long one may take: longer than the ledger itself waits for a command line that writes beside it.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

type Reply = oneshot::Sender<Result<Answer, Refusal>>;

/// The way to the ledger. `None` only where the HTTP side is tested alone: nobody is known there.
#[derive(Clone)]
pub struct Ledger(Option<mpsc::Sender<(Option<Proof>, Question, Reply)>>);

impl Ledger {
    /// Over this socket, served by a task of its own.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn new(socket: Option<OwnedFd>) -> io::Result<Ledger> {
        let Some(socket) = socket else { return Ok(Ledger(None)) };
        let socket = UnixStream::from_std(socket.into())?;
        let (asks, served) = mpsc::channel(PENDING_MAX);
        tokio::spawn(async move {
            if let Err(error) = serve(&socket, served).await {
                log::line("ledger", &[("error", error.to_string().into())]);
            }
        });
        Ok(Ledger(Some(asks)))
    }

    /// None, for tests of what would ask one.
    #[cfg(test)]
    pub fn nobody() -> Ledger {
        Ledger(None)
    }

    /// Asks; what came, which may be a refusal.
    ///
    /// # Errors
    /// 503 where no answer comes in time.
    pub async fn try_ask(
        &self,
        by: Option<Proof>,
        question: Question,
    ) -> Result<Result<Answer, Refusal>, ApiError> {
        let Some(asks) = &self.0 else { return Ok(nobody(by.as_ref(), &question)) };
        let (reply, answer) = oneshot::channel();
        asks.try_send((by, question, reply)).map_err(|_| unavailable())?;
        timeout(ANSWER_WAIT, answer).await.ok().and_then(Result::ok).ok_or_else(unavailable)
    }

    /// Asks.
    ///
    /// # Errors
    /// Also where the ledger refuses.
    pub async fn ask(&self, by: Option<Proof>, question: Question) -> Result<Answer, ApiError> {
        self.try_ask(by, question).await?.map_err(refused)
    }

    /// Tells what need not be waited for; what comes when it is on the disk, `None` where it never will be. Where too many
    /// questions wait it waits too: what is told is lost by no question's being there first.
    pub fn tell(
        &self,
        question: Question,
    ) -> impl Future<Output = Option<Result<Answer, Refusal>>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        let waits = match &self.0 {
            None => {
                // Without a ledger nothing is remembered, and so nothing lost.
                let _ = reply.send(Ok(Answer::Done));
                None
            }
            // Queued at once where there is room, so that whatever is asked after it is answered with it.
            Some(asks) => {
                asks.try_send((None, question, reply)).err().map(|full| (asks.clone(), full.into_inner()))
            }
        };
        async move {
            if let Some((asks, told)) = waits {
                asks.send(told).await.ok()?;
            }
            answer.await.ok()
        }
    }
}

/// Without a ledger every credential is its own tenant, and there is no key.
fn nobody(by: Option<&Proof>, question: &Question) -> Result<Answer, Refusal> {
    match (by, question) {
        (Some(Proof::Credential { .. }), Question::Who) => Ok(Answer::Who(Who::Unlinked)),
        (None, Question::Usage { .. }) => Ok(Answer::Usage(Vec::new())),
        (Some(Proof::Credential { .. }), Question::Servers { .. }) => Ok(Answer::Servers(None)),
        (Some(Proof::Credential { .. }), Question::Served) => Ok(Answer::Served(Vec::new())),
        (Some(Proof::Credential { .. }), Question::DropServers { .. }) => Ok(Answer::Done),
        _ => Err(Refusal::KeyUnknown),
    }
}

/// The ledger's word as an error of ours.
pub fn refused(refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::KeyUnknown => {
            ApiError::unauthenticated("key_unknown", "This server has issued no such key.")
        }
        Refusal::KeyExpired => {
            ApiError::unauthenticated("key_expired", "This key has expired; ask the operator for another.")
        }
        Refusal::KeyRevoked => {
            ApiError::unauthenticated("key_revoked", "This key was revoked; ask the operator for another.")
        }
        Refusal::Forbidden => ApiError::new(403, "key_insufficient", "This key may not do that."),
        Refusal::NotFound => ApiError::new(404, "not_found", "There is no such thing."),
        Refusal::Conflict => ApiError::new(409, "conflict", "There is one already.").final_word(),
        Refusal::Invalid => ApiError::invalid("A value is not what it must be."),
        Refusal::Failed => unavailable(),
    }
}

/// Nobody can be recognized, nor anything be remembered, without the ledger.
pub fn unavailable() -> ApiError {
    ApiError::new(503, "ledger_unavailable", "This server cannot look up keys and usage at the moment.")
        .after(5)
}

async fn serve(
    socket: &UnixStream,
    mut asks: mpsc::Receiver<(Option<Proof>, Question, Reply)>,
) -> io::Result<()> {
    let mut pending: HashMap<u64, Reply> = HashMap::new();
    let mut last = 0u64;
    let malformed = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    loop {
        tokio::select! {
            received = socket.async_io(Interest::READABLE, || {
                channel::receive::<{ FRAME_BYTES_MAX + 1 }>(socket.as_fd())
            }) => {
                let received = received?;
                if received.bytes.is_empty() {
                    return Ok(());
                }
                if received.truncated || !received.fds.is_empty() {
                    return Err(malformed("a frame of the ledger that was cut".into()));
                }
                let told: Told = decode(&received.bytes).map_err(malformed)?;
                if let Some(reply) = pending.remove(&told.id) {
                    let _ = reply.send(told.answer);
                }
            },
            Some((by, question, reply)) = asks.recv(), if pending.len() < PENDING_MAX => {
                last += 1;
                let Ok(frame) = encode(&Asked { id: last, by, question }) else {
                    let _ = reply.send(Err(Refusal::Invalid));
                    continue;
                };
                // While this waits no answer is read; the ledger has room for some in its own end, and a deadline.
                let sent = socket.async_io(Interest::WRITABLE, || channel::send(socket.as_fd(), &frame, &[]));
                timeout(ANSWER_WAIT, sent).await.map_err(|_| malformed("the ledger does not read".into()))??;
                pending.insert(last, reply);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn r22_what_is_told_waits_for_its_place_and_is_noted_only_when_the_ledger_says_so() {
        let (asks, mut served) = mpsc::channel(1);
        let ledger = Ledger(Some(asks));
        let first = ledger.tell(Question::Who);
        let mut second = std::pin::pin!(ledger.tell(Question::Who));
        assert!(second.as_mut().now_or_never().is_none(), "there is no place, and it is not lost for that");
        for _ in 0..2 {
            let (_, _, reply) = served.recv().await.expect("a question");
            reply.send(Ok(Answer::Done)).expect("heard");
            let _ = second.as_mut().now_or_never();
        }
        assert!(matches!(first.await, Some(Ok(Answer::Done))));
        // What nobody will take is not noted, whether it had a place or not.
        let (queued, waits) = (ledger.tell(Question::Who), ledger.tell(Question::Who));
        drop(served);
        assert!(queued.await.is_none() && waits.await.is_none());
        assert!(matches!(Ledger::nobody().tell(Question::Who).await, Some(Ok(Answer::Done))));
    }
}
