//! Minutes under load, one row: whether memory stays what it is and every request is answered.
//!
//! The rate is fixed at the start. When others take the fifth of the machine that is left, requests queue up until they
//! stop (ten seconds of two busy loops: a p99.9 of four seconds), so each second's CPUs are looked at too.

use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::unistd::Pid;

use crate::cpu::{self, CpuTimes};
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
/// A second in which less than this share of the CPUs was idle is one without reserve. Chosen, not measured.
const SPARE: f64 = 0.02;
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
    figures.extend(report(&paced?, &looks??)?);
    Ok(())
}

/// What one second was like.
struct Look {
    /// Bytes of both agents.
    memory: f64,
    /// Shares of all CPUs' time; what waits for a disk is idle.
    idle: f64,
    steal: f64,
}

/// A look each second, until nobody is left who could say that it is over.
fn watch(agents: [Pid; 2], ended: &Receiver<()>) -> Result<Vec<Look>> {
    let mut looks = Vec::new();
    let mut before = CpuTimes::read()?;
    while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        let now = CpuTimes::read()?;
        let second = now.since(&before);
        before = now;
        looks.push(Look {
            memory: (cpu::rss(agents[0])? + cpu::rss(agents[1])?) as f64,
            idle: second.idle / second.total(),
            steal: second.steal / second.total(),
        });
    }
    Ok(looks)
}

fn report(paced: &Paced, looks: &[Look]) -> Result<Vec<Figure>> {
    let tenth = |number: usize| {
        let length = looks.len() / TENTHS;
        let seen = looks.iter().skip(length * number).take(length);
        median(seen.map(|look| look.memory)).context("too short to see anything")
    };
    let growth = (tenth(TENTHS - 1)? / tenth(1)? - 1.0) * 100.0;
    let in_use = median(looks.iter().map(|look| 1.0 - look.idle)).context("nothing was seen")?;
    let full = looks.iter().filter(|look| look.idle < SPARE).count();
    let steal = looks.iter().map(|look| look.steal).fold(0.0, f64::max);
    Ok(vec![
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
            "CPUs that were not idle, for whomever, median of seconds",
            "%",
            in_use * 100.0,
            None,
        ),
        figure("seconds in which none was", "", full as f64, None),
        figure(
            "most that the hypervisor took of them in a second",
            "%",
            steal * 100.0,
            None,
        ),
        figure(
            "memory of both agents at the end",
            "MB",
            tenth(TENTHS - 1)? / 1e6,
            None,
        ),
        figure("growth of it since the second tenth", "%", growth, Some(3.0)),
    ])
}

fn figure(what: &str, unit: &'static str, value: f64, target: Option<f64>) -> Figure {
    let mut figure = Figure::new(what, unit, target);
    figure.values.push(value);
    figure
}
