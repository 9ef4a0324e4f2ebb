//! Workloads: what runs somewhere, at which addresses, and as whom.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::Identity;

/// A pod (or an entry that stands for a process elsewhere).
#[derive(Debug, PartialEq)]
pub struct Workload {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    pub addresses: Vec<IpAddr>,
    pub node: Arc<str>,
    pub identity: Identity,
    /// An agent stands before it: it is reached over mTLS on port 15008. Others are reached in clear text.
    pub meshed: bool,
    pub mtls: MtlsPolicy,
    pub on_agent_down: OnAgentDown,
    /// Its connections may go without the proxy where that would only copy.
    pub fast_path: bool,
    /// Where it runs, for workloads of this node that this agent captures.
    pub place: Option<Place>,
}

impl Workload {
    /// `namespace/name`, unique in a snapshot.
    pub fn uid(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// What the pods of one Deployment have in common: the name without the parts that make each pod's its own.
    pub fn workload_name(&self) -> &str {
        /// `-` and the five characters that end the name of a ReplicaSet's pod.
        const POD_SUFFIX: usize = 6;
        let deployment = || {
            let hash = self.labels.get("pod-template-hash")?;
            let end = self.name.len().checked_sub(POD_SUFFIX)?;
            let replica_set = self.name.get(..end)?;
            replica_set.strip_suffix(&**hash)?.strip_suffix('-')
        };
        deployment().filter(|name| !name.is_empty()).unwrap_or(&self.name)
    }

    /// Istio's canonical service: the label that names it, `app`, else the workload's name.
    pub fn canonical_service(&self) -> &str {
        ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]
            .iter()
            .find_map(|label| self.labels.get(*label))
            .map_or_else(|| self.workload_name(), |name| &**name)
    }

    /// Istio's canonical revision: the label that names it, `version`, else `latest`.
    pub fn canonical_revision(&self) -> &str {
        [
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ]
        .iter()
        .find_map(|label| self.labels.get(*label))
        .map_or("latest", |revision| revision)
    }
}

/// Where a local workload runs.
#[derive(Clone, Debug)]
pub enum Place {
    /// A network namespace that has a path, such as `/run/netns/NAME`.
    Netns(PathBuf),
    /// A network namespace handed over as an open file.
    OpenNetns(Arc<OwnedFd>),
    /// A cgroup2 path, for a workload that shares the host's network namespace: outbound only.
    Cgroup(PathBuf),
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Netns(a), Self::Netns(b)) | (Self::Cgroup(a), Self::Cgroup(b)) => a == b,
            (Self::OpenNetns(a), Self::OpenNetns(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// What the kernel does with a workload's new connections while no agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnAgentDown {
    /// They are refused.
    Hold,
    /// They pass as if unmeshed.
    Open,
}

/// `PeerAuthentication`: what a server asks of its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MtlsMode {
    /// Clear text only; the workload's port 15008 still answers, as in Istio's ambient mode.
    Disable,
    /// mTLS from meshed clients, clear text from the others.
    Permissive,
    /// mTLS or refused.
    Strict,
}

/// The mode that holds for a workload, and the ports that differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MtlsPolicy {
    pub default: MtlsMode,
    pub ports: BTreeMap<u16, MtlsMode>,
}

impl MtlsPolicy {
    pub fn mode(&self, port: u16) -> MtlsMode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }
}
