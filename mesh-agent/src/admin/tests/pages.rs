//! What each page answers.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::{LIMIT, Page, identity, workload};
use crate::admin::{Pulse, Scope, api};
use crate::metrics::{Flag, HttpOutcome, Peers, Reporter, Security};

#[tokio::test]
async fn health_and_readiness() {
    let page = Page::start(Scope::Metrics).await;
    assert_eq!(page.get("/healthz").await.status, 200);
    let reply = page.get("/readyz").await;
    assert_eq!(reply.status, 503);
    let ready: api::Ready = serde_json::from_str(&reply.body).unwrap();
    assert!(!ready.ready && !ready.conditions[0].holds && ready.conditions[0].name == "resources");
    page.sources.readiness.holds("resources");
    assert_eq!(page.get("/readyz").await.status, 200);
    page.sources.readiness.drain();
    assert_eq!(page.get("/readyz").await.status, 503);
    assert_eq!(page.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn a_data_path_that_hangs_is_told() {
    let watched = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .unwrap();
    let pulse = Pulse::new(Duration::from_millis(500));
    watched.spawn(pulse.heart());
    let page = Page::with(Scope::Metrics, |sources| sources.pulse = pulse).await;
    let until = async |status: u16| {
        let looking = async {
            loop {
                let reply = page.get("/healthz").await;
                if reply.status == status {
                    return reply.body;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT, looking).await.unwrap()
    };
    // It beats for longer than the bound.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(page.get("/healthz").await.status, 200);
    let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
    watched.spawn(async move { held.recv() });
    let body = until(503).await;
    assert!(body.contains("the data path hangs"), "{body}");
    drop(release);
    until(200).await;
    watched.shutdown_background();
}

/// Many times what fits into the chunks and the kernel's buffers.
#[tokio::test]
async fn many_metrics_wait_for_their_reader() {
    let page = Page::start(Scope::Metrics).await;
    let pairs = 1_000;
    for index in 0..pairs {
        let workload = workload(&format!("client-{index}"), None);
        let peers = Peers {
            reporter: Reporter::Source,
            source: Some(&workload),
            source_identity: None,
            destination: None,
            destination_identity: None,
            service: None,
            security: Security::None,
        };
        page.sources.metrics.http(&peers).record(&HttpOutcome {
            status: 200,
            flag: Flag::None,
            grpc_status: None,
            duration: Duration::ZERO,
            request_bytes: 0,
            response_bytes: 0,
        });
    }
    let reply = page.get("/metrics").await;
    let requests = reply
        .body
        .lines()
        .filter(|line| line.starts_with("istio_requests_total{"));
    assert_eq!(requests.count(), pairs);
    assert!(reply.body.len() > 10_000_000 && reply.body.ends_with("# EOF\n"));
    let gone = TcpStream::connect(page.address).await.unwrap();
    gone.writable().await.unwrap();
    gone.try_write(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    drop(gone);
    let again = page.get("/metrics").await;
    assert!(
        again.body.ends_with("# EOF\n"),
        "a reader that is gone disturbs nobody"
    );
}

#[tokio::test]
async fn the_metrics_address_serves_metrics_only() {
    let page = Page::start(Scope::Metrics).await;
    let reply = page.get("/metrics").await;
    assert!(
        reply
            .head
            .contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    for line in [
        "mesh_agent_workloads 1",
        "mesh_agent_snapshot_generation 7",
        "mesh_agent_rejected_resources 1",
        "mesh_agent_certificate_renewals_total 1",
        "# EOF",
    ] {
        assert!(
            reply.body.lines().any(|found| found == line),
            "no {line} in {}",
            reply.body
        );
    }
    for path in [
        "/",
        "/logging",
        "/config_dump",
        "/api/v1/status",
        "/api/v1/workloads",
    ] {
        assert_eq!(page.get(path).await.status, 404, "{path}");
    }
    let scraper = page
        .send("GET /metrics HTTP/1.0\r\nhost: node-a.example\r\n\r\n")
        .await;
    assert_eq!(scraper.status, 200, "scrapers ask by name");
}

#[tokio::test]
async fn resources_as_documented() {
    let page = Page::start(Scope::Admin).await;
    let workloads = page.json("/api/v1/workloads").await;
    assert_eq!(
        workloads[0],
        json!({
            "namespace": "shop", "name": "reviews-1", "state": "enrolled", "node": "node-a",
            "addresses": ["10.0.0.2"], "identity": "spiffe://cluster.local/ns/shop/sa/reviews", "meshed": true,
            "mtls": {"mode": "strict", "ports": {"9090": "permissive"}}, "onAgentDown": "hold",
            "place": "netns:/run/netns/reviews", "labels": {"app": "reviews"}, "source": "pods.yaml:document 1",
        })
    );
    assert_eq!(workloads[1]["state"], "remote");
    let services = page.json("/api/v1/services").await;
    assert_eq!(
        services[0]["ports"][0]["endpoints"][1]["workload"],
        "shop/reviews-2"
    );
    assert_eq!(services[0]["ports"][0]["routes"], 2);
    let routes = page.json("/api/v1/routes").await;
    assert_eq!(
        routes[1],
        json!({
            "namespace": "shop", "name": "canary/0", "service": "shop/reviews", "port": 80, "clients": "other",
            "matches": {"path": "prefix:/v2"}, "backends": [{"service": "shop/reviews:80", "weight": 1}],
            "requestTimeoutMs": 1500, "retries": 2,
        })
    );
    assert_eq!(page.json("/api/v1/policies").await[0]["mtls"]["mode"], "strict");
    assert_eq!(page.json("/api/v1/certificates").await[0]["state"], "valid");
    assert_eq!(
        page.json("/api/v1/connections").await[0]["startTime"],
        "2026-01-02T00:00:00Z"
    );
    assert_eq!(page.json("/api/v1/ebpf").await["message"], "built without it");
    let status: api::Status = serde_json::from_value(page.json("/api/v1/status").await).unwrap();
    assert_eq!(
        (
            status.generation,
            status.counts.routes,
            status.counts.inbound_connections
        ),
        (7, 2, 2)
    );
    assert_eq!(status.findings[0].document, 2);
}

#[tokio::test]
async fn lists_are_filtered() {
    let page = Page::start(Scope::Admin).await;
    let found = |list: Value| list.as_array().unwrap().len();
    assert_eq!(found(page.json("/api/v1/workloads?namespace=shop").await), 2);
    assert_eq!(
        found(page.json("/api/v1/workloads?namespace=shop&name=reviews-2").await),
        1
    );
    assert_eq!(found(page.json("/api/v1/workloads?namespace=other").await), 0);
    assert_eq!(found(page.json("/api/v1/services?name=reviews").await), 1);
    assert_eq!(
        found(page.json("/api/v1/routes?namespace=shop&name=canary").await),
        2,
        "its rules"
    );
    assert_eq!(page.get("/api/v1/workloads?nmae=reviews").await.status, 400);
    assert_eq!(page.get("/api/v1/status?name=x").await.status, 400);
}

#[tokio::test]
async fn the_dump_holds_everything_but_keys() {
    let page = Page::start(Scope::Admin).await;
    let reply = page.get("/config_dump").await;
    let dump: api::ConfigDump = serde_json::from_str(&reply.body).unwrap();
    assert_eq!(
        (dump.workloads.len(), dump.services.len(), dump.routes.len()),
        (2, 1, 2)
    );
    assert_eq!(dump.config["node"], "node-<a>");
    let credential = page.sources.identities.current(&identity("reviews")).unwrap();
    assert!(reply.body.contains(&credential.serial));
    assert!(!reply.body.to_uppercase().contains("PRIVATE"), "{}", reply.body);
}

#[tokio::test]
async fn the_logs_filter_changes() {
    let page = Page::start(Scope::Admin).await;
    assert_eq!(page.json("/logging").await["filter"], "info");
    let host = page.address;
    let by_query =
        format!("PUT /logging?level=warn,mesh_agent%3A%3Aproxy%3Ddebug HTTP/1.0\r\nhost: {host}\r\n\r\n");
    assert_eq!(page.send(&by_query).await.status, 200);
    assert_eq!(
        page.json("/logging").await["filter"],
        "warn,mesh_agent::proxy=debug"
    );
    let by_body = format!("POST /logging HTTP/1.0\r\nhost: {host}\r\ncontent-length: 6\r\n\r\ndebug\n");
    assert_eq!(page.send(&by_body).await.status, 200);
    for bad in ["debgu", "", "a=b", "%00"] {
        let request = format!("PUT /logging?level={bad} HTTP/1.0\r\nhost: {host}\r\n\r\n");
        let reply = page.send(&request).await;
        assert_eq!(reply.status, 400, "{bad}");
        assert!(
            reply.body.contains("use "),
            "it says what is allowed: {}",
            reply.body
        );
    }
    let foreign =
        format!("POST /logging?level=off HTTP/1.0\r\nhost: {host}\r\norigin: http://evil.example\r\n\r\n");
    assert_eq!(page.send(&foreign).await.status, 403);
    assert_eq!(page.json("/logging").await["filter"], "debug");
}

#[tokio::test]
async fn the_page_for_people_trusts_no_document() {
    let page = Page::start(Scope::Admin).await;
    let reply = page.get("/").await;
    assert_eq!(reply.status, 200);
    assert!(reply.head.contains("content-type: text/html; charset=utf-8"));
    assert!(reply.head.contains("content-security-policy: default-src 'none'"));
    assert!(reply.body.contains("node-&lt;a&gt;") && reply.body.contains("not ready"));
    assert!(
        reply.body.contains("<b>reviews-1</b>") && !reply.body.contains("<b>reviews-2</b>"),
        "the local one"
    );
    assert!(
        reply.body.contains("bpf_set_retval is &lt;missed&gt;") && !reply.body.contains("SO_NETNS_COOKIE")
    );
    assert!(reply.body.contains("&lt;script&gt;alert(1)") && !reply.body.contains("<script"));
    for path in reply
        .body
        .split("href=\"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
    {
        assert_ne!(page.get(path).await.status, 404, "{path}");
    }
}

/// Who asks for it every second must not cost a system call for each entry of each map.
#[tokio::test]
async fn the_status_does_not_walk_the_kernels_maps() {
    let page = Page::with(Scope::Admin, |sources| {
        sources.ebpf = Box::new(|| panic!("the maps were walked"));
        sources.fast_paths = Box::new(|| crate::admin::FastPaths {
            open: 3,
            connections: 4,
        });
    })
    .await;
    let status = page.json("/api/v1/status").await;
    let counts = &status["counts"];
    assert_eq!(status["lacking"].as_array().unwrap().len(), 1, "{status}");
    assert_eq!(status["lacking"][0]["name"], "bpf_set_retval");
    assert_eq!(
        (&counts["fastPaths"], &counts["fastPathConnections"]),
        (&json!(3), &json!(4))
    );
}
