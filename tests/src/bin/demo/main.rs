//! `cargo xtask demo`: a small shop on two "nodes" of this machine, before and in the mesh.
//!
//! Five pods run and talk in clear; then the agents start, and the same pods, not restarted, talk through them.
//! What is shown is what was measured: a check that fails makes the demo fail. `--keep` leaves it running.

mod progress;
mod scenes;
mod shop;
mod summary;

use std::process::ExitCode;
use std::thread;

use anyhow::{Result, bail};
use mesh_tests::{Interrupt, Mesh, Options};

use progress::Progress;
use shop::Shop;

/// One demo at a time, so that its things have names that are easily typed.
const NAME: &str = "demo";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let keep = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [option] if option == "--keep" => true,
        _ => bail!("usage: demo [--keep]"),
    };
    let options = Options {
        name: Some(NAME.to_owned()),
        agents: false,
        // As users run it.
        config: String::new(),
        ..Options::default()
    };
    let mut mesh = Mesh::start(&options)?;
    let interrupt = Interrupt::clean_up(&mesh.run)?;
    let outcome = show(&mut mesh, &options, keep);
    interrupt.check();
    if outcome.is_err() {
        for agent in &mesh.agents {
            eprintln!(
                "---- the end of the log of {}:\n{}----",
                agent.node,
                tail(&agent.log())
            );
        }
    }
    outcome
}

/// Shows everything; true when all of it was as it should be.
fn show(mesh: &mut Mesh, options: &Options, keep: bool) -> Result<bool> {
    let mut progress = Progress::default();
    let mut shop = progress.step("two nodes, five pods, no mesh yet", || Shop::open(mesh))?;
    let before = progress.step("traffic in clear", || scenes::before(mesh, &shop))?;
    progress.step("start an agent on each node; the pods go on as they are", || {
        mesh.start_agents(options)?;
        shop.join(mesh)
    })?;
    let now = progress.step("the same traffic, through the agents", || {
        scenes::now(mesh, &shop)
    })?;
    let killed = progress.step("kill -9 one of two pods under load", || {
        scenes::killed(mesh, &mut shop)
    })?;
    let good = summary::print(mesh, &shop, &summary::Findings { before, now, killed })?;
    if keep {
        summary::print_commands(mesh)?;
        loop {
            // The interrupt's thread ends the process.
            thread::park();
        }
    }
    Ok(good)
}

fn tail(log: &str) -> String {
    /// Enough to see what went wrong.
    const LINES: usize = 30;
    let lines: Vec<&str> = log.lines().collect();
    let from = lines.len().saturating_sub(LINES);
    lines[from..].iter().map(|line| format!("{line}\n")).collect()
}
