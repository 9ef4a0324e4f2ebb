//! What happens in the demo, and what is measured of it.

use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_tests::{Mesh, Pod, Samples, Seen};
use serde_json::Value;

use crate::shop::{HTTP, Shop};

/// Requests one after the other, for the latency.
const SERIAL: &str = "1000";
/// Requests through the front end, for the split.
pub(crate) const REQUESTS: u64 = 1000;

/// The same pods without agents.
pub(crate) struct Before {
    pub(crate) latency: Latency,
    pub(crate) link: Link,
}

/// With agents.
pub(crate) struct Now {
    pub(crate) latency: Latency,
    pub(crate) link: Link,
    /// The report of the requests through the front end.
    pub(crate) load: Value,
    pub(crate) greeting: String,
    /// Who talked to whom as the certificates say, and how often.
    pub(crate) principals: Vec<(String, String, u64)>,
}

pub(crate) struct Killed {
    pub(crate) load: Value,
    pub(crate) retries: u64,
}

#[derive(Clone, Copy)]
pub(crate) struct Latency {
    pub(crate) p50: u64,
    pub(crate) p99: u64,
}

/// What was seen on the link between the nodes.
pub(crate) struct Link {
    pub(crate) bytes: usize,
    pub(crate) agent_bytes: usize,
    pub(crate) marker: bool,
    pub(crate) tls: bool,
}

pub(crate) fn before(mesh: &Mesh, shop: &Shop) -> Result<Before> {
    let latency = latency(shop)?;
    let marker = random_text();
    let capture = mesh.capture("before")?;
    let url = format!("http://{}/", shop.reviews_v1.at(HTTP));
    send_marked(&shop.client, &url, "100", &marker)?;
    Ok(Before {
        latency,
        link: Link::new(&capture.stop()?, &marker),
    })
}

pub(crate) fn now(mesh: &Mesh, shop: &Shop) -> Result<Now> {
    let marker = random_text();
    let capture = mesh.capture("now")?;
    let load = send_marked(&shop.client, "http://frontend/", &REQUESTS.to_string(), &marker)?;
    let greeting = greeting(shop)?;
    let latency = latency(shop)?;
    let link = Link::new(&capture.stop()?, &marker);
    Ok(Now {
        latency,
        link,
        load,
        greeting,
        principals: principals(mesh)?,
    })
}

/// A load on a service with two endpoints, of which one dies in the middle, requests in flight.
pub(crate) fn killed(mesh: &Mesh, shop: &mut Shop) -> Result<Killed> {
    let before = retries(mesh)?;
    let Shop {
        client, reviews_v2, ..
    } = shop;
    let load = thread::scope(|scope| {
        let load = scope.spawn(|| {
            client.load(&[
                "http://reviews-any/slow?ms=10",
                "--requests",
                "1200",
                "--rate",
                "400",
                "--connections",
                "8",
            ])
        });
        thread::sleep(Duration::from_secs(1));
        reviews_v2.kill_servers();
        load.join()
            .map_err(|_panic| anyhow::anyhow!("the load generator's thread panicked"))?
    })?;
    let retries = retries(mesh)?.saturating_sub(before);
    // For who stays to play.
    reviews_v2.serve(&mesh.run, "http", HTTP)?;
    Ok(Killed { load, retries })
}

/// Requests with a marker in headers and bodies, both ways.
fn send_marked(client: &Pod, url: &str, requests: &str, marker: &str) -> Result<Value> {
    let header = format!("x-secret:{marker}");
    let args = [
        url,
        "--requests",
        requests,
        "--connections",
        "8",
        "--header",
        &header,
        "--body",
        marker,
    ];
    client.load(&args)
}

fn latency(shop: &Shop) -> Result<Latency> {
    let url = format!("http://{}/status/200", shop.reviews_v1.at(HTTP));
    // The first ones open connections and warm caches.
    shop.client.load(&[&url, "--requests", "100"])?;
    let report = shop.client.load(&[&url, "--requests", SERIAL])?;
    if report["failed"] != 0 {
        bail!("requests failed: {report}");
    }
    let percentile = |name: &str| {
        report["latencyMicros"][name]
            .as_u64()
            .context("no latency in the report")
    };
    Ok(Latency {
        p50: percentile("p50")?,
        p99: percentile("p99")?,
    })
}

/// The first line of a server that speaks first.
fn greeting(shop: &Shop) -> Result<String> {
    // Name resolution goes by the pod's resolv.conf, which only a process of its own sees.
    let addresses = mesh_tests::shell::output(shop.client.command("getent").args(["ahostsv4", "ledger"]))
        .context("the name ledger does not resolve")?;
    let address = addresses
        .split_whitespace()
        .next()
        .context("getent finds no address")?
        .to_owned();
    shop.client.netns.enter(|| -> Result<String> {
        let stream = TcpStream::connect((address.as_str(), 2525))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut line = String::new();
        BufReader::new(stream)
            .read_line(&mut line)
            .context("the server that speaks first said nothing")?;
        Ok(line.trim().to_owned())
    })?
}

/// Pairs of identities from the metrics of the side that verified the client.
fn principals(mesh: &Mesh) -> Result<Vec<(String, String, u64)>> {
    let samples = all_samples(mesh)?;
    let mut pairs = Vec::new();
    for name in ["istio_requests_total", "istio_tcp_connections_opened_total"] {
        for sample in samples
            .iter()
            .flat_map(|one| one.all(name, &[("reporter", "destination")]))
        {
            let label = |key: &str| sample.labels.get(key).cloned().unwrap_or_default();
            let pair = (label("source_principal"), label("destination_principal"));
            match pairs
                .iter_mut()
                .find(|(from, to, _)| (from, to) == (&pair.0, &pair.1))
            {
                Some((_, _, count)) => *count += whole(sample.value),
                None => pairs.push((pair.0, pair.1, whole(sample.value))),
            }
        }
    }
    pairs.sort();
    Ok(pairs)
}

fn retries(mesh: &Mesh) -> Result<u64> {
    let samples = all_samples(mesh)?;
    Ok(samples
        .iter()
        .map(|one| whole(one.sum("mesh_agent_retries_total", &[])))
        .sum())
}

fn all_samples(mesh: &Mesh) -> Result<Vec<Samples>> {
    mesh.agents.iter().map(mesh_tests::Agent::metrics).collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count that this demo made"
)]
fn whole(count: f64) -> u64 {
    count as u64
}

/// Nobody else's traffic holds this text by chance.
fn random_text() -> String {
    let state = RandomState::new();
    format!("marker-{:016x}{:016x}", state.hash_one(1), state.hash_one(2))
}

impl Link {
    fn new(seen: &Seen, marker: &str) -> Self {
        Self {
            bytes: seen.bytes(),
            agent_bytes: seen.bytes_of_port(15008),
            marker: seen.contains(marker.as_bytes()),
            tls: seen.is_all_tls(),
        }
    }
}
