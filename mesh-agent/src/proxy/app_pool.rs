//! HTTP connections to applications: HTTP/1.1 kept alive one request at a time, HTTP/2 shared.
//!
//! Invariants: a connection serves only the key it was made for, which holds everything the application could
//! tell apart (the client it sees, the way the bytes travel); it is given back only after a response that ended
//! cleanly; a connection that closed while idle costs a reconnect, never a failed request.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Request, Response};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::Instant;

use super::body::{Body, Held};
use super::error::{Error, Kind};
use super::failure;
use super::serve::MAX_HEAD;
use super::stream::Stream;
use crate::model::Identity;

/// How long an unused connection is kept: below the idle timeout of most servers (nginx 75 s, Apache 5 s after
/// which a FIN tells us), so that few die in our hands.
const IDLE: Duration = Duration::from_secs(30);
/// Unused connections kept for one key; more than one busy client machine needs at a time.
const MAX_IDLE_PER_KEY: usize = 256;
/// A connection whose last response has ended is ready at once, or is still busy with a request body that its
/// server did not wait for: then it is of no use.
const READY: Duration = Duration::from_millis(10);
/// Flow control windows towards applications; the connection's is several times a stream's, so that one slow
/// reader does not hold up the others.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct AppKey {
    /// The workload whose network namespace the connection leaves from.
    pub(super) from: Arc<str>,
    /// The client that the application sees.
    pub(super) present: Option<IpAddr>,
    pub(super) to: SocketAddr,
    /// (ours, theirs) when the connection travels inside an mTLS tunnel.
    pub(super) tunnel: Option<(Identity, Identity)>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct AppPool(Arc<Mutex<Connections>>);

#[derive(Debug, Default)]
struct Connections {
    idle: HashMap<AppKey, Vec<(http1::SendRequest<Body>, Instant)>>,
    /// With the time of the last use.
    shared: HashMap<AppKey, (http2::SendRequest<Body>, Instant)>,
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
        let idle = connections.idle.entry(self.key).or_default();
        if idle.len() < MAX_IDLE_PER_KEY {
            idle.push((self.sender, Instant::now()));
        }
    }
}

impl AppPool {
    /// Sends one request in origin form over HTTP/1.1. `connect` is called when no connection is at hand.
    pub(super) async fn send_http1(
        &self,
        key: AppKey,
        mut request: Request<Body>,
        connect: impl AsyncFnOnce() -> Result<Stream, Error>,
    ) -> Result<Response<Body>, Error> {
        while let Some(mut sender) = self.take(&key) {
            if !matches!(tokio::time::timeout(READY, sender.ready()).await, Ok(Ok(()))) {
                continue;
            }
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(self.leased(key, sender, response)),
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => request = unsent,
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
        let response = sender.send_request(request).await.map_err(failure::of_http)?;
        Ok(self.leased(key, sender, response))
    }

    /// Sends one request over a shared HTTP/2 connection with prior knowledge.
    pub(super) async fn send_http2(
        &self,
        key: AppKey,
        request: Request<Body>,
        connect: impl AsyncFnOnce() -> Result<Stream, Error>,
    ) -> Result<Response<Body>, Error> {
        let mut request = request;
        let shared = self
            .lock()
            .shared
            .get_mut(&key)
            .filter(|(sender, _)| !sender.is_closed())
            .map(|(sender, used)| {
                *used = Instant::now();
                sender.clone()
            });
        if let Some(mut sender) = shared {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(response.map(Body::incoming)),
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(failure::of_http(failed.into_error())),
                },
            }
        }
        let (mut sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEAD)
            .handshake(TokioIo::new(Box::pin(connect()).await?))
            .await
            .map_err(|cause| Error::new(Kind::Connect, cause))?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        self.lock().shared.insert(key, (sender.clone(), Instant::now()));
        let response = sender.send_request(request).await.map_err(failure::of_http)?;
        Ok(response.map(Body::incoming))
    }

    /// Closes what was not used for a while.
    pub(super) fn sweep(&self) {
        let mut connections = self.lock();
        let now = Instant::now();
        connections.idle.retain(|_, idle| {
            idle.retain(|(sender, since)| !sender.is_closed() && now.duration_since(*since) < IDLE);
            !idle.is_empty()
        });
        // Streams that are still open go on without us.
        connections
            .shared
            .retain(|_, (sender, used)| !sender.is_closed() && now.duration_since(*used) < IDLE);
    }

    /// Closes what leaves from a workload that is gone.
    pub(super) fn forget(&self, workload: &str) {
        let mut connections = self.lock();
        connections.idle.retain(|key, _| &*key.from != workload);
        connections.shared.retain(|key, _| &*key.from != workload);
    }

    pub(super) fn idle(&self) -> usize {
        self.lock().idle.values().map(Vec::len).sum()
    }

    fn take(&self, key: &AppKey) -> Option<http1::SendRequest<Body>> {
        let mut connections = self.lock();
        let idle = connections.idle.get_mut(key)?;
        while let Some((sender, _)) = idle.pop() {
            if !sender.is_closed() {
                return Some(sender);
            }
        }
        None
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
        response.map(|body| Body::incoming(body).holding(Held::App(lease)))
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
