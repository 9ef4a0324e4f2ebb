//! Is this socket enrolled, is its agent alive, and what if not.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::Global;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_set_retval, bpf_sk_release,
};
use aya_ebpf::programs::SockOpsContext;
use core::ffi::c_void;
use mesh_common::maps::HEARTBEAT_LIMIT_NS;
use mesh_common::{Counter, ListenerKey, Serves, WorkloadEntry, listener_kind, workload_flags};

use crate::context::{Addr, Verdict};
use crate::maps::{LISTENERS, OWN, SETTINGS, WORKLOADS, count};

/// 1 where the kernel has `bpf_set_retval` (5.18); else a refused connection is led to where nobody listens, and a
/// refused DNS query fails with EPERM. A constant for the verifier, which drops the call where it is 0.
#[unsafe(no_mangle)]
static CAN_SET_ERRNO: Global<u32> = Global::new(0);

/// 1 where the kernel tells `sockops` programs the namespace of their socket (5.15). A constant, as above.
#[unsafe(no_mangle)]
static NETNS_IN_SOCKOPS: Global<u32> = Global::new(0);

/// 1 where the kernel does not tell processes the cookie of their namespace (it does since 5.14), so that the agent
/// asks here. A constant, as above.
#[unsafe(no_mangle)]
static TELLS_NETNS: Global<u32> = Global::new(0);

/// Whom this copy of the programs serves: one workload, if it is that one's own `sk_lookup` program, which may not
/// ask for its namespace's cookie, or at that one's cgroup. The agent writes it after loading, when constants are
/// frozen. Nothing else may be in its section: the agent takes the map for this alone.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data")]
static SERVES: Global<Serves> = Global::new(Serves::ANYONE);

/// Bears no workload.
const NOBODY: u64 = 0;

const ECONNREFUSED: i32 = 111;

/// The key under which this socket's workload would be enrolled.
#[inline(always)]
pub(crate) fn key(ctx: &Addr) -> u64 {
    let netns = ctx.netns();
    let serves = SERVES.load();
    match serves.workload {
        0 => netns,
        own if netns == serves.host => own,
        _ => NOBODY,
    }
}

/// The namespace of the socket; none where the kernel does not tell, and [`presented_late`] holds.
#[inline(always)]
pub(crate) fn netns_in_sockops(ctx: &SockOpsContext) -> Option<u64> {
    if NETNS_IN_SOCKOPS.load() == 0 {
        return None;
    }
    // SAFETY: takes the program's context.
    Some(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) })
}

/// `sockops` cannot say whose an accepted socket is: `getpeername` finds out when it is asked.
#[inline(always)]
pub(crate) fn presented_late() -> bool {
    NETNS_IN_SOCKOPS.load() == 0
}

/// Whether this is a socket of the agent that connects to learn its namespace: then it is told.
#[inline(always)]
pub(crate) fn tell_netns(ctx: &Addr) -> bool {
    if TELLS_NETNS.load() == 0 {
        return false;
    }
    let Some(own) = OWN.get_ptr_mut(ctx.socket_cookie()) else {
        return false;
    };
    // SAFETY: the kernel's pointer to the value. Only the agent makes such an entry, and waits for this.
    unsafe {
        let asks = (*own).workload == NOBODY;
        if asks {
            (*own).workload = ctx.netns();
        }
        asks
    }
}

/// The workload of this copy.
#[inline(always)]
pub(crate) fn own_key() -> u64 {
    SERVES.load().workload
}

#[inline(always)]
pub(crate) fn find(key: u64) -> Option<&'static WorkloadEntry> {
    // SAFETY: plain integers. The agent replaces entries as a whole; the kernel does not use a freed one again
    // within the microseconds that a program runs.
    unsafe { WORKLOADS.get(key) }
}

impl Hold for WorkloadEntry {
    #[inline(always)]
    fn holds(&self) -> bool {
        self.flags & workload_flags::HOLD != 0
    }
}

/// The workload's choice for when there is no agent.
pub(crate) trait Hold {
    fn holds(&self) -> bool;
}

/// The agent that does not answer for itself any more, answered for outgoing traffic.
#[inline(always)]
pub(crate) fn without_agent(workload: &WorkloadEntry) -> Verdict {
    let verdict = if workload.holds() {
        Verdict::Refuse
    } else {
        Verdict::Pass
    };
    count(match verdict {
        Verdict::Refuse => Counter::HeldOutbound,
        Verdict::Pass => Counter::PassedOpenOutbound,
    });
    verdict
}

#[inline(always)]
pub(crate) fn can_set_errno() -> bool {
    CAN_SET_ERRNO.load() == 1
}

/// The system call fails, with ECONNREFUSED where the kernel lets us say so.
#[inline(always)]
pub(crate) fn refuse() -> Verdict {
    if can_set_errno() {
        // SAFETY: takes a plain number.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    Verdict::Refuse
}

/// The agent listens and gives signs of life.
#[inline(always)]
pub(crate) fn alive(key: u64) -> bool {
    heartbeat_fresh() && listener(key, listener_kind::OUTBOUND, |_| ()).is_some()
}

#[inline(always)]
pub(crate) fn heartbeat_fresh() -> bool {
    let Some(settings) = SETTINGS.get(0) else {
        return false;
    };
    // SAFETY: takes nothing.
    let now = unsafe { bpf_ktime_get_ns() };
    // Another CPU's clock may be a little behind the one that wrote the heartbeat.
    now.saturating_sub(settings.heartbeat) < HEARTBEAT_LIMIT_NS
}

/// Lends the agent's listener to `with`, if there is one.
#[inline(always)]
pub(crate) fn listener<R>(key: u64, kind: u32, with: impl FnOnce(*mut bpf_sock) -> R) -> Option<R> {
    let key = ListenerKey {
        workload: key,
        kind,
        reserved: 0,
    };
    let map: *const c_void = (&raw const LISTENERS).cast();
    // SAFETY: the map and a key of its type. What comes back is null or a referenced socket, released below.
    let sk: *mut bpf_sock = unsafe { bpf_map_lookup_elem(map.cast_mut(), (&raw const key).cast()) }.cast();
    if sk.is_null() {
        return None;
    }
    let result = with(sk);
    // SAFETY: the reference taken above.
    unsafe { bpf_sk_release(sk.cast()) };
    Some(result)
}
