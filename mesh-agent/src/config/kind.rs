//! Kinds: which documents the agent compiles, which it refuses, which it lets be.

use super::check::{Issue, Issues};

/// The kinds that the agent compiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    #[default]
    Namespace,
    Pod,
    Service,
    EndpointSlice,
    HttpRoute,
    ReferenceGrant,
    PeerAuthentication,
}

/// One row for each kind: its name, its group, the versions that are read.
const KINDS: [(Kind, &str, &str, &[&str]); 7] = [
    (Kind::Namespace, "Namespace", "", &["v1"]),
    (Kind::Pod, "Pod", "", &["v1"]),
    (Kind::Service, "Service", "", &["v1"]),
    (Kind::EndpointSlice, "EndpointSlice", "discovery.k8s.io", &["v1"]),
    (Kind::HttpRoute, "HTTPRoute", GATEWAY_GROUP, &["v1", "v1beta1"]),
    (
        Kind::ReferenceGrant,
        "ReferenceGrant",
        GATEWAY_GROUP,
        &["v1", "v1beta1"],
    ),
    (
        Kind::PeerAuthentication,
        "PeerAuthentication",
        "security.istio.io",
        &["v1", "v1beta1"],
    ),
];
pub(crate) const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

impl Kind {
    pub(crate) fn as_str(self) -> &'static str {
        KINDS
            .iter()
            .find(|row| row.0 == self)
            .map_or("", |(_, name, _, _)| name)
    }

    /// Kubernetes core kinds may have fields that mean nothing to a mesh; in the others each field is known.
    pub(super) fn is_strict(self) -> bool {
        matches!(
            self,
            Self::HttpRoute | Self::ReferenceGrant | Self::PeerAuthentication
        )
    }
}

/// Kinds that this agent is to speak one day: to pass over them in silence would leave a user unprotected.
const NOT_YET_GROUPS: [&str; 4] = [
    GATEWAY_GROUP,
    "networking.istio.io",
    "security.istio.io",
    "mesh-agent.dev",
];
/// Kinds of those groups that are somebody else's job.
const NOT_OURS: [&str; 3] = ["GatewayClass", "Gateway", "ListenerSet"];

/// Which kind a document is of; `None`, with a warning, for one that the agent has no use for.
pub(super) fn kind_of(api_version: &str, kind: &str, issues: &mut Issues) -> Result<Option<Kind>, Issue> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    if let Some((found, _, _, versions)) = KINDS.iter().find(|row| row.1 == kind && row.2 == group) {
        if versions.contains(&version) {
            return Ok(Some(*found));
        }
        let allowed: Vec<_> = versions.iter().map(|version| in_group(group, version)).collect();
        return Err(Issue::error(
            "apiVersion",
            format!(
                "`{api_version}` of {kind} is not supported; allowed: {}",
                allowed.join(", ")
            ),
        ));
    }
    if let Some((_, exact, group, versions)) = KINDS.iter().find(|row| row.1.eq_ignore_ascii_case(kind)) {
        let field = if *exact == kind { "apiVersion" } else { "kind" };
        return Err(Issue::error(
            field,
            format!(
                "there is no kind {kind} of {api_version}; did you mean {exact} of {}?",
                in_group(group, versions[0])
            ),
        ));
    }
    if NOT_YET_GROUPS.contains(&group) && !NOT_OURS.contains(&kind) {
        let known: Vec<_> = KINDS.iter().map(|row| row.1).collect();
        return Err(Issue::error(
            "kind",
            format!(
                "{kind} of {api_version} is not supported by this version; supported: {}",
                known.join(", ")
            ),
        ));
    }
    issues.warning(
        "kind",
        format!("kind {kind} of {api_version} is not used by the agent"),
    );
    Ok(None)
}

fn in_group(group: &str, version: &str) -> String {
    match group {
        "" => version.to_owned(),
        group => format!("{group}/{version}"),
    }
}
