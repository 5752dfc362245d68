//! How much may be asked: requests a minute of an address and of a tenant, tokens a day and a month of a tenant.
//! It must never count what a cage says: tokens are what egress counted, as the ledger has them.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use http::HeaderMap;
use time::{Date, Month, OffsetDateTime, Time};

use gaoler_ledger_wire::{Answer, Question, ROWS_MAX, UsageDay};
use gaoler_policy::settings::{Budget, Settings};
use gaoler_protocol::TenantKey;

use super::Frontend;
use super::error::ApiError;
use super::ledger::unavailable;

/// Looks between two sweeps of who has not asked for long: their places are all that they cost.
const SWEEP_EVERY: u32 = 4096;

/// A limit by key; `None` where there is none.
struct Limit<K: Clone + Eq + std::hash::Hash>(
    Option<RateLimiter<K, HashMapStateStore<K>, DefaultClock>>,
    AtomicU32,
);

impl<K: Clone + Eq + std::hash::Hash> Limit<K> {
    fn per_minute(count: u32) -> Limit<K> {
        let limiter = NonZeroU32::new(count).map(|count| RateLimiter::hashmap(Quota::per_minute(count)));
        Limit(limiter, AtomicU32::new(0))
    }

    /// Counts one; how long until one more may come, where there were too many.
    fn take(&self, key: &K) -> Result<(), Duration> {
        let Some(limiter) = &self.0 else { return Ok(()) };
        if self.1.fetch_add(1, Ordering::Relaxed).is_multiple_of(SWEEP_EVERY) {
            limiter.retain_recent();
        }
        limiter.check_key(key).map_err(|not_until| not_until.wait_time_from(DefaultClock::default().now()))
    }
}

/// The rates of this server.
pub struct Rates {
    tenants: Limit<[u8; 32]>,
    addresses: Limit<u128>,
    trusted_proxy: bool,
}

impl Rates {
    /// As the settings say.
    pub fn new(settings: &Settings) -> Rates {
        Rates {
            tenants: Limit::per_minute(settings.rates.tenant_per_minute),
            addresses: Limit::per_minute(settings.rates.address_per_minute),
            trusted_proxy: settings.server.trusted_proxy,
        }
    }

    /// Counts a run that is asked for.
    ///
    /// # Errors
    /// 429 with the time until the next one may come.
    pub fn tenant(&self, tenant: &TenantKey) -> Result<(), ApiError> {
        self.tenants.take(&tenant.0).map_err(|wait| limited("You have", wait))
    }

    /// Counts a request of this address.
    ///
    /// # Errors
    /// 429 with the time until the next one may come.
    pub fn address(&self, peer: IpAddr, headers: &HeaderMap) -> Result<(), ApiError> {
        let address = if self.trusted_proxy { forwarded(headers).unwrap_or(peer) } else { peer };
        self.addresses.take(&place(address)).map_err(|wait| limited("Your address has", wait))
    }
}

fn limited(who: &str, wait: Duration) -> ApiError {
    let seconds = wait.as_millis().div_ceil(1000).max(1);
    let message = format!("{who} sent more requests a minute than this server allows.");
    ApiError::new(429, "rate_limited", message).after(u64::try_from(seconds).unwrap_or(u64::MAX))
}

/// The last entry: that of the proxy which the operator trusts. Those before it are anybody's to write.
fn forwarded(headers: &HeaderMap) -> Option<IpAddr> {
    let last = headers.get_all("x-forwarded-for").iter().next_back()?.to_str().ok()?;
    last.rsplit(',').next()?.trim().parse().ok()
}

/// What counts as one address: of IPv6 the network that one customer gets.
fn place(address: IpAddr) -> u128 {
    match address.to_canonical() {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address) >> 64 << 64,
    }
}

/// Whether this tenant has something left of its budget. A run that has begun goes on.
///
/// # Errors
/// 429 until the day or the month ends; 503 where nobody can say.
pub async fn budget(frontend: &Frontend, tenant: &str) -> Result<(), ApiError> {
    let budget = &frontend.settings.budget;
    if budget.tokens_per_day == 0 && budget.tokens_per_month == 0 {
        return Ok(());
    }
    let question = Question::Usage { tenant: Some(tenant.to_owned()), before: None, limit: ROWS_MAX };
    match frontend.ledger.ask(None, question).await? {
        Answer::Usage(days) => within(budget, &days, OffsetDateTime::now_utc()),
        _ => Err(unavailable()),
    }
}

/// What a day cost in tokens: those that the upstream read anew or wrote. What it took from its cache is not counted.
fn tokens(day: &UsageDay) -> u64 {
    let counted = &day.counted;
    counted.input_tokens.saturating_add(counted.output_tokens).saturating_add(counted.cache_write_tokens)
}

fn within(budget: &Budget, days: &[UsageDay], now: OffsetDateTime) -> Result<(), ApiError> {
    let (today, month) = (now.date().to_string(), now.date().to_string()[..7].to_owned());
    let used = |prefix: &str| {
        let days = days.iter().filter(|day| day.day.starts_with(prefix));
        days.map(tokens).fold(0, u64::saturating_add)
    };
    let midnight = |date: Date| date.with_time(Time::MIDNIGHT).assume_utc();
    let tomorrow = now.date().next_day().map(midnight);
    let (year, next) = (now.year(), now.month().next());
    let next_month =
        Date::from_calendar_date(year + i32::from(next == Month::January), next, 1).ok().map(midnight);
    let periods = [
        ("month", budget.tokens_per_month, used(&month), next_month),
        ("day", budget.tokens_per_day, used(&today), tomorrow),
    ];
    for (period, most, used, ends) in periods {
        if most > 0 && used >= u64::from(most) {
            let left = ends.map_or(0, |ends| (ends - now).whole_seconds() + 1);
            let message = format!("You have used your {most} tokens of this {period}.");
            let error = ApiError::new(429, "budget_exhausted", message).final_word();
            return Err(
                ApiError { kind: "billing_error", ..error }.after(u64::try_from(left).unwrap_or_default())
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_ledger_wire::Counted;
    use http::HeaderValue;

    #[test]
    fn a_rate_is_of_one_key_and_says_when_it_ends() {
        let mut settings = Settings::default();
        settings.rates.tenant_per_minute = 2;
        let rates = Rates::new(&settings);
        let (one, two) = (TenantKey([1; 32]), TenantKey([2; 32]));
        assert!(rates.tenant(&one).is_ok() && rates.tenant(&one).is_ok());
        let error = rates.tenant(&one).expect_err("a third");
        assert_eq!((error.status, error.code, error.kind), (429, "rate_limited", "rate_limit_error"));
        assert!((25..=30).contains(&error.retry_after.expect("a time")), "{error:?}");
        assert!(rates.tenant(&two).is_ok());
        let none = Rates::new(&Settings::default());
        assert!((0..100).all(|_| none.tenant(&one).is_ok()), "no limit unless one is set");
    }

    #[test]
    fn an_address_is_the_peers_or_what_the_trusted_proxy_says() {
        let peer: IpAddr = "10.0.0.1".parse().expect("an address");
        let mut headers = HeaderMap::new();
        headers.append("x-forwarded-for", HeaderValue::from_static("1.1.1.1, 2.2.2.2"));
        headers.append("x-forwarded-for", HeaderValue::from_static("3.3.3.3, 4.4.4.4"));
        assert_eq!(forwarded(&headers), "4.4.4.4".parse().ok());
        let mut settings = Settings::default();
        settings.rates.address_per_minute = 1;
        let rates = Rates::new(&settings);
        assert!(rates.address(peer, &HeaderMap::new()).is_ok());
        assert!(rates.address(peer, &headers).is_err(), "nobody names an address for themselves");
        settings.server.trusted_proxy = true;
        let rates = Rates::new(&settings);
        assert!(rates.address(peer, &HeaderMap::new()).is_ok() && rates.address(peer, &headers).is_ok());
        let same = |a: &str, b: &str| place(a.parse().expect("one")) == place(b.parse().expect("another"));
        assert!(same("2001:db8::1", "2001:db8::ffff:1") && !same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(same("::ffff:1.2.3.4", "1.2.3.4") && !same("1.2.3.4", "1.2.3.5"));
    }

    #[test]
    fn a_budget_is_of_a_day_and_of_a_month_and_says_when_it_ends() {
        let day = |day: &str, tokens| UsageDay {
            day: day.into(),
            tenant: "t".into(),
            runs: 1,
            failed: 0,
            counted: Counted { output_tokens: tokens, cache_read_tokens: 1_000_000, ..Counted::default() },
        };
        let days = [day("2026-12-31", 70), day("2026-12-30", 50), day("2026-11-30", 500)];
        let now = OffsetDateTime::from_unix_timestamp(1_798_758_000).expect("2026-12-31T23:00:00Z");
        let check = |tokens_per_day, tokens_per_month| {
            within(&Budget { tokens_per_day, tokens_per_month }, &days, now)
                .map_err(|error| (error.kind, error.code, error.should_retry, error.retry_after))
        };
        let spent = |seconds| Err(("billing_error", "budget_exhausted", Some(false), Some(seconds)));
        assert_eq!(check(71, 121), Ok(()));
        assert_eq!(check(70, 0), spent(3601));
        assert_eq!(check(0, 120), spent(3601), "the month ends with the year");
        assert_eq!(check(0, 0), Ok(()));
        let later = now + Duration::from_secs(7200);
        assert!(within(&Budget { tokens_per_day: 70, tokens_per_month: 120 }, &days, later).is_ok());
    }
}
