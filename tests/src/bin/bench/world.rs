//! The network, the pods with their servers, and the documents about them.
//!
//! There are three sets of pods that are alike: one that the agents enrol, one that no document tells of, for the
//! direct run and the peers, and one where ztunnel's redirection is. All servers run from the first turn to the last, the same for all contestants.

use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_tests::{Mesh, Options, Pod, PodSpec, until_ok};
use nix::unistd::Pid;

use crate::cpu;
use crate::scenario::{Door, Place};

/// One bench at a time: two would measure each other.
const NAME: &str = "bench";
/// Where a proxy beside the client listens; the door's number is added.
const SIDECAR: u16 = 10_080;
/// Where a proxy beside the server listens for the one beside the client; the door's number is added.
const BETWEEN: u16 = 15_008;

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) mesh: Mesh,
    pub(crate) plain: Pods,
    pub(crate) meshed: Pods,
    pub(crate) redirected: Pods,
    /// Agents have the kernel encrypt.
    pub(crate) kernel_tls: bool,
}

#[derive(Debug)]
pub(crate) struct Pods {
    pub(crate) client: Pod,
    near: Pod,
    far: Pod,
}

impl World {
    pub(crate) fn start(kernel_tls: bool) -> Result<Self> {
        let options = Options {
            name: Some(NAME.to_owned()),
            agents: false,
            ..Options::default()
        };
        let mut mesh = Mesh::start(&options)?;
        let [plain, redirected] = ["plain", "redirected"].map(|kind| {
            Pods::start(&mut mesh, |mesh, name, node| {
                mesh.stranger(&format!("{kind}-{name}"), node)
            })
        });
        let meshed = Pods::start(&mut mesh, |mesh, name, node| mesh.pod(PodSpec::new(name, node)))?;
        let world = Self {
            mesh,
            plain: plain?,
            meshed,
            redirected: redirected?,
            kernel_tls,
        };
        world.write_services()?;
        Ok(world)
    }

    /// Takes all documents away; the pods go on.
    pub(crate) fn withdraw(&self) -> Result<()> {
        for pod in self.meshed.all() {
            self.mesh.withdraw(pod)?;
        }
        for name in ["service-near", "service-far", "service-near-two", "route"] {
            self.mesh.remove(name)?;
        }
        Ok(())
    }

    /// Writes them again.
    pub(crate) fn announce(&self) -> Result<()> {
        for pod in self.meshed.all() {
            self.mesh.announce(pod)?;
        }
        self.write_services()
    }

    fn write_services(&self) -> Result<()> {
        let [http, http2, grpc, tcp, bulk] = [Door::Http, Door::Http2, Door::Grpc, Door::Tcp, Door::Bulk]
            .map(|door| (service_port(door), port(door)));
        for (name, place) in [("near", Place::SameNode), ("far", Place::OtherNode)] {
            let ports = [
                ("http", http.0, http.1),
                ("http2", http2.0, http2.1),
                ("grpc", grpc.0, grpc.1),
                ("tcp", tcp.0, tcp.1),
                ("tcp-bulk", bulk.0, bulk.1),
            ];
            self.mesh.service(name, &[cluster_ip(place)], &ports, name)?;
        }
        let two = ("http", 80, port(Door::Routed));
        self.mesh.service("near-two", &["10.96.1.3"], &[two], "near")?;
        self.mesh.apply("route", include_str!("route.yaml"))
    }
}

impl Pods {
    fn start(mesh: &mut Mesh, place: impl Fn(&mut Mesh, &str, usize) -> Result<Pod>) -> Result<Self> {
        let client = place(mesh, "client", 0)?;
        let mut near = place(mesh, "near", 0)?;
        let mut far = place(mesh, "far", 1)?;
        for pod in [&mut near, &mut far] {
            serve(mesh, pod)?;
        }
        Ok(Self { client, near, far })
    }

    fn all(&self) -> [&Pod; 3] {
        [&self.client, &self.near, &self.far]
    }

    pub(crate) fn server(&self, place: Place) -> &Pod {
        match place {
            Place::SameNode => &self.near,
            Place::OtherNode => &self.far,
        }
    }

    /// The processes that serve there.
    pub(crate) fn server_processes(&self, place: Place) -> Result<Vec<Pid>> {
        let families = self.server(place).process_ids().map(cpu::family);
        Ok(families.collect::<Result<Vec<_>>>()?.concat())
    }
}

/// The port at which the server itself is.
pub(crate) fn port(door: Door) -> u16 {
    match door {
        Door::Http => 8080,
        Door::Routed => 8081,
        Door::Http2 => 8082,
        Door::Tcp => 8083,
        Door::Grpc => 9090,
        Door::Bulk => 5201,
    }
}

/// The port of the service in front of it.
fn service_port(door: Door) -> u16 {
    match door {
        Door::Http | Door::Routed => 80,
        Door::Http2 => 81,
        Door::Grpc => 82,
        Door::Tcp => 83,
        Door::Bulk => 84,
    }
}

fn cluster_ip(place: Place) -> &'static str {
    match place {
        Place::SameNode => "10.96.1.1",
        Place::OtherNode => "10.96.1.2",
    }
}

/// The service, as clients in the mesh reach it.
pub(crate) fn service(place: Place, door: Door) -> Result<SocketAddr> {
    Ok(SocketAddr::new(cluster_ip(place).parse()?, service_port(door)))
}

/// A proxy beside the client.
pub(crate) fn sidecar(door: Door) -> SocketAddr {
    ([127, 0, 0, 1], SIDECAR + number(door)).into()
}

/// The port between a proxy beside the client and one beside the server.
pub(crate) fn between(door: Door) -> u16 {
    BETWEEN + number(door)
}

fn number(door: Door) -> u16 {
    service_port(door) - service_port(Door::Http)
}

fn serve(mesh: &Mesh, pod: &mut Pod) -> Result<()> {
    let name = pod.spec.name.clone();
    let config = mesh.run.dir().join(format!("{name}.conf"));
    fs::write(
        &config,
        server_config(&mesh.run.dir().join(format!("{name}.pid")).display().to_string())?,
    )?;
    let config = config.to_str().context("a folder that is no text")?;
    let options = ["-e", "stderr", "-c", config];
    pod.start(&mesh.run, "nginx", &"nginx".into(), &options)?;
    let bulk = port(Door::Bulk).to_string();
    pod.start(&mesh.run, "iperf3", &"iperf3".into(), &["-s", "-p", &bulk])?;
    pod.serve(&mesh.run, "http", port(Door::Grpc))?;
    for door in [Door::Http, Door::Routed, Door::Http2, Door::Tcp, Door::Bulk] {
        let address = pod.at(port(door));
        until_ok(
            &format!("{name} to listen at {address}"),
            Duration::from_secs(10),
            || {
                pod.netns.enter(|| std::net::TcpStream::connect(address))??;
                Ok(())
            },
        )?;
    }
    Ok(())
}

/// nginx answers from memory: the server's part is to be small, and the same for all.
fn server_config(pid: &str) -> Result<String> {
    let kilobyte = "x".repeat(1000);
    let mut servers = String::new();
    for (door, options) in [
        (Door::Http, ""),
        (Door::Routed, ""),
        (Door::Http2, " http2"),
        (Door::Tcp, ""),
    ] {
        write!(
            servers,
            "server {{ listen {port}{options}; add_header x-port {port};
               location = /100 {{ return 200 {hundred}; }}
               location = /10000 {{ set $k {kilobyte}; return 200 $k$k$k$k$k$k$k$k$k$k; }} }}\n",
            port = port(door),
            hundred = &kilobyte[..100],
        )?;
    }
    Ok(format!(
        "daemon off; worker_processes 1; worker_rlimit_nofile 65536; pid {pid}; error_log stderr;
         events {{ worker_connections 30000; }}
         http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 1h; default_type text/plain;
         {servers} }}\n"
    ))
}
