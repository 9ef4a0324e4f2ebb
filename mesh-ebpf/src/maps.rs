//! Every map. The agent pins them under these names.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, SockHash};
use mesh_common::maps::{
    MAX_DNS_SERVERS, MAX_FAST, MAX_FAST_TRAFFIC, MAX_FLOWS, MAX_LISTENERS, MAX_OWN, MAX_PRESENTED,
    MAX_REFUSED, MAX_WORKLOADS,
};
use mesh_common::{
    Counter, DnsKey, FastKey, FastPath, Flow, FlowKey, ListenerKey, NetEndpoint, OwnSocket, Settings,
    SocketRecord, Traffic, TrafficKey, WorkloadEntry, counter,
};

#[map]
pub(crate) static WORKLOADS: HashMap<u64, WorkloadEntry> = HashMap::with_max_entries(MAX_WORKLOADS, 0);
#[map]
pub(crate) static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(MAX_LISTENERS, 0);
#[map]
pub(crate) static OWN: HashMap<u64, OwnSocket> = HashMap::with_max_entries(MAX_OWN, 0);
#[map]
pub(crate) static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(MAX_FLOWS, 0);
#[map]
pub(crate) static PRESENTED: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(MAX_PRESENTED, 0);
#[map]
pub(crate) static REFUSED: LruHashMap<FlowKey, u32> = LruHashMap::with_max_entries(MAX_REFUSED, 0);
// These three are sized for the worst case, which nearly never is: so not allocated ahead.
#[map]
pub(crate) static DNS_SERVERS: HashMap<DnsKey, NetEndpoint> =
    HashMap::with_max_entries(MAX_DNS_SERVERS, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static FAST: HashMap<FastKey, FastPath> = HashMap::with_max_entries(MAX_FAST, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static FAST_TRAFFIC: HashMap<TrafficKey, Traffic> =
    HashMap::with_max_entries(MAX_FAST_TRAFFIC, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);
#[map]
pub(crate) static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
#[btf_map]
pub(crate) static SOCKETS: SkStorage<SocketRecord> = SkStorage::new();

#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the kernel's pointer to this CPU's slot. A program may be interrupted by another on the same
        // CPU, so a count may get lost in theory; it can never tear.
        unsafe { *slot += 1 };
    }
}
