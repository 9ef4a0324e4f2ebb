//! Minutes under load, one row: whether memory stays what it is and every request is answered.
//!
//! The rate is fixed at the start. When others take the fifth of the machine that is left, requests queue up until they
//! stop (ten seconds of two busy loops: a p99.9 of four seconds), so each second's CPUs are looked at too.

use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::unistd::Pid;

use crate::cpu::{self, CpuTimes, Watched};
use crate::generator::{Paced, Requests};
use crate::idle::agent;
use crate::proxies::{start_agents, stop_agents};
use crate::record::Figure;
use crate::scenario::{Door, Place};
use crate::stats::median;
use crate::world::{self, World};

/// Of what goes at most.
const LOAD: f64 = 0.8;
const SATURATION_SECONDS: u64 = 5;
const CONNECTIONS: usize = 32;
/// Between two looks at memory and CPUs.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// In % of the CPUs: with less idle a second is one without reserve. (While a program of others made requests queue
/// up, seconds had up to 3 % idle.)
const FULL: f64 = 5.0;
/// The first tenth warms up, the second is what the last one is held against.
const TENTHS: usize = 10;

pub(crate) fn run(world: &mut World, seconds: u64, figures: &mut Vec<Figure>) -> Result<()> {
    start_agents(world)?;
    let measured = soak(world, seconds, figures);
    stop_agents(world)?;
    measured
}

fn soak(world: &mut World, seconds: u64, figures: &mut Vec<Figure>) -> Result<()> {
    let agents = [agent(world, 0)?, agent(world, 1)?];
    let requests = Requests {
        client: &world.meshed.client,
        address: world::service(Place::OtherNode, Door::Http)?,
        door: Door::Http,
        bytes: 100,
        connections: CONNECTIONS,
        folder: world.mesh.run.dir(),
    };
    requests.warm_up()?;
    let most = requests.saturate(SATURATION_SECONDS)?;
    let rate = (most as f64 / SATURATION_SECONDS as f64 * LOAD).round();
    eprintln!("    {rate} requests/s for {seconds} s");
    let watched = Watched {
        servers: world.meshed.server_processes(Place::OtherNode)?,
        proxies: agents.to_vec(),
    };
    let before = watched.read()?;
    let (over, ended) = sync_channel::<()>(0);
    let (paced, looks) = thread::scope(|scope| {
        let watcher = scope.spawn(move || watch(agents, &ended));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a count per second, and finite"
        )]
        let paced = requests.pace(rate as u64, seconds);
        drop(over);
        let looks = watcher.join().map_err(|_| anyhow!("the watcher panicked"));
        (paced, looks)
    });
    let paced = paced?;
    // Whatever fails after it, or failed in it: this is what was seen.
    figures.extend(of_requests(&paced));
    figures.extend(of_looks(&looks??)?);
    let cpus = thread::available_parallelism()?.get() as f64;
    let used = watched.since(&before)?;
    figures.push(figure(
        "CPU that others used",
        "%",
        used.foreign / used.wall / cpus * 100.0,
        None,
    ));
    paced.ensure_all_good()
}

/// What it was like since the look before.
#[derive(Clone, Copy)]
struct Look {
    /// Bytes of both agents.
    memory: f64,
    cpus: CpuTimes,
}

/// A look about each second, until nobody is left who could say that it is over.
fn watch(agents: [Pid; 2], ended: &Receiver<()>) -> Result<Vec<Look>> {
    let mut looks = Vec::new();
    let mut before = CpuTimes::read()?;
    while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        let now = CpuTimes::read()?;
        looks.push(Look {
            memory: (cpu::rss(agents[0])? + cpu::rss(agents[1])?) as f64,
            cpus: now.since(&before),
        });
        before = now;
    }
    Ok(looks)
}

fn of_looks(looks: &[Look]) -> Result<Vec<Figure>> {
    let tenth = |number: usize| {
        let length = looks.len() / TENTHS;
        let seen = looks.iter().skip(length * number).take(length);
        median(seen.map(|look| look.memory)).context("too short to see anything")
    };
    let growth = (tenth(TENTHS - 1)? / tenth(1)? - 1.0) * 100.0;
    let share = |part: fn(&CpuTimes) -> f64| {
        let shares = looks.iter().map(move |look| part(&look.cpus) / look.cpus.total());
        shares.map(|share| share * 100.0)
    };
    let full = share(|cpus| cpus.idle).filter(|idle| *idle < FULL).count();
    Ok(vec![
        figure(
            "memory of both agents at the end",
            "MB",
            tenth(TENTHS - 1)? / 1e6,
            None,
        ),
        figure("growth of it since the second tenth", "%", growth, Some(3.0)),
        figure(
            "CPU in use, by whomever, median of seconds",
            "%",
            median(share(|cpus| cpus.total() - cpus.idle)).context("nothing was seen")?,
            None,
        ),
        figure(
            &format!("seconds with less than {FULL} % of the CPUs idle"),
            "%",
            full as f64 * 100.0 / looks.len() as f64,
            None,
        ),
        figure(
            "most CPU that the hypervisor took in a second",
            "%",
            share(|cpus| cpus.steal).fold(0.0, f64::max),
            None,
        ),
    ])
}

fn of_requests(paced: &Paced) -> [Figure; 4] {
    [
        figure("requests answered", "", paced.answers as f64, None),
        figure("requests failed", "", paced.failed as f64, Some(0.0)),
        figure(
            "requests that the generator came too late for",
            "",
            paced.unsent as f64,
            None,
        ),
        figure("p99.9", "ms", paced.p999 / 1e3, None),
    ]
}

fn figure(what: &str, unit: &'static str, value: f64, target: Option<f64>) -> Figure {
    let mut figure = Figure::new(what, unit, target);
    figure.values.push(value);
    figure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_and_stolen_seconds_and_growth_are_seen() {
        let look = |memory: f64, idle: f64, steal: f64| Look {
            memory,
            cpus: CpuTimes {
                busy: 2.0 - idle - steal,
                interrupts: 0.0,
                idle,
                steal,
            },
        };
        let mut looks = vec![look(100.0, 0.5, 0.0); 16];
        looks.extend([
            look(100.0, 0.03, 0.0),
            look(100.0, 0.0, 0.4),
            look(110.0, 0.5, 0.0),
            look(110.0, 0.5, 0.0),
        ]);
        let figures = of_looks(&looks).unwrap();
        let value = |part: &str| {
            let figure = figures.iter().find(|figure| figure.what.contains(part));
            figure.unwrap().values[0].round()
        };
        assert_eq!(
            ["growth", "in use", "less than 5 %", "hypervisor"].map(value),
            [10.0, 75.0, 10.0, 20.0]
        );
        assert!(of_looks(&looks[..5]).is_err());
    }
}
