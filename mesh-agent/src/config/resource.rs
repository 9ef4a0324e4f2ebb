//! Resources: what a document says, checked on its own and typed by kind.
//!
//! Invariant: a [`Resource`] holds nothing that still can be wrong by itself; what depends on other documents
//! (does that service exist?) is the compiler's question.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

use super::check::{
    DNS_LABEL, DNS_SUBDOMAIN, Issue, Issues, LABEL_VALUE, is_dns_label, is_dns_subdomain, is_label_value,
    typed,
};
use super::document::RawDocument;
use super::endpoint_slice::EndpointSlice;
use super::http_route::HttpRoute;
use super::kind::{Kind, kind_of};
use super::peer_authentication::PeerAuthentication;
use super::pod::Pod;
use super::reference_grant::ReferenceGrant;
use super::service::Service;

/// Names one resource.
/// The default comes before all others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ResourceKey {
    pub(crate) kind: Kind,
    /// Empty for a Namespace.
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.is_empty() {
            true => write!(f, "{} {}", self.kind.as_str(), self.name),
            false => write!(f, "{} {}/{}", self.kind.as_str(), self.namespace, self.name),
        }
    }
}

pub(crate) type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// What is common to all kinds.
#[derive(Debug)]
pub(crate) struct Meta {
    pub(crate) labels: Labels,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) created: Option<SystemTime>,
    pub(crate) deleting: bool,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Resource {
    Namespace(Labels),
    Pod(Pod),
    Service(Service),
    EndpointSlice(EndpointSlice),
    HttpRoute(HttpRoute),
    ReferenceGrant(ReferenceGrant),
    PeerAuthentication(PeerAuthentication),
}

/// A document that is in force or could be. What it says is compared, not how it is written: formatting, and fields
/// that mean nothing to a mesh, make no difference.
#[derive(Debug, PartialEq)]
pub(crate) struct Document {
    pub(crate) key: ResourceKey,
    pub(crate) resource: Resource,
}

/// One document of a file: what it is, what it gives, what is wrong with it.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) number: usize,
    pub(crate) prefix: Box<str>,
    pub(crate) key: Option<ResourceKey>,
    /// What could be read of its name where there is no key.
    pub(crate) fragment: Box<str>,
    /// `None` when it is refused or of no use.
    pub(crate) document: Option<Arc<Document>>,
    pub(crate) issues: Vec<Issue>,
    /// The document without its formatting, until it is taken to be written down.
    pub(crate) json: Option<Box<RawValue>>,
    /// Its place among the file's documents when they were last taken.
    pub(crate) place: usize,
}

impl Entry {
    /// `HTTPRoute shop/reviews`, as far as it could be read.
    pub(crate) fn label(&self) -> String {
        match &self.key {
            Some(key) => key.to_string(),
            None => self.fragment.to_string(),
        }
    }
}

/// Checks one document on its own.
pub(crate) fn parse(raw: RawDocument) -> Entry {
    let mut entry = Entry {
        number: raw.number,
        prefix: raw.prefix.into(),
        key: None,
        fragment: "document".into(),
        document: None,
        issues: Vec::new(),
        json: None,
        place: 0,
    };
    let value = match raw.value {
        Ok(value) => value,
        Err(issue) => {
            entry.issues.push(issue);
            return entry;
        }
    };
    let mut issues = Issues::default();
    match Envelope::open(value, &mut entry, &mut issues) {
        Ok(Some((envelope, json))) => {
            let key = envelope.key.clone();
            let resource = envelope.resource(&mut issues);
            if let (Some(resource), false) = (resource, issues.has_errors()) {
                entry.document = Some(Arc::new(Document { key, resource }));
                entry.json = Some(json);
            }
        }
        Ok(None) => {}
        Err(issue) => issues.push(issue),
    }
    entry.issues = issues.into_vec();
    entry
}

/// A document whose kind and name are known.
struct Envelope {
    key: ResourceKey,
    meta: Meta,
    spec: Value,
    /// The whole document, for the kinds that have no `spec`.
    whole: Value,
}

#[derive(Deserialize)]
struct RawHead {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    #[serde(default)]
    metadata: Value,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RawMeta {
    name: Option<String>,
    namespace: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
}

impl Envelope {
    /// The document, and the same as text. `None` for kinds that the agent has no use for.
    fn open(
        mut value: Value,
        entry: &mut Entry,
        issues: &mut Issues,
    ) -> Result<Option<(Self, Box<RawValue>)>, Issue> {
        let Some(map) = value.as_object() else {
            return Err(Issue::error(
                "",
                "not a resource; expected a map with apiVersion, kind and metadata",
            ));
        };
        // A slice's endpoints are most of it, and are not for its head.
        let head = ["apiVersion", "kind", "metadata"]
            .into_iter()
            .filter_map(|field| Some((field.to_owned(), map.get(field)?.clone())));
        let head: RawHead = typed(Value::Object(head.collect()), "")?;
        let json = to_raw_value(&value).map_err(|error| Issue::error("", error.to_string()))?;
        entry.fragment = head.kind.as_str().into();
        let Some(kind) = kind_of(&head.api_version, &head.kind, issues)? else {
            if let Some(name) = head.metadata.get("name").and_then(Value::as_str) {
                entry.fragment = format!("{} {name}", head.kind).into();
            }
            return Ok(None);
        };
        let raw: RawMeta = match head.metadata {
            Value::Null => RawMeta::default(),
            metadata => typed(metadata, "metadata")?,
        };
        let key = name_of(kind, &raw)?;
        entry.fragment = Box::default();
        entry.key = Some(key.clone());
        let meta = Meta::new(raw, issues);
        let spec = value.get_mut("spec").map(Value::take).unwrap_or_default();
        if kind.is_strict() {
            let known = ["apiVersion", "kind", "metadata", "spec", "status"];
            for field in value.as_object().into_iter().flat_map(serde_json::Map::keys) {
                if !known.contains(&field.as_str()) {
                    issues.error(
                        field.as_str(),
                        format!("unknown field `{field}`, expected one of {}", known.join(", ")),
                    );
                }
            }
        }
        let envelope = Self {
            key,
            meta,
            spec,
            whole: value,
        };
        Ok(Some((envelope, json)))
    }

    fn resource(self, issues: &mut Issues) -> Option<Resource> {
        let Self {
            key,
            meta,
            spec,
            whole,
            ..
        } = self;
        let empty_spec = spec.is_null();
        let spec = match empty_spec {
            true => Value::Object(serde_json::Map::new()),
            false => spec,
        };
        let result = match key.kind {
            Kind::Namespace => Ok(Resource::Namespace(meta.labels)),
            Kind::Pod => Pod::parse(meta, spec, whole, issues).map(Resource::Pod),
            Kind::Service => Service::parse(&meta, spec, issues).map(Resource::Service),
            Kind::EndpointSlice => EndpointSlice::parse(&meta, whole, issues).map(Resource::EndpointSlice),
            Kind::HttpRoute => HttpRoute::parse(&key, &meta, spec, issues).map(Resource::HttpRoute),
            Kind::ReferenceGrant => ReferenceGrant::parse(spec, issues).map(Resource::ReferenceGrant),
            Kind::PeerAuthentication => {
                PeerAuthentication::parse(&meta, spec, issues).map(Resource::PeerAuthentication)
            }
        };
        result.map_err(|issue| issues.push(issue)).ok()
    }
}

impl Meta {
    fn new(raw: RawMeta, issues: &mut Issues) -> Self {
        let created = raw.creation_timestamp.and_then(|text| {
            humantime::parse_rfc3339(&text)
                .map_err(|_| {
                    issues.error(
                        "metadata.creationTimestamp",
                        format!("`{text}` is not a time; expected one as in 2026-01-31T09:30:00Z"),
                    );
                })
                .ok()
        });
        for (key, value) in &raw.labels {
            if !is_label_value(value) {
                issues.error(
                    format!("metadata.labels.{key}"),
                    format!("{value:?} is not a label's value; {LABEL_VALUE}"),
                );
            }
        }
        Self {
            labels: shared(raw.labels),
            annotations: raw.annotations,
            created,
            deleting: raw.deletion_timestamp.is_some(),
        }
    }
}

pub(crate) fn shared(labels: BTreeMap<String, String>) -> Labels {
    labels
        .into_iter()
        .map(|(key, value)| (key.into(), value.into()))
        .collect()
}

/// Whether `labels` have all that `selector` asks for.
pub(crate) fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn name_of(kind: Kind, raw: &RawMeta) -> Result<ResourceKey, Issue> {
    let Some(name) = raw.name.as_deref() else {
        return Err(Issue::error("metadata.name", "a name is needed here"));
    };
    let (valid, allowed) = match kind {
        Kind::Namespace | Kind::Service => (is_dns_label(name), DNS_LABEL),
        _ => (is_dns_subdomain(name), DNS_SUBDOMAIN),
    };
    if !valid {
        return Err(Issue::error(
            "metadata.name",
            format!("{name:?} is not a name; {allowed}"),
        ));
    }
    let namespace = match (kind, raw.namespace.as_deref()) {
        (Kind::Namespace, _) => "",
        (_, None) => "default",
        (_, Some(namespace)) => namespace,
    };
    if kind != Kind::Namespace && !is_dns_label(namespace) {
        return Err(Issue::error(
            "metadata.namespace",
            format!("{namespace:?} is not a namespace; {DNS_LABEL}"),
        ));
    }
    Ok(ResourceKey {
        kind,
        namespace: namespace.into(),
        name: name.into(),
    })
}
