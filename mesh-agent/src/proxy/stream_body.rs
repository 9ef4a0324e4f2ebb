//! A message's body on an HTTP/2 stream: to and from other agents, and applications that are asked.
//!
//! On `h2` itself, not hyper: a stream that broke must look different from one that ended, all the way to the
//! application, and a request's head and the beginning of its body leave together. Invariants: what breaks is reset,
//! with RST_STREAM one way and as an error the other, whatever its code; a receiver's window opens only as bytes are
//! handed on; no empty frame is sent but the last (h2 allows a peer few of them).

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONTENT_LENGTH, HeaderMap};
use http::{Request, Response};
use http_body::{Body as _, Frame, SizeHint};
use tokio::task::JoinHandle;

use super::body::{Body, BodyError, Held};
use super::error::Error;
use super::failure;
use super::mesh_connection::Load;
use super::message::Message;

/// What a request's first frame may have at the most to be handed over before there is room for it: a frame of
/// HTTP/2's default length. With a peer that grants no room each stream holds so much more, in the buffer that it was
/// read into.
const UNOPENED: usize = 16 * 1024;

/// Sends a request's head, and of its body what is there. The rest is sent as long as the second is kept.
pub(super) fn ask(
    mut sender: SendRequest<Bytes>,
    message: Box<Message>,
    load: impl FnOnce() -> Option<Load>,
) -> Result<(ResponseFuture, Option<Sending>), Error> {
    let Message { parts, body, .. } = *message;
    let head = Request::from_parts(parts, ());
    let ended = body.is_end_stream();
    let (response, stream) = sender.send_request(head, ended).map_err(failure::of_h2)?;
    let sending = (!ended).then(|| Sending::start(body, stream, load())).flatten();
    Ok((response, sending))
}

/// An answer, whose body keeps `held` until it ends.
pub(super) fn answered(response: Response<RecvStream>, held: Held) -> Response<Body> {
    let (head, stream) = response.into_parts();
    let body = Body::receiving(Receiving::new(&head.headers, stream));
    Response::from_parts(head, body.holding(held))
}

/// A request's body on its way. Dropping it ends that: the peer is told (RST_STREAM) once the response is dropped too, or
/// has ended. So who answers early is not sent the rest, as with Envoy.
#[derive(Debug)]
pub(super) struct Sending(JoinHandle<()>);

impl Sending {
    /// `None` when all could be sent at once.
    fn start(body: Body, stream: SendStream<Bytes>, load: Option<Load>) -> Option<Self> {
        let mut sending = Box::pin(send(body, stream, Reason::CANCEL, Room::Unopened, load));
        // A task of its own only for what has to wait; its first poll there asks to be woken.
        let first = sending.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        first.is_pending().then(|| Self(tokio::spawn(sending)))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

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

/// Answers with all of `body`; one that breaks resets the stream.
pub(super) fn answer(body: Body, stream: SendStream<Bytes>) -> impl Future<Output = ()> {
    send(body, stream, Reason::INTERNAL_ERROR, Room::Asked, None)
}

/// How the first frame of a body gets its room.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Asked,
    /// h2 opens a request's stream when its connection's task runs, and has no room for it before. Who waits for that sends
    /// head and body in two writes, two records and two wake-ups of the peer; but h2 takes frames ahead of their room.
    Unopened,
}

/// Sends all of `body`. Returns early when the peer no longer wants it; a body that breaks resets the stream with
/// `broken`. What is sent is added to `load`, on the side that chooses the connections.
async fn send(
    mut body: Body,
    mut stream: SendStream<Bytes>,
    broken: Reason,
    mut room: Room,
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
        let room = std::mem::replace(&mut room, Room::Asked);
        let sent = match frame {
            None => stream.send_data(Bytes::new(), true),
            Some(Err(_)) => return stream.send_reset(broken),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    let last = body.is_end_stream();
                    if let Some(load) = &mut load {
                        load.add(data.len());
                    }
                    let early = room == Room::Unopened && !data.is_empty() && data.len() <= UNOPENED;
                    let sent = if early {
                        stream.send_data(data, last)
                    } else {
                        send_data(&mut stream, data, last).await
                    };
                    match sent {
                        Ok(()) if last => return,
                        sent => sent,
                    }
                }
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => {
                        // The peer may be gone, which is its business; or they are not allowed, and it waits.
                        if stream.send_trailers(trailers).is_err() {
                            stream.send_reset(broken);
                        }
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
pub(super) fn poll_room(
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use http_body_util::BodyExt;
    use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

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

    /// Counts how often it is written to.
    struct Counted(DuplexStream, Arc<AtomicUsize>);

    impl AsyncRead for Counted {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Counted {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Pin::new(&mut self.0).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    /// A server that says of each request's body how long it was; its window is `window`.
    async fn measuring(window: u32) -> (SendRequest<Bytes>, Arc<AtomicUsize>) {
        let (client, server) = tokio::io::duplex(64 * 1024);
        tokio::spawn(async move {
            let mut builder = h2::server::Builder::new();
            let mut connection: h2::server::Connection<_, Bytes> = builder
                .initial_window_size(window)
                .handshake(server)
                .await
                .unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let receiving = Receiving::new(&HeaderMap::new(), request.into_body());
                tokio::spawn(async move {
                    let body = Body::receiving(receiving).collect().await.unwrap().to_bytes();
                    let response = Response::builder().header("length", body.len());
                    respond.send_response(response.body(()).unwrap(), true).unwrap();
                });
            }
        });
        let writes = Arc::new(AtomicUsize::new(0));
        let (sender, connection) = h2::client::handshake(Counted(client, Arc::clone(&writes)))
            .await
            .unwrap();
        tokio::spawn(connection);
        (sender, writes)
    }

    /// Sends `length` bytes, and checks that they all arrived.
    async fn send_whole(sender: &SendRequest<Bytes>, length: usize) {
        let (parts, ()) = Request::post("http://a/").body(()).unwrap().into_parts();
        let message = Message::new(parts, Body::full(vec![b'x'; length]), true);
        let (response, _sending) = ask(sender.clone(), message, || None).unwrap();
        assert_eq!(response.await.unwrap().headers()["length"], length.to_string());
    }

    #[tokio::test]
    async fn a_request_leaves_in_one_write_with_its_body() {
        let (sender, writes) = measuring(64 * 1024).await;
        // What both sides say of themselves passes before.
        send_whole(&sender, 0).await;
        let before = writes.load(Ordering::Relaxed);
        send_whole(&sender, 200).await;
        assert_eq!(writes.load(Ordering::Relaxed), before + 1);
    }

    #[tokio::test]
    async fn a_body_larger_than_the_window_arrives_whole() {
        let (sender, _writes) = measuring(100).await;
        for length in [99, 100, 101, UNOPENED, UNOPENED + 1, 3 * UNOPENED] {
            send_whole(&sender, length).await;
        }
    }
}
