//! One opaque connection, copied and measured; and the question who speaks first.

use std::future::Future;
use std::time::Duration;

use tokio::io::AsyncRead;

use super::context::{Connection, Direction};
use super::detect::{self, Detected, Prefixed};
use super::error::Error;
use super::serve::HEAD_TIMEOUT;
use super::stream::Stream;
use super::tcp::{self, Broken};
use crate::drain::DrainWatcher;
use crate::metrics::{Flag, TcpConnection, TcpRecorder};

/// A client that speaks first does so at once; only after this is the other side opened to hear whether it does.
const HEAD_START: Duration = Duration::from_millis(5);
/// A client that sent something that could still become HTTP and then waits is not speaking HTTP.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a long connection's bytes reach the metrics.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// What a connection turned out to be.
pub(super) enum Spoken<S> {
    Http {
        http2: bool,
    },
    /// With the way to the server.
    Opaque(Result<S, Error>),
}

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
    if !client.has_prefix() {
        tokio::select! {
            biased;
            filled = client.fill() => if !matches!(filled, Ok(1..)) {
                return Ok(First::Opaque(server));
            },
            // Also at an end of stream: it is to be passed on.
            _ = server.fill() => return Ok(First::Opaque(server)),
        }
    }
    tokio::select! {
        biased;
        detected = detect::sniff(client) => Ok(match detected.unwrap_or(Detected::Opaque) {
            Detected::Opaque | Detected::Tls => First::Opaque(server),
            http => First::Client(http),
        }),
        _ = server.fill() => Ok(First::Opaque(server)),
        () = tokio::time::sleep(PATIENCE) => Ok(match (direction, client.begun()) {
            (Direction::Inbound, http @ (Detected::Http1 | Detected::Http2)) => First::Client(http),
            _ => First::Opaque(server),
        }),
    }
}

/// What a client begins whose protocol is HTTP. `None`: it is to be closed, since it took too long, or since the
/// agent drains and nothing was said yet.
pub(super) async fn first_request(client: &mut Prefixed<Stream>, drain: &DrainWatcher) -> Option<Detected> {
    let mut drain = drain.clone();
    let sniffing = async {
        tokio::select! {
            biased;
            // A failure shows again below.
            _ = client.fill() => {}
            () = drain.draining() => return None,
        }
        Some(detect::sniff(client).await.unwrap_or(Detected::Opaque))
    };
    let sniffed = tokio::time::timeout(HEAD_TIMEOUT, sniffing).await;
    sniffed.ok().flatten()
}

/// Copies until both sides have ended, counting what passes.
pub(super) async fn copy(
    client: &mut Prefixed<Stream>,
    server: &mut Prefixed<Stream>,
    connection: &Connection,
    recorders: Vec<TcpRecorder>,
) {
    let mut counted = Counted {
        connection,
        open: recorders.into_iter().map(TcpRecorder::open).collect(),
        reported: (0, 0),
        // Unless it is left to end by itself, it was cut.
        flag: Flag::LocalReset,
    };
    let mut report = tokio::time::interval(REPORT_EVERY);
    let mut copying = std::pin::pin!(tcp::copy(client, server, &connection.moved));
    let ended = loop {
        tokio::select! {
            ended = &mut copying => break ended,
            _ = report.tick() => counted.flush(),
        }
    };
    counted.flag = match ended {
        Ok(()) => Flag::None,
        Err(error) => {
            tracing::debug!(%error, peer = %connection.peer, destination = %connection.destination, "connection broke");
            flag(&error)
        }
    };
}

/// The metrics of one connection; exact also when its copying is dropped.
struct Counted<'a> {
    connection: &'a Connection,
    open: Vec<TcpConnection>,
    /// Bytes sent and received that the metrics have.
    reported: (u64, u64),
    flag: Flag,
}

impl Counted<'_> {
    /// Adds what was moved since the last time.
    fn flush(&mut self) {
        let now = self.connection.moved();
        for recorded in &self.open {
            recorded.add_received(now.0 - self.reported.0);
            recorded.add_sent(now.1 - self.reported.1);
        }
        self.reported = now;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.flush();
        self.open.iter_mut().for_each(|open| open.set_flag(self.flag));
    }
}

fn flag(error: &Broken) -> Flag {
    match error {
        Broken::Client(_) => Flag::DownstreamReset,
        Broken::Server(_) => Flag::UpstreamReset,
    }
}
