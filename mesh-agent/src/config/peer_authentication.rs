//! `security.istio.io` PeerAuthentication: what servers ask of their clients.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::Deserialize;
use serde_json::Value;

use super::check::{Issue, Issues, Port, typed};
use super::resource::{Labels, Meta, shared};
use crate::model::MtlsMode;

#[derive(Debug, PartialEq)]
pub(crate) struct PeerAuthentication {
    /// Empty: the whole namespace; in the root namespace the whole mesh.
    pub(crate) selector: Labels,
    /// `None` is UNSET: the wider policy decides.
    pub(crate) mode: Option<MtlsMode>,
    pub(crate) ports: BTreeMap<u16, Option<MtlsMode>>,
    /// Of two policies with the same reach the older one counts.
    pub(crate) created: Option<SystemTime>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawSpec {
    selector: RawSelector,
    mtls: RawMtls,
    port_level_mtls: BTreeMap<String, RawMtls>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawSelector {
    match_labels: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawMtls {
    mode: RawMode,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum RawMode {
    #[default]
    Unset,
    Disable,
    Permissive,
    Strict,
}

impl PeerAuthentication {
    pub(super) fn parse(meta: &Meta, spec: Value, issues: &mut Issues) -> Result<Self, Issue> {
        let spec: RawSpec = typed(spec, "spec")?;
        let selector = shared(spec.selector.match_labels);
        // Istio refuses it too: ports are a workload's.
        if selector.is_empty() && !spec.port_level_mtls.is_empty() {
            issues.error(
                "spec.portLevelMtls",
                "needs a selector: ports are those of chosen workloads",
            );
        }
        let mut ports = BTreeMap::new();
        for (text, mtls) in spec.port_level_mtls {
            let port = text
                .parse::<i64>()
                .map_err(|_| format!("`{text}` is not a port; allowed: 1 to 65535"));
            match port.and_then(Port::try_from) {
                Ok(port) => {
                    ports.insert(port.0, mtls.mode.mode());
                }
                Err(message) => issues.error(format!("spec.portLevelMtls.{text}"), message),
            }
        }
        Ok(Self {
            selector,
            mode: spec.mtls.mode.mode(),
            ports,
            created: meta.created,
        })
    }
}

impl RawMode {
    fn mode(self) -> Option<MtlsMode> {
        match self {
            Self::Unset => None,
            Self::Disable => Some(MtlsMode::Disable),
            Self::Permissive => Some(MtlsMode::Permissive),
            Self::Strict => Some(MtlsMode::Strict),
        }
    }
}
