//! What is tried again, and what is not.

use std::thread;
use std::time::Duration;

use mesh_tests::PodSpec;

use crate::common::{HTTP, WEB_V4, http_server, wait_until, web};

#[test]
fn an_idempotent_request_survives_a_reset_and_another_does_not() {
    let web = web();
    let url = |key: &str, times: u32| format!("http://{WEB_V4}/flaky?key={key}&times={times}&how=reset");
    let get = web.client.curl(&[&url("get", 1)]).unwrap();
    assert_eq!((get.status, &*get.body), (200, "worked at request 2\n"));
    let put = web
        .client
        .curl(&[&url("put", 1), "--request", "PUT", "--data", "replayed"])
        .unwrap();
    assert_eq!((put.status, &*put.body), (200, "worked at request 2\n"));
    let post = web.client.curl(&[&url("post", 1), "--data", "x"]).unwrap();
    assert_eq!(post.status, 503, "{post:?}");
    // Two more tries by default.
    let often = web.client.curl(&[&url("often", 3)]).unwrap();
    assert_eq!(often.status, 503, "{often:?}");
    let retries = web.mesh.agents[0]
        .metrics()
        .unwrap()
        .sum("mesh_agent_retries_total", &[]);
    assert!((retries - 4.0).abs() < 0.1, "{retries} retries");
}

#[test]
fn a_stream_that_a_backend_refuses_is_tried_again_whatever_the_method() {
    let web = web();
    web.mesh
        .service("web2", &["10.96.0.61"], &[("http2", 80, HTTP)], "web")
        .unwrap();
    let url = |path: &str| format!("http://10.96.0.61{path}");
    wait_until(&web.client, &[&url("/status/200")], |response| {
        response.header("x-seen-version") == Some("HTTP/2.0")
    });
    let retries = || {
        web.mesh.agents[0]
            .metrics()
            .unwrap()
            .sum("mesh_agent_retries_total", &[])
    };
    let before = retries();
    let post = web
        .client
        .curl(&[&url("/flaky?key=refused&times=2&how=refused"), "--data", "a body"])
        .unwrap();
    assert_eq!((post.status, &*post.body), (200, "worked at request 3\n"));
    assert!(
        (retries() - before - 2.0).abs() < 0.1,
        "{before}, then {}",
        retries()
    );
    // Any other reset may have come after the work was done.
    let reset = web
        .client
        .curl(&[&url("/flaky?key=reset&times=1&how=reset"), "--data", "a body"])
        .unwrap();
    assert_eq!(reset.status, 503, "{reset:?}");
}

#[test]
fn codes_that_the_route_asks_for_with_their_bodies() {
    let web = web();
    web.mesh
        .apply(
            "route",
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: shop}\n\
             spec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n  rules:\n    \
             - retry: {codes: [503], attempts: 2, backoff: 10ms}\n      \
             filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-route, value: 'on'}]}}]\n      \
             backendRefs: [{name: web, port: 80}]\n",
        )
        .unwrap();
    let url = format!("http://{WEB_V4}/status/200");
    wait_until(&web.client, &[&url], |response| {
        response.header("x-route") == Some("on")
    });
    let flaky = |key: &str, times: u32, code: u32, args: &[&str]| {
        let url = format!("http://{WEB_V4}/flaky?key={key}&times={times}&how={code}");
        web.client.curl(&[&[&*url], args].concat()).unwrap()
    };
    assert_eq!(flaky("a", 2, 503, &[]).body, "worked at request 3\n");
    assert_eq!(
        flaky("b", 1, 503, &["--data", "a body"]).body,
        "worked at request 2\n"
    );
    assert_eq!(flaky("c", 1, 500, &[]).status, 500);
    assert_eq!(flaky("d", 3, 503, &[]).status, 503);
}

#[test]
fn no_request_fails_when_one_of_two_pods_dies_under_load() {
    let mut web = web();
    let mut second = http_server(&mut web.mesh, PodSpec::new("web-2", 1).label("app", "web"));
    let url = format!("http://{WEB_V4}/slow?ms=5");
    wait_until(&web.client, &[&url], |response| {
        response.header("x-pod") == Some("web-2")
    });

    let report = thread::scope(|scope| {
        let args = [
            &*url,
            "--requests",
            "6000",
            "--connections",
            "16",
            "--rate",
            "1500",
        ];
        let client = &web.client;
        let load = scope.spawn(move || client.load(&args).unwrap());
        thread::sleep(Duration::from_secs(1));
        second.kill_servers();
        thread::sleep(Duration::from_secs(1));
        web.mesh.withdraw(&second).unwrap();
        load.join().unwrap()
    });
    assert_eq!(report["statuses"], serde_json::json!({"200": 6000}), "{report}");
    assert_eq!(report["failed"], 0, "{report}");
    assert!(report["pods"]["web-2"].as_u64().unwrap() > 500, "{report}");
    // The dead pod is asked now and then, not for every request.
    let retries = web.mesh.agents[0]
        .metrics()
        .unwrap()
        .sum("mesh_agent_retries_total", &[]);
    assert!((1.0..150.0).contains(&retries), "{retries} retries");
}

#[test]
fn nobody_there_is_an_answer_of_its_own() {
    let mut web = web();
    web.mesh
        .service("empty", &["10.96.0.60"], &[("http", 80, HTTP)], "nobody")
        .unwrap();
    let response = wait_until(&web.client, &["http://10.96.0.60/"], |response| {
        response.status == 503
    });
    assert!(!response.body.is_empty(), "it says why");
    web.server.kill_servers();
    let dead = web.client.curl(&[&format!("http://{WEB_V4}/")]).unwrap();
    assert_eq!(dead.status, 503);
}
