//! `discovery.k8s.io/v1` EndpointSlice: what a mesh reads of it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::check::{Issue, Issues, Port, address, typed};
use super::resource::Meta;
use super::service::RawProtocol;

/// The label that says which service a slice belongs to.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The endpoints of a service that somebody else found.
#[derive(Debug, PartialEq)]
pub(crate) struct EndpointSlice {
    /// The service in the slice's namespace that it belongs to.
    pub(crate) service: Option<Arc<str>>,
    pub(crate) ipv6: bool,
    /// By the name of the service's port, empty for a port without one.
    pub(crate) ports: BTreeMap<Box<str>, u16>,
    pub(crate) endpoints: Vec<SliceEndpoint>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct SliceEndpoint {
    pub(crate) address: IpAddr,
    pub(crate) ready: bool,
    /// Not ready because it is going away, but it still answers.
    pub(crate) serving: bool,
    /// The Pod that it is, if the slice says so.
    pub(crate) pod: Option<Box<str>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSlice {
    address_type: RawAddressType,
    #[serde(default)]
    ports: Vec<RawSlicePort>,
    endpoints: Vec<RawEndpoint>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
enum RawAddressType {
    IPv4,
    IPv6,
    #[serde(rename = "FQDN")]
    Fqdn,
}

#[derive(Deserialize)]
struct RawSlicePort {
    #[serde(default)]
    name: String,
    port: Option<Port>,
    #[serde(default)]
    protocol: RawProtocol,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpoint {
    addresses: Vec<String>,
    #[serde(default)]
    conditions: RawConditions,
    target_ref: Option<RawTargetRef>,
}

#[derive(Default, Deserialize)]
struct RawConditions {
    ready: Option<bool>,
    serving: Option<bool>,
}

#[derive(Deserialize)]
struct RawTargetRef {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    name: String,
}

impl EndpointSlice {
    pub(super) fn parse(meta: &Meta, whole: Value, issues: &mut Issues) -> Result<Self, Issue> {
        let raw: RawSlice = typed(whole, "")?;
        if raw.address_type == RawAddressType::Fqdn {
            issues.error(
                "addressType",
                "FQDN is not supported by this version; allowed: IPv4, IPv6",
            );
        }
        let service = meta.labels.get(SERVICE_NAME).cloned();
        if service.is_none() {
            issues.warning(
                format!("metadata.labels[{SERVICE_NAME}]"),
                "without this label the slice belongs to no service and has no effect",
            );
        }
        let ipv6 = raw.address_type == RawAddressType::IPv6;
        let mut endpoints = Vec::new();
        for (index, endpoint) in raw.endpoints.into_iter().enumerate() {
            // All addresses of one entry are the same backend: Kubernetes says to use the first.
            let path = format!("endpoints[{index}].addresses[0]");
            match endpoint.addresses.first().map(|text| address(text)) {
                Some(Ok(address)) if address.is_ipv6() == ipv6 => endpoints.push(SliceEndpoint {
                    address,
                    ready: endpoint.conditions.ready.unwrap_or(true),
                    serving: endpoint.conditions.serving.unwrap_or(false),
                    pod: endpoint
                        .target_ref
                        .filter(|target| target.kind == "Pod")
                        .map(|target| target.name.into()),
                }),
                Some(Ok(address)) => {
                    issues.error(path, format!("{address} is not of the slice's addressType"))
                }
                Some(Err(message)) => issues.error(path, message),
                None => issues.error(path, "an address is needed here"),
            }
        }
        Ok(Self {
            service,
            ipv6,
            ports: raw
                .ports
                .into_iter()
                .filter(|port| port.protocol == RawProtocol::Tcp)
                .filter_map(|port| Some((port.name.into(), port.port?.0)))
                .collect(),
            endpoints,
        })
    }
}
