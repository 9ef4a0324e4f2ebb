//! `cargo xtask ci`: exactly what `.ci/run` runs.

use anyhow::Result;

use crate::setup::{self, Need};
use crate::shell::Steps;
use crate::{kernels, lint, test};

pub(crate) fn run() -> Result<()> {
    let mut steps = Steps::default();
    let outcome = run_steps(&mut steps);
    eprintln!(
        "\n==> ci: {}",
        if outcome.is_ok() {
            "everything passed"
        } else {
            "FAILED"
        }
    );
    steps.print_times();
    outcome
}

fn run_steps(steps: &mut Steps) -> Result<()> {
    // All at once, before anything long: who is not root learns so now.
    steps.run("set up", || {
        setup::ensure(&[Need::Build, Need::Lint, Need::Peers, Need::Kernels])
    })?;
    lint::run_steps(steps)?;
    test::run_steps(steps, &test::Args::default())?;
    kernels::run_steps(steps, &kernels::Args::for_ci())
}
