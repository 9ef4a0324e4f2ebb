//! The contract between the kernel programs and the agent.
//!
//! The agent writes [`WORKLOADS`](maps::WORKLOADS) (who is enrolled), [`LISTENERS`](maps::LISTENERS) (its
//! listening sockets: present there means alive), [`OWN`](maps::OWN) (its own sockets, which capture leaves
//! alone), [`FAST`](maps::FAST) (what may be connected without it), [`SETTINGS`](maps::SETTINGS) (its
//! heartbeat) and [`SERVES`](maps::SERVES) (whom one copy of the programs serves). The kernel writes
//! [`FLOWS`](maps::FLOWS) and [`DNS_SERVERS`](maps::DNS_SERVERS) (where a captured socket wanted to go),
//! [`FAST_TRAFFIC`](maps::FAST_TRAFFIC) and [`COUNTERS`](maps::COUNTERS). [`SOCKETS`](maps::SOCKETS) and
//! [`REFUSED`](maps::REFUSED) are the kernel's own.
//!
//! Invariants: every type here is `repr(C)` without padding, made of integers only (any bit pattern is valid),
//! and its layout is asserted at compile time in `layout`. Byte order lives in [`NetAddr`] and [`NetPort`].
//! Changing a layout means changing [`maps::LAYOUT`], which is part of every pin's path: agents of two layouts
//! never share a map. (`SERVES` is never pinned: it is between an agent and the object inside it.)
#![no_std]

mod addr;
pub mod counter;
mod fast;
mod flow;
mod layout;
pub mod maps;
mod workload;

pub use addr::{NetAddr, NetEndpoint, NetPort};
pub use counter::Counter;
pub use fast::{FastBackend, FastKey, FastPath, MAX_FAST_BACKENDS, Traffic, TrafficKey, traffic_kind};
pub use flow::{DnsKey, Flow, FlowKey, OwnSocket, SocketRecord, flow_kind, socket_kind};
pub use workload::{
    CGROUP_KEYS, ListenerKey, Serves, Settings, WorkloadEntry, WorkloadKey, listener_kind, workload_flags,
};

#[cfg(feature = "user")]
mod user {
    //! Proof for aya that these types may cross the system call as plain bytes.

    macro_rules! pod {
        ($($name:ident),+) => {$(
            // SAFETY: `repr(C)`, `Copy`, without padding (see `layout`), and every bit pattern is valid.
            unsafe impl aya::Pod for crate::$name {}
        )+};
    }
    pod!(
        DnsKey,
        FastKey,
        FastPath,
        Flow,
        FlowKey,
        ListenerKey,
        NetEndpoint,
        OwnSocket,
        Serves,
        Settings,
        Traffic,
        TrafficKey,
        WorkloadEntry
    );
}
