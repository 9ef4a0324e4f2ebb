//! From what users write to what the data path reads: documents in, one [`crate::model::Snapshot`] out.
//!
//! Text is cut into documents ([`File`]), each is checked on its own and typed by kind, and the [`Compiler`]
//! turns all of them into a snapshot, incrementally. Invariants: one bad document rejects only itself; every
//! finding names file, document and field; input of any size or shape costs bounded memory and never panics.

mod agent;
mod check;
mod claims;
mod compiler;
mod document;
mod endpoint_slice;
mod file;
mod http_filter;
mod http_match;
mod http_policy;
mod http_route;
mod index;
mod kind;
mod peer_authentication;
mod pod;
mod read;
mod reference_grant;
mod report;
mod resource;
mod routes;
mod service;
mod services;
mod strict;
mod validate;
mod vips;
mod workloads;

use std::sync::Arc;

pub use agent::{AccessLogFormat, AgentConfig, InvalidConfig, LogFormat};
pub use compiler::Compiler;
pub use file::{File, Origin, Text};
pub use read::{Listed, is_listed, list, read_text};
pub use validate::{Checked, validate};
pub use vips::Vips;

/// What the compiler has to know of the agent that it compiles for.
#[derive(Clone, Debug)]
pub struct Settings {
    pub node: Arc<str>,
    pub trust_domain: Arc<str>,
    pub cluster_domain: Arc<str>,
}

#[cfg(test)]
pub(crate) mod tests;
