//! The fast path as the agent sees it: who may connect where without it, and what came of that.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;

use mesh_common::{
    FastBackend, FastKey, FastPath, MAX_FAST_BACKENDS, Traffic, TrafficKey, WorkloadKey, maps, traffic_kind,
};

use super::maps::{Maps, Table};
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
    /// it took it. What there is no room to note as reported is not reported, until there is.
    pub fn report_fast_traffic(&self, report: impl FnMut(FastPair, FastTraffic) -> bool) {
        report_rows(&self.shared.maps.fast_traffic, report);
    }

    /// Drops the rows of those pairs that `unwanted` names, that have no connection any more and of which everything
    /// is reported.
    pub fn forget_fast_traffic(&self, unwanted: impl Fn(&FastPair) -> bool) -> HashSet<FastPair> {
        forget_rows(&self.shared.maps.fast_traffic, unwanted)
    }
}

/// [`maps::FAST_TRAFFIC`]; a trait, so that a full one can be had without filling the kernel's.
trait Rows {
    fn counted(&self) -> HashSet<TrafficKey>;
    fn row(&self, key: &TrafficKey) -> Option<Traffic>;
    fn put(&self, key: &TrafficKey, row: &Traffic) -> io::Result<()>;
    /// With what was reported of it.
    fn drop_row(&self, key: &TrafficKey);
}

impl Rows for Table<TrafficKey, Traffic> {
    fn counted(&self) -> HashSet<TrafficKey> {
        self.keys()
            .filter(|key| key.kind == traffic_kind::COUNTED)
            .collect()
    }

    fn row(&self, key: &TrafficKey) -> Option<Traffic> {
        self.get(key).ok().flatten()
    }

    fn put(&self, key: &TrafficKey, row: &Traffic) -> io::Result<()> {
        self.insert(key, row)
    }

    fn drop_row(&self, key: &TrafficKey) {
        let _ = self.remove(key);
        let _ = self.remove(&reported(key));
    }
}

fn report_rows(rows: &impl Rows, mut report: impl FnMut(FastPair, FastTraffic) -> bool) {
    let mut no_room = (0, None);
    for key in rows.counted() {
        let Some(now) = rows.row(&key) else { continue };
        let noted = reported(&key);
        let before = rows.row(&noted);
        if now == before.unwrap_or_default() {
            continue;
        }
        // First: a full map takes no new row, but it lets one be replaced. What is reported and cannot be noted
        // would be reported again, each time.
        if before.is_none()
            && let Err(error) = rows.put(&noted, &Traffic::default())
        {
            no_room = (no_room.0 + 1, Some(error));
            continue;
        }
        if report(pair(&key), since(&now, &before.unwrap_or_default()))
            && let Err(error) = rows.put(&noted, &now)
        {
            tracing::warn!(%error, "cannot note what was counted on the fast path; it will be counted again");
        }
    }
    if let (pairs, Some(error)) = no_room {
        tracing::warn!(%error, pairs, "no room to note what was counted on the fast path; it is counted later");
    }
}

fn forget_rows(rows: &impl Rows, unwanted: impl Fn(&FastPair) -> bool) -> HashSet<FastPair> {
    let is_done = |key: &TrafficKey| {
        rows.row(key)
            .is_none_or(|row| row.opened == row.closed && row == rows.row(&reported(key)).unwrap_or_default())
    };
    let keys = rows.counted();
    let gone = keys.iter().filter(|key| unwanted(&pair(key)) && is_done(key));
    gone.map(|key| {
        rows.drop_row(key);
        pair(key)
    })
    .collect()
}

/// Nothing that an earlier agent allowed holds until this one has read the documents.
pub(super) fn close_all(maps: &Maps) -> Result<(), CaptureError> {
    let open: HashSet<_> = maps.fast.keys().collect();
    for key in &open {
        maps.fast.remove(key).map_err(|source| CaptureError::Map {
            map: maps::FAST,
            source,
        })?;
    }
    Ok(())
}

/// Nobody can say any more who a workload was that went while no agent was there.
pub(super) fn forget(maps: &Maps, workload: WorkloadKey) {
    let rows = &maps.fast_traffic;
    for key in rows
        .counted()
        .iter()
        .filter(|key| key.client == workload || key.server == workload)
    {
        rows.drop_row(key);
    }
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
