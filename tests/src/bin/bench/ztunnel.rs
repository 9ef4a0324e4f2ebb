//! ztunnel without a cluster: one at each end, in dedicated mode, with its own test authority.
//!
//! It learns the workloads from a file. What the client connects to is redirected to it by nftables inside the
//! client's network namespace, as Istio does it in a pod.

use std::io::Write as _;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use mesh_tests::{Pod, Process, until_ok};

use crate::args::Peer;
use crate::peer::Peers;
use crate::proxies::{PATIENCE, write_config};
use crate::scenario::Place;
use crate::world::World;

/// What ztunnel marks its own connections with.
const MARK: u32 = 1337;
const READY: &str = "http://127.0.0.1:15021/healthz/ready";

pub(crate) fn start(world: &World, peers: &Peers) -> Result<Vec<Process>> {
    let (client, server) = (
        &world.redirected.client,
        world.redirected.server(Place::OtherNode),
    );
    redirect(client)?;
    let workload = |pod: &Pod| {
        let name = &pod.spec.name;
        format!(
            "- {{uid: bench//v1/Pod/shop/{name}, name: {name}, namespace: shop, serviceAccount: {name}, \
             workloadIps: [\"{}\"], protocol: HBONE, node: node-{}, network: \"\", trustDomain: cluster.local, \
             services: {{}}}}\n",
            pod.v4, pod.spec.node
        )
    };
    let workloads = [server, client].map(workload).concat();
    let documents = format!("workloads:\n{workloads}services: []\npolicies: []\n");
    let documents = write_config(world, "ztunnel.yaml", &documents)?;
    let mut processes = Vec::new();
    for pod in [server, client] {
        processes.push(spawn(world, peers, pod, &documents)?);
    }
    for (pod, process) in [server, client].into_iter().zip(&processes) {
        until_ok("ztunnel to be ready", PATIENCE, || {
            let response = pod.curl(&[READY])?;
            ensure!(response.status == 200, "{response:?}");
            Ok(())
        })
        .with_context(|| process.log())?;
    }
    Ok(processes)
}

fn spawn(world: &World, peers: &Peers, pod: &Pod, documents: &str) -> Result<Process> {
    let name = &pod.spec.name;
    let mut command = pod.netns.command(peers.program(Peer::Ztunnel)?);
    command.args(["proxy", "ztunnel"]).envs([
        ("FAKE_CA", "true"),
        ("XDS_ADDRESS", ""),
        ("LOCAL_XDS_PATH", documents),
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", &format!("shop/{name}/{name}")),
        ("NODE_NAME", &format!("node-{}", pod.spec.node)),
        ("CLUSTER_ID", "bench"),
        ("NETWORK", ""),
        ("PACKET_MARK", &MARK.to_string()),
        // In this mode the app's answers to a client's own address would go past it.
        ("ENABLE_ORIG_SRC", "false"),
        ("ZTUNNEL_WORKER_THREADS", "1"),
        // Else one line per connection.
        ("RUST_LOG", "warn"),
    ]);
    Process::spawn(&world.mesh.run, &format!("ztunnel-{name}"), &mut command)
}

/// Again in every turn: the table is made anew.
fn redirect(client: &Pod) -> Result<()> {
    let table = format!(
        "table ip bench\ndelete table ip bench\ntable ip bench {{\n chain output {{\n  \
         type nat hook output priority -100; policy accept;\n  meta mark {MARK} accept\n  \
         oifname \"lo\" accept\n  ip daddr 127.0.0.0/8 accept\n  ip protocol tcp redirect to :15001\n }}\n}}\n"
    );
    let mut child = client
        .command("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run nft")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(table.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "nft: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
