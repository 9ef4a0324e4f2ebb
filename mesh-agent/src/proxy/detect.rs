//! Which protocol a stream speaks, from its first bytes.
//!
//! Invariants: bytes looked at are never lost ([`Prefixed`] gives them again); [`classify`] is pure and says
//! `None` only while more bytes could change the answer, which [`MAX_SNIFF`] bounds.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// The longest request line that detection waits for (Envoy's inspector stops at the same).
pub(super) const MAX_SNIFF: usize = 8 * 1024;

const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest method in the IANA registry is 17 bytes; longer is no HTTP that anybody speaks.
const MAX_METHOD: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detected {
    Http1,
    Http2,
    Tls,
    /// Anything else.
    Opaque,
}

/// Says what `bytes` begin, or `None` while they could still become HTTP.
pub(super) fn classify(bytes: &[u8]) -> Option<Detected> {
    let first = *bytes.first()?;
    if first == 0x16 {
        // A TLS handshake record: type 22, then version 3.x.
        return match bytes.get(1) {
            None => None,
            Some(3) => Some(Detected::Tls),
            Some(_) => Some(Detected::Opaque),
        };
    }
    let seen = bytes.len().min(H2_PREFACE.len());
    if bytes[..seen] == H2_PREFACE[..seen] {
        return (seen == H2_PREFACE.len()).then_some(Detected::Http2);
    }
    classify_http1(bytes)
}

fn classify_http1(bytes: &[u8]) -> Option<Detected> {
    let line = match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => &bytes[..end],
        None => {
            let method = bytes.split(|byte| *byte == b' ').next().unwrap_or_default();
            // No method in use has small letters: waiting for the rest of a line would only stall what is no HTTP.
            let plausible =
                method.len() <= MAX_METHOD && method.iter().all(|b| is_token(*b) && !b.is_ascii_lowercase());
            return (!plausible || bytes.len() >= MAX_SNIFF).then_some(Detected::Opaque);
        }
    };
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut words = line.splitn(2, |byte| *byte == b' ');
    let method = words.next().unwrap_or_default();
    let rest = words.next().unwrap_or_default();
    let is_http = !method.is_empty()
        && method.len() <= MAX_METHOD
        && method.iter().all(|b| is_token(*b))
        && rest.len() >= b"* HTTP/1.1".len()
        && rest[..rest.len() - 1].ends_with(b" HTTP/1.");
    Some(if is_http {
        Detected::Http1
    } else {
        Detected::Opaque
    })
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Reads until the protocol is known. An end of stream decides for [`Detected::Opaque`].
pub(super) async fn sniff<S: AsyncRead + Unpin>(stream: &mut Prefixed<S>) -> io::Result<Detected> {
    loop {
        if let Some(detected) = classify(&stream.prefix) {
            return Ok(detected);
        }
        if stream.fill().await? == 0 {
            return Ok(Detected::Opaque);
        }
    }
}

/// A stream with bytes that were already read from it.
#[derive(Debug)]
pub(super) struct Prefixed<S> {
    prefix: BytesMut,
    stream: S,
}

impl<S> Prefixed<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            prefix: BytesMut::new(),
            stream,
        }
    }

    /// Gives back what was read, to be read again.
    pub(super) fn prepend(&mut self, read: &[u8]) {
        let rest = std::mem::replace(&mut self.prefix, read.into());
        self.prefix.extend_from_slice(&rest);
    }

    pub(super) fn get_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    pub(super) fn has_prefix(&self) -> bool {
        !self.prefix.is_empty()
    }
}

impl<S: AsyncRead + Unpin> Prefixed<S> {
    /// Reads some more into the prefix. Cancel safe.
    pub(super) async fn fill(&mut self) -> io::Result<usize> {
        const STEP: usize = 2048;
        self.prefix.reserve(STEP);
        self.stream.read_buf(&mut self.prefix).await
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let n = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..n]);
        self.prefix.advance(n);
        if self.prefix.is_empty() {
            self.prefix = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes() {
        use Detected::{Http1, Http2, Opaque, Tls};
        let table: &[(&[u8], Option<Detected>)] = &[
            (b"", None),
            (b"G", None),
            (b"GET / HTTP/1.1\r\n", Some(Http1)),
            (b"GET / HTTP/1.0\n", Some(Http1)),
            (b"OPTIONS * HTTP/1.1\r\n", Some(Http1)),
            (b"PROPFIND /a b HTTP/1.1\r\n", Some(Http1)),
            (b"GET /\r\n", Some(Opaque)),
            (b"PING\r\n", Some(Opaque)),
            (b"HELLO", None),
            (b"hello", Some(Opaque)),
            (b"EHLO example.org\r\n", Some(Opaque)),
            (b"*1\r\n$4\r\nPING\r\n", Some(Opaque)),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Some(Opaque)),
            (b"\x16\x03\x01\x02\x00", Some(Tls)),
            (b"\x16", None),
            (b"\x16\x16", Some(Opaque)),
            (b"\0\0\0\x08", Some(Opaque)),
            (b"PRI", None),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", None),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0", Some(Http2)),
            (b"PRI * HTTP/2.0\r\n\r\nXX", Some(Opaque)),
        ];
        for (bytes, expected) in table {
            assert_eq!(classify(bytes), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
        assert_eq!(classify(&[b'A'; MAX_METHOD + 1]), Some(Opaque));
        let mut endless = b"GET /".to_vec();
        endless.resize(MAX_SNIFF, b'a');
        assert_eq!(classify(&endless), Some(Opaque));
    }

    #[tokio::test]
    async fn a_preface_sent_byte_by_byte_is_read_again_whole() {
        let (client, mut server) = tokio::io::duplex(1);
        let writer = tokio::spawn(async move {
            use tokio::io::AsyncWriteExt;
            server.write_all(H2_PREFACE).await.unwrap();
        });
        let mut stream = Prefixed::new(client);
        assert_eq!(sniff(&mut stream).await.unwrap(), Detected::Http2);
        let mut again = Vec::new();
        stream.read_to_end(&mut again).await.unwrap();
        assert_eq!(again, H2_PREFACE);
        writer.await.unwrap();
    }
}
