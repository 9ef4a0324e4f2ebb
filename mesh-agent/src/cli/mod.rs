//! The command line: what users ask of an agent that runs, of their files, or of what an agent left behind.
//!
//! Invariants: every failure says what to do next; tables go to stdout and nothing else does, so that output can
//! be piped; text from an agent cannot steer the terminal.

mod age;
mod client;
mod doctor;
mod get;
mod status;
mod table;
#[cfg(test)]
mod tests;
pub mod validate;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};

use self::client::Client;
use self::doctor::DoctorArgs;
use self::validate::ValidateArgs;
use crate::admin::api;
pub use crate::doctor::explain;
use crate::ebpf;
use crate::ebpf::examine::{AgentFolder, AgentOwner};

const EXAMPLES: &str = "\
Examples:
  mesh-agent doctor                           whether this node can run the agent
  mesh-agent run --config agent.yaml          run the agent
  mesh-agent validate resources/              check documents without an agent
  mesh-agent status                           how the agent of this node is
  mesh-agent get services -n shop -o wide     what it knows
  mesh-agent get routes reviews -o yaml
  mesh-agent uninstall                        remove what an agent that is gone left in the kernel";

/// The node agent of a service mesh: eBPF capture, one shared L7 proxy.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version, about, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent until SIGTERM or SIGINT.
    Run {
        /// The agent's configuration; every field has a default.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Check whether this node can run the agent, without changing anything on it.
    Doctor(DoctorArgs),
    /// Check resources, and an agent configuration, without an agent.
    Validate(ValidateArgs),
    /// Show how a running agent is.
    Status {
        #[command(flatten)]
        output: Output,
    },
    /// List what a running agent knows.
    Get {
        kind: Kind,
        /// Only this one.
        name: Option<String>,
        /// Only in this namespace; all of them without it.
        #[arg(short, long)]
        namespace: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Remove every program, map and link that an agent that is gone left in the kernel.
    Uninstall {
        /// The folder of its pins, as in its configuration.
        #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/mesh-agent")]
        bpffs: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct Output {
    /// How to show it.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    /// The agent's admin address.
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "MESH_AGENT_ADMIN",
        default_value = "127.0.0.1:15000"
    )]
    admin: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    /// With more columns.
    Wide,
    Json,
    Yaml,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    #[value(alias = "workload", alias = "wl")]
    Workloads,
    #[value(alias = "service", alias = "svc")]
    Services,
    #[value(alias = "route")]
    Routes,
    #[value(alias = "policy")]
    Policies,
    #[value(alias = "certificate", alias = "certs")]
    Certificates,
    #[value(alias = "connection", alias = "conns")]
    Connections,
    Ebpf,
}

/// Runs any command but `run`, which is not a user's question.
pub fn execute(command: Command) -> anyhow::Result<ExitCode> {
    let mut stdout = io::stdout().lock();
    match command {
        Command::Run { .. } => anyhow::bail!("`run` is not one of the commands that ask"),
        Command::Doctor(args) => return doctor::run(&args, &mut stdout),
        Command::Validate(args) => return Ok(validate::run(&args, &mut stdout)?),
        Command::Status { output } => show_status(&output, &mut stdout)?,
        Command::Get {
            kind,
            name,
            namespace,
            output,
        } => {
            let wanted = get::Wanted {
                kind,
                name,
                namespace,
            };
            get::run(&wanted, &output, &mut stdout)?;
        }
        Command::Uninstall { bpffs } => uninstall(&bpffs, &mut stdout)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn show_status(output: &Output, out: &mut impl Write) -> anyhow::Result<()> {
    let body = Client::new(&output.admin).get("/api/v1/status")?;
    let status: api::Status = client::parse(&body)?;
    match output.output {
        Format::Json => out.write_all(&body)?,
        Format::Yaml => out.write_all(yaml(&status)?.as_bytes())?,
        Format::Table | Format::Wide => {
            out.write_all(status::render(&status, SystemTime::now()).as_bytes())?
        }
    }
    Ok(())
}

fn uninstall(bpffs: &Path, out: &mut impl Write) -> anyhow::Result<()> {
    let removed = ebpf::uninstall(bpffs).with_context(|| format!("cannot uninstall {}", bpffs.display()))?;
    if removed.is_empty() {
        writeln!(
            out,
            "Nothing to remove: no agent left anything at {}.",
            bpffs.display()
        )?;
        // It may have been meant for another.
        for folder in ebpf::examine::agents().unwrap_or_default() {
            writeln!(out, "{}", with_pins(&folder))?;
        }
    }
    for path in removed {
        writeln!(out, "removed {}", path.display())?;
    }
    Ok(())
}

fn with_pins(folder: &AgentFolder) -> String {
    let path = folder.path.display();
    match folder.owner {
        AgentOwner::Nobody => {
            format!(
                "{path} has pins of an agent that is gone: `mesh-agent uninstall --bpffs {path}` removes them"
            )
        }
        AgentOwner::Process(process) => format!("{path} has pins of an agent that runs (process {process})"),
        AgentOwner::Hidden => format!("{path} has pins of an agent that runs"),
    }
}

fn yaml(value: &impl serde::Serialize) -> anyhow::Result<String> {
    let text = serde_saphyr::to_string(value)?;
    Ok(if text.ends_with('\n') { text } else { text + "\n" })
}
