//! `sockops`: notes a flow the moment its source port is known, and cleans up after it.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_ANY, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_ESTABLISHED, BPF_TCP_SYN_SENT, bpf_sock,
    bpf_sock_ops,
};
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_ktime_get_ns};
use aya_ebpf::programs::SockOpsContext;
use core::ptr;
use mesh_common::{
    Counter, Flow, FlowKey, NetEndpoint, NetPort, OwnSocket, SocketRecord, flow_kind, socket_kind,
};

use crate::context::{either, forget_socket_record, read, read4, set_socket_record, socket_record};
use crate::maps::{FLOWS, OWN, PRESENTED, REFUSED, count};
use crate::{fast, workload};

#[inline(always)]
pub(crate) fn sockops(ctx: &SockOpsContext) {
    match read!((*ctx.ops).op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(ctx),
        _ => {}
    }
}

/// The SYN is about to leave.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let Some(sk) = socket(ctx) else { return };
    let record = socket_record(sk);
    if !record.is_null() {
        // SAFETY: not null; the storage lives as long as the socket.
        let record = unsafe { *record };
        match record.kind {
            socket_kind::REDIRECTED => note(ctx, record.workload, record.endpoint, flow_kind::OUTBOUND),
            socket_kind::DIRECT if fast::is_open(ctx, &record, &remote(ctx)) => {
                note(ctx, record.workload, record.endpoint, flow_kind::DIRECT);
            }
            // The server's agent decides, as it does of everybody from outside.
            socket_kind::DIRECT => forget_socket_record(sk),
            _ => {}
        }
        return;
    }
    // SAFETY: takes the program's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: written once before the connect, removed after it.
    let Some(own) = (unsafe { OWN.get(cookie) }) else {
        return;
    };
    let OwnSocket {
        workload, present, ..
    } = *own;
    let record = SocketRecord {
        workload,
        endpoint: present,
        kind: socket_kind::PRESENTING,
    };
    // Without a record nothing would clean the flow up; the application then sees the agent's address.
    if !present.is_none() && set_socket_record(sk, record) {
        note(ctx, workload, present, flow_kind::INBOUND);
    }
}

#[inline(always)]
fn note(ctx: &SockOpsContext, workload: u64, endpoint: NetEndpoint, kind: u32) {
    let key = FlowKey {
        workload,
        source: local(ctx),
        destination: remote(ctx),
    };
    let closed_at = match kind {
        // SAFETY: takes nothing.
        flow_kind::DIRECT => unsafe { bpf_ktime_get_ns() },
        _ => 0,
    };
    let flow = Flow {
        closed_at,
        endpoint,
        kind,
    };
    if kind == flow_kind::INBOUND && workload::presented_late() {
        // Always has room. Should the kernel have no memory, the application sees the agent's address.
        let _ = PRESENTED.insert(key, flow, u64::from(BPF_ANY));
    } else if FLOWS.insert(key, flow, u64::from(BPF_ANY)).is_err() {
        count(Counter::RefusedMapFull);
        // The connection cannot be stopped here; `sk_lookup` will reset it.
        let _ = REFUSED.insert(key, 0, u64::from(BPF_ANY));
    }
    let flags = read!((*ctx.ops).bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    // Fails for no socket that has come so far.
    let _ = ctx.set_cb_flags(flags.cast_signed());
}

/// An application (or the agent) got a connection: does somebody speak for another here?
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let Some(sk) = socket(ctx) else { return };
    let Some(workload) = workload::netns_in_sockops(ctx) else {
        return;
    };
    if workload::find(workload).is_none() {
        return;
    }
    let key = FlowKey {
        workload,
        source: remote(ctx),
        destination: local(ctx),
    };
    // SAFETY: the flow is removed only here and when its connection closes.
    let Some(flow) = (unsafe { FLOWS.get(key) }) else {
        return;
    };
    let Flow { endpoint, kind, .. } = *flow;
    match kind {
        flow_kind::INBOUND => {
            let record = SocketRecord {
                workload,
                endpoint,
                kind: socket_kind::ACCEPTED,
            };
            set_socket_record(sk, record);
        }
        // Who it is from can be seen.
        flow_kind::DIRECT => {}
        // Those on their way to the agent's listener wait for its accept.
        _ => return,
    }
    let _ = FLOWS.remove(key);
}

#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    let (from, to) = (arg(ctx, 0), arg(ctx, 1));
    let opens = from == BPF_TCP_SYN_SENT && to == BPF_TCP_ESTABLISHED;
    if to != BPF_TCP_CLOSE && !opens {
        return;
    }
    let Some(sk) = socket(ctx) else { return };
    let record = socket_record(sk);
    if record.is_null() {
        return;
    }
    // SAFETY: not null; the storage lives as long as the socket.
    let record = unsafe { *record };
    if record.kind == socket_kind::DIRECT {
        fast::state_changed(ctx, &record, from, to);
    }
    if opens {
        return;
    }
    let key = FlowKey {
        workload: record.workload,
        source: local(ctx),
        destination: remote(ctx),
    };
    if record.kind == socket_kind::PRESENTING && workload::presented_late() {
        // The application may not have accepted it yet.
        if let Some(flow) = PRESENTED.get_ptr_mut(key) {
            // SAFETY: the kernel's pointer to the value, and one word.
            unsafe { (*flow).closed_at = bpf_ktime_get_ns() };
        }
    } else if from == BPF_TCP_SYN_SENT || record.kind != socket_kind::REDIRECTED {
        let _ = FLOWS.remove(key);
        if from == BPF_TCP_SYN_SENT {
            let _ = REFUSED.remove(key);
        }
    } else if let Some(flow) = FLOWS.get_ptr_mut(key) {
        // Written, closed, but perhaps not accepted yet: the agent still needs to know where the bytes go.
        // SAFETY: the kernel's pointer to the value, and one word.
        unsafe { (*flow).closed_at = bpf_ktime_get_ns() };
    }
}

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> Option<*mut bpf_sock> {
    let sk = read!((*ctx.ops).__bindgen_anon_2.sk);
    (!sk.is_null()).then_some(sk)
}

#[inline(always)]
fn arg(ctx: &SockOpsContext, n: usize) -> u32 {
    read!((*ctx.ops).__bindgen_anon_1.args[n])
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> NetEndpoint {
    let ops: *mut bpf_sock_ops = ctx.ops;
    let addr = either(
        read!((*ops).family),
        read!((*ops).local_ip4),
        read4!((*ops).local_ip6),
    );
    // The one port that the kernel gives in host byte order.
    NetEndpoint::new(addr, NetPort::from_host_word(read!((*ops).local_port)))
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> NetEndpoint {
    let ops: *mut bpf_sock_ops = ctx.ops;
    let addr = either(
        read!((*ops).family),
        read!((*ops).remote_ip4),
        read4!((*ops).remote_ip6),
    );
    // A 32-bit value in network byte order.
    NetEndpoint::new(
        addr,
        NetPort::from_host_word(u32::from_be(read!((*ops).remote_port))),
    )
}
