//! The contestants: what each runs, and where its clients connect to.
//!
//! All proxies have one thread (the agents one lane). Peers stand beside the client, in its own network namespace,
//! as a sidecar would: the shortest way that they can have.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_tests::{Options, Pod, Process, shell, until, until_ok};
use nix::unistd::Pid;

use crate::args::Peer;
use crate::bare;
use crate::cpu::{self, Watched};
use crate::envoy;
use crate::generator::{Generator, Requests, Way};
use crate::peer::Peers;
use crate::scenario::{Door, Place, Work};
use crate::world::{self, World};
use crate::ztunnel;

/// One data path thread, as all others.
const AGENT_CONFIG: &str = "threads: 1\n";
/// What a contestant may take to start or to end.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// One contestant at work. It ends with [`Running::stop`], the agents with [`stop_agents`].
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) peer: Peer,
    place: Place,
    /// Those of peers; agents are the mesh's.
    processes: Vec<Process>,
    /// The agents that take part, by their nodes' names.
    pub(crate) agents: Vec<(String, Pid)>,
    pub(crate) watched: Watched,
}

impl Running {
    pub(crate) fn start(peer: Peer, place: Place, world: &mut World, peers: &Peers) -> Result<Self> {
        let processes = match peer {
            Peer::None => Vec::new(),
            Peer::Agent => {
                start_agents(world)?;
                Vec::new()
            }
            Peer::Bare => bare::start(world, peers, place)?,
            Peer::Nginx => vec![nginx(world, peers, place)?],
            Peer::Haproxy => vec![haproxy(world, peers, place)?],
            Peer::Envoy => envoy::start(world, peers, place)?,
            Peer::Ztunnel => ztunnel::start(world, peers)?,
        };
        let mut running = Self {
            peer,
            place,
            processes,
            agents: Vec::new(),
            watched: Watched::default(),
        };
        let nodes = match (peer, place) {
            (Peer::Agent, Place::OtherNode) => 2,
            // The other node's agent has no part in what stays on one node.
            (Peer::Agent, Place::SameNode) => 1,
            _ => 0,
        };
        for agent in world.mesh.agents.iter_mut().take(nodes) {
            let pid = Pid::from_raw(i32::try_from(agent.process()?.id())?);
            running.agents.push((agent.node.clone(), pid));
        }
        let families = running.processes.iter().map(|process| cpu::family(process.id()));
        let mut proxies = families.collect::<Result<Vec<_>>>()?.concat();
        proxies.extend(running.agents.iter().map(|(_, pid)| *pid));
        running.watched = Watched {
            servers: running.pods(world).server_processes(place)?,
            proxies,
        };
        Ok(running)
    }

    fn pods<'w>(&self, world: &'w World) -> &'w world::Pods {
        match self.peer {
            Peer::Agent => &world.meshed,
            Peer::Ztunnel => &world.redirected,
            _ => &world.plain,
        }
    }

    /// Puts load on it.
    pub(crate) fn generator<'w>(&self, world: &'w World, work: Work) -> Result<Generator<'w>> {
        let client = &self.pods(world).client;
        let way = |door| -> Result<Way<'w>> {
            let address = self.address(world, door)?;
            Ok(Way { client, address })
        };
        Ok(match work {
            Work::Requests {
                door,
                bytes,
                connections,
            } => Generator::Requests(Requests {
                client,
                address: self.address(world, door)?,
                door,
                bytes,
                connections,
                folder: world.mesh.run.dir(),
            }),
            Work::Bulk { flows } => Generator::Bulk(way(Door::Bulk)?, flows),
            Work::Connect { at_once } => Generator::Connects(way(Door::Tcp)?, at_once),
        })
    }

    /// Where its load goes to.
    fn address(&self, world: &World, door: Door) -> Result<SocketAddr> {
        match self.peer {
            Peer::None | Peer::Ztunnel => Ok(self.pods(world).server(self.place).at(world::port(door))),
            Peer::Agent => world::service(self.place, door),
            Peer::Bare | Peer::Nginx | Peer::Haproxy | Peer::Envoy => Ok(world::sidecar(door)),
        }
    }

    /// Ends it, and waits until workers too are gone: the next one wants their ports.
    pub(crate) fn stop(self) -> Result<()> {
        if self.peer == Peer::Agent {
            return Ok(());
        }
        drop(self.processes);
        let proxies = &self.watched.proxies;
        until("the proxies to end", PATIENCE, || {
            proxies.iter().all(|pid| cpu::is_gone(*pid)).then_some(())
        })
    }

    /// The most memory that the proxies held, in bytes.
    pub(crate) fn peak_rss(&self) -> Result<u64> {
        self.watched.proxies.iter().map(|pid| cpu::peak_rss(*pid)).sum()
    }
}

/// Ends the agents of a turn. Nothing of them is left in the kernel, where others would meet their programs.
pub(crate) fn stop_agents(world: &mut World) -> Result<()> {
    for mut agent in std::mem::take(&mut world.mesh.agents) {
        agent.stop(PATIENCE)?;
        let bpffs = world.mesh.run.bpffs().join(&agent.node);
        shell::output(agent.command().arg("uninstall").arg("--bpffs").arg(bpffs))?;
    }
    Ok(())
}

pub(crate) fn launch_agents(world: &mut World) -> Result<()> {
    let options = Options {
        config: format!("{AGENT_CONFIG}kernelTls: {}\n", world.kernel_tls),
        ..Options::default()
    };
    world.mesh.start_agents(&options)
}

/// With the client and the servers enrolled.
pub(crate) fn start_agents(world: &mut World) -> Result<()> {
    launch_agents(world)?;
    let pods = &world.meshed;
    for pod in [
        &pods.client,
        pods.server(Place::SameNode),
        pods.server(Place::OtherNode),
    ] {
        world.mesh.wait_known(pod)?;
    }
    Ok(())
}

/// Starts a program beside the client, or beside the server.
pub(crate) fn spawn(world: &World, pod: &Pod, peers: &Peers, peer: Peer, args: &[&str]) -> Result<Process> {
    let mut command = pod.netns.command(peers.program(peer)?);
    command.args(args);
    let name = format!("{}-{}", peer.title(), pod.spec.name);
    Process::spawn(&world.mesh.run, &name, &mut command)
}

/// Until somebody listens there.
pub(crate) fn wait_listening(pod: &Pod, address: SocketAddr, process: &Process) -> Result<()> {
    until_ok(&format!("a listener at {address}"), PATIENCE, || {
        pod.netns.enter(|| std::net::TcpStream::connect(address))??;
        Ok(())
    })
    .with_context(|| process.log())
}

/// A configuration file of this run.
pub(crate) fn write_config(world: &World, name: &str, text: &str) -> Result<String> {
    let file = world.mesh.run.dir().join(name);
    fs::write(&file, text)?;
    Ok(file.to_str().context("a folder that is no text")?.to_owned())
}

fn nginx(world: &World, peers: &Peers, place: Place) -> Result<Process> {
    let server = world.plain.server(place);
    let config = format!(
        "daemon off; worker_processes 1; pid {pid}; error_log stderr;
         events {{ worker_connections 4096; }}
         http {{
           access_log off; keepalive_requests 1000000000;
           map $http_x_version $chosen {{ two two; default one; }}
           upstream one {{ server {one}; keepalive 64; keepalive_requests 1000000000; }}
           upstream two {{ server {two}; keepalive 64; keepalive_requests 1000000000; }}
           server {{ listen {listen}; location / {{
             proxy_pass http://$chosen; proxy_http_version 1.1; proxy_set_header Connection ''; }} }} }}\n",
        pid = world.mesh.run.dir().join("peer-nginx.pid").display(),
        one = server.at(world::port(Door::Http)),
        two = server.at(world::port(Door::Routed)),
        listen = world::sidecar(Door::Routed),
    );
    let file = write_config(world, "peer-nginx.conf", &config)?;
    let client = &world.plain.client;
    let process = spawn(world, client, peers, Peer::Nginx, &["-e", "stderr", "-c", &file])?;
    wait_listening(client, world::sidecar(Door::Routed), &process)?;
    // The master listens before there is a worker, whose time is what counts.
    until("nginx's worker", PATIENCE, || {
        let family = cpu::family(process.id()).ok()?;
        (family.len() > 1).then_some(())
    })?;
    Ok(process)
}

fn haproxy(world: &World, peers: &Peers, place: Place) -> Result<Process> {
    let server = world.plain.server(place);
    let config = format!(
        "global\n  nbthread 1\n  maxconn 4096\n\
         defaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n  \
         http-reuse always\n\
         frontend door\n  bind {listen}\n  use_backend two if {{ req.hdr(x-version) -m str two }}\n  \
         default_backend one\n\
         backend one\n  server one {one}\nbackend two\n  server two {two}\n",
        one = server.at(world::port(Door::Http)),
        two = server.at(world::port(Door::Routed)),
        listen = world::sidecar(Door::Routed),
    );
    let file = write_config(world, "peer-haproxy.conf", &config)?;
    let client = &world.plain.client;
    let process = spawn(world, client, peers, Peer::Haproxy, &["-db", "-f", &file])?;
    wait_listening(client, world::sidecar(Door::Routed), &process)?;
    Ok(process)
}
