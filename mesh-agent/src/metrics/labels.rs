//! The labels that say who spoke to whom, derived from the model the way Istio derives them.

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use crate::model::{Identity, Service, Workload};

/// Which side counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    Source,
    Destination,
}

/// `connection_security_policy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Security {
    MutualTls,
    None,
    Unknown,
}

/// Both ends of a request or connection, as far as this agent knows them.
#[derive(Clone, Copy, Debug)]
pub struct Peers<'a> {
    pub reporter: Reporter,
    pub source: Option<&'a Workload>,
    /// As authenticated, not as documented.
    pub source_identity: Option<&'a Identity>,
    pub destination: Option<&'a Workload>,
    pub destination_identity: Option<&'a Identity>,
    pub service: Option<&'a Service>,
    pub security: Security,
}

/// Istio's own default cluster name: one cluster is all that this agent knows yet.
const CLUSTER: &str = "Kubernetes";
const UNKNOWN: &str = "unknown";
/// The value of every peer label once a family is full.
const OTHER: &str = "other";
/// Istio's name for what leaves the mesh unchanged.
const PASSTHROUGH: &str = "PassthroughCluster";
/// Longer than any name or identity that Kubernetes allows; a longer value is cut.
const MAX_VALUE: usize = 640;

/// A label's value; `None` is `unknown`.
type Value = Option<Arc<str>>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PeerLabels {
    pub(super) reporter: Reporter,
    source: Party,
    destination: Party,
    service: Value,
    service_name: Value,
    service_namespace: Value,
    security: Security,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Party {
    workload: Value,
    namespace: Value,
    principal: Value,
    app: Value,
    version: Value,
    canonical_service: Value,
    canonical_revision: Value,
}

impl PeerLabels {
    pub(super) fn new(peers: &Peers<'_>) -> Self {
        let namespace = peers
            .service
            .map(|service| &service.key.namespace)
            .or_else(|| peers.destination.map(|workload| &workload.namespace));
        let passed_through =
            peers.reporter == Reporter::Source && peers.service.is_none() && peers.destination.is_none();
        let name = match peers.service {
            Some(service) => Some(&*service.key.name),
            None => passed_through.then_some(PASSTHROUGH),
        };
        Self {
            reporter: peers.reporter,
            source: Party::new(peers.source, peers.source_identity),
            destination: Party::new(peers.destination, peers.destination_identity),
            service: peers.service.and_then(|service| value(&service.hostname)),
            service_name: name.and_then(value),
            service_namespace: namespace.and_then(|namespace| value(namespace)),
            security: peers.security,
        }
    }

    /// Where traffic is counted once a family is full.
    pub(super) fn other(reporter: Reporter) -> Self {
        let other = value(OTHER);
        let party = Party {
            workload: other.clone(),
            namespace: other.clone(),
            principal: other.clone(),
            app: other.clone(),
            version: other.clone(),
            canonical_service: other.clone(),
            canonical_revision: other.clone(),
        };
        Self {
            reporter,
            source: party.clone(),
            destination: party,
            service: other.clone(),
            service_name: other.clone(),
            service_namespace: other,
            security: Security::Unknown,
        }
    }
}

impl Party {
    fn new(workload: Option<&Workload>, identity: Option<&Identity>) -> Self {
        let principal = identity.and_then(|identity| value(&identity.to_string()));
        let Some(workload) = workload else {
            return Self {
                principal,
                ..Self::default()
            };
        };
        Self {
            workload: value(workload.workload_name()),
            namespace: value(&workload.namespace),
            principal,
            app: workload.labels.get("app").and_then(|app| value(app)),
            version: workload.labels.get("version").and_then(|version| value(version)),
            canonical_service: value(workload.canonical_service()),
            canonical_revision: value(workload.canonical_revision()),
        }
    }
}

fn value(text: &str) -> Value {
    let text = text.get(..text.floor_char_boundary(MAX_VALUE)).unwrap_or(text);
    (!text.is_empty()).then(|| text.into())
}

/// One sample's labels: the peers, then what was carried and how it ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Labels<'a> {
    pub(super) peers: &'a PeerLabels,
    pub(super) protocol: &'static str,
    /// `response_code` and `grpc_response_status`, which TCP does not have.
    pub(super) codes: Option<(u16, Option<u8>)>,
    pub(super) flags: &'static str,
}

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let peers = self.peers;
        let (source, destination) = (&peers.source, &peers.destination);
        for (name, value) in [
            ("reporter", peers.reporter.as_str()),
            ("source_workload", text(&source.workload)),
            ("source_canonical_service", text(&source.canonical_service)),
            ("source_canonical_revision", text(&source.canonical_revision)),
            ("source_workload_namespace", text(&source.namespace)),
            ("source_principal", text(&source.principal)),
            ("source_app", text(&source.app)),
            ("source_version", text(&source.version)),
            ("source_cluster", cluster(source)),
            ("destination_workload", text(&destination.workload)),
            ("destination_workload_namespace", text(&destination.namespace)),
            ("destination_principal", text(&destination.principal)),
            ("destination_app", text(&destination.app)),
            ("destination_version", text(&destination.version)),
            ("destination_service", text(&peers.service)),
            (
                "destination_canonical_service",
                text(&destination.canonical_service),
            ),
            (
                "destination_canonical_revision",
                text(&destination.canonical_revision),
            ),
            ("destination_service_name", text(&peers.service_name)),
            ("destination_service_namespace", text(&peers.service_namespace)),
            ("destination_cluster", cluster(destination)),
            ("request_protocol", self.protocol),
        ] {
            (name, value).encode(encoder.encode_label())?;
        }
        if let Some((code, grpc)) = self.codes {
            ("response_code", u64::from(code)).encode(encoder.encode_label())?;
            // Istio leaves it empty for what is not gRPC.
            match grpc {
                Some(status) => ("grpc_response_status", u64::from(status)).encode(encoder.encode_label())?,
                None => ("grpc_response_status", "").encode(encoder.encode_label())?,
            }
        }
        ("response_flags", self.flags).encode(encoder.encode_label())?;
        ("connection_security_policy", peers.security.as_str()).encode(encoder.encode_label())
    }
}

fn text(value: &Value) -> &str {
    value.as_deref().unwrap_or(UNKNOWN)
}

/// Istio knows the cluster of a workload that it knows.
fn cluster(party: &Party) -> &str {
    match text(&party.workload) {
        UNKNOWN => UNKNOWN,
        OTHER => OTHER,
        _ => CLUSTER,
    }
}

impl Reporter {
    fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl Security {
    /// Also the access log's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::None => "none",
            Self::Unknown => UNKNOWN,
        }
    }
}
