//! The wiring: every part is made here, in the order of what it needs, and handed what it needs.
//!
//! Invariants: nobody else constructs a part or knows two that do not know each other; what listens is bound
//! before anything is served; the control side (admin, discovery, enrolment) runs on the caller's runtime, the
//! data path on its own, so that neither waits for the other.

mod fast_path;
mod show;
mod workloads;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::{self, AdminSources, Pulse, Readiness, Scope};
use crate::config::{AccessLogFormat, AgentConfig};
use crate::discovery::FileSource;
use crate::doctor;
use crate::drain::{self, DrainTrigger};
use crate::ebpf::{Capture, CaptureOptions, Claim};
use crate::identity::Identities;
use crate::lanes::Lanes;
use crate::memory;
use crate::metrics::{Metrics, register_counts};
use crate::proxy::{Inputs, Proxy};
use crate::store::Store;
use crate::telemetry::{AccessLog, Format, LogHandle};
use crate::tls::{self, RecordLayer, Unsupported};
use workloads::Workloads;

/// How long connections that are cut at the end of a drain get to notice.
const CUT_TIME: Duration = Duration::from_millis(500);
/// How long the access log may take over its last lines.
const FLUSH_TIME: Duration = Duration::from_secs(2);
/// How often series that nobody uses any more are dropped.
const FORGET_EVERY: Duration = Duration::from_secs(900);
/// How often the kernel's counters are looked at for what must not stay silent.
const WATCH_EVERY: Duration = Duration::from_secs(1);
const WORKLOADS: &str = "workloads";

/// Runs the agent until it is told to stop. Call it on the control runtime; the data path has `lanes`.
pub async fn run(config: AgentConfig, log: LogHandle, lanes: Lanes) -> anyhow::Result<()> {
    prepare(&config, lanes.clone())?;
    let listening = listen(&config).await?;
    let _claim = Claim::on(&config.bpffs).context("cannot capture traffic")?;
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let identities = Identities::open_embedded(&config.ca_directory, &config.trust_domain)
        .context("cannot open the certificate authority")?;
    let files = FileSource::open(&config);
    let store = Store::new(files.snapshot().clone());
    let capture = Capture::start(&CaptureOptions::new(&config.bpffs)).context("cannot capture traffic")?;
    let access_log = access_log(config.access_log)?;
    let (trigger, drain) = drain::new();
    let (layer, without_kernel) = record_layer(&config);
    let proxy = Proxy::new(Inputs {
        store: store.clone(),
        identities: identities.clone(),
        layer,
        metrics: metrics.clone(),
        access_log: access_log.clone(),
        lanes: lanes.clone(),
    });
    register(&mut registry, &capture, &access_log);
    let readiness = Readiness::new(&[WORKLOADS]);
    let workloads = Workloads::new(
        workloads::Parts {
            capture: capture.clone(),
            proxy: Arc::clone(&proxy),
            identities: identities.clone(),
            store: store.clone(),
            cluster_domain: config.cluster_domain.as_str().into(),
        },
        lanes.clone(),
        drain.clone(),
    );
    let pulse = pulse(&lanes);
    let sources = Arc::new(AdminSources {
        node: config.node.clone(),
        started: SystemTime::now(),
        config: show::config(&config),
        store: store.clone(),
        registry,
        metrics,
        identities: identities.clone(),
        log,
        readiness: readiness.clone(),
        pulse: pulse.clone(),
        enrolments: workloads.enrolments(),
        connections: show::connections(proxy.connections.clone()),
        ebpf: show::ebpf(capture.clone()),
        fast_paths: show::fast_paths(capture.clone(), workloads.fast_paths()),
        kernel_tls: layer == RecordLayer::Kernel,
        features: show::all_features(&capture.features().list(), without_kernel.as_ref()),
    });
    serve_pages(listening, &sources);
    keep_alive(&lanes, capture.clone(), pulse);
    tokio::spawn(async move { identities.run().await });
    tokio::spawn(watch_counters(capture));
    tokio::spawn(forget_idle(Arc::clone(&sources)));
    tokio::spawn(Arc::clone(&proxy).sweep(drain));
    let watching = files.watch(store).context("cannot watch the resource files")?;
    tokio::spawn(workloads.run(readiness.clone(), WORKLOADS));
    stop_signal(&config)?.await;
    readiness.drain();
    sources.metrics.agent().draining.set(1);
    stop(&trigger, config.drain, &proxy).await;
    watching.stop();
    access_log.flush(FLUSH_TIME);
    Ok(())
}

/// Before anything is made: refuses where capture is impossible, warns of what is in its way, and bounds what the
/// process may take and keep.
fn prepare(config: &AgentConfig, lanes: Lanes) -> anyhow::Result<()> {
    for warning in doctor::before_start(config)? {
        tracing::warn!("{warning}");
    }
    memory::bound_slack();
    tokio::spawn(memory::keep_small(lanes));
    raise_descriptor_limit();
    Ok(())
}

/// Who encrypts what goes between agents, and why it is not the kernel although it was asked to.
fn record_layer(config: &AgentConfig) -> (RecordLayer, Option<Unsupported>) {
    match config.kernel_tls.then(tls::probe_kernel) {
        None => (RecordLayer::Agent, None),
        Some(Ok(())) => (RecordLayer::Kernel, None),
        // Doctor has warned of it.
        Some(Err(without)) => (RecordLayer::Agent, Some(without)),
    }
}

/// Opens the pages' sockets, before anything that outlives the agent is made: an address in use ends it.
async fn listen(config: &AgentConfig) -> anyhow::Result<Vec<(TcpListener, Scope)>> {
    let mut listening = Vec::new();
    for (field, address, scope) in [
        ("admin.address", config.admin, Scope::Admin),
        ("metrics.address", config.metrics, Scope::Metrics),
    ] {
        let listener = admin::bind(address, scope).await;
        let listener = listener.with_context(|| {
            format!(
                "cannot listen on {address}, the {field} (if another agent runs here, give this one its own)"
            )
        })?;
        listening.push((listener, scope));
    }
    Ok(listening)
}

fn serve_pages(listening: Vec<(TcpListener, Scope)>, sources: &Arc<AdminSources>) {
    for (listener, scope) in listening {
        tokio::spawn(admin::serve(listener, scope, Arc::clone(sources)));
    }
}

/// Beats on each of the data path's threads.
fn pulse(lanes: &Lanes) -> Pulse {
    let pulse = Pulse::default();
    for lane in lanes.all() {
        lane.spawn(pulse.heart());
    }
    pulse
}

/// The kernel side must notice when any of the data path's threads hangs.
fn keep_alive(lanes: &Lanes, capture: Capture, pulse: Pulse) {
    lanes
        .next()
        .spawn(async move { capture.keep_alive(|| pulse.hung().is_none()).await });
}

/// A connection takes several descriptors, and the soft limit is for programs that use select(2).
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

fn access_log(format: AccessLogFormat) -> anyhow::Result<AccessLog> {
    let format = match format {
        AccessLogFormat::Off => return Ok(AccessLog::off()),
        AccessLogFormat::Text => Format::Text,
        AccessLogFormat::Json => Format::Json,
    };
    AccessLog::stdout(format).context("cannot start the access log")
}

fn register(registry: &mut Registry, capture: &Capture, access_log: &AccessLog) {
    let capture = capture.clone();
    register_counts(
        registry,
        "capture",
        "What the kernel side did with connections and queries",
        "reason",
        move || {
            let counters = capture.counters().unwrap_or_default();
            counters
                .into_iter()
                .map(|(reason, count)| (Cow::Borrowed(reason), count))
                .collect()
        },
    );
    let access_log = access_log.clone();
    register_counts(
        registry,
        "access_log_dropped_lines",
        "Lines of the access log that were not written",
        "reason",
        move || vec![(Cow::Borrowed("queue_full"), access_log.dropped())],
    );
}

/// For want of room in a map a connection is refused, or goes through the agent that need not, or a DNS query past
/// it: that is said, not only counted.
async fn watch_counters(capture: Capture) {
    let mut every = tokio::time::interval(WATCH_EVERY);
    let mut before = 0;
    loop {
        every.tick().await;
        let Ok(counters) = capture.counters() else {
            continue;
        };
        let full = counters.iter().filter(|(reason, _)| reason.contains("full"));
        let now = full.map(|(_, count)| *count).sum();
        if now > before {
            tracing::warn!(
                connections = now - before,
                "a map of the kernel side is full; see `mesh-agent get ebpf`"
            );
        }
        before = now;
    }
}

async fn forget_idle(sources: Arc<AdminSources>) {
    let mut every = tokio::time::interval(FORGET_EVERY);
    loop {
        every.tick().await;
        sources.metrics.forget_idle();
    }
}

/// Says that the agent runs once it can be told to stop; the future ends with the first signal.
fn stop_signal(config: &AgentConfig) -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    tracing::info!(node = %config.node, admin = %config.admin, "the agent runs");
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: finishing what is open"),
            _ = interrupt.recv() => tracing::info!("SIGINT: finishing what is open"),
        }
    })
}

/// Lets what is open finish, then cuts and reports the rest.
async fn stop(trigger: &DrainTrigger, deadline: Duration, proxy: &Proxy) {
    if trigger.drain(deadline).await == 0 {
        tracing::info!("everything finished");
        return;
    }
    let open = proxy.connections.list();
    tracing::warn!(connections = open.len(), "cut at the end of the drain");
    for connection in &open {
        tracing::info!(
            workload = %connection.workload,
            peer = %connection.peer,
            destination = %connection.destination,
            protocol = connection.protocol.get().unwrap_or(&"unknown"),
            "was still open"
        );
    }
    trigger.finished(CUT_TIME).await;
}
