//! What can be seen of the mesh from outside.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use mesh_tests::{Agent, Mesh, Options, PodSpec, http, until_ok};
use serde_json::Value;

use crate::common::{HTTP, WEB_V4, wait_until, web, web_with};

#[test]
fn both_agents_count_exactly_what_was_sent() {
    let web = web();
    let url = format!("http://{WEB_V4}/status/418");
    let report = web
        .client
        .load(&[&url, "--requests", "2000", "--connections", "8"])
        .unwrap();
    assert_eq!(report["statuses"]["418"], 2000);
    for (agent, reporter) in web.mesh.agents.iter().zip(["source", "destination"]) {
        let labels = [
            ("reporter", reporter),
            ("response_code", "418"),
            ("request_protocol", "http"),
            ("connection_security_policy", "mutual_tls"),
            ("source_workload", "client"),
            ("source_principal", "spiffe://cluster.local/ns/shop/sa/client"),
            ("destination_workload", "web"),
            ("destination_principal", "spiffe://cluster.local/ns/shop/sa/web"),
            ("destination_service", "web.shop.svc.cluster.local"),
            ("response_flags", "-"),
        ];
        let count = |name: &str| -> anyhow::Result<f64> { Ok(agent.metrics()?.sum(name, &labels)) };
        until_ok(
            &format!("{} to count 2000", agent.node),
            Duration::from_secs(3),
            || {
                let counted = count("istio_requests_total")?;
                anyhow::ensure!((counted - 2000.0).abs() < 0.1, "it counts {counted}");
                Ok(())
            },
        )
        .unwrap();
        let durations = count("istio_request_duration_milliseconds_count").unwrap();
        assert!((durations - 2000.0).abs() < 0.1, "{durations}");
    }
}

#[test]
fn the_admin_pages_tell_and_keep_secrets() {
    let web = web();
    let agent = &web.mesh.agents[0];
    for path in [
        "status",
        "workloads",
        "services",
        "routes",
        "policies",
        "certificates",
        "connections",
        "ebpf",
    ] {
        let page = agent.get(&format!("/api/v1/{path}")).unwrap();
        assert!(page.is_array() || page.is_object(), "{path}: {page}");
    }
    let certificates = agent.get("/api/v1/certificates").unwrap();
    let ours: Vec<&str> = certificates
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|one| one["identity"].as_str())
        .collect();
    assert_eq!(
        ours,
        ["spiffe://cluster.local/ns/shop/sa/client"],
        "for workloads of this node only"
    );
    let dump = http::get(agent.admin, "/config_dump").unwrap();
    assert!(dump.contains("spiffe://cluster.local/ns/shop/sa/web"));
    assert!(!dump.contains("PRIVATE"), "never a private key");
    assert_eq!(
        http::get(agent.admin, "/healthz").is_ok(),
        http::get(agent.metrics, "/healthz").is_ok()
    );

    let (status, _) = http::request(agent.admin, "PUT", "/logging?level=debug", "").unwrap();
    assert_eq!(status, 200);
    assert!(http::get(agent.admin, "/logging").unwrap().contains("debug"));
    let (status, said) = http::request(agent.admin, "PUT", "/logging?level=n0nsense=%3D", "").unwrap();
    assert_eq!(status, 400, "{said}");
}

#[test]
fn the_command_line_shows_tables_and_json() {
    let web = web();
    let admin = web.mesh.agents[0].admin.to_string();
    let run = |args: &[&str]| {
        let mut command = web.mesh.agents[0].command();
        mesh_tests::shell::output(command.args(args).args(["--admin", &admin])).unwrap()
    };
    assert!(run(&["status"]).contains("node-a"));
    for (what, part) in [
        ("workloads", "client"),
        ("services", "web"),
        ("certificates", "valid"),
        ("ebpf", "connect4"),
    ] {
        let table = run(&["get", what]);
        assert!(table.contains(part), "{table}");
    }
    let json: Value = serde_json::from_str(&run(&["get", "workloads", "-o", "json"])).unwrap();
    assert!(json.as_array().is_some_and(|list| list.len() == 2), "{json}");
}

#[test]
fn a_stopping_agent_lets_requests_finish() {
    let mut web = web();
    let url = format!("http://{WEB_V4}/slow?ms=1500");
    let client = &web.client;
    let agent = &mut web.mesh.agents[0];
    std::thread::scope(|scope| {
        let request = scope.spawn(|| client.curl(&[&url]).unwrap());
        until_ok("the request to be under way", Duration::from_secs(5), || {
            let open = agent.get("/api/v1/connections")?;
            anyhow::ensure!(open.as_array().is_some_and(|list| !list.is_empty()));
            Ok(())
        })
        .unwrap();
        agent.stop(Duration::from_secs(30)).unwrap();
        assert_eq!(request.join().unwrap().status, 200);
    });
}

#[test]
fn the_kernel_counts_every_connection() {
    let web = web();
    let captured = |node: usize, way: &str| {
        web.mesh.agents[node].get("/api/v1/ebpf").unwrap()["counters"][way]
            .as_u64()
            .unwrap()
    };
    let before = captured(0, "captured_tcp");
    let url = format!("http://{WEB_V4}/status/200");
    for _ in 0..5 {
        web.client
            .load(&[&url, "--requests", "40", "--connections", "4"])
            .unwrap();
    }
    assert_eq!(captured(0, "captured_tcp") - before, 20);
    assert!(
        captured(1, "captured_inbound") >= 1,
        "what came between the agents"
    );
    let exported = web.mesh.agents[0].metrics().unwrap();
    assert!(exported.sum("mesh_agent_capture_total", &[("reason", "captured_tcp")]) >= 20.0);
}

#[test]
fn the_access_log_has_a_line_for_each_request() {
    let web = web_with(&Options {
        config: "accessLog: {format: json}\n".to_owned(),
        ..Options::default()
    });
    let url = format!("http://{WEB_V4}/status/418?secret=1");
    web.client
        .curl(&[&url, "--header", "x-request-id: find-me"])
        .unwrap();
    for (agent, direction) in web.mesh.agents.iter().zip(["outbound", "inbound"]) {
        let line = until_ok("the line", Duration::from_secs(3), || {
            let log = agent.log();
            let line = log.lines().find(|line| line.contains("find-me"));
            Ok(serde_json::from_str::<Value>(line.context("it is not there")?)?)
        })
        .unwrap();
        assert_eq!(line["direction"], direction, "{line}");
        assert_eq!(line["method"], "GET", "{line}");
        assert_eq!(line["responseCode"], 418, "{line}");
        assert_eq!(
            line["sourceIdentity"], "spiffe://cluster.local/ns/shop/sa/client",
            "{line}"
        );
        assert_eq!(
            line["destinationIdentity"], "spiffe://cluster.local/ns/shop/sa/web",
            "{line}"
        );
        assert_eq!(agent.log().matches("find-me").count(), 1);
    }
}

#[test]
fn one_endpoint_behind_two_services_is_counted_for_each() {
    let web = web();
    web.mesh
        .service("also", &["10.96.0.61"], &[("http", 80, HTTP)], "web")
        .unwrap();
    web.mesh
        .apply(
            "route",
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: shop}\n\
             spec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n  rules:\n    \
             - filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-route, value: 'on'}]}}]\n      \
             backendRefs: [{name: web, port: 80}, {name: also, port: 80}]\n",
        )
        .unwrap();
    let url = format!("http://{WEB_V4}/status/418");
    wait_until(&web.client, &[&format!("http://{WEB_V4}/")], |response| {
        response.header("x-route") == Some("on")
    });
    web.client
        .load(&[&url, "--requests", "300", "--connections", "1"])
        .unwrap();
    let counted = |agent: &Agent| {
        let metrics = agent.metrics()?;
        let of = |service: &str| {
            let labels = [("destination_service", service), ("response_code", "418")];
            metrics.sum("istio_requests_total", &labels)
        };
        let counted = (
            of("web.shop.svc.cluster.local"),
            of("also.shop.svc.cluster.local"),
        );
        anyhow::ensure!(counted.0 > 90.0 && counted.1 > 90.0, "{counted:?}");
        anyhow::ensure!((counted.0 + counted.1 - 300.0).abs() < 0.1, "{counted:?}");
        Ok(())
    };
    for agent in &web.mesh.agents {
        let what = format!("{} to count both services", agent.node);
        until_ok(&what, Duration::from_secs(3), || counted(agent)).unwrap();
    }
}

/// Every way to end has the flag that Envoy's users know, on both sides.
#[test]
fn flags_say_how_a_request_ended() {
    let mut web = web();
    let pod = web.mesh.pod(PodSpec::new("closed", 0)).unwrap();
    web.mesh.wait_known(&pod).unwrap();
    // Nobody listens there: on the same node, and on the other one.
    for to in [pod.at(9), web.server.at(9)] {
        let refused = web.client.curl(&[&format!("http://{to}/")]).unwrap();
        assert_eq!(refused.status, 503, "{refused:?}");
    }
    let trailers = format!("http://{WEB_V4}/trailers");
    let args = ["--header", "te: trailers", &trailers];
    assert_eq!(web.client.curl(&args).unwrap().status, 200);
    let ended = [
        // The source tried again, for nothing.
        ("closed", "503", ["URX", "UF"], "node-a"),
        ("web", "503", ["URX", "UF"], "node-b"),
        ("web", "200", ["-", "-"], "node-b"),
    ];
    for (workload, code, flags, there) in ended {
        let sides = [("node-a", "source"), (there, "destination")];
        for ((node, reporter), flags) in sides.into_iter().zip(flags) {
            let agent = web.mesh.agents.iter().find(|agent| agent.node == node).unwrap();
            let labels = [
                ("reporter", reporter),
                ("destination_workload", workload),
                ("response_code", code),
            ];
            let what = format!("{reporter} {workload} {code} {flags}");
            until_ok(&what, Duration::from_secs(3), || {
                let metrics = agent.metrics()?;
                let all = metrics.sum("istio_requests_total", &labels);
                let labels = [&labels[..], &[("response_flags", flags)]].concat();
                let flagged = metrics.sum("istio_requests_total", &labels);
                anyhow::ensure!(all > 0.0 && flagged == all, "{flagged} of {all}");
                Ok(())
            })
            .unwrap();
        }
    }
}

#[test]
fn an_agent_that_can_read_nothing_is_not_ready() {
    let mut mesh = Mesh::start(&Options::default()).unwrap();
    let agent = &mut mesh.agents[0];
    agent.stop(Duration::from_secs(10)).unwrap();
    let config = fs::read_to_string(&agent.config).unwrap();
    fs::write(&agent.config, config.replace("/resources]", "/misspelt]")).unwrap();
    agent.spawn(&mesh.run).unwrap();
    until_ok("the reason", Duration::from_secs(10), || {
        let status = agent.get("/api/v1/status")?;
        let said = status["conditions"].to_string();
        anyhow::ensure!(said.contains("no resource could be read"), "{status}");
        anyhow::ensure!(status["ready"] == false, "{status}");
        Ok(())
    })
    .unwrap();
}
