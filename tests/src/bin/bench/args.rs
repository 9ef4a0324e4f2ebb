//! What to measure, with whom, and for how long.
//!
//! A module of xtask too, which so explains itself and refuses what is wrong before it builds anything: it uses
//! nothing else of the bench.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::builder::PossibleValue;
use clap::{Parser, ValueEnum};
use serde::Serialize;

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
    /// Also leave a flame graph of each agent for each row, beside the results.
    #[arg(long)]
    pub(crate) profile: bool,
    /// Turns of each contestant.
    #[arg(long)]
    pub(crate) rounds: Option<usize>,
    /// Seconds of each measurement, but for `idle`, `churn` and `soak`; default: 5, with --quick 2.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) seconds: Option<u64>,
    /// Measure the agent that `dist --trained` makes, after `cargo xtask train`. It was trained with these rows.
    #[arg(long)]
    pub(crate) trained: bool,
    /// Have the kernel encrypt what goes between our agents (`kernelTls: true`); not if this one cannot.
    #[arg(long)]
    pub(crate) kernel_tls: bool,
    /// Envoy's program.
    #[arg(long, default_value = "envoy")]
    pub(crate) envoy: PathBuf,
    /// ztunnel's program.
    #[arg(long)]
    pub(crate) ztunnel: Option<PathBuf>,
    /// Where the results go as JSON, all rounds of them.
    #[arg(long, default_value_os_t = default_output())]
    pub(crate) output: PathBuf,
}

/// In cargo's target folder, wherever the user put it.
fn default_output() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    package
        .parent()
        .unwrap_or(package)
        .join(target)
        .join("bench.json")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Name {
    L7SameNode,
    L7TwoNodes,
    L4TwoNodes,
    Connect,
    FastPath,
    Idle,
    Churn,
    Soak,
}

impl fmt::Display for Name {
    /// As it is given on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", PossibleValue::get_name))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Peer {
    /// The client talks to the server, nobody between.
    None,
    /// A plain relay of bytes that decides nothing: about what the hops cost by themselves.
    Bare,
    /// This project.
    Agent,
    Nginx,
    Haproxy,
    Envoy,
    Ztunnel,
}

impl Peer {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::None => "direct",
            Self::Bare => "bare",
            Self::Agent => "mesh-agent",
            Self::Nginx => "nginx",
            Self::Haproxy => "HAProxy",
            Self::Envoy => "Envoy",
            Self::Ztunnel => "ztunnel",
        }
    }

    /// Whether it sends requests to one or another server by what they say. Who does not has to be told which.
    pub(crate) fn routes(self) -> bool {
        !matches!(self, Self::None | Self::Bare | Self::Ztunnel)
    }
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
            seconds: self.seconds.unwrap_or(seconds),
            soak_seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;

    use super::*;

    #[test]
    fn nothing_has_to_be_given_and_what_is_wrong_is_refused() {
        let args = Args::try_parse_from(["bench"]).unwrap();
        assert!(args.output.is_absolute(), "{args:?}");
        assert!(args.output.ends_with("bench.json"), "{args:?}");
        let args = Args::try_parse_from(["bench", "connect", "--peer", "bare", "--output", "/x"]).unwrap();
        assert_eq!(
            (args.scenarios, args.peers),
            (vec![Name::Connect], vec![Peer::Bare])
        );
        assert_eq!(args.output, Path::new("/x"));
        let refused = |word| Args::try_parse_from(["bench", word]).unwrap_err().kind();
        assert_eq!(refused("--help"), ErrorKind::DisplayHelp);
        assert_eq!(refused("conect"), ErrorKind::InvalidValue);
        assert_eq!(refused("--quik"), ErrorKind::UnknownArgument);
    }
}
