//! A kernel in QEMU, from its start to its end, line by line.
//!
//! Invariant: a guest ends, whatever its kernel does; one that hangs is killed.

#![expect(
    clippy::disallowed_types,
    reason = "wall-clock limits of a program without a tokio runtime"
)]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cross::Arch;

/// A guest that says nothing for so long hangs: no test takes that long, and each says when it is done.
const SILENCE: Duration = Duration::from_secs(180);
/// What a program may take to end after its last word, and how often that is looked at.
const CLOSING: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);
/// Lines that may wait to be read.
const QUEUE: usize = 1024;
/// Each agent takes some 40 MB, and the root file system lies in memory.
const MEMORY: &str = "1536";

/// What is booted.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    pub(super) arch: Arch,
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    /// Emulated processors.
    pub(super) processors: usize,
    /// What it may take in all.
    pub(super) limit: Duration,
}

impl Guest<'_> {
    /// Boots it and hands over each line of its console until it ends.
    pub(super) fn run(&self, line: impl FnMut(&str)) -> Result<()> {
        let mut command = self.command();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run QEMU")?;
        let lines = lines_of(&mut child)?;
        let outcome = read(&lines, self.limit, SILENCE, line);
        let status = end(&mut child, outcome)?;
        if !status.success() {
            bail!("QEMU ended with {status}");
        }
        Ok(())
    }

    fn command(&self) -> Command {
        let (program, machine, processor, console) = match self.arch {
            Arch::X86_64 => ("qemu-system-x86_64", "q35", "max", "ttyS0"),
            // The architecture's own way to authenticate pointers is what emulation spends most of its time with.
            Arch::Arm64 => ("qemu-system-aarch64", "virt", "max,pauth-impdef=on", "ttyAMA0"),
        };
        // It ends with us, however we end.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", program])
            .args(["-machine", machine, "-cpu", processor, "-m", MEMORY])
            .args(["-accel", "tcg,thread=multi", "-smp", &self.processors.to_string()])
            .args(["-display", "none", "-monitor", "none", "-serial", "stdio"])
            .args(["-nic", "none", "-no-reboot", "-kernel"])
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .arg("-append")
            // A kernel that panics reboots at once, and with that QEMU ends.
            .arg(format!(
                "console={console} quiet panic=-1 oops=panic mitigations=off"
            ));
        command
    }
}

/// Reads in a thread of its own, so that waiting for a line can be bounded.
fn lines_of(child: &mut Child) -> Result<Receiver<String>> {
    let stdout = child.stdout.take().context("no console")?;
    let (sender, receiver) = sync_channel(QUEUE);
    thread::spawn(move || {
        let mut console = BufReader::new(stdout);
        let mut line = Vec::new();
        // A console may carry anything, so no `lines`, which ends at what is no UTF-8.
        while console
            .read_until(b'\n', &mut line)
            .is_ok_and(|length| length > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    Ok(receiver)
}

fn read(
    lines: &Receiver<String>,
    limit: Duration,
    silence: Duration,
    mut line: impl FnMut(&str),
) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("not done after {} s", limit.as_secs());
        }
        match lines.recv_timeout(left.min(silence)) {
            Ok(text) => line(&text),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) if left > silence => {
                bail!("it hangs: it said nothing for {} s", silence.as_secs());
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// A program of this machine, read like a guest.
pub(super) fn run_here(
    command: &mut Command,
    limit: Duration,
    line: impl FnMut(&str),
) -> Result<Option<i32>> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let lines = lines_of(&mut child)?;
    let outcome = read(&lines, limit, SILENCE, line);
    Ok(end(&mut child, outcome)?.code())
}

/// Waits for a program that has closed its output, for a moment, and kills any other.
fn end(child: &mut Child, outcome: Result<()>) -> Result<ExitStatus> {
    let until = Instant::now() + CLOSING;
    while outcome.is_ok() && Instant::now() < until {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        thread::sleep(POLL);
    }
    // It may have ended just now.
    let _killed = child.kill();
    child.wait()?;
    outcome?;
    bail!("it closed its output and went on");
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::{read, run_here, sync_channel};

    #[test]
    fn what_hangs_is_ended_and_what_it_said_is_heard() {
        let mut heard = Vec::new();
        let mut script = Command::new("sh");
        script.args(["-c", "echo one; printf 'tw\\377o\\r\\n'; exec sleep 60"]);
        let error = run_here(&mut script, Duration::from_millis(500), |line| {
            heard.push(line.to_owned())
        });
        assert!(error.unwrap_err().to_string().contains("not done"));
        assert_eq!(heard, ["one", "tw\u{fffd}o"]);
    }

    #[test]
    fn who_says_nothing_any_more_hangs() {
        let (sender, lines) = sync_channel(1);
        sender.send("one".to_owned()).unwrap();
        let mut heard = 0;
        let (limit, silence) = (Duration::from_secs(60), Duration::from_millis(50));
        let error = read(&lines, limit, silence, |_| heard += 1).unwrap_err();
        assert!(error.to_string().contains("it hangs"), "{error}");
        assert_eq!(heard, 1);
    }

    #[test]
    fn what_ends_tells_how() {
        let mut script = Command::new("sh");
        script.args(["-c", "echo last words; exit 7"]);
        let mut heard = 0;
        let code = run_here(&mut script, Duration::from_secs(20), |_| heard += 1).unwrap();
        assert_eq!((code, heard), (Some(7), 1));
    }
}
