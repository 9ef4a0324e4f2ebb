//! The resolver of captured DNS: services of the mesh by name, everything else from the server that was asked.
//!
//! Invariants: no recursion and no cache; a query that is not the mesh's goes to exactly the server that the
//! application chose, and its answer comes back unchanged; nothing that an application sends costs more than the
//! named bounds.

mod answer;
#[cfg(test)]
mod io_tests;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::metrics::{DnsOutcome, Metrics};
use crate::sock::Namespace;
use crate::store::Store;

pub use answer::{Answer, Carrier, View, answer};
pub use tcp::stream;
pub use udp::serve;

/// Datagrams of one workload that wait for a server's answer; each takes a socket.
const MAX_FORWARDS: usize = 256;
/// For a server's answer. The resolvers of libc wait as long.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

/// Resolves for one workload. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Resolver {
    namespace: Arc<dyn Namespace>,
    client: Client,
    store: Store,
    metrics: Metrics,
    forwards: Arc<Semaphore>,
}

/// Whose names are resolved.
#[derive(Clone, Debug)]
pub struct Client {
    /// The namespace (of Kubernetes) that short names are in.
    pub namespace: Arc<str>,
    pub cluster_domain: Arc<str>,
}

impl Resolver {
    pub fn new(namespace: Arc<dyn Namespace>, client: Client, store: Store, metrics: Metrics) -> Self {
        Self {
            namespace,
            client,
            store,
            metrics,
            forwards: Arc::new(Semaphore::new(MAX_FORWARDS)),
        }
    }

    fn answer(&self, carrier: Carrier, query: &[u8]) -> Answer {
        let view = View {
            snapshot: &self.store.load(),
            namespace: &self.client.namespace,
            cluster_domain: &self.client.cluster_domain,
        };
        answer(view, carrier, query)
    }

    fn count(&self, outcome: DnsOutcome) {
        self.metrics.agent().dns_queries(outcome).inc();
    }
}
