//! One scenario: rounds of turns, and what came of them.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::args::{Args, Effort, Name, Peer};
use crate::churn;
use crate::generator::Generator;
use crate::idle;
use crate::peer::Peers;
use crate::profile;
use crate::progress::Progress;
use crate::proxies::Running;
use crate::record::{Contestant, Load, Round, RowRecord, ScenarioRecord};
use crate::scenario::{Door, Scenario, Unit};
use crate::soak;
use crate::targets;
use crate::world::World;

/// Of what the slowest can do, for the latencies at a fixed rate: all are well within what they can do.
const PACE: f64 = 0.5;

pub(crate) struct Contest<'a> {
    scenario: Scenario,
    peers: &'a Peers,
    effort: Effort,
    /// Where flame graphs go, if they are wanted.
    profiles: Option<PathBuf>,
}

impl<'a> Contest<'a> {
    pub(crate) fn new(scenario: Scenario, peers: &'a Peers, args: &Args) -> Self {
        Self {
            scenario,
            peers,
            effort: args.effort(),
            profiles: args.profile.then(|| args.output.with_extension("profiles")),
        }
    }

    pub(crate) fn run(&self, world: &mut World) -> Result<ScenarioRecord> {
        let mut line_up = self.scenario.peers.to_vec();
        line_up.retain(|peer| self.peers.has(*peer));
        let mut record = self.blank(&line_up);
        let alone = match self.scenario.name {
            Name::Idle => Some(idle::run(world, self.effort.rounds, &mut record.figures)),
            Name::Churn => Some(churn::run(world, &mut record.figures)),
            Name::Soak => Some(soak::run(world, self.effort.soak_seconds, &mut record.figures)),
            _ => None,
        };
        if let Some(outcome) = alone {
            // What was measured before counts.
            record
                .problems
                .extend(outcome.err().map(|error| format!("{error:#}")));
            record.verdicts = targets::judge(&record);
            return Ok(record);
        }
        let turns = self.effort.rounds * line_up.len();
        let mut progress = Progress::new(self.scenario.name, turns * self.scenario.rows.len());
        for round in 1..=self.effort.rounds {
            for peer in line_up.clone() {
                progress.turn(round, peer);
                if let Err(error) = self.turn(world, peer, &mut record, &mut progress) {
                    let problem = format!("{}, round {round}: {error:#}", peer.title());
                    progress.failed(&problem);
                    record.problems.push(problem);
                }
            }
            set_rates(&mut record.rows);
            // Nobody always comes after the same one.
            line_up.rotate_left(1);
        }
        record.verdicts = targets::judge(&record);
        Ok(record)
    }

    fn blank(&self, line_up: &[Peer]) -> ScenarioRecord {
        let contestant = |peer: &Peer| Contestant {
            peer: *peer,
            rounds: Vec::new(),
        };
        let rows = self.scenario.rows.iter().map(|row| RowRecord {
            label: row.label.clone(),
            work: row.work,
            rate: None,
            contestants: line_up.iter().map(contestant).collect(),
        });
        ScenarioRecord {
            name: self.scenario.name,
            title: self.scenario.title,
            rows: rows.collect(),
            figures: Vec::new(),
            verdicts: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// One contestant, all rows.
    fn turn(
        &self,
        world: &mut World,
        peer: Peer,
        record: &mut ScenarioRecord,
        progress: &mut Progress,
    ) -> Result<()> {
        let running = Running::start(peer, self.scenario.place, world, self.peers)
            .with_context(|| format!("cannot start {}", peer.title()));
        let outcome = running.and_then(|running| {
            for row in &mut record.rows {
                progress.row(&row.label);
                match self.measure(world, &running, row) {
                    Ok(round) => {
                        progress.done(round.load.per_second());
                        row.contestant_mut(peer)?.rounds.push(round);
                    }
                    // The other rows may well work.
                    Err(error) => {
                        let problem = format!("{}: {}: {error:#}", peer.title(), row.label);
                        progress.failed(&problem);
                        if !record.problems.contains(&problem) {
                            record.problems.push(problem);
                        }
                    }
                }
            }
            running.stop()
        });
        crate::proxies::stop_agents(world)?;
        outcome
    }

    fn measure(&self, world: &World, running: &Running, row: &RowRecord) -> Result<Round> {
        let seconds = self.effort.seconds;
        let generator = running.generator(world, row.work)?;
        if let Generator::Requests(requests) = &generator
            && requests.door == Door::Routed
            && running.peer.routes()
        {
            requests.check()?;
        }
        generator.warm_up()?;
        let before = running.watched.read()?;
        let count = generator.saturate(seconds)?;
        let used = running.watched.since(&before)?;
        if let Some(folder) = &self.profiles
            && row
                .contestant(running.peer)
                .is_some_and(|one| one.rounds.is_empty())
        {
            let title = format!("{}, {}", self.scenario.name, row.label);
            let work = |seconds| generator.saturate(seconds).map(|_count| ());
            profile::record(&running.agents, folder, &title, work)?;
        }
        let (paced, paced_used) = match (&generator, row.rate) {
            (Generator::Requests(requests), Some(rate)) => {
                let before = running.watched.read()?;
                let paced = requests.pace(rate, seconds)?;
                paced.ensure_all_good()?;
                (Some(paced), Some(running.watched.since(&before)?))
            }
            _ => (None, None),
        };
        Ok(Round {
            load: Load { count, used },
            paced,
            paced_used,
            peak_rss: running.peak_rss()?,
        })
    }
}

/// Half of what the slowest does, for the rounds to come; the first round finds it out.
fn set_rates(rows: &mut [RowRecord]) {
    let unset = |row: &&mut RowRecord| row.rate.is_none() && row.work.unit() == Unit::Request;
    for row in rows.iter_mut().filter(unset) {
        let speeds = row.contestants.iter().filter_map(Contestant::per_second);
        let slowest = speeds.min_by(f64::total_cmp);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a count per second, and finite"
        )]
        let rate = slowest.map(|slowest| (slowest * PACE) as u64);
        row.rate = rate.filter(|rate| *rate > 0);
    }
}
