use super::*;
use crate::config::tests::Mesh;

const MOST: usize = 4;

/// A pod of node-a in a network namespace of its own, which is captured.
fn near(name: &str, ip: &str, more: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: shop
  labels: {{app: {app}}}
  annotations: {{mesh-agent.dev/netns: /run/netns/{name}{more}}}
spec: {{nodeName: node-a}}
status: {{podIP: '{ip}'}}
",
        app = name.split('-').next().unwrap()
    )
}

fn far(name: &str, ip: &str) -> String {
    near(name, ip, "").replace("nodeName: node-a", "nodeName: node-b")
}

fn service(name: &str, vip: &str, port: &str, more: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop, annotations: {{{more}}}}}
spec: {{clusterIP: '{vip}', selector: {{app: db}}, ports: [{{name: {port}, port: 5432, targetPort: 9}}]}}
"
    )
}

/// `db` with one pod near the client `web`.
fn db() -> Vec<String> {
    vec![
        service("db", "10.96.0.1", "tcp", ""),
        near("db-0", "10.1.0.9", ""),
        near("web-0", "10.1.0.2", ""),
    ]
}

fn compile(documents: &[String]) -> (Snapshot, Captured) {
    let snapshot = Mesh::of(&documents.concat()).snapshot().clone();
    assert!(snapshot.rejected.is_empty(), "{:?}", snapshot.rejected);
    let captured = snapshot
        .local_workloads
        .values()
        .map(|workload| (key(workload), Arc::clone(workload)))
        .collect();
    (snapshot, captured)
}

/// The last number of the address.
fn key(workload: &Workload) -> Key {
    workload.addresses.first().map_or(1, |address| {
        let text = address.to_string();
        text.rsplit(['.', ':']).next().unwrap().parse().unwrap()
    })
}

/// `destination: clients -> backends`
fn planned(documents: &[String]) -> Vec<String> {
    let (snapshot, captured) = compile(documents);
    plan(&snapshot, &captured, MOST)
        .iter()
        .map(|(to, path)| {
            let backends: Vec<_> = path.backends.iter().map(|(_, at)| at).collect();
            format!("{to}: {:?} -> {backends:?}", path.clients)
        })
        .collect()
}

fn with(more: &[String]) -> Vec<String> {
    [db(), more.to_vec()].concat()
}

const POD: &str = "10.1.0.9:9: {2, 9} -> [10.1.0.9:9]";
const VIP: &str = "10.96.0.1:5432: {2, 9} -> [10.1.0.9:9]";

#[test]
fn what_is_only_copied_and_stays_here_goes_without_the_proxy() {
    assert_eq!(planned(&db()), [POD, VIP]);
    let two = with(&[near("db-1", "10.1.0.8", "")]);
    assert_eq!(
        planned(&two),
        [
            "10.1.0.8:9: {2, 8, 9} -> [10.1.0.8:9]",
            "10.1.0.9:9: {2, 8, 9} -> [10.1.0.9:9]",
            "10.96.0.1:5432: {2, 8, 9} -> [10.1.0.8:9, 10.1.0.9:9]",
        ]
    );
    let tls = [
        service("db", "10.96.0.1", "tls", ""),
        db()[1].clone(),
        db()[2].clone(),
    ];
    assert_eq!(planned(&tls), [POD, VIP]);
}

#[test]
fn what_somebody_looks_into_is_the_proxys() {
    for port in ["http", "grpc", "main"] {
        let looked_into = [
            service("db", "10.96.0.1", port, ""),
            db()[1].clone(),
            db()[2].clone(),
        ];
        assert_eq!(planned(&looked_into), [""; 0], "{port}");
    }
    // The same port of the same pod, by the service that is first by name.
    let both = with(&[service("a", "10.96.0.2", "http", "")]);
    assert_eq!(planned(&both), [""; 0]);
}

#[test]
fn what_has_routes_is_the_proxys() {
    let (mut snapshot, captured) = compile(&db());
    let service = Arc::clone(snapshot.near_services.values().next().unwrap());
    let mut ports = service.ports.clone();
    ports[0].consumer_routes.insert("other".into(), [].into());
    let routed = Arc::new(Service {
        ports,
        key: service.key.clone(),
        header: service.header.clone(),
        hostname: Arc::clone(&service.hostname),
        vips: service.vips.clone(),
        ..*service
    });
    snapshot
        .services_by_vip
        .insert(routed.vips[0], Arc::clone(&routed));
    snapshot.near_services.insert(service.key.clone(), routed);
    let left: Vec<_> = plan(&snapshot, &captured, MOST).into_keys().collect();
    assert_eq!(
        left,
        ["10.1.0.9:9".parse().unwrap()],
        "the pod itself has no routes"
    );
}

#[test]
fn one_endpoint_elsewhere_makes_the_service_the_proxys() {
    assert_eq!(planned(&with(&[far("db-1", "10.2.0.9")])), [POD]);
    // Nobody captures it.
    let slice = "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-x, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
endpoints: [{addresses: [10.1.0.9]}, {addresses: [10.9.9.9]}]
ports: [{name: tcp, port: 9}]
";
    assert_eq!(planned(&with(&[slice.to_owned()])), [POD]);
    let (snapshot, mut captured) = compile(&db());
    captured.remove(&9);
    assert_eq!(plan(&snapshot, &captured, MOST), Plan::new(), "not captured yet");
}

#[test]
fn more_backends_than_the_kernel_takes_are_the_proxys() {
    let pods: Vec<_> = (10..15)
        .map(|n| near(&format!("db-{n}"), &format!("10.1.0.{n}"), ""))
        .collect();
    let (snapshot, captured) = compile(&with(&pods[..3]));
    let vip = "10.96.0.1:5432".parse().unwrap();
    assert_eq!(plan(&snapshot, &captured, MOST)[&vip].backends.len(), 4);
    let (snapshot, captured) = compile(&with(&pods[..4]));
    assert!(!plan(&snapshot, &captured, MOST).contains_key(&vip));
}

#[test]
fn who_does_not_want_it_goes_through_the_proxy() {
    const OFF: &str = ", mesh-agent.dev/fast-path: 'off'";
    let [service_db, pod, client]: [String; 3] = db().try_into().unwrap();
    let off = service("db", "10.96.0.1", "tcp", OFF.trim_start_matches(", "));
    assert_eq!(planned(&[off, pod.clone(), client.clone()]), [""; 0]);
    let other = service("other", "10.96.0.2", "tcp", OFF.trim_start_matches(", "));
    assert_eq!(
        planned(&with(&[other])),
        [VIP],
        "the pod itself is one of that service's"
    );
    let server_off = near("db-0", "10.1.0.9", OFF);
    assert_eq!(planned(&[service_db.clone(), server_off, client]), [""; 0]);
    let client_off = near("web-0", "10.1.0.2", OFF);
    assert_eq!(
        planned(&[service_db, pod, client_off]),
        [POD, VIP].map(|line| line.replace("{2, 9}", "{9}"))
    );
}

#[test]
fn policies_of_the_server_hold() {
    let policy = |mode: &str| {
        format!(
            "---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: p, namespace: shop}}
spec: {{mtls: {{mode: {mode}}}}}
"
        )
    };
    // Both are known here, as by mTLS.
    assert_eq!(planned(&with(&[policy("STRICT")])), [POD, VIP]);
    // Clients come without an identity, which the kernel would not tell apart.
    assert_eq!(planned(&with(&[policy("DISABLE")])), [""; 0]);
}

#[test]
fn those_without_a_namespace_of_their_own_go_through_the_proxy() {
    let host = near("web-1", "10.1.0.3", "").replace("mesh-agent.dev/netns", "mesh-agent.dev/cgroup");
    assert_eq!(planned(&with(&[host])), [POD, VIP]);
}

#[test]
fn a_socket_keeps_its_family_and_dns_its_resolver() {
    let [_, pod, client]: [String; 3] = db().try_into().unwrap();
    let v6 = service("db", "fd96::1", "tcp", "");
    let v4_slice = "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-x, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
endpoints: [{addresses: [10.1.0.9]}]
ports: [{name: tcp, port: 9}]
";
    assert_eq!(
        planned(&[v6, v4_slice.to_owned(), pod.clone(), client.clone()]),
        [POD]
    );
    let dns = service("db", "10.96.0.1", "tcp", "").replace("5432", "53");
    assert_eq!(planned(&[dns, pod, client]), [POD]);
}

#[test]
fn changes_lead_from_one_plan_to_the_next() {
    let path = |backends: &[Key], clients: &[Key]| FastPath {
        backends: backends
            .iter()
            .map(|key| (*key, to(u16::try_from(*key).unwrap())))
            .collect(),
        clients: clients.iter().copied().collect(),
    };
    let old = Plan::from([
        (to(1), path(&[7], &[1, 2])),
        (to(2), path(&[7, 8], &[1])),
        (to(3), path(&[7], &[1])),
        (to(4), path(&[7], &[1])),
    ]);
    let new = Plan::from([
        (to(1), path(&[7], &[2, 3])),
        (to(2), path(&[7], &[1])),
        (to(3), path(&[7], &[1])),
        (to(5), path(&[8], &[1])),
    ]);
    let made: Vec<_> = changes(&old, &new).collect();
    assert_eq!(
        made,
        [
            Change::Close(1, to(1)),
            Change::Close(1, to(4)),
            Change::Open(3, to(1), &[(7, to(7))]),
            Change::Open(1, to(2), &[(7, to(7))]),
            Change::Open(1, to(5), &[(8, to(8))]),
        ]
    );
    assert_eq!(changes(&new, &new).count(), 0);
}

fn to(port: u16) -> SocketAddr {
    ([10, 0, 0, 1], port).into()
}
