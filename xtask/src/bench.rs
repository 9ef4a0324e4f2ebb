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

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Scenarios and options, which the bench itself explains.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    // Ends with help, or with what is wrong, before anything is built.
    let own_name = "cargo xtask bench".to_owned();
    bench_args::Args::parse_from([&own_name].into_iter().chain(&args.rest));
    setup::ensure(&[Need::Build, Need::Peers, Need::Bench])?;
    let missing = prerequisites::missing();
    if !missing.is_empty() {
        bail!("the bench cannot run here:\n  - {}", missing.join("\n  - "));
    }
    let built = build_ebpf::build(&mut Steps::default(), &["mesh-tests"])?;
    let mut bench = Command::new(built.program("bench")?);
    bench
        .args(&args.rest)
        .env("MESH_AGENT_BIN", &built.agent)
        .env("MESH_PEER_BIN", built.program("mesh-peer")?);
    eprintln!("==> bench");
    // In our place: Ctrl-C reaches the one process that cleans up, and the shell waits for it.
    Err(bench.exec()).context("cannot run the bench")
}
