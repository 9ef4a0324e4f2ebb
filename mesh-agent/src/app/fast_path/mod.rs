//! Keeps the kernel's fast path in line with the documents, and its counts in the metrics.
//!
//! Invariants: what the kernel holds is the plan of the last [`FastPaths::apply`], but for changes that failed, which
//! are tried again with each report; what it counted between two workloads is reported as the proxy reports a
//! connection between two of the node: by both, once.

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::mem;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::ebpf::{Capture, CaptureError, FastPair, FastTraffic, MAX_BACKENDS};
use crate::fast_path::{self, Captured, Change, Key, Plan};
use crate::metrics::{Metrics, Peers, Reporter, Security, TcpCounts, TcpRecorder};
use crate::model::{Destination, Service, Snapshot, Workload};

/// How often the kernel's counts reach the metrics.
const REPORT_EVERY: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub(super) struct FastPaths {
    capture: Capture,
    metrics: Metrics,
    state: Arc<Mutex<State>>,
    /// How many the kernel holds. Beside `state`, which is locked while the kernel is told or asked.
    open: Arc<AtomicUsize>,
}

/// What is needed of the kernel side.
trait Kernel {
    /// Some kernels cannot.
    fn has_fast_path(&self) -> bool;
    fn open(&self, client: Key, to: SocketAddr, backends: &[(Key, SocketAddr)]) -> Result<(), CaptureError>;
    fn close(&self, client: Key, to: SocketAddr) -> Result<(), CaptureError>;
    fn report(&self, take: impl FnMut(FastPair, FastTraffic) -> bool);
    fn forget(&self, unwanted: impl Fn(&FastPair) -> bool) -> HashSet<FastPair>;
}

#[derive(Default)]
struct State {
    /// What the plan was made from.
    snapshot: Arc<Snapshot>,
    captured: Captured,
    held: Held,
    /// Who the pairs are: a connection may outlive what tells that.
    named: HashMap<FastPair, Named>,
}

/// What the kernel holds, as far as it did what it was told.
#[derive(Default)]
struct Held {
    plan: Plan,
    /// What may be open beside the plan, since it could not be closed.
    stuck: BTreeSet<(Key, SocketAddr)>,
    /// Changes that failed the last time.
    failed: usize,
}

struct Named {
    names: Names,
    /// Kept, since a series that nobody holds is dropped when nothing was counted in it for a while; a connection
    /// may be open for longer than that.
    recorders: [TcpRecorder; 2],
}

struct Names {
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
            open: Arc::default(),
        }
    }

    /// Pairs of a client and a destination that the kernel connects.
    pub(super) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Brings the kernel in line with what the documents say of those that are captured now.
    pub(super) fn apply(&self, snapshot: Arc<Snapshot>, captured: Captured) {
        let mut state = self.lock();
        if !state.needs(&snapshot, &captured) {
            state.snapshot = snapshot;
            return;
        }
        // While those that may be about to go can still be named.
        state.report(&self.capture, &self.metrics);
        state.snapshot = snapshot;
        state.captured = captured;
        self.change(&mut state);
    }

    /// Never ends.
    pub(super) async fn report(self) {
        let mut every = tokio::time::interval(REPORT_EVERY);
        loop {
            every.tick().await;
            let this = self.clone();
            // System calls for each pair: not on a runtime's thread.
            if let Err(error) = tokio::task::spawn_blocking(move || this.catch_up()).await {
                tracing::error!(%error, "the fast path's counts could not be read");
            }
        }
    }

    fn catch_up(&self) {
        let mut state = self.lock();
        state.report(&self.capture, &self.metrics);
        if state.held.failed > 0 {
            self.change(&mut state);
        }
    }

    fn change(&self, state: &mut State) {
        state.change(&self.capture);
        self.open.store(state.held.open(), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kernel for Capture {
    fn has_fast_path(&self) -> bool {
        self.features().fast_path()
    }

    fn open(&self, client: Key, to: SocketAddr, backends: &[(Key, SocketAddr)]) -> Result<(), CaptureError> {
        self.open_fast_path(client, to, backends)
    }

    fn close(&self, client: Key, to: SocketAddr) -> Result<(), CaptureError> {
        self.close_fast_path(client, to)
    }

    fn report(&self, take: impl FnMut(FastPair, FastTraffic) -> bool) {
        self.report_fast_traffic(take);
    }

    fn forget(&self, unwanted: impl Fn(&FastPair) -> bool) -> HashSet<FastPair> {
        self.forget_fast_traffic(unwanted)
    }
}

impl State {
    /// The kernel may have to be told something, or to be told it again.
    fn needs(&self, snapshot: &Snapshot, captured: &Captured) -> bool {
        self.held.failed > 0 || !self.is_made_from(snapshot, captured)
    }

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

    fn change(&mut self, kernel: &impl Kernel) {
        let plan = if kernel.has_fast_path() {
            fast_path::plan(&self.snapshot, &self.captured, MAX_BACKENDS)
        } else {
            Plan::default()
        };
        let before = self.held.failed;
        let error = self.held.become_plan(plan, kernel);
        let count = self.held.failed;
        // What fails each time alike is said once.
        if let Some(error) = error.filter(|_| count != before) {
            tracing::error!(%error, count, "cannot change the fast path yet; see `mesh-agent get ebpf`");
        }
    }

    fn report(&mut self, kernel: &impl Kernel, metrics: &Metrics) {
        let Self {
            snapshot,
            captured,
            named,
            ..
        } = self;
        kernel.report(|pair, traffic| {
            if let Some(names) = Names::of(&pair, snapshot, captured)
                && named.get(&pair).is_none_or(|known| !known.names.are(&names))
            {
                named.insert(pair, Named::new(names, metrics));
            }
            // Who is not captured yet will be.
            let Some(named) = named.get(&pair) else {
                return false;
            };
            named.record(traffic);
            true
        });
        // Of these nothing more can come: the plan leads nobody there.
        let gone = kernel.forget(|pair| Names::of(pair, snapshot, captured).is_none());
        named.retain(|pair, _| !gone.contains(pair));
    }
}

impl Held {
    /// Makes the kernel hold `wanted`, notes what of it failed, and returns the last error.
    fn become_plan(&mut self, mut wanted: Plan, kernel: &impl Kernel) -> Option<CaptureError> {
        let mut stuck = mem::take(&mut self.stuck);
        let again: Vec<_> = stuck
            .iter()
            .map(|(client, to)| Change::Close(*client, *to))
            .collect();
        let (mut refused, mut last) = (Vec::new(), None);
        self.failed = 0;
        for change in again.into_iter().chain(fast_path::changes(&self.plan, &wanted)) {
            let (pair, done) = match change {
                Change::Open(client, to, backends) => ((client, to), kernel.open(client, to, backends)),
                Change::Close(client, to) => ((client, to), kernel.close(client, to)),
            };
            let closed = if done.is_err() && matches!(change, Change::Open(..)) {
                refused.push(pair);
                // It must not lead where it led before either.
                kernel.close(pair.0, pair.1).is_ok()
            } else {
                done.is_ok()
            };
            if closed {
                stuck.remove(&pair);
            } else {
                stuck.insert(pair);
            }
            if let Err(error) = done {
                self.failed += 1;
                last = Some(error);
            }
        }
        for (client, to) in refused {
            if let Some(path) = wanted.get_mut(&to) {
                path.clients.remove(&client);
            }
        }
        self.plan = wanted;
        self.stuck = stuck;
        last
    }

    fn open(&self) -> usize {
        self.plan.values().map(|path| path.clients.len()).sum()
    }
}

impl Names {
    fn of(pair: &FastPair, snapshot: &Snapshot, captured: &Captured) -> Option<Self> {
        Some(Self {
            client: Arc::clone(captured.get(&pair.client)?),
            server: Arc::clone(captured.get(&pair.server)?),
            service: service(snapshot, pair.destination)?,
        })
    }

    fn are(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.client, &other.client)
            && Arc::ptr_eq(&self.server, &other.server)
            && self.service.as_ref().map(Arc::as_ptr) == other.service.as_ref().map(Arc::as_ptr)
    }
}

impl Named {
    fn new(names: Names, metrics: &Metrics) -> Self {
        let recorders = [Reporter::Source, Reporter::Destination].map(|reporter| {
            metrics.tcp(&Peers {
                reporter,
                source: Some(&names.client),
                source_identity: Some(&names.client.identity),
                destination: Some(&names.server),
                destination_identity: Some(&names.server.identity),
                service: names.service.as_deref(),
                // The kernel knows both as surely as certificates would tell.
                security: Security::MutualTls,
            })
        });
        Self { names, recorders }
    }

    fn record(&self, traffic: FastTraffic) {
        for recorder in &self.recorders {
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
