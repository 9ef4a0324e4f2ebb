//! The data path: every captured byte goes through here.
//!
//! Outbound: [`outbound`] asks where a connection wanted to go, finds out what it speaks, and either copies it or
//! serves it as HTTP, each request routed, balanced and tried by [`outbound_http`]. Inbound: whatever way in,
//! [`inbound`] brings it to one pipeline (detect, authorize, measure, deliver).
//!
//! Invariants: no eBPF, no files, no documents here, only the store's snapshot and the [`sock`](crate::sock)
//! traits; every loop, queue, pool and buffer has a named bound; a panic in one connection ends that one.

mod app_pool;
mod app_streams;
mod asked;
mod body;
mod context;
mod detect;
mod door;
mod error;
mod failure;
mod first_line;
mod hangup;
mod headers;
mod inbound;
mod inbound_http;
mod listener;
mod mesh_connection;
mod mesh_pool;
mod mesh_serve;
mod mesh_stream;
mod message;
mod outbound;
mod outbound_http;
mod record;
mod recorders;
mod replay;
mod reply;
mod serve;
mod session;
mod stream;
mod stream_body;
mod tcp;
mod upgrade;
mod upstream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;

pub use context::{Connection, Connections, Direction, Local, Locals, Usage};

use crate::balance::REST;
use crate::drain::DrainWatcher;
use crate::identity::Identities;
use crate::lanes::{Lanes, PerLane};
use crate::metrics::Metrics;
use crate::model::Endpoint;
use crate::retry::Budget;
use crate::store::Store;
use crate::telemetry::AccessLog;
use crate::tls::{RecordLayer, Stream};

/// Where agents meet (Istio's HBONE port).
pub const HBONE_PORT: u16 = 15008;
/// Istio's default `connectTimeout`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often unused connections are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// What the proxy is made of.
#[derive(Debug)]
pub struct Inputs {
    pub store: Store,
    pub identities: Identities,
    /// Of connections between agents.
    pub layer: RecordLayer,
    pub metrics: Metrics,
    pub access_log: AccessLog,
    pub lanes: Lanes,
}

/// What an mTLS connection needs.
#[derive(Clone, Debug)]
pub(crate) struct TlsParts {
    pub(crate) identities: Identities,
    pub(crate) layer: RecordLayer,
    pub(crate) metrics: Metrics,
}

impl TlsParts {
    /// Counts a connection that the kernel encrypts.
    fn count(&self, stream: &Stream) {
        if matches!(stream, Stream::Kernel(_)) {
            self.metrics.agent().kernel_tls_connections.inc();
        }
    }
}

/// The proxy that all workloads of the node share.
#[derive(Debug)]
pub struct Proxy {
    pub(crate) store: Store,
    tls: TlsParts,
    access_log: AccessLog,
    pub locals: Locals,
    pub connections: Connections,
    lanes: Lanes,
    /// Each lane has its own: a request never waits for another core.
    mesh: PerLane<mesh_pool::MeshPool>,
    retries: Budget,
    turns: PerLane<AtomicU64>,
    started: tokio::time::Instant,
}

impl Proxy {
    pub fn new(inputs: Inputs) -> Arc<Self> {
        let tls = TlsParts {
            identities: inputs.identities,
            layer: inputs.layer,
            metrics: inputs.metrics,
        };
        Arc::new(Self {
            store: inputs.store,
            mesh: inputs.lanes.each(|| mesh_pool::MeshPool::new(tls.clone())),
            tls,
            access_log: inputs.access_log,
            locals: Locals::default(),
            connections: Connections::default(),
            retries: Budget::new(Duration::ZERO),
            // Each begins elsewhere, or all would ask the same endpoint at the same time.
            turns: inputs.lanes.each(|| AtomicU64::new(fastrand::u64(..))),
            lanes: inputs.lanes,
            started: tokio::time::Instant::now(),
        })
    }

    /// Serves what the workload's applications open, until the workload is released or the agent drains.
    pub async fn serve_outbound(
        self: Arc<Self>,
        local: Arc<Local>,
        listener: TcpListener,
        drain: DrainWatcher,
    ) {
        let lanes = self.lanes.clone();
        listener::accept(&lanes, listener, local, drain, move |accepted| {
            outbound::serve(Arc::clone(&self), accepted)
        })
        .await;
    }

    /// Serves what comes to the workload from outside, until the workload is released or the agent drains.
    pub async fn serve_inbound(
        self: Arc<Self>,
        local: Arc<Local>,
        listener: TcpListener,
        drain: DrainWatcher,
    ) {
        let lanes = self.lanes.clone();
        listener::accept(&lanes, listener, local, drain, move |accepted| {
            inbound::serve(Arc::clone(&self), accepted)
        })
        .await;
    }

    /// Keeps house until the agent drains.
    pub async fn sweep(self: Arc<Self>, mut drain: DrainWatcher) {
        let mut every = tokio::time::interval(SWEEP_EVERY);
        loop {
            tokio::select! {
                _ = every.tick() => {
                    self.mesh.iter().for_each(mesh_pool::MeshPool::sweep);
                    let mut pooled: usize = self.mesh.iter().map(mesh_pool::MeshPool::connections).sum();
                    for apps in self.locals.all().iter().flat_map(|local| local.apps.iter()) {
                        apps.sweep();
                        pooled += apps.kept();
                    }
                    self.metrics().agent().pool_connections.set(i64::try_from(pooled).unwrap_or(i64::MAX));
                }
                () = drain.draining() => return,
            }
        }
    }

    /// Ends all that is done for a workload that is gone.
    pub fn forget(&self, local: &Local) {
        local.release();
        for mesh in self.mesh.iter() {
            mesh.forget(local.enrolment);
        }
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.tls.metrics
    }

    /// A number that goes up with each call on a lane, for taking turns.
    fn turn(&self) -> u64 {
        self.turns.here().fetch_add(1, Ordering::Relaxed)
    }

    /// Leaves an endpoint alone for a moment: it could not be reached.
    fn rest(&self, endpoint: &Endpoint) {
        endpoint.load.rest(self.started.elapsed(), REST);
    }

    /// Takes one retry of the node's budget.
    fn may_retry(&self) -> bool {
        self.retries.withdraw(self.started.elapsed())
    }
}

/// How much room the future of a function's call takes, in bytes: as much as its largest state, for as long as it lives.
#[cfg(test)]
mod room {
    pub(super) fn of_two<A, B, F>(_: fn(A, B) -> F) -> usize {
        size_of::<F>()
    }

    pub(super) fn of_three<A, B, C, F>(_: fn(A, B, C) -> F) -> usize {
        size_of::<F>()
    }
}
