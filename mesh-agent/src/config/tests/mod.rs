//! Whole documents through the compiler.

#![expect(clippy::too_many_lines, reason = "the tables are long, their code is not")]

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::model::{
    Destination, LoadBalancing, MtlsMode, OnAgentDown, Place, Protocol, Service, ServiceKey, Severity,
    Snapshot, Workload,
};

mod bad;
mod bad_routes;
mod incremental;
mod routing;

/// Compiles named files one after the other, as a folder's files would be.
pub(crate) struct Mesh {
    compiler: Compiler,
}

impl Mesh {
    pub(super) fn new() -> Self {
        let settings = Settings {
            node: "node-a".into(),
            trust_domain: "cluster.local".into(),
            cluster_domain: "cluster.local".into(),
        };
        Self {
            compiler: Compiler::new(settings, Vips::default()),
        }
    }

    pub(crate) fn of(text: &str) -> Self {
        let mut mesh = Self::new();
        mesh.set("mesh.yaml", text);
        mesh
    }

    /// Replaces a file's text.
    pub(super) fn set(&mut self, name: &str, text: &str) -> Snapshot {
        let origin = origin(name);
        let file = match self.compiler.files().get(&origin) {
            Some(old) => File::parse_after(Path::new(name), text, old),
            None => File::parse(Path::new(name), text),
        };
        self.compiler.update(vec![(origin, Some(file))]).clone()
    }

    pub(super) fn remove(&mut self, name: &str) -> Snapshot {
        self.compiler.update(vec![(origin(name), None)]).clone()
    }

    pub(crate) fn snapshot(&self) -> &Snapshot {
        self.compiler.snapshot()
    }

    pub(super) fn service(&self, name: &str) -> Arc<Service> {
        let (namespace, name) = name.split_once('/').unwrap();
        let key = ServiceKey {
            namespace: namespace.into(),
            name: name.into(),
        };
        self.snapshot()
            .services
            .get(&key)
            .unwrap_or_else(|| panic!("{name}: {:?}", self.findings()))
            .clone()
    }

    pub(super) fn workload(&self, name: &str) -> Arc<Workload> {
        let found = self.snapshot().workloads.get(name);
        found
            .unwrap_or_else(|| panic!("{name}: {:?}", self.findings()))
            .clone()
    }

    pub(super) fn findings(&self) -> Vec<String> {
        self.snapshot().rejected.iter().map(ToString::to_string).collect()
    }

    /// Addresses behind a service's port.
    pub(super) fn endpoints(&self, service: &str, port: u16) -> Vec<String> {
        let service = self.service(service);
        let endpoints = &service.port(port).unwrap().endpoints;
        endpoints
            .iter()
            .map(|endpoint| endpoint.address.to_string())
            .collect()
    }
}

fn origin(name: &str) -> Origin {
    Origin {
        order: 0,
        file: name.into(),
    }
}

pub(super) fn pod(name: &str, ip: &str, more: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {app}}}}}
spec: {{nodeName: node-a, serviceAccountName: {app}}}
status: {{podIP: {ip}}}
{more}
",
        app = name.split('-').next().unwrap()
    )
}

pub(super) const REVIEWS: &str = "---
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: reviews}
  ports: [{name: http, port: 80, targetPort: 8080}]
";

#[test]
fn a_pod_is_a_workload() {
    let mesh = Mesh::of(
        "
apiVersion: v1
kind: Pod
metadata:
  name: reviews-1
  namespace: shop
  labels: {app: reviews, version: v1}
  annotations: {mesh-agent.dev/netns: /run/netns/reviews-1, mesh-agent.dev/on-agent-down: hold}
  uid: '123e4567'
spec:
  nodeName: node-a
  serviceAccountName: reviews
  containers: [{name: app, image: 'x:1', ports: [{name: web, containerPort: 8080}]}]
status:
  podIP: 10.1.0.2
  podIPs: [{ip: 10.1.0.2}, {ip: 'fd00:1::2'}]
",
    );
    assert_eq!(mesh.findings(), [""; 0]);
    let workload = mesh.workload("shop/reviews-1");
    assert_eq!(
        workload.identity.to_string(),
        "spiffe://cluster.local/ns/shop/sa/reviews"
    );
    assert_eq!(workload.addresses.len(), 2);
    assert_eq!(workload.place, Some(Place::Netns("/run/netns/reviews-1".into())));
    assert_eq!(workload.on_agent_down, OnAgentDown::Hold);
    assert!(workload.meshed);
    let found = mesh.snapshot().destination("[fd00:1::2]:8080".parse().unwrap());
    assert!(matches!(found, Destination::Workload(found) if Arc::ptr_eq(&found, &workload)));
    assert_eq!(mesh.snapshot().local_workloads.len(), 1);
    let source = mesh.snapshot().sources.get("Pod/shop/reviews-1").unwrap();
    assert_eq!(source.to_string(), "mesh.yaml:document 1");
}

#[test]
fn who_is_meshed_and_who_is_captured_here() {
    // (namespace label, pod label, annotation, node, host network) -> (meshed, captured here)
    let netns = "mesh-agent.dev/netns: /run/netns/x";
    let cgroup = "mesh-agent.dev/cgroup: /system.slice/x.service";
    for (namespace, label, annotation, node, expected) in [
        ("", "", netns, "node-a", (true, true)),
        ("", "", netns, "node-b", (true, false)),
        ("", "none", netns, "node-a", (false, false)),
        ("none", "", netns, "node-a", (false, false)),
        ("none", "ambient", netns, "node-a", (true, true)),
        ("", "", "", "node-a", (false, false)),
        ("ambient", "", "", "node-b", (true, false)),
        ("ambient", "none", "", "node-b", (false, false)),
        ("", "", cgroup, "node-a", (false, true)),
    ] {
        let mesh = Mesh::of(&format!(
            "
apiVersion: v1
kind: Namespace
metadata: {{name: shop, labels: {{istio.io/dataplane-mode: '{namespace}'}}}}
---
apiVersion: v1
kind: Pod
metadata:
  name: x
  namespace: shop
  labels: {{{}}}
  annotations: {{{annotation}}}
spec: {{nodeName: {node}}}
status: {{podIP: 10.1.0.2}}
",
            match label {
                "" => String::new(),
                label => format!("istio.io/dataplane-mode: {label}"),
            }
        ));
        assert_eq!(mesh.findings(), [""; 0]);
        let workload = mesh.workload("shop/x");
        let got = (workload.meshed, workload.place.is_some());
        assert_eq!(got, expected, "{namespace:?} {label:?} {annotation:?} {node}");
    }
}

#[test]
fn selectors_find_ready_pods() {
    let deleting = pod("reviews-3", "10.1.0.4", "").replace(
        "name: reviews-3,",
        "name: reviews-3, deletionTimestamp: '2026-01-01T00:00:00Z',",
    );
    let unready = pod("reviews-4", "10.1.0.5", "").replace(
        "10.1.0.5}",
        "10.1.0.5, conditions: [{type: Ready, status: 'False'}]}",
    );
    let ended = pod("reviews-5", "10.1.0.6", "").replace("10.1.0.6}", "10.1.0.6, phase: Succeeded}");
    let mesh = Mesh::of(
        &[
            REVIEWS.to_owned(),
            pod("reviews-2", "10.1.0.3", ""),
            pod("reviews-1", "10.1.0.2", ""),
            pod("other-1", "10.1.0.9", ""),
            deleting,
            unready,
            ended,
        ]
        .concat(),
    );
    assert_eq!(mesh.findings(), [""; 0]);
    assert_eq!(
        mesh.endpoints("shop/reviews", 80),
        ["10.1.0.2:8080", "10.1.0.3:8080"]
    );
    let service = mesh.service("shop/reviews");
    assert_eq!(&*service.hostname, "reviews.shop.svc.cluster.local");
    assert_eq!(service.ports[0].protocol, Protocol::Http1);
    assert_eq!(service.ports[0].balancing, LoadBalancing::LeastRequest);
    assert!(
        mesh.snapshot().workloads.contains_key("shop/reviews-3"),
        "a deleted pod still drains"
    );
    assert!(
        !mesh.snapshot().workloads.contains_key("shop/reviews-5"),
        "an ended pod has no address any more"
    );
    let target: SocketAddr = "10.1.0.2:8080".parse().unwrap();
    assert_eq!(mesh.snapshot().target_protocol(target), Protocol::Http1);
    assert_eq!(
        mesh.snapshot().target_service(target).map(|found| &found.key),
        Some(&service.key)
    );
}

#[test]
fn slices_replace_selectors() {
    let slice = "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: reviews-x, namespace: shop, labels: {kubernetes.io/service-name: reviews}}
addressType: IPv4
ports: [{name: http, port: 9090}]
endpoints:
- {addresses: [10.1.0.3], conditions: {ready: true}}
- {addresses: [10.1.0.7]}
- {addresses: [10.1.0.8], conditions: {ready: false, serving: true, terminating: true}}
";
    let mut mesh = Mesh::of(
        &[
            REVIEWS,
            &pod("reviews-1", "10.1.0.2", ""),
            &pod("reviews-2", "10.1.0.3", ""),
            slice,
        ]
        .concat(),
    );
    assert_eq!(
        mesh.endpoints("shop/reviews", 80),
        ["10.1.0.3:9090", "10.1.0.7:9090"]
    );
    let endpoints = mesh.service("shop/reviews").ports[0].endpoints.clone();
    assert!(endpoints[0].workload.is_some() && endpoints[1].workload.is_none());

    let none_ready = slice
        .replace("ready: true", "ready: false")
        .replace("- {addresses: [10.1.0.7]}\n", "");
    mesh.set("mesh.yaml", &[REVIEWS, &none_ready].concat());
    assert_eq!(mesh.endpoints("shop/reviews", 80), ["10.1.0.8:9090"]);
}

#[test]
fn ports_and_addresses_of_services() {
    let mesh = Mesh::of(
        "
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {containers: [{ports: [{name: sql, containerPort: 3306}, {name: sql, containerPort: 1, protocol: UDP}]}]}
status: {podIP: 10.1.0.2, podIPs: [{ip: 10.1.0.2}, {ip: 'fd00:1::2'}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop, annotations: {mesh-agent.dev/load-balancing: round-robin}}
spec:
  selector: {app: db}
  ipFamilies: [IPv6]
  ports: [{name: mysql-main, port: 3306, targetPort: sql}, {name: other, port: 1, targetPort: none}, {name: dns, port: 53, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: db-pods, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 3306}]}
---
apiVersion: v1
kind: Service
metadata: {name: both, namespace: shop}
spec: {clusterIP: 10.96.0.9, clusterIPs: [10.96.0.9, 'fd00:96::9'], ports: [{port: 80, appProtocol: kubernetes.io/h2c}]}
",
    );
    assert_eq!(mesh.findings(), [""; 0]);
    let db = mesh.service("shop/db");
    assert_eq!(db.ports.len(), 2);
    assert_eq!(db.ports[0].protocol, Protocol::Tcp);
    assert_eq!(db.ports[0].balancing, LoadBalancing::RoundRobin);
    assert_eq!(mesh.endpoints("shop/db", 3306), ["[fd00:1::2]:3306"]);
    assert_eq!(mesh.endpoints("shop/db", 1), [""; 0]);
    assert!(matches!(db.vips[..], [IpAddr::V4(v4), IpAddr::V6(_)] if v4.octets()[..2] == [240, 240]));
    let found = mesh.snapshot().destination(SocketAddr::new(db.vips[1], 3306));
    assert!(matches!(found, Destination::Service(_, 3306)));

    let pods = mesh.service("shop/db-pods");
    assert!(pods.headless && pods.vips.is_empty());
    assert_eq!(mesh.endpoints("shop/db-pods", 3306), ["10.1.0.2:3306"]);
    let both = mesh.service("shop/both");
    assert_eq!(both.vips.len(), 2);
    assert_eq!(both.ports[0].protocol, Protocol::Http2);
}

#[test]
fn protocols_follow_app_protocol_then_name() {
    for (port, expected) in [
        ("name: http", Protocol::Http1),
        ("name: http-web", Protocol::Http1),
        ("name: httpx", Protocol::Detect),
        ("name: http2", Protocol::Http2),
        ("name: grpc-api", Protocol::Grpc),
        ("name: grpc-web", Protocol::Http1),
        ("name: https", Protocol::Tls),
        ("name: tls-x", Protocol::Tls),
        ("name: redis", Protocol::Tcp),
        ("name: mysql", Protocol::Tcp),
        ("name: web", Protocol::Detect),
        ("nodePort: 30000", Protocol::Detect),
        ("name: tcp, appProtocol: http", Protocol::Http1),
        ("name: http, appProtocol: kubernetes.io/wss", Protocol::Tls),
        ("name: http, appProtocol: kubernetes.io/ws", Protocol::Http1),
        ("name: http, appProtocol: linkerd.io/opaque", Protocol::Tcp),
        ("name: http, appProtocol: example.com/own", Protocol::Detect),
    ] {
        let text = format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {{ports: [{{port: 1, {port}}}]}}}}"
        );
        let mesh = Mesh::of(&text);
        assert_eq!(mesh.service("default/a").ports[0].protocol, expected, "{port}");
    }
}

#[test]
fn the_narrowest_policy_that_says_anything_counts() {
    let policy = |namespace: &str, name: &str, spec: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
        )
    };
    let mesh_wide = policy("istio-system", "default", "{mtls: {mode: STRICT}}");
    let namespace = policy("shop", "default", "{mtls: {mode: DISABLE}}");
    let unset = policy("shop", "default", "{}");
    let workload = policy(
        "shop",
        "reviews",
        "{selector: {matchLabels: {app: reviews}}, mtls: {mode: PERMISSIVE}}",
    );
    let ports = policy(
        "shop",
        "reviews",
        "{selector: {matchLabels: {app: reviews}}, portLevelMtls: {'8080': {mode: STRICT}, '9090': {mode: UNSET}}}",
    );
    let rooted = policy(
        "istio-system",
        "x",
        "{selector: {matchLabels: {app: reviews}}, mtls: {mode: DISABLE}}",
    );
    let older = policy("shop", "z", "{mtls: {mode: STRICT}}")
        .replace("name: z", "name: z, creationTimestamp: '2020-01-01T00:00:00Z'");
    for (policies, default, strict_8080, down) in [
        (vec![], MtlsMode::Permissive, false, OnAgentDown::Open),
        (vec![&mesh_wide], MtlsMode::Strict, true, OnAgentDown::Hold),
        (
            vec![&mesh_wide, &namespace],
            MtlsMode::Disable,
            false,
            OnAgentDown::Open,
        ),
        (
            vec![&mesh_wide, &unset],
            MtlsMode::Strict,
            true,
            OnAgentDown::Hold,
        ),
        (
            vec![&mesh_wide, &namespace, &workload],
            MtlsMode::Permissive,
            false,
            OnAgentDown::Open,
        ),
        (
            vec![&namespace, &ports],
            MtlsMode::Disable,
            true,
            OnAgentDown::Hold,
        ),
        (vec![&rooted], MtlsMode::Permissive, false, OnAgentDown::Open),
        (
            vec![&namespace, &older],
            MtlsMode::Strict,
            true,
            OnAgentDown::Hold,
        ),
    ] {
        let mut text = pod("reviews-1", "10.1.0.2", "");
        text.extend(policies.iter().map(|text| text.as_str()));
        let mesh = Mesh::of(&text);
        let workload = mesh.workload("shop/reviews-1");
        assert_eq!(workload.mtls.default, default, "{policies:?}");
        assert_eq!(
            workload.mtls.mode(8080) == MtlsMode::Strict,
            strict_8080,
            "{policies:?}"
        );
        assert_eq!(workload.mtls.mode(9090), default, "{policies:?}");
        assert_eq!(workload.on_agent_down, down, "{policies:?}");
    }
}
