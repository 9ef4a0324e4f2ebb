//! `cgroup/getpeername4` and `6`: an application sees the peer that it asked for, and in `accept()` the real
//! client, though the connection is with the agent.

use mesh_common::socket_kind;

use crate::context::{Addr, Verdict};

#[inline(always)]
pub(crate) fn getpeername(ctx: &Addr) -> Verdict {
    if let Some(record) = ctx.record()
        && record.kind != socket_kind::PRESENTING
    {
        ctx.rewrite(&record.endpoint);
    }
    // Anything else would fail the call, even on kernels where the result is ignored elsewhere.
    Verdict::Pass
}
