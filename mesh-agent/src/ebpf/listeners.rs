//! The agent's sockets inside a workload's namespace, on ports that the kernel picks.
//!
//! The TCP listeners take what `sk_lookup` hands them whatever its address, so the ports are of no consequence
//! but that nobody may dial them. The DNS sockets are reached by address: the kernel side rewrites to them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use mesh_common::maps::DNS_V6_SLOTS;
use mesh_common::{NetPort, WorkloadEntry};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// As many connections as the kernel lets wait (it cuts this down to `net.core.somaxconn`).
const BACKLOG: i32 = 65_535;

/// One workload's listeners, non-blocking, for the caller to serve.
#[derive(Debug)]
pub struct Listeners {
    /// Captured outgoing connections.
    pub outbound: TcpListener,
    /// Captured incoming connections; their `local_addr()` is where the client wanted to go.
    /// None for a workload on the host's network, where nothing hands them over.
    pub inbound: Option<TcpListener>,
    /// With `IP_PKTINFO`: the destination address of a query tells the server that was asked.
    pub dns_v4: UdpSocket,
    /// One per slot, told apart by port; empty where there is no IPv6.
    pub dns_v6: Vec<UdpSocket>,
}

impl Listeners {
    /// Opens them in the namespace of the calling thread, the DNS sockets on the ports of `before` where these
    /// are free: sockets connected to them then outlive a restart of the agent.
    pub(super) fn open(before: Option<&WorkloadEntry>, with_inbound: bool) -> io::Result<Self> {
        let v4_port = before.map_or(0, |entry| entry.dns_v4_port.host());
        let v6_ports = before.map_or([0; DNS_V6_SLOTS as usize], |entry| {
            entry.dns_v6_ports.map(NetPort::host)
        });
        let dns_v4 = udp(IpAddr::V4(Ipv4Addr::UNSPECIFIED), v4_port)?;
        setsockopt(&dns_v4, sockopt::Ipv4PacketInfo, &true)?;
        Ok(Self {
            outbound: tcp()?,
            inbound: with_inbound.then(tcp).transpose()?,
            dns_v4,
            // Without `::1` there is no IPv6 DNS to capture.
            dns_v6: v6_ports
                .iter()
                .map_while(|port| udp(IpAddr::V6(Ipv6Addr::LOCALHOST), *port).ok())
                .collect(),
        })
    }

    /// The ports, in the form in which the kernel side learns them.
    pub(super) fn describe(&self, entry: &mut WorkloadEntry) -> io::Result<()> {
        entry.outbound_port = NetPort::from_host(self.outbound.local_addr()?.port());
        if let Some(inbound) = &self.inbound {
            entry.inbound_port = NetPort::from_host(inbound.local_addr()?.port());
        }
        entry.dns_v4_port = NetPort::from_host(self.dns_v4.local_addr()?.port());
        for (port, socket) in entry.dns_v6_ports.iter_mut().zip(&self.dns_v6) {
            *port = NetPort::from_host(socket.local_addr()?.port());
        }
        Ok(())
    }
}

/// A listener for both families, or for IPv4 alone where the namespace has no IPv6.
fn tcp() -> io::Result<TcpListener> {
    let dual = || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_only_v6(false)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into())?;
        Ok(socket)
    };
    let v4 = |_: io::Error| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)).into())?;
        io::Result::Ok(socket)
    };
    let socket = dual().or_else(v4)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// On `port`, or on any if that is taken.
fn udp(ip: IpAddr, port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((ip, port)).or_else(|_| UdpSocket::bind((ip, 0)))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
