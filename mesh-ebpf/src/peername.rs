//! `cgroup/getpeername4` and `6`: an application sees the peer that it asked for, and in `accept()` the real
//! client, though the connection is with the agent.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use mesh_common::maps::PRESENTED_AFTER_CLOSE_NS;
use mesh_common::{FlowKey, SocketRecord, socket_kind};

use crate::context::{Addr, MULTIPATH, Verdict};
use crate::maps::PRESENTED;
use crate::workload;

#[inline(always)]
pub(crate) fn getpeername(ctx: &Addr) -> Verdict {
    let record = match ctx.record() {
        None => accepted(ctx).or_else(|| is_multipath(ctx).then(|| ctx.subflow_record()).flatten()),
        record => record,
    };
    if let Some(record) = record
        && record.kind != socket_kind::PRESENTING
    {
        ctx.rewrite(&record.endpoint);
    }
    // Anything else would fail the call on kernels that heed it.
    Verdict::Pass
}

/// Notes for whom the agent speaks on a socket that an application accepted, where `sockops` could not.
#[inline(always)]
fn accepted(ctx: &Addr) -> Option<SocketRecord> {
    if !workload::presented_late() {
        return None;
    }
    let workload = workload::key(ctx);
    workload::find(workload)?;
    let key = FlowKey {
        workload,
        source: ctx.endpoint(),
        destination: ctx.local(),
    };
    // SAFETY: plain integers, written when the connection is made and when it is closed.
    let flow = unsafe { PRESENTED.get(key) }?;
    // SAFETY: takes nothing.
    let now = unsafe { bpf_ktime_get_ns() };
    // Else a connection of the application with itself, by the same ports, would be taken for it.
    if flow.closed_at != 0 && now.saturating_sub(flow.closed_at) > PRESENTED_AFTER_CLOSE_NS {
        return None;
    }
    let record = SocketRecord {
        workload,
        endpoint: flow.endpoint,
        kind: socket_kind::ACCEPTED,
    };
    // A Multipath TCP socket has no record that its connection would clear, and is looked up each time.
    if !is_multipath(ctx) && ctx.set_record(record) {
        let _ = PRESENTED.remove(key);
    }
    Some(record)
}

/// Multipath TCP: the application's socket is another than the one that connected and carries the record.
#[inline(always)]
fn is_multipath(ctx: &Addr) -> bool {
    ctx.protocol() == MULTIPATH && workload::find(workload::key(ctx)).is_some()
}
