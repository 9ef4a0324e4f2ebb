//! `cgroup/getpeername4` and `6`: an application sees the peer that it asked for, and in `accept()` the real
//! client, though the connection is with the agent.

use mesh_common::{FlowKey, SocketRecord, flow_kind, socket_kind};

use crate::context::{Addr, MULTIPATH, Verdict};
use crate::maps::FLOWS;
use crate::workload;

#[inline(always)]
pub(crate) fn getpeername(ctx: &Addr) -> Verdict {
    let record = match ctx.record() {
        None if workload::presented_late() => accepted(ctx),
        None if is_multipath(ctx) => ctx.subflow_record(),
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
    let workload = workload::key(ctx);
    workload::find(workload)?;
    let key = FlowKey {
        workload,
        source: ctx.endpoint(),
        destination: ctx.local(),
    };
    // SAFETY: written once before the connection is accepted, and removed here or when it closes.
    let flow = unsafe { FLOWS.get(key) }?;
    if flow.kind != flow_kind::INBOUND {
        return None;
    }
    let record = SocketRecord {
        workload,
        endpoint: flow.endpoint,
        kind: socket_kind::ACCEPTED,
    };
    // A Multipath TCP socket is asked again and again, and so the flow stays until its connection closes.
    if !is_multipath(ctx) && ctx.set_record(record) {
        let _ = FLOWS.remove(key);
    }
    Some(record)
}

/// Multipath TCP: the application's socket is another than the one that connected and carries the record.
#[inline(always)]
fn is_multipath(ctx: &Addr) -> bool {
    ctx.protocol() == MULTIPATH && workload::find(workload::key(ctx)).is_some()
}
