//! A socket that a TLS session reads record by record (RFC 8446, section 5.1), so that it never holds a part of one.
//!
//! Whoever takes a connection over from a session (the kernel) can only begin where a record begins. Invariants: of a
//! record nothing is handed on before all of it is here, unless the peer ended or what it sends is no record (which
//! the session then sees); when the session [stays](Records::stay), this is the socket and nothing else.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BufMut as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Type, version and length.
const HEAD: usize = 5;
/// The most that a record of TLS 1.3 has behind its head.
const MAX_PAYLOAD: usize = (1 << 14) + 256;

#[derive(Debug)]
pub struct Records {
    socket: TcpStream,
    by_record: bool,
    /// Read from the socket; `given` of it was handed on.
    record: Vec<u8>,
    given: usize,
    /// Nothing is waited for any more.
    passing: bool,
}

impl Records {
    /// Of a session that may be taken over.
    pub(super) fn to_be_taken(socket: TcpStream) -> Self {
        Self {
            by_record: true,
            ..Self::to_stay(socket)
        }
    }

    /// Of a session that stays: the socket as it is.
    pub(super) fn to_stay(socket: TcpStream) -> Self {
        Self {
            socket,
            by_record: false,
            record: Vec::new(),
            given: 0,
            passing: false,
        }
    }

    /// The session stays after all.
    pub(super) fn stay(&mut self) {
        self.by_record = false;
    }

    /// The session may still be taken over.
    pub(super) fn may_be_taken(&self) -> bool {
        self.by_record
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// The socket, which begins with what follows the [rest](Self::rest).
    pub(super) fn into_socket(self) -> TcpStream {
        self.socket
    }

    /// Reads the record that has begun to its end, and gives it; nothing between two records.
    pub(super) async fn rest(&mut self) -> io::Result<Vec<u8>> {
        if self.is_between() {
            return Ok(Vec::new());
        }
        poll_fn(|cx| self.poll_record(cx)).await?;
        let rest = self.record.split_off(self.given);
        self.forget();
        Ok(rest)
    }

    fn is_between(&self) -> bool {
        self.given == self.record.len()
    }

    fn forget(&mut self) {
        self.record = Vec::new();
        self.given = 0;
    }

    /// Waits until there is a whole record, or all that comes of it.
    fn poll_record(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What is being handed on already was whole.
        while self.given == 0 && !self.passing {
            let Some(wanted) = wanted(&self.record) else {
                self.passing = true;
                break;
            };
            let missing = wanted - self.record.len();
            if missing == 0 {
                break;
            }
            ready!(self.socket.poll_read_ready(cx))?;
            match self.socket.try_read_buf(&mut (&mut self.record).limit(missing)) {
                Ok(0) => self.passing = true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// How long a record is that begins so, or its head; `None` if it is no record.
fn wanted(record: &[u8]) -> Option<usize> {
    let Some(&[kind, major, _, high, low]) = record.first_chunk() else {
        return Some(HEAD);
    };
    let payload = usize::from(u16::from_be_bytes([high, low]));
    // From `change_cipher_spec` to `application_data`.
    let is_record = (20..=23).contains(&kind) && major == 3 && payload <= MAX_PAYLOAD;
    is_record.then_some(HEAD + payload)
}

impl AsyncRead for Records {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_between() && (!self.by_record || self.passing) {
            return Pin::new(&mut self.socket).poll_read(cx, buf);
        }
        ready!(self.poll_record(cx))?;
        let rest = &self.record[self.given..];
        let n = buf.remaining().min(rest.len());
        buf.put_slice(&rest[..n]);
        self.given += n;
        if self.is_between() {
            self.forget();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Records {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_as_long_as_its_head_says() {
        assert_eq!(wanted(&[]), Some(HEAD));
        assert_eq!(wanted(&[23, 3, 3, 1]), Some(HEAD));
        assert_eq!(wanted(&[23, 3, 3, 1, 2]), Some(HEAD + 258));
        assert_eq!(wanted(&[22, 3, 1, 0, 0]), Some(HEAD));
        assert_eq!(wanted(b"GET / HTTP/1.1"), None);
        assert_eq!(wanted(&[23, 3, 3, 0x41, 1]), None);
    }
}
