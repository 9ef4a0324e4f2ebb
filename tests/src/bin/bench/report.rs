//! The results: for a person on stdout, for a program in a file.

use std::fmt::Write as _;
use std::fs;
use std::io::{Write as _, stdout};
use std::path::Path;

use anyhow::{Context, Result};

use crate::record::Record;
use crate::table;

/// What is measured, on what.
pub(crate) fn head(record: &Record) -> String {
    let machine = &record.machine;
    let mut text = format!(
        "\n{} × {}, Linux {}; {} rounds, {} s each; every proxy has one thread, nothing is pinned\n",
        machine.cpus, machine.cpu, machine.kernel, record.effort.rounds, record.effort.seconds,
    );
    for (peer, version) in &record.versions {
        let _infallible = writeln!(text, "  {:<11} {version}", peer.title());
    }
    for (peer, why) in &record.missing {
        let _infallible = writeln!(text, "  {:<11} MISSING: {why}", peer.title());
    }
    text.push('\n');
    text
}

pub(crate) fn print(record: &Record, output: &Path) -> Result<()> {
    let mut text = head(record);
    for scenario in &record.scenarios {
        text.push_str(&table::scenario(scenario, record.machine.cpus));
    }
    stdout().write_all(text.as_bytes())?;
    eprintln!("all rounds: {}", output.display());
    Ok(())
}

pub(crate) fn write(record: &Record, output: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(record)?;
    fs::write(output, text).with_context(|| format!("cannot write {}", output.display()))
}
