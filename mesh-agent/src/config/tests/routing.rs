//! Routes: precedence, ownership, backends.

use std::time::Duration;

use super::*;
use crate::model::{Backend, MethodMatch, PathMatch, RouteRule, StringMatch};

fn service(namespace: &str, name: &str, ip: u8) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{clusterIP: 10.96.0.{ip}, ports: [{{name: http, port: 80}}, {{name: tcp, port: 90}}, {{name: web, port: 8080}}]}}
"
    )
}

fn route(metadata: &str, parent: &str, rules: &str) -> String {
    format!(
        "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{{metadata}}}
spec:
  parentRefs: [{{kind: Service, group: '', {parent}}}]
  rules: {rules}
"
    )
}

fn names(rules: &[RouteRule]) -> Vec<&str> {
    rules.iter().map(|rule| &*rule.name).collect()
}

fn targets(backends: &[Backend]) -> Vec<Option<String>> {
    let name = |backend: &Backend| {
        backend
            .service
            .as_ref()
            .map(|(key, port)| format!("{key}:{port}"))
    };
    backends.iter().map(name).collect()
}

/// From the first to be tried to the last, each with a name of its own.
const IN_ORDER: [(&str, &str); 15] = [
    ("exact-method", "path: {type: Exact, value: /a}, method: GET"),
    ("exact", "path: {type: Exact, value: /a}"),
    ("regex-long", "path: {type: RegularExpression, value: '/a.*/b.*'}"),
    ("regex", "path: {type: RegularExpression, value: '/.*'}"),
    (
        "prefix-long-method",
        "path: {value: /long/and/longer/and/longest}, method: GET",
    ),
    (
        "prefix-long-headers",
        "path: {value: /long/and/longer/and/longest}, headers: [{name: a, value: x}, {name: b, value: x}]",
    ),
    (
        "prefix-long-header-query",
        "path: {value: /long/and/longer/and/longest/}, headers: [{name: a, value: x}], queryParams: [{name: a, value: x}]",
    ),
    (
        "prefix-long-header",
        "path: {value: /long/and/longer/and/longest}, headers: [{name: a, value: x}]",
    ),
    (
        "prefix-long-query",
        "path: {value: /long/and/longer/and/longest}, queryParams: [{name: a, value: x}]",
    ),
    ("prefix-long", "path: {value: /long/and/longer/and/longest}"),
    ("prefix-short-method", "path: {value: /long}, method: GET"),
    ("any-method", "method: GET"),
    (
        "any-headers",
        "headers: [{name: a, value: x}, {name: b, value: x}]",
    ),
    ("any-query", "queryParams: [{name: a, value: x}]"),
    ("any", "path: {value: /}"),
];

#[test]
fn precedence_is_the_gateway_apis() {
    let mut rng = fastrand::Rng::with_seed(7);
    for _ in 0..30 {
        let mut shuffled = IN_ORDER;
        rng.shuffle(&mut shuffled);
        let mut text = service("shop", "reviews", 1);
        for (index, routes) in shuffled.chunks(4).enumerate() {
            let rules: Vec<_> = routes
                .iter()
                .map(|(name, matches)| format!("{{name: {name}, matches: [{{{matches}}}]}}"))
                .collect();
            text += &route(
                &format!("name: r{index}, namespace: shop"),
                "name: reviews",
                &format!("[{}]", rules.join(", ")),
            );
        }
        let mesh = Mesh::of(&text);
        assert_eq!(mesh.findings(), [""; 0]);
        let service = mesh.service("shop/reviews");
        let got: Vec<_> = names(&service.ports[0].routes)
            .iter()
            .map(|name| name.rsplit('/').next().unwrap())
            .collect();
        let expected = IN_ORDER.map(|(name, _)| name);
        assert_eq!(got, expected);
    }
}

#[test]
fn ties_go_to_the_oldest_then_by_name_then_by_place() {
    let text = [
        service("shop", "reviews", 1),
        route("name: b, namespace: shop", "name: reviews", "[{}]"),
        route(
            "name: a, namespace: shop",
            "name: reviews",
            "[{name: x}, {matches: [{path: {value: /}}, {}]}]",
        ),
        route(
            "name: d, namespace: shop, creationTimestamp: '2026-01-02T00:00:00Z'",
            "name: reviews",
            "[{}]",
        ),
        route(
            "name: e, namespace: shop, creationTimestamp: '2026-01-01T00:00:00Z'",
            "name: reviews",
            "[{}]",
        ),
    ]
    .concat();
    let service = Mesh::of(&text).service("shop/reviews");
    assert_eq!(
        names(&service.ports[0].routes),
        [
            "shop/e/0", "shop/d/0", "shop/a/x", "shop/a/1", "shop/a/1", "shop/b/0"
        ]
    );
}

#[test]
fn a_route_means_the_ports_that_it_names_and_that_speak_http() {
    for (parent, expected) in [
        ("name: reviews", [true, false, true]),
        ("name: reviews, port: 80", [true, false, false]),
        ("name: reviews, sectionName: web", [false, false, true]),
        ("name: reviews, sectionName: web, port: 80", [false, false, false]),
        ("name: reviews, port: 90", [false, false, false]),
        ("name: other", [false, false, false]),
    ] {
        let mesh = Mesh::of(
            &[
                service("shop", "reviews", 1),
                route("name: a, namespace: shop", parent, "[{}]"),
            ]
            .concat(),
        );
        let service = mesh.service("shop/reviews");
        let got: Vec<_> = service.ports.iter().map(|port| !port.routes.is_empty()).collect();
        assert_eq!(got, expected, "{parent}");
        // A route that does nothing says so.
        let nothing = expected == [false; 3];
        let warned = mesh
            .findings()
            .iter()
            .any(|finding| finding.contains("spec.parentRefs[0]: "));
        assert_eq!(nothing, warned, "{parent}: {:?}", mesh.findings());
    }
}

#[test]
fn routes_of_other_namespaces_act_on_their_own_clients() {
    let mesh = Mesh::of(
        &[
            service("shop", "reviews", 1),
            service("bank", "reviews", 2),
            route(
                "name: own, namespace: shop",
                "name: reviews",
                "[{backendRefs: [{name: reviews, port: 80}]}]",
            ),
            route(
                "name: theirs, namespace: bank",
                "name: reviews, namespace: shop",
                "[{backendRefs: [{name: reviews, namespace: shop, port: 80}, {name: reviews, port: 80}]}]",
            ),
        ]
        .concat(),
    );
    assert_eq!(mesh.findings(), [""; 0]);
    let service = mesh.service("shop/reviews");
    let port = service.port(80).unwrap();
    assert_eq!(names(&port.routes), ["shop/own/0"]);
    assert_eq!(names(port.routes_for("bank")), ["bank/theirs/0"]);
    assert_eq!(names(port.routes_for("shop")), ["shop/own/0"]);
    assert_eq!(names(port.routes_for("elsewhere")), ["shop/own/0"]);
    assert_eq!(
        targets(&port.routes_for("bank")[0].backends),
        [
            Some("shop/reviews:80".to_owned()),
            Some("bank/reviews:80".to_owned())
        ]
    );
}

#[test]
fn backends_elsewhere_need_a_grant() {
    let grant = |from: &str, to: &str| {
        format!(
            "---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {{name: g, namespace: bank}}
spec:
  from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: {from}}}]
  to: [{{group: '', kind: Service{to}}}]
"
        )
    };
    let base = [
        service("shop", "reviews", 1),
        service("bank", "ledger", 2),
        route(
            "name: a, namespace: shop",
            "name: reviews",
            "[{backendRefs: [{name: ledger, namespace: bank, port: 80}]}]",
        ),
    ]
    .concat();
    for (grants, allowed) in [
        (String::new(), false),
        (grant("shop", ""), true),
        (grant("shop", ", name: ledger"), true),
        (grant("shop", ", name: other"), false),
        (grant("elsewhere", ""), false),
        (
            grant("shop", "").replace("namespace: bank", "namespace: shop"),
            false,
        ),
    ] {
        let mesh = Mesh::of(&format!("{base}{grants}"));
        let service = mesh.service("shop/reviews");
        let expected = allowed.then(|| "bank/ledger:80".to_owned());
        assert_eq!(
            targets(&service.ports[0].routes[0].backends),
            [expected],
            "{grants}"
        );
        assert_eq!(
            mesh.findings().len(),
            usize::from(!allowed),
            "{:?}",
            mesh.findings()
        );
    }
}

#[test]
fn backends_that_are_not_there_take_their_share() {
    let mesh = Mesh::of(&[
        service("shop", "reviews", 1),
        route(
            "name: a, namespace: shop",
            "name: reviews",
            "[{backendRefs: [{name: gone, port: 80, weight: 3}, {name: reviews, port: 81}, {name: reviews, port: 80, weight: 0}]}, {}]",
        ),
    ].concat());
    assert_eq!(
        mesh.findings(),
        [
            "mesh.yaml:document 2: HTTPRoute shop/a: spec.rules[0].backendRefs[0]: there is no Service shop/gone; its share of the requests gets 500",
            "mesh.yaml:document 2: HTTPRoute shop/a: spec.rules[0].backendRefs[1]: Service shop/reviews has no port 81; it has 80, 90, 8080; its share of the requests gets 500",
        ]
    );
    let service = mesh.service("shop/reviews");
    let rules = &service.ports[0].routes;
    assert_eq!(
        targets(&rules[0].backends),
        [None, None, Some("shop/reviews:80".to_owned())]
    );
    let weights: Vec<_> = rules[0].backends.iter().map(|backend| backend.weight).collect();
    assert_eq!(weights, [3, 1, 0]);
    assert_eq!(
        targets(&rules[1].backends),
        [None],
        "a rule that sends nowhere answers 500"
    );
}

#[test]
fn a_rule_has_all_that_was_written() {
    let mesh = Mesh::of(&[
        service("shop", "reviews", 1),
        route(
            "name: a, namespace: shop",
            "name: reviews",
            "
  - matches:
    - path: {type: PathPrefix, value: /a/}
      headers: [{name: X-A, value: one}, {name: x-b, type: RegularExpression, value: 'a|b'}]
      queryParams: [{name: q, value: '1'}]
      method: POST
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: x-set, value: s}], add: [{name: x-add, value: a}], remove: [x-gone]}
    - type: ResponseHeaderModifier
      responseHeaderModifier: {remove: [server]}
    backendRefs:
    - {name: reviews, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {remove: [x-b]}}]}
    timeouts: {request: 10s, backendRequest: 500ms}
    retry: {attempts: 5, codes: [502, 503], backoff: 100ms}
  - timeouts: {request: 0s}
    retry: {attempts: 0}",
        ),
    ].concat());
    assert_eq!(mesh.findings(), [""; 0]);
    let service = mesh.service("shop/reviews");
    let [first, second] = &service.ports[0].routes[..] else {
        panic!("{:?}", service.ports[0].routes);
    };
    assert_eq!(first.matches.path, PathMatch::Prefix("/a".into()));
    assert_eq!(first.matches.headers[0].name, "x-a");
    let StringMatch::Regex(regex) = &first.matches.headers[1].value else {
        panic!("{:?}", first.matches);
    };
    assert!(
        regex.is_match("b") && !regex.is_match("ab"),
        "the whole value has to match"
    );
    assert_eq!(first.matches.method, MethodMatch::Is(http::Method::POST));
    assert_eq!(first.edits.0.set[0].0, "x-set");
    assert_eq!(first.edits.0.add[0].1, "a");
    assert_eq!(first.edits.0.remove, ["x-gone"]);
    assert_eq!(first.edits.1.remove, ["server"]);
    assert_eq!(first.backends[0].edits.0.remove, ["x-b"]);
    assert_eq!(first.timeouts.request, Some(Duration::from_secs(10)));
    assert_eq!(first.timeouts.per_try, Some(Duration::from_millis(500)));
    assert_eq!(
        (first.retry.attempts, first.retry.backoff),
        (5, Duration::from_millis(100))
    );
    assert_eq!(first.retry.on.codes, [502, 503]);
    assert_eq!(second.matches.path, PathMatch::Any);
    assert_eq!(second.timeouts.request, None, "zero is no timeout");
    assert_eq!(second.retry.attempts, 0);
}

#[test]
fn the_examples_are_without_fault() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let settings = Mesh::new().compiler.settings().clone();
    let shop = validate(&[root.join("deploy/shop")], settings.clone());
    assert!(shop.files > 0 && shop.documents > 5);
    assert_eq!(shop.findings, []);
    // What is not for the agent is at most a warning.
    let kubernetes = validate(&[root.join("deploy/kubernetes.yaml")], settings);
    assert_eq!(kubernetes.count(Severity::Error), 0, "{:#?}", kubernetes.findings);
    AgentConfig::load(Some(&root.join("deploy/agent.yaml")), Some("node-a")).unwrap();
}
