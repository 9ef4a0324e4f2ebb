//! `cgroup/getpeername4` and `6`: an application sees the peer that it asked for, and in `accept()` the real
//! client, though the connection is with the agent.

use mesh_common::socket_kind;

use crate::context::{Addr, MULTIPATH, Verdict};
use crate::workload;

#[inline(always)]
pub(crate) fn getpeername(ctx: &Addr) -> Verdict {
    let record = match ctx.record() {
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

/// Multipath TCP: the application's socket is another than the one that connected and carries the record.
#[inline(always)]
fn is_multipath(ctx: &Addr) -> bool {
    ctx.protocol() == MULTIPATH && workload::find(workload::key(ctx)).is_some()
}
