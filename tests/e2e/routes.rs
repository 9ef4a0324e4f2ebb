//! HTTPRoute: which requests go where, with what changes, within what time.

use std::time::Duration;

use mesh_tests::{Mesh, Options, Pod, PodSpec, until_ok};
use serde_json::Value;
use tokio::time::Instant;

use crate::common::{http_server, seen, seen_header, wait_for};

struct Shop {
    client: Pod,
    _servers: Vec<Pod>,
    mesh: Mesh,
}

/// The service `reviews` in front of v1 and v2, and a service for each.
fn shop(route: &str) -> Shop {
    let mut mesh = Mesh::start(&Options::default()).unwrap();
    mesh.service("reviews", &["10.96.0.30"], &[("http", 80, 8080)], "reviews")
        .unwrap();
    let mut servers = Vec::new();
    for version in ["v1", "v2"] {
        let spec = PodSpec::new(&format!("reviews-{version}"), 1)
            .label("app", "reviews")
            .label("v", version);
        servers.push(http_server(&mut mesh, spec));
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: reviews-{version}, namespace: shop}}\n\
             spec: {{selector: {{app: reviews, v: {version}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
        );
        mesh.apply(&format!("service-{version}"), &service).unwrap();
    }
    let client = mesh.pod(PodSpec::new("client", 0)).unwrap();
    let head = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
                metadata: {name: reviews, namespace: shop}\nspec:\n  \
                parentRefs: [{group: '', kind: Service, name: reviews}]\n  rules:\n";
    mesh.apply("route", &format!("{head}{route}")).unwrap();
    wait_for_routes(&mesh, |routes| {
        routes.as_array().is_some_and(|list| !list.is_empty())
    });
    // Every test's route sends this somewhere.
    wait_for(&client, "http://reviews/ready");
    Shop {
        client,
        _servers: servers,
        mesh,
    }
}

/// Until the client's agent has these routes in force.
fn wait_for_routes(mesh: &Mesh, good: impl Fn(&Value) -> bool) {
    until_ok("the routes", Duration::from_secs(5), || {
        let routes = mesh.agents[0].get("/api/v1/routes")?;
        anyhow::ensure!(good(&routes), "{routes}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn matches_on_everything_that_a_request_has() {
    let shop = shop(
        r"
    - matches: [{path: {type: PathPrefix, value: /ready}}]
      backendRefs: [{name: reviews-v1, port: 80}]
    - matches: [{path: {type: Exact, value: /exact}}]
      backendRefs: [{name: reviews-v2, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /prefix}}]
      backendRefs: [{name: reviews-v2, port: 80}]
    - matches: [{path: {type: RegularExpression, value: '/re/[0-9]+'}}]
      backendRefs: [{name: reviews-v2, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /h}, headers: [{name: X-User, value: jason}]}]
      backendRefs: [{name: reviews-v2, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /q}, queryParams: [{name: beta, value: 'yes'}]}]
      backendRefs: [{name: reviews-v2, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /m}, method: PUT}]
      backendRefs: [{name: reviews-v2, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /nowhere}}]
      backendRefs: [{name: reviews-v9, port: 80}]
",
    );
    let none = (404, None);
    let v2 = (200, Some("reviews-v2"));
    for (args, expected) in [
        (&["/ready"][..], (200, Some("reviews-v1"))),
        (&["/exact"], v2),
        (&["/exact/more"], none),
        (&["/prefix"], v2),
        (&["/prefix/more?x"], v2),
        (&["/prefixed"], none),
        (&["/re/12"], v2),
        (&["/re/12a"], none),
        (&["/h", "--header", "x-user: jason"], v2),
        (&["/h", "--header", "x-user: jasonx"], none),
        (&["/h"], none),
        (&["/q?a=1&beta=yes"], v2),
        (&["/q?beta=no"], none),
        (&["/m", "--request", "PUT"], v2),
        (&["/m"], none),
        // Normalised before it is matched.
        (&["/x/../exact", "--path-as-is"], v2),
        (&["/nowhere"], (500, None)),
    ] {
        let url = format!("http://reviews{}", args[0]);
        let response = shop.client.curl(&[&[&*url], &args[1..]].concat()).unwrap();
        assert_eq!((response.status, response.header("x-pod")), expected, "{args:?}");
    }
}

#[test]
fn weights_and_changes_of_weights() {
    let shop = shop(
        "    - backendRefs: [{name: reviews-v1, port: 80, weight: 90}, {name: reviews-v2, port: 80, weight: 10}]\n",
    );
    let share = || {
        let report = shop
            .client
            .load(&["http://reviews/", "--requests", "2000", "--connections", "4"])
            .unwrap();
        assert_eq!(report["statuses"]["200"], 2000, "{report}");
        report["pods"]["reviews-v2"].as_u64().unwrap_or(0)
    };
    // Five standard deviations are 67.
    let tenth = share();
    assert!((133..=267).contains(&tenth), "{tenth} of 2000");

    shop.mesh
        .apply(
            "route",
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: reviews, namespace: shop}\n\
             spec:\n  parentRefs: [{group: '', kind: Service, name: reviews}]\n  rules:\n    \
             - backendRefs: [{name: reviews-v1, port: 80, weight: 0}, {name: reviews-v2, port: 80}]\n",
        )
        .unwrap();
    wait_for_routes(&shop.mesh, |routes| routes.to_string().contains("\"weight\":0"));
    assert_eq!(share(), 2000);

    // Without its route the service is its endpoints again.
    shop.mesh.remove("route").unwrap();
    wait_for_routes(&shop.mesh, |routes| routes.as_array().is_some_and(Vec::is_empty));
    let half = share();
    // The less busy one is taken, so that the faster of the two gets more.
    assert!((500..=1500).contains(&half), "{half} of 2000");
}

#[test]
fn headers_are_changed_both_ways() {
    let shop = shop(
        r"
    - filters:
        - type: RequestHeaderModifier
          requestHeaderModifier:
            set: [{name: x-set, value: new}]
            add: [{name: x-add, value: more}]
            remove: [x-gone]
        - type: ResponseHeaderModifier
          responseHeaderModifier:
            set: [{name: x-pod, value: hidden}]
            add: [{name: x-route, value: 'yes'}]
            remove: [x-seen-version]
      backendRefs: [{name: reviews-v1, port: 80}]
",
    );
    let args = [
        "http://reviews/",
        "--header",
        "x-set: old",
        "--header",
        "x-gone: 1",
        "--header",
        "x-kept: 1",
    ];
    let response = shop.client.curl(&args).unwrap();
    assert_eq!(response.header("x-pod"), Some("hidden"));
    assert_eq!(response.header("x-route"), Some("yes"));
    assert_eq!(response.header("x-seen-version"), None);
    let seen = seen(&response);
    assert_eq!(seen_header(&seen, "x-set"), Some("new"));
    assert_eq!(seen_header(&seen, "x-add"), Some("more"));
    assert_eq!(seen_header(&seen, "x-gone"), None);
    assert_eq!(seen_header(&seen, "x-kept"), Some("1"));
}

#[test]
fn timeouts_for_requests_and_tries() {
    let shop = shop(
        r"
    - matches: [{path: {type: PathPrefix, value: /slow}, headers: [{name: x-limit, value: request}]}]
      timeouts: {request: 300ms}
      backendRefs: [{name: reviews-v1, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /slow}, headers: [{name: x-limit, value: try}]}]
      timeouts: {request: 5s, backendRequest: 200ms}
      retry: {attempts: 1}
      backendRefs: [{name: reviews-v1, port: 80}]
    - backendRefs: [{name: reviews-v1, port: 80}]
",
    );
    let timed = |limit: &str, ms: u32| {
        let started = Instant::now();
        let url = format!("http://reviews/slow?ms={ms}");
        let response = shop
            .client
            .curl(&[&url, "--header", &format!("x-limit: {limit}")])
            .unwrap();
        (response.status, started.elapsed())
    };
    let (status, took) = timed("request", 3000);
    assert_eq!(status, 504);
    assert!(
        (Duration::from_millis(300)..Duration::from_secs(2)).contains(&took),
        "{took:?}"
    );
    let (status, took) = timed("try", 3000);
    assert_eq!(status, 504);
    assert!(
        (Duration::from_millis(400)..Duration::from_secs(2)).contains(&took),
        "two tries: {took:?}"
    );
    assert_eq!(timed("request", 10).0, 200);
    assert_eq!(timed("none", 1000).0, 200);
}
