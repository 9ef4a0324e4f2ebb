//! Endpoints: one address that serves a service's port, and how busy it is.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::Workload;

/// One address behind a service's port.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// Absent for an address that no workload document describes: it is reached in clear text.
    pub workload: Option<Arc<Workload>>,
    /// Shared by all snapshots that hold this endpoint.
    pub load: Arc<Load>,
}

impl PartialEq for Endpoint {
    /// The same address and the same workload object; how busy it is does not count.
    fn eq(&self, other: &Self) -> bool {
        self.address == other.address
            && match (&self.workload, &other.workload) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (None, None) => true,
                _ => false,
            }
    }
}

/// How busy an endpoint is, as seen from this agent. The only part of the model that changes in place.
#[derive(Debug, Default)]
pub struct Load {
    active: AtomicU32,
    /// In milliseconds.
    rests_until: AtomicU64,
    /// Rests since it was last reached.
    rests: AtomicU32,
}

impl Load {
    /// Requests in flight to the endpoint, and opaque connections.
    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    /// It could not be reached: others are preferred for a time, from `shortest` on and twice as long each time in a
    /// row. `now` is since one moment of the caller's.
    pub fn rest(&self, now: Duration, (shortest, longest): (Duration, Duration)) {
        // Those that failed together are one failure.
        if self.rests(now) {
            return;
        }
        let before = self.rests.fetch_add(1, Ordering::Relaxed).min(31);
        let rest = shortest.saturating_mul(1 << before).min(longest);
        self.rests_until.store(millis(now + rest), Ordering::Relaxed);
    }

    /// It answered, or at least the connection was made.
    pub fn reached(&self) {
        // Nearly always there is nothing to change, and all threads look here.
        if self.rests.load(Ordering::Relaxed) != 0 {
            self.rests.store(0, Ordering::Relaxed);
        }
    }

    pub fn rests(&self, now: Duration) -> bool {
        millis(now) < self.rests_until.load(Ordering::Relaxed)
    }

    /// Counts one request or connection until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.active.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }
}

fn millis(since: Duration) -> u64 {
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// One request in flight, or one opaque connection.
#[derive(Debug)]
pub struct InFlight(Arc<Load>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_until_it_is_reached() {
        const LIMITS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
        let load = Load::default();
        let mut now = Duration::from_secs(100);
        let mut rest = |load: &Load| {
            let begun = now;
            load.rest(now, LIMITS);
            // Another that fails meanwhile changes nothing.
            load.rest(now + Duration::from_millis(500), LIMITS);
            while load.rests(now) {
                now += Duration::from_millis(500);
            }
            (now - begun).as_secs()
        };
        let grown: Vec<_> = (0..7).map(|_| rest(&load)).collect();
        assert_eq!(grown, [1, 2, 4, 8, 16, 30, 30]);
        load.reached();
        assert_eq!(rest(&load), 1);
    }
}
