//! Bad documents, each with the finding that its author gets.

#![expect(clippy::too_many_lines, reason = "the tables are long, their code is not")]

use super::*;

fn check(documents: &[(&str, &str)]) {
    for (text, expected) in documents {
        let mesh = Mesh::of(text);
        let findings = mesh.findings();
        let found = findings.iter().any(|finding| finding.contains(expected));
        assert!(found, "{text}\n  expected {expected}\n  got {findings:#?}");
        let refused = mesh
            .snapshot()
            .rejected
            .iter()
            .any(|finding| finding.severity == Severity::Error);
        let in_force = mesh.compiler.files()[&origin("mesh.yaml")].is_good();
        assert!(!refused || !in_force, "{text}: refused and yet in force");
    }
}

fn pod_with(metadata: &str, spec: &str, status: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: a, namespace: shop{metadata}}}\nspec: {{{spec}}}\nstatus: {{{status}}}"
    )
}

pub(super) fn service_with(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: shop}}\nspec: {{{spec}}}")
}

pub(super) fn check_each(documents: &[(String, &str)]) {
    let borrowed: Vec<_> = documents
        .iter()
        .map(|(text, expected)| (text.as_str(), *expected))
        .collect();
    check(&borrowed);
}

#[test]
fn documents_as_such() {
    check(&[
        ("a: b: c", "mesh.yaml:document 1: document: line 1: not YAML: "),
        (
            "- a",
            "mesh.yaml:document 1: document: not a resource; expected a map",
        ),
        ("kind: Pod", "document: missing field `apiVersion`"),
        ("apiVersion: v1", "document: missing field `kind`"),
        (
            "apiVersion: v1\nkind: 5",
            "document: kind: invalid type: integer `5`, expected a string",
        ),
        (
            "apiVersion: v1\nkind: Pod",
            "Pod: metadata.name: a name is needed here",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: [a]}",
            "Pod: metadata.name: invalid type: sequence, expected a string",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: A}",
            "Pod: metadata.name: \"A\" is not a name; allowed: ",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: a.b}",
            "metadata.namespace: \"a.b\" is not a namespace",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {x: 1}}",
            "metadata.labels.x: invalid type: integer `1`, expected a string",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, creationTimestamp: yesterday}",
            "metadata.creationTimestamp: `yesterday` is not a time",
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: a.b}",
            "Service: metadata.name: \"a.b\" is not a name",
        ),
        (
            "apiVersion: apps/v1\nkind: Pod\nmetadata: {name: a}",
            "apiVersion: there is no kind Pod of apps/v1; did you mean Pod of v1?",
        ),
        (
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HttpRoute",
            "kind: there is no kind HttpRoute of gateway.networking.k8s.io/v1; did you mean HTTPRoute of gateway.networking.k8s.io/v1?",
        ),
        (
            "apiVersion: gateway.networking.k8s.io/v1alpha2\nkind: HTTPRoute",
            "apiVersion: `gateway.networking.k8s.io/v1alpha2` of HTTPRoute is not supported; allowed: gateway.networking.k8s.io/v1, ",
        ),
        (
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: a}",
            "VirtualService: kind: VirtualService of networking.istio.io/v1 is not supported by this version; supported: ",
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy",
            "is not supported by this version",
        ),
        (
            "apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute",
            "is not supported by this version",
        ),
        (
            "apiVersion: mesh-agent.dev/v1alpha1\nkind: Anything",
            "is not supported by this version",
        ),
        (
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}",
            "Deployment web: kind: kind Deployment of apps/v1 is not used by the agent",
        ),
        (
            "apiVersion: v1\nkind: List\nitems: 3",
            "document 1: document: items: a List needs an array of documents here",
        ),
        (
            "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {hostNetwork: 3}}]",
            "mesh.yaml:document 1: Pod default/a: items[0].spec.hostNetwork: invalid type: integer `3`, expected a boolean",
        ),
    ]);
}

#[test]
fn pods() {
    check_each(&[
        (
            pod_with(", labels: {a: 'b c'}", "", ""),
            "metadata.labels.a: \"b c\" is not a label's value; allowed: ",
        ),
        (
            pod_with(
                ", annotations: {mesh-agent.dev/netns: /x}",
                "nodeName: n, hostNetwork: true",
                "podIP: 10.0.0.1",
            ),
            "[mesh-agent.dev/netns]: a Pod in the host's network has no network namespace of its own",
        ),
        (
            pod_with("", "", "podIP: 10.0.0.0.1"),
            "Pod shop/a: status.podIP: `10.0.0.0.1` is not an IP address",
        ),
        (
            pod_with("", "", "podIP: 127.0.0.1"),
            "status.podIP: 127.0.0.1 is unspecified, loopback or multicast",
        ),
        (
            pod_with("", "", "podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: x}]"),
            "status.podIPs[1].ip: `x` is not",
        ),
        (
            pod_with("", "serviceAccountName: A_B", ""),
            "spec.serviceAccountName: \"A_B\" is not a name",
        ),
        (
            pod_with("", "containers: [{ports: [{name: x, containerPort: 70000}]}]", ""),
            "spec.containers[0].ports[0].containerPort: 70000 is not a port; allowed: 1 to 65535",
        ),
        (
            pod_with("", "containers: [[]]", ""),
            "spec.containers[0]: invalid type: sequence, expected a map",
        ),
        (
            pod_with(
                ", annotations: {mesh-agent.dev/netns: x}",
                "nodeName: n",
                "podIP: 10.0.0.1",
            ),
            "metadata.annotations[mesh-agent.dev/netns]: \"x\" is not a place",
        ),
        (
            pod_with(
                ", annotations: {mesh-agent.dev/netns: /run/../x}",
                "nodeName: n",
                "podIP: 10.0.0.1",
            ),
            "is not a place",
        ),
        (
            pod_with(", annotations: {mesh-agent.dev/netns: /x}", "", "podIP: 10.0.0.1"),
            "spec.nodeName: needed for a Pod that says where it runs",
        ),
        (
            pod_with(", annotations: {mesh-agent.dev/netns: /x}", "nodeName: n", ""),
            "status.podIP: needed for a Pod that says where it runs",
        ),
        (
            pod_with(
                ", annotations: {mesh-agent.dev/netns: /x, mesh-agent.dev/cgroup: /y}",
                "nodeName: n",
                "podIP: 10.0.0.1",
            ),
            "a Pod runs in one place",
        ),
        (
            pod_with(", annotations: {mesh-agent.dev/netn: /x}", "", ""),
            "metadata.annotations[mesh-agent.dev/netn]: unknown annotation; allowed: mesh-agent.dev/netns, mesh-agent.dev/cgroup, mesh-agent.dev/on-agent-down, mesh-agent.dev/fast-path",
        ),
        (
            pod_with(", annotations: {mesh-agent.dev/on-agent-down: close}", "", ""),
            "[mesh-agent.dev/on-agent-down]: `close` is unknown; allowed: hold, open",
        ),
        (
            pod_with(", annotations: {mesh-agent.dev/fast-path: never}", "", ""),
            "[mesh-agent.dev/fast-path]: `never` is unknown; allowed: auto, off",
        ),
    ]);
}

#[test]
fn services_and_slices() {
    let slice = |rest: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: a, labels: {{kubernetes.io/service-name: b}}}}\n{rest}"
        )
    };
    check_each(&[
        (
            service_with("ports: [{port: 0}]"),
            "Service shop/a: spec.ports[0].port: 0 is not a port; allowed: 1 to 65535",
        ),
        (
            service_with("ports: [{port: 80.5}]"),
            "spec.ports[0].port: invalid type: floating point `80.5`",
        ),
        (
            service_with("ports: [{port: 1, protocol: tcp}]"),
            "spec.ports[0].protocol: unknown variant `tcp`, expected one of `TCP`, `UDP`, `SCTP`",
        ),
        (
            service_with("ports: [{port: 1}, {port: 1}]"),
            "spec.ports[1].port: port 1 is there twice",
        ),
        (
            service_with("ports: [{port: 1, name: a}, {port: 2, name: a}]"),
            "spec.ports[1].name: name `a` is there twice",
        ),
        (
            service_with("ports: [{port: 1, name: A}]"),
            "spec.ports[0].name: \"A\" is not a port's name",
        ),
        (
            service_with("ports: [{port: 1, targetPort: 0}]"),
            "spec.ports[0].targetPort: 0 is not a target port",
        ),
        (
            service_with("ports: [{port: 1, targetPort: '8080'}]"),
            "spec.ports[0].targetPort: \"8080\" is a name made of digits only",
        ),
        (
            service_with("clusterIP: none"),
            "spec.clusterIP: `none` is not an IP address, or None for a headless service",
        ),
        (
            service_with("clusterIP: 10.0.0.1, clusterIPs: [10.0.0.1, 'x']"),
            "spec.clusterIPs[1]: `x` is not",
        ),
        (
            service_with("type: ExternalName, externalName: example.org"),
            "spec.type: ExternalName services are not supported by this version",
        ),
        (
            service_with("type: Clusterip"),
            "spec.type: unknown variant `Clusterip`, expected one of `ClusterIP`",
        ),
        (
            service_with("ipFamilies: [ipv4]"),
            "spec.ipFamilies[0]: unknown variant `ipv4`, expected `IPv4` or `IPv6`",
        ),
        (
            service_with("").replace(
                "namespace: shop",
                "annotations: {mesh-agent.dev/load-balancing: random}",
            ),
            "[mesh-agent.dev/load-balancing]: `random` is unknown; allowed: round-robin, least-request",
        ),
        (
            slice("addressType: FQDN\nendpoints: []"),
            "EndpointSlice default/a: addressType: FQDN is not supported",
        ),
        (
            slice("addressType: IPv4\nendpoints: [{addresses: ['fd00::1']}]"),
            "endpoints[0].addresses[0]: fd00::1 is not of the slice's addressType",
        ),
        (
            slice("addressType: IPv4\nendpoints: [{addresses: []}]"),
            "endpoints[0].addresses[0]: an address is needed here",
        ),
        (
            slice("endpoints: []"),
            "EndpointSlice default/a: missing field `addressType`",
        ),
        (
            slice("addressType: IPv4\nendpoints: []").replace("kubernetes.io/service-name", "x"),
            "the slice belongs to no service",
        ),
    ]);
}

#[test]
fn what_others_have_already() {
    let mut mesh = Mesh::new();
    mesh.set("b.yaml", &pod("reviews-1", "10.1.0.2", ""));
    mesh.set(
        "c.yaml",
        &[pod("x-1", "10.1.0.3", ""), pod("x-2", "10.1.0.2", "")].concat(),
    );
    assert_eq!(
        mesh.findings(),
        [
            "c.yaml:document 2: Pod shop/x-2: status.podIP: 10.1.0.2 is the address of Pod shop/reviews-1 already (b.yaml:document 1)"
        ]
    );
    mesh.set("a.yaml", &pod("reviews-1", "10.1.0.9", ""));
    assert_eq!(
        mesh.findings(),
        [
            "b.yaml:document 1: Pod shop/reviews-1: metadata.name: Pod shop/reviews-1 is there already (a.yaml:document 1); this one is not used"
        ]
    );
    assert!(
        mesh.snapshot().workloads.contains_key("shop/x-2"),
        "the address is free now"
    );
    mesh.remove("a.yaml");
    mesh.set("c.yaml", &service_with("clusterIP: 10.1.0.2"));
    assert_eq!(mesh.findings().len(), 1);
    assert!(
        mesh.findings()[0].contains("spec.clusterIP: 10.1.0.2 is the address of Pod shop/reviews-1 already")
    );
    assert!(mesh.snapshot().services.is_empty());
}

#[test]
fn hostile_names_never_reach_the_log_as_they_are() {
    for text in [
        "apiVersion: v1\nkind: \"Pod\\n\\e[2J\"",
        "apiVersion: v1\nkind: Pod\nmetadata: {name: \"a\\nb\"}",
    ] {
        for finding in Mesh::of(text).findings() {
            assert!(!finding.contains(char::is_control), "{finding:?}");
        }
    }
}
