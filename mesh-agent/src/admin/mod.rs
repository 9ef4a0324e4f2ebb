//! The page to look inside: JSON, metrics and a page for people, on an address of its own.
//!
//! Invariants: it reads, and changes nothing but the log's filter; it never shows a private key; it runs on a
//! runtime of its own, so it answers when the data path is busy; it knows neither the proxy nor the kernel side,
//! only what [`AdminSources`] gives. Its clients are hostile: everything they may send or hold is bounded.

pub mod api;
mod body;
mod html;
mod pages;
mod pulse;
mod readiness;
mod request;
mod server;
#[cfg(test)]
mod tests;
mod view;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::identity::Identities;
use crate::metrics::Metrics;
use crate::store::Store;
use crate::telemetry::LogHandle;

pub use self::pulse::Pulse;
pub use self::readiness::Readiness;
pub use self::view::{Enrolment, Enrolments, FastPaths, time};

/// Asks a part of the agent that the admin page does not know.
pub type Ask<T> = Box<dyn Fn() -> T + Send + Sync>;

/// What the admin page shows, given by whoever wires the agent together.
pub struct AdminSources {
    pub node: String,
    pub started: SystemTime,
    /// The agent's own configuration in force, as it is shown.
    pub config: serde_json::Value,
    pub store: Store,
    pub registry: Registry,
    pub metrics: Metrics,
    pub identities: Identities,
    pub log: LogHandle,
    pub readiness: Readiness,
    /// The data path's.
    pub pulse: Pulse,
    /// How far the capture of each local workload is.
    pub enrolments: Ask<Enrolments>,
    pub connections: Ask<Vec<api::Connection>>,
    /// Walks the kernel's maps: for who wants to see them.
    pub ebpf: Ask<api::Ebpf>,
    pub fast_paths: Ask<FastPaths>,
    pub kernel_tls: bool,
    /// What newer kernels have, and whether this one does.
    pub features: Vec<api::Feature>,
}

impl fmt::Debug for AdminSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminSources")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// Which of the pages an address serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All pages, for this machine's own users.
    Admin,
    /// `/metrics`, `/healthz` and `/readyz`, for whoever can reach it.
    Metrics,
}

/// Listens on one of the two addresses.
pub async fn bind(address: SocketAddr, scope: Scope) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address).await?;
    if scope == Scope::Admin && !address.ip().is_loopback() {
        tracing::warn!(%address, "the admin page is not on loopback: who reaches it sees the whole mesh and can change the log's level");
    }
    Ok(listener)
}

/// Serves until dropped, and its connections with it.
pub async fn serve(listener: TcpListener, scope: Scope, sources: Arc<AdminSources>) {
    server::serve(listener, pages::Site { scope, sources }).await;
}
