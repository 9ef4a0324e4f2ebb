//! Typed handles to the pinned maps.
//!
//! Invariant: a [`Table`] exists only for a map whose key and value sizes are those of its types.

use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};
use std::path::Path;

use aya::Pod;
use mesh_common::{
    DnsKey, FastKey, FastPath, Flow, FlowKey, ListenerKey, NetEndpoint, OwnSocket, Settings, Traffic,
    TrafficKey, WorkloadEntry, WorkloadKey, maps,
};

use super::CaptureError;
use super::sys;

/// Every map that the agent reads or writes.
#[derive(Debug)]
pub(super) struct Maps {
    pub(super) workloads: Table<WorkloadKey, WorkloadEntry>,
    pub(super) listeners: Table<ListenerKey, u32>,
    pub(super) own: Table<u64, OwnSocket>,
    pub(super) flows: Table<FlowKey, Flow>,
    pub(super) presented: Table<FlowKey, Flow>,
    pub(super) dns_servers: Table<DnsKey, NetEndpoint>,
    pub(super) fast: Table<FastKey, FastPath>,
    pub(super) fast_traffic: Table<TrafficKey, Traffic>,
    pub(super) settings: Table<u32, Settings>,
    pub(super) counters: Table<u32, u64>,
}

impl Maps {
    /// Opens the maps pinned in `folder`.
    pub(super) fn open(folder: &Path) -> Result<Self, CaptureError> {
        Ok(Self {
            workloads: Table::open(folder, maps::WORKLOADS)?,
            listeners: Table::open(folder, maps::LISTENERS)?,
            own: Table::open(folder, maps::OWN)?,
            flows: Table::open(folder, maps::FLOWS)?,
            presented: Table::open(folder, maps::PRESENTED)?,
            dns_servers: Table::open(folder, maps::DNS_SERVERS)?,
            fast: Table::open(folder, maps::FAST)?,
            fast_traffic: Table::open(folder, maps::FAST_TRAFFIC)?,
            settings: Table::open(folder, maps::SETTINGS)?,
            counters: Table::open(folder, maps::COUNTERS)?,
        })
    }
}

/// A map with keys `K` and values `V`.
#[derive(Debug)]
pub(super) struct Table<K, V> {
    fd: OwnedFd,
    capacity: u32,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    pub(super) fn open(folder: &Path, name: &'static str) -> Result<Self, CaptureError> {
        let path = folder.join(name);
        let fd = sys::open_pin(&path).map_err(|source| CaptureError::Pin {
            path: path.clone(),
            source,
        })?;
        let info = sys::map_info(fd.as_fd()).map_err(|source| CaptureError::Pin {
            path: path.clone(),
            source,
        })?;
        if (info.key_size as usize, info.value_size as usize) != (size_of::<K>(), size_of::<V>()) {
            return Err(CaptureError::ForeignMap { path });
        }
        Ok(Self {
            fd,
            capacity: info.max_entries,
            types: PhantomData,
        })
    }

    pub(super) fn get(&self, key: &K) -> io::Result<Option<V>> {
        sys::lookup(self.fd.as_fd(), key)
    }

    pub(super) fn insert(&self, key: &K, value: &V) -> io::Result<()> {
        sys::update(self.fd.as_fd(), key, value)
    }

    /// True if there was such a key.
    pub(super) fn remove(&self, key: &K) -> io::Result<bool> {
        sys::delete(self.fd.as_fd(), key)
    }

    /// Some entries may be missed or seen twice while others are removed: for sweeping and counting only.
    pub(super) fn keys(&self) -> impl Iterator<Item = K> {
        let mut last = None;
        // A key removed meanwhile starts the kernel's walk over, hence the limit.
        (0..u64::from(self.capacity) * 2).map_while(move |_| {
            last = sys::next_key(self.fd.as_fd(), last.as_ref()).ok().flatten();
            last
        })
    }

    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Table<ListenerKey, u32> {
    /// Makes the kernel side hand connections to `socket`, for as long as it is open.
    pub(super) fn insert_socket(&self, key: &ListenerKey, socket: &impl AsRawFd) -> io::Result<()> {
        self.insert(key, &socket.as_raw_fd().unsigned_abs())
    }
}
