//! The compiler: changed files in, the next snapshot out, at the cost of what the change touches.
//!
//! Documents, then the addresses they claim, then workloads, then services (with endpoints and routes), then the
//! report: each step compiles only what the steps before marked. What compiles to the same value keeps its `Arc`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::check::{Issue, Issues};
use super::claims::Claims;
use super::file::{File, Origin};
use super::index::{Change, Index, service_key, service_resource, shapes};
use super::kind::Kind;
use super::report::Report;
use super::resource::{Document, Resource, ResourceKey, selects};
use super::service::ServiceAddresses;
use super::services::{Inputs, retarget};
use super::vips::Vips;
use super::workloads::ROOT_NAMESPACE;
use super::{Settings, routes, workloads};
use crate::model::{ServiceKey, Snapshot, Workload};

/// Compiles documents into snapshots, one change after the other.
#[derive(Debug)]
pub struct Compiler {
    settings: Settings,
    index: Index,
    claims: Claims,
    vips: Vips,
    report: Report,
    snapshot: Snapshot,
}

/// What has to be compiled again.
#[derive(Debug, Default)]
struct Dirty {
    pods: BTreeSet<ResourceKey>,
    services: BTreeSet<ServiceKey>,
    routes: BTreeSet<ResourceKey>,
    policies: BTreeSet<ResourceKey>,
}

impl Compiler {
    /// `vips` are the addresses that an earlier run gave.
    pub fn new(settings: Settings, vips: Vips) -> Self {
        let snapshot = Snapshot {
            trust_domain: Arc::clone(&settings.trust_domain),
            ..Snapshot::default()
        };
        Self {
            settings,
            index: Index::default(),
            claims: Claims::default(),
            vips,
            report: Report::default(),
            snapshot,
        }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    pub fn files(&self) -> &BTreeMap<Origin, File> {
        self.index.files()
    }

    /// The addresses that it gives to services.
    pub fn vips(&mut self) -> &mut Vips {
        &mut self.vips
    }

    /// Takes in changed files (`None`: the file is gone) and makes the next snapshot.
    ///
    /// The first time it is given all files at once.
    pub fn update(&mut self, files: Vec<(Origin, Option<File>)>) -> &Snapshot {
        let origins: Vec<_> = files.iter().map(|(origin, _)| origin.clone()).collect();
        let changes = self.index.replace(files);
        let mut dirty = Dirty::default();
        for change in &changes {
            self.claim(change, &mut dirty);
            self.mark(change, &mut dirty);
            self.source(change);
        }
        for key in std::mem::take(&mut dirty.pods) {
            self.compile_pod(&key, &mut dirty);
        }
        for key in &dirty.routes {
            let notes = self
                .index
                .route(key)
                .map(|route| routes::notes(&self.index, key, route));
            self.report
                .note(key, notes.map(Issues::into_vec).unwrap_or_default());
        }
        for key in &dirty.policies {
            let note = workloads::policy_note(&self.index, key);
            self.report.note(key, note.into_iter().collect());
        }
        for key in &dirty.services {
            self.compile_service(key);
        }
        self.release_vips(&dirty.services);
        self.snapshot.rejected = self.report.compile(&self.index, &origins, &changes);
        self.snapshot.generation += 1;
        &self.snapshot
    }

    /// Takes back the addresses of services that have no use for them any more.
    fn release_vips(&mut self, changed: &BTreeSet<ServiceKey>) {
        let index = &self.index;
        let is_used = |key: &ServiceKey| {
            let service = index.service(key);
            service.is_some_and(|service| service.addresses == ServiceAddresses::Absent)
        };
        if self.snapshot.generation == 0 {
            // An earlier run may have given some to services that are no more.
            self.vips.retain(is_used);
        }
        for key in changed.iter().filter(|key| !is_used(key)) {
            self.vips.release(key);
        }
    }

    /// Addresses: who loses or gains one has to be looked at again.
    fn claim(&mut self, change: &Change, dirty: &mut Dirty) {
        let claim = change.new.as_ref().and_then(|(at, document)| {
            let addresses = claimed(document);
            (!addresses.is_empty()).then(|| (at.clone(), addresses))
        });
        // Who was given an address that somebody claims by name moves out.
        let claims = claim.iter().flat_map(|(_, addresses)| addresses);
        dirty
            .services
            .extend(claims.filter_map(|address| self.vips.holder(*address).cloned()));
        for key in self.claims.replace(&change.key, claim) {
            match key.kind {
                Kind::Pod => {
                    dirty.pods.insert(key);
                }
                _ => {
                    dirty.services.insert(service_key(&key));
                }
            }
        }
    }

    /// What depends on the old or the new document.
    fn mark(&self, change: &Change, dirty: &mut Dirty) {
        let key = &change.key;
        let new = change.new.as_ref().map(|(_, document)| document);
        for document in change.old.iter().chain(new) {
            dirty.services.extend(shapes(document));
            match &document.resource {
                Resource::Namespace(_) => {
                    dirty
                        .pods
                        .extend(self.index.pods(Some(&key.name)).map(|(key, _)| key.clone()));
                }
                Resource::PeerAuthentication(policy) => {
                    dirty
                        .policies
                        .extend(self.index.policies(&key.namespace).map(|(key, _)| key.clone()));
                    dirty.policies.insert(key.clone());
                    let everywhere = *key.namespace == *ROOT_NAMESPACE && policy.selector.is_empty();
                    let pods = self.index.pods((!everywhere).then_some(&*key.namespace));
                    dirty.pods.extend(pods.map(|(key, _)| key.clone()));
                }
                Resource::Pod(pod) => {
                    dirty.pods.insert(key.clone());
                    let services = self.index.services(&key.namespace);
                    let selecting = services.filter(|(_, service)| {
                        !service.selector.is_empty() && selects(&service.selector, &pod.labels)
                    });
                    dirty.services.extend(selecting.map(|(key, _)| service_key(key)));
                }
                Resource::Service(_) => {
                    let service = service_key(key);
                    self.mark_routes(self.index.senders(&service), dirty);
                    dirty
                        .routes
                        .extend(self.index.routes_of(&service).map(|(key, _)| key.clone()));
                    dirty.services.insert(service);
                }
                Resource::HttpRoute(_) => {
                    dirty.routes.insert(key.clone());
                }
                Resource::ReferenceGrant(_) => {
                    self.mark_routes(self.index.senders_to(&key.namespace), dirty);
                }
                Resource::EndpointSlice(_) => {}
            }
        }
    }

    fn mark_routes<'a>(&self, routes: impl Iterator<Item = &'a ResourceKey>, dirty: &mut Dirty) {
        for key in routes {
            dirty.routes.insert(key.clone());
            let parents = self.index.route(key).into_iter().flat_map(|route| &route.parents);
            dirty
                .services
                .extend(parents.map(|parent| parent.service.clone()));
        }
    }

    fn source(&mut self, change: &Change) {
        let ResourceKey {
            kind: kind @ (Kind::Pod | Kind::Service),
            namespace,
            name,
        } = &change.key
        else {
            return;
        };
        let key: Arc<str> = format!("{}/{namespace}/{name}", kind.as_str()).into();
        match &change.new {
            Some((at, _)) => self.snapshot.sources.insert(key, self.index.place(at)),
            None => self.snapshot.sources.remove(&key),
        };
    }

    fn compile_pod(&mut self, key: &ResourceKey, dirty: &mut Dirty) {
        let issue = self.conflict(key);
        let pod = self
            .index
            .pod(key)
            .filter(|pod| !pod.finished && (!pod.addresses.is_empty() || pod.place.is_some()));
        let new = pod.filter(|_| issue.is_none()).map(|pod| {
            (
                workloads::compile(&self.index, &self.settings, key, pod),
                pod.host_network,
            )
        });
        self.report.note(key, issue.into_iter().collect());

        let uid: Arc<str> = format!("{}/{}", key.namespace, key.name).into();
        let old = self.snapshot.workloads.get(&uid).cloned();
        match (&old, &new) {
            (None, None) => return,
            (Some(old), Some((new, host))) if **old == *new && self.is_of_host(old) == *host => return,
            _ => {}
        }
        if let Some(old) = old {
            self.snapshot.workloads.remove(&uid);
            self.snapshot.local_workloads.remove(&uid);
            for address in &old.addresses {
                let current = self.snapshot.workloads_by_address.get(address);
                if current.is_some_and(|current| Arc::ptr_eq(current, &old)) {
                    self.snapshot.workloads_by_address.remove(address);
                }
            }
            self.mark_users(&old, dirty);
        }
        if let Some((workload, host_network)) = new {
            let workload = Arc::new(workload);
            self.mark_users(&workload, dirty);
            // The host's addresses belong to no single workload.
            if !host_network {
                for address in &workload.addresses {
                    self.snapshot
                        .workloads_by_address
                        .insert(*address, Arc::clone(&workload));
                }
            }
            if workload.place.is_some() {
                let local = Arc::clone(&workload);
                self.snapshot.local_workloads.insert(Arc::clone(&uid), local);
            }
            self.snapshot.workloads.insert(uid, workload);
        }
    }

    /// Whether its addresses are the node's, so that none of them leads to it.
    fn is_of_host(&self, workload: &Arc<Workload>) -> bool {
        let by_address = &self.snapshot.workloads_by_address;
        let mut found = workload.addresses.iter().map(|address| by_address.get(address));
        !workload.addresses.is_empty()
            && !found.any(|found| found.is_some_and(|found| Arc::ptr_eq(found, workload)))
    }

    /// The services that have the workload as an endpoint, or a part of them in the making.
    fn mark_users(&self, workload: &Workload, dirty: &mut Dirty) {
        for address in &workload.addresses {
            dirty.services.extend(self.snapshot.users(*address).cloned());
        }
        let selecting = self.index.services(&workload.namespace).filter(|(_, service)| {
            !service.selector.is_empty() && selects(&service.selector, &workload.labels)
        });
        dirty.services.extend(selecting.map(|(key, _)| service_key(key)));
    }

    fn compile_service(&mut self, key: &ServiceKey) {
        let resource = service_resource(key);
        let mut issue = self.conflict(&resource);
        let service = self.index.service(key).filter(|_| issue.is_none());
        let new = service.and_then(|service| {
            let vips = match &service.addresses {
                ServiceAddresses::Given(addresses) => addresses.clone(),
                ServiceAddresses::Headless => Vec::new(),
                ServiceAddresses::Absent => {
                    let free = |address| self.claims.owner(address).is_none();
                    let Some(addresses) = self.vips.give(key, free) else {
                        issue = Some(Issue::error(
                            "spec.clusterIP",
                            "all addresses of 240.240.0.0/16 are taken; give one",
                        ));
                        return None;
                    };
                    addresses.to_vec()
                }
            };
            let inputs = Inputs {
                index: &self.index,
                settings: &self.settings,
                snapshot: &self.snapshot,
            };
            Some(inputs.compile(key, service, vips))
        });
        self.report.note(&resource, issue.into_iter().collect());

        let old = self.snapshot.services.get(key).cloned();
        if old.as_deref() == new.as_ref() {
            return;
        }
        retarget(old.as_deref(), new.as_ref(), &mut self.snapshot);
        if let Some(old) = old {
            self.snapshot.services.remove(key);
            // Also a change of nothing would make it another map.
            if self.snapshot.near_services.contains_key(key) {
                self.snapshot.near_services.remove(key);
            }
            for vip in &old.vips {
                let current = self.snapshot.services_by_vip.get(vip);
                if current.is_some_and(|current| Arc::ptr_eq(current, &old)) {
                    self.snapshot.services_by_vip.remove(vip);
                }
            }
        }
        if let Some(new) = new {
            let new = Arc::new(new);
            for vip in &new.vips {
                self.snapshot.services_by_vip.insert(*vip, Arc::clone(&new));
            }
            if new.is_near() {
                self.snapshot.near_services.insert(key.clone(), Arc::clone(&new));
            }
            self.snapshot.services.insert(key.clone(), new);
        }
    }

    /// An address of the resource that another has already.
    fn conflict(&self, key: &ResourceKey) -> Option<Issue> {
        let (_, document) = self.index.in_force(key)?;
        claimed(&document).into_iter().find_map(|address| {
            let (at, owner) = self.claims.owner(address)?;
            (owner != key).then(|| {
                let path = match key.kind {
                    Kind::Pod => "status.podIP",
                    _ => "spec.clusterIP",
                };
                let place = self.index.place(at);
                Issue::error(
                    path,
                    format!("{address} is the address of {owner} already ({place})"),
                )
            })
        })
    }
}

/// The addresses that are to be one resource's alone.
fn claimed(document: &Document) -> Vec<IpAddr> {
    match &document.resource {
        Resource::Pod(pod) if !pod.finished && !pod.host_network => pod.addresses.clone(),
        Resource::Service(service) => match &service.addresses {
            ServiceAddresses::Given(addresses) => addresses.clone(),
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}
