//! Waiting for a condition, with a deadline and without guessing how long it takes.

use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::Instant;

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);

/// The first value that `look` finds.
pub fn until<T>(what: &str, most: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    until_ok(what, most, || look().ok_or_else(|| anyhow::anyhow!("not yet")))
}

/// The first success of `attempt`; after the deadline its last error.
pub fn until_ok<T>(what: &str, most: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + most;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                bail!("waited {most:?} for {what}: {error:#}");
            }
            Err(_) => thread::sleep(POLL),
        }
    }
}
