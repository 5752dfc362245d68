//! What a tenant may use in a day and a month, tokens and money, with what its live runs are taken to use.
//! It must never count what a cage says: tokens are what egress counted, and money is those at the operator's prices.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use serde_json::{Map, Value};
use time::format_description::well_known::Rfc3339;
use time::{Date, Month, OffsetDateTime, Time};
use tokio::sync::watch;

use gaoler_ledger_wire::{Allowance, Answer, Counted, Question, ROWS_MAX, UsageDay};
use gaoler_policy::settings::Settings;

use super::Frontend;
use super::error::ApiError;
use super::ledger::{Ledger, unavailable};
use super::prices::{self, Prices};
use crate::allowance::micro;

/// When to ask again where live runs hold what is left: about as long as one of them takes.
const HELD_SECONDS: u64 = 10;
/// Looks at the ledger for one verdict, where runs end meanwhile.
const LOOKS_MAX: usize = 4;

/// Tokens, and millionths of a dollar.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    /// Those that the upstream read anew or wrote. What it took from its cache is not counted.
    pub tokens: u64,
    /// All of them, at the operator's prices.
    pub micro: u64,
}

impl Sum {
    fn plus(self, other: Sum) -> Sum {
        let (tokens, micro) =
            (self.tokens.saturating_add(other.tokens), self.micro.saturating_add(other.micro));
        Sum { tokens, micro }
    }

    fn minus(self, other: Sum) -> Sum {
        let (tokens, micro) =
            (self.tokens.saturating_sub(other.tokens), self.micro.saturating_sub(other.micro));
        Sum { tokens, micro }
    }

    fn of(counted: &Counted) -> Sum {
        Sum { micro: counted.cost_microusd, ..Sum::of_tokens(counted) }
    }

    fn of_tokens(counted: &Counted) -> Sum {
        let tokens = counted
            .input_tokens
            .saturating_add(counted.output_tokens)
            .saturating_add(counted.cache_write_tokens);
        Sum { tokens, micro: 0 }
    }
}

/// What one tenant may use; 0 = any number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bounds {
    /// In a day.
    pub day: Sum,
    /// In a month.
    pub month: Sum,
}

impl Bounds {
    /// The tenant's own, and for the rest everybody's.
    pub fn of(settings: &Settings, own: &Allowance) -> Bounds {
        let budget = &settings.budget;
        let tokens = |own: Option<u64>, all: u32| own.unwrap_or(all.into());
        let money = |own: Option<u64>, all: f64| own.unwrap_or_else(|| micro(all));
        Bounds {
            day: Sum {
                tokens: tokens(own.tokens_per_day, budget.tokens_per_day),
                micro: money(own.cost_per_day_microusd, budget.cost_per_day_usd),
            },
            month: Sum {
                tokens: tokens(own.tokens_per_month, budget.tokens_per_month),
                micro: money(own.cost_per_month_microusd, budget.cost_per_month_usd),
            },
        }
    }

    fn of_money(&self) -> bool {
        self.day.micro > 0 || self.month.micro > 0
    }
}

/// What was used in this day and in this month.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Today.
    pub day: Sum,
    /// This month.
    pub month: Sum,
}

impl Used {
    fn of(days: &[UsageDay], now: OffsetDateTime) -> Used {
        let today = now.date().to_string();
        let sum = |prefix: &str| {
            let days = days.iter().filter(|day| day.day.starts_with(prefix));
            days.map(|day| Sum::of(&day.counted)).fold(Sum::default(), Sum::plus)
        };
        Used { day: sum(&today), month: sum(&today[..7]) }
    }

    /// What a tenant has used so far, as the ledger has it.
    ///
    /// # Errors
    /// 503 where nobody can say.
    pub async fn of_tenant(ledger: &Ledger, tenant: &str) -> Result<Used, ApiError> {
        let question = Question::Usage { tenant: Some(tenant.to_owned()), before: None, limit: ROWS_MAX };
        match ledger.ask(None, question).await? {
            Answer::Usage(days) => Ok(Used::of(&days, OffsetDateTime::now_utc())),
            _ => Err(unavailable()),
        }
    }
}

/// The budgets of a server.
pub struct Budgets {
    terms: RwLock<Arc<Terms>>,
    live: Mutex<HashMap<String, Live>>,
}

/// What a reload may change.
pub struct Terms {
    /// What operators set for a million tokens.
    pub prices: Prices,
    reserve_tokens: u64,
}

impl Terms {
    fn new(settings: &Settings) -> Terms {
        Terms {
            prices: Prices::new(&settings.prices.list),
            reserve_tokens: settings.budget.reserve_tokens.into(),
        }
    }
}

/// A tenant with live runs, or that is being looked at.
struct Live {
    /// Those who look, and the runs, by their numbers.
    parts: HashMap<u64, Part>,
    /// Counts parts.
    clock: u64,
    /// What runs have given back while somebody looks: the sums that are looked at may not have them yet.
    returned: Sum,
    /// What runs that ended since had used.
    ended: Sum,
    /// The newest look at the ledger, and what had ended when it began.
    seen: (Used, Sum),
    /// Something was counted, or has ended.
    changed: watch::Sender<()>,
}

impl Live {
    fn new() -> Live {
        let (returned, ended, seen) = (Sum::default(), Sum::default(), (Used::default(), Sum::default()));
        let (parts, changed) = (HashMap::new(), watch::Sender::new(()));
        Live { parts, clock: 0, returned, ended, seen, changed }
    }

    /// What its live runs hold: of each the larger of what it is taken to use and what it has used.
    fn held(&self) -> Sum {
        self.parts.values().map(Part::held).fold(Sum::default(), Sum::plus)
    }

    /// What they have used, as far as egress has told.
    fn used(&self) -> Sum {
        self.parts.values().map(|part| part.used).fold(Sum::default(), Sum::plus)
    }
}

/// What one run holds.
#[derive(Debug, Clone, Copy, Default)]
struct Part {
    reserved: Sum,
    used: Sum,
}

impl Part {
    fn held(&self) -> Sum {
        let (tokens, micro) =
            (self.reserved.tokens.max(self.used.tokens), self.reserved.micro.max(self.used.micro));
        Sum { tokens, micro }
    }
}

/// Somebody who looks, or a run. Dropping it gives back what it holds.
pub struct Reserved {
    budgets: Arc<Budgets>,
    tenant: String,
    number: u64,
    bounds: Bounds,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut all = self.budgets.live();
        let Some(live) = all.get_mut(&self.tenant) else { return };
        let part = live.parts.remove(&self.number).unwrap_or_default();
        live.returned = live.returned.plus(part.held());
        live.ended = live.ended.plus(part.used);
        live.changed.send_replace(());
        if live.parts.is_empty() {
            all.remove(&self.tenant);
        }
    }
}

impl Reserved {
    /// What is known to be used by its tenant's live runs.
    #[cfg(test)]
    pub fn used(&self) -> u64 {
        self.budgets.live().get(&self.tenant).map_or(0, |live| live.used().tokens)
    }

    /// A way for whoever hears the run's egress to count it, and to be told when its tenant has spent its budget.
    pub fn watch(&self, ledger: Ledger) -> Watch {
        let all = self.budgets.live();
        let changed = match all.get(&self.tenant) {
            Some(live) => live.changed.subscribe(),
            None => watch::channel(()).1,
        };
        Watch {
            budgets: Arc::clone(&self.budgets),
            tenant: self.tenant.clone(),
            number: self.number,
            bounds: self.bounds,
            ledger,
            changed,
        }
    }
}

/// One live run, as its budget sees it. It holds nothing.
pub struct Watch {
    budgets: Arc<Budgets>,
    tenant: String,
    number: u64,
    bounds: Bounds,
    ledger: Ledger,
    changed: watch::Receiver<()>,
}

impl Watch {
    /// What egress has counted of the run so far, a line a model.
    pub fn count(&self, models: &[Map<String, Value>]) {
        let counted = prices::counted(models);
        let used =
            Sum { micro: self.budgets.terms().prices.cost(&counted, models), ..Sum::of_tokens(&counted) };
        let mut all = self.budgets.live();
        let Some(live) = all.get_mut(&self.tenant) else { return };
        if let Some(part) = live.parts.get_mut(&self.number) {
            part.used = used;
            live.changed.send_replace(());
        }
    }

    /// Whether nothing is left of what the run's tenant may use. The ledger is asked only where it may be so.
    ///
    /// # Errors
    /// 429 until the day or the month ends.
    pub async fn left(&self) -> Result<(), ApiError> {
        let estimate = || {
            let estimate = self.budgets.estimate(&self.tenant).unwrap_or_default();
            spent(&self.bounds, &estimate, OffsetDateTime::now_utc())
        };
        for _ in 0..LOOKS_MAX {
            if estimate().is_ok() {
                return Ok(());
            }
            // It may be another day, or what ended while the ledger was looked at is in both sums.
            let before = self.budgets.ended(&self.tenant);
            // A ledger that is silent leaves what is known.
            let Ok(used) = Used::of_tenant(&self.ledger, &self.tenant).await else { break };
            self.budgets.saw(&self.tenant, used, before);
            if self.budgets.ended(&self.tenant) == before {
                break;
            }
        }
        estimate()
    }

    /// Ends when nothing is left; never where there is no budget. Safe to drop.
    pub async fn spent(&self) -> ApiError {
        let mut changed = self.changed.clone();
        if self.bounds == Bounds::default() {
            return std::future::pending().await;
        }
        loop {
            changed.borrow_and_update();
            if let Err(error) = self.left().await {
                return error;
            }
            if changed.changed().await.is_err() {
                // The run has ended.
                return std::future::pending().await;
            }
        }
    }
}

impl Budgets {
    /// As the settings say.
    pub fn new(settings: &Settings) -> Arc<Budgets> {
        Arc::new(Budgets { terms: RwLock::new(Arc::new(Terms::new(settings))), live: Mutex::default() })
    }

    /// From now on; what live runs hold already stays as it was taken.
    pub fn set(&self, settings: &Settings) {
        *self.terms.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Terms::new(settings));
    }

    /// What the operator has set.
    pub fn terms(&self) -> Arc<Terms> {
        Arc::clone(&self.terms.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn live(&self) -> MutexGuard<'_, HashMap<String, Live>> {
        // What is done under the lock cannot stop half way.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this tenant's live runs hold.
    pub fn held(&self, tenant: &str) -> Sum {
        self.live().get(tenant).map_or(Sum::default(), Live::held)
    }

    /// What a tenant with live runs has used: what the newest look showed, what ended since, and what its live runs have.
    /// Never too little.
    fn estimate(&self, tenant: &str) -> Option<Used> {
        let all = self.live();
        let live = all.get(tenant)?;
        let (seen, ended) = live.seen;
        let since = live.ended.minus(ended).plus(live.used());
        Some(Used { day: seen.day.plus(since), month: seen.month.plus(since) })
    }

    fn ended(&self, tenant: &str) -> Sum {
        self.live().get(tenant).map_or(Sum::default(), |live| live.ended)
    }

    /// Notes what the ledger said, and what had ended when it was asked.
    fn saw(&self, tenant: &str, used: Used, ended: Sum) {
        if let Some(live) = self.live().get_mut(tenant) {
            live.seen = (used, ended);
        }
    }

    /// Begins to look: what is given back from now on counts as held until this one is done.
    fn look(self: &Arc<Self>, tenant: &str, bounds: Bounds) -> (Reserved, Looking) {
        let mut all = self.live();
        let live = all.entry(tenant.to_owned()).or_insert_with(Live::new);
        live.clock += 1;
        let number = live.clock;
        live.parts.insert(number, Part::default());
        let looking = Looking { returned: live.returned, ended: live.ended };
        drop(all);
        (Reserved { budgets: Arc::clone(self), tenant: tenant.to_owned(), number, bounds }, looking)
    }

    /// Takes what a run is taken to use, if the budget has room for what its tenant's other runs hold.
    fn reserve(
        &self,
        reserved: &Reserved,
        looking: Looking,
        sum: Sum,
        within: impl FnOnce(Sum) -> Result<(), ApiError>,
    ) -> Result<(), ApiError> {
        let mut all = self.live();
        let Some(live) = all.get_mut(&reserved.tenant) else { return Ok(()) };
        within(live.held().plus(live.returned.minus(looking.returned)))?;
        if let Some(part) = live.parts.get_mut(&reserved.number) {
            part.reserved = sum;
        }
        Ok(())
    }
}

/// A run of the tenant `t`, which may use so many tokens in a day.
#[cfg(test)]
pub fn of_a_test(most: u64) -> Reserved {
    let bounds = Bounds { day: Sum { tokens: most, micro: 0 }, month: Sum::default() };
    Budgets::new(&Settings::default()).look("t", bounds).0
}

/// What had been given back, and used, by runs that had ended when a look began.
#[derive(Debug, Clone, Copy)]
struct Looking {
    returned: Sum,
    ended: Sum,
}

/// Reserves what a run of this tenant is taken to use, where something is left.
///
/// # Errors
/// 429 until the day or the month ends, or until other runs of the tenant have; 403 for a budget of money where the model
/// has no price; 503 where nobody can say.
pub async fn reserve(
    frontend: &Frontend,
    tenant: &str,
    own: &Allowance,
    model: &str,
) -> Result<Reserved, ApiError> {
    let (budgets, bounds) = (&frontend.budgets, Bounds::of(&frontend.settings(), own));
    let terms = budgets.terms();
    let price = terms.prices.of(model);
    if bounds.of_money() && price.is_none() {
        let message = "model: you have a budget of money, and the operator of this server has set no price for this model.";
        return Err(ApiError::new(403, "model_unpriced", message));
    }
    let tokens = terms.reserve_tokens;
    let sum = Sum { tokens, micro: price.map_or(0, |price| price.most(tokens)) };
    let (reserved, looking) = budgets.look(tenant, bounds);
    let mut used = Used::default();
    if bounds != Bounds::default() {
        used = Used::of_tenant(&frontend.ledger, tenant).await?;
        budgets.saw(tenant, used, looking.ended);
    }
    let now = OffsetDateTime::now_utc();
    budgets.reserve(&reserved, looking, sum, |held| within(&bounds, &used, held, now))?;
    Ok(reserved)
}

type Row = (&'static str, u64, u64, u64, Option<OffsetDateTime>, fn(u64) -> String);

/// Each budget that there is: its period, how much it is, what was used and is held of it, and when it ends.
fn rows(bounds: &Bounds, used: &Used, held: Sum, now: OffsetDateTime) -> impl Iterator<Item = Row> + Clone {
    let midnight = |date: Date| date.with_time(Time::MIDNIGHT).assume_utc();
    let tomorrow = now.date().next_day().map(midnight);
    let (year, next) = (now.year(), now.month().next());
    let next_month =
        Date::from_calendar_date(year + i32::from(next == Month::January), next, 1).ok().map(midnight);
    let tokens = |most: u64| format!("{most} tokens");
    let money = |most: u64| format!("{} USD", most as f64 / 1e6);
    let (day, month) = ((bounds.day, used.day), (bounds.month, used.month));
    let rows: [Row; 4] = [
        ("month", month.0.tokens, month.1.tokens, held.tokens, next_month, tokens),
        ("month", month.0.micro, month.1.micro, held.micro, next_month, money),
        ("day", day.0.tokens, day.1.tokens, held.tokens, tomorrow, tokens),
        ("day", day.0.micro, day.1.micro, held.micro, tomorrow, money),
    ];
    rows.into_iter().filter(|(_, most, ..)| *most > 0)
}

/// Whether something is left.
fn spent(bounds: &Bounds, used: &Used, now: OffsetDateTime) -> Result<(), ApiError> {
    let none = Sum::default();
    let Some((period, most, _, _, ends, named)) =
        rows(bounds, used, none, now).find(|(_, most, used, ..)| used >= most)
    else {
        return Ok(());
    };
    let left = ends.map_or(0, |ends| (ends - now).whole_seconds() + 1);
    let again = ends.and_then(|ends| ends.format(&Rfc3339).ok()).unwrap_or_default();
    let message =
        format!("You have used your {} of this {period}; there is more from {again} on.", named(most));
    let error = ApiError::new(429, "budget_exhausted", message).final_word();
    Err(ApiError { kind: "billing_error", ..error }.after(u64::try_from(left).unwrap_or_default()))
}

/// Whether something is left beside what live runs hold.
fn within(bounds: &Bounds, used: &Used, held: Sum, now: OffsetDateTime) -> Result<(), ApiError> {
    spent(bounds, used, now)?;
    for (period, most, used, held, _, named) in rows(bounds, used, held, now) {
        if used.saturating_add(held) >= most {
            let message = format!(
                "Your live runs may use what is left of your {} of this {period}; wait for their end.",
                named(most)
            );
            return Err(ApiError::new(429, "budget_reserved", message).after(HELD_SECONDS));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(day: &str, tokens: u64) -> UsageDay {
        let counted = Counted {
            output_tokens: tokens,
            cache_read_tokens: 1_000_000,
            cost_microusd: 10 * tokens,
            ..Counted::default()
        };
        UsageDay { day: day.into(), tenant: "t".into(), runs: 1, failed: 0, counted }
    }

    #[test]
    fn a_budget_is_of_a_day_and_of_a_month_and_says_when_it_ends() {
        let days = [day("2026-12-31", 70), day("2026-12-30", 50), day("2026-11-30", 500)];
        let now = OffsetDateTime::from_unix_timestamp(1_798_758_000).expect("2026-12-31T23:00:00Z");
        let used = Used::of(&days, now);
        let sum = |tokens, micro| Sum { tokens, micro };
        assert_eq!((used.day, used.month), (sum(70, 700), sum(120, 1200)));
        let check = |day, month, held| {
            within(&Bounds { day, month }, &used, held, now)
                .map_err(|error| (error.kind, error.code, error.should_retry, error.retry_after))
        };
        let spent = |seconds| Err(("billing_error", "budget_exhausted", Some(false), Some(seconds)));
        let held = Err(("rate_limit_error", "budget_reserved", None, Some(HELD_SECONDS)));
        let none = Sum::default();
        assert_eq!(check(sum(71, 0), sum(121, 0), none), Ok(()));
        assert_eq!(check(sum(70, 0), none, none), spent(3601));
        assert_eq!(check(none, sum(120, 0), none), spent(3601), "the month ends with the year");
        assert_eq!(check(none, none, sum(u64::MAX, u64::MAX)), Ok(()));
        // The same of money, and of what is held.
        assert_eq!(check(sum(0, 701), sum(0, 1201), none), Ok(()));
        assert_eq!(
            (check(sum(0, 700), none, none), check(none, sum(0, 1200), none)),
            (spent(3601), spent(3601))
        );
        assert_eq!((check(sum(80, 0), none, sum(9, 0)), check(sum(80, 0), none, sum(10, 0))), (Ok(()), held));
        assert_eq!(
            (check(none, sum(0, 1210), sum(9, 9)), check(none, sum(0, 1210), sum(0, 10))),
            (Ok(()), held)
        );
        let later = now + std::time::Duration::from_secs(7200);
        let fresh = Used::of(&days, later);
        assert_eq!(fresh, Used::default());
    }

    /// One run after another asks, with so much used; how many may begin.
    fn begun(budgets: &Arc<Budgets>, bounds: &Bounds, used: u64, runs: usize) -> Vec<Reserved> {
        let used = Sum { tokens: used, micro: 0 };
        let used = Used { day: used, month: used };
        // All of them look before the first one takes.
        let looking: Vec<_> = (0..runs).map(|_| budgets.look("t", *bounds)).collect();
        let sum = Sum { tokens: budgets.terms().reserve_tokens, micro: 0 };
        let now = OffsetDateTime::UNIX_EPOCH;
        let begun = looking.into_iter().filter_map(|(reserved, looking)| {
            let taken = budgets.reserve(&reserved, looking, sum, |held| within(bounds, &used, held, now));
            taken.is_ok().then_some(reserved)
        });
        begun.collect()
    }

    #[test]
    fn live_runs_hold_their_part_of_a_budget_until_they_end() {
        let mut settings = Settings::default();
        settings.budget.reserve_tokens = 100;
        let budgets = Budgets::new(&settings);
        let bounds = |tokens| Bounds { day: Sum { tokens, micro: 0 }, month: Sum::default() };
        // The k-th run begins where used + (k - 1) * 100 < most.
        for (most, used, expected) in
            [(1000, 0, 10), (1001, 0, 11), (1000, 999, 1), (1000, 1000, 0), (0, 5, 50)]
        {
            let runs = begun(&budgets, &bounds(most), used, 50);
            assert_eq!(runs.len(), expected, "{most} with {used} used");
            assert_eq!(budgets.held("t").tokens, 100 * expected as u64);
            drop(runs);
            assert!(budgets.live().is_empty(), "all of it is given back");
        }
        // What ends while somebody looks is in no sum that they have seen.
        let mut runs = begun(&budgets, &bounds(200), 0, 2);
        let (third, looking) = budgets.look("t", bounds(200));
        runs.pop();
        let take = |reserved: &Reserved, looking, expected| {
            let found = budgets.reserve(reserved, looking, Sum { tokens: 100, micro: 0 }, |held| {
                assert_eq!(held.tokens, expected);
                Ok(())
            });
            found.expect("as it was told");
        };
        take(&third, looking, 200);
        let (next, looking) = budgets.look("t", bounds(200));
        take(&next, looking, 200);
        assert_eq!(budgets.held("x").tokens, 0, "another tenant's are its own");
        drop((runs, third, next));
        assert!(budgets.live().is_empty());
    }

    #[test]
    fn a_live_run_holds_the_larger_of_what_it_may_and_what_it_did_use_and_is_counted_once() {
        let mut settings = Settings::default();
        settings.budget.reserve_tokens = 100;
        let budgets = Budgets::new(&settings);
        let bounds = Bounds { day: Sum { tokens: 1000, micro: 0 }, month: Sum::default() };
        let mut runs = begun(&budgets, &bounds, 300, 2);
        let seen = Sum { tokens: 300, micro: 0 };
        budgets.saw("t", Used { day: seen, month: seen }, Sum::default());
        let watches: Vec<Watch> = runs.iter().map(|run| run.watch(Ledger::nobody())).collect();
        let line = |model: &str, input: u64| {
            let line =
                serde_json::json!({"model": model, "input_tokens": input, "cache_read_tokens": 1_000_000});
            line.as_object().cloned().expect("an object")
        };
        let figures = || (budgets.held("t").tokens, budgets.estimate("t").expect("live").day.tokens);
        assert_eq!(figures(), (200, 300), "nothing is counted yet");
        watches[0].count(&[line("a", 60), line("b", 30)]);
        assert_eq!(figures(), (200, 390), "less than it is taken to use");
        watches[0].count(&[line("a", 200), line("b", 30)]);
        watches[1].count(&[line("a", 50)]);
        assert_eq!(figures(), (330, 580), "more than that, and never both");
        let now = OffsetDateTime::UNIX_EPOCH;
        let check = || spent(&bounds, &budgets.estimate("t").expect("live"), now);
        assert_eq!(check(), Ok(()));
        watches[1].count(&[line("a", 469)]);
        assert_eq!((figures().1, check()), (999, Ok(())), "one token is left");
        watches[1].count(&[line("a", 470)]);
        let error = check().expect_err("both together have used it");
        assert_eq!((error.code, error.retry_after), ("budget_exhausted", Some(86_401)));
        assert!(error.message.ends_with("there is more from 1970-01-02T00:00:00Z on."), "{}", error.message);
        // What has ended counts on, whether or not the ledger was looked at since.
        let before = budgets.ended("t");
        runs.pop();
        assert_eq!(figures(), (230, 1000));
        let seen = Sum { tokens: 770, micro: 0 };
        budgets.saw("t", Used { day: seen, month: seen }, before);
        assert_eq!(figures().1, 1470, "too much for as long as nobody has looked since its end");
        budgets.saw("t", Used { day: seen, month: seen }, budgets.ended("t"));
        assert_eq!(figures().1, 1000);
        // A word that comes after the end changes nothing.
        watches[1].count(&[line("a", 9999)]);
        assert_eq!(figures(), (230, 1000));
        drop(runs);
        assert!(budgets.live().is_empty());
    }

    #[test]
    fn a_tenants_own_budget_stands_in_the_place_of_everybodys() {
        let mut settings = Settings::default();
        (settings.budget.tokens_per_day, settings.budget.cost_per_month_usd) = (7, 1.5);
        let all = Bounds::of(&settings, &Allowance::default());
        assert_eq!((all.day.tokens, all.month.micro, all.of_money()), (7, 1_500_000, true));
        let own =
            Allowance { tokens_per_day: Some(0), cost_per_month_microusd: Some(0), ..Allowance::default() };
        assert_eq!(Bounds::of(&settings, &own), Bounds::default(), "0 is any number");
    }
}
