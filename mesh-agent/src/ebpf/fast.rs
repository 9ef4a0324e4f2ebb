//! The fast path as the agent sees it: who may connect where without it, and what came of that.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;

use mesh_common::{
    FastBackend, FastKey, FastPath, MAX_FAST_BACKENDS, Traffic, TrafficKey, WorkloadKey, maps, traffic_kind,
};

use super::maps::Maps;
use super::{Capture, CaptureError};

/// Backends that one destination can have on the fast path.
pub const MAX_BACKENDS: usize = MAX_FAST_BACKENDS;

/// Who talked to whom, by way of which destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FastPair {
    pub client: WorkloadKey,
    pub server: WorkloadKey,
    /// As the client dialled it.
    pub destination: SocketAddr,
}

/// What a pair did on the fast path; the bytes are those of closed connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FastTraffic {
    pub opened: u64,
    pub closed: u64,
    /// From the client.
    pub received: u64,
    /// To the client.
    pub sent: u64,
}

impl Capture {
    /// From now on the kernel connects `client` to one of `backends` when it dials `destination`, as long as an
    /// agent is alive. One to [`MAX_BACKENDS`], all of the destination's address family.
    pub fn open_fast_path(
        &self,
        client: WorkloadKey,
        destination: SocketAddr,
        backends: &[(WorkloadKey, SocketAddr)],
    ) -> Result<(), CaptureError> {
        let failed = |source| CaptureError::Map {
            map: maps::FAST,
            source,
        };
        if backends.is_empty() || backends.len() > MAX_BACKENDS {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        let mut path = FastPath {
            count: u32::try_from(backends.len()).unwrap_or_default(),
            reserved: 0,
            backends: [FastBackend::NONE; MAX_BACKENDS],
        };
        for (slot, (server, endpoint)) in path.backends.iter_mut().zip(backends) {
            slot.server = *server;
            slot.endpoint = (*endpoint).into();
        }
        let maps = &self.shared.maps;
        maps.fast.insert(&key(client, destination), &path).map_err(failed)
    }

    /// From now on such connections come to the agent again.
    pub fn close_fast_path(&self, client: WorkloadKey, destination: SocketAddr) -> Result<(), CaptureError> {
        let removed = self.shared.maps.fast.remove(&key(client, destination));
        removed.map(drop).map_err(|source| CaptureError::Map {
            map: maps::FAST,
            source,
        })
    }

    /// Hands what was counted since the last time, by this agent or one before it, to `report`, which says whether
    /// it took it.
    pub fn report_fast_traffic(&self, mut report: impl FnMut(FastPair, FastTraffic) -> bool) {
        let rows = &self.shared.maps.fast_traffic;
        let counted: HashSet<_> = rows.keys().filter(is_counted).collect();
        for key in counted {
            let Ok(Some(now)) = rows.get(&key) else { continue };
            let reported = reported(&key);
            let before = rows.get(&reported).ok().flatten().unwrap_or_default();
            if now == before || !report(pair(&key), since(&now, &before)) {
                continue;
            }
            if let Err(error) = rows.insert(&reported, &now) {
                tracing::warn!(%error, "cannot note what was counted on the fast path; it is counted twice");
            }
        }
    }

    /// Drops the rows of those pairs that `unwanted` names and that have no connection any more.
    pub fn forget_fast_traffic(&self, unwanted: impl Fn(&FastPair) -> bool) -> HashSet<FastPair> {
        let rows = &self.shared.maps.fast_traffic;
        let keys: HashSet<_> = rows.keys().filter(is_counted).collect();
        let is_idle = |key: &TrafficKey| {
            let row = rows.get(key).ok().flatten();
            row.is_none_or(|row| row.opened == row.closed)
        };
        let gone = keys.iter().filter(|key| unwanted(&pair(key)) && is_idle(key));
        gone.map(|key| {
            drop_row(&self.shared.maps, key);
            pair(key)
        })
        .collect()
    }
}

/// Nothing that an earlier agent allowed holds until this one has read the documents.
pub(super) fn close_all(maps: &Maps) {
    let open: HashSet<_> = maps.fast.keys().collect();
    for key in &open {
        let _ = maps.fast.remove(key);
    }
}

/// Nobody can say any more who a workload was that went while no agent was there.
pub(super) fn forget(maps: &Maps, workload: WorkloadKey) {
    let rows: HashSet<_> = maps.fast_traffic.keys().filter(is_counted).collect();
    for key in rows
        .iter()
        .filter(|key| key.client == workload || key.server == workload)
    {
        drop_row(maps, key);
    }
}

fn drop_row(maps: &Maps, key: &TrafficKey) {
    let _ = maps.fast_traffic.remove(key);
    let _ = maps.fast_traffic.remove(&reported(key));
}

fn key(client: WorkloadKey, destination: SocketAddr) -> FastKey {
    FastKey {
        client,
        destination: destination.into(),
        reserved: 0,
    }
}

fn pair(key: &TrafficKey) -> FastPair {
    FastPair {
        client: key.client,
        server: key.server,
        destination: key.destination.into(),
    }
}

fn is_counted(key: &TrafficKey) -> bool {
    key.kind == traffic_kind::COUNTED
}

fn reported(key: &TrafficKey) -> TrafficKey {
    TrafficKey {
        kind: traffic_kind::REPORTED,
        ..*key
    }
}

/// A row that was dropped and made anew begins at zero.
fn since(now: &Traffic, before: &Traffic) -> FastTraffic {
    FastTraffic {
        opened: now.opened.saturating_sub(before.opened),
        closed: now.closed.saturating_sub(before.closed),
        received: now.received.saturating_sub(before.received),
        sent: now.sent.saturating_sub(before.sent),
    }
}
