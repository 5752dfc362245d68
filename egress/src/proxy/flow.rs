//! The bytes of one connection to a destination: counted, bounded in sum, and timed.
//! It must never let a byte through that the run has no room for any more.

use std::io::{Error, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::Instant;

use super::ledger::{Ledger, RowId};

/// The bytes that a run may still move, both ways and over all connections.
pub struct Budget {
    left: AtomicU64,
    spent: Notify,
    told: AtomicBool,
}

impl Budget {
    /// So many.
    pub fn new(bytes: u64) -> Budget {
        Budget { left: AtomicU64::new(bytes), spent: Notify::new(), told: AtomicBool::new(false) }
    }

    /// Whether none is left.
    pub fn is_spent(&self) -> bool {
        self.left.load(Ordering::Relaxed) == 0
    }

    /// The same, but true only the first time: the run is told of it once.
    pub fn is_told_spent(&self) -> bool {
        self.is_spent() && !self.told.swap(true, Ordering::Relaxed)
    }

    /// Waits until the last byte is used; for ever where that was before.
    pub fn spent(&self) -> Notified<'_> {
        self.spent.notified()
    }

    /// How many of these bytes there is room for. This thread is the only one: nobody takes it in between.
    fn room(&self, bytes: usize) -> usize {
        usize::try_from(self.left.load(Ordering::Relaxed)).unwrap_or(usize::MAX).min(bytes)
    }

    fn take(&self, bytes: usize) {
        let left = self.left.load(Ordering::Relaxed).saturating_sub(bytes as u64);
        self.left.store(left, Ordering::Relaxed);
        if left == 0 && bytes > 0 {
            self.spent.notify_waiters();
        }
    }
}

/// When something last moved on one connection of the cage.
pub struct Pulse {
    start: Instant,
    last_ms: AtomicU64,
}

impl Pulse {
    /// Now.
    pub fn new() -> Pulse {
        Pulse { start: Instant::now(), last_ms: AtomicU64::new(0) }
    }

    fn beat(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// Waits until nothing has moved for so long.
    pub async fn stops(&self, idle: Duration) {
        loop {
            let due = self.start + Duration::from_millis(self.last_ms.load(Ordering::Relaxed)) + idle;
            if Instant::now() >= due {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// A connection to a destination.
pub struct Metered {
    /// The socket.
    pub stream: TcpStream,
    /// The run's bytes.
    pub budget: Arc<Budget>,
    /// The run's ledger, and the row in it.
    pub ledger: Arc<Ledger>,
    /// The destination's row.
    pub row: RowId,
    /// The cage's side of it.
    pub pulse: Arc<Pulse>,
    /// One of the run's connections.
    pub _slot: OwnedSemaphorePermit,
}

impl Metered {
    fn moved(&self, up: usize, down: usize) {
        self.budget.take(up + down);
        self.ledger.moved(self.row, up, down);
        self.pulse.beat();
    }
}

fn no_room() -> Error {
    Error::other("the run has moved all its bytes")
}

impl AsyncRead for Metered {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        let this = self.get_mut();
        if this.budget.is_spent() {
            return Poll::Ready(Err(no_room()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
        let bytes = buffer.filled().len() - before;
        // More came than may go on: what is over stays here.
        let room = this.budget.room(bytes);
        buffer.set_filled(before + room);
        if bytes > 0 {
            this.moved(0, room);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let this = self.get_mut();
        if this.budget.is_spent() {
            return Poll::Ready(Err(no_room()));
        }
        let room = this.budget.room(bytes.len());
        let written = ready!(Pin::new(&mut this.stream).poll_write(context, &bytes[..room]))?;
        this.moved(written, 0);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(300);

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_when_nothing_has_moved_for_its_time() {
        let pulse = Arc::new(Pulse::new());
        let (start, beating) = (Instant::now(), pulse.clone());
        tokio::spawn(async move {
            for _ in 0..10 {
                tokio::time::sleep(IDLE - Duration::from_secs(1)).await;
                beating.beat();
            }
        });
        pulse.stops(IDLE).await;
        assert_eq!(start.elapsed().as_secs(), 10 * (IDLE.as_secs() - 1) + IDLE.as_secs());
    }

    #[tokio::test]
    async fn a_budget_ends_with_its_last_byte_and_says_so_once() {
        let budget = Budget::new(10);
        let waiting = budget.spent();
        budget.take(9);
        assert_eq!((budget.room(5), budget.is_spent(), budget.is_told_spent()), (1, false, false));
        budget.take(1);
        waiting.await;
        assert_eq!((budget.room(5), budget.is_spent()), (0, true));
        assert_eq!((budget.is_told_spent(), budget.is_told_spent()), (true, false));
    }
}
