//! A large mesh on paper: documents of many services with many endpoints, none of which is there.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::until_ok;

use crate::world::World;

pub(crate) const SERVICES: usize = 10_000;
pub(crate) const ENDPOINTS: usize = 100_000;
/// What reading them may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The documents, as long as this lives.
#[derive(Debug)]
pub(crate) struct Crowd(Vec<PathBuf>);

impl Crowd {
    /// One file per service: that is what changes at a time. No agent runs yet, which would read them one by one.
    pub(crate) fn write(world: &World) -> Result<Self> {
        let folder = world.mesh.run.dir().join("resources");
        let mut crowd = Self(Vec::with_capacity(SERVICES));
        for number in 0..SERVICES {
            let file = folder.join(format!("crowd-{number}.yaml"));
            fs::write(&file, service(number)?)?;
            crowd.0.push(file);
        }
        Ok(crowd)
    }

    /// Until the first node's agent knows them all.
    pub(crate) fn wait_known(world: &World) -> Result<()> {
        let agent = world.mesh.agents.first().context("no agent")?;
        until_ok("the agent to know all services", PATIENCE, || {
            let status = agent.get("/api/v1/status")?;
            let services = status["counts"]["services"].as_u64().context("no count")?;
            ensure!(services >= SERVICES as u64, "{services} so far");
            Ok(())
        })
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for file in &self.0 {
            if let Err(error) = fs::remove_file(file) {
                eprintln!("cannot remove {}: {error}", file.display());
            }
        }
    }
}

fn service(number: usize) -> Result<String> {
    let namespace = format!("ns-{}", number % 50);
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: svc-{number}, namespace: {namespace}}}\nspec:\n  \
         clusterIP: 10.97.{}.{}\n  ports: [{{name: http, port: 80, targetPort: 8080}}]\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: svc-{number}-a\n  \
         namespace: {namespace}\n  labels: {{kubernetes.io/service-name: svc-{number}}}\naddressType: IPv4\n\
         ports: [{{name: http, port: 8080, protocol: TCP}}]\nendpoints:\n",
        number >> 8,
        number & 0xff,
    );
    let each = ENDPOINTS / SERVICES;
    for endpoint in number * each..(number + 1) * each {
        writeln!(
            text,
            "- addresses: [10.{}.{}.{}]\n  conditions: {{ready: true, serving: true, terminating: false}}\n  \
             nodeName: node-{}\n  zone: zone-{}\n  targetRef: {{kind: Pod, name: svc-{number}-{endpoint}, \
             namespace: {namespace}}}",
            100 + (endpoint >> 16),
            endpoint >> 8 & 0xff,
            endpoint & 0xff,
            endpoint % 500,
            endpoint % 3,
        )?;
    }
    Ok(text)
}
