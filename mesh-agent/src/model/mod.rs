//! The compiled view of the mesh: plain data, no serde, no tokio, no I/O.
//!
//! `config` makes it, `store` publishes it, everything else reads it. Invariants: values here are valid by
//! construction (no string that still needs parsing); one [`Snapshot`] never changes after it is published;
//! a part that did not change keeps its `Arc` from one snapshot to the next, so a change costs what it touches.

mod endpoint;
mod identity;
mod route;
mod service;
mod snapshot;
mod target;
mod workload;

pub use endpoint::{Endpoint, InFlight, Load};
pub use identity::{Identity, InvalidIdentity, Names};
pub use route::{
    Backend, HeaderEdit, HeaderEdits, HeaderMatch, MethodMatch, PathMatch, QueryMatch, RequestMatch, RetryOn,
    RetryPolicy, RouteRule, StringMatch, Timeouts,
};
pub use service::{LoadBalancing, Protocol, Service, ServiceKey, ServicePort};
pub use snapshot::{Destination, Rejected, Severity, Snapshot, Source};
pub use target::{Target, TargetUser};
pub use workload::{MtlsMode, MtlsPolicy, OnAgentDown, Place, Workload};
