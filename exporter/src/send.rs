//! Batches: filled for a second or to a number, sent, sent again where the collector asks for it, and then given up.
//! It must never send a batch for longer than its bound, nor lose one without a count.

use std::io::{Error, Result};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout_at};

use crate::collector::{Collector, Said};
use crate::spans::Queue;
use crate::{log, otlp};

/// Spans of one batch, at most, and how long the first of them waits for more.
const BATCH_SPANS: usize = 512;
const BATCH_TIME: Duration = Duration::from_secs(1);
/// How long a batch is tried for.
const TRIED_FOR: Duration = Duration::from_secs(30);
/// Between two attempts: at first, and at most.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(8);
/// A collector that has taken nothing for so long may have another address by now.
const UNREACHED_MAX: Duration = Duration::from_secs(300);

/// Sends until the queue has ended.
///
/// # Errors
/// Where a collector with a name has not been reached for long: the next exporter looks the name up again.
pub async fn send(collector: &Collector, named: bool, mut queue: Queue) -> Result<()> {
    let identity = otlp::Identity::draw();
    let mut reached = Instant::now();
    let mut well = true;
    while let Some(first) = queue.next().await {
        let mut batch = vec![first];
        let until = Instant::now() + BATCH_TIME;
        while batch.len() < BATCH_SPANS {
            match timeout_at(until, queue.next()).await {
                Ok(Some(span)) => batch.push(span),
                Ok(None) | Err(_) => break,
            }
        }
        let count = batch.len() as u64;
        let said = deliver(collector, identity.request(batch)).await;
        let (exported, dropped) = match said {
            Said::Taken(rejected) => (count.saturating_sub(rejected), rejected.min(count)),
            Said::Later(_) | Said::Away(_) | Said::Never(_) => (0, count),
        };
        queue.settle(exported, dropped);
        let is_well = matches!(said, Said::Taken(_));
        // Once for each change: a collector that is away for a day is not a line a second.
        match &said {
            Said::Never(status) if well => log("export_failed", &[("status", (*status).into())]),
            Said::Later(_) if well => {
                log("export_failed", &[("status", "the collector asks for time".into())])
            }
            Said::Away(why) if well => log("export_failed", &[("status", why.as_str().into())]),
            Said::Taken(_) if !well => log("export_works", &[]),
            _ => {}
        }
        well = is_well;
        if !matches!(said, Said::Later(_) | Said::Away(_)) {
            reached = Instant::now();
        }
        if named && reached.elapsed() > UNREACHED_MAX {
            return Err(Error::other(
                "the collector has not been reached for long; its name is looked up again",
            ));
        }
    }
    Ok(())
}

/// Sends one batch until it is taken, refused for good, or too old.
async fn deliver(collector: &Collector, body: Bytes) -> Said {
    let until = Instant::now() + TRIED_FOR;
    let mut pause = PAUSE_FIRST;
    loop {
        let Ok(said) = timeout_at(until, collector.send(body.clone())).await else {
            return Said::Away("the collector does not answer in time".into());
        };
        let after = match said {
            Said::Later(after) => after,
            Said::Away(_) => None,
            Said::Taken(_) | Said::Never(_) => return said,
        };
        // Up to a half more, so that many servers do not come back together.
        let own = pause.mul_f64(1.0 + rand::random::<f64>() / 2.0);
        let Some(wait) = wait(after, own, until.saturating_duration_since(Instant::now())) else {
            return said;
        };
        sleep(wait).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// How long to wait: as long as the collector asks for and no shorter than `own`. `None` where that is longer than what is
/// `left`: a collector may ask for more seconds than a clock has.
fn wait(asked: Option<Duration>, own: Duration, left: Duration) -> Option<Duration> {
    let wait = asked.unwrap_or(Duration::ZERO).max(own);
    (wait < left).then_some(wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r19_a_collector_may_ask_for_any_number_of_seconds() {
        let own = Duration::from_millis(500);
        let check = |asked: Option<u64>, expected: Option<Duration>| {
            assert_eq!(wait(asked.map(Duration::from_secs), own, TRIED_FOR), expected, "{asked:?}");
        };
        check(None, Some(own));
        check(Some(0), Some(own));
        check(Some(1), Some(Duration::from_secs(1)));
        check(Some(29), Some(Duration::from_secs(29)));
        for many in [30, 31, 86_400, 1 << 32, i64::MAX as u64, u64::MAX - 1, u64::MAX] {
            check(Some(many), None);
        }
        assert_eq!(wait(None, own, Duration::ZERO), None);
        assert_eq!(wait(Some(Duration::MAX), Duration::MAX, Duration::MAX), None);
    }
}
