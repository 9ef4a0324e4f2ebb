//! What the kernel side counts, by reason.

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// Index into [`crate::maps::COUNTERS`]. Never stored in a map, so it may be an enum.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum Counter {
            $($(#[$doc])* $variant,)+
        }

        /// Every counter with the name it has as a metric label.
        pub const ALL: &[(Counter, &str)] = &[$((Counter::$variant, $name),)+];
    };
}

counters! {
    /// Outgoing TCP connections handed to the agent.
    CapturedTcp = "captured_tcp",
    /// DNS datagrams and connected DNS sockets handed to the agent.
    CapturedDns = "captured_dns",
    /// Incoming TCP connections handed to the agent.
    CapturedInbound = "captured_inbound",
    /// Outgoing TCP connections made without the agent.
    FastPath = "fast_path",
    /// Outgoing TCP connections handed to the agent for want of a row to count them in on the fast path.
    FastPathFull = "fast_path_full",
    /// Connects of the agent itself.
    PassedOwn = "passed_own",
    /// Connects to the workload itself: loopback, unspecified or its own address.
    PassedLocal = "passed_local",
    /// Sockets bound to a device, which cannot be redirected over loopback.
    PassedBoundDevice = "passed_bound_device",
    /// Destinations of a family of which the workload has no address.
    PassedNoAddress = "passed_no_address",
    /// Outgoing, without an agent, by the choice of the workload.
    PassedOpenOutbound = "passed_open_outbound",
    /// Incoming, without an agent, by the choice of the workload.
    PassedOpenInbound = "passed_open_inbound",
    /// DNS to a server for which no slot was free.
    PassedDnsSlotsFull = "passed_dns_slots_full",
    /// Refused: outgoing, without an agent.
    HeldOutbound = "held_outbound",
    /// Refused: incoming, without an agent.
    HeldInbound = "held_inbound",
    /// Refused: somebody dialled a listener of the agent.
    RefusedListener = "refused_listener",
    /// Refused: no room in `FLOWS`.
    RefusedMapFull = "refused_map_full",
    /// Refused: the kernel could not attach a record to the socket.
    RefusedNoStorage = "refused_no_storage",
    /// The agent's listener could not be assigned to a connection.
    RefusedAssign = "refused_assign",
}

#[expect(clippy::cast_possible_truncation, reason = "there are a few dozen")]
pub const COUNT: u32 = ALL.len() as u32;
