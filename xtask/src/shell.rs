//! What all commands share: where things are, running programs, and telling the user how it goes.

#![expect(
    clippy::disallowed_types,
    reason = "wall-clock progress of a program without a tokio runtime"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The workspace's folder.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or_else(|| Path::new("."))
}

/// Cargo's target folder, wherever the user or `.ci/run` put it.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |dir| workspace().join(dir))
}

/// The cargo that runs us, in the workspace.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(subcommand).current_dir(workspace());
    command
}

/// The first file called `name` where programs are; the folders of root's too, which `su` leaves out.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// Runs a program whose output the user sees; a failure is an error that names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", shown(command));
    }
    Ok(())
}

/// Runs a program and returns what it prints; its messages still reach the user.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    if !output.status.success() {
        bail!("{} ended with {}", shown(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} prints no UTF-8", shown(command)))
}

/// A command line as one would type it, without paths and quotes that only disturb the reader.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program())
        .file_name()
        .unwrap_or_else(|| command.get_program());
    std::iter::once(program)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The named steps of one command, each shown as it starts, and timed.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    done: Vec<(String, Duration)>,
    failed: Vec<String>,
}

impl Steps {
    /// A command of its own: says in the end, however that is, what its steps took.
    pub(crate) fn timed(run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let mut steps = Self::default();
        let outcome = run(&mut steps);
        steps.print_times();
        outcome
    }

    /// Runs one step; the next ones make no sense without it.
    pub(crate) fn run<T>(&mut self, title: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("==> {title}");
        let started = Instant::now();
        let result = step();
        let took = started.elapsed();
        let outcome = if result.is_ok() { "done" } else { "FAILED" };
        eprintln!("==> {title}: {outcome} in {:.1} s", took.as_secs_f64());
        self.done.push((title.to_owned(), took));
        result
    }

    /// Runs one step of which the next ones are independent; [`Steps::finish`] reports its failure.
    pub(crate) fn try_run(&mut self, title: &str, step: impl FnOnce() -> Result<()>) {
        if let Err(error) = self.run(title, step) {
            eprintln!("{error:#}");
            self.failed.push(title.to_owned());
        }
    }

    /// An error that names every failed step, if there is one.
    pub(crate) fn finish(&self) -> Result<()> {
        if !self.failed.is_empty() {
            bail!("failed: {}", self.failed.join(", "));
        }
        Ok(())
    }

    /// One line per step with the time it took.
    pub(crate) fn print_times(&self) {
        for (title, took) in &self.done {
            eprintln!("{:>8.1} s  {title}", took.as_secs_f64());
        }
    }
}
