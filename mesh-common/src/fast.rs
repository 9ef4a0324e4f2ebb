//! The fast path: connections that the kernel makes without the agent, and what it counted of them.

use crate::{NetEndpoint, WorkloadKey};

/// Backends of one destination. More than that on one node go through the agent.
pub const MAX_FAST_BACKENDS: usize = 16;

/// A client, and the destination that it may reach without the agent.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FastKey {
    pub client: WorkloadKey,
    /// As the application dials it: a service's address or a workload's own.
    pub destination: NetEndpoint,
    pub reserved: u32,
}

/// Where a destination's connections go: one of these, at random.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FastPath {
    /// From 1 to [`MAX_FAST_BACKENDS`].
    pub count: u32,
    pub reserved: u32,
    pub backends: [FastBackend; MAX_FAST_BACKENDS],
}

/// An enrolled workload of this node, which the client may enter at this address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FastBackend {
    pub server: WorkloadKey,
    pub endpoint: NetEndpoint,
    pub reserved: u32,
}

impl FastBackend {
    pub const NONE: Self = Self {
        server: 0,
        endpoint: NetEndpoint::NONE,
        reserved: 0,
    };
}

/// Which of the two rows of a pair in [`crate::maps::FAST_TRAFFIC`].
pub mod traffic_kind {
    /// The kernel's counts. It makes the row, and only it writes there.
    pub const COUNTED: u32 = 0;
    /// How much of that the agent has put into its metrics: its own, kept here to outlive it.
    pub const REPORTED: u32 = 1;
}

/// Who talks to whom by way of which destination.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TrafficKey {
    pub client: WorkloadKey,
    pub server: WorkloadKey,
    pub destination: NetEndpoint,
    pub kind: u32,
}

/// Since the row was made.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    pub opened: u64,
    pub closed: u64,
    /// Bytes from the client, of closed connections.
    pub received: u64,
    /// Bytes to the client, of closed connections.
    pub sent: u64,
}
