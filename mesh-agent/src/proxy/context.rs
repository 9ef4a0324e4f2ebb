//! Who the proxy works for: one [`Local`] per enrolled workload, and the list of open connections.
//!
//! Every connection and task carries its workload's context, where what it uses is accounted.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use super::app_pool::AppPool;
use super::tcp::Moved;
use crate::dns::Resolver;
use crate::drain::DrainWatcher;
use crate::lanes::{Lanes, PerLane};
use crate::model::Workload;
use crate::sock::Namespace;

/// One workload of this node, for as long as it is enrolled.
#[derive(Debug)]
pub struct Local {
    /// `namespace/name`
    pub uid: Arc<str>,
    /// Tells this enrolment from all others of this process, also of the same workload.
    pub(super) enrolment: u64,
    /// Its connections to applications.
    pub(super) apps: PerLane<AppPool>,
    pub namespace: Arc<dyn Namespace>,
    /// Answers its DNS over TCP.
    pub resolver: Resolver,
    workload: ArcSwap<Workload>,
    pub usage: Usage,
    released: watch::Sender<bool>,
}

/// What a workload uses of the shared proxy.
#[derive(Debug, Default)]
pub struct Usage {
    pub connections: AtomicU64,
    pub requests: AtomicU64,
    pub bytes: AtomicU64,
}

impl Local {
    pub fn new(
        workload: Arc<Workload>,
        namespace: Arc<dyn Namespace>,
        resolver: Resolver,
        lanes: &Lanes,
    ) -> Arc<Self> {
        static ENROLMENTS: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            uid: workload.uid().into(),
            enrolment: ENROLMENTS.fetch_add(1, Ordering::Relaxed),
            apps: lanes.each(AppPool::default),
            namespace,
            resolver,
            workload: ArcSwap::new(workload),
            usage: Usage::default(),
            released: watch::Sender::new(false),
        })
    }

    /// What its documents say at this moment.
    pub fn workload(&self) -> Arc<Workload> {
        self.workload.load_full()
    }

    /// The same for a look that ends before the next await: it touches no count that all lanes share.
    pub(super) fn glance(&self) -> Guard<Arc<Workload>> {
        self.workload.load()
    }

    pub fn update(&self, workload: Arc<Workload>) {
        self.workload.store(workload);
    }

    /// Ends all that is done on its behalf: sockets of ours would keep a deleted network namespace alive.
    pub fn release(&self) {
        self.released.send_replace(true);
        self.apps.iter().for_each(AppPool::close);
    }

    pub(super) fn is_released(&self) -> bool {
        *self.released.borrow()
    }

    pub async fn released(&self) {
        let mut released = self.released.subscribe();
        // The sender lives as long as `self`.
        let _ = released.wait_for(|released| *released).await;
    }
}

/// Returns when `dest` is released; never where there is none.
pub(super) async fn released(dest: Option<&Arc<Local>>) {
    match dest {
        Some(dest) => dest.released().await,
        None => std::future::pending().await,
    }
}

/// The enrolled workloads.
#[derive(Debug, Default)]
pub struct Locals(ArcSwap<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Those that have a network namespace, and so addresses, of their own.
    by_address: HashMap<IpAddr, Arc<Local>>,
    all: Vec<Arc<Local>>,
}

impl Locals {
    pub fn get(&self, address: IpAddr) -> Option<Arc<Local>> {
        self.0.load().by_address.get(&address).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Local>> {
        self.0.load().all.clone()
    }

    pub fn replace(&self, by_address: HashMap<IpAddr, Arc<Local>>, all: Vec<Arc<Local>>) {
        self.0.store(Arc::new(Known { by_address, all }));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Outbound,
    Inbound,
}

/// An open connection, for the admin page.
#[derive(Debug)]
pub struct Connection {
    pub direction: Direction,
    pub workload: Arc<str>,
    pub peer: SocketAddr,
    pub destination: SocketAddr,
    pub since: SystemTime,
    /// Known after detection.
    pub protocol: OnceLock<&'static str>,
    pub peer_identity: OnceLock<String>,
    pub(super) moved: Moved,
}

impl Connection {
    /// Bytes from the client and to the client, for opaque connections.
    pub fn moved(&self) -> (u64, u64) {
        (
            self.moved.sent.load(Ordering::Relaxed),
            self.moved.received.load(Ordering::Relaxed),
        )
    }
}

/// All open connections.
#[derive(Clone, Debug, Default)]
pub struct Connections(Arc<Registry>);

#[derive(Debug, Default)]
struct Registry {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Connection>>>,
}

/// Keeps a connection listed.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) connection: Arc<Connection>,
    id: u64,
    registry: Arc<Registry>,
    local: Arc<Local>,
}

/// What everything that goes on over one connection shares: it is listed, and waited for, until the last has ended.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) listed: Listed,
    pub(super) drain: DrainWatcher,
}

impl Life {
    pub(super) fn connection(&self) -> &Connection {
        &self.listed.connection
    }

    pub(super) fn speaks(&self, protocol: &'static str) {
        let _ = self.listed.connection.protocol.set(protocol);
    }

    /// Returns when whatever goes on must be cut: the workload was released, or the drain's deadline has passed.
    pub(super) async fn cut(&self) {
        let mut drain = self.drain.clone();
        tokio::select! {
            () = self.listed.local.released() => {}
            () = drain.closing() => {}
        }
    }
}

impl Connections {
    pub(super) fn open(
        &self,
        direction: Direction,
        local: &Arc<Local>,
        peer: SocketAddr,
        destination: SocketAddr,
    ) -> Listed {
        let connection = Arc::new(Connection {
            direction,
            workload: Arc::clone(&local.uid),
            peer,
            destination,
            since: SystemTime::now(),
            protocol: OnceLock::new(),
            peer_identity: OnceLock::new(),
            moved: Moved::default(),
        });
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        self.0.lock().insert(id, Arc::clone(&connection));
        local.usage.connections.fetch_add(1, Ordering::Relaxed);
        Listed {
            connection,
            id,
            registry: Arc::clone(&self.0),
            local: Arc::clone(local),
        }
    }

    pub fn list(&self) -> Vec<Arc<Connection>> {
        self.0.lock().values().cloned().collect()
    }

    pub fn count(&self) -> usize {
        self.0.lock().len()
    }
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.id);
        self.local.usage.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
