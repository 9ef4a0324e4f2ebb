//! The fast path: what goes from one pod of a node to another without the agent, and what does not.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use mesh_tests::{Mesh, Options, Pod, PodSpec, until_ok};

use crate::common::{HTTP, address, connect, try_connect, wait_for};

const DB: &str = "10.96.0.50";
const PORT: u16 = 5432;
const TARGET: u16 = 7777;
/// What a changed document, or the agent's next look at the kernel's counts, may take.
const PATIENCE: Duration = Duration::from_secs(20);

const STRICT: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec: {mtls: {mode: STRICT}}
";

/// A client and a database on one node, under STRICT.
struct Near {
    client: Pod,
    db: Pod,
    mesh: Mesh,
}

impl Near {
    fn new() -> Self {
        let mut mesh = Mesh::start(&Options::default()).unwrap();
        mesh.apply("strict", STRICT).unwrap();
        let near = Self {
            client: mesh.pod(PodSpec::new("client", 0)).unwrap(),
            db: database(&mut mesh, "db", 0),
            mesh,
        };
        near.describe("tcp", "");
        // What the proxy carried would be counted too.
        until_ok("the way to the service and that to its pod", PATIENCE, || {
            let counts = &near.mesh.agents[0].get("/api/v1/status")?["counts"];
            ensure!(counts["fastPaths"] == 4, "for each of two clients: {counts}");
            Ok(())
        })
        .unwrap();
        near
    }

    /// The service with its one port named so.
    fn describe(&self, port: &str, annotations: &str) {
        let text = format!(
            "apiVersion: v1
kind: Service
metadata: {{name: db, namespace: shop, annotations: {{{annotations}}}}}
spec:
  clusterIP: {DB}
  selector: {{app: db}}
  ports: [{{name: {port}, port: {PORT}, targetPort: {TARGET}}}]
"
        );
        self.mesh.apply("service-db", &text).unwrap();
    }

    /// Connections that did not meet the agent.
    fn made(&self) -> Result<u64> {
        let state = self.mesh.agents[0].get("/api/v1/ebpf")?;
        state["counters"]["fast_path"].as_u64().context("no such counter")
    }

    /// Whether a new connection goes without the agent. It arrives in any case.
    fn is_fast(&self, to: SocketAddr) -> Result<bool> {
        let before = self.made()?;
        let mut stream = try_connect(&self.client, to)?;
        exchange(&mut stream)?;
        finish(stream)?;
        Ok(self.made()? > before)
    }

    fn wait(&self, to: SocketAddr, fast: bool) {
        until_ok(&format!("{to} to be on the fast path: {fast}"), PATIENCE, || {
            ensure!(self.is_fast(to)? == fast);
            Ok(())
        })
        .unwrap();
    }

    /// How often the kernel ran the agent's programs while it counted that.
    fn runs(&self) -> Result<u64> {
        let state = self.mesh.agents[0].get("/api/v1/ebpf")?;
        let hooks = state["hooks"].as_array().context("no hooks")?;
        let ours: Vec<_> = hooks.iter().map(|hook| &hook["programId"]).collect();
        // A program of another test may be gone by the time it is asked.
        let counts = loaded_programs()
            .filter_map(Result::ok)
            .filter(|program| ours.iter().any(|id| **id == program.id()))
            .map(|program| program.run_count());
        Ok(counts.sum())
    }

    /// Connections and bytes between the two, as `reporter` tells.
    fn counted(&self, reporter: &str) -> Result<Counted> {
        let samples = self.mesh.agents[0].metrics()?;
        let labels = [
            ("reporter", reporter),
            ("source_principal", "spiffe://cluster.local/ns/shop/sa/client"),
            ("destination_principal", "spiffe://cluster.local/ns/shop/sa/db"),
            ("destination_service", "db.shop.svc.cluster.local"),
            ("connection_security_policy", "mutual_tls"),
        ];
        let sum = |name: &str| samples.sum(&format!("istio_tcp_{name}_total"), &labels);
        Ok(Counted {
            opened: sum("connections_opened"),
            closed: sum("connections_closed"),
            received: sum("received_bytes"),
            sent: sum("sent_bytes"),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Counted {
    opened: f64,
    closed: f64,
    received: f64,
    sent: f64,
}

fn database(mesh: &mut Mesh, name: &str, node: usize) -> Pod {
    let mut pod = mesh.pod(PodSpec::new(name, node).label("app", "db")).unwrap();
    pod.serve(&mesh.run, "echo", TARGET).unwrap();
    pod
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"hello")?;
    stream.read_exact(&mut [0; 5])
}

/// Waits for the other side's end, which comes after it has told how much it got.
fn finish(mut stream: TcpStream) -> std::io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let mut rest = String::new();
    stream.read_to_string(&mut rest)?;
    assert_eq!(rest, "\n5 bytes\n");
    Ok(())
}

#[test]
fn neighbours_talk_without_the_agent_and_are_counted_as_with_it() {
    let near = Near::new();
    for to in [address(DB, PORT), near.db.at(TARGET)] {
        assert!(near.is_fast(to).unwrap());
        let mut stream = connect(&near.client, to);
        exchange(&mut stream).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), to);
        assert_eq!(stream.local_addr().unwrap().ip(), near.client.v4);
        finish(stream).unwrap();
    }
    let all = Counted {
        opened: 4.0,
        closed: 4.0,
        received: 4.0 * 5.0,
        sent: 4.0 * 14.0,
    };
    for reporter in ["source", "destination"] {
        until_ok("all of it to be counted", PATIENCE, || {
            let counted = near.counted(reporter)?;
            ensure!(counted == all, "{reporter}: {counted:?}");
            Ok(())
        })
        .unwrap();
    }
    let status = near.mesh.agents[0].get("/api/v1/status").unwrap();
    assert_eq!(status["counts"]["fastPathConnections"], near.made().unwrap());
}

/// The agent is not on the way, and no program of its kind sees what is exchanged.
#[test]
fn only_connecting_meets_a_program() {
    const EXCHANGES: u64 = 100;
    let near = Near::new();
    let _counting = enable_stats(Stats::RunTime).unwrap();
    let (fast, before) = (near.made().unwrap(), near.runs().unwrap());
    let mut stream = connect(&near.client, address(DB, PORT));
    exchange(&mut stream).unwrap();
    assert_eq!(near.made().unwrap(), fast + 1);
    assert!(near.runs().unwrap() > before, "connecting is counted");
    // The programs of the machine's cgroup run for sockets of other tests too, but not all the time.
    let quiet = (0..50).any(|_| {
        let before = near.runs().unwrap();
        for _ in 0..EXCHANGES {
            exchange(&mut stream).unwrap();
        }
        near.runs().unwrap() - before < EXCHANGES
    });
    assert!(quiet, "a program runs for each of {EXCHANGES} exchanges");
    assert_eq!(near.made().unwrap(), fast + 1);
}

#[test]
fn an_endpoint_elsewhere_brings_the_proxy_back() {
    let mut near = Near::new();
    let (service, pod) = (address(DB, PORT), near.db.at(TARGET));
    let other = database(&mut near.mesh, "db-far", 1);
    near.wait(service, false);
    assert!(near.is_fast(pod).unwrap(), "the neighbour itself is where it was");
    near.mesh.withdraw(&other).unwrap();
    near.wait(service, true);
}

#[test]
fn who_says_so_keeps_the_proxy() {
    const OFF: &str = "mesh-agent.dev/fast-path: 'off'";
    let mut near = Near::new();
    let (service, pod) = (address(DB, PORT), near.db.at(TARGET));
    near.describe("tcp", OFF);
    near.wait(service, false);
    near.wait(pod, false);
    near.describe("tcp", "");
    near.wait(service, true);
    near.db.spec = near.db.spec.clone().annotation("mesh-agent.dev/fast-path", "off");
    near.mesh.announce(&near.db).unwrap();
    near.wait(service, false);
    near.wait(pod, false);
}

#[test]
fn what_the_proxy_looks_into_stays_with_it() {
    let mut near = Near::new();
    near.db.serve(&near.mesh.run, "http", HTTP).unwrap();
    near.mesh
        .service("web", &["10.96.0.51"], &[("http", 80, HTTP)], "db")
        .unwrap();
    wait_for(&near.client, "http://10.96.0.51/");
    let before = near.made().unwrap();
    for url in [
        "http://10.96.0.51/".to_owned(),
        format!("http://{}/", near.db.at(HTTP)),
    ] {
        assert_eq!(near.client.curl(&[&url]).unwrap().status, 200);
    }
    assert_eq!(near.made().unwrap(), before);
    near.describe("postgres", "");
    near.wait(address(DB, PORT), false);
}

#[test]
fn connections_outlive_the_agent_and_so_does_what_they_carried() {
    let mut near = Near::new();
    let service = address(DB, PORT);
    let mut stream = connect(&near.client, service);
    exchange(&mut stream).unwrap();
    until_ok("the connection to be counted", PATIENCE, || {
        let counted = near.counted("source")?;
        ensure!(counted.opened == 1.0, "{counted:?}");
        Ok(())
    })
    .unwrap();
    near.mesh.agents[0].kill();
    let refused = try_connect(&near.client, service).unwrap_err();
    assert_eq!(
        refused.kind(),
        std::io::ErrorKind::ConnectionRefused,
        "STRICT holds"
    );
    exchange(&mut stream).unwrap();
    drop(stream);

    let mut agent = near.mesh.agents.remove(0);
    agent.start(&near.mesh.run).unwrap();
    near.mesh.agents.insert(0, agent);
    until_ok("the connection to be counted", PATIENCE, || {
        let counted = near.counted("source")?;
        ensure!(
            counted.closed == 1.0 && counted.opened == 0.0 && counted.received == 10.0,
            "{counted:?}"
        );
        Ok(())
    })
    .unwrap();
    near.wait(service, true);
}
