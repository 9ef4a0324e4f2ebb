//! Names, capacities and well-known values of the maps.

/// The version of every layout in this crate: part of the path of each pin.
pub const LAYOUT: &str = "v2";

/// `WorkloadKey` -> `WorkloadEntry`.
pub const WORKLOADS: &str = "WORKLOADS";
/// `ListenerKey` -> listening socket.
pub const LISTENERS: &str = "LISTENERS";
/// Socket cookie -> `OwnSocket`.
pub const OWN: &str = "OWN";
/// `FlowKey` -> `Flow`.
pub const FLOWS: &str = "FLOWS";
/// `FlowKey` -> `Flow` of the agent's connections to applications, where the kernel does not tell `sockops` programs
/// whose an accepted socket is: then `getpeername` looks here when it is asked.
pub const PRESENTED: &str = "PRESENTED";
/// `FlowKey` of connections that found `FLOWS` full -> unused.
pub const REFUSED: &str = "REFUSED";
/// Socket -> `SocketRecord`.
pub const SOCKETS: &str = "SOCKETS";
/// `DnsKey` -> `NetEndpoint`.
pub const DNS_SERVERS: &str = "DNS_SERVERS";
/// `FastKey` -> `FastPath`.
pub const FAST: &str = "FAST";
/// `TrafficKey` -> `Traffic`.
pub const FAST_TRAFFIC: &str = "FAST_TRAFFIC";
/// `Counter` -> `u64` per CPU.
pub const COUNTERS: &str = "COUNTERS";
/// 0 -> `Settings`.
pub const SETTINGS: &str = "SETTINGS";

/// 0 -> `Serves`. Each loaded copy of the programs has its own, which is never pinned: the loader makes it of this
/// section, where `mesh-ebpf` puts it.
pub const SERVES: &str = ".data";

/// Every map that all copies share, in the order of the admin page.
pub const ALL: [&str; 12] = [
    WORKLOADS,
    LISTENERS,
    OWN,
    FLOWS,
    PRESENTED,
    REFUSED,
    SOCKETS,
    DNS_SERVERS,
    FAST,
    FAST_TRAFFIC,
    COUNTERS,
    SETTINGS,
];

/// The kubelet's limit is 110 pods per node by default, and nobody runs more than a few hundred.
pub const MAX_WORKLOADS: u32 = 1024;
/// Two TCP listeners per workload.
pub const MAX_LISTENERS: u32 = 2 * MAX_WORKLOADS;
/// Connects of the agent under way at one time.
pub const MAX_OWN: u32 = 16 * 1024;
/// Connections between an application's `connect` and the agent's `accept`: as long as the agent keeps up, a few.
pub const MAX_FLOWS: u32 = 16 * 1024;
/// Connections of the agent to applications that did not ask yet for whom it speaks. The oldest make room: who asks
/// later than that sees the agent's address. (Where `sockops` can tell, nothing is kept here, see [`PRESENTED`].)
pub const MAX_PRESENTED: u32 = 32 * 1024;
/// Only those on their way to being reset; an entry lives for microseconds.
pub const MAX_REFUSED: u32 = 1024;
/// A few hundred workloads, each with a hundred destinations on its own node.
pub const MAX_FAST: u32 = 64 * 1024;
/// Two rows for each pair that ever talked, by way of each destination.
pub const MAX_FAST_TRAFFIC: u32 = 64 * 1024;
/// Every workload using every slot.
pub const MAX_DNS_SERVERS: u32 = MAX_WORKLOADS * (DNS_V4_SLOTS + DNS_V6_SLOTS);

/// IPv4 DNS servers that one workload may ask at the same time; slot `i` is reached at [`DNS_V4_NET`] + 1 + `i`.
/// Limited per workload, so that none can use up the slots of another.
pub const DNS_V4_SLOTS: u32 = 64;
/// `127.153.53.0/24`, host byte order: loopback addresses that stand for DNS servers inside a workload.
pub const DNS_V4_NET: u32 = 0x7f99_3500;
/// IPv6 has one loopback address only, so there a slot is a port of the agent's.
pub const DNS_V6_SLOTS: u32 = 4;
/// The slots of IPv6 follow those of IPv4 in `DnsKey::slot`.
pub const DNS_V6_SLOT_BASE: u32 = DNS_V4_SLOTS;
/// Slots tried from a server's own one before it is given up.
pub const DNS_V4_PROBES: u32 = 8;

/// A redirected connection carries a port from `FIRST..FIRST + COUNT`, below the range that Linux takes source
/// ports from: a redirected connection can then never be the mirror image of another.
pub const REDIRECT_PORT_FIRST: u16 = 1024;
pub const REDIRECT_PORT_COUNT: u16 = 31 * 1024;

/// How long an application may take to ask for the peer of a connection that is closed already.
pub const PRESENTED_AFTER_CLOSE_NS: u64 = 60_000_000_000;

/// An agent that has not given a sign for so long is taken for gone. It gives one every second.
pub const HEARTBEAT_LIMIT_NS: u64 = 10_000_000_000;
