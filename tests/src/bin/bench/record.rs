//! What was measured, as it is written to the JSON file.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::args::{Args, Effort, Name, Peer};
use crate::cpu::Used;
use crate::generator::Paced;
use crate::peer::Peers;
use crate::scenario::Work;
use crate::stats::{median, spread};
use crate::targets::Verdict;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    pub(crate) machine: Machine,
    pub(crate) effort: Effort,
    pub(crate) versions: BTreeMap<Peer, String>,
    pub(crate) missing: BTreeMap<Peer, String>,
    pub(crate) scenarios: Vec<ScenarioRecord>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
}

#[derive(Debug, Serialize)]
pub(crate) struct ScenarioRecord {
    pub(crate) name: Name,
    pub(crate) title: &'static str,
    pub(crate) rows: Vec<RowRecord>,
    /// Of scenarios that look at the agent alone.
    pub(crate) figures: Vec<Figure>,
    pub(crate) verdicts: Vec<Verdict>,
    /// Turns that failed.
    pub(crate) problems: Vec<String>,
}

/// One figure of the agent, as often as it was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) values: Vec<f64>,
    /// At most.
    pub(crate) target: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct RowRecord {
    pub(crate) label: String,
    pub(crate) work: Work,
    /// Requests per second of the paced runs.
    pub(crate) rate: Option<u64>,
    pub(crate) contestants: Vec<Contestant>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Contestant {
    pub(crate) peer: Peer,
    pub(crate) rounds: Vec<Round>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Round {
    pub(crate) load: Load,
    pub(crate) paced: Option<Paced>,
    /// What the paced run took, the generator's start and end included.
    pub(crate) paced_used: Option<Used>,
    /// Bytes.
    pub(crate) peak_rss: u64,
}

/// As much as goes.
#[derive(Debug, Serialize)]
pub(crate) struct Load {
    /// Requests, gigabits or connections.
    pub(crate) count: f64,
    pub(crate) used: Used,
}

impl Load {
    pub(crate) fn per_second(&self) -> f64 {
        self.count / self.used.wall
    }
}

impl Record {
    pub(crate) fn new(args: &Args, machine: Machine, peers: &Peers) -> Self {
        let versions = peers.versions().map(|(peer, version)| (peer, version.to_owned()));
        Self {
            machine,
            effort: args.effort(),
            versions: versions.collect(),
            missing: peers.missing.iter().cloned().collect(),
            scenarios: Vec::new(),
        }
    }
}

impl Figure {
    pub(crate) fn new(what: &str, unit: &'static str, target: Option<f64>) -> Self {
        Self {
            what: what.to_owned(),
            unit,
            values: Vec::new(),
            target,
        }
    }
}

impl Machine {
    pub(crate) fn read() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            cpu: model.map_or("unknown", |(_, name)| name).to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
        })
    }
}

impl Round {
    /// Seconds per request that the proxies' threads waited for a CPU at the fixed rate.
    pub(crate) fn waiting(&self) -> Option<f64> {
        let answers = self.paced.as_ref().map(|paced| paced.answers as f64)?;
        Some(self.paced_used?.waiting? / answers).filter(|_| answers > 0.0)
    }
}

impl RowRecord {
    pub(crate) fn contestant(&self, peer: Peer) -> Option<&Contestant> {
        self.contestants.iter().find(|contestant| contestant.peer == peer)
    }

    pub(crate) fn contestant_mut(&mut self, peer: Peer) -> Result<&mut Contestant> {
        let found = self
            .contestants
            .iter_mut()
            .find(|contestant| contestant.peer == peer);
        found.with_context(|| format!("{} takes no part", peer.title()))
    }

    /// What the whole system needs more per unit than it does without a proxy, in CPU seconds.
    pub(crate) fn added(&self, peer: Peer) -> Option<f64> {
        Some(self.contestant(peer)?.system()? - self.contestant(Peer::None)?.system()?)
    }
}

impl Contestant {
    /// The median over the rounds.
    pub(crate) fn median(&self, value: impl Fn(&Round) -> Option<f64>) -> Option<f64> {
        median(self.rounds.iter().filter_map(value))
    }

    pub(crate) fn spread(&self, value: impl Fn(&Round) -> Option<f64>) -> Option<f64> {
        spread(self.rounds.iter().filter_map(value))
    }

    pub(crate) fn per_second(&self) -> Option<f64> {
        self.median(|round| Some(round.load.per_second()))
    }

    /// CPU seconds per unit, of everything.
    pub(crate) fn system(&self) -> Option<f64> {
        self.median(|round| Some(round.load.used.system() / round.load.count))
    }

    /// CPU seconds per unit, of the proxies' processes.
    pub(crate) fn proxies(&self) -> Option<f64> {
        self.median(|round| Some(round.load.used.proxies / round.load.count))
    }
}

impl ScenarioRecord {
    /// Shares of all CPUs that others used and that the hypervisor took, the worst round of each.
    pub(crate) fn disturbance(&self, cpus: usize) -> (f64, f64) {
        let rounds = self
            .rows
            .iter()
            .flat_map(|row| &row.contestants)
            .flat_map(|one| &one.rounds);
        rounds.fold((0.0, 0.0), |(foreign, steal): (f64, f64), round| {
            let used = &round.load.used;
            let all = used.wall * cpus as f64;
            (foreign.max(used.foreign / all), steal.max(used.steal / all))
        })
    }

    /// How far the direct runs of a row lie apart, in the worst row.
    pub(crate) fn direct_spread(&self) -> Option<f64> {
        let spreads = self.rows.iter().filter_map(|row| {
            let direct = row.contestant(Peer::None)?;
            direct.spread(|round| Some(round.load.used.system() / round.load.count))
        });
        spreads.max_by(f64::total_cmp)
    }
}
