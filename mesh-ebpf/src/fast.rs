//! The fast path: connections that the agent would only copy go from one application to the other.
//!
//! `connect` picks one of the backends that the agent opened to this client. The flow is noted under the server's
//! workload when its source port is known (see [`crate::sockops`]), and the server's `sk_lookup` program lets it
//! pass to the application's own listener.
//!
//! Invariants: without an agent nothing goes this way; a server is entered only by a flow that a client's socket of
//! this kernel noted, by a way that was open when its SYN left, and while that socket lives; every connection is
//! counted; no program runs for its packets.

use core::arch::asm;
use core::ptr;

use aya_ebpf::bindings::{
    BPF_NOEXIST, BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT2,
    BPF_TCP_LAST_ACK, BPF_TCP_SYN_SENT,
};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::programs::SockOpsContext;
use mesh_common::{
    Counter, FastBackend, FastKey, FastPath, MAX_FAST_BACKENDS, NetAddr, NetEndpoint, SocketRecord, Traffic,
    TrafficKey, WorkloadKey, socket_kind, traffic_kind,
};

use crate::context::{Addr, Verdict, read};
use crate::maps::{FAST, FAST_TRAFFIC, count};
use crate::{connect, workload};

/// `None`: this connection is the agent's.
#[inline(always)]
pub(crate) fn connect(ctx: &Addr, client: WorkloadKey, own: &NetAddr, to: NetEndpoint) -> Option<Verdict> {
    let key = FastKey {
        client,
        destination: to,
        reserved: 0,
    };
    // SAFETY: plain integers. Should the entry be freed and used again in this very moment, for another way, this
    // one is not open when the SYN leaves (see `is_open`).
    let path = unsafe { FAST.get(key) }?;
    let backend = pick(path)?;
    if !is_counted(client, backend.server, to) {
        count(Counter::FastPathFull);
        return None;
    }
    let record = SocketRecord {
        workload: backend.server,
        endpoint: to,
        kind: socket_kind::DIRECT,
    };
    if !ctx.set_record(record) {
        count(Counter::RefusedNoStorage);
        return Some(connect::refuse(ctx, *own));
    }
    // Of several addresses the server is to see the workload's own. A source that the application chose stays.
    ctx.bind(own);
    ctx.rewrite(&backend.endpoint);
    count(Counter::FastPath);
    Some(Verdict::Pass)
}

/// The way that `record` tells of is there, and leads to `to`. A record may be older: that of a socket which is
/// connected anew, or whose SYN waited for its first byte.
#[inline(always)]
pub(crate) fn is_open(ctx: &SockOpsContext, record: &SocketRecord, to: &NetEndpoint) -> bool {
    // Where the kernel does not tell the client, the agent opens no way.
    let Some(client) = workload::netns_in_sockops(ctx) else {
        return false;
    };
    if !workload::heartbeat_fresh() || workload::find(client).is_none() {
        return false;
    }
    let key = FastKey {
        client,
        destination: record.endpoint,
        reserved: 0,
    };
    // SAFETY: plain integers, as in `connect`; a server and an address that do not belong together match nothing
    // that a client could dial.
    let Some(path) = (unsafe { FAST.get(key) }) else {
        return false;
    };
    path.backends.iter().any(|backend| {
        backend.server == record.workload
            && backend.endpoint.addr.same(&to.addr)
            && backend.endpoint.port == to.port
    })
}

#[inline(always)]
fn pick(path: &FastPath) -> Option<&FastBackend> {
    if path.count == 0 {
        return None;
    }
    // SAFETY: takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    // The mask tells the verifier what the remainder cannot.
    path.backends
        .get((random % path.count) as usize & (MAX_FAST_BACKENDS - 1))
}

/// There is a row for connections of this pair; made here, since none may be counted nowhere.
#[inline(always)]
fn is_counted(client: WorkloadKey, server: WorkloadKey, destination: NetEndpoint) -> bool {
    let key = row(client, server, destination);
    FAST_TRAFFIC.get_ptr(key).is_some()
        || FAST_TRAFFIC
            .insert(key, Traffic::default(), u64::from(BPF_NOEXIST))
            .is_ok()
        // Another CPU was faster.
        || FAST_TRAFFIC.get_ptr(key).is_some()
}

/// Counts the client's socket when it is connected and when it is closed.
#[inline(always)]
pub(crate) fn state_changed(ctx: &SockOpsContext, record: &SocketRecord, from: u32, to: u32) {
    let Some(client) = workload::netns_in_sockops(ctx) else {
        return;
    };
    let Some(traffic) = FAST_TRAFFIC.get_ptr_mut(row(client, record.workload, record.endpoint)) else {
        return;
    };
    if to == BPF_TCP_ESTABLISHED {
        // SAFETY: the kernel's pointer to the value.
        return add(unsafe { &raw mut (*traffic).opened }, 1);
    }
    if from == BPF_TCP_SYN_SENT {
        return;
    }
    let fin_acked = matches!(from, BPF_TCP_FIN_WAIT2 | BPF_TCP_CLOSING | BPF_TCP_LAST_ACK);
    // In FIN_WAIT2 it cannot be told: a socket that nobody holds any more, and whose other side takes its time, is
    // closed before that one's FIN. Such a connection is counted a byte short.
    let fin_received = fin_acked || from == BPF_TCP_CLOSE_WAIT;
    // Both include what is numbered as a byte and is none: the SYN (of the sender) and the FIN.
    let received = read!((*ctx.ops).bytes_acked).saturating_sub(1 + u64::from(fin_acked));
    let sent = read!((*ctx.ops).bytes_received).saturating_sub(u64::from(fin_received));
    // SAFETY: as above.
    unsafe {
        add(&raw mut (*traffic).received, received);
        add(&raw mut (*traffic).sent, sent);
        add(&raw mut (*traffic).closed, 1);
    }
}

#[inline(always)]
fn row(client: WorkloadKey, server: WorkloadKey, destination: NetEndpoint) -> TrafficKey {
    TrafficKey {
        client,
        server,
        destination,
        kind: traffic_kind::COUNTED,
    }
}

/// Rust has no atomic addition for this target, the machine has.
#[inline(always)]
fn add(counter: *mut u64, value: u64) {
    // SAFETY: an aligned field of a map's value, which all programs change so.
    unsafe {
        asm!("lock *(u64 *)({counter} + 0) += {value}", counter = in(reg) counter, value = in(reg) value);
    }
}
