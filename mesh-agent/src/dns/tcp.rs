//! DNS over TCP: messages behind their length, several on one connection.
//!
//! Invariants: at most one message per direction is held in memory, and who does not read is not read from; all
//! that goes on from one connection goes over one connection to the server that was asked, in order.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;

use crate::metrics::DnsOutcome;
use crate::sock;

use super::{Answer, Carrier, FORWARD_TIMEOUT, Resolver};

/// A connection that asks nothing for so long is closed; so is one that does not take its answers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Read at once; most messages are far smaller.
const READ_SIZE: usize = 2048;

/// Answers the queries of one connection that wanted to go to `server`.
pub async fn stream<S>(resolver: &Resolver, client: S, server: SocketAddr) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let (reader, writer) = tokio::io::split(client);
    let exchange = Exchange {
        resolver,
        server,
        client: Mutex::new(writer),
        outstanding: AtomicUsize::new(0),
        all_asked: AtomicBool::new(false),
    };
    let ended = exchange.run(Frames::new(reader)).await;
    for _lost in 0..exchange.outstanding() {
        resolver.count(DnsOutcome::Failed);
    }
    exchange.client.into_inner().shutdown().await?;
    ended
}

/// One connection of a client, and at most one to the server that it asked.
struct Exchange<'a, S> {
    resolver: &'a Resolver,
    server: SocketAddr,
    client: Mutex<WriteHalf<S>>,
    /// Queries that the server has not answered yet.
    outstanding: AtomicUsize,
    all_asked: AtomicBool,
}

impl<S: AsyncRead + AsyncWrite> Exchange<'_, S> {
    async fn run<R: AsyncRead + Unpin>(&self, queries: Frames<R>) -> io::Result<()> {
        let (connected, upstream) = oneshot::channel();
        let mut relay = pin!(self.relay(upstream));
        tokio::select! {
            asked = self.ask(queries, connected) => {
                let _open = asked?;
                if self.outstanding() == 0 {
                    return Ok(());
                }
                within(FORWARD_TIMEOUT, relay).await
            }
            relayed = &mut relay => relayed,
        }
    }

    /// Takes the client's queries until it has no more: answers them, or passes them on. Returns the connection
    /// to the server, which stays open for the answers that are still to come.
    async fn ask<R: AsyncRead + Unpin>(
        &self,
        mut queries: Frames<R>,
        connected: oneshot::Sender<OwnedReadHalf>,
    ) -> io::Result<Option<OwnedWriteHalf>> {
        let mut connected = Some(connected);
        let mut upstream: Option<OwnedWriteHalf> = None;
        while let Some(query) = within(IDLE_TIMEOUT, queries.next()).await? {
            if let Answer::Reply(reply) = self.resolver.answer(Carrier::Tcp, &query) {
                self.resolver.count(DnsOutcome::Answered);
                self.reply(&reply).await?;
                continue;
            }
            let writer = match &mut upstream {
                Some(writer) => writer,
                none => {
                    let (reader, writer) = self.connect().await?.into_split();
                    if let Some(connected) = connected.take() {
                        // Its receiver lives as long as this future.
                        let _ = connected.send(reader);
                    }
                    none.insert(writer)
                }
            };
            self.outstanding.fetch_add(1, Ordering::Relaxed);
            within(IDLE_TIMEOUT, write(writer, &query)).await?;
        }
        self.all_asked.store(true, Ordering::Relaxed);
        Ok(upstream)
    }

    /// Carries the server's answers back until it closes, or all are there.
    async fn relay(&self, upstream: oneshot::Receiver<OwnedReadHalf>) -> io::Result<()> {
        let Ok(reader) = upstream.await else {
            // Nothing was ever passed on: the end is the other side's to find.
            return std::future::pending().await;
        };
        let mut answers = Frames::new(reader);
        while let Some(answer) = answers.next().await? {
            self.resolver.count(DnsOutcome::Forwarded);
            self.reply(&answer).await?;
            let left = self.outstanding().saturating_sub(1);
            self.outstanding.store(left, Ordering::Relaxed);
            if left == 0 && self.all_asked.load(Ordering::Relaxed) {
                break;
            }
        }
        Ok(())
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let connecting = sock::connect(&*self.resolver.namespace, self.server, None);
        within(FORWARD_TIMEOUT, connecting).await
    }

    async fn reply(&self, message: &[u8]) -> io::Result<()> {
        let mut client = self.client.lock().await;
        within(IDLE_TIMEOUT, write(&mut *client, message)).await
    }

    fn outstanding(&self) -> usize {
        self.outstanding.load(Ordering::Relaxed)
    }
}

/// Cuts a byte stream into messages. [`next`](Self::next) loses nothing when it is dropped half-way.
struct Frames<R> {
    reader: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: BytesMut::new(),
        }
    }

    /// The next message, without its length; `None` at the end between two messages.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(message) = self.cut() {
                return Ok(Some(message));
            }
            self.buffer.reserve(READ_SIZE);
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    fn cut(&mut self) -> Option<Bytes> {
        let (length, rest) = self.buffer.split_first_chunk()?;
        let length = usize::from(u16::from_be_bytes(*length));
        if rest.len() < length {
            return None;
        }
        self.buffer.advance(2);
        Some(self.buffer.split_to(length).freeze())
    }
}

/// Length and message in one write, so that they travel in one segment.
async fn write<W: AsyncWrite + Unpin>(writer: &mut W, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let framed = [&length.to_be_bytes()[..], message].concat();
    writer.write_all(&framed).await
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
