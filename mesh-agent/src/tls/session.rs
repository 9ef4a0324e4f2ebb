//! Handshakes on sockets, and what carries a connection's bytes from then on: rustls, or the kernel.
//!
//! Invariant: the kernel takes a connection over only where it was asked to, where it can, and between two records;
//! until then rustls has it, and keeps it otherwise. What fails after that breaks the connection: rustls is gone when
//! the kernel gets the keys, which it took on trial when the agent started; and a handshake message that begins before
//! and ends after it is one that nobody sends.

use std::io::{self, ErrorKind, IoSlice, Read as _, Write as _};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use nix::errno::Errno;
use rustls::pki_types::ServerName;
use rustls::{CipherSuite, ClientConfig, Connection, ConnectionCommon, ServerConfig, SideData};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::Transport;
use super::kernel::{self, Early, KernelStream, Side};
use super::records::Records;
use super::verify::peer_identity;
use crate::model::Identity;

/// A connection after its handshake.
#[derive(Debug)]
pub struct Session {
    pub stream: Stream,
    /// `None` when the peer did not say.
    pub transport: Option<Transport>,
    /// Who the client is, for a server. (A client's handshake fails with anybody else than it expects.)
    pub client: Option<Identity>,
}

/// The bytes of a connection, decrypted.
#[derive(Debug)]
pub enum Stream {
    Agent(Box<tokio_rustls::TlsStream<Records>>),
    Kernel(KernelStream),
}

/// The client's side. Takes as long as the peer does.
pub async fn connect(config: Arc<ClientConfig>, to: IpAddr, socket: TcpStream) -> io::Result<Session> {
    let records = records(socket, config.enable_secret_extraction);
    // What rustls wants to be told of a server; nobody checks it and it is not sent.
    let name = ServerName::IpAddress(to.into());
    let mut stream = TlsConnector::from(config).connect(name, records).await?;
    let (records, session) = stream.get_mut();
    let transport = Transport::negotiated(session.alpn_protocol());
    let stream = match prepare(records, session).await? {
        None => Stream::Agent(Box::new(stream.into())),
        Some(early) => {
            let (records, session) = stream.into_inner();
            hand_over(records, session.into(), early, Side::Client)?
        }
    };
    Ok(Session {
        stream,
        transport,
        client: None,
    })
}

/// The server's side. Takes as long as the peer does.
pub async fn accept(config: Arc<ServerConfig>, socket: TcpStream) -> io::Result<Session> {
    let records = records(socket, config.enable_secret_extraction);
    let mut stream = TlsAcceptor::from(config).accept(records).await?;
    let (records, session) = stream.get_mut();
    let transport = Transport::negotiated(session.alpn_protocol());
    let client = session.peer_certificates().and_then(peer_identity);
    let stream = match prepare(records, session).await? {
        None => Stream::Agent(Box::new(stream.into())),
        Some(early) => {
            let (records, session) = stream.into_inner();
            hand_over(records, session.into(), early, Side::Server)?
        }
    };
    Ok(Session {
        stream,
        transport,
        client,
    })
}

/// Only secrets that may be had can be handed over: the configuration says so.
fn records(socket: TcpStream, has_secrets: bool) -> Records {
    match has_secrets {
        true => Records::to_be_taken(socket),
        false => Records::to_stay(socket),
    }
}

/// Brings a session to the end of a record, if the kernel shall and can have it; `None` if it stays.
async fn prepare<D: SideData>(
    records: &mut Records,
    session: &mut ConnectionCommon<D>,
) -> io::Result<Option<Early>> {
    if !records.may_be_taken() || !attach(records, session) {
        records.stay();
        return Ok(None);
    }
    let mut early = Early::default();
    read_out(session, &mut early)?;
    // A record that has begun is rustls's still.
    let rest = records.rest().await?;
    let mut rest = &rest[..];
    while !rest.is_empty() {
        session.read_tls(&mut rest)?;
        let processed = session.process_new_packets();
        let processed = processed.map_err(|error| io::Error::new(ErrorKind::InvalidData, error));
        if let Err(error) = processed {
            // The peer may be told why; the connection ends either way.
            let _ = send_out(records, session).await;
            return Err(error);
        }
        read_out(session, &mut early)?;
    }
    // The answer to a change of keys waits in rustls for something to send, and would be lost with it.
    let _ = session.writer().write(&[])?;
    send_out(records, session).await?;
    Ok(Some(early))
}

/// Whether the kernel is ready for a session's keys.
fn attach<D>(records: &Records, session: &ConnectionCommon<D>) -> bool {
    let suite = session.negotiated_cipher_suite().map(|suite| suite.suite());
    if suite != Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256) {
        return false;
    }
    match kernel::attach(records.socket()) {
        Ok(()) => true,
        // The peer has left again.
        Err(Errno::ENOTCONN) => false,
        Err(error) => {
            tracing::warn!(%error, "the kernel does not take a TLS connection, so the agent encrypts it");
            false
        }
    }
}

async fn send_out<D: SideData>(records: &mut Records, session: &mut ConnectionCommon<D>) -> io::Result<()> {
    let mut waiting = Vec::new();
    while session.wants_write() {
        session.write_tls(&mut waiting)?;
    }
    records.write_all(&waiting).await
}

/// Takes what is decrypted already.
fn read_out<D: SideData>(session: &mut ConnectionCommon<D>, early: &mut Early) -> io::Result<()> {
    match session.reader().read_to_end(&mut early.data) {
        Ok(_) => early.ended = true,
        // The socket tells of its end again.
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::UnexpectedEof) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

fn hand_over(records: Records, session: Connection, early: Early, side: Side) -> io::Result<Stream> {
    let secrets = session.dangerous_extract_secrets().map_err(io::Error::other)?;
    let stream = KernelStream::new(records.into_socket(), &secrets, early, side)?;
    Ok(Stream::Kernel(stream))
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Agent(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Kernel(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Agent(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Kernel(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Agent(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Kernel(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Agent(stream) => stream.is_write_vectored(),
            Self::Kernel(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Agent(stream) => Pin::new(stream).poll_flush(cx),
            Self::Kernel(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Agent(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Kernel(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
