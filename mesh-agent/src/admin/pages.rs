//! Which page a request gets.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::request::Parts;
use http::{HeaderValue, Method, Response, StatusCode};
use prometheus_client::encoding::text::encode;
use serde::Serialize;

use super::api::{self, Named};
use super::body::Content;
use super::{AdminSources, Scope, html, request, view};
use crate::model::Severity;

pub(super) type Answer = Response<Content>;

/// Open connections that one answer lists.
const MAX_LISTED: usize = 10_000;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
/// The page has no script, loads nothing, and may not be framed.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
);

/// One address's pages.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) scope: Scope,
    pub(super) sources: Arc<AdminSources>,
}

pub(super) fn answer(site: &Site, parts: &Parts, body: &Bytes) -> Answer {
    if site.scope == Scope::Admin && !request::is_local_host(parts) {
        return failure(
            StatusCode::FORBIDDEN,
            "ask for the admin page by an address or as localhost, not by another name",
        );
    }
    page(site, parts, body).unwrap_or_else(Refusal::answer)
}

fn page(site: &Site, parts: &Parts, body: &Bytes) -> Result<Answer, Refusal> {
    let sources = &*site.sources;
    match parts.uri.path() {
        "/healthz" => read(parts, || healthz(sources)),
        "/readyz" => read(parts, || readyz(sources)),
        "/metrics" => read(parts, || metrics(&site.sources)),
        _ if site.scope == Scope::Metrics => Err(Refusal::not_found(&["/metrics", "/healthz", "/readyz"])),
        "/" => read(parts, || index(sources)),
        "/logging" => logging(sources, parts, body),
        "/config_dump" => read(parts, || json(&config_dump(sources))),
        path => match path.strip_prefix("/api/v1/") {
            Some(name) => resource(sources, parts, name),
            None => Err(Refusal::not_found(&PATHS)),
        },
    }
}

const PATHS: [&str; 14] = [
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/logging",
    "/config_dump",
    "/api/v1/status",
    "/api/v1/workloads",
    "/api/v1/services",
    "/api/v1/routes",
    "/api/v1/policies",
    "/api/v1/certificates",
    "/api/v1/connections",
    "/api/v1/ebpf",
];

fn resource(sources: &AdminSources, parts: &Parts, name: &str) -> Result<Answer, Refusal> {
    let snapshot = sources.store.load();
    match name {
        "status" => read(parts, || json(&status(sources))),
        "ebpf" => read(parts, || json(&(sources.ebpf)())),
        "workloads" => list(parts, || view::workloads(&snapshot, &(sources.enrolments)())),
        "services" => list(parts, || view::services(&snapshot)),
        "routes" => list(parts, || view::routes(&snapshot)),
        "policies" => list(parts, || view::policies(&snapshot)),
        "certificates" => list(parts, || certificates(sources)),
        "connections" => list(parts, || connections(sources)),
        _ => Err(Refusal::not_found(&PATHS)),
    }
}

fn index(sources: &AdminSources) -> Answer {
    let snapshot = sources.store.load();
    let mut local = view::workloads(&snapshot, &(sources.enrolments)());
    local.retain(|workload| workload.place.is_some());
    let shown = html::Shown {
        status: &status(sources),
        local: &local,
        ebpf: &(sources.ebpf)(),
        filter: &sources.log.get(),
        now: SystemTime::now(),
    };
    with_type(HTML, whole(shown.page()))
}

/// Only what a restart may mend: this page answers from a runtime of its own, and says whether the data path's
/// runs too.
fn healthz(sources: &AdminSources) -> Answer {
    let Some(since) = sources.pulse.hung() else {
        return json(&serde_json::json!({"healthy": true}));
    };
    let message = format!("the data path hangs: one of its runtimes has run nothing for {since:.1?}");
    let mut answer = json(&serde_json::json!({"healthy": false, "message": message}));
    *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    answer
}

fn readyz(sources: &AdminSources) -> Answer {
    let ready = sources.readiness.is_ready();
    let conditions = sources.readiness.conditions();
    let mut answer = json(&api::Ready { ready, conditions });
    if !ready {
        *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    answer
}

/// There may be a lot of them: they are made while they are sent.
fn metrics(sources: &Arc<AdminSources>) -> Answer {
    let sources = Arc::clone(sources);
    let body = Content::written(move |text| {
        refresh(&sources);
        encode(text, &sources.registry)
    });
    with_type(OPENMETRICS, body)
}

/// Sets what mirrors state that is kept elsewhere.
fn refresh(sources: &AdminSources) {
    let snapshot = sources.store.load();
    let agent = sources.metrics.agent();
    // A document with three faults is one.
    let refused: BTreeSet<_> = snapshot
        .rejected
        .iter()
        .filter(|rejected| rejected.severity == Severity::Error)
        .map(|rejected| (&rejected.file, rejected.document))
        .collect();
    agent.workloads.set(gauge(snapshot.local_workloads.len()));
    agent.snapshot_generation.set(snapshot.generation);
    agent.rejected_resources.set(gauge(refused.len()));
    agent.draining.set(u32::from(sources.readiness.is_draining()));
    let issued = sources.identities.counts();
    agent
        .certificate_renewals
        .inner()
        .store(issued.issued, Ordering::Relaxed);
    agent
        .certificate_failures
        .inner()
        .store(issued.failed, Ordering::Relaxed);
    let expiry = next_expiry(sources).and_then(|expiry| expiry.duration_since(SystemTime::UNIX_EPOCH).ok());
    let seconds = expiry.and_then(|since| i64::try_from(since.as_secs()).ok());
    agent.certificate_expiry.set(seconds.unwrap_or(0));
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn next_expiry(sources: &AdminSources) -> Option<SystemTime> {
    let certificates = sources.identities.list().into_iter();
    certificates
        .filter_map(|status| status.certificate)
        .map(|certificate| certificate.not_after)
        .min()
}

fn logging(sources: &AdminSources, parts: &Parts, body: &Bytes) -> Result<Answer, Refusal> {
    if parts.method == Method::PUT || parts.method == Method::POST {
        if request::is_cross_origin(parts) {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "a page of another site may not change anything here",
            ));
        }
        let [level] = request::query(parts, ["level"]).map_err(Refusal::bad_request)?;
        let text = std::str::from_utf8(body).map_err(|_| Refusal::bad_request("the filter is not UTF-8"))?;
        let filter = level.as_deref().unwrap_or_else(|| text.trim());
        sources
            .log
            .set(filter)
            .map_err(|error| Refusal::bad_request(error.to_string()))?;
        tracing::info!(filter, "the log's filter is changed");
    } else if parts.method != Method::GET && parts.method != Method::HEAD {
        return Err(Refusal::not_allowed("GET, HEAD, PUT, POST"));
    }
    let filter = sources.log.get();
    Ok(json(&api::Logging { filter }))
}

fn status(sources: &AdminSources) -> api::Status {
    let snapshot = sources.store.load();
    let connections = (sources.connections)();
    let in_direction = |direction| {
        connections
            .iter()
            .filter(|open| open.direction == direction)
            .count()
    };
    let routes = snapshot.services.values().flat_map(|service| &service.ports);
    let routes = routes.map(|port| {
        port.routes.len()
            + port
                .consumer_routes
                .values()
                .map(|rules| rules.len())
                .sum::<usize>()
    });
    let uptime = SystemTime::now()
        .duration_since(sources.started)
        .unwrap_or(Duration::ZERO);
    let enrolments = (sources.enrolments)();
    let fast_paths = (sources.fast_paths)();
    api::Status {
        node: sources.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        start_time: view::time(sources.started),
        uptime_seconds: uptime.as_secs(),
        ready: sources.readiness.is_ready(),
        conditions: sources.readiness.conditions(),
        draining: sources.readiness.is_draining(),
        trust_domain: sources.identities.trust_domain().to_string(),
        generation: snapshot.generation,
        counts: api::Counts {
            workloads: snapshot.workloads.len(),
            local_workloads: snapshot.local_workloads.len(),
            pending_workloads: snapshot
                .local_workloads
                .values()
                .filter(|workload| {
                    let shown = enrolments.get(workload.uid().as_str());
                    shown.is_none_or(|shown| shown.state != "enrolled")
                })
                .count(),
            services: snapshot.services.len(),
            routes: routes.sum(),
            certificates: sources.identities.list().len(),
            inbound_connections: in_direction("inbound"),
            outbound_connections: in_direction("outbound"),
            fast_paths: fast_paths.open,
            fast_path_connections: fast_paths.connections,
        },
        next_certificate_expiry: next_expiry(sources).map(view::time),
        findings: snapshot.rejected.iter().map(view::finding).collect(),
        kernel_tls: sources.kernel_tls,
        lacking: sources
            .features
            .iter()
            .filter(|feature| !feature.present)
            .cloned()
            .collect(),
    }
}

fn config_dump(sources: &AdminSources) -> api::ConfigDump {
    let snapshot = sources.store.load();
    api::ConfigDump {
        status: status(sources),
        config: sources.config.clone(),
        workloads: view::workloads(&snapshot, &(sources.enrolments)()),
        services: view::services(&snapshot),
        routes: view::routes(&snapshot),
        policies: view::policies(&snapshot),
        certificates: certificates(sources),
        ebpf: (sources.ebpf)(),
    }
}

fn certificates(sources: &AdminSources) -> Vec<api::Certificate> {
    sources.identities.list().iter().map(view::certificate).collect()
}

fn connections(sources: &AdminSources) -> Vec<api::Connection> {
    let mut open = (sources.connections)();
    open.sort_by(|a, b| b.start_time.cmp(&a.start_time));
    open
}

/// A page that is only read.
fn read(parts: &Parts, page: impl FnOnce() -> Answer) -> Result<Answer, Refusal> {
    let [] = only_read(parts, [])?;
    Ok(page())
}

/// A list, filtered by `?namespace=` and `?name=`.
fn list<T: Serialize + Named>(parts: &Parts, items: impl FnOnce() -> Vec<T>) -> Result<Answer, Refusal> {
    let [namespace, name] = only_read(parts, ["namespace", "name"])?;
    let wanted = |item: &T| {
        namespace
            .as_deref()
            .is_none_or(|wanted| wanted == item.namespace())
            && name.as_deref().is_none_or(|wanted| wanted == item.name())
    };
    let found: Vec<T> = items().into_iter().filter(wanted).take(MAX_LISTED).collect();
    Ok(json(&found))
}

fn only_read<const N: usize>(parts: &Parts, allowed: [&str; N]) -> Result<[Option<String>; N], Refusal> {
    if parts.method != Method::GET && parts.method != Method::HEAD {
        return Err(Refusal::not_allowed("GET, HEAD"));
    }
    request::query(parts, allowed).map_err(Refusal::bad_request)
}

fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_vec_pretty(value) {
        Ok(mut text) => {
            text.push(b'\n');
            with_type(JSON, whole(text))
        }
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// Why there is no page for a request.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    message: String,
    /// The methods that would have done.
    allow: Option<&'static str>,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            allow: None,
        }
    }

    fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    fn not_found(known: &[&str]) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            format!("no such page; there are {}", known.join(" ")),
        )
    }

    fn not_allowed(methods: &'static str) -> Self {
        Self {
            allow: Some(methods),
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("this page takes {methods}"),
            )
        }
    }

    fn answer(self) -> Answer {
        let mut answer = failure(self.status, &self.message);
        if let Some(methods) = self.allow {
            answer
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static(methods));
        }
        answer
    }
}

pub(super) fn failure(status: StatusCode, message: &str) -> Answer {
    let body = serde_json::json!({ "error": message });
    let mut answer = with_type(JSON, whole(format!("{body:#}\n")));
    *answer.status_mut() = status;
    answer
}

fn whole(body: impl Into<Bytes>) -> Content {
    Content::Whole(Some(body.into()))
}

fn with_type(content_type: HeaderValue, body: Content) -> Answer {
    let mut answer = Response::new(body);
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, content_type);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONTENT_SECURITY_POLICY, POLICY);
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}
