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
        if let Some(lease) = peer.lease(STREAMS_PER_CONNECTION) {
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
        let enough = lock(&self.peer.connections).len() >= CONNECTIONS_PER_PEER;
        let limit = if enough {
            usize::MAX
        } else {
            STREAMS_PER_CONNECTION
        };
        if let Some(lease) = self.peer.lease(limit) {
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
    fn lease(&self, limit: usize) -> Option<StreamLease> {
        let mut connections = lock(&self.connections);
        connections.retain(|connection| !connection.is_closed());
        let connection = connections.iter().min_by_key(|connection| connection.streams())?;
        (connection.streams() < limit).then(|| StreamLease::on(connection))
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
    use tokio::net::{TcpListener, TcpSocket, UdpSocket};
    use tokio::sync::Notify;
    use tokio::time::timeout;
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::dns::{Client, Resolver};
    use crate::identity::Identities;
    use crate::lanes::Lanes;
    use crate::metrics::Metrics;
    use crate::model::{MtlsMode, MtlsPolicy, OnAgentDown, Snapshot, Workload};
    use crate::proxy::HBONE_PORT;
    use crate::sock::{Egress, Namespace};
    use crate::store::Store;
    use crate::tls;

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

    #[tokio::test]
    async fn a_request_with_less_time_than_a_handshake_takes_leaves_a_connection_behind() {
        let dir = tempfile::tempdir().unwrap();
        let identities = Identities::open_embedded(dir.path(), "cluster.local").unwrap();
        identities.ensure(&BTreeSet::from([
            CLIENT.parse().unwrap(),
            SERVER.parse().unwrap(),
        ]));
        let metrics = Metrics::new(&mut Registry::default());
        // The port is the mesh's; the address is nobody's but this test's.
        let address: IpAddr = "127.15.8.1".parse().unwrap();
        let listener = TcpListener::bind((address, HBONE_PORT)).await.unwrap();
        let config = tls::server_config(&identities, &SERVER.parse().unwrap()).unwrap();
        let (reached, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (at, until) = (Arc::clone(&reached), Arc::clone(&go));
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            at.notify_one();
            until.notified().await;
            let stream = TlsAcceptor::from(config).accept(stream).await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while connection.accept().await.is_some() {}
        });
        let local = local(&metrics);
        let pool = MeshPool::new(TlsParts { identities, metrics });
        let (client, server) = (CLIENT.parse().unwrap(), SERVER.parse().unwrap());
        let key = PeerRef {
            source: local.enrolment,
            source_identity: &client,
            peer_identity: &server,
            address,
        };
        tokio::select! {
            _ = pool.stream(&key, &local) => panic!("nobody has answered yet"),
            () = reached.notified() => {}
        }
        go.notify_one();
        let lease = timeout(LONG, pool.stream(&key, &local)).await.unwrap().unwrap();
        assert!(lease.native());
        assert_eq!(pool.connections(), 1, "that of the first one");
    }
}
