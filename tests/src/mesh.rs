//! Two nodes with their agents, the resources they read, and the pods.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::wire::{self, TRUNK, Wire};
use crate::{Agent, Capture, Netns, Pod, PodSpec, Run, until_ok};

/// The server that pods ask for names; nobody is there, so what the agents do not know is not known.
const NAMESERVER: &str = "10.96.0.10";
const NODES: [&str; 2] = ["node-a", "node-b"];
/// What a changed resource may take to have effect everywhere.
const SETTLE: Duration = Duration::from_secs(10);

/// Of each agent's data path: on small machines too, more than one that could get in another's way.
pub const THREADS: usize = 2;

#[derive(Clone, Debug)]
pub struct Options {
    /// Prefixes everything that the mesh makes. By default a name that no other run has.
    pub name: Option<String>,
    /// Whether the agents are started.
    pub agents: bool,
    /// The agents' `RUST_LOG`.
    pub log: String,
    /// More lines for the agents' configuration.
    pub config: String,
    /// A program that starts the agents' program in its place, with arguments of its own.
    pub under: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: None,
            agents: true,
            log: "info".to_owned(),
            config: format!("threads: {THREADS}\n"),
            under: Vec::new(),
        }
    }
}

/// Everything of it ends when it is dropped. When that happens in a panic, the agents' logs are printed.
#[derive(Debug)]
pub struct Mesh {
    pub agents: Vec<Agent>,
    wire: Wire,
    /// The last address given out on each node.
    last: [u8; 2],
    peer: PathBuf,
    pub run: Run,
    /// Given back when all else is gone.
    _slot: Slot,
}

impl Mesh {
    pub fn start(options: &Options) -> Result<Self> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let name = options
            .name
            .clone()
            .unwrap_or_else(|| format!("t{}n{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed)));
        let slot = Slot::take();
        let run = Run::start(&name)?;
        fs::create_dir(run.dir().join("resources"))?;
        let wire = Wire::new(&run)?;
        let mut mesh = Self {
            agents: Vec::new(),
            wire,
            last: [0; 2],
            peer: program("mesh-peer", "MESH_PEER_BIN")?,
            run,
            _slot: slot,
        };
        if options.agents {
            mesh.start_agents(options)?;
        }
        Ok(mesh)
    }

    /// Starts the nodes' agents. Pods that are there already become part of the mesh as they are.
    pub fn start_agents(&mut self, options: &Options) -> Result<()> {
        let program = program("mesh-agent", "MESH_AGENT_BIN")?;
        for node in NODES {
            let mut agent = Agent::new(&self.run, node, &program, options)?;
            agent.start(&self.run)?;
            self.agents.push(agent);
        }
        Ok(())
    }

    /// A pod without programs. With agents, it is enrolled when this returns.
    pub fn pod(&mut self, spec: PodSpec) -> Result<Pod> {
        let pod = self.place(spec)?;
        self.announce(&pod)?;
        if !self.agents.is_empty() {
            self.wait_known(&pod)?;
        }
        Ok(pod)
    }

    /// A pod that no document tells of.
    pub fn stranger(&mut self, name: &str, node: usize) -> Result<Pod> {
        self.place(PodSpec::new(name, node))
    }

    fn place(&mut self, spec: PodSpec) -> Result<Pod> {
        let last = self.last.get_mut(spec.node).context("there are two nodes")?;
        *last += 1;
        let [v4, v6] = wire::pod_addresses(spec.node, *last)?;
        let netns = Netns::create(&self.run.netns(&spec.name))?;
        let search = format!(
            "{}.svc.cluster.local svc.cluster.local cluster.local",
            spec.namespace
        );
        netns.set_resolv_conf(&format!(
            "nameserver {NAMESERVER}\nsearch {search}\noptions ndots:5\n"
        ))?;
        self.wire.attach(spec.node, &netns, &[v4, v6])?;
        Ok(Pod {
            spec,
            netns,
            v4,
            v6,
            peer: self.peer.clone(),
            servers: Vec::new(),
        })
    }

    /// Deletes a pod's namespace, and after `meanwhile` puts a new one of that name and address in its place.
    pub fn replace_netns(&self, pod: &mut Pod, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        pod.kill_servers();
        let name = pod.netns.name().to_owned();
        Netns::delete(&name);
        meanwhile()?;
        let new = Netns::create(&name)?;
        // The kernel takes the old one's link away in its own time.
        until_ok("the old link to go", Duration::from_secs(5), || {
            self.wire.attach(pod.spec.node, &new, &[pod.v4, pod.v6])
        })?;
        // The old one would delete its successor.
        std::mem::forget(std::mem::replace(&mut pod.netns, new));
        Ok(())
    }

    /// Writes the pod's document.
    pub fn announce(&self, pod: &Pod) -> Result<()> {
        let document = pod
            .spec
            .document(NODES[pod.spec.node], &pod.netns, &[pod.v4, pod.v6])?;
        self.apply(&document_name(pod), &document)
    }

    /// Removes the pod's document; the pod goes on.
    pub fn withdraw(&self, pod: &Pod) -> Result<()> {
        self.remove(&document_name(pod))
    }

    /// Writes a Service document: clusterIPs, then ports as (name, port, target port), then the selector's `app`.
    pub fn service(&self, name: &str, ips: &[&str], ports: &[(&str, u16, u16)], app: &str) -> Result<()> {
        let mut text =
            format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n");
        if let Some(first) = ips.first() {
            let all: Vec<String> = ips.iter().map(|ip| format!("'{ip}'")).collect();
            text.push_str(&format!(
                "  clusterIP: '{first}'\n  clusterIPs: [{}]\n",
                all.join(", ")
            ));
        }
        text.push_str(&format!("  selector: {{app: {app}}}\n  ports:\n"));
        for (port_name, port, target) in ports {
            text.push_str(&format!(
                "    - {{name: {port_name}, port: {port}, targetPort: {target}}}\n"
            ));
        }
        self.apply(&format!("service-{name}"), &text)
    }

    /// Writes a file of resources, as a whole at once.
    pub fn apply(&self, name: &str, yaml: &str) -> Result<()> {
        let new = self.run.dir().join("new-resource");
        fs::write(&new, yaml)?;
        fs::rename(&new, self.resource(name)).context("cannot write a resource")
    }

    pub fn remove(&self, name: &str) -> Result<()> {
        fs::remove_file(self.resource(name)).with_context(|| format!("no resource {name}"))
    }

    /// Listens on the link between the nodes.
    pub fn capture(&self, name: &str) -> Result<Capture> {
        Capture::start(&self.run, name, self.wire.bridge(0)?, TRUNK)
    }

    /// Waits until both agents know a pod, and its own has enrolled it.
    pub fn wait_known(&self, pod: &Pod) -> Result<()> {
        for (node, agent) in self.agents.iter().enumerate() {
            let own = node == pod.spec.node && pod.spec.meshed;
            until_ok(
                &format!("{} to know {}", agent.node, pod.spec.name),
                SETTLE,
                || {
                    let workloads = agent.get("/api/v1/workloads")?;
                    let found =
                        find(&workloads, &pod.spec.namespace, &pod.spec.name).context("it is not listed")?;
                    if own && !is_enrolled(found) {
                        bail!("it is not enrolled: {found}");
                    }
                    Ok(())
                },
            )?;
        }
        Ok(())
    }

    fn resource(&self, name: &str) -> PathBuf {
        self.run.dir().join("resources").join(format!("{name}.yaml"))
    }
}

/// One of the meshes that may run at the same time in this process: a cgroup takes 64 programs of a kind, and each
/// agent attaches one.
#[derive(Debug)]
struct Slot;

/// How many meshes run, and who waits for one to end.
static RUNNING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

impl Slot {
    const MOST: usize = 8;

    fn take() -> Self {
        let (count, ended) = &RUNNING;
        let count = count.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = ended
            .wait_while(count, |running| *running >= Self::MOST)
            .unwrap_or_else(PoisonError::into_inner);
        *count += 1;
        Self
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let (count, ended) = &RUNNING;
        *count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ended.notify_one();
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if thread::panicking() {
            for agent in &self.agents {
                eprintln!("---- the agent of {}:\n{}----", agent.node, agent.log());
            }
        }
    }
}

fn document_name(pod: &Pod) -> String {
    format!("pod-{}-{}", pod.spec.namespace, pod.spec.name)
}

/// One item of an admin page's list.
fn find<'a>(list: &'a Value, namespace: &str, name: &str) -> Option<&'a Value> {
    list.as_array()?
        .iter()
        .find(|item| item["namespace"] == namespace && item["name"] == name)
}

fn is_enrolled(workload: &Value) -> bool {
    workload["state"] == "enrolled"
}

/// A program of this workspace: where the variable says, else where cargo put it beside us.
pub fn program(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return Ok(path.into());
    }
    let own = env::current_exe()?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| Path::new(folder).join(name))
        .find(|file| file.is_file())
        .with_context(|| format!("{name} is not built; build it, or say in {variable} where it is"))
}
