//! Requests that are given up: by the client, or by the agent that tries elsewhere.

use std::io::{BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use mesh_tests::{Agent, PodSpec, shell, until_ok};
use socket2::SockRef;

use crate::common::{HTTP, WEB_V4, connect, read_head, wait_until, web};

/// Until `agent` has counted `expected` requests that ended so.
fn counts(agent: &Agent, code: &str, flags: &str, expected: f64) {
    let labels = [("response_code", code), ("response_flags", flags)];
    let what = format!("{} to count {expected} of {labels:?}", agent.node);
    until_ok(&what, Duration::from_secs(3), || {
        let counted = agent.metrics()?.sum("istio_requests_total", &labels);
        anyhow::ensure!((counted - expected).abs() < 0.1, "it counts {counted}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_request_that_its_client_gives_up_is_counted_by_both_agents() {
    let web = web();
    let url = format!("http://{WEB_V4}/slow?ms=10000");
    let mut curl = web.client.command("curl");
    curl.args(["--silent", "--http2-prior-knowledge", "--max-time", "0.5", &url]);
    assert_eq!(
        shell::raw(&mut curl).unwrap().status.code(),
        Some(28),
        "it gave up"
    );
    for agent in &web.mesh.agents {
        counts(agent, "0", "DC", 1.0);
    }
}

#[test]
fn tries_that_time_out_are_counted_by_the_side_that_was_cut_off() {
    let web = web();
    web.mesh
        .apply(
            "route",
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: shop}\n\
             spec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n  rules:\n    \
             - timeouts: {backendRequest: 300ms}\n      retry: {codes: [504], attempts: 1, backoff: 10ms}\n      \
             filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-route, value: 'on'}]}}]\n      \
             backendRefs: [{name: web, port: 80}]\n",
        )
        .unwrap();
    wait_until(
        &web.client,
        &[&format!("http://{WEB_V4}/status/200")],
        |response| response.header("x-route") == Some("on"),
    );
    let late = web
        .client
        .curl(&[&format!("http://{WEB_V4}/slow?ms=10000")])
        .unwrap();
    assert_eq!(late.status, 504);
    counts(&web.mesh.agents[0], "504", "URX", 1.0);
    counts(&web.mesh.agents[1], "0", "DC", 2.0);
}

#[test]
fn a_request_that_no_proxy_may_pass_on_is_counted() {
    let mut web = web();
    let outside = web.mesh.pod(PodSpec::new("outside", 1).unmeshed()).unwrap();
    let url = format!("http://{}/a%00b", web.server.at(HTTP));
    let refused = wait_until(&outside, &[&url], |response| response.status == 400);
    assert_eq!(refused.header("x-pod"), None, "the agent answered");
    let counted = web.mesh.agents[1].metrics().unwrap().sum(
        "istio_requests_total",
        &[("response_code", "400"), ("response_flags", "DPE")],
    );
    assert!(counted >= 1.0, "{counted}");
}

#[test]
fn an_application_is_not_kept_at_work_for_a_client_that_reset() {
    let mut web = web();
    let thinker = web.mesh.pod(PodSpec::new("thinker", 1)).unwrap();
    let listener = thinker
        .netns
        .enter(|| TcpListener::bind((thinker.v4, HTTP)).unwrap())
        .unwrap();
    let (asked, heard) = mpsc::sync_channel(1);
    let application = thread::spawn(move || {
        // More than one connection may come, to learn who speaks first: the one with a request counts.
        loop {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut first = [0];
            if stream.read(&mut first).unwrap_or(0) == 0 {
                continue;
            }
            read_head(&mut BufReader::new(stream.try_clone().unwrap()));
            asked.send(()).unwrap();
            // A timeout is `WouldBlock`; anything else is an end.
            return match stream.read(&mut first) {
                Ok(read) => read == 0,
                Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
            };
        }
    });
    let client = connect(&web.client, thinker.at(HTTP));
    (&client)
        .write_all(b"GET /think HTTP/1.1\r\nhost: thinker\r\n\r\n")
        .unwrap();
    heard.recv_timeout(Duration::from_secs(10)).unwrap();
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    assert!(application.join().unwrap(), "its connection ended");
    for agent in &web.mesh.agents {
        counts(agent, "0", "DC", 1.0);
    }
}
