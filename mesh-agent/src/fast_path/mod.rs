//! Which connections the kernel may make without the proxy: those that the proxy would only copy.
//!
//! Pure. Invariant: a way is open to a client only when every workload that it may lead to is on this node, captured,
//! and would let that client in; when it cannot be told, the proxy keeps the connection. What is planned depends on
//! [`Snapshot::near_services`] and the workloads of this node alone, so its cost does not grow with the mesh.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::authz::{self, Verdict};
use crate::model::{Destination, Endpoint, MtlsMode, Place, Service, ServicePort, Snapshot, Workload};

/// Names a captured workload to the kernel.
pub type Key = u64;

/// The workloads that this agent captures at this moment.
pub type Captured = BTreeMap<Key, Arc<Workload>>;

/// Every destination that can be reached without the proxy.
pub type Plan = BTreeMap<SocketAddr, FastPath>;

/// A destination as clients dial it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FastPath {
    /// Where its connections go.
    pub backends: Vec<(Key, SocketAddr)>,
    /// Who may go there.
    pub clients: BTreeSet<Key>,
}

/// One step from a plan to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    Open(Key, SocketAddr, &'a [(Key, SocketAddr)]),
    Close(Key, SocketAddr),
}

/// DNS over TCP is answered by the agent.
const DNS_PORT: u16 = 53;

/// `most` is how many backends a destination may have.
pub fn plan(snapshot: &Snapshot, captured: &Captured, most: usize) -> Plan {
    let netns = captured.iter().filter(|(_, workload)| has_netns(workload));
    let mut planner = Planner {
        snapshot,
        captured,
        by_address: netns
            .flat_map(|(key, workload)| workload.addresses.iter().map(|address| (*address, *key)))
            .collect(),
        most,
        plan: Plan::new(),
    };
    for service in snapshot.near_services.values() {
        for port in &service.ports {
            planner.service(service, port);
            planner.workloads(port);
        }
    }
    // Who dials a workload itself dials each service that has it.
    for service in snapshot
        .near_services
        .values()
        .filter(|service| !service.fast_path)
    {
        for endpoint in service.ports.iter().flat_map(|port| port.endpoints.iter()) {
            planner.plan.remove(&endpoint.address);
        }
    }
    planner.plan
}

/// What leads from `old` to `new`: first what must not be any more.
pub fn changes<'a>(old: &'a Plan, new: &'a Plan) -> impl Iterator<Item = Change<'a>> {
    let nothing = || {
        static NOTHING: BTreeSet<Key> = BTreeSet::new();
        &NOTHING
    };
    let closed = old.iter().flat_map(move |(to, before)| {
        let still = new.get(to).map_or_else(nothing, |path| &path.clients);
        let gone = before.clients.difference(still);
        gone.map(|client| Change::Close(*client, *to))
    });
    let opened = new.iter().flat_map(move |(to, path)| {
        // Who is there already needs to be told only of other backends.
        let before = old.get(to).filter(|before| before.backends == path.backends);
        let told = before.map_or_else(nothing, |before| &before.clients);
        let untold = path.clients.difference(told);
        untold.map(|client| Change::Open(*client, *to, &path.backends))
    });
    closed.chain(opened)
}

struct Planner<'a> {
    snapshot: &'a Snapshot,
    captured: &'a Captured,
    by_address: HashMap<IpAddr, Key>,
    most: usize,
    plan: Plan,
}

impl Planner<'_> {
    /// A service's port at its virtual addresses.
    fn service(&mut self, service: &Arc<Service>, port: &ServicePort) {
        if !service.fast_path || !port.is_plain() || port.endpoints.len() > self.most {
            return;
        }
        let backends: Option<Vec<_>> = port.endpoints.iter().map(|end| self.backend(end)).collect();
        let Some(backends) = backends.filter(|backends| !backends.is_empty()) else {
            return;
        };
        for vip in &service.vips {
            let to = SocketAddr::new(*vip, port.port);
            let is_it = matches!(self.snapshot.destination(to),
                Destination::Service(there, _) if Arc::ptr_eq(&there, service));
            // A socket cannot change its family.
            let one_family = backends.iter().all(|(_, at)| at.is_ipv4() == vip.is_ipv4());
            if is_it && one_family {
                self.add(to, backends.clone());
            }
        }
    }

    /// The workloads behind a port, each at its own address.
    fn workloads(&mut self, port: &ServicePort) {
        for endpoint in port.endpoints.iter() {
            let to = endpoint.address;
            let own = matches!(self.snapshot.destination(to), Destination::Workload(_));
            if let Some(backend) = self.backend(endpoint).filter(|_| own) {
                self.add(to, vec![backend]);
            }
        }
    }

    fn add(&mut self, to: SocketAddr, backends: Vec<(Key, SocketAddr)>) {
        if to.port() == DNS_PORT {
            return;
        }
        let admits = |client: &Workload| {
            backends.iter().all(|(server, at)| {
                self.captured
                    .get(server)
                    .is_some_and(|server| admits(server, at.port(), client))
            })
        };
        let clients: BTreeSet<_> = self
            .captured
            .iter()
            .filter(|(_, client)| client.fast_path && has_netns(client) && admits(client))
            .map(|(key, _)| *key)
            .collect();
        if !clients.is_empty() {
            self.plan.insert(to, FastPath { backends, clients });
        }
    }

    /// The captured workload at an endpoint where the proxy would look into nothing either.
    fn backend(&self, endpoint: &Endpoint) -> Option<(Key, SocketAddr)> {
        let at = endpoint.address;
        let key = self.by_address.get(&at.ip())?;
        let here = self.captured.get(key)?;
        let there = endpoint.workload.as_deref()?;
        let is_it =
            here.name == there.name && here.namespace == there.namespace && here.identity == there.identity;
        let plain = self.snapshot.target_protocol(at).is_opaque();
        (is_it && plain && here.meshed && here.fast_path).then_some((*key, at))
    }
}

/// As the way into a workload decides it. Where mTLS is disabled, clients come without an identity.
fn admits(server: &Workload, port: u16, client: &Workload) -> bool {
    server.mtls.mode(port) != MtlsMode::Disable
        && authz::check(&server.mtls, port, Some(&client.identity)) == Verdict::Allow
}

fn has_netns(workload: &Workload) -> bool {
    matches!(workload.place, Some(Place::Netns(_) | Place::OpenNetns(_)))
}
