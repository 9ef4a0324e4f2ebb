//! What the admin page and the metrics show of the kernel side.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use aya::Pod;
use mesh_common::{
    ListenerKey, NetAddr, NetPort, WorkloadEntry, WorkloadKey, counter, listener_kind, maps, workload_flags,
};
use serde::Serialize;

use super::features::Feature;
use super::maps::Table;
use super::programs::{self, HookState};
use super::{Shared, sys};

/// Everything about the kernel side, as it is now.
#[derive(Clone, Debug, Serialize)]
pub struct CaptureState {
    pub kernel: String,
    pub layout: &'static str,
    pub bpffs: PathBuf,
    pub features: [Feature; 4],
    pub links: Vec<HookState>,
    pub maps: Vec<MapState>,
    pub workloads: Vec<WorkloadState>,
}

/// How full a map is.
#[derive(Clone, Debug, Serialize)]
pub struct MapState {
    pub name: &'static str,
    pub entries: usize,
    pub capacity: u32,
}

/// A workload as the kernel side knows it.
#[derive(Clone, Debug, Serialize)]
pub struct WorkloadState {
    pub key: WorkloadKey,
    pub addresses: Vec<IpAddr>,
    pub hold: bool,
    /// An agent serves it.
    pub served: bool,
    pub outbound_port: u16,
    pub inbound_port: u16,
    pub dns_v4_port: u16,
    pub dns_v6_ports: Vec<u16>,
}

impl Shared {
    /// Every counter under its metric label, summed over the CPUs.
    pub(super) fn counters(&self) -> io::Result<Vec<(&'static str, u64)>> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        let read = |(counter, name): &(mesh_common::Counter, &'static str)| {
            let values = sys::lookup_per_cpu(self.maps.counters.fd().as_fd(), *counter as u32, cpus)?;
            Ok((*name, values.iter().sum()))
        };
        counter::ALL.iter().map(read).collect()
    }

    pub(super) fn state(&self) -> CaptureState {
        CaptureState {
            kernel: kernel_release(),
            layout: maps::LAYOUT,
            bpffs: self.folders.root.clone(),
            features: self.features.list(),
            links: programs::states(&self.folders),
            maps: vec![
                fill(maps::WORKLOADS, &self.maps.workloads),
                fill(maps::LISTENERS, &self.maps.listeners),
                fill(maps::OWN, &self.maps.own),
                fill(maps::FLOWS, &self.maps.flows),
                fill(maps::PRESENTED, &self.maps.presented),
                fill(maps::DNS_SERVERS, &self.maps.dns_servers),
                fill(maps::FAST, &self.maps.fast),
                fill(maps::FAST_TRAFFIC, &self.maps.fast_traffic),
            ],
            workloads: self.workloads(),
        }
    }

    fn workloads(&self) -> Vec<WorkloadState> {
        let listeners: HashSet<ListenerKey> = self.maps.listeners.keys().collect();
        let served = |workload| {
            listeners.contains(&ListenerKey {
                workload,
                kind: listener_kind::OUTBOUND,
                reserved: 0,
            })
        };
        self.maps
            .workloads
            .keys()
            .filter_map(|key| Some((key, self.maps.workloads.get(&key).ok().flatten()?)))
            .map(|(key, entry)| describe(key, &entry, served(key)))
            .collect()
    }
}

fn describe(key: WorkloadKey, entry: &WorkloadEntry, served: bool) -> WorkloadState {
    let present = |addr: &NetAddr| (!addr.is_none()).then(|| IpAddr::from(*addr));
    WorkloadState {
        key,
        addresses: [&entry.v4, &entry.v6].into_iter().filter_map(present).collect(),
        hold: entry.flags & workload_flags::HOLD != 0,
        served,
        outbound_port: entry.outbound_port.host(),
        inbound_port: entry.inbound_port.host(),
        dns_v4_port: entry.dns_v4_port.host(),
        dns_v6_ports: entry
            .dns_v6_ports
            .map(NetPort::host)
            .into_iter()
            .filter(|port| *port != 0)
            .collect(),
    }
}

fn fill<K: Pod, V: Pod>(name: &'static str, table: &Table<K, V>) -> MapState {
    MapState {
        name,
        entries: table.keys().count(),
        capacity: table.capacity(),
    }
}

fn kernel_release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |uname| uname.release().to_string_lossy().into_owned(),
    )
}
