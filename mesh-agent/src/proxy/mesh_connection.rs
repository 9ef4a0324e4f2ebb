//! One pooled mTLS connection to the agent beside another workload, and the streams on it.
//!
//! Invariants: it is made for one [`PeerKey`], and the certificate presented must be the identity in it; streams are
//! counted when they are opened.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use hashbrown::Equivalent;
use http::{Request, Response};
use tokio::time::Instant;

use super::body::{Body, Held};
use super::context::Local;
use super::error::{Error, Kind};
use super::failure;
use super::mesh_stream::{
    self, CONNECTION_WINDOW, Duplex, FIELD_TABLE, FRAME_BUDGET, MAX_FRAME, STREAM_WINDOW,
};
use super::message::Message;
use super::serve::MAX_HEAD;
use super::{HBONE_PORT, TlsParts, stream_body};
use crate::model::Identity;
use crate::sock;
use crate::tls::{self, Transport};

/// A peer that is gone without a word is noticed after these.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_ANSWER: Duration = Duration::from_secs(10);

/// A connection is heavy while one of its streams moves so many bytes within [`HEAVY_WINDOW`]: what comes meanwhile
/// goes over another one, and does not wait behind them.
pub(super) const HEAVY: u64 = 1 << 20;
pub(super) const HEAVY_WINDOW: Duration = Duration::from_secs(1);

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
    pub(super) fn key(&self) -> PeerKey {
        PeerKey {
            source: self.source,
            source_identity: self.source_identity.clone(),
            peer_identity: self.peer_identity.clone(),
            address: self.address,
        }
    }
}

pub(super) struct Connection {
    sender: SendRequest<Bytes>,
    closed: Arc<AtomicBool>,
    /// The peer is one of our own agents (ALPN `mesh-agent/1`) and takes requests as they are.
    native: bool,
    streams: AtomicUsize,
    born: Instant,
    /// Until when it is heavy: milliseconds after `born`.
    heavy_until: AtomicU64,
    idle_since: Mutex<Instant>,
}

/// One stream's place on a connection.
#[derive(Debug)]
pub(super) struct StreamLease {
    load: Load,
}

/// What goes over a stream, or over one way of it.
pub(super) struct Load {
    connection: Arc<Connection>,
    /// Since the last time that it was [`HEAVY`], and when that was.
    bytes: u64,
    since: Option<Instant>,
}

impl std::fmt::Debug for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Load")
            .field("native", &self.connection.native)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Load {
    fn new(connection: Arc<Connection>) -> Self {
        Self {
            connection,
            bytes: 0,
            since: None,
        }
    }

    /// So many more bytes have gone over it.
    pub(super) fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if self.bytes < HEAVY {
            return;
        }
        let now = Instant::now();
        // How long the first of them took is not known: taken for heavy, which costs little if it was not.
        if self.since.is_none_or(|since| now - since <= HEAVY_WINDOW) {
            self.connection.set_heavy();
        }
        self.bytes = 0;
        self.since = Some(now);
    }
}

impl Connection {
    /// Connects from `local` to the peer that `key` names, and to nobody else.
    pub(super) async fn open(tls: &TlsParts, key: &PeerKey, local: &Local) -> Result<Self, Error> {
        let (source, peer) = (&key.source_identity, &key.peer_identity);
        let config = tls::client_config(&tls.identities, source, peer, tls.layer)
            .map_err(|cause| Error::new(Kind::Internal, cause))?;
        let to = SocketAddr::new(key.address, HBONE_PORT);
        let stream = sock::connect(&*local.namespace, to, None)
            .await
            .map_err(|cause| Error::new(Kind::Connect, cause))?;
        let session = tls::connect(config, key.address, stream).await.map_err(|cause| {
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
        let native = session.transport == Some(Transport::Native);
        tls.count(&session.stream);
        let (sender, mut connection) = client::Builder::new()
            .enable_push(false)
            .header_table_size(FIELD_TABLE)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .data_frame_budget(FRAME_BUDGET)
            .max_header_list_size(MAX_HEAD)
            .handshake(session.stream)
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
        Ok(Self {
            sender,
            closed,
            native,
            // That of who made it.
            streams: AtomicUsize::new(1),
            born: Instant::now(),
            heavy_until: AtomicU64::new(0),
            idle_since: Mutex::new(Instant::now()),
        })
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    pub(super) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Something on it takes more than its share.
    pub(super) fn is_heavy(&self) -> bool {
        let until = self.heavy_until.load(Ordering::Relaxed);
        until > 0 && self.born.elapsed() < Duration::from_millis(until)
    }

    fn set_heavy(&self) {
        let until = (self.born.elapsed() + HEAVY_WINDOW).as_millis();
        let until = u64::try_from(until).unwrap_or(u64::MAX);
        self.heavy_until.store(until, Ordering::Relaxed);
    }

    /// Nothing has gone over it for so long.
    pub(super) fn is_idle(&self, now: Instant, idle: Duration) -> bool {
        self.streams() == 0 && now.duration_since(*lock(&self.idle_since)) > idle
    }
}

impl StreamLease {
    /// The first one, which a new connection is made for.
    pub(super) fn first(connection: Connection) -> Self {
        Self {
            load: Load::new(Arc::new(connection)),
        }
    }

    /// One more.
    pub(super) fn on(connection: &Arc<Connection>) -> Self {
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Self {
            load: Load::new(Arc::clone(connection)),
        }
    }

    pub(super) fn connection(&self) -> &Arc<Connection> {
        &self.load.connection
    }

    pub(super) fn load(&mut self) -> &mut Load {
        &mut self.load
    }

    /// Whether the peer takes requests as they are; otherwise only CONNECT.
    pub(super) fn native(&self) -> bool {
        self.connection().native
    }

    /// Sends a request; gives it back when it was certainly not sent.
    pub(super) async fn send(
        self,
        message: Box<Message>,
    ) -> Result<Response<Body>, (Error, Option<Box<Message>>)> {
        let sender = match self.ready().await {
            Ok(sender) => sender,
            Err(error) => return Err((error, Some(message))),
        };
        let load = || Some(Load::new(Arc::clone(self.connection())));
        let asked = stream_body::ask(sender, message, load);
        let (response, sending) = asked.map_err(|error| (error, None))?;
        let response = response.await.map_err(|error| (failure::of_h2(error), None))?;
        Ok(stream_body::answered(response, Held::Mesh(self, sending)))
    }

    /// Opens a byte stream with a `CONNECT` request.
    pub(super) async fn open(&self, head: Request<()>) -> Result<(Response<()>, Duplex), Error> {
        let mut sender = self.ready().await?;
        let (response, send) = sender.send_request(head, false).map_err(failure::of_h2)?;
        let (head, receive) = response.await.map_err(failure::of_h2)?.into_parts();
        Ok((Response::from_parts(head, ()), Duplex::new(send, receive)))
    }

    async fn ready(&self) -> Result<SendRequest<Bytes>, Error> {
        let mut sender = self.connection().sender.clone();
        match poll_fn(|cx| sender.poll_ready(cx)).await {
            Ok(()) => Ok(sender),
            Err(error) => {
                // It has ended, or its peer takes no more streams: nobody is to be sent here again.
                self.connection().closed.store(true, Ordering::Relaxed);
                Err(failure::of_h2(error))
            }
        }
    }
}

impl Drop for StreamLease {
    fn drop(&mut self) {
        let connection = self.connection();
        if connection.streams.fetch_sub(1, Ordering::Relaxed) == 1 {
            *lock(&connection.idle_since) = Instant::now();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
