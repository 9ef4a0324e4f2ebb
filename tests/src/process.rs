//! A program that runs beside the test, and what it writes.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::{Run, until};

/// Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program of a run. Its output goes to a log of this name, after what is there already.
    pub fn spawn(run: &Run, name: &str, command: &mut Command) -> Result<Self> {
        let log = run.dir().join("logs").join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let child = run
            .adopt(command)
            // A group of its own: a server's workers are to end with it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything that it wrote so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map_or_else(
            |error| format!("(no log: {error})"),
            |log| String::from_utf8_lossy(&log).into_owned(),
        )
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    pub fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    pub fn wait(&mut self, most: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        until(&what, most, || self.child.try_wait().ok().flatten())
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        // Not once it was waited for: the number may be another's by then.
        if let (Ok(None), Ok(pid)) = (self.child.try_wait(), i32::try_from(self.child.id())) {
            let _ended = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _reaped = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
