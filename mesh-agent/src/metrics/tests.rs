use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::time::Instant;

use super::table::MAX_LABEL_SETS;
use super::*;
use crate::model::{MtlsMode, MtlsPolicy, OnAgentDown, Service, ServiceKey, Workload};

fn workload(namespace: &str, name: &str, labels: &[(&str, &str)]) -> Workload {
    let labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into()));
    Workload {
        namespace: namespace.into(),
        name: name.into(),
        labels: labels.collect(),
        addresses: Vec::new(),
        node: "node-a".into(),
        identity: format!("spiffe://cluster.local/ns/{namespace}/sa/default")
            .parse()
            .unwrap(),
        meshed: true,
        mtls: MtlsPolicy {
            default: MtlsMode::Permissive,
            ports: BTreeMap::new(),
        },
        on_agent_down: OnAgentDown::Open,
        fast_path: true,
        place: None,
    }
}

fn peers<'a>(
    source: &'a Workload,
    destination: Option<&'a Workload>,
    service: Option<&'a Service>,
) -> Peers<'a> {
    Peers {
        reporter: Reporter::Source,
        source: Some(source),
        source_identity: Some(&source.identity),
        destination,
        destination_identity: destination.map(|workload| &workload.identity),
        service,
        security: Security::MutualTls,
    }
}

fn outcome(status: u16) -> HttpOutcome {
    HttpOutcome {
        status,
        flag: Flag::None,
        grpc_status: None,
        duration: Duration::from_micros(1500),
        request_bytes: 10,
        response_bytes: 100,
    }
}

fn exposed(registry: &Registry) -> String {
    let mut text = String::new();
    encode(&mut text, registry).unwrap();
    text
}

/// The value of the only sample whose line has all of `parts`.
fn sample(text: &str, parts: &[&str]) -> u64 {
    let has_all = |line: &&str| parts.iter().all(|part| line.contains(part)) && !line.starts_with('#');
    let lines: Vec<_> = text.lines().filter(has_all).collect();
    assert_eq!(lines.len(), 1, "{parts:?} in {text}");
    lines[0].rsplit(' ').next().unwrap().parse().unwrap()
}

struct Shop {
    client: Workload,
    reviews: Workload,
    service: Service,
}

fn shop() -> Shop {
    let labels = [
        ("app", "reviews"),
        ("version", "v2"),
        ("pod-template-hash", "5d9c7b8f4"),
    ];
    Shop {
        client: workload("shop", "client", &[]),
        reviews: workload("shop", "reviews-v2-5d9c7b8f4-x7k2p", &labels),
        service: Service {
            key: ServiceKey {
                namespace: "shop".into(),
                name: "reviews".into(),
            },
            header: ::http::HeaderValue::from_static("shop/reviews"),
            hostname: "reviews.shop.svc.cluster.local".into(),
            vips: Vec::new(),
            headless: false,
            fast_path: true,
            ports: Vec::new(),
        },
    }
}

const SHOP_LABELS: &str = concat!(
    r#"reporter="source",source_workload="client",source_canonical_service="client","#,
    r#"source_canonical_revision="latest",source_workload_namespace="shop","#,
    r#"source_principal="spiffe://cluster.local/ns/shop/sa/default",source_app="unknown","#,
    r#"source_version="unknown",source_cluster="Kubernetes",destination_workload="reviews-v2","#,
    r#"destination_workload_namespace="shop","#,
    r#"destination_principal="spiffe://cluster.local/ns/shop/sa/default",destination_app="reviews","#,
    r#"destination_version="v2",destination_service="reviews.shop.svc.cluster.local","#,
    r#"destination_canonical_service="reviews",destination_canonical_revision="v2","#,
    r#"destination_service_name="reviews",destination_service_namespace="shop","#,
    r#"destination_cluster="Kubernetes","#,
);

#[test]
fn http_is_exposed_as_istio_does() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let shop = shop();
    let recorder = metrics.http(&peers(&shop.client, Some(&shop.reviews), Some(&shop.service)));
    recorder.record(&outcome(200));
    recorder.record(&outcome(200));
    recorder.record(&HttpOutcome {
        flag: Flag::UpstreamReset,
        grpc_status: Some(14),
        ..outcome(503)
    });
    let text = exposed(&registry);
    let ok = format!(
        r#"{SHOP_LABELS}request_protocol="http",response_code="200",grpc_response_status="",response_flags="-",connection_security_policy="mutual_tls""#
    );
    let grpc = format!(
        r#"{SHOP_LABELS}request_protocol="grpc",response_code="503",grpc_response_status="14",response_flags="UC",connection_security_policy="mutual_tls""#
    );
    for line in [
        "# TYPE istio_requests counter".to_owned(),
        format!("istio_requests_total{{{ok}}} 2"),
        format!("istio_requests_total{{{grpc}}} 1"),
        "# TYPE istio_request_duration_milliseconds histogram".to_owned(),
        format!("istio_request_duration_milliseconds_sum{{{ok}}} 3.0"),
        format!("istio_request_duration_milliseconds_count{{{ok}}} 2"),
        format!(r#"istio_request_duration_milliseconds_bucket{{le="1.0",{ok}}} 0"#),
        format!(r#"istio_request_duration_milliseconds_bucket{{le="5.0",{ok}}} 2"#),
        format!(r#"istio_request_duration_milliseconds_bucket{{le="+Inf",{ok}}} 2"#),
        format!("istio_request_bytes_sum{{{ok}}} 20.0"),
        format!(r#"istio_request_bytes_bucket{{le="10.0",{ok}}} 2"#),
        format!("istio_response_bytes_sum{{{grpc}}} 100.0"),
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "no line {line}\nin {text}"
        );
    }
}

#[test]
fn tcp_is_exposed_as_istio_does() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let shop = shop();
    let recorder = metrics.tcp(&peers(&shop.client, Some(&shop.reviews), Some(&shop.service)));
    let open = recorder.clone().open();
    open.add_sent(7);
    open.add_received(5);
    let mut reset = recorder.open();
    reset.set_flag(Flag::UpstreamReset);
    drop(reset);
    let text = exposed(&registry);
    let tail = r#"connection_security_policy="mutual_tls""#;
    let labels = format!(r#"{SHOP_LABELS}request_protocol="tcp",response_flags="-",{tail}"#);
    let failed = format!(r#"{SHOP_LABELS}request_protocol="tcp",response_flags="UC",{tail}"#);
    for line in [
        format!("istio_tcp_connections_opened_total{{{labels}}} 2"),
        format!("istio_tcp_sent_bytes_total{{{labels}}} 7"),
        format!("istio_tcp_received_bytes_total{{{labels}}} 5"),
        format!("istio_tcp_connections_closed_total{{{failed}}} 1"),
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "no line {line}\nin {text}"
        );
    }
    assert!(!text.contains(&format!("istio_tcp_connections_closed_total{{{labels}}}")));
}

#[test]
fn unknown_peers_are_said_to_be_unknown() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let shop = shop();
    let outside = Peers {
        security: Security::None,
        ..peers(&shop.client, None, None)
    };
    metrics.http(&outside).record(&outcome(200));
    let text = exposed(&registry);
    let parts = [
        "istio_requests_total",
        r#"destination_workload="unknown""#,
        r#"destination_principal="unknown""#,
        r#"destination_service="unknown""#,
        r#"destination_service_name="PassthroughCluster""#,
        r#"destination_cluster="unknown""#,
        r#"connection_security_policy="none""#,
    ];
    assert_eq!(sample(&text, &parts), 1);
}

#[test]
fn documents_cannot_forge_samples() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let evil = workload(
        "shop",
        "a\"} 1\nistio_requests_total{x=\"",
        &[("app", &"x".repeat(100_000))],
    );
    metrics.http(&peers(&evil, None, None)).record(&outcome(200));
    let text = exposed(&registry);
    let samples = text
        .lines()
        .filter(|line| line.starts_with("istio_requests_total"));
    assert_eq!(samples.count(), 1);
    let longest = text.lines().map(str::len).max().unwrap();
    assert!(longest < 4_000, "{longest}");
}

#[test]
fn invented_status_codes_are_bounded() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let shop = shop();
    let recorder = metrics.http(&peers(&shop.client, Some(&shop.reviews), None));
    for status in 0..=u16::MAX {
        recorder.record(&outcome(status));
    }
    let text = exposed(&registry);
    let codes: BTreeSet<_> = text
        .lines()
        .filter(|line| line.starts_with("istio_requests_total"))
        .collect();
    assert!((30..40).contains(&codes.len()), "{}", codes.len());
    assert_eq!(
        sample(&text, &["istio_requests_total", "client", r#"response_code="0""#]),
        100 + 65_536 - 600
    );
    let total: u64 = codes
        .iter()
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert_eq!(total, 65_536, "nothing is lost from the sum");
    let overflow = sample(&text, &["mesh_agent_metrics_overflow_total"]);
    assert_eq!(overflow, sample_sum(&text, r#"source_workload="other""#));
}

fn sample_sum(text: &str, part: &str) -> u64 {
    text.lines()
        .filter(|line| line.starts_with("istio_requests_total") && line.contains(part))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

#[test]
fn label_sets_are_bounded() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let extra = 5;
    for index in 0..MAX_LABEL_SETS + extra {
        let source = workload("shop", &format!("client-{index}"), &[]);
        metrics.http(&peers(&source, None, None)).record(&outcome(200));
        drop(metrics.tcp(&peers(&source, None, None)).open());
    }
    let text = exposed(&registry);
    assert_eq!(
        sample(&text, &["istio_requests_total", r#"source_workload="other""#]),
        5
    );
    assert_eq!(
        sample(
            &text,
            &["istio_tcp_connections_opened_total", r#"source_workload="other""#]
        ),
        5
    );
    assert_eq!(sample(&text, &["mesh_agent_metrics_overflow_total"]), 10);
    assert_eq!(sample_sum(&text, ""), 2_005);
}

#[test]
fn what_is_idle_and_held_by_nobody_is_forgotten() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let (gone, held) = (workload("shop", "gone", &[]), workload("shop", "held", &[]));
    metrics.http(&peers(&gone, None, None)).record(&outcome(200));
    let recorder = metrics.http(&peers(&held, None, None));
    recorder.record(&outcome(200));
    metrics.forget_idle();
    assert_eq!(
        sample(&exposed(&registry), &["istio_requests_total", "gone"]),
        1,
        "it counted since"
    );
    metrics.forget_idle();
    let text = exposed(&registry);
    assert!(!text.contains("gone"));
    assert_eq!(sample(&text, &["istio_requests_total", "held"]), 1);
}

#[test]
fn all_recorders_of_a_pair_count_together() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let shop = shop();
    let threads = 4;
    let requests = 2_000;
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let recorder = metrics.http(&peers(&shop.client, None, None));
                for index in 0..requests {
                    recorder.record(&outcome(200 + index % 20));
                }
            });
        }
    });
    let text = exposed(&registry);
    for code in 200..220 {
        let code = format!(r#"response_code="{code}""#);
        assert_eq!(sample(&text, &["istio_requests_total", &code]), 400);
    }
}

#[test]
fn the_agents_own_metrics() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    register_counts(&mut registry, "capture", "Captured", "reason", || {
        vec![("captured".into(), 3)]
    });
    metrics.agent().connections(Direction::Inbound).inc();
    metrics.agent().dns_queries(DnsOutcome::Forwarded).inc();
    let text = exposed(&registry);
    for line in [
        concat!(
            "mesh_agent_build_info{version=\"",
            env!("CARGO_PKG_VERSION"),
            "\"} 1"
        ),
        r#"mesh_agent_connections{direction="inbound"} 1"#,
        r#"mesh_agent_connections{direction="outbound"} 0"#,
        r#"mesh_agent_dns_queries_total{outcome="forwarded"} 1"#,
        r#"mesh_agent_capture_total{reason="captured"} 3"#,
        "mesh_agent_retries_total 0",
        "mesh_agent_draining 0",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "no line {line}\nin {text}"
        );
    }
    assert!(sample(&text, &["process_resident_memory_bytes"]) > 100_000);
    assert!(sample(&text, &["process_open_fds"]) >= 3);
    assert!(text.ends_with("# EOF\n"));
}

/// Prints its figure with `--nocapture`; the bound only catches a lock or an allocation gone wild.
#[test]
fn recording_is_cheap() {
    let metrics = Metrics::new(&mut Registry::default());
    let shop = shop();
    let recorder = metrics.http(&peers(&shop.client, Some(&shop.reviews), Some(&shop.service)));
    let requests = 200_000;
    let start = Instant::now();
    for index in 0..requests {
        recorder.record(black_box(&HttpOutcome {
            request_bytes: index,
            ..outcome(200)
        }));
    }
    let each = start.elapsed().as_nanos() / u128::from(requests);
    println!("{each} ns per recorded request");
    assert!(each < 5_000);
}
