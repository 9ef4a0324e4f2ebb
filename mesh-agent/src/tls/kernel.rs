//! The record layer in the kernel (kTLS): after its handshake a connection is a socket, and the kernel encrypts.
//!
//! Invariants: only ChaCha20-Poly1305 is handed over, since its keys never wear out (AES-GCM's do, after some million
//! records, and no kernel before 6.14 can be given new ones); an end without `close_notify` is an error, as a cut
//! connection must not look like one that ended; what is neither data nor an end is refused, but for tickets.
//!
//! Bytes that are no record at all newer kernels tell of by EPOLLERR alone, for which tokio wakes no reader: who
//! writes next learns of them, as agents do, that ping each other.
//!
//! What comes from the network is one more thing for the kernel to parse: the README names the fixes that it must have.
//! Left out: `TLS_RX_EXPECT_NO_PAD`, with which the kernel decrypts into the reader's memory. Kernels since 6.0 that
//! lack the fix of CVE-2025-39682 can be made to use memory that they freed that way, by any peer.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, TcpListener, TcpStream as StdStream};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, TlsGetRecordType, recvmsg, setsockopt};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};
use socket2::{MsgHdr, SockRef};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// Why the kernel cannot encrypt.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    #[error("the kernel has no TLS, neither built in nor loaded (CONFIG_TLS, module tls): {0:?}")]
    NoTls(Errno),
    #[error("the kernel's TLS has no ChaCha20-Poly1305, which Linux 5.11 brought")]
    TooOld,
    #[error(
        "the kernel has no ChaCha20-Poly1305, neither built in nor loaded (module chacha20poly1305): {0:?}"
    )]
    NoCipher(Errno),
    #[error("cannot try it out on the loopback interface: {0}")]
    Untried(#[from] io::Error),
}

impl Unsupported {
    fn of_keys(error: Errno) -> Self {
        match error {
            Errno::EINVAL => Self::TooOld,
            other => Self::NoCipher(other),
        }
    }
}

/// Tries it on a connection of this process with itself.
pub fn probe() -> Result<(), Unsupported> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let socket = StdStream::connect(listener.local_addr()?)?;
    attach(&socket).map_err(Unsupported::NoTls)?;
    let info = crypto_info(0, &[0; 32], &[0; 12]);
    setsockopt(&socket, TcpTlsRx, &info).map_err(Unsupported::of_keys)?;
    setsockopt(&socket, TcpTlsTx, &info).map_err(Unsupported::of_keys)
}

/// Makes a socket one that may get keys. Until it has some, nothing changes.
pub(super) fn attach(socket: &impl AsFd) -> Result<(), Errno> {
    setsockopt(socket, TcpUlp::default(), b"tls")
}

/// A connection that the kernel encrypts.
#[derive(Debug)]
pub struct KernelStream {
    socket: TcpStream,
    /// What came with the handshake, decrypted.
    early: Bytes,
    /// Servers send tickets; nobody else sends anything but data and ends.
    may_get_tickets: bool,
    read_ended: bool,
    /// `close_notify` or an alert was sent, or there is nobody to tell.
    write_ended: bool,
    /// Nothing that comes after an error is believed.
    broken: bool,
}

/// Whose end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

/// What was read before the kernel took over.
#[derive(Debug, Default)]
pub(super) struct Early {
    pub(super) data: Vec<u8>,
    /// The peer sends no more.
    pub(super) ended: bool,
}

impl KernelStream {
    /// Gives the kernel the keys of a [prepared](attach) socket.
    pub(super) fn new(
        socket: TcpStream,
        secrets: &ExtractedSecrets,
        early: Early,
        side: Side,
    ) -> io::Result<Self> {
        let (receive, send) = (keys(&secrets.rx)?, keys(&secrets.tx)?);
        let given =
            setsockopt(&socket, TcpTlsRx, &receive).and_then(|()| setsockopt(&socket, TcpTlsTx, &send));
        given.map_err(|error| io::Error::other(format!("the kernel does not take the keys: {error}")))?;
        Ok(Self {
            socket,
            early: early.data.into(),
            may_get_tickets: side == Side::Client,
            read_ended: early.ended,
            write_ended: false,
            broken: false,
        })
    }

    /// What comes next: `true` for data, which is in `buf` then.
    fn read(&mut self, buf: &mut ReadBuf<'_>) -> io::Result<bool> {
        // Not `poll_read`, which takes a short read for an empty socket: here it may be the end of data before an
        // alert, of which no further event tells.
        match self.socket.try_read_buf(buf) {
            // The end, or an empty record before one that is no data.
            Ok(0) => self.read_control().map(|()| false),
            Ok(_) => Ok(true),
            // What is next is no data.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => self.read_control().map(|()| false),
            Err(error) => Err(error),
        }
    }

    /// Reads a record that is not data.
    fn read_control(&mut self) -> io::Result<()> {
        let mut content = vec![0; MAX_CONTENT];
        let read = || receive(&self.socket, &mut content);
        let (kind, length) = self.socket.try_io(Interest::READABLE, read)?;
        match (kind, &content[..length]) {
            (TlsGetRecordType::Alert, [_, CLOSE_NOTIFY]) => {
                self.read_ended = true;
                Ok(())
            }
            // The end follows, by itself (RFC 8446, section 6.1).
            (TlsGetRecordType::Alert, [_, USER_CANCELED]) => Ok(()),
            (TlsGetRecordType::Alert, [_, alert]) => {
                // Nobody is told anything any more.
                self.write_ended = true;
                Err(io::Error::new(
                    ErrorKind::ConnectionAborted,
                    format!("the peer ended the connection with TLS alert {alert}"),
                ))
            }
            // Nothing is resumed.
            (TlsGetRecordType::Handshake, messages) if self.may_get_tickets && are_tickets(messages) => {
                Ok(())
            }
            (kind, _) => Err(io::Error::new(
                ErrorKind::InvalidData,
                format!("the peer sent a TLS record that has no place here: {kind:?}"),
            )),
        }
    }

    /// Ends the connection for what came over it, and tells the peer, who may be gone.
    fn break_off(&mut self, error: &io::Error) {
        self.broken = true;
        if error.kind() == ErrorKind::UnexpectedEof {
            // A peer that was cut off, or half closed without a word, may still be told the end.
            return;
        }
        let alert = match error.raw_os_error() {
            Some(libc::EBADMSG) => Some(BAD_RECORD_MAC),
            Some(libc::EMSGSIZE) => Some(RECORD_OVERFLOW),
            Some(libc::EINVAL) => Some(UNEXPECTED_MESSAGE),
            _ if error.kind() == ErrorKind::InvalidData => Some(UNEXPECTED_MESSAGE),
            _ => None,
        };
        let told = std::mem::replace(&mut self.write_ended, true);
        if let (Some(alert), false) = (alert, told) {
            // The kernel holds the error against whoever writes next, until it was asked for.
            let _ = self.socket.take_error();
            let _ = self.alert(FATAL, alert);
        }
    }

    /// Waits until a third of the socket's buffer is free.
    ///
    /// A record counts as written although a part of it still waits in the kernel's TLS. That part goes ahead of what is
    /// written next, or of the socket's end, if there is room for it then; else the end would lose it.
    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let has_room = || {
            let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut polled, PollTimeout::ZERO)? {
                0 => Err(ErrorKind::WouldBlock.into()),
                _ => Ok(()),
            }
        };
        loop {
            ready!(self.socket.poll_write_ready(cx))?;
            match self.socket.try_io(Interest::WRITABLE, has_room) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                looked => return Poll::Ready(looked),
            }
        }
    }

    fn alert(&self, level: u8, alert: u8) -> io::Result<()> {
        let content = [level, alert];
        let content = [IoSlice::new(&content)];
        let control = record_type(ALERT);
        let message = MsgHdr::new().with_buffers(&content).with_control(&control);
        let send = || SockRef::from(&self.socket).sendmsg(&message, libc::MSG_NOSIGNAL);
        self.socket.try_io(Interest::WRITABLE, send).map(drop)
    }
}

/// TLS's content types, alerts and messages that are named here (RFC 8446, appendix B).
const ALERT: u8 = 21;
const FATAL: u8 = 2;
const WARNING: u8 = 1;
const CLOSE_NOTIFY: u8 = 0;
const UNEXPECTED_MESSAGE: u8 = 10;
const BAD_RECORD_MAC: u8 = 20;
const RECORD_OVERFLOW: u8 = 22;
const USER_CANCELED: u8 = 90;
const NEW_SESSION_TICKET: u8 = 4;
/// What a record holds at the most (RFC 8446, section 5.1).
const MAX_CONTENT: usize = 1 << 14;

fn keys((sequence, secrets): &(u64, ConnectionTrafficSecrets)) -> io::Result<TlsCryptoInfo> {
    let ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } = secrets else {
        return Err(io::Error::other("only ChaCha20-Poly1305 is for the kernel"));
    };
    let wrong = |_| io::Error::other("keys of another length");
    let key = key.as_ref().try_into().map_err(wrong)?;
    let iv = iv.as_ref().try_into().map_err(wrong)?;
    Ok(crypto_info(*sequence, key, iv))
}

fn crypto_info(sequence: u64, key: &[u8; 32], iv: &[u8; 12]) -> TlsCryptoInfo {
    TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
        info: libc::tls_crypto_info {
            version: libc::TLS_1_3_VERSION,
            cipher_type: libc::TLS_CIPHER_CHACHA20_POLY1305,
        },
        iv: *iv,
        key: *key,
        salt: [],
        rec_seq: sequence.to_be_bytes(),
    })
}

/// One record that is not data: its type, and how much of `content` it fills.
fn receive(socket: &TcpStream, content: &mut [u8]) -> io::Result<(TlsGetRecordType, usize)> {
    let mut control = nix::cmsg_space!(u8);
    let mut buffers = [IoSliceMut::new(content)];
    let received = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut buffers,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let kind = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::TlsGetRecordType(kind) => Some(kind),
        _ => None,
    });
    match kind {
        Some(kind) => Ok((kind, received.bytes)),
        None => Err(ErrorKind::UnexpectedEof.into()),
    }
}

/// The control message (cmsg(3)) that makes what is sent with it one record of this type.
fn record_type(kind: u8) -> Vec<u8> {
    const HEAD: usize = size_of::<libc::cmsghdr>();
    // Padded as the macro CMSG_SPACE has it.
    let mut control = Vec::with_capacity(HEAD + size_of::<usize>());
    control.extend((HEAD + 1).to_ne_bytes());
    control.extend(libc::SOL_TLS.to_ne_bytes());
    control.extend(libc::TLS_SET_RECORD_TYPE.to_ne_bytes());
    control.push(kind);
    control.resize(HEAD + size_of::<usize>(), 0);
    control
}

/// Whether these are whole handshake messages, tickets all of them.
fn are_tickets(mut messages: &[u8]) -> bool {
    while let [kind, high, middle, low, rest @ ..] = messages {
        let length = u32::from_be_bytes([0, *high, *middle, *low]) as usize;
        if *kind != NEW_SESSION_TICKET || length > rest.len() {
            return false;
        }
        messages = &rest[length..];
    }
    messages.is_empty()
}

impl AsyncRead for KernelStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let n = self.early.len().min(buf.remaining());
            buf.put_slice(&self.early[..n]);
            self.early.advance(n);
            if self.early.is_empty() {
                // Or it would hold its memory as long as the connection lasts.
                self.early = Bytes::new();
            }
            return Poll::Ready(Ok(()));
        }
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        while !self.read_ended {
            if self.broken {
                return Poll::Ready(Err(ErrorKind::ConnectionAborted.into()));
            }
            ready!(self.socket.poll_read_ready(cx))?;
            match self.read(buf) {
                Ok(true) => return Poll::Ready(Ok(())),
                Ok(false) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.break_off(&error);
                    return Poll::Ready(Err(error));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for KernelStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.write_ended {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.write_ended {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    /// Says `close_notify`. The socket's own end is left to closing it: one before that would overtake what waits.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.write_ended {
            ready!(self.poll_room(cx))?;
            match self.alert(WARNING, CLOSE_NOTIFY) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                sent => {
                    self.write_ended = true;
                    sent?;
                }
            }
        }
        self.poll_room(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_tickets_are_tickets() {
        let ticket = [NEW_SESSION_TICKET, 0, 0, 2, 1, 2];
        assert!(are_tickets(&ticket));
        assert!(are_tickets(&[ticket, ticket].concat()));
        assert!(!are_tickets(&ticket[..5]));
        assert!(!are_tickets(&ticket[..3]));
        // A change of keys (KeyUpdate), alone and behind a ticket.
        let update = [24, 0, 0, 1, 0];
        assert!(!are_tickets(&update));
        assert!(!are_tickets(&[&ticket[..], &update].concat()));
    }
}
