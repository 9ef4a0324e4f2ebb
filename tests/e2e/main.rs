//! End-to-end tests: real kernel, real network namespaces, two agents, real peers.
//!
//! Each test has a mesh of its own, so they run in parallel and may kill what they like.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking, in its helpers too"
)]

mod cancel;
mod common;
mod counted;
mod deploy;
mod dns;
mod fast;
mod fixture;
mod grpc;
mod http;
// Another processor has other instructions, and other counts.
#[cfg(target_arch = "x86_64")]
mod instructions;
mod life;
mod mtls;
mod pods;
mod retries;
mod routes;
mod seeing;
mod tcp;
