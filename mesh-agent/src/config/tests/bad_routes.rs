//! Bad routes and policies, each with the finding that its author gets.

#![expect(clippy::too_many_lines, reason = "the tables are long, their code is not")]

use super::bad::{check_each, service_with};
use super::*;

fn route_with(spec: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: a, namespace: shop}}\nspec: {{{spec}}}"
    )
}

/// A route whose only rule has `rule` in it.
fn rule_with(rule: &str) -> String {
    route_with(&format!(
        "parentRefs: [{{kind: Service, group: '', name: b}}], rules: [{{{rule}}}]"
    ))
}

fn policy_with(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: a, namespace: shop}}\nspec: {{{spec}}}"
    )
}

#[test]
fn routes_as_such() {
    let parent = "parentRefs: [{kind: Service, group: '', name: b}]";
    check_each(&[
        (
            route_with(""),
            "HTTPRoute shop/a: spec.rules: at least one rule is needed here",
        ),
        (
            route_with("rules: [{}]"),
            "spec.parentRefs: no parent is a Service",
        ),
        (
            route_with("parentRefs: [{name: gw}], rules: [{}]"),
            "spec.parentRefs: no parent is a Service",
        ),
        (
            route_with("parentRef: []"),
            "spec.parentRef: unknown field `parentRef`, expected one of `parentRefs`",
        ),
        (
            route_with(&format!("{parent}, rules: [{{}}], hostnames: [a.b]")),
            "spec.hostnames: not supported for routes of a Service",
        ),
        (
            route_with("parentRefs: [{kind: Service, group: '', name: B}], rules: [{}]"),
            "spec.parentRefs[0].name: \"B\" is not a name",
        ),
        (
            route_with("parentRefs: [{kind: Service, group: '', name: b, port: 99999}], rules: [{}]"),
            "spec.parentRefs[0].port: 99999 is not a port",
        ),
        (
            route_with(&format!("{parent}, rules: [{}]", ["{}"; 17].join(", "))),
            "spec.rules: 17 rules; allowed: 16",
        ),
        (
            rule_with("").replace("\nspec", "\nspecs: {}\nspec"),
            "specs: unknown field `specs`, expected one of apiVersion, kind, metadata, spec, status",
        ),
        (
            rule_with("sessionPersistence: {}"),
            "spec.rules[0].sessionPersistence: not supported by this version",
        ),
        (
            rule_with("match: []"),
            "spec.rules[0].match: unknown field `match`, expected one of `name`, `matches`",
        ),
        (
            rule_with("backendRefs: [{name: b}]"),
            "spec.rules[0].backendRefs[0].port: a Service needs a port here",
        ),
        (
            rule_with("backendRefs: [{name: b, port: 80, weight: -1}]"),
            "spec.rules[0].backendRefs[0].weight: invalid value: integer `-1`",
        ),
        (
            rule_with("backendRefs: [{name: b, port: 80, weight: 2000000}]"),
            "spec.rules[0].backendRefs[0].weight: 2000000 is too much; allowed: 0 to 1000000",
        ),
        (
            rule_with("backendRefs: [{name: b, kind: Bucket, group: x}]"),
            "spec.rules[0].backendRefs[0]: not supported by this version; allowed: kind Service",
        ),
        (
            rule_with("timeouts: {request: 10}"),
            "spec.rules[0].timeouts.request: invalid type: integer `10`, expected a string",
        ),
        (
            rule_with("timeouts: {request: 10x}"),
            "spec.rules[0].timeouts.request: `10x` is not a duration; allowed: ",
        ),
        (
            rule_with("timeouts: {request: 1s, backendRequest: 2s}"),
            "spec.rules[0].timeouts.backendRequest: 2s is longer than the whole request may take (1s)",
        ),
        (
            rule_with("retry: {codes: [200]}"),
            "spec.rules[0].retry.codes[0]: 200 cannot be tried again; allowed: 400 to 599",
        ),
        (
            rule_with("retry: {attempts: 1000}"),
            "spec.rules[0].retry.attempts: 1000 is too many",
        ),
        (
            rule_with("retry: {backoff: soon}"),
            "spec.rules[0].retry.backoff: `soon` is not a duration",
        ),
    ]);
}

#[test]
fn matches_and_filters() {
    let long = "x".repeat(2000);
    let regex = format!(
        "matches: [{{path: {{type: RegularExpression, value: '(({}){{1000}}){{1000}}'}}}}]",
        "a"
    );
    check_each(&[
        (
            rule_with("matches: [{path: {type: Exactly, value: /}}]"),
            "mesh.yaml:document 1: HTTPRoute shop/a: spec.rules[0].matches[0].path.type: unknown variant `Exactly`, expected one of `Exact`, `PathPrefix`, `RegularExpression`",
        ),
        (
            rule_with("matches: [{path: {value: a}}]"),
            "spec.rules[0].matches[0].path.value: \"a\" is not a path; it begins with `/`",
        ),
        (
            rule_with("matches: [{path: {value: /a/../b}}]"),
            "path.value: a path cannot contain `/../`",
        ),
        (
            rule_with("matches: [{path: {value: /a//b}}]"),
            "path.value: a path cannot contain `//`",
        ),
        (
            rule_with("matches: [{path: {value: /a/..}}]"),
            "path.value: a path cannot end in `/..`",
        ),
        (
            rule_with("matches: [{path: {value: '/a?b'}}]"),
            "path.value: a path has neither blanks, `?`",
        ),
        (
            rule_with(&format!("matches: [{{path: {{value: /{long}}}}}]")),
            "path.value: 2001 bytes; allowed: 1024",
        ),
        (
            rule_with("matches: [{path: {type: RegularExpression, value: '('}}]"),
            "spec.rules[0].matches[0].path.value: not a regular expression (RE2 syntax): unclosed group",
        ),
        (
            rule_with("matches: [{path: {type: RegularExpression, value: 'a)|(b'}}]"),
            "not a regular expression",
        ),
        (
            rule_with("matches: [{path: {type: RegularExpression, value: '(a)\\1'}}]"),
            "not a regular expression",
        ),
        (rule_with(&regex), "the expression is too big; allowed: "),
        (
            rule_with("matches: [{method: get}]"),
            "spec.rules[0].matches[0].method: unknown variant `get`, expected one of `GET`",
        ),
        (
            rule_with("matches: [{headers: [{name: 'a b', value: x}]}]"),
            "spec.rules[0].matches[0].headers[0].name: \"a b\" is not a header's name",
        ),
        (
            rule_with("matches: [{headers: [{name: a}]}]"),
            "spec.rules[0].matches[0].headers[0]: missing field `value`",
        ),
        (
            rule_with("matches: [{headers: [{name: a, value: x}, {name: A, value: y}]}]"),
            "headers[1].name: a is there already; this entry has no effect",
        ),
        (
            rule_with("matches: [{queryParams: [{name: a, value: '['  , type: RegularExpression}]}]"),
            "spec.rules[0].matches[0].queryParams[0].value: not a regular expression",
        ),
        (
            rule_with("matches: [{queryParams: [{name: '', value: a}]}]"),
            "queryParams[0].name: not a parameter's name",
        ),
        (
            rule_with("filters: [{type: RequestMirror, requestMirror: {}}]"),
            "spec.rules[0].filters[0].type: RequestMirror is not supported by this version; supported: RequestHeaderModifier, ResponseHeaderModifier",
        ),
        (
            rule_with("filters: [{type: RequestHeaderModifier}]"),
            "spec.rules[0].filters[0].requestHeaderModifier: needed for a filter of this type",
        ),
        (
            rule_with("filters: [{type: RequestHeaderModifier, requestHeaderModifier: {}, urlRewrite: {}}]"),
            "spec.rules[0].filters[0].urlRewrite: does not belong to a filter of this type",
        ),
        (
            rule_with("filters: [{type: RequestHeaderModifier, requestHeaderModifier: {sets: []}}]"),
            "spec.rules[0].filters[0].requestHeaderModifier.sets: unknown field `sets`",
        ),
        (
            rule_with(
                "filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Transfer-Encoding, value: x}]}}]",
            ),
            "requestHeaderModifier.set[0].name: transfer-encoding says how the message travels",
        ),
        (
            rule_with(
                "filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {remove: [mesh-agent-x]}}]",
            ),
            "responseHeaderModifier.remove[0]: names that begin with mesh-agent- belong to the agents",
        ),
        (
            rule_with(
                "filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: a, value: \"x\\ny\"}]}}]",
            ),
            "responseHeaderModifier.add[0].value: not a header's value",
        ),
        (
            rule_with(
                "filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {}}, {type: ResponseHeaderModifier, responseHeaderModifier: {}}]",
            ),
            "filters[1].type: there may be one filter of this type",
        ),
        (
            rule_with("backendRefs: [{name: b, port: 80, filters: [{type: CORS, cors: {}}]}]"),
            "spec.rules[0].backendRefs[0].filters[0].type: CORS is not supported",
        ),
    ]);
}

#[test]
fn policies_without_effect() {
    let older = policy_with("").replace("name: a", "name: b, creationTimestamp: '2020-01-01T00:00:00Z'");
    let both = format!("{}\n---\n{older}", policy_with(""));
    let mut mesh = Mesh::of(&both);
    assert_eq!(
        mesh.findings(),
        [
            "mesh.yaml:document 1: PeerAuthentication shop/a: an older policy is for the whole namespace already; this one has no effect"
        ]
    );
    mesh.set("mesh.yaml", &policy_with(""));
    assert_eq!(mesh.findings(), [""; 0]);
    let rooted =
        policy_with("selector: {matchLabels: {a: b}}").replace("namespace: shop", "namespace: istio-system");
    assert!(
        Mesh::of(&rooted).findings()[0]
            .contains("spec.selector: a policy with a selector has no effect in istio-system")
    );
}

#[test]
fn an_address_given_by_the_agent_goes_to_who_claims_it() {
    let mut mesh = Mesh::of(&service_with("ports: [{port: 80}]"));
    let given = mesh.service("shop/a").vips.clone();
    let claimer = service_with(&format!("clusterIP: {}", given[0])).replace("name: a", "name: b");
    mesh.set("other.yaml", &claimer);
    assert_eq!(mesh.findings(), [""; 0]);
    assert_ne!(mesh.service("shop/a").vips[0], given[0]);
    for name in ["shop/a", "shop/b"] {
        let service = mesh.service(name);
        for vip in &service.vips {
            assert!(Arc::ptr_eq(&mesh.snapshot().services_by_vip[vip], &service));
        }
    }
}

#[test]
fn policies_and_grants() {
    let grant = |spec: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {{name: a}}\nspec: {{{spec}}}"
        )
    };
    check_each(&[
        (
            policy_with("mtls: {mode: strict}"),
            "PeerAuthentication shop/a: spec.mtls.mode: unknown variant `strict`, expected one of `UNSET`, `DISABLE`, `PERMISSIVE`, `STRICT`",
        ),
        (
            policy_with("mtls: {mod: STRICT}"),
            "spec.mtls.mod: unknown field `mod`, expected `mode`",
        ),
        (
            policy_with("portLevelMtls: {'80': {mode: STRICT}}"),
            "spec.portLevelMtls: needs a selector",
        ),
        (
            policy_with("selector: {matchLabels: {a: b}}, portLevelMtls: {http: {mode: STRICT}}"),
            "spec.portLevelMtls.http: `http` is not a port",
        ),
        (
            policy_with("selector: {matchExpressions: []}"),
            "spec.selector.matchExpressions: unknown field",
        ),
        (
            grant("from: [], to: []"),
            "ReferenceGrant default/a: spec.from: at least one entry is needed here",
        ),
        (
            grant("from: [{group: '', kind: x}], to: []"),
            "spec.from[0]: missing field `namespace`",
        ),
    ]);
}
