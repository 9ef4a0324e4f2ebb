//! The program: reads the command line and the configuration, and gives each side of the agent its runtime.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use mesh_agent::cli::{Cli, Command, execute, explain};
use mesh_agent::config::{AgentConfig, LogFormat};
use mesh_agent::lanes::Lanes;
use mesh_agent::{app, telemetry};
use tokio::runtime::Builder;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run { config } => run(config.as_deref()).map(|()| ExitCode::SUCCESS),
        command => execute(command),
    };
    done.unwrap_or_else(|error| match is_reader_gone(&error) {
        true => ExitCode::SUCCESS,
        false => {
            eprintln!("mesh-agent: {}", explain(error.as_ref()));
            ExitCode::FAILURE
        }
    })
}

/// As when the output goes to `head`.
fn is_reader_gone(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<io::Error>();
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn run(config: Option<&Path>) -> anyhow::Result<()> {
    let node = std::env::var("NODE_NAME").ok();
    let config =
        AgentConfig::load(config, node.as_deref()).context("the agent's configuration cannot be used")?;
    let format = match config.log_format {
        LogFormat::Text => telemetry::Format::Text,
        LogFormat::Json => telemetry::Format::Json,
    };
    // As for most programs in Rust, so that one run can say more without a change to the configuration.
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| config.log_level.clone());
    let log =
        telemetry::init(format, &filter).with_context(|| format!("cannot log by the filter `{filter}`"))?;
    let lanes = Lanes::start(config.threads).context("cannot start the data path's threads")?;
    // The control side has this thread: it answers when the data path is busy, and the other way round.
    let control = Builder::new_current_thread().enable_all().build()?;
    control.block_on(app::run(config, log, lanes))
}
