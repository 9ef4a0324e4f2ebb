//! What a change leaves alone, and that it comes to the same as starting anew.

#![expect(clippy::too_many_lines, reason = "the tables are long, their code is not")]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use fastrand::Rng;

use super::*;

fn route(name: &str, service: &str, rule: &str) -> String {
    format!(
        "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: shop}}
spec:
  parentRefs: [{{kind: Service, group: '', name: {service}}}]
  rules: [{{{rule}}}]
"
    )
}

fn other_service() -> String {
    REVIEWS
        .replace("reviews", "stock")
        .replace("10.96.0.1", "10.96.0.2")
}

#[test]
fn a_changed_pod_touches_its_service_only() {
    let mut mesh = Mesh::new();
    mesh.set("services.yaml", &[REVIEWS, &other_service()].concat());
    mesh.set("a.yaml", &pod("reviews-1", "10.1.0.2", ""));
    mesh.set(
        "b.yaml",
        &[pod("reviews-2", "10.1.0.3", ""), pod("stock-1", "10.1.0.4", "")].concat(),
    );
    let (reviews, stock) = (mesh.service("shop/reviews"), mesh.service("shop/stock"));
    let (one, two) = (mesh.workload("shop/reviews-1"), mesh.workload("shop/reviews-2"));
    let in_flight = reviews.ports[0].endpoints[1].load.enter();

    mesh.set("a.yaml", &pod("reviews-1", "10.1.0.9", ""));
    assert_eq!(
        mesh.endpoints("shop/reviews", 80),
        ["10.1.0.3:8080", "10.1.0.9:8080"]
    );
    assert!(Arc::ptr_eq(&stock, &mesh.service("shop/stock")));
    assert!(Arc::ptr_eq(&two, &mesh.workload("shop/reviews-2")));
    assert!(!Arc::ptr_eq(&one, &mesh.workload("shop/reviews-1")));
    let endpoints = mesh.service("shop/reviews").ports[0].endpoints.clone();
    assert_eq!(
        endpoints[0].load.active(),
        1,
        "the address is the same, and so is its load"
    );
    assert!(Arc::ptr_eq(endpoints[0].workload.as_ref().unwrap(), &two));
    drop(in_flight);
    assert_eq!(endpoints[0].load.active(), 0);
}

#[test]
fn a_change_elsewhere_leaves_what_is_near_alone() {
    let mut mesh = Mesh::new();
    mesh.set("services.yaml", &[REVIEWS, &other_service()].concat());
    mesh.set(
        "near.yaml",
        &pod("reviews-1", "10.1.0.2", "").replace(
            "namespace: shop",
            "namespace: shop, annotations: {mesh-agent.dev/netns: /run/netns/x}",
        ),
    );
    let before = mesh
        .set("far.yaml", &pod("stock-1", "10.1.0.4", ""))
        .near_services;
    assert_eq!(
        before.keys().map(ToString::to_string).collect::<Vec<_>>(),
        ["shop/reviews"]
    );
    let after = mesh
        .set("far.yaml", &pod("stock-1", "10.1.0.5", ""))
        .near_services;
    assert!(after.ptr_eq(&before));
    let after = mesh.remove("near.yaml").near_services;
    assert!(after.is_empty());
}

#[test]
fn a_changed_route_leaves_endpoints_and_other_services() {
    let mut mesh = Mesh::of(&[REVIEWS, &other_service(), &pod("reviews-1", "10.1.0.2", "")].concat());
    mesh.set(
        "a.yaml",
        &route("a", "reviews", "backendRefs: [{name: reviews, port: 80}]"),
    );
    mesh.set(
        "b.yaml",
        &route(
            "b",
            "stock",
            "matches: [{path: {type: RegularExpression, value: '/x.*'}}]",
        ),
    );
    let (reviews, stock) = (mesh.service("shop/reviews"), mesh.service("shop/stock"));
    mesh.set(
        "a.yaml",
        &route("a", "reviews", "backendRefs: [{name: stock, port: 80}]"),
    );
    let changed = mesh.service("shop/reviews");
    assert!(Arc::ptr_eq(&stock, &mesh.service("shop/stock")));
    assert!(!Arc::ptr_eq(&reviews, &changed));
    assert!(Arc::ptr_eq(
        &reviews.ports[0].endpoints,
        &changed.ports[0].endpoints
    ));
    // A backend that comes and goes is the business of the routes that send to it.
    mesh.set(
        "mesh.yaml",
        &[REVIEWS, &pod("reviews-1", "10.1.0.2", "")].concat(),
    );
    assert_eq!(
        mesh.service("shop/reviews").ports[0].routes[0].backends[0].service,
        None
    );
    mesh.set(
        "mesh.yaml",
        &[REVIEWS, &other_service(), &pod("reviews-1", "10.1.0.2", "")].concat(),
    );
    assert!(
        mesh.service("shop/reviews").ports[0].routes[0].backends[0]
            .service
            .is_some()
    );
    // Comments and formatting are nobody's business.
    let (reviews, stock) = (mesh.service("shop/reviews"), mesh.service("shop/stock"));
    let text = route("a", "reviews", "backendRefs: [{port:   80, name: stock}]");
    mesh.set("a.yaml", &format!("# a comment\n{text}"));
    assert!(Arc::ptr_eq(&reviews, &mesh.service("shop/reviews")));
    assert!(Arc::ptr_eq(&stock, &mesh.service("shop/stock")));
    // Nor is their place in the file.
    let one = mesh.workload("shop/reviews-1");
    let before = pod("first-1", "10.1.0.8", "");
    mesh.set(
        "mesh.yaml",
        &[
            &before,
            REVIEWS,
            &other_service(),
            &pod("reviews-1", "10.1.0.2", ""),
        ]
        .concat(),
    );
    assert!(Arc::ptr_eq(&reviews, &mesh.service("shop/reviews")));
    assert!(Arc::ptr_eq(&one, &mesh.workload("shop/reviews-1")));
    assert_eq!(
        mesh.snapshot().sources["Pod/shop/reviews-1"].to_string(),
        "mesh.yaml:document 4"
    );
}

#[test]
fn a_changed_policy_replaces_workloads_and_their_endpoints() {
    let mut mesh = Mesh::of(
        &[
            REVIEWS,
            &pod("reviews-1", "10.1.0.2", ""),
            &pod("other-1", "10.1.0.3", ""),
        ]
        .concat(),
    );
    let other = mesh.workload("shop/other-1");
    mesh.set(
        "policy.yaml",
        "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: a, namespace: shop}
spec: {selector: {matchLabels: {app: reviews}}, mtls: {mode: STRICT}}
",
    );
    assert!(Arc::ptr_eq(&other, &mesh.workload("shop/other-1")));
    let endpoint = mesh.service("shop/reviews").ports[0].endpoints[0].clone();
    assert_eq!(endpoint.workload.unwrap().mtls.default, MtlsMode::Strict);
    mesh.remove("policy.yaml");
    let endpoint = mesh.service("shop/reviews").ports[0].endpoints[0].clone();
    assert_eq!(endpoint.workload.unwrap().mtls.default, MtlsMode::Permissive);
}

#[test]
fn a_bad_document_leaves_its_last_good_version_in_force() {
    let mut mesh = Mesh::of(
        &[
            REVIEWS.to_owned(),
            pod("reviews-1", "10.1.0.2", ""),
            pod("reviews-2", "10.1.0.3", ""),
        ]
        .concat(),
    );
    let (service, one, two) = (
        mesh.service("shop/reviews"),
        mesh.workload("shop/reviews-1"),
        mesh.workload("shop/reviews-2"),
    );
    // Named, but wrong: its last version stays, the others go on changing.
    mesh.set(
        "mesh.yaml",
        &[
            REVIEWS.to_owned(),
            pod("reviews-1", "10.1.0", ""),
            pod("reviews-2", "10.1.0.4", ""),
        ]
        .concat(),
    );
    assert_eq!(mesh.findings().len(), 1);
    assert!(
        mesh.findings()[0].ends_with("; the last good version stays in force"),
        "{:?}",
        mesh.findings()
    );
    assert!(Arc::ptr_eq(&one, &mesh.workload("shop/reviews-1")));
    assert_eq!(
        mesh.endpoints("shop/reviews", 80),
        ["10.1.0.2:8080", "10.1.0.4:8080"]
    );
    // Not even its name can be read: everything that is missing stays.
    mesh.set(
        "mesh.yaml",
        &[REVIEWS, "---\nkind: [Pod\n", &pod("reviews-2", "10.1.0.3", "")].concat(),
    );
    assert_eq!(mesh.findings().len(), 1);
    assert!(Arc::ptr_eq(&one, &mesh.workload("shop/reviews-1")));
    assert_eq!(*mesh.workload("shop/reviews-2"), *two);
    assert_eq!(*mesh.service("shop/reviews"), *mesh.service("shop/reviews"));
    // Taken out on purpose, it goes.
    mesh.set(
        "mesh.yaml",
        &[REVIEWS, &pod("reviews-2", "10.1.0.3", "")].concat(),
    );
    assert!(mesh.findings().is_empty());
    assert!(!mesh.snapshot().workloads.contains_key("shop/reviews-1"));
    drop(service);
}

#[test]
fn what_is_written_as_before_is_not_parsed_again() {
    let name = Path::new("mesh.yaml");
    let before = pod("reviews-1", "10.1.0.2", "");
    let mut old = File::parse(name, &[&before, REVIEWS].concat());
    assert!(old.take_texts().iter().all(|text| text.json.is_some()));
    let first = pod("first-1", "10.1.0.9", "");
    let mut new = File::parse_after(
        name,
        &[&*first, &before, "---\nkind: [\n", REVIEWS].concat(),
        &old,
    );
    let texts = new.take_texts();
    let parsed: Vec<_> = texts
        .iter()
        .map(|text| (text.number, &*text.name, text.json.is_some()))
        .collect();
    let expected = [
        (1, "Pod shop/first-1", true),
        (2, "Pod shop/reviews-1", false),
        (4, "Service shop/reviews", false),
    ];
    assert_eq!(parsed, expected);
    // An error is found again, in its new place.
    let again = File::parse_after(name, &["# a comment\n", "---\nkind: [\n"].concat(), &new);
    assert!(again.has_errors());
}

/// Everything that a snapshot says, in an order that does not depend on its history.
fn canonical(snapshot: &Snapshot) -> String {
    fn sorted<K: Ord + std::fmt::Debug, V: std::fmt::Debug>(map: impl Iterator<Item = (K, V)>) -> String {
        format!("{:#?}\n", map.collect::<BTreeMap<_, _>>())
    }
    let mut text = sorted(snapshot.workloads.iter());
    text += &sorted(snapshot.local_workloads.keys().map(|uid| (uid, ())));
    text += &sorted(snapshot.workloads_by_address.iter());
    text += &sorted(snapshot.services.iter());
    text += &sorted(
        snapshot
            .services_by_vip
            .iter()
            .map(|(vip, service)| (vip, &service.key)),
    );
    text += &sorted(snapshot.targets.iter());
    text += &sorted(snapshot.sources.iter());
    let _ = write!(text, "{:#?}", snapshot.rejected);
    text
}

/// A random document out of few, so that they meet each other often.
fn document(rng: &mut Rng) -> String {
    let (n, ip) = (rng.u8(1..4), rng.u8(1..6));
    let namespace = *rng.choice(&["shop", "bank"]).unwrap();
    let app = *rng.choice(&["a", "b"]).unwrap();
    let head = |api: &str, kind: &str, more: &str| {
        format!(
            "---\napiVersion: {api}\nkind: {kind}\nmetadata: {{name: n{n}, namespace: {namespace}{more}}}\n"
        )
    };
    match rng.u8(0..8) {
        0 | 1 => {
            let phase = rng.choice(&["Running", "Running", "Succeeded"]).unwrap();
            let ready = rng.choice(&["True", "True", "False"]).unwrap();
            let host = rng.u8(0..5) == 0;
            // A pod of the host's network namespace has none of its own.
            let place = match rng.u8(0..3) {
                0 if !host => format!(", annotations: {{mesh-agent.dev/netns: /run/netns/n{n}}}"),
                _ => String::new(),
            };
            head("v1", "Pod", &format!(", labels: {{app: {app}}}{place}"))
                + &format!(
                    "spec: {{nodeName: node-a, hostNetwork: {host}}}\nstatus: {{podIP: 10.0.0.{ip}, phase: {phase}, conditions: [{{type: Ready, status: '{ready}'}}]}}\n"
                )
        }
        2 | 3 => {
            let address = match rng.u8(0..4) {
                0 => "clusterIP: None, ".to_owned(),
                1 => String::new(),
                _ => format!("clusterIP: 10.0.0.{ip}, "),
            };
            let port = rng.u8(80..82);
            let name = rng.choice(&["http", "tcp", "x"]).unwrap();
            head("v1", "Service", "")
                + &format!(
                    "spec: {{{address}selector: {{app: {app}}}, ports: [{{name: {name}, port: {port}, targetPort: 8080}}]}}\n"
                )
        }
        4 => {
            let service = rng.u8(1..4);
            let name = rng.choice(&["http", "x"]).unwrap();
            head(
                "discovery.k8s.io/v1",
                "EndpointSlice",
                &format!(", labels: {{kubernetes.io/service-name: n{service}}}"),
            ) + &format!(
                "addressType: IPv4\nports: [{{name: {name}, port: 9090}}]\nendpoints: [{{addresses: [10.0.0.{ip}], targetRef: {{kind: Pod, name: n{n}}}}}]\n"
            )
        }
        5 => {
            let (parent, backend) = (rng.u8(1..4), rng.u8(1..4));
            let (to, from) = (
                rng.choice(&["shop", "bank"]).unwrap(),
                rng.choice(&["shop", "bank"]).unwrap(),
            );
            head("gateway.networking.k8s.io/v1", "HTTPRoute", "")
                + &format!(
                    "spec: {{parentRefs: [{{kind: Service, group: '', name: n{parent}, namespace: {to}}}], rules: [{{backendRefs: [{{name: n{backend}, namespace: {from}, port: 80}}]}}]}}\n"
                )
        }
        6 => match rng.bool() {
            true => {
                let other = rng.choice(&["shop", "bank"]).unwrap();
                head("gateway.networking.k8s.io/v1beta1", "ReferenceGrant", "")
                    + &format!(
                        "spec: {{from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: {other}}}], to: [{{group: '', kind: Service}}]}}\n"
                    )
            }
            false => {
                let mode = rng.choice(&["ambient", "none"]).unwrap();
                format!(
                    "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{istio.io/dataplane-mode: {mode}}}}}\n"
                )
            }
        },
        _ => {
            let mode = rng.choice(&["STRICT", "PERMISSIVE", "UNSET"]).unwrap();
            let selector = match rng.bool() {
                true => format!("selector: {{matchLabels: {{app: {app}}}}}, "),
                false => String::new(),
            };
            let text = head("security.istio.io/v1", "PeerAuthentication", "")
                + &format!("spec: {{{selector}mtls: {{mode: {mode}}}}}\n");
            match rng.bool() {
                true => text.replace(&format!("namespace: {namespace}"), "namespace: istio-system"),
                false => text,
            }
        }
    }
}

#[test]
fn any_history_comes_to_the_same_as_starting_anew() {
    for seed in 0..30 {
        let mut rng = Rng::with_seed(seed);
        let mut mesh = Mesh::new();
        let mut texts: BTreeMap<String, String> = BTreeMap::new();
        for step in 0..40 {
            let file = format!("{}.yaml", rng.u8(0..4));
            if rng.u8(0..5) == 0 {
                texts.remove(&file);
                mesh.remove(&file);
            } else {
                let count = rng.usize(0..6);
                let text: String = (0..count).map(|_| document(&mut rng)).collect();
                mesh.set(&file, &text);
                texts.insert(file, text);
            }
            let mut anew = Mesh::new();
            for (file, text) in &texts {
                anew.set(file, text);
            }
            let (got, expected) = (canonical(mesh.snapshot()), canonical(anew.snapshot()));
            if got != expected {
                let different = got.lines().zip(expected.lines()).find(|(a, b)| a != b);
                panic!("seed {seed}, step {step}: {different:?}\n{texts:#?}");
            }
        }
    }
}
