//! What both ends of a connection between agents agree on, and its HTTP/2 streams as byte streams.
//!
//! Invariants: what breaks is reset, with RST_STREAM one way and as an error the other, whatever its code; a
//! receiver's window opens only as bytes are handed on.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::stream_body::poll_room;

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
