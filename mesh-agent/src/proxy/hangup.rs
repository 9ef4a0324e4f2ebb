//! Notices that an HTTP/1 client is gone while its request is being answered.
//!
//! hyper reads nothing between a request's end and its response's, so that a client may end its own side and
//! still get its answer; a client that is gone would then be noticed only by writing to it. It flushes whenever it
//! is polled though, and there the client's side is looked at.
//!
//! Invariants: a reset ends the connection, and what is done for it, at once, unless the client has sent
//! more that waits to be read (a second request); a client that ended its side, which
//! looks the same whether it still listens or not, has its answer only as long as less than [`HALF_OPEN`] passes
//! without a byte of it; what is read ahead (one byte at most) is given again.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// As long as Envoy gives a whole request by default. Envoy and nginx take the end of the client's side for an
/// end of its interest at once; scripts that pipe a request into `nc -N` do not mean it so.
const HALF_OPEN: Duration = Duration::from_secs(15);

/// A client's connection while HTTP/1 is served on it.
#[derive(Debug)]
pub(super) struct Watched<S> {
    stream: S,
    /// The reader itself waits for bytes.
    awaited: bool,
    ahead: Option<u8>,
    broken: Option<io::Error>,
    ended: bool,
    silence: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Watched<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            awaited: false,
            ahead: None,
            broken: None,
            ended: false,
            silence: None,
        }
    }

    /// The stream, and what was read of it but not by whom it was served.
    pub(super) fn into_inner(self) -> (S, Option<u8>) {
        (self.stream, self.ahead)
    }

    /// An error means that nobody waits for an answer.
    fn look(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        // Whoever waits for bytes is woken by an end, too.
        let awaited = std::mem::take(&mut self.awaited);
        if !awaited && !self.ended && self.ahead.is_none() {
            let mut byte = [0];
            let mut buf = ReadBuf::new(&mut byte);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buf) {
                Poll::Pending => {}
                Poll::Ready(read) => {
                    read?;
                    self.ahead = buf.filled().first().copied();
                    self.ended = self.ahead.is_none();
                }
            }
        }
        if self.ended {
            let silence = self
                .silence
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(HALF_OPEN)));
            if silence.as_mut().poll(cx).is_ready() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    fn wrote(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if self.ended && written.is_ready() {
            self.silence = None;
        }
        written
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Err(error));
        }
        let ahead = self.ahead.take();
        if let Some(byte) = ahead {
            buf.put_slice(&[byte]);
        }
        if self.ended || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Ready(Ok(())) => self.ended = buf.filled().len() == before,
            Poll::Ready(Err(error)) if ahead.is_some() => self.broken = Some(error),
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => {
                self.awaited = true;
                if ahead.is_none() {
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.look(cx)?;
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::{Request, Response};
    use hyper::body::Incoming;
    use socket2::SockRef;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Notify;
    use tokio::time::{Instant, sleep, timeout};

    use super::*;
    use crate::drain;
    use crate::proxy::body::Body;
    use crate::proxy::serve;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

    /// Serves with an application that thinks for so long.
    fn serve(thinking: Duration) -> (DuplexStream, impl Future<Output = ()> + Send) {
        let (client, server) = tokio::io::duplex(64 * 1024);
        let (trigger, watcher) = drain::new();
        let handle = move |_: Request<Incoming>| async move {
            sleep(thinking).await;
            Response::new(Body::full("late"))
        };
        let serving = async move {
            serve::http1(server, watcher, handle).await;
            drop(trigger);
        };
        (client, serving)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_ended_its_side_has_its_answer() {
        let (mut client, serving) = serve(HALF_OPEN / 2);
        let serving = tokio::spawn(serving);
        client.write_all(REQUEST).await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("late"),
            "{answer}"
        );
        serving.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn but_not_for_ever() {
        let (mut client, serving) = serve(HALF_OPEN * 100);
        let begun = Instant::now();
        client.write_all(REQUEST).await.unwrap();
        client.shutdown().await.unwrap();
        serving.await;
        let passed = begun.elapsed();
        assert!((HALF_OPEN..HALF_OPEN * 2).contains(&passed), "{passed:?}");
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert!(answer.is_empty());
    }

    #[tokio::test]
    async fn a_reset_ends_what_is_under_way() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let (_trigger, watcher) = drain::new();
        let begun = Arc::new(Notify::new());
        let asked = Arc::clone(&begun);
        let handle = move |_: Request<Incoming>| {
            asked.notify_one();
            std::future::pending::<Response<Body>>()
        };
        let serving = tokio::spawn(serve::http1(server, watcher, handle));
        client.write_all(REQUEST).await.unwrap();
        begun.notified().await;
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        timeout(Duration::from_secs(5), serving).await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_sent_meanwhile_is_not_lost() {
        let (mut client, serving) = serve(Duration::from_secs(1));
        let serving = tokio::spawn(serving);
        for _ in 0..3 {
            client.write_all(REQUEST).await.unwrap();
            sleep(Duration::from_millis(10)).await;
        }
        client.shutdown().await.unwrap();
        let mut answers = String::new();
        client.read_to_string(&mut answers).await.unwrap();
        assert_eq!(answers.matches("HTTP/1.1 200").count(), 3, "{answers}");
        serving.await.unwrap();
    }
}
