//! Serving the HTTP/2 connection of another agent.
//!
//! Invariants: one task a stream, ended when the peer gives the stream up; on drain the connection says so
//! (GOAWAY), finishes what is under way and ends; what a peer may open, reset or leave unread is bounded.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{self, SendResponse};
use http::{Request, Response};
use http_body::Body as _;
use tokio::io::{AsyncRead, AsyncWrite};

use super::body::Body;
use super::mesh_stream::{self, CONNECTION_WINDOW, FIELD_TABLE, FRAME_BUDGET, MAX_FRAME, STREAM_WINDOW};
use super::serve::{MAX_HEAD, MAX_OUR_RESETS, MAX_PENDING_RESETS, MAX_STREAMS, PING_ANSWER, PING_EVERY};
use super::stream_body;
use crate::drain::DrainWatcher;

/// How long a peer may take from its TLS handshake to its HTTP/2 preface.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn serve<I, F>(
    io: I,
    mut drain: DrainWatcher,
    handle: impl Fn(Request<RecvStream>, SendResponse<Bytes>) -> F,
) where
    I: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = ()> + Send + 'static,
{
    let handshake = server::Builder::new()
        .header_table_size(FIELD_TABLE)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .data_frame_budget(FRAME_BUDGET)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(Some(MAX_OUR_RESETS))
        .handshake(io);
    let Ok(Ok(mut connection)) = tokio::time::timeout(PREFACE_TIMEOUT, handshake).await else {
        return;
    };
    let mut unanswered = pin!(mesh_stream::unanswered(
        connection.ping_pong(),
        PING_EVERY,
        PING_ANSWER
    ));
    let mut drained = pin!(drain.draining());
    let mut draining = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    tokio::spawn(handle(request, respond));
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, "an agent's connection broke");
                    return;
                }
                None => return,
            },
            () = &mut drained, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = &mut unanswered => {
                tracing::debug!("an agent no longer answers pings");
                return;
            }
        }
    }
}

/// Sends the response that `answering` makes, unless the peer gives the stream up before it does.
pub(super) async fn answer(
    mut respond: SendResponse<Bytes>,
    answering: impl AsyncFnOnce() -> Response<Body>,
) {
    let (answer, body) = {
        let answering = pin!(answering());
        let Some(response) = unless_reset(&mut respond, answering).await else {
            return;
        };
        let (parts, body) = response.into_parts();
        (Response::from_parts(parts, ()), body)
    };
    let ended = body.is_end_stream();
    match respond.send_response(answer, ended) {
        Ok(stream) if !ended => stream_body::answer(body, stream).await,
        Ok(_) => {}
        Err(error) => tracing::debug!(%error, "cannot answer an agent"),
    }
}

/// What `work` gives, or `None` when the peer gives the stream up first.
pub(super) async fn unless_reset<T>(
    respond: &mut SendResponse<Bytes>,
    work: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    tokio::select! {
        biased;
        done = work => Some(done),
        _ = poll_fn(|cx| respond.poll_reset(cx)) => None,
    }
}
