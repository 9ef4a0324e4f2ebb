//! The kernel side with its keeper, and a tiny agent in the test itself: every promise of the capture.
//!
//! Needs root, cgroup2 and eBPF; fails, rather than skips, where these are missing.

mod dns;
mod inbound;
mod life;
mod odd;
mod outbound;
mod world;
