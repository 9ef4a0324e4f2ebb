//! What the parts know, in the words of the admin page.

use std::net::IpAddr;

use super::fast_path::FastPaths;
use crate::admin::{self, Ask, api, time};
use crate::config::{AccessLogFormat, AgentConfig, LogFormat};
use crate::ebpf::{Capture, Feature};
use crate::proxy::{Connections, Direction};
use crate::tls::Unsupported;

pub(super) fn config(config: &AgentConfig) -> serde_json::Value {
    serde_json::json!({
        "node": config.node,
        "trustDomain": config.trust_domain,
        "clusterDomain": config.cluster_domain,
        "resources": { "files": config.files },
        "identity": { "ca": { "directory": config.ca_directory } },
        "admin": { "address": config.admin },
        "metrics": { "address": config.metrics },
        "stateDir": config.state_dir,
        "bpffs": config.bpffs,
        "kernelTls": config.kernel_tls,
        "accessLog": { "format": match config.access_log {
            AccessLogFormat::Off => "off",
            AccessLogFormat::Text => "text",
            AccessLogFormat::Json => "json",
        } },
        "log": { "level": config.log_level, "format": match config.log_format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        } },
        "drain": humantime::format_duration(config.drain).to_string(),
    })
}

pub(super) fn connections(connections: Connections) -> Ask<Vec<api::Connection>> {
    Box::new(move || {
        let shown = connections.list().into_iter().map(|connection| {
            let (namespace, name) = connection
                .workload
                .split_once('/')
                .unwrap_or(("", &connection.workload));
            let (received, sent) = connection.moved();
            api::Connection {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                direction: match connection.direction {
                    Direction::Outbound => "outbound",
                    Direction::Inbound => "inbound",
                }
                .to_owned(),
                protocol: connection.protocol.get().copied().unwrap_or_default().to_owned(),
                peer: connection.peer.to_string(),
                destination: connection.destination.to_string(),
                peer_identity: connection.peer_identity.get().cloned(),
                start_time: time(connection.since),
                bytes_received: received,
                bytes_sent: sent,
            }
        });
        shown.collect()
    })
}

/// Of what the kernel side counts only the counters, not the maps: these may have an entry for each pair.
pub(super) fn fast_paths(capture: Capture, fast_paths: FastPaths) -> Ask<admin::FastPaths> {
    Box::new(move || {
        let counters = capture.counters().unwrap_or_default();
        let made = counters.iter().find(|(reason, _)| *reason == "fast_path");
        admin::FastPaths {
            open: fast_paths.open(),
            connections: made.map_or(0, |(_, count)| *count),
        }
    })
}

/// With the one that is of interest only to who asked for it, if the kernel lacks it.
pub(super) fn all_features(in_ebpf: &[Feature], without_kernel: Option<&Unsupported>) -> Vec<api::Feature> {
    let mut all = features(in_ebpf);
    all.extend(without_kernel.map(|error| api::Feature {
        name: "kernelTls".to_owned(),
        present: false,
        since: "5.11".to_owned(),
        without: format!("the agent encrypts, since {error}"),
    }));
    all
}

fn features(features: &[Feature]) -> Vec<api::Feature> {
    let shown = features.iter().map(|feature| api::Feature {
        name: feature.name.to_owned(),
        present: feature.present,
        since: feature.since.to_owned(),
        without: feature.without.to_owned(),
    });
    shown.collect()
}

pub(super) fn ebpf(capture: Capture) -> Ask<api::Ebpf> {
    Box::new(move || {
        let state = capture.state();
        let counters = capture.counters().unwrap_or_default();
        let hook = |hook: crate::ebpf::HookState| api::Hook {
            name: hook.name,
            program_id: hook.program_id,
            link_id: hook.link_id,
        };
        let map = |map: crate::ebpf::MapState| api::Map {
            name: map.name.to_owned(),
            entries: map.entries,
            capacity: map.capacity,
        };
        let workload = |workload: crate::ebpf::WorkloadState| api::CapturedWorkload {
            key: workload.key.to_string(),
            addresses: workload.addresses.iter().map(IpAddr::to_string).collect(),
            hold: workload.hold,
            served: workload.served,
            outbound_port: workload.outbound_port,
            inbound_port: workload.inbound_port,
        };
        api::Ebpf {
            state: "attached".to_owned(),
            message: String::new(),
            kernel: state.kernel,
            layout: state.layout.to_owned(),
            bpffs: state.bpffs.display().to_string(),
            features: features(&state.features),
            hooks: state.links.into_iter().map(hook).collect(),
            maps: state.maps.into_iter().map(map).collect(),
            workloads: state.workloads.into_iter().map(workload).collect(),
            counters: counters
                .into_iter()
                .map(|(reason, count)| (reason.to_owned(), count))
                .collect(),
        }
    })
}
