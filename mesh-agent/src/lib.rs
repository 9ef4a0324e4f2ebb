//! The node agent: eBPF capture, one shared proxy, and a page to look inside.

pub mod admin;
pub mod app;
pub mod authz;
pub mod balance;
pub mod cli;
pub mod config;
pub mod discovery;
pub mod dns;
pub mod drain;
pub mod ebpf;
pub mod identity;
pub mod metrics;
pub mod model;
pub mod proxy;
pub mod retry;
pub mod route;
pub mod sock;
pub mod store;
pub mod telemetry;
pub mod tls;
