//! Which protocol a stream speaks, from its first bytes.
//!
//! Invariants: bytes looked at are never lost ([`Prefixed`] gives them again); [`classify`] is pure and says
//! `None` only while it is likely that more bytes make it HTTP, which [`MAX_SNIFF`] bounds; a stream that must not
//! be HTTP ([`Prefixed::refuse_http`]) ends in an error before the first request line was given out whole, so
//! that neither a pause nor an oddity makes a request pass for something else.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::first_line::{Begun, FirstLine, Line};
use super::stream::Stream;

/// The longest request line that detection waits for (Envoy's inspector stops at the same).
pub(super) const MAX_SNIFF: usize = 8 * 1024;

const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

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
    let mut line = FirstLine::default();
    match line.feed(bytes) {
        Some(Line::Request) => return Some(Detected::Http1),
        Some(Line::Simple | Line::Other) => return Some(Detected::Opaque),
        None => {}
    }
    match line.begun() {
        Begun::Hardly => Some(Detected::Opaque),
        Begun::Request | Begun::Perhaps if bytes.len() < MAX_SNIFF => None,
        Begun::Request => Some(Detected::Http1),
        Begun::Perhaps => Some(Detected::Opaque),
    }
}

/// What bytes that [`classify`] cannot tell yet are, if nothing else may be what they look like.
fn begun(bytes: &[u8]) -> Detected {
    if bytes.len() > b"PRI ".len() && H2_PREFACE.starts_with(bytes) {
        return Detected::Http2;
    }
    let mut line = FirstLine::default();
    match (line.feed(bytes), line.begun()) {
        (None, Begun::Request) => Detected::Http1,
        _ => Detected::Opaque,
    }
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
    /// What was given out of a first line that must not be a request's.
    watched: Option<FirstLine>,
}

impl<S> Prefixed<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            prefix: BytesMut::new(),
            stream,
            watched: None,
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

    /// What the bytes read so far are, if nothing else may be what they look like.
    pub(super) fn begun(&self) -> Detected {
        begun(&self.prefix)
    }

    /// From now on a request line is an error.
    pub(super) fn refuse_http(&mut self) {
        self.watched = Some(FirstLine::default());
    }

    /// Looks at bytes that are about to be given out.
    fn watch(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.watched.as_mut().and_then(|line| line.feed(bytes)) {
            None => Ok(()),
            Some(Line::Other) => {
                self.watched = None;
                Ok(())
            }
            Some(Line::Request | Line::Simple) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a request line of HTTP on a stream that was not taken for HTTP (name the port's protocol, or send the line at once)",
            )),
        }
    }
}

impl<S: AsyncRead + Unpin> Prefixed<S> {
    /// Reads some more into the prefix. Cancel safe. Until something comes there is no buffer for it.
    pub(super) async fn fill(&mut self) -> io::Result<usize> {
        const STEP: usize = 2048;
        poll_fn(|cx| {
            let mut bytes = [MaybeUninit::uninit(); STEP];
            let mut read = ReadBuf::uninit(&mut bytes);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut read))?;
            self.prefix.extend_from_slice(read.filled());
            Poll::Ready(Ok(read.filled().len()))
        })
        .await
    }
}

impl Prefixed<Stream> {
    /// What came next, uncopied; nothing at the end.
    pub(super) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        let chunk = if self.prefix.is_empty() {
            ready!(self.stream.poll_chunk(cx))?
        } else {
            std::mem::take(&mut self.prefix).freeze()
        };
        Poll::Ready(self.watch(&chunk).map(|()| chunk))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if self.prefix.is_empty() {
            ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        } else {
            let n = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix[..n]);
            self.prefix.advance(n);
            if self.prefix.is_empty() {
                self.prefix = BytesMut::new();
            }
        }
        if self.watched.is_some() {
            let watched = self.watch(&buf.filled()[before..]);
            if watched.is_err() {
                buf.set_filled(before);
            }
            return Poll::Ready(watched);
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
    use tokio::io::AsyncReadExt;

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
            (b"\r\n\r\nGET / HTTP/1.1\r\n", Some(Http1)),
            (b"GET / HTTP/1.1 \r\n", Some(Http1)),
            (b"GET\t/\tHTTP/1.1\r\n", Some(Http1)),
            (b"get / HTTP/1.1\r\n", Some(Http1)),
            (b"GET / HTTP/1.1", None),
            (b"FOO / HTTP/1.1", None),
            (b"GET /\r\n", Some(Opaque)),
            (b"\r\n", Some(Opaque)),
            (b"PING\r\n", Some(Opaque)),
            // Nothing registered begins so: it does not wait for what it may become.
            (b"HELLO", Some(Opaque)),
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
            (b"PRI * HTTP/2.0\r\n\r\nXX", Some(Http1)),
        ];
        for (bytes, expected) in table {
            assert_eq!(classify(bytes), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
        for (start, expected) in [(&b"GET /"[..], Http1), (b"FOO /", Opaque), (b"GET a", Opaque)] {
            let mut endless = start.to_vec();
            endless.resize(MAX_SNIFF - 1, b'a');
            assert_eq!(classify(&endless), None);
            endless.push(b'a');
            assert_eq!(classify(&endless), Some(expected));
        }
    }

    #[test]
    fn bytes_that_do_not_go_on() {
        use Detected::{Http1, Http2, Opaque};
        let table: &[(&[u8], Detected)] = &[
            (b"", Opaque),
            (b"G", Opaque),
            (b"GET", Opaque),
            (b"GET ", Http1),
            (b"\r\nGET /", Http1),
            (b"GET / HTTP/1.1", Http1),
            (b"GET key", Opaque),
            (b"PRI", Opaque),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", Http2),
            (b"\x16", Opaque),
        ];
        for (bytes, expected) in table {
            assert_eq!(begun(bytes), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    /// Gives `pieces` to a stream that must not be HTTP, and says what came out, and how it ended.
    async fn through(pieces: &[&[u8]]) -> (Vec<u8>, io::Result<usize>) {
        let (mut client, server) = tokio::io::duplex(64 * 1024);
        let mut stream = Prefixed::new(server);
        let mut got = Vec::new();
        for (n, piece) in pieces.iter().enumerate() {
            use tokio::io::AsyncWriteExt;
            client.write_all(piece).await.unwrap();
            if n == 0 {
                stream.fill().await.unwrap();
                stream.refuse_http();
            }
            if let Err(error) = stream.read_buf(&mut got).await {
                return (got, Err(error));
            }
        }
        drop(client);
        let ended = stream.read_to_end(&mut got).await;
        (got, ended)
    }

    #[tokio::test]
    async fn a_stream_that_must_not_be_http_ends_before_its_request_line_does() {
        for pieces in [
            &[
                &b"\r\n"[..],
                b"GET / HTTP/1.1\r\nx-forwarded-client-cert: forged\r\n\r\n",
            ][..],
            &[b"GE", b"T / HTTP/1.1\r\n"],
            &[b"FOO", b" / HTT", b"P/1.1", b"\n"],
            &[b"GET", b" /\r\nx-forwarded-client-cert: forged\r\n\r\n"],
            &[b"PR", b"I * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        ] {
            let (got, ended) = through(pieces).await;
            assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::InvalidData);
            assert_eq!(got, pieces[..pieces.len() - 1].concat(), "what came before it");
        }
        for pieces in [
            &[&b"HELLO"[..], b" there\r\n", b"GET / HTTP/1.1\r\n"][..],
            &[b"\0\n", b"GET / HTTP/1.1\r\n"],
            &[b"GET key\r\n", b"GET / HTTP/1.1\r\n"],
        ] {
            let (got, ended) = through(pieces).await;
            ended.unwrap();
            assert_eq!(got, pieces.concat());
        }
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
