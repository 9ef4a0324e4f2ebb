//! One immutable view of everything the agent knows.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::{HashMap as SharedMap, OrdMap as SharedOrdMap};

use super::{Protocol, Service, ServiceKey, ServicePort, Target, Workload};

/// Published whole, never changed. The maps share their structure with the snapshot before, so publishing one
/// changed endpoint does not copy the mesh.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Counts up with every published change.
    pub generation: u64,
    pub trust_domain: Arc<str>,
    /// By `namespace/name`.
    pub workloads: SharedMap<Arc<str>, Arc<Workload>>,
    /// Those of them that this agent captures.
    pub local_workloads: SharedMap<Arc<str>, Arc<Workload>>,
    pub workloads_by_address: SharedMap<IpAddr, Arc<Workload>>,
    pub services: SharedMap<ServiceKey, Arc<Service>>,
    pub services_by_vip: SharedMap<IpAddr, Arc<Service>>,
    /// Those that a workload of this agent serves (see [`Service::is_near`]).
    pub near_services: SharedMap<ServiceKey, Arc<Service>>,
    /// Endpoints of services, by their sockets: what they speak, and whose they are.
    pub targets: SharedOrdMap<SocketAddr, Arc<Target>>,
    /// Documents that were refused, and warnings; the rest goes on without them. In the order of the files.
    pub rejected: Arc<[Rejected]>,
    /// Where each Pod and Service came from, by `kind/namespace/name`, for the admin page.
    pub sources: SharedMap<Arc<str>, Source>,
}

/// What an address that an application dialled is.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A service's virtual address and one of its ports.
    Service(Arc<Service>, u16),
    /// A service's virtual address, and a port that it does not have.
    UnknownPort(Arc<Service>),
    /// A workload's own address.
    Workload(Arc<Workload>),
    /// Nothing of ours: passed through unchanged.
    Unknown,
}

impl Snapshot {
    pub fn destination(&self, address: SocketAddr) -> Destination {
        let ip = address.ip().to_canonical();
        if let Some(service) = self.services_by_vip.get(&ip) {
            return match service.port(address.port()) {
                Some(_) => Destination::Service(Arc::clone(service), address.port()),
                None => Destination::UnknownPort(Arc::clone(service)),
            };
        }
        match self.workloads_by_address.get(&ip) {
            Some(workload) => Destination::Workload(Arc::clone(workload)),
            None => Destination::Unknown,
        }
    }

    pub fn service_port(&self, key: &ServiceKey, port: u16) -> Option<&ServicePort> {
        self.services.get(key)?.port(port)
    }

    /// What a workload speaks at `address`; [`Protocol::Detect`] when no service says.
    pub fn target_protocol(&self, address: SocketAddr) -> Protocol {
        self.targets
            .get(&address)
            .map_or(Protocol::Detect, |target| target.protocol())
    }

    /// The service that a socket belongs to, for metrics of connections made by pod IP.
    pub fn target_service(&self, address: SocketAddr) -> Option<&Arc<Service>> {
        self.services.get(self.targets.get(&address)?.service()?)
    }

    /// The services that have an endpoint at `ip`, one of them several times perhaps.
    pub fn users(&self, ip: IpAddr) -> impl Iterator<Item = &ServiceKey> {
        let sockets = SocketAddr::new(ip, 0)..=SocketAddr::new(ip, u16::MAX);
        let users = self.targets.range(sockets).flat_map(|(_, target)| target.users());
        users.map(|user| &user.service)
    }
}

/// A document's place. Shown as `file:document N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub file: Arc<str>,
    /// Counted from 1 within the file.
    pub document: usize,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:document {}", self.file, self.document)
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The document is not in force (its last good version, if there was one, stays).
    Error,
    /// The document is in force, but something in it will surprise its author.
    Warning,
}

/// A document, or a part of one, that was refused or deserves a warning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    pub severity: Severity,
    pub file: Arc<str>,
    /// Counted from 1 within the file.
    pub document: usize,
    /// `HTTPRoute shop/reviews`, as far as it could be read.
    pub resource: Arc<str>,
    /// `spec.rules[0].matches[0].path.type`
    pub path: Arc<str>,
    /// What is wrong and what is allowed.
    pub message: Arc<str>,
}

impl fmt::Display for Rejected {
    /// `file:document N: Kind ns/name: field.path: message`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:document {}: {}: ", self.file, self.document, self.resource)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}
