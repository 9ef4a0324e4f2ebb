//! What can be typed: every command and option, and the scripts with which a shell completes them.
//!
//! `cargo xtask dist` includes this file: it writes the scripts of an agent that this machine may not be able to
//! run. So it uses nothing but clap, its completions and `std`.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

const EXAMPLES: &str = "\
Examples:
  mesh-agent doctor                           whether this node can run the agent
  mesh-agent run --config agent.yaml          run the agent
  mesh-agent validate resources/              check documents without an agent
  mesh-agent status                           how the agent of this node is
  mesh-agent get services -n shop -o wide     what it knows
  mesh-agent get routes reviews -o yaml
  mesh-agent uninstall                        remove what an agent that is gone left in the kernel";

const COMPLETIONS: &str = "\
Where it belongs:
  mesh-agent completions bash > /usr/share/bash-completion/completions/mesh-agent
  mesh-agent completions zsh > /usr/share/zsh/vendor-completions/_mesh-agent
  mesh-agent completions fish > /usr/share/fish/vendor_completions.d/mesh-agent.fish";

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
    /// Print the script with which a shell completes this command line.
    #[command(after_help = COMPLETIONS)]
    Completions { shell: Shell },
}

/// Check whether this node can run the agent, without changing anything on it.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The agent's configuration, as for `run`; every field has a default.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How to show it.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Shape,
}

/// How to show what has no more columns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    #[default]
    Table,
    Json,
    Yaml,
}

/// Check resources, and an agent configuration, without an agent.
#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// Files and folders of resources.
    #[arg(required_unless_present = "config", value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// An agent configuration; without FILEs the resources that it names are checked too.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Warnings are errors.
    #[arg(long)]
    pub strict: bool,
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Report,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Report {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Args)]
pub struct Output {
    /// How to show it.
    #[arg(short, long, value_enum, default_value = "table")]
    pub output: Format,
    /// The agent's admin address.
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "MESH_AGENT_ADMIN",
        default_value = "127.0.0.1:15000"
    )]
    pub admin: String,
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

/// The script with which a shell completes the command line.
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "mesh-agent", &mut script);
    script
}
