//! Running programs to their end.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Runs a program and returns what it prints; a failure names the program and what it complained about.
pub fn output(command: &mut Command) -> Result<String> {
    let output = raw(command)?;
    if !output.status.success() {
        bail!(
            "{} ended with {}: {}{}",
            shown(command),
            output.status,
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout),
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program; how it ended is for the caller to judge.
pub fn raw(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", shown(command)))
}

/// `ip` with one command per line: one process instead of many.
pub fn ip(netns: &str, lines: &[String]) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(["-netns", netns, "-batch", "-"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(lines.join("\n").as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "ip in {netns} failed: {} in:\n{}",
            String::from_utf8_lossy(&output.stderr),
            lines.join("\n")
        );
    }
    Ok(())
}

fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
