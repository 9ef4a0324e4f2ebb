//! One HTTP/2 stream between two agents, from either side.
//!
//! On `h2` itself, not hyper: a stream that broke must look different from one that ended, all the way to the
//! application. Invariants: what breaks is reset, with RST_STREAM one way and as an error the other, whatever its
//! code; a receiver's window opens only as bytes are handed on; no empty frame is sent but the last (h2 allows a
//! peer few of them).

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::header::{CONTENT_LENGTH, HeaderMap};
use http_body::{Body as _, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::body::{Body, BodyError};
use super::mesh_connection::Load;

/// Windows of a stream and of a connection. The connection's is several times a stream's: with equal ones a stream
/// that nobody reads could stop all the others.
pub(super) const STREAM_WINDOW: u32 = 1 << 20;
pub(super) const CONNECTION_WINDOW: u32 = 8 << 20;
/// What small frames that wait for their readers may cost beyond their bytes. h2's default (half the window) would
/// close a connection, and all its streams, over some thousand small gRPC messages that slow readers have not taken
/// yet.
pub(super) const FRAME_BUDGET: usize = 8 * CONNECTION_WINDOW as usize;
/// HPACK's table of fields, in bytes (RFC 7541, section 4.1): some thirty. h2 looks through all values that a field's name
/// has in there; with the default of 4096 that takes a twentieth of a request's instructions on a connection that has
/// seen a hundred dates and clients' ports. Fields of more than three quarters of it are written out each time.
pub(super) const FIELD_TABLE: u32 = 2048;
/// The payload of a frame at the most, and what one write hands to h2 at a time. With its head of 9 bytes it fills
/// four TLS records. (HTTP/2's default of 16 KB makes a second record for 9 bytes of each frame, and a packet train
/// and a system call a quarter as long.)
pub(super) const MAX_FRAME: u32 = 64 * 1024 - 9;

/// The receiving half as a body.
#[derive(Debug)]
pub(super) struct Receiving {
    stream: RecvStream,
    /// What `content-length` says is still to come.
    length: Option<u64>,
    data_ended: bool,
    /// Known to end with what was read. (Asking takes the connection's lock.)
    ended: bool,
}

impl Receiving {
    pub(super) fn new(headers: &HeaderMap, stream: RecvStream) -> Self {
        let length = headers
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok());
        Self {
            length: length.and_then(|length| length.parse().ok()),
            data_ended: stream.is_end_stream(),
            ended: stream.is_end_stream(),
            stream,
        }
    }

    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        while !self.data_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // Fails only when the stream is gone, which the next poll tells.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    if let Some(length) = &mut self.length {
                        *length = length.saturating_sub(data.len() as u64);
                    }
                    if !data.is_empty() {
                        self.ended = self.stream.is_end_stream();
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => self.data_ended = true,
            }
        }
        if self.stream.is_end_stream() {
            self.ended = true;
            return Poll::Ready(None);
        }
        let trailers = ready!(self.stream.poll_trailers(cx));
        Poll::Ready(match trailers {
            Ok(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
            Err(error) => Some(Err(error.into())),
        })
    }

    /// False also where it is not known yet.
    pub(super) fn is_end_stream(&self) -> bool {
        self.ended
    }

    /// All of it was read, though perhaps not its end: who knows the length does not ask for that.
    pub(super) fn is_complete(&self) -> bool {
        self.ended || self.length == Some(0) || self.stream.is_end_stream()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        if self.is_end_stream() {
            return SizeHint::with_exact(0);
        }
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Sends all of `body`. Returns early when the peer no longer wants it; a body that breaks resets the stream with
/// `broken`. What is sent is added to `load`, on the side that chooses the connections.
pub(super) async fn send(
    mut body: Body,
    mut stream: SendStream<Bytes>,
    broken: Reason,
    mut load: Option<Load>,
) {
    loop {
        let frame = poll_fn(|cx| {
            if stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(()));
            }
            Pin::new(&mut body).poll_frame(cx).map(Ok)
        });
        let Ok(frame) = frame.await else { return };
        let sent = match frame {
            None => stream.send_data(Bytes::new(), true),
            Some(Err(_)) => return stream.send_reset(broken),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    let last = body.is_end_stream();
                    if let Some(load) = &mut load {
                        load.add(data.len());
                    }
                    match send_data(&mut stream, data, last).await {
                        Ok(()) if last => return,
                        sent => sent,
                    }
                }
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => {
                        // The peer may be gone, which is its business.
                        let _ = stream.send_trailers(trailers);
                        return;
                    }
                    // No other kind of frame exists.
                    Err(_) => Ok(()),
                },
            },
        };
        if sent.is_err() || body.is_end_stream() {
            return;
        }
    }
}

/// Sends `data` as the window allows.
async fn send_data(stream: &mut SendStream<Bytes>, mut data: Bytes, last: bool) -> Result<(), h2::Error> {
    while !data.is_empty() {
        let room = poll_fn(|cx| poll_room(stream, data.len(), cx)).await?;
        let chunk = data.split_to(room.min(data.len()));
        let end = last && data.is_empty();
        stream.send_data(chunk, end)?;
        if end {
            return Ok(());
        }
    }
    if last {
        stream.send_data(Bytes::new(), true)?;
    }
    Ok(())
}

/// How much may be sent, once that is not nothing.
fn poll_room(
    stream: &mut SendStream<Bytes>,
    wanted: usize,
    cx: &mut Context<'_>,
) -> Poll<Result<usize, h2::Error>> {
    stream.reserve_capacity(wanted);
    // h2 tells of new room only; what there is already must be asked for.
    let mut room = stream.capacity();
    while room == 0 {
        room = match ready!(stream.poll_capacity(cx)) {
            Some(room) => room?,
            None => return Poll::Ready(Err(Reason::STREAM_CLOSED.into())),
        };
    }
    Poll::Ready(Ok(room))
}

/// Both halves as a byte stream: what an HBONE `CONNECT` opens.
#[derive(Debug)]
pub(super) struct Duplex {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// Received and not yet read.
    rest: Bytes,
    shut: bool,
}

impl Duplex {
    pub(super) fn new(send: SendStream<Bytes>, receive: RecvStream) -> Self {
        Self {
            send,
            receive,
            rest: Bytes::new(),
            shut: false,
        }
    }

    /// Whether the peer gave the stream up, also after all that it sends has been read.
    pub(super) fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // An error says that the connection broke.
        self.send.poll_reset(cx).map(drop)
    }

    /// Tells the peer that the connection behind this end broke (RFC 9113, section 8.5).
    pub(super) fn reset(&mut self) {
        self.send.send_reset(Reason::CONNECT_ERROR);
    }
}

impl Duplex {
    /// What came next; nothing at the end.
    pub(super) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        ready!(self.poll_rest(cx))?;
        let chunk = std::mem::take(&mut self.rest);
        self.hand_on(chunk.len());
        Poll::Ready(Ok(chunk))
    }

    /// Waits until `rest` has something; nothing at the end.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.receive.poll_data(cx)) {
                Some(data) => self.rest = data.map_err(broken)?,
                None => break,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// The peer may send as much again.
    fn hand_on(&mut self, bytes: usize) {
        // Fails only when the stream is gone, which the next poll tells.
        let _ = self.receive.flow_control().release_capacity(bytes);
    }

    /// Takes from the front of `bytes` as much as the window allows.
    pub(super) fn poll_give(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<usize>> {
        let room =
            ready!(poll_room(&mut self.send, bytes.len().min(MAX_FRAME as usize), cx)).map_err(broken)?;
        let chunk = bytes.split_to(room.min(bytes.len()));
        let n = chunk.len();
        Poll::Ready(self.send.send_data(chunk, false).map(|()| n).map_err(broken))
    }
}

impl AsyncRead for Duplex {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_rest(cx))?;
        let n = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest[..n]);
        self.rest.advance(n);
        self.hand_on(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Duplex {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room =
            ready!(poll_room(&mut self.send, buf.len().min(MAX_FRAME as usize), cx)).map_err(broken)?;
        let n = room.min(buf.len());
        let sent = self.send.send_data(Bytes::copy_from_slice(&buf[..n]), false);
        Poll::Ready(sent.map(|()| n).map_err(broken))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's task writes what it was given.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shut {
            return Poll::Ready(Ok(()));
        }
        self.shut = true;
        Poll::Ready(self.send.send_data(Bytes::new(), true).map_err(broken))
    }
}

/// Whatever its code, a reset is what a reset of a socket is.
fn broken(error: h2::Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

/// Returns when the peer has left a ping without an answer.
pub(super) async fn unanswered(pings: Option<PingPong>, every: Duration, patience: Duration) {
    // h2 hands them out once for each connection.
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(every).await;
        match tokio::time::timeout(patience, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection ended; it tells by itself.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use http::{Request, Response};
    use http_body_util::BodyExt;

    use super::*;

    const HALF: Bytes = Bytes::from_static(b"half of it");

    /// The response that `serve` sends.
    async fn response<F: Future<Output = ()> + Send + 'static>(
        serve: impl FnOnce(SendStream<Bytes>, RecvStream) -> F + Send + 'static,
    ) -> (Body, SendStream<Bytes>) {
        let (client, server) = tokio::io::duplex(64 * 1024);
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(server).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            let stream = respond.send_response(Response::new(()), false).unwrap();
            tokio::spawn(serve(stream, request.into_body()));
            while connection.accept().await.is_some() {}
        });
        let (mut sender, connection) = h2::client::handshake(client).await.unwrap();
        tokio::spawn(connection);
        let request = Request::post("http://a/").body(()).unwrap();
        // The request never ends.
        let (response, sending) = sender.send_request(request, false).unwrap();
        let (head, stream) = response.await.unwrap().into_parts();
        (Body::receiving(Receiving::new(&head.headers, stream)), sending)
    }

    async fn received<F: Future<Output = ()> + Send + 'static>(
        serve: impl FnOnce(SendStream<Bytes>, RecvStream) -> F + Send + 'static,
    ) -> Result<Bytes, BodyError> {
        let (body, _sending) = response(serve).await;
        body.collect().await.map(http_body_util::Collected::to_bytes)
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_holds_for_who_does_not_read() {
        const LONG: Duration = Duration::from_secs(15);
        let (told, gone) = tokio::sync::oneshot::channel();
        let (body, sending) = response(move |mut stream, _request| async move {
            let reason = poll_fn(|cx| stream.poll_reset(cx)).await;
            let _ = told.send(reason.is_ok());
        })
        .await;
        drop(sending);
        let begun = tokio::time::Instant::now();
        let mut unread = body.until(begun + LONG);
        assert!(gone.await.unwrap());
        assert_eq!(begun.elapsed(), LONG);
        assert!(unread.frame().await.unwrap().is_err());
    }

    #[tokio::test]
    async fn what_ends_without_its_end_is_broken_whatever_the_code() {
        for reason in [Reason::NO_ERROR, Reason::CANCEL, Reason::INTERNAL_ERROR] {
            let cut = received(move |mut stream, _request| async move {
                stream.send_data(HALF, false).unwrap();
                stream.send_reset(reason);
            });
            assert!(cut.await.is_err(), "{reason:?}");
        }
    }

    #[tokio::test]
    async fn a_server_may_answer_without_reading_the_request() {
        // h2 resets with NO_ERROR what was not read.
        let whole = received(|mut stream, request| async move {
            stream.send_data(HALF, true).unwrap();
            drop(request);
        });
        assert_eq!(whole.await.unwrap(), HALF);
    }
}
