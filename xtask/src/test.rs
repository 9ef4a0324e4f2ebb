//! `cargo xtask test`: every test, those too that need root, a real kernel and real peers.
//!
//! No test skips itself. What a machine cannot run is found before anything is built, and is an error that
//! says why; with `--allow-missing` it is listed instead.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::build_ebpf;
use crate::cross::{self, Arch};
use crate::prerequisites;
use crate::setup::{self, Need};
use crate::shell::{self, Steps};
use crate::train;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Leave out what cannot run here, and say what that is.
    #[arg(long)]
    allow_missing: bool,
    /// Test the agent that `dist --trained` makes.
    #[arg(long)]
    trained: bool,
    /// Run only tests whose name contains this.
    filter: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    Steps::timed(|steps| run_steps(steps, args))
}

pub(crate) fn run_steps(steps: &mut Steps, args: &Args) -> Result<()> {
    let trained = args.trained.then(train::profile).transpose()?;
    let missing = missing();
    admit(&missing, args)?;
    steps.try_run("unit tests", || {
        let mut cargo = cross::cargo("test", Arch::host()?, &[])?;
        cargo.args([
            "--package",
            "mesh-common",
            "--package",
            "mesh-agent",
            "--package",
            "xtask",
        ]);
        cargo_test(cargo, args)
    });
    if !missing.is_empty() {
        leave_out(&missing);
        return steps.finish();
    }
    // With the tests, so that what both are made of is compiled once.
    let built = build_ebpf::build(steps, &["mesh-tests"])?;
    let agent = match &trained {
        Some(profile) => train::build(steps, profile)?.agent,
        None => built.agent,
    };
    let unfit = prerequisites::unfit(&agent)?;
    admit(&unfit, args)?;
    if unfit.is_empty() {
        steps.try_run("privileged tests", || privileged(&agent, args));
    } else {
        leave_out(&unfit);
    }
    steps.finish()
}

/// Where there are reasons against the privileged tests, that is an error, unless they may be left out.
fn admit(reasons: &[String], args: &Args) -> Result<()> {
    if reasons.is_empty() || args.allow_missing {
        return Ok(());
    }
    bail!(
        "the privileged tests cannot run here:\n{}\n(--allow-missing leaves them out)",
        listed(reasons)
    );
}

fn leave_out(reasons: &[String]) {
    eprintln!("==> privileged tests: LEFT OUT, since\n{}", listed(reasons));
}

/// Why privileged tests cannot run, once what can be installed is.
fn missing() -> Vec<String> {
    // Setup first: its programs are what the rest is tried with.
    let setup = setup::ensure(&[Need::Build, Need::Peers])
        .err()
        .map(|error| format!("{error:#}"));
    setup.into_iter().chain(prerequisites::missing()).collect()
}

fn listed(reasons: &[String]) -> String {
    reasons
        .iter()
        .map(|reason| format!("  - {reason}"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn privileged(agent: &Path, args: &Args) -> Result<()> {
    let mut cargo = cross::cargo("test", Arch::host()?, &[])?;
    let folder = tempfile::tempdir()?;
    let records = folder.path().join("records");
    // The very agent that users run, with the object inside.
    cargo
        .args(["--package", "mesh-tests"])
        .env("MESH_AGENT_BIN", agent)
        .env("MESH_TESTS_RECORD", &records);
    let outcome = cargo_test(cargo, args);
    for line in fs::read_to_string(&records).unwrap_or_default().lines() {
        let record: Value = serde_json::from_str(line)?;
        if record["about"] == "off" {
            eprintln!(
                "==> {} found nothing to test: this kernel has no {}",
                record["test"], record["what"]
            );
        }
    }
    outcome
}

fn cargo_test(mut cargo: std::process::Command, args: &Args) -> Result<()> {
    cargo.args(["--release", "--no-fail-fast"]);
    if let Some(filter) = &args.filter {
        cargo.args(["--", filter]);
    }
    shell::run(&mut cargo)
}
