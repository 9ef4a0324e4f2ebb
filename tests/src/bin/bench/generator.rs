//! The load generators, and what they report.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::{Pod, shell};
use serde::{Deserialize, Serialize};

use crate::scenario::Door;

/// Requests of a warm-up.
const WARM_UP: u64 = 2000;
/// A gRPC message: not compressed, 100 bytes.
const GRPC_PREFIX: [u8; 5] = [0, 0, 0, 0, 100];

/// What a row's work is done by.
#[derive(Debug)]
pub(crate) enum Generator<'a> {
    Requests(Requests<'a>),
    Bulk(Way<'a>, usize),
    Connects(Way<'a>, usize),
}

/// From where, and to where.
#[derive(Debug)]
pub(crate) struct Way<'a> {
    pub(crate) client: &'a Pod,
    pub(crate) address: SocketAddr,
}

impl Generator<'_> {
    /// A few, unmeasured: connections between proxies are made, caches get warm.
    pub(crate) fn warm_up(&self) -> Result<()> {
        match self {
            Self::Requests(requests) => requests.warm_up(),
            Self::Bulk(..) | Self::Connects(..) => self.saturate(1).map(|_count| ()),
        }
    }

    /// As much as goes, for so many seconds; how much that was, all of it good.
    pub(crate) fn saturate(&self, seconds: u64) -> Result<f64> {
        match self {
            Self::Requests(requests) => Ok(requests.saturate(seconds)? as f64),
            Self::Bulk(way, flows) => bulk(way, *flows, seconds),
            Self::Connects(way, at_once) => connects(way, *at_once, seconds),
        }
    }
}

/// Requests of one kind, to one address.
#[derive(Debug)]
pub(crate) struct Requests<'a> {
    pub(crate) client: &'a Pod,
    pub(crate) address: SocketAddr,
    pub(crate) door: Door,
    pub(crate) bytes: usize,
    pub(crate) connections: usize,
    /// The run's folder.
    pub(crate) folder: std::path::PathBuf,
}

/// At a fixed rate; times in microseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Paced {
    #[serde(default)]
    pub(crate) rate: u64,
    pub(crate) answers: u64,
    pub(crate) failed: u64,
    /// Those that the generator came too late for.
    pub(crate) unsent: u64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
    #[serde(default)]
    pub(crate) errors: serde_json::Value,
}

impl Paced {
    pub(crate) fn ensure_all_good(&self) -> Result<()> {
        ensure!(
            self.failed == 0,
            "{} of {} requests failed: {}",
            self.failed,
            self.failed + self.answers,
            self.errors
        );
        Ok(())
    }
}

impl Requests<'_> {
    pub(crate) fn warm_up(&self) -> Result<()> {
        self.h2load(&["-n", &WARM_UP.to_string()]).map(|_answers| ())
    }

    /// As many as go, for so many seconds; the number of good answers.
    pub(crate) fn saturate(&self, seconds: u64) -> Result<u64> {
        self.h2load(&["-D", &seconds.to_string()])
    }

    fn h2load(&self, how_many: &[&str]) -> Result<u64> {
        let mut command = self.client.command("h2load");
        command.args(["-t", "1", "-m", "1", "-c", &self.connections.to_string()]);
        command.args(how_many);
        if !self.is_http2() {
            command.arg("--h1");
        }
        for (name, value) in self.headers() {
            command.args(["-H", &format!("{name}: {value}")]);
        }
        if let Some(file) = self.body()? {
            command.args(["-d", &file]);
        }
        parse_h2load(&shell::output(command.arg(self.url()))?)
    }

    /// So many a second, due at fixed times; some may have failed.
    pub(crate) fn pace(&self, rate: u64, seconds: u64) -> Result<Paced> {
        let mut command = self.client.peer_command();
        command.args(["paced", &self.url(), "--rate", &rate.to_string()]);
        command.args(["--connections", &self.connections.to_string()]);
        command.args(["--seconds", &seconds.to_string()]);
        if self.is_http2() {
            command.arg("--http2");
        }
        for (name, value) in self.headers() {
            command.args(["--header", &format!("{name}:{value}")]);
        }
        if let Some(file) = self.body()? {
            command.args(["--method", "POST", "--body-file", &file]);
        }
        let report = shell::output(&mut command)?;
        let mut paced: Paced =
            serde_json::from_str(&report).with_context(|| format!("no report: {report}"))?;
        paced.rate = rate;
        Ok(paced)
    }

    /// That the way leads where it should: to the port that the server says it answers from.
    pub(crate) fn check(&self) -> Result<()> {
        let ways = [(Some("x-version: two"), Door::Routed), (None, Door::Http)];
        for (header, door) in ways {
            let url = self.url();
            let options = header.map_or_else(Vec::new, |header| vec!["--header", header]);
            let response = self.client.curl(&[&options[..], &[&url]].concat())?;
            let port = crate::world::port(door).to_string();
            ensure!(
                response.header("x-port") == Some(&*port),
                "{header:?} led to {:?}, not to {port}: {}",
                response.header("x-port"),
                response.head
            );
        }
        Ok(())
    }

    fn url(&self) -> String {
        let path = if self.door == Door::Grpc {
            "echo.Echo/Unary".to_owned()
        } else {
            self.bytes.to_string()
        };
        format!("http://{}/{path}", self.address)
    }

    fn is_http2(&self) -> bool {
        matches!(self.door, Door::Http2 | Door::Grpc)
    }

    fn headers(&self) -> &'static [(&'static str, &'static str)] {
        match self.door {
            Door::Routed => &[("x-version", "two")],
            Door::Grpc => &[("content-type", "application/grpc"), ("te", "trailers")],
            _ => &[],
        }
    }

    fn body(&self) -> Result<Option<String>> {
        if self.door != Door::Grpc {
            return Ok(None);
        }
        let file = self.folder.join("grpc-message");
        fs::write(&file, [&GRPC_PREFIX[..], &[b'x'; 100]].concat())?;
        Ok(Some(
            file.to_str().context("a folder that is no text")?.to_owned(),
        ))
    }
}

/// Gigabits that arrived.
fn bulk(way: &Way<'_>, flows: usize, seconds: u64) -> Result<f64> {
    let Way { client, address } = way;
    let mut command = client.command("iperf3");
    command.args(["-c", &address.ip().to_string(), "-p", &address.port().to_string()]);
    command.args(["-P", &flows.to_string(), "-t", &seconds.to_string(), "--json"]);
    let report: serde_json::Value = serde_json::from_str(&shell::output(&mut command)?)?;
    let bytes = report["end"]["sum_received"]["bytes"].as_f64();
    Ok(bytes.with_context(|| format!("iperf3 says nothing of bytes: {report}"))? * 8.0 / 1e9)
}

/// Connections that were made, used once and ended.
fn connects(way: &Way<'_>, at_once: usize, seconds: u64) -> Result<f64> {
    let Way { client, address } = way;
    let mut command = client.peer_command();
    command.args(["connects", &format!("http://{address}/100")]);
    command.args([
        "--connections",
        &at_once.to_string(),
        "--seconds",
        &seconds.to_string(),
    ]);
    let report: serde_json::Value = serde_json::from_str(&shell::output(&mut command)?)?;
    ensure!(report["failed"] == 0, "connections failed: {report}");
    report["connections"]
        .as_f64()
        .context("no connections in the report")
}

/// The number of answers, all of which have to be good.
fn parse_h2load(report: &str) -> Result<u64> {
    let number = |line: &str, word: &str| -> Result<u64> {
        let line = report.lines().find_map(|have| have.strip_prefix(line));
        let part = line.and_then(|line| line.split(", ").find_map(|part| part.trim().strip_suffix(word)));
        let part = part.with_context(|| format!("h2load does not say {word}: {report}"))?;
        Ok(part.trim().parse()?)
    };
    let good = number("status codes:", "2xx")?;
    let lines =
        ["requests:", "status codes:"].map(|start| report.lines().find(|line| line.starts_with(start)));
    let [requests, codes] = lines.map(Option::unwrap_or_default);
    for word in ["failed", "errored", "timeout"] {
        let bad = number("requests:", word)?;
        ensure!(bad == 0, "{bad} requests {word}: {requests}; {codes}");
    }
    for status in ["3xx", "4xx", "5xx"] {
        let bad = number("status codes:", status)?;
        ensure!(bad == 0, "{bad} answers were {status}: {requests}; {codes}");
    }
    ensure!(good > 0, "no answers: {report}");
    Ok(good)
}

#[cfg(test)]
mod tests {
    use super::parse_h2load;

    const REPORT: &str = "finished in 1.00s, 5000.00 req/s, 1.00MB/s\n\
        requests: 5000 total, 5032 started, 5000 done, 5000 succeeded, 0 failed, 0 errored, 0 timeout\n\
        status codes: 5000 2xx, 0 3xx, 0 4xx, 0 5xx\n";

    #[test]
    fn only_good_answers_count() {
        assert_eq!(parse_h2load(REPORT).unwrap(), 5000);
        let wrong = REPORT.replace("0 5xx", "3 5xx");
        assert!(
            parse_h2load(&wrong)
                .unwrap_err()
                .to_string()
                .contains("3 answers were 5xx")
        );
        let failed = REPORT.replace("0 failed", "2 failed");
        assert!(
            parse_h2load(&failed)
                .unwrap_err()
                .to_string()
                .contains("2 requests failed")
        );
        assert!(parse_h2load("").is_err());
    }
}
