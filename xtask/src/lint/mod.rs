//! `cargo xtask lint`: everything that can be checked without running the project's code.

mod budgets;
mod layers;
mod source;

use std::process::Command;

use anyhow::{Result, bail};

use crate::ebpf_toolchain::{Run, Toolchain};
use crate::setup::{self, Need};
use crate::shell::{self, Steps};

pub(crate) fn run() -> Result<()> {
    setup::ensure(&[Need::Build, Need::Lint])?;
    run_steps(&mut Steps::default())
}

/// The quick checks first; every check runs, whatever the others say.
pub(crate) fn run_steps(steps: &mut Steps) -> Result<()> {
    steps.try_run("format", || {
        shell::run(shell::cargo("fmt").args(["--all", "--check"]))
    });
    steps.try_run("layers and budgets", own_checks);
    steps.try_run("licences, sources and bans of dependencies", || {
        let mut deny = Command::new(setup::cargo_deny()?);
        shell::run(
            deny.current_dir(shell::workspace())
                .args(["check", "bans", "licenses", "sources"]),
        )
    });
    steps.try_run("clippy for the host", || {
        let mut clippy = shell::cargo("clippy");
        clippy.args([
            "--release",
            "--workspace",
            "--exclude",
            "mesh-ebpf",
            "--all-targets",
            "--keep-going",
        ]);
        shell::run(clippy.args(["--", "--deny", "warnings"]))
    });
    steps.try_run("clippy for the bpf target", || {
        let toolchain = Toolchain::locate().map_err(|missing| anyhow::anyhow!("{missing}"))?;
        let target_dir = shell::target_dir().join("ebpf-lint");
        let mut clippy = toolchain.command(Run::Clippy, shell::workspace(), &target_dir);
        shell::run(clippy.args(["--", "--deny", "warnings"]))
    });
    steps.finish()
}

/// What no other linter knows: this project's layers and house rules.
fn own_checks() -> Result<()> {
    let sources = source::read_all(shell::workspace())?;
    let mut problems = layers::check(&sources);
    problems.extend(budgets::check(&sources));
    problems.extend(budgets::check_listing(shell::workspace())?);
    for problem in &problems {
        eprintln!("{problem}");
    }
    let errors = problems.iter().filter(|problem| !problem.only_a_warning).count();
    if errors > 0 {
        bail!("{errors} breaches of the house rules");
    }
    Ok(())
}
