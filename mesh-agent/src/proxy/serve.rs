//! Serving HTTP on a stream, whichever version.
//!
//! Invariants: a message's head, the number of streams and what a peer may reset are bounded; on drain the
//! connection says so (`Connection: close`, GOAWAY), finishes what is under way and ends; what is done for a client
//! that is gone ends with its connection.

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

use super::body::Body;
use super::hangup::Watched;
use super::mesh_stream::{CONNECTION_WINDOW, STREAM_WINDOW};
use crate::drain::DrainWatcher;

/// Bytes of a message's head (Envoy's default is 60 KiB).
pub(super) const MAX_HEAD: u32 = 64 * 1024;
/// How long a client may take over a request's head, or leave a kept-alive connection unused.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(300);
/// Streams that one HTTP/2 client may have open.
pub(super) const MAX_STREAMS: u32 = 1024;
/// Streams that a client reset before we looked at them (CVE-2023-44487).
pub(super) const MAX_PENDING_RESETS: usize = 64;
/// Streams that we had to reset for a client's faults (CVE-2025-8671); far above what cancelled requests cause.
pub(super) const MAX_OUR_RESETS: usize = 1024;
pub(super) const PING_EVERY: Duration = Duration::from_secs(30);
pub(super) const PING_ANSWER: Duration = Duration::from_secs(20);

pub(super) async fn http1<I, F>(io: I, mut drain: DrainWatcher, handle: impl Fn(Request<Incoming>) -> F)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Response<Body>>,
{
    let io = Watched::new(io);
    // A head has 100 fields at the most (as in Envoy), hyper's default: said by us, it would cost an allocation and
    // 3 KB to fill for each request.
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .half_close(true)
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD as usize)
        .serve_connection(
            TokioIo::new(io),
            service_fn(|request| {
                // Boxed: hyper and tokio move it about until it is first polled.
                let response = Box::pin(handle(request));
                async { Ok::<_, Infallible>(response.await) }
            }),
        )
        .with_upgrades();
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = drain.draining() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "HTTP/1 connection ended");
    }
}

pub(super) async fn http2<I, F>(
    io: I,
    mut drain: DrainWatcher,
    handle: impl Fn(Request<Incoming>) -> F + Clone,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(MAX_OUR_RESETS)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER)
        .serve_connection(
            TokioIo::new(io),
            service_fn(move |request| {
                // Boxed: hyper and tokio move it about until it is first polled.
                let response = Box::pin(handle(request));
                async { Ok::<_, Infallible>(response.await) }
            }),
        );
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = drain.draining() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "HTTP/2 connection ended");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_head_has_a_hundred_fields_at_the_most() {
        for (fields, expected) in [(100, b"HTTP/1.1 200"), (101, b"HTTP/1.1 431")] {
            let (mut client, server) = tokio::io::duplex(64 * 1024);
            let (_trigger, drain) = crate::drain::new();
            tokio::spawn(http1(server, drain, |_request| async {
                Response::new(Body::full(""))
            }));
            let head = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(fields));
            client.write_all(head.as_bytes()).await.unwrap();
            let mut answer = [0; 12];
            client.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, expected, "{fields}");
        }
    }
}
