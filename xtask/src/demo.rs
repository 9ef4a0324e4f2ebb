//! `cargo xtask demo`: builds everything, then becomes the demo.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build_ebpf;
use crate::prerequisites;
use crate::setup::{self, Need};
use crate::shell::Steps;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave it running, with the commands to try printed, until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    setup::ensure(&[Need::Build, Need::Peers])?;
    let missing = prerequisites::missing();
    if !missing.is_empty() {
        bail!("the demo cannot run here:\n  - {}", missing.join("\n  - "));
    }
    let built = build_ebpf::build(&mut Steps::default(), &["mesh-tests"])?;
    let mut demo = Command::new(built.program("demo")?);
    demo.args(args.keep.then_some("--keep"))
        .env("MESH_AGENT_BIN", &built.agent)
        .env("MESH_PEER_BIN", built.program("mesh-peer")?);
    eprintln!("==> demo");
    // In our place: Ctrl-C reaches the one process that cleans up, and the shell waits for it.
    Err(demo.exec()).context("cannot run the demo")
}
