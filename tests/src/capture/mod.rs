//! What passes on a link, as tcpdump records it.

mod pcap;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::{Netns, Process, Run, until};

pub use pcap::Seen;

/// A recording under way.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
}

impl Capture {
    pub(crate) fn start(run: &Run, name: &str, netns: &Netns, interface: &str) -> Result<Self> {
        let file = run.dir().join(format!("{name}.pcap"));
        let mut command = netns.command("tcpdump");
        command
            .args([
                "--interface",
                interface,
                "--snapshot-length",
                "0",
                "--immediate-mode",
                "-U",
                "-Z",
                "root",
            ])
            // What the kernel holds while tcpdump does not get its turn, in KiB.
            .args(["--buffer-size", "65536", "-w"])
            .arg(&file);
        let process = Process::spawn(run, &format!("tcpdump-{name}"), &mut command)?;
        until("tcpdump to listen", Duration::from_secs(10), || {
            process.log().contains("listening on").then_some(())
        })
        .with_context(|| process.log())?;
        Ok(Self { process, file })
    }

    /// Ends the recording and reads it.
    pub fn stop(mut self) -> Result<Seen> {
        // What tcpdump has not read when it is told to end would be lost, and in none of its counts.
        until("tcpdump to read what passed", Duration::from_secs(10), || {
            self.process.signal(Signal::SIGUSR1).ok()?;
            self.process.log().lines().any(is_all_read).then_some(())
        })?;
        self.process.signal(Signal::SIGINT)?;
        self.process.wait(Duration::from_secs(10))?;
        let log = self.process.log();
        if !log.contains("0 packets dropped by kernel") {
            bail!("the recording has gaps: {log}");
        }
        Seen::parse(&fs::read(&self.file)?)
    }
}

/// `tcpdump: 2 packets captured, 2 packets received by filter, 0 packets dropped by kernel`: what it says to SIGUSR1.
fn is_all_read(line: &str) -> bool {
    let counts = line.strip_prefix("tcpdump: ").unwrap_or_default();
    let mut counts = counts.split(", ").map(|count| {
        count
            .split(' ')
            .next()
            .and_then(|count| count.parse::<u64>().ok())
    });
    match (counts.next().flatten(), counts.next().flatten()) {
        (Some(captured), Some(received)) => captured == received,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::is_all_read;

    #[test]
    fn all_is_read_when_nothing_waits() {
        let said = |captured| {
            format!(
                "tcpdump: {captured} packets captured, 7 packets received by filter, 0 packets dropped by kernel"
            )
        };
        assert!(is_all_read(&said(7)));
        assert!(!is_all_read(&said(6)));
        assert!(!is_all_read(
            "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes"
        ));
    }
}
