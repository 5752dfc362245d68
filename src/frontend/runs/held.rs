//! What the answers of all runs take of memory, by tenant, whether they are kept, told or still being made.
//! It must never count less than there is: who holds most gives way first, and this says who that is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The account.
#[derive(Debug, Default)]
pub struct Held {
    all: AtomicUsize,
    /// Tenants that hold something.
    of: Mutex<HashMap<[u8; 32], usize>>,
}

impl Held {
    /// Bytes of everybody.
    pub fn all(&self) -> usize {
        self.all.load(Ordering::Relaxed)
    }

    /// What this tenant holds becomes this much more, and less by that.
    pub fn change(&self, tenant: &[u8; 32], more: usize, less: usize) {
        if more == less {
            return;
        }
        let mut of = self.of();
        let own = of.entry(*tenant).or_default();
        *own = own.saturating_add(more).saturating_sub(less);
        if *own == 0 {
            of.remove(tenant);
        }
        // Under the lock, so that the sum is never less than nothing.
        self.all.fetch_add(more, Ordering::Relaxed);
        self.all.fetch_sub(less, Ordering::Relaxed);
    }

    /// Who holds most.
    pub fn heaviest(&self) -> Option<[u8; 32]> {
        self.of().iter().max_by_key(|(tenant, bytes)| (**bytes, **tenant)).map(|(tenant, _)| *tenant)
    }

    fn of(&self) -> MutexGuard<'_, HashMap<[u8; 32], usize>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
