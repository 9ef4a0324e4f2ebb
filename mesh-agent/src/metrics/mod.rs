//! What the agent counts: traffic under Istio's standard names, and its own state under `mesh_agent_*`.
//!
//! Invariants: label values come from documents and bounded enums, never from request data; every family has a
//! limit on its label sets, beyond which traffic is counted under `other`, so nothing is lost from the sums;
//! a recorder costs a few relaxed atomics per request: no allocation, no lock.

mod agent;
mod expose;
mod flag;
mod histogram;
mod http;
mod labels;
mod process;
mod table;
mod tcp;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use prometheus_client::registry::Registry;

pub use self::agent::{AgentMetrics, Direction, DnsOutcome, register_counts};
pub use self::flag::Flag;
pub use self::http::{HttpOutcome, HttpRecorder};
pub use self::labels::{Peers, Reporter, Security};
pub use self::tcp::{TcpConnection, TcpCounts, TcpRecorder};

use self::http::MAX_OUTCOMES;
use self::labels::PeerLabels;
use self::table::Table;
use self::tcp::TcpSeries;

/// Everything that is counted. Cheap to clone; all clones count into the same place.
#[derive(Clone, Debug)]
pub struct Metrics {
    http: Arc<Table<HttpRecorder>>,
    /// Room for more outcomes of HTTP requests.
    room: Arc<AtomicUsize>,
    tcp: Arc<Table<TcpSeries>>,
    agent: Arc<AgentMetrics>,
}

impl Metrics {
    pub fn new(registry: &mut Registry) -> Self {
        let agent = Arc::new(AgentMetrics::new(registry));
        let http = Table::new(|reporter| HttpRecorder::other(reporter, agent.metrics_overflow.clone()));
        let tcp = Table::new(|reporter| TcpSeries::new(PeerLabels::other(reporter)));
        let metrics = Self {
            http: Arc::new(http),
            room: Arc::new(AtomicUsize::new(MAX_OUTCOMES)),
            tcp: Arc::new(tcp),
            agent,
        };
        registry.register_collector(Box::new(expose::Traffic {
            http: Arc::clone(&metrics.http),
            tcp: Arc::clone(&metrics.tcp),
        }));
        registry.register_collector(Box::new(process::Process::new()));
        metrics
    }

    /// The recorder of HTTP requests between these peers. To be kept for as long as the peers stay the same:
    /// finding it takes a lock.
    pub fn http(&self, peers: &Peers<'_>) -> Arc<HttpRecorder> {
        let make = |labels, other: &Arc<HttpRecorder>| HttpRecorder::new(labels, other, &self.room);
        match self.http.get(PeerLabels::new(peers), make) {
            Ok(recorder) | Err(recorder) => recorder,
        }
    }

    /// The recorder of TCP connections between these peers.
    pub fn tcp(&self, peers: &Peers<'_>) -> TcpRecorder {
        let make = |labels, _: &Arc<TcpSeries>| TcpSeries::new(labels);
        TcpRecorder::new(
            self.tcp
                .get(PeerLabels::new(peers), make)
                .unwrap_or_else(|other| {
                    self.agent.metrics_overflow.inc();
                    other
                }),
        )
    }

    /// The agent's own counters and gauges.
    pub fn agent(&self) -> &AgentMetrics {
        &self.agent
    }

    /// Drops what nobody holds a recorder of and nothing was counted in since the last call, so that workloads
    /// that are gone leave no series behind. To be called some scrapes apart, every quarter of an hour or so.
    pub fn forget_idle(&self) {
        self.http.forget_idle(HttpRecorder::requests);
        self.tcp.forget_idle(TcpSeries::activity);
    }
}
