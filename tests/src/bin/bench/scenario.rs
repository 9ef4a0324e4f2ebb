//! The scenarios: which rows, between which places, and who takes part.

use serde::Serialize;

use crate::args::{Name, Peer};

/// Where the server is, as seen from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Place {
    SameNode,
    OtherNode,
}

/// One of the server's ports, each with a protocol of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Door {
    /// HTTP/1.1, where requests with the header `x-version: two` go to another server.
    Routed,
    Http,
    Http2,
    Grpc,
    /// HTTP/1.1 that the mesh is told to be TCP.
    Tcp,
    /// iperf3, TCP.
    Bulk,
}

impl Door {
    /// Those that lead from node to node.
    pub(crate) const BETWEEN_NODES: [Self; 5] = [Self::Tcp, Self::Bulk, Self::Http, Self::Http2, Self::LAST];
    /// Proxies open them in that order: when this one listens, all do.
    pub(crate) const LAST: Self = Self::Grpc;

    /// The mesh is to know no more of it.
    pub(crate) fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp | Self::Bulk)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Work {
    /// One after the other on each connection.
    Requests {
        door: Door,
        bytes: usize,
        connections: usize,
    },
    /// As many bytes as go.
    Bulk { flows: usize },
    /// Connect, one request, end; so many at a time.
    Connect { at_once: usize },
}

impl Work {
    /// What is counted.
    pub(crate) fn unit(self) -> Unit {
        match self {
            Self::Requests { .. } => Unit::Request,
            Self::Bulk { .. } => Unit::Gigabit,
            Self::Connect { .. } => Unit::Connection,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Request,
    Gigabit,
    Connection,
}

#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) label: String,
    pub(crate) work: Work,
}

#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: Name,
    pub(crate) title: &'static str,
    pub(crate) place: Place,
    pub(crate) peers: &'static [Peer],
    pub(crate) rows: Vec<Row>,
}

/// Those asked for, else all, in this order.
pub(crate) fn chosen(names: &[Name]) -> Vec<Scenario> {
    all()
        .into_iter()
        .filter(|scenario| names.is_empty() || names.contains(&scenario.name))
        .collect()
}

fn all() -> Vec<Scenario> {
    let one_hop = &[
        Peer::None,
        Peer::Bare,
        Peer::Agent,
        Peer::Nginx,
        Peer::Haproxy,
        Peer::Envoy,
    ];
    let two_hops = &[Peer::None, Peer::Bare, Peer::Agent, Peer::Envoy, Peer::Ztunnel];
    vec![
        Scenario {
            name: Name::L7SameNode,
            title: "HTTP/1.1 on one node, a route with one header match",
            place: Place::SameNode,
            peers: one_hop,
            rows: [(100, 32), (100, 1), (10_000, 32), (10_000, 1)]
                .map(|(bytes, connections)| requests(Door::Routed, bytes, connections))
                .into(),
        },
        Scenario {
            name: Name::L7TwoNodes,
            title: "HTTP between two nodes, mTLS, L7 at both ends (ztunnel, bare: bytes only)",
            place: Place::OtherNode,
            peers: two_hops,
            rows: [
                (Door::Http, 32),
                (Door::Http, 1),
                (Door::Http2, 32),
                (Door::Grpc, 32),
            ]
            .map(|(door, connections)| requests(door, 100, connections))
            .into(),
        },
        Scenario {
            name: Name::L4TwoNodes,
            title: "TCP between two nodes, mTLS",
            place: Place::OtherNode,
            peers: two_hops,
            rows: vec![
                requests(Door::Tcp, 100, 32),
                requests(Door::Tcp, 100, 1),
                bulk(1),
                bulk(8),
            ],
        },
        Scenario {
            name: Name::Connect,
            title: "new TCP connections between two nodes, mTLS",
            place: Place::OtherNode,
            // Not the bare relay: a handshake for each connection is not the least that one can cost.
            peers: &[Peer::None, Peer::Agent, Peer::Envoy, Peer::Ztunnel],
            rows: vec![Row {
                label: "connect, request, end; 16 at a time".to_owned(),
                work: Work::Connect { at_once: 16 },
            }],
        },
        Scenario {
            name: Name::FastPath,
            title: "TCP on one node, nothing needs L7",
            place: Place::SameNode,
            peers: &[Peer::None, Peer::Agent],
            rows: vec![requests(Door::Tcp, 100, 32), requests(Door::Tcp, 100, 1)],
        },
        alone(Name::Idle, "the agent's memory when nothing happens"),
        alone(Name::Churn, "one endpoint changes among many"),
        alone(Name::Soak, "HTTP/1.1 between two nodes at 80 % load"),
    ]
}

/// Looks at the agent alone: there are no turns.
fn alone(name: Name, title: &'static str) -> Scenario {
    Scenario {
        name,
        title,
        place: Place::OtherNode,
        peers: &[],
        rows: Vec::new(),
    }
}

fn bulk(flows: usize) -> Row {
    let plural = if flows == 1 { "" } else { "s" };
    Row {
        label: format!("bulk, {flows} flow{plural}"),
        work: Work::Bulk { flows },
    }
}

fn requests(door: Door, bytes: usize, connections: usize) -> Row {
    let protocol = match door {
        Door::Routed | Door::Http => "HTTP/1.1",
        Door::Http2 => "HTTP/2",
        Door::Grpc => "gRPC unary",
        Door::Tcp | Door::Bulk => "TCP",
    };
    let plural = if connections == 1 { "" } else { "s" };
    let size = if bytes < 1000 {
        format!("{bytes} B")
    } else {
        format!("{} KB", bytes / 1000)
    };
    Row {
        label: format!("{protocol}, {size}, {connections} connection{plural}"),
        work: Work::Requests {
            door,
            bytes,
            connections,
        },
    }
}
