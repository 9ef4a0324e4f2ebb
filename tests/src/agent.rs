//! One node's agent: its configuration, its process, its admin page.

use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::metrics::Samples;
use crate::{Options, Process, Run, http, until_ok};

/// A cold start on a busy machine: loading programs, making a root certificate.
const START: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Agent {
    pub node: String,
    pub admin: SocketAddr,
    pub metrics: SocketAddr,
    pub config: PathBuf,
    program: PathBuf,
    under: Vec<String>,
    log_filter: String,
    process: Option<Process>,
}

impl Agent {
    /// Writes the configuration of a node's agent; it does not run yet.
    pub(crate) fn new(run: &Run, node: &str, program: &Path, options: &Options) -> Result<Self> {
        let (admin, metrics) = (own_address(), own_address());
        let dir = run.dir();
        let state = dir.join("state").join(node);
        fs::create_dir_all(&state)?;
        let config = dir.join(format!("{node}.yaml"));
        let text = format!(
            "node: {node}\n\
             resources:\n  files: [{resources}]\n\
             identity:\n  ca: {{directory: {ca}}}\n\
             admin: {{address: '{admin}'}}\n\
             metrics: {{address: '{metrics}'}}\n\
             stateDir: {state}\n\
             bpffs: {bpffs}\n{more}",
            resources = dir.join("resources").display(),
            ca = dir.join("ca").display(),
            state = state.display(),
            bpffs = run.bpffs().join(node).display(),
            more = options.config,
        );
        fs::write(&config, text)?;
        Ok(Self {
            node: node.to_owned(),
            admin,
            metrics,
            config,
            program: program.to_owned(),
            under: options.under.clone(),
            log_filter: options.log.clone(),
            process: None,
        })
    }

    /// Starts the agent and waits until it says that it is ready.
    pub fn start(&mut self, run: &Run) -> Result<()> {
        self.spawn(run)?;
        self.wait_ready()
    }

    /// Starts the agent without waiting.
    pub fn spawn(&mut self, run: &Run) -> Result<()> {
        let words = self.under.iter().map(OsStr::new);
        let mut words = words.chain([self.program.as_os_str()]);
        let mut command = Command::new(words.next().context("there is always the agent's program")?);
        command.args(words).arg("run").arg("--config").arg(&self.config);
        command.env("RUST_LOG", &self.log_filter);
        self.process = Some(Process::spawn(run, &self.node, &mut command)?);
        Ok(())
    }

    pub fn wait_ready(&mut self) -> Result<()> {
        let (node, metrics) = (self.node.clone(), self.metrics);
        let process = self.process()?;
        let ready = until_ok(&format!("the agent of {node}"), START, || {
            // An agent that gave up will not become ready.
            match process.has_ended()? {
                Some(status) => Ok(Err(status)),
                None => http::get(metrics, "/readyz").map(Ok),
            }
        })?;
        match ready {
            Ok(_) => Ok(()),
            Err(status) => bail!("the agent of {node} ended with {status}:\n{}", self.log()),
        }
    }

    /// One of its JSON pages.
    pub fn get(&self, path: &str) -> Result<Value> {
        http::get_json(self.admin, path)
    }

    /// The agent's program, for its other commands.
    pub fn command(&self) -> Command {
        Command::new(&self.program)
    }

    /// Has the agent read a copy of the resources of this moment: it learns of no change to the others'.
    pub fn freeze_resources(&mut self, run: &Run) -> Result<()> {
        let (all, copy) = (
            run.dir().join("resources"),
            run.dir().join(format!("{}-resources", self.node)),
        );
        fs::create_dir(&copy)?;
        for entry in fs::read_dir(&all)? {
            let entry = entry?;
            fs::copy(entry.path(), copy.join(entry.file_name()))?;
        }
        let text = fs::read_to_string(&self.config)?;
        let line = format!("files: [{}]", all.display());
        fs::write(
            &self.config,
            text.replace(&line, &format!("files: [{}]", copy.display())),
        )?;
        self.stop(START)?;
        self.start(run)
    }

    /// What Prometheus would read.
    pub fn metrics(&self) -> Result<Samples> {
        Ok(Samples::parse(&http::get(self.metrics, "/metrics")?))
    }

    pub fn process(&mut self) -> Result<&mut Process> {
        self.process
            .as_mut()
            .with_context(|| format!("the agent of {} does not run", self.node))
    }

    /// Asks the agent to stop, and waits until it did.
    pub fn stop(&mut self, most: Duration) -> Result<()> {
        self.process()?.signal(Signal::SIGTERM)?;
        let status = self.process()?.wait(most)?;
        if !status.success() {
            bail!("the agent of {} ended with {status}:\n{}", self.node, self.log());
        }
        self.process = None;
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
    }

    pub fn log(&self) -> String {
        self.process.as_ref().map_or_else(String::new, Process::log)
    }
}

/// A loopback address of this process' own. One that was looked for and found free can be another connection's by
/// the time the agent listens: the kernel gives connections over the loopback ports of 127.0.0.1.
fn own_address() -> SocketAddr {
    // Away from the ports that an agent of this machine, or another mesh's, would have on all addresses.
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    // A process' number has 22 bits at the most.
    let [_, a, b, c] = process::id().to_be_bytes();
    let port = NEXT.fetch_add(1, Ordering::Relaxed);
    (Ipv4Addr::new(127, a, b, c), port).into()
}
