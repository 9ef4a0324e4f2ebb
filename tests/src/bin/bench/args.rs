//! What to measure, with whom, and for how long.

use std::path::PathBuf;

use clap::Parser;
use serde::Serialize;

use crate::peer::Peer;
use crate::scenario::Name;

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask bench",
    about = "The agent and its peers, side by side on this machine"
)]
pub(crate) struct Args {
    /// What to measure; everything without one.
    pub(crate) scenarios: Vec<Name>,
    /// Measure only these, and what all are compared with; may be given several times.
    #[arg(long = "peer")]
    pub(crate) peers: Vec<Peer>,
    /// Fewer rounds and seconds; the same rows.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Also leave a flame graph of the agents for each row, beside the results.
    #[arg(long)]
    pub(crate) profile: bool,
    /// Turns of each contestant.
    #[arg(long)]
    pub(crate) rounds: Option<usize>,
    /// Envoy's program.
    #[arg(long, default_value = "envoy")]
    pub(crate) envoy: PathBuf,
    /// ztunnel's program.
    #[arg(long)]
    pub(crate) ztunnel: Option<PathBuf>,
    /// Where the results go as JSON, all rounds of them.
    #[arg(long)]
    pub(crate) output: PathBuf,
}

/// How long things take.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Effort {
    /// The first finds out how fast the paced runs of the others may be.
    pub(crate) rounds: usize,
    /// Of each measurement.
    pub(crate) seconds: u64,
    pub(crate) soak_seconds: u64,
}

impl Args {
    pub(crate) fn effort(&self) -> Effort {
        let (rounds, seconds, soak_seconds) = if self.quick { (3, 2, 60) } else { (7, 5, 600) };
        Effort {
            rounds: self.rounds.unwrap_or(rounds).max(2),
            seconds,
            soak_seconds,
        }
    }
}
