//! How often may be asked: requests a minute of an address and of a tenant.
//! It must never let one tenant's requests count as another's, nor believe an address but the trusted proxy's word.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use http::HeaderMap;

use gaoler_ledger_wire::Allowance;
use gaoler_policy::settings::Settings;
use gaoler_protocol::TenantKey;

use super::error::ApiError;

/// Looks between two sweeps of who has not asked for long: their places are all that they cost.
const SWEEP_EVERY: u32 = 4096;
/// Different rates of tenants that are counted; where there are more, all of them begin anew.
const RATES_MAX: usize = 1024;

/// A limit by key; no limiter where there is none.
struct Limit<K: Clone + Eq + std::hash::Hash> {
    count: u32,
    limiter: Option<RateLimiter<K, HashMapStateStore<K>, DefaultClock>>,
    looks: AtomicU32,
}

impl<K: Clone + Eq + std::hash::Hash> Limit<K> {
    fn per_minute(count: u32) -> Limit<K> {
        let limiter = NonZeroU32::new(count).map(|count| RateLimiter::hashmap(Quota::per_minute(count)));
        Limit { count, limiter, looks: AtomicU32::new(0) }
    }

    /// Counts one; how long until one more may come, where there were too many.
    fn take(&self, key: &K) -> Result<(), Duration> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        if self.looks.fetch_add(1, Ordering::Relaxed).is_multiple_of(SWEEP_EVERY) {
            limiter.retain_recent();
        }
        limiter.check_key(key).map_err(|not_until| not_until.wait_time_from(DefaultClock::default().now()))
    }
}

/// The rates of this server.
pub struct Rates {
    tenants: Arc<Limit<[u8; 32]>>,
    /// Of tenants with a rate of their own, by that rate.
    own: Arc<Mutex<BTreeMap<u32, Limit<[u8; 32]>>>>,
    addresses: Arc<Limit<u128>>,
    /// Requests that an address may have at the same time; 0 = any number.
    address_max: u32,
    /// And has.
    under_way: Arc<Mutex<HashMap<u128, u32>>>,
    trusted_proxy: bool,
}

/// A request of an address, until it is dropped.
pub struct UnderWay {
    all: Arc<Mutex<HashMap<u128, u32>>>,
    place: u128,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut count) = all.entry(self.place) {
            match count.get() {
                0 | 1 => drop(count.remove()),
                _ => *count.get_mut() -= 1,
            }
        }
    }
}

impl Rates {
    /// As the settings say.
    pub fn new(settings: &Settings) -> Rates {
        Rates {
            tenants: Arc::new(Limit::per_minute(settings.rates.tenant_per_minute)),
            own: Arc::default(),
            addresses: Arc::new(Limit::per_minute(settings.rates.address_per_minute)),
            address_max: settings.rates.address_max,
            under_way: Arc::default(),
            trusted_proxy: settings.server.trusted_proxy,
        }
    }

    /// As these settings say. A rate that is the same as before goes on as it was counted.
    pub fn with(&self, settings: &Settings) -> Rates {
        let fresh = Rates::new(settings);
        let tenants = if fresh.tenants.count == self.tenants.count { &self.tenants } else { &fresh.tenants };
        let addresses =
            if fresh.addresses.count == self.addresses.count { &self.addresses } else { &fresh.addresses };
        Rates {
            tenants: Arc::clone(tenants),
            own: Arc::clone(&self.own),
            addresses: Arc::clone(addresses),
            address_max: fresh.address_max,
            under_way: Arc::clone(&self.under_way),
            trusted_proxy: fresh.trusted_proxy,
        }
    }

    /// Counts a run that is asked for.
    ///
    /// # Errors
    /// 429 with the time until the next one may come.
    pub fn tenant(&self, tenant: &TenantKey, allowance: &Allowance) -> Result<(), ApiError> {
        let taken = match allowance.tenant_per_minute {
            None => self.tenants.take(&tenant.0),
            Some(rate) => {
                let rate = u32::try_from(rate).unwrap_or(u32::MAX);
                let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
                if own.len() >= RATES_MAX && !own.contains_key(&rate) {
                    own.clear();
                }
                own.entry(rate).or_insert_with(|| Limit::per_minute(rate)).take(&tenant.0)
            }
        };
        taken.map_err(|wait| limited("You have", wait))
    }

    /// Where a request comes from, as it is counted: by who is connected, or by the trusted proxy's word.
    pub fn place_of(&self, peer: IpAddr, headers: &HeaderMap) -> u128 {
        place(if self.trusted_proxy { forwarded(headers).unwrap_or(peer) } else { peer })
    }

    /// Counts a request of this address, which is under way for as long as what comes back is kept.
    ///
    /// # Errors
    /// 429 with the time until the next one may come, or where there are too many at once.
    pub fn address(&self, peer: IpAddr, headers: &HeaderMap) -> Result<Option<UnderWay>, ApiError> {
        let place = self.place_of(peer, headers);
        self.addresses.take(&place).map_err(|wait| limited("Your address has", wait))?;
        if self.address_max == 0 {
            return Ok(None);
        }
        let mut all = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(place).or_default();
        if *count >= self.address_max {
            let message =
                format!("Your address has {count} requests under way, as many as this server allows.");
            return Err(ApiError::new(429, "address_busy", message).after(1));
        }
        *count += 1;
        drop(all);
        Ok(Some(UnderWay { all: Arc::clone(&self.under_way), place }))
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
pub fn place(address: IpAddr) -> u128 {
    match address.to_canonical() {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address) >> 64 << 64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_rate_is_of_one_key_and_says_when_it_ends() {
        let mut settings = Settings::default();
        settings.rates.tenant_per_minute = 2;
        let rates = Rates::new(&settings);
        let same = Allowance::default();
        let (one, two) = (TenantKey([1; 32]), TenantKey([2; 32]));
        assert!(rates.tenant(&one, &same).is_ok() && rates.tenant(&one, &same).is_ok());
        let error = rates.tenant(&one, &same).expect_err("a third");
        assert_eq!((error.status, error.code, error.kind), (429, "rate_limited", "rate_limit_error"));
        assert!((25..=30).contains(&error.retry_after.expect("a time")), "{error:?}");
        assert!(rates.tenant(&two, &same).is_ok());
        let own = |rate| Allowance { tenant_per_minute: Some(rate), ..same };
        assert!(rates.tenant(&one, &own(1)).is_ok(), "its own rate, from the next request on");
        assert_eq!(rates.tenant(&one, &own(1)).expect_err("a second").code, "rate_limited");
        assert!(rates.tenant(&two, &own(1)).is_ok() && (0..100).all(|_| rates.tenant(&one, &own(0)).is_ok()));
        // A reload that leaves the rate as it is forgives nobody.
        settings.rates.address_per_minute = 5;
        assert_eq!(rates.with(&settings).tenant(&two, &own(1)).expect_err("as before").code, "rate_limited");
        assert_eq!(rates.with(&settings).tenant(&one, &same).expect_err("as before").code, "rate_limited");
        settings.rates.tenant_per_minute = 3;
        assert!(rates.with(&settings).tenant(&one, &same).is_ok(), "another rate begins anew");
        let none = Rates::new(&Settings::default());
        assert!((0..100).all(|_| none.tenant(&one, &same).is_ok()), "no limit unless one is set");
    }

    #[test]
    fn an_address_has_so_many_requests_at_a_time_and_is_forgotten_with_the_last() {
        let mut settings = Settings::default();
        settings.rates.address_max = 2;
        let rates = Rates::new(&settings);
        let at = |rates: &Rates, address: &str| {
            rates.address(address.parse().expect("an address"), &HeaderMap::new())
        };
        let mut held = vec![at(&rates, "10.0.0.1").expect("one"), at(&rates, "10.0.0.1").expect("two")];
        let error = at(&rates, "10.0.0.1").err().expect("a third");
        assert_eq!((error.status, error.code, error.retry_after), (429, "address_busy", Some(1)));
        assert!(at(&rates, "10.0.0.2").is_ok(), "another address");
        // A reload knows those that are under way.
        settings.rates.address_max = 3;
        let more = rates.with(&settings);
        held.push(at(&more, "10.0.0.1").expect("a third"));
        assert!(at(&more, "10.0.0.1").is_err());
        settings.rates.address_max = 0;
        assert!(at(&more.with(&settings), "10.0.0.1").expect("any number").is_none());
        held.clear();
        assert!(rates.under_way.lock().expect("no panic").is_empty());
        assert!(at(&rates, "10.0.0.1").is_ok());
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
}
