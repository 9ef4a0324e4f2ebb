//! Graceful stop: one trigger, many watchers.
//!
//! Invariants: a [`DrainWatcher`] is held by everything that must end before the process may; dropping it is
//! how it says that it has. After the deadline everybody is told to close at once, and what was open is counted.

use std::time::Duration;

use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Running,
    Draining,
    Closing,
}

/// Held by whoever decides to stop.
#[derive(Debug)]
pub struct DrainTrigger(watch::Sender<Phase>);

/// Held by whoever must be waited for.
#[derive(Clone, Debug)]
pub struct DrainWatcher(watch::Receiver<Phase>);

pub fn new() -> (DrainTrigger, DrainWatcher) {
    let (trigger, watcher) = watch::channel(Phase::Running);
    (DrainTrigger(trigger), DrainWatcher(watcher))
}

impl DrainTrigger {
    /// Tells everybody to finish; waits until they have or `deadline` has passed, then tells the rest to close.
    /// Returns how many had not finished by the deadline.
    pub async fn drain(&self, deadline: Duration) -> usize {
        self.0.send_replace(Phase::Draining);
        if tokio::time::timeout(deadline, self.0.closed()).await.is_ok() {
            return 0;
        }
        let open = self.0.receiver_count();
        self.0.send_replace(Phase::Closing);
        open
    }

    /// Waits for those that were told to close, at most for `limit`.
    pub async fn finished(&self, limit: Duration) {
        // Who does not make it is cut by the end of the process.
        let _ = tokio::time::timeout(limit, self.0.closed()).await;
    }
}

impl DrainWatcher {
    /// Returns when it is time to take no new work and to finish what is there.
    pub async fn draining(&mut self) {
        self.reached(Phase::Draining).await;
    }

    /// Returns when the deadline for finishing has passed.
    pub async fn closing(&mut self) {
        self.reached(Phase::Closing).await;
    }

    pub fn is_draining(&self) -> bool {
        *self.0.borrow() >= Phase::Draining
    }

    async fn reached(&mut self, phase: Phase) {
        // A dropped trigger means that the process is on its way out: close.
        let _ = self.0.wait_for(|now| *now >= phase).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_for_the_watchers_to_go() {
        let (trigger, watcher) = new();
        let mut held = watcher.clone();
        drop(watcher);
        let worker = tokio::spawn(async move { held.draining().await });
        assert_eq!(trigger.drain(Duration::from_secs(5)).await, 0);
        worker.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn reports_what_did_not_finish_and_closes_it() {
        let (trigger, mut stuck) = new();
        assert_eq!(trigger.drain(Duration::from_secs(30)).await, 1);
        stuck.closing().await;
    }
}
