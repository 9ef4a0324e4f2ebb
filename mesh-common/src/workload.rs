//! Who is enrolled, and where the agent listens for it.

use crate::maps::DNS_V6_SLOTS;
use crate::{NetAddr, NetPort};

/// Names a workload: the cookie of its network namespace, or [`CGROUP_KEYS`] and the id of its cgroup.
pub type WorkloadKey = u64;

/// Set in the keys of workloads that share the host's namespace. (Cookies count up from 1.)
pub const CGROUP_KEYS: WorkloadKey = 1 << 63;

/// Bits of [`WorkloadEntry::flags`].
pub mod workload_flags {
    /// Without an agent, refuse what would have been captured, rather than let it pass.
    pub const HOLD: u32 = 1;
}

/// The one element of [`crate::maps::SERVES`]: whom a loaded copy of the programs serves.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Serves {
    /// 0 at the cgroup root, where a socket's namespace names its workload.
    pub workload: WorkloadKey,
    /// The cookie of the host's namespace, for programs at a workload's cgroup: a container in there that has a
    /// namespace of its own cannot reach the agent's listeners. 0 for others, which do not look.
    pub host: WorkloadKey,
}

impl Serves {
    /// Whosever socket it is.
    pub const ANYONE: Self = Self { workload: 0, host: 0 };
}

/// An enrolled workload.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WorkloadEntry {
    /// The workload's own addresses; none if it has none of that family.
    pub v4: NetAddr,
    pub v6: NetAddr,
    pub flags: u32,
    /// The ports that the agent's listeners were given.
    pub outbound_port: NetPort,
    pub inbound_port: NetPort,
    pub dns_v4_port: NetPort,
    /// One per IPv6 slot; none where there is no IPv6.
    pub dns_v6_ports: [NetPort; DNS_V6_SLOTS as usize],
    pub reserved: u16,
}

/// Which of the agent's listeners.
pub mod listener_kind {
    pub const OUTBOUND: u32 = 1;
    pub const INBOUND: u32 = 2;
}

/// The socket under this key is open exactly as long as the agent serves the workload.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ListenerKey {
    pub workload: WorkloadKey,
    pub kind: u32,
    pub reserved: u32,
}

/// The one element of [`crate::maps::SETTINGS`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// When the agent last showed that it is not stuck: `CLOCK_MONOTONIC` in ns.
    pub heartbeat: u64,
}
