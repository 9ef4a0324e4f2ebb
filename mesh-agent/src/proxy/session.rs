//! One opaque connection, copied and measured; and the question who speaks first.

use std::future::Future;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::AsyncRead;

use super::context::{Connection, Direction};
use super::detect::{self, Detected, Prefixed};
use super::error::Error;
use super::stream::Stream;
use super::tcp::{self, Broken};
use crate::metrics::{Flag, TcpConnection, TcpRecorder};

/// A client that speaks first does so at once; only after this is the other side opened to hear whether it does.
const HEAD_START: Duration = Duration::from_millis(5);
/// A client that sent something that could still become HTTP and then waits is not speaking HTTP.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a long connection's bytes reach the metrics.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Who spoke first, and what.
pub(super) enum First {
    Client(Detected),
    /// The protocol is opaque, and this is the other side, opened already.
    Opaque(Prefixed<Stream>),
}

/// Finds out what `client` speaks without ever stalling a protocol whose server speaks first: both sides are
/// listened to, and the first bytes decide.
///
/// On the way into a workload nothing that its server may take for HTTP passes for anything else: a request line
/// that was begun is one, however long it takes, and what is passed on as opaque is watched. On the way out there
/// is nothing to enforce, so that a request begun oddly is let be and keeps nothing waiting.
pub(super) async fn first<C: AsyncRead + Unpin>(
    client: &mut Prefixed<C>,
    direction: Direction,
    open: impl Future<Output = Result<Stream, Error>>,
) -> Result<First, Error> {
    let first = listen(client, direction, open).await?;
    let http = matches!(first, First::Client(Detected::Http1 | Detected::Http2));
    if direction == Direction::Inbound && !http {
        client.refuse_http();
    }
    Ok(first)
}

async fn listen<C: AsyncRead + Unpin>(
    client: &mut Prefixed<C>,
    direction: Direction,
    open: impl Future<Output = Result<Stream, Error>>,
) -> Result<First, Error> {
    if let Ok(detected) = tokio::time::timeout(HEAD_START, detect::sniff(client)).await {
        return Ok(First::Client(detected.unwrap_or(Detected::Opaque)));
    }
    let opened = {
        let mut open = std::pin::pin!(open);
        tokio::select! {
            // What the client has said by now counts before what the server may say.
            biased;
            detected = detect::sniff(client) => return Ok(First::Client(detected.unwrap_or(Detected::Opaque))),
            opened = &mut open => opened?,
        }
    };
    let mut server = Prefixed::new(opened);
    loop {
        let waiting = client.has_prefix();
        tokio::select! {
            biased;
            detected = detect::sniff(client) => {
                return Ok(match detected.unwrap_or(Detected::Opaque) {
                    Detected::Opaque | Detected::Tls => First::Opaque(server),
                    http => First::Client(http),
                });
            }
            // Also at an end of stream: it is to be passed on.
            _ = server.fill() => return Ok(First::Opaque(server)),
            () = tokio::time::sleep(PATIENCE), if waiting => {
                return Ok(match (direction, client.begun()) {
                    (Direction::Inbound, http @ (Detected::Http1 | Detected::Http2)) => First::Client(http),
                    _ => First::Opaque(server),
                });
            }
            // A client whose first bytes arrive now starts the wait above.
            () = tokio::time::sleep(PATIENCE), if !waiting => {}
        }
    }
}

/// Copies until both sides have ended, counting what passes.
pub(super) async fn copy(
    client: Prefixed<Stream>,
    server: Prefixed<Stream>,
    connection: &Connection,
    recorders: Vec<TcpRecorder>,
) {
    let mut open: Vec<TcpConnection> = recorders.into_iter().map(TcpRecorder::open).collect();
    let mut reported = (0, 0);
    let mut report = tokio::time::interval(REPORT_EVERY);
    let ended = {
        let mut copying = std::pin::pin!(tcp::copy(client, server, &connection.moved));
        loop {
            tokio::select! {
                ended = &mut copying => break ended,
                _ = report.tick() => reported = flush(connection, &open, reported),
            }
        }
    };
    flush(connection, &open, reported);
    if let Err(error) = ended {
        let flag = flag(&error);
        open.iter_mut().for_each(|connection| connection.set_flag(flag));
        tracing::debug!(%error, peer = %connection.peer, destination = %connection.destination, "connection broke");
    }
}

/// Adds what was moved since `reported`.
fn flush(connection: &Connection, open: &[TcpConnection], reported: (u64, u64)) -> (u64, u64) {
    let now = (
        connection.moved.sent.load(Ordering::Relaxed),
        connection.moved.received.load(Ordering::Relaxed),
    );
    for recorded in open {
        recorded.add_received(now.0 - reported.0);
        recorded.add_sent(now.1 - reported.1);
    }
    now
}

fn flag(error: &Broken) -> Flag {
    match error {
        Broken::Client(_) => Flag::DownstreamReset,
        Broken::Server(_) => Flag::UpstreamReset,
    }
}
