//! What the admin address answers, field by field: the one place where this is said.
//!
//! The names in JSON are those here in camelCase. They are stable: fields may be added, none change their
//! meaning. Nothing here can hold a private key. The command line reads the same types.
//!
//! | path | answers |
//! |---|---|
//! | `GET /healthz` | 200 as long as the data path runs, else 503 and why |
//! | `GET /readyz` | 200 when all [`Condition`]s hold, else 503; [`Ready`] |
//! | `GET /metrics` | OpenMetrics text |
//! | `GET /logging` | [`Logging`]; `PUT` or `POST` with `?level=FILTER`, or the filter as the body, changes it |
//! | `GET /api/v1/status` | [`Status`] |
//! | `GET /api/v1/workloads` | list of [`Workload`] |
//! | `GET /api/v1/services` | list of [`Service`] |
//! | `GET /api/v1/routes` | list of [`Route`], in order of precedence within a service's port |
//! | `GET /api/v1/policies` | list of [`Policy`] |
//! | `GET /api/v1/certificates` | list of [`Certificate`] |
//! | `GET /api/v1/connections` | list of [`Connection`], the youngest first, at most 10,000 |
//! | `GET /api/v1/ebpf` | [`Ebpf`] |
//! | `GET /config_dump` | [`ConfigDump`]: all of it |
//!
//! Lists take `?namespace=` and `?name=`. Errors are [`Failure`]. Times are RFC 3339 in UTC.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An answer that is not the one asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    pub error: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ready {
    pub ready: bool,
    pub conditions: Vec<Condition>,
}

/// Something that must hold before the agent is ready.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    pub name: String,
    pub holds: bool,
    /// What is missing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Logging {
    /// `LEVEL` and `TARGET=LEVEL`, separated by commas.
    pub filter: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub node: String,
    pub version: String,
    pub pid: u32,
    pub start_time: String,
    pub uptime_seconds: u64,
    pub ready: bool,
    pub conditions: Vec<Condition>,
    pub draining: bool,
    pub trust_domain: String,
    /// Published changes of the configuration.
    pub generation: u64,
    pub counts: Counts,
    /// When the first of the certificates in use ends.
    pub next_certificate_expiry: Option<String>,
    /// Documents that were refused, and warnings.
    pub findings: Vec<Finding>,
    /// The kernel encrypts what goes between agents, where the other agrees.
    #[serde(default)]
    pub kernel_tls: bool,
    /// What this kernel lacks, and is done without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lacking: Vec<Feature>,
}

/// Something that only newer kernels have, and that the agent can do without.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Feature {
    pub name: String,
    pub present: bool,
    /// The first kernel that has it.
    pub since: String,
    /// What is otherwise.
    pub without: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// All workloads that are known, on any node.
    pub workloads: usize,
    /// Workloads of this node that this agent captures, or is to capture.
    pub local_workloads: usize,
    /// Those of them that it does not capture yet: their place is missing, or it failed.
    #[serde(default)]
    pub pending_workloads: usize,
    pub services: usize,
    pub routes: usize,
    pub certificates: usize,
    pub inbound_connections: usize,
    pub outbound_connections: usize,
    /// Pairs of a client and a destination that the kernel connects without the agent.
    #[serde(default)]
    pub fast_paths: usize,
    /// Connections that it made so.
    #[serde(default)]
    pub fast_path_connections: u64,
}

/// What is wrong with a document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// `error` (not in force) or `warning`.
    pub severity: String,
    pub file: String,
    /// Counted from 1 within the file.
    pub document: usize,
    pub resource: String,
    pub path: String,
    pub message: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    pub namespace: String,
    pub name: String,
    /// `remote` or `unmeshed`; for workloads of this node that are captured, what the agent says: `enrolled`,
    /// or `pending` with the reason in `message`.
    pub state: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    pub node: String,
    pub addresses: Vec<String>,
    pub identity: String,
    /// An agent stands before it.
    pub meshed: bool,
    pub mtls: Mtls,
    /// `hold` or `open`.
    pub on_agent_down: String,
    /// Where it runs: `netns:PATH`, `netns` or `cgroup:PATH`; absent when it is not captured here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    pub labels: BTreeMap<String, String>,
    /// File and document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mtls {
    /// `disable`, `permissive` or `strict`.
    pub mode: String,
    /// Ports that differ.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<u16, String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub namespace: String,
    pub name: String,
    pub hostname: String,
    pub addresses: Vec<String>,
    pub headless: bool,
    pub ports: Vec<ServicePort>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    pub port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `detect`, `http1`, `http2`, `grpc`, `tls` or `tcp`.
    pub protocol: String,
    /// `roundRobin` or `leastRequest`.
    pub balancing: String,
    pub endpoints: Vec<Endpoint>,
    pub routes: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    pub address: String,
    /// `namespace/name`; absent for an address that no workload has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    pub meshed: bool,
    /// Requests in flight from this agent.
    pub active_requests: u32,
}

/// One rule of a route for one port of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// The route's.
    pub namespace: String,
    /// The route's name, and its rule's name or index.
    pub name: String,
    /// `namespace/name`
    pub service: String,
    pub port: u16,
    /// Set when the rule holds for clients in this namespace only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<String>,
    pub matches: RouteMatch,
    pub backends: Vec<Backend>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_timeout_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub try_timeout_ms: Option<u64>,
    /// Tries beyond the first.
    pub retries: u32,
    /// Status codes that are tried again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retry_codes: Vec<u16>,
}

/// All of it must hold; absent parts match anything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteMatch {
    /// `exact:/a`, `prefix:/a` or `regex:/a.*`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// `name=exact:value` or `name=regex:value`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<String>,
    /// As `headers`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub query: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    /// `namespace/name:port`; absent for a backend that does not exist: its share of the requests gets 500.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    pub weight: u32,
}

/// What holds for a workload, all documents taken together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// The workload's.
    pub namespace: String,
    pub name: String,
    pub mtls: Mtls,
    pub on_agent_down: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Certificate {
    pub namespace: String,
    /// The service account.
    pub name: String,
    pub identity: String,
    /// `valid`, `renewal-failing`, `missing` or `invalid`.
    pub state: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<String>,
    /// Why the last renewal failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A captured connection that is open now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// The workload's.
    pub namespace: String,
    pub name: String,
    /// `inbound` or `outbound`, seen from the workload.
    pub direction: String,
    /// Empty until it is known.
    pub protocol: String,
    pub peer: String,
    pub destination: String,
    /// As authenticated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_identity: Option<String>,
    pub start_time: String,
    pub bytes_received: u64,
    pub bytes_sent: u64,
}

/// The kernel side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ebpf {
    /// `attached` or `off`.
    pub state: String,
    /// Why it is off.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    pub kernel: String,
    /// The version of the layout of what is pinned.
    pub layout: String,
    pub bpffs: String,
    #[serde(default)]
    pub features: Vec<Feature>,
    pub hooks: Vec<Hook>,
    pub maps: Vec<Map>,
    pub workloads: Vec<CapturedWorkload>,
    /// By reason, summed over the CPUs.
    pub counters: BTreeMap<String, u64>,
}

/// A pinned link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hook {
    pub name: String,
    pub program_id: u32,
    pub link_id: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Map {
    pub name: String,
    pub entries: usize,
    pub capacity: u32,
}

/// A workload as the kernel knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CapturedWorkload {
    /// Network namespace cookie or cgroup.
    pub key: String,
    pub addresses: Vec<String>,
    /// Its new connections are refused while no agent runs.
    pub hold: bool,
    /// An agent serves it.
    pub served: bool,
    pub outbound_port: u16,
    pub inbound_port: u16,
}

/// Everything that the agent knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigDump {
    pub status: Status,
    /// The agent's own configuration in force.
    pub config: serde_json::Value,
    pub workloads: Vec<Workload>,
    pub services: Vec<Service>,
    pub routes: Vec<Route>,
    pub policies: Vec<Policy>,
    pub certificates: Vec<Certificate>,
    pub ebpf: Ebpf,
}

/// What lists are filtered by.
pub trait Named {
    fn namespace(&self) -> &str;
    fn name(&self) -> &str;
}

macro_rules! named {
    ($($kind:ty),+) => {$(
        impl Named for $kind {
            fn namespace(&self) -> &str {
                &self.namespace
            }

            fn name(&self) -> &str {
                &self.name
            }
        }
    )+};
}

named!(Workload, Service, Policy, Certificate, Connection);

impl Named for Route {
    fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The route's, whichever rule of it this is.
    fn name(&self) -> &str {
        self.name.split('/').next().unwrap_or_default()
    }
}
