//! Pooled mTLS connections to the agents beside other workloads.
//!
//! Invariants: a connection is shared only by requests with the very same [`PeerKey`], compared field by field,
//! never by hash; the certificate presented must be the identity in the key; streams are counted when they are
//! opened; nothing here ever falls back to clear text.

use std::future::{Future as _, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{Reason, SendStream};
use hashbrown::{Equivalent, HashMap};
use http::{Request, Response};
use http_body::Body as _;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::body::{Body, Held};
use super::context::Local;
use super::error::{Error, Kind};
use super::failure;
use super::mesh_stream::{self, CONNECTION_WINDOW, Duplex, FRAME_BUDGET, Receiving, STREAM_WINDOW};
use super::message::Message;
use super::serve::MAX_HEAD;
use super::{CONNECT_TIMEOUT, HBONE_PORT, TlsParts};
use crate::model::Identity;
use crate::sock;
use crate::tls::{self, Transport};

/// Streams on one connection before another is opened (ztunnel's default).
const STREAMS_PER_CONNECTION: usize = 100;
/// Connections to one peer; beyond it streams share what is there and wait for the peer's limit.
const CONNECTIONS_PER_PEER: usize = 16;
/// How long a connection without streams is kept (ztunnel's default).
const IDLE: Duration = Duration::from_secs(300);
/// A peer that is gone without a word is noticed after these.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_ANSWER: Duration = Duration::from_secs(10);

/// Everything that tells one peer, seen by one client, from another.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct PeerKey {
    /// The enrolment of the workload that it leaves from: a later one has another network namespace.
    pub(super) source: u64,
    pub(super) source_identity: Identity,
    pub(super) peer_identity: Identity,
    pub(super) address: IpAddr,
}

/// A [`PeerKey`] to look for: a request goes by without cloning what it names.
#[derive(Debug, Hash)]
pub(super) struct PeerRef<'a> {
    // The order of fields is that of `PeerKey`: both must hash alike.
    pub(super) source: u64,
    pub(super) source_identity: &'a Identity,
    pub(super) peer_identity: &'a Identity,
    pub(super) address: IpAddr,
}

impl Equivalent<PeerKey> for PeerRef<'_> {
    fn equivalent(&self, key: &PeerKey) -> bool {
        self.source == key.source
            && self.source_identity == &key.source_identity
            && self.peer_identity == &key.peer_identity
            && self.address == key.address
    }
}

impl PeerRef<'_> {
    fn key(&self) -> PeerKey {
        PeerKey {
            source: self.source,
            source_identity: self.source_identity.clone(),
            peer_identity: self.peer_identity.clone(),
            address: self.address,
        }
    }
}

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

struct Connection {
    sender: SendRequest<Bytes>,
    closed: Arc<AtomicBool>,
    /// The peer is one of our own agents (ALPN `mesh-agent/1`) and takes requests as they are.
    native: bool,
    streams: AtomicUsize,
    idle_since: Mutex<Instant>,
}

/// One stream's place on a connection.
pub(super) struct StreamLease(Arc<Connection>);

impl std::fmt::Debug for StreamLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamLease")
            .field("native", &self.0.native)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for MeshPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MeshPool")
            .field("peers", &lock(&self.peers).len())
            .finish_non_exhaustive()
    }
}

impl StreamLease {
    /// Whether the peer takes requests as they are; otherwise only CONNECT.
    pub(super) fn native(&self) -> bool {
        self.0.native
    }

    /// Sends a request; gives it back when it was certainly not sent.
    pub(super) async fn send(
        self,
        message: Box<Message>,
    ) -> Result<Response<Body>, (Error, Option<Box<Message>>)> {
        let mut sender = match self.ready().await {
            Ok(sender) => sender,
            Err(error) => return Err((error, Some(message))),
        };
        let Message { parts, body, .. } = *message;
        let head = Request::from_parts(parts, ());
        let ended = body.is_end_stream();
        let sent = sender.send_request(head, ended);
        let (response, stream) = sent.map_err(|error| (failure::of_h2(error), None))?;
        let sending = (!ended).then(|| Sending::start(body, stream)).flatten();
        let response = response.await.map_err(|error| (failure::of_h2(error), None))?;
        let (head, stream) = response.into_parts();
        let body = Body::receiving(Receiving::new(&head.headers, stream));
        Ok(Response::from_parts(
            head,
            body.holding(Held::Mesh(self, sending)),
        ))
    }

    /// Opens a byte stream with a `CONNECT` request.
    pub(super) async fn open(&self, head: Request<()>) -> Result<(Response<()>, Duplex), Error> {
        let mut sender = self.ready().await?;
        let (response, send) = sender.send_request(head, false).map_err(failure::of_h2)?;
        let (head, receive) = response.await.map_err(failure::of_h2)?.into_parts();
        Ok((Response::from_parts(head, ()), Duplex::new(send, receive)))
    }

    async fn ready(&self) -> Result<SendRequest<Bytes>, Error> {
        let mut sender = self.0.sender.clone();
        match poll_fn(|cx| sender.poll_ready(cx)).await {
            Ok(()) => Ok(sender),
            Err(error) => {
                // It has ended, or its peer takes no more streams: nobody is to be sent here again.
                self.0.closed.store(true, Ordering::Relaxed);
                Err(failure::of_h2(error))
            }
        }
    }
}

/// A request's body on its way; dropping it gives the stream up.
#[derive(Debug)]
pub(super) struct Sending(JoinHandle<()>);

impl Sending {
    /// `None` when all could be sent at once.
    fn start(body: Body, stream: SendStream<Bytes>) -> Option<Self> {
        let mut sending = Box::pin(mesh_stream::send(body, stream, Reason::CANCEL));
        // A task of its own only for what has to wait; its first poll there asks to be woken.
        let first = sending.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        first.is_pending().then(|| Self(tokio::spawn(sending)))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Drop for StreamLease {
    fn drop(&mut self) {
        if self.0.streams.fetch_sub(1, Ordering::Relaxed) == 1 {
            *lock(&self.0.idle_since) = Instant::now();
        }
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
            connections.retain(|connection| {
                let idle = connection.streams.load(Ordering::Relaxed) == 0
                    && now.duration_since(*lock(&connection.idle_since)) > IDLE;
                !connection.closed.load(Ordering::Relaxed) && !idle
            });
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
            let connected = tokio::time::timeout(CONNECT_TIMEOUT, self.connect()).await;
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
        let lease = StreamLease(Arc::new(connection));
        // Nothing is kept for a workload that was released meanwhile.
        if !self.local.is_released() {
            lock(&self.peer.connections).push(Arc::clone(&lease.0));
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

    async fn connect(&self) -> Result<Connection, Error> {
        let key = &self.key;
        let config = tls::client_config(&self.tls.identities, &key.source_identity, &key.peer_identity)
            .map_err(|cause| Error::new(Kind::Internal, cause))?;
        let to = SocketAddr::new(key.address, HBONE_PORT);
        let stream = sock::connect(&*self.local.namespace, to, None)
            .await
            .map_err(|cause| Error::new(Kind::Connect, cause))?;
        let name = tls::server_name(key.address);
        let stream = TlsConnector::from(config)
            .connect(name, stream)
            .await
            .map_err(|cause| {
                let stranger = tls::peer_error(&cause).is_some();
                Error::new(
                    if stranger {
                        Kind::PeerIdentity
                    } else {
                        Kind::Connect
                    },
                    cause,
                )
            })?;
        let native = Transport::negotiated(stream.get_ref().1.alpn_protocol()) == Some(Transport::Native);
        let (sender, mut connection) = client::Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .data_frame_budget(FRAME_BUDGET)
            .max_header_list_size(MAX_HEAD)
            .handshake(stream)
            .await
            .map_err(|cause| Error::new(Kind::Connect, cause))?;
        let closed = Arc::new(AtomicBool::new(false));
        let ending = Arc::clone(&closed);
        tokio::spawn(async move {
            let unanswered = pin!(mesh_stream::unanswered(
                connection.ping_pong(),
                PING_EVERY,
                PING_ANSWER
            ));
            tokio::select! {
                ended = connection => tracing::debug!(?ended, peer = %to, "mTLS connection ended"),
                () = unanswered => tracing::debug!(peer = %to, "the agent there no longer answers pings"),
            }
            ending.store(true, Ordering::Relaxed);
        });
        Ok(Connection {
            sender,
            closed,
            native,
            streams: AtomicUsize::new(1),
            idle_since: Mutex::new(Instant::now()),
        })
    }
}

impl Peer {
    fn lease(&self, limit: usize) -> Option<StreamLease> {
        let mut connections = lock(&self.connections);
        connections.retain(|connection| !connection.closed.load(Ordering::Relaxed));
        let connection = connections
            .iter()
            .min_by_key(|c| c.streams.load(Ordering::Relaxed))?;
        if connection.streams.load(Ordering::Relaxed) >= limit {
            return None;
        }
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Some(StreamLease(Arc::clone(connection)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io;

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
    use crate::sock::{Egress, Namespace};
    use crate::store::Store;

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
