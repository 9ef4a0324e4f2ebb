//! Reading and writing the fields of a socket address hook, whatever the family.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::{
    BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr, bpf_sock_tuple__bindgen_ty_1,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
};
use aya_ebpf::helpers::{
    bpf_bind, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_lookup_tcp, bpf_sk_release,
    bpf_sk_storage_delete, bpf_sk_storage_get,
};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::{NetAddr, NetEndpoint, NetPort, SocketRecord};

use crate::maps::SOCKETS;

/// What a cgroup hook answers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Refuse,
}

impl From<Verdict> for i32 {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Pass => 1,
            Verdict::Refuse => 0,
        }
    }
}

/// The family of the hook, which is not always that of the address: IPv6 sockets carry IPv4-mapped ones.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// The context of a `cgroup/{connect,sendmsg,recvmsg,getpeername}{4,6}` program.
pub(crate) struct Addr {
    ctx: *mut bpf_sock_addr,
    family: Family,
}

pub(crate) const TCP: u32 = 6;
pub(crate) const UDP: u32 = 17;
pub(crate) const MULTIPATH: u32 = 262;

/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NETNS: u64 = u64::MAX;

/// One field at a time, at its own width: the verifier refuses merged or computed accesses to a context.
macro_rules! read {
    ($place:expr) => {
        // SAFETY: a field of the context that the kernel passed; the verifier checks offset and width.
        unsafe { ptr::read_volatile(&raw const $place) }
    };
}
macro_rules! write {
    ($place:expr, $value:expr) => {
        // SAFETY: as in `read`; the verifier also checks that the hook may change the field.
        unsafe { ptr::write_volatile(&raw mut $place, $value) }
    };
}
pub(crate) use read;

/// Four words of a context, one by one.
macro_rules! read4 {
    ($place:expr) => {
        [
            $crate::context::read!($place[0]),
            $crate::context::read!($place[1]),
            $crate::context::read!($place[2]),
            $crate::context::read!($place[3]),
        ]
    };
}
pub(crate) use read4;

impl Addr {
    #[inline(always)]
    pub(crate) fn new(ctx: &SockAddrContext, family: Family) -> Self {
        Self {
            ctx: ctx.sock_addr,
            family,
        }
    }

    #[inline(always)]
    pub(crate) fn netns(&self) -> u64 {
        // SAFETY: takes the program's context.
        unsafe { bpf_get_netns_cookie(self.ctx.cast()) }
    }

    #[inline(always)]
    pub(crate) fn socket_cookie(&self) -> u64 {
        // SAFETY: takes the program's context.
        unsafe { bpf_get_socket_cookie(self.ctx.cast()) }
    }

    #[inline(always)]
    pub(crate) fn protocol(&self) -> u32 {
        read!((*self.ctx).protocol)
    }

    #[inline(always)]
    pub(crate) fn bound_device(&self) -> u32 {
        read!((*self.sk()).bound_dev_if)
    }

    #[inline(always)]
    pub(crate) fn endpoint(&self) -> NetEndpoint {
        let addr = match self.family {
            Family::V4 => NetAddr::from_v4_word(read!((*self.ctx).user_ip4)),
            Family::V6 => NetAddr::from_v6_words(read4!((*self.ctx).user_ip6)),
        };
        NetEndpoint::new(addr, NetPort::from_net_word(read!((*self.ctx).user_port)))
    }

    /// An IPv4 address stays mapped in an IPv6 hook; an IPv6 one cannot be told in an IPv4 hook.
    #[inline(always)]
    pub(crate) fn rewrite(&self, to: &NetEndpoint) {
        match self.family {
            Family::V4 => {
                if !to.addr.is_v4() {
                    return;
                }
                write!((*self.ctx).user_ip4, to.addr.v4_word());
            }
            Family::V6 => {
                let words = to.addr.words();
                write!((*self.ctx).user_ip6[0], words[0]);
                write!((*self.ctx).user_ip6[1], words[1]);
                write!((*self.ctx).user_ip6[2], words[2]);
                write!((*self.ctx).user_ip6[3], words[3]);
            }
        }
        write!((*self.ctx).user_port, u32::from(to.port.net()));
    }

    /// Gives an unbound socket that is about to connect `own` as its source, and leaves a bound one alone.
    #[inline(always)]
    pub(crate) fn bind(&self, own: &NetAddr) {
        match self.family {
            Family::V4 => {
                let mut source = SockaddrIn {
                    family: AF_INET,
                    port: 0,
                    addr: own.v4_word(),
                    zero: [0; 2],
                };
                // SAFETY: the program's context, and an address of that size.
                unsafe { bpf_bind(self.ctx, (&raw mut source).cast(), 16) };
            }
            Family::V6 => {
                let mut source = SockaddrIn6 {
                    family: AF_INET6,
                    port: 0,
                    flow: 0,
                    addr: own.words(),
                    scope: 0,
                };
                // SAFETY: the program's context, and an address of that size.
                unsafe { bpf_bind(self.ctx, (&raw mut source).cast(), 28) };
            }
        }
    }

    /// What the kernel side knows about this socket.
    #[inline(always)]
    pub(crate) fn record(&self) -> Option<SocketRecord> {
        let record = socket_record(self.sk());
        // SAFETY: not null, and the kernel's storage lives as long as the socket of this context.
        (!record.is_null()).then(|| unsafe { *record })
    }

    /// Where this end of a connection is; for hooks whose [`Addr::endpoint`] is the other end.
    #[inline(always)]
    pub(crate) fn local(&self) -> NetEndpoint {
        let sk = self.sk();
        let (v4, v6) = (read!((*sk).src_ip4), read4!((*sk).src_ip6));
        let addr = match self.family {
            Family::V4 => NetAddr::from_v4_word(v4),
            Family::V6 => NetAddr::from_v6_words(v6),
        };
        NetEndpoint::new(addr, NetPort::from_host_word(read!((*sk).src_port)))
    }

    /// The record of the TCP connection that a Multipath TCP socket runs on.
    #[inline(always)]
    pub(crate) fn subflow_record(&self) -> Option<SocketRecord> {
        let peer = self.endpoint();
        let (sport, dport) = (
            peer.port.net(),
            NetPort::from_host_word(read!((*self.sk()).src_port)).net(),
        );
        let mut tuple: bpf_sock_tuple__bindgen_ty_1 = if peer.addr.is_v4() {
            let (saddr, daddr) = (peer.addr.v4_word(), read!((*self.sk()).src_ip4));
            let ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
                saddr,
                daddr,
                sport,
                dport,
            };
            bpf_sock_tuple__bindgen_ty_1 { ipv4 }
        } else {
            let (saddr, daddr) = (peer.addr.words(), read4!((*self.sk()).src_ip6));
            let ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
                saddr,
                daddr,
                sport,
                dport,
            };
            bpf_sock_tuple__bindgen_ty_1 { ipv6 }
        };
        let size = if peer.addr.is_v4() { 12 } else { 36 };
        // SAFETY: the context and a tuple of that size. What comes back is null or a referenced socket.
        let subflow =
            unsafe { bpf_sk_lookup_tcp(self.ctx.cast(), (&raw mut tuple).cast(), size, CURRENT_NETNS, 0) };
        if subflow.is_null() {
            return None;
        }
        let record = socket_record(subflow);
        // SAFETY: not null, and the reference keeps the socket's storage.
        let record = (!record.is_null()).then(|| unsafe { *record });
        // SAFETY: the reference that the lookup took.
        unsafe { bpf_sk_release(subflow.cast()) };
        record
    }

    /// Sets or overwrites the record; false if the kernel has no memory for it.
    #[inline(always)]
    pub(crate) fn set_record(&self, record: SocketRecord) -> bool {
        set_socket_record(self.sk(), record)
    }

    /// A socket connected anew must not answer with where it wanted to go before.
    #[inline(always)]
    pub(crate) fn forget_record(&self) {
        forget_socket_record(self.sk());
    }

    #[inline(always)]
    fn sk(&self) -> *mut bpf_sock {
        read!((*self.ctx).__bindgen_anon_1.sk)
    }
}

/// The address of a context that holds both families. The caller reads both: reads in branches would be merged
/// into one at a computed offset, which the verifier refuses ("dereference of modified ctx ptr").
#[inline(always)]
pub(crate) fn either(family: u32, v4: u32, v6: [u32; 4]) -> NetAddr {
    if family == u32::from(AF_INET) {
        NetAddr::from_v4_word(v4)
    } else {
        NetAddr::from_v6_words(v6)
    }
}

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// `struct sockaddr_in`.
#[repr(C)]
struct SockaddrIn {
    family: u16,
    port: u16,
    addr: u32,
    zero: [u32; 2],
}

/// `struct sockaddr_in6`.
#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port: u16,
    flow: u32,
    addr: [u32; 4],
    scope: u32,
}

#[inline(always)]
fn sockets() -> *mut c_void {
    (&raw const SOCKETS).cast_mut().cast()
}

/// Null if the socket has none.
#[inline(always)]
pub(crate) fn socket_record(sk: *mut bpf_sock) -> *mut SocketRecord {
    // SAFETY: the map, and a socket that the verifier knows to be one.
    unsafe { bpf_sk_storage_get(sockets(), sk.cast(), ptr::null_mut(), 0).cast() }
}

#[inline(always)]
pub(crate) fn forget_socket_record(sk: *mut bpf_sock) {
    // SAFETY: the map, and a socket that the verifier knows to be one.
    unsafe { bpf_sk_storage_delete(sockets(), sk.cast()) };
}

#[inline(always)]
pub(crate) fn set_socket_record(sk: *mut bpf_sock, mut record: SocketRecord) -> bool {
    // SAFETY: as above; the helper copies `record` if it creates the storage.
    let stored: *mut SocketRecord = unsafe {
        bpf_sk_storage_get(
            sockets(),
            sk.cast(),
            (&raw mut record).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
        .cast()
    };
    if stored.is_null() {
        return false;
    }
    // SAFETY: not null; it may be older than this call, so it is written in any case.
    unsafe { *stored = record };
    true
}
