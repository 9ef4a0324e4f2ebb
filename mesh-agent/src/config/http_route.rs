//! Gateway API HTTPRoute for services (GAMMA): typed, checked, and brought into the model's form.

use std::sync::Arc;
use std::time::SystemTime;

use serde::Deserialize;
use serde_json::Value;

use super::check::{Issue, Issues, Port, is_dns_label, typed};
use super::http_filter::{self, RawFilter};
use super::http_match::{self, RawMatch};
use super::http_policy::{self, RawRetry, RawTimeouts};
use super::kind::GATEWAY_GROUP;
use super::resource::{Meta, ResourceKey};
use crate::model::{HeaderEdits, RequestMatch, RetryPolicy, ServiceKey, Timeouts};

/// The API's own limits.
const MAX_RULES: usize = 16;
const MAX_BACKENDS: usize = 16;
const MAX_PARENTS: usize = 32;
const MAX_WEIGHT: u32 = 1_000_000;

#[derive(Debug, PartialEq)]
pub(crate) struct HttpRoute {
    pub(crate) created: Option<SystemTime>,
    pub(crate) parents: Vec<Parent>,
    pub(crate) rules: Vec<Rule>,
}

/// The service that a route acts on.
#[derive(Debug, PartialEq)]
pub(crate) struct Parent {
    pub(crate) service: ServiceKey,
    pub(crate) port: Option<u16>,
    pub(crate) port_name: Option<Box<str>>,
    /// `spec.parentRefs[0]`
    pub(crate) path: String,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Rule {
    /// `namespace/route/name`, or its index.
    pub(crate) name: Arc<str>,
    /// Any of them; never empty.
    pub(crate) matches: Vec<RequestMatch>,
    pub(crate) edits: HeaderEdits,
    pub(crate) backends: Vec<BackendRef>,
    pub(crate) timeouts: Timeouts,
    pub(crate) retry: RetryPolicy,
}

#[derive(Debug, PartialEq)]
pub(crate) struct BackendRef {
    pub(crate) service: ServiceKey,
    pub(crate) port: u16,
    pub(crate) weight: u32,
    pub(crate) edits: HeaderEdits,
    /// `spec.rules[0].backendRefs[1]`
    pub(crate) path: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSpec {
    #[serde(default)]
    parent_refs: Vec<RawParent>,
    hostnames: Option<Value>,
    use_default_gateways: Option<Value>,
    #[serde(default)]
    rules: Vec<RawRule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawParent {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    section_name: Option<String>,
    port: Option<Port>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRule {
    name: Option<String>,
    #[serde(default)]
    matches: Vec<RawMatch>,
    #[serde(default)]
    filters: Vec<RawFilter>,
    #[serde(default)]
    backend_refs: Vec<RawBackend>,
    timeouts: Option<RawTimeouts>,
    retry: Option<RawRetry>,
    session_persistence: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBackend {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    port: Option<Port>,
    weight: Option<u32>,
    #[serde(default)]
    filters: Vec<RawFilter>,
}

impl HttpRoute {
    pub(super) fn parse(
        key: &ResourceKey,
        meta: &Meta,
        spec: Value,
        issues: &mut Issues,
    ) -> Result<Self, Issue> {
        let spec: RawSpec = typed(spec, "spec")?;
        for (field, given) in [
            ("spec.hostnames", spec.hostnames.is_some()),
            ("spec.useDefaultGateways", spec.use_default_gateways.is_some()),
        ] {
            if given {
                issues.error(field, "not supported for routes of a Service; remove it");
            }
        }
        if spec.rules.len() > MAX_RULES {
            issues.error(
                "spec.rules",
                format!("{} rules; allowed: {MAX_RULES}", spec.rules.len()),
            );
        }
        if spec.rules.is_empty() {
            issues.error("spec.rules", "at least one rule is needed here");
        }
        let parents = parents(key, spec.parent_refs, issues);
        let rules = spec
            .rules
            .into_iter()
            .enumerate()
            .map(|(index, rule)| Rule::parse(key, index, rule, issues))
            .collect();
        Ok(Self {
            created: meta.created,
            parents,
            rules,
        })
    }
}

fn parents(key: &ResourceKey, raw: Vec<RawParent>, issues: &mut Issues) -> Vec<Parent> {
    if raw.len() > MAX_PARENTS {
        issues.error(
            "spec.parentRefs",
            format!("{} parents; allowed: {MAX_PARENTS}", raw.len()),
        );
    }
    let mut parents = Vec::new();
    for (index, parent) in raw.into_iter().enumerate() {
        let path = format!("spec.parentRefs[{index}]");
        if !is_service(
            parent.group.as_deref().unwrap_or(GATEWAY_GROUP),
            parent.kind.as_deref().unwrap_or("Gateway"),
        ) {
            // The same route may also be a Gateway's, which is served elsewhere.
            continue;
        }
        if let Some(service) = service_key(key, parent.namespace, parent.name, &path, issues) {
            parents.push(Parent {
                service,
                port: parent.port.map(|port| port.0),
                port_name: parent.section_name.map(Into::into),
                path,
            });
        }
    }
    if parents.is_empty() && !issues.has_errors() {
        issues.error(
            "spec.parentRefs",
            "no parent is a Service; expected one with kind: Service and group: \"\" (without them it means a Gateway)",
        );
    }
    parents
}

fn is_service(group: &str, kind: &str) -> bool {
    matches!(group, "" | "core") && kind == "Service"
}

fn service_key(
    route: &ResourceKey,
    namespace: Option<String>,
    name: String,
    path: &str,
    issues: &mut Issues,
) -> Option<ServiceKey> {
    for (field, text) in [("namespace", namespace.as_deref()), ("name", Some(name.as_str()))] {
        if let Some(text) = text.filter(|text| !is_dns_label(text)) {
            issues.error(
                format!("{path}.{field}"),
                format!("{text:?} is not a name; {}", super::check::DNS_LABEL),
            );
            return None;
        }
    }
    Some(ServiceKey {
        namespace: namespace.map_or_else(|| Arc::clone(&route.namespace), Into::into),
        name: name.into(),
    })
}

impl Rule {
    fn parse(key: &ResourceKey, index: usize, raw: RawRule, issues: &mut Issues) -> Self {
        let path = format!("spec.rules[{index}]");
        if raw.session_persistence.is_some() {
            issues.error(
                format!("{path}.sessionPersistence"),
                "not supported by this version; remove it",
            );
        }
        if raw.backend_refs.len() > MAX_BACKENDS {
            issues.error(
                format!("{path}.backendRefs"),
                format!("{} backends; allowed: {MAX_BACKENDS}", raw.backend_refs.len()),
            );
        }
        let name = match raw.name {
            Some(name) => format!("{}/{}/{name}", key.namespace, key.name),
            None => format!("{}/{}/{index}", key.namespace, key.name),
        };
        Self {
            name: name.into(),
            matches: http_match::parse(raw.matches, &path, issues),
            edits: http_filter::parse(raw.filters, &path, issues),
            backends: raw
                .backend_refs
                .into_iter()
                .enumerate()
                .filter_map(|(index, backend)| {
                    BackendRef::parse(key, backend, format!("{path}.backendRefs[{index}]"), issues)
                })
                .collect(),
            timeouts: http_policy::timeouts(raw.timeouts.unwrap_or_default(), &path, issues),
            retry: http_policy::retry(raw.retry, &path, issues),
        }
    }
}

impl BackendRef {
    fn parse(key: &ResourceKey, raw: RawBackend, path: String, issues: &mut Issues) -> Option<Self> {
        if !is_service(
            raw.group.as_deref().unwrap_or(""),
            raw.kind.as_deref().unwrap_or("Service"),
        ) {
            issues.error(
                path,
                "not supported by this version; allowed: kind Service of group \"\"",
            );
            return None;
        }
        let weight = raw.weight.unwrap_or(1);
        if weight > MAX_WEIGHT {
            issues.error(
                format!("{path}.weight"),
                format!("{weight} is too much; allowed: 0 to {MAX_WEIGHT}"),
            );
        }
        let Some(port) = raw.port else {
            issues.error(format!("{path}.port"), "a Service needs a port here");
            return None;
        };
        Some(Self {
            service: service_key(key, raw.namespace, raw.name, &path, issues)?,
            port: port.0,
            weight,
            edits: http_filter::parse(raw.filters, &path, issues),
            path,
        })
    }
}
