//! Minutes under load, one row: whether memory stays what it is and every request is answered.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::cpu;
use crate::generator::Requests;
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
/// Between two looks at the memory.
const LOOK_EVERY: Duration = Duration::from_secs(1);
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
    let (over, ended) = sync_channel::<()>(0);
    let (paced, memory) = thread::scope(|scope| {
        let watcher = scope.spawn(move || -> Result<Vec<f64>> {
            let mut memory = Vec::new();
            while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                memory.push((cpu::rss(agents[0])? + cpu::rss(agents[1])?) as f64);
            }
            Ok(memory)
        });
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a count per second, and finite"
        )]
        let paced = requests.pace(rate as u64, seconds);
        drop(over);
        let memory = watcher
            .join()
            .map_err(|_| anyhow!("the memory's watcher panicked"));
        (paced, memory)
    });
    let (paced, memory) = (paced?, memory??);
    let tenth = |number: usize| {
        let length = memory.len() / TENTHS;
        let seen = memory.iter().skip(length * number).take(length);
        median(seen.copied()).context("too short to see anything")
    };
    let growth = (tenth(TENTHS - 1)? / tenth(1)? - 1.0) * 100.0;
    figures.extend([
        figure("requests answered", "", paced.answers as f64, None),
        figure("requests failed", "", paced.failed as f64, Some(0.0)),
        figure(
            "requests that the generator came too late for",
            "",
            paced.unsent as f64,
            None,
        ),
        figure("p99.9", "ms", paced.p999 / 1e3, None),
        figure(
            "memory of both agents at the end",
            "MB",
            tenth(TENTHS - 1)? / 1e6,
            None,
        ),
        figure("growth of it since the second tenth", "%", growth, Some(3.0)),
    ]);
    Ok(())
}

fn figure(what: &str, unit: &'static str, value: f64, target: Option<f64>) -> Figure {
    let mut figure = Figure::new(what, unit, target);
    figure.values.push(value);
    figure
}
