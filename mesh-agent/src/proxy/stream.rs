//! A byte stream to or from a peer, however it travels.

use std::cell::RefCell;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::mesh_connection::StreamLease;
use super::mesh_stream::{Duplex, MAX_FRAME};

/// A message's head and a short body.
const SMALL: usize = 2048;
/// With less room than this left, a chunk's buffer is given up for a new one.
const LEAST_CHUNK: usize = 16 * 1024;
/// A smaller chunk is copied out: it would hold on to the whole buffer for as long as it waits to be sent.
const COPY_BELOW: usize = 4 * 1024;

thread_local! {
    /// Where the thread's sockets are read into: what a chunk leaves of it serves the next.
    static CHUNKS: RefCell<BytesMut> = RefCell::default();
}

/// Either a socket or a stream inside a pooled mTLS connection. Neither holds back what is written to it.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    /// An HTTP/2 CONNECT stream (HBONE).
    Tunnel(Box<Tunnel>),
}

/// A tunnelled stream, and its place on the pooled connection that carries it (`None` on the accepting side).
#[derive(Debug)]
pub(super) struct Tunnel {
    io: Duplex,
    lease: Option<StreamLease>,
}

impl Tunnel {
    fn add_moved(&mut self, bytes: usize) {
        if let Some(lease) = &mut self.lease {
            lease.load().add(bytes);
        }
    }
}

impl Stream {
    pub(super) fn tunnel(io: Duplex, lease: Option<StreamLease>) -> Self {
        Self::Tunnel(Box::new(Tunnel { io, lease }))
    }

    /// Whether the peer broke the stream, also after its own side has ended, where reading tells nothing more. A
    /// tunnel wakes the task when that changes; a socket is to be asked now and then.
    pub(super) fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Tcp(stream) => match stream.take_error() {
                Ok(None) => Poll::Pending,
                Ok(Some(_)) | Err(_) => Poll::Ready(()),
            },
            Self::Tunnel(tunnel) => tunnel.io.poll_broken(cx),
        }
    }

    /// What came next, uncopied if it is much; nothing at the end.
    pub(super) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        match self {
            Self::Tcp(stream) => CHUNKS.with_borrow_mut(|room| {
                if room.capacity() < LEAST_CHUNK {
                    room.reserve(MAX_FRAME as usize);
                }
                ready!(pin!(stream.read_buf(room)).poll(cx))?;
                if room.len() >= COPY_BELOW {
                    return Poll::Ready(Ok(room.split().freeze()));
                }
                let chunk = Bytes::copy_from_slice(room);
                room.clear();
                Poll::Ready(Ok(chunk))
            }),
            Self::Tunnel(tunnel) => {
                let chunk = ready!(tunnel.io.poll_chunk(cx))?;
                tunnel.add_moved(chunk.len());
                Poll::Ready(Ok(chunk))
            }
        }
    }

    /// Takes from the front of `bytes` as much as there is room for, uncopied, and says how much that was.
    pub(super) fn poll_give(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => {
                let written = ready!(Pin::new(stream).poll_write(cx, bytes))?;
                bytes.advance(written);
                Poll::Ready(Ok(written))
            }
            Self::Tunnel(tunnel) => {
                let given = ready!(tunnel.io.poll_give(cx, bytes))?;
                tunnel.add_moved(given);
                Poll::Ready(Ok(given))
            }
        }
    }

    /// Makes the end of the stream one that its peer cannot take for an orderly one.
    pub(super) fn reset(&mut self) {
        match self {
            Self::Tcp(stream) => {
                // Best effort: without it the peer sees an orderly end.
                let _ = socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO));
            }
            Self::Tunnel(tunnel) => tunnel.io.reset(),
        }
    }
}

macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Stream::Tcp($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Stream::Tunnel($stream) => {
                let $stream = Pin::new(&mut $stream.io);
                $call
            }
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [only] = bufs {
            return self.poll_write(cx, only);
        }
        let length = bufs.iter().map(|buf| buf.len()).sum::<usize>();
        if length > SMALL {
            return either!(self, stream => stream.poll_write_vectored(cx, bufs));
        }
        // One piece, where that takes little copying: the kernel's way from `writev` to a socket is longer.
        let mut room = [0; SMALL];
        let mut rest = &mut room[..];
        for buf in bufs {
            let (here, after) = rest.split_at_mut(buf.len());
            here.copy_from_slice(buf);
            rest = after;
        }
        self.poll_write(cx, &room[..length])
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Tunnel(stream) => stream.io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_small_chunk_does_not_hold_on_to_the_buffer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut stream = Stream::Tcp(listener.accept().await.unwrap().0);
        peer.write_all(b"x").await.unwrap();
        let chunk = poll_fn(|cx| stream.poll_chunk(cx)).await.unwrap();
        assert_eq!(chunk, "x");
        assert!(chunk.is_unique());
    }
}
