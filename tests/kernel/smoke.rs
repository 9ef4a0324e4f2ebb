//! The whole agent, once: two nodes, the programs that users run, and nothing that is not ours.

use std::time::Duration;

use mesh_tests::{Agent, Mesh, Options, Pod, PodSpec, until_ok};
use serde_json::Value;

const SERVICE: &str = "10.96.0.20";
const PORT: u16 = 8080;
/// What a change of resources, or of counters, may take to be seen.
const SETTLE: Duration = Duration::from_secs(10);
const REQUESTS: u64 = 50;

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
    metadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n";

#[test]
fn two_nodes_carry_requests_by_mtls_and_refuse_clear_text() {
    let mut mesh = Mesh::start(&Options::default()).unwrap();
    mesh.service("web", &[SERVICE], &[("http", 80, PORT)], "web")
        .unwrap();
    let mut server = mesh.pod(PodSpec::new("web", 1)).unwrap();
    server.serve(&mesh.run, "http", PORT).unwrap();
    let client = mesh.pod(PodSpec::new("client", 0)).unwrap();
    let plain = mesh.pod(PodSpec::new("plain", 0).unmeshed()).unwrap();

    let service = format!("http://{SERVICE}/");
    until_ok("the service", SETTLE, || answered(&client, &service, 1)).unwrap();
    // A status that nothing else has, so that these are counted exactly.
    let report = load(&client, &format!("{service}status/418"), REQUESTS).unwrap();
    assert_eq!(report["statuses"]["418"], REQUESTS, "{report}");
    assert_eq!(report["pods"]["web"], REQUESTS, "{report}");
    for (agent, reporter) in mesh.agents.iter().zip(["source", "destination"]) {
        let what = format!("{} to count all of it as mTLS", agent.node);
        until_ok(&what, SETTLE, || counted(agent, reporter)).unwrap();
    }

    // Around the service, so that only the server's node stands in the way.
    let direct = format!("http://{}/", server.at(PORT));
    answered(&plain, &direct, 1).unwrap();
    mesh.apply("policy", STRICT).unwrap();
    until_ok("clear text to be refused", SETTLE, || {
        let report = load(&plain, &direct, 1)?;
        anyhow::ensure!(report["answers"] == 0 && report["failed"] == 1, "{report}");
        Ok(())
    })
    .unwrap();
    let metrics = mesh.agents[1].metrics().unwrap();
    assert!(metrics.sum("mesh_agent_plaintext_refused_total", &[]) >= 1.0);
    answered(&client, &service, REQUESTS).unwrap();
}

/// Requests on one connection, and what came back.
fn load(pod: &Pod, url: &str, requests: u64) -> anyhow::Result<Value> {
    pod.load(&[url, "--requests", &requests.to_string()])
}

fn answered(pod: &Pod, url: &str, requests: u64) -> anyhow::Result<()> {
    let report = load(pod, url, requests)?;
    anyhow::ensure!(report["statuses"]["200"] == requests, "{report}");
    Ok(())
}

fn counted(agent: &Agent, reporter: &str) -> anyhow::Result<()> {
    let labels = [
        ("reporter", reporter),
        ("response_code", "418"),
        ("connection_security_policy", "mutual_tls"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/client"),
        ("destination_principal", "spiffe://cluster.local/ns/shop/sa/web"),
    ];
    let counted = agent.metrics()?.sum("istio_requests_total", &labels);
    anyhow::ensure!((counted - REQUESTS as f64).abs() < 0.1, "it counts {counted}");
    Ok(())
}
