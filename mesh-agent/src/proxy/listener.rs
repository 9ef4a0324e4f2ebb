//! The accept loop.
//!
//! Invariants: an accept that fails for want of descriptors waits instead of spinning; connections of one
//! workload are bounded; all of them end when the workload is released or the drain's deadline has passed.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::context::Local;
use crate::drain::DrainWatcher;
use crate::lanes::Lanes;
use crate::sock;

/// Connections of one workload at a time, each way; about what one pod's ephemeral ports allow to one server.
const MAX_CONNECTIONS: usize = 65_536;
/// How long accepting rests when the process is out of descriptors or memory.
const BACKOFF: Duration = Duration::from_millis(50);

/// One accepted connection and what it belongs to.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) stream: TcpStream,
    pub(super) peer: SocketAddr,
    /// `getsockname()` of the accepted socket.
    pub(super) address: SocketAddr,
    pub(super) local: Arc<Local>,
    pub(super) drain: DrainWatcher,
}

pub(super) async fn accept<F>(
    lanes: &Lanes,
    listener: TcpListener,
    local: Arc<Local>,
    mut drain: DrainWatcher,
    serve: impl Fn(Accepted) -> F + Clone + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    if let Err(error) = sock::tune(&listener) {
        tracing::warn!(%error, workload = %local.uid, "cannot tune the listener's connections");
    }
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = drain.draining() => return,
            () = local.released() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, workload = %local.uid, "cannot accept");
                tokio::time::sleep(BACKOFF).await;
                continue;
            }
        };
        // A peer that is already gone leaves no address behind.
        let Ok(address) = stream.local_addr() else {
            continue;
        };
        let lane = lanes.next();
        let here = lane.is_here();
        let Ok(stream) = Moving::from(stream, here) else {
            continue;
        };
        let (local, drain, serve) = (Arc::clone(&local), drain.clone(), serve.clone());
        lane.spawn(async move {
            let Ok(stream) = stream.arrive() else { return };
            let mut closing = drain.clone();
            let accepted = Accepted {
                stream,
                peer: canonical(peer),
                address: canonical(address),
                local: Arc::clone(&local),
                drain,
            };
            tokio::select! {
                () = serve(accepted) => {}
                () = local.released() => {}
                () = closing.closing() => {}
            }
            drop(permit);
        });
    }
}

/// A socket on its way to the lane that will serve it.
enum Moving {
    /// It is on its lane already.
    Here(TcpStream),
    There(std::net::TcpStream),
}

impl Moving {
    fn from(stream: TcpStream, here: bool) -> io::Result<Self> {
        if here {
            return Ok(Self::Here(stream));
        }
        stream.into_std().map(Self::There)
    }

    /// Call it on the lane.
    fn arrive(self) -> io::Result<TcpStream> {
        match self {
            Self::Here(stream) => Ok(stream),
            Self::There(stream) => TcpStream::from_std(stream),
        }
    }
}

/// The listeners take both families: IPv4 arrives mapped into IPv6.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
