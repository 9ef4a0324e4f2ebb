//! `v1` Service: what a mesh reads of it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::check::{DNS_LABEL, Issue, Issues, Port, address, is_dns_label, typed};
use super::pod::{FAST_PATH, annotation_path, fast_path, known_annotations};
use super::resource::{Labels, Meta, shared};
use crate::model::{LoadBalancing, Protocol};

pub(crate) const LOAD_BALANCING: &str = "mesh-agent.dev/load-balancing";

#[derive(Debug, PartialEq)]
pub(crate) struct Service {
    /// Empty: the endpoints come from EndpointSlices alone.
    pub(crate) selector: Labels,
    pub(crate) addresses: ServiceAddresses,
    /// The address family that its endpoints are taken from where they have both.
    pub(crate) prefers_ipv6: Option<bool>,
    pub(crate) ports: Vec<ServicePort>,
    pub(crate) publish_not_ready: bool,
    pub(crate) fast_path: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ServiceAddresses {
    Given(Vec<IpAddr>),
    /// The agent chooses.
    Absent,
    /// `clusterIP: None`
    Headless,
}

#[derive(Debug, PartialEq)]
pub(crate) struct ServicePort {
    pub(crate) name: Option<Arc<str>>,
    pub(crate) port: u16,
    pub(crate) target: TargetPort,
    pub(crate) protocol: Protocol,
    pub(crate) balancing: LoadBalancing,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TargetPort {
    Number(u16),
    Name(Box<str>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSpec {
    #[serde(default)]
    selector: BTreeMap<String, String>,
    #[serde(default, rename = "clusterIP")]
    cluster_ip: String,
    #[serde(default, rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    #[serde(default)]
    ip_families: Vec<RawFamily>,
    #[serde(default)]
    ports: Vec<RawPort>,
    #[serde(default)]
    r#type: RawType,
    #[serde(default)]
    publish_not_ready_addresses: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
enum RawFamily {
    IPv4,
    IPv6,
}

#[derive(Default, PartialEq, Eq, Deserialize)]
enum RawType {
    #[default]
    ClusterIP,
    NodePort,
    LoadBalancer,
    ExternalName,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    port: Port,
    #[serde(default)]
    protocol: RawProtocol,
    target_port: Option<Value>,
    app_protocol: Option<String>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum RawProtocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

impl Service {
    pub(super) fn parse(meta: &Meta, spec: Value, issues: &mut Issues) -> Result<Self, Issue> {
        let spec: RawSpec = typed(spec, "spec")?;
        if spec.r#type == RawType::ExternalName {
            issues.error(
                "spec.type",
                "ExternalName services are not supported by this version; allowed: ClusterIP, NodePort, LoadBalancer",
            );
        }
        let addresses = addresses(&spec, issues);
        let prefers_ipv6 = match &addresses {
            ServiceAddresses::Given(addresses) => addresses.first().map(IpAddr::is_ipv6),
            _ => spec.ip_families.first().map(|family| *family == RawFamily::IPv6),
        };
        known_annotations(&meta.annotations, &[LOAD_BALANCING, FAST_PATH], issues);
        let balancing = balancing(&meta.annotations, issues);
        let mut ports: Vec<ServicePort> = Vec::new();
        for (index, raw) in spec.ports.into_iter().enumerate() {
            let path = format!("spec.ports[{index}]");
            // UDP other than DNS is not carried; the port stays the node's business.
            if raw.protocol != RawProtocol::Tcp {
                continue;
            }
            if ports.iter().any(|other| other.port == raw.port.0) {
                issues.error(
                    format!("{path}.port"),
                    format!("port {} is there twice", raw.port.0),
                );
            }
            if let Some(name) = &raw.name {
                if !is_dns_label(name) {
                    issues.error(
                        format!("{path}.name"),
                        format!("{name:?} is not a port's name; {}", DNS_LABEL),
                    );
                }
                if ports.iter().any(|other| other.name.as_deref() == Some(name)) {
                    issues.error(format!("{path}.name"), format!("name `{name}` is there twice"));
                }
            }
            ports.push(ServicePort {
                port: raw.port.0,
                target: target_port(raw.target_port, raw.port, &path, issues),
                protocol: protocol(raw.app_protocol.as_deref(), raw.name.as_deref()),
                balancing,
                name: raw.name.map(Into::into),
            });
        }
        Ok(Self {
            selector: shared(spec.selector),
            addresses,
            prefers_ipv6,
            ports,
            publish_not_ready: spec.publish_not_ready_addresses,
            fast_path: fast_path(&meta.annotations, issues),
        })
    }
}

fn addresses(spec: &RawSpec, issues: &mut Issues) -> ServiceAddresses {
    if spec.cluster_ip == "None" || spec.cluster_ips.iter().any(|ip| ip == "None") {
        return ServiceAddresses::Headless;
    }
    let first = (!spec.cluster_ip.is_empty()).then(|| ("spec.clusterIP".to_owned(), &spec.cluster_ip));
    let others = spec
        .cluster_ips
        .iter()
        .enumerate()
        .map(|(index, ip)| (format!("spec.clusterIPs[{index}]"), ip));
    let mut given = Vec::new();
    for (path, text) in first.into_iter().chain(others) {
        match address(text) {
            Ok(address) if given.contains(&address) => {}
            Ok(address) => given.push(address),
            Err(message) => issues.error(path, format!("{message}, or None for a headless service")),
        }
    }
    match given.is_empty() {
        true => ServiceAddresses::Absent,
        false => ServiceAddresses::Given(given),
    }
}

fn target_port(raw: Option<Value>, port: Port, path: &str, issues: &mut Issues) -> TargetPort {
    let wrong = |value: &Value| {
        format!("{value} is not a target port; allowed: 1 to 65535 or a container port's name")
    };
    match raw {
        None => TargetPort::Number(port.0),
        Some(Value::String(name)) if !name.is_empty() => match name.parse::<i64>() {
            Ok(_) => {
                issues.error(
                    format!("{path}.targetPort"),
                    format!("{name:?} is a name made of digits only; write the number without quotes"),
                );
                TargetPort::Number(port.0)
            }
            Err(_) => TargetPort::Name(name.into()),
        },
        Some(value) => match value.as_i64().and_then(|number| Port::try_from(number).ok()) {
            Some(number) => TargetPort::Number(number.0),
            None => {
                issues.error(format!("{path}.targetPort"), wrong(&value));
                TargetPort::Number(port.0)
            }
        },
    }
}

fn balancing(annotations: &BTreeMap<String, String>, issues: &mut Issues) -> LoadBalancing {
    match annotations.get(LOAD_BALANCING).map(String::as_str) {
        // Istio's default.
        None | Some("least-request") => LoadBalancing::LeastRequest,
        Some("round-robin") => LoadBalancing::RoundRobin,
        Some(other) => {
            issues.error(
                annotation_path(LOAD_BALANCING),
                format!("`{other}` is unknown; allowed: round-robin, least-request"),
            );
            LoadBalancing::LeastRequest
        }
    }
}

/// `appProtocol` decides; without one the port's name up to the first dash, as in Istio.
fn protocol(app_protocol: Option<&str>, name: Option<&str>) -> Protocol {
    let name = name.unwrap_or_default();
    let word = match app_protocol {
        Some(word) => word,
        None if name.starts_with("grpc-web") => "grpc-web",
        None => name.split('-').next().unwrap_or_default(),
    };
    known_protocol(word).unwrap_or(Protocol::Detect)
}

fn known_protocol(text: &str) -> Option<Protocol> {
    Some(match text.to_ascii_lowercase().as_str() {
        "http" | "kubernetes.io/ws" | "grpc-web" => Protocol::Http1,
        "http2" | "h2c" | "kubernetes.io/h2c" => Protocol::Http2,
        "grpc" => Protocol::Grpc,
        "https" | "tls" | "kubernetes.io/wss" => Protocol::Tls,
        "tcp" | "mongo" | "mysql" | "redis" | "linkerd.io/opaque" | "kubernetes.io/tcp" => Protocol::Tcp,
        _ => return None,
    })
}
