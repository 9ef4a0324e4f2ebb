//! HTTP/2 connections to one application, shared by the requests of one client.
//!
//! Invariants: streams are counted from before their request is sent to the end of its response; a connection
//! takes as many as its server allows, [`STREAMS_PER_CONNECTION`] at most, then another is opened; none is sent
//! before the server has said how many it allows.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client;
use http::Response;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::{Instant, timeout};

use super::body::{Body, Held};
use super::error::{Error, Kind};
use super::failure;
use super::message::Message;
use super::serve::MAX_HEAD;
use super::stream::Stream;
use super::stream_body;

/// Streams on one connection before another is opened, where the server allows as many (most allow 100 to 250).
const STREAMS_PER_CONNECTION: usize = 100;
/// Connections for one key; beyond it requests wait for the server's limit.
const CONNECTIONS_PER_KEY: usize = 16;
/// How long others wait for what a server says of its limit, before they make a connection of their own.
const SETTINGS_WAIT: Duration = Duration::from_millis(200);
/// Flow control windows towards applications; the connection's is several times a stream's, so that one slow
/// reader does not hold up the others.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// As between agents: what small frames that wait for their readers may cost beyond their bytes.
const FRAME_BUDGET: usize = 8 * CONNECTION_WINDOW as usize;

/// The connections for one key.
#[derive(Debug, Default)]
pub(super) struct Shared {
    connections: Vec<(Arc<Connection>, Instant)>,
    gate: Arc<Gate>,
}

/// Where those wait that need another connection.
#[derive(Debug, Default)]
pub(super) struct Gate {
    connecting: Arc<Mutex<()>>,
    failures: AtomicU64,
}

struct Connection {
    sender: client::SendRequest<Bytes>,
    closed: Arc<AtomicBool>,
    streams: AtomicUsize,
    /// What the server takes; 0 until it has said so.
    limit: Arc<AtomicUsize>,
}

/// One stream's place on a connection.
#[derive(Debug)]
pub(super) struct Place(Arc<Connection>);

impl Shared {
    pub(super) fn gate(&self) -> Arc<Gate> {
        Arc::clone(&self.gate)
    }

    /// A place on a connection that has room.
    pub(super) fn place(&mut self) -> Option<Place> {
        self.connections.retain(|(connection, _)| !connection.is_closed());
        let with_room = self.connections.iter_mut().find(|(c, _)| c.has_room());
        with_room.map(|(connection, used)| Place::on(connection, used))
    }

    /// A place on a connection that has room or, where there cannot be more connections, on the least busy one.
    pub(super) fn place_or_wait(&mut self) -> Option<Place> {
        if let Some(place) = self.place() {
            return Some(place);
        }
        if self.connections.len() < CONNECTIONS_PER_KEY {
            return None;
        }
        let streams = |connection: &Connection| connection.streams.load(Ordering::Relaxed);
        let least = self.connections.iter_mut().min_by_key(|(c, _)| streams(c));
        least.map(|(connection, used)| Place::on(connection, used))
    }

    pub(super) fn keep(&mut self, place: &Place) {
        self.connections.push((Arc::clone(&place.0), Instant::now()));
    }

    /// Closes what was not used for `idle`; false when nothing is left and nobody is making more.
    pub(super) fn sweep(&mut self, now: Instant, idle: Duration) -> bool {
        self.connections.retain(|(connection, used)| {
            let in_use = connection.streams.load(Ordering::Relaxed) > 0 || now.duration_since(*used) < idle;
            !connection.is_closed() && in_use
        });
        !self.connections.is_empty() || Arc::strong_count(&self.gate) > 1
    }

    pub(super) fn connections(&self) -> usize {
        self.connections.len()
    }
}

impl Gate {
    pub(super) async fn enter(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.connecting).lock_owned().await
    }

    /// Connects that failed: those who waited for one do not each try again.
    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    pub(super) fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("closed", &self.closed)
            .field("streams", &self.streams)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl Connection {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    fn has_room(&self) -> bool {
        self.streams.load(Ordering::Relaxed) < self.limit.load(Ordering::Relaxed)
    }
}

impl Place {
    fn on(connection: &Arc<Connection>, used: &mut Instant) -> Self {
        *used = Instant::now();
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connection))
    }

    /// Opens a connection. Who waits at the gate is let in when the server has said what it takes.
    pub(super) async fn open(
        connect: impl AsyncFnOnce() -> Result<Stream, Error>,
        gate: OwnedMutexGuard<()>,
    ) -> Result<Self, Error> {
        let (sender, connection) = client::Builder::new()
            .enable_push(false)
            .initial_max_send_streams(0)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .data_frame_budget(FRAME_BUDGET)
            .max_header_list_size(MAX_HEAD)
            .handshake(connect().await?)
            .await
            .map_err(|cause| Error::new(Kind::Connect, cause))?;
        let limit = Arc::new(AtomicUsize::new(0));
        let said = Arc::clone(&limit);
        let closed = Arc::new(AtomicBool::new(false));
        let ending = Arc::clone(&closed);
        tokio::spawn(async move {
            let mut connection = pin!(connection);
            let mut ended = false;
            let saying = poll_fn(|cx| {
                ended = poll(connection.as_mut(), cx, &said).is_ready();
                let known = ended || said.load(Ordering::Relaxed) > 0;
                if known { Poll::Ready(()) } else { Poll::Pending }
            });
            let _ = timeout(SETTINGS_WAIT, saying).await;
            drop(gate);
            if !ended {
                poll_fn(|cx| poll(connection.as_mut(), cx, &said)).await;
            }
            ending.store(true, Ordering::Relaxed);
        });
        Ok(Self(Arc::new(Connection {
            sender,
            closed,
            streams: AtomicUsize::new(1),
            limit,
        })))
    }

    /// Sends a request; gives it back when it was certainly not sent.
    pub(super) async fn send(
        self,
        message: Box<Message>,
    ) -> Result<Response<Body>, (Error, Option<Box<Message>>)> {
        let mut sender = self.0.sender.clone();
        if let Err(error) = poll_fn(|cx| sender.poll_ready(cx)).await {
            // It has ended, or its server takes no more streams: nobody is to be sent here again.
            self.0.closed.store(true, Ordering::Relaxed);
            return Err((failure::of_h2(error), Some(message)));
        }
        let answered = stream_body::exchange(sender, message, None).await;
        let (response, sending) = answered.map_err(|error| (error, None))?;
        Ok(response.map(|body| body.holding(Held::Place(self, sending))))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Drives a connection. Whoever sent a request gets the error; there is nobody else to tell.
fn poll(
    mut connection: Pin<&mut client::Connection<Stream, Bytes>>,
    cx: &mut Context<'_>,
    said: &AtomicUsize,
) -> Poll<()> {
    let ended = connection.as_mut().poll(cx);
    let takes = connection.max_concurrent_send_streams();
    said.store(takes.min(STREAMS_PER_CONNECTION), Ordering::Relaxed);
    ended.map(drop)
}
