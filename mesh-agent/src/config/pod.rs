//! `v1` Pod: what a mesh reads of it. Fields that mean nothing to a mesh are let be.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::check::{DNS_SUBDOMAIN, Issue, Issues, Port, address, is_dns_subdomain, typed};
use super::resource::{Labels, Meta};
use crate::model::{OnAgentDown, Place};

/// What annotations of this project begin with.
const OURS: &str = "mesh-agent.dev/";
pub(crate) const NETNS: &str = "mesh-agent.dev/netns";
pub(crate) const CGROUP: &str = "mesh-agent.dev/cgroup";
/// Of Services, too.
pub(crate) const FAST_PATH: &str = "mesh-agent.dev/fast-path";
pub(crate) const ON_AGENT_DOWN: &str = "mesh-agent.dev/on-agent-down";

#[derive(Debug, PartialEq)]
pub(crate) struct Pod {
    pub(crate) labels: Labels,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) node: Arc<str>,
    pub(crate) service_account: Arc<str>,
    /// It shares its node's network namespace, so its addresses are the node's, not its own.
    pub(crate) host_network: bool,
    /// It ended: its addresses may belong to another by now.
    pub(crate) finished: bool,
    /// It takes new connections.
    pub(crate) ready: bool,
    /// Named TCP ports of its containers.
    pub(crate) ports: BTreeMap<Box<str>, u16>,
    pub(crate) place: Option<Place>,
    pub(crate) on_agent_down: Option<OnAgentDown>,
    pub(crate) fast_path: bool,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RawSpec {
    node_name: String,
    service_account_name: Option<String>,
    host_network: bool,
    containers: Vec<RawContainer>,
    /// Those with `restartPolicy: Always` are sidecars and may serve.
    init_containers: Vec<RawContainer>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawContainer {
    ports: Vec<RawPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    container_port: Port,
    protocol: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RawStatus {
    phase: String,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<RawPodIp>,
    conditions: Option<Vec<RawCondition>>,
}

#[derive(Deserialize)]
struct RawPodIp {
    ip: String,
}

#[derive(Deserialize)]
struct RawCondition {
    r#type: String,
    status: String,
}

impl Pod {
    pub(super) fn parse(
        meta: Meta,
        spec: Value,
        mut whole: Value,
        issues: &mut Issues,
    ) -> Result<Self, Issue> {
        let spec: RawSpec = typed(spec, "spec")?;
        let status: RawStatus = match whole.get_mut("status").map(Value::take) {
            Some(status) => typed(status, "status")?,
            None => RawStatus::default(),
        };
        let known = [NETNS, CGROUP, ON_AGENT_DOWN, FAST_PATH];
        known_annotations(&meta.annotations, &known, issues);
        let place = place(&meta.annotations, issues);
        let service_account = spec.service_account_name.unwrap_or_else(|| "default".to_owned());
        if !is_dns_subdomain(&service_account) {
            issues.error(
                "spec.serviceAccountName",
                format!("{service_account:?} is not a name; {DNS_SUBDOMAIN}"),
            );
        }
        let finished = matches!(status.phase.as_str(), "Succeeded" | "Failed");
        let addresses = addresses(&status, issues);
        if place.is_some() && spec.node_name.is_empty() {
            issues.error("spec.nodeName", "needed for a Pod that says where it runs");
        }
        if matches!(place, Some(Place::Netns(_))) && addresses.is_empty() && !finished {
            issues.error("status.podIP", "needed for a Pod that says where it runs");
        }
        if spec.host_network && matches!(place, Some(Place::Netns(_))) {
            issues.error(
                annotation_path(NETNS),
                format!("a Pod in the host's network has no network namespace of its own; allowed: {CGROUP}"),
            );
        }
        // A document written by hand has no conditions: its pod is there, so it is ready.
        let ready = status.conditions.is_none_or(|conditions| {
            conditions
                .iter()
                .any(|condition| condition.r#type == "Ready" && condition.status == "True")
        });
        Ok(Self {
            addresses,
            node: spec.node_name.into(),
            service_account: service_account.into(),
            host_network: spec.host_network || matches!(place, Some(Place::Cgroup(_))),
            finished,
            ready: ready && !meta.deleting,
            ports: named_ports(spec.containers.into_iter().chain(spec.init_containers)),
            on_agent_down: on_agent_down(&meta.annotations, issues),
            fast_path: fast_path(&meta.annotations, issues),
            place,
            labels: meta.labels,
        })
    }
}

fn named_ports(containers: impl Iterator<Item = RawContainer>) -> BTreeMap<Box<str>, u16> {
    containers
        .flat_map(|container| container.ports)
        .filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"))
        .filter_map(|port| Some((port.name?.into(), port.container_port.0)))
        .collect()
}

fn addresses(status: &RawStatus, issues: &mut Issues) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    let first = status.pod_ip.iter().map(|ip| ("status.podIP".to_owned(), ip));
    let others = status
        .pod_ips
        .iter()
        .enumerate()
        .map(|(index, entry)| (format!("status.podIPs[{index}].ip"), &entry.ip));
    for (path, text) in first.chain(others) {
        match address(text) {
            Ok(address) if addresses.contains(&address) => {}
            Ok(address) => addresses.push(address),
            Err(message) => issues.error(path, message),
        }
    }
    addresses
}

fn place(annotations: &BTreeMap<String, String>, issues: &mut Issues) -> Option<Place> {
    let mut path = |annotation: &str| {
        let text = annotations.get(annotation)?;
        match absolute(text) {
            Some(path) => Some(path),
            None => {
                issues.error(
                    annotation_path(annotation),
                    format!("{text:?} is not a place; allowed: an absolute path without `..`"),
                );
                None
            }
        }
    };
    let (netns, cgroup) = (path(NETNS), path(CGROUP));
    match (netns, cgroup) {
        (Some(_), Some(_)) => {
            issues.error(
                annotation_path(CGROUP),
                format!("a Pod runs in one place; allowed: either {NETNS} or {CGROUP}"),
            );
            None
        }
        (Some(path), None) => Some(Place::Netns(path)),
        (None, Some(path)) => Some(Place::Cgroup(path)),
        (None, None) => None,
    }
}

fn absolute(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    let plain = path
        .components()
        .all(|component| matches!(component, Component::RootDir | Component::Normal(_)));
    (path.is_absolute() && plain && !text.contains('\0')).then(|| path.to_owned())
}

fn on_agent_down(annotations: &BTreeMap<String, String>, issues: &mut Issues) -> Option<OnAgentDown> {
    match annotations.get(ON_AGENT_DOWN)?.as_str() {
        "hold" => Some(OnAgentDown::Hold),
        "open" => Some(OnAgentDown::Open),
        other => {
            issues.error(
                annotation_path(ON_AGENT_DOWN),
                format!("`{other}` is unknown; allowed: hold, open"),
            );
            None
        }
    }
}

/// Whether connections may go without the proxy where that would only copy.
pub(crate) fn fast_path(annotations: &BTreeMap<String, String>, issues: &mut Issues) -> bool {
    match annotations.get(FAST_PATH).map(String::as_str) {
        None | Some("auto") => true,
        Some("off") => false,
        Some(other) => {
            issues.error(
                annotation_path(FAST_PATH),
                format!("`{other}` is unknown; allowed: auto, off"),
            );
            true
        }
    }
}

/// A misspelt one would be a wish that nobody hears.
pub(crate) fn known_annotations(annotations: &BTreeMap<String, String>, known: &[&str], issues: &mut Issues) {
    let ours = annotations.keys().filter(|name| name.starts_with(OURS));
    for unknown in ours.filter(|name| !known.contains(&name.as_str())) {
        let message = format!("unknown annotation; allowed: {}", known.join(", "));
        issues.error(annotation_path(unknown), message);
    }
}

/// `metadata.annotations[mesh-agent.dev/netns]`
pub(crate) fn annotation_path(annotation: &str) -> String {
    format!("metadata.annotations[{annotation}]")
}
