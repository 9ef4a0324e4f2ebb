//! `mesh_agent_*`: the agent's own state.

use std::borrow::Cow;
use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Metric, Registry};

const PREFIX: &str = "mesh_agent";

/// Counters and gauges that the parts of the agent move themselves.
#[derive(Debug)]
pub struct AgentMetrics {
    /// Workloads of this node that are captured.
    pub workloads: Gauge,
    pub snapshot_generation: Gauge<u64, AtomicU64>,
    /// Documents that are refused now: what they say is not in force, though an earlier version of them may be.
    /// One with several errors is one, and so is a file that cannot be read; warnings do not count.
    pub rejected_resources: Gauge,
    /// When the first of the certificates in use ends, in seconds since 1970.
    pub certificate_expiry: Gauge,
    pub certificate_renewals: Counter,
    pub certificate_failures: Counter,
    /// Captured connections that the proxy holds.
    connections: [Gauge; 2],
    /// Pooled connections to other agents and to applications.
    pub pool_connections: Gauge,
    pub upstream_connects: Counter,
    pub upstream_connect_failures: Counter,
    /// Peers that were not who the snapshot says is at that address.
    pub identity_mismatches: Counter,
    /// Clear-text connections that a STRICT policy refused.
    pub plaintext_refused: Counter,
    /// Connections to port 15008 that failed their TLS handshake, or did not agree on a protocol in it.
    pub handshake_failures: Counter,
    /// Connections between agents, from either side, that the kernel encrypts.
    pub kernel_tls_connections: Counter,
    pub retries: Counter,
    dns_queries: [Counter; 4],
    /// Requests and connections counted as `other`, since there was no room for their labels.
    pub metrics_overflow: Counter,
    /// 1 while the agent lets go of its connections in order to stop.
    pub draining: Gauge<u32, AtomicU32>,
}

/// Who opened a connection, seen from the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// How a DNS query ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DnsOutcome {
    /// A name of the mesh, from the snapshot.
    Answered,
    /// Any other name, by the server that was asked.
    Forwarded,
    /// That server gave no answer.
    Failed,
    /// Not a query that could be read, or over a bound.
    Dropped,
}

impl AgentMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let agent = registry.sub_registry_with_prefix(PREFIX);
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        agent.register("build", "The agent's version", Info::new(version));
        Self {
            workloads: add(agent, "workloads", "Captured workloads of this node"),
            snapshot_generation: add(
                agent,
                "snapshot_generation",
                "Published changes of the configuration",
            ),
            rejected_resources: add(
                agent,
                "rejected_resources",
                "Documents that are refused now, each once",
            ),
            certificate_expiry: add(
                agent,
                "certificate_expiry_timestamp_seconds",
                "When the first of the certificates in use ends",
            ),
            certificate_renewals: add(agent, "certificate_renewals", "Certificates issued or renewed"),
            certificate_failures: add(
                agent,
                "certificate_failures",
                "Certificates that could not be had",
            ),
            connections: add_each(
                agent,
                ("connections", "Captured connections that are open now"),
                ("direction", ["inbound", "outbound"]),
            ),
            pool_connections: add(agent, "pool_connections", "Pooled upstream connections"),
            upstream_connects: add(agent, "upstream_connects", "Connections made to upstreams"),
            upstream_connect_failures: add(
                agent,
                "upstream_connect_failures",
                "Connections to upstreams that could not be made",
            ),
            identity_mismatches: add(
                agent,
                "peer_identity_mismatches",
                "Peers refused for not being the workload at their address",
            ),
            plaintext_refused: add(
                agent,
                "plaintext_refused",
                "Clear-text connections refused by a STRICT policy",
            ),
            handshake_failures: add(
                agent,
                "handshake_failures",
                "Connections to port 15008 that failed their TLS handshake or agreed on no protocol",
            ),
            kernel_tls_connections: add(agent, "kernel_tls_connections", "mTLS sessions the kernel took"),
            retries: add(agent, "retries", "Tries of requests beyond the first"),
            dns_queries: add_each(
                agent,
                ("dns_queries", "DNS queries of workloads"),
                ("outcome", ["answered", "forwarded", "failed", "dropped"]),
            ),
            metrics_overflow: add(
                agent,
                "metrics_overflow",
                "Requests and connections counted as other, for want of room for their labels",
            ),
            draining: add(agent, "draining", "1 while the agent drains its connections"),
        }
    }

    /// Captured connections that are open now.
    pub fn connections(&self, direction: Direction) -> &Gauge {
        match direction {
            Direction::Inbound => &self.connections[0],
            Direction::Outbound => &self.connections[1],
        }
    }

    pub fn dns_queries(&self, outcome: DnsOutcome) -> &Counter {
        match outcome {
            DnsOutcome::Answered => &self.dns_queries[0],
            DnsOutcome::Forwarded => &self.dns_queries[1],
            DnsOutcome::Failed => &self.dns_queries[2],
            DnsOutcome::Dropped => &self.dns_queries[3],
        }
    }
}

fn add<M: Metric + Default + Clone>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// One metric for each of a label's values.
fn add_each<M: Metric + TypedMetric + Default + Clone, const N: usize>(
    registry: &mut Registry,
    (name, help): (&str, &str),
    (label, values): (&'static str, [&'static str; N]),
) -> [M; N] {
    let family: Family<[(&str, &str); 1], M> = Family::default();
    registry.register(name, help, family.clone());
    values.map(|value| family.get_or_create_owned(&[(label, value)]))
}

/// Counts that somebody else keeps, read at each scrape: `mesh_agent_<name>_total{<label>=...}`.
///
/// For the kernel's per-CPU counters, and for parts that may not know of metrics.
pub fn register_counts<F>(
    registry: &mut Registry,
    name: &'static str,
    help: &'static str,
    label: &'static str,
    read: F,
) where
    F: Fn() -> Vec<(Cow<'static, str>, u64)> + Send + Sync + 'static,
{
    let counts = Counts {
        name: format!("{PREFIX}_{name}"),
        help,
        label,
        read,
    };
    registry.register_collector(Box::new(counts));
}

struct Counts<F> {
    name: String,
    help: &'static str,
    label: &'static str,
    read: F,
}

impl<F> fmt::Debug for Counts<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Counts").field(&self.name).finish()
    }
}

impl<F> Collector for Counts<F>
where
    F: Fn() -> Vec<(Cow<'static, str>, u64)> + Send + Sync + 'static,
{
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = encoder.encode_descriptor(&self.name, self.help, None, MetricType::Counter)?;
        for (value, count) in (self.read)() {
            ConstCounter::new(count).encode(family.encode_family(&[(self.label, value)])?)?;
        }
        Ok(())
    }
}
