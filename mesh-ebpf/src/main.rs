//! The entry points: one per hook, each handing over to the module of its family.
//!
//! Invariants: a socket outside the enrolled workloads leaves every program at its first check, unchanged. What
//! cannot be captured either passes or is refused, and is counted; nothing is left hanging.
#![no_std]
#![no_main]
// As `aya-ebpf` itself: for what Rust does not offer on this target.
#![feature(asm_experimental_arch)]

mod connect;
mod context;
mod dns;
mod fast;
mod lookup;
mod maps;
mod peername;
mod sockops;
mod workload;

use aya_ebpf::macros::{cgroup_sock_addr, sk_lookup, sock_ops};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext};

use context::{Addr, Family};

// A function must not bear its section's name, hence the `mesh_`.

#[cgroup_sock_addr(connect4)]
fn mesh_connect4(ctx: SockAddrContext) -> i32 {
    connect::connect(&Addr::new(&ctx, Family::V4)).into()
}

#[cgroup_sock_addr(connect6)]
fn mesh_connect6(ctx: SockAddrContext) -> i32 {
    connect::connect(&Addr::new(&ctx, Family::V6)).into()
}

#[cgroup_sock_addr(sendmsg4)]
fn mesh_sendmsg4(ctx: SockAddrContext) -> i32 {
    dns::sendmsg(&Addr::new(&ctx, Family::V4)).into()
}

#[cgroup_sock_addr(sendmsg6)]
fn mesh_sendmsg6(ctx: SockAddrContext) -> i32 {
    dns::sendmsg(&Addr::new(&ctx, Family::V6)).into()
}

#[cgroup_sock_addr(recvmsg4)]
fn mesh_recvmsg4(ctx: SockAddrContext) -> i32 {
    dns::recvmsg(&Addr::new(&ctx, Family::V4)).into()
}

#[cgroup_sock_addr(recvmsg6)]
fn mesh_recvmsg6(ctx: SockAddrContext) -> i32 {
    dns::recvmsg(&Addr::new(&ctx, Family::V6)).into()
}

#[cgroup_sock_addr(getpeername4)]
fn mesh_peername4(ctx: SockAddrContext) -> i32 {
    peername::getpeername(&Addr::new(&ctx, Family::V4)).into()
}

#[cgroup_sock_addr(getpeername6)]
fn mesh_peername6(ctx: SockAddrContext) -> i32 {
    peername::getpeername(&Addr::new(&ctx, Family::V6)).into()
}

#[sock_ops]
fn mesh_sockops(ctx: SockOpsContext) -> u32 {
    sockops::sockops(&ctx);
    1
}

#[sk_lookup]
fn mesh_lookup(ctx: SkLookupContext) -> u32 {
    lookup::lookup(&ctx)
}

/// Reachable panics fail verification rather than run: the loop has no end.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel gives socket helpers to programs under a GPL-compatible licence only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
