//! Keeps the kernel's fast path in line with the documents, and its counts in the metrics.
//!
//! Invariants: what the kernel holds is the plan of the last [`FastPaths::apply`]; what it counted between two
//! workloads is reported as the proxy reports a connection between two of the node: by both, once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::ebpf::{Capture, CaptureError, FastPair, FastTraffic, MAX_BACKENDS};
use crate::fast_path::{self, Captured, Change, Plan};
use crate::metrics::{Metrics, Peers, Reporter, Security, TcpCounts};
use crate::model::{Destination, Service, Snapshot, Workload};

/// How often the kernel's counts reach the metrics.
const REPORT_EVERY: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub(super) struct FastPaths {
    capture: Capture,
    metrics: Metrics,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// What the plan was made from.
    snapshot: Arc<Snapshot>,
    captured: Captured,
    plan: Plan,
    /// Who the pairs are: a connection may outlive what tells that.
    named: HashMap<FastPair, Named>,
}

struct Named {
    client: Arc<Workload>,
    server: Arc<Workload>,
    service: Option<Arc<Service>>,
}

impl FastPaths {
    pub(super) fn new(capture: Capture, metrics: Metrics) -> Self {
        Self {
            capture,
            metrics,
            state: Arc::default(),
        }
    }

    /// Brings the kernel in line with what the documents say of those that are captured now.
    pub(super) fn apply(&self, snapshot: Arc<Snapshot>, captured: Captured) {
        let mut state = self.lock();
        if state.is_made_from(&snapshot, &captured) {
            state.snapshot = snapshot;
            return;
        }
        // While those that may be about to go can still be named.
        self.report_as(&mut state);
        let plan = fast_path::plan(&snapshot, &captured, MAX_BACKENDS);
        let failed = fast_path::changes(&state.plan, &plan)
            .filter_map(|change| self.make(&change).err())
            .fold((0, None), |(count, _), error| (count + 1, Some(error)));
        if let (count, Some(error)) = failed {
            tracing::error!(%error, count, "cannot change the fast path; see `mesh-agent get ebpf`");
        }
        state.plan = plan;
        state.snapshot = snapshot;
        state.captured = captured;
    }

    fn make(&self, change: &Change<'_>) -> Result<(), CaptureError> {
        match *change {
            Change::Open(client, to, backends) => self.capture.open_fast_path(client, to, backends),
            Change::Close(client, to) => self.capture.close_fast_path(client, to),
        }
    }

    /// Never ends.
    pub(super) async fn report(self) {
        let mut every = tokio::time::interval(REPORT_EVERY);
        loop {
            every.tick().await;
            let this = self.clone();
            // System calls for each pair: not on a runtime's thread.
            let reporting = tokio::task::spawn_blocking(move || this.report_as(&mut this.lock()));
            if let Err(error) = reporting.await {
                tracing::error!(%error, "the fast path's counts could not be read");
            }
        }
    }

    fn report_as(&self, state: &mut State) {
        let State {
            snapshot,
            captured,
            named,
            ..
        } = state;
        self.capture.report_fast_traffic(|pair, traffic| {
            if let Some(names) = Named::of(&pair, snapshot, captured) {
                named.insert(pair, names);
            }
            // Who is not captured yet will be.
            let Some(names) = named.get(&pair) else {
                return false;
            };
            names.record(&self.metrics, traffic);
            true
        });
        let is_here =
            |pair: &FastPair| captured.contains_key(&pair.client) && captured.contains_key(&pair.server);
        if named.keys().any(|pair| !is_here(pair)) {
            let gone = self
                .capture
                .forget_fast_traffic(|pair| named.contains_key(pair) && !is_here(pair));
            named.retain(|pair, _| !gone.contains(pair));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Of a change elsewhere in the mesh the plan learns nothing.
    fn is_made_from(&self, snapshot: &Snapshot, captured: &Captured) -> bool {
        let near = self.snapshot.near_services.ptr_eq(&snapshot.near_services);
        let workloads = self
            .captured
            .iter()
            .map(|(key, workload)| (key, Arc::as_ptr(workload)));
        near && workloads.eq(captured
            .iter()
            .map(|(key, workload)| (key, Arc::as_ptr(workload))))
    }
}

impl Named {
    fn of(pair: &FastPair, snapshot: &Snapshot, captured: &Captured) -> Option<Self> {
        Some(Self {
            client: Arc::clone(captured.get(&pair.client)?),
            server: Arc::clone(captured.get(&pair.server)?),
            service: service(snapshot, pair.destination)?,
        })
    }

    fn record(&self, metrics: &Metrics, traffic: FastTraffic) {
        for reporter in [Reporter::Source, Reporter::Destination] {
            let recorder = metrics.tcp(&Peers {
                reporter,
                source: Some(&self.client),
                source_identity: Some(&self.client.identity),
                destination: Some(&self.server),
                destination_identity: Some(&self.server.identity),
                service: self.service.as_deref(),
                // The kernel knows both as surely as certificates would tell.
                security: Security::MutualTls,
            });
            recorder.add(&TcpCounts {
                opened: traffic.opened,
                closed: traffic.closed,
                sent: traffic.sent,
                received: traffic.received,
            });
        }
    }
}

/// The service that was dialled, or that a workload's port belongs to; `None` when it is gone.
fn service(snapshot: &Snapshot, destination: SocketAddr) -> Option<Option<Arc<Service>>> {
    match snapshot.destination(destination) {
        Destination::Service(service, _) => Some(Some(service)),
        Destination::Workload(_) => Some(snapshot.target_service(destination).cloned()),
        Destination::UnknownPort(_) | Destination::Unknown => None,
    }
}
