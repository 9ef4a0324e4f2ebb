//! The node agent: eBPF capture, one shared proxy, and a page to look inside.
//!
//! A *source* delivers documents ([`discovery`]), the compiler turns them into one immutable snapshot
//! ([`config`] makes a [`model::Snapshot`]), the [`store`] publishes it, and the [`proxy`] reads only that. The
//! kernel side ([`ebpf`]) hands captured connections to the proxy, which knows it only as two small traits
//! ([`sock`]). [`app`] is the only place that knows all parts.
//!
//! Layers, checked by `cargo xtask lint`; a module uses only those below it (and not all of them):
//!
//! | layer | modules |
//! |---|---|
//! | 7 | `main` |
//! | 6 | [`app`], [`cli`] |
//! | 5 | [`admin`], [`doctor`] |
//! | 4 | [`proxy`], [`dns`] |
//! | 3 | [`config`], [`discovery`], [`store`], [`identity`], [`tls`], [`ebpf`] |
//! | 2 | [`route`], [`balance`], [`retry`], [`authz`], [`fast_path`] (pure), [`metrics`] |
//! | 1 | [`model`], [`drain`], [`lanes`], [`log_filter`], [`memory`], [`telemetry`], [`sock`] |
//!
//! Invariants: input from a network or a user is bounded and never panics; enforcement never fails silently;
//! nothing here is global.

pub mod app;
pub mod cli;

pub mod admin;
pub mod doctor;

pub mod dns;
pub mod proxy;

pub mod config;
pub mod discovery;
pub mod ebpf;
pub mod identity;
pub mod store;
pub mod tls;

pub mod authz;
pub mod balance;
pub mod fast_path;
pub mod metrics;
pub mod retry;
pub mod route;

pub mod drain;
pub mod lanes;
pub mod log_filter;
pub mod memory;
pub mod model;
pub mod sock;
pub mod telemetry;
