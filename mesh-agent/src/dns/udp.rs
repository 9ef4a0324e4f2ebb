//! DNS over UDP: datagrams in, answers out from the address that they were sent to.
//!
//! Invariants: an answer leaves from the address and port that its query arrived at, which is how the kernel
//! knows whose answer it is to seem; a forwarded query has a socket of its own, so its source port is as random
//! as the application's, and ids need no rewriting.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::metrics::DnsOutcome;
use crate::sock::Namespace;

use super::answer::server_failure;
use super::{Answer, Carrier, FORWARD_TIMEOUT, Resolver};

/// UDP's own limit.
const MAX_DATAGRAM: usize = 65_535;
/// A socket that fails again and again must not keep a core busy.
const ERROR_PAUSE: Duration = Duration::from_millis(100);
/// Shorter is no DNS message.
const HEADER: usize = 12;

thread_local! {
    /// Datagrams land here and are copied out at their true length: nobody keeps 64 KiB while waiting.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_DATAGRAM]);
}

struct Datagram {
    bytes: Vec<u8>,
    peer: SocketAddr,
    /// The address that it was sent to.
    local: IpAddr,
}

/// Answers what arrives at `socket`. Runs until dropped; forwards that are under way end with it.
pub async fn serve(resolver: &Resolver, socket: UdpSocket) -> io::Result<()> {
    let address = socket.local_addr()?;
    match address {
        SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
        SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
    }
    let socket = Arc::new(socket);
    let mut forwards = JoinSet::new();
    loop {
        tokio::select! {
            received = receive(&socket) => match received {
                Ok(datagram) => handle(resolver, &socket, address.port(), datagram, &mut forwards).await,
                Err(error) => {
                    tracing::warn!(%address, %error, "cannot receive DNS queries");
                    tokio::time::sleep(ERROR_PAUSE).await;
                }
            },
            Some(_ended) = forwards.join_next() => {}
        }
    }
}

async fn handle(
    resolver: &Resolver,
    socket: &Arc<UdpSocket>,
    port: u16,
    datagram: Datagram,
    forwards: &mut JoinSet<()>,
) {
    if let Answer::Reply(reply) = resolver.answer(Carrier::Udp, &datagram.bytes) {
        resolver.count(DnsOutcome::Answered);
        send(socket, &datagram, &reply).await;
        return;
    }
    let asked = SocketAddr::new(datagram.local.to_canonical(), port);
    let server = resolver.namespace.original_dns_server(asked);
    let permit = Arc::clone(&resolver.forwards).try_acquire_owned();
    let (Some(server), Ok(permit)) = (server, permit) else {
        resolver.count(DnsOutcome::Dropped);
        return;
    };
    let (resolver, socket) = (resolver.clone(), Arc::clone(socket));
    forwards.spawn(async move {
        forward(&resolver, &socket, server, &datagram).await;
        drop(permit);
    });
}

async fn forward(resolver: &Resolver, socket: &UdpSocket, server: SocketAddr, datagram: &Datagram) {
    let asked = ask(&*resolver.namespace, server, &datagram.bytes);
    let (outcome, reply) = match timeout(FORWARD_TIMEOUT, asked).await {
        Ok(Ok(reply)) => (DnsOutcome::Forwarded, Some(reply)),
        Ok(Err(error)) => {
            tracing::debug!(%server, %error, "the DNS server that was asked cannot be reached");
            (DnsOutcome::Failed, server_failure(&datagram.bytes))
        }
        // The client has given up, too.
        Err(_) => (DnsOutcome::Failed, None),
    };
    resolver.count(outcome);
    if let Some(reply) = reply {
        send(socket, datagram, &reply).await;
    }
}

async fn ask(namespace: &dyn Namespace, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    // Connected: the kernel lets in only what comes from that server.
    let socket = namespace.udp_socket(server)?;
    socket.send(query).await?;
    loop {
        // That nobody listens there makes the socket an error, not readable.
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if ready.is_error() {
            ignore_would_block(socket.try_io(Interest::ERROR, || match socket.take_error()? {
                Some(error) => Err(error),
                None => Err(io::ErrorKind::WouldBlock.into()),
            }))?;
        }
        let received: io::Result<Vec<u8>> = SCRATCH.with_borrow_mut(|buffer| {
            let length = socket.try_recv(buffer)?;
            Ok(buffer[..length].to_vec())
        });
        match received {
            Ok(answer) if answers(query, &answer) => return Ok(answer),
            Ok(_stray) => {}
            Err(error) => ignore_would_block(Err(error))?,
        }
    }
}

fn ignore_would_block(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other,
    }
}

fn answers(query: &[u8], answer: &[u8]) -> bool {
    const RESPONSE: u8 = 0x80;
    answer.len() >= HEADER && query.get(..2) == answer.get(..2) && answer[2] & RESPONSE != 0
}

async fn receive(socket: &UdpSocket) -> io::Result<Datagram> {
    socket
        .async_io(Interest::READABLE, || {
            SCRATCH.with_borrow_mut(|buffer| receive_now(socket, buffer))
        })
        .await
}

fn receive_now(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Datagram> {
    let mut control = nix::cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let local = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(IpAddr::V4(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes())))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr))),
        _ => None,
    });
    let peer = message.address.as_ref().and_then(to_std);
    let length = message.bytes;
    let (Some(local), Some(peer)) = (local, peer) else {
        return Err(io::Error::other("a datagram without its addresses"));
    };
    Ok(Datagram {
        bytes: buffer[..length].to_vec(),
        peer,
        local,
    })
}

/// Sends `reply` back from where `query` was sent to. A client that is gone is no error.
async fn send(socket: &UdpSocket, query: &Datagram, reply: &[u8]) {
    let sent = socket
        .async_io(Interest::WRITABLE, || send_now(socket, query, reply))
        .await;
    if let Err(error) = sent {
        tracing::debug!(peer = %query.peer, %error, "cannot send a DNS answer");
    }
}

fn send_now(socket: &UdpSocket, query: &Datagram, reply: &[u8]) -> io::Result<()> {
    let slices = [IoSlice::new(reply)];
    let peer = SockaddrStorage::from(query.peer);
    let send = |control| {
        sendmsg(
            socket.as_raw_fd(),
            &slices,
            &[control],
            MsgFlags::MSG_DONTWAIT,
            Some(&peer),
        )
    };
    match query.local {
        IpAddr::V4(local) => {
            let any = libc::in_addr { s_addr: 0 };
            let from = libc::in_addr {
                s_addr: u32::from_ne_bytes(local.octets()),
            };
            send(ControlMessage::Ipv4PacketInfo(&libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: from,
                ipi_addr: any,
            }))?;
        }
        IpAddr::V6(local) => {
            let from = libc::in6_addr {
                s6_addr: local.octets(),
            };
            send(ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo {
                ipi6_addr: from,
                ipi6_ifindex: 0,
            }))?;
        }
    }
    Ok(())
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()))
}
