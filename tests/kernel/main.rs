//! The kernel side with its keeper, and a tiny agent in the test itself: every promise of the capture.
//!
//! Needs root, cgroup2 and eBPF; fails, rather than skips, where these are missing.
#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what fails in a helper fails the test"
)]

mod cgroup;
mod dns;
mod doctor;
mod encrypt;
mod fast;
mod foreign;
mod inbound;
mod lacking;
mod life;
mod node;
mod odd;
mod outbound;
mod smoke;
mod verifier;
mod world;
