//! The index of all documents: which is in force for each resource, and who depends on whom.
//!
//! Of two documents that name the same resource the first in file order is in force. Everything here is looked
//! up by name; nothing is compiled.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::endpoint_slice::EndpointSlice;
use super::file::{At, File, Origin};
use super::http_route::HttpRoute;
use super::kind::Kind;
use super::peer_authentication::PeerAuthentication;
use super::pod::Pod;
use super::reference_grant::ReferenceGrant;
use super::resource::{Document, Labels, Resource, ResourceKey};
use super::service::Service;
use crate::model::{ServiceKey, Source};

#[derive(Debug, Default)]
pub(super) struct Index {
    files: BTreeMap<Origin, File>,
    candidates: BTreeMap<ResourceKey, Candidates>,
    /// EndpointSlices and HTTPRoutes that shape a service.
    attached: Links,
    /// HTTPRoutes that send to a service.
    senders: Links,
}

/// All documents that name a resource, in the order of the files; the first is in force. There is nearly always one.
type Candidates = Vec<(At, Arc<Document>)>;

/// Services, and the resources that have to do with each. One set for all: most services have one or none.
type Links = BTreeSet<(ServiceKey, ResourceKey)>;

/// A resource whose document in force changed, came or went, or moved within the files.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) key: ResourceKey,
    pub(super) old: Option<Arc<Document>>,
    pub(super) new: Option<(At, Arc<Document>)>,
}

impl Index {
    /// Replaces files (`None` removes one) and tells what that changed.
    pub(super) fn replace(&mut self, files: Vec<(Origin, Option<File>)>) -> Vec<Change> {
        let mut before: BTreeMap<ResourceKey, Option<(At, Arc<Document>)>> = BTreeMap::new();
        for (origin, file) in files {
            let old = self.files.remove(&origin).unwrap_or_default();
            for (at, document) in old.documents_beside(&origin, file.as_ref()) {
                let key = &document.key;
                if !before.contains_key(key) {
                    before.insert(key.clone(), self.in_force(key));
                }
                self.drop_candidate(key, &at);
            }
            let Some(file) = file else { continue };
            for (at, document) in file.documents_beside(&origin, Some(&old)) {
                let key = &document.key;
                if !before.contains_key(key) {
                    before.insert(key.clone(), self.in_force(key));
                }
                let candidates = self.candidates.entry(key.clone());
                let candidates = candidates.or_insert_with(|| Vec::with_capacity(1));
                let place = candidates.partition_point(|(other, _)| *other < at);
                candidates.insert(place, (at, Arc::clone(document)));
            }
            self.files.insert(origin, file);
        }
        let mut changes = Vec::new();
        for (key, old) in before {
            let new = self.in_force(&key);
            let same = match (&old, &new) {
                (Some((at, document)), Some((new_at, new_document))) => {
                    at == new_at && Arc::ptr_eq(document, new_document)
                }
                (None, None) => true,
                _ => false,
            };
            if same {
                continue;
            }
            let old = old.map(|(_, document)| document);
            if let Some(old) = &old {
                self.link(old, false);
            }
            if let Some((_, new)) = &new {
                self.link(new, true);
            }
            changes.push(Change { key, old, new });
        }
        changes
    }

    fn drop_candidate(&mut self, key: &ResourceKey, at: &At) {
        if let Some(candidates) = self.candidates.get_mut(key) {
            candidates.retain(|(other, _)| other != at);
            if candidates.is_empty() {
                self.candidates.remove(key);
            }
        }
    }

    fn link(&mut self, document: &Document, add: bool) {
        let change = |links: &mut Links, service: ServiceKey| {
            let link = (service, document.key.clone());
            match add {
                true => links.insert(link),
                false => links.remove(&link),
            };
        };
        for service in shapes(document) {
            change(&mut self.attached, service);
        }
        if let Resource::HttpRoute(route) = &document.resource {
            for backend in route.rules.iter().flat_map(|rule| &rule.backends) {
                change(&mut self.senders, backend.service.clone());
            }
        }
    }

    pub(super) fn files(&self) -> &BTreeMap<Origin, File> {
        &self.files
    }

    pub(super) fn place(&self, at: &At) -> Source {
        let entry = self
            .files
            .get(&at.origin)
            .and_then(|file| file.entries().get(at.index));
        Source {
            file: Arc::clone(&at.origin.file),
            document: entry.map_or(0, |entry| entry.number),
        }
    }

    pub(super) fn candidates(&self, key: &ResourceKey) -> impl Iterator<Item = &At> {
        self.candidates.get(key).into_iter().flatten().map(|(at, _)| at)
    }

    pub(super) fn in_force(&self, key: &ResourceKey) -> Option<(At, Arc<Document>)> {
        let (at, document) = self.candidates.get(key)?.first()?;
        Some((at.clone(), Arc::clone(document)))
    }

    fn get(&self, key: &ResourceKey) -> Option<&Resource> {
        Some(&self.candidates.get(key)?.first()?.1.resource)
    }

    /// The resources of a kind, in one namespace or in all.
    fn all(&self, kind: Kind, namespace: Option<&str>) -> impl Iterator<Item = (&ResourceKey, &Resource)> {
        let start = ResourceKey {
            kind,
            namespace: namespace.unwrap_or_default().into(),
            name: "".into(),
        };
        let within = namespace.map(Arc::<str>::from);
        self.candidates
            .range(start..)
            .take_while(move |(key, _)| {
                key.kind == kind
                    && within
                        .as_ref()
                        .is_none_or(|namespace| key.namespace == *namespace)
            })
            .filter_map(|(key, candidates)| Some((key, &candidates.first()?.1.resource)))
    }

    pub(super) fn pod(&self, key: &ResourceKey) -> Option<&Pod> {
        match self.get(key)? {
            Resource::Pod(pod) => Some(pod),
            _ => None,
        }
    }

    pub(super) fn pods(&self, namespace: Option<&str>) -> impl Iterator<Item = (&ResourceKey, &Pod)> {
        self.all(Kind::Pod, namespace)
            .filter_map(|(key, resource)| match resource {
                Resource::Pod(pod) => Some((key, pod)),
                _ => None,
            })
    }

    pub(super) fn service(&self, key: &ServiceKey) -> Option<&Service> {
        match self.get(&service_resource(key))? {
            Resource::Service(service) => Some(service),
            _ => None,
        }
    }

    pub(super) fn services(&self, namespace: &str) -> impl Iterator<Item = (&ResourceKey, &Service)> {
        self.all(Kind::Service, Some(namespace))
            .filter_map(|(key, resource)| match resource {
                Resource::Service(service) => Some((key, service)),
                _ => None,
            })
    }

    pub(super) fn namespace_labels(&self, namespace: &str) -> Option<&Labels> {
        let key = ResourceKey {
            kind: Kind::Namespace,
            namespace: "".into(),
            name: namespace.into(),
        };
        match self.get(&key)? {
            Resource::Namespace(labels) => Some(labels),
            _ => None,
        }
    }

    fn attached(&self, service: &ServiceKey) -> impl Iterator<Item = (&ResourceKey, &Resource)> {
        linked(&self.attached, service).filter_map(|key| Some((key, self.get(key)?)))
    }

    pub(super) fn slices_of(&self, service: &ServiceKey) -> impl Iterator<Item = &EndpointSlice> {
        self.attached(service).filter_map(|(_, resource)| match resource {
            Resource::EndpointSlice(slice) => Some(slice),
            _ => None,
        })
    }

    pub(super) fn routes_of(&self, service: &ServiceKey) -> impl Iterator<Item = (&ResourceKey, &HttpRoute)> {
        self.attached(service)
            .filter_map(|(key, resource)| match resource {
                Resource::HttpRoute(route) => Some((key, route)),
                _ => None,
            })
    }

    pub(super) fn route(&self, key: &ResourceKey) -> Option<&HttpRoute> {
        match self.get(key)? {
            Resource::HttpRoute(route) => Some(route),
            _ => None,
        }
    }

    /// The routes that send to a service.
    pub(super) fn senders(&self, service: &ServiceKey) -> impl Iterator<Item = &ResourceKey> {
        linked(&self.senders, service)
    }

    /// The routes that send to any service of a namespace.
    pub(super) fn senders_to(&self, namespace: &str) -> impl Iterator<Item = &ResourceKey> {
        let start = ServiceKey {
            namespace: namespace.into(),
            name: "".into(),
        };
        let within = Arc::clone(&start.namespace);
        self.senders
            .range((start, ResourceKey::default())..)
            .take_while(move |(key, _)| key.namespace == within)
            .map(|(_, route)| route)
    }

    pub(super) fn grants(&self, namespace: &str) -> impl Iterator<Item = &ReferenceGrant> {
        self.all(Kind::ReferenceGrant, Some(namespace))
            .filter_map(|(_, resource)| match resource {
                Resource::ReferenceGrant(grant) => Some(grant),
                _ => None,
            })
    }

    /// By name.
    pub(super) fn policies(
        &self,
        namespace: &str,
    ) -> impl Iterator<Item = (&ResourceKey, &PeerAuthentication)> {
        self.all(Kind::PeerAuthentication, Some(namespace))
            .filter_map(|(key, resource)| match resource {
                Resource::PeerAuthentication(policy) => Some((key, policy)),
                _ => None,
            })
    }
}

fn linked<'a>(links: &'a Links, service: &ServiceKey) -> impl Iterator<Item = &'a ResourceKey> {
    let within = service.clone();
    let from = links.range((within.clone(), ResourceKey::default())..);
    from.take_while(move |(service, _)| *service == within)
        .map(|(_, key)| key)
}

/// The services whose endpoints or routes a document decides.
pub(super) fn shapes(document: &Document) -> Vec<ServiceKey> {
    match &document.resource {
        Resource::EndpointSlice(slice) => slice
            .service
            .iter()
            .map(|name| ServiceKey {
                namespace: Arc::clone(&document.key.namespace),
                name: Arc::clone(name),
            })
            .collect(),
        Resource::HttpRoute(route) => route
            .parents
            .iter()
            .map(|parent| parent.service.clone())
            .collect(),
        _ => Vec::new(),
    }
}

pub(super) fn service_resource(key: &ServiceKey) -> ResourceKey {
    ResourceKey {
        kind: Kind::Service,
        namespace: Arc::clone(&key.namespace),
        name: Arc::clone(&key.name),
    }
}

pub(super) fn service_key(key: &ResourceKey) -> ServiceKey {
    ServiceKey {
        namespace: Arc::clone(&key.namespace),
        name: Arc::clone(&key.name),
    }
}
