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
        self.process.signal(Signal::SIGINT)?;
        self.process.wait(Duration::from_secs(10))?;
        let log = self.process.log();
        if !log.contains("0 packets dropped by kernel") {
            bail!("the recording has gaps: {log}");
        }
        Seen::parse(&fs::read(&self.file)?)
    }
}
