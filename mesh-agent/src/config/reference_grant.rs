//! Gateway API ReferenceGrant: which routes of other namespaces may send to a namespace's services.

use serde::Deserialize;
use serde_json::Value;

use super::check::{Issue, Issues, typed};
use super::kind::GATEWAY_GROUP;

#[derive(Debug, PartialEq)]
pub(crate) struct ReferenceGrant {
    /// Namespaces whose HTTPRoutes are meant.
    from: Vec<Box<str>>,
    /// Services that they may send to; `None` is all of the grant's namespace.
    to: Vec<Option<Box<str>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSpec {
    from: Vec<RawFrom>,
    to: Vec<RawTo>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFrom {
    group: String,
    kind: String,
    namespace: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTo {
    group: String,
    kind: String,
    name: Option<String>,
}

impl ReferenceGrant {
    pub(super) fn parse(spec: Value, issues: &mut Issues) -> Result<Self, Issue> {
        let spec: RawSpec = typed(spec, "spec")?;
        for (field, empty) in [
            ("spec.from", spec.from.is_empty()),
            ("spec.to", spec.to.is_empty()),
        ] {
            if empty {
                issues.error(field, "at least one entry is needed here");
            }
        }
        // A grant may also speak of kinds that others serve (Gateways, Secrets): those grant nothing here.
        Ok(Self {
            from: spec
                .from
                .into_iter()
                .filter(|from| from.group == GATEWAY_GROUP && from.kind == "HTTPRoute")
                .map(|from| from.namespace.into())
                .collect(),
            to: spec
                .to
                .into_iter()
                .filter(|to| to.group.is_empty() && to.kind == "Service")
                .map(|to| to.name.map(Into::into))
                .collect(),
        })
    }

    /// Whether HTTPRoutes of `namespace` may send to the service `name` of the grant's own namespace.
    pub(crate) fn allows(&self, namespace: &str, name: &str) -> bool {
        self.from.iter().any(|from| **from == *namespace)
            && self.to.iter().any(|to| to.as_deref().is_none_or(|to| to == name))
    }
}
