//! DNS over UDP: datagrams of enrolled workloads to port 53 go to the agent's resolver inside the workload.
//!
//! The agent must know which server was asked, and the application must see answers come from there. So each
//! server gets a *slot* of its workload: a loopback address (IPv4) or a port on `::1` (IPv6), at which the
//! agent's socket receives the query and from which it answers; `recvmsg` maps it back.
//! DNS over TCP is TCP, and captured as such. A resolver on the workload's own loopback is left alone.

use mesh_common::maps::{DNS_V4_NET, DNS_V4_PROBES, DNS_V4_SLOTS, DNS_V6_SLOT_BASE, DNS_V6_SLOTS};
use mesh_common::{Counter, DnsKey, NetAddr, NetEndpoint, NetPort, SocketRecord, WorkloadEntry, socket_kind};

use aya_ebpf::bindings::BPF_NOEXIST;

use crate::connect::{is_local, pass};
use crate::context::{Addr, Verdict};
use crate::maps::{DNS_SERVERS, OWN, count};
use crate::workload;

const DNS: NetPort = NetPort::from_host(53);

/// A connected UDP socket; its datagrams meet no other hook on their way out.
#[inline(always)]
pub(crate) fn connect(ctx: &Addr, key: u64, entry: &WorkloadEntry) -> Verdict {
    let server = ctx.endpoint();
    if server.port != DNS || is_local(&server.addr, entry) {
        ctx.forget_record();
        return Verdict::Pass;
    }
    capture(ctx, key, entry, &server, true)
}

/// A datagram with an address.
#[inline(always)]
pub(crate) fn sendmsg(ctx: &Addr) -> Verdict {
    let server = ctx.endpoint();
    if server.port != DNS {
        return Verdict::Pass;
    }
    let key = workload::key(ctx);
    let Some(entry) = workload::find(key) else {
        return Verdict::Pass;
    };
    if is_local(&server.addr, entry) || OWN.get_ptr(ctx.socket_cookie()).is_some() {
        return Verdict::Pass;
    }
    capture(ctx, key, entry, &server, false)
}

/// An answer: from the slot's server, as far as the application can see.
#[inline(always)]
pub(crate) fn recvmsg(ctx: &Addr) -> Verdict {
    let from = ctx.endpoint();
    if from.addr.is_loopback() {
        let key = workload::key(ctx);
        if let Some(entry) = workload::find(key)
            && let Some(slot) = slot_of(&from, entry)
        {
            let slot = DnsKey {
                workload: key,
                slot,
                reserved: 0,
            };
            // SAFETY: an entry is written once and removed with its workload.
            if let Some(server) = unsafe { DNS_SERVERS.get(slot) } {
                ctx.rewrite(server);
            }
        }
    }
    Verdict::Pass
}

#[inline(always)]
fn capture(ctx: &Addr, key: u64, entry: &WorkloadEntry, server: &NetEndpoint, connected: bool) -> Verdict {
    if ctx.bound_device() != 0 {
        count(Counter::PassedBoundDevice);
        return Verdict::Pass;
    }
    if !workload::alive(key) {
        if connected {
            ctx.forget_record();
        }
        return match workload::without_agent(entry) {
            Verdict::Refuse => workload::refuse(),
            Verdict::Pass => Verdict::Pass,
        };
    }
    let Some(slot) = find_slot(key, server, entry) else {
        if connected {
            return pass(ctx, Counter::PassedDnsSlotsFull);
        }
        count(Counter::PassedDnsSlotsFull);
        return Verdict::Pass;
    };
    if connected {
        let record = SocketRecord {
            workload: key,
            endpoint: *server,
            kind: socket_kind::REDIRECTED,
        };
        if !ctx.set_record(record) {
            count(Counter::RefusedNoStorage);
            return workload::refuse();
        }
        // Else it would be given a loopback address as its source, and keep it for wherever it goes next.
        let own = if server.addr.is_v4() { &entry.v4 } else { &entry.v6 };
        if !own.is_none() {
            ctx.bind(own);
        }
    }
    ctx.rewrite(&slot);
    count(Counter::CapturedDns);
    Verdict::Pass
}

/// Where the agent receives queries for `server`.
#[inline(always)]
fn find_slot(key: u64, server: &NetEndpoint, entry: &WorkloadEntry) -> Option<NetEndpoint> {
    if server.addr.is_v4() {
        if entry.dns_v4_port.is_none() {
            return None;
        }
        let first = hash(&server.addr);
        for probe in 0..DNS_V4_PROBES {
            let slot = (first + probe) % DNS_V4_SLOTS;
            if claim(key, slot, server) {
                let addr = NetAddr::from_v4_word((DNS_V4_NET + 1 + slot).to_be());
                return Some(NetEndpoint::new(addr, entry.dns_v4_port));
            }
        }
    } else {
        for slot in 0..DNS_V6_SLOTS {
            let port = entry.dns_v6_ports[slot as usize];
            if !port.is_none() && claim(key, DNS_V6_SLOT_BASE + slot, server) {
                return Some(NetEndpoint::new(LOOPBACK_V6, port));
            }
        }
    }
    None
}

const LOOPBACK_V6: NetAddr = NetAddr::from_v6_words([0, 0, 0, 1_u32.to_be()]);

/// True if the slot is this server's, now or already.
#[inline(always)]
fn claim(key: u64, slot: u32, server: &NetEndpoint) -> bool {
    let slot = DnsKey {
        workload: key,
        slot,
        reserved: 0,
    };
    // A lookup first: nearly every query is for a server known already, and an insert takes a lock.
    holds(&slot, server) || {
        // Two CPUs may claim one slot at once; one of them wins, and both look who it was.
        let _ = DNS_SERVERS.insert(slot, server, u64::from(BPF_NOEXIST));
        holds(&slot, server)
    }
}

#[inline(always)]
fn holds(slot: &DnsKey, server: &NetEndpoint) -> bool {
    // SAFETY: an entry is written once and removed with its workload.
    unsafe { DNS_SERVERS.get(slot) }.is_some_and(|held| held.addr.same(&server.addr))
}

/// The slot whose address this is.
#[inline(always)]
fn slot_of(from: &NetEndpoint, entry: &WorkloadEntry) -> Option<u32> {
    if from.addr.is_v4() {
        let slot = u32::from_be(from.addr.v4_word()).wrapping_sub(DNS_V4_NET + 1);
        return (from.port == entry.dns_v4_port && slot < DNS_V4_SLOTS).then_some(slot);
    }
    for slot in 0..DNS_V6_SLOTS {
        if from.port == entry.dns_v6_ports[slot as usize] {
            return Some(DNS_V6_SLOT_BASE + slot);
        }
    }
    None
}

/// Spreads servers over the slots; they differ mostly in the last bytes.
#[inline(always)]
fn hash(addr: &NetAddr) -> u32 {
    let words = addr.words();
    (words[0] ^ words[1] ^ words[2] ^ words[3]).wrapping_mul(0x9e37_79b1) >> 16
}
