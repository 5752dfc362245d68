//! What went through, and what the supervisor has not been told of yet.
//! It must never grow with what a cage does: counts are summed, and denials end the service at a bound.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gaoler_protocol::{Denial, Denied, Message, RunId, Totals};
use tokio::sync::Notify;

use crate::meter::Usage;

/// Denials after which nothing more of this run is served: an honest CLI has none.
pub const DENIALS_MAX: u32 = 256;
/// Denials of the proxy, and of strangers at the door, that are counted and told. They close nothing: a stranger
/// must not be able to end a run, and an honest tool may ask for a host that is not listed again and again.
const REFUSALS_MAX: u32 = 256;

/// Models that are counted by themselves; all others share the last row. An honest CLI uses two.
const MODELS_MAX: usize = 16;
/// The name of that row. No price is of it.
const OTHERS: &str = "(others)";

/// A row of the models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelId(usize);

/// The counts of one run.
pub struct Tally {
    inner: Mutex<Inner>,
    changed: Notify,
}

/// What one model took.
struct Row {
    model: String,
    usage: Usage,
    /// Whoever reads the ledger has not been told yet.
    untold: bool,
}

impl Row {
    fn new(model: &str) -> Row {
        Row { model: model.to_owned(), usage: Usage::default(), untold: false }
    }

    /// Of a string and numbers alone: this cannot fail.
    fn line(&self) -> Vec<u8> {
        let Usage { input, output, cache_write, cache_read } = self.usage;
        let mut line = serde_json::to_vec(&serde_json::json!({
            "model": self.model,
            "input_tokens": input,
            "output_tokens": output,
            "cache_write_tokens": cache_write,
            "cache_read_tokens": cache_read,
        }))
        .unwrap_or_default();
        line.push(b'\n');
        line
    }
}

struct Inner {
    totals: Totals,
    models: Vec<Row>,
    untold: Vec<Denial>,
    counted: bool,
    denials: u32,
    refusals: u32,
}

impl Inner {
    fn tell(&mut self, what: Denial) {
        self.totals.denials += 1;
        self.untold.push(what);
    }
}

impl Tally {
    /// Nothing yet.
    pub fn new(run: RunId) -> Tally {
        let totals = Totals::none(run);
        let inner =
            Inner { totals, models: Vec::new(), untold: Vec::new(), counted: false, denials: 0, refusals: 0 };
        Tally { inner: Mutex::new(inner), changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The totals so far.
    pub fn totals(&self) -> Totals {
        self.lock().totals
    }

    /// One request goes upstream, with this many bytes, to this model. Its answer's counts are that row's.
    pub fn sent(&self, bytes: usize, model: &str) -> ModelId {
        let Inner { totals, models, .. } = &mut *self.lock();
        totals.requests = totals.requests.saturating_add(1);
        totals.bytes_up = totals.bytes_up.saturating_add(bytes as u64);
        let known = models.iter().position(|row| row.model == model);
        ModelId(known.unwrap_or_else(|| {
            match models.len() {
                ..MODELS_MAX => models.push(Row::new(model)),
                MODELS_MAX => models.push(Row::new(OTHERS)),
                _ => {}
            }
            models.len() - 1
        }))
    }

    /// The upstream has answered with this status.
    pub fn answered(&self, status: u16) {
        self.lock().totals.status = status;
    }

    /// So many bytes of an answer came; its counts were `before` and are `now`. Gives all bytes so far.
    pub fn received(&self, ModelId(model): ModelId, bytes: usize, before: Usage, now: Usage) -> u64 {
        let Inner { totals, models, .. } = &mut *self.lock();
        let change = |total: u64, before: u64, now: u64| total.saturating_sub(before).saturating_add(now);
        totals.bytes_down = totals.bytes_down.saturating_add(bytes as u64);
        totals.input_tokens = change(totals.input_tokens, before.input, now.input);
        totals.output_tokens = change(totals.output_tokens, before.output, now.output);
        totals.cache_write_tokens = change(totals.cache_write_tokens, before.cache_write, now.cache_write);
        totals.cache_read_tokens = change(totals.cache_read_tokens, before.cache_read, now.cache_read);
        models[model].untold |= before != now;
        let row = &mut models[model].usage;
        row.input = change(row.input, before.input, now.input);
        row.output = change(row.output, before.output, now.output);
        row.cache_write = change(row.cache_write, before.cache_write, now.cache_write);
        row.cache_read = change(row.cache_read, before.cache_read, now.cache_read);
        totals.bytes_down
    }

    /// Writes a line for each model whose counts have changed since it was last told, for whoever prices them: all that it
    /// took so far, so that the last line of a model is the one that holds. A line that has no room is told the next time.
    pub fn write(&self, mut ledger: impl Write) {
        for row in self.lock().models.iter_mut().filter(|row| row.untold) {
            // Shorter than what a pipe takes whole, or not at all (pipe(7)).
            row.untold = ledger.write_all(&row.line()).is_err();
        }
    }

    /// An answer is over, one way or another: the supervisor shall hear the totals.
    pub fn ended(&self) {
        self.lock().counted = true;
        self.changed.notify_one();
    }

    /// Something was denied to the cage's CLI.
    pub fn deny(&self, what: Denial) {
        let mut inner = self.lock();
        if inner.denials < DENIALS_MAX {
            inner.denials += 1;
            inner.tell(what);
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// Something was denied that must close nothing: at the proxy, or to somebody who is not of this cage.
    pub fn refuse(&self, what: Denial) {
        let mut inner = self.lock();
        if inner.refusals < REFUSALS_MAX {
            inner.refusals += 1;
            inner.tell(what);
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// Whether anything more is served.
    pub fn is_open(&self) -> bool {
        self.lock().denials < DENIALS_MAX
    }

    /// Waits for something to tell.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What there is to tell, oldest denial first; telling it is then the caller's.
    pub fn take_untold(&self) -> Vec<Message> {
        let mut inner = self.lock();
        let run = inner.totals.run;
        let denied =
            std::mem::take(&mut inner.untold).into_iter().map(|what| Message::Denied(Denied { run, what }));
        let mut out: Vec<_> = denied.collect();
        if std::mem::take(&mut inner.counted) {
            out.push(Message::Counted(inner.totals));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn denials_are_told_one_by_one_up_to_a_bound() {
        let tally = Tally::new(RunId([1; 16]));
        (0..DENIALS_MAX + 10).for_each(|_| tally.deny(Denial::Path));
        assert!(!tally.is_open());
        assert_eq!(tally.take_untold().len(), DENIALS_MAX as usize);
        assert_eq!(tally.take_untold(), []);
    }

    #[test]
    fn refusals_are_bounded_too_and_close_nothing() {
        let tally = Tally::new(RunId([1; 16]));
        (0..REFUSALS_MAX + 10).for_each(|_| tally.refuse(Denial::Host));
        assert!(tally.is_open());
        assert_eq!(tally.take_untold().len(), REFUSALS_MAX as usize);
        tally.deny(Denial::Path);
        assert_eq!((tally.take_untold().len(), tally.totals().denials), (1, REFUSALS_MAX + 1));
    }

    #[test]
    fn counts_that_are_corrected_are_not_summed_twice() {
        let tally = Tally::new(RunId([1; 16]));
        let (first, second) =
            (Usage { output: 1, ..Usage::default() }, Usage { output: 50, ..Usage::default() });
        let model = tally.sent(1, "claude-a");
        tally.received(model, 10, Usage::default(), first);
        tally.received(model, 10, first, second);
        let totals = tally.totals();
        assert_eq!((totals.output_tokens, totals.bytes_down), (50, 20));
    }

    #[test]
    fn each_model_has_its_counts_up_to_a_bound() {
        let tally = Tally::new(RunId([1; 16]));
        let one = Usage { input: 1, output: 2, cache_write: 3, cache_read: 4 };
        for round in 0..2 {
            for number in 0..MODELS_MAX + 5 {
                let model = tally.sent(1, &format!("claude-{number}"));
                tally.received(model, 0, Usage::default(), one);
            }
            assert_eq!(tally.totals().input_tokens, (round + 1) * (MODELS_MAX as u64 + 5));
        }
        let written = |tally: &Tally| {
            let mut ledger = Vec::new();
            tally.write(&mut ledger);
            let lines = String::from_utf8(ledger).expect("text");
            lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<Value>>()
        };
        let lines = written(&tally);
        assert_eq!(lines.len(), MODELS_MAX + 1);
        assert_eq!(
            lines[0],
            serde_json::json!({"model": "claude-0", "input_tokens": 2, "output_tokens": 4,
                "cache_write_tokens": 6, "cache_read_tokens": 8})
        );
        let last = &lines[MODELS_MAX];
        assert_eq!((&last["model"], &last["input_tokens"]), (&OTHERS.into(), &10.into()));
        // Told once; and then only what has changed, with all of it.
        assert_eq!(written(&tally), Vec::<Value>::new());
        let model = tally.sent(1, "claude-3");
        assert_eq!(written(&tally), Vec::<Value>::new(), "a request alone is no count");
        tally.received(model, 0, Usage::default(), one);
        let lines = written(&tally);
        assert_eq!(lines.len(), 1);
        assert_eq!((&lines[0]["model"], &lines[0]["input_tokens"]), (&"claude-3".into(), &3.into()));
    }

    #[tokio::test]
    async fn a_ledger_that_nobody_reads_holds_nobody_up_and_loses_no_count() {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let writer = crate::proxy::ledger_pipe(writer.into()).expect("the end of a pipe");
        let tally = Tally::new(RunId([1; 16]));
        let one = Usage { input: 1, output: 1, cache_write: 0, cache_read: 0 };
        // More answers than the pipe has room for: 64 KiB, at some hundred bytes each.
        for _ in 0..2000 {
            let model = tally.sent(1, "claude-a");
            tally.received(model, 0, Usage::default(), one);
            tally.write(&writer);
        }
        let mut text = vec![0; 1 << 16];
        let read = std::io::Read::read(&mut reader, &mut text).expect("what it holds");
        assert!(text[..read].ends_with(b"\n"), "whole lines alone");
        let last = |text: &[u8]| {
            let line = text.split(|&byte| byte == b'\n').rev().nth(1).expect("a line").to_vec();
            serde_json::from_slice::<Value>(&line).expect("JSON")["input_tokens"].as_u64()
        };
        assert!(last(&text[..read]) < Some(2000));
        // There is room again: what was not told is told with the next one.
        tally.write(&writer);
        let read = std::io::Read::read(&mut reader, &mut text).expect("what it holds");
        assert_eq!(last(&text[..read]), Some(2000));
    }
}
