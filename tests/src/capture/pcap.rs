//! Reading a recording: the bytes of each TCP flow.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, bail};

/// Everything of the recording that is TCP.
#[derive(Debug, Default)]
pub struct Seen {
    /// All packets, those of other protocols too.
    pub packets: usize,
    /// The bytes from one address to another in the order of arrival. What was sent twice is here twice.
    pub flows: BTreeMap<(SocketAddr, SocketAddr), Vec<u8>>,
}

impl Seen {
    /// Reads the classic format of tcpdump on Ethernet.
    pub(super) fn parse(file: &[u8]) -> Result<Self> {
        const MAGIC: [u8; 4] = 0xa1b2_c3d4_u32.to_ne_bytes();
        const HEADER: usize = 24;
        const RECORD: usize = 16;
        if file.get(..4) != Some(&MAGIC[..]) {
            bail!("not a recording of tcpdump on this machine");
        }
        let mut seen = Self::default();
        let mut rest = file.get(HEADER..).context("no file header")?;
        while let Some(header) = rest.get(..RECORD) {
            let length: [u8; 4] = header[8..12].try_into()?;
            let length = usize::try_from(u32::from_ne_bytes(length))?;
            let frame = rest
                .get(RECORD..RECORD + length)
                .context("the recording is cut off")?;
            seen.packets += 1;
            if let Some((from, to, payload)) = tcp(frame) {
                seen.flows
                    .entry((from, to))
                    .or_default()
                    .extend_from_slice(payload);
            }
            rest = &rest[RECORD + length..];
        }
        Ok(seen)
    }

    /// Whether a flow holds these bytes.
    pub fn contains(&self, marker: &[u8]) -> bool {
        self.flows
            .values()
            .any(|bytes| bytes.windows(marker.len()).any(|window| window == marker))
    }

    /// Bytes from and to this port.
    pub fn bytes_of_port(&self, port: u16) -> usize {
        self.flows
            .iter()
            .filter(|((from, to), _)| from.port() == port || to.port() == port)
            .map(|(_, bytes)| bytes.len())
            .sum()
    }

    pub fn bytes(&self) -> usize {
        self.flows.values().map(Vec::len).sum()
    }

    /// Whether everything in every flow is framed as TLS records: type 20 to 23, version 3.x.
    pub fn is_all_tls(&self) -> bool {
        self.flows.values().all(|bytes| {
            let header = bytes.get(..2);
            bytes.is_empty() || header.is_some_and(|header| (20..=23).contains(&header[0]) && header[1] == 3)
        })
    }
}

/// Addresses and payload of a TCP packet in an Ethernet frame. Extension headers of IPv6 are not followed: TCP
/// does not use them here.
fn tcp(frame: &[u8]) -> Option<(SocketAddr, SocketAddr, &[u8])> {
    const TCP: u8 = 6;
    let packet = frame.get(14..)?;
    let (from, to, segment): (IpAddr, IpAddr, &[u8]) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
            if *packet.get(9)? != TCP {
                return None;
            }
            let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            (from.into(), to.into(), packet.get(header..total)?)
        }
        [0x86, 0xdd] => {
            let length = usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
            if *packet.get(6)? != TCP {
                return None;
            }
            let from: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            (
                Ipv6Addr::from(from).into(),
                Ipv6Addr::from(to).into(),
                packet.get(40..40 + length)?,
            )
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(segment.get(at..at + 2)?.try_into().ok()?));
    let payload = usize::from(segment.get(12)? >> 4) * 4;
    Some((
        (from, port(0)?).into(),
        (to, port(2)?).into(),
        segment.get(payload..)?,
    ))
}
