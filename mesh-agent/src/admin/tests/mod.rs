//! The admin page over real connections, with a snapshot of every kind of thing.

mod hostile;
mod pages;

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
use crate::model::{
    Backend, Endpoint, Identity, LoadBalancing, MtlsMode, MtlsPolicy, OnAgentDown, PathMatch, Place,
    Protocol, Rejected, RequestMatch, RetryPolicy, RouteRule, Service, ServiceKey, ServicePort, Severity,
    Snapshot, Source, Timeouts, Workload,
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
        Self::with(scope, |_| ()).await
    }

    async fn with(scope: Scope, change: impl FnOnce(&mut AdminSources)) -> Self {
        let ca = tempfile::tempdir().unwrap();
        let (log, handle) = telemetry::build(Format::Text, "info").unwrap();
        let mut sources = sources(&ca, handle);
        change(&mut sources);
        let sources = Arc::new(sources);
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
        pulse: Pulse::default(),
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
        fast_paths: Box::new(FastPaths::default),
        kernel_tls: true,
        features: vec![feature("SO_NETNS_COOKIE", true), feature("bpf_set_retval", false)],
    }
}

fn feature(name: &str, present: bool) -> api::Feature {
    api::Feature {
        name: name.into(),
        present,
        since: "5.18".into(),
        without: format!("{name} is <missed>"),
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
        fast_path: true,
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
        header: key.to_header(),
        hostname: "reviews.shop.svc.cluster.local".into(),
        vips: vec!["10.96.0.10".parse().unwrap()],
        headless: false,
        fast_path: true,
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
    snapshot
        .local_workloads
        .insert(local.uid().into(), Arc::clone(&local));
    for workload in [local, remote] {
        snapshot.workloads.insert(workload.uid().into(), workload);
    }
    snapshot.services.insert(key, service);
    let source = Source {
        file: "pods.yaml".into(),
        document: 1,
    };
    snapshot.sources.insert("Pod/shop/reviews-1".into(), source);
    snapshot.rejected = findings();
    snapshot
}

/// Two faults of one document, and a document that is in force in spite of a warning.
fn findings() -> Arc<[Rejected]> {
    let finding = |severity, document, path: &str| Rejected {
        severity,
        file: "bad.yaml".into(),
        document,
        resource: "HTTPRoute shop/<script>alert(1)</script>".into(),
        path: path.into(),
        message: "unknown field".into(),
    };
    [
        finding(Severity::Error, 2, "spec.rules[0]"),
        finding(Severity::Error, 2, "spec.rules[1]"),
        finding(Severity::Warning, 3, ""),
    ]
    .into()
}
