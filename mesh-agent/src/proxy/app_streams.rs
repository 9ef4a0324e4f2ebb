//! HTTP/2 connections to one application, shared by the requests of one client.
//!
//! Invariants: streams are counted from before their request is sent to the end of its response; a connection
//! takes as many as its server allows, [`STREAMS_PER_CONNECTION`] at most, then another is opened; nothing is handed
//! to h2 before the server has said how many it allows, nor beyond that: what waits can still be given up or sent elsewhere.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client;
use http::Response;
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};
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
    /// Sent, or waiting for room.
    streams: AtomicUsize,
    room: Arc<Room>,
}

/// How many streams a server takes on a connection.
#[derive(Debug)]
struct Room {
    /// 0 until it has said so.
    limit: AtomicUsize,
    /// Closed with the connection.
    free: Arc<Semaphore>,
    /// Of which there are so many, given out or not: the limit, or more where it has fallen.
    made: AtomicUsize,
}

/// One stream's place on a connection.
#[derive(Debug)]
pub(super) struct Place {
    connection: Arc<Connection>,
    sent: Option<OwnedSemaphorePermit>,
}

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
        self.connections
            .push((Arc::clone(&place.connection), Instant::now()));
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
            .field("streams", &self.streams)
            .field("room", &self.room)
            .finish_non_exhaustive()
    }
}

impl Connection {
    fn is_closed(&self) -> bool {
        self.room.free.is_closed()
    }

    fn has_room(&self) -> bool {
        self.streams.load(Ordering::Relaxed) < self.room.limit.load(Ordering::Relaxed)
    }
}

impl Room {
    fn unknown() -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(0),
            free: Arc::new(Semaphore::new(0)),
            made: AtomicUsize::new(0),
        })
    }

    /// What the server says; only who drives the connection calls it.
    fn set(&self, limit: usize) {
        let made = self.made.load(Ordering::Relaxed);
        if limit > made {
            self.free.add_permits(limit - made);
            self.made.store(limit, Ordering::Relaxed);
        } else if limit < made {
            let taken_back = self.free.forget_permits(made - limit);
            self.made.store(made - taken_back, Ordering::Relaxed);
        }
        self.limit.store(limit, Ordering::Relaxed);
    }

    fn is_known(&self) -> bool {
        self.limit.load(Ordering::Relaxed) > 0
    }
}

impl Place {
    fn on(connection: &Arc<Connection>, used: &mut Instant) -> Self {
        *used = Instant::now();
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Self {
            connection: Arc::clone(connection),
            sent: None,
        }
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
            .max_header_list_size(MAX_HEAD)
            .handshake(connect().await?)
            .await
            .map_err(|cause| Error::new(Kind::Connect, cause))?;
        let room = Room::unknown();
        let said = Arc::clone(&room);
        tokio::spawn(async move {
            let mut connection = pin!(connection);
            let mut ended = false;
            let saying = poll_fn(|cx| {
                ended = poll(connection.as_mut(), cx, &said).is_ready();
                let known = ended || said.is_known();
                if known { Poll::Ready(()) } else { Poll::Pending }
            });
            let _ = timeout(SETTINGS_WAIT, saying).await;
            drop(gate);
            if !ended {
                poll_fn(|cx| poll(connection.as_mut(), cx, &said)).await;
            }
        });
        Ok(Self {
            connection: Arc::new(Connection {
                sender,
                streams: AtomicUsize::new(1),
                room,
            }),
            sent: None,
        })
    }

    /// Sends a request, once the server takes one more; gives it back when it was certainly not sent.
    pub(super) async fn send(
        mut self,
        message: Box<Message>,
    ) -> Result<Response<Body>, (Error, Option<Box<Message>>)> {
        let room = &self.connection.room;
        let permit = match Arc::clone(&room.free).acquire_owned().await {
            Ok(permit) => permit,
            Err(ended) => return Err((Error::new(Kind::RefusedStream, ended), Some(message))),
        };
        let mut sender = self.connection.sender.clone();
        if let Err(error) = poll_fn(|cx| sender.poll_ready(cx)).await {
            // The server takes no more streams here: nobody is to be sent here again.
            room.free.close();
            return Err((Error::new(Kind::RefusedStream, error), Some(message)));
        }
        self.sent = Some(permit);
        let asked = stream_body::ask(sender, message, || None);
        let (response, sending) = asked.map_err(|error| (error, None))?;
        let response = response.await.map_err(|error| (failure::of_h2(error), None))?;
        Ok(stream_body::answered(response, Held::Place(self, sending)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connection.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Drives a connection. Whoever sent a request gets the error; there is nobody else to tell.
fn poll(
    mut connection: Pin<&mut client::Connection<Stream, Bytes>>,
    cx: &mut Context<'_>,
    room: &Room,
) -> Poll<()> {
    let ended = connection.as_mut().poll(cx);
    let takes = connection.max_concurrent_send_streams();
    room.set(takes.min(STREAMS_PER_CONNECTION));
    if ended.is_ready() {
        room.free.close();
    }
    ended.map(drop)
}

#[cfg(test)]
mod tests {
    use http::Request;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::{Notify, mpsc};

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    /// A connection to a server that takes one stream at a time, tells of each request, and ends when it is told to.
    async fn one_at_a_time() -> (
        Place,
        mpsc::Receiver<h2::server::SendResponse<Bytes>>,
        Arc<Notify>,
    ) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let (tell, told) = mpsc::channel(4);
        let end = Arc::new(Notify::new());
        let ending = Arc::clone(&end);
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut server = h2::server::Builder::new();
            let mut connection = server.max_concurrent_streams(1).handshake(stream).await.unwrap();
            loop {
                tokio::select! {
                    accepted = connection.accept() => {
                        let Some(Ok((_, respond))) = accepted else { return };
                        tell.try_send(respond).unwrap();
                    }
                    () = ending.notified() => return,
                }
            }
        });
        let connect = async || Ok(Stream::Tcp(TcpStream::connect(to).await.unwrap()));
        let place = Place::open(connect, Gate::default().enter().await).await;
        (place.unwrap(), told, end)
    }

    fn request() -> Box<Message> {
        let (parts, ()) = Request::get("http://a/").body(()).unwrap().into_parts();
        Message::new(parts, Body::default(), true)
    }

    /// Another request on the connection, when it has begun to wait.
    async fn waiting(
        connection: &Arc<Connection>,
    ) -> Pin<Box<impl Future<Output = Result<Response<Body>, (Error, Option<Box<Message>>)>> + use<>>> {
        let mut sending = Box::pin(Place::on(connection, &mut Instant::now()).send(request()));
        let waits = poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx).is_pending())).await;
        assert!(waits);
        sending
    }

    #[tokio::test]
    async fn who_waits_for_room_and_gives_up_is_not_sent() {
        let (first, mut told, _end) = one_at_a_time().await;
        let connection = Arc::clone(&first.connection);
        let first = tokio::spawn(first.send(request()));
        let mut respond = timeout(LONG, told.recv()).await.unwrap().unwrap();
        let given_up = waiting(&connection).await;
        let patient = waiting(&connection).await;
        drop(given_up);
        let patient = tokio::spawn(patient);
        respond.send_response(Response::new(()), true).unwrap();
        drop(timeout(LONG, first).await.unwrap().unwrap().unwrap());
        let mut respond = timeout(LONG, told.recv()).await.unwrap().unwrap();
        respond.send_response(Response::new(()), true).unwrap();
        drop(timeout(LONG, patient).await.unwrap().unwrap().unwrap());
        assert!(told.try_recv().is_err(), "there were two requests");
        assert_eq!(connection.streams.load(Ordering::Relaxed), 0);
        assert!(connection.has_room());
    }

    #[tokio::test]
    async fn who_waits_for_room_has_its_request_back_when_the_connection_ends() {
        let (first, mut told, end) = one_at_a_time().await;
        let connection = Arc::clone(&first.connection);
        let first = tokio::spawn(first.send(request()));
        let _respond = timeout(LONG, told.recv()).await.unwrap().unwrap();
        let waiting = tokio::spawn(waiting(&connection).await);
        end.notify_one();
        let broken = timeout(LONG, first).await.unwrap().unwrap();
        assert!(matches!(broken, Err((_, None))), "it was sent");
        let (error, unsent) = timeout(LONG, waiting).await.unwrap().unwrap().unwrap_err();
        assert_eq!((error.kind, unsent.is_some()), (Kind::RefusedStream, true));
        assert!(connection.is_closed());
    }
}
