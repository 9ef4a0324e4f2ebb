//! Byte order as types: addresses and ports exactly as they stand on the wire.

/// An IPv6 address, or an IPv4 one mapped into `::ffff:0:0/96`, in network byte order.
///
/// Kept as four words because that is how the kernel's contexts hand addresses out. All zero means "none".
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct NetAddr {
    words: [u32; 4],
}

/// The third word of an IPv4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

impl NetAddr {
    pub const NONE: Self = Self { words: [0; 4] };

    /// From a context's IPv4 field, which is in network byte order already.
    #[must_use]
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self {
            words: [0, 0, MAPPED, word],
        }
    }

    /// From a context's IPv6 field, which is in network byte order already.
    #[must_use]
    #[inline(always)]
    pub const fn from_v6_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    #[must_use]
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// The IPv4 address in network byte order; meaningless unless [`Self::is_v4`].
    #[must_use]
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words[3]
    }

    #[must_use]
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// All zero: no address, or IPv6's unspecified one.
    #[must_use]
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && self.words[3] == 0
    }

    /// `0.0.0.0` or `::`, which connect to the local host.
    #[must_use]
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.is_none() || (self.is_v4() && self.words[3] == 0)
    }

    /// `127.0.0.0/8` or `::1`.
    #[must_use]
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.words[3]) >> 24 == 127;
        }
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && self.words[3] == 1_u32.to_be()
    }

    #[must_use]
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.words[0] == other.words[0]
            && self.words[1] == other.words[1]
            && self.words[2] == other.words[2]
            && self.words[3] == other.words[3]
    }
}

/// A port in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct NetPort(u16);

impl NetPort {
    #[must_use]
    #[inline(always)]
    pub const fn from_host(port: u16) -> Self {
        Self(port.to_be())
    }

    /// From a field that holds the port in network byte order already.
    #[must_use]
    #[inline(always)]
    pub const fn from_net(port: u16) -> Self {
        Self(port)
    }

    /// From a context's 32-bit field in host byte order.
    #[must_use]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the kernel widens ports")]
    pub const fn from_host_word(port: u32) -> Self {
        Self::from_host(port as u16)
    }

    /// From a context's 32-bit field whose first two bytes are the port in network byte order.
    #[must_use]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the kernel widens ports")]
    pub const fn from_net_word(port: u32) -> Self {
        Self::from_net(port as u16)
    }

    #[must_use]
    #[inline(always)]
    pub const fn host(self) -> u16 {
        u16::from_be(self.0)
    }

    #[must_use]
    #[inline(always)]
    pub const fn net(self) -> u16 {
        self.0
    }

    #[must_use]
    #[inline(always)]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

/// An address and a port; all zero means "none".
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct NetEndpoint {
    pub addr: NetAddr,
    pub port: NetPort,
    pub reserved: u16,
}

impl NetEndpoint {
    pub const NONE: Self = Self::new(NetAddr::NONE, NetPort::from_net(0));

    #[must_use]
    #[inline(always)]
    pub const fn new(addr: NetAddr, port: NetPort) -> Self {
        Self {
            addr,
            port,
            reserved: 0,
        }
    }

    #[must_use]
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.port.is_none() && self.addr.is_none()
    }
}

mod std_types {
    //! To and from std types (`core::net` has them). IPv4-mapped addresses come out as IPv4.

    use core::fmt;
    use core::net::{IpAddr, Ipv6Addr, SocketAddr};

    use super::{NetAddr, NetEndpoint, NetPort};

    impl From<IpAddr> for NetAddr {
        fn from(ip: IpAddr) -> Self {
            let octets = match ip {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let word =
                |i: usize| u32::from_ne_bytes([octets[i], octets[i + 1], octets[i + 2], octets[i + 3]]);
            Self {
                words: [word(0), word(4), word(8), word(12)],
            }
        }
    }

    impl From<NetAddr> for IpAddr {
        fn from(addr: NetAddr) -> Self {
            let mut octets = [0; 16];
            for (chunk, word) in octets.chunks_exact_mut(4).zip(addr.words) {
                chunk.copy_from_slice(&word.to_ne_bytes());
            }
            Self::V6(Ipv6Addr::from(octets)).to_canonical()
        }
    }

    impl From<SocketAddr> for NetEndpoint {
        fn from(addr: SocketAddr) -> Self {
            Self::new(addr.ip().into(), NetPort::from_host(addr.port()))
        }
    }

    impl From<NetEndpoint> for SocketAddr {
        fn from(endpoint: NetEndpoint) -> Self {
            Self::new(endpoint.addr.into(), endpoint.port.host())
        }
    }

    impl fmt::Debug for NetAddr {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            IpAddr::from(*self).fmt(f)
        }
    }

    impl fmt::Debug for NetPort {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.host().fmt(f)
        }
    }

    impl fmt::Debug for NetEndpoint {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            SocketAddr::from(*self).fmt(f)
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn addresses_survive_the_way_to_the_kernel_and_back() {
            for text in ["10.1.2.3:80", "[2001:db8::1]:443", "0.0.0.0:1", "[::]:2"] {
                let addr: SocketAddr = text.parse().unwrap();
                assert_eq!(SocketAddr::from(NetEndpoint::from(addr)), addr);
            }
        }

        #[test]
        fn a_mapped_address_is_the_ipv4_one() {
            let mapped: SocketAddr = "[::ffff:10.1.2.3]:80".parse().unwrap();
            let plain: SocketAddr = "10.1.2.3:80".parse().unwrap();
            assert_eq!(NetEndpoint::from(mapped), NetEndpoint::from(plain));
        }

        #[test]
        fn classes() {
            let class = |text: &str| {
                let addr = NetAddr::from(text.parse::<IpAddr>().unwrap());
                (addr.is_v4(), addr.is_loopback(), addr.is_unspecified())
            };
            assert_eq!(class("127.3.2.1"), (true, true, false));
            assert_eq!(class("::ffff:127.0.0.1"), (true, true, false));
            assert_eq!(class("::1"), (false, true, false));
            assert_eq!(class("0.0.0.0"), (true, false, true));
            assert_eq!(class("::"), (false, false, true));
            assert_eq!(class("128.0.0.1"), (true, false, false));
            assert_eq!(class("fd00::1"), (false, false, false));
        }

        #[test]
        fn bytes_lie_in_network_order() {
            let addr = NetAddr::from("1.2.3.4".parse::<IpAddr>().unwrap());
            assert_eq!(addr.v4_word().to_ne_bytes(), [1, 2, 3, 4]);
            assert_eq!(NetPort::from_host(0x1234).net().to_ne_bytes(), [0x12, 0x34]);
        }
    }
}
