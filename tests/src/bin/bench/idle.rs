//! What the agent holds when nothing happens: with nothing, with pods, with open connections, with a large mesh.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_tests::{Pod, PodSpec, Process, until_ok};
use nix::unistd::Pid;

use crate::cpu;
use crate::crowd::{self, Crowd};
use crate::proxies::{launch_agents, start_agents, stop_agents};
use crate::record::Figure;
use crate::scenario::{Door, Place};
use crate::world::{self, World};

const PODS: usize = 100;
const CONNECTIONS: u32 = 10_000;
/// More rounds tell no more: memory hardly varies.
const MOST_ROUNDS: usize = 3;
const MB: f64 = 1e6;
const KB: f64 = 1e3;

pub(crate) fn run(world: &mut World, rounds: usize, figures: &mut Vec<Figure>) -> Result<()> {
    let rounds = rounds.min(MOST_ROUNDS);
    world.withdraw()?;
    let bare = resident(world, rounds, "memory without any documents", None, |_| Ok(()));
    let pods = with_pods(world, rounds);
    world.announce()?;
    figures.extend([bare?, pods?]);
    for (protocol, door, target) in [("TCP", Door::Tcp, 8.0), ("HTTP", Door::Http, 24.0)] {
        figures.extend(connections(world, rounds, (protocol, door), target)?);
    }
    let _crowd = Crowd::write(world)?;
    let what = format!(
        "memory with {} services, {} endpoints",
        crowd::SERVICES,
        crowd::ENDPOINTS
    );
    figures.push(resident(world, rounds, &what, Some(100.0), Crowd::wait_known)?);
    Ok(())
}

/// The first node's agent, once `ready`.
fn resident(
    world: &mut World,
    rounds: usize,
    what: &str,
    target: Option<f64>,
    ready: fn(&World) -> Result<()>,
) -> Result<Figure> {
    let mut figure = Figure::new(what, "MB", target);
    for _ in 0..rounds {
        eprintln!("    {what}");
        launch_agents(world)?;
        let measured = ready(world).and_then(|()| settled(agent(world, 0)?));
        stop_agents(world)?;
        figure.values.push(measured? / MB);
    }
    Ok(figure)
}

fn with_pods(world: &mut World, rounds: usize) -> Result<Figure> {
    let pods = (0..PODS)
        .map(|number| world.mesh.pod(PodSpec::new(&format!("idle-{number}"), 0)))
        .collect::<Result<Vec<Pod>>>()?;
    let what = format!("memory with {PODS} pods");
    let figure = resident(world, rounds, &what, Some(15.0), |world| {
        let agent = world.mesh.agents.first().context("no agent")?;
        until_ok("the pods to be enrolled", Duration::from_secs(60), || {
            let counts = &agent.get("/api/v1/status")?["counts"];
            if counts["localWorkloads"] != PODS || counts["pendingWorkloads"] != 0 {
                bail!("{counts}");
            }
            Ok(())
        })
    });
    for pod in &pods {
        world.mesh.withdraw(pod)?;
    }
    figure
}

/// What each idle connection costs the agents at both ends.
fn connections(
    world: &mut World,
    rounds: usize,
    (protocol, door): (&str, Door),
    target: f64,
) -> Result<[Figure; 2]> {
    let mut figures = ["client's", "server's"].map(|end| {
        let what = format!("memory per idle {protocol} connection, the {end} node");
        Figure::new(&what, "KB", Some(target))
    });
    for _ in 0..rounds {
        eprintln!("    {CONNECTIONS} idle {protocol} connections");
        start_agents(world)?;
        let held = hold(world, door);
        stop_agents(world)?;
        for (figure, bytes) in figures.iter_mut().zip(held?) {
            figure.values.push(bytes / KB);
        }
    }
    Ok(figures)
}

fn hold(world: &mut World, door: Door) -> Result<[f64; 2]> {
    let agents = [agent(world, 0)?, agent(world, 1)?];
    let before = [settled(agents[0])?, settled(agents[1])?];
    let mut command = world.meshed.client.peer_command();
    command.args([
        "hold",
        &format!("http://{}/100", world::service(Place::OtherNode, door)?),
    ]);
    command.args(["--connections", &CONNECTIONS.to_string()]);
    let mut holder = Process::spawn(&world.mesh.run, "hold", &mut command)?;
    let open = until_ok("the connections to be open", Duration::from_secs(60), || {
        if let Some(status) = holder.has_ended()? {
            return Ok(Err(status));
        }
        anyhow::ensure!(
            holder.log().ends_with(&format!("holding {CONNECTIONS}\n")),
            "not yet"
        );
        Ok(Ok(()))
    });
    if let Err(status) = open? {
        bail!("the connections do not stay open: {status}: {}", holder.log());
    }
    let after = [settled(agents[0])?, settled(agents[1])?];
    Ok([0, 1].map(|end| (after[end] - before[end]) / f64::from(CONNECTIONS)))
}

pub(crate) fn agent(world: &mut World, node: usize) -> Result<Pid> {
    let agent = world.mesh.agents.get_mut(node).context("no agent")?;
    Ok(Pid::from_raw(i32::try_from(agent.process()?.id())?))
}

/// Bytes, once they hardly change any more.
fn settled(pid: Pid) -> Result<f64> {
    const EVERY: Duration = Duration::from_millis(250);
    // Six seconds: an agent gives back what its start needed after two, and looks for more every five (`memory`).
    const STILL: usize = 24;
    const MOST: usize = 120;
    let (mut last, mut still) = (0.0, 0);
    for _ in 0..MOST {
        let now = cpu::rss(pid)? as f64;
        still = if (now - last).abs() < 0.005 * now {
            still + 1
        } else {
            0
        };
        last = now;
        if still == STILL {
            break;
        }
        thread::sleep(EVERY);
    }
    Ok(last)
}
