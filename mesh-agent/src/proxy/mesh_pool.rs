//! Pooled mTLS connections to the agents beside other workloads.
//!
//! Invariants: a connection is shared only by requests with the very same [`PeerKey`], compared field by field,
//! never by hash; nothing here ever falls back to clear text.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use tokio::time::Instant;

use super::context::Local;
use super::error::{Error, Kind};
use super::mesh_connection::{Connection, PeerKey, PeerRef, StreamLease};
use super::{CONNECT_TIMEOUT, TlsParts};

/// Streams on one connection before another is opened (ztunnel's default).
const STREAMS_PER_CONNECTION: usize = 100;
/// Connections to one peer; beyond it streams share what is there and wait for the peer's limit.
const CONNECTIONS_PER_PEER: usize = 16;
/// How long a connection without streams is kept (ztunnel's default).
const IDLE: Duration = Duration::from_secs(300);

pub(super) struct MeshPool {
    peers: Mutex<HashMap<PeerKey, Arc<Peer>>>,
    tls: TlsParts,
}

#[derive(Default)]
struct Peer {
    connections: Mutex<Vec<Arc<Connection>>>,
    /// Held while connecting, so that a burst of first requests makes one connection.
    connecting: Arc<tokio::sync::Mutex<()>>,
    /// Connects that failed; not the requests that only waited for one.
    failures: AtomicU64,
}

impl std::fmt::Debug for MeshPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MeshPool")
            .field("peers", &lock(&self.peers).len())
            .finish_non_exhaustive()
    }
}

impl MeshPool {
    pub(super) fn new(tls: TlsParts) -> Self {
        Self {
            peers: Mutex::default(),
            tls,
        }
    }

    /// A stream to the agent beside `key.address`, over a connection that is there or a new one.
    pub(super) async fn stream(&self, key: &PeerRef<'_>, local: &Arc<Local>) -> Result<StreamLease, Error> {
        let peer = {
            let mut peers = lock(&self.peers);
            match peers.get(key) {
                Some(peer) => Arc::clone(peer),
                None => Arc::clone(peers.entry(key.key()).or_default()),
            }
        };
        if let Some(lease) = peer.lease() {
            return Ok(lease);
        }
        let connector = Connector {
            tls: self.tls.clone(),
            peer,
            key: key.key(),
            local: Arc::clone(local),
        };
        // Boxed, as all that is rare: the future of each request would else hold the room for it.
        Box::pin(connector.open()).await
    }

    /// Closes what was not used for a while, and forgets peers without connections.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        lock(&self.peers).retain(|_, peer| {
            let mut connections = lock(&peer.connections);
            connections.retain(|connection| !connection.is_closed() && !connection.is_idle(now, IDLE));
            // Somebody who holds the peer may be connecting just now.
            !connections.is_empty() || Arc::strong_count(peer) > 1
        });
    }

    /// Closes what leaves from a workload that is gone.
    pub(super) fn forget(&self, source: u64) {
        lock(&self.peers).retain(|key, _| key.source != source);
    }

    pub(super) fn connections(&self) -> usize {
        lock(&self.peers)
            .values()
            .map(|peer| lock(&peer.connections).len())
            .sum()
    }
}

/// One more connection to a peer.
struct Connector {
    tls: TlsParts,
    peer: Arc<Peer>,
    key: PeerKey,
    local: Arc<Local>,
}

impl Connector {
    /// One of those that wait connects, and all have what comes of it: a peer that does not answer is not tried
    /// again for each.
    async fn open(self) -> Result<StreamLease, Error> {
        let failures = self.peer.failures.load(Ordering::Relaxed);
        let gate = Arc::clone(&self.peer.connecting).lock_owned();
        let gate = tokio::time::timeout(CONNECT_TIMEOUT, gate).await;
        let gate = gate.map_err(|cause| Error::new(Kind::Connect, cause))?;
        if let Some(lease) = self.peer.lease() {
            return Ok(lease);
        }
        if self.peer.failures.load(Ordering::Relaxed) != failures {
            return Err(Error::new(
                Kind::Connect,
                "another request just failed to connect",
            ));
        }
        // A task of its own: the connection is for all, and shall be made although the request that needed it
        // first had less time than a handshake takes.
        let connecting = tokio::spawn(async move {
            let _gate = gate;
            let connected = tokio::time::timeout(
                CONNECT_TIMEOUT,
                Connection::open(&self.tls, &self.key, &self.local),
            )
            .await;
            let connected =
                connected.unwrap_or_else(|_| Err(Error::new(Kind::Connect, "mTLS connect timed out")));
            connected
                .map(|connection| self.keep(connection))
                .inspect_err(|error| self.failed(error))
        });
        connecting
            .await
            .unwrap_or_else(|cause| Err(Error::new(Kind::Internal, cause)))
    }

    fn keep(&self, connection: Connection) -> StreamLease {
        self.tls.metrics.agent().upstream_connects.inc();
        let lease = StreamLease::first(connection);
        // Nothing is kept for a workload that was released meanwhile.
        if !self.local.is_released() {
            lock(&self.peer.connections).push(Arc::clone(lease.connection()));
        }
        lease
    }

    fn failed(&self, error: &Error) {
        self.peer.failures.fetch_add(1, Ordering::Relaxed);
        let (address, agent) = (self.key.address, self.tls.metrics.agent());
        if error.kind == Kind::PeerIdentity {
            agent.identity_mismatches.inc();
            tracing::warn!(peer = %address, expected = %self.key.peer_identity, %error, "refused a peer");
        } else {
            tracing::debug!(peer = %address, %error, "cannot reach the agent beside a workload");
        }
        agent.upstream_connect_failures.inc();
    }
}

impl Peer {
    /// A place on a connection where nothing is in the way, or on the best one where there may be no more.
    fn lease(&self) -> Option<StreamLease> {
        let mut connections = lock(&self.connections);
        connections.retain(|connection| !connection.is_closed());
        let enough = connections.len() >= CONNECTIONS_PER_PEER;
        let connection = connections
            .iter()
            .min_by_key(|connection| (connection.is_heavy(), connection.streams()))?;
        let has_room = !connection.is_heavy() && connection.streams() < STREAMS_PER_CONNECTION;
        (enough || has_room).then(|| StreamLease::on(connection))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io;
    use std::net::{IpAddr, SocketAddr};

    use prometheus_client::registry::Registry;
    use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
    use tokio::sync::Notify;
    use tokio::time::timeout;
    use tokio_rustls::TlsAcceptor;

    use super::super::mesh_connection::{HEAVY, HEAVY_WINDOW};
    use super::*;
    use crate::dns::{Client, Resolver};
    use crate::identity::Identities;
    use crate::lanes::Lanes;
    use crate::metrics::Metrics;
    use crate::model::{Identity, MtlsMode, MtlsPolicy, OnAgentDown, Snapshot, Workload};
    use crate::proxy::HBONE_PORT;
    use crate::sock::{Egress, Namespace};
    use crate::store::Store;
    use crate::tls::{self, RecordLayer};

    const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
    const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";
    const LONG: Duration = Duration::from_secs(10);

    /// The machine's own network, without capture.
    #[derive(Debug)]
    struct Open;

    impl Namespace for Open {
        fn original_destination(&self, _: SocketAddr, _: SocketAddr) -> Option<SocketAddr> {
            None
        }

        fn original_dns_server(&self, _: SocketAddr) -> Option<SocketAddr> {
            None
        }

        fn tcp_socket(&self, _: SocketAddr, _: Option<SocketAddr>) -> io::Result<Egress> {
            Ok(Egress {
                socket: TcpSocket::new_v4()?,
                exemption: None,
            })
        }

        fn udp_socket(&self, _: SocketAddr) -> io::Result<UdpSocket> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn local(metrics: &Metrics) -> Arc<Local> {
        let workload = Workload {
            namespace: "shop".into(),
            name: "client".into(),
            labels: std::collections::BTreeMap::new(),
            addresses: Vec::new(),
            node: "node-a".into(),
            identity: CLIENT.parse().unwrap(),
            meshed: true,
            mtls: MtlsPolicy {
                default: MtlsMode::Strict,
                ports: std::collections::BTreeMap::new(),
            },
            on_agent_down: OnAgentDown::Open,
            fast_path: true,
            place: None,
        };
        let client = Client {
            namespace: "shop".into(),
            cluster_domain: "cluster.local".into(),
        };
        let store = Store::new(Snapshot::default());
        let resolver = Resolver::new(Arc::new(Open), client, store, metrics.clone());
        Local::new(Arc::new(workload), Arc::new(Open), resolver, &Lanes::current())
    }

    /// A client's pool, and the agent beside a server at an address that is nobody's but this test's (the port is
    /// the mesh's).
    struct World {
        pool: MeshPool,
        local: Arc<Local>,
        listener: Option<TcpListener>,
        acceptor: TlsAcceptor,
        address: IpAddr,
        identities: [Identity; 2],
        _ca: tempfile::TempDir,
    }

    impl World {
        async fn at(address: &str) -> Self {
            let ca = tempfile::tempdir().unwrap();
            let identities = Identities::open_embedded(ca.path(), "cluster.local").unwrap();
            let pair: [Identity; 2] = [CLIENT.parse().unwrap(), SERVER.parse().unwrap()];
            identities.ensure(&BTreeSet::from(pair.clone()));
            let metrics = Metrics::new(&mut Registry::default());
            let address: IpAddr = address.parse().unwrap();
            Self {
                local: local(&metrics),
                listener: Some(TcpListener::bind((address, HBONE_PORT)).await.unwrap()),
                acceptor: tls::server_config(&identities, &pair[1], RecordLayer::Agent)
                    .unwrap()
                    .into(),
                pool: MeshPool::new(TlsParts {
                    identities,
                    layer: RecordLayer::Agent,
                    metrics,
                }),
                address,
                identities: pair,
                _ca: ca,
            }
        }

        async fn stream(&self) -> Result<StreamLease, Error> {
            let key = PeerRef {
                source: self.local.enrolment,
                source_identity: &self.identities[0],
                peer_identity: &self.identities[1],
                address: self.address,
            };
            timeout(LONG, self.pool.stream(&key, &self.local)).await.unwrap()
        }
    }

    async fn serve(acceptor: TlsAcceptor, stream: TcpStream) {
        let stream = acceptor.accept(stream).await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while connection.accept().await.is_some() {}
    }

    #[tokio::test]
    async fn a_request_with_less_time_than_a_handshake_takes_leaves_a_connection_behind() {
        let mut world = World::at("127.15.8.1").await;
        let (reached, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (at, until) = (Arc::clone(&reached), Arc::clone(&go));
        let (listener, acceptor) = (world.listener.take().unwrap(), world.acceptor.clone());
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            at.notify_one();
            until.notified().await;
            serve(acceptor, stream).await;
        });
        tokio::select! {
            _ = world.stream() => panic!("nobody has answered yet"),
            () = reached.notified() => {}
        }
        go.notify_one();
        let lease = world.stream().await.unwrap();
        assert!(lease.native());
        assert_eq!(world.pool.connections(), 1, "that of the first one");
    }

    #[tokio::test]
    async fn what_comes_after_a_heavy_stream_goes_another_way() {
        let mut world = World::at("127.15.8.2").await;
        let (listener, acceptor) = (world.listener.take().unwrap(), world.acceptor.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(acceptor.clone(), stream));
            }
        });
        let is_shared =
            |one: &StreamLease, other: &StreamLease| Arc::ptr_eq(one.connection(), other.connection());
        let half = usize::try_from(HEAVY / 2).unwrap();
        let mut bulk = world.stream().await.unwrap();
        bulk.load().add(half);
        let small = world.stream().await.unwrap();
        assert!(is_shared(&bulk, &small), "half of it is not much");
        bulk.load().add(half);
        let other = world.stream().await.unwrap();
        assert!(!is_shared(&bulk, &other));
        let next = world.stream().await.unwrap();
        assert!(is_shared(&other, &next), "one connection for all that is light");
        tokio::time::pause();
        tokio::time::advance(2 * HEAVY_WINDOW).await;
        assert!(!bulk.connection().is_heavy(), "it is quiet now");
        bulk.load().add(2 * half);
        assert!(!bulk.connection().is_heavy(), "it took its time for that");
        bulk.load().add(2 * half);
        assert!(bulk.connection().is_heavy());
        tokio::time::resume();

        // At the end of the connections that a peer may have, all is shared.
        let mut heavy = Vec::new();
        while world.pool.connections() < CONNECTIONS_PER_PEER || heavy.len() < CONNECTIONS_PER_PEER {
            let mut lease = world.stream().await.unwrap();
            lease.load().add(2 * half);
            heavy.push(lease);
        }
        world.stream().await.unwrap();
        assert_eq!(world.pool.connections(), CONNECTIONS_PER_PEER);
    }
}
