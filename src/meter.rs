//! How much a run has written, and when it wrote last: what its reader counts to end it by its limits.
//! It must never count the time in which it is the reader who is slow.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gaoler_protocol::Limits;

/// One run's meter, shared by whoever reads its pipes.
#[derive(Debug)]
pub struct Meter {
    begun: Instant,
    bytes: AtomicU64,
    /// Milliseconds from `begun` to the newest byte.
    last_ms: AtomicU64,
    /// Readers that are handing bytes on, and so do not read.
    busy: AtomicU32,
    output_bytes_max: u64,
    idle: Duration,
}

/// What a run has gone past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Past {
    /// Its bytes of output.
    Output,
    /// Its time without any.
    Idle,
}

/// A year: the idle time of a run that has no limit.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);

impl Meter {
    /// A meter under these limits; a zero is none.
    pub fn new(limits: &Limits) -> Meter {
        Meter {
            begun: Instant::now(),
            bytes: AtomicU64::new(0),
            last_ms: AtomicU64::new(0),
            busy: AtomicU32::new(0),
            output_bytes_max: match limits.output_mib {
                0 => u64::MAX,
                mib => u64::from(mib) << 20,
            },
            idle: match limits.idle_ms {
                0 => FOR_EVER,
                ms => Duration::from_millis(ms.into()),
            },
        }
    }

    /// Counts bytes that were read. `false`: they are more than the run may write.
    #[must_use]
    pub fn count(&self, bytes: usize) -> bool {
        self.touch();
        let before = self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        before.saturating_add(bytes as u64) <= self.output_bytes_max
    }

    /// Hands bytes on with `write`, during which the run is not idle.
    pub fn while_busy<T>(&self, write: impl FnOnce() -> T) -> T {
        self.busy.fetch_add(1, Ordering::Relaxed);
        let result = write();
        self.touch();
        self.busy.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// What the run has gone past, or when to look again.
    ///
    /// # Errors
    /// The limit.
    pub fn look(&self, now: Instant) -> Result<Instant, Past> {
        if self.bytes.load(Ordering::Relaxed) > self.output_bytes_max {
            return Err(Past::Output);
        }
        let last = self.begun + Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        match self.busy.load(Ordering::Relaxed) {
            0 if now >= last + self.idle => Err(Past::Idle),
            0 => Ok(last + self.idle),
            _ => Ok(now + self.idle),
        }
    }

    /// Counts as written now: the run was kept waiting, and could write nothing.
    pub fn touch(&self) {
        let ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.fetch_max(ms, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_past_its_output_and_its_silence() {
        let meter = Meter::new(&Limits { output_mib: 1, idle_ms: 1000, ..Limits::NONE });
        let (begun, second) = (meter.begun, Duration::from_secs(1));
        assert!(meter.look(begun).is_ok_and(|next| next <= begun + second * 2));
        assert_eq!(meter.look(begun + second * 60), Err(Past::Idle));
        // A reader that waits for its own reader does not make the run an idle one.
        let during = meter.while_busy(|| meter.look(begun + second * 60));
        assert_eq!(during, Ok(begun + second * 61));
        assert!(meter.count(1 << 20));
        assert!(meter.look(begun).is_ok());
        assert!(!meter.count(1));
        assert_eq!(meter.look(begun), Err(Past::Output));
    }

    #[test]
    fn a_run_without_these_limits_goes_past_none() {
        let meter = Meter::new(&Limits::NONE);
        assert!(meter.count(usize::MAX / 2));
        assert!(meter.look(meter.begun + Duration::from_secs(86_400)).is_ok());
    }
}
