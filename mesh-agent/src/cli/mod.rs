//! The command line: what users ask of an agent that runs, of their files, or of what an agent left behind.
//!
//! Invariants: every failure says what to do next; tables go to stdout and nothing else does, so that output can
//! be piped; text from an agent cannot steer the terminal.

mod age;
pub mod args;
mod client;
mod doctor;
mod get;
mod status;
mod table;
#[cfg(test)]
mod tests;
pub mod validate;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context;

pub use self::args::{Cli, Command};
use self::args::{Format, Kind, Output};
use self::client::Client;
use crate::admin::api;
pub use crate::doctor::explain;
use crate::ebpf;
use crate::ebpf::examine::{AgentFolder, AgentOwner};

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
        Command::Completions { shell } => stdout.write_all(&args::completions(shell))?,
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
