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
pub(crate) struct Crowd(PathBuf);

impl Crowd {
    /// One file per service: that is what changes at a time.
    pub(crate) fn write(world: &World) -> Result<Self> {
        let aside = world.mesh.run.dir().join("crowd");
        fs::create_dir(&aside)?;
        for number in 0..SERVICES {
            fs::write(aside.join(format!("service-{number}.yaml")), service(number)?)?;
        }
        let folder = world.mesh.run.dir().join("resources").join("crowd");
        // All at once: an agent that runs reads them once.
        fs::rename(aside, &folder)?;
        Ok(Self(folder))
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
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
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
