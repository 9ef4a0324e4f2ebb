//! The proxy's view of the kernel: two small traits, and the sockets they hand out.
//!
//! Invariants: the proxy never names eBPF, a network namespace or a cgroup; it asks a [`Namespace`] where a
//! captured connection wanted to go and for sockets that leave from that workload. Tests plug in a fake.

use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};

/// Long enough to cost idle connections nothing, short enough to notice a dead node within some minutes (with the
/// kernel's nine probes).
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);

/// One enrolled workload's place in the kernel.
pub trait Namespace: Debug + Send + Sync + 'static {
    /// Where a captured connection wanted to go; the kernel's record of it is consumed.
    ///
    /// `peer` and `local` are the accepted socket's `getpeername()` and `getsockname()`. `None` means the
    /// connection was not captured (somebody dialled the listener): it must be closed.
    fn original_destination(&self, peer: SocketAddr, local: SocketAddr) -> Option<SocketAddr>;

    /// The server that a captured DNS datagram was meant for. `local` is the address the datagram arrived at
    /// (loopback token and port); an answer must leave from there to seem to come from that server.
    fn original_dns_server(&self, local: SocketAddr) -> Option<SocketAddr>;

    /// A socket in the workload's network namespace that capture leaves alone, for connecting to `to`.
    ///
    /// With `present`, an application of this workload that accepts the connection sees `present` as its peer.
    fn tcp_socket(&self, to: SocketAddr, present: Option<SocketAddr>) -> io::Result<Egress>;

    /// A UDP socket in the workload's network namespace, connected to `to`, that capture leaves alone.
    fn udp_socket(&self, to: SocketAddr) -> io::Result<tokio::net::UdpSocket>;
}

/// A socket about to be connected, with whatever must be undone once its connect has ended.
#[derive(Debug)]
pub struct Egress {
    pub socket: TcpSocket,
    /// Dropped when the connect has succeeded or failed; takes the exemption out of the kernel's map.
    pub exemption: Option<Box<dyn ExemptionGuard>>,
}

/// What [`Egress`] holds until the connect has ended.
pub trait ExemptionGuard: Debug + Send + Sync {}

/// Connects to `to` from inside the workload, [tuned](tune).
pub async fn connect(
    namespace: &dyn Namespace,
    to: SocketAddr,
    present: Option<SocketAddr>,
) -> io::Result<TcpStream> {
    let Egress { socket, exemption } = namespace.tcp_socket(to, present)?;
    let connected = socket.connect(to).await;
    drop(exemption);
    let stream = connected?;
    tune(&stream)?;
    Ok(stream)
}

/// What every socket of the data path has: no delay for small writes, and an end when its peer is gone without a
/// word. What a listener has, the connections that it accepts have too.
pub fn tune(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_AFTER)
        .with_interval(KEEPALIVE_EVERY);
    socket.set_tcp_keepalive(&keepalive)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn what_a_listener_has_its_connections_have_too() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        tune(&listener).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().unwrap());
        assert!(accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), KEEPALIVE_AFTER);
        assert_eq!(accepted.tcp_keepalive_interval().unwrap(), KEEPALIVE_EVERY);
    }
}
