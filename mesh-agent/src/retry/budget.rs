//! What keeps retries from becoming a storm.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Retries that a service may have to work for: a fifth of its requests, ten more each second, and a reserve for
/// bursts such as a server that dies with requests in flight. The Gateway API's defaults for `retryConstraint`.
///
/// A share of all requests, not of those in flight (Envoy's way): a dead endpoint fails all its requests in the
/// same millisecond. Times are since any one moment; the caller's clock.
#[derive(Debug)]
pub struct Budget {
    /// In thousandths of a retry.
    balance: AtomicI64,
    /// Milliseconds.
    granted_until: AtomicU64,
}

const RETRY: i64 = 1_000;
const PER_REQUEST: i64 = RETRY / 5;
const PER_MILLISECOND: i64 = RETRY * 10 / 1_000;
/// Ten seconds of the minimum rate: the interval over which the Gateway API counts.
const INITIAL: i64 = 10 * 1_000 * PER_MILLISECOND;
/// What can be saved up; more would be a storm of its own.
const MOST: i64 = 1_000 * RETRY;

impl Budget {
    pub fn new(now: Duration) -> Self {
        Self {
            balance: AtomicI64::new(INITIAL),
            granted_until: AtomicU64::new(millis(now)),
        }
    }

    /// Counts one request, not its retries.
    pub fn deposit(&self) {
        // Two that race may overshoot by one request's share, which does no harm.
        if self.balance.load(Ordering::Relaxed) < MOST {
            self.balance.fetch_add(PER_REQUEST, Ordering::Relaxed);
        }
    }

    /// Takes one retry out, if there is one.
    pub fn withdraw(&self, now: Duration) -> bool {
        self.grant(millis(now));
        self.balance
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |balance| {
                balance.checked_sub(RETRY).filter(|left| *left >= 0)
            })
            .is_ok()
    }

    /// Adds what the time since the last withdrawal is worth.
    fn grant(&self, now: u64) {
        let before = self.granted_until.fetch_max(now, Ordering::Relaxed);
        let elapsed = i64::try_from(now.saturating_sub(before)).unwrap_or(i64::MAX);
        let worth = elapsed.saturating_mul(PER_MILLISECOND).min(INITIAL);
        let room = MOST - self.balance.load(Ordering::Relaxed);
        self.balance.fetch_add(worth.min(room).max(0), Ordering::Relaxed);
    }
}

fn millis(since: Duration) -> u64 {
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn withdrawals(budget: &Budget, now: Duration) -> usize {
        (0..100_000).take_while(|_| budget.withdraw(now)).count()
    }

    #[test]
    fn a_reserve_then_a_fifth_of_the_requests() {
        let now = Duration::from_secs(9);
        let budget = Budget::new(now);
        assert_eq!(withdrawals(&budget, now), 100);
        for _ in 0..1_000 {
            budget.deposit();
        }
        assert_eq!(withdrawals(&budget, now), 200);
    }

    #[test]
    fn a_minimum_rate_whatever_the_load() {
        let budget = Budget::new(Duration::ZERO);
        withdrawals(&budget, Duration::ZERO);
        assert_eq!(withdrawals(&budget, Duration::from_millis(99)), 0);
        assert_eq!(withdrawals(&budget, Duration::from_secs(1)), 10);
        assert_eq!(withdrawals(&budget, Duration::from_secs(3_600)), 100);
    }

    #[test]
    fn a_clock_that_goes_back_grants_nothing() {
        let budget = Budget::new(Duration::from_secs(100));
        withdrawals(&budget, Duration::from_secs(100));
        assert_eq!(withdrawals(&budget, Duration::from_secs(50)), 0);
        assert_eq!(withdrawals(&budget, Duration::from_secs(100)), 0);
    }

    #[test]
    fn savings_are_capped() {
        let budget = Budget::new(Duration::ZERO);
        for _ in 0..1_000_000 {
            budget.deposit();
        }
        assert_eq!(withdrawals(&budget, Duration::from_secs(1_000)), 1_000);
    }

    /// The storm bound: with every request failing for ever, retries stay a fifth of the requests.
    #[test]
    fn a_total_outage_does_not_multiply_the_load() {
        let budget = Budget::new(Duration::ZERO);
        let mut retries = 0;
        for request in 0..100_000_u32 {
            budget.deposit();
            let now = Duration::from_micros(100) * request;
            retries += (0..2).filter(|_| budget.withdraw(now)).count();
        }
        assert!((20_000..20_000 + 100 + 100 + 1).contains(&retries), "{retries}");
    }
}
