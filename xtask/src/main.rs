//! The project's automation, run as `cargo xtask COMMAND`; one file per command.

#[path = "../../mesh-agent/src/cli/args.rs"]
#[expect(unreachable_pub, reason = "it is a module of a library, for others")]
mod agent_args;
mod bench;
#[path = "../../tests/src/bin/bench/args.rs"]
#[expect(dead_code, reason = "what only the bench itself needs")]
mod bench_args;
mod build_ebpf;
mod ci;
mod cross;
mod demo;
mod dist;
#[expect(dead_code, reason = "what only the agent's build script needs")]
mod ebpf_toolchain;
mod kernels;
mod lint;
mod prerequisites;
mod setup;
mod shell;
mod test;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about, disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and testing need, saying so first; quick when it is all there.
    Setup(setup::Args),
    /// Build the agent with the eBPF object inside, and list what is in the object.
    BuildEbpf,
    /// Two nodes and a small shop on this machine: real traffic through the mesh, and what came of it.
    Demo(demo::Args),
    /// The agent and other proxies side by side: speed, CPU and memory.
    #[command(disable_help_flag = true)]
    Bench(bench::Args),
    /// Run the agent under load, for a quarter of an hour; `bench`, `dist` and `test` then build a faster one when told --trained.
    Train,
    /// Pack what users download: the agent and what belongs to it, for each architecture, with checksums.
    Dist(dist::Args),
    /// Check format, clippy for host and bpf target, dependencies, layers and budgets.
    Lint,
    /// Run every test, those too that need root, the kernel and network peers.
    Test(test::Args),
    /// Run the kernel tests on every kernel that we support, in QEMU, and show what each has and has not.
    Kernels(kernels::Args),
    /// What `.ci/run` runs: lint, then test.
    Ci,
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Setup(args) => setup::run(&args),
        Command::BuildEbpf => build_ebpf::run(),
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Train => train::run(),
        Command::Dist(args) => dist::run(&args),
        Command::Lint => lint::run(),
        Command::Test(args) => test::run(&args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Ci => ci::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
