//! What is in `deploy/`, tried with a real agent.

use std::fs;
use std::process::Command;

use mesh_tests::{Options, shell};

use crate::common::{HTTP, wait_for, web_with};

const UNIT: &str = include_str!("../../deploy/mesh-agent.service");

/// The capabilities that the systemd unit leaves the agent, without their prefix.
fn capabilities() -> Vec<String> {
    let line = UNIT
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    line.unwrap()
        .split(' ')
        .map(|name| name.strip_prefix("CAP_").unwrap().to_lowercase())
        .collect()
}

#[test]
fn the_unit_leaves_the_agent_what_it_needs() {
    let capabilities = capabilities();
    let set = format!("-all,+{}", capabilities.join(",+"));
    assert!(UNIT.contains("\nNoNewPrivileges=yes\n"));
    let mut web = web_with(&Options {
        under: ["setpriv", "--no-new-privs", "--bounding-set", &set]
            .map(str::to_owned)
            .into(),
        ..Options::default()
    });
    for agent in &mut web.mesh.agents {
        let status = format!("/proc/{}/status", agent.process().unwrap().id());
        let status = fs::read_to_string(status).unwrap();
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:\t"))
            .unwrap();
        let count = u64::from_str_radix(effective, 16).unwrap().count_ones();
        assert_eq!(count as usize, capabilities.len(), "{effective}");
    }
    // Names are answered, and requests carried.
    assert_eq!(
        wait_for(&web.client, "http://web.shop/").header("x-pod"),
        Some("web")
    );

    // A pod whose namespace has no name, only a process.
    let mut nameless = web.mesh.stranger("nameless", 1).unwrap();
    nameless.serve(&web.mesh.run, "http", HTTP).unwrap();
    let pids = shell::output(Command::new("ip").args(["netns", "pids", nameless.netns.name()])).unwrap();
    let pid = pids.lines().next().unwrap();
    let document = format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: nameless\n  namespace: shop\n  annotations:\n    \
         mesh-agent.dev/netns: /proc/{pid}/ns/net\nspec:\n  nodeName: node-b\n  serviceAccountName: nameless\n\
         status:\n  podIP: {}\n",
        nameless.v4
    );
    web.mesh.apply("pod-nameless", &document).unwrap();
    web.mesh.wait_known(&nameless).unwrap();
    let got = wait_for(&web.client, &format!("http://{}/", nameless.at(HTTP)));
    assert_eq!(got.header("x-pod"), Some("nameless"));
}
