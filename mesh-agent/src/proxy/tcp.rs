//! The opaque copy between two streams.
//!
//! Invariants: an end of stream one way is passed on and the other way goes on (half-close); what ends any other
//! way, also by being dropped, resets both sides; a slow reader holds up its writer; bytes are counted as they are
//! written; they are not copied on their way through; a connection that moves nothing holds no buffer.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWrite;

use super::detect::Prefixed;
use super::stream::Stream;

/// Reads of one direction before the others of the thread have their turn.
const ROUNDS: usize = 8;

/// How often a side that has ended is looked at for a reset.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Bytes moved so far, seen from the client's side.
#[derive(Debug, Default)]
pub(super) struct Moved {
    /// From the client to the server.
    pub(super) sent: AtomicU64,
    /// From the server to the client.
    pub(super) received: AtomicU64,
}

/// Which side ended a copy before its time.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("the client's side broke: {0}")]
    Client(io::Error),
    #[error("the server's side broke: {0}")]
    Server(io::Error),
}

/// Copies both ways until both have ended.
pub(super) async fn copy(
    client: &mut Prefixed<Stream>,
    server: &mut Prefixed<Stream>,
    moved: &Moved,
) -> Result<(), Broken> {
    let mut pair = Pair {
        client,
        server,
        whole: false,
    };
    let (mut there, mut back) = (Flow::default(), Flow::default());
    let mut look = None;
    let copied = poll_fn(|cx| {
        let Pair { client, server, .. } = &mut pair;
        let sent = there.poll(cx, client, server, &moved.sent);
        let sent = sent.map_err(|error| error.of(Broken::Client, Broken::Server))?;
        let received = back.poll(cx, server, client, &moved.received);
        let received = received.map_err(|error| error.of(Broken::Server, Broken::Client))?;
        let half = match (sent, received) {
            (Poll::Ready(()), Poll::Ready(())) => return Poll::Ready(Ok(())),
            (Poll::Pending, Poll::Pending) => return Poll::Pending,
            (Poll::Ready(()), Poll::Pending) => client.get_mut(),
            (Poll::Pending, Poll::Ready(())) => server.get_mut(),
        };
        // Nothing more is read from this one: a reset would be noticed only by writing to it.
        let look = look.get_or_insert_with(|| tokio::time::interval(LOOK_EVERY));
        let _ = look.poll_tick(cx);
        ready!(half.poll_broken(cx));
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        Poll::Ready(Err(match sent {
            Poll::Ready(()) => Broken::Client(reset),
            Poll::Pending => Broken::Server(reset),
        }))
    });
    copied.await?;
    pair.whole = true;
    Ok(())
}

struct Pair<'a> {
    client: &'a mut Prefixed<Stream>,
    server: &'a mut Prefixed<Stream>,
    /// Both sides have ended in good order.
    whole: bool,
}

impl Drop for Pair<'_> {
    fn drop(&mut self) {
        if !self.whole {
            self.client.get_mut().reset();
            self.server.get_mut().reset();
        }
    }
}

/// An error of one of a flow's two ends.
enum FlowError {
    From(io::Error),
    To(io::Error),
}

impl FlowError {
    fn of(self, from: impl FnOnce(io::Error) -> Broken, to: impl FnOnce(io::Error) -> Broken) -> Broken {
        match self {
            Self::From(error) => from(error),
            Self::To(error) => to(error),
        }
    }
}

/// One direction.
#[derive(Default)]
struct Flow {
    /// Read, and not yet written.
    rest: Bytes,
    ended: bool,
    shut: bool,
}

impl Flow {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Prefixed<Stream>,
        to: &mut Prefixed<Stream>,
        counter: &AtomicU64,
    ) -> Poll<Result<(), FlowError>> {
        for _ in 0..ROUNDS {
            if self.shut {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_rest(cx, to.get_mut(), counter)).map_err(FlowError::To)?;
            if self.ended {
                return self.poll_shut(cx, to).map_err(FlowError::To);
            }
            self.rest = ready!(from.poll_chunk(cx)).map_err(FlowError::From)?;
            self.ended = self.rest.is_empty();
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_rest(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut Stream,
        counter: &AtomicU64,
    ) -> Poll<io::Result<()>> {
        while !self.rest.is_empty() {
            let n = ready!(to.poll_give(cx, &mut self.rest)).and_then(some)?;
            counter.fetch_add(n as u64, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shut(&mut self, cx: &mut Context<'_>, to: &mut Prefixed<Stream>) -> Poll<io::Result<()>> {
        let shut = ready!(Pin::new(to).poll_shutdown(cx));
        self.shut = true;
        Poll::Ready(match shut {
            // The other side may already have closed both ways, which is fine with us.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            shut => shut,
        })
    }
}

fn some(written: usize) -> io::Result<usize> {
    if written == 0 {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (a, b) = tokio::join!(TcpStream::connect(address), listener.accept());
        (a.unwrap(), b.unwrap().0)
    }

    #[tokio::test]
    async fn half_close_keeps_the_other_way_open() {
        let ((mut client, near), (far, mut server)) = (pair().await, pair().await);
        let moved = std::sync::Arc::new(Moved::default());
        let copying = tokio::spawn({
            let moved = std::sync::Arc::clone(&moved);
            async move { copy(&mut stream(near), &mut stream(far), &moved).await }
        });
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        server.write_all(b"late answer").await.unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "late answer");
        copying.await.unwrap().unwrap();
        assert_eq!(moved.sent.load(Ordering::Relaxed), 8);
        assert_eq!(moved.received.load(Ordering::Relaxed), 11);
    }

    fn stream(socket: TcpStream) -> Prefixed<Stream> {
        Prefixed::new(Stream::Tcp(socket))
    }

    async fn assert_reset(mut socket: TcpStream) {
        let error = socket.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_reset_is_passed_on_and_blamed_on_its_side() {
        let ((client, near), (far, server)) = (pair().await, pair().await);
        let copying =
            tokio::spawn(async move { copy(&mut stream(near), &mut stream(far), &Moved::default()).await });
        Stream::Tcp(server).reset();
        assert_reset(client).await;
        assert!(matches!(copying.await.unwrap(), Err(Broken::Server(_))));
    }

    #[tokio::test]
    async fn a_reset_after_the_end_of_a_side_is_noticed_too() {
        let ((mut client, near), (far, server)) = (pair().await, pair().await);
        let copying =
            tokio::spawn(async move { copy(&mut stream(near), &mut stream(far), &Moved::default()).await });
        client.shutdown().await.unwrap();
        let (mut reading, _writing) = server.into_split();
        assert_eq!(reading.read(&mut [0]).await.unwrap(), 0);
        Stream::Tcp(client).reset();
        assert!(matches!(copying.await.unwrap(), Err(Broken::Client(_))));
    }

    #[tokio::test]
    async fn what_is_cut_is_reset_on_both_sides() {
        let ((client, near), (far, server)) = (pair().await, pair().await);
        let copying =
            tokio::spawn(async move { copy(&mut stream(near), &mut stream(far), &Moved::default()).await });
        // A copy that has not begun holds nothing that could be cut short.
        tokio::task::yield_now().await;
        copying.abort();
        assert_reset(client).await;
        assert_reset(server).await;
    }

    #[tokio::test]
    async fn more_than_a_slow_reader_takes_arrives_whole() {
        let ((mut client, near), (far, mut server)) = (pair().await, pair().await);
        let copying =
            tokio::spawn(async move { copy(&mut stream(near), &mut stream(far), &Moved::default()).await });
        let sent: Vec<u8> = (0..8_000_000_u32).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client
        });
        let mut got = Vec::new();
        while got.len() < expected.len() {
            let mut piece = [0; 1000];
            let n = server.read(&mut piece).await.unwrap();
            assert_ne!(n, 0);
            got.extend_from_slice(&piece[..n]);
            tokio::task::yield_now().await;
        }
        assert!(got == expected);
        drop((server, writing.await.unwrap()));
        copying.await.unwrap().unwrap();
    }
}
