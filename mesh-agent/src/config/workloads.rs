//! Pods to workloads: identity, membership of the mesh, the mTLS that it asks for, and where it runs.

use std::sync::Arc;

use super::Settings;
use super::check::Issue;
use super::index::Index;
use super::peer_authentication::PeerAuthentication;
use super::pod::Pod;
use super::resource::{Labels, ResourceKey, selects};
use crate::model::{Identity, MtlsMode, MtlsPolicy, Names, OnAgentDown, Workload};

/// Where Istio looks for mesh-wide policies.
pub(super) const ROOT_NAMESPACE: &str = "istio-system";
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

pub(super) fn compile(index: &Index, settings: &Settings, key: &ResourceKey, pod: &Pod) -> Workload {
    let mtls = mtls(index, &key.namespace, &pod.labels);
    let member = is_member(index, &key.namespace, pod);
    let strict =
        mtls.default == MtlsMode::Strict || mtls.ports.values().any(|mode| *mode == MtlsMode::Strict);
    Workload {
        namespace: Arc::clone(&key.namespace),
        name: Arc::clone(&key.name),
        labels: pod.labels.clone(),
        addresses: pod.addresses.clone(),
        node: Arc::clone(&pod.node),
        identity: Identity::from(Names {
            trust_domain: Arc::clone(&settings.trust_domain),
            namespace: Arc::clone(&key.namespace),
            service_account: Arc::clone(&pod.service_account),
        }),
        // In the host's network namespace only the way out is captured.
        meshed: member && !pod.host_network,
        on_agent_down: pod.on_agent_down.unwrap_or(match strict {
            true => OnAgentDown::Hold,
            false => OnAgentDown::Open,
        }),
        fast_path: pod.fast_path,
        place: pod
            .place
            .clone()
            .filter(|_| member && *pod.node == *settings.node),
        mtls,
    }
}

/// The pod's label decides, then its namespace's; without either a pod that says where it runs is in.
fn is_member(index: &Index, namespace: &str, pod: &Pod) -> bool {
    let label = |labels: &Labels| labels.get(DATAPLANE_MODE).cloned();
    let mode = label(&pod.labels).or_else(|| index.namespace_labels(namespace).and_then(label));
    match mode.as_deref() {
        Some("ambient") => true,
        Some("none") => false,
        _ => pod.place.is_some(),
    }
}

/// The narrowest policy that says anything: for the workload, its namespace, the mesh; else PERMISSIVE.
fn mtls(index: &Index, namespace: &str, labels: &Labels) -> MtlsPolicy {
    let workload = oldest(index, namespace, |policy| {
        // As in Istio, a selector in the root namespace reaches nobody.
        namespace != ROOT_NAMESPACE && !policy.selector.is_empty() && selects(&policy.selector, labels)
    });
    let wide = |namespace| {
        oldest(index, namespace, |policy: &PeerAuthentication| {
            policy.selector.is_empty()
        })
    };
    let default = [workload, wide(namespace), wide(ROOT_NAMESPACE)]
        .into_iter()
        .flatten()
        .find_map(|policy| policy.mode)
        .unwrap_or(MtlsMode::Permissive);
    let ports = workload.into_iter().flat_map(|policy| &policy.ports);
    MtlsPolicy {
        default,
        ports: ports
            .map(|(port, mode)| (*port, mode.unwrap_or(default)))
            .filter(|(_, mode)| *mode != default)
            .collect(),
    }
}

/// What will surprise the author of a policy: that it reaches nobody.
pub(super) fn policy_note(index: &Index, key: &ResourceKey) -> Option<Issue> {
    let (_, policy) = index.policies(&key.namespace).find(|(other, _)| *other == key)?;
    if !policy.selector.is_empty() {
        return (*key.namespace == *ROOT_NAMESPACE).then(|| {
            let message = format!("a policy with a selector has no effect in {ROOT_NAMESPACE}, as in Istio");
            Issue::warning("spec.selector", message)
        });
    }
    let in_force = oldest(index, &key.namespace, |policy| policy.selector.is_empty())?;
    (!std::ptr::eq(in_force, policy)).then(|| {
        let message = "an older policy is for the whole namespace already; this one has no effect";
        Issue::warning("", message)
    })
}

/// Of policies with the same reach the oldest counts; those without a date are the newest, then the name decides.
fn oldest<'a>(
    index: &'a Index,
    namespace: &str,
    matches: impl Fn(&PeerAuthentication) -> bool,
) -> Option<&'a PeerAuthentication> {
    index
        .policies(namespace)
        .map(|(_, policy)| policy)
        .filter(|policy| matches(policy))
        .min_by_key(|policy| (policy.created.is_none(), policy.created))
}
