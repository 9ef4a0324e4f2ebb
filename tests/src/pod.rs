//! A pod: a network namespace with addresses, and the programs in it.

use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{Netns, Process, Run, shell, until};

/// What a pod is to be. By default it is meshed and runs on the first node in the namespace `shop`.
#[derive(Clone, Debug)]
pub struct PodSpec {
    pub name: String,
    pub namespace: String,
    pub node: usize,
    pub labels: Vec<(String, String)>,
    pub annotations: Vec<(String, String)>,
    pub service_account: String,
    pub meshed: bool,
}

impl PodSpec {
    /// Its service account and its label `app` are called as it is.
    pub fn new(name: &str, node: usize) -> Self {
        Self {
            name: name.to_owned(),
            namespace: "shop".to_owned(),
            node,
            labels: vec![("app".to_owned(), name.to_owned())],
            annotations: Vec::new(),
            service_account: name.to_owned(),
            meshed: true,
        }
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.retain(|(have, _)| have != key);
        self.labels.push((key.to_owned(), value.to_owned()));
        self
    }

    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.service_account);
        self
    }

    pub fn namespace(mut self, name: &str) -> Self {
        name.clone_into(&mut self.namespace);
        self
    }

    /// No agent stands before it.
    pub fn unmeshed(mut self) -> Self {
        self.meshed = false;
        self.label("istio.io/dataplane-mode", "none")
    }

    /// The document that describes it to the agents.
    pub(crate) fn document(&self, node: &str, netns: &Netns, addresses: &[IpAddr]) -> Result<String> {
        let mut text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {}\n  namespace: {}\n  labels:\n",
            self.name, self.namespace
        );
        for (key, value) in &self.labels {
            writeln!(text, "    {key}: '{value}'")?;
        }
        writeln!(
            text,
            "  annotations:\n    mesh-agent.dev/netns: {}",
            netns.path().display()
        )?;
        for (key, value) in &self.annotations {
            writeln!(text, "    {key}: '{value}'")?;
        }
        writeln!(
            text,
            "spec:\n  nodeName: {node}\n  serviceAccountName: {}",
            self.service_account
        )?;
        let first = addresses.first().context("a pod without an address")?;
        writeln!(text, "status:\n  podIP: {first}\n  podIPs:")?;
        for address in addresses {
            writeln!(text, "    - ip: '{address}'")?;
        }
        Ok(text)
    }
}

/// A running pod. Its programs and its namespace end when it is dropped.
#[derive(Debug)]
pub struct Pod {
    pub spec: PodSpec,
    pub netns: Netns,
    pub v4: IpAddr,
    pub v6: IpAddr,
    pub(crate) peer: PathBuf,
    pub(crate) servers: Vec<Process>,
}

/// What curl got.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    /// Status line and header lines.
    pub head: String,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

impl Pod {
    /// The first (IPv4) address with a port.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    pub fn at_v6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }

    /// `mesh-peer KIND` in this pod, listening at `port`; see `src/bin/mesh-peer` for the kinds.
    pub fn serve(&mut self, run: &Run, kind: &str, port: u16) -> Result<()> {
        let peer = self.peer.clone();
        let port = port.to_string();
        self.start(run, kind, &peer, &[kind, &self.spec.name.clone(), &port])?;
        let process = self.servers.last().context("it was started just now")?;
        until("the server to listen", Duration::from_secs(10), || {
            process.log().contains("listening").then_some(())
        })
        .with_context(|| process.log())
    }

    /// Starts any other program in this pod.
    pub fn start(&mut self, run: &Run, name: &str, program: &PathBuf, args: &[&str]) -> Result<()> {
        let name = format!("{}-{name}-{}", self.spec.name, self.servers.len());
        let mut command = self.netns.command(program);
        command.args(args);
        self.servers.push(Process::spawn(run, &name, &mut command)?);
        Ok(())
    }

    /// The programs that were started in it.
    pub fn process_ids(&self) -> impl Iterator<Item = u32> {
        self.servers.iter().map(Process::id)
    }

    /// SIGKILL for all its programs; the namespace stays.
    pub fn kill_servers(&mut self) {
        self.servers.clear();
    }

    /// A program in this pod that runs to its end.
    pub fn command(&self, program: &str) -> Command {
        self.netns.command(program)
    }

    pub fn curl(&self, args: &[&str]) -> Result<Response> {
        let mut command = self.command("curl");
        command
            .args(["--silent", "--show-error", "--include", "--max-time", "20"])
            .args(args);
        parse(&shell::output(&mut command)?)
    }

    /// `mesh-peer` in this pod.
    pub fn peer_command(&self) -> Command {
        self.netns.command(&self.peer)
    }

    /// `mesh-peer load`, to be run by something else.
    pub fn load_command(&self, args: &[&str]) -> Command {
        let mut command = self.peer_command();
        command.arg("load").args(args);
        command
    }

    /// Runs `mesh-peer load` here and returns its report.
    pub fn load(&self, args: &[&str]) -> Result<serde_json::Value> {
        let report = shell::output(&mut self.load_command(args))?;
        serde_json::from_str(&report).with_context(|| format!("no report: {report}"))
    }
}

/// The last response of `curl --include`: interim ones come before it.
fn parse(output: &str) -> Result<Response> {
    let mut rest = output;
    loop {
        let (head, body) = rest
            .split_once("\r\n\r\n")
            .with_context(|| format!("no response: {output:?}"))?;
        let status: u16 = head.split(' ').nth(1).context("no status")?.parse()?;
        if status >= 200 || status == 101 {
            return Ok(Response {
                status,
                head: head.to_owned(),
                body: body.to_owned(),
            });
        }
        rest = body;
    }
}
