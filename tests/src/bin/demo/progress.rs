//! One line per step while the demo runs.

use anyhow::Result;
use tokio::time::Instant;

#[derive(Default)]
pub(crate) struct Progress {
    steps: u32,
}

impl Progress {
    pub(crate) fn step<T>(&mut self, title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.steps += 1;
        eprint!("  {}. {title} ... ", self.steps);
        let started = Instant::now();
        let result = work();
        let outcome = if result.is_ok() { "done" } else { "FAILED" };
        eprintln!("{outcome} ({:.1} s)", started.elapsed().as_secs_f64());
        result
    }
}
