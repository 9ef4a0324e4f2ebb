//! The model as the admin page shows it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use super::api;
use crate::identity::CertificateStatus;
use crate::model::{
    Backend, Endpoint, LoadBalancing, MethodMatch, MtlsMode, MtlsPolicy, OnAgentDown, PathMatch, Place,
    Protocol, Rejected, RequestMatch, RouteRule, Service, ServicePort, Severity, Snapshot, StringMatch,
    Workload,
};

/// How far a local workload's capture is: the state and, if that is not the wanted one, why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolment {
    /// `enrolled`, `pending`, `failed`
    pub state: &'static str,
    pub message: String,
}

/// What the kernel connects without the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FastPaths {
    /// Pairs of a client and a destination.
    pub open: usize,
    /// Connections that were made so.
    pub connections: u64,
}

/// By `namespace/name`.
pub type Enrolments = BTreeMap<String, Enrolment>;

/// In order of namespace and name, like everything here.
pub(super) fn workloads(snapshot: &Snapshot, enrolments: &Enrolments) -> Vec<api::Workload> {
    let mut found: Vec<_> = snapshot.workloads.values().collect();
    found.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    let view = |workload: &&std::sync::Arc<Workload>| self::workload(workload, snapshot, enrolments);
    found.iter().map(view).collect()
}

fn workload(workload: &Workload, snapshot: &Snapshot, enrolments: &Enrolments) -> api::Workload {
    let (state, message) = match (&workload.place, enrolments.get(&workload.uid())) {
        (_, Some(enrolment)) => (enrolment.state, enrolment.message.clone()),
        (Some(_), None) => ("pending", "not captured yet".to_owned()),
        (None, None) if workload.meshed => ("remote", String::new()),
        (None, None) => ("unmeshed", String::new()),
    };
    let labels = workload
        .labels
        .iter()
        .map(|(key, value)| (key.to_string(), value.to_string()));
    api::Workload {
        namespace: workload.namespace.to_string(),
        name: workload.name.to_string(),
        state: state.to_owned(),
        message,
        node: workload.node.to_string(),
        addresses: workload.addresses.iter().map(IpAddr::to_string).collect(),
        identity: workload.identity.to_string(),
        meshed: workload.meshed,
        mtls: mtls(&workload.mtls),
        on_agent_down: on_agent_down(workload.on_agent_down).to_owned(),
        place: workload.place.as_ref().map(place),
        labels: labels.collect(),
        source: source(snapshot, "Pod", &workload.namespace, &workload.name),
    }
}

pub(super) fn policies(snapshot: &Snapshot) -> Vec<api::Policy> {
    let mut found: Vec<_> = snapshot
        .workloads
        .values()
        .map(|workload| api::Policy {
            namespace: workload.namespace.to_string(),
            name: workload.name.to_string(),
            mtls: mtls(&workload.mtls),
            on_agent_down: on_agent_down(workload.on_agent_down).to_owned(),
        })
        .collect();
    found.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    found
}

pub(super) fn services(snapshot: &Snapshot) -> Vec<api::Service> {
    let view = |service: &Service| api::Service {
        namespace: service.key.namespace.to_string(),
        name: service.key.name.to_string(),
        hostname: service.hostname.to_string(),
        addresses: service.vips.iter().map(IpAddr::to_string).collect(),
        headless: service.headless,
        ports: service.ports.iter().map(service_port).collect(),
        source: source(snapshot, "Service", &service.key.namespace, &service.key.name),
    };
    sorted(snapshot).into_iter().map(view).collect()
}

fn service_port(port: &ServicePort) -> api::ServicePort {
    let consumer = port.consumer_routes.values().map(|rules| rules.len());
    api::ServicePort {
        port: port.port,
        name: port.name.as_deref().map(str::to_owned),
        protocol: protocol(port.protocol).to_owned(),
        balancing: match port.balancing {
            LoadBalancing::RoundRobin => "roundRobin".to_owned(),
            LoadBalancing::LeastRequest => "leastRequest".to_owned(),
        },
        endpoints: port.endpoints.iter().map(endpoint).collect(),
        routes: port.routes.len() + consumer.sum::<usize>(),
    }
}

fn endpoint(endpoint: &Endpoint) -> api::Endpoint {
    api::Endpoint {
        address: endpoint.address.to_string(),
        workload: endpoint.workload.as_ref().map(|workload| workload.uid()),
        meshed: endpoint.workload.as_ref().is_some_and(|workload| workload.meshed),
        active_requests: endpoint.load.active(),
    }
}

pub(super) fn routes(snapshot: &Snapshot) -> Vec<api::Route> {
    let mut found = Vec::new();
    for service in sorted(snapshot) {
        for port in &service.ports {
            found.extend(port.routes.iter().map(|rule| route(service, port, None, rule)));
            for (clients, rules) in &port.consumer_routes {
                found.extend(rules.iter().map(|rule| route(service, port, Some(clients), rule)));
            }
        }
    }
    found
}

fn route(service: &Service, port: &ServicePort, clients: Option<&str>, rule: &RouteRule) -> api::Route {
    let (namespace, name) = rule.name.split_once('/').unwrap_or(("", &rule.name));
    api::Route {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        service: service.key.to_string(),
        port: port.port,
        clients: clients.map(str::to_owned),
        matches: matches(&rule.matches),
        backends: rule.backends.iter().map(backend).collect(),
        request_timeout_ms: rule.timeouts.request.map(milliseconds),
        try_timeout_ms: rule.timeouts.per_try.map(milliseconds),
        retries: rule.retry.attempts,
        retry_codes: rule.retry.on.codes.clone(),
    }
}

fn matches(matches: &RequestMatch) -> api::RouteMatch {
    let headers = matches.headers.iter();
    let query = matches.query.iter();
    api::RouteMatch {
        path: match &matches.path {
            PathMatch::Any => None,
            PathMatch::Exact(path) => Some(format!("exact:{path}")),
            PathMatch::Prefix(path) if path.is_empty() => Some("prefix:/".to_owned()),
            PathMatch::Prefix(path) => Some(format!("prefix:{path}")),
            PathMatch::Regex(regex) => Some(format!("regex:{regex}")),
        },
        method: match &matches.method {
            MethodMatch::Any => None,
            MethodMatch::Is(method) => Some(method.to_string()),
        },
        headers: headers
            .map(|header| value_match(header.name.as_str(), &header.value))
            .collect(),
        query: query
            .map(|query| value_match(&query.name, &query.value))
            .collect(),
    }
}

fn value_match(name: &str, value: &StringMatch) -> String {
    match value {
        StringMatch::Exact(value) => format!("{name}=exact:{value}"),
        StringMatch::Regex(regex) => format!("{name}=regex:{regex}"),
    }
}

fn backend(backend: &Backend) -> api::Backend {
    api::Backend {
        service: backend
            .service
            .as_ref()
            .map(|(key, port)| format!("{key}:{port}")),
        weight: backend.weight,
    }
}

pub(super) fn certificate(status: &CertificateStatus) -> api::Certificate {
    let certificate = status.certificate.as_ref();
    api::Certificate {
        namespace: status.identity.namespace.to_string(),
        name: status.identity.service_account.to_string(),
        identity: status.identity.to_string(),
        state: status.state.as_str().to_owned(),
        serial: certificate.map(|certificate| certificate.serial.clone()),
        not_before: certificate.map(|certificate| time(certificate.not_before)),
        not_after: certificate.map(|certificate| time(certificate.not_after)),
        error: status.error.clone(),
    }
}

pub(super) fn finding(rejected: &Rejected) -> api::Finding {
    api::Finding {
        severity: match rejected.severity {
            Severity::Error => "error".to_owned(),
            Severity::Warning => "warning".to_owned(),
        },
        file: rejected.file.to_string(),
        document: rejected.document,
        resource: rejected.resource.to_string(),
        path: rejected.path.to_string(),
        message: rejected.message.to_string(),
    }
}

/// RFC 3339 in UTC, to the second.
pub fn time(time: SystemTime) -> String {
    // What lies before 1970 cannot be written so, and means a clock that is not set.
    let time = time.max(SystemTime::UNIX_EPOCH);
    humantime::format_rfc3339_seconds(time).to_string()
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn sorted(snapshot: &Snapshot) -> Vec<&Service> {
    let mut found: Vec<_> = snapshot.services.values().map(|service| &**service).collect();
    found.sort_by(|a, b| a.key.cmp(&b.key));
    found
}

fn source(snapshot: &Snapshot, kind: &str, namespace: &str, name: &str) -> Option<String> {
    let key = format!("{kind}/{namespace}/{name}");
    snapshot.sources.get(&*key).map(|source| source.to_string())
}

fn mtls(policy: &MtlsPolicy) -> api::Mtls {
    let ports = policy
        .ports
        .iter()
        .map(|(port, mode)| (*port, mtls_mode(*mode).to_owned()));
    api::Mtls {
        mode: mtls_mode(policy.default).to_owned(),
        ports: ports.collect(),
    }
}

fn mtls_mode(mode: MtlsMode) -> &'static str {
    match mode {
        MtlsMode::Disable => "disable",
        MtlsMode::Permissive => "permissive",
        MtlsMode::Strict => "strict",
    }
}

fn on_agent_down(choice: OnAgentDown) -> &'static str {
    match choice {
        OnAgentDown::Hold => "hold",
        OnAgentDown::Open => "open",
    }
}

fn place(place: &Place) -> String {
    match place {
        Place::Netns(path) => format!("netns:{}", path.display()),
        Place::OpenNetns(_) => "netns".to_owned(),
        Place::Cgroup(path) => format!("cgroup:{}", path.display()),
    }
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Detect => "detect",
        Protocol::Http1 => "http1",
        Protocol::Http2 => "http2",
        Protocol::Grpc => "grpc",
        Protocol::Tls => "tls",
        Protocol::Tcp => "tcp",
    }
}
