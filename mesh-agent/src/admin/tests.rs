use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::*;
use crate::metrics::{Flag, HttpOutcome, Peers, Reporter, Security};
use crate::model::{
    Backend, Endpoint, Identity, LoadBalancing, MtlsMode, MtlsPolicy, OnAgentDown, PathMatch, Place,
    Protocol, Rejected, RequestMatch, RetryPolicy, RouteRule, Service, ServiceKey, ServicePort, Severity,
    Snapshot, Timeouts, Workload,
};
use crate::telemetry::{self, Format};

/// Long enough for a busy machine; a test that needs it fails.
const LIMIT: Duration = Duration::from_secs(30);

struct Page {
    address: SocketAddr,
    sources: Arc<AdminSources>,
    server: JoinHandle<()>,
    _ca: tempfile::TempDir,
    _log: tracing::Dispatch,
}

impl Drop for Page {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Page {
    async fn start(scope: Scope) -> Self {
        let ca = tempfile::tempdir().unwrap();
        let (log, handle) = telemetry::build(Format::Text, "info").unwrap();
        let sources = Arc::new(sources(&ca, handle));
        let listener = bind(([127, 0, 0, 1], 0).into(), scope).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, scope, Arc::clone(&sources)));
        Self {
            address,
            sources,
            server,
            _ca: ca,
            _log: log,
        }
    }

    async fn get(&self, path: &str) -> Reply {
        self.send(&format!("GET {path} HTTP/1.0\r\nhost: {}\r\n\r\n", self.address))
            .await
    }

    async fn json(&self, path: &str) -> Value {
        let reply = self.get(path).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        assert!(
            reply.head.contains("content-type: application/json"),
            "{}",
            reply.head
        );
        serde_json::from_str(&reply.body).unwrap()
    }

    /// Sends one request as it is and reads until the server closes.
    async fn send(&self, request: &str) -> Reply {
        let reply = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            // A server that has seen enough may close before it has read everything.
            let _ = stream.write_all(request.as_bytes()).await;
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes).await;
            String::from_utf8(bytes).unwrap()
        };
        let reply = tokio::time::timeout(LIMIT, reply).await.unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
        Reply {
            status: head.split(' ').nth(1).map_or(0, |status| status.parse().unwrap()),
            head: head.to_lowercase(),
            body: body.to_owned(),
        }
    }
}

fn sources(ca: &tempfile::TempDir, log: LogHandle) -> AdminSources {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let identities = Identities::open_embedded(&ca.path().join("ca"), "cluster.local").unwrap();
    identities.ensure(&BTreeSet::from([identity("reviews")]));
    let enrolled = Enrolment {
        state: "enrolled",
        message: String::new(),
    };
    AdminSources {
        node: "node-<a>".to_owned(),
        started: SystemTime::now(),
        config: json!({"node": "node-<a>"}),
        store: Store::new(snapshot()),
        registry,
        metrics,
        identities,
        log,
        readiness: Readiness::new(&["resources"]),
        enrolments: Box::new(move || BTreeMap::from([("shop/reviews-1".to_owned(), enrolled.clone())])),
        connections: Box::new(|| {
            let old = api::Connection {
                namespace: "shop".into(),
                name: "reviews-1".into(),
                direction: "inbound".into(),
                start_time: "2026-01-01T00:00:00Z".into(),
                ..api::Connection::default()
            };
            let young = api::Connection {
                start_time: "2026-01-02T00:00:00Z".into(),
                ..old.clone()
            };
            vec![old, young]
        }),
        ebpf: Box::new(|| api::Ebpf {
            state: "off".into(),
            message: "built without it".into(),
            ..Default::default()
        }),
    }
}

fn identity(account: &str) -> Identity {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
        .parse()
        .unwrap()
}

fn workload(name: &str, place: Option<Place>) -> Arc<Workload> {
    Arc::new(Workload {
        namespace: "shop".into(),
        name: name.into(),
        labels: BTreeMap::from([("app".into(), "reviews".into())]),
        addresses: vec!["10.0.0.2".parse().unwrap()],
        node: "node-a".into(),
        identity: identity("reviews"),
        meshed: true,
        mtls: MtlsPolicy {
            default: MtlsMode::Strict,
            ports: BTreeMap::from([(9090, MtlsMode::Permissive)]),
        },
        on_agent_down: OnAgentDown::Hold,
        place,
    })
}

fn snapshot() -> Snapshot {
    let local = workload("reviews-1", Some(Place::Netns("/run/netns/reviews".into())));
    let remote = workload("reviews-2", None);
    let key = ServiceKey {
        namespace: "shop".into(),
        name: "reviews".into(),
    };
    let rule = RouteRule {
        name: "shop/canary/0".into(),
        matches: RequestMatch {
            path: PathMatch::Prefix("/v2".into()),
            ..RequestMatch::default()
        },
        edits: Default::default(),
        backends: vec![Backend {
            service: Some((key.clone(), 80)),
            weight: 1,
            edits: Default::default(),
        }],
        timeouts: Timeouts {
            request: Some(Duration::from_millis(1500)),
            per_try: None,
        },
        retry: RetryPolicy::default(),
    };
    let endpoint = |workload: &Arc<Workload>| Endpoint {
        address: ([10, 0, 0, 2], 8080).into(),
        workload: Some(Arc::clone(workload)),
        load: Arc::default(),
    };
    let service = Arc::new(Service {
        key: key.clone(),
        hostname: "reviews.shop.svc.cluster.local".into(),
        vips: vec!["10.96.0.10".parse().unwrap()],
        headless: false,
        ports: vec![ServicePort {
            port: 80,
            name: Some("http".into()),
            protocol: Protocol::Http1,
            balancing: LoadBalancing::LeastRequest,
            endpoints: [endpoint(&local), endpoint(&remote)].into(),
            routes: [rule.clone()].into(),
            consumer_routes: BTreeMap::from([("other".into(), [rule].into())]),
        }],
    });
    let mut snapshot = Snapshot {
        generation: 7,
        trust_domain: "cluster.local".into(),
        ..Snapshot::default()
    };
    for workload in [local, remote] {
        snapshot.workloads.insert(workload.uid().into(), workload);
    }
    snapshot.services.insert(key, service);
    snapshot
        .sources
        .insert("Pod/shop/reviews-1".into(), "pods.yaml:1".into());
    snapshot.rejected = [Rejected {
        severity: Severity::Error,
        file: "bad.yaml".into(),
        document: 2,
        resource: "HTTPRoute shop/<script>alert(1)</script>".into(),
        path: "spec.rules[0]".into(),
        message: "unknown field".into(),
    }]
    .into();
    snapshot
}

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
            "place": "netns:/run/netns/reviews", "labels": {"app": "reviews"}, "source": "pods.yaml:1",
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

#[tokio::test]
async fn wrong_paths_methods_and_hosts() {
    let page = Page::start(Scope::Admin).await;
    let host = page.address;
    for path in [
        "/nothing",
        "/api/v1/",
        "/api/v1/secrets",
        "/api",
        "/metrics/",
        "//metrics",
        "/../etc/passwd",
    ] {
        let reply = page.get(path).await;
        assert_eq!(reply.status, 404, "{path}");
        let failure: api::Failure = serde_json::from_str(&reply.body).unwrap();
        assert!(failure.error.contains("/api/v1/status"));
    }
    for (method, path, allow) in [
        ("POST", "/metrics", "get, head"),
        ("DELETE", "/api/v1/workloads", "get, head"),
        ("DELETE", "/logging", "get, head, put, post"),
    ] {
        let reply = page
            .send(&format!("{method} {path} HTTP/1.0\r\nhost: {host}\r\n\r\n"))
            .await;
        assert_eq!(reply.status, 405);
        assert!(reply.head.contains(&format!("allow: {allow}")), "{}", reply.head);
    }
    let rebound = page
        .send("GET /config_dump HTTP/1.0\r\nhost: evil.example:15000\r\n\r\n")
        .await;
    assert_eq!(rebound.status, 403);
    assert!(!rebound.body.contains("reviews"));
}

#[tokio::test]
async fn hostile_requests_are_refused() {
    let page = Page::start(Scope::Admin).await;
    let host = page.address;
    let long = "x".repeat(100_000);
    let many: String = (0..100).map(|index| format!("x-{index}: 1\r\n")).collect();
    for (request, status) in [
        (format!("GET /{long} HTTP/1.1\r\nhost: {host}\r\n\r\n"), 414..=431),
        (
            format!("GET / HTTP/1.1\r\nhost: {host}\r\nx: {long}\r\n\r\n"),
            431..=431,
        ),
        (format!("GET / HTTP/1.1\r\nhost: {host}\r\n{many}\r\n"), 431..=431),
        (
            format!("POST /logging HTTP/1.0\r\nhost: {host}\r\ncontent-length: 100000\r\n\r\n{long}"),
            413..=413,
        ),
        (
            format!("GET / HTTP/1.1\r\nhost: {host}\r\n bad\r\n\r\n"),
            400..=400,
        ),
        ("\x16\x03\x01\x02".to_owned() + &long, 400..=431),
    ] {
        let reply = page.send(&request).await;
        assert!(
            status.contains(&reply.status),
            "{} to {:.60}",
            reply.status,
            request
        );
    }
    assert_eq!(page.get("/healthz").await.status, 200);
}

/// Time is the test's own: it jumps whenever nothing else is left to do.
#[tokio::test(start_paused = true)]
async fn silent_clients_are_cut() {
    let page = Page::start(Scope::Admin).await;
    let head = format!(
        "POST /logging HTTP/1.1\r\nhost: {}\r\ncontent-length: 5\r\n\r\nin",
        page.address
    );
    for (sent, status) in [("", 0), ("GET / HT", 0), (&head, 408)] {
        let mut stream = TcpStream::connect(page.address).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        let answer = String::from_utf8(bytes).unwrap();
        let found = answer
            .split(' ')
            .nth(1)
            .map_or(0, |status| status.parse().unwrap());
        assert_eq!(found, status, "{sent:?} got {answer:?}");
    }
}

#[tokio::test]
async fn more_clients_than_allowed_wait() {
    let page = Page::start(Scope::Admin).await;
    let mut idle = Vec::new();
    for _ in 0..64 {
        let mut stream = TcpStream::connect(page.address).await.unwrap();
        let request = format!("GET /healthz HTTP/1.1\r\nhost: {}\r\n\r\n", page.address);
        stream.write_all(request.as_bytes()).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'H', "it is being served");
        idle.push(stream);
    }
    let mut waiting = TcpStream::connect(page.address).await.unwrap();
    waiting.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await.unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(200), waiting.peek(&mut byte)).await;
    assert!(early.is_err(), "64 are served, this is the next");
    drop(idle);
    let read = tokio::time::timeout(LIMIT, waiting.read_u8()).await;
    assert_eq!(read.unwrap().unwrap(), b'H');
}
