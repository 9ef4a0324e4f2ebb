//! Whether runtimes still run: each beats, and another one looks.
//!
//! Invariant: a beat needs nothing but a turn on its runtime, so that it stops only when no task gets one.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Between two beats.
const BEAT: Duration = Duration::from_millis(500);
/// No beat for this long is a runtime that hangs: each of its threads is held by one task. Far above what a machine
/// under load, or one that was asleep, makes a thread wait.
const HUNG_AFTER: Duration = Duration::from_secs(10);

/// Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub struct Pulse {
    /// When each of the hearts last beat.
    last: Arc<Mutex<Vec<Instant>>>,
    hung_after: Duration,
}

impl Default for Pulse {
    fn default() -> Self {
        Self::new(HUNG_AFTER)
    }
}

impl Pulse {
    pub(super) fn new(hung_after: Duration) -> Self {
        Self {
            last: Arc::default(),
            hung_after,
        }
    }

    /// To be run for good on a runtime, which is watched from now on.
    pub fn heart(&self) -> impl Future<Output = ()> + Send + 'static {
        let pulse = self.clone();
        let own = {
            let mut last = pulse.lock();
            last.push(Instant::now());
            last.len() - 1
        };
        async move {
            let mut every = tokio::time::interval(BEAT.min(pulse.hung_after / 4));
            loop {
                every.tick().await;
                if let Some(last) = pulse.lock().get_mut(own) {
                    *last = Instant::now();
                }
            }
        }
    }

    /// For how long one of them has not beaten, when that is too long.
    pub fn hung(&self) -> Option<Duration> {
        let longest = self.lock().iter().map(Instant::elapsed).max();
        longest.filter(|since| *since > self.hung_after)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Instant>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
