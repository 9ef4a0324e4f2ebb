//! A load generator that looks into the answers: which pod gave each, and how long it took.
//!
//! `--connections N` (1) at the same time, each with one request after the other; `--requests N` (100) in all;
//! `--rate N` per second at the most; `--method M` (GET, or POST with a body); `--body TEXT`;
//! `--body-file FILE`; `--header NAME:VALUE`, any number; `--http2`; `--timeout-ms N` (10000) per request.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{HOST, HeaderName, HeaderValue};
use hyper::{Request, Response, Uri, Version};
use serde_json::json;
use tokio::time::{Instant, sleep_until, timeout};

use crate::client::Connection;

pub(crate) async fn run(url: &str, options: &[&str]) -> Result<()> {
    let plan = Arc::new(Plan::parse(url, options)?);
    let started = Instant::now();
    let workers: Vec<_> = (0..plan.connections)
        .map(|_| tokio::spawn(work(Arc::clone(&plan), started)))
        .collect();
    let mut report = Report::default();
    for worker in workers {
        report.add(worker.await?);
    }
    let line = report.into_json(started.elapsed());
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}

/// What is to be sent.
pub(crate) struct Plan {
    uri: Uri,
    pub(crate) connections: u64,
    requests: u64,
    pub(crate) rate: Option<u64>,
    /// Of an open-loop run.
    pub(crate) length: Duration,
    method: String,
    body: Bytes,
    headers: Vec<(HeaderName, HeaderValue)>,
    http2: bool,
    pub(crate) timeout: Duration,
    /// Requests that a worker has taken on.
    taken: AtomicU64,
}

impl Plan {
    pub(crate) fn parse(url: &str, options: &[&str]) -> Result<Self> {
        let mut plan = Self {
            uri: url.parse()?,
            connections: 1,
            requests: 100,
            rate: None,
            length: Duration::from_secs(1),
            method: String::new(),
            body: Bytes::new(),
            headers: Vec::new(),
            http2: false,
            timeout: Duration::from_secs(10),
            taken: AtomicU64::new(0),
        };
        let mut options = options.iter();
        while let Some(option) = options.next() {
            if *option == "--http2" {
                plan.http2 = true;
                continue;
            }
            let value = options
                .next()
                .with_context(|| format!("{option} needs a value"))?;
            match *option {
                "--connections" => plan.connections = value.parse()?,
                "--requests" => plan.requests = value.parse()?,
                "--rate" => plan.rate = Some(value.parse()?),
                "--method" => (*value).clone_into(&mut plan.method),
                "--body" => plan.body = Bytes::copy_from_slice(value.as_bytes()),
                "--body-file" => plan.body = std::fs::read(value)?.into(),
                "--seconds" => plan.length = Duration::try_from_secs_f64(value.parse()?)?,
                "--timeout-ms" => plan.timeout = Duration::from_millis(value.parse()?),
                "--header" => {
                    let (name, value) = value.split_once(':').context("--header NAME:VALUE")?;
                    plan.headers.push((name.parse()?, value.parse()?));
                }
                other => bail!("there is no option {other}"),
            }
        }
        if plan.method.is_empty() {
            plan.method = if plan.body.is_empty() { "GET" } else { "POST" }.to_owned();
        }
        Ok(plan)
    }

    /// The number of the next request; it is not sent earlier than the rate allows.
    async fn take(&self, started: Instant) -> bool {
        let number = self.taken.fetch_add(1, Ordering::Relaxed);
        if let Some(rate) = self.rate {
            let due = Duration::from_secs(1).mul_f64(number as f64 / rate.max(1) as f64);
            sleep_until(started + due).await;
        }
        number < self.requests
    }

    pub(crate) async fn connect(&self) -> Result<Connection> {
        Connection::open(&self.uri, self.http2).await
    }

    /// Address and path; for who speaks HTTP on its own.
    pub(crate) fn target(&self) -> Result<(&str, &str)> {
        let authority = self.uri.authority().context("the URL has no host")?;
        Ok((authority.as_str(), self.uri.path()))
    }

    fn request(&self) -> Result<Request<Full<Bytes>>> {
        let authority = self.uri.authority().context("the URL has no host")?;
        let mut request = Request::builder().method(&*self.method);
        request = if self.http2 {
            request.version(Version::HTTP_2).uri(self.uri.clone())
        } else {
            let path = self.uri.path_and_query().map_or("/", |path| path.as_str());
            request.uri(path).header(HOST, authority.as_str())
        };
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        Ok(request.body(Full::new(self.body.clone()))?)
    }
}

async fn work(plan: Arc<Plan>, started: Instant) -> Report {
    let mut report = Report::default();
    let mut connection = None;
    while plan.take(started).await {
        let begun = Instant::now();
        let tried = timeout(plan.timeout, try_once(&plan, &mut connection)).await;
        match tried.unwrap_or_else(|_late| Err(anyhow!("timed out"))) {
            Ok(response) => {
                report.latencies.push(begun.elapsed());
                let pod = response.headers().get("x-pod").and_then(|pod| pod.to_str().ok());
                *report.pods.entry(pod.unwrap_or("none").to_owned()).or_default() += 1;
                *report.statuses.entry(response.status().as_u16()).or_default() += 1;
            }
            Err(error) => {
                connection = None;
                *report.errors.entry(format!("{error:#}")).or_default() += 1;
            }
        }
    }
    report
}

/// One request on the connection that is open, else on a new one.
pub(crate) async fn try_once(plan: &Plan, connection: &mut Option<Connection>) -> Result<Response<Bytes>> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => plan.connect().await?,
    };
    let response = open.send(plan.request()?).await?;
    let close = response
        .headers()
        .get("connection")
        .is_some_and(|value| value == "close");
    *connection = (!close).then_some(open);
    Ok(response)
}

#[derive(Default)]
struct Report {
    statuses: BTreeMap<u16, u64>,
    pods: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    latencies: Vec<Duration>,
}

impl Report {
    fn add(&mut self, other: Self) {
        merge(&mut self.statuses, other.statuses);
        merge(&mut self.pods, other.pods);
        merge(&mut self.errors, other.errors);
        self.latencies.extend(other.latencies);
    }

    fn into_json(mut self, took: Duration) -> serde_json::Value {
        self.latencies.sort_unstable();
        let percentile = |percent: usize| {
            let last = self.latencies.len().saturating_sub(1);
            self.latencies
                .get(last * percent / 100)
                .map_or(0, |latency| latency.as_micros())
        };
        let errors: u64 = self.errors.values().sum();
        json!({
            "answers": self.latencies.len(),
            "failed": errors,
            "statuses": self.statuses,
            "pods": self.pods,
            "errors": self.errors,
            "seconds": took.as_secs_f64(),
            "latencyMicros": {
                "p50": percentile(50), "p90": percentile(90), "p99": percentile(99), "max": percentile(100),
            },
        })
    }
}

fn merge<K: Ord>(into: &mut BTreeMap<K, u64>, from: BTreeMap<K, u64>) {
    for (key, count) in from {
        *into.entry(key).or_default() += count;
    }
}
