//! The network: one bridge per node, and one link between the bridges, where everything between nodes passes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail};

use crate::{Netns, Run, shell};

/// The end of the link between the nodes, in each node's namespace.
pub(crate) const TRUNK: &str = "trunk";

/// The nodes' bridges. Pods hang on them; agents and processes of the "node" run in the machine's own namespace.
#[derive(Debug)]
pub(crate) struct Wire {
    bridges: Vec<Netns>,
}

impl Wire {
    /// Two nodes; more would need a switch between them.
    pub(crate) fn new(run: &Run) -> Result<Self> {
        let bridges = ["node-a", "node-b"]
            .iter()
            .map(|name| Netns::create(&run.netns(name)))
            .collect::<Result<Vec<_>>>()?;
        let [a, b] = &bridges[..] else {
            unreachable!("two names")
        };
        let trunk = format!("link add {TRUNK} type veth peer name {TRUNK} netns {}", b.name());
        shell::ip(a.name(), &[trunk])?;
        for bridge in &bridges {
            // Snooping would hold back neighbour discovery while it learns.
            let lines = [
                "link add br0 type bridge mcast_snooping 0".to_owned(),
                format!("link set {TRUNK} master br0 up"),
                "link set br0 up".to_owned(),
            ];
            shell::ip(bridge.name(), &lines)?;
        }
        Ok(Self { bridges })
    }

    pub(crate) fn bridge(&self, node: usize) -> Result<&Netns> {
        self.bridges
            .get(node)
            .with_context(|| format!("there is no node {node}"))
    }

    /// Gives a namespace an interface on a node's bridge. All addresses are on one link, as is everything else:
    /// the default route has no gateway.
    pub(crate) fn attach(&self, node: usize, netns: &Netns, addresses: &[IpAddr]) -> Result<()> {
        let bridge = self.bridge(node)?.name();
        let [IpAddr::V4(address), ..] = addresses else {
            bail!("an IPv4 address comes first");
        };
        // Unique on the node, and short enough for an interface.
        let port = format!("pod{}", address.octets()[3]);
        let lines = [
            format!("link add {port} type veth peer name eth0 netns {}", netns.name()),
            format!("link set {port} master br0 up"),
        ];
        shell::ip(bridge, &lines)?;
        let mut lines: Vec<String> = addresses
            .iter()
            .map(|address| match address {
                IpAddr::V4(address) => format!("address add {address}/16 dev eth0"),
                IpAddr::V6(address) => format!("address add {address}/48 dev eth0 nodad"),
            })
            .collect();
        lines.push("link set eth0 up".to_owned());
        lines.push("route add 0.0.0.0/0 dev eth0".to_owned());
        lines.push("route add ::/0 dev eth0".to_owned());
        shell::ip(netns.name(), &lines)
    }
}

/// The addresses of the `index`th pod of a node.
pub(crate) fn pod_addresses(node: usize, index: u8) -> Result<[IpAddr; 2]> {
    let node = u8::try_from(node)?;
    Ok([
        Ipv4Addr::new(10, 244, node + 1, index).into(),
        Ipv6Addr::new(0xfd00, 0x244, 0, u16::from(node) + 1, 0, 0, 0, u16::from(index)).into(),
    ])
}
