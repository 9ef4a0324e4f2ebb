//! A workload's namespace as the proxy sees it: the kernel-backed [`Namespace`].

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_common::maps::{DNS_V4_NET, DNS_V4_SLOTS, DNS_V6_SLOT_BASE};
use mesh_common::{DnsKey, FlowKey, NetEndpoint, OwnSocket, WorkloadKey, flow_kind};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, UdpSocket};

use super::clock;
use super::maps::Maps;
use super::netns::{Netns, socket_cookie};
use crate::sock::{Egress, ExemptionGuard, Namespace};

#[derive(Debug)]
pub(super) struct KernelNamespace {
    pub(super) key: WorkloadKey,
    /// The workload's own, or the host's.
    pub(super) netns: Netns,
    pub(super) maps: Arc<Maps>,
    /// Slot of each IPv6 DNS socket, by position.
    pub(super) dns_v6_ports: Vec<u16>,
}

impl Namespace for KernelNamespace {
    fn original_destination(&self, peer: SocketAddr, local: SocketAddr) -> Option<SocketAddr> {
        let key = FlowKey {
            workload: self.key,
            source: peer.into(),
            destination: local.into(),
        };
        let flow = self
            .maps
            .flows
            .get(&key)
            .ok()
            .flatten()
            .filter(|flow| flow.kind == flow_kind::OUTBOUND)?;
        // Already gone only if the connection failed in this very moment, and then it does not matter.
        let _ = self.maps.flows.remove(&key);
        Some(flow.endpoint.into())
    }

    fn original_dns_server(&self, local: SocketAddr) -> Option<SocketAddr> {
        let slot = match local {
            SocketAddr::V4(local) => {
                let slot = local.ip().to_bits().checked_sub(DNS_V4_NET + 1)?;
                (slot < DNS_V4_SLOTS).then_some(slot)?
            }
            SocketAddr::V6(local) => {
                let position = self.dns_v6_ports.iter().position(|port| *port == local.port())?;
                DNS_V6_SLOT_BASE + u32::try_from(position).ok()?
            }
        };
        let key = DnsKey {
            workload: self.key,
            slot,
            reserved: 0,
        };
        self.maps
            .dns_servers
            .get(&key)
            .ok()
            .flatten()
            .map(SocketAddr::from)
    }

    fn tcp_socket(&self, to: SocketAddr, present: Option<SocketAddr>) -> io::Result<Egress> {
        let socket = self.socket(to, Type::STREAM, Protocol::TCP)?;
        let exemption = self.exempt(&socket, present)?;
        Ok(Egress {
            socket: TcpSocket::from_std_stream(socket.into()),
            exemption: Some(Box::new(exemption)),
        })
    }

    fn udp_socket(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.socket(to, Type::DGRAM, Protocol::UDP)?;
        // A connected UDP socket meets no hook when it sends, so the connect is all that needs exemption.
        let exemption = self.exempt(&socket, None)?;
        socket.connect(&to.into())?;
        drop(exemption);
        UdpSocket::from_std(socket.into())
    }
}

impl KernelNamespace {
    fn socket(&self, to: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
        self.netns
            .within(|| Socket::new(Domain::for_address(to), kind.nonblocking(), Some(protocol)))?
    }

    fn exempt(&self, socket: &Socket, present: Option<SocketAddr>) -> io::Result<Exemption> {
        let cookie = socket_cookie(socket)?;
        let own = OwnSocket {
            workload: self.key,
            created_at: clock::monotonic_ns(),
            present: present.map_or(NetEndpoint::NONE, NetEndpoint::from),
            reserved: 0,
        };
        self.maps.own.insert(&cookie, &own)?;
        Ok(Exemption {
            cookie,
            maps: Arc::clone(&self.maps),
        })
    }
}

/// The entry in the map of our own sockets, while it is needed.
#[derive(Debug)]
struct Exemption {
    cookie: u64,
    maps: Arc<Maps>,
}

impl ExemptionGuard for Exemption {}

impl Drop for Exemption {
    fn drop(&mut self) {
        if let Err(error) = self.maps.own.remove(&self.cookie) {
            // The sweep will get it.
            tracing::debug!(%error, "cannot take a socket out of the map of the agent's own");
        }
    }
}
