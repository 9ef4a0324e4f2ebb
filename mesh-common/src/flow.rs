//! What the kernel remembers of sockets: where they wanted to go, whom they speak for.

use crate::{NetEndpoint, WorkloadKey};

/// What a [`Flow`] is for.
pub mod flow_kind {
    /// A captured connection of an application to the agent; the endpoint is where it wanted to go.
    pub const OUTBOUND: u32 = 1;
    /// A connection of the agent to the application; the endpoint is the peer to present to it.
    pub const INBOUND: u32 = 2;
    /// A connection on the fast path, under the key of the server's workload, which it may enter without the agent;
    /// the endpoint is where it wanted to go. Taken out when the server has it, or with the client's socket.
    pub const DIRECT: u32 = 3;
}

/// What a [`SocketRecord`] says about its socket.
pub mod socket_kind {
    /// An application's socket that was redirected; the endpoint is the peer that it asked for.
    pub const REDIRECTED: u32 = 1;
    /// A socket that an application accepted; the endpoint is the real client.
    pub const ACCEPTED: u32 = 2;
    /// A socket of the agent that speaks for a real client (the endpoint).
    pub const PRESENTING: u32 = 3;
    /// An application's socket on the fast path; the endpoint is the peer that it asked for, and the workload is
    /// the server's.
    pub const DIRECT: u32 = 4;
}

/// A TCP connection as its initiator sees it. Less than the whole would mix up clients: one source port may
/// serve several destinations at once.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowKey {
    pub workload: WorkloadKey,
    pub source: NetEndpoint,
    pub destination: NetEndpoint,
}

/// A connection that has not been accepted yet. Taken out by who accepts it, or when it fails.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// Zero, or the `CLOCK_MONOTONIC` time in ns at which the initiator was done with the connection. Data may
    /// still wait to be accepted then, so the agent lets some time pass before it sweeps the entry. On the fast path
    /// the time at which it began: no way in stays open for long.
    pub closed_at: u64,
    pub endpoint: NetEndpoint,
    pub kind: u32,
}

/// What the kernel attaches to a socket.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketRecord {
    pub workload: WorkloadKey,
    pub endpoint: NetEndpoint,
    pub kind: u32,
}

/// A socket of the agent in a workload, between `socket()` and the end of `connect()`. Key: its socket cookie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OwnSocket {
    pub workload: WorkloadKey,
    /// `CLOCK_MONOTONIC` in ns, so that what a killed agent left can be told and swept.
    pub created_at: u64,
    /// The peer that the accepting application shall see, or none.
    pub present: NetEndpoint,
    pub reserved: u32,
}

/// Names one DNS server among those that a workload asks.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DnsKey {
    pub workload: WorkloadKey,
    /// See [`crate::maps::DNS_V4_SLOTS`] and [`crate::maps::DNS_V6_SLOT_BASE`].
    pub slot: u32,
    pub reserved: u32,
}
