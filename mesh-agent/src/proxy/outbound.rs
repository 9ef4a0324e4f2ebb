//! One captured connection: where did it want to go, what does it speak, and what becomes of it.
//!
//! Invariants: a destination that is nobody's we know passes through unchanged; a protocol whose server speaks
//! first never waits for detection; an application learns of a failure upstream by a reset, as without a proxy.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;

use http::Request;
use hyper::body::Incoming;

use super::context::{self, Direction, Life, Local};
use super::detect::{Detected, Prefixed};
use super::error::{Error, Kind};
use super::listener::Accepted;
use super::recorders::Recorders;
use super::session::{First, Spoken};
use super::stream::Stream;
use super::upstream::{self, Way};
use super::{Proxy, inbound, outbound_http, serve, session};
use crate::balance;
use crate::dns;
use crate::metrics::{Peers, Reporter, Security, TcpRecorder};
use crate::model::{
    Destination, Endpoint, InFlight, Load, LoadBalancing, Protocol, Service, ServiceKey, Snapshot, Workload,
};

const DNS_PORT: u16 = 53;
/// Endpoints tried for one opaque connection before it is reset.
const MAX_TRIES: usize = 3;

pub(super) async fn serve(proxy: Arc<Proxy>, accepted: Accepted) {
    let Accepted {
        stream,
        peer,
        address,
        local,
        drain,
    } = accepted;
    let Some(original) = local.namespace.original_destination(peer, address) else {
        tracing::debug!(%peer, workload = %local.uid, "not a captured connection");
        Stream::Tcp(stream).reset();
        return;
    };
    let life = Life {
        listed: proxy
            .connections
            .open(Direction::Outbound, &local, peer, original),
        drain,
    };
    if original.port() == DNS_PORT {
        life.speaks("dns");
        // Boxed, as all that is rare: each connection would else hold its room.
        if let Err(error) = Box::pin(dns::stream(&local.resolver, stream, original)).await {
            tracing::debug!(%error, workload = %local.uid, server = %original, "DNS connection ended");
        }
        return;
    }
    let mut client = Stream::Tcp(stream);
    let target = match proxy.store.glance().destination(original) {
        Destination::Service(service, port) => Target::Service(service.key.clone(), port),
        Destination::UnknownPort(service) => {
            tracing::info!(%peer, workload = %local.uid, service = %service.key, port = original.port(),
                "the service has no such port");
            client.reset();
            return;
        }
        Destination::Workload(workload) => Target::Workload(workload),
        Destination::Unknown => Target::Unknown,
    };
    let outbound = Arc::new(Outbound {
        proxy,
        local,
        client: peer,
        original,
        target,
        life: Arc::new(life),
        recorders: Arc::default(),
    });
    outbound.run(Prefixed::new(client)).await;
}

/// What the application dialled.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Service(ServiceKey, u16),
    Workload(Arc<Workload>),
    Unknown,
}

pub(super) struct Outbound {
    pub(super) proxy: Arc<Proxy>,
    pub(super) local: Arc<Local>,
    pub(super) client: SocketAddr,
    /// The address that was dialled.
    pub(super) original: SocketAddr,
    pub(super) target: Target,
    pub(super) life: Arc<Life>,
    pub(super) recorders: Arc<Recorders>,
}

/// An open way to one of the target's endpoints.
struct Opened {
    recorders: Vec<TcpRecorder>,
    /// The endpoint's workload when it is on this node.
    dest: Option<Arc<Local>>,
    /// Counts the connection for balancing, as long as it lives.
    _in_flight: InFlight,
    /// It goes straight into that workload, past [`inbound`]'s own detection.
    watched: bool,
}

/// What a target is at this moment. Borrowed: the counts of what all lanes share are not touched for each request.
pub(super) struct Candidates<'a> {
    pub(super) service: Option<&'a Service>,
    pub(super) protocol: Protocol,
    pub(super) balancing: LoadBalancing,
    pub(super) endpoints: Cow<'a, [Endpoint]>,
}

impl Outbound {
    async fn run(self: Arc<Self>, mut client: Prefixed<Stream>) {
        // Each boxed: who is in one of them, and may be for long, holds no room for the others.
        match Box::pin(self.listen(&mut client)).await {
            Some(Spoken::Http { http2 }) => Box::pin(self.http(client, http2)).await,
            Some(Spoken::Opaque(opened)) => Box::pin(self.opaque(client, opened)).await,
            None => {}
        }
    }

    /// What the connection speaks, from its port's protocol and its first bytes. `None`: it is to be closed.
    async fn listen(&self, client: &mut Prefixed<Stream>) -> Option<Spoken<(Prefixed<Stream>, Opened)>> {
        let protocol = match self.target {
            Target::Unknown => Protocol::Tcp,
            _ => self.candidates(&self.proxy.store.glance()).protocol,
        };
        Some(match protocol {
            Protocol::Tls | Protocol::Tcp => Spoken::Opaque(self.reach().await),
            Protocol::Http1 | Protocol::Http2 | Protocol::Grpc => {
                let first = session::first_request(client, &self.life.drain).await?;
                let http2 = first == Detected::Http2;
                Spoken::Http { http2 }
            }
            Protocol::Detect => {
                let mut opening = Box::pin(self.open());
                let mut opened = None;
                let first = session::first(client, Direction::Outbound, async {
                    let (stream, rest) = (&mut opening).await?;
                    opened = Some(rest);
                    Ok(stream)
                })
                .await;
                drop(opening);
                match (first, opened) {
                    (Ok(First::Client(Detected::Http1)), _) => Spoken::Http { http2: false },
                    (Ok(First::Client(Detected::Http2)), _) => Spoken::Http { http2: true },
                    (Ok(First::Opaque(server)), Some(opened)) => Spoken::Opaque(Ok((server, opened))),
                    (Ok(First::Client(Detected::Tls | Detected::Opaque) | First::Opaque(_)), _) => {
                        Spoken::Opaque(self.reach().await)
                    }
                    (Err(error), _) => Spoken::Opaque(Err(error)),
                }
            }
        })
    }

    async fn reach(&self) -> Result<(Prefixed<Stream>, Opened), Error> {
        self.life.speaks("tcp");
        let (stream, opened) = self.open().await?;
        Ok((Prefixed::new(stream), opened))
    }

    /// The target's endpoints in this snapshot.
    pub(super) fn candidates<'a>(&self, snapshot: &'a Snapshot) -> Candidates<'a> {
        match &self.target {
            Target::Service(key, port) => Self::of_service(snapshot, key, *port),
            Target::Workload(workload) => {
                let current = snapshot
                    .workloads_by_address
                    .get(&self.original.ip().to_canonical());
                let workload = Arc::clone(current.unwrap_or(workload));
                Candidates {
                    service: snapshot.target_service(self.original).map(|service| &**service),
                    protocol: snapshot.target_protocol(self.original),
                    balancing: LoadBalancing::RoundRobin,
                    endpoints: vec![self.endpoint(Some(workload))].into(),
                }
            }
            Target::Unknown => Candidates {
                service: None,
                protocol: Protocol::Tcp,
                balancing: LoadBalancing::RoundRobin,
                endpoints: vec![self.endpoint(None)].into(),
            },
        }
    }

    /// A service's port and its endpoints; none when it is gone.
    pub(super) fn of_service<'a>(snapshot: &'a Snapshot, key: &ServiceKey, port: u16) -> Candidates<'a> {
        let service = snapshot.services.get(key).map(|service| &**service);
        match service.and_then(|service| service.port(port)) {
            Some(found) => Candidates {
                service,
                protocol: found.protocol,
                balancing: found.balancing,
                endpoints: Cow::Borrowed(&found.endpoints),
            },
            None => Candidates {
                service,
                protocol: Protocol::Tcp,
                balancing: LoadBalancing::RoundRobin,
                endpoints: Cow::default(),
            },
        }
    }

    fn endpoint(&self, workload: Option<Arc<Workload>>) -> Endpoint {
        Endpoint {
            address: self.original,
            workload,
            load: Arc::new(Load::default()),
        }
    }

    async fn http(self: Arc<Self>, client: Prefixed<Stream>, http2: bool) {
        self.life.speaks(if http2 { "http2" } else { "http1" });
        let drain = self.life.drain.clone();
        let handle = move |request: Request<Incoming>| outbound_http::handle(Arc::clone(&self), request);
        if http2 {
            serve::http2(client, drain, handle).await;
        } else {
            serve::http1(client, drain, handle).await;
        }
    }

    async fn opaque(
        self: Arc<Self>,
        mut client: Prefixed<Stream>,
        opened: Result<(Prefixed<Stream>, Opened), Error>,
    ) {
        self.life.speaks("tcp");
        match opened {
            Ok((mut server, opened)) => {
                if opened.watched {
                    client.refuse_http();
                }
                let connection = self.life.connection();
                tokio::select! {
                    () = session::copy(&mut client, &mut server, connection, opened.recorders) => {}
                    () = context::released(opened.dest.as_ref()) => {}
                }
            }
            Err(error) => {
                tracing::debug!(%error, workload = %self.local.uid, to = %self.original, "cannot reach");
                client.get_mut().reset();
            }
        }
    }

    /// Opens a byte stream to one of the target's endpoints, and says who counts it.
    async fn open(&self) -> Result<(Stream, Opened), Error> {
        let snapshot = self.proxy.store.load();
        let candidates = self.candidates(&snapshot);
        let source = self.local.workload();
        let service = candidates.service;
        let mut tried = Vec::new();
        let mut last = Error::from(Kind::NoEndpoint);
        while tried.len() < MAX_TRIES
            && let Some(endpoint) = self.pick(&candidates, &tried)
            && !tried.contains(&endpoint.address)
        {
            let way = Way::to(&self.proxy, &self.local, &source, endpoint);
            let in_flight = endpoint.load.enter();
            match self.from(&source, service).stream(&way, endpoint.address).await {
                Ok(stream) => {
                    endpoint.load.reached();
                    let recorders = self.tcp_recorders(&snapshot, &way, endpoint, service);
                    let said = snapshot.target_protocol(endpoint.address);
                    let dest = match way {
                        Way::Local(dest) => Some(dest),
                        Way::Mesh(_) | Way::Clear => None,
                    };
                    let watched = dest.is_some() && !matches!(said, Protocol::Tls | Protocol::Tcp);
                    let opened = Opened {
                        recorders,
                        dest,
                        watched,
                        _in_flight: in_flight,
                    };
                    return Ok((stream, opened));
                }
                Err(error) => {
                    if matches!(error.kind, Kind::Connect | Kind::PeerIdentity) {
                        self.proxy.rest(endpoint);
                    }
                    last = error;
                }
            }
            tried.push(endpoint.address);
        }
        Err(last)
    }

    pub(super) fn pick<'a>(&self, from: &'a Candidates<'_>, tried: &[SocketAddr]) -> Option<&'a Endpoint> {
        let turn = match from.balancing {
            LoadBalancing::RoundRobin => self.proxy.turn(),
            LoadBalancing::LeastRequest => 0,
        };
        let now = self.proxy.started.elapsed();
        balance::pick(
            &from.endpoints,
            from.balancing,
            tried,
            now,
            turn,
            fastrand::u64(..),
        )
    }

    pub(super) fn from<'a>(
        &'a self,
        source: &'a Workload,
        service: Option<&'a Service>,
    ) -> upstream::From<'a> {
        upstream::From {
            proxy: &self.proxy,
            local: &self.local,
            source,
            client: self.client,
            recorders: &self.recorders,
            life: &self.life,
            service,
        }
    }

    fn tcp_recorders(
        &self,
        snapshot: &Snapshot,
        way: &Way<'_>,
        endpoint: &Endpoint,
        service: Option<&Service>,
    ) -> Vec<TcpRecorder> {
        let source = self.local.workload();
        let peers = peers(&source, endpoint, service, way.security());
        let mut recorders = vec![self.proxy.metrics().tcp(&peers)];
        if let Way::Local(dest) = way {
            let caller = self.from(&source, service).caller(dest);
            recorders.push(inbound::tcp_recorder(
                &self.proxy,
                snapshot,
                dest,
                &caller,
                endpoint.address,
            ));
        }
        recorders
    }
}

/// Who talks to whom, as the client's side reports it.
pub(super) fn peers<'a>(
    source: &'a Workload,
    endpoint: &'a Endpoint,
    service: Option<&'a Service>,
    security: Security,
) -> Peers<'a> {
    let workload = endpoint.workload.as_deref();
    Peers {
        reporter: Reporter::Source,
        source: Some(source),
        source_identity: (security == Security::MutualTls).then_some(&source.identity),
        destination: workload,
        destination_identity: workload
            .filter(|_| security == Security::MutualTls)
            .map(|workload| &workload.identity),
        service,
        security,
    }
}

#[cfg(test)]
mod tests {
    use super::super::room;
    use super::*;

    /// What an idle connection holds, together with its sockets, is to stay below 8 KB.
    #[test]
    fn who_waits_holds_little() {
        assert!(room::of_two(serve) < 1200);
        assert!(room::of_two(Outbound::run) < 600);
        assert!(room::of_three(Outbound::opaque) < 1700);
    }
}
