//! Credentials of which a run has begun: whoever holds one was vouched for, now or when they were first seen.
//! It must never hold a credential, nor grow with those that are made up.

use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, PoisonError};

use gaoler_protocol::TenantKey;

/// How many are remembered: the newest. One that is forgotten is a stranger until its next run.
const VOUCHED_MAX: usize = 16 * 1024;

/// Those.
#[derive(Default)]
pub struct Vouched(Mutex<Known>);

#[derive(Default)]
struct Known {
    all: HashSet<[u8; 32]>,
    /// The oldest first.
    order: VecDeque<[u8; 32]>,
}

impl Vouched {
    /// Whether a run of this tenant has begun.
    pub fn is_known(&self, tenant: &TenantKey) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).all.contains(&tenant.0)
    }

    /// A run of it has.
    pub fn note(&self, tenant: &TenantKey) {
        let Known { all, order } = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.insert(tenant.0) {
            order.push_back(tenant.0);
        }
        if order.len() > VOUCHED_MAX
            && let Some(oldest) = order.pop_front()
        {
            all.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_remembered() {
        let vouched = Vouched::default();
        let of =
            |n: usize| TenantKey(std::array::from_fn(|at| n.to_le_bytes().get(at).copied().unwrap_or(0)));
        for n in 0..=VOUCHED_MAX {
            vouched.note(&of(n));
            vouched.note(&of(n));
        }
        assert!(!vouched.is_known(&of(0)) && vouched.is_known(&of(1)) && vouched.is_known(&of(VOUCHED_MAX)));
    }
}
