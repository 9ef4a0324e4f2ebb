//! Services with their endpoints and routes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::Settings;
use super::endpoint_slice::EndpointSlice;
use super::index::Index;
use super::pod::Pod;
use super::resource::selects;
use super::routes;
use super::service::{Service, ServiceAddresses, ServicePort, TargetPort};
use crate::model::{self, Endpoint, Load, RouteRule, ServiceKey, Snapshot, Target, TargetUser, Workload};

/// Endpoints of one port. A hostile slice could list millions.
const MAX_ENDPOINTS: usize = 100_000;

/// What a service compiles from.
pub(super) struct Inputs<'a> {
    pub(super) index: &'a Index,
    pub(super) settings: &'a Settings,
    /// Its workloads are current; its services are those of before.
    pub(super) snapshot: &'a Snapshot,
}

impl Inputs<'_> {
    /// Parts that are as before stay the same object, and an address keeps its load.
    pub(super) fn compile(&self, key: &ServiceKey, service: &Service, vips: Vec<IpAddr>) -> model::Service {
        let old = self.snapshot.services.get(key);
        let ports = service.ports.iter().map(|port| {
            let old = old.and_then(|old| old.port(port.port));
            let rules = routes::compile(self.index, key, port);
            let old_consumers = |namespace: &Arc<str>| old.and_then(|old| old.consumer_routes.get(namespace));
            model::ServicePort {
                port: port.port,
                name: port.name.clone(),
                protocol: port.protocol,
                balancing: port.balancing,
                endpoints: self.endpoints(key, service, port, old),
                routes: reuse(rules.producer, old.map(|old| &old.routes)),
                consumer_routes: rules
                    .consumers
                    .into_iter()
                    .map(|(namespace, rules)| {
                        let rules = reuse(rules, old_consumers(&namespace));
                        (namespace, rules)
                    })
                    .collect(),
            }
        });
        model::Service {
            key: key.clone(),
            header: key.to_header(),
            hostname: format!(
                "{}.{}.svc.{}",
                key.name, key.namespace, self.settings.cluster_domain
            )
            .into(),
            vips,
            fast_path: service.fast_path,
            headless: service.addresses == ServiceAddresses::Headless,
            ports: ports.collect(),
        }
    }

    fn endpoints(
        &self,
        key: &ServiceKey,
        service: &Service,
        port: &ServicePort,
        old: Option<&model::ServicePort>,
    ) -> Arc<[Endpoint]> {
        let slices: Vec<_> = self.index.slices_of(key).collect();
        let mut found = match slices.is_empty() {
            true => self.selected(key, service, port),
            false => self.sliced(key, service, port, &slices),
        };
        if let Some(old) = old {
            for endpoint in old.endpoints.iter() {
                if let Some((_, load)) = found.get_mut(&endpoint.address) {
                    *load = Arc::clone(&endpoint.load);
                }
            }
        }
        let endpoints: Vec<_> = found
            .into_iter()
            .map(|(address, (workload, load))| Endpoint {
                address,
                workload,
                load,
            })
            .collect();
        match old.filter(|old| *old.endpoints == *endpoints) {
            Some(old) => Arc::clone(&old.endpoints),
            None => endpoints.into(),
        }
    }

    /// The pods that the service's selector means.
    fn selected(&self, key: &ServiceKey, service: &Service, port: &ServicePort) -> Found {
        let mut found = Found::new();
        if service.selector.is_empty() {
            return found;
        }
        for (pod_key, pod) in self.index.pods(Some(&key.namespace)) {
            if !selects(&service.selector, &pod.labels) || !(pod.ready || service.publish_not_ready) {
                continue;
            }
            let uid = format!("{}/{}", pod_key.namespace, pod_key.name);
            let Some(workload) = self.snapshot.workloads.get(uid.as_str()) else {
                continue;
            };
            let family = service.prefers_ipv6.unwrap_or_default();
            let preferred = workload
                .addresses
                .iter()
                .find(|address| address.is_ipv6() == family);
            if let (Some(address), Some(port)) = (
                preferred.or_else(|| workload.addresses.first()),
                target(port, pod),
            ) {
                add(
                    &mut found,
                    SocketAddr::new(*address, port),
                    Some(Arc::clone(workload)),
                );
            }
        }
        found
    }

    /// What the service's slices list: those that are ready, or if none is, those that still serve.
    fn sliced(
        &self,
        key: &ServiceKey,
        service: &Service,
        port: &ServicePort,
        slices: &[&EndpointSlice],
    ) -> Found {
        let prefers_ipv6 = service.prefers_ipv6.unwrap_or_default();
        for (ipv6, ready) in [
            (prefers_ipv6, true),
            (!prefers_ipv6, true),
            (prefers_ipv6, false),
            (!prefers_ipv6, false),
        ] {
            let mut found = Found::new();
            for slice in slices.iter().filter(|slice| slice.ipv6 == ipv6) {
                let Some(target) = slice.ports.get(port.name.as_deref().unwrap_or_default()) else {
                    continue;
                };
                for endpoint in &slice.endpoints {
                    let usable = match ready {
                        true => endpoint.ready || service.publish_not_ready,
                        false => endpoint.serving,
                    };
                    if usable {
                        let workload = self.workload_of(key, endpoint.pod.as_deref(), endpoint.address);
                        add(&mut found, SocketAddr::new(endpoint.address, *target), workload);
                    }
                }
            }
            if !found.is_empty() {
                return found;
            }
        }
        Found::new()
    }

    /// By address; pods of the host's network share theirs and are found by name.
    fn workload_of(&self, key: &ServiceKey, pod: Option<&str>, address: IpAddr) -> Option<Arc<Workload>> {
        let named = || {
            let workload = self
                .snapshot
                .workloads
                .get(format!("{}/{}", key.namespace, pod?).as_str())?;
            workload.addresses.contains(&address).then_some(workload)
        };
        self.snapshot
            .workloads_by_address
            .get(&address)
            .or_else(named)
            .cloned()
    }
}

/// In the order of their addresses, so that the same endpoints are always in the same order.
type Found = BTreeMap<SocketAddr, (Option<Arc<Workload>>, Arc<Load>)>;

fn add(found: &mut Found, address: SocketAddr, workload: Option<Arc<Workload>>) {
    if found.len() < MAX_ENDPOINTS {
        found.entry(address).or_insert_with(|| (workload, Arc::default()));
    }
}

fn target(port: &ServicePort, pod: &Pod) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => pod.ports.get(name).copied(),
    }
}

fn reuse(new: Vec<RouteRule>, old: Option<&Arc<[RouteRule]>>) -> Arc<[RouteRule]> {
    match old.filter(|old| ***old == *new) {
        Some(old) => Arc::clone(old),
        None => new.into(),
    }
}

/// Brings the snapshot's targets up to date with one service's change.
pub(super) fn retarget(old: Option<&model::Service>, new: Option<&model::Service>, snapshot: &mut Snapshot) {
    let (old, new) = (
        old.map(uses).unwrap_or_default(),
        new.map(uses).unwrap_or_default(),
    );
    let Some(key) = old
        .values()
        .chain(new.values())
        .flatten()
        .next()
        .map(|user| user.service.clone())
    else {
        return;
    };
    // Endpoints that stay lend their target to those that come.
    let mut stays = old.keys().filter(|address| old.get(address) == new.get(address));
    let shared = stays.find_map(|address| snapshot.targets.get(address));
    let mut shared: BTreeMap<Vec<TargetUser>, Arc<Target>> = shared
        .map(|target| (target.users().to_vec(), Arc::clone(target)))
        .into_iter()
        .collect();
    for address in old
        .keys()
        .chain(new.keys().filter(|address| !old.contains_key(address)))
    {
        if old.get(address) == new.get(address) {
            continue;
        }
        let others = snapshot
            .targets
            .get(address)
            .into_iter()
            .flat_map(|target| target.users());
        let mut users: Vec<_> = others.filter(|user| user.service != key).cloned().collect();
        users.extend(new.get(address).into_iter().flatten().cloned());
        let target = match shared.get(&users) {
            Some(target) => Some(Arc::clone(target)),
            None => Target::new(users.clone()).map(Arc::new),
        };
        match target {
            Some(target) => {
                shared.insert(users, Arc::clone(&target));
                snapshot.targets.insert(*address, target);
            }
            None => drop(snapshot.targets.remove(address)),
        }
    }
}

/// The sockets of a service's endpoints, and the ports that have them.
fn uses(service: &model::Service) -> BTreeMap<SocketAddr, Vec<TargetUser>> {
    let mut uses: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for port in &service.ports {
        for endpoint in port.endpoints.iter() {
            uses.entry(endpoint.address).or_default().push(TargetUser {
                service: service.key.clone(),
                port: port.port,
                protocol: port.protocol,
            });
        }
    }
    uses
}
