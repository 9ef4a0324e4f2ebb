//! `cargo xtask bench`: the agent and its peers side by side, in real network namespaces of this machine.
//!
//! A scenario is a list of rows; a turn starts one contestant and measures all rows with it; a round gives every
//! contestant one turn. So the contestants alternate, and what the machine does meanwhile hits all of them alike.
//! Figures are medians over the rounds. How it measures and what the columns mean: `mesh-agent/benches/README.md`.

mod args;
mod authority;
mod bare;
mod churn;
mod contest;
mod cpu;
mod crowd;
mod envoy;
mod generator;
mod idle;
mod peer;
mod profile;
mod progress;
mod proxies;
mod record;
mod report;
mod scenario;
mod soak;
mod stats;
mod table;
mod targets;
mod world;
mod ztunnel;

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use mesh_agent::tls;
use mesh_tests::Interrupt;

use args::Args;
use contest::Contest;
use peer::Peers;
use record::{Machine, Record};
use world::World;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let scenarios = scenario::chosen(&args.scenarios);
    if args.kernel_tls {
        tls::probe_kernel().context("--kernel-tls")?;
    }
    let peers = Peers::find(args);
    let mut record = Record::new(args, Machine::read()?, &peers);
    eprint!("{}", report::head(&record));
    let mut world = World::start(args.kernel_tls)?;
    let interrupt = Interrupt::clean_up(&world.mesh.run)?;
    for scenario in scenarios {
        let outcome = Contest::new(scenario, &peers, args).run(&mut world);
        interrupt.check();
        record.scenarios.push(outcome?);
        // After each: a run that is broken off leaves what it has.
        report::write(&record, &args.output)?;
    }
    drop(world);
    report::print(&record, &args.output)?;
    let problems: usize = record
        .scenarios
        .iter()
        .map(|scenario| scenario.problems.len())
        .sum();
    ensure!(problems == 0, "{problems} measurements failed: see above");
    Ok(())
}
