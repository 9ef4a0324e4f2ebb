//! `cargo xtask bench`: builds everything as users run it, then becomes the bench.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::bench_args;
use crate::build_ebpf;
use crate::prerequisites;
use crate::setup::{self, Need};
use crate::shell::Steps;
use crate::train;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Scenarios and options, which the bench itself explains.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    // Ends with help, or with what is wrong, before anything is built.
    let name = ["cargo xtask bench"].into_iter();
    let wanted = bench_args::Args::parse_from(name.chain(args.rest.iter().map(String::as_str)));
    let trained = wanted.trained.then(train::profile).transpose()?;
    setup::ensure(&[Need::Build, Need::Peers, Need::Bench])?;
    let missing = prerequisites::missing();
    if !missing.is_empty() {
        bail!("the bench cannot run here:\n  - {}", missing.join("\n  - "));
    }
    let mut steps = Steps::default();
    let built = build_ebpf::build(&mut steps, &["mesh-tests"])?;
    let agent = match &trained {
        Some(profile) => train::build(&mut steps, profile)?.agent,
        None => built.agent.clone(),
    };
    let mut bench = Command::new(built.program("bench")?);
    bench
        .args(&args.rest)
        .env("MESH_AGENT_BIN", agent)
        .env("MESH_PEER_BIN", built.program("mesh-peer")?);
    eprintln!("==> bench");
    // In our place: Ctrl-C reaches the one process that cleans up, and the shell waits for it.
    Err(bench.exec()).context("cannot run the bench")
}
