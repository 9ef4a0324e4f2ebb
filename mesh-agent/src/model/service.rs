//! Services: names and virtual addresses in front of endpoints.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::HeaderValue;

use super::{Endpoint, RouteRule};

/// Names a service within the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ServiceKey {
    /// As agents tell it to each other.
    pub fn to_header(&self) -> HeaderValue {
        // A name that is none cannot come out of a document; empty, it is nobody's.
        HeaderValue::try_from(self.to_string()).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// What [`ServiceKey::to_header`] made; `None` for anything else.
    pub fn from_header(header: &HeaderValue) -> Option<Self> {
        let (namespace, name) = header.to_str().ok()?.split_once('/')?;
        Some(Self {
            namespace: namespace.into(),
            name: name.into(),
        })
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[derive(Debug, PartialEq)]
pub struct Service {
    pub key: ServiceKey,
    /// The key, ready to be sent with each request.
    pub header: HeaderValue,
    /// `<name>.<namespace>.svc.<cluster domain>`
    pub hostname: Arc<str>,
    /// The clusterIPs; for a service without one the stable addresses that the agent gave it. DNS answers these.
    /// A headless service (`clusterIP: None`) has none: DNS answers its endpoints' addresses, as in Kubernetes.
    pub vips: Vec<IpAddr>,
    pub headless: bool,
    /// Its connections may go without the proxy where that would only copy.
    pub fast_path: bool,
    pub ports: Vec<ServicePort>,
}

impl Service {
    pub fn has_endpoint(&self, address: SocketAddr) -> bool {
        let mut endpoints = self.ports.iter().flat_map(|port| port.endpoints.iter());
        endpoints.any(|endpoint| endpoint.address == address)
    }

    /// A workload that this agent captures serves one of its ports.
    pub fn is_near(&self) -> bool {
        let mut endpoints = self.ports.iter().flat_map(|port| port.endpoints.iter());
        endpoints.any(|endpoint| {
            endpoint
                .workload
                .as_ref()
                .is_some_and(|workload| workload.place.is_some())
        })
    }

    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|candidate| candidate.port == port)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    pub port: u16,
    pub name: Option<Arc<str>>,
    pub protocol: Protocol,
    pub balancing: LoadBalancing,
    /// Ready endpoints, in a stable order.
    pub endpoints: Arc<[Endpoint]>,
    /// In order of precedence; empty means every request goes to `endpoints`. A request that no rule matches
    /// gets 404, as the Gateway API says.
    pub routes: Arc<[RouteRule]>,
    /// Routes that another namespace made for its own clients: they replace `routes` for these.
    pub consumer_routes: BTreeMap<Arc<str>, Arc<[RouteRule]>>,
}

impl ServicePort {
    /// The rules for requests of clients in `namespace`.
    pub fn routes_for(&self, namespace: &str) -> &Arc<[RouteRule]> {
        self.consumer_routes.get(namespace).unwrap_or(&self.routes)
    }

    /// Its connections go to any endpoint, as they are.
    pub fn is_plain(&self) -> bool {
        self.protocol.is_opaque() && self.routes.is_empty() && self.consumer_routes.is_empty()
    }
}

/// What a port speaks, by its `appProtocol`, else by the prefix of its name (`http-web`, `grpc`, `tcp-db`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Nobody said: the first bytes decide.
    Detect,
    Http1,
    /// HTTP/2 with prior knowledge (`kubernetes.io/h2c`, `http2`).
    Http2,
    Grpc,
    /// TLS that the application terminates (`https`, `tls`): passed on as it is.
    Tls,
    Tcp,
}

impl Protocol {
    /// Declared to be a byte stream that nobody looks into.
    pub fn is_opaque(self) -> bool {
        matches!(self, Self::Tls | Self::Tcp)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadBalancing {
    RoundRobin,
    /// The less busy of two picked at random.
    LeastRequest,
}
