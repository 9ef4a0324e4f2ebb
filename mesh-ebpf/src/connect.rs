//! `cgroup/connect4` and `connect6`: sends outgoing connections of enrolled workloads to the agent.
//!
//! A captured TCP socket is pointed at the workload's own address and a port made up for it. The own address,
//! because the kernel then picks the same source as it would have, so `getsockname()` stays true; the made-up
//! port, because one source port may serve several destinations and each needs a 4-tuple of its own. The
//! `sk_lookup` program knows the flow and hands it to the agent's listener.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use mesh_common::maps::{REDIRECT_PORT_COUNT, REDIRECT_PORT_FIRST};
use mesh_common::{
    CGROUP_KEYS, Counter, NetAddr, NetEndpoint, NetPort, SocketRecord, WorkloadEntry, socket_kind,
};

use crate::context::{Addr, TCP, UDP, Verdict};
use crate::maps::{OWN, count};
use crate::{dns, fast, workload};

#[inline(always)]
pub(crate) fn connect(ctx: &Addr) -> Verdict {
    if workload::tell_netns(ctx) {
        return Verdict::Pass;
    }
    let key = workload::key(ctx);
    let Some(entry) = workload::find(key) else {
        return Verdict::Pass;
    };
    if OWN.get_ptr(ctx.socket_cookie()).is_some() {
        count(Counter::PassedOwn);
        return Verdict::Pass;
    }
    match ctx.protocol() {
        TCP => tcp(ctx, key, entry),
        UDP => dns::connect(ctx, key, entry),
        _ => Verdict::Pass,
    }
}

#[inline(always)]
fn tcp(ctx: &Addr, key: u64, entry: &WorkloadEntry) -> Verdict {
    let to = ctx.endpoint();
    if is_local(&to.addr, entry) {
        if dials_listener(to.port, entry) {
            count(Counter::RefusedListener);
            return refuse(ctx, to.addr);
        }
        return pass(ctx, Counter::PassedLocal);
    }
    if ctx.bound_device() != 0 {
        return pass(ctx, Counter::PassedBoundDevice);
    }
    let own = if to.addr.is_v4() { entry.v4 } else { entry.v6 };
    if own.is_none() {
        return pass(ctx, Counter::PassedNoAddress);
    }
    if !workload::alive(key) {
        ctx.forget_record();
        return match workload::without_agent(entry) {
            Verdict::Refuse => refuse(ctx, own),
            Verdict::Pass => Verdict::Pass,
        };
    }
    if let Some(verdict) = fast::connect(ctx, key, &own, to) {
        return verdict;
    }
    let record = SocketRecord {
        workload: key,
        endpoint: to,
        kind: socket_kind::REDIRECTED,
    };
    if !ctx.set_record(record) {
        count(Counter::RefusedNoStorage);
        return workload::refuse();
    }
    // The host's namespace belongs to others: without a `sk_lookup` program there, the listener is dialled.
    let port = if key & CGROUP_KEYS == 0 {
        made_up_port()
    } else {
        entry.outbound_port
    };
    ctx.rewrite(&NetEndpoint::new(own, port));
    count(Counter::CapturedTcp);
    Verdict::Pass
}

/// ECONNREFUSED for the application: where the kernel does not let us say so, from a port where nobody can listen.
#[inline(always)]
fn refuse(ctx: &Addr, own: NetAddr) -> Verdict {
    if workload::can_set_errno() {
        return workload::refuse();
    }
    ctx.forget_record();
    ctx.rewrite(&NetEndpoint::new(own, NetPort::from_net(0)));
    Verdict::Pass
}

/// Leaves the connection as it is.
#[inline(always)]
pub(crate) fn pass(ctx: &Addr, reason: Counter) -> Verdict {
    ctx.forget_record();
    count(reason);
    Verdict::Pass
}

/// The workload talking to itself is none of the mesh's business.
#[inline(always)]
pub(crate) fn is_local(addr: &NetAddr, entry: &WorkloadEntry) -> bool {
    addr.is_loopback() || addr.is_unspecified() || is_own(addr, entry)
}

#[inline(always)]
pub(crate) fn is_own(addr: &NetAddr, entry: &WorkloadEntry) -> bool {
    addr.same(&entry.v4) || addr.same(&entry.v6)
}

/// The agent's listeners take only what capture brings them.
#[inline(always)]
pub(crate) fn dials_listener(port: NetPort, entry: &WorkloadEntry) -> bool {
    port == entry.outbound_port || (port == entry.inbound_port && !port.is_none())
}

#[inline(always)]
fn made_up_port() -> NetPort {
    // SAFETY: takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    NetPort::from_host_word(u32::from(REDIRECT_PORT_FIRST) + random % u32::from(REDIRECT_PORT_COUNT))
}
