//! `sk_lookup`, one instance per workload's network namespace: hands flows to the agent's listeners.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sk_lookup;
use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::helpers::bpf_sk_assign;
use aya_ebpf::programs::SkLookupContext;
use core::ptr;
use mesh_common::{Counter, FlowKey, NetEndpoint, NetPort, WorkloadEntry, flow_kind, listener_kind};

use crate::connect::{dials_listener, is_own};
use crate::context::{TCP, either, read, read4};
use crate::maps::{FLOWS, REFUSED, count};
use crate::workload::{self, Hold as _};

#[inline(always)]
pub(crate) fn lookup(ctx: &SkLookupContext) -> u32 {
    let key = workload::own_key();
    let Some(entry) = workload::find(key) else {
        return SK_PASS;
    };
    let (remote, local) = endpoints(ctx.lookup);
    if read!((*ctx.lookup).protocol) != TCP {
        return datagram(&remote, &local, entry);
    }
    let flow = FlowKey {
        workload: key,
        source: remote,
        destination: local,
    };
    let from_inside = is_own(&remote.addr, entry) || remote.addr.is_loopback();
    // SAFETY: a flow is removed when its connection is accepted or closed, both after this.
    if let Some(found) = unsafe { FLOWS.get(flow) } {
        match found.kind {
            flow_kind::OUTBOUND => return assign(ctx, key, listener_kind::OUTBOUND).unwrap_or(SK_DROP),
            // The client's identity was checked when the way was opened to it.
            flow_kind::DIRECT => return SK_PASS,
            _ => {}
        }
    }
    if dials_listener(local.port, entry) {
        count(Counter::RefusedListener);
        return SK_DROP;
    }
    if REFUSED.get_ptr(flow).is_some() {
        return SK_DROP;
    }
    if from_inside {
        return SK_PASS;
    }
    inbound(ctx, key, entry)
}

#[inline(always)]
fn inbound(ctx: &SkLookupContext, key: u64, entry: &WorkloadEntry) -> u32 {
    let assigned = if workload::heartbeat_fresh() {
        assign(ctx, key, listener_kind::INBOUND)
    } else {
        None
    };
    if let Some(verdict) = assigned {
        if verdict == SK_PASS {
            count(Counter::CapturedInbound);
        }
        return verdict;
    }
    if entry.holds() {
        count(Counter::HeldInbound);
        SK_DROP
    } else {
        count(Counter::PassedOpenInbound);
        SK_PASS
    }
}

/// None without a listener.
#[inline(always)]
fn assign(ctx: &SkLookupContext, key: u64, kind: u32) -> Option<u32> {
    // SAFETY: the program's context and the listener that `listener` holds a reference to.
    let result = workload::listener(key, kind, |sk| unsafe {
        bpf_sk_assign(ctx.as_ptr(), sk.cast(), 0)
    })?;
    Some(if result == 0 {
        SK_PASS
    } else {
        count(Counter::RefusedAssign);
        SK_DROP
    })
}

/// The agent's DNS socket listens on every address, for the sake of its loopback slots; others may not use it.
#[inline(always)]
fn datagram(remote: &NetEndpoint, local: &NetEndpoint, entry: &WorkloadEntry) -> u32 {
    let ours = local.port == entry.dns_v4_port && !local.port.is_none();
    if ours && !is_own(&remote.addr, entry) && !remote.addr.is_loopback() {
        count(Counter::RefusedListener);
        return SK_DROP;
    }
    SK_PASS
}

/// (remote, local)
#[inline(always)]
fn endpoints(ctx: *mut bpf_sk_lookup) -> (NetEndpoint, NetEndpoint) {
    let family = read!((*ctx).family);
    let remote = either(family, read!((*ctx).remote_ip4), read4!((*ctx).remote_ip6));
    let local = either(family, read!((*ctx).local_ip4), read4!((*ctx).local_ip6));
    (
        NetEndpoint::new(remote, NetPort::from_net(read!((*ctx).remote_port))),
        NetEndpoint::new(local, NetPort::from_host_word(read!((*ctx).local_port))),
    )
}
