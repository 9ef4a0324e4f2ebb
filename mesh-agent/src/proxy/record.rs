//! The measuring of one request, from its head to the end of its response.
//!
//! Invariant: each exchange is recorded exactly once by each side that handles it: at the response's end, when
//! it breaks, or when it is dropped, be it before there is a response: then as Envoy does, with status 0 and `DC`.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body::Frame;
use tokio::time::Instant;

use crate::metrics::{Flag, HttpOutcome, HttpRecorder};
use crate::model::{Identity, InFlight};
use crate::telemetry::{AccessLog, AccessRecord};

/// What is known when the request arrives.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) started: Instant,
    pub(super) request_bytes: AtomicU64,
    /// Kept only when somebody reads the access log.
    pub(super) line: Option<Box<LogLine>>,
}

impl Exchange {
    pub(super) fn begin(line: Option<Box<LogLine>>) -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            request_bytes: AtomicU64::new(0),
            line,
        })
    }
}

/// The request's part of a line in the access log.
#[derive(Debug)]
pub(super) struct LogLine {
    pub(super) at: SystemTime,
    pub(super) method: String,
    pub(super) authority: String,
    pub(super) path: String,
    pub(super) protocol: &'static str,
    pub(super) request_id: String,
    pub(super) client: SocketAddr,
    pub(super) source: Option<Arc<str>>,
    pub(super) source_identity: Option<Identity>,
}

/// Where it went, for the access log.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) upstream: Option<SocketAddr>,
    pub(super) destination: Option<Arc<str>>,
    pub(super) identity: Option<Identity>,
    pub(super) route: Option<Arc<str>>,
    pub(super) attempts: u32,
}

/// Watches an exchange until it ends.
pub(super) struct Tail {
    exchange: Arc<Exchange>,
    recorder: Arc<HttpRecorder>,
    log: Option<(AccessLog, Outcome)>,
    direction: &'static str,
    /// 0 until there is a response.
    status: u16,
    flag: Flag,
    grpc_status: Option<u16>,
    bytes: u64,
    in_flight: Option<InFlight>,
    recorded: bool,
}

impl std::fmt::Debug for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tail")
            .field("status", &self.status)
            .field("flag", &self.flag)
            .finish_non_exhaustive()
    }
}

impl Tail {
    pub(super) fn new(
        exchange: Arc<Exchange>,
        recorder: Arc<HttpRecorder>,
        log: Option<(AccessLog, Outcome)>,
        direction: &'static str,
    ) -> Box<Self> {
        Box::new(Self {
            exchange,
            recorder,
            log,
            direction,
            status: 0,
            flag: Flag::DownstreamReset,
            grpc_status: None,
            bytes: 0,
            in_flight: None,
            recorded: false,
        })
    }

    pub(super) fn head(
        mut self: Box<Self>,
        status: StatusCode,
        headers: &HeaderMap,
        flag: Flag,
    ) -> Box<Self> {
        self.status = status.as_u16();
        self.flag = flag;
        self.grpc_status = grpc_status(headers);
        self
    }

    pub(super) fn exchange(&self) -> &Arc<Exchange> {
        &self.exchange
    }

    pub(super) fn answered_by(&mut self, upstream: SocketAddr) {
        if let Some((_, outcome)) = &mut self.log {
            outcome.upstream = Some(upstream);
        }
    }

    /// So many bytes of a response that is not watched.
    pub(super) fn sends(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// The response's end counts the endpoint's load down.
    pub(super) fn counting(mut self: Box<Self>, in_flight: Option<InFlight>) -> Box<Self> {
        self.in_flight = in_flight;
        self
    }

    /// The request's time is over.
    pub(super) fn expire(&mut self) {
        self.flag = Flag::UpstreamTimeout;
        self.record();
    }

    pub(super) fn passed(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.bytes += data.len() as u64;
        } else if let Some(trailers) = frame.trailers_ref() {
            self.grpc_status = grpc_status(trailers).or(self.grpc_status);
        }
    }

    /// The upstream broke off in the middle of its response.
    pub(super) fn broke(&mut self) {
        self.flag = Flag::UpstreamReset;
        self.record();
    }

    pub(super) fn finish(&mut self) {
        self.record();
    }

    fn record(&mut self) {
        if std::mem::replace(&mut self.recorded, true) {
            return;
        }
        self.in_flight = None;
        let duration = self.exchange.started.elapsed();
        let outcome = HttpOutcome {
            status: self.status,
            flag: self.flag,
            grpc_status: self.grpc_status,
            duration,
            request_bytes: self.exchange.request_bytes.load(Ordering::Relaxed),
            response_bytes: self.bytes,
        };
        self.recorder.record(&outcome);
        if let (Some(line), Some((log, to))) = (&self.exchange.line, &self.log) {
            self.write(log, line, to, &outcome, duration);
        }
    }

    fn write(
        &self,
        log: &AccessLog,
        line: &LogLine,
        to: &Outcome,
        outcome: &HttpOutcome,
        duration: Duration,
    ) {
        log.log(&AccessRecord {
            start: line.at,
            duration,
            direction: self.direction,
            protocol: line.protocol,
            method: &line.method,
            authority: &line.authority,
            path: &line.path,
            status: outcome.status,
            grpc_status: self.grpc_status,
            flags: self.flag.as_str(),
            bytes_received: outcome.request_bytes,
            bytes_sent: outcome.response_bytes,
            downstream: Some(line.client),
            upstream: to.upstream,
            source: line.source.as_ref().map(|source| source as &dyn Display),
            source_identity: line
                .source_identity
                .as_ref()
                .map(|identity| identity as &dyn Display),
            destination: to
                .destination
                .as_ref()
                .map(|destination| destination as &dyn Display),
            destination_identity: to.identity.as_ref().map(|identity| identity as &dyn Display),
            request_id: &line.request_id,
            route: to.route.as_deref().unwrap_or(""),
            attempts: to.attempts,
        });
    }
}

impl Drop for Tail {
    /// The client went away before the end.
    fn drop(&mut self) {
        if !self.recorded {
            self.flag = Flag::DownstreamReset;
            self.record();
        }
    }
}

fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}
