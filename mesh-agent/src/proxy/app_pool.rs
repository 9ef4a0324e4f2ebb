//! HTTP connections to applications on behalf of one workload: HTTP/1.1 kept alive one request at a time, HTTP/2
//! shared up to the server's limit of streams.
//!
//! Invariants: a connection serves only the key it was made for, which holds everything the application could
//! tell apart (the client it sees, the way the bytes travel); it is given back only after a response that ended
//! cleanly; a connection that closed while idle costs a reconnect, never a failed request; once the workload is
//! released nothing is kept, or it would keep a deleted network namespace alive.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Response;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use super::app_streams::{Place, Shared};
use super::body::{Body, Held};
use super::error::{Error, Kind};
use super::failure;
use super::message::Message;
use super::stream::Stream;
use crate::model::Identity;

/// How long an unused connection is kept: below the idle timeout of most servers (nginx 75 s, Apache 5 s after
/// which a FIN tells us), so that few die in our hands.
const IDLE: Duration = Duration::from_secs(30);
/// Unused connections kept for one key; more than one busy client machine needs at a time.
const MAX_IDLE_PER_KEY: usize = 256;
/// Connections kept for one workload on one lane, for both versions: clients with many addresses would else make it hold any
/// number. What is beyond serves the request it was made for.
const MAX_KEPT: usize = 2048;
/// A connection whose last response has ended is ready at once, or is still busy with a request body that its
/// server did not wait for: then it is of no use.
const READY: Duration = Duration::from_millis(10);
/// Shared connections that a request tries before it makes one: they may just have closed.
const REUSES: usize = 2;

/// What tells the connections of one workload apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct AppKey {
    /// The client that the application sees.
    pub(super) present: Option<IpAddr>,
    pub(super) to: SocketAddr,
    /// (ours, theirs) when the connection travels inside an mTLS tunnel.
    pub(super) tunnel: Option<Box<(Identity, Identity)>>,
}

/// The connections that leave from one workload's network namespace.
#[derive(Clone, Debug, Default)]
pub(super) struct AppPool(Arc<Mutex<Connections>>);

#[derive(Debug, Default)]
struct Connections {
    closed: bool,
    idle: HashMap<AppKey, Vec<(http1::SendRequest<Body>, Instant)>>,
    shared: HashMap<AppKey, Shared>,
    /// All of them.
    kept: usize,
}

/// An HTTP/1.1 connection in use.
#[derive(Debug)]
pub(super) struct Lease {
    pool: AppPool,
    key: AppKey,
    sender: http1::SendRequest<Body>,
}

impl Lease {
    pub(super) fn give_back(self) {
        if self.sender.is_closed() {
            return;
        }
        let mut connections = self.pool.lock();
        if !connections.has_room() {
            return;
        }
        let idle = connections.idle.entry(self.key).or_default();
        if idle.len() < MAX_IDLE_PER_KEY {
            idle.push((self.sender, Instant::now()));
            connections.kept += 1;
        }
    }
}

impl AppPool {
    /// Sends one request in origin form over HTTP/1.1. `connect` is called when no connection is at hand.
    pub(super) async fn send_http1(
        &self,
        key: AppKey,
        mut message: Box<Message>,
        connect: impl AsyncFnOnce() -> Result<Stream, Error>,
    ) -> Result<Response<Body>, Error> {
        let http2 = message.http2;
        while let Some(mut sender) = self.take(&key) {
            let ready =
                sender.is_ready() || matches!(tokio::time::timeout(READY, sender.ready()).await, Ok(Ok(())));
            if !ready {
                continue;
            }
            match sender.try_send_request(message.into_request()).await {
                Ok(response) => return Ok(self.leased(key, sender, response)),
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => message = Message::from_request(unsent, http2),
                    None => return Err(failure::of_http(failed.into_error())),
                },
            }
        }
        let (mut sender, connection) = http1::Builder::new()
            .handshake(TokioIo::new(Box::pin(connect()).await?))
            .await
            .map_err(|cause| Error::new(Kind::Connect, cause))?;
        tokio::spawn(async move {
            // Whoever sent the request gets the error; there is nobody else to tell.
            let _ = connection.await;
        });
        let response = sender.send_request(message.into_request()).await;
        Ok(self.leased(key, sender, response.map_err(failure::of_http)?))
    }

    /// Sends one request over a shared HTTP/2 connection with prior knowledge.
    pub(super) async fn send_http2(
        &self,
        key: AppKey,
        mut message: Box<Message>,
        connect: impl AsyncFnOnce() -> Result<Stream, Error>,
    ) -> Result<Response<Body>, Error> {
        for _ in 0..REUSES {
            let Some(place) = self.place(&key) else { break };
            match place.send(message).await {
                Ok(response) => return Ok(response),
                Err((_, Some(unsent))) => message = unsent,
                Err((error, None)) => return Err(error),
            }
        }
        let place = Box::pin(self.open(key, connect)).await?;
        place.send(message).await.map_err(|(error, _)| error)
    }

    /// One of the requests that find no connection with room makes one, and all have what comes of it.
    async fn open(
        &self,
        key: AppKey,
        connect: impl AsyncFnOnce() -> Result<Stream, Error>,
    ) -> Result<Place, Error> {
        let gate = self.lock().shared.entry(key.clone()).or_default().gate();
        let failures = gate.failures();
        let entered = gate.enter().await;
        if let Some(place) = self.lock().shared.get_mut(&key).and_then(Shared::place_or_wait) {
            return Ok(place);
        }
        if gate.failures() != failures {
            return Err(Error::new(
                Kind::Connect,
                "another request just failed to connect",
            ));
        }
        let opened = Place::open(connect, entered).await;
        let place = opened.inspect_err(|_| gate.failed())?;
        let mut connections = self.lock();
        if connections.has_room() {
            connections.kept += 1;
            connections.shared.entry(key).or_default().keep(&place);
        }
        Ok(place)
    }

    /// Closes what was not used for a while.
    pub(super) fn sweep(&self) {
        let mut connections = self.lock();
        let now = Instant::now();
        connections.idle.retain(|_, idle| {
            idle.retain(|(sender, since)| !sender.is_closed() && now.duration_since(*since) < IDLE);
            !idle.is_empty()
        });
        connections.shared.retain(|_, shared| shared.sweep(now, IDLE));
        let idle = connections.idle.values().map(Vec::len).sum::<usize>();
        connections.kept = idle
            + connections
                .shared
                .values()
                .map(Shared::connections)
                .sum::<usize>();
    }

    /// Closes what is kept, and keeps nothing from now on.
    pub(super) fn close(&self) {
        *self.lock() = Connections {
            closed: true,
            ..Connections::default()
        };
    }

    /// Connections that are kept.
    pub(super) fn kept(&self) -> usize {
        self.lock().kept
    }

    fn take(&self, key: &AppKey) -> Option<http1::SendRequest<Body>> {
        let mut connections = self.lock();
        let Connections { idle, kept, .. } = &mut *connections;
        let idle = idle.get_mut(key)?;
        while let Some((sender, since)) = idle.pop() {
            *kept = kept.saturating_sub(1);
            if !sender.is_closed() && since.elapsed() < IDLE {
                return Some(sender);
            }
        }
        None
    }

    fn place(&self, key: &AppKey) -> Option<Place> {
        self.lock().shared.get_mut(key)?.place()
    }

    fn leased(
        &self,
        key: AppKey,
        sender: http1::SendRequest<Body>,
        response: Response<hyper::body::Incoming>,
    ) -> Response<Body> {
        let lease = Lease {
            pool: self.clone(),
            key,
            sender,
        };
        response.map(|body| Body::incoming(body).holding(Held::App(Box::new(lease))))
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connections {
    fn has_room(&self) -> bool {
        !self.closed && self.kept < MAX_KEPT
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::Request;
    use http_body_util::BodyExt;
    use hyper::body::Incoming;
    use hyper::server::conn;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioExecutor;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Barrier;
    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn key(to: SocketAddr) -> AppKey {
        AppKey {
            present: None,
            to,
            tunnel: None,
        }
    }

    fn request(http2: bool) -> Box<Message> {
        let request = Request::builder().uri("http://app/").body(Body::default());
        Message::from_request(request.unwrap(), http2)
    }

    async fn connect(to: SocketAddr) -> Result<Stream, Error> {
        Ok(Stream::Tcp(TcpStream::connect(to).await.unwrap()))
    }

    /// A server that takes `limit` streams on a connection, and answers when `together` requests are there.
    async fn server(limit: u32, together: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let barrier = Arc::new(Barrier::new(together));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let barrier = Arc::clone(&barrier);
                let answer = service_fn(move |_: Request<Incoming>| {
                    let barrier = Arc::clone(&barrier);
                    async move {
                        barrier.wait().await;
                        Ok::<_, Infallible>(Response::new(Body::full("here")))
                    }
                });
                let serving = conn::http2::Builder::new(TokioExecutor::new())
                    .max_concurrent_streams(limit)
                    .serve_connection(TokioIo::new(stream), answer);
                tokio::spawn(serving);
            }
        });
        address
    }

    #[tokio::test]
    async fn another_connection_where_the_server_takes_no_more_streams() {
        const LIMIT: u32 = 2;
        const REQUESTS: usize = 7;
        let to = server(LIMIT, REQUESTS).await;
        let pool = AppPool::default();
        let asking: Vec<_> = (0..REQUESTS)
            .map(|_| {
                let pool = pool.clone();
                tokio::spawn(async move {
                    let sent = pool.send_http2(key(to), request(true), async || connect(to).await);
                    sent.await.unwrap()
                })
            })
            .collect();
        let mut answers = Vec::new();
        for asked in asking {
            answers.push(
                timeout(LONG, asked)
                    .await
                    .expect("none waits for another")
                    .unwrap(),
            );
        }
        assert_eq!(pool.kept(), 4, "seven streams, two on each");
        for answer in answers {
            answer.into_body().collect().await.unwrap();
        }
        pool.close();
        assert_eq!(pool.kept(), 0);
    }

    #[tokio::test]
    async fn nothing_is_given_back_to_a_workload_that_is_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let served = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = service_fn(|_: Request<Incoming>| async {
                Ok::<_, Infallible>(Response::new(Body::full("here")))
            });
            conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), answer)
                .await
        });
        let pool = AppPool::default();
        for _ in 0..2 {
            let sent = pool.send_http1(key(to), request(false), async || connect(to).await);
            sent.await.unwrap().into_body().collect().await.unwrap();
            assert_eq!(pool.kept(), 1);
        }
        let sent = pool.send_http1(key(to), request(false), async || connect(to).await);
        let last = sent.await.unwrap();
        pool.close();
        last.into_body().collect().await.unwrap();
        assert_eq!(pool.kept(), 0);
        timeout(LONG, served)
            .await
            .expect("its connection ends")
            .unwrap()
            .unwrap();
    }
}
