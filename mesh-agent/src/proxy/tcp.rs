//! The opaque copy between two streams.
//!
//! Invariants: an end of stream one way is passed on and the other way goes on (half-close); an error on either
//! side ends both with a reset where the stream can send one; a slow reader holds up its writer (nothing is
//! buffered but one buffer per direction); bytes are counted as they are written.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::detect::Prefixed;
use super::stream::Stream;

/// One buffer a direction: what a socket gives at once in bulk transfers, small enough for many idle connections.
const BUFFER: usize = 16 * 1024;

/// Bytes moved so far, seen from the client's side.
#[derive(Debug, Default)]
pub(super) struct Moved {
    /// From the client to the server.
    pub(super) sent: AtomicU64,
    /// From the server to the client.
    pub(super) received: AtomicU64,
}

/// Copies both ways until both have ended.
pub(super) async fn copy<A: Resettable, B: Resettable>(
    client: A,
    server: B,
    moved: &Moved,
) -> io::Result<()> {
    let (mut client_read, mut client_write) = tokio::io::split(client);
    let (mut server_read, mut server_write) = tokio::io::split(server);
    let result = tokio::try_join!(
        one_way(&mut client_read, &mut server_write, &moved.sent),
        one_way(&mut server_read, &mut client_write, &moved.received),
    );
    if result.is_err() {
        client_read.unsplit(client_write).reset();
        server_read.unsplit(server_write).reset();
    }
    result.map(drop)
}

async fn one_way<R, W>(from: &mut R, to: &mut W, counter: &AtomicU64) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = bytes::BytesMut::new();
    loop {
        buffer.reserve(BUFFER);
        let n = from.read_buf(&mut buffer).await?;
        if n == 0 {
            return match to.shutdown().await {
                // The other side may already have closed both ways, which is fine with us.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                result => result,
            };
        }
        to.write_all(&buffer).await?;
        to.flush().await?;
        counter.fetch_add(n as u64, Ordering::Relaxed);
        buffer.clear();
    }
}

/// A stream that can be ended so that its peer notices that something went wrong.
pub(super) trait Resettable: AsyncRead + AsyncWrite + Unpin {
    fn reset(self);
}

impl Resettable for TcpStream {
    fn reset(self) {
        // Best effort: without it the peer sees an orderly end.
        let _ = socket2::SockRef::from(&self).set_linger(Some(std::time::Duration::ZERO));
    }
}

impl<S: Resettable> Resettable for Prefixed<S> {
    fn reset(self) {
        self.into_inner().reset();
    }
}

impl Resettable for Stream {
    fn reset(self) {
        match self {
            Self::Tcp(stream) => stream.reset(),
            // Dropping an HTTP/2 stream that has not ended sends RST_STREAM.
            Self::Tunnel(stream) => drop(stream),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

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
            async move { copy(near, far, &moved).await }
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

    #[tokio::test]
    async fn a_reset_is_passed_on() {
        let ((mut client, near), (far, server)) = (pair().await, pair().await);
        let copying = tokio::spawn(async move { copy(near, far, &Moved::default()).await });
        server.reset();
        let error = client.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(copying.await.unwrap().is_err());
    }
}
