//! Waiting for a condition, with a deadline and without guessing how long it takes.

use std::env;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::Instant;

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);

/// How many times as long as usual everything may take: an emulated processor is that much slower. What must
/// happen stays the same.
const VARIABLE: &str = "MESH_TESTS_PATIENCE";

/// A time after which something hangs, on this machine.
pub fn patience(usual: Duration) -> Duration {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| {
        let factor = env::var(VARIABLE).ok().and_then(|factor| factor.parse().ok());
        factor.unwrap_or(1)
    });
    usual * *FACTOR
}

/// The first value that `look` finds.
pub fn until<T>(what: &str, most: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    until_ok(what, most, || look().ok_or_else(|| anyhow::anyhow!("not yet")))
}

/// The first success of `attempt`; after the deadline its last error.
pub fn until_ok<T>(what: &str, most: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let most = patience(most);
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
